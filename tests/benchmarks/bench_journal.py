"""What durability costs: durable executions per second beside a bare `executemany` loop, and the time of a submit.

    python tests/benchmarks/bench_journal.py [ROUNDS] [DIR]

Interleaved rounds in one run, on the same disk (DIR, else a temporary folder), fsync at each commit ("power"). The bare
loop writes the row of a context that a journal has kept, under ever new keys and ids, in groups of 256, one commit
each, and does nothing else. An execution counts when its effect is committed: a run returns after its last commit.
Figures are medians, of the ratios those within a round. The ratio is what to compare, on a machine that has nothing
else to do: a run wants two cores, the bare loop one.

    chain     10 tasks after each other, 16 workers: what one turn of the event loop brought on is one row per context
    one       one task, 16 workers: a context's whole life is one row
    waits     the chain, each task suspends once: nothing is brought on twice in a turn
    none      chain without a journal
    commit    the bare loop with one row per commit: what an acknowledgment cannot be faster than
    submit    acknowledged submits of one task at a fixed rate, whatever becomes of those before: p50 and p99 of the
    wait
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

from obsdag import DAG, Context, Executor, ExecutorConfig, ServeExecutor, SQLiteJournal
from obsdag.journal.schema import Row, create

SECONDS = 2.0
KEPT = 10_000
"""Inputs of a run: its outputs are kept until it ends, and the collector looks at all of them again and again."""
DATA = {"order": 12345, "customer": "somebody", "items": ["a", "b", "c"], "total": 99.5}


def dag_of(length: int, suspends: bool) -> DAG:
    """A chain of tasks that do next to nothing."""
    dag = DAG(f"chain{length}{suspends}")
    before: str | None = None
    for number in range(length):

        async def work(ctx: Context) -> Context:
            if suspends:
                await asyncio.sleep(0)
            ctx["step"] = ctx.get("step", 0) + 1
            return ctx

        dag.task(name=f"t{number}", after=[before] if before else [])(work)
        before = f"t{number}"
    return dag


def fresh(path: Path) -> Path:
    """The path, with nothing there."""
    for suffix in ("", "-wal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    return path


async def kept(folder: Path) -> tuple[Any, ...]:
    """The row of a context of one task, as it is in the file."""
    path = fresh(folder / "kept.db")
    await Executor(dag_of(1, False), config=ExecutorConfig(journal=SQLiteJournal(path))).run(dict(DATA))
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT * FROM contexts").fetchone()  # type: ignore[no-any-return]


def bare(folder: Path, row: tuple[Any, ...], single: list[float]) -> float:
    """Rows per second of a loop of `executemany` with a commit per 256 rows; then the ms of single ones.

    row: what is written again and again; its key, id and tree are new each time.
    """
    key, name, plan, parent, _, *rest = row
    path = fresh(folder / "bare.db")
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")
    create(connection)
    connection.execute("INSERT INTO plans VALUES (?, 'f', 'd', '[]')", (plan,))
    statement = f"INSERT OR REPLACE INTO contexts VALUES ({', '.join('?' * len(Row._fields))})"
    count, began = 0, perf_counter()
    while perf_counter() - began < SECONDS:
        rows = [(n, f"{name}{n:x}", plan, parent, n, *rest) for n in range(key + count, key + count + 256)]
        connection.execute("BEGIN")
        connection.executemany(statement, rows)
        connection.execute("COMMIT")
        count += 256
    rate = count / (perf_counter() - began)
    for _ in range(60):
        began = perf_counter()
        connection.execute(statement, (key, name, plan, parent, key, *rest))
        single.append((perf_counter() - began) * 1e3)
    connection.close()
    return rate


async def run(folder: Path, length: int, suspends: bool, journal: bool = True) -> float:
    """Durable executions per second."""
    path = fresh(folder / "run.db")
    given = SQLiteJournal(path) if journal else None
    executor = Executor(dag_of(length, suspends), config=ExecutorConfig(context_worker_num=16, journal=given))
    count = 0
    async with executor:  # the file is open before the clock starts, as in the bare loop
        began = perf_counter()
        while (took := perf_counter() - began) < SECONDS:
            result = await executor.run(dict(DATA) for _ in range(KEPT))
            assert not result.failures
            count += len(result)
    return count * length / took


async def submits(folder: Path, rate: float) -> tuple[float, float]:
    """p50 and p99, in ms, of submits that come at `rate` per second whatever becomes of those before."""
    path = fresh(folder / "submit.db")
    waits: list[float] = []
    config = ExecutorConfig(context_worker_num=16, journal=SQLiteJournal(path))
    async with ServeExecutor(dag_of(1, False), config=config) as executor:
        began, sent = perf_counter(), 0
        clients: set[asyncio.Task[None]] = set()

        async def client() -> None:
            asked = perf_counter()
            ticket = await executor.submit(dict(DATA))
            waits.append(perf_counter() - asked)
            await ticket.result()

        while (passed := perf_counter() - began) < SECONDS:
            while sent < passed * rate:
                sent += 1
                task = asyncio.ensure_future(client())
                clients.add(task)
                task.add_done_callback(clients.discard)
            await asyncio.sleep(0.001)
        await asyncio.gather(*clients)
    steps = quantiles(waits, n=100)
    return steps[49] * 1e3, steps[98] * 1e3


async def main(rounds: int, folder: Path) -> None:
    """Rounds in turn, and the table."""
    cases: dict[str, Callable[[], Awaitable[float]]] = {
        "chain": lambda: run(folder, 10, False),
        "waits": lambda: run(folder, 10, True),
        "one": lambda: run(folder, 1, False),
        "none": lambda: run(folder, 10, False, journal=False),
    }
    figures: dict[str, list[float]] = {"bare": [], **{name: [] for name in cases}}
    single: list[float] = []
    row = await kept(folder)
    for _ in range(rounds):
        figures["bare"].append(await asyncio.to_thread(bare, folder, row, single))
        for name, case in cases.items():
            figures[name].append(await case())
    steps = quantiles(single, n=100)
    for name, found in figures.items():
        ratio = median(each / base for each, base in zip(found, figures["bare"], strict=True))
        print(f"{name:8} {median(found):12,.0f} /s   {ratio:6.2f} of bare")
    print(f"commit   of one row: p50 {steps[49]:.1f} ms, p99 {steps[98]:.1f} ms")
    for rate in (500.0, 2_000.0, 5_000.0):
        p50, p99 = await submits(folder, rate)
        print(f"submit   at {rate:,.0f}/s: p50 {p50:.1f} ms, p99 {p99:.1f} ms")


if __name__ == "__main__":
    given = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(main(int(given[0]) if given else 5, Path(given[1] if len(given) > 1 else temporary)))
