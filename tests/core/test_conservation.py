"""C9: the core checks its own sums; a violation is an internal error that names the context, and hangs nobody.

The books are spoiled by hand, from within a task, as a bug of the engine would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from obsdag import DAG, Context, Executor, ExecutorConfig, InternalError
from obsdag.core.queue import IDLE
from tests.rules.virtual import execute, virtual


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


@pytest.mark.parametrize(
    ("books", "problem"),
    [
        ({"_outcome": "output"}, "ended as output and still counted as living"),
        ({"_state": -1}, "has no state"),
        ({"_running": 2, "_ready": 2}, "'first'.* are both running and ready"),
        ({"_running": 0, "_ready": 2, "_place": IDLE}, "'first'.* are ready and nobody will start them"),
        ({"_running": 0, "_ready": 0, "_place": IDLE}, "is held by nothing and has not ended"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@virtual
async def test_C9_what_the_books_of_a_context_must_not_say(books: dict[str, Any], problem: str) -> None:
    dag = DAG()

    @dag.task
    async def first(ctx: Context) -> Context:
        kept = {name: getattr(ctx, name) for name in books}
        for name, value in books.items():
            setattr(ctx, name, value)
        try:
            with pytest.raises(InternalError, match=problem):
                ctx._run.check(deep=True)  # type: ignore[union-attr]
        finally:
            for name, value in kept.items():
                setattr(ctx, name, value)
        return ctx

    assert len(await execute(dag, [{}])) == 1
