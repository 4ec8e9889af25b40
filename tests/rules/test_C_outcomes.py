"""C9 to C12: outcomes and their sum, special contexts, what a context tells of itself, what may enter and return."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from obsdag import (
    DAG,
    Context,
    ContextError,
    ErrorInfo,
    Executor,
    InputError,
    LoopContext,
    OutputContext,
    RateLimitContext,
    Runtime,
    StopContext,
    TaskError,
)
from obsdag.core.states import OUTCOMES
from tests.rules.helpers import Engine, Log, assert_counts, chain, every_schedule, finish, settle

# --- C9


def every_outcome(dag: DAG, seen: list[Any]) -> None:
    """A DAG in which `want` says how the context ends."""

    def fail(ctx: Context) -> None:
        raise ValueError("wanted")

    def hang_child(ctx: Context) -> list[Context]:
        children = ctx.create_child(1)
        children[0]["want"] = "hang"
        ctx["want"] = "destroy"
        return [ctx, *children]

    def freeze(ctx: Context) -> Context:
        ctx.freeze()
        return ctx

    fates = {
        "output": lambda ctx: ctx,
        "failed": fail,
        "dropped": lambda ctx: None,
        "split": lambda ctx: ctx.create(name="made"),
        "children": lambda ctx: ctx.create_child(2),
        "cancelled": hang_child,
        "stalled": freeze,
    }

    @dag.task(may_drop=True)
    async def fate(ctx: Context) -> Any:
        seen.append(ctx)
        return fates[ctx["want"]](ctx) if "want" in ctx else ctx

    @dag.task(after=fate)
    async def after(ctx: Context) -> Context:
        seen.append(ctx)
        want = ctx.get("want", "")
        if want == "destroy":
            await settle()
            ctx.destroy()
        elif want == "hang":
            await asyncio.Event().wait()
        return ctx

    @dag.task(after=after)
    async def hand_back(ctx: Context) -> Context:
        return ctx.parent if ctx.parent is not None and ctx is ctx.parent.children[0] else ctx


@every_schedule
async def test_C9_each_context_ends_with_exactly_one_outcome(engine: Engine) -> None:
    dag, seen = DAG(), []
    every_outcome(dag, seen)
    wants = ["output", "split", "dropped", "failed", "stalled", "children"]
    result = await engine.run(dag, [{"want": want} for want in wants], context_queue_timeout=0.001)

    # output; split + what it was made into; children: one merges, the other reaches the sink, the parent goes on
    assert_counts(result, output=1 + 1 + 2, split=1, dropped=1, failed=1, stalled=1, merged=1)
    assert all(ctx.outcome in OUTCOMES for ctx in seen)
    by_outcome = {name: len({id(ctx) for ctx in seen if ctx.outcome == name}) for name in OUTCOMES}
    assert by_outcome == {name: result.counts[name] for name in OUTCOMES}


@pytest.mark.parametrize("engine", [Engine(4, 1), Engine(64, 0)], ids=str)  # the child hangs in its worker
async def test_C9_destroyed_and_cancelled_are_counted(engine: Engine) -> None:
    dag, seen = DAG(), []
    every_outcome(dag, seen)
    result = await engine.run(dag, [{"want": "cancelled"} for _ in range(2)])
    assert_counts(result, dropped=2, cancelled=2)


def test_C9_the_outcomes_are_these() -> None:
    assert set(OUTCOMES) == {"output", "split", "merged", "dropped", "failed", "cancelled", "stalled"}


@every_schedule
async def test_C9_entered_is_living_and_outcomes_at_every_step(engine: Engine) -> None:
    dag, log = DAG(), Log()
    sums: list[tuple[int, int]] = []
    executor: Executor

    def look() -> None:
        stats = executor.stats()
        sums.append((stats["entered"], stats["living"] + sum(stats[name] for name in OUTCOMES)))

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        look()
        return ctx.create_child(3)

    @dag.task(after=spread, may_drop=True)
    async def fate(ctx: Context) -> Any:
        look()
        await settle(2)
        look()
        number = len(sums) % 4
        if number == 0:
            raise ValueError
        return [None, ctx, ctx.parent][number - 1]

    dag.task(log.step("end"), after=fate, name="end")
    executor = engine.executor(dag)
    result = await finish(executor, [{} for _ in range(8)])
    assert [total for _, total in sums] == [entered for entered, _ in sums]
    assert result.counts["entered"] == 32


@every_schedule
async def test_C9_the_living_are_counted_on_their_own(engine: Engine) -> None:
    dag = DAG()
    started, gate = asyncio.Event(), asyncio.Event()

    @dag.task
    async def wait(ctx: Context) -> Context:
        started.set()
        await gate.wait()
        return ctx

    executor = engine.executor(dag)
    running = asyncio.ensure_future(finish(executor, [{}] * 5))
    await started.wait()
    await settle()
    stats = executor.stats()
    assert stats["living"] == stats["entered"] == executor.runtime.counter == min(5, engine.workers)
    gate.set()
    result = await running
    assert_counts(result, output=5)
    assert executor.stats()["living"] == 0 == executor.runtime.counter


@every_schedule
async def test_C9_result_and_stats_agree(engine: Engine) -> None:
    dag, seen = DAG(), []
    every_outcome(dag, seen)
    executor = engine.executor(dag)
    result = await finish(executor, [{"want": want} for want in ("output", "failed", "split", "children")])
    stats = executor.stats()
    assert {name: stats[name] for name in result.counts} == dict(result.counts)
    assert [failure.context.outcome for failure in result.failures] == ["failed"]
    assert stats["tasks"]["fate"]["executions"] == 4


# --- C10


def test_C10_the_special_contexts_are_contexts() -> None:
    for kind in (LoopContext, RateLimitContext, StopContext, OutputContext):
        assert issubclass(kind, Context)


@pytest.mark.parametrize("delay", [0, -1, float("inf"), float("nan"), None, "1", True])
def test_C10_a_rate_limit_markers_delay_must_be_above_zero(delay: Any) -> None:
    with pytest.raises(ValueError, match="delay"):
        RateLimitContext(Context(), delay)


@every_schedule
async def test_C10_a_rate_limit_marker_is_a_timer_and_no_attempt(engine: Engine) -> None:
    dag, log = DAG(), Log()
    attempts: list[int] = []

    @dag.task(retry_times=0)
    async def limited(ctx: Context) -> Context:
        attempts.append(ctx.attempt)
        ctx["calls"] = ctx.get("calls", 0) + 1
        return ctx if ctx["calls"] == 4 else RateLimitContext(ctx, 0.001)

    chain(dag, log, "end", after=limited)
    result = await engine.run(dag, [{}, {}, {}])
    assert attempts == [1] * 12
    assert len(log) == 3
    assert_counts(result, output=3)


@every_schedule
async def test_C10_a_rate_limit_marker_in_a_list_and_from_a_thread(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    def limited(ctx: Context) -> Any:
        ctx["calls"] = ctx.get("calls", 0) + 1
        return ctx if ctx["calls"] == 2 else [RateLimitContext(ctx, 0.001)]

    chain(dag, log, "end", after=limited)
    result = await engine.run(dag, [{}, {}, {}])
    assert [out["calls"] for out in result] == [2, 2, 2]
    assert len(log) == 3
    assert_counts(result, output=3)


@every_schedule
async def test_C10_a_rate_limit_marker_holds_no_worker(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    async def limited(ctx: Context) -> Context:
        if ctx["n"] == 0 and not ctx.get("waited"):
            ctx["waited"] = True
            return RateLimitContext(ctx, 0.02)
        log.append((ctx["n"], ctx))
        return ctx

    result = await engine.run(dag, [{"n": n} for n in range(4)])
    assert log.names() == [1, 2, 3, 0]
    assert_counts(result, output=4)


@every_schedule
async def test_C10_the_special_contexts_are_not_counted(engine: Engine) -> None:
    dag = DAG()
    runtime = Runtime()

    @dag.loop
    async def loop(ctx: Context) -> AsyncIterator[Context]:
        for n in range(3):
            yield ctx.create(name=f"item{n}")

    @dag.task(after=loop)
    async def wait(ctx: Context) -> Context:
        if "w" in ctx:
            return ctx
        ctx["w"] = 1
        return RateLimitContext(ctx, 0.001)

    result = await engine.run(dag, {}, runtime)
    assert runtime.counter == 0
    assert_counts(result, split=1, output=3)


@every_schedule
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_C10_an_output_context_returned_by_any_task_ends_its_context_at_once(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()

    def finish_it(ctx: Context) -> Context:
        return OutputContext(ctx)

    async def finish_async(ctx: Context) -> Context:
        return OutputContext(ctx)

    dag.task(finish_async if kind == "async" else finish_it, kind=kind, name="finish")
    chain(dag, log, "a", "b", after="finish")
    result = await engine.run(dag, {"n": 1})
    assert log == []
    assert [(type(out), out["n"], out.outcome) for out in result] == [(OutputContext, 1, "output")]
    assert_counts(result, output=1)


@every_schedule
async def test_C10_an_output_context_stops_the_other_branches(engine: Engine) -> None:
    dag, log = DAG(), Log()
    started = asyncio.Event()

    @dag.task(priority=1)
    async def finish_it(ctx: Context) -> Context:
        if engine.tasks == 0:
            await started.wait()
        return OutputContext(ctx)

    @dag.task
    async def other(ctx: Context) -> Context:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            log.append(("cancelled", ctx))
            raise
        return ctx

    chain(dag, log, "after", after=other)
    result = await engine.run(dag)
    assert log.names() == (["cancelled"] if engine.tasks == 0 else [])
    assert_counts(result, output=1)


@every_schedule
async def test_C10_an_output_context_without_a_context_given(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    async def finish_it(ctx: Context) -> Context:
        return OutputContext()

    chain(dag, log, "a", after=finish_it)
    result = await engine.run(dag)
    assert log == []
    assert_counts(result, output=1)


@every_schedule
async def test_C10_what_the_sink_gives_out_is_an_output_context(engine: Engine) -> None:
    dag = DAG()
    chain(dag, Log(), "a")
    ctx = Context(data={"k": 1}, name="mine")
    (out,) = await engine.run(dag, ctx)
    assert isinstance(out, OutputContext)
    assert (out.id, out["k"], out.context, out.outcome) == ("mine", 1, ctx, "output")
    assert ctx.outcome == "output"


# --- C11


@every_schedule
async def test_C11_a_context_tells_its_tree(engine: Engine) -> None:
    dag = DAG()
    seen: list[tuple[Any, ...]] = []

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        return ctx.create_child(2)

    @dag.task(after=spread)
    async def deeper(ctx: Context) -> Context:
        return ctx.create_child()

    @dag.task(after=deeper)
    async def look(ctx: Context) -> Context:
        assert ctx.parent is not None
        seen.append((ctx.depth, ctx.root.depth, ctx.root is ctx.parent.parent, ctx in ctx.parent.children))
        return ctx

    result = await engine.run(dag)
    assert seen == [(2, 0, True, True)] * 2
    (root,) = {out.root for out in result}
    assert [len(child.children) for child in root.children] == [1, 1]
    assert_counts(result, split=3, output=2)


@every_schedule
async def test_C11_attempt_counts_from_one(engine: Engine) -> None:
    dag = DAG()
    attempts: list[int] = []

    @dag.task(retry_times=3)
    async def flaky(ctx: Context) -> Context:
        attempts.append(ctx.attempt)
        if ctx.attempt < 3:
            raise ValueError
        return ctx

    @dag.task(after=flaky)
    async def then(ctx: Context) -> Context:
        attempts.append(ctx.attempt)
        return ctx

    result = await engine.run(dag)
    assert attempts == [1, 2, 3, 1]
    assert_counts(result, output=1)


@every_schedule
async def test_C11_error_info_names_exception_and_task(engine: Engine) -> None:
    dag, log = DAG(), Log()
    before: list[ErrorInfo] = []
    ctx = Context(data={"k": 1})

    @dag.task
    async def fine(ctx: Context) -> Context:
        before.append(ctx.error_info)
        return ctx

    @dag.task(after=fine)
    async def bad(ctx: Context) -> Context:
        raise KeyError("gone")

    result = await engine.run(dag, ctx)
    assert before == [ErrorInfo(False, None, None)]
    assert ctx.error_info.has_error
    assert isinstance(ctx.error_info.exception, KeyError)
    assert ctx.error_info.error_node == "bad"
    (failure,) = result.failures
    assert (failure.context, failure.task, failure.attempts, failure.exception) == (
        ctx,
        "bad",
        1,
        ctx.error_info.exception,
    )
    assert log == []
    assert_counts(result, failed=1)


@every_schedule
async def test_C11_ended_contexts_stay_readable(engine: Engine) -> None:
    dag, seen = DAG(), []
    every_outcome(dag, seen)
    wants = ["output", "split", "dropped", "failed", "stalled", "children"]
    await engine.run(dag, [{"want": want} for want in wants], context_queue_timeout=0.001)

    for ctx in seen:
        assert ctx.destroyed == (ctx.outcome in ("dropped", "failed", "cancelled", "stalled"))
        assert dict(ctx) == ctx.to_dict()
        assert ctx.available_tasks == set()
        assert ctx.root.depth == 0
        ctx["written"] = 1
        assert ctx["written"] == 1
        assert set(ctx.completed_tasks) <= {"fate", "after", "hand_back"}
        repr(ctx)
    by_want = {ctx["want"]: ctx for ctx in seen if ctx.depth == 0 and "want" in ctx}
    expected = {want: "output" if want == "children" else want for want in wants}
    assert {want: ctx.outcome for want, ctx in by_want.items()} == expected
    assert set(by_want["stalled"].completed_tasks) == {"fate"}
    assert set(by_want["failed"].completed_tasks) == set()


@every_schedule
async def test_C11_completed_and_available_tasks_while_it_runs(engine: Engine) -> None:
    dag = DAG()
    seen: list[tuple[set[str], set[str]]] = []
    chain(dag, Log(), "a", "b")

    @dag.task(after="b")
    async def look(ctx: Context) -> Context:
        seen.append((set(ctx.completed_tasks), set(ctx.available_tasks)))
        return ctx

    chain(dag, Log(), "c", after=look)
    result = await engine.run(dag)
    assert seen == [({"a", "b"}, set())]
    assert set(result[0].completed_tasks) == {"a", "b", "look", "c"}
    assert dag.tasks["a"] in result[0].completed_tasks
    assert_counts(result, output=1)


def test_C11_a_new_context_is_readable() -> None:
    ctx = Context()
    assert (ctx.parent, ctx.children, ctx.root, ctx.depth, ctx.outcome, ctx.destroyed, ctx.frozen) == (
        None,
        [],
        ctx,
        0,
        None,
        False,
        False,
    )
    assert (set(ctx.completed_tasks), set(ctx.available_tasks), ctx.attempt) == (set(), set(), 1)
    assert ctx.error_info == ErrorInfo(False, None, None)


def test_C11_a_parent_chain_of_ten_thousand_needs_no_recursion() -> None:
    ctx = root = Context()
    for _ in range(10_000):
        ctx = ctx.create_child()
    assert (ctx.depth, ctx.root) == (10_000, root)


# --- C12


def one_task(log: Log | None = None) -> DAG:
    dag = DAG()
    chain(dag, log if log is not None else Log(), "a")
    return dag


@every_schedule
async def test_C12_an_ended_context_cannot_be_input_again(engine: Engine) -> None:
    dag = one_task()
    ctx = Context(name="again")
    executor = engine.executor(dag)
    assert_counts(await finish(executor, ctx), output=1)
    with pytest.raises(ContextError, match="again"):
        await finish(executor, ctx)
    with pytest.raises(ValueError, match="again"):
        await engine.run(one_task(), [ctx])
    assert_counts(await finish(executor, ctx.create()), output=1)


@every_schedule
@pytest.mark.parametrize("end", ["failed", "dropped", "stalled", "split"])
async def test_C12_however_it_ended(engine: Engine, end: str) -> None:
    dag, seen = DAG(), []
    every_outcome(dag, seen)
    ctx = Context(data={"want": end}, name="again")
    await engine.run(dag, ctx, context_queue_timeout=0.001)
    assert ctx.outcome == end
    with pytest.raises(ContextError, match="again"):
        await engine.run(dag, ctx)


@every_schedule
async def test_C12_a_context_in_a_run_cannot_be_input(engine: Engine) -> None:
    dag = DAG()
    ctx = Context(name="busy")
    started, gate = asyncio.Event(), asyncio.Event()

    @dag.task
    async def wait(ctx: Context) -> Context:
        started.set()
        await gate.wait()
        return ctx

    running = asyncio.ensure_future(engine.run(dag, ctx))
    await started.wait()
    with pytest.raises(ContextError, match="busy"):
        await engine.run(one_task(), ctx)
    gate.set()
    assert_counts(await running, output=1)


@every_schedule
async def test_C12_the_same_context_twice_in_one_input(engine: Engine) -> None:
    ctx = Context(name="twice")
    with pytest.raises(ContextError, match="twice"):
        await engine.run(one_task(), [ctx, ctx])


@every_schedule
async def test_C12_one_of_another_run_returned_by_a_task_is_a_task_error(engine: Engine) -> None:
    other, dag = DAG(), DAG()
    foreign = Context(name="foreign")
    started, gate = asyncio.Event(), asyncio.Event()

    @other.task
    async def wait(ctx: Context) -> Context:
        started.set()
        await gate.wait()
        return ctx

    @dag.task
    async def steal(ctx: Context) -> list[Context]:
        return [ctx, foreign]

    running = asyncio.ensure_future(engine.run(other, foreign))
    await started.wait()
    result = await engine.run(dag, Context(name="mine"))
    assert_counts(result, failed=1)
    assert isinstance(result.failures[0].exception, TaskError)
    assert "foreign" in str(result.failures[0].exception)
    assert "steal" in str(result.failures[0].exception)
    gate.set()
    assert_counts(await running, output=1)


@every_schedule
async def test_C12_one_that_ended_in_another_run(engine: Engine) -> None:
    dag, ended = DAG(), Context(name="ended")
    await engine.run(one_task(), ended)

    @dag.task
    async def bring(ctx: Context) -> list[Context]:
        return [ctx, ended]

    result = await engine.run(dag)
    # C12 says both: one of another run is a TaskError, an ended one is ignored. Neither runs it again.
    assert result.counts["entered"] == 1
    assert ended.outcome == "output"


@every_schedule
async def test_C12_ended_contexts_are_ignored_when_returned(engine: Engine) -> None:
    dag, log = DAG(), Log()
    ended: list[Context] = []

    @dag.task(may_drop=True)
    async def first(ctx: Context) -> Context | None:
        if ctx["n"] == 0:
            ended.append(ctx)
            return None
        await settle()
        return ctx

    @dag.task(after=first)
    async def bring(ctx: Context) -> list[Context]:
        return [ctx, *ended]

    chain(dag, log, "end", after=bring)
    result = await engine.run(dag, [{"n": 0}, {"n": 1}])
    assert ended[0].outcome == "dropped"
    assert len(log) == 1
    assert_counts(result, dropped=1, output=1)


@every_schedule
async def test_C12_returning_only_an_ended_context_discards_ones_own(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    async def only_ended(ctx: Context) -> Context:
        other = ctx.create(name="other")
        other.destroy()
        return other

    chain(dag, log, "end", after=only_ended)
    result = await engine.run(dag)
    assert log == []
    assert result.counts["entered"] == 1
    assert_counts(result, dropped=1)


@every_schedule
@pytest.mark.parametrize("how", ["destroyed", "failed", "cancelled"])
async def test_C12_new_contexts_of_an_ended_ancestor_are_ignored_when_returned(engine: Engine, how: str) -> None:
    dag, log = DAG(), Log()
    made: list[Context] = []
    ready = asyncio.Event()

    @dag.task
    async def split(ctx: Context) -> list[Context]:
        victim, keeper = ctx.create(name="victim"), ctx.create(name="keeper")
        return [victim, keeper]

    @dag.task(after=split)
    async def act(ctx: Context) -> Context | list[Context]:
        if ctx.id == "victim":
            made.append(ctx.create_child(name="late"))
            if how == "cancelled":
                grand = made[0].create_child(name="later")
                made.append(grand)
            ready.set()
            if how == "failed":
                raise ValueError("victim")
            ctx.destroy()
            return ctx
        if not made and engine.workers > 1:
            await ready.wait()
            await settle()
        return ctx

    @dag.task(after=act)
    async def bring(ctx: Context) -> list[Context]:
        return [ctx, *made]

    chain(dag, log, "end", after=bring)
    result = await engine.run(dag)
    if engine.workers > 1:
        assert [ctx.id for _, ctx in log] == ["keeper"]
        assert result.counts["entered"] == 3
    assert (result.counts["failed"], result.counts["dropped"]) == ((1, 0) if how == "failed" else (0, 1))


@every_schedule
async def test_C12_two_living_contexts_of_the_same_id_are_allowed(engine: Engine) -> None:
    log = Log()
    result = await engine.run(one_task(log), [Context(name="same"), Context(name="same")])
    assert [out.id for out in result] == ["same", "same"]
    assert len({id(ctx) for _, ctx in log}) == 2
    assert_counts(result, output=2)


@every_schedule
async def test_C12_a_child_as_input(engine: Engine) -> None:
    # A context whose parent is in no run: its way through the DAG is its own.
    log = Log()
    parent = Context(name="parent")
    children = parent.create_child(2)
    result = await engine.run(one_task(log), children)
    assert len(log) == 2
    assert parent.outcome is None
    assert_counts(result, output=2)


@every_schedule
async def test_C12_special_contexts_as_input_are_refused(engine: Engine) -> None:
    for wrong in (StopContext(), OutputContext(), 5, "text", [5], [["a"]]):
        with pytest.raises(ValueError, match=r".") as caught:
            await engine.run(one_task(), wrong)
        assert isinstance(caught.value, InputError | ContextError)


@every_schedule
async def test_C11_attempt_is_of_the_execution_that_asks(engine: Engine) -> None:
    dag = DAG()
    seen: list[tuple[str, int]] = []

    @dag.task(retry_times=2, priority=1)
    def flaky(ctx: Context) -> Context:
        seen.append(("flaky", ctx.attempt))
        if ctx.attempt < 3:
            raise ValueError
        return ctx

    @dag.task
    async def beside(ctx: Context) -> Context:
        for _ in range(30):
            seen.append(("beside", ctx.attempt))
            await asyncio.sleep(0)
        return ctx

    result = await engine.run(dag)
    assert [n for name, n in seen if name == "flaky"] == [1, 2, 3]
    assert {n for name, n in seen if name == "beside"} == {1}
    assert_counts(result, output=1)
