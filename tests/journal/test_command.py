"""`obsdag journal`, as people call it; and what a retry brings back."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from obsdag import DAG, Context, Executor, ExecutorConfig
from obsdag.journal.repair import retry
from obsdag.journal.schema import Row, sealed
from obsdag.journal.store import Store
from obsdag.testing import run_virtual
from tests.journal.images import inline, outcomes, recovered
from tests.journal.rows import open_store, row


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


AS_NOBODY = """
import os, sys
import encodings.ascii, obsdag.cli, obsdag.journal.repair, obsdag.journal.store  # while it may still read them
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
sys.exit(obsdag.cli.main(["journal", *sys.argv[1:]]))
"""


def as_nobody(*words: str | Path) -> tuple[int, str, str]:
    """The command of a user who owns nothing: status, standard output and standard error."""
    command = [sys.executable, "-W", "error", "-c", AS_NOBODY, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def open_way(path: Path) -> None:
    """Others can go to where `path` is."""
    for each in path.parents:
        if each.stat().st_uid == os.geteuid() and each != Path("/"):
            each.chmod(each.stat().st_mode | 0o055)


@pytest.fixture(params=[(0o444, 0o777), (0o666, 0o555), (0o444, 0o555)], ids=["file", "folder", "both"])
def closed(request: pytest.FixtureRequest, journal: Path) -> Iterator[Path]:
    """The journal, without a right to write to the file, its folder, or both."""
    open_way(journal)
    file, folder = request.param
    journal.chmod(file)
    journal.parent.chmod(folder)
    yield journal
    journal.parent.chmod(0o755)


def died(path: Path) -> Path:
    """The journal as a process that died after a commit leaves it, and the log that it leaves."""
    store = open_store(path)
    store.commit([row(1 << 40, text="in the log")])
    log = Path(f"{path}-wal")
    left = path.read_bytes(), log.read_bytes()
    store.close()
    path.write_bytes(left[0])
    log.write_bytes(left[1])
    return log


def test_who_may_only_read_can_look(closed: Path) -> None:
    before = closed.read_bytes()
    for words in (("show", closed), ("show", closed, "order-1"), ("failed", closed), ("export", closed)):
        assert as_nobody(*words) == (0, "".join(f"{line}\n" for line in told(*words)), "")
    assert closed.read_bytes() == before
    assert os.listdir(closed.parent) == [closed.name]


def test_who_may_only_read_is_told_what_a_retry_needs(closed: Path) -> None:
    status, _, error = as_nobody("retry", closed)
    assert status == 2
    assert error == (
        f"obsdag journal: error: journal {closed} cannot be written: the file or its folder is read-only: "
        "run it as a user who may write both, or take a copy\n"
    )


def test_a_log_that_a_dead_process_left_is_not_passed_over(journal: Path) -> None:
    log = died(journal)
    open_way(journal)
    journal.chmod(0o444)
    log.chmod(0o444)
    status, _, error = as_nobody("show", journal)
    assert status == 2
    assert error == (
        f"obsdag journal: error: journal {journal} is read-only, and a process that died left {log}, which SQLite has "
        "to write into it first: run it as a user who may write both, or copy both to a folder of your own\n"
    )
    assert told("show", journal)[0].endswith(": 9 contexts of 2 DAG(s)")


def test_who_may_only_read_does_not_look_into_what_another_has_open(closed: Path) -> None:
    closed.chmod(0o644)  # root's own right to write; nobody has none
    store = open_store(closed)
    status, _, error = as_nobody("show", closed)
    store.close()
    assert (status, error) == (
        2,
        f"obsdag journal: error: journal {closed} is in use by process {os.getpid()}: "
        "one process at a time can have it open\n",
    )


def test_what_may_not_even_be_read_is_told(journal: Path) -> None:
    open_way(journal)
    reason = "it, or a folder above it, is closed to this user: run it as one who may read and write it"
    for closed in (journal, journal.parent):
        closed.chmod(0o000)
        status, _, error = as_nobody("show", journal)
        closed.chmod(0o755)
        assert (status, error) == (2, f"obsdag journal: error: journal {journal} cannot be opened: {reason}\n")


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


def strict(line: str) -> Any:
    """What RFC 8259 and UTF-8 have a form of, and no more."""
    return msgspec.json.decode(line)


ODD = {
    "numbers": [float("nan"), float("inf"), -float("inf"), 1.5, 1 << 62, True, None],
    "nested": {"x": (float("nan"),), float("inf"): 1},
    "half": "\udc80",
    "text": "ü",
    "\udc80": 1,
    "huge": 1 << 70,
    "longest": 10**5000,
    "alike": {1: "a", "1": "b"},
    "long key": {(10**5000,): 1, (1, 2): 2},
}


def test_export_is_json_for_a_strict_parser_whatever_the_data_holds(tmp_path: Path) -> None:
    store = open_store(tmp_path / "j.db")
    store.commit([row(1, odd=ODD)])
    store.close()
    (line,) = told("export", tmp_path / "j.db")
    assert strict(line)["data"]["odd"] == {
        "numbers": ["NaN", "Infinity", "-Infinity", 1.5, 1 << 62, True, None],
        "nested": {"x": ["NaN"], "Infinity": 1},
        "half": "\\udc80",
        "text": "ü",
        "\\udc80": 1,
        "huge": str(1 << 70),
        "longest": hex(10**5000),
        "alike": [[1, "a"], ["1", "b"]],
        "long key": {json.dumps([hex(10**5000)]): 1, "(1, 2)": 2},
    }


def test_an_id_that_is_no_utf_8_can_be_asked_for(tmp_path: Path) -> None:
    store = open_store(tmp_path / "j.db")
    store.commit([sealed((1, "half-\udcff", 1, None, 1, None, None, None, row(1)[8], None))])
    store.close()
    command = [sys.executable, "-m", "obsdag", "journal", "show", str(tmp_path / "j.db")]
    found = [
        subprocess.run([*command, each], capture_output=True, check=False) for each in (b"half-\xff", b"half-\xfe")
    ]
    assert [each.returncode for each in found] == [0, 2]
    assert b"half-" in found[0].stdout
    assert b"has no context of id" in found[1].stderr


@pytest.mark.parametrize(("levels", "wrap"), [(190, lambda each: (each,)), (950, lambda each: {"in": each})])
def test_export_of_deep_data(tmp_path: Path, levels: int, wrap: Callable[[Any], Any]) -> None:
    deep: Any = 1
    for _ in range(levels):
        deep = wrap(deep)
    store = open_store(tmp_path / "j.db")
    store.commit([row(1, deep=deep)])
    store.close()
    (line,) = told("export", tmp_path / "j.db")
    assert line.count("[" if levels == 190 else '"in"') >= levels


DAMAGES = {
    "a number": "UPDATE contexts SET ended = 9.0 WHERE key = 2",
    "data": "UPDATE contexts SET data = X'00' WHERE key = 2",
    "no data": "UPDATE contexts SET data = NULL WHERE key = 2",
    "another type": "UPDATE contexts SET body = 'text' WHERE key = 2",
    "no such plan": "UPDATE contexts SET plan = 77 WHERE key = 2",
}


def second_is_damaged(path: Path) -> str:
    return f"journal {path} is damaged: row 2 (context 'c2') does not match its checksum: restore a backup"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_row_is_told_of_and_passed_over(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "j.db"
    store = open_store(path)
    store.commit([row(key, outcome="failed", ended=1.0) for key in range(1, 4)])
    store.connection.execute("PRAGMA foreign_keys = OFF")
    store.connection.execute(damage)
    store.close()

    for words in (("export", path), ("failed", path), ("show", path, "c1", "c3")):
        done = subprocess.run(
            [sys.executable, "-m", "obsdag", "journal", *map(str, words)], capture_output=True, text=True, check=False
        )
        assert done.returncode == (0 if words[0] == "show" else 1), done.stderr
        assert [("c1" in line, "c3" in line) for line in done.stdout.splitlines()] == [(True, False), (False, True)]
        if words[0] != "show":
            assert done.stderr == f"obsdag journal: {second_is_damaged(path)}; it is left out\n"
    assert told("show", path, "c2", status=2) == [f"obsdag journal: error: {second_is_damaged(path)}"]


@pytest.mark.parametrize(
    "damage", ["DELETE FROM plans", "UPDATE plans SET tasks = '[[\"a'", "UPDATE plans SET tasks = 7"]
)
def test_rows_of_a_plan_that_cannot_be_read_are_told_of(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "j.db"
    store = open_store(path)
    other = store.plan_number("e" * 32, "another", '[["in"], ["out"]]')
    store.commit([row(1), Row._make(sealed(row(2)._replace(plan=other)[:-1]))])
    store.connection.execute("PRAGMA foreign_keys = OFF")
    store.connection.execute(f"{damage} WHERE dag = 'dag'")
    store.close()

    done = subprocess.run(
        [sys.executable, "-m", "obsdag", "journal", "export", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"obsdag journal: journal {path} is damaged: row 1 (context 'c1') is of a plan that cannot be read: "
        "restore a backup; it is left out\n"
    )
    assert [strict(line)["id"] for line in done.stdout.splitlines()] == ["c2"]


@pytest.mark.parametrize("cell", ["id = CAST(X'ff' AS TEXT)", "id = X'ff'", "id = 7", "outcome = CAST(X'ff' AS TEXT)"])
def test_a_row_whose_text_is_damaged_is_told_of_by_its_key(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "j.db"
    store = open_store(path)
    store.commit([row(key) for key in range(1, 4)])
    store.connection.execute(f"UPDATE contexts SET {cell} WHERE key = 2")
    store.close()

    done = subprocess.run(
        [sys.executable, "-m", "obsdag", "journal", "export", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert [strict(line)["id"] for line in done.stdout.splitlines()] == ["c1", "c3"]
    (line,) = done.stderr.splitlines()
    assert "row 2 (context " in line


def test_retry_changes_nothing_beside_a_damaged_row(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    store = open_store(path)
    store.commit([row(key, outcome="failed", ended=1.0) for key in range(1, 4)])
    store.connection.execute(DAMAGES["data"])
    store.close()
    before = path.read_bytes()
    assert told("retry", path, status=2) == [f"obsdag journal: error: {second_is_damaged(path)}"]
    assert path.read_bytes() == before
    assert told("retry", path, "c3") == ["1 context(s) go on at the next recovery"]


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


@pytest.mark.parametrize("action", [(), ("show",), ("failed",), ("retry",), ("export",)], ids=str)
def test_help_says_that_the_service_is_stopped_first(action: tuple[str, ...]) -> None:
    assert "stop the service that has it open first" in " ".join(" ".join(told(*action, "--help")).split())


def test_help_says_what_an_export_does_with_what_json_has_no_form_of() -> None:
    help_ = " ".join(" ".join(told("export", "--help")).split())
    assert 'NaN and infinities are text ("NaN", "Infinity", "-Infinity")' in help_
    assert "exit status is 1" in help_


@pytest.mark.parametrize("action", ["show", "failed", "retry", "export"])
def test_a_missing_extra_is_told_in_one_line(action: str, journal: Path) -> None:
    code = "import sys; sys.modules['msgspec'] = None; from obsdag.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "journal", action, str(journal)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "obsdag journal: error: the journal needs msgspec: pip install 'obsdag[journal]'\n"


def test_mistakes_are_told_in_one_line(journal: Path, tmp_path: Path) -> None:
    assert told("show", tmp_path / "no.db", status=2) == [
        f"obsdag journal: error: journal {tmp_path / 'no.db'}: there is no such file"
    ]
    assert told("show", tmp_path, status=2) == [
        f"obsdag journal: error: journal {tmp_path} is a folder: name the file in it"
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
