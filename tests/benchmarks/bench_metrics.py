"""What metrics cost: per fact, as a ratio to an empty method call, and per scrape.

    python tests/benchmarks/bench_metrics.py [facts]

Figures are medians of several rounds. Ratios are what to compare between machines and versions: the empty method takes
the same arguments as the fact.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from obsdag.config import ExecutorConfig
from obsdag.context import Context
from obsdag.core.observer import Facts, Observer
from obsdag.core.records import Execution
from obsdag.core.state import RunState
from obsdag.graph import DAG
from obsdag.runtime import Runtime
from obsdag.telemetry.metrics import Metrics
from obsdag.telemetry.tally import MetricsObserver

ROUNDS = 7


class Empty(Observer):
    """Every hot fact, and nothing done about it."""

    def execution_finished(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        pass

    def visit_started(self, context: Context, worker: int, lane: int, waited_s: float, now: float) -> None:
        pass

    def visit_finished(self, context: Context, worker: int, busy_s: float, now: float) -> None:
        pass

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        pass


async def _pass_on(ctx: Context) -> Context:
    return ctx


def a_run(tasks: int) -> RunState:
    """A run of a chain, which has not begun."""
    dag = DAG("bench")
    before: str | None = None
    for number in range(tasks):
        name = f"task_{number:03}"
        dag.task(name=name, after=[before] if before else [])(_pass_on)
        before = name
    return RunState(dag.build(), ExecutorConfig(), Runtime(), perf_counter)


def a_finished_root(run: RunState, length: int = 10) -> tuple[Context, Execution]:
    """A root that went through `length` executions, and the last of them."""
    root, execution = Context(), None
    run.accept(root, 0.0)
    for number in range(length):
        following = Execution.begun(root, 1 + number % 5, 1, float(number), 0)
        following.ended, following.outcome = number + 0.02, "success"
        following.released_by, execution = execution, following
    root._ledger = 0.1
    root._maker = execution
    assert execution is not None
    return root, execution


def per_call(call: Callable[[], object], facts: int) -> float:
    """Nanoseconds per fact; `call` tells it `facts` times."""
    figures = []
    for _ in range(ROUNDS):
        gc.collect()
        started = perf_counter()
        call()
        figures.append((perf_counter() - started) / facts * 1e9)
    return median(figures)


def tell(method: Callable[..., None], arguments: tuple[Any, ...], facts: int) -> Callable[[], None]:
    """A loop that tells one fact again and again."""

    def loop() -> None:
        for _ in range(facts):
            method(*arguments)

    return loop


def bench_facts(observer: MetricsObserver, run: RunState, facts: int) -> None:
    """Prints each hot fact beside an empty method that is called the same way."""
    root, execution = a_finished_root(run)
    _, execution_quick = a_finished_root(run)
    execution_quick.ended = execution_quick.started + 1e-6
    told: dict[str, tuple[Any, ...]] = {
        "execution_finished (quick)": (execution_quick, "success", None, 1.0),
        "execution_finished": (execution, "success", None, 1.0),
        "execution_finished (error)": (execution, "error", None, 1.0),
        "visit_started": (root, 0, 1, 0.0002, 1.0),
        "visit_finished": (root, 0, 0.0002, 1.0),
        "context_finished": (root, "output", 1.0),
    }
    print(f"{'fact':28} {'empty':>9} {'metrics':>9} {'ratio':>6}   (ns, called directly)")
    empty = Empty()
    for name, arguments in told.items():
        fact = name.split(" ")[0]
        nothing = per_call(tell(getattr(empty, fact), arguments, facts), facts)
        metrics = per_call(tell(getattr(observer, fact), arguments, facts), facts)
        print(f"{name:28} {nothing:9.1f} {metrics:9.1f} {metrics / nothing:6.2f}")
    compiled = Facts([observer]).execution_finished
    assert compiled is not None
    through = per_call(tell(compiled, told["execution_finished"], facts), facts)
    print(f"{'  through the fan-out':28} {'':9} {through:9.1f}")


def bench_scrape(tasks: int, encode: Callable[[Any], bytes], name: str) -> None:
    """Prints the time of a scrape, and its part that is not text encoding."""
    registry = CollectorRegistry()
    metrics = Metrics("bench", registry)
    run = a_run(tasks)
    observer = metrics.observer(run)
    _, execution = a_finished_root(run)
    for index in range(1, tasks + 1):
        execution.index = index
        observer.execution_finished(execution, "success", None, 1.0)
    whole = per_call(lambda: encode(registry), 1) / 1e6
    collected = per_call(metrics.collector.collect, 1) / 1e6
    lines = encode(registry).count(b"\n")
    print(f"{tasks:5} tasks, {name:12} {lines:6} lines {whole:8.1f} ms, of which collecting {collected:6.1f} ms")


def bench_loop_gap(tasks: int, scrapes: int = 30) -> None:
    """Prints how long an event loop that has work all the time is kept from a turn while a thread scrapes."""
    registry = CollectorRegistry()
    Metrics("bench", registry).declare(a_run(tasks).plan)

    async def gaps() -> list[float]:
        found, before = [], perf_counter()
        scraping = asyncio.gather(*[asyncio.to_thread(_scrapes, registry, scrapes)])
        while not scraping.done():
            await asyncio.sleep(0)
            now = perf_counter()
            found.append(now - before)
            before = now
        await scraping
        return sorted(found)

    found = asyncio.run(gaps())
    long = [gap for gap in found if gap > 0.001] or [0.0]
    p99 = found[int(len(found) * 0.99)] * 1e3
    print(
        f"{tasks:5} tasks, {scrapes} scrapes in a thread: turns of the loop p99 {p99:.2f} ms, "
        f"longest {found[-1] * 1e3:.1f} ms, {len(long)} of {len(found)} above 1 ms, of these the median "
        f"{median(long) * 1e3:.1f} ms and the p99 {long[int(len(long) * 0.99)] * 1e3:.1f} ms"
    )


def _scrapes(registry: CollectorRegistry, count: int) -> None:
    for _ in range(count):
        openmetrics.generate_latest(registry)


def main() -> None:
    facts = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    metrics = Metrics("bench", CollectorRegistry())
    run = a_run(10)
    bench_facts(metrics.observer(run), run, facts)
    for tasks in (10, 100, 1000):
        bench_scrape(tasks, generate_latest, "text")
        bench_scrape(tasks, openmetrics.generate_latest, "OpenMetrics")
    bench_loop_gap(100)


if __name__ == "__main__":
    main()
