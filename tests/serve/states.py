"""DAGs whose contexts come to wait in one state of the enumeration, for draining from there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from obsdag import DAG, ConcurrencyLimit, Context
from obsdag.core.states import State

__all__ = ["dag_that_waits"]


def dag_that_waits(state: str) -> tuple[DAG, dict[str, Any], Callable[[], None], int]:
    """The DAG, settings, what releases threads so that nothing is left behind, and the state to wait for."""
    dag, gate = DAG(state), threading.Event()
    settings: dict[str, Any] = {"shutdown_grace": 2.0}
    return {
        "queued": _queued,
        "retry": _retry,
        "limit": _limit,
        "join": _join,
        "frozen": _frozen,
        "thread": _thread,
        "service": _service,
    }[state](dag, gate, settings)


def _queued(dag: DAG, gate: threading.Event, settings: dict[str, Any]) -> Any:
    dag.task(_forever)
    return dag, settings | {"context_worker_num": 1}, gate.set, State.QUEUED


def _retry(dag: DAG, gate: threading.Event, settings: dict[str, Any]) -> Any:
    @dag.task(retry_times=3, retry_interval=1000)
    async def fails(ctx: Context) -> Context:
        raise ValueError(ctx["n"]) if ctx else ValueError

    return dag, settings, gate.set, State.RETRY_WAIT


def _limit(dag: DAG, gate: threading.Event, settings: dict[str, Any]) -> Any:
    dag.task(_forever, limiter=ConcurrencyLimit(1))
    return dag, settings, gate.set, State.LIMIT_WAIT


def _join(dag: DAG, gate: threading.Event, settings: dict[str, Any]) -> Any:
    @dag.map
    async def spread(ctx: Context) -> Any:
        for n in range(2):
            child = ctx.create_child()
            child["n"] = n
            yield child

    @dag.task(after=spread)
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(1000 * ctx["n"])
        return ctx

    @dag.join(after=work)
    async def gather(ctx: Context, children: list[Context]) -> Context:
        return ctx

    return dag, settings | {"context_worker_num": 9}, gate.set, State.JOIN_WAIT


def _frozen(dag: DAG, gate: threading.Event, settings: dict[str, Any]) -> Any:
    @dag.task
    async def freeze(ctx: Context) -> Context:
        ctx.freeze()
        return ctx

    dag.task(_forever, after=freeze)
    return dag, settings, gate.set, State.FROZEN


def _thread(dag: DAG, gate: threading.Event, settings: dict[str, Any]) -> Any:
    @dag.task
    def block(ctx: Context) -> Context:
        gate.wait(10)
        return ctx

    return dag, settings | {"thread_pool_worker_num": 1}, gate.set, State.POOL_WAIT


def _service(dag: DAG, gate: threading.Event, settings: dict[str, Any]) -> Any:
    @dag.service
    async def silent(queue: asyncio.Queue[Any]) -> None:
        while True:
            await queue.get()

    return dag, settings, gate.set, State.SERVICE_WAIT


async def _forever(ctx: Context) -> Context:
    await asyncio.Event().wait()
    return ctx
