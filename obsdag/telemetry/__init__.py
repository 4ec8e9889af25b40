"""What obsdag tells about itself: metrics, traces and logs, all made from the facts of `obsdag.core.observer`.

    telemetry = Telemetry(engine="orders", tracing=Tracing.otlp("http://localhost:4318"))
    executor = Executor(dag, config=ExecutorConfig(telemetry=telemetry))

    metrics    numbers for prometheus_client, in `registry`        tracing    OpenTelemetry spans
    logs       lines of the stdlib logger `obsdag`                 watchdog   who blocks the event loop
    current    which execution a user's own log line is from       catalogue  every name that these tell, declared once

`Telemetry` puts them together: for each run it makes the observers that the run's facts are told to. Importing this
loads none of the telemetry libraries, making a `Telemetry` does, and nothing is registered anywhere before the first
run.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal

from obsdag.core.observer import FACTS, Observer
from obsdag.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from obsdag.context import Context
    from obsdag.core.records import Execution
    from obsdag.core.state import RunState
    from obsdag.telemetry.logs import Logs
    from obsdag.telemetry.metrics import Metrics
    from obsdag.telemetry.tracing import Tracing

__all__ = ["Telemetry", "Tracing", "default_observers"]

FLUSH_S: Final = 2.0
_PAUSE_S: Final = 60.0  # after a flush that did not get through, so that an outage delays one run and not each


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "Tracing":  # with OpenTelemetry's SDK, which most who import this package do not need
            from obsdag.telemetry.tracing import Tracing

            return Tracing
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Telemetry:
    """What executors report to, each run through observers of its own. One may serve several executors.

    engine: its name, on every metric, span and line. registry: prometheus_client's (None: the default one). tracing: a
    `Tracing` (None: ordinary spans if the host process has a tracer provider, else none). logs: whether lines are
    logged. observers: further observers of every run. redact: a callable on text, applied to exception messages in
    spans and lines. cardinality: "full", or "low" to leave the `task` label out. buckets: upper bounds in seconds of
    all histograms (None: 12, from 1 ms to 300 s).

    Raises ConfigError by name for what cannot be used. The first run registers the metrics, and raises ConfigError if
    the registry has such metrics from elsewhere, or of an engine of the same name with other options.
    """

    def __init__(
        self,
        engine: str = "obsdag",
        registry: CollectorRegistry | None = None,
        tracing: Tracing | None = None,
        logs: bool = True,
        observers: Iterable[Observer] = (),
        redact: Callable[[str], str] | None = None,
        cardinality: Literal["full", "low"] = "full",
        buckets: Iterable[float] | None = None,
    ) -> None:
        from obsdag.telemetry.logs import Logs
        from obsdag.telemetry.selfstats import SelfStats
        from obsdag.telemetry.tracing import Tracing
        from obsdag.telemetry.watchdog import Watchdog

        _check(engine, registry, logs, redact, cardinality)
        if tracing is not None and not isinstance(tracing, Tracing):
            raise ConfigError(f"Telemetry.tracing must be a Tracing (one of mode 'off' for none), not {tracing!r}")
        self.engine = engine
        self.tracing = tracing if tracing is not None else Tracing()
        self.stats = SelfStats()
        self._registry = registry
        self._redact = redact
        self._cardinality: Literal["full", "low"] = cardinality
        self._buckets = _checked_buckets(buckets)
        self._further = _checked_observers(observers)
        self._logs = Logs(engine, trace_ids_of, redact, self.stats) if logs else None
        self._watchdog = Watchdog()
        self._metrics: Metrics | None = None
        self._lock = threading.Lock()
        self._off = False
        self._no_flush_before = 0.0

    @classmethod
    def off(cls) -> Telemetry:
        """No observers at all, not even for warnings in the log."""
        telemetry = cls.__new__(cls)
        telemetry.engine = "obsdag"
        telemetry._off = True
        return telemetry

    def __repr__(self) -> str:
        return "Telemetry.off()" if self._off else f"Telemetry(engine={self.engine!r})"

    @property
    def metrics(self) -> Metrics:
        """The metrics, registered now if they are not yet; to serve them, or to let a DAG's series exist before its
        first run.

        Raises ConfigError if the registry does not take them, or if telemetry is off.
        """
        if self._off:
            raise ConfigError("Telemetry.off() has no metrics")
        with self._lock:
            if self._metrics is None:
                from obsdag.telemetry.metrics import Metrics

                self._metrics = Metrics(
                    self.engine,
                    self._registry,
                    buckets=self._buckets,
                    cardinality=self._cardinality,
                    stats=self.stats,
                    say=None if self._logs is None else self._logs.say,
                )
            return self._metrics

    def observers(self, run: RunState, pools: Any = None) -> list[Observer]:
        """The observers for one run, asked for when it starts; tracing first, so that the others find its ids."""
        if self._off:
            return []
        from obsdag.telemetry import current

        tracers = self.tracing.observers(run, engine=self.engine, stats=self.stats, redact=self._redact)
        # A deferred execution is known by its being current.
        known = any(tracer.execution_class is not None for tracer in tracers)
        found: list[Observer] = [] if known else current.observers()
        found += [*tracers, self.metrics.observer(run)]
        if self._logs is not None:
            found.append(self._logs.observer(run))
        found += self._further
        found.append(self._watchdog)
        return found

    async def run_closed(self, run: RunState) -> None:
        """Called by an executor at the end of a run: what is kept of its traces is exported, for at most 2 seconds.

        If that time did not suffice, runs do not wait for the export in the next minute: an outage must not delay each
        of them.
        """
        if self._off or time.monotonic() < self._no_flush_before:
            return
        if not await self.flush(FLUSH_S):
            self._no_flush_before = time.monotonic() + _PAUSE_S

    async def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Exports what tracing keeps so far; False if that was not done within `timeout_s`."""
        return self._off or await self.tracing.flush(timeout_s)

    async def close(self, timeout_s: float = FLUSH_S) -> bool:
        """Flushes and shuts tracing's processors down, within `timeout_s`; what is not exported by then is counted as
        lost.

        Metrics stay in the registry: counters must not go backwards. Runs that start later have no traces.
        """
        return self._off or await asyncio.to_thread(self.tracing.shutdown, timeout_s)


def default_observers(run: RunState) -> list[Observer]:
    """The observers of an executor without telemetry: warnings and errors in the log, and no cost per execution."""
    from obsdag.telemetry import current

    return [*current.observers(), _default_logs().observer(run)]


@cache
def _default_logs() -> Logs:
    from obsdag.telemetry.logs import Logs

    return Logs(warnings_only=True)


def trace_ids_of(context: Context | None, execution: Execution | None) -> tuple[str | None, str | None]:
    """Trace id and span id, in hex, of an execution, else of a root's `context` span; None for what there is not."""
    from obsdag.telemetry.tracing import trace_ids

    found = trace_ids(execution) if execution is not None else None
    if found is not None:
        return found
    trace = context._trace if context is not None else None
    root = getattr(trace, "root", None)
    if trace is None or root is None:  # not traced, or known only by its caller so far
        return None, None
    span = getattr(root, "span", None)  # of live tracing
    ids = root if span is None else span.get_span_context()
    return f"{ids.trace_id:032x}", f"{ids.span_id:016x}" if trace.top else None


# --- validation, by name


def _check(engine: Any, registry: Any, logs: Any, redact: Any, cardinality: Any) -> None:
    if not isinstance(engine, str) or not engine:
        raise ConfigError(f"Telemetry.engine must be a name, not {engine!r}")
    if registry is not None and not callable(getattr(registry, "register", None)):
        raise ConfigError(f"Telemetry.registry must be a prometheus_client registry or None, not {registry!r}")
    if not isinstance(logs, bool):
        raise ConfigError(f"Telemetry.logs must be True or False, not {logs!r}")
    if redact is not None and not callable(redact):
        raise ConfigError(f"Telemetry.redact must be a callable of text, or None, not {redact!r}")
    if cardinality not in ("full", "low"):
        raise ConfigError(f"Telemetry.cardinality must be 'full' or 'low', not {cardinality!r}")


def _checked_buckets(buckets: Any) -> tuple[float, ...] | None:
    from obsdag.telemetry.histogram import Buckets

    if buckets is None:
        return None
    try:
        return Buckets(buckets).bounds
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"Telemetry.buckets: {error}") from None


def _checked_observers(observers: Any) -> tuple[Observer, ...]:
    if isinstance(observers, Observer) or not isinstance(observers, Iterable):
        raise ConfigError(f"Telemetry.observers must be several: write [{observers!r}]")
    found = tuple(observers)
    for observer in found:
        if isinstance(observer, type) or not any(callable(getattr(observer, fact, None)) for fact in FACTS):
            raise ConfigError(f"Telemetry.observers must be observers, not {observer!r}: subclass obsdag.Observer")
    return found
