"""What tracing's tests share: collected spans, the rules of shape that every trace keeps, traces as text."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from prometheus_client import CollectorRegistry

from obsdag import DAG, Executor, ExecutorConfig
from obsdag.executor import RunResult
from obsdag.telemetry import Telemetry
from obsdag.telemetry.tracing import Tracing
from tests.otlp_receiver import KINDS, STATUSES, ReceivedSpan

__all__ = ["Collected", "check_shape", "outline", "run_traced", "telemetry_of"]


class Collected(SpanProcessor):
    """A processor that keeps what it is given, as `ReceivedSpan`s."""

    def __init__(self) -> None:
        self._spans: list[ReceivedSpan] = []
        self._changed = threading.Condition()

    def on_end(self, span: ReadableSpan) -> None:
        with self._changed:
            self._spans.append(_received(span))
            self._changed.notify_all()

    @property
    def spans(self) -> list[ReceivedSpan]:
        """What came so far."""
        with self._changed:
            return list(self._spans)

    def named(self, name: str) -> list[ReceivedSpan]:
        """Those of one name, in order of start."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.start_ns)

    def one(self, name: str) -> ReceivedSpan:
        """The only one of that name."""
        (span,) = self.named(name)
        return span

    def wait(self, enough: Callable[[list[ReceivedSpan]], bool], timeout_s: float = 10.0) -> list[ReceivedSpan]:
        """The spans, once `enough(spans)`."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not enough(list(self._spans)):
                left_s = deadline - time.monotonic()
                assert left_s > 0, f"not enough spans: {sorted(span.name for span in self._spans)}"
                self._changed.wait(left_s)
            return list(self._spans)

    async def came(self, enough: Callable[[list[ReceivedSpan]], bool], timeout_s: float = 10.0) -> list[ReceivedSpan]:
        """The same inside a run, without stopping it."""
        return await asyncio.to_thread(self.wait, enough, timeout_s)


def _received(span: ReadableSpan) -> ReceivedSpan:
    context = span.get_span_context()
    assert context is not None
    assert span.start_time is not None
    assert span.end_time is not None
    assert context.trace_flags.sampled, f"{span.name} is not sampled, exporters would skip it"
    scope = span.instrumentation_scope
    return ReceivedSpan(
        name=span.name,
        trace_id=f"{context.trace_id:032x}",
        span_id=f"{context.span_id:016x}",
        parent_id=f"{span.parent.span_id:016x}" if span.parent is not None else "",
        kind=KINDS[span.kind.value + 1],
        start_ns=span.start_time,
        end_ns=span.end_time,
        status=STATUSES[span.status.status_code.value],
        status_message=span.status.description or "",
        trace_state=context.trace_state.to_header(),
        scope=scope.name if scope is not None else "",
        attributes=dict(span.attributes or {}),
        resource=dict(span.resource.attributes),
        links=[
            (f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}", dict(link.attributes or {}))
            for link in span.links
        ],
        events=[(event.name, dict(event.attributes or {}), event.timestamp) for event in span.events],
    )


def telemetry_of(tracing: Tracing, engine: str = "test", **options: Any) -> Telemetry:
    """Telemetry with a registry of its own and no log lines."""
    return Telemetry(engine=engine, registry=CollectorRegistry(), tracing=tracing, logs=False, **options)


async def run_traced(
    dag: DAG, inputs: Any = None, *, tracing: Tracing, telemetry: Telemetry | None = None, **settings: Any
) -> RunResult:
    """Runs a DAG once with that tracing."""
    config = ExecutorConfig(telemetry=telemetry or telemetry_of(tracing), **settings)
    return await Executor(dag, config=config).run(inputs)


def check_shape(spans: Iterable[ReceivedSpan], known: Iterable[str] = ()) -> None:
    """The rules of shape (TELEMETRY 3): whole traces, nothing outside of its root, attempts one after the other.

    known: ids of parents that others export (a caller's span).
    """
    spans = list(spans)
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans), "two spans of one id"
    for span in spans:
        assert int(span.trace_id, 16)
        assert int(span.span_id, 16)
        assert span.start_ns <= span.end_ns, span
        if not span.parent_id or span.parent_id in known:
            continue
        parent = by_id.get(span.parent_id)
        assert parent is not None, f"{span.name} is an orphan"
        assert parent.trace_id == span.trace_id, f"{span.name} is in another trace than its parent"
        root = _root_of(span, by_id)
        assert root.start_ns <= span.start_ns, f"{span.name} begins before {root.name}"
        assert span.end_ns <= root.end_ns, f"{span.name} ends after {root.name}"
    _check_attempts(spans)
    _check_ledgers(spans)


def _root_of(span: ReceivedSpan, by_id: dict[str, ReceivedSpan]) -> ReceivedSpan:
    while span.parent_id in by_id:
        span = by_id[span.parent_id]
    return span


def _check_attempts(spans: list[ReceivedSpan]) -> None:
    attempts: dict[tuple[str, str], list[ReceivedSpan]] = defaultdict(list)
    for span in spans:
        if span.name.startswith("execute "):
            attempts[span.attributes["obsdag.context.id"], span.name].append(span)
    for found in attempts.values():
        found.sort(key=lambda span: (span.start_ns, span.end_ns))
        for before, after in pairwise(found):
            assert before.end_ns <= after.start_ns, f"attempts of {before.name} overlap"


def _check_ledgers(spans: list[ReceivedSpan]) -> None:
    """The parts of a root's ledger add up to its time, from entering to its outcome."""
    for span in spans:
        parts = [value for key, value in span.attributes.items() if key.startswith("obsdag.ledger.")]
        if parts and "obsdag.loop.iteration" not in span.attributes:  # an item's trace begins with its pull
            ended = next((at for name, _, at in span.events if name == "outcome"), span.end_ns)
            took_s = (ended - span.start_ns) / 1e9
            assert abs(sum(parts) - took_s) < 1e-5 + 1e-3 * took_s, f"{span.name}: {sum(parts)} s of {took_s} s"


def outline(spans: Iterable[ReceivedSpan]) -> list[str]:
    """Each trace as indented lines `name outcome [links]`, in order of start; the `run` spans last."""
    spans = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    below: dict[str, list[ReceivedSpan]] = defaultdict(list)
    ids = {span.span_id for span in spans}
    for span in spans:
        below[span.parent_id if span.parent_id in ids else ""].append(span)
    names = {span.span_id: span for span in spans}
    lines: list[str] = []
    for root in sorted(below[""], key=lambda span: span.name.startswith("run ")):
        _outline(root, 0, below, names, lines)
    return lines


def _outline(
    span: ReceivedSpan,
    depth: int,
    below: dict[str, list[ReceivedSpan]],
    names: dict[str, ReceivedSpan],
    lines: list[str],
) -> None:
    attributes = span.attributes
    words = [span.name]
    for key in ("obsdag.execution.outcome", "obsdag.context.outcome", "obsdag.run.outcome"):
        words += [str(attributes[key])] if key in attributes else []
    if attributes.get("obsdag.attempt", 1) > 1:
        words.append(f"#{attributes['obsdag.attempt']}")
    if span.status == "ERROR":
        words.append(f"ERROR:{attributes.get('error.type')}")
    for _, to, link in span.links:
        kind = link.get("obsdag.link.type")
        if kind != "run":
            words.append(f"{kind}->{names[to].name if to in names else '?'}")
    lines.append("  " * depth + " ".join(words))
    for child in below[span.span_id]:
        _outline(child, depth + 1, below, names, lines)
