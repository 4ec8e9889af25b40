"""The earlier system: `shutilspy` 0.1.0, Python 3.13; it has no telemetry. Its DAG runs once, so each run builds one.

It imports `turtle`, of which it uses nothing, and which needs tkinter: a stub stands in. When all is done its workers
idle for a queue time-out: its clock stops when the last task was called, so that this is not held against it.
"""

from __future__ import annotations

import logging
import sys
import time
import types
from typing import Any

from tests.benchmarks.contenders import Job
from tests.benchmarks.workloads import GRAPHS, WORKERS

turtle = types.ModuleType("turtle")
turtle.down = None  # type: ignore[attr-defined]
sys.modules["turtle"] = turtle

from shutils import dag as earlier  # noqa: E402 - the stub comes first

__all__ = ["prepare"]


latest = [0.0]


async def no_op(context: Any) -> Any:
    latest[0] = time.perf_counter()
    return context


def prepare(workload: str) -> Job | None:
    """W1 and W2. It has no join, and with its children counted by hand W3 does not end."""
    logging.disable(logging.CRITICAL)
    return _job(lambda: _graph(workload)) if workload in ("W1", "W2") else None


def _graph(workload: str) -> Any:
    dag, tasks = earlier.DAG(), {}
    for task, above in GRAPHS[workload].items():
        tasks[task] = earlier.AsyncFunctionTask(no_op, name=f"t{task}")
        dag.add_task(tasks[task], [tasks[upstream] for upstream in above])
    return dag


def _job(build: Any) -> Job:
    async def job(items: int) -> dict[str, Any]:
        dag, runtime = build(), earlier.Runtime()
        dag.build()
        config = earlier.ExecutorConfig(context_worker_num=WORKERS, context_queue_timeout=0.2, worker_idle_times=2)
        executor = earlier.Executor(dag, runtime, config)
        began = time.perf_counter()
        outputs = await executor.run([earlier.Context(runtime) for _ in range(items)])
        return {"found": len(outputs), "seconds": latest[0] - began}

    return job
