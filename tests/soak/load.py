"""What the soak runs: executors of every kind of task, with failures, time-outs, cancellations and early ends."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry

from obsdag import (
    DAG,
    ConcurrencyLimit,
    Context,
    Executor,
    ExecutorConfig,
    NoOutputError,
    ObsdagError,
    OutputContext,
    RateLimit,
    RateLimitContext,
    ResourcePool,
    ServeExecutor,
    Telemetry,
)

__all__ = ["Load"]


def double(ctx: Context) -> Context:
    """For a worker process."""
    if ctx["n"] % 97 == 0:
        raise ArithmeticError(ctx["n"])
    ctx["twice"] = 2 * ctx["n"]
    return ctx


def mixed(seed: int, processes: bool) -> DAG:
    """A DAG with a task of every kind; what goes wrong follows from the number of the input."""
    dag = DAG("soak")
    random = Random(seed)

    @dag.task(retry_times=2, retry_interval=0.001)
    async def load(ctx: Context) -> Context:
        await asyncio.sleep(random.random() / 500)
        if ctx["n"] % 11 == 0 and ctx.attempt == 1:
            raise ConnectionError("at first")
        if ctx["n"] % 37 == 0:
            raise ConnectionError("always")
        return ctx

    @dag.task(after=load, timeout=0.02, limiter=ConcurrencyLimit(8))
    async def slow(ctx: Context) -> Context | RateLimitContext:
        if ctx["n"] % 41 == 0:
            await asyncio.sleep(1)
        if ctx["n"] % 43 == 0 and "waited" not in ctx:
            ctx["waited"] = True
            return RateLimitContext(ctx, 0.001)
        return ctx

    @dag.task(after=load, limiter=ResourcePool(object, size=2))
    def threaded(ctx: Context, resource: object) -> Context:
        ctx["hash"] = hash((ctx["n"], id(resource)))
        return ctx

    @dag.stream(after=slow, may_drop=True)
    async def batches() -> AsyncIterator[Any]:
        kept: list[Context] = []
        given: Any = None
        while True:
            ctx: Context = yield given
            kept.append(ctx)
            if len(kept) == 4:
                given, kept = kept, []
            else:
                ctx.freeze()
                given = []

    @dag.router(after=[batches, threaded], targets=["parts", "single"])
    async def route(ctx: Context) -> str:
        return "parts" if ctx["n"] % 3 else "single"

    @dag.map(after=route)
    async def parts(ctx: Context) -> AsyncIterator[Any]:
        for part in range(ctx["n"] % 5):
            yield {"n": ctx["n"], "part": part}

    @dag.task(after=parts)
    async def part(ctx: Context) -> Context | None:
        return None if ctx["n"] % 13 == 0 and ctx["part"] == 1 else ctx

    @dag.join(after=part, on_child_failure="skip")
    async def whole(parent: Context, children: list[Context]) -> Context:
        parent["parts"] = len(children)
        return parent

    @dag.task(after=route, limiter=RateLimit(5_000, burst=100))
    async def single(ctx: Context) -> Any:
        if ctx["n"] % 47 == 0:
            return OutputContext(ctx)
        return [ctx.create(copy_data=True), ctx] if ctx["n"] % 53 == 0 else ctx

    @dag.service(after=[whole, single])
    async def answer(queue: Any) -> None:
        while True:
            ctx, future = await queue.get()
            if isinstance(ctx, Context) and "n" in ctx:
                future.set_result(ctx)
            else:
                return

    if processes:
        dag.task(double, kind="process", after=answer)
    return dag


class Load:
    """Rounds of work until it is told to stop. `contexts`, `runs`: how much was done; `outcomes`: how it ended."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.contexts = 0
        self.runs = 0
        self.outcomes: dict[str, int] = {}
        self.registry = CollectorRegistry()
        self.telemetry = Telemetry(registry=self.registry)
        self.numbers = itertools.count()

    def _config(self, **settings: Any) -> ExecutorConfig:
        return ExecutorConfig(
            context_worker_num=self.random.choice((1, 4, 16)),
            task_worker_num=self.random.choice((0, 1, 3)),
            context_queue_timeout=0.005,
            worker_idle_times=2,
            telemetry=self.telemetry,
            shutdown_grace=1.0,
            **settings,
        )

    def _inputs(self, count: int) -> Iterator[dict[str, int]]:
        return ({"n": next(self.numbers) % 10_007} for _ in range(count))

    def _count(self, counts: dict[str, int]) -> None:
        self.runs += 1
        for name, number in counts.items():
            if name == "entered":
                self.contexts += number
            else:
                self.outcomes[name] = self.outcomes.get(name, 0) + number

    async def round(self) -> None:
        """One run of each sort, one after the other and beside each other."""
        await asyncio.gather(self.run(), self.stream(), self.serve())
        await self.cancelled()
        await self.left()

    async def run(self) -> None:
        """A whole run, now and then with worker processes."""
        processes = self.random.random() < 0.1
        dag = mixed(self.random.randrange(1 << 30), processes)
        result = await Executor(dag, config=self._config(process_pool_worker_num=int(processes))).run(self._inputs(200))
        self._count(dict(result.counts))

    async def stream(self) -> None:
        """A stream with bounded room."""
        dag = mixed(self.random.randrange(1 << 30), False)
        async with Executor(dag, config=self._config(max_live_contexts=20)).stream(self._inputs(200)) as outputs:
            async for _ in outputs:
                pass
            self._count(dict(outputs.counts))

    async def serve(self) -> None:
        """Submissions: waited for, cancelled, timed out, never fetched."""
        async with ServeExecutor(self._served(), config=self._config(result_ttl=0.05)) as server:
            tickets = [await server.submit(data) for data in self._inputs(100)]
            for ticket in tickets[::7]:
                ticket.cancel()
            for ticket in tickets[1::2]:
                try:
                    await ticket.result(timeout=0.5)
                except (ObsdagError, NoOutputError, TimeoutError, asyncio.CancelledError):
                    continue

    def _served(self) -> DAG:
        dag = DAG("served")

        @dag.task(retry_times=1, retry_interval=0.001)
        async def step(ctx: Context) -> Context:
            await asyncio.sleep(0.001)
            if ctx["n"] % 5 == 0:
                raise ValueError(ctx["n"])
            return ctx

        @dag.task(after=step, timeout=0.01)
        def last(ctx: Context) -> Context | None:
            return None if ctx["n"] % 7 == 0 else ctx

        return dag

    async def cancelled(self) -> None:
        """A run that is cancelled somewhere in the middle."""
        dag = mixed(self.random.randrange(1 << 30), False)
        task = asyncio.create_task(Executor(dag, config=self._config()).run(self._inputs(200)))
        await asyncio.sleep(self.random.random() / 20)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            self.runs += 1

    async def left(self) -> None:
        """A stream that is left early."""
        dag = mixed(self.random.randrange(1 << 30), False)
        async with Executor(dag, config=self._config()).stream(self._inputs(200)) as outputs:
            async for _ in outputs:
                break
        self.runs += 1
