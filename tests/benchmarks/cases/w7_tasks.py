"""W7: what an execution costs, and how long a DAG takes to build, as the number of its tasks grows: a chain."""

from __future__ import annotations

import asyncio
import gc
import time

from obsdag import Executor, ExecutorConfig, Telemetry
from tests.benchmarks.contenders.ours import graph_dag
from tests.benchmarks.workloads import WORKERS

__all__ = ["run"]


def run(quick: bool) -> dict[str, float]:
    """Microseconds per execution, and the ratio of the longest chain to that of 10."""
    sizes, executions, repeats = ((10, 100), 1_000, 1) if quick else ((10, 100, 1_000, 10_000), 60_000, 7)
    config = ExecutorConfig(context_worker_num=WORKERS, telemetry=Telemetry.off())
    executors, found = {}, {}
    for tasks in sizes:
        began = time.thread_time()
        executors[tasks] = Executor(graph_dag({n: (n - 1,) if n else () for n in range(tasks)}), config=config)
        found[f"{tasks:,} tasks, ms to build"] = (time.thread_time() - began) * 1e3
    us = dict.fromkeys(sizes, float("inf"))
    for _ in range(repeats):
        for tasks, executor in executors.items():
            gc.collect()
            us[tasks] = min(us[tasks], asyncio.run(_timed(executor, executions // tasks)) / executions * 1e6)
    found |= {f"{tasks:,} tasks, us": us[tasks] for tasks in sizes}
    found[f"{sizes[-1]:,} tasks / 10"] = us[sizes[-1]] / us[10]
    return found


async def _timed(executor: Executor, items: int) -> float:
    began = time.thread_time()
    assert len(await executor.run({"n": n} for n in range(items))) == items
    return time.thread_time() - began
