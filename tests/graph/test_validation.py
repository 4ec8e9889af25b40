"""All mistakes of a DAG, told at once, each naming the tasks involved (SEMANTICS G3, T4, T7, T9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from obsdag.errors import GraphError
from obsdag.graph import DAG
from obsdag.limits import ConcurrencyLimit, RateLimit, ResourcePool
from obsdag.tasks import AsyncFunctionTask, RouterTask, SinkNode, SyncFunctionTask, Task, TaskConfig


def plain(ctx: Any) -> Any:
    return ctx


async def coroutine(ctx: Any) -> Any:
    return ctx


def generator(ctx: Any) -> Any:
    yield ctx


async def asyncgen(ctx: Any) -> Any:
    yield ctx


def nothing(ctx: Any) -> None: ...


def joined(parent: Any, children: Any) -> Any:
    return parent


def problems(dag: DAG) -> list[str]:
    with pytest.raises(GraphError) as caught:
        dag.build()
    assert [str(problem) for problem in dag.find_problems()] == list(caught.value.problems)
    return list(caught.value.problems)


def test_G3_no_task() -> None:
    assert problems(DAG()) == ["the DAG has no task: add one with add_task or @dag.task"]


def test_G3_a_cycle_is_told_as_a_path() -> None:
    dag = DAG()
    dag.task(name="d", after="c")(plain)
    dag.task(name="a", after="c")(plain)
    dag.task(name="b", after="a")(plain)
    dag.task(name="c", after=["b", "e"])(plain)
    dag.task(name="e")(plain)
    assert problems(dag) == ["cycle: a -> b -> c -> a"]


def test_G3_a_task_after_itself_and_another_cycle() -> None:
    dag = DAG()
    dag.task(name="a", after="a")(plain)
    dag.task(name="x", after="y")(plain)
    dag.task(name="y", after=["x", "a"])(plain)
    assert problems(dag) == ["cycle: a -> a", "cycle: x -> y -> x"]


def test_G3_duplicate_ids() -> None:
    dag = DAG()
    task = dag.task(name="a")(plain)
    dag.task(name="a")(coroutine)
    dag.add_task(task)
    assert problems(dag) == [
        "task 'a': another task has that id already: give one of them a name",
        "task 'a': was added twice",
    ]
    assert dag.tasks["a"] is task


def test_G3_dependencies_that_were_never_added() -> None:
    dag = DAG()
    dag.task(name="fetch")(plain)
    dag.task(name="b", after="fetsh")(plain)
    dag.task(name="c", after=[SyncFunctionTask(plain, name="x"), plain])(plain)
    dag.task(name="d", after=SyncFunctionTask(plain, name="b"))(plain)
    dag.task(name="e", after=dag.out_task)(plain)
    dag.task(name="f", after=DAG("other").include(_one("in"), "sub"))(plain)
    assert problems(dag) == [
        "task 'c': depends on the function 'plain', of which 2 tasks were made: name the task instead",
        "task 'b': depends on 'fetsh', which was never added (did you mean 'fetch'?)",
        "task 'c': depends on 'x', which was never added",
        "task 'd': depends on a task 'b' that was never added: another task has that id here",
        "task 'e': depends on 'sink', which was never added",
        "task 'f': depends on 'sub', which was never added",
    ]


def _one(name: str) -> DAG:
    dag = DAG()
    dag.task(name=name)(plain)
    return dag


def test_G3_a_function_that_was_never_decorated() -> None:
    dag = _one("a")
    dag.task(name="b", after=coroutine)(plain)
    assert problems(dag) == [
        "task 'b': depends on the function 'coroutine', of which no task was made: name the task instead"
    ]


@pytest.mark.parametrize("wrong", ["", 3])
def test_G3_ids_are_non_empty_texts(wrong: Any) -> None:
    dag = _one("a")
    task = SyncFunctionTask(plain)
    task.id = wrong
    dag.add_task(task)
    assert problems(dag) == [f"a task's id must be a non-empty text, not {wrong!r}"]


def test_G3_source_and_sink_are_the_dags_own() -> None:
    dag = _one("a")
    dag.add_task(SinkNode("x"))
    assert problems(dag) == ["task 'x': every DAG has its own source and sink: add other tasks only"]


def test_G3_a_task_of_another_built_dag() -> None:
    dag = _one("a")
    dag.build()
    other = DAG()
    other.add_task(dag.tasks["a"])
    assert problems(other) == ["task 'a': belongs to another DAG, which is built: make a new task, or include that DAG"]


def test_G3_T9_router_targets_must_be_right_below() -> None:
    dag = DAG()
    dag.task(name="up")(plain)
    dag.router(name="r", after="up", targets=["a", "b", "up", "bb"])(plain)
    dag.task(name="a", after="r")(plain)
    dag.task(name="b", after="a")(plain)
    dag.task(name="bbb", after="r")(plain)
    assert problems(dag) == [
        "task 'r': its target 'b' is not right below it",
        "task 'r': its target 'up' is not right below it",
        "task 'r': its target 'bb' is not right below it (did you mean 'bbb'?)",
    ]


def test_T9_router_targets_may_be_tasks() -> None:
    dag = DAG()
    a = SyncFunctionTask(plain, name="a")
    router = dag.router(name="r", targets=[a])(plain)
    assert isinstance(router, RouterTask)
    assert router.targets == ("a",)
    dag.add_task(a, router)
    dag.build()


def test_G3_T9_a_router_needs_something_below() -> None:
    dag = DAG()
    dag.router(name="r")(plain)
    assert problems(dag) == ["task 'r': is a router, but no task depends on it: it has nothing to choose from"]


def test_G3_a_join_needs_a_map_or_fan_out_above() -> None:
    dag = DAG()
    dag.join(name="first")(joined)
    dag.join(name="second", after="first")(joined)
    dag.task(name="effect", pass_through=True)(nothing)
    dag.router(name="r", after="effect")(plain)
    dag.join(name="third", after="r")(joined)
    text = "is a join, but above it is no map, nor any other task that could return children"
    assert problems(dag) == [f"task {name!r}: {text}" for name in ("first", "second", "third")]


@pytest.mark.parametrize(
    ("kind", "function"),
    [("map", generator), ("sync", plain), ("stream", generator), ("loop", generator), ("service", plain)],
)
def test_G3_a_join_below_what_can_make_children(kind: str, function: Any) -> None:
    dag = DAG()
    dag.task(name="top", kind=kind)(function)
    dag.router(name="r", after="top")(plain)
    dag.join(name="j", after="r")(joined)
    dag.build()


def test_G3_T7_two_limiters_of_one_name() -> None:
    shared, other = RateLimit(3, name="api"), ConcurrencyLimit(2, name="api")
    dag = DAG()
    dag.task(name="a", limiter=shared)(plain)
    dag.task(name="b", limiter=[shared, ConcurrencyLimit(1), ConcurrencyLimit(1)])(plain)
    dag.task(name="c", limiter=other)(plain)
    assert problems(dag) == ["task 'c': its limiter 'api' has the name of another one, of task 'a': share or rename it"]


def test_G3_T7_a_resource_without_a_pool() -> None:
    def use(ctx: Any, resource: Any) -> Any:
        return ctx

    def may_use(ctx: Any, resource: Any = None) -> Any:
        return ctx

    dag = DAG()
    dag.task(name="a")(use)
    dag.task(name="b", limiter=ResourcePool([1]))(use)
    dag.task(name="c")(may_use)
    assert problems(dag) == [
        "task 'a': its function takes a 'resource', but there is no ResourcePool among its limiters to fill it"
    ]


_KIND_MISTAKES: list[tuple[str, Callable[..., Any], str]] = [
    ("async", plain, "AsyncFunctionTask needs a coroutine function (async def), not a plain function"),
    ("sync", coroutine, "SyncFunctionTask needs a plain function, not a coroutine function (async def)"),
    ("foreground", coroutine, "ForegroundSyncFunctionTask needs a plain function"),
    ("process", coroutine, "ProcessTask needs a plain function"),
    ("sync", generator, "SyncFunctionTask needs a plain function, not a generator function (def with yield)"),
    ("stream", plain, "SyncStreamTask needs a generator function (def with yield), not a plain function"),
    ("stream", coroutine, "AsyncStreamTask needs an async generator function"),
    ("foreground_stream", asyncgen, "ForegroundSyncStreamTask needs a generator function"),
    ("loop", plain, "SyncLoopTask needs a generator function"),
    ("loop", coroutine, "AsyncLoopTask needs an async generator function"),
    ("foreground_loop", plain, "ForegroundSyncLoopTask needs a generator function"),
    ("service", generator, "SyncThreadTask needs a plain function"),
    ("service", asyncgen, "AsyncServiceTask needs a coroutine function"),
    ("router", generator, "SyncRouterTask needs a plain function"),
    ("router", asyncgen, "AsyncRouterTask needs a coroutine function"),
    ("foreground_router", coroutine, "ForegroundSyncRouterTask needs a plain function"),
    ("shutdown", plain, "SyncFunctionShutdownTask needs a callable object with a method shutdown()"),
    ("shutdown", SyncFunctionTask, "its function is the class SyncFunctionTask; give an instance"),
]


@pytest.mark.parametrize(("kind", "function", "expected"), _KIND_MISTAKES)
def test_T5_a_function_of_the_wrong_kind(kind: str, function: Any, expected: str) -> None:
    task = DAG().task(function, kind=kind, name="x")
    assert any(problem.startswith(expected) for problem in task.problems())


def test_T15_a_join_is_no_generator() -> None:
    task = DAG().join(lambda parent, children: (yield parent))
    assert next(iter(task.problems())).startswith(
        "JoinTask needs a plain function or a coroutine function (async def), not"
    )


@pytest.mark.parametrize("kind", ["sync", "foreground", "router", "foreground_router", "map"])
def test_T4_a_function_that_only_returns_none_is_refused(kind: str) -> None:
    [problem] = DAG().task(nothing, kind=kind).problems()
    assert problem.startswith("every return of its function is None")


def test_T4_the_hint_says_the_way_out() -> None:
    dag = DAG()
    dag.task(name="a")(nothing)
    assert problems(dag) == [
        "task 'a': every return of its function is None, which would drop every context: return the context, or set "
        "pass_through=True if it only has effects"
    ]


def test_T4_T15_a_join_that_only_returns_none_is_refused() -> None:
    dag = DAG()

    @dag.join(after=dag.task(name="top")(plain))
    def j(parent: Any, children: Any) -> None: ...

    assert [problem.split(",")[0] for problem in problems(dag)] == ["task 'j': every return of its function is None"]


@pytest.mark.parametrize("kind", ["sync", "foreground"])
def test_T4_pass_through_is_accepted(kind: str) -> None:
    assert list(DAG().task(kind=kind, pass_through=True)(nothing).problems()) == []


def test_T4_does_not_apply_to_services_streams_and_loops() -> None:
    def serve(queue: Any) -> None: ...

    def stream(ctx: Any) -> Any:
        yield None

    dag = DAG()
    for kind, function in (("thread", serve), ("stream", stream), ("loop", stream), ("map", stream)):
        assert list(dag.task(function, kind=kind, name=kind).problems()) == []


@pytest.mark.parametrize("kind", ["router", "map", "thread"])
def test_T3_pass_through_is_for_functions_only(kind: str) -> None:
    [problem] = DAG().task(kind=kind, pass_through=True)(plain).problems()
    assert problem.startswith("pass_through means nothing for ")


def test_G3_all_mistakes_at_once() -> None:
    dag = DAG()
    dag.task(name="a", after="b")(nothing)
    dag.task(name="b", after=["a", "zzz"])(plain)
    dag.task(name="b")(plain)
    dag.task(name="c", kind="async")(plain)
    dag.router(name="r", targets=["a"])(plain)
    dag.join(name="j", after="r")(joined)
    found = problems(dag)
    assert [problem.split(":")[0] for problem in found] == [
        "task 'b'", "task 'b'", "cycle", "task 'r'", "task 'j'", "task 'a'", "task 'c'"
    ]  # fmt: skip
    with pytest.raises(GraphError) as caught:
        dag.build()
    assert str(caught.value) == "; ".join(found)


def test_G3_a_users_own_kind_tells_its_problems() -> None:
    class Odd(AsyncFunctionTask):
        def problems(self) -> Any:
            yield from super().problems()
            yield "is odd"

    dag = DAG()
    dag.add_task(Odd(coroutine, TaskConfig(), "o"))
    dag.add_task(Task(plain, name="t"))
    assert problems(dag) == ["task 'o': is odd"]
