"""What the telemetry counts about itself (TELEMETRY, principle 5): what it lost, and the time it takes.

One `SelfStats` per `Telemetry`. Rare things only come here, so a lock is cheap enough; reading needs none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, NamedTuple

__all__ = ["DROP_REASONS", "SIGNALS", "TRACE_DECISIONS", "Kept", "SelfStats"]

SIGNALS: Final = ("metrics", "traces", "logs", "observers")
DROP_REASONS: Final = ("queue_full", "export_failed", "buffer_cap", "shutdown", "observer_failed")
TRACE_DECISIONS: Final = (
    *("error", "stalled", "cancelled", "slow", "retried", "asked", "parent", "ratio", "over_budget", "dropped"),
)


class Kept(NamedTuple):
    """Something of a trace that is exported, for an exemplar that leads there.

    what: "root" (label: the outcome), "task" (label: the task) or "queue" (label: the lane). seconds: what the histogram of that
    name saw. trace_id, span_id: hex. unix_s: when it ended.
    """

    what: str
    dag: str
    label: str
    seconds: float
    trace_id: str
    span_id: str
    unix_s: float


class SelfStats:
    """Counters by (signal, reason) and seconds by signal, zero from the start; safe to change and read from any thread.

    traces: roots by why their trace was kept or not.
    on_kept: told of what tracing exports, on its own thread.
    gauges: what can only be asked for when somebody reads: name -> function, such as "spans_buffered".
    """

    __slots__ = ("_lock", "dropped", "gauges", "on_kept", "seconds", "traces")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.dropped: dict[tuple[str, str], int] = {(signal, why): 0 for signal in SIGNALS for why in DROP_REASONS}
        self.seconds: dict[str, float] = dict.fromkeys(SIGNALS, 0.0)
        self.traces: dict[str, int] = dict.fromkeys(TRACE_DECISIONS, 0)
        self.gauges: dict[str, Callable[[], float]] = {}
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

    def gauge(self, name: str) -> float:
        """What the function under `name` says now, 0.0 without one."""
        ask = self.gauges.get(name)
        return ask() if ask is not None else 0.0
