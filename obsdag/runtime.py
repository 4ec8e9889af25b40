"""What executors share: a `Runtime` counts living contexts and holds the state of limits.

Executors that are given the same runtime share its limits (SEMANTICS T7) and its counter (E14); without one, an executor makes
its own.
"""

from __future__ import annotations

import threading

from obsdag.limits import LimitBook

__all__ = ["Runtime"]


class Runtime:
    """Shared ground of executors. Safe to use from several threads and event loops.

    `counter` is the number of contexts made with `Context(runtime)` or entered under it, and not ended (E14).
    """

    __slots__ = ("__weakref__", "_counter", "_lock", "limits")

    def __init__(self) -> None:
        self._counter = 0
        self._lock = threading.Lock()
        self.limits = LimitBook()

    @property
    def counter(self) -> int:
        """Contexts that belong to this runtime and have not ended."""
        return self._counter

    def _count(self, step: int) -> None:
        with self._lock:
            self._counter += step
