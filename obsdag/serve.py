"""`ServeExecutor`: a run that takes work in for as long as a service lives (SEMANTICS section 6).

A submission becomes a `Ticket` (tickets.py). At most `max_live_contexts` are alive and `max_pending` wait; beyond that
`submit` waits too, in line, or raises, as the caller chooses.

Draining, by steps: 1. the phase says so, and from then on nothing more is accepted; 2. what was accepted is finished,
until the grace is over, or somebody is in a hurry; 3. the rest is cancelled and named in the manifest; 4. the run ends
as any other (E9), telemetry is flushed; 5. the phase is stopped. Each step is taken whatever happens to the ones before
it, so that nothing accepted is left without an outcome, and nobody waits for a ticket or for `stopped` in vain.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from obsdag.context import Context, OutputContext
from obsdag.durable import Durable
from obsdag.errors import (
    ContextError,
    DeadlineExceeded,
    DuplicateIdError,
    NotAcceptingError,
    QueueFullError,
    ServeError,
    UnknownTicketError,
)
from obsdag.executor import Executor, RunResult, _early_error
from obsdag.inputs import as_context
from obsdag.signals import Signals
from obsdag.tickets import Entering, Line, Ticket, TicketBook, check_options, living_of, stories

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.core.records import Scope
    from obsdag.graph import DAG
    from obsdag.runtime import Runtime
    from obsdag.shell import RunShell

__all__ = ["Phase", "ServeExecutor", "Ticket"]

Phase = Literal["starting", "accepting", "draining", "stopped"]


class ServeExecutor(Executor):
    """`async with ServeExecutor(dag, runtime=None, config=None) as executor:` starts serving, and drains at the end.

    handle_signals: SIGTERM and SIGINT begin to drain, a second one ends the grace; `await executor.stopped()` returns
    when that is done (S3). Never by default. phase: starting, accepting, draining, stopped. manifest: of the last
    drain. `ExecutorConfig.deadline` does not apply: a serving period has no end of its own. All methods belong to the
    event loop on which it was started.
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
        self._signals = Signals(handle_signals)
        self._shell: RunShell | None = None
        self._tickets = TicketBook(self.config.result_ttl, self._result_expired)
        self._pending: OrderedDict[Ticket, None] = OrderedDict()
        self._entering = Entering(self._pending)
        self._line = Line()
        self._hurry = asyncio.Event()  # draining: nothing is left, or the grace is over
        self._hurry_timer: asyncio.TimerHandle | None = None
        self._stopped = asyncio.Event()
        self._draining: asyncio.Task[dict[str, Any]] | None = None
        self._fatal: BaseException | None = None
        self._durable: Durable | None = None

    # --- life

    async def start(self) -> Self:
        """Starts accepting. With a journal, what an earlier process accepted goes on, with tickets.

        Raises ServeError if it is started already or cannot handle signals in this thread; JournalError.
        """
        if self._shell is not None:
            raise ServeError("the serving executor is started already: use one per service, or drain it first")
        self._stopped.clear()
        self._hurry.clear()
        self._tickets.clear()
        self._draining, self._fatal, self.manifest = None, None, {}
        self._durable = await Durable.of(self.config.journal, self.plan)
        try:
            self._signals.take(self._signalled)
            shell = self._shell = self._open_shell("serve", iter(()))
            shell.open_ended, shell.refill = True, self._refill
            if self._durable is not None:
                self._durable.attach(shell, self._tickets, self)
            self._begin(shell)
            shell.done.add_done_callback(self._run_ended)
        except BaseException:
            await self._give_up_start()
            raise
        self._set_phase("starting")
        self._set_phase("accepting")
        return self

    async def _give_up_start(self) -> None:
        shell, self._shell = self._shell, None
        self._signals.release(asyncio.get_running_loop())
        if shell is not None:
            shell.end_early("error", None)
            with contextlib.suppress(Exception):  # what broke the start is raised, not what that broke in turn
                await self._close(shell, RunResult())
        await self._leave_journal()

    async def _leave_journal(self) -> None:
        durable, self._durable = self._durable, None
        if durable is not None:
            await durable.close()

    async def __aenter__(self) -> Self:
        """`start`."""
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drains: for `drain_grace` if the block ended or was cancelled, without grace if it raised something else.

        A second cancellation ends the grace. Raises what ended serving early, if the block did not raise.
        """
        calm = kind is None or kind is asyncio.CancelledError
        try:
            await self.drain(None if calm else 0.0)
        except asyncio.CancelledError:
            self._hasten(0.0)
            while self._draining is not None and not self._draining.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(self._draining)
            raise
        if kind is None and self._fatal is not None:
            raise self._fatal

    def request_drain(self, grace: float | None = None) -> None:
        """Begins to drain in the background: from this call on nothing is accepted, and `/readyz` says so.

        grace: seconds, None for `drain_grace`. Again: may only shorten it.
        """
        if self._draining is None and self._shell is not None:
            self._set_phase("draining")
            self._draining = self._shell.loop.create_task(self._drain(self._shell, grace))
        elif grace is not None:
            self._hasten(grace)

    def _signalled(self) -> None:
        self.request_drain(None if self._draining is None else 0.0)

    def _run_ended(self, done: asyncio.Future[None]) -> None:
        """The run ends early: an interrupt, on_failure="raise", a bug of obsdag's. Serving ends with it."""
        shell = self._shell
        if shell is not None and shell.early and not done.cancelled():
            self._fatal = self._fatal or _early_error(shell, None)
            self.request_drain(0.0)

    async def drain(self, grace: float | None = None) -> dict[str, Any]:
        """Accepts no more, finishes what is in flight for up to `grace` seconds, cancels the rest (S3).

        grace: None for `ExecutorConfig.drain_grace`. If it drains already, a shorter grace hastens it. Returns the
        manifest: `finished` (number), `cancelled` (a list of id, tasks, age_s), `abandoned` (in words), `seconds`.
        """
        self.request_drain(grace)
        if self._draining is None:
            return self.manifest
        return await asyncio.shield(self._draining)

    async def stopped(self) -> None:
        """Returns when the executor has stopped: after a drain that a signal or anybody else began."""
        await self._stopped.wait()

    def _hasten(self, grace: float) -> None:
        shell = self._shell
        if shell is None or self._stopped.is_set():
            return
        when = shell.loop.time() + max(grace, 0.0)
        if self._hurry_timer is None or when < self._hurry_timer.when():
            self._cancel_hurry()
            self._hurry_timer = shell.loop.call_at(when, self._hurry.set)

    def _cancel_hurry(self) -> None:
        if self._hurry_timer is not None:
            self._hurry_timer.cancel()
            self._hurry_timer = None

    async def _drain(self, shell: RunShell, grace: float | None) -> dict[str, Any]:
        begun, at_start = shell.clock(), self._tickets.open
        self._line.wake(len(self._line))
        result = RunResult()
        cancelled: list[dict[str, Any]] = []
        try:
            if self._tickets.open:
                self._hasten(self.config.drain_grace if grace is None else grace)
                await self._wait_until_idle()
            cancelled = stories(shell.run, self._tickets)
            if self._tickets.open and self._durable is not None:
                self._durable.suspend()  # the next process goes on with it
            for ticket in list(self._pending):
                self._cancel(ticket)
            if not shell.run.settled():
                shell.early = shell.early or "left"
            await self._close(shell, result)
        finally:
            for ticket in self._tickets:  # only if closing broke: nobody may wait for ever
                self._finish(shell, ticket)
            self.manifest = {
                "finished": at_start - len(cancelled),
                "cancelled": cancelled,
                "abandoned": result.abandoned,
                "seconds": shell.clock() - begun,
            }
            await self._leave_journal()
            self._stop(shell)
        return self.manifest

    async def _wait_until_idle(self) -> None:
        try:
            await self._hurry.wait()
        except asyncio.CancelledError:  # the loop is being shut down, say: the grace is over, not the drain
            current = asyncio.current_task()
            if current is not None:
                current.uncancel()

    def _stop(self, shell: RunShell) -> None:
        if shell.run.facts.drain_finished is not None:
            shell.run.facts.drain_finished(self.manifest, shell.clock())
        self._set_phase("stopped")
        self._signals.release(shell.loop)
        self._cancel_hurry()
        self._tickets.rest()
        self._shell = None
        self._stopped.set()

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

        id: its id (any). carrier: W3C headers of the caller, else the current span is taken over (S4), as parent or
        with trace="link" as link. deadline: seconds from now for all of it. wait: when `max_pending` wait already, True
        waits for a place, a number of seconds at most so long, False not at all; never longer than `deadline`. Raises
        QueueFullError, NotAcceptingError, DuplicateIdError, InputError and ContextError; nothing is accepted then.
        """
        shell = self._accepting()
        context = self._checked(context_or_data, id, deadline, trace, wait)
        due = None if deadline is None else shell.clock() + deadline
        try:
            if self._line or self._places(shell) <= 0:
                await self._wait_for_place(shell, wait, deadline)
                self._accepting()
                self._checked(context, id, deadline, trace, wait)  # it may have been used, and its id taken, meanwhile
            if id is not None:
                context._id = context.name = id
            self._take_over_trace(context, carrier, trace)
            ticket = self._accept(shell, context, due)
        finally:
            if self._line:  # whatever became of this one, the next in line learns of a place that is left
                self._line.wake(self._places(shell))
        if self._durable is not None:
            await self._durable.committed(ticket, self._tickets)
        return ticket

    def _take_over_trace(self, context: Context, carrier: Mapping[str, str] | None, trace: str) -> None:
        if self.config.telemetry is not None:
            from obsdag.telemetry.tracing import capture_caller

            caller = capture_caller(carrier, trace)
            if caller is not None:
                context._trace = caller

    def _accept(self, shell: RunShell, context: Context, due: float | None) -> Ticket:
        run, now = shell.run, shell.clock()
        if self._durable is not None:
            self._durable.accept(context, now, due, self._reject)
        ticket = Ticket(self, context, now)
        self._tickets.add(ticket)
        if run.facts.submitted is not None:
            run.facts.submitted(context, now)
        if due is not None:
            ticket._timer = run.timers.set(due, self._deadline_passed, ticket)
            run.dirty = True
        if self._pending or not run.has_room:
            self._pending[ticket] = None
            shell.inputs = self._entering
        else:
            run.accept(context, now)
        if run.dirty:
            shell.pump()
        elif shell.free and run.queue.size:
            shell.wake_worker()
        return ticket

    def _accepting(self) -> RunShell:
        shell = self._shell
        if shell is None or self.phase != "accepting":
            self._reject("not_accepting")
            raise NotAcceptingError(f"the serving executor is {self.phase}: it accepts nothing")
        if shell.loop is not asyncio.get_running_loop():
            raise ServeError("submit on the event loop on which the executor was started (run_coroutine_threadsafe)")
        return shell

    def _checked(self, given: Any, id: Any, deadline: Any, trace: Any, wait: Any) -> Context:
        """The submission as a context, with nothing changed."""
        try:
            check_options(id, deadline, trace, wait)
            context = as_context({} if given is None else given)
            if context._scope is not None:
                raise ContextError(f"context {context.id!r} was submitted before; submit its create(copy_data=True)")
        except Exception:
            self._reject("invalid")
            raise
        own = context.id if id is None else id
        if self._tickets.is_living(own):
            self._reject("duplicate")
            raise DuplicateIdError(f"a context of id {own!r} is living already")
        return context

    def _reject(self, reason: str) -> None:
        shell = self._shell
        if shell is not None and shell.run.facts.submit_rejected is not None:
            shell.run.facts.submit_rejected(reason, shell.clock())

    # --- room, and the line before it

    def _places(self, shell: RunShell) -> int:
        """How many more may be accepted now: up to `max_live_contexts` alive, and `max_pending` that wait."""
        run = shell.run
        room = run.max_live - (run.living - run.at_joins - run.discarded + run.reserved + run.buffered)
        return max(room, 0) + self.config.max_pending - len(self._pending)

    async def _wait_for_place(self, shell: RunShell, wait: bool | float, deadline: float | None) -> None:
        """Waits in line for a place; the wait itself is back-pressure, in order of asking."""
        if wait is False:
            self._reject("queue_full")
            raise QueueFullError(f"{len(self._pending)} contexts are waiting already (max_pending): try again later")
        limits = [float(each) for each in (None if wait is True else wait, deadline) if each is not None]
        place = self._line.join()
        try:
            async with asyncio.timeout(min(limits) if limits else None):
                await place
                while self.phase == "accepting" and self._places(shell) <= 0:  # items of a loop were faster
                    self._line.leave(place)
                    place = self._line.join(first=True)
                    await place
        except TimeoutError:
            self._reject("queue_full")
            raise QueueFullError(f"no place came free within {min(limits):g} s (max_pending): try later") from None
        finally:
            self._line.leave(place)

    def _refill(self) -> None:
        """Lets pending contexts in as far as there is room, and those that wait to submit after them."""
        shell = self._shell
        if shell is None:
            return
        while self._pending and shell.run.has_room:
            shell.run.accept(next(self._entering), shell.clock())
        if shell.run.dirty:
            shell.rearm()  # a deadline began with entering
        if self._line:
            self._line.wake(self._places(shell))

    # --- ends

    def _enter(self, shell: RunShell, ticket: Ticket, now: float) -> None:
        """A pending one enters, only to end: every accepted context is accounted for (C9)."""
        if self._pending.pop(ticket, self) is None:
            shell.run.accept(ticket.context, now)

    def _deadline_passed(self, ticket: Ticket, now: float) -> None:
        shell, context = self._shell, ticket.context
        if shell is None or ticket.done:
            return
        self._enter(shell, ticket, now)
        if context._outcome is None:
            took = now - ticket.accepted_at
            error = DeadlineExceeded(f"context {context.id!r} did not finish within its deadline ({took:.3f} s)")
            shell.run.fail_context(context, error, None, now)
        for other in living_of(shell.run, ticket):
            shell.run.cancel(other, now)
        shell.run._settle_all(now)

    def _cancel(self, ticket: Ticket) -> bool:
        shell = self._shell
        if shell is None or ticket.done:
            return False
        now = shell.clock()
        self._enter(shell, ticket, now)
        for context in living_of(shell.run, ticket):
            shell.run.cancel(context, now)
        shell.pump()
        return True

    def _scope_done(self, scope: Scope) -> None:
        ticket = self._tickets.of_scope(scope)
        if self._shell is None or ticket is None:
            return
        if self._durable is not None:
            self._durable.after_commit(partial(self._finish, self._shell, ticket))
        else:
            self._finish(self._shell, ticket)

    def _finish(self, shell: RunShell, ticket: Ticket) -> None:
        """Everything that the ticket covers has ended."""
        now = shell.clock()
        if ticket.done:
            return
        if ticket._timer is not None:
            shell.run.timers.cancel(ticket._timer)
        if self._durable is not None:
            ticket._lost = self._durable.error
        self._tickets.close(ticket, shell.loop)
        if shell.run.facts.ticket_done is not None:
            shell.run.facts.ticket_done(ticket.context, ticket.outcome, now - ticket.accepted_at, now)
        if not self._tickets.open and self._draining is not None:
            self._hurry.set()

    def _fetched(self, ticket: Ticket) -> None:
        self._tickets.forget(ticket)

    def _result_expired(self, ticket: Ticket) -> None:
        shell = self._shell
        if shell is not None and shell.run.facts.result_expired is not None:
            shell.run.facts.result_expired(ticket.context, shell.clock())

    # --- shortcuts, and the names of the earlier system

    async def execute(
        self, context_or_data: Context | Mapping[str, Any] | None = None, **options: Any
    ) -> OutputContext:
        """`submit` and `result` in one, cancelled with its caller. options: of `submit`. Raises what both raise."""
        ticket = await self.submit(context_or_data, **options)
        try:
            return await ticket.result()
        except asyncio.CancelledError:
            self._tickets.forget(ticket)
            ticket.cancel()
            raise

    async def submit_task(self, context: Context | Mapping[str, Any]) -> str:
        """`submit`; returns the ticket's id."""
        return (await self.submit(context)).id

    def ticket(self, id: str) -> Ticket:
        """The ticket of a submission. Raises UnknownTicketError."""
        try:
            return self._tickets.by_id[id]
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
        return self._tickets.open

    @property
    def unfetched(self) -> int:
        """Results that nobody has fetched yet; each is dropped after `result_ttl`."""
        return self._tickets.unfetched
