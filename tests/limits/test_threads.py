"""Limits shared by real threads and event loops (SEMANTICS T7)."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest

from obsdag.limits import MAKE, ConcurrencyLimit, Limit, LimitBook, LimitRequest, RateLimit, ResourcePool
from tests.limits.owners import Run, ask


class Waiter(Run):
    """An owner in a thread of its own, which blocks for its grants and serves its own timers."""

    def __init__(self, book: LimitBook) -> None:
        super().__init__()
        self.book = book
        self.changed = threading.Event()

    def granted(self, request: LimitRequest) -> None:
        self.changed.set()

    def rearm(self, at: float) -> None:
        self.changed.set()

    def get(self, limits: tuple[Limit, ...]) -> LimitRequest:
        request = self.book.request(self, None, limits, time.monotonic())
        while not request.granted:
            due = self.book.due(self)
            self.changed.wait(None if due is None else max(due - time.monotonic(), 0.0))
            self.changed.clear()
            self.book.advance(time.monotonic())
        return request


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """Let the interpreter change threads as often as it can, to tear apart what only the lock holds together."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work` in `count` threads; the first exception of any is raised here."""
    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    if failures:
        raise failures[0]


def test_T7_state_is_touched_only_with_the_lock_held(book: LimitBook, run: Run) -> None:
    class Guarded(dict[Any, Any]):
        def __getattribute__(self, name: str) -> Any:
            assert book._lock.locked(), name
            touched[name] += 1
            return super().__getattribute__(name)

        def __getitem__(self, key: Any) -> Any:
            assert book._lock.locked()
            return super().__getitem__(key)

    touched: Counter[str] = Counter()
    book._ledgers, book._timed = Guarded(), Guarded()
    rate, pool = RateLimit(1), ResourcePool(object, size=1)
    book.attach([rate, pool])
    first, second, third = ask(book, run, 3, rate, pool)
    book.resource_failed(first, pool, 0.0)
    book.release(first, 0.0)
    book.advance(book.due(run) or 0.0)
    book.resource_made(second, pool, 1, 1.0)
    book.release(second, 1.0)
    book.release(third, 1.0)
    book.resource_made(third, pool, 2, 1.0)
    assert (book.waiting(rate), book.in_use(rate), len(book.snapshot())) == (0, 0, 2)
    book.detach([rate, pool])
    assert {"get", "values", "items", "pop"} <= set(touched)


def test_T7_threads_share_limits_in_any_order_and_none_waits_for_ever(book: LimitBook) -> None:
    slots = [ConcurrencyLimit(n) for n in (1, 2, 3)]
    pool, made = ResourcePool(object, size=2), iter(range(1_000_000))
    limits: list[Limit] = [*slots, pool]
    now: Counter[object] = Counter()
    most: Counter[object] = Counter()
    counting = threading.Lock()
    book.attach(limits)

    def work(index: int) -> None:
        choice, waiter = random.Random(index), Waiter(book)
        for _ in range(150):
            request = waiter.get(tuple(choice.sample(limits, choice.randint(1, 4))))
            if request.resources.get(pool) is MAKE:
                book.resource_made(request, pool, next(made), time.monotonic())
            held = [*request.limits, *(("item", item) for item in request.resources.values())]
            with counting:
                now.update(held)
                for each in held:
                    most[each] = max(most[each], now[each])
            with counting:
                now.subtract(held)
            book.release(request, time.monotonic(), unused=choice.random() < 0.3)

    in_threads(6, work)
    assert {limit: most[limit] <= n for limit, n in zip(limits, (1, 2, 3, 2), strict=True)} == dict.fromkeys(
        limits, True
    )
    items = [each for each in most if isinstance(each, tuple)]
    assert 1 <= len(items) <= 2
    assert all(most[item] == 1 for item in items)  # never one item in two hands
    assert all(status["in_use"] == status["waiting"] == 0 for status in book.snapshot())


def test_T7_threads_share_a_rate_and_none_gets_ahead_of_it(book: LimitBook) -> None:
    limit, granted = RateLimit(2_000), []

    def work(index: int) -> None:
        waiter = Waiter(book)
        for _ in range(50):
            request = waiter.get((limit,))
            granted.append(request.granted_at)
            book.release(request, time.monotonic())

    in_threads(4, work)
    granted.sort()
    assert len(granted) == 200
    assert min(later - earlier for earlier, later in pairwise(granted)) >= 1 / 2_000 - 1e-9


def test_T7_snapshots_from_a_scrape_thread(book: LimitBook, run: Run) -> None:
    limit, stop, seen = ConcurrencyLimit(3), threading.Event(), []

    def work(index: int) -> None:
        if index == 0:
            while not stop.is_set():
                seen.extend(book.snapshot())
            return
        for _ in range(300):
            requests = ask(book, run, 5, limit)
            extra = ConcurrencyLimit(1)
            book.attach([extra])
            for request in requests:
                book.release(request, 0.0)
            book.detach([extra])
        stop.set()

    in_threads(2, work)
    book.snapshot()
    assert all(status["in_use"] <= (status["capacity"] or 0) for status in seen)


class Shell(Run):
    """What an executor does, in small: one timer for the earliest time, armed from whatever thread tells it."""

    def __init__(self, book: LimitBook) -> None:
        super().__init__()
        self.book = book
        self.loop = asyncio.get_running_loop()
        self.futures: dict[object, asyncio.Future[None]] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.wakes = 0

    def granted(self, request: LimitRequest) -> None:
        self.loop.call_soon_threadsafe(self.futures[request.key].set_result, None)

    def rearm(self, at: float) -> None:
        with suppress(RuntimeError):  # the loop is closed: what it was to be told of is over
            self.loop.call_soon_threadsafe(self.arm, at)

    def arm(self, at: float) -> None:
        if self.timer is None or at < self.timer.when():
            self.disarm()
            self.timer = self.loop.call_at(at, self.wake)

    def disarm(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def wake(self) -> None:
        self.timer = None
        self.wakes += 1
        self.book.advance(self.loop.time())
        if (due := self.book.due(self)) is not None:  # loops fire timers a moment early, too
            self.arm(due)

    async def permit(self, key: int, limit: Limit) -> float:
        self.futures[key] = self.loop.create_future()
        request = self.book.request(self, key, (limit,), self.loop.time())
        if not request.granted:
            await self.futures[key]
        self.book.release(request, self.loop.time())
        return request.granted_at


async def test_T7_runs_on_two_event_loops_share_a_rate_and_poll_nothing(book: LimitBook) -> None:
    limit = RateLimit(500)
    granted: list[float] = []
    wakes: list[int] = []

    async def run_of_twenty() -> None:
        shell = Shell(book)
        granted.extend(await asyncio.gather(*(shell.permit(key, limit) for key in range(20))))
        shell.disarm()
        wakes.append(shell.wakes)

    await asyncio.to_thread(in_threads, 2, lambda _: asyncio.run(run_of_twenty()))
    granted.sort()
    assert len(granted) == 40
    assert min(later - earlier for earlier, later in pairwise(granted)) >= 1 / 500 - 1e-9
    assert sum(wakes) <= 2 * 40  # one for each permit, and those that came a moment early or for what the other took
