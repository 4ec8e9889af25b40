"""Executions as tracing follows them: current while their function runs, and their record then (see `records`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from obsdag.core.records import Execution
from obsdag.telemetry.attach import EXECUTION_KEY, SPAN_KEY
from obsdag.telemetry.records import ContextTrace, ExecutionSpan, details_lock, span_in

__all__ = ["TracedExecution", "record_of", "span_of", "taken", "trace_ids"]


class TracedExecution(Execution, Mapping[str, Any]):
    """An execution that is its own OpenTelemetry context, so that following it takes no object of tracing's own.

    Its one entry, the current span, is made when somebody looks: most executions are over before, and of the others'
    traces most are thrown away. trace: of its context, or of the pull that it is. listed: it stands in its root's
    records already, since it began.
    """

    __slots__ = ("listed", "trace")

    trace: ContextTrace
    listed: bool

    def own_span(self) -> ExecutionSpan:
        """Its span; from any thread, once `execution_started` was told."""
        span: ExecutionSpan | None = self.span
        if span is None:
            with details_lock:
                if (span := self.span) is None:
                    trace = self.trace
                    span = span_in(trace, trace.root.trace_id, None, self if self.outcome is None else None)
                    self.span = span
                    self.watched = True  # for its end, which parts the two
        return span

    def get(self, key: Any, default: Any = None) -> Any:
        """The span, under its own key and under that of the execution."""
        return self.own_span() if key in (SPAN_KEY, EXECUTION_KEY) else default

    def copy(self) -> dict[str, Any]:
        """All entries, as the API asks for before it sets one, and the execution, so that it is known inside a span of
        the user's own as well.
        """
        return {SPAN_KEY: self.own_span(), EXECUTION_KEY: self.own_span()}

    def __getitem__(self, key: Any) -> Any:
        if key != SPAN_KEY:
            raise KeyError(key)
        return self.own_span()

    def __contains__(self, key: object) -> bool:
        return key == SPAN_KEY

    def __iter__(self) -> Iterator[str]:
        return iter((SPAN_KEY,))

    def __len__(self) -> int:
        return 1

    __eq__ = object.__eq__  # as an execution; two never have the same context
    __hash__ = object.__hash__


def span_of(execution: Execution | None) -> ExecutionSpan | None:
    """The span of an execution in deferred tracing, None where it has none: it never began."""
    if execution is None:
        return None
    if execution.span is None and type(execution) is TracedExecution and hasattr(execution, "trace"):
        return execution.own_span()
    return execution.span if type(execution.span) is ExecutionSpan else None


def record_of(execution: TracedExecution, error: BaseException | None) -> tuple[Any, ...]:
    """What remains of an execution: span, index, attempt, started, ended, worker, lane, waits, outcome, error."""
    return (
        execution.own_span(),
        execution.index,
        execution.attempt,
        execution.started,
        execution.ended,
        execution.worker,
        execution.lane,
        execution.waits,
        execution.outcome,
        error,
    )


def taken(records: list[Any]) -> list[tuple[Any, ...]]:
    """Takes what has ended out of a list that may grow meanwhile, as tuples.

    What has failed stays until its record with the error is there.
    """
    found = records[:]
    over: list[tuple[Any, ...]] = []
    left: list[Any] = []
    for record in found:
        if type(record) is tuple:
            over.append(record)
        elif record.outcome == "success":
            over.append(record_of(record, None))
        else:
            left.append(record)
    records[: len(found)] = left
    return over


def trace_ids(execution: Execution) -> tuple[str, str] | None:
    """Trace id and span id of an execution as hex text, None without tracing; for log lines and links."""
    span = span_of(execution)
    if span is not None:
        return f"{span.trace_id:032x}", f"{span.id:016x}"
    if execution.span is None:
        return None
    context = execution.span.get_span_context()
    return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None
