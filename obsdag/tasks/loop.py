"""Loop tasks: a generator is given one context and yields new ones, one at a time, until it ends (T5, T14)."""

from __future__ import annotations

from typing import ClassVar

from obsdag.tasks.base import Shape
from obsdag.tasks.function import AsyncTask, ForegroundTask, GeneratorTask, SyncTask

__all__ = ["AsyncLoopTask", "ForegroundSyncLoopTask", "LoopTask", "SyncLoopTask"]


class LoopTask(GeneratorTask):
    """A generator that makes new contexts out of one; pulled, so never ahead of what the run can take in (E16)."""

    shape: ClassVar[Shape] = "loop"


class AsyncLoopTask(LoopTask, AsyncTask):
    """A loop by an async generator, on the loop's thread between its awaits."""

    kind = "async_loop"
    accepts = ("asyncgen",)


class SyncLoopTask(LoopTask, SyncTask):
    """A loop by a generator, in a thread."""

    kind = "sync_loop"
    accepts = ("generator",)


class ForegroundSyncLoopTask(LoopTask, ForegroundTask):
    """A loop by a generator, on the loop's thread."""

    kind = "foreground_loop"
    accepts = ("generator",)
