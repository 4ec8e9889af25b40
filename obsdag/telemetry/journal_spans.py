"""Spans of the journal's own: a recovery, and commits that were slow or failed for good.

Ordinary commits have none: there are hundreds a second, and the metrics tell of them all. What there is stands below
the `run` span, which is exported for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace import Event
from opentelemetry.trace import SpanContext, Status, StatusCode

from obsdag.core.observer import Observer
from obsdag.telemetry.catalogue import error_type_of
from obsdag.telemetry.journal_specs import SLOW_COMMIT_S
from obsdag.telemetry.kept_span import UNSET, KeptSpan
from obsdag.telemetry.materialize import shared_of_all
from obsdag.telemetry.records import SAMPLED

if TYPE_CHECKING:
    from obsdag.core.state import RunState
    from obsdag.telemetry.deferred import DeferredTracer
    from obsdag.telemetry.live import LiveTracer

__all__ = ["JournalSpans", "deferred", "live"]

Make = Callable[[str, float, float, dict[str, Any], BaseException | None], None]
"""Makes a span: name, start and end on the run's clock, its own attributes, what it failed of."""

_APART_S: Final = 1.0


class JournalSpans(Observer):
    """Beside the tracer of one run; `make` hands spans on in that tracer's way."""

    def __init__(self, run: RunState, make: Make) -> None:
        self._clock = run.clock
        self._make = make
        self._next = 0.0  # no slow commit has a span before
        self._left_out = 0

    def journal_committed(self, rows: int, took_s: float, depth: int) -> None:
        """A slow commit has a span, at most one per second: a slow disk makes all of them slow."""
        if took_s < SLOW_COMMIT_S:
            return
        now = self._clock()
        if now < self._next:
            self._left_out += 1
            return
        told = {"obsdag.journal.rows": rows, "obsdag.journal.depth": depth, "obsdag.journal.left_out": self._left_out}
        self._next, self._left_out = now + _APART_S, 0
        self._make("journal commit", now - took_s, now, told, None)

    def journal_failed(self, error: BaseException) -> None:
        """The commit that failed for good."""
        now = self._clock()
        told = {"obsdag.journal.rows": getattr(error, "rows", 0), "error.type": error_type_of(error)}
        began = now - getattr(error, "took_s", 0.0)
        self._make("journal commit", began, now, told, error)

    def journal_recovered(self, contexts: int, replayed: int, dead_letters: int, took_s: float) -> None:
        """What was taken up; the file was read before the run began, so the span is shorter than `took_s`."""
        now = self._clock()
        told: dict[str, Any] = {"obsdag.journal.contexts": contexts, "obsdag.journal.replayed": replayed}
        told |= {"obsdag.journal.dead_letters": dead_letters, "obsdag.journal.took_s": took_s}
        self._make("journal recover", now - took_s, now, told, None)


def deferred(run: RunState, tracer: DeferredTracer) -> JournalSpans:
    """Beside deferred tracing: finished spans for the pipeline."""

    def make(name: str, start: float, end: float, attributes: dict[str, Any], error: BaseException | None) -> None:
        at = tracer.unix_ns(end)
        events = [] if error is None else [Event("exception", tracer.texts.attributes(error), at)]
        tracer.hand_in(
            KeptSpan(
                tracer.source,
                shared_of_all(tracer, name),
                tracer.run_trace_id,
                tracer.new_span_id(),
                None,
                SpanContext(tracer.run_trace_id, tracer.run_span_id, False, SAMPLED),
                tracer.unix_ns(max(start, run.started)),
                at,
                attributes,
                happened=events,
                result=_status(attributes),
            )
        )

    return JournalSpans(run, make)


def live(run: RunState, tracer: LiveTracer) -> JournalSpans:
    """Beside live tracing: ordinary spans."""
    always = {"obsdag.engine": tracer.engine, "obsdag.dag": run.plan.name}

    def make(name: str, start: float, end: float, attributes: dict[str, Any], error: BaseException | None) -> None:
        span = tracer.begin_below_run(name, max(start, run.started), always | attributes)
        if error is not None:
            span.add_event("exception", tracer.texts.attributes(error))
            span.set_status(_status(attributes))
        span.end(tracer.unix_ns(end))

    return JournalSpans(run, make)


def _status(attributes: dict[str, Any]) -> Status:
    failed = attributes.get("error.type")
    return UNSET if failed is None else Status(StatusCode.ERROR, failed)
