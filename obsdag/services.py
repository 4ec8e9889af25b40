"""Services: one long-running function that is fed by a queue of `(context, future)` (SEMANTICS T5, T14).

A context that waits for a service holds no worker. The service answers by setting the future, in any order, when it
likes; an answer that nobody wants any more is ignored. At the run's end it is sent `(StopContext(), future)`; one that
ignores it is cancelled. A service that dies fails what was in it, and is started anew by the next context.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from obsdag.context import StopContext
from obsdag.core.records import Execution
from obsdag.errors import ServiceError

if TYPE_CHECKING:
    from obsdag.runners import Runners
    from obsdag.tasks.base import Task

__all__ = ["Answer", "ServiceRunner", "ThreadAnswer", "ThreadInbox"]

_CLOSED: Any = object()
_LAST_S = 1.0


class Answer(asyncio.Future[Any]):
    """The future of one context in a service; setting it again, or after it was cancelled, is ignored (T14)."""

    def set_result(self, result: Any) -> None:
        """Answers the context: what goes on, as a task would return it (T1)."""
        if not self.done():
            super().set_result(result)

    def set_exception(self, exception: type | BaseException) -> None:
        """Fails the context's execution with `exception`."""
        if not self.done():
            super().set_exception(exception)


class ThreadAnswer:
    """The future of one context in a thread service, to be set from that thread; `put` is the seed's name for it."""

    __slots__ = ("_answer", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, answer: Answer) -> None:
        self._loop = loop
        self._answer = answer

    def done(self) -> bool:
        """Whether it was answered or is not wanted any more."""
        return self._answer.done()

    def cancelled(self) -> bool:
        """Whether nobody wants the answer any more."""
        return self._answer.cancelled()

    def set_result(self, result: Any) -> None:
        """Answers the context: what goes on, as a task would return it (T1)."""
        self._post(self._answer.set_result, result)

    put = set_result

    def set_exception(self, exception: BaseException) -> None:
        """Fails the context's execution with `exception`."""
        self._post(self._answer.set_exception, exception)

    def _post(self, setter: Callable[[Any], None], value: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(setter, value)
        except RuntimeError:
            return  # the loop is closed: nobody is left to be answered


class Inbox(asyncio.Queue[Any]):
    """The queue of a service on the loop. `exhausted` is resolved when it asks for more after it was told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = False  # whether anything was ever taken from it
        self.closed = False
        self.exhausted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def get(self) -> Any:
        """The next `(context, future)`; at last `(StopContext(), future)`."""
        if self.closed and self.empty() and not self.exhausted.done():
            self.exhausted.set_result(None)
        return await super().get()

    def _get(self) -> Any:
        self.taken = True
        return super()._get()


class ThreadInbox(queue.Queue[Any]):
    """The queue of a thread service. When it is closed, `get` gives what is left and then ends the thread by
    SystemExit.
    """

    taken = False

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next `(context, future)`. Raises queue.Empty as usual, SystemExit when the service is to end."""
        item = super().get(block, timeout)
        if item is _CLOSED:
            self.put(_CLOSED)
            raise SystemExit("the service is stopped")
        return item

    def _get(self) -> Any:
        self.taken = True
        return super()._get()


class ServiceRunner:
    """One service of one run: started by the first context, started anew after it died."""

    def __init__(self, runners: Runners, task: Task) -> None:
        self.runners = runners
        self.shell = runners.shell
        self.task = task
        self.threaded = task.kind == "thread"
        self.inbox: Any = None
        self.body: asyncio.Future[Any] | None = None
        self.thread: threading.Thread | None = None
        self.waiting: dict[Answer, Execution] = {}

    async def run(self, execution: Execution) -> Callable[[], None]:
        """Hands the context over; the answer finishes the execution, whenever it comes."""
        if self.body is None:
            self._start()
        loop = self.shell.loop
        answer = Answer(loop=loop)
        context = contextvars.copy_context()  # the execution's own: started and finished are told in it
        tell = self.shell.run.facts.execution_started
        if tell is not None:
            context.run(tell, execution, execution.started)
        self.waiting[answer] = execution
        answer.add_done_callback(partial(self._answered, execution), context=context)
        execution.handle = answer
        limit = self.task.config.timeout
        if limit is not None:
            timer = loop.call_later(limit, lambda: answer.set_exception(self.runners.timed_out(execution)))
            answer.add_done_callback(lambda _: timer.cancel())
        future: Any = ThreadAnswer(loop, answer) if self.threaded else answer
        self.inbox.put_nowait((execution.context, future))
        return partial(self.shell.run.service_waits, execution, self.shell.clock())

    def _answered(self, execution: Execution, answer: asyncio.Future[Any]) -> None:
        assert isinstance(answer, Answer)
        self.waiting.pop(answer, None)
        if execution.outcome is not None:
            return
        shell = self.shell
        if answer.cancelled():
            if execution.cancelling:
                shell.run.cancelled(execution, shell.clock())
            else:
                shell.settle_failure(execution, asyncio.CancelledError("the service cancelled the future"))
        elif isinstance(error := answer.exception(), KeyboardInterrupt | SystemExit):
            shell.interrupted(execution, error)
        elif error is not None:
            shell.settle_failure(execution, error)
        else:
            shell.finish(execution, answer.result())
        shell.pump()

    # --- the service itself

    def _start(self) -> None:
        assert self.task.func is not None
        env = (self.shell.env,) if getattr(getattr(self.task, "signature", None), "takes_env", False) else ()
        base = self.shell.base.copy()
        if self.threaded:
            self.inbox = ThreadInbox()
            self.body = self.shell.loop.create_future()
            call = partial(base.run, self.task.func, self.inbox, *env)
            name = f"obsdag-service-{self.task.id}"
            self.thread = threading.Thread(target=self._thread_main, args=(call, self.body), name=name, daemon=True)
            self.thread.start()
        else:
            self.inbox = Inbox()
            self.body = self.shell.loop.create_task(self.task.func(self.inbox, *env), context=base)
        self.body.add_done_callback(self._died)

    def _thread_main(self, call: Callable[[], Any], body: asyncio.Future[Any]) -> None:
        try:
            call()
        except SystemExit:
            self._over(body, None)
        except BaseException as error:  # whatever ends the thread ends the service
            wrapped = ServiceError(f"service {self.task.id!r} raised {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            self._over(body, wrapped)
        else:
            self._over(body, None)

    def _over(self, body: asyncio.Future[Any], error: BaseException | None) -> None:
        def settle() -> None:
            if not body.done():
                if error is None:
                    body.set_result(None)
                else:
                    body.set_exception(error)

        try:
            self.shell.loop.call_soon_threadsafe(settle)
        except RuntimeError:
            return  # the loop is closed: nobody waits for the service any more

    def _died(self, body: asyncio.Future[Any]) -> None:
        """The service ended: what it had taken fails, what it had not goes to the next one (T14).

        One that took nothing at all fails what waited for it: the next one would most likely do the same, for ever.
        """
        if self.body is not body:
            return
        self.body = None
        error = None if body.cancelled() else body.exception()
        if not self.waiting and error is None:
            return
        tell = self.shell.run.facts.task_restarted
        if tell is not None:
            tell(self.task, "thread" if self.threaded else "service", error)
        untouched = self._untouched() if self.inbox.taken else {}
        for answer in [answer for answer in self.waiting if answer not in untouched]:
            failure = ServiceError(
                f"service {self.task.id!r} ended before it answered{f': {error!r}' if error else ''}"
            )
            failure.__cause__ = error
            answer.set_exception(failure)
        if untouched:
            self._start()
            for item in untouched.values():
                self.inbox.put_nowait(item)

    def _untouched(self) -> dict[Answer, tuple[Any, Any]]:
        """What a dead service had not taken from its queue: the next one gets it."""
        found: dict[Answer, tuple[Any, Any]] = {}
        while not self.inbox.empty():
            context, future = self.inbox.get_nowait()
            answer = future._answer if isinstance(future, ThreadAnswer) else future
            if not answer.done():
                found[answer] = (context, future)
        return found

    async def close(self, grace: float) -> None:
        """Stops the service: StopContext first, then cancellation; a thread that does not end is abandoned."""
        body = self.body
        if body is None:
            return
        self.body = None
        answer = Answer(loop=self.shell.loop)
        stop = StopContext()
        self.inbox.put_nowait((stop, ThreadAnswer(self.shell.loop, answer) if self.threaded else answer))
        if self.threaded:
            self.inbox.put_nowait(_CLOSED)
            await asyncio.wait([body], timeout=max(grace, 0.1))
            if body.done() and self.thread is not None:
                self.thread.join(_LAST_S)  # it has told that it is over; these are its last instructions
        else:
            self.inbox.closed = True
            ends = [body, answer, self.inbox.exhausted]
            await asyncio.wait(ends, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        answer.cancel()
        if not body.done() and isinstance(body, asyncio.Task):
            body.cancel()
            await asyncio.wait([body], timeout=max(grace, 0.1))
        self._leave(body)

    def _leave(self, body: asyncio.Future[Any]) -> None:
        if not body.done():
            what = f"service {self.task.id!r} does not end"
            self.shell.abandoned.append(what)
            if self.shell.run.facts.thread_abandoned is not None:
                self.shell.run.facts.thread_abandoned(self.thread.name if self.thread else "loop", self.task.id, 0.0)
            body.cancel()
        elif not body.cancelled() and (error := body.exception()) is not None:
            hint = "at its StopContext: it should return when isinstance(context, StopContext)"
            self.runners.report(f"service {self.task.id!r}, {hint}", error)
