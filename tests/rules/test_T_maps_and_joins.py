"""T14 and T15: maps, joins, and how they nest."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from obsdag import DAG, ConcurrencyLimit, Context, OutputContext, RateLimitContext, TaskError
from tests.rules.helpers import HANG_S, Engine, Log, assert_counts, chain, every_schedule, finish, settle

MAPS = ["asyncgen", "generator", "function", "coroutine"]


def mapping(dag: DAG, count: int | None = 3, kind: str = "asyncgen", name: str = "spread", **settings: Any) -> None:
    """A map into `count` children (None: as many as `ctx["count"]` says), each with its number as n."""

    def items(ctx: Context) -> Iterator[dict[str, Any]]:
        for n in range(ctx["count"] if count is None else count):
            yield {"n": n}

    async def asyncgen(ctx: Context) -> AsyncIterator[dict[str, Any]]:
        for item in items(ctx):
            await asyncio.sleep(0)
            yield item

    def generator(ctx: Context) -> Iterator[dict[str, Any]]:
        yield from items(ctx)

    def function(ctx: Context) -> list[dict[str, Any]]:
        return list(items(ctx))

    async def coroutine(ctx: Context) -> list[dict[str, Any]]:
        return list(items(ctx))

    functions: dict[str, Any] = {f.__name__: f for f in (asyncgen, generator, function, coroutine)}
    dag.task(functions[kind], kind="map", name=name, **settings)


def joining(dag: DAG, calls: list[Any], after: Any, name: str = "join", **settings: Any) -> None:
    """A join that notes parent and children, and sums up the children's n."""

    @dag.join(name=name, after=after, **settings)
    async def join(ctx: Context, children: list[Context]) -> Context:
        calls.append((ctx, list(children), [child.outcome for child in children]))
        ctx["sum"] = sum(child.get("n", child.get("sum", 0)) for child in children)
        return ctx


def where(calls: list[Any]) -> list[list[int]]:
    """The numbers of the children of each call."""
    return [[child["n"] for child in children] for _, children, _ in calls]


# --- the map


@every_schedule
@pytest.mark.parametrize("kind", MAPS)
async def test_T15_a_map_makes_children_of_its_context(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()
    mapping(dag, 3, kind)
    chain(dag, log, "leaf", after="spread")
    ctx = Context()
    result = await engine.run(dag, ctx)
    assert sorted(out["n"] for out in result) == [0, 1, 2]
    assert {each.parent for _, each in log} == {ctx}
    assert ctx.outcome == "split"
    assert_counts(result, split=1, output=3)


@every_schedule
@pytest.mark.parametrize("kind", MAPS)
async def test_T15_an_empty_map_without_a_join_drops_its_context(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()
    mapping(dag, 0, kind)
    chain(dag, log, "leaf", after="spread")
    chain(dag, log, "beside")
    result = await engine.run(dag, [{}, {}])
    assert "leaf" not in log.names()
    assert_counts(result, dropped=2)


@every_schedule
@pytest.mark.parametrize("kind", MAPS)
async def test_T15_an_empty_map_calls_the_join_with_nothing(engine: Engine, kind: str) -> None:
    dag, log, calls = DAG(), Log(), []
    mapping(dag, 0, kind)
    chain(dag, log, "leaf", after="spread")
    joining(dag, calls, "leaf")
    chain(dag, log, "end", after="join")
    result = await engine.run(dag, [{}, {}])
    assert where(calls) == [[], []]
    assert log.names() == ["end", "end"]
    assert_counts(result, output=2)


@every_schedule
async def test_T14_a_map_is_pulled_and_holds_neither_worker_nor_permit(engine: Engine) -> None:
    dag, calls = DAG(), []
    limit = ConcurrencyLimit(1)
    yielded: list[int] = []
    ended: list[int] = []
    ahead: list[int] = []

    @dag.map(limiter=limit, parallel_num=1)
    async def spread(ctx: Context) -> AsyncIterator[dict[str, int]]:
        for n in range(20):
            yielded.append(n)
            yield {"n": n}

    @dag.task(after=spread, limiter=limit)
    async def leaf(ctx: Context) -> Context:
        ahead.append(len(yielded) - len(ended))
        await settle(2)
        ended.append(1)
        return ctx

    result = await engine.run(dag, max_live_contexts=4)
    assert max(ahead) <= 4
    assert calls == []
    assert_counts(result, split=1, output=20)


@every_schedule
@pytest.mark.parametrize("kind", ["asyncgen", "generator"])
async def test_T14_a_map_is_not_retried_after_its_first_child(engine: Engine, kind: str) -> None:
    dag, log, attempts = DAG(), Log(), []

    def items(ctx: Context) -> Iterator[dict[str, int]]:
        attempts.append(ctx.attempt)
        yield {"n": 0}
        yield {"n": 1}
        raise ValueError("third")

    async def items_async(ctx: Context) -> AsyncIterator[dict[str, int]]:
        for item in items(ctx):
            yield item

    dag.task(items_async if kind == "asyncgen" else items, kind="map", name="spread", retry_times=3)
    chain(dag, log, "leaf", after="spread")
    result = await engine.run(dag)
    assert attempts == [1]
    assert result.counts["failed"] == 1
    # C8: its children are ended with it, unless they had reached the sink.
    assert result.counts["output"] + result.counts["cancelled"] == 2
    assert str(result.failures[0].exception) == "third"


@every_schedule
@pytest.mark.parametrize("kind", MAPS)
async def test_T14_a_map_that_raises_before_its_first_child_is_retried(engine: Engine, kind: str) -> None:
    dag, attempts = DAG(), []

    def items(ctx: Context) -> Iterator[dict[str, int]]:
        attempts.append(ctx.attempt)
        if ctx.attempt < 3:
            raise ValueError
        yield {"n": 0}

    async def asyncgen(ctx: Context) -> AsyncIterator[dict[str, int]]:
        for item in items(ctx):
            yield item

    def function(ctx: Context) -> list[dict[str, int]]:
        return list(items(ctx))

    async def coroutine(ctx: Context) -> list[dict[str, int]]:
        return list(items(ctx))

    functions: dict[str, Any] = {
        "asyncgen": asyncgen,
        "generator": items,
        "function": function,
        "coroutine": coroutine,
    }
    dag.task(functions[kind], kind="map", name="spread", retry_times=2)
    chain(dag, Log(), "leaf", after="spread")
    result = await engine.run(dag)
    assert attempts == [1, 2, 3]
    assert_counts(result, split=1, output=1)


@every_schedule
@pytest.mark.parametrize("kind", ["asyncgen", "generator", "function", "coroutine"])
@pytest.mark.parametrize("wrong", [5, "text", [5], None, object], ids=repr)
async def test_T15_a_map_that_gives_rubbish_fails_its_context(engine: Engine, kind: str, wrong: Any) -> None:
    dag, log = DAG(), Log()
    items = [{"n": 0}, wrong, {"n": 2}]

    async def asyncgen(ctx: Context) -> AsyncIterator[Any]:
        for item in items:
            yield item

    def generator(ctx: Context) -> Iterator[Any]:
        yield from items

    def function(ctx: Context) -> list[Any]:
        return items

    async def coroutine(ctx: Context) -> list[Any]:
        return items

    functions: dict[str, Any] = {f.__name__: f for f in (asyncgen, generator, function, coroutine)}
    dag.task(functions[kind], kind="map", name="spread")
    chain(dag, log, "leaf", after="spread")
    result = await engine.run(dag)
    if wrong is None and not result.counts["failed"]:
        assert_counts(result, split=1, output=2)  # "none this time", as in a loop
        return
    assert result.counts["failed"] == 1
    assert isinstance(result.failures[0].exception, TaskError)
    assert "spread" in str(result.failures[0].exception)
    assert result.counts["output"] + result.counts["cancelled"] == 1


@every_schedule
@pytest.mark.parametrize("wrong", [5, "text", None, {"n": 1}, object], ids=repr)
async def test_T15_a_map_function_that_returns_no_iterable_fails_its_context(engine: Engine, wrong: Any) -> None:
    dag, calls = DAG(), []

    @dag.map
    async def spread(ctx: Context) -> Any:
        return wrong

    joining(dag, calls, spread)
    result = await engine.run(dag)
    assert isinstance(result.failures[0].exception, TaskError)
    assert calls == []
    assert_counts(result, failed=1)


@every_schedule
async def test_T15_a_map_may_give_contexts_that_it_made(engine: Engine) -> None:
    dag, calls = DAG(), []

    @dag.map
    async def spread(ctx: Context) -> AsyncIterator[Any]:
        yield ctx.create_child(name="child")
        other = ctx.create(name="other")
        yield other
        yield {"n": 5}

    joining(dag, calls, spread)
    ctx = Context()
    result = await engine.run(dag, ctx)
    ((parent, children, _),) = calls
    assert parent is ctx
    assert [child.id for child in children[:2]] == ["child", "other"]
    assert {child.parent for child in children} == {ctx}
    assert_counts(result, output=1, merged=3)


@every_schedule
@pytest.mark.parametrize("what", ["itself", "living", "ended"])
async def test_T15_a_map_that_gives_what_is_no_new_context(engine: Engine, what: str) -> None:
    dag, calls = DAG(), []
    others: list[Context] = []

    @dag.map
    async def spread(ctx: Context) -> AsyncIterator[Any]:
        ended = ctx.create(name="ended")
        ended.destroy()
        others.append(ctx)
        yield {"n": 0}
        yield {"itself": ctx, "living": others[0], "ended": ended}[what]
        yield {"n": 2}

    joining(dag, calls, spread)
    chain(dag, Log(), "end", after="join")
    result = await engine.run(dag, [{}, {}])
    # Not said; whatever becomes of it, nothing hangs and every context has one outcome.
    assert result.counts["entered"] >= 2
    assert result.counts["stalled"] == 0


@every_schedule
async def test_T15_a_mapped_context_may_be_destroyed_while_the_map_runs(engine: Engine) -> None:
    dag, closed, calls = DAG(), [], []
    parents: list[Context] = []
    log = Log()

    @dag.map
    async def endless(ctx: Context) -> AsyncIterator[dict[str, int]]:
        parents.append(ctx)
        try:
            while True:
                yield {"n": 1}
        finally:
            closed.append(1)

    @dag.task(after=endless)
    async def leaf(ctx: Context) -> Context:
        log.append(("leaf", ctx))
        if len(log) == 5:
            parents[0].destroy()
        return ctx

    joining(dag, calls, leaf)
    result = await engine.run(dag)
    assert closed == [1]
    assert calls == []
    assert_counts(result, dropped=1, cancelled=result.counts["entered"] - 1)


# --- the join


@every_schedule
@pytest.mark.parametrize("kind", MAPS)
async def test_T15_a_join_gets_parent_and_children_in_order_of_creation(engine: Engine, kind: str) -> None:
    dag, calls = DAG(), []
    mapping(dag, None, kind)

    @dag.task(after="spread")
    async def leaf(ctx: Context) -> Context:
        await settle(7 * (5 - ctx["n"]))  # the later come in earlier
        return ctx

    joining(dag, calls, leaf)
    chain(dag, Log(), "end", after="join")
    inputs = [Context(data={"count": n}) for n in (5, 1, 3, 0)]
    result = await engine.run(dag, inputs)
    assert {parent["count"]: [child["n"] for child in children] for parent, children, _ in calls} == {
        n: list(range(n)) for n in (5, 1, 3, 0)
    }
    assert sorted(out["sum"] for out in result) == [0, 0, 3, 10]
    assert {out.context for out in result} == set(inputs)
    assert_counts(result, output=4, merged=9)


@every_schedule
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_T15_children_are_merged_when_the_join_succeeded_and_not_before(engine: Engine, kind: str) -> None:
    dag = DAG()
    seen: list[list[str | None]] = []
    kept: list[Context] = []

    def join(ctx: Context, children: list[Context]) -> Context:
        kept[:] = children
        seen.append([child.outcome for child in children])
        return ctx

    async def join_async(ctx: Context, children: list[Context]) -> Context:
        return join(ctx, children)

    mapping(dag, 3)
    chain(dag, Log(), "leaf", after="spread")
    dag.task(join_async if kind == "async" else join, kind="join", name="join", after="leaf")

    @dag.task(after="join")
    async def look(ctx: Context) -> Context:
        seen.append([child.outcome for child in kept])
        return ctx

    result = await engine.run(dag)
    assert seen == [[None] * 3, ["merged"] * 3]
    assert_counts(result, output=1, merged=3)


@every_schedule
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_T15_a_join_that_raises_is_retried_with_the_same_children(engine: Engine, kind: str) -> None:
    dag, calls = DAG(), []
    mapping(dag, 3)
    chain(dag, Log(), "leaf", after="spread")

    def join(ctx: Context, children: list[Context]) -> Context:
        calls.append([child["n"] for child in children])
        assert [child.outcome for child in children] == [None] * 3
        if ctx.attempt < 3:
            raise ValueError("again")
        return ctx

    async def join_async(ctx: Context, children: list[Context]) -> Context:
        return join(ctx, children)

    func = join_async if kind == "async" else join
    dag.task(func, kind="join", name="join", after="leaf", retry_times=2, retry_interval=0.001)
    chain(dag, Log(), "end", after="join")
    result = await engine.run(dag)
    assert calls == [[0, 1, 2]] * 3
    assert_counts(result, output=1, merged=3)


@every_schedule
async def test_T15_a_join_that_fails_for_good_fails_the_parent_and_its_children_are_not_merged(engine: Engine) -> None:
    dag = DAG()
    mapping(dag, 3)
    chain(dag, Log(), "leaf", after="spread")

    @dag.join(after="leaf", retry_times=1)
    async def join(ctx: Context, children: list[Context]) -> Context:
        raise ValueError("for good")

    result = await engine.run(dag)
    assert_counts(result, failed=1, cancelled=3)
    assert [(failure.task, failure.attempts) for failure in result.failures] == [("join", 2)]


@every_schedule
async def test_T15_a_join_whose_map_is_still_running_is_not_called(engine: Engine) -> None:
    dag, calls = DAG(), []
    arrived: list[int] = []

    @dag.map
    async def spread(ctx: Context) -> AsyncIterator[dict[str, int]]:
        for n in range(3):
            yield {"n": n}
            await settle(20)
            assert calls == []

    @dag.task(after=spread)
    async def leaf(ctx: Context) -> Context:
        arrived.append(1)
        return ctx

    joining(dag, calls, leaf)
    result = await engine.run(dag)
    assert where(calls) == [[0, 1, 2]]
    assert_counts(result, output=1, merged=3)


@every_schedule
async def test_T15_a_join_waits_for_every_living_child(engine: Engine) -> None:
    dag, calls = DAG(), []
    mapping(dag, 3)

    @dag.task(after="spread")
    async def leaf(ctx: Context) -> Context | RateLimitContext:
        if ctx["n"] == 1 and not ctx.setdefault("waited", 0):
            ctx["waited"] = 1
            return RateLimitContext(ctx, 0.01)
        return ctx

    joining(dag, calls, leaf)
    result = await engine.run(dag)
    assert where(calls) == [[0, 1, 2]]
    assert_counts(result, output=1, merged=3)


@every_schedule
async def test_T15_a_join_waits_for_the_parents_other_branches_that_it_is_after(engine: Engine) -> None:
    dag, log, calls = DAG(), Log(), []
    mapping(dag, 2)
    chain(dag, log, "leaf", after="spread")
    gate: list[int] = []

    @dag.task
    async def other(ctx: Context) -> Context:
        await settle(50)
        assert calls == []
        gate.append(1)
        return ctx

    joining(dag, calls, ["leaf", "other"])
    chain(dag, log, "end", after="join")
    result = await engine.run(dag)
    assert gate == [1]
    assert where(calls) == [[0, 1]]
    assert log.names().count("end") == 1
    assert_counts(result, output=1, merged=2)


@every_schedule
async def test_T15_other_branches_of_the_parent_that_the_join_is_not_after_go_on(engine: Engine) -> None:
    dag, log, calls = DAG(), Log(), []
    mapping(dag, 2)
    chain(dag, log, "leaf", after="spread")
    joining(dag, calls, "leaf")
    chain(dag, log, "o1", "o2")
    chain(dag, log, "end", after=["join", "o2"])
    result = await engine.run(dag)
    assert Counter(log.names()) == {"leaf": 2, "o1": 1, "o2": 1, "end": 1}
    assert_counts(result, output=1, merged=2)


@every_schedule
@pytest.mark.parametrize("failing", [[0], [1], [0, 1, 2]], ids=str)
async def test_T15_on_child_failure_fail_fails_the_parent(engine: Engine, failing: list[int]) -> None:
    dag, calls = DAG(), []
    mapping(dag, 3)

    @dag.task(after="spread")
    async def leaf(ctx: Context) -> Context:
        if ctx["n"] in failing:
            raise ValueError(ctx["n"])
        return ctx

    joining(dag, calls, leaf)
    ctx = Context()
    result = await engine.run(dag, ctx)
    assert calls == []
    assert ctx.outcome == "failed"
    assert ctx.error_info.has_error
    failed = result.counts["failed"]
    assert 2 <= failed <= 1 + len(failing)
    # C8: children that had arrived, or were still at work, are cancelled with their parent.
    assert_counts(result, failed=failed, cancelled=result.counts["entered"] - failed)


@every_schedule
@pytest.mark.parametrize("failing", [[0], [1], [2], [0, 2], [0, 1, 2]], ids=str)
async def test_T15_on_child_failure_skip_calls_the_join_with_the_others(engine: Engine, failing: list[int]) -> None:
    dag, reported = DAG(), []
    mapping(dag, 3)

    @dag.task(after="spread")
    async def leaf(ctx: Context) -> Context:
        if ctx["n"] in failing:
            raise ValueError(ctx["n"])
        return ctx

    @dag.join(after=leaf, on_child_failure="skip")
    async def join(ctx: Context, children: Any) -> Context:
        ctx["got"] = [child["n"] for child in children]
        reported.extend(child["n"] for child in children.failed)
        return ctx

    result = await engine.run(dag)
    assert [out["got"] for out in result] == [[n for n in range(3) if n not in failing]]
    assert sorted(reported) == failing
    assert_counts(result, output=1, failed=len(failing), merged=3 - len(failing))


@every_schedule
@pytest.mark.parametrize("dropping", [[0], [1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("mode", ["fail", "skip"])
async def test_T15_dropped_children_are_reported_to_the_join(engine: Engine, dropping: list[int], mode: Any) -> None:
    dag, reported = DAG(), []
    mapping(dag, 3)

    @dag.task(after="spread", may_drop=True)
    async def leaf(ctx: Context) -> Context | None:
        return None if ctx["n"] in dropping else ctx

    @dag.join(after=leaf, on_child_failure=mode)
    async def join(ctx: Context, children: Any) -> Context:
        ctx["got"] = [child["n"] for child in children]
        reported.extend(child["n"] for child in children.dropped)
        return ctx

    result = await engine.run(dag)
    assert [out["got"] for out in result] == [[n for n in range(3) if n not in dropping]]
    assert sorted(reported) == dropping
    assert_counts(result, output=1, dropped=len(dropping), merged=3 - len(dropping))


@every_schedule
async def test_T15_a_child_that_is_replaced_does_not_arrive(engine: Engine) -> None:
    dag, calls, log = DAG(), [], Log()
    mapping(dag, 3)

    @dag.task(after="spread")
    async def leaf(ctx: Context) -> Context:
        return ctx.create(name="stranger") if ctx["n"] == 1 else ctx

    joining(dag, calls, leaf)
    chain(dag, log, "end", after="join")
    result = await engine.run(dag)
    # The stranger is a root of its own without children: the join is called for it with none.
    assert sorted(where(calls)) == [[], [0, 2]]
    assert_counts(result, output=2, merged=2, split=1)


@every_schedule
async def test_T15_a_child_that_ends_as_output_early(engine: Engine) -> None:
    dag, calls = DAG(), []
    mapping(dag, 3)

    @dag.task(after="spread")
    async def leaf(ctx: Context) -> Context:
        return OutputContext(ctx) if ctx["n"] == 1 else ctx

    joining(dag, calls, leaf)
    result = await engine.run(dag)
    assert where(calls) == [[0, 2]]
    assert_counts(result, output=2, merged=2)


@every_schedule
@pytest.mark.parametrize("how", ["none", "other", "children", "rubbish", "both", "raise"])
async def test_T15_what_a_join_returns_goes_on(engine: Engine, how: str) -> None:
    dag, log = DAG(), Log()
    mapping(dag, 2)
    chain(dag, log, "leaf", after="spread")

    def fail() -> None:
        raise ValueError

    ways: dict[str, Any] = {
        "none": lambda ctx: None,
        "other": lambda ctx: ctx.create(),
        "children": lambda ctx: ctx.create_child(2),
        "rubbish": lambda ctx: 5,
        "both": lambda ctx: [ctx, ctx.create()],
        "raise": lambda ctx: fail(),
    }

    @dag.join(after="leaf", may_drop=True)
    async def join(ctx: Context, children: list[Context]) -> Any:
        return ways[how](ctx)

    chain(dag, log, "end", after=join)
    result = await engine.run(dag)
    expected: dict[str, dict[str, int]] = {
        "other": {"split": 1, "output": 1, "merged": 2},
        "children": {"split": 1, "output": 2, "merged": 2},
        "rubbish": {"failed": 1, "cancelled": 2},
        "both": {"output": 2, "merged": 2},
        "raise": {"failed": 1, "cancelled": 2},
    }
    if how == "none":
        # The join succeeded, and dropped its parent: its children were merged into it before.
        assert_counts(result, dropped=1, merged=2)
    else:
        assert_counts(result, **expected[how])


@every_schedule
async def test_T15_a_join_may_return_its_children(engine: Engine) -> None:
    dag, log = DAG(), Log()
    mapping(dag, 2)
    chain(dag, log, "leaf", after="spread")

    @dag.join(after="leaf")
    async def join(ctx: Context, children: list[Context]) -> list[Context]:
        return [ctx, *children]

    chain(dag, log, "end", after=join)
    result = await engine.run(dag)
    assert result.counts["stalled"] == 0
    assert result.counts["entered"] == 3
    assert log.names().count("end") >= 1


@every_schedule
async def test_T15_a_join_below_a_plain_fan_out(engine: Engine) -> None:
    dag, calls = DAG(), []

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        children = ctx.create_child(3)
        for n, child in enumerate(children):
            child["n"] = n
        return children

    chain(dag, Log(), "leaf", after=spread)
    joining(dag, calls, "leaf")
    result = await engine.run(dag)
    assert where(calls) == [[0, 1, 2]]
    assert_counts(result, output=1, merged=3)


@every_schedule
async def test_T15_pass_through_of_a_join(engine: Engine) -> None:
    dag, seen = DAG(), []
    mapping(dag, 2)

    @dag.join(after="spread", pass_through=True)
    async def join(ctx: Context, children: list[Context]) -> None:
        seen.append(len(children))

    result = await engine.run(dag)
    assert seen == [2]
    assert_counts(result, output=1, merged=2)


@every_schedule
async def test_T15_a_join_right_below_its_map(engine: Engine) -> None:
    dag, calls = DAG(), []
    mapping(dag, 4)
    joining(dag, calls, "spread")
    result = await engine.run(dag, [{} for _ in range(3)])
    assert where(calls) == [[0, 1, 2, 3]] * 3
    assert_counts(result, output=3, merged=12)


@every_schedule
async def test_T15_a_map_after_a_join(engine: Engine) -> None:
    dag, calls = DAG(), []
    mapping(dag, 2)
    joining(dag, calls, "spread", "join1")
    mapping(dag, 3, name="spread2", after="join1")
    joining(dag, calls, "spread2", "join2")
    mapping(dag, 1, name="spread3", after="join2")
    joining(dag, calls, "spread3", "join3")
    result = await engine.run(dag, [{}, {}])
    assert sorted(map(len, where(calls))) == [1, 1, 2, 2, 3, 3]
    assert_counts(result, output=2, merged=12)


@every_schedule
async def test_T15_two_joins_in_a_row_need_two_maps(engine: Engine) -> None:
    dag, calls = DAG(), []
    mapping(dag, 2)
    mapping(dag, 2, name="inner", after="spread")
    chain(dag, Log(), "leaf", after="inner")
    joining(dag, calls, "leaf", "join_inner")
    joining(dag, calls, "join_inner", "join_outer")
    result = await engine.run(dag)
    assert [out["sum"] for out in result] == [1 + 0]  # each child's own n counts in the outer join: 0 + 1
    assert len(calls) == 3
    assert_counts(result, output=1, merged=6)


@every_schedule
@pytest.mark.parametrize("sizes", [(2, 3, 2), (1, 1, 1), (0, 1, 1), (2, 0, 1), (2, 2, 0), (3, 1, 4)], ids=str)
async def test_T15_three_levels_of_maps_and_joins(engine: Engine, sizes: tuple[int, int, int]) -> None:
    dag, calls, log = DAG(), [], Log()
    a, b, c = sizes
    mapping(dag, a, "asyncgen", "m1")
    mapping(dag, b, "generator", "m2", after="m1")
    mapping(dag, c, "function", "m3", after="m2")
    chain(dag, log, "leaf", after="m3")
    joining(dag, calls, "leaf", "j3")
    joining(dag, calls, "j3", "j2")
    joining(dag, calls, "j2", "j1")
    chain(dag, log, "end", after="j1")
    result = await engine.run(dag, [{}, {}])
    assert Counter(log.names()) == Counter({"leaf": 2 * a * b * c, "end": 2})
    assert len(calls) == 2 * (1 + a + a * b)
    assert_counts(result, output=2, merged=2 * (a + a * b + a * b * c))


@every_schedule
async def test_T15_an_inner_map_without_items_for_some(engine: Engine) -> None:
    dag, calls = DAG(), []
    mapping(dag, 4)

    @dag.map(after="spread")
    async def inner(ctx: Context) -> AsyncIterator[dict[str, int]]:
        for n in range(ctx["n"] % 2):
            yield {"n": n}

    chain(dag, Log(), "leaf", after=inner)
    joining(dag, calls, "leaf", "join_inner")
    joining(dag, calls, "join_inner", "join_outer")
    result = await engine.run(dag)
    assert len(calls) == 5
    assert_counts(result, output=1, merged=6)


@every_schedule
async def test_T15_a_failure_three_levels_down(engine: Engine) -> None:
    for mode in ("fail", "skip"):
        dag, calls, modes = DAG(), [], {"on_child_failure": mode}
        mapping(dag, 2, name="m1")
        mapping(dag, 2, name="m2", after="m1")

        @dag.task(after="m2")
        async def leaf(ctx: Context) -> Context:
            assert ctx.parent is not None
            if (ctx["n"], ctx.parent["n"]) == (1, 1):
                raise ValueError("one of four")
            return ctx

        joining(dag, calls, "leaf", "j2", **modes)
        joining(dag, calls, "j2", "j1", **modes)
        result = await engine.run(dag)
        if mode == "skip":
            assert_counts(result, output=1, failed=1, merged=5)
        else:
            # leaf, its parent and the root fail; of the others some may have been merged before.
            assert result.counts["failed"] == 3
            assert result.counts["merged"] + result.counts["cancelled"] == result.counts["entered"] - 3
            assert result.counts["output"] == 0


@every_schedule
async def test_T15_skip_outside_and_fail_inside(engine: Engine) -> None:
    dag, calls = DAG(), []
    mapping(dag, 3, name="m1")
    mapping(dag, 2, name="m2", after="m1")

    @dag.task(after="m2")
    async def leaf(ctx: Context) -> Context:
        assert ctx.parent is not None
        if ctx.parent["n"] == 1 and ctx["n"] == 0:
            raise ValueError
        return ctx

    joining(dag, calls, "leaf", "j2", on_child_failure="fail")
    joining(dag, calls, "j2", "j1", on_child_failure="skip")
    result = await engine.run(dag)
    ((_, children, _),) = [call for call in calls if call[0].parent is None]
    assert [child["n"] for child in children] == [0, 2]
    assert result.counts["output"] == 1
    assert result.counts["failed"] == 2
    assert result.counts["cancelled"] <= 1
    assert_counts(result, output=1, failed=2, cancelled=result.counts["cancelled"], merged=2 + 4)


@every_schedule
async def test_T15_two_maps_in_parallel_branches_each_with_its_join(engine: Engine) -> None:
    dag, calls, log = DAG(), [], Log()
    mapping(dag, 2, name="left")
    mapping(dag, 3, name="right", kind="generator")
    chain(dag, log, "l1", after="left")
    chain(dag, log, "r1", "r2", after="right")
    joining(dag, calls, "l1", "join_l")
    joining(dag, calls, "r2", "join_r")
    chain(dag, log, "end", after=["join_l", "join_r"])
    result = await engine.run(dag, [{}, {}])
    assert Counter(log.names()) == {"l1": 4, "r1": 6, "r2": 6, "end": 2}
    assert sorted(map(len, where(calls))) == [2, 2, 3, 3]
    assert_counts(result, output=2, merged=10)


@every_schedule
@pytest.mark.parametrize("sizes", [(0, 2), (2, 0), (0, 0)], ids=str)
async def test_T15_two_parallel_maps_one_of_them_empty(engine: Engine, sizes: tuple[int, int]) -> None:
    dag, calls, log = DAG(), [], Log()
    mapping(dag, sizes[0], name="left")
    mapping(dag, sizes[1], name="right")
    joining(dag, calls, "left", "join_l")
    joining(dag, calls, "right", "join_r")
    chain(dag, log, "end", after=["join_l", "join_r"])
    result = await engine.run(dag, [{}])
    assert len(calls) == 2
    assert_counts(result, output=1, merged=sum(sizes))


@every_schedule
async def test_T15_two_parallel_maps_one_without_a_join(engine: Engine) -> None:
    dag, calls, log = DAG(), [], Log()
    mapping(dag, 2, name="left")
    mapping(dag, 3, name="right")
    joining(dag, calls, "left", "join_l")
    chain(dag, log, "end_l", after="join_l")
    chain(dag, log, "end_r", after="right")
    result = await engine.run(dag)
    # The right branch is lent and never handed back; its children reach the sink.
    assert Counter(log.names()) == {"end_l": 1, "end_r": 3}
    assert_counts(result, split=1, merged=2, output=3)


@every_schedule
async def test_T15_one_join_below_two_parallel_maps_ends_somehow(engine: Engine) -> None:
    dag, calls, log = DAG(), [], Log()
    mapping(dag, 2, name="left")
    mapping(dag, 3, name="right")
    chain(dag, log, "l", after="left")
    chain(dag, log, "r", after="right")
    joining(dag, calls, ["l", "r"])
    result = await engine.run(dag, context_queue_timeout=0.001)
    # The contract leaves it open whose children it gets; the run ends, and every context has one outcome.
    assert result.counts["entered"] == 6


@every_schedule
async def test_T15_routers_inside_a_mapped_branch(engine: Engine) -> None:
    dag, calls, log = DAG(), [], Log()
    mapping(dag, 4)

    @dag.router(after="spread")
    async def route(ctx: Context) -> str:
        return "even" if ctx["n"] % 2 == 0 else "odd"

    chain(dag, log, "even", after=route)
    chain(dag, log, "odd", after=route)
    joining(dag, calls, ["even", "odd"])
    chain(dag, log, "end", after="join")
    result = await engine.run(dag)
    assert Counter(log.names()) == {"even": 2, "odd": 2, "end": 1}
    assert where(calls) == [[0, 1, 2, 3]]
    assert_counts(result, output=1, merged=4)


@every_schedule
async def test_T15_a_router_above_a_map_that_is_not_taken(engine: Engine) -> None:
    dag, calls, log = DAG(), [], Log()

    @dag.router
    async def route(ctx: Context) -> str:
        return ctx["way"]

    mapping(dag, 2, after=route)
    chain(dag, log, "leaf", after="spread")
    joining(dag, calls, "leaf")
    chain(dag, log, "plain", after=route)
    chain(dag, log, "end", after=["join", "plain"])
    result = await engine.run(dag, [{"way": "spread"}, {"way": "plain"}])
    assert Counter(log.names()) == {"leaf": 2, "plain": 1, "end": 2}
    assert len(calls) == 1
    assert_counts(result, output=2, merged=2)


@every_schedule
async def test_T15_a_join_that_some_children_are_routed_around(engine: Engine) -> None:
    dag, calls, log = DAG(), [], Log()
    mapping(dag, 4)

    @dag.router(after="spread")
    async def route(ctx: Context) -> str:
        return "in_join" if ctx["n"] < 2 else "past"

    chain(dag, log, "in_join", after=route)
    chain(dag, log, "past", after=route)
    joining(dag, calls, "in_join")
    chain(dag, log, "end", after=["join", "past"])
    result = await engine.run(dag)
    # Those past the join reach the sink on their own; the join has the others.
    assert where(calls) == [[0, 1]]
    assert result.counts["stalled"] == 0
    assert result.counts["merged"] == 2
    assert result.counts["output"] >= 2


@every_schedule
async def test_T15_freezing_children_and_parent(engine: Engine) -> None:
    dag, calls = DAG(), []
    loop = asyncio.get_running_loop()
    mapping(dag, 3)

    @dag.task(after="spread")
    async def leaf(ctx: Context) -> Context:
        who = ctx if ctx["n"] == 0 else ctx.root
        who.freeze()
        loop.call_later(0.01, who.thaw)
        return ctx

    joining(dag, calls, leaf)
    result = await engine.run(dag)
    assert where(calls) == [[0, 1, 2]]
    assert_counts(result, output=1, merged=3)


@every_schedule
async def test_T15_destroying_a_child_and_joining_the_rest(engine: Engine) -> None:
    dag, calls = DAG(), []
    mapping(dag, 3)

    @dag.task(after="spread")
    async def leaf(ctx: Context) -> Context:
        if ctx["n"] == 1:
            ctx.destroy()
        return ctx

    joining(dag, calls, leaf)
    result = await engine.run(dag)
    assert where(calls) == [[0, 2]]
    assert_counts(result, output=1, merged=2, dropped=1)


@every_schedule
async def test_T15_destroying_an_arrived_child_while_others_work(engine: Engine) -> None:
    dag, calls = DAG(), []
    first: list[Context] = []
    mapping(dag, 3, kind="function")

    @dag.task(after="spread")
    async def leaf(ctx: Context) -> Context:
        if not first:
            first.append(ctx)
            return ctx
        await settle()
        first[0].destroy()
        return ctx

    joining(dag, calls, leaf)
    result = await engine.run(dag)
    assert len(calls) == 1
    assert result.counts["dropped"] in (0, 1)
    assert_counts(result, output=1, dropped=result.counts["dropped"], merged=3 - result.counts["dropped"])
    if engine.workers == 1:
        assert result.counts["dropped"] == 1


@every_schedule
async def test_T15_a_sync_join_in_a_thread(engine: Engine) -> None:
    dag = DAG()
    threads: list[str] = []
    mapping(dag, 3, kind="function")

    @dag.join(after="spread")
    def join(ctx: Context, children: list[Context]) -> Context:
        threads.append(threading.current_thread().name)
        ctx["sum"] = sum(child["n"] for child in children)
        return ctx

    result = await engine.run(dag, [{}, {}])
    assert [out["sum"] for out in result] == [3, 3]
    assert all(name.startswith("obsdag") for name in threads)
    assert_counts(result, output=2, merged=6)


@every_schedule
async def test_T15_a_child_that_hands_its_map_back(engine: Engine) -> None:
    dag, log = DAG(), Log()
    mapping(dag, 3)

    @dag.task(after="spread")
    async def back(ctx: Context) -> Context | None:
        return ctx.parent

    chain(dag, log, "end", after=back)
    result = await engine.run(dag)
    # The branch is handed back by the first child; how many more the map makes meanwhile is not said.
    assert log.names() == ["end"]
    assert 1 <= result.counts["merged"] <= 3
    assert_counts(result, output=1, merged=result.counts["merged"])


@every_schedule
async def test_T15_the_same_dag_many_times_over(engine: Engine) -> None:
    dag, calls = DAG(), []
    mapping(dag, None)
    chain(dag, Log(), "leaf", after="spread")
    joining(dag, calls, "leaf")
    executor = engine.executor(dag, max_live_contexts=7)
    for _ in range(2):
        result = await finish(executor, ({"count": n % 5} for n in range(20)))
        assert_counts(result, output=20, merged=40)


@every_schedule
@pytest.mark.parametrize("room", [1, 2, 3])
async def test_T15_nested_maps_with_hardly_any_room(engine: Engine, room: int) -> None:
    dag, calls = DAG(), []
    mapping(dag, 3, name="m1")
    mapping(dag, 3, name="m2", after="m1")
    mapping(dag, 3, name="m3", after="m2")
    joining(dag, calls, "m3", "j3")
    joining(dag, calls, "j3", "j2")
    joining(dag, calls, "j2", "j1")
    result = await engine.run(dag, [{}, {}, {}], max_live_contexts=room)
    assert_counts(result, output=3, merged=3 * (3 + 9 + 27))


@every_schedule
async def test_T15_a_cancelled_run_in_the_middle_of_maps(engine: Engine) -> None:
    dag, calls, closed = DAG(), [], []
    busy = asyncio.Event()

    @dag.map
    async def spread(ctx: Context) -> AsyncIterator[dict[str, int]]:
        try:
            for n in range(100):
                yield {"n": n}
        finally:
            closed.append(1)

    @dag.task(after=spread)
    async def leaf(ctx: Context) -> Context:
        if ctx["n"] == 2:
            busy.set()
            await asyncio.Event().wait()
        return ctx

    joining(dag, calls, leaf)
    executor = engine.executor(dag)
    running = asyncio.create_task(executor.run())
    async with asyncio.timeout(HANG_S):
        await busy.wait()
        await settle()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert closed == [1]
    stats = executor.stats()
    assert stats["cancelled"] == stats["entered"] >= 4
    assert stats["living"] == 0
