"""Whole traces as golden text, and what holds for all of them together: as a real receiver got them over HTTP."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import obsdag
from obsdag import DAG, Context, Executor, ExecutorConfig, ServeExecutor
from obsdag.telemetry.tracing import Tracing
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.telemetry.tracing_helpers import Collected, check_shape, outline, telemetry_of


async def sent(dag: DAG, inputs: Any = None, **settings: Any) -> list[ReceivedSpan]:
    with OtlpReceiver() as receiver:
        telemetry = telemetry_of(Tracing.otlp(receiver.endpoint, sample=1.0))
        async with Executor(dag, config=ExecutorConfig(telemetry=telemetry, **settings)) as executor:
            await executor.run(inputs)
        spans = receiver.wait(lambda spans: any(span.name.startswith("run ") for span in spans))
    check_shape(spans)
    return spans


async def _same(ctx: Context) -> Context:
    return ctx


def far(ctx: Any) -> Any:
    """Runs in a worker process."""
    return ctx


async def test_map_and_join() -> None:
    dag = DAG("mapped")

    async def items(ctx: Context) -> Any:
        for _ in range(2):
            yield ctx.create_child()

    async def gather(ctx: Context, children: list[Context]) -> Context:
        return ctx

    dag.task(name="items", kind="map")(items)
    dag.task(name="work", after="items")(_same)
    dag.task(name="gather", kind="join", after="work")(gather)
    dag.task(name="after", after="gather")(_same)

    assert outline(await sent(dag)) == [
        "context mapped output",
        "  execute items success",
        "    execute work success",
        "  execute items success",
        "    execute work success",
        "  execute items success",
        "  execute gather success upstream->execute work upstream->execute work",
        "  execute after success",
        "run mapped ok",
    ]


async def test_diamond() -> None:
    dag = DAG("diamond")
    dag.task(name="top")(_same)
    dag.task(name="left", after="top")(_same)
    dag.task(name="right", after="top")(_same)
    dag.task(name="bottom", after=["left", "right"])(_same)

    assert outline(await sent(dag)) == [
        "context diamond output",
        "  execute top success",
        "  execute left success",
        "  execute right success",
        "  execute bottom success upstream->execute left upstream->execute right",
        "run diamond ok",
    ]


async def test_sub_graph_is_one_trace_with_names_of_both() -> None:
    inner = DAG("inner")
    inner.task(name="wash")(_same)
    inner.task(name="dry", after="wash")(_same)
    dag = DAG("outer")
    dag.task(name="collect")(_same)
    dag.include(inner, name="laundry", after="collect")
    dag.task(name="fold", after="laundry")(_same)

    assert outline(await sent(dag)) == [
        "context outer output",
        "  execute collect success",
        "  execute laundry/wash success",
        "  execute laundry/dry success",
        "  execute fold success",
        "run outer ok",
    ]


async def test_threads_and_processes() -> None:
    dag = DAG("pools")

    def near(ctx: Context) -> Context:
        return ctx

    dag.task(name="near")(near)
    dag.task(name="far", kind="process", after="near")(far)

    spans = await sent(dag, thread_pool_worker_num=1, process_pool_worker_num=1)

    assert [line for line in outline(spans) if "wait" not in line] == [
        "context pools output",
        "  execute near success",
        "  execute far success",
        "    dispatch far",
        "run pools ok",
    ]
    ran_on = {span.name: span.attributes["obsdag.executor"] for span in spans if span.name.startswith("execute ")}
    assert ran_on == {"execute near": "thread", "execute far": "process"}


async def test_the_critical_path_of_branches_is_marked() -> None:
    dag = DAG("race")

    @dag.task
    async def slow(ctx: Context) -> Context:
        await asyncio.sleep(0.05)
        return ctx

    dag.task(name="quick")(_same)
    dag.task(name="end", after=[slow, "quick"])(_same)

    spans = await sent(dag, task_worker_num=0)

    marked = {span.name for span in spans if span.attributes.get("obsdag.critical")}
    assert marked == {"execute slow", "execute end"}


# --- many submitters at once


PROVIDER = TracerProvider()
SEEN: dict[int, set[int]] = defaultdict(set)
"""Of each submission's number, the traces that its tasks found themselves in."""


def load_dag() -> DAG:
    """Every way in which an execution can run, with a span of the user's own in each."""
    dag = DAG("load")

    async def look(ctx: Context) -> Context:
        _note(ctx)
        with PROVIDER.get_tracer("users").start_as_current_span("users work") as span:
            span.set_attribute("number", ctx["number"])
            await asyncio.sleep(random.random() * 0.002)
        return ctx

    def look_in_thread(ctx: Context) -> Context:
        _note(ctx)
        return ctx

    async def spread(ctx: Context) -> Any:
        _note(ctx)
        for _ in range(2):
            yield ctx.create_child()

    async def gather(ctx: Context, children: list[Context]) -> Context:
        _note(ctx)
        return ctx

    async def flaky(ctx: Context) -> Context:
        _note(ctx)
        if ctx["number"] % 7 == 0 and ctx.attempt == 1:
            raise ValueError("once")
        return ctx

    dag.task(name="look")(look)
    dag.task(name="thread", after="look")(look_in_thread)
    dag.task(name="flaky", after="look", retry_times=1)(flaky)
    dag.task(name="spread", kind="map", after=["thread", "flaky"])(spread)
    dag.task(name="leaf", after="spread")(_leaf)
    dag.task(name="gather", kind="join", after="leaf")(gather)
    return dag


def _note(ctx: Context) -> None:
    """In which trace the submission's number was seen."""
    SEEN[ctx["number"]].add(trace.get_current_span().get_span_context().trace_id)


async def _leaf(ctx: Context) -> Context:
    SEEN[ctx.parent["number"]].add(trace.get_current_span().get_span_context().trace_id)
    return ctx


SUBMITTERS, EACH = 50, 10


async def test_no_trace_leaks_into_another_under_a_full_load_of_submitters() -> None:
    SEEN.clear()
    users = Collected()
    PROVIDER.add_span_processor(obsdag.hold(users))
    with OtlpReceiver() as receiver:
        tracing = Tracing.otlp(receiver.endpoint, sample=0.0)
        config = ExecutorConfig(
            context_worker_num=8,
            task_worker_num=2,
            thread_pool_worker_num=4,
            max_live_contexts=64,
            max_pending=SUBMITTERS * EACH,
            telemetry=telemetry_of(tracing),
        )
        async with ServeExecutor(load_dag(), config=config) as server:

            async def submitter(first: int) -> None:
                for number in range(first, first + EACH):
                    carrier = {"traceparent": f"00-{number:032x}-{number:016x}-01"}
                    await (await server.submit({"number": number}, carrier=carrier)).result(timeout=60)

            await asyncio.gather(*(submitter(1 + EACH * index) for index in range(SUBMITTERS)))
        spans = receiver.wait(lambda spans: sum(span.name == "context load" for span in spans) == SUBMITTERS * EACH)

    assert {number: {number} for number in range(1, SUBMITTERS * EACH + 1)} == SEEN
    check_shape(spans, known=[f"{number:016x}" for number in range(1, SUBMITTERS * EACH + 1)])
    assert all(int(span.trace_id, 16) == span.attributes["number"] for span in users.spans)
    assert len(users.spans) == SUBMITTERS * EACH
    by_trace = defaultdict(list)
    for span in spans:
        by_trace[int(span.trace_id, 16)].append(span)
    for number in range(1, SUBMITTERS * EACH + 1):
        names = sorted(span.name for span in by_trace[number] if span.name.startswith(("execute", "context")))
        flaky = ["execute flaky"] * (2 if number % 7 == 0 else 1)
        assert names == sorted(
            ["context load", "execute look", "execute thread", "execute gather", *flaky]
            + ["execute spread"] * 3
            + ["execute leaf"] * 2
        )
    stats = config.telemetry.stats
    assert not {key: lost for key, lost in stats.dropped.items() if lost}


# --- exemplars


async def test_every_exemplar_names_a_span_that_the_receiver_has() -> None:
    dag = DAG("shop")

    @dag.task
    async def charge(ctx: Context) -> Context:
        await asyncio.sleep(0.004 if ctx["n"] % 10 == 0 else 0)
        if ctx["n"] == 77:
            raise ValueError("refused")
        return ctx

    with OtlpReceiver() as receiver:
        tracing = Tracing.otlp(receiver.endpoint, sample=0.05)
        telemetry = telemetry_of(tracing)
        executor = Executor(dag, config=ExecutorConfig(context_worker_num=4, telemetry=telemetry))
        await executor.run({"n": n} for n in range(400))
        spans = receiver.wait(lambda spans: any(span.name == "run shop" for span in spans))

    page = generate_latest(telemetry.metrics.registry).decode()
    exemplars = [
        (family.name, sample.exemplar.labels)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.exemplar is not None
    ]
    assert {name for name, _ in exemplars} >= {"obsdag_root_seconds", "obsdag_task_seconds"}
    known = {(span.trace_id, span.span_id) for span in spans}
    assert [labels for _, labels in exemplars if (labels["trace_id"], labels["span_id"]) not in known] == []


@pytest.mark.parametrize("workers", [1, 4])
async def test_concurrent_runs_of_two_dags_share_nothing(workers: int) -> None:
    dags = []
    for name in ("red", "blue"):
        dag = DAG(name)
        dag.task(name=f"{name}-first")(_same)
        dag.task(name=f"{name}-second", after=f"{name}-first")(_same)
        dags.append(dag)

    with OtlpReceiver() as receiver:
        telemetry = telemetry_of(Tracing.otlp(receiver.endpoint, sample=1.0))
        config = ExecutorConfig(context_worker_num=workers, telemetry=telemetry)
        inputs = [{"n": n} for n in range(50)]
        await asyncio.gather(*(Executor(dag, config=config).run(inputs) for dag in dags for _ in range(2)))
        spans = receiver.wait(lambda spans: sum(span.name.startswith("run ") for span in spans) == 4)

    check_shape(spans)
    traces = defaultdict(set)
    for span in spans:
        traces[span.trace_id].add((span.attributes["obsdag.dag"], span.attributes.get("obsdag.context.id")))
    assert len(traces) == 4 * 50 + 4
    assert {len(found) for found in traces.values()} == {1}
