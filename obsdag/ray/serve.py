"""`RayServeExecutor`: takes submissions in for as long as a service lives, and has them run on shards (S1 to S3).

What does not depend on where the work is done is in obsdag/serving.py. What is cancelled or too late ends here at once;
the shard that has it is told, and what it says of it afterwards is refused.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from obsdag.durable import Durable
from obsdag.errors import DeadlineExceeded
from obsdag.ray.accepted import found
from obsdag.ray.driver import Driver
from obsdag.ray.executor import RayExecutor
from obsdag.serving import Serving
from obsdag.tickets import Ticket

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obsdag.config import ExecutorConfig
    from obsdag.context import Context
    from obsdag.core.records import Scope
    from obsdag.executor import RunResult
    from obsdag.graph import DAG

__all__ = ["RayServeExecutor"]


class _ShardTicket(Ticket):
    """A ticket whose context is running when a shard has it."""

    __slots__ = ()

    @property
    def status(self) -> str:
        """pending, running, or the outcome of the submitted context once all that was made from it has ended."""
        desk: Any = self._desk
        return self.outcome if self.done else "running" if desk.shard_of(self) else "pending"


class RayServeExecutor(Serving[Driver], RayExecutor):
    """`async with RayServeExecutor(dag, config, shards=N) as executor:` starts serving, and drains at the end.

    Parameters as for RayExecutor; handle_signals, phase, manifest, `submit`, tickets and `drain` as for ServeExecutor,
    except: the manifest names shards instead of tasks. At most
    `max_live_contexts` submissions for each shard, and `max_pending` more, are in here at once.
    """

    def __init__(
        self, dag: DAG, config: ExecutorConfig | None = None, *, handle_signals: bool = False, **options: Any
    ) -> None:
        super().__init__(dag, config, **options)
        self._furnish(handle_signals)
        self._timers: dict[Ticket, asyncio.TimerHandle] = {}

    # --- life

    async def start(self, tasks: Mapping[str, str | None] | None = None) -> Self:
        """Connects, and starts accepting; shards start meanwhile. With a journal, what an earlier process accepted runs
        from its beginning, with tickets.

        tasks: for a DAG that has changed, as for `recover`. Raises ServeError if it is started, ConfigError,
        JournalError, PlanChangedError.
        """
        self._open()
        self._durable = await Durable.of(self.config.journal, self.plan, tasks)
        try:
            self._signals.take(self._signalled)
            self._fleet.enter()
        except BaseException:
            self._signals.release(asyncio.get_running_loop())
            await self._leave_journal()
            raise
        driver = self._period = self._open_driver(iter(()))
        driver.open_ended, driver.failures_kept, driver.on_ended = True, self.config.failures_kept, self._ended
        try:
            if self._durable is not None:
                self._take_up(driver, self._durable)
            driver.begin()
        except BaseException:
            self._signals.release(driver.loop)
            await self._leave()
            self._period = None
            raise
        driver.done.add_done_callback(self._run_ended)
        self._set_phase("accepting")
        return self

    def _take_up(self, driver: Driver, durable: Durable) -> None:
        driver.recorder = durable.recorder
        epoch = driver.epoch + durable.recovery.behind_s
        contexts = found(driver.recorder, durable.recovery, self.plan)
        for context in contexts:
            entry = context._entry
            self._give_ticket(driver, context, entry.entered - epoch, None if entry.due is None else entry.due - epoch)
        driver.take_up(contexts)

    def _stories(self, driver: Driver) -> list[dict[str, Any]]:
        now = driver.clock()
        return [
            {"id": each.id, "shard": self.shard_of(each), "age_s": now - each.accepted_at} for each in self._tickets
        ]

    async def _end(self, driver: Driver, result: RunResult) -> None:
        driver.done.remove_done_callback(self._run_ended)  # nobody is surprised by this end
        if self._tickets.open and self._durable is not None:
            self._durable.suspend()  # the next process takes it up
        driver.end_early("left" if self._tickets.open else "", None)
        await driver.close()
        result.abandoned = driver.abandoned

    async def _leave(self) -> None:
        if self._period is not None:
            self._retire(self._period)
        try:
            await self._fleet.leave(self.config.shutdown_grace)
        finally:
            await self._leave_journal()

    async def _leave_journal(self) -> None:
        durable, self._durable = self._durable, None
        if durable is not None:
            await durable.close()

    def _tell(self, fact: str, *arguments: Any) -> None:
        driver = self._period
        tell = None if driver is None else getattr(driver.facts, fact)
        if driver is not None and tell is not None:
            tell(*arguments, driver.clock())

    # --- submitting

    def _accept(self, driver: Driver, context: Context, due: float | None) -> Ticket:
        driver.submit(context, due)
        ticket = self._give_ticket(driver, context, driver.clock(), due)
        self._tell("submitted", context)
        return ticket

    def _give_ticket(self, driver: Driver, context: Context, at: float, due: float | None) -> Ticket:
        ticket = _ShardTicket(self, context, at)
        self._tickets.add(ticket)
        if due is not None:
            self._timers[ticket] = driver.loop.call_at(due, self._too_late, ticket)
        return ticket

    def _places(self, driver: Driver) -> int:
        return self.config.max_live_contexts * self.shards + self.config.max_pending - self._tickets.open

    # --- ends

    def _ended(self, context: Context) -> None:
        """Of a submission and all that was made from it, everything is here."""
        ticket = None if context._scope is None else self._tickets.of_scope(context._scope)
        if ticket is None or self._period is None:
            return
        if self._durable is not None:
            self._durable.after_commit(partial(self._finish, self._period, ticket))
        else:
            self._finish(self._period, ticket)

    def _finish(self, driver: Driver, ticket: Ticket) -> None:
        timer = self._timers.pop(ticket, None)
        if timer is not None:
            timer.cancel()
        super()._finish(driver, ticket)
        if self._line:
            self._line.wake(self._places(driver))

    def _too_late(self, ticket: Ticket) -> None:
        took = 0.0 if self._period is None else self._period.clock() - ticket.accepted_at
        error = DeadlineExceeded(f"context {ticket.id!r} did not finish within its deadline ({took:.3f} s)")
        if self._period is not None and not ticket.done:
            self._period.withdraw(ticket.context, error)

    def _cancel(self, ticket: Ticket) -> bool:
        if self._period is None or ticket.done:
            return False
        return self._period.withdraw(ticket.context, None)

    def _scope_done(self, scope: Scope) -> None:
        """Never called: nothing of the scope lives in this process."""

    def shard_of(self, ticket: Ticket) -> str | None:
        """The name of the shard that has it; None while it waits, and when it has ended."""
        return None if self._period is None else self._period.shard_of(ticket.context)

    @property
    def pending(self) -> int:
        """Accepted contexts that no shard has yet."""
        return 0 if self._period is None else len(self._period.sharding.queue)
