"""A DAG from a mapping or a TOML file (SEMANTICS G8): nothing is evaluated; every mistake is told, with its place.

name = "shop"

[limiters.api]                      # shared by the tasks that name it
kind = "rate"                       # rate: n, per, burst; concurrency: n
n = 10

[tasks.fetch]
function = "shop.steps:fetch"       # module:attribute; the kind follows from the function, or from `kind`
parameters = { region = "eu" }      # keyword arguments, bound with functools.partial
retry_times = 3                     # any field of TaskConfig, and the options of the kind
retry_interval = { kind = "exponential", base = 0.5 }
retry_on = ["ConnectionError", "shop.errors:Busy"]
limiter = "api"                     # or "module:attribute", or a list of these

[tasks.store]
kind = "foreground"
function = "shop.steps:store"
after = "fetch"                     # an id or a list of ids
"""

from __future__ import annotations

import builtins
import functools
import importlib
import inspect
import json
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from obsdag.errors import ConfigError, GraphError
from obsdag.limits import ConcurrencyLimit, Limit, RateLimit
from obsdag.tasks.base import Task, TaskConfig
from obsdag.tasks.function import AsyncFunctionTask
from obsdag.tasks.kinds import KINDS, did_you_mean, make_task, option_names, task_class
from obsdag.tasks.retry import Exponential, Fixed

if TYPE_CHECKING:
    from obsdag.graph import DAG

__all__ = ["dag_from_config"]

_TOP = ("name", "tasks", "limiters")
_OTHERS_TABLES = ("executor", "serve", "telemetry")  # of the same file, read by others
_TASK_KEYS = ("kind", "function", "parameters", "after")
_CONFIG_FIELDS = tuple(field.name for field in fields(TaskConfig))
_LIMITER_KINDS: Mapping[str, Callable[..., Limit]] = {"rate": RateLimit, "concurrency": ConcurrencyLimit}
_INTERVAL_KINDS: Mapping[str, Callable[..., Any]] = {"exponential": Exponential, "fixed": Fixed}


class _Mistake(Exception):
    """What is wrong at one place; the place is added by who knows it."""


def dag_from_config(config: Mapping[str, Any] | str | os.PathLike[str], make: Callable[[str], DAG]) -> DAG:
    """The DAG, not built, but free of mistakes. Raises GraphError with all of them, each as "place: what is wrong"."""
    settings = config if isinstance(config, Mapping) else _read(config)
    reader = _Reader(settings)
    dag = reader.dag(make)
    if reader.mistakes:
        raise GraphError(reader.mistakes)
    return dag


def _read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    place = os.fspath(path)
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise GraphError(f"{place} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # also UnicodeDecodeError
        raise GraphError(f"{place} is not TOML: {error}") from None


class _Reader:
    """Reads one configuration and collects its mistakes."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.mistakes: list[str] = []
        self.limiters: dict[str, Limit] = {}

    def dag(self, make: Callable[[str], DAG]) -> DAG:
        for key in self.settings:
            if key not in _TOP and key not in _OTHERS_TABLES:
                self.mistakes.append(f"{_place(key)}: unknown{did_you_mean(key, _TOP)}; there are {', '.join(_TOP)}")
        name = self.settings.get("name", "dag")
        if not isinstance(name, str) or not name:
            self.mistakes.append(f"name: must be a non-empty text, not {name!r}")
            name = "dag"
        for limiter, table in self._table("limiters").items():
            self._limiter(str(limiter), table)
        dag = make(name)
        for task_id, table in self._table("tasks").items():
            self._task(dag, task_id, table)
        for problem in dag.find_problems():
            place = ["tasks", problem.task] if problem.task else ["tasks"]
            self.mistakes.append(f"{_place(*place, *filter(None, [problem.setting]))}: {problem.text}")
        return dag

    def _table(self, key: str) -> Mapping[str, Any]:
        table = self.settings.get(key, {})
        if isinstance(table, Mapping):
            return table
        self.mistakes.append(f"{key}: must be a table, not {table!r}")
        return {}

    def _limiter(self, name: str, table: Any) -> None:
        try:
            self.limiters[name] = _made(table, _LIMITER_KINDS, {"name": name})
        except _Mistake as mistake:
            self.mistakes.append(f"{_place('limiters', name)}: {mistake}")

    def _task(self, dag: DAG, task_id: Any, table: Any) -> None:
        place = _place("tasks", task_id)
        if not isinstance(task_id, str) or not task_id:
            self.mistakes.append(f"{place}: a task's name must be a non-empty text, not {task_id!r}")
            return
        if not isinstance(table, Mapping):
            self.mistakes.append(f"{place}: must be a table, not {table!r}")
            table = {}
        elif "function" not in table:
            self.mistakes.append(f"{place}: has no function")
        function = self._try(task_id, "function", table, _function)
        kind = self._try(task_id, "kind", table, _kind)
        after = self._try(task_id, "after", table, _texts) or []
        chosen = task_class(function, kind) if function is not None and (kind or "kind" not in table) else None
        settings = self._task_settings(task_id, table, chosen)
        parameters = self._try(task_id, "parameters", table, lambda value: _parameters(value, function)) or {}
        task: Task = AsyncFunctionTask(_stand_in, name=task_id)
        if function is not None and chosen is not None:
            bound = functools.partial(function, **parameters) if parameters else function
            try:
                task = make_task(bound, chosen, task_id, None, settings)
            except (ConfigError, TypeError) as error:
                self.mistakes.append(f"{place}: {error}")
        dag.add_task(task, after)

    def _task_settings(self, task_id: str, table: Mapping[str, Any], chosen: type[Task] | None) -> dict[str, Any]:
        """The settings without mistakes; options of the kind can be told from unknown ones only if it is known."""
        settings: dict[str, Any] = {}
        options = option_names(chosen) if chosen else None
        known = (*_TASK_KEYS, *_CONFIG_FIELDS, *(options or ()))
        for key in table:
            if key in _CONFIG_FIELDS:
                before = len(self.mistakes)
                value = self._try(task_id, key, table, self._config_value(key))
                if len(self.mistakes) == before:
                    settings[key] = value
            elif options is not None and key in options:
                settings[key] = table[key]
            elif options is not None and key not in _TASK_KEYS:
                hint = did_you_mean(key, known)
                self.mistakes.append(f"{_place('tasks', task_id, key)}: unknown{hint}; there are {', '.join(known)}")
        return settings

    def _try(self, task_id: str, key: str, table: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
        """`read` of the value at `key`, or None if it is missing or wrong, which is then noted."""
        if key not in table:
            return None
        try:
            return read(table[key])
        except _Mistake as mistake:
            self.mistakes.append(f"{_place('tasks', task_id, key)}: {mistake}")
            return None

    def _config_value(self, key: str) -> Callable[[Any], Any]:
        read = {"limiter": self._limits, "retry_on": _retry_on, "retry_interval": _retry_interval}.get(key)

        def checked(value: Any) -> Any:
            value = read(value) if read else value
            try:
                TaskConfig(**{key: value})
            except ConfigError as error:
                _wrong(str(error).removeprefix(f"TaskConfig.{key} "))
            return value

        return checked

    def _limits(self, value: Any) -> tuple[Limit, ...]:
        if isinstance(value, Limit):
            return (value,)
        limits = []
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, Limit):
                limits.append(each)
            elif isinstance(each, str) and ":" in each:
                limits.append(_attribute(each))
            elif isinstance(each, str) and each in self.limiters:
                limits.append(self.limiters[each])
            else:
                known = ", ".join(self.limiters) or "none"
                _wrong(f"{each!r} is neither a table of [limiters] (there are: {known}) nor module:attribute")
        return tuple(limits)


async def _stand_in(context: Any) -> Any:
    """Takes the place of a task that has mistakes of its own, so that those of its neighbors are still found."""
    return context


def _function(value: Any) -> Callable[..., Any]:
    found = _attribute(value) if isinstance(value, str) else value
    if isinstance(found, Task):  # the module decorated it
        found = found.func
    if not callable(found):
        _wrong(f"{value!r} is no function" + (f", but {found!r}" if isinstance(value, str) else ""))
    function: Callable[..., Any] = found
    return function


def _kind(value: Any) -> str | type[Task]:
    if isinstance(value, str) and ":" in value:
        value = _attribute(value)
    if isinstance(value, type) and issubclass(value, Task):
        return value
    if not isinstance(value, str) or value not in KINDS:
        _wrong(f"unknown kind {value!r}{did_you_mean(value, KINDS)}; there are {', '.join(KINDS)}")
    return value


def _parameters(value: Any, function: Callable[..., Any] | None) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        _wrong(f"must be a table of keyword arguments, not {value!r}")
    try:
        signature = inspect.signature(function) if function is not None else None
    except (TypeError, ValueError):
        return value
    if signature is not None:
        try:
            signature.bind_partial(**value)
        except TypeError as error:
            _wrong(f"the function {error}")
    return value


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        _wrong(f"must be a task's name or a list of names, not {value!r}")
    return list(texts)


def _retry_interval(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _made(value, _INTERVAL_KINDS, {})
    return _attribute(value) if isinstance(value, str) else value


def _retry_on(value: Any) -> Any:
    if not isinstance(value, str | list | tuple):
        return value
    if isinstance(value, str):
        return _exception(value)
    return tuple(_exception(each) for each in value)


def _exception(value: Any) -> Any:
    if isinstance(value, str) and ":" not in value:
        found = getattr(builtins, value, None)
        if isinstance(found, type) and issubclass(found, BaseException):
            return found
        _wrong(f"{value!r} is no exception of Python's own; give others as module:attribute")
    return _attribute(value) if isinstance(value, str) else value


def _made(table: Any, kinds: Mapping[str, Callable[..., Any]], preset: Mapping[str, Any]) -> Any:
    """What a table with a `kind` and that kind's own fields describes."""
    if not isinstance(table, Mapping):
        _wrong(f"must be a table with a kind, not {table!r}")
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        _wrong(f"its kind must be one of {', '.join(kinds)}, not {kind!r}")
    make: Any = kinds[kind]
    given = {key: value for key, value in table.items() if key != "kind"}
    known = [field.name for field in fields(make)]
    _check_known(given, known)
    try:
        return make(**{**preset, **given})
    except (ConfigError, TypeError) as error:
        _wrong(str(error))


def _check_known(given: Mapping[str, Any], known: Collection[str]) -> None:
    for key in given:
        if key not in known:
            _wrong(f"unknown field {key!r}{did_you_mean(key, known)}; there are {', '.join(known)}")


def _attribute(text: Any) -> Any:
    """What "module:attribute" names; importing the module is all that happens."""
    module_name, colon, path = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not colon or not module_name or not path:
        _wrong(f"must be written module:attribute, not {text!r}")
    try:
        found = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        _wrong(f"module {module_name!r} cannot be imported: {type(error).__name__}: {error}")
    for name in path.split("."):
        if not hasattr(found, name):
            close = did_you_mean(name, [each for each in dir(found) if not each.startswith("_")])
            _wrong(f"{module_name!r} has no {path!r}{close}")
        found = getattr(found, name)
    return found


def _place(*keys: Any) -> str:
    """A dotted place as TOML writes it: keys of other than letters, digits, _ and - in quotes."""
    return ".".join(
        key if isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(str(key)) for key in keys
    )


def _wrong(text: str) -> NoReturn:
    raise _Mistake(text)
