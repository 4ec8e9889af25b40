"""The closed sets: states, lanes, outcomes, ways an execution ends (SEMANTICS C9, E4; TELEMETRY section 4).

Plain integers and strings, because they are compared on the hot path; the tuples give their public names by index.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final

__all__ = [
    "ENTRY_KINDS",
    "EXECUTION_OUTCOMES",
    "GC_REASONS",
    "LANES",
    "OUTCOMES",
    "STATES",
    "SUCCESSES",
    "ContextPriority",
    "State",
]


class State(IntEnum):
    """Where a living context is; it counts in the first that applies. One enumeration for gauge, ledger, wait spans,
    page.
    """

    RUNNING = 0
    POOL_WAIT = 1
    QUEUED = 2
    SERVICE_WAIT = 3
    LIMIT_WAIT = 4
    RETRY_WAIT = 5
    ROOM_WAIT = 6
    JOIN_WAIT = 7
    LENT = 8
    SOURCE_WAIT = 9
    FROZEN = 10
    DISCARDED = 11


STATES: Final = tuple(state.name.lower() for state in State)


class ContextPriority(Enum):
    """The lanes of the context queue under the seed's names (E4): LIFO before FIFO_HIGH before FIFO_LOW."""

    LIFO = 0
    FIFO_HIGH = 1
    FIFO_LOW = 2


LANES: Final = ("continuing", "new", "loop")
OUTCOMES: Final = ("output", "split", "merged", "dropped", "failed", "cancelled", "stalled")
SUCCESSES: Final = frozenset({"output", "split", "merged"})
ENTRY_KINDS: Final = ("input", "made", "child")
EXECUTION_OUTCOMES: Final = ("success", "error", "timeout", "cancelled", "interrupted")
GC_REASONS: Final = ("discarded", "emptied", "destroyed", "replaced", "spread", "cascade")
