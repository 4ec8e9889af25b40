"""W7: what an execution costs as the number of contexts grows: inputs one after the other, and all living at once."""

from __future__ import annotations

import asyncio
import gc
import time

from obsdag import DAG, AsyncFunctionTask, Context, Executor, ExecutorConfig, Telemetry
from tests.benchmarks.contenders.ours import graph_dag, no_op
from tests.benchmarks.workloads import GRAPHS, WORKERS

__all__ = ["run"]


def run(quick: bool) -> dict[str, float]:
    """Microseconds per execution, and the ratio of the largest to 1,000."""
    most, repeats = (2_000, 1) if quick else (1_000_000, 5)
    config = ExecutorConfig(context_worker_num=WORKERS, telemetry=Telemetry.off(), max_live_contexts=10_000_000)
    found: dict[str, float] = {}
    for name, measure in (("inputs", _inputs), ("living", _living)):
        us = {}
        for number in (10, 1_000, most):
            us[number] = min(measure(config, number) for _ in range(repeats if number < most else 1))
            found[f"{number:,} {name}, us"] = us[number]
        found[f"{most:,} {name} / 1,000"] = us[most] / us[1_000]
    return found


def _inputs(config: ExecutorConfig, number: int) -> float:
    executor = Executor(graph_dag(GRAPHS["W4"]), config=config)

    async def streamed() -> float:
        began = time.thread_time()
        async with executor.stream({"n": n} for n in range(number)) as outputs:
            assert sum([1 async for _ in outputs]) == number
        return time.thread_time() - began

    gc.collect()
    return asyncio.run(streamed()) / number / len(GRAPHS["W4"]) * 1e6


def _living(config: ExecutorConfig, number: int) -> float:
    """One task makes all of them, which then go through three tasks; making them is not timed."""
    dag = DAG("living")
    began = 0.0

    @dag.task()
    async def make(context: Context) -> list[Context]:
        nonlocal began
        made = [context.create() for _ in range(number)]
        began = time.thread_time()
        return made

    for task in GRAPHS["W4"]:
        dag.add_task(AsyncFunctionTask(no_op, name=f"t{task}"), [f"t{task - 1}" if task else "make"])

    async def living() -> float:
        async with Executor(dag, config=config).stream(None) as outputs:
            assert sum([1 async for _ in outputs]) == number
        return time.thread_time() - began

    gc.collect()
    return asyncio.run(living()) / number / len(GRAPHS["W4"]) * 1e6
