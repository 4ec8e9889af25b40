"""Whether the engines' event loops answer (`/healthz`), and whether they take work (`/readyz`).

A loop is asked by a callback from outside. One that a task blocks does not run it: then the answer, after `patience_s`,
is how long it has not, and for which DAGs. The question stays open meanwhile, so that the time goes on from one request
to the next. Both answers are open to everybody and name nothing but DAGs, their tasks and phases.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from obsdag.ops.watch import Far
from obsdag.serving import Serving

if TYPE_CHECKING:
    from obsdag.ops.watch import Watch

__all__ = ["Pulse", "readiness"]


class Pulse:
    """Asks loops, from any other loop or their own. Questions are shared: one per loop at a time."""

    def __init__(self, watches: Iterable[Watch], patience_s: float) -> None:
        self._watches = tuple(watches)
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._asked: dict[asyncio.AbstractEventLoop, float] = {}

    async def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether all loops answer, and what to say of it."""
        loops = self._loops()
        waited = await asyncio.gather(*(self._silence(loop) for loop in loops))
        blocked = [
            self._diagnosis(dags, seconds)
            for dags, seconds in zip(loops.values(), waited, strict=True)
            if seconds is not None
        ]
        if blocked:
            return False, {"status": "blocked", "loops": blocked}
        return True, {"status": "ok", "loops": len(loops)}

    def _loops(self) -> dict[asyncio.AbstractEventLoop, list[Watch]]:
        found: dict[asyncio.AbstractEventLoop, list[Watch]] = {}
        for watch in self._watches:
            executor = watch.executor
            runs = list(executor._drivers if isinstance(executor, Far) else executor._shells)
            for loop in {run.loop for run in runs}:
                if loop.is_running():  # one that is stopped for now, by a host that drives it bit by bit, is not ill
                    found.setdefault(loop, []).append(watch)
        with self._lock:
            self._asked = {loop: when for loop, when in self._asked.items() if loop in found}
        return found

    async def _silence(self, loop: asyncio.AbstractEventLoop) -> float | None:
        """Seconds for which the loop has not answered; None if it does."""
        if loop is asyncio.get_running_loop():
            return None
        here, answered = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            since = self._asked.setdefault(loop, time.monotonic())
        try:
            loop.call_soon_threadsafe(self._answer, loop, here, answered)
            async with asyncio.timeout(self._patience_s):
                await answered.wait()
        except TimeoutError:
            return time.monotonic() - since
        except RuntimeError:  # closed meanwhile: nothing is served there any more
            return None
        return None

    def _answer(
        self, loop: asyncio.AbstractEventLoop, here: asyncio.AbstractEventLoop, answered: asyncio.Event
    ) -> None:
        with self._lock:
            self._asked.pop(loop, None)
        try:
            here.call_soon_threadsafe(answered.set)
        except RuntimeError:  # whoever asked is gone
            return

    def _diagnosis(self, watches: list[Watch], seconds: float) -> dict[str, Any]:
        now = time.monotonic()
        told = [watch.blocked_for(now) for watch in watches]
        return {
            "dags": sorted({watch.executor.plan.name for watch in watches}),
            "tasks": sorted({task for _, task in told if task}),
            "blocked_s": round(max(seconds, *(since for since, _ in told)), 3),
        }


def readiness(watches: Iterable[Watch]) -> tuple[bool, dict[str, Any]]:
    """Whether every serving executor accepts; an executor that does not serve has nothing to accept."""
    phases = [
        {"dag": watch.executor.plan.name, "phase": str(watch.executor.phase)}
        for watch in watches
        if isinstance(watch.executor, Serving)
    ]
    ready = all(each["phase"] == "accepting" for each in phases)
    return ready, {"status": "ready" if ready else "not ready", "executors": phases}
