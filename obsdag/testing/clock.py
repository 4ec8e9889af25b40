"""Virtual time: an event loop whose clock jumps to the next timer instead of waiting for it.

    def test_gives_up_after_a_day() -> None:
        result = run_virtual(Executor(dag).run({"order": 7}))  # hours of retries in milliseconds

Retries, rate limits, time-outs and deadlines of a run follow the clock of its event loop, so nothing else has to be
replaced. The order of events is that of real time in which computing takes none.

What is real stays real. While a thread or process works for the loop, time stands still until it has answered: a run
with such tasks takes as long as they do, and its virtual times do not depend on them.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, Unpack

from obsdag.errors import ObsdagError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from obsdag.pools.child import WorkerProcess

__all__ = ["HangError", "VirtualLoop", "run_virtual"]

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class HangError(ObsdagError):
    """Nothing can happen any more in the virtual loop: it waits for what nobody will do. The message says where."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop with a virtual clock: `time()` starts at `start` and only ever jumps.

    When nothing is ready, it looks for what could still come from outside, and then goes on to the next timer:

    - a job in a thread or worker process of obsdag, or of `run_in_executor`: it is waited for; after `patience_s`
      real seconds without an answer it counts as stuck, and time jumps (so that time-outs of stuck threads are
      reached).
    - anything else, which may or may not mean to call: open sockets, threads that were started since, of a thread
      service, say. These get `settle_s` real seconds before each jump.
    - no timer either: a job is waited for without limit, sockets and strange threads for `patience_s`; else, and then,
      HangError.

    turns: how often the loop went round. jumps: how often time jumped, that is, how often a timer woke somebody.
    Both are there to prove that a program does not poll. Durations are seconds.
    """

    def __init__(self, *, start: float = 0.0, patience_s: float = 5.0, settle_s: float = 0.02) -> None:
        self.turns = 0
        self.jumps = 0
        self.patience_s = patience_s
        self.settle_s = settle_s
        self._virtual_now = start
        self._executor_jobs = 0
        self._processes: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()
        self._virtual_selector = _JumpingSelector(self)
        super().__init__(self._virtual_selector)
        self._set(start)
        self._own_files = set(self._virtual_selector.get_map())
        self._old_threads = weakref.WeakSet(threading.enumerate())

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual_now

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[_Ts]], _T], *args: *_Ts
    ) -> asyncio.Future[_T]:
        """As usual; the call is waited for in real time."""
        future = super().run_in_executor(executor, func, *args)
        self._executor_jobs += 1
        future.add_done_callback(self._executor_done)
        return future

    def _executor_done(self, _: asyncio.Future[Any]) -> None:
        self._executor_jobs -= 1

    def add_reader(self, fd: Any, callback: Callable[[Unpack[_Ts]], Any], *args: *_Ts) -> None:
        """As usual; a worker process of obsdag is known by it."""
        child = sys.modules.get("obsdag.pools.child")
        owner = getattr(callback, "__self__", None)
        if child is not None and isinstance(owner, child.WorkerProcess):
            self._processes.add(owner)
        super().add_reader(fd, callback, *args)

    # --- deciding, when nothing is ready

    def _next_turn(self, timeout: float | None, wait: Callable[[float | None], list[Any]]) -> list[Any]:
        """The events of this turn. `timeout` is virtual: seconds to the next timer, None if none is armed."""
        self.turns += 1
        events = wait(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if timeout is None:
            return self._wait_without_timer(wait)
        patience = self.patience_s if self._jobs(wanted_only=True) else self.settle_s if self._strangers() else 0.0
        if events := wait(patience):  # 0: who is gone now may have called just before
            return events
        self.jumps += 1
        self._set(self._target(timeout))
        return []

    def _target(self, timeout: float) -> float:
        """The time `timeout` from now; if that is a timer's but for the rounding, exactly the timer's."""
        target = max(self._virtual_now + timeout, math.nextafter(self._virtual_now, math.inf))
        timers: list[asyncio.TimerHandle] = getattr(self, "_scheduled", [])
        when = timers[0].when() if timers else target
        return when if abs(when - target) <= 4 * math.ulp(target) else target

    def _set(self, now: float) -> None:
        self._virtual_now = now
        # asyncio fires what is due within the clock's resolution from now. A timer that fired before its time would
        # let a program that waits until some time in a loop wait for ever, since only jumps bring time on.
        self._clock_resolution = math.ulp(now)

    def _wait_without_timer(self, wait: Callable[[float | None], list[Any]]) -> list[Any]:
        while self._jobs(wanted_only=False):
            if events := wait(self.patience_s):
                return events
        # Who is gone now may have called just before: hence the last look.
        if events := wait(self.patience_s if self._strangers() else 0):
            return events
        raise HangError(self._hang_story())

    def _jobs(self, wanted_only: bool) -> bool:
        """Whether a thread or process works for this loop; with `wanted_only`, on something that is not abandoned."""
        if self._executor_jobs or any(_is_busy(each) for each in self._processes):
            return True
        return any(_is_working(thread, wanted_only) for thread in self._pool_threads())

    def _pool_threads(self) -> Iterator[Any]:
        module = sys.modules.get("obsdag.pools.thread")
        for thread in threading.enumerate() if module is not None else ():
            if isinstance(thread, module._PoolThread) and thread._post.__self__._loop is self:  # type: ignore[union-attr]
                yield thread

    def _strangers(self) -> bool:
        """Whether sockets are open, or threads run, that may call this loop or not."""
        files = set(self._virtual_selector.get_map()) - self._own_files
        files -= {fd for each in self._processes if not each._reaped for fd in (each._channel.fileno(), each._pidfd)}
        if files:
            return True
        known = {threading.current_thread(), *self._pool_threads(), *self._old_threads}
        return any(not thread.name.startswith("asyncio_") for thread in set(threading.enumerate()) - known)

    def _hang_story(self) -> str:
        tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        where = "; ".join(_where(task) for task in tasks[:5])
        more = f"; and {len(tasks) - 5} more" if len(tasks) > 5 else ""
        return (
            f"the program hangs at {self._virtual_now:g} virtual seconds: nothing is ready, no timer is armed, and no "
            f"thread, process or socket can wake it; {len(tasks)} asyncio task(s) wait{': ' * bool(where)}{where}{more}"
        )


class _JumpingSelector(selectors.BaseSelector):
    """The platform's selector, with the loop to decide how long `select` really waits."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = weakref.ref(loop)
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        loop = self._loop()
        assert loop is not None
        return loop._next_turn(timeout, self._real.select)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


def run_virtual(
    main: Coroutine[Any, Any, _T], *, start: float = 0.0, patience_s: float = 5.0, settle_s: float = 0.02
) -> _T:
    """`asyncio.run(main)` in virtual time (see VirtualLoop for the keywords); returns what `main` returns.

    Raises what `main` raises, and HangError when the program waits for what can never happen.
    """

    def make_loop() -> VirtualLoop:
        return VirtualLoop(start=start, patience_s=patience_s, settle_s=settle_s)

    with asyncio.Runner(loop_factory=make_loop) as runner:
        return runner.run(main)


def _is_working(thread: Any, wanted_only: bool) -> bool:
    """Whether a pool's thread has a job, or has been told to end and will say so."""
    if thread.job is None:
        pool = thread._post.__self__
        return pool._closed or thread in pool._leaving
    return not (wanted_only and thread.job.abandoned)


def _is_busy(process: Any) -> bool:
    """Whether a worker process has something to say soon: it starts, has a job, or is about to end."""
    return not process._reaped and (process.job is not None or not process.ready or process.expected)


def _where(task: asyncio.Task[Any]) -> str:
    frames = task.get_stack(limit=1)
    if not frames:
        return task.get_name()
    code = frames[-1].f_code
    return f"{task.get_name()} in {code.co_qualname} ({code.co_filename}:{frames[-1].f_lineno})"
