"""What a declaration of telemetry consists of, and the closed sets of values that labels and attributes take.

The declarations themselves are in `catalogue` (spans, attributes, log events) and `metric_specs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal

from obsdag.telemetry.selfstats import ALL_DAGS, DROP_REASONS, SIGNALS, TRACE_DECISIONS

__all__ = [
    "ALL_DAGS",
    "COMMON_LABELS",
    "DROP_REASONS",
    "NO_TASK",
    "OTHER",
    "PHASES",
    "POOLS",
    "REJECT_REASONS",
    "RESOURCES",
    "RESTART_KINDS",
    "RUN_OUTCOMES",
    "SIGNALS",
    "TRACE_DECISIONS",
    "WORKER_STATES",
    "AttributeSpec",
    "EventSpec",
    "Label",
    "MetricSpec",
    "SpanSpec",
    "clean",
    "error_type_of",
]

OTHER: Final = "_other"
"""The label value that stands for all that a cap leaves out."""

NO_TASK: Final = "_none"
"""The task label of what the engine ended itself: a cascade, a `destroy` from outside of any task."""

COMMON_LABELS: Final = ("engine", "dag")
RESOURCES: Final = ("workers", "live_contexts", "pending", "threads", "processes")
WORKER_STATES: Final = ("idle", "busy")
RUN_OUTCOMES: Final = ("ok", "failed", "deadlocked", "cancelled", "deadline")
POOLS: Final = ("thread", "process")
RESTART_KINDS: Final = ("stream", "service", "thread")
REJECT_REASONS: Final = ("queue_full", "not_accepting", "duplicate", "invalid")
PHASES: Final = ("starting", "accepting", "draining", "stopped")

Board = Literal["overview", "tasks", "contexts", "engine"]
TaskSet = Literal["all", "join", "pulled", "restarted"]


@dataclass(frozen=True, slots=True)
class Label:
    """One label of a metric, beside `engine` and `dag`.

    values: the closed set, or empty for names that are not known up front. cap: how many values are told apart; the
    rest is `_other`.
    """

    name: str
    values: tuple[str, ...] = ()
    cap: int | None = None


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric, as it is exposed.

    name: with its suffix, as queried (a histogram's without `_bucket`). labels: those beside `engine` and `dag`.
    help: one sentence. unit: "seconds" or empty (plain counts). source: the facts of `core.observer` it is counted
    from, or "scrape" where it is read from living runs. exemplars: whether buckets lead to kept traces. board: the
    dashboard that shows it. bad: what a bad value looks like and what to do first, for panels. tasks: which tasks have
    series. optional: whether it has no series while there is nothing to tell, rather than 0. scope: whether it is told
    of each DAG, of an engine as a whole (`dag="_all"`), or of both, what is known by DAG being left out of `_all`.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[Label, ...] = ()
    unit: str = ""
    source: str = "scrape"
    exemplars: bool = False
    board: Board = "engine"
    bad: str = ""
    tasks: TaskSet = "all"
    optional: bool = False
    scope: Literal["dag", "engine", "both"] = "dag"

    @property
    def family(self) -> str:
        """The name of its family in OpenMetrics: without `_total` and `_info`."""
        return self.name.removesuffix("_total").removesuffix("_info")

    @property
    def panel_unit(self) -> str:
        """Grafana's id for the unit of a panel that shows it (a counter as a rate)."""
        if self.name.endswith("_timestamp_seconds"):
            return "dateTimeFromNow"
        if self.unit == "seconds":
            return "percentunit" if self.kind == "counter" else "s"
        return "ops" if self.kind == "counter" else "short"

    def label_names(self, low: bool = False) -> tuple[str, ...]:
        """Names of its own labels; with `low` (cardinality) without `task`."""
        return tuple(label.name for label in self.labels if not (low and label.name == "task"))

    def closed_label_sets(self, low: bool = False) -> Iterator[tuple[str, ...]]:
        """Every combination of label values that is known up front; nothing if one of the labels is open.

        `error_type` counts as closed with the one value `_other`.
        """
        labels = [label for label in self.labels if not (low and label.name == "task")]
        return product(*(label.values for label in labels))


@dataclass(frozen=True, slots=True)
class SpanSpec:
    """One kind of span.

    name: `{}` stands for a registered name. links: values of `obsdag.link.type` that its links may have.
    """

    name: str
    kind: Literal["CONSUMER", "INTERNAL", "PRODUCER"]
    parent: str
    meaning: str
    links: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttributeSpec:
    """One attribute. key: `{}` stands for a member of a closed set. on: the spans, links or resource that carry it."""

    key: str
    type: Literal["string", "int", "double", "bool"]
    on: str
    meaning: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EventSpec:
    """One log event.

    keys: those beside `engine` and `dag`. source: the fact it is made from. throttled: repeats say `suppressed=N`.
    """

    name: str
    level: Literal["debug", "info", "warning", "error"]
    meaning: str
    keys: tuple[str, ...] = ()
    source: str = ""
    throttled: bool = False


def error_type_of(error: BaseException) -> str:
    """The `error_type` label and `error.type` attribute: the class's name, with its module unless it is a built-in."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def clean(text: str) -> str:
    """A name that can be written as UTF-8: a lone surrogate would break the scrape, or the batch, of everybody else."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
