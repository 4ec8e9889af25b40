"""The shape of traces, as a real receiver got them over HTTP (TELEMETRY section 3)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry import trace

from obsdag import DAG, ConcurrencyLimit, Context, Executor, ExecutorConfig, RateLimitContext
from obsdag.telemetry.tracing import Tracing
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.telemetry.tracing_helpers import check_shape, outline, run_traced, telemetry_of


async def sent(dag: DAG, inputs: Any = None, known: tuple[str, ...] = (), **settings: Any) -> list[ReceivedSpan]:
    """Runs a DAG with every trace kept, and gives what the receiver got after checking its shape."""
    with OtlpReceiver() as receiver:
        await run_traced(dag, inputs, tracing=Tracing.otlp(receiver.endpoint, sample=1.0), **settings)
        spans = receiver.wait(lambda spans: any(span.name.startswith("run ") for span in spans))
    check_shape(spans, known)
    return spans


def chain() -> DAG:
    dag = DAG("chain")

    @dag.task
    async def first(ctx: Context) -> Context:
        return ctx

    @dag.task(after=first)
    async def second(ctx: Context) -> Context:
        return ctx

    return dag


async def test_chain() -> None:
    spans = await sent(chain())

    assert outline(spans) == [
        "context chain output",
        "  execute first success",
        "  execute second success",
        "run chain ok",
    ]
    context = next(span for span in spans if span.name == "context chain")
    run = next(span for span in spans if span.name == "run chain")
    execution = next(span for span in spans if span.name == "execute second")
    assert context.kind == "CONSUMER"
    assert execution.kind == run.kind == "INTERNAL"
    assert context.linked("run") == [run.span_id]
    assert context.trace_id != run.trace_id
    assert {span.scope for span in spans} == {"obsdag"}
    assert {span.attributes["obsdag.engine"] for span in spans} == {"test"}
    assert {span.attributes["obsdag.dag"] for span in spans} == {"chain"}


async def test_attributes_of_executions_and_contexts() -> None:
    spans = await sent(chain(), [Context(name="item-7")])

    execution = next(span for span in spans if span.name == "execute first")
    assert execution.attributes | {} == {
        "obsdag.engine": "test",
        "obsdag.dag": "chain",
        "obsdag.context.id": "item-7",
        "obsdag.task": "first",
        "obsdag.attempt": 1,
        "obsdag.execution.outcome": "success",
        "obsdag.lane": "new",
        "obsdag.worker": 0,
        "obsdag.executor": "loop",
        "obsdag.critical": True,
    }
    context = next(span for span in spans if span.name == "context chain")
    ledger = {key: value for key, value in context.attributes.items() if key.startswith("obsdag.ledger.")}
    assert sum(ledger.values()) == pytest.approx((context.end_ns - context.start_ns) / 1e9, abs=1e-6)
    assert "obsdag.context.parent_id" not in context.attributes


async def test_diamond_links_its_upstreams() -> None:
    dag = DAG("diamond")
    dag.task(name="top")(_same)
    dag.task(name="left", after="top")(_same)
    dag.task(name="right", after="top")(_same)
    dag.task(name="bottom", after=["left", "right"])(_same)

    spans = await sent(dag, task_worker_num=2)

    bottom = next(span for span in spans if span.name == "execute bottom")
    upstream = {span.span_id for span in spans if span.name in ("execute left", "execute right")}
    assert set(bottom.linked("upstream")) == upstream
    assert len(upstream) == 2
    assert bottom.attributes["obsdag.join.upstream_count"] == 2


async def test_retry_is_linked_and_leaves_the_context_unset() -> None:
    dag = DAG("flaky")
    failures = [ValueError("not yet")]

    @dag.task(retry_times=2)
    async def step(ctx: Context) -> Context:
        if failures:
            raise failures.pop()
        return ctx

    spans = await sent(dag)

    assert outline(spans) == [
        "context flaky output",
        "  execute step error ERROR:ValueError",
        "  execute step success #2 retry->execute step",
        "run flaky ok",
    ]
    failed = next(span for span in spans if span.status == "ERROR")
    ((name, event, at),) = failed.events
    assert name == "exception"
    assert at == failed.end_ns
    assert event["exception.type"] == "ValueError"
    assert event["exception.message"] == "not yet"
    assert "raise failures.pop()" in event["exception.stacktrace"]


async def test_failure_is_an_error_of_execution_and_context() -> None:
    dag = DAG("broken")

    @dag.task
    async def step(ctx: Context) -> Context:
        raise KeyError("gone")

    spans = await sent(dag)

    assert outline(spans) == [
        "context broken failed ERROR:KeyError",
        "  execute step error ERROR:KeyError",
        "run broken failed ERROR:failed",
    ]


async def test_router_leaves_out_what_it_does_not_choose() -> None:
    dag = DAG("routed")

    async def choose(ctx: Context) -> str:
        return "right"

    dag.task(name="choose", kind="router")(choose)
    dag.task(name="left", after="choose")(_same)
    dag.task(name="right", after="choose")(_same)

    assert outline(await sent(dag)) == [
        "context routed output",
        "  execute choose success",
        "  execute right success",
        "run routed ok",
    ]


async def test_deferral_is_no_attempt_and_no_error() -> None:
    dag = DAG("limited")
    delays = [0.15]

    @dag.task
    async def step(ctx: Context) -> Any:
        return RateLimitContext(ctx, delays.pop()) if delays else ctx

    spans = await sent(dag)

    assert outline(spans) == [
        "context limited output",
        "  execute step success",
        "  wait limit_wait",
        "  execute step success",
        "run limited ok",
    ]
    wait = next(span for span in spans if span.name == "wait limit_wait")
    assert wait.end_ns - wait.start_ns >= 100_000_000


async def test_short_waits_are_attributes_only() -> None:
    dag = DAG("short")
    entered = asyncio.Event()
    limit = ConcurrencyLimit(1)

    @dag.task(limiter=limit)
    async def step(ctx: Context) -> Context:
        if entered.is_set():
            return ctx
        entered.set()
        await asyncio.sleep(0.01)
        return ctx

    spans = await sent(dag, [{}, {}], context_worker_num=2)

    assert not [span for span in spans if span.name.startswith("wait")]
    waited = [span for span in spans if "obsdag.wait_s.limit_wait" in span.attributes]
    assert len(waited) == 1
    assert 0.0 < waited[0].attributes["obsdag.wait_s.limit_wait"] < 0.1


async def test_threads_have_their_execution_as_current_span() -> None:
    dag = DAG("threads")
    seen: list[str] = []

    @dag.task
    def step(ctx: Context) -> Context:
        seen.append(f"{trace.get_current_span().get_span_context().span_id:016x}")
        trace.get_current_span().set_attribute("rows", 3)
        return ctx

    spans = await sent(dag)

    execution = next(span for span in spans if span.name == "execute step")
    assert seen == [execution.span_id]
    assert execution.attributes["obsdag.executor"] == "thread"
    assert execution.attributes["rows"] == 3


async def test_process_tasks_go_on_with_the_trace_and_send_back_what_they_say() -> None:
    dag = DAG("processes")
    dag.task(name="far", kind="process")(speak)
    dag.task(name="near", after="far")(_same)

    spans = await sent(dag, {"n": 20}, process_pool_worker_num=1)

    lines = [line for line in outline(spans) if "wait pool_wait" not in line]  # the worker process takes its time
    assert lines == [
        "context processes output",
        "  execute far success",
        "    dispatch far",
        "  execute near success",
        "run processes ok",
    ]
    execution = next(span for span in spans if span.name == "execute far")
    dispatch = next(span for span in spans if span.name == "dispatch far")
    assert dispatch.kind == "PRODUCER"
    assert execution.attributes["obsdag.executor"] == "process"
    assert execution.attributes["far.trace_id"] == execution.trace_id
    assert execution.attributes["far.parent_id"] == dispatch.span_id
    assert [name for name, _, _ in execution.events] == ["counted"]


async def test_children_are_in_their_roots_trace_below_their_maker() -> None:
    dag = DAG("tree")

    @dag.task
    async def split(ctx: Context) -> list[Context]:
        return ctx.create_child(2)

    dag.task(name="leaf", after=split)(_same)

    spans = await sent(dag)

    assert outline(spans) == [
        "context tree split",
        "  execute split success",
        "    execute leaf success",
        "    execute leaf success",
        "run tree ok",
    ]
    assert len({span.trace_id for span in spans}) == 2
    leaves = {span.attributes["obsdag.context.id"] for span in spans if span.name == "execute leaf"}
    assert len(leaves) == 2


async def test_map_and_join_link_the_joined_children() -> None:
    dag = DAG("mapped")

    async def items(ctx: Context) -> Any:
        for number in range(70):
            yield {"n": number}

    async def gather(ctx: Context, children: list[Context]) -> Context:
        return ctx

    dag.task(name="items", kind="map")(items)
    dag.task(name="work", after="items")(_same)
    dag.task(name="gather", kind="join", after="work")(gather)

    spans = await sent(dag)

    join = next(span for span in spans if span.name == "execute gather")
    work = {span.span_id for span in spans if span.name == "execute work"}
    assert len(work) == 70
    assert len(join.linked("upstream")) == 64
    assert set(join.linked("upstream")) <= work
    assert join.attributes["obsdag.join.upstream_count"] == 70
    assert len({span.trace_id for span in spans if span.name != "run mapped"}) == 1


async def test_made_roots_have_traces_of_their_own_linked_to_their_maker() -> None:
    dag = DAG("made")

    @dag.task
    async def make(ctx: Context) -> list[Context]:
        return [ctx.create(), ctx.create()]

    dag.task(name="after", after=make)(_same)

    spans = await sent(dag)

    maker = next(span for span in spans if span.name == "execute make")
    contexts = [span for span in spans if span.name == "context made"]
    assert sorted(span.attributes["obsdag.context.outcome"] for span in contexts) == ["output", "output", "split"]
    assert [span.linked("maker") for span in contexts if span.attributes["obsdag.context.outcome"] == "output"] == [
        [maker.span_id],
        [maker.span_id],
    ]
    assert len({span.trace_id for span in contexts}) == 3


@pytest.mark.parametrize("as_child", [True, False], ids=["children", "roots"])
async def test_each_pull_of_a_loop_is_a_trace_linked_to_the_input(as_child: bool) -> None:
    dag = DAG("loop")

    async def pull(ctx: Context) -> Any:
        for _ in range(2):
            yield ctx.create_child() if as_child else ctx.create()

    dag.task(name="pull", kind="loop")(pull)
    dag.task(name="use", after="pull")(_same)

    spans = await sent(dag)

    (source,) = [s for s in spans if s.name == "context loop" and s.attributes["obsdag.context.outcome"] == "split"]
    items = [s for s in spans if s.name == "context loop" and s is not source]
    assert len(items) == 2
    for number, item in enumerate(sorted(items, key=lambda span: span.start_ns), start=1):
        inside = [span for span in spans if span.trace_id == item.trace_id]
        assert sorted(span.name for span in inside) == ["context loop", "execute pull", "execute use"]
        assert item.linked("input") == [source.span_id]
        assert item.linked("maker") == [span.span_id for span in inside if span.name == "execute pull"]
        assert item.attributes["obsdag.loop.iteration"] == number
        assert ("obsdag.context.parent_id" in item.attributes) is as_child
    (last,) = [s for s in spans if s.name == "execute pull" and not s.parent_id]
    assert last.linked("input") == [source.span_id]
    assert len({span.trace_id for span in spans}) == 5  # the run, the input, two items, the pull that found the end


async def test_two_runs_at_once_do_not_mix() -> None:
    dag = DAG("twice")
    meeting = asyncio.Barrier(2)

    @dag.task
    async def step(ctx: Context) -> Context:
        await meeting.wait()
        return ctx

    dag.task(name="then", after=step)(_same)

    with OtlpReceiver() as receiver:
        tracing = Tracing.otlp(receiver.endpoint, sample=1.0)
        telemetry = telemetry_of(tracing)
        executors = [Executor(dag, config=ExecutorConfig(telemetry=telemetry)) for _ in range(2)]
        await asyncio.gather(*(executor.run(Context(name=f"c{n}")) for n, executor in enumerate(executors)))
        spans = receiver.wait(lambda spans: len([span for span in spans if span.name == "run twice"]) == 2)

    check_shape(spans)
    assert len({span.trace_id for span in spans}) == 4
    for trace_id in {span.trace_id for span in spans}:
        ids = {span.attributes.get("obsdag.context.id") for span in spans if span.trace_id == trace_id}
        assert len(ids) == 1, "spans of two contexts in one trace"


async def test_stall_says_where_and_what_is_missing() -> None:
    dag = DAG("stuck")

    @dag.task
    async def left(ctx: Context) -> Context:
        ctx.freeze()
        return ctx

    dag.task(name="end", after=left)(_same)

    spans = await sent(dag, context_queue_timeout=0.01, worker_idle_times=1)

    (context,) = [span for span in spans if span.name == "context stuck"]
    assert context.attributes["obsdag.context.outcome"] == "stalled"
    assert context.attributes["obsdag.stall.task"] == "end"
    assert context.status == "ERROR"
    assert context.attributes["error.type"] == "stalled"


@pytest.mark.leaves("files", "grpc keeps its poller's descriptors for the process")
async def test_grpc_gets_the_same() -> None:
    with OtlpReceiver("grpc") as receiver:
        tracing = Tracing.otlp(receiver.endpoint, protocol="grpc", sample=1.0)
        await run_traced(chain(), tracing=tracing)
        spans = receiver.wait(lambda spans: len(spans) >= 4)
        tracing.shutdown()

    check_shape(spans)
    assert outline(spans)[0] == "context chain output"


def speak(ctx: Any) -> Any:
    """Runs in a worker process: tells the current span which trace it is in there."""
    span = trace.get_current_span()
    context = span.get_span_context()
    span.set_attributes({"far.trace_id": f"{context.trace_id:032x}", "far.parent_id": f"{context.span_id:016x}"})
    span.add_event("counted", {"rows": 3})
    return ctx


async def _same(ctx: Context) -> Context:
    return ctx
