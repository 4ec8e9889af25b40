"""A DAG from a mapping or a TOML file (SEMANTICS G8)."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest

from obsdag.errors import GraphError
from obsdag.graph import DAG
from obsdag.limits import ConcurrencyLimit, RateLimit
from obsdag.tasks import AsyncFunctionTask, Exponential, Fixed, ForegroundSyncFunctionTask, RouterTask, SyncFunctionTask
from tests.graph import config_steps as steps

STEPS = "tests.graph.config_steps"

SHOP = f"""
name = "shop"

[executor]
context_worker_num = 4

[limiters.api]
kind = "rate"
n = 10
per = 2.0

[limiters.few]
kind = "concurrency"
n = 2
name = "a few"

[tasks.fetch]
function = "{STEPS}:fetch"
parameters = {{ region = "eu" }}
retry_times = 3
retry_interval = {{ kind = "exponential", base = 0.5, jitter = false }}
retry_on = ["ConnectionError", "{STEPS}:Busy"]
limiter = ["api", "{STEPS}:shared_limit"]
timeout = 2.5

[tasks.route]
kind = "foreground_router"
function = "{STEPS}:choose"
targets = ["store"]
after = "fetch"

[tasks.store]
kind = "foreground"
function = "{STEPS}:store"
after = ["route"]
limiter = "api"
retry_interval = "{STEPS}:interval"

[tasks."a b"]
function = "{STEPS}:Steps.parse"
limiter = "few"
retry_interval = {{ kind = "fixed", interval = 2 }}
retry_on = "OSError"

[tasks.decorated]
function = "{STEPS}:decorated"
retry_interval = 0.5
"""


@pytest.fixture
def shop(tmp_path: Path) -> DAG:
    path = tmp_path / "shop.toml"
    path.write_text(SHOP)
    return DAG.from_config(path)


def test_G8_a_dag_from_a_toml_file(shop: DAG) -> None:
    assert shop.name == "shop"
    assert list(shop.tasks) == ["fetch", "route", "store", "a b", "decorated"]
    assert shop.edges() == [("fetch", "route"), ("route", "store")]
    assert [type(task) for task in shop.tasks.values()][::2] == [
        AsyncFunctionTask,
        ForegroundSyncFunctionTask,
        SyncFunctionTask,
    ]
    assert shop.plan is None
    assert len(shop.build()) == 7


async def test_G8_parameters_are_bound(shop: DAG) -> None:
    fetch = shop.tasks["fetch"].func
    assert isinstance(fetch, functools.partial)
    assert await fetch("context") == ("eu", 1)


def test_G8_settings_of_tasks(shop: DAG) -> None:
    fetch, route, store, parse, decorated = shop.tasks.values()
    assert fetch.config.retry_times == 3
    assert fetch.config.timeout == 2.5
    assert fetch.config.retry_interval == Exponential(base=0.5, jitter=False)
    assert fetch.config.retry_on == (ConnectionError, steps.Busy)
    assert isinstance(route, RouterTask)
    assert route.targets == ("store",)
    assert store.config.retry_interval is steps.interval
    assert parse.func is steps.Steps.parse
    assert parse.config.retry_interval == Fixed(2)
    assert parse.config.retry_on is OSError
    assert decorated.func is steps.decorated.func
    assert decorated.config.retry_interval == 0.5


def test_G8_limiters_are_shared_by_name(shop: DAG) -> None:
    api, shared = shop.tasks["fetch"].config.limits
    assert isinstance(api, RateLimit)
    assert (api.n, api.per, api.name) == (10, 2.0, "api")
    assert shared is steps.shared_limit
    assert shop.tasks["store"].config.limits == (api,)
    [few] = shop.tasks["a b"].config.limits
    assert isinstance(few, ConcurrencyLimit)
    assert few.name == "a few"


def test_G8_a_mapping_may_hold_objects_and_own_kinds() -> None:
    limit = RateLimit(1)
    dag = DAG.from_config(
        {
            "tasks": {
                "a": {"function": steps.store, "kind": f"{STEPS}:OwnTask", "color": "blue", "limiter": limit},
                "b": {"function": steps.store, "kind": steps.OwnTask, "retry_on": (OSError, steps.Busy)},
            }
        }
    )
    assert dag.name == "dag"
    a, b = dag.tasks.values()
    assert isinstance(a, steps.OwnTask)
    assert isinstance(b, steps.OwnTask)
    assert (a.color, b.color) == ("blue", "red")
    assert a.config.limits == (limit,)
    assert b.config.retry_on == (OSError, steps.Busy)


def test_G8_a_subclass_of_dag_makes_its_own_kind() -> None:
    class Mine(DAG):
        pass

    assert type(Mine.from_config({"tasks": {"a": {"function": steps.store}}})) is Mine


def mistakes(config: Any) -> tuple[str, ...]:
    with pytest.raises(GraphError) as caught:
        DAG.from_config(config)
    return caught.value.problems


def task(**settings: Any) -> dict[str, Any]:
    return {"tasks": {"a": {"function": steps.store, **settings}}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "tasks: the DAG has no task"),
        ({"name": "", **task()}, "name: must be a non-empty text, not ''"),
        ({"nam": "x", **task()}, "nam: unknown (did you mean 'name'?); there are name, tasks, limiters"),
        ({"tasks": {"a": 3}}, "tasks.a: must be a table, not 3"),
        ({"tasks": {"a": {}}}, "tasks.a: has no function"),
        ({"tasks": {"": {}}}, "tasks.\"\": a task's name must be a non-empty text, not ''"),
        ({"tasks": {1: {}}}, 'tasks."1": a task\'s name must be a non-empty text, not 1'),
        ({"tasks": {"a b.c": {}}}, 'tasks."a b.c": has no function'),
        (task(function="no_colon"), "tasks.a.function: must be written module:attribute, not 'no_colon'"),
        (task(function=":x"), "tasks.a.function: must be written module:attribute, not ':x'"),
        (
            task(function="no_such_module_here:x"),
            "tasks.a.function: module 'no_such_module_here' cannot be imported: ModuleNo",
        ),
        (task(function=f"{STEPS}:stor"), f"tasks.a.function: '{STEPS}' has no 'stor' (did you mean 'store'?)"),
        (task(function=f"{STEPS}:not_callable"), f"tasks.a.function: '{STEPS}:not_callable' is no function, but 3"),
        (task(function=3), "tasks.a.function: 3 is no function"),
        (task(kind="steam"), "tasks.a.kind: unknown kind 'steam' (did you mean 'stream'?)"),
        (task(kind=3), "tasks.a.kind: unknown kind 3"),
        (task(parameters=[1]), "tasks.a.parameters: must be a table of keyword arguments, not [1]"),
        (task(parameters={"regio": 1}), "tasks.a.parameters: the function got an unexpected keyword argument 'regio'"),
        (task(after=3), "tasks.a.after: must be a task's name or a list of names, not 3"),
        (task(after="b"), "tasks.a.after: depends on 'b', which was never added"),
        (task(retry_times=-1), "tasks.a.retry_times: must be a whole number >= 0, not -1"),
        (task(retry_time=1), "tasks.a.retry_time: unknown (did you mean 'retry_times'?); there are kind, function"),
        (task(timeout="3"), "tasks.a.timeout: must be a number of seconds > 0, not '3'"),
        (
            task(retry_interval={"base": 1}),
            "tasks.a.retry_interval: its kind must be one of exponential, fixed, not None",
        ),
        (task(retry_interval={"kind": "fixed", "base": 1}), "tasks.a.retry_interval: unknown field 'base'"),
        (task(retry_interval={"kind": "fixed", "interval": -1}), "tasks.a.retry_interval: Fixed.interval must be"),
        (task(retry_interval="soon"), "tasks.a.retry_interval: must be written module:attribute, not 'soon'"),
        (task(retry_on=["Busy"]), "tasks.a.retry_on: 'Busy' is no exception of Python's own"),
        (task(retry_on="print"), "tasks.a.retry_on: 'print' is no exception of Python's own"),
        (task(retry_on=3), "tasks.a.retry_on: must be exception types or a callable"),
        (
            task(limiter="api"),
            "tasks.a.limiter: 'api' is neither a table of [limiters] (there are: none) nor module:att",
        ),
        (task(limiter=f"{STEPS}:store"), "tasks.a.limiter: must be a RateLimit, ConcurrencyLimit or ResourcePool"),
        ({"limiters": 3, **task()}, "limiters: must be a table, not 3"),
        (
            {"limiters": {"x": {"kind": "rat"}}, **task()},
            "limiters.x: its kind must be one of rate, concurrency, not 'rat'",
        ),
        ({"limiters": {"x": 3}, **task()}, "limiters.x: must be a table with a kind, not 3"),
        (
            {"limiters": {"x": {"kind": "rate", "n": 0}}, **task()},
            "limiters.x: RateLimit.n must be a whole number >= 1",
        ),
        ({"limiters": {"x": {"kind": "rate"}}, **task()}, "limiters.x: "),
        (task(kind="join", on_child_failure="skip"), "tasks.a: its function takes 1 positional parameter"),
        (task(function=steps.nothing), "tasks.a: every return of its function is None"),
        (task(function=steps.fetch, kind="sync"), "tasks.a: SyncFunctionTask needs a plain function"),
        (
            {"tasks": {"r": {"function": steps.choose, "kind": "router", "targets": ["x"]}}},
            "tasks.r: is a router, but no",
        ),
    ],
)
def test_G8_a_mistake_is_told_with_its_place(config: Any, expected: str) -> None:
    found = mistakes(config)
    assert any(mistake.startswith(expected) for mistake in found), found


def test_G8_all_mistakes_at_once() -> None:
    config = {
        "tasks": {
            "a": {"function": "nowhere_to_be_found:x", "retry_times": "many", "after": "b"},
            "b": {"function": steps.store, "after": ["a", "zzz"], "priority": 1.5},
            "r": {"function": steps.choose, "kind": "router", "targets": ["x"], "after": "a"},
            "c": {"function": steps.store, "after": "r"},
        },
        "limiters": {"x": {}},
    }
    assert [problem.split(":")[0] for problem in mistakes(config)] == [
        "limiters.x",
        "tasks.a.function",
        "tasks.a.retry_times",
        "tasks.b.priority",
        "tasks.b.after",
        "tasks",
        "tasks.r.targets",
    ]


def test_G8_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert mistakes(missing) == (f"{missing} cannot be read: No such file or directory",)
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    assert mistakes(str(broken))[0].startswith(f"{broken} is not TOML: Invalid value (at")


def test_G8_a_module_that_raises_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raises_on_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    assert mistakes(task(function="raises_on_import:x")) == (
        "tasks.a.function: module 'raises_on_import' cannot be imported: ZeroDivisionError: division by zero",
    )
    assert "raises_on_import" not in sys.modules
