"""`obsdag journal`, as people call it; and what a retry brings back."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from obsdag import DAG, Context, Executor, ExecutorConfig
from obsdag.journal.repair import retry
from obsdag.journal.store import Store
from obsdag.testing import run_virtual
from tests.journal.images import inline, outcomes, recovered
from tests.journal.rows import open_store


def shop(healed: bool) -> DAG:
    """Work that fails for some, until whatever was wrong is mended."""
    dag = DAG("shop")

    @dag.task
    async def pay(ctx: Context) -> Context:
        ctx["paid"] = ctx.get("paid", 0) + 1
        return ctx

    @dag.task(after=pay, kind="map")
    async def parts(ctx: Context) -> Any:
        return [{"part": part} for part in range(3)]

    @dag.task(after=parts, retry_times=1)
    async def pack(ctx: Context) -> Context:
        assert ctx.parent is not None
        if ctx["part"] == 1 and ctx.parent["n"] == 1 and not healed:
            raise OSError("no box\nof that size")
        ctx["packed"] = ctx.get("packed", 0) + 1
        return ctx

    @dag.task(after=pack, kind="join")
    async def ship(ctx: Context, children: list[Context]) -> Context:
        ctx["packed"] = [child["packed"] for child in children]
        return ctx

    return dag


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal in which order-1 failed and order-0 did not."""

    async def main() -> None:
        executor = Executor(shop(False), config=ExecutorConfig(journal=inline(tmp_path / "j.db"), debug=True))
        inputs = [Context(None, {"n": n, "tags": {"a"}}, name=f"order-{n}") for n in range(2)]
        result = await executor.run(inputs)
        assert (len(result), len(result.failures)) == (1, 2)

    run_virtual(main())
    return tmp_path / "j.db"


def told(*words: str | Path, status: int = 0) -> list[str]:
    """What the command prints, or complains of."""
    command = [sys.executable, "-m", "obsdag", "journal", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return (done.stderr if status else done.stdout).splitlines()


def test_show(journal: Path) -> None:
    total, line = told("show", journal)
    assert total.endswith(": 8 contexts of 1 DAG(s)")
    assert line == "shop: 2 cancelled, 2 failed, 3 merged, 1 output"
    lines = told("show", journal, "order-0")
    assert len(lines) == 4
    assert lines[0].endswith("  output  order-0  done: pay, parts, pack, ship")
    assert told("show", journal, "order-9", status=2) == [
        f"obsdag journal: error: {journal} has no context of id 'order-9'"
    ]


def test_failed(journal: Path) -> None:
    first, second = told("failed", journal)
    assert "  failed  order-1  at ship after 1 attempt(s): obsdag.errors.TaskError: join 'ship': 1 of 3 " in first
    assert second.endswith("at pack after 2 attempt(s): OSError: no box of that size")


def test_export(journal: Path) -> None:
    found = [json.loads(line) for line in told("export", journal)]
    assert len(found) == len(outcomes(journal))
    order = next(each for each in found if each["id"] == "order-1")
    assert order["data"] == {"n": 1, "tags": ["a"], "paid": 1}
    assert order["error"]["task"] == "ship"
    assert order["done"] == ["pay", "parts"]


def test_retry_goes_on_from_where_it_failed(journal: Path) -> None:
    assert told("retry", journal, "order-1", "order-0") == [
        "not failed, or part of another that is retried: order-0",
        "1 context(s) go on at the next recovery",
    ]
    result = recovered(shop(True), journal)
    assert [output.to_dict() for output in result] == [{"n": 1, "tags": {"a"}, "paid": 1, "packed": [1, 1, 1]}]
    assert told("failed", journal) == []


def test_ids_that_nothing_has_change_nothing(journal: Path) -> None:
    for action in ("show", "retry"):
        assert told(action, journal, "order-1", "order-9", status=2) == [
            f"obsdag journal: error: {journal} has no context of id 'order-9'"
        ]
    assert len(told("failed", journal)) == 2


@pytest.mark.parametrize("where", ["parent", "child"])
def test_what_failed_by_data_without_a_form_is_not_run_again_without_it(where: str, tmp_path: Path) -> None:
    dag = DAG("odd")

    @dag.task
    async def spoil(ctx: Context) -> Context:
        if where == "parent":
            ctx["thing"] = object()
        await asyncio.sleep(1)
        return ctx

    @dag.task(after=spoil, kind="map")
    async def parts(ctx: Context) -> Any:
        return [{"part": part} for part in range(2)]

    @dag.task(after=parts)
    async def spoil_one(ctx: Context) -> Context:
        if ctx["part"] == 1:
            ctx["thing"] = object()
        return ctx

    @dag.task(after=spoil_one)
    async def last(ctx: Context) -> Context:
        await asyncio.sleep(1)
        return ctx

    @dag.task(after=last, kind="join")
    async def whole(ctx: Context, children: list[Context]) -> Context:
        return ctx

    async def main() -> None:
        executor = Executor(dag, config=ExecutorConfig(journal=inline(tmp_path / "j.db")))
        assert (await executor.run([Context(None, {"n": 1}, name="odd one")])).failures

    run_virtual(main())
    before = told("failed", tmp_path / "j.db")
    assert "EncodingError" in "".join(before)
    (line,) = told("retry", tmp_path / "j.db", "odd one", status=1)
    assert line == "left as they are, since their data had no form and is not here (enter them anew): odd one"
    assert told("failed", tmp_path / "j.db") == before


def test_what_still_fails_fails_again(journal: Path) -> None:
    assert told("retry", journal)[-1] == "1 context(s) go on at the next recovery"
    result = recovered(shop(False), journal)
    assert len(result.failures) == 2
    assert [failure.attempts for failure in result.failures] == [2, 1]
    assert len(told("failed", journal)) == 2


def test_mistakes_are_told_in_one_line(journal: Path, tmp_path: Path) -> None:
    assert told("show", tmp_path / "no.db", status=2) == [
        f"obsdag journal: error: journal {tmp_path / 'no.db'}: there is no such file"
    ]
    store = open_store(journal)
    assert "one process at a time can have it open" in told("failed", journal, status=2)[0]
    store.close()


def test_a_stalled_context_can_be_retried(tmp_path: Path) -> None:
    dag = DAG("ice")

    @dag.task
    async def freeze(ctx: Context) -> Context:
        ctx.freeze()
        return ctx

    @dag.task(after=freeze)
    async def after(ctx: Context) -> Context:
        await asyncio.sleep(1)
        return ctx

    async def main() -> None:
        config = ExecutorConfig(journal=inline(tmp_path / "j.db"), context_queue_timeout=0.1)
        assert (await Executor(dag, config=config).run()).counts["stalled"] == 1

    run_virtual(main())
    store = Store(str(tmp_path / "j.db"), look=True)
    store.open()
    assert len(retry(store).again) == 1
    store.close()
    assert len(recovered(dag, tmp_path / "j.db")) == 1
