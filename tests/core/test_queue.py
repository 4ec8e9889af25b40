"""The lanes (E4): who loses the place and gets another is in the queue once, in the newest place."""

from __future__ import annotations

import pytest

from obsdag import Context
from obsdag.core.queue import CONTINUING, NEW, ContextQueue


@pytest.mark.parametrize("lane", [CONTINUING, NEW])
@pytest.mark.parametrize("rounds", [1, 3])
def test_E4_those_who_come_back_are_taken_once_and_the_lengths_stay_true(lane: int, rounds: int) -> None:
    queue = ContextQueue()
    contexts = [Context() for _ in range(200)]
    for context in contexts:
        queue.put(context, lane)
    for _ in range(rounds):
        for context in contexts:
            queue.forget(context)
            queue.put(context, CONTINUING)

    assert queue.lengths() == (200, 0, 0)
    taken = []
    while (context := queue.take()) is not None:
        context._place = 0
        taken.append(context)
    assert taken == contexts[::-1]
    assert queue.lengths() == (0, 0, 0)


def test_E4_a_place_that_was_lost_is_passed_over_and_counts_no_more() -> None:
    queue = ContextQueue()
    first, second = Context(), Context()
    for context in (first, second):
        queue.put(context, CONTINUING)
    queue.forget(second)

    assert queue.lengths() == (1, 0, 0)
    assert queue.take() is first
    assert queue.lengths() == (0, 0, 0)
