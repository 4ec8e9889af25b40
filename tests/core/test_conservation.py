"""C9: the core checks its own sums; a violation is an internal error that names the context, and hangs nobody.

The books are spoiled by hand, from within a task, as a bug of the engine would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from obsdag import DAG, Context, Executor, ExecutorConfig, InternalError
from tests.rules.virtual import virtual


def miscount(context: Context) -> None:
    context._run.living += 1  # type: ignore[union-attr]


def forget_to_count_the_end(context: Context) -> None:
    context._run.finished[0] -= 1  # type: ignore[union-attr]


SPOIL: dict[str, Callable[[Context], Any]] = {
    "miscount": miscount,
    "forget_to_count_the_end": forget_to_count_the_end,
}


def spoiling(spoil: Callable[[Context], Any]) -> DAG:
    dag = DAG()

    @dag.task
    async def first(ctx: Context) -> Context:
        if ctx["n"] == 2:
            spoil(ctx)
        return ctx

    @dag.task(after=first)
    async def second(ctx: Context) -> Context:
        return ctx

    return dag


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("spoil", SPOIL)
@pytest.mark.parametrize("workers", [1, 4])
@virtual
async def test_C9_a_sum_that_does_not_hold_is_an_internal_error(spoil: str, debug: bool, workers: int) -> None:
    contexts = [Context(data={"n": n}, name=f"c{n}") for n in range(4)]
    executor = Executor(spoiling(SPOIL[spoil]), config=ExecutorConfig(context_worker_num=workers, debug=debug))
    with pytest.raises(InternalError, match=r"entered [1-4] != living"):
        await executor.run(contexts)


@pytest.mark.parametrize("workers", [1, 4])
@virtual
async def test_C9_with_debug_it_is_told_after_the_transition_and_names_the_context(workers: int) -> None:
    contexts = [Context(data={"n": n}, name=f"c{n}") for n in range(4)]

    def spoil(context: Context) -> None:
        context._holds -= 1

    executor = Executor(spoiling(spoil), config=ExecutorConfig(context_worker_num=workers, debug=True))
    with pytest.raises(InternalError, match="context 'c2' is held -1 times"):
        await executor.run(contexts)
