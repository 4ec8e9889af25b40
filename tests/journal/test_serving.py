"""A serving executor with a journal: what was acknowledged is there after a restart, with its ticket."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from obsdag import (
    DAG,
    Context,
    ContextFailedError,
    DuplicateIdError,
    EncodingError,
    ExecutorConfig,
    JournalError,
    NoOutputError,
    ServeExecutor,
    SQLiteJournal,
)
from obsdag.journal.codec import Codec
from obsdag.testing import run_virtual
from tests.journal.images import inline, outcomes


def orders() -> DAG:
    dag = DAG("orders")

    @dag.task(retry_times=1, retry_interval=1)
    async def pay(ctx: Context) -> Context:
        await asyncio.sleep(1)
        if ctx.get("bad"):
            raise ValueError("no money")
        ctx["paid"] = True
        return ctx

    @dag.task(after=pay, kind="map")
    async def split(ctx: Context) -> Any:
        return [{"part": number} for number in range(ctx.get("parts", 0))]

    @dag.task(after=split)
    async def pack(ctx: Context) -> Context:
        await asyncio.sleep(1)
        return ctx

    @dag.task(after=pack, kind="join")
    async def ship(ctx: Context, children: list[Context]) -> Context:
        ctx["shipped"] = len(children)
        await asyncio.sleep(1)
        return ctx

    return dag


async def test_nothing_is_accepted_by_a_journal_whose_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    config = ExecutorConfig(journal=SQLiteJournal(path))
    executor = await ServeExecutor(orders(), config=config).start()
    await executor.submit({"n": 1})
    path.unlink()
    with pytest.raises(JournalError, match="removed or moved away while it was open"):
        await executor.submit({"n": 2})
    await executor.drain(0)


def serving(path: Path, **settings: Any) -> ServeExecutor:
    config = ExecutorConfig(journal=inline(path), context_worker_num=8, debug=True, **settings)
    return ServeExecutor(orders(), config=config)


def found(path: Path) -> list[tuple[str, str | None]]:
    """Id and outcome of what was submitted."""
    return [(row.id, row.outcome) for row in outcomes(path) if row.key == row.tree]


def test_a_restart_goes_on_with_tickets(tmp_path: Path) -> None:
    path = tmp_path / "j.db"

    async def first() -> None:
        executor = await serving(path).start()
        for number in range(3):
            await executor.submit({"parts": number}, id=f"order-{number}")
        await executor.submit({"bad": True}, id="bad")
        await executor.submit({"parts": 1}, id="later", deadline=3600)
        await asyncio.sleep(1.5)
        manifest = await executor.drain(0)
        assert {each["id"] for each in manifest["cancelled"]} == {"order-0", "order-1", "order-2", "bad", "later"}

    run_virtual(first())
    assert found(path) == [(name, None) for name in ("order-0", "order-1", "order-2", "bad", "later")]

    async def second() -> None:
        async with serving(path) as executor:
            assert executor.in_flight == 5
            with pytest.raises(DuplicateIdError):
                await executor.submit({}, id="order-1")
            for number in range(3):
                output = await executor.ticket(f"order-{number}").result()
                assert output.to_dict() == {"parts": number, "paid": True, "shipped": number}
            with pytest.raises(ContextFailedError, match="no money"):
                await executor.ticket("bad").result()
            assert (await executor.execute({"parts": 2}, id="order-1"))["shipped"] == 2

    run_virtual(second())
    assert dict(found(path)) == {"order-0": "output", "order-1": "output", "order-2": "output", "bad": "failed"} | {
        "later": "output"
    }


def test_submit_and_results_wait_for_their_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j.db"
    committed: list[tuple[str, str | None]] = []

    async def main() -> None:
        async with serving(path) as executor:
            commit = executor.config.journal.writer.store.commit  # type: ignore[union-attr]

            def noted(rows: Any) -> None:
                commit(rows)
                committed.extend((row[1], row[6]) for row in rows)

            monkeypatch.setattr(executor.config.journal.writer.store, "commit", noted)  # type: ignore[union-attr]
            ticket = await executor.submit({}, id="a")
            assert ("a", None) in committed
            await ticket.result()
            assert ("a", "output") in committed

    run_virtual(main())


def test_what_cannot_be_encoded_is_refused_at_submit(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path / "j.db") as executor:
            with pytest.raises(EncodingError, match="key 'x' holds a object"):
                await executor.submit({"x": object()})
            assert executor.in_flight == 0
            assert (await executor.execute({"parts": 1}))["shipped"] == 1

    run_virtual(main())


def test_a_cancelled_ticket_stays_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "j.db"

    async def main() -> None:
        async with serving(path, max_live_contexts=1) as executor:
            running, pending = await executor.submit({}, id="a"), await executor.submit({}, id="b")
            for ticket in (running, pending):
                assert ticket.cancel()
                with pytest.raises(NoOutputError, match="cancelled"):
                    await ticket.result()

    run_virtual(main())
    assert found(path) == [("a", "cancelled"), ("b", "cancelled")]


def test_pending_submissions_and_deadlines_survive(tmp_path: Path) -> None:
    path = tmp_path / "j.db"

    async def first() -> None:
        executor = await serving(path, max_live_contexts=1).start()
        for name in ("a", "b", "c"):
            await executor.submit({}, id=name, deadline=1.2 if name == "c" else None)
        await executor.drain(0)

    async def second() -> None:
        async with serving(path, max_live_contexts=1) as executor:
            assert (await executor.ticket("b").result())["paid"]
            with pytest.raises(ContextFailedError, match="deadline"):
                await executor.ticket("c").result()

    run_virtual(first())
    run_virtual(second())
    assert found(path) == [("a", "output"), ("b", "output"), ("c", "failed")]


def test_a_journal_that_fails_ends_serving_and_answers_nobody_wrongly(tmp_path: Path) -> None:
    path = tmp_path / "j.db"

    async def main() -> list[str]:
        answered: list[str] = []
        config = ExecutorConfig(journal=inline(path, max_page_count=30), context_worker_num=8)
        with pytest.raises(JournalError, match="the disk is full"):
            async with ServeExecutor(orders(), config=config) as executor:
                for number in range(500):
                    ticket = await executor.submit({"x": "x" * 700}, id=f"o{number}")
                    answered.append(ticket.id)
        with pytest.raises(JournalError):
            await ticket.result()
        return answered

    answered = run_virtual(main())
    assert len(answered) > 5
    assert set(answered) <= {name for name, _ in found(path)}


async def test_real_clients_and_a_real_writer(tmp_path: Path) -> None:
    dag = DAG("quick")

    @dag.task
    async def work(ctx: Context) -> Context:
        ctx["done"] = True
        return ctx

    journal = SQLiteJournal(tmp_path / "j.db")
    async with ServeExecutor(dag, config=ExecutorConfig(journal=journal, context_worker_num=8)) as executor:
        outputs = await asyncio.gather(*(executor.execute({"n": n}) for n in range(300)))
    assert sorted(output["n"] for output in outputs) == list(range(300))
    rows = outcomes(tmp_path / "j.db")
    assert [row.outcome for row in rows] == ["output"] * 300
    assert sorted(Codec().decode(row.data or b"")["n"] for row in rows) == list(range(300))
