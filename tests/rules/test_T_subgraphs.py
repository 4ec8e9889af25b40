"""G5 at work: included DAGs run as part of one run, whatever is in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from obsdag import DAG, ConcurrencyLimit, Context
from tests.rules.helpers import Engine, Log, assert_counts, chain, every_schedule, finish


def inner(log: Log) -> DAG:
    """a -> b and a -> c; two entries with x."""
    dag = DAG("inner")
    chain(dag, log, "a", "b")
    chain(dag, log, "c", after="a")
    chain(dag, log, "x")
    return dag


def mapped(log: Log, calls: list[Any]) -> DAG:
    """A map and its join."""
    dag = DAG("mapped")

    @dag.map
    async def spread(ctx: Context) -> AsyncIterator[dict[str, Any]]:
        for n in range(3):
            yield {"n": n}

    chain(dag, log, "leaf", after=spread)

    @dag.join(after="leaf")
    async def join(ctx: Context, children: list[Context]) -> Context:
        calls.append([child.get("n") for child in children])
        return ctx

    return dag


@every_schedule
async def test_T_an_included_dag_runs_between_what_it_is_after_and_what_is_after_it(engine: Engine) -> None:
    dag, log = DAG(), Log()
    chain(dag, log, "first")
    part = dag.include(inner(log), name="part", after="first")
    chain(dag, log, "last", after=part)
    result = await engine.run(dag, [{}, {}])
    for out in result:
        names = log.names(out.context)
        assert (names[0], names[-1], sorted(names)) == ("first", "last", ["a", "b", "c", "first", "last", "x"])
        assert {"part/a", "part/b", "part/c", "part/x"} <= set(out.completed_tasks)
    assert_counts(result, output=2)


@every_schedule
async def test_T_one_dag_included_twice_has_its_own_tasks_each_time(engine: Engine) -> None:
    dag, numbers, sub = DAG(), [], DAG("sub")

    @sub.stream
    async def number(ctx: Context) -> AsyncIterator[Context]:
        count = 0
        while True:
            count += 1
            numbers.append(count)
            ctx = yield ctx

    one = dag.include(sub, name="one")
    dag.include(sub, name="two", after=one)
    result = await engine.run(dag, [{} for _ in range(3)])
    assert sorted(numbers) == [1, 1, 2, 2, 3, 3]
    assert_counts(result, output=3)


@every_schedule
async def test_T_maps_and_joins_in_included_dags_nest(engine: Engine) -> None:
    dag, log, calls = DAG(), Log(), []

    @dag.map
    async def outer(ctx: Context) -> AsyncIterator[dict[str, Any]]:
        for n in range(2):
            yield {"n": n}

    part = dag.include(mapped(log, calls), name="part", after=outer)

    @dag.join(after=part)
    async def outer_join(ctx: Context, children: list[Context]) -> Context:
        calls.append([child["n"] for child in children])
        return ctx

    result = await engine.run(dag)
    assert sorted(calls) == [[0, 1], [0, 1, 2], [0, 1, 2]]
    assert_counts(result, output=1, merged=2 + 6)


@every_schedule
async def test_T_a_router_skips_a_whole_included_dag(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.router
    async def route(ctx: Context) -> Any:
        return ["part/a", "part/x"] if ctx["in"] else "around"

    part = dag.include(inner(log), name="part", after=route)
    chain(dag, log, "around", after=route)
    chain(dag, log, "end", after=[part, "around"])
    result = await engine.run(dag, [{"in": 1}, {"in": 0}])
    assert Counter(log.names()) == {"a": 1, "b": 1, "c": 1, "x": 1, "around": 1, "end": 2}
    assert_counts(result, output=2)


@every_schedule
async def test_T_a_router_in_an_included_dag_knows_its_own_names(engine: Engine) -> None:
    dag, log, sub = DAG(), Log(), DAG("sub")

    @sub.router
    async def route(ctx: Context) -> str:
        return "left"

    chain(sub, log, "left", after=route)
    chain(sub, log, "right", after=route)
    part = dag.include(sub, name="part")
    chain(dag, log, "end", after=part)
    result = await engine.run(dag)
    assert log.names() == ["left", "end"]
    assert_counts(result, output=1)


@every_schedule
async def test_T_included_three_deep(engine: Engine) -> None:
    log, calls = Log(), []
    dag = mapped(log, calls)
    for depth in range(3):
        around = DAG(f"level{depth}")
        chain(around, log, f"before{depth}")
        part = around.include(dag, name="in", after=f"before{depth}")
        chain(around, log, f"after{depth}", after=part)
        dag = around
    executor = engine.executor(dag)
    for _ in range(2):
        result = await finish(executor, {})
        assert_counts(result, output=1, merged=3)
    assert len(calls) == 2
    assert log.names()[:3] == ["before2", "before1", "before0"]


@every_schedule
async def test_T_limits_of_an_included_dag_are_shared_by_its_copies(engine: Engine) -> None:
    dag, sub, limit = DAG(), DAG("sub"), ConcurrencyLimit(1)
    inside: list[int] = []

    @sub.task(limiter=limit)
    async def work(ctx: Context) -> Context:
        inside.append(1)
        assert len(inside) == 1
        inside.pop()
        return ctx

    dag.include(sub, name="one")
    dag.include(sub, name="two")
    result = await engine.run(dag, [{} for _ in range(5)])
    assert_counts(result, output=5)
