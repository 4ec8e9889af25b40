"""The span of a kept trace: a `ReadableSpan` for whoever looks, and little more than its record until then.

Most kept spans go from here to our own exporter, which needs neither the objects that the SDK has for ids, links and
attributes, nor to write again what it wrote for the span before: a third of what building and writing it cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceState

from obsdag.telemetry.records import SAMPLED

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

__all__ = ["UNSET", "KeptSpan", "Lead", "Shared", "link_of"]

UNSET = Status(StatusCode.UNSET)
Lead = tuple[str, int, int]
"""A link of our own: its type, trace id and span id."""


class Shared:
    """Name, kind and attributes that several spans have. encoded: as an exporter wrote them; it keeps that here."""

    __slots__ = ("attributes", "encoded", "kind", "name")

    def __init__(self, name: str, attributes: dict[str, Any], kind: SpanKind = SpanKind.INTERNAL) -> None:
        self.name = name
        self.attributes = attributes
        self.kind = kind
        self.encoded: bytes | None = None


class KeptSpan(ReadableSpan):
    """See the module. It becomes whole when anybody asks for anything that a `ReadableSpan` has, or sets it; from then
    on only that counts, as processors may change it.

    source: resource and scope. shared, own: its attributes, no key in both. state: None for an empty one. above: the
    parent. leads: its links. began_ns, ended_ns: Unix nanoseconds.
    """

    __slots__ = (
        *("above", "began_ns", "ended_ns", "happened", "leads", "own", "result", "shared", "source"),
        *("span_id", "state", "trace_id", "whole"),
    )

    def __init__(
        self,
        source: tuple[Resource, InstrumentationScope],
        shared: Shared,
        trace_id: int,
        span_id: int,
        state: TraceState | None,
        above: SpanContext | None,
        began_ns: int,
        ended_ns: int,
        own: dict[str, Any],
        leads: Sequence[Link | Lead] = (),
        happened: Sequence[Event] = (),
        result: Status = UNSET,
    ) -> None:
        self.source = source
        self.shared = shared
        self.trace_id = trace_id
        self.span_id = span_id
        self.state = state
        self.above = above
        self.began_ns = began_ns
        self.ended_ns = ended_ns
        self.own = own
        self.leads = leads
        self.happened = happened
        self.result = result
        self.whole = False

    def get_span_context(self) -> SpanContext:
        """Its ids, without making it whole."""
        if self.whole:
            return super().get_span_context()  # type: ignore[return-value]  # never None: it has been given one
        return SpanContext(self.trace_id, self.span_id, False, SAMPLED, self.state)

    def __getattr__(self, name: str) -> Any:
        """Called for what is missing: for an attribute that `ReadableSpan` sets in its constructor."""
        if name.startswith("__") or self.whole:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        set_before = dict(self.__dict__)
        super().__init__(
            name=self.shared.name,
            context=SpanContext(self.trace_id, self.span_id, False, SAMPLED, self.state),
            parent=self.above,
            resource=self.source[0],
            attributes=self.shared.attributes | self.own,
            events=self.happened,
            links=[each if isinstance(each, Link) else link_of(*each) for each in self.leads],
            kind=self.shared.kind,
            status=self.result,
            start_time=self.began_ns,
            end_time=self.ended_ns,
            instrumentation_scope=self.source[1],
        )
        self.__dict__.update(set_before)
        self.whole = True
        return getattr(self, name)


def link_of(kind: str, trace_id: int, span_id: int) -> Link:
    """A `Lead` as the SDK has it."""
    return Link(SpanContext(trace_id, span_id, False, SAMPLED), {"obsdag.link.type": kind})
