"""How calls of any thread reach a run, and what a run's own frames start from: its clock, its contextvars."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from obsdag.core.records import Execution, current_execution

if TYPE_CHECKING:
    from obsdag.core.state import RunState
    from obsdag.worker import Worker

__all__ = ["Mailbox", "clean_copy", "clock_of", "see_through"]


class Mailbox:
    """The part of a run's shell that may be called from any thread; it carries the call to the run's own."""

    __slots__ = ("_nudged", "_over", "clock", "inputs", "loop", "open_ended", "run", "thread", "workers")

    run: RunState
    loop: asyncio.AbstractEventLoop
    thread: int
    clock: Callable[[], float]
    workers: list[Worker]
    inputs: Iterator[Any] | None
    open_ended: bool
    _nudged: bool
    _over: bool

    @property
    def to_take(self) -> bool:
        """Whether a worker that takes something may find it; else those in line only wait for their own end (E7)."""
        run = self.run
        return self.inputs is not None or bool(run.queue.size or run.queue.loop or run.rooms)

    @property
    def is_over(self) -> bool:
        """Whether the run's end has begun."""
        return self._over

    @property
    def may_be_given_more(self) -> bool:
        """Whether an idle worker had better wait: more may be submitted at any time, and the end has not begun."""
        return self.open_ended and not self._over

    def pump(self) -> None:
        """Does what the core left to do."""
        raise NotImplementedError

    def dispatch(self, action: Callable[..., Any], argument: Any) -> None:
        """Carries out `action(argument, now)` on the run's thread: now if this is it, else as soon as possible."""
        caller = self._caller() if action == self.run.destroy else None
        if threading.get_ident() == self.thread:
            self._dispatched(action, argument, caller)
        else:
            self._threadsafe(self._dispatched, action, argument, caller)

    def _caller(self) -> Execution | None:
        execution = current_execution.get()
        if execution is not None and execution.outcome is None:
            return execution
        if threading.get_ident() != self.thread:
            return None
        try:
            current = asyncio.current_task()
        except RuntimeError:
            return None
        for worker in self.workers:
            for execution in (worker.context._executions or ()) if worker.context is not None else ():
                if execution.handle is current and current is not None:
                    return execution
        return None

    def _dispatched(self, action: Callable[..., Any], argument: Any, caller: Execution | None) -> None:
        if self._over:
            return
        if action == self.run.destroy:
            self.run.destroy(argument, self.clock(), caller)
        else:
            action(argument, self.clock())
        self.pump()

    def nudge(self) -> None:
        """Something changed that the run must look at; from another thread it is carried over, once for many."""
        if self._nudged:
            return
        self._nudged = True
        if threading.get_ident() == self.thread:
            self.run.dirty = True
            self.loop.call_soon(self._nudge)  # another run of this thread may have nudged, and this one be idle
        else:
            self._threadsafe(self._nudge)

    def _nudge(self) -> None:
        self._nudged = False
        if not self._over:
            self.run._settle_all(self.clock())
            self.pump()

    def _threadsafe(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the run is over, and nothing is left to be told
            self._over = True


def clock_of(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """The loop's clock; the plain function behind it where the loop has not replaced it, which saves a call."""
    if type(loop).time is asyncio.BaseEventLoop.time:
        return time.monotonic
    return loop.time


def clean_copy() -> contextvars.Context:
    """A copy of the caller's contextvars without its span: what a worker starts from (E17)."""
    from opentelemetry import context as otel_context
    from opentelemetry import trace

    copy = contextvars.copy_context()
    # Even where there is none: tracing puts it back at the end of a visit, and a visit has to end as it began.
    copy.run(lambda: otel_context.attach(trace.set_span_in_context(trace.INVALID_SPAN)))
    copy.run(current_execution.set, None)
    return copy


async def see_through(coroutine: Coroutine[Any, Any, None]) -> None:
    """Awaits `coroutine` to its end, however often the caller is cancelled meanwhile (E9); then it is told so.

    Raises the first CancelledError that came, else what the coroutine raised.
    """
    task = asyncio.get_running_loop().create_task(coroutine)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = cancelled or error
    raised = None if task.cancelled() else task.exception()
    if cancelled is not None and (raised is None or isinstance(raised, Exception)):
        raise cancelled
    task.result()
