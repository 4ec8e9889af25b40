"""Lending a branch to children, and getting it back (SEMANTICS C5).

While a branch is lent, what is below the lending task is parked on the context. When a child hands it back, what was
between is completed, and what has all its upstreams then is offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from obsdag.core.base import more_of
from obsdag.core.queue import QUEUED
from obsdag.core.records import Lend
from obsdag.core.waits import Waits
from obsdag.plan import indices

if TYPE_CHECKING:
    from obsdag.context import Context

__all__ = ["Lending"]


class Lending(Waits):
    """Open branches of a context, by the task that lent them."""

    __slots__ = ()

    def _lend(self, parent: Context, index: int, now: float) -> Lend:
        """The open lent branch of `parent` at task `index`, opened now if it is not."""
        more = more_of(parent)
        if more.lends is None:
            more.lends = {}
        lend = more.lends.get(index)
        if lend is None:
            mask = self.plan.descendants[index]
            lend = more.lends[index] = Lend(parent, index, mask, bool(mask & self.plan.joins))
            parent._parked |= mask
            for other in more.lends.values():
                if other.joining >= 0:
                    mask &= ~self.plan.bit[other.joining]  # it is called all the same
            parent._ready &= ~mask
            if more.arrived_at >= 0 and mask & self.plan.bit[more.arrived_at]:
                more.arrived_at = -1  # the join that was ready on it is the children's business now
            if parent._place == QUEUED and not parent._ready:
                self.queue.forget(parent)
            more.plain = False
            self._ask_no_more(parent, mask, now)
        parent._done |= self.plan.bit[index]
        return lend

    def _ask_no_more(self, parent: Context, mask: int, now: float) -> None:
        """Tasks that were lent keep no permit from the children, which may need it (T7)."""
        more = more_of(parent)
        for wait in more.each_wait():
            if wait.request is not None and mask & self.plan.bit[wait.index]:
                if more.pulls and wait.index in more.pulls:
                    continue  # an open map or loop goes on
                self._wait_no_more(parent, wait.index, now)

    def _due_joins(self, context: Context) -> int:
        """Joins whose turn has come beside the one at which the context was to wait."""
        plan = self.plan
        joins = plan.joins & ~(context._done | context._running | context._parked | context._ready)
        return sum(plan.bit[join] for join in indices(joins) if not plan.up[join] & ~context._done)

    def _late_sink(self, context: Context, now: float) -> None:
        """A join's parent is given out only when its result has said whether that goes on (T3)."""
        plan = self.plan
        if not plan.up[plan.sink] & ~context._done and not plan.bit[plan.sink] & context._parked:
            self._output(context, now)

    def _join_lend(self, child: Context, lend: Lend) -> None:
        """Makes a living child of the lending context part of the branch."""
        more_of(child).lend = lend
        lend.living += 1
        if lend.keeps:
            lend.children.append(child)

    def _close_lend(self, parent: Context, lend: Lend, last: int, now: float, returned: bool = True) -> None:
        """The branch is handed back at task `last`: it, the lending task and those between are completed (C5).

        Not `returned` (by a join): what was between is completed, and its own result says what becomes of the parent.
        """
        plan, more = self.plan, more_of(parent)
        assert more.lends is not None
        more.lends.pop(lend.index, None)
        between = plan.descendants[lend.index] & plan.ancestors[last]
        newly = between | plan.bit[lend.index] | (plan.bit[last] if returned else 0)
        for other in more.lends.values():
            if other.joining >= 0:
                newly &= ~plan.bit[other.joining]  # it is called all the same
        if newly & plan.bit[last]:
            self._wait_no_more(parent, last, now)
        parent._done |= newly
        parent._ready &= ~newly
        if more.arrived_at >= 0 and newly & plan.bit[more.arrived_at]:
            more.arrived_at = -1  # the join of its own branch was among them; another may be due
        newly |= parent._done & lend.mask  # what was completed meanwhile released nothing below it
        self._recompute_parked(parent)
        self._offer_lent(parent, newly, plan.bit[last] | (0 if returned else plan.bit[plan.sink]), now)

    def _offer_lent(self, context: Context, done: int, but: int, now: float) -> None:
        """What was lent is the context's own again: offers what is ready below the tasks in `done`, `but` not these."""
        ready, more = 0, more_of(context)
        if more.lend is not None and more.arrived_at < 0:
            ready = self._due_joins(context)
        but |= context._done | context._running | context._parked | context._ready
        but |= more.kept
        for index in indices(done):
            ready |= self._ready_below(index, context._done)
        self._offer(context, ready & ~but, now)
