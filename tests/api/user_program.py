"""A user's program, of every kind of task, as a strict type checker sees it."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any

from obsdag import (
    DAG,
    ConcurrencyLimit,
    Context,
    Environment,
    Executor,
    ExecutorConfig,
    Exponential,
    Failure,
    Observer,
    OutputContext,
    RateLimit,
    ResourcePool,
    RunResult,
    ServeExecutor,
    Stall,
    StopContext,
    SyncFunctionTask,
    Task,
    TaskConfig,
    worker_local,
)

dag = DAG("orders")
connections = ResourcePool(lambda: {"open": True}, close=lambda connection: connection.clear(), size=2)
shipping = DAG("shipping")


@shipping.task
async def label(ctx: Context) -> Context:
    return ctx


@dag.loop
async def poll(ctx: Context) -> AsyncIterator[Context]:
    for number in range(3):
        made = ctx.create()
        made["number"] = number
        yield made


@dag.task(after=poll, retry_times=3, retry_interval=Exponential(0.1, cap=5.0), timeout=10.0, retry_on=OSError)
async def fetch(ctx: Context, env: Environment) -> Context:
    worker_local.seen = ctx.get("number", 0)
    ctx["dag"] = env.dag.name
    return ctx


@dag.router(after=fetch, targets=["parts", "refuse"])
async def sort(ctx: Context) -> str | list[str]:
    return "parts" if ctx["number"] else ["refuse"]


@dag.task(after=sort, may_drop=True)
def refuse(ctx: Context) -> Context | None:
    return None if ctx["number"] == 0 else ctx


@dag.map(after=sort)
def parts(ctx: Context) -> Iterator[Mapping[str, Any]]:
    yield from ({"part": part} for part in range(4))


@dag.task(after=parts, limiter=[RateLimit(100, per=1.0, burst=10), ConcurrencyLimit(3), connections])
async def store(ctx: Context, *, resource: dict[str, bool]) -> Context:
    ctx["stored"] = resource["open"]
    return ctx


@dag.join(after=store, on_child_failure="skip")
async def together(parent: Context, children: list[Context]) -> Context:
    parent["parts"] = len(children)
    return parent


@dag.service(after=together)
async def price(inbox: asyncio.Queue[tuple[Context, asyncio.Future[Context]]]) -> None:
    while True:
        ctx, answer = await inbox.get()
        if isinstance(ctx, StopContext):
            return
        answer.set_result(ctx)


@dag.service(after=price)
def ledger(inbox: queue.Queue[tuple[Context, Any]]) -> None:
    while True:
        ctx, answer = inbox.get()
        if isinstance(ctx, StopContext):
            return
        answer.set_result(ctx)


@dag.stream(after=ledger)
async def number(ctx: Context) -> AsyncGenerator[Context, Context]:
    seen = 0
    while True:
        seen += 1
        ctx["seen"] = seen
        ctx = yield ctx


def heavy(ctx: Context) -> Context:
    return ctx


inner = dag.include(shipping, name="home", after=number)
last: Task = dag.task(heavy, name="last", after=[inner, "refuse"], kind="foreground")
extra: SyncFunctionTask = dag.add_task(
    SyncFunctionTask(heavy, name="extra", config=TaskConfig(priority=2)), dependencies=last
)


class Watch(Observer):
    def context_failed(self, context: Context, failure: Failure, execution: Any, now: float) -> None:
        print(failure.task, failure.attempts, failure.exception)

    def context_stalled(self, context: Context, stall: Stall, now: float) -> None:
        print(stall.task, stall.missing)


def run() -> RunResult:
    config = ExecutorConfig(context_worker_num=4, task_worker_num=0, observers=(Watch(),))
    result = Executor(dag, config=config).run_sync({"order": number} for number in range(2))
    outputs: list[OutputContext] = result
    failures: list[Failure] = result.failures
    counts: Mapping[str, int] = result.counts
    stalled: list[Stall] = result.stalled
    seconds: float = result.duration_s
    print(len(outputs), failures, dict(counts), stalled, f"{seconds:.3f}")
    return result


async def stream() -> list[int]:
    async with Executor(dag).stream([{"order": 1}]) as outputs:
        return [output["number"] async for output in outputs]


async def serve() -> Any:
    async with ServeExecutor(shipping) as serving:
        ticket = await serving.submit({"order": 1}, id="one", deadline=5.0)
        output = await ticket.result(timeout=1.0)
        return output["order"]


if __name__ == "__main__":
    run()
    print(asyncio.run(stream()), asyncio.run(serve()))
