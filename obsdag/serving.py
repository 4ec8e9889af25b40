"""What serving is, wherever the work is done: accepting, tickets, the line before the door, draining (SEMANTICS 6).

`ServeExecutor` has submissions run here, `RayServeExecutor` on shards; each says how one enters and ends there. A
submission becomes a `Ticket` (tickets.py). What is more than there is room for waits in line, or is turned away, as the
caller of `submit` chooses.

Draining, by steps: 1. the phase says so, and from then on nothing more is accepted; 2. what was accepted is finished,
until the grace is over, or somebody is in a hurry; 3. the rest is cancelled and named in the manifest; 4. the run ends
as any other (E9), telemetry is flushed; 5. the phase is stopped. Each step is taken whatever happens to the ones before
it, so that nothing accepted is left without an outcome, and nobody waits for a ticket or for `stopped` in vain.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeVar

from obsdag.context import Context, OutputContext
from obsdag.errors import (
    ContextError,
    DuplicateIdError,
    NotAcceptingError,
    QueueFullError,
    ServeError,
    UnknownTicketError,
)
from obsdag.executor import RunResult, _early_error
from obsdag.inputs import as_context
from obsdag.signals import Signals
from obsdag.tickets import Line, Ticket, TicketBook, check_options

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.core.records import Scope
    from obsdag.durable import Durable

__all__ = ["Period", "Phase", "Serving"]

Phase = Literal["starting", "accepting", "draining", "stopped"]


class Period(Protocol):
    """The run that lasts as long as a serving period: a shell, or the driver of shards."""

    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]
    early: str


PeriodT = TypeVar("PeriodT", bound=Period)


class Serving(Generic[PeriodT]):
    """The desk of a serving executor. States: stopped -> (start) accepting -> (a drain begins) draining -> stopped.

    phase: starting, accepting, draining, stopped. manifest: of the last drain. `_period`: None while it is stopped.
    """

    config: ExecutorConfig
    _is_traced: bool

    def _furnish(self, handle_signals: bool) -> None:
        """What `__init__` of the executor calls, with its configuration in place."""
        self.phase: Phase = "stopped"
        self.manifest: dict[str, Any] = {}
        self._signals = Signals(handle_signals)
        self._period: PeriodT | None = None
        self._tickets = TicketBook(self.config.result_ttl, self._result_expired)
        self._line = Line()
        self._hurry = asyncio.Event()  # draining: nothing is left, or the grace is over
        self._hurry_timer: asyncio.TimerHandle | None = None
        self._stopped = asyncio.Event()
        self._draining: asyncio.Task[dict[str, Any]] | None = None
        self._fatal: BaseException | None = None
        self._durable: Durable | None = None

    # --- what is different where the work is done

    @abstractmethod
    async def start(self, tasks: Mapping[str, str | None] | None = None) -> Self:
        """Starts accepting. Raises ServeError if it is started already."""

    @abstractmethod
    def _accept(self, period: PeriodT, context: Context, due: float | None) -> Ticket:
        """A checked submission enters; due: its deadline on the run's clock. What it raises leaves nothing behind."""

    @abstractmethod
    def _places(self, period: PeriodT) -> int:
        """How many more may be accepted now."""

    @abstractmethod
    def _cancel(self, ticket: Ticket) -> bool:
        """Ends what the ticket covers; False if it has ended."""

    @abstractmethod
    def _scope_done(self, scope: Scope) -> None:
        """Everything of a ticket's scope has ended in this process."""

    @abstractmethod
    def _stories(self, period: PeriodT) -> list[dict[str, Any]]:
        """What a drain is about to cancel, for the manifest."""

    @abstractmethod
    async def _end(self, period: PeriodT, result: RunResult) -> None:
        """Cancels what lives, and ends the run."""

    async def _leave(self) -> None:
        """Lets go of what the period held beside its run."""

    def _tell(self, fact: str, *arguments: Any) -> None:
        """Tells observers that are here of something about submissions; the time is added."""

    # --- life

    def _open(self) -> None:
        if self._period is not None:
            raise ServeError("the serving executor is started already: use one per service, or drain it first")
        self._stopped.clear()
        self._hurry.clear()
        self._tickets.clear()
        self._draining, self._fatal, self.manifest = None, None, {}

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
        if self._draining is None and self._period is not None:
            self._set_phase("draining")
            self._draining = self._period.loop.create_task(self._drain(self._period, grace))
        elif grace is not None:
            self._hasten(grace)

    def _signalled(self) -> None:
        self.request_drain(None if self._draining is None else 0.0)

    def _run_ended(self, done: asyncio.Future[None]) -> None:
        """The run ends early: an interrupt, on_failure="raise", no shard, a bug of obsdag's. Serving ends with it."""
        period: Any = self._period
        if period is not None and period.early and not done.cancelled():
            self._fatal = self._fatal or _early_error(period, None)
            self.request_drain(0.0)

    async def drain(self, grace: float | None = None) -> dict[str, Any]:
        """Accepts no more, finishes what is in flight for up to `grace` seconds, cancels the rest (S3).

        grace: None for `ExecutorConfig.drain_grace`. If it drains already, a shorter grace hastens it. Returns the
        manifest: `finished` (number), `cancelled` (a list of id, age_s, and tasks, or the shard), `abandoned` (in
        words), `seconds`.
        """
        self.request_drain(grace)
        if self._draining is None:
            return self.manifest
        return await asyncio.shield(self._draining)

    async def stopped(self) -> None:
        """Returns when the executor has stopped: after a drain that a signal or anybody else began."""
        await self._stopped.wait()

    def _hasten(self, grace: float) -> None:
        period = self._period
        if period is None or self._stopped.is_set():
            return
        when = period.loop.time() + max(grace, 0.0)
        if self._hurry_timer is None or when < self._hurry_timer.when():
            self._cancel_hurry()
            self._hurry_timer = period.loop.call_at(when, self._hurry.set)

    def _cancel_hurry(self) -> None:
        if self._hurry_timer is not None:
            self._hurry_timer.cancel()
            self._hurry_timer = None

    async def _drain(self, period: PeriodT, grace: float | None) -> dict[str, Any]:
        begun, at_start = period.clock(), self._tickets.open
        self._line.wake(len(self._line))
        result = RunResult()
        cancelled: list[dict[str, Any]] = []
        try:
            if self._tickets.open:
                self._hasten(self.config.drain_grace if grace is None else grace)
                await self._wait_until_idle()
            cancelled = self._stories(period)
            await self._end(period, result)
        finally:
            for ticket in self._tickets:  # only if closing broke: nobody may wait for ever
                self._finish(period, ticket)
            self.manifest = {
                "finished": at_start - len(cancelled),
                "cancelled": cancelled,
                "abandoned": result.abandoned,
                "seconds": period.clock() - begun,
            }
            try:
                await self._leave()
            finally:
                self._stop(period)
        return self.manifest

    async def _wait_until_idle(self) -> None:
        try:
            await self._hurry.wait()
        except asyncio.CancelledError:  # the loop is being shut down, say: the grace is over, not the drain
            current = asyncio.current_task()
            if current is not None:
                current.uncancel()

    def _stop(self, period: PeriodT) -> None:
        self._tell("drain_finished", self.manifest)
        self._set_phase("stopped")
        self._signals.release(period.loop)
        self._cancel_hurry()
        self._tickets.rest()
        self._period = None
        self._stopped.set()

    def _set_phase(self, phase: Phase) -> None:
        self.phase = phase
        self._tell("phase_changed", phase)

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
        QueueFullError, NotAcceptingError, DuplicateIdError, InputError and ContextError, and EncodingError where data
        is to be written down or to cross; nothing is accepted then.
        """
        period = self._accepting()
        context = self._checked(context_or_data, id, deadline, trace, wait)
        due = None if deadline is None else period.clock() + deadline
        try:
            if self._line or self._places(period) <= 0:
                await self._wait_for_place(period, wait, deadline)
                self._accepting()
                self._checked(context, id, deadline, trace, wait)  # it may have been used, and its id taken, meanwhile
            if id is not None:
                context._id = context.name = id
            self._take_over_trace(context, carrier, trace)
            ticket = self._accept(period, context, due)
        finally:
            if self._line:  # whatever became of this one, the next in line learns of a place that is left
                self._line.wake(self._places(period))
        if self._durable is not None:
            await self._durable.committed(ticket, self._tickets)
        return ticket

    def _take_over_trace(self, context: Context, carrier: Mapping[str, str] | None, trace: str) -> None:
        if self._is_traced:
            from obsdag.telemetry.carrier import capture_caller

            caller = capture_caller(carrier, trace)
            if caller is not None:
                context._trace = caller

    def _accepting(self) -> PeriodT:
        period = self._period
        if period is None or self.phase != "accepting":
            self._tell("submit_rejected", "not_accepting")
            raise NotAcceptingError(f"the serving executor is {self.phase}: it accepts nothing")
        if period.loop is not asyncio.get_running_loop():
            raise ServeError("submit on the event loop on which the executor was started (run_coroutine_threadsafe)")
        return period

    def _checked(self, given: Any, id: Any, deadline: Any, trace: Any, wait: Any) -> Context:
        """The submission as a context, with nothing changed."""
        try:
            check_options(id, deadline, trace, wait)
            context = as_context({} if given is None else given)
            if context._scope is not None:
                raise ContextError(f"context {context.id!r} was submitted before; submit its create(copy_data=True)")
        except Exception:
            self._tell("submit_rejected", "invalid")
            raise
        own = context.id if id is None else id
        if self._tickets.is_living(own):
            self._tell("submit_rejected", "duplicate")
            raise DuplicateIdError(f"a context of id {own!r} is living already")
        return context

    async def _wait_for_place(self, period: PeriodT, wait: bool | float, deadline: float | None) -> None:
        """Waits in line for a place; the wait itself is back-pressure, in order of asking."""
        if wait is False:
            self._tell("submit_rejected", "queue_full")
            told = f"{self.pending} contexts are waiting already (max_pending), of {self.in_flight} in flight"
            raise QueueFullError(f"{told}: try again later")
        limits = [float(each) for each in (None if wait is True else wait, deadline) if each is not None]
        place = self._line.join()
        try:
            async with asyncio.timeout(min(limits) if limits else None):
                await place
                while self.phase == "accepting" and self._places(period) <= 0:  # items of a loop were faster
                    self._line.leave(place)
                    place = self._line.join(first=True)
                    await place
        except TimeoutError:
            self._tell("submit_rejected", "queue_full")
            raise QueueFullError(f"no place came free within {min(limits):g} s (max_pending): try later") from None
        finally:
            self._line.leave(place)

    # --- ends

    def _finish(self, period: PeriodT, ticket: Ticket) -> None:
        """Everything that the ticket covers has ended."""
        if ticket.done:
            return
        if self._durable is not None:
            ticket._lost = self._durable.error
        self._tickets.close(ticket, period.loop)
        self._tell("ticket_done", ticket.context, ticket.outcome, period.clock() - ticket.accepted_at)
        if not self._tickets.open and self._draining is not None:
            self._hurry.set()

    def _fetched(self, ticket: Ticket) -> None:
        self._tickets.forget(ticket)

    def _result_expired(self, ticket: Ticket) -> None:
        self._tell("result_expired", ticket.context)

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
    @abstractmethod
    def pending(self) -> int:
        """Accepted contexts that wait for room."""

    @property
    def in_flight(self) -> int:
        """Accepted submissions that have not ended, pending ones included."""
        return self._tickets.open

    @property
    def unfetched(self) -> int:
        """Results that nobody has fetched yet; each is dropped after `result_ttl`."""
        return self._tickets.unfetched
