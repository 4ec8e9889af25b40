"""T14: streams, loops and services; maps have their own file."""

from __future__ import annotations

import asyncio
import queue as queues
from collections.abc import AsyncIterator
from typing import Any

import pytest

from obsdag import (
    DAG,
    Context,
    Environment,
)
from tests.rules.helpers import Engine, Log, assert_counts, chain, every_schedule
from tests.rules.test_T_streams_loops_services import GENERATORS, SERVICES, echo, generator_task  # noqa


@every_schedule
async def test_T14_a_loop_that_gives_nothing_is_no_warning(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    dag = DAG()

    @dag.loop
    async def empty(ctx: Context) -> AsyncIterator[Context]:
        if len(ctx) > 5:
            yield ctx.create()

    chain(dag, Log(), "end", after=empty)
    assert_counts(await engine.run(dag, [{}, {}]), dropped=2)
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


@every_schedule
async def test_T14_a_loop_that_yields_its_own_input(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.loop
    async def loop(ctx: Context) -> AsyncIterator[Context]:
        yield ctx.create()
        yield ctx
        yield ctx.create()

    chain(dag, log, "end", after=loop)
    result = await engine.run(dag)
    # Odd, and not said: whatever becomes of it, it becomes one thing, and the run ends.
    assert result.counts["entered"] in (2, 3)  # with the input at the sink the loop is over
    assert len(log) == len({id(ctx) for _, ctx in log})


@every_schedule
@pytest.mark.parametrize("kind", SERVICES)
async def test_T14_a_service_may_answer_in_any_order_and_in_batches(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()
    sizes: list[int] = []

    async def serve(queue: asyncio.Queue[Any], env: Environment) -> None:
        waiting: list[Any] = []
        while True:
            waiting.append(await queue.get())
            if len(waiting) == 4:
                sizes.append(len(waiting))
                for ctx, future in reversed(waiting):
                    future.set_result(ctx)
                waiting = []

    def serve_thread(queue: queues.Queue[Any], env: Environment) -> None:
        waiting: list[Any] = []
        while True:
            waiting.append(queue.get())
            if len(waiting) == 4:
                sizes.append(len(waiting))
                for ctx, future in reversed(waiting):
                    future.set_result(ctx)
                waiting = []

    dag.task(serve if kind == "async" else serve_thread, kind="service", name="serve")
    chain(dag, log, "end", after="serve")
    # Four are in the service at once even with one worker: a context waiting for a service holds no worker.
    result = await engine.run(dag, [{} for _ in range(12)])
    assert sizes == [4, 4, 4]
    assert_counts(result, output=12)


@every_schedule
@pytest.mark.parametrize("kind", SERVICES)
async def test_T14_a_cancelled_run_ends_its_services(engine: Engine, kind: str) -> None:
    dag, loop, got = DAG(), asyncio.get_running_loop(), asyncio.Event()

    async def serve(queue: asyncio.Queue[Any]) -> None:
        while True:
            await queue.get()
            got.set()

    def serve_thread(queue: queues.Queue[Any]) -> None:
        while True:
            queue.get()
            loop.call_soon_threadsafe(got.set)

    dag.task(serve if kind == "async" else serve_thread, kind="service", name="serve")
    running = asyncio.create_task(engine.run(dag, [{}, {}]))
    await got.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
