"""One piece of work in a pool, and what a pool tells about itself.

States of a job, changed on the loop's thread only:
    waiting   no thread or process has taken it (`started` is False)
    running   one has (`started` is True)
    over      its function is not running and never will
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["PoolEvents", "PoolJob", "fail_quietly", "tell"]


class PoolEvents(Protocol):
    """What a pool tells, on the loop's thread, after it happened."""

    def thread_abandoned(self, thread: str, what: str, running_s: float) -> None:
        """A thread runs `what`, since `running_s` seconds, for nobody any more; told once per job (SEMANTICS T13)."""
        ...

    def pool_rebuilt(self, pool: str, reason: str) -> None:
        """A worker process died by itself and is replaced when one is needed; `pool` is "process" (SEMANTICS T11)."""
        ...


class JobOwner(Protocol):
    """What a job asks of its pool."""

    def _abandon(self, job: PoolJob) -> bool: ...


class PoolJob:
    """One piece of work. To be used on the loop's thread.

    future: result or exception of the work. Cancelling it never breaks the pool: a job that still waits is then not run
        any more, the result of one that runs is discarded.
    started: whether a thread or process has taken it; until then it is in the state pool_wait.
    on_start: called when it is taken, unless that happened within `submit`.
    on_return: called when the function of an abandoned job has really returned, or its process is dead (T13).
    abandoned: whether `abandon` was called, or the pool was closed, while it ran.
    label: what it runs, for people.
    """

    __slots__ = ("_pool", "_since", "_work", "abandoned", "future", "label", "on_return", "on_start", "over", "started")

    def __init__(self, pool: JobOwner, future: asyncio.Future[Any], work: Any, label: str) -> None:
        self.future = future
        self.label = label
        self.started = False
        self.abandoned = False
        self.over = False
        self.on_start: Callable[[], None] | None = None
        self.on_return: Callable[[], None] | None = None
        self._pool = pool
        self._work = work
        self._since = 0.0

    def __repr__(self) -> str:
        state = "over" if self.over else "running" if self.started else "waiting"
        return f"<PoolJob {self.label} {state}{' abandoned' if self.abandoned else ''}>"

    def abandon(self) -> bool:
        """The result is not wanted any more; the future is cancelled. Returns whether the function is certainly not
        running.

        True: it had not started, and never will, or it is over. False: it runs (a process is killed, a thread cannot
        be); its result will be discarded and `on_return` called when it has really returned (SEMANTICS T13).
        """
        self.future.cancel()
        return self.over or self._pool._abandon(self)


def tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., None] | None, *arguments: Any) -> None:
    """Calls `callback`, if there is one. What it raises goes to the loop's exception handler: a pool must go on."""
    if callback is None:
        return
    try:
        callback(*arguments)
    except Exception as error:
        loop.call_exception_handler({"message": f"a pool's callback {callback!r} raised", "exception": error})


def fail_quietly(future: asyncio.Future[Any], error: BaseException) -> None:
    """Sets `error` unless the future is done; nobody needs to look at it."""
    if not future.done():
        future.set_exception(error)
        future.exception()  # marks it as seen: asyncio logs exceptions that nobody fetched
