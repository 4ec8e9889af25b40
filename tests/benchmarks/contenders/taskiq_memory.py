"""taskiq with its in-memory broker, tasks run in place, results awaited; the graph is what the caller writes."""

from __future__ import annotations

import asyncio
from typing import Any

from taskiq import InMemoryBroker

from tests.benchmarks.contenders import Job, by_workers
from tests.benchmarks.workloads import CHILDREN, STEPS, WORKERS

__all__ = ["prepare"]


def prepare(workload: str) -> Job | None:
    """W1 to W3."""
    broker = InMemoryBroker(await_inplace=True, cast_types=False)

    @broker.task
    async def no_op(item: Any) -> Any:
        return item

    async def call(item: Any) -> Any:
        return (await (await no_op.kiq(item)).get_result()).return_value

    async def chain(item: Any, length: int = 10) -> None:
        for _ in range(length):
            item = await call(item)

    async def diamond(item: Any) -> None:
        item = await call(item)
        await asyncio.gather(*(call(item) for _ in range(4)))
        await call(item)

    async def fan_out(item: Any) -> None:
        await call(item)
        await by_workers(CHILDREN, lambda n: chain({"n": n}, STEPS), WORKERS)
        await call(item)

    one = {"W1": chain, "W2": diamond, "W3": fan_out}.get(workload)
    if one is None:
        return None

    async def job(items: int) -> int:
        return await by_workers(items, lambda n: one({"n": n}), WORKERS)

    return job
