"""The context queue (three lanes, SEMANTICS E4) and the timer heap. Plain data; a clock value is handed in.

Lanes: a context that goes on is taken last in, first out, before anything else; a newly entered one first in, first
out; the next item of a loop or map first in, first out, last. So work in flight is finished before new work is taken
in.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol

from obsdag.core.records import Timer

if TYPE_CHECKING:
    from collections.abc import Callable

    from obsdag.context import Context, LoopContext

__all__ = ["CONTINUING", "IDLE", "LOOP", "NEW", "QUEUED", "VISITED", "ContextQueue", "Due", "TimerHeap"]

CONTINUING: Final = 0
NEW: Final = 1
LOOP: Final = 2

# Where a context is (`Context._place`): at most one place in the queue and one driving worker (T2).
IDLE: Final = 0
QUEUED: Final = 1
VISITED: Final = 2


class ContextQueue:
    """Three lanes. A context that ends while it is queued is passed over when its turn comes (`forget` counts it)."""

    __slots__ = ("_continuing", "_new", "_stale", "loop", "size")

    def __init__(self) -> None:
        self._continuing: list[Context] = []
        self._new: deque[Context] = deque()
        self.loop: deque[LoopContext] = deque()
        self._stale = [0, 0]
        self.size = 0  # contexts in the first two lanes

    def put(self, context: Context, lane: int) -> None:
        """Gives a context its place in the continuing or the new lane."""
        context._place = QUEUED
        context._lane = lane
        self.size += 1
        if lane == CONTINUING:
            self._continuing.append(context)
        else:
            self._new.append(context)

    def take(self) -> Context | None:
        """The context whose turn it is, without its place; None when both lanes are empty."""
        while self._continuing:
            context = self._continuing.pop()
            if context._place == QUEUED:
                self.size -= 1
                return context
            self._stale[CONTINUING] -= 1
        while self._new:
            context = self._new.popleft()
            if context._place == QUEUED:
                self.size -= 1
                return context
            self._stale[NEW] -= 1
        return None

    def forget(self, context: Context) -> None:
        """Takes a queued context's place away; its entry is cleared now or, cheaply, when its turn comes."""
        context._place = IDLE
        self.size -= 1
        lane = context._lane
        self._stale[lane] += 1
        entries: Any = self._continuing if lane == CONTINUING else self._new
        if self._stale[lane] > 64 and self._stale[lane] * 2 > len(entries):
            kept = [entry for entry in entries if entry._place == QUEUED and entry._lane == lane]
            entries.clear()
            entries.extend(reversed(dict.fromkeys(reversed(kept))))  # who came back has an older entry, too
            self._stale[lane] = 0

    def __bool__(self) -> bool:
        return self.size > 0

    def lengths(self) -> tuple[int, int, int]:
        """Contexts in the continuing and new lanes, pulls in the loop lane."""
        return len(self._continuing) - self._stale[0], len(self._new) - self._stale[1], len(self.loop)


class Due(Protocol):
    """Something with a time. due: seconds on the run's clock, None as soon as that is not wanted any more."""

    due: float | None

    def fire(self, now: float) -> None:
        """What is to be done when the time has come."""


class TimerHeap:
    """Timers by due time; equal times fire in the order they were set. `armed` counts those that are still wanted.

    An entry is dead when its timer was disarmed or armed again: what that is due at is another object then.
    """

    __slots__ = ("_heap", "_latest", "_sequence", "armed")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Due]] = []
        self._sequence = 0
        self._latest = -math.inf
        self.armed = 0

    def set(self, when: float, action: Callable[[Any, float], None], argument: Any) -> Timer:
        """Arms a timer: `action(argument, now)` is due at `when`."""
        timer = Timer(when, action, argument)
        self.arm(timer, when)
        return timer

    def arm(self, timer: Due, when: float) -> None:
        """Arms one that is not armed."""
        timer.due = when
        if when > self._latest:
            self._latest = when
        else:  # there may be an equal one; else no number of its own is needed, which is 32 bytes
            self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, timer))
        self.armed += 1

    def cancel(self, timer: Due) -> None:
        """Disarms a timer; the heap is rebuilt when most of it is dead, so that it stays in proportion."""
        if timer.due is not None:
            timer.due = None
            self.armed -= 1
            if len(self._heap) > 64 and self.armed * 2 < len(self._heap):
                self._heap = [entry for entry in self._heap if entry[2].due is entry[0]]
                heapq.heapify(self._heap)

    def next_due(self) -> float | None:
        """When the next timer is due, None if none is armed."""
        while self._heap and self._heap[0][2].due is not self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def soonest(self) -> float | None:
        """As `next_due`, from any thread: changes nothing."""
        return min((when for when, _, timer in list(self._heap) if timer.due is when), default=None)

    def pop_due(self, now: float) -> Due | None:
        """The next timer that is due at `now`, disarmed; None if none is."""
        due = self.next_due()
        if due is None or due > now:
            return None
        timer = heapq.heappop(self._heap)[2]
        timer.due = None
        self.armed -= 1
        return timer
