"""Router tasks: the function returns which of the tasks right below it are taken (T5, T9)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from obsdag.tasks.base import Shape, Task, TaskConfig
from obsdag.tasks.function import AsyncTask, ForegroundTask, FunctionTask, SyncTask

__all__ = ["AsyncRouterTask", "ForegroundSyncRouterTask", "RouterTask", "SyncRouterTask"]


class RouterTask(FunctionTask):
    """The function returns the task ids (or tasks) to take; what is only below the others is skipped (T9).

    targets: the ids (or tasks) that it may return, to be checked when the DAG is built; None: whatever is below.
    """

    shape: ClassVar[Shape] = "router"
    nothing_comes_back = (
        "every return of its function is None, so it chooses nothing and drops every context: return task ids"
    )

    def __init__(
        self,
        func: Callable[..., Any],
        config: TaskConfig | None = None,
        name: str = "",
        targets: Iterable[str | Task] | str | Task | None = None,
        **options: Any,
    ) -> None:
        super().__init__(func, config, name, **options)
        if isinstance(targets, str | Task):
            targets = (targets,)
        self.targets: tuple[str, ...] | None = (
            None if targets is None else tuple(target if isinstance(target, str) else target.id for target in targets)
        )


class AsyncRouterTask(RouterTask, AsyncTask):
    """A router by a coroutine function."""

    kind = "async_router"
    accepts = ("coroutine",)


class SyncRouterTask(RouterTask, SyncTask):
    """A router by a plain function, in a thread."""

    kind = "sync_router"
    accepts = ("function",)


class ForegroundSyncRouterTask(RouterTask, ForegroundTask):
    """A router by a plain function on the loop's thread: what most routers should be."""

    kind = "foreground_router"
    accepts = ("function",)
