"""The engine's cost per execution as a ratio to a hand-written loop, in one run: `python -m tests.benchmarks`.

The two are run in turn, so that a machine whose speed drifts treats both alike; the median of the ratios of neighbors
is what counts, single times are not. `--json` prints the figures for machines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

from obsdag import DAG, Context, Executor, ExecutorConfig
from obsdag.tasks import AsyncFunctionTask
from obsdag.telemetry import Telemetry
from tests.benchmarks.loop import GRAPHS, Graph, check, run_loop


async def no_op(context: Context) -> Context:
    """The task of all workloads: what is measured is the engine."""
    return context


def build(graph: Graph) -> DAG:
    """The graph as a DAG of no-op tasks."""
    dag = DAG("benchmark")
    for task, above in graph.items():
        dag.add_task(AsyncFunctionTask(no_op, name=f"t{task}"), [f"t{upstream}" for upstream in above])
    return dag


def run_obsdag(graph: Graph, items: int) -> int:
    """The graph on obsdag with four workers, observers off."""
    config = ExecutorConfig(context_worker_num=4, telemetry=Telemetry.off())
    return len(asyncio.run(Executor(build(graph), config=config).run([{"n": item} for item in range(items)])))


def us_per_execution(run: Callable[[Graph, int], int], graph: Graph, items: int) -> float:
    """Microseconds per execution of one run, start-up and building included."""
    begun = time.perf_counter()
    found = run(graph, items)
    took = time.perf_counter() - begun
    check(found, items)
    return took / (items * len(graph)) * 1e6


def measure(graph: Graph, items: int, repeats: int) -> dict[str, float]:
    """Medians over `repeats` pairs: microseconds of obsdag and of the loop, and the ratio of neighbors."""
    pairs = []
    for _ in range(repeats):
        ours = us_per_execution(run_obsdag, graph, items)
        loop = us_per_execution(lambda g, n: asyncio.run(run_loop(g, n)), graph, items)
        pairs.append((ours, loop))
    return {
        "obsdag_us": statistics.median(ours for ours, _ in pairs),
        "loop_us": statistics.median(loop for _, loop in pairs),
        "ratio": statistics.median(ours / loop for ours, loop in pairs),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--items", type=int, default=2000, help="contexts per run (2000)")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of runs (9)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    figures = {name: measure(graph, options.items, options.repeats) for name, graph in GRAPHS.items()}
    if options.json:
        json.dump({"python": platform.python_version(), **figures}, sys.stdout, indent=2)
        return 0
    print(f"Python {platform.python_version()}, {options.items} items, medians of {options.repeats}; us per execution")
    for name, row in figures.items():
        print(f"{name}  obsdag {row['obsdag_us']:.2f}  loop {row['loop_us']:.2f}  ratio {row['ratio']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
