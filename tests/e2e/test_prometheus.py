"""A real Prometheus scrapes the running demo service: every panel and rule has data, alerts reach a webhook.

The tests of this module share one demo service, Prometheus, Alertmanager and OTLP receiver, and run in order:
trouble is made once, early, so that what is about trouble has something to show; the last one ends the service.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import pytest

from obsdag.dashboards import folder
from obsdag.dashboards.rules import ALERTS, RECORDINGS, Alert, Recording
from obsdag.telemetry.catalogue import METRICS, MetricSpec
from tests.dashboards.queries import Target, substituted, targets
from tests.e2e.servers import (
    SHORT,
    Demo,
    Prometheus,
    Webhook,
    alertmanager,
    demo,
    faster,
    missing,
    prometheus,
    until,
    webhook,
)
from tests.otlp_receiver import OtlpReceiver

ABSENT = missing("prometheus", "promtool", "prometheus-alertmanager")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(ABSENT), reason=ABSENT),
    pytest.mark.leaves("threads", "the module's servers answer while tests begin and end"),
    pytest.mark.leaves("files", "the same: their connections"),
]

WINDOW = "4s"
"""Grafana puts four scrape intervals for $__rate_interval, which would be 2 s; machines are late at times."""

MAKES = {
    "deadlock": ["ObsdagDeadlock"],
    "broken_pool": ["ObsdagPoolBroken"],
    "drops": ["ObsdagTelemetryDropping"],
    "block": ["ObsdagEventLoopBlocked"],
    "outage": ["ObsdagTaskFailureRatioHigh", "ObsdagRetryStorm"],
    "restart": [],
    "reject": ["ObsdagSubmitRejected"],
    "vanish": ["ObsdagGCDestroysUnexpected"],
}
"""Each trouble of the demo service, and the alerts that fire on it."""

SHOWS = [
    ("contexts", "Deadlocks"),
    ("overview", "Runs that ended"),
    ("engine", "Workers that died"),
    ("engine", "Lost"),
    ("engine", "Made anew"),
    ("engine", "Turned away"),
    ("engine", "Lag of the event loop"),
    ("engine", "Commits, by time"),
    ("engine", "Rows committed"),
    ("engine", "Rows per commit"),
    ("tasks", "Share of attempts that failed"),
    ("tasks", "Failures for good, by type"),
    ("tasks", "Retries"),
    ("overview", "Share of roots that failed"),
    ("overview", "Alerts firing"),
    ("contexts", "Ended by garbage collection"),
    ("contexts", "Deferrals"),
    ("contexts", "Wait for a permit, 99th percentile"),
]
"""Panels that are about trouble: something else than zero once it was made."""


class Stack(NamedTuple):
    """What runs, and when trouble was first made (Unix time)."""

    demo: Demo
    prometheus: Prometheus
    hook: Webhook
    spans: OtlpReceiver


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    place = tmp_path_factory.mktemp("stack")
    with ExitStack() as running:
        spans = running.enter_context(OtlpReceiver())
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": spans.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        service = running.enter_context(demo(place / "demo", f"--journal={place / 'shop.db'}", **endpoint))
        hook = running.enter_context(webhook(service.alerts_url))
        manager = running.enter_context(alertmanager(place / "alertmanager", hook.url))
        server = running.enter_context(prometheus(place / "prometheus", service.address, manager))
        until(lambda: server.now("up == 1"), "the first scrape")
        yield Stack(service, server, hook, spans)


@pytest.fixture(scope="module")
def troubled(stack: Stack) -> Stack:
    """The same once every trouble was made and noticed: it shows in counters that were scraped before, at zero."""
    assert set(stack.demo.troubles) == set(MAKES)
    # The alert on new drops wants to have seen the task at work before (an hour ago, here 20 s).
    until(lambda: stack.prometheus.now(f"obsdag_task_executions_total offset {SHORT['1h']}"), "20 s of work", 40.0)
    for trouble in MAKES:
        assert stack.demo.make(trouble) == 204
    assert stack.demo.make("nothing_of_that_name") == 404
    until(lambda: stack.prometheus.now("sum (obsdag_restarts_total) > 0"), "trouble")
    time.sleep(3)  # what came of it is scraped, and rates have two samples of it
    return stack


# --- quiet


def test_a_scrape_is_clean(stack: Stack) -> None:
    text = stack.demo.scrape()

    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert text.count("# TYPE obsdag_") == len(METRICS)


def test_the_shipped_configuration_scrapes_it(stack: Stack) -> None:
    (target,) = stack.prometheus.api("targets")["activeTargets"]

    assert (target["labels"], target["health"], target["lastError"]) == (
        {"instance": stack.demo.address, "job": "obsdag"},
        "up",
        "",
    )
    metadata = stack.prometheus.api("metadata")
    for spec in METRICS:
        assert [each["help"] for each in metadata[spec.family]] == [spec.help]


# --- trouble


@pytest.mark.parametrize("target", targets(), ids=lambda each: each.label)
def test_every_panel_has_data(target: Target, troubled: Stack) -> None:
    expr = substituted(target.expr, WINDOW)

    found = until(lambda: troubled.prometheus.lately(expr), f"data for {expr}")

    if (target.board, target.panel["title"]) in SHOWS:
        until(lambda: any(max(each) > 0 for each in troubled.prometheus.lately(expr)), f"trouble in {expr}")
    assert all(value > -1e-9 for each in found for value in each)


def test_panels_that_are_about_trouble_are_known() -> None:
    assert set(SHOWS) <= {(each.board, each.panel["title"]) for each in targets()}


@pytest.mark.parametrize("name", ["job", "instance", "engine", "dag", "task"])
def test_variables_have_values(name: str, troubled: Stack) -> None:
    values = set(troubled.prometheus.api(f"label/{name}/values"))

    known = {"job": {"obsdag"}, "instance": {troubled.demo.address}, "engine": {"shop", "back-office"}}
    known |= {"dag": {"orders", "settlement"}, "task": {"receive", "price", "assemble", "pages", "book"}}
    assert known[name] <= values


def test_one_engine_can_be_looked_at_alone(troubled: Stack) -> None:
    chosen = {"job": ".*", "instance": ".*", "engine": "back-office", "dag": "settlement", "task": ".*"}
    for target in targets():
        if target.panel["title"] == "Executions, by outcome":
            names = {
                each["metric"]["task"] for each in troubled.prometheus.now(substituted(target.expr, WINDOW, chosen))
            }
            assert names == {"pages", "approve", "book"}


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda each: each.record)
def test_every_recording_rule_has_data(recording: Recording, troubled: Stack) -> None:
    until(lambda: troubled.prometheus.lately(recording.record), recording.record)
    until(lambda: troubled.prometheus.lately(recording.expr), f"{recording.record} with its own windows")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda each: each.name)
def test_every_condition_of_every_alert_compares_something(alert: Alert, troubled: Stack) -> None:
    for condition in alert.conditions:
        expr = faster(condition.expr)
        until(partial(troubled.prometheus.lately, expr), expr)
    troubled.prometheus.now(alert.expr)  # as it is shipped, it is valid to this server as well


def test_rules_are_evaluated_without_errors(troubled: Stack) -> None:
    rules = [rule for group in troubled.prometheus.api("rules")["groups"] for rule in group["rules"]]

    assert {rule["name"] for rule in rules} == {each.record for each in RECORDINGS} | {each.name for each in ALERTS}
    assert {rule["health"] for rule in rules} == {"ok"}


@pytest.mark.parametrize("spec", [each for each in METRICS if each.exemplars], ids=lambda each: each.name)
def test_exemplars_can_be_read_back_and_lead_to_exported_traces(spec: MetricSpec, troubled: Stack) -> None:
    panels = [each for each in targets() if f"{spec.name}_bucket" in each.expr and each.query.get("exemplar")]
    assert panels
    for target in panels:
        expr = substituted(target.expr, WINDOW)
        found = until(partial(troubled.prometheus.exemplars, expr), f"exemplars for {expr}")
        spans = {(span.trace_id, span.span_id) for span in troubled.spans.spans}
        for each in found:
            assert set(each["labels"]) == {"trace_id", "span_id"}
        led = [each for each in found if (each["labels"]["trace_id"], each["labels"]["span_id"]) in spans]
        assert len(led) >= 0.9 * len(found), "spans are exported in batches, 0.2 s after"


# --- alerts, all the way


@pytest.mark.parametrize("name", [name for names in MAKES.values() for name in names])
def test_trouble_fires_an_alert_that_comes_to_the_webhook(name: str, troubled: Stack) -> None:
    (trouble,) = [each for each, names in MAKES.items() if name in names]
    if not troubled.hook.alerts(name):
        troubled.demo.make(trouble)  # windows are short here: it may have passed before the alert was due

    alert = until(lambda: troubled.hook.alerts(name), f"{name} at the webhook", 30.0)[0]

    (declared,) = [each for each in ALERTS if each.name == name]
    assert alert["labels"]["severity"] == declared.severity
    assert alert["labels"]["job"] == "obsdag"
    assert alert["labels"]["engine"] in ("shop", "back-office")
    assert alert["annotations"]["summary"].startswith(alert["labels"]["engine"])
    assert "{{" not in alert["annotations"]["summary"] + alert["annotations"]["description"]
    place, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert f'<a id="{anchor}"></a>{name}' in (folder().parent / place).read_text()


def test_an_alert_is_over_when_the_trouble_is(troubled: Stack) -> None:
    until(lambda: troubled.hook.alerts("ObsdagDeadlock", "resolved"), "the end of the alert", 40.0)


def test_the_demo_service_logs_what_it_is_notified_of(troubled: Stack) -> None:
    until(lambda: troubled.demo.lines("alert ObsdagDeadlock is firing"), "the line")


def test_nothing_else_fires(troubled: Stack) -> None:
    fired = {alert["labels"]["alertname"] for each in troubled.hook.notifications for alert in each["alerts"]}

    assert fired == {name for names in MAKES.values() for name in names}


def test_a_service_that_ends_is_noticed(troubled: Stack) -> None:
    troubled.demo.process.send_signal(signal.SIGTERM)
    status = troubled.demo.process.wait(20)

    alert = until(lambda: troubled.hook.alerts("ObsdagTargetDown"), "the alert", 30.0)[0]

    assert status == 0
    assert troubled.demo.lines("drain.finished")
    assert alert["labels"]["instance"] == troubled.demo.address
    assert "Traceback" not in re.sub(r"^\{.*$", "", troubled.demo.log.read_text(), flags=re.MULTILINE)


def test_rules_differ_from_the_shipped_ones_in_times_only() -> None:
    for file in (folder() / "prometheus" / "rules").glob("*.yml"):
        times = re.compile(r"\[\w+\]|offset \w+|for: \w+")
        assert times.sub("", faster(file.read_text())) == times.sub("", file.read_text())


def test_the_programs_are_those_that_the_build_installs() -> None:
    text = (folder().parent / ".ci" / "run").read_text()

    for program in ("prometheus", "prometheus-alertmanager"):
        assert shutil.which(program)
        assert f"command -v {program}" in text
