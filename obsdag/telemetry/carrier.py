"""Trace context in and out: W3C `traceparent`, `tracestate` and `baggage` (SEMANTICS S4, T12).

capture_caller(...) -> Caller      put into `Context._trace` by whoever submits a context, before it enters
carry() -> carrier, carried        the present trace and baggage, for a run that begins on another machine, and there
inject(execution) -> carrier       what goes to a process or machine with an execution
remote_span(carrier)               there: the trace goes on while the function runs
absorb(execution, payload)         here: what the far side noted, taken back with the result
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.baggage import get_all, remove_baggage
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context as OtelContext
from opentelemetry.context import attach, detach, get_current
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceState,
    get_current_span,
    get_tracer_provider,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from obsdag.errors import ConfigError
from obsdag.telemetry.attach import SPAN_KEY
from obsdag.telemetry.executions import span_of
from obsdag.telemetry.records import MAX_DETAILS, SAMPLED, new_span_id

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.core.records import Execution

__all__ = [
    "Caller",
    "RemoteSpan",
    "absorb",
    "caller_of",
    "capture_caller",
    "carried",
    "carry",
    "inject",
    "remote_span",
    "restore_callers",
    "returning",
]

_W3C: Final = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])
_NO_STATE: Final = TraceState()
_MARK: Final = "obsdag.span"
_START: Final = b'{"obsdag.span"'
_returning: list[bytes] = []
FLUSH_S: Final = 0.5
"""How long a worker process may take to flush the spans of its own provider before the result goes back."""


class Caller:
    """Who submitted a context: span context (None if there is none), how it relates, and the caller's baggage.

    mode: "child" (the context's span is a child of the caller's) or "link" (a trace of its own, linked to it). Raises
    ConfigError.
    """

    __slots__ = ("base", "mode", "span_context")

    def __init__(self, span_context: SpanContext | None, mode: str = "child", base: OtelContext | None = None) -> None:
        if mode not in ("child", "link"):
            raise ConfigError(f"trace must be 'child' or 'link', not {mode!r}")
        self.span_context = span_context if span_context is not None and span_context.is_valid else None
        self.mode = mode
        self.base = base

    @property
    def parent(self) -> SpanContext | None:
        """The parent of the context's span, None if it is a root."""
        return self.span_context if self.mode == "child" else None

    def trace_state_of(self, trace_id: int) -> TraceState:
        """The caller's trace state in the caller's trace; an empty one in others."""
        parent = self.parent
        return parent.trace_state if parent is not None and parent.trace_id == trace_id else _NO_STATE


def capture_caller(carrier: Mapping[str, Any] | None = None, mode: str = "child") -> Caller | None:
    """The caller of a submission: from a W3C carrier (headers), else the current span; None if neither has anything.

    mode: "child" or "link". A carrier's names may be in any case; what cannot be parsed is ignored, as W3C asks.
    Raises ConfigError for another mode.
    """
    if carrier is not None:
        headers = {str(key).lower(): value for key, value in carrier.items()}
        context = _W3C.extract(headers, OtelContext())
    else:
        context = get_current()
    span_context = get_current_span(context).get_span_context()
    base = without_span(context)
    caller = Caller(span_context, mode, base or None)
    return caller if caller.span_context is not None or base else None


def caller_of(context: Context) -> tuple[str, dict[str, str]] | None:
    """Mode and headers of the caller of a context that has not entered yet, for `capture_caller` in another process."""
    caller = context._trace
    if type(caller) is not Caller:
        return None
    base = caller.base or OtelContext()
    if caller.span_context is not None:
        base = set_span_in_context(NonRecordingSpan(caller.span_context), base)
    return caller.mode, _headers_of(base)


def carry() -> dict[str, str]:
    """The headers of the present span and baggage; empty if there is neither."""
    return _headers_of(get_current())


def _headers_of(context: OtelContext) -> dict[str, str]:
    """The headers of span and baggage, without what has no form as UTF-8: half of a surrogate pair in the baggage."""
    headers: dict[str, str] = {}
    try:
        _W3C.inject(headers, context)
    except UnicodeEncodeError:
        headers.clear()
        for name, value in get_all(context).items():
            if not _has_form(f"{name}{value}"):
                context = remove_baggage(name, context)
        _W3C.inject(headers, context)
    return headers


def _has_form(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def carried(headers: Mapping[str, str]) -> Iterator[None]:
    """On the other machine: what begins in the block begins in the span, and with the baggage, of `carry`."""
    token = attach(_W3C.extract(headers, OtelContext()))
    try:
        yield
    finally:
        detach(token)


def restore_callers(contexts: Iterable[Context]) -> None:
    """The callers of contexts that a journal gives back, before they enter."""
    for context in contexts:
        if context._entry.caller is not None:
            mode, headers = context._entry.caller
            context._trace = capture_caller(headers, mode)


def without_span(context: OtelContext) -> OtelContext:
    """The same context without its span: baggage and whatever else is in it (SEMANTICS E17)."""
    if SPAN_KEY not in context:
        return context
    return OtelContext({key: value for key, value in context.items() if key != SPAN_KEY})


def inject(execution: Execution | None) -> dict[str, str]:
    """The carrier that goes with an execution to another process: `traceparent`, `tracestate`, `baggage`.

    The far side's parent is a `dispatch {task}` span that starts now and ends with the execution. Without deferred
    tracing the current span is carried. Nothing to carry: an empty dict.
    """
    context = get_current()
    span = span_of(execution)
    if span is not None:
        own = span.get_span_context()
        dispatched = SpanContext(own.trace_id, new_span_id(), False, SAMPLED, own.trace_state)
        span.detail().dispatch = (dispatched.span_id, span.trace.root.tracer.now())
        context = set_span_in_context(NonRecordingSpan(dispatched), context)
    return _headers_of(context)


class RemoteSpan(NonRecordingSpan):
    """The current span in a worker process; what is set on it travels back with the result, onto the `execute` span."""

    def __init__(self, context: SpanContext) -> None:
        super().__init__(context)
        self._attributes: dict[str, Any] = {}
        self._events: list[tuple[str, dict[str, Any], int]] = []

    def is_recording(self) -> bool:
        """True: what is set here reaches the trace."""
        return True

    def set_attribute(self, key: str, value: Any) -> None:
        """Sets an attribute of the `execute` span."""
        self.set_attributes({key: value})

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Sets attributes of the `execute` span, at most 128."""
        for key, value in attributes.items():
            if _is_plain(value) and (key in self._attributes or len(self._attributes) < MAX_DETAILS):
                self._attributes[key] = value

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Adds an event to the `execute` span, at most 128."""
        if len(self._events) < MAX_DETAILS:
            kept = {key: value for key, value in (attributes or {}).items() if _is_plain(value)}
            self._events.append((name, kept, timestamp if timestamp is not None else time.time_ns()))

    def record_exception(
        self, exception: BaseException, attributes: Any = None, timestamp: int | None = None, escaped: bool = False
    ) -> None:
        """Adds an `exception` event: the type only, since the text is redacted on the engine's side."""
        self.add_event("exception", {"exception.type": type(exception).__qualname__, **(attributes or {})}, timestamp)

    def payload(self) -> bytes | None:
        """What travels back; None if there is nothing."""
        if not self._attributes and not self._events:
            return None
        return json.dumps({_MARK: [self._attributes, self._events]}).encode()


@contextmanager
def remote_span(carrier: Mapping[str, str]) -> Iterator[RemoteSpan | None]:
    """In the other process: makes the carried trace current, and flushes the process's own provider at the end.

    Spans of a forked or forkserver child are lost unless flushed before the result returns.
    """
    context = _W3C.extract(carrier, OtelContext())
    span_context = get_current_span(context).get_span_context()
    span = RemoteSpan(span_context) if span_context.is_valid else None
    token = attach(context if span is None else set_span_in_context(span, context))
    try:
        yield span
    finally:
        detach(token)
        payload = span.payload() if span is not None else None
        if payload is not None:
            _returning.append(payload)
        flush = getattr(get_tracer_provider(), "force_flush", None)
        if flush is not None:
            flush(int(FLUSH_S * 1000))


def returning() -> list[bytes]:
    """In the other process: what ended spans have to take back, given once; an `extra_source` of process tasks."""
    found = _returning[:]
    _returning.clear()
    return found


def absorb(execution: Execution, extras: Iterable[bytes]) -> None:
    """Takes back what the far side noted, onto the `execute` span of a running execution; others' extras are passed."""
    own = span_of(execution)
    if own is None and execution.span is None:
        return
    for extra in extras:
        if extra.startswith(_START):
            attributes, events = json.loads(extra)[_MARK]
            target = own if own is not None else execution.span.span
            target.set_attributes(attributes)
            for name, given, at in events:
                target.add_event(name, given, at)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, str | bool | int | float) for item in value)
    return isinstance(value, str | bool | int | float)
