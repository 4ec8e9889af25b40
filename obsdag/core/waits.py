"""Waiting: limits, retries, timers, freezes, and what an end gives back (SEMANTICS T7, T8, C7, C10, E6, E8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from obsdag.core.base import _DISCARDED, _LIMIT_WAIT, alive, more_of, wait_of
from obsdag.core.lifecycle import Lifecycle
from obsdag.core.queue import QUEUED
from obsdag.core.records import Execution, More, TimedWait, Wait

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.limits import LimitRequest
    from obsdag.tasks.base import Task

__all__ = ["Waits"]


class Waits(Lifecycle):
    """A waiting task is in `_parked` and holds its context once; nothing polls."""

    __slots__ = ()

    # --- limits (T7)

    def _admit(self, context: Context, index: int, now: float) -> tuple[bool, LimitRequest | None]:
        """Whether the task may start: all its permits are taken together, or it waits in line for them."""
        wait = wait_of(context, index)
        if wait is not None and (reserved := wait.request) is not None:
            self._forget_wait(context, wait)
            return True, reserved
        request = self.runtime.limits.request(self, context, self.limits[index], now)
        if request.granted:
            return True, request
        if wait is None:
            wait = Wait(index)
            self._keep_wait(context, wait)
        wait.on = request
        self._park(context, wait, _LIMIT_WAIT)
        self.waiting_limits += 1
        if (tell := self.facts.limit_deferred) is not None:
            assert request.blocking is not None
            name = self.limiter_names.get(request.blocking, "")
            tell(context, self.plan.tasks[index], name, now)
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
        context = cast("Context", request.key)
        waits = () if context._more is None else context._more.each_wait()
        wait = next((wait for wait in waits if wait.on is request), None)
        if wait is None:
            self.closings.extend(self.runtime.limits.release(request, now, unused=True))
            return
        self.waiting_limits -= 1
        self._unpark(context, wait)
        if (tell := self.facts.limit_granted) is not None:
            assert request.blocking is not None
            name = self.limiter_names.get(request.blocking, "")
            tell(context, self.plan.tasks[wait.index], name, now - request.asked_at, now)
        self._permit_for(context, wait.index, now)

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

    def _keep_wait(self, context: Context, wait: Wait) -> None:
        if context._more is None:
            context._more = wait
            return
        more = more_of(context)
        if more.waits is None:
            more.waits = {}
        more.waits[wait.index] = wait

    def _forget_wait(self, context: Context, wait: Wait) -> None:
        """It waits for nothing any more, and reserves nothing; what it has tried is remembered."""
        wait.on = None
        if wait.failed:
            return
        if context._more is wait:
            context._more = None
        else:
            waits = more_of(context).waits
            assert waits is not None
            del waits[wait.index]
            if not waits:
                more_of(context).waits = None

    def _park(self, context: Context, wait: Wait, state: int) -> None:
        wait.state = state
        context._parked |= self.plan.bit[wait.index]
        context._holds += 1
        if not context._executions:
            context._executions = None  # many may wait for long: 56 bytes each

    def _unpark(self, context: Context, wait: Wait) -> None:
        wait.state = 0
        context._holds -= 1
        self._recompute_parked(context)

    # --- timers and retries (C10, E6)

    def _timed_wait(self, context: Context, index: int) -> TimedWait:
        """What is known of a task that is to wait for a time, or is tried again."""
        wait = wait_of(context, index)
        if isinstance(wait, TimedWait):
            return wait
        wait = TimedWait(index)
        self._keep_wait(context, wait)
        return wait

    def _wait_for(self, context: Context, index: int, when: float, state: int, now: float) -> None:
        """Parks a task until `when`; at once ready if that has come."""
        if when <= now:
            self._offer_again(context, index)
            return
        wait = self._timed_wait(context, index)
        self._park(context, wait, state)
        wait.context = context
        self.timers.arm(wait, float(when))
        self.dirty = True

    def _wait_no_more(self, context: Context, index: int, now: float) -> None:
        """The task was completed for the context by another's execution: what it waits for or has reserved is given
        back.
        """
        wait = wait_of(context, index)
        if wait is not None:
            parked = wait.state
            self._end_wait(context, wait, now)
            if parked:
                self._recompute_parked(context)

    def _end_wait(self, context: Context, wait: Wait, now: float) -> None:
        request, state = wait.request, wait.state
        if isinstance(wait, TimedWait):
            self.timers.cancel(wait)
            wait.context = None
        if state:
            wait.state = 0
            context._holds -= 1
        self._forget_wait(context, wait)
        if request is not None:
            self.waiting_limits -= 1 if state else 0
            self.closings.extend(self.runtime.limits.release(request, now, unused=True))

    def _offer_again(self, context: Context, index: int) -> None:
        bit = self.plan.bit[index]
        lends = context._more.lends if context._more is not None else None
        branches = [lend for lend in lends.values() if lend.mask & bit] if lends else []
        fires = any(lend.joining == index for lend in branches)
        if not context._running & bit and (fires or not (branches or context._done & bit)):  # not lent meanwhile (C5)
            context._ready |= bit

    def time_has_come(self, context: Context, wait: TimedWait, now: float) -> None:
        """The time that a task waited for has come."""
        self._forget_wait(context, wait)
        self._unpark(context, wait)
        self._offer_again(context, wait.index)
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
            timer.fire(now)
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
        for wait in () if context._more is None else context._more.each_wait():
            if not wait.state:
                self._give_back(context, wait.index, now)

    def _give_back(self, context: Context, index: int, now: float) -> None:
        """What a task has reserved goes to others."""
        wait = wait_of(context, index)
        request = None if wait is None else wait.request
        if wait is not None and request is not None:
            self._forget_wait(context, wait)
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
            more_of(context).kept = 0
            self._discard(context, now, task)
        self._schedule(context, now)

    def _note_freeze(self, context: Context, frozen: bool, now: float) -> None:
        context._frozen = frozen
        context._holds += 1 if frozen else -1
        if frozen:
            self._freezes[context] = None
        else:
            del self._freezes[context]
        if (tell := self.facts.context_changed) is not None:
            tell(context, now)

    def _only_frozen(self) -> bool:
        return bool(self._freezes) and not self.moving()

    def moving(self) -> bool:
        """Whether anything is under way that can bring a context on: an execution, a place, a timer, a wait for a
        limit, an abandoned function that is retried when it has returned.
        """
        if self.active or self.queue or self.timers.armed or self.waiting_limits:
            return True
        waits = (wait_of(each.context, each.index) for each in self._unreturned if alive(each.context))
        return any(wait.state for wait in waits if wait is not None)

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
        more = context._more
        assert more is not None
        for wait in more.each_wait():
            self._end_wait(context, wait, now)
        if type(more) is More:
            self._close_sources(context, more, outcome, now)

    def _close_sources(self, context: Context, more: More, outcome: str, now: float) -> None:
        raise NotImplementedError  # the layer of sources does

    def _release_grant(self, execution: Execution, now: float) -> None:
        if execution.grant is not None:
            grant, execution.grant = execution.grant, None
            self.closings.extend(self.runtime.limits.release(grant, now))
