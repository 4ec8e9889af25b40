"""A polling source with a rate limit: a feed is asked for news again and again, never faster than it allows.

    poll (loop) -> details

`python -m obsdag.examples.polling` asks a feed, which is played here by `Feed`, until it is closed. The limit of 50
calls per second is one object, so `poll` and `details` share it: the printed calls are 20 ms apart, whoever makes them.
Those of `details` that the feed answers with an error are tried again, under the same limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from obsdag import DAG, Context, Executor, ExecutorConfig, Exponential, RateLimit, RunResult

__all__ = ["Busy", "Feed", "build", "main", "read"]


class Busy(Exception):
    """The feed says: come again later."""


class Feed:
    """Plays a service on the network: `entries` come up two at a time, every third one is busy when first asked for."""

    def __init__(self, entries: int = 6) -> None:
        self.entries = entries
        self.calls: list[tuple[float, str]] = []
        self._asked: set[int] = set()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def after(self, number: int) -> list[int] | None:
        """The numbers of the next entries; none if there is nothing new; None if the feed is closed."""
        self.calls.append((self._now(), f"poll after {number}"))
        if number >= self.entries:
            return None
        quiet = number not in self._asked and number > 0
        self._asked.add(number)
        return [] if quiet else list(range(number + 1, min(number + 2, self.entries) + 1))

    async def entry(self, number: int) -> str:
        """The text of one entry."""
        self.calls.append((self._now(), f"details of {number}"))
        if number % 3 == 0 and -number not in self._asked:
            self._asked.add(-number)
            raise Busy(f"entry {number} is not ready")
        return f"entry {number}"


def build(feed: Feed, limit: RateLimit) -> DAG:
    """The DAG that gives out every entry of `feed`, with every call to it under `limit`."""
    dag = DAG("news")

    @dag.loop(limiter=limit)
    async def poll(start: Context) -> AsyncIterator[list[Context]]:
        """Goes on after each `yield` when the run wants more and the limit allows another call."""
        last = 0
        while (numbers := await feed.after(last)) is not None:
            last = max([last, *numbers])
            yield [Context(data={"number": number}) for number in numbers]

    @dag.task(after=poll, limiter=limit, retry_times=3, retry_interval=Exponential(base=0.01), retry_on=Busy)
    async def details(entry: Context) -> Context:
        entry["text"] = await feed.entry(entry["number"])
        return entry

    return dag


async def read(feed: Feed, calls_per_second: int = 50) -> RunResult:
    """Reads the whole feed; the outputs have a `number` and a `text`."""
    dag = build(feed, RateLimit(calls_per_second, name="feed"))
    return await Executor(dag, config=ExecutorConfig(context_worker_num=4)).run()


def main() -> None:
    """Prints every call with its time, then the news."""
    feed = Feed()
    result = asyncio.run(read(feed))
    for at, call in feed.calls:
        print(f"{1000 * (at - feed.calls[0][0]):6.0f} ms  {call}")
    print("news:", *sorted(entry["text"] for entry in result), sep="\n  ")


if __name__ == "__main__":
    main()
