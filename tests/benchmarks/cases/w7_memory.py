"""W7: memory of a context that waits, beyond its data: queued, at a join, for a limit, for a retry, frozen."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

from obsdag import DAG, ConcurrencyLimit, Context, Executor, ExecutorConfig, Telemetry

__all__ = ["run"]


class Scale:
    """Weighs what `number` contexts hold when all but the last one wait, and then lets the run end."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.weighed = asyncio.Event()
        self.bytes_each = 0.0

    def start(self) -> None:
        gc.collect()
        tracemalloc.start()
        data = [{"n": number} for number in range(self.number)]
        self._data = tracemalloc.get_traced_memory()[0]
        del data
        self._before = tracemalloc.get_traced_memory()[0]

    async def weigh(self, waiting: Callable[[], int]) -> None:
        """Called in the last context's task: waits until all others are where they should be."""
        while waiting() < self.number - 1:
            await asyncio.sleep(0.01)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - self._before
        tracemalloc.stop()
        self.bytes_each = (taken - self._data) / self.number
        self.weighed.set()
        await asyncio.Event().wait()


def run(quick: bool) -> dict[str, float]:
    """Bytes per waiting context, by what it waits for."""
    number = 500 if quick else 20_000
    found = {}
    for name, build in (
        ("queued", _queued),
        ("at a join", _at_join),
        ("for a limit", _for_limit),
        ("for a retry", _for_retry),
        ("frozen", _frozen),
    ):
        found[f"{name}, bytes"] = asyncio.run(_weigh(build, number))
    return found


async def _weigh(build: Callable[[DAG, Scale], None], number: int) -> float:
    scale, dag = Scale(number), DAG("memory")

    @dag.task()
    async def make(context: Context) -> list[Context]:
        scale.start()
        return _made(context, number, children=build is _at_join, freeze=build is _frozen)

    build(dag, scale)
    config = ExecutorConfig(context_worker_num=2, telemetry=Telemetry.off(), max_live_contexts=10_000_000)
    running = asyncio.create_task(Executor(dag, config=config).run())
    weighed = asyncio.create_task(scale.weighed.wait())
    await asyncio.wait((running, weighed), return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        await running
        raise RuntimeError("the run ended before its contexts waited")
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    return scale.bytes_each


def _made(context: Context, number: int, children: bool, freeze: bool) -> list[Context]:
    made: list[Context] = context.create_child(number) if children else [context.create() for _ in range(number)]
    for n, each in enumerate(made):
        each["n"] = n
        if freeze and n < number - 1:
            each.freeze()
    return made


def _last(context: Context, scale: Scale) -> bool:
    return bool(context["n"] == scale.number - 1)


def _run_of(context: Context) -> Any:
    return context._run


def _queued(dag: DAG, scale: Scale) -> None:
    """The first keeps both workers' turn: nobody else is taken from the queue."""

    @dag.task(after="make")
    async def work(context: Context) -> Context:
        if context["n"] < 2:
            run = _run_of(context)
            await scale.weigh(lambda: run.queue.size + 1 if context["n"] == 0 else 0)
        return context


def _at_join(dag: DAG, scale: Scale) -> None:
    @dag.task(after="make")
    async def work(context: Context) -> Context:
        if _last(context, scale):
            run = _run_of(context)
            await scale.weigh(lambda: run.at_joins)
        return context

    @dag.task(kind="join", after=work)
    async def join(context: Context, children: list[Context]) -> Context:
        return context


def _for_limit(dag: DAG, scale: Scale) -> None:
    @dag.task(after="make", limiter=ConcurrencyLimit(1))
    async def work(context: Context) -> Context:
        run = _run_of(context)
        await scale.weigh(lambda: run.waiting_limits)
        return context


def _for_retry(dag: DAG, scale: Scale) -> None:
    @dag.task(after="make", retry_times=1, retry_interval=3600.0)
    async def work(context: Context) -> Context:
        if _last(context, scale):
            run = _run_of(context)
            await scale.weigh(lambda: run.timers_armed)
        raise ValueError


def _frozen(dag: DAG, scale: Scale) -> None:
    @dag.task(after="make")
    async def work(context: Context) -> Context:
        await scale.weigh(lambda: scale.number)
        return context
