"""A process pool as a `concurrent.futures.Executor`: what `Environment.process_pool` gives to users' functions (seed).

    async def task(context, env):
        loop = asyncio.get_running_loop()
        context["digest"] = await loop.run_in_executor(env.process_pool, digest, context["text"])

`submit` may be called from any thread. The pool lives on the event loop, so a thread may wait for a future, but the
loop's own thread must not: `result()` and `exception()` raise RuntimeError there, instead of waiting for ever.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from obsdag.errors import EncodingError, PoolError
from obsdag.pools.carry import Packer, RemoteFailure, Unpacker, dumps, pack_error, str_of, type_name, unpack_error

if TYPE_CHECKING:
    import asyncio

    from obsdag.pools.job import PoolJob
    from obsdag.pools.process import ProcessPool

__all__ = ["CallExecutor", "run_call"]

T = TypeVar("T")


def run_call(payload: bytes) -> bytes:
    """In the worker process: calls the function that was submitted. Never raises."""
    packer = Packer()
    try:
        function, args, kwargs = Unpacker(payload).take()
        value = function(*args, **kwargs)
        try:
            packer.put((True, value))
        except Exception as error:
            raise EncodingError(
                f"the result of type {type_name(type(value))} cannot be carried back from a worker process: {error}"
            ) from error
    except BaseException as error:
        return dumps((False, pack_error(error)))
    return packer.bytes()


class CallFuture(concurrent.futures.Future[T]):
    """A future that refuses to block the thread that has to complete it."""

    _obsdag_loop_thread = 0

    def result(self, timeout: float | None = None) -> T:
        """The result; raises RuntimeError instead of blocking the event loop's own thread."""
        self._check()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The exception or None; raises RuntimeError instead of blocking the event loop's own thread."""
        self._check()
        return super().exception(timeout)

    def _check(self) -> None:
        if threading.get_ident() == self._obsdag_loop_thread and not self.done():
            raise RuntimeError(
                "waiting here would block the event loop that the process pool lives on: "
                "use `await loop.run_in_executor(env.process_pool, ...)` or `await asyncio.wrap_future(future)`"
            )


class CallExecutor(concurrent.futures.Executor):
    """Runs functions in the worker processes of a ProcessPool, which the engine opens and closes."""

    def __init__(self, pool: ProcessPool, loop: asyncio.AbstractEventLoop, loop_thread: int) -> None:
        self._pool = pool
        self._loop = loop
        self._loop_thread = loop_thread

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> CallFuture[T]:
        """Runs `fn(*args, **kwargs)` in a worker process. Function and arguments must be picklable (the future
        fails).
        """
        future: CallFuture[T] = CallFuture()
        future._obsdag_loop_thread = self._loop_thread
        try:
            payload = dumps((fn, args, kwargs))
        except Exception as error:
            problem = EncodingError(f"the call of {str_of(fn, repr)} cannot be carried to a worker process: {error}")
            problem.__cause__ = error
            future.set_exception(problem)
            return future
        label = getattr(fn, "__qualname__", "") or str_of(fn, repr)
        try:
            self._loop.call_soon_threadsafe(self._begin, future, payload, label)
        except RuntimeError as error:
            raise PoolError("the process pool's event loop is closed") from error
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Does nothing: the pool belongs to the engine, which closes it (SEMANTICS E18)."""

    def _begin(self, future: CallFuture[Any], payload: bytes, label: str) -> None:
        if future.cancelled():
            return
        try:
            job = self._pool.submit_call(payload, label)
        except PoolError as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
            return
        job.on_start = lambda: self._started(future, job)
        job.future.add_done_callback(lambda done: _finish(future, done))
        future.add_done_callback(lambda done: self._withdraw(done, job))

    def _started(self, future: CallFuture[Any], job: PoolJob) -> None:
        if not future.set_running_or_notify_cancel():
            job.abandon()

    def _withdraw(self, future: concurrent.futures.Future[Any], job: PoolJob) -> None:
        if future.cancelled():
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the pool with it
                self._loop.call_soon_threadsafe(_abandon_waiting, job)


def _abandon_waiting(job: PoolJob) -> None:
    if not job.over:
        job.abandon()


def _finish(future: CallFuture[Any], done: asyncio.Future[bytes]) -> None:
    if future.done():
        return
    if not future.running() and not future.set_running_or_notify_cancel():
        return
    if done.cancelled():
        future.set_exception(PoolError("the call was abandoned"))
        return
    error = done.exception()
    if error is not None:
        future.set_exception(error)
        return
    try:
        succeeded, value = Unpacker(done.result()).take()
    except Exception as problem:
        future.set_exception(EncodingError(f"the result of a worker process cannot be unpickled: {problem}"))
        return
    if succeeded:
        future.set_result(value)
    else:
        future.set_exception(unpack_error(RemoteFailure(*value)))
