"""Endurance: `python -m tests.soak --minutes N` runs mixed load and watches what the process holds.

It prints a table, one line each tenth of the time: memory, descriptors, threads, processes, asyncio tasks, contexts.
Memory is told twice: what is allocated, and what is resident (tests/soak/memory.py tells the difference). Exits with 1
if what is allocated grows by more than the bound after warm-up, the first third, or if anything is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.leaks import Snapshot
from tests.soak.load import Load
from tests.soak.memory import allocated_bytes, resident_bytes

BOUND_MB_PER_HOUR = 1.0


@dataclass
class Sample:
    """What the process holds at one moment; memory in MiB, `at` in seconds since the start."""

    at: float
    live: float
    rss: float
    files: int
    threads: int
    tasks: int
    objects: int
    contexts: int


def _sample(started: float, load: Load) -> Sample:
    rss = resident_bytes() / 2**20
    live = (allocated_bytes() or resident_bytes()) / 2**20
    files = len(list(Path("/proc/self/fd").iterdir()))
    tasks = len(asyncio.all_tasks()) - 1
    objects = len(gc.get_objects())
    return Sample(time.monotonic() - started, live, rss, files, threading.active_count(), tasks, objects, load.contexts)


def _slope(samples: list[Sample], column: str) -> float:
    """MiB per hour of a column, by least squares."""
    if len(samples) < 3:
        return 0.0
    mean_t = sum(s.at for s in samples) / len(samples)
    mean_m = sum(getattr(s, column) for s in samples) / len(samples)
    spread = sum((s.at - mean_t) ** 2 for s in samples)
    return 3600 * sum((s.at - mean_t) * (getattr(s, column) - mean_m) for s in samples) / spread


def _show(sample: Sample) -> None:
    print(
        f"{sample.at / 60:8.1f} {sample.live:9.3f} {sample.rss:9.2f} {sample.files:6d} {sample.threads:8d} "
        f"{sample.tasks:6d} {sample.objects:9d} {sample.contexts:10d}",
        flush=True,
    )


async def _soak(minutes: float, seed: int) -> tuple[list[Sample], Load]:
    load, started = Load(seed), time.monotonic()
    samples: list[Sample] = []
    every = max(1.0, minutes * 60 / 60)
    shown = 0.0
    print(" minutes allocated  RSS MiB  files  threads  tasks   objects   contexts")
    while (now := time.monotonic() - started) < minutes * 60:
        await load.round()
        if now >= len(samples) * every:
            samples.append(_sample(started, load))
            if samples[-1].at >= shown:
                _show(samples[-1])
                shown = samples[-1].at + minutes * 6
    samples.append(_sample(started, load))
    _show(samples[-1])
    await load.telemetry.close()
    return samples, load


def main() -> int:
    """Runs the soak; the exit code says whether it held."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bound", type=float, default=BOUND_MB_PER_HOUR, help="MiB per hour after warm-up")
    arguments = parser.parse_args()
    logging.getLogger("obsdag").setLevel(logging.CRITICAL)
    before = Snapshot.take()
    samples, load = asyncio.run(_soak(arguments.minutes, arguments.seed))
    after_warm_up = [sample for sample in samples if sample.at >= samples[-1].at / 3]
    slope, resident = _slope(after_warm_up, "live"), _slope(after_warm_up, "rss")
    left = before.leftovers(set())
    print(f"{load.runs} runs, {load.contexts} contexts: {load.outcomes}")
    print(
        f"growth after warm-up: {slope:.2f} MiB/h allocated, {resident:.2f} resident; left behind: {left or 'nothing'}"
    )
    steady = arguments.minutes < 10 or slope <= arguments.bound  # in a few minutes the slope means nothing
    return 0 if steady and not left else 1


if __name__ == "__main__":
    sys.exit(main())
