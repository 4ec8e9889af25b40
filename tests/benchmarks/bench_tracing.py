"""What tracing costs: per execution and root that are not kept, and per span that is.

    python tests/benchmarks/bench_tracing.py

The facts are called on a real run's records, without a shell: the least of many short rounds, with the loop's own cost
taken off. The last figures are whole runs of a chain of 10 no-op tasks, as seconds of the run's thread.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import time
from collections.abc import Callable
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

from obsdag import DAG, Context, Executor, ExecutorConfig, Observer, Runtime
from obsdag.core.state import RunState
from obsdag.telemetry.deferred import DeferredTracer
from obsdag.telemetry.executions import TracedExecution
from obsdag.telemetry.materialize import build_spans
from obsdag.telemetry.tracing import Tracing

ROUNDS, CALLS, CONTEXTS = 300, 1_000, 2_000


class Nowhere(SpanProcessor):
    """Takes spans and forgets them."""

    def on_end(self, span: ReadableSpan) -> None:
        pass


class Given:
    """The part of a `Telemetry` that an executor needs, with observers as given."""

    engine = "bench"

    def __init__(self, make: Callable[[RunState], list[Observer]]) -> None:
        self._make = make

    def observers(self, run: RunState, pools: Any = None) -> list[Observer]:
        return self._make(run)

    async def run_closed(self, run: RunState) -> None:
        pass


def chain(length: int = 10) -> DAG:
    dag = DAG("bench")
    for number in range(length):
        dag.task(name=f"task{number}", after=[f"task{number - 1}"] if number else [])(_pass_on)
    return dag


async def _pass_on(ctx: Context) -> Context:
    return ctx


def least_us(call: Callable[[], object], before: Callable[[], object]) -> float:
    best = 1.0
    for _ in range(ROUNDS):
        before()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - began) / CALLS)
    return best * 1e6


def facts() -> None:
    """Per execution and per root, not kept; per span, kept."""
    run = RunState(chain().build(), ExecutorConfig(), Runtime(), time.monotonic)
    tracer = Tracing([Nowhere()], sample=0.0).observers(run)[0]
    assert isinstance(tracer, DeferredTracer)
    context = Context()
    run.accept(context, 0.0)
    tracer.context_entered(context, "input", None, 0.0)
    execution = TracedExecution.begun(context, 1, 1, 0.0, 0)
    root = context._trace.root

    def one_execution() -> None:
        execution.span = None
        tracer.execution_started(execution, 0.0)
        tracer.execution_finished(execution, "success", None, 0.0)

    def one_root() -> None:
        tracer.context_entered(entering, "input", None, 0.0)
        tracer.context_finished(entering, "output", 0.0)
        entering._trace = None

    def reset() -> None:
        root.records.clear()
        root.left = tracer.room = 1 << 40

    def nothing() -> None:
        execution.span = None

    entering = Context()
    empty = least_us(nothing, reset)
    print(f"execution, not kept   {least_us(one_execution, reset) - empty:6.3f} us")
    print(f"root, not kept        {least_us(one_root, reset) - empty:6.3f} us")
    reset()
    for _ in range(CALLS):
        one_execution()
    execution.ended = 0.001
    records = [(execution.own_span(), 1, 1, 0.0, 0.001, 0, 0, None, "success", None)] * CALLS
    began = time.perf_counter()
    count = sum(1 for _ in build_spans(tracer, root, records, False))
    print(f"span, built           {(time.perf_counter() - began) / count * 1e6:6.3f} us, off the loop's thread")


async def whole_run(telemetry: Any) -> float:
    executor = Executor(chain(), config=ExecutorConfig(telemetry=telemetry))
    began = time.thread_time()
    await executor.run({"n": n} for n in range(CONTEXTS))
    return (time.thread_time() - began) / CONTEXTS / 10 * 1e6


def runs() -> None:
    """Whole runs: per execution, with and without."""
    tracings = {share: Tracing([Nowhere()], sample=share) for share in (0.0, 0.01)}
    candidates = {"without": Given(lambda run: [])} | {
        f"sample={share}": Given(tracing.observers) for share, tracing in tracings.items()
    }
    best = dict.fromkeys(candidates, 1e9)
    for _ in range(12):
        for name, telemetry in candidates.items():
            best[name] = min(best[name], asyncio.run(whole_run(telemetry)))
    for name, took in best.items():
        print(f"run, {name:16} {took:6.3f} us per execution, {took / best['without']:.2f} x")


if __name__ == "__main__":
    gc.disable()
    contextvars.copy_context().run(facts)
    gc.enable()
    runs()
