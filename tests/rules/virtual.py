"""What the tests of sections 5 and 7 share: tests in virtual time, and runs whose sums are checked."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

from obsdag import DAG, Context, Executor, ExecutorConfig, Observer, RunResult, Runtime
from obsdag.core.states import OUTCOMES
from obsdag.testing import VirtualLoop, run_virtual
from tests.leaks import loop_leftovers

__all__ = ["EndTurns", "Ends", "Held", "assert_clean", "execute", "make", "now", "passing", "virtual", "virtual_loop"]


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test in virtual time; what it leaves in its loop fails it, a hang is told at once."""

    @functools.wraps(test)
    def run(*arguments: Any, **keywords: Any) -> None:
        async def main() -> None:
            await test(*arguments, **keywords)
            assert_clean()

        run_virtual(main())

    return run


def virtual_loop() -> VirtualLoop:
    """The running loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def now() -> float:
    """Virtual seconds since the test began."""
    return virtual_loop().time()


def assert_clean() -> None:
    """Neither an asyncio task nor an armed timer is left in the running loop (E7, E9)."""
    found = loop_leftovers(asyncio.get_running_loop())
    assert not found, found


def make(dag: DAG, workers: int = 1, tasks: int = 1, runtime: Runtime | None = None, **settings: Any) -> Executor:
    """An executor that checks its own invariants after every transition."""
    settings.setdefault("debug", True)
    config = ExecutorConfig(context_worker_num=workers, task_worker_num=tasks, **settings)
    return Executor(dag, runtime, config)


async def execute(
    dag: DAG, inputs: Any = None, workers: int = 1, tasks: int = 1, runtime: Runtime | None = None, **settings: Any
) -> RunResult:
    """Runs the inputs to their end; every run conserves (C9) and leaves nothing (E7)."""
    executor = make(dag, workers, tasks, runtime, **settings)
    result = await executor.run(inputs)
    assert_clean()
    assert sum(result.counts[name] for name in OUTCOMES) == result.counts["entered"], dict(result.counts)
    assert result.counts["output"] == len(result)
    assert executor.stats()["living"] == 0 == executor.runtime.counter
    return result


def passing(dag: DAG, *names: str, after: Any = (), **settings: Any) -> Any:
    """Adds a chain of coroutine tasks that return their context; returns the last one."""
    for name in names:

        async def step(ctx: Context) -> Context:
            return ctx

        after = dag.task(step, name=name, after=after, **settings)
    return after


class EndTurns(Observer):
    """Notes at which turn of the loop the last outcome came."""

    def __init__(self) -> None:
        self.turn = -1
        self.ended = 0

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        self.turn = virtual_loop().turns
        self.ended += 1


class Ends(list[str]):
    """What ended; the one list of all copies that runs make of a task."""

    def __deepcopy__(self, memo: Any) -> Ends:
        return self


class Held:
    """A task whose contexts are all in it when the run ends, and that tells of its shutdown."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends

    async def __call__(self, ctx: Context) -> Context:
        try:
            await asyncio.Event().wait()
        finally:
            self.ends.append("execution")
        return ctx

    async def shutdown(self) -> None:
        self.ends.append("shutdown")
