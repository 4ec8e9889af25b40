"""Haystack: a pipeline of components, run per item with `run_async`; its usage telemetry off."""

from __future__ import annotations

import os
from typing import Any

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "false"

from haystack import Pipeline, component

from tests.benchmarks.contenders import Job, by_workers
from tests.benchmarks.workloads import GRAPHS, WORKERS

__all__ = ["prepare"]


@component
class One:
    """Passes on what it is given."""

    @component.output_types(item=dict)
    def run(self, item: dict) -> dict[str, Any]:  # type: ignore[type-arg]
        return {"item": item}

    @component.output_types(item=dict)
    async def run_async(self, item: dict) -> dict[str, Any]:  # type: ignore[type-arg]
        return {"item": item}


@component
class Four:
    """Takes four."""

    @component.output_types(item=dict)
    def run(self, a: dict, b: dict, c: dict, d: dict) -> dict[str, Any]:  # type: ignore[type-arg]
        return {"item": a}

    @component.output_types(item=dict)
    async def run_async(self, a: dict, b: dict, c: dict, d: dict) -> dict[str, Any]:  # type: ignore[type-arg]
        return {"item": a}


def prepare(workload: str) -> Job | None:
    """W1 and W2."""
    if workload not in ("W1", "W2"):
        return None
    pipeline, graph = Pipeline(), GRAPHS[workload]
    for task, above in graph.items():
        pipeline.add_component(f"t{task}", Four() if len(above) == 4 else One())
        for upstream, slot in zip(above, "abcd" if len(above) == 4 else ("item",), strict=False):
            pipeline.connect(f"t{upstream}.item", f"t{task}.{slot}")

    async def one(number: int) -> None:
        await pipeline.run_async({"t0": {"item": {"n": number}}})

    async def job(items: int) -> int:
        return await by_workers(items, one, WORKERS)

    return job
