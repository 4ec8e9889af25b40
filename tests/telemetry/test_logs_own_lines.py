"""Users' own lines inside tasks carry the execution's keys; `configure` sets up a script's logging (TELEMETRY 5)."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry

import obsdag.logs
from obsdag.config import ExecutorConfig
from obsdag.context import Context
from obsdag.core.observer import Facts
from obsdag.core.records import current_execution
from obsdag.errors import ConfigError
from obsdag.executor import Executor
from obsdag.graph import DAG
from obsdag.telemetry import Telemetry, current, default_observers
from obsdag.telemetry.lines import LOGGER
from obsdag.telemetry.tracing import Tracing
from obsdag.testing.telemetry import CollectedSpans
from tests.telemetry.corerun import CoreRun

mine = logging.getLogger("shop.tasks")


@pytest.fixture(autouse=True)
def _undo() -> Iterator[None]:
    root, asked = logging.getLogger(), current._asked.copy()
    level, handlers = root.level, [each for each in root.handlers if type(each).__module__.startswith("_pytest")]
    yield
    for handler in [each for each in root.handlers if each not in handlers]:
        if not type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)
    root.setLevel(level)
    LOGGER.setLevel(logging.NOTSET)
    mine.setLevel(logging.NOTSET)
    current._asked[:] = asked


def shop(log: Any = mine.warning) -> DAG:
    dag = DAG("shop")

    @dag.task()
    async def load(ctx: Context) -> list[Context]:
        log("in the loop")
        return [ctx.create_child(name="item")]

    @dag.task(after="load", retry_times=1)
    async def parse(ctx: Context) -> Context:
        await asyncio.sleep(0)
        log("in the loop, later")
        if ctx.attempt == 1:
            raise ValueError("again")
        return ctx

    @dag.task(after="parse")
    def store(ctx: Context) -> Context:
        log("in a thread")
        return ctx

    return dag


def run(dag: DAG, telemetry: Telemetry | None) -> None:
    Executor(dag, config=ExecutorConfig(telemetry=telemetry)).run_sync(Context(name="order"))


def traced(spans: CollectedSpans) -> Telemetry:
    return Telemetry("orders", CollectorRegistry(), tracing=Tracing(processors=(spans,), sample=1.0))


EXPECTED = [
    ("in the loop", "load", 1, "order", "order"),
    ("in the loop, later", "parse", 1, "item", "order"),
    ("in the loop, later", "parse", 2, "item", "order"),
    ("in a thread", "store", 1, "item", "order"),
]


def test_a_stdlib_line_has_task_context_and_trace_in_threads_too() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    handler.addFilter(obsdag.logs.ContextFilter())
    mine.addHandler(handler)
    spans = CollectedSpans()
    try:
        run(shop(), traced(spans))
        mine.warning("outside")
    finally:
        mine.removeHandler(handler)

    *inside, outside = [record.__dict__ for record in records]
    assert [(r["msg"], r["task"], r["attempt"], r["context_id"], r["root_id"]) for r in inside] == EXPECTED
    assert {(r["engine"], r["dag"], r["worker"]) for r in inside} == {("orders", "shop", 0)}
    executions = {f"{span.context.span_id:016x}": span for span in spans.spans}
    for record in inside:
        span = executions[record["span_id"]]
        assert span.name == f"execute {record['task']}"
        assert f"{span.context.trace_id:032x}" == record["trace_id"]
    assert "task" not in outside


def test_a_structlog_line_has_them_and_keeps_its_own_keys() -> None:
    output: list[dict[str, Any]] = []

    def collect(_: Any, __: str, event_dict: Any) -> Any:
        output.append(dict(event_dict))
        raise structlog.DropEvent

    log = structlog.wrap_logger(None, processors=[obsdag.logs.add_context, collect]).bind(dag="my own")
    run(shop(log.info), Telemetry("orders", CollectorRegistry()))

    assert [(each["event"], each["task"], each["attempt"], each["context_id"], each["root_id"]) for each in output] == (
        EXPECTED
    )
    assert {each["dag"] for each in output} == {"my own"}
    assert "trace_id" not in output[0], "there is no tracing"


def test_a_line_inside_a_span_of_the_users_own_belongs_to_that_span() -> None:
    spans = CollectedSpans()
    provider = TracerProvider()
    provider.add_span_processor(spans)
    tracer = provider.get_tracer("shop")
    lines: list[dict[str, Any]] = []
    add = obsdag.logs.add_context
    dag = DAG("shop")

    @dag.task()
    async def load(ctx: Context) -> Context:
        with tracer.start_as_current_span("query"):
            lines.append(dict(add(None, "info", {})))
        return ctx

    telemetry = traced(spans)
    run(dag, telemetry)

    (query,) = spans.named("query")
    assert (lines[0]["task"], lines[0]["attempt"], lines[0]["worker"]) == ("load", 1, 0)
    assert lines[0]["span_id"] == f"{query.context.span_id:016x}"
    assert lines[0]["trace_id"] == f"{spans.named('execute load')[0].context.trace_id:032x}"


def test_it_works_without_telemetry() -> None:
    lines: list[dict[str, Any]] = []
    add = obsdag.logs.add_context
    run(shop(lambda event: lines.append(dict(add(None, "info", {"event": event})))), None)

    assert [(each["event"], each["task"]) for each in lines] == [(event, task) for event, task, *_ in EXPECTED]
    assert {each["engine"] for each in lines} == {"obsdag"}


def test_nothing_is_paid_unless_somebody_asked() -> None:
    current._asked.clear()
    state = CoreRun().state
    assert Facts(default_observers(state)).execution_started is None
    _ = obsdag.logs.ContextFilter
    assert Facts(default_observers(state)).execution_started is not None


async def test_deferred_tracing_knows_the_execution_without_paying_twice() -> None:
    _ = obsdag.logs.add_context
    telemetry, found = traced(CollectedSpans()), []
    told = Facts(telemetry.observers(CoreRun().state)).execution_started
    assert told is not None
    assert not any(isinstance(each, current.CurrentExecution) for each in telemetry.observers(CoreRun().state))
    dag = DAG("shop")
    gate = asyncio.Event()

    async def later() -> None:
        await gate.wait()
        found.append(current.context_keys().get("task"))

    @dag.task()
    async def load(ctx: Context) -> Context:
        found.append(current.context_keys()["task"])
        ctx["later"] = asyncio.create_task(later())
        return ctx

    (output,) = await Executor(dag, config=ExecutorConfig(telemetry=telemetry)).run()
    gate.set()
    await output["later"]

    assert found == ["load", None]  # after its end an execution is nobody's any more


async def test_no_execution_is_left_over_after_a_run() -> None:
    current.want()
    dag = DAG("shop")

    @dag.task()
    async def load(ctx: Context) -> Context:
        raise ValueError("no")

    await Executor(dag).run([{}, {}])

    assert current_execution.get() is None
    assert obsdag.logs.add_context(None, "info", {"event": "x"}) == {"event": "x"}


def test_the_filter_can_fill_in_for_formats_that_need_the_keys() -> None:
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(logging.Formatter("%(message)s [%(dag)s/%(task)s %(context_id)s]"))
    handler.addFilter(obsdag.logs.ContextFilter(missing="-"))
    mine.addHandler(handler)
    try:
        run(shop(), None)
        mine.warning("outside")
    finally:
        mine.removeHandler(handler)

    assert output.getvalue().splitlines()[0] == "in the loop [shop/load order]"
    assert output.getvalue().splitlines()[-1] == "outside [-/- -]"


# --- configure


def test_configure_json_has_a_line_per_event_with_iso_times() -> None:
    output = io.StringIO()
    obsdag.logs.configure(json=True, level="DEBUG", stream=output)
    run(shop(), Telemetry("orders", CollectorRegistry()))

    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert list(lines[0])[:4] == ["timestamp", "level", "logger", "event"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", lines[0]["timestamp"])
    assert {line["event"] for line in lines} >= {"run.started", "execution.succeeded", "in a thread", "run.finished"}
    own = [line for line in lines if line["logger"] == "shop.tasks"]
    assert [(line["event"], line["task"]) for line in own] == [(event, task) for event, task, *_ in EXPECTED]
    retry = next(line for line in lines if line["event"] == "execution.retry_scheduled")
    assert (retry["level"], retry["error_type"], retry["task"]) == ("warning", "ValueError", "parse")


def test_configure_text_goes_to_what_stderr_is_then(capsys: pytest.CaptureFixture[str]) -> None:
    obsdag.logs.configure()
    run(shop(), Telemetry("orders", CollectorRegistry()))

    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err, "no colors where there is no terminal"
    assert "execution.started" not in err, "info by default"
    assert re.search(r"Z \[info +\] run\.started .*\[obsdag\] engine=orders dag=shop", err)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_configure_colors_a_terminal_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    colored, plain = Terminal(), Terminal()
    obsdag.logs.configure(stream=colored)
    mine.warning("seen")
    monkeypatch.setenv("NO_COLOR", "1")
    obsdag.logs.configure(stream=plain)
    mine.warning("seen")

    assert "\x1b[" in colored.getvalue()
    assert "\x1b[" not in plain.getvalue()


def test_configure_again_replaces_its_handler_and_no_other() -> None:
    root = logging.getLogger()
    other = logging.NullHandler()
    root.addHandler(other)
    first, second = io.StringIO(), io.StringIO()
    obsdag.logs.configure(json=True, stream=first)
    handler = obsdag.logs.configure(json=True, stream=second)
    mine.warning("once")

    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1
    assert [each for each in root.handlers if each.get_name() == "obsdag.logs"] == [handler]
    assert other in root.handlers


def test_configure_shows_an_exception_and_a_redacted_one() -> None:
    for redact in (None, lambda text: text.replace("4711", "****")):
        output = io.StringIO()
        obsdag.logs.configure(json=True, stream=output)
        dag = DAG("shop")

        @dag.task()
        async def load(ctx: Context) -> Context:
            raise ValueError("card " + "4711")

        run(dag, Telemetry("orders", CollectorRegistry(), redact=redact))
        failed = next(line for line in map(json.loads, output.getvalue().splitlines()) if line["level"] == "error")
        assert failed["exception"].endswith("ValueError: card 4711" if redact is None else "ValueError: card ****")
        assert failed["exception"].startswith("Traceback")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": "LOUD"}, r"configure: level must be DEBUG, INFO, WARNING or ERROR, not 'LOUD'"),
        ({"level": True}, r"configure: level must be"),
        ({"json": "yes"}, r"configure: json must be True or False, not 'yes'"),
    ],
)
def test_configure_refuses_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        obsdag.logs.configure(**settings)


def test_importing_the_door_asks_for_nothing_and_sets_nothing_up() -> None:
    code = (
        "import logging, sys, obsdag.logs; from obsdag.telemetry import current;"
        "print(logging.getLogger().handlers, current._asked, 'structlog' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[] [] False\n"
