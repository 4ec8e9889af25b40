"""What passes between a run and the book: requests, notifications, states to look at (see `obsdag.limits`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

from obsdag.limits.definitions import Limit, ResourcePool

if TYPE_CHECKING:
    from obsdag.limits.ledgers import Ledger

__all__ = ["Closing", "Kind", "LimitOwner", "LimitRequest", "LimitStatus"]

Kind = Literal["rate", "concurrency", "pool"]
Closing = tuple[Callable[[Any], Any], Any]
"""A pool's `close` and the item that it has to be called with."""


class LimitOwner(Protocol):
    """Whoever asks for permits: a run. It may be told from any thread, without the book's lock.

    Both methods must be quick, must not raise (not even because an event loop is closed), and should only note what
    they are told: calling the book back would work, but recurse along a line of grants.
    """

    def granted(self, request: LimitRequest) -> None:
        """A request that waited holds its permits now. Ignore it if it was released since (`request.granted`)."""

    def rearm(self, at: float) -> None:
        """Call `advance` at the time `at`, too: a request of this owner waits for nothing but that time."""


class LimitRequest:
    """One wish for permits of all `limits`. Anybody may read it; only the book changes it.

    owner, key: who asks, and what for (opaque to the book).
    granted: holds its permits now. blocking: the limit that it waits for, afterwards the one that it waited for last;
    None if it was granted at once.
    asked_at, granted_at: seconds; `granted_at` is nan until then.
    """

    __slots__ = ("_ledgers", "_number", "_taken", "asked_at", "blocking", "granted", "granted_at", "key", "owner")

    def __init__(self, owner: LimitOwner, key: object, ledgers: tuple[Ledger, ...], now: float) -> None:
        self.owner = owner
        self.key = key
        self.granted = False
        self.blocking: Limit | None = None
        self.asked_at = now
        self.granted_at = math.nan
        self._ledgers = ledgers
        self._number = 0  # the place in the order of asking, while it waits
        # Of a pool its item, of a rate the number of its permit, for giving that back unused.
        self._taken: dict[Limit, Any] | None = None

    @property
    def limits(self) -> tuple[Limit, ...]:
        """What it is for, each once."""
        return tuple([ledger.limit for ledger in self._ledgers])

    @property
    def resources(self) -> dict[ResourcePool, Any]:
        """While granted, the item of each pool, or MAKE where the owner has to make it (`LimitBook.resource_made`)."""
        taken = self._taken
        return {limit: taken[limit] for limit in taken if isinstance(limit, ResourcePool)} if taken else {}

    def _take(self, limit: Limit, what: Any) -> None:
        """It was given something that it has to give back."""
        if self._taken is None:
            self._taken = {}
        self._taken[limit] = what


class LimitStatus(TypedDict):
    """One limit at one moment, for metrics and live pages.

    limit: the definition, for whoever has names for limits without one. capacity: most permits at once (of a rate: its
    burst), None for an unbounded pool. in_use: granted and not released. next_permit_at: of a rate that was used:
    seconds of the book's clock, past or present if a permit is there; else None.
    """

    limit: Limit
    name: str | None
    kind: Kind
    capacity: int | None
    in_use: int
    waiting: int
    next_permit_at: float | None
