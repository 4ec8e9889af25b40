"""What executors share: a `Runtime` counts living contexts and holds the state of limits.

Executors that are given the same runtime share its limits (SEMANTICS T7) and its counter (E14); without one, an
executor makes its own.
"""

from __future__ import annotations

import threading
from typing import Protocol

from obsdag.limits import LimitBook

__all__ = ["Runtime"]


class _Counting(Protocol):
    """Whatever knows how many contexts live in it: a run."""

    @property
    def living(self) -> int: ...


class Runtime:
    """Shared ground of executors. Safe to use from several threads and event loops.

    A run counts its own contexts, which costs nothing here; what is made with `Context(runtime)` and not in a run yet
    is counted by a token that gives itself back when the context enters, ends, or is garbage.
    """

    __slots__ = ("__weakref__", "_lock", "_made", "_runs", "limits")

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant: a token may be collected while it is held
        self._made = 0
        self._runs: set[_Counting] = set()
        self.limits = LimitBook()

    @property
    def counter(self) -> int:
        """Contexts made with `Context(runtime)` or entered under it, and not ended (E14)."""
        with self._lock:
            return self._made + sum(run.living for run in self._runs)

    def _token(self) -> _Token:
        return _Token(self)

    def _opened(self, run: _Counting) -> None:
        with self._lock:
            self._runs.add(run)

    def _closed(self, run: _Counting) -> None:
        with self._lock:
            self._runs.discard(run)


class _Token:
    """One context outside any run, counted by its runtime until `release` or garbage collection."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: Runtime) -> None:
        self._runtime: Runtime | None = runtime
        with runtime._lock:
            runtime._made += 1

    def release(self) -> None:
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            with runtime._lock:
                runtime._made -= 1

    def __del__(self) -> None:
        self.release()
