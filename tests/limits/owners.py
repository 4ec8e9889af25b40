"""Owners of requests for tests, and the shortest ways to ask and to let time pass."""

from __future__ import annotations

import math
from fractions import Fraction

from obsdag.limits import Limit, LimitBook, LimitRequest


class Run:
    """An owner that only notes what it is told."""

    def __init__(self) -> None:
        self.told: list[LimitRequest] = []
        self.rearmed: list[float] = []

    def granted(self, request: LimitRequest) -> None:
        self.told.append(request)

    def rearm(self, at: float) -> None:
        self.rearmed.append(at)

    @property
    def keys(self) -> list[object]:
        return [request.key for request in self.told]


def ask(book: LimitBook, run: Run, count: int, *limits: Limit, now: float = 0.0) -> list[LimitRequest]:
    """`count` requests with the keys 0, 1, ..."""
    return [book.request(run, key, limits, now) for key in range(count)]


def drain(book: LimitBook, *runs: Run) -> list[float]:
    """Advance from one due time to the next until nobody waits for a time; those times."""
    times = []
    while due := [at for run in runs if (at := book.due(run)) is not None]:
        times.append(min(due))
        book.advance(times[-1])
    return times


def burst_of(times: list[float], spacing: Fraction) -> int:
    """The smallest burst with which these times keep a rate: the most permits in a window beyond length / spacing."""
    exact = [Fraction(at) for at in times]
    return max(
        (
            math.ceil(j - i + 1 - (exact[j] - exact[i]) / spacing)
            for i in range(len(exact))
            for j in range(i, len(exact))
        ),
        default=0,
    )
