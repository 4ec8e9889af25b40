"""T9, T10, T12 and T13: routers, each run's own copies and hooks, what reaches threads, threads that come back late."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any, ClassVar

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from obsdag import (
    DAG,
    AsyncFunctionTask,
    ConcurrencyLimit,
    Context,
    Environment,
    SyncFunctionTask,
    TaskError,
    worker_local,
)
from tests.rules.helpers import HANG_S, ONE, Engine, Log, assert_counts, chain, every_schedule, finish, settle

# --- T9


def routed(log: Log, choice: Any, kind: str = "router") -> DAG:
    """route -> a -> a2, b, c; end below a2 and b. `choice` is what the router returns, or a function of the context."""
    dag = DAG()

    def route(ctx: Context) -> Any:
        return choice(ctx, dag) if callable(choice) else choice

    async def route_async(ctx: Context) -> Any:
        await asyncio.sleep(0)
        return route(ctx)

    dag.task(route_async if kind == "async" else route, kind="router" if kind == "async" else kind, name="route")
    chain(dag, log, "a", "a2", after="route")
    chain(dag, log, "b", after="route")
    chain(dag, log, "c", after="route")
    chain(dag, log, "end", after=["a2", "b"])
    return dag


@every_schedule
@pytest.mark.parametrize("kind", ["async", "router", "foreground_router"])
@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("a", ["a", "a2", "end"]),
        (["a"], ["a", "a2", "end"]),
        (["b", "c"], ["b", "c", "end"]),
        (["a", "b", "c"], ["a", "a2", "b", "c", "end"]),
        (["b", "b"], ["b", "end"]),
        ("c", ["c"]),
    ],
    ids=str,
)
async def test_T9_a_router_returns_task_ids_to_take(
    engine: Engine, kind: str, choice: Any, expected: list[str]
) -> None:
    log = Log()
    result = await engine.run(routed(log, choice, kind), [{}, {}])
    assert sorted(log.names()) == sorted(expected * 2)
    assert [sorted(out.completed_tasks) for out in result] == [sorted(["route", *expected])] * 2
    assert_counts(result, output=2)


@every_schedule
@pytest.mark.parametrize("form", ["task", "list"])
async def test_T9_or_tasks(engine: Engine, form: str) -> None:
    log = Log()
    dag = routed(log, lambda ctx, dag: dag.tasks["b"] if form == "task" else [dag.tasks["b"]])
    result = await engine.run(dag)
    assert log.names() == ["b", "end"]
    assert_counts(result, output=1)


@every_schedule
@pytest.mark.parametrize("kind", ["async", "router", "foreground_router"])
@pytest.mark.parametrize("nothing", [None, []], ids=repr)
async def test_T9_choosing_nothing_drops_the_context(engine: Engine, kind: str, nothing: Any) -> None:
    log = Log()
    dag = routed(log, lambda ctx, dag: nothing, kind)
    chain(dag, log, "beside")
    result = await engine.run(dag, [{}, {}])
    assert not {"a", "b", "c", "end"} & set(log.names())
    assert_counts(result, dropped=2)


@every_schedule
@pytest.mark.parametrize("kind", ["async", "router", "foreground_router"])
@pytest.mark.parametrize(
    "wrong", ["nobody", "end", "route", "", 5, [5], [None], ["a", "nobody"], {"a": 1}, True], ids=repr
)
async def test_T9_a_router_that_returns_rubbish_fails_its_context(engine: Engine, kind: str, wrong: Any) -> None:
    log = Log()
    result = await engine.run(routed(log, wrong, kind), [{}, {}])
    if wrong == {"a": 1} and result.counts["output"]:
        assert_counts(result, output=2)  # an iterable of task ids, if one likes
        return
    assert log == []
    assert_counts(result, failed=2)
    assert isinstance(result.failures[0].exception, TaskError)
    assert "route" in str(result.failures[0].exception)


@every_schedule
@pytest.mark.parametrize("kind", ["async", "router", "foreground_router"])
@pytest.mark.parametrize("data", [{}, {"a": 1}], ids=repr)
async def test_T9_a_router_that_returns_its_context_fails_it(engine: Engine, kind: str, data: dict[str, int]) -> None:
    log = Log()
    result = await engine.run(routed(log, lambda ctx, dag: ctx, kind), [data])
    assert log == []
    assert_counts(result, failed=1)
    assert isinstance(result.failures[0].exception, TaskError)


@every_schedule
async def test_T9_a_task_of_another_dag_is_rubbish(engine: Engine) -> None:
    log, other = Log(), DAG()
    chain(other, log, "z")
    result = await engine.run(routed(log, other.tasks["z"]), [{}])
    assert_counts(result, failed=1)


@every_schedule
async def test_T9_what_is_below_a_taken_task_as_well_is_not_skipped(engine: Engine) -> None:
    log = Log()
    result = await engine.run(routed(log, "b"))
    assert log.names() == ["b", "end"]
    assert {"a", "a2", "c"} & set(result[0].completed_tasks) == set()
    assert_counts(result, output=1)


@every_schedule
async def test_T9_a_router_that_raises_is_retried_and_fails(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.router(retry_times=2)
    async def route(ctx: Context) -> str:
        if ctx.attempt < ctx["need"]:
            raise ValueError
        return "a"

    chain(dag, log, "a", after=route)
    result = await engine.run(dag, [{"need": 3}, {"need": 4}])
    assert log.names() == ["a"]
    assert_counts(result, output=1, failed=1)


@every_schedule
async def test_T9_a_router_may_wait_for_other_branches(engine: Engine) -> None:
    dag, log = DAG(), Log()
    chain(dag, log, "x", "y")

    @dag.router(after="y")
    async def route(ctx: Context) -> str:
        return "a"

    chain(dag, log, "a", after=[route, "x"])
    chain(dag, log, "b", after=[route])
    chain(dag, log, "end", after=["a", "b", "x"])
    result = await engine.run(dag)
    assert log.names() == ["x", "y", "a", "end"]
    assert_counts(result, output=1)


@every_schedule
async def test_T9_a_skipped_router_skips_all_below_it(engine: Engine) -> None:
    dag, log = DAG(), Log()

    @dag.router
    async def first(ctx: Context) -> str:
        return "a"

    chain(dag, log, "a", after=first)

    @dag.router(after=first)
    async def second(ctx: Context) -> str:
        log.append(("second", ctx))
        return "b"

    chain(dag, log, "b", "b2", after=second)
    chain(dag, log, "end", after=["a", "b2"])
    result = await engine.run(dag)
    assert log.names() == ["a", "end"]
    assert_counts(result, output=1)


# --- T10


class Hooked(AsyncFunctionTask):
    """Counts its hooks on the definition's shared list, its executions on its own attribute."""

    def __init__(self, story: list[Any], name: str = "hooked", fail: str = "", asynchronous: bool = True) -> None:
        super().__init__(self.work, name=name)
        self.story = story
        self.fail = fail
        self.count = 0

    async def startup(self, env: Environment) -> None:
        self.story.append(("startup", id(self), type(env).__name__))
        await asyncio.sleep(0)
        if self.fail == "startup":
            raise OSError("no startup")

    async def work(self, ctx: Context) -> Context:
        self.count += 1
        ctx["count"] = self.count
        self.story.append(("work", id(self)))
        if self.fail == "work":
            raise ValueError("no work")
        await settle(2)
        return ctx

    async def shutdown(self) -> None:
        self.story.append(("shutdown", id(self), self.count))
        await asyncio.sleep(0)
        if self.fail == "shutdown":
            raise OSError("no shutdown")


class HookedSync(SyncFunctionTask):
    """The same with plain hooks and a plain function."""

    def __init__(self, story: list[Any], name: str = "hooked") -> None:
        super().__init__(self.work, name=name)
        self.story = story
        self.count = 0

    def startup(self, env: Environment) -> None:
        self.story.append(("startup", id(self), type(env).__name__))

    def work(self, ctx: Context) -> Context:
        self.count += 1
        self.story.append(("work", id(self)))
        return ctx

    def shutdown(self) -> None:
        self.story.append(("shutdown", id(self), self.count))


@every_schedule
@pytest.mark.parametrize("kind", [Hooked, HookedSync])
async def test_T10_startup_comes_first_and_shutdown_last(engine: Engine, kind: Any) -> None:
    dag, story = DAG(), []
    dag.add_task(kind(story))
    result = await engine.run(dag, [{} for _ in range(5)])
    assert [step[0] for step in story] == ["startup", *["work"] * 5, "shutdown"]
    assert len({step[1] for step in story}) == 1
    assert story[0][2] == "Environment"
    assert_counts(result, output=5)


@every_schedule
@pytest.mark.parametrize("kind", [Hooked, HookedSync])
async def test_T10_each_run_uses_its_own_copy(engine: Engine, kind: Any) -> None:
    dag, story = DAG(), []
    task = kind(story)
    dag.add_task(task)
    executor = engine.executor(dag)
    for _ in range(3):
        assert_counts(await finish(executor, [{}, {}]), output=2)
    assert [step[2] for step in story if step[0] == "shutdown"] == [2, 2, 2]
    assert task.count == 0


@every_schedule
async def test_T10_one_dag_runs_in_two_executors_at_once(engine: Engine) -> None:
    dag, story = DAG(), []
    dag.add_task(Hooked(story))

    @dag.stream(after="hooked")
    async def number(ctx: Context) -> AsyncIterator[Context]:
        n = 0
        while True:
            n += 1
            ctx["number"] = n
            ctx = yield ctx

    first, second = engine.executor(dag), engine.executor(dag)
    results = await asyncio.gather(
        *(finish(each, [{} for _ in range(4)]) for each in (first, second, first)),
    )
    for result in results:
        assert sorted(out["number"] for out in result) == [1, 2, 3, 4]
        assert sorted(out["count"] for out in result) == [1, 2, 3, 4]
        assert result.counts["output"] == 4
    assert sum(step[0] == "shutdown" for step in story) == 3


@every_schedule
async def test_T10_no_startup_for_a_task_that_is_not_executed(engine: Engine) -> None:
    dag, story = DAG(), []

    @dag.router
    async def route(ctx: Context) -> str:
        return "a"

    chain(dag, Log(), "a", after=route)
    dag.add_task(Hooked(story), route)
    result = await engine.run(dag)
    assert "work" not in [step[0] for step in story]
    assert Counter(step[0] for step in story)["startup"] == Counter(step[0] for step in story)["shutdown"]
    assert_counts(result, output=1)


@every_schedule
async def test_T10_a_startup_that_raises_fails_the_contexts_that_need_it(engine: Engine) -> None:
    dag, story, log = DAG(), [], Log()
    dag.add_task(Hooked(story, fail="startup"))
    chain(dag, log, "end", after="hooked")
    result = await engine.run(dag, [{} for _ in range(4)])
    assert log == []
    assert "work" not in [step[0] for step in story]
    assert_counts(result, failed=4)
    error = result.failures[0].exception
    assert "no startup" in str(error) or "no startup" in str(error.__cause__)


@every_schedule
async def test_T10_a_shutdown_that_raises_is_reported_and_hides_nothing(engine: Engine) -> None:
    dag, story = DAG(), []
    dag.add_task(Hooked(story, "one", fail="shutdown"))
    dag.add_task(Hooked(story, "two", fail="shutdown"), "one")
    dag.add_task(Hooked(story, "three"), "two")
    result = await engine.run(dag, [{}, {}])
    assert [str(error) for _, error in result.cleanup_errors] == ["no shutdown"] * 2
    assert sum(step[0] == "shutdown" for step in story) == 3
    assert_counts(result, output=2)


@every_schedule
async def test_T10_shutdown_runs_whatever_ended_the_run(engine: Engine) -> None:
    for how in ("failed", "cancelled", "deadline", "raise", "input"):
        dag, story = DAG(), []
        dag.add_task(Hooked(story, fail="work" if how in ("failed", "raise") else ""))

        @dag.task(after="hooked")
        async def hang(ctx: Context) -> Context:
            await asyncio.Event().wait()
            return ctx

        def inputs(how: str = how) -> Iterator[dict[str, Any]]:
            if how == "input":
                raise OSError("no input")
            yield {}

        settings: dict[str, Any] = {"deadline": {"deadline": 0.02}, "raise": {"on_failure": "raise"}}.get(how, {})
        running = asyncio.ensure_future(engine.executor(dag, **settings).run(inputs()))
        if how == "cancelled":
            await settle(50)
            running.cancel()
        async with asyncio.timeout(HANG_S):
            await asyncio.wait([running])
        if how != "failed":
            assert running.cancelled() or running.exception() is not None
        steps = [step[0] for step in story]
        assert steps.count("startup") == steps.count("shutdown")
        if how != "input":
            assert steps[-1] == "shutdown", how


@every_schedule
async def test_T10_shutdown_tasks_around_objects(engine: Engine) -> None:
    class Worker:
        made: ClassVar[list[Worker]] = []
        ended: ClassVar[list[int]] = []

        def __init__(self) -> None:
            self.seen = 0

        def startup(self, env: Environment) -> None:
            Worker.made.append(self)

        async def __call__(self, ctx: Context) -> Context:
            self.seen += 1
            return ctx

        async def shutdown(self) -> None:
            Worker.ended.append(self.seen)

    dag, original = DAG(), Worker()
    dag.task(original, name="work")
    executor = engine.executor(dag)
    for _ in range(2):
        assert_counts(await finish(executor, [{}, {}, {}]), output=3)
    assert Worker.ended == [3, 3]
    assert original.seen == 0
    assert len({id(each) for each in Worker.made}) == 2


# --- T12

_variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")


@every_schedule
@pytest.mark.parametrize("kind", ["async", "sync", "foreground"])
async def test_T12_the_callers_contextvars_reach_every_task(engine: Engine, kind: str) -> None:
    dag = DAG()
    seen: list[str] = []

    def look(ctx: Context) -> Context:
        seen.append(_variable.get())
        _variable.set("leaked")
        return ctx

    async def look_async(ctx: Context) -> Context:
        return look(ctx)

    dag.task(look_async if kind == "async" else look, kind=kind, name="look")
    token = _variable.set("caller")
    try:
        result = await engine.run(dag, [{} for _ in range(4)])
    finally:
        _variable.reset(token)
    assert seen == ["caller"] * 4
    assert_counts(result, output=4)


@every_schedule
async def test_T12_baggage_and_spans_made_in_threads(engine: Engine) -> None:
    from opentelemetry import baggage
    from opentelemetry import context as otel

    dag = DAG()
    seen: list[object] = []

    @dag.task
    def look(ctx: Context) -> Context:
        seen.append(baggage.get_baggage("k"))
        return ctx

    token = otel.attach(baggage.set_baggage("k", "v"))
    try:
        result = await engine.run(dag, [{}, {}])
    finally:
        otel.detach(token)
    assert seen == ["v", "v"]
    assert_counts(result, output=2)


async def test_T12_a_span_of_the_caller_is_not_current_in_a_visit() -> None:
    # E17: a fresh copy of the caller's contextvars, without its span.
    dag = DAG()
    tracer = TracerProvider().get_tracer("test")
    seen: list[bool] = []

    @dag.task
    def look(ctx: Context) -> Context:
        seen.append(trace.get_current_span().get_span_context().is_valid)
        return ctx

    with tracer.start_as_current_span("caller"):
        result = await ONE.run(dag)
    assert seen == [False]
    assert_counts(result, output=1)


@every_schedule
@pytest.mark.parametrize("kind", ["async", "sync", "foreground"])
async def test_T12_worker_local_reaches_tasks_in_threads(engine: Engine, kind: str) -> None:
    dag = DAG()
    numbers: list[int] = []

    def count(ctx: Context) -> Context:
        worker_local.n = getattr(worker_local, "n", 0) + 1
        return ctx

    def look(ctx: Context) -> Context:
        numbers.append(worker_local.n)
        assert "n" in worker_local
        return ctx

    async def count_async(ctx: Context) -> Context:
        return count(ctx)

    async def look_async(ctx: Context) -> Context:
        return look(ctx)

    dag.task(count_async if kind == "async" else count, kind=kind, name="count")
    dag.task(look_async if kind == "async" else look, kind=kind, name="look", after="count")
    result = await engine.run(dag, [{} for _ in range(6)])
    if engine.workers == 1:
        assert sorted(numbers) == [1, 2, 3, 4, 5, 6]
    assert_counts(result, output=6)


@every_schedule
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_T12_the_log_context_reaches_tasks_in_threads(engine: Engine, kind: str) -> None:
    import structlog

    dag = DAG()
    seen: list[dict[str, Any]] = []

    def look(ctx: Context) -> Context:
        seen.append(structlog.contextvars.get_contextvars())
        logging.getLogger("user").debug("here")
        return ctx

    async def look_async(ctx: Context) -> Context:
        return look(ctx)

    dag.task(look_async if kind == "async" else look, kind=kind, name="look")
    with structlog.contextvars.bound_contextvars(request="r1"):
        result = await engine.run(dag, [{}, {}])
    assert [each["request"] for each in seen] == ["r1", "r1"]
    assert_counts(result, output=2)


# --- T13


class Stuck:
    """A plain function that stays in its thread until it is let go."""

    def __init__(self) -> None:
        self.inside = threading.Semaphore(0)
        self.go = threading.Event()
        self.story: list[str] = []
        self.lock = threading.Lock()
        self.at_once = 0
        self.most = 0

    def stay(self, ctx: Context) -> Context:
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            self.story.append(f"in {ctx.attempt}")
        self.inside.release()
        self.go.wait(HANG_S)
        ctx["late"] = True
        with self.lock:
            self.at_once -= 1
            self.story.append(f"out {ctx.attempt}")
        return ctx


@every_schedule
async def test_T13_a_sync_execution_that_timed_out_is_abandoned_and_its_result_discarded(engine: Engine) -> None:
    dag, log, stuck = DAG(), Log(), Stuck()
    dag.task(stuck.stay, name="stay", timeout=0.02)
    chain(dag, log, "end", after="stay")
    loop = asyncio.get_running_loop()
    loop.call_later(0.1, stuck.go.set)
    result = await engine.run(dag)
    assert log == []
    assert_counts(result, failed=1)
    assert isinstance(result.failures[0].exception, TimeoutError)
    stuck.go.set()


@every_schedule
async def test_T13_a_retry_starts_only_when_it_has_really_returned(engine: Engine) -> None:
    dag, log = DAG(), Log()
    go = threading.Event()
    story: list[str] = []

    def stay(ctx: Context) -> Context:
        attempt = ctx.attempt
        story.append(f"in {attempt}")
        if attempt == 1:
            go.wait(HANG_S)
        story.append(f"out {attempt}")
        return ctx

    dag.task(stay, name="stay", timeout=0.3, retry_times=1)  # enough for the second attempt on a loaded machine
    chain(dag, log, "end", after="stay")
    asyncio.get_running_loop().call_later(0.6, go.set)
    result = await engine.run(dag)
    assert story == ["in 1", "out 1", "in 2", "out 2"]
    assert len(log) == 1
    assert_counts(result, output=1)


@every_schedule
@pytest.mark.parametrize("limit", ["limiter", "parallel_num"])
async def test_T13_its_permits_come_back_only_when_it_has_really_returned(engine: Engine, limit: str) -> None:
    dag, stuck = DAG(), Stuck()
    settings: dict[str, Any] = {"limiter": ConcurrencyLimit(1)} if limit == "limiter" else {"parallel_num": 1}
    dag.task(stuck.stay, name="stay", timeout=0.02, **settings)
    asyncio.get_running_loop().call_later(0.3, stuck.go.set)
    result = await engine.run(dag, [{}, {}, {}])
    assert stuck.most == 1
    assert result.counts["failed"] >= 1
    assert result.counts["failed"] + result.counts["output"] == 3


@every_schedule
async def test_T13_a_cancelled_sync_execution_is_abandoned(engine: Engine) -> None:
    dag, log, stuck = DAG(), Log(), Stuck()
    dag.task(stuck.stay, name="stay")
    chain(dag, log, "end", after="stay")
    ctx, loop = Context(), asyncio.get_running_loop()

    def let_go() -> None:
        stuck.inside.acquire(timeout=HANG_S)
        ctx.destroy()
        loop.call_soon_threadsafe(loop.call_later, 0.02, stuck.go.set)

    helper = threading.Thread(target=let_go)
    helper.start()
    result = await engine.run(dag, ctx)
    helper.join()
    assert log == []
    assert ctx.outcome == "dropped"
    assert_counts(result, dropped=1)
    stuck.go.set()


@every_schedule
async def test_T13_a_pool_with_a_stuck_thread_goes_on(engine: Engine) -> None:
    dag, log, stuck = DAG(), Log(), Stuck()

    def work(ctx: Context) -> Context:
        return stuck.stay(ctx) if ctx["n"] == 0 else ctx

    dag.task(work, name="work", timeout=0.1)
    chain(dag, log, "end", after="work")

    @dag.task(after="end")
    async def release(ctx: Context) -> Context:
        if len(log) == 3:
            stuck.go.set()
        return ctx

    # One thread only, and the first context takes it: the pool replaces a thread that was given up.
    result = await engine.run(dag, [{"n": n} for n in range(4)], thread_pool_worker_num=1)
    assert len(log) >= 3
    assert result.counts["output"] + result.counts["failed"] == 4
    stuck.go.set()


@pytest.mark.leaves("threads", "a thread that never returns by itself is what is tested; it ends with the test")
async def test_T13_one_that_never_returns_is_reported() -> None:
    dag, stuck = DAG(), Stuck()
    dag.task(stuck.stay, name="stay", timeout=0.01)
    result = await ONE.run(dag, shutdown_grace=0.05)
    assert_counts(result, failed=1)
    assert result.abandoned
    assert "stay" in " ".join(result.abandoned)
    stuck.go.set()


async def test_T13_pool_threads_are_daemons_of_the_engines_own() -> None:
    dag = DAG()
    threads: list[threading.Thread] = []

    @dag.task
    def look(ctx: Context) -> Context:
        threads.append(threading.current_thread())
        return ctx

    assert_counts(await ONE.run(dag, [{}, {}]), output=2)
    assert all(thread.daemon and thread.name.startswith("obsdag") for thread in threads)
