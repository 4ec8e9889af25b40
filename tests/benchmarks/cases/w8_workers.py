"""W8: the chain of 10 with 1 to 64 workers; as the tasks do nothing, more workers can only be in the way."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time

from obsdag import Executor, ExecutorConfig, Telemetry
from tests.benchmarks.contenders.ours import graph_dag
from tests.benchmarks.workloads import GRAPHS

__all__ = ["run"]

WORKERS = (1, 4, 16, 64)


def run(quick: bool) -> dict[str, float]:
    """Microseconds per execution by number of workers, and the median of the ratios of 64 to 1."""
    items, repeats = (100, 2) if quick else (5_000, 11)
    dag = graph_dag(GRAPHS["W1"])
    us: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    for _ in range(repeats):
        for workers in WORKERS:
            gc.collect()
            us[workers].append(asyncio.run(_timed(dag, workers, items)) / items / len(GRAPHS["W1"]) * 1e6)
    found = {f"{workers} workers, us": statistics.median(us[workers]) for workers in WORKERS}
    found["64 workers / 1"] = statistics.median(many / one for many, one in zip(us[64], us[1], strict=True))
    return found


async def _timed(dag: object, workers: int, items: int) -> float:
    config = ExecutorConfig(context_worker_num=workers, telemetry=Telemetry.off())
    executor = Executor(dag, config=config)  # type: ignore[arg-type]
    began = time.thread_time()
    assert len(await executor.run({"n": n} for n in range(items))) == items
    return time.thread_time() - began
