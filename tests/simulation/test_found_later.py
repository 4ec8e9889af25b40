"""What longer simulations found in the engine: small programs, and the seeds of the rest, played against the model."""

from __future__ import annotations

import asyncio
import threading

import pytest

from obsdag import DAG, Context
from tests.rules.virtual import execute, passing, virtual
from tests.simulation.scenarios import make_scenario, mix, play
from tests.simulation.test_found import ended

SEEDS = {
    132963: "T15: a branch whose children went elsewhere is over: an empty one that meets it at a join may fire it",
    141592: "C5: a join that waits for a permit is called all the same when another branch is handed back at it",
    143194: "T15: a child that another task completed the join for is not of the branch any more",
    204858: "T3: a join that returned another context ends its own as split, also when the sink waits for nothing else",
    277699: "C5: a task that waits for a permit is not ready when the permit comes and it was lent meanwhile",
    308620: "C5: a branch is not handed back at a task that its parent, which has ended, had skipped",
    464638: "C5: a map that ends after its branch was handed back fires no join",
    467950: "T14: a map that broke before its first child gives back what it had lent",
    2004955: "E6: of a map that broke, and the sink below it, the failure comes first",
    2022794: "T15: of two joins that are ready on a child it waits at the first",
    2052058: "E8: a frozen context is not given up while an abandoned function is to be tried again",
    257271: "E11: a discarded context lends nothing",
    400982: "T15: a join waits for a loop that yields its own context",
    3207681: "C4: what was completed for a context is not skipped when a router leaves it out",
    20014754: "E11: a discarded context whose join was called is not given out, though the sink waits for nothing else",
    30055360: "T15: a join that became ready by what was kept, and was completed by the same return, is not waited at",
    30057345: "C5: who lends a branch waits no more at the join that is below it",
    30072167: "T15: when a child leaves a branch, the other branches that meet at its join may have waited for that",
    30557082: "T2: who lends all that was ready on it has no place in the queue any more",
    13: "C9: in the queue while an item of its loop came, it is counted as queued and not as running",
    230: "C9: while all that runs of it waits for a thread, it is counted there",
    598: "T3: who thaws a kept context drops it in the name of the task that kept it",
    6899: "E4: a context has not waited in the queue as long as a loop of it had run",
    30066533: "E8: what a return thaws is settled with the rest of it, not in the middle",
    40410271: "C9: a pull that was frozen while it waited for room waits for none any more when it is thawed",
    40716777: "T7: who ends in the transition that gives permits back is not told of one first",
    138646: "C10: a join that was completed by a handing back is not called when its delay has passed",
}


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_seeds_that_failed(seed: int) -> None:
    play(make_scenario(seed), mix(seed, 0)).finish(20_000)


@virtual
async def test_C6_a_retry_that_waits_for_an_abandoned_function_holds_nothing_once_its_context_has_ended() -> None:
    dag = DAG()
    release = threading.Event()

    @dag.task
    async def lend(ctx: Context) -> Context:
        return ctx.create_child()

    @dag.task(after=lend, timeout=1, retry_times=1)
    def hangs(ctx: Context) -> Context:
        release.wait()
        return ctx

    @dag.task(after=lend)
    async def fails(ctx: Context) -> Context:
        await asyncio.sleep(2)
        asyncio.get_running_loop().call_later(1, release.set)
        raise ValueError("late")

    assert ended(await execute(dag, [{}], tasks=2)) == {"failed": 2}


@virtual
async def test_T3_whoever_returns_a_kept_context_completes_every_task_that_it_was_kept_at() -> None:
    dag = DAG()
    kept: list[Context] = []

    @dag.task
    async def first(ctx: Context) -> list[Context]:
        if ctx["n"]:
            await asyncio.sleep(4)
            return [ctx, kept[0]]
        kept.append(ctx)
        await asyncio.sleep(1)
        ctx.freeze()
        await asyncio.sleep(1)
        return []

    @dag.task
    async def second(ctx: Context) -> list[Context]:
        await asyncio.sleep(2)
        return [ctx] if ctx["n"] else []

    passing(dag, "end", after=[first, second])
    assert ended(await execute(dag, [{"n": 0}, {"n": 1}], workers=2, tasks=2)) == {"output": 2}


@virtual
async def test_T3_a_child_that_hands_back_a_kept_parent_completes_the_task_that_it_was_kept_at() -> None:
    dag = DAG()

    @dag.task
    async def lend(ctx: Context) -> Context:
        return ctx.create_child()

    @dag.task
    async def keep(ctx: Context) -> list[Context]:
        ctx.freeze()
        await asyncio.sleep(1)
        return []

    @dag.task(after=lend)
    async def back(ctx: Context) -> Context | None:
        await asyncio.sleep(2)
        return ctx.parent

    passing(dag, "end", after=[back, keep])
    assert ended(await execute(dag, [{}], workers=2, tasks=2)) == {"output": 1, "merged": 1}


@virtual
async def test_E4_a_queued_context_that_was_frozen_and_thawed_goes_first() -> None:
    dag = DAG()
    order: list[str] = []
    made: list[Context] = []

    @dag.task
    async def make(ctx: Context) -> list[Context]:
        made.extend(ctx.create(name=name) for name in "abc")
        return made

    @dag.task(after=make)
    async def take(ctx: Context) -> Context:
        order.append(ctx.name)
        if ctx.name == "a":
            made[2].freeze()
            await asyncio.sleep(1)
            made[2].thaw()
            await asyncio.sleep(1)
        return ctx

    await execute(dag, [{}])
    assert order == ["a", "c", "b"]


@virtual
async def test_C10_nothing_starts_on_a_context_that_the_router_sent_to_the_sink() -> None:
    dag = DAG()
    late: list[Context] = []
    seen: list[bool] = []

    @dag.router
    async def route(ctx: Context) -> str:
        if ctx["late"]:
            late.append(ctx)
            await asyncio.sleep(2)
        return "left"

    @dag.task(after=route)
    async def left(ctx: Context) -> Context:
        seen.append(ctx["late"])
        return ctx

    passing(dag, "right", after=route)

    @dag.task(after=left)
    async def last(ctx: Context) -> list[Context]:
        await asyncio.sleep(1)
        return [ctx, *late]

    assert ended(await execute(dag, [{"late": True}, {"late": False}], workers=2)) == {"output": 2}
    assert seen == [False]


@virtual
async def test_T3_who_destroyed_another_context_is_stopped_with_its_own() -> None:
    dag = DAG()
    others: list[Context] = []
    ran: list[str] = []

    @dag.task
    async def slow(ctx: Context) -> Context:
        if ctx["n"]:
            others[0].destroy()
        else:
            others.append(ctx)
        await asyncio.sleep(5)
        ran.append("slow")
        return ctx

    @dag.task(may_drop=True)
    async def drops(ctx: Context) -> Context | None:
        await asyncio.sleep(2)
        return None if ctx["n"] < 2 else ctx

    passing(dag, "end", after=[slow, drops])
    assert ended(await execute(dag, [{"n": 0}, {"n": 1}], workers=2, tasks=2)) == {"dropped": 2}
    assert not ran
