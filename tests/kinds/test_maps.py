"""Maps and joins (T14, T15, E16): nesting, bounded memory, failed and dropped children, joins that cannot fire."""

from __future__ import annotations

import asyncio
import resource
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from obsdag import DAG, Context, Executor, ExecutorConfig, OutputContext, RunResult, TaskError
from tests.kinds.test_matrix import nest
from tests.rules.helpers import ONE, Engine, assert_counts, every_worker_num

# --- size


@pytest.mark.parametrize("workers", [1, 16])
async def test_T15_three_levels_of_1000_by_10_by_10(workers: int) -> None:
    dag = DAG()
    nest(dag, (1000, 10, 10))
    result = await Executor(dag, config=ExecutorConfig(context_worker_num=workers)).run()
    assert result[0]["sum"] == 100_000
    assert_counts(result, output=1, merged=111_000)


@pytest.mark.parametrize("max_live", [1, 2, 3, 7])
async def test_E16_nested_maps_cannot_lock_each_other_out(max_live: int) -> None:
    dag = DAG()
    nest(dag, (4, 3, 2))
    result = await Engine(8).run(dag, [{}, {}, {}], max_live_contexts=max_live)
    assert [out["sum"] for out in result] == [24, 24, 24]
    assert_counts(result, output=3, merged=3 * (4 + 12 + 24))


def _resident_kb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


async def _stream_of_items(
    number: int, every_10_000: Callable[[], None] = lambda: None
) -> tuple[int, list[int], dict[str, int]]:
    """A map of `number` items that are counted as they come out: (sum, largest numbers alive, counts)."""
    dag = DAG()
    made = ended = 0
    alive = [0]

    @dag.map
    async def items(ctx: Context) -> AsyncIterator[dict[str, int]]:
        nonlocal made
        for n in range(number):
            made += 1
            alive[0] = max(alive[0], made - ended)
            yield {"n": n}

    @dag.task(after=items)
    async def work(ctx: Context) -> Context:
        ctx["n"] += 1
        return ctx

    total = 0
    executor = Executor(dag, config=ExecutorConfig(context_worker_num=4, max_live_contexts=100))
    async with executor.stream(None) as outputs:
        async for out in outputs:
            ended += 1
            total += out["n"]
            if not ended % 10_000:
                every_10_000()
        counts = dict(outputs.counts)
    return total, alive, counts


async def test_E16_a_map_of_50_000_items_in_bounded_memory() -> None:
    await _stream_of_items(200)  # what is made once is not counted below
    tracemalloc.start()
    try:
        total, alive, counts = await _stream_of_items(50_000)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 50_000 * 50_001 // 2
    assert_counts(counts, output=50_000, split=1)
    assert alive[0] <= 101
    assert peak_bytes < 1_500_000, f"{peak_bytes} bytes for 100 living contexts"


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_E16_a_map_of_1_000_000_items_in_bounded_memory(capsys: pytest.CaptureFixture[str]) -> None:
    await _stream_of_items(10_000)
    before_kb = _resident_kb()
    samples_kb: list[int] = []
    total, alive, counts = await _stream_of_items(1_000_000, lambda: samples_kb.append(_resident_kb()))
    assert len(samples_kb) == 100
    grown_kb = max(samples_kb) - before_kb
    with capsys.disabled():
        print(f"\na map of 1,000,000 items: memory grew by {grown_kb} kB at most, {alive[0]} items alive at most")
    assert total == 1_000_000 * 1_000_001 // 2
    assert_counts(counts, output=1_000_000, split=1)
    assert alive[0] <= 101
    assert grown_kb < 8_000


@pytest.mark.parametrize("kind", ["loop", "map"])
async def test_T14_first_outputs_come_while_the_source_still_gives(kind: str) -> None:
    dag = DAG()
    given: list[int] = []

    @dag.task(kind=kind)
    async def source(ctx: Context) -> AsyncIterator[Context]:
        n = 0
        while True:  # without end: only a pulled source lets anything out
            given.append(n)
            yield Context(data={"n": n})
            n += 1

    dag.task(_same, after=source, name="same")
    executor = Executor(dag, config=ExecutorConfig(context_worker_num=2))
    async with executor.stream(None) as outputs:
        first = [(await anext(outputs))["n"] for _ in range(10)]
    assert sorted(first) == list(range(10))
    assert len(given) < 10_100  # never further ahead than max_live_contexts


async def _same(ctx: Context) -> Context:
    return ctx


# --- failed and dropped children


def _family(dag: DAG, on_child_failure: str, seen: list[Any]) -> None:
    """Six children: 0 and 1 arrive, 2 and 3 fail, 4 and 5 are dropped."""

    @dag.map
    def spread(ctx: Context) -> Iterator[dict[str, int]]:
        yield from ({"n": n} for n in range(6))

    @dag.task(after=spread, may_drop=True)
    async def work(ctx: Context) -> Context | None:
        if ctx["n"] in (2, 3):
            raise ValueError(f"no {ctx['n']}")
        return ctx if ctx["n"] < 2 else None

    @dag.join(after=work, on_child_failure=on_child_failure)
    async def gather(ctx: Context, children: Any) -> Context:
        seen.append([sorted(child["n"] for child in each) for each in (children, children.failed, children.dropped)])
        seen.append([child.error_info.error_node for child in children.failed])
        return ctx


@every_worker_num
async def test_T15_skip_reports_failed_and_dropped_children_to_the_join(engine: Engine) -> None:
    dag, seen = DAG(), list[Any]()
    _family(dag, "skip", seen)
    result = await engine.run(dag)
    assert seen == [[[0, 1], [2, 3], [4, 5]], ["work", "work"]]
    assert_counts(result, output=1, merged=2, failed=2, dropped=2)
    assert sorted(failure.context["n"] for failure in result.failures) == [2, 3]


@every_worker_num
async def test_T15_fail_fails_the_parent_and_names_the_child(engine: Engine) -> None:
    dag, seen = DAG(), list[Any]()
    _family(dag, "fail", seen)
    result = await engine.run(dag)
    assert not seen
    assert_counts(result, failed=3, dropped=2, cancelled=2)
    (parent,) = [failure for failure in result.failures if failure.context.parent is None]
    assert parent.task == "gather"
    assert isinstance(parent.exception, TaskError)
    assert "2 of 6 children failed" in str(parent.exception)
    assert isinstance(parent.exception.__cause__, ValueError)


@pytest.mark.parametrize("on_child_failure", ["fail", "skip"])
async def test_T15_all_children_dropped_is_an_empty_join(on_child_failure: str) -> None:
    dag = DAG()
    dag.map(lambda ctx: [{}, {}], name="spread")
    dag.task(_none, after="spread", name="drop", may_drop=True)
    dag.join(_lengths, after="drop", name="gather", on_child_failure=on_child_failure)
    result = await ONE.run(dag)
    assert result[0]["lengths"] == (0, 0, 2)
    assert_counts(result, output=1, dropped=2)


async def _none(ctx: Context) -> Context | None:
    return None if ctx is not None else ctx


async def _lengths(ctx: Context, children: Any) -> Context:
    ctx["lengths"] = (len(children), len(children.failed), len(children.dropped))
    return ctx


async def test_T15_children_come_in_order_of_creation_however_they_finish() -> None:
    dag = DAG()
    dag.map(lambda ctx: [{"n": n} for n in range(20)], name="spread")
    dag.task(_later_for_smaller, after="spread", name="work")

    @dag.join(after="work")
    async def gather(ctx: Context, children: list[Context]) -> Context:
        ctx["order"] = [child["n"] for child in children]
        assert all(child.outcome is None for child in children)  # merged when the join has succeeded, not before
        return ctx

    result = await Engine(64).run(dag)
    assert result[0]["order"] == list(range(20))


async def _later_for_smaller(ctx: Context) -> Context:
    for _ in range(20 - ctx["n"]):
        await asyncio.sleep(0)
    return ctx


async def test_T15_a_join_that_failed_is_retried_with_the_same_children() -> None:
    dag = DAG()
    calls: list[list[Context]] = []
    dag.map(lambda ctx: [{"n": n} for n in range(3)], name="spread")

    @dag.join(after="spread", retry_times=2)
    async def gather(ctx: Context, children: list[Context]) -> Context:
        calls.append(list(children))
        if len(calls) < 3:
            raise OSError("not yet")
        return ctx

    result = await ONE.run(dag)
    assert calls[0] == calls[1] == calls[2]
    assert len(calls[0]) == 3
    assert_counts(result, output=1, merged=3)


async def test_T15_an_empty_map() -> None:
    dag = DAG()
    dag.map(lambda ctx: [], name="spread")
    dag.join(_lengths, after="spread", name="gather")
    result = await ONE.run(dag)
    assert result[0]["lengths"] == (0, 0, 0)

    without_join = DAG()
    without_join.map(lambda ctx: [], name="spread")
    assert_counts(await ONE.run(without_join), dropped=1)


# --- errors of maps


@pytest.mark.parametrize("bad", [{"a": 1}, "text", b"bytes", 7, None], ids=repr)
async def test_T15_a_map_that_gives_no_iterable_says_so(bad: Any) -> None:
    dag = DAG()
    dag.map(lambda ctx: ctx["bad"], name="spread")
    result: RunResult = await ONE.run(dag, [{"bad": bad}, {"bad": [{"fine": True}]}])
    assert_counts(result, failed=1, output=1, split=1)
    assert "map task 'spread' returned" in str(result.failures[0].exception)
    assert isinstance(result.failures[0].exception, TaskError)


async def test_T15_a_map_that_gives_no_contexts_says_so() -> None:
    dag = DAG()
    dag.map(lambda ctx: [1, 2], name="spread")
    result = await ONE.run(dag)
    assert_counts(result, failed=1)
    assert "map task 'spread' gave 1; it gives contexts or mappings" in str(result.failures[0].exception)


@every_worker_num
async def test_T15_a_map_that_gives_its_own_context_fails_it(engine: Engine) -> None:
    dag = DAG()
    dag.map(lambda ctx: [{"n": 1}, ctx], name="spread")
    dag.join(_lengths, after="spread", name="gather")
    result = await engine.run(dag)
    assert_counts(result, failed=1, cancelled=result.counts["cancelled"])
    assert "map task 'spread' gave its own context; it gives children" in str(result.failures[0].exception)


async def test_T14_a_map_is_retried_before_its_first_child_and_not_after() -> None:
    dag = DAG()
    calls: list[str] = []

    @dag.map(retry_times=3)
    def spread(ctx: Context) -> Iterator[dict[str, int]]:
        calls.append(ctx["when"])
        if ctx["when"] == "before" and calls.count("before") < 3:
            raise OSError("try again")
        yield {"n": 1}
        if ctx["when"] == "after":
            raise OSError("too late")

    dag.join(_lengths, after=spread, name="gather")
    result = await ONE.run(dag, [{"when": "before"}, {"when": "after"}])
    assert calls.count("before") == 3
    assert calls.count("after") == 1
    assert_counts(result, output=1, merged=1, failed=1, cancelled=1)
    assert str(result.failures[0].exception) == "too late"


# --- joins that can never fire (E8)


@every_worker_num
async def test_E8_a_join_that_can_never_fire_is_named(engine: Engine) -> None:
    """Children of one branch that wait at different joins: none of the two can have all of them."""
    dag = DAG()
    dag.map(lambda ctx: [{"to": "left"}, {"to": "right"}], name="spread")
    dag.router(lambda ctx: ctx["to"], after="spread", name="choose", kind="foreground_router")
    dag.task(_same, after="choose", name="left")
    dag.task(_same, after="choose", name="right")
    dag.join(_lengths, after="left", name="join_left")
    dag.join(_lengths, after="right", name="join_right")
    result = await engine.run(dag)
    assert_counts(result, stalled=3)
    parents = [stall for stall in result.stalled if stall.context.parent is None]
    (stall,) = parents
    assert stall.task in ("join_left", "join_right")
    assert "wait at different joins" in stall.reason
    assert "join_left" in str(stall)
    assert "join_right" in str(stall)
    assert {each.context for each in result.stalled} == {stall.context, *stall.context.children}


@every_worker_num
async def test_E8_a_stalled_join_names_the_missing_upstream(engine: Engine) -> None:
    """`other` is lent to children that leave the run: it is never handed back, so the join of `spread` cannot fire."""
    dag = DAG()
    dag.map(lambda ctx: [{"n": 1}], name="spread")

    @dag.task
    async def lend(ctx: Context) -> list[Context]:
        made: list[Context] = ctx.create_child(2)
        return made

    @dag.task(after=lend)
    async def other(ctx: Context) -> Context:
        return OutputContext(ctx)

    dag.join(_lengths, after=["spread", other], name="gather")
    result = await engine.run(dag)
    assert_counts(result, output=2, stalled=2)
    (parent,) = [stall for stall in result.stalled if stall.context.parent is None]
    assert (parent.task, parent.missing) == ("gather", ("other",))
    assert "waits for upstreams of its parent that will never complete" in parent.reason
    assert parent.context.id in str(parent)
    (child,) = [stall for stall in result.stalled if stall.context.parent is parent.context]
    assert (child.task, child.missing) == ("gather", ("other",))
