"""Traces of runs on shards, as a real receiver got them over HTTP: the same shapes as those of local runs."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from opentelemetry import baggage, trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry

from obsdag import DAG, Executor, ExecutorConfig, Telemetry, Tracing
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.shards import dags
from tests.telemetry.tracing_helpers import check_shape, outline

pytest.importorskip("ray", reason="needs Ray: pip install 'obsdag[ray]'")
from obsdag.ray import RayExecutor, RayServeExecutor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.leaves("processes", "the cluster's nodes stay for the tests of this file"),
    pytest.mark.leaves(
        "files", "the connection to Ray opens sockets to its processes as it needs them, and keeps them"
    ),
]

PLACE = {"resources": {"shard": 1}, "num_cpus": 1}
ONE_BY_ONE = ExecutorConfig(context_worker_num=1, task_worker_num=0)
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traced:
    """Makes telemetry that keeps every trace and sends it to a receiver; carried to shards."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def __call__(self, shard: str) -> Telemetry:
        tracing = Tracing.otlp(self.endpoint, sample=1.0)
        return Telemetry(engine="test", registry=CollectorRegistry(), tracing=tracing, logs=False)


def runs(spans: Iterable[ReceivedSpan]) -> list[ReceivedSpan]:
    return [span for span in spans if span.name.startswith("run ")]


def shapes(spans: Iterable[ReceivedSpan]) -> Counter[tuple[str, ...]]:
    """How often each shape of a trace occurs; how long anything waited is not part of its shape."""
    traces: dict[str, list[ReceivedSpan]] = defaultdict(list)
    for span in spans:
        if not span.name.startswith(("run ", "wait ")):
            traces[span.trace_id].append(span)
    return Counter(tuple(outline(found)) for found in traces.values())


async def sent_locally(dag: DAG, inputs: list[Any]) -> list[ReceivedSpan]:
    with OtlpReceiver() as receiver:
        config = ONE_BY_ONE.replace(telemetry=Traced(receiver.endpoint)(""))
        await Executor(dag, config=config).run(inputs)
        return receiver.wait(runs)


async def once_there(executor: RayExecutor, inputs: list[Any]) -> AsyncIterator[Any]:
    """The inputs, once all shards are there: else the first one takes them all."""
    while len(executor.targets) < executor.shards:
        await asyncio.sleep(0.01)
    for each in inputs:
        yield each


async def sent_by_shards(dag: DAG, inputs: list[Any], shards: int = 2) -> list[ReceivedSpan]:
    with OtlpReceiver() as receiver:
        make = Traced(receiver.endpoint)
        executor = RayExecutor(dag, ONE_BY_ONE, shards=shards, shard_options=PLACE, telemetry=make, ops={})
        await executor.run(once_there(executor, inputs))
        return receiver.wait(lambda spans: len(runs(spans)) == shards)


@pytest.mark.parametrize(("dag", "number"), [(dags.mixed, 24), (dags.slow, 6)], ids=["mixed", "slow"])
async def test_traces_have_the_shapes_of_local_ones(nodes: Any, dag: DAG, number: int) -> None:
    inputs = [{"x": x} for x in range(number)]

    local, far = await sent_locally(dag, inputs), await sent_by_shards(dag, inputs)

    check_shape(far)
    assert shapes(far) == shapes(local)
    assert sum(shapes(far).values()) >= number
    run_ids = {span.span_id for span in runs(far)}
    contexts = [span for span in far if span.name.startswith("context ")]
    linked = [span.linked("run") for span in contexts]
    assert all(len(links) == 1 and links[0] in run_ids for links in linked), "each root links to its shard's run"


async def test_a_golden_trace_of_a_shard(nodes: Any) -> None:
    far = await sent_by_shards(dags.slow, [{"x": 1}], shards=1)

    assert outline(far) == [
        "context slow output",
        "  execute split success",
        "    execute work error ERROR:OSError",
        "    execute work success #2 retry->execute work",
        "  execute split success",
        "    execute work error ERROR:OSError",
        "    execute work success #2 retry->execute work",
        "  execute split success",
        "    execute work error ERROR:OSError",
        "    execute work success #2 retry->execute work",
        "  execute split success",
        "  execute gather success upstream->execute work upstream->execute work upstream->execute work",
        "run slow ok",
    ]


async def test_runs_on_shards_go_on_with_the_span_and_the_baggage_of_the_driver(nodes: Any) -> None:
    tracer = TracerProvider().get_tracer("test")
    with OtlpReceiver() as receiver:
        make = Traced(receiver.endpoint)
        executor = RayExecutor(dags.baggage, ONE_BY_ONE, shards=2, shard_options=PLACE, telemetry=make, ops={})
        with tracer.start_as_current_span("request") as request:
            token = attach(baggage.set_baggage("customer", "c-7"))
            outputs = await executor.run(once_there(executor, [{"x": x} for x in range(4)]))
            detach(token)
        spans = receiver.wait(lambda spans: len(runs(spans)) == 2)

    caller = request.get_span_context()
    assert {span.parent_id for span in runs(spans)} == {f"{caller.span_id:016x}"}
    assert {span.trace_id for span in runs(spans)} == {f"{caller.trace_id:032x}"}
    assert [output["customer"] for output in outputs] == ["c-7"] * 4
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_S4_a_carrier_is_the_parent_or_a_link_on_a_shard(nodes: Any) -> None:
    carrier = {"Traceparent": f"00-{TRACE}-{SPAN}-01", "baggage": "customer=c-8"}
    with OtlpReceiver() as receiver:
        make = Traced(receiver.endpoint)
        async with RayServeExecutor(dags.baggage, shards=1, shard_options=PLACE, telemetry=make) as executor:
            output = await executor.execute({}, id="child", carrier=carrier)
            await executor.execute({}, id="link", carrier=carrier, trace="link")
            await executor.execute({}, id="alone")
        spans = receiver.wait(runs)

    check_shape(spans, known=[SPAN])
    found = {span.attributes["obsdag.context.id"]: span for span in spans if span.name.startswith("context ")}
    assert output["customer"] == "c-8"
    assert (found["child"].trace_id, found["child"].parent_id) == (TRACE, SPAN)
    assert found["link"].linked("submitter") == [SPAN]
    assert not found["alone"].links[1:]
    assert {found["link"].parent_id, found["alone"].parent_id} == {""}
    assert len({span.trace_id for span in found.values()}) == 3
