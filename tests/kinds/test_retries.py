"""Retries, timeouts and deadlines (T6, T13, E6), in virtual time where no thread or process is needed."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from obsdag import (
    DAG,
    ConfigError,
    Context,
    DeadlineExceeded,
    Execution,
    ExecutionTimeout,
    Executor,
    ExecutorConfig,
    Exponential,
    Fixed,
    Observer,
    RunResult,
)
from obsdag.testing import run_virtual
from tests.rules.helpers import ONE, Engine, assert_counts, every_worker_num


def now() -> float:
    return asyncio.get_running_loop().time()


def attempts(failing: int | Callable[[int], BaseException | None], **settings: Any) -> tuple[RunResult, list[float]]:
    """Runs one task that fails so often (or as told for each attempt): the result, and when attempts started (s)."""
    dag = DAG()
    started: list[float] = []

    @dag.task(**settings)
    async def call(ctx: Context) -> Context:
        started.append(now())
        assert ctx.attempt == len(started)
        error = failing(ctx.attempt) if callable(failing) else OSError() if ctx.attempt <= failing else None
        if error is not None:
            raise error
        return ctx

    async def main() -> RunResult:
        return await Executor(dag, config=ExecutorConfig(debug=True, seed=7)).run()

    return run_virtual(main()), started


# --- strategies


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (0, [0, 0, 0, 0]),
        (2.5, [0, 2.5, 5, 7.5]),
        (Fixed(2.5), [0, 2.5, 5, 7.5]),
        (lambda ctx: 10 * ctx.attempt, [0, 10, 30, 60]),
        (Exponential(1, factor=3, jitter=False), [0, 1, 4, 13]),
        (Exponential(1, factor=3, cap=4, jitter=False), [0, 1, 4, 8]),
    ],
    ids=["none", "seconds", "fixed", "callable", "exponential", "capped"],
)
def test_T6_the_time_between_attempts(interval: Any, expected: list[float]) -> None:
    result, started = attempts(3, retry_times=3, retry_interval=interval)
    assert started == pytest.approx(expected)
    assert_counts(result, output=1)


def test_T6_full_jitter_is_uniform_below_the_exponential_ceiling() -> None:
    strategy = Exponential(base=1.0, factor=2.0, cap=10.0)
    ctx, random = Context(), Random(1)
    for attempt, ceiling in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (50, 10), (5000, 10)]:
        delays = [strategy.delay(attempt, ctx, OSError(), random) for _ in range(2000)]
        assert 0 <= min(delays) < 0.01 * ceiling
        assert 0.99 * ceiling < max(delays) <= ceiling
        assert sum(delays) / len(delays) == pytest.approx(ceiling / 2, rel=0.05)


def test_T6_jitter_comes_from_the_runs_seed() -> None:
    settings = {"retry_times": 5, "retry_interval": Exponential(base=1.0)}
    (_, first), (_, second) = attempts(5, **settings), attempts(5, **settings)
    assert first == second
    gaps = [after - before for before, after in itertools.pairwise(first)]
    assert all(0 < gap <= 2**n for n, gap in enumerate(gaps))
    assert len({round(gap / 2**n, 6) for n, gap in enumerate(gaps)}) == 5


def test_T6_attempts_are_counted_and_then_it_has_failed() -> None:
    result, started = attempts(10, retry_times=2)
    assert len(started) == 3
    assert_counts(result, failed=1)
    assert result.failures[0].attempts == 3


@pytest.mark.parametrize(
    ("retry_on", "expected"),
    [
        (None, 4),
        (OSError, 4),
        (ConnectionError, 2),
        ((ConnectionError, TimeoutError), 3),
        (lambda error: "again" in str(error), 2),
    ],
    ids=["any", "type", "subtype", "types", "predicate"],
)
def test_T6_retry_on_decides_which_errors_are_worth_it(retry_on: Any, expected: int) -> None:
    errors = [ConnectionError("again"), TimeoutError("no"), OSError("never"), OSError("never")]
    result, started = attempts(lambda attempt: errors[attempt - 1], retry_times=3, retry_on=retry_on)
    assert len(started) == expected
    assert result.failures[0].exception is errors[expected - 1]


def test_T6_retry_for_caps_the_time_since_the_first_attempt() -> None:
    result, started = attempts(100, retry_times=100, retry_interval=3.0, retry_for=10.0)
    assert started == pytest.approx([0, 3, 6, 9])
    assert_counts(result, failed=1)


@pytest.mark.parametrize(
    "broken", [lambda ctx: -1, lambda ctx: "soon", lambda ctx: 1 / 0], ids=["negative", "text", "raises"]
)
def test_T6_a_broken_interval_fails_the_context_with_its_own_error(broken: Callable[[Context], Any]) -> None:
    result, started = attempts(1, retry_times=3, retry_interval=broken)
    assert len(started) == 1
    error = result.failures[0].exception
    assert isinstance(error, ConfigError | ZeroDivisionError)
    assert isinstance(error.__context__, OSError)


def test_T6_a_waiting_retry_holds_no_worker() -> None:
    dag = DAG()
    order: list[tuple[int, int]] = []

    @dag.task(retry_times=1, retry_interval=100)
    async def call(ctx: Context) -> Context:
        order.append((ctx["n"], ctx.attempt))
        if ctx["n"] == 0 and ctx.attempt == 1:
            raise OSError
        return ctx

    async def main() -> RunResult:
        return await ONE.executor(dag).run([{"n": n} for n in range(3)])

    result = run_virtual(main())
    assert order == [(0, 1), (1, 1), (2, 1), (0, 2)]
    assert_counts(result, output=3)


# --- timeouts


def test_T6_timeout_holds_for_each_attempt_of_a_coroutine() -> None:
    dag = DAG()
    started: list[float] = []

    @dag.task(timeout=5, retry_times=2, retry_interval=1)
    async def call(ctx: Context) -> Context:
        started.append(now())
        if ctx.attempt < 3:
            await asyncio.sleep(100)
        await asyncio.sleep(4.9)
        return ctx

    async def main() -> tuple[RunResult, float]:
        return await ONE.executor(dag).run(), now()

    result, took = run_virtual(main())
    assert started == pytest.approx([0, 6, 12])
    assert took == pytest.approx(16.9)
    assert_counts(result, output=1)


@pytest.mark.parametrize("kind", ["async", "service", "stream", "map", "join", "router"])
def test_T6_timeout_names_the_task_in_every_kind(kind: str) -> None:
    dag = DAG()

    async def never(*_: Any) -> Any:
        await asyncio.sleep(1000)
        return []

    async def never_yields(ctx: Context) -> Any:
        await asyncio.sleep(1000)
        yield ctx

    after: Any = dag.map(lambda ctx: [{}], name="spread") if kind == "join" else ()
    function = never_yields if kind == "stream" else never
    dag.task(function, kind=kind, name="it", timeout=0.5, after=after)
    if kind == "router":
        dag.task(never, name="below", after="it")

    async def main() -> tuple[RunResult, float]:
        return await Executor(dag, config=ExecutorConfig(debug=True, shutdown_grace=0.1)).run(), now()

    result, took = run_virtual(main())
    assert result.counts["failed"] == 1
    assert isinstance(result.failures[0].exception, ExecutionTimeout)
    assert str(result.failures[0].exception) == "task 'it' took longer than its timeout of 0.5 s"
    assert took < 2


async def test_T13_a_thread_that_timed_out_is_retried_only_when_it_has_returned() -> None:
    dag = DAG()
    gate, steps = threading.Event(), list[str]()

    class Watch(Observer):
        def execution_finished(self, execution: Execution, *_: Any) -> None:
            steps.append("timed out" if execution.attempt == 1 else "answered")
            if execution.attempt == 1:
                asyncio.get_running_loop().call_later(0.02, gate.set)  # time enough to start the next one too early

    @dag.task(timeout=0.1, retry_times=1)
    def call(ctx: Context) -> Context:
        attempt = ctx.attempt
        steps.append(f"start {attempt}")
        if attempt == 1:
            gate.wait(4)
            ctx["late"] = True
        steps.append(f"end {attempt}")
        return ctx

    result = await ONE.run(dag, observers=(Watch(),))
    assert steps == ["start 1", "timed out", "end 1", "start 2", "end 2", "answered"]
    assert_counts(result, output=1)
    assert not result.abandoned


# --- deadlines


@every_worker_num
def test_E6_a_root_contexts_deadline_ends_it_and_all_that_is_made_of_it(engine: Engine) -> None:
    dag = DAG()

    @dag.map
    async def spread(ctx: Context) -> Any:
        for n in range(3):
            yield {"wait_s": ctx["wait_s"], "n": n}

    @dag.task(after=spread, parallel_num=0)
    async def wait(ctx: Context) -> Context:
        await asyncio.sleep(ctx["wait_s"])
        return ctx

    @dag.join(after=wait)
    async def gather(ctx: Context, children: list[Context]) -> Context:
        return ctx

    async def main() -> tuple[RunResult, float]:
        executor = engine.executor(dag, context_deadline=10.0)
        return await executor.run([{"wait_s": 0.01}, {"wait_s": 1000.0}, {"wait_s": 0.02}]), now()

    result, took = run_virtual(main())
    assert took == pytest.approx(10.0, abs=0.1)
    (failure,) = result.failures
    assert failure.context["wait_s"] == 1000
    assert isinstance(failure.exception, DeadlineExceeded)
    made = min(engine.workers, 3)  # with one worker the first child holds the only one, and no other is asked for
    assert_counts(result, output=2, merged=6, failed=1, cancelled=made)


def test_E6_a_deadline_also_ends_what_waits_for_a_retry() -> None:
    dag = DAG()

    @dag.task(retry_times=1000, retry_interval=7.0)
    async def call(ctx: Context) -> Context:
        raise OSError

    async def main() -> tuple[RunResult, float]:
        return await ONE.executor(dag, context_deadline=10.0).run(), now()

    result, took = run_virtual(main())
    assert took == pytest.approx(10.0)
    assert isinstance(result.failures[0].exception, DeadlineExceeded)
    assert "call" in str(result.failures[0])
