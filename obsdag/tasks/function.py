"""Tasks around a function that is called once per execution (SEMANTICS T5), and what all tasks with a function share.

What a kind is can be asked with isinstance: `AsyncTask` (its function suspends on the loop), `SyncTask` (plain code in
a thread), `ForegroundTask` (plain code on the loop's own thread: for functions that take microseconds), `ShutdownTask`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any, ClassVar

from obsdag.errors import TaskError
from obsdag.tasks.base import Environment, Task, TaskConfig
from obsdag.tasks.signature import CallKind, Signature, generator_signature, read_signature, returns_only_none

__all__ = [
    "AsyncFunctionShutdownTask",
    "AsyncFunctionTask",
    "AsyncTask",
    "ForegroundSyncFunctionShutdownTask",
    "ForegroundSyncFunctionTask",
    "ForegroundTask",
    "FunctionTask",
    "GeneratorTask",
    "ShutdownTask",
    "SyncFunctionShutdownTask",
    "SyncFunctionTask",
    "SyncTask",
    "no_resource",
]

_CALL_KIND_NAMES: dict[CallKind, str] = {
    "function": "a plain function",
    "coroutine": "a coroutine function (async def)",
    "generator": "a generator function (def with yield)",
    "asyncgen": "an async generator function (async def with yield)",
}
NOTHING_COMES_BACK = (
    "every return of its function is None, which would drop every context: return the context, "
    "or set pass_through=True if it only has effects"
)


class FunctionTask(Task):
    """What every task with a function has: its `signature`, read once, and the checks of the function against the kind.

    A subclass may define `startup(env)` and `shutdown()`, plain or async: they are called on the run's own copy of the
    task, before its first execution and at the run's end (T10).
    """

    accepts: ClassVar[tuple[CallKind, ...]] = ("function", "coroutine")
    given: ClassVar[tuple[str, ...]] = ("the context",)
    may_pass_through: ClassVar[bool] = False
    nothing_comes_back: ClassVar[str | None] = None

    def __init__(
        self, func: Callable[..., Any], config: TaskConfig | None = None, name: str = "", **options: Any
    ) -> None:
        super().__init__(func, config, name or _name_of(func), **options)
        if func is None:
            raise TypeError(f"task {name!r}: a {type(self).__name__} needs a function")
        self.signature: Signature = read_signature(func, self.given)

    def problems(self) -> Iterable[str]:
        """What is wrong with the function: the wrong kind, uncallable by the engine, or never returning anything."""
        if self.signature.kind not in self.accepts:
            yield (
                f"{type(self).__name__} needs {' or '.join(_CALL_KIND_NAMES[kind] for kind in self.accepts)}, "
                f"not {_CALL_KIND_NAMES[self.signature.kind]}"
            )
        yield from self.signature.problems
        if self.config.pass_through and not self.may_pass_through:
            yield f"pass_through means nothing for {type(self).__name__}: it is for functions that only have effects"
        elif self.nothing_comes_back and not self.config.pass_through and self.func and returns_only_none(self.func):
            yield self.nothing_comes_back

    def for_run(self) -> Task:
        """A copy whose own attributes a run may change (T10); a function that is a method of the task goes with it."""
        mine = self.free_copy()
        if isinstance(self.func, MethodType) and self.func.__self__ is self:
            mine.func = self.func.__func__.__get__(mine)
        return mine


def _name_of(func: Any) -> str:
    """The function's name within any partials; empty if it has none."""
    while isinstance(func, partial):
        func = func.func
    return str(getattr(func, "__name__", ""))


def no_resource(task: FunctionTask) -> Iterable[str]:
    """The problem of a function that outlives its executions and wants a resource, which is given for one (T7)."""
    if task.signature.takes_resource:
        yield "its function takes 'resource', which is given for one execution: take it in a function task instead"


class GeneratorTask(FunctionTask):
    """What streams and loops share: a generator function without parameters is sent its first context, too (seed).

    takes_context: whether it is given it instead.
    """

    def __init__(
        self, func: Callable[..., Any], config: TaskConfig | None = None, name: str = "", **options: Any
    ) -> None:
        super().__init__(func, config, name, **options)
        self.signature, self.takes_context = generator_signature(func)

    def problems(self) -> Iterable[str]:
        """Also: a pooled resource is held for one execution, which a generator outlives."""
        yield from super().problems()
        yield from no_resource(self)


class AsyncTask(FunctionTask):
    """A task whose function suspends on the event loop."""


class SyncTask(FunctionTask):
    """A task whose function is plain code and runs in the engine's thread pool."""

    runs_on = "thread"


class ForegroundTask(FunctionTask):
    """A task whose function is plain code and runs on the loop's own thread, where it holds up everything else."""

    runs_on = "loop"


class AsyncFunctionTask(AsyncTask):
    """Awaits a coroutine function: `async def f(context[, env])` returns what goes on (T1)."""

    kind = "async"
    accepts = ("coroutine",)
    may_pass_through = True
    nothing_comes_back = NOTHING_COMES_BACK


class SyncFunctionTask(SyncTask):
    """Calls a plain function in a thread: `def f(context[, env])` returns what goes on (T1)."""

    kind = "sync"
    accepts = ("function",)
    may_pass_through = True
    nothing_comes_back = NOTHING_COMES_BACK


class ForegroundSyncFunctionTask(ForegroundTask):
    """Calls a plain function on the loop's thread: for what is quicker than a thread's hand-over (T1)."""

    kind = "foreground"
    accepts = ("function",)
    may_pass_through = True
    nothing_comes_back = NOTHING_COMES_BACK


class ShutdownTask(FunctionTask):
    """The function is a callable object with `shutdown()` and, if it likes, `startup(env)`, plain or async (seed).

    Each run works on its own deep copy of the object (T10). The hooks may return an awaitable, which is awaited.
    """

    def problems(self) -> Iterable[str]:
        """Also: the object has no `shutdown`, or is a class."""
        if isinstance(self.func, type):
            yield f"its function is the class {self.func.__name__}; give an instance"
        elif not callable(getattr(self.func, "shutdown", None)):
            yield f"{type(self).__name__} needs a callable object with a method shutdown()"
        yield from super().problems()

    def for_run(self) -> Task:
        """A copy around a deep copy of the object. Raises TaskError if the object cannot be copied."""
        mine = super().for_run()
        try:
            mine.func = copy.deepcopy(self.func)
        except Exception as error:
            raise TaskError(
                f"task {self.id!r}: its {type(self.func).__name__} cannot be copied for a run ({error}); "
                "make what cannot be copied (locks, connections, files) in its startup(env)"
            ) from error
        return mine

    def startup(self, env: Environment) -> Any:
        """Calls the object's `startup(env)`, if it has one."""
        hook = getattr(self.func, "startup", None)
        return hook(env) if hook is not None else None

    def shutdown(self) -> Any:
        """Calls the object's `shutdown()`."""
        return self.func.shutdown()  # type: ignore[union-attr]


class AsyncFunctionShutdownTask(ShutdownTask, AsyncFunctionTask):
    """An AsyncFunctionTask around a callable object with `shutdown()`."""

    kind = "async_shutdown"


class SyncFunctionShutdownTask(ShutdownTask, SyncFunctionTask):
    """A SyncFunctionTask around a callable object with `shutdown()`."""

    kind = "sync_shutdown"


class ForegroundSyncFunctionShutdownTask(ShutdownTask, ForegroundSyncFunctionTask):
    """A ForegroundSyncFunctionTask around a callable object with `shutdown()`."""

    kind = "foreground_shutdown"
