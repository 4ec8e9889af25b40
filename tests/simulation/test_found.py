"""What the simulation found in the engine, each as a small program: these fail on the engine as it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from obsdag import DAG, ConcurrencyLimit, Context, RateLimitContext, RunResult
from tests.rules.virtual import execute, now, passing, virtual


def ended(result: RunResult) -> dict[str, int]:
    return {name: number for name, number in result.counts.items() if number and name != "entered"}


async def two_children(ctx: Context) -> list[Context]:
    return ctx.create_child(2)  # type: ignore[no-any-return]


@virtual
async def test_C5_what_is_below_the_lending_task_beside_the_way_back_is_done_by_the_parent() -> None:
    dag = DAG()
    dag.task(two_children, name="lend")
    seen: list[str] = []

    @dag.task(after="lend")
    async def back(ctx: Context) -> Context:
        await asyncio.sleep(1)
        return ctx.parent or ctx

    @dag.task(after="lend")
    async def beside(ctx: Context) -> Context:
        seen.append("parent" if ctx.parent is None else "child")
        return ctx

    passing(dag, "end", after=[back, beside])
    result = await execute(dag, [{}], workers=3, tasks=2)
    assert ended(result) == {"output": 1, "merged": 2}
    assert seen.count("parent") == 1


@virtual
async def test_C5_a_router_beside_a_lent_branch_does_not_start_what_is_lent() -> None:
    dag = DAG()
    dag.task(two_children, name="lend")
    seen: list[bool] = []

    @dag.router
    async def route(ctx: Context) -> str:
        return "taken"

    passing(dag, "other", after=route)
    passing(dag, "taken", after=route)

    @dag.task(after=["lend", "other"])
    async def below(ctx: Context) -> Context:
        seen.append(ctx.parent is None)
        return ctx

    await execute(dag, [{}], workers=3, tasks=2)
    assert seen == [False, False]


@virtual
async def test_T3_a_join_at_the_end_that_returns_nothing_drops_its_parent() -> None:
    dag = DAG()

    @dag.map
    async def parts(ctx: Context) -> AsyncIterator[Any]:
        yield {}
        yield {}

    @dag.join(after=parts, may_drop=True)
    async def join(parent: Context, children: list[Context]) -> Context | None:
        return parent if len(children) > 2 else None

    assert ended(await execute(dag, [{}])) == {"dropped": 1, "merged": 2}


@virtual
async def test_C10_a_join_that_is_not_run_because_a_limit_was_met_keeps_its_children() -> None:
    dag = DAG()
    calls: list[int] = []

    @dag.map
    async def parts(ctx: Context) -> AsyncIterator[Any]:
        yield {}
        yield {}

    @dag.join(after=parts)
    async def join(parent: Context, children: list[Context]) -> Context:
        calls.append(len(children))
        return RateLimitContext(parent, 5.0) if len(calls) == 1 else parent

    assert ended(await execute(dag, [{}])) == {"output": 1, "merged": 2}
    assert calls == [2, 2]


@virtual
async def test_E8_a_child_at_a_join_whose_branch_was_handed_back_is_stalled_and_the_run_ends() -> None:
    dag = DAG()
    dag.task(two_children, name="lend")

    @dag.task(after="lend")
    async def first(ctx: Context) -> Context:
        assert ctx.parent is not None
        if ctx.parent.children[0] is ctx:
            await asyncio.sleep(5)
            return ctx.parent
        return ctx

    @dag.join(after=first)
    async def join(parent: Context, children: list[Context]) -> Context:
        return parent

    result = await execute(dag, [{}], workers=3)
    assert ended(result) == {"output": 1, "merged": 1, "stalled": 1}
    assert [stall.task for stall in result.stalled] == ["join"]


@virtual
async def test_E11_a_context_that_is_discarded_beside_a_running_branch_lets_go_of_its_parent() -> None:
    dag = DAG()
    dag.task(two_children, name="lend")

    @dag.task(after="lend", may_drop=True)
    async def drop(ctx: Context) -> Context | None:
        await asyncio.sleep(1)
        return None if ctx.parent else ctx

    @dag.task(after="lend")
    async def long(ctx: Context) -> Context:
        await asyncio.sleep(9)
        return ctx

    result = await execute(dag, [{}], workers=2, tasks=2, enable_context_gc=False)
    assert ended(result) == {"dropped": 3}


@virtual
async def test_T15_without_gc_a_join_is_not_given_the_dropped_children() -> None:
    dag = DAG()
    calls: list[tuple[int, int]] = []

    @dag.map
    async def parts(ctx: Context) -> AsyncIterator[Any]:
        yield {"n": 0}
        yield {"n": 1}

    @dag.task(after=parts, may_drop=True)
    async def some(ctx: Context) -> Context | None:
        return ctx if ctx["n"] else None

    @dag.join(after=some)
    async def join(parent: Context, children: Any) -> Context:
        calls.append((len(children), len(children.dropped)))
        return parent

    assert ended(await execute(dag, [{}], enable_context_gc=False)) == {"output": 1, "merged": 1, "dropped": 1}
    assert calls == [(1, 1)]


@virtual
async def test_E12_without_bypass_a_new_context_follows_its_own_routers_not_those_of_its_maker() -> None:
    dag = DAG()
    seen: list[str] = []

    @dag.router
    async def route(ctx: Context) -> str:
        return "second" if "new" in ctx else "first"

    async def note(ctx: Context) -> Context:
        seen.append(ctx["name"])
        return ctx

    dag.task(note, name="first", after=route)
    dag.task(note, name="second", after=route)

    @dag.task
    async def make(ctx: Context) -> Context:
        await asyncio.sleep(1)
        if "new" in ctx:
            return ctx
        new = ctx.create()
        new.update(new=True, name="new")
        return new

    await execute(dag, [{"name": "old"}], tasks=2, enable_context_bypass=False)
    assert seen == ["old", "new"]


@virtual
async def test_T8_a_permit_that_waits_for_a_context_comes_back_when_another_completes_the_task_for_it() -> None:
    dag = DAG()
    contexts = [Context(data={"n": n}) for n in range(3)]
    started: list[tuple[int, float]] = []

    @dag.task(limiter=ConcurrencyLimit(1))
    async def limited(ctx: Context) -> list[Context]:
        started.append((ctx["n"], now()))
        await asyncio.sleep(1)
        return contexts[:2] if ctx["n"] == 0 else [ctx]

    @dag.task(after=limited)
    async def long(ctx: Context) -> Context:
        await asyncio.sleep(20)
        return ctx

    assert ended(await execute(dag, contexts, workers=3)) == {"output": 3}
    assert started == [(0, 0.0), (2, 1.0)]


@virtual
async def test_E8_a_frozen_context_keeps_no_permit_from_others() -> None:
    dag = DAG()
    held: list[Context] = []

    @dag.task(limiter=ConcurrencyLimit(1))
    async def limited(ctx: Context) -> Context:
        held.append(ctx)
        await asyncio.sleep(1)
        return ctx

    def freeze() -> None:
        contexts[1].freeze()

    contexts = [Context(data={"n": n}) for n in range(3)]
    asyncio.get_running_loop().call_later(0.5, freeze)
    result = await execute(dag, contexts, workers=3)
    assert ended(result) == {"output": 2, "stalled": 1}


@virtual
async def test_C12_who_returns_only_what_has_ended_returns_nothing() -> None:
    dag = DAG()
    contexts = [Context(data={"n": n}) for n in range(2)]

    @dag.task(may_drop=True)
    async def swap(ctx: Context) -> Context | None:
        await asyncio.sleep(ctx["n"])
        return None if ctx["n"] == 0 else contexts[0]

    assert ended(await execute(dag, contexts, workers=2)) == {"dropped": 2}


@virtual
async def test_C9_a_context_that_the_end_of_its_parent_cancels_was_not_discarded_before() -> None:
    dag = DAG()
    dag.task(two_children, name="lend")

    @dag.task(after="lend", may_drop=True)
    async def drop(ctx: Context) -> Context | None:
        return None if ctx.parent else ctx

    @dag.task
    async def fails(ctx: Context) -> Context:
        await asyncio.sleep(5)
        raise ValueError("late")

    for gc in (True, False):
        result = await execute(dag, [{}], workers=2, tasks=2, enable_context_gc=gc)
        assert ended(result) == {"dropped": 2, "failed": 1}


@virtual
async def test_T15_a_join_waits_for_a_second_map_above_it_that_begins_late() -> None:
    dag = DAG()
    calls: list[int] = []

    @dag.map
    async def early(ctx: Context) -> AsyncIterator[Any]:
        yield {}

    @dag.map(retry_times=1, retry_interval=10.0)
    async def late(ctx: Context) -> AsyncIterator[Any]:
        if ctx.attempt == 1:
            raise ValueError("not yet")
        yield {}
        yield {}

    passing(dag, "work", after=[early, late])

    @dag.join(after="work")
    async def join(parent: Context, children: list[Context]) -> Context:
        calls.append(len(children))
        return parent

    assert ended(await execute(dag, [{}], workers=2, tasks=2)) == {"output": 1, "merged": 3}
    assert calls == [3]


@virtual
async def test_E8_children_that_wait_at_a_join_of_a_frozen_parent_end_with_it() -> None:
    dag = DAG()

    @dag.map
    async def parts(ctx: Context) -> AsyncIterator[Any]:
        yield {}
        yield {}

    @dag.task
    async def beside(ctx: Context) -> Context:
        await asyncio.sleep(1)
        ctx.freeze()
        return ctx

    passing(dag, "last", after=beside)

    @dag.join(after=[parts, "last"])
    async def join(parent: Context, children: list[Context]) -> Context:
        return parent

    assert ended(await execute(dag, [{}], workers=2, tasks=2)) == {"stalled": 3}


@virtual
async def test_C8_what_an_ended_child_of_a_map_left_behind_is_cancelled_with_the_root() -> None:
    dag = DAG()
    ran: list[str] = []

    @dag.map
    async def parts(ctx: Context) -> AsyncIterator[Any]:
        yield {}

    @dag.task(after=parts)
    async def more(ctx: Context) -> list[Context]:
        return [ctx, ctx.create_child()]

    @dag.task(after=more)
    async def slow(ctx: Context) -> Context:
        if ctx.depth == 2:
            await asyncio.sleep(9)
            ran.append("slow")
        return ctx

    @dag.task
    async def fails(ctx: Context) -> Context:
        await asyncio.sleep(5)
        raise ValueError("late")

    assert ended(await execute(dag, [{}], workers=3, tasks=2)) == {"output": 1, "failed": 1, "cancelled": 1}
    assert not ran


@virtual
async def test_E5_an_idle_worker_asks_a_map_for_items_while_another_branch_of_its_context_runs() -> None:
    dag = DAG()
    asked: list[float] = []

    @dag.map
    async def parts(ctx: Context) -> AsyncIterator[Any]:
        for _ in range(3):
            asked.append(now())
            yield {}

    @dag.task
    async def slow(ctx: Context) -> Context:
        await asyncio.sleep(10)
        return ctx

    @dag.join(after=[parts, slow])
    async def join(parent: Context, children: list[Context]) -> Context:
        return parent

    await execute(dag, [{}], workers=2, tasks=2)
    assert asked == [0.0, 0.0, 0.0]


@virtual
async def test_E11_a_discarded_context_that_is_kept_readable_is_frozen_no_more() -> None:
    dag = DAG()

    @dag.task
    async def lend(ctx: Context) -> list[Context]:
        return ctx.create_child(1)  # type: ignore[no-any-return]

    @dag.loop(after=lend)
    async def nothing(ctx: Context) -> AsyncIterator[Any]:
        ctx.freeze()
        for item in ():
            yield item

    passing(dag, "join", after=nothing)
    result = await execute(dag, [{}], enable_context_gc=False)
    assert ended(result) == {"dropped": 2}
    assert now() == 0  # not after the wait for frozen contexts
