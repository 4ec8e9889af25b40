"""E4 to E7: lanes, no waves, failures, the end of a run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from obsdag import DAG, Context, ContextPriority, ContextQueue, Failure, RateLimit, RunFailed
from obsdag.core.states import OUTCOMES
from obsdag.errors import DeadlineExceeded
from tests.rules.helpers import assert_counts
from tests.rules.virtual import Ends, EndTurns, Held, assert_clean, execute, make, now, passing, virtual, virtual_loop

every_number = pytest.mark.parametrize("workers", [1, 4, 64])


def numbered(dag: DAG, log: list[str], *names: str, seconds: float = 0.0, after: Any = ()) -> Any:
    """A chain of tasks that note their name and the context's id, and take a while."""
    for name in names:

        async def step(ctx: Context, name: str = name) -> Context:
            log.append(f"{name}{ctx.id}")
            await asyncio.sleep(seconds)
            return ctx

        after = dag.task(step, name=name, after=after)
    return after


def inputs(log: list[str], *names: str) -> Iterator[Context]:
    """Contexts by name, each noted when it is pulled."""
    for name in names:
        log.append(f"pull{name}")
        yield Context(name=name)


# --- E4


def test_E4_the_seeds_names_of_queue_and_lanes() -> None:
    assert [lane.name for lane in ContextPriority] == ["LIFO", "FIFO_HIGH", "FIFO_LOW"]
    assert callable(ContextQueue)


@pytest.mark.parametrize("kind", ["list", "generator"])
@virtual
async def test_E4_work_in_flight_is_finished_before_new_work_is_taken_in(kind: str) -> None:
    dag, log = DAG(), []
    numbered(dag, log, "a", "b")
    given: Any = inputs(log, "1", "2", "3") if kind == "generator" else [Context(name=n) for n in "123"]
    await execute(dag, given)
    expected = ["pull1", "a1", "b1", "pull2", "a2", "b2", "pull3", "a3", "b3"]
    assert log == [each for each in expected if kind == "generator" or not each.startswith("pull")]


@virtual
async def test_E4_async_inputs_are_pulled_when_the_lanes_are_empty() -> None:
    dag, log = DAG(), []
    numbered(dag, log, "a", "b")

    async def trickle() -> AsyncIterator[Context]:
        for context in inputs(log, "1", "2", "3"):
            yield context

    await execute(dag, trickle())
    for name in "12":  # the next input may be waited for while this one is driven, but not taken in before it
        assert log.index(f"b{name}") < log.index(f"a{int(name) + 1}")
    assert [each for each in log if each.startswith("pull")] == ["pull1", "pull2", "pull3"]


@virtual
async def test_E4_newly_entered_contexts_are_taken_first_in_first_out_after_those_that_go_on() -> None:
    dag, log = DAG(), []

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        return [*(ctx.create(name=f"{ctx.id}{letter}") for letter in "xyz"), ctx]

    numbered(dag, log, "a", "b", after=spread)
    await execute(dag, inputs(log, "1", "2"))
    first = ["pull1", "a1", "b1", "a1x", "b1x", "a1y", "b1y", "a1z", "b1z"]
    assert log == first + [each.replace("1", "2") for each in first]


@virtual
async def test_E4_a_context_woken_by_its_timer_goes_before_new_ones_last_in_first_out() -> None:
    dag, log = DAG(), []

    @dag.task(retry_times=1, retry_interval=lambda ctx: 10.0 if ctx.id == "1" else 9.0)
    async def flaky(ctx: Context) -> Context:
        log.append(f"flaky{ctx.id}")
        await asyncio.sleep(0.5 if ctx.id in "12" else 4.0)
        if ctx.id in "12" and ctx.attempt == 1:
            raise ValueError("once")
        return ctx

    await execute(dag, [Context(name=n) for n in "123456"])
    # due: 1 at 10.5, 2 at 10.0, while 5 keeps the worker from 9 to 13: the last woken is taken first
    assert log == ["flaky1", "flaky2", "flaky3", "flaky4", "flaky5", "flaky1", "flaky2", "flaky6"]


@virtual
async def test_E4_a_context_woken_by_a_limit_goes_before_new_ones() -> None:
    dag, log = DAG(), []

    @dag.router
    async def pick(ctx: Context) -> str:
        return "limited" if ctx.id in "12" else "plain"

    @dag.task(after=pick, limiter=RateLimit(1, per=5))
    async def limited(ctx: Context) -> Context:
        return ctx

    passing(dag, "plain", after=pick)
    numbered(dag, log, "slow", seconds=4, after=["limited", "plain"])
    await execute(dag, inputs(log, *"12345"))
    # 2 gets its permit at 5, while 3 keeps the worker from 4 to 8
    assert log == ["pull1", "slow1", "pull2", "pull3", "slow3", "slow2", "pull4", "slow4", "pull5", "slow5"]


@virtual
async def test_E4_a_thawed_context_goes_before_new_ones() -> None:
    dag, log = DAG(), []
    loop = asyncio.get_running_loop()

    @dag.task
    async def first(ctx: Context) -> Context:
        if ctx.id == "1":
            ctx.freeze()
            loop.call_later(6, ctx.thaw)
        return ctx

    numbered(dag, log, "slow", seconds=4, after=first)
    await execute(dag, inputs(log, *"1234"))
    assert log == ["pull1", "pull2", "slow2", "pull3", "slow3", "slow1", "pull4", "slow4"]


@virtual
async def test_E4_a_join_returns_to_the_front() -> None:
    dag, log = DAG(), []

    @dag.map
    async def parts(ctx: Context) -> AsyncIterator[dict[str, Any]]:
        for n in range(2):
            yield {"n": n}

    passing(dag, "part", after=parts)

    @dag.join(after="part")
    async def together(parent: Context, children: list[Context]) -> Context:
        log.append(f"join{parent.id}")
        return parent

    numbered(dag, log, "end", after=together)
    await execute(dag, inputs(log, "1", "2", "3"))
    assert log == [f"{step}{n}" for n in (1, 2, 3) for step in ("pull", "join", "end")]


@virtual
async def test_E4_a_loops_next_item_is_asked_for_last() -> None:
    dag, log = DAG(), []

    @dag.loop
    async def items(ctx: Context) -> AsyncIterator[Context]:
        for n in range(3):
            log.append(f"item{ctx.id}{n}")
            yield ctx.create(name=f"{ctx.id}{n}")

    @dag.task(after=items)
    async def spread(ctx: Context) -> list[Context]:
        log.append(f"spread{ctx.id}")
        return [ctx, ctx.create(name=f"{ctx.id}x")]

    numbered(dag, log, "end", after=spread)
    await execute(dag, inputs(log, "a", "b"))
    one = [each for n in range(3) for each in (f"itema{n}", f"spreada{n}", f"enda{n}", f"enda{n}x")]
    assert log == ["pulla", *one, "pullb", *(each.replace("a", "b").replace("spreb", "sprea") for each in one)]


@virtual
async def test_E4_loops_take_turns_first_in_first_out() -> None:
    dag, log = DAG(), []

    @dag.task
    async def both(ctx: Context) -> list[Context]:
        return [ctx.create(name="p"), ctx.create(name="q")]

    @dag.loop(after=both)
    async def items(ctx: Context) -> AsyncIterator[Context]:
        for n in range(3):
            log.append(f"{ctx.id}{n}")
            yield ctx.create()

    passing(dag, "end", after=items)
    await execute(dag)
    assert log == ["p0", "q0", "p1", "q1", "p2", "q2"]


# --- E5


@pytest.mark.parametrize("tasks", [2, 0])
@every_number
@virtual
async def test_E5_no_waves_what_is_ready_starts_whatever_the_other_branches_do(workers: int, tasks: int) -> None:
    dag = DAG()
    events: dict[str, asyncio.Event] = {}
    passing(dag, "top")

    @dag.task(after="top")
    async def slow(ctx: Context) -> Context:
        await events.setdefault(ctx.id, asyncio.Event()).wait()  # until the other branch is through
        return ctx

    last = passing(dag, *(f"fast{n}" for n in range(5)), after="top")

    @dag.task(after=last)
    async def release(ctx: Context) -> Context:
        events.setdefault(ctx.id, asyncio.Event()).set()
        return ctx

    passing(dag, "end", after=[slow, release])
    assert_counts(await execute(dag, [{} for _ in range(6)], workers, tasks), output=6)


@every_number
@virtual
async def test_E5_start_times_are_those_of_the_upstreams_ends(workers: int) -> None:
    dag = DAG()
    started: dict[str, float] = {}
    seconds = {"a": 1, "b": 7, "c": 2, "d": 3, "e": 1}

    async def step(ctx: Context, name: str) -> Context:
        started[name] = now()
        await asyncio.sleep(seconds[name])
        return ctx

    after = {"a": [], "b": ["a"], "c": ["a"], "d": ["c"], "e": ["b", "d"]}
    for name, above in after.items():

        async def call(ctx: Context, env: Any, name: str = name) -> Context:
            return await step(ctx, name)

        dag.task(call, name=name, after=above)
    result = await execute(dag, {}, workers, 0)
    assert started == {"a": 0, "b": 1, "c": 1, "d": 3, "e": 8}
    assert result.duration_s == 9


@virtual
async def test_E5_a_thread_does_not_hold_up_the_other_branch() -> None:
    dag = DAG()
    release = threading.Event()
    passing(dag, "top")

    @dag.task(after="top")
    def slow(ctx: Context) -> Context:
        assert release.wait(10)
        return ctx

    last = passing(dag, "x", "y", "z", after="top")

    @dag.task(after=last)
    async def free(ctx: Context) -> Context:
        release.set()
        return ctx

    assert_counts(await execute(dag, {}, 1, 2), output=1)


# --- E6

KINDS = ["async", "sync", "foreground"]


def failing(kind: str, error: Callable[[], BaseException], **settings: Any) -> DAG:
    """`fail` raises on contexts with an odd number; `end` comes after it."""
    dag = DAG()

    def act(ctx: Context) -> Context:
        if ctx["n"] % 2:
            raise error()
        return ctx

    async def act_async(ctx: Context) -> Context:
        await asyncio.sleep(1)
        return act(ctx)

    fail = dag.task(act_async if kind == "async" else act, kind=kind, name="fail", **settings)
    passing(dag, "end", after=fail)
    return dag


@pytest.mark.parametrize("kind", KINDS)
@every_number
@virtual
async def test_E6_an_exception_ends_the_context_failed_and_is_in_the_result(kind: str, workers: int) -> None:
    contexts = [Context(data={"n": n}) for n in range(6)]
    dag = failing(kind, lambda: ValueError("odd"), retry_times=2)
    result = await execute(dag, contexts, workers)
    assert_counts(result, output=3, failed=3)
    assert {output.context for output in result} == set(contexts[::2])
    assert {failure.context for failure in result.failures} == set(contexts[1::2])
    for failure in result.failures:
        assert isinstance(failure, Failure)
        assert (failure.task, failure.attempts) == ("fail", 3)
        assert isinstance(failure.exception, ValueError)
        assert failure.context.outcome == "failed"
        assert failure.context.error_info == (True, failure.exception, "fail")


@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_E6_what_is_not_retried_has_one_attempt(kind: str) -> None:
    dag = failing(kind, lambda: KeyError("k"), retry_times=5, retry_on=OSError)
    result = await execute(dag, [{"n": 1}])
    assert [failure.attempts for failure in result.failures] == [1]


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration, GeneratorExit, RuntimeError, MemoryError])
@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_E6_strange_exceptions_are_failures_too(kind: str, error: type[BaseException]) -> None:
    result = await execute(failing(kind, error), [{"n": n} for n in range(4)], 4)
    assert_counts(result, output=2, failed=2)


@every_number
@virtual
async def test_E6_a_failure_ends_descendants_cancelled(workers: int) -> None:
    dag = DAG()
    ended: list[Context] = []

    @dag.task
    async def spread(ctx: Context) -> list[Context]:
        ended.extend(children := ctx.create_child(3))
        return [ctx, *children]

    @dag.task(after=spread)
    async def fate(ctx: Context) -> Context:
        await asyncio.sleep(1)
        if ctx.parent is None:
            raise ValueError("parent")
        await asyncio.sleep(100)
        return ctx

    result = await execute(dag, {}, workers)
    assert [failure.task for failure in result.failures] == ["fate"]
    assert_counts(result, failed=1, cancelled=3)
    assert [child.outcome for child in ended] == ["cancelled"] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 64])
@virtual
async def test_E6_on_failure_raise_ends_the_run_with_an_exception_group(kind: str, workers: int) -> None:
    ends, error = Ends(), ValueError("odd")
    dag = failing(kind, lambda: error)
    dag.task(Held(ends), name="held", after="end")
    executor = make(dag, workers, on_failure="raise")
    with pytest.raises(ExceptionGroup) as caught:
        await executor.run([{"n": n} for n in ((1, 0) if workers == 1 else (0, 0, 1, 0))])
    assert_clean()
    assert isinstance(caught.value, RunFailed)
    assert error in caught.value.exceptions
    assert ends[-1] == "shutdown"
    result = caught.value.result
    assert result is not None
    assert result.counts["failed"] == 1
    assert [failure.exception for failure in result.failures] == [error]
    assert result.counts["entered"] == sum(result.counts[name] for name in OUTCOMES)
    assert executor.stats()["living"] == 0


@virtual
async def test_E6_on_failure_raise_ends_the_run_by_a_deadline_of_a_context() -> None:
    dag = DAG()

    @dag.task
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(ctx["for_s"])
        return ctx

    executor = make(dag, 4, on_failure="raise", context_deadline=5.0)
    began = asyncio.get_running_loop().time()
    with pytest.raises(RunFailed) as caught:
        await executor.run([{"for_s": seconds} for seconds in (1.0, 7.0, 100.0)])
    assert asyncio.get_running_loop().time() - began == 5.0
    assert isinstance(caught.value.exceptions[0], DeadlineExceeded)
    assert caught.value.result is not None
    assert caught.value.result.counts["output"] == 1
    assert_clean()


@virtual
async def test_E6_on_failure_raise_lets_a_retry_succeed() -> None:
    dag = DAG()

    @dag.task(retry_times=1)
    async def flaky(ctx: Context) -> Context:
        if ctx.attempt == 1:
            raise ValueError("once")
        return ctx

    assert_counts(await execute(dag, [{}, {}], on_failure="raise"), output=2)


@virtual
async def test_E6_on_failure_raise_in_a_stream() -> None:
    dag = failing("async", lambda: ValueError("odd"))

    async def read() -> None:
        async with make(dag, 2, on_failure="raise").stream([{"n": 1}, {"n": 0}, {"n": 2}]) as outputs:
            async for _ in outputs:
                pass

    with pytest.raises(RunFailed) as caught:
        await read()
    assert isinstance(caught.value.exceptions[0], ValueError)
    assert_clean()


@pytest.mark.parametrize("kind", KINDS)
@every_number
@virtual
async def test_E6_a_cancelled_error_that_nobody_asked_for_is_a_failure(kind: str, workers: int) -> None:
    result = await execute(failing(kind, asyncio.CancelledError), [{"n": n} for n in range(4)], workers)
    assert_counts(result, output=2, failed=2)
    assert all(isinstance(failure.exception, asyncio.CancelledError) for failure in result.failures)


@every_number
@virtual
async def test_E6_awaiting_a_cancelled_task_of_ones_own_is_a_failure(workers: int) -> None:
    dag = DAG()

    @dag.task
    async def helper(ctx: Context) -> Context:
        own = asyncio.create_task(asyncio.sleep(100))
        await asyncio.sleep(1)
        own.cancel()
        await own
        return ctx

    @dag.task(after=helper)
    async def end(ctx: Context) -> Context:
        return ctx

    result = await execute(dag, [{}, {}], workers)
    assert_counts(result, failed=2)


@every_number
@virtual
async def test_E6_a_task_that_cancels_itself_fails_and_the_run_goes_on(workers: int) -> None:
    dag = DAG()

    @dag.task
    async def harakiri(ctx: Context) -> Context:
        if ctx["n"] == 1:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(1)
        return ctx

    @dag.task(after=harakiri, timeout=5)
    async def later(ctx: Context) -> Context:
        await asyncio.sleep(1)  # a request for cancellation that was left behind would show here
        return ctx

    result = await execute(dag, [{"n": n} for n in range(4)], workers)
    assert_counts(result, output=3, failed=1)


@pytest.mark.parametrize("kind", [*KINDS, "stream", "foreground_stream", "map", "loop", "service"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("workers", [1, 64])
@virtual
async def test_E6_an_interrupt_from_a_task_ends_the_run(kind: str, error: type[BaseException], workers: int) -> None:
    dag, ends = DAG(), Ends()
    raised = error("from the task")

    async def act_async(ctx: Context) -> Context:
        await asyncio.sleep(1)
        raise raised

    def act(ctx: Context) -> Context:
        raise raised

    async def generate(ctx: Context) -> AsyncIterator[Context]:
        await asyncio.sleep(1)
        if raised:
            raise raised
        yield ctx

    def generate_sync(ctx: Context) -> Iterator[Context]:
        if raised:
            raise raised
        yield ctx

    async def serve(queue: asyncio.Queue[Any]) -> None:
        _, future = await queue.get()
        future.set_exception(raised)
        await queue.get()

    functions: dict[str, Any] = {"async": act_async, "stream": generate, "map": generate, "loop": generate}
    functions |= {"foreground_stream": generate_sync, "service": serve}
    dag.task(functions.get(kind, act), kind=kind, name="interrupting")
    dag.task(Held(ends), name="held")
    executor = make(dag, workers, 0)
    with pytest.raises(error) as caught:
        await executor.run([{}, {}, {}])
    assert caught.value is raised
    assert_clean()
    assert ends[-1] == "shutdown"
    stats = executor.stats()
    assert stats["entered"] == sum(stats[name] for name in OUTCOMES)
    assert stats["living"] == 0
    assert stats["output"] == 0


# --- E7


def diamond(dag: DAG) -> None:
    passing(dag, "a")
    passing(dag, "b", after="a")
    passing(dag, "c", after="a")
    passing(dag, "d", after=["b", "c"])


def waiting(dag: DAG) -> None:
    @dag.task
    async def wait(ctx: Context) -> Context:
        await asyncio.sleep(5)
        return ctx


def retrying(dag: DAG) -> None:
    @dag.task(retry_times=1, retry_interval=60, timeout=30)
    async def flaky(ctx: Context) -> Context:
        if ctx.attempt == 1:
            raise ValueError("once")
        return ctx


def failed(dag: DAG) -> None:
    @dag.task
    async def fail(ctx: Context) -> Context:
        await asyncio.sleep(1)
        raise ValueError("always")


def mapped(dag: DAG) -> None:
    @dag.map
    async def parts(ctx: Context) -> list[dict[str, Any]]:
        return [{}, {}, {}]

    passing(dag, "part", after=parts)

    @dag.join(after="part")
    async def together(parent: Context, children: list[Context]) -> Context:
        return parent


def dropping(dag: DAG) -> None:
    @dag.task(may_drop=True)
    async def drop(ctx: Context) -> Context | None:
        return None if ctx else ctx


SHAPES: dict[str, Callable[[DAG], Any]] = {
    "chain": lambda dag: passing(dag, "a", "b", "c"),
    "diamond": diamond,
    "waiting": waiting,
    "retrying": retrying,
    "failed": failed,
    "mapped": mapped,
    "dropping": dropping,
}


@pytest.mark.parametrize("tasks", [1, 0])
@pytest.mark.parametrize("workers", [1, 4, 64])
@pytest.mark.parametrize("shape", SHAPES)
@virtual
async def test_E7_the_run_returns_within_three_turns_of_the_last_outcome(shape: str, workers: int, tasks: int) -> None:
    for count in (1, 7):
        dag, ends = DAG(), EndTurns()
        SHAPES[shape](dag)
        await make(dag, workers, tasks, observers=[ends], deadline=10_000).run([{} for _ in range(count)])
        assert virtual_loop().turns - ends.turn <= 3
        assert ends.ended >= count
        assert_clean()


@virtual
async def test_E7_one_context_and_four_workers_end_within_three_turns_of_its_tasks_end() -> None:
    dag, ended = DAG(), []

    @dag.task
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(10)
        ended.append(virtual_loop().turns)
        return ctx

    await make(dag, 4).run()
    assert virtual_loop().turns - ended[0] <= 3
    assert now() == 10
    assert_clean()


@virtual
async def test_E7_a_stream_ends_within_three_turns() -> None:
    dag, ends = DAG(), EndTurns()
    passing(dag, "a", "b")
    async with make(dag, 4, observers=[ends]).stream([{} for _ in range(9)]) as outputs:
        async for _ in outputs:
            pass
        assert virtual_loop().turns - ends.turn <= 3
    assert virtual_loop().turns - ends.turn <= 4
    assert_clean()


@virtual
async def test_E7_a_run_with_threads_ends_within_three_turns_when_the_pool_is_kept() -> None:
    dag, ends = DAG(), EndTurns()
    dag.task(lambda ctx: ctx, name="work", kind="sync")
    executor = make(dag, 4, observers=[ends])
    async with executor:
        await executor.run([{} for _ in range(5)])
        assert virtual_loop().turns - ends.turn <= 3


@virtual
async def test_E7_a_service_that_knows_no_stop_marker_does_not_hold_up_the_end() -> None:
    dag = DAG()

    @dag.service
    async def gather(queue: asyncio.Queue[Any]) -> None:
        calls = []
        while True:
            calls.append(await queue.get())
            if len(calls) == 2:
                for ctx, future in calls:
                    future.set_result(ctx)
                calls.clear()

    assert_counts(await execute(dag, [{}, {}]), output=2)
    assert now() == 0


@virtual
async def test_E7_idle_workers_cost_nothing() -> None:
    dag, most = DAG(), []

    @dag.task
    async def look(ctx: Context) -> Context:
        await asyncio.sleep(1)
        most.append(len(asyncio.all_tasks()))
        return ctx

    turns = virtual_loop().turns
    await execute(dag, [{}, {}], 100_000)
    assert max(most) <= 1 + 2 + 1  # this test, the two that work, and at most one more that looks for work
    assert virtual_loop().turns - turns < 20


@virtual
async def test_E7_workers_start_on_demand() -> None:
    dag, alive = DAG(), []

    @dag.task
    async def hold(ctx: Context) -> Context:
        await asyncio.sleep(1)
        alive.append(len(asyncio.all_tasks()))
        return ctx

    async def trickle() -> AsyncIterator[dict[str, Any]]:
        for _ in range(20):
            yield {}
            await asyncio.sleep(2)

    await execute(dag, trickle(), 64)
    assert max(alive) <= 4  # this test, the input, one worker, and one that looks


# --- G7 and E7 together


@pytest.mark.parametrize("workers", [1, 4])
@virtual
async def test_E7_a_chain_of_ten_thousand_tasks_is_run(workers: int) -> None:
    dag, ends = DAG(), EndTurns()
    passing(dag, *(f"t{n}" for n in range(10_000)))
    executor = make(dag, workers, observers=[ends], debug=False)
    result = await executor.run([{}, {}])
    assert_counts(result, output=2)
    assert sum(each["executions"] for each in executor.stats()["tasks"].values()) == 20_000
    assert virtual_loop().turns - ends.turn <= 3
