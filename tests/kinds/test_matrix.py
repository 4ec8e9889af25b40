"""Every kind of task gives the same outcome counts with 1, 4 and 64 workers (E15), and each item the same answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from queue import Queue
from typing import Any

import pytest

from obsdag import DAG, Context, RunResult, StopContext
from tests.process_jobs import double
from tests.rules.helpers import Engine, assert_counts, every_worker_num

NUMBER = 24
"""Inputs of each run: numbered, one in six odd in a way of its own."""


class Holder:
    """A callable object with hooks; each run has a copy of its own (T10)."""

    def __init__(self) -> None:
        self.state = "new"

    def startup(self, env: Any) -> None:
        assert self.state == "new"
        self.state = "open"

    def shutdown(self) -> None:
        assert self.state == "open"
        self.state = "closed"


class AsyncHolder(Holder):
    async def __call__(self, ctx: Context) -> Context:
        assert self.state == "open"
        ctx["answer"] = 2 * ctx["n"]
        return ctx


class SyncHolder(Holder):
    def __call__(self, ctx: Context) -> Context:
        assert self.state == "open"
        ctx["answer"] = 2 * ctx["n"]
        return ctx


def answer(ctx: Context) -> Context:
    ctx["answer"] = 2 * ctx["n"]
    return ctx


async def answer_async(ctx: Context) -> Context:
    await asyncio.sleep(0)
    return answer(ctx)


def stream() -> Iterator[Any]:
    """As in the seed: no parameter, so the first context comes with the first `yield`, too."""
    ctx = yield
    while True:
        ctx = yield answer(ctx)


async def stream_async(ctx: Context) -> AsyncIterator[Any]:
    while True:
        ctx = yield answer(ctx)


def loop(ctx: Context) -> Iterator[Context]:
    for number in range(ctx["n"] % 3):
        yield Context(data={"n": ctx["n"], "number": number, "answer": 2 * ctx["n"]})


async def loop_async(ctx: Context) -> AsyncIterator[Context]:
    for each in loop(ctx):
        yield each


async def serve(queue: asyncio.Queue[Any]) -> None:
    while True:
        ctx, future = await queue.get()
        if isinstance(ctx, StopContext):
            return
        future.set_result(answer(ctx))


def serve_in_thread(queue: Queue[Any]) -> None:
    while True:
        ctx, future = queue.get()
        if isinstance(ctx, StopContext):
            return
        future.set_result(answer(ctx))


SIMPLE: dict[str, Any] = {
    "async": answer_async,
    "sync": answer,
    "foreground": answer,
    "process": double,
    "stream-async": stream_async,
    "stream-sync": stream,
    "foreground_stream": stream,
    "service": serve,
    "thread": serve_in_thread,
    "shutdown-async": AsyncHolder(),
    "shutdown-sync": SyncHolder(),
    "foreground_shutdown": SyncHolder(),
}
"""Kinds that give each context back, with an answer."""


def inputs(number: int = NUMBER) -> list[dict[str, Any]]:
    return [{"n": n} for n in range(number)]


async def run(engine: Engine, dag: DAG, number: int = NUMBER, **settings: Any) -> RunResult:
    return await engine.run(dag, inputs(number), **settings)


@every_worker_num
@pytest.mark.parametrize("kind", SIMPLE)
async def test_E15_a_kind_that_gives_contexts_back(engine: Engine, kind: str) -> None:
    dag = DAG()
    dag.task(SIMPLE[kind], kind=kind.split("-", maxsplit=1)[0], name="it")
    process = kind == "process"
    result = await run(engine, dag, process_pool_worker_num=1 if process else 0)
    key = "n" if process else "answer"
    assert sorted(out[key] for out in result) == [2 * n for n in range(NUMBER)]
    assert_counts(result, output=NUMBER)
    assert not result.cleanup_errors


@every_worker_num
@pytest.mark.parametrize("kind", ["loop-async", "loop-sync", "foreground_loop"])
async def test_E15_loops_are_split_into_what_they_give(engine: Engine, kind: str) -> None:
    dag = DAG()
    dag.task(loop_async if kind.endswith("async") else loop, kind=kind.split("-", maxsplit=1)[0], name="it")
    result = await run(engine, dag)
    assert sorted((out["n"], out["number"]) for out in result) == [(n, i) for n in range(NUMBER) for i in range(n % 3)]
    assert_counts(result, output=NUMBER, split=16, dropped=8)  # entered: 24 inputs and 24 items


def choose(ctx: Context) -> list[str]:
    """Nothing, one, or both of `left` and `right`."""
    return [["left"], ["right"], ["left", "right"], []][ctx["n"] % 4]


async def choose_async(ctx: Context) -> list[str]:
    return choose(ctx)


@every_worker_num
@pytest.mark.parametrize("kind", ["router-async", "router-sync", "foreground_router"])
async def test_E15_routers_take_what_they_choose(engine: Engine, kind: str) -> None:
    dag = DAG()
    dag.task(choose_async if kind.endswith("async") else choose, kind=kind.split("-", maxsplit=1)[0], name="choose")
    for name in ("left", "right"):

        async def note(ctx: Context, name: str = name) -> Context:
            ctx[name] = True
            return ctx

        dag.task(note, after="choose", name=name)
    dag.task(answer_async, after=["left", "right"], name="meet")
    result = await run(engine, dag)
    ways = sorted((out["n"] % 4, "left" in out, "right" in out) for out in result)
    assert ways == 6 * [(0, True, False)] + 6 * [(1, False, True)] + 6 * [(2, True, True)]
    assert_counts(result, output=18, dropped=6)


def _list(ctx: Context) -> list[dict[str, Any]]:
    return [{"i": i} for i in range(ctx["n"] % 5)]


def _generator(ctx: Context) -> Iterator[Context]:
    for child in ctx.create_child(ctx["n"] % 5) if ctx["n"] % 5 else []:
        child["i"] = 0
        yield child


async def _coroutine(ctx: Context) -> list[dict[str, Any]]:
    return _list(ctx)


async def _asyncgen(ctx: Context) -> AsyncIterator[dict[str, Any]]:
    for each in _list(ctx):
        yield each


@every_worker_num
@pytest.mark.parametrize("source", [_list, _generator, _coroutine, _asyncgen], ids=lambda source: source.__name__)
@pytest.mark.parametrize("threaded", [False, True], ids=["async_join", "sync_join"])
async def test_E15_maps_and_joins(engine: Engine, source: Callable[..., Any], threaded: bool) -> None:
    dag = DAG()
    dag.map(source, name="spread")
    dag.task(_drop_twos, after="spread", name="work", may_drop=True)

    def gather(ctx: Context, children: Any) -> Context:
        ctx["got"] = len(children)
        return ctx

    async def gather_async(ctx: Context, children: Any) -> Context:
        return gather(ctx, children)

    dag.join(gather if threaded else gather_async, after="work", name="gather")
    result = await run(engine, dag, 20)
    assert len(result) == 20
    dropped = 0 if source is _generator else 8  # the numbers 3 and 4 of every five have a child 2
    assert sum(out["got"] for out in result) == 40 - dropped
    assert_counts(result, output=20, merged=40 - dropped, dropped=dropped)


async def _drop_twos(ctx: Context) -> Context | None:
    return None if ctx["i"] == 2 else ctx


@every_worker_num
async def test_E15_three_levels_of_maps(engine: Engine) -> None:
    dag = DAG()
    nest(dag, (20, 5, 4))
    result = await run(engine, dag, 1)
    assert result[0]["sum"] == 20 * 5 * 4
    assert_counts(result, output=1, merged=20 + 100 + 400)


def nest(dag: DAG, sizes: tuple[int, ...]) -> None:
    """Maps within maps; a leaf counts 1, and each join adds up what is below it."""
    after: Any = ()
    for level, size in enumerate(sizes):

        async def spread(ctx: Context, size: int = size) -> AsyncIterator[dict[str, Any]]:
            for number in range(size):
                yield {"number": number}

        after = dag.map(spread, name=f"map{level}", after=after)

    async def leaf(ctx: Context) -> Context:
        ctx["sum"] = 1
        return ctx

    after = dag.task(leaf, after=after)
    for level in reversed(range(len(sizes))):

        async def add(ctx: Context, children: list[Context]) -> Context:
            ctx["sum"] = sum(child["sum"] for child in children)
            return ctx

        after = dag.join(add, name=f"join{level}", after=after)


@every_worker_num
async def test_E15_a_subgraph_counts_like_its_tasks(engine: Engine) -> None:
    inner = DAG("inner")
    nest(inner, (3,))
    dag = DAG()
    first = dag.include(inner, name="first")
    dag.include(inner, name="second", after=first)
    result = await run(engine, dag)
    assert_counts(result, output=NUMBER, merged=2 * 3 * NUMBER)


@every_worker_num
async def test_E15_everything_in_one_graph(engine: Engine) -> None:
    dag = DAG()
    dag.loop(loop_async, name="loop")
    dag.task(answer, after="loop", name="thread")
    dag.service(serve, after="loop", name="serve")
    dag.stream(stream_async, after=["thread", "serve"], name="stream")
    dag.router(choose_async, after="stream", name="choose")
    dag.map(_asyncgen, after="choose", name="left")
    dag.task(answer_async, after="choose", name="right")
    dag.join(_count, after=["left", "right"], name="join")
    inner = DAG("inner")
    inner.task(answer_async, name="end")
    dag.include(inner, after="join")
    result = await run(engine, dag)
    one = [n for n in range(NUMBER) for _ in range(n % 3)]
    children = sum(n % 5 for n in one if n % 4 in (0, 2))
    assert_counts(
        result,
        split=16,
        dropped=8 + sum(n % 4 == 3 for n in one),
        output=sum(n % 4 != 3 for n in one),
        merged=children,
    )


async def _count(ctx: Context, children: list[Context]) -> Context:
    ctx["got"] = len(children)
    return ctx
