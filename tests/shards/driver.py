"""A driver with a journal, which test_journal.py kills: `python -m tests.shards.driver run|serve ADDRESS FOLDER`."""

from __future__ import annotations

import asyncio
import sys
from itertools import count
from pathlib import Path

from obsdag import ExecutorConfig, SQLiteJournal
from obsdag.ray import RayExecutor, RayServeExecutor
from tests.shards import dags


async def main(kind: str, address: str, folder: Path) -> None:
    journal = SQLiteJournal(folder / "j.db")
    config = ExecutorConfig(context_worker_num=8, task_worker_num=0, journal=journal)
    place = {"resources": {"shard": 1}, "num_cpus": 1}
    if kind == "run":
        executor = RayExecutor(dags.slow, config, shards=2, address=address, shard_options=place)
        async with executor.stream({"x": number} for number in count()) as outputs:
            async for output in outputs:
                print(output["x"], flush=True)
    else:
        async with RayServeExecutor(dags.gate, config, shards=2, address=address, shard_options=place) as serving:
            for number in range(10):
                ticket = await serving.submit({"x": number, "gate": str(folder / "gate")}, id=f"n{number}")
                print(ticket.id, flush=True)
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
