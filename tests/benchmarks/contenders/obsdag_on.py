"""obsdag with everything on: metrics, deferred traces with 1 in 100 kept and exported over OTLP, a slow rule,
exemplars, the current span of every task, and log lines from info. The clock stops when the last kept span is exported.
"""

from __future__ import annotations

import os
from typing import Any

from prometheus_client import CollectorRegistry

from obsdag import Telemetry, Tracing, logs
from tests.benchmarks.contenders import Job
from tests.benchmarks.contenders.ours import job_of

__all__ = ["everything_on", "prepare"]


def everything_on(sample: float = 0.01) -> Telemetry:
    """All that there is, on, with log lines to nowhere."""
    logs.configure(json=True, level="INFO", stream=open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    tracing = Tracing.otlp(os.environ["BENCHMARK_RECEIVER"], sample=sample, slow_after=5.0)
    return Telemetry(engine="benchmark", registry=CollectorRegistry(), tracing=tracing)


def prepare(workload: str) -> Job:
    """The workload, and how many spans were lost: none may be."""
    telemetry = everything_on()

    async def flushed() -> dict[str, Any]:
        in_time = await telemetry.flush(60.0)
        lost = {"/".join(key): count for key, count in telemetry.stats.dropped.items() if count}
        if lost or not in_time:
            raise RuntimeError(f"telemetry was lost: {lost}, flushed: {in_time}")
        return {"traces": telemetry.stats.traces["ratio"]}

    return job_of(workload, telemetry, flushed)
