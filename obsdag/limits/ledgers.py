"""The state of one limit, by kind. Called by the book only, with its lock held (see `obsdag.limits`)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from obsdag.errors import ConfigError
from obsdag.limits.definitions import MAKE, ConcurrencyLimit, Limit, RateLimit, ResourcePool
from obsdag.limits.requests import Closing, Kind, LimitRequest, LimitStatus

__all__ = ["NOW", "ON_RELEASE", "Ledger", "open_ledger"]

NOW: Final = -math.inf
"""A permit is there whatever the time."""
ON_RELEASE: Final = math.inf
"""No time brings a permit: somebody has to give one back."""


class Ledger(ABC):
    """`line`: who waits, in order of asking, and among them, but never first, those that have left (`leave` counts).

    `waiting`: how many wait. `held`: requests that hold a permit. `attached`: runs that may ask.
    """

    __slots__ = ("attached", "held", "limit", "line", "waiting")
    kind: ClassVar[Kind]

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        # 8 bytes for each; an OrderedDict has 75. Who is in the middle leaves seldom: when its context ends.
        self.line: deque[LimitRequest] = deque()
        self.waiting = 0
        self.held = 0
        self.attached = 0

    @abstractmethod
    def ready_at(self) -> float:
        """From when on a permit is there: NOW, a time in seconds, or ON_RELEASE."""

    @abstractmethod
    def capacity(self) -> int | None:
        """Most permits at once, None if unbounded."""

    def line_up(self, request: LimitRequest) -> None:
        """Put a request that waits at the end of the line."""
        self.line.append(request)
        self.waiting += 1

    def leave(self) -> None:
        """One of the line does not wait any more; its entry is dropped when it is first, or when most have left."""
        self.waiting -= 1
        line = self.line
        while line and not line[0]._number:
            line.popleft()
        if len(line) > 64 and self.waiting * 2 < len(line):
            self.line = deque([request for request in line if request._number])

    def take(self, request: LimitRequest, now: float) -> None:
        """Hand a permit to `request`, at or after `ready_at`."""
        self.held += 1

    def put(self, request: LimitRequest, unused: bool) -> Sequence[Closing]:
        """Take back what `take` handed over. Returns what is to be closed."""
        self.held -= 1
        return ()

    def adopt(self, item: Any) -> bool:
        """Keep a pool's item whose request is gone, if somebody may use it and there is room."""
        return False

    def set_back(self, now: float) -> None:  # noqa: B027 - only a rate's ledger knows times
        """The clock was set back, to `now`."""

    def retire(self) -> Sequence[Closing]:
        """The last run detached. Returns what is to be closed."""
        return ()

    def at_rest(self, now: float) -> bool:
        """Nobody holds a permit or waits for one, and a new ledger would be as good."""
        return not (self.held or self.line)

    def status(self) -> LimitStatus:
        """What a snapshot shows."""
        return LimitStatus(
            limit=self.limit,
            name=self.limit.name,
            kind=self.kind,
            capacity=self.capacity(),
            in_use=self.held,
            waiting=self.waiting,
            next_permit_at=None,
        )


class _ConcurrencyLedger(Ledger):
    """Counts."""

    __slots__ = ("_n",)
    kind = "concurrency"

    def __init__(self, limit: ConcurrencyLimit) -> None:
        super().__init__(limit)
        self._n = limit.n

    def ready_at(self) -> float:
        return NOW if self.held < self._n else ON_RELEASE

    def capacity(self) -> int:
        return self._n


class _RateLedger(Ledger):
    """GCRA with its theoretical arrival time, when the bucket will be full again, kept as `_base + _count * per / n`.

    `_base` is a time at which the bucket was full, `_count` the permits since: each time is computed with one
    rounding, so errors do not add up, and the time that is told comes from the same expression as the one that is
    compared: a wake-up at exactly that time is not a moment too early.
    Permits are numbered. Those given back unused are taken off from the latest downwards, as if they had never been
    granted; `_returned` are numbers that have a used permit, or one still held, above them.
    """

    __slots__ = ("_base", "_burst", "_count", "_last", "_n", "_per", "_returned")
    kind = "rate"

    def __init__(self, limit: RateLimit) -> None:
        super().__init__(limit)
        self._n = limit.n
        self._per = float(limit.per)
        self._burst = limit.burst or 1
        self._base = -math.inf
        self._count = 0
        self._last = 0
        self._returned: set[int] = set()

    def ready_at(self) -> float:
        return self._base + (self._count + 1 - self._burst) * self._per / self._n

    def _full_at(self) -> float:
        return self._base + self._count * self._per / self._n

    def capacity(self) -> int:
        return self._burst

    def take(self, request: LimitRequest, now: float) -> None:
        if now > self._full_at():  # not >=: who comes exactly on time goes on counting from the same base
            self._base = now
            self._count = 0
        self._count += 1
        self._last += 1
        self.held += 1
        request._take(self.limit, self._last)

    def put(self, request: LimitRequest, unused: bool) -> Sequence[Closing]:
        self.held -= 1
        if unused and request._taken is not None:
            self._give_back(request._taken[self.limit])
        return ()

    def _give_back(self, number: int) -> None:
        returned = self._returned
        returned.add(number)
        while self._last in returned:
            returned.remove(self._last)
            self._last -= 1
            self._count = max(self._count - 1, 0)
        if len(returned) > 2 * self._burst:
            # To bound the memory. Nothing is lost: when `burst` later ones have been taken off, the bucket is full.
            self._returned = {each for each in returned if each > self._last - self._burst}

    def set_back(self, now: float) -> None:
        """Begin anew, with no permit left, if what was near by the old clock is far by the new one."""
        if self._full_at() > now + self._burst * self._per / self._n:
            self._base = now
            self._count = self._burst

    def at_rest(self, now: float) -> bool:
        return super().at_rest(now) and self._full_at() <= now

    def status(self) -> LimitStatus:
        status = super().status()
        if self._base > -math.inf:
            status["next_permit_at"] = self.ready_at()
        return status


class _PoolLedger(Ledger):
    """`_idle`: items to give out, the last one first. `_made`: items that exist or are being made, up to `_most`."""

    __slots__ = ("_idle", "_made", "_most", "_pool")
    kind = "pool"

    def __init__(self, limit: ResourcePool) -> None:
        super().__init__(limit)
        self._pool = limit
        self._idle = list(reversed(limit.items))
        self._made = len(self._idle)
        self._most = len(self._idle) if limit.factory is None else limit.size

    def _may_make(self) -> bool:
        return self._pool.factory is not None and (self._most is None or self._made < self._most)

    def ready_at(self) -> float:
        return NOW if self._idle or self._may_make() else ON_RELEASE

    def capacity(self) -> int | None:
        return self._most

    def take(self, request: LimitRequest, now: float) -> None:
        self.held += 1
        if self._idle:
            request._take(self._pool, self._idle.pop())
        else:
            self._made += 1
            request._take(self._pool, MAKE)

    def put(self, request: LimitRequest, unused: bool) -> Sequence[Closing]:
        if request._taken is None or self._pool not in request._taken:  # not made; its place was given back then
            return ()
        self.held -= 1
        item = request._taken.pop(self._pool)
        if item is MAKE:
            self._made -= 1
            return ()
        self._idle.append(item)
        return () if self.attached or self.line else self.retire()

    def adopt(self, item: Any) -> bool:
        if not (self.attached and self._may_make()):
            return False
        self._made += 1
        self._idle.append(item)
        return True

    def retire(self) -> Sequence[Closing]:
        close = self._pool.close
        if close is None:
            return ()
        idle, self._idle = self._idle, []
        self._made -= len(idle)
        return [(close, item) for item in reversed(idle)]


def open_ledger(limit: Limit) -> Ledger:
    """A ledger with every permit there. Raises ConfigError for a limit of an unknown kind."""
    if isinstance(limit, ConcurrencyLimit):
        return _ConcurrencyLedger(limit)
    if isinstance(limit, RateLimit):
        return _RateLedger(limit)
    if isinstance(limit, ResourcePool):
        return _PoolLedger(limit)
    raise ConfigError(f"a limit must be a RateLimit, ConcurrencyLimit or ResourcePool, not {limit!r}")
