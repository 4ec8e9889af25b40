"""One log line: how an event with keys becomes a record that every host's logging shows right (TELEMETRY 5).

structlog wraps a private door to the stdlib logger `obsdag`. The door is ours because the stdlib raises for keys such
as `name` or `args`, and for whatever attribute a host's record factory has set already. A record's message is `event
key=value ...`, made only if somebody formats it; the keys are its attributes, and `event` among them, so that
structlog's ExtraAdder and JSON formatters show the bare event.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, Protocol

from obsdag.telemetry.specs import error_type_of

__all__ = [
    "LOGGER",
    "PROCESS",
    "Line",
    "Redact",
    "Throttle",
    "brief",
    "error_keys",
    "is_heard",
    "line_logger",
    "safe_text",
]

LOGGER: Final = logging.getLogger("obsdag")
if not any(isinstance(handler, logging.NullHandler) for handler in LOGGER.handlers):
    LOGGER.addHandler(logging.NullHandler())  # silent until the host configures logging: no last resort on stderr

PROCESS: Final[dict[str, Any]] = {}
"""Keys of this process, on every line: a shard has its name here, as `shard`."""

_RESERVED: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_MAX_TEXT = 2_000
_MAX_TRACEBACK = 20_000
_MAX_ITEMS = 20
_MAX_KEYS = 10_000

Redact = Callable[[str], str]


class Line(Protocol):
    """A structlog logger over the private door, as far as it is used here."""

    def bind(self, **keys: Any) -> Line:
        """The same logger with further keys on every line."""
        ...

    def debug(self, event: str, **keys: Any) -> None: ...  # noqa: D102
    def info(self, event: str, **keys: Any) -> None: ...  # noqa: D102
    def warning(self, event: str, **keys: Any) -> None: ...  # noqa: D102
    def error(self, event: str, **keys: Any) -> None: ...  # noqa: D102


def is_heard(level: int) -> bool:
    """Whether a line of this level would reach a handler that does something; a few dictionary look-ups, no lock."""
    if not LOGGER.isEnabledFor(level):
        return False
    logger: logging.Logger | None = LOGGER
    while logger is not None:
        for handler in logger.handlers:
            if handler.level <= level and not isinstance(handler, logging.NullHandler):
                return True
        logger = logger.parent if logger.propagate else None
    return False


@cache
def line_logger() -> Line:
    """The structlog logger of all lines; nothing of it is left to the host's `structlog.configure`."""
    import structlog  # the heaviest of the dependencies, and never needed where nobody listens

    logger: Line = structlog.wrap_logger(
        _Door(),
        processors=[_to_door],
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        context_class=dict,
        cache_logger_on_first_use=True,
    ).bind()
    return logger


def _to_door(_: Any, __: str, event_dict: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    event, exc_info, exc_text = (event_dict.pop(key, None) for key in ("event", "exc_info", "exc_text"))
    return (event, {**event_dict, **PROCESS}, exc_info, exc_text), {}


class _Door:
    """What structlog wraps: one method per level, each of which hands a finished record to the stdlib logger."""

    def debug(self, *line: Any) -> None:
        self._hand_over(logging.DEBUG, *line)

    def info(self, *line: Any) -> None:
        self._hand_over(logging.INFO, *line)

    def warning(self, *line: Any) -> None:
        self._hand_over(logging.WARNING, *line)

    def error(self, *line: Any) -> None:
        self._hand_over(logging.ERROR, *line)

    def _hand_over(self, level: int, event: str, keys: Mapping[str, Any], exc_info: Any, exc_text: str | None) -> None:
        # No walk up the stack for the caller: it would name a frame of the engine, and cost more than the line.
        record = LOGGER.makeRecord(LOGGER.name, level, __file__, 0, _Message(event, keys), (), exc_info, "emit")
        record.exc_text = exc_text
        fields = record.__dict__
        fields["event"] = event
        for key, value in keys.items():
            fields[f"{key}_" if key in _RESERVED else key] = value
        LOGGER.handle(record)


class _Message(str):
    """A record's message: as a value the constant event (so that lines group), as text the event and its keys."""

    __slots__ = ("_keys",)
    _keys: Mapping[str, Any]

    def __new__(cls, event: str, keys: Mapping[str, Any]) -> _Message:
        message = super().__new__(cls, event)
        message._keys = keys
        return message

    def __str__(self) -> str:
        return " ".join([self[:], *(f"{key}={_shown(value)}" for key, value in self._keys.items())])

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.0f}"
    if not isinstance(value, str):
        return repr(value) if not isinstance(value, bool | int) else str(value)
    plain = value.isprintable() and not any(mark in value for mark in " =\"'")
    return value if value and plain else repr(value)  # repr escapes line ends: no value can forge a line


def safe_text(value: Any, redact: Redact | None = None, limit: int = _MAX_TEXT) -> str:
    """`str(value)`, redacted and cut to `limit` characters; never raises, whatever `value` or `redact` does."""
    try:
        text = str(value)
        if redact is not None:
            text = str(redact(text))
    except Exception as error:
        # Without the redactor's consent nothing of the text is shown.
        return f"<{type(value).__name__}, text not available: {type(error).__name__}>"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def error_keys(error: BaseException | None, redact: Redact | None = None, trace: bool = False) -> dict[str, Any]:
    """Keys that tell of an exception: error_type, error; with `trace` its traceback too.

    With `redact` the traceback is given as redacted text (`exception`, and what formatters print), never as the object.
    """
    if error is None:
        return {}
    keys: dict[str, Any] = {"error_type": error_type_of(error), "error": safe_text(error, redact)}
    if trace and redact is None:
        keys["exc_info"] = (type(error), error, error.__traceback__)
    elif trace:
        keys["exc_text"] = keys["exception"] = safe_text(_Traceback(error), redact, _MAX_TRACEBACK)
    return keys


class _Traceback:
    """A traceback that becomes text when asked, so that a failing `__str__` of the exception is caught in one place."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __str__(self) -> str:
        return "".join(traceback.format_exception(self._error)).rstrip()


def brief(value: Any) -> Any:
    """Plain data for a line: long lists cut to 20 items with the number of the others, objects as text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): brief(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [brief(item) for item in list(value)[:_MAX_ITEMS]]
        return [*items, f"... {len(value) - _MAX_ITEMS} more"] if len(value) > _MAX_ITEMS else items
    return safe_text(value)


class Throttle:
    """Lets through so many lines per (event, dag, task) and interval, and counts the others.

    rates: event -> (lines, interval in seconds); `None` names what holds for all others. One per `Telemetry`, shared by
    its runs and told from several threads; times are Unix seconds, as clocks of runs need not agree.
    """

    def __init__(self, rates: Mapping[str | None, tuple[int, float]]) -> None:
        self._rates = rates
        self._lock = threading.Lock()
        # [start, lines in it, suppressed since the last line]
        self._windows: dict[tuple[str, str, str], list[float]] = {}

    def admit(self, event: str, dag: str, task: str, now: float) -> int | None:
        """How many were suppressed since the last line of the kind, or None if this one is to be suppressed too."""
        lines, interval_s = self._rates.get(event) or self._rates[None]
        with self._lock:
            if len(self._windows) >= _MAX_KEYS:
                self._windows.clear()  # a program that makes up DAG names without end: start over rather than grow
            window = self._windows.setdefault((event, dag, task), [now, 0, 0])
            if not 0 <= now - window[0] < interval_s:
                window[0], window[1] = now, 0
            if window[1] >= lines:
                window[2] += 1
                return None
            window[1] += 1
            suppressed, window[2] = int(window[2]), 0
            return suppressed
