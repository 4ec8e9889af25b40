"""Logs, the public door: set them up in a script, and give one's own lines the current execution's keys.

    import obsdag.logs
    obsdag.logs.configure()                      # readable lines on stderr; json=True for machines

Hosts with their own logging need no set-up: obsdag's lines come from the stdlib logger `obsdag`. To have task, context
and trace on the lines that tasks write themselves, add `add_context` to structlog's processors or `ContextFilter` to a
stdlib handler. Getting either from here asks runs that start later to keep the current execution known, at about 0.4 us
per execution.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from obsdag.errors import ConfigError
from obsdag.telemetry import current
from obsdag.telemetry.lines import LOGGER

if TYPE_CHECKING:
    from obsdag.telemetry.current import ContextFilter, add_context

__all__ = ["ContextFilter", "add_context", "configure"]

_HANDLER = "obsdag.logs"


def __getattr__(name: str) -> Any:
    if name in ("add_context", "ContextFilter"):
        current.want()
        return getattr(current, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def configure(*, json: bool = False, level: str | int = "INFO", stream: TextIO | None = None) -> logging.Handler:
    """Sets up logging for a script or command: one handler on the root logger, which is given back.

    json: a JSON object per line; else text, colored on a terminal unless NO_COLOR is set. Times are ISO 8601, UTC.
    level: of obsdag's lines; all others are shown from it or from INFO, whichever is higher. stream: None is stderr,
    whatever it is at the time. Lines that tasks write get the current execution's keys. Called again, it replaces what
    it did before. Raises ConfigError.
    """
    number = _level(level)
    if not isinstance(json, bool):
        raise ConfigError(f"obsdag.logs.configure: json must be True or False, not {json!r}")
    current.want()
    handler: logging.StreamHandler[Any] = _Stderr() if stream is None else logging.StreamHandler(stream)
    handler.set_name(_HANDLER)
    handler.setFormatter(_formatter(json, handler.stream))
    root = logging.getLogger()
    for old in [each for each in root.handlers if each.get_name() == _HANDLER]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(number, logging.INFO))
    LOGGER.setLevel(number)
    return handler


def _level(level: str | int) -> int:
    number = logging.getLevelNamesMapping().get(level.upper()) if isinstance(level, str) else level
    if not isinstance(number, int) or isinstance(number, bool):
        names = "DEBUG, INFO, WARNING or ERROR"
        raise ConfigError(f"obsdag.logs.configure: level must be {names}, not {level!r}")
    return number


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is when a line comes, since a script may redirect it after set-up."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """Fixed on purpose."""


def _formatter(json: bool, stream: TextIO) -> logging.Formatter:
    import structlog

    chain: list[Any] = [structlog.stdlib.ExtraAdder(), current.add_context, _add_origin]
    processors: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if json:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        colors = stream.isatty() and not os.environ.get("NO_COLOR")
        traceback = structlog.dev.plain_traceback
        processors += [structlog.dev.ConsoleRenderer(colors=colors, sort_keys=False, exception_formatter=traceback)]
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=chain, processors=processors)


def _add_origin(_: Any, __: str, event_dict: MutableMapping[str, Any]) -> dict[str, Any]:
    """Puts time, level, logger and event first."""
    record: logging.LogRecord = event_dict["_record"]
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    level = record.levelname.lower()
    return {"timestamp": time, "level": level, "logger": record.name, "event": event_dict.pop("event"), **event_dict}
