"""obsdag in live mode: ordinary SDK spans through the host's tracer provider, which head-samples 1 in 100."""

from __future__ import annotations

import os
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from prometheus_client import CollectorRegistry

from obsdag import Telemetry, Tracing, logs
from tests.benchmarks.contenders import Job
from tests.benchmarks.contenders.ours import job_of

__all__ = ["prepare"]


def prepare(workload: str) -> Job:
    """The workload with live spans, metrics and log lines from info."""
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider(sampler=TraceIdRatioBased(0.01))
        exporter = OTLPSpanExporter(os.environ["BENCHMARK_RECEIVER"] + "/v1/traces")
        provider.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
    logs.configure(json=True, level="INFO", stream=open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    telemetry = Telemetry(engine="benchmark", registry=CollectorRegistry(), tracing=Tracing(mode="live"))

    async def flushed() -> dict[str, Any]:
        provider.force_flush(60_000)
        return {}

    return job_of(workload, telemetry, flushed)
