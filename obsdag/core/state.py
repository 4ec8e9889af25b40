"""RunState: what the shell asks and tells (ARCHITECTURE, "Rooms"). Read this file to know how a context is scheduled.

    accept(context)           an input enters: its first tasks are ready, it is in the new lane
    take() -> context, pull   the one whose turn it is gets a worker
    begin(context)            its next ready task starts, if limits allow
    finish, fail, cancelled   how the execution ended; what is ready below, what entered, what ended
    leave(context)            the worker has nothing more to do for it: it is queued again, or waits for something
    next_wake, wake           timers, permits, the end of waiting for frozen contexts
    stop, close               the run is ended early; it is over

All are plain calls on the run's thread with the time handed in. A transition changes contexts, tells the observers,
and leaves what the shell must do in `cancels`, `closed_pulls` and `closings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from obsdag.context import Context, LoopContext, OutputContext, RateLimitContext, StopContext
from obsdag.core.base import _DISCARDED, _LIMIT_WAIT, _QUEUED, _RETRY_WAIT, _RUNNING, alive, more_of, wait_of
from obsdag.core.critical import critical_path
from obsdag.core.queue import IDLE, VISITED
from obsdag.core.records import CriticalStep, Execution, TimedWait
from obsdag.core.sources import Sources
from obsdag.errors import ExecutionTimeout, TaskError
from obsdag.plan import indices

__all__ = ["RunState"]


class RunState(Sources):
    """The state of one run and its transitions."""

    __slots__ = ()

    # --- a worker's visit

    def take(self, worker: int, now: float) -> Context | None:
        """The context (or the marker of a pull) whose turn it is; None if there is nothing to drive now."""
        self.idle_at = None
        if (context := self.queue.take()) is not None:
            context._place = VISITED
            # If a loop or map of it has run since, nobody knows how long it was queued as well.
            waited = now - context._since if context._state == _QUEUED else 0.0
            self._move(context, _RUNNING, now)
            self._begin_visit(context, worker, context._lane, waited, now)
            return context
        return self.next_pull(now) if self.queue.loop or self.rooms else None

    def begin(self, context: Context, now: float, worker: int) -> Execution | None:
        """Starts the context's next ready task; None if there is none, or limits or a freeze hold all of them back."""
        plan, freezes = self.plan, self._freezes
        while context._ready and not (freezes and context in freezes):
            if plan.rank is None:
                low = context._ready & -context._ready
                index = low.bit_length() - 1
            else:
                index = min(indices(context._ready), key=plan.rank.__getitem__)
                low = plan.bit[index]
            context._ready ^= low
            grant = None
            if self.limits[index]:
                admitted, grant = self._admit(context, index, now)
                if not admitted:
                    continue
            attempt = 1
            more = context._more
            if more is not None and (wait := more.wait_of(index)) is not None:
                attempt += wait.failed
            begun = self.begun
            execution = begun(context, index, attempt, now, worker)
            execution.grant = grant
            if self.recording:
                execution.released_by = context._maker
                if context._waits is not None or more is not None:
                    self._record(execution)
            context._running |= low  # as in _note_started
            self.active += 1
            self.task_started[index] += 1
            if context._executions is None:
                context._executions = [execution]
            else:
                context._executions.append(execution)
            if context._state != _RUNNING:
                self._restate(context, now)
            return execution
        return None

    def leave(self, context: Context, worker: int, busy_s: float, now: float) -> None:
        """A worker is done with the context for now: it is queued again, waits for what holds it, or is settled."""
        if type(context) is LoopContext:
            self.leave_pull(context.pull, worker, busy_s, now)
            return
        context._place = IDLE
        self.visit_since[worker] = -1.0  # as in `_end_visit`
        self.busy_s[worker] += busy_s
        if (tell := self.facts.visit_finished) is not None:
            tell(context, worker, busy_s, now)
        if context._outcome is None and context._state != _DISCARDED:
            self._schedule(context, now)
        if self._work or self._touched:
            self._settle_all(now)
        self.cause = None

    # --- how an execution ends

    def finish(self, execution: Execution, result: Any, now: float) -> None:
        """The function returned `result` (T1). Raises TaskError, with nothing changed, if that is not for a task to
        return.
        """
        context = execution.context
        more = context._more
        if result is context and (more is None or more.plain) and context._outcome is None and execution.grant is None:
            self._finish_own(execution, context, now)  # in a visit, whose worker goes on with what is ready
        else:
            self._finish_with(execution, result, now)
        if self._work or self._touched or self._grants or self.debug:
            self._settle_all(now)

    def finish_and_begin(self, execution: Execution, now: float) -> Execution | None:  # noqa: C901 - the hot path, written out
        """`finish` with its own context, and `begin` for the same runner (None: ask that), in half the time."""
        context, index = execution.context, execution.index
        step, more = self.steps[index], context._more
        odd = more is not None and not (more.plain and more.waits is None and not context._parked)
        if step is None or odd or context._outcome is not None or self._freezes:
            self.finish(execution, context, now)
            return None
        bit, follow, frees, _, ways = step
        running = context._running = 0 if context._running is bit else context._running ^ bit  # of long plans: big
        if not self.unseen:
            execution.ended, execution.outcome = now, "success"
        if (took_s := now - execution.started) < self.facts.quick_s and not execution.watched:  # as in `_count`
            self.quick_executions[index] += 1
            self.quick_seconds[index] += took_s
        else:
            self._count(execution, "success", None, now)
        done = context._done = context._done | bit
        ready = context._ready
        # Straight on, nothing to search for: were `follow` done already, what is below it would be ready or running.
        if follow and not (ready or running):
            index, low = follow, frees
            context._maker = execution
        elif ways and not running and (way := ways.get(done)) is not None and way[0] == ready:
            _, index, low, context._ready, released = way
            if released:
                context._maker = execution
        elif frees == self.sink_bit:
            self._reach_sink(execution, context, now)
            return None
        elif (index := self._find_next(execution, step, now)) >= 0:
            low = self.bits[index]
        else:
            return None
        self.task_started[index] += 1
        if self.unseen:  # nobody looks at executions: the next one may be the same object again, and is not kept alive
            context._running = running | low if running else low
            execution.index, execution.started, context._maker = index, now, None
            return execution
        made = self.execution_class
        following = made()  # `Execution.begun` written out
        following.context, following.index = context, index
        following.attempt, following.started, following.ended = 1, now, 0.0
        following.worker, following.lane = execution.worker, context._lane
        following.watched = False
        following.grant = following.handle = following.outcome = None
        following.seldom = following.span = following.waits = following.released_by = None
        if self.recording:
            following.released_by = context._maker
            if context._waits is not None or context._more is not None:  # `_find_next` may have made it
                self._record(following)
        executions: Any = context._executions
        if running:
            context._running = running | low
            executions[executions.index(execution)] = following
        else:
            context._running = low
            executions[0] = following
        return following

    def _finish_own(self, execution: Execution, context: Context, now: float) -> None:
        """The common case written out, since it is most of what the engine does: `_end_execution`, `_complete`."""
        index = execution.index
        bit = self.bits[index]
        execution.ended = now
        execution.outcome = "success"
        context._running ^= bit
        context._executions.remove(execution)  # type: ignore[union-attr]
        self.active -= 1
        self._count(execution, "success", None, now)
        context._done |= bit
        self.cause = execution
        self._release_below(context, index, now)

    def finish_routed(self, execution: Execution, chosen: int, now: float) -> None:
        """A router chose the downstream tasks in the mask `chosen`; what is only below the others is skipped (T9)."""
        context, index = execution.context, execution.index
        self._end_execution(execution, "success", None, now)
        self.cause = execution
        if context._outcome is None and context._state != _DISCARDED:
            if not chosen:
                self._discard(context, now)
            else:
                self._route(context, index, chosen, now)
                if context._outcome is None:  # else what was left out was all that the sink waited for
                    self._complete(context, index, now)
                self._touch_lends(context)
            self._schedule(context, now)
        self._settle_all(now)

    def _finish_with(self, execution: Execution, result: Any, now: float) -> None:
        """The general case: others were returned, or the context has rare parts, limits, or has ended meanwhile."""
        context, index = execution.context, execution.index
        returned, output, delay = self._sort(execution, result)
        self._end_execution(execution, "success", None, now)
        if execution.cancelling:
            return
        self.cause = execution
        joins = delay is None and self.plan.joins & self.plan.bit[index] and context._more is not None
        if joins:
            self._joined(context, index, returned, now)
        kept = context._outcome is None and context._state != _DISCARDED
        if kept and output is not None:
            if output.context is None:
                output.context, output._id = context, context.id
            self._output(context, now, output)
        elif kept and delay is not None:
            self._wait_for(context, index, now + delay, _LIMIT_WAIT, now)
            if (tell := self.facts.limit_deferred) is not None:
                tell(context, execution.task, execution.task.id, now)
        else:
            self._take_returned(execution, returned, now)
            if joins and alive(context):
                self._late_sink(context, now)
        if context._place == IDLE:
            self._schedule(context, now)
        self._touch_lends(context)

    def _sort(self, execution: Execution, result: Any) -> tuple[list[Context], OutputContext | None, float | None]:
        """What was returned: contexts without repetition, an OutputContext, the delay of a RateLimitContext."""
        task = execution.task
        if result is None:
            return ([execution.context] if task.config.pass_through else []), None, None
        items: Iterable[Any] = result if isinstance(result, list | tuple | set | frozenset) else (result,)
        returned: dict[Context, None] = {}
        output: OutputContext | None = None
        delay: float | None = None
        for item in items:
            if isinstance(item, OutputContext):
                output = item
            elif isinstance(item, RateLimitContext) and item.context is execution.context:
                delay = item.delay
            elif isinstance(item, LoopContext | StopContext):
                continue
            elif not isinstance(item, Context) or isinstance(item, RateLimitContext):
                raise TaskError(
                    f"task {task.id!r} returned {_shown(item)}; a task returns contexts, a list of them, or None"
                )
            elif item._run is not None and item._run is not self:
                raise TaskError(f"task {task.id!r} returned context {item.id!r} of another run")
            else:
                returned[item] = None
        return list(returned), output, delay

    def _take_returned(self, execution: Execution, returned: list[Context], now: float) -> None:  # noqa: C901 - the whole of T1, T3, C5
        """T1, T3, C5: completes, enters, hands back; then decides what becomes of the execution's own context."""
        context, index = execution.context, execution.index
        own = context in returned
        lent = made = handed = False
        for item in returned:
            if item is context:
                continue
            if item._run is self:
                made |= item._outcome is None and item._state != _DISCARDED
                handed |= self._complete_other(item, execution, now)
            elif item._outcome is None and not self._orphaned(item):
                is_child = item._parent is context and alive(context) and not own
                if is_child:
                    self._join_lend(item, self._lend(context, index, now))
                lent |= is_child
                made = True
                self._enter_made(item, execution, now)
        if context._outcome is not None or context._state == _DISCARDED:
            return
        if own:
            self._complete_own(context, index, now)
        elif lent:
            self._restate(context, now)
        elif context in self._freezes:
            more = more_of(context)
            more.kept |= self.plan.bit[index]
            more.plain = False
        elif handed:
            self._stop_branches(context, now)
            self._end(context, "merged", now)
        elif made:
            self._stop_branches(context, now)
            self._collect(context, "split", "replaced", now)
        else:
            self._discard(context, now)

    def _complete_own(self, context: Context, index: int, now: float) -> None:
        more = context._more
        if more is not None and more.kept:
            more_of(context).kept &= ~self.plan.bit[index]
        if not (self.plan.joins & self.plan.bit[index] and context._done & self.plan.bit[index]):
            self._complete(context, index, now)

    def fail(self, execution: Execution, error: BaseException, now: float, delay: float | None = None) -> None:
        """The attempt failed; with `delay` it is tried again after so many seconds, else the context fails (E6).

        An abandoned execution (T13) is tried again only after `returned` was called for it.
        """
        context = execution.context
        self._end_execution(execution, "timeout" if isinstance(error, ExecutionTimeout) else "error", error, now)
        self.cause = execution
        if context._outcome is None and context._state != _DISCARDED and not execution.cancelling:
            if delay is None:
                self.fail_context(context, error, execution, now)
            else:
                self._retry(execution, error, delay, now)
                if self.plan.maps & self.plan.bit[execution.index]:
                    self._late_sink(context, now)
            if context._place == IDLE:
                self._schedule(context, now)
            else:
                self._restate(context, now)
        self._settle_all(now)

    def _retry(self, execution: Execution, error: BaseException, delay: float, now: float) -> None:
        context, index = execution.context, execution.index
        wait = self._timed_wait(context, index)
        if not wait.failed:
            wait.first_started = execution.started
        wait.failed += 1
        self.retries_total += 1
        if self.recording:
            more = more_of(context)
            if more.released is None:
                more.released = {}
            more.released[index] = execution
        if (tell := self.facts.retry_scheduled) is not None:
            tell(execution, error, delay, now)
        if execution.abandoned:
            self._unreturned[execution] = None
            self._park(context, wait, _RETRY_WAIT)
            execution.retry_at = now + delay
        else:
            self._wait_for(context, index, now + delay, _RETRY_WAIT, now)

    def first_started(self, execution: Execution) -> float:
        """When the first attempt of this task on this context started (run clock), for a cap on total time."""
        wait = wait_of(execution.context, execution.index)
        return wait.first_started if isinstance(wait, TimedWait) and wait.failed else execution.started

    def returned(self, execution: Execution, now: float) -> None:
        """An abandoned execution has really returned: its permits come back, and a retry may start (T13)."""
        context, index = execution.context, execution.index
        execution.abandoned = False
        self._unreturned.pop(execution, None)
        self._release_grant(execution, now)
        wait = wait_of(context, index)
        if execution.retry_at is not None and alive(context) and wait is not None and wait.state == _RETRY_WAIT:
            self._unpark(context, wait)
            self._wait_for(context, index, execution.retry_at, _RETRY_WAIT, now)
            self._schedule(context, now)
        self._settle_all(now)

    def cancelled(self, execution: Execution, now: float) -> None:
        """The engine cancelled the execution, and it is over."""
        self._end_execution(execution, "cancelled", None, now)
        self._settle_all(now)

    def interrupted(self, execution: Execution, now: float) -> None:
        """The execution was cut off through no fault of its own: it runs again without an attempt charged (T11)."""
        context, index = execution.context, execution.index
        self._end_execution(execution, "interrupted", None, now)
        if context._outcome is None and context._state != _DISCARDED and not execution.cancelling:
            self._offer_again(context, index)
            if context._place == IDLE:
                self._schedule(context, now)
        self._settle_all(now)

    # --- waiting inside an execution

    def pool_waits(self, execution: Execution, now: float) -> None:
        """No thread or process is free for the execution yet."""
        self._wait_inside(execution, now)

    def pool_started(self, execution: Execution, now: float) -> None:
        """A thread or process has taken the execution."""
        self._wait_over(execution, now)

    def service_waits(self, execution: Execution, now: float) -> None:
        """The execution was handed to a service: it holds no worker while the answer is awaited (T14)."""
        self._wait_inside(execution, now)

    def _wait_inside(self, execution: Execution, now: float) -> None:
        if execution.outcome is None and execution.context._outcome is None:
            more = more_of(execution.context)
            more.plain = False
            more.handed |= self.plan.bit[execution.index]
            self._restate(execution.context, now)

    def _wait_over(self, execution: Execution, now: float) -> None:
        more = execution.context._more
        if more is not None and more.handed and execution.outcome is None:
            more_of(execution.context).handed &= ~self.plan.bit[execution.index]
            self._restate(execution.context, now)

    # --- from outside

    def call(self, action: Callable[[Context, float], None], context: Context) -> None:
        """Carries a call of any thread to the run's own; dropped when the run is over."""
        if self.dispatch is not None:
            self.dispatch(action, context)

    def destroy(self, context: Context, now: float, caller: Execution | None = None) -> None:
        """Ends the context as dropped and its descendants as cancelled; the caller's own return value still counts
        (C8).
        """
        if context._outcome is None and context._state != _DISCARDED:
            self.cause = caller
            spared = caller if caller is not None and not caller.exempt else None
            if spared is not None:
                spared.exempt = True
            self._collect(context, "dropped", "destroyed", now)
            self._cascade(context, now)
            if spared is not None:
                self._stay_exempt(spared)
            self._settle_all(now)

    def cancel(self, context: Context, now: float) -> None:
        """Ends the context and its descendants as cancelled (a ticket's `cancel`)."""
        if alive(context):
            self.cause = None
            self._end(context, "cancelled", now)
            self._cascade(context, now)
            self._settle_all(now)

    def keep_trace(self, context: Context, now: float) -> None:
        """Passes on that somebody wants the trace of the context's root."""
        if (tell := self.facts.context_kept) is not None:
            tell(context, now)

    # --- the end of a run

    def stop(self, now: float) -> None:
        """The run is ended early (E9): whatever lives ends cancelled, and its executions are to be cancelled."""
        self.stopping = True
        self.cause = None
        self.end_discarded(now)
        for context in list(self.contexts):
            self._end(context, "cancelled", now)
        self._settle_all(now)

    def settled(self) -> bool:
        """Whether nothing lives any more, except what is only kept readable (E11)."""
        return self.living == self.discarded and not self.active

    def close(self, now: float) -> None:
        """The run is over: what was kept readable ends, and the books must balance (C9)."""
        self.end_discarded(now)
        self._settle_all(now)
        self.check(deep=True)

    def critical_path(self, root: Context) -> list[CriticalStep]:
        """The executions of an ended root in order of start, each with its slack; `critical` marks the deciding chain.

        Known while the root's `context_finished` is told, of runs whose observers need records.
        """
        return critical_path(self.plan, root)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
