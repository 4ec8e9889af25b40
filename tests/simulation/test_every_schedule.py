"""Small cases under every schedule there is, each transition compared with the model of the rules."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from obsdag import DAG, ConcurrencyLimit, Context, ExecutorConfig
from obsdag.testing import explore, sleep
from tests.simulation.checked import Checked
from tests.simulation.scenarios import graph_of


def chain(length: int) -> DAG:
    dag = DAG()
    above: Any = ()
    for number in range(length):

        async def step(ctx: Context) -> Context:
            return ctx

        above = dag.task(step, name=f"t{number}", after=above)
    return dag


def fork() -> DAG:
    dag = chain(1)

    async def step(ctx: Context) -> Context:
        return ctx

    dag.task(step, name="left", after="t0")
    dag.task(step, name="right", after="t0")
    return dag


def drops() -> DAG:
    dag = DAG()

    @dag.task(may_drop=True)
    async def some(ctx: Context) -> Context | None:
        return ctx if ctx["n"] % 2 else None

    @dag.task
    async def beside(ctx: Context) -> Context:
        await sleep(0)
        return ctx

    return dag


def retries() -> DAG:
    dag = DAG()

    @dag.task(retry_times=1, retry_interval=1.0)
    async def flaky(ctx: Context) -> Context:
        if ctx.attempt == 1 or ctx["n"] == 1:
            raise ValueError(ctx["n"])
        return ctx

    return dag


def limited() -> DAG:
    dag = DAG()
    limit = ConcurrencyLimit(1)

    async def step(ctx: Context) -> Context:
        return ctx

    dag.task(step, name="one", limiter=limit)
    dag.task(step, name="two", limiter=limit)
    return dag


def joined() -> DAG:
    dag = DAG()

    @dag.map
    async def parts(ctx: Context) -> AsyncIterator[Any]:
        yield {"n": 0}
        yield {"n": 1}

    @dag.task(after=parts, may_drop=True)
    async def work(ctx: Context) -> Context | None:
        return ctx if ctx["n"] else None

    @dag.join(after=work)
    async def join(parent: Context, children: list[Context]) -> Context:
        return parent

    return dag


def handed_back() -> DAG:
    dag = DAG()

    @dag.task
    async def lend(ctx: Context) -> list[Context]:
        return ctx.create_child(2)  # type: ignore[no-any-return]

    @dag.task(after=lend)
    async def back(ctx: Context) -> Context:
        return ctx.parent or ctx

    async def beside(ctx: Context) -> Context:
        return ctx

    dag.task(beside, after=lend)
    return dag


def frozen() -> DAG:
    dag = DAG()

    @dag.task
    async def freeze(ctx: Context) -> Context:
        ctx.freeze()
        await sleep(1)
        ctx.thaw()
        return ctx

    @dag.task
    async def beside(ctx: Context) -> Context:
        return ctx

    return dag


def destroyed() -> DAG:
    dag = DAG()

    @dag.task
    async def make(ctx: Context) -> list[Context]:
        return ctx.create_child(2)  # type: ignore[no-any-return]

    @dag.task(after=make)
    async def end(ctx: Context) -> Context:
        if ctx.parent is not None and ctx.parent.children[0] is ctx:
            ctx.parent.destroy()
        return ctx

    return dag


CASES: list[tuple[Callable[[], DAG], int, int, int]] = [
    # the DAG, contexts, workers, tasks of one context at once
    (lambda: chain(1), 4, 4, 1),
    (lambda: chain(2), 3, 3, 1),
    (lambda: chain(3), 2, 2, 1),
    (lambda: chain(3), 3, 2, 1),
    (lambda: chain(2), 4, 2, 1),
    (fork, 2, 2, 2),
    (fork, 1, 1, 2),
    (drops, 2, 2, 2),
    (drops, 3, 1, 2),
    (retries, 2, 2, 1),
    (limited, 2, 2, 2),
    (limited, 3, 2, 1),
    (joined, 1, 3, 1),
    (joined, 2, 1, 1),
    (handed_back, 1, 3, 2),
    (frozen, 1, 1, 2),
    (frozen, 2, 2, 1),
    (destroyed, 1, 3, 1),
]
LARGE: list[tuple[Callable[[], DAG], int, int, int]] = [
    (lambda: chain(3), 4, 2, 1),
    (lambda: chain(3), 3, 3, 1),
    (fork, 2, 2, 3),
    (fork, 3, 2, 2),
    (limited, 4, 3, 1),
    (retries, 3, 2, 1),
    (joined, 2, 2, 1),
    (handed_back, 2, 2, 2),
]


def every(make: Callable[[], DAG], contexts: int, workers: int, tasks: int) -> tuple[int, set[Any]]:
    """How many schedules there are, and the sets of outcome counts that they end in."""
    dag = make()
    dag.build()
    config = ExecutorConfig(context_worker_num=workers, task_worker_num=tasks)

    def start(choose: Callable[[int], int]) -> Checked:
        inputs = [{"n": n} for n in range(contexts)]
        return Checked(graph_of(dag), dag, inputs, choose=choose, eager=True, config=config)

    ends: list[Any] = [tuple(sorted(result.counts.items())) for result in explore(start, 200_000)]
    return len(ends), set(ends)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{'x'.join(map(str, case[1:]))}")
def test_under_every_schedule_each_transition_is_as_the_rules_say(case: tuple[Any, int, int, int]) -> None:
    schedules, ends = every(*case)
    assert schedules >= 1
    if case[0] is not destroyed and case[0] is not handed_back:
        assert len(ends) == 1, ends  # E15


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case[0].__name__}-{'x'.join(map(str, case[1:]))}")
def test_larger_cases_under_every_schedule(case: tuple[Any, int, int, int]) -> None:
    every(*case)
