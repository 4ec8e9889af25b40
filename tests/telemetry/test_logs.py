"""Which facts become which lines (TELEMETRY 5), told by a real run of the core to the observer that its level gets."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from obsdag.context import Context
from obsdag.core.observer import Facts, Observer
from obsdag.core.records import Stall
from obsdag.tasks.base import TaskConfig
from obsdag.telemetry.catalogue import EVENTS
from obsdag.telemetry.lines import LOGGER, Throttle, error_keys, is_heard, safe_text
from obsdag.telemetry.logs import PROGRESS_S, RECHECK_S, Logs
from obsdag.telemetry.selfstats import SelfStats
from obsdag.testing.telemetry import capture_logs
from tests.telemetry.corerun import CoreRun

HOT = (
    "execution_started",
    "execution_finished",
    "context_entered",
    "context_queued",
    "visit_started",
    "visit_finished",
)
PER_CONTEXT = (*HOT, "state_left", "context_finished", "tasks_bypassed")
Lines = list[dict[str, Any]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    with capture_logs("DEBUG") as captured:
        yield captured


def named(lines: Lines, event: str) -> Lines:
    return [line for line in lines if line["event"] == event]


def observed(logs: Logs, *tasks: str, **settings: Any) -> CoreRun:
    run = CoreRun(*tasks, **settings)
    return run.observe(logs.observer(run.state))


def tell_everything(logs: Logs) -> None:
    """Every fact that has a line, by a run of the core where that can be, else told as the shell does."""
    run = observed(logs, on_failure="raise", task=TaskConfig(retry_times=1))
    run.drive("good")
    task = run.state.plan.tasks[1]
    bad = run.enter("bad")
    run.fail(run.begin(bad), ValueError("first"), retry_in_s=1.0)
    run.leave(bad)
    run.now += 1.0
    run.state.wake(run.now)
    run.fail(run.begin(bad), ValueError("last"))
    run.leave(bad)
    empty = run.enter("empty")
    run.succeed(run.begin(empty), [])
    run.leave(empty)
    stall = Stall(empty, "store", ("load",), "nothing holds it")
    run.tell("context_stalled", empty, stall, run.now)
    run.tell("run_deadlocked", run.state, [stall], run.now)
    run.tell("limit_deferred", empty, task, "api", run.now)
    run.tell("tasks_bypassed", empty, 2, run.now)
    run.tell("pool_rebuilt", "process", "killed")
    run.tell("journal_recovered", 3, 2, 1, 0.5)
    run.tell("journal_left", 3)
    run.tell("journal_failed", OSError("the disk is full"))
    run.tell("thread_abandoned", "obsdag-thread-3", "load", 9.0)
    run.tell("task_restarted", task, "service", OSError("gone"))
    run.tell("loop_blocked", None, 0.7, "a.py:3 in f: g()")
    run.tell("submit_rejected", "queue_full", run.now)
    run.tell("observer_failed", Observer(), "execution_started", RuntimeError("bug"))
    run.tell("phase_changed", "draining", run.now)
    run.tell("drain_finished", {"cancelled": ["a", "b"]}, run.now)
    run.now += PROGRESS_S + 1
    run.tell("loop_lagged", 0.0)
    run.end("failed")


def test_each_event_of_the_catalogue_is_logged_at_its_level_with_its_keys(lines: Lines) -> None:
    tell_everything(Logs("orders"))

    said_elsewhere = {
        *("telemetry.labels_capped", "telemetry.collect_failed", "telemetry.multiprocess_ignored"),
    }
    levels = {spec.name: spec.level for spec in EVENTS if spec.name not in said_elsewhere}
    assert {line["event"]: line["level"] for line in lines} == levels
    optional = {"trace_id", "span_id", "suppressed", "error", "exc_info"}
    for spec in EVENTS:
        declared = {"event", "level", "engine", "dag", *spec.keys}
        for line in named(lines, spec.name):
            assert set(line) <= declared | optional, spec.name
            missing = declared - optional - set(line)
            assert missing <= OPTIONAL_KEYS.get(spec.name, set()), spec.name


ABSENT_OUTCOMES = {"output", "split", "merged", "dropped", "failed", "cancelled", "stalled"}
OPTIONAL_KEYS = {
    "context.entered": {"maker"},
    "context.destroyed": {"task"},
    "event_loop.blocked": {"context_id", "root_id", "task", "attempt", "worker"},
    "telemetry.dropping": {"observer", "fact", "error_type", "dropped", "totals"},
    "run.finished": ABSENT_OUTCOMES,
    "run.failed": ABSENT_OUTCOMES,
    "run.progress": ABSENT_OUTCOMES,
}


def test_every_line_says_whose_it_is(lines: Lines) -> None:
    def ids(context: Context | None, execution: object) -> tuple[str | None, str | None]:
        return ("0a" * 16, "0b" * 8 if execution is not None else None)

    run = observed(Logs("orders", trace_ids=ids))
    parent = run.enter("parent")
    child = parent.create_child(name="child")
    run.succeed(run.begin(parent, worker=2), child)
    run.tell("execution_started", run.go_on(child, worker=2), run.now)

    started = named(lines, "execution.started")[-1]
    whose = ("engine", "dag", "context_id", "root_id", "task", "attempt", "worker", "trace_id", "span_id")
    assert [started[key] for key in whose] == [
        *("orders", "etl", "child", "parent", "store", 1, 2, "0a" * 16, "0b" * 8),
    ]
    entered = named(lines, "context.entered")[0]
    assert entered["trace_id"] == "0a" * 16
    assert "span_id" not in entered


def test_run_finished_is_the_canonical_line(lines: Lines) -> None:
    run = observed(Logs("orders"))
    run.drive()
    run.drive(took_s=2.0)
    failing = run.enter()
    run.fail(run.begin(failing), ValueError("no"), took_s=0.25)
    run.leave(failing)
    run.end("failed")

    (line,) = named(lines, "run.finished")
    assert line["outcome"] == "failed"
    assert line["duration_s"] == pytest.approx(5.25)
    assert (line["entered"], line["output"], line["failed"]) == (3, 2, 1)
    assert "stalled" not in line
    assert (line["executions"], line["retries"]) == (5, 0)
    assert line["slowest"] == {"load": 2.75, "store": 2.5}
    assert not named(lines, "run.failed"), "a run that goes on past a failed context did not fail itself"


@pytest.mark.parametrize(("outcome", "on_failure"), [("failed", "raise"), ("deadline", "continue")])
def test_a_run_that_was_broken_off_failed(lines: Lines, outcome: str, on_failure: str) -> None:
    run = observed(Logs("orders"), on_failure=on_failure)
    run.end(outcome)

    (line,) = named(lines, "run.failed")
    assert (line["level"], line["outcome"]) == ("error", outcome)


def test_a_failure_is_told_once_with_its_exception(lines: Lines) -> None:
    run = observed(Logs("orders"))
    context = run.enter()
    error = ValueError("card refused")
    run.fail(run.begin(context), error)
    run.leave(context)

    (line,) = [line for line in lines if line["level"] in ("warning", "error")]
    assert line["event"] == "execution.failed"
    assert (line["error_type"], line["error"], line["attempt"]) == ("ValueError", "card refused", 1)
    assert line["duration_s"] == 0.5
    assert line["exc_info"][1] is error


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_exception_that_cannot_be_shown_harms_nothing(lines: Lines) -> None:
    run = observed(Logs("orders"))
    context = run.enter()
    run.fail(run.begin(context), Unspeakable())
    run.leave(context)

    assert named(lines, "execution.failed")[0]["error"] == "<Unspeakable, text not available: RuntimeError>"


# --- redaction


def hide(text: str) -> str:
    return text.replace("4711", "****")


def test_redact_covers_message_and_traceback(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    run = observed(Logs("orders", redact=hide))
    context = run.enter()
    try:
        raise ValueError("card 4711 refused")
    except ValueError as error:
        run.fail(run.begin(context), error)
    run.leave(context)

    (line,) = named(lines, "execution.failed")
    assert line["error"] == "card **** refused"
    assert "exc_info" not in line
    assert "ValueError: card **** refused" in line["exception"]
    assert "test_redact_covers" in line["exception"], "the traceback is still there"
    assert "4711" not in caplog.text.replace("raise ValueError", "")
    assert "card **** refused" in caplog.text


def test_a_redactor_that_raises_shows_nothing_of_the_text() -> None:
    def broken(text: str) -> str:
        raise KeyError("pattern")

    keys = error_keys(ValueError("4711"), broken, trace=True)

    assert not any("4711" in str(value) for value in keys.values())
    assert safe_text("x" * 5_000).endswith("... (5000 characters)")


# --- who is asked what


@pytest.mark.parametrize(
    ("level", "silent"), [("ERROR", PER_CONTEXT), ("WARNING", PER_CONTEXT), ("INFO", HOT), ("DEBUG", ())]
)
def test_what_cannot_log_is_not_told(level: str, silent: tuple[str, ...]) -> None:
    with capture_logs(level):
        run = CoreRun()
        facts = Facts([Logs("orders").observer(run.state)])

    assert [fact for fact in silent if getattr(facts, fact) is not None] == []
    assert facts.context_failed is not None
    assert (facts.execution_started is not None) == (level == "DEBUG")


def test_an_executor_without_telemetry_gets_warnings_and_errors_only(lines: Lines) -> None:
    tell_everything(Logs(warnings_only=True))

    assert {line["level"] for line in lines if line["event"] != "journal.recovered"} == {"warning", "error"}
    assert {line["engine"] for line in lines} == {"obsdag"}
    run = CoreRun()
    facts = Facts([Logs(warnings_only=True).observer(run.state)])
    assert [fact for fact in (*PER_CONTEXT, "loop_lagged") if getattr(facts, fact) is not None] == []


def test_a_level_changed_while_a_run_goes_on_takes_effect(lines: Lines) -> None:
    LOGGER.setLevel(logging.WARNING)
    run = observed(Logs("orders"))
    run.drive("before")
    assert lines == []

    LOGGER.setLevel(logging.DEBUG)
    run.now += RECHECK_S
    run.tell("loop_lagged", 0.0)
    run.drive("after")
    assert {line["context_id"] for line in named(lines, "execution.started")} == {"after"}

    LOGGER.setLevel(logging.ERROR)
    run.now += RECHECK_S
    run.tell("loop_lagged", 0.0)
    lines.clear()
    run.drive("last")
    assert lines == []
    assert run.state.facts.execution_started is None


def test_nobody_listening_is_found_out_before_a_line_is_made() -> None:
    handler, parent = logging.StreamHandler(), logging.getLogger()
    before, parent.handlers = parent.handlers, []
    try:
        assert not is_heard(logging.ERROR), "the null handler is no listener"
        handler.setLevel(logging.ERROR)
        parent.addHandler(handler)
        assert is_heard(logging.ERROR)
        assert not is_heard(logging.WARNING), "the only handler does not take warnings"
    finally:
        parent.handlers = before


def test_a_host_without_logging_sees_nothing_and_does_not_load_structlog() -> None:
    code = """
import sys
from tests.telemetry.corerun import CoreRun
from obsdag.telemetry.logs import Logs
run = CoreRun(); run.observe(Logs("orders").observer(run.state))
context = run.enter(); run.fail(run.begin(context), ValueError("x")); run.leave(context); run.end("failed")
print("structlog" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert (done.stdout, done.stderr) == ("False\n", "")


# --- throttling


def test_repeats_are_throttled_per_event_and_task_and_say_so(lines: Lines) -> None:
    run = observed(Logs("orders"))
    load, store = run.state.plan.tasks[1:3]
    context = run.enter()
    for _ in range(5):
        run.tell("context_dropped", context, load, run.now)
    run.tell("context_dropped", context, store, run.now)
    assert [(line["task"], line.get("suppressed")) for line in named(lines, "context.dropped")] == [
        ("load", None),
        ("store", None),
    ]

    run.now += 61.0
    run.tell("context_dropped", context, load, run.now)
    assert named(lines, "context.dropped")[-1]["suppressed"] == 4
    run.end()
    assert named(lines, "run.finished")[0]["suppressed"] == 4


def test_runs_of_one_telemetry_share_the_throttle_and_dags_do_not(lines: Lines) -> None:
    logs = Logs("orders")
    for dag in ("etl", "etl", "other"):
        run = observed(logs, dag=dag)
        run.tell("context_dropped", run.enter(), run.state.plan.tasks[1], run.now)

    assert [line["dag"] for line in named(lines, "context.dropped")] == ["etl", "other"]


def test_dropping_on_purpose_is_not_a_warning(lines: Lines) -> None:
    run = observed(Logs("orders"), task=TaskConfig(may_drop=True))
    context = run.enter()
    run.succeed(run.begin(context), [])
    run.leave(context)

    assert context.outcome == "dropped"
    assert not named(lines, "context.dropped")


def test_ended_roots_are_sampled_by_outcome_and_second(lines: Lines) -> None:
    run = observed(Logs("orders"))
    for _ in range(4):
        run.drive(took_s=0.01)
    run.now += 1.0
    last = run.drive(took_s=0.01)

    first, second = named(lines, "context.finished")
    assert "suppressed" not in first
    assert second["suppressed"] == 3
    assert second["context_id"] == last.id
    assert second["duration_s"] == pytest.approx(sum(last.ledger.values()))
    assert second["ledger"]["running"] == pytest.approx(0.02)


def test_progress_is_told_now_and_then(lines: Lines) -> None:
    run = observed(Logs("orders"))
    run.drive()
    run.enter()
    for _ in range(40):
        run.now += 0.5
        run.tell("loop_lagged", 0.001)

    progress = named(lines, "run.progress")
    assert len(progress) == 20.0 // PROGRESS_S
    assert (progress[0]["living"], progress[0]["output"], progress[0]["queue"]["new"]) == (1, 1, 1)
    assert progress[0]["states"] == {"queued": 1}


def test_what_telemetry_loses_is_told_once_per_interval(lines: Lines) -> None:
    stats = SelfStats()
    run = observed(Logs("orders", stats=stats))
    for lost in (3, 4, 0):
        stats.drop("traces", "queue_full", lost)
        run.now += RECHECK_S
        run.tell("loop_lagged", 0.0)
    assert [line["dropped"] for line in named(lines, "telemetry.dropping")] == [3]

    run.now += 30.0
    run.tell("loop_lagged", 0.0)
    last = named(lines, "telemetry.dropping")[-1]
    assert (last["dropped"], last["totals"]) == (4, {"traces.queue_full": 7})


def test_a_handler_that_raises_loses_its_line_and_no_other(lines: Lines) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        if record.__dict__["event"] == "run.started":
            raise RuntimeError("a filter of the host's")
        return True

    stats = SelfStats()
    LOGGER.addFilter(refuse)
    try:
        run = observed(Logs("orders", stats=stats))
        run.drive()
        run.end()
    finally:
        LOGGER.removeFilter(refuse)

    assert stats.parts["etl"].dropped["logs", "export_failed"] == 1
    assert [line["event"] for line in lines][-2:] == ["telemetry.dropping", "run.finished"]
    assert run.state.facts.failures == 0
    assert stats.seconds["logs"] > 0.0


def test_the_throttle_stays_bounded_and_survives_a_clock_that_goes_back() -> None:
    throttle = Throttle({None: (1, 10.0)})
    for number in range(25_000):
        throttle.admit("event", f"dag-{number}", "task", 0.0)
    assert len(throttle._windows) <= 10_000

    assert throttle.admit("event", "dag", "task", 100.0) == 0
    assert throttle.admit("event", "dag", "task", 100.0) is None
    assert throttle.admit("event", "dag", "task", 50.0) == 1


def test_a_long_manifest_is_cut_and_says_by_how_much(lines: Lines) -> None:
    run = observed(Logs("orders"))
    run.tell("drain_finished", {"cancelled": [f"c{number}" for number in range(50)], "why": OSError("x")}, run.now)

    manifest = named(lines, "drain.finished")[0]["manifest"]
    assert manifest["cancelled"][19:] == ["c19", "... 30 more"]
    assert manifest["why"] == "x"


def test_other_parts_of_telemetry_speak_as_the_engine(lines: Lines) -> None:
    Logs("orders").say("telemetry.labels_capped", dag="etl", label="task", cap=200)

    assert lines == [
        {
            "event": "telemetry.labels_capped",
            "level": "warning",
            "engine": "orders",
            "dag": "etl",
            "label": "task",
            "cap": 200,
        }
    ]
    with pytest.raises(KeyError):
        Logs("orders").say("no.event")
