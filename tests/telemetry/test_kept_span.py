"""Spans of kept traces: written as they are, or by whoever looks at them as any `ReadableSpan`: the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode

from obsdag import DAG, Context
from obsdag.telemetry.encode import encode_request
from obsdag.telemetry.kept_span import UNSET, KeptSpan, Shared
from obsdag.telemetry.tracing import Tracing
from tests.otlp_receiver import OtlpReceiver
from tests.telemetry.test_encode import CONTEXTS, STATE, TEXT, TIMES, VALUES
from tests.telemetry.tracing_helpers import run_traced

SOURCE = Resource({"service.name": "a"}), InstrumentationScope("obsdag", "1")
LEADS = st.tuples(st.sampled_from(["retry", "upstream"]), st.integers(1, (1 << 128) - 1), st.integers(1, (1 << 64) - 1))
KEPT = st.builds(
    KeptSpan,
    source=st.just(SOURCE),
    shared=st.builds(Shared, TEXT, st.sampled_from([{"a": 1, "b": "two"}, {}]).map(dict), st.sampled_from(SpanKind)),
    trace_id=st.integers(1, (1 << 128) - 1),
    span_id=st.integers(1, (1 << 64) - 1),
    state=st.one_of(st.none(), STATE),
    above=st.one_of(st.none(), CONTEXTS),
    began_ns=TIMES,
    ended_ns=TIMES,
    own=st.dictionaries(TEXT.map(lambda text: f"own.{text}"), VALUES, max_size=4),
    leads=st.lists(st.one_of(LEADS, st.builds(Link, CONTEXTS, st.just({"k": 1}))), max_size=3),
    happened=st.lists(st.builds(Event, TEXT, st.just({"k": 1}), TIMES), max_size=2),
    result=st.one_of(st.just(UNSET), TEXT.map(lambda text: Status(StatusCode.ERROR, text))),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(KEPT, max_size=4))
def test_looking_at_a_span_does_not_change_what_is_sent(spans: list[KeptSpan]) -> None:
    unseen = ExportTraceServiceRequest.FromString(encode_request(spans))
    assert not any(span.whole for span in spans)
    assert unseen == encode_spans(spans)
    assert all(span.whole for span in spans)
    assert unseen == ExportTraceServiceRequest.FromString(encode_request(spans))


def a_span() -> KeptSpan:
    return KeptSpan(SOURCE, Shared("execute a", {"a": 1}), 1, 2, None, None, 10, 20, {"b": 2}, [("retry", 3, 4)])


def test_it_is_a_readable_span() -> None:
    span = a_span()
    assert span.get_span_context() == SpanContext(1, 2, False, span.get_span_context().trace_flags)
    assert not span.whole
    assert (span.name, span.kind, span.parent) == ("execute a", SpanKind.INTERNAL, None)
    assert (span.start_time, span.end_time) == (10, 20)
    assert span.attributes == {"a": 1, "b": 2}
    assert [(link.context.trace_id, link.context.span_id) for link in span.links] == [(3, 4)]
    assert span.events == ()
    assert span.status.is_unset
    assert span.resource is SOURCE[0]
    assert span.instrumentation_scope is SOURCE[1]
    assert '"name": "execute a"' in span.to_json()
    with pytest.raises(AttributeError, match="'KeptSpan' object has no attribute 'nothing'"):
        span.nothing  # noqa: B018
    assert span.get_span_context().span_id == 2


def test_what_is_set_before_anybody_looks_counts() -> None:
    span = a_span()
    span._name = "renamed"  # as processors do that take secrets out
    request = ExportTraceServiceRequest.FromString(encode_request([span]))
    assert request.resource_spans[0].scope_spans[0].spans[0].name == "renamed"


def dag_of_one() -> DAG:
    dag = DAG("dag")

    @dag.task
    async def work(ctx: Context) -> Context:
        return ctx

    return dag


async def test_nobody_looks_on_the_way_to_our_own_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, bool]] = []

    def encode(spans: list[KeptSpan]) -> bytes:
        sent.extend((span.shared.name, span.whole) for span in spans)
        return encode_request(spans)

    monkeypatch.setattr("obsdag.telemetry.http_exporter.encode_request", encode)
    with OtlpReceiver() as receiver:
        tracing = Tracing.otlp(receiver.endpoint, sample=1.0)
        await run_traced(dag_of_one(), [{}], tracing=tracing)
        tracing.shutdown(20.0)

    assert sorted(sent) == [("context dag", False), ("execute work", False), ("run dag", False)]


async def test_a_processor_that_changes_spans_is_obeyed() -> None:
    class TakesOut(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            span._attributes = dict.fromkeys(span.attributes or (), "?")

    with OtlpReceiver() as receiver:
        tracing = Tracing.otlp(receiver.endpoint, sample=1.0, processors=[TakesOut()])
        await run_traced(dag_of_one(), [{}], tracing=tracing)
        tracing.shutdown(20.0)

    assert {span.name for span in receiver.spans} == {"run dag", "context dag", "execute work"}
    assert {value for span in receiver.spans for value in span.attributes.values()} == {"?"}
