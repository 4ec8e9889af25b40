"""The short way from an execution to the next does what the general one does, also where contexts have rare parts.

Turns are long: after the end of one an execution goes the general way.
"""

from __future__ import annotations

import asyncio
from typing import Any

from obsdag import DAG, Context, Executor, ExecutorConfig
from obsdag.core.observer import Observer
from obsdag.core.state import RunState

LONG = ExecutorConfig(context_worker_num=4, task_worker_num=0, turn_s=5.0, max_live_contexts=3)


async def test_C5_a_task_that_was_completed_by_a_sibling_is_not_run_again() -> None:
    dag, called = DAG(), list[tuple[str, str]]()
    at_first: dict[str, Context] = {}
    begun, returned = asyncio.Event(), asyncio.Event()

    @dag.map
    async def make(ctx: Context) -> Any:
        yield {"n": "slow"}
        yield {"n": "quick"}

    @dag.task(after=make)
    async def first(ctx: Context) -> Context:
        called.append(("first", ctx["n"]))
        if ctx["n"] == "slow":
            at_first["slow"] = ctx
            begun.set()
            await returned.wait()
            for _ in range(10):  # the sibling's execution ends
                await asyncio.sleep(0)
        return ctx

    @dag.task(after=first)
    async def second(ctx: Context) -> list[Context]:
        called.append(("second", ctx["n"]))
        await begun.wait()
        returned.set()
        return [ctx, at_first["slow"]]

    @dag.task(kind="join", after=second)
    async def join(ctx: Context, children: list[Context]) -> Context:
        called.append(("join", ",".join(child["n"] for child in children)))
        return ctx

    result = await Executor(dag, config=LONG).run([{}])
    assert called == [("first", "slow"), ("first", "quick"), ("second", "quick"), ("join", "slow,quick")]
    assert (result.counts["output"], result.counts["merged"]) == (1, 2)


async def test_E16_an_open_loop_is_not_opened_again_by_what_is_above_it() -> None:
    dag, opened = DAG(), list[str]()
    at_above: dict[str, Context] = {}
    begun, given, gone_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @dag.task
    async def start(ctx: Context) -> Context:
        return ctx

    @dag.task(after=start)
    async def above(ctx: Context) -> Context:
        if ctx["n"] == "slow":
            at_above["slow"] = ctx
            begun.set()
            await gone_on.wait()
            await asyncio.sleep(0.02)  # the loop waits for room meanwhile
            return ctx
        await begun.wait()
        given.set()
        return at_above["slow"]

    @dag.loop(after=above)
    async def loop(ctx: Context) -> Any:
        opened.append(ctx["n"])
        for n in range(6):
            if n > 2:
                await asyncio.sleep(0.01)
            yield Context(None, {"n": n})

    @dag.task(after=loop)
    async def after(ctx: Context) -> Context:
        gone_on.set()
        await asyncio.sleep(0.05)
        return ctx

    @dag.task(after=start)
    async def beside(ctx: Context) -> Context:
        if ctx["n"] == "slow":
            await given.wait()
            await asyncio.sleep(0.02)
        return ctx

    result = await Executor(dag, config=LONG).run([{"n": "slow"}, {"n": "quick"}])
    assert opened == ["slow"]
    assert sorted(output["n"] for output in result) == list(range(6))


async def test_who_released_a_task_is_known_beside_others_that_are_ready() -> None:
    released: dict[str, str] = {}

    class Notes(Observer):
        needs_records = True

        def run_started(self, run: RunState, now: float) -> None:
            self.run = run

        def execution_finished(self, execution: Any, outcome: str, error: BaseException | None, now: float) -> None:
            released[execution.task.id] = execution.released_by.task.id if execution.released_by is not None else ""

    dag = DAG()

    async def passes_on(ctx: Context) -> Context:
        return ctx

    async def waits(ctx: Context) -> Context:
        await asyncio.sleep(0.01)
        return ctx

    for name, function, after in (
        ("start", passes_on, []),
        ("left", waits, ["start"]),
        ("above", passes_on, ["start"]),
        ("below", passes_on, ["above"]),
        ("right", passes_on, ["start"]),
    ):
        dag.task(function, name=name, after=after)
    config = ExecutorConfig(context_worker_num=1, task_worker_num=2, turn_s=5.0, observers=[Notes()])
    await Executor(dag, config=config).run([{}])
    assert released == {"start": "", "left": "start", "above": "start", "below": "above", "right": "start"}
