"""The current execution's keys for users' own log lines, in tasks on the loop and in threads alike (TELEMETRY 5).

Knowing the current execution costs the engine a ContextVar set and reset, about 0.4 us per execution. So it is done
only in runs that start after somebody asked for it (`want`), which getting `obsdag.logs.add_context` or
`obsdag.logs.ContextFilter` does.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final

from obsdag.core.observer import Observer
from obsdag.core.records import Execution, current_execution
from obsdag.telemetry.lines import PROCESS

__all__ = ["ContextFilter", "CurrentExecution", "add_context", "context_keys", "observers", "want"]

KEYS: Final = ("engine", "dag", "context_id", "root_id", "task", "attempt", "worker", "trace_id", "span_id")
_asked: list[bool] = []


def want() -> None:
    """Asks the runs that start from now on to make the current execution known."""
    if not _asked:
        _asked.append(True)


def observers() -> list[Observer]:
    """What makes the current execution known in a run: nothing, unless somebody asked."""
    return [CurrentExecution()] if _asked else []


class CurrentExecution(Observer):
    """Sets `current_execution` while a task's function runs: facts are told in its frame and contextvars."""

    def execution_started(self, execution: Execution, now: float) -> None:
        """The function of `execution` begins in this frame."""
        current_execution.set(execution)

    def execution_finished(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        """Set to what workers start with rather than reset, for which a token would have to be kept."""
        if current_execution.get() is execution:
            current_execution.set(None)


def context_keys() -> dict[str, Any]:
    """engine, dag, context_id, root_id, task, attempt, worker, trace_id and span_id of the current execution.

    None of these outside of executions; trace_id and span_id (hex, of the current span) only where tracing is on,
    worker only where there is one. On a shard, its name, as `shard`, everywhere.
    """
    execution = current_execution.get() or _traced_execution()
    if execution is None:
        return dict(PROCESS)
    context, run = execution.context, execution.context._run
    keys: dict[str, Any] = {}
    if run is not None:
        keys = {"engine": getattr(run.config.telemetry, "engine", "obsdag"), "dag": run.plan.name}
    keys |= {"context_id": context.id, "root_id": context.root.id}
    keys |= {"task": execution.task.id, "attempt": execution.attempt}
    if execution.worker >= 0:
        keys["worker"] = execution.worker
    return keys | PROCESS | _span_keys()


def _traced_execution() -> Execution | None:
    """The execution that is the current span, or around it; None without deferred tracing."""
    if "obsdag.telemetry.deferred" not in sys.modules:
        return None
    from opentelemetry.context import get_value

    from obsdag.telemetry.attach import EXECUTION_KEY

    span: Any = get_value(EXECUTION_KEY)
    return span.execution if span is not None else None


def _span_keys() -> dict[str, str]:
    # The current span, not the execution's: a line inside a span of the user's own belongs there.
    from opentelemetry.trace import format_span_id, format_trace_id, get_current_span

    span = get_current_span().get_span_context()
    if not span.is_valid:
        return {}
    return {"trace_id": format_trace_id(span.trace_id), "span_id": format_span_id(span.span_id)}


def add_context(logger: Any, method_name: str, event_dict: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: adds the current execution's keys to a line, where it has no such key of its own."""
    for key, value in context_keys().items():
        event_dict.setdefault(key, value)
    return event_dict


class ContextFilter(logging.Filter):
    """The same for stdlib logging: sets the keys as attributes of each record, and lets all of them pass.

    Add it to a handler, in whose formatter they then are `%(task)s` and so on (a logger's filter does not see its
    children's records). missing: what the keys are outside of executions; None leaves them unset.
    """

    def __init__(self, missing: str | None = None) -> None:
        super().__init__()
        self._missing = missing

    def filter(self, record: logging.LogRecord) -> bool:
        """Sets the keys on `record`, those that it has excepted; always true."""
        keys = context_keys()
        if self._missing is not None:
            keys = dict.fromkeys(KEYS, self._missing) | keys
        for key, value in keys.items():
            record.__dict__.setdefault(key, value)
        return True
