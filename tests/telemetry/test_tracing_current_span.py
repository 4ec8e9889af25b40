"""The current span during a task, users' own spans, baggage (TELEMETRY section 3; SEMANTICS E17, T12)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry import baggage, propagate, trace
from opentelemetry import context as otel_context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode, TraceFlags, get_current_span, use_span

from obsdag import DAG, Context, Executor, ExecutorConfig
from obsdag.telemetry.tracing import Tracing, count_drops, deferred_sampler, hold, trace_ids
from tests.telemetry.tracing_helpers import Collected, check_shape, run_traced, telemetry_of


def one_task(function: Any, name: str = "dag", **options: Any) -> DAG:
    dag = DAG(name)
    dag.task(name="step", **options)(function)
    return dag


async def same(ctx: Context) -> Context:
    return ctx


async def test_what_a_task_says_about_its_span_is_exported() -> None:
    kept = Collected()

    async def step(ctx: Context) -> Context:
        span = get_current_span()
        assert span.is_recording()
        span.set_attribute("rows", 3)
        span.set_attributes({"ok": True, "obsdag.task": "not yours"})
        span.add_event("read", {"file": "a.csv"})
        span.add_link(SpanContext(1, 2, False, TraceFlags(1)), {"why": "cause"})
        span.record_exception(ValueError("handled"))
        span.set_status(StatusCode.ERROR, "half of it")
        span.update_name("not execute")
        span.end()
        return ctx

    await run_traced(one_task(step), tracing=Tracing([kept], sample=1.0))

    span = kept.one("execute step")
    assert span.attributes["rows"] == 3
    assert span.attributes["ok"] is True
    assert span.attributes["obsdag.task"] == "step"
    assert [name for name, _, _ in span.events] == ["read", "exception"]
    assert all(span.start_ns <= at <= span.end_ns for _, _, at in span.events)
    assert (f"{1:032x}", f"{2:016x}", {"why": "cause"}) in span.links
    assert (span.status, span.status_message) == ("ERROR", "half of it")
    assert kept.one("context dag").status == "UNSET"


async def test_attributes_and_events_of_one_span_are_bounded() -> None:
    kept = Collected()

    async def step(ctx: Context) -> Context:
        for number in range(500):
            get_current_span().set_attribute(f"key{number}", number)
            get_current_span().add_event(f"event{number}")
        return ctx

    await run_traced(one_task(step), tracing=Tracing([kept], sample=1.0))

    span = kept.one("execute step")
    assert len([key for key in span.attributes if key.startswith("key")]) == 128
    assert len(span.events) == 128
    assert span.attributes["obsdag.dropped_details"] == 2 * (500 - 128)


async def test_each_execution_is_its_own_current_span_and_sampled() -> None:
    kept = Collected()
    dag = DAG("dag")
    seen: list[SpanContext] = []
    meeting = asyncio.Barrier(2)

    async def note(ctx: Context) -> Context:
        seen.append(get_current_span().get_span_context())
        return ctx

    async def meet(ctx: Context) -> Context:
        await meeting.wait()
        seen.append(get_current_span().get_span_context())
        return ctx

    dag.task(name="a")(note)
    dag.task(name="b", after="a")(meet)
    dag.task(name="c", after="a")(meet)
    dag.task(name="d", after=["b", "c"])(note)

    await run_traced(dag, tracing=Tracing([kept], sample=1.0), task_worker_num=2)

    executions = [span for span in kept.spans if span.name.startswith("execute")]
    assert sorted(f"{each.span_id:016x}" for each in seen) == sorted(span.span_id for span in executions)
    assert {each.trace_flags.sampled for each in seen} == {True}
    assert len({each.trace_id for each in seen}) == 1


async def test_E17_nothing_of_a_context_is_current_in_the_next_nor_after_the_run() -> None:
    before = otel_context.get_current()
    found: list[Any] = []

    async def step(ctx: Context) -> Context:
        found.append(baggage.get_baggage("left"))
        otel_context.attach(baggage.set_baggage("left", ctx["n"]))  # never detached
        return ctx

    await run_traced(one_task(step), [{"n": n} for n in range(5)], tracing=Tracing([Collected()], sample=1.0))

    assert found == [None] * 5
    assert otel_context.get_current() is before


async def test_E17_the_callers_span_is_not_current_in_tasks_and_its_baggage_is() -> None:
    kept, seen = Collected(), []

    async def step(ctx: Context) -> Context:
        seen.append((get_current_span().get_span_context().trace_id, baggage.get_baggage("tenant")))
        return ctx

    token = otel_context.attach(baggage.set_baggage("tenant", "blue"))
    with use_span(NonRecordingSpan(SpanContext(0xABC, 0xDEF, False, TraceFlags(1)))):
        await run_traced(one_task(step), tracing=Tracing([kept], sample=1.0))
    otel_context.detach(token)

    ((trace_id, tenant),) = seen
    assert f"{trace_id:032x}" == kept.one("context dag").trace_id
    assert tenant == "blue"


async def test_a_background_task_keeps_the_execution_it_was_started_in() -> None:
    dag = DAG("dag")
    started: list[asyncio.Task[int]] = []
    own: list[int] = []

    async def later() -> int:
        await asyncio.sleep(0.01)
        return get_current_span().get_span_context().span_id

    async def start(ctx: Context) -> Context:
        own.append(get_current_span().get_span_context().span_id)
        started.append(asyncio.create_task(later()))
        return ctx

    dag.task(name="a")(start)
    dag.task(name="b", after="a")(same)
    await run_traced(dag, tracing=Tracing([Collected()], sample=1.0))

    assert [await task for task in started] == own


async def test_what_goes_out_carries_the_execution() -> None:
    kept, carriers = Collected(), []

    async def call(ctx: Context) -> Context:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        carriers.append(carrier)
        return ctx

    await run_traced(one_task(call), tracing=Tracing([kept], sample=1.0))

    span = kept.one("execute step")
    assert carriers == [{"traceparent": f"00-{span.trace_id}-{span.span_id}-01"}]


async def test_ids_of_an_execution_for_log_lines() -> None:
    from obsdag import Observer

    kept, found = Collected(), []

    class Looker(Observer):
        def execution_finished(self, execution: Any, outcome: str, error: Any, now: float) -> None:
            found.append(trace_ids(execution))

    telemetry = telemetry_of(Tracing([kept], sample=1.0), observers=[Looker()])
    await run_traced(one_task(same), tracing=telemetry.tracing, telemetry=telemetry)

    span = kept.one("execute step")
    assert found == [(span.trace_id, span.span_id)]


# --- users' own spans


class Users:
    """A host's own provider, holding back what is undecided."""

    def __init__(self, sampler: Any = None) -> None:
        self.kept = Collected()
        self.provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(hold(self.kept))
        self.tracer = self.provider.get_tracer("users")


async def test_users_spans_share_the_decision_of_their_context() -> None:
    users, kept = Users(), Collected()

    async def step(ctx: Context) -> Context:
        with users.tracer.start_as_current_span(f"outer {ctx['n']}"), users.tracer.start_as_current_span("inner"):
            pass
        if ctx["n"] == 1:
            raise ValueError
        return ctx

    await run_traced(one_task(step), [{"n": n} for n in range(3)], tracing=Tracing([kept], sample=0.0))

    assert sorted(span.name for span in users.kept.spans) == ["inner", "outer 1"]
    check_shape([*kept.spans, *users.kept.spans])
    assert users.kept.one("outer 1").parent_id == kept.one("execute step").span_id
    assert users.kept.one("inner").trace_id == kept.one("execute step").trace_id


async def test_users_spans_outside_pass_through_at_once() -> None:
    users = Users()

    with users.tracer.start_as_current_span("request"):
        await run_traced(one_task(same), tracing=Tracing([Collected()], sample=0.0))

    assert [span.name for span in users.kept.spans] == ["request"]


async def test_held_spans_are_not_exported_before_the_decision_and_forgotten_after() -> None:
    users, gate, said = Users(), asyncio.Event(), asyncio.Event()
    dag = DAG("dag")

    async def first(ctx: Context) -> Context:
        with users.tracer.start_as_current_span("mine"):
            pass
        said.set()
        return ctx

    async def second(ctx: Context) -> Context:
        await gate.wait()
        return ctx

    dag.task(name="a")(first)
    dag.task(name="b", after="a")(second)
    telemetry = telemetry_of(Tracing([Collected()], sample=0.0))
    run = asyncio.create_task(run_traced(dag, tracing=telemetry.tracing, telemetry=telemetry))
    await said.wait()
    assert users.kept.spans == []
    gate.set()
    await run

    assert users.kept.spans == []
    holder = users.provider._active_span_processor._span_processors[0]
    assert holder._known == {}
    assert telemetry.stats.gauge("spans_buffered") == 0


async def test_a_users_span_that_ends_after_the_decision_follows_it() -> None:
    users = Users()
    open_spans: list[Any] = []

    async def step(ctx: Context) -> Context:
        open_spans.append(users.tracer.start_span(f"late {ctx['n']}"))
        if ctx["n"]:
            raise ValueError
        return ctx

    await run_traced(one_task(step), [{"n": 0}, {"n": 1}], tracing=Tracing([Collected()], sample=0.0))
    for span in open_spans:
        span.end()

    assert [span.name for span in users.kept.spans] == ["late 1"]
    assert users.provider._active_span_processor._span_processors[0]._known == {}


async def test_held_spans_are_bounded_and_counted() -> None:
    users = Users()

    async def step(ctx: Context) -> Context:
        for _ in range(1_000):
            users.tracer.start_span("mine").end()
        raise ValueError

    telemetry = telemetry_of(Tracing([Collected()], sample=0.0, max_buffered_spans=300))
    await run_traced(one_task(step), tracing=telemetry.tracing, telemetry=telemetry)

    lost = telemetry.stats.dropped["traces", "buffer_cap"]
    assert lost > 0
    assert len(users.kept.spans) + lost >= 1_000
    assert telemetry.stats.gauge("spans_buffered") == 0


async def test_the_deferred_sampler_leaves_the_flag_open_until_the_decision() -> None:
    users, flags = Users(deferred_sampler()), []

    async def step(ctx: Context) -> Context:
        with users.tracer.start_as_current_span("mine") as span:
            assert span.is_recording()
            flags.append(span.get_span_context().trace_flags.sampled)
            with users.tracer.start_as_current_span("deeper") as deeper:
                flags.append(deeper.get_span_context().trace_flags.sampled)
        raise ValueError

    await run_traced(one_task(step), tracing=Tracing([Collected()], sample=0.0))

    assert flags == [False, False]
    assert sorted(span.name for span in users.kept.spans) == ["deeper", "mine"]  # as sampled: `Collected` checks it


async def test_the_deferred_sampler_samples_what_the_ratio_keeps_and_what_is_not_ours() -> None:
    users, flags = Users(deferred_sampler()), []

    async def step(ctx: Context) -> Context:
        with users.tracer.start_as_current_span("mine") as span:
            flags.append(span.get_span_context().trace_flags.sampled)
        return ctx

    await run_traced(one_task(step), tracing=Tracing([Collected()], sample=1.0))
    with users.tracer.start_as_current_span("outside"):
        pass

    assert flags == [True]
    assert [span.name for span in users.kept.spans] == ["mine", "outside"]


async def test_hold_before_a_batch_processor_with_a_counting_exporter() -> None:
    class Broken(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.FAILURE

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(hold(BatchSpanProcessor(count_drops(Broken()))))

    async def step(ctx: Context) -> Context:
        provider.get_tracer("users").start_span("mine").end()
        raise ValueError

    telemetry = telemetry_of(Tracing([Collected()], sample=0.0))
    await run_traced(one_task(step), tracing=telemetry.tracing, telemetry=telemetry)
    provider.force_flush()
    provider.shutdown()

    assert telemetry.stats.dropped["traces", "export_failed"] == 1


async def test_two_executors_of_one_telemetry() -> None:
    kept = Collected()
    config = ExecutorConfig(telemetry=telemetry_of(Tracing([kept], sample=1.0)))

    await asyncio.gather(*(Executor(one_task(same, name), config=config).run() for name in ("left", "right")))

    check_shape(kept.spans)
    assert len(kept.named("context left")) == len(kept.named("context right")) == 1
    assert trace.get_current_span() is trace.INVALID_SPAN


async def function(ctx: Context) -> Context:
    note(ctx)
    return ctx


def note(ctx: Context) -> None:
    ctx["seen"] = f"{get_current_span().get_span_context().span_id:016x}"
    get_current_span().set_attribute("said", ctx["n"])


async def stream() -> Any:
    ctx = yield
    while True:
        note(ctx)
        ctx = yield ctx


def thread_stream() -> Any:
    ctx = yield
    while True:
        note(ctx)
        ctx = yield ctx


async def service(queue: Any) -> None:
    while True:
        ctx, future = await queue.get()
        future.set_result(ctx)


def foreground(ctx: Context) -> Context:
    note(ctx)
    return ctx


def router(ctx: Context) -> str:
    note(ctx)
    return "last"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (None, function),
        (None, foreground),
        ("foreground", foreground),
        ("router", router),
        (None, stream),
        (None, thread_stream),
    ],
    ids=["async", "thread", "foreground", "router", "async stream", "thread stream"],
)
async def test_in_every_kind_of_task_its_execution_is_current(kind: str | None, code: Any) -> None:
    kept, dag = Collected(), DAG("dag")
    dag.task(name="step", **({} if kind is None else {"kind": kind}))(code)
    dag.task(name="last", after="step")(same)

    result = await run_traced(
        dag, [{"n": n} for n in range(3)], tracing=Tracing([kept], sample=1.0), context_worker_num=2
    )

    assert result.counts["output"] == 3
    assert {span.attributes["said"]: span.span_id for span in kept.named("execute step")} == {
        output["n"]: output["seen"] for output in result
    }
    check_shape(kept.spans)


async def test_executions_of_services_are_traced() -> None:
    kept, dag = Collected(), DAG("dag")
    dag.task(name="step", kind="service")(service)
    dag.task(name="last", after="step")(same)

    await run_traced(dag, [{"n": n} for n in range(3)], tracing=Tracing([kept], sample=1.0), context_worker_num=2)

    check_shape(kept.spans)
    assert len(kept.named("execute step")) == len(kept.named("execute last")) == 3
