"""What is read from living runs when somebody scrapes: plain integers and lists of fixed length, from another thread.

A scrape may interrupt the run's thread in the middle of a transition, where a context has left one count and not
reached the next. `settled_counts` therefore reads until the books balance; everything else is a single number.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from obsdag.core.states import LANES
from obsdag.telemetry.specs import POOLS

if TYPE_CHECKING:
    from obsdag.core.state import RunState
    from obsdag.telemetry.tally import MetricsObserver
    from obsdag.telemetry.totals import Labels, Totals

__all__ = ["PARTS", "Counts", "LivingRun", "settled_counts"]

_TRIES: Final = 10
_PAUSE_S: Final = 0.0005  # lets the run's thread out of the transition that it was interrupted in


class Counts(NamedTuple):
    """One consistent reading: per ENTRY_KINDS, per OUTCOMES, per STATES; unaccounted = entered - living - ended."""

    entered: list[int]
    finished: list[int]
    states: list[int]
    unaccounted: int


class LivingRun(NamedTuple):
    """A run that goes on, and who counts for it. seen: ids of what several runs share and only one may tell."""

    run: RunState
    tally: MetricsObserver
    labels: Labels
    seen: set[int]


def settled_counts(run: RunState) -> Counts:
    """Entered, ended and living contexts that belong together (C9).

    A difference that stays is a bug of the engine, and returned as it is.
    """
    best = _read_counts(run)
    for _ in range(_TRIES):
        if not best.unaccounted and sum(best.states) == run.living:
            break
        time.sleep(_PAUSE_S)
        again = _read_counts(run)
        if abs(again.unaccounted) <= abs(best.unaccounted):
            best = again
    return best


def _read_counts(run: RunState) -> Counts:
    entered, living, states, finished = run.entered.copy(), run.living, run.state_counts.copy(), run.finished.copy()
    return Counts(entered, finished, states, sum(entered) - living - sum(finished))


# --- parts of a scrape: each reads one thing of one run, and fails alone


def _capacity(living: LivingRun, totals: Totals) -> None:
    config = living.run.config
    serving = living.run.kind == "serve"
    for resource, value in (
        ("workers", config.context_worker_num),
        ("live_contexts", config.max_live_contexts),
        ("pending", config.max_pending if serving else 0),
    ):
        totals.add("obsdag_capacity", (resource,), value)
    for kind, resource in (("thread", "threads"), ("process", "processes")):
        pool = _pool(living, kind)
        size = getattr(config, f"{kind}_pool_worker_num") if pool is None else pool.size
        if _first(living, (pool, resource) if pool is not None else None):
            totals.add("obsdag_capacity", (resource,), size)


def _pool(living: LivingRun, kind: str) -> Any:
    return getattr(getattr(living.run, "pools", None), kind, None)


def _first(living: LivingRun, shared: tuple[Any, str] | None) -> bool:
    if shared is None:
        return True
    key = hash((id(shared[0]), shared[1]))
    if key in living.seen:
        return False
    living.seen.add(key)
    return True


def _pools(living: LivingRun, totals: Totals) -> None:
    for kind in POOLS:
        pool = _pool(living, kind)
        if pool is not None and _first(living, (pool, "")):
            totals.add("obsdag_pool_workers", (kind,), pool.workers)
            totals.add("obsdag_pool_queued", (kind,), pool.queued)
            totals.add("obsdag_threads_abandoned", (kind,), getattr(pool, "abandoned", 0))


def _queue(living: LivingRun, totals: Totals) -> None:
    for lane, length in zip(LANES, living.run.queue_lengths(), strict=True):
        totals.add("obsdag_queue_contexts", (lane,), length)


def _workers(living: LivingRun, totals: Totals) -> None:
    busy = living.run.busy_workers
    totals.add("obsdag_workers", ("busy",), busy)
    totals.add("obsdag_workers", ("idle",), max(0, living.run.config.context_worker_num - busy))


def _tasks(living: LivingRun, totals: Totals) -> None:
    slots = living.tally.slots
    for metric, counts in (
        ("obsdag_task_running", living.run.task_running.copy()),
        ("obsdag_joins_pending", living.run.joins_pending.copy()),
    ):
        for slot, count in zip(slots.of_index, counts, strict=True):
            if count:
                totals.add(metric, slots.labels[slot], count)


def _waits(living: LivingRun, totals: Totals) -> None:
    totals.add("obsdag_retry_timers", (), living.run.timers_armed)
    totals.add("obsdag_pending_contexts", (), living.tally.pending)
    names: dict[Any, str] = getattr(living.run, "limiter_names", {})
    for status in living.run.runtime.limits.snapshot() if names else ():
        limit = status["limit"]
        if limit in names and _first(living, (limit, "")):
            totals.add("obsdag_limit_waiting", (living.labels.limiters.of(names[limit]),), status["waiting"])


def _phase(living: LivingRun, totals: Totals) -> None:
    if living.tally.phase:
        totals.add("obsdag_phase", (living.tally.phase,), 1)


def _oldest(living: LivingRun, totals: Totals) -> None:
    entered = living.run.oldest_entered()
    if entered is not None:
        times = totals.numbers["obsdag_oldest_context_timestamp_seconds"]
        times[()] = min(entered + living.run.epoch, times.get((), float("inf")))


PARTS: Final = (_capacity, _pools, _queue, _workers, _tasks, _waits, _phase, _oldest)
