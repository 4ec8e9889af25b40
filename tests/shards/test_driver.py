"""The driver's own rules, with shards in this process, in virtual time: how a run ends, whatever will not end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.baggage import set_baggage
from opentelemetry.context import attach, detach

from obsdag import Context, ExecutorConfig, Observer, Telemetry
from obsdag.errors import NoOutputError
from obsdag.testing import run_virtual
from tests.journal.images import inline
from tests.shards import dags

pytest.importorskip("ray", reason="needs Ray: pip install 'obsdag[ray]'")

from ray.exceptions import PendingCallsLimitExceeded

from obsdag.ray import RayExecutor, RayServeExecutor
from obsdag.ray.driver import Driver
from tests.shards.nearby import Actor, nearby

GRACE_S = 2.0
GONE = Exception("Failed to submit task to actor: can't find it")  # as Ray raises it after `ray.shutdown()`
CONFIG = ExecutorConfig(context_worker_num=2, task_worker_num=0, shutdown_grace=GRACE_S)


class Stubborn(AsyncIterator[dict[str, int]]):
    """One item, and then it waits, however often it is cancelled. released: ends the wait, with one more item."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.asked = 0

    async def __anext__(self) -> dict[str, int]:
        self.asked += 1
        if self.asked > 1:
            await self._wait()
        return {"x": self.asked}

    async def _wait(self) -> None:
        while not self.released.is_set():
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                continue


class Unclosed(Stubborn):
    """The same, but the wait can be cancelled, and its closing cannot."""

    async def __anext__(self) -> dict[str, int]:
        self.asked += 1
        if self.asked > 1:
            await self.released.wait()
        return {"x": self.asked}

    async def aclose(self) -> None:
        await self._wait()


async def _left(inputs: Stubborn) -> tuple[float, Driver]:
    """Seconds that it took to leave a stream of these inputs after its first output, and its driver."""
    executor = RayExecutor(dags.mixed, CONFIG, shards=1)
    cluster, loop = nearby(executor), asyncio.get_running_loop()
    async with executor.stream(inputs) as outputs:
        await anext(outputs)
        left = loop.time()
    took_s = loop.time() - left
    inputs.released.set()
    await cluster.gone()
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0)
    return took_s, outputs._driver


async def _cancelling() -> AsyncIterator[dict[str, int]]:
    yield {"x": 1}
    lost = asyncio.ensure_future(asyncio.Event().wait())
    lost.cancel()
    await lost


def test_an_input_that_is_cancelled_by_itself_ends_the_run() -> None:
    async def main() -> None:
        executor = RayExecutor(dags.mixed, CONFIG, shards=1)
        cluster = nearby(executor)
        with pytest.raises(asyncio.CancelledError, match="the input iterator was cancelled"):
            async with asyncio.timeout(60):
                await executor.run(_cancelling())
        await cluster.gone()

    run_virtual(main())


def test_a_run_tells_observers_what_an_earlier_driver_left(tmp_path: Path) -> None:
    told: list[int] = []

    class Told(Observer):
        def journal_left(self, contexts: int) -> None:
            told.append(contexts)

    async def main() -> None:
        journal = inline(tmp_path / "j.db")
        config = CONFIG.replace(journal=journal, observers=(Told(),))
        executor = RayExecutor(dags.mixed, config, shards=1)
        cluster = nearby(executor)
        await journal.acquire()
        recorder = await journal.record(executor.plan)
        recorder.accepted(Context(None, {"x": 1}), 0.0)
        await recorder.close()
        await journal.release()
        assert len(await executor.run([{"x": 2}])) == 1
        assert len(await executor.recover()) == 1
        await executor.run([{"x": 3}])
        await cluster.gone()

    run_virtual(main())
    assert told == [1]


def test_E9_an_input_that_swallows_its_cancellation_is_given_up_after_the_grace_and_told() -> None:
    took_s, driver = run_virtual(_left(Stubborn()))

    assert took_s == pytest.approx(GRACE_S, abs=0.1)
    assert driver.abandoned == ["the input swallows its cancellation"]
    assert driver.counts == {**dict.fromkeys(driver.counts, 0), "entered": 4, "output": 1, "merged": 3}


def test_E9_an_input_that_cannot_be_closed_is_given_up_after_the_grace_and_told() -> None:
    took_s, driver = run_virtual(_left(Unclosed()))

    assert took_s == pytest.approx(GRACE_S, abs=0.2)
    assert driver.abandoned == ["the input did not close within the grace"]


# --- a shard whose end goes wrong


def test_an_error_that_nobody_expects_at_the_end_of_a_shard_leaves_no_context_without_an_outcome() -> None:
    given = [Context(None, {"x": number}) for number in range(6)]

    async def main() -> Driver:
        executor = RayExecutor(dags.stuck, CONFIG, shards=2)
        cluster = nearby(executor)
        async with executor.stream(iter(given)) as outputs:
            while outputs.counts["entered"] < 4:
                await asyncio.sleep(0)
            cluster.actors[0].refuses["end"] = GONE
        await cluster.gone()
        assert not cluster._users
        return outputs._driver

    driver = run_virtual(main())

    assert [each.outcome for each in given] == ["cancelled"] * 4 + [None] * 2
    assert driver.counts == {**dict.fromkeys(driver.counts, 0), "entered": 4, "cancelled": 4}
    assert [(what, type(error)) for what, error in driver.cleanup_errors] == [("the end of shard-1", Exception)]


def test_an_error_that_nobody_expects_at_the_end_of_a_shard_leaves_no_ticket_unanswered() -> None:
    async def main() -> tuple[list[str], dict[str, Any]]:
        executor = RayServeExecutor(dags.stuck, CONFIG, shards=2)
        cluster = nearby(executor, lambda actor: actor.refuses.update(end=GONE, close=GONE))
        async with executor:
            tickets = [await executor.submit() for _ in range(3)]
            while not all(ticket.status == "running" for ticket in tickets):
                await asyncio.sleep(0)
            await executor.drain(0.0)
        await cluster.gone()
        return [ticket.status for ticket in tickets], executor.stats()

    states, stats = run_virtual(main())

    assert states == ["cancelled"] * 3
    assert (stats["entered"], stats["cancelled"], stats["living"]) == (3, 3, 0)


def test_of_shards_that_are_gone_a_run_keeps_nothing() -> None:
    async def main() -> Driver:
        executor = RayExecutor(dags.mixed, CONFIG, shards=3)
        cluster = nearby(executor)
        async with executor.stream({"x": 1} for _ in iter(int, 1)) as outputs:
            async for _ in outputs:
                if len(executor.seen()["shards"]) == 1:
                    break
                if all(each["phase"] == "running" for each in executor.seen()["shards"]):
                    executor.scale(1)
        await cluster.gone()
        return outputs._driver

    driver = run_virtual(main())

    [last] = driver._members
    assert driver._begun == set(driver._attending) == set(driver.sharding.shards) == {last}
    assert not driver._leaving


# --- what cannot be sent


async def _serving(prepare: Callable[[Actor], None], use: Callable[[RayServeExecutor], Awaitable[Any]]) -> Any:
    """What `use` gives of an executor whose shard is prepared so."""
    executor = RayServeExecutor(dags.mixed_and_stuck, CONFIG, shards=1, telemetry=lambda shard: Telemetry.off())
    cluster = nearby(executor, prepare)
    try:
        async with executor:
            return await use(executor)
    finally:
        await cluster.gone()


def test_a_batch_that_cannot_be_sent_ends_the_run_with_the_reason_and_every_ticket_is_answered() -> None:
    tickets = []

    async def use(executor: RayServeExecutor) -> None:
        await asyncio.sleep(1.0)  # the shard is there
        tickets.append(await executor.submit({"x": 1}))
        with pytest.raises(NoOutputError, match="cancelled"):
            await tickets[0].result()

    with pytest.raises(PendingCallsLimitExceeded):
        run_virtual(_serving(lambda actor: actor.refuses.update(feed=PendingCallsLimitExceeded("1")), use))

    assert [ticket.status for ticket in tickets] == ["cancelled"]


def test_S1_a_submission_is_cancelled_though_its_shard_cannot_be_told() -> None:
    async def use(executor: RayServeExecutor) -> tuple[bool, str]:
        ticket = await executor.submit({"stuck": True, "x": 1})
        while ticket.status != "running":
            await asyncio.sleep(0)
        return ticket.cancel(), ticket.status

    async def main() -> list[Any]:
        found: list[Any] = []

        async def noted(executor: RayServeExecutor) -> None:
            found.extend(await use(executor))

        with pytest.raises(Exception, match="Failed to submit"):
            await _serving(lambda actor: actor.refuses.update(cancel=GONE), noted)
        return found

    assert run_virtual(main()) == [True, "cancelled"]


def test_S4_a_baggage_that_has_no_form_costs_no_submission() -> None:
    async def use(executor: RayServeExecutor) -> list[Any]:
        token = attach(set_baggage("file", "\ud800", set_baggage("customer", "c7")))
        try:
            tickets = [await executor.submit({"x": 1})]
        finally:
            detach(token)
        tickets.append(await executor.submit({"x": 2}))
        return [(await ticket.result())["x"] for ticket in tickets]

    assert run_virtual(_serving(lambda actor: None, use)) == [1, 2]
