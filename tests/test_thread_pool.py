"""The engine's thread pool, with real threads (SEMANTICS T12, T13, E9, E18)."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from obsdag.errors import ConfigError, PoolError
from obsdag.pools import PoolJob, ThreadPool

LONG_S = 30.0  # a bound for what must happen at once; reaching it is a failure


class Events:
    def __init__(self) -> None:
        self.abandoned: list[tuple[str, str, float]] = []

    def thread_abandoned(self, thread: str, what: str, running_s: float) -> None:
        self.abandoned.append((thread, what, running_s))

    def pool_rebuilt(self, pool: str, reason: str) -> None:
        raise AssertionError("a thread pool is not rebuilt")


class Gate:
    """A function that blocks its thread until the test opens it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()

    def __call__(self, value: Any = None) -> Any:
        self.entered.set()
        assert self._open.wait(LONG_S)
        return value

    def open(self) -> None:
        self._open.set()

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, LONG_S)


def run(pool: ThreadPool, function: Callable[..., Any], *args: Any) -> PoolJob:
    return pool.submit(function, *args, context=contextvars.copy_context())


def watch_return(job: PoolJob) -> asyncio.Event:
    returned = asyncio.Event()
    job.on_return = returned.set
    return returned


async def soon(event: asyncio.Event) -> None:
    async with asyncio.timeout(LONG_S):
        await event.wait()


def thread_names(pool: ThreadPool) -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(pool.name)}


# --- work


async def test_T12_contextvars_reach_the_thread() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    pool = ThreadPool(1, "vars")
    context = contextvars.copy_context()
    context.run(variable.set, "of the task")
    assert await pool.submit(variable.get, context=context).future == "of the task"
    assert await run(pool, variable.get).future == "unset"
    await pool.close(1)


async def test_work_runs_in_daemon_threads_of_the_pool() -> None:
    pool = ThreadPool(1, "mine")
    thread = await run(pool, threading.current_thread).future
    assert thread.daemon
    assert thread.name.startswith("obsdag-mine-")
    assert await run(pool, divmod, 7, 2).future == (3, 1)
    await pool.close(1)


@pytest.mark.parametrize("error", [KeyError("k"), KeyboardInterrupt(), SystemExit(3), asyncio.CancelledError()])
async def test_whatever_is_raised_reaches_the_future_and_the_thread_lives_on(error: BaseException) -> None:
    def work() -> None:
        raise error

    pool = ThreadPool(1, "raising")
    job = run(pool, work)
    await asyncio.wait([job.future], timeout=LONG_S)
    assert job.future.exception() is error
    assert await run(pool, int, "7").future == 7
    assert pool.workers == 1
    await pool.close(1)


async def test_T1_stop_iteration_does_not_hang_its_waiter() -> None:
    pool = ThreadPool(1, "stop")
    job = run(pool, next, iter(()))
    with pytest.raises(RuntimeError, match="next raised StopIteration") as caught:
        await asyncio.wait_for(job.future, LONG_S)
    assert isinstance(caught.value.__cause__, StopIteration)
    await pool.close(1)


async def test_E18_threads_start_on_demand_up_to_the_size() -> None:
    pool = ThreadPool(2, "demand")
    assert pool.workers == 0
    gates = [Gate() for _ in range(4)]
    jobs = [run(pool, gate, number) for number, gate in enumerate(gates)]
    assert [job.started for job in jobs] == [True, True, False, False]
    assert (pool.workers, pool.busy, pool.queued, pool.abandoned) == (2, 2, 2, 0)
    for gate in gates:
        gate.open()
    assert await asyncio.gather(*(job.future for job in jobs)) == [0, 1, 2, 3]
    assert (pool.workers, pool.busy, pool.queued) == (2, 0, 0)
    await pool.close(1)


async def test_waiting_jobs_start_in_order_and_tell_so_on_the_loops_thread() -> None:
    pool = ThreadPool(1, "order")
    started: list[tuple[int, int]] = []
    gate = Gate()
    first = run(pool, gate)
    first.on_start = lambda: started.append((0, threading.get_ident()))
    jobs = [run(pool, str, number) for number in (1, 2, 3)]
    for number, job in enumerate(jobs, 1):
        job.on_start = lambda number=number: started.append((number, threading.get_ident()))
    gate.open()
    assert await asyncio.gather(*(job.future for job in jobs)) == ["1", "2", "3"]
    assert started == [(number, threading.get_ident()) for number in (1, 2, 3)]
    await pool.close(1)


async def test_threads_that_finish_at_once_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ThreadPool(6, "batch")
    gate = Gate()
    jobs = [run(pool, gate, number) for number in range(6)]
    loop = asyncio.get_running_loop()
    wakes: list[Any] = []
    wake = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args, **kw: (wakes.append(args), wake(*args, **kw)))
    gate.open()
    idle = threading.Event()
    while len(pool._returned) < 6:  # the loop is kept from running until all have posted
        idle.wait(0.001)
    assert await asyncio.gather(*(job.future for job in jobs)) == list(range(6))
    assert len(wakes) == 1
    monkeypatch.undo()
    await pool.close(1)


async def test_an_idle_thread_keeps_nothing_of_its_last_job_alive() -> None:
    class Thing:
        pass

    pool = ThreadPool(1, "refs")
    thing = Thing()
    gone = weakref.ref(thing)
    await run(pool, lambda it: it, thing).future
    await run(pool, lambda: None).future  # the thread is beyond the first job's last steps
    del thing
    gc.collect()
    assert gone() is None
    await pool.close(1)


# --- cancelled and abandoned


async def test_a_cancelled_future_does_not_break_the_pool() -> None:
    pool = ThreadPool(1, "cancel")
    gate = Gate()
    running = run(pool, gate)
    ran: list[int] = []
    waiting = run(pool, ran.append, 1)
    running.future.cancel()
    waiting.future.cancel()
    gate.open()
    assert await run(pool, str, 2).future == "2"
    assert ran == []
    assert waiting.over
    assert waiting.abandon()
    await pool.close(1)


async def test_T13_an_abandoned_job_that_waits_never_runs() -> None:
    pool = ThreadPool(1, "unstarted")
    gate = Gate()
    first = run(pool, gate)
    ran: list[int] = []
    second = run(pool, ran.append, 1)
    assert second.abandon() is True
    assert second.future.cancelled()
    assert pool.queued == 0
    gate.open()
    await first.future
    await run(pool, str, 1).future
    assert ran == []
    await pool.close(1)


async def test_T13_on_return_comes_when_the_abandoned_function_has_really_returned() -> None:
    events = Events()
    pool = ThreadPool(1, "late", events=events)
    gate = Gate()
    job = run(pool, gate)
    returned = watch_return(job)
    await gate.wait_entered()
    assert job.abandon() is False
    assert job.abandon() is False
    assert job.future.cancelled()
    assert not returned.is_set()
    assert (pool.busy, pool.abandoned) == (0, 1)
    gate.open()
    await soon(returned)
    assert job.abandon() is True
    assert pool.abandoned == 0
    ((thread, what, running_s),) = events.abandoned
    assert thread.startswith("obsdag-late-")
    assert "Gate" in what
    assert running_s >= 0
    await pool.close(1)


async def test_T13_a_hung_thread_is_replaced_up_to_the_cap_and_the_surplus_ends() -> None:
    events = Events()
    pool = ThreadPool(1, "hung", replace_cap=1, events=events)
    gates = [Gate(), Gate()]
    first = run(pool, gates[0])
    second = run(pool, gates[1])
    assert not second.started
    first.abandon()
    assert second.started  # in the replacement
    third = run(pool, str, 3)
    second.abandon()
    assert not third.started  # the cap is reached: nothing is left to run it
    assert (pool.workers, pool.abandoned, pool.queued) == (2, 2, 1)
    returned = watch_return(first)
    gates[0].open()
    await soon(returned)
    assert await third.future == "3"
    returned = watch_return(second)
    gates[1].open()
    await soon(returned)
    assert (pool.workers, pool.abandoned) == (1, 0)
    assert len(events.abandoned) == 2
    await pool.close(1)
    assert thread_names(pool) == set()


async def test_a_callback_that_raises_is_told_to_the_loop_and_the_pool_goes_on() -> None:
    pool = ThreadPool(1, "callbacks")
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, told_of: told.append(told_of))
    gate = Gate()
    first, second = run(pool, gate), run(pool, str, 2)
    second.on_start = lambda: {}["missing"]
    gate.open()
    assert await second.future == "2"
    assert first.future.done()
    assert isinstance(told[0]["exception"], KeyError)
    await pool.close(1)


# --- the end


async def test_E9_close_ends_idle_threads_even_without_grace() -> None:
    pool = ThreadPool(3, "idle")
    gate = Gate()
    jobs = [run(pool, gate) for _ in range(3)]
    gate.open()
    await asyncio.gather(*(job.future for job in jobs))
    assert len(thread_names(pool)) == 3
    assert await pool.close(0) == []
    assert thread_names(pool) == set()
    assert pool.workers == 0
    with pytest.raises(PoolError, match="closed"):
        run(pool, str)


async def test_E9_close_lets_running_jobs_finish_and_fails_waiting_ones() -> None:
    pool = ThreadPool(1, "grace")
    gate = Gate()
    running, waiting = run(pool, gate, "done"), run(pool, str)
    closing = asyncio.create_task(pool.close(LONG_S))
    await asyncio.sleep(0)
    gate.open()
    assert await closing == []
    assert await running.future == "done"
    with pytest.raises(PoolError, match="before str could start"):
        await waiting.future


async def test_E9_close_describes_what_is_left_and_that_ends_when_it_returns() -> None:
    pool = ThreadPool(2, "left")
    gate = Gate()
    job = run(pool, gate)
    await gate.wait_entered()
    await run(pool, str).future
    left = await pool.close(0)
    assert len(left) == 1
    (name,) = thread_names(pool)
    assert left[0].startswith(f"thread {name} runs ")
    assert "Gate" in left[0]
    with pytest.raises(PoolError, match="was closed while"):
        await job.future
    returned = watch_return(job)
    gate.open()
    await soon(returned)
    assert await pool.close(LONG_S) == []
    assert thread_names(pool) == set()


async def test_close_of_an_unused_pool_and_again_is_nothing() -> None:
    pool = ThreadPool(1, "unused")
    assert await pool.close(0) == []
    assert await pool.close(0) == []


def test_a_loop_closed_while_a_thread_runs_is_tolerated() -> None:
    gate = Gate()
    failures: list[Any] = []
    previous, threading.excepthook = threading.excepthook, failures.append

    async def main() -> ThreadPool:
        pool = ThreadPool(1, "orphan")
        run(pool, gate)
        return pool

    try:
        pool = asyncio.run(main())
        (thread,) = (thread for thread in threading.enumerate() if thread.name.startswith(pool.name))
        gate.open()
        thread.join(LONG_S)
        assert not thread.is_alive()
    finally:
        threading.excepthook = previous
    assert failures == []


def test_T13_a_hung_thread_does_not_keep_the_interpreter_from_exiting() -> None:
    script = """
import asyncio, contextvars, threading
from obsdag.pools import ThreadPool

async def main():
    pool = ThreadPool(1, "hang")
    job = pool.submit(threading.Event().wait, context=contextvars.copy_context())
    print(job.started, await pool.close(0.01))

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "True ['thread obsdag-hang-1 runs Event.wait since" in ended.stdout
    assert ended.stderr == ""


def test_sizes_are_checked_and_zero_is_the_default_size() -> None:
    assert ThreadPool(0, "default").size > 4
    with pytest.raises(ConfigError, match="size must be >= 0, not -1"):
        ThreadPool(-1, "wrong")
    with pytest.raises(ConfigError, match="replace_cap must be >= 0 or None, not -1"):
        ThreadPool(1, "wrong", replace_cap=-1)
