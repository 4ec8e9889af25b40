"""Single tasks on a cluster from a local executor: the rules of process tasks (T11) hold for them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from obsdag import (
    DAG,
    ConcurrencyLimit,
    ConfigError,
    Context,
    DeadlineExceeded,
    EncodingError,
    Executor,
    ExecutorConfig,
    GraphError,
    PoolError,
    RemoteError,
    ServeExecutor,
    Telemetry,
    Tracing,
)
from obsdag.errors import ExecutionTimeout
from obsdag.testing import CollectedSpans
from tests.shards import dags, heavy

pytest.importorskip("ray", reason="needs Ray: pip install 'obsdag[ray]'")
from obsdag.ray import RayCluster, RayExecutor

ROOT = Path(__file__).parent.parent.parent
CONFIG = ExecutorConfig(context_worker_num=8, task_worker_num=0, shutdown_grace=2.0, ray=RayCluster())


def on_cluster(test: Callable[..., Any]) -> Callable[..., Any]:
    marks = [
        pytest.mark.slow,
        pytest.mark.leaves("processes", "the cluster's nodes stay for the tests of this folder"),
        pytest.mark.leaves(
            "files", "the connection to Ray opens sockets to its processes as it needs them, and keeps them"
        ),
    ]
    for mark in marks:
        test = mark(test)
    return test


def one(function: Any, **settings: Any) -> DAG:
    dag = DAG("one")
    dag.task(function, runner="ray", name="far", **settings)
    return dag


async def run(dag: DAG, inputs: Any, **settings: Any) -> Any:
    return await Executor(dag, config=CONFIG.replace(**settings)).run(inputs)


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def until_written(file: Path) -> int:
    while not (text := read(file)):
        await asyncio.sleep(0.01)
    return int(text)


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(20):
        while lives(pid):
            await asyncio.sleep(0.01)


@on_cluster
async def test_T11_changed_and_deleted_keys_come_back(nodes: Any) -> None:
    dag = one(heavy.double, resources={"num_cpus": 1, "shard": 0.5})

    result = await run(dag, [{"x": number, "seen": [], "gone": 1} for number in range(6)])

    assert sorted(output["x"] for output in result) == [0, 2, 4, 6, 8, 10]
    assert all(output["seen"] == ["there"] for output in result)
    assert not any("gone" in output for output in result)
    assert os.getpid() not in {output["pid"] for output in result}


@on_cluster
async def test_T11_with_an_error_nothing_is_applied_and_made_contexts_become_real(nodes: Any) -> None:
    given = Context(None, {"x": 7}, "given")

    failed = await run(one(heavy.grow), [given])
    children = await run(one(heavy.split), {})

    assert str(failed.failures[0].exception) == "bad 7"
    assert given.to_dict() == {"x": 7}
    assert sorted(output["part"] for output in children) == [0, 1]


@on_cluster
async def test_T6_retries_limits_and_functions_that_are_copied(nodes: Any) -> None:
    limit = ConcurrencyLimit(1)

    def local(context: Any) -> Any:
        context["there"] = os.getpid()
        return context

    again = await run(one(heavy.second_time, retry_times=1, limiter=limit), [{}, {}])
    copied = await run(one(local), [{}])

    assert [output["attempt"] for output in again] == [2, 2]
    assert copied[0]["there"] != os.getpid()


@on_cluster
async def test_T11_what_cannot_be_carried_fails_its_own_context_only(nodes: Any) -> None:
    there = await run(one(heavy.second_time, retry_times=1), [{"x": 1, "lock": threading.Lock()}, {"x": 2}])
    back = await run(one(heavy.odd_back), [{"x": 0}, {"x": 1}])
    odd = await run(one(heavy.raise_two), [{}])

    assert isinstance(there.failures[0].exception, EncodingError)
    assert "'lock'" in str(there.failures[0].exception)
    assert isinstance(back.failures[0].exception, EncodingError)
    assert len(there) == len(back) == 1
    assert isinstance(odd.failures[0].exception, RemoteError)
    assert "one and two" in str(odd.failures[0].exception)


@on_cluster
async def test_T11_a_worker_that_dies_fails_the_execution_that_killed_it(nodes: Any) -> None:
    for_good = await run(one(heavy.kill_itself), [{"x": number} for number in range(4)])
    once = await run(one(heavy.kill_itself, retry_times=1), [{"x": 1, "deaths": 1}])

    assert sorted(output["x"] for output in for_good) == [0, 2, 3]
    assert isinstance(for_good.failures[0].exception, PoolError)
    assert for_good.failures[0].attempts == 1
    assert len(once) == 1


@on_cluster
async def test_T6_a_timeout_ends_the_process_that_ran(nodes: Any, tmp_path: Path) -> None:
    file = tmp_path / "pid"

    result = await run(one(heavy.stay, timeout=1.0), {"file": str(file)})

    assert isinstance(result.failures[0].exception, ExecutionTimeout)
    await until_gone(int(file.read_text()))


@on_cluster
async def test_E9_a_cancelled_submission_and_the_end_of_a_run_end_what_runs(nodes: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    async with ServeExecutor(one(heavy.stay), config=CONFIG) as executor:
        ticket = await executor.submit({"file": str(first)})
        pid = await until_written(first)
        ticket.cancel()
        await until_gone(pid)
        assert (await ticket.results()) == []

    with pytest.raises(DeadlineExceeded):
        await run(one(heavy.stay), {"file": str(second)}, deadline=4.0)
    if second.exists():
        await until_gone(int(second.read_text()))


@on_cluster
async def test_what_waits_for_a_place_waits_for_the_pool_and_can_be_cancelled(nodes: Any) -> None:
    async with ServeExecutor(one(heavy.double, resources={"nobody_has_it": 1}), config=CONFIG) as executor:
        ticket = await executor.submit({"x": 1, "seen": [], "gone": 1})
        context = ticket.context
        while context.ledger.get("pool_wait", 0.0) < 0.2:
            await asyncio.sleep(0.01)
        ticket.cancel()
        assert await ticket.results() == []


@on_cluster
async def test_T12_its_span_is_part_of_the_trace(nodes: Any) -> None:
    spans = CollectedSpans()
    tracing = Tracing(processors=(spans,), sample=1.0)
    telemetry = Telemetry("far", CollectorRegistry(), tracing, logs=False)

    await run(one(heavy.double), {"x": 1, "seen": [], "gone": 1}, telemetry=telemetry)
    await telemetry.close()

    by_name = {span.name: span for span in spans.spans}
    execution, dispatch = by_name["execute far"], by_name["dispatch far"]
    assert execution.attributes is not None
    assert execution.attributes["obsdag.executor"] == "remote"
    assert dispatch.parent is not None
    assert dispatch.parent.span_id == execution.context.span_id


@on_cluster
async def test_on_shards_such_tasks_run_on_the_cluster_of_the_shards(nodes: Any) -> None:
    place = {"resources": {"shard": 1}, "num_cpus": 0}

    result = await RayExecutor(dags.far, shards=1, shard_options=place).run([{"x": 1, "seen": [], "gone": 1}])

    assert result[0]["x"] == 2
    assert result[0]["pid"] != result[0]["shard_pid"]


@pytest.mark.slow
def test_a_program_without_a_cluster_starts_one_for_its_task(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    here = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

    done = subprocess.run(
        [sys.executable, str(program)],
        env={**here, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[1, 4, 9] False"


PROGRAM = """
import ray

from obsdag import DAG, Executor, ExecutorConfig
from obsdag.ray import RayCluster

dag = DAG("squares")


@dag.task(runner="ray", resources={"num_cpus": 1})
def square(ctx):
    ctx["square"] = ctx["n"] ** 2
    return ctx


if __name__ == "__main__":
    executor = Executor(dag, config=ExecutorConfig(context_worker_num=3, ray=RayCluster(cpus=2)))
    result = executor.run_sync([{"n": n} for n in (1, 2, 3)])
    print(sorted(output["square"] for output in result), ray.is_initialized())
"""


# --- how the connection ends


class Reached(RayCluster):
    """A cluster that answers when `answers` is set. users: who has it and has not let go of it."""

    def __init__(self) -> None:
        super().__init__("local")
        self.answers = threading.Event()

    def acquire(self) -> None:
        self.answers.wait()
        self._users += 1

    def release(self) -> None:
        self._users -= 1

    @property
    def users(self) -> int:
        return self._users


async def test_E9_a_close_that_is_cancelled_while_it_connects_lets_go_of_the_cluster() -> None:
    cluster = Reached()
    jobs = cluster.open_jobs()
    job = jobs.submit(b"", "a job", {})
    await asyncio.sleep(0)
    job.abandon()
    closing = asyncio.create_task(jobs.close(60.0))
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.sleep(0)
    cluster.answers.set()

    with pytest.raises(asyncio.CancelledError):
        await closing

    assert jobs._connecting is None
    assert cluster.users == 0


async def test_a_cluster_out_of_reach_is_given_up_and_let_go_of_when_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("obsdag.ray.jobs._CONNECT_S", 0.01)
    cluster = Reached()
    released, loop = asyncio.Event(), asyncio.get_running_loop()
    cluster.release = partial(loop.call_soon_threadsafe, released.set)  # type: ignore[method-assign]
    jobs = cluster.open_jobs()
    job = jobs.submit(b"", "a job", {})
    await asyncio.sleep(0)
    closing = asyncio.create_task(jobs.close(0.0))

    try:
        done, _ = await asyncio.wait([closing], timeout=5.0)
    finally:
        cluster.answers.set()

    assert done
    assert job.future.cancelled()
    assert closing.result() == ["the connection to the Ray cluster is still being made"]
    await asyncio.wait_for(released.wait(), 5.0)


@on_cluster
async def test_E9_a_close_that_is_cancelled_while_a_job_waits_lets_go_of_the_cluster(nodes: Any) -> None:
    cluster = RayCluster()
    jobs = cluster.open_jobs()
    job = jobs.submit(b"", "a job", {"nobody_has_it": 1})
    while not jobs._told:
        await asyncio.sleep(0.01)
    closing = asyncio.create_task(jobs.close(60.0))
    await asyncio.sleep(0)
    closing.cancel()

    with pytest.raises(asyncio.CancelledError):
        await closing

    assert job.future.cancelled()
    assert cluster._users == 0


# --- what is told before anything runs


def test_mistakes_are_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match="no runner 'dask'"):
        DAG("d").task(heavy.double, runner="dask")
    with pytest.raises(ConfigError, match='say runner="ray"'):
        DAG("d").task(heavy.double, resources={"num_cpus": 1})
    with pytest.raises(ConfigError, match="not for tasks of kind 'loop'"):
        DAG("d").task(heavy.double, kind="loop", runner="ray")
    with pytest.raises(ConfigError, match=r"resources\['num_gpus'\] must be a number"):
        DAG("d").task(heavy.double, runner="ray", resources={"num_gpus": "1"})
    with pytest.raises(ConfigError, match="must be names and amounts"):
        DAG("d").task(heavy.double, runner="ray", resources=["num_gpus"])
    with pytest.raises(ConfigError, match=r"set ExecutorConfig\.ray to a RayCluster"):
        Executor(one(heavy.double))


def test_what_cannot_run_there_is_found_when_the_dag_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    async def coroutine(context: Any) -> Any:
        return context

    lock = threading.Lock()

    def holds(context: Any) -> Any:
        with lock:
            return context

    with pytest.raises(GraphError, match="needs a plain function"):
        one(coroutine).build()
    with pytest.raises(GraphError, match="cannot be carried to a Ray cluster"):
        one(holds).build()
    monkeypatch.setattr("obsdag.tasks.remote.find_spec", lambda name: None)
    with pytest.raises(GraphError, match=r"Ray is not installed here: pip install 'obsdag\[ray\]'"):
        one(heavy.double).build()


def test_an_address_that_others_can_reach_is_refused_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsdag.ray.cluster._asks_for_token", lambda: False)

    with pytest.raises(ConfigError, match="token authentication"):
        RayCluster("10.1.2.3:6379")

    assert repr(RayCluster("10.1.2.3:6379", insecure=True)) == "RayCluster('10.1.2.3:6379')"


def test_a_task_of_a_table_has_its_resources() -> None:
    task = {"function": "tests.shards.heavy:double", "kind": "ray", "resources": {"num_gpus": 1}, "timeout": 5.0}

    dag = DAG.from_config({"tasks": {"far": task}})

    (node,) = dag.to_dict()["nodes"]
    assert (node["kind"], node["resources"]) == ("ray", {"num_gpus": 1})
