"""Traces of the demo service over OTLP, HTTP and gRPC: into a receiver on the official protobuf services, and a Jaeger.

What is kept by the rules is there whatever chance says: orders that fail, that are retried and that are slow, by their
numbers (obsdag.examples.demo_service), and a settlement that stalls. A Jaeger is used where there is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.servers import Demo, Jaeger, demo, jaeger, jaeger_binary, until
from tests.otlp_receiver import KINDS, STATUSES, OtlpReceiver, ReceivedSpan
from tests.telemetry.tracing_helpers import check_shape, outline

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.leaves("threads", "a gRPC server's threads, and those that answer while the test begins and ends"),
    pytest.mark.leaves("files", "the same: their connections"),
]

RETRIED, SLOW, FAILED = "order-3", "order-7", "order-17"

BRANCHES = """\
  execute receive success
  execute screen success
  execute price success
  execute risk success
    dispatch risk
"""
GOLDEN = {
    RETRIED: f"""\
context orders output
{BRANCHES}\
  execute partner error ERROR:PartnerDown
  execute partner success #2 retry->execute partner
  execute number success upstream->execute price upstream->execute risk upstream->execute partner
  execute lines success
    execute pick success
  execute lines success
  execute assemble success upstream->execute pick
  execute deliver success""",
    SLOW: f"""\
context orders output
{BRANCHES}\
  execute partner success
  execute number success upstream->execute price upstream->execute risk upstream->execute partner
  execute lines success
    execute pick success
  execute lines success
    execute pick success
  execute lines success
  execute assemble success upstream->execute pick upstream->execute pick
  execute deliver success""",
    FAILED: f"""\
context orders failed ERROR:Undeliverable
{BRANCHES}\
  execute partner success
  execute number success upstream->execute price upstream->execute risk upstream->execute partner
  execute lines success
    execute pick success
  execute lines success
    execute pick success
  execute lines success
    execute pick success
  execute lines success
  execute assemble success upstream->execute pick upstream->execute pick upstream->execute pick
  execute deliver error ERROR:Undeliverable""",
    "stalled": """\
context settlement stalled ERROR:stalled input->? maker->execute pages
  execute pages success
  execute approve success""",
}
"""Each trace as indented lines, without the waits, which depend on the machine's speed."""


def _golden(spans: list[ReceivedSpan]) -> str:
    """The outline: no waits, no notes of what was open, and error types without their module."""
    lines = [line for line in outline(spans) if line.split()[0] not in ("wait", "open")]
    return "\n".join(lines).replace("obsdag.examples.demo_service.", "")


def _in_order(golden: str) -> list[str]:
    """The lines, with branches that run side by side in a fixed order."""
    return sorted(golden.splitlines())


def _trace_of(spans: list[ReceivedSpan], **attributes: str) -> list[ReceivedSpan]:
    keys = {f"obsdag.context.{name}": value for name, value in attributes.items()}
    traces = {span.trace_id for span in spans if keys.items() <= span.attributes.items()}
    return [span for span in spans if span.trace_id in traces]


def _ended(spans: list[ReceivedSpan], **attributes: str) -> bool:
    return any(span.name.startswith("context ") for span in _trace_of(spans, **attributes))


def _all_ended(spans: list[ReceivedSpan]) -> bool:
    return _ended(spans, outcome="stalled") and all(_ended(spans, id=each) for each in (RETRIED, SLOW, FAILED))


def _run(place: Path, endpoint: str, protocol: str) -> Any:
    sending = {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    return demo(place, "--rate=15", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, **sending)


def _make_deadlock(service: Demo) -> None:
    assert service.make("deadlock") == 204


# --- the receiver


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_otlp_receiver_gets_whole_traces(protocol: str, tmp_path: Path) -> None:
    by_protocol = {"http": "http/protobuf", "grpc": "grpc"}
    with OtlpReceiver(protocol) as receiver:
        with _run(tmp_path / "demo", receiver.endpoint, by_protocol[protocol]) as service:
            _make_deadlock(service)
            receiver.wait(_all_ended, 30.0)
            scrape = service.scrape()
        spans = receiver.spans  # the service has ended by now, and sent what it had

    check_shape(spans)
    for each in (RETRIED, SLOW, FAILED):
        assert _in_order(_golden(_trace_of(spans, id=each))) == _in_order(GOLDEN[each])
    stalled = _trace_of(spans, outcome="stalled")
    assert _in_order(_golden(stalled)) == _in_order(GOLDEN["stalled"])
    assert {span.resource["service.name"] for span in spans} == {"shop", "back-office"}
    assert {span.scope for span in spans} == {"obsdag"}
    lost = [line for line in scrape.splitlines() if line.startswith("obsdag_telemetry_dropped_total")]
    assert lost
    assert all(line.endswith(" 0.0") for line in lost)


# --- Jaeger

needs_jaeger = pytest.mark.skipif(
    jaeger_binary() is None, reason="no Jaeger (v2): put `jaeger` on PATH, or name the binary in OBSDAG_JAEGER_BIN"
)


@pytest.fixture(scope="module", params=["http/protobuf", "grpc"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    """A Jaeger with the shipped configuration that got the traces of a demo service, which has ended."""
    place = tmp_path_factory.mktemp("jaeger")
    with jaeger(place / "jaeger") as server:
        with _run(place / "demo", server.otlp[request.param], request.param) as service:
            _make_deadlock(service)
            for each in (RETRIED, SLOW, FAILED):
                until(partial(_root_in, server, "shop", {"obsdag.context.id": each}), f"{each} in Jaeger", 30.0)
            until(
                partial(_root_in, server, "back-office", {"obsdag.context.outcome": "stalled"}), "the stalled one", 30.0
            )
        time.sleep(0.3)  # Jaeger's own batches, of 0.2 s in the tests
        yield server


def _root_in(server: Jaeger, service: str, tags: dict[str, str]) -> list[Any]:
    found = server.traces(service, tags=tags)
    return [each for each in found if any(span["operationName"].startswith("context ") for span in each["spans"])]


def _found(server: Jaeger, service: str, **search: Any) -> list[list[ReceivedSpan]]:
    """The traces that a search finds, as OTLP has them (Jaeger's older JSON leaves out the attributes of links)."""
    return [spans_of(server.whole(each["traceID"])) for each in server.traces(service, **search)]


def spans_of(answer: dict[str, Any]) -> list[ReceivedSpan]:
    """Spans from OTLP's JSON."""
    return [
        ReceivedSpan(
            name=span["name"],
            trace_id=span["traceId"],
            span_id=span["spanId"],
            parent_id=span.get("parentSpanId", ""),
            kind=KINDS[span.get("kind", 0)],
            start_ns=int(span["startTimeUnixNano"]),
            end_ns=int(span["endTimeUnixNano"]),
            status=STATUSES[span.get("status", {}).get("code", 0)],
            status_message=span.get("status", {}).get("message", ""),
            trace_state=span.get("traceState", ""),
            scope=scope["scope"]["name"],
            attributes=_attributes(span),
            resource=_attributes(group["resource"]),
            links=[(to["traceId"], to["spanId"], _attributes(to)) for to in span.get("links", ())],
            events=[(e["name"], _attributes(e), int(e["timeUnixNano"])) for e in span.get("events", ())],
        )
        for group in answer["resourceSpans"]
        for scope in group["scopeSpans"]
        for span in scope["spans"]
    ]


def _attributes(part: dict[str, Any]) -> dict[str, Any]:
    return {each["key"]: _value(each["value"]) for each in part.get("attributes", ())}


_READ: dict[str, Callable[[Any], Any]] = {"intValue": int, "doubleValue": float, "boolValue": bool, "stringValue": str}


def _value(value: dict[str, Any]) -> Any:
    (kind, given), *_ = value.items()
    return [_value(each) for each in given.get("values", ())] if kind == "arrayValue" else _READ[kind](given)


@needs_jaeger
def test_jaeger_knows_services_and_operations(filled: Jaeger) -> None:
    assert {"shop", "back-office"} <= set(filled.api("services"))
    names = {each["name"]: each["spanKind"] for each in filled.api("operations", service="shop")}
    assert (
        names.items()
        >= {"context orders": "consumer", "execute deliver": "internal", "dispatch risk": "producer"}.items()
    )


@needs_jaeger
@pytest.mark.parametrize("order", [RETRIED, SLOW, FAILED])
def test_jaeger_gives_back_the_golden_shapes(order: str, filled: Jaeger) -> None:
    (spans,) = _found(filled, "shop", tags={"obsdag.context.id": order})

    check_shape(spans)
    assert _in_order(_golden(spans)) == _in_order(GOLDEN[order])


@needs_jaeger
def test_jaeger_gives_back_links(filled: Jaeger) -> None:
    (spans,) = _found(filled, "back-office", tags={"obsdag.context.outcome": "stalled"})

    assert _in_order(_golden(spans)) == _in_order(GOLDEN["stalled"])
    (root,) = [span for span in spans if span.name.startswith("context ")]
    links = {to["obsdag.link.type"]: (trace, span) for trace, span, to in root.links}
    assert set(links) == {"input", "maker", "run"}
    trace, span_id = links["run"]
    (run,) = [each for each in spans_of(filled.whole(trace)) if each.span_id == span_id]
    assert (run.name, run.attributes["obsdag.run.outcome"]) == ("run settlement", "deadlocked")


@needs_jaeger
def test_jaeger_finds_errors(filled: Jaeger) -> None:
    failed = _found(filled, "shop", tags={"obsdag.context.outcome": "failed"}, operation="context orders")
    assert failed
    for spans in failed:
        (root,) = [span for span in spans if span.name == "context orders"]
        (error,) = [span for span in spans if span.status == "ERROR" and span.name.startswith("execute ")]
        assert root.status == "ERROR"
        assert error.attributes["error.type"] == root.attributes["error.type"]
        (event,) = [attributes for name, attributes, _ in error.events if name == "exception"]
        assert event["exception.type"].endswith(error.attributes["error.type"])
    error_type = failed[0][0].attributes.get("error.type") or next(
        span.attributes["error.type"] for span in failed[0] if "error.type" in span.attributes
    )
    assert filled.traces("shop", tags={"error.type": error_type})
    assert filled.traces("shop", tags={"obsdag.execution.outcome": "error"}, operation="execute deliver")


@needs_jaeger
def test_jaeger_finds_slow_contexts(filled: Jaeger) -> None:
    slow = _found(filled, "shop", operation="context orders", minDuration="400ms")

    roots = [span for spans in slow for span in spans if span.name == "context orders"]
    assert SLOW in {root.attributes["obsdag.context.id"] for root in roots}
    assert all(root.end_ns - root.start_ns >= 400_000_000 for root in roots)
    assert not filled.traces("shop", operation="context orders", minDuration="10m")


@needs_jaeger
def test_jaeger_has_no_orphans(filled: Jaeger) -> None:
    for service in ("shop", "back-office"):
        found = filled.traces(service, limit=1000)
        assert found
        for each in found:
            check_shape(spans_of(filled.whole(each["traceID"])))


def test_otlp_json_is_read_as_it_is_sent() -> None:
    values = {"arrayValue": {"values": [{"intValue": "3"}, {"boolValue": True}]}}
    sent = {"traceId": "a1", "spanId": "b2", "name": "n", "kind": 5, "startTimeUnixNano": "1", "endTimeUnixNano": "2"}
    sent |= {"status": {"code": 2}, "attributes": [{"key": "k", "value": values}]}
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "s"}}]}
    scopes = [{"scope": {"name": "obsdag"}, "spans": [sent]}]

    (span,) = spans_of({"resourceSpans": [{"resource": resource, "scopeSpans": scopes}]})

    assert (span.kind, span.status) == ("CONSUMER", "ERROR")
    assert (span.attributes, span.resource) == ({"k": [3, True]}, {"service.name": "s"})
