"""The engine's own pools of threads and of worker processes (SEMANTICS T11 to T13, E18).

    job.py       PoolJob: one piece of work; PoolEvents: what a pool tells
    thread.py    ThreadPool: daemon threads, jobs handed out on the loop's side
    process.py   ProcessPool: one worker process per job in flight, jobs handed out on the loop's side
    child.py     the parent's handle of one worker process: its start, channel, death
    calls.py     the process pool as a concurrent.futures.Executor, for users' own functions
    carry.py     objects, contexts' data and exceptions as bytes, in both directions
    _worker.py   what runs in a worker process; a script that imports nothing of obsdag

The names are imported at first use: a worker process needs `carry` and none of the asyncio parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obsdag.pools.job import PoolEvents, PoolJob
    from obsdag.pools.process import ProcessPool
    from obsdag.pools.thread import ThreadPool

__all__ = ["PoolEvents", "PoolJob", "ProcessPool", "ThreadPool"]

_ROOMS = {"PoolEvents": "job", "PoolJob": "job", "ProcessPool": "process", "ThreadPool": "thread"}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
