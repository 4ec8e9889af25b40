"""What the telemetry counts about itself (TELEMETRY, principle 5): what it lost, and the time it takes.

One `SelfStats` per `Telemetry`. Rare things only come here, so a lock is cheap enough; reading needs none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

__all__ = ["ALL_DAGS", "DROP_REASONS", "SIGNALS", "TRACE_DECISIONS", "Kept", "SelfStats", "StatsPart"]

SIGNALS: Final = ("metrics", "traces", "logs", "observers")
DROP_REASONS: Final = ("queue_full", "export_failed", "buffer_cap", "shutdown", "observer_failed")
TRACE_DECISIONS: Final = (
    *("error", "stalled", "cancelled", "slow", "retried", "asked", "parent", "ratio", "over_budget", "dropped"),
)
ALL_DAGS: Final = "_all"
"""The `dag` of what cannot be said to be one DAG's: an exporter's queue, a scrape."""


class Kept(NamedTuple):
    """Something of a trace that is exported, for an exemplar that leads there.

    what: "root" (label: the outcome), "task" (label: the task) or "queue" (label: the lane). seconds: what the
    histogram of that name saw. unix_s: when it ended.
    """

    what: str
    dag: str
    label: str
    seconds: float
    trace_id: int
    span_id: int
    unix_s: float


class StatsPart:
    """The counters of one DAG, or of all together; every key of the closed sets is there from the start.

    counting: the traces that runs which go on have dropped so far, a list of one number for each run: most roots end
    so, and a lock for each of them would be felt.
    """

    __slots__ = ("_lock", "_traces", "counting", "dropped", "seconds")

    def __init__(self, lock: Any = None) -> None:
        self._lock = lock if lock is not None else threading.Lock()
        self._traces: dict[str, int] = dict.fromkeys(TRACE_DECISIONS, 0)
        self.counting: list[list[int]] = []
        self.dropped: dict[tuple[str, str], int] = {(signal, why): 0 for signal in SIGNALS for why in DROP_REASONS}
        self.seconds: dict[str, float] = dict.fromkeys(SIGNALS, 0.0)

    @property
    def traces(self) -> dict[str, int]:
        """Roots by why their trace was kept or not."""
        with self._lock:
            found = dict(self._traces)
            found["dropped"] += sum(number for (number,) in self.counting)
        return found

    def decide(self, decision: str, count: int) -> None:
        """Counts traces; under the lock."""
        self._traces[decision] += count

    def add(self, other: StatsPart) -> None:
        """Adds the counters of another part to these."""
        for key, lost in other.dropped.items():
            self.dropped[key] += lost
        for signal, seconds in other.seconds.items():
            self.seconds[signal] += seconds
        for decision, traces in other.traces.items():
            self._traces[decision] += traces


class SelfStats:
    """Counters by (signal, reason) and seconds by signal, zero from the start; safe to change and read from any thread.

    dropped, seconds, traces (roots by why their trace was kept or not): over all DAGs. parts: the same by DAG, and
    under `_all` what was counted without one; the parts add up to the totals. on_kept: told of what tracing exports of
    a root, on its own thread. gauges: what can only be asked for when somebody reads: name -> function, such as
    "spans_buffered".
    """

    __slots__ = ("_lock", "_total", "gauges", "on_kept", "parts")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = StatsPart(self._lock)
        self.parts: dict[str, StatsPart] = {ALL_DAGS: StatsPart(self._lock)}
        self.gauges: dict[str, Callable[[], float]] = {}
        self.on_kept: list[Callable[[Sequence[Kept]], None]] = []

    @property
    def dropped(self) -> dict[tuple[str, str], int]:
        """What was lost, by signal and reason."""
        return self._total.dropped

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that telemetry took, by signal."""
        return self._total.seconds

    @property
    def traces(self) -> dict[str, int]:
        """Roots by why their trace was kept or not."""
        return self._total.traces

    def drop(self, signal: str, reason: str, count: int = 1, *, dag: str = ALL_DAGS) -> None:
        """Counts `count` things of a signal that were lost. Raises KeyError for what is in no closed set."""
        with self._lock:
            self._total.dropped[signal, reason] += count
            self._part(dag).dropped[signal, reason] += count

    def spend(self, signal: str, took_s: float, *, dag: str = ALL_DAGS) -> None:
        """Counts time that telemetry took, seconds. Raises KeyError for an unknown signal."""
        with self._lock:
            self._total.seconds[signal] += took_s
            self._part(dag).seconds[signal] += took_s

    def decide(self, decision: str, count: int = 1, *, dag: str = ALL_DAGS) -> None:
        """Counts traces by one of TRACE_DECISIONS. Raises KeyError for what is none."""
        with self._lock:
            self._total.decide(decision, count)
            self._part(dag).decide(decision, count)

    def count_dropped(self, *, dag: str) -> list[int]:
        """Where a run that begins counts the traces that it drops: in the first item, on its own thread."""
        dropped = [0]
        with self._lock:
            self._total.counting.append(dropped)
            self._part(dag).counting.append(dropped)
        return dropped

    def counted_dropped(self, dropped: list[int], *, dag: str) -> None:
        """The run is over: its number is one of the others from now on."""
        with self._lock:
            for part in (self._total, self._part(dag)):
                part.counting[:] = [each for each in part.counting if each is not dropped]
                part.decide("dropped", dropped[0])

    def gauge(self, name: str) -> float:
        """What the function under `name` says now, 0.0 without one."""
        ask = self.gauges.get(name)
        return ask() if ask is not None else 0.0

    def _part(self, dag: str) -> StatsPart:
        part = self.parts.get(dag)
        if part is None:
            part = self.parts[dag] = StatsPart(self._lock)
        return part
