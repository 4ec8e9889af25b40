"""What tracing keeps while nobody knows whether it is wanted: a record per execution and root (TELEMETRY section 3).

    Context._trace -> ContextTrace -> RootTrace   one ContextTrace per context; a root's whole tree shares its RootTrace
    TracedExecution                               is the current OpenTelemetry context while the function runs
    Execution.span -> ExecutionSpan               its span, made when somebody asks for it or the record is wanted

A record is as little as can be, because there is one per execution and most are thrown away:
    TracedExecution             on a root's own context, which lives as long as its trace is undecided; from its start
    (ExecutionSpan, ...)        any other execution, see `record_of`: nothing that would keep a child's data alive
    (None, ContextTrace, ...)   a wait: state, started, ended

All times are on the run's clock. Who may change what: everything on the run's thread, except that tracing's thread
takes records away (under the pipeline's lock), that spans are made and `ExecutionSpan.details` written from whatever
thread the task runs in (under `details_lock`).

No object here refers to itself in a circle once its root has ended, so that nothing waits for the cycle collector.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Self

from opentelemetry.context import Context as OtelContext
from opentelemetry.trace import (
    DEFAULT_TRACE_OPTIONS,
    Span,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from obsdag.telemetry.attach import OwnContext

if TYPE_CHECKING:
    from obsdag.core.records import Execution
    from obsdag.telemetry.carrier import Caller

__all__ = [
    "MAX_DETAILS",
    "SAMPLED",
    "UNIT_BYTES",
    "ContextTrace",
    "Details",
    "ExecutionSpan",
    "Part",
    "RootMore",
    "RootTrace",
    "details_lock",
    "new_span_id",
    "new_trace_id",
    "random_bits",
    "span_in",
]

SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
MAX_DETAILS: Final = 128
"""Attributes and events that users may set on one span: the SDK's own default."""
UNIT_BYTES: Final = 512
"""What a buffered span counts for in `max_buffered_bytes`: tuple, span and numbers were measured at about 400."""

_NO_STATE: Final = TraceState()


_random = random.Random(os.urandom(32))
random_bits = _random.getrandbits
details_lock = threading.Lock()


def _renew_ids() -> None:
    _random.seed(os.urandom(32))  # a forked child must not give out its parent's ids


if hasattr(os, "register_at_fork"):  # pragma: no branch - absent on Windows only
    os.register_at_fork(after_in_child=_renew_ids)


def new_trace_id() -> int:
    """128 random bits, never 0, from a generator of our own: a user's `random.seed` changes nothing."""
    return random_bits(128) or 1


def new_span_id() -> int:
    """64 random bits, never 0."""
    return random_bits(64) or 1


class Details:
    """What a task said about its own span, and the rare parts of an execution's record.

    attributes, events (name, attributes, Unix nanoseconds), links, status: of the user's calls. upstream: the spans
    that a join was called with, at most 64, and upstream_count, their true number. dispatch: span id and start of a
    hand-over to a process.
    """

    __slots__ = (
        "attributes",
        "dispatch",
        "dropped",
        "events",
        "iteration",
        "links",
        "status",
        "upstream",
        "upstream_count",
    )

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}
        self.events: list[tuple[str, Mapping[str, Any], int]] = []
        self.links: list[tuple[SpanContext, Mapping[str, Any]]] = []
        self.status: Status | None = None
        self.upstream: list[ExecutionSpan] = []
        self.upstream_count = 0
        self.dispatch: tuple[int, float] | None = None
        self.iteration = 0
        self.dropped = 0


class Part:
    """A trace that a root's spans are in; further ones when `max_spans_per_trace` is reached (`continuation`)."""

    __slots__ = ("context", "span_id", "started", "trace_id")

    def __init__(self, trace_id: int, span_id: int, started: float) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self.started = started
        self.context = SpanContext(trace_id, span_id, False, SAMPLED)


class RootMore:
    """The rare parts of a root's record, made when first needed.

    caller: who submitted it. base: the OpenTelemetry context (baggage) its executions run in. links: (type, trace id,
    span id) of its context span. parts: all its traces, in order, None while there is one, which `part` then
    remembers. pull: for one pull of a loop: "open" until it has given an item, "adopted" by that, or "ended" without
    one; "" for others. iteration: which pull it is, from 1. outcome ... critical: how its context ended, noted only
    where it is exported; critical: (raw id, task index, start) of executions. error: exception type and text of what
    failed it. tail: executions that still run after their context ended. joins: (ContextTrace of the parent, join) ->
    arrived spans, number. held: users' spans waiting for the decision; user_spans: ids known to a holder -> whether it
    ended. over: a reason to keep it was over its budget. units: buffer places beside its records. latest: tracing's
    thread's own memory.
    """

    __slots__ = (
        *("base", "caller", "closed", "critical", "dropped", "ended", "error", "finished", "held", "iteration"),
        *("joins", "latest", "ledger", "links", "marked", "outcome", "over", "parent_id", "part", "parts", "pull"),
        *("scheduled", "stall", "tail", "units", "user_spans"),
    )

    def __init__(self) -> None:
        self.caller: Caller | None = None
        self.base: OtelContext | None = None
        self.links: list[tuple[str, int, int]] = []
        self.part: Part | None = None
        self.parts: list[Part] | None = None
        self.parent_id = ""
        self.iteration = 0
        self.pull = ""
        self.outcome = ""
        self.ended = self.closed = 0.0
        self.ledger: dict[str, float] = {}
        self.error: tuple[str, str] | None = None
        self.stall: tuple[str, tuple[str, ...]] | None = None
        self.critical: frozenset[tuple[str | int, int, float]] = frozenset()
        self.tail: set[ExecutionSpan] = set()
        self.joins: dict[int, dict[int, tuple[list[ExecutionSpan], list[int]]]] = {}
        self.held: list[tuple[Callable[[Any], None], Any]] = []
        self.user_spans: dict[int, tuple[dict[int, Any], bool]] = {}
        self.over = self.finished = self.scheduled = self.marked = False
        self.units = self.dropped = 0
        self.latest: dict[tuple[int, int], tuple[ExecutionSpan, str]] = {}


class ContextTrace:
    """What tracing knows of one context: its root's trace, the span that made it (None for a root).

    last: its latest ended span, while it lives. top: this is the context that `context {dag}` is about.
    """

    __slots__ = ("last", "maker", "raw_id", "root")

    top = plain = False
    # No `__init__`: that would be another call for each root.
    last: ExecutionSpan | None
    maker: ExecutionSpan | None
    raw_id: str | int
    root: RootTrace

    @classmethod
    def below(cls, root: RootTrace, raw_id: str | int, maker: ExecutionSpan | None) -> Self:
        """Of a context that belongs to the tree of `root`."""
        self = cls()
        self.root, self.raw_id, self.maker, self.last = root, raw_id, maker, None
        return self


class RootTrace(ContextTrace):
    """One trace to be decided on: a root context and all that descends from it. It is its root's own `ContextTrace`.

    tracer: the run's observer. raw_id: `Context._id` of its context. trace_id, span_id: of the trace it writes to now
    and of its `context` span. left: executions until `max_spans_per_trace`. open: living contexts, and executions that
    outlive theirs. records: see the module. hot: an execution's end needs more than a span and a record; plain:
    nor does its start. decision: one of TRACE_DECISIONS once taken.
    """

    __slots__ = (
        *("_span_id", "decision", "entered", "hot", "left", "more", "open", "plain", "records", "trace_id", "tracer"),
    )

    top = True
    maker = None

    tracer: Any
    entered: float
    left: int
    trace_id: int
    records: list[Any]
    open: int
    hot: bool
    plain: bool
    decision: str | None
    more: RootMore | None
    _span_id: int

    @classmethod
    def begun(cls, tracer: Any, raw_id: str | int, entered: float, left: int) -> Self:
        """One whose context enters now."""
        self = cls()
        self.tracer = tracer
        self.raw_id = raw_id
        self.entered = entered
        self.left = left
        self.trace_id = random_bits(128) or 1
        self.records = []
        self.open = 1
        self.hot, self.plain = False, True
        self.decision = self.more = self.last = None
        self._span_id = 0
        return self

    @property
    def root(self) -> RootTrace:  # type: ignore[override]  # an attribute would be a circle
        """Itself."""
        return self

    @property
    def span_id(self) -> int:
        """Of its `context` span, made when somebody first asks."""
        if not self._span_id:
            with details_lock:
                if not self._span_id:
                    self._span_id = random_bits(64) or 1
        return self._span_id

    @span_id.setter
    def span_id(self, span_id: int) -> None:
        self._span_id = span_id

    def rare(self) -> RootMore:
        """Its rare parts, made now if it has none yet; from any thread."""
        if self.more is None:
            with details_lock:
                if self.more is None:
                    self.more = RootMore()
        return self.more

    @property
    def first(self) -> Part:
        """Where its trace began; the ratio goes by that one's id."""
        more = self.more
        if more is None:
            return Part(self.trace_id, self.span_id, self.entered)
        if more.parts is not None:
            return more.parts[0]
        if more.part is None:
            more.part = Part(self.trace_id, self.span_id, self.entered)
        return more.part

    @property
    def kept(self) -> bool:
        """Whether it is exported, as far as is known."""
        return self.decision is not None and self.decision not in ("dropped", "over_budget")

    def part_of(self, trace_id: int) -> Part:
        """The part whose trace has that id; the first one for an unknown id."""
        if self.more is not None and self.more.parts is not None:
            return next((part for part in self.more.parts if part.trace_id == trace_id), self.more.parts[0])
        return self.first


class ExecutionSpan(OwnContext, Span):
    """The span of an execution: ids at once, everything else only if somebody asks or the trace is kept.

    trace_id, id: its own. trace: of its context. execution: while it runs. Made by `span_in`.
    """

    __slots__ = ("execution", "trace", "trace_id")

    # Class attributes, and the id only when somebody asks: most spans are thrown away without (0.05 us).
    details: Details | None = None
    _id = 0
    trace: ContextTrace
    trace_id: int
    execution: Execution | None

    @property
    def ended(self) -> bool:
        """Whether calls change nothing more."""
        return self.execution is None or self.execution.outcome is not None

    @property
    def id(self) -> int:
        """The span id, made when somebody first asks."""
        if not self._id:
            with details_lock:
                if not self._id:
                    self._id = random_bits(64) or 1
        return self._id

    def get_span_context(self) -> SpanContext:
        """Trace id, span id, sampled: children are recorded, and held by `hold` until the decision."""
        more = self.trace.root.more
        state = _NO_STATE if more is None or more.caller is None else more.caller.trace_state_of(self.trace_id)
        return SpanContext(self.trace_id, self.id, False, SAMPLED, state)

    def is_recording(self) -> bool:
        """Whether the execution still runs."""
        return not self.ended

    def set_attribute(self, key: str, value: Any) -> None:
        """Sets an attribute of the `execute` span, exported if its trace is."""
        self.set_attributes({key: value})

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Sets several attributes of the `execute` span."""
        details = self._writable(_size_of(attributes))
        if details is None:
            return
        with details_lock:
            for key, value in attributes.items():
                if key in details.attributes or len(details.attributes) < MAX_DETAILS:
                    details.attributes[key] = value
                else:
                    details.dropped += 1

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Adds an event to the `execute` span; timestamp in Unix nanoseconds, now on the run's clock by default."""
        details = self._writable(len(name) + _size_of(attributes))
        if details is None:
            return
        at = timestamp if timestamp is not None else self.trace.root.tracer.unix_ns_now()
        with details_lock:
            if len(details.events) < MAX_DETAILS:
                details.events.append((name, dict(attributes or {}), at))
            else:
                details.dropped += 1

    def add_link(self, context: SpanContext, attributes: Any = None) -> None:
        """Adds a link to the `execute` span."""
        details = self._writable(64 + _size_of(attributes))
        if details is not None and context is not None and context.is_valid:
            with details_lock:
                if len(details.links) < MAX_DETAILS:
                    details.links.append((context, dict(attributes or {})))

    def record_exception(
        self, exception: BaseException, attributes: Any = None, timestamp: int | None = None, escaped: bool = False
    ) -> None:
        """Adds an `exception` event; its text goes through the telemetry's `redact`."""
        event = self.trace.root.tracer.texts.attributes(exception)
        self.add_event("exception", {**event, "exception.escaped": str(escaped), **(attributes or {})}, timestamp)

    def set_status(self, status: Any, description: str | None = None) -> None:
        """An error status is kept for an execution that succeeds otherwise."""
        details = self._writable(64)
        if details is None:
            return
        if isinstance(status, StatusCode):
            status = Status(status, description if status is StatusCode.ERROR else None)
        if isinstance(status, Status) and status.status_code is StatusCode.ERROR:
            details.status = status

    def update_name(self, name: str) -> None:
        """Nothing: span names are a closed set, so that they can be counted and searched."""

    def end(self, end_time: int | None = None) -> None:
        """Nothing: the execution ends when its task does."""

    def detail(self) -> Details:
        """Its details, made now if it has none yet."""
        if self.details is None:
            with details_lock:
                if self.details is None:
                    self.details = Details()
        return self.details

    def _writable(self, size_bytes: int) -> Details | None:
        """The details, if the execution runs and the buffers have room for `size_bytes` more; the loss is counted."""
        if self.ended:
            return None
        if not self.trace.root.tracer.charge(self.trace.root, 1 + size_bytes // UNIT_BYTES):
            return None
        return self.detail()


def span_in(
    trace: ContextTrace, trace_id: int, base: OtelContext | None = None, execution: Execution | None = None
) -> ExecutionSpan:
    """The span of an execution that begins; base: what else is in its OpenTelemetry context, baggage."""
    span = ExecutionSpan() if base is None else ExecutionSpan(base)
    span.trace, span.trace_id, span.execution = trace, trace_id, execution
    return span


def _size_of(attributes: Any) -> int:
    if not attributes:
        return 0
    size = 0
    for key, value in attributes.items():
        size += len(key) + (len(value) if isinstance(value, str | bytes | list | tuple) else 8)
    return size


assert DEFAULT_TRACE_OPTIONS == 0  # an absent flag means "not sampled" throughout
