"""Single tasks on a Ray cluster, from a local executor: `RayCluster`, and the pool of its jobs.

A job is a Ray task that says twice something: when it has begun, and what came of it. So a task's timeout counts from
when it has begun, and its wait for a place on the cluster is `pool_wait`, as with other pools.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import ray

from obsdag.errors import PoolError
from obsdag.mailbox import see_through
from obsdag.pools import PoolJob
from obsdag.pools.job import fail_quietly, tell
from obsdag.ray.cluster import Cluster

__all__ = ["RayCluster", "RayJobs"]

_OWN = ("num_cpus", "num_gpus", "memory")
_DEATH_S = 10.0  # a cancelled job's process is dead at once, unless its machine is out of reach; then it is given up
_CONNECT_S = 10.0
"""A connection that is being made gets so long when nobody wants it any more: Ray takes 4 s, and minutes where nobody
answers, and a thread cannot be stopped."""


class RayCluster(Cluster):
    """The cluster that tasks with `runner="ray"` run on: `ExecutorConfig(ray=RayCluster(...))`.

    address: None takes this process's connection to Ray, or starts a cluster on this machine for as long as it is used;
    "local" always does; "auto" or "host:port" joins one. insecure: takes an address that others can reach although it
    asks for no token. cpus: of a cluster that is started, at least. One may be shared by executors. Raises ConfigError.
    """

    def __init__(self, address: str | None = None, *, insecure: bool = False, cpus: float = 1) -> None:
        super().__init__(address, insecure, cpus)

    def __repr__(self) -> str:
        return f"RayCluster({self.address!r})"

    def __reduce__(self) -> Any:
        """In a process of the cluster it is the connection of that process, which was checked where this comes from."""
        return partial(RayCluster, None, insecure=True), ()

    def open_jobs(self) -> RayJobs:
        """The jobs of one executor."""
        return RayJobs(self)


class RayJobs:
    """Jobs on a cluster, which is connected for the first of them. Used from one event loop.

    Shutdown, by `close`: 1. `submit` raises. 2. What runs may end within the grace. 3. The rest is cancelled, its
    processes killed. 4. The connection is let go of.
    """

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._connecting: asyncio.Task[None] | None = None
        self._running: dict[PoolJob, asyncio.Task[None]] = {}
        self._told: dict[PoolJob, Any] = {}
        self._closed = False

    def submit(self, payload: bytes, label: str, resources: Mapping[str, float]) -> PoolJob:
        """Gives the payload to `run_job` on a machine that has the resources; the future's result is what that returns.

        A worker or machine that dies under the job makes it fail with PoolError. Raises PoolError if it is closed.
        """
        if self._closed:
            raise PoolError("the connection to the Ray cluster is closed")
        loop = asyncio.get_running_loop()
        job = PoolJob(self, loop.create_future(), (payload, _options(resources)), label)
        self._running[job] = loop.create_task(self._run(job))
        return job

    async def _run(self, job: PoolJob) -> None:
        try:
            await self._connected()
            if not job.over:
                await self._see_through(job)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            fail_quietly(job.future, _as_ours(error, job))
        finally:
            job.over = True
            self._told.pop(job, None)
            del self._running[job]
            if job.abandoned:
                tell(asyncio.get_running_loop(), job.on_return)

    async def _see_through(self, job: PoolJob) -> None:
        (payload, options), job._work = job._work, None
        start = ray.remote(_begin_and_end).options(num_returns="streaming", max_retries=0, name=job.label, **options)
        told = self._told[job] = start.remote(payload)
        if job.future.done():  # cancelled by whoever awaited it: nobody wants it
            ray.cancel(told, force=True)
        async for each in told:
            found = await each
            if not job.started:
                job.started = True
                tell(asyncio.get_running_loop(), job.on_start)
            elif not job.future.done():
                job.future.set_result(found)

    async def _connected(self) -> None:
        """Returns when there is a connection; starting a cluster takes some 4 s, which is not to hold up the loop."""
        connecting = self._connecting
        if connecting is None or (connecting.done() and not _went_well(connecting)):  # the next job may have more luck
            coroutine = asyncio.to_thread(self._cluster.acquire)
            connecting = self._connecting = asyncio.get_running_loop().create_task(coroutine)
        await asyncio.shield(connecting)

    def _abandon(self, job: PoolJob) -> bool:
        told = self._told.get(job)
        if told is None:  # it has not been sent
            job.over = True
            return True
        job.abandoned = True
        with contextlib.suppress(Exception):  # it is over, or out of reach
            ray.cancel(told, force=True)
        return False

    async def close(self, grace: float) -> list[str]:
        """Ends all jobs; those that run get up to `grace` seconds. Returns a line for each that had to be killed.

        Cancelled, it kills what is left at once, and lets go of the connection all the same.
        """
        self._closed = True
        left: list[str] = []
        try:
            await _ended([task for job, task in self._running.items() if not job.over], grace)
            left += sorted(
                f"the Ray task of {job.label} was killed while it ran" for job in self._running if job.started
            )
        finally:
            self._abandon_all()
            await see_through(self._disconnect(left))
        return left

    def _abandon_all(self) -> None:
        for job, task in list(self._running.items()):
            job.abandon()
            if job not in self._told:  # it waits for a connection, and nothing of it is out there
                task.cancel()

    async def _disconnect(self, left: list[str]) -> None:
        """Lets go of the cluster when jobs are dead; of one that still connects, when it is connected."""
        await _ended(self._running.values(), _DEATH_S)
        connecting, self._connecting = self._connecting, None
        if connecting is None:
            return
        await _ended([connecting], _CONNECT_S)
        if not connecting.done():
            left.append("the connection to the Ray cluster is still being made")
            connecting.add_done_callback(self._release_late)
        elif _went_well(connecting):
            await asyncio.to_thread(self._cluster.release)

    def _release_late(self, connecting: asyncio.Task[None]) -> None:
        if _went_well(connecting):
            asyncio.get_running_loop().run_in_executor(None, self._cluster.release)


async def _ended(tasks: Collection[asyncio.Task[None]], most_s: float) -> None:
    if tasks:
        await asyncio.wait(tasks, timeout=most_s)


def _went_well(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and task.exception() is None


def _options(resources: Mapping[str, float]) -> dict[str, Any]:
    """As Ray's `.options` takes them."""
    own = {name: amount for name, amount in resources.items() if name in _OWN}
    others = {name: amount for name, amount in resources.items() if name not in _OWN}
    return {"num_cpus": 1, **own, **({"resources": others} if others else {})}


def _begin_and_end(payload: bytes) -> Iterator[bytes]:
    """On a machine of the cluster: says that it has begun, and then what came of it."""
    yield b""
    from obsdag.tasks.detached import run_job

    yield run_job(payload)


def _as_ours(error: Exception, job: PoolJob) -> Exception:
    if not isinstance(error, ray.exceptions.RayError):
        return error
    why = (str(error).strip().splitlines() or [""])[0]
    return PoolError(f"the Ray worker that ran {job.label} is gone: {type(error).__name__}: {why}")
