"""The helpers with which users test their telemetry: each example of their documentation runs."""

from __future__ import annotations

import inspect
import logging
import textwrap
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter

from obsdag.config import ExecutorConfig
from obsdag.context import Context
from obsdag.core.observer import FACTS, Facts
from obsdag.executor import Executor
from obsdag.graph import DAG
from obsdag.telemetry import Telemetry
from obsdag.telemetry.lines import LOGGER
from obsdag.telemetry.tracing import Tracing
from obsdag.testing import telemetry as helpers
from obsdag.testing.telemetry import CollectedSpans, RecordedFacts, capture_logs, metric


def shop() -> DAG:
    dag = DAG("shop")

    @dag.task()
    async def charge(ctx: Context) -> Context:
        if ctx["order"] == 13:
            raise ValueError("card refused")
        return ctx

    return dag


def example_of(helper: Any) -> str:
    """The code in a docstring: the paragraph that asserts something."""
    paragraphs = inspect.cleandoc(helper.__doc__).split("\n\n")
    (code,) = [each for each in paragraphs if "\nassert " in "\n" + textwrap.dedent(each)]
    return textwrap.dedent(code)


WITH_EXAMPLES = ["capture_logs", "metric", "metric_change", "RecordedFacts", "CollectedSpans"]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_example_in_the_documentation_runs(name: str) -> None:
    registry = CollectorRegistry()
    dag = shop()
    executor = Executor(dag, config=ExecutorConfig(telemetry=Telemetry(registry=registry)))
    if name == "metric":
        executor.run_sync([{"order": 1}, {"order": 2}, {"order": 3}])
    code = example_of(getattr(helpers, name))

    def telemetry_of(**settings: Any) -> Telemetry:
        return Telemetry(registry=registry, **settings)

    names = {**vars(helpers), "executor": executor, "registry": registry, "dag": dag, "Telemetry": telemetry_of}
    exec(code, names | {"Executor": Executor, "ExecutorConfig": ExecutorConfig, "Tracing": Tracing})


def test_every_helper_has_an_example() -> None:
    without = {"Fact", "MetricChange"}  # what others give
    assert set(helpers.__all__) - without == set(WITH_EXAMPLES)


def test_capture_logs_restores_what_it_changed_even_after_an_error() -> None:
    before = LOGGER.handlers.copy(), LOGGER.level
    with pytest.raises(ZeroDivisionError), capture_logs("DEBUG"):
        _ = 1 / (not LOGGER.isEnabledFor(logging.DEBUG))

    assert (LOGGER.handlers, LOGGER.level) == before


def test_capture_logs_takes_any_logger() -> None:
    with capture_logs("INFO", "shop") as lines:
        logging.getLogger("shop.tasks").info("charged %s", 7, extra={"order": 7})
        logging.getLogger("other").error("not this")

    assert [(line["event"], line["level"], line["order"]) for line in lines] == [("charged 7", "info", 7)]


def test_metric_asks_for_labels_that_leave_one_sample() -> None:
    registry = CollectorRegistry()
    counter = Counter("orders", "Orders.", ["kind"], registry=registry)
    counter.labels("new").inc(2)
    counter.labels("old").inc()

    assert metric(registry, "orders_total", kind="new") == 2
    assert metric(registry, "orders_total", kind="none") is None
    with pytest.raises(ValueError, match="2 samples of orders_total"):
        metric(registry, "orders_total")


def test_recorded_facts_hears_every_fact_there_is() -> None:
    recorded = RecordedFacts()
    facts = Facts([recorded])

    assert [fact for fact in FACTS if getattr(facts, fact) is None] == []
    with pytest.raises(ValueError, match="no fact is called 'execution_ended'"):
        recorded.named("execution_ended")
    recorded.loop_lagged(0.5)
    assert recorded.named("loop_lagged")[0].arguments == (0.5,)
    recorded.clear()
    assert recorded.facts == []


def test_collected_spans_know_their_trace() -> None:
    spans = CollectedSpans()
    telemetry = Telemetry(registry=CollectorRegistry(), tracing=Tracing(processors=(spans,), sample=1.0))
    Executor(shop(), config=ExecutorConfig(telemetry=telemetry)).run_sync([{"order": 1}, {"order": 2}])

    first, second = spans.named("context shop")
    assert {span.name for span in spans.trace(first.context.trace_id)} == {"context shop", "execute charge"}
    assert first.context.trace_id != second.context.trace_id
    assert spans.parent_of(first) is None
    spans.clear()
    assert spans.spans == []
