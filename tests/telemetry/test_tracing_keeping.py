"""Which traces are kept, when they are exported, and what bounds the rest (TELEMETRY section 3)."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, get_current_span, use_span

from obsdag import DAG, Context, Executor, ExecutorConfig
from obsdag.telemetry.selfstats import Kept
from obsdag.telemetry.tracing import Caller, Tracing
from tests.telemetry.corerun import CoreRun
from tests.telemetry.tracing_helpers import Collected, check_shape, run_traced, telemetry_of


def one_task(function: Any, name: str = "dag", **options: Any) -> DAG:
    dag = DAG(name)
    dag.task(name="step", **options)(function)
    return dag


async def same(ctx: Context) -> Context:
    return ctx


async def fail(ctx: Context) -> Context:
    raise ValueError(f"secret {ctx['n']}")


# --- at the end


async def test_plain_traces_are_dropped_and_counted() -> None:
    kept = Collected()
    telemetry = telemetry_of(Tracing([kept], sample=0.0))

    await run_traced(one_task(same), [{} for _ in range(10)], tracing=telemetry.tracing, telemetry=telemetry)

    assert kept.spans == []
    assert telemetry.stats.traces["dropped"] == 10


async def test_traces_dropped_so_far_are_counted_while_the_run_goes_on() -> None:
    telemetry = telemetry_of(Tracing([Collected()], sample=0.0))
    seen: list[int] = []

    async def look(ctx: Context) -> Context:
        seen.append(telemetry.stats.traces["dropped"])
        return ctx

    await run_traced(one_task(look), [{} for _ in range(10)], tracing=telemetry.tracing, telemetry=telemetry)

    assert seen == list(range(10))
    assert telemetry.stats.traces["dropped"] == 10
    assert telemetry.stats.parts["dag"].traces["dropped"] == 10


async def test_ratio_is_of_the_trace_id_by_the_rule_of_the_sdk() -> None:
    kept, everything = Collected(), set()

    async def note(ctx: Context) -> Context:
        everything.add(get_current_span().get_span_context().trace_id)
        return ctx

    await run_traced(one_task(note), [{} for _ in range(400)], tracing=Tracing([kept], sample=0.25))

    sampler = TraceIdRatioBased(0.25)
    wanted = {
        f"{trace_id:032x}"
        for trace_id in everything
        if sampler.should_sample(None, trace_id, "any").decision is Decision.RECORD_AND_SAMPLE
    }
    assert {span.trace_id for span in kept.spans if span.name == "context dag"} == wanted
    assert 40 < len(wanted) < 180


async def test_cancelled_roots_are_kept_without_being_errors() -> None:
    kept, started = Collected(), asyncio.Event()

    async def hang(ctx: Context) -> Context:
        started.set()
        await asyncio.sleep(60)
        return ctx

    telemetry = telemetry_of(Tracing([kept], sample=0.0))
    executor = Executor(one_task(hang), config=ExecutorConfig(telemetry=telemetry))
    run = asyncio.create_task(executor.run({}))
    await started.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run

    check_shape(kept.spans)
    assert kept.one("context dag").attributes["obsdag.context.outcome"] == "cancelled"
    assert kept.one("execute step").attributes["obsdag.execution.outcome"] == "cancelled"
    assert {span.status for span in kept.spans} == {"UNSET"}
    assert telemetry.stats.traces["cancelled"] == 1


async def test_an_execution_that_ends_after_its_context_is_within_it() -> None:
    kept = Collected()
    dag = DAG("race")

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

    await run_traced(dag, tracing=Tracing([kept]), task_worker_num=2)

    check_shape(kept.spans)
    assert kept.one("execute slow").attributes["obsdag.execution.outcome"] == "cancelled"
    assert [name for name, _, _ in kept.one("context race").events] == ["outcome"]


# --- before the end


async def test_failure_is_kept_and_says_so() -> None:
    kept = Collected()
    telemetry = telemetry_of(Tracing([kept], sample=0.0))

    await run_traced(one_task(fail), [{"n": 1}], tracing=telemetry.tracing, telemetry=telemetry)

    assert kept.one("context dag").attributes["error.type"] == "ValueError"
    assert telemetry.stats.traces == {**dict.fromkeys(telemetry.stats.traces, 0), "error": 1}


async def test_a_retried_context_is_kept() -> None:
    kept, failures = Collected(), [ValueError()]

    async def once(ctx: Context) -> Context:
        if failures:
            raise failures.pop()
        return ctx

    telemetry = telemetry_of(Tracing([kept], sample=0.0))
    await run_traced(one_task(once, retry_times=1), tracing=telemetry.tracing, telemetry=telemetry)

    assert len(kept.named("execute step")) == 2
    assert telemetry.stats.traces["retried"] == 1


async def test_asked_for_is_kept() -> None:
    kept = Collected()

    async def ask(ctx: Context) -> Context:
        if ctx["n"] == 1:
            ctx.keep_trace()
        return ctx

    telemetry = telemetry_of(Tracing([kept], sample=0.0))
    await run_traced(one_task(ask), [{"n": 0}, {"n": 1}, {"n": 2}], tracing=telemetry.tracing, telemetry=telemetry)

    assert len(kept.named("context dag")) == 1
    assert telemetry.stats.traces["asked"] == 1
    assert telemetry.stats.traces["dropped"] == 2


async def test_what_is_finished_of_a_kept_root_is_exported_while_it_goes_on() -> None:
    kept, release = Collected(), asyncio.Event()
    dag = DAG("stuck")

    async def first(ctx: Context) -> Context:
        ctx.keep_trace()
        return ctx

    async def wait(ctx: Context) -> Context:
        await release.wait()
        return ctx

    dag.task(name="first")(first)
    dag.task(name="wait", after="first")(wait)

    run = asyncio.create_task(run_traced(dag, tracing=Tracing([kept], sample=0.0)))
    spans = await kept.came(lambda spans: len(spans) >= 1)
    assert [span.name for span in spans] == ["execute first"]
    release.set()
    await run

    check_shape(kept.spans)
    assert [span.name for span in kept.spans].count("context stuck") == 1


@pytest.mark.parametrize("blocking", [False, True], ids=["awaiting", "blocking the loop"])
async def test_a_context_that_hangs_is_shown_once_it_is_slow(blocking: bool) -> None:
    kept, release = Collected(), threading.Event()

    async def hang(ctx: Context) -> Context:
        if blocking:
            release.wait(10)
        else:
            await asyncio.to_thread(release.wait, 10)
        return ctx

    shown: list[str] = []

    def look() -> None:  # from outside, since the loop may be blocked
        shown.extend(span.name for span in kept.wait(bool))
        release.set()

    looker = threading.Thread(target=look)
    looker.start()
    telemetry = telemetry_of(Tracing([kept], sample=0.0, slow_after=0.05))
    await run_traced(one_task(hang), tracing=telemetry.tracing, telemetry=telemetry)
    looker.join()

    assert shown == ["open dag"]
    marker = kept.one("open dag")
    assert list(marker.attributes["obsdag.open.tasks"]) == ["step"]
    assert marker.attributes["obsdag.open.state"] == "running"
    assert marker.parent_id == kept.one("context dag").span_id
    assert marker.end_ns - marker.start_ns >= 50_000_000
    check_shape(kept.spans)
    assert telemetry.stats.traces["slow"] == 1


async def test_slow_roots_are_kept_at_their_end_too() -> None:
    kept = Collected()
    run = CoreRun("load")
    (tracer,) = Tracing([kept], sample=0.0, slow_after=1.0).observers(run.state)
    run.observe(tracer)
    for took_s in (0.5, 1.5):
        context = run.enter(f"took {took_s}")
        execution = run.begin(context)
        run.now += took_s
        run.state.finish(execution, context, run.now)
    run.tell("run_finished", run.state, "ok", 2.0, run.now)

    (context,) = [span for span in kept.wait(lambda spans: len(spans) >= 3) if span.name == "context etl"]
    assert context.attributes["obsdag.context.id"] == "took 1.5"
    assert context.end_ns - context.start_ns == 1_500_000_000


async def test_p99_keeps_what_is_slower_than_usual() -> None:
    kept = Collected()
    run = CoreRun("load")
    (tracer,) = Tracing([kept], sample=0.0, slow_after="p99").observers(run.state)
    run.observe(tracer)
    for number in range(200):
        context = run.enter(f"c{number}")
        execution = run.begin(context)
        run.now += 5.0 if number == 199 else 0.01
        run.state.finish(execution, context, run.now)
    run.tell("run_finished", run.state, "ok", 2.0, run.now)

    kept.wait(lambda spans: any(span.name == "run etl" for span in spans))
    assert [span.attributes["obsdag.context.id"] for span in kept.named("context etl")] == ["c199"]


async def test_a_tasks_own_slow_after_keeps_the_trace() -> None:
    kept = Collected()

    async def step(ctx: Context) -> Context:
        await asyncio.sleep(0.02)
        return ctx

    await run_traced(one_task(step, slow_after=0.01), tracing=Tracing([kept], sample=0.0))

    assert len(kept.named("execute step")) == 1


# --- following the caller


def caller(sampled: bool) -> Caller:
    return Caller(SpanContext(0xABC, 0xDEF, True, TraceFlags(1 if sampled else 0)))


async def submitted(tracing: Tracing, given: Caller) -> None:
    context = Context()
    context._trace = given  # as the serving executor does
    await run_traced(one_task(same), [context], tracing=tracing)


@pytest.mark.parametrize(
    ("follow", "sampled", "sample", "is_kept"),
    [(True, True, 0.0, True), (True, False, 1.0, False), (False, True, 0.0, False), (False, False, 1.0, True)],
)
async def test_S4_the_callers_sampling_is_followed(follow: bool, sampled: bool, sample: float, is_kept: bool) -> None:
    kept = Collected()

    await submitted(Tracing([kept], sample=sample, follow_parent=follow), caller(sampled))

    contexts = kept.named("context dag")
    assert [span.trace_id for span in contexts] == ([f"{0xABC:032x}"] if is_kept else [])
    assert all(span.parent_id == f"{0xDEF:016x}" for span in contexts)


async def test_S4_a_link_to_the_submitter_leaves_the_trace_its_own() -> None:
    kept = Collected()
    given = Caller(SpanContext(0xABC, 0xDEF, True, TraceFlags(1)), "link")

    await submitted(Tracing([kept], sample=0.0), given)

    context = kept.one("context dag")
    assert not context.parent_id
    assert context.trace_id != f"{0xABC:032x}"
    assert context.linked("submitter") == [f"{0xDEF:016x}"]


async def test_the_run_span_is_a_child_of_the_callers_and_contexts_are_not() -> None:
    kept = Collected()

    with use_span(NonRecordingSpan(SpanContext(0xABC, 0xDEF, False, TraceFlags(1)))):
        await run_traced(one_task(same), tracing=Tracing([kept], sample=1.0))

    assert kept.one("run dag").parent_id == f"{0xDEF:016x}"
    assert kept.one("run dag").trace_id == f"{0xABC:032x}"
    assert kept.one("context dag").trace_id != f"{0xABC:032x}"


# --- bounds


async def test_an_outage_is_kept_within_the_budget_and_the_excess_is_counted() -> None:
    kept = Collected()
    run = CoreRun("load")
    stats = telemetry_of(Tracing(mode="off")).stats
    (tracer,) = Tracing([kept], sample=0.0, keep_budget_per_s=3).observers(run.state, stats=stats)
    run.observe(tracer)
    for second in range(2):
        run.now = float(second * 2)
        for number in range(20):
            execution = run.begin(run.enter())
            run.state.fail(execution, KeyError("a") if number % 2 else ValueError("b"), run.now)
    run.tell("run_finished", run.state, "failed", 2.0, run.now)

    kept.wait(lambda spans: any(span.name == "run etl" for span in spans))
    assert stats.traces["error"] == 2 * 2 * 3
    assert stats.traces["over_budget"] == 2 * 20 - 12
    assert len(kept.named("context etl")) == 12
    assert {span.attributes["error.type"] for span in kept.named("context etl")} == {"KeyError", "ValueError"}


async def test_a_budget_below_one_keeps_one_per_interval() -> None:
    run = CoreRun("load")
    stats = telemetry_of(Tracing(mode="off")).stats
    (tracer,) = Tracing([Collected()], sample=0.0, keep_budget_per_s=0.1).observers(run.state, stats=stats)
    run.observe(tracer)
    for now in range(20):
        run.now = float(now)
        run.state.fail(run.begin(run.enter()), ValueError(), run.now)
    run.tell("run_finished", run.state, "failed", 2.0, run.now)

    assert stats.traces["error"] == 2


async def test_undecided_records_are_capped_and_counted() -> None:
    kept, gate = Collected(), asyncio.Event()
    dag = DAG("wide")

    async def items(ctx: Context) -> Any:
        for _ in range(3_000):
            yield {}

    async def end(ctx: Context, children: list[Context]) -> Context:
        gate.set()
        return ctx

    dag.task(name="items", kind="map")(items)
    dag.task(name="work", after="items")(same)
    dag.task(name="end", kind="join", after="work")(end)
    telemetry = telemetry_of(Tracing([kept], sample=1.0, max_buffered_spans=1_000))

    result = await run_traced(dag, tracing=telemetry.tracing, telemetry=telemetry)

    assert result.counts["output"] == 1
    lost = telemetry.stats.dropped["traces", "buffer_cap"]
    assert lost > 0
    exported = [span for span in kept.spans if span.name.startswith(("execute", "wait"))]
    assert len(exported) <= 1_000
    executions = [span for span in exported if span.name.startswith("execute")]
    assert len(executions) + lost >= 3_000 + 3_000 + 1 + 1  # beside them there are waits at the join
    assert {span.attributes["obsdag.dropped_spans"] for span in kept.named("context wide")} == {lost}
    assert telemetry.stats.gauge("spans_buffered") == 0


async def test_places_come_back() -> None:
    telemetry = telemetry_of(Tracing([Collected()], sample=0.5, keep_budget_per_s=1_000))

    async def sometimes(ctx: Context) -> Context:
        get_current_span().add_event("x" * 2_000)
        if ctx["n"] % 3 == 0:
            raise ValueError
        return ctx

    await run_traced(
        one_task(sometimes), [{"n": n} for n in range(300)], tracing=telemetry.tracing, telemetry=telemetry
    )

    assert telemetry.stats.gauge("spans_buffered") == 0
    assert telemetry.tracing._pipeline._taken == 0


async def test_a_long_trace_goes_on_in_a_new_one_linked_both_ways() -> None:
    kept = Collected()
    dag = DAG("long")

    async def split(ctx: Context) -> list[Context]:
        return [ctx.create_child() for _ in range(25)]

    dag.task(name="split")(split)
    dag.task(name="leaf", after="split")(same)

    await run_traced(dag, tracing=Tracing([kept], sample=1.0, max_spans_per_trace=10))

    check_shape(kept.spans)
    contexts = kept.named("context long")
    assert len(contexts) == 3
    assert [span.linked("continuation") for span in contexts] == [
        [contexts[1].span_id],
        [contexts[0].span_id, contexts[2].span_id],
        [contexts[1].span_id],
    ]
    for context, executions in zip(contexts, (10, 10, 6), strict=True):
        inside = [span for span in kept.spans if span.trace_id == context.trace_id and span is not context]
        assert len(inside) == executions
    maker = kept.one("execute split").span_id
    assert {tuple(span.linked("maker")) for span in kept.named("execute leaf")} == {(), (maker,)}


# --- texts, exemplars


async def test_redact_covers_every_text_of_an_exception() -> None:
    kept = Collected()
    telemetry = telemetry_of(Tracing([kept]), redact=lambda text: text.replace("secret", "***"))

    await run_traced(one_task(fail), [{"n": 42}], tracing=telemetry.tracing, telemetry=telemetry)

    assert "*** 42" in kept.one("context dag").status_message
    assert all("secret 42" not in str(span) for span in kept.spans)


async def test_a_redact_that_raises_lets_nothing_through() -> None:
    kept = Collected()

    def broken(text: str) -> str:
        raise RuntimeError

    telemetry = telemetry_of(Tracing([kept]), redact=broken)

    await run_traced(one_task(fail), [{"n": 42}], tracing=telemetry.tracing, telemetry=telemetry)

    assert all("secret" not in str(span) for span in kept.spans)


async def test_an_exception_whose_text_raises_is_exported_all_the_same() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    async def step(ctx: Context) -> Context:
        raise Broken

    kept = Collected()
    await run_traced(one_task(step), tracing=Tracing([kept]))

    assert kept.one("execute step").attributes["error.type"] == f"{__name__}.{Broken.__qualname__}"


async def test_metrics_are_told_of_kept_traces_only() -> None:
    told: list[Kept] = []
    kept = Collected()
    telemetry = telemetry_of(Tracing([kept], sample=0.0))
    telemetry.stats.on_kept.append(told.extend)

    async def ask(ctx: Context) -> Context:
        if ctx["n"] == 1:
            ctx.keep_trace()
        return ctx

    await run_traced(one_task(ask), [{"n": 0}, {"n": 1}], tracing=telemetry.tracing, telemetry=telemetry)

    assert {(each.what, each.label) for each in told} >= {("task", "step"), ("root", "output")}
    root = next(each for each in told if each.what == "root")
    context = kept.one("context dag")
    assert (f"{root.trace_id:032x}", f"{root.span_id:016x}") == (context.trace_id, context.span_id)
    assert root.seconds == pytest.approx((context.end_ns - context.start_ns) / 1e9, abs=1e-6)
    assert abs(root.unix_s - time.time()) < 60


async def test_T13_an_abandoned_thread_changes_nothing_afterwards() -> None:
    kept, release, done = Collected(), threading.Event(), threading.Event()

    def step(ctx: Context) -> Context:
        span = get_current_span()
        release.wait(10)
        span.set_attribute("late", True)
        done.set()
        return ctx

    result = await run_traced(one_task(step, timeout=0.05), tracing=Tracing([kept]), shutdown_grace=0.05)
    release.set()
    assert done.wait(10)

    assert result.counts["failed"] == 1
    assert kept.one("execute step").attributes["obsdag.execution.outcome"] == "timeout"
    assert "late" not in kept.one("execute step").attributes
