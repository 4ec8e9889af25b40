"""The journal's part in a serving period: submissions are answered after their commit, results given out after theirs,
and what an earlier process had accepted has tickets again.

Without a journal there is none of this (`Durable.of` gives None).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from obsdag.context import Context, OutputContext
from obsdag.core.records import Failure
from obsdag.errors import EncodingError, JournalError
from obsdag.mailbox import see_through
from obsdag.tickets import Ticket, TicketBook

if TYPE_CHECKING:
    from obsdag.journal.entries import Entry
    from obsdag.journal.recorder import Recorder
    from obsdag.journal.recover import Recovery
    from obsdag.plan import Plan
    from obsdag.shell import RunShell

__all__ = ["Durable", "accept"]


def accept(recorder: Recorder, context: Context, now: float, due: float | None) -> None:
    """A submission is accepted, with the trace of its caller. due: its deadline on the run's clock. Raises
    EncodingError, with nothing changed.
    """
    caller = None
    if context._trace is not None:  # without one nothing of telemetry is imported
        from obsdag.telemetry.carrier import caller_of

        caller = caller_of(context)
    recorder.accepted(context, now, due)
    context._entry.caller = caller


class Durable:
    """An open journal, the recorder of one serving period, and what is to be taken up at its beginning."""

    def __init__(self, journal: Any, recorder: Recorder, recovery: Recovery) -> None:
        self._journal = journal
        self._recorder = recorder
        self._recovery = recovery

    @classmethod
    async def of(cls, journal: Any, plan: Plan, tasks: Mapping[str, str | None] | None) -> Durable | None:
        """Opens the journal and reads what has no outcome. tasks: as for `recover`. Raises JournalError,
        PlanChangedError.
        """
        if journal is None:
            return None
        await journal.acquire()
        try:
            recorder = await journal.record(plan)
            try:  # nothing is awaited from the load to the begin of the run: what is found is this period's alone
                return cls(journal, recorder, await journal.load(plan, tasks))
            except BaseException:
                await asyncio.shield(recorder.close())
                raise
        except BaseException:
            await asyncio.shield(journal.release())
            raise

    @property
    def recorder(self) -> Recorder:
        """Of this serving period."""
        return self._recorder

    @property
    def recovery(self) -> Recovery:
        """What an earlier process had accepted."""
        return self._recovery

    async def close(self) -> None:
        """Writes down what is left, and lets go of the journal."""
        try:
            await see_through(self._recorder.close())
        finally:
            await see_through(self._journal.release())

    @property
    def error(self) -> JournalError | None:
        """Why nothing more can be committed, if that is so."""
        return self._recorder.error

    def suspend(self) -> None:
        """What is cancelled from here on has no outcome in the journal: the next process takes it up."""
        self._recorder.suspend()

    # --- submissions

    def accept(self, context: Context, now: float, due: float | None, reject: Callable[[str], None]) -> None:
        """A submission is accepted. due: its deadline on the run's clock. Raises EncodingError; nothing is changed."""
        try:
            accept(self._recorder, context, now, due)
        except EncodingError:
            reject("invalid")
            raise

    async def committed(self, ticket: Ticket, book: TicketBook) -> None:
        """Returns when the ticket's acceptance is committed. Raises JournalError.

        Cancelled meanwhile, it cancels the submission: nobody has its ticket.
        """
        try:
            await self._recorder.commit()
        except asyncio.CancelledError:
            book.forget(ticket)
            ticket.cancel()
            raise

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Calls back when what has happened until now is committed, or can never be."""
        self._recorder.after_commit(callback)

    def enter(self, ticket: Ticket, now: float) -> None:
        """What it covers is in the run, if it was held back from it since it may kill the process."""
        self._recorder.end_trial(ticket.context, now)

    # --- what an earlier process had accepted

    def attach(self, shell: RunShell, tickets: TicketBook, desk: Any) -> None:
        """The run that begins takes up what was found, with tickets."""
        self._recorder.attach(shell)

        def take_up(now: float) -> None:
            if shell.config.telemetry is not None:
                from obsdag.telemetry.carrier import restore_callers

                restore_callers(self._recovery.living)
            self._give_tickets(shell, tickets, desk)
            self._recorder.take_up(self._recovery, now)

        shell.restore = take_up

    def _give_tickets(self, shell: RunShell, book: TicketBook, desk: Any) -> None:
        """One for each tree: its root is what was submitted. More may live than `max_live_contexts` admits."""
        tickets: dict[int, Ticket] = {}
        epoch = shell.run.epoch + self._recovery.behind_s
        for saved in self._recovery.saved:  # a tree's root has the lowest of its keys
            context = saved.context
            entry: Entry = context._entry
            ticket = tickets.get(entry.tree)
            if ticket is None:
                ticket = tickets[entry.tree] = Ticket(desk, context, entry.entered - epoch)
                book.add(ticket)
                if entry.due is not None:
                    ticket._timer = shell.run.timers.set(entry.due - epoch, desk._deadline_passed, ticket)
            context._scope = ticket.scope
            if context._outcome == "output":
                ticket.scope.outputs.append(OutputContext(context))
            elif context._outcome == "failed" and context._error is not None and entry.failed is not None:
                failed = entry.failed
                ticket.scope.failures.append(Failure(context, failed.task, failed.attempts, context._error))
