"""`ServeExecutor`: a run that takes work in for as long as a service lives (SEMANTICS section 6).

At most `max_live_contexts` are alive and `max_pending` wait; beyond that `submit` waits too, in line, or raises, as the
caller chooses. What does not depend on where the work is done is in serving.py, with the steps of draining.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from obsdag.durable import Durable
from obsdag.errors import DeadlineExceeded
from obsdag.executor import Executor, RunResult
from obsdag.serving import Phase, Serving
from obsdag.tickets import Entering, Ticket, living_of, stories

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obsdag.config import ExecutorConfig
    from obsdag.context import Context
    from obsdag.core.records import Scope
    from obsdag.graph import DAG
    from obsdag.runtime import Runtime
    from obsdag.shell import RunShell

__all__ = ["Phase", "ServeExecutor", "Ticket"]


class ServeExecutor(Serving["RunShell"], Executor):
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
        self._furnish(handle_signals)
        self._is_traced = self.config.telemetry is not None
        self._pending: OrderedDict[Ticket, None] = OrderedDict()
        self._entering = Entering(self._pending)

    # --- life

    async def start(self, tasks: Mapping[str, str | None] | None = None) -> Self:
        """Starts accepting. With a journal, what an earlier process accepted goes on, with tickets.

        tasks: for a DAG that has changed, as for `recover`. Raises ServeError if it is started already or cannot handle
        signals in this thread; JournalError, PlanChangedError.
        """
        self._open()
        self._durable = await Durable.of(self.config.journal, self.plan, tasks)
        try:
            self._signals.take(self._signalled)
            shell = self._period = self._open_shell("serve", iter(()))
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
        shell, self._period = self._period, None
        self._signals.release(asyncio.get_running_loop())
        if shell is not None:
            shell.end_early("error", None)
            with contextlib.suppress(Exception):  # what broke the start is raised, not what that broke in turn
                await self._close(shell, RunResult())
        await self._leave()

    async def _leave(self) -> None:
        durable, self._durable = self._durable, None
        if durable is not None:
            await durable.close()

    def _stories(self, shell: RunShell) -> list[dict[str, Any]]:
        return stories(shell.run, self._tickets)

    async def _end(self, shell: RunShell, result: RunResult) -> None:
        if self._tickets.open and self._durable is not None:
            self._durable.suspend()  # the next process goes on with it
        for ticket in list(self._pending):
            self._cancel(ticket)
        if not shell.run.settled():
            shell.early = shell.early or "left"
        await self._close(shell, result)

    def _tell(self, fact: str, *arguments: Any) -> None:
        shell = self._period
        tell = None if shell is None else getattr(shell.run.facts, fact)
        if shell is not None and tell is not None:
            tell(*arguments, shell.clock())

    # --- submitting (S1, S2, S4)

    def _accept(self, shell: RunShell, context: Context, due: float | None) -> Ticket:
        run, now = shell.run, shell.clock()
        if self._durable is not None:
            self._durable.accept(context, now, due, partial(self._tell, "submit_rejected"))
        ticket = Ticket(self, context, now)
        self._tickets.add(ticket)
        if run.facts.submitted is not None:
            run.facts.submitted(context, now)
        if due is not None:
            ticket._timer = run.timers.set(due, self._deadline_passed, ticket)
            run.dirty = True
        if self._pending or not run.has_room():
            self._pending[ticket] = None
            shell.inputs = self._entering
        else:
            run.accept(context, now)
        if run.dirty:
            shell.pump()
        elif shell.free and run.queue.size:
            shell.wake_worker()
        return ticket

    def _places(self, shell: RunShell) -> int:
        """How many more may be accepted now: up to `max_live_contexts` alive, and `max_pending` that wait."""
        run = shell.run
        room = run.max_live - (run.living - run.at_joins - run.discarded + run.reserved + run.buffered)
        return max(room, 0) + self.config.max_pending - len(self._pending)

    def _refill(self) -> None:
        """Lets pending contexts in as far as there is room, and those that wait to submit after them."""
        shell = self._period
        if shell is None:
            return
        while self._pending and shell.run.has_room():
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
        elif self._durable is not None:
            self._durable.enter(ticket, now)

    def _deadline_passed(self, ticket: Ticket, now: float) -> None:
        shell, context = self._period, ticket.context
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
        shell = self._period
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
        if self._period is None or ticket is None:
            return
        if self._durable is not None:
            self._durable.after_commit(partial(self._finish, self._period, ticket))
        else:
            self._finish(self._period, ticket)

    def _finish(self, shell: RunShell, ticket: Ticket) -> None:
        if ticket._timer is not None and not ticket.done:
            shell.run.timers.cancel(ticket._timer)
        super()._finish(shell, ticket)

    @property
    def pending(self) -> int:
        """Accepted contexts that wait for room."""
        return len(self._pending)
