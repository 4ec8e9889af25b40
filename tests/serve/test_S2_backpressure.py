"""S2: room, the line before it, and results that nobody fetches."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from obsdag import DAG, Context, QueueFullError, UnknownTicketError
from obsdag.testing import RecordedFacts
from tests.serve.helpers import Gate, balanced, serve, sleeper, virtual


async def test_S2_at_most_so_many_live_and_wait() -> None:
    gate = Gate()
    async with serve(gate.dag, context_worker_num=9, max_live_contexts=2, max_pending=3) as executor:
        for _ in range(5):
            await executor.submit(wait=False)
        with pytest.raises(QueueFullError, match="3 contexts are waiting"):
            await executor.submit(wait=False)
        assert (executor.pending, executor.in_flight) == (3, 5)
        while gate.most < 2:
            await asyncio.sleep(0)
        gate.open.set()
    assert gate.most == 2
    assert balanced(executor)["output"] == 5


async def test_S2_max_pending_zero_takes_only_what_can_live() -> None:
    gate = Gate()
    async with serve(gate.dag, max_live_contexts=2, max_pending=0) as executor:
        await executor.submit(wait=False)
        await executor.submit(wait=False)
        with pytest.raises(QueueFullError):
            await executor.submit(wait=False)
        waiting = asyncio.create_task(executor.submit())
        await asyncio.sleep(0)
        gate.open.set()
        await (await waiting).result()
    assert balanced(executor)["output"] == 3


@virtual
async def test_S2_submit_waits_for_a_place_for_as_long_as_told() -> None:
    loop = asyncio.get_running_loop()
    async with serve(sleeper(), max_live_contexts=1, max_pending=0) as executor:
        await executor.submit({"s": 10})
        began = loop.time()
        with pytest.raises(QueueFullError, match="within 2 s"):
            await executor.submit({"s": 0}, wait=2)
        assert loop.time() - began == pytest.approx(2)
        with pytest.raises(QueueFullError, match="within 3 s"):
            await executor.submit({"s": 0}, deadline=3)
        await (await executor.submit({"s": 0}, wait=20)).result()
        assert loop.time() - began == pytest.approx(10)


@virtual
async def test_S2_places_go_out_in_the_order_of_asking() -> None:
    done: list[int] = []
    async with serve(sleeper(), max_live_contexts=1, max_pending=0) as executor:

        async def one(n: int) -> None:
            await executor.execute({"s": 1, "n": n})
            done.append(n)

        await asyncio.gather(*(one(n) for n in range(8)))
    assert done == list(range(8))


@virtual
async def test_S2_a_place_given_to_one_who_gave_up_goes_to_the_next() -> None:
    """The first in line is told of its place and cancelled in the same turn; nothing else would ever tell the second."""  # noqa: E501
    gate = Gate()
    async with serve(gate.dag, max_live_contexts=1, max_pending=0) as executor:
        ticket = await executor.submit()
        first, second = asyncio.create_task(executor.submit()), asyncio.create_task(executor.submit())
        await asyncio.sleep(0)
        ticket.cancel()  # wakes the first
        first.cancel()
        async with asyncio.timeout(5):
            await second
        gate.open.set()


@virtual
async def test_S2_a_place_given_to_a_duplicate_goes_to_the_next() -> None:
    gate = Gate()
    async with serve(gate.dag, max_live_contexts=2, max_pending=0) as executor:
        first = await executor.submit(id="a")
        await executor.submit(id="b")
        twins = [asyncio.create_task(executor.submit(id="c")) for _ in range(2)]
        last = asyncio.create_task(executor.submit(id="d"))
        await asyncio.sleep(0)
        first.cancel()
        (await executor.ticket("b").results() if executor.ticket("b").cancel() else None)
        async with asyncio.timeout(5):
            await last
        ended = await asyncio.gather(*twins, return_exceptions=True)
        assert [type(each).__name__ for each in ended] == ["Ticket", "DuplicateIdError"]
        gate.open.set()


@virtual
async def test_S2_what_is_pending_enters_when_a_part_of_a_ticket_makes_room() -> None:
    """Room that comes free without a ticket ending is used at once, not when the next ticket ends."""
    dag = DAG()

    @dag.task
    async def split(ctx: Context) -> list[Context]:
        if "s" in ctx:
            return [ctx]
        children = ctx.create_child(2)
        children[0]["s"], children[1]["s"] = 1, 1000
        return children

    @dag.task(after=split)
    async def sleep(ctx: Context) -> Context:
        await asyncio.sleep(ctx["s"])
        return ctx

    async with serve(dag, max_live_contexts=3) as executor:
        long = await executor.submit()
        await asyncio.sleep(0.5)
        quick = await executor.submit({"s": 2})
        assert quick.status == "pending"
        await quick.result(timeout=10)
        assert long.status == "running"
        long.cancel()


@virtual
async def test_S2_a_result_that_nobody_fetches_expires_and_is_counted() -> None:
    facts = RecordedFacts()
    async with serve(sleeper(), facts, result_ttl=60) as executor:
        early = await executor.submit({"n": 1}, id="early")
        await asyncio.sleep(30)
        late = await executor.submit({"n": 2}, id="late")
        await asyncio.sleep(31)
        assert executor.unfetched == 1
        with pytest.raises(UnknownTicketError, match="never given out, fetched, or expired"):
            executor.ticket("early")
        with pytest.raises(UnknownTicketError, match="not fetched in time"):
            await early.result()
        assert (await late.result())["n"] == 2
        assert executor.unfetched == 0
    assert len(facts.named("result_expired")) == 1


@virtual
async def test_S2_expiry_works_in_a_second_serving_period_too() -> None:
    facts = RecordedFacts()
    executor = serve(sleeper(), facts, result_ttl=60)
    async with executor:
        await (await executor.submit({"fetched": True})).result()
        await executor.submit(id="old")
    assert (await executor.get_task_result("old")) == {}  # readable after the end
    async with executor:
        await executor.submit(id="new")
        await asyncio.sleep(61)
        assert executor.unfetched == 0
    assert len(facts.named("result_expired")) == 1


async def test_S2_what_was_not_fetched_before_is_dropped_when_serving_begins_again() -> None:
    executor = serve(sleeper())
    async with executor:
        ticket = await executor.submit(id="a")
    assert executor.unfetched == 1
    async with executor:
        assert executor.unfetched == 0
        with pytest.raises(UnknownTicketError):
            await ticket.result()


async def test_S2_nothing_is_kept_of_tickets_that_were_fetched() -> None:
    """Not even until the ttl: at 10,000 a second that would be millions of contexts. Nor until the garbage collector
    comes: circles would bring it, and its pauses are seen in the latencies.
    """
    gc.collect()
    gc.disable()
    try:
        async with serve(sleeper(), result_ttl=3600) as executor:
            living: weakref.WeakSet[Context] = weakref.WeakSet()
            for n in range(50):
                ticket = await executor.submit({"n": n})
                living.add(ticket.context)
                await ticket.result()
            del ticket
            await asyncio.sleep(0)
            assert len(living) <= 4  # a worker each may still hold its last one
            assert not executor._tickets.by_id
            assert not executor._tickets._by_scope
    finally:
        gc.enable()


async def test_S2_rejections_are_told_with_their_reason() -> None:
    facts = RecordedFacts()
    gate = Gate()
    async with serve(gate.dag, facts, max_live_contexts=1, max_pending=0) as executor:
        await executor.submit(id="a")
        for bad in ({"id": "a"}, {"wait": False}, {"deadline": -1}):
            with pytest.raises(Exception):  # noqa: B017 - which one is told below
                await executor.submit(**bad)  # type: ignore[arg-type]
        gate.open.set()
    assert [fact.arguments[0] for fact in facts.named("submit_rejected")] == [
        "duplicate",
        "queue_full",
        "invalid",
    ]
