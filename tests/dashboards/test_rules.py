"""Rules and alerts: promtool accepts them, each alert fires when it must and only then, the runbook tells of each."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from obsdag.dashboards import folder
from obsdag.dashboards.rules import ALERTS, RECORDINGS, Alert
from obsdag.telemetry.catalogue import METRICS, metric
from tests.dashboards.queries import FOREIGN, NAME, metrics_in

FOLDER = folder() / "prometheus"
RULES = FOLDER / "rules"
TESTS = FOLDER / "tests" / "alerts_test.yml"
WANTED = (
    *("TargetDown", "NoProgress", "Deadlock", "Unaccounted", "TaskFailureRatioHigh", "RetryStorm", "QueueWaitHigh"),
    *("WorkersSaturated", "EventLoopBlocked", "ContextStuck", "ContextLeak", "GCDestroysUnexpected", "LimitWaitHigh"),
    *("SubmitRejected", "DrainOverrun", "PoolBroken", "TelemetryDropping", "CollectErrors"),
)
RECORDED = {each.record for each in RECORDINGS}
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus"
)


def _promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


def _expressions() -> list[Any]:
    found = [pytest.param(each.expr, id=each.record) for each in RECORDINGS]
    found += [pytest.param(each.expr, id=each.name) for each in ALERTS]
    found += [pytest.param(c.expr, id=f"{each.name}-{at}") for each in ALERTS for at, c in enumerate(each.conditions)]
    return found


def test_the_alerts_are_those_promised() -> None:
    assert tuple(each.name.removeprefix("Obsdag") for each in ALERTS) == WANTED
    assert all(each.name.startswith("Obsdag") for each in ALERTS)
    assert all(re.fullmatch(r"obsdag:\w+:\w+", each) for each in RECORDED)


@pytest.mark.parametrize("expr", _expressions())
def test_rules_read_known_metrics_with_known_labels(expr: str) -> None:
    for name, labels in metrics_in(expr):
        if name in FOREIGN or name in RECORDED:
            continue
        spec = metric(name if name in {each.name for each in METRICS} else NAME.sub("", name))
        assert labels <= {"le", "engine", "dag", *spec.label_names()}, name


@pytest.mark.parametrize("alert", ALERTS, ids=lambda each: each.name)
def test_each_alert_is_told_of_in_the_runbook(alert: Alert) -> None:
    lines = (folder() / "RUNBOOK.md").read_text().splitlines()
    (line,) = [each for each in lines if f'id="{alert.anchor}"' in each]
    cells = [each.strip().replace("\\|", "|") for each in re.split(r"(?<!\\)\|", line)[1:-1]]

    assert len(cells) == 7
    assert cells[0].endswith(alert.name)
    assert cells[1] == f"`{' '.join(alert.expr.split())}`"
    assert cells[2:4] == [f"{alert.for_s} s", alert.severity]
    assert all(len(cell) >= 5 for cell in cells[4:])
    assert alert.severity in ("critical", "warning")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda each: each.name)
def test_texts_use_only_labels_that_the_alert_has(alert: Alert) -> None:
    used = set(re.findall(r"\$labels\.(\w+)", alert.summary))
    kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", alert.conditions[0].expr))))
    if alert.conditions[0].expr.startswith("obsdag:"):
        (record,) = [each for each in RECORDINGS if each.record == alert.conditions[0].expr.split("[")[0].split()[0]]
        kept |= set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", record.expr))))

    assert used <= kept | {"job", "instance"}


@needs_promtool
def test_promtool_accepts_rules_and_configuration(tmp_path: Path) -> None:
    shutil.copytree(RULES, tmp_path / "rules")
    text = (FOLDER / "prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus/", ""))

    rules = _promtool("check", "rules", "--lint-fatal", *sorted(RULES.glob("*.yml")))
    config = _promtool("check", "config", "--lint-fatal", tmp_path / "prometheus.yml")

    assert (rules.returncode, rules.stderr) == (0, "")
    assert f"{len(ALERTS)} rules found" in rules.stdout
    assert (config.returncode, config.stderr) == (0, "")
    assert "2 rule files found" in config.stdout


@pytest.mark.skipif(
    shutil.which("amtool") is None, reason="amtool is not installed: apt-get install prometheus-alertmanager"
)
def test_amtool_accepts_the_configuration_of_the_alertmanager() -> None:
    file = folder() / "alertmanager" / "alertmanager.yml"
    done = subprocess.run(["amtool", "check-config", file], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@needs_promtool
def test_alerts_fire_when_they_must_and_only_then() -> None:
    done = _promtool("test", "rules", TESTS)

    assert done.returncode == 0, done.stdout + done.stderr


def _cases(alert: str) -> dict[str, Any]:
    tests = yaml.load(TESTS.read_text(), Loader=yaml.BaseLoader)["tests"]  # to others, 0x30 is a hexadecimal number
    (found,) = [each for each in tests if each["name"] == alert]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("alert", ALERTS, ids=lambda each: each.name)
def test_each_alert_has_a_case_that_fires_a_quiet_one_and_a_false_alarm(alert: Alert) -> None:
    test = _cases(alert.name)
    series = " ".join(each["series"] for each in test["input_series"])
    first = test["promql_expr_test"][0]

    for case in ("fires", "quiet", "false_alarm"):
        assert re.search(rf'(dag|instance)="{case}"', series), f"there is no case {case!r}"
    assert f'alertname="{alert.name}", alertstate="firing"' in first["expr"]
    assert [re.findall(r'"(\w+)"', each["labels"]) for each in first["exp_samples"]] == [["fires"]]


MUTANTS = [
    pytest.param(alert, left_out, id=f"{alert.name}-{'for' if left_out is None else left_out}")
    for alert in ALERTS
    for left_out in (
        *(range(len(alert.conditions)) if len(alert.conditions) > 1 else ()),
        *([None] if alert.for_s else []),
    )
]


@needs_promtool
@pytest.mark.slow
@pytest.mark.parametrize(("alert", "left_out"), MUTANTS)
def test_nothing_of_an_alert_can_be_left_out_unnoticed(alert: Alert, left_out: int | None, tmp_path: Path) -> None:
    """Each condition, and the time it must hold, is what keeps a quiet case or a false alarm quiet."""
    rules = yaml.safe_load((RULES / "alerts.yml").read_text())
    (rule,) = [each for each in rules["groups"][0]["rules"] if each["alert"] == alert.name]
    if left_out is None:
        rule["for"] = "0s"
    else:
        kept = [each for at, each in enumerate(alert.conditions) if at != left_out]
        rule["expr"] = "\n".join([kept[0].text, *(f"{each.joiner} {each.text}" for each in kept[1:])])
    test = {**_cases(alert.name), "name": "mutant"}
    shutil.copy(RULES / "recordings.yml", tmp_path)
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    files = {"rule_files": ["recordings.yml", "alerts.yml"], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(files))

    done = _promtool("test", "rules", tmp_path / "test.yml")

    assert done.returncode == 1, "the tests of this alert do not need this part of it"
    assert "FAILED" in done.stdout + done.stderr
