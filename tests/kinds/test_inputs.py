"""Inputs of a run are asked for whenever a worker is free (E4), also those of an async iterable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from obsdag import DAG, Context
from tests.rules.helpers import Engine, assert_counts


async def test_E4_an_async_input_is_asked_while_other_workers_wait() -> None:
    dag = DAG()
    gate = asyncio.Event()

    @dag.task
    async def call(ctx: Context) -> Context:
        if ctx["n"] == 3:
            gate.set()
        await gate.wait()
        return ctx

    async def inputs() -> AsyncIterator[dict[str, int]]:
        for n in range(4):
            yield {"n": n}

    assert_counts(await Engine(4).run(dag, inputs()), output=4)
