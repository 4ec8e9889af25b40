"""Reading dashboards and PromQL: the queries of panels, and the metrics and labels that an expression asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import promql_parser

from obsdag.dashboards import folder

__all__ = ["BOARDS", "FOREIGN", "NAME", "Target", "board", "metrics_in", "panels", "substituted", "targets"]

BOARDS: Final = ("overview", "tasks", "contexts", "engine")

NAME: Final = re.compile(r"_(bucket|sum|count)$")
"""What a histogram's series have behind its name."""

_TARGET = {"job", "instance"}
FOREIGN: Final = {
    "up": _TARGET,
    "scrape_duration_seconds": _TARGET,
    "process_cpu_seconds_total": _TARGET,
    "process_resident_memory_bytes": _TARGET,
    "ALERTS": {"alertname", "alertstate", "engine", "dag"},
}
"""Series that are not obsdag's, and the labels by which they are chosen."""

ALL: Final = dict.fromkeys(("job", "instance", "engine", "dag", "task"), ".*")


def substituted(expr: str, window: str = "1m", chosen: Mapping[str, str] = ALL) -> str:
    """The query as Grafana sends it, with 'All' chosen everywhere unless `chosen` says else."""
    text = expr.replace("$__rate_interval", window)
    return re.sub(r"\$(job|instance|engine|dag|task)\b", lambda found: chosen[found[1]], text)


NESTED: Final = (
    promql_parser.AggregateExpr,
    promql_parser.ParenExpr,
    promql_parser.UnaryExpr,
    promql_parser.SubqueryExpr,
)


def metrics_in(expr: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric that is read, with the labels that its selector names."""
    pending: list[Any] = [promql_parser.parse(expr)]
    while pending:
        node = pending.pop()
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name, f"{expr}: a selector without a name"
            yield node.name, {matcher.name for matcher in node.matchers.matchers}
        elif isinstance(node, promql_parser.MatrixSelector):
            pending.append(node.vector_selector)
        elif isinstance(node, promql_parser.Call):
            pending += node.args
        elif isinstance(node, promql_parser.BinaryExpr):
            pending += [node.lhs, node.rhs]
        elif isinstance(node, NESTED):
            pending.append(node.expr)
        else:
            assert isinstance(node, promql_parser.NumberLiteral | promql_parser.StringLiteral), f"{expr}: {node!r}"


class Target(NamedTuple):
    """One query of one panel of one dashboard."""

    board: str
    panel: dict[str, Any]
    query: dict[str, Any]

    @property
    def expr(self) -> str:
        return str(self.query["expr"])

    @property
    def label(self) -> str:
        return f"{self.board}-{self.panel['title']}-{self.query['refId']}"


def board(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder() / "grafana" / f"{name}.json").read_text())
    return found


def panels(name: str) -> Iterator[dict[str, Any]]:
    for each in board(name)["panels"]:
        if each["type"] != "row":
            yield each
        yield from each.get("panels", ())


def targets() -> list[Target]:
    """All queries of all panels of all dashboards."""
    return [Target(name, each, query) for name in BOARDS for each in panels(name) for query in each["targets"]]
