"""A DAG inside another one (SEMANTICS G5)."""

from __future__ import annotations

from typing import Any

import pytest

from obsdag.errors import ConfigError, GraphError
from obsdag.graph import DAG
from obsdag.tasks import ForegroundSyncFunctionTask, SubDAG, TaskConfig


def same(ctx: Any) -> Any:
    return ctx


def make(name: str, edges: dict[str, list[str]]) -> DAG:
    dag = DAG(name)
    for task_id, above in edges.items():
        dag.add_task(ForegroundSyncFunctionTask(same, name=task_id), above)
    return dag


def test_G5_entries_come_after_and_the_handle_means_the_exits() -> None:
    other = make("clean", {"a": [], "b": [], "c": ["a", "b"], "d": ["a"]})
    dag = make("top", {"first": []})
    handle = dag.include(other, after="first")
    dag.add_task(ForegroundSyncFunctionTask(same, name="last"), handle)
    assert isinstance(handle, SubDAG)
    assert (handle.entries, handle.exits) == (("clean/a", "clean/b"), ("clean/c", "clean/d"))
    assert handle.members == ("clean/a", "clean/b", "clean/c", "clean/d")
    assert dag.edges() == [
        ("first", "clean/a"),
        ("first", "clean/b"),
        ("clean/a", "clean/c"),
        ("clean/b", "clean/c"),
        ("clean/a", "clean/d"),
        ("clean/c", "last"),
        ("clean/d", "last"),
    ]
    assert "clean" not in dag.build().index


def test_G5_the_other_dag_stays_usable_and_can_be_included_twice() -> None:
    other = make("other", {"a": [], "b": ["a"]})
    dag = DAG()
    one = dag.include(other, "one")
    two = dag.include(other, name="two", after=one)
    assert [task.id for task in other.build().tasks] == ["source", "a", "b", "sink"]
    assert [task.id for task in dag.build().tasks] == ["source", "one/a", "one/b", "two/a", "two/b", "sink"]
    assert dag.tasks["one/a"].upstream_tasks == {dag.in_task}
    assert other.tasks["a"].upstream_tasks == {other.in_task}
    assert two.dag is other


def test_G5_a_built_dag_can_be_included() -> None:
    other = make("other", {"a": [], "b": ["a"]})
    other.build()
    dag = DAG()
    dag.include(other)
    assert dag.build().up_list == ((), (0,), (1,), (2,))


def test_G5_what_is_added_later_to_the_other_dag_does_not_appear() -> None:
    other = make("other", {"a": []})
    dag = DAG()
    dag.include(other)
    other.add_task(ForegroundSyncFunctionTask(same, name="b"))
    assert list(dag.tasks) == ["other/a"]


def test_G5_nested() -> None:
    inner = make("inner", {"x": [], "y": ["x"]})
    middle = make("middle", {"m": []})
    handle = middle.include(inner, after="m")
    middle.add_task(ForegroundSyncFunctionTask(same, name="n"), handle)
    dag = make("top", {"start": []})
    dag.include(middle, after="start")
    dag.add_task(ForegroundSyncFunctionTask(same, name="end"), "middle/inner")
    assert dag.edges() == [
        ("start", "middle/m"),
        ("middle/m", "middle/inner/x"),
        ("middle/inner/x", "middle/inner/y"),
        ("middle/inner/y", "middle/n"),
        ("middle/inner/y", "end"),
    ]
    dag.build()


def test_G5_a_dag_within_itself() -> None:
    dag = make("dag", {"a": []})
    dag.include(dag, "again", after="a")
    dag.include(dag, "more", after="again")
    assert list(dag.tasks) == ["a", "again/a", "more/a", "more/again/a"]
    assert len(dag.build()) == 6


def test_G5_by_add_task_and_by_id() -> None:
    dag = make("top", {"last": ["sub"]})
    handle = dag.add_task(SubDAG(make("sub", {"a": []})))
    assert isinstance(handle, SubDAG)
    assert dag.edges() == [("sub/a", "last")]


def test_G5_T9_an_included_router_chooses_by_the_names_of_its_own_dag() -> None:
    other = make("other", {"a": []})
    other.router(name="r", after="a", targets=["b", "c"], kind="foreground_router")(lambda ctx: "b")
    for name in ("b", "c"):
        other.add_task(ForegroundSyncFunctionTask(same, name=name), "r")
    dag = DAG()
    dag.include(other)
    plan = dag.build()
    choices = {name: plan.names(mask) for name, mask in plan.choices[plan.index["other/r"]].items()}
    assert choices == {"b": ["other/b"], "c": ["other/c"], "other/b": ["other/b"], "other/c": ["other/c"]}


def test_G5_T9_a_router_may_choose_an_included_dag() -> None:
    dag = DAG()
    dag.router(name="r", targets=["sub", "b"])(lambda ctx: "sub")
    dag.include(make("sub", {"x": [], "y": [], "z": ["x"]}), after="r")
    dag.add_task(ForegroundSyncFunctionTask(same, name="b"), "r")
    plan = dag.build()
    choices = {name: plan.names(mask) for name, mask in plan.choices[plan.index["r"]].items()}
    assert choices == {"sub": ["sub/x", "sub/y"], "sub/x": ["sub/x"], "sub/y": ["sub/y"], "b": ["b"]}


def test_G5_a_task_whose_function_is_its_own_method_takes_it_along() -> None:
    class Counting(ForegroundSyncFunctionTask):
        def __init__(self) -> None:
            super().__init__(self.count, name="count")

        def count(self, ctx: Any) -> Any:
            return ctx

    other = DAG("other")
    task = other.add_task(Counting())
    dag = DAG()
    dag.include(other)
    mine = dag.tasks["other/count"]
    assert mine.func.__self__ is mine  # type: ignore[union-attr]
    assert task.func.__self__ is task  # type: ignore[union-attr]


def problems(dag: DAG) -> tuple[str, ...]:
    with pytest.raises(GraphError) as caught:
        dag.build()
    return caught.value.problems


def test_G3_G5_mistakes_of_the_included_dag_are_told_with_its_name() -> None:
    other = make("other", {"a": ["zzz"], "b": []})
    other.add_task(ForegroundSyncFunctionTask(same, name="b"))
    dag = DAG()
    dag.include(other)
    dag.include(DAG("empty"))
    assert problems(dag) == (
        "task 'other/b': another task has that id already: give one of them a name",
        "task 'other/a': depends on 'zzz', which was never added",
        "task 'empty': the included DAG 'empty' has no task",
    )


def test_G3_G5_names_of_included_dags_are_unique() -> None:
    dag = make("top", {"sub": [], "two/a": []})
    dag.include(make("sub", {"a": []}))
    dag.include(make("two", {"a": []}))
    dag.include(make("x", {"a": []}))
    dag.include(make("x", {"b": []}))
    assert [problem.split(":")[0] for problem in problems(dag)] == ["task 'sub'", "task 'two/a'", "task 'x'"]


def test_G5_a_config_is_for_a_task() -> None:
    with pytest.raises(ConfigError, match="included DAG 'sub': a config is for a task, not for a whole DAG"):
        SubDAG(make("sub", {"a": []}), TaskConfig(retry_times=1))


def test_G5_including_something_else() -> None:
    with pytest.raises(TypeError, match="only a DAG can be included, not 'other'"):
        DAG().include("other")  # type: ignore[arg-type]
