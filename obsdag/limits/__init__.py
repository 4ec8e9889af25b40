r"""Limits: how often, how many at once, with which resource (SEMANTICS T7, T8). Decisions only: nothing here sleeps.

`definitions` is what users write, compared by identity. The state is in a `LimitBook` (`book`), one per `Runtime`, as
one *ledger* per limit (`ledgers`). Who wants permits is a *request* (`requests`), in one of three states:

    waiting --(every permit is there, first in every line)--> held --(release)--> done
        \--------------------------(release)-----------------------------------^

Invariants, kept under the book's one lock:

- A request holds all of its permits or none, so two tasks that ask in different order cannot block each other.
- A waiting request stands in the line of each of its limits, in order of asking, and only who is first in all of its
  lines is granted. So the oldest request waits for nothing but a release or the clock, and nobody starves.
- Only who is first is ever looked at, so those behind cost nothing; leaving the middle of a line is O(1).
- Owners are told after the lock is let go: they may live in other threads and event loops.

Time is handed in as `now`: seconds of one monotonic clock for the whole book.
"""

from obsdag.limits.book import LimitBook
from obsdag.limits.definitions import MAKE, ConcurrencyLimit, Limit, RateLimit, ResourcePool
from obsdag.limits.requests import Closing, LimitOwner, LimitRequest, LimitStatus

__all__ = [
    "MAKE",
    "Closing",
    "ConcurrencyLimit",
    "Limit",
    "LimitBook",
    "LimitOwner",
    "LimitRequest",
    "LimitStatus",
    "RateLimit",
    "ResourcePool",
]
