"""Hamilton's async driver, which has no telemetry of its own: the driver is built once and executed per item."""

from __future__ import annotations

from typing import Any

from hamilton import ad_hoc_utils, async_driver

from tests.benchmarks.contenders import Job, by_workers
from tests.benchmarks.workloads import CHILDREN, GRAPHS, STEPS, WORKERS

__all__ = ["prepare"]


def prepare(workload: str) -> Job | None:
    """W1 and W2; W3 as a task whose children are gathered, each through an execution of a driver of its own."""
    if workload == "W3":
        return _fan_out()
    return _per_item(GRAPHS[workload]) if workload in ("W1", "W2") else None


def _function(name: str, above: list[str]) -> Any:
    scope: dict[str, Any] = {}
    parameters = ", ".join(f"{upstream}: dict" for upstream in above)
    exec(f"async def {name}({parameters}) -> dict:\n    return {above[0]}\n", scope)  # Hamilton reads the parameters
    return scope[name]


def _module(graph: Any) -> Any:
    functions = [_function(f"t{task}", [f"t{up}" for up in above] or ["item"]) for task, above in graph.items()]
    return ad_hoc_utils.create_temporary_module(*functions)


async def _driver(graph: Any) -> Any:
    return await async_driver.Builder().with_modules(_module(graph)).build()


def _per_item(graph: Any) -> Job:
    last, made = f"t{max(graph)}", []

    async def job(items: int) -> int:
        if not made:
            made.append(await _driver(graph))
        driver = made[0]

        async def one(number: int) -> None:
            await driver.execute([last], inputs={"item": {"n": number}})

        return await by_workers(items, one, WORKERS)

    return job


def _fan_out() -> Job:
    chain = {step: (step - 1,) if step else () for step in range(STEPS)}
    made: list[Any] = []

    async def job(items: int) -> int:
        if not made:
            made.append(await _driver(chain))
        driver = made[0]

        async def child(number: int) -> None:
            await driver.execute([f"t{STEPS - 1}"], inputs={"item": {"n": number}})

        async def root(number: int) -> None:
            assert await by_workers(CHILDREN, child, WORKERS) == CHILDREN

        return await by_workers(items, root, 1)

    return job
