"""The engine's thread pool: daemon threads of its own (SEMANTICS T12, T13, E9, E18).

Not concurrent.futures': its threads are joined when the interpreter exits, so that one task that hangs would keep the
process from ending.

Who touches what. The loop's thread owns everything but two things: each thread's `inbox`, which it fills and the thread
empties, and `_returned`, which the threads fill and `_drain` empties. Jobs are handed out on the loop's side, so that
`job.started` is a fact there, without a message from the thread. Many threads that finish at once wake the loop once.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from obsdag.errors import ConfigError, PoolError
from obsdag.pools.job import PoolEvents, PoolJob, fail_quietly, tell

__all__ = ["ThreadPool"]

_ENDED = object()  # a thread's last message
_LAST_STEPS_S = 0.2  # a thread is gone within microseconds of its last message; this bounds a destructor that blocks
_IDLE_END_S = 1.0  # what idle threads get to end in when `close` has no grace at all


class _PoolThread(threading.Thread):
    """Takes work from its inbox until it gets None, or until nobody can hear its results any more."""

    def __init__(self, name: str, post: Callable[[_PoolThread, Any, BaseException | None], bool]) -> None:
        super().__init__(name=name, daemon=True)
        self.inbox: SimpleQueue[tuple[contextvars.Context, Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self.job: PoolJob | None = None  # the loop's
        self._post = post

    def run(self) -> None:
        while (work := self.inbox.get()) is not None:
            result, error = _call(*work)
            del work  # an idle thread must not keep a job's objects alive
            if not self._post(self, result, error):
                return
            del result, error
        self._post(self, _ENDED, None)


class ThreadPool:
    """Up to `size` threads (0: min(32, processors + 4)), started on demand, used from one event loop.

    name: prefix of the threads' names. replace_cap: how many threads that run abandoned jobs are replaced by further
    ones (None: `size`). events: told about abandoned jobs. Raises ConfigError for a negative size or cap.

    Shutdown, by `close`: 1. `submit` raises, waiting jobs fail with PoolError. 2. Every thread is told to end after its
    job. 3. Up to the grace, jobs may finish. 4. What runs still is abandoned, and described to the caller.
    """

    def __init__(
        self, size: int, name: str, *, replace_cap: int | None = None, events: PoolEvents | None = None
    ) -> None:
        if size < 0:
            raise ConfigError(f"ThreadPool: size must be >= 0, not {size}")
        if replace_cap is not None and replace_cap < 0:
            raise ConfigError(f"ThreadPool: replace_cap must be >= 0 or None, not {replace_cap}")
        self.size = size or min(32, (os.cpu_count() or 1) + 4)
        self.name = name if name.startswith("obsdag") else f"obsdag-{name}"
        self._replace_cap = self.size if replace_cap is None else replace_cap
        self._events = events
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: set[_PoolThread] = set()
        self._idle: list[_PoolThread] = []
        self._waiting: OrderedDict[PoolJob, None] = OrderedDict()
        self._leaving: set[_PoolThread] = set()
        self._running = 0
        self._abandoned = 0
        self._numbers = itertools.count(1)
        self._returned: deque[tuple[_PoolThread, Any, BaseException | None]] = deque()
        self._drain_is_due = False
        self._closed = False
        self._thread_ended: asyncio.Event | None = None

    # --- numbers, for metrics; safe to read from any thread

    @property
    def workers(self) -> int:
        """Threads that live, those of abandoned jobs included."""
        return len(self._threads)

    @property
    def busy(self) -> int:
        """Threads that run a job that is wanted."""
        return max(0, self._running - self._abandoned)

    @property
    def queued(self) -> int:
        """Jobs that wait for a thread."""
        return len(self._waiting)

    @property
    def abandoned(self) -> int:
        """Threads that run a job that nobody wants any more."""
        return self._abandoned

    # --- work

    def submit(
        self, function: Callable[..., Any], /, *args: Any, context: contextvars.Context, label: str = ""
    ) -> PoolJob:
        """Runs `context.run(function, *args)` in a thread. Call it in the event loop.

        Whatever is raised, KeyboardInterrupt and SystemExit too, becomes the future's exception; StopIteration, which a
        future cannot carry, as the cause of a RuntimeError. Raises PoolError if the pool is closed, or cannot start
        its first thread.
        """
        if self._closed:
            raise PoolError(f"thread pool {self.name!r} is closed")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        job = PoolJob(self, self._loop.create_future(), (context, function, args), label or _label(function))
        thread = self._free_thread()
        if thread is None:
            self._waiting[job] = None
        else:
            self._hand_over(job, thread)
        return job

    async def close(self, grace: float) -> list[str]:
        """Ends the threads; those that run a job get up to `grace` seconds. Returns a line for each that is left.

        The threads that are gone have really ended. One that is left is abandoned: it ends when its function returns,
        `on_return` of its job is called then if the loop still runs, and the interpreter does not wait for it.
        """
        self._closed = True
        while self._waiting:
            job, _ = self._waiting.popitem(last=False)
            job.over = True
            fail_quietly(job.future, PoolError(f"thread pool {self.name!r} was closed before {job.label} could start"))
        self._idle.clear()
        for thread in self._threads:
            thread.inbox.put(None)
        self._thread_ended = self._thread_ended or asyncio.Event()
        await self._wait_until(lambda: not self._threads and not self._leaving, grace)
        await self._wait_until(lambda: all(thread.job for thread in self._threads | self._leaving), _IDLE_END_S)
        return [self._give_up(thread) for thread in sorted(self._threads, key=lambda thread: thread.name)]

    # --- on the loop's thread

    def _free_thread(self) -> _PoolThread | None:
        if self._idle:
            return self._idle.pop()
        if len(self._threads) >= self._allowed():
            return None
        thread = _PoolThread(f"{self.name}-{next(self._numbers)}", self._post)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._threads:
                raise PoolError(f"thread pool {self.name!r} cannot start a thread: {error}") from error
            return None  # the machine has no more of them: the jobs wait for the threads that there are
        self._threads.add(thread)
        return thread

    def _allowed(self) -> int:
        return self.size + min(self._abandoned, self._replace_cap)

    def _hand_over(self, job: PoolJob, thread: _PoolThread) -> None:
        assert self._loop is not None
        job.started = True
        job._since = self._loop.time()
        thread.job = job
        self._running += 1
        work, job._work = job._work, None
        thread.inbox.put(work)

    def _dispatch(self) -> None:
        assert self._loop is not None
        while self._waiting and not self._closed:
            job = next(iter(self._waiting))
            if job.future.done():  # cancelled by whoever awaited it: nobody wants it
                del self._waiting[job]
                job.over = True
                continue
            thread = self._free_thread()
            if thread is None:
                return
            del self._waiting[job]
            self._hand_over(job, thread)
            tell(self._loop, job.on_start)

    def _abandon(self, job: PoolJob) -> bool:
        if not job.started:
            self._waiting.pop(job, None)
            job.over = True
            return True
        if not job.abandoned:
            job.abandoned = True
            self._abandoned += 1
            self._report_abandoned(job)
            self._dispatch()
        return False

    def _report_abandoned(self, job: PoolJob) -> None:
        if self._events is None or self._loop is None:
            return
        name = next((thread.name for thread in self._threads if thread.job is job), self.name)
        tell(self._loop, self._events.thread_abandoned, name, job.label, self._loop.time() - job._since)

    def _drain(self) -> None:
        # The flag falls before the deque is read: what comes later than that schedules another drain.
        self._drain_is_due = False
        for _ in range(len(self._returned)):
            thread, result, error = self._returned.popleft()
            if result is _ENDED:
                self._forget(thread)
            else:
                self._settle(thread, result, error)
        self._dispatch()

    def _settle(self, thread: _PoolThread, result: Any, error: BaseException | None) -> None:
        job, thread.job = thread.job, None
        assert job is not None
        assert self._loop is not None
        job.over = True
        self._running -= 1
        if job.abandoned:
            self._abandoned -= 1
            tell(self._loop, job.on_return)
        elif not job.future.done():
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)
        if self._closed:
            return  # it was told to end already
        if len(self._threads) > self._allowed():
            self._threads.discard(thread)
            self._leaving.add(thread)
            thread.inbox.put(None)
        else:
            self._idle.append(thread)

    def _forget(self, thread: _PoolThread) -> None:
        thread.join(_LAST_STEPS_S)
        self._threads.discard(thread)
        self._leaving.discard(thread)
        if self._thread_ended is not None:
            self._thread_ended.set()

    async def _wait_until(self, reached: Callable[[], bool], seconds: float) -> None:
        assert self._thread_ended is not None
        try:
            async with asyncio.timeout(seconds):
                while not reached():
                    self._thread_ended.clear()
                    await self._thread_ended.wait()
        except TimeoutError:
            pass

    def _give_up(self, thread: _PoolThread) -> str:
        assert self._loop is not None
        job = thread.job
        if job is None:
            return f"thread {thread.name} has not ended"
        if not job.abandoned:
            job.abandoned = True
            self._abandoned += 1
            fail_quietly(job.future, PoolError(f"thread pool {self.name!r} was closed while {job.label} ran"))
        return f"thread {thread.name} runs {job.label} since {self._loop.time() - job._since:.1f} s"

    # --- in the pool's threads

    def _post(self, thread: _PoolThread, result: Any, error: BaseException | None) -> bool:
        """Hands a result to the loop; False if the loop is closed, so that nobody will ever hear of it."""
        assert self._loop is not None
        self._returned.append((thread, result, error))
        if self._loop.is_closed():
            return False
        if self._drain_is_due:
            return True
        self._drain_is_due = True
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            return False
        return True


def _call(
    context: contextvars.Context, function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Any, BaseException | None]:
    try:
        return context.run(function, *args), None
    except (StopIteration, GeneratorExit) as stop:  # both mean something else to the coroutine that awaits the job
        error = RuntimeError(f"{_label(function)} raised {type(stop).__name__}")
        error.__cause__ = stop
        return None, error
    except BaseException as error:
        return None, error


def _label(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", "") or repr(function)
