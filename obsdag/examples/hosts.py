"""obsdag in hosts that set up logging and tracing in their own ways: what each has to do, and what it sees then.

    python -m obsdag.examples.hosts                 names them
    python -m obsdag.examples.hosts json            runs a small DAG in that host; one order fails

basic         logging.basicConfig: nothing to do, keys stand in the message
json          a JSON formatter that writes a record's extras: nothing to do, keys are keys
structlog     structlog's ProcessorFormatter with ExtraAdder: the bare event, keys are keys
plain         the same without ExtraAdder: all of it in the event
uvicorn       uvicorn's defaults configure only its own loggers: name `obsdag` beside them
provider      a tracer provider of the host's own: traces are live spans of it, and follow its sampling
held          the same, with obsdag deciding: `hold` before its exporter, `Tracing(processors=...)` to the same exporter
alone         no tracer provider: traces go to a collector of one's choice, or nowhere
"""

from __future__ import annotations

import json
import logging
import logging.config
import sys
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

import obsdag
from obsdag import DAG, Context, Executor, ExecutorConfig, Telemetry, Tracing

__all__ = ["HOSTS", "main"]


def orders(telemetry: Telemetry) -> None:
    """The work: two orders, of which the second one fails; each asks a bank, with a span of the user's own."""
    dag = DAG("orders")

    @dag.task
    async def charge(ctx: Context) -> Context:
        with trace.get_tracer("shop").start_as_current_span("ask the bank"):
            if ctx["number"] == 2:
                raise ValueError("card refused")
        return ctx

    Executor(dag, config=ExecutorConfig(telemetry=telemetry)).run_sync([{"number": 1}, {"number": 2}])


# --- logging


def basic() -> None:
    """`logging.basicConfig`."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    orders(Telemetry("shop"))


class JsonFormatter(logging.Formatter):
    """As most of them: the message, and whatever a record has that records do not have by themselves."""

    _plain = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        extras = {key: value for key, value in record.__dict__.items() if key not in self._plain}
        return json.dumps({"level": record.levelname, "message": record.getMessage(), **extras}, default=str)


def _to_stdout(formatter: logging.Formatter) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=logging.INFO)


def as_json() -> None:
    """A JSON formatter."""
    _to_stdout(JsonFormatter())
    orders(Telemetry("shop"))


def structlog(extras: bool = True) -> None:
    """Structlog's `ProcessorFormatter`, for the lines of stdlib loggers."""
    from structlog.processors import JSONRenderer, format_exc_info
    from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level

    renderer: list[Any] = [ProcessorFormatter.remove_processors_meta, format_exc_info, JSONRenderer()]
    chain: list[Any] = [add_log_level, ExtraAdder()] if extras else [add_log_level]
    _to_stdout(ProcessorFormatter(foreign_pre_chain=chain, processors=renderer))
    orders(Telemetry("shop"))


def uvicorn() -> None:
    """Uvicorn's defaults: pass the same to `uvicorn.run(log_config=...)`."""
    from uvicorn.config import LOGGING_CONFIG

    own = {"obsdag": {"handlers": ["default"], "level": "INFO", "propagate": False}}
    handler = {**LOGGING_CONFIG["handlers"]["default"], "stream": sys.stdout}
    settings = {
        **LOGGING_CONFIG,
        "handlers": {**LOGGING_CONFIG["handlers"], "default": handler},
        "loggers": {**LOGGING_CONFIG["loggers"], **own},
    }
    logging.config.dictConfig(settings)
    orders(Telemetry("shop"))


# --- tracing


class Printer(SpanExporter):
    """Instead of an exporter to a collector: prints who made a span, its name, and its parent's."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Keeps the spans until `show`."""
        self.spans += spans
        return SpanExportResult.SUCCESS

    def show(self) -> None:
        """Prints the spans as trees, in order of start."""
        below: dict[int, list[ReadableSpan]] = {}
        known = {_span_id(span.context) for span in self.spans}
        for span in sorted(self.spans, key=lambda span: (span.start_time or 0, -(span.end_time or 0))):
            parent = _span_id(span.parent)
            below.setdefault(parent if parent in known else 0, []).append(span)
        pending = [(span, 0) for span in reversed(below.get(0, []))]
        while pending:
            span, depth = pending.pop()
            scope = span.instrumentation_scope.name if span.instrumentation_scope else "?"
            print("  " * depth + f"{span.name}  ({scope}) {span.status.status_code.name}")
            pending += [(child, depth + 1) for child in reversed(below.get(_span_id(span.context), []))]


def _span_id(context: trace.SpanContext | None) -> int:
    return context.span_id if context is not None else 0


def provider(share: float = 1.0) -> None:
    """The host has a tracer provider: `Telemetry()` finds it, spans are ordinary spans of it (`live`)."""
    printer = Printer()
    host = TracerProvider(sampler=ParentBased(TraceIdRatioBased(share)))
    host.add_span_processor(SimpleSpanProcessor(printer))
    trace.set_tracer_provider(host)
    orders(Telemetry("shop", logs=False))
    printer.show()


def held() -> None:
    """The same host, where failed and slow orders are to be kept whatever the sampling: obsdag decides at the end."""
    printer = Printer()
    exporting = SimpleSpanProcessor(printer)
    host = TracerProvider()
    host.add_span_processor(obsdag.hold(exporting))  # users' spans inside tasks wait for their context's decision
    trace.set_tracer_provider(host)
    tracing = Tracing(processors=[exporting], sample=0.0)  # of those that nothing speaks for, none
    orders(Telemetry("shop", logs=False, tracing=tracing))
    printer.show()


def alone() -> None:
    """No provider: `Tracing.otlp("http://localhost:4318")`, or here a processor that prints."""
    printer = Printer()
    tracing = Tracing(processors=[SimpleSpanProcessor(printer)], sample=1.0)
    orders(Telemetry("shop", logs=False, tracing=tracing))
    printer.show()


HOSTS: dict[str, Callable[[], None]] = {
    "basic": basic,
    "json": as_json,
    "structlog": structlog,
    "plain": lambda: structlog(extras=False),
    "uvicorn": uvicorn,
    "provider": provider,
    "held": held,
    "alone": alone,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the host that is named; returns the exit status."""
    name, *_ = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name not in HOSTS:
        print(__doc__)
        return 0 if not name else 2
    HOSTS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
