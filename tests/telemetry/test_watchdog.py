"""What keeps the event loop from turning is told with its line, and nothing is left behind (TELEMETRY 5).

Blocks here end when they have been told of, so that no test waits for longer than it must.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from obsdag.config import ExecutorConfig
from obsdag.context import Context
from obsdag.core.observer import Observer
from obsdag.core.records import Execution
from obsdag.executor import Executor
from obsdag.graph import DAG
from obsdag.telemetry.watchdog import _PACKAGE, Watchdog, _execution_in, _line_of, _watchers
from tests.telemetry.corerun import CoreRun

WAIT_S = 30.0


class Told(Observer):
    """Remembers what the watchdog tells; `blocked` is set from its thread, at the report of that number."""

    def __init__(self, at_report: int = 1) -> None:
        self.lags: list[float] = []
        self.blocks: list[tuple[Execution | None, float, str]] = []
        self.threads: set[str] = set()
        self.blocked = threading.Event()
        self.ticked = asyncio.Event()
        self._at_report = at_report

    def loop_lagged(self, lag_s: float) -> None:
        self.lags.append(lag_s)
        self.ticked.set()

    def loop_blocked(self, execution: Execution | None, blocked_s: float, stack: str) -> None:
        self.blocks.append((execution, blocked_s, stack))
        self.threads.add(threading.current_thread().name)
        if len(self.blocks) >= self._at_report:
            self.blocked.set()


def watchdog() -> Watchdog:
    return Watchdog(interval_s=0.01, blocked_after_s=0.03)


def run_dag(function: Callable[[Context], Any], *observers: Observer) -> None:
    dag = DAG("etl")
    dag.task(function, name="load")
    Executor(dag, config=ExecutorConfig(observers=observers, context_worker_num=2)).run_sync({})


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("obsdag")]


def test_a_task_that_blocks_is_told_with_its_line() -> None:
    told = Told()

    async def load(ctx: Context) -> Context:
        await asyncio.sleep(0)
        told.blocked.wait(WAIT_S)
        return ctx

    run_dag(load, told, watchdog())

    execution, blocked_s, line = told.blocks[0]
    assert execution is not None
    assert (execution.task.id, execution.attempt) == ("load", 1)
    assert blocked_s >= 0.03
    assert line.startswith(f"{__file__}:{load.__code__.co_firstlineno + 2} in load: told.blocked.wait(WAIT_S) -> ")
    assert line.endswith("in wait"), "and where in the library it hangs"
    assert told.threads == {"obsdag-watchdog"}
    assert threads() == []


def test_a_block_that_goes_on_is_told_again_each_time_it_has_doubled() -> None:
    told = Told(at_report=3)

    async def load(ctx: Context) -> Context:
        told.blocked.wait(WAIT_S)
        return ctx

    run_dag(load, told, watchdog())

    times = [blocked_s for _, blocked_s, _ in told.blocks[:3]]
    assert times[1] >= 2 * times[0]
    assert times[2] >= 2 * times[1]


async def test_each_of_two_contexts_in_flight_is_told_apart() -> None:
    told = Told()
    dag = DAG("etl")

    async def load(ctx: Context) -> Context:
        if ctx.id == "blocks":
            told.blocked.wait(WAIT_S)
        else:
            await asyncio.sleep(0)
        return ctx

    dag.task(load, name="load")
    config = ExecutorConfig(observers=(told, watchdog()), context_worker_num=2)
    await Executor(dag, config=config).run([Context(name="waits"), Context(name="blocks")])

    execution = told.blocks[0][0]
    assert execution is not None
    assert execution.context.id == "blocks"


async def test_a_block_of_the_hosts_own_is_told_without_execution() -> None:
    run, told, dog = CoreRun(), Told(), watchdog()
    run.observe(told, dog)
    try:
        told.blocked.wait(WAIT_S)
    finally:
        run.end()

    execution, _, line = told.blocks[0]
    assert execution is None
    assert "in test_a_block_of_the_hosts_own" in line


async def test_waiting_in_a_selector_of_ones_own_blocks_too() -> None:
    run, told = CoreRun(), Told()
    run.observe(told, watchdog())
    here, there = socket.socketpair()
    with here, there, selectors.DefaultSelector() as selector:
        selector.register(here, selectors.EVENT_READ)
        helper = threading.Thread(target=lambda: told.blocked.wait(WAIT_S) and there.send(b"x"))
        helper.start()
        selector.select(WAIT_S)
        helper.join()
    run.end()

    assert "selector.select(WAIT_S) -> selectors.py" in told.blocks[0][2]


async def test_an_idle_loop_ticks_and_is_not_blocked() -> None:
    run, told = CoreRun(), Told()
    run.observe(told, watchdog())
    for _ in range(10):
        told.ticked.clear()
        await told.ticked.wait()
    run.end()

    assert told.blocks == []
    assert len(told.lags) >= 10
    assert all(lag_s >= 0.0 for lag_s in told.lags)


async def test_runs_of_one_loop_share_beat_and_thread_until_the_last_has_ended() -> None:
    first, second = CoreRun(), CoreRun()
    told_first, told_second = Told(), Told()
    dog = watchdog()
    first.observe(told_first, dog)
    second.observe(told_second, dog)
    assert threads() == ["obsdag-watchdog"]
    await told_first.ticked.wait()
    assert told_second.ticked.is_set()

    first.end()
    assert threads() == ["obsdag-watchdog"]
    second.end()
    assert threads() == []
    assert not _watchers._beats

    third = CoreRun().observe(told_first, dog)
    assert threads() == ["obsdag-watchdog"], "a later run starts it anew"
    third.end()


def test_loops_of_several_threads_are_watched_by_one_thread() -> None:
    told = Told()
    both = threading.Barrier(2, timeout=WAIT_S)
    seen: list[list[str]] = []

    async def load(ctx: Context) -> Context:
        both.wait()
        seen.append(threads())
        both.wait()
        return ctx

    pair = [threading.Thread(target=run_dag, args=(load, told, watchdog())) for _ in range(2)]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()

    assert seen == [["obsdag-watchdog"]] * 2
    assert threads() == []


def test_a_loop_closed_under_a_run_that_never_ended_is_forgotten() -> None:
    run = CoreRun()

    async def main() -> None:
        run.observe(watchdog())

    asyncio.run(main())
    thread = next(each for each in threading.enumerate() if each.name == "obsdag-watchdog")
    thread.join(WAIT_S)

    assert not thread.is_alive()
    assert not _watchers._beats
    run.end()


def test_the_core_without_a_loop_is_not_watched() -> None:
    run = CoreRun().observe(Watchdog())

    assert threads() == []
    run.end()


async def test_a_loop_that_is_late_but_idle_is_not_blocked() -> None:
    run, told = CoreRun(), Told()
    run.observe(told, watchdog())
    (beat,) = _watchers._beats.values()
    looks: list[float] = []

    def look_from_elsewhere() -> None:
        while not looks:  # until the loop waits in its selector
            frame = sys._current_frames()[beat.thread_id]
            if frame.f_code.co_name == "select":
                looks.append(beat.look(beat.due + 60.0))

    await asyncio.to_thread(look_from_elsewhere)
    run.end()

    assert looks == [0.03], "looked at again later"
    assert told.blocks == []


class Virtual(asyncio.SelectorEventLoop):
    """A loop whose time a test makes up."""

    def time(self) -> float:
        return super().time() + 1_000.0


def test_a_loop_with_a_virtual_clock_is_not_watched() -> None:
    async def main() -> None:
        run = CoreRun().observe(watchdog())
        assert threads() == []
        run.end()

    with asyncio.Runner(loop_factory=Virtual) as runner:
        runner.run(main())


async def test_nothing_of_a_run_is_kept_after_it_ended() -> None:
    run = CoreRun().observe(watchdog())
    run.end()
    state = run.state
    del run
    gc.collect()

    assert not [each for each in gc.get_referrers(state) if type(each).__name__ == "_Beat"]


def _watch_in_child(answers: Any) -> None:
    told = Told()

    async def load(ctx: Context) -> Context:
        told.blocked.wait(WAIT_S)
        return ctx

    run_dag(load, told, watchdog())
    answers.send(len(told.blocks) > 0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
async def test_a_forked_child_has_a_watchdog_of_its_own() -> None:
    run = CoreRun().observe(watchdog())
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_forked, args=(theirs,))
    child.start()
    theirs.close()
    try:
        assert await asyncio.to_thread(ours.poll, WAIT_S)
        assert ours.recv() is True
    finally:
        await asyncio.to_thread(child.join)
        child.close()
        ours.close()
        run.end()


def _forked(answers: Any) -> None:
    asyncio._set_running_loop(None)  # the child was forked from within a running loop
    _watch_in_child(answers)


def test_an_execution_that_is_being_made_is_passed_over() -> None:
    unfinished = Execution.__new__(Execution)  # as another thread sees it in the middle of its making
    code = SimpleNamespace(co_filename=f"{_PACKAGE}core/state.py")
    frame: Any = SimpleNamespace(f_code=code, f_locals={"execution": unfinished}, f_back=None)

    assert _execution_in(frame) is None


def test_a_frame_that_is_between_two_lines_is_told_with_its_first() -> None:
    code = SimpleNamespace(co_filename="user.py", co_name="work", co_firstlineno=7)
    frame: Any = SimpleNamespace(f_code=code, f_lineno=None, f_globals={}, f_back=None)

    assert _line_of(frame) == "user.py:7 in work"
