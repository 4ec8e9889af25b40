"""The asyncio shell around one run of the pure core: it runs user functions, keeps the timer, owns what must be
cleaned up.

Everything here happens on the run's thread, except `nudge` and `dispatch`, which carry calls from other threads to it.
The shell decides nothing about contexts; it tells `RunState` what happened and does what that leaves in `cancels`,
`closed_pulls`, `closings`.

The end of a run, by steps (`RunShell.finish_run`): 1. the core stops what still lives, if the run ends early; 2.
executions are cancelled, again and again until `shutdown_grace`, then abandoned and reported; 3. generators and
services are closed; 4. shutdown hooks; 5. limits are detached and their resources closed; 6. pools are closed; 7. the
core closes its books.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from random import Random
from typing import TYPE_CHECKING, Any

from obsdag.context import Context, LoopContext
from obsdag.core.observer import Facts
from obsdag.core.records import Execution, current_execution
from obsdag.core.state import RunState
from obsdag.errors import InternalError
from obsdag.inputs import as_context
from obsdag.mailbox import Mailbox, clean_copy, clock_of
from obsdag.runners import Runners
from obsdag.tasks.base import Environment
from obsdag.tasks.retry import interval_of, retries_on
from obsdag.worker import Worker

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.engine_pools import Pools
    from obsdag.graph import DAG
    from obsdag.journal.recorder import Recorder
    from obsdag.plan import Plan
    from obsdag.runtime import Runtime

__all__ = ["CANCELS", "RunShell"]

CANCELS = 4  # within the grace; not at once again, which would cut off the clean-up that the first one began
_WOKEN_PER_ROUND = 8  # workers: were it all, 64 that never wait would cost a fifth more; were it one, those that wait


class RunShell(Mailbox):
    """One run on one event loop. `done` is resolved when nothing lives and no input is left."""

    __slots__ = (
        *("_timer", "_timer_at", "_turns", "abandoned", "base", "config", "direct", "done", "early", "env", "fatal"),
        *("feeding", "free", "plan", "pools", "random", "recorder", "refill", "restore", "runners", "takers"),
        *("tasks", "turn_end", "wanted", "width"),
    )

    def __init__(
        self,
        dag: DAG,
        plan: Plan,
        config: ExecutorConfig,
        runtime: Runtime,
        pools: Pools,
        inputs: Iterator[Any] | AsyncIterator[Any] | None,
        kind: str = "run",
    ) -> None:
        self.config = config
        self.plan = plan
        self.pools = pools
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self.clock: Callable[[], float] = clock_of(self.loop)
        self.run = RunState(plan, config, runtime, self.clock, time.time() - self.clock())
        self.run.kind = kind
        self.run.dispatch = self.dispatch
        self.run.nudge = self.nudge
        self.run.caller = self._caller
        self.run.pools = pools
        self.env = Environment(runtime, pools.call_executor(), dag)
        self.runners = Runners(self)
        self.direct = self.runners.direct
        self.width = config.task_worker_num
        self.base = clean_copy()
        self.random = Random(config.seed)
        self.tasks: set[asyncio.Task[None]] = set()
        self.free = [Worker(self, number) for number in range(config.context_worker_num - 1, -1, -1)]
        self.workers = list(self.free)
        self.inputs: Iterator[Any] | None = inputs if isinstance(inputs, Iterator) else None
        self.feeding: AsyncIterator[Any] | None = None if isinstance(inputs, Iterator) else inputs
        self.wanted = asyncio.Event()  # the async input is to be asked for another item
        self.open_ended = False  # serving: more may be submitted at any time
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.fatal: BaseException | None = None
        self.early = ""
        self.turn_end = 0.0
        self.abandoned: list[str] = []
        self.refill: Callable[[], None] | None = None  # serving: what waits for room enters
        self.takers: list[asyncio.Future[None]] = []
        self.recorder: Recorder | None = None  # with a journal: what leaves the engine waits for its commits
        self.restore: Callable[[float], None] | None = None  # puts contexts of a journal into the run that begins
        self._turns: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._nudged = False
        self._over = False

    # --- beginning

    def begin(self, facts: Facts) -> None:
        """Starts the run: observers are told, the first worker begins."""
        run = self.run
        run.observe(facts)
        run.runtime._opened(run)
        run.runtime.limits.attach({limit: None for limits in run.limits for limit in limits})
        run.started = self.clock()
        self.turn_end = run.started + self.config.turn_s
        if facts.execution_finished is not None:
            self.direct = self.runners.direct
        if facts.run_started is not None:
            facts.run_started(run, run.started)
        if self.restore is not None:
            self.restore(run.started)
        if self.feeding is not None:
            self.spawn(self._feed(self.feeding), None)
        self.pump()
        self.kick()

    def spawn(self, coroutine: Coroutine[Any, Any, None], context: contextvars.Context | None) -> None:
        """An asyncio task of this run; what escapes it is a bug of obsdag and ends the run."""
        task = self.loop.create_task(coroutine, context=context)
        self.tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.end_early("error", error)

    # --- what workers ask

    def next_context(self, worker: Worker) -> Context | None:
        """What the worker drives next: from the queue, or else the next input (E4)."""
        run = self.run
        if self._over:
            return None
        clock = self.clock
        worker.since = now = clock()
        context = run.take(worker.number, now) if run.queue.size or run.queue.loop or run.rooms else None
        if context is None:
            context = self._pull_input(worker.number, now)
            if context is None:
                return None
        if self.free and (run.queue.size or run.queue.loop or self.inputs is not None):
            self.wake_worker()
        elif self.feeding is not None and self.free:
            self.wanted.set()
        return context

    def wake_worker(self) -> None:
        """Starts an idle worker."""
        worker = self.free.pop()
        self.run.busy_workers += 1
        worker.start()

    def worker_idle(self, worker: Worker) -> None:
        """A worker found nothing to do."""
        self.free.append(worker)
        self.run.busy_workers -= 1
        if self.feeding is not None:
            self.wanted.set()
        if not self.run.busy_workers:
            self.rest()

    def rest(self) -> None:
        """No worker is busy: the run is done, or waits for something, which the core knows."""
        run = self.run
        if self.inputs is None and self.feeding is None and not self.open_ended and run.settled():
            if not self.done.done() and (self.recorder is None or self.recorder.settled()):
                self.done.set_result(None)
            return
        run.rest(self.clock())
        self.rearm()
        if not run.moving():
            self._check_sums()

    def _check_sums(self) -> None:
        """A count that is wrong would have the run wait for ever: it ends by the error instead (C9)."""
        try:
            self.run.check()
        except InternalError as error:
            self.end_early("error", error)

    def kick(self) -> None:
        """Wakes a worker if there is anything to drive; else looks whether the run is done."""
        run = self.run
        if self._over:
            return
        if self.refill is not None:
            self.refill()
        if run.queue.size:
            self._wake_takers()
        if self.free:
            room = run.has_room()
            # Without room, what is in the lane goes to those that wait for some, and gives up its permits.
            pulls = run.queue.loop or (run.rooms and (room or not run.moving()))
            if run.queue.size or pulls or (self.inputs is not None and room):
                self.wake_worker()
        if self.feeding is not None and run.has_room():
            self.wanted.set()
        if not run.busy_workers:
            self.rest()

    def _wake_takers(self) -> None:
        while self.takers:
            taker = self.takers.pop()
            if not taker.done():
                taker.set_result(None)

    async def let_others_run(self) -> None:
        """Yields to the event loop. The workers that are woken in one round share one allowance of `turn_s`."""
        turn = self.loop.create_future()
        self._turns.append(turn)
        if len(self._turns) == 1:
            self.loop.call_soon(self._new_turn)
        await turn

    def _new_turn(self) -> None:
        self.turn_end = self.clock() + self.config.turn_s
        woken = 0
        while self._turns and (woken < _WOKEN_PER_ROUND or not self.to_take):
            turn = self._turns.popleft()
            if not turn.done():  # else it was cancelled
                turn.set_result(None)
                woken += 1
        if self._turns:
            self.loop.call_soon(self._new_turn)

    # --- inputs

    def _pull_input(self, worker: int, now: float) -> Context | None:
        """The next input, which its worker drives at once; None if there is none, or no room (E16)."""
        while self.inputs is not None and self.run.has_room() and not self.early:
            try:
                item = next(self.inputs)
                context = Context(None, item) if type(item) is dict else as_context(item)
                if self.run.accept_visited(context, worker, now):
                    if self.run.dirty:
                        self.pump()
                    return context
            except StopIteration:
                self.inputs = None
            except BaseException as error:
                self.end_early("input", error)
                return None
        if self.feeding is not None:
            self.wanted.set()
        return None

    def _accept(self, item: Any, now: float) -> bool:
        try:
            self.run.accept(as_context(item), now)
        except Exception as error:
            self.end_early("input", error)
            return False
        if self.run.dirty:
            self.pump()
        return True

    async def _feed(self, inputs: AsyncIterator[Any]) -> None:
        """Asks an async input for an item whenever the lanes are empty and there is room."""
        try:
            while True:
                while self.run.queue.size or not self.run.has_room():
                    self.wanted.clear()
                    await self.wanted.wait()
                try:
                    item = await anext(inputs)
                except StopAsyncIteration:
                    break
                if self._over or not self._accept(item, self.clock()):
                    return
                self.kick()
        except asyncio.CancelledError:
            if self._over:
                return
            self.end_early("input", asyncio.CancelledError("the input iterator was cancelled"))
        except BaseException as error:
            self.end_early("input", error)
        finally:
            self.feeding = None
        self.kick()

    # --- executions

    async def execute(self, execution: Execution) -> None:
        """One execution by its kind's runner, from the fact that it started to the fact that it ended."""
        token = current_execution.set(execution) if execution.attempt > 1 else None
        try:
            tell = self.run.facts.execution_started
            if (
                tell is not None and execution.task.shape != "service"
            ):  # a service's runner tells in a context of its own
                tell(execution, execution.started)
            try:
                finished = await self.runners.run(execution)
            except BaseException as error:
                await self.failed(execution, error)
            else:
                finished()
        finally:
            if token is not None:
                current_execution.reset(token)

    def finish(self, execution: Execution, result: Any) -> None:
        """The function returned; what it may not return fails the execution instead."""
        run = self.run
        if execution.cancelling:
            self.uncancel(execution.handle)
        try:
            run.finish(execution, result, self.clock())
        except Exception as error:
            if execution.outcome is not None:
                raise
            self.settle_failure(execution, error)
        if run.dirty:
            self.pump()

    async def failed(self, execution: Execution, error: BaseException) -> None:
        """The function raised, timed out, or was cancelled."""
        if isinstance(error, asyncio.CancelledError):
            if execution.cancelling:
                self.uncancel(execution.handle)
                self.run.cancelled(execution, self.clock())
                if self.run.dirty:
                    self.pump()
                return
            self.uncancel(execution.handle)
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self.interrupted(execution, error)
            return
        self.settle_failure(execution, error)

    def interrupted(self, execution: Execution, error: BaseException) -> None:
        """KeyboardInterrupt and SystemExit end the run, wherever they are raised (E6)."""
        self.run.fail(execution, error, self.clock())
        self.end_early("interrupt", error)

    def settle_failure(self, execution: Execution, error: BaseException) -> None:
        """Retries by the task's policy, or fails the context (E6)."""
        delay, error = self._retry_delay(execution, error)
        self.run.fail(execution, error, self.clock(), delay)
        if self.run.dirty:
            self.pump()

    def _retry_delay(self, execution: Execution, error: BaseException) -> tuple[float | None, BaseException]:
        """Seconds until the next attempt, or None; a policy of the user's that raises replaces the error."""
        config = execution.task.config
        if execution.attempt > config.retry_times or execution.cancelling or execution.final:
            return None, error
        try:
            if not retries_on(config.retry_on, error):
                return None, error
            delay = interval_of(config.retry_interval, execution.attempt, execution.context, error, self.random)
        except Exception as broken:
            broken.__context__ = error
            return None, broken
        if config.retry_for is not None:
            spent = self.clock() - self.run.first_started(execution)
            if spent + delay > config.retry_for:
                return None, error
        return delay, error

    def uncancel(self, handle: Any) -> None:
        """Takes a request for cancellation back that has done its work, so that later timeouts work."""
        if isinstance(handle, asyncio.Task):
            while handle.cancelling():
                handle.uncancel()

    async def drive_pull(self, marker: LoopContext, worker: Worker) -> None:
        """One item of a loop or map."""
        execution = self.run.begin_pull(marker, self.clock(), worker.number)
        execution.handle = asyncio.current_task()
        await self.execute(execution)

    # --- doing what the core left to do

    def pump(self) -> None:
        """Cancels, closes and arms what the last transitions ask for, and wakes a worker if there is work."""
        run = self.run
        run.dirty = False
        if run.failures_total and self.config.on_failure == "raise":
            self.end_early("failure", None)
        while run.cancels:
            execution = run.cancels.pop()
            if execution.handle is not None:
                execution.handle.cancel()
        while run.closed_pulls:
            self.runners.close_later(run.closed_pulls.pop())
        while run.done_scopes:
            scope = run.done_scopes.pop()
            if not scope.living:  # none of what was made meanwhile lives
                scope.on_done(scope)
        while run.closings:
            self.runners.release_later(run.closings.pop())
        self.rearm()
        self.kick()

    def rearm(self) -> None:
        """Sets the one timer of the run to what is due next."""
        due = None if self._over else self.run.next_wake()
        if due == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = due
        if due is not None:
            self._timer = self.loop.call_at(due, self._wake)

    def _wake(self) -> None:
        self._timer, self._timer_at = None, None
        self.run.wake(self.clock())
        self.pump()

    def thread_returned(self, execution: Execution) -> None:
        """An abandoned thread or process has come back from an execution (T13)."""
        self.run.returned(execution, self.clock())
        self.pump()

    # --- the end

    def end_early(self, why: str, error: BaseException | None) -> None:
        """The run is to end as E9; the first reason counts."""
        if not self.early:
            self.early, self.fatal = why, error
            self.inputs = None  # what is left of it is not asked for any more
        if not self.done.done():
            self.done.set_result(None)

    def closes_at_once(self) -> bool:
        """Whether `finish_run` has nothing to wait for."""
        run = self.run
        if self.early or self.recorder is not None or run.closings or not run.settled() or self.runners.has_to_close():
            return False
        return all(task.done() for task in self.tasks)

    async def finish_run(self) -> None:
        """Ends the run by the steps at the top of this module; nothing is left behind."""
        run = self.run
        if self.recorder is not None and (self.early or not run.settled()):
            self.recorder.suspend()
        if self.early or not run.settled():
            run.stop(self.clock())
            self.pump()
        self._over = True
        self.rearm()
        await self._cancel_tasks()
        await self.runners.close(self.config.shutdown_grace)
        await self._detach_limits()
        try:
            if self.recorder is not None:
                await self.recorder.close()
        finally:
            run.close(self.clock())
            run.runtime._closed(run)

    async def _cancel_tasks(self) -> None:
        """Cancels what still runs, again if it is swallowed, until the grace is over (E9)."""
        current = asyncio.current_task()
        end = self.loop.time() + self.config.shutdown_grace
        while pending := [task for task in self.tasks if task is not current and not task.done()]:
            for task in pending:
                task.cancel()
            left = end - self.loop.time()
            if left <= 0:
                self._abandon(pending)
                return
            await asyncio.wait(pending, timeout=min(left, self.config.shutdown_grace / CANCELS))

    def _abandon(self, pending: list[asyncio.Task[None]]) -> None:
        now = self.clock()
        handles = set(pending)
        for worker in self.workers:
            for execution in (worker.context._executions or ()) if worker.context is not None else ():
                if execution.handle in handles:
                    what = f"task {execution.task.id!r} on context {execution.context.id!r} swallows its cancellation"
                    self.abandoned.append(what)
                    if self.run.facts.thread_abandoned is not None:
                        self.run.facts.thread_abandoned("loop", execution.task.id, now - execution.started)
                    self.run.cancelled(execution, now)

    async def _detach_limits(self) -> None:
        run = self.run
        limits = {limit: None for limits in run.limits for limit in limits}
        for closing in [*run.closings, *run.runtime.limits.detach(limits)]:
            await self.runners.release(closing)
        run.closings.clear()
