"""The pools of one executor: made at first use, closed with the run, or with `async with executor` (SEMANTICS E18)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from obsdag.errors import ConfigError

if TYPE_CHECKING:
    from concurrent.futures import Executor as FuturesExecutor

    from obsdag.config import ExecutorConfig
    from obsdag.core.observer import Facts
    from obsdag.pools import ProcessPool, ThreadPool

__all__ = ["Pools"]


class Pools:
    """`thread`, `process` and `remote` (a Ray cluster) are None until first used.

    What the pools tell goes to the observers of the open runs.
    """

    def __init__(self, config: ExecutorConfig) -> None:
        self._config = config
        self.thread: ThreadPool | None = None
        self.process: ProcessPool | None = None
        self.remote: Any = None
        self.listeners: list[Facts] = []

    @property
    def used(self) -> bool:
        """Whether there is a pool to close."""
        return self.thread is not None or self.process is not None or self.remote is not None

    def threads(self) -> ThreadPool:
        """The thread pool."""
        if self.thread is None:
            from obsdag.pools import ThreadPool

            self.thread = ThreadPool(self._config.thread_pool_worker_num, "obsdag", events=self)
        return self.thread

    def processes(self, task: str) -> ProcessPool:
        """The process pool. Raises ConfigError, naming the task that wants it, if there is to be none."""
        size = self._config.process_pool_worker_num
        if not size:
            raise ConfigError(
                f"task {task!r} runs in a process: set ExecutorConfig.process_pool_worker_num to 1 or more"
            )
        if self.process is None:
            from obsdag.pools import ProcessPool

            self.process = ProcessPool(size, events=self)
        return self.process

    def remotes(self, task: str) -> Any:
        """The jobs on the Ray cluster. Raises ConfigError, naming the task that wants it, if there is none."""
        cluster: Any = self._config.ray
        if not callable(getattr(cluster, "open_jobs", None)):
            raise ConfigError(f"task {task!r} runs on a Ray cluster: set ExecutorConfig.ray to a RayCluster(...)")
        if self.remote is None:
            self.remote = cluster.open_jobs()
        return self.remote

    def call_executor(self) -> FuturesExecutor | None:
        """The process pool as tasks see it in their Environment (seed), None if there is to be none."""
        return self.processes("").executor if self._config.process_pool_worker_num else None

    async def close(self, grace: float) -> list[str]:
        """Closes all pools; returns what had to be left behind, in words."""
        thread, self.thread = self.thread, None
        process, self.process = self.process, None
        remote, self.remote = self.remote, None
        closings = [pool.close(grace) for pool in (remote, process, thread) if pool is not None]
        return [left for found in await asyncio.gather(*closings) for left in found]

    # --- PoolEvents

    def thread_abandoned(self, thread: str, what: str, running_s: float) -> None:
        """Passes on that a thread runs for nobody any more (T13)."""
        self._tell("thread_abandoned", thread, what, running_s)

    def pool_rebuilt(self, pool: str, reason: str) -> None:
        """Passes on that a worker process died and was replaced (T11)."""
        self._tell("pool_rebuilt", pool, reason)

    def _tell(self, fact: str, *arguments: Any) -> None:
        if self.listeners:  # what happens to a pool belongs to no run: it is told once, to the newest
            tell = getattr(self.listeners[-1], fact)
            if tell is not None:
                tell(*arguments)
