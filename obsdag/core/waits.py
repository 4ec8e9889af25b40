"""Waiting: limits, retries, timers, freezes, and what an end gives back (SEMANTICS T7, T8, C7, C10, E6, E8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from obsdag.core.base import _DISCARDED, alive, more_of
from obsdag.core.lifecycle import Lifecycle
from obsdag.core.queue import QUEUED
from obsdag.core.records import Execution, More

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.limits import LimitRequest
    from obsdag.tasks.base import Task

__all__ = ["Waits"]


class Waits(Lifecycle):
    """A waiting task is in `_parked` and holds its context once; nothing polls."""

    idle_at: float | None = None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._fired = self._timer_fired  # bound once: each timer has it

    # --- limits (T7)

    def _admit(self, context: Context, index: int, now: float) -> tuple[bool, LimitRequest | None]:
        """Whether the task may start: all its permits are taken together, or it waits in line for them."""
        more = context._more
        if more is not None and more.requests is not None:
            request = more.requests.pop(index, None)
            if request is not None:
                return True, request
        request = self.runtime.limits.request(self, (context, index), self.limits[index], now)
        if request.granted:
            return True, request
        more = more_of(context)
        if more.requests is None:
            more.requests = {}
        more.requests[index] = request
        self._park(context, more, index, "limit")
        self.waiting_limits += 1
        if self.facts.limit_deferred is not None:
            assert request.blocking is not None
            name = self.limiter_names.get(request.blocking, "")
            self.facts.limit_deferred(context, self.plan.tasks[index], name, now)
        return False, None

    def granted(self, request: LimitRequest) -> None:
        """A waiting request holds its permits now; told from any thread, and possibly in the middle of a transition."""
        self._grants.append(request)
        self.nudge()

    def take_grants(self, now: float) -> None:
        """Lets those start whose permits came; at the end of a transition, never within."""
        while self._grants:
            self._permit_came(self._grants.popleft(), now)

    def _permit_came(self, request: LimitRequest, now: float) -> None:
        context, index = cast("tuple[Context, int]", request.key)
        more = context._more
        if more is None or more.requests is None or more.requests.get(index) is not request:
            self.closings.extend(self.runtime.limits.release(request, now, unused=True))
            return
        self.waiting_limits -= 1
        self._unpark(context, more, index, "limit")
        if self.facts.limit_granted is not None and request.limits:
            name = self.limiter_names.get(request.blocking or request.limits[0], "")
            self.facts.limit_granted(context, self.plan.tasks[index], name, now - request.asked_at, now)
        self._permit_for(context, index, now)

    def _permit_for(self, context: Context, index: int, now: float) -> None:
        """The permits that a task waited for are there: it is ready."""
        self._offer_again(context, index)
        if context in self._freezes:
            self._unreserve(context, now)
        self._schedule(context, now)

    def rearm(self, at: float) -> None:
        """The limits ask to be advanced at `at`: the shell looks at `next_wake` again."""
        self.dirty = True
        self.nudge()

    # --- parking

    def _park(self, context: Context, more: More, index: int, kind: str) -> None:
        bit = self.plan.bit[index]
        setattr(more, kind, getattr(more, kind) | bit)
        context._parked |= bit
        context._holds += 1
        if not context._executions:
            context._executions = None  # many may wait for long: 56 bytes each

    def _unpark(self, context: Context, more: More, index: int, kind: str) -> None:
        bit = self.plan.bit[index]
        setattr(more, kind, getattr(more, kind) & ~bit)
        context._holds -= 1
        self._recompute_parked(context)

    # --- timers and retries (C10, E6)

    def _wait_for(self, context: Context, index: int, when: float, kind: str, now: float) -> None:
        """Parks a task until `when`; at once ready if that has come."""
        if when <= now:
            self._offer_again(context, index)
            return
        more = more_of(context)
        if more.timers is None:
            more.timers = {}
        self._park(context, more, index, kind)
        more.timers[index] = self.timers.set(when, self._fired, (context, index, kind))
        self.dirty = True

    def _wait_no_more(self, context: Context, index: int, now: float) -> None:
        """The task was completed for the context by another's execution: what it waits for or has reserved is given
        back.
        """
        more, bit = context._more, self.plan.bit[index]
        if more is None:
            return
        request = more.requests.pop(index, None) if more.requests else None
        timer = more.timers.pop(index, None) if more.timers else None
        if timer is not None:
            self.timers.cancel(timer)
        if request is not None:
            self.waiting_limits -= 1 if more.limit & bit else 0
            self.closings.extend(self.runtime.limits.release(request, now, unused=True))
        if (more.limit | more.retry) & bit:
            self._unpark(context, more, index, "limit" if more.limit & bit else "retry")

    def _offer_again(self, context: Context, index: int) -> None:
        bit = self.plan.bit[index]
        lends = context._more.lends if context._more is not None else None
        branches = [lend for lend in lends.values() if lend.mask & bit] if lends else []
        fires = any(lend.joining == index for lend in branches)
        if not context._running & bit and (fires or not (branches or context._done & bit)):  # not lent meanwhile (C5)
            context._ready |= bit

    def _timer_fired(self, what: tuple[Context, int, str], now: float) -> None:
        context, index, kind = what
        more = more_of(context)
        assert more.timers is not None  # an end cancels them
        del more.timers[index]
        self._unpark(context, more, index, kind)
        self._offer_again(context, index)
        self._schedule(context, now)
        self._settle_all(now)

    def next_wake(self) -> float | None:
        """When something is due next: a timer, a permit of this run's line, the end of the wait for the frozen."""
        due = [self.timers.next_due(), self.idle_at]
        if self.waiting_limits:
            due.append(self.runtime.limits.due(self))
        times = [when for when in due if when is not None]
        return min(times) if times else None

    def wake(self, now: float) -> None:
        """Does what is due at `now`."""
        self.cause = None
        while (timer := self.timers.pop_due(now)) is not None:
            timer.action(timer.argument, now)
        if self.waiting_limits:
            self.runtime.limits.advance(now)
        if self.idle_at is not None and self.idle_at <= now:
            self.idle_at = None
            if self._only_frozen():
                self._stall_frozen(now)
        self._settle_all(now)

    # --- freezing (C7) and waiting for the frozen (E8)

    def freeze(self, context: Context, now: float) -> None:
        """No new execution starts on the context; the freeze holds it."""
        if context._outcome is None and context._state != _DISCARDED and context not in self._freezes:
            self._note_freeze(context, True, now)
            if context._place == QUEUED:
                self.queue.forget(context)
            self._unreserve(context, now)
            self._restate(context, now)
            self._settle_all(now)

    def _unreserve(self, context: Context, now: float) -> None:
        """A frozen context keeps no permit from others: it asks again when it is thawed. Else contexts that wait for
        its permits, and the run that waits for them, could wait for ever (E8).
        """
        more = context._more
        if more is not None and more.requests:
            for index, request in list(more.requests.items()):
                if not more.limit & self.plan.bit[index]:
                    del more.requests[index]
                    self.closings.extend(self.runtime.limits.release(request, now, unused=True))

    def thaw(self, context: Context, now: float) -> None:
        """Ends the freeze: what was kept undecided is dropped, the rest goes on."""
        if context._outcome is None and context in self._freezes:
            self._end_freeze(context, now)
            self._settle_all(now)

    def _end_freeze(self, context: Context, now: float) -> None:
        self._note_freeze(context, False, now)
        more = context._more
        if more is not None and more.kept:
            task = self.tasks[(more.kept & -more.kept).bit_length() - 1]
            more.kept = 0
            self._discard(context, now, task)
        self._schedule(context, now)

    def _note_freeze(self, context: Context, frozen: bool, now: float) -> None:
        context._frozen = frozen
        context._holds += 1 if frozen else -1
        if frozen:
            self._freezes[context] = None
        else:
            del self._freezes[context]
        if self.facts.context_changed is not None:
            self.facts.context_changed(context, now)

    def _only_frozen(self) -> bool:
        return bool(self._freezes) and not self.moving()

    def moving(self) -> bool:
        """Whether anything is under way that can bring a context on: an execution, a place, a timer, a wait for a
        limit, an abandoned function that is retried when it has returned.
        """
        if self.active or self.queue or self.timers.armed or self.waiting_limits:
            return True
        return any(
            alive(execution.context) and more_of(execution.context).retry & self.plan.bit[execution.index]
            for execution in self._unreturned
        )

    def rest(self, now: float) -> None:
        """Called by the shell when no worker has anything to do: starts or stops waiting for frozen contexts."""
        if not self._only_frozen():
            self.idle_at = None
        elif self.idle_at is None and self.config.context_queue_timeout is not None:
            self.idle_at = now + self.config.worker_idle_times * self.config.context_queue_timeout

    def _stall_frozen(self, now: float) -> None:
        for context in list(self._freezes):
            self._stall(context, self._diagnose(context), now)
        self._settle_all(now)

    def _discard(self, context: Context, now: float, task: Task | None = None) -> None:
        """A task (the one whose execution ends now, or `task`) returned nothing: the context ends dropped, its other
        branches are stopped (T3).
        """
        self._stop_branches(context, now)
        self._collect(context, "dropped", "discarded", now, task)

    # --- giving back

    def _close_more(self, context: Context, outcome: str, now: float) -> None:
        more = more_of(context)
        for timer in (more.timers or {}).values():
            self.timers.cancel(timer)
        context._holds -= (more.limit | more.retry).bit_count()
        more.timers = None
        requests, more.requests = more.requests, None
        for index, request in (requests or {}).items():
            if more.limit & self.plan.bit[index]:
                self.waiting_limits -= 1
            self.closings.extend(self.runtime.limits.release(request, now, unused=True))
        more.limit = more.retry = 0
        self._close_sources(context, more, outcome, now)

    def _close_sources(self, context: Context, more: More, outcome: str, now: float) -> None:
        raise NotImplementedError  # the layer of sources does

    def _release_grant(self, execution: Execution, now: float) -> None:
        if execution.grant is not None:
            grant, execution.grant = execution.grant, None
            self.closings.extend(self.runtime.limits.release(grant, now))
