"""Numbers on their way to a scrape: by metric and label values, and how label values are kept few.

`Totals` is what counters of runs are added up in, once per scrape, and what stays of runs that have ended.
`CappedLabel` lets the first names through and turns the rest into `_other`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from obsdag.telemetry.histogram import Buckets, Row
from obsdag.telemetry.metric_specs import METRICS
from obsdag.telemetry.specs import NO_TASK, OTHER, MetricSpec, clean

__all__ = ["CappedLabel", "Labels", "Say", "Totals", "clean", "say_line"]

Say = Callable[..., Any]
"""Says a warning: `say(event, **keys)`."""


def say_line(event: str, **keys: Any) -> None:
    """Says a warning as a line of the logger `obsdag`."""
    from obsdag.telemetry.lines import line_logger

    line_logger().warning(event, **keys)


class CappedLabel:
    """The values of one label: the first `cap` different ones, then `_other`, which is said once."""

    __slots__ = ("_cap", "_known", "_name", "_said", "_say")

    def __init__(self, name: str, cap: int, say: Say) -> None:
        self._name = name
        self._cap = cap
        self._say = say
        self._said = False
        self._known: dict[str, str] = {NO_TASK: NO_TASK, OTHER: OTHER}

    def of(self, value: str) -> str:
        """The label for a name."""
        label = self._known.get(value)
        if label is not None:
            return label
        if len(self._known) < self._cap + 2:
            label = self._known[value] = clean(value)
            return label
        if not self._said:
            self._said = True
            self._say("telemetry.labels_capped", label=self._name, cap=self._cap, first=value)
        return OTHER


class Labels:
    """The open labels of one (engine, dag). low: whether `task` is left out everywhere (`cardinality="low"`)."""

    __slots__ = ("errors", "limiters", "low", "tasks")

    def __init__(self, low: bool, max_tasks: int, max_errors: int, say: Say) -> None:
        self.low = low
        self.tasks = CappedLabel("task", max_tasks, say)
        self.errors = CappedLabel("error_type", max_errors, say)
        self.limiters = CappedLabel("limiter", max_tasks, say)


class Totals:
    """Numbers by metric and label values: `numbers[metric][labels]`, and for histograms `rows[metric][labels]`.

    Starts with a zero for every closed label set of the metrics in `specs`, which are those of a DAG, or of an engine
    as a whole.
    """

    __slots__ = ("numbers", "rows")

    def __init__(self, buckets: Buckets, low: bool, scope: str = "dag") -> None:
        self.numbers: dict[str, dict[tuple[str, ...], float]] = {}
        self.rows: dict[str, dict[tuple[str, ...], Row]] = {}
        for spec in METRICS:
            if spec.scope in (scope, "both"):
                self._start(spec, buckets, low)

    def _start(self, spec: MetricSpec, buckets: Buckets, low: bool) -> None:
        sets = () if spec.optional else spec.closed_label_sets(low)
        if spec.kind == "histogram":
            self.rows[spec.name] = {labels: buckets.row() for labels in sets}
        else:
            self.numbers[spec.name] = dict.fromkeys(sets, 0)

    def add(self, metric: str, labels: tuple[str, ...], value: float) -> None:
        """Adds to a number, 0 if it was not there."""
        numbers = self.numbers[metric]
        numbers[labels] = numbers.get(labels, 0) + value

    def add_row(self, metric: str, labels: tuple[str, ...], row: Row) -> None:
        """Adds a histogram's series."""
        rows = self.rows[metric]
        known = rows.get(labels)
        if known is None:
            rows[labels] = row.copy()
        else:
            Buckets.add(known, row)

    def copy(self) -> Totals:
        """The same numbers, apart from these."""
        twin = Totals.__new__(Totals)
        twin.numbers = {metric: numbers.copy() for metric, numbers in self.numbers.items()}
        twin.rows = {metric: {labels: row.copy() for labels, row in rows.items()} for metric, rows in self.rows.items()}
        return twin
