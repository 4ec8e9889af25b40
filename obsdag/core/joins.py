"""Joins, and what becomes of a context that nothing holds (SEMANTICS C5, C6, E8, T15).

A join fires when the maps of the branches that meet at it have ended, every living child of these waits at it, and its
upstreams outside of them are completed for the parent. A child that waits at a join lets go of its parent, so that
"nothing else can come" is a fact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from obsdag.context import Context
from obsdag.core.base import alive, more_of
from obsdag.core.progress import Progress
from obsdag.core.records import Execution, Lend, More, Stall
from obsdag.errors import TaskError

if TYPE_CHECKING:
    from obsdag.tasks.base import Task

__all__ = ["Joins"]


class Joins(Progress):
    """Parked children, fired joins, branches that come to nothing."""

    __slots__ = ()

    def _fires(self, context: Context, index: int) -> bool:
        """Whether the join is about to be called, or is, with the children of the context."""
        lends = context._more.lends if context._more is not None else None
        return any(lend.joining == index for lend in (lends or {}).values())

    def _touch_lends(self, parent: Context) -> None:
        """Something was completed for the parent: a join may have waited for it."""
        if parent._more is not None and parent._more.lends:
            self._touched.extend(parent._more.lends.values())

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
        child._executions = None  # many may wait for long: 56 bytes each
        self.at_joins += 1
        if join not in lend.arrived:
            self.joins_pending[join] += 1
            if not lend.arrived:
                lend.first_arrival = now
        lend.arrived[join] = lend.arrived.get(join, 0) + 1
        lend.parent._holds -= 1
        lend.latest = child._maker
        self._restate(child, now)
        self._touched.append(lend)
        self._work.append(lend.parent)
        if (tell := self.facts.join_waiting) is not None:
            tell(child, self.plan.tasks[join], now)

    def _try_join(self, lend: Lend, now: float) -> bool:
        """Fires the join of a lent branch if everything is there; True if it fired, failed the parent, or is firing."""
        parent = lend.parent
        if lend.joining >= 0:
            return True
        if lend.pulling or not alive(parent) or not lend.keeps:
            return False
        if (more_of(parent).lends or {}).get(lend.index) is not lend:  # it was handed back
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
            if lend.joining >= 0:
                return []
            target = None if lend.pulling else self._join_for(lend)
            if target != join and (lend.pulling or lend.living or target is not None):
                return []
            if target is not None:  # else its children went elsewhere: it is not handed back, and brings nothing here
                meeting.append(lend)
        return meeting

    def _tell_released(self, parent: Context, branches: list[Lend], join: int, now: float) -> None:
        if (tell := self.facts.join_released) is not None:
            arrived = sum(branch.arrived.get(join, 0) for branch in branches)
            first = min((branch.first_arrival for branch in branches if branch.arrived), default=now)
            tell(parent, self.plan.tasks[join], arrived, now - first, now)
        latest = [branch.latest for branch in branches if branch.latest is not None]
        if self.recording and latest:
            more = more_of(parent)
            if more.released is None:
                more.released = {}
            more.released[join] = max(latest, key=lambda execution: execution.ended)

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
        """What is above a join and in none of the lent branches: a map still to come brings it children, too."""
        inside = 0
        for lend in branches:
            inside |= lend.mask | self.plan.bit[lend.index]
        return self.plan.ancestors[join] & ~inside

    def _fail_by_children(self, parent: Context, branches: list[Lend], failed: int, task: Task, now: float) -> None:
        total = sum(len(branch.children) for branch in branches)
        cause = next((branch.failed for branch in branches if branch.failed is not None), None)
        error = TaskError(f"join {task.id!r}: {failed} of {total} children failed, the first with {cause!r}")
        error.__cause__ = cause
        self.fail_context(parent, error, Execution.begun(parent, self.plan.index[task.id], 1, now, -1), now)

    def join_children(self, parent: Context, index: int) -> tuple[list[Context], list[Context], list[Context]]:
        """For the shell: the children that the join is called with, those that failed, and those that were dropped.

        Each in order of creation (T15).
        """
        branches = self._joining(parent, index)
        children = [child for lend in branches for child in lend.children]
        if len(branches) > 1 or any(not lend.mapped for lend in branches):  # a map's enter in order of creation
            mine = set(children)
            children = [child for child in parent._children or () if child in mine]
        arrived = [child for child in children if alive(child)]
        failed = [child for child in children if child._outcome == "failed"]
        dropped = [child for child in children if "dropped" in (child._outcome, more_of(child).pending_end)]
        return arrived, failed, dropped

    def _joining(self, parent: Context, index: int) -> list[Lend]:
        more = parent._more
        return [lend for lend in ((more.lends or {}).values() if more is not None else ()) if lend.joining == index]

    def _joined(self, parent: Context, index: int, returned: list[Context], now: float) -> None:
        """The join succeeded: its children are merged, except those that it returned, which go on (T15)."""
        going_on = {id(context) for context in returned}
        branches = self._joining(parent, index)
        for child in [child for lend in branches for child in lend.children]:
            if alive(child):
                if id(child) in going_on:
                    self._unarrive(child, now)
                else:
                    self._end(child, "merged", now)
        for lend in branches:
            if parent._outcome is None:
                self._close_lend(parent, lend, index, now, returned=parent in returned)
            lend.children.clear()

    def _leave_line(self, more: More) -> None:
        """A child that waits at a join has something else to do: it holds its parent again."""
        assert more.lend is not None
        more.arrived = False
        self._leave_join(more.lend, more.arrived_at)
        more.lend.parent._holds += 1

    def _unarrive(self, child: Context, now: float, leaves: bool = True) -> None:
        """A child is returned while it waits at a join: it `leaves` its branch if the join is completed for it, else it
        comes back there when nothing else of it lives.
        """
        more = more_of(child)
        assert more.lend is not None
        if more.arrived:
            self._leave_line(more)
        more.lend.living -= leaves
        self._touch_lends(more.lend.parent)  # other branches that meet there may have waited for this one only
        if leaves:
            more.lend.children.remove(child)  # kept, for there is a join below
            more.arrived_at = -1
            more.lend = None
            self._recompute_parked(child)
            self._offer(child, self._due_joins(child), now)

    # --- the last hold is lost (C6)

    def _settle_all(self, now: float) -> None:
        if self._settling:
            return
        while self._work or self._touched or self._grants:
            while self._touched:
                self._try_join(self._touched.pop(), now)
            super()._settle_all(now)
            if not self._touched:
                self.take_grants(now)  # last: who ends in this transition, too, is given no permit
        self.cause = None
        if self.debug:
            self.check_transition()

    def _settle(self, context: Context, now: float) -> None:
        more = more_of(context)
        if more.arrived:
            return
        if more.arrived_at >= 0 and more.lend is not None and self._awaits(more):
            self._arrive(context, more.lend, now)
        elif more.lends:
            self._settle_lends(context, more.lends, now)
        else:
            self._stall(context, self._diagnose(context), now)

    def _awaits(self, more: More) -> bool:
        """Whether a child at a join is waited for: its branch was not handed back, and nothing of its own lives."""
        lend = more.lend
        assert lend is not None
        lends = more_of(lend.parent).lends or {}
        own = (more.lends or {}).values()
        return alive(lend.parent) and lends.get(lend.index) is lend and not any(each.living for each in own)

    def _close_lend(self, parent: Context, lend: Lend, last: int, now: float, returned: bool = True) -> None:
        """Nobody will join those that wait at a join of the branch now."""
        super()._close_lend(parent, lend, last, now, returned)
        self._join_no_more(lend, now)

    def _join_no_more(self, lend: Lend, now: float) -> None:
        """The branch was handed back, or its parent has ended: who waits at a join of it is evaluated again (E8)."""
        for child in lend.children if lend.arrived else ():
            if alive(child) and more_of(child).arrived:
                self._unarrive(child, now, leaves=False)
                self._work.append(child)

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
            source = Execution.begun(context, failed.index, 1, now, -1)
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
        lends = (more_of(parent).lends or {}).values()
        waiting = [child for each in lends for child in each.children if alive(child)]
        self._stall(parent, Stall(parent, task, missing, reason), now)
        for child in waiting:
            self._stall(child, Stall(child, task, missing, reason), now)
