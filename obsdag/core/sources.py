"""Loops and maps, and contexts that were in the run already when a task returned them (SEMANTICS C5, C10, E16, T14).

A loop or map is a `Pull`: the shell holds its generator, the core decides when the next item is asked for. Between
items its marker (a `LoopContext`) stands in the loop lane, or among `rooms` when `max_live_contexts` leaves no room;
the context of the pull is held.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from obsdag.context import Context, LoopContext
from obsdag.core.base import _DISCARDED, more_of
from obsdag.core.joins import Joins
from obsdag.core.queue import LOOP, QUEUED
from obsdag.core.records import Execution, Lend, More, Pull
from obsdag.plan import indices

if TYPE_CHECKING:
    pass

__all__ = ["Sources"]


class Sources(Joins):
    """Pulled items; contexts that are returned again."""

    __slots__ = ()

    # --- room (E16)

    def has_room(self) -> bool:
        """Whether `max_live_contexts` admits another input or item.

        Contexts that wait at a join take no room; outputs of a stream that nobody has taken yet do (E3).
        """
        return self.living - self.at_joins - self.discarded + self.reserved + self.buffered < self.max_live

    # --- pulls

    def open_pull(self, execution: Execution) -> Pull:
        """A loop or map begins on the execution's context; its first item may be asked for at once."""
        context, index = execution.context, execution.index
        pull = Pull(context, execution.task, index)
        pull.execution = execution
        if self.resumed:
            pull.items = self.resumed.pop((context, index), 0)
        pull.marker = marker = LoopContext(None, name=f"loop:{execution.task.id}")
        marker.pull = pull
        marker._ready = 0
        more = more_of(context)
        if more.pulls is None:
            more.pulls = {}
        more.pulls[index] = pull
        context._holds += 1
        if execution.task.shape == "map":
            pull.lend = self._lend(context, index, self.clock())
            pull.lend.pulling = pull.lend.mapped = True
        self.reserved += 1
        return pull

    def next_pull(self, now: float) -> LoopContext | None:
        """The marker of the pull whose turn it is, if there is room for its item; else None."""
        lane = self.queue.loop
        while self.rooms and self.has_room():
            marker = self.rooms.pop(0)
            if self._pullable(marker):
                self._leave_room(marker)
                if self._permitted(marker, now):
                    return marker
        while lane:
            marker = lane.popleft()
            if not self._pullable(marker):
                continue
            if not self.has_room():
                self._wait_for_room(marker, now)
            elif self._permitted(marker, now):
                return marker
        return self._deepest(now) if self.rooms and not self.moving() else None

    def _wait_for_room(self, marker: LoopContext, now: float) -> None:
        """It keeps no permit from others meanwhile: those that take the room may wait for just that."""
        context, index = marker.pull.context, marker.pull.index
        self._give_back(context, index, now)
        more = more_of(context)
        more.room |= self.plan.bit[index]
        self.rooms.append(marker)
        self._restate(context, now)

    def _permitted(self, marker: LoopContext, now: float) -> bool:
        """Each item takes the task's permits anew (T7, T14); without them the marker comes back when they are there."""
        pull = marker.pull
        if not self.limits[pull.index]:
            return True
        admitted, pull.grant = self._admit(pull.context, pull.index, now)
        if not admitted:
            self._restate(pull.context, now)
        return admitted

    def _permit_for(self, context: Context, index: int, now: float) -> None:
        """The permits that a task or a pull waited for are there."""
        more = context._more
        pull = more.pulls.get(index) if more is not None and more.pulls else None
        if pull is None:
            super()._permit_for(context, index, now)
        else:
            more_of(context).source |= self.plan.bit[index]
            context._parked |= self.plan.bit[index]
            self.queue.loop.appendleft(pull.marker)
            self._restate(context, now)

    def _pullable(self, marker: LoopContext) -> bool:
        pull = marker.pull
        if pull.state == "closed":
            return False
        if pull.context in self._freezes:
            pull.state = "frozen"
            return False
        return True

    def _leave_room(self, marker: LoopContext) -> None:
        more = more_of(marker.pull.context)
        more.room &= ~self.plan.bit[marker.pull.index]

    def _deepest(self, now: float) -> LoopContext | None:
        """Nothing else can go on: the deepest waiting map gets a place, so that nested maps cannot lock each other
        out.
        """
        waiting = [marker for marker in self.rooms if self._pullable(marker)]
        self.rooms[:] = waiting
        if not waiting:
            return None
        marker = max(waiting, key=lambda each: each.pull.context.depth)
        self.rooms.remove(marker)
        self._leave_room(marker)
        return marker if self._permitted(marker, now) else None

    def begin_pull(self, marker: LoopContext, now: float, worker: int) -> Execution:
        """An execution that asks a loop or map for its next item."""
        pull = marker.pull
        context, index = pull.context, pull.index
        more = more_of(context)
        more.source &= ~self.plan.bit[index]
        self._recompute_parked(context)
        execution = self.begun(context, index, 1, now, worker)
        execution.lane = 2
        execution.released_by = pull.execution
        execution.grant, pull.grant = pull.grant, None
        self.reserved += 1
        self._note_started(execution, now)
        self._begin_visit(context, worker, LOOP, now - pull.queued_at, now)
        return execution

    def pulled(self, execution: Execution, pull: Pull, items: Iterable[Context], now: float) -> None:
        """A loop or map gave items: they enter, and its marker goes to the end of the loop lane."""
        context = pull.context
        self.reserved -= 1
        self.cause = execution
        self._end_execution(execution, "success", None, now)
        if pull.state == "closed":
            self._settle_all(now)
            return
        for item in items:
            pull.items += 1
            self._admit_item(execution, pull, item, now)
        if context._outcome is None and pull.state != "closed":
            self._wait_for_turn(pull, now)
        self._schedule(context, now)  # it may have been among the items
        self._settle_all(now)

    def _admit_item(self, execution: Execution, pull: Pull, item: Context, now: float) -> None:
        if item is pull.context:
            self._complete(item, pull.index, now)
            self._touch_lends(item)
        elif item._run is self:
            self._complete_other(item, execution, now)
        elif item._outcome is None and not self._orphaned(item):
            if pull.lend is not None and item._parent is pull.context:
                self._join_lend(item, pull.lend)
            self._enter_made(item, execution, now)
        if (tell := self.facts.loop_item) is not None:
            tell(item, pull.task, now)

    def _wait_for_turn(self, pull: Pull, now: float) -> None:
        context, bit = pull.context, self.plan.bit[pull.index]
        more = more_of(context)
        more.source |= bit
        context._parked |= bit
        pull.state = "waiting"
        pull.queued_at = now
        self.queue.loop.append(pull.marker)
        self._restate(context, now)

    def pull_ended(self, execution: Execution, pull: Pull, now: float) -> None:
        """The generator ended: a loop's input is split (or dropped if nothing came), a map waits for its children."""
        context = pull.context
        self.reserved -= 1
        self.cause = execution
        self._end_execution(execution, "success", None, now)
        if pull.state != "closed":
            self._drop_pull(pull)
            if pull.lend is not None:
                pull.lend.pulling = False
                self._touch_lends(context)
                self._work.append(context)
            elif not context._done & self.plan.bit[pull.index]:
                self._stop_branches(context, now)
                self._collect(context, *(("split", "replaced") if pull.items else ("dropped", "emptied")), now)
            self._schedule(context, now)
            self._restate(context, now)  # in the queue it is not running any more
        self._settle_all(now)

    def abort_pull(self, pull: Pull) -> None:
        """A pull broke before `fail` is called for its execution; a map that has no child yet can be tried again
        (T14).
        """
        self.reserved -= 1
        if pull.state == "closed":
            return
        self._drop_pull(pull)
        lend, context = pull.lend, pull.context
        if lend is not None and not pull.items:
            lends = more_of(context).lends
            assert lends is not None  # it opened one
            lends.pop(lend.index, None)
            context._done &= ~self.plan.bit[lend.index]
            self._recompute_parked(context)
            self._offer_lent(context, context._done & lend.mask, self.plan.bit[self.plan.sink], self.clock())

    def leave_pull(self, pull: Pull, worker: int, busy_s: float, now: float) -> None:
        """A worker is done with one item of a loop or map."""
        self._end_visit(pull.context, worker, busy_s, now)

    def _drop_pull(self, pull: Pull) -> None:
        more = more_of(pull.context)
        assert more.pulls is not None
        del more.pulls[pull.index]
        pull.state = "closed"
        pull.context._holds -= 1

    def _end_freeze(self, context: Context, now: float) -> None:
        """Pulls that were passed over meanwhile get their place in the loop lane again."""
        more = context._more
        if more is not None and more.pulls:
            for pull in more.pulls.values():
                if pull.state == "frozen":
                    pull.state = "waiting"
                    self._leave_room(pull.marker)
                    self.queue.loop.append(pull.marker)
        super()._end_freeze(context, now)

    def _close_sources(self, context: Context, more: More, outcome: str, now: float) -> None:
        """The context ended: its pulls are closed (the shell closes the generators), its branch is told."""
        for pull in (more.pulls or {}).values():
            pull.state = "closed"
            context._holds -= 1
            self.closed_pulls.append(pull)
            self.dirty = True
        for each in (more.lends or {}).values():
            self._join_no_more(each, now)
        more.pulls = None
        more.source = more.room = 0
        lend = more.lend
        if lend is None:
            return
        lend.living -= 1
        latest = self.cause if self.cause is not None else context._maker
        lend.latest = latest if latest is not None else lend.latest
        lend.outcomes[outcome] = lend.outcomes.get(outcome, 0) + 1
        if outcome == "failed" and lend.failed is None:
            lend.failed = context._error
        if more.arrived:
            self._leave_join(lend, more.arrived_at)
        self._touch_lends(lend.parent)

    # --- contexts that were in the run already

    def _complete_other(self, other: Context, execution: Execution, now: float) -> bool:
        """A task returned a context that was in the run already; True if a branch was handed back to it (C5)."""
        context, index = execution.context, execution.index
        self._touch_lends(other)
        lend = self._lend_between(other, context)
        if other._outcome is not None or other._state == _DISCARDED:
            done = other._done & ~(other._more.skipped if other._more is not None else 0)
            return lend is not None and bool(done & self.plan.bit[index])
        more = other._more
        kept = more.kept if more is not None else 0
        returns = lend is not None and more is not None and more.lends is not None and lend in more.lends.values()
        if kept:
            more_of(other).kept = 0
            other._done |= kept
            for task in indices(kept):
                if other._outcome is None:
                    self._release_below(other, task, now)
        if more is not None and more.arrived_at >= 0 and not returns and other._outcome is None:
            self._unarrive(other, now, leaves=more.arrived_at == index)  # what was kept may have made the join ready
        if lend is not None and returns and other._outcome is None:
            self._close_lend(other, lend, index, now)
        elif other._outcome is None and not other._done & self.plan.bit[index] and not self._fires(other, index):
            self._wait_no_more(other, index, now)
            other._ready &= ~self.plan.bit[index]
            self._complete(other, index, now)
        if kept and other._outcome is None and other in self._freezes:
            self._end_freeze(other, now)  # what comes of that is settled with the rest
        self._place_anew(other, now)
        return lend is not None or self._is_ancestor(other, context)

    def _place_anew(self, other: Context, now: float) -> None:
        """What was ready may have been completed: then it waits for no worker any more."""
        if other._place == QUEUED and not other._ready:
            self.queue.forget(other)
        self._schedule(other, now)
        if (tell := self.facts.context_changed) is not None:
            tell(other, now)

    def _lend_between(self, ancestor: Context, context: Context) -> Lend | None:
        """The lent branch of `ancestor` that `context` descends through, None if it does not."""
        child: Context | None = context
        while child is not None and child._parent is not ancestor:
            child = child._parent
        return child._more.lend if child is not None and child._more is not None else None

    def _is_ancestor(self, ancestor: Context, context: Context) -> bool:
        parent = context._parent
        while parent is not None and parent is not ancestor:
            parent = parent._parent
        return parent is not None
