"""The one Observer protocol: every fact that the engine tells, in one place (ARCHITECTURE, idea 2).

The contract:

- A fact is told after its transition, never in the middle of one; synchronously, on the run's thread, and where it
  concerns an execution in the frame and contextvars in which the task's function runs, so that tracing can make its
  span current.
- Every `execution_started` gets exactly one `execution_finished`, on every way out; an observer may do without those
  of quick successes (`quick_s`).
- Times are handed over: `now` is on the run's clock (seconds; `run.epoch` added gives Unix time), durations are
  seconds.
- An observer that raises is detached, logged and counted, and that is itself a fact (`observer_failed`); it never
  changes an outcome.
- Observers keep no clocks, must not block, and must not change what they are told of.

Write an observer by subclassing `Observer` and overriding the facts you want: only those are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from obsdag.core.records import Execution

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.core.records import Failure, Stall
    from obsdag.core.state import RunState
    from obsdag.tasks.base import Task

__all__ = ["FACTS", "Facts", "Observer"]


class Observer:
    """One optional method per fact.

    needs_records: each execution is to know which one released it, and how long it waited (for critical paths).
    needs_slack: all executions of a root are to be kept until it ends, for the slack of those off the critical path.
    min_stay_s: `state_left` need not be told of shorter stays. quick_s: `execution_finished` need not be told of
    shorter successes, which stand in `run.quick_executions` and `run.quick_seconds`, unless one set
    `execution.watched`, nor `visit_started` of shorter waits (`run.quick_visits`, `run.quick_waits_s`). These are
    most of all, and a call each. Of the former those that can do without are told only beside others with a limit that
    is lower, of the latter if anybody wants all.
    execution_class: what the run makes executions of, where an observer needs room for something of its own.
    guarded: facts whose methods catch what they raise and hand it to `Facts.detach` (raising it again if that says
    no), so that an only listener can be called directly: a guard around the call costs as much as the call.
    """

    __slots__ = ()

    needs_records: bool = False
    needs_slack: bool = False
    min_stay_s: float = 0.0
    quick_s: float = 0.0
    execution_class: type[Execution] | None = None
    guarded: frozenset[str] = frozenset()

    # --- runs
    def run_started(self, run: RunState, now: float) -> None:
        """A run begins: `run.id`, `run.kind` (run, stream, serve), `run.plan`, `run.config`, `run.epoch`."""

    def run_finished(self, run: RunState, outcome: str, duration_s: float, now: float) -> None:
        """A run ended: outcome is ok, failed (on_failure="raise" or a failed context), deadlocked, cancelled or
        deadline.
        """

    def run_deadlocked(self, run: RunState, stalls: list[Stall], now: float) -> None:
        """Told once, before `run_finished`, of a run that ended with stalled contexts (E8)."""

    # --- contexts
    def context_entered(self, context: Context, kind: str, maker: Execution | None, now: float) -> None:
        """A context entered: kind is input, made or child; `maker` is the execution that returned it."""

    def context_queued(self, context: Context, lane: int, now: float) -> None:
        """A context took a place in the queue: `LANES[lane]`."""

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        """A context ended; `context.ledger` is final and, for a root, `run.critical_path(context)` can be asked."""

    def context_destroyed(self, context: Context, task: Task | None, reason: str, now: float) -> None:
        """A context ended by garbage collection rather than by reaching something: reason is one of GC_REASONS."""

    def context_dropped(self, context: Context, task: Task, now: float) -> None:
        """A task discarded its context and neither `may_drop` nor `pass_through` says that this is meant (T3)."""

    def context_stalled(self, context: Context, stall: Stall, now: float) -> None:
        """Nothing holds a context that is not done (E8); told before its `context_finished`."""

    def context_failed(self, context: Context, failure: Failure, execution: Execution | None, now: float) -> None:
        """A context failed for good (E6); told before its `context_finished`."""

    def context_changed(self, context: Context, now: float) -> None:
        """Something else than an execution of its own changed a context: it was frozen or thawed, another's return
        completed a task for it, or it is discarded and only kept readable (E11).
        """

    def context_kept(self, context: Context, now: float) -> None:
        """Somebody asked for the trace of the context's root to be kept."""

    def state_left(self, context: Context, state: int, stayed_s: float, now: float) -> None:
        """A context left `STATES[state]` for another state, or ended, after `stayed_s`."""

    def tasks_bypassed(self, context: Context, count: int, now: float) -> None:
        """A newly made context starts with `count` tasks completed that are neither above nor below its maker (E12)."""

    # --- visits
    def visit_started(self, context: Context, worker: int, lane: int, waited_s: float, now: float) -> None:
        """A worker took a context from the queue after `waited_s` there."""

    def visit_finished(self, context: Context, worker: int, busy_s: float, now: float) -> None:
        """A worker is done with a context for now."""

    # --- executions
    def execution_started(self, execution: Execution, now: float) -> None:
        """An attempt begins, in the frame of the task's function."""

    def execution_finished(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        """An attempt ended: one of EXECUTION_OUTCOMES; `execution.ended - execution.started` is what it took."""

    def retry_scheduled(self, execution: Execution, error: BaseException, delay_s: float, now: float) -> None:
        """A failed attempt will be followed by another in `delay_s`."""

    # --- limits, joins, loops
    def limit_deferred(self, context: Context, task: Task, limiter: str, now: float) -> None:
        """An execution has to wait for a permit of `limiter` (for RateLimitContext: the task's name)."""

    def limit_granted(self, context: Context, task: Task, limiter: str, waited_s: float, now: float) -> None:
        """The permits are there, reserved for it, after `waited_s`."""

    def join_waiting(self, context: Context, task: Task, now: float) -> None:
        """A child arrived at a join and waits for its siblings."""

    def join_released(self, parent: Context, task: Task, children: int, waited_s: float, now: float) -> None:
        """A join has all that it waits for; `waited_s` is since the first child arrived."""

    def loop_item(self, context: Context, task: Task, now: float) -> None:
        """A loop or map gave one item, `context`."""

    # --- pools and services
    def pool_rebuilt(self, pool: str, reason: str) -> None:
        """A worker of the pool died and was replaced."""

    def thread_abandoned(self, thread: str, task: str, running_s: float) -> None:
        """A thread does not come back from a task that timed out or was cancelled."""

    def task_restarted(self, task: Task, kind: str, error: BaseException | None) -> None:
        """A stream, service or thread ended or raised and will be made anew, its state lost (T14)."""

    def cleanup_failed(self, what: str, error: BaseException) -> None:
        """A shutdown hook, or the closing of a resource or generator, raised at the end of a run (T10)."""

    # --- the journal
    def journal_committed(self, rows: int, took_s: float, depth: int) -> None:
        """A group of `rows` contexts is in the journal, `took_s` after the commit began; `depth` rows still wait."""

    def journal_recovered(self, contexts: int, replayed: int, dead_letters: int, took_s: float) -> None:
        """A run took up contexts of an earlier process; `replayed` executions of them were ready, or ran, when it died.

        dead_letters: contexts that were running too often when a process died, and fail. took_s: to read them and to
        put them into the run.
        """

    def journal_left(self, contexts: int) -> None:
        """So many contexts of an earlier process have no outcome, and this run leaves them where they are."""

    def journal_failed(self, error: BaseException) -> None:
        """Nothing more can be committed; the run ends. Of a `JournalError`, `rows` and `took_s` tell what failed."""

    # --- the event loop, told by the watchdog
    def loop_lagged(self, lag_s: float) -> None:
        """The event loop ran a callback `lag_s` later than asked."""

    def loop_blocked(self, execution: Execution | None, blocked_s: float, stack: str) -> None:
        """A task keeps the event loop from turning; `stack` is the line that blocks. Told from another thread."""

    # --- serving
    def submitted(self, context: Context, now: float) -> None:
        """A context was accepted; it may wait for a place (pending) before it enters."""

    def submit_rejected(self, reason: str, now: float) -> None:
        """A submission was turned away: queue_full, not_accepting, duplicate, invalid."""

    def ticket_done(self, context: Context, outcome: str, took_s: float, now: float) -> None:
        """Everything a ticket covers has ended, `took_s` after it was accepted."""

    def result_expired(self, context: Context, now: float) -> None:
        """A result that nobody fetched was dropped (S2)."""

    def phase_changed(self, phase: str, now: float) -> None:
        """The serving executor is starting, accepting, draining or stopped."""

    def drain_finished(self, manifest: dict[str, Any], now: float) -> None:
        """Draining ended; `manifest` says what was cancelled (S3)."""

    # --- observers themselves
    def observer_failed(self, observer: Observer, fact: str, error: BaseException) -> None:
        """An observer raised and is detached from that fact."""


FACTS = tuple(name for name, value in vars(Observer).items() if callable(value) and not name.startswith("_"))


class Facts:
    """The observers of a run, compiled: per fact one callable, or None where nobody listens.

    `None` costs the teller one test. `failures` counts detached listeners, for the telemetry's own telemetry.
    """

    __slots__ = (
        *FACTS,
        "_observers",
        "execution_class",
        "failures",
        "min_stay_s",
        "needs_records",
        "needs_slack",
        "quick_s",
        "quick_wait_s",
        "skip_s",
        "to_every",
    )

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self.failures = 0
        self.needs_records = any(getattr(observer, "needs_records", False) for observer in self._observers)
        self.needs_slack = any(getattr(observer, "needs_slack", False) for observer in self._observers)
        self.min_stay_s = self._least("min_stay_s", "state_left")
        self.quick_s = 0.0 if self.needs_slack else self._least("quick_s", "execution_finished")
        self.quick_wait_s = self._least("quick_s", "visit_started")
        own = [kind for each in self._observers if (kind := getattr(each, "execution_class", None)) is not None]
        self.execution_class: type[Execution] = own[0] if own else Execution
        for fact in FACTS:
            self._set(fact, self._listeners(fact))

    def _set(self, fact: str, listeners: list[Callable[..., None]]) -> None:
        """Sets who is told of a fact; of an execution's end also whom a quick success is told (`to_every`), and how
        quick it must be for the others to do without (`skip_s`).
        """
        setattr(self, fact, self._compile(fact, listeners, listeners))
        if fact == "execution_finished":
            limits = {call: float(getattr(getattr(call, "__self__", None), "quick_s", 0.0)) for call in listeners}
            self.skip_s = min((limit for limit in limits.values() if limit), default=math.inf)
            self.to_every = self._compile(fact, [call for call in listeners if not limits[call]], listeners)

    def _least(self, limit: str, fact: str) -> float:
        """The least of those that the fact's listeners set, infinite if nobody listens."""
        found = [getattr(each, limit, 0.0) for each in self._observers if _overrides(each, fact)]
        return min(found, default=math.inf)

    def _compile(
        self, fact: str, told: list[Callable[..., None]], listeners: list[Callable[..., None]]
    ) -> Callable[..., None] | None:
        """One function that calls those of the listeners who are told, written for their number and the fact's
        parameters.

        Written out, three listeners cost 0.16 us; in a loop over `*arguments` 0.32 us.
        """
        if not told:
            return None
        calls = tuple(told)
        if len(listeners) == 1 and fact in getattr(getattr(calls[0], "__self__", None), "guarded", ()):
            return calls[0]

        def failed(index: int, error: Exception) -> None:
            self._detach(fact, listeners, calls[index], error)

        return _teller(fact, len(calls))(failed, calls)

    def detach(self, observer: Observer, fact: str, error: Exception) -> bool:
        """Detaches an observer that raised although it is called directly (`guarded`); False if it is not."""
        own = getattr(observer, fact)
        direct: bool = getattr(self, fact) == own
        if direct:
            self._detach(fact, [own], own, error)
        return direct

    def _listeners(self, fact: str) -> list[Callable[..., None]]:
        return [getattr(observer, fact) for observer in self._observers if _overrides(observer, fact)]

    def _detach(self, fact: str, listeners: list[Callable[..., None]], call: Any, error: Exception) -> None:
        if call not in listeners:
            return
        listeners.remove(call)
        self._set(fact, listeners)
        self.failures += 1
        if fact != "observer_failed" and self.observer_failed is not None:
            self.observer_failed(call.__self__, fact, error)

    def replace(self, old: Observer, new: Observer) -> None:
        """Tells `new` instead of `old` from now on; observers that were detached for raising get another chance."""
        failures = self.failures
        Facts.__init__(self, [new if observer is old else observer for observer in self._observers])
        self.failures = failures

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., None] | None: ...


def _overrides(observer: Observer, fact: str) -> bool:
    return getattr(type(observer), fact, None) not in (None, getattr(Observer, fact))


@cache
def _teller(fact: str, count: int) -> Callable[..., Callable[..., None]]:
    """The source of `_compile`, compiled once per fact and number of listeners: that takes 30 us."""
    names = ", ".join(list(signature(getattr(Observer, fact)).parameters)[1:])
    calls = ", ".join(f"call{i}" for i in range(count))
    tries = [
        f"        try: call{i}({names})\n        except Exception as raised: failed({i}, raised)\n"
        for i in range(count)
    ]  # not `error`: some facts have a parameter of that name, which the clause would take away from who is told next
    scope: dict[str, Any] = {}
    # made of this module's own names only
    exec(
        f"def make(failed, calls):\n    {calls}, = calls\n    def tell({names}):\n{''.join(tries)}    return tell\n",
        scope,
    )
    make: Callable[..., Callable[..., None]] = scope["make"]
    return make
