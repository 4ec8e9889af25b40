"""Live tracing: ordinary spans through the host's tracer provider (TELEMETRY section 3)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, get_current_span, use_span

from obsdag import DAG, Context
from obsdag.telemetry.tracing import Caller, Tracing
from tests.telemetry.tracing_helpers import Collected, check_shape, outline, run_traced


class Host:
    """A host process with a provider of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sampler: Sampler = ALWAYS_ON) -> None:
        self.kept = Collected()
        self.provider = TracerProvider(
            sampler=sampler, resource=Resource.create({"service.name": "host"}), shutdown_on_exit=False
        )
        self.provider.add_span_processor(self.kept)
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", self.provider)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    return Host(monkeypatch)


async def same(ctx: Context) -> Context:
    return ctx


async def test_auto_is_live_where_the_host_has_a_provider(host: Host) -> None:
    assert Tracing().resolved_mode() == "live"

    dag = DAG("dag")
    dag.task(name="a")(same)
    dag.task(name="b", after="a")(same)
    await run_traced(dag, tracing=Tracing())

    check_shape(host.kept.spans)
    assert outline(host.kept.spans) == [
        "context dag output",
        "  execute a success",
        "  execute b success",
        "run dag ok",
    ]
    assert host.kept.spans[0].scope == "obsdag"
    assert host.kept.spans[0].resource["service.name"] == "host"


async def test_deferred_tracing_takes_the_hosts_service_name(host: Host) -> None:
    dag, kept = DAG("dag"), Collected()
    dag.task(name="a")(same)
    await run_traced(dag, tracing=Tracing([kept], sample=1.0))

    assert host.kept.spans == []
    assert kept.spans[0].resource["service.name"] == "host"


async def test_users_spans_are_children_of_the_execution(host: Host) -> None:
    dag = DAG("dag")

    @dag.task
    async def step(ctx: Context) -> Context:
        get_current_span().set_attribute("rows", 3)
        with trace.get_tracer("users").start_as_current_span("mine"):
            pass
        return ctx

    await run_traced(dag, tracing=Tracing())

    check_shape(host.kept.spans)
    assert host.kept.one("mine").parent_id == host.kept.one("execute step").span_id
    assert host.kept.one("execute step").attributes["rows"] == 3


async def test_retry_failure_and_links(host: Host) -> None:
    dag, failures = DAG("dag"), [ValueError("once")]

    @dag.task(retry_times=1)
    async def flaky(ctx: Context) -> Context:
        if failures:
            raise failures.pop()
        return ctx

    @dag.task(after=flaky)
    async def broken(ctx: Context) -> Context:
        raise KeyError("gone")

    await run_traced(dag, tracing=Tracing())

    check_shape(host.kept.spans)
    assert outline(host.kept.spans) == [
        "context dag failed ERROR:KeyError",
        "  execute flaky error ERROR:ValueError",
        "  execute flaky success #2 retry->execute flaky",
        "  execute broken error ERROR:KeyError",
        "run dag failed ERROR:failed",
    ]


async def test_children_joins_and_waits(host: Host) -> None:
    dag = DAG("dag")

    async def items(ctx: Context) -> Any:
        for number in range(3):
            yield {"n": number}

    async def work(ctx: Context) -> Context:
        await asyncio.sleep(0.12 if ctx["n"] == 2 else 0)
        return ctx

    async def gather(ctx: Context, children: list[Context]) -> Context:
        return ctx

    dag.task(name="items", kind="map")(items)
    dag.task(name="work", after="items")(work)
    dag.task(name="gather", kind="join", after="work")(gather)

    await run_traced(dag, tracing=Tracing())

    check_shape(host.kept.spans)
    join = host.kept.one("execute gather")
    assert set(join.linked("upstream")) == {span.span_id for span in host.kept.named("execute work")}
    assert len(host.kept.named("wait join_wait")) == 2
    assert len({span.trace_id for span in host.kept.spans}) == 2


async def test_an_execution_that_ends_after_its_context_is_within_it(host: Host) -> None:
    dag = DAG("dag")

    async def slow(ctx: Context) -> Context:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.02)
            raise
        return ctx

    async def broken(ctx: Context) -> Context:
        await asyncio.sleep(0.01)
        raise RuntimeError("no")

    dag.task(name="slow")(slow)
    dag.task(name="broken")(broken)

    await run_traced(dag, tracing=Tracing(), task_worker_num=2)

    check_shape(host.kept.spans)
    assert host.kept.one("execute slow").attributes["obsdag.execution.outcome"] == "cancelled"


async def test_loop_items_have_traces_of_their_own(host: Host) -> None:
    dag = DAG("dag")

    async def pull(ctx: Context) -> Any:
        for _ in range(2):
            yield ctx.create_child()

    dag.task(name="pull", kind="loop")(pull)
    dag.task(name="use", after="pull")(same)

    await run_traced(dag, tracing=Tracing())

    check_shape(host.kept.spans)
    items = [span for span in host.kept.named("context dag") if span.linked("input")]
    assert len(items) == 2
    assert len({span.trace_id for span in host.kept.spans}) == 1 + 1 + 2 + 3  # run, input, items, pulls


@pytest.mark.parametrize("mode", ["child", "link"])
async def test_S4_the_caller(host: Host, mode: str) -> None:
    dag, context = DAG("dag"), Context()
    dag.task(name="a")(same)
    context._trace = Caller(SpanContext(0xABC, 0xDEF, True, TraceFlags(1)), mode)

    await run_traced(dag, [context], tracing=Tracing())

    span = host.kept.one("context dag")
    assert (span.parent_id == f"{0xDEF:016x}") is (mode == "child")
    assert span.linked("submitter") == ([f"{0xDEF:016x}"] if mode == "link" else [])


async def test_the_hosts_head_sampling_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, ALWAYS_OFF)
    dag = DAG("dag")

    @dag.task
    async def broken(ctx: Context) -> Context:
        raise ValueError

    await run_traced(dag, tracing=Tracing())

    assert host.kept.spans == []


async def test_the_run_span_is_a_child_of_the_callers(host: Host) -> None:
    dag = DAG("dag")
    dag.task(name="a")(same)

    with use_span(NonRecordingSpan(SpanContext(0xABC, 0xDEF, False, TraceFlags(1)))):
        await run_traced(dag, tracing=Tracing())

    assert host.kept.one("run dag").parent_id == f"{0xDEF:016x}"
    assert not host.kept.one("context dag").parent_id


async def test_off_makes_nothing(host: Host) -> None:
    dag = DAG("dag")
    dag.task(name="a")(same)

    await run_traced(dag, tracing=Tracing(mode="off"))

    assert host.kept.spans == []
