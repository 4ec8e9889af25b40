"""One contender in a process of its own: it is asked for runs, one per line of standard input, and answers with times.

    python -m tests.benchmarks.child NAME [--loop uvloop]

A request is a JSON object with `workload`, `items` and perhaps `memory`; the answer has `seconds`, `cpu_seconds` (all
threads), `found` (roots that came out) and what the contender adds; with `memory`, `bytes` instead of times: the peak
of what the run allocated. Building graphs and starting the loop are not timed. It runs on interpreters that
have the contender's own library only.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import json
import os
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any


async def _timed(job: Callable[[int], Any], items: int) -> dict[str, Any]:
    began, cpu = time.perf_counter(), time.process_time()
    found = await job(items)
    answer = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    return answer | (found if isinstance(found, dict) else {"found": found})


async def _weighed(job: Callable[[int], Any], items: int) -> dict[str, Any]:
    await job(items)  # what is made once, and kept, is not what an item costs
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    await job(items)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"bytes": peak - before}


def _run(factory: Any, coroutine: Any) -> Any:
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(coroutine)


def main() -> None:
    """Answers until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not end up among the answers
    factory = importlib.import_module("uvloop").new_event_loop if options.loop == "uvloop" else None
    contender = importlib.import_module(f"tests.benchmarks.contenders.{options.name}")
    jobs: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        workload, items = request["workload"], request["items"]
        if workload not in jobs:
            jobs[workload] = contender.prepare(workload)
        measure = _weighed if request.get("memory") else _timed
        gc.collect()
        job = jobs[workload]
        print(json.dumps(None if job is None else _run(factory, measure(job, items))), file=answers)


if __name__ == "__main__":
    main()
