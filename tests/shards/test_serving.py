"""Serving on a real Ray cluster: every submission that is accepted has its outcome, and its ticket tells it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from obsdag import Context, DeadlineExceeded, ExecutorConfig
from obsdag.errors import (
    ContextFailedError,
    DuplicateIdError,
    EncodingError,
    NoOutputError,
    NotAcceptingError,
    QueueFullError,
    ServeError,
    UnknownTicketError,
)
from tests.shards import dags

pytest.importorskip("ray", reason="needs Ray: pip install 'obsdag[ray]'")
from obsdag.ray import RayServeExecutor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.leaves("processes", "nodes that a test before killed are added again"),
    pytest.mark.leaves(
        "files", "the connection to Ray opens sockets to its processes as it needs them, and keeps them"
    ),
]

PARALLEL = ExecutorConfig(context_worker_num=8, task_worker_num=0, shutdown_grace=2.0)


def serving(dag: Any, config: ExecutorConfig = PARALLEL, shards: int = 2) -> RayServeExecutor:
    return RayServeExecutor(dag, config, shards=shards, shard_options={"resources": {"shard": 1}, "num_cpus": 1})


async def until_running(*tickets: Any) -> None:
    while not all(ticket.status == "running" for ticket in tickets):
        await asyncio.sleep(0.01)


async def test_S1_tickets_give_outputs_failures_and_how_it_ended(nodes: Any) -> None:
    async with serving(dags.mixed) as executor:
        good = [await executor.submit({"x": number}, id=f"n{number}") for number in (0, 1, 2)]
        assert [(await ticket.result())["total"] for ticket in good] == [3, 3, 3]
        assert [ticket.status for ticket in good] == ["output"] * 3

        with pytest.raises(ContextFailedError, match="bad 10") as caught:
            await executor.execute({"x": 9})
        assert isinstance(caught.value.__cause__, ValueError)
        with pytest.raises(NoOutputError, match="dropped"):
            await executor.execute({"x": 10})
        with pytest.raises(ServeError, match="2 outputs"):
            await executor.execute({"x": 6})
        with pytest.raises(EncodingError):
            await executor.submit({"x": object()})

        key = await executor.submit_task(Context(None, {"x": 3}, "mine"))
        assert (await executor.get_task_result(key))["total"] == 3
        with pytest.raises(UnknownTicketError):
            await executor.get_task_status("mine")
        assert executor.in_flight == 0

    assert executor.phase == "stopped"
    assert executor.manifest["cancelled"] == []
    with pytest.raises(NotAcceptingError):
        await executor.submit({"x": 1})


async def test_S1_what_is_cancelled_or_too_late_ends_at_once_and_makes_room(nodes: Any) -> None:
    config = PARALLEL.replace(context_worker_num=1)
    async with serving(dags.stuck, config, shards=1) as executor:
        first, second = await executor.submit(id="a"), await executor.submit(id="b")
        await until_running(first)
        assert second.status == "pending"
        with pytest.raises(DuplicateIdError):
            await executor.submit(id="a")

        assert first.cancel()
        assert not first.cancel()
        assert first.status == "cancelled"
        await until_running(second)
        late = await executor.submit(id="c", deadline=0.2)
        with pytest.raises(ContextFailedError) as caught:
            await late.result()
        assert isinstance(caught.value.__cause__, DeadlineExceeded)
        assert second.cancel()
        third = await executor.submit(id="d")
        await until_running(third)
        third.cancel()
        assert executor.in_flight == 0


async def test_S2_what_is_too_much_is_refused_or_waits_in_line(nodes: Any) -> None:
    config = PARALLEL.replace(max_live_contexts=1, max_pending=1)
    async with serving(dags.stuck, config, shards=1) as executor:
        tickets = [await executor.submit(id=name) for name in ("a", "b")]
        with pytest.raises(QueueFullError):
            await executor.submit(wait=False)
        with pytest.raises(QueueFullError):
            await executor.submit(wait=0.05)
        waiting = asyncio.create_task(executor.submit(id="c"))
        await asyncio.sleep(0)
        tickets[0].cancel()
        tickets.append(await waiting)
        for ticket in tickets[1:]:
            ticket.cancel()


async def test_S3_a_drain_cancels_what_its_grace_does_not_suffice_for_and_names_it(nodes: Any) -> None:
    async with serving(dags.stuck) as executor:
        tickets = [await executor.submit(id=name) for name in ("a", "b", "c")]
        await until_running(*tickets)

        manifest = await executor.drain(0.1)

    assert manifest["finished"] == 0
    assert {each["id"] for each in manifest["cancelled"]} == {"a", "b", "c"}
    assert all(each["shard"].startswith("shard-") for each in manifest["cancelled"])
    assert [ticket.status for ticket in tickets] == ["cancelled"] * 3


async def test_a_shard_killed_while_serving_costs_no_submission(nodes: Any) -> None:
    async with serving(dags.slow) as executor:
        first = await executor.execute({"x": -1})
        tickets = [await executor.submit({"x": number}) for number in range(100)]
        await until_running(tickets[0])
        os.kill(first["pid"], signal.SIGKILL)
        found = [await ticket.result() for ticket in tickets]

    assert [output["x"] for output in found] == list(range(100))
    assert executor.manifest["finished"] == 0, "nothing was left when it drained"


async def test_the_wait_for_the_first_shard_is_over_when_it_is_there(nodes: Any) -> None:
    async with serving(dags.mixed, shards=1) as executor:
        await executor.execute({"x": 1})

        assert executor._period is not None
        assert executor._period._alarm is None, "a shard that dies when the time is up would end the period"
