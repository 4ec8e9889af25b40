"""A worker without a web framework: takes messages from a queue, runs each through a DAG, and acknowledges it.

    decode -> store

`python -m obsdag.examples.queue_worker` works off a queue of 200 messages (played here by `Broker`; two of them cannot
be read), then ends. Its live page is at http://127.0.0.1:9464 meanwhile. What to look at in here:

- a message is acknowledged when its context has ended well, and given back otherwise: none is lost, whatever happens
- `submit` waits while too much is under way, so the worker takes no more from the queue than it can work on
- on SIGTERM `/readyz` says no first; then it takes no more messages, and finishes those that it has
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import obsdag.logs
from obsdag import DAG, Context, ContextFailedError, ExecutorConfig, NotAcceptingError, ServeExecutor, Telemetry, Ticket
from obsdag.ops import start_ops_server

__all__ = ["Broker", "build", "main", "work"]


class Broker:
    """Plays a message broker: `get` waits for the next message; one is gone when it is acknowledged, not before."""

    def __init__(self, messages: list[bytes]) -> None:
        self._waiting = list(enumerate(messages))[::-1]
        self.held: dict[int, bytes] = {}
        self.done: list[int] = []
        self.refused: list[int] = []

    async def get(self) -> tuple[int, bytes] | None:
        """The next message; None when there will be no more."""
        await asyncio.sleep(0)
        if not self._waiting:
            return None
        number, body = self._waiting.pop()
        self.held[number] = body
        return number, body

    def acknowledge(self, number: int) -> None:
        """The message was worked off."""
        del self.held[number]
        self.done.append(number)

    def refuse(self, number: int) -> None:
        """The message cannot be worked off: for the dead letters."""
        del self.held[number]
        self.refused.append(number)

    def give_back(self, number: int) -> None:
        """Somebody else may try."""
        self._waiting.append((number, self.held.pop(number)))


def build(store: list[dict[str, Any]]) -> DAG:
    """The DAG of one message."""
    dag = DAG("messages")

    @dag.task
    async def decode(ctx: Context) -> Context:
        ctx["message"] = json.loads(ctx["body"])
        return ctx

    @dag.task(name="store", after=decode, retry_times=3, retry_interval=0.1)
    async def put(ctx: Context) -> Context:
        await asyncio.sleep(0.01)  # a database, say
        store.append(ctx["message"])
        return ctx

    return dag


async def work(broker: Broker, executor: ServeExecutor) -> None:
    """Works until the queue is at its end or a signal comes; either way what was taken is seen to its end."""
    settling: set[asyncio.Task[None]] = set()
    async with executor:
        taking = asyncio.create_task(_take(broker, executor, settling))
        stopping = asyncio.create_task(executor.stopped())
        await asyncio.wait([taking, stopping], return_when=asyncio.FIRST_COMPLETED)
        taking.cancel()  # a broker may have nothing for hours
        stopping.cancel()
        ends = await asyncio.gather(taking, stopping, return_exceptions=True)
        await executor.drain()
        await asyncio.gather(*settling)
    if isinstance(ends[0], Exception):
        raise ends[0]


async def _take(broker: Broker, executor: ServeExecutor, settling: set[asyncio.Task[None]]) -> None:
    """Takes messages until there are no more, or the executor takes none."""
    while (taken := await broker.get()) is not None:
        number, body = taken
        try:
            ticket = await executor.submit({"body": body})
        except (NotAcceptingError, asyncio.CancelledError) as end:  # it waited for room when the signal came
            broker.give_back(number)
            if isinstance(end, asyncio.CancelledError):
                raise
            return
        task = asyncio.create_task(_settle(broker, number, ticket))
        settling.add(task)
        task.add_done_callback(settling.discard)


async def _settle(broker: Broker, number: int, ticket: Ticket) -> None:
    with contextlib.suppress(ContextFailedError):
        await ticket.results()
    if ticket.status in ("output", "split"):
        broker.acknowledge(number)
    elif ticket.status == "cancelled":  # the grace of a drain was over
        broker.give_back(number)
    else:
        broker.refuse(number)


def main(messages: int = 200) -> None:
    """Works off a queue and prints what became of it."""
    obsdag.logs.configure(json=True, level="ERROR")
    bodies = [b"%d is no object" % n if n % 100 == 50 else b'{"number": %d}' % n for n in range(messages)]
    broker, store = Broker(bodies), list[dict[str, Any]]()
    config = ExecutorConfig(context_worker_num=8, max_live_contexts=16, max_pending=0, telemetry=Telemetry("worker"))
    executor = ServeExecutor(build(store), config=config, handle_signals=True)
    with start_ops_server(executor, port=0):
        asyncio.run(work(broker, executor))
    print(
        f"{len(store)} stored, {len(broker.done)} acknowledged, {len(broker.refused)} refused, {len(broker.held)} held"
    )


if __name__ == "__main__":
    main()
