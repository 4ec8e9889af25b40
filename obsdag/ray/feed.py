"""An async input of a run on shards: the caller's code, which may raise, wait, and not want to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from obsdag.shell import CANCELS

if TYPE_CHECKING:
    from obsdag.ray.driver import Driver

__all__ = ["Feed"]

_LEAST_S = 0.05  # for what is to end without a grace


class Feed:
    """Asks an async input of the driver's run for an item whenever `allow` says that there is room for one.

    States: (run) asking -> ended, when there are no more | (close) closed, or given up if it does not let itself be
    ended. task: of `run`.
    """

    def __init__(self, inputs: AsyncIterator[Any], driver: Driver) -> None:
        self.task: asyncio.Task[None] | None = None
        self.ended = False
        self._inputs = inputs
        self._driver = driver
        self._room = 0
        self._wanted = asyncio.Event()
        self._closing = self._given_up = False

    def allow(self, room: int) -> None:
        """There is room for so many items from now on."""
        self._room = room
        self._wanted.set()

    async def run(self) -> None:
        """Goes on until there are no more items, or the input raises, which ends the run."""
        try:
            while True:
                while self._room <= 0:
                    self._wanted.clear()
                    await self._wanted.wait()
                item = await anext(self._inputs)
                if self._given_up:  # the run is over
                    return
                self._room -= self._driver.take(item)
        except StopAsyncIteration:
            self.ended = True
            self._driver.pump_soon()
        except asyncio.CancelledError:
            if self._closing:
                raise
            self._driver.end_early("input", asyncio.CancelledError("the input iterator was cancelled"))
        except Exception as error:
            self._driver.end_early("input", error)

    async def close(self, grace_s: float) -> list[str]:
        """Ends and closes the input; what does not let it within `grace_s` seconds is given up, and told in words.

        Raises what closing it raises.
        """
        self._closing = True
        end = asyncio.get_running_loop().time() + grace_s
        if self.task is not None and not await _cancelled(self.task, grace_s):
            self._given_up = True  # it runs, so it cannot be closed
            return ["the input swallows its cancellation"]
        if self.ended or not hasattr(self._inputs, "aclose"):
            return []
        closing = asyncio.get_running_loop().create_task(_itself(self._inputs.aclose()))
        await asyncio.wait([closing], timeout=max(end - asyncio.get_running_loop().time(), _LEAST_S))
        if not closing.done():
            await _cancelled(closing, _LEAST_S)
            return ["the input did not close within the grace"]
        if not closing.cancelled():
            closing.result()
        return []


async def _cancelled(task: asyncio.Task[None], grace_s: float) -> bool:
    """Cancels it, again if that is swallowed, until the grace is over (E9); whether it has ended."""
    for _ in range(CANCELS):
        if not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=max(grace_s, _LEAST_S) / CANCELS)
    return task.done()


async def _itself(awaitable: Any) -> None:
    """What a task can be made of: `aclose` of an async generator is awaitable, and no coroutine."""
    await awaitable
