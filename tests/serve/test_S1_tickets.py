"""S1: submissions and tickets."""

from __future__ import annotations

import asyncio

import pytest

from obsdag import (
    DAG,
    Context,
    ContextError,
    ContextFailedError,
    DeadlineExceeded,
    DuplicateIdError,
    InputError,
    NoOutputError,
    NotAcceptingError,
    ServeError,
    ServeExecutor,
    UnknownTicketError,
)
from tests.serve.helpers import Gate, balanced, serve, sleeper, virtual


async def test_S1_a_submission_is_answered_with_its_only_output() -> None:
    async with serve(sleeper()) as executor:
        ticket = await executor.submit({"n": 1}, id="one")
        output = await ticket.result()

        assert (ticket.id, ticket.status, output["n"]) == ("one", "output", 1)
        assert (await executor.execute({"n": 2}))["n"] == 2
    assert balanced(executor)["output"] == 2


async def test_S1_status_goes_from_pending_over_running_to_the_outcome() -> None:
    gate = Gate()
    async with serve(gate.dag, max_live_contexts=1) as executor:
        first, second = await executor.submit(), await executor.submit()
        await asyncio.sleep(0)

        assert (first.status, second.status) == ("running", "pending")
        gate.open.set()
        await second.result()
        assert (first.status, second.status) == ("output", "output")


async def test_S1_a_failure_is_raised_from_its_cause() -> None:
    async with serve(sleeper()) as executor:
        with pytest.raises(ContextFailedError, match="no such order") as caught:
            await executor.execute({"fail": "no such order"}, id="x")

    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.error_info.error_node == "sleep"


@virtual
async def test_S1_a_ticket_covers_what_its_task_returns_after_it_destroyed_the_context() -> None:
    dag = DAG()

    @dag.task
    async def replace(ctx: Context) -> Context:
        ctx.create().destroy()
        ctx.destroy()
        ctx.destroy()
        await asyncio.sleep(1)
        if ctx["n"] == 2:
            raise ValueError("nobody hears of it")
        return ctx.create(copy_data=True)

    async with serve(dag) as executor:
        ticket, other = await executor.submit({"n": 1}), await executor.submit({"n": 2})
        assert (await ticket.result(2))["n"] == 1
        with pytest.raises(NoOutputError, match="dropped"):
            await other.result(2)
    assert balanced(executor)["output"] == 1


async def test_S1_no_output_says_the_outcome() -> None:
    async with serve(sleeper()) as executor:
        with pytest.raises(NoOutputError, match="dropped") as caught:
            await executor.execute({"drop": True})
        assert caught.value.outcome == "dropped"
        assert await (await executor.submit({"drop": True})).results() == []


async def test_S1_a_kept_discarded_context_has_the_outcome_that_it_is_going_to_have() -> None:
    async with serve(sleeper(), enable_context_gc=False) as executor:
        ticket = await executor.submit({"drop": True})
        with pytest.raises(NoOutputError, match="dropped"):
            await ticket.result()
        assert ticket.status == "dropped"
    assert balanced(executor)["dropped"] == 1
    assert executor.manifest["cancelled"] == []


def _splitter() -> DAG:
    dag = DAG("splitter")

    @dag.task
    async def split(ctx: Context) -> list[Context]:
        made = [ctx.create(copy_data=True) for _ in range(ctx["others"])]
        return made + [ctx.create_child() for _ in range(ctx["children"])]

    @dag.task(after=split)
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(ctx.get("s", 0.001))
        return ctx

    return dag


@pytest.mark.parametrize(("others", "children"), [(3, 0), (0, 3), (2, 2)])
async def test_S1_a_ticket_covers_the_tree_and_all_that_was_made_from_it(others: int, children: int) -> None:
    async with serve(_splitter()) as executor:
        ticket = await executor.submit({"others": others, "children": children})
        outputs = await ticket.results()

        assert len(outputs) == others + children
        assert ticket.status == "split"
        with pytest.raises(ServeError, match=r"use results\(\)"):
            await ticket.result()
    balanced(executor)


async def test_S1_cancel_ends_everything_that_the_ticket_covers() -> None:
    async with serve(_splitter()) as executor:
        ticket = await executor.submit({"others": 2, "children": 0, "s": 60})
        other = await executor.submit({"others": 1, "children": 0})
        await other.results()

        assert ticket.cancel()
        assert not ticket.cancel()
        assert await ticket.results() == []
    assert balanced(executor)["cancelled"] == 2


async def test_S1_a_pending_ticket_can_be_cancelled_and_gives_its_place_back() -> None:
    gate = Gate()
    async with serve(gate.dag, max_live_contexts=1, max_pending=1) as executor:
        await executor.submit()
        pending = await executor.submit()
        assert executor.pending == 1

        pending.cancel()
        assert executor.pending == 0
        with pytest.raises(NoOutputError, match="cancelled"):
            await pending.result()
        await executor.submit(wait=False)
        gate.open.set()
    assert len(gate.entered) == 2


async def test_S1_an_id_that_is_living_is_refused_and_nothing_is_changed() -> None:
    gate = Gate()
    async with serve(gate.dag) as executor:
        await executor.submit(id="a")
        context = Context(None, {}, name="b")
        with pytest.raises(DuplicateIdError, match="'a'"):
            await executor.submit(context, id="a")
        assert context.id == "b"
        with pytest.raises(DuplicateIdError):
            await executor.submit(Context(None, {}, name="a"))
        await executor.submit(context)
        gate.open.set()
    assert balanced(executor)["output"] == 2


async def test_S1_an_id_may_come_again_when_it_has_ended() -> None:
    async with serve(sleeper()) as executor:
        first = await executor.submit({"n": 1}, id="a")
        await executor.submit({"n": 2}, id="b")
        while not first.done:
            await asyncio.sleep(0)
        second = await executor.submit({"n": 3}, id="a")

        assert (await second.result())["n"] == 3
        with pytest.raises(UnknownTicketError, match="'a'"):
            await first.result()


async def test_S1_a_context_is_submitted_once_even_while_it_is_pending() -> None:
    gate = Gate()
    async with serve(gate.dag, max_live_contexts=1) as executor:
        await executor.submit()
        context = Context()
        await executor.submit(context, id="a")
        with pytest.raises(ContextError, match="submitted before"):
            await executor.submit(context, id="b")
        gate.open.set()


@pytest.mark.parametrize(
    "options",
    [{"id": ""}, {"id": 7}, {"deadline": 0}, {"deadline": "soon"}, {"wait": -1}, {"wait": "yes"}, {"trace": "x"}],
)
async def test_S1_bad_options_are_refused_by_name(options: dict[str, object]) -> None:
    async with serve(sleeper()) as executor:
        with pytest.raises(InputError, match=next(iter(options))):
            await executor.submit({}, **options)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="Context or a mapping"):
            await executor.submit(17)  # type: ignore[arg-type]
    assert balanced(executor)["entered"] == 0


@virtual
async def test_S1_result_waits_no_longer_than_told_and_cancels_nothing() -> None:
    async with serve(sleeper()) as executor:
        ticket = await executor.submit({"s": 10})
        with pytest.raises(TimeoutError):
            await ticket.result(timeout=1)
        assert ticket.status == "running"
        assert (await ticket.result(timeout=20))["s"] == 10


@virtual
async def test_S1_the_deadline_counts_from_the_call_pending_included() -> None:
    async with serve(sleeper(), max_live_contexts=1) as executor:
        await executor.submit({"s": 10})
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(ContextFailedError) as caught:
            await executor.execute({"s": 0}, deadline=3)

        assert isinstance(caught.value.__cause__, DeadlineExceeded)
        assert loop.time() - began == pytest.approx(3)
    assert balanced(executor)["failed"] == 1


@virtual
async def test_S1_a_context_deadline_is_armed_for_what_was_pending() -> None:
    """Its timer is set as it enters from the line, where no worker looks at timers afterwards."""
    async with serve(sleeper(), max_live_contexts=1, context_deadline=5) as executor:
        first = await executor.submit({"s": 1})
        second = await executor.submit({"s": 100})
        await first.result()
        with pytest.raises(ContextFailedError, match="deadline"):
            await second.result(timeout=10)


@virtual
async def test_S1_a_deadline_ends_what_replaced_the_context_too() -> None:
    async with serve(_splitter()) as executor:
        ticket = await executor.submit({"others": 3, "children": 0, "s": 100}, deadline=2)
        results = await ticket.results(timeout=5)
        assert results == []
    assert balanced(executor)["cancelled"] == 3


async def test_S1_execute_is_cancelled_with_its_caller_and_leaves_no_ticket() -> None:
    gate = Gate()
    async with serve(gate.dag) as executor:
        caller = asyncio.create_task(executor.execute({}, id="a"))
        while not gate.entered:
            await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert executor.in_flight == 0 == executor.unfetched
        with pytest.raises(UnknownTicketError):
            executor.ticket("a")
    assert balanced(executor)["cancelled"] == 1


async def test_S1_the_names_of_the_earlier_system() -> None:
    async with serve(sleeper()) as executor:
        task_id = await executor.submit_task({"n": 5})
        assert await executor.get_task_status(task_id) in ("running", "pending")
        assert (await executor.get_task_result(task_id, timeout=5))["n"] == 5
        with pytest.raises(UnknownTicketError, match="fetched"):
            await executor.get_task_status(task_id)


async def test_S1_submit_belongs_to_the_loop_of_the_executor() -> None:
    async with serve(sleeper()) as executor:

        def elsewhere() -> None:
            asyncio.run(executor.submit({}))

        with pytest.raises(ServeError, match="event loop"):
            await asyncio.to_thread(elsewhere)


async def test_S1_two_executors_of_one_dag_at_once() -> None:
    dag = sleeper()
    async with serve(dag) as one, serve(dag) as other:
        tickets = [await executor.submit({"n": n}, id="same") for n, executor in enumerate((one, other))]
        assert [(await ticket.result())["n"] for ticket in tickets] == [0, 1]


async def test_S1_starting_twice_and_submitting_before_or_after_are_refused() -> None:
    executor = ServeExecutor(sleeper())
    with pytest.raises(NotAcceptingError, match="stopped"):
        await executor.submit({})
    async with executor:
        with pytest.raises(ServeError, match="started already"):
            await executor.start()
    with pytest.raises(NotAcceptingError, match="stopped"):
        await executor.submit({})


async def test_S1_ten_thousand_concurrent_submits() -> None:
    most = 0
    dag = DAG()

    @dag.task
    async def work(ctx: Context) -> Context:
        nonlocal most
        most = max(most, sum(shell.run.living for shell in executor._shells))
        if ctx["n"] % 100 == 0:
            await asyncio.sleep(0.001)
        return ctx

    executor = serve(dag, context_worker_num=64, max_live_contexts=100, max_pending=50)
    async with executor:
        outputs = await asyncio.gather(*(executor.execute({"n": n}) for n in range(10_000)))
        assert executor.in_flight == 0 == executor.unfetched
    assert [output["n"] for output in outputs] == list(range(10_000))
    assert most <= 100
    assert balanced(executor)["output"] == 10_000


def noting_workers() -> tuple[DAG, list[asyncio.Task[None] | None]]:
    """A DAG, and the asyncio tasks in which its task ran."""
    dag, workers = DAG(), list[asyncio.Task[None] | None]()

    @dag.task
    async def work(ctx: Context) -> Context:
        workers.append(asyncio.current_task())
        return ctx

    return dag, workers


async def test_S1_an_idle_worker_is_woken_and_not_made_anew() -> None:
    dag, workers = noting_workers()
    async with serve(dag, context_worker_num=4) as executor:
        for n in range(20):
            await executor.execute({"n": n})
        assert len(set(workers)) <= 4
    assert all(worker is not None and worker.done() for worker in workers)


async def test_S1_a_worker_that_is_cancelled_as_it_is_woken_is_replaced() -> None:
    dag, workers = noting_workers()
    async with serve(dag, context_worker_num=1) as executor:
        await executor.execute({})
        for when in ("woken", "idle"):
            for _ in range(10):  # it finds nothing to do
                await asyncio.sleep(0)
            worker = workers[-1]
            assert worker is not None
            if when == "idle":
                worker.cancel()
                await asyncio.sleep(0)
            ticket = await executor.submit({})
            if when == "woken":
                worker.cancel()
            await ticket.result(timeout=5.0)
    assert len(workers) == 3
