"""Limits as they are defined (SEMANTICS T6, T7): validation, identity."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest

from obsdag.errors import ConfigError
from obsdag.limits import ConcurrencyLimit, Limit, LimitBook, RateLimit, ResourcePool
from obsdag.tasks.base import TaskConfig
from tests.limits.owners import Run


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RateLimit(0), r"RateLimit\.n must be a whole number >= 1, not 0"),
        (lambda: RateLimit(1.5), r"RateLimit\.n"),  # type: ignore[arg-type]
        (lambda: RateLimit(True), r"RateLimit\.n"),
        (lambda: RateLimit(1, 0), r"RateLimit\.per must be a number of seconds > 0, not 0"),
        (lambda: RateLimit(1, math.inf), r"RateLimit\.per"),
        (lambda: RateLimit(1, math.nan), r"RateLimit\.per"),
        (lambda: RateLimit(1, "1"), r"RateLimit\.per"),  # type: ignore[arg-type]
        (lambda: RateLimit(1, burst=0), r"RateLimit\.burst"),
        (lambda: RateLimit(1, name=""), r"RateLimit\.name must be a non-empty text or None, not ''"),
        (lambda: ConcurrencyLimit(-1), r"ConcurrencyLimit\.n"),
        (lambda: ConcurrencyLimit(1, 7), r"ConcurrencyLimit\.name"),  # type: ignore[arg-type]
        (lambda: ResourcePool([]), r"ResourcePool\.items_or_factory has no items"),
        (lambda: ResourcePool(None), r"ResourcePool\.items_or_factory .* not a NoneType"),  # type: ignore[arg-type]
        (lambda: ResourcePool([1], close=3), r"ResourcePool\.close"),  # type: ignore[arg-type]
        (lambda: ResourcePool([1], name=""), r"ResourcePool\.name"),
        (lambda: ResourcePool(object, size=0), r"ResourcePool\.size must be a whole number >= 1"),
        (lambda: ResourcePool([1], size=1), r"ResourcePool\.size is for a factory"),
    ],
)
def test_T6_limits_refuse_bad_values_by_name(make: Callable[[], Limit], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_T6_an_address_given_for_items_is_not_printed() -> None:
    with pytest.raises(ConfigError, match="not a str") as caught:
        ResourcePool("db://user:secret@host")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("limit", [RateLimit(1), ConcurrencyLimit(1), ResourcePool([1])], ids=repr)
def test_T7_definitions_are_immutable_and_themselves_only(limit: Any) -> None:
    for name in limit.__slots__:
        with pytest.raises(AttributeError):
            setattr(limit, name, 2)
    assert limit != type(limit)([1] if isinstance(limit, ResourcePool) else 1)
    assert copy.copy(limit) is limit
    assert copy.deepcopy([limit]) == [limit]
    assert {limit: 1}[limit] == 1
    assert " at 0x" not in repr(limit)
    assert TaskConfig(limiter=limit).limits == (limit,)


def test_T7_the_book_refuses_what_it_does_not_know(book: LimitBook, run: Run) -> None:
    class Mine(Limit):
        name = None

    with pytest.raises(ConfigError, match="a limit must be a RateLimit, ConcurrencyLimit or ResourcePool"):
        book.request(run, 0, (Mine(),), 0.0)
    known = ConcurrencyLimit(1)
    with pytest.raises(ConfigError):
        book.attach([known, Mine()])
    book.attach([])  # the lock is free, and the failed call has left nothing in use
    assert book.snapshot() == []
