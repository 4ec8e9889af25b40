"""Our encoder of spans against the official one: the same request, whatever is in the spans."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from obsdag import DAG, Context
from obsdag.telemetry import encode
from obsdag.telemetry.encode import encode_request
from obsdag.telemetry.http_exporter import HttpExporter
from obsdag.telemetry.tracing import Tracing
from tests.otlp_receiver import OtlpReceiver
from tests.telemetry.tracing_helpers import run_traced, telemetry_of

TEXT = st.text(max_size=300)  # hypothesis gives no lone surrogates unless asked
NUMBER = st.integers(-(1 << 63), (1 << 63) - 1)
PLAIN = st.one_of(TEXT, st.booleans(), NUMBER, st.floats(allow_nan=False), st.binary(max_size=20))
VALUES = st.one_of(PLAIN, st.lists(PLAIN, max_size=4).map(tuple))
ATTRIBUTES = st.dictionaries(TEXT, VALUES, max_size=6)
STATE = st.just(TraceState([("vendor", "a-1"), ("other", "b")]))
CONTEXTS = st.builds(
    SpanContext,
    st.integers(1, (1 << 128) - 1),
    st.integers(1, (1 << 64) - 1),
    st.booleans(),
    st.just(TraceFlags(1)),
    st.one_of(st.none(), STATE),
)
TIMES = st.integers(1, (1 << 63) - 1)
SPANS = st.builds(
    ReadableSpan,
    name=TEXT,
    context=CONTEXTS,
    parent=st.one_of(st.none(), CONTEXTS),
    resource=st.sampled_from([Resource({"service.name": "a", "n": 3}), Resource({}, "https://schema"), Resource({})]),
    attributes=ATTRIBUTES,
    events=st.lists(st.builds(Event, TEXT, ATTRIBUTES, TIMES), max_size=2),
    links=st.lists(st.builds(Link, CONTEXTS, ATTRIBUTES), max_size=2),
    kind=st.sampled_from(SpanKind),
    status=st.one_of(st.just(Status(StatusCode.UNSET)), TEXT.map(lambda text: Status(StatusCode.ERROR, text))),
    start_time=TIMES,
    end_time=TIMES,
    instrumentation_scope=st.sampled_from(
        [None, InstrumentationScope("obsdag", "1"), InstrumentationScope("b", None, "https://s", {"k": "v"})]
    ),
)


def theirs(spans: list[ReadableSpan]) -> ExportTraceServiceRequest:
    return encode_spans(spans)


@settings(max_examples=300, deadline=None)
@given(st.lists(SPANS, max_size=5))
def test_any_spans_are_the_same_request(spans: list[ReadableSpan]) -> None:
    assert ExportTraceServiceRequest.FromString(encode_request(spans)) == theirs(spans)


def a_span(**attributes: Any) -> ReadableSpan:
    context = SpanContext(1, 2, False, TraceFlags(1))
    return ReadableSpan("one", context=context, attributes=attributes, start_time=1, end_time=2)


@pytest.mark.parametrize("value", [1 << 70, object(), {1: object()}])
def test_an_attribute_that_cannot_be_encoded_is_left_out_alone(value: Any) -> None:
    request = ExportTraceServiceRequest.FromString(encode_request([a_span(good=1, bad=value, also="x")]))

    found = request.resource_spans[0].scope_spans[0].spans[0].attributes
    assert [pair.key for pair in found] == ["good", "also"]


def test_equal_values_of_other_types_are_told_apart() -> None:
    spans = [a_span(key=value) for value in (1, True, 1.0, "1", 0, False, 0.0)]

    assert ExportTraceServiceRequest.FromString(encode_request(spans)) == theirs(spans)


def test_what_is_remembered_is_bounded() -> None:
    for number in range(3):
        encode_request([a_span(**{f"key{number}-{n}": "v" for n in range(2_000)})])

    assert len(encode._cached) <= encode.MAX_CACHED


@pytest.mark.parametrize("compression", ["gzip", "deflate", "none"])
def test_the_exporters_own_settings_hold(compression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
    with OtlpReceiver() as receiver:
        exporter = HttpExporter(endpoint=f"{receiver.endpoint}/v1/traces")
        exporter.export([a_span(key="value")])
        exporter.shutdown()

    assert [span.attributes for span in receiver.spans] == [{"key": "value"}]


def test_the_environments_proxy_and_credentials_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine collector.invalid login ada password secret")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with OtlpReceiver() as receiver:
        monkeypatch.setenv("http_proxy", receiver.endpoint)
        exporter = HttpExporter(endpoint="http://collector.invalid:4318/v1/traces")
        monkeypatch.delenv("http_proxy")  # it was asked for once
        exporter.export([a_span(key="value")])
        exporter.shutdown()

    assert [span.attributes for span in receiver.spans] == [{"key": "value"}]
    assert receiver.authorization == "Basic " + b64encode(b"ada:secret").decode()


@pytest.mark.parametrize("own", ["", "own.pem"])
@pytest.mark.parametrize("everybodys", ["", "everybodys.pem"])
def test_the_certificates_are_those_that_every_request_would_find(
    own: str, everybodys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "https://collector.invalid:4318/v1/traces"
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    for name, file in (("OTEL_EXPORTER_OTLP_CERTIFICATE", own), ("REQUESTS_CA_BUNDLE", everybodys)):
        monkeypatch.setenv(name, file)
    official, ours = OTLPSpanExporter(endpoint=url), HttpExporter(endpoint=url)
    expected = session_of(official).merge_environment_settings(url, {}, None, None, None)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")

    assert session_of(ours).merge_environment_settings(url, {}, None, None, None) == expected
    assert expected["verify"] == (everybodys or own or True)
    for exporter in (official, ours):
        exporter.shutdown()


def session_of(exporter: Any) -> requests.Session:
    session: requests.Session = exporter._client._transport._session
    return session


def test_no_proxy_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://nobody.invalid:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with OtlpReceiver() as receiver:
        exporter = HttpExporter(endpoint=f"{receiver.endpoint}/v1/traces")
        exporter.export([a_span(key="value")])
        exporter.shutdown()

    assert len(receiver.spans) == 1


def test_without_a_client_to_hand_bytes_to_it_is_the_official_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED", "true")
    monkeypatch.setattr("obsdag.telemetry.http_exporter.encode_request", lambda spans: pytest.fail("not asked for"))
    with OtlpReceiver() as receiver:
        exporter = HttpExporter(endpoint=f"{receiver.endpoint}/v1/traces")
        exporter.export([a_span()])
        exporter.shutdown()

    assert len(receiver.spans) == 1


async def test_names_and_texts_with_lone_surrogates_lose_nothing_but_them() -> None:
    broken = "caf\udce9"  # as file names come that are not UTF-8
    dag = DAG(broken)

    @dag.task(name=broken)
    async def step(ctx: Context) -> Context:
        trace.get_current_span().set_attribute("file", broken)
        raise ValueError(broken)

    with OtlpReceiver() as receiver:
        tracing = Tracing.otlp(receiver.endpoint)
        telemetry = telemetry_of(tracing, engine=broken)
        await run_traced(dag, [Context(name=broken)], tracing=tracing, telemetry=telemetry)
        spans = receiver.wait(lambda spans: len(spans) == 3)

    assert {span.name for span in spans} == {"execute caf?", "context caf?", "run caf?"}
    execution = next(span for span in spans if span.name == "execute caf?")
    assert execution.attributes["file"] == execution.status_message == execution.events[0][1]["exception.message"]
    assert not {key: lost for key, lost in telemetry.stats.dropped.items() if lost}
