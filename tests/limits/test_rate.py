"""Rates (SEMANTICS T7): exact times, bursts, clocks that jump, permits given back unused."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdag.limits import LimitBook, RateLimit
from tests.limits.owners import Run, ask, burst_of, drain


@pytest.mark.parametrize("start", [0.0, 12_345.678, 1e9])
@pytest.mark.parametrize(("n", "per"), [(3, 0.1), (7, 1.0), (10, 1.0), (1, 0.3), (1000, 60)])
def test_T7_ten_thousand_permits_come_at_their_computed_times(n: int, per: float, start: float) -> None:
    book, run = LimitBook(), Run()
    ask(book, run, 10_001, RateLimit(n, per), now=start)
    times = drain(book, run)

    assert times == [start + k * per / n for k in range(1, 10_001)]  # each wake-up granted, and nothing has drifted
    assert run.keys == list(range(1, 10_001))
    assert [request.granted_at for request in run.told] == times
    assert run.rearmed == times  # one timer for each permit, none for those behind


def test_T7_burst_from_a_full_bucket_then_spacing(book: LimitBook, run: Run) -> None:
    limit = RateLimit(4, per=2.0, burst=3)
    first = ask(book, run, 6, limit, now=100.0)
    assert [request.granted for request in first] == [True] * 3 + [False] * 3
    assert drain(book, run) == [100.5, 101.0, 101.5]

    second = ask(book, run, 3, limit, now=102.5)  # 1 s after the last permit: two are there again
    assert [request.granted for request in second] == [True, True, False]
    assert book.due(run) == 103.0


def test_T7_without_a_burst_a_late_wake_up_is_not_made_up_for(book: LimitBook, run: Run) -> None:
    ask(book, run, 4, RateLimit(1))
    book.advance(5.25)
    assert run.keys == [1]
    assert book.due(run) == 6.25


def test_T7_an_early_wake_up_grants_nothing_and_due_tells_again(book: LimitBook, run: Run) -> None:
    ask(book, run, 2, RateLimit(3))
    book.advance(math.nextafter(1 / 3, 0))
    assert run.told == []
    assert book.due(run) == 1 / 3
    book.advance(1 / 3)
    assert run.keys == [1]
    assert book.due(run) is None


@pytest.mark.parametrize("burst", [None, 1, 5])
def test_T7_a_clock_that_jumps_far_ahead_gives_one_burst(book: LimitBook, run: Run, burst: int | None) -> None:
    ask(book, run, 100, RateLimit(10, burst=burst))
    before = len(run.told)
    book.advance(1e6)
    assert len(run.told) - before == (burst or 1)
    book.advance(1e6)
    assert len(run.told) - before == (burst or 1)
    assert book.due(run) == pytest.approx(1e6 + 0.1)


@pytest.mark.parametrize("burst", [1, 3])
@pytest.mark.parametrize("back_to", [0.0, 9_000.0, 9_999.5])
@pytest.mark.parametrize("noticed_by", ["advance", "request", "release"])
def test_T7_a_clock_set_back_neither_hangs_nor_bursts(
    book: LimitBook, run: Run, burst: int, back_to: float, noticed_by: str
) -> None:
    limit = RateLimit(2, burst=burst)
    first, *_ = ask(book, run, burst + 10, limit, now=10_000.0)
    book.advance(10_000.5)
    told = len(run.told)

    if noticed_by == "advance":
        book.advance(back_to)
    elif noticed_by == "request":
        book.request(run, "late", (limit,), back_to)
    else:
        book.release(first, back_to)
    assert len(run.told) == told
    times = drain(book, run)
    assert times[0] <= back_to + 0.5 * burst + 1.0  # the second that is taken for a race of threads
    assert len(run.told) == 10 + (noticed_by == "request")
    assert burst_of(times, Fraction(1, 2)) == 1


def test_T7_times_of_threads_that_race_for_the_lock_do_not_shift_the_rate(book: LimitBook, run: Run) -> None:
    ask(book, run, 2, limit := RateLimit(1), now=10.0)
    book.advance(9.25)
    book.request(run, 2, (limit,), 9.5)
    assert book.due(run) == 11.0
    book.advance(10.9)
    assert run.told == []


def test_T7_who_loses_the_race_for_the_lock_is_not_dated_back(book: LimitBook, run: Run) -> None:
    """A thread read 1.0 and comes after one that read 1.5. Dated 1.0, its permit would let the next come at 2.0."""
    limit = RateLimit(1)
    ask(book, run, 2, limit)
    book.request(run, 2, (limit,), 1.5)
    book.advance(1.0)
    assert run.told[0].granted_at == 1.5
    assert book.due(run) == 2.5


@given(
    n=st.integers(1, 7),
    burst=st.none() | st.integers(1, 5),
    steps=st.lists(st.tuples(st.floats(-3, 3), st.booleans()), max_size=60),
)
@settings(deadline=None)
def test_T7_no_window_exceeds_the_rate_whatever_the_clock_does(
    n: int, burst: int | None, steps: list[tuple[float, bool]]
) -> None:
    """Measured on the time that really passed: a clock set back by some seconds has gone on in the meantime."""
    book, run, limit = LimitBook(), Run(), RateLimit(n, 1.0, burst)
    now, latest, passed, granted = 1_000.0, 1_000.0, 0.0, []
    book.advance(now)  # so that it knows the time from which `passed` counts
    for step, by_advance in steps:
        now += step
        passed += max(now - latest, 0.0)
        latest = now if now > latest or now < latest - 1 else latest
        if by_advance:
            told = len(run.told)
            book.advance(now)
            granted += [passed] * (len(run.told) - told)
        else:
            granted += [passed] * book.request(run, 0, (limit,), now).granted
    for i in range(len(granted)):
        for j in range(i, len(granted)):
            assert j - i + 1 <= (burst or 1) + (granted[j] - granted[i]) * n + 1e-6


def test_T7_an_unused_permit_goes_to_the_next_in_line_at_once(book: LimitBook, run: Run) -> None:
    ask(book, run, 2, limit := RateLimit(1))
    book.advance(1.0)
    book.request(run, 2, (limit,), 1.25)
    book.release(run.told[0], 1.5, unused=True)
    assert run.keys == [1, 2]
    assert run.told[1].granted_at == 1.5
    assert book.request(run, 3, (limit,), 1.5).granted is False
    assert book.due(run) == 2.5


def test_T7_a_used_permit_does_not_come_back(book: LimitBook, run: Run) -> None:
    held, _ = ask(book, run, 2, RateLimit(1))
    book.release(held, 0.5)
    assert run.told == []
    assert book.due(run) == 1.0


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 4, 0, 3, 1)])
def test_T7_a_burst_given_back_unused_is_whole_again(book: LimitBook, run: Run, order: tuple[int, ...]) -> None:
    held = ask(book, run, 5, limit := RateLimit(1, burst=5))
    for index in order:
        book.release(held[index], 0.0, unused=True)
    assert [request.granted for request in ask(book, run, 6, limit)] == [True] * 5 + [False]


def test_T7_an_unused_permit_below_a_used_one_is_lost(book: LimitBook, run: Run) -> None:
    """Two permits of a bucket of two, one at 0 s and one at 1 s: taking the first back must not allow two at 1 s."""
    limit = RateLimit(1, burst=2)
    unused, _ = ask(book, run, 2, limit)
    book.request(run, "used", (limit,), 1.0)
    book.release(unused, 1.0, unused=True)
    assert book.request(run, "next", (limit,), 1.0).granted is False
    assert book.due(run) == 2.0


def test_T7_a_bucket_is_whole_again_when_all_was_given_back(book: LimitBook, run: Run) -> None:
    limit = RateLimit(1, burst=2)
    held = [book.request(run, 0, (limit,), at) for at in (0.0, 0.0, 1.0, 2.0, 3.0, 4.0)]
    assert all(request.granted for request in held)
    for request in held:  # more than are remembered one by one
        book.release(request, 4.0, unused=True)
    assert [request.granted for request in ask(book, run, 3, limit, now=4.0)] == [True, True, False]


def test_T7_unused_permits_take_no_memory_for_ever(book: LimitBook, run: Run) -> None:
    limit = RateLimit(1, burst=2)
    before, _ = ask(book, run, 2, limit)
    for second in range(1, 1_000):
        request = book.request(run, 0, (limit,), second)
        assert request.granted
        book.release(before, second, unused=True)  # below one that is still held
        before = request
    assert len(book._ledgers[limit]._returned) <= 4  # type: ignore[attr-defined]
