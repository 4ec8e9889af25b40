"""The contenders as processes: which there are, where their interpreters are, asking them for runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["CONTENDERS", "ROOT", "Child", "Contender", "Receiver", "install", "interpreter_of"]

ROOT = Path(__file__).parent.parent.parent
REQUIREMENTS = Path(__file__).parent / "requirements"


@dataclass(frozen=True)
class Contender:
    """module: in `contenders`. title: in the table. environment: where it lives, "" for obsdag's own interpreter.

    slower: about how many times slower than the loop it is; it gets as many fewer items.
    """

    module: str
    title: str
    environment: str = ""
    slower: int = 1


CONTENDERS = {
    contender.module: contender
    for contender in (
        Contender("loop", "hand-written loop"),
        Contender("obsdag_off", "obsdag, observers off"),
        Contender("obsdag_on", "obsdag, everything on"),
        Contender("obsdag_live", "obsdag, live mode", slower=5),
        Contender("usual", "loop, telemetry the usual way", slower=20),
        Contender("hamilton_async", "Hamilton async", "peers", 20),
        Contender("burr_async", "Burr", "peers", 20),
        Contender("taskiq_memory", "taskiq in memory", "peers", 20),
        Contender("pydantic_graph_async", "pydantic-graph", "peers", 50),
        Contender("haystack_async", "Haystack", "peers", 50),
        Contender("langgraph_async", "LangGraph", "peers", 100),
        Contender("earlier", "the earlier system", "earlier", 50),
    )
}


def interpreter_of(contender: Contender, environments: Path | None) -> str | None:
    """The Python that has the contender's library; None where it is not installed."""
    if not contender.environment:
        return sys.executable
    if environments is None:
        return None
    python = environments / contender.environment / "bin" / "python"
    return str(python) if python.exists() else None


def install(environments: Path) -> None:
    """Makes the environments of what obsdag is compared with; the earlier system's needs Python 3.13."""
    for name, python in (("peers", sys.executable), ("earlier", _python313())):
        if python is None:
            print("no Python 3.13 found: the earlier system is left out", file=sys.stderr)
            continue
        target = environments / name
        subprocess.run([python, "-m", "venv", str(target)], check=True)
        pip = [str(target / "bin" / "python"), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS / f"{name}.txt")]
        subprocess.run(pip, check=True)


def _python313() -> str | None:
    if sys.version_info[:2] == (3, 13):
        return sys.executable
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for candidate in ("python3.13", *map(str, sorted(home.glob("versions/3.13.*/bin/python")))):
        test = [candidate, "-c", "import sys, venv; sys.exit(sys.version_info[:2] != (3, 13))"]
        try:
            if subprocess.run(test, capture_output=True, check=False).returncode == 0:
                return candidate
        except OSError:
            continue
    return None


class _Process:
    """A module of this package in a process of its own, which ends when its standard input does."""

    def __init__(self, command: list[str], environ: dict[str, str], folder: Path) -> None:
        self._process = subprocess.Popen(
            command, cwd=folder, env=os.environ | environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def close(self) -> None:
        """Ends the process."""
        self._in.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Receiver(_Process):
    """Where spans are exported to; `address` is its base URL."""

    def __init__(self) -> None:
        super().__init__([sys.executable, "-m", "tests.benchmarks.receiver"], {}, ROOT)
        self.address = self._out.readline().strip()


class Child(_Process):
    """A contender that runs what it is asked for. `folder`: the checkout that is run, this one by default."""

    def __init__(self, python: str, module: str, receiver: str, loop: str = "asyncio", folder: Path = ROOT) -> None:
        command = [python, "-m", "tests.benchmarks.child", module, "--loop", loop]
        paths = {"PYTHONPATH": str(folder)} if folder != ROOT else {}
        super().__init__(command, {"BENCHMARK_RECEIVER": receiver, **paths}, folder)
        self.module = module

    def ask(self, workload: str, items: int, memory: bool = False) -> dict[str, Any] | None:
        """One run; None if the contender cannot do that workload. Raises RuntimeError if it died."""
        print(json.dumps({"workload": workload, "items": items, "memory": memory}), file=self._in, flush=True)
        answer = self._out.readline()
        if not answer:
            raise RuntimeError(f"{self.module} died: see its output above")
        found: dict[str, Any] | None = json.loads(answer)
        return found
