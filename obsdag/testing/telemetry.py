"""Assertions on telemetry for one's own tests: log lines, metric values, facts and spans, without any server.

with capture_logs() as lines:              what the engine logged, as dicts
with metric_change(registry, name, task="charge", outcome="error") as change:
facts = RecordedFacts()                    every fact that an observer is told; pass it in `observers`
spans = CollectedSpans()                   a span processor; pass it in `Tracing(processors=(spans,))`
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import StatusCode

from obsdag.core.observer import FACTS, Observer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from prometheus_client import CollectorRegistry

__all__ = ["CollectedSpans", "Fact", "MetricChange", "RecordedFacts", "capture_logs", "metric", "metric_change"]

_PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


@contextmanager
def capture_logs(level: str | int = "DEBUG", logger: str = "obsdag") -> Iterator[list[dict[str, Any]]]:
    """The lines that are logged inside the block, as dicts: `event`, `level`, and the line's keys (`exc_info` where
    there is one).

        with capture_logs() as lines:
            executor.run_sync({"order": 13})
        assert [line["task"] for line in lines if line["event"] == "execution.failed"] == ["charge"]

    Debug lines of executions need runs that start inside the block. level: the lowest one captured. logger: of whom.
    """
    lines: list[dict[str, Any]] = []
    target = logging.getLogger(logger)
    handler = _Lines(lines)
    before = target.level
    target.addHandler(handler)
    target.setLevel(level)
    try:
        yield lines
    finally:
        target.removeHandler(handler)
        target.setLevel(before)


class _Lines(logging.Handler):
    def __init__(self, lines: list[dict[str, Any]]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        line: dict[str, Any] = {"event": record.getMessage(), "level": record.levelname.lower()}
        line |= {key: value for key, value in record.__dict__.items() if key not in _PLAIN}
        if record.exc_info:
            line["exc_info"] = record.exc_info
        self._lines.append(line)


def metric(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    """The value of one sample, by its full name (`..._total`, `..._count`) and labels; None if there is no such sample.

    Labels that are not given match anything, as long as only one sample is left; ValueError if several are.

        assert metric(registry, "obsdag_contexts_finished_total", outcome="output") == 3
    """
    found = [
        sample
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    if len(found) > 1:
        raise ValueError(f"{len(found)} samples of {name} match {labels}: name more labels, of {found[0].labels}")
    return found[0].value if found else None


class MetricChange:
    """By how much a sample changed in a `metric_change` block; `value` can be read inside the block too."""

    def __init__(self, read: Callable[[], float | None]) -> None:
        self._read = read
        self._before = read() or 0.0
        self._after: float | None = None

    @property
    def value(self) -> float:
        """The change so far, or of the whole block; a sample that is not there counts as 0."""
        return (self._after if self._after is not None else self._read() or 0.0) - self._before

    def _end(self) -> None:
        self._after = self._read() or 0.0


@contextmanager
def metric_change(registry: CollectorRegistry, name: str, **labels: str) -> Iterator[MetricChange]:
    """How much a sample changes inside the block; name and labels as for `metric`.

    with metric_change(registry, "obsdag_task_executions_total", task="charge", outcome="success") as change:
        executor.run_sync([{"order": 7}, {"order": 8}])
    assert change.value == 2
    """
    change = MetricChange(lambda: metric(registry, name, **labels))
    try:
        yield change
    finally:
        change._end()


class Fact(NamedTuple):
    """One fact: its name and what was told, in the order of the `Observer` method's parameters."""

    name: str
    arguments: tuple[Any, ...]


class RecordedFacts(Observer):
    """An observer that remembers every fact of its runs, in order (`facts`); for tests, as it keeps all contexts alive.

    facts = RecordedFacts()
    Executor(dag, config=ExecutorConfig(observers=(facts,))).run_sync({"order": 7})
    assert facts.names()[-1] == "run_finished"
    (finished,) = facts.named("execution_finished")
    assert finished.arguments[1] == "success"
    """

    def __init__(self) -> None:
        self.facts: list[Fact] = []

    def names(self) -> list[str]:
        """The names of the facts, in order."""
        return [fact.name for fact in self.facts]

    def named(self, name: str) -> list[Fact]:
        """The facts of one name. Raises ValueError if no fact is called that, rather than finding nothing."""
        if name not in FACTS:
            raise ValueError(f"no fact is called {name!r}; there are {', '.join(FACTS)}")
        return [fact for fact in self.facts if fact.name == name]

    def clear(self) -> None:
        """Forgets all facts."""
        self.facts.clear()


def _recorder(name: str) -> Callable[..., None]:
    def record(self: RecordedFacts, *arguments: Any) -> None:
        self.facts.append(Fact(name, arguments))

    record.__name__ = name
    record.__doc__ = f"Remembers `{name}`."
    return record


for _name in FACTS:
    setattr(RecordedFacts, _name, _recorder(_name))


class CollectedSpans(SpanProcessor):
    """A span processor that keeps what ends (`spans`); give it to `Tracing(processors=(spans,), sample=1.0)`, or to a
    TracerProvider.

        spans = CollectedSpans()
        telemetry = Telemetry(tracing=Tracing(processors=(spans,), sample=1.0))
        Executor(dag, config=ExecutorConfig(telemetry=telemetry)).run_sync({"order": 7})
        (charge,) = spans.named("execute charge")
        assert charge.attributes["obsdag.attempt"] == 1
        assert spans.parent_of(charge).name == "context shop"
        assert "execute charge success" in spans.outline()
    """

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []
        self._lock = threading.Lock()

    def named(self, name: str) -> list[ReadableSpan]:
        """The spans of one name, in the order in which they ended."""
        return [span for span in self.spans if span.name == name]

    def parent_of(self, span: ReadableSpan) -> ReadableSpan | None:
        """The collected span that is the parent of `span`, None if it has none or it was not collected."""
        parent = span.parent
        return next((each for each in self.spans if parent and each.context.span_id == parent.span_id), None)

    def trace(self, trace_id: int) -> list[ReadableSpan]:
        """The spans of one trace."""
        return [span for span in self.spans if span.context.trace_id == trace_id]

    def outline(self) -> str:
        """All traces as indented lines, in order of start: name, outcome, attempt if it is not the first, error, and
        `critical` where obsdag marked it.
        """
        with self._lock:
            spans = sorted(self.spans, key=lambda span: (span.start_time or 0, -(span.end_time or 0)))
        known = {span.context.span_id for span in spans if span.context is not None}
        below: dict[int, list[ReadableSpan]] = {}
        for span in spans:
            parent = span.parent.span_id if span.parent is not None and span.parent.span_id in known else 0
            below.setdefault(parent, []).append(span)
        lines, pending = [], [(span, 0) for span in reversed(below.get(0, []))]
        while pending:
            span, depth = pending.pop()
            lines.append("  " * depth + " ".join(_words(span)))
            inside = below.get(span.context.span_id, []) if span.context is not None else []
            pending += [(child, depth + 1) for child in reversed(inside)]
        return "\n".join(lines)

    def clear(self) -> None:
        """Forgets all spans."""
        with self._lock:
            self.spans.clear()

    def on_end(self, span: ReadableSpan) -> None:
        """Keeps `span`."""
        with self._lock:
            self.spans.append(span)


def _words(span: ReadableSpan) -> Iterator[str]:
    attributes = span.attributes or {}
    yield span.name
    for key in ("obsdag.execution.outcome", "obsdag.context.outcome", "obsdag.run.outcome"):
        if key in attributes:
            yield str(attributes[key])
    if attributes.get("obsdag.attempt", 1) != 1:
        yield "attempt=" + str(attributes["obsdag.attempt"])
    if span.status.status_code is StatusCode.ERROR:
        yield "error=" + str(attributes.get("error.type", "?"))
    if attributes.get("obsdag.critical"):
        yield "critical"
