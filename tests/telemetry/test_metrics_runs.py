"""Metrics of real runs: they agree with the result, with each other, and with what the engine computes another way."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from obsdag.config import ExecutorConfig
from obsdag.context import Context, RateLimitContext
from obsdag.core.observer import Facts, Observer
from obsdag.core.state import RunState
from obsdag.core.states import GC_REASONS, OUTCOMES, STATES
from obsdag.executor import Executor, RunResult
from obsdag.graph import DAG
from obsdag.limits import ConcurrencyLimit
from obsdag.runtime import Runtime
from obsdag.telemetry.tally import MetricsObserver
from tests.telemetry.corerun import EPOCH, CoreRun
from tests.telemetry.scrapes import Reports, Scrape


@pytest.fixture(autouse=True)
def _no_observer_is_detached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    failures: list[object] = []
    monkeypatch.setattr(Facts, "_detach", lambda *arguments: failures.append(arguments))
    yield
    assert not failures


def executor(dag: DAG, reports: Reports, runtime: Runtime | None = None, **settings: Any) -> Executor:
    return Executor(dag, runtime=runtime, config=ExecutorConfig(telemetry=reports, **settings))


def a_dag_of_everything() -> DAG:
    """Ten inputs, `n` 0 to 9: retried, failed, dropped, replaced, spread over children, handed back, made anew."""
    dag = DAG("everything")

    made = {
        3: lambda ctx: None,
        4: lambda ctx: ctx.create(copy_data=True),
        5: lambda ctx: ctx.create_child(3),
    }

    @dag.task(retry_times=1, retry_on=ValueError)
    async def begin(ctx: Context) -> Any:
        n = ctx["n"]
        if n == 0 or (n == 1 and ctx.attempt == 1):
            raise ValueError(n)
        if n == 2:
            raise KeyError(n)
        return made[n](ctx) if n in made else ctx

    @dag.task(after=[begin])
    async def middle(ctx: Context) -> Any:
        n = ctx.get("n")
        if n == 6:
            return [ctx, ctx.create(copy_data=False)]
        if n == 7:
            ctx.destroy()
        return ctx

    @dag.task(after=[begin])
    def aside(ctx: Context) -> Context:
        return ctx

    @dag.task(after=[middle, aside])
    async def end(ctx: Context) -> Context:
        return ctx

    return dag


def assert_consistent(seen: Scrape, *results: RunResult) -> None:
    """Every identity that holds between the metrics themselves, and with the results of all runs they saw."""
    counts: Counter[str] = sum((Counter(result.counts) for result in results), Counter())
    finished = seen.by("outcome", "obsdag_contexts_finished_total")
    assert finished == {outcome: counts[outcome] for outcome in OUTCOMES if counts[outcome]}
    assert seen.total("obsdag_contexts_entered_total") == counts["entered"]
    assert seen.total("obsdag_contexts") == counts["entered"] - sum(finished.values()) == 0
    assert seen.total("obsdag_unaccounted_contexts") == 0
    destroyed = seen.by("reason", "obsdag_gc_destroyed_total")
    for reasons, outcome in ((GC_REASONS[:3], "dropped"), (GC_REASONS[3:5], "split")):
        assert sum(destroyed.get(reason, 0) for reason in reasons) == finished.get(outcome, 0)
    assert seen.total("obsdag_task_failures_total") == finished.get("failed", 0)
    assert seen.total("obsdag_task_executions_total") == seen.total("obsdag_task_seconds_count")
    assert seen.total("obsdag_task_retries_total") <= seen.total("obsdag_task_executions_total", outcome="error")
    assert seen.total("obsdag_ledger_seconds_total") == pytest.approx(seen.total("obsdag_root_seconds_sum"))
    assert seen.total("obsdag_critical_seconds_total") <= seen.total("obsdag_task_seconds_sum") + 1e-9
    assert seen.total("obsdag_collect_errors_total") == 0
    for gauge in ("obsdag_task_running", "obsdag_queue_contexts", "obsdag_runs_active", "obsdag_capacity"):
        assert seen.total(gauge) == 0


def inputs(count: int = 10) -> list[dict[str, int]]:
    return [{"n": n} for n in range(count)]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("width", [1, 0])
@pytest.mark.parametrize("gc_on", [True, False])
def test_all_identities_hold_for_a_run_of_everything(workers: int, width: int, gc_on: bool) -> None:
    reports = Reports()
    made = executor(
        a_dag_of_everything(), reports, context_worker_num=workers, task_worker_num=width, enable_context_gc=gc_on
    )

    result = made.run_sync(inputs())

    seen = reports.scrape()
    assert_consistent(seen, result)
    assert seen.by("error_type", "obsdag_task_failures_total", task="begin") == {"ValueError": 1, "KeyError": 1}
    assert seen.value("obsdag_task_retries_total", task="begin") == 2
    assert seen.by("outcome", "obsdag_task_executions_total", task="begin") == {"success": 8, "error": 4}
    assert seen.by("outcome", "obsdag_runs_total") == {"failed": 1}
    assert seen.total("obsdag_root_seconds_count", outcome="failed") == 2
    assert seen.by("kind", "obsdag_contexts_entered_total") == {"input": 10, "made": 2, "child": 3}


def test_counters_go_on_over_runs_of_several_executors_and_dags_of_one_name() -> None:
    reports = Reports()
    results, last = [], reports.scrape().counters()
    for number in range(8):  # more than tallies wait, so that some are added to the base
        dag = DAG("shop")
        for name in ("first", f"own{number}"):
            dag.task(name=name)(_pass_on)
        made = executor(dag, reports)
        results += [made.run_sync(inputs(3)), made.run_sync(inputs(2))]
        seen = reports.scrape()
        now = seen.counters()
        assert all(now[key] >= value for key, value in last.items())
        last = now

    assert_consistent(seen, *results)
    assert seen.value("obsdag_task_executions_total", task="first", outcome="success") == 40
    assert seen.value("obsdag_task_executions_total", task="own0", outcome="success") == 5
    assert seen.by("outcome", "obsdag_runs_total") == {"ok": 16}


async def _pass_on(ctx: Context) -> Context:
    return ctx


async def test_living_executors_of_one_engine_and_dag_are_summed() -> None:
    reports, gate, reached = Reports(), asyncio.Event(), asyncio.Semaphore(0)
    dag = DAG("shop")

    @dag.task()
    async def wait(ctx: Context) -> Context:
        reached.release()
        await gate.wait()
        return ctx

    one = executor(dag, reports, context_worker_num=3)
    two = executor(dag, reports, context_worker_num=5)
    runs = [asyncio.ensure_future(one.run(inputs(2))), asyncio.ensure_future(two.run(inputs(7)))]
    for _ in range(7):
        await reached.acquire()

    seen = reports.scrape()

    assert seen.by("resource", "obsdag_capacity") == {"workers": 8, "live_contexts": 20_000}
    assert seen.by("state", "obsdag_workers") == {"busy": 7, "idle": 1}
    assert seen.by("state", "obsdag_contexts")["running"] == 7
    assert seen.value("obsdag_task_running", task="wait") == 7
    assert seen.value("obsdag_runs_active") == 2
    assert seen.total("obsdag_unaccounted_contexts") == 0
    gate.set()
    results = await asyncio.gather(*runs)
    assert_consistent(reports.scrape(), *results)


async def test_a_run_that_is_thrown_away_keeps_its_numbers_and_not_its_memory() -> None:
    reports = Reports()
    run = CoreRun("load", "store")
    run.observe(reports.metrics.observer(run.state))
    run.drive()
    run.enter()
    before = reports.scrape()
    plan = run.state.plan
    del run
    gc.collect()

    after = reports.scrape()

    assert before.value("obsdag_runs_active") == 1
    assert after.value("obsdag_runs_active") == 0
    assert before.counters() == after.counters()
    assert after.total("obsdag_contexts") == 0
    assert not [each for each in gc.get_referrers(plan) if isinstance(each, MetricsObserver)]


class CriticalSums(Observer):
    """The same as the metric, from the engine's own analysis of each root."""

    needs_records = True

    def __init__(self) -> None:
        self.run: RunState | None = None
        self.sums: Counter[str] = Counter()

    def run_started(self, run: RunState, now: float) -> None:
        self.run = run

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        if context.parent is None and self.run is not None:
            for step in self.run.critical_path(context):
                if step.critical:
                    self.sums[step.task] += step.ended - step.started  # type: ignore[assignment]


@pytest.mark.parametrize("width", [1, 0])
def test_critical_seconds_are_those_of_the_critical_paths(width: int) -> None:
    reports, critical = Reports(), CriticalSums()
    reports.others.append(critical)
    dag = DAG("paths")

    @dag.task(retry_times=2)
    async def begin(ctx: Context) -> Any:
        await asyncio.sleep(0.001)
        if ctx["n"] == 1 and ctx.attempt < 3:
            raise ValueError
        return ctx.create_child(2) if ctx["n"] == 2 else ctx

    for name, seconds in (("quick", 0), ("slow", 0.005)):

        async def branch(ctx: Context, seconds: float = seconds) -> Context:
            await asyncio.sleep(seconds)
            return ctx

        dag.task(name=name, after=[begin])(branch)
    dag.task(name="end", after=["quick", "slow"])(_pass_on)

    executor(dag, reports, task_worker_num=width).run_sync(inputs(3))

    seen = reports.scrape().by("task", "obsdag_critical_seconds_total")
    assert seen == pytest.approx(dict(critical.sums))
    assert seen["slow"] > seen.get("quick", 0)


# --- limits, joins, loops


def a_limited_dag(limit: ConcurrencyLimit, started: asyncio.Event, gate: asyncio.Event) -> DAG:
    dag = DAG("limited")

    @dag.task(limiter=limit)
    async def store(ctx: Context) -> Context:
        started.set()
        await gate.wait()
        return ctx

    dag.task(name="alone", parallel_num=1, after=[store])(_pass_on)
    return dag


async def test_limits_appear_by_name_with_who_waits_and_how_long() -> None:
    reports, started, gate = Reports(), asyncio.Event(), asyncio.Event()
    made = executor(a_limited_dag(ConcurrencyLimit(1, name="database"), started, gate), reports, context_worker_num=4)
    run = asyncio.ensure_future(made.run(inputs(3)))
    await started.wait()
    await _turns(20)

    seen = reports.scrape()

    assert seen.by("limiter", "obsdag_limit_waiting") == {"database": 2}
    assert seen.value("obsdag_limit_waiting", limiter="parallel:alone") == 0
    assert seen.by("limiter", "obsdag_limit_deferrals_total") == {"database": 2}
    assert seen.by("state", "obsdag_contexts") == {"running": 1, "limit_wait": 2}
    gate.set()
    result = await run
    seen = reports.scrape()
    assert_consistent(seen, result)
    assert seen.value("obsdag_limit_wait_seconds_count", limiter="database") == 2
    assert seen.value("obsdag_limit_waiting", limiter="database") == 0


async def test_who_waits_for_a_limit_that_runs_share_is_counted_once() -> None:
    reports, runtime, started, gate = Reports(), Runtime(), asyncio.Event(), asyncio.Event()
    shared = ConcurrencyLimit(1, name="database")
    executors = [
        executor(a_limited_dag(shared, started, gate), reports, runtime, context_worker_num=4) for _ in range(2)
    ]
    runs = [asyncio.ensure_future(each.run(inputs(2))) for each in executors]
    await started.wait()
    await _turns(20)

    seen = reports.scrape()

    assert seen.value("obsdag_limit_waiting", limiter="database") == 3
    for run in runs:
        run.cancel()
    await asyncio.gather(*runs, return_exceptions=True)
    assert reports.scrape().value("obsdag_limit_waiting", limiter="database") == 0


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_rate_limit_context_is_a_wait_under_the_tasks_name() -> None:
    reports, dag, asked = Reports(), DAG("own"), []

    @dag.task()
    async def ask(ctx: Context) -> Context:
        asked.append(1)
        return ctx if len(asked) > 1 else RateLimitContext(ctx, 0.001)

    result = executor(dag, reports).run_sync(inputs(1))

    seen = reports.scrape()
    assert_consistent(seen, result)
    assert seen.value("obsdag_limit_deferrals_total", limiter="ask") == 1


def test_maps_joins_and_loops_have_their_own_series_and_other_tasks_have_none() -> None:
    reports, dag = Reports(), DAG("spread")

    @dag.map()
    async def pages(ctx: Context) -> Any:
        for number in range(4):
            yield ctx.create_child(name=f"{ctx.id}/{number}")

    dag.task(name="fetch", after=[pages])(_pass_on)

    @dag.join(after=["fetch"])
    async def gather(ctx: Context, children: list[Context]) -> Context:
        return ctx

    result = executor(dag, reports, context_worker_num=2).run_sync(inputs(3))

    seen = reports.scrape()
    assert_consistent(seen, result)
    assert seen.by("task", "obsdag_loop_items_total") == {"pages": 12}
    assert seen.by("task", "obsdag_join_wait_seconds_count") == {"gather": 3}
    assert {s.labels["task"] for s in seen.samples if s.name == "obsdag_joins_pending"} == {"gather"}
    assert {s.labels["task"] for s in seen.samples if s.name == "obsdag_loop_items_total"} == {"pages"}
    assert seen.by("kind", "obsdag_contexts_entered_total") == {"input": 3, "child": 12}


def test_a_stalled_run_is_a_deadlock() -> None:
    reports, dag = Reports(), DAG("stuck")

    @dag.task()
    async def freeze(ctx: Context) -> Context:
        ctx.freeze()
        return ctx

    dag.task(name="after", after=[freeze])(_pass_on)

    made = executor(dag, reports, worker_idle_times=1, context_queue_timeout=0.01)
    result = made.run_sync(inputs(2))

    seen = reports.scrape()
    assert_consistent(seen, result)
    assert seen.value("obsdag_deadlocks_total") == 1
    assert seen.by("outcome", "obsdag_contexts_finished_total") == {"stalled": 2}
    assert seen.by("outcome", "obsdag_runs_total") == {"deadlocked": 1}


# --- threads


async def test_a_pool_that_two_runs_share_is_counted_once() -> None:
    reports, gate, reached = Reports(), threading.Event(), threading.Semaphore(0)
    dag = DAG("threads")

    @dag.task()
    def block(ctx: Context) -> Context:
        reached.release()
        assert gate.wait(30)
        return ctx

    made = executor(dag, reports, context_worker_num=2, thread_pool_worker_num=2)
    async with made:
        runs = [asyncio.ensure_future(made.run(inputs(2))) for _ in range(2)]
        for _ in range(2):
            await asyncio.to_thread(reached.acquire, timeout=30)
        seen = reports.scrape()
        gate.set()
        await asyncio.gather(*runs)

    assert seen.value("obsdag_capacity", resource="threads") == 2
    assert seen.value("obsdag_pool_workers", pool="thread") == 2
    assert seen.value("obsdag_pool_queued", pool="thread") == 2
    assert seen.value("obsdag_threads_abandoned", pool="thread") == 0
    assert seen.value("obsdag_pool_workers", pool="process") == 0


def test_scrapes_while_contexts_move_always_balance() -> None:
    reports, dag = Reports(), a_dag_of_everything()
    stop, problems = threading.Event(), []
    last: dict[Any, float] = {}

    def work() -> None:
        made = executor(dag, reports, context_worker_num=3)
        while not stop.is_set():
            made.run_sync(inputs(10) * 30)

    worker = threading.Thread(target=work)
    worker.start()
    for _ in range(100):
        seen = reports.scrape("text")
        entered, finished = seen.total("obsdag_contexts_entered_total"), seen.total("obsdag_contexts_finished_total")
        if seen.total("obsdag_unaccounted_contexts") or entered - finished != seen.total("obsdag_contexts"):
            problems.append((entered, finished, seen.by("state", "obsdag_contexts")))
        now = seen.counters()
        problems += [(key, value, now[key]) for key, value in last.items() if now[key] < value]
        last = now
    stop.set()
    worker.join()

    assert not problems
    assert reports.scrape().total("obsdag_collect_errors_total") == 0


def test_a_scrape_in_the_middle_of_a_transition_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = Reports()
    run = CoreRun()
    run.observe(reports.metrics.observer(run.state))
    run.drive()
    run.state.entered[0] += 1  # the run's thread is interrupted here ...

    def go_on(seconds: float) -> None:  # ... and goes on when the scrape lets it
        run.state.living += 1
        run.state.state_counts[STATES.index("queued")] += 1
        monkeypatch.undo()

    monkeypatch.setattr("obsdag.telemetry.gauges.time", SimpleNamespace(sleep=go_on))

    seen = reports.scrape()

    assert seen.value("obsdag_unaccounted_contexts") == 0
    assert seen.by("state", "obsdag_contexts") == {"queued": 1}
    assert seen.value("obsdag_contexts_entered_total", kind="input") == 2


def test_a_difference_that_stays_is_shown() -> None:
    reports = Reports()
    run = CoreRun()
    run.observe(reports.metrics.observer(run.state))
    run.drive()
    run.state.entered[0] += 2

    assert reports.scrape().value("obsdag_unaccounted_contexts") == 2


# --- visits, time, and what only a shell tells


def test_busy_seconds_include_visits_that_go_on_and_never_go_back() -> None:
    reports = Reports()
    run = CoreRun(context_worker_num=4)
    run.observe(reports.metrics.observer(run.state))
    context = run.enter()
    execution = run.begin(context)
    run.now += 2.0
    assert reports.scrape().value("obsdag_worker_busy_seconds_total") == 2.0
    run.now -= 1.0  # as if the visit had ended in the middle of the scrape
    assert reports.scrape().value("obsdag_worker_busy_seconds_total") == 2.0
    run.now += 1.0
    run.succeed(execution, took_s=0.5)
    run.succeed(run.go_on(context), took_s=0.5)
    run.state.leave(context, 3, 3.0, run.now)

    seen = reports.scrape()
    assert seen.value("obsdag_worker_busy_seconds_total") == 3.0
    assert seen.value("obsdag_ledger_seconds_total", state="running") == 3.0
    assert seen.value("obsdag_root_seconds_sum", outcome="output") == 3.0
    assert seen.value("obsdag_queue_wait_seconds_count", lane="new") == 1


def test_states_are_those_of_the_core_at_every_moment() -> None:
    reports = Reports()
    run = CoreRun()
    run.observe(reports.metrics.observer(run.state))
    contexts = [run.enter() for _ in range(3)]
    execution = run.begin(contexts[0])
    run.fail(execution, ValueError(), retry_in_s=10.0)
    run.leave(contexts[0])
    contexts[1].freeze()
    run.state.freeze(contexts[1], run.now)

    seen = reports.scrape()

    assert seen.by("state", "obsdag_contexts") == {
        state: count for state, count in zip(STATES, run.state.state_counts, strict=True) if count
    }
    assert seen.value("obsdag_retry_timers") == 1
    assert seen.by("lane", "obsdag_queue_contexts") == {
        lane: count
        for lane, count in zip(("continuing", "new", "loop"), run.state.queue_lengths(), strict=True)
        if count
    }
    assert seen.value("obsdag_oldest_context_timestamp_seconds") == EPOCH


def test_facts_of_pools_services_and_serving_are_counted() -> None:
    reports = Reports()
    run = CoreRun()
    run.observe(reports.metrics.observer(run.state))
    context, task = run.enter(), run.state.plan.tasks[1]
    for fact, *arguments in (
        ("pool_rebuilt", "process", "killed"),
        ("task_restarted", task, "stream", None),
        ("loop_lagged", 0.2),
        ("phase_changed", "starting", 0.0),
        ("phase_changed", "accepting", 0.0),
        ("submit_rejected", "queue_full", 0.0),
        ("submit_rejected", "invalid", 0.0),
        ("ticket_done", context, "output", 1.5, 2.0),
        ("result_expired", context, 3.0),
        ("tasks_bypassed", context, 4, 0.0),
    ):
        run.tell(fact, *arguments)

    seen = reports.scrape()

    assert seen.by("pool", "obsdag_pool_broken_total") == {"process": 1}
    assert seen.by("kind", "obsdag_restarts_total", task="load") == {"stream": 1}
    assert seen.value("obsdag_event_loop_lag_seconds_sum") == 0.2
    assert seen.by("phase", "obsdag_phase") == {"accepting": 1}
    assert seen.by("reason", "obsdag_submit_rejected_total") == {"queue_full": 1, "invalid": 1}
    assert seen.value("obsdag_submit_seconds_sum", outcome="output") == 1.5
    assert seen.value("obsdag_results_expired_total") == 1
    assert seen.value("obsdag_bypassed_tasks_total") == 4
    run.end()
    assert reports.scrape().by("phase", "obsdag_phase") == {"stopped": 1}


def test_accepted_submissions_are_pending_until_they_enter_or_end_without() -> None:
    reports = Reports()
    run = CoreRun()
    run.observe(reports.metrics.observer(run.state))
    waiting = [Context() for _ in range(4)]
    for context in waiting:
        run.tell("submitted", context, run.now)
    run.state.accept(waiting[0], run.now)
    run.tell("ticket_done", waiting[1], "cancelled", 1.0, run.now)

    assert reports.scrape().value("obsdag_pending_contexts") == 2
    run.end("cancelled")
    assert reports.scrape().value("obsdag_pending_contexts") == 0
