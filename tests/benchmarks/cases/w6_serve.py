"""W6: submit and await a DAG of three no-op tasks: throughput by the number of clients, latency at half of the most.

Latency is from the moment a submission was due, whether or not it could be made then, to its result. The open loop goes
several rounds, and the median of their percentiles counts: one pause of the machine makes a percent of a round late.
"""

from __future__ import annotations

import asyncio
import time
from statistics import median

from obsdag import ExecutorConfig, ServeExecutor, Telemetry
from tests.benchmarks.contenders.ours import graph_dag
from tests.benchmarks.workloads import GRAPHS, WORKERS

__all__ = ["run"]

CLIENTS = (1, 16, 256)


def run(quick: bool) -> dict[str, float]:
    """Closed loops of clients find the most that goes; an open one at half of it gives the latencies."""
    return asyncio.run(_measure(quick))


async def _measure(quick: bool) -> dict[str, float]:
    config = ExecutorConfig(context_worker_num=WORKERS, telemetry=Telemetry.off())
    submissions = 200 if quick else 10_000
    found: dict[str, float] = {}
    async with ServeExecutor(graph_dag(GRAPHS["W4"]), config=config) as serving:
        await _closed(serving, 16, 100)
        rates = {}
        for clients in CLIENTS:
            rates[clients], taken = await _closed(serving, clients, submissions)
            found[f"per second, {clients} clients"] = rates[clients]
            found[f"p99 of {clients} clients, ms"] = _percentile(taken, 0.99)
        found["256 clients / 16, per second"] = rates[256] / rates[16]
        rounds = [await _open(serving, rates[256] / 2, submissions) for _ in range(1 if quick else 7)]
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)):
            found[f"{name} at half load, ms"] = median(_percentile(taken, share) for taken in rounds)
    return found


async def _closed(serving: ServeExecutor, clients: int, submissions: int) -> tuple[float, list[float]]:
    taken: list[float] = []
    left = iter(range(submissions))

    async def client() -> None:
        for number in left:
            began = time.perf_counter()
            await serving.execute({"n": number})
            taken.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return submissions / (time.perf_counter() - began), taken


async def _open(serving: ServeExecutor, rate: float, submissions: int) -> list[float]:
    taken: list[float] = []

    async def one(due: float, number: int) -> None:
        await serving.execute({"n": number})
        taken.append(time.perf_counter() - due)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(submissions):
            due = began + number / rate
            while time.perf_counter() < due:
                await asyncio.sleep(0)
            group.create_task(one(due, number))
    return taken


def _percentile(taken: list[float], share: float) -> float:
    return sorted(taken)[min(len(taken) - 1, int(len(taken) * share))] * 1e3
