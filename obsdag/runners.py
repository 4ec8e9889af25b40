"""How an execution of each kind of task is run: called, timed, handed to a thread or process, and its result told to
the core.

A runner is an async function of the execution that returns what is to be called when it is over (`shell.finish` with
the result, as a rule), so that everything up to there happens inside the shell's one try block. Each run has its own
copies of its tasks (SEMANTICS T10), made and started up before their first execution.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from obsdag.context import Context
from obsdag.core.records import Execution, Pull, current_execution
from obsdag.errors import ExecutionTimeout, ResourceError, TaskError
from obsdag.generators import LoopRunner, MapRunner, StreamRunner
from obsdag.limits import MAKE, ResourcePool
from obsdag.services import ServiceRunner
from obsdag.tasks.base import Task

if TYPE_CHECKING:
    from obsdag.pools import PoolJob
    from obsdag.shell import RunShell

__all__ = ["JoinChildren", "Runners"]

Finished = Callable[[], None]
Runner = Callable[[Execution], Awaitable[Finished]]


class JoinChildren(list[Context]):
    """What a join is called with: the children that arrived, in order of creation; `failed` and `dropped` hold the
    others.
    """

    failed: list[Context]
    dropped: list[Context]


class _Making:
    """A pool's factory in a thread. An item that comes when nobody waits for it any more is closed, and not lost."""

    def __init__(self, pool: ResourcePool, runners: Runners) -> None:
        self._pool = pool
        self._runners = runners
        self._lock = threading.Lock()
        self._made: list[Any] = []
        self._left = False

    def call(self) -> Any:
        """The item; in the thread."""
        assert self._pool.factory is not None
        item = self._pool.factory()
        with self._lock:
            self._made.append(item)
            left = self._left
        if left:
            self._close()
        return item

    def leave(self) -> None:
        """Nobody waits any more; on the event loop's thread."""
        with self._lock:
            self._left = True
        self._close()

    def _close(self) -> None:
        with self._lock:
            made, self._made = self._made, []
        for item in made:
            if self._pool.close is not None and not inspect.isawaitable(item):
                self._runners.release_in_thread((self._pool.close, item))


class Runners:
    """The runners of one run, by task index. `direct` holds the functions that a worker may simply await."""

    def __init__(self, shell: RunShell) -> None:
        self.shell = shell
        self.plan = shell.plan
        count = len(self.plan.tasks)
        self.instances: list[Task | None] = [None] * count
        self.starting: dict[int, asyncio.Task[Task]] = {}
        self.by_index: list[Runner | None] = [None] * count
        self.closers: list[Callable[[float], Awaitable[None]]] = []
        self.closing: set[asyncio.Task[Any]] = set()
        self.errors: list[tuple[str, BaseException]] = []
        for_run = _plain_for_run()
        self.direct = [self._direct(task, for_run) for task in self.plan.tasks]

    def _direct(self, task: Task, for_run: Any) -> Callable[[Context], Awaitable[Any]] | None:
        """The function of a plain async task without anything around it, which needs no runner at all."""
        plain = task.kind == "async" and type(task).for_run is for_run and not _has_hooks(task)
        signature: Any = getattr(task, "signature", None)
        if not plain or signature is None or signature.takes_env or signature.takes_resource or task.config.timeout:
            return None
        return task.func

    async def run(self, execution: Execution) -> Finished:
        """Runs the execution; what it returns is to be called when nothing has gone wrong."""
        index = execution.index
        runner = self.by_index[index]
        if runner is None:
            await self._instance(index)
            runner = self.by_index[index]
            assert runner is not None
        return await runner(execution)

    # --- a run's own copies of its tasks (T10)

    async def _instance(self, index: int) -> Task:
        """The run's copy of a task, started up; executions that come meanwhile wait, a failure is theirs to report."""
        starting = self.starting.get(index)
        if starting is None:
            coroutine = self._start_up(index)
            starting = self.starting[index] = self.shell.loop.create_task(coroutine, context=self.shell.base.copy())
        try:
            return await asyncio.shield(starting)
        finally:
            if starting.done():
                self.starting.pop(index, None)

    async def _start_up(self, index: int) -> Task:
        task = self.plan.tasks[index].for_run()
        hook = getattr(task, "startup", None)
        if hook is not None:
            await self._hook(task, hook, self.shell.env)
        self.instances[index] = task
        self.by_index[index] = self._runner_for(task)
        return task

    async def _hook(self, task: Task, hook: Callable[..., Any], *arguments: Any) -> None:
        """Calls `startup` or `shutdown`: those of thread tasks in a thread, others here; an awaitable is awaited."""
        if task.runs_on == "thread" and not inspect.iscoroutinefunction(hook):
            job = self.shell.pools.threads().submit(hook, *arguments, context=contextvars.copy_context())
            result = await job.future
        else:
            result = hook(*arguments)
        if inspect.isawaitable(result):
            await result

    def _runner_for(self, task: Task) -> Runner:
        match task.shape:
            case "router":
                return partial(self._router, task)
            case "join":
                return partial(self._join, task)
            case "stream":
                return self._closed_at_end(StreamRunner(self, task))
            case "loop":
                return LoopRunner(self, task).run
            case "map":
                return MapRunner(self, task).run
            case "service":
                return self._closed_at_end(ServiceRunner(self, task))
            case _ if task.runs_on in ("process", "remote"):
                return partial(self._process, task)
        return partial(self._function, task)

    def _closed_at_end(self, runner: StreamRunner | ServiceRunner) -> Runner:
        self.closers.append(runner.close)
        return runner.run

    # --- calling a function

    async def call(self, execution: Execution, task: Task, function: Callable[..., Any], *given: Any) -> Any:
        """Calls a task's function with what it takes, where it runs, within its timeout."""
        signature: Any = getattr(task, "signature", None)
        keywords: dict[str, Any] = {}
        if signature is not None and signature.takes_env:
            given = (*given, self.shell.env)
        if execution.grant is not None and execution.grant.resources:
            items = await self._resources(execution)
            if signature is not None and signature.takes_resource:
                keywords["resource"] = items[0] if len(items) == 1 else tuple(items)
        if keywords:
            function = partial(function, **keywords)
        if task.runs_on == "thread":
            return await self.in_thread(execution, function, *given)
        result = _guarded(function, *given)
        if inspect.isawaitable(result):
            return await self.timed(execution, result)
        return result

    async def timed(self, execution: Execution, work: Awaitable[Any]) -> Any:
        """Awaits `work` for at most the task's `timeout`. Raises ExecutionTimeout."""
        limit = execution.task.config.timeout
        if limit is None:
            return await work
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                result = await work
        except TimeoutError as error:
            if scope.expired() and not isinstance(error, ExecutionTimeout):
                raise self.timed_out(execution) from None
            raise
        if scope.expired():  # the function swallowed its cancellation and returned late
            raise self.timed_out(execution)
        return result

    def timed_out(self, execution: Execution) -> ExecutionTimeout:
        """The error of an execution that took longer than its `timeout`."""
        task = execution.task
        return ExecutionTimeout(f"task {task.id!r} took longer than its timeout of {task.config.timeout} s")

    async def in_thread(self, execution: Execution, function: Callable[..., Any], *given: Any) -> Any:
        """Runs a function in the thread pool, with this frame's contextvars (T12)."""
        context = contextvars.copy_context()
        context.run(current_execution.set, execution)
        job = self.shell.pools.threads().submit(function, *given, context=context, label=f"task {execution.task.id!r}")
        return await self.job_done(execution, job)

    async def job_done(self, execution: Execution, job: PoolJob) -> Any:
        """Awaits a pool's job, for at most the task's `timeout` from when a thread or process has taken it.

        When nobody waits for it any more it is abandoned, and its return awaited (T13). Raises ExecutionTimeout.
        """
        limit = execution.task.config.timeout
        scope = asyncio.timeout(limit if job.started else None)
        if not job.started:
            self.shell.run.pool_waits(execution, self.shell.clock())
            job.on_start = partial(self._job_started, execution, scope, limit)
        try:
            async with scope:
                return await job.future
        except asyncio.CancelledError:
            self._abandon(execution, job)
            raise
        except TimeoutError:
            if not scope.expired():
                raise
            self._abandon(execution, job)
            raise self.timed_out(execution) from None

    def _job_started(self, execution: Execution, scope: asyncio.Timeout, limit: float | None) -> None:
        self.shell.run.pool_started(execution, self.shell.clock())
        if limit is not None and execution.outcome is None:
            scope.reschedule(self.shell.loop.time() + limit)

    def _abandon(self, execution: Execution, job: PoolJob) -> None:
        if not job.abandon():
            execution.abandoned = True
            job.on_return = partial(self.shell.thread_returned, execution)

    # --- the kinds that call a function once

    async def _function(self, task: Task, execution: Execution) -> Finished:
        assert task.func is not None
        result = await self.call(execution, task, task.func, execution.context)
        return partial(self.shell.finish, execution, result)

    async def _join(self, task: Task, execution: Execution) -> Finished:
        assert task.func is not None
        arrived, failed, dropped = self.shell.run.join_children(execution.context, execution.index)
        children = JoinChildren(arrived)
        children.failed, children.dropped = failed, dropped
        result = await self.call(execution, task, task.func, execution.context, children)
        return partial(self.shell.finish, execution, result)

    async def _router(self, task: Task, execution: Execution) -> Finished:
        assert task.func is not None
        chosen = await self.call(execution, task, task.func, execution.context)
        mask = self._chosen(execution, chosen)
        return partial(self._routed, execution, mask)

    def _routed(self, execution: Execution, mask: int) -> None:
        shell = self.shell
        shell.run.finish_routed(execution, mask, shell.clock())
        if shell.run.dirty:
            shell.pump()

    def _chosen(self, execution: Execution, chosen: Any) -> int:
        """The downstream tasks that a router named, as a mask (T9). Raises TaskError for anything else."""
        names: Iterable[Any] = (chosen,) if isinstance(chosen, str | Task) else (chosen if chosen is not None else ())
        choices = self.plan.choices[execution.index]
        mask = 0
        if not isinstance(names, Iterable) or isinstance(names, Mapping | bytes):
            raise TaskError(f"router {execution.task.id!r} returned {chosen!r:.80}; it returns task ids, or tasks")
        for name in names:
            target = getattr(name, "id", name)
            if not isinstance(target, str) or target not in choices:
                known = ", ".join(sorted(choices)) or "nothing"
                raise TaskError(f"router {execution.task.id!r} chose {target!r:.80}; below it there is {known}")
            mask |= choices[target]
        return mask

    async def _process(self, task: Task, execution: Execution) -> Finished:
        from obsdag.tasks.process import ProcessTask, apply_outcome, decode_outcome, encode_job
        from obsdag.tasks.remote import RemoteTask

        assert isinstance(task, ProcessTask)
        context = execution.context
        if execution.grant is not None and execution.grant.resources:
            await self._resources(execution)
        payload = encode_job(task, context.id, context.name, context._data, execution.attempt, self._carrier(execution))
        if isinstance(task, RemoteTask):
            job = self.shell.pools.remotes(task.id).submit(payload, f"task {task.id!r}", task.resources)
        else:
            job = self.shell.pools.processes(task.id).submit(payload, f"task {task.id!r}")
        data = await self.job_done(execution, job)
        outcome = decode_outcome(data)
        if outcome.extras:
            self._absorb(execution, outcome.extras)
        if execution.cancelling and not execution.exempt:
            return partial(self.shell.finish, execution, None)
        return partial(self.shell.finish, execution, apply_outcome(outcome, context))

    def _carrier(self, execution: Execution) -> dict[str, str]:
        """The trace context that goes with an execution to another process (T12)."""
        from obsdag.telemetry.carrier import inject

        return inject(execution)

    def _absorb(self, execution: Execution, extras: list[bytes]) -> None:
        """What the function said about its span in the other process."""
        from obsdag.telemetry.carrier import absorb

        absorb(execution, extras)

    # --- resources (T7)

    async def _resources(self, execution: Execution) -> list[Any]:
        """The items of the execution's resource pools; one that is not made yet is made now. Raises ResourceError."""
        grant = execution.grant
        assert grant is not None
        for pool, item in grant.resources.items():
            if item is MAKE:
                await self._make(execution, pool)
        return list(grant.resources.values())

    async def _make(self, execution: Execution, pool: ResourcePool) -> None:
        shell, grant = self.shell, execution.grant
        assert grant is not None
        assert pool.factory is not None
        book = shell.run.runtime.limits
        making = _Making(pool, self)
        try:
            if inspect.iscoroutinefunction(pool.factory):
                item = await pool.factory()
            else:
                item = await self.in_thread(execution, making.call)
                if inspect.isawaitable(item):
                    item = await item
        except BaseException as error:
            making.leave()
            book.resource_failed(grant, pool, shell.clock())
            if not isinstance(error, Exception):
                raise
            name = shell.run.limiter_names.get(pool, "")
            raise ResourceError(
                f"task {execution.task.id!r}: pool {name!r} could not make a resource: {error}"
            ) from error
        if not book.resource_made(grant, pool, item, shell.clock()) and pool.close is not None:
            await self.release((pool.close, item))

    async def release(self, closing: tuple[Callable[[Any], Any], Any]) -> None:
        """Closes a pooled item; what that raises is reported and hides nothing."""
        close, item = closing
        try:
            result = close(item)
            if inspect.isawaitable(result):
                await result
        except Exception as error:
            self.report("closing a resource", error)

    def release_later(self, closing: tuple[Callable[[Any], Any], Any]) -> None:
        """Closes a pooled item soon."""
        self._later(self.release(closing))

    def release_in_thread(self, closing: tuple[Callable[[Any], Any], Any]) -> None:
        """Closes a pooled item from any thread; what has to be awaited is left to the event loop."""
        close, item = closing
        loop = self.shell.loop
        try:
            result = close(item)
            if inspect.isawaitable(result):
                loop.call_soon_threadsafe(self._later, self.release((_itself, result)))
        except Exception as error:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.report, "closing a resource", error)

    def close_later(self, pull: Pull) -> None:
        """Closes the generator of a loop or map whose context has ended, unless an execution is in it."""
        runner = self.by_index[pull.index]
        owner = getattr(runner, "__self__", None)
        if isinstance(owner, LoopRunner) and pull.generator is not None:
            self._later(owner.close_pull(pull))

    def _later(self, coroutine: Any) -> None:
        task = self.shell.loop.create_task(coroutine, context=self.shell.base.copy())
        self.closing.add(task)
        task.add_done_callback(self.closing.discard)

    # --- the end of the run

    def report(self, what: str, error: BaseException) -> None:
        """An error while cleaning up: it is told and kept, and hides nothing."""
        self.errors.append((what, error))
        tell = self.shell.run.facts.cleanup_failed
        if tell is not None:
            tell(what, error)

    def has_to_close(self) -> bool:
        """Whether there are generators, services, pooled items or shutdown hooks to wait for."""
        hooks = any(hasattr(task, "shutdown") for task in self.plan.tasks)
        pools = any(isinstance(limit, ResourcePool) for limits in self.shell.run.limits for limit in limits)
        return bool(hooks or pools or self.starting or self.closing or self.closers)

    async def close(self, grace: float) -> None:
        """Closes generators and services, then calls the shutdown hooks, last started first; errors are reported."""
        for starting in list(self.starting.values()):
            starting.cancel()
            await asyncio.wait([starting])
        if self.closing:
            await asyncio.wait(self.closing, timeout=max(grace, 0.1))
        for close in reversed(self.closers):
            try:
                await close(grace)
            except Exception as error:
                self.report("closing a task", error)
        for index in range(len(self.plan.tasks) - 1, -1, -1):
            await self._shut_down(index, grace)

    async def _shut_down(self, index: int, grace: float) -> None:
        task, definition = self.instances[index], self.plan.tasks[index]
        if not hasattr(definition, "shutdown"):
            return
        try:
            if task is None:
                if _starts_up(definition):
                    return  # it was never started
                task = definition.for_run()
            async with asyncio.timeout(max(grace, 0.1)):
                await self._hook(task, task.shutdown)  # type: ignore[attr-defined]
        except Exception as error:
            self.report(f"shutdown of task {definition.id!r}", error)


def _itself(awaitable: Any) -> Any:
    """What is awaited instead of being called again."""
    return awaitable


def _guarded(function: Callable[..., Any], *given: Any) -> Any:
    """Calls a function; a StopIteration that escapes it must not end the coroutine around it in silence."""
    try:
        return function(*given)
    except StopIteration as error:
        raise RuntimeError("the task's function raised StopIteration") from error


def _plain_for_run() -> Any:
    from obsdag.tasks.function import FunctionTask

    return FunctionTask.for_run


def _has_hooks(task: Task) -> bool:
    return hasattr(task, "startup") or hasattr(task, "shutdown")


def _starts_up(task: Task) -> bool:
    """Whether a task has a startup of its own, so that there is nothing to shut down before it was called."""
    func = task.func
    if type(task).__name__.endswith("ShutdownTask"):
        return callable(getattr(func, "startup", None))
    return hasattr(task, "startup")
