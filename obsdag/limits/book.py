"""Who gets which permits when: the state of all limits of one runtime, and the lines before them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final

from obsdag.limits.definitions import MAKE, Limit, ResourcePool
from obsdag.limits.ledgers import NOW, ON_RELEASE, Ledger, open_ledger
from obsdag.limits.requests import Closing, LimitOwner, LimitRequest, LimitStatus

__all__ = ["LimitBook"]

# Threads read one clock and then race for the lock, so times come in a little out of order: who comes late counts as of
# the latest time seen, else a permit would be dated back and the next one be too early. A time that is older than the
# latest by more than this (seconds) means that the clock was set back.
_CLOCK_RACE_S: Final = 1.0

_News = tuple[LimitRequest, float | None]  # to tell the owner: the time to rearm, or None: granted


class LimitBook:
    """The state of limits, shared by the runs of one `Runtime` (SEMANTICS T7, T8). Thread-safe; no call waits.

    A run calls `attach` first and `detach` last. In between, for each execution: `request`, and `release` when it is
    over, whatever became of it. A request that is not granted at once is told later, with `LimitOwner.granted`.
    `advance` is to be called at the times told with `LimitOwner.rearm`; `due` tells again, say after a timer that
    fired early.
    """

    __slots__ = ("_asked", "_latest", "_ledgers", "_lock", "_news", "_retired", "_sets", "_timed")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ledgers: dict[Limit, Ledger] = {}
        self._sets: dict[tuple[Limit, ...], tuple[Ledger, ...]] = {}  # the ledgers of these limits: one tuple for all
        self._retired: set[Limit] = set()  # no run attached: to be dropped as soon as the ledger is at rest
        self._timed: dict[LimitRequest, float] = {}  # wait for nothing but the clock; at most one for each rate
        self._news: list[_News] = []  # to be told when the lock is free again
        self._asked = 0
        self._latest = -math.inf  # the latest time seen

    def request(self, owner: LimitOwner, key: object, limits: tuple[Limit, ...], now: float) -> LimitRequest:
        """Ask for a permit of each of `limits`. If the result is not `granted` yet, `owner` is told when it is.

        It is granted at once if all permits are there and nobody who asked earlier for one of them still waits.
        Raises ConfigError for a limit of an unknown kind.
        """
        if len(limits) > 1:
            limits = tuple(dict.fromkeys(limits))
        news = None
        with self._lock:
            ledgers = self._sets.get(limits) or self._opened_all(limits)
            request = LimitRequest(owner, key, ledgers, now)
            now = self._see(now)
            for ledger in ledgers:
                if ledger.line or ledger.ready_at() > now:
                    self._line_up(request, now)
                    break
            else:
                _hand_over(request, now)
            if self._news:
                news = self._take_news()
        if news:
            _tell(news)
        return request

    def release(self, request: LimitRequest, now: float, unused: bool = False) -> Sequence[Closing]:
        """Leave the lines, or give all permits back; again is a no-op. Who is next is granted what is there.

        unused: nothing was executed under the permits, so those of rates may be used again (see `RateLimit`).
        Returns what the caller has to close: items that came back after the last run detached. Normally nothing.
        """
        news = None
        closings: Sequence[Closing] = ()
        with self._lock:
            if request.granted:
                request.granted = False
                for ledger in request._ledgers:
                    closings = [*closings, *gone] if (gone := ledger.put(request, unused)) else closings
            elif request._number:
                self._leave_lines(request)
            for ledger in request._ledgers:
                if ledger.line:
                    now = self._see(now)
                    self._settle(request._ledgers, now)
                    break
            if self._news:
                news = self._take_news()
        if news:
            _tell(news)
        return closings

    def advance(self, now: float) -> None:
        """Grant what time has made possible, whoever the owner is."""
        with self._lock:
            now = self._see(now)
            for _, _, request in sorted((at, each._number, each) for each, at in self._timed.items() if at <= now):
                self._settle(request._ledgers, now)
            news = self._take_news()
        _tell(news)

    def due(self, owner: LimitOwner) -> float | None:
        """When `owner` has to call `advance` next; None if none of its requests waits for a time only."""
        with self._lock:
            return min((at for request, at in self._timed.items() if request.owner is owner), default=None)

    def attach(self, limits: Iterable[Limit]) -> None:
        """A run is going to use `limits` until it calls `detach` with the same. Raises ConfigError like `request`."""
        with self._lock:
            self._sweep()
            for ledger in [self._ledgers.get(limit) or self._opened(limit) for limit in limits]:
                ledger.attached += 1
                self._retired.discard(ledger.limit)

    def detach(self, limits: Iterable[Limit]) -> list[Closing]:
        """A run uses `limits` no more. Returns what it has to close: the idle items of pools that no other run uses.

        A limit's state is dropped when no run uses it, but a rate's only when it is as good as new (so that the rate
        holds over runs one after the other), and one with permits still held only after they were given back.
        """
        closings: list[Closing] = []
        with self._lock:
            for limit in limits:
                ledger = self._ledgers.get(limit)
                if ledger is not None and ledger.attached:
                    ledger.attached -= 1
                    if not ledger.attached:
                        self._retired.add(limit)
                        closings += ledger.retire()
            self._sweep()
        return closings

    def resource_made(self, request: LimitRequest, pool: ResourcePool, item: Any, now: float) -> bool:
        """The item for which MAKE stood is made. False: nobody can use it, the caller has to close it.

        If the request was released in the meantime, the item becomes an idle one, if there is room for it: nobody waits
        for it then, since who is first could have had it made. (To keep within `size` even while the late item is
        being made, tell the result first and release afterwards.)
        """
        with self._lock:
            if request.granted and _is_making(request, pool):
                request._take(pool, item)
                return True
            ledger = self._ledgers.get(pool)
            return ledger is not None and ledger.adopt(item)

    def resource_failed(self, request: LimitRequest, pool: ResourcePool, now: float) -> None:
        """The item for which MAKE stood cannot be made: its place is free again, other permits are kept."""
        with self._lock:
            if not request.granted or not _is_making(request, pool):
                return
            ledger = self._ledgers[pool]
            ledger.put(request, unused=True)
            now = self._see(now)
            self._settle((ledger,), now)
            news = self._take_news()
        _tell(news)

    def waiting(self, limit: Limit) -> int:
        """How many requests stand in the line of `limit`."""
        with self._lock:
            ledger = self._ledgers.get(limit)
            return ledger.waiting if ledger else 0

    def in_use(self, limit: Limit) -> int:
        """How many requests hold a permit of `limit` (of a rate: the executions under its permits)."""
        with self._lock:
            ledger = self._ledgers.get(limit)
            return ledger.held if ledger else 0

    def snapshot(self) -> list[LimitStatus]:
        """Every limit's state at one moment, in order of first use. From any thread."""
        with self._lock:
            return [ledger.status() for ledger in self._ledgers.values()]

    # From here on: with the lock held.

    def _see(self, now: float) -> float:
        """The time that counts, never earlier than what it was for those who came before."""
        if now > self._latest:
            self._latest = now
        elif now < self._latest - _CLOCK_RACE_S:
            self._latest = now
            for ledger in self._ledgers.values():
                ledger.set_back(now)
            for request in tuple(self._timed):
                self._settle(request._ledgers, now)
        return self._latest

    def _opened(self, limit: Limit) -> Ledger:
        ledger = self._ledgers[limit] = open_ledger(limit)
        self._retired.add(limit)
        return ledger

    def _opened_all(self, limits: tuple[Limit, ...]) -> tuple[Ledger, ...]:
        ledgers = self._sets[limits] = tuple([self._ledgers.get(limit) or self._opened(limit) for limit in limits])
        return ledgers

    def _sweep(self) -> None:
        for limit in [each for each in self._retired if self._ledgers[each].at_rest(self._latest)]:
            self._retired.remove(limit)
            del self._ledgers[limit]
            self._sets.clear()

    def _line_up(self, request: LimitRequest, now: float) -> None:
        self._asked += 1
        request._number = self._asked
        for ledger in request._ledgers:
            ledger.line_up(request)
        self._consider(request, now)

    def _leave_lines(self, request: LimitRequest) -> None:
        request._number = 0
        self._timed.pop(request, None)
        for ledger in request._ledgers:
            ledger.leave()

    def _settle(self, ledgers: Iterable[Ledger], now: float) -> None:
        """Consider who is first in these lines, and after each grant who became first by it."""
        pending = list(ledgers)
        for ledger in pending:
            if ledger.line:
                first = ledger.line[0]
                if self._consider(first, now):
                    pending += first._ledgers

    def _consider(self, request: LimitRequest, now: float) -> bool:
        """Grant a waiting request if possible. Otherwise note what it waits for; if a time, its owner is told."""
        ready_at = NOW
        for ledger in request._ledgers:
            if ledger.line[0] is not request:
                request.blocking = ledger.limit
                return False
            if ledger.ready_at() > max(ready_at, now):
                ready_at, request.blocking = ledger.ready_at(), ledger.limit
        if ready_at == NOW:
            self._leave_lines(request)
            _hand_over(request, now)
            self._news.append((request, None))
            return True
        if ready_at == ON_RELEASE:
            self._timed.pop(request, None)
        elif self._timed.get(request) != ready_at:
            self._timed[request] = ready_at
            self._news.append((request, ready_at))
        return False

    def _take_news(self) -> list[_News]:
        news, self._news = self._news, []
        return news


def _hand_over(request: LimitRequest, now: float) -> None:
    for ledger in request._ledgers:
        ledger.take(request, now)
    request.granted = True
    request.granted_at = now


def _is_making(request: LimitRequest, pool: ResourcePool) -> bool:
    return request._taken is not None and request._taken.get(pool) is MAKE


def _tell(news: list[_News]) -> None:
    """Tell the owners. What one of them raises is raised here, after all the others were told."""
    failure: Exception | None = None
    for request, at in news:
        try:
            if at is None:
                request.owner.granted(request)
            else:
                request.owner.rearm(at)
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
