"""The engine's own cost is told for tracing and metrics alike (TELEMETRY, principle 5)."""

from __future__ import annotations

from obsdag import DAG, Context, Executor, ExecutorConfig
from obsdag.telemetry.tracing import Tracing
from obsdag.testing import metric
from tests.telemetry.tracing_helpers import Collected, telemetry_of


def test_what_metrics_and_tracing_take_is_measured_on_a_sample() -> None:
    dag = DAG("told")

    @dag.task
    async def step(ctx: Context) -> Context:
        return ctx

    telemetry = telemetry_of(Tracing([Collected()], sample=0.0))
    executor = Executor(dag, config=ExecutorConfig(telemetry=telemetry))
    executor.run_sync({"n": n} for n in range(1_000))
    registry = telemetry.metrics.registry
    for signal in ("traces", "metrics"):
        took_s = metric(registry, "obsdag_telemetry_seconds_total", signal=signal, dag="told")
        assert took_s is not None
        assert 1e-5 < took_s < 10.0, f"{signal} {took_s} s for 1,000 executions"
    assert metric(registry, "obsdag_task_executions_total", task="step", outcome="success") == 1_000
    assert metric(registry, "obsdag_traces_total", decision="dropped", dag="told") == 1_000
