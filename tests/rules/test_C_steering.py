"""C7 and C8: freezing, thawing, destroying."""

from __future__ import annotations

import asyncio
import threading

import pytest

from obsdag import DAG, ConcurrencyLimit, Context, RateLimit
from tests.rules.helpers import HANG_S, ONE, Engine, Log, assert_counts, chain, every_schedule, settle

# --- C7


@every_schedule
async def test_C7_no_new_execution_starts_on_a_frozen_context(engine: Engine) -> None:
    dag, log = DAG(), Log()
    seen: list[list[str]] = []
    loop = asyncio.get_running_loop()

    def thaw(ctx: Context) -> None:
        seen.append(log.names())
        assert ctx.frozen
        ctx.thaw()

    @dag.task
    async def freeze(ctx: Context) -> Context:
        ctx.freeze()
        assert ctx.frozen
        loop.call_later(0.02, thaw, ctx)
        return ctx

    chain(dag, log, "a", "b", after=freeze)
    result = await engine.run(dag)

    assert seen == [[]]
    assert log.names() == ["a", "b"]
    assert not result[0].frozen
    assert_counts(result, output=1)


@every_schedule
async def test_C7_running_executions_go_on(engine: Engine) -> None:
    dag, log = DAG(), Log()
    frozen = asyncio.Event()
    loop = asyncio.get_running_loop()

    @dag.task
    async def long(ctx: Context) -> Context:
        ctx.freeze()
        frozen.set()
        await settle()
        log.append(("long", ctx))
        loop.call_soon(ctx.thaw)
        return ctx

    chain(dag, log, "end", after=long)
    result = await engine.run(dag)
    assert log.names() == ["long", "end"]
    assert_counts(result, output=1)


@every_schedule
async def test_C7_a_sync_task_freezes_and_another_thread_thaws(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    def freeze(ctx: Context) -> Context:
        ctx.freeze()
        thread = threading.Thread(target=ctx.thaw)
        thread.start()
        thread.join()
        return ctx

    chain(dag, log, "end", after=freeze)
    result = await engine.run(dag, [{} for _ in range(5)])
    assert_counts(result, output=5)


@every_schedule
async def test_C7_thawing_evaluates_the_context_again(engine: Engine) -> None:
    dag, log = DAG(), Log()
    parked: list[Context] = []

    @dag.task
    async def park(ctx: Context) -> Context:
        if ctx["n"] < 3:
            ctx.freeze()
            parked.append(ctx)
        else:
            for each in parked:
                each.thaw()
        return ctx

    chain(dag, log, "end", after=park)
    result = await engine.run(dag, [{"n": n} for n in range(4)])
    assert len(log) == 4
    assert_counts(result, output=4)


@every_schedule
async def test_C7_freezing_one_branch_stops_the_other_and_holds_the_context(engine: Engine) -> None:
    dag, log = DAG(), Log()
    loop = asyncio.get_running_loop()
    at_thaw: list[int] = []

    @dag.task(priority=5)
    async def left(ctx: Context) -> Context:
        ctx.freeze()
        loop.call_later(0.02, lambda: (at_thaw.append(len(log)), ctx.thaw()))
        return ctx

    chain(dag, log, "right", "right2", "right3")
    chain(dag, log, "end", after=[left, "right3"])
    result = await engine.run(dag)
    assert at_thaw[0] <= (1 if engine.tasks == 0 else 0)
    assert log.names() == ["right", "right2", "right3", "end"]
    assert_counts(result, output=1)


@every_schedule
async def test_C7_an_input_may_be_frozen_before_it_enters(engine: Engine) -> None:
    dag, log = DAG(), Log()
    chain(dag, log, "a")
    ctx = Context()
    ctx.freeze()
    asyncio.get_running_loop().call_later(0.02, ctx.thaw)
    result = await engine.run(dag, [ctx, {}])
    assert log.names() == ["a", "a"]
    assert log[0][1] is not ctx
    assert_counts(result, output=2)


@every_schedule
async def test_C7_a_frozen_child_holds_its_parent(engine: Engine) -> None:
    dag, log = DAG(), Log()
    loop = asyncio.get_running_loop()
    outcomes: list[str | None] = []

    def thaw(child: Context) -> None:
        assert child.parent is not None
        outcomes.append(child.parent.outcome)
        child.thaw()

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        children = ctx.create_child(2)
        children[0].freeze()
        loop.call_later(0.02, thaw, children[0])
        return children

    chain(dag, log, "end", after=spread)
    result = await engine.run(dag)
    assert outcomes == [None]
    assert_counts(result, split=1, output=2)


async def test_C7_freeze_twice_thaw_once_and_thaw_of_what_is_not_frozen() -> None:
    dag, log = DAG(), Log()

    @dag.task
    async def steer(ctx: Context) -> Context:
        ctx.thaw()
        ctx.freeze()
        ctx.freeze()
        ctx.thaw()
        return ctx

    chain(dag, log, "end", after=steer)
    result = await ONE.run(dag)
    assert_counts(result, output=1)
    result[0].context.thaw()
    result[0].context.freeze()
    assert result[0].context.outcome == "output"


# --- C8


@every_schedule
async def test_C8_destroy_ends_the_context_dropped_and_its_descendants_cancelled(engine: Engine) -> None:
    dag, log = DAG(), Log()
    family: list[Context] = []

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        family.append(ctx)
        return ctx.create_child(3)

    @dag.task(after=spread)
    async def deeper(ctx: Context) -> list[Context]:
        return ctx.create_child(2)

    @dag.task(after=deeper)
    async def kill(ctx: Context) -> Context:
        log.append(("kill", ctx))
        if len(log) == 1:
            ctx.root.destroy()
        else:
            await asyncio.Event().wait()
        return ctx

    chain(dag, log, "end", after=kill)
    result = await engine.run(dag)
    assert "end" not in log.names()
    assert family[0].outcome == "dropped"
    assert family[0].destroyed
    assert {child.outcome for child in family[0].children} == {"cancelled"}
    assert result.counts["dropped"] == 1
    assert result.counts["cancelled"] == result.counts["entered"] - 1


@every_schedule
async def test_C8_its_executions_are_cancelled(engine: Engine) -> None:
    dag, log = DAG(), Log()
    started = asyncio.Event()
    victim: list[Context] = []

    @dag.task
    async def hang(ctx: Context) -> Context:
        if ctx["n"] == 1:
            return ctx
        victim.append(ctx)
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            log.append(("cancelled", ctx))
            raise
        return ctx

    result_task = asyncio.ensure_future(engine.run(dag, [{"n": 0}, {"n": 1}]))
    async with asyncio.timeout(HANG_S):
        await started.wait()
    victim[0].destroy()
    result = await result_task
    assert log.names() == ["cancelled"]
    assert_counts(result, dropped=1, output=1)


@every_schedule
async def test_C8_destroy_from_a_thread(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    async def wait(ctx: Context) -> Context:
        thread = threading.Thread(target=ctx.destroy)
        thread.start()
        try:
            await asyncio.Event().wait()
        finally:
            thread.join()
        return ctx

    chain(dag, log, "end", after=wait)
    result = await engine.run(dag, [{} for _ in range(3)])
    assert log == []
    assert_counts(result, dropped=3)


@every_schedule
@pytest.mark.parametrize("kind", ["async", "sync", "foreground"])
async def test_C8_the_execution_that_destroys_its_context_still_counts(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()

    def replace(ctx: Context) -> Context:
        other = ctx.create(copy_data=True)
        ctx.destroy()
        log.append(("after", ctx))
        return other

    async def replace_async(ctx: Context) -> Context:
        other = replace(ctx)
        await settle()
        log.append(("later", ctx))
        return other

    dag.task(replace_async if kind == "async" else replace, kind=kind, name="replace")
    chain(dag, log, "end", after="replace")
    result = await engine.run(dag, [{"n": 7}])
    assert log.names()[-1] == "end"
    assert ("later" in log.names()) == (kind == "async")
    assert [out["n"] for out in result] == [7]
    assert_counts(result, dropped=1, output=1)


@every_schedule
async def test_C8_a_destroyed_context_that_its_own_execution_returns_is_ignored(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    async def destroy(ctx: Context) -> Context:
        ctx.destroy()
        return ctx

    chain(dag, log, "end", after=destroy)
    result = await engine.run(dag)
    assert log == []
    assert_counts(result, dropped=1)


@every_schedule
async def test_C8_destroying_cancels_the_executions_of_other_branches(engine: Engine) -> None:
    dag, log = DAG(), Log()
    started = asyncio.Event()

    @dag.task(priority=5)
    async def destroy(ctx: Context) -> Context:
        if engine.tasks == 0:
            await started.wait()
        ctx.destroy()
        return ctx

    @dag.task
    async def beside(ctx: Context) -> Context:
        log.append(("started", ctx))
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            log.append(("cancelled", ctx))
            raise
        return ctx

    result = await engine.run(dag)
    assert log.names() == (["started", "cancelled"] if engine.tasks == 0 else [])
    assert_counts(result, dropped=1)


@every_schedule
async def test_C8_again_is_a_no_op(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    async def destroy(ctx: Context) -> Context:
        for _ in range(3):
            ctx.destroy()
        return ctx.create()

    chain(dag, log, "end", after=destroy)
    result = await engine.run(dag, [{}, {}])
    for out in result:
        out.context.destroy()
        assert out.context.outcome == "output"
    assert_counts(result, dropped=2, output=2)


async def test_C8_destroy_of_a_context_in_no_run() -> None:
    ctx = Context()
    ctx.destroy()
    ctx.destroy()
    assert (ctx.outcome, ctx.destroyed) == ("dropped", True)
    with pytest.raises(ValueError, match=str(ctx.id)):
        await ONE.run(_one_task(), ctx)


def _one_task() -> DAG:
    dag = DAG()
    chain(dag, Log(), "a")
    return dag


@every_schedule
async def test_C8_a_child_destroys_its_parent_and_is_cancelled(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    async def spread(ctx: Context) -> Context:
        return ctx.create_child()

    @dag.task(after=spread)
    async def kill(ctx: Context) -> Context:
        assert ctx.parent is not None
        ctx.parent.destroy()
        return ctx

    chain(dag, log, "end", after=kill)
    result = await engine.run(dag, [{}, {}, {}])
    assert log == []
    assert_counts(result, dropped=3, cancelled=3)


@every_schedule
async def test_C8_a_failed_context_ends_its_descendants_cancelled(engine: Engine) -> None:
    dag, log = DAG(), Log()
    released = asyncio.Event()

    @dag.task(priority=1)
    async def spread(ctx: Context) -> list[Context]:
        return ctx.create_child(2)

    @dag.task(after=spread)
    async def work(ctx: Context) -> Context:
        log.append(("work", ctx))
        await asyncio.Event().wait()
        return ctx

    @dag.task
    async def fail(ctx: Context) -> Context:
        released.set()
        raise ValueError("other branch")

    result = await engine.run(dag)
    assert released.is_set()
    assert_counts(result, failed=1, cancelled=2)
    assert [failure.task for failure in result.failures] == ["fail"]


@every_schedule
async def test_C8_reaching_the_sink_does_not_end_descendants(engine: Engine) -> None:
    dag = DAG()
    finished: list[str | None] = []

    @dag.task
    async def both(ctx: Context) -> list[Context]:
        return [ctx, ctx.create_child()]

    @dag.task(after=both)
    async def work(ctx: Context) -> Context:
        if ctx.parent is not None:
            await settle()
            finished.append(ctx.parent.outcome)
        return ctx

    result = await engine.run(dag)
    # With one worker either may be first; with more, the parent is an output while its child still works.
    assert finished == ["output"] or (finished == [None] and engine.workers == 1)
    assert_counts(result, output=2)


@every_schedule
async def test_C8_destroying_a_context_that_waits_gives_up_its_place(engine: Engine) -> None:
    dag = DAG()
    contexts: list[Context] = []

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        contexts.extend(ctx.create(name=f"c{n}") for n in range(6))
        return contexts

    @dag.task(after=spread, limiter=ConcurrencyLimit(1))
    async def work(ctx: Context) -> Context:
        await settle()
        for other in contexts[2:5]:
            if other is not ctx:
                other.destroy()
        return ctx

    result = await engine.run(dag)
    # The first to work destroys three of the six, or two if it is one of these itself.
    gone = result.counts["dropped"]
    assert gone in (2, 3)
    assert_counts(result, split=1, dropped=gone, output=6 - gone)


@every_schedule
async def test_C8_destroying_a_frozen_context_ends_it(engine: Engine) -> None:
    dag, log = DAG(), Log()
    loop = asyncio.get_running_loop()

    @dag.task
    async def freeze(ctx: Context) -> Context:
        ctx.freeze()
        loop.call_later(0.01, ctx.destroy)
        return ctx

    chain(dag, log, "end", after=freeze)
    result = await engine.run(dag)
    assert log == []
    assert_counts(result, dropped=1)


@every_schedule
async def test_C8_destroying_a_context_in_a_retry_wait_ends_it(engine: Engine) -> None:
    dag = DAG()
    loop = asyncio.get_running_loop()

    @dag.task(retry_times=3, retry_interval=1000)
    async def flaky(ctx: Context) -> Context:
        loop.call_later(0.01, ctx.destroy)
        raise ValueError

    result = await engine.run(dag, [{}, {}])
    assert_counts(result, dropped=2)
    assert result.failures == []


@every_schedule
async def test_C8_a_sync_execution_of_a_destroyed_context_is_discarded(engine: Engine) -> None:
    dag, log = DAG(), Log()
    inside, go = threading.Event(), threading.Event()
    victim: list[Context] = []

    @dag.task
    def work(ctx: Context) -> Context:
        victim.append(ctx)
        inside.set()
        go.wait(HANG_S)
        return ctx

    chain(dag, log, "end", after=work)
    running = asyncio.ensure_future(engine.run(dag))
    await asyncio.get_running_loop().run_in_executor(None, inside.wait, HANG_S)
    victim[0].destroy()
    await settle()
    go.set()
    result = await running
    assert log == []
    assert_counts(result, dropped=1)
    await asyncio.get_running_loop().shutdown_default_executor()


@pytest.mark.parametrize("kind", ["thaw", "freeze_thaw"])
@every_schedule
async def test_C7_freeze_and_thaw_from_any_thread(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()
    threads: list[threading.Thread] = []

    def steer(ctx: Context) -> None:
        if kind == "freeze_thaw":
            for _ in range(50):
                ctx.freeze()
                ctx.thaw()
        ctx.thaw()

    @dag.task
    async def freeze(ctx: Context) -> Context:
        ctx.freeze()
        threads.append(threading.Thread(target=steer, args=(ctx,)))
        threads[-1].start()
        return ctx

    chain(dag, log, "end", after=freeze)
    result = await engine.run(dag, [{} for _ in range(5)])
    for thread in threads:
        thread.join()
    assert len(log) == 5
    assert_counts(result, output=5)


@every_schedule
async def test_C7_a_frozen_context_that_waits_for_a_retry_or_limit_starts_after_the_thaw(engine: Engine) -> None:
    dag = DAG()
    loop = asyncio.get_running_loop()
    frozen_starts: list[bool] = []
    limit = RateLimit(1000, per=1.0)

    @dag.task(retry_times=1, retry_interval=0.01, limiter=limit)
    async def flaky(ctx: Context) -> Context:
        frozen_starts.append(ctx.frozen)
        if ctx.attempt == 1:
            ctx.freeze()
            loop.call_later(0.05, ctx.thaw)
            raise ValueError
        return ctx

    result = await engine.run(dag, [{}, {}, {}])
    assert frozen_starts == [False] * 6
    assert_counts(result, output=3)
