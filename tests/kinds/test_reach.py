"""Every kind is reachable from the decorator and as a class, and both make the same of it (T5, G1, G5)."""

from __future__ import annotations

from typing import Any

import pytest

import obsdag
from obsdag import DAG, Context, SubDAG, Task, TaskConfig
from tests.kinds import test_matrix as kinds
from tests.rules.helpers import ONE, assert_counts


def plain(ctx: Context) -> Context:
    return ctx


async def gather(ctx: Context, children: list[Context]) -> Context:
    return ctx


FUNCTIONS: dict[str, tuple[str, Any]] = {
    "AsyncFunctionTask": ("task", kinds.answer_async),
    "SyncFunctionTask": ("task", kinds.answer),
    "ForegroundSyncFunctionTask": ("task/foreground", kinds.answer),
    "AsyncFunctionShutdownTask": ("task", kinds.AsyncHolder()),
    "SyncFunctionShutdownTask": ("task", kinds.SyncHolder()),
    "ForegroundSyncFunctionShutdownTask": ("task/foreground_shutdown", kinds.SyncHolder()),
    "AsyncStreamTask": ("stream", kinds.stream_async),
    "SyncStreamTask": ("stream", kinds.stream),
    "ForegroundSyncStreamTask": ("stream/foreground_stream", kinds.stream),
    "AsyncLoopTask": ("loop", kinds.loop_async),
    "SyncLoopTask": ("loop", kinds.loop),
    "ForegroundSyncLoopTask": ("loop/foreground_loop", kinds.loop),
    "AsyncServiceTask": ("service", kinds.serve),
    "SyncThreadTask": ("service", kinds.serve_in_thread),
    "AsyncRouterTask": ("router", kinds.choose_async),
    "SyncRouterTask": ("router", kinds.choose),
    "ForegroundSyncRouterTask": ("router/foreground_router", kinds.choose),
    "MapTask": ("map", kinds._asyncgen),
    "JoinTask": ("join", gather),
    "ProcessTask": ("task/process", kinds.double),
}


def test_every_public_kind_is_in_the_table() -> None:
    public = {name for name in obsdag.__all__ if name.endswith("Task") and name != "Task"}
    assert public == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
async def test_T5_decorator_and_class_are_the_same(name: str) -> None:
    how, function = FUNCTIONS[name]
    decorator, _, kind = how.partition("/")
    cls: type[Task] = getattr(obsdag, name)
    results = []
    for by_class in (False, True):
        dag = DAG()
        after: Any = dag.map(kinds._list, name="spread") if name == "JoinTask" else ()
        if by_class:
            task = dag.add_task(cls(function, TaskConfig(priority=3), "it"), after)
        else:
            task = getattr(dag, decorator)(name="it", priority=3, after=after, **({"kind": kind} if kind else {}))(
                function
            )
        assert type(task) is cls
        assert (task.id, task.config.priority, dag.tasks["it"]) == ("it", 3, task)
        if "Router" in name:
            dag.task(plain, name="left", after="it")
            dag.task(plain, name="right", after="it")
        process = {"process_pool_worker_num": 1} if name == "ProcessTask" else {}
        results.append(dict((await ONE.run(dag, kinds.inputs(8), **process)).counts))
    assert results[0] == results[1]
    assert results[0]["output"]


@pytest.mark.parametrize("by_class", [False, True])
async def test_G5_include_and_subdag_are_the_same(by_class: bool) -> None:
    inner = DAG("inner")
    inner.task(plain, name="a")
    inner.task(plain, name="b", after="a")
    dag = DAG()
    dag.task(plain, name="first")
    part = dag.add_task(SubDAG(inner, name="part"), "first") if by_class else dag.include(inner, "part", after="first")
    dag.task(plain, name="last", after=part)
    result = await ONE.run(dag, kinds.inputs(3))
    assert_counts(result, output=3)
    assert all(list(out.completed_tasks) == ["first", "part/a", "part/b", "last"] for out in result)
