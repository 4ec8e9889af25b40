"""S4: the caller's trace is taken over; also where telemetry is on and tracing is not."""

from __future__ import annotations

import asyncio

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry

from obsdag import DAG, Context, Telemetry, Tracing
from obsdag.testing import CollectedSpans, capture_logs
from tests.serve.helpers import serve, sleeper

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CARRIER = {"Traceparent": f"00-{TRACE}-{SPAN}-01"}


def _telemetry(spans: CollectedSpans) -> Telemetry:
    return Telemetry("serve-test", CollectorRegistry(), Tracing(processors=(spans,), sample=1.0), logs=False)


async def _context_spans(spans: CollectedSpans, number: int) -> list[object]:
    async with asyncio.timeout(5):
        while len(found := [s for s in spans.spans if s.name.startswith("context ")]) < number:
            await asyncio.sleep(0.01)
    return found


async def test_S4_a_carrier_is_the_parent_or_a_link() -> None:
    spans = CollectedSpans()
    telemetry = _telemetry(spans)
    async with serve(sleeper(), telemetry=telemetry) as executor:
        await executor.execute({}, id="child", carrier=CARRIER)
        await executor.execute({}, id="link", carrier=CARRIER, trace="link")
    found = {span.attributes["obsdag.context.id"]: span for span in await _context_spans(spans, 2)}  # type: ignore[attr-defined]
    await telemetry.close()

    child, link = found["child"], found["link"]
    assert f"{child.context.trace_id:032x}" == TRACE
    assert f"{child.parent.span_id:016x}" == SPAN
    assert f"{link.context.trace_id:032x}" != TRACE
    assert link.parent is None
    assert [
        f"{each.context.span_id:016x}" for each in link.links if each.attributes["obsdag.link.type"] == "submitter"
    ] == [SPAN]


async def test_S4_without_a_carrier_the_current_span_is_taken_over_and_does_not_leak_into_the_next() -> None:
    spans = CollectedSpans()
    telemetry = _telemetry(spans)
    tracer = TracerProvider().get_tracer("test")
    async with serve(sleeper(), telemetry=telemetry) as executor:
        with tracer.start_as_current_span("request") as request:
            await executor.execute({}, id="inside")
        await executor.execute({}, id="outside")
    found = {span.attributes["obsdag.context.id"]: span for span in await _context_spans(spans, 2)}  # type: ignore[attr-defined]
    await telemetry.close()

    assert found["inside"].parent.span_id == request.get_span_context().span_id
    assert found["outside"].parent is None
    assert found["outside"].context.trace_id != request.get_span_context().trace_id


async def test_S4_what_waits_for_a_place_keeps_the_trace_of_its_own_caller() -> None:
    spans = CollectedSpans()
    telemetry = _telemetry(spans)
    tracer = TracerProvider().get_tracer("test")
    parents: dict[str, int] = {}
    async with serve(sleeper(), telemetry=telemetry, max_live_contexts=1, max_pending=0) as executor:

        async def request(name: str) -> None:
            with tracer.start_as_current_span(name) as span:
                parents[name] = span.get_span_context().span_id
                await executor.execute({"s": 0.001}, id=name)

        await asyncio.gather(*(request(f"r{n}") for n in range(5)))
    found = await _context_spans(spans, 5)
    await telemetry.close()
    assert {s.attributes["obsdag.context.id"]: s.parent.span_id for s in found} == parents  # type: ignore[attr-defined]


@pytest.mark.parametrize("logs", [True, False])
async def test_S4_a_carrier_does_no_harm_where_nobody_traces(logs: bool) -> None:
    """The caller stands where a tracer would have put its own record: log lines must not stumble over it."""
    dag = DAG()

    @dag.task
    async def fails(ctx: Context) -> Context:
        raise ValueError("on purpose") if ctx is not None else TypeError

    telemetry = Telemetry("serve-test", CollectorRegistry(), Tracing(mode="off"), logs=logs)
    with capture_logs() as lines:
        async with serve(dag, telemetry=telemetry) as executor:
            ticket = await executor.submit({}, carrier=CARRIER)
            with pytest.raises(Exception, match="on purpose"):
                await ticket.result()
            assert executor._shells[0].run.facts.failures == 0
    assert not [line for line in lines if line["event"] in ("observer.failed", "telemetry.observer_failed")]
    assert not trace.get_current_span().get_span_context().is_valid
