"""The definitions of the kinds of tasks: where they run, what a run gets a copy of (SEMANTICS T5, T9, T10)."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest

from obsdag import tasks
from obsdag.errors import ConfigError, TaskError
from obsdag.graph import DAG
from obsdag.tasks import (
    AsyncFunctionShutdownTask,
    AsyncFunctionTask,
    AsyncTask,
    Environment,
    ForegroundSyncFunctionShutdownTask,
    ForegroundTask,
    JoinTask,
    LoopTask,
    MapTask,
    RouterTask,
    ServiceTask,
    ShutdownTask,
    StreamTask,
    SyncFunctionShutdownTask,
    SyncFunctionTask,
    SyncTask,
    Task,
    TaskConfig,
)


def plain(ctx: Any) -> Any:
    return ctx


async def coroutine(ctx: Any) -> Any:
    return ctx


def generator(ctx: Any) -> Any:
    yield ctx


async def asyncgen(ctx: Any) -> Any:
    yield ctx


@pytest.mark.parametrize(
    ("name", "runs_on", "shape", "bases"),
    [
        ("AsyncFunctionTask", "loop", "function", (AsyncTask,)),
        ("SyncFunctionTask", "thread", "function", (SyncTask,)),
        ("ForegroundSyncFunctionTask", "loop", "function", (ForegroundTask,)),
        ("AsyncFunctionShutdownTask", "loop", "function", (AsyncTask, AsyncFunctionTask, ShutdownTask)),
        ("SyncFunctionShutdownTask", "thread", "function", (SyncTask, SyncFunctionTask, ShutdownTask)),
        ("ForegroundSyncFunctionShutdownTask", "loop", "function", (ForegroundTask, ShutdownTask)),
        ("AsyncStreamTask", "loop", "stream", (AsyncTask, StreamTask)),
        ("SyncStreamTask", "thread", "stream", (SyncTask, StreamTask)),
        ("ForegroundSyncStreamTask", "loop", "stream", (ForegroundTask, StreamTask)),
        ("AsyncLoopTask", "loop", "loop", (AsyncTask, LoopTask)),
        ("SyncLoopTask", "thread", "loop", (SyncTask, LoopTask)),
        ("ForegroundSyncLoopTask", "loop", "loop", (ForegroundTask, LoopTask)),
        ("AsyncServiceTask", "loop", "service", (AsyncTask, ServiceTask)),
        ("SyncThreadTask", "thread", "service", (SyncTask, ServiceTask)),
        ("AsyncRouterTask", "loop", "router", (AsyncTask, RouterTask)),
        ("SyncRouterTask", "thread", "router", (SyncTask, RouterTask)),
        ("ForegroundSyncRouterTask", "loop", "router", (ForegroundTask, RouterTask)),
    ],
)
def test_T5_kinds(name: str, runs_on: str, shape: str, bases: tuple[type[Task], ...]) -> None:
    kind = getattr(tasks, name)
    assert (kind.runs_on, kind.shape) == (runs_on, shape)
    assert all(issubclass(kind, base) for base in bases)
    task = kind(plain, TaskConfig(retry_times=1), name="x")
    assert (task.id, task.config.retry_times, task.func) == ("x", 1, plain)
    assert kind(plain).id == "plain"


def test_T5_every_class_has_a_kind_of_its_own() -> None:
    concrete = [
        found for name in tasks.__all__ if isinstance(found := getattr(tasks, name), type) and "kind" in vars(found)
    ]
    assert len(concrete) >= 20
    assert len({kind.kind for kind in concrete}) == len(concrete)


@pytest.mark.parametrize("func", [generator, plain])
def test_T5_a_map_of_plain_code_runs_in_a_thread(func: Any) -> None:
    assert MapTask(func).runs_on == "thread"
    assert list(MapTask(func).problems()) == []


@pytest.mark.parametrize("func", [asyncgen, coroutine])
def test_T5_an_async_map_runs_on_the_loop(func: Any) -> None:
    assert MapTask(func).runs_on == "loop"
    assert list(MapTask(func).problems()) == []


def test_T5_a_join_runs_where_its_function_does() -> None:
    async def join(parent: Any, children: Any) -> Any:
        return parent

    assert JoinTask(join).runs_on == "loop"
    assert JoinTask(lambda parent, children: parent).runs_on == "thread"


def test_T15_on_child_failure_is_fail_or_skip() -> None:
    assert JoinTask(plain).on_child_failure == "fail"
    with pytest.raises(ConfigError, match="on_child_failure must be 'fail' or 'skip', not 'ignore'"):
        JoinTask(plain, on_child_failure="ignore")  # type: ignore[arg-type]


def test_T5_a_partial_has_the_name_of_its_function() -> None:
    assert SyncFunctionTask(functools.partial(functools.partial(plain), ctx=1)).id == "plain"
    assert SyncFunctionTask(functools.partial(plain), name="x").id == "x"


def test_T5_a_kind_needs_a_function() -> None:
    with pytest.raises(TypeError, match="AsyncFunctionTask needs a function"):
        AsyncFunctionTask(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is not a function"):
        AsyncFunctionTask(3)  # type: ignore[arg-type]


class Recorder:
    """A callable object as the seed's shutdown tasks have it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, ctx: Any) -> Any:
        self.seen.append(ctx)
        return ctx

    def startup(self, env: Any) -> None:
        self.seen.append(env)

    def shutdown(self) -> str:
        self.seen.append("shutdown")
        return "closed"


class Bare:
    def __call__(self, ctx: Any) -> Any:
        return ctx

    async def shutdown(self) -> None: ...


@pytest.mark.parametrize("kind", [SyncFunctionShutdownTask, ForegroundSyncFunctionShutdownTask])
def test_T10_each_run_has_its_own_object(kind: type[ShutdownTask]) -> None:
    original = Recorder()
    task = kind(original)
    assert list(task.problems()) == []
    one, two = task.for_run(), task.for_run()
    assert isinstance(one, kind)
    assert isinstance(one.func, Recorder)
    environment = Environment.__new__(Environment)
    one.startup(environment)
    one.func("context")
    assert one.shutdown() == "closed"
    assert one.func.seen == [environment, "context", "shutdown"]
    assert isinstance(two.func, Recorder)
    assert two.func.seen == original.seen == []
    assert task.id == one.id == "Recorder"


async def test_T10_hooks_are_optional_and_may_be_awaitable() -> None:
    task = SyncFunctionShutdownTask(Bare()).for_run()
    assert isinstance(task, ShutdownTask)
    assert task.startup(Environment.__new__(Environment)) is None
    assert await task.shutdown() is None


def test_T10_an_object_that_cannot_be_copied_says_what_to_do() -> None:
    class Locked(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(TaskError, match=r"task 'pool': its Locked cannot be copied for a run .* in its startup\(env\)"):
        SyncFunctionShutdownTask(Locked(), name="pool").for_run()


def test_T10_an_async_object_is_a_coroutine_kind() -> None:
    class Async(Bare):
        async def __call__(self, ctx: Any) -> Any:
            return ctx

    assert list(AsyncFunctionShutdownTask(Async()).problems()) == []
    assert [problem[:46] for problem in SyncFunctionShutdownTask(Async()).problems()] == [
        "SyncFunctionShutdownTask needs a plain functio"
    ]


def test_T10_state_on_the_task_itself_is_the_runs_own() -> None:
    class Counting(SyncFunctionTask):
        def __init__(self) -> None:
            super().__init__(self.count)
            self.total = 0

        def count(self, ctx: Any) -> Any:
            self.total += 1
            return ctx

    task = Counting()
    mine = task.for_run()
    assert isinstance(mine, Counting)
    assert mine.func is not None
    mine.func("context")
    assert (mine.total, task.total) == (1, 0)


def test_T10_the_copy_knows_its_neighbors() -> None:
    dag = DAG()
    task = dag.task(name="a")(plain)
    dag.build()
    assert task.for_run().upstream_tasks == {dag.in_task}
