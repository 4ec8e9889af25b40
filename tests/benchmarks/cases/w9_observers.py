"""W9: what a scrape costs a busy run, and what deciding and building traces costs, by the share of them that is kept.

CPU seconds of the loop's thread: what other threads take shows as time that it had to wait for the GIL, in `gap`.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from obsdag import DAG, Executor, ExecutorConfig, Telemetry, Tracing
from tests.benchmarks.contenders.ours import graph_dag
from tests.benchmarks.workloads import GRAPHS, WORKERS

__all__ = ["run"]


class Nowhere(SpanProcessor):
    """Takes spans and forgets them."""

    def on_end(self, span: ReadableSpan) -> None:
        pass


def run(quick: bool) -> dict[str, float]:
    """Microseconds per execution by what is watched, and milliseconds of a scrape."""
    items, repeats = (100, 2) if quick else (3_000, 9)
    dag = graph_dag(GRAPHS["W1"])
    watched = {"off": Telemetry.off(), "metrics": _telemetry(Tracing(mode="off"))}
    for share in (0.0, 0.01, 1.0):
        watched[f"traces, {share:g} kept"] = _telemetry(Tracing([Nowhere()], sample=share, max_buffered_spans=10**6))
    us: dict[str, list[float]] = {name: [] for name in watched}
    for _ in range(repeats):
        for name, telemetry in watched.items():
            gc.collect()
            us[name].append(asyncio.run(_thread_time(dag, telemetry, items)) / items / len(GRAPHS["W1"]) * 1e6)
    found = {f"{name}, us": statistics.median(taken) for name, taken in us.items()}
    return found | _scrapes(dag, items, repeats)


def _telemetry(tracing: Tracing) -> Telemetry:
    return Telemetry(engine="benchmark", registry=CollectorRegistry(), tracing=tracing)


async def _thread_time(dag: DAG, telemetry: Telemetry, items: int) -> float:
    executor = Executor(dag, config=ExecutorConfig(context_worker_num=WORKERS, telemetry=telemetry))
    began = time.thread_time()
    assert len(await executor.run({"n": n} for n in range(items))) == items
    return time.thread_time() - began


def _scrapes(dag: DAG, items: int, repeats: int) -> dict[str, float]:
    """Scrapes in a thread while a run goes on: their time, and the longest that the loop was kept from turning."""
    registry = CollectorRegistry()
    telemetry = Telemetry(engine="benchmark", registry=registry, tracing=Tracing(mode="off"))
    executor = Executor(dag, config=ExecutorConfig(context_worker_num=WORKERS, telemetry=telemetry))
    taken: list[float] = []
    gaps: list[float] = []

    def scrape() -> None:
        for _ in range(repeats):
            began = time.perf_counter()
            generate_latest(registry)
            taken.append(time.perf_counter() - began)
            time.sleep(0.05)

    async def watch() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0)
            gaps.append(time.perf_counter() - began)

    async def busy() -> None:
        watching, scraping = asyncio.create_task(watch()), asyncio.create_task(asyncio.to_thread(scrape))
        while not scraping.done():
            await executor.run({"n": n} for n in range(items))
        watching.cancel()
        await scraping

    asyncio.run(busy())
    gaps.sort()
    return {"scrape, ms": statistics.median(taken) * 1e3, "p99 gap of the loop, ms": gaps[int(len(gaps) * 0.99)] * 1e3}
