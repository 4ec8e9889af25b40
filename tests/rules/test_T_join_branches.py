"""T14 and T15: maps, joins, and how they nest."""

from __future__ import annotations

from obsdag import DAG, Context
from tests.rules.helpers import Engine, Log, assert_counts, chain, every_schedule
from tests.rules.test_T_maps_and_joins import MAPS, joining, mapping, where  # noqa


@every_schedule
async def test_T15_a_child_arrives_when_nothing_else_of_it_lives(engine: Engine) -> None:
    dag, log, calls = DAG(), Log(), []
    mapping(dag, 2)
    chain(dag, log, "quick", after="spread")
    chain(dag, log, "s1", "s2", "s3", after="spread")

    @dag.join(after="quick")
    async def join(ctx: Context, children: list[Context]) -> Context:
        log.append(("join", ctx))
        calls.append((ctx, list(children), []))
        return ctx

    chain(dag, log, "end", after=["join", "s3"])
    result = await engine.run(dag)
    # The join is ready on a child after `quick`; it has arrived when s1 to s3 are over, too.
    (at,) = [index for index, (name, _) in enumerate(log) if name == "join"]
    assert [name for name, _ in log[:at]].count("s3") == 2
    assert where(calls) == [[0, 1]]
    assert log.names().count("end") == 1
    assert_counts(result, output=1, merged=2)


@every_schedule
async def test_T15_children_that_make_children_by_hand_under_a_join(engine: Engine) -> None:
    dag, calls, log = DAG(), [], Log()
    mapping(dag, 2)

    @dag.task(after="spread")
    async def split_again(ctx: Context) -> list[Context]:
        return ctx.create_child(2)

    @dag.task(after=split_again)
    async def back(ctx: Context) -> Context | None:
        log.append(("back", ctx))
        return ctx.parent

    joining(dag, calls, back)
    result = await engine.run(dag)
    assert len(log) == 4
    assert where(calls) == [[0, 1]]
    assert_counts(result, output=1, merged=6)


@every_schedule
async def test_C5_a_hand_back_ends_the_whole_lend(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        return ctx.create_child(2)

    chain(dag, log, "quick", after=spread)
    chain(dag, log, "s1", "s2", "s3", after=spread)

    @dag.task(after="quick")
    async def back(ctx: Context) -> Context | None:
        return ctx.parent

    chain(dag, log, "end", after=[back, "s3"])
    result = await engine.run(dag)
    assert log.names().count("end") == 1
    assert_counts(result, output=1, merged=2)
