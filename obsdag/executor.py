"""`Executor`: a DAG, its configuration and its pools; `run` and `stream` open a run and see it to its end (SEMANTICS
section 5).
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from obsdag.config import ExecutorConfig
from obsdag.context import Context, OutputContext, StopContext
from obsdag.core.observer import Facts, Observer
from obsdag.core.queue import IDLE
from obsdag.core.records import Failure, Stall
from obsdag.core.states import OUTCOMES
from obsdag.engine_pools import Pools
from obsdag.errors import ConfigError, DeadlineExceeded, RunFailed
from obsdag.inputs import Inputs, open_inputs
from obsdag.mailbox import see_through
from obsdag.runtime import Runtime
from obsdag.shell import RunShell
from obsdag.telemetry import default_observers

if TYPE_CHECKING:
    from obsdag.graph import DAG
    from obsdag.plan import Plan

__all__ = ["Executor", "OutputStream", "RunResult"]


class RunResult(list[OutputContext]):
    """The outputs of a run in order of completion (E2).

    failures: contexts that failed, with task, attempts and exception. counts: `entered` and each outcome to its
    number. stalled: why contexts could not go on. duration_s: seconds from the first input to the last outcome.
    cleanup_errors: what shutdown hooks and closing raised, as (what, exception). abandoned: threads and tasks that did
    not end when they were told to, in words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[Failure] = []
        self.counts: dict[str, int] = {"entered": 0, **dict.fromkeys(OUTCOMES, 0)}
        self.stalled: list[Stall] = []
        self.duration_s = 0.0
        self.cleanup_errors: list[tuple[str, BaseException]] = []
        self.abandoned: list[str] = []

    def __repr__(self) -> str:
        ended = ", ".join(f"{name} {number}" for name, number in self.counts.items() if number)
        return f"<RunResult of {len(self)} outputs in {self.duration_s:.3f} s: {ended or 'nothing entered'}>"


class OutputStream(AsyncIterator[OutputContext]):
    """The outputs of a run as they come (E3); `counts`, `failures` and `stalled` tell how it stands."""

    def __init__(self, shell: RunShell) -> None:
        self._shell = shell
        self._ready: deque[OutputContext] = deque()
        self._waiter: asyncio.Future[None] | None = None
        shell.run.emit = self._emit

    def _emit(self, output: OutputContext) -> None:
        self._ready.append(output)
        self._shell.run.buffered += 1
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __anext__(self) -> OutputContext:
        shell = self._shell
        while not self._ready:
            if shell.done.done():
                if shell.early:
                    raise _early_error(shell, None)
                raise StopAsyncIteration
            self._waiter = shell.loop.create_future()
            await asyncio.wait([self._waiter, shell.done], return_when=asyncio.FIRST_COMPLETED)
        output = self._ready.popleft()
        run = shell.run
        full = not run.has_room()
        run.buffered -= 1
        if full:
            shell.kick()
        return output

    @property
    def counts(self) -> dict[str, int]:
        """`entered` and each outcome so far."""
        return self._shell.run.counts

    @property
    def failures(self) -> list[Failure]:
        """The newest failures, `failures_kept` at most (1,000)."""
        return list(self._shell.run.failures)

    @property
    def stalled(self) -> list[Stall]:
        """Why contexts could not go on."""
        return list(self._shell.run.stalls)


class Executor:
    """Runs a DAG (seed: `Executor(dag, runtime=None, config=None)`); an unbuilt DAG is built.

    State belongs to runs: an executor may run again, and several times at once, in one event loop (RuntimeError for
    two at a time). `async with executor:` keeps its pools over several runs (E18). Raises GraphError, ConfigError.
    """

    shell_class: ClassVar[type[RunShell]] = RunShell

    def __init__(self, dag: DAG, runtime: Runtime | None = None, config: ExecutorConfig | None = None) -> None:
        if config is not None and not isinstance(config, ExecutorConfig):
            raise ConfigError(f"config must be an ExecutorConfig, not {config!r:.80}")
        self.dag = dag
        self.plan = dag.build()
        self.runtime = runtime if runtime is not None else Runtime()
        self.config = config if config is not None else ExecutorConfig()
        self._pools = Pools(self.config)
        self._kept_open = False
        self._shells: list[RunShell] = []
        self._totals: Counter[str] = Counter()
        self._check_processes()

    def _check_processes(self) -> None:
        for task in self.plan.tasks:
            if task.runs_on == "process" and not self.config.process_pool_worker_num:
                self._pools.processes(task.id)
            if task.runs_on == "remote" and not callable(getattr(self.config.ray, "open_jobs", None)):
                self._pools.remotes(task.id)

    # --- running

    async def run(self, input_context: Inputs = None) -> RunResult:
        """Runs the inputs to their end and returns the outputs (E2).

        input_context: a context, a list of contexts, None for one empty context; also a mapping, or an iterable or
        async iterable of mappings or contexts, which is pulled from as the run has room. Raises ValueError
        (InputError, ContextError) for other input, RunFailed with on_failure="raise", DeadlineExceeded, and what an
        input iterator raises.
        """
        result = RunResult()
        async with _journalled(self.config.journal, self.plan, left_alone=True) as recorder:
            shell = self._open_shell("run", open_inputs(input_context))
            shell.run.emit = result.append
            await self._see_to_its_end(shell, result, recorder)
        return result

    async def recover(self, tasks: Mapping[str, str | None] | None = None) -> RunResult:
        """Runs to their ends what the journal holds of this DAG without an outcome, from its last committed progress.

        tasks: for a DAG that has changed: old task id -> its id now, None if the task is gone. A task that ran when the
        process died runs again. Raises ConfigError without a journal, PlanChangedError, JournalError, and as `run`.
        """
        if self.config.journal is None:
            raise ConfigError("there is nothing to recover from: set ExecutorConfig(journal=SQLiteJournal(...))")
        result = RunResult()
        async with _journalled(self.config.journal, self.plan) as recorder:
            recovery = await self.config.journal.load(self.plan, tasks)
            if self.config.telemetry is not None:
                from obsdag.telemetry.carrier import restore_callers

                restore_callers(recovery.living)
            shell = self._open_shell("run", iter(()))
            shell.run.emit = result.append
            shell.restore = partial(recorder.take_up, recovery)
            await self._see_to_its_end(shell, result, recorder)
        return result

    async def _see_to_its_end(self, shell: RunShell, result: RunResult, recorder: Any) -> None:
        if recorder is not None:
            recorder.attach(shell)
        try:
            await self._wait(shell)
        finally:
            await self._close(shell, result)
        if shell.early:
            raise _early_error(shell, result)

    def run_sync(self, input_context: Inputs = None) -> RunResult:
        """`run` for scripts. Raises RuntimeError inside a running event loop: use `await executor.run(...)` there."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass  # the run is not begun in here: each of its exceptions would have this one as its context
        else:
            raise RuntimeError("run_sync cannot be used inside a running event loop: use `await executor.run(...)`")
        return asyncio.run(self.run(input_context))

    @asynccontextmanager
    async def stream(self, inputs: Inputs) -> AsyncIterator[OutputStream]:
        """Runs the inputs and gives out outputs as they come: `async with executor.stream(inputs) as outputs:` (E3).

        Memory is bounded by `max_live_contexts`, whatever the number of inputs. Leaving early ends the run (E9).
        """
        async with _journalled(self.config.journal, self.plan, left_alone=True) as recorder:
            shell = self._open_shell("stream", open_inputs(inputs))
            outputs = OutputStream(shell)
            if recorder is not None:
                recorder.attach(shell)
            deadline = self._arm_deadline(shell)
            try:
                self._begin(shell)
                yield outputs
            finally:
                if deadline is not None:
                    deadline.cancel()
                if not shell.done.done():
                    shell.end_early("left", None)
                await self._close(shell, RunResult())
        if shell.early not in ("", "left"):
            raise _early_error(shell, None)

    def _open_shell(self, kind: str, inputs: Any) -> RunShell:
        shell = self.shell_class(self.dag, self.plan, self.config, self.runtime, self._pools, inputs, kind)
        self._shells.append(shell)
        first = next(each for each in self._shells if not each.loop.is_closed())
        if first.loop is not shell.loop:
            self._shells.remove(shell)
            raise RuntimeError(
                "the executor runs in another thread's event loop: make one for each; they may share a DAG"
            )
        return shell

    def _begin(self, shell: RunShell) -> None:
        facts = Facts(self._observers(shell))
        self._pools.listeners.append(facts)
        shell.begin(facts)
        if shell.recorder is not None:
            shell.recorder.tell_left()

    def _observers(self, shell: RunShell) -> list[Observer]:
        """Telemetry's observers, or, without any, those that log warnings and errors; then the user's own."""
        telemetry = self.config.telemetry
        found = default_observers(shell.run) if telemetry is None else telemetry.observers(shell.run, self._pools)
        recorders = [] if shell.recorder is None else [shell.recorder]
        return [*recorders, *found, *self.config.observers]

    def _arm_deadline(self, shell: RunShell) -> asyncio.TimerHandle | None:
        if self.config.deadline is None:
            return None
        return shell.loop.call_later(self.config.deadline, shell.end_early, "deadline", None)

    async def _wait(self, shell: RunShell) -> None:
        deadline = self._arm_deadline(shell)
        try:
            self._begin(shell)
            await shell.done
        except asyncio.CancelledError as error:
            shell.end_early("cancelled", error)
            raise
        finally:
            if deadline is not None:
                deadline.cancel()

    async def _close(self, shell: RunShell, result: RunResult) -> None:
        """Ends the run, closes the pools that nobody keeps, and writes down what came of it.

        Cancelled meanwhile, it still goes to its end: nothing is left behind (E9).
        """
        run = shell.run
        end = run.clock()
        try:
            if shell.closes_at_once() and (self._kept_open or not self._pools.used):
                await self._end_run(shell)  # without a task of its own it takes no turn of the loop (E7)
            else:
                await see_through(self._end_run(shell))
        finally:
            if shell in self._shells:
                self._shells.remove(shell)
            run.let_go_of_outputs()
            self._pools.listeners[:] = [facts for facts in self._pools.listeners if facts is not run.facts]
            result.failures, result.counts, result.stalled = list(run.failures), run.counts, run.stalls
            result.duration_s = max(end - run.first_entered, 0.0) if run.first_entered is not None else 0.0
            result.cleanup_errors, result.abandoned = shell.runners.errors, shell.abandoned
            self._add_up(shell)
            self._tell_end(shell, result)
        if self.config.telemetry is not None:
            await self.config.telemetry.run_closed(run)

    async def _end_run(self, shell: RunShell) -> None:
        try:
            await shell.finish_run()
        finally:
            self._shells.remove(shell)
            if not self._kept_open and not self._shells:
                shell.abandoned += await self._pools.close(self.config.shutdown_grace)

    def _tell_end(self, shell: RunShell, result: RunResult) -> None:
        run, now = shell.run, shell.run.clock()
        if run.stalls and run.facts.run_deadlocked is not None:
            run.facts.run_deadlocked(run, run.stalls, now)
        if run.facts.run_finished is not None:
            run.facts.run_finished(run, _outcome(shell), result.duration_s, now)

    # --- looking

    def stats(self) -> dict[str, Any]:
        """Plain counters over all runs of this executor so far, living ones included.

        Keys: runs, executions, retries, living, entered and each outcome, and `tasks`: id -> executions and seconds.
        """
        totals = Counter(self._totals)
        for shell in self._shells:
            totals.update(_numbers(shell))
        tasks = {
            task.id: {"executions": totals.pop(f"n:{task.id}", 0), "seconds": totals.pop(f"s:{task.id}", 0.0)}
            for task in self.plan.tasks[1:-1]
        }
        living = sum(shell.run.living for shell in self._shells)
        names = ("runs", "executions", "retries", "entered", *OUTCOMES)
        return {**{name: totals.get(name, 0) for name in names}, "living": living, "tasks": tasks}

    def _add_up(self, shell: RunShell) -> None:
        self._totals.update(_numbers(shell))
        self._totals["runs"] += 1

    # --- one's own worker (E13)

    @asynccontextmanager
    async def check_get_context(self, timeout: float | None = None, use_counter: bool = True) -> AsyncIterator[Context]:
        """The next context of the active run, for a worker of one's own; inside the block it counts as running.

        A StopContext when the runtime counts none living (with `use_counter`) or no run is active. Raises TimeoutError
        when none came within `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            shell, context = await self._next_of_mine(use_counter)
        if shell is None or context is None:
            yield StopContext()
            return
        try:
            yield context
        finally:
            now = shell.clock()
            if context._place != IDLE:
                shell.run.leave(context, -1, 0.0, now)
            shell.pump()

    async def _next_of_mine(self, use_counter: bool) -> tuple[RunShell | None, Context | None]:
        while self._shells and not (use_counter and self.runtime.counter == 0 and self._shells[-1].inputs is None):
            shell = self._shells[-1]
            context = shell.run.take(-1, shell.clock())
            if context is not None:
                return shell, context
            taker = shell.loop.create_future()
            shell.takers.append(taker)
            await asyncio.wait([taker, shell.done], return_when=asyncio.FIRST_COMPLETED)
            if shell.done.done():
                return None, None
        return None, None

    # --- keeping the pools (E18)

    async def __aenter__(self) -> Self:
        """Keeps the pools, and the journal, open until the block ends."""
        if self.config.journal is not None:
            await self.config.journal.acquire()
        self._kept_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept_open = False
        try:
            if not self._shells:
                await self._pools.close(self.config.shutdown_grace)
        finally:
            if self.config.journal is not None:
                await self.config.journal.release()


@asynccontextmanager
async def _journalled(journal: Any, plan: Plan, *, left_alone: bool = False) -> AsyncIterator[Any]:
    """Keeps the journal open, if there is one; gives what records a run in it. left_alone: what an earlier process has
    left there, and the run says so.
    """
    if journal is None:
        yield None
        return
    await journal.acquire()
    try:
        recorder = await journal.record(plan)
        try:
            if left_alone:
                recorder.left = await journal.left(plan)
            yield recorder
        finally:
            await see_through(recorder.close())
    finally:
        await see_through(journal.release())


def _early_error(shell: RunShell, result: RunResult | None) -> BaseException:
    """What an early end of a run is raised as."""
    if shell.fatal is not None:
        return shell.fatal
    if shell.early == "deadline":
        return DeadlineExceeded(f"the run did not finish within its deadline of {shell.config.deadline} s", result)
    if shell.early == "failure":
        errors = [f.exception for f in shell.run.failures if isinstance(f.exception, Exception)]
        group = RunFailed(f"{shell.run.failures[0]}", errors or [RuntimeError(str(shell.run.failures[0]))])
        group.result = result
        return group
    return asyncio.CancelledError(f"the run was ended early: {shell.early}")


def _outcome(shell: RunShell) -> str:
    if shell.early in ("cancelled", "left", "interrupt"):
        return "cancelled"
    if shell.early == "deadline":
        return "deadline"
    if shell.run.stalls:
        return "deadlocked"
    return "failed" if shell.early or shell.run.failures_total else "ok"


def _numbers(shell: RunShell) -> Mapping[str, Any]:
    run = shell.run
    executions = run.task_executions  # each time a new list
    tasks = {f"n:{task.id}": count for task, count in zip(run.plan.tasks, executions, strict=True)}
    seconds = {f"s:{task.id}": spent_s for task, spent_s in zip(run.plan.tasks, run.task_seconds, strict=True)}
    return {**run.counts, "executions": sum(executions), "retries": run.retries_total, **tasks, **seconds}
