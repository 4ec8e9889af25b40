"""Histograms as plain lists, cheap to count into from the hot path and safe to read from a scrape thread.

A *row* is one series: `[sum, count of bucket 0, ..., count of bucket n]`, the last bucket being `+Inf`. All rows of a
process share one tuple of bounds with minus infinity in front, so that

    row[bisect_left(search, value)] += 1
    row[0] += value

counts a value into the first bucket whose upper bound is >= value, without an offset to add.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise
from operator import add
from typing import Final

from obsdag.errors import ConfigError

__all__ = ["DEFAULT_BUCKETS", "Buckets", "Row"]

DEFAULT_BUCKETS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Twelve upper bounds in seconds, 1 ms to 300 s, about three to each other: two for every power of ten."""

Row = list[float]


class Buckets:
    """The upper bounds of all histograms, in seconds, ascending.

    bounds: those given (None: DEFAULT_BUCKETS). search: what `bisect_left` is called with. labels: the `le` of every
    bucket, `+Inf` last. Raises ConfigError unless the bounds are finite, positive and ascending.
    """

    __slots__ = ("bounds", "labels", "search")

    def __init__(self, bounds: Iterable[float] | None = None) -> None:
        self.bounds = DEFAULT_BUCKETS if bounds is None else _checked(bounds)
        self.search = (-math.inf, *self.bounds)
        self.labels = (*(repr(bound) for bound in self.bounds), "+Inf")

    def row(self) -> Row:
        """A new series, all zero."""
        return [0.0] + [0] * (len(self.bounds) + 1)

    def place(self, value: float) -> int:
        """The number of the bucket that `value` falls into, from 0."""
        return bisect_left(self.search, value) - 1

    def observe(self, row: Row, value: float) -> None:
        """Counts a value into a row; the hot path does this in place."""
        row[bisect_left(self.search, value)] += 1
        row[0] += value

    @staticmethod
    def add(into: Row, row: Row) -> None:
        """Adds a row to another."""
        into[:] = map(add, into, row)

    @staticmethod
    def count(row: Row) -> int:
        """How many values a row has counted."""
        return int(sum(row[1:]))


def _checked(bounds: Iterable[float]) -> tuple[float, ...]:
    found = tuple(bounds)
    numbers = all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in found)
    if not found or not numbers or not all(math.isfinite(bound) and bound > 0 for bound in found):
        raise ConfigError(f"buckets must be numbers of seconds > 0, without infinity, not {found!r}")
    if any(low >= high for low, high in pairwise(found)):
        raise ConfigError(f"buckets must ascend, not {found!r}")
    return tuple(float(bound) for bound in found)
