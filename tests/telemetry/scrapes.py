"""Scrapes, as a Prometheus server makes them: encoded, then read back with prometheus_client's own parsers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from obsdag.core.observer import Observer
from obsdag.core.state import RunState
from obsdag.telemetry.metrics import Metrics

__all__ = ["Reports", "Scrape", "scrape", "text"]

OWN_COST = ("obsdag_collect_seconds", "obsdag_telemetry_seconds_total")


class Scrape:
    """The samples of one scrape of everything named obsdag_."""

    def __init__(self, families: Iterable[Any]) -> None:
        self.families = {family.name: family for family in families}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The value of the only sample with that name and these labels (others may be there)."""
        found = self.values(name, **labels)
        assert len(found) == 1, f"{name}{labels}: {found}"
        return found[0]

    def values(self, name: str, **labels: str) -> list[float]:
        return [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]

    def total(self, name: str, **labels: str) -> float:
        return sum(self.values(name, **labels))

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """Sums by one label, without zeros."""
        sums: dict[str, float] = {}
        for sample in self.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                sums[sample.labels[label]] = sums.get(sample.labels[label], 0) + sample.value
        return {key: value for key, value in sums.items() if value}

    def quiet(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """All values by name and labels, what a scrape costs itself left out."""
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for s in self.samples if s.name not in OWN_COST}

    def counters(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """What must never become less."""
        endings = ("_total", "_bucket", "_count", "_sum")
        return {key: value for key, value in self.quiet().items() if key[0].endswith(endings)}


def text(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def scrape(registry: CollectorRegistry, form: str = "openmetrics") -> Scrape:
    if form == "text":
        return Scrape(read_text(text(registry)))
    return Scrape(read_openmetrics(openmetrics.generate_latest(registry).decode()))


class Reports:
    """A registry, the metrics of one engine in it, and what an executor asks of its telemetry."""

    def __init__(self, engine: str = "orders", registry: CollectorRegistry | None = None, **options: Any) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self.said: list[tuple[str, dict[str, Any]]] = []
        options.setdefault("say", lambda event, **keys: self.said.append((event, keys)))
        self.metrics = Metrics(engine, self.registry, **options)
        self.others: list[Observer] = []

    def observers(self, run: RunState, pools: object) -> list[Observer]:
        return [self.metrics.observer(run), *self.others]

    async def run_closed(self, run: RunState) -> None:
        """Nothing to flush."""

    def scrape(self, form: str = "openmetrics") -> Scrape:
        return scrape(self.registry, form)
