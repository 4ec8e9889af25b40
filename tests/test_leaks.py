"""The leak checks around every test see what they are there for: each leaves one thing behind and looks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

import pytest

from tests import leaks
from tests.leaks import Snapshot, loop_leftovers


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "SETTLE_S", 0.0)


def test_nothing_new_is_nothing_left() -> None:
    assert Snapshot.take().leftovers() == []


@pytest.mark.parametrize(
    ("name", "daemon", "seen"),
    [("user", False, True), ("user", True, False), ("obsdag-pool", True, True)],
)
def test_a_thread_is_seen(name: str, daemon: bool, seen: bool) -> None:
    before = Snapshot.take()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name=name, daemon=daemon)
    thread.start()
    try:
        assert before.leftovers() == ([f"thread {name!r}"] if seen else [])
        assert before.leftovers({"threads"}) == []
    finally:
        end.set()
        thread.join()


def test_an_open_file_is_seen() -> None:
    before = Snapshot.take()
    number = os.open(os.devnull, os.O_RDONLY)
    try:
        assert before.leftovers() == [f"file {number} -> {os.devnull}"]
        assert before.leftovers({"files"}) == []
    finally:
        os.close(number)


def test_a_child_process_is_seen() -> None:
    before = Snapshot.take()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert [line for line in before.leftovers() if line.startswith(f"process {process.pid} ")]
        assert not [line for line in before.leftovers({"processes"}) if line.startswith("process")]
        process.communicate(b"\n")


async def test_a_task_and_a_timer_are_seen() -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(asyncio.Event().wait(), name="forgotten")
    timer = loop.call_later(3600, print)

    lines = loop_leftovers(loop)

    assert [line.split()[0] for line in lines] == ["task", "timer"]
    assert "forgotten" in lines[0]
    assert loop_leftovers(loop, {"tasks", "timers"}) == []
    timer.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert loop_leftovers(loop) == []
