"""What a request that waits weighs, and that a line keeps nothing of those that have left it."""

from __future__ import annotations

import tracemalloc

from obsdag.limits import ConcurrencyLimit, LimitBook
from tests.limits.owners import Run, ask


def test_a_waiting_request_is_small() -> None:
    """Its own 12 fields, its number and its place in the line: no dict, no tuple of its own."""
    book, run, limit, number = LimitBook(), Run(), ConcurrencyLimit(1), 2_000
    ask(book, run, 10, limit)
    tracemalloc.start()
    try:
        waiting = [book.request(run, "key", (limit,), 1.0) for _ in range(number)]
        held_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(waiting) == number
    assert held_bytes / number < 260, f"{held_bytes / number:.0f} bytes"  # 56 of them: the caller's tuple and list


def test_T7_those_that_leave_in_the_middle_of_a_line_are_forgotten() -> None:
    book, run, limit = LimitBook(), Run(), ConcurrencyLimit(1)
    first, *waiting = ask(book, run, 1_000, limit)
    for request in waiting[1:-1]:
        book.release(request, 1.0)
    assert book.waiting(limit) == 2
    assert len(book._ledgers[limit].line) <= 65
    book.release(first, 2.0)
    book.release(waiting[0], 3.0)
    assert [request.granted for request in (first, waiting[0], waiting[-1])] == [False, False, True]
    assert run.told == [waiting[0], waiting[-1]]
    assert book.waiting(limit) == 0
    assert not book._ledgers[limit].line
