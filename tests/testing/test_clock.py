"""The virtual clock: it jumps, it waits for what is real, and it says when nothing can happen any more."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from obsdag import DAG, Context, Executor, ExecutorConfig, RateLimit
from obsdag.testing import HangError, VirtualLoop, run_virtual


def virtual_loop() -> VirtualLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def test_time_jumps_to_the_next_timer() -> None:
    seen: list[float] = []

    async def main() -> str:
        loop = asyncio.get_running_loop()
        for delay in (1.0, 3600.0, 0.25):
            await asyncio.sleep(delay)
            seen.append(loop.time())
        return "done"

    assert run_virtual(main()) == "done"
    assert seen == [1.0, 3601.0, 3601.25]


def test_timers_fire_in_their_order_at_their_own_time() -> None:
    fired: list[tuple[float, int]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number, delay in enumerate([30.0, 10.0, 20.0, 10.0]):
            loop.call_later(delay, lambda number=number: fired.append((loop.time(), number)))
        await asyncio.sleep(100)

    run_virtual(main(), start=5.0)
    assert fired == [(15.0, 1), (15.0, 3), (25.0, 2), (35.0, 0)]


@pytest.mark.parametrize("start", [0.0, 1.8e9, 1e12])
def test_a_timer_that_the_clock_cannot_resolve_still_fires(start: float) -> None:
    async def main() -> float:
        await asyncio.sleep(1e-9)
        await asyncio.sleep(10 * 24 * 3600.0)  # more than asyncio's longest select
        return asyncio.get_running_loop().time() - start

    assert run_virtual(main(), start=start) == pytest.approx(10 * 24 * 3600.0, abs=1.0)


def test_no_timer_fires_before_its_time() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0.1)
        end = loop.time() + 8
        while (left := end - loop.time()) > 0:  # comes to within a rounding error of the end
            loop.call_soon(int)
            await asyncio.sleep(min(left, 0.05))
        due = loop.time() + 0.3
        fired = loop.create_future()
        loop.call_at(due, lambda: fired.set_result(loop.time()))
        assert await fired == due

    run_virtual(main())


def test_turns_and_jumps_are_counted() -> None:
    async def main() -> tuple[int, int]:
        loop = virtual_loop()
        turns, jumps = loop.turns, loop.jumps
        for _ in range(5):
            await asyncio.sleep(0)
        assert loop.turns - turns == 5
        for _ in range(3):
            await asyncio.sleep(60)
        return loop.turns - turns, loop.jumps - jumps

    turns, jumps = run_virtual(main())
    assert jumps == 3
    assert 8 <= turns <= 5 + 3 * 3


def test_time_stands_still_while_an_executor_works() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        release = threading.Event()
        ticking = loop.create_task(asyncio.sleep(1000))
        working = loop.run_in_executor(None, release.wait)
        threading.Timer(0.05, release.set).start()
        await working
        assert not ticking.done()
        now = loop.time()
        await ticking
        return now

    assert run_virtual(main()) == 0.0


def test_a_stuck_thread_lets_time_jump_after_the_patience() -> None:
    release = threading.Event()

    async def main() -> float:
        loop = asyncio.get_running_loop()
        working = loop.run_in_executor(None, release.wait)
        try:
            await asyncio.wait_for(asyncio.shield(working), 300)
        except TimeoutError:
            return loop.time()
        finally:
            release.set()
            await working
        return -1.0

    assert run_virtual(main(), patience_s=0.05) == 300.0


def sync_chain(kind: str) -> DAG:
    dag = DAG()

    @dag.task(kind=kind, retry_times=2, retry_interval=3600)
    def work(ctx: Context) -> Context:
        time.sleep(0.002)
        if ctx.attempt < 3:
            raise ValueError("again")
        return ctx

    return dag


@pytest.mark.parametrize("kind", ["sync", "foreground"])
def test_virtual_times_do_not_depend_on_the_threads_of_a_run(kind: str) -> None:
    async def main() -> float:
        result = await Executor(sync_chain(kind), config=ExecutorConfig(context_worker_num=4)).run([{}, {}, {}])
        assert result.counts["output"] == 3
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 7200.0


def process_work(ctx: Any) -> Any:
    time.sleep(0.02)
    if ctx.attempt == 1:
        raise ValueError("again")
    return ctx


def test_virtual_times_do_not_depend_on_the_processes_of_a_run() -> None:
    dag = DAG()
    dag.task(process_work, kind="process", retry_times=1, retry_interval=3600)

    async def main() -> float:
        result = await Executor(dag, config=ExecutorConfig(process_pool_worker_num=1)).run([{}])
        assert result.counts["output"] == 1
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 3600.0


def test_a_thread_of_the_programs_own_is_given_a_moment_before_each_jump() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        called = asyncio.Event()
        thread = threading.Thread(target=lambda: loop.call_soon_threadsafe(called.set))
        timer = loop.call_later(10, called.set)
        thread.start()
        await called.wait()
        timer.cancel()
        thread.join()
        return loop.time()

    assert run_virtual(main(), settle_s=2.0) == 0.0


def test_open_sockets_are_given_a_moment_before_each_jump() -> None:
    ours, theirs = socket.socketpair()

    async def main() -> float:
        reader, writer = await asyncio.open_connection(sock=ours)
        threading.Timer(0.01, theirs.sendall, (b"x",)).start()
        async with asyncio.timeout(60):
            assert await reader.readexactly(1) == b"x"
        writer.close()
        await writer.wait_closed()
        return asyncio.get_running_loop().time()

    with theirs:
        assert run_virtual(main(), settle_s=5.0) == 0.0


def test_a_hang_is_told_at_once_with_its_place() -> None:
    async def waits_for_nobody() -> None:
        await asyncio.Event().wait()

    story = r"hangs at 7 virtual seconds.*2 asyncio task.*waits_for_nobody.*test_clock\.py:\d+"
    with pytest.raises(HangError, match=story):
        run_virtual(_after(7, waits_for_nobody()))


async def _after(seconds: float, coroutine: Any) -> None:
    await asyncio.sleep(seconds)
    await asyncio.create_task(coroutine)


def test_a_hang_behind_an_open_socket_is_told_after_the_patience() -> None:
    ours, theirs = socket.socketpair()

    async def main() -> None:
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            await reader.readexactly(1)
        finally:
            writer.close()

    with theirs, pytest.raises(HangError):
        run_virtual(main(), patience_s=0.05)


def calls_and_goes(waiting: list[asyncio.Future[int]]) -> Callable[..., bool]:
    """In place of a look for others: one calls just then, once, and is not seen any more."""

    def look(loop: VirtualLoop, **_: bool) -> bool:
        if not waiting[0].done():
            thread = threading.Thread(target=loop.call_soon_threadsafe, args=(waiting[0].set_result, 1))
            thread.start()
            thread.join()
        return False

    return look


def test_who_calls_at_the_last_moment_and_is_gone_then_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[asyncio.Future[int]] = []
    monkeypatch.setattr(VirtualLoop, "_strangers", calls_and_goes(waiting))

    async def main() -> int:
        waiting.append(asyncio.get_running_loop().create_future())
        return await waiting[0]

    assert run_virtual(main()) == 1


def test_who_calls_before_a_jump_and_is_gone_then_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[asyncio.Future[int]] = []
    monkeypatch.setattr(VirtualLoop, "_jobs", calls_and_goes(waiting))

    async def main() -> tuple[int, float]:
        loop = asyncio.get_running_loop()
        waiting.append(loop.create_future())
        return await asyncio.wait_for(waiting[0], 5), loop.time()

    assert run_virtual(main()) == (1, 0.0)


def test_a_rate_limited_run_takes_virtual_time_only() -> None:
    dag, times = DAG(), []

    @dag.task(limiter=RateLimit(1, per=60))
    async def limited(ctx: Context) -> Context:
        times.append(asyncio.get_running_loop().time())
        return ctx

    run_virtual(Executor(dag, config=ExecutorConfig(context_worker_num=8)).run([{}] * 5))
    assert times == [0.0, 60.0, 120.0, 180.0, 240.0]


def test_the_loop_can_be_given_to_a_runner() -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(asyncio.sleep(3600, "slept")) == "slept"
        loop = runner.get_loop()
        assert loop.time() == 3600.0
