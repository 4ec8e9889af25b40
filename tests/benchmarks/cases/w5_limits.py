"""W5: a rate limit that binds: how much longer than it must the run takes, and what a wait costs."""

from __future__ import annotations

import asyncio
import time

from obsdag import DAG, Executor, ExecutorConfig, RateLimit, Telemetry
from tests.benchmarks.contenders.ours import no_op
from tests.benchmarks.workloads import WORKERS

__all__ = ["run"]


def run(quick: bool) -> dict[str, float]:
    """So many items a second for half a second, and how long it really took."""
    rate, items = 2_000, 50 if quick else 1_000
    dag = DAG("limits")
    dag.task(name="limited", limiter=RateLimit(rate, burst=1))(no_op)
    executor = Executor(dag, config=ExecutorConfig(context_worker_num=WORKERS, telemetry=Telemetry.off()))

    async def limited() -> tuple[float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        assert len(await executor.run({"n": n} for n in range(items))) == items
        return time.perf_counter() - began, time.process_time() - cpu

    took, cpu = asyncio.run(limited())
    return {"time / least possible": took / ((items - 1) / rate), "CPU us per wait": cpu / items * 1e6}
