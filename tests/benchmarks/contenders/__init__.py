"""What obsdag is compared with, and obsdag itself: a module each, loaded in a process of its own (`child`).

`prepare(workload)` gives an async function of the number of items that returns how many came out, or None where the
contender has no way to do that workload.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

__all__ = ["Job", "by_workers"]

Job = Callable[[int], Awaitable[Any]]


async def by_workers(items: int, one: Callable[[int], Awaitable[Any]], workers: int) -> int:
    """Calls `one` for every item from a few coroutines; how many came back."""
    numbers: Iterable[int] = iter(range(items))
    done = 0

    async def work() -> None:
        nonlocal done
        for number in numbers:
            await one(number)
            done += 1

    import asyncio

    await asyncio.gather(*(work() for _ in range(workers)))
    return done
