"""The queue worker loses no message: at the queue's end, on SIGTERM, and when the grace of a drain is over."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from obsdag import DAG, Context, ExecutorConfig, ServeExecutor
from obsdag.examples import queue_worker
from obsdag.examples.queue_worker import Broker, build, work
from obsdag.testing import run_virtual


def test_the_program_works_off_its_queue(tmp_path: Path) -> None:
    root = str(Path(queue_worker.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "obsdag.examples.queue_worker"],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stdout) == (0, "198 stored, 198 acknowledged, 2 refused, 0 held\n")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["execution.failed"] * 2


class Quiet(Broker):
    """One that never says that it has no more: it waits, as brokers do."""

    async def get(self) -> tuple[int, bytes] | None:
        taken = await super().get()
        if taken is None:
            await asyncio.Event().wait()
        return taken


def settings(**more: Any) -> ExecutorConfig:
    return ExecutorConfig(**{"context_worker_num": 2, "max_live_contexts": 4, "max_pending": 0, **more})


async def test_sigterm_finishes_what_was_taken_and_leaves_the_rest() -> None:
    broker, store = Quiet([b'{"number": %d}' % n for n in range(500)]), list[dict[str, Any]]()
    executor = ServeExecutor(build(store), config=settings(), handle_signals=True)
    working = asyncio.ensure_future(work(broker, executor))
    while len(broker.done) < 20:
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(working, 20)

    assert broker.held == {}
    assert 20 <= len(broker.done) < 500
    assert sorted(broker.done) == sorted(message["number"] for message in store)
    assert len(broker.done) + len(broker._waiting) == 500


async def test_sigterm_reaches_a_worker_that_waits_for_messages() -> None:
    broker = Quiet([b"{}"])
    executor = ServeExecutor(build([]), config=settings(), handle_signals=True)
    working = asyncio.ensure_future(work(broker, executor))
    while not broker.done:
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(working, 20)

    assert (broker.done, broker.held) == ([0], {})


def test_what_outlasts_the_grace_is_given_back() -> None:
    dag = DAG("slow")

    async def sleeps(ctx: Context) -> Context:
        await asyncio.sleep(3_600)
        return ctx

    dag.task(sleeps)
    broker = Quiet([b"1", b"2", b"3"])
    executor = ServeExecutor(dag, config=settings(drain_grace=5.0))

    async def main() -> None:
        working = asyncio.ensure_future(work(broker, executor))
        await asyncio.sleep(10)
        executor.request_drain()
        await working

    run_virtual(main())

    assert (broker.held, broker.done, broker.refused) == ({}, [], [])
    assert sorted(number for number, _ in broker._waiting) == [0, 1, 2]


async def test_a_broker_that_breaks_is_told_when_all_is_settled() -> None:
    class Broken(Broker):
        async def get(self) -> tuple[int, bytes] | None:
            if len(self.held) + len(self.done) >= 5:
                raise ConnectionError("the broker is gone")
            return await super().get()

    broker = Broken([b"{}"] * 9)
    with pytest.raises(ConnectionError, match="the broker is gone"):
        await work(broker, ServeExecutor(build([]), config=settings()))

    assert (len(broker.done), broker.held) == (5, {})
