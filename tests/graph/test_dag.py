"""Defining and building a DAG (SEMANTICS G1, G2)."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest

from obsdag.errors import ConfigError, GraphError
from obsdag.graph import DAG
from obsdag.tasks import (
    AsyncFunctionShutdownTask,
    AsyncFunctionTask,
    AsyncLoopTask,
    AsyncRouterTask,
    AsyncServiceTask,
    AsyncStreamTask,
    ForegroundSyncFunctionShutdownTask,
    ForegroundSyncFunctionTask,
    ForegroundSyncLoopTask,
    ForegroundSyncRouterTask,
    ForegroundSyncStreamTask,
    JoinTask,
    MapTask,
    ProcessTask,
    SyncFunctionShutdownTask,
    SyncFunctionTask,
    SyncLoopTask,
    SyncRouterTask,
    SyncStreamTask,
    SyncThreadTask,
    Task,
    TaskConfig,
)


async def coroutine(ctx: Any) -> Any:
    return ctx


def plain(ctx: Any) -> Any:
    return ctx


def generator(ctx: Any) -> Any:
    yield ctx


async def asyncgen(ctx: Any) -> Any:
    yield ctx


class Object:
    def __call__(self, ctx: Any) -> Any:
        return ctx

    def shutdown(self) -> None: ...


class AsyncObject(Object):
    async def __call__(self, ctx: Any) -> Any:
        return ctx


def edges(dag: DAG) -> list[tuple[str, str]]:
    return dag.edges()


@pytest.mark.parametrize(
    ("function", "kind", "expected"),
    [
        (coroutine, None, AsyncFunctionTask),
        (plain, None, SyncFunctionTask),
        (generator, None, SyncStreamTask),
        (asyncgen, None, AsyncStreamTask),
        (Object(), None, SyncFunctionShutdownTask),
        (AsyncObject(), None, AsyncFunctionShutdownTask),
        (functools.partial(coroutine), None, AsyncFunctionTask),
        (coroutine, "async", AsyncFunctionTask),
        (plain, "sync", SyncFunctionTask),
        (plain, "foreground", ForegroundSyncFunctionTask),
        (plain, "process", ProcessTask),
        (generator, "stream", SyncStreamTask),
        (asyncgen, "stream", AsyncStreamTask),
        (generator, "foreground_stream", ForegroundSyncStreamTask),
        (generator, "loop", SyncLoopTask),
        (asyncgen, "loop", AsyncLoopTask),
        (generator, "foreground_loop", ForegroundSyncLoopTask),
        (coroutine, "service", AsyncServiceTask),
        (plain, "service", SyncThreadTask),
        (plain, "thread", SyncThreadTask),
        (coroutine, "router", AsyncRouterTask),
        (plain, "router", SyncRouterTask),
        (plain, "foreground_router", ForegroundSyncRouterTask),
        (Object(), "shutdown", SyncFunctionShutdownTask),
        (AsyncObject(), "shutdown", AsyncFunctionShutdownTask),
        (Object(), "foreground_shutdown", ForegroundSyncFunctionShutdownTask),
        (generator, "map", MapTask),
        (plain, "join", JoinTask),
        (plain, ForegroundSyncFunctionTask, ForegroundSyncFunctionTask),
    ],
)
def test_G1_the_decorator_picks_the_kind(function: Any, kind: Any, expected: type[Task]) -> None:
    task = DAG().task(function, kind=kind, name="x")
    assert type(task) is expected
    assert task.func is function


def test_G1_decorators_bare_and_called() -> None:
    dag = DAG("shop")

    @dag.task
    async def fetch(ctx: Any) -> Any:
        return ctx

    @dag.task(after=fetch, name="parse it", retry_times=2, kind="foreground")
    def parse(ctx: Any) -> Any:
        return ctx

    @dag.router(after=parse, targets=["split"])
    def choose(ctx: Any) -> Any:
        return "split"

    @dag.map(after=choose)
    def split(ctx: Any) -> Any:
        yield {}

    @dag.join(after="split", on_child_failure="skip", timeout=3.0)
    async def gather(parent: Any, children: Any) -> Any:
        return parent

    assert list(dag.tasks) == ["fetch", "parse it", "choose", "split", "gather"]
    assert parse.config == TaskConfig(retry_times=2)
    assert isinstance(gather, JoinTask)
    assert gather.on_child_failure == "skip"
    assert gather.config.timeout == 3.0
    assert edges(dag) == [("fetch", "parse it"), ("parse it", "choose"), ("choose", "split"), ("split", "gather")]


def test_G1_settings_win_over_the_config_given() -> None:
    task = DAG().task(config=TaskConfig(retry_times=1, timeout=5), retry_times=7)(plain)
    assert task.config == TaskConfig(retry_times=7, timeout=5)


def test_G1_dependencies_in_every_form_and_in_any_order() -> None:
    dag = DAG()

    def first(ctx: Any) -> Any:
        return ctx

    a = dag.add_task(SyncFunctionTask(plain, name="a"), "z")
    dag.task(first)
    dag.add_task(SyncFunctionTask(plain, name="b"), a)
    dag.add_task(SyncFunctionTask(plain, name="c"), first)
    dag.add_task(SyncFunctionTask(plain, name="d"), [a, "b", first, "b"])
    dag.add_task(SyncFunctionTask(plain, name="e"), (each for each in ("a", "b")))
    dag.add_task(SyncFunctionTask(plain, name="z"), dag.in_task)
    assert edges(dag) == [
        ("z", "a"), ("a", "b"), ("first", "c"), ("a", "d"), ("b", "d"), ("first", "d"), ("a", "e"), ("b", "e"),
    ]  # fmt: skip
    dag.build()


def test_G1_add_task_returns_its_task() -> None:
    task = MapTask(generator)
    assert DAG().add_task(task) is task


@pytest.mark.parametrize("wrong", [plain, "a", None, AsyncFunctionTask])
def test_G1_only_tasks_can_be_added(wrong: Any) -> None:
    with pytest.raises(TypeError, match="is no task"):
        DAG().add_task(wrong)


@pytest.mark.parametrize("wrong", [3, [3], None])
def test_G1_only_tasks_ids_and_functions_are_dependencies(wrong: Any) -> None:
    with pytest.raises(TypeError, match="task 'x': a dependency is a task, a task id or a decorated function, not"):
        DAG().add_task(SyncFunctionTask(plain, name="x"), wrong)


def test_G1_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no setting 'retry_time' \\(did you mean 'retry_times'\\?\\)"):
        DAG().task(retry_time=3)(plain)
    with pytest.raises(ConfigError, match="SyncFunctionTask has no setting 'targets'"):
        DAG().task(targets=["a"])(plain)
    with pytest.raises(ConfigError, match="no kind 'steam' of task \\(did you mean 'stream'\\?\\)"):
        DAG().task(kind="steam")(plain)
    with pytest.raises(ConfigError, match="retry_times must be a whole number >= 0, not -1"):
        DAG().task(retry_times=-1)(plain)


@pytest.mark.parametrize("name", ["", None, 3])
def test_G1_a_dag_has_a_name(name: Any) -> None:
    with pytest.raises(GraphError, match="name must be a non-empty text"):
        DAG(name)


def test_G2_build_links_source_and_sink() -> None:
    dag = DAG()
    a, b = dag.task(name="a")(plain), dag.task(name="b")(plain)
    c = dag.task(name="c", after="a")(plain)
    plan = dag.build()
    assert dag.in_task.downstream_tasks == {a, b}
    assert dag.out_task.upstream_tasks == {b, c}
    assert a.upstream_tasks == {dag.in_task}
    assert a.downstream_tasks == {c}
    assert (plan.tasks[plan.source], plan.tasks[plan.sink]) == (dag.in_task, dag.out_task)


def test_G2_building_again_gives_the_same_plan() -> None:
    dag = DAG()
    dag.task(plain)
    assert dag.plan is None
    plan = dag.build()
    assert dag.build() is plan
    assert dag.plan is plan
    assert dag.find_problems() == []


def test_G2_two_threads_build_one_plan() -> None:
    dag = DAG()
    dag.task(plain)
    start = threading.Barrier(2)
    plans: list[Any] = []

    def build() -> None:
        start.wait()
        plans.append(dag.build())

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert plans[0] is plans[1]


def test_G2_changing_a_built_dag_is_an_error() -> None:
    dag = DAG("shop")
    dag.task(plain)
    dag.build()
    with pytest.raises(GraphError, match="DAG 'shop' is built and cannot be changed any more"):
        dag.task(name="late")(plain)
    with pytest.raises(GraphError, match="is built"):
        dag.include(DAG("other"))
    with pytest.raises(TypeError):
        dag.tasks["late"] = SyncFunctionTask(plain)  # type: ignore[index]


def test_G2_the_tasks_and_the_name_of_a_built_dag_are_fixed() -> None:
    dag = DAG("first")
    task = dag.task(plain, name="a")
    task.id, dag.name = "b", "second"  # not built yet
    task.id = "a"
    dag.build()

    for name, value in {"id": "c", "func": plain, "config": TaskConfig(timeout=1)}.items():
        with pytest.raises(GraphError, match=f"'a' is part of a built DAG.*`{name}` cannot be set"):
            setattr(task, name, value)
    with pytest.raises(GraphError, match="cannot be changed any more"):
        dag.name = "third"
    with pytest.raises(AttributeError):
        task.config.timeout = 1.0  # type: ignore[misc]
    mine = task.for_run()
    mine.id = "d"
    assert (task.id, dag.name, dag.plan and dag.plan.tasks[1].id) == ("a", "second", "a")


def test_G2_a_failed_build_can_be_mended() -> None:
    dag = DAG()
    dag.task(name="b", after="a")(plain)
    with pytest.raises(GraphError, match="'a', which was never added"):
        dag.build()
    dag.task(name="a")(plain)
    assert len(dag.build()) == 4


def test_G2_tasks_may_be_called_source_and_sink() -> None:
    dag = DAG()
    dag.task(name="source")(plain)
    dag.task(name="_source", after="source")(plain)
    dag.task(name="sink", after="source")(plain)
    plan = dag.build()
    assert [task.id for task in plan.tasks] == ["__source", "source", "_source", "sink", "_sink"]
    assert (dag.in_task.id, dag.out_task.id) == ("__source", "_sink")
    assert plan.up_list[plan.index["sink"]] == (plan.index["source"],)


@pytest.mark.parametrize(
    "name", ['a "b"', "a\nb", "<b>&amp;", "späße 日本", "a/b", "a.b", " ", "-->", "\x00", "\ud800"]
)
def test_G2_ids_may_hold_any_characters(name: str) -> None:
    dag = DAG()
    dag.task(name=name)(plain)
    assert dag.build().index[name] == 1
    assert dag.plan is not None
    assert len(dag.plan.fingerprint) == 32


def test_repr_tells_the_state() -> None:
    dag = DAG("shop")
    dag.task(plain)
    assert repr(dag) == "<DAG 'shop': 1 tasks, not built>"
    dag.build()
    assert repr(dag) == "<DAG 'shop': 1 tasks, built>"
