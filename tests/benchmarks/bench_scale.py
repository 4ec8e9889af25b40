"""Sizes: how late a run ends, and what many contexts, long chains, big maps and long lines cost in memory and time.

    python -m tests.benchmarks.bench_scale [end chain stream map join nested service limit ...]

Each workload runs in a process of its own, so that memory is its own: resident size in MB, as the kernel has it, at the
marks on the way. Times are of one run on whatever else the machine does.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from statistics import median
from typing import Any

from obsdag import DAG, Context, Executor, ExecutorConfig, RateLimit
from obsdag.telemetry import Telemetry
from obsdag.testing import VirtualLoop, run_virtual

MARKS = (100_000, 500_000, 1_000_000)


async def no_op(context: Context) -> Context:
    """The task of most workloads."""
    return context


def executor(dag: DAG, workers: int = 4, **settings: Any) -> Executor:
    """An executor with observers off."""
    config = ExecutorConfig(context_worker_num=workers, telemetry=Telemetry.off(), **settings)
    return Executor(dag, config=config)


def resident_mb() -> float:
    """Of this process, now."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def told(counts: Mapping[str, int]) -> str:
    """The counts that are not 0."""
    return ", ".join(f"{name} {number:,}" for name, number in counts.items() if number)


async def end() -> None:
    """One context, four workers, telemetry as it is by default: from the end of its task to the end of the run."""
    late_ms = []
    for _ in range(200):
        dag, ended = DAG(), []

        @dag.task
        async def work(context: Context, ended: list[float] = ended) -> Context:
            await asyncio.sleep(0.002)
            ended.append(time.perf_counter())
            return context

        await Executor(dag, config=ExecutorConfig(context_worker_num=4)).run()
        late_ms.append((time.perf_counter() - ended[0]) * 1e3)
    late_ms.sort()
    print(f"end: median {median(late_ms):.3f} ms, 99 of 100 within {late_ms[197]:.3f} ms, all within {late_ms[-1]:.3f}")


async def chain() -> None:
    """A chain of 10,000 tasks."""
    dag, above = DAG(), ()
    begun = time.perf_counter()
    for n in range(10_000):
        above = dag.task(no_op, name=f"t{n}", after=above)  # type: ignore[assignment]
    dag.build()
    built = time.perf_counter()
    result = await executor(dag).run([{} for _ in range(10)])
    took = time.perf_counter() - built
    print(f"chain of 10,000: built in {built - begun:.2f} s, 10 contexts in {took:.2f} s: {told(result.counts)}")


async def _through(name: str, dag: DAG, inputs: Any) -> None:
    begun, seen = time.perf_counter(), 0
    async with executor(dag).stream(inputs) as outputs:
        async for _ in outputs:
            seen += 1
            if seen in MARKS:
                print(
                    f"{name}: {seen:,} out after {time.perf_counter() - begun:.1f} s, {resident_mb():.1f} MB",
                    flush=True,
                )
    print(f"{name}: {told(outputs.counts)}")


async def stream() -> None:
    """1,000,000 inputs through two tasks."""
    dag = DAG()
    dag.task(no_op, name="a")
    dag.task(no_op, name="b", after="a")
    await _through("stream", dag, ({"n": n} for n in range(MARKS[-1])))


def _mapped(count: int) -> DAG:
    dag = DAG()

    @dag.map
    async def parts(context: Context) -> AsyncIterator[dict[str, int]]:
        for n in range(count):
            yield {"n": n}

    dag.task(no_op, name="work", after=parts)
    return dag


async def map_() -> None:
    """A map of 1,000,000 items, each an output of its own."""
    await _through("map", _mapped(MARKS[-1]), {})


async def join() -> None:
    """A map of 1,000,000 items and its join, which gets all of them at once."""
    dag = _mapped(MARKS[-1])

    @dag.join(after="work")
    async def together(parent: Context, children: list[Context]) -> Context:
        parent["n"] = len(children)
        return parent

    before, begun = resident_mb(), time.perf_counter()
    (output,) = result = await executor(dag).run({})
    took = time.perf_counter() - begun
    print(f"join of {output['n']:,}: {took:.1f} s, {before:.0f} -> {resident_mb():.0f} MB: {told(result.counts)}")


async def nested() -> None:
    """Three levels of maps and joins: 1,000 x 10 x 10."""
    dag, above = DAG(), ()
    for level, count in enumerate((1_000, 10, 10)):

        def parts(context: Context, count: int = count) -> Iterator[dict[str, int]]:
            return iter([{"n": n} for n in range(count)])

        above = dag.map(parts, name=f"map{level}", after=above)  # type: ignore[assignment]
    below: Any = dag.task(no_op, name="leaf", after=above)
    for level in range(3):

        async def together(parent: Context, children: list[Context]) -> Context:
            parent["leaves"] = sum(child.get("leaves", 1) for child in children)
            return parent

        below = dag.join(together, name=f"join{level}", after=below)
    for workers in (1, 4, 64):
        begun = time.perf_counter()
        (output,) = result = await executor(dag, workers, max_live_contexts=500).run({})
        took = time.perf_counter() - begun
        print(
            f"nested, {workers} workers: {output['leaves']:,} leaves in {took:.1f} s: {told(result.counts)}", flush=True
        )


async def service() -> None:
    """10,000 contexts through a service that answers 100 at once, the last first."""
    dag = DAG()

    @dag.service
    async def answer(queue: asyncio.Queue[Any]) -> None:
        while True:
            calls = [await queue.get() for _ in range(100)]
            for context, future in reversed(calls):
                context["answer"] = -context["n"]
                future.set_result(context)

    begun = time.perf_counter()
    result = await executor(dag, 1).run([{"n": n} for n in range(10_000)])
    own = sum(output["answer"] == -output["n"] for output in result)
    print(f"service, 100 in flight: {own:,} got their own answer, in {time.perf_counter() - begun:.2f} s")


def limit() -> None:
    """10,000 contexts that wait for 100 permits a second, in virtual time; then the CPU that waiting costs, in real."""
    dag = DAG()
    dag.task(no_op, name="limited", limiter=RateLimit(100, per=1.0))

    async def virtual() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        result = await executor(dag).run([{} for _ in range(10_000)])
        print(f"limit: {len(result):,} permits, {loop.jumps:,} wake-ups, {loop.turns:,} turns of the loop")

    run_virtual(virtual())
    slow = DAG()
    slow.task(no_op, name="limited", limiter=RateLimit(1, per=60.0))

    async def real() -> None:
        run = asyncio.create_task(executor(slow).run([{} for _ in range(10_000)]))
        await asyncio.sleep(1)
        before = time.process_time()
        await asyncio.sleep(5)
        print(f"limit: {(time.process_time() - before) * 1e3:.1f} ms of CPU in 5 s, while 9,999 wait")
        run.cancel()
        await asyncio.wait([run])

    asyncio.run(real())


def _in_loop(main: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    return lambda: asyncio.run(main())


WORKLOADS: dict[str, Callable[[], None]] = {
    "end": _in_loop(end),
    "chain": _in_loop(chain),
    "stream": _in_loop(stream),
    "map": _in_loop(map_),
    "join": _in_loop(join),
    "nested": _in_loop(nested),
    "service": _in_loop(service),
    "limit": limit,
}


def main() -> None:
    """The workloads that are named, or all of them."""
    wanted = sys.argv[1:] or list(WORKLOADS)
    if len(wanted) == 1:
        WORKLOADS[wanted[0]]()
        return
    for name in wanted:
        subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_scale", name], check=True)


if __name__ == "__main__":
    main()
