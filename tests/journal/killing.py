"""kill -9 at random moments, and recovery: `python -m tests.journal.killing --trials 5000`.

Each trial is a process that serves (or streams) a mix of maps, joins, retries, limits and routers with a journal, and
writes what it was acknowledged, and what it was given, into a pipe. It is killed at a random moment, then as often as
chance will have it while it recovers, and at last left to finish. Then the submitter's list is compared with the file:
nothing acknowledged is lost, nothing has two outcomes, nothing was given out that is not in the file, and every result
is the one that a run without a crash gives.

Processes are forked, so that a trial takes the time of its work; the parent runs no threads and no event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from obsdag import (
    DAG,
    ConcurrencyLimit,
    Context,
    Executor,
    ExecutorConfig,
    JournalError,
    RateLimit,
    ServeExecutor,
    SQLiteJournal,
)
from obsdag.journal.codec import Codec
from obsdag.journal.schema import Row
from obsdag.journal.store import Store

__all__ = ["Totals", "main", "trial"]

KINDS = ("plain", "parts", "flaky", "limited")
PATIENCE_S = 60.0


def mixed() -> DAG:
    """A router to four kinds of work, and one end."""
    dag = DAG("mixed")

    @dag.task(kind="router")
    async def choose(ctx: Context) -> str:
        return str(ctx["kind"])

    @dag.task(after=choose)
    async def plain(ctx: Context) -> Context:
        await asyncio.sleep(0.002)
        ctx["result"] = ctx["n"] * 2
        return ctx

    @dag.task(after=choose, kind="map")
    async def parts(ctx: Context) -> Any:
        for number in range(ctx["n"] % 7):
            await asyncio.sleep(0.001)
            yield {"number": number}

    @dag.task(after=parts, retry_times=2)
    def square(ctx: Context) -> Context:
        ctx["square"] = ctx["number"] ** 2
        if ctx.attempt == 1 and ctx["number"] == 3:
            raise ValueError("the first attempt fails")
        return ctx

    @dag.task(after=square, kind="join")
    async def add(ctx: Context, children: list[Context]) -> Context:
        ctx["result"] = sum(child["square"] for child in children)
        return ctx

    @dag.task(after=choose, retry_times=3, retry_interval=0.005)
    async def flaky(ctx: Context) -> Context:
        await asyncio.sleep(0.001)
        if ctx.attempt <= ctx["n"] % 3:
            raise ValueError("not yet")
        ctx["result"] = ctx["n"] + 1
        return ctx

    @dag.task(after=choose, limiter=[ConcurrencyLimit(2), RateLimit(500, per=1.0)])
    async def limited(ctx: Context) -> Context:
        await asyncio.sleep(0.002)
        ctx["result"] = -ctx["n"]
        return ctx

    @dag.task(after=[plain, add, flaky, limited])
    async def end(ctx: Context) -> Context:
        ctx["ended"] = True
        return ctx

    return dag


def expected(data: dict[str, Any]) -> int:
    """What becomes of an input."""
    n = data["n"]
    return {
        "plain": n * 2,
        "parts": sum(number**2 for number in range(n % 7)),
        "flaky": n + 1,
        "limited": -n,
    }[data["kind"]]


# --- the process that dies


def config(path: Path, durability: Any) -> ExecutorConfig:
    """Of every process of a trial."""
    journal = SQLiteJournal(path, durability=durability)
    return ExecutorConfig(context_worker_num=6, task_worker_num=2, thread_pool_worker_num=2, journal=journal)


async def serve(path: Path, durability: str, tell: Callable[[str], None], count: int, seed: int) -> None:
    """Takes up what is there, submits some more, and fetches every result."""
    chance = random.Random(seed)
    async with ServeExecutor(mixed(), config=config(path, durability)) as executor:
        fetching = [asyncio.ensure_future(fetch(ticket, tell)) for ticket in executor._tickets]

        async def client(number: int) -> None:
            kind = chance.choice(KINDS)
            await asyncio.sleep(chance.random() * 0.05)
            ticket = await executor.submit({"n": number, "kind": kind}, id=f"{seed}-{number}")
            tell(f"ack {ticket.id}")
            await fetch(ticket, tell)

        await asyncio.gather(*(client(number) for number in range(count)), *fetching)


async def fetch(ticket: Any, tell: Callable[[str], None]) -> None:
    """Waits for one result and says that it was given."""
    output = await ticket.result()
    tell(f"out {ticket.id} {output['result']}")


async def stream(path: Path, durability: str, tell: Callable[[str], None], count: int, seed: int) -> None:
    """The same through `Executor.stream`; what is there already is recovered first."""
    chance = random.Random(seed)
    executor = Executor(mixed(), config=config(path, durability))
    async with executor:
        for output in await executor.recover():
            tell(f"out {output.id} {output['result']}")
        inputs = [Context(None, {"n": n, "kind": chance.choice(KINDS)}, name=f"{seed}-{n}") for n in range(count)]
        async with executor.stream(inputs) as outputs:
            async for output in outputs:
                tell(f"out {output.id} {output['result']}")


def child(work: Any, path: Path, durability: str, count: int, seed: int, pipe: int) -> None:
    """The forked process; never returns."""

    def tell(line: str) -> None:
        os.write(pipe, (line + "\n").encode())

    try:
        asyncio.run(work(path, durability, tell, count, seed))
        tell("end")
    except BaseException:
        tell("error " + traceback.format_exc().replace("\n", "|"))
    finally:
        os._exit(0)


def run_process(arguments: tuple[Any, ...], live_s: float | None) -> list[str]:
    """The lines of a forked process that lives for so long at most, None: until it ends."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        child(*arguments, writing)
    os.close(writing)
    end = time.monotonic() + (PATIENCE_S if live_s is None else live_s)
    told = b""
    while (left := end - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            piece = os.read(reading, 65536)
            if not piece:
                break
            told += piece
    else:
        if live_s is None:
            told += b"error it hangs\n"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while piece := os.read(reading, 65536):
        told += piece
    os.close(reading)
    return told.decode().splitlines()


# --- the submitter's list against the file


class Totals:
    """What all trials came to."""

    def __init__(self) -> None:
        self.trials = self.kills = self.acknowledged = self.given = self.recovered = self.rows = 0
        self.problems: list[str] = []

    def __str__(self) -> str:
        return (
            f"{self.trials} trials, {self.kills} kills, {self.acknowledged} acknowledged, {self.recovered} recovered, "
            f"{self.given} given out, {self.rows} contexts, {len(self.problems)} problems"
        )


def read(path: Path) -> list[Row]:
    """The rows of a copy, so that the file stays as the dead process left it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy = Path(folder) / "copy.db"
        for suffix in ("", "-wal"):
            if Path(f"{path}{suffix}").exists():
                shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
        store = Store(str(copy), look=True)
        try:
            store.open()
            return list(store.rows())
        except JournalError as error:
            if "is empty" in str(error) or "no such file" in str(error):  # it died before anything was committed
                return []
            raise
        finally:
            store.close()


def trial(seed: int, folder: Path, totals: Totals) -> None:
    """One file, killed until chance lets it finish."""
    chance = random.Random(seed)
    path = folder / f"{seed}.db"
    work = chance.choice((serve, serve, stream))
    durability = chance.choice(("process", "process", "power"))
    acknowledged: set[str] = set()
    given: Counter[str] = Counter()
    ended: dict[int, Row] = {}
    totals.trials += 1

    def problem(what: str) -> None:
        totals.problems.append(f"trial {seed} ({work.__name__}): {what}")

    for life in range(20):
        last = life == 19 or (life > 0 and chance.random() < 0.5)
        count = 0 if last else chance.choice((4, 12, 30))
        live_s = None if last else chance.random() * chance.choice((0.1, 0.3, 0.6))
        lines = run_process((work, path, durability, count, seed * 100 + life), live_s)
        totals.kills += not last
        for line in lines:
            word, *rest = line.split(" ", 2)
            if word == "ack":
                acknowledged.add(rest[0])
            elif word == "out":
                given[rest[0]] += 1
            elif word == "error":
                problem(line)
        rows = read(path)
        now = {row.key: row for row in rows}
        for key, row in ended.items():
            if now.get(key) != row:
                problem(f"the outcome of {row.id} was recorded again")
        totals.recovered += sum(row.outcome is None for row in rows if row.key == row.tree)
        ended = {row.key: row for row in rows if row.outcome is not None}
        outputs = {row.id for row in ended.values() if row.outcome == "output"}
        if missing := acknowledged - {row.id for row in rows}:
            problem(f"acknowledged and lost: {sorted(missing)}")
        if early := set(given) - outputs:
            problem(f"given out and not in the file: {sorted(early)}")
        if last:
            break
    check_end(rows, given, problem)
    totals.acknowledged += len(acknowledged)
    totals.given += sum(given.values())
    totals.rows += len(rows)
    for suffix in ("", "-wal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def check_end(rows: list[Row], given: Counter[str], problem: Callable[[str], None]) -> None:
    """After the last life: one outcome each, the right one."""
    if living := [row.id for row in rows if row.outcome is None]:
        problem(f"without an outcome: {living}")
    roots = Counter(row.id for row in rows if row.key == row.tree)
    if twice := [name for name, number in roots.items() if number > 1]:
        problem(f"accepted twice: {twice}")
    if twice := [name for name, number in given.items() if number > 1]:
        problem(f"given out twice: {twice}")
    for row in rows:
        if row.key == row.tree:
            data = Codec().decode(row.data or b"")
            if row.outcome != "output" or data.get("result") != expected(data) or not data.get("ended"):
                problem(f"{row.id} ended as {row.outcome} with {data}")
    for row in rows:
        if row.key != row.tree and row.outcome != "merged":
            problem(f"part {row.id} ended as {row.outcome}")


def main(arguments: list[str] | None = None) -> int:
    """Runs trials; 0 if none showed a problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.journal.killing", description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=None, help="stop after so long, whatever the number")
    options = parser.parse_args(arguments)
    totals, began = Totals(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed, options.seed + options.trials):
            if options.seconds is not None and time.monotonic() - began > options.seconds:
                break
            trial(seed, Path(folder), totals)
            if totals.problems:
                break
            if totals.trials % 100 == 0:
                print(f"{totals} in {time.monotonic() - began:.0f} s", flush=True)
    print(totals)
    for problem in totals.problems:
        print(problem)
    return 1 if totals.problems else 0


if __name__ == "__main__":
    sys.exit(main())
