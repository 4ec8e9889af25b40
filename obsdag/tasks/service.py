"""Service tasks: one long-lived function answers a queue of `(context, future)` (T5, T14)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from obsdag.tasks.base import Shape
from obsdag.tasks.function import AsyncTask, FunctionTask, SyncTask, no_resource

__all__ = ["AsyncServiceTask", "ServiceTask", "SyncThreadTask"]


class ServiceTask(FunctionTask):
    """A function, started once per run, that answers each `(context, future)` of a queue by setting the future."""

    shape: ClassVar[Shape] = "service"
    given = ("the queue",)

    def problems(self) -> Iterable[str]:
        """Also: a pooled resource is held for one execution, which a service outlives."""
        yield from super().problems()
        yield from no_resource(self)


class AsyncServiceTask(ServiceTask, AsyncTask):
    """`async def serve(queue[, env])`, on the loop: `context, future = await queue.get()`."""

    kind = "service"
    accepts = ("coroutine",)


class SyncThreadTask(ServiceTask, SyncTask):
    """`def serve(queue[, env])` in a thread of its own: `context, future = queue.get()`."""

    kind = "thread"
    accepts = ("function",)
