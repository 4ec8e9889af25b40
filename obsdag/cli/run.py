"""`obsdag run`: lines of JSON through a DAG.

Input is read as the run has room for it and outputs are written as they come, so memory is bounded by
max_live_contexts whatever the input's size. A broken line is therefore found when its turn comes: it ends the run, and
no file is left. How a run ends, its status, and what becomes of its files:

    every context went well                               0    written
    some failed, stalled, or gave what JSON cannot write  1    written; they hold all the others
    it ended early: --deadline, on_failure=raise          1    what there was is kept as FILE.partial
    bad input                                             2    none
    Ctrl-C, SIGTERM                                 130, 143   what there was is kept as FILE.partial
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from obsdag.cli import shards
from obsdag.cli.common import FAILED, OK, CliError, one_line, output_descriptor, shown
from obsdag.cli.files import LineSink, check_apart, open_input
from obsdag.cli.jsonl import LineSource, lenient_line, line_of, why_not_json
from obsdag.cli.progress import Progress, Status, make_progress
from obsdag.cli.settings import add_settings, load_config, settings_help
from obsdag.core.observer import Observer
from obsdag.errors import ObsdagError

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.context import Context
    from obsdag.core.records import Execution, Failure, Stall
    from obsdag.executor import Executor, OutputStream
    from obsdag.ray import RayExecutor, RayStream

__all__ = ["LOG_LEVELS", "FailureLog", "Terminated", "add_command", "ending_on_signals", "set_up_logs"]

LOG_LEVELS = ("debug", "info", "warning", "error")
_TICK_S = 0.1
_HINTS = {"process_pool_worker_num": "--processes N", "insecure=True": "--insecure"}
_SHOWN_FAILURES = 10
_STUCK_WRITE_S = 1.0  # a reader that takes nothing for this long does not keep an interrupted run from ending

_ENDING = """\
exit status:
  0    nothing failed
  1    some contexts failed or stalled, or gave what JSON cannot write: the outputs of all others are written
  2    bad input, told in one line on standard error: no file is written
  130  interrupted (143: terminated): FILE.partial has what there was; so it is after --deadline, with status 1
A broken line is found when its turn comes: by then tasks have run for the lines before it.

"""


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="run a DAG over lines of JSON",
        description="Runs a DAG: one context for each line of the input, one line for each output, as they come.",
        epilog=_ENDING + settings_help(),
    )
    add = parser.add_argument
    dag = "module:dag, path/to/file.py:dag (a DAG, or a function that makes one), or a TOML file"
    add("target", metavar="DAG", help=dag)
    file: dict[str, Any] = {"metavar": "FILE.jsonl", "default": "-"}
    add("-i", "--input", **file, help="lines of JSON objects; -, the default: standard input")
    add("-o", "--output", **file, help="where outputs go; -, the default: standard output")
    add("--failures", metavar="FILE.jsonl", help="where failed and stalled contexts go, one line each")
    add("-q", "--quiet", action="store_true", help="show no progress and no summary")
    add("--log-level", choices=LOG_LEVELS, help="show the engine's log lines from this level on (default: none)")
    add_settings(parser)
    shards.add_options(parser)
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    """Does what the command line asks for; the exit status. Raises CliError."""
    from obsdag.cli.target import load_dag

    if args.ray is not None and args.log_level in ("debug", "info"):
        raise CliError(f"--log-level {args.log_level}: with --ray, engines log warnings and errors only")
    config = set_up_logs(load_config(args, args.target), args.log_level)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(output_descriptor()) if args.output == "-" else None
        source = _open_source(args, stack, output)
        dag = load_dag(args.target)
        sink = LineSink(None if args.output == "-" else args.output, "--output", output)
        stack.callback(sink.discard)
        log = FailureLog(LineSink(args.failures, "--failures") if args.failures is not None else None)
        stack.callback(log.discard)
        try:
            executor = shards.make_executor(args, dag, config.replace(observers=(*config.observers, log)))
        except ObsdagError as error:
            hint = next((f" ({option})" for words, option in _HINTS.items() if words in str(error)), "")
            raise CliError(f"{args.target}: {one_line(error)}{hint}") from error
        progress = make_progress(source.name, args.quiet)
        return asyncio.run(_Run(executor, source, sink, log, progress, args.quiet).run())


def _open_source(args: argparse.Namespace, stack: contextlib.ExitStack, output: int | None) -> LineSource:
    is_stdin = args.input == "-"
    descriptor = 0 if is_stdin else open_input(args.input, "--input")
    if not is_stdin:
        import os

        stack.callback(os.close, descriptor)
    target = args.output if output is None else output
    check_apart([("--input", descriptor), ("--output", target), ("--failures", args.failures)])
    if is_stdin and sys.stdin is not None and sys.stdin.isatty() and not args.quiet:
        print("obsdag run: reads lines of JSON from the terminal; Ctrl-D ends them", file=sys.stderr)
    try:
        return LineSource(descriptor, "stdin" if is_stdin else args.input)
    except OSError as error:
        raise CliError(f"standard input cannot be read: {error.strerror or error}; give --input FILE") from error


def set_up_logs(config: ExecutorConfig, level: str | None) -> ExecutorConfig:
    """The configuration with log lines from `level` on; without one, with none: the command itself tells failures."""
    from obsdag.telemetry import Telemetry

    if config.telemetry is not None:
        return config
    if level is None:
        return config.replace(telemetry=Telemetry.off())
    import obsdag.logs

    obsdag.logs.configure(level=level)
    return config.replace(telemetry=Telemetry()) if level in ("debug", "info") else config


class FailureLog(Observer):
    """Counts what did not go well and writes it: to a sink if there is one, else the first few for `told`.

    failed: contexts that failed, stalled, or gave what JSON cannot write. cleanup: errors at the run's end.
    """

    def __init__(self, sink: LineSink | None) -> None:
        self.sink = sink
        self.failed = 0
        self.told: list[str] = []
        self.cleanup: list[str] = []

    def context_failed(self, context: Context, failure: Failure, execution: Execution | None, now: float) -> None:
        """A context failed."""
        error = failure.exception
        self._note(context, "failed", failure.task, failure.attempts, type(error).__name__, str(error))

    def context_stalled(self, context: Context, stall: Stall, now: float) -> None:
        """A context can never go on."""
        missing = f" (missing: {', '.join(stall.missing)})" if stall.missing else ""
        self._note(context, "stalled", stall.task, 0, "Stall", stall.reason + missing)

    def cannot_write(self, context: Context, why: str) -> None:
        """An output that JSON cannot write."""
        self._note(context, "unwritable", "output", 0, "TypeError", why)

    def cleanup_failed(self, what: str, error: BaseException) -> None:
        """A shutdown hook or the like raised."""
        self.cleanup.append(f"{what} raised {type(error).__name__}: {one_line(error)}")

    def thread_abandoned(self, thread: str, task: str, running_s: float) -> None:
        """A task's thread, or the task itself, did not end when it was told to."""
        self.cleanup.append(f"{one_line(task)} does not end, after {running_s:.1f} s, and is left behind")

    def _note(self, context: Context, outcome: str, task: str, attempts: int, kind: str, error: str) -> None:
        self.failed += 1
        if self.sink is None:
            if self.failed <= _SHOWN_FAILURES:
                whose = "" if context.parent is None else f" (of {shown(context.root.id)})"
                self.told.append(f"{shown(context.id)}{whose} {outcome} at {task!r}: {kind}: {shown(one_line(error))}")
            return
        head = {"context": context.id, "root": context.root.id, "outcome": outcome, "task": task, "attempts": attempts}
        self.sink.put(lenient_line({**head, "error_type": kind, "error": error, "data": context.to_dict()}))

    def discard(self) -> None:
        """Removes the file, unless it is whole."""
        if self.sink is not None:
            self.sink.discard()


class Terminated(Exception):
    """SIGTERM or SIGHUP came."""


@contextlib.contextmanager
def ending_on_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP cancel the current asyncio task, as SIGINT does by itself; those that came are listed."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    came: list[int] = []

    def end(number: int) -> None:
        came.append(number)
        task.cancel()

    numbers = (signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, end, number)
    try:
        yield came
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class _Run:
    """One run of the command: the stream of outputs, its two sinks, and what is shown of it."""

    def __init__(
        self,
        executor: Executor | RayExecutor,
        source: LineSource,
        sink: LineSink,
        log: FailureLog,
        progress: Progress,
        quiet: bool,
    ) -> None:
        self.executor = executor
        self.source = source
        self.sink = sink
        self.log = log
        self.progress = progress
        self.quiet = quiet
        self.sinks = [sink] if log.sink is None else [sink, log.sink]
        self.outputs: OutputStream | RayStream | None = None
        self.broken: BaseException | None = None
        self._told = 0

    async def run(self) -> int:
        """The exit status. Raises CliError; CancelledError after an interruption."""
        started = time.monotonic()
        with ending_on_signals() as signals:
            try:
                early = await self._stream()
                return await self._ended(early, time.monotonic() - started)
            except asyncio.CancelledError:
                await self._interrupted(signals)
                if signals:
                    return 128 + signals[0]
                raise
            finally:
                self.progress.stop()

    async def _stream(self) -> str:
        """Runs to the end; why it ended early, empty if it did not."""
        ticking: asyncio.Task[None] | None = None
        try:
            async with self.executor.stream(self.source.contexts()) as outputs:
                self.outputs = outputs
                self.progress.start()
                ticking = asyncio.create_task(self._tick(asyncio.current_task()))
                async for output in outputs:
                    self._take(output)
                    if self.sink.is_full:
                        await self.sink.flush()
        except shards.EARLY as error:
            return shards.why_early(error)
        except asyncio.CancelledError:
            if self.broken is not None:
                raise self.broken from None
            raise
        finally:
            if ticking is not None:
                ticking.cancel()
                await asyncio.wait([ticking])
        return ""

    def _take(self, output: Context) -> None:
        data = output.to_dict()
        try:
            self.sink.put(line_of(data))
        except (TypeError, ValueError, RecursionError):
            self.log.cannot_write(output, f"JSON cannot write this output: {why_not_json(data)}")

    async def _tick(self, main: asyncio.Task[Any] | None) -> None:
        """Writes what came and shows how the run stands, as long as it goes on; what cannot be written ends it."""
        assert main is not None
        try:
            while True:
                await asyncio.sleep(_TICK_S)
                for sink in self.sinks:
                    await sink.flush()
                self._tell_failures()
                self.progress.update(self._status())
        except (CliError, BrokenPipeError) as error:
            self.broken = error
            main.cancel()

    @property
    def counts(self) -> dict[str, int]:
        """`entered` and each outcome so far."""
        return {"entered": 0} if self.outputs is None else self.outputs.counts

    def _status(self) -> Status:
        entered = self.counts["entered"]
        ended = sum(self.counts.values()) - entered
        read = self.source.fraction
        fraction = None if read is None else read * (ended / entered if entered else 1.0)
        return Status(self.sink.lines, self.log.failed, entered - ended, fraction)

    def _tell_failures(self) -> None:
        for line in self.log.told[self._told :]:
            self.progress.say(f"obsdag run: {line}")
            self._told += 1
            if self._told == _SHOWN_FAILURES:
                self.progress.say("obsdag run: further failures are only counted; --failures FILE keeps them all")

    async def _ended(self, early: str, took_s: float) -> int:
        """All outputs are there, or all that there will be: the files become what they are."""
        for sink in self.sinks:
            await sink.flush()
        self._tell_failures()
        self.progress.stop()
        for line in self.log.cleanup:
            self.progress.say(f"obsdag run: {line}")
        if early:
            self.progress.say(f"obsdag run: {early}{self._kept()}")
        else:
            for sink in self.sinks:
                sink.commit()
        if not self.quiet:
            self.progress.say(self._summary(took_s, early))
        return FAILED if early or self.log.failed or self.log.cleanup else OK

    async def _interrupted(self, signals: list[int]) -> None:
        for sink in self.sinks:
            with contextlib.suppress(CliError, OSError, TimeoutError):
                await asyncio.wait_for(sink.flush(), _STUCK_WRITE_S)
        self.progress.stop()
        why = "terminated" if signals else "interrupted"
        lost = f"{_number(self.counts.get('cancelled', 0), 'context')} cancelled"
        self.progress.say(f"obsdag run: {why} after {_number(self.sink.lines, 'output')}, {lost}{self._kept()}")

    def _kept(self) -> str:
        kept = [name for sink in self.sinks if (name := sink.keep_partial())]
        return f"; what there is so far is in {' and '.join(kept)}" if kept else ""

    def _summary(self, took_s: float, early: str) -> str:
        rate = self.sink.lines / took_s if took_s > 0 else 0.0
        others = {name: self.counts[name] for name in ("dropped", "cancelled") if self.counts.get(name)}
        numbers = [_number(self.sink.lines, "output"), f"{self.log.failed:,} failed"]
        numbers += [f"{number:,} {name}" for name, number in others.items()]
        where = "" if early or self.sink.name == "standard output" else f" -> {self.sink.name}"
        failures = f", failures -> {self.log.sink.name}" if self.log.sink is not None and not early else ""
        took = f"in {took_s:.2f} s ({rate:,.0f}/s)"
        return shown(f"obsdag run: {', '.join(numbers)} of {self.source.name} {took}{where}{failures}")


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
