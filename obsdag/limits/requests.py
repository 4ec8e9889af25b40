"""What passes between a run and the book: requests, notifications, states to look at (see `obsdag.limits`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypedDict

if TYPE_CHECKING:
    from obsdag.limits.definitions import Limit, ResourcePool
    from obsdag.limits.ledgers import Ledger

__all__ = ["Closing", "Kind", "LimitOwner", "LimitRequest", "LimitStatus"]

Kind = Literal["rate", "concurrency", "pool"]
Closing = tuple[Callable[[Any], Any], Any]
"""A pool's `close` and the item that it has to be called with."""

_NO_RESOURCES: Final[Any] = MappingProxyType({})  # one for all: an empty dict of its own is 64 bytes


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

    owner, key: who asks, and what for (opaque to the book). limits: each once.
    granted: holds its permits now. blocking: the limit that it waits for, afterwards the one that it waited for last;
    None if it was granted at once.
    asked_at, granted_at: seconds; `granted_at` is nan until then.
    resources: while granted, the item of each pool, or MAKE where the owner has to make it (`LimitBook.resource_made`).
    """

    __slots__ = (
        "_ledgers",
        "_number",
        "_permits",
        "_waits",
        "asked_at",
        "blocking",
        "granted",
        "granted_at",
        "key",
        "limits",
        "owner",
        "resources",
    )

    def __init__(self, owner: LimitOwner, key: object, limits: tuple[Limit, ...], now: float) -> None:
        self.owner = owner
        self.key = key
        self.limits = limits
        self.granted = False
        self.blocking: Limit | None = None
        self.asked_at = now
        self.granted_at = math.nan
        self.resources: dict[ResourcePool, Any] = _NO_RESOURCES
        self._ledgers: tuple[Ledger, ...] = ()
        self._waits = False
        self._number = 0  # the place in the order of asking, of one that has to wait
        self._permits: dict[Ledger, int] | None = None  # numbers of rate permits, for giving them back unused

    def _take(self, pool: ResourcePool, item: Any) -> None:
        """It has an item of `pool`, or MAKE for one."""
        if self.resources is _NO_RESOURCES:
            self.resources = {}
        self.resources[pool] = item


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
