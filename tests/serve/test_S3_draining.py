"""S3: draining, in every state; nothing accepted is without an outcome."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from obsdag import DAG, Context, NoOutputError, NotAcceptingError, RunFailed, ServeError, ServeExecutor
from obsdag.testing import RecordedFacts
from tests.serve.helpers import Gate, balanced, serve, sleeper, virtual

ROOT = Path(__file__).parent.parent.parent


@virtual
async def test_S3_what_is_in_flight_and_pending_is_finished_within_the_grace() -> None:
    executor = serve(sleeper(), max_live_contexts=2, drain_grace=100)
    await executor.start()
    tickets = [await executor.submit({"s": 10}) for _ in range(6)]
    manifest = await executor.drain()

    assert [ticket.status for ticket in tickets] == ["output"] * 6
    assert (manifest["finished"], manifest["cancelled"]) == (6, [])
    assert manifest["seconds"] == pytest.approx(30)
    assert balanced(executor)["output"] == 6


@virtual
async def test_S3_the_rest_is_cancelled_and_named() -> None:
    facts = RecordedFacts()
    executor = serve(sleeper(), facts, max_live_contexts=2)
    await executor.start()
    quick = await executor.submit({"s": 1}, id="quick")
    slow = await executor.submit({"s": 99}, id="slow")
    waits = await executor.submit({"s": 99}, id="waits")
    last = await executor.submit({"s": 99}, id="last")
    manifest = await executor.drain(grace=5)

    assert [each["id"] for each in manifest["cancelled"]] == ["slow", "waits", "last"]
    assert manifest["cancelled"][0]["tasks"] == ["sleep"]
    assert manifest["cancelled"][0]["age_s"] == pytest.approx(5)
    assert manifest["finished"] == 1
    assert [ticket.status for ticket in (quick, slow, waits, last)] == ["output", *["cancelled"] * 3]
    with pytest.raises(NoOutputError, match="cancelled"):
        await waits.result()
    assert facts.named("drain_finished")[0].arguments[0] is manifest
    assert [fact.arguments[0] for fact in facts.named("phase_changed")] == [
        "starting",
        "accepting",
        "draining",
        "stopped",
    ]
    assert balanced(executor)["cancelled"] == 3


async def test_S3_the_phase_flips_in_the_same_moment_in_which_draining_is_asked_for() -> None:
    gate = Gate()
    async with serve(gate.dag) as executor:
        await executor.submit()
        executor.request_drain()
        assert executor.phase == "draining"
        with pytest.raises(NotAcceptingError, match="draining"):
            await executor.submit()
        gate.open.set()


@virtual
async def test_S3_who_waits_to_submit_is_turned_away() -> None:
    gate = Gate()
    executor = serve(gate.dag, max_live_contexts=1, max_pending=0)
    await executor.start()
    await executor.submit()
    waiting = [asyncio.create_task(executor.submit()) for _ in range(3)]
    await asyncio.sleep(0)
    draining = asyncio.create_task(executor.drain())
    ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(each) for each in ended] == [NotAcceptingError] * 3
    gate.open.set()
    await draining
    assert balanced(executor)["entered"] == 1


@virtual
async def test_S3_several_drains_are_one_and_the_shortest_grace_counts() -> None:
    loop = asyncio.get_running_loop()
    executor = serve(sleeper(), drain_grace=1000)
    await executor.start()
    await executor.submit({"s": 500})
    draining = asyncio.create_task(executor.drain())
    await asyncio.sleep(1)
    longer = asyncio.create_task(executor.drain(grace=100))
    manifest = await executor.drain(grace=2)

    assert loop.time() == pytest.approx(3)
    assert await draining is manifest is await longer
    assert await executor.drain() is manifest  # when all is over


async def test_S3_an_idle_executor_drains_at_once() -> None:
    executor = serve(sleeper())
    assert await executor.drain() == {}
    async with executor:
        pass
    assert executor.manifest["finished"] == 0
    balanced(executor)


async def test_S3_a_block_that_raises_is_left_without_grace() -> None:
    executor = serve(sleeper(), drain_grace=1000)
    with pytest.raises(ZeroDivisionError):
        async with executor:
            ticket = await executor.submit({"s": 1000})
            raise ZeroDivisionError
    assert ticket.status == "cancelled"
    assert balanced(executor)["cancelled"] == 1


@virtual
async def test_S3_a_cancelled_block_drains_and_a_second_cancellation_ends_the_grace() -> None:
    executor = serve(sleeper(), drain_grace=1000)
    tickets = []

    async def service() -> None:
        async with executor:
            tickets.append(await executor.submit({"s": 10}))
            tickets.append(await executor.submit({"s": 500}))
            await asyncio.Event().wait()

    running = asyncio.create_task(service())
    await asyncio.sleep(1)
    running.cancel()
    await asyncio.sleep(20)
    assert executor.phase == "draining"
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [ticket.status for ticket in tickets] == ["output", "cancelled"]
    balanced(executor)


def test_S3_a_loop_that_is_shut_down_still_gives_everything_an_outcome() -> None:
    executor = serve(sleeper(), drain_grace=1000)
    tickets = []

    async def main() -> None:
        await executor.start()
        tickets.append(await executor.submit({"s": 1000}))
        executor.request_drain()
        await asyncio.sleep(0.01)

    asyncio.run(main())  # cancels the drain
    assert tickets[0].done
    ended = balanced(executor)
    assert ended["failed"] + ended["cancelled"] == 1  # whoever the loop cancels first: the execution (E6) or the drain


async def test_S3_a_task_that_swallows_its_cancellation_is_abandoned_and_reported() -> None:
    dag, released = DAG(), asyncio.Event()

    @dag.task
    async def stubborn(ctx: Context) -> Context:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue
        return ctx

    executor = serve(dag, shutdown_grace=0.1)
    await executor.start()
    await executor.submit(id="x")
    await asyncio.sleep(0)
    manifest = await executor.drain(grace=0)
    assert "stubborn" in manifest["abandoned"][0]
    assert [each["id"] for each in manifest["cancelled"]] == ["x"]
    released.set()
    await asyncio.sleep(0.01)


@pytest.mark.parametrize("state", ["queued", "retry", "limit", "join", "frozen", "thread", "service"])
async def test_S3_drains_from_every_state(state: str) -> None:
    from tests.serve.states import dag_that_waits

    dag, settings, release, status = dag_that_waits(state)
    executor = serve(dag, **settings)
    await executor.start()
    tickets = [await executor.submit({"n": n}) for n in range(3)]
    async with asyncio.timeout(5):
        while not executor._shells[0].run.state_counts[status]:
            await asyncio.sleep(0.001)
    draining = asyncio.create_task(executor.drain(grace=0))
    await asyncio.sleep(0)
    release()
    manifest = await draining
    assert all(ticket.done for ticket in tickets)
    assert len(manifest["cancelled"]) + manifest["finished"] == 3
    assert manifest["cancelled"]
    balanced(executor)


async def test_S3_on_failure_raise_ends_serving_with_the_failure() -> None:
    executor = serve(sleeper(), on_failure="raise")
    with pytest.raises(RunFailed, match="boom"):
        async with executor:
            other = await executor.submit({"s": 1000})
            await executor.submit({"fail": "boom"})
            await executor.stopped()
    assert other.status == "cancelled"
    balanced(executor)


async def test_S3_an_interrupt_in_a_task_ends_serving() -> None:
    dag = DAG()

    @dag.task
    async def interrupt(ctx: Context) -> Context:
        raise SystemExit(3) if ctx else ValueError

    executor = serve(dag)
    with pytest.raises(SystemExit):
        async with executor:
            ticket = await executor.submit({"n": 1})
            await executor.stopped()
    assert ticket.done
    balanced(executor)


async def test_S3_a_start_that_fails_leaves_nothing_and_can_be_tried_again() -> None:
    class Broken:
        engine = "broken"

        def observers(self, run: object, pools: object) -> list[object]:
            raise ValueError("not today")

        async def run_closed(self, run: object) -> None: ...

    executor = serve(sleeper(), telemetry=Broken())
    for _ in range(2):
        with pytest.raises(ValueError, match="not today"):
            await executor.start()
    assert executor.phase == "stopped"
    assert executor.stats()["living"] == 0


def test_S3_signals_need_the_main_thread_and_are_never_taken_by_default() -> None:
    before = signal.getsignal(signal.SIGTERM)
    errors: list[BaseException] = []

    async def main(handle: bool) -> None:
        async with ServeExecutor(sleeper(), handle_signals=handle):
            assert signal.getsignal(signal.SIGTERM) is before or handle

    def elsewhere() -> None:
        try:
            asyncio.run(main(True))
        except ServeError as error:
            errors.append(error)

    asyncio.run(main(False))
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
    assert signal.getsignal(signal.SIGTERM) is before


async def test_S3_a_signal_drains_and_a_second_one_ends_the_grace() -> None:
    before = signal.getsignal(signal.SIGTERM)
    executor = ServeExecutor(sleeper(), handle_signals=True)
    async with executor:
        ticket = await executor.submit({"s": 1000})
        os.kill(os.getpid(), signal.SIGTERM)
        while executor.phase == "accepting":
            await asyncio.sleep(0.001)
        assert ticket.status == "running"
        os.kill(os.getpid(), signal.SIGINT)
        async with asyncio.timeout(5):
            await executor.stopped()
    assert ticket.status == "cancelled"
    assert signal.getsignal(signal.SIGTERM) is before


def test_S3_SIGTERM_in_a_process_of_its_own() -> None:
    program = textwrap.dedent(
        """
        import asyncio, json, sys
        from obsdag import DAG, ServeExecutor
        dag = DAG()
        @dag.task
        async def work(ctx):
            await asyncio.sleep(ctx["s"])
            return ctx
        async def main():
            async with ServeExecutor(dag, handle_signals=True) as executor:
                tickets = [await executor.submit({"s": 0.2 + n / 100}) for n in range(20)]
                print("serving", flush=True)
                await executor.stopped()
                print(json.dumps([executor.manifest["finished"], [t.status for t in tickets]]), flush=True)
        asyncio.run(main())
        """
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "serving\n"
        child.send_signal(signal.SIGTERM)
        finished, statuses = json.loads(child.stdout.readline())
        assert child.wait(10) == 0
    assert (finished, statuses) == (20, ["output"] * 20)


# --- defect 12 of SEMANTICS section 7


@virtual
async def test_defect_12_a_serving_executor_ends_when_it_is_told_to() -> None:
    """The earlier `run()` never returned, with or without work, and nothing could stop it."""
    executor = serve(sleeper())
    async with executor:
        serving = asyncio.create_task(executor.stopped())
        await (await executor.submit({"s": 1})).result()
        await asyncio.sleep(3600)
        assert not serving.done()
        await executor.drain()
        async with asyncio.timeout(1):
            await serving
    assert asyncio.get_running_loop().time() == pytest.approx(3601)
    assert balanced(executor)["output"] == 1
