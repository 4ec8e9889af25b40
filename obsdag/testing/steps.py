"""The steps of a simulated run: what a worker, an execution and the shell do, each as one thing that may happen next.

This mirrors obsdag.worker, obsdag.shell and obsdag.runners without asyncio. Who goes next is not decided here.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterator
from random import Random
from typing import TYPE_CHECKING, Any

from obsdag.context import Context, LoopContext
from obsdag.core.records import Execution
from obsdag.errors import ExecutionTimeout
from obsdag.inputs import as_context
from obsdag.tasks.retry import interval_of, retries_on
from obsdag.testing.bodies import HANDED, Bodies, Body, Opened, SimulationError

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.core.state import RunState
    from obsdag.executor import RunResult

__all__ = ["Runner", "Steps", "Visit"]

Chooser = Callable[[int], int]


class Visit:
    """One worker with one context; `runners` of its ready tasks run at once."""

    __slots__ = ("context", "number", "runners")

    def __init__(self, number: int, context: Context) -> None:
        self.number = number
        self.context = context
        self.runners = 1


class Runner:
    """One execution under way. `visit` is None once it waits for a service; `gone`: nobody waits for it any more."""

    __slots__ = ("begun", "body", "cancelled", "execution", "gone", "pooled", "queued", "visit")

    def __init__(self, execution: Execution, visit: Visit, body: Body) -> None:
        self.execution = execution
        self.visit: Visit | None = visit
        self.body = body
        self.begun = self.cancelled = self.gone = self.pooled = self.queued = False


class Steps:
    """What could happen next is in `_options`: name, function, argument. Each leaves what follows of it there."""

    run: RunState
    config: ExecutorConfig
    now: float
    random: Random
    choose: Chooser
    eager: bool
    inputs: Iterator[Any] | None
    over: bool
    stopped: str
    outputs: RunResult
    _bodies: Bodies
    _options: list[tuple[str, Callable[[Any], None], Any]]
    _sleepers: list[tuple[float, int, Runner]]
    _slept: int
    _free: list[int]
    _calling: Execution | None
    _nudged: bool

    def told(self, what: str, *about: Any) -> None:
        """Called after each transition of the core, with its name and arguments; for subclasses that check."""

    def _end_early(self, why: str) -> None:
        raise NotImplementedError

    def _goes_on(self, runner: Runner) -> None:
        if not runner.queued:
            runner.queued = True
            execution = runner.execution
            self._options.append((f"{execution.task.id} on {execution.context._id}", self._advance, runner))

    # --- workers, as in obsdag.worker

    def _wake_worker(self) -> None:
        number = self._free.pop()
        self.run.busy_workers += 1
        self._options.append((f"worker {number}", self._work, number))

    def _work(self, number: int) -> None:
        """A worker looks for something to drive."""
        context = self._next_context(number)
        if context is None:
            self._free.append(number)
            self.run.busy_workers -= 1
            if not self.run.busy_workers:
                self._rest()
            return
        visit = Visit(number, context)
        if isinstance(context, LoopContext):
            execution = self.run.begin_pull(context, self.now, number)
            self.told("begin_pull", execution, context.pull)
            self._start(execution, visit)
        else:
            self._begin(visit)

    def _next_context(self, number: int) -> Context | None:
        run = self.run
        if self.stopped:
            return None
        context = run.take(number, self.now)
        self.told("take", context)
        if context is None:
            context = self._pull_input(number)
        if context is not None and self._free and (run.queue.size or run.queue.loop or self.inputs is not None):
            self._wake_worker()
        return context

    def _pull_input(self, number: int) -> Context | None:
        while self.inputs is not None and self.run.has_room():
            item = next(self.inputs, None)
            if item is None:
                self.inputs = None
                break
            context = as_context(item)
            visited = self.run.accept_visited(context, number, self.now)
            self.told("accept", context, visited)
            if self.run.dirty:
                self._pump()
            if visited:
                return context
        return None

    def _begin(self, visit: Visit) -> None:
        """The next ready task of the visited context; the last runner of a visit ends it."""
        context = visit.context
        execution = None if self.stopped else self.run.begin(context, self.now, visit.number)
        if not self.stopped:
            self.told("begin", context, execution)
        self._began(visit, execution)

    def _began(self, visit: Visit, execution: Execution | None) -> None:
        context = visit.context
        if execution is not None:
            width = self.config.task_worker_num
            if context._ready and (not width or visit.runners < width):
                visit.runners += 1
                self._options.append((f"runner on {context._id}", self._begin, visit))
            self._start(execution, visit)
            return
        visit.runners -= 1
        if visit.runners:
            return
        if isinstance(context, LoopContext):
            self.run.leave_pull(context.pull, visit.number, 0.0, self.now)
            self.told("leave_pull", context.pull.context)
        else:
            self.run.leave(context, visit.number, 0.0, self.now)
            self.told("leave", context)
        if self.run.dirty:
            self._pump()
        self._options.append((f"worker {visit.number}", self._work, visit.number))

    def _between(self, visit: Visit | None) -> None:
        """A runner's execution is over: it goes on with the next, perhaps a moment later."""
        if self._free and (self.run.queue.size or self.run.queue.loop) and not self.stopped:
            self._wake_worker()
        if visit is None:
            return
        if isinstance(visit.context, LoopContext):
            self._began(visit, None)
        else:
            self._options.append((f"next on {visit.context._id}", self._begin, visit))

    # --- executions, as in obsdag.shell and obsdag.runners

    def _start(self, execution: Execution, visit: Visit) -> None:
        runner = Runner(execution, visit, self._bodies.of(execution))
        execution.handle = runner
        if self.run.facts.execution_started is not None:
            self.run.facts.execution_started(execution, self.now)
        limit = execution.task.config.timeout
        if limit is not None:
            self.run.timers.set(self.now + limit, lambda _, now: self._too_late(runner), None)
        if execution.task.shape in ("loop", "map"):
            runner.begun = True
            runner.body.send(None)
        self._goes_on(runner)

    def _advance(self, runner: Runner) -> None:
        """The function of an execution runs up to where it waits or ends."""
        runner.queued = False
        execution = runner.execution
        if runner.pooled:
            runner.pooled = False
            self.run.pool_started(execution, self.now)
            self.told("pool_started", execution)
        self._calling = execution
        try:
            if execution.cancelling and not runner.begun and execution.task.runs_on == "loop":
                runner.cancelled = True  # the cancellation comes before its function's first line
            runner.begun = True
            if runner.cancelled and not runner.gone:
                runner.cancelled = False
                waits = runner.body.throw(asyncio.CancelledError())
            else:
                waits = runner.body.send(None)
        except StopIteration as ended:
            self._calling = None
            self._returned(runner, ended.value)
        except BaseException as error:
            self._calling = None
            self._raised(runner, error)
        else:
            self._calling = None
            self._waits(runner, waits)

    def _waits(self, runner: Runner, waits: Any) -> None:
        execution = runner.execution
        if waits is None:
            self._goes_on(runner)
        elif isinstance(waits, float):
            self._slept += 1
            heapq.heappush(self._sleepers, (self.now + waits, self._slept, runner))
        elif waits is HANDED:
            self.run.service_waits(execution, self.now)
            self.told("service_waits", execution)
            visit, runner.visit = runner.visit, None
            self._goes_on(runner)
            self._between(visit)
        elif waits == "pool":
            runner.pooled = True
            self.run.pool_waits(execution, self.now)
            self.told("pool_waits", execution)
            self._goes_on(runner)
        else:
            task = execution.task.id
            raise SimulationError(f"task {task!r} awaits {waits!r:.80}: give a stand-in, or use obsdag.testing.sleep")

    def _returned(self, runner: Runner, result: Any) -> None:
        execution = runner.execution
        if runner.gone:
            self._come_back(execution)
            return
        if isinstance(result, Opened):
            result.tell(execution)
        elif execution.task.shape == "router":
            try:
                mask = self._bodies.chosen(execution, result)
            except Exception as error:
                self._settle_failure(execution, error)
            else:
                self.run.finish_routed(execution, mask, self.now)
                self.told("finish_routed", execution, mask)
        elif self._finishes_and_begins(runner, result):
            return
        else:
            try:
                self.run.finish(execution, result, self.now)
            except Exception as error:
                if execution.outcome is not None:
                    raise
                self._settle_failure(execution, error)
            else:
                self.told("finish", execution, result)
        self._ended(runner)

    def _finishes_and_begins(self, runner: Runner, result: Any) -> bool:
        """The short cut that workers take for plain coroutines, every other time."""
        execution, visit = runner.execution, runner.visit
        task, index = execution.task, execution.index
        plain = task.kind == "async" and task.config.timeout is None and visit is not None
        if not plain or result is not execution.context or execution.cancelling or self._the_long_way():
            return False
        assert visit is not None
        following = self.run.finish_and_begin(execution, self.now)  # which may be the same object again
        self.told("finish_and_begin", execution, following, index)
        if self.run.dirty:
            self._pump()
        if following is None:
            self._between(visit)
        else:
            self._began(visit, following)
        return True

    def _the_long_way(self) -> bool:
        return not self.eager and bool(self.choose(2))

    def _raised(self, runner: Runner, error: BaseException) -> None:
        execution = runner.execution
        if isinstance(error, RuntimeError) and "no running event loop" in str(error):
            raise SimulationError(
                f"task {execution.task.id!r} needs an event loop: give a stand-in, or use obsdag.testing.sleep"
            ) from error
        if runner.gone:
            self._come_back(execution)
            return
        if isinstance(error, asyncio.CancelledError) and execution.cancelling:
            self.run.cancelled(execution, self.now)
            self.told("cancelled", execution)
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self.run.fail(execution, error, self.now)
            self.told("fail", execution, error, None)
            self._end_early("interrupt")
        else:
            self._settle_failure(execution, error)
        self._ended(runner)

    def _ended(self, runner: Runner) -> None:
        if self.run.dirty or runner.visit is None:
            self._pump()
        self._between(runner.visit)

    def _settle_failure(self, execution: Execution, error: BaseException) -> None:
        delay, error = self._retry_delay(execution, error)
        self.run.fail(execution, error, self.now, delay)
        self.told("fail", execution, error, delay)

    def _retry_delay(self, execution: Execution, error: BaseException) -> tuple[float | None, BaseException]:
        config = execution.task.config
        if execution.attempt > config.retry_times or execution.cancelling or execution.final:
            return None, error
        try:
            if not retries_on(config.retry_on, error):
                return None, error
            delay = interval_of(config.retry_interval, execution.attempt, execution.context, error, self.random)
        except Exception as broken:
            return None, broken
        if config.retry_for is not None and self.now - self.run.first_started(execution) + delay > config.retry_for:
            return None, error
        return delay, error

    def _too_late(self, runner: Runner) -> None:
        """The execution's timeout has passed."""
        execution = runner.execution
        if execution.outcome is not None or runner.gone:
            return
        self._later("timeout", runner, self._time_out)

    def _later(self, name: str, runner: Runner, function: Callable[[Any], None]) -> None:
        self._options.append((f"{name} of {runner.execution.task.id}", function, runner))

    def _time_out(self, runner: Runner) -> None:
        execution = runner.execution
        if execution.outcome is not None or runner.gone:
            return
        self._leave_behind(runner)
        error = ExecutionTimeout(f"task {execution.task.id!r} took longer than {execution.task.config.timeout} s")
        if execution.task.shape in ("loop", "map"):
            self._bodies.broken(execution)
        self._settle_failure(execution, error)
        self._ended(runner)

    def _leave_behind(self, runner: Runner) -> None:
        """Nobody waits for the function any more: one in a thread goes on, and comes back at some time (T13)."""
        runner.gone = True
        if runner.execution.task.runs_on == "loop" or runner.pooled:
            runner.body.close()
            self._forget(runner)
        else:
            runner.execution.abandoned = True

    def _forget(self, runner: Runner) -> None:
        self._options = [option for option in self._options if option[2] is not runner]
        self._sleepers = [entry for entry in self._sleepers if entry[2] is not runner]
        heapq.heapify(self._sleepers)

    def _come_back(self, execution: Execution) -> None:
        self.run.returned(execution, self.now)
        self.told("returned", execution)
        self._pump()

    def _cancel(self, runner: Runner) -> None:
        """What the core asked to cancel is cancelled: in a thread it goes on, else it is told where it waits."""
        execution = runner.execution
        if execution.outcome is not None or runner.gone:
            return
        if execution.task.runs_on == "loop" and execution.task.shape != "service":
            runner.cancelled = True
            self._sleepers = [entry for entry in self._sleepers if entry[2] is not runner]
            heapq.heapify(self._sleepers)
            self._goes_on(runner)
            return
        self._leave_behind(runner)
        if execution.task.shape in ("loop", "map"):
            self._bodies.broken(execution)
        self.run.cancelled(execution, self.now)
        self.told("cancelled", execution)
        self._ended(runner)

    # --- what the core leaves to do, as in obsdag.shell

    def _pump(self) -> None:
        run = self.run
        run.dirty = False
        if run.failures_total and self.config.on_failure == "raise":
            self._end_early("failure")
        while run.cancels:
            execution = run.cancels.pop()
            if execution.handle is not None:
                self._later("cancellation", execution.handle, self._cancel)
        while run.closed_pulls:
            self._bodies.close_pull(run.closed_pulls.pop())
        while run.done_scopes:
            scope = run.done_scopes.pop()
            if not scope.living:
                scope.on_done(scope)
        run.closings.clear()
        self._kick()

    def _kick(self) -> None:
        run = self.run
        if self.stopped:
            return
        if self._free:
            room, pulls = run.has_room(), run.queue.loop or (run.rooms and (run.has_room() or not run.moving()))
            if run.queue.size or pulls or (self.inputs is not None and room):
                self._wake_worker()
        if not run.busy_workers:
            self._rest()

    def _rest(self) -> None:
        if not (self.inputs is None and self.run.settled()):
            self.run.rest(self.now)

    def _dispatch(self, action: Callable[..., Any], argument: Any) -> None:
        if self.over:
            return
        if action == self.run.destroy:
            self.run.destroy(argument, self.now, self._calling)
            self.told("destroy", argument, self._calling)
        else:
            action(argument, self.now)
            self.told(action.__name__, argument)
        self._pump()

    def _nudge(self) -> None:
        if not self._nudged:
            self._nudged = True
            self.run.dirty = True
            self._options.append(("nudge", self._nudge_comes, None))

    def _nudge_comes(self, _: None) -> None:
        self._nudged = False
        self.run._settle_all(self.now)
        self.told("nudge")
        self._pump()

    def _emit(self, output: Any) -> None:
        self.outputs.append(output)
