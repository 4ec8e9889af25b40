"""The twelve defects of the earlier system (SEMANTICS section 7), put back on purpose into a copy of the code.

`python -m tests.simulation.defects` applies each as a patch in a temporary folder, looks for it with the simulation
and, where that cannot see it (it is in the shell, or in data), with the tests of its rule; prints a table; exits with 1
if one was not found.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SCENARIOS = 600


@dataclass(frozen=True)
class Defect:
    """One defect: its number in section 7, what it is, the patches (file, old, new), the tests that look for it."""

    number: int
    what: str
    patches: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...] = ()


DEFECTS = (
    Defect(
        1,
        "a finished run idles until a queue time-out",
        (
            (
                "obsdag/shell.py",
                "                self.done.set_result(None)\n            return\n        run.rest",
                "                self.loop.call_later(1.0, lambda: self.done.done() or self.done.set_result(None))\n"
                "            return\n        run.rest",
            ),
        ),
        ("tests/rules/test_E_runs.py",),
    ),
    Defect(
        1,
        "a deadlock is noticed after 20 s only",
        (
            (
                "obsdag/core/joins.py",
                "        else:\n            self._stall(context, self._diagnose(context), now)\n\n    def _awaits",
                "        else:\n            self.timers.set(now + 20.0, self._late, context)\n\n"
                "    def _late(self, context: Context, now: float) -> None:\n        if context._outcome is None:\n"
                "            self._stall(context, self._diagnose(context), now)\n\n    def _awaits",
            ),
        ),
    ),
    Defect(
        2,
        "retry delays and rate limits spin: the context is queued over and over",
        (("obsdag/core/waits.py", "        if when <= now:\n", "        if True:\n"),),
    ),
    Defect(
        3,
        "counts of running executions leak when a task raises",
        (
            (
                "obsdag/core/progress.py",
                "        if execution.grant is not None and not execution.abandoned:",
                '        if execution.grant is not None and not execution.abandoned and outcome == "success":',
            ),
        ),
    ),
    Defect(
        3,
        "parallel_num is off by one",
        (("obsdag/core/base.py", "ConcurrencyLimit(parallel, name", "ConcurrencyLimit(parallel + 1, name"),),
    ),
    Defect(
        4,
        "GC loops for ever once a context has children",
        (
            (
                "obsdag/core/lifecycle.py",
                "            pending.extend(child._children or ())",
                "            pending.extend(context._children or ())",
            ),
        ),
    ),
    Defect(
        5,
        "a failed context vanishes: no output, no error in the result",
        (
            (
                "obsdag/core/lifecycle.py",
                '        self._end(context, "failed", now)',
                "        del self.contexts[context]",
            ),
        ),
    ),
    Defect(
        6,
        "a task that returned nothing is run again in the next wave",
        (
            (
                "obsdag/core/state.py",
                "        else:\n            self._discard(context, now)\n",
                "        else:\n            self._offer_again(context, index)\n",
            ),
        ),
    ),
    Defect(
        7,
        "one slow branch holds back the successors of a fast one (waves)",
        (
            (
                "obsdag/core/state.py",
                "        while context._ready and not (freezes and context in freezes):",
                "        while context._ready and not context._running and not (freezes and context in freezes):",
            ),
        ),
    ),
    Defect(
        8,
        "a shallow copy shares its dict with its siblings",
        (
            (
                "obsdag/context.py",
                "return dict(self._data) if copy_data else {}",
                "return self._data if copy_data else {}",
            ),
            ("obsdag/context.py", "data.copy() if type(data) is dict", "data if isinstance(data, dict)"),
        ),
        ("tests/rules/test_C_data_and_ready.py",),
    ),
    Defect(
        9,
        "concurrent calls of a service overwrite one another's future",
        (
            (
                "obsdag/services.py",
                "        answer = Answer(loop=loop)\n        context =",
                "        answer = self.waiting and next(iter(self.waiting)) or Answer(loop=loop)\n        context =",
            ),
        ),
        ("tests/kinds/test_services.py", "tests/rules/test_T_streams_loops_services.py"),
    ),
    Defect(
        10,
        "stream state lives in the DAG",
        (
            (
                "obsdag/generators.py",
                "        generator = self.generator\n        try:",
                '        generator = self.generator or getattr(self.task.func, "generator", None)\n        try:',
            ),
            (
                "obsdag/generators.py",
                "                generator = self.generator = self._make(context)",
                "                generator = self.generator = self.task.func.generator = self._make(context)",
            ),
        ),
        ("tests/kinds/test_matrix.py", "tests/rules/test_T_streams_loops_services.py"),
    ),
    Defect(
        11,
        "the queue is unbounded",
        (("obsdag/core/sources.py", " + self.buffered < self.max_live", " + self.buffered < 1 << 60"),),
        ("tests/rules/test_defects.py",),
    ),
    Defect(
        11,
        "a cancelled run leaves its workers behind",
        (("obsdag/shell.py", "        await self._cancel_tasks()\n", ""),),
        ("tests/rules/test_E_runs.py",),
    ),
    Defect(
        12,
        "a serving executor's run never ends",
        (
            (
                "obsdag/serving.py",
                "            await self._hurry.wait()\n",
                "            await asyncio.Event().wait()\n",
            ),
        ),
        ("tests/rules/test_defects.py",),
    ),
)


def patched(defect: Defect, folder: Path) -> Path:
    """A copy of the code with the defect in it."""
    for name in ("obsdag", "tests", "pyproject.toml"):
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    for file, old, new in defect.patches:
        path = folder / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, (
            f"defect {defect.number} ({defect.what}): {file} has {text.count(old)} times {old!r}"
        )
        path.write_text(text.replace(old, new), encoding="utf-8")
    return folder


def simulated(folder: Path, scenarios: int = SCENARIOS, timeout_s: float = 120.0) -> str:
    """How the simulation finds it: "scenario N: ...", or empty."""
    code = (
        "import sys\nfrom tests.simulation.scenarios import make_scenario, mix, play\n"
        f"for seed in range({scenarios}):\n"
        "    print(seed, flush=True)\n"
        "    play(make_scenario(seed), mix(seed, 0)).finish(20_000)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as late:
        out = late.stdout or b""
        lines = (out.decode() if isinstance(out, bytes) else out).split()
        return f"scenario {int(lines[-1]) + 1 if lines else 1}: it never ends"
    if not done.returncode:
        return ""
    why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it ended"
    lines = done.stdout.split()
    assert lines, f"the patched code cannot be run: {why}"
    return f"scenario {int(lines[-1]) + 1}: {why[:110]}"


def tested(folder: Path, tests: Sequence[str], timeout_s: float) -> str:
    """Which test finds it; empty if none does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--timeout", "20", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return "the tests never end"
    found = re.search(r"^(?:FAILED|ERROR) \S*?::(\S+)", done.stdout, re.MULTILINE)
    return found[1] if found else ("" if not done.returncode else "the tests break off")


def find(defect: Defect) -> str:
    """How the defect is found; empty if it is not."""
    with tempfile.TemporaryDirectory() as folder:
        copy = patched(defect, Path(folder))
        return simulated(copy) or (tested(copy, defect.tests, 400.0) if defect.tests else "")


def main() -> int:
    """Looks for each; prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, help="only these")
    numbers = parser.parse_args().numbers
    missed = 0
    print("| defect | put back as | found by |\n|---|---|---|")
    for defect in DEFECTS:
        if not numbers or defect.number in numbers:
            found = find(defect)
            missed += not found
            print(f"| {defect.number} | {defect.what} | {found or 'NOT FOUND'} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
