"""Tracing: how traces are sampled and where they go (TELEMETRY sections 2 and 3). The parts stand beside it:

records      ids, what is kept of executions and roots     carrier   W3C trace context in and out
deferred     the observer that records                     live      the observer for a host's own tracer provider
keeping      its decisions                                 hold      users' own spans share the decision
sampling     ratio, keep budget, running quantile          export    OTLP, counting what is lost
materialize  from records to spans                         pipeline  bounded buffer, thread, flush with a deadline
kept_span    which are the SDK's for whoever looks         encode    and are written as OTLP at once by our exporter
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from obsdag.errors import ConfigError
from obsdag.telemetry import journal_spans
from obsdag.telemetry.carrier import Caller, RemoteSpan, absorb, capture_caller, inject, remote_span, returning
from obsdag.telemetry.deferred import DeferredTracer
from obsdag.telemetry.executions import trace_ids
from obsdag.telemetry.export import QueueProcessor, bind_counts, count_drops, otlp_exporter, queue_settings
from obsdag.telemetry.hold import hold
from obsdag.telemetry.live import LiveTracer
from obsdag.telemetry.pipeline import Pipeline
from obsdag.telemetry.records import UNIT_BYTES
from obsdag.telemetry.sampling import deferred_sampler
from obsdag.telemetry.selfstats import SelfStats

if TYPE_CHECKING:
    from obsdag.core.observer import Observer
    from obsdag.core.state import RunState

__all__ = [
    "Caller",
    "DeferredTracer",
    "LiveTracer",
    "RemoteSpan",
    "Tracing",
    "absorb",
    "capture_caller",
    "count_drops",
    "deferred_sampler",
    "hold",
    "inject",
    "remote_span",
    "returning",
    "trace_ids",
]

MODES: Final = ("auto", "deferred", "live", "off")
FLUSH_S: Final = 2.0
_log = logging.getLogger("obsdag.tracing")


class Tracing:
    """Which traces are kept, and who gets them; for one or several executors. Raises ConfigError by name.

    processors: the SDK's span processors. mode: "deferred" decides at the end and needs processors; "live" makes
    ordinary spans through the host's tracer provider, whose head sampling applies; "auto" is deferred if there are
    processors, else live if the host has a provider, else off. sample: share of traces kept that nothing else speaks
    for, 0 to 1. slow_after: seconds after which a root is kept, or "p99" (slower than 99 % of the DAG's roots), or
    None. follow_parent: keep what the caller's trace samples, and leave to chance nothing that it does not.
    max_spans_per_trace: executions after which a trace goes on in a new one. max_buffered_spans, max_buffered_bytes:
    caps on what waits for a decision or for export, a span counting 512 bytes. keep_budget_per_s: traces kept per
    second for each (dag, task, error type), at least one per interval.
    """

    def __init__(
        self,
        processors: Iterable[SpanProcessor] = (),
        mode: str = "auto",
        sample: float = 0.01,
        slow_after: float | str | None = None,
        follow_parent: bool = True,
        max_spans_per_trace: int = 1_000,
        max_buffered_spans: int = 100_000,
        max_buffered_bytes: int = 64 * 1024 * 1024,
        keep_budget_per_s: float = 10,
    ) -> None:
        self.processors = _checked_processors(processors)
        if mode not in MODES:
            raise ConfigError(f"Tracing.mode must be one of {', '.join(map(repr, MODES))}, not {mode!r}")
        if mode == "deferred" and not self.processors:
            raise ConfigError("Tracing.mode 'deferred' needs processors: pass some, or use Tracing.otlp(...)")
        self.mode = mode
        self.sample = _number("sample", sample, 0.0, 1.0)
        self.slow_after = slow_after if slow_after in (None, "p99") else _number("slow_after", slow_after, 0.0)
        if not isinstance(follow_parent, bool):
            raise ConfigError(f"Tracing.follow_parent must be True or False, not {follow_parent!r}")
        self.follow_parent = follow_parent
        self.max_spans_per_trace = _whole("max_spans_per_trace", max_spans_per_trace)
        self.max_buffered_spans = _whole("max_buffered_spans", max_buffered_spans)
        self.max_buffered_bytes = _whole("max_buffered_bytes", max_buffered_bytes, UNIT_BYTES)
        self.keep_budget_per_s = _number("keep_budget_per_s", keep_budget_per_s, 0.0)
        if not self.keep_budget_per_s:
            raise ConfigError("Tracing.keep_budget_per_s must be > 0: a fraction keeps one per so many seconds")
        self._service_name: str | None = None
        self._resource: Resource | None = None
        self._resources: dict[str, Resource] = {}
        self._said_live = False
        places = min(self.max_buffered_spans, self.max_buffered_bytes // UNIT_BYTES)
        self._pipeline = Pipeline(self.processors, places, self.keep_budget_per_s)

    @classmethod
    def otlp(
        cls,
        endpoint: str | None = None,
        protocol: str | None = None,
        service_name: str | None = None,
        resource: Mapping[str, Any] | Resource | None = None,
        **options: Any,
    ) -> Tracing:
        """Tracing to an OTLP collector (extra `obsdag[otlp]`), by a bounded queue that counts what it loses.

        endpoint: the collector's base URL; None reads OTEL_EXPORTER_OTLP_*, else localhost. protocol: "http" or
        "grpc"; None reads OTEL_EXPORTER_OTLP_PROTOCOL, else HTTP. service_name: None takes OTEL_SERVICE_NAME, else
        the host's provider, else the engine. resource: further resource attributes. options: those of `Tracing`.
        Raises ConfigError.
        """
        queue = QueueProcessor(otlp_exporter(endpoint, protocol), **queue_settings())
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            options["mode"] = "off"
        tracing = cls(processors=(*options.pop("processors", ()), queue), **options)
        tracing._service_name = service_name
        if resource is not None:
            tracing._resource = resource if isinstance(resource, Resource) else Resource(dict(resource))
        return tracing

    def observers(
        self,
        run: RunState,
        *,
        engine: str = "obsdag",
        stats: SelfStats | None = None,
        redact: Callable[[str], str] | None = None,
    ) -> list[Observer]:
        """The observers that trace one run; none if tracing is off.

        engine: its name on every span. stats: counts what is lost and decided. redact: applied to all exception texts.
        """
        mode = self.resolved_mode()
        scope = InstrumentationScope("obsdag", _version())
        stats = stats if stats is not None else SelfStats()
        if mode == "off":
            return []
        if mode == "live":
            self._say_live()
            observer = LiveTracer(run, engine=engine, redact=redact)
            return [observer] if run.config.journal is None else [observer, journal_spans.live(run, observer)]
        for processor in self.processors:
            bind_counts(processor, stats)
        stats.gauges["spans_buffered"] = self._pipeline.buffered
        tracer = DeferredTracer(
            run,
            self._pipeline,
            engine=engine,
            stats=stats,
            resource=self._resource_of(engine),
            scope=scope,
            redact=redact,
            sample=self.sample,
            slow_after=self.slow_after,
            follow_parent=self.follow_parent,
            max_spans_per_trace=self.max_spans_per_trace,
        )
        return [tracer] if run.config.journal is None else [tracer, journal_spans.deferred(run, tracer)]

    def resolved_mode(self) -> str:
        """What "auto" means now: deferred, live or off."""
        if self.mode != "auto":
            return self.mode
        if self.processors:
            return "deferred"
        provider = trace.get_tracer_provider()
        return "off" if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider) else "live"

    async def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Exports what is kept, in a thread; False if that took longer than `timeout_s`. At once if nothing is."""
        loop = asyncio.get_running_loop()
        came: asyncio.Future[bool] = loop.create_future()

        def done(in_time: bool) -> None:
            try:
                loop.call_soon_threadsafe(lambda: None if came.done() else came.set_result(in_time))
            except RuntimeError:  # nobody waits any more: the loop is closed
                return

        if not self._pipeline.begin_flush(timeout_s, done):
            return True
        await asyncio.wait({came}, timeout=timeout_s)
        return came.done() and came.result()

    def flush_sync(self, timeout_s: float = FLUSH_S) -> bool:
        """The same for scripts, without an event loop; blocks for at most `timeout_s`."""
        return self._pipeline.flush(timeout_s)

    def shutdown(self, timeout_s: float = FLUSH_S) -> bool:
        """Flushes, and shuts the processors down; blocks for at most `timeout_s`. What is lost by it is counted."""
        return self._pipeline.shutdown(timeout_s)

    def _resource_of(self, engine: str) -> Resource:
        resource = self._resources.get(engine)
        if resource is None:
            resource = self._resources[engine] = _make_resource(self._service_name, self._resource, engine)
        return resource

    def _say_live(self) -> None:
        if not self._said_live:
            self._said_live = True
            _log.info("tracing is live: the host's sampling applies, so slow and failed contexts are not always kept")


def _make_resource(service_name: str | None, extra: Resource | None, engine: str) -> Resource:
    """Service name: as given, else of the environment, else of the host's provider, else the engine."""
    resource = Resource.create()
    host = trace.get_tracer_provider()
    if isinstance(host, SdkTracerProvider):
        named = host.resource.attributes.get(SERVICE_NAME, "")
        if _is_unnamed(resource) and not str(named).startswith("unknown_service"):
            resource = host.resource
    if _is_unnamed(resource):
        resource = resource.merge(Resource({SERVICE_NAME: engine}))
    if extra is not None:
        resource = resource.merge(extra)
    return resource if service_name is None else resource.merge(Resource({SERVICE_NAME: service_name}))


def _is_unnamed(resource: Resource) -> bool:
    return str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service")


def _version() -> str:
    from obsdag import __version__

    return __version__


def _checked_processors(processors: Any) -> tuple[SpanProcessor, ...]:
    if isinstance(processors, SpanProcessor):
        raise ConfigError(f"Tracing.processors must be several: write [{type(processors).__name__}(...)]")
    try:
        found = tuple(processors)
    except TypeError:
        raise ConfigError(f"Tracing.processors must be span processors, not {processors!r}") from None
    for processor in found:
        if not callable(getattr(processor, "on_end", None)):
            raise ConfigError(f"Tracing.processors must be span processors, not {processor!r}")
    return found


def _number(name: str, value: Any, least: float, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most or value == math.inf:
        span = f"from {least:g} to {most:g}" if most < math.inf else f">= {least:g}"
        also = ", 'p99' or None" if name == "slow_after" else ""
        raise ConfigError(f"Tracing.{name} must be a number {span}{also}, not {value!r}")
    return float(value)


def _whole(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"Tracing.{name} must be a whole number >= {least}, not {value!r}")
    return value
