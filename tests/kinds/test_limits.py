"""Limits on tasks (T7, T8): nothing polls, first come first served, shared, given back on every way out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from obsdag import (
    DAG,
    ConcurrencyLimit,
    Context,
    Executor,
    ExecutorConfig,
    RateLimit,
    ResourceError,
    ResourcePool,
    RunResult,
    Runtime,
)
from obsdag.testing import VirtualLoop, run_virtual
from tests.rules.helpers import ONE, Engine, assert_counts, every_worker_num, settle


def loop() -> VirtualLoop:
    running = asyncio.get_running_loop()
    assert isinstance(running, VirtualLoop)
    return running


def numbered(number: int) -> list[dict[str, Any]]:
    return [{"n": n} for n in range(number)]


# --- rates


@pytest.mark.parametrize("workers", [1, 64])
@pytest.mark.parametrize("burst", [None, 100])
def test_T7_10_000_contexts_waiting_for_one_rate_wake_the_engine_once_per_permit(
    workers: int, burst: int | None
) -> None:
    dag = DAG()
    started: list[float] = []

    @dag.task(limiter=RateLimit(100, burst=burst))
    async def call(ctx: Context) -> Context:
        started.append(loop().time())
        return ctx

    async def main() -> tuple[RunResult, int, int]:
        executor = Executor(dag, config=ExecutorConfig(context_worker_num=workers))
        jumps, turns = loop().jumps, loop().turns
        return await executor.run(numbered(10_000)), loop().jumps - jumps, loop().turns - turns

    result, jumps, turns = run_virtual(main())
    at_once = burst or 1
    assert_counts(result, output=10_000)
    assert jumps == 10_000 - at_once
    assert turns < 5 * 10_000, "more than a few turns of the event loop for a permit"
    waits = [0.0] * at_once + [number / 100 for number in range(1, 10_001 - at_once)]
    assert started == pytest.approx(waits)


def test_T7_first_come_first_served_by_context_not_by_task() -> None:
    """`short` and `long` share a rate: they are served in the order in which they asked, whichever task it is for."""
    dag = DAG()
    limit = RateLimit(10)
    asked, served = list[tuple[str, int]](), list[tuple[str, int]]()

    @dag.router
    async def choose(ctx: Context) -> str:
        asked.append(("short" if ctx["n"] % 3 else "long", ctx["n"]))
        return asked[-1][0]

    @dag.task(after=choose, limiter=limit)
    async def short(ctx: Context) -> Context:
        served.append(("short", ctx["n"]))
        return ctx

    @dag.task(after=choose, limiter=limit)
    async def long(ctx: Context) -> Context:
        served.append(("long", ctx["n"]))
        return ctx

    async def main() -> tuple[RunResult, float]:
        return await Engine(64).run(dag, numbered(30)), loop().time()

    result, took = run_virtual(main())
    assert served == asked
    assert took == pytest.approx(2.9)
    assert_counts(result, output=30)


def test_T7_a_limit_is_shared_by_executors_of_one_runtime_and_not_by_others() -> None:
    limit = RateLimit(10)

    def dag() -> DAG:
        made = DAG()
        made.task(_same, limiter=limit, name="call")
        return made

    async def took(*runtimes: Runtime) -> float:
        start = loop().time()
        await asyncio.gather(*(Executor(dag(), runtime).run(numbered(5)) for runtime in runtimes))
        return loop().time() - start

    shared = Runtime()
    assert run_virtual(took(shared, shared)) == pytest.approx(0.9)
    assert run_virtual(took(Runtime(), Runtime())) == pytest.approx(0.4)


async def _same(ctx: Context) -> Context:
    return ctx


@pytest.mark.parametrize("kind", ["loop", "map"])
def test_T14_a_loops_limit_holds_for_each_item(kind: str) -> None:
    dag = DAG()
    times: list[float] = []

    @dag.task(kind=kind, limiter=RateLimit(10))
    async def source(ctx: Context) -> AsyncIterator[Context]:
        for n in range(5):
            times.append(loop().time())
            yield Context(data={"n": n})

    async def main() -> RunResult:
        return await Engine(4).run(dag)

    result = run_virtual(main())
    assert times == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert_counts(result, output=5, split=1)


# --- concurrency


@every_worker_num
@pytest.mark.parametrize("how", ["parallel_num", "limit", "shared"])
async def test_T7_never_more_at_once_than_allowed(engine: Engine, how: str) -> None:
    dag = DAG()
    now = most = 0

    async def call(ctx: Context) -> Context:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        now -= 1
        return ctx

    limit = ConcurrencyLimit(3)
    settings: dict[str, Any] = {"parallel_num": 3} if how == "parallel_num" else {"limiter": limit}
    dag.task(call, name="a", **settings)
    dag.task(call, name="b", after="a", **(settings if how == "shared" else {"parallel_num": 1}))
    if how != "shared":
        dag.task(_same, after="b", name="end")
    result = await engine.run(dag, numbered(40))
    assert_counts(result, output=40)
    assert most <= (3 if how == "shared" else 4)
    assert most >= min(engine.workers, 3)


# --- resource pools


class Opened:
    """Counts what a pool makes and closes."""

    def __init__(self) -> None:
        self.made = 0
        self.closed: list[int] = []

    def open(self) -> int:
        self.made += 1
        return self.made

    async def open_async(self) -> int:
        return self.open()


@every_worker_num
@pytest.mark.parametrize("factory", ["open", "open_async"])
async def test_T7_resources_are_made_when_needed_and_closed_at_the_runs_end(engine: Engine, factory: str) -> None:
    opened, dag = Opened(), DAG()
    pool = ResourcePool(getattr(opened, factory), close=opened.closed.append, size=3)
    busy: set[int] = set()

    @dag.task(limiter=pool)
    async def call(ctx: Context, *, resource: int) -> Context:
        assert resource not in busy
        busy.add(resource)
        await asyncio.sleep(0)
        busy.remove(resource)
        assert not opened.closed
        ctx["resource"] = resource
        return ctx

    assert opened.made == 0
    result = await engine.run(dag, numbered(30))
    assert_counts(result, output=30)
    assert opened.made == min(engine.workers, 3)
    assert sorted(opened.closed) == list(range(1, opened.made + 1))
    assert {out["resource"] for out in result} == set(opened.closed)


@pytest.mark.parametrize("kind", ["async", "sync", "foreground", "router", "join"])
async def test_T7_the_item_reaches_every_kind_that_is_called(kind: str) -> None:
    dag, pool = DAG(), ResourcePool(["the item"])

    async def call_async(ctx: Context, *, resource: str) -> Any:
        return call(ctx, resource=resource)

    def call(ctx: Context, *, resource: str) -> Any:
        ctx["resource"] = resource
        return "next" if kind == "router" else ctx

    if kind == "join":
        dag.map(lambda ctx: [{}], name="spread")

        @dag.join(after="spread", limiter=pool)
        async def it(ctx: Context, children: list[Context], *, resource: str) -> Context:
            ctx["resource"] = resource
            return ctx
    else:
        dag.task(call_async if kind == "async" else call, kind=kind, name="it", limiter=pool)
    dag.task(_same, after="it", name="next")
    result = await ONE.run(dag)
    assert [out["resource"] for out in result] == ["the item"]


async def test_T7_several_pools_come_as_a_tuple() -> None:
    dag = DAG()

    @dag.task(limiter=[ResourcePool(["a"]), ResourcePool(["b"]), ConcurrencyLimit(1)])
    async def call(ctx: Context, *, resource: tuple[str, str]) -> Context:
        ctx["resource"] = resource
        return ctx

    assert [out["resource"] for out in await ONE.run(dag, numbered(2))] == [("a", "b")] * 2


@every_worker_num
async def test_T8_an_item_comes_back_on_every_way_out(engine: Engine) -> None:
    """One item, taken in turn by contexts that end in every way; the last one would wait for ever if it were kept."""
    opened, dag = Opened(), DAG()

    @dag.task(limiter=ResourcePool(opened.open, close=opened.closed.append, size=1), timeout=0.02, may_drop=True)
    async def call(ctx: Context, *, resource: int) -> Context | None:
        match ctx["n"] % 5:
            case 0:
                raise ValueError("failed")
            case 1:
                await asyncio.Event().wait()
            case 2:
                ctx.destroy()
            case 3:
                return None
        return ctx

    result = await engine.run(dag, numbered(10))
    assert_counts(result, failed=4, dropped=4, output=2)
    assert (opened.made, opened.closed) == (1, [1])


async def test_T8_what_is_held_and_waited_for_comes_back_when_a_run_is_cancelled() -> None:
    opened, dag = Opened(), DAG()
    inside = asyncio.Event()

    @dag.task(limiter=ResourcePool(opened.open, close=opened.closed.append, size=2))
    async def call(ctx: Context, *, resource: int) -> Context:
        if ctx["n"] == 1:
            inside.set()
        await asyncio.Event().wait()
        return ctx

    executor = Engine(4).executor(dag)
    run = asyncio.create_task(executor.run(numbered(4)))
    await inside.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert sorted(opened.closed) == [1, 2]
    assert executor.stats()["cancelled"] == 4


@pytest.mark.parametrize("asynchronous", [False, True], ids=["close", "async close"])
async def test_T8_a_resource_that_comes_when_nobody_waits_for_it_any_more_is_closed(asynchronous: bool) -> None:
    opened, dag = Opened(), DAG()
    being_made, may_be_made = threading.Event(), threading.Event()

    def open_slowly() -> int:
        being_made.set()
        may_be_made.wait()
        return opened.open()

    async def close(item: int) -> None:
        opened.closed.append(item)

    @dag.task(limiter=ResourcePool(open_slowly, close=close if asynchronous else opened.closed.append, size=1))
    async def call(ctx: Context, *, resource: int) -> Context:
        return ctx

    run = asyncio.create_task(Engine(1).executor(dag).run({}))
    while not being_made.is_set():
        await asyncio.sleep(0)
    run.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    may_be_made.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    await settle()
    assert opened.closed == [1]


async def test_T8_a_destroyed_context_leaves_the_line() -> None:
    """What waits for the permit and is destroyed does not get it in vain."""
    dag = DAG()
    waiting: list[Context] = []
    called: list[Context] = []

    @dag.task
    async def enter(ctx: Context) -> Context:
        waiting.append(ctx)
        return ctx

    @dag.task(after=enter, limiter=ConcurrencyLimit(1))
    async def call(ctx: Context) -> Context:
        if not called:
            while len(waiting) < 3:
                await asyncio.sleep(0)
            waiting[1].destroy()
        called.append(ctx)
        return ctx

    result = await Engine(4).run(dag, numbered(3))
    assert called == [waiting[0], waiting[2]]
    assert_counts(result, output=2, dropped=1)


@every_worker_num
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_T7_a_resource_that_cannot_be_made_fails_its_context_and_no_other(
    engine: Engine, asynchronous: bool
) -> None:
    dag = DAG()
    tries = 0

    def open_(*_: Any) -> int:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise OSError(f"no route, {tries}")
        return tries

    async def open_async() -> int:
        return open_()

    pool = ResourcePool(open_async if asynchronous else open_, size=1, name="lines")

    @dag.task(limiter=pool)
    async def call(ctx: Context, *, resource: int) -> Context:
        ctx["resource"] = resource
        return ctx

    result = await engine.run(dag, numbered(10))
    assert_counts(result, failed=3, output=7)
    assert {out["resource"] for out in result} == {4}
    for failure in result.failures:
        assert isinstance(failure.exception, ResourceError)
        assert isinstance(failure.exception.__cause__, OSError)
        assert "task 'call': pool 'lines' could not make a resource: no route" in str(failure.exception)


async def test_T7_closing_a_resource_that_fails_is_reported_and_hides_nothing() -> None:
    def close(item: str) -> None:
        raise OSError(f"cannot close {item}")

    dag = DAG()
    dag.task(_same, name="call", limiter=ResourcePool(["a"], close=close))
    result = await ONE.run(dag, numbered(2))
    assert_counts(result, output=2)
    assert [str(error) for _, error in result.cleanup_errors] == ["cannot close a"]


@pytest.mark.parametrize("kind", ["loop", "map", "stream", "service"])
def test_T7_kinds_that_are_called_once_for_many_contexts_take_no_resource(kind: str) -> None:
    dag = DAG()

    async def generator(ctx: Context, *, resource: str) -> AsyncIterator[Context]:
        yield ctx

    async def serve(queue: asyncio.Queue[Any], *, resource: str) -> None:
        await queue.get()

    dag.task(serve if kind == "service" else generator, kind=kind, name="it", limiter=ResourcePool(["a"]))
    assert any("resource" in problem.text for problem in dag.find_problems())
