"""E8 and E9: stalls, and runs that are ended early."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from obsdag import (
    DAG,
    ConcurrencyLimit,
    Context,
    DeadlineExceeded,
    Executor,
    ExecutorConfig,
    RateLimit,
    ResourcePool,
    RunResult,
    Stall,
)
from obsdag.core.states import OUTCOMES
from tests.rules.helpers import assert_counts
from tests.rules.virtual import Ends, Held, assert_clean, execute, make, now, passing, virtual, virtual_loop

every_number = pytest.mark.parametrize("workers", [1, 4, 64])


# --- E8


def freezing() -> DAG:
    """Contexts with `freeze` are frozen in front of `later`."""
    dag = DAG()

    @dag.task
    async def first(ctx: Context) -> Context:
        if ctx.get("freeze"):
            ctx.freeze()
        if ctx.get("takes"):
            await asyncio.sleep(ctx["takes"])
        return ctx

    passing(dag, "later", after=first)
    return dag


def children_at_two_joins() -> DAG:
    """With `apart`, one child goes to another join than its siblings: both joins wait for ever for all of them."""
    dag = DAG()

    @dag.map
    async def parts(ctx: Context) -> AsyncIterator[dict[str, Any]]:
        for n in range(3):
            yield {"to": "other" if ctx["apart"] and n == 1 else "together"}

    @dag.router(after=parts)
    async def pick(ctx: Context) -> str:
        return ctx["to"]

    @dag.join(after=pick)
    async def together(parent: Context, children: list[Context]) -> Context:
        parent["joined"] = len(children)
        return parent

    @dag.join(after=pick)
    async def other(parent: Context, children: list[Context]) -> Context:
        return parent

    passing(dag, "end", after=[together, other])
    return dag


@every_number
@virtual
async def test_E8_what_nothing_holds_and_is_not_done_is_stalled_at_once_and_named(workers: int) -> None:
    context = Context(data={"apart": True})
    result = await execute(children_at_two_joins(), context, workers)
    assert now() == 0
    assert_counts(result, stalled=4)
    assert {stall.context for stall in result.stalled} == {context, *context.children}
    for stall in result.stalled:
        assert isinstance(stall, Stall)
        assert stall.context.outcome == "stalled"
        assert stall.task in ("together", "other")
        assert "together" in stall.reason
        assert "other" in stall.reason
        assert stall.context.id in str(stall)
        assert stall.task in str(stall)


@every_number
@virtual
async def test_E8_the_run_goes_on_and_reports_all_stalled_contexts(workers: int) -> None:
    result = await execute(children_at_two_joins(), [{"apart": n % 3 == 0} for n in range(30)], workers)
    assert now() == 0
    assert_counts(result, output=20, merged=60, stalled=40)
    assert len(result.stalled) == 40
    assert all(output["joined"] == 3 for output in result)


@virtual
async def test_E8_a_deadlock_is_told_to_the_user_as_a_result_and_not_waited_for() -> None:
    executor = make(children_at_two_joins(), 4, context_queue_timeout=None)
    turns = virtual_loop().turns
    result = await executor.run({"apart": True})
    assert result.stalled
    assert virtual_loop().turns - turns < 40
    assert virtual_loop().jumps == 0


@every_number
@virtual
async def test_E8_frozen_contexts_are_waited_for_twenty_times_a_second(workers: int) -> None:
    result = await execute(freezing(), [{"freeze": True}, {}, {"freeze": True}], workers, 0)
    assert now() == 20
    assert_counts(result, output=1, stalled=2)
    for stall in result.stalled:
        assert (stall.context.outcome, stall.context["freeze"]) == ("stalled", True)
        assert stall.task == "later"
        assert "frozen" in stall.reason
    assert virtual_loop().jumps <= 2  # one wake-up, not one each second


@pytest.mark.parametrize(("times", "timeout", "seconds"), [(3, 0.5, 1.5), (1, 600, 600), (20, 0, 0), (0, 1, 0)])
@virtual
async def test_E8_the_wait_is_idle_times_by_queue_timeout(times: int, timeout: float, seconds: float) -> None:
    result = await execute(freezing(), {"freeze": True}, worker_idle_times=times, context_queue_timeout=timeout)
    assert now() == seconds
    assert_counts(result, stalled=1)


@every_number
@virtual
async def test_E8_only_when_nothing_else_moves(workers: int) -> None:
    inputs = [{"freeze": True}, {"takes": 100}, {"freeze": True, "takes": 7}]
    result = await execute(freezing(), inputs, workers)
    assert now() == (127 if workers == 1 else 120)
    assert_counts(result, output=1, stalled=2)


@virtual
async def test_E8_what_waits_for_a_timer_or_a_limit_moves() -> None:
    dag = freezing()

    @dag.task(retry_times=3, retry_interval=50)
    async def flaky(ctx: Context) -> Context:
        if ctx.attempt < 4 and not ctx.get("freeze"):
            raise ValueError("again")
        return ctx

    @dag.task(limiter=RateLimit(1, per=400))
    async def limited(ctx: Context) -> Context:
        return ctx

    result = await execute(dag, [{"freeze": True}, {}, {}], 4, 0)
    assert now() == 420 or now() == 820
    assert_counts(result, output=2, stalled=1)


@every_number
@virtual
async def test_E8_one_that_is_thawed_in_time_goes_on_and_the_wait_begins_anew(workers: int) -> None:
    contexts = [Context(data={"freeze": True}) for _ in range(3)]
    loop = asyncio.get_running_loop()
    loop.call_later(15, contexts[0].thaw)
    loop.call_later(30, contexts[1].thaw)
    result = await execute(freezing(), contexts, workers)
    assert now() == 50
    assert_counts(result, output=2, stalled=1)
    assert [stall.context for stall in result.stalled] == [contexts[2]]


@pytest.mark.parametrize(
    "settings", [{"context_queue_timeout": None}, {"context_queue_timeout": None, "worker_idle_times": 0}]
)
@virtual
async def test_E8_without_a_queue_timeout_they_are_waited_for_for_ever(settings: dict[str, Any]) -> None:
    context = Context(data={"freeze": True})
    asyncio.get_running_loop().call_later(30 * 24 * 3600, context.thaw)
    result = await execute(freezing(), context, 4, **settings)
    assert_counts(result, output=1)
    assert now() == 30 * 24 * 3600


@virtual
async def test_E8_a_stall_names_the_upstreams_that_are_missing() -> None:
    dag = DAG()

    @dag.task
    async def first(ctx: Context) -> Context:
        return ctx

    @dag.task(after=first)
    async def left(ctx: Context) -> Context:
        ctx.freeze()
        await asyncio.sleep(1)
        return ctx

    passing(dag, "right", after=first)
    passing(dag, "more", after=left)
    passing(dag, "end", after=["more", "right"])
    result = await execute(dag, tasks=2, context_queue_timeout=0.01)
    (stall,) = result.stalled
    assert stall.task in ("more", "right")  # that wait for nothing but the thaw
    assert stall.missing == ()
    assert result.duration_s == pytest.approx(1.2)


@virtual
async def test_E8_a_stall_in_a_stream() -> None:
    async with make(freezing(), 2).stream([{"freeze": True}, {}]) as outputs:
        assert len([output async for output in outputs]) == 1
    assert_counts(outputs.counts, output=1, stalled=1)
    assert [stall.task for stall in outputs.stalled] == ["later"]
    assert now() == 20


# --- E9: a DAG with one of everything


def everything(ends: Ends) -> DAG:
    dag = DAG("everything")

    class Hooked:
        async def startup(self, env: Any) -> None:
            ends.append("startup")
            await asyncio.sleep(0)

        async def __call__(self, ctx: Context) -> Context:
            await asyncio.sleep(0)
            return ctx

        async def shutdown(self) -> None:
            await asyncio.sleep(0)
            ends.append("shutdown")

    dag.task(Hooked(), name="hooked")

    @dag.task(
        after="hooked", retry_times=2, retry_interval=1, timeout=50, limiter=[ConcurrencyLimit(2), RateLimit(100)]
    )
    async def flaky(ctx: Context) -> Context:
        await asyncio.sleep(0.01)
        if ctx.attempt == 1:
            raise ValueError("once")
        return ctx

    @dag.task(after="hooked", limiter=ResourcePool(lambda: "item", close=lambda item: ends.append("closed"), size=1))
    async def pooled(ctx: Context, *, resource: str) -> Context:
        await asyncio.sleep(0.5)
        return ctx

    @dag.stream(after="hooked")
    async def stream(ctx: Context) -> AsyncIterator[Context]:
        ends.append("stream begins")
        try:
            while True:
                await asyncio.sleep(0)
                ctx = yield ctx
        finally:
            await asyncio.sleep(0)
            ends.append("stream ends")

    @dag.service(after=stream)
    async def service(queue: asyncio.Queue[Any]) -> None:
        ends.append("service begins")
        try:
            while True:
                ctx, future = await queue.get()
                await asyncio.sleep(0.1)
                future.set_result(ctx)
        finally:
            ends.append("service ends")

    @dag.map(after=[flaky, pooled, service])
    async def parts(ctx: Context) -> AsyncIterator[dict[str, Any]]:
        ends.append("map begins")
        try:
            for n in range(3):
                await asyncio.sleep(0)
                yield {"n": n}
        finally:
            ends.append("map ends")

    @dag.task(after=parts)
    async def part(ctx: Context) -> Context:
        await asyncio.sleep(ctx["n"])
        return ctx

    @dag.join(after=part)
    async def together(parent: Context, children: list[Context]) -> Context:
        await asyncio.sleep(0)
        return parent

    @dag.loop(after=together)
    async def loop(ctx: Context) -> AsyncIterator[Context]:
        ends.append("loop begins")
        try:
            for n in range(2):
                await asyncio.sleep(0.1)
                yield ctx.create_child(name=f"{ctx.id}.{n}") if n else ctx.create()
        finally:
            ends.append("loop ends")

    passing(dag, "end", after=loop)
    return dag


def assert_balanced(ends: Ends) -> None:
    for what in ("stream", "service", "map", "loop"):
        assert ends.count(f"{what} begins") == ends.count(f"{what} ends"), ends
    assert ends.count("startup") == ends.count("shutdown") <= 1 or (
        ends.count("shutdown") == 1 and ends.count("startup") <= 1
    )


def assert_conserved(executor: Executor) -> None:
    stats = executor.stats()
    assert stats["entered"] == sum(stats[name] for name in OUTCOMES)
    assert stats["living"] == 0 == executor.runtime.counter


@pytest.mark.parametrize("workers", [1, 4])
@virtual
async def test_E9_the_dag_of_the_next_test_runs_to_its_end(workers: int) -> None:
    ends = Ends()
    result = await execute(everything(ends), [{}, {}], workers, 0)
    assert_counts(result, output=4, split=2, merged=6)
    assert_balanced(ends)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("first", range(0, 160, 20))
def test_E9_a_run_cancelled_after_any_number_of_turns_leaves_nothing_and_conserves(first: int, workers: int) -> None:
    for turns in range(first, first + 20):
        _cancelled_after(turns, workers)


@virtual
async def _cancelled_after(turns: int, workers: int) -> None:
    ends = Ends()
    executor = make(everything(ends), workers, 0)
    run = asyncio.create_task(executor.run([Context(data={"n": n}) for n in range(2)]))
    for _ in range(turns):
        await asyncio.sleep(0)
    if run.done():
        return
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert_clean()
    assert_balanced(ends)
    assert_conserved(executor)


@pytest.mark.parametrize("workers", [1, 4])
@virtual
async def test_E9_a_run_cancelled_after_any_time_leaves_nothing_and_conserves(workers: int) -> None:
    for tenths in range(60):
        ends = Ends()
        executor = make(everything(ends), workers, 0)
        run = asyncio.create_task(executor.run([{}, {}]))
        await asyncio.sleep(tenths / 10)
        run.cancel()
        await asyncio.wait([run])
        assert_clean()
        assert_balanced(ends)
        assert_conserved(executor)


@pytest.mark.parametrize("workers", [1, 4])
@virtual
async def test_E9_a_stream_left_after_any_number_of_outputs_leaves_nothing_and_conserves(workers: int) -> None:
    for count in range(4):
        ends = Ends()
        executor = make(everything(ends), workers, 0)
        async with executor.stream([{}, {}]) as outputs:
            for _ in range(count):
                await anext(outputs)
        assert_clean()
        assert_balanced(ends)
        assert_conserved(executor)
        assert outputs.counts["entered"] == sum(outputs.counts[name] for name in OUTCOMES)
        assert outputs.counts["output"] >= count


@virtual
async def test_E9_cancelling_again_while_it_ends_leaves_nothing() -> None:
    for again in range(12):
        ends = Ends()
        executor = make(everything(ends), 4, 0)
        run = asyncio.create_task(executor.run([{}, {}]))
        await asyncio.sleep(1.5)
        run.cancel()
        for _ in range(again):
            await asyncio.sleep(0)
        run.cancel()
        await asyncio.wait([run])
        for _ in range(5):
            await asyncio.sleep(0)
        assert_clean()
        assert_conserved(executor)


# --- E9: deadlines


@every_number
@virtual
async def test_E9_a_deadline_ends_the_run(workers: int) -> None:
    dag, ends = DAG(), Ends()
    dag.task(Held(ends), name="held")
    executor = make(dag, workers, deadline=3600)
    with pytest.raises(DeadlineExceeded, match="3600") as caught:
        await executor.run([{} for _ in range(5)])
    assert now() == 3600
    assert_clean()
    assert ends == ["execution"] * min(workers, 5) + ["shutdown"]
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value.result, RunResult)
    assert_counts(caught.value.result, cancelled=min(workers, 5))
    assert_conserved(executor)


@virtual
async def test_E9_a_deadline_keeps_what_was_reached() -> None:
    dag = DAG()

    @dag.task
    async def step(ctx: Context) -> Context:
        await asyncio.sleep(10)
        if ctx["n"] == 1:
            raise ValueError("one")
        return ctx

    with pytest.raises(DeadlineExceeded) as caught:
        await make(dag, deadline=35).run({"n": n} for n in range(9))
    result = caught.value.result
    assert result is not None
    assert [output["n"] for output in result] == [0, 2]
    assert [failure.context["n"] for failure in result.failures] == [1]
    assert_counts(result, output=2, failed=1, cancelled=1)


@virtual
async def test_E9_a_deadline_in_a_stream_is_raised_to_the_reader() -> None:
    dag, ends = DAG(), Ends()
    dag.task(Held(ends), name="held")

    async def read() -> None:
        async with make(dag, 2, deadline=5).stream([{}, {}]) as outputs:
            async for _ in outputs:
                pass

    with pytest.raises(DeadlineExceeded):
        await read()
    assert now() == 5
    assert_clean()
    assert ends == ["execution", "execution", "shutdown"]


@virtual
async def test_E9_a_deadline_that_is_not_reached_leaves_no_timer() -> None:
    dag = DAG()
    passing(dag, "a")
    assert_counts(await execute(dag, deadline=5), output=1)
    assert now() == 0


# --- E9: executions that do not want to end


def stubborn(refusals: int, seconds: float, log: list[float]) -> DAG:
    dag = DAG()

    @dag.task
    async def task(ctx: Context) -> Context:
        for _ in range(refusals):
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                log.append(now())
        return ctx

    return dag


@every_number
@virtual
async def test_E9_an_execution_that_swallows_its_cancellation_is_cancelled_again(workers: int) -> None:
    log: list[float] = []
    executor = make(stubborn(3, 1000, log), workers, shutdown_grace=60)
    run = asyncio.create_task(executor.run({}))
    await asyncio.sleep(10)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert_clean()
    assert len(log) == 3
    assert log[0] == 10
    assert now() <= 70
    stats = executor.stats()
    assert_conserved(executor)
    assert stats["cancelled"] == 1


@virtual
async def test_E9_what_cleans_up_for_a_while_is_not_cancelled_again() -> None:
    dag, cleaned = DAG(), []

    @dag.task
    async def transaction(ctx: Context) -> Context:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(1.0)  # a rollback
            cleaned.append("task")
        return ctx

    async def inputs() -> AsyncIterator[dict[str, int]]:
        yield {}
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(1.1)
            cleaned.append("input")

    with pytest.raises(DeadlineExceeded):
        await make(dag, 2, deadline=10).run(inputs())
    assert cleaned == ["task", "input"]
    assert now() == pytest.approx(11.1)
    assert_clean()


@virtual
async def test_E9_one_that_swallows_it_for_ever_is_abandoned_after_the_grace_and_reported() -> None:
    dag, released = DAG(), asyncio.Event()
    tasks: list[Any] = []

    @dag.task
    async def never(ctx: Context) -> Context:
        tasks.append(asyncio.current_task())
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()
        return ctx

    executor = make(dag, 4, shutdown_grace=8, deadline=100)
    with pytest.raises(DeadlineExceeded) as caught:
        await executor.run({})
    assert now() == pytest.approx(108, abs=0.5)
    result = caught.value.result
    assert result is not None
    assert len(result.abandoned) == 1
    assert "never" in result.abandoned[0]
    assert_counts(result, cancelled=1)
    assert_conserved(executor)
    released.set()
    await asyncio.wait(tasks)


@virtual
async def test_E9_a_thread_that_does_not_return_is_waited_for_until_the_grace_and_reported() -> None:
    dag, release = DAG(), threading.Event()

    @dag.task
    def stuck(ctx: Context) -> Context:
        release.wait(20)
        return ctx

    executor = make(dag, 2, shutdown_grace=0.2, deadline=5)
    virtual_loop().patience_s = 0.1
    with pytest.raises(DeadlineExceeded) as caught:
        await executor.run([{}, {}])
    result = caught.value.result
    assert result is not None
    assert_counts(result, cancelled=2)
    assert len(result.abandoned) == 2
    assert all("stuck" in line for line in result.abandoned)
    assert_conserved(executor)
    release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("obsdag"):
            await asyncio.to_thread(thread.join, 5)
    await asyncio.sleep(0.1)


async def test_E9_a_thread_that_returns_within_the_grace_is_not_abandoned() -> None:
    # In real time: a virtual clock does not wait for threads that nobody wants any more.
    dag, started = DAG(), asyncio.Event()
    loop = asyncio.get_running_loop()

    @dag.task
    def slow(ctx: Context) -> Context:
        loop.call_soon_threadsafe(started.set)
        time.sleep(0.05)
        return ctx

    executor = make(dag, 2, shutdown_grace=30)
    run = asyncio.create_task(executor.run({}))
    await started.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert_clean()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("obsdag")]
    assert_conserved(executor)


def sleeping_process(ctx: Any) -> Any:
    time.sleep(60)
    return ctx


async def test_E9_a_process_task_is_killed_and_no_process_is_left() -> None:
    dag = DAG()
    dag.task(sleeping_process, kind="process")
    executor = make(dag, 2, process_pool_worker_num=1, shutdown_grace=0.2, deadline=1.0)
    with pytest.raises(DeadlineExceeded) as caught:
        await executor.run({})
    assert caught.value.result is not None
    assert_counts(caught.value.result, cancelled=1)
    assert_conserved(executor)
    # that no process is left is the business of the fixture around every test


# --- E9: hooks


class Hook:
    def __init__(self, name: str, ends: Ends, error: BaseException | None = None, seconds: float = 0) -> None:
        self.name, self.ends, self.error, self.seconds = name, ends, error, seconds

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook(self.name, self.ends, self.error, self.seconds)

    async def __call__(self, ctx: Context) -> Context:
        await asyncio.sleep(1)
        return ctx

    async def shutdown(self) -> None:
        await asyncio.sleep(self.seconds)
        self.ends.append(self.name)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("early", ["", "cancel", "deadline", "failure", "input", "left"])
@virtual
async def test_E9_shutdown_hooks_run_whatever_ended_the_run_and_hide_nothing(early: str) -> None:
    dag, ends = DAG(), Ends()
    dag.task(Hook("one", ends), name="one")
    dag.task(Hook("two", ends, RuntimeError("from the hook")), name="two", after="one")
    dag.task(Hook("three", ends), name="three", after="two")

    def inputs() -> Iterator[Any]:
        yield {}
        if early == "input":
            raise OSError("input")

    @dag.task(after="one")
    async def maybe(ctx: Context) -> Context:
        if early == "failure":
            raise ValueError("task")
        return ctx

    settings: dict[str, Any] = {"deadline": 1.5} if early == "deadline" else {}
    executor = make(dag, 2, 0, on_failure="raise", **settings)
    run: Any
    if early == "left":
        async with executor.stream(inputs()):
            await asyncio.sleep(1.5)
    else:
        run = asyncio.create_task(executor.run(inputs()))
        await asyncio.sleep(1.5)
        if early == "cancel":
            run.cancel()
        await asyncio.wait([run])
        expected = {
            "": None,
            "cancel": asyncio.CancelledError,
            "deadline": DeadlineExceeded,
            "failure": ExceptionGroup,
            "input": OSError,
        }[early]
        if expected is None:
            (problem,) = run.result().cleanup_errors
            assert "two" in problem[0]
            assert str(problem[1]) == "from the hook"
        elif expected is asyncio.CancelledError:
            assert run.cancelled()
        else:
            assert isinstance(run.exception(), expected)
    assert sorted(ends) == ["one", "three", "two"]
    assert_clean()
    assert_conserved(executor)


@virtual
async def test_E9_a_hook_that_hangs_is_given_the_grace() -> None:
    dag, ends = DAG(), Ends()
    dag.task(Hook("slow", ends, seconds=1e6), name="slow")
    dag.task(Hook("next", ends), name="next", after="slow")
    result = await execute(dag, shutdown_grace=7)
    assert_counts(result, output=1)
    assert now() == 9
    assert ends == ["next"]
    assert len(result.cleanup_errors) == 1


# --- E9 and the rest: two at once, one after the other


@virtual
async def test_E9_cancelling_one_run_does_not_touch_the_other_of_the_same_executor() -> None:
    dag = DAG()

    @dag.task
    async def step(ctx: Context) -> Context:
        await asyncio.sleep(10)
        return ctx

    executor = make(dag, 4)
    loop = asyncio.get_running_loop()
    one = loop.create_task(executor.run([{} for _ in range(4)]))
    two = loop.create_task(executor.run([{} for _ in range(8)]))
    await asyncio.sleep(5)
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    assert_counts(await two, output=8)
    assert now() == 20
    assert_conserved(executor)


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_E9_an_executor_runs_in_one_loop_after_the_other(kind: str) -> None:
    dag = DAG()
    ran: list[str] = []

    async def step_async(ctx: Context) -> Context:
        ran.append("step")
        return ctx

    def step(ctx: Context) -> Context:
        ran.append("step")
        return ctx

    dag.task(step if kind == "sync" else step_async, name="step", limiter=RateLimit(1000), retry_times=1)
    executor = make(dag, 2)
    for _ in range(3):
        assert_counts(asyncio.run(executor.run([{}, {}])), output=2)
    assert len(ran) == 6


def test_E9_a_run_ended_with_its_loop_leaves_the_executor_usable() -> None:
    dag, ends = DAG(), Ends()
    passing(dag, "a")
    hold = DAG()
    hold.task(Held(ends), name="held")
    executor = make(hold, 2)

    async def abandon() -> None:
        asyncio.create_task(executor.run([{}, {}]))
        await asyncio.sleep(0.01)

    asyncio.run(abandon())
    assert ends == ["execution", "execution", "shutdown"]
    assert_conserved(executor)
    with pytest.raises(DeadlineExceeded):
        asyncio.run(Executor(hold, executor.runtime, ExecutorConfig(deadline=0.01)).run())


CALLS: dict[str, Callable[[Context], Any]] = {
    "freeze": Context.freeze,
    "thaw": Context.thaw,
    "destroy": Context.destroy,
}


@pytest.mark.parametrize("call", CALLS)
@virtual
async def test_E9_calls_after_the_run_are_harmless(call: str) -> None:
    dag = DAG()
    passing(dag, "a")
    context = Context(data={"n": 1})
    result = await execute(dag, context)
    CALLS[call](context)
    await asyncio.to_thread(CALLS[call], context)
    await asyncio.sleep(1)
    assert context.outcome == "output"
    assert context["n"] == 1
    assert_counts(result, output=1)
