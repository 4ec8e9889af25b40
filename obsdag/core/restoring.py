"""Contexts that a journal has kept, back in a run: as they were after their last committed transition.

By steps: 1. each living one is registered, under its nearest living ancestor; 2. lent branches are opened again, and
children, ended ones included, take their places in them; 3. what is not done and not waiting is ready again: executions
that ran are simply among that, limits are asked anew; 4. each takes its place; 5. joins that have all they wait for
fire. The clock values are those of the new run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obsdag.core.base import _KIND_INDEX, _QUEUED, more_of
from obsdag.core.queue import IDLE, NEW
from obsdag.core.records import Lend
from obsdag.core.states import State

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.core.state import RunState

__all__ = ["Saved", "restore"]


@dataclass(slots=True)
class Saved:
    """What is known of one context. Masks and tasks are those of the run's plan; `context.outcome` is set if it ended.

    waits: task -> (due, retry or limit). lends: (task, a map's, its map has not ended). lend: the task at which its
    parent lent it. pulls: open loop or map -> items so far.
    """

    context: Context
    kind: str = "input"
    done: int = 0
    skipped: int = 0
    dead: dict[int, int] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    first_try: dict[int, float] = field(default_factory=dict)
    waits: dict[int, tuple[float, str]] = field(default_factory=dict)
    lends: list[tuple[int, bool, bool]] = field(default_factory=list)
    lend: int | None = None
    pulls: dict[int, int] = field(default_factory=dict)
    frozen: bool = False
    deadline: float | None = None


def restore(run: RunState, saved: Sequence[Saved], now: float, lane: int = NEW) -> None:
    """Puts contexts into a run that has just begun; parents come before their children.

    lane: where those are queued that are ready.
    """
    living = [each for each in saved if each.context._outcome is None]
    for each in saved:
        _fill(run, each, now)
    for each in living:
        _register(run, each, now)
    for each in living:
        _open_lends(run, each, now)
    for each in saved:
        if each.lend is not None:
            _take_place(run, each, each.lend)
    for each in living:
        _make_ready(run, each, now)
    for each in living:
        _schedule(run, each, now, lane)
        more = each.context._more
        if more is not None and more.lends:
            run._touched.extend(more.lends.values())
    run._settle_all(now)


def _fill(run: RunState, saved: Saved, now: float) -> None:
    """What a context of a run has; ended ones stay readable (C11)."""
    context = saved.context
    context._run = run
    context._done = saved.done
    context._ready = context._running = context._parked = context._holds = context._lane = 0
    context._entered = context._since = now
    context._ledger = context._waits = None
    context._place, context._state = IDLE, _QUEUED


def _register(run: RunState, saved: Saved, now: float) -> None:
    """As `Lifecycle._enter`, without the queue."""
    context = saved.context
    run.contexts[context] = None
    run.first_entered = now
    run.living += 1
    run.entered[_KIND_INDEX[saved.kind]] += 1
    run.state_counts[_QUEUED] += 1
    if context._scope is not None:
        context._scope.living += 1
    holder = run._holder_of(context) if context._parent is not None else None
    if holder is not None:
        holder._holds += 1
    else:
        context._ledger = 0.0
        if saved.deadline is None and run.context_deadline is not None:  # it was not in a run yet, or is tried again
            saved.deadline = now + run.context_deadline
    if saved.deadline is not None:
        run.set_deadline(context, saved.deadline)
    if (tell := run.facts.context_entered) is not None:
        tell(context, saved.kind, None, now)


def _open_lends(run: RunState, saved: Saved, now: float) -> None:
    context = saved.context
    for index, mapped, pulling in saved.lends:
        lend = run._lend(context, index, now)
        lend.mapped, lend.pulling = mapped, pulling
        if pulling:  # the map is to be run again, for the items that are missing
            context._done &= ~run.plan.bit[index]
    resumed = {(context, index): items for index, items in saved.pulls.items() if items}
    if resumed:
        run.resumed = (run.resumed or {}) | resumed


def _take_place(run: RunState, saved: Saved, index: int) -> None:
    """The child is one of its parent's lent branch again; one that has ended counts in it."""
    child, parent = saved.context, saved.context._parent
    lends = parent._more.lends if parent is not None and parent._more is not None else None
    lend = lends.get(index) if lends else None
    if lend is None:
        if parent is not None and child._outcome is None:  # the parent has ended, and its branch goes on without it
            mask = run.plan.descendants[index]
            more_of(child).lend = orphan = Lend(parent, index, mask, bool(mask & run.plan.joins))
            orphan.living = 1
        return
    if child._outcome is None:
        run._join_lend(child, lend)
        return
    if lend.keeps:
        lend.children.append(child)
    lend.outcomes[child._outcome] = lend.outcomes.get(child._outcome, 0) + 1
    if child._outcome == "failed" and lend.failed is None:
        lend.failed = child._error


def _make_ready(run: RunState, saved: Saved, now: float) -> None:
    context = saved.context
    if saved.skipped or saved.dead:
        more = more_of(context)
        more.skipped = saved.skipped
        more.dead = dict(saved.dead) or None
    for index, failed in saved.attempts.items():
        tried = run._timed_wait(context, index)
        tried.failed, tried.first_started = failed, saved.first_try[index]
    waiting = 0
    for index, (due, kind) in saved.waits.items():
        if due > now and not context._parked & run.plan.bit[index]:
            waiting |= run.plan.bit[index]
            run._wait_for(context, index, due, State[f"{kind.upper()}_WAIT"].value, now)
    run._offer(context, run._all_ready(context._done) & ~(context._parked | waiting), now)


def _schedule(run: RunState, saved: Saved, now: float, lane: int) -> None:
    context = saved.context
    if context._outcome is not None:
        return
    if saved.frozen:
        run._note_freeze(context, True, now)
    if context._ready and not saved.frozen:
        run.queue.put(context, lane)
        if (tell := run.facts.context_queued) is not None:
            tell(context, lane, now)
        run._restate(context, now)
    else:
        run._schedule(context, now)
