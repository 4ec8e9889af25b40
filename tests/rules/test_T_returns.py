"""T1 to T4 and T6: what a task is given, what it may return, and what that does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from obsdag import (
    DAG,
    ConfigError,
    Context,
    Environment,
    Exponential,
    Fixed,
    GraphError,
    Observer,
    Runtime,
    TaskConfig,
    TaskError,
)
from tests.rules.helpers import ONE, Engine, Log, assert_counts, chain, every_schedule, finish, settle

KINDS = ["async", "sync", "foreground"]


def as_kind(func: Callable[[Context], Any], kind: str) -> Callable[..., Any]:
    """`func` as the function that a task of that kind takes."""
    if kind != "async":
        return func

    async def call(ctx: Context) -> Any:
        await asyncio.sleep(0)
        return func(ctx)

    return call


# --- T1


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
async def test_T1_a_second_parameter_is_given_the_environment(engine: Engine, kind: str) -> None:
    dag, runtime = DAG(), Runtime()
    seen: list[Environment] = []

    def look(ctx: Context, env: Environment) -> Context:
        seen.append(env)
        return ctx

    async def look_async(ctx: Context, env: Environment) -> Context:
        return look(ctx, env)

    dag.task(look_async if kind == "async" else look, kind=kind, name="look")
    result = await engine.run(dag, {}, runtime)
    (env,) = seen
    assert (env.runtime, env.dag, env.process_pool) == (runtime, dag, None)
    assert_counts(result, output=1)


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["itself", "list", "tuple", "twice"])
async def test_T1_a_task_may_return_its_context(engine: Engine, kind: str, form: str) -> None:
    dag, log = DAG(), Log()
    forms: dict[str, Callable[[Context], Any]] = {
        "itself": lambda ctx: ctx,
        "list": lambda ctx: [ctx],
        "tuple": lambda ctx: (ctx,),
        "twice": lambda ctx: [ctx, ctx],
    }
    dag.task(as_kind(forms[form], kind), kind=kind, name="t")
    chain(dag, log, "end", after="t")
    result = await engine.run(dag, [{}, {}])
    if form == "tuple" and result.counts["failed"]:
        assert_counts(result, failed=2)  # T1 names a list; a tuple either counts as one or is refused by name
        assert isinstance(result.failures[0].exception, TaskError)
    else:
        assert len(log) == 2
        assert_counts(result, output=2)


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
async def test_T1_others_that_it_returns_go_on(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()
    dag.task(as_kind(lambda ctx: [ctx, ctx.create(name="new")], kind), kind=kind, name="t")
    chain(dag, log, "end", after="t")
    result = await engine.run(dag, [{}, {}])
    assert len(log) == 4
    assert all("t" in out.completed_tasks for out in result)
    assert_counts(result, output=4)


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nothing", [None, []])
async def test_T1_none_or_an_empty_list_is_nothing(engine: Engine, kind: str, nothing: Any) -> None:
    dag, log = DAG(), Log()
    dag.task(as_kind(lambda ctx: nothing if len(ctx) < 9 else ctx, kind), kind=kind, name="t", may_drop=True)
    chain(dag, log, "end", after="t")
    result = await engine.run(dag, [{}, {}])
    assert log == []
    assert_counts(result, dropped=2)


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wrong",
    [5, 0, "text", b"", True, False, {"a": 1}, [5], [None], [[]], Context, ValueError("returned"), 1.5],
    ids=repr,
)
async def test_T1_anything_else_is_a_task_error_that_shows_it(engine: Engine, kind: str, wrong: Any) -> None:
    dag, log = DAG(), Log()
    dag.task(as_kind(lambda ctx: wrong, kind), kind=kind, name="liar")
    chain(dag, log, "end", after="liar")
    result = await engine.run(dag, [{}, {}])
    assert log == []
    assert_counts(result, failed=2)
    error = result.failures[0].exception
    assert isinstance(error, TaskError)
    assert "liar" in str(error)
    assert (repr(wrong) in str(error)) or (repr(wrong[0]) in str(error)) or type(wrong).__name__ in str(error)


@every_schedule
async def test_T1_a_list_with_something_wrong_lets_nothing_in(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    async def liar(ctx: Context) -> Any:
        return [ctx.create(), ctx, 5]

    chain(dag, log, "end", after=liar)
    result = await engine.run(dag)
    assert log == []
    assert_counts(result, failed=1)


class Recording(Observer):
    """Asks for nothing but what released an execution, which is noted on a way of its own."""

    needs_records = True


@pytest.mark.parametrize("beside", [False, True], ids=["straight", "beside another"])
async def test_T1_what_another_completed_is_not_run_again_when_what_is_above_it_ends(beside: bool) -> None:
    first, second = Context(name="first"), Context(name="second")
    ran: list[tuple[str, str]] = []
    begun, handed = asyncio.Event(), asyncio.Event()
    dag = DAG()

    @dag.task
    async def above(ctx: Context) -> Context:
        if ctx is second:
            begun.set()
        await (handed if ctx is second else begun).wait()
        ran.append(("above", ctx.id))
        return ctx

    @dag.task(after="above")
    async def hand(ctx: Context) -> list[Context]:
        ran.append(("hand", ctx.id))
        handed.set()
        return [first, second]

    @dag.task(after=["hand", "beside"] if beside else "hand")
    async def below(ctx: Context) -> Context:
        ran.append(("below", ctx.id))
        return ctx

    expected = [("above", "first"), ("above", "second"), ("hand", "first"), ("below", "first"), ("below", "second")]
    if beside:
        expected += [("beside", "first"), ("beside", "second")]

        @dag.task(name="beside")  # ready while `above` runs, and behind `hand`
        async def _(ctx: Context) -> Context:
            ran.append(("beside", ctx.id))
            return ctx

    observers = [Recording()] if beside else []
    # Without debug: the short way of a straight stretch.
    result = await Engine(workers=2).run(dag, [first, second], debug=False, observers=observers)
    assert_counts(result, output=2)
    assert Counter(ran) == Counter(expected)


@every_schedule
async def test_T1_a_context_of_someone_else_may_be_returned_and_is_completed(engine: Engine) -> None:
    dag, log = DAG(), Log()
    parked: list[Context] = []

    @dag.task(may_drop=True)
    async def swap(ctx: Context) -> Any:
        if ctx["n"] == 0:
            ctx.freeze()
            parked.append(ctx)
            return None
        await settle()
        return [ctx, *parked]

    chain(dag, log, "end", after=swap)
    result = await engine.run(dag, [{"n": 0}, {"n": 1}])
    assert len(log) == 2
    assert all("swap" in out.completed_tasks for out in result)
    assert_counts(result, output=2)


# --- T2


@every_schedule
async def test_T2_one_worker_drives_a_context_at_a_time(engine: Engine) -> None:
    dag = DAG()
    running: Counter[Context] = Counter()
    most: list[int] = []

    async def work(ctx: Context) -> list[Context]:
        running[ctx] += 1
        most.append(running[ctx])
        await settle()
        running[ctx] -= 1
        return [ctx, ctx]

    for number in range(6):
        dag.task(work, name=f"t{number}")
    result = await engine.run(dag, [{} for _ in range(4)])
    assert max(most) == (1 if engine.tasks == 1 else 6)
    assert_counts(result, output=4)


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 4, 64])
async def test_T2_within_task_worker_num(workers: int, limit: int) -> None:
    dag = DAG()
    running: Counter[Context] = Counter()
    most: list[int] = []

    async def work(ctx: Context) -> Context:
        running[ctx] += 1
        most.append(running[ctx])
        await settle(3)
        running[ctx] -= 1
        return ctx

    for number in range(6):
        dag.task(work, name=f"t{number}")
        dag.task(work, name=f"u{number}", after=f"t{number}")
    result = await Engine(workers, limit).run(dag, [{} for _ in range(3)])
    assert max(most) == limit
    assert len(most) == 36
    assert_counts(result, output=3)


@every_schedule
async def test_T2_a_context_returned_several_times_is_one(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task
    async def many(ctx: Context) -> list[Context]:
        new = ctx.create()
        return [ctx, new, ctx, new, new]

    @dag.task(after=many)
    async def again(ctx: Context) -> list[Context]:
        return [ctx] * 5

    chain(dag, log, "end", after=again)
    result = await engine.run(dag)
    assert len(log) == 2
    assert_counts(result, output=2)


@pytest.mark.parametrize("workers", [1, 4, 64])
async def test_T2_what_a_return_makes_ready_starts_beside_what_is_running(workers: int) -> None:
    dag, log = DAG(), Log()
    gate = asyncio.Event()

    @dag.task(priority=1)
    async def long(ctx: Context) -> Context:
        await gate.wait()
        return ctx

    chain(dag, log, "quick", "next")

    @dag.task(after="next")
    async def release(ctx: Context) -> Context:
        gate.set()
        return ctx

    result = await Engine(workers, 2).run(dag)
    assert log.names() == ["quick", "next"]
    assert_counts(result, output=1)


@every_schedule
async def test_T2_a_running_context_returned_by_another_starts_nothing_twice(engine: Engine) -> None:
    dag, log = DAG(), Log()
    all_of_them = [Context(name=f"c{n}") for n in range(5)]
    chain(dag, log, "first")

    @dag.task(after="first")
    async def stir(ctx: Context) -> list[Context]:
        await settle(3)
        return [ctx, *(each for each in all_of_them if each.completed_tasks)]

    chain(dag, log, "end", after=stir)
    result = await engine.run(dag, all_of_them)
    assert Counter(log.names()) == {"first": 5, "end": 5}
    assert_counts(result, output=5)


# --- T3


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
async def test_T3_a_task_that_returns_nothing_stops_the_other_branches(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()
    started = asyncio.Event()

    dag.task(as_kind(lambda ctx: None if len(ctx) < 9 else ctx, kind), kind=kind, name="drop", after="gate")

    @dag.task(priority=1)
    async def gate(ctx: Context) -> Context:
        if engine.tasks == 0:
            await started.wait()
        return ctx

    @dag.task
    async def beside(ctx: Context) -> Context:
        log.append(("beside", ctx))
        started.set()
        await asyncio.Event().wait()
        return ctx

    chain(dag, log, "below", after="beside")
    if engine.tasks == 1:
        # One at a time: `beside` would hang in front of the drop; let it be behind it instead.
        dag = DAG()
        dag.task(as_kind(lambda ctx: None if len(ctx) < 9 else ctx, kind), kind=kind, name="drop", priority=1)
        chain(dag, log, "beside", "below")
    result = await engine.run(dag)
    assert log.names() == (["beside"] if engine.tasks == 0 else [])
    assert_counts(result, dropped=1)


@every_schedule
async def test_T3_one_that_returns_others_than_its_own_is_split(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task(priority=1)
    async def replace(ctx: Context) -> list[Context]:
        return [ctx.create(name=f"new{n}") for n in range(3)]

    chain(dag, log, "beside", "beside2")
    chain(dag, log, "end", after=[replace, "beside2"])
    ctx = Context(name="old")
    result = await engine.run(dag, ctx)
    assert ctx.outcome == "split"
    assert sorted(each.id for name, each in log if name == "end") == ["new0", "new1", "new2"]
    assert "beside2" not in log.names()
    assert_counts(result, split=1, output=3)


@every_schedule
async def test_T3_replaced_even_if_all_that_it_was_made_into_is_dropped(engine: Engine) -> None:
    dag = DAG()

    @dag.task
    async def replace(ctx: Context) -> Context:
        return ctx.create()

    @dag.task(after=replace, may_drop=True)
    async def drop(ctx: Context) -> Context | None:
        return None if len(ctx) == 0 else ctx

    result = await engine.run(dag, [{}, {}])
    assert_counts(result, split=2, dropped=2)


@every_schedule
async def test_T3_a_frozen_context_is_kept_and_completed_by_whoever_returns_it(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.stream
    async def batch(ctx: Context) -> AsyncIterator[Any]:
        kept: list[Context] = []
        while True:
            kept.append(ctx)
            if len(kept) == 3:
                ctx = yield kept
                kept = []
            else:
                ctx.freeze()
                ctx = yield None

    chain(dag, log, "end", after=batch)
    result = await engine.run(dag, [{"n": n} for n in range(9)])
    assert sorted(ctx["n"] for _, ctx in log) == list(range(9))
    assert not any(ctx.frozen for _, ctx in log)
    assert all("batch" in out.completed_tasks for out in result)
    assert_counts(result, output=9)


@every_schedule
async def test_T3_a_batch_may_go_on_as_one_context(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.stream
    async def batch(ctx: Context) -> AsyncIterator[Any]:
        kept: list[Context] = []
        while True:
            kept.append(ctx)
            if len(kept) == 3:
                whole = ctx.create()
                whole["sum"] = sum(each["n"] for each in kept)
                for each in kept[:-1]:
                    each.thaw()
                kept = []
                ctx = yield whole
            else:
                ctx.freeze()
                ctx = yield None

    chain(dag, log, "end", after=batch)
    result = await engine.run(dag, [{"n": n} for n in range(6)])
    assert sum(out["sum"] for out in result) == 15
    # The one that brought the batch was made into it; the others were thawed without being returned.
    assert_counts(result, split=2, dropped=4, output=2)


@every_schedule
async def test_T3_a_frozen_context_thawed_without_being_returned_is_dropped(engine: Engine) -> None:
    dag, log = DAG(), Log()
    loop = asyncio.get_running_loop()

    @dag.task(may_drop=True)
    async def keep(ctx: Context) -> Context | None:
        if len(ctx) == 0:
            ctx.freeze()
            loop.call_later(0.01, ctx.thaw)
            return None
        return ctx

    chain(dag, log, "end", after=keep)
    result = await engine.run(dag, [{}, {"a": 1}])
    assert len(log) == 1
    assert_counts(result, dropped=1, output=1)


@every_schedule
async def test_T3_a_kept_context_that_nobody_returns_or_thaws_is_stalled(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task(may_drop=True)
    async def keep(ctx: Context) -> Context | None:
        if len(ctx) == 0:
            ctx.freeze()
            return None
        return ctx

    chain(dag, log, "end", after=keep)
    result = await engine.run(dag, [{}, {"a": 1}], context_queue_timeout=0.001)
    assert len(log) == 1
    assert_counts(result, stalled=1, output=1)


@every_schedule
async def test_T3_an_incomplete_batch_is_stalled_and_named(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.stream
    async def batch(ctx: Context) -> AsyncIterator[Any]:
        kept: list[Context] = []
        while True:
            kept.append(ctx)
            if len(kept) == 3:
                kept, whole = [], kept
                ctx = yield whole
            else:
                ctx.freeze()
                ctx = yield None

    chain(dag, log, "end", after=batch)
    result = await engine.run(dag, [{"n": n} for n in range(5)], context_queue_timeout=0.001)
    assert [stall.task for stall in result.stalled] == ["batch", "batch"]
    assert_counts(result, output=3, stalled=2)


@every_schedule
async def test_T3_a_kept_context_keeps_its_other_branches_for_later(engine: Engine) -> None:
    dag, log = DAG(), Log()
    kept: list[Context] = []

    @dag.task(priority=1, may_drop=True)
    async def gather(ctx: Context) -> Any:
        if ctx["n"] == 0:
            ctx.freeze()
            kept.append(ctx)
            return None
        await settle()
        return [ctx, *kept]

    chain(dag, log, "b1", "b2")
    chain(dag, log, "end", after=[gather, "b2"])
    result = await engine.run(dag, [{"n": 0}, {"n": 1}])
    assert Counter(log.names()) == {"b1": 2, "b2": 2, "end": 2}
    assert_counts(result, output=2)


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
async def test_T3_pass_through_returns_nothing_and_its_context_goes_on(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()

    def effect(ctx: Context) -> None:
        ctx["seen"] = True

    async def effect_async(ctx: Context) -> None:
        ctx["seen"] = True

    dag.task(effect_async if kind == "async" else effect, kind=kind, name="effect", pass_through=True)
    chain(dag, log, "end", after="effect")
    result = await engine.run(dag, [{}, {}])
    assert [out["seen"] for out in result] == [True, True]
    assert_counts(result, output=2)


@every_schedule
async def test_T3_pass_through_of_a_frozen_or_destroyed_context(engine: Engine) -> None:
    dag, log = DAG(), Log()
    loop = asyncio.get_running_loop()

    @dag.task(pass_through=True)
    async def effect(ctx: Context) -> None:
        if ctx["n"]:
            ctx.freeze()
            loop.call_later(0.01, ctx.thaw)
        else:
            ctx.destroy()

    chain(dag, log, "end", after=effect)
    result = await engine.run(dag, [{"n": 0}, {"n": 1}])
    assert_counts(result, output=1, dropped=1)


# --- T4


@pytest.mark.parametrize("kind", KINDS)
def test_T4_a_function_whose_every_return_is_none_is_refused_at_build(kind: str) -> None:
    dag = DAG()

    def forgot(ctx: Context) -> None:
        ctx["a"] = 1

    async def forgot_async(ctx: Context) -> None:
        if ctx:
            return
        ctx["a"] = 1

    dag.task(forgot_async if kind == "async" else forgot, kind=kind, name="forgot")
    with pytest.raises(GraphError, match=r"forgot.*pass_through"):
        dag.build()


def test_T4_pass_through_makes_it_right() -> None:
    dag = DAG()

    @dag.task(pass_through=True)
    async def effect(ctx: Context) -> None:
        ctx["a"] = 1

    dag.build()


@every_schedule
async def test_T4_a_function_that_can_only_raise_is_not_refused(engine: Engine) -> None:
    dag = DAG()

    @dag.task
    async def refuse(ctx: Context) -> Context:
        raise ValueError("always")

    result = await engine.run(dag)
    assert_counts(result, failed=1)


# --- T6


def test_T6_defaults() -> None:
    config = TaskConfig()
    assert (config.retry_times, config.retry_interval, config.parallel_num, config.limits) == (0, 0, 0, ())
    assert (config.timeout, config.retry_on, config.priority, config.slow_after) == (None, None, 0, None)
    assert (config.pass_through, config.may_drop) == (False, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("retry_times", -1),
        ("retry_times", 1.5),
        ("retry_times", True),
        ("retry_interval", -0.1),
        ("retry_interval", float("nan")),
        ("retry_interval", "1"),
        ("parallel_num", -1),
        ("parallel_num", None),
        ("limiter", 5),
        ("limiter", "5/s"),
        ("timeout", 0),
        ("timeout", -1),
        ("timeout", float("inf")),
        ("retry_on", 5),
        ("retry_on", ()),
        ("retry_on", str),
        ("priority", 1.5),
        ("slow_after", 0),
        ("pass_through", 1),
        ("may_drop", "yes"),
    ],
)
def test_T6_out_of_range_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        TaskConfig(**{name: value})
    with pytest.raises(ConfigError, match=name):
        DAG().task(Log().step("a"), **{name: value})


def test_T6_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="retry_time"):
        TaskConfig.from_mapping({"retry_time": 3})
    with pytest.raises(ConfigError, match="retry_time"):
        DAG().task(Log().step("a"), retry_time=3)


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "interval",
    [0, 0.001, lambda ctx: 0.001, Fixed(0.001), Exponential(0.001, cap=0.002)],
    ids=["zero", "number", "callable", "fixed", "exponential"],
)
async def test_T6_retry_times_and_interval(engine: Engine, kind: str, interval: Any) -> None:
    dag = DAG()

    def flaky(ctx: Context) -> Context:
        ctx["tries"] = ctx.attempt
        if ctx.attempt < ctx["need"]:
            raise ValueError(ctx.attempt)
        return ctx

    dag.task(as_kind(flaky, kind), kind=kind, name="flaky", retry_times=2, retry_interval=interval)
    inputs = [Context(data={"need": n}) for n in (1, 2, 3, 4)]
    result = await engine.run(dag, inputs)
    assert [ctx["tries"] for ctx in inputs] == [1, 2, 3, 3]
    assert [(failure.attempts, str(failure.exception)) for failure in result.failures] == [(3, "3")]
    assert_counts(result, output=3, failed=1)


@every_schedule
@pytest.mark.parametrize("bad", [-1, "soon", float("nan"), None], ids=repr)
async def test_T6_a_retry_interval_callable_that_gives_rubbish_fails_its_context(engine: Engine, bad: Any) -> None:
    dag = DAG()

    @dag.task(retry_times=2, retry_interval=lambda ctx: bad)
    async def flaky(ctx: Context) -> Context:
        raise ValueError

    result = await engine.run(dag, [{}, {}])
    assert_counts(result, failed=2)


@every_schedule
async def test_T6_a_retry_interval_callable_that_raises_fails_its_context(engine: Engine) -> None:
    dag = DAG()

    def interval(ctx: Context) -> float:
        raise RuntimeError("no interval")

    @dag.task(retry_times=2, retry_interval=interval)
    async def flaky(ctx: Context) -> Context:
        raise ValueError

    result = await engine.run(dag, [{}, {}])
    assert_counts(result, failed=2)


@every_schedule
@pytest.mark.parametrize(
    "rule",
    [KeyError, (KeyError, IndexError), lambda error: isinstance(error, KeyError)],
    ids=["type", "types", "predicate"],
)
async def test_T6_retry_on_decides_which_errors_are_retried(engine: Engine, rule: Any) -> None:
    dag = DAG()
    calls: Counter[int] = Counter()

    @dag.task(retry_times=2, retry_on=rule)
    async def flaky(ctx: Context) -> Context:
        calls[ctx["n"]] += 1
        raise [KeyError, ValueError][ctx["n"]]("x")

    result = await engine.run(dag, [{"n": 0}, {"n": 1}])
    assert calls == {0: 3, 1: 1}
    assert_counts(result, failed=2)


@every_schedule
async def test_T6_a_retry_on_predicate_that_raises_fails_its_context(engine: Engine) -> None:
    dag = DAG()

    def rule(error: BaseException) -> bool:
        raise RuntimeError("no rule")

    @dag.task(retry_times=2, retry_on=rule)
    async def flaky(ctx: Context) -> Context:
        raise ValueError

    result = await engine.run(dag, [{}, {}])
    assert_counts(result, failed=2)


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 2])
async def test_T6_parallel_num_is_exact(engine: Engine, kind: str, limit: int) -> None:
    dag = DAG()
    running: list[int] = []
    most: list[int] = []

    def count(ctx: Context) -> Context:
        running.append(1)
        most.append(len(running))
        running.pop()
        return ctx

    async def count_async(ctx: Context) -> Context:
        running.append(1)
        most.append(len(running))
        await settle(3)
        running.pop()
        return ctx

    dag.task(count_async if kind == "async" else count, kind=kind, name="count", parallel_num=limit)
    result = await engine.run(dag, [{} for _ in range(12)])
    assert len(most) == 12
    assert max(most) <= limit
    if kind == "async":
        assert max(most) == min(limit, engine.workers)
    assert_counts(result, output=12)


@every_schedule
async def test_T6_priority_orders_the_ready_tasks_of_one_context(engine: Engine) -> None:
    dag, log = DAG(), Log()
    for number in (2, 9, -1, 5):
        dag.task(log.step(f"p{number}"), name=f"p{number}", priority=number)
    dag.task(log.step("p0"), name="p0")
    result = await engine.run(dag)
    assert log.names() == ["p9", "p5", "p2", "p0", "p-1"]
    assert_counts(result, output=1)


@every_schedule
async def test_T6_timeout_ends_an_execution(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.task(timeout=0.01, retry_times=1)
    async def slow(ctx: Context) -> Context:
        if ctx["n"] or (ctx.attempt == 2 and ctx["retry"]):
            return ctx
        await asyncio.Event().wait()
        return ctx

    chain(dag, log, "end", after=slow)
    inputs = [{"n": 0, "retry": 0}, {"n": 1}, {"n": 0, "retry": 1}]
    result = await engine.run(dag, inputs)
    assert len(log) == 2
    (failure,) = result.failures
    assert isinstance(failure.exception, TimeoutError)
    assert failure.attempts == 2
    assert_counts(result, output=2, failed=1)


@every_schedule
async def test_T6_a_task_that_swallows_its_timeout(engine: Engine) -> None:
    dag = DAG()

    @dag.task(timeout=0.01)
    async def stubborn(ctx: Context) -> Context:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await settle(3)
        return ctx

    result = await engine.run(dag, [{}, {}])
    # It ended too late, whatever it says then: a timeout.
    assert_counts(result, failed=2)
    assert isinstance(result.failures[0].exception, TimeoutError)


@every_schedule
async def test_T6_a_timeout_error_of_ones_own_is_an_error(engine: Engine) -> None:
    dag = DAG()

    @dag.task(timeout=100, retry_times=1, retry_on=ValueError)
    async def own(ctx: Context) -> Context:
        raise TimeoutError("mine")

    result = await engine.run(dag)
    assert str(result.failures[0].exception) == "mine"
    assert_counts(result, failed=1)


# --- T8


@every_schedule
async def test_T8_running_counts_come_back_on_every_way_out(engine: Engine) -> None:
    dag = DAG()
    ways = ["return", "raise", "drop", "split", "timeout", "destroy", "cancelled", "rubbish", "children"]

    @dag.task(parallel_num=1, timeout=0.02, may_drop=True)
    async def out(ctx: Context) -> Any:
        match ctx["way"]:
            case "raise":
                raise ValueError
            case "drop":
                return None
            case "split":
                return ctx.create()
            case "timeout":
                await asyncio.Event().wait()
            case "destroy":
                ctx.destroy()
            case "cancelled":
                raise asyncio.CancelledError
            case "rubbish":
                return 5
            case "children":
                return ctx.create_child(2)
        return ctx

    executor = engine.executor(dag)
    result = await finish(executor, [{"way": way} for way in ways * 3])
    assert_counts(result, output=3 * (1 + 1 + 2), failed=3 * 4, dropped=3 * 2, split=3 * 2)
    assert executor.stats()["tasks"]["out"]["executions"] == 27


async def test_T8_a_parallel_num_is_a_runs_own() -> None:
    dag = DAG()
    both = asyncio.Barrier(2)

    @dag.task(parallel_num=1)
    async def meet(ctx: Context) -> Context:
        await both.wait()
        return ctx

    executor = ONE.executor(dag)
    results = await asyncio.gather(finish_alone(executor), finish_alone(executor))
    assert [len(result) for result in results] == [1, 1]


async def finish_alone(executor: Any) -> Any:
    async with asyncio.timeout(5):
        return await executor.run()
