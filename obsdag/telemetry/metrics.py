"""The metrics of one `Telemetry` (TELEMETRY section 4): where runs get their observers, and scrapes their numbers.

    metrics = Metrics(engine="orders", registry=registry)
    observer = metrics.observer(run)            # told the facts of that run
    metrics.stats.drop("traces", "queue_full")  # what telemetry counts about itself

The way of a number: fact -> `MetricsObserver` (tally: plain lists per run) -> `Book` (runs of one engine and DAG) ->
`Totals` (by label, at scrape) -> `Collector` (one per registry: families) -> prometheus_client.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from obsdag.errors import ConfigError
from obsdag.telemetry.collector import Collector, EngineOptions, collector_of
from obsdag.telemetry.histogram import DEFAULT_BUCKETS, Buckets
from obsdag.telemetry.selfstats import Kept, SelfStats
from obsdag.telemetry.tally import SAMPLE_EVERY, MetricsObserver

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from obsdag.core.state import RunState
    from obsdag.plan import Plan
    from obsdag.telemetry.totals import Say

__all__ = ["DEFAULT_BUCKETS", "SAMPLE_EVERY", "Collector", "Metrics", "MetricsObserver", "SelfStats"]


class Metrics:
    """The metrics that one engine name reports to one registry.

    engine: the `engine` label. registry: a prometheus_client registry (None: the default one). buckets: upper bounds
    in seconds of all histograms (None: DEFAULT_BUCKETS). cardinality: "full", or "low" to leave the `task` label out.
    max_task_labels: tasks (and limiters) told apart per DAG, max_error_types: types of exceptions; the rest is
    `_other`. stats: the self statistics to show (None: new ones). say: how a warning is logged, `say(event, **keys)`
    (None: as a line of the logger `obsdag`); a bound method is held weakly. Raises ConfigError for values out of
    range, if the engine reports to the registry with other options already, or if the registry has these metric names
    from elsewhere.
    """

    def __init__(
        self,
        engine: str = "obsdag",
        registry: CollectorRegistry | None = None,
        *,
        buckets: Iterable[float] | None = None,
        cardinality: Literal["full", "low"] = "full",
        max_task_labels: int = 200,
        max_error_types: int = 20,
        stats: SelfStats | None = None,
        say: Say | None = None,
    ) -> None:
        if not isinstance(engine, str) or not engine:
            raise ConfigError(f"engine must be a name, not {engine!r}")
        if cardinality not in ("full", "low"):
            raise ConfigError(f"cardinality must be 'full' or 'low', not {cardinality!r}")
        for name, cap in (("max_task_labels", max_task_labels), ("max_error_types", max_error_types)):
            if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
                raise ConfigError(f"{name} must be a whole number >= 1, not {cap!r}")
        self.engine = engine
        self.registry = registry if registry is not None else _default_registry()
        self.stats = stats if stats is not None else SelfStats()
        bounds = Buckets(buckets).bounds
        options = EngineOptions(cardinality == "low", bounds, max_task_labels, max_error_types)
        self.collector = collector_of(self.registry)
        self._engine = self.collector.engine(engine, options, _version(), say)
        self._engine.join(self)
        self.stats.on_kept.append(self._keep)

    def declare(self, plan: Plan) -> None:
        """Lets the series of a DAG exist, at zero, before its first run."""
        self._engine.book(plan.name).declare(plan)

    def observer(self, run: RunState) -> MetricsObserver:
        """The observer that counts for `run`, from now until its `run_finished` is told."""
        return self._engine.book(run.plan.name).attach(run)

    def _keep(self, kept: Sequence[Kept]) -> None:
        if kept:
            self._engine.book(kept[0].dag).keep(kept)


def _default_registry() -> CollectorRegistry:
    from prometheus_client import REGISTRY

    return REGISTRY


def _version() -> str:
    from obsdag import __version__

    return __version__
