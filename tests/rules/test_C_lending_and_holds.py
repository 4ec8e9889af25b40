"""C5 and C6: branches lent to children, hand-backs, and what holds a context."""

from __future__ import annotations

import asyncio

import pytest

from obsdag import DAG, ConcurrencyLimit, Context, RateLimitContext
from tests.rules.helpers import ONE, Engine, Log, assert_counts, chain, every_schedule, settle

# --- C5


def lending(dag: DAG, number: int = 3, name: str = "spread", after: object = ()) -> None:
    """A task that returns `number` children instead of its context."""

    @dag.task(name=name, after=after)
    async def spread(ctx: Context) -> list[Context]:
        children = ctx.create_child(number)
        for n, child in enumerate(children):
            child["n"] = n
        return children


def handing_back(dag: DAG, log: Log, name: str = "merge", after: object = (), who: set[int] | None = None) -> None:
    """A task, run on children, that returns the parent (of those in `who`), else the child."""

    @dag.task(name=name, after=after)
    async def merge(ctx: Context) -> Context:
        log.append((name, ctx))
        if who is None or ctx["n"] in who:
            assert ctx.parent is not None
            return ctx.parent
        return ctx


@every_schedule
async def test_C5_what_is_below_a_lent_branch_runs_on_the_children_only(engine: Engine) -> None:
    dag, log = DAG(), Log()
    lending(dag)
    chain(dag, log, "a", "b", after="spread")
    result = await engine.run(dag)

    assert sorted(log.names()) == ["a"] * 3 + ["b"] * 3
    assert {ctx.depth for _, ctx in log} == {1}
    assert sorted(out["n"] for out in result) == [0, 1, 2]
    parent = result[0].parent
    assert parent is not None
    assert parent.outcome == "split"
    assert "spread" in parent.completed_tasks
    assert not {"a", "b"} & set(parent.completed_tasks)
    assert_counts(result, split=1, output=3)


@every_schedule
async def test_C5_other_branches_go_on(engine: Engine) -> None:
    dag, log = DAG(), Log()
    lending(dag)
    chain(dag, log, "a", after="spread")
    chain(dag, log, "o1", "o2", "o3")
    result = await engine.run(dag)

    roots = [name for name, ctx in log if ctx.parent is None]
    assert roots == ["o1", "o2", "o3"]
    assert sorted(name for name, ctx in log if ctx.parent) == ["a"] * 3
    assert_counts(result, split=1, output=3)


@every_schedule
async def test_C5_other_branches_go_on_while_the_children_are_at_work(engine: Engine) -> None:
    dag, log = DAG(), Log()
    gate = asyncio.Event()

    @dag.task(priority=1)
    async def spread(ctx: Context) -> Context:
        return ctx.create_child(name="kid")

    @dag.task(after=spread)
    async def a(ctx: Context) -> Context:
        if engine.workers > 1:
            await gate.wait()
        return ctx

    chain(dag, log, "o1", "o2")

    @dag.task(after="o2")
    async def release(ctx: Context) -> Context:
        gate.set()
        return ctx

    result = await engine.run(dag)
    assert log.names() == ["o1", "o2"]
    assert_counts(result, split=1, output=1)


@every_schedule
async def test_C5_a_hand_back_completes_the_tasks_between_for_the_parent(engine: Engine) -> None:
    dag, log = DAG(), Log()
    lending(dag, 1)
    chain(dag, log, "a", "b", after="spread")
    handing_back(dag, log, after="b")
    chain(dag, log, "end", after="merge")
    result = await engine.run(dag)

    (out,) = result
    assert out.parent is None
    assert log.names(out.context) == ["end"]
    assert log.names(out.children[0]) == ["a", "b", "merge"]
    assert list(out.completed_tasks) == ["spread", "a", "b", "merge", "end"]
    assert out.children[0].outcome == "merged"
    assert_counts(result, merged=1, output=1)


@every_schedule
@pytest.mark.parametrize("number", [1, 2, 5])
async def test_C5_every_child_may_hand_back(engine: Engine, number: int) -> None:
    dag, log = DAG(), Log()
    lending(dag, number)
    chain(dag, log, "a", after="spread")
    handing_back(dag, log, after="a")
    chain(dag, log, "end", "end2", after="merge")
    result = await engine.run(dag, [{}, {}])

    assert sorted(log.names()) == sorted(["a", "merge"] * number * 2 + ["end", "end2"] * 2)
    assert [out.parent for out in result] == [None, None]
    assert_counts(result, merged=2 * number, output=2)


@every_schedule
@pytest.mark.parametrize("who", [{0}, {2}, {0, 1}])
async def test_C5_some_children_hand_back_others_go_on(engine: Engine, who: set[int]) -> None:
    dag, log = DAG(), Log()
    lending(dag)
    handing_back(dag, log, after="spread", who=who)
    chain(dag, log, "end", after="merge")
    result = await engine.run(dag)

    assert sorted(log.names()) == sorted(["merge"] * 3 + ["end"] * (3 - len(who) + 1))
    assert sorted(out.get("n", "root") for out in result if out.parent) == sorted({0, 1, 2} - who)
    assert [out.outcome for out in result] == ["output"] * len(result)
    assert_counts(result, merged=len(who), output=4 - len(who))


@every_schedule
async def test_C5_after_a_hand_back_the_parent_waits_for_its_other_branches(engine: Engine) -> None:
    dag, log = DAG(), Log()
    lending(dag, 2)
    chain(dag, log, "a", after="spread")
    handing_back(dag, log, after="a")
    chain(dag, log, "o1", "o2")
    chain(dag, log, "end", after=["merge", "o2"])
    result = await engine.run(dag)

    # One hand-back completes the branch; the second child may come later still.
    assert log.names().count("end") == 1
    assert {"merge", "o2"} <= set(log.names()[: log.names().index("end")])
    assert_counts(result, merged=2, output=1)


@every_schedule
async def test_C5_a_branch_may_be_lent_again_below_a_hand_back(engine: Engine) -> None:
    dag, log = DAG(), Log()
    lending(dag, 2)
    handing_back(dag, log, after="spread")
    lending(dag, 3, name="again", after="merge")
    handing_back(dag, log, name="merge2", after="again")
    chain(dag, log, "end", after="merge2")
    result = await engine.run(dag)

    assert sorted(log.names()) == ["end", *["merge"] * 2, *["merge2"] * 3]
    assert_counts(result, merged=5, output=1)


@every_schedule
async def test_C5_nested_lends_are_handed_back_level_by_level(engine: Engine) -> None:
    dag, log = DAG(), Log()
    lending(dag, 2)
    lending(dag, 2, name="inner", after="spread")
    lending(dag, 2, name="innermost", after="inner")
    chain(dag, log, "leaf", after="innermost")
    handing_back(dag, log, name="back3", after="leaf")
    handing_back(dag, log, name="back2", after="back3")
    handing_back(dag, log, name="back1", after="back2")
    chain(dag, log, "end", after="back1")
    result = await engine.run(dag)

    assert log.names().count("end") == 1
    assert {ctx.depth for name, ctx in log if name == "back2"} == {2}
    assert_counts(result, merged=2 + 4 + 8, output=1)


@every_schedule
async def test_C5_two_branches_of_one_context_lent_and_handed_back(engine: Engine) -> None:
    dag, log = DAG(), Log()
    for side in "lr":
        lending(dag, 2, name=f"spread_{side}")
        chain(dag, log, f"work_{side}", after=f"spread_{side}")
        handing_back(dag, log, name=f"merge_{side}", after=f"work_{side}")
    chain(dag, log, "end", after=["merge_l", "merge_r"])
    result = await engine.run(dag)

    assert sorted(log.names()) == sorted(["work_l", "work_r", "merge_l", "merge_r"] * 2 + ["end"])
    at = log.names().index("end")
    assert {"merge_l", "merge_r"} <= set(log.names()[:at])
    assert log[at][1].parent is None
    assert_counts(result, merged=4, output=1)


@every_schedule
async def test_C5_of_two_lent_branches_only_one_is_handed_back(engine: Engine) -> None:
    dag, log = DAG(), Log()
    for side in "lr":
        lending(dag, 2, name=f"spread_{side}")
        chain(dag, log, f"work_{side}", after=f"spread_{side}")
    handing_back(dag, log, name="merge_l", after="work_l")
    chain(dag, log, "end_l", after="merge_l")
    chain(dag, log, "end_r", after="work_r")
    result = await engine.run(dag)

    # The right branch was not handed back, and its children reached the sink: the root is split.
    assert log.names().count("end_l") == 1
    assert log.names().count("end_r") == 2
    assert_counts(result, split=1, merged=2, output=2)


@every_schedule
async def test_C5_children_of_a_lent_branch_start_below_the_task_that_made_them(engine: Engine) -> None:
    dag, log = DAG(), Log()
    chain(dag, log, "before")
    lending(dag, 2, after="before")
    chain(dag, log, "side")
    chain(dag, log, "end", after=["spread", "side"])
    result = await engine.run(dag)

    assert sorted(log.names()) == ["before", "end", "end", "side"]
    assert_counts(result, split=1, output=2)


@every_schedule
async def test_C5_a_context_returned_with_its_children_keeps_its_branch(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    async def both(ctx: Context) -> list[Context]:
        return [ctx, *ctx.create_child(2)]

    chain(dag, log, "end", after=both)
    result = await engine.run(dag)

    assert sorted(ctx.depth for _, ctx in log) == [0, 1, 1]
    assert_counts(result, output=3)


@every_schedule
async def test_C5_a_child_may_return_an_ended_parent(engine: Engine) -> None:
    dag, log = DAG(), Log()
    lending(dag, 3)

    @dag.task(after="spread")
    async def end_it(ctx: Context) -> Context:
        assert ctx.parent is not None
        ctx.parent.destroy()
        return ctx.parent

    chain(dag, log, "end", after=end_it)
    result = await engine.run(dag)

    # C8: the root is dropped by the first child, and its descendants are cancelled; C12: it is ignored when returned.
    assert log.names() == []
    assert_counts(result, dropped=1, cancelled=3) if engine.workers == 1 else None
    assert (result.counts["output"], result.counts["entered"], result.counts["failed"]) == (0, 4, 0)


@every_schedule
async def test_C5_a_hand_back_after_a_siblings_made_the_parent_an_output_is_ignored(engine: Engine) -> None:
    dag, log = DAG(), Log()
    done = asyncio.Event()

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        return [ctx.create_child(name=name) for name in ("quick", "slow")]

    @dag.task(after=spread)
    async def merge(ctx: Context) -> Context | None:
        if ctx.id == "slow" and engine.workers > 1:
            await done.wait()
            await settle()
        return ctx.parent

    @dag.task(after=merge)
    async def end(ctx: Context) -> Context:
        log.append(("end", ctx))
        done.set()
        return ctx

    result = await engine.run(dag)
    assert len(log) == 1
    assert len(result) == 1
    assert_counts(result, output=1, merged=2)


@every_schedule
async def test_C5_a_grandchild_hands_back_what_its_parent_was_lent(engine: Engine) -> None:
    dag, log = DAG(), Log()
    lending(dag, 1)
    lending(dag, 1, name="inner", after="spread")

    @dag.task(after="inner")
    async def back(ctx: Context) -> Context | None:
        return ctx.parent

    @dag.task(after=back)
    async def top(ctx: Context) -> Context | None:
        assert ctx.depth == 1
        return ctx.parent

    chain(dag, log, "end", after=top)
    result = await engine.run(dag)
    assert [ctx.depth for _, ctx in log] == [0]
    assert_counts(result, merged=2, output=1)


# --- C6


@every_schedule
async def test_C6_a_living_child_holds_its_parent(engine: Engine) -> None:
    dag = DAG()
    lending(dag, 2)
    living: list[bool] = []

    @dag.task(after="spread")
    async def look(ctx: Context) -> Context:
        await settle()
        living.append(ctx.parent is not None and ctx.parent.outcome is None)
        return ctx

    result = await engine.run(dag)
    assert living == [True, True]
    assert_counts(result, split=1, output=2)


@every_schedule
async def test_C6_an_execution_of_a_descendant_holds_all_its_ancestors(engine: Engine) -> None:
    dag = DAG()
    lending(dag, 1)
    lending(dag, 1, name="inner", after="spread")
    living: list[list[str | None]] = []

    @dag.task(after="inner")
    async def look(ctx: Context) -> Context:
        await settle()
        living.append([ctx.parent.outcome, ctx.root.outcome] if ctx.parent else [])
        return ctx

    result = await engine.run(dag)
    assert living == [[None, None]]
    assert_counts(result, split=2, output=1)


@every_schedule
async def test_C6_a_timer_a_limit_and_a_freeze_hold_a_context(engine: Engine) -> None:
    dag, log = DAG(), Log()
    loop = asyncio.get_running_loop()

    @dag.task(retry_times=1, retry_interval=0.01)
    async def timer(ctx: Context) -> Context:
        if ctx.attempt == 1:
            raise ValueError
        return ctx

    @dag.task(after=timer, limiter=ConcurrencyLimit(1))
    async def limit(ctx: Context) -> Context:
        await settle(3)
        return ctx

    @dag.task(after=limit)
    async def freeze(ctx: Context) -> Context:
        ctx.freeze()
        loop.call_later(0.01, ctx.thaw)
        return ctx

    @dag.task(after=freeze)
    async def wait(ctx: Context) -> Context | RateLimitContext:
        if ctx.setdefault("waited", 0) < 2:
            ctx["waited"] += 1
            return RateLimitContext(ctx, 0.01)
        return ctx

    chain(dag, log, "end", after=wait)
    result = await engine.run(dag, [{} for _ in range(4)])
    assert_counts(result, output=4)
    assert len(log) == 4


@every_schedule
async def test_C6_returned_contexts_enter_before_the_others_lose_their_hold(engine: Engine) -> None:
    dag = DAG()
    seen: list[tuple[str | None, int]] = []

    @dag.task
    async def replace(ctx: Context) -> Context:
        other = ctx.create(name="other")
        other["old"] = ctx
        return other

    @dag.task(after=replace)
    async def look(ctx: Context) -> Context:
        seen.append((ctx["old"].outcome, len(ctx["old"].children)))
        return ctx

    result = await engine.run(dag)
    assert seen == [("split", 0)]
    assert_counts(result, split=1, output=1)


FATES = {
    "output": lambda ctx: ctx,
    "dropped": lambda ctx: None,
    "split": lambda ctx: ctx.create(name="made"),
}


@every_schedule
@pytest.mark.parametrize(
    ("fates", "expected", "others"),
    [
        (["output", "failed"], "split", {"output": 1, "failed": 1}),
        (["output", "dropped"], "split", {"output": 1, "dropped": 1}),
        (["output", "output"], "split", {"output": 2}),
        (["failed", "dropped"], "failed", {"failed": 1, "dropped": 1}),
        (["dropped", "failed"], "failed", {"failed": 1, "dropped": 1}),
        (["failed"], "failed", {"failed": 1}),
        (["failed", "failed"], "failed", {"failed": 2}),
        (["dropped", "dropped"], "dropped", {"dropped": 2}),
        (["dropped"], "dropped", {"dropped": 1}),
        (["split", "failed"], "split", {"split": 1, "output": 1, "failed": 1}),
        (["split"], "split", {"split": 1, "output": 1}),
        (["failed", "failed", "output"], "split", {"output": 1, "failed": 2}),
        (["destroyed"], "dropped", {"dropped": 1}),
        (["destroyed", "failed"], "failed", {"dropped": 1, "failed": 1}),
        (["destroyed", "output"], "split", {"dropped": 1, "output": 1}),
    ],
)
async def test_C6_a_parent_whose_branch_was_not_handed_back_ends_as_its_children(
    engine: Engine, fates: list[str], expected: str, others: dict[str, int]
) -> None:
    dag = DAG()
    parents: list[Context] = []

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        parents.append(ctx)
        children = ctx.create_child(len(fates))
        for child, fate in zip(children, fates, strict=True):
            child["fate"] = fate
        return children

    @dag.task(after=spread, may_drop=True)
    async def meet(ctx: Context) -> Context | None:
        if ctx["fate"] == "failed":
            raise ValueError("fate")
        if ctx["fate"] == "destroyed":
            ctx.destroy()
            return None
        return FATES[ctx["fate"]](ctx)

    result = await engine.run(dag)
    assert parents[0].outcome == expected
    assert_counts(result, **{**others, expected: others.get(expected, 0) + 1})


@every_schedule
async def test_C6_a_grandchild_that_reached_the_sink_makes_its_ancestors_split(engine: Engine) -> None:
    dag = DAG()
    lending(dag, 2)
    lending(dag, 2, name="inner", after="spread")

    @dag.task(after="inner", may_drop=True)
    async def one_only(ctx: Context) -> Context | None:
        assert ctx.parent is not None
        return ctx if (ctx["n"], ctx.parent["n"]) == (1, 1) else None

    result = await engine.run(dag)
    # root: split by its second child, which is split by its second; the first child: dropped with both of its own.
    assert_counts(result, output=1, split=2, dropped=4)


@every_schedule
async def test_C6_a_failed_grandchild_fails_its_ancestors(engine: Engine) -> None:
    dag = DAG()
    lending(dag, 2)
    lending(dag, 2, name="inner", after="spread")

    @dag.task(after="inner", may_drop=True)
    async def bad(ctx: Context) -> Context | None:
        assert ctx.parent is not None
        if (ctx["n"], ctx.parent["n"]) == (1, 1):
            raise ValueError("one")
        return None if ctx.depth == 2 else ctx

    result = await engine.run(dag)
    assert_counts(result, failed=3, dropped=4)
    # C6, E6: each that failed is in the failures or at least the one whose task raised.
    assert any(failure.context.depth == 2 for failure in result.failures)


async def test_C6_a_frozen_context_that_nobody_thaws_is_stalled() -> None:
    dag = DAG()

    @dag.task
    async def freeze(ctx: Context) -> Context:
        ctx.freeze()
        return ctx

    dag.task(Log().step("end"), after=freeze, name="end")
    result = await ONE.run(dag, context_queue_timeout=0.01, worker_idle_times=2)

    assert_counts(result, stalled=1)
    assert [(stall.task) for stall in result.stalled] == ["end"]


@every_schedule
async def test_C6_a_context_that_nothing_holds_and_that_is_not_done_is_stalled(engine: Engine) -> None:
    dag, log = DAG(), Log()
    chain(dag, log, "other")

    @dag.task
    async def make(ctx: Context) -> list[Context]:
        return [ctx, ctx.create(name="new")]

    chain(dag, log, "end", after=[make, "other"])
    # E12, C6: without bypass the new context has to go through `other` itself, and does.
    result = await engine.run(dag, enable_context_bypass=False)
    assert sorted(log.names()) == ["end", "end", "other", "other"]
    assert_counts(result, output=2)
