"""`obsdag demo`: a census of a source tree by the DAG of `obsdag.examples.census`, and a report of how the run went.

Two kinds of trouble are part of it. Files that are not Python, not text, or not to be read fail: the report lists them
as expected. The task `register` stumbles over one file in 16 on purpose, chosen by the file's digest, and is tried
again. Anything else that fails is a bug, is shown as such, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import heapq
import json
import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from obsdag.cli import serve_demo, shards
from obsdag.cli.common import FAILED, OK, CliError, one_line
from obsdag.cli.files import LineSink
from obsdag.cli.jsonl import lenient_line, line_of
from obsdag.cli.progress import Progress, Status, make_progress
from obsdag.cli.settings import add_settings, load_config, settings_help
from obsdag.core.observer import Observer
from obsdag.errors import ObsdagError

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.core.records import CriticalStep, Execution, Failure, Stall
    from obsdag.core.state import RunState
    from obsdag.executor import Executor
    from obsdag.ray import RayExecutor

__all__ = ["DEFAULTS", "Slow", "Watch", "add_command"]

DEFAULTS: Final[Mapping[str, Any]] = {
    "context_worker_num": 8,
    "task_worker_num": 0,
    "thread_pool_worker_num": 3,
    "process_pool_worker_num": max(1, min(4, os.cpu_count() or 1)),
    "max_live_contexts": 32,
}
"""Settings of the demo: few contexts in flight, so that what one of them waits for is seen in its ledger."""

_FILES: Final = ("census.jsonl", "failures.jsonl", "summary.json")
_SLOWEST: Final = 5
_EXAMPLES: Final = 100
_TICK_S: Final = 0.1


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="see a DAG at work: a census of Python files",
        description="Takes a census of the Python files below a folder, with a loop, three parallel branches (one of"
        " them in worker processes), a router, retries and real failures, and reports where the time went. Hidden"
        " folders and installed packages (site-packages) are left out.",
        epilog=settings_help(DEFAULTS),
    )
    parser.add_argument("--path", metavar="DIR", help="default: the standard library of this Python")
    parser.add_argument("--out", metavar="DIR", help="where to write files; default: a new folder for temporary files")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    add_settings(parser, DEFAULTS)
    shards.add_options(parser)
    serve_demo.add_options(parser)
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    """Does what the command line asks for; the exit status. Raises CliError."""
    from obsdag.cli.run import set_up_logs
    from obsdag.examples.census import census

    if args.serve:
        return serve_demo.serve(args)
    serve_demo.refuse_options(args)
    config = set_up_logs(load_config(args), None)
    folder = _folder(args.path)
    watch = Watch()
    try:
        executor = shards.make_executor(args, census(), config.replace(observers=(*config.observers, watch)))
    except ObsdagError as error:
        raise CliError(one_line(error)) from error
    with contextlib.ExitStack() as stack:
        out = _out(args.out)
        stack.callback(_remove_if_empty, out)
        sinks = {name: LineSink(str(out / name), "--out") for name in _FILES}
        for sink in sinks.values():
            stack.callback(sink.discard)
        progress = make_progress(f"census of {folder.name or folder}", args.quiet)
        return asyncio.run(_Census(executor, folder, out, sinks, watch, progress).run())


def _folder(path: str | None) -> Path:
    from obsdag.examples.census import find_sources

    folder = Path(path if path is not None else sysconfig.get_path("stdlib"))
    try:
        os.scandir(folder).close()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CliError(f"--path {str(folder)!r} is no folder that can be read: {reason}") from error
    if next(find_sources(str(folder)), None) is None:
        raise CliError(
            f"--path {str(folder)!r}: there is no .py file below it (hidden folders and site-packages are left out)"
        )
    return folder.absolute()


def _out(path: str | None) -> Path:
    if path is None:
        return Path(tempfile.mkdtemp(prefix="obsdag-demo-"))
    out = Path(path).absolute()
    try:
        out.mkdir(exist_ok=True)
    except FileExistsError:
        raise CliError(f"--out {path!r} is a file: name a folder") from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CliError(f"--out {path!r} cannot be made: {reason}") from error
    return out


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


class Slow:
    """A slow context: how long it took (seconds), where the time went, and which executions decided it."""

    __slots__ = ("ledger", "name", "outcome", "path", "took_s")

    def __init__(
        self, took_s: float, name: str, outcome: str, ledger: Mapping[str, float], steps: list[CriticalStep]
    ) -> None:
        self.took_s = took_s
        self.name = name
        self.outcome = outcome
        self.ledger = {state: seconds for state, seconds in ledger.items() if seconds > 0}
        self.path = [(step.task, step.ended - step.started) for step in steps if step.critical]

    def __lt__(self, other: Slow) -> bool:
        return self.took_s < other.took_s

    def to_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        path = [{"task": task, "seconds": round(seconds, 6)} for task, seconds in self.path]
        ledger = {state: round(seconds, 6) for state, seconds in self.ledger.items()}
        return {
            "context": self.name,
            "seconds": round(self.took_s, 6),
            "outcome": self.outcome,
            "ledger": ledger,
            "critical_path": path,
        }


class Watch(Observer):
    """What the report wants to know of the run: failures by kind, retries, where the time went, the slowest contexts.

    expected: failures that a tree of real files may cause, kind -> number. unexpected: all others, in words.
    """

    needs_records = True

    def __init__(self) -> None:
        self.run: RunState | None = None
        self.expected: Counter[str] = Counter()
        self.examples: list[tuple[str, str, str]] = []
        self.unexpected: list[str] = []
        self.unexpected_total = 0
        self.retries: Counter[str] = Counter()
        self.slowest: list[Slow] = []
        self.ledger: Counter[str] = Counter()
        self.sink: LineSink | None = None

    def run_started(self, run: RunState, now: float) -> None:
        """Remembers whom to ask for critical paths."""
        self.run = run

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        """Adds up where the time went, and keeps the slowest files; the context that is walked is no file."""
        if "path" not in context or self.run is None:
            return
        self.ledger.update(context.ledger)
        took_s = sum(context.ledger.values())
        if len(self.slowest) == _SLOWEST and took_s <= self.slowest[0].took_s:
            return
        slow = Slow(took_s, context.id, outcome, context.ledger, self.run.critical_path(context))
        (heapq.heappushpop if len(self.slowest) == _SLOWEST else heapq.heappush)(self.slowest, slow)

    def retry_scheduled(self, execution: Execution, error: BaseException, delay_s: float, now: float) -> None:
        """Counts retries by what they are for."""
        self.retries[type(error).__name__] += 1

    def context_failed(self, context: Context, failure: Failure, execution: Execution | None, now: float) -> None:
        """A file that is not as it should be, or a bug."""
        from obsdag.examples.census import EXPECTED

        error = failure.exception
        kind = type(error).__name__.lower() if isinstance(error, EXPECTED) else ""
        if kind:
            self.expected[kind] += 1
            if len(self.examples) < _EXAMPLES:
                self.examples.append((kind, context.id, one_line(error)))
        else:
            self._unexpected(str(failure))
        if self.sink is not None:
            record = {"file": context.get("path"), "expected": bool(kind), "task": failure.task}
            record |= {"attempts": failure.attempts, "error_type": type(error).__name__, "error": str(error)}
            self.sink.put(lenient_line(record))

    def context_stalled(self, context: Context, stall: Stall, now: float) -> None:
        """Never expected."""
        self._unexpected(str(stall))

    def cleanup_failed(self, what: str, error: BaseException) -> None:
        """Never expected."""
        self._unexpected(f"{what} raised {type(error).__name__}: {error}")

    def observer_failed(self, observer: Observer, fact: str, error: BaseException) -> None:
        """Never expected."""
        self._unexpected(f"{type(observer).__name__}.{fact} raised {type(error).__name__}: {error}")

    def _unexpected(self, text: str) -> None:
        self.unexpected_total += 1
        if len(self.unexpected) < 20:
            self.unexpected.append(one_line(text))


class _Census:
    """One run of the demo."""

    def __init__(
        self,
        executor: Executor | RayExecutor,
        folder: Path,
        out: Path,
        sinks: dict[str, LineSink],
        watch: Watch,
        progress: Progress,
    ) -> None:
        from obsdag.examples.census import Summary

        self.executor = executor
        self.folder = folder
        self.out = out
        self.sinks = sinks
        self.watch = watch
        self.progress = progress
        self.summary = Summary()
        self.total = 0
        watch.sink = sinks["failures.jsonl"]

    async def run(self) -> int:
        """The exit status. Raises CliError."""
        from obsdag.examples.census import find_sources

        self.total = await asyncio.to_thread(lambda: sum(1 for _ in find_sources(str(self.folder))))
        started = time.monotonic()
        try:
            early = await self._stream()
        except asyncio.CancelledError:
            self.progress.stop()
            self.progress.say(f"obsdag demo: interrupted after {self.summary.files:,} files; nothing is written")
            raise
        finally:
            self.progress.stop()
        return await self._report(time.monotonic() - started, early)

    async def _stream(self) -> str:
        """Runs to the end; why it ended early, empty if it did not."""
        census = self.sinks["census.jsonl"]
        ticking: asyncio.Task[None] | None = None
        try:
            async with self.executor.stream({"folder": str(self.folder)}) as outputs:
                self.progress.start()
                ticking = asyncio.create_task(self._tick())
                async for output in outputs:
                    data = {name: value for name, value in output.to_dict().items() if name != "folder"}
                    self.summary.add(data)
                    census.put(line_of(data))
                    if census.is_full:
                        await census.flush()
        except shards.EARLY as error:
            return shards.why_early(error)
        finally:
            if ticking is not None:
                ticking.cancel()
        return ""

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            failed = sum(self.watch.expected.values()) + self.watch.unexpected_total
            done = self.summary.files + failed
            living = int(self.executor.stats()["living"])
            fraction = min(1.0, done / self.total) if self.total else None
            self.progress.update(Status(self.summary.files, failed, living, fraction))

    async def _report(self, took_s: float, early: str) -> int:
        from obsdag.cli.report import print_report

        if early:
            self.watch._unexpected(early)
        stats = self.executor.stats()
        facts = self._facts(took_s, stats)
        self.sinks["summary.json"].put(json.dumps(facts, indent=2).encode() + b"\n")
        for sink in self.sinks.values():
            await sink.flush()
            sink.commit()
        print_report(facts, [str(self.out / name) for name in self.sinks], sys.stdout)
        return FAILED if self.watch.unexpected_total else OK

    def _facts(self, took_s: float, stats: dict[str, Any]) -> dict[str, Any]:
        """All that the report shows, as it is written to summary.json; shards tell of retries their number only."""
        from obsdag.examples.census import Hiccup

        watch = self.watch
        outcomes = {name: stats[name] for name in ("output", "failed", "split", "dropped", "cancelled", "stalled")}
        return {
            "folder": str(self.folder),
            "python": platform.python_version(),
            "seconds": round(took_s, 3),
            "outcomes": {name: number for name, number in outcomes.items() if number or name in ("output", "failed")},
            "expected_failures": dict(watch.expected),
            "unexpected_failures": watch.unexpected_total,
            "unexpected": watch.unexpected,
            "failures": [{"kind": kind, "file": name, "error": error} for kind, name, error in sorted(watch.examples)],
            "retries": dict(watch.retries) or ({Hiccup.__name__: stats["retries"]} if stats["retries"] else {}),
            "census": self.summary.to_dict(),
            "tasks": {
                name: {"runs_on": self.executor.dag.tasks[name].runs_on, **numbers}
                for name, numbers in stats["tasks"].items()
            },
            "ledger": {state: round(took_s, 6) for state, took_s in watch.ledger.items() if took_s > 0},
            "slowest": [slow.to_dict() for slow in sorted(watch.slowest, reverse=True)],
        }
