"""The fields of a run and their bookkeeping: states, counts, the ledger, the conservation law (SEMANTICS C9).

Who may change what: everything here is changed on the run's thread only, by the transitions of the layers above. Plain
integers and lists of fixed length are read by scrapes from other threads.
"""

from __future__ import annotations

import itertools
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from operator import add
from typing import TYPE_CHECKING, Any

from obsdag.core.observer import Facts
from obsdag.core.queue import IDLE, QUEUED, VISITED, ContextQueue, TimerHeap
from obsdag.core.records import Execution, More, Wait
from obsdag.core.states import ENTRY_KINDS, LANES, OUTCOMES, STATES, State
from obsdag.errors import InternalError
from obsdag.limits import ConcurrencyLimit, Limit
from obsdag.plan import indices

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.context import Context, LoopContext, OutputContext
    from obsdag.core.records import Failure, Lend, Scope, Stall, Timer
    from obsdag.limits import LimitRequest
    from obsdag.plan import Plan, Step
    from obsdag.runtime import Runtime

__all__ = ["RunBase", "alive", "more_of", "spent_by_state", "wait_of"]

_RUNNING, _POOL_WAIT, _QUEUED = State.RUNNING.value, State.POOL_WAIT.value, State.QUEUED.value
_SERVICE_WAIT, _LIMIT_WAIT, _RETRY_WAIT = State.SERVICE_WAIT.value, State.LIMIT_WAIT.value, State.RETRY_WAIT.value
_FROZEN, _DISCARDED, _LENT = State.FROZEN.value, State.DISCARDED.value, State.LENT.value
_OUTCOME_INDEX = {outcome: index for index, outcome in enumerate(OUTCOMES)}
_KIND_INDEX = {kind: index for index, kind in enumerate(ENTRY_KINDS)}
_CONTEXTS_PER_CHECK = 100  # looked at per transition, with `debug`
_run_numbers = itertools.count(1)


def _nobody(_: object) -> None:
    """Where outputs go until the shell says where."""


def _nothing() -> None:
    """What a nudge does until the shell says what."""


def alive(context: Context) -> bool:
    """Whether it has not ended, nor is only kept readable until the run ends (E11)."""
    return context._outcome is None and context._state != _DISCARDED


def more_of(context: Context) -> More:
    """The rare parts of a context, made now if it has none yet. What `_more` was before is in them."""
    more = context._more
    if type(more) is More:
        return more
    made = context._more = More()
    if more is not None:
        made.waits = {wait.index: wait for wait in more.each_wait()}
    return made


def wait_of(context: Context, index: int) -> Wait | None:
    """What is known of the waiting of a task on a context."""
    return None if context._more is None else context._more.wait_of(index)


def spent_by_state(ledger: float | list[float]) -> list[float]:
    """Seconds by state of what `Context._ledger` says in short."""
    if isinstance(ledger, list):
        return ledger.copy()
    spent = [0.0] * len(STATES)
    spent[_QUEUED] = ledger
    return spent


class RunBase:
    """What a run owns. `dispatch` is set by the shell: how a call from any thread reaches the run (`Context.freeze`
    ...).
    """

    # Not for memory: a dict of so many fields is shared by no two runs, so that methods are looked up anew in each.
    # That is 4 % of an execution here, 1 % in the shell and in tracing's observer.
    __slots__ = (
        *("__weakref__", "_deadlines", "_freezes", "_grants", "_settling", "_touched", "_unchecked", "_unreturned"),
        *("_work", "active", "at_joins", "begun", "below", "bits", "buffered", "busy_s", "busy_workers", "bypass"),
        *("caller", "cancels", "cause", "clock", "closed_pulls", "closings", "config", "context_deadline"),
        *("contexts", "debug", "dirty", "discarded", "dispatch", "done_scopes", "emit", "entered", "entry_done"),
        *("entry_ready", "epoch", "execution_class", "executions_total", "facts", "failures", "failures_total"),
        *("finished", "first_entered", "gc", "id", "idle_at", "joins_pending", "keeping", "kind", "limiter_names"),
        *("limits", "living", "max_live", "not_plain", "nudge", "plan", "pools", "queue", "quick_executions"),
        *("quick_seconds", "quick_visits", "quick_waits_s", "recording", "records", "reserved", "resumed"),
        *("retries_total", "rooms", "runtime", "sink_bit", "stalls", "started", "state_counts", "steps", "stopping"),
        *("task_started", "tasks", "timers", "told_executions", "told_seconds", "unseen", "visit_since"),
        *("waiting_limits",),
    )

    def __init__(
        self, plan: Plan, config: ExecutorConfig, runtime: Runtime, clock: Callable[[], float], epoch: float = 0.0
    ) -> None:
        self.id = f"{secrets.token_hex(4)}-{next(_run_numbers)}"
        self.kind = "run"
        self.plan = plan
        self.config = config
        self.runtime = runtime
        self.clock = clock
        self.epoch = epoch
        self.started = clock()
        self.first_entered: float | None = None
        self.idle_at: float | None = None  # when what waits for frozen contexts is given up
        self.resumed: dict[tuple[Context, int], int] | None = None  # of restored contexts, items that came before
        self.facts = Facts()
        self.recording = self.keeping = False
        self.unseen = True
        self.execution_class: type[Execution] = Execution
        self.begun = Execution.begun
        self.queue = ContextQueue()
        self.timers = TimerHeap()
        self.rooms: list[LoopContext] = []  # pulls that wait for room, in order (E16)
        self._init_counts()
        # What the shell has to do next; `dirty` says that there is something, or that `next_wake` has changed.
        self.cancels: list[Execution] = []
        self.closed_pulls: list[Any] = []
        self.emit: Callable[[OutputContext], None] = _nobody
        self.failures: list[Failure] = []
        self.failures_total = 0
        self.stalls: list[Stall] = []
        self.stopping = False
        self.done_scopes: list[Scope] = []
        self.dispatch: Callable[[Callable[..., Any], Context], None] | None = None
        self.cause: Execution | None = None
        self._work: list[Context] = []
        self._touched: list[Lend] = []
        self._unreturned: dict[Execution, None] = {}  # abandoned, and tried again when they have returned (T13)
        self._freezes: dict[Context, None] = {}  # what the run knows; `_frozen` is what was asked for last
        self._grants: deque[LimitRequest] = deque()
        self.reserved = self.buffered = 0
        self.pools: Any = None
        self.dirty = False
        self.nudge: Callable[[], None] = _nothing
        self.caller: Callable[[], Execution | None] = _nothing  # whose function is asking
        self.closings: list[Any] = []
        self._settling = False
        self._unchecked = 0
        self.limits = self._limits_by_task()
        self.limiter_names = self._limiter_names()
        self.gc = config.enable_context_gc
        self.bypass = config.enable_context_bypass
        self.context_deadline = config.context_deadline
        self.max_live = config.max_live_contexts
        self.debug = config.debug
        self.tasks, self.bits = plan.tasks, plan.bit
        self.below = plan.below
        self.entry_done, self.entry_ready = plan.bit[plan.source], plan.down[plan.source]
        self.sink_bit = plan.bit[plan.sink]
        self.not_plain = self.sink_bit | plan.joins  # what is no task to be run when it is ready
        self.steps: Sequence[Step | None] = [None] * len(plan.tasks) if config.debug else plan.steps

    # --- set-up

    def _init_counts(self) -> None:
        """What is counted as it happens; the layout of the lists never changes, so that scrapes may read them."""
        plan, workers = self.plan, self.config.context_worker_num
        # Contexts: the living ones in order of entering, and counts that are kept apart on purpose (C9).
        self.contexts: dict[Context, None] = {}
        self._deadlines: dict[Context, Timer] = {}  # of living roots, as the next
        self.records: dict[Context, list[Execution]] = {}  # for observers that need them
        self.living = 0
        self.discarded = 0
        self.at_joins = 0
        self.entered = [0] * len(ENTRY_KINDS)
        self.finished = [0] * len(OUTCOMES)
        self.state_counts = [0] * len(STATES)
        # Executions.
        self.active = 0
        self.waiting_limits = 0
        self.executions_total = 0
        self.retries_total = 0
        self.task_started = [0] * len(plan.tasks)
        # Quick ones, of which those are told only who want all (`Observer.quick_s`), apart: see `task_executions`.
        self.told_executions = [0] * len(plan.tasks)
        self.told_seconds = [0.0] * len(plan.tasks)
        self.quick_executions = [0] * len(plan.tasks)
        self.quick_seconds = [0.0] * len(plan.tasks)
        self.joins_pending = [0] * len(plan.tasks)
        self.busy_workers = 0
        # Visits: by lane, those that nobody was told of, and what they had waited; by worker (the last: users' own),
        # the start of the one that goes on, else -1, and the time that those before took.
        self.quick_visits = [0] * len(LANES)
        self.quick_waits_s = [0.0] * len(LANES)
        self.visit_since = [-1.0] * (workers + 1)
        self.busy_s = [0.0] * (workers + 1)

    def let_go_of_outputs(self) -> None:
        """Keeps nothing alive that was given out: contexts refer to the run, and freeing a cycle is the collector's."""
        self.emit = _nobody

    def observe(self, facts: Facts) -> None:
        """Sets who is told; before the first context enters."""
        self.facts = facts
        self.keeping = facts.needs_slack
        self.recording = facts.needs_records or facts.needs_slack
        # Nobody looks at single executions, so one object may serve for one after the other.
        told = facts.execution_started or facts.execution_finished
        self.unseen = told is None and not self.recording
        self.execution_class = facts.execution_class
        self.begun = self.execution_class.begun  # bound once: a method of an abstract class is looked up each time

    def _limits_by_task(self) -> list[tuple[Limit, ...]]:
        """The task's own limiters, and one of this run for `parallel_num` or for a stream (one at a time, T5)."""
        limits: list[tuple[Limit, ...]] = [()] * len(self.plan.tasks)
        for index in indices(self.plan.limited):
            task = self.plan.tasks[index]
            parallel = 1 if task.shape == "stream" else task.config.parallel_num
            own = (ConcurrencyLimit(parallel, name=f"parallel:{task.id}"),) if parallel else ()
            limits[index] = (*task.config.limits, *own)
        return limits

    def _limiter_names(self) -> dict[Limit, str]:
        names: dict[Limit, str] = {}
        for index in indices(self.plan.limited):
            for limit in self.limits[index]:
                names.setdefault(limit, limit.name or self.plan.tasks[index].id)
        return names

    # --- visits

    def _begin_visit(self, context: Context, worker: int, lane: int, waited_s: float, now: float) -> None:
        self.visit_since[worker] = now
        if waited_s < self.facts.quick_wait_s:
            self.quick_visits[lane] += 1
            self.quick_waits_s[lane] += waited_s
        elif (tell := self.facts.visit_started) is not None:
            tell(context, worker, lane, waited_s, now)

    def _end_visit(self, context: Context, worker: int, busy_s: float, now: float) -> None:
        self.visit_since[worker] = -1.0
        self.busy_s[worker] += busy_s
        if (tell := self.facts.visit_finished) is not None:
            tell(context, worker, busy_s, now)

    # --- states and the ledger

    def _move(self, context: Context, state: int, now: float) -> None:
        """Moves a living context to `state`; time spent in the old one goes to the ledger of a root."""
        old = context._state
        if old != state:
            counts = self.state_counts
            counts[old] -= 1
            counts[state] += 1
            context._state = state
            self._leave_state(context, old, now)

    def _leave_state(self, context: Context, old: int, now: float) -> None:
        stayed = now - context._since
        context._since = now
        if old > _RUNNING and stayed > 0.0:
            self._waited(context, old, stayed)
        if (tell := self.facts.state_left) is not None and stayed >= self.facts.min_stay_s:
            tell(context, old, stayed, now)

    def _waited(self, context: Context, state: int, stayed_s: float) -> None:
        if context._ledger is not None:
            self._book(context, state, stayed_s)
        if self.recording:
            if context._waits is None:
                context._waits = [0.0] * len(STATES)
            context._waits[state] += stayed_s

    def _book(self, root: Context, state: int, stayed_s: float) -> None:
        ledger: Any = root._ledger
        if type(ledger) is list:
            ledger[state] += stayed_s
        elif state == _QUEUED:
            root._ledger = ledger + stayed_s
        else:
            root._ledger = spent = spent_by_state(ledger)
            spent[state] += stayed_s

    def _restate(self, context: Context, now: float) -> None:
        """Puts a living context into the first state of the enumeration that applies to it."""
        if context._outcome is None and context._state != _DISCARDED:
            state = self._state_of(context)
            if state != context._state:
                self._move(context, state, now)

    def _state_of(self, context: Context) -> int:  # noqa: C901 - one line per state, in their order
        more = context._more
        if context._running & ~(0 if more is None else more.handed):
            return _RUNNING
        if more is not None and more.handed & ~self.plan.services:
            return _POOL_WAIT
        if context._place == QUEUED:
            return _QUEUED
        if context._place == VISITED:
            return _RUNNING
        if more is not None:
            if more.handed:
                return _SERVICE_WAIT
            if waits := more.state_of_waits():
                return waits
            if more.room:
                return int(State.ROOM_WAIT)
            if more.arrived_at >= 0:
                return int(State.JOIN_WAIT)
            if more.lends:
                return _LENT
            if more.source:
                return int(State.SOURCE_WAIT)
        return _FROZEN if context in self._freezes else _LENT

    def ledger_of(self, context: Context) -> dict[str, float]:
        """Seconds per state of a root so far; the parts add up to its time in the run."""
        if context._ledger is None:
            return {}
        spent = spent_by_state(context._ledger)
        end = context._since
        if context._outcome is None:
            end = self.clock()
            spent[context._state] += end - context._since
        spent[_RUNNING] = 0.0
        spent[_RUNNING] = max(0.0, end - context._entered - sum(spent))
        return dict(zip(STATES, spent, strict=True))

    # --- views for observers and pages

    def queue_lengths(self) -> tuple[int, int, int]:
        """Entries of the three lanes."""
        continuing, new, loop = self.queue.lengths()
        return continuing, new, loop + len(self.rooms)

    @property
    def task_executions(self) -> list[int]:
        """Executions that have ended, by task index."""
        return list(map(add, self.told_executions, self.quick_executions))

    @property
    def task_seconds(self) -> list[float]:
        """Seconds that they took, by task index."""
        return list(map(add, self.told_seconds, self.quick_seconds))

    @property
    def task_running(self) -> list[int]:
        """Executions that run now, by task index."""
        return [started - ended for started, ended in zip(self.task_started, self.task_executions, strict=True)]

    @property
    def timers_armed(self) -> int:
        """Retry and deadline timers that are set."""
        return self.timers.armed

    @property
    def counts(self) -> dict[str, int]:
        """`entered` and each outcome, with its number."""
        return {"entered": sum(self.entered), **dict(zip(OUTCOMES, self.finished, strict=True))}

    def oldest_entered(self) -> float | None:
        """When the oldest living context entered (run clock); frozen ones and inputs of loops do not count."""
        for context in itertools.islice(self._snapshot(), 1000):
            if context not in self._freezes and (context._more is None or not context._more.source):
                return context._entered
        return None

    def _snapshot(self) -> Iterator[Context]:
        for _ in range(8):
            try:
                return iter(list(itertools.islice(self.contexts, 1000)))
            except RuntimeError:  # changed under the reader's thread: try again
                continue
        return iter(())

    # --- conservation (C9)

    def check_transition(self) -> None:
        """With `debug`, after every transition: the sums; and each context's books as often as that is in proportion.

        Looking at each of n contexts after each transition would make a run of many living ones quadratic.
        """
        self._unchecked += _CONTEXTS_PER_CHECK
        deep = self._unchecked >= self.living
        if deep:
            self._unchecked = 0
        self.check(deep)

    def check(self, deep: bool = False) -> None:
        """Raises InternalError if entered != living + ended, or, with `deep`, if any context's own books do not
        balance.
        """
        entered, ended = sum(self.entered), sum(self.finished)
        if entered != self.living + ended or self.living != len(self.contexts) or sum(self.state_counts) != self.living:
            raise InternalError(
                f"run {self.id}: entered {entered} != living {self.living} (known {len(self.contexts)}, "
                f"in states {sum(self.state_counts)}) + ended {ended}; newest context "
                f"{next(reversed(self.contexts)).id if self.contexts else None!r}"
            )
        if deep:
            for context in self.contexts:
                self._check_context(context)

    def _check_context(self, context: Context) -> None:
        problem = None
        if context._outcome is not None:
            problem = f"ended as {context._outcome} and still counted as living"
        elif context._state == _DISCARDED or context._state < 0:
            problem = None if context._state == _DISCARDED else "has no state"
        elif context._holds < 0:
            problem = f"is held {context._holds} times"
        elif context._running & context._ready:
            problem = f"tasks {self.plan.names(context._running & context._ready)} are both running and ready"
        elif context._ready and context._place == IDLE and context not in self._freezes:
            problem = f"tasks {self.plan.names(context._ready)} are ready and nobody will start them"
        elif not (context._ready or context._running or context._holds or context._place) and not (
            context._more is not None and context._more.arrived
        ):
            problem = "is held by nothing and has not ended"
        if problem:
            raise InternalError(f"run {self.id}: context {context.id!r} {problem}")
