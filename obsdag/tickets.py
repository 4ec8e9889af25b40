"""Tickets: what a submission is answered with, and the book that keeps them until somebody fetches the result (S1, S2).

The life of a ticket: accepted -> pending (it waits for room) -> running -> done -> fetched, or expired after
`result_ttl`. The book forgets a ticket when it is fetched, expired, or done with nobody left who wants it; whoever
holds the object can still read it. Everything here happens on the event loop of the serving period.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from obsdag.context import Context
from obsdag.core.records import Scope
from obsdag.errors import ContextFailedError, InputError, JournalError, NoOutputError, ServeError, UnknownTicketError

if TYPE_CHECKING:
    from obsdag.context import OutputContext
    from obsdag.core.records import Failure, Timer
    from obsdag.core.state import RunState

__all__ = ["Desk", "Entering", "Line", "Ticket", "TicketBook", "check_options", "living_of", "stories"]


class Desk(Protocol):
    """Who gave a ticket out."""

    def _fetched(self, ticket: Ticket) -> None: ...

    def _cancel(self, ticket: Ticket) -> bool: ...

    def _scope_done(self, scope: Scope) -> None: ...


class Ticket:
    """One submission (S1): it covers the context and everything that is made from it.

    id, context: of the submission. accepted_at: when it was accepted (run clock). `status`: pending, running, or how
    the submitted context ended. done: whether everything that it covers has ended. A result is kept until it is
    fetched, or for `result_ttl`.
    """

    __slots__ = (
        "_desk",
        "_expired",
        "_failures",
        "_lost",
        "_outputs",
        "_timer",
        "_unwanted",
        "_waiters",
        "accepted_at",
        "context",
        "done",
        "id",
        "scope",
    )

    def __init__(self, desk: Desk, context: Context, now: float) -> None:
        self.id = context.id
        self.context = context
        self.accepted_at = now
        self.scope = context._scope = Scope(desk._scope_done)
        self._outputs, self._failures = self.scope.outputs, self.scope.failures
        self._desk = desk
        self.done = False
        self._waiters: list[asyncio.Future[None]] = []  # one each: whoever stops waiting takes nothing from the others
        self._expired = False
        self._lost: JournalError | None = None  # its outcome could not be committed: nobody may rely on it
        self._unwanted = False  # whoever asked is gone: nothing is kept for them
        self._timer: Timer | None = None

    def __repr__(self) -> str:
        return f"<Ticket {self.id!r} {self.status}>"

    @property
    def status(self) -> str:
        """pending, running, or the outcome of the submitted context once all that was made from it has ended."""
        if self.done:
            return self.outcome
        return "running" if self.context._run is not None else "pending"

    @property
    def outcome(self) -> str:
        """How the submitted context ended; of one that is only kept readable (E11), how it is going to."""
        context = self.context
        kept = context._more.pending_end if context._more is not None else None
        return context._outcome or kept or "cancelled"

    async def result(self, timeout: float | None = None) -> OutputContext:
        """The only output. Waits for at most `timeout` seconds, without cancelling anything.

        Raises TimeoutError; ContextFailedError from the task's exception; NoOutputError, with the outcome; ServeError
        if there are several outputs (use `results`); UnknownTicketError if the result has expired.
        """
        outputs = await self.results(timeout)
        if len(outputs) > 1:
            raise ServeError(f"context {self.id!r} has {len(outputs)} outputs: use results()")
        if not outputs:
            raise NoOutputError(f"context {self.id!r} ended as {self.outcome}, without an output", self.outcome)
        return outputs[0]

    async def results(self, timeout: float | None = None) -> list[OutputContext]:
        """All outputs, in order of completion; none is no error here. Waits and raises as `result` does."""
        if timeout is None:
            await self._ended()
        else:
            async with asyncio.timeout(timeout):
                await self._ended()
        if self._expired:
            raise UnknownTicketError(f"the result of context {self.id!r} was not fetched in time and has been dropped")
        if self._lost is not None:
            raise self._lost
        self._desk._fetched(self)
        failure = self._failure()
        if failure is not None:
            raise ContextFailedError(str(failure), failure.context.error_info) from failure.exception
        return list(self._outputs)

    async def _ended(self) -> None:
        if self.done:
            return
        # A future of its own wakes the waiter in the next turn of the loop; a shield around a common one takes two.
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            self._waiters.remove(waiter)

    def close(self) -> None:
        """Everything that it covers has ended: wakes whoever waits."""
        self.done = True
        # Contexts know their scope: with these it would be garbage in a circle, and the collector's pauses are long.
        self.scope.outputs, self.scope.failures = [], []
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _failure(self) -> Failure | None:
        """What fails the ticket: its context, or one that replaced it; a child only if nothing came out at all."""
        for failure in self._failures:
            if failure.context._parent is None or failure.context is self.context or not self._outputs:
                return failure
        return None

    def cancel(self) -> bool:
        """Ends the context and all that was made from it as cancelled; False if it had ended."""
        return self._desk._cancel(self)


class TicketBook:
    """The tickets of one serving executor.

    open: accepted and not ended. by_id: those, and ended ones that nobody has fetched yet. on_expired: told of each
    ended one that is dropped because nobody came for it.
    """

    def __init__(self, ttl_s: float, on_expired: Callable[[Ticket], None]) -> None:
        self.open = 0
        self.by_id: dict[str, Ticket] = {}
        self._ttl_s = ttl_s
        self._on_expired = on_expired
        self._by_scope: dict[Scope, Ticket] = {}
        self._unfetched: OrderedDict[Ticket, float] = OrderedDict()  # in the order in which they expire
        self._timer: asyncio.TimerHandle | None = None

    def __iter__(self) -> Iterator[Ticket]:
        """Those that have not ended, in order of acceptance."""
        return iter(list(self._by_scope.values()))

    @property
    def unfetched(self) -> int:
        """Results that wait to be fetched."""
        return len(self._unfetched)

    def is_living(self, id: str) -> bool:
        """Whether a submission of that id has not ended."""
        ticket = self.by_id.get(id)
        return ticket is not None and not ticket.done

    def add(self, ticket: Ticket) -> None:
        """A submission was accepted. An older result of the same id that nobody has fetched is dropped, and counted."""
        old = self.by_id.get(ticket.id)
        if old is not None:
            self._expire(old)
        self.by_id[ticket.id] = ticket
        self._by_scope[ticket.scope] = ticket
        self.open += 1

    def of_scope(self, scope: Scope) -> Ticket | None:
        """The ticket that covers it, if it has not ended."""
        return self._by_scope.get(scope)

    def close(self, ticket: Ticket, loop: asyncio.AbstractEventLoop) -> None:
        """Everything that it covers has ended: whoever waits is told, and the result is kept for a while."""
        del self._by_scope[ticket.scope]
        self.open -= 1
        ticket.close()
        if ticket._unwanted:
            self.forget(ticket)
            return
        self._unfetched[ticket] = loop.time() + self._ttl_s
        if self._timer is None:
            self._timer = loop.call_later(self._ttl_s, self._expire_due, loop)

    def forget(self, ticket: Ticket) -> None:
        """It was fetched, or nobody wants it: nothing is kept of one that has ended."""
        ticket._unwanted = True
        if ticket.done:
            self._unfetched.pop(ticket, None)
            if self.by_id.get(ticket.id) is ticket:
                del self.by_id[ticket.id]

    def _expire(self, ticket: Ticket) -> None:
        self.forget(ticket)
        ticket._expired = True
        ticket._outputs, ticket._failures = [], []
        self._on_expired(ticket)

    def _expire_due(self, loop: asyncio.AbstractEventLoop) -> None:
        """Drops what nobody fetched within `result_ttl` (S2); one timer for all of them."""
        self._timer = None
        now = loop.time()
        while self._unfetched:
            ticket, when = next(iter(self._unfetched.items()))
            if when > now:
                self._timer = loop.call_at(when, self._expire_due, loop)
                return
            self._expire(ticket)

    def rest(self) -> None:
        """The serving period is over: no timer is left. Results stay readable until `clear`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def clear(self) -> None:
        """A new serving period begins: what nobody fetched from the one before is dropped, and counted."""
        for ticket in list(self._unfetched):
            self._expire(ticket)


class Line:
    """Who waits to submit, in order of asking; a future each, resolved when it is its turn."""

    def __init__(self) -> None:
        self._places: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def join(self, first: bool = False) -> asyncio.Future[None]:
        """A new place at the end of the line, or at its beginning."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._places[place] = None
        self._places.move_to_end(place, not first)
        return place

    def leave(self, place: asyncio.Future[None]) -> None:
        """Out of the line."""
        del self._places[place]

    def wake(self, places: int) -> None:
        """It is the turn of the first `places`, those included whose turn it was already."""
        for place in self._places:
            if places <= 0:
                return
            if not place.done():
                place.set_result(None)
            places -= 1


class Entering(Iterator[Context]):
    """Pending contexts as the input of the run: a worker that finds nothing else to do takes the next one (E4)."""

    def __init__(self, pending: OrderedDict[Ticket, None]) -> None:
        self._pending = pending

    def __next__(self) -> Context:
        if not self._pending:
            raise StopIteration
        return self._pending.popitem(last=False)[0].context


def living_of(run: RunState, ticket: Ticket) -> list[Context]:
    """The living contexts that a ticket covers; mostly one, found without a look at all the others."""
    found = [ticket.context]
    for context in found:  # grows while it is walked
        found.extend(context._children or ())
    found = [context for context in found if context._scope is ticket.scope and context._outcome is None]
    if len(found) == ticket.scope.living:
        return found
    return [context for context in run.contexts if context._scope is ticket.scope]


def stories(run: RunState, tickets: TicketBook) -> list[dict[str, Any]]:
    """What a drain cancels: ids, ages, and the tasks at which the contexts and what was made from them stand."""
    tasks: dict[Scope, set[str]] = {}
    for context in run.contexts:
        if context._scope is not None:
            tasks.setdefault(context._scope, set()).add(run._waiting_at(context))
    now = run.clock()
    return [
        {"id": each.id, "tasks": sorted(tasks.get(each.scope, ())), "age_s": now - each.accepted_at} for each in tickets
    ]


def check_options(id: Any, deadline: Any, trace: Any, wait: Any) -> None:
    """Raises InputError by name for an option of `submit` that cannot be used."""
    if id is not None and (not isinstance(id, str) or not id):
        raise InputError(f"id must be a text that is not empty, not {id!r}")
    if deadline is not None and not _is_seconds(deadline, above=True):
        raise InputError(f"deadline must be a number of seconds > 0, not {deadline!r}")
    if trace not in ("child", "link"):
        raise InputError(f"trace must be 'child' or 'link', not {trace!r}")
    if not isinstance(wait, bool) and not _is_seconds(wait, above=False):
        raise InputError(f"wait must be True, False or a number of seconds >= 0, not {wait!r}")


def _is_seconds(value: Any, above: bool) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < float("inf") and not (above and not value)
