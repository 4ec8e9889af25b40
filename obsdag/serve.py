"""`ServeExecutor`: a run that takes work in for as long as a service lives (SEMANTICS section 6).

A submission becomes a `Ticket`, which covers the context and everything that is made from it. At most `max_live_contexts` are alive and
`max_pending` wait; beyond that `submit` waits too, or raises, as the caller chooses. Draining, by steps: 1. the phase says so;
2. nothing more is accepted; 3. what was accepted is finished, until the grace is over; 4. the rest is cancelled and named in the manifest;
5. the run ends as any other, telemetry is flushed.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from obsdag.context import Context, OutputContext
from obsdag.core.records import Failure, Scope
from obsdag.errors import (
    ContextError,
    ContextFailedError,
    DeadlineExceeded,
    DuplicateIdError,
    InputError,
    NoOutputError,
    NotAcceptingError,
    QueueFullError,
    ServeError,
    UnknownTicketError,
)
from obsdag.executor import Executor, RunResult
from obsdag.inputs import as_context

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.core.records import Timer
    from obsdag.graph import DAG
    from obsdag.runtime import Runtime
    from obsdag.shell import RunShell

__all__ = ["Phase", "ServeExecutor", "Ticket"]

Phase = Literal["starting", "accepting", "draining", "stopped"]


class Ticket:
    """One submission (S1). `status`: pending, running, or how the submitted context ended; `id` and `context` are its own.

    accepted_at: when it was accepted (run clock). A result is kept until it is fetched, or for `result_ttl`.
    """

    __slots__ = ("_done", "_executor", "_expired", "_timer", "accepted_at", "context", "id", "scope")

    def __init__(self, executor: ServeExecutor, context: Context, now: float) -> None:
        self.id = context.id
        self.context = context
        self.accepted_at = now
        self.scope = Scope(context, self._ended)
        self._executor = executor
        self._done = asyncio.get_running_loop().create_future()
        self._expired = False
        self._timer: Timer | None = None
        context._scope = self.scope

    def __repr__(self) -> str:
        return f"<Ticket {self.id!r} {self.status}>"

    @property
    def status(self) -> str:
        """pending, running, or the outcome of the submitted context once all that was made from it has ended."""
        if self._done.done():
            return self.context.outcome or "cancelled"
        return "running" if self.context._run is not None else "pending"

    @property
    def done(self) -> bool:
        """Whether everything that it covers has ended."""
        return self._done.done()

    async def result(self, timeout: float | None = None) -> OutputContext:
        """The only output. Waits for at most `timeout` seconds, without cancelling anything.

        Raises TimeoutError; ContextFailedError from the task's exception; NoOutputError, with the outcome; ServeError if there
        are several outputs (use `results`); UnknownTicketError if the result has expired.
        """
        outputs = await self.results(timeout)
        if len(outputs) > 1:
            raise ServeError(f"context {self.id!r} has {len(outputs)} outputs: use results()")
        if not outputs:
            outcome = self.context.outcome or "cancelled"
            raise NoOutputError(f"context {self.id!r} ended as {outcome}, without an output", outcome)
        return outputs[0]

    async def results(self, timeout: float | None = None) -> list[OutputContext]:
        """All outputs, in order of completion; none is no error here. Waits and raises as `result` does."""
        async with asyncio.timeout(timeout):
            await asyncio.shield(self._done)
        if self._expired:
            raise UnknownTicketError(f"the result of context {self.id!r} was not fetched in time and has been dropped")
        self._executor._fetched(self)
        failure = self._failure()
        if failure is not None:
            raise ContextFailedError(str(failure), failure.context.error_info) from failure.exception
        return list(self.scope.outputs)

    def _failure(self) -> Failure | None:
        """What fails the ticket: the context itself or one that replaced it; a child only if nothing came out at all."""
        for failure in self.scope.failures:
            if failure.context._parent is None or failure.context is self.context or not self.scope.outputs:
                return failure
        return None

    def cancel(self) -> bool:
        """Ends the context and all that was made from it as cancelled; False if it had ended."""
        return self._executor._cancel(self)

    def _ended(self, scope: Scope) -> None:
        self._executor._ticket_done(self)


class ServeExecutor(Executor):
    """`async with ServeExecutor(dag, runtime=None, config=None) as executor:` starts serving, and drains at the end (S1, S3).

    handle_signals: drain on SIGTERM and SIGINT; `await executor.stopped()` then returns when that is done. Never by default.
    """

    def __init__(
        self,
        dag: DAG,
        runtime: Runtime | None = None,
        config: ExecutorConfig | None = None,
        *,
        handle_signals: bool = False,
    ) -> None:
        super().__init__(dag, runtime, config)
        self.phase: Phase = "stopped"
        self.manifest: dict[str, Any] = {}
        self._signals = handle_signals
        self._shell: RunShell | None = None
        self._tickets: dict[str, Ticket] = {}
        self._unfetched: deque[tuple[float, Ticket]] = deque()
        self._pending: deque[Ticket] = deque()
        self._room: deque[asyncio.Future[None]] = deque()
        self._open = 0
        self._idle: asyncio.Event = asyncio.Event()
        self._stopped: asyncio.Event = asyncio.Event()
        self._draining: asyncio.Task[dict[str, Any]] | None = None
        self._expiry: asyncio.TimerHandle | None = None

    # --- life

    async def start(self) -> Self:
        """Starts accepting. Raises ServeError if it is started already."""
        if self._shell is not None:
            raise ServeError("the serving executor is started already")
        self._stopped.clear()
        self._draining, self.manifest = None, {}
        shell = self._open_shell("serve", iter(()))
        shell.open_ended, shell.refill = True, self._refill
        self._shell = shell
        self._begin(shell)
        self._set_phase("starting")
        if self._signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                shell.loop.add_signal_handler(number, self.request_drain)
        self._set_phase("accepting")
        return self

    async def __aenter__(self) -> Self:
        """`start`."""
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain(None if kind is None or kind is asyncio.CancelledError else 0.0)

    def request_drain(self) -> None:
        """Begins to drain in the background: what signal handlers call. Again is a no-op."""
        if self._draining is None and self._shell is not None:
            self._draining = self._shell.loop.create_task(self._drain(None))

    async def drain(self, grace: float | None = None) -> dict[str, Any]:
        """Accepts no more, finishes what is in flight for up to `grace` seconds, cancels the rest (S3).

        grace: None for `ExecutorConfig.drain_grace`. Returns the manifest: finished, cancelled (id, tasks, age_s), seconds.
        """
        if self._shell is None and self._draining is None:
            return self.manifest
        if self._draining is None:
            assert self._shell is not None
            self._draining = self._shell.loop.create_task(self._drain(grace))
        elif grace is not None:
            self._hasten(grace)
        return await asyncio.shield(self._draining)

    async def stopped(self) -> None:
        """Returns when the executor has stopped: after a drain that a signal or anybody else began."""
        await self._stopped.wait()

    def _hasten(self, grace: float) -> None:
        if self._shell is not None:
            self._shell.loop.call_later(grace, self._idle.set)

    async def _drain(self, grace: float | None) -> dict[str, Any]:
        shell = self._shell
        assert shell is not None
        begun, at_start = shell.clock(), self._open
        self._set_phase("draining")
        self._wake_submitters()
        if self._open:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.drain_grace if grace is None else grace):
                    await self._idle.wait()
        cancelled = [self._story(ticket, shell) for ticket in list(self._tickets.values()) if not ticket.done]
        for ticket in list(self._tickets.values()):
            if not ticket.done:
                self._cancel(ticket)
        if shell.run.living:
            shell.early = shell.early or "left"
        result = RunResult()
        await self._close(shell, result)
        took = shell.clock() - begun
        self.manifest = {
            "finished": at_start - len(cancelled),
            "cancelled": cancelled,
            "seconds": took,
            "abandoned": result.abandoned,
        }
        if shell.run.facts.drain_finished is not None:
            shell.run.facts.drain_finished(self.manifest, shell.clock())
        self._set_phase("stopped")
        if self._signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                shell.loop.remove_signal_handler(number)
        if self._expiry is not None:
            self._expiry.cancel()
        self._shell = None
        self._stopped.set()
        return self.manifest

    def _story(self, ticket: Ticket, shell: RunShell) -> dict[str, Any]:
        """What was cancelled: id, age, and the tasks at which it and what was made from it stood."""
        tasks = sorted(
            {shell.run._waiting_at(context) for context in shell.run.contexts if context._scope is ticket.scope}
        )
        return {"id": ticket.id, "tasks": tasks, "age_s": shell.clock() - ticket.accepted_at}

    def _set_phase(self, phase: Phase) -> None:
        self.phase = phase
        shell = self._shell
        if shell is not None and shell.run.facts.phase_changed is not None:
            shell.run.facts.phase_changed(phase, shell.clock())

    # --- submitting (S1, S2, S4)

    async def submit(
        self,
        context_or_data: Context | Mapping[str, Any] | None = None,
        id: str | None = None,
        carrier: Mapping[str, str] | None = None,
        deadline: float | None = None,
        trace: Literal["child", "link"] = "child",
        *,
        wait: bool | float = True,
    ) -> Ticket:
        """Accepts one context and returns its ticket.

        id: its id (any). carrier: W3C headers of the caller, else the current span is taken over (S4), as parent or with
        trace="link" as link. deadline: seconds from now for all of it. wait: when `max_pending` wait already, True waits for a
        place, a number of seconds at most so long, False not at all.
        Raises QueueFullError, NotAcceptingError, DuplicateIdError, InputError and ContextError; nothing is accepted then.
        """
        shell = self._accepting()
        if not self._has_place():
            await self._wait_for_place(wait)
            shell = self._accepting()
        context = self._as_context(context_or_data, id, deadline)
        if self.config.telemetry is not None:
            from obsdag.telemetry.tracing import capture_caller

            caller = capture_caller(carrier, trace)
            if caller is not None:
                context._trace = caller
        now = shell.clock()
        ticket = Ticket(self, context, now)
        self._replace_finished(ticket.id)
        self._tickets[ticket.id] = ticket
        self._open += 1
        if shell.run.facts.submitted is not None:
            shell.run.facts.submitted(context, now)
        if deadline is not None:
            ticket._timer = shell.run.timers.set(now + deadline, self._deadline_passed, ticket)
            shell.run.dirty = True
        if self._pending or not shell.run.has_room:
            self._pending.append(ticket)
        else:
            shell.run.accept(context, now)
        if shell.run.dirty:
            shell.pump()
        elif shell.free and shell.run.queue.size:
            shell.wake_worker()
        return ticket

    def _accepting(self) -> RunShell:
        if self._shell is None or self.phase != "accepting":
            self._reject("not_accepting")
            raise NotAcceptingError(f"the serving executor is {self.phase}: it accepts nothing")
        return self._shell

    def _as_context(self, given: Any, id: str | None, deadline: float | None) -> Context:
        try:
            context = as_context({} if given is None else given)
            if deadline is not None and not deadline > 0:
                raise InputError(f"deadline must be a number of seconds > 0, not {deadline!r}")
            if id is not None:
                if not isinstance(id, str) or not id:
                    raise InputError(f"id must be a text that is not empty, not {id!r}")
                context._id = context.name = id
            elif context._scope is not None:
                raise ContextError(f"context {context.id!r} was submitted before")
        except (InputError, ContextError):
            self._reject("invalid")
            raise
        living = self._tickets.get(context.id)
        if living is not None and not living.done:
            self._reject("duplicate")
            raise DuplicateIdError(f"a context of id {context.id!r} is living already")
        return context

    def _replace_finished(self, id: str) -> None:
        """A new submission of an id whose result nobody fetched: the old result is dropped, and counted."""
        old = self._tickets.pop(id, None)
        if old is not None:
            self._expire(old)

    def _reject(self, reason: str) -> None:
        shell = self._shell
        if shell is not None and shell.run.facts.submit_rejected is not None:
            shell.run.facts.submit_rejected(reason, shell.clock())

    def _has_place(self) -> bool:
        assert self._shell is not None
        if self._room:
            return False
        return self._shell.run.has_room if not self._pending else len(self._pending) < self.config.max_pending

    async def _wait_for_place(self, wait: bool | float) -> None:
        """Waits in line for a pending place; the wait itself is back-pressure, in order of asking."""
        shell = self._shell
        assert shell is not None
        if len(self._pending) < self.config.max_pending and not self._room:
            return
        if wait is False:
            self._reject("queue_full")
            raise QueueFullError(f"{len(self._pending)} contexts are waiting already (max_pending): try again later")
        place: asyncio.Future[None] = shell.loop.create_future()
        self._room.append(place)
        try:
            async with asyncio.timeout(None if wait is True else wait):
                await place
        except TimeoutError:
            self._reject("queue_full")
            raise QueueFullError(f"no place came free within {wait} s (max_pending): try again later") from None
        finally:
            if not place.done():
                place.cancel()
            with contextlib.suppress(ValueError):
                self._room.remove(place)

    def _refill(self) -> None:
        """Lets pending contexts in as far as there is room, and those that wait to submit after them."""
        shell = self._shell
        if shell is None:
            return
        while self._pending and shell.run.has_room:
            ticket = self._pending.popleft()
            if ticket.context._run is None and not ticket.done:
                shell.run.accept(ticket.context, shell.clock())
        free = self.config.max_pending - len(self._pending)
        if shell.run.has_room:
            free = max(free, 1)
        self._wake_submitters(free)

    def _wake_submitters(self, places: int | None = None) -> None:
        woken = 0
        for place in self._room:
            if places is not None and woken >= places:
                return
            if not place.done():
                place.set_result(None)
            woken += 1

    # --- ends

    def _deadline_passed(self, ticket: Ticket, now: float) -> None:
        shell, context = self._shell, ticket.context
        if shell is None or ticket.done:
            return
        if context._run is None:
            shell.run.accept(context, now)
        if context._outcome is None:
            took = now - ticket.accepted_at
            error = DeadlineExceeded(f"context {context.id!r} did not finish within its deadline ({took:.3f} s)")
            shell.run.fail_context(context, error, None, now)
        for other in [c for c in shell.run.contexts if c._scope is ticket.scope]:
            shell.run.cancel(other, now)
        shell.run._settle_all(now)

    def _cancel(self, ticket: Ticket) -> bool:
        shell = self._shell
        if shell is None or ticket.done:
            return False
        now = shell.clock()
        if ticket.context._run is None:
            shell.run.accept(ticket.context, now)
        for context in [c for c in shell.run.contexts if c._scope is ticket.scope]:
            shell.run.cancel(context, now)
        shell.pump()
        return True

    def _ticket_done(self, ticket: Ticket) -> None:
        """Everything that the ticket covers has ended."""
        shell = self._shell
        if shell is None or ticket.done:
            return
        now = shell.clock()
        if ticket._timer is not None:
            shell.run.timers.cancel(ticket._timer)
        self._open -= 1
        ticket._done.set_result(None)
        if shell.run.facts.ticket_done is not None:
            outcome = ticket.context.outcome or "cancelled"
            shell.run.facts.ticket_done(ticket.context, outcome, now - ticket.accepted_at, now)
        self._unfetched.append((now + self.config.result_ttl, ticket))
        if self._expiry is None:
            self._expiry = shell.loop.call_later(self.config.result_ttl, self._expire_due)
        if not self._open:
            self._idle.set()

    def _fetched(self, ticket: Ticket) -> None:
        if self._tickets.get(ticket.id) is ticket:
            del self._tickets[ticket.id]

    def _expire_due(self) -> None:
        """Drops results that nobody fetched within `result_ttl` (S2); one timer for all of them."""
        self._expiry = None
        shell = self._shell
        if shell is None:
            return
        now = shell.clock()
        while self._unfetched and self._unfetched[0][0] <= now:
            ticket = self._unfetched.popleft()[1]
            if self._tickets.get(ticket.id) is ticket:
                del self._tickets[ticket.id]
                self._expire(ticket)
        while self._unfetched and self._tickets.get(self._unfetched[0][1].id) is not self._unfetched[0][1]:
            self._unfetched.popleft()
        if self._unfetched:
            self._expiry = shell.loop.call_later(max(self._unfetched[0][0] - now, 0.001), self._expire_due)

    def _expire(self, ticket: Ticket) -> None:
        ticket._expired = True
        ticket.scope.outputs.clear()
        ticket.scope.failures.clear()
        shell = self._shell
        if shell is not None and shell.run.facts.result_expired is not None:
            shell.run.facts.result_expired(ticket.context, shell.clock())

    # --- shortcuts, and the names of the earlier system

    async def execute(
        self, context_or_data: Context | Mapping[str, Any] | None = None, **options: Any
    ) -> OutputContext:
        """`submit` and `result` in one; cancelled with its caller. options: those of `submit`. Raises what both raise."""
        ticket = await self.submit(context_or_data, **options)
        try:
            return await ticket.result()
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    async def submit_task(self, context: Context | Mapping[str, Any]) -> str:
        """`submit`; returns the ticket's id."""
        return (await self.submit(context)).id

    def ticket(self, id: str) -> Ticket:
        """The ticket of a submission. Raises UnknownTicketError."""
        try:
            return self._tickets[id]
        except KeyError:
            raise UnknownTicketError(f"there is no ticket {id!r}: never given out, fetched, or expired") from None

    async def get_task_status(self, task_id: str) -> str:
        """The ticket's status. Raises UnknownTicketError."""
        return self.ticket(task_id).status

    async def get_task_result(self, task_id: str, timeout: float | None = None) -> dict[str, Any]:
        """The data of the only output. Raises as `Ticket.result`, and UnknownTicketError."""
        return (await self.ticket(task_id).result(timeout)).to_dict()

    @property
    def pending(self) -> int:
        """Accepted contexts that wait for room."""
        return len(self._pending)

    @property
    def in_flight(self) -> int:
        """Accepted submissions that have not ended, pending ones included."""
        return self._open
