"""Burr: an application per worker that goes round the chain, once for each item; it has no parallel branches in a
graph.
"""

from __future__ import annotations

import asyncio
from typing import Any

from burr.core import ApplicationBuilder, State, action

from tests.benchmarks.contenders import Job
from tests.benchmarks.workloads import GRAPHS, WORKERS

__all__ = ["prepare"]


@action(reads=["n"], writes=["n"])
async def no_op(state: State) -> State:
    return state


def _application(length: int) -> Any:
    names = [f"t{task}" for task in range(length)]
    return (
        ApplicationBuilder()
        .with_actions(**dict.fromkeys(names, no_op))
        .with_transitions(*zip(names, [*names[1:], names[0]], strict=True))
        .with_state(n=0)
        .with_entrypoint(names[0])
        .build()
    )


def prepare(workload: str) -> Job | None:
    """W1 only."""
    if workload != "W1":
        return None
    length = len(GRAPHS["W1"])
    applications = [_application(length) for _ in range(WORKERS)]

    async def job(items: int) -> int:
        numbers, done = iter(range(items)), []

        async def work(application: Any) -> None:
            for number in numbers:
                await application.arun(halt_after=[f"t{length - 1}"])
                done.append(number)

        await asyncio.gather(*map(work, applications))
        return len(done)

    return job
