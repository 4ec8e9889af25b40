"""The lanes (E4): who loses the place and gets another is in the queue once, in the newest place. And the timers."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from obsdag import Context
from obsdag.core.queue import CONTINUING, IDLE, NEW, ContextQueue, TimerHeap


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


class LanesAgainstLists(RuleBasedStateMachine):
    """Two lists, right by reading: who goes on is taken from the end of one, who is new from the start of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = ContextQueue()
        self.continuing: list[Context] = []
        self.new: list[Context] = []
        self.idle: list[Context] = []

    @rule(count=st.integers(1, 70), lane=st.sampled_from([CONTINUING, NEW]))
    def come(self, count: int, lane: int) -> None:
        for _ in range(count):
            context = Context()
            self.queue.put(context, lane)
            (self.continuing if lane == CONTINUING else self.new).append(context)

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        context = self.idle.pop(data.draw(st.integers(0, len(self.idle) - 1)))
        self.queue.put(context, CONTINUING)
        self.continuing.append(context)

    @precondition(lambda self: self.continuing or self.new)
    @rule(data=st.data(), share=st.integers(1, 8))
    def lose_their_places(self, data: st.DataObject, share: int) -> None:
        first = data.draw(st.integers(0, share - 1))
        for context in [*self.continuing, *self.new][first::share]:
            self.queue.forget(context)
            (self.continuing if context in self.continuing else self.new).remove(context)
            self.idle.append(context)

    @rule(count=st.integers(1, 20))
    def are_taken(self, count: int) -> None:
        for _ in range(count):
            expected = self.continuing.pop() if self.continuing else self.new.pop(0) if self.new else None
            taken = self.queue.take()
            assert taken is expected
            if taken is not None:
                taken._place = IDLE
                self.idle.append(taken)

    @invariant()
    def has_those_lengths(self) -> None:
        assert self.queue.lengths() == (len(self.continuing), len(self.new), 0)
        assert self.queue.size == len(self.continuing) + len(self.new)
        assert bool(self.queue) == bool(self.continuing or self.new)


class Alarm:
    """Something that can be armed again, unlike a `Timer`."""

    due: float | None = None

    def fire(self, now: float) -> None:
        """Nobody calls it here."""


class TimersAgainstList(RuleBasedStateMachine):
    """A list of those that are armed, with their times, in the order in which they were armed."""

    def __init__(self) -> None:
        super().__init__()
        self.heap = TimerHeap()
        self.armed: list[tuple[float, Alarm]] = []
        self.idle: list[Alarm] = []
        self.now = 0.0

    @rule(delays=st.lists(st.integers(0, 9), min_size=1, max_size=40))
    def arm(self, delays: list[int]) -> None:
        for delay in delays:
            alarm = self.idle.pop() if self.idle else Alarm()
            self.heap.arm(alarm, self.now + delay)
            self.armed.append((self.now + delay, alarm))

    @precondition(lambda self: self.armed)
    @rule(data=st.data(), share=st.integers(1, 4))
    def cancel(self, data: st.DataObject, share: int) -> None:
        for when, alarm in self.armed[data.draw(st.integers(0, share - 1)) :: share]:
            self.heap.cancel(alarm)
            self.heap.cancel(alarm)
            self.armed.remove((when, alarm))
            self.idle.append(alarm)

    @rule(passed=st.integers(0, 5))
    def fire(self, passed: int) -> None:
        self.now += passed
        due = sorted((each for each in self.armed if each[0] <= self.now), key=lambda each: each[0])
        for each in due:
            assert self.heap.pop_due(self.now) is each[1]
            assert each[1].due is None
            self.armed.remove(each)
            self.idle.append(each[1])
        assert self.heap.pop_due(self.now) is None

    @invariant()
    def knows_the_next(self) -> None:
        assert self.heap.armed == len(self.armed)
        soonest = min((when for when, _ in self.armed), default=None)
        assert self.heap.soonest() == soonest
        assert self.heap.next_due() == soonest


LanesAgainstLists.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLanesAgainstLists = LanesAgainstLists.TestCase
TimersAgainstList.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestTimersAgainstList = TimersAgainstList.TestCase
