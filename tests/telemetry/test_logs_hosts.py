"""The same lines in hosts that set up logging in their own ways: real configurations, captured output (TELEMETRY 5)."""

from __future__ import annotations

import copy
import io
import json
import logging
import logging.config
import logging.handlers
import pickle
import queue
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from obsdag.telemetry.lines import LOGGER, line_logger
from obsdag.telemetry.logs import Logs
from tests.telemetry.corerun import CoreRun


@pytest.fixture
def host() -> Iterator[io.StringIO]:
    """Where the host's handler writes; what the test did to the root logger is undone."""
    root, factory = logging.getLogger(), logging.getLogRecordFactory()
    level = root.level
    yield io.StringIO()
    for handler in [each for each in root.handlers if not type(each).__module__.startswith("_pytest")]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.setLogRecordFactory(factory)
    LOGGER.setLevel(logging.NOTSET)


def fail_one(logs: Logs | None = None) -> None:
    """A run with a retry, a failure with its traceback, and its end."""
    run = CoreRun()
    run.observe((logs or Logs("orders")).observer(run.state))
    context = run.enter("order 7")
    try:
        raise ValueError("card refused\nfor good")
    except ValueError as error:
        run.fail(run.begin(context), error)
    run.leave(context)
    run.end("failed")


def attach(output: io.StringIO, formatter: logging.Formatter) -> None:
    handler = logging.StreamHandler(output)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def test_basic_config(host: io.StringIO) -> None:
    logging.basicConfig(stream=host, level=logging.INFO, force=True)
    fail_one()

    started, failed, *trace, context_finished, finished = host.getvalue().splitlines()
    assert started.startswith("INFO:obsdag:run.started engine=orders dag=etl run_id=")
    assert failed.startswith(
        "ERROR:obsdag:execution.failed engine=orders dag=etl context_id='order 7' root_id='order 7'"
    )
    assert failed.endswith(r"duration_s=0.5 error_type=ValueError error='card refused\nfor good'")
    assert trace[0] == "Traceback (most recent call last):"
    assert "context.finished" in context_finished
    assert "outcome=failed duration_s=0.5 entered=1 failed=1 executions=1" in finished


def test_a_format_with_every_attribute_of_a_record(host: io.StringIO) -> None:
    form = (
        "%(asctime)s %(levelname)s %(name)s %(filename)s %(lineno)d %(funcName)s %(process)d %(threadName)s %(message)s"
    )
    attach(host, logging.Formatter(form))
    fail_one()

    assert "INFO obsdag lines.py 0 emit" in host.getvalue()


def test_dict_config_with_the_keys_in_the_format(host: io.StringIO) -> None:
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"keys": {"format": "%(event)s|%(engine)s|%(dag)s|%(task)s"}},
            "handlers": {"out": {"class": "logging.StreamHandler", "stream": host, "formatter": "keys"}},
            "loggers": {"obsdag": {"handlers": ["out"], "level": "ERROR", "propagate": False}},
        }
    )
    try:
        fail_one()
    finally:
        LOGGER.propagate = True
        LOGGER.handlers = [each for each in LOGGER.handlers if isinstance(each, logging.NullHandler)]

    assert host.getvalue().splitlines()[0] == "execution.failed|orders|etl|load"


class PlainJson(logging.Formatter):
    """The usual home-made formatter: the message, and whatever is not a standard attribute."""

    standard = set(logging.makeLogRecord({}).__dict__) | {"taskName"}

    def format(self, record: logging.LogRecord) -> str:
        keys = {key: value for key, value in record.__dict__.items() if key not in self.standard}
        line = {"message": record.getMessage(), **keys}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def test_a_json_formatter(host: io.StringIO) -> None:
    attach(host, PlainJson())
    fail_one()

    started, failed, _, finished = map(json.loads, host.getvalue().splitlines())
    assert (started["event"], started["engine"], started["kind"]) == ("run.started", "orders", "run")
    assert (failed["task"], failed["attempt"], failed["worker"]) == ("load", 1, 3)
    assert failed["exception"].startswith("Traceback")
    assert (finished["duration_s"], finished["slowest"]) == (0.5, {"load": 0.5})


def test_python_json_logger(host: io.StringIO) -> None:
    module = pytest.importorskip("pythonjsonlogger.json")
    attach(host, module.JsonFormatter("%(levelname)s %(message)s"))
    fail_one(Logs("orders", redact=lambda text: text.replace("refused", "***")))

    failed = json.loads(host.getvalue().splitlines()[1])
    assert (failed["event"], failed["task"], failed["levelname"]) == ("execution.failed", "load", "ERROR")
    assert "card ***" in failed["exc_info"]
    assert "refused" not in failed["error"]


def processor_formatter(*pre_chain: Any, **settings: Any) -> structlog.stdlib.ProcessorFormatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_log_level, *pre_chain],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        **settings,
    )


def test_processor_formatter_with_extra_adder_has_the_bare_event(host: io.StringIO) -> None:
    attach(host, processor_formatter(structlog.stdlib.ExtraAdder()))
    fail_one()

    started, failed, *_ = map(json.loads, host.getvalue().splitlines())
    assert started["event"] == "run.started"
    assert (failed["event"], failed["level"], failed["task"]) == ("execution.failed", "error", "load")
    assert failed["exception"].endswith("ValueError: card refused\nfor good")


@pytest.mark.parametrize("use_get_message", [True, False])
def test_processor_formatter_without_extra_adder_has_all_in_the_message(
    host: io.StringIO, use_get_message: bool
) -> None:
    attach(host, processor_formatter(use_get_message=use_get_message))
    fail_one()

    started, failed, *_ = map(json.loads, host.getvalue().splitlines())
    assert started["event"].startswith("run.started engine=orders dag=etl run_id=")
    assert "task=load attempt=1" in failed["event"]


def test_console_renderer(host: io.StringIO) -> None:
    chain = [structlog.stdlib.add_log_level, structlog.stdlib.ExtraAdder()]
    processors: list[Any] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
    attach(host, structlog.stdlib.ProcessorFormatter(foreign_pre_chain=chain, processors=processors))
    fail_one()

    assert "[error    ] execution.failed" in host.getvalue()
    assert "ValueError: card refused" in host.getvalue()


def test_the_hosts_own_structlog_configuration_changes_nothing(host: io.StringIO) -> None:
    def broken(*_: Any) -> Any:
        raise AssertionError("the host's processors are not ours")

    structlog.configure(processors=[broken], wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        logging.basicConfig(stream=host, level=logging.INFO, force=True)
        fail_one()
    finally:
        structlog.reset_defaults()

    assert "run.started" in host.getvalue()


def test_uvicorn_defaults_leave_us_silent_and_its_formatter_shows_us(
    host: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    uvicorn = pytest.importorskip("uvicorn.config")
    settings = copy.deepcopy(uvicorn.LOGGING_CONFIG)
    logging.config.dictConfig(settings)
    fail_one()
    assert capsys.readouterr() == ("", "")

    settings["handlers"]["default"]["stream"] = host
    settings["loggers"]["obsdag"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    logging.config.dictConfig(settings)
    try:
        fail_one()
    finally:
        LOGGER.propagate = True
        LOGGER.handlers = [each for each in LOGGER.handlers if isinstance(each, logging.NullHandler)]
        for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True
    assert "ERROR:" in host.getvalue()
    assert "execution.failed engine=orders" in host.getvalue()


def test_a_queue_and_a_socket_can_carry_the_records(host: io.StringIO) -> None:
    carried: queue.Queue[logging.LogRecord] = queue.Queue()
    root = logging.getLogger()
    root.addHandler(logging.handlers.QueueHandler(carried))
    root.setLevel(logging.INFO)
    fail_one()

    records = [pickle.loads(pickle.dumps(carried.get_nowait())) for _ in range(carried.qsize())]
    assert records[0].getMessage().startswith("run.started engine=orders")
    assert (records[1].event, records[1].task) == ("execution.failed", "load")


def test_keys_that_a_record_has_itself_do_not_raise(host: io.StringIO) -> None:
    attach(host, PlainJson())
    line_logger().info("odd.keys", name="n", args=(1, 2), module="m", message="x", asctime="y", exc_text=None, task="t")

    line = json.loads(host.getvalue())
    assert line["message"].startswith("odd.keys name=n args=(1, 2) module=m message=x asctime=y")
    assert (line["name_"], line["module_"], line["task"]) == ("n", "m", "t")


def test_a_record_factory_of_the_host_that_sets_our_keys_does_not_raise(host: io.StringIO) -> None:
    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = logging.LogRecord(*args, **kwargs)
        record.task = record.trace_id = record.event = "the host's"
        return record

    logging.setLogRecordFactory(factory)
    attach(host, PlainJson())
    fail_one()

    failed = json.loads(host.getvalue().splitlines()[1])
    assert (failed["event"], failed["task"], failed["trace_id"]) == ("execution.failed", "load", "the host's")


def test_percent_signs_and_line_ends_in_values_forge_nothing(host: io.StringIO) -> None:
    logging.basicConfig(stream=host, level=logging.INFO, force=True)
    line_logger().info("x.y", a="100%s", b="one\nINFO:obsdag:forged", c="", d="k=v")

    assert host.getvalue() == "INFO:obsdag:x.y a=100%s b='one\\nINFO:obsdag:forged' c='' d='k=v'\n"


def test_the_message_as_a_value_is_the_event_so_that_lines_group(host: io.StringIO) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    fail_one()

    (failed,) = records
    assert failed.msg == "execution.failed"
    assert failed.getMessage().startswith("execution.failed engine=orders")


def test_a_reload_of_the_modules_changes_nothing() -> None:
    code = """
import importlib, io, logging
from obsdag.telemetry import lines, logs
for module in (lines, logs):
    importlib.reload(module)
print([type(handler).__name__ for handler in logging.getLogger("obsdag").handlers])
logging.basicConfig(stream=(output := io.StringIO()), level="INFO")
logs.Logs("orders").say("telemetry.dropping", dropped=1)
print(output.getvalue(), end="")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert (done.stdout, done.stderr) == (
        "['NullHandler']\nWARNING:obsdag:telemetry.dropping engine=orders dropped=1\n",
        "",
    )
