"""obsdag on the workloads, with the telemetry that `obsdag_off`, `obsdag_on` and `obsdag_live` give it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from obsdag import DAG, AsyncFunctionTask, Context, Executor, ExecutorConfig, RateLimit, SyncFunctionTask, TaskConfig
from tests.benchmarks.contenders import Job
from tests.benchmarks.workloads import CHILDREN, GRAPHS, STEPS, WORKERS, Graph

__all__ = ["build", "job_of"]


async def no_op(context: Context) -> Context:
    """The task of most workloads."""
    return context


def _no_op_sync(context: Context) -> Context:
    return context


def build(workload: str) -> DAG:
    """The workload as a DAG."""
    if workload in ("W1", "W2"):
        return graph_dag(GRAPHS[workload])
    return {"W3": _fan_out, "W4": _threads, "W5": _retries}[workload]()


def graph_dag(graph: Graph, kind: Callable[..., Any] = AsyncFunctionTask, function: Any = no_op) -> DAG:
    """A graph of tasks that do nothing."""
    dag = DAG("benchmark")
    for task, above in graph.items():
        dag.add_task(kind(function, name=f"t{task}"), [f"t{upstream}" for upstream in above])
    return dag


def _fan_out() -> DAG:
    dag = DAG("benchmark")

    @dag.task()
    async def make(context: Context) -> list[Context]:
        children: list[Context] = context.create_child(CHILDREN)
        for number, child in enumerate(children):
            child["n"] = number
        return children

    for step in range(STEPS):
        dag.add_task(AsyncFunctionTask(no_op, name=f"t{step}"), [f"t{step - 1}" if step else "make"])

    @dag.task(kind="join", after=f"t{STEPS - 1}")
    async def join(context: Context, children: list[Context]) -> Context:
        return context

    return dag


def _threads() -> DAG:
    return graph_dag(GRAPHS["W4"], SyncFunctionTask, _no_op_sync)


async def _fails_once(context: Context) -> Context:
    if context.attempt == 1:
        raise ValueError
    return context


def _retries() -> DAG:
    dag = DAG("benchmark")
    dag.add_task(AsyncFunctionTask(no_op, name="t0"))
    dag.add_task(AsyncFunctionTask(_fails_once, TaskConfig(retry_times=1), "t1"), ["t0"])
    dag.add_task(AsyncFunctionTask(no_op, TaskConfig(limiter=RateLimit(10**9, burst=10**9)), "t2"), ["t1"])
    return dag


def job_of(workload: str, telemetry: Any, after: Callable[[], Any] | None = None) -> Job:
    """Runs items through the workload's DAG; `after` is awaited before the clock stops."""
    dag = build(workload)
    config = ExecutorConfig(context_worker_num=WORKERS, telemetry=telemetry)

    async def job(items: int) -> Any:
        found = len(await Executor(dag, config=config).run({"n": item} for item in range(items)))
        return found if after is None else {"found": found, **(await after())}

    return job
