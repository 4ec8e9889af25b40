"""Traces of random DAGs keep every rule of shape; one of a killed process was seen (TELEMETRY 3)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from random import Random
from typing import Any

import pytest

from obsdag import DAG, Context, Observer
from obsdag.telemetry.tracing import Tracing
from tests.otlp_receiver import OtlpReceiver
from tests.telemetry.tracing_helpers import Collected, check_shape, run_traced, telemetry_of


class Counter(Observer):
    """How many executions there were."""

    executions = 0

    def execution_finished(self, execution: Any, outcome: str, error: BaseException | None, now: float) -> None:
        self.executions += 1


def random_dag(chance: Random) -> DAG:
    dag = DAG("random")
    names: list[str] = []
    for number in range(chance.randint(2, 7)):
        after = chance.sample(names, min(len(names), chance.randint(0, 2)))
        kind = chance.choice(["plain", "plain", "plain", "thread", "children", "roots", "loop"])
        name = f"{kind}{number}"
        dag.task(name=name, after=after, retry_times=chance.randint(0, 2), **_options(kind))(_function(kind, chance))
        names.append(name)
    return dag


def _options(kind: str) -> dict[str, Any]:
    return {"kind": "loop"} if kind == "loop" else {}


def _function(kind: str, chance: Random) -> Any:
    def perhaps_fail() -> None:
        if chance.random() < 0.15:
            raise ValueError("by chance")

    async def plain(ctx: Context) -> Any:
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.003)
        perhaps_fail()
        if chance.random() < 0.05:
            ctx.destroy()
        return ctx

    def thread(ctx: Context) -> Any:
        perhaps_fail()
        return ctx

    async def children(ctx: Context) -> Any:
        made = ctx.create_child(chance.randint(1, 3))
        perhaps_fail()
        return [*made, ctx] if chance.random() < 0.3 else made

    async def roots(ctx: Context) -> Any:
        return [ctx.create() for _ in range(chance.randint(1, 2))]

    async def loop(ctx: Context) -> Any:
        for _ in range(chance.randint(0, 3)):
            perhaps_fail()
            yield ctx.create_child() if chance.random() < 0.5 else ctx.create()

    return {"plain": plain, "thread": thread, "children": children, "roots": roots, "loop": loop}[kind]


@pytest.mark.parametrize("seed", range(60))
async def test_every_trace_of_a_random_run_is_whole(seed: int) -> None:
    chance, kept = Random(seed), Collected()
    most = chance.choice([3, 10, 1_000])
    tracing = Tracing([kept], sample=1.0, max_spans_per_trace=most, keep_budget_per_s=100_000)
    counter = Counter()
    telemetry = telemetry_of(tracing, observers=[counter])

    result = await run_traced(
        random_dag(chance),
        [{"n": n} for n in range(12)],
        tracing=tracing,
        telemetry=telemetry,
        context_worker_num=chance.randint(1, 4),
        task_worker_num=chance.randint(0, 3),
        thread_pool_worker_num=2,
        debug=True,
    )

    spans = kept.spans
    check_shape(spans)
    assert telemetry.stats.dropped["observers", "observer_failed"] == 0
    assert sum(telemetry.stats.traces.values()) == sum(1 for span in spans if not _is_part(span) and _is_top(span))
    assert sum(1 for span in spans if span.name.startswith("execute ")) == counter.executions > 0
    assert telemetry.stats.gauge("spans_buffered") == 0
    assert tracing._pipeline._taken == 0
    assert result.counts["entered"] >= 12


def _is_part(span: Any) -> bool:
    return "obsdag.continuation" in span.attributes


def _is_top(span: Any) -> bool:
    """A root's own span: that of a context, or of a pull that gave nothing."""
    return span.name.startswith("context ") or (span.name.startswith("execute ") and not span.parent_id)


PROGRAM = """
import asyncio, sys
from obsdag import DAG, Executor, ExecutorConfig, Telemetry, Tracing

dag = DAG("stuck")

@dag.task
async def load(ctx):
    return ctx

@dag.task(after=load)
async def hang(ctx):
    await asyncio.sleep(60)
    return ctx

tracing = Tracing.otlp(sys.argv[1], sample=0.0, slow_after=0.2)
asyncio.run(Executor(dag, config=ExecutorConfig(telemetry=Telemetry(tracing=tracing, logs=False))).run())
"""


def test_a_context_that_hangs_in_a_process_that_is_killed_was_seen() -> None:
    with OtlpReceiver() as receiver:
        program = subprocess.Popen([sys.executable, "-c", PROGRAM, receiver.endpoint])
        try:
            spans = receiver.wait(lambda spans: {"execute load", "open stuck"} <= {span.name for span in spans}, 30.0)
        finally:
            os.kill(program.pid, signal.SIGKILL)
            program.wait()

    marker = next(span for span in spans if span.name == "open stuck")
    assert marker.attributes["obsdag.open.tasks"] == ["hang"]
    assert len({span.trace_id for span in spans}) == 1
