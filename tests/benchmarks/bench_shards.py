"""What a Ray cluster costs the driver for each root, and what two shards do that one does not.

    python -m tests.benchmarks.bench_shards [overhead|scaling] [--rounds 5]

overhead: a chain of three tasks that do nothing, by the local engine and by one shard. Times are of CPU, which other
programs disturb least: `loop` is the thread that the caller's event loop runs on, `process` has Ray's own threads too.
scaling: roots of pure Python work, by one shard and by two; time on the wall, so it means something on an idle machine
with two cores only. Both kinds take turns within each round; medians, and the extremes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

from obsdag import DAG, Context, Executor, ExecutorConfig
from obsdag.ray import RayExecutor
from obsdag.telemetry import Telemetry

LIGHT, HEAVY, SPINS = 20_000, 1_000, 60_000
WORKERS = ExecutorConfig(context_worker_num=4, telemetry=Telemetry.off())

light = DAG("light")
heavy = DAG("heavy")


@light.task
async def first(context: Context) -> Context:
    """Does nothing."""
    return context


@light.task(after=first)
async def second(context: Context) -> Context:
    """Does nothing."""
    return context


@light.task(after=second)
async def third(context: Context) -> Context:
    """Does nothing."""
    return context


@heavy.task
async def spin(context: Context) -> Context:
    """Some milliseconds of work that holds the interpreter."""
    total = 0
    for number in range(SPINS):
        total += number
    context["total"] = total
    return context


def numbers(count: int) -> Iterator[dict[str, int]]:
    """Inputs."""
    return ({"x": number} for number in range(count))


async def measured(executor: Any, count: int) -> tuple[float, float, float]:
    """Seconds of a run: CPU of this thread, CPU of this process, on the wall."""
    started = time.thread_time(), time.process_time(), time.perf_counter()
    result = await executor.run(numbers(count))
    ended = time.thread_time(), time.process_time(), time.perf_counter()
    assert result.counts["output"] == count, result.counts
    thread_s, process_s, wall_s = (end - start for start, end in zip(started, ended, strict=True))
    return thread_s, process_s, wall_s


async def turns(executors: dict[str, Any], count: int, rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    """Each executor once in each round, after a run that is not counted."""
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in executors}
    for number in range(rounds + 1):
        for name, executor in executors.items():
            found = await measured(executor, count)
            if number:
                times[name].append(found)
    return times


def spread(values: list[float], unit: str, digits: int = 1) -> str:
    """Median and extremes."""
    return f"{median(values):.{digits}f} {unit} ({min(values):.{digits}f} to {max(values):.{digits}f})"


async def overhead(rounds: int) -> None:
    """The driver's CPU per root."""
    async with RayExecutor(light, WORKERS, shards=1, address="local") as shard:
        times = await turns({"local": Executor(light, config=WORKERS), "one shard": shard}, LIGHT, rounds)
    for name, found in times.items():
        loop, process, wall = ([1e6 * each / LIGHT for each in column] for column in zip(*found, strict=True))
        print(
            f"overhead, {name}: loop {spread(loop, 'us')}, process {spread(process, 'us')}, wall {spread(wall, 'us')}"
        )
    driver_us = [1e6 * each[0] / LIGHT for each in times["one shard"]]
    print(f"overhead: a driver does {1e6 / median(driver_us):,.0f} roots/s at most, by its loop's CPU")


async def scaling(rounds: int) -> None:
    """Two shards over one, of work that keeps a core busy."""
    async with (
        RayExecutor(heavy, WORKERS, shards=1, address="local", shard_options={"num_cpus": 0.5}) as one,
        RayExecutor(heavy, WORKERS, shards=2, shard_options={"num_cpus": 0.5}) as two,
    ):
        times = await turns({"one": one, "two": two}, HEAVY, rounds)
    walls = {name: [each[2] for each in found] for name, found in times.items()}
    ratios = [first / second for first, second in zip(walls["one"], walls["two"], strict=True)]
    print(f"scaling: one {spread(walls['one'], 's', 2)}, two {spread(walls['two'], 's', 2)}, {spread(ratios, 'x', 2)}")


def main() -> None:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("overhead", "scaling"))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name in [given.what] if given.what else ("overhead", "scaling"):
        asyncio.run({"overhead": overhead, "scaling": scaling}[name](given.rounds))


if __name__ == "__main__":
    main()
