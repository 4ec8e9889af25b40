"""A batching writer as a service: contexts come one by one, a transaction writes many, each gets its own answer.

    price -> write (service, in a thread of its own)

`python -m obsdag.examples.batching` prints how many orders went into the database in how many transactions, and the one
order that the database refuses: its number is there already, so it alone fails.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from obsdag import DAG, Context, Executor, ExecutorConfig, RunResult, StopContext

__all__ = ["BATCH", "WAIT_S", "build", "main", "write_orders"]

BATCH = 50
"""Orders in one transaction, at most."""
WAIT_S = 0.02
"""How long the first order of a batch waits for others."""

Inbox = Queue[tuple[Context, Any]]


def build(database: Path) -> DAG:
    """The DAG that prices orders and writes them into `database`."""
    dag = DAG("orders")

    @dag.task
    async def price(order: Context) -> Context:
        order["total"] = 3 * order["amount"]
        return order

    @dag.service(after=price)
    def write(inbox: Inbox) -> None:
        """Begun by the first order, told to stop at the run's end; the connection belongs to its thread."""
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("CREATE TABLE orders (number INTEGER PRIMARY KEY, total REAL, batch INTEGER)")
            for number, batch in enumerate(_batches(inbox)):
                _write_batch(connection, number, batch)

    return dag


def _batches(inbox: Inbox) -> Iterator[list[tuple[Context, Any]]]:
    """What is in the queue, in batches, until the service is to stop."""
    while True:
        batch = [inbox.get()]
        while len(batch) < BATCH and not isinstance(batch[-1][0], StopContext):
            try:
                batch.append(inbox.get(timeout=WAIT_S))
            except Empty:
                break
        stop = isinstance(batch[-1][0], StopContext)
        yield batch[:-1] if stop else batch
        if stop:
            return


def _write_batch(connection: sqlite3.Connection, number: int, batch: list[tuple[Context, Any]]) -> None:
    """One transaction; an order is answered when it is safe, and one that is refused fails alone."""
    written = []
    with connection:
        for order, answer in batch:
            try:
                row = (order["number"], order["total"], number)
                connection.execute("INSERT INTO orders VALUES (?, ?, ?)", row)
            except sqlite3.IntegrityError as error:
                answer.set_exception(error)
            else:
                written.append((order, answer))
    for order, answer in written:
        order["batch"] = number
        answer.set_result(order)


def write_orders(database: Path, count: int = 200) -> RunResult:
    """Writes `count` orders, the last of which has the number of the one before it; the outputs have a `batch`."""
    orders = ({"number": min(number, count - 2), "amount": number % 7} for number in range(count))
    return Executor(build(database), config=ExecutorConfig(context_worker_num=4)).run_sync(orders)


def main() -> None:
    """Prints what was written and what was not."""
    with tempfile.TemporaryDirectory() as folder:
        result = write_orders(Path(folder, "orders.db"))
    print(f"{len(result)} orders in {len({order['batch'] for order in result})} transactions")
    for failure in result.failures:
        print(f"order {failure.context['number']} refused: {failure.exception}")


if __name__ == "__main__":
    main()
