"""Traces of a serving executor: the caller's trace goes on, by whatever way it came (SEMANTICS S4)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import baggage
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, get_current_span, use_span
from prometheus_client import CollectorRegistry

from obsdag import DAG, Context, ContextFailedError, ExecutorConfig, SQLiteJournal
from obsdag.serve import ServeExecutor
from obsdag.telemetry import Telemetry
from obsdag.telemetry.tracing import Tracing
from tests.telemetry.tracing_helpers import Collected, check_shape, telemetry_of

TRACE, SPAN = f"{0xABC:032x}", f"{0xDEF:016x}"
CARRIER = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1", "baggage": "tenant=blue"}


def dag_of(seen: list[Any]) -> DAG:
    dag = DAG("requests")

    @dag.task
    async def answer(ctx: Context) -> Context:
        context = get_current_span().get_span_context()
        seen.append((context.trace_id, context.trace_state.to_header(), baggage.get_baggage("tenant")))
        return ctx

    return dag


async def served(tracing: Tracing, seen: list[Any], **submission: Any) -> None:
    config = ExecutorConfig(telemetry=telemetry_of(tracing))
    async with ServeExecutor(dag_of(seen), config=config) as server:
        ticket = await server.submit({"n": 1}, **submission)
        await ticket.result()


async def test_S4_a_carriers_trace_goes_on_with_state_and_baggage() -> None:
    kept, seen = Collected(), []

    await served(Tracing([kept], sample=0.0), seen, carrier=CARRIER)

    check_shape(kept.spans, known=[SPAN])
    context = kept.one("context requests")
    assert (context.trace_id, context.parent_id, context.trace_state) == (TRACE, SPAN, "vendor=1")
    assert seen == [(0xABC, "vendor=1", "blue")]


async def test_S4_a_link_starts_a_trace_of_its_own() -> None:
    kept, seen = Collected(), []

    await served(Tracing([kept], sample=0.0), seen, carrier=CARRIER, trace="link")

    context = kept.one("context requests")
    assert context.trace_id != TRACE
    assert not context.parent_id
    assert context.linked("submitter") == [SPAN]
    assert seen[0][2] == "blue"


async def test_S4_without_a_carrier_the_current_span_is_the_caller() -> None:
    kept = Collected()

    with use_span(NonRecordingSpan(SpanContext(0xABC, 0xDEF, False, TraceFlags(1)))):
        await served(Tracing([kept], sample=0.0), [])

    assert kept.one("context requests").parent_id == SPAN


async def test_S4_requests_do_not_see_each_others_traces() -> None:
    kept, seen = Collected(), []
    config = ExecutorConfig(telemetry=telemetry_of(Tracing([kept], sample=0.0)))

    async with ServeExecutor(dag_of(seen), config=config) as server:
        for number in range(1, 4):
            carrier = {"traceparent": f"00-{number:032x}-{number:016x}-01", "baggage": f"tenant=t{number}"}
            await (await server.submit({}, carrier=carrier)).result()
        await (await server.submit({})).result()

    assert [(trace_id, tenant) for trace_id, _, tenant in seen[:3]] == [(n, f"t{n}") for n in range(1, 4)]
    assert seen[3][0] not in (0, 1, 2, 3)
    assert seen[3][2] is None
    check_shape(kept.spans, known=[f"{number:016x}" for number in range(1, 4)])


@pytest.mark.parametrize("mode", ["off", "auto"])
async def test_a_carrier_without_tracing_leaves_logs_and_metrics_alone(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry = Telemetry(registry=CollectorRegistry(), tracing=Tracing(mode=mode), logs=True)
    dag = DAG("requests")

    @dag.task
    async def answer(ctx: Context) -> Context:
        raise ValueError("no answer")

    with caplog.at_level("DEBUG", logger="obsdag"):
        async with ServeExecutor(dag, config=ExecutorConfig(telemetry=telemetry)) as server:
            ticket = await server.submit({}, carrier=CARRIER)
            with pytest.raises(ContextFailedError):
                await ticket.result()

    assert any("execution.failed" in record.message for record in caplog.records)
    assert not any(count for (_, reason), count in telemetry.stats.dropped.items() if reason == "observer_failed")


@pytest.mark.parametrize("mode", ["child", "link"])
async def test_S4_the_callers_trace_goes_on_after_a_crash(tmp_path: Path, mode: str) -> None:
    lost, kept, seen = Collected(), Collected(), []
    never = DAG("requests")

    @never.task
    async def answer(ctx: Context) -> Context:
        await asyncio.Event().wait()
        return ctx

    def config(exporter: Collected) -> ExecutorConfig:
        journal = SQLiteJournal(tmp_path / "j.db", durability="process")
        return ExecutorConfig(telemetry=telemetry_of(Tracing([exporter], sample=1.0)), journal=journal)

    server = await ServeExecutor(never, config=config(lost)).start()
    await server.submit({"n": 1}, carrier=CARRIER, trace=mode)  # type: ignore[arg-type]
    await server.drain(grace=0.0)  # a crash would do as well
    async with ServeExecutor(dag_of(seen), config=config(kept)):
        pass

    context = kept.one("context requests")
    assert (context.parent_id, context.linked("submitter")) == ((SPAN, []) if mode == "child" else ("", [SPAN]))
    assert (context.trace_id == TRACE) is (mode == "child")
    assert seen[0][2] == "blue", "baggage"
