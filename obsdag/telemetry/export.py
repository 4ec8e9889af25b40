"""Out of the process: OTLP by a bounded queue, and counting what other exporters lose (TELEMETRY section 2).

The SDK's batch processor drops the oldest span in silence when its queue is full, and so do exporters whose receiver
is down. Here every lost span is counted once, by reason: queue_full, export_failed, shutdown.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context as OtelContext
from opentelemetry.context import attach
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from obsdag.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Span

    from obsdag.telemetry.selfstats import SelfStats

__all__ = ["CountingExporter", "QueueProcessor", "bind_counts", "count_drops", "otlp_exporter"]

QUEUE_SPANS: Final = 8_192
BATCH_SPANS: Final = 512
DELAY_S: Final = 1.0
SUPPRESS: Final[str] = getattr(otel_context, "_SUPPRESS_INSTRUMENTATION_KEY", "suppress_instrumentation")
"""The key by which instrumentations leave an exporter's own calls untraced; the SDK's processors set the same."""
_log = logging.getLogger("obsdag.tracing")


class _Counts:
    """Drops by reason, kept here until a `SelfStats` is known, then there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats: SelfStats | None = None
        self.dropped: dict[str, int] = {}

    def bind(self, stats: SelfStats) -> None:
        with self._lock:
            if self._stats is None:
                self._stats = stats
                for reason, count in self.dropped.items():
                    stats.drop("traces", reason, count)

    def add(self, reason: str, count: int) -> None:
        if count > 0:
            with self._lock:
                self.dropped[reason] = self.dropped.get(reason, 0) + count
                if self._stats is not None:
                    self._stats.drop("traces", reason, count)


class CountingExporter(SpanExporter):
    """See `count_drops`. `dropped`: spans lost by reason, also before any engine counts them."""

    def __init__(self, inner: SpanExporter) -> None:
        self.inner = inner
        self.counts = _Counts()
        self._closed = self._given_up = False

    @property
    def dropped(self) -> dict[str, int]:
        """Lost spans by reason: export_failed, shutdown."""
        return dict(self.counts.dropped)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Exports by the inner exporter; a failure or exception loses the whole batch, and is counted."""
        try:
            result = self.inner.export(spans)
        except Exception:
            _log.debug("a span exporter raised", exc_info=True)
            result = SpanExportResult.FAILURE
        if result is not SpanExportResult.SUCCESS and not self._given_up:
            self.counts.add("shutdown" if self._closed else "export_failed", len(spans))
        return result

    def give_up(self, count: int) -> None:
        """Counts what is under way as lost now, since nobody will wait for what becomes of it."""
        self._given_up = True
        self.counts.add("shutdown", count)

    def shutdown(self) -> None:
        """Shuts the inner exporter down."""
        self._closed = True
        self.inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Flushes the inner exporter."""
        return self.inner.force_flush(timeout_millis)


def count_drops(exporter: SpanExporter) -> CountingExporter:
    """Wraps a user's exporter, so that what it loses is in `obsdag_telemetry_dropped_total` of the engine that uses it.

        Tracing(processors=[BatchSpanProcessor(obsdag.count_drops(OTLPSpanExporter()))])

    Seen are failed exports. Spans that a batch processor drops because its own queue is full cannot be seen.
    """
    return CountingExporter(exporter)


def bind_counts(processor: Any, stats: SelfStats) -> None:
    """Lets a processor's counting exporter, if it has one, count into `stats`; the first engine wins."""
    for holder in (processor, getattr(processor, "inner", None)):
        exporter = getattr(holder, "span_exporter", None)
        if isinstance(exporter, CountingExporter):
            exporter.counts.bind(stats)
        counts = getattr(holder, "counts", None)
        if isinstance(counts, _Counts):
            counts.bind(stats)


class QueueProcessor(SpanProcessor):
    """Exports in batches from a bounded queue; its thread lives only while there is something to export.

    queue_spans: beyond this many waiting spans, new ones are lost. delay_s: how long a span waits for others, at most.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        queue_spans: int = QUEUE_SPANS,
        batch_spans: int = BATCH_SPANS,
        delay_s: float = DELAY_S,
    ) -> None:
        self.span_exporter = CountingExporter(exporter)
        self.counts = self.span_exporter.counts
        self._most = queue_spans
        self._batch = min(batch_spans, queue_spans)
        self._delay_s = delay_s
        self._queue: deque[ReadableSpan] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._flushing = self._under_way = 0
        self._closed = False

    def on_start(self, span: Span, parent_context: OtelContext | None = None) -> None:
        """Nothing."""

    def on_end(self, span: ReadableSpan) -> None:
        """Queues a span; never blocks."""
        context = span.get_span_context()
        if context is not None and context.trace_flags.sampled:
            self.take((span,))

    def take(self, spans: Sequence[ReadableSpan]) -> None:
        """Queues spans that are sampled; never blocks."""
        if self._closed:
            self.counts.add("shutdown", len(spans))
            return
        room = max(0, self._most - len(self._queue))
        if len(spans) > room:
            self.counts.add("queue_full", len(spans) - room)
            spans = spans[:room]
        self._queue.extend(spans)
        self._ensure_thread()
        if len(self._queue) >= self._batch and not self._wake.is_set():
            self._wake.set()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Exports what is queued; False if that takes longer than `timeout_millis`."""
        deadline = time.monotonic() + timeout_millis / 1000
        with self._lock:
            self._flushing += 1
        try:
            while self._queue or self._is_working():
                if not self._ensure_thread():
                    self._export_all()  # the interpreter is shutting down: no thread can start any more
                    break
                self._wake.set()
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.002)
            return True
        finally:
            with self._lock:
                self._flushing -= 1

    def shutdown(self) -> None:
        """Takes no more, counts what is still queued or under way as lost, and shuts the exporter down."""
        self._closed = True
        lost = len(self._queue)
        self._queue.clear()
        self.counts.add("shutdown", lost)
        if self._under_way:
            self.span_exporter.give_up(self._under_way)
        self._wake.set()
        self.span_exporter.shutdown()

    def _is_working(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _ensure_thread(self) -> bool:
        if self._is_working():
            return True
        with self._lock:
            if self._is_working():
                return True
            thread = threading.Thread(target=self._work, name="obsdag-otlp", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
            return True

    def _work(self) -> None:
        attach(OtelContext({SUPPRESS: True}))
        while True:
            self._wake.clear()  # first, as an earlier flush leaves it set: a batch of a few costs as much as a full one
            if not (self._flushing or self._closed or len(self._queue) >= self._batch):
                self._wake.wait(self._delay_s)
            self._export_all()
            with self._lock:  # whoever queues from here on starts a new thread
                if not self._queue:
                    self._thread = None
                    return

    def _export_all(self) -> None:
        while self._queue:
            batch: list[ReadableSpan] = []
            while self._queue and len(batch) < self._batch:
                try:
                    batch.append(self._queue.popleft())
                except IndexError:  # shut down meanwhile
                    break
            if batch:
                self._under_way = len(batch)
                self.span_exporter.export(batch)
                self._under_way = 0


def otlp_exporter(endpoint: str | None, protocol: str | None) -> SpanExporter:
    """The official OTLP exporter. Raises ConfigError for an unknown protocol, or without the extra `obsdag[otlp]`.

    endpoint: base URL of a collector (`/v1/traces` is appended for HTTP), or None for OTEL_EXPORTER_OTLP_*. protocol:
    "http", "grpc", or None for OTEL_EXPORTER_OTLP_(TRACES_)PROTOCOL, else HTTP.
    """
    chosen = protocol or _protocol_from_environment()
    if chosen not in ("http", "grpc"):
        raise ConfigError(f"Tracing.otlp(protocol={chosen!r}): must be 'http' or 'grpc'")
    if endpoint is not None and (not isinstance(endpoint, str) or "://" not in endpoint):
        raise ConfigError(f"Tracing.otlp(endpoint={endpoint!r}): must be a URL such as 'http://localhost:4318'")
    try:
        if chosen == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

            return GrpcExporter(endpoint=endpoint)
        from obsdag.telemetry.http_exporter import HttpExporter

        return HttpExporter(endpoint=None if endpoint is None else _signal_url(endpoint))
    except ImportError as error:
        told = f"Tracing.otlp needs an exporter ({error}): pip install 'obsdag[otlp]'"
        raise ConfigError(told) from (None if isinstance(error, ModuleNotFoundError) else error)


def _protocol_from_environment() -> str:
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    given = next((os.environ[name] for name in names if os.environ.get(name)), "http")
    return "http" if given.startswith("http") else given


def _signal_url(endpoint: str) -> str:
    return endpoint if endpoint.rstrip("/").endswith("/v1/traces") else f"{endpoint.rstrip('/')}/v1/traces"


def queue_settings() -> dict[str, Any]:
    """Queue, batch and delay from OTEL_BSP_*, else our own defaults. Raises ConfigError for what is no number."""
    names = {
        "queue_spans": ("OTEL_BSP_MAX_QUEUE_SIZE", 1),
        "batch_spans": ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 1),
        "delay_s": ("OTEL_BSP_SCHEDULE_DELAY", 1000),
    }
    settings: dict[str, Any] = {}
    for setting, (name, divisor) in names.items():
        text = os.environ.get(name, "").strip()
        if not text:
            continue
        if not text.isdigit() or int(text) < 1:
            raise ConfigError(f"environment variable {name} must be a whole number >= 1, not {text!r}")
        settings[setting] = int(text) / divisor if divisor > 1 else int(text)
    return settings
