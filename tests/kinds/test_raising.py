"""Whatever a function of whatever kind raises fails its own context, and the others go on (SEMANTICS E6, T8)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from queue import Queue
from typing import Any

import pytest

from obsdag import DAG, Context, StopContext
from tests.kinds.jobs import Outside, raise_if_told, raise_outside_if_told
from tests.rules.helpers import Engine, assert_counts, every_worker_num


class TwoArguments(Exception):
    """Cannot be made again from its pickle: two arguments in, one kept."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "exception": lambda: ValueError("told so"),
    "two arguments": lambda: TwoArguments(404, "not found"),
    "base exception": Outside,
    "not asked to": asyncio.CancelledError,
    "group": lambda: ExceptionGroup("several", [ValueError(1), OSError(2)]),
}


def kinds(error: Callable[[], BaseException]) -> dict[str, Any]:
    """A function of each kind that raises on a context that is `bad`."""

    def act(ctx: Context) -> Context:
        if ctx["bad"]:
            raise error()
        return ctx

    async def act_async(ctx: Context) -> Context:
        await asyncio.sleep(0)
        return act(ctx)

    def choose(ctx: Context) -> str:
        return act(ctx) and "end"

    async def choose_async(ctx: Context) -> str:
        return act(ctx) and "end"

    def generate(ctx: Context) -> Iterator[Any]:
        while True:
            ctx = yield act(ctx)

    async def generate_async(ctx: Context) -> AsyncIterator[Any]:
        while True:
            ctx = yield act(ctx)

    def once(ctx: Context) -> Iterator[Context]:
        yield act(ctx)

    async def once_async(ctx: Context) -> AsyncIterator[Context]:
        yield act(ctx)

    async def serve(queue: asyncio.Queue[Any]) -> None:
        while True:
            ctx, future = await queue.get()
            try:
                future.set_result(act(ctx))
            except BaseException as raised:
                future.set_exception(raised)

    def serve_in_thread(queue: Queue[Any]) -> None:
        while True:
            ctx, future = queue.get()
            if isinstance(ctx, StopContext):
                return
            try:
                future.set_result(act(ctx))
            except BaseException as raised:
                future.set_exception(raised)

    return {
        "async": act_async,
        "sync": act,
        "foreground": act,
        "router-async": choose_async,
        "router-sync": choose,
        "foreground_router": choose,
        "stream-async": generate_async,
        "stream-sync": generate,
        "foreground_stream": generate,
        "loop-async": once_async,
        "loop-sync": once,
        "foreground_loop": once,
        "service": serve,
        "thread": serve_in_thread,
    }


@every_worker_num
@pytest.mark.parametrize("kind", kinds(ValueError))
@pytest.mark.parametrize("error", ERRORS)
async def test_E6_whatever_is_raised_fails_its_own_context(engine: Engine, kind: str, error: str) -> None:
    dag = DAG()
    dag.task(kinds(ERRORS[error])[kind], kind=kind.split("-", maxsplit=1)[0], name="it")

    @dag.task(after="it")
    async def end(ctx: Context) -> Context:
        return ctx

    result = await engine.run(dag, [{"n": n, "bad": n % 3 == 1} for n in range(9)])
    assert sorted(output["n"] for output in result) == [0, 2, 3, 5, 6, 8]
    assert_counts(result, output=6, failed=3)
    assert sorted(failure.context["n"] for failure in result.failures) == [1, 4, 7]
    for failure in result.failures:
        assert failure.task == "it"
        if error != "not asked to":  # which is told as a TaskError that says so
            assert type(failure.exception) is type(ERRORS[error]())


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("threaded", [False, True], ids=["async", "sync"])
async def test_E6_a_map_that_raises_fails_its_own_context(error: str, threaded: bool) -> None:
    dag = DAG()

    def items(ctx: Context) -> list[dict[str, int]]:
        if ctx["bad"]:
            raise ERRORS[error]()
        return [{"item": 1}, {"item": 2}]

    async def items_async(ctx: Context) -> list[dict[str, int]]:
        return items(ctx)

    dag.task(items if threaded else items_async, kind="map", name="it")
    result = await Engine(4).run(dag, [{"bad": n == 1} for n in range(3)])
    assert_counts(result, output=4, split=2, failed=1)
    assert [failure.task for failure in result.failures] == ["it"]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("threaded", [False, True], ids=["async", "sync"])
async def test_E6_a_join_that_raises_fails_the_parent_and_cancels_its_children(error: str, threaded: bool) -> None:
    dag = DAG()

    @dag.task(kind="map")
    async def spread(ctx: Context) -> list[dict[str, int]]:
        return [{"item": 1}, {"item": 2}]

    def gather(parent: Context, children: list[Context]) -> Context:
        if parent["bad"]:
            raise ERRORS[error]()
        return parent

    async def gather_async(parent: Context, children: list[Context]) -> Context:
        return gather(parent, children)

    dag.task(gather if threaded else gather_async, kind="join", name="it", after=spread)
    result = await Engine(4).run(dag, [{"bad": n == 1} for n in range(3)])
    assert_counts(result, output=2, merged=4, failed=1, cancelled=2)
    assert [failure.task for failure in result.failures] == ["it"]


@pytest.mark.parametrize("job", [raise_if_told, raise_outside_if_told])
async def test_E6_what_is_raised_in_a_process_fails_its_own_context(job: Callable[[Context], Any]) -> None:
    dag = DAG()
    dag.task(job, kind="process", name="it")
    result = await Engine(4).run(dag, [{"bad": n % 3 == 1} for n in range(9)], process_pool_worker_num=2)
    assert_counts(result, output=6, failed=3)
    assert {failure.task for failure in result.failures} == {"it"}
