"""What a test may leave behind: nothing (SEMANTICS E9). Used by conftest.py around every test.

Looked at: asyncio tasks and armed timers of the test's loop, threads (the engine's own even when they are daemons),
child processes, open files. Not counted: multiprocessing's resource tracker and fork server, one each per interpreter.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Collection
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import NamedTuple

__all__ = ["KINDS", "Snapshot", "loop_leftovers", "summary"]

KINDS = ("tasks", "timers", "threads", "processes", "files")
SETTLE_S = 2.0
"""Threads and processes that were told to end take a moment: they get this long, and only where there are some."""

_FDS = Path("/proc/self/fd")


class Snapshot(NamedTuple):
    """What this process holds at one moment: thread idents, child process ids, open files as (number, target)."""

    threads: frozenset[int | None]
    processes: frozenset[int]
    files: frozenset[tuple[int, str]]

    @classmethod
    def take(cls) -> Snapshot:
        return cls(frozenset(thread.ident for thread in threading.enumerate()), _children(), _open_files())

    def leftovers(self, allowed: Collection[str] = ()) -> list[str]:
        """One line for each thing that is here now, was not then, and is not of an allowed kind."""
        found = self._new(allowed)
        if found:
            gc.collect()  # files held by cycles of a failed test are not leaked
        deadline = time.monotonic() + SETTLE_S
        while found and time.monotonic() < deadline:
            time.sleep(0.01)
            found = self._new(allowed)
        return found

    def _new(self, allowed: Collection[str]) -> list[str]:
        found = []
        if "threads" not in allowed:
            found += [f"thread {thread.name!r}" for thread in threading.enumerate() if self._is_leaked(thread)]
        if "processes" not in allowed:
            found += [f"process {_command(pid)}" for pid in sorted(_children() - self.processes)]
        if "files" not in allowed:
            found += [f"file {number} -> {target}" for number, target in sorted(_open_files() - self.files)]
        return found

    def _is_leaked(self, thread: threading.Thread) -> bool:
        counted = not thread.daemon or thread.name.startswith("obsdag")
        return counted and thread.ident not in self.threads


def loop_leftovers(loop: asyncio.AbstractEventLoop, allowed: Collection[str] = ()) -> list[str]:
    """One line for each asyncio task and armed timer of `loop`, called from its only rightful task."""
    found = []
    if "tasks" not in allowed:
        found += [f"task {task!r}" for task in asyncio.all_tasks(loop) - {asyncio.current_task(loop)}]
    if "timers" not in allowed:
        timers = getattr(loop, "_scheduled", ())  # private, but the only place that knows; absent on other loops
        found += [f"timer {timer!r}" for timer in timers if not timer.cancelled()]
    return found


def summary(found: list[str]) -> str:
    """The first few lines as one, and how many there are more."""
    return "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")


def _children() -> frozenset[int]:
    own = {
        getattr(resource_tracker._resource_tracker, "_pid", None),
        getattr(forkserver._forkserver, "_forkserver_pid", None),
    }
    pids: set[int] = set()
    for task in Path("/proc/self/task").glob("*"):
        try:
            pids.update(map(int, (task / "children").read_text().split()))
        except OSError:  # the thread ended meanwhile
            continue
    return frozenset(pids - own)


def _open_files() -> frozenset[tuple[int, str]]:
    own = {
        getattr(resource_tracker._resource_tracker, "_fd", None),
        getattr(forkserver._forkserver, "_forkserver_alive_fd", None),
    }
    files = set()
    for entry in _FDS.iterdir() if _FDS.exists() else ():
        try:
            target = os.readlink(entry)
        except OSError:  # the descriptor of this very listing
            continue
        if int(entry.name) not in own:
            files.add((int(entry.name), target))
    return frozenset(files)


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        words = []
    return f"{pid} ({b' '.join(words).decode(errors='replace').strip() or 'ended, not waited for'})"
