"""The catalogue: complete, consistent with the closed sets and facts of the core, and printable."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from obsdag.core.observer import FACTS
from obsdag.core.states import GC_REASONS, OUTCOMES, STATES
from obsdag.telemetry import catalogue
from obsdag.telemetry.catalogue import ATTRIBUTES, EVENTS, METRICS, OTHER, SPANS, Label, MetricSpec

PROMISED = [
    "obsdag_build_info",
    "obsdag_capacity",
    "obsdag_queue_contexts",
    "obsdag_queue_wait_seconds",
    "obsdag_workers",
    "obsdag_worker_busy_seconds_total",
    "obsdag_contexts",
    "obsdag_contexts_entered_total",
    "obsdag_contexts_finished_total",
    "obsdag_unaccounted_contexts",
    "obsdag_root_seconds",
    "obsdag_ledger_seconds_total",
    "obsdag_oldest_context_timestamp_seconds",
    "obsdag_task_executions_total",
    "obsdag_task_retries_total",
    "obsdag_task_failures_total",
    "obsdag_task_seconds",
    "obsdag_task_running",
    "obsdag_critical_seconds_total",
    "obsdag_retry_timers",
    "obsdag_limit_deferrals_total",
    "obsdag_limit_wait_seconds",
    "obsdag_limit_waiting",
    "obsdag_join_wait_seconds",
    "obsdag_joins_pending",
    "obsdag_loop_items_total",
    "obsdag_bypassed_tasks_total",
    "obsdag_gc_destroyed_total",
    "obsdag_deadlocks_total",
    "obsdag_runs_total",
    "obsdag_runs_active",
    "obsdag_pool_workers",
    "obsdag_pool_queued",
    "obsdag_pool_broken_total",
    "obsdag_threads_abandoned",
    "obsdag_restarts_total",
    "obsdag_pending_contexts",
    "obsdag_submit_seconds",
    "obsdag_submit_rejected_total",
    "obsdag_results_expired_total",
    "obsdag_phase",
    "obsdag_event_loop_lag_seconds",
    "obsdag_telemetry_dropped_total",
    "obsdag_telemetry_spans_buffered",
    "obsdag_telemetry_seconds_total",
    "obsdag_collect_seconds",
    "obsdag_collect_errors_total",
    "obsdag_traces_total",
    "obsdag_journal_commit_seconds",
    "obsdag_journal_rows_total",
    "obsdag_journal_inbox_rows",
    "obsdag_journal_recovered_total",
    "obsdag_journal_replayed_total",
    "obsdag_journal_dead_letters_total",
]
"""The public names, written a second time on purpose: a change of one breaks dashboards and must be meant."""


def test_the_public_metric_names_are_those_promised() -> None:
    assert [spec.name for spec in METRICS] == PROMISED


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_each_metric_keeps_the_conventions(spec: MetricSpec) -> None:
    assert spec.name.endswith("_total") == (spec.kind == "counter")
    assert spec.name.endswith("_info") == (spec.kind == "info")
    assert ("_seconds" in spec.name) == (spec.unit == "seconds")
    assert spec.help.endswith(".")
    assert spec.help[0].isupper()
    assert not {"engine", "dag", "le"} & set(spec.label_names()), "these are on every metric anyway"
    assert spec.kind == "histogram" or not spec.exemplars


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_each_source_is_a_fact_or_a_scrape(spec: MetricSpec) -> None:
    assert set(spec.source.split(", ")) <= {*FACTS, "scrape", "SelfStats"}


def test_label_values_are_the_closed_sets_of_the_core() -> None:
    assert _values("obsdag_contexts", "state") == STATES
    assert _values("obsdag_contexts_finished_total", "outcome") == OUTCOMES
    assert _values("obsdag_gc_destroyed_total", "reason") == GC_REASONS


def _values(metric: str, label: str) -> tuple[str, ...]:
    return next(each.values for each in catalogue.metric(metric).labels if each.name == label)


def test_low_cardinality_leaves_task_out_and_nothing_else() -> None:
    executions = catalogue.metric("obsdag_task_executions_total")

    assert executions.label_names() == ("task", "outcome")
    assert executions.label_names(low=True) == ("outcome",)
    assert list(executions.closed_label_sets()) == []
    assert ("success",) in list(executions.closed_label_sets(low=True))


def test_every_combination_of_closed_labels_is_listed() -> None:
    spec = MetricSpec("obsdag_x", "gauge", "X.", (Label("a", ("1", "2")), Label("b", ("3",))))

    assert list(spec.closed_label_sets()) == [("1", "3"), ("2", "3")]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
def test_each_log_event_is_noun_dot_verb_with_safe_keys(event: catalogue.EventSpec) -> None:
    assert re.fullmatch(r"[a-z_]+\.[a-z_]+", event.name)
    assert event.source in ("", *FACTS)
    assert not {"name", "args", "module", "msg", "message", "engine", "dag"} & set(event.keys)


def test_names_are_declared_once() -> None:
    for names in (
        [m.name for m in METRICS],
        [e.name for e in EVENTS],
        [a.key for a in ATTRIBUTES],
        [s.name for s in SPANS],
    ):
        assert len(names) == len(set(names))


def test_spans_carry_declared_attributes_and_links() -> None:
    keys = {attribute.key for attribute in ATTRIBUTES}
    links = next(attribute.values for attribute in ATTRIBUTES if attribute.key == "obsdag.link.type")

    for span in SPANS:
        assert set(span.attributes) <= keys
        assert set(span.links) <= set(links)


def test_the_documentation_is_the_catalogue() -> None:
    written = (Path(__file__).parents[2] / "dashboards" / "TELEMETRY.md").read_text(encoding="utf-8")

    assert written == catalogue.reference(), "run: python -m obsdag.telemetry.catalogue > dashboards/TELEMETRY.md"


def test_what_does_not_exist_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="obsdag_nothing"):
        catalogue.metric("obsdag_nothing")
    with pytest.raises(KeyError, match=r"nothing\.happened"):
        catalogue.event("nothing.happened")


def test_error_types_carry_their_module_unless_they_are_built_in() -> None:
    assert catalogue.error_type_of(ValueError("x")) == "ValueError"
    assert catalogue.error_type_of(re.error("x")).endswith((".error", ".PatternError"))


def test_the_reference_shows_every_name_in_well_formed_tables() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "obsdag.telemetry.catalogue"], capture_output=True, text=True, check=True, timeout=60
    )

    for name in (*PROMISED, *(e.name for e in EVENTS), *(a.key for a in ATTRIBUTES), *(s.name for s in SPANS), OTHER):
        assert f"`{name}`" in done.stdout
    tables = [block for block in done.stdout.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_every_metric_says_what_a_bad_value_means(spec: MetricSpec) -> None:
    assert spec.kind == "info" or spec.bad.endswith(".")
