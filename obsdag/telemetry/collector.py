"""The collector: one per prometheus registry, over all engines that report to it. Families are made when somebody
scrapes.

`collect` never raises: a part that fails is left out, counted in `obsdag_collect_errors_total`, and said once in the
log. There are no `_created` samples. Names, help and labels come from the catalogue; nothing is declared here.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from time import perf_counter
from types import MethodType
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    Exemplar,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.samples import Sample

from obsdag.errors import ConfigError
from obsdag.telemetry.book import Book
from obsdag.telemetry.histogram import Buckets
from obsdag.telemetry.metric_specs import METRICS
from obsdag.telemetry.selfstats import ALL_DAGS, SelfStats, StatsPart
from obsdag.telemetry.specs import COMMON_LABELS, MetricSpec
from obsdag.telemetry.totals import Labels, Say, Totals, clean, say_line

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from obsdag.telemetry.book import ExemplarRow
    from obsdag.telemetry.histogram import Row

__all__ = ["Collector", "Engine", "EngineOptions", "collector_of"]

Families = dict[str, Metric]

_KINDS: Final[dict[str, Callable[[MetricSpec], Metric]]] = {
    "counter": lambda spec: CounterMetricFamily(spec.name, spec.help, labels=COMMON_LABELS, unit=spec.unit),
    "gauge": lambda spec: GaugeMetricFamily(spec.name, spec.help, labels=COMMON_LABELS, unit=spec.unit),
    "histogram": lambda spec: HistogramMetricFamily(spec.name, spec.help, labels=COMMON_LABELS, unit=spec.unit),
    "info": lambda spec: InfoMetricFamily(spec.family, spec.help, labels=COMMON_LABELS),
}

_MULTIPROCESS: Final = "a port per process: start_ops_server(port=0, file_sd=folder) tells Prometheus of each"
_ATTRIBUTE: Final = "_obsdag_collector"
_finding = threading.Lock()


def collector_of(registry: CollectorRegistry) -> Collector:
    """The collector of a registry, registered there now if it is not yet. Again is harmless.

    It is remembered on the registry itself, so that a reload of this module finds it. Raises ConfigError if the
    registry has metrics of these names from somewhere else.
    """
    with _finding:
        collector: Collector | None = getattr(registry, _ATTRIBUTE, None)
        if collector is not None:
            with suppress(ValueError):  # still registered, unless somebody took it out
                registry.register(collector)
            return collector
        collector = Collector()
        try:
            registry.register(collector)
        except ValueError as error:
            raise ConfigError(
                f"the registry has obsdag's metric names already; give Telemetry another one: {error}"
            ) from error
        setattr(registry, _ATTRIBUTE, collector)
        return collector


class EngineOptions(NamedTuple):
    """What all that report under one engine name must agree on. low: without `task` labels."""

    low: bool
    bounds: tuple[float, ...]
    max_tasks: int
    max_errors: int


class Engine:
    """All that reports under one engine name: the books of its DAGs, and what telemetry counts about itself."""

    def __init__(self, name: str, options: EngineOptions, version: str, say: Say | None) -> None:
        self.name = name
        self.options = options
        self._version = version
        self._said_by = _weakly(say)
        self._buckets = Buckets(options.bounds)
        self._lock = threading.Lock()
        self._books: dict[str, Book] = {}
        self._members: list[tuple[weakref.ref[SelfStatsOwner], dict[str, StatsPart]]] = []
        self._past: dict[str, StatsPart] = {ALL_DAGS: StatsPart()}
        self._collect_errors = 0
        self._said: set[tuple[str, str]] = set()

    @property
    def unused(self) -> bool:
        """Whether no DAG has ever reported."""
        return not self._books

    def join(self, owner: SelfStatsOwner) -> None:
        """Lets the self statistics of `owner` be shown; what they counted stays when the owner is gone."""
        with self._lock:
            self._members.append((weakref.ref(owner), owner.stats.parts))

    def book(self, dag: str) -> Book:
        """The book of a DAG by its name, made now if there is none."""
        label = clean(dag)
        label = label + "_" if label == ALL_DAGS else label
        with self._lock:
            book = self._books.get(label)
            if book is None:
                book = self._books[label] = Book(label, self._labels(label), self._buckets)
            return book

    def _labels(self, dag: str) -> Labels:
        def say(event: str, **keys: object) -> None:
            self.say(event, engine=self.name, dag=dag, **keys)

        return Labels(self.options.low, self.options.max_tasks, self.options.max_errors, say)

    def say(self, event: str, **keys: object) -> None:
        """Says a warning, through a telemetry while it lives."""
        say = self._said_by() or say_line
        say(event, **keys)

    # --- scrapes

    def collect(self, families: Families) -> None:
        """Adds the samples of all DAGs, and of the engine as a whole."""
        started = perf_counter()
        for book in list(self._books.values()):
            try:
                totals = book.snapshot(self._fail)
                self._add_stats(totals, book.dag)
                self._render(families, totals, book.dag, book.exemplars)
            except Exception as error:
                self._fail("dag", error)
        try:
            self._collect_whole(families, started)
        except Exception as error:
            self._fail("engine", error)

    def _collect_whole(self, families: Families, started: float) -> None:
        whole = Totals(self._buckets, self.options.low, "engine")
        self._add_stats(whole, ALL_DAGS)
        for owner in [ref() for ref, _ in self._members.copy()]:
            if owner is not None:
                whole.add("obsdag_telemetry_spans_buffered", ("traces",), self._buffered(owner.stats))
        whole.add("obsdag_collect_errors_total", ("metrics",), self._collect_errors)
        whole.add("obsdag_collect_seconds", ("metrics",), perf_counter() - started)
        self._render(families, whole, ALL_DAGS, lambda histogram, labels: None)

    def _buffered(self, stats: SelfStats) -> float:
        try:
            return stats.gauge("spans_buffered")
        except Exception as error:
            self._fail("spans_buffered", error)
            return 0.0

    def _fail(self, part: str, error: Exception) -> None:
        self._collect_errors += 1
        key = part, type(error).__name__
        if key not in self._said:
            self._said.add(key)
            self.say("telemetry.collect_failed", engine=self.name, dag=ALL_DAGS, part=part, error=repr(error))

    def _add_stats(self, totals: Totals, dag: str) -> None:
        self._fold_gone()
        totals.numbers["obsdag_build_info"][(self._version,)] = 1
        for part in [self._past.get(dag), *(parts.get(dag) for _, parts in self._members.copy())]:
            if part is not None:
                for key, lost in part.dropped.items():
                    totals.add("obsdag_telemetry_dropped_total", key, lost)
                for signal, seconds in part.seconds.items():
                    totals.add("obsdag_telemetry_seconds_total", (signal,), seconds)
                for decision, traces in part.traces.items():
                    totals.add("obsdag_traces_total", (decision,), traces)

    def _fold_gone(self) -> None:
        with self._lock:
            for member in [each for each in self._members if each[0]() is None]:
                self._members.remove(member)
                for dag, part in member[1].items():
                    self._past.setdefault(dag, StatsPart()).add(part)

    def _render(
        self,
        families: Families,
        totals: Totals,
        dag: str,
        exemplars: Callable[[str, tuple[str, ...]], ExemplarRow | None],
    ) -> None:
        common = dict(zip(COMMON_LABELS, (self.name, dag), strict=True))
        low = self.options.low
        for spec in METRICS:
            names, samples = spec.label_names(low), families[spec.name].samples
            for labels, value in totals.numbers.get(spec.name, {}).items():
                samples.append(Sample(spec.name, common | dict(zip(names, labels, strict=True)), value))
            for labels, row in totals.rows.get(spec.name, {}).items():
                own = common | dict(zip(names, labels, strict=True))
                samples += self._histogram(spec.name, own, row, exemplars(spec.name, labels))

    def _histogram(self, name: str, labels: dict[str, str], row: Row, kept: ExemplarRow | None) -> list[Sample]:
        samples, seen, bucket = [], 0.0, f"{name}_bucket"
        for index, bound in enumerate(self._buckets.labels):
            seen += row[index + 1]
            exemplar = None
            if kept is not None and (found := kept[index]) is not None:
                trace = {"trace_id": f"{found.trace_id:032x}", "span_id": f"{found.span_id:016x}"}
                exemplar = Exemplar(trace, found.seconds, found.unix_s)
            samples.append(Sample(bucket, labels | {"le": bound}, seen, None, exemplar))
        samples.append(Sample(f"{name}_count", labels, seen))
        samples.append(Sample(f"{name}_sum", labels, row[0]))
        return samples


def _weakly(say: Say | None) -> Callable[[], Say | None]:
    # a registry lives as long as the process, and must not keep a Telemetry alive by the method that it logs with
    return weakref.WeakMethod(say) if isinstance(say, MethodType) else lambda: say


class SelfStatsOwner(Protocol):
    """Whoever has `stats` that an engine shows; held weakly."""

    stats: SelfStats


class Collector:
    """What prometheus_client asks; made by `collector_of`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: dict[str, Engine] = {}
        self._said_multiprocess = False

    def engine(self, name: str, options: EngineOptions, version: str, say: Say | None) -> Engine:
        """The engine of that name; raises ConfigError if it reports already with other options."""
        label = clean(name)
        with self._lock:
            engine = self._engines.get(label)
            if engine is None or (engine.unused and engine.options != options):
                engine = self._engines[label] = Engine(label, options, version, say)
            if engine.options != options:
                raise ConfigError(
                    f"engine {name!r} reports to this registry already, with other buckets, cardinality or caps: "
                    f"use the same, or another engine name or registry"
                )
        self._look_for_multiprocess(engine)
        return engine

    def _look_for_multiprocess(self, engine: Engine) -> None:
        # prometheus_client's multiprocess mode collects from files that only its own metric classes write.
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR") and not self._said_multiprocess:
            self._said_multiprocess = True
            engine.say("telemetry.multiprocess_ignored", engine=engine.name, dag=ALL_DAGS, advice=_MULTIPROCESS)

    def describe(self) -> Iterable[Metric]:
        """All families, without samples: what the registry checks names by."""
        return list(_families().values())

    def collect(self) -> Iterable[Metric]:
        """All families with the samples of this moment."""
        families = _families()
        for engine in list(self._engines.values()):
            engine.collect(families)
        return list(families.values())


def _families() -> Families:
    return {spec.name: _KINDS[spec.kind](spec) for spec in METRICS}
