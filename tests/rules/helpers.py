"""What the tests of the contract share: schedules to run a DAG under, and the sum that holds after every run (C9)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from obsdag import DAG, Context, Executor, ExecutorConfig, RunResult, Runtime
from obsdag.core.states import OUTCOMES

__all__ = ["HANG_S", "ONE", "Engine", "Log", "assert_counts", "chain", "every_schedule", "every_worker_num", "settle"]

HANG_S = 5.0
"""Seconds after which a run counts as hung. Nothing here takes long: this is never reached by a sound engine."""


@dataclass(frozen=True)
class Engine:
    """A schedule: how many contexts, and how many ready tasks of one context, run at once."""

    workers: int = 1
    tasks: int = 1

    def __str__(self) -> str:
        return f"{self.workers}x{self.tasks}"

    def executor(self, dag: DAG, runtime: Runtime | None = None, **settings: Any) -> Executor:
        """An executor of this schedule that checks its own invariants."""
        settings.setdefault("debug", True)
        return Executor(
            dag,
            runtime,
            ExecutorConfig(context_worker_num=self.workers, task_worker_num=self.tasks, **settings),
        )

    async def run(self, dag: DAG, inputs: Any = None, runtime: Runtime | None = None, **settings: Any) -> RunResult:
        """Runs the inputs to their end; the conservation sum is checked for every run (C9)."""
        return await finish(self.executor(dag, runtime, **settings), inputs)


async def finish(executor: Executor, inputs: Any = None) -> RunResult:
    """`executor.run`, which fails the test instead of hanging."""
    async with asyncio.timeout(HANG_S):
        result = await executor.run(inputs)
    assert sum(result.counts[name] for name in OUTCOMES) == result.counts["entered"], dict(result.counts)
    assert result.counts["output"] == len(result)
    assert result.counts["failed"] >= len(result.failures)
    assert executor.stats()["living"] == 0
    return result


def assert_counts(result: RunResult | Mapping[str, int], **expected: int) -> None:
    """Exactly these counts, and none of any outcome that is not named; `entered` is their sum if it is not named."""
    counts: Mapping[str, int] = result.counts if isinstance(result, RunResult) else result
    found = {name: number for name, number in counts.items() if number}
    wanted = {name: number for name, number in expected.items() if number}
    wanted.setdefault("entered", sum(number for name, number in wanted.items() if name in OUTCOMES))
    assert found == {name: number for name, number in wanted.items() if number}, getattr(result, "failures", "")


ONE = Engine()
every_worker_num = pytest.mark.parametrize("engine", [Engine(1), Engine(4), Engine(64)], ids=str)
every_schedule = pytest.mark.parametrize("engine", [Engine(w, t) for w in (1, 4, 64) for t in (1, 0)], ids=str)


async def settle(turns: int = 20) -> None:
    """Lets everything that can run now run: a bounded number of turns of the event loop."""
    for _ in range(turns):
        await asyncio.sleep(0)


class Log(list[Any]):
    """What happened, in order; `step(name)` is a task function that notes its context and passes it on."""

    def step(self, name: str) -> Callable[[Context], Any]:
        """A coroutine function of that name: notes (name, context) and returns the context."""

        async def run(ctx: Context) -> Context:
            self.append((name, ctx))
            return ctx

        run.__name__ = name
        return run

    def names(self, ctx: Context | None = None) -> list[str]:
        """The names noted, of one context or of all, in order."""
        return [name for name, context in self if ctx is None or context is ctx]


def chain(dag: DAG, log: Log, *names: str, after: Any = ()) -> None:
    """Adds a noting task per name, each after the one before it."""
    for name in names:
        dag.task(log.step(name), after=after, name=name)
        after = name
