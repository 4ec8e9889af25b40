"""A DAG as Mermaid, Graphviz, a dict or SVG (SEMANTICS G6). Ids may hold any characters, and are shown escaped."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from obsdag.layout import Layout, lay_out
from obsdag.plan import topological_order
from obsdag.tasks.base import Task
from obsdag.tasks.join import JoinTask
from obsdag.tasks.remote import RemoteTask
from obsdag.tasks.router import RouterTask

if TYPE_CHECKING:
    from obsdag.graph import DAG

__all__ = ["to_dict", "to_dot", "to_mermaid", "to_svg"]

_MERMAID_SHAPES: dict[str, tuple[str, str]] = {
    "function": ("[", "]"),
    "router": ("{", "}"),
    "stream": ("[/", "/]"),
    "loop": ("([", "])"),
    "service": ("[[", "]]"),
    "map": ("[/", "\\]"),
    "join": ("[\\", "/]"),
    "node": ("((", "))"),
}
_DOT_SHAPES = {
    "function": "box",
    "router": "diamond",
    "stream": "parallelogram",
    "loop": "octagon",
    "service": "component",
    "map": "trapezium",
    "join": "invtrapezium",
    "node": "circle",
}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def to_dict(dag: DAG, internal: bool = False) -> dict[str, Any]:
    """`DAG.to_dict`: nodes in order of definition, edges in that of their ends; nothing depends on the process."""
    nodes = []
    for task in _tasks(dag, internal):
        node: dict[str, Any] = {"id": task.id, "kind": task.kind, "config": _without_addresses(task.config.to_dict())}
        if isinstance(task, RouterTask) and task.targets is not None:
            node["targets"] = list(task.targets)
        if isinstance(task, RemoteTask) and task.resources:
            node["resources"] = dict(task.resources)
        if isinstance(task, JoinTask):
            node["on_child_failure"] = task.on_child_failure
        nodes.append(node)
    place = {node["id"]: i for i, node in enumerate(nodes)}
    edges = sorted(dag.edges(internal), key=lambda edge: (place[edge[0]], place[edge[1]]))
    return {"name": dag.name, "nodes": nodes, "edges": [list(edge) for edge in edges]}


def to_mermaid(dag: DAG, internal: bool = False) -> str:
    """`DAG.to_mermaid`."""
    tasks = _tasks(dag, internal)
    handle = {task.id: f"t{i}" for i, task in enumerate(tasks)}
    lines = ["flowchart TD"]
    for task in tasks:
        opening, closing = _MERMAID_SHAPES.get(task.shape, ("[", "]"))
        lines.append(f'    {handle[task.id]}{opening}"{_mermaid_text(task.id)}"{closing}')
    lines += [f"    {handle[above]} --> {handle[below]}" for above, below in dag.edges(internal)]
    return "\n".join(lines) + "\n"


def to_dot(dag: DAG, internal: bool = False) -> str:
    """`DAG.to_dot`."""
    tasks = _tasks(dag, internal)
    handle = {task.id: f"t{i}" for i, task in enumerate(tasks)}
    lines = [f"digraph {_dot_text(dag.name)} {{", '    node [fontname="sans-serif"];']
    lines += [
        f"    {handle[task.id]} [label={_dot_text(task.id)}, shape={_DOT_SHAPES.get(task.shape, 'box')}];"
        for task in tasks
    ]
    lines += [f"    {handle[above]} -> {handle[below]};" for above, below in dag.edges(internal)]
    return "\n".join([*lines, "}"]) + "\n"


def to_svg(dag: DAG, internal: bool = False) -> str:
    """`DAG.to_svg`: a box per task with its id and kind, the whole id as its tooltip."""
    tasks = _tasks(dag, internal)
    place = {task.id: i for i, task in enumerate(tasks)}
    upstreams: list[list[int]] = [[] for _ in tasks]
    for above, below in dag.edges(internal):
        upstreams[place[below]].append(place[above])
    order, cycles = topological_order(upstreams)
    if cycles:  # an unbuilt DAG may have some: without the edges against the order it can still be shown
        at = {node: i for i, node in enumerate(order)}
        upstreams = [[above for above in near if at[above] < at[node]] for node, near in enumerate(upstreams)]
    labels = [_shortened(_printable(task.id)) for task in tasks]
    widths = [
        max(_text_width(label), 0.85 * _text_width(task.kind)) + 28 for label, task in zip(labels, tasks, strict=True)
    ]
    layout = lay_out(widths, upstreams, order, height=_BOX_HEIGHT)
    return _svg(dag.name, tasks, labels, widths, layout)


_BOX_HEIGHT = 44.0
_MARGIN = 16.0
# every rule is for .obsdag: the picture may stand within a page of others
_STYLE = """
    .obsdag { color-scheme: light dark; background: var(--page);
      --page: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #8c959f; --box: #f6f8fa;
      --router: #9a6700; --map: #0969da; --join: #0969da; --stream: #1a7f37; --loop: #1a7f37; --service: #8250df; }
    @media (prefers-color-scheme: dark) {
      .obsdag { --page: #0d1117; --ink: #e6edf3; --soft: #9198a1; --line: #6e7681; --box: #161b22; --router: #d29922;
        --map: #58a6ff; --join: #58a6ff; --stream: #3fb950; --loop: #3fb950; --service: #bc8cff; }
    }
    .obsdag text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; text-anchor: middle; }
    .obsdag .id { font-size: 13px; fill: var(--ink); } .obsdag .kind { font-size: 10.5px; fill: var(--soft); }
    .obsdag rect { fill: var(--box); stroke: var(--line); stroke-width: 1.25; }
    .obsdag .edge { fill: none; stroke: var(--line); stroke-width: 1.25; } .obsdag .head { fill: var(--line); }
    .obsdag .router rect { stroke: var(--router); } .obsdag .map rect { stroke: var(--map); }
    .obsdag .join rect { stroke: var(--join); } .obsdag .stream rect { stroke: var(--stream); }
    .obsdag .loop rect { stroke: var(--loop); } .obsdag .service rect { stroke: var(--service); }
    .obsdag .node rect { stroke-dasharray: 4 3; }
"""


def _svg(name: str, tasks: Sequence[Task], labels: Sequence[str], widths: Sequence[float], layout: Layout) -> str:
    width, height = layout.width + 2 * _MARGIN, layout.height + 2 * _MARGIN
    title = escape(_printable(name))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="obsdag" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="DAG {title}">',
        f"  <title>{title}</title>",
        f"  <style>{_STYLE}  </style>",
        '  <defs><marker id="obsdag-head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path class="head" d="M0 0.5 L8 4 L0 7.5 z"/></marker></defs>',
    ]
    lines += [
        f'  <path class="edge" d="{_curve(points)}" marker-end="url(#obsdag-head)"/>'
        for points in layout.paths.values()
    ]
    for task, label, box, (x, y) in zip(tasks, labels, widths, layout.centers, strict=True):
        left, top = x + _MARGIN - box / 2, y + _MARGIN - _BOX_HEIGHT / 2
        lines.append(
            f'  <g class="{task.shape}"><title>{escape(_printable(task.id))} ({escape(task.kind)})</title>'
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{box:.1f}" height="{_BOX_HEIGHT:.0f}" rx="{_corner(task)}"/>'
            f'<text class="id" x="{x + _MARGIN:.1f}" y="{top + 19:.1f}">{escape(label)}</text>'
            f'<text class="kind" x="{x + _MARGIN:.1f}" y="{top + 34:.1f}">{escape(task.kind)}</text></g>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _corner(task: Task) -> int:
    return 22 if task.shape in ("router", "node") else 6


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """From the lower side of the first box to the upper side of the last: straight in the layers, curved between."""
    half = _BOX_HEIGHT / 2
    x, y = points[0][0] + _MARGIN, points[0][1] + _MARGIN + half
    parts = [f"M{x:.1f} {y:.1f}"]
    for at, point in enumerate(points[1:], start=2):
        next_x, top = point[0] + _MARGIN, point[1] + _MARGIN - half
        middle = (y + top) / 2
        parts.append(f"C{x:.1f} {middle:.1f} {next_x:.1f} {middle:.1f} {next_x:.1f} {top:.1f}")
        x, y = next_x, top + _BOX_HEIGHT
        if at < len(points):
            parts.append(f"V{y:.1f}")
    return " ".join(parts)


def _tasks(dag: DAG, internal: bool) -> list[Task]:
    inner = list(dag.tasks.values())
    return [dag.in_task, *inner, dag.out_task] if internal else inner


def _printable(text: str) -> str:
    # XML has no form at all for most control characters and for lone surrogates
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", re.sub(r"[\t\r\n]+", " ", text))


def _mermaid_text(text: str) -> str:
    # all but the harmless: Mermaid looks for directives (%%), styles (:) and Markdown (*, 1.) within quotes too
    harmless = " -_/,()"
    return "".join(
        sign if sign.isalnum() or sign in harmless or not sign.isascii() else f"#{ord(sign)};"
        for sign in _printable(text)
    )


def _dot_text(text: str) -> str:
    # Graphviz shows "&lt;" as "<" in a label of plain text too
    escaped = re.sub(r"&(?=#?\w+;)", "&amp;", _printable(text)).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _shortened(text: str, most: int = 32) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 1]}\N{HORIZONTAL ELLIPSIS}{text[-most // 2 :]}"


def _text_width(text: str) -> float:
    """About how many pixels a text of 13 pixels takes in a usual sans-serif font."""
    return sum(13.5 if unicodedata.east_asian_width(sign) in "WF" else 7.4 for sign in text)


def _without_addresses(value: Any) -> Any:
    if isinstance(value, str):
        return _ADDRESS.sub("", value)
    if isinstance(value, list):
        return [_without_addresses(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_addresses(item) for key, item in value.items()}
    return value
