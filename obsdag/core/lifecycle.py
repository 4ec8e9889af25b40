"""Entering, holds and ending: how a context lives (SEMANTICS C6, C8, C9, E11, E12).

Holds. `context._holds` counts what keeps a context alive beside its queue place (`_place`), its executions
(`_running`) and ready tasks: timers, limit waits, a freeze, open pulls, and children. A child holds its nearest living
ancestor until it has ended *and* its executions and children are gone; a child that waits at a join lets go. When the
last hold is lost, `_settle` decides the outcome. Everything walks with a work list: no recursion (G7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from obsdag.context import OutputContext
from obsdag.core.base import _DISCARDED, _KIND_INDEX, _OUTCOME_INDEX, _QUEUED, _RUNNING, RunBase, alive, more_of
from obsdag.core.queue import CONTINUING, IDLE, NEW, QUEUED, VISITED
from obsdag.core.records import Failure, Scope, Stall
from obsdag.errors import ContextError, DeadlineExceeded

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.core.records import Execution, More
    from obsdag.tasks.base import Task

__all__ = ["Lifecycle"]


class Lifecycle(RunBase):
    """From entering to the one outcome."""

    __slots__ = ()

    # --- entering

    def accept(self, context: Context, now: float) -> None:
        """Takes an input in (C12): its first tasks are ready and it is in the new lane.

        Raises ContextError if the context is in a run already or has ended.
        """
        self._check_new(context)
        self._enter(context, "input", self.entry_done, self.entry_ready, now)

    def accept_visited(self, context: Context, worker: int, now: float) -> bool:
        """`accept` and `take` in one, for a worker that pulls an input because the lanes are empty (E4).

        False if the context was accepted and cannot be driven yet: it is frozen.
        """
        if context._run is not None or context._outcome is not None:
            self._check_new(context)
        context._place = VISITED
        self._enter(context, "input", self.entry_done, self.entry_ready, now)
        if context._place != VISITED:
            return False
        self.visit_since[worker] = now  # as in `_begin_visit`
        if self.facts.quick_wait_s > 0.0:
            self.quick_visits[NEW] += 1
        else:
            self._begin_visit(context, worker, NEW, 0.0, now)
        return True

    def _check_new(self, context: Context) -> None:
        if context._run is not None or context._outcome is not None:
            where = "has ended" if context._outcome else "is in a run"
            raise ContextError(
                f"context {context.id!r} {where} and cannot be input again; use create() to make a new one"
            )

    def _enter_made(self, context: Context, execution: Execution, now: float) -> None:
        """Takes in what a task newly made: it starts below its maker (E12)."""
        plan, index = self.plan, execution.index
        context._scope = execution.context._scope
        done = plan.bit[index] | plan.ancestors[index]
        context._maker = execution
        if self.bypass:
            bypassed = plan.bypass[index]
            ready = self._ready_below(index, done | bypassed)
            self._enter(context, "child" if context._parent else "made", done | bypassed, ready, now)
            if bypassed and (tell := self.facts.tasks_bypassed) is not None:
                tell(context, bypassed.bit_count(), now)
            return
        maker = execution.context._more
        if maker is not None and maker.dead:
            done |= self._inherit_routes(more_of(context), maker.dead, done)
        self._enter(context, "child" if context._parent else "made", done, self._all_ready(done), now)

    def _inherit_routes(self, more: More, dead: dict[int, int], done: int) -> int:
        """What a router above the maker left out stays out for what is made below it; the others choose anew."""
        plan = self.plan
        more.dead = {}
        for below in sorted(dead):
            closed = dead[below] & (done | more.skipped)
            if closed:
                more.dead[below] = closed
                if closed == plan.up[below] and not done & plan.bit[below]:
                    more.skipped |= plan.bit[below]
        return more.skipped

    def _ready_below(self, index: int, done: int) -> int:
        plan, ready = self.plan, 0
        for below in plan.down_list[index]:
            if not plan.up[below] & ~done:
                ready |= plan.bit[below]
        return ready

    def _all_ready(self, done: int) -> int:
        plan, ready = self.plan, 0
        for index in range(len(plan.tasks)):
            if not done & plan.bit[index] and not plan.up[index] & ~done:
                ready |= plan.bit[index]
        return ready

    def _enter(self, context: Context, kind: str, done: int, ready: int, now: float) -> None:
        """The one way in. With `_place` VISITED its worker has it already, else it takes its place in the new lane."""
        visited = context._place == VISITED and not context._frozen
        context._run = self  # type: ignore[assignment]
        if context._token is not None:
            context._token.release()
        context._done = done
        context._ready = context._running = context._parked = context._holds = context._lane = 0
        context._entered = context._since = now
        context._waits = None
        context._state = state = _RUNNING if visited else _QUEUED
        self.contexts[context] = None
        if self.first_entered is None:
            self.first_entered = now
        self.living += 1
        self.entered[_KIND_INDEX[kind]] += 1
        self.state_counts[state] += 1
        if context._scope is not None:
            context._scope.living += 1
        if context._parent is not None and (holder := self._holder_of(context)) is not None:
            context._ledger = None
            holder._holds += 1
        else:
            context._ledger = 0.0
            if self.context_deadline is not None:
                self.set_deadline(context, now + self.context_deadline)
        if (tell := self.facts.context_entered) is not None:
            tell(context, kind, context._maker, now)
        if visited:
            context._lane = NEW
            context._ready = ready  # an input's first tasks: neither a join nor the sink
        else:
            self._enter_queue(context, ready, now)

    def _enter_queue(self, context: Context, ready: int, now: float) -> None:
        context._place = IDLE
        if context._frozen:
            context._holds += 1
            self._freezes[context] = None
        self._offer(context, ready, now)
        if context._ready and context not in self._freezes:
            self.queue.put(context, NEW)
            if (tell := self.facts.context_queued) is not None:
                tell(context, NEW, now)
        else:
            self._schedule(context, now)

    def _holder_of(self, context: Context) -> Context | None:
        """The nearest ancestor that lives in this run; remembered where it is not the parent, since that may change."""
        ancestor = context._parent
        while ancestor is not None and (ancestor._run is not self or ancestor._outcome is not None):
            ancestor = ancestor._parent
        if ancestor is not context._parent:
            more_of(context).holder = ancestor or context
        return ancestor

    def set_deadline(self, context: Context, when: float) -> None:
        """Ends a root as failed with DeadlineExceeded at `when` (run clock), unless it has ended by then."""
        self._forget_deadline(context)
        self._deadlines[context] = self.timers.set(when, self._deadline_passed, context)
        self.dirty = True

    def deadline_of(self, context: Context) -> float | None:
        """When a living root fails with DeadlineExceeded (run clock), None if it has no deadline."""
        timer = self._deadlines.get(context) if self._deadlines else None  # a look at each context costs a cache miss
        return None if timer is None else timer.when

    def _forget_deadline(self, context: Context) -> None:
        timer = self._deadlines.pop(context, None)
        if timer is not None:
            self.timers.cancel(timer)

    def _deadline_passed(self, context: Context, now: float) -> None:
        waited = now - context._entered
        error = DeadlineExceeded(f"context {context.id!r} did not finish within its deadline ({waited:.3f} s)")
        self.fail_context(context, error, None, now)
        self._settle_all(now)

    # --- readiness

    def _offer(self, context: Context, ready: int, now: float) -> None:
        """Makes tasks ready on a context; the sink gives it out, a join of its lent branch makes it arrive."""
        plan = self.plan
        if ready & plan.bit[plan.sink]:
            self._output(context, now)
            return
        joins = ready & plan.joins
        if joins and context._more is not None and (lend := context._more.lend) is not None:
            joins &= lend.mask
            if joins:
                more, ready = more_of(context), ready & ~joins
                if more.arrived_at >= 0:  # the first of those that are ready
                    joins |= plan.bit[more.arrived_at]
                more.arrived_at = (joins & -joins).bit_length() - 1
                context._parked |= joins
        context._ready |= ready

    def _output(self, context: Context, now: float, output: OutputContext | None = None) -> None:
        """The context reached the sink, or its task gave out `output`: other branches are stopped (C10)."""
        if context._more is not None:
            self._stop_branches(context, now)
        self._end(context, "output", now, OutputContext(context) if output is None else output)

    def _schedule(self, context: Context, now: float) -> None:
        """Gives a context with something to do its place; settles one that nothing holds."""
        if context._place == IDLE and context._outcome is None:
            if context._ready and context not in self._freezes:
                self.queue.put(context, CONTINUING)
                if (tell := self.facts.context_queued) is not None:
                    tell(context, CONTINUING, now)
            elif not (context._running or context._ready or context._holds):
                self._work.append(context)
            self._restate(context, now)

    # --- ending

    def _settle_all(self, now: float) -> None:
        """Decides about every context that may have lost its last hold, until nothing changes."""
        self._settling = True
        try:
            while self._work:
                context = self._work.pop()
                if context._outcome is not None or context._state == _DISCARDED:
                    if not context._running and not context._holds:
                        self._let_go(context, now)
                elif not (context._running or context._ready or context._holds or context._place):
                    self._settle(context, now)
        finally:
            self._settling = False

    def _settle(self, context: Context, now: float) -> None:
        """The last hold is lost (C6): arrived at a join, lent and not handed back, or stalled."""
        raise NotImplementedError  # the layer of joins and loops decides

    def _let_go(self, context: Context, now: float) -> None:
        """An ended context is gone with its executions and children: it no longer holds its ancestor."""
        more = context._more
        context._holds = -1  # gone: never twice
        holder = context._parent
        if more is not None:
            if more.arrived:
                return
            if more.holder is not None:
                holder = None if more.holder is context else more.holder
            lend = more.lend
            if lend is not None and lend.mapped and not lend.keeps and lend.parent._children:
                lend.parent._children.pop(context, None)  # a map without a join stays bounded
        if holder is not None:
            holder._holds -= 1
            self._work.append(holder)

    def _end(self, context: Context, outcome: str, now: float, output: OutputContext | None = None) -> None:  # noqa: C901 - all that an end gives back, in one place
        """Ends a living context: one outcome, everything it holds or waits for given back, its executions cancelled."""
        if context._state == _DISCARDED:
            self.discarded -= 1
        context._outcome = outcome
        self.living -= 1
        self.finished[_OUTCOME_INDEX[outcome]] += 1
        self.state_counts[context._state] -= 1
        del self.contexts[context]
        context._ready = context._parked = 0
        if context._place == QUEUED:
            self.queue.forget(context)
        if self._freezes:
            self._forget_freeze(context)
        if context._running:
            self._cancel_executions(context)
        else:
            context._executions = None  # one object less that the outputs of a run keep alive
        self._leave_state(context, context._state, now)
        if self._deadlines:
            self._forget_deadline(context)
        if context._more is not None:
            self._close_more(context, outcome, now)
        # Asked for None here and where a branch ends: tracing's executions are mappings, whose truth is a call.
        if self.recording and context._ledger is not None and self.cause is not None:
            context._maker = self.cause
        if (tell := self.facts.context_finished) is not None:
            tell(context, outcome, now)
        if output is not None:
            output._outcome = "output"
            if context._scope is None:
                emit = self.emit  # an attribute, called as a method, would be looked for in the class each time
                emit(output)
            else:
                context._scope.outputs.append(output)
        if context._scope is not None and not (context._more is not None and context._more.pending_end):
            self._leave_scope(context._scope)
        if self.keeping:
            self.records.pop(context, None)
        context._waits = context._maker = None
        if context._parent is not None:
            self._work.append(context)

    def _forget_freeze(self, context: Context) -> None:
        if context in self._freezes:
            context._holds -= 1
            del self._freezes[context]

    def _leave_scope(self, scope: Scope) -> None:
        scope.living -= 1
        if not scope.living:
            self.done_scopes.append(scope)
            self.dirty = True

    def _cancel_executions(self, context: Context) -> None:
        for execution in context._executions or ():
            if not execution.cancelling and not execution.exempt:
                execution.cancelling = True
                self.cancels.append(execution)
                self.dirty = True

    def _close_more(self, context: Context, outcome: str, now: float) -> None:
        """Gives back timers, permits and pulls; tells the lent branch that one of its children ended."""
        raise NotImplementedError  # the layer of waits does

    def _collect(self, context: Context, outcome: str, reason: str, now: float, task: Task | None = None) -> None:
        """Ends by garbage collection as dropped or split (T3, C6), or keeps it readable until the run ends (E11)."""
        if task is None and self.cause is not None:
            task = self.cause.task
        more_of(context).why = reason
        if not self.gc and reason != "destroyed" and not self.stopping:
            self._keep_discarded(context, outcome, now)
        else:
            if (tell := self.facts.context_destroyed) is not None:
                tell(context, task, reason, now)
            self._end(context, outcome, now)
        if reason != "discarded" or task is None:  # emptied: no warning (T14, T15)
            return
        if not (task.config.may_drop or task.config.pass_through) and (tell := self.facts.context_dropped) is not None:
            tell(context, task, now)

    def _keep_discarded(self, context: Context, outcome: str, now: float) -> None:
        more = more_of(context)
        more.pending_end, more.plain = outcome, False
        if context._scope is not None:
            self._leave_scope(context._scope)
        context._ready = context._parked = 0
        if context._place == QUEUED:
            self.queue.forget(context)
        self._forget_freeze(context)
        self._forget_deadline(context)
        if context._running:
            self._cancel_executions(context)
        self._close_more(context, outcome, now)
        self._move(context, _DISCARDED, now)
        self.discarded += 1
        self._work.append(context)
        if (tell := self.facts.context_changed) is not None:
            tell(context, now)

    def end_discarded(self, now: float) -> None:
        """At the run's end: what `enable_context_gc=False` kept readable ends as it was going to (E11)."""
        for context in [c for c in self.contexts if c._more is not None and c._more.pending_end]:
            more = more_of(context)
            if (tell := self.facts.context_destroyed) is not None:
                tell(context, None, more.why, now)
            self._end(context, more.pending_end or "dropped", now)

    # --- what ends others

    def fail_context(
        self,
        context: Context,
        error: BaseException,
        execution: Execution | None,
        now: float,
        task: str | None = None,
    ) -> None:
        """Ends a context as failed and its descendants as cancelled (E6, C8). task: to blame, if no execution is."""
        if execution is not None:
            task = execution.task.id
        elif task is None:
            task = self._waiting_at(context)
        context._error = error
        more_of(context).why = task
        attempts = execution.attempt if execution is not None else max(1, context.attempt)
        failure = Failure(context, task, attempts, error)
        if context._scope is not None:
            context._scope.failures.append(failure)
        self.failures_total += 1
        if self.config.on_failure == "raise":
            self.dirty = True
        if self.kind == "run" or len(self.failures) < self.config.failures_kept:
            self.failures.append(failure)
        else:
            self.failures.pop(0)
            self.failures.append(failure)
        if (tell := self.facts.context_failed) is not None:
            tell(context, failure, execution, now)
        self._end(context, "failed", now)
        self._cascade(context, now)

    def _cascade(self, context: Context, now: float) -> None:
        """Ends all living descendants as cancelled, nearest first."""
        pending = list(context._children or ())
        for child in pending:  # grows while it is walked
            if child._run is self and alive(child):
                more_of(child).why = "cascade"
                if (tell := self.facts.context_destroyed) is not None:
                    tell(child, None, "cascade", now)
                self._end(child, "cancelled", now)
            pending.extend(child._children or ())

    def _stop_branches(self, context: Context, now: float) -> None:
        """Stops the branches that a context lent (T3: dropping is whole): their children are cancelled."""
        more = context._more
        if more is None or not more.lends:
            return
        for lend in more.lends.values():
            for child in list(context._children or ()):
                if child._more is not None and child._more.lend is lend and alive(child):
                    self._end(child, "cancelled", now)
                    self._cascade(child, now)

    def _waiting_at(self, context: Context) -> str:
        """The task that a living context is at: running, ready, waiting, or the first that is not completed."""
        plan = self.plan
        parked, left = context._parked & ~context._done, plan.all_mask & ~context._done
        mask = context._running or context._ready or parked or left  # the sink at least is left while it lives
        return plan.tasks[(mask & -mask).bit_length() - 1].id

    def _diagnose(self, context: Context) -> Stall:
        """Why a context that nothing holds cannot go on (E8)."""
        plan = self.plan
        task = self._waiting_at(context)
        index = plan.index[task]
        missing = tuple(plan.names(plan.up[index] & ~context._done))
        if context in self._freezes:
            return Stall(context, task, missing, "it is frozen and nobody thaws it")
        if missing:  # pragma: no cover - by the plan's order the first task that waits has its upstreams
            return Stall(context, task, missing, "nothing that still runs can complete them for this context")
        return Stall(context, task, missing, "no execution, timer, wait or child is left that could bring it on")

    def _stall(self, context: Context, stall: Stall, now: float) -> None:
        self.stalls.append(stall)
        if (tell := self.facts.context_stalled) is not None:
            tell(context, stall, now)
        self._end(context, "stalled", now)

    def _recompute_parked(self, context: Context) -> None:
        more, parked = context._more, 0
        if more is not None:
            parked = more.source | more.room
            for wait in more.each_wait():
                if wait.state:
                    parked |= self.plan.bit[wait.index]
            for lend in (more.lends or {}).values():
                parked |= lend.mask
            if more.arrived_at >= 0:
                parked |= self.plan.bit[more.arrived_at]
        context._parked = parked
