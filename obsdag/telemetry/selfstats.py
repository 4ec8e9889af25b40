"""What the telemetry counts about itself (TELEMETRY, principle 5): what it lost, and the time it takes.

One `SelfStats` per `Telemetry`. Rare things only come here, so a lock is cheap enough; reading needs none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

__all__ = ["DROP_REASONS", "SIGNALS", "TRACE_DECISIONS", "SelfStats"]

SIGNALS: Final = ("metrics", "traces", "logs", "observers")
DROP_REASONS: Final = ("queue_full", "export_failed", "buffer_cap", "shutdown", "observer_failed")
TRACE_DECISIONS: Final = (
    *("error", "stalled", "cancelled", "slow", "retried", "asked", "parent", "ratio", "over_budget", "dropped"),
)


class SelfStats:
    """Counters by (signal, reason) and seconds by signal, zero from the start; safe to change and read from any thread.

    traces: roots by why their trace was kept or not.
    gauges: what can only be asked for when somebody reads: name -> function, such as "spans_buffered".
    """

    __slots__ = ("_lock", "dropped", "gauges", "seconds", "traces")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.dropped: dict[tuple[str, str], int] = {(signal, why): 0 for signal in SIGNALS for why in DROP_REASONS}
        self.seconds: dict[str, float] = dict.fromkeys(SIGNALS, 0.0)
        self.traces: dict[str, int] = dict.fromkeys(TRACE_DECISIONS, 0)
        self.gauges: dict[str, Callable[[], float]] = {}
        self.decisions: dict[str, list[int]] = {}
        self.on_kept: list[Callable[[Kept], None]] = []

    def drop(self, signal: str, reason: str, count: int = 1) -> None:
        """Counts `count` things of a signal that were lost. Raises KeyError for what is in no closed set."""
        with self._lock:
            self.dropped[signal, reason] += count

    def spend(self, signal: str, took_s: float) -> None:
        """Counts time that telemetry took, seconds. Raises KeyError for an unknown signal."""
        with self._lock:
            self.seconds[signal] += took_s

    def decide(self, decision: str, count: int = 1) -> None:
        """Counts traces by one of TRACE_DECISIONS. Raises KeyError for what is none."""
        with self._lock:
            self.traces[decision] += count

    def decisions_of(self, dag: str) -> list[int]:
        """The counts of a DAG per DECISIONS, a list that stays the same."""
        with self._lock:
            return self.decisions.setdefault(dag, [0] * len(DECISIONS))

    def gauge(self, name: str) -> float:
        """What the function under `name` says now, 0.0 without one."""
        ask = self.gauges.get(name)
        return ask() if ask is not None else 0.0
