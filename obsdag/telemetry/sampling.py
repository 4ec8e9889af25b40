"""What speaks for keeping a trace: the ratio of its id, a budget per trouble, being slow (TELEMETRY section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace.sampling import DEFAULT_ON, Decision, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import get_current_span

from obsdag.telemetry.records import ExecutionSpan

if TYPE_CHECKING:
    from opentelemetry.context import Context as OtelContext
    from opentelemetry.trace import Link, SpanKind, TraceState
    from opentelemetry.util.types import Attributes

__all__ = ["KeepBudget", "RunningQuantile", "deferred_sampler", "ratio_bound"]

MAX_BUDGET_KEYS: Final = 1_000
"""Error types can be made at run time without end; beyond this many keys all share one budget."""


def ratio_bound(rate: float) -> int:
    """Trace ids whose low 64 bits are below this are in: the rule of the SDK's TraceIdRatioBased, so services agree."""
    return TraceIdRatioBased.get_bound_for_rate(rate)


class KeepBudget:
    """At most `per_s` traces per second and key are kept, at least one per interval, so that an outage does not flood.

    The interval is one second, or 1 / per_s seconds where that is longer. Times are Unix seconds, handed in.
    """

    __slots__ = ("_interval_s", "_most", "_windows")

    def __init__(self, per_s: float) -> None:
        self._most = max(1, int(per_s))
        self._interval_s = 1.0 if per_s >= 1 else 1.0 / per_s
        self._windows: dict[tuple[str, str, str], list[float]] = {}

    def take(self, key: tuple[str, str, str], unix_s: float) -> bool:
        """Whether one more of `key` (dag, task, error type) fits in."""
        window = self._windows.get(key)
        if window is None:
            if len(self._windows) >= MAX_BUDGET_KEYS:
                key = ("", "", "_other")
            window = self._windows.setdefault(key, [unix_s, 0.0])
        if not 0.0 <= unix_s - window[0] < self._interval_s:
            window[0], window[1] = unix_s, 0.0
        window[1] += 1.0
        return window[1] <= self._most


class RunningQuantile:
    """A quantile of durations that follows the present: logarithmic buckets 10 % wide, old counts fade by halving.

    None until 100 durations were seen, since the tail of a few says nothing. Durations in seconds.
    """

    __slots__ = ("_counts", "_limit_s", "_quantile", "_seen", "_total")

    _GROWTH: Final = 1.0 / math.log(1.1)
    _FIRST_S: Final = 1e-6
    _BUCKETS: Final = 256
    _ENOUGH: Final = 100
    _FADE_AT: Final = 10_000

    def __init__(self, quantile: float = 0.99) -> None:
        self._quantile = quantile
        self._counts = [0] * self._BUCKETS
        self._total = self._seen = 0
        self._limit_s: float | None = None

    def observe(self, seconds: float) -> None:
        """Takes one duration in."""
        bucket = int(math.log(seconds / self._FIRST_S) * self._GROWTH) if seconds > self._FIRST_S else 0
        self._counts[min(bucket, self._BUCKETS - 1)] += 1
        self._total += 1
        self._seen += 1
        if self._seen % 50 == 0 or self._limit_s is None:
            self._compute()
        if self._total >= self._FADE_AT:
            self._counts = [count >> 1 for count in self._counts]
            self._total = sum(self._counts)

    @property
    def limit_s(self) -> float | None:
        """The upper edge of the bucket that the quantile lies in; None while too few were seen."""
        return self._limit_s

    def _compute(self) -> None:
        if self._seen < self._ENOUGH:
            return
        wanted, reached = self._quantile * self._total, 0
        for bucket, count in enumerate(self._counts):
            reached += count
            if reached >= wanted:
                self._limit_s = self._FIRST_S * math.exp((bucket + 1) / self._GROWTH)
                return


class _DeferredSampler(Sampler):
    """See `deferred_sampler`."""

    def __init__(self, otherwise: Sampler) -> None:
        self._otherwise = otherwise

    def should_sample(
        self,
        parent_context: OtelContext | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        parent = get_current_span(parent_context)
        decision = self._of(parent)
        if decision is None:
            return self._otherwise.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        return SamplingResult(decision, attributes, parent.get_span_context().trace_state)

    def _of(self, parent: Any) -> Decision | None:
        """What obsdag says about a child of `parent`; None where it has no say."""
        if isinstance(parent, ExecutionSpan):
            root = parent.trace.root
            sampled = root.kept or root.tracer.is_headed(root)
            return Decision.RECORD_AND_SAMPLE if sampled else Decision.RECORD_ONLY
        if parent.is_recording() and not parent.get_span_context().trace_flags.sampled:
            return (
                Decision.RECORD_ONLY
            )  # recorded without being sampled: it can only be a child of an undecided execution
        return None

    def get_description(self) -> str:
        return f"ObsdagDeferred{{{self._otherwise.get_description()}}}"


def deferred_sampler(otherwise: Sampler | None = None) -> Sampler:
    """A sampler for the host's TracerProvider, for hosts who do not want callees to record traces not decided yet.

    Spans that users make inside tasks are recorded, but carry the sampled flag only if their trace is kept already or
    will be by its id; so what goes out in `traceparent` says 0 otherwise. `obsdag.hold(processor)` exports them if
    the trace is kept. All other spans are sampled by `otherwise` (None: follow the parent, else always, as the SDK
    does).
    """
    return _DeferredSampler(otherwise if otherwise is not None else DEFAULT_ON)
