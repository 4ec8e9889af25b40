"""Runs the workloads on the contenders in turn, and makes medians of it.

A machine's speed drifts, so single times say little: every round asks each contender once, and what is compared is the
ratio to the hand-written loop of the same round.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.benchmarks.children import CONTENDERS, Child, Receiver, interpreter_of
from tests.benchmarks.workloads import CHILDREN, WORKLOADS

__all__ = ["Row", "compare", "medians"]

Row = dict[str, dict[str, float]]
"""Workload -> figures of one contender."""
BASE = "loop"


def compare(
    names: Iterable[str],
    workloads: Iterable[str],
    repeats: int,
    environments: Path | None,
    quick: bool = False,
    loop: str = "asyncio",
    against: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Row]:
    """Figures by contender and workload. `against`: another checkout, whose obsdag stands beside this one's."""
    rows: dict[str, Row] = {}
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(Receiver())
        children: dict[str, Child] = {}
        for name in names:
            python = interpreter_of(CONTENDERS[name], environments)
            if python is None:
                say(f"{name} is not installed")
                continue
            own_loop = loop if not CONTENDERS[name].environment else "asyncio"
            children[name] = stack.enter_context(Child(python, name, receiver.address, own_loop))
            if against is not None and name.startswith("obsdag"):
                other = Child(python, name, receiver.address, own_loop, against)
                children[f"{name}@{against.name}"] = stack.enter_context(other)
        for workload in workloads:
            say(f"{workload} {WORKLOADS[workload].title}")
            for name, figures in _rounds(children, workload, repeats, quick).items():
                rows.setdefault(name, {})[workload] = figures
    return rows


def _items(name: str, workload: str, quick: bool) -> int:
    items = WORKLOADS[workload].items
    slower = CONTENDERS[name.partition("@")[0]].slower
    return max(1, items // (slower * (50 if quick else 1)))


def _rounds(children: dict[str, Child], workload: str, repeats: int, quick: bool) -> dict[str, dict[str, float]]:
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
    for number in range(repeats + 1):  # the first round warms up
        for name, child in children.items():
            items = _items(name, workload, quick)
            answer = child.ask(workload, items)
            if answer is None:
                continue
            if answer["found"] != items:
                raise RuntimeError(f"{name}, {workload}: {answer['found']} of {items} items came out")
            if number:
                taken[name].append({"per": 1e6 / items / WORKLOADS[workload].executions, **answer})
    figures = medians(taken)
    if workload == "W3":
        for name in figures:
            weighed = children[name].ask(workload, 1, memory=True)
            figures[name]["bytes_per_context"] = weighed["bytes"] / CHILDREN if weighed else 0.0
    return figures


def medians(taken: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """From the answers of each contender, one per round: microseconds, spread, ratio to the loop."""
    found = {}
    for name, answers in taken.items():
        if not answers:
            continue
        us = [answer["seconds"] * answer["per"] for answer in answers]
        figures = {
            "us": statistics.median(us),
            "us_least": min(us),
            "cpu_us": statistics.median(answer["cpu_seconds"] * answer["per"] for answer in answers),
            "per_second": 1e6 / statistics.median(us),
        }
        if taken.get(BASE):
            bases = [answer["seconds"] * answer["per"] for answer in taken[BASE]]
            figures["ratio"] = statistics.median(one / base for one, base in zip(us, bases, strict=True))
            pairs = zip(answers, taken[BASE], strict=True)
            figures["cpu_ratio"] = statistics.median(
                one["cpu_seconds"] * one["per"] / (base["cpu_seconds"] * base["per"]) for one, base in pairs
            )
        found[name] = figures
    return found


def warn(text: str) -> None:
    """Says how far it is, beside the output."""
    print(text, file=sys.stderr, flush=True)
