"""T7 and T8: limits, who shares them, and that permits come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from obsdag import (
    DAG,
    ConcurrencyLimit,
    Context,
    Observer,
    RateLimit,
    ResourceError,
    ResourcePool,
    Runtime,
    TaskConfig,
)
from tests.rules.helpers import HANG_S, ONE, Engine, Log, assert_counts, chain, every_schedule, finish, settle


class Gauge:
    """How many are inside, and how many were at once at most."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.total = 0

    async def __aenter__(self) -> None:
        self.inside += 1
        self.total += 1
        self.most = max(self.most, self.inside)

    async def __aexit__(self, *exc: object) -> None:
        self.inside -= 1


def limited(dag: DAG, gauge: Gauge, limiter: Any, name: str = "work", after: Any = (), **settings: Any) -> None:
    """A task that stays inside the gauge for a few turns."""

    @dag.task(name=name, after=after, limiter=limiter, **settings)
    async def work(ctx: Context) -> Context:
        async with gauge:
            await settle(3)
        return ctx


@every_schedule
@pytest.mark.parametrize("n", [1, 2, 5])
async def test_T7_a_concurrency_limit_bounds_executions(engine: Engine, n: int) -> None:
    dag, gauge = DAG(), Gauge()
    limited(dag, gauge, ConcurrencyLimit(n))
    result = await engine.run(dag, [{} for _ in range(12)])
    assert gauge.most == min(n, engine.workers)
    assert_counts(result, output=12)


@every_schedule
async def test_T7_two_tasks_share_a_limit(engine: Engine) -> None:
    dag, gauge = DAG(), Gauge()
    limit = ConcurrencyLimit(2, name="shared")
    limited(dag, gauge, limit, "a")
    limited(dag, gauge, limit, "b")
    limited(dag, gauge, limit, "c", after=["a", "b"])
    result = await engine.run(dag, [{} for _ in range(8)])
    assert gauge.most <= 2
    assert gauge.total == 24
    assert_counts(result, output=8)


@every_schedule
async def test_T7_executors_that_share_a_runtime_share_limits(engine: Engine) -> None:
    gauge, runtime, limit = Gauge(), Runtime(), ConcurrencyLimit(1)
    runs = []
    for _ in range(3):
        dag = DAG()
        limited(dag, gauge, limit)
        runs.append(engine.run(dag, [{} for _ in range(6)], runtime))
    for result in await asyncio.gather(*runs):
        assert_counts(result, output=6)
    assert (gauge.most, gauge.total) == (1, 18)


async def test_T7_executors_that_do_not_share_a_runtime_do_not_share_limits() -> None:
    limit, both = ConcurrencyLimit(1), asyncio.Barrier(2)
    dags = [DAG(), DAG()]
    for dag in dags:

        @dag.task(limiter=limit)
        async def meet(ctx: Context) -> Context:
            await both.wait()
            return ctx

    for result in await asyncio.gather(*(ONE.run(dag) for dag in dags)):
        assert_counts(result, output=1)


async def test_T7_the_state_is_per_limiter_object() -> None:
    dag, both = DAG(), asyncio.Barrier(2)
    for name in "ab":

        @dag.task(name=name, limiter=ConcurrencyLimit(1))
        async def meet(ctx: Context) -> Context:
            await both.wait()
            return ctx

    assert_counts(await Engine(1, 0).run(dag), output=1)


@every_schedule
@pytest.mark.parametrize("burst", [None, 1, 3])
async def test_T7_a_rate_limit_spaces_executions(engine: Engine, burst: int | None) -> None:
    dag = DAG()
    starts: list[float] = []

    @dag.task(limiter=RateLimit(200, per=1.0, burst=burst))
    async def work(ctx: Context) -> Context:
        starts.append(time.monotonic())
        return ctx

    result = await engine.run(dag, [{} for _ in range(8)])
    # Any window of w seconds holds at most b + w * n / per starts; a start is measured later than its permit was given.
    first, last = starts[0], starts[-1]
    assert (burst or 1) + (last - first + 0.004) * 200 + 1 >= 8
    assert_counts(result, output=8)


@every_schedule
async def test_T7_a_rate_limit_given_to_two_tasks_and_two_executors(engine: Engine) -> None:
    limit, runtime = RateLimit(500), Runtime()
    dags = [DAG(), DAG()]
    for dag in dags:
        for name in "ab":
            dag.task(Log().step(name), name=name, limiter=limit)
    began = time.monotonic()
    results = await asyncio.gather(*(engine.run(dag, [{}, {}, {}], runtime) for dag in dags))
    assert time.monotonic() - began >= 11 / 500 - 0.003  # twelve permits, at least 2 ms apart
    for result in results:
        assert_counts(result, output=3)


@every_schedule
async def test_T7_permits_are_taken_all_together_or_not_at_all(engine: Engine) -> None:
    dag, gauge = DAG(), Gauge()
    a, b, c = ConcurrencyLimit(1), ConcurrencyLimit(1), ConcurrencyLimit(1)
    # Taken one by one, these would wait for each other for ever.
    limited(dag, gauge, [a, b], "ab")
    limited(dag, gauge, [b, c], "bc")
    limited(dag, gauge, [c, a], "ca")
    limited(dag, gauge, [c, b, a], "cba", after=["ab", "bc", "ca"])
    result = await engine.run(dag, [{} for _ in range(6)])
    assert (gauge.most, gauge.total) == (1, 24)
    assert_counts(result, output=6)


@pytest.mark.parametrize("workers", [4, 64])
async def test_T7_permits_are_given_in_order_of_asking(workers: int) -> None:
    dag, asked, got = DAG(), [], []

    class Asked(Observer):
        def limit_deferred(self, context: Context, task: Any, limiter: str, now: float) -> None:
            asked.append(context)

    @dag.task
    async def before(ctx: Context) -> Context:
        return ctx

    @dag.task(after=before, limiter=ConcurrencyLimit(1))
    async def get(ctx: Context) -> Context:
        got.append(ctx)
        await settle()
        return ctx

    result = await Engine(workers).run(dag, [{} for _ in range(10)], observers=(Asked(),))
    assert got[1:] == asked  # the first had it at once
    assert_counts(result, output=10)


async def test_T7_a_waiting_context_holds_no_worker() -> None:
    dag, log = DAG(), Log()

    @dag.router
    async def choose(ctx: Context) -> str:
        return "slow" if ctx["n"] < 2 else "quick"

    dag.task(log.step("slow"), after=choose, name="slow", limiter=RateLimit(20))
    dag.task(log.step("quick"), after=choose, name="quick")
    result = await ONE.run(dag, [{"n": n} for n in range(5)])
    assert log.names() == ["slow", "quick", "quick", "quick", "slow"]
    assert_counts(result, output=5)


@every_schedule
async def test_T7_a_reserved_permit_is_given_back_if_the_context_ends_first(engine: Engine) -> None:
    dag, log = DAG(), Log()
    limit = ConcurrencyLimit(1)
    contexts: list[Context] = []
    inside = asyncio.Event()

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        contexts.extend(ctx.create(name=f"c{n}") for n in range(5))
        return contexts

    @dag.task(after=spread, limiter=limit)
    async def work(ctx: Context) -> Context:
        log.append((ctx.id, ctx))
        if not inside.is_set():
            inside.set()
            await settle()
            loop = asyncio.get_running_loop()
            # When this execution ends, the next in line is given the permit; it is destroyed before it can start.
            for other in contexts:
                if other is not ctx and other.id in ("c1", "c2"):
                    loop.call_soon(other.destroy)
        return ctx

    result = await engine.run(dag)
    gone = result.counts["dropped"]
    assert_counts(result, split=1, dropped=gone, output=5 - gone)


@every_schedule
async def test_T7_freezing_a_context_that_waits_gives_its_turn_to_others(engine: Engine) -> None:
    dag, gauge = DAG(), Gauge()
    loop = asyncio.get_running_loop()
    contexts: list[Context] = []

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        contexts.extend(ctx.create(name=f"c{n}") for n in range(4))
        return contexts

    @dag.task(after=spread, limiter=ConcurrencyLimit(1))
    async def work(ctx: Context) -> Context:
        async with gauge:
            if gauge.total == 1:
                for other in contexts:
                    if other is not ctx:
                        other.freeze()
                        loop.call_later(0.01, other.thaw)
            assert not ctx.frozen
            await settle()
        return ctx

    result = await engine.run(dag)
    assert gauge.most == 1
    assert_counts(result, split=1, output=4)


@every_schedule
async def test_T7_a_retry_takes_a_permit_again(engine: Engine) -> None:
    dag, gauge = DAG(), Gauge()

    @dag.task(limiter=ConcurrencyLimit(1), retry_times=2, retry_interval=0.001)
    async def flaky(ctx: Context) -> Context:
        async with gauge:
            await settle(3)
            if ctx.attempt < 3:
                raise ValueError
        return ctx

    result = await engine.run(dag, [{} for _ in range(5)])
    assert (gauge.most, gauge.total) == (1, 15)
    assert_counts(result, output=5)


# --- resource pools


@every_schedule
@pytest.mark.parametrize("kind", ["async", "sync", "foreground"])
async def test_T7_a_resource_is_an_executions_own(engine: Engine, kind: str) -> None:
    dag = DAG()
    used: list[str] = []
    inside: set[str] = set()

    async def use_async(ctx: Context, resource: str) -> Context:
        assert resource not in inside
        inside.add(resource)
        await settle(3)
        inside.discard(resource)
        used.append(resource)
        return ctx

    def use(ctx: Context, resource: str) -> Context:
        assert resource not in inside
        inside.add(resource)
        inside.discard(resource)
        used.append(resource)
        return ctx

    dag.task(use_async if kind == "async" else use, kind=kind, name="use", limiter=ResourcePool(["x", "y"]))
    result = await engine.run(dag, [{} for _ in range(9)])
    assert set(used) <= {"x", "y"}
    assert len(used) == 9
    assert_counts(result, output=9)


@every_schedule
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_T7_items_are_made_when_needed_and_closed_at_the_end(engine: Engine, asynchronous: bool) -> None:
    dag = DAG()
    made: list[int] = []
    closed: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    async def make_async() -> int:
        await asyncio.sleep(0)
        return make()

    async def close_async(item: int) -> None:
        await asyncio.sleep(0)
        closed.append(item)

    pool = ResourcePool(
        make_async if asynchronous else make, close=close_async if asynchronous else closed.append, size=3
    )

    @dag.task(limiter=pool)
    async def use(ctx: Context, resource: int) -> Context:
        await settle(3)
        ctx["used"] = resource
        return ctx

    executor = engine.executor(dag)
    result = await finish(executor, [{} for _ in range(10)])
    assert len(made) == min(3, engine.workers)
    assert sorted(closed) == made
    assert {out["used"] for out in result} == set(made)
    assert_counts(result, output=10)
    assert_counts(await finish(executor, [{}, {}]), output=2)
    assert sorted(closed) == made


@every_schedule
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_T7_a_factory_that_fails_fails_the_context_and_gives_the_permit_back(
    engine: Engine, asynchronous: bool
) -> None:
    dag = DAG()
    calls: list[int] = []

    def make() -> int:
        calls.append(1)
        if len(calls) <= 2:
            raise OSError("no connection")
        return 7

    async def make_async() -> int:
        await asyncio.sleep(0)
        return make()

    @dag.task(limiter=ResourcePool(make_async if asynchronous else make, size=1))
    async def use(ctx: Context, resource: int) -> Context:
        return ctx

    result = await engine.run(dag, [{} for _ in range(5)])
    assert_counts(result, failed=2, output=3)
    error = result.failures[0].exception
    assert isinstance(error, ResourceError)
    assert isinstance(error.__cause__, OSError)


@every_schedule
async def test_T7_a_factory_that_fails_is_tried_again_by_a_retry(engine: Engine) -> None:
    dag = DAG()
    calls: list[int] = []

    def make() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("once")
        return 7

    @dag.task(limiter=ResourcePool(make, size=1), retry_times=1, retry_interval=0.001)
    async def use(ctx: Context, resource: int) -> Context:
        return ctx

    result = await engine.run(dag, [{}])
    assert_counts(result, output=1)


@every_schedule
async def test_T7_a_factory_that_hangs_is_cancelled_with_its_context(engine: Engine) -> None:
    dag = DAG()
    started = asyncio.Event()
    ctx = Context()

    async def make() -> int:
        if not started.is_set():
            started.set()
            await asyncio.Event().wait()
        return 1

    @dag.task(limiter=ResourcePool(make, size=1))
    async def use(ctx: Context, resource: int) -> Context:
        return ctx

    running = asyncio.create_task(engine.run(dag, [ctx, {}]))
    async with asyncio.timeout(HANG_S):
        await started.wait()
    await settle()
    ctx.destroy()
    result = await running
    assert_counts(result, dropped=1, output=1)


@every_schedule
async def test_T7_a_close_that_raises_is_reported_and_hides_nothing(engine: Engine) -> None:
    dag = DAG()
    closed: list[str] = []

    def close(item: str) -> None:
        closed.append(item)
        raise OSError(f"cannot close {item}")

    @dag.task(limiter=ResourcePool(["x", "y"], close=close))
    async def use(ctx: Context, resource: str) -> Context:
        return ctx

    result = await engine.run(dag, [{} for _ in range(4)])
    assert sorted(closed) == ["x", "y"]
    assert sorted(str(error) for _, error in result.cleanup_errors) == ["cannot close x", "cannot close y"]
    assert_counts(result, output=4)


async def test_T7_a_pool_is_closed_when_the_last_run_that_uses_it_ends() -> None:
    closed: list[str] = []
    runtime, pool = Runtime(), ResourcePool(["x", "y"], close=closed.append)
    gate, entered = asyncio.Event(), asyncio.Event()
    quick, slow = DAG(), DAG()

    @quick.task(limiter=pool)
    async def use(ctx: Context, resource: str) -> Context:
        return ctx

    @slow.task(limiter=pool)
    async def hold(ctx: Context, resource: str) -> Context:
        entered.set()
        await gate.wait()
        return ctx

    running = asyncio.create_task(ONE.run(slow, {}, runtime))
    await entered.wait()
    assert_counts(await ONE.run(quick, [{}, {}], runtime), output=2)
    assert closed == []
    gate.set()
    assert_counts(await running, output=1)
    assert sorted(closed) == ["x", "y"]


@every_schedule
async def test_T7_pool_rate_and_concurrency_together(engine: Engine) -> None:
    dag, gauge = DAG(), Gauge()

    @dag.task(limiter=[ResourcePool(["x", "y", "z"]), ConcurrencyLimit(2), RateLimit(2000)], parallel_num=3)
    async def use(ctx: Context, resource: str) -> Context:
        async with gauge:
            await settle(2)
        return ctx

    result = await engine.run(dag, [{} for _ in range(8)])
    assert gauge.most <= 2
    assert_counts(result, output=8)


# --- T8

WAYS = [
    "return",
    "raise",
    "drop",
    "split",
    "timeout",
    "destroy",
    "cancelled",
    "rubbish",
    "children",
    "freeze",
    "output",
]


def ways_out() -> Callable[..., Any]:
    """A coroutine function that leaves in the way that `ctx["way"]` says."""
    from obsdag import OutputContext

    def freeze(ctx: Context) -> Context:
        ctx.freeze()
        asyncio.get_running_loop().call_soon(ctx.thaw)
        return ctx

    def destroy(ctx: Context) -> Context:
        ctx.destroy()
        return ctx

    def fail(error: BaseException) -> None:
        raise error

    ways: dict[str, Callable[[Context], Any]] = {
        "return": lambda ctx: ctx,
        "raise": lambda _: fail(ValueError()),
        "drop": lambda ctx: None,
        "split": lambda ctx: ctx.create(),
        "destroy": destroy,
        "cancelled": lambda _: fail(asyncio.CancelledError()),
        "rubbish": lambda ctx: 5,
        "children": lambda ctx: ctx.create_child(2),
        "freeze": freeze,
        "output": OutputContext,
    }

    async def leave(ctx: Context) -> Any:
        if ctx["way"] == "timeout":
            await asyncio.Event().wait()
        return ways[ctx["way"]](ctx)

    return leave


@every_schedule
async def test_T8_permits_come_back_on_every_way_out(engine: Engine) -> None:
    dag, runtime = DAG(), Runtime()
    closed: list[str] = []
    config = TaskConfig(
        limiter=(ConcurrencyLimit(1), ResourcePool(["only"], close=closed.append)), timeout=0.02, may_drop=True
    )
    dag.task(ways_out(), config=config, name="leave")
    result = await engine.run(dag, [{"way": way} for way in WAYS * 2], runtime)
    assert_counts(result, output=2 * (1 + 1 + 2 + 1 + 1), failed=2 * 4, dropped=2 * 2, split=2 * 2)
    assert closed == ["only"]


@every_schedule
async def test_T8_permits_come_back_when_the_run_is_cancelled(engine: Engine) -> None:
    limit, runtime = ConcurrencyLimit(1), Runtime()
    dag, after = DAG(), DAG()
    entered = asyncio.Event()

    @dag.task(limiter=limit)
    async def hold(ctx: Context) -> Context:
        entered.set()
        await asyncio.Event().wait()
        return ctx

    running = asyncio.create_task(engine.run(dag, [{}] * 5, runtime))
    await entered.wait()
    await settle()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    after.task(Log().step("a"), name="a", limiter=limit)
    assert_counts(await engine.run(after, [{}, {}], runtime), output=2)


@every_schedule
async def test_T8_permits_of_streams_loops_and_maps_come_back(engine: Engine) -> None:
    dag, limit = DAG(), ConcurrencyLimit(1)

    @dag.loop(limiter=limit)
    async def loop(ctx: Context) -> AsyncIterator[Context]:
        for _ in range(3):
            yield ctx.create()

    @dag.stream(after=loop, limiter=limit)
    async def stream(ctx: Context) -> AsyncIterator[Context]:
        while True:
            ctx = yield ctx

    @dag.map(after=stream, limiter=limit)
    async def spread(ctx: Context) -> AsyncIterator[Any]:
        for n in range(2):
            yield {"n": n}

    chain(dag, Log(), "leaf", after=spread)

    @dag.join(after="leaf", limiter=limit)
    async def join(ctx: Context, children: list[Context]) -> Context:
        return ctx

    result = await engine.run(dag, [{}, {}])
    assert_counts(result, split=2, output=6, merged=12)
