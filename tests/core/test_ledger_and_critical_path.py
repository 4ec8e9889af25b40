"""Where a root's time went, and which executions decided it: both on a virtual clock, so that every figure is exact."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from obsdag import DAG, ConcurrencyLimit, Context, Executor, ExecutorConfig, Observer, RateLimit, RunResult
from obsdag.core.records import CriticalStep
from obsdag.core.states import STATES
from obsdag.testing import run_virtual


class Paths(Observer):
    """Keeps the critical path and the ledger of every root, as they are when it ends."""

    needs_slack = True

    def __init__(self) -> None:
        self.steps: dict[str, list[CriticalStep]] = {}
        self.took: dict[str, float] = {}

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        if context.parent is None:
            assert context._run is not None
            self.steps[context.id] = context._run.critical_path(context)
            self.took[context.id] = now - context._entered


def sleeper(seconds: float) -> Any:
    async def task(ctx: Context) -> Context:
        await asyncio.sleep(seconds)
        return ctx

    return task


def run(dag: DAG, inputs: Any = None, **config: Any) -> tuple[RunResult, Paths]:
    paths = Paths()
    settings = ExecutorConfig(debug=True, observers=(paths,), **config)
    return run_virtual(Executor(dag, config=settings).run(inputs)), paths


def ledger(result: RunResult, index: int = 0) -> dict[str, float]:
    shown = result[index].context.ledger  # type: ignore[union-attr]
    return {state: round(seconds, 6) for state, seconds in shown.items() if seconds > 1e-9}


def test_ledger_names_every_state_and_adds_up_to_the_time_in_the_run() -> None:
    dag = DAG()
    dag.task(sleeper(2.0), name="work")
    result, paths = run(dag, [{}, {}])
    for output in result:
        assert list(output.context.ledger) == list(STATES)
        assert sum(output.context.ledger.values()) == pytest.approx(paths.took[output.id])
    assert ledger(result) == {"running": 2.0}


def test_ledger_divides_retry_wait_limit_wait_and_running() -> None:
    dag = DAG()

    @dag.task(retry_times=1, retry_interval=3.0)
    async def flaky(ctx: Context) -> Context:
        await asyncio.sleep(1.0)
        if ctx.attempt == 1:
            raise ValueError("once")
        return ctx

    dag.task(sleeper(0.5), name="limited", after=flaky, limiter=ConcurrencyLimit(1))
    result, paths = run(dag, [{"n": 0}, {"n": 1}], context_worker_num=2)
    assert ledger(result, 0) == {"running": 2.5, "retry_wait": 3.0}
    assert ledger(result, 1) == {"running": 2.5, "retry_wait": 3.0, "limit_wait": 0.5}
    for output in result:
        assert sum(output.context.ledger.values()) == pytest.approx(paths.took[output.id])


def test_ledger_of_a_parent_is_lent_while_its_children_work_and_queued_behind_a_busy_worker() -> None:
    dag = DAG()

    @dag.map
    async def split(ctx: Context) -> Any:
        for n in range(2):
            yield {"n": n}

    dag.task(sleeper(1.0), name="work", after=split)

    @dag.join(after="work")
    async def join(parent: Context, children: list[Context]) -> Context:
        return parent

    result, paths = run(dag)
    shown = ledger(result)
    assert shown["lent"] == pytest.approx(2.0)
    assert sum(shown.values()) == pytest.approx(next(iter(paths.took.values())))


def test_ledger_of_a_frozen_context() -> None:
    dag = DAG()

    @dag.task
    async def hold(ctx: Context) -> Context:
        ctx.freeze()
        asyncio.get_running_loop().call_later(7.0, ctx.thaw)
        return ctx

    dag.task(sleeper(1.0), name="after", after=hold)
    result, _ = run(dag)
    assert ledger(result) == {"frozen": 7.0, "running": 1.0}


def test_ledger_of_a_waiting_for_a_rate() -> None:
    dag = DAG()
    dag.task(sleeper(0.0), name="call", limiter=RateLimit(1, per=10.0))
    result, _ = run(dag, [{}, {}, {}], context_worker_num=3)
    assert [ledger(result, n).get("limit_wait", 0.0) for n in range(3)] == [0.0, 10.0, 20.0]


def critical(steps: list[CriticalStep]) -> list[str]:
    return [step.task for step in steps if step.critical]


def slack(steps: list[CriticalStep]) -> dict[str, float]:
    return {step.task: round(step.slack_s, 6) for step in steps}


def test_critical_path_of_a_diamond_is_its_slow_side_and_the_other_has_slack() -> None:
    dag = DAG()
    dag.task(sleeper(1.0), name="top")
    dag.task(sleeper(2.0), name="quick", after="top")
    dag.task(sleeper(5.0), name="slow", after="top")
    dag.task(sleeper(1.0), name="bottom", after=["quick", "slow"])
    _, paths = run(dag, task_worker_num=0)
    (steps,) = paths.steps.values()
    assert critical(steps) == ["top", "slow", "bottom"]
    assert slack(steps) == {"top": 0.0, "quick": 3.0, "slow": 0.0, "bottom": 0.0}


def test_critical_path_of_a_chain_is_all_of_it_and_adds_up() -> None:
    dag = DAG()
    for n in range(4):
        dag.task(sleeper(n + 1.0), name=f"t{n}", after=[f"t{n - 1}"] if n else ())
    _, paths = run(dag)
    (steps,) = paths.steps.values()
    assert critical(steps) == ["t0", "t1", "t2", "t3"]
    assert sum(step.ended - step.started for step in steps) == pytest.approx(10.0)


def test_critical_path_holds_both_attempts_of_a_retried_task() -> None:
    dag = DAG()

    @dag.task(retry_times=1)
    async def flaky(ctx: Context) -> Context:
        await asyncio.sleep(1.0)
        if ctx.attempt == 1:
            raise ValueError("once")
        return ctx

    _, paths = run(dag)
    (steps,) = paths.steps.values()
    assert critical(steps) == ["flaky", "flaky"]


def test_critical_path_goes_through_the_child_that_came_last() -> None:
    dag = DAG()

    @dag.map
    async def split(ctx: Context) -> Any:
        for seconds in (1.0, 4.0, 2.0):
            yield {"seconds": seconds}

    @dag.task(after=split)
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(ctx["seconds"])
        return ctx

    @dag.join(after=work)
    async def join(parent: Context, children: list[Context]) -> Context:
        return parent

    _, paths = run(dag, context_worker_num=4)
    (steps,) = paths.steps.values()
    worked = {round(step.ended - step.started, 6): step for step in steps if step.task == "work"}
    assert worked[4.0].critical
    assert not worked[1.0].critical
    assert critical(steps)[-1] == "join"
    assert round(worked[2.0].slack_s, 6) == 2.0


def test_critical_path_is_known_only_to_observers_that_need_it() -> None:
    seen: list[list[CriticalStep]] = []

    class Indifferent(Observer):
        def context_finished(self, context: Context, outcome: str, now: float) -> None:
            assert context._run is not None
            seen.append(context._run.critical_path(context))

    dag = DAG()
    dag.task(sleeper(1.0), name="only")
    run_virtual(Executor(dag, config=ExecutorConfig(observers=(Indifferent(),))).run())
    assert len(seen) == 1
