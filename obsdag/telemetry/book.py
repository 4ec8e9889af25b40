"""The books of one (engine, dag): what living runs count now, what ended ones have counted, and exemplars.

Every run gets a tally of its own, so that runs in different threads never count into the same list. At its end the
tally waits for the next run of a DAG with the same tasks, and when too many wait, the oldest one's numbers go to the
base: what a counter has once shown it never loses.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from obsdag.core.states import ENTRY_KINDS, OUTCOMES, STATES
from obsdag.telemetry.gauges import PARTS, LivingRun, settled_counts
from obsdag.telemetry.tally import MetricsObserver
from obsdag.telemetry.totals import Totals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from obsdag.core.state import RunState
    from obsdag.plan import Plan
    from obsdag.telemetry.histogram import Buckets
    from obsdag.telemetry.selfstats import Kept
    from obsdag.telemetry.totals import Labels

__all__ = ["Book", "ExemplarRow"]

_MAX_WAITING: Final = 4
_HISTOGRAM_OF: Final = {
    "root": "obsdag_root_seconds",
    "task": "obsdag_task_seconds",
    "queue": "obsdag_queue_wait_seconds",
}

ExemplarRow = list["Kept | None"]
"""The newest kept trace of each bucket of one series."""


class Book:
    """Counts of all runs of one (engine, dag). Safe to use from any thread.

    The lock is held for arithmetic, and for the few milliseconds that a scrape may wait for a transition to end. Runs
    that begin and end take it, counting does not.
    """

    def __init__(self, dag: str, labels: Labels, buckets: Buckets) -> None:
        self.dag = dag
        self.labels = labels
        self.buckets = buckets
        self._lock = threading.RLock()
        self._base = Totals(buckets, labels.low)
        self._base_entered = [0] * len(ENTRY_KINDS)
        self._base_finished = [0] * len(OUTCOMES)
        self._tallies: list[MetricsObserver] = []  # those without a run are in order of becoming free
        self._busy_shown_s = 0.0
        self._served = False
        self._exemplars: dict[tuple[str, tuple[str, ...]], ExemplarRow] = {}

    # --- runs come and go

    def declare(self, plan: Plan) -> None:
        """Lets the series of a DAG's tasks exist, at zero, before its first run."""
        with self._lock:
            if not any(tally.key == plan.fingerprint for tally in self._tallies):
                self._tallies.append(MetricsObserver(plan, self.labels, self.buckets, self))
                self._fold_surplus()

    def attach(self, run: RunState) -> MetricsObserver:
        """The tally that counts for `run` until its `run_finished` is told, or the run is garbage."""
        with self._lock:
            self._release_dead()
            for tally in self._tallies:
                if tally.run is None and tally.key == run.plan.fingerprint:
                    break
            else:
                tally = MetricsObserver(run.plan, self.labels, self.buckets, self)
                self._tallies.append(tally)
            tally.attach(run)
            return tally

    def release(self, tally: MetricsObserver) -> None:
        """The tally's run is over."""
        with self._lock:
            if tally.phase:
                self._served = True
            tally.detach()
            if tally in self._tallies:
                self._tallies.remove(tally)
                self._tallies.append(tally)
            self._fold_surplus()

    def _release_dead(self) -> None:
        for tally in self._tallies.copy():
            if tally.run is not None and tally.run() is None:
                self.release(tally)

    def _fold_surplus(self) -> None:
        waiting = [tally for tally in self._tallies if tally.run is None]
        for tally in waiting[:-_MAX_WAITING]:
            tally.add_to(self._base)
            _add(self._base_entered, tally.entered_total())
            _add(self._base_finished, tally.finished_total())
            self._tallies.remove(tally)

    # --- exemplars

    def keep(self, kept: Iterable[Kept]) -> None:
        """Remembers a kept trace as the exemplar of the buckets that its values fell into. From any thread."""
        with self._lock:
            for each in kept:
                self._exemplar_row(each)[self.buckets.place(each.seconds)] = each

    def _exemplar_row(self, kept: Kept) -> ExemplarRow:
        labels: tuple[str, ...] = (kept.label,)
        if kept.what == "task":
            labels = () if self.labels.low else (self.labels.tasks.of(kept.label),)
        series = _HISTOGRAM_OF[kept.what], labels
        row = self._exemplars.get(series)
        if row is None:
            row = self._exemplars[series] = [None] * (len(self.buckets.bounds) + 1)
        return row

    def exemplars(self, histogram: str, labels: tuple[str, ...]) -> ExemplarRow | None:
        """The exemplars of a series, one or None per bucket."""
        return self._exemplars.get((histogram, labels))

    # --- scrapes

    def snapshot(self, fail: Callable[[str, Exception], None]) -> Totals:
        """All numbers of this moment. fail: told which part could not be read, and why; the other parts are there."""
        with self._lock:
            self._release_dead()
            totals = self._base.copy()
            self._zero_tasks(totals)
            runs = [
                (tally, run) for tally in self._tallies if tally.run is not None and (run := tally.run()) is not None
            ]
            self._add_contexts(totals, dict(runs), fail)
            for tally in self._tallies:
                tally.add_to(totals)
            self._add_open_visits(totals, runs)
        seen: set[int] = set()
        for tally, run in runs:
            totals.add("obsdag_runs_active", (), int(tally.started))
            for part in PARTS:
                try:
                    part(LivingRun(run, tally, self.labels, seen), totals)
                except Exception as error:
                    fail(part.__name__.strip("_"), error)
        if self._served and not any(tally.phase for tally, _ in runs):
            totals.add("obsdag_phase", ("stopped",), 1)
        return totals

    def _zero_tasks(self, totals: Totals) -> None:
        for tally in self._tallies:
            slots = tally.slots
            for labels in slots.labels[: slots.tasks]:
                totals.add("obsdag_task_running", labels, 0)
            for slot in slots.joins:
                totals.add("obsdag_joins_pending", slots.labels[slot], 0)
            for limiter in tally.limiters:
                totals.add("obsdag_limit_waiting", (limiter,), 0)

    def _add_contexts(
        self,
        totals: Totals,
        runs: dict[MetricsObserver, RunState],
        fail: Callable[[str, Exception], None],
    ) -> None:
        entered, finished, unaccounted = self._base_entered.copy(), self._base_finished.copy(), 0
        states = [0] * len(STATES)
        for tally in self._tallies:
            present = None
            if tally in runs:
                try:
                    present = settled_counts(runs[tally])
                    _add(states, present.states)
                    unaccounted += present.unaccounted
                except Exception as error:
                    fail("contexts", error)
            _add(entered, tally.entered_total(present and present.entered))
            _add(finished, tally.finished_total(present and present.finished))
        totals.numbers["obsdag_unaccounted_contexts"][()] = unaccounted
        for metric, values, counts in (
            ("obsdag_contexts_entered_total", ENTRY_KINDS, entered),
            ("obsdag_contexts_finished_total", OUTCOMES, finished),
            ("obsdag_contexts", STATES, states),
        ):
            for value, count in zip(values, counts, strict=True):
                totals.add(metric, (value,), count)

    def _add_open_visits(self, totals: Totals, runs: list[tuple[MetricsObserver, RunState]]) -> None:
        busy = totals.numbers["obsdag_worker_busy_seconds_total"]
        busy[()] += sum(tally.open_visits_s(run) for tally, run in runs)
        # A visit that ended between the two readings is in neither: what was shown stands until the sum has caught up.
        self._busy_shown_s = busy[()] = max(self._busy_shown_s, busy[()])


def _add(into: list[int], counts: list[int]) -> None:
    for index, count in enumerate(counts):
        into[index] += count
