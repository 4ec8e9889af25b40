"""Progress: executions begin and end, tasks are completed, edges die, what is below becomes ready (SEMANTICS C4, T8,
T9).
"""

from __future__ import annotations

from typing import Final

from obsdag.context import Context, OutputContext
from obsdag.core.base import _DISCARDED, _RUNNING, more_of
from obsdag.core.lending import Lending
from obsdag.core.records import Execution
from obsdag.plan import MAX_WAYS, Step, indices

__all__ = ["RECORDS_PER_ROOT", "Progress"]

RECORDS_PER_ROOT: Final = 1000
"""Executions remembered per root for slack; the critical path itself needs no more than the chain of `released_by`."""


class Progress(Lending):
    """A context's way through the plan, as operations on its masks."""

    __slots__ = ()

    def _note_started(self, execution: Execution, now: float) -> None:
        context, index = execution.context, execution.index
        context._running |= self.plan.bit[index]
        self.active += 1
        self.task_started[index] += 1
        if context._executions is None:
            context._executions = [execution]
        else:
            context._executions.append(execution)
        if context._state != _RUNNING:
            self._restate(context, now)

    def _record(self, execution: Execution) -> None:
        """Who released it and how long it waited, for critical paths and spans."""
        context = execution.context
        more = context._more
        execution.released_by = context._maker
        execution.waits, context._waits = context._waits, None
        if more is not None and more.released:
            execution.released_by = more.released.pop(execution.index, execution.released_by)

    def _stay_exempt(self, execution: Execution) -> None:
        """Where its context has ended, a ticket waits for what the execution returns (S1) until `_end_execution`. Else
        what ends its context later cancels it.
        """
        context = execution.context
        execution.exempt = context._outcome is not None and execution in (context._executions or ())
        if execution.exempt and context._scope is not None:
            context._scope.living += 1

    def _end_execution(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        """Every way out of an execution comes through here once (T8): counts, permits, the fact."""
        context, index = execution.context, execution.index
        execution.ended = now
        execution.outcome = outcome
        context._running &= ~self.plan.bit[index]
        context._executions.remove(execution)  # type: ignore[union-attr]
        self.active -= 1
        more = context._more
        if more is not None and more.handed:
            more_of(context).handed &= ~self.plan.bit[index]
            self._restate(context, now)  # the others may all wait
        if execution.grant is not None and not execution.abandoned:
            self._release_grant(execution, now)
        if execution.exempt and context._scope is not None:
            self._leave_scope(context._scope)
        self._count(execution, outcome, error, now)
        if not context._running and (context._outcome is not None or context._state == _DISCARDED):
            self._work.append(context)

    def _count(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        """Counts an execution that has ended, and tells those who want to know (`Observer.quick_s`)."""
        index, took_s = execution.index, now - execution.started
        if self.keeping:
            self._keep_record(execution)
        if took_s < self.facts.skip_s and outcome == "success" and not execution.watched:
            self.quick_executions[index] += 1
            self.quick_seconds[index] += took_s
            if (tell := self.facts.to_every) is not None:
                tell(execution, outcome, error, now)
            return
        self.told_executions[index] += 1
        self.told_seconds[index] += took_s
        if (tell := self.facts.execution_finished) is not None:
            tell(execution, outcome, error, now)

    def _keep_record(self, execution: Execution) -> None:
        root = execution.context
        while root._ledger is None and root._parent is not None:
            root = root._parent
        if root._outcome is None:
            records = self.records.setdefault(root, [])
            if len(records) < RECORDS_PER_ROOT:
                records.append(execution)

    def _complete(self, context: Context, index: int, now: float) -> None:
        """The task is completed for the context: what has all its live upstreams completed now is ready (C4)."""
        context._done |= self.plan.bit[index]
        self._release_below(context, index, now)

    def _release_below(self, context: Context, index: int, now: float) -> None:
        done, ready = context._done, 0
        for bit, waits_for in self.below[index]:
            if waits_for & done == waits_for:
                ready |= bit
        if ready:
            self._release(context, ready & ~(done | context._running | context._parked | context._ready), now)

    def _release(self, context: Context, ready: int, now: float) -> None:
        if not ready:
            return
        if self.recording and self.cause is not None:
            if not context._ready:
                context._maker = self.cause
            else:
                more = more_of(context)
                if more.released is None:
                    more.released = {}
                more.released.update(dict.fromkeys(indices(ready), self.cause))
        if ready & (plan := self.plan).bit[plan.sink] or plan.joins & ready:
            self._offer(context, ready, now)
        else:
            context._ready |= ready

    def _route(self, context: Context, index: int, chosen: int, now: float) -> None:
        """Kills the edges that were not chosen; a task whose every in-edge is dead is skipped, and so on (C4)."""
        plan, more = self.plan, more_of(context)
        dead = more.dead
        if dead is None:
            dead = more.dead = {}
        closed = [(index, below) for below in plan.down_list[index] if not chosen & plan.bit[below]]
        for above, below in closed:  # grows while it is walked
            dead[below] = dead.get(below, 0) | plan.bit[above]
            if dead[below] == plan.up[below] and not context._done & plan.bit[below]:
                more.skipped |= plan.bit[below]
                context._done |= plan.bit[below]
                closed.extend((below, further) for further in plan.down_list[below])
        waiting = 0
        for _, below in closed:
            if not plan.bit[below] & context._done and not plan.up[below] & ~(context._done | plan.bit[index]):
                waiting |= plan.bit[below]
        waiting &= ~(context._running | context._parked | context._ready)
        if waiting:
            context._done |= plan.bit[index]
            self._release(context, waiting, now)

    def _orphaned(self, context: Context) -> bool:
        """Whether an ancestor failed, was cancelled or was destroyed: new contexts below it are ignored (C12)."""
        ancestor = context._parent
        while ancestor is not None:
            if ancestor._outcome in ("failed", "cancelled"):
                return True
            if ancestor._outcome == "dropped" and (ancestor._more is None or ancestor._more.why in ("destroyed", "")):
                return True
            ancestor = ancestor._parent
        return False

    # --- the short way (`RunState.finish_and_begin`)

    def _find_next(self, execution: Execution, step: Step, now: float) -> int:
        """What the runner of an ended execution goes on with, which is not ready any more; -1 if with nothing.

        A way that depends on nothing else than what it is remembered by is remembered.
        """
        context = execution.context
        done, running, was = context._done, context._running, context._ready
        _, _, frees, rest, ways = step
        for below, waits_for in rest:
            if waits_for & done == waits_for:
                frees |= below
        if frees & self.sink_bit:
            self._reach_sink(execution, context, now)
            return -1
        ready = was
        if frees and was and self.recording:
            self.cause = execution
            self._release(context, frees & ~(done | running | was), now)
            ready = context._ready
        elif frees:
            ready = context._ready = was | frees & ~(done | running)
            context._maker = execution
        low = ready & -ready
        index = low.bit_length() - 1
        if not ready or self.limits[index]:
            self._put_down(execution)
            return -1
        context._ready = ready ^ low
        if ways is not None and not running and not (frees and was) and len(ways) < MAX_WAYS:
            ways[done] = was, index, low, ready ^ low, frees != 0
        return index

    def _put_down(self, execution: Execution) -> None:
        """Nothing follows an execution for its runner."""
        execution.context._executions.remove(execution)  # type: ignore[union-attr]
        self.active -= 1
        if self.unseen:
            execution.context._maker = None

    def _reach_sink(self, execution: Execution, context: Context, now: float) -> None:
        self.active -= 1
        if context._running:  # else its end forgets them all
            context._executions.remove(execution)  # type: ignore[union-attr]
        self.cause = execution
        self._end(context, "output", now, OutputContext(context))
        if self._work or self._touched:
            self._settle_all(now)
