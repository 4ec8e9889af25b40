"""Each host of `obsdag.examples.hosts`, as a program of its own: what it says it sees is what it sees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from obsdag import examples
from obsdag.examples import hosts

LINES = ["run.started", "context.finished", "execution.failed", "context.finished", "run.finished"]


def ran(name: str) -> str:
    root = Path(examples.__path__[0]).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "obsdag.examples.hosts", name],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_each_host_is_told_of_and_tested() -> None:
    assert set(hosts.HOSTS) == {"basic", "json", "structlog", "plain", "uvicorn", "provider", "held", "alone"}
    assert all(f"\n{name} " in (hosts.__doc__ or "") for name in hosts.HOSTS)


def test_without_a_name_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert hosts.main([]) == 0
    assert hosts.main(["nobody"]) == 2
    assert "uvicorn's defaults" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "level"), [("basic", "INFO obsdag "), ("uvicorn", "INFO:     ")])
def test_text_has_the_keys_in_the_message(name: str, level: str) -> None:
    lines = ran(name).splitlines()

    assert lines[0].startswith(f"{level}run.started engine=shop dag=orders run_id=")
    assert lines[-1].startswith(f"{level}run.finished engine=shop dag=orders")
    (failed,) = [line for line in lines if "execution.failed" in line]
    assert failed.startswith("ERROR")
    assert "task=charge attempt=1 worker=0" in failed
    assert failed.endswith("error_type=ValueError error='card refused'")
    assert lines.count("ValueError: card refused") == 1  # the traceback, once


@pytest.mark.parametrize("name", ["json", "structlog"])
def test_json_has_the_bare_event_and_keys(name: str) -> None:
    lines = [json.loads(line) for line in ran(name).splitlines()]

    assert [line["event"] for line in lines] == LINES
    assert {(line["engine"], line["dag"]) for line in lines} == {("shop", "orders")}
    assert (lines[2]["task"], lines[2]["error_type"], lines[2]["error"]) == ("charge", "ValueError", "card refused")
    assert (lines[-1]["outcome"], lines[-1]["failed"], lines[-1]["executions"]) == ("failed", 1, 2)


def test_without_extra_adder_all_is_in_the_event() -> None:
    lines = [json.loads(line) for line in ran("plain").splitlines()]

    assert [line["event"].split()[0] for line in lines] == LINES
    assert "task=charge attempt=1" in lines[2]["event"]
    assert lines[2]["exception"].endswith("ValueError: card refused")


def test_the_hosts_own_provider_gets_all_of_it_live() -> None:
    assert ran("provider").splitlines() == [
        "run orders  (obsdag) ERROR",
        "context orders  (obsdag) UNSET",
        "  execute charge  (obsdag) UNSET",
        "    ask the bank  (shop) UNSET",
        "context orders  (obsdag) ERROR",
        "  execute charge  (obsdag) ERROR",
        "    ask the bank  (shop) ERROR",
    ]


def test_held_spans_follow_the_decision_that_only_the_failed_order_is_kept() -> None:
    assert ran("held").splitlines() == [
        "run orders  (obsdag) ERROR",
        "context orders  (obsdag) ERROR",
        "  execute charge  (obsdag) ERROR",
        "    ask the bank  (shop) ERROR",
    ]


def test_without_a_provider_the_traces_are_obsdags_own() -> None:
    assert ran("alone").splitlines() == [
        "run orders  (obsdag) ERROR",
        "context orders  (obsdag) UNSET",
        "  execute charge  (obsdag) UNSET",
        "context orders  (obsdag) ERROR",
        "  execute charge  (obsdag) ERROR",
    ]
