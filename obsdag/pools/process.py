"""The engine's process pool: worker processes, each with one job at a time (SEMANTICS T11, T13, E9, E18).

Jobs are handed out on the loop's side, one to a process, each process having its own channel: the death of a process
fails the job that it had taken and touches no other. A job that the process had not taken yet (it says so) goes to
another one.

Who touches what: the loop's thread owns everything. Numbers may be read from any thread.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from obsdag.errors import ConfigError, PoolError
from obsdag.pools import _worker
from obsdag.pools.calls import CallExecutor
from obsdag.pools.carry import dumps
from obsdag.pools.child import WorkerProcess
from obsdag.pools.job import PoolEvents, PoolJob, fail_quietly, tell

__all__ = ["ProcessPool"]

_STARTS_IN_A_ROW = 3  # failed starts after which the jobs fail that wait for a process
_HAND_OVERS = 3  # processes that may die holding a job before they have taken it, until the job fails itself
_DEATH_S = 10.0  # a killed process is dead at once unless the kernel holds it; then it is given up


class _Worker(WorkerProcess):
    """A worker process and what the pool knows of it: booting, then (`ready`) idle or with a job.

    expected: the pool itself ends it. complaint: why it could not start. taken: whether it said that it has taken its
    job.
    """

    def __init__(self, pool: ProcessPool, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._pool = pool
        self.ready = False
        self.expected = False
        self.complaint = ""
        self.job: PoolJob | None = None
        self.taken = False

    def got(self, kind: bytes, body: bytes) -> None:
        self._pool._got(self, kind, body)

    def died(self) -> None:
        self._pool._died(self)


class ProcessPool:
    """Up to `size` worker processes, started on demand, used from one event loop.

    entry: "module:function" of what a job's payload is given to in the worker, bytes to bytes; it must not raise.
    initializer: an importable function called with `initargs` in each new worker. events: told about deaths.
    killed: how many processes were killed because their job was abandoned.
    Raises ConfigError for a size below 1, PoolError where worker processes cannot be started at all: outside POSIX,
    in a frozen application, and in a worker process that imports a main module without guard.

    Shutdown, by `close`: 1. `submit` raises, waiting jobs fail with PoolError. 2. Idle processes leave, running jobs
    may finish up to the grace. 3. The rest is killed. 4. Every process is reaped, every descriptor closed.
    """

    def __init__(
        self,
        size: int,
        *,
        entry: str = "obsdag.tasks.detached:run_job",
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        events: PoolEvents | None = None,
    ) -> None:
        if size < 1:
            raise ConfigError(f"ProcessPool: size must be >= 1, not {size}")
        obstacle = _obstacle()
        if obstacle:
            raise PoolError(obstacle)
        self.size = size
        self.killed = 0
        self._entries = {_worker.JOB: entry, _worker.CALL: "obsdag.pools.calls:run_call"}
        self._initializer = None if initializer is None else dumps((initializer, initargs))
        self._events = events
        self._loop: asyncio.AbstractEventLoop | None = None
        self._executor: CallExecutor | None = None
        self._workers: set[_Worker] = set()
        self._dying: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._booting = 0
        self._busy = 0
        self._failed_starts = 0
        self._start_problem = ""
        self._waiting: OrderedDict[PoolJob, None] = OrderedDict()
        self._hand_overs: dict[PoolJob, int] = {}
        self._closed = False
        self._worker_gone: asyncio.Event | None = None

    # --- numbers, for metrics; safe to read from any thread

    @property
    def workers(self) -> int:
        """Processes that live, starting ones included."""
        return len(self._workers)

    @property
    def busy(self) -> int:
        """Processes with a job."""
        return self._busy

    @property
    def queued(self) -> int:
        """Jobs that wait for a process."""
        return len(self._waiting)

    @property
    def executor(self) -> CallExecutor:
        """The pool as a concurrent.futures.Executor for users' functions. Ask for it in the event loop at first."""
        if self._executor is None:
            self._executor = CallExecutor(self, self._bound_loop(), threading.get_ident())
        return self._executor

    # --- work

    def submit(self, payload: bytes, label: str = "a process task") -> PoolJob:
        """Gives `payload` to the pool's entry in a worker process; the future's result is what that returns.

        A process that dies under the job makes it fail with PoolError, saying how it died. Abandoning a running job
        kills its process. Raises PoolError if the pool is closed.
        """
        return self._submit(_worker.JOB, payload, label)

    def submit_call(self, payload: bytes, label: str) -> PoolJob:
        """As `submit`, for the executor: a pickled call instead of a payload."""
        return self._submit(_worker.CALL, payload, label)

    async def close(self, grace: float) -> list[str]:
        """Ends all processes; those with a job get up to `grace` seconds. Returns a line for each that had to be
        killed.

        Cancelled, it kills and reaps what is left at once.
        """
        self._closed = True
        while self._waiting:
            job, _ = self._waiting.popitem(last=False)
            self._fail(job, PoolError(f"the process pool was closed before {job.label} could start"))
        self._worker_gone = self._worker_gone or asyncio.Event()
        for worker in list(self._workers):
            self._dismiss(worker)
        try:
            await self._wait_until_empty(grace)
            killed = [_story(worker) for worker in self._workers if worker.job is not None]
            for worker in list(self._workers):
                self._kill(worker)
            await self._wait_until_empty(_DEATH_S)
        except BaseException:
            for worker in [*self._workers, *self._dying]:
                worker.expected = True
                worker.reap()
                self._died(worker)
            raise
        return sorted(killed)

    # --- on the loop's thread: jobs

    def _submit(self, kind: bytes, payload: bytes, label: str) -> PoolJob:
        if self._closed:
            raise PoolError("the process pool is closed")
        job = PoolJob(self, self._bound_loop().create_future(), (kind, payload), label)
        self._waiting[job] = None
        self._dispatch()
        return job

    def _bound_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    def _dispatch(self) -> None:
        while self._waiting and self._idle:
            job, _ = self._waiting.popitem(last=False)
            if job.future.done():  # cancelled by whoever awaited it: nobody wants it
                job.over, job._work = True, None
                continue
            worker = self._idle.pop()
            worker.job, worker.taken = job, False
            self._busy += 1
            worker.send(*job._work)
        while len(self._waiting) > self._booting and len(self._workers) < self.size:
            if self._closed or self._failed_starts >= _STARTS_IN_A_ROW or not self._start_worker():
                return

    def _abandon(self, job: PoolJob) -> bool:
        worker = next((worker for worker in self._workers if worker.job is job), None)
        if worker is not None:  # taken, or on its way there: it may start at any moment
            job.abandoned = True
            self.killed += 1
            self._kill(worker)
            self._dispatch()
            return False
        if job.abandoned:
            return False  # its process is dying
        self._waiting.pop(job, None)
        self._hand_overs.pop(job, None)
        job.over, job._work = True, None
        return True

    def _fail(self, job: PoolJob, error: PoolError) -> None:
        self._hand_overs.pop(job, None)
        job.over, job._work = True, None
        fail_quietly(job.future, error)

    # --- on the loop's thread: workers

    def _start_worker(self) -> bool:
        try:
            worker = _Worker(self, self._bound_loop())
        except OSError as error:
            if not self._workers:
                self._fail_waiting(PoolError(f"cannot start a worker process: {error}"))
            return False
        self._workers.add(worker)
        self._booting += 1
        worker.send(_worker.SETUP, self._setup())
        return True

    def _setup(self) -> bytes:
        main = _worker.find_main()
        path = [entry or os.getcwd() for entry in sys.path]
        # Plain tuples: the worker reads them before it can import anything of obsdag.
        return dumps((path, list(sys.argv), main and tuple(main), self._entries, self._initializer))

    def _fail_waiting(self, error: PoolError) -> None:
        while self._waiting:
            job, _ = self._waiting.popitem(last=False)
            self._fail(job, error)

    def _got(self, worker: _Worker, kind: bytes, body: bytes) -> None:
        if worker.expected and worker.job is not None and worker.job.abandoned:
            return  # its last words
        if kind == _worker.READY:
            worker.ready = True
            self._booting -= 1
            self._failed_starts = 0
            self._is_idle(worker)
        elif kind == _worker.FAILED:
            worker.complaint = body.decode(errors="replace").strip()
            worker.kill()
        elif kind == _worker.TAKEN and worker.job is not None:
            worker.taken = worker.job.started = True
            self._hand_overs.pop(worker.job, None)
            worker.job._work = None
            tell(self._bound_loop(), worker.job.on_start)
        elif kind == _worker.DONE and worker.job is not None:
            self._failed_starts = 0
            job = self._release(worker)
            if not job.future.done():
                job.future.set_result(body)
            self._is_idle(worker)

    def _is_idle(self, worker: _Worker) -> None:
        if worker in self._workers and not self._closed:
            self._idle.append(worker)
            self._dispatch()

    def _release(self, worker: _Worker) -> PoolJob:
        job, worker.job = worker.job, None
        assert job is not None
        job.over = True
        self._busy -= 1
        return job

    def _kill(self, worker: _Worker) -> None:
        worker.expected = True
        self._move_to_dying(worker)
        worker.kill()

    def _move_to_dying(self, worker: _Worker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
            self._dying.add(worker)
            if worker in self._idle:
                self._idle.remove(worker)
            if not worker.ready:
                self._booting -= 1

    def _dismiss(self, worker: _Worker) -> None:
        """Lets a worker leave: at once if it has nothing to do that is wanted, else after its job."""
        unwanted = worker.job is not None and worker.job.future.done()
        if not worker.ready or unwanted or worker.has_unsent:
            self._kill(worker)
        else:
            worker.expected = True
            worker.hang_up()

    def _died(self, worker: _Worker) -> None:
        self._move_to_dying(worker)
        self._dying.discard(worker)
        job = worker.job
        if job is not None:
            self._release(worker)
        if not worker.ready:
            self._start_failed(worker)
        elif job is None or not job.abandoned:
            self._died_by_itself(worker, job)
        if job is not None and job.abandoned:
            tell(self._bound_loop(), job.on_return)
        if self._worker_gone is not None:
            self._worker_gone.set()
        if not self._workers and self._failed_starts >= _STARTS_IN_A_ROW:
            self._failed_starts = 0
            self._fail_waiting(PoolError(self._start_problem))
        self._dispatch()

    def _start_failed(self, worker: _Worker) -> None:
        if worker.expected:
            return
        self._failed_starts += 1
        why = worker.complaint or f"it {worker.ending}"
        self._start_problem = f"worker processes cannot start: {why}"
        self._tell_rebuilt(f"worker process {worker.pid} could not start: {why.splitlines()[0]}")

    def _died_by_itself(self, worker: _Worker, job: PoolJob | None) -> None:
        if job is None:
            if not worker.expected:
                self._tell_rebuilt(f"worker process {worker.pid} {worker.ending} while it was idle")
            return
        reason = f"worker process {worker.pid} {worker.ending} while it ran {job.label}"
        handed_over = self._hand_overs.pop(job, 0) + 1
        if not worker.taken and not self._closed and handed_over < _HAND_OVERS:
            job.over = False
            self._hand_overs[job] = handed_over
            self._waiting[job] = None
            self._waiting.move_to_end(job, last=False)
        else:
            self._fail(job, PoolError(reason))
        if not worker.expected:
            self._tell_rebuilt(reason)

    def _tell_rebuilt(self, reason: str) -> None:
        if self._events is not None:
            tell(self._bound_loop(), self._events.pool_rebuilt, "process", reason)

    async def _wait_until_empty(self, seconds: float) -> None:
        assert self._worker_gone is not None
        try:
            async with asyncio.timeout(seconds):
                while self._workers or self._dying:
                    self._worker_gone.clear()
                    await self._worker_gone.wait()
        except TimeoutError:
            pass


def _story(worker: _Worker) -> str:
    return f"worker process {worker.pid} was killed while it ran {worker.job.label if worker.job else 'nothing'}"


def _obstacle() -> str | None:
    if os.name != "posix":
        return "worker processes need a POSIX system (Linux, macOS): use sync tasks here"
    if getattr(sys, "frozen", False) or not sys.executable:
        return "worker processes need a Python interpreter to start, and a frozen application has none: use sync tasks"
    return _worker.forbid_pools()
