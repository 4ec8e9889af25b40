"""Users' own spans inside tasks wait for their context's decision (TELEMETRY section 2).

Under a sampled parent a span is exported when it ends, before anybody knows whether its context is kept. `hold`
stands in front of the exporting processor: spans that descend from an execution wait, bounded and counted; all others
pass through at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import SpanContext, get_current_span

from obsdag.telemetry.export import bind_counts
from obsdag.telemetry.records import SAMPLED, ExecutionSpan, RootTrace

if TYPE_CHECKING:
    from opentelemetry.context import Context as OtelContext

__all__ = ["HoldingProcessor", "hold"]

MAX_KNOWN: Final = 100_000
"""Users' spans that are open, or whose context is not decided: beyond this, further ones are lost, and counted."""


class HoldingProcessor(SpanProcessor):
    """See `hold`. `inner` is the processor that it stands in front of."""

    def __init__(self, inner: SpanProcessor) -> None:
        self.inner = inner
        self._bound = False
        self._known: dict[int, RootTrace] = {}

    def on_start(self, span: Span, parent_context: OtelContext | None = None) -> None:
        """Remembers spans that descend from an execution."""
        parent = get_current_span(parent_context)
        if isinstance(parent, ExecutionSpan):
            self._remember(span, parent.trace.root)
        else:
            root = self._known.get(parent.get_span_context().span_id)
            if root is not None:
                self._remember(span, root)
        self.inner.on_start(span, parent_context)

    def _remember(self, span: Span, root: RootTrace) -> None:
        context = span.get_span_context()
        if not self._bound:
            self._bound = True
            bind_counts(self.inner, root.tracer.stats)
        if len(self._known) >= MAX_KNOWN:
            root.tracer.stats.drop("traces", "buffer_cap", dag=root.tracer.dag)
            return
        with root.tracer.lock:
            self._known[context.span_id] = root
            if root.decision is None:
                root.rare().user_spans[context.span_id] = (self._known, False)

    def on_end(self, span: ReadableSpan) -> None:
        """Passes on, holds, or forgets, as the context of the span is kept, undecided, or not kept."""
        context = span.get_span_context()
        root = self._known.get(context.span_id) if context is not None else None
        if root is None or context is None:
            self.inner.on_end(span)
        elif self._end(root, context.span_id, span):
            self.inner.on_end(as_sampled(span))

    def _end(self, root: RootTrace, span_id: int, span: ReadableSpan) -> bool:
        """Whether the span goes on now; a span of an undecided context is held if there is room."""
        tracer = root.tracer
        with tracer.lock:
            more = root.rare()
            if span_id in more.user_spans and root.decision is None:
                more.user_spans[span_id] = (self._known, True)
            else:
                self._known.pop(span_id, None)
        if root.decision is not None:
            return root.kept
        if not tracer.take_places(1):
            tracer.stats.drop("traces", "buffer_cap", dag=tracer.dag)
            return False
        with tracer.lock:
            if root.decision is None:
                more.held.append((self._release, span))
                return False
        tracer.give_places(1)  # decided a moment ago
        return root.kept

    def _release(self, span: Any) -> None:
        self.inner.on_end(as_sampled(span))

    def shutdown(self) -> None:
        """Shuts the inner processor down; what is still held is lost, and was never promised."""
        self.inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Flushes the inner processor; undecided spans stay held."""
        return self.inner.force_flush(timeout_millis)


def as_sampled(span: ReadableSpan) -> ReadableSpan:
    """The span with the sampled flag, which `deferred_sampler` left open; exporters skip spans without it."""
    context = span.get_span_context()
    if context is None or context.trace_flags.sampled:
        return span
    sampled = SpanContext(context.trace_id, context.span_id, context.is_remote, SAMPLED, context.trace_state)
    return ReadableSpan(
        name=span.name,
        context=sampled,
        parent=span.parent,
        resource=span.resource,
        attributes=span.attributes,
        events=span.events,
        links=span.links,
        kind=span.kind,
        status=span.status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def hold(processor: SpanProcessor) -> SpanProcessor:
    """Wraps the exporting processor of the host's TracerProvider: users' spans in tasks share their context's decision.

        provider.add_span_processor(obsdag.hold(BatchSpanProcessor(exporter)))

    Spans outside obsdag pass through at once. Held spans count towards `max_buffered_spans`; those that do not fit
    are lost and counted (signal traces, reason buffer_cap).
    """
    return HoldingProcessor(processor)
