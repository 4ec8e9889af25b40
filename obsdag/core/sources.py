"""Loops, maps and joins (SEMANTICS C5, C6, C10, E16, T14, T15).

A loop or map is a `Pull`: the shell holds its generator, the core decides when the next item is asked for. Between
items its marker (a `LoopContext`) stands in the loop lane, or among `rooms` when `max_live_contexts` leaves no room;
the context of the pull is held.

A join fires when its map has ended, every living child of the branch waits at it, and the join's upstreams outside the
branch are completed for the parent. A child that waits at a join lets go of its parent, so that "nothing else can
come" is a fact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from obsdag.context import Context, LoopContext
from obsdag.core.base import _DISCARDED, more_of
from obsdag.core.progress import Progress
from obsdag.core.queue import IDLE, LOOP
from obsdag.core.records import Execution, Lend, More, Pull, Stall
from obsdag.errors import TaskError

if TYPE_CHECKING:
    from obsdag.tasks.base import Task

__all__ = ["Sources"]


class Sources(Progress):
    """Pulled items, parked children, fired joins."""

    # --- room (E16)

    @property
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
        while self.rooms and self.has_room:
            marker = self.rooms.pop(0)
            if self._pullable(marker):
                self._leave_room(marker)
                if self._permitted(marker, now):
                    return marker
        while lane:
            marker = lane.popleft()
            if not self._pullable(marker):
                continue
            if not self.has_room:
                more_of(marker.pull.context).room |= self.plan.bit[marker.pull.index]
                self.rooms.append(marker)
                self._restate(marker.pull.context, now)
            elif self._permitted(marker, now):
                return marker
        return self._deepest(now) if self.rooms and not self.moving() else None

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
        more = more_of(context)
        pull = more.pulls.get(index) if more.pulls else None
        if pull is None:
            super()._permit_for(context, index, now)
        else:
            more.source |= self.plan.bit[index]
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
        execution = Execution(context, pull.task, index, 1, now, worker)
        execution.lane = 2
        execution.released_by = pull.execution
        execution.grant, pull.grant = pull.grant, None
        self.reserved += 1
        self._note_started(execution, now)
        if self.facts.visit_started is not None:
            self.facts.visit_started(context, worker, LOOP, now - pull.queued_at, now)
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
        self._settle_all(now)

    def _admit_item(self, execution: Execution, pull: Pull, item: Context, now: float) -> None:
        if item is pull.context:
            self._complete(item, pull.index, now)
        elif item._run is self:
            self._complete_other(item, execution, now)
        elif item._outcome is None and not self._orphaned(item):
            if pull.lend is not None and item._parent is pull.context:
                self._join_lend(item, pull.lend)
            self._enter_made(item, execution, now)
        if self.facts.loop_item is not None:
            self.facts.loop_item(item, pull.task, now)

    def _wait_for_turn(self, pull: Pull, now: float) -> None:
        context, bit = pull.context, self.plan.bit[pull.index]
        more = more_of(context)
        more.source |= bit
        context._parked |= bit
        pull.state = "waiting"
        pull.queued_at = now
        self.queue.loop.append(pull.marker)
        if context._place == IDLE:
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
                self._touched.append(pull.lend)
                self._work.append(context)
            elif not context._done & self.plan.bit[pull.index]:
                self._stop_branches(context, now)
                self._collect(context, *(("split", "replaced") if pull.items else ("dropped", "emptied")), now)
            self._schedule(context, now)
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
            more = more_of(context)
            if more.lends is not None:
                more.lends.pop(lend.index, None)
            context._done &= ~self.plan.bit[lend.index]
            self._recompute_parked(context)

    def leave_pull(self, pull: Pull, worker: int, busy_s: float, now: float) -> None:
        """A worker is done with one item of a loop or map."""
        if self.facts.visit_finished is not None:
            self.facts.visit_finished(pull.context, worker, busy_s, now)

    def _drop_pull(self, pull: Pull) -> None:
        more = more_of(pull.context)
        assert more.pulls is not None
        del more.pulls[pull.index]
        pull.state = "closed"
        pull.context._holds -= 1

    def thaw(self, context: Context, now: float) -> None:
        """Ends the freeze; pulls that were passed over meanwhile get their place in the loop lane again."""
        more = context._more
        if more is not None and more.pulls and context in self._freezes:
            for pull in more.pulls.values():
                if pull.state == "frozen":
                    pull.state = "waiting"
                    self.queue.loop.append(pull.marker)
        super().thaw(context, now)

    def _close_sources(self, context: Context, more: More, outcome: str, now: float) -> None:
        """The context ended: its pulls are closed (the shell closes the generators), its branch is told."""
        for pull in (more.pulls or {}).values():
            pull.state = "closed"
            context._holds -= 1
            self.closed_pulls.append(pull)
            self.dirty = True
        more.pulls = None
        more.source = more.room = 0
        lend = more.lend
        if lend is None:
            return
        lend.living -= 1
        lend.outcomes[outcome] = lend.outcomes.get(outcome, 0) + 1
        if outcome == "failed" and lend.failed is None:
            lend.failed = context._error
        if more.arrived:
            self._leave_join(lend, more.arrived_at)
        self._touched.append(lend)
        parent = lend.parent
        if not lend.keeps and parent._children and self.plan.maps & self.plan.bit[lend.index]:
            parent._children.pop(context, None)  # a map without a join stays bounded

    # --- joins (T15)

    def _leave_join(self, lend: Lend, join: int) -> None:
        self.at_joins -= 1
        lend.arrived[join] -= 1
        if not lend.arrived[join]:
            del lend.arrived[join]
            self.joins_pending[join] -= 1

    def _arrive(self, child: Context, lend: Lend, now: float) -> None:
        """Nothing of the child lives but that the join is ready on it: it waits there and lets go of its parent."""
        more = more_of(child)
        join = more.arrived_at
        more.arrived = True
        self.at_joins += 1
        if join not in lend.arrived:
            self.joins_pending[join] += 1
            if not lend.arrived:
                lend.first_arrival = now
        lend.arrived[join] = lend.arrived.get(join, 0) + 1
        lend.parent._holds -= 1
        self._restate(child, now)
        self._touched.append(lend)
        self._work.append(lend.parent)
        if self.facts.join_waiting is not None:
            self.facts.join_waiting(child, self.plan.tasks[join], now)

    def _try_join(self, lend: Lend, now: float) -> bool:
        """Fires the join of a lent branch if everything is there; True if it fired, failed the parent, or is firing."""
        parent = lend.parent
        if lend.joining >= 0:
            return True
        if lend.pulling or parent._outcome is not None or parent._state == _DISCARDED or not lend.keeps:
            return False
        join = self._join_for(lend)
        branches = self._branches_at(parent, join) if join is not None else []
        if join is None or not branches or self._outside(branches, join) & ~parent._done:
            return False
        task = self.plan.tasks[join]
        failed = sum(branch.outcomes.get("failed", 0) for branch in branches)
        if failed and getattr(task, "on_child_failure", "fail") == "fail":
            self._fail_by_children(parent, branches, failed, task, now)
            return True
        for branch in branches:
            branch.joining = join
        parent._ready |= self.plan.bit[join]
        self._tell_released(parent, branches, join, now)
        self._schedule(parent, now)
        return True

    def _branches_at(self, parent: Context, join: int) -> list[Lend]:
        """The lent branches of a parent that meet at a join; none while one of them is not there yet (T15)."""
        meeting = []
        for lend in (more_of(parent).lends or {}).values():
            if not lend.mask & self.plan.bit[join]:
                continue
            target = None if lend.pulling else self._join_for(lend)
            if target != join and (lend.pulling or lend.living or target is not None):
                return []
            meeting.append(lend)
        return meeting

    def _tell_released(self, parent: Context, branches: list[Lend], join: int, now: float) -> None:
        if self.facts.join_released is not None:
            arrived = sum(branch.arrived.get(join, 0) for branch in branches)
            first = min((branch.first_arrival for branch in branches if branch.arrived), default=now)
            self.facts.join_released(parent, self.plan.tasks[join], arrived, now - first, now)
        if self.recording and self.cause is not None:
            released = more_of(parent).released
            if released is None:
                released = more_of(parent).released = {}
            released[join] = self.cause

    def _join_for(self, lend: Lend) -> int | None:
        """The join at which all living children wait; with none living, none gone elsewhere, the branch's own."""
        if lend.living:
            join = next(iter(lend.arrived), None)
            return join if join is not None and lend.arrived[join] == lend.living else None
        if lend.outcomes.get("output") or lend.outcomes.get("split"):
            return None
        return self._join_below(lend.index)

    def _join_below(self, index: int) -> int | None:
        """The first join below task `index` that is not the join of another map in between."""
        plan, depth = self.plan, {index: 1}
        below = plan.descendants[index]
        for task in range(index + 1, len(plan.tasks)):
            if below & plan.bit[task]:
                here = max((depth[up] for up in plan.up_list[task] if up in depth), default=1)
                if plan.joins & plan.bit[task]:
                    if here == 1:
                        return task
                    here -= 1
                depth[task] = here + (1 if plan.maps & plan.bit[task] else 0)
        return None

    def _outside(self, branches: list[Lend], join: int) -> int:
        """The upstreams of a join that are in none of the lent branches."""
        inside = 0
        for lend in branches:
            inside |= lend.mask | self.plan.bit[lend.index]
        return self.plan.up[join] & ~inside

    def _fail_by_children(self, parent: Context, branches: list[Lend], failed: int, task: Task, now: float) -> None:
        total = sum(len(branch.children) for branch in branches)
        cause = next((branch.failed for branch in branches if branch.failed is not None), None)
        error = TaskError(f"join {task.id!r}: {failed} of {total} children failed, the first with {cause!r}")
        error.__cause__ = cause
        self.fail_context(parent, error, Execution(parent, task, self.plan.index[task.id], 1, now, -1), now)

    def join_children(self, parent: Context, index: int) -> tuple[list[Context], list[Context], list[Context]]:
        """For the shell: the children that the join is called with, those that failed, and those that were dropped.

        Each in order of creation (T15).
        """
        branches = self._joining(parent, index)
        children = [child for lend in branches for child in lend.children]
        if len(branches) > 1 or any(not lend.mapped for lend in branches):  # a map's enter in order of creation
            mine = set(children)
            children = [child for child in parent._children or () if child in mine]
        arrived = [child for child in children if child._outcome is None]
        failed = [child for child in children if child._outcome == "failed"]
        dropped = [child for child in children if child._outcome == "dropped"]
        return arrived, failed, dropped

    def _joining(self, parent: Context, index: int) -> list[Lend]:
        more = parent._more
        return [lend for lend in ((more.lends or {}).values() if more is not None else ()) if lend.joining == index]

    def _joined(self, parent: Context, index: int, returned: list[Context], now: float) -> None:
        """The join succeeded: its children are merged, except those that it returned, which go on (T15)."""
        going_on = {id(context) for context in returned}
        branches = self._joining(parent, index)
        for child in [child for lend in branches for child in lend.children]:
            if child._outcome is None:
                if id(child) in going_on:
                    self._unarrive(child, now)
                else:
                    self._end(child, "merged", now)
        for lend in branches:
            if parent._outcome is None:
                self._close_lend(parent, lend, index, now)
            lend.children.clear()

    def _unarrive(self, child: Context, now: float) -> None:
        more = more_of(child)
        lend = more.lend
        if more.arrived and lend is not None:
            more.arrived = False
            self._leave_join(lend, more.arrived_at)
            lend.living -= 1
            lend.parent._holds += 1
        more.arrived_at = -1
        more.lend = None
        self._recompute_parked(child)

    # --- contexts that were in the run already

    def _complete_other(self, other: Context, execution: Execution, now: float) -> bool:
        """A task returned a context that was in the run already; True if a branch was handed back to it (C5)."""
        context, index = execution.context, execution.index
        lend = self._lend_between(other, context)
        if other._outcome is not None or other._state == _DISCARDED:
            return lend is not None and bool(other._done & self.plan.bit[index])
        if lend is not None and other._more is not None and other._more.lends and lend in other._more.lends.values():
            self._close_lend(other, lend, index, now)
            self._schedule(other, now)
            return True
        more = other._more
        kept_at = more.kept_at if more is not None else -1
        if more is not None and more.arrived_at >= 0:
            self._unarrive(other, now)
        if kept_at >= 0 and more is not None:
            more.kept_at = -1
            self._complete(other, kept_at, now)
        if other._outcome is None and not other._done & self.plan.bit[index]:
            other._ready &= ~self.plan.bit[index]
            self._complete(other, index, now)
        if kept_at >= 0:
            self.thaw(other, now)
        self._schedule(other, now)
        return lend is not None or self._is_ancestor(other, context)

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

    # --- the last hold is lost (C6)

    def _settle_all(self, now: float) -> None:
        if self._settling:
            return
        while self._work or self._touched or self._grants:
            self.take_grants(now)
            while self._touched:
                self._try_join(self._touched.pop(), now)
            super()._settle_all(now)
        self.cause = None
        if self.debug:
            self.check(deep=True)

    def _settle(self, context: Context, now: float) -> None:
        more = context._more
        if more is not None:
            if more.arrived:
                return
            if more.arrived_at >= 0 and more.lend is not None and more.lend.parent._outcome is None:
                self._arrive(context, more.lend, now)
                return
            if more.lends:
                self._settle_lends(context, more.lends, now)
                return
        self._stall(context, self._diagnose(context), now)

    def _settle_lends(self, context: Context, lends: dict[int, Lend], now: float) -> None:
        """No child lives that still moves: a join fires, or the branch was not handed back, or it never will be."""
        fired = [self._try_join(lend, now) for lend in list(lends.values())]  # every one, not up to the first
        if any(fired) or context._outcome is not None:
            return
        stuck = next((lend for lend in lends.values() if lend.living), None)
        if stuck is not None:
            self._stall_join(context, stuck, now)
            return
        ended: dict[str, int] = {}
        for lend in lends.values():
            for outcome, number in lend.outcomes.items():
                ended[outcome] = ended.get(outcome, 0) + number
        failed = next((lend for lend in lends.values() if lend.failed is not None), None)
        if ended.get("output") or ended.get("split"):
            self._collect(context, "split", "spread", now)
        elif failed is not None:
            task = self.plan.tasks[failed.index]
            error = TaskError(f"the branch lent at {task.id!r} came to nothing: {failed.failed!r}")
            error.__cause__ = failed.failed
            source = Execution(context, task, failed.index, 1, now, -1)
            self.fail_context(context, error, source, now)
        elif ended.get("stalled"):
            self._stall(context, self._diagnose(context), now)
        else:
            self._collect(context, "dropped", "emptied", now)

    def _stall_join(self, parent: Context, lend: Lend, now: float) -> None:
        """Children wait at a join that can never fire: all of them and the parent are stalled, and named (E8)."""
        plan = self.plan
        join = next(iter(lend.arrived), plan.sink)
        task = plan.tasks[join].id
        missing = tuple(plan.names(self._outside([lend], join) & ~parent._done))
        elsewhere = [plan.tasks[other].id for other in lend.arrived if other != join]
        if missing:
            reason = "the join waits for upstreams of its parent that will never complete"
        else:
            reason = f"children of one branch wait at different joins: {', '.join([task, *elsewhere])}"
        waiting = [child for child in lend.children if child._outcome is None]
        self._stall(parent, Stall(parent, task, missing, reason), now)
        for child in waiting:
            if child._outcome is None:
                self._stall(child, Stall(child, task, missing, reason), now)
