"""The hand-written loop with telemetry the usual way: an SDK span, labelled counter and histogram, and a structlog line
per execution, as one would write them around each task; spans are exported by the SDK's batch processor.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry, Counter, Histogram

from tests.benchmarks.contenders import Job
from tests.benchmarks.contenders.loop import run_graph
from tests.benchmarks.workloads import GRAPHS

__all__ = ["prepare"]


def prepare(workload: str) -> Job | None:
    """The loop with its telemetry; W1 and W2 only, which say it all."""
    if workload not in ("W1", "W2"):
        return None
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(os.environ["BENCHMARK_RECEIVER"] + "/v1/traces")))
    atexit.register(provider.shutdown)
    return partial(run_graph, GRAPHS[workload], _instrumented(provider.get_tracer("usual"), _logger()))


def _logger() -> Any:
    handler = logging.StreamHandler(open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process
    logger = logging.getLogger("usual")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    processors = [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso")]
    return structlog.wrap_logger(logger, processors=[*processors, structlog.processors.JSONRenderer()])


def _instrumented(tracer: Any, log: Any) -> Callable[[int], Callable[[dict[str, Any]], Awaitable[Any]]]:
    registry = CollectorRegistry()
    done = Counter("executions", "Executions.", ("dag", "task", "outcome"), registry=registry)
    seconds = Histogram("seconds", "Time of executions.", ("dag", "task"), registry=registry)

    async def no_op(item: dict[str, Any]) -> dict[str, Any]:
        return item

    def around(task: int) -> Callable[[dict[str, Any]], Awaitable[Any]]:
        name = f"t{task}"

        async def execute(item: dict[str, Any]) -> dict[str, Any]:
            with tracer.start_as_current_span(f"execute {name}", attributes={"task": name, "item": item["n"]}):
                began = time.perf_counter()
                result = await no_op(item)
                took = time.perf_counter() - began
                done.labels("benchmark", name, "success").inc()
                seconds.labels("benchmark", name).observe(took)
                log.info("execution.finished", task=name, item=item["n"], took_s=took)
                return result

        return execute

    return around
