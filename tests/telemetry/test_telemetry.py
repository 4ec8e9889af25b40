"""The facade: what one `Telemetry` makes of a run, whoever shares it, and what it refuses (TELEMETRY 1, 2)."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from prometheus_client import CollectorRegistry

from obsdag.config import ExecutorConfig
from obsdag.context import Context
from obsdag.core.observer import Facts, Observer
from obsdag.errors import ConfigError
from obsdag.executor import Executor
from obsdag.graph import DAG
from obsdag.telemetry import Telemetry, default_observers
from obsdag.telemetry.tracing import Tracing
from obsdag.testing.telemetry import CollectedSpans, RecordedFacts, capture_logs, metric, metric_change
from tests.telemetry.corerun import CoreRun


def shop(name: str = "shop") -> DAG:
    dag = DAG(name)

    @dag.task()
    async def load(ctx: Context) -> Context:
        return ctx

    @dag.task(after="load")
    async def charge(ctx: Context) -> Context:
        if ctx.get("bad"):
            raise ValueError("card 4711 refused")
        return ctx

    return dag


def executor(telemetry: Telemetry | None, name: str = "shop", **settings: Any) -> Executor:
    return Executor(shop(name), config=ExecutorConfig(telemetry=telemetry, **settings))


def test_one_run_is_in_metrics_traces_and_logs_alike() -> None:
    registry, spans, facts = CollectorRegistry(), CollectedSpans(), RecordedFacts()
    tracing = Tracing(processors=(spans,), sample=1.0)
    telemetry = Telemetry(engine="orders", registry=registry, tracing=tracing, observers=[facts])

    with capture_logs("INFO") as lines:
        executor(telemetry).run_sync([{}, {}, {"bad": True}])

    assert metric(registry, "obsdag_contexts_finished_total", outcome="output") == 2
    assert metric(registry, "obsdag_task_failures_total", task="charge", error_type="ValueError") == 1
    assert {(span.name, span.attributes["obsdag.engine"]) for span in spans.spans} == {
        ("run shop", "orders"),
        ("context shop", "orders"),
        ("execute load", "orders"),
        ("execute charge", "orders"),
    }
    (finished,) = [line for line in lines if line["event"] == "run.finished"]
    assert (finished["engine"], finished["output"], finished["failed"], finished["executions"]) == ("orders", 2, 1, 6)
    (failed,) = [line for line in lines if line["event"] == "execution.failed"]
    span = next(each for each in spans.named("execute charge") if not each.status.is_ok)
    assert failed["span_id"] == f"{span.context.span_id:016x}"
    assert failed["trace_id"] == f"{span.context.trace_id:032x}"
    assert len(facts.named("execution_finished")) == 6


async def test_one_telemetry_serves_several_executors_at_once() -> None:
    registry = CollectorRegistry()
    telemetry = Telemetry(engine="orders", registry=registry)
    await asyncio.gather(*(executor(telemetry, name).run([{}, {}]) for name in ("a", "b", "b")))

    for dag, number in (("a", 2), ("b", 4)):
        assert metric(registry, "obsdag_contexts_finished_total", dag=dag, outcome="output") == number
        assert metric(registry, "obsdag_runs_total", dag=dag, outcome="ok") == number / 2


def test_redact_holds_in_spans_and_lines() -> None:
    spans = CollectedSpans()
    telemetry = Telemetry(
        "orders",
        CollectorRegistry(),
        tracing=Tracing(processors=(spans,)),
        redact=lambda text: text.replace("4711", "****"),
    )
    with capture_logs() as lines:
        executor(telemetry).run_sync({"bad": True})

    failed = next(line for line in lines if line["event"] == "execution.failed")
    assert failed["error"] == "card **** refused"
    (charge,) = spans.named("execute charge")
    assert charge.events[0].attributes["exception.message"] == "card **** refused"
    told = [failed["exception"], charge.events[0].attributes["exception.stacktrace"]]
    assert not [text for text in told if "ValueError: card 4711" in text]


def test_off_has_no_observers_and_nothing_to_flush() -> None:
    telemetry = Telemetry.off()
    with capture_logs() as lines:
        executor(telemetry).run_sync({"bad": True})

    assert lines == []
    assert telemetry.observers(CoreRun().state) == []
    assert asyncio.run(telemetry.flush()) is True
    assert asyncio.run(telemetry.close()) is True
    assert repr(telemetry) == "Telemetry.off()"
    with pytest.raises(ConfigError, match="no metrics"):
        _ = telemetry.metrics


def test_without_logs_nothing_is_logged() -> None:
    registry = CollectorRegistry()
    with capture_logs() as lines:
        executor(Telemetry(registry=registry, logs=False)).run_sync({"bad": True})

    assert lines == []
    assert metric(registry, "obsdag_task_failures_total", task="charge", error_type="ValueError") == 1


def test_an_executor_without_telemetry_warns_and_costs_nothing_per_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsdag.telemetry.current._asked", [])  # as if nobody had asked in this process
    with capture_logs() as lines:
        executor(None).run_sync([{}, {"bad": True}])

    assert [(line["event"], line["engine"], line["dag"]) for line in lines] == [("execution.failed", "obsdag", "shop")]
    facts = Facts(default_observers(CoreRun().state))
    hot = (
        "execution_started",
        "execution_finished",
        "context_entered",
        "context_finished",
        "state_left",
        "visit_started",
    )
    assert [fact for fact in hot if getattr(facts, fact) is not None] == []


# --- first use


def test_nothing_is_registered_before_the_first_run() -> None:
    registry = CollectorRegistry()
    telemetry = Telemetry(registry=registry)
    assert list(registry.collect()) == []

    executor(telemetry).run_sync({})
    assert metric(registry, "obsdag_build_info", dag="shop") == 1


def test_the_default_registry_is_the_default_and_a_second_telemetry_is_harmless() -> None:
    code = """
import obsdag.telemetry
from obsdag import DAG, Executor, ExecutorConfig
from prometheus_client import REGISTRY
names = lambda: {family.name for family in REGISTRY.collect() if family.name.startswith("obsdag")}
dag = DAG("etl")
@dag.task()
async def load(ctx): return ctx
print(len(names()))
for _ in range(2):
    Executor(dag, config=ExecutorConfig(telemetry=obsdag.telemetry.Telemetry())).run_sync({})
print("obsdag_contexts_finished" in names(), REGISTRY.get_sample_value(
    "obsdag_contexts_finished_total", {"engine": "obsdag", "dag": "etl", "outcome": "output"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert (done.stdout, done.stderr) == ("0\nTrue 2\n", "")


def test_importing_it_loads_no_telemetry_library() -> None:
    heavy = "{'prometheus_client', 'opentelemetry.sdk', 'structlog'}"
    code = f"import sys, obsdag.telemetry; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_metrics_can_be_had_before_the_first_run() -> None:
    registry = CollectorRegistry()
    telemetry = Telemetry(registry=registry)
    telemetry.metrics.declare(shop().build())

    assert telemetry.metrics is telemetry.metrics
    assert metric(registry, "obsdag_runs_total", dag="shop", outcome="ok") == 0


def test_the_first_run_says_when_a_registry_does_not_fit() -> None:
    registry = CollectorRegistry()
    executor(Telemetry("orders", registry)).run_sync({})

    with pytest.raises(ConfigError, match="orders"):
        executor(Telemetry("orders", registry, cardinality="low")).run_sync({})


# --- tracing by itself


def test_tracing_is_off_without_processors_and_provider() -> None:
    telemetry = Telemetry(registry=CollectorRegistry())

    assert telemetry.tracing.resolved_mode() == "off"
    assert not any("Tracer" in type(each).__name__ for each in telemetry.observers(CoreRun().state))


def test_live_tracing_gives_its_ids_to_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = CollectedSpans()
    provider = TracerProvider()
    provider.add_span_processor(spans)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    with capture_logs() as lines:
        executor(Telemetry("orders", CollectorRegistry())).run_sync({})

    (charge,) = spans.named("execute charge")
    (root,) = spans.named("context shop")
    started = next(line for line in lines if line["event"] == "execution.started" and line["task"] == "charge")
    finished = next(line for line in lines if line["event"] == "context.finished")
    assert (started["trace_id"], started["span_id"]) == _ids(charge)
    assert (finished["trace_id"], finished["span_id"]) == _ids(root)


def _ids(span: ReadableSpan) -> tuple[str, str]:
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def test_lines_of_a_childs_context_name_the_trace_but_no_span() -> None:
    tracing = Tracing(processors=(CollectedSpans(),))
    run = CoreRun()
    with capture_logs() as lines:
        run.observe(*Telemetry("orders", CollectorRegistry(), tracing=tracing).observers(run.state))
        parent = run.enter("parent")
        run.succeed(run.begin(parent), parent.create_child(name="child"))

    root, child = [line for line in lines if line["event"] == "context.entered"]
    assert root["trace_id"] == child["trace_id"]
    assert "span_id" in root
    assert "span_id" not in child


class Stuck(SpanProcessor):
    """A receiver that does not answer until the test lets it."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer = threading.Event()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        self.asked += 1
        return self.answer.wait(30.0)


async def test_a_receiver_that_hangs_delays_one_run_and_not_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsdag.telemetry.FLUSH_S", 0.05)
    stuck = Stuck()
    telemetry = Telemetry("orders", CollectorRegistry(), tracing=Tracing(processors=(stuck,), sample=1.0))
    pipelines = executor(telemetry)
    waited: list[float] = []
    flush = telemetry.tracing.flush

    async def noted(timeout_s: float) -> bool:
        waited.append(timeout_s)
        return await flush(timeout_s)

    monkeypatch.setattr(telemetry.tracing, "flush", noted)
    for _ in range(3):
        await pipelines.run({})
    assert waited == [0.05]

    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61.0)
    stuck.answer.set()
    await pipelines.run({})
    monkeypatch.undo()
    assert len(waited) == 2
    await telemetry.close()


async def test_close_shuts_tracing_down_and_leaves_the_counters() -> None:
    registry, spans = CollectorRegistry(), CollectedSpans()
    telemetry = Telemetry("orders", registry, tracing=Tracing(processors=(spans,), sample=1.0))
    await executor(telemetry).run({})

    assert await telemetry.close() is True
    assert metric(registry, "obsdag_contexts_finished_total", outcome="output") == 1
    assert len(spans.spans) == 4


# --- observers that fail


class Broken(Observer):
    def execution_started(self, execution: Any, now: float) -> None:
        raise RuntimeError("bug")


def test_an_observer_that_raises_is_logged_counted_and_left_out() -> None:
    registry = CollectorRegistry()
    with capture_logs() as lines:
        result = executor(Telemetry("orders", registry, observers=[Broken()])).run_sync([{}, {}])

    assert result.counts["output"] == 2
    (line,) = [line for line in lines if line["event"] == "telemetry.dropping"]
    assert (line["observer"], line["fact"], line["error_type"]) == ("Broken", "execution_started", "RuntimeError")
    lost = {"signal": "observers", "reason": "observer_failed"}
    assert metric(registry, "obsdag_telemetry_dropped_total", dag="shop", **lost) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": ""}, r"Telemetry\.engine must be a name, not ''"),
        ({"registry": "default"}, r"Telemetry\.registry must be a prometheus_client registry or None, not 'default'"),
        ({"tracing": CollectedSpans}, r"Telemetry\.tracing must be a Tracing"),
        ({"logs": "yes"}, r"Telemetry\.logs must be True or False, not 'yes'"),
        ({"observers": Broken()}, r"Telemetry\.observers must be several"),
        ({"observers": [Broken]}, r"Telemetry\.observers must be observers, not <class"),
        ({"observers": [3]}, r"Telemetry\.observers must be observers, not 3"),
        ({"redact": "4711"}, r"Telemetry\.redact must be a callable"),
        ({"cardinality": "none"}, r"Telemetry\.cardinality must be 'full' or 'low', not 'none'"),
        ({"buckets": [2.0, 1.0]}, r"Telemetry\.buckets: "),
        ({"buckets": 3}, r"Telemetry\.buckets: "),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Telemetry(**settings)


def test_metric_change_counts_a_block() -> None:
    registry = CollectorRegistry()
    telemetry = Telemetry("orders", registry)
    with metric_change(registry, "obsdag_task_executions_total", task="charge", outcome="success") as change:
        executor(telemetry).run_sync([{}, {}])
        assert change.value == 2
    executor(telemetry).run_sync({})

    assert change.value == 2


def test_tracing_is_had_at_the_same_door() -> None:
    import obsdag.telemetry as door

    assert door.Tracing is Tracing
    with pytest.raises(AttributeError, match="nothing"):
        _ = door.nothing
