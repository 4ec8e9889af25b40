"""Stream tasks: one generator takes context after context and yields what goes on; it lives with the run (T5, T14)."""

from __future__ import annotations

from typing import ClassVar

from obsdag.tasks.base import Shape
from obsdag.tasks.function import AsyncTask, ForegroundTask, GeneratorTask, SyncTask

__all__ = ["AsyncStreamTask", "ForegroundSyncStreamTask", "StreamTask", "SyncStreamTask"]


class StreamTask(GeneratorTask):
    """A generator that is sent context after context and yields what goes on for each, one execution at a time.

    `context = yield result` is the usual line.
    """

    shape: ClassVar[Shape] = "stream"


class AsyncStreamTask(StreamTask, AsyncTask):
    """A stream by an async generator, on the loop."""

    kind = "async_stream"
    accepts = ("asyncgen",)


class SyncStreamTask(StreamTask, SyncTask):
    """A stream by a generator, in a thread."""

    kind = "sync_stream"
    accepts = ("generator",)


class ForegroundSyncStreamTask(StreamTask, ForegroundTask):
    """A stream by a generator, on the loop's thread."""

    kind = "foreground_stream"
    accepts = ("generator",)
