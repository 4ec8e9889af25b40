"""A worker: it takes a context from the queue, drives it as far as it goes, and gives it back (SEMANTICS T2, E4, E5,
E10, E17).

A visit has one runner, and further ones for further ready tasks of the same context, up to `task_worker_num`. The
runner that ends last goes on as the worker, so nobody waits for anybody (E5). A worker ends when there is nothing to
take, and while more may be submitted at any time it waits for that; idle ones cost nothing (E7).

    run -> take -> drive -> [begin -> task -> finish] ... -> leave -> take ...
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from obsdag.context import Context, LoopContext

if TYPE_CHECKING:
    from obsdag.shell import RunShell

__all__ = ["Worker", "WorkerLocalProxy", "worker_local"]

_current_worker: contextvars.ContextVar[Worker | None] = contextvars.ContextVar("obsdag_worker", default=None)


class Worker:
    """One of `context_worker_num`. Its fields belong to the event loop's thread; `storage` to its tasks (E10).

    number: from 0. runners: how many asyncio tasks drive the context of the visit. context, since: the visit (run
    clock). parked: what its asyncio task waits for while it is idle, if it has one then.
    """

    __slots__ = ("base", "context", "number", "parked", "runners", "shell", "since", "storage")

    def __init__(self, shell: RunShell, number: int) -> None:
        self.shell = shell
        self.number = number
        self.runners = 0
        self.context: Context | None = None
        self.since = 0.0
        self.parked: asyncio.Future[None] | None = None
        self.storage: dict[str, Any] = {}
        base = shell.base.copy()
        base.run(_current_worker.set, self)
        self.base = base

    def start(self) -> None:
        """Begins to work: in the asyncio task where it waits for that, or in a new one, in a fresh copy of the caller's
        contextvars.
        """
        parked, self.parked = self.parked, None
        if parked is not None and not parked.done():  # else it was cancelled
            parked.set_result(None)
            return
        self.shell.spawn(self._work(None), self.base.copy())

    async def _work(self, context: Context | None) -> None:  # noqa: C901 - the hot loop: calls cost more than lines
        """Visits one context after the other until there is nothing to do; first, as a further runner, `context`."""
        shell, run, clock = self.shell, self.shell.run, self.shell.clock
        begin, advance, direct, facts = run.begin, run.finish_and_begin, shell.direct, run.facts
        number, width, alone = self.number, shell.width, shell.width == 1
        handle = asyncio.current_task()
        assert handle is not None
        now = clock()
        while True:
            if context is None:
                while (context := shell.next_context(self)) is None:
                    if not await self._is_woken():
                        return
                self.context, self.runners = context, 1
                now = self.since
                if type(context) is LoopContext:
                    await shell.drive_pull(context, self)
                    now = clock()
                    if shell.free and (run.queue.size or run.queue.loop):
                        shell.wake_worker()
            execution = begin(context, now, number)
            while execution is not None:
                execution.handle = handle
                if not alone and context._ready and (not width or self.runners < width):
                    self.runners += 1
                    shell.spawn(self._work(context), None)
                call = direct[execution.index]
                if call is None:
                    await shell.execute(execution)
                    now = clock()
                else:
                    if (tell := facts.execution_started) is not None:
                        tell(execution, now)
                    try:
                        result = await call(context)
                    except BaseException as error:
                        await shell.failed(execution, error)
                        now = clock()
                    else:
                        now = clock()
                        if result is not context or execution.seldom is not None:
                            shell.finish(execution, result)
                        elif now > shell.turn_end:
                            run.finish(execution, result, now)
                        elif (following := advance(execution, now)) is not None:
                            execution = following  # and so nothing was queued or left to do
                            continue
                        if run.dirty:
                            shell.pump()
                if shell.free and (run.queue.size or run.queue.loop):
                    shell.wake_worker()
                execution = result = None  # of an idle worker this frame stays
                if context._ready:
                    if now > shell.turn_end:
                        await shell.let_others_run()
                        now = clock()
                    execution = begin(context, now, number)
            self.runners -= 1
            if self.runners:
                return  # another runner of this visit ends last and goes on as the worker
            run.leave(context, number, now - self.since, now)
            if run.dirty:
                shell.pump()
            self.context = context = None
            if contextvars.copy_context() != self.base:
                self.start()  # a task left a context variable set: the next visit starts clean (E17)
                return
            if now > shell.turn_end and shell.to_take:
                await shell.let_others_run()

    async def _is_woken(self) -> bool:
        """Idle: waits until it is started again, where there may be more to do; else False, at once."""
        parked = self.parked = self.shell.loop.create_future() if self.shell.may_be_given_more else None
        self.shell.worker_idle(self)
        if parked is None:
            return False
        try:
            await parked
        except asyncio.CancelledError:
            if self.parked is None and not self.shell.is_over:  # cancelled in the moment in which it was woken
                self.start()
            raise
        return True


class WorkerLocalProxy:
    """Attributes per worker for a run, in its threads too (E10, seed).

    Reading what is missing raises AttributeError; setting or deleting outside a worker raises RuntimeError; `in` works.
    """

    __slots__ = ()

    def _storage(self, doing: str) -> dict[str, Any]:
        worker = _current_worker.get()
        if worker is None:
            raise RuntimeError(f"worker_local: {doing} is possible only inside a task, on one of the engine's workers")
        return worker.storage

    def __getattr__(self, name: str) -> Any:
        worker = _current_worker.get()
        if worker is None or name not in worker.storage:
            raise AttributeError(f"worker_local has no attribute {name!r} on this worker")
        return worker.storage[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self._storage(f"setting {name!r}")[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self._storage(f"deleting {name!r}")[name]
        except KeyError:
            raise AttributeError(f"worker_local has no attribute {name!r} on this worker") from None

    def __contains__(self, name: object) -> bool:
        worker = _current_worker.get()
        return worker is not None and name in worker.storage

    def __iter__(self) -> Iterator[str]:
        worker = _current_worker.get()
        return iter(list(worker.storage) if worker is not None else ())


worker_local = WorkerLocalProxy()
"""The current worker's attributes: a connection that each worker opens once, say."""
