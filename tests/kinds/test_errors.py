"""Each mistake is a clear error on the contexts concerned, or at build, and the run goes on (T1, T4, T5, T9, T14)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from obsdag import (
    DAG,
    AsyncFunctionTask,
    AsyncLoopTask,
    AsyncRouterTask,
    AsyncServiceTask,
    AsyncStreamTask,
    Context,
    ForegroundSyncFunctionTask,
    GraphError,
    JoinTask,
    ProcessTask,
    SyncFunctionTask,
    SyncLoopTask,
    SyncStreamTask,
    SyncThreadTask,
    Task,
    TaskError,
)
from tests.rules.helpers import ONE, Engine, assert_counts, every_worker_num


def plain(ctx: Context) -> Context:
    return ctx


async def coroutine(ctx: Context) -> Context:
    return ctx


def generator(ctx: Context) -> Iterator[Context]:
    yield ctx


async def asyncgen(ctx: Context) -> AsyncIterator[Context]:
    yield ctx


# --- the wrong function for a class


@pytest.mark.parametrize(
    ("kind", "function", "needs", "got"),
    [
        (AsyncFunctionTask, plain, "a coroutine function", "a plain function"),
        (AsyncFunctionTask, asyncgen, "a coroutine function", "an async generator function"),
        (SyncFunctionTask, coroutine, "a plain function", "a coroutine function"),
        (SyncFunctionTask, generator, "a plain function", "a generator function"),
        (ForegroundSyncFunctionTask, coroutine, "a plain function", "a coroutine function"),
        (AsyncStreamTask, generator, "an async generator function", "a generator function"),
        (SyncStreamTask, asyncgen, "a generator function", "an async generator function"),
        (AsyncLoopTask, coroutine, "an async generator function", "a coroutine function"),
        (SyncLoopTask, plain, "a generator function", "a plain function"),
        (AsyncServiceTask, plain, "a coroutine function", "a plain function"),
        (SyncThreadTask, coroutine, "a plain function", "a coroutine function"),
        (AsyncRouterTask, plain, "a coroutine function", "a plain function"),
        (ProcessTask, coroutine, "a plain function", "a coroutine function"),
    ],
)
def test_T5_a_function_of_the_wrong_kind_is_refused_by_name(
    kind: type[Task], function: Any, needs: str, got: str
) -> None:
    dag = DAG()
    dag.add_task(kind(function, name="it"))
    with pytest.raises(GraphError) as caught:
        dag.build()
    (problem,) = [problem for problem in caught.value.problems if kind.__name__ in problem]
    assert "'it'" in problem
    assert needs in problem.partition(", not ")[0]
    assert got in problem.partition(", not ")[2]


def test_T5_a_join_takes_parent_and_children() -> None:
    dag = DAG()
    dag.map(generator, name="spread")
    dag.add_task(JoinTask(coroutine, name="gather"), "spread")
    with pytest.raises(GraphError, match=r"'gather'.*called with the parent and its children"):
        dag.build()


# --- what a function may not return


@pytest.mark.parametrize(
    "kind", ["async", "sync", "foreground", "stream-async", "stream-sync", "loop-async", "loop-sync"]
)
@every_worker_num
async def test_T1_what_is_no_context_fails_its_own_context_only(engine: Engine, kind: str) -> None:
    dag = DAG()

    def wrong(ctx: Context) -> Any:
        return 42 if ctx["n"] == 3 else ctx

    async def wrong_async(ctx: Context) -> Any:
        return wrong(ctx)

    def yielding(ctx: Context) -> Any:
        while True:
            ctx = yield wrong(ctx)

    async def yielding_async(ctx: Context) -> Any:
        while True:
            ctx = yield wrong(ctx)

    def looping(ctx: Context) -> Any:
        yield 42 if ctx["n"] == 3 else Context(data=ctx)

    async def looping_async(ctx: Context) -> Any:
        yield next(looping(ctx))

    functions = {
        "async": wrong_async,
        "stream-async": yielding_async,
        "stream-sync": yielding,
        "loop-async": looping_async,
        "loop-sync": looping,
    }
    dag.task(functions.get(kind, wrong), kind=kind.split("-", maxsplit=1)[0], name="it")
    result = await engine.run(dag, [{"n": n} for n in range(6)])
    assert sorted(out["n"] for out in result) == [0, 1, 2, 4, 5]
    loop = kind.startswith("loop")
    assert_counts(result, output=5, failed=1, split=5 if loop else 0)
    (failure,) = result.failures
    assert failure.context["n"] == 3
    assert isinstance(failure.exception, TaskError)
    assert "42" in str(failure.exception)
    assert "'it'" in str(failure.exception)


@pytest.mark.parametrize("choice", ["elsewhere", ["left", "elsewhere"], 7, ["left", None]], ids=repr)
async def test_T9_a_router_that_chooses_what_is_not_below_it_is_told_what_is(choice: Any) -> None:
    dag = DAG()
    dag.router(lambda ctx: ctx["choice"], name="choose")
    dag.task(plain, after="choose", name="left")
    dag.task(plain, after="choose", name="right")
    result = await ONE.run(dag, [{"choice": choice}, {"choice": "right"}])
    assert_counts(result, output=1, failed=1)
    error = str(result.failures[0].exception)
    assert "'choose'" in error
    assert "left, right" in error or "it returns task ids" in error


# --- generators that end or break


def _three_at_a_time(ctx: Context) -> Iterator[Any]:
    """Ends after the third context of each life, without an answer for the fourth."""
    made = []
    while len(made) < 3:
        made.append(ctx)
        ctx["life"] = id(made)
        ctx = yield ctx


async def _three_at_a_time_async(ctx: Context) -> AsyncIterator[Any]:
    made = []
    while len(made) < 3:
        made.append(ctx)
        ctx["life"] = id(made)
        ctx = yield ctx


@pytest.mark.parametrize("kind", ["stream-async", "stream-sync", "foreground_stream"])
@every_worker_num
async def test_T14_a_stream_that_ended_fails_one_context_and_is_made_anew(engine: Engine, kind: str) -> None:
    dag = DAG()
    function = _three_at_a_time_async if kind.endswith("async") else _three_at_a_time
    dag.task(function, kind=kind.split("-", maxsplit=1)[0], name="it")
    result = await engine.run(dag, [{"n": n} for n in range(8)])
    assert_counts(result, output=6, failed=2)
    for failure in result.failures:
        assert isinstance(failure.exception, TaskError)
        assert "stream task 'it' ended before it gave anything" in str(failure.exception)


@pytest.mark.parametrize("kind", ["stream-async", "stream-sync", "foreground_stream"])
async def test_T14_a_stream_that_ended_loses_nothing_with_a_retry(kind: str) -> None:
    dag = DAG()
    function = _three_at_a_time_async if kind.endswith("async") else _three_at_a_time
    dag.task(function, kind=kind.split("-", maxsplit=1)[0], name="it", retry_times=1)
    result = await ONE.run(dag, [{"n": n} for n in range(8)])
    assert_counts(result, output=8)


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_T14_a_loop_that_breaks_fails_its_own_input_and_keeps_what_it_gave(asynchronous: bool) -> None:
    dag = DAG()

    def items(ctx: Context) -> Iterator[Context]:
        for n in range(3):
            if ctx["bad"] and n == 2:
                raise OSError("source is gone")
            yield Context(data={"n": n})

    async def items_async(ctx: Context) -> AsyncIterator[Context]:
        for each in items(ctx):
            yield each

    dag.loop(items_async if asynchronous else items, name="it")
    result = await Engine(4).run(dag, [{"bad": False}, {"bad": True}])
    assert_counts(result, output=5, split=1, failed=1)
    assert str(result.failures[0].exception) == "source is gone"


@pytest.mark.parametrize("kind", ["stream", "loop", "map"])
async def test_T14_generators_are_closed_whatever_ends_them(kind: str) -> None:
    closed: list[int] = []
    dag = DAG()
    inside = asyncio.Event()

    @dag.task(kind=kind)
    async def it(ctx: Context) -> AsyncIterator[Any]:
        try:
            while True:
                given = yield (ctx if kind == "stream" else Context(data={"n": 1}))
                ctx = given if kind == "stream" else ctx
        finally:
            closed.append(1)

    @dag.task(after=it)
    async def wait(ctx: Context) -> Context:
        inside.set()
        await asyncio.Event().wait()
        return ctx

    run = asyncio.create_task(ONE.executor(dag, max_live_contexts=5).run([{"n": 0}]))
    await inside.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert closed == [1]
