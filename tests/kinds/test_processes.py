"""Process tasks under fire (T11, T13): a killed worker in the middle of 200 executions, and one that hangs."""

from __future__ import annotations

import pytest

from obsdag import DAG, ExecutionTimeout, Executor, ExecutorConfig, PoolError, RunResult
from tests.kinds import jobs
from tests.rules.helpers import assert_counts


async def _run(dag: DAG, **key: set[int]) -> RunResult:
    ((name, told),) = key.items()
    config = ExecutorConfig(context_worker_num=8, process_pool_worker_num=2, debug=True)
    return await Executor(dag, config=config).run([{"n": n, name: n in told} for n in range(200)])


async def test_T11_a_killed_worker_in_the_middle_of_200_executions_loses_nothing() -> None:
    dag = DAG()
    dag.task(jobs.die_once, kind="process", retry_times=1)
    result = await _run(dag, die={60, 61, 140})
    assert sorted(out["n"] for out in result) == list(range(200))
    # Who killed its worker was charged an attempt; who merely was in flight with it was not.
    assert {out["n"] for out in result if out["done"] == 2} == {60, 61, 140}
    assert_counts(result, output=200)


async def test_T11_a_killed_worker_fails_only_the_context_that_killed_it() -> None:
    dag = DAG()
    dag.task(jobs.die_once, kind="process")
    result = await _run(dag, die={100})
    assert sorted(out["n"] for out in result) == [n for n in range(200) if n != 100]
    assert_counts(result, output=199, failed=1)
    (failure,) = result.failures
    assert failure.context["n"] == 100
    assert isinstance(failure.exception, PoolError)
    assert "die_once" in str(failure.exception)


@pytest.mark.parametrize("retry_times", [0, 1])
async def test_T13_a_process_that_takes_too_long_is_ended_and_the_others_go_on(retry_times: int) -> None:
    dag = DAG()
    dag.task(jobs.hang_if_told, kind="process", timeout=0.3, retry_times=retry_times)
    result = await _run(dag, hang={5, 150})
    if retry_times:
        assert {out["n"] for out in result if out["attempt"] == 2} >= {5, 150}
        assert_counts(result, output=200)
    else:
        assert {failure.context["n"] for failure in result.failures} == {5, 150}
        assert all(isinstance(failure.exception, ExecutionTimeout) for failure in result.failures)
        assert_counts(result, output=198, failed=2)
    assert not result.abandoned
