"""What a journal goes by: names of DAGs, and keys that do not come again."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from obsdag import DAG, Context, Executor, ExecutorConfig, PlanChangedError, ServeExecutor
from obsdag.testing import run_virtual
from tests.journal.images import inline, outcomes, recovered
from tests.journal.rows import open_store
from tests.journal.test_runs import interrupted, plus


def test_a_renamed_dag_is_refused_until_its_old_name_is_told(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    interrupted(path, plus("orders"), 1.5)
    with pytest.raises(PlanChangedError) as refused:
        recovered(plus("shop"), path)
    assert "\n" not in str(refused.value)
    assert "2 unfinished context(s) of DAG 'orders'" in str(refused.value)
    assert "SQLiteJournal(..., dags={'orders': 'shop'})" in str(refused.value)
    assert refused.value.differences == ("DAG 'orders' is 'shop'",)

    async def main() -> list[int]:
        executor = Executor(plus("shop"), config=ExecutorConfig(journal=inline(path, dags={"orders": "shop"})))
        return sorted(output["n"] for output in await executor.recover())

    assert run_virtual(main()) == [4, 6]
    assert [row.outcome for row in outcomes(path)] == ["output", "output"]


def test_a_renamed_dag_whose_tasks_were_renamed_as_well(tmp_path: Path) -> None:
    path, new = tmp_path / "j.db", DAG("shop")
    interrupted(path, plus("orders"), 1.5)

    @new.task
    async def first(ctx: Context) -> Context:
        raise AssertionError("it was done")

    @new.task(after=first)
    async def last(ctx: Context) -> Context:
        ctx["n"] *= 2
        return ctx

    async def main() -> list[int]:
        executor = Executor(new, config=ExecutorConfig(journal=inline(path, dags={"orders": "shop"})))
        with pytest.raises(PlanChangedError, match="task 'second' is gone"):
            await executor.recover()
        return sorted(output["n"] for output in await executor.recover(tasks={"second": "last"}))

    assert run_virtual(main()) == [4, 6]


def test_serving_a_changed_dag_takes_a_mapping_of_tasks_when_it_starts(tmp_path: Path) -> None:
    path = tmp_path / "j.db"

    async def first() -> None:
        config = ExecutorConfig(journal=inline(path), context_worker_num=2)
        serving = await ServeExecutor(plus("orders"), config=config).start()
        await serving.submit({"n": 1}, id="one")
        await asyncio.sleep(1.5)
        await serving.drain(0)

    new = DAG("orders")

    @new.task
    async def begin(ctx: Context) -> Context:
        raise AssertionError("it was done")

    @new.task(after=begin)
    async def second(ctx: Context) -> Context:
        ctx["n"] *= 2
        return ctx

    async def later() -> None:
        config = ExecutorConfig(journal=inline(path), context_worker_num=2)
        serving = ServeExecutor(new, config=config)
        with pytest.raises(PlanChangedError, match=r"in serving, by start\(tasks=...\)"):
            await serving.start()
        await serving.start(tasks={"first": "begin"})
        assert (await serving.ticket("one").result())["n"] == 4
        await serving.drain()

    run_virtual(first())
    run_virtual(later())


def test_another_dag_with_the_same_tasks_says_so(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    interrupted(path, plus("orders"), 1.5)

    async def main() -> int:
        config = ExecutorConfig(journal=inline(path, dags={"orders": "orders"}))
        other = await Executor(plus("shop"), config=config).recover()
        return other.counts["entered"] + 10 * len(await Executor(plus("orders"), config=config).recover())

    assert run_virtual(main()) == 20


def test_a_service_of_a_renamed_dag(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    interrupted(path, plus("orders"), 1.5)

    async def main() -> None:
        refused = ServeExecutor(plus("shop"), config=ExecutorConfig(journal=inline(path)))
        with pytest.raises(PlanChangedError, match="DAG 'orders'"):
            await refused.start()
        async with ServeExecutor(plus("shop"), config=ExecutorConfig(journal=inline(path, dags={"orders": "shop"}))):
            pass

    run_virtual(main())
    assert [row.outcome for row in outcomes(path)] == ["output", "output"]


def test_dags_of_the_same_tasks_are_told_apart(tmp_path: Path) -> None:
    """A run of one after the other in one file: each name has its own contexts."""
    path = tmp_path / "j.db"

    async def main(dag: DAG) -> None:
        await Executor(dag, config=ExecutorConfig(journal=inline(path))).run({"n": 1})

    run_virtual(main(plus("one")))
    interrupted(path, plus("two"), 1.5)
    store = open_store(path, look=True)
    counts = store.counts()
    store.close()
    assert counts == {"one": {"output": 1}, "two": {"living": 2}}
    assert len(recovered(plus("two"), path)) == 2
    assert recovered(plus("one"), path).counts["entered"] == 0


def test_keys_do_not_come_again_when_an_old_backup_is_restored(tmp_path: Path) -> None:
    path, backup = tmp_path / "j.db", tmp_path / "backup.db"
    seen: list[str] = []

    def dag() -> DAG:
        made = DAG("keys")

        @made.task(retry_times=1, retry_interval=1)
        async def pay(ctx: Context) -> Context:
            seen.append(ctx.idempotency_key)
            raise OSError("no line")

        return made

    interrupted(path, dag(), 0.5)
    shutil.copyfile(path, backup)
    begun = set(seen)
    assert len(begun) == 2

    def later() -> set[str]:
        """The keys of a session after the backup; what it had taken up keeps its own."""
        seen.clear()
        recovered(dag(), path)
        assert set(seen) == begun
        seen.clear()
        interrupted(path, dag(), 0.5)
        return set(seen)

    lost = later()
    for suffix in ("", "-wal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    shutil.copyfile(backup, path)
    again = later()
    assert len(lost) == len(again) == 2
    assert not lost & (again | begun)
    assert not again & begun


def test_tokens_of_sessions_are_kept_as_long_as_their_contexts(tmp_path: Path) -> None:
    path = tmp_path / "j.db"

    def tokens() -> int:
        store = open_store(path, look=True)
        found: int = store.connection.execute("SELECT count(*) FROM meta WHERE name LIKE 'token.%'").fetchone()[0]
        store.close()
        return found

    for _ in range(5):
        open_store(path).close()
    assert tokens() == 1
    interrupted(path, plus(), 0.5)
    for _ in range(3):
        open_store(path).close()
    assert tokens() == 2
