"""What follows a task is remembered in the plan, which all runs of a DAG share: remembered or searched for, it is the
same.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdag import DAG, Context, Executor, ExecutorConfig
from obsdag.core.observer import Observer
from obsdag.core.records import Execution
from obsdag.plan import MAX_WAYS

Above = dict[int, list[int]]


class Notes(Observer):
    """Of each context the tasks in order of their starts, with what released them where that is known."""

    def __init__(self, records: bool) -> None:
        self.needs_records = records
        self.seen: dict[int, list[tuple[str, str]]] = {}

    def execution_started(self, execution: Execution, now: float) -> None:
        by = execution.released_by
        line = execution.task.id, by.task.id if by is not None else ""
        self.seen.setdefault(execution.context["n"], []).append(line)


@st.composite
def graphs(draw: Any) -> Above:
    """Up to eight tasks, each after some of those before it."""
    count = draw(st.integers(2, 8))
    return {n: draw(st.lists(st.integers(0, n - 1), unique=True, max_size=3)) if n else [] for n in range(count)}


def dag_of(above: Above, calls: dict[int, list[str]], pauses: bool = False) -> DAG:
    dag = DAG()
    for number, upstreams in above.items():
        name = f"t{number}"

        async def step(ctx: Context, name: str = name) -> Context:
            calls.setdefault(ctx["n"], []).append(name)
            if pauses:
                await asyncio.sleep(0)
            return ctx

        dag.task(step, name=name, after=[f"t{upstream}" for upstream in upstreams])
    return dag


def ran(dag: DAG, items: int, observers: Iterable[Observer] = (), **config: Any) -> None:
    settings = ExecutorConfig(context_worker_num=1, turn_s=5.0, observers=tuple(observers), **config)
    result = asyncio.run(Executor(dag, config=settings).run({"n": n} for n in range(items)))
    assert result.counts["output"] == items


@settings(max_examples=60, deadline=None)
@given(graphs(), st.permutations([None, False, True]))
def test_it_does_not_matter_who_remembered_a_way(above: Above, order: list[bool | None]) -> None:
    expected = Notes(records=True)
    calls: dict[int, list[str]] = {}
    ran(dag_of(above, calls), 1, [expected], debug=True)  # searches each time
    (tasks,), (told,) = calls.values(), expected.seen.values()
    shared = dag_of(above, calls)
    for records in order:
        calls.clear()
        notes = [] if records is None else [Notes(records)]
        ran(shared, 3, notes)
        assert list(calls.values()) == [tasks] * 3
        for note in notes:
            assert list(note.seen.values()) == [told if records else [(task, "") for task in tasks]] * 3


@pytest.mark.parametrize("width", [1, 0])
def test_what_is_remembered_is_bounded(width: int) -> None:
    calls: dict[int, list[str]] = {}
    dag = dag_of({0: [], **{n: [0] for n in range(1, 12)}, 12: list(range(1, 12))}, calls)

    ran(dag, 50, task_worker_num=width)

    known = [step[4] for step in dag.build().steps if step is not None]
    assert all(ways is not None and len(ways) <= MAX_WAYS for ways in known)
    assert any(known)
    assert all(tasks == calls[0] for tasks in calls.values()) or not width


def test_of_many_tasks_nothing_is_remembered() -> None:
    calls: dict[int, list[str]] = {}
    dag = dag_of({0: [], **{n: [0] for n in range(1, 400)}}, calls)

    ran(dag, 2)

    assert calls[0] == calls[1] == [f"t{n}" for n in range(400)]
    assert not any(step[4] for step in dag.build().steps if step is not None)


def test_several_runners_and_one_share_a_plan() -> None:
    calls: dict[int, list[str]] = {}
    dag = dag_of({0: [], 1: [0], 2: [0], 3: [0], 4: [1, 2], 5: [2, 3], 6: [4, 5]}, calls, pauses=True)

    for width in (2, 1, 3):
        ran(dag, 20, task_worker_num=width)

    assert all(set(Counter(tasks).values()) == {3} for tasks in calls.values())


def test_a_way_is_taken_only_from_where_it_was_found() -> None:
    calls: dict[int, list[str]] = {}
    dag = dag_of({0: [], 1: [0], 2: [0], 3: [1, 2]}, calls)
    ran(dag, 1)
    order = calls[0].copy()
    ways = [step[4] for step in dag.build().steps if step is not None and step[4]]
    for known in ways:
        for done, (ready, *_) in known.items():
            known[done] = ready ^ 1 << 20, 4, 1 << 4, 0, True  # with other tasks ready the last one would come now

    ran(dag, 3)

    assert ways
    assert all(tasks == order for n, tasks in calls.items() if n)


def test_without_records_nobody_knows_who_released_what_also_where_a_context_has_rare_parts() -> None:
    dag, notes = DAG(), Notes(records=False)

    async def passes_on(ctx: Context) -> Context:
        return ctx

    async def chooses(ctx: Context) -> str:
        return "first"

    dag.task(chooses, kind="router", name="choose")
    dag.task(passes_on, name="first", after="choose")
    dag.task(passes_on, name="second", after="first")
    dag.task(passes_on, name="third", after="second")
    dag.task(passes_on, name="other", after="choose")

    ran(dag, 2, [notes])

    assert list(notes.seen.values()) == [[(task, "") for task in ("choose", "first", "second", "third")]] * 2


def test_what_is_seldom_set_of_an_execution_can_be_asked_of_its_class() -> None:
    assert Execution.cancelling is vars(Execution)["cancelling"]
