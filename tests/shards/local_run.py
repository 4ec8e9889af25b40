"""A program for test_local.py: a run on a cluster of its own, and who could reach that."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import ray

from obsdag import DAG, Context
from obsdag.ray import RayExecutor

dag = DAG("by value")
STEP = 2


@dag.task
async def add(context: Context) -> Context:
    context["x"] += STEP
    return context


def listeners() -> list[str]:
    """Addresses on which this process and its descendants listen, as /proc shows them."""
    pids, inodes = [os.getpid()], set()
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += map(int, task.read_text().split())
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                found.append(words[1].partition(":")[0])
    return found


async def main() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    async with RayExecutor(dag, shards=1) as executor:
        result = await executor.run({"x": number} for number in range(1000))
        found = listeners()
    assert not ray.is_initialized(), "what the executor connected, it disconnects"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ
    print(json.dumps({"sum": sum(each["x"] for each in result), "counts": result.counts, "listeners": found}))


if __name__ == "__main__":
    asyncio.run(main())
