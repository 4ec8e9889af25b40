"""The driver's journal: what was accepted survives the driver, and runs again from its beginning on shards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from obsdag import Context, EncodingError, Executor, ExecutorConfig, JournalError, SQLiteJournal
from tests.shards import dags

pytest.importorskip("ray", reason="needs Ray: pip install 'obsdag[ray]'")
from obsdag.ray import RayExecutor, RayServeExecutor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.leaves("processes", "the cluster's nodes stay for the tests of this folder"),
    pytest.mark.leaves(
        "files", "the connection to Ray opens sockets to its processes as it needs them, and keeps them"
    ),
]

ROOT = Path(__file__).parent.parent.parent
PLACE = {"resources": {"shard": 1}, "num_cpus": 1}


def config(folder: Path) -> ExecutorConfig:
    journal = SQLiteJournal(folder / "j.db")
    return ExecutorConfig(context_worker_num=8, task_worker_num=0, shutdown_grace=2.0, journal=journal)


@contextlib.contextmanager
def driver(kind: str, address: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A driver in a process of its own, which says what it does; at the end of the block it is killed."""
    program = [sys.executable, "-m", "tests.shards.driver", kind, address, str(folder)]
    with subprocess.Popen(
        program, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen[str], most: int) -> list[str]:
    assert process.stdout is not None
    found = []
    for line in process.stdout:
        found.append(line.strip())
        if len(found) == most:
            break
    return found


def rest(process: subprocess.Popen[str]) -> list[str]:
    """What it had said when it died, as far as that was whole."""
    assert process.stdout is not None
    return [line.strip() for line in process.stdout.read().split("\n")[:-1]]


def rows(folder: Path) -> tuple[int, int]:
    """Contexts in the journal, and those of them without an outcome."""
    with contextlib.closing(sqlite3.connect(folder / "j.db")) as file:
        found: tuple[int, int] = file.execute("SELECT count(*), sum(outcome IS NULL) FROM contexts").fetchone()
    return found


async def test_a_driver_that_is_killed_leaves_its_roots_to_the_next(nodes: Any, tmp_path: Path) -> None:
    with driver("run", nodes.address, tmp_path) as process:
        told = lines(process, 40)
        process.kill()
        told += rest(process)
    entered, living = rows(tmp_path)

    result = await RayExecutor(dags.slow, config(tmp_path), shards=2, shard_options=PLACE).recover()

    before, after = [int(each) for each in told], [output["x"] for output in result]
    assert len(after) == living > 0
    assert len(before) <= entered - living, "what was given out was committed before"
    assert len(set(before + after)) == len(before + after), "and does not come again"
    assert set(before + after) <= set(range(entered))
    assert all(output["parts"] == [0, 1, 2] for output in result)
    assert result.counts["entered"] == 4 * living
    assert rows(tmp_path) == (entered, 0)


async def test_submissions_of_a_driver_that_is_killed_have_tickets_again(nodes: Any, tmp_path: Path) -> None:
    with driver("serve", nodes.address, tmp_path) as process:
        accepted = lines(process, 10)
    (tmp_path / "gate").touch()

    async with RayServeExecutor(dags.gate, config(tmp_path), shards=2, shard_options=PLACE) as executor:
        assert accepted == [f"n{number}" for number in range(10)]
        outputs = [await executor.ticket(name).result() for name in accepted]
        late = await executor.execute({"x": 10, "gate": str(tmp_path / "gate")}, id="n10")

    assert [output["x"] for output in [*outputs, late]] == list(range(11))
    assert rows(tmp_path) == (11, 0)


async def test_outcomes_are_written_down_and_what_a_drain_cancels_is_not_over(nodes: Any, tmp_path: Path) -> None:
    settings = config(tmp_path)
    async with RayExecutor(dags.mixed, settings, shards=1, shard_options=PLACE) as executor:
        result = await executor.run([*({"x": number} for number in range(60)), {"x": 1, "odd": object()}])
        again = await executor.recover()
    local = await Executor(dags.mixed, config=ExecutorConfig()).run([{"x": number} for number in range(60)])

    assert (len(result), list(again), rows(tmp_path)) == (len(local), [], (60, 0))
    assert result.counts["failed"] == local.counts["failed"] + 1

    async with RayServeExecutor(dags.gate, settings, shards=1, shard_options=PLACE) as serving:
        with pytest.raises(EncodingError):
            await serving.submit({"x": object()})
        ticket = await serving.submit({"x": 7, "gate": str(tmp_path / "gate")}, id="seven")
        await serving.drain(0.0)
        assert ticket.status == "cancelled"
    assert rows(tmp_path) == (61, 1)
    (tmp_path / "gate").touch()
    taken_up = await RayExecutor(dags.gate, settings, shards=1, shard_options=PLACE).recover()
    assert [output.id for output in taken_up] == ["seven"]


async def test_what_a_local_executor_had_begun_is_left_to_one(nodes: Any, tmp_path: Path) -> None:
    settings = config(tmp_path)
    local = Executor(dags.stepped, config=settings)
    begun = asyncio.create_task(local.run([Context(None, {}, "half")]))
    while not local.stats()["tasks"]["first"]["executions"]:
        await asyncio.sleep(0.01)
    begun.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await begun

    with pytest.raises(JournalError, match="begun by a local executor"):
        await RayExecutor(dags.stepped, settings, shards=1, shard_options=PLACE).recover()
    assert rows(tmp_path) == (1, 1)


async def test_what_has_ended_and_waits_for_its_commit_is_not_cancelled(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gate").touch()
    async with RayServeExecutor(dags.gate, config(tmp_path), shards=1, shard_options=PLACE) as executor:
        ticket = await executor.submit({"x": 1, "gate": str(tmp_path / "gate")}, deadline=60.0)
        held: list[Any] = []
        monkeypatch.setattr(executor._durable, "after_commit", held.append)
        while not held:
            await asyncio.sleep(0.01)

        assert not ticket.cancel()
        executor._too_late(ticket)
        held.pop()()

        assert (await ticket.result())["x"] == 1
    assert rows(tmp_path) == (1, 0)
