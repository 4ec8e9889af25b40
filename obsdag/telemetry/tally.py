"""What one run counts: plain numbers in preallocated lists, indexed by task, lane, state or outcome (ARCHITECTURE,
"The hot path").

Who may touch what. The run's thread counts; nothing here takes a lock or makes a string while contexts move. A scrape
thread reads (`add_to`), which is safe because every list keeps its length and every dict that may grow is copied in
one step. A `Book` lends a tally to one run after the other of DAGs with the same tasks, so that a short run pays for
no lists of its own, and what is told after a run's end still counts.

Numbers that the run keeps anyway (contexts entered and ended) are not counted again: its lists are read.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable
from operator import add
from time import perf_counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Final

from obsdag.core.states import ENTRY_KINDS, EXECUTION_OUTCOMES, GC_REASONS, LANES, OUTCOMES, STATES, State
from obsdag.telemetry.histogram import Buckets, Row
from obsdag.telemetry.journal_tally import JournalTally
from obsdag.telemetry.specs import (
    NO_TASK,
    OTHER,
    POOLS,
    REJECT_REASONS,
    RUN_OUTCOMES,
    SIGNALS,
    error_type_of,
)

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.core.observer import Observer
    from obsdag.core.records import Execution, Failure, Stall
    from obsdag.core.state import RunState
    from obsdag.plan import Plan
    from obsdag.tasks.base import Task
    from obsdag.telemetry.book import Book
    from obsdag.telemetry.totals import Labels, Totals

__all__ = ["SAMPLE_EVERY", "MetricsObserver", "TaskSlots"]

SAMPLE_EVERY: Final = 61
"""One in so many ends of contexts is timed; a prime, so that no pattern always shows the same one."""

_RUNNING: Final = State.RUNNING.value
_QUEUED: Final = State.QUEUED.value
_NOBODYS: Final[Any] = SimpleNamespace(index=-1, started=0.0, ended=0.0)
_BAD_OUTCOMES: Final = tuple(outcome for outcome in EXECUTION_OUTCOMES if outcome != "success")


class TaskSlots:
    """Which series a task counts into: its own, the common one beyond the cap, or one for all with low cardinality.

    of_index: task index -> slot; indices: the other way. names: slot -> label. The last slot is for no task at all
    (`_none`), as are source and sink. joins, pulled: slots of joins, of loops and maps. restarts: (slot, kind) of what
    may be made anew.
    """

    __slots__ = ("index", "indices", "joins", "labels", "none", "of_index", "pulled", "restarts", "tasks")

    def __init__(self, plan: Plan, labels: Labels) -> None:
        slots: dict[str, int] = {}
        self.of_index: list[int] = []
        for number, task in enumerate(plan.tasks):
            inner = number not in (plan.source, plan.sink)
            label = "" if labels.low else labels.tasks.of(task.id) if inner else NO_TASK
            self.of_index.append(-1 if label == NO_TASK else slots.setdefault(label, len(slots)))
        self.tasks = len(slots)
        self.none = 0 if labels.low else len(slots)
        self.of_index = [self.none if slot < 0 else slot for slot in self.of_index]
        self.indices: list[list[int]] = [[] for _ in range(self.none + 1)]
        for index, slot in enumerate(self.of_index):
            self.indices[slot].append(index)
        self.labels: list[tuple[str, ...]] = [()] if labels.low else [(name,) for name in (*slots, NO_TASK)]
        self.index = {task.id: number for number, task in enumerate(plan.tasks)}
        self.joins = self._where(plan, ("join",))
        self.pulled = self._where(plan, ("loop", "map"))
        self.restarts = {(self.of_index[i], kind) for i, task in enumerate(plan.tasks) if (kind := _restarts_as(task))}

    def _where(self, plan: Plan, shapes: tuple[str, ...]) -> list[int]:
        return sorted({self.of_index[i] for i, task in enumerate(plan.tasks) if task.shape in shapes})

    def slot(self, task: Task | None) -> int:
        """The slot of a task of the plan, or of none."""
        index = None if task is None else self.index.get(task.id)
        return self.none if index is None else self.of_index[index]


def _restarts_as(task: Task) -> str:
    if task.shape == "service":
        return "thread" if task.runs_on == "thread" else "service"
    return "stream" if task.shape == "stream" else ""


class MetricsObserver(JournalTally):
    """Counts the facts of one run at a time. Its cost per fact is measured by timing a sample of them."""

    needs_records: ClassVar[bool] = True  # type: ignore[misc]
    signal: ClassVar[str] = "metrics"

    def __init__(self, plan: Plan, labels: Labels, buckets: Buckets, book: Book) -> None:
        super().__init__(buckets)
        slots = TaskSlots(plan, labels)
        count = len(slots.labels)
        self.key = plan.fingerprint
        self.slots = slots
        self.run: Callable[[], RunState | None] | None = None
        self.started = False
        self.phase = ""
        self._submitted = self._never_entered = 0
        self._book = book
        self._labels = labels
        self._buckets = buckets
        self._left = SAMPLE_EVERY
        self._timed_s = self._executions_s = 0.0
        self._timed = 0
        self._init_run_lists()
        # hot
        self._search = buckets.search
        self.quick_s = buckets.bounds[0]
        self._slot_rows = [buckets.row() for _ in range(count)]
        # Tasks beyond the cap share one; the last is that of nobody, see `_time_executions`.
        self.rows = [*(self._slot_rows[slot] for slot in slots.of_index), buckets.row()]
        self._queue_rows = [buckets.row() for _ in LANES]
        # per context
        self._root_rows = {outcome: buckets.row() for outcome in OUTCOMES}
        self._ledger_s = [0.0] * len(STATES)
        self._critical_s = [0.0] * len(plan.tasks)  # by task index
        # rare
        self._bad_rows: list[Row | None] = [None] * count
        self._bad = {outcome: [0] * count for outcome in _BAD_OUTCOMES}
        self._retries = [0] * count
        self._failures: dict[tuple[int, str], int] = {}
        self._destroyed = {reason: [0] * count for reason in GC_REASONS}
        self._join_rows = {slot: buckets.row() for slot in slots.joins}
        self._items = [0] * count
        self._restarts = dict.fromkeys(slots.restarts, 0)
        self._limits: dict[str, tuple[list[int], Row]] = {}
        self._bypassed = self._deadlocks = self._expired = 0
        self._runs = dict.fromkeys(RUN_OUTCOMES, 0)
        self._broken = dict.fromkeys(POOLS, 0)
        self._rejected = dict.fromkeys(REJECT_REASONS, 0)
        self._submit_rows = {outcome: buckets.row() for outcome in OUTCOMES}
        self._lag_row = buckets.row()
        self._lost = dict.fromkeys(SIGNALS, 0)

    # --- the run it counts for

    def _init_run_lists(self) -> None:
        self._entered_before = [0] * len(ENTRY_KINDS)
        self._finished_before = [0] * len(OUTCOMES)
        self.entered: list[int] = []
        self.finished: list[int] = []
        self._quick: list[int] = []
        self._quick_s: list[float] = []
        self._waits: list[int] = []
        self._waits_s: list[float] = []
        self._busy_before_s = 0.0
        self._busy_s: list[float] = []

    def attach(self, run: RunState) -> None:
        """Counts for `run` from now on. Its lists are kept, not the run, so nothing is lost if it is never finished."""
        self._entered_before, self._finished_before = self.entered_total(), self.finished_total()
        self.entered, self.finished = run.entered, run.finished
        for slot, row in enumerate(self._slot_rows):
            row[:] = self._row_of(slot)
        for lane, row in enumerate(self._queue_rows):
            row[:] = self._queue_row(lane)
        self._quick, self._quick_s = run.quick_executions, run.quick_seconds
        self._waits, self._waits_s = run.quick_visits, run.quick_waits_s
        self._busy_before_s += sum(self._busy_s)
        self._busy_s = run.busy_s
        self.run = weakref.ref(run)
        self.started = False
        self.phase = ""
        self._submitted = self._never_entered = self._timed = 0
        for name in getattr(run, "limiter_names", {}).values():
            self._limit(name)

    def detach(self) -> None:
        """The run is over; its lists stay until the next one comes, since more may be told."""
        self.run = None
        self.started = False

    def entered_total(self, entered: list[int] | None = None) -> list[int]:
        """Contexts that entered, per ENTRY_KINDS; `entered`: what the present run is taken to have."""
        return _sums(self._entered_before, self.entered if entered is None else entered)

    def finished_total(self, finished: list[int] | None = None) -> list[int]:
        """Contexts that ended, per OUTCOMES; `finished`: what the present run is taken to have."""
        return _sums(self._finished_before, self.finished if finished is None else finished)

    @property
    def limiters(self) -> list[str]:
        """Labels of the limiters known so far."""
        return list(self._limits)

    def run_started(self, run: RunState, now: float) -> None:
        """Counts it as active."""
        self.started = True

    def run_finished(self, run: RunState, outcome: str, duration_s: float, now: float) -> None:
        """Counts the outcome and gives itself back."""
        _count(self._runs, outcome)
        self._time_executions()
        if self.run is not None and self.run() is run:
            self._book.release(self)

    def run_deadlocked(self, run: RunState, stalls: list[Stall], now: float) -> None:
        """Counts a run that ended with stalled contexts."""
        self._deadlocks += 1

    # --- hot: facts of executions and visits

    def _time(self, fact: Callable[..., None], *arguments: Any) -> None:
        self._left = SAMPLE_EVERY + 1  # the call within counts itself, and must not be timed again
        started = perf_counter()
        fact(*arguments)
        self._timed_s += perf_counter() - started
        self._time_executions()

    def _time_executions(self) -> None:
        """What counting the executions since the last time has cost, by the time that it takes to count one of nobody.
        The quick ones cost nothing more: the run counts them.

        They are too many to be counted for the purpose: that would be a fifth of what is done about one.
        """
        run = self.run() if self.run is not None else None
        if run is not None and (ended := sum(run.told_executions)) > self._timed:
            started = perf_counter()
            self.execution_finished(_NOBODYS, "success", None, 0.0)
            self._executions_s += (perf_counter() - started) * (ended - self._timed)
            self._timed = ended

    def execution_finished(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        """Counts the attempt by task and outcome, and its time. What succeeded is what stands in the row itself."""
        took = execution.ended - execution.started
        row = self.rows[execution.index] if outcome == "success" else self._bad_row(execution.index, outcome)
        row[bisect_left(self._search, took)] += 1
        row[0] += took

    def _row_of(self, slot: int) -> Row:
        """The successes of a slot, those among them that nobody was told of, because they are quick."""
        row = self._slot_rows[slot].copy()
        if self._quick:
            for index in self.slots.indices[slot]:
                row[1] += self._quick[index]
                row[0] += self._quick_s[index]
        return row

    def _bad_row(self, index: int, outcome: str) -> Row:
        # Kept apart from the successes, whose number is then the sum of their row: one count less where it is hot.
        slot = self.slots.of_index[index]
        self._bad[outcome][slot] += 1
        row = self._bad_rows[slot]
        if row is None:
            row = self._bad_rows[slot] = self._buckets.row()
        return row

    def visit_started(self, context: Context, worker: int, lane: int, waited_s: float, now: float) -> None:
        """Counts the time in the queue by lane, where it was long."""
        self._buckets.observe(self._queue_rows[lane], waited_s)

    def _queue_row(self, lane: int) -> Row:
        """The times in a lane, those among them that nobody was told of."""
        row = self._queue_rows[lane].copy()
        if self._waits:
            row[1] += self._waits[lane]
            row[0] += self._waits_s[lane]
        return row

    @staticmethod
    def open_visits_s(run: RunState) -> float:
        """Seconds that the visits which go on have taken so far, those of the engine's own workers."""
        now = run.clock()
        return sum(now - since for since in run.visit_since[:-1] if since >= 0.0)

    # --- contexts

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        """Of a root: its time, where it went, and which tasks were on its critical path."""
        ledger = context._ledger
        if ledger is None:
            return
        left = self._left - 1
        if not left:
            self._time(self.context_finished, context, outcome, now)
            return
        self._left = left
        took = now - context._entered
        row = self._root_rows[outcome]
        row[bisect_left(self._search, took)] += 1
        row[0] += took
        if ledger:
            took -= self._count_waits(ledger)
        self._ledger_s[_RUNNING] += took
        # The chain that `run.critical_path` marks, without its slack, which takes a sort and an object per execution.
        # It ends: an execution is released by one that was there before it.
        execution, seconds = context._maker, self._critical_s
        while execution is not None:
            if execution.context is not context and not _descends(execution.context, context):
                return
            if execution.outcome is not None:
                seconds[execution.index] += execution.ended - execution.started
            execution = execution.released_by

    def _count_waits(self, ledger: float | list[float]) -> float:
        into = self._ledger_s
        if not isinstance(ledger, list):
            into[_QUEUED] += ledger
            return ledger
        for state, seconds in enumerate(ledger):
            if seconds:
                into[state] += seconds
        return sum(ledger)

    def context_failed(self, context: Context, failure: Failure, execution: Execution | None, now: float) -> None:
        """Counts the failure by task and type of the exception."""
        index = self.slots.index.get(failure.task)
        slot = self.slots.none if index is None else self.slots.of_index[index]
        key = slot, self._labels.errors.of(error_type_of(failure.exception))
        self._failures[key] = self._failures.get(key, 0) + 1

    def context_destroyed(self, context: Context, task: Task | None, reason: str, now: float) -> None:
        """Counts what garbage collection ended."""
        self._destroyed[reason][self.slots.slot(task)] += 1

    def tasks_bypassed(self, context: Context, count: int, now: float) -> None:
        """Counts tasks that need not be run."""
        self._bypassed += count

    def retry_scheduled(self, execution: Execution, error: BaseException, delay_s: float, now: float) -> None:
        """Counts an attempt that was retried."""
        self._retries[self.slots.of_index[execution.index]] += 1

    # --- limits, joins, loops

    def _limit(self, name: str) -> tuple[list[int], Row]:
        label = self._labels.limiters.of(name)
        found = self._limits.get(label)
        if found is None:
            found = self._limits[label] = [0], self._buckets.row()
        return found

    def limit_deferred(self, context: Context, task: Task, limiter: str, now: float) -> None:
        """Counts an execution that has to wait for a permit."""
        self._limit(limiter)[0][0] += 1

    def limit_granted(self, context: Context, task: Task, limiter: str, waited_s: float, now: float) -> None:
        """Counts the wait for a permit."""
        self._buckets.observe(self._limit(limiter)[1], waited_s)

    def join_released(self, parent: Context, task: Task, children: int, waited_s: float, now: float) -> None:
        """Counts the wait of a join."""
        self._buckets.observe(self._join_rows[self.slots.slot(task)], waited_s)

    def loop_item(self, context: Context, task: Task, now: float) -> None:
        """Counts an item of a loop or map."""
        self._items[self.slots.slot(task)] += 1

    # --- pools, services, the event loop

    def pool_rebuilt(self, pool: str, reason: str) -> None:
        """Counts a worker of a pool that died."""
        _count(self._broken, pool)

    def task_restarted(self, task: Task, kind: str, error: BaseException | None) -> None:
        """Counts what was made anew."""
        _count(self._restarts, (self.slots.slot(task), kind))

    def loop_lagged(self, lag_s: float) -> None:
        """Counts how late the event loop was."""
        self._buckets.observe(self._lag_row, lag_s)

    # --- serving

    def submitted(self, context: Context, now: float) -> None:
        """Counts a submission that was accepted."""
        self._submitted += 1

    @property
    def pending(self) -> int:
        """Submissions of the present run that were accepted and have not entered."""
        return max(0, self._submitted - self._never_entered - sum(self.entered[:1])) if self._submitted else 0

    def submit_rejected(self, reason: str, now: float) -> None:
        """Counts what was turned away."""
        _count(self._rejected, reason)

    def ticket_done(self, context: Context, outcome: str, took_s: float, now: float) -> None:
        """Counts the time of a submission by its outcome."""
        if context._run is None:
            self._never_entered += 1
        self._buckets.observe(self._submit_rows[outcome], took_s)

    def result_expired(self, context: Context, now: float) -> None:
        """Counts a result that nobody fetched."""
        self._expired += 1

    def phase_changed(self, phase: str, now: float) -> None:
        """Remembers the phase."""
        self.phase = phase

    def observer_failed(self, observer: Observer, fact: str, error: BaseException) -> None:
        """Counts an observer that was detached from a fact, by the signal that it makes."""
        _count(self._lost, getattr(observer, "signal", "observers"))

    # --- read by scrapes

    def add_to(self, totals: Totals) -> None:
        """Adds all counters but those of entered and ended contexts. From any thread."""
        slots = self.slots
        for slot, labels in enumerate(slots.labels):
            self._add_task(totals, slot, labels, always=slot < slots.tasks)
        for (slot, error_type), count in self._failures.copy().items():
            totals.add("obsdag_task_failures_total", (*slots.labels[slot], error_type), count)
        for slot, row in self._join_rows.items():
            totals.add_row("obsdag_join_wait_seconds", slots.labels[slot], row)
        for slot in slots.pulled:
            totals.add("obsdag_loop_items_total", slots.labels[slot], self._items[slot])
        for (slot, kind), count in self._restarts.copy().items():
            totals.add("obsdag_restarts_total", (*slots.labels[slot], kind), count)
        for limiter, (deferrals, row) in self._limits.copy().items():
            totals.add("obsdag_limit_deferrals_total", (limiter,), deferrals[0])
            totals.add_row("obsdag_limit_wait_seconds", (limiter,), row)
        self._add_rows(totals)
        self._add_plain(totals)

    def _add_task(self, totals: Totals, slot: int, labels: tuple[str, ...], always: bool) -> None:
        row, bad_row = self._row_of(slot), self._bad_rows[slot]
        for reason, counts in self._destroyed.items():
            totals.add("obsdag_gc_destroyed_total", (*labels, reason), counts[slot])
        if not always and not any(row):
            return
        totals.add("obsdag_task_executions_total", (*labels, "success"), Buckets.count(row))
        for outcome, counts in self._bad.items():
            totals.add("obsdag_task_executions_total", (*labels, outcome), counts[slot])
        totals.add_row("obsdag_task_seconds", labels, row)
        if bad_row is not None:
            totals.add_row("obsdag_task_seconds", labels, bad_row)
        totals.add("obsdag_task_retries_total", labels, self._retries[slot])
        totals.add("obsdag_task_failures_total", (*labels, OTHER), 0)
        critical_s = sum(self._critical_s[index] for index in self.slots.indices[slot])
        totals.add("obsdag_critical_seconds_total", labels, critical_s)

    def _add_rows(self, totals: Totals) -> None:
        for number, lane in enumerate(LANES):
            totals.add_row("obsdag_queue_wait_seconds", (lane,), self._queue_row(number))
        for outcome in OUTCOMES:
            totals.add_row("obsdag_root_seconds", (outcome,), self._root_rows[outcome])
            totals.add_row("obsdag_submit_seconds", (outcome,), self._submit_rows[outcome])
        totals.add_row("obsdag_event_loop_lag_seconds", (), self._lag_row)
        self.add_journal(totals)

    def _add_plain(self, totals: Totals) -> None:
        for state, seconds in zip(STATES, self._ledger_s, strict=True):
            totals.add("obsdag_ledger_seconds_total", (state,), seconds)
        for metric, counts in (
            ("obsdag_runs_total", self._runs),
            ("obsdag_pool_broken_total", self._broken),
            ("obsdag_submit_rejected_total", self._rejected),
        ):
            for value, count in counts.copy().items():
                totals.add(metric, (value,), count)
        for signal, count in self._lost.items():
            totals.add("obsdag_telemetry_dropped_total", (signal, "observer_failed"), count)
        totals.add("obsdag_telemetry_seconds_total", (self.signal,), self._timed_s * SAMPLE_EVERY + self._executions_s)
        totals.add("obsdag_worker_busy_seconds_total", (), self._busy_before_s + sum(self._busy_s))
        totals.add("obsdag_bypassed_tasks_total", (), self._bypassed)
        totals.add("obsdag_deadlocks_total", (), self._deadlocks)
        totals.add("obsdag_results_expired_total", (), self._expired)


def _sums(before: list[int], now: list[int]) -> list[int]:
    return list(map(add, before, now)) if now else before.copy()


def _count(counts: dict[Any, int], key: Any) -> None:
    # a value outside the closed set is shown rather than lost: it would be a mistake of the teller
    counts[key] = counts.get(key, 0) + 1


def _descends(context: Context, root: Context) -> bool:
    ancestor: Context | None = context
    while ancestor is not None and ancestor is not root:
        ancestor = ancestor._parent
    return ancestor is root
