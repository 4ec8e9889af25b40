"""Section 7: the defects of the earlier system, each with a test that its behavior would fail.

All in virtual time: what idles, polls or waits for a time-out is seen in the clock, in its jumps, or in the turns of
the loop, whatever the machine.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from obsdag import DAG, Context, NotAcceptingError, RateLimit, ServeExecutor
from obsdag.context import OutputContext
from tests.rules.helpers import assert_counts
from tests.rules.virtual import assert_clean, execute, make, now, passing, virtual, virtual_loop

every_number = pytest.mark.parametrize("workers", [1, 4, 64])


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"n": n} for n in range(count)]


# --- 1: finished runs idle until a queue time-out; a deadlock is noticed after 20 s only


@every_number
@virtual
async def test_defect_1_a_finished_run_does_not_idle(workers: int) -> None:
    dag, ended = DAG(), []

    @dag.task
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(3)
        ended.append(virtual_loop().turns)
        return ctx

    assert_counts(await execute(dag, None, workers, context_queue_timeout=1), output=1)
    assert now() == 3, "the run ended later than its only task"
    assert virtual_loop().turns - ended[0] <= 3


@every_number
@virtual
async def test_defect_1_a_deadlock_is_noticed_at_once_and_named(workers: int) -> None:
    dag = DAG()

    @dag.map
    async def parts(ctx: Context) -> AsyncIterator[dict[str, Any]]:
        for name in ("left", "right"):
            yield {"to": name}

    @dag.router(after=parts)
    async def pick(ctx: Context) -> str:
        return ctx["to"]

    @dag.join(after=pick)
    async def left(parent: Context, children: list[Context]) -> Context:
        return parent

    @dag.join(after=pick)
    async def right(parent: Context, children: list[Context]) -> Context:
        return parent

    result = await execute(dag, Context(name="order 7"), workers, context_queue_timeout=1)
    assert now() == 0, "the deadlock was waited for"
    assert_counts(result, stalled=3)
    told = "\n".join(map(str, result.stalled))
    for word in ("order 7", "left", "right"):
        assert word in told


# --- 2: retry delays and rate limits spin


@every_number
@virtual
async def test_defect_2_a_retry_delay_wakes_nobody_before_its_time(workers: int) -> None:
    dag, attempts = DAG(), []

    @dag.task(retry_times=1, retry_interval=3600)
    async def flaky(ctx: Context) -> Context:
        attempts.append(now())
        if ctx.attempt == 1:
            raise OSError("away")
        return ctx

    assert_counts(await execute(dag, numbered(5), workers), output=5)
    assert attempts == [0] * 5 + [3600] * 5
    assert virtual_loop().jumps == 1
    assert virtual_loop().turns < 60, "the loop went round while nothing was due"


@every_number
@virtual
async def test_defect_2_a_rate_limit_wakes_nobody_without_a_permit(workers: int) -> None:
    dag, starts = DAG(), []

    @dag.task(limiter=RateLimit(1, per=60))
    async def limited(ctx: Context) -> Context:
        starts.append(now())
        return ctx

    assert_counts(await execute(dag, numbered(50), workers), output=50)
    assert starts == [60 * n for n in range(50)]
    assert virtual_loop().jumps == 49, "more wake-ups than permits"
    assert virtual_loop().turns < 5 * 50, "the loop went round while nothing was due"


# --- 3: counts of running executions leak when a task raises; parallel_num is off by one


@pytest.mark.parametrize("limit", [1, 2, 3])
@virtual
async def test_defect_3_parallel_num_is_exact_and_comes_back_from_failures(limit: int) -> None:
    dag, running, most = DAG(), Counter[str](), Counter[str]()

    @dag.task(parallel_num=limit)
    async def work(ctx: Context) -> Context:
        running["now"] += 1
        most["now"] = max(most["now"], running["now"])
        try:
            await asyncio.sleep(1)
            if ctx["n"] < 12:
                raise ValueError("no")
        finally:
            running["now"] -= 1
        return ctx

    result = await execute(dag, numbered(24), 64)
    assert_counts(result, output=12, failed=12)
    assert most["now"] == limit
    assert now() == 24 / limit, "places were lost, or one too many or too few was given"


# --- 4: GC loops for ever once a context has children


@every_number
@pytest.mark.parametrize("gc", [True, False])
@virtual
async def test_defect_4_a_context_with_children_is_discarded_in_bounded_work(workers: int, gc: bool) -> None:
    dag = DAG()

    @dag.task
    async def discard(ctx: Context) -> Context | None:
        children = ctx.create_child(3)
        children[0].create_child(2)
        return None if children else ctx

    assert_counts(await execute(dag, numbered(20), workers, enable_context_gc=gc), dropped=20)
    assert virtual_loop().turns < 200


@every_number
@pytest.mark.parametrize("gc", [True, False])
@virtual
async def test_defect_4_contexts_made_into_children_end_in_bounded_work(workers: int, gc: bool) -> None:
    dag = DAG()

    @dag.task
    async def divide(ctx: Context) -> list[Context]:
        return ctx.create_child(2)

    passing(dag, "work", after=divide)
    assert_counts(await execute(dag, numbered(20), workers, enable_context_gc=gc), split=20, output=40)
    assert virtual_loop().turns < 200


# --- 5: a failed context vanishes: no output, no error in the result


@every_number
@virtual
async def test_defect_5_a_failed_context_is_in_the_result_with_its_error(workers: int) -> None:
    dag = DAG()

    @dag.task(retry_times=1)
    async def work(ctx: Context) -> Context:
        if ctx["n"] == 3:
            raise KeyError("three")
        return ctx

    result = await execute(dag, numbered(5), workers)
    assert_counts(result, output=4, failed=1)
    (failure,) = result.failures
    assert (failure.context["n"], failure.task, failure.attempts) == (3, "work", 2)
    assert isinstance(failure.exception, KeyError)
    assert failure.context.outcome == "failed"
    assert failure.context.error_info.exception is failure.exception


# --- 6: a task that returned nothing is run again in the next wave of the same context


@every_number
@pytest.mark.parametrize("tasks", [1, 2, 0])
@virtual
async def test_defect_6_a_task_that_returned_nothing_is_not_run_again(workers: int, tasks: int) -> None:
    dag, runs = DAG(), Counter[str]()

    @dag.task
    async def first(ctx: Context) -> Context:
        return ctx

    @dag.task(after=first, may_drop=True, priority=1)
    async def drop(ctx: Context) -> Context | None:
        runs["drop"] += 1
        return None if ctx else ctx

    @dag.task(after=first)
    async def beside(ctx: Context) -> Context:
        runs["beside"] += 1
        await asyncio.sleep(1)
        return ctx

    @dag.task(after=beside)
    async def behind(ctx: Context) -> Context:
        runs["behind"] += 1
        return ctx

    result = await execute(dag, numbered(3), workers, tasks)
    assert_counts(result, dropped=3)
    assert runs["drop"] == 3
    assert runs["behind"] == 0


# --- 7: one slow branch holds back the successors of a fast one


@every_number
@virtual
async def test_defect_7_a_slow_branch_does_not_hold_back_a_fast_one(workers: int) -> None:
    dag, times = DAG(), {}

    def step(name: str, seconds: float, after: Any = ()) -> None:
        async def run(ctx: Context) -> Context:
            await asyncio.sleep(seconds)
            times[name] = now()
            return ctx

        dag.task(run, name=name, after=after)

    step("first", 0)
    step("slow", 100, "first")
    step("fast", 1, "first")
    step("fast 2", 1, "fast")
    step("fast 3", 1, "fast 2")
    step("end", 0, ["slow", "fast 3"])
    await execute(dag, None, workers, tasks=2)
    assert times == {"first": 0, "fast": 1, "fast 2": 2, "fast 3": 3, "slow": 100, "end": 100}


# --- 8: a shallow copy shares its dict with its siblings


@every_number
@virtual
async def test_defect_8_copies_do_not_share_their_data(workers: int) -> None:
    dag = DAG()

    @dag.task
    async def divide(ctx: Context) -> list[Context]:
        return [ctx.create(copy_data=True) for _ in range(4)]

    @dag.task(after=divide)
    async def mark(ctx: Context) -> Context:
        ctx["marks"] = ctx.get("marks", 0) + 1
        await asyncio.sleep(1)
        return ctx

    context = Context(data={"n": 1})
    result = await execute(dag, context, workers)
    assert [dict(output) for output in result] == [{"n": 1, "marks": 1}] * 4
    assert dict(context) == {"n": 1}


# --- 9: concurrent calls of a service task overwrite one another's future


@virtual
async def test_defect_9_each_of_many_concurrent_calls_gets_its_own_answer() -> None:
    dag = DAG()

    @dag.service
    async def answer(queue: asyncio.Queue[Any]) -> None:
        while True:
            calls = [await queue.get() for _ in range(50)]  # all in flight at once
            for ctx, future in reversed(calls):
                ctx["answer"] = ctx["n"] * 10
                future.set_result(ctx)

    result = await execute(dag, numbered(100), 1)
    assert_counts(result, output=100)
    assert all(output["answer"] == output["n"] * 10 for output in result)


# --- 10: stream and loop state lives in the DAG, so a DAG runs once


@every_number
@virtual
async def test_defect_10_a_dag_with_streams_and_loops_runs_again_and_twice_at_once(workers: int) -> None:
    dag = DAG()

    @dag.loop
    async def twice(ctx: Context) -> AsyncIterator[Context]:
        for _ in range(2):
            yield ctx.create(copy_data=True)

    @dag.stream(after=twice)
    async def number(ctx: Context) -> AsyncIterator[Context]:
        seen = 0
        while True:
            seen += 1
            ctx["seen"] = seen
            ctx = yield ctx

    async def run() -> list[int]:
        result = await execute_beside(dag, workers)
        return sorted(output["seen"] for output in result)

    assert await run() == [1, 2, 3, 4, 5, 6]
    assert await run() == [1, 2, 3, 4, 5, 6]
    assert await asyncio.gather(run(), run()) == [[1, 2, 3, 4, 5, 6]] * 2


async def execute_beside(dag: DAG, workers: int) -> list[OutputContext]:
    """Runs three inputs; other runs may be under way."""
    return await make(dag, workers).run(numbered(3))


# --- 11: the queue is unbounded; a cancelled run leaves its workers behind


@every_number
@virtual
async def test_defect_11_input_waits_outside_while_the_run_has_no_room(workers: int) -> None:
    dag, pulled, outside, most = DAG(), Counter[str](), Counter[str](), Counter[str]()

    @dag.task
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(1)
        outside["done"] += 1
        return ctx

    def inputs() -> Iterator[dict[str, int]]:
        for n in range(1000):
            pulled["all"] += 1
            most["alive"] = max(most["alive"], pulled["all"] - outside["done"])
            yield {"n": n}

    assert_counts(await execute(dag, inputs(), workers, max_live_contexts=8), output=1000)
    assert most["alive"] <= 8 + 1  # the one that is being pulled


@every_number
@virtual
async def test_defect_11_a_cancelled_run_leaves_nobody_behind(workers: int) -> None:
    dag = DAG()
    passing(dag, "a")

    @dag.task(after="a")
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(1000)
        return ctx

    executor = make(dag, workers, 0)
    run = asyncio.create_task(executor.run(numbered(100)))
    await asyncio.sleep(5)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    await asyncio.sleep(0)
    assert_clean()
    assert now() == 5
    stats = executor.stats()
    assert (stats["living"], stats["cancelled"]) == (0, stats["entered"])
    assert stats["entered"] >= min(workers, 100)


# --- 12: a serving executor's run() never ends and has no way to be stopped


@virtual
async def test_defect_12_serving_ends_when_told_to() -> None:
    dag = DAG()

    @dag.task
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(2)
        return ctx

    serving = ServeExecutor(dag)
    async with serving:
        ticket = await serving.submit({"n": 1})
        await asyncio.sleep(0.5)
        manifest = await serving.drain()
        assert now() == 2, "what was accepted was finished, and nothing else waited for"
        with pytest.raises(NotAcceptingError):
            await serving.submit({"n": 2})
        assert (await ticket.result())["n"] == 1
    assert not manifest["cancelled"]
    assert now() == 2
    assert_clean()


@virtual
async def test_defect_12_serving_ends_though_a_task_never_does() -> None:
    dag = DAG()

    @dag.task
    async def work(ctx: Context) -> Context:
        await asyncio.Event().wait()
        return ctx

    async with ServeExecutor(dag) as serving:
        await serving.submit({"n": 1}, id="never")
        manifest = await serving.drain(grace=7)
    assert now() == 7
    assert "never" in str(manifest["cancelled"])
    assert_clean()
