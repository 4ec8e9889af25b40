"""What people see of shards: the live page and `/readyz` of the driver, and the log lines of the shards."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

import obsdag.logs
from obsdag import ExecutorConfig, Telemetry
from obsdag.ops import start_ops_server
from tests.ops.browser import chromium, needs_chromium, visit
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

PLACE = {"resources": {"shard": 1}, "num_cpus": 1}
PARALLEL = ExecutorConfig(context_worker_num=8, task_worker_num=0, shutdown_grace=2.0)


class Logging:
    """Makes telemetry on a shard, whose lines go to a file there; carried to shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, shard: str) -> Telemetry:
        stream = (self.folder / f"{shard}.jsonl").open("a", buffering=1)
        obsdag.logs.configure(json=True, stream=stream)
        return Telemetry(engine="logged", registry=CollectorRegistry())


def get(url: str) -> tuple[int, Any]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.status, json.load(answer)


async def test_every_line_of_a_shard_has_its_name(nodes: Any, tmp_path: Path) -> None:
    await RayExecutor(dags.logging_, PARALLEL, shards=1, shard_options=PLACE, telemetry=Logging(tmp_path)).run({"x": 1})

    lines = [json.loads(line) for line in (tmp_path / "shard-1.jsonl").read_text().splitlines()]
    by_event = {line["event"]: line for line in lines}
    assert {line["shard"] for line in lines} == {"shard-1"}
    assert {"run.started", "run.finished", "execution.failed", "of the task's own"} <= set(by_event)
    assert by_event["of the task's own"]["task"] == by_event["execution.failed"]["task"] == "say"
    assert logging.getLogger().level != logging.CRITICAL


async def test_the_drivers_page_shows_its_shards_its_counts_and_failures(nodes: Any) -> None:
    executor = RayServeExecutor(dags.mixed_and_stuck, PARALLEL, shards=2, shard_options=PLACE, ops={})
    with start_ops_server(executor, port=0) as ops:
        idle = get(f"{ops.url}/api/state")[1]["executors"][0]["state"]
        async with executor:
            assert (await asyncio.to_thread(get, f"{ops.url}/readyz"))[0] == 200
            assert await asyncio.to_thread(get, f"{ops.url}/healthz") == (200, {"status": "ok", "loops": 1})
            tickets = [await executor.submit({"stuck": True}) for _ in range(3)]
            for x in (1, 2, 9):
                done = await executor.submit({"x": x})
                await asyncio.wait([asyncio.ensure_future(done.results())])
            while not all(ticket.status == "running" for ticket in tickets):
                await asyncio.sleep(0.01)
            while len(executor.targets) < 2:
                await asyncio.sleep(0.01)
            state = (await asyncio.to_thread(get, f"{ops.url}/api/state"))[1]["executors"][0]["state"]
            for ticket in tickets:
                ticket.cancel()
        stopped = state
        while stopped["phase"] != "stopped":  # a reading is good for a quarter of a second
            stopped = get(f"{ops.url}/api/state")[1]["executors"][0]["state"]

    assert (idle["phase"], idle["shards"]) == ("stopped", [])
    assert (state["phase"], state["serving"], state["living"], state["in_flight"]) == ("accepting", True, 3, 3)
    assert {each["name"] for each in state["shards"]} == {"shard-1", "shard-2"}
    assert sum(each["roots"] for each in state["shards"]) == 3
    assert {each["target"] for each in state["shards"]} <= {"", *(f"127.0.0.1:{p}" for p in range(1024, 65536))}
    assert state["counts"]["failed"] == 1
    assert state["failures"][0]["task"] == "check"
    assert state["failures"][0]["at"] == pytest.approx(state["events"][-1]["at"], abs=60)
    assert state["rejected"] == {}
    assert (stopped["phase"], stopped["counts"]["cancelled"], stopped["counts"]["output"]) == ("stopped", 3, 2)


@needs_chromium
async def test_the_page_in_a_browser_lists_the_shards(nodes: Any) -> None:
    executor = RayServeExecutor(dags.stuck, PARALLEL, shards=2, shard_options=PLACE, ops={})
    with start_ops_server(executor, port=0, interval_s=0.25) as ops:
        async with executor, chromium() as browser:
            tickets = [await executor.submit({}) for _ in range(2)]
            while len(executor.targets) < 2 or not all(ticket.status == "running" for ticket in tickets):
                await asyncio.sleep(0.01)
            async with visit(browser, ops.url) as seen:
                await seen.until("() => document.querySelectorAll('#shards-list b').length === 2")
                shown = await seen.text("#shards")
            for ticket in tickets:
                ticket.cancel()

    assert "2 engines on a cluster" in shown
    assert "shard-1" in shown
    assert "127.0.0.1:" in shown
