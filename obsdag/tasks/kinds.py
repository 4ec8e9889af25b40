"""Which class of task a function becomes, by the kind asked for and the function's own kind (SEMANTICS G1).

Shared by the decorators of `DAG` and by `DAG.from_config`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import Any

from obsdag.errors import ConfigError
from obsdag.tasks import function, join, loop, map, process, remote, router, service, stream
from obsdag.tasks.base import Task, TaskConfig
from obsdag.tasks.signature import call_kind

__all__ = ["KINDS", "did_you_mean", "make_task", "option_names", "task_class"]

# kind -> the class for a plain function, and for a coroutine function or async generator; "" is no kind asked for
_CLASSES: dict[str, tuple[type[Task], type[Task]]] = {
    "async": (function.AsyncFunctionTask, function.AsyncFunctionTask),
    "sync": (function.SyncFunctionTask, function.SyncFunctionTask),
    "foreground": (function.ForegroundSyncFunctionTask, function.ForegroundSyncFunctionTask),
    "process": (process.ProcessTask, process.ProcessTask),
    "ray": (remote.RemoteTask, remote.RemoteTask),
    "router": (router.SyncRouterTask, router.AsyncRouterTask),
    "foreground_router": (router.ForegroundSyncRouterTask, router.ForegroundSyncRouterTask),
    "stream": (stream.SyncStreamTask, stream.AsyncStreamTask),
    "foreground_stream": (stream.ForegroundSyncStreamTask, stream.ForegroundSyncStreamTask),
    "loop": (loop.SyncLoopTask, loop.AsyncLoopTask),
    "foreground_loop": (loop.ForegroundSyncLoopTask, loop.ForegroundSyncLoopTask),
    "service": (service.SyncThreadTask, service.AsyncServiceTask),
    "thread": (service.SyncThreadTask, service.SyncThreadTask),
    "map": (map.MapTask, map.MapTask),
    "join": (join.JoinTask, join.JoinTask),
    "shutdown": (function.SyncFunctionShutdownTask, function.AsyncFunctionShutdownTask),
    "foreground_shutdown": (function.ForegroundSyncFunctionShutdownTask, function.ForegroundSyncFunctionShutdownTask),
}
KINDS: tuple[str, ...] = tuple(_CLASSES)
_CONFIG_FIELDS = frozenset(field.name for field in dataclasses.fields(TaskConfig))


def task_class(func: Callable[..., Any], kind: str | type[Task] | None = None) -> type[Task]:
    """The class for `func`; raises ConfigError for an unknown kind.

    Without a kind: a coroutine function or plain function is a function task, a generator a stream task (G1), and a
    callable object with a method `shutdown` a shutdown task.
    """
    if isinstance(kind, type) and issubclass(kind, Task):
        return kind
    called = call_kind(func)
    if kind is None:
        if called in ("generator", "asyncgen"):
            kind = "stream"
        elif not inspect.isroutine(func) and not isinstance(func, type) and callable(getattr(func, "shutdown", None)):
            kind = "shutdown"
        else:
            kind = "async" if called == "coroutine" else "sync"
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ConfigError(f"there is no kind {kind!r} of task{did_you_mean(kind, KINDS)}; there are {', '.join(KINDS)}")
    plain, asynchronous = _CLASSES[kind]
    return asynchronous if called in ("coroutine", "asyncgen") else plain


def make_task(
    func: Callable[..., Any],
    kind: str | type[Task] | None = None,
    name: str = "",
    config: TaskConfig | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Task:
    """A task of `func`; `settings` are TaskConfig fields (they win over `config`) and options of the kind, by name.

    Also `runner`, which is "ray" or None. Raises ConfigError for a setting that is neither, or out of range, and for an
    unknown kind or runner.
    """
    settings = dict(settings or {})
    chosen = task_class(func, _kind_on(settings.pop("runner", None), kind, settings))
    known = option_names(chosen)
    for setting in settings:
        if setting not in _CONFIG_FIELDS and setting not in known:
            hint = did_you_mean(setting, [*_CONFIG_FIELDS, *known])
            allowed = ", ".join([*(field.name for field in dataclasses.fields(TaskConfig)), *known])
            raise ConfigError(f"{chosen.__name__} has no setting {setting!r}{hint}; it has {allowed}")
    fields = {name: value for name, value in settings.items() if name in _CONFIG_FIELDS}
    options = {name: value for name, value in settings.items() if name not in _CONFIG_FIELDS}
    if fields:
        config = dataclasses.replace(config or TaskConfig(), **fields)
    return chosen(func, config, name, **options)


def _kind_on(runner: Any, kind: str | type[Task] | None, settings: Mapping[str, Any]) -> str | type[Task] | None:
    """The kind of a task, given where it is to run: `runner="ray"` says the same as `kind="ray"`."""
    if runner is None:
        if "resources" in settings and kind != "ray" and not _takes_resources(kind):
            raise ConfigError('resources are those of a machine of a Ray cluster: say runner="ray", too')
        return kind
    if runner != "ray":
        raise ConfigError(
            f'there is no runner {runner!r}; there is "ray" (threads and worker processes are kinds of task)'
        )
    if kind not in (None, "ray", "sync", "process"):
        raise ConfigError(f'runner="ray" is for plain functions, not for tasks of kind {kind!r}')
    return "ray"


def _takes_resources(kind: str | type[Task] | None) -> bool:
    return isinstance(kind, type) and "resources" in option_names(kind)


def option_names(chosen: type[Task]) -> list[str]:
    """The keywords that a class of task takes beyond func, config and name: `targets`, `on_child_failure`, ..."""
    names: dict[str, None] = {}
    for each in chosen.__mro__:
        if "__init__" in vars(each) and each is not object:
            for parameter in list(inspect.signature(vars(each)["__init__"]).parameters.values())[1:]:
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                    names[parameter.name] = None
    return [name for name in names if name not in ("func", "config", "name")]


def did_you_mean(wrong: object, known: Collection[str]) -> str:
    """A hint to put after a message; empty if nothing known is close, or so much is known that looking takes long."""
    close = get_close_matches(str(wrong), known, n=1) if len(known) <= 200 else []
    return f" (did you mean {close[0]!r}?)" if close else ""
