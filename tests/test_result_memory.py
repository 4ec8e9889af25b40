"""What a run gave out is freed with the result, and not by the collector (a full look at many outputs takes long)."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from obsdag import DAG, ConcurrencyLimit, Context, Executor, ExecutorConfig, ServeExecutor, SQLiteJournal, Telemetry


@pytest.mark.parametrize("journalled", [False, True])
async def test_a_result_is_freed_by_whoever_drops_it(tmp_path: Path, journalled: bool) -> None:
    dag = DAG("one")

    @dag.task
    async def work(ctx: Context) -> Context:
        return ctx

    given: Any = SQLiteJournal(tmp_path / "j.db") if journalled else None
    async with Executor(dag, config=ExecutorConfig(journal=given)) as executor:
        gc.disable()
        try:
            result = await executor.run([{"n": 1}, {"n": 2}])
            told = weakref.ref(result)
            del result
            assert told() is None
        finally:
            gc.enable()


async def test_contexts_that_waited_are_freed_with_the_result() -> None:
    dag = DAG("waiting")

    @dag.task(retry_times=1, limiter=ConcurrencyLimit(1))
    async def work(ctx: Context) -> Context:
        if ctx.attempt == 1:
            raise ValueError
        return ctx

    config = ExecutorConfig(telemetry=Telemetry.off())
    gc.disable()
    try:
        result = await Executor(dag, config=config).run([{"n": n} for n in range(3)])
        told = [weakref.ref(output) for output in result]
        told += [weakref.ref(output.context) for output in result]
        assert len(told) == 6
        del result
        assert [ref() for ref in told] == [None] * 6
    finally:
        gc.enable()


async def test_children_at_a_join_keep_no_execution_alive_that_nobody_looks_at() -> None:
    dag = DAG("joined")
    makers: list[object] = []

    @dag.task
    async def make(ctx: Context) -> list[Context]:
        children: list[Context] = ctx.create_child(3)
        return children

    @dag.task(after=make)
    async def first(ctx: Context) -> Context:
        return ctx

    @dag.task(after=first)
    async def second(ctx: Context) -> Context:
        return ctx

    @dag.task(kind="join", after=second)
    async def join(ctx: Context, children: list[Context]) -> Context:
        makers.extend(child._maker for child in children)
        return ctx

    await Executor(dag, config=ExecutorConfig(telemetry=Telemetry.off())).run([{}])
    assert makers == [None] * 3


async def test_an_idle_worker_keeps_nothing_of_what_it_did_last() -> None:
    dag = DAG("served")
    told: list[weakref.ref[Context]] = []

    @dag.task
    async def work(ctx: Context) -> Context:
        told.append(weakref.ref(ctx))
        return ctx

    async with ServeExecutor(dag, config=ExecutorConfig(telemetry=Telemetry.off())) as executor:
        gc.disable()
        try:
            for _ in range(3):
                await executor.execute({})
            for _ in range(10):  # the worker is about to look for more
                await asyncio.sleep(0)
            assert [ref() for ref in told] == [None] * 3
        finally:
            gc.enable()
