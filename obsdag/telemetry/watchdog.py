"""The event loop's watchdog: how late the loop runs, and which line of which task keeps it from running at all.

Two facts come from here. `loop_lagged`: every 100 ms a callback measures how late it is called. `loop_blocked`: one
daemon thread per process wakes when a loop should have ticked; if the loop has not, it reads the loop thread's stack,
finds the execution in the engine's own frames (so that executions need not be tracked while all goes well), and tells
the line; again each time the block has become twice as long.

One beat per event loop, shared by its runs:

    1. the first run on a loop arms a timer and shows the beat to the thread, which is started if it is the first of all
    2. each tick tells every run its lag, and moves `due`, which is all that the thread looks at
    3. the last run to end cancels the timer and takes the beat away; without beats the thread is ended and waited for

Cost: 0.2 % of a core while a run goes on (ten ticks and four wake-ups a second), and 0.15 ms for the thread's start and
end.
"""

from __future__ import annotations

import asyncio
import linecache
import os
import sys
import sysconfig
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Final

from obsdag.core.observer import Observer
from obsdag.core.records import Execution

if TYPE_CHECKING:
    from obsdag.core.state import RunState

__all__ = ["BLOCKED_AFTER_S", "INTERVAL_S", "Watchdog"]

INTERVAL_S: Final = 0.1
BLOCKED_AFTER_S: Final = 0.25
_JOIN_S: Final = 0.2  # it ends within microseconds, unless an observer keeps it
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_IDLE_FRAMES = frozenset({"_run_once", "run_forever", "run_until_complete", "run", "_poll"})


class Watchdog(Observer):
    """Watches the loops of the runs that it observes. interval_s between ticks; blocked_after_s: how late a tick counts
    as blocked.

    A loop that is watched already, for another run, keeps its times. Starts with a run and leaves nothing behind.
    """

    def __init__(self, interval_s: float = INTERVAL_S, blocked_after_s: float = BLOCKED_AFTER_S) -> None:
        self._interval_s = interval_s
        self._blocked_after_s = blocked_after_s

    def run_started(self, run: RunState, now: float) -> None:
        """Begins to watch the running loop for `run`, if there is one and its time is the real one."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if isinstance(loop, asyncio.BaseEventLoop) and type(loop).time is not asyncio.BaseEventLoop.time:
            return
        _watchers.join(run, loop, self._interval_s, self._blocked_after_s)

    def run_finished(self, run: RunState, outcome: str, duration_s: float, now: float) -> None:
        """Ends it."""
        _watchers.leave(run)


class _Beat:
    """One loop. `due`: when its next tick should come (monotonic seconds), changed by the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, interval_s: float, blocked_after_s: float) -> None:
        self.loop = loop
        self.thread_id = threading.get_ident()
        self.interval_s = interval_s
        self.blocked_after_s = blocked_after_s
        self.runs: tuple[RunState, ...] = ()
        self.due = time.monotonic() + interval_s
        self._timer = loop.call_later(interval_s, self._tick)
        self._told_due = 0.0
        self._next_s = blocked_after_s

    def _tick(self) -> None:
        now = time.monotonic()
        lag_s = max(0.0, now - self.due)
        self.due = now + self.interval_s
        self._timer = self.loop.call_later(self.interval_s, self._tick)
        for run in self.runs:
            if run.facts.loop_lagged is not None:
                run.facts.loop_lagged(lag_s)

    def stop(self) -> None:
        self._timer.cancel()

    # --- on the watchdog's thread

    def is_dead(self) -> bool:
        """Whether the loop was closed with a run on it, whose end was therefore never told."""
        return self.loop.is_closed()

    def look(self, now: float) -> float:
        """Tells of a block that has lasted long enough; gives the seconds until the next look."""
        if not self.loop.is_running():  # stopped for now, by a host that drives it bit by bit
            return self.blocked_after_s
        due = self.due
        if due != self._told_due:
            self._told_due, self._next_s = due, self.blocked_after_s
        late_s = now - due
        if late_s >= self._next_s:
            if self._tell(late_s):
                self._next_s = 2 * late_s
            else:
                return self.blocked_after_s
        return self._next_s - late_s

    def _tell(self, late_s: float) -> bool:
        frame = sys._current_frames().get(self.thread_id)
        if frame is None or _is_idle(frame):
            return False
        execution, line = _execution_in(frame), _blocking_line(frame)
        owner = None if execution is None else execution.context._run
        for run in self.runs if owner not in self.runs else (owner,):
            if run is not None and run.facts.loop_blocked is not None:
                run.facts.loop_blocked(execution, late_s, line)
        return True


class _Watchers:
    """All beats of the process and their one thread; `_wake` guards both."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._beats: dict[asyncio.AbstractEventLoop, _Beat] = {}
        self._thread: threading.Thread | None = None

    def join(self, run: RunState, loop: asyncio.AbstractEventLoop, interval_s: float, blocked_after_s: float) -> None:
        with self._wake:
            beat = self._beats.get(loop)
            if beat is None:
                beat = self._beats[loop] = _Beat(loop, interval_s, blocked_after_s)
                self._wake.notify()
            beat.runs = (*beat.runs, run)
            if self._thread is None:
                thread = self._thread = threading.Thread(target=self._watch, name="obsdag-watchdog", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no thread to be had: lags are still told
                    self._thread = None

    def leave(self, run: RunState) -> None:
        with self._wake:
            for loop, beat in list(self._beats.items()):
                if run in beat.runs:
                    beat.runs = tuple(other for other in beat.runs if other is not run)
                    if not beat.runs:
                        beat.stop()
                        del self._beats[loop]
            if self._beats or self._thread is None:
                return
            thread, self._thread = self._thread, None
            self._wake.notify()
        thread.join(_JOIN_S)

    def _watch(self) -> None:
        pause_s = 0.0
        while True:
            with self._wake:
                self._beats = {loop: beat for loop, beat in self._beats.items() if not beat.is_dead()}
                if not self._beats and self._thread is threading.current_thread():
                    self._thread = None
                if self._thread is not threading.current_thread():
                    return
                self._wake.wait(pause_s)
                beats = tuple(self._beats.values())
            now = time.monotonic()
            pause_s = max(0.01, min((beat.look(now) for beat in beats), default=0.0))


def _is_idle(frame: FrameType) -> bool:
    """Whether the loop has nothing to do and is only late in telling: after a suspended process goes on, say."""
    if frame.f_code.co_name == "select" and frame.f_back is not None:
        frame = frame.f_back  # of the loop; a task may wait in a selector too, and that blocks
    code = frame.f_code
    return code.co_name in _IDLE_FRAMES and code.co_filename.startswith(_LIBRARIES) and _is_loop_code(code.co_filename)


def _is_loop_code(filename: str) -> bool:
    return f"{os.sep}asyncio{os.sep}" in filename or f"{os.sep}uvloop{os.sep}" in filename


def _execution_in(frame: FrameType | None) -> Execution | None:
    """The execution whose function runs: a local variable of the innermost frame of the engine that has one."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            for value in list(frame.f_locals.values()):
                if type(value) is Execution and getattr(value, "outcome", "") is None:  # not one that is being made
                    return value
        frame = frame.f_back
    return None


def _blocking_line(frame: FrameType) -> str:
    """The innermost line of the user's own, and where in a library it is: `a.py:3 in f: get() -> ssl.py:9 in read`."""
    own: FrameType | None = frame
    while own is not None and own.f_code.co_filename.startswith(_LIBRARIES):
        own = own.f_back
    if own is None or own is frame or own.f_code.co_filename.startswith(_PACKAGE):
        return _line_of(frame)
    code = frame.f_code
    return f"{_line_of(own)} -> {os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"


def _line_of(frame: FrameType) -> str:
    code = frame.f_code
    line = frame.f_lineno or code.co_firstlineno  # None between two lines of a frame that runs on
    text = linecache.getline(code.co_filename, line, frame.f_globals).strip()
    return f"{code.co_filename}:{line} in {code.co_name}" + (f": {text}" if text else "")


def _renew() -> None:
    global _watchers  # noqa: PLW0603 - a forked child has none of its parent's threads and must not take its lock
    _watchers = _Watchers()


_watchers = _Watchers()
if hasattr(os, "register_at_fork"):  # pragma: no branch - absent on Windows only
    os.register_at_fork(after_in_child=_renew)
