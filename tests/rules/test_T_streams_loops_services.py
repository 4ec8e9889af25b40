"""T14: streams, loops and services; maps have their own file."""

from __future__ import annotations

import asyncio
import queue as queues
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from obsdag import (
    DAG,
    ConcurrencyLimit,
    Context,
    LoopContext,
    ServiceError,
    StopContext,
    TaskError,
)
from tests.rules.helpers import HANG_S, ONE, Engine, Log, assert_counts, chain, every_schedule, finish, settle

GENERATORS = ["async", "sync", "foreground"]


def generator_task(
    dag: DAG, shape: str, kind: str, func: Callable[[Context], Iterator[Any]], name: str = "gen", **settings: Any
) -> None:
    """Adds a stream, loop or map of that kind around the plain generator function."""
    if kind != "async":
        full = shape if kind == "sync" or shape == "map" else f"foreground_{shape}"
        dag.task(func, kind=full, name=name, **settings)
        return

    async def generate(ctx: Context) -> AsyncIterator[Any]:
        inner, sent = func(ctx), None
        try:
            while True:
                try:
                    item = inner.send(sent)
                except StopIteration:
                    return
                await asyncio.sleep(0)
                sent = yield item
        finally:
            inner.close()

    dag.task(generate, kind=shape, name=name, **settings)


# --- streams


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_stream_keeps_its_state_and_is_one_at_a_time(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()
    inside: list[int] = []

    def number(ctx: Context) -> Iterator[Context]:
        count = 0
        while True:
            inside.append(1)
            assert len(inside) == 1
            count += 1
            ctx["number"] = count
            inside.pop()
            ctx = yield ctx

    generator_task(dag, "stream", kind, number)
    chain(dag, log, "end", after="gen")
    executor = engine.executor(dag)
    for _ in range(2):
        result = await finish(executor, [{} for _ in range(6)])
        assert sorted(out["number"] for out in result) == [1, 2, 3, 4, 5, 6]
        assert_counts(result, output=6)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_stream_without_parameters_is_sent_its_first_context(engine: Engine, kind: str) -> None:
    dag = DAG()

    def sync() -> Iterator[Any]:
        total = 0
        ctx = yield None
        while True:
            total += ctx["n"]
            ctx["total"] = total
            ctx = yield ctx

    async def asynchronous() -> AsyncIterator[Any]:
        total = 0
        ctx = yield None
        while True:
            total += ctx["n"]
            ctx["total"] = total
            ctx = yield ctx

    kinds = {"async": "stream", "sync": "stream", "foreground": "foreground_stream"}
    try:
        dag.task(asynchronous if kind == "async" else sync, kind=kinds[kind], name="gen")
        dag.build()
    except ValueError as error:
        pytest.fail(f"the seed's form is refused: {error}")
    result = await engine.run(dag, [{"n": 1} for _ in range(4)])
    assert sorted(out["total"] for out in result) == [1, 2, 3, 4]
    assert_counts(result, output=4)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_stream_that_raised_is_made_anew(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()
    made: list[int] = []

    def fragile(ctx: Context) -> Iterator[Context]:
        made.append(1)
        count = 0
        while True:
            count += 1
            if ctx["n"] == 2:
                raise ValueError("two")
            ctx["count"] = count
            ctx = yield ctx

    generator_task(dag, "stream", kind, fragile)
    chain(dag, log, "end", after="gen")
    result = await engine.run(dag, [{"n": n} for n in range(5)])
    assert len(made) == 2
    assert [failure.context["n"] for failure in result.failures] == [2]
    assert str(result.failures[0].exception) == "two"
    assert sorted(out["count"] for out in result) == [1, 1, 2, 2]
    assert_counts(result, output=4, failed=1)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_stream_that_raised_is_made_anew_for_a_retry(engine: Engine, kind: str) -> None:
    dag, made = DAG(), []

    def fragile(ctx: Context) -> Iterator[Context]:
        made.append(1)
        while True:
            if ctx["n"] == 1 and ctx.attempt == 1:
                raise ValueError("once")
            ctx = yield ctx

    generator_task(dag, "stream", kind, fragile, retry_times=1)
    result = await engine.run(dag, [{"n": n} for n in range(3)])
    assert len(made) == 2
    assert_counts(result, output=3)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_stream_that_ended_is_made_anew_for_the_next_context(engine: Engine, kind: str) -> None:
    dag, made = DAG(), []

    def two_only(ctx: Context) -> Iterator[Context]:
        made.append(1)
        ctx["made"] = len(made)
        ctx = yield ctx
        ctx["made"] = len(made)
        yield ctx

    generator_task(dag, "stream", kind, two_only)
    result = await engine.run(dag, [{} for _ in range(7)])
    # "for the next context": the one on which it ended got nothing, and says so; the next one finds a new generator.
    assert result.counts["output"] + result.counts["failed"] == 7
    assert all(isinstance(failure.exception, TaskError) for failure in result.failures)
    assert len(made) in (3, 4)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_stream_that_never_yields_fails_each_context(engine: Engine, kind: str) -> None:
    dag = DAG()

    def empty(ctx: Context) -> Iterator[Context]:
        if len(ctx) > 5:
            yield ctx

    generator_task(dag, "stream", kind, empty)
    result = await engine.run(dag, [{}, {}])
    assert_counts(result, failed=2)
    assert isinstance(result.failures[0].exception, TaskError)


@every_schedule
async def test_T14_an_async_stream_that_timed_out_is_made_anew(engine: Engine) -> None:
    dag, made = DAG(), []

    @dag.stream(timeout=0.01)
    async def hang(ctx: Context) -> AsyncIterator[Context]:
        made.append(1)
        while True:
            if ctx["n"] == 1:
                await asyncio.Event().wait()
            ctx = yield ctx

    result = await engine.run(dag, [{"n": n} for n in range(4)])
    assert len(made) == 2
    assert isinstance(result.failures[0].exception, TimeoutError)
    assert_counts(result, output=3, failed=1)


@every_schedule
async def test_T14_a_sync_stream_that_timed_out_is_made_anew(engine: Engine) -> None:
    dag, made, go = DAG(), [], threading.Event()

    @dag.stream(timeout=0.02)
    def hang(ctx: Context) -> Iterator[Context]:
        made.append(1)
        while True:
            if ctx["n"] == 1:
                go.wait(HANG_S)
            ctx = yield ctx

    asyncio.get_running_loop().call_later(0.06, go.set)
    result = await engine.run(dag, [{"n": n} for n in range(4)])
    assert len(made) == 2
    assert isinstance(result.failures[0].exception, TimeoutError)
    assert_counts(result, output=3, failed=1)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("wrong", [5, "text", [5], {"a": 1}], ids=repr)
async def test_T14_a_stream_that_yields_rubbish_fails_that_context(engine: Engine, kind: str, wrong: Any) -> None:
    dag = DAG()

    def rubbish(ctx: Context) -> Iterator[Any]:
        while True:
            ctx = yield wrong if ctx["n"] == 1 else ctx

    generator_task(dag, "stream", kind, rubbish)
    result = await engine.run(dag, [{"n": n} for n in range(4)])
    assert isinstance(result.failures[0].exception, TaskError)
    assert_counts(result, output=3, failed=1)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_streams_generator_is_closed_at_the_runs_end(engine: Engine, kind: str) -> None:
    dag, closed = DAG(), []

    def closing(ctx: Context) -> Iterator[Context]:
        try:
            while True:
                ctx = yield ctx
        finally:
            closed.append(1)

    generator_task(dag, "stream", kind, closing)
    result = await engine.run(dag, [{} for _ in range(3)])
    assert closed == [1]
    assert_counts(result, output=3)


@every_schedule
async def test_T14_a_streams_context_may_be_destroyed_while_it_is_inside(engine: Engine) -> None:
    dag, made = DAG(), []
    started = asyncio.Event()
    victim: list[Context] = []

    @dag.stream
    async def wait(ctx: Context) -> AsyncIterator[Context]:
        made.append(1)
        while True:
            if ctx["n"] == 1:
                victim.append(ctx)
                started.set()
                await asyncio.Event().wait()
            ctx = yield ctx

    running = asyncio.create_task(engine.run(dag, [{"n": n} for n in range(4)]))
    async with asyncio.timeout(HANG_S):
        await started.wait()
    victim[0].destroy()
    result = await running
    assert len(made) == 2
    assert_counts(result, output=3, dropped=1)


@every_schedule
async def test_T14_a_stream_may_yield_others_children_and_nothing(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.stream(may_drop=True)
    async def mixed(ctx: Context) -> AsyncIterator[Any]:
        while True:
            ways = [ctx, None, [], ctx.create(), [ctx, ctx.create()], ctx.create_child(2)]
            ctx = yield ways[ctx["n"]]

    chain(dag, log, "end", after=mixed)
    result = await engine.run(dag, [{"n": n} for n in range(6)])
    assert_counts(result, output=1 + 1 + 2 + 2, dropped=2, split=2)


# --- loops


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_loop_yields_new_contexts_and_its_input_ends_split(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()

    def loop(ctx: Context) -> Iterator[Context]:
        for n in range(ctx["count"]):
            item = ctx.create()
            item["n"] = n
            yield item

    generator_task(dag, "loop", kind, loop)
    chain(dag, log, "a", "end", after="gen")
    inputs = [Context(data={"count": n}) for n in (3, 1, 4)]
    result = await engine.run(dag, inputs)
    assert [ctx.outcome for ctx in inputs] == ["split"] * 3
    assert sorted(out["n"] for out in result) == [0, 0, 0, 1, 1, 2, 2, 3]
    assert_counts(result, split=3, output=8)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_loop_that_gives_nothing_ends_its_input_dropped(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()

    def empty(ctx: Context) -> Iterator[Context]:
        if len(ctx) > 5:
            yield ctx.create()

    generator_task(dag, "loop", kind, empty)
    chain(dag, log, "end", after="gen")
    result = await engine.run(dag, [{}, {}])
    assert log == []
    assert_counts(result, dropped=2)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_loop_is_pulled(engine: Engine, kind: str) -> None:
    dag = DAG()
    yielded, ended = [], []
    ahead: list[int] = []

    def loop(ctx: Context) -> Iterator[Context]:
        for n in range(20):
            yielded.append(n)
            yield ctx.create()

    generator_task(dag, "loop", kind, loop)

    @dag.task(after="gen")
    async def slow(ctx: Context) -> Context:
        await settle(2)
        ahead.append(len(yielded) - len(ended))
        ended.append(1)
        return ctx

    result = await engine.run(dag, max_live_contexts=4)
    # E16: the input, and at most three items.
    assert max(ahead) <= 4
    assert_counts(result, split=1, output=20)


@pytest.mark.parametrize("tasks", [0, 1])
async def test_T14_between_items_a_loop_holds_no_worker_and_no_permit(tasks: int) -> None:
    dag, log = DAG(), Log()
    limit = ConcurrencyLimit(1)

    @dag.loop(limiter=limit, parallel_num=1)
    async def loop(ctx: Context) -> AsyncIterator[Context]:
        for n in range(3):
            log.append((f"yield{n}", ctx))
            yield ctx.create(name=str(n))

    @dag.task(after=loop, limiter=limit)
    async def use(ctx: Context) -> Context:
        log.append((f"use{ctx.id}", ctx))
        return ctx

    result = await Engine(1, tasks).run(dag, [{}])
    # One worker, one permit: it would hang if the loop kept either. Items are finished before the next is pulled (E4).
    assert log.names() == ["yield0", "use0", "yield1", "use1", "yield2", "use2"]
    assert_counts(result, split=1, output=3)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_loop_that_raises_fails_its_input_but_not_what_it_gave(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()

    def breaks(ctx: Context) -> Iterator[Context]:
        yield ctx.create()
        yield ctx.create()
        raise ValueError("third")

    generator_task(dag, "loop", kind, breaks)
    chain(dag, log, "end", after="gen")
    ctx = Context()
    result = await engine.run(dag, ctx)
    assert ctx.outcome == "failed"
    assert_counts(result, failed=1, output=2)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_loop_that_raises_before_its_first_item_may_be_retried(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()

    def breaks(ctx: Context) -> Iterator[Context]:
        if ctx.attempt == 1:
            raise ValueError("first")
        yield ctx.create()
        yield ctx.create()

    generator_task(dag, "loop", kind, breaks, retry_times=1)
    chain(dag, log, "end", after="gen")
    result = await engine.run(dag)
    assert_counts(result, split=1, output=2)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("wrong", [5, "text", [5], {"a": 1}], ids=repr)
async def test_T14_a_loop_that_yields_rubbish_fails_its_input(engine: Engine, kind: str, wrong: Any) -> None:
    dag, log = DAG(), Log()

    def rubbish(ctx: Context) -> Iterator[Any]:
        yield ctx.create()
        yield wrong
        yield ctx.create()

    generator_task(dag, "loop", kind, rubbish)
    chain(dag, log, "end", after="gen")
    result = await engine.run(dag)
    assert isinstance(result.failures[0].exception, TaskError)
    assert len(log) == 1
    assert_counts(result, failed=1, output=1)


@every_schedule
@pytest.mark.parametrize("kind", GENERATORS)
async def test_T14_a_loops_generator_is_closed_when_its_input_is_destroyed(engine: Engine, kind: str) -> None:
    dag, log, closed = DAG(), Log(), []
    inputs: list[Context] = []

    def endless(ctx: Context) -> Iterator[Context]:
        inputs.append(ctx)
        try:
            while True:
                yield ctx.create()
        finally:
            closed.append(1)

    generator_task(dag, "loop", kind, endless)

    @dag.task(after="gen")
    async def count(ctx: Context) -> Context:
        log.append(("count", ctx))
        if len(log) == 5:
            inputs[0].destroy()
        return ctx

    result = await engine.run(dag)
    assert closed == [1]
    assert result.counts["dropped"] == 1
    assert result.counts["output"] == result.counts["entered"] - 1 >= 5


@every_schedule
async def test_T14_a_loops_input_is_held_until_its_generator_ends(engine: Engine) -> None:
    dag = DAG()
    outcomes: list[str | None] = []
    ctx = Context()

    @dag.loop
    async def loop(ctx: Context) -> AsyncIterator[Context]:
        for _ in range(3):
            yield ctx.create()
            await settle(5)
            outcomes.append(ctx.outcome)

    result = await engine.run(dag, ctx)
    assert outcomes == [None] * 3
    assert_counts(result, split=1, output=3)


@every_schedule
async def test_T14_other_branches_of_a_loops_input(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.loop
    async def loop(ctx: Context) -> AsyncIterator[Context]:
        for _ in range(3):
            yield ctx.create()

    chain(dag, log, "b1", "b2")
    chain(dag, log, "end", after=[loop, "b2"])
    result = await engine.run(dag)
    # E12: what a loop makes starts with the other branch completed.
    assert log.names().count("end") == 3
    assert log.names().count("b2") <= 1
    assert_counts(result, split=1, output=3)


@every_schedule
async def test_T14_a_loop_in_a_loop(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.loop
    async def outer(ctx: Context) -> AsyncIterator[Context]:
        for _ in range(3):
            yield ctx.create()

    @dag.loop(after=outer)
    def inner(ctx: Context) -> Iterator[Context]:
        for _ in range(2):
            yield ctx.create()

    @dag.loop(after=inner)
    async def innermost(ctx: Context) -> AsyncIterator[list[Context] | None]:
        yield [ctx.create(), ctx.create()]
        yield None

    chain(dag, log, "end", after=innermost)
    result = await engine.run(dag, max_live_contexts=5)
    assert_counts(result, split=1 + 3 + 6, output=12)


@every_schedule
async def test_T14_a_loop_that_yields_children(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.loop
    async def loop(ctx: Context) -> AsyncIterator[Context]:
        for _ in range(3):
            yield ctx.create_child()

    chain(dag, log, "end", after=loop)
    result = await engine.run(dag)
    assert_counts(result, split=1, output=3)


@every_schedule
async def test_T14_leaving_a_run_closes_loops_and_streams(engine: Engine) -> None:
    dag, closed = DAG(), []

    @dag.loop
    async def endless(ctx: Context) -> AsyncIterator[Context]:
        try:
            while True:
                yield ctx.create()
        finally:
            closed.append("loop")

    @dag.stream(after=endless)
    def stream(ctx: Context) -> Iterator[Context]:
        try:
            while True:
                ctx = yield ctx
        finally:
            closed.append("stream")

    async with asyncio.timeout(HANG_S):
        async with engine.executor(dag).stream([{}]) as outputs:
            for _ in range(3):
                await anext(outputs)
    assert sorted(closed) == ["loop", "stream"]
    counts = outputs.counts
    assert counts["entered"] == sum(number for name, number in counts.items() if name != "entered")


# --- services


def echo(dag: DAG, kind: str, story: list[Any], name: str = "echo", **settings: Any) -> None:
    """A service that answers each context with itself; kind is async or thread."""

    async def serve(queue: asyncio.Queue[Any]) -> None:
        story.append("start")
        while True:
            ctx, future = await queue.get()
            if isinstance(ctx, StopContext):
                story.append("stop")
                return
            ctx["seen"] = len(story)
            future.set_result(ctx)

    def serve_thread(queue: queues.Queue[Any]) -> None:
        story.append("start")
        while True:
            ctx, future = queue.get()
            if isinstance(ctx, StopContext):
                story.append("stop")
                return
            ctx["seen"] = len(story)
            future.set_result(ctx)

    dag.task(serve if kind == "async" else serve_thread, kind="service", name=name, **settings)


SERVICES = ["async", "thread"]


@every_schedule
@pytest.mark.parametrize("kind", SERVICES)
async def test_T14_a_service_answers_contexts_and_is_stopped_at_the_end(engine: Engine, kind: str) -> None:
    dag, log, story = DAG(), Log(), []
    echo(dag, kind, story)
    chain(dag, log, "end", after="echo")
    executor = engine.executor(dag)
    for _ in range(2):
        story.clear()
        result = await finish(executor, [{} for _ in range(7)])
        assert story == ["start", "stop"]
        assert_counts(result, output=7)
    assert len(log) == 14


@every_schedule
@pytest.mark.parametrize("kind", SERVICES)
async def test_T14_a_service_that_died_fails_what_was_in_it_and_is_started_anew(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()
    starts: list[int] = []
    died = asyncio.Event()

    def answer(ctx: Context, future: Any) -> bool:
        if isinstance(ctx, StopContext):
            return False
        if ctx["n"] == 2:
            raise ValueError("poison")
        future.set_result(ctx)
        return True

    async def serve(queue: asyncio.Queue[Any]) -> None:
        starts.append(1)
        while answer(*await queue.get()):
            pass

    def serve_thread(queue: queues.Queue[Any]) -> None:
        starts.append(1)
        while answer(*queue.get()):
            pass

    def no_retry(error: BaseException) -> bool:
        died.set()
        return False

    func = serve if kind == "async" else serve_thread
    dag.task(func, kind="service", name="serve", retry_times=1, retry_on=no_retry)
    chain(dag, log, "end", after="serve")

    async def inputs() -> AsyncIterator[dict[str, int]]:
        for n in range(3):
            yield {"n": n}
        await died.wait()  # so that exactly one is in it when it dies
        for n in range(3, 6):
            yield {"n": n}

    result = await engine.run(dag, inputs())
    assert len(starts) == 2
    (failure,) = result.failures
    assert isinstance(failure.exception, ServiceError)
    assert isinstance(failure.exception.__cause__, ServiceError | ValueError)
    assert "poison" in str(failure.exception)
    assert_counts(result, output=5, failed=1)


@every_schedule
@pytest.mark.parametrize("kind", SERVICES)
async def test_T14_a_service_that_returns_early_fails_what_was_in_it(engine: Engine, kind: str) -> None:
    dag = DAG()

    async def serve(queue: asyncio.Queue[Any]) -> None:
        await queue.get()

    def serve_thread(queue: queues.Queue[Any]) -> None:
        queue.get()

    dag.task(serve if kind == "async" else serve_thread, kind="service", name="serve")
    result = await engine.run(dag, [{}, {}])
    assert_counts(result, failed=2)
    assert all(isinstance(failure.exception, ServiceError) for failure in result.failures)


@every_schedule
@pytest.mark.parametrize("kind", SERVICES)
async def test_T14_a_dead_services_context_may_be_retried(engine: Engine, kind: str) -> None:
    dag, starts = DAG(), []

    async def serve(queue: asyncio.Queue[Any]) -> None:
        starts.append(1)
        ctx, future = await queue.get()
        if len(starts) == 1:
            raise ValueError("first")
        future.set_result(ctx)
        await queue.get()

    def serve_thread(queue: queues.Queue[Any]) -> None:
        starts.append(1)
        ctx, future = queue.get()
        if len(starts) == 1:
            raise ValueError("first")
        future.set_result(ctx)
        queue.get()

    dag.task(serve if kind == "async" else serve_thread, kind="service", name="serve", retry_times=1)
    result = await engine.run(dag, [{}])
    assert len(starts) == 2
    assert_counts(result, output=1)


@every_schedule
@pytest.mark.parametrize("kind", SERVICES)
async def test_T14_a_service_fails_one_context_by_its_future(engine: Engine, kind: str) -> None:
    dag, starts = DAG(), []

    def answer(ctx: Context, future: Any) -> None:
        if ctx["n"] % 2:
            future.set_exception(KeyError(ctx["n"]))
        else:
            future.set_result(ctx)

    async def serve(queue: asyncio.Queue[Any]) -> None:
        starts.append(1)
        while True:
            ctx, future = await queue.get()
            if isinstance(ctx, StopContext):
                return
            answer(ctx, future)

    def serve_thread(queue: queues.Queue[Any]) -> None:
        starts.append(1)
        while True:
            ctx, future = queue.get()
            if isinstance(ctx, StopContext):
                return
            answer(ctx, future)

    dag.task(serve if kind == "async" else serve_thread, kind="service", name="serve")
    result = await engine.run(dag, [{"n": n} for n in range(6)])
    assert starts == [1]
    assert sorted(failure.exception.args[0] for failure in result.failures) == [1, 3, 5]
    assert_counts(result, output=3, failed=3)


@every_schedule
@pytest.mark.parametrize("kind", SERVICES)
async def test_T14_a_late_result_on_a_cancelled_future_is_ignored(engine: Engine, kind: str) -> None:
    dag, log = DAG(), Log()
    victim = Context(data={"n": 0})
    loop = asyncio.get_running_loop()
    answered: list[int] = []

    async def serve(queue: asyncio.Queue[Any]) -> None:
        ctx, future = await queue.get()
        victim.destroy()
        await settle()
        assert future.done()
        future.set_result(ctx)
        future.set_result(ctx)
        answered.append(1)
        while True:
            ctx, future = await queue.get()
            if isinstance(ctx, StopContext):
                return
            future.set_result(ctx)

    def serve_thread(queue: queues.Queue[Any]) -> None:
        ctx, future = queue.get()
        done = threading.Event()
        victim.destroy()
        loop.call_soon_threadsafe(done.set)
        done.wait(HANG_S)
        future.set_result(ctx)
        future.set_result(ctx)
        answered.append(1)
        while True:
            ctx, future = queue.get()
            if isinstance(ctx, StopContext):
                return
            future.set_result(ctx)

    dag.task(serve if kind == "async" else serve_thread, kind="service", name="serve")
    chain(dag, log, "end", after="serve")
    result = await engine.run(dag, [victim, Context(data={"n": 1})])
    assert answered == [1]
    assert [ctx["n"] for _, ctx in log] == [1]
    assert_counts(result, dropped=1, output=1)


@every_schedule
@pytest.mark.parametrize("kind", SERVICES)
@pytest.mark.parametrize("answer", ["none", "other", "children", "rubbish", "many"])
async def test_T14_a_service_answers_what_a_task_would_return(engine: Engine, kind: str, answer: str) -> None:
    dag, log = DAG(), Log()
    answers: dict[str, Callable[[Context], Any]] = {
        "none": lambda ctx: None,
        "other": lambda ctx: ctx.create(),
        "children": lambda ctx: ctx.create_child(2),
        "rubbish": lambda ctx: 5,
        "many": lambda ctx: [ctx, ctx.create()],
    }

    async def serve(queue: asyncio.Queue[Any]) -> None:
        while True:
            ctx, future = await queue.get()
            future.set_result(answers[answer](ctx))

    def serve_thread(queue: queues.Queue[Any]) -> None:
        while True:
            ctx, future = queue.get()
            future.set_result(answers[answer](ctx))

    dag.task(serve if kind == "async" else serve_thread, kind="service", name="serve", may_drop=True)
    chain(dag, log, "end", after="serve")
    result = await engine.run(dag, [{}, {}], shutdown_grace=0.5)
    expected = {
        "none": {"dropped": 2},
        "other": {"split": 2, "output": 2},
        "children": {"split": 2, "output": 4},
        "rubbish": {"failed": 2},
        "many": {"output": 4},
    }[answer]
    assert_counts(result, **expected)


@every_schedule
@pytest.mark.parametrize("kind", SERVICES)
async def test_T14_a_services_timeout_and_limit(engine: Engine, kind: str) -> None:
    dag = DAG()
    inside, most = Counter[str](), []

    async def serve(queue: asyncio.Queue[Any]) -> None:
        while True:
            ctx, future = await queue.get()
            most.append(queue.qsize() + 1)
            if isinstance(ctx, StopContext):
                return
            if ctx["n"] != 1:
                future.set_result(ctx)

    def serve_thread(queue: queues.Queue[Any]) -> None:
        while True:
            ctx, future = queue.get()
            most.append(queue.qsize() + 1)
            if isinstance(ctx, StopContext):
                return
            if ctx["n"] != 1:
                future.set_result(ctx)

    dag.task(
        serve if kind == "async" else serve_thread,
        kind="service",
        name="serve",
        timeout=0.05,
        limiter=ConcurrencyLimit(2),
    )
    result = await engine.run(dag, [{"n": n} for n in range(5)])
    assert max(most) <= 2
    assert inside.total() == 0
    assert isinstance(result.failures[0].exception, TimeoutError)
    assert_counts(result, output=4, failed=1)


@every_schedule
async def test_T14_a_service_that_ignores_the_stop_is_cancelled(engine: Engine) -> None:
    dag, story = DAG(), []

    @dag.service
    async def serve(queue: asyncio.Queue[Any]) -> None:
        try:
            while True:
                ctx, future = await queue.get()
                future.set_result(ctx)
        finally:
            story.append("ended")

    result = await engine.run(dag, [{}, {}])
    assert story == ["ended"]
    assert_counts(result, output=2)


@every_schedule
@pytest.mark.parametrize("kind", SERVICES)
async def test_T14_a_service_that_is_never_fed_is_not_started(engine: Engine, kind: str) -> None:
    dag, story = DAG(), []

    @dag.router
    async def route(ctx: Context) -> str:
        return "a"

    chain(dag, Log(), "a", after=route)
    echo(dag, kind, story, after=route)
    assert_counts(await engine.run(dag), output=1)
    assert story == []


@every_schedule
@pytest.mark.parametrize("kind", SERVICES)
async def test_T14_a_service_beside_other_branches(engine: Engine, kind: str) -> None:
    dag, log, story = DAG(), Log(), []
    echo(dag, kind, story)
    chain(dag, log, "a", "b")
    echo(dag, kind, story, name="second", after="echo")
    chain(dag, log, "end", after=["second", "b"])
    result = await engine.run(dag, [{} for _ in range(4)])
    assert Counter(log.names()) == {"a": 4, "b": 4, "end": 4}
    assert_counts(result, output=4)


async def test_T14_a_loop_context_is_never_given_to_a_user() -> None:
    dag, seen = DAG(), []

    @dag.loop
    async def loop(ctx: Context) -> AsyncIterator[Context]:
        sent = yield ctx.create()
        seen.append(type(ctx))
        assert not isinstance(ctx, LoopContext)
        del sent

    @dag.task(after=loop)
    async def look(ctx: Context) -> Context:
        seen.append(type(ctx))
        return ctx

    assert_counts(await ONE.run(dag), split=1, output=1)
    assert set(seen) == {Context}
