"""The hand-written loop: what one would write for one fixed graph without an engine.

A heap of (lane, number, ...) entries, a set of finished tasks per item, four worker coroutines, direct awaits. No
errors, limits, telemetry or cancellation: the practical lower limit for any engine in Python, not something
to use. W3 to W5 are written the same way: what the one graph needs and nothing else.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from tests.benchmarks.contenders import Job
from tests.benchmarks.workloads import CHILDREN, GRAPHS, STEPS, WORKERS, Graph

__all__ = ["prepare", "run_graph"]

Item = dict[str, Any]


def prepare(workload: str) -> Job | None:
    """The loop written for one workload."""
    if workload in ("W1", "W2"):
        return partial(run_graph, GRAPHS[workload], _no_op_of)
    return {"W3": run_fan_out, "W4": run_threads, "W5": run_retries}[workload]


async def _no_op(item: Item) -> Item:
    return item


def _no_op_of(task: int) -> Callable[[Item], Awaitable[Item]]:
    return _no_op


async def run_graph(graph: Graph, function: Callable[[int], Callable[[Item], Awaitable[Any]]], items: int) -> int:
    """Drives `items` through `graph`, each task by `function(task)`; how many came out."""
    upstreams = {task: set(above) for task, above in graph.items()}
    downstreams = {task: [below for below, above in graph.items() if task in above] for task in graph}
    functions = [function(task) for task in graph]
    heap: list[tuple[int, int, Item, int, set[int]]] = []
    number, out = 0, []
    for item in range(items):
        heapq.heappush(heap, (1, number, {"n": item}, 0, set()))
        number += 1

    async def work() -> None:
        nonlocal number
        while heap:
            _, _, item, task, done = heapq.heappop(heap)
            await functions[task](item)
            done.add(task)
            if len(done) == len(upstreams):
                out.append(item)
            for below in downstreams[task]:
                if upstreams[below] <= done:
                    heapq.heappush(heap, (0, -number, item, below, done))
                    number += 1

    await asyncio.gather(*(work() for _ in range(WORKERS)))
    return len(out)


async def run_fan_out(roots: int) -> int:
    """W3: a root's children go through the steps; the last of them brings the root to its join."""
    heap: list[tuple[int, int, Item, int, Any]] = [(1, n, {"n": n}, -1, None) for n in range(roots)]
    number, out = roots, []

    async def make(item: Item) -> list[Item]:
        return [{"n": n} for n in range(CHILDREN)]

    async def join(item: Item, children: list[Item]) -> Item:
        return item

    async def work() -> None:
        nonlocal number
        while heap:
            _, _, item, step, family = heapq.heappop(heap)
            if step < 0:
                children = await make(item)
                family = [len(children), item, children]
                for child in children:
                    heapq.heappush(heap, (0, -number, child, 0, family))
                    number += 1
                continue
            await _no_op(item)
            if step + 1 < STEPS:
                heapq.heappush(heap, (0, -number, item, step + 1, family))
                number += 1
                continue
            family[0] -= 1
            if not family[0]:
                out.append(await join(family[1], family[2]))

    await asyncio.gather(*(work() for _ in range(WORKERS)))
    return len(out)


async def run_threads(items: int) -> int:
    """W4: every task is handed to the default thread pool and awaited."""
    loop = asyncio.get_running_loop()

    def no_op(item: Item) -> Item:
        return item

    def in_thread(task: int) -> Callable[[Item], Awaitable[Item]]:
        return lambda item: loop.run_in_executor(None, no_op, item)

    return await run_graph(GRAPHS["W4"], in_thread, items)


async def run_retries(items: int) -> int:
    """W5: a try around the task that fails once per item; a token bucket in front of the last."""
    rate, burst = 1e9, 1e9
    tokens, filled = burst, time.monotonic()
    failed: set[int] = set()

    async def fails_once(item: Item) -> Item:
        if item["n"] not in failed:
            failed.add(item["n"])
            raise ValueError
        return item

    async def retried(item: Item) -> Item:
        for _ in range(2):
            try:
                return await fails_once(item)
            except ValueError:
                continue
        raise RuntimeError("it fails once only")

    async def limited(item: Item) -> Item:
        nonlocal tokens, filled
        now = time.monotonic()
        tokens, filled = min(burst, tokens + (now - filled) * rate), now
        while tokens < 1:
            await asyncio.sleep((1 - tokens) / rate)
        tokens -= 1
        return await _no_op(item)

    steps = (_no_op, retried, limited)
    return await run_graph(GRAPHS["W4"], steps.__getitem__, items)
