"""Children made by hand, without map and join (C3, C5, C6, C8): the last one returns the parent."""

from __future__ import annotations

import pytest

from obsdag import DAG, Context
from tests.rules.helpers import Engine, assert_counts, every_worker_num


def family(dag: DAG, number: int) -> None:
    """`spread` makes children by hand; `work` ends some early; `meet` returns the parent when the last one is there."""

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        children: list[Context] = ctx.create_child(number)
        ctx["left"] = number
        ctx["sum"] = 0
        for n, child in enumerate(children):
            child["n"] = n
        return children

    @dag.task(after=spread)
    def work(ctx: Context) -> Context:  # in threads: the parent's lock is what keeps the sum right
        ctx["n"] *= 10
        return ctx

    @dag.task(after=work, may_drop=True)
    def meet(ctx: Context) -> Context | None:
        parent = ctx.parent
        assert parent is not None
        with parent.lock:
            parent["sum"] += ctx["n"]
            parent["left"] -= 1
            last = not parent["left"]
        if last:
            return parent
        ctx.destroy()
        return None


@every_worker_num
@pytest.mark.parametrize("number", [1, 2, 50])
async def test_C5_the_last_child_returns_the_parent(engine: Engine, number: int) -> None:
    dag = DAG()
    family(dag, number)

    @dag.task(after="meet")
    async def after(ctx: Context) -> Context:
        assert ctx.parent is None
        return ctx

    result = await engine.run(dag, [{}, {}])
    assert [out["sum"] for out in result] == 2 * [10 * sum(range(number))]
    assert_counts(result, output=2, merged=2, dropped=2 * (number - 1))


@every_worker_num
async def test_C6_children_that_go_on_make_the_parent_split(engine: Engine) -> None:
    dag = DAG()

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        children: list[Context] = ctx.create_child(3, ["a", "b", "c"])
        return children[:2]  # one that is never returned never enters

    result = await engine.run(dag)
    assert sorted(out.id for out in result) == ["a", "b"]
    assert_counts(result, output=2, split=1)


@every_worker_num
async def test_C6_a_parent_whose_children_all_failed_has_failed(engine: Engine) -> None:
    dag = DAG()

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        children: list[Context] = ctx.create_child(3)
        return children

    @dag.task(after=spread)
    async def work(ctx: Context) -> Context:
        raise OSError("no luck")

    result = await engine.run(dag)
    assert_counts(result, failed=4)
    (parent,) = [failure for failure in result.failures if failure.context.parent is None]
    assert parent.task == "spread"
    assert isinstance(parent.exception.__cause__, OSError)


@every_worker_num
async def test_C8_destroying_the_parent_cancels_children_made_by_hand(engine: Engine) -> None:
    dag = DAG()

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        children: list[Context] = ctx.create_child(4)
        return children

    @dag.task(after=spread, parallel_num=1)
    async def work(ctx: Context) -> Context:
        assert ctx.parent is not None
        ctx.parent.destroy()
        ctx.parent.destroy()
        return ctx

    result = await engine.run(dag)
    assert result.counts["output"] == 0
    assert_counts(result, dropped=1, cancelled=4)
