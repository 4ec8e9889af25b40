"""What the core keeps one of per execution, per rare thing of a context, per lent branch and per stall."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar, overload

if TYPE_CHECKING:
    from obsdag.context import Context, OutputContext
    from obsdag.limits import LimitRequest
    from obsdag.tasks.base import Task

__all__ = [
    "CriticalStep",
    "Execution",
    "Failure",
    "Lend",
    "More",
    "Pull",
    "Scope",
    "Stall",
    "TimedWait",
    "Timer",
    "Wait",
    "current_execution",
]

_T = TypeVar("_T")

current_execution: ContextVar[Execution | None] = ContextVar("obsdag_execution", default=None)
"""The execution whose function runs in this frame. Set by the shell where a second attempt or a thread makes it
matter.
"""


class _Seldom(Generic[_T]):
    """An attribute that hardly any execution has set. Those that are stand in one dict, since each field of an
    execution is one more store for all of them.
    """

    def __init__(self, default: _T) -> None:
        self._default = default
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, execution: Execution, owner: type) -> _T: ...

    @overload
    def __get__(self, execution: None, owner: type) -> Self: ...

    def __get__(self, execution: Execution | None, owner: type) -> _T | Self:
        if execution is None:
            return self
        seldom = execution.seldom
        return self._default if seldom is None else seldom.get(self._name, self._default)

    def __set__(self, execution: Execution, value: _T) -> None:
        if execution.seldom is None:
            execution.seldom = {}
        execution.seldom[self._name] = value


class Execution:
    """One attempt of one task on one context.

    context, index: whose, and the position of its `task` in the plan. attempt: from 1. worker: number of the driving
    worker (-1: none). lane: of the visit's entry. started, ended: seconds on the run's clock. released_by: the
    execution whose end made this one ready (None: the context's entry). waits: seconds per state spent waiting
    between release and start, or None. grant: limit permits that it holds. outcome: None while it runs, then one of
    EXECUTION_OUTCOMES. handle: what the shell cancels it by. span: the tracing observer's own slot. watched:
    observers are told of its end however quick it is.

    Seldom set: cancelling: the engine has asked for its cancellation. exempt: it destroyed its own context, so its
    return value still counts (C8). final: it is not tried again, whatever the policy says (T14). abandoned: its
    function has not really returned (T13); retry_at: when its retry is due then.
    """

    __slots__ = (
        "attempt",
        "context",
        "ended",
        "grant",
        "handle",
        "index",
        "lane",
        "outcome",
        "released_by",
        "seldom",
        "span",
        "started",
        "waits",
        "watched",
        "worker",
    )

    # Made by `begun`, whose stores the hot path writes out: a call of an `__init__` takes as long as all of them.
    attempt: int
    context: Context
    ended: float
    grant: LimitRequest | None
    handle: Any
    index: int
    lane: int
    outcome: str | None
    released_by: Execution | None
    seldom: dict[str, Any] | None
    span: Any
    started: float
    waits: list[float] | None
    watched: bool
    worker: int

    abandoned = _Seldom(False)
    cancelling = _Seldom(False)
    exempt = _Seldom(False)
    final = _Seldom(False)
    retry_at = _Seldom[float | None](None)

    @classmethod
    def begun(cls, context: Context, index: int, attempt: int, started: float, worker: int) -> Self:
        """One that begins now: `started`, seconds on the run's clock."""
        self = cls()
        self.context = context
        self.index = index
        self.attempt = attempt
        self.started = started
        self.worker = worker
        self.lane = context._lane
        self.ended = 0.0
        self.watched = False
        self.grant = self.handle = self.outcome = self.released_by = self.seldom = self.span = self.waits = None
        return self

    @property
    def task(self) -> Task:
        """The task, which the run knows by `index`."""
        run = self.context._run
        assert run is not None
        return run.tasks[self.index]

    def __repr__(self) -> str:
        state = self.outcome or "running"
        return f"<Execution of {self.task.id!r} on {self.context.id!r}, attempt {self.attempt}, {state}>"


class More:
    """The rare parts of a context, made when first needed, so that the common context stays small.

    skipped: skipped tasks. dead: task -> mask of its dead in-edges (C4). lends: lent branches by the task that lent
    them (C5). lend: the lent branch this context belongs to. waits: task -> what it waits for, or has tried. handed:
    mask of tasks that wait in a pool or service; room, source: of pulls in that state.
    kept: those at which a frozen context was kept (T3). pending_end: outcome of a discarded context that
    is kept readable (E11). pulls: open loops and maps. arrived_at: the join that is ready on it, -1 for none; arrived:
    it waits there and no longer holds its parent. plain: nothing in here but what is parked matters to an execution
    that returns its own context. released: task -> the execution that made it ready, where that is not the context's
    latest. holder: the ancestor it holds where that is not its parent. why: it was garbage-collected, one of
    GC_REASONS; of one that failed the task where.
    """

    __slots__ = (
        "arrived",
        "arrived_at",
        "dead",
        "handed",
        "holder",
        "kept",
        "lend",
        "lends",
        "pending_end",
        "plain",
        "pulls",
        "released",
        "room",
        "skipped",
        "source",
        "waits",
        "why",
    )

    def __init__(self) -> None:
        self.skipped = 0
        self.dead: dict[int, int] | None = None
        self.lends: dict[int, Lend] | None = None
        self.lend: Lend | None = None
        self.waits: dict[int, Wait] | None = None
        self.handed = self.room = self.source = 0
        self.kept = 0
        self.pending_end: str | None = None
        self.pulls: dict[int, Pull] | None = None
        self.arrived_at = -1
        self.plain = True
        self.released: dict[int, Execution] | None = None
        self.holder: Context | None = None
        self.arrived = False
        self.why = ""

    def wait_of(self, index: int) -> Wait | None:
        """What is known of the waiting of a task, None if that never waited or it is long over."""
        return self.waits.get(index) if self.waits is not None else None

    def each_wait(self) -> tuple[Wait, ...]:
        """Of all tasks of which something is known."""
        return tuple(self.waits.values()) if self.waits else ()

    def state_of_waits(self) -> int:
        """The first state that a waiting task brings the context into; 0 if none waits."""
        return 0 if self.waits is None else min((wait.state for wait in self.waits.values() if wait.state), default=0)


class Wait:
    """A task of a context waits for permits or has them reserved, or (`TimedWait`) remembers its attempts.

    Most contexts that wait have nothing else that is rare, and there may be very many: then it stands in the place of
    `More`, and whoever asks finds here that there is nothing else.

    index: of the task. state: LIMIT_WAIT or RETRY_WAIT while it waits, else 0. on: its request, or
    (`TimedWait`) the time at which it is due; None when that is over.
    """

    __slots__ = ("index", "on", "state")

    failed: int = 0
    waits: Final = ()  # not None: there is one, itself
    skipped: Final = 0
    dead: Final = None
    lends: Final = None
    lend: Final = None
    handed: Final = 0
    room: Final = 0
    source: Final = 0
    kept: Final = 0
    pending_end: Final = None
    pulls: Final = None
    arrived_at: Final = -1
    plain: Final = True
    released: Final = None
    holder: Final = None
    arrived: Final = False
    why: Final = ""

    def __init__(self, index: int, on: LimitRequest | float | None = None) -> None:
        self.index = index
        self.on = on
        self.state = 0

    @property
    def request(self) -> LimitRequest | None:
        """What it has asked the limits for, and may have been granted."""
        return None if isinstance(self.on, float) else self.on

    def wait_of(self, index: int) -> Wait | None:
        """As of `More`."""
        return self if self.index == index else None

    def each_wait(self) -> tuple[Wait, ...]:
        """As of `More`."""
        return (self,)

    def state_of_waits(self) -> int:
        """As of `More`."""
        return self.state


class TimedWait(Wait):
    """A task waits for a time (C10, E6), or was tried before; the timer is itself (`TimerHeap.arm`).

    context: whose, only while it waits for a time: else the two would keep each other alive. failed: attempts so far
    that failed. first_started: the start of the first of them, seconds on the run's clock.
    """

    __slots__ = ("context", "failed", "first_started")

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.context: Context | None = None
        self.failed = 0
        self.first_started = 0.0

    @property
    def due(self) -> float | None:
        """When it is ready again, seconds on the run's clock; None while no timer is set."""
        return self.on if isinstance(self.on, float) else None

    @due.setter
    def due(self, when: float | None) -> None:
        self.on = when

    def fire(self, now: float) -> None:
        """The time has come."""
        context, self.context = self.context, None
        assert context is not None
        assert context._run is not None  # it was armed there
        context._run.time_has_come(context, self, now)


class Lend:
    """A branch of `parent` that task `index` lent to children (C5).

    mask: the tasks below `index`, not ready on the parent meanwhile. children: in order of creation, kept only while a
    join below needs them (`keeps`). living: children that have not ended. arrived: join index -> children that wait
    there. outcomes: how children ended: outcome -> number. pulling: its map has not ended; mapped: it
    is a map's. latest: the execution that brought the last child here, or ended it.
    """

    __slots__ = (
        "arrived",
        "children",
        "failed",
        "first_arrival",
        "index",
        "joining",
        "keeps",
        "latest",
        "living",
        "mapped",
        "mask",
        "outcomes",
        "parent",
        "pulling",
    )

    def __init__(self, parent: Context, index: int, mask: int, keeps: bool) -> None:
        self.parent = parent
        self.index = index
        self.mask = mask
        self.keeps = keeps
        self.children: list[Context] = []
        self.living = 0
        self.arrived: dict[int, int] = {}
        self.outcomes: dict[str, int] = {}
        self.failed: BaseException | None = None
        self.first_arrival = 0.0
        self.latest: Execution | None = None
        self.pulling = self.mapped = False
        self.joining = -1


class Pull:
    """An open loop or map on `context`: the shell holds its generator, the core decides when the next item is asked
    for.

    items: how many came. waiting: whether its LoopContext is in the queue, or waits for room.
    """

    __slots__ = (
        "context",
        "execution",
        "generator",
        "grant",
        "index",
        "items",
        "lend",
        "marker",
        "queued_at",
        "state",
        "task",
    )

    def __init__(self, context: Context, task: Task, index: int) -> None:
        self.context = context
        self.task = task
        self.index = index
        self.items = 0
        self.generator: Any = None
        self.marker: Any = None
        self.queued_at = 0.0
        self.grant: LimitRequest | None = None
        self.lend: Lend | None = None
        self.state = ""
        self.execution: Execution | None = None


class Scope:
    """All that was made from one submitted context, by children or by replacement (S1).

    living: contexts of it that have not ended, and executions that destroyed their own (C8). outputs, failures: what
    came of it.
    """

    __slots__ = ("failures", "living", "on_done", "outputs")

    def __init__(self, on_done: Callable[[Scope], None]) -> None:
        self.on_done = on_done
        self.living = 0
        self.outputs: list[OutputContext] = []
        self.failures: list[Failure] = []


class Timer:
    """Something that is to be done at `when`; `due` is cleared instead of searching the heap for it."""

    __slots__ = ("action", "argument", "due", "when")

    def __init__(self, when: float, action: Callable[[Any, float], None], argument: Any) -> None:
        self.when = when
        self.due: float | None = when
        self.action = action
        self.argument = argument

    def fire(self, now: float) -> None:
        """Does it."""
        self.action(self.argument, now)


@dataclass(frozen=True, slots=True)
class Stall:
    """Why a context cannot go on (E8): the task it waits at, the upstreams that are missing, and a sentence."""

    context: Context
    task: str
    missing: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        missing = f" (missing upstream: {', '.join(self.missing)})" if self.missing else ""
        return f"context {self.context.id!r} is stalled at task {self.task!r}{missing}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A context that failed (E6): where, after how many attempts, and with which exception."""

    context: Context
    task: str
    attempts: int
    exception: BaseException

    def __str__(self) -> str:
        text = str(self.exception)
        error = f"{type(self.exception).__name__}: {text}" if text else type(self.exception).__name__
        return f"context {self.context.id!r} failed at task {self.task!r} after {self.attempts} attempt(s): {error}"


@dataclass(frozen=True, slots=True)
class CriticalStep:
    """An execution of a root. slack_s: how much later it could have ended without delaying the root's end."""

    task: str
    context_id: str
    started: float
    ended: float
    slack_s: float
    critical: bool
