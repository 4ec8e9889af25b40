"""Executors in situations that a person would look at the page for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from obsdag import DAG, ConcurrencyLimit, Context, ExecutorConfig, RateLimit, ServeExecutor, Telemetry, Tracing

__all__ = ["orders", "steady", "wide"]


def orders() -> DAG:
    """A shop's orders: a limit, a map with a join, a retry, a thread, a branch, failures by chance of the data."""
    dag = DAG("orders")

    @dag.task(limiter=RateLimit(40, burst=10, name="catalog API"))
    async def fetch(ctx: Context) -> Context:
        await asyncio.sleep(ctx.get("fetch", 0.01))
        return ctx

    @dag.task(after=fetch)
    async def check_address(ctx: Context) -> Context:
        await asyncio.sleep(0.03)
        return ctx

    @dag.task(after=fetch, retry_times=2, retry_interval=0.2)
    async def score_risk(ctx: Context) -> Context:
        await asyncio.sleep(0.02)
        if ctx.get("fail"):
            raise ConnectionError(ctx["fail"])
        if ctx.get("flaky") and ctx.attempt == 1:
            raise TimeoutError("risk service did not answer")
        return ctx

    @dag.map(after=[check_address, score_risk])
    async def each_line(ctx: Context) -> AsyncIterator[Context]:
        for n in range(ctx.get("lines", 2)):
            child = ctx.create_child()
            child["seconds"] = ctx.get("stuck", 0.05) if n == 0 else 0.02
            yield child

    @dag.task(after=each_line, limiter=ConcurrencyLimit(12, name="stock database"))
    async def reserve_stock(ctx: Context) -> Context:
        await asyncio.sleep(ctx["seconds"])
        return ctx

    @dag.join(after=reserve_stock)
    async def all_lines(ctx: Context, children: list[Context]) -> Context:
        return ctx

    @dag.task(after=all_lines)
    def render_invoice(ctx: Context) -> Context:
        return ctx

    @dag.task(after=all_lines)
    async def notify_warehouse(ctx: Context) -> Context:
        if ctx.get("freeze"):
            ctx.freeze()
        return ctx

    @dag.task(after=[render_invoice, notify_warehouse])
    async def store(ctx: Context) -> Context:
        await asyncio.sleep(0.01)
        return ctx

    return dag


def wide(tasks: int = 5_000) -> DAG:
    """Many tasks: regions of shops of steps, `region-3/shop-12/load`, each shop a chain, each region one start."""
    dag = DAG("estate")

    async def goes_on(ctx: Context) -> Context:
        return ctx

    start = dag.task(name="start")(goes_on)
    made, region = 1, 0
    while made < tasks:
        head = dag.task(name=f"region-{region}/open", after=[start])(goes_on)
        made += 1
        for shop in range(40):
            before = head
            for step in ("load", "clean", "price", "stock", "publish"):
                if made < tasks:
                    before = dag.task(name=f"region-{region}/shop-{shop}/{step}", after=[before])(goes_on)
                    made += 1
        region += 1
    return dag


def telemetry(engine: str = "shop", **tracing: Any) -> Telemetry:
    """One with a registry of its own, and no lines in the test's log."""
    return Telemetry(engine, CollectorRegistry(), Tracing(**{"mode": "off", **tracing}), logs=False)


@asynccontextmanager
async def steady(dag: DAG, per_s: float = 30.0, seed: int = 7, **settings: Any) -> AsyncIterator[ServeExecutor]:
    """An executor that serves `orders` at a steady rate; what `data` of submissions say is left to chance of `seed`."""
    settings = {"context_worker_num": 16, "task_worker_num": 2, "telemetry": telemetry(), **settings}
    executor = ServeExecutor(dag, config=ExecutorConfig(**settings))
    chance = random.Random(seed)

    async def feed() -> None:
        while True:
            data: dict[str, Any] = {"lines": chance.randint(1, 4), "flaky": chance.random() < 0.1}
            if chance.random() < 0.02:
                data["fail"] = "connection to risk.internal:8443 reset by peer"
            await executor.submit(data)
            await asyncio.sleep(chance.expovariate(per_s))

    async with executor:
        feeding = asyncio.ensure_future(feed())
        try:
            yield executor
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            await executor.drain(0.5)
