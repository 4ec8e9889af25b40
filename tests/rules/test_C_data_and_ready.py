"""C1 to C4: a context's data, its lock, making others, and which task is ready."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import MutableMapping

import pytest

from obsdag import DAG, Context, ContextError, OutputContext, Runtime
from tests.rules.helpers import ONE, Engine, Log, assert_counts, chain, every_schedule, settle

# --- C1


def test_C1_a_context_is_a_mutable_mapping_of_its_data() -> None:
    ctx = Context(Runtime(), {"a": 1}, "one")

    assert isinstance(ctx, MutableMapping)
    assert (ctx.id, ctx["a"], ctx.get("a"), ctx.get("b"), ctx.get("b", 5)) == ("one", 1, 1, None, 5)
    ctx["b"] = 2
    ctx.update({"c": 3}, d=4)
    assert ("b" in ctx, "z" in ctx, len(ctx), dict(ctx)) == (True, False, 4, {"a": 1, "b": 2, "c": 3, "d": 4})
    del ctx["a"]
    assert list(ctx) == ["b", "c", "d"]
    assert (ctx.pop("b"), ctx.pop("b", None), ctx.setdefault("e", 9)) == (2, None, 9)
    assert (list(ctx.keys()), list(ctx.values()), list(ctx.items())) == (
        ["c", "d", "e"],
        [3, 4, 9],
        [("c", 3), ("d", 4), ("e", 9)],
    )
    ctx.clear()
    assert len(ctx) == 0


def test_C1_missing_keys_raise_as_in_a_dict() -> None:
    ctx = Context()
    with pytest.raises(KeyError):
        ctx["a"]
    with pytest.raises(KeyError):
        del ctx["a"]
    with pytest.raises(KeyError):
        ctx.pop("a")


def test_C1_the_first_argument_is_the_runtime_and_all_are_optional() -> None:
    runtime = Runtime()

    assert Context(runtime).runtime is runtime
    assert Context().runtime is None
    assert dict(Context(None, [("a", 1)])) == {"a": 1}
    assert Context().id != Context().id


def test_C1_iteration_is_over_a_snapshot() -> None:
    ctx = Context(data={"a": 1, "b": 2})
    seen = []
    for key in ctx:
        seen.append(key)
        ctx[f"{key}{key}"] = 0
        del ctx[key]
    assert (seen, sorted(ctx)) == (["a", "b"], ["aa", "bb"])


def test_C1_the_data_given_is_copied() -> None:
    data = {"a": 1}
    ctx = Context(data=data)
    ctx["a"] = 2
    assert data == {"a": 1}


@every_schedule
@pytest.mark.parametrize("kind", ["async", "sync", "foreground"])
async def test_C1_the_mapping_is_the_same_in_async_and_sync_tasks(engine: Engine, kind: str) -> None:
    dag = DAG()

    def use(ctx: Context) -> Context:
        ctx["b"] = ctx["a"] + 1
        ctx.update(c=len(ctx))
        del ctx["a"]
        assert "a" not in ctx
        assert sorted(ctx) == ["b", "c"]
        return ctx

    async def use_async(ctx: Context) -> Context:
        return use(ctx)

    dag.task(use_async if kind == "async" else use, kind=kind, name="use")
    result = await engine.run(dag, [{"a": 1}, {"a": 2}])

    assert sorted((out["b"], out["c"]) for out in result) == [(2, 2), (3, 2)]
    assert_counts(result, output=2)


# --- C2


def test_C2_single_reads_and_writes_are_safe_from_threads() -> None:
    ctx = Context(data={"n": 0})
    errors: list[BaseException] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            start.wait(10)
            for i in range(500):
                ctx[f"{number}.{i}"] = i
                list(ctx)
                dict(ctx.items())
                ctx.update({f"u{number}": i})
                del ctx[f"{number}.{i}"]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(ctx) == ["n", *(f"u{n}" for n in range(8))]


def test_C2_the_lock_excludes_other_holders() -> None:
    ctx = Context(data={"n": 0})
    start = threading.Barrier(6)

    def work() -> None:
        start.wait(10)
        for _ in range(2000):
            with ctx.lock:
                ctx["n"] = ctx["n"] + 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ctx["n"] == 12000


@every_schedule
async def test_C2_the_lock_excludes_parallel_tasks_of_one_context(engine: Engine) -> None:
    dag = DAG()

    def work(ctx: Context) -> Context:
        for _ in range(300):
            with ctx.lock:
                ctx["n"] = ctx["n"] + 1
        return ctx

    for number in range(4):
        dag.task(work, kind="sync", name=f"work{number}")
    result = await engine.run(dag, {"n": 0})

    assert [out["n"] for out in result] == [1200]
    assert_counts(result, output=1)


def test_C2_the_lock_is_not_made_until_used() -> None:
    ctx = Context()
    ctx["a"] = 1
    ctx.update(b=2)
    assert ctx._lock is None
    lock = ctx.lock
    assert ctx.lock is lock


# --- C3


def test_C3_create_makes_an_unrelated_new_root() -> None:
    runtime = Runtime()
    ctx = Context(runtime, {"a": [1]}, "first").create_child(name="child")
    other = ctx.create()

    assert (other.parent, other.depth, other.root) == (None, 0, other)
    assert (dict(other), other.runtime) == ({}, runtime)
    assert other not in ctx.children
    assert other.id != ctx.id
    assert ctx.create(name="named").id == "named"


@pytest.mark.parametrize("deep", [False, True])
def test_C3_a_copy_never_shares_the_dict_itself(deep: bool) -> None:
    ctx = Context(data={"a": [1], "b": 2})
    other = ctx.create(deep_copy=True) if deep else ctx.create(copy_data=True)

    assert dict(other) == {"a": [1], "b": 2}
    assert (other["a"] is ctx["a"]) is not deep
    other["b"] = 3
    ctx["c"] = 4
    assert (ctx["b"], "c" in other) == (2, False)


def test_C3_create_child_makes_one_or_a_list() -> None:
    ctx = Context(data={"a": 1})
    one = ctx.create_child()
    named = ctx.create_child(name="kid")
    three = ctx.create_child(3)
    single = ctx.create_child(num=1)

    assert isinstance(one, Context)
    assert named.id == "kid"
    assert isinstance(three, list)
    assert len(three) == 3
    assert isinstance(single, list)
    assert len(single) == 1
    assert ctx.children == [one, named, *three, *single]
    assert {child.parent for child in ctx.children} == {ctx}
    assert {(child.root, child.depth) for child in ctx.children} == {(ctx, 1)}


@pytest.mark.parametrize("num", [-1, -5])
def test_C3_a_negative_number_of_children_is_refused(num: int) -> None:
    with pytest.raises(ContextError, match=str(num)):
        Context().create_child(num)


@every_schedule
async def test_C3_siblings_made_by_shallow_copies_do_not_share(engine: Engine) -> None:
    dag = DAG()

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        return [ctx.create(copy_data=True, name=f"c{i}") for i in range(5)]

    @dag.task(after=spread)
    async def mark(ctx: Context) -> Context:
        await asyncio.sleep(0)
        ctx["n"] = ctx["n"] + int(ctx.id[1:])
        return ctx

    result = await engine.run(dag, {"n": 100})
    assert sorted(out["n"] for out in result) == [100, 101, 102, 103, 104]
    assert_counts(result, split=1, output=5)


# --- C4


@every_schedule
async def test_C4_a_task_is_not_ready_before_every_upstream_is_completed(engine: Engine) -> None:
    dag, log = DAG(), Log()
    gate = asyncio.Event()

    @dag.task
    async def slow(ctx: Context) -> Context:
        if engine.tasks == 0:
            await gate.wait()
        log.append(("slow", ctx))
        return ctx

    @dag.task
    async def fast(ctx: Context) -> Context:
        log.append(("fast", ctx))
        await settle()
        assert "below" not in ctx.available_tasks
        gate.set()
        return ctx

    dag.task(log.step("below"), after=[slow, fast], name="below")
    result = await engine.run(dag)

    assert log.names()[2:] == ["below"]
    assert_counts(result, output=1)


@every_schedule
async def test_C4_a_completed_task_is_not_ready_again(engine: Engine) -> None:
    dag, log = DAG(), Log()
    chain(dag, log, "a", "b", "c")
    chain(dag, log, "x", "y", after="a")
    chain(dag, log, "end", after=["c", "y"])
    result = await engine.run(dag, [{} for _ in range(7)])

    assert sorted(log.names()) == sorted(["a", "b", "c", "x", "y", "end"] * 7)
    for out in result:
        assert list(out.completed_tasks) == list(dag.tasks)
    assert_counts(result, output=7)


@every_schedule
async def test_C4_a_running_task_is_not_ready_though_its_context_is_returned_again(engine: Engine) -> None:
    dag, log = DAG(), Log()
    started, gate = asyncio.Event(), asyncio.Event()
    kept: list[Context] = []

    @dag.task
    async def begin(ctx: Context) -> Context:
        kept.append(ctx)
        return ctx

    @dag.task(after=begin)
    async def long(ctx: Context) -> Context:
        log.append(("long", ctx))
        started.set()
        if engine.tasks == 0:
            await gate.wait()
        return ctx

    @dag.task(after=begin)
    async def again(ctx: Context) -> list[Context]:
        if engine.tasks == 0:
            await started.wait()
            asyncio.get_running_loop().call_later(0.01, gate.set)
        return [ctx, ctx]

    result = await engine.run(dag)
    assert log.names() == ["long"]
    assert_counts(result, output=1)


@every_schedule
async def test_C4_an_edge_from_a_router_that_did_not_choose_it_is_dead(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.router
    async def choose(ctx: Context) -> str:
        return "left"

    chain(dag, log, "left", after=choose)
    chain(dag, log, "right", "right2", "right3", after=choose)
    chain(dag, log, "end", after=["left", "right3"])
    result = await engine.run(dag, [{}, {}])

    assert sorted(log.names()) == ["end", "end", "left", "left"]
    assert list(result[0].completed_tasks) == ["choose", "left", "end"]
    assert_counts(result, output=2)


@every_schedule
async def test_C4_a_task_with_one_live_edge_is_run(engine: Engine) -> None:
    dag, log = DAG(), Log()
    chain(dag, log, "other")

    @dag.router
    async def choose(ctx: Context) -> list[str]:
        return ["a"]

    chain(dag, log, "a", after=choose)
    chain(dag, log, "b", after=choose)
    chain(dag, log, "mixed", after=["b", "other"])
    result = await engine.run(dag)

    assert sorted(log.names()) == ["a", "mixed", "other"]
    assert log.names().index("mixed") > log.names().index("other")
    assert_counts(result, output=1)


@every_schedule
async def test_C4_a_task_below_nested_routers_is_skipped_when_every_edge_is_dead(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.router
    async def outer(ctx: Context) -> str:
        return "inner" if ctx["n"] < 2 else "far"

    @dag.router(after=outer)
    async def inner(ctx: Context) -> str:
        return ["x", "y"][ctx["n"]]

    chain(dag, log, "x", after=inner)
    chain(dag, log, "y", after=inner)
    chain(dag, log, "xy", after=["x", "y"])
    chain(dag, log, "far", after=outer)
    chain(dag, log, "end", after=["xy", "far"])
    result = await engine.run(dag, [{"n": n} for n in range(3)])

    seen = {out["n"]: log.names(out.context) for out in result}
    assert seen == {0: ["x", "xy", "end"], 1: ["y", "xy", "end"], 2: ["far", "end"]}
    assert_counts(result, output=3)


@every_schedule
async def test_C4_a_direct_edge_beside_a_dead_one_to_the_same_task(engine: Engine) -> None:
    dag, log = DAG(), Log()
    chain(dag, log, "first")

    @dag.router(after="first")
    async def choose(ctx: Context) -> str:
        return "a"

    chain(dag, log, "a", after=choose)
    # `direct` is below the router, which did not choose it, and below first, which is completed: one edge lives.
    chain(dag, log, "direct", after=[choose, "first"])
    result = await engine.run(dag)

    assert sorted(log.names()) == ["a", "direct", "first"]
    assert_counts(result, output=1)


@every_schedule
async def test_C4_available_tasks_are_those_that_are_ready_and_not_started(engine: Engine) -> None:
    dag = DAG()
    seen: list[set[str]] = []

    @dag.task
    async def first(ctx: Context) -> Context:
        return ctx

    @dag.task(after=first, priority=1)
    async def second(ctx: Context) -> Context:
        seen.append(set(ctx.available_tasks))
        return ctx

    dag.task(Log().step("third"), after=first, name="third")
    dag.task(Log().step("last"), after="third", name="last")
    result = await engine.run(dag)

    assert seen == [{"third"}] if engine.tasks == 1 else seen[0] <= {"third"}
    assert_counts(result, output=1)


@every_schedule
async def test_C4_what_waits_for_a_retry_is_not_ready(engine: Engine) -> None:
    dag = DAG()
    tries: list[int] = []
    inside: list[bool] = []

    @dag.task(retry_times=1, retry_interval=1000, priority=1)
    async def flaky(ctx: Context) -> Context:
        tries.append(ctx.attempt)
        raise ValueError("once")

    @dag.task
    async def beside(ctx: Context) -> Context:
        await settle()
        inside.append("flaky" in ctx.available_tasks)
        ctx.destroy()
        return ctx

    result = await engine.run(dag)
    assert (tries, inside) == ([1], [False])
    assert_counts(result, dropped=1)


async def test_C4_an_output_shows_skipped_tasks_as_not_completed() -> None:
    dag = DAG()

    @dag.router
    async def choose(ctx: Context) -> str:
        return "a"

    dag.task(Log().step("a"), after=choose, name="a")
    dag.task(Log().step("b"), after=choose, name="b")
    result = await ONE.run(dag)

    (out,) = result
    assert isinstance(out, OutputContext)
    assert ("a" in out.completed_tasks, "b" in out.completed_tasks) == (True, False)
    assert_counts(result, output=1)
