"""What dashboards consist of, as plain data: queries made from declared metrics, panels, rows. No Grafana in here.

A panel's description is made from the metric's own declaration: what it is, what a bad value means, what to do first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from obsdag.telemetry.catalogue import ALL_DAGS, metric

__all__ = [
    "JAEGER_UID",
    "PROMETHEUS_UID",
    "Board",
    "Panel",
    "Query",
    "Row",
    "average",
    "described",
    "heat",
    "names_of",
    "now",
    "panel",
    "quantile",
    "quantiles",
    "ratio",
    "selector",
    "speed",
    "usually",
]

PROMETHEUS_UID: Final = "obsdag-prometheus"
JAEGER_UID: Final = "obsdag-jaeger"
"""Data source uids, the same in the provisioning files."""

Kind = Literal["lines", "stack", "stat", "bars", "heatmap", "timeline"]
_WINDOW: Final = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression with Grafana's variables. legend: of each series. metrics: the declared ones it reads."""

    expr: str
    legend: str = "__auto"
    metrics: tuple[str, ...] = ()
    exemplar: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. unit: Grafana's id. width: of 24 columns. traces: whether its series lead to a search for traces.

    warn_at: where values begin to be bad.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    width: int = 8
    traces: bool = False
    maximum: float | None = None
    warn_at: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a headline."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard. uid and file name are made from its name. variables: those beside data source, job and so on."""

    name: str
    title: str
    description: str
    rows: tuple[Row, ...]
    has_tasks: bool = False

    @property
    def uid(self) -> str:
        """Grafana's uid, so that links keep working."""
        return f"obsdag-{self.name}"

    @property
    def panels(self) -> list[Panel]:
        """All panels, in order."""
        return [each for row in self.rows for each in row.panels]


# --- queries


def selector(name: str, tasks: bool = False, extra: str = "") -> str:
    """The label matchers for a declared metric; `tasks`: those of $task only. extra: further matchers."""
    spec = metric(name)
    dag = "$dag" if spec.scope == "dag" else f"$dag|{ALL_DAGS}"
    found = ['job=~"$job"', 'instance=~"$instance"', 'engine=~"$engine"', f'dag=~"{dag}"']
    if tasks:
        found.append('task=~"$task"')
    return "{" + ", ".join([*found, *filter(None, [extra])]) + "}"


def _by(labels: str) -> str:
    return f"sum by ({labels})" if labels else "sum"


def _legend(labels: str) -> str:
    return " ".join(f"{{{{{label.strip()}}}}}" for label in labels.split(",")) if labels else ""


def now(name: str, by: str = "", legend: str = "", tasks: bool = False, extra: str = "") -> Query:
    """A gauge as it is, summed by labels."""
    return Query(f"{_by(by)} ({name}{selector(name, tasks, extra)})", legend or _legend(by), (name,))


def speed(name: str, by: str = "", legend: str = "", tasks: bool = False, extra: str = "") -> Query:
    """A counter per second, summed by labels."""
    return Query(f"{_by(by)} (rate({name}{selector(name, tasks, extra)}{_WINDOW}))", legend or _legend(by), (name,))


def usually(name: str, by: str = "") -> Query:
    """A gauge's mean over the window, summed by labels: it may be 0 between two runs, while work is counted."""
    return Query(f"{_by(by)} (avg_over_time({name}{selector(name)}{_WINDOW}))", _legend(by), (name,))


def ratio(above: Query, below: Query, legend: str) -> Query:
    """One query divided by another."""
    return Query(f"{above.expr} / {below.expr}", legend, (*above.metrics, *below.metrics))


def quantile(q: float, name: str, by: str = "", tasks: bool = False, extra: str = "") -> Query:
    """A quantile of a histogram by labels, with exemplars if it has some."""
    labels = f"le, {by}" if by else "le"
    inner = f"sum by ({labels}) (rate({name}_bucket{selector(name, tasks, extra)}{_WINDOW}))"
    legend = f"p{q * 100:g} {_legend(by)}".strip()
    return Query(f"histogram_quantile({q:g}, {inner})", legend, (name,), metric(name).exemplars)


def quantiles(name: str, by: str = "", tasks: bool = False, extra: str = "") -> tuple[Query, ...]:
    """Median, 95th and 99th percentile."""
    return tuple(quantile(q, name, by, tasks, extra) for q in (0.5, 0.95, 0.99))


def average(name: str, by: str = "", tasks: bool = False) -> Query:
    """The mean of a histogram by labels."""
    own = selector(name, tasks)
    total, count = (f"{_by(by)} (rate({name}_{part}{own}{_WINDOW}))" for part in ("sum", "count"))
    return Query(f"{total} / {count}", f"mean {_legend(by)}".strip(), (name,))


def heat(name: str, tasks: bool = False) -> Query:
    """A histogram's buckets, for a heatmap."""
    expr = f"sum by (le) (increase({name}_bucket{selector(name, tasks)}{_WINDOW}))"
    return Query(expr, "{{le}}", (name,), metric(name).exemplars)


# --- panels


def panel(
    title: str,
    *queries: Query,
    kind: Kind = "lines",
    unit: str = "",
    text: str = "",
    width: int = 8,
    traces: bool = False,
    maximum: float | None = None,
    warn_at: float | None = None,
) -> Panel:
    """A panel described by the first metric it shows, unless `text` does; `unit` is the metric's own unless given."""
    name = queries[0].metrics[0] if queries[0].metrics else ""
    if not text:
        spec = metric(name)
        text = f"{spec.help}\n\n**Bad:** {spec.bad}"
    own_unit = unit or metric(name).panel_unit
    return Panel(title, text, own_unit, tuple(queries), kind, width, traces, maximum, warn_at)


def described(*names: str) -> str:
    """Help and advice of several metrics, as one description."""
    return "\n\n".join(_lines(metric(name).help, metric(name).bad) for name in names)


def _lines(help_text: str, bad: str) -> str:
    return f"{help_text}\n**Bad:** {bad}"


def names_of(panels: Iterable[Panel]) -> set[str]:
    """Declared metrics that the panels read."""
    return {name for each in panels for query in each.queries for name in query.metrics}
