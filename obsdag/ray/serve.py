"""`RayServeExecutor`: takes submissions in for as long as a service lives, and has them run on shards (S1 to S3).

The driver's part of a serving period is tickets.py's, as for `ServeExecutor`. What is cancelled or too late ends here
at once; the shard that has it is told, and what it says of it afterwards is refused. Draining goes by the steps of
serve.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from obsdag.context import Context, OutputContext
from obsdag.core.records import Scope
from obsdag.errors import (
    ContextError,
    DeadlineExceeded,
    DuplicateIdError,
    NotAcceptingError,
    QueueFullError,
    ServeError,
    UnknownTicketError,
)
from obsdag.executor import _early_error
from obsdag.inputs import as_context
from obsdag.ray.driver import Driver
from obsdag.ray.executor import RayExecutor
from obsdag.signals import Signals
from obsdag.tickets import Line, Ticket, TicketBook, check_options

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.graph import DAG
    from obsdag.serve import Phase

__all__ = ["RayServeExecutor"]


class _ShardTicket(Ticket):
    """A ticket whose context is running when a shard has it."""

    __slots__ = ()

    @property
    def status(self) -> str:
        """pending, running, or the outcome of the submitted context once all that was made from it has ended."""
        desk: Any = self._desk
        return self.outcome if self.done else "running" if desk.shard_of(self) else "pending"


class RayServeExecutor(RayExecutor):
    """`async with RayServeExecutor(dag, config, shards=N) as executor:` starts serving, and drains at the end.

    Parameters as for RayExecutor; handle_signals, phase, manifest, `submit`, tickets and `drain` as for ServeExecutor,
    except: a submission takes over no trace, and the manifest names shards instead of tasks. At most
    `max_live_contexts` submissions for each shard, and `max_pending` more, are in here at once.
    """

    def __init__(
        self, dag: DAG, config: ExecutorConfig | None = None, *, handle_signals: bool = False, **options: Any
    ) -> None:
        super().__init__(dag, config, **options)
        self.phase: Phase = "stopped"
        self.manifest: dict[str, Any] = {}
        self._signals = Signals(handle_signals)
        self._driver: Driver | None = None
        self._tickets = TicketBook(self.config.result_ttl, lambda ticket: None)
        self._timers: dict[Ticket, asyncio.TimerHandle] = {}
        self._line = Line()
        self._hurry = asyncio.Event()
        self._hurry_timer: asyncio.TimerHandle | None = None
        self._stopped = asyncio.Event()
        self._draining: asyncio.Task[dict[str, Any]] | None = None
        self._fatal: BaseException | None = None

    # --- life

    async def start(self) -> Self:
        """Connects, and starts accepting; shards start meanwhile. Raises ServeError if it is started, ConfigError."""
        if self._driver is not None:
            raise ServeError("the serving executor is started already: use one per service, or drain it first")
        self._stopped.clear()
        self._hurry.clear()
        self._tickets.clear()
        self._draining, self._fatal, self.manifest = None, None, {}
        self._signals.take(self._signalled)
        try:
            self._fleet.enter()
        except BaseException:
            self._signals.release(asyncio.get_running_loop())
            raise
        driver = self._driver = Driver(self._fleet, self.config, self.codec, iter(()))
        driver.open_ended, driver.failures_kept, driver.on_ended = True, self.config.failures_kept, self._ended
        self._drivers.append(driver)
        driver.begin()
        driver.done.add_done_callback(self._run_ended)
        self.phase = "accepting"
        return self

    async def __aenter__(self) -> Self:
        """`start`."""
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drains: for `drain_grace` if the block ended or was cancelled, without grace if it raised something else."""
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
        """Begins to drain in the background. grace: seconds, None for `drain_grace`. Again: may only shorten it."""
        if self._draining is None and self._driver is not None:
            self.phase = "draining"
            self._draining = self._driver.loop.create_task(self._drain(self._driver, grace))
        elif grace is not None:
            self._hasten(grace)

    def _signalled(self) -> None:
        self.request_drain(None if self._draining is None else 0.0)

    def _run_ended(self, done: asyncio.Future[None]) -> None:
        """No shard is to be had, or on_failure="raise": serving ends with it."""
        driver = self._driver
        if driver is not None and driver.early and self.phase == "accepting":
            self._fatal = _early_error(driver, None)  # type: ignore[arg-type]
            self.request_drain(0.0)

    async def drain(self, grace: float | None = None) -> dict[str, Any]:
        """Accepts no more, finishes what is in flight for up to `grace` seconds, cancels the rest (S3).

        Returns the manifest: `finished` (number), `cancelled` (a list of id, shard, age_s), `abandoned`, `seconds`.
        """
        self.request_drain(grace)
        if self._draining is None:
            return self.manifest
        return await asyncio.shield(self._draining)

    async def stopped(self) -> None:
        """Returns when the executor has stopped: after a drain that a signal or anybody else began."""
        await self._stopped.wait()

    def _hasten(self, grace: float) -> None:
        driver = self._driver
        if driver is None:
            return
        when = driver.loop.time() + max(grace, 0.0)
        if self._hurry_timer is None or when < self._hurry_timer.when():
            if self._hurry_timer is not None:
                self._hurry_timer.cancel()
            self._hurry_timer = driver.loop.call_at(when, self._hurry.set)

    async def _drain(self, driver: Driver, grace: float | None) -> dict[str, Any]:
        begun, at_start = driver.clock(), self._tickets.open
        self._line.wake(len(self._line))
        cancelled: list[dict[str, Any]] = []
        try:
            if self._tickets.open:
                self._hasten(self.config.drain_grace if grace is None else grace)
                await self._hurry.wait()
            for ticket in self._tickets:
                age_s = driver.clock() - ticket.accepted_at
                cancelled.append({"id": ticket.id, "shard": self.shard_of(ticket), "age_s": age_s})
            driver.end_early("left" if cancelled else "", None)
            await driver.close()
        finally:
            try:
                await self._fleet.leave(self.config.shutdown_grace)
            finally:
                self.manifest = {
                    "finished": at_start - len(cancelled),
                    "cancelled": cancelled,
                    "abandoned": driver.abandoned,
                    "seconds": driver.clock() - begun,
                }
                self._stop(driver)
        return self.manifest

    def _stop(self, driver: Driver) -> None:
        self.phase = "stopped"
        self._signals.release(driver.loop)
        if self._hurry_timer is not None:
            self._hurry_timer.cancel()
            self._hurry_timer = None
        self._tickets.rest()
        self._drivers.remove(driver)
        self._driver = None
        self._stopped.set()

    # --- submitting

    async def submit(
        self,
        context_or_data: Context | Mapping[str, Any] | None = None,
        id: str | None = None,
        deadline: float | None = None,
        *,
        wait: bool | float = True,
    ) -> Ticket:
        """Accepts one context and returns its ticket. As `ServeExecutor.submit`, and EncodingError for data that cannot
        cross; nothing is accepted then.
        """
        driver = self._accepting()
        context = self._checked(context_or_data, id, deadline, wait)
        if self._line or self._places() <= 0:
            await self._wait_for_place(wait, deadline)
            driver = self._accepting()
            self._checked(context, id, deadline, wait)  # it may have been used, and its id taken, meanwhile
        driver.submit(context)
        if id is not None:
            context._id = context.name = id
        ticket = _ShardTicket(self, context, driver.clock())
        self._tickets.add(ticket)
        if deadline is not None:
            self._timers[ticket] = driver.loop.call_later(deadline, self._too_late, ticket)
        self._line.wake(self._places())
        return ticket

    def _accepting(self) -> Driver:
        driver = self._driver
        if driver is None or self.phase != "accepting":
            raise NotAcceptingError(f"the serving executor is {self.phase}: it accepts nothing")
        if driver.loop is not asyncio.get_running_loop():
            raise ServeError("submit on the event loop on which the executor was started (run_coroutine_threadsafe)")
        return driver

    def _checked(self, given: Any, id: Any, deadline: Any, wait: Any) -> Context:
        """The submission as a context, with nothing changed."""
        check_options(id, deadline, "child", wait)
        context = as_context({} if given is None else given)
        if context._scope is not None:
            raise ContextError(f"context {context.id!r} was submitted before; submit its create(copy_data=True)")
        own = context.id if id is None else id
        if self._tickets.is_living(own):
            raise DuplicateIdError(f"a context of id {own!r} is living already")
        return context

    def _places(self) -> int:
        """How many more may be accepted now."""
        return self.config.max_live_contexts * self.shards + self.config.max_pending - self._tickets.open

    async def _wait_for_place(self, wait: bool | float, deadline: float | None) -> None:
        if wait is False:
            raise QueueFullError(f"{self._tickets.open} contexts are in flight already (max_pending): try again later")
        limits = [float(each) for each in (None if wait is True else wait, deadline) if each is not None]
        place = self._line.join()
        try:
            async with asyncio.timeout(min(limits) if limits else None):
                await place
        except TimeoutError:
            raise QueueFullError(f"no place came free within {min(limits):g} s (max_pending): try later") from None
        finally:
            self._line.leave(place)

    # --- ends

    def _ended(self, context: Context) -> None:
        """Of a submission and all that was made from it, everything is here."""
        ticket = None if context._scope is None else self._tickets.of_scope(context._scope)
        driver = self._driver
        if ticket is None or driver is None:
            return
        timer = self._timers.pop(ticket, None)
        if timer is not None:
            timer.cancel()
        self._tickets.close(ticket, driver.loop)
        if not self._tickets.open and self._draining is not None:
            self._hurry.set()
        if self._line:
            self._line.wake(self._places())

    def _too_late(self, ticket: Ticket) -> None:
        took = 0.0 if self._driver is None else self._driver.clock() - ticket.accepted_at
        error = DeadlineExceeded(f"context {ticket.id!r} did not finish within its deadline ({took:.3f} s)")
        if self._driver is not None and not ticket.done:
            self._driver.withdraw(ticket.context, error)

    def _cancel(self, ticket: Ticket) -> bool:
        if self._driver is None or ticket.done:
            return False
        self._driver.withdraw(ticket.context, None)
        return True

    def _scope_done(self, scope: Scope) -> None:
        """Never called: nothing of the scope lives in this process."""

    def _fetched(self, ticket: Ticket) -> None:
        self._tickets.forget(ticket)

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

    def shard_of(self, ticket: Ticket) -> str | None:
        """The name of the shard that has it; None while it waits, and when it has ended."""
        return None if self._driver is None else self._driver.shard_of(ticket.context)

    @property
    def in_flight(self) -> int:
        """Accepted submissions that have not ended."""
        return self._tickets.open

    @property
    def unfetched(self) -> int:
        """Results that nobody has fetched yet; each is dropped after `result_ttl`."""
        return self._tickets.unfetched
