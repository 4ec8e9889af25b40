"""Lines before limits (SEMANTICS T7, T8): order of asking, all or none, who is told what; state and its end."""

from __future__ import annotations

from typing import Any

import pytest

from obsdag.limits import ConcurrencyLimit, Limit, LimitBook, LimitRequest, RateLimit, ResourcePool
from obsdag.runtime import Runtime
from tests.limits.owners import Run, ask, drain


def test_T7_permits_go_in_order_of_asking(book: LimitBook, run: Run) -> None:
    limit = ConcurrencyLimit(2)
    requests = ask(book, run, 6, limit)
    assert [request.granted for request in requests] == [True, True, False, False, False, False]
    assert (book.in_use(limit), book.waiting(limit)) == (2, 4)
    for request in requests:
        book.release(request, 1.0)
    assert run.keys == [2, 3, 4, 5]
    assert (book.in_use(limit), book.waiting(limit)) == (0, 0)


def test_T8_release_is_idempotent_in_every_state(book: LimitBook, run: Run) -> None:
    limit = ConcurrencyLimit(1)
    used, reserved, waiting, last = ask(book, run, 4, limit)
    for request in (used, used, waiting, waiting, reserved, reserved):
        book.release(request, 1.0)
    assert run.told == [reserved, last]
    assert (book.in_use(limit), book.waiting(limit)) == (1, 0)
    assert [request.granted for request in (used, reserved, waiting, last)] == [False, False, False, True]
    assert used.blocking is None  # it never waited


def test_T7_all_permits_or_none(book: LimitBook, run: Run) -> None:
    a, b = ConcurrencyLimit(1), ConcurrencyLimit(1)
    (first,) = ask(book, run, 1, a)
    both = book.request(run, "both", (b, a), 0.0)
    assert not both.granted
    assert both.blocking is a
    assert (book.in_use(a), book.in_use(b)) == (1, 0)  # it waits for a without holding b
    book.release(first, 1.0)
    assert both.granted
    assert both.blocking is a  # what it waited for is what its waiting is booked on
    assert (book.in_use(a), book.in_use(b)) == (1, 1)


def test_T7_who_asks_later_does_not_pass_by(book: LimitBook, run: Run) -> None:
    a, b, c = ConcurrencyLimit(1), ConcurrencyLimit(1), ConcurrencyLimit(1)
    (holds_a,) = ask(book, run, 1, a)
    both = book.request(run, "both", (a, b), 0.0)
    late = book.request(run, "late", (b,), 0.0)
    assert not late.granted  # though b is free: it would let `both` starve
    assert late.blocking is b
    assert book.request(run, "other", (c,), 0.0).granted  # nothing to do with them
    book.release(both, 1.0)
    assert run.told == [late]  # whoever leaves the line lets the others go on
    book.release(holds_a, 1.0)


def test_T7_opposite_orders_do_not_lock_each_other(book: LimitBook, run: Run) -> None:
    a, b = ConcurrencyLimit(1), ConcurrencyLimit(1)
    requests = [book.request(run, key, (a, b) if key % 2 else (b, a), 0.0) for key in range(10)]
    for request in requests:
        assert request.granted
        book.release(request, 0.0)


def test_T7_a_limit_given_twice_counts_once(book: LimitBook, run: Run) -> None:
    limit = ConcurrencyLimit(1)
    request = book.request(run, 0, (limit, limit), 0.0)
    assert request.granted
    assert request.limits == (limit,)
    book.release(request, 0.0)
    assert book.in_use(limit) == 0


def test_T7_no_limits_no_waiting(book: LimitBook, run: Run) -> None:
    request = book.request(run, 0, (), 3.0)
    assert request.granted
    assert (request.asked_at, request.granted_at) == (3.0, 3.0)
    book.release(request, 4.0)


def test_T7_blocking_is_what_opens_last(book: LimitBook, run: Run) -> None:
    slots, slow, fast = ConcurrencyLimit(1), RateLimit(1, 10), RateLimit(1, 1)
    (first,) = ask(book, run, 1, slots, fast, slow)
    second = book.request(run, "second", (fast, slots, slow), 0.0)
    third = book.request(run, "third", (fast,), 0.0)
    assert (second.blocking, third.blocking) == (slots, fast)
    assert book.due(run) is None  # no time helps before the slot is free
    book.release(first, 2.0)
    assert second.blocking is slow
    assert run.rearmed == [10.0]
    book.advance(10.0)
    assert run.told == [second]
    assert third.blocking is fast
    assert run.rearmed == [10.0, 11.0]


def test_T7_those_behind_are_never_looked_at(run: Run) -> None:
    class Counting(LimitBook):
        __slots__ = ("looks",)
        looks: int

        def _consider(self, request: LimitRequest, now: float) -> bool:
            self.looks += 1
            return super()._consider(request, now)

    book = Counting()
    book.looks = 0
    requests = ask(book, run, 10_001, RateLimit(100))
    assert book.looks == 10_000  # one each when it lines up
    for request in requests[5_000:9_000]:
        book.release(request, 0.0)
    assert book.looks == 14_000  # one each for who is first when somebody leaves
    drain(book, run)
    assert len(run.told) == 6_000
    assert book.looks <= 14_000 + 2 * 6_000 + 1  # the grant, and who is first then
    assert len(run.rearmed) == 6_000


def test_T7_who_is_first_is_rearmed_and_after_it_the_next(book: LimitBook) -> None:
    one, two, limit = Run(), Run(), RateLimit(1)
    ask(book, one, 1, limit)
    mine = book.request(one, "mine", (limit,), 0.0)
    book.request(two, "theirs", (limit,), 0.0)
    assert (one.rearmed, two.rearmed) == ([1.0], [])
    assert (book.due(one), book.due(two)) == (1.0, None)

    book.release(mine, 0.5)
    assert (one.rearmed, two.rearmed) == ([1.0], [1.0])
    assert (book.due(one), book.due(two)) == (None, 1.0)
    book.advance(1.0)
    assert (one.keys, two.keys) == ([], ["theirs"])


def test_T7_any_owner_may_advance_for_all(book: LimitBook) -> None:
    one, two = Run(), Run()
    ask(book, one, 3, RateLimit(1))
    ask(book, two, 3, RateLimit(2))
    book.advance(1.0)
    assert (one.keys, two.keys) == ([1], [1])
    assert (one.rearmed, two.rearmed) == ([1.0, 2.0], [0.5, 1.5])


def test_T7_owners_are_told_without_the_lock(book: LimitBook) -> None:
    limit = ConcurrencyLimit(1)

    class Curious(Run):
        def granted(self, request: LimitRequest) -> None:
            super().granted(request)
            assert book.in_use(limit) == 1
            book.release(request, 2.0)

    run = Curious()
    first, *_ = ask(book, run, 5, limit)
    book.release(first, 1.0)
    assert run.keys == [1, 2, 3, 4]
    assert book.in_use(limit) == 0


def test_T7_an_owner_that_raises_does_not_silence_the_others(book: LimitBook, run: Run) -> None:
    class Gone(Run):
        def granted(self, request: LimitRequest) -> None:
            raise RuntimeError("closed")

    limit = ConcurrencyLimit(1)
    pair = ConcurrencyLimit(2)
    held = book.request(run, "held", (limit, pair), 0.0)
    other = book.request(run, "other", (pair,), 0.0)
    book.request(Gone(), "gone", (limit,), 0.0)
    book.request(run, "here", (pair,), 0.0)
    with pytest.raises(RuntimeError, match="closed"):
        book.release(held, 1.0)
    assert run.keys == ["here"]
    book.release(other, 1.0)


def test_T7_a_rate_holds_over_runs_one_after_the_other(book: LimitBook, run: Run) -> None:
    limit = RateLimit(1)
    for second in range(3):
        book.attach([limit])
        request = book.request(run, second, (limit,), second)
        assert request.granted
        assert not book.request(run, "too early", (limit,), second).granted
        book.release(request, second)
        for waiting in list(book._ledgers[limit].line):
            book.release(waiting, second)
        book.detach([limit])
        assert len(book.snapshot()) == 1
    book.advance(4.0)
    book.attach([])
    assert book.snapshot() == []  # the bucket is full: nothing to remember


def test_T7_state_is_dropped_with_the_last_user(book: LimitBook, run: Run) -> None:
    limits = [ConcurrencyLimit(1), ResourcePool([1]), RateLimit(5)]
    book.attach(limits)
    book.attach(limits[:1])
    assert len(book.snapshot()) == 3
    book.detach(limits)
    assert [status["limit"] for status in book.snapshot()] == limits[:1]
    (held,) = ask(book, run, 1, limits[0])
    book.detach(limits[:1])
    assert book.in_use(limits[0]) == 1  # still held, so still known
    waits = book.request(run, "waits", (limits[0], limits[1]), 0.5)
    book.attach([])
    assert book.waiting(limits[1]) == 1  # waited for, though nobody holds it
    book.release(waits, 1.0)
    book.release(held, 1.0)
    book.attach([])
    assert book.snapshot() == []
    assert (book.in_use(limits[0]), book.waiting(limits[0])) == (0, 0)


def test_T7_runtimes_do_not_share_and_executors_of_one_do(run: Run) -> None:
    limit = ConcurrencyLimit(1)
    one, two = Runtime(), Runtime()
    assert one.limits.request(run, 0, (limit,), 0.0).granted
    assert two.limits.request(run, 0, (limit,), 0.0).granted
    assert not one.limits.request(Run(), 0, (limit,), 0.0).granted


def test_T7_snapshot_says_what_a_live_page_needs(book: LimitBook, run: Run) -> None:
    slots, rate, pool, open_pool = (
        ConcurrencyLimit(2, "slots"), RateLimit(2, burst=3, name="rate"), ResourcePool([1]), ResourcePool(object)
    )  # fmt: skip
    book.attach([slots, rate, pool, open_pool])
    assert [status["next_permit_at"] for status in book.snapshot()] == [None] * 4
    ask(book, run, 4, slots, rate, now=7.0)
    ask(book, run, 1, pool, now=7.0)

    def shown(
        limit: Limit, kind: str, capacity: int | None, in_use: int, waiting: int, at: float | None
    ) -> dict[str, Any]:
        return {
            "limit": limit, "name": limit.name, "kind": kind, "capacity": capacity, "in_use": in_use,
            "waiting": waiting, "next_permit_at": at,
        }  # fmt: skip

    assert book.snapshot() == [
        shown(slots, "concurrency", 2, 2, 2, None),
        shown(rate, "rate", 3, 2, 2, 7.0),
        shown(pool, "pool", 1, 1, 0, None),
        shown(open_pool, "pool", None, 0, 0, None),
    ]
