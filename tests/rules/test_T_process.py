"""T11: process tasks in real runs, with real processes; the pool itself has tests of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from obsdag import DAG, Context, EncodingError, Executor, PoolError, TaskError
from tests.rules import jobs
from tests.rules.helpers import Engine, Log, assert_counts, chain, finish

few_schedules = pytest.mark.parametrize("engine", [Engine(1, 1), Engine(4, 0)], ids=str)  # processes take their time


def executor(engine: Engine, func: Any, log: Log | None = None, processes: int = 1, **settings: Any) -> Executor:
    """work -> end, `work` being `func` in a process."""
    dag = DAG()
    dag.task(func, kind="process", name="work", **settings)
    chain(dag, log if log is not None else Log(), "end", after="work")
    return engine.executor(dag, process_pool_worker_num=processes)


@few_schedules
async def test_T11_changed_and_deleted_keys_are_applied_on_success(engine: Engine) -> None:
    shared: list[int] = []
    inputs = [Context(data={"n": n, "gone": 1, "list": [], "same": shared}) for n in range(4)]
    result = await finish(executor(engine, jobs.edit), inputs)
    assert [ctx["n"] for ctx in inputs] == [1, 2, 3, 4]
    assert [ctx["list"] for ctx in inputs] == [[1], [2], [3], [4]]
    assert all(ctx["same"] is shared for ctx in inputs)
    assert not any("gone" in ctx for ctx in inputs)
    assert os.getpid() not in {ctx["pid"] for ctx in inputs}
    assert_counts(result, output=4)


@few_schedules
async def test_T11_nothing_is_applied_on_failure(engine: Engine) -> None:
    ctx = Context(data={"n": 1, "gone": 1})
    result = await finish(executor(engine, jobs.edit_and_raise, retry_times=1), ctx)
    assert dict(ctx) == {"n": 1, "gone": 1}
    (failure,) = result.failures
    assert (type(failure.exception), str(failure.exception), failure.attempts) == (ValueError, "after the change", 2)
    assert_counts(result, failed=1)


@few_schedules
async def test_T11_the_detached_context_has_id_data_and_attempt(engine: Engine) -> None:
    ctx = Context(name="known")
    result = await finish(executor(engine, jobs.say_attempt, retry_times=2), ctx)
    assert ctx["said"] == ("known", 3)
    assert_counts(result, output=1)


@few_schedules
async def test_T11_tree_lock_freeze_and_destroy_raise_there(engine: Engine) -> None:
    ctx = Context()
    result = await finish(executor(engine, jobs.do_what_is_forbidden), ctx)
    assert sorted(ctx["raised"]) == sorted(["parent", "children", "root", "lock", "freeze", "thaw", "destroy"])
    assert_counts(result, output=1)


@few_schedules
async def test_T11_contexts_that_it_makes_are_made_here(engine: Engine) -> None:
    log = Log()
    ways = ["itself", "children", "other", "both", "nothing"]
    inputs = [Context(data={"way": way}, name=way) for way in ways]
    result = await finish(executor(engine, jobs.make_others, log, may_drop=True), inputs)
    assert [ctx.outcome for ctx in inputs] == ["output", "split", "split", "output", "dropped"]
    assert sorted(child["n"] for child in inputs[1].children) == [0, 1]
    (other,) = [out for out in result if out.id == "other"]
    assert (other.parent, other["made"]) == (None, True)
    assert len(log) == 1 + 2 + 1 + 2
    assert_counts(result, output=6, split=2, dropped=1)


@few_schedules
async def test_T11_rubbish_is_a_task_error(engine: Engine) -> None:
    result = await finish(executor(engine, jobs.return_rubbish), [{}, {}])
    assert isinstance(result.failures[0].exception, TaskError)
    assert_counts(result, failed=2)


@few_schedules
async def test_T11_no_exception_class_can_break_the_pool(engine: Engine) -> None:
    ex = executor(engine, jobs.raise_unfaithful)
    result = await finish(ex, [{}, {}, {}])
    assert all("cannot be carried" in str(failure.exception) for failure in result.failures)
    assert_counts(result, failed=3)


@few_schedules
async def test_T11_data_that_cannot_be_pickled_ends_its_own_context(engine: Engine) -> None:
    inputs = [{"n": n, "gone": 1, "list": [], "odd": (lambda: None) if n == 1 else None} for n in range(3)]
    result = await finish(executor(engine, jobs.edit), inputs)
    (failure,) = result.failures
    assert isinstance(failure.exception, EncodingError)
    assert "odd" in str(failure.exception)
    assert "function" in str(failure.exception)
    assert_counts(result, output=2, failed=1)


@few_schedules
async def test_T11_results_that_cannot_be_pickled_end_their_own_context(engine: Engine) -> None:
    result = await finish(executor(engine, jobs.give_back_what_cannot_be_pickled), [{}])
    assert isinstance(result.failures[0].exception, EncodingError)
    assert "func" in str(result.failures[0].exception)
    assert_counts(result, failed=1)


@few_schedules
async def test_T11_a_dead_worker_fails_the_execution_that_killed_it(engine: Engine) -> None:
    result = await finish(executor(engine, jobs.die_once), [{"n": n} for n in range(4)])
    (failure,) = result.failures
    assert isinstance(failure.exception, PoolError)
    assert failure.context["n"] == 1
    assert_counts(result, output=3, failed=1)


async def test_T11_others_that_were_in_flight_run_again_without_an_attempt_charged(tmp_path: Path) -> None:
    # Two processes: the first execution waits until the second has started, then kills its own process.
    log = str(tmp_path / "log")
    inputs = [{"n": n, "log": log} for n in range(3)]
    result = await finish(executor(Engine(4, 1), jobs.count_attempts, processes=2), inputs)
    assert [failure.attempts for failure in result.failures] == [1]
    assert_counts(result, output=2, failed=1)


@few_schedules
async def test_T11_a_process_task_that_times_out(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "go"
    inputs = [{"file": str(file)}, {"file": str(Path(__file__))}]
    result = await finish(executor(engine, jobs.wait_for_file, timeout=1.0), inputs)
    assert isinstance(result.failures[0].exception, TimeoutError)
    assert_counts(result, output=1, failed=1)


@few_schedules
async def test_T11_a_context_that_is_destroyed_meanwhile(engine: Engine, tmp_path: Path) -> None:
    ctx = Context(data={"file": str(tmp_path / "never")})
    asyncio.get_running_loop().call_later(0.3, ctx.destroy)
    result = await finish(executor(engine, jobs.wait_for_file), [ctx, {"file": str(Path(__file__))}])
    assert_counts(result, output=1, dropped=1)


@few_schedules
async def test_T11_process_tasks_below_maps_and_joins(engine: Engine) -> None:
    dag = DAG()

    @dag.map
    async def spread(ctx: Context) -> AsyncIterator[dict[str, Any]]:
        for n in range(3):
            yield {"n": n, "gone": 0, "list": []}

    dag.task(jobs.edit, kind="process", name="work", after=spread)

    @dag.join(after="work")
    async def join(ctx: Context, children: list[Context]) -> Context:
        ctx["lists"] = [child["list"] for child in children]
        return ctx

    result = await finish(engine.executor(dag, process_pool_worker_num=1), [{}, {}])
    assert [out["lists"] for out in result] == [[[1], [2], [3]]] * 2
    assert_counts(result, output=2, merged=6)


@few_schedules
async def test_T12_process_tasks_get_the_trace_context(engine: Engine) -> None:
    result = await finish(executor(engine, jobs.trace_id), {})
    # Without telemetry there is no span to hand over; the function must find that, and not fail.
    assert result[0]["trace"] == 0
    assert_counts(result, output=1)
