"""Pools (SEMANTICS T7, T8): one item each, made when needed, given back on every way out, closed at the end."""

from __future__ import annotations

from obsdag.limits import MAKE, ConcurrencyLimit, LimitBook, ResourcePool
from tests.limits.owners import Run, ask


def test_T7_each_gets_an_item_of_its_own(book: LimitBook, run: Run) -> None:
    pool = ResourcePool(["a", "b"])
    first, second, third = ask(book, run, 3, pool)
    assert (first.resources, second.resources, third.resources) == ({pool: "a"}, {pool: "b"}, {})
    book.release(second, 1.0)
    assert second.resources == {}
    assert third.resources == {pool: "b"}


def test_T7_items_are_made_when_needed_and_used_again(book: LimitBook, run: Run) -> None:
    pool = ResourcePool(object, size=2)
    book.attach([pool])
    first, second, third = ask(book, run, 3, pool)
    assert (first.resources, second.resources) == ({pool: MAKE}, {pool: MAKE})
    assert repr(MAKE) == "MAKE"
    assert not third.granted
    assert book.resource_made(first, pool, "made", 0.5)
    assert first.resources == {pool: "made"}
    book.release(first, 1.0)
    assert third.resources == {pool: "made"}
    book.release(third, 2.0)
    assert book.request(run, "again", (pool,), 3.0).resources == {pool: "made"}


def test_T7_an_unbounded_pool_makes_only_when_none_is_idle(book: LimitBook, run: Run) -> None:
    pool = ResourcePool(object)
    book.attach([pool])
    requests = ask(book, run, 100, pool)
    assert all(request.resources[pool] is MAKE for request in requests)
    book.resource_made(requests[7], pool, "made", 0.0)
    book.release(requests[7], 1.0)
    assert [request.resources[pool] for request in ask(book, run, 2, pool)] == ["made", MAKE]


def test_T8_a_resource_that_could_not_be_made_leaves_its_place(book: LimitBook, run: Run) -> None:
    pool, slots = ResourcePool(object, size=1), ConcurrencyLimit(5)
    first = book.request(run, "first", (slots, pool), 0.0)
    second = book.request(run, "second", (pool,), 0.0)
    book.resource_failed(first, pool, 1.0)
    book.resource_failed(first, pool, 1.0)
    assert run.told == [second]
    assert second.resources == {pool: MAKE}
    assert (book.in_use(pool), book.in_use(slots)) == (1, 1)  # the rest stays with `first` until it is released
    book.release(first, 2.0)
    assert (book.in_use(pool), book.in_use(slots)) == (1, 0)


def test_T8_released_before_it_was_made(book: LimitBook, run: Run) -> None:
    pool = ResourcePool(object, size=2)
    book.attach([pool])
    early, late = ask(book, run, 2, pool)
    book.release(early, 1.0, unused=True)
    book.release(late, 1.0, unused=True)
    assert book.in_use(pool) == 0
    assert book.resource_made(early, pool, "kept", 2.0)
    holder = book.request(run, "holder", (pool,), 3.0)
    other = book.request(run, "other", (pool,), 3.0)
    assert (holder.resources, other.resources) == ({pool: "kept"}, {pool: MAKE})
    assert not book.resource_made(late, pool, "too many", 4.0)  # the caller closes it
    assert book.detach([pool]) == []
    assert not book.resource_made(early, pool, "nobody is there", 5.0)


def test_T7_an_item_that_came_late_goes_to_who_waits(book: LimitBook, run: Run) -> None:
    pool, gate = ResourcePool(object, size=1), ConcurrencyLimit(1)
    book.attach([pool])
    (holds_gate,) = ask(book, run, 1, gate)
    gone = book.request(run, "gone", (pool,), 0.0)
    waits = book.request(run, "waits", (gate, pool), 0.0)
    book.release(gone, 1.0)
    assert book.resource_made(gone, pool, "late", 2.0)
    book.release(holds_gate, 3.0)
    assert waits.resources == {pool: "late"}


def test_T7_the_last_run_gets_the_items_to_close(book: LimitBook, run: Run) -> None:
    closed: list[str] = []
    pool = ResourcePool(object, closed.append)
    book.attach([pool])
    book.attach([pool])
    requests = ask(book, run, 2, pool)
    for name, request in zip("ab", requests, strict=True):
        book.resource_made(request, pool, name, 0.0)
    book.release(requests[0], 1.0)
    assert book.detach([pool]) == []
    assert book.detach([pool]) == [(closed.append, "a")]
    assert book.detach([pool]) == []
    assert book.release(requests[1], 2.0) == [(closed.append, "b")]  # an execution that outlived its run
    assert book.release(requests[1], 2.0) == ()
    book.attach([])
    assert book.snapshot() == []


def test_T7_a_run_that_comes_while_an_item_is_still_out(book: LimitBook, run: Run) -> None:
    closed: list[str] = []
    pool = ResourcePool(object, closed.append, size=2)
    book.attach([pool])
    done, out = ask(book, run, 2, pool)
    book.resource_made(done, pool, "done", 0.0)
    book.release(done, 1.0)
    assert book.detach([pool]) == [(closed.append, "done")]
    assert not book.resource_made(done, pool, "nobody is there", 1.0)

    book.attach([pool])
    assert [request.granted for request in ask(book, run, 2, pool)] == [True, False]  # one of two places is still taken
    book.release(out, 2.0)
    assert run.keys == [1]


def test_T7_ready_items_are_closed_too_or_stay(book: LimitBook, run: Run) -> None:
    closed: list[int] = []
    mine, theirs = ResourcePool([1, 2], closed.append), ResourcePool(iter([3]))
    book.attach([mine, theirs])
    assert book.detach([mine, theirs]) == [(closed.append, 1), (closed.append, 2)]
    book.attach([theirs])
    assert book.request(run, 0, (theirs,), 0.0).resources == {theirs: 3}


def test_T7_without_a_run_an_item_goes_to_who_waits_before_it_is_closed(book: LimitBook, run: Run) -> None:
    closed: list[int] = []
    pool = ResourcePool([1], closed.append)
    first, second = ask(book, run, 2, pool)
    assert book.release(first, 1.0) == ()
    assert second.resources == {pool: 1}
    assert book.release(second, 1.0) == [(closed.append, 1)]
