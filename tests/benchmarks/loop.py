"""The hand-written loop that obsdag is measured against: what one would write for one fixed graph without an engine.

A heap of (lane, number, ...) entries, a set of finished tasks per item, four worker coroutines, direct awaits. No
errors, retries, limits, telemetry or cancellation: the practical lower limit for any engine in Python, not something
to use.
"""

from __future__ import annotations

import asyncio
import heapq
from typing import Any

__all__ = ["GRAPHS", "Graph", "run_loop"]

Graph = dict[int, tuple[int, ...]]
"""Task number -> the numbers of its upstreams; the last task is the only one with nothing below it."""

GRAPHS: dict[str, Graph] = {
    "W1": {task: (task - 1,) if task else () for task in range(10)},
    "W2": {0: (), 1: (0,), 2: (0,), 3: (0,), 4: (0,), 5: (1, 2, 3, 4)},
}


async def run_loop(graph: Graph, items: int, workers: int = 4) -> int:
    """Drives `items` through `graph`; returns how many came out."""
    upstreams = {task: set(above) for task, above in graph.items()}
    downstreams = {task: [below for below, above in graph.items() if task in above] for task in graph}
    heap: list[tuple[int, int, dict[str, int], int, set[int]]] = []
    number = finished = 0

    async def no_op(item: dict[str, int]) -> dict[str, int]:
        return item

    for item in range(items):
        heapq.heappush(heap, (1, number, {"n": item}, 0, set()))
        number += 1

    async def work() -> None:
        nonlocal number, finished
        while heap:
            _, _, item, task, done = heapq.heappop(heap)
            await no_op(item)
            done.add(task)
            finished += len(done) == len(upstreams)
            for below in downstreams[task]:
                if upstreams[below] <= done:
                    heapq.heappush(heap, (0, -number, item, below, done))
                    number += 1

    await asyncio.gather(*(work() for _ in range(workers)))
    return finished


def check(result: Any, items: int) -> None:
    """Raises AssertionError unless every item came out."""
    assert result == items, f"{result} of {items} items came out"
