"""A second death: what was taken up once and cut off again, processes that die repeatedly, a journal that failed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from obsdag import (
    DAG,
    Context,
    ContextFailedError,
    Executor,
    ExecutorConfig,
    JournalError,
    NoOutputError,
    ServeExecutor,
    SQLiteJournal,
)
from obsdag.journal.codec import Body
from obsdag.journal.schema import sealed
from obsdag.journal.store import Store
from obsdag.testing import run_virtual
from tests.journal.images import inline, outcomes, recovered
from tests.journal.rows import open_store


def waiting(name: str = "waiting") -> DAG:
    """Each context goes through `wait`, for so many seconds as it says, and so does a child that it may make."""
    dag = DAG(name)

    @dag.task
    async def begin(ctx: Context) -> Any:
        if "child" not in ctx:
            return ctx
        child = ctx.create_child()
        child["s"] = ctx["child"]
        return [ctx, child]

    @dag.task(after=begin, retry_times=1, retry_interval=3600)
    async def wait(ctx: Context) -> Context:
        await asyncio.sleep(ctx["s"])
        if ctx.get("bad") and ctx.attempt == 1:
            raise OSError("not yet")
        return ctx

    return dag


def cut_off(executor: Executor, after_s: float, inputs: Any = None) -> None:
    """Runs the inputs, or what is in the journal, for so long."""

    async def main() -> None:
        run = asyncio.ensure_future(executor.recover() if inputs is None else executor.run(inputs))
        await asyncio.sleep(after_s)
        run.cancel()
        await asyncio.wait([run])

    run_virtual(main())


def executor(path: Path, dag: DAG | None = None, dags: dict[str, str] | None = None, **settings: Any) -> Executor:
    config = ExecutorConfig(journal=inline(path, dags=dags), context_worker_num=8, debug=True, **settings)
    return Executor(dag or waiting(), config=config)


def died(path: Path, crashes: int, times: int = 3) -> None:
    """As if the process had died so many times in a row, with each living context running in `crashes` of them."""
    store = open_store(path, look=True)
    for row in list(store.rows("outcome IS NULL")):
        body = msgspec.msgpack.decode(row.body, type=Body)
        body.crashes = crashes
        store.commit([sealed(row._replace(body=msgspec.msgpack.encode(body))[:-1])])
    store.set("crashes", str(times))
    store.close()


# --- taken up twice


def test_a_renamed_dag_needs_its_old_name_only_once(tmp_path: Path) -> None:
    """What has made no progress under the new name, and what has ended under the old one, is no trouble."""
    path = tmp_path / "j.db"
    cut_off(executor(path, waiting("orders")), 2, [{"s": 9, "child": 1}, {"s": 3}, {"s": 50}])
    cut_off(executor(path, waiting("shop"), {"orders": "shop"}), 4)
    result = recovered(waiting("shop"), path, context_worker_num=8)
    assert sorted(output["s"] for output in result) == [9, 50]
    assert {row.outcome for row in outcomes(path)} == {"output"}


def test_a_deadline_of_the_configuration_holds_for_what_waited_for_room(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    settings: dict[str, Any] = {"max_live_contexts": 1, "context_deadline": 5.0}

    async def first() -> None:
        serving = ServeExecutor(waiting(), config=ExecutorConfig(journal=inline(path), **settings))
        await serving.start()
        await serving.submit({"s": 4}, id="a")
        await serving.submit({"s": 50}, id="b")
        await serving.drain(0)

    async def second() -> None:
        config = ExecutorConfig(journal=inline(path), context_worker_num=8, **settings)
        async with ServeExecutor(waiting(), config=config) as serving:
            assert (await serving.ticket("a").result())["s"] == 4
            with pytest.raises(ContextFailedError, match="did not finish within its deadline"):
                await serving.ticket("b").result()

    run_virtual(first())
    run_virtual(second())


# --- dying again and again


def test_a_parent_and_its_child_that_both_kill_fail_once_each(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    cut_off(executor(path), 1, [{"s": 9, "child": 9}])
    died(path, crashes=5)
    result = recovered(waiting(), path)
    assert [failure.context.parent for failure in result.failures] == [None]
    assert [row.outcome for row in outcomes(path)] == ["failed", "cancelled"]


def test_an_attempt_that_failed_is_not_running_when_the_process_dies_later(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    cut_off(executor(path), 1, [{"s": 9, "bad": True}])
    died(path, crashes=0)
    cut_off(executor(path), 20)  # it waits for its second attempt
    (row,) = outcomes(path)
    body = msgspec.msgpack.decode(row.body, type=Body)
    assert body.rare is not None
    assert list(body.rare.attempts.values()) == [1]
    assert not body.started


@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_a_ticket_ends_while_its_context_waits_for_its_trial(tmp_path: Path, how: str) -> None:
    path = tmp_path / "j.db"

    async def first() -> None:
        config = ExecutorConfig(journal=inline(path), context_worker_num=8)
        serving = await ServeExecutor(waiting(), config=config).start()
        await serving.submit({"s": 30}, id="a")
        await serving.submit({"s": 30}, id="b", deadline=10 if how == "deadline" else None)
        await asyncio.sleep(1)
        await serving.drain(0)

    async def second() -> None:
        config = ExecutorConfig(journal=inline(path), context_worker_num=8, debug=True)
        async with ServeExecutor(waiting(), config=config) as serving:
            b = serving.ticket("b")
            if how == "cancel":
                assert b.cancel()
            error = ContextFailedError if how == "deadline" else NoOutputError
            with pytest.raises(error, match="deadline" if how == "deadline" else "cancelled"):
                await b.result(20)
            assert (await serving.ticket("a").result())["s"] == 30

    run_virtual(first())
    died(path, crashes=2)
    run_virtual(second())
    assert [(row.id, row.outcome) for row in outcomes(path)] == [
        ("a", "output"),
        ("b", "failed" if how == "deadline" else "cancelled"),
    ]


def test_trials_go_before_new_work(tmp_path: Path) -> None:
    """Behind it they could wait until the process dies again, and be judged never."""
    path = tmp_path / "j.db"
    began: list[int] = []

    async def first() -> None:
        config = ExecutorConfig(journal=inline(path), context_worker_num=8)
        serving = await ServeExecutor(waiting(), config=config).start()
        for seconds in (11, 12, 13):
            await serving.submit({"s": seconds})
        await asyncio.sleep(1)
        await serving.drain(0)

    async def second() -> None:
        dag = DAG("waiting")

        @dag.task
        async def begin(ctx: Context) -> Context:
            return ctx

        @dag.task(after=begin)
        async def wait(ctx: Context) -> Context:
            began.append(ctx["s"])
            await asyncio.sleep(ctx["s"])
            return ctx

        config = ExecutorConfig(journal=inline(path), context_worker_num=1, debug=True, drain_grace=999)
        async with ServeExecutor(dag, config=config) as serving:
            for seconds in range(1, 8):
                await serving.submit({"s": seconds})

    run_virtual(first())
    died(path, crashes=2)
    run_virtual(second())
    assert began[:3] == [11, 12, 13]
    assert {row.outcome for row in outcomes(path)} == {"output"}


def test_a_start_that_is_written_down_ends_nobody_else_in_its_middle(tmp_path: Path) -> None:
    """Data without a form ends its context with the turn, and not in the transition of a suspect that begins, whose
    start is in the file before its function runs all the same.
    """
    path = tmp_path / "j.db"
    begun: list[tuple[int, bool]] = []

    def is_started(ctx: Context) -> bool:
        journal = ctx._run.config.journal  # type: ignore[union-attr]
        (row,) = journal.writer.store.rows("id = ?", (ctx.id,))
        return msgspec.msgpack.decode(row.body, type=Body).started

    def dag(bad: bool) -> DAG:
        made = DAG("two")

        @made.task
        async def first(ctx: Context) -> Context:
            if not bad:
                await asyncio.sleep(9)
            begun.append((ctx["n"], is_started(ctx)))
            if ctx["n"] == 1:
                ctx["thing"] = object()
            return ctx

        @made.task(after=first)
        async def second(ctx: Context) -> Context:
            await asyncio.sleep(1)
            return ctx

        return made

    cut_off(executor(path, dag(False)), 1, [{"n": 1}, {"n": 2}, {"n": 3}])
    died(path, crashes=0)
    result = recovered(dag(True), path, context_worker_num=8)
    assert begun == [(1, True), (2, True), (3, True)]
    assert [(failure.context["n"], failure.task) for failure in result.failures] == [(1, "first")]
    assert sorted(output["n"] for output in result) == [2, 3]


# --- a journal that failed


async def test_a_journal_that_failed_while_others_keep_it_open_refuses_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(store: Store, rows: Any) -> None:
        raise JournalError("the disk is full")

    config = ExecutorConfig(journal=SQLiteJournal(tmp_path / "j.db"))
    async with Executor(waiting(), config=config) as executor:
        await executor.run({"s": 0})
        with monkeypatch.context() as patch:
            patch.setattr(Store, "commit", full)
            with pytest.raises(JournalError, match="the disk is full"):
                await executor.run({"s": 0})
        with pytest.raises(JournalError, match="the disk is full"):
            await executor.run({"s": 0})
    assert len(await Executor(waiting(), config=config).recover()) == 0
    assert len(await Executor(waiting(), config=config).run({"s": 0})) == 1
