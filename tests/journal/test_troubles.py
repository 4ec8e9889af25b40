"""What nobody does on purpose: two at a time, cancelled in the middle, a fork, a clock that is set back, odd names."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from obsdag import DAG, Context, Executor, ExecutorConfig, JournalError, ServeExecutor, SQLiteJournal
from obsdag.journal.store import Store
from obsdag.testing import run_virtual
from tests.journal.images import inline, outcomes, recovered


def single(name: str = "single", work: Any = None) -> DAG:
    """A DAG of one task, that adds one to `n`."""
    dag = DAG(name)

    @dag.task
    async def add(ctx: Context) -> Context:
        if work is not None:
            await work(ctx)
        ctx["n"] = ctx.get("n", 0) + 1
        return ctx

    return dag


def executor(journal: SQLiteJournal | None, dag: DAG | None = None, **settings: Any) -> Executor:
    """Eight workers."""
    return Executor(dag or single(), config=ExecutorConfig(journal=journal, context_worker_num=8, **settings))


def left_behind(path: Path, dag: DAG, count: int) -> None:
    """A run that was cut off while its contexts were in their only task."""

    async def main() -> None:
        run = asyncio.ensure_future(executor(inline(path), dag).run([{"n": n} for n in range(count)]))
        await asyncio.sleep(1)
        run.cancel()
        await asyncio.wait([run])

    run_virtual(main())


def slow(name: str = "single") -> DAG:
    return single(name, lambda _: asyncio.sleep(5))


# --- nothing, and twice


async def test_nothing_to_do(tmp_path: Path) -> None:
    journal = SQLiteJournal(tmp_path / "j.db")
    assert (await executor(journal).recover()).counts["entered"] == 0
    assert (await executor(journal).run([])).counts["entered"] == 0
    async with ServeExecutor(single(), config=ExecutorConfig(journal=journal)):
        pass
    assert outcomes(tmp_path / "j.db") == []


async def test_runs_one_upon_the_other_share_a_journal(tmp_path: Path) -> None:
    """The last one to leave closes it, while the next one already opens it."""
    journal = SQLiteJournal(tmp_path / "j.db", durability="process")

    async def some(number: int) -> None:
        await asyncio.sleep(number * 0.003)
        assert len(await executor(journal).run([{"n": n} for n in range(number % 3)])) == number % 3

    await asyncio.gather(*(some(number) for number in range(30)))
    assert journal.writer is None
    assert {row.outcome for row in outcomes(tmp_path / "j.db")} == {"output"}
    assert not [thread for thread in threading.enumerate() if thread.name == "obsdag-journal"]


async def test_a_context_is_taken_up_by_one_of_two(tmp_path: Path) -> None:
    await asyncio.to_thread(left_behind, tmp_path / "j.db", slow(), 8)
    journal = SQLiteJournal(tmp_path / "j.db", durability="process")
    runs = [executor(journal).recover() for _ in range(4)]
    assert sorted([len(result) for result in await asyncio.gather(*runs)]) == [0, 0, 0, 8]


async def test_recovering_beside_a_service_takes_nothing_from_it(tmp_path: Path) -> None:
    await asyncio.to_thread(left_behind, tmp_path / "j.db", slow(), 5)
    journal = SQLiteJournal(tmp_path / "j.db", durability="process")
    held = asyncio.Event()
    config = ExecutorConfig(journal=journal, context_worker_num=8)
    async with ServeExecutor(single("single", lambda _: held.wait()), config=config) as service:
        assert service.in_flight == 5
        submitting = [asyncio.ensure_future(service.submit({"n": n})) for n in range(100)]
        found = [len(await executor(journal).recover()) for _ in range(10)]
        assert found == [0] * 10
        held.set()
        for ticket in await asyncio.gather(*submitting):
            await ticket.result()
    rows = outcomes(tmp_path / "j.db")
    assert [row.outcome for row in rows] == ["output"] * 105


async def test_another_event_loop_is_refused_while_one_has_it(tmp_path: Path) -> None:
    journal = SQLiteJournal(tmp_path / "j.db", durability="process")
    told: list[BaseException] = []

    def other() -> None:
        try:
            executor(journal).run_sync([{}])
        except JournalError as error:
            told.append(error)

    async with executor(journal):
        thread = threading.Thread(target=other)
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(0.01)
    assert "is in use on another event loop" in str(told[0])


def test_a_loop_that_is_gone_gives_it_back(tmp_path: Path) -> None:
    journal = SQLiteJournal(tmp_path / "j.db", durability="process")
    loop = asyncio.new_event_loop()
    loop.run_until_complete(journal.acquire())  # and nobody releases it
    loop.close()
    assert len(executor(journal).run_sync([{}, {}])) == 2


# --- cancelled


@pytest.mark.parametrize("steps", range(12))
async def test_cancelled_at_any_turn_of_its_opening(tmp_path: Path, steps: int) -> None:
    await asyncio.to_thread(left_behind, tmp_path / "j.db", slow(), 3)
    journal = SQLiteJournal(tmp_path / "j.db", durability="process")
    run = asyncio.ensure_future(executor(journal).recover())
    for _ in range(steps):
        await asyncio.sleep(0)
    run.cancel()
    await asyncio.wait([run])
    assert journal.writer is None
    assert len(await executor(journal).recover()) == (0 if run.done() and not run.cancelled() else 3)


async def test_a_writer_outlives_those_that_stop_waiting(tmp_path: Path) -> None:
    journal = SQLiteJournal(tmp_path / "j.db", durability="process")
    writer = await journal.acquire()
    held = threading.Event()
    writer.call(lambda _: held.wait(10))
    asked = asyncio.wrap_future(writer.call(Store.counts))
    asked.cancel()
    await asyncio.sleep(0)
    held.set()
    assert await asyncio.wrap_future(writer.call(Store.counts)) == {}
    await journal.release()


@pytest.mark.timeout(60)
async def test_a_submit_that_is_cancelled_while_its_commit_is_under_way(tmp_path: Path) -> None:
    """Nobody has its ticket: it ends cancelled, and is not forgotten."""
    journal = SQLiteJournal(tmp_path / "j.db", durability="process")
    never = asyncio.Event()
    config = ExecutorConfig(journal=journal, context_worker_num=8)
    async with ServeExecutor(single("single", lambda _: never.wait()), config=config) as service:
        held = threading.Event()
        journal.open_writer().call(lambda _: held.wait(10))
        submitting = asyncio.ensure_future(service.submit({}, id="a"))
        while not service.in_flight:
            await asyncio.sleep(0)
        submitting.cancel()
        held.set()
        with pytest.raises(asyncio.CancelledError):
            await submitting
    assert [(row.id, row.outcome) for row in outcomes(tmp_path / "j.db")] == [("a", "cancelled")]


# --- the file


@pytest.mark.parametrize("how", ["removed", "moved away", "replaced", "its folder is removed"])
async def test_a_file_that_is_not_where_it_was_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "j.db"
    monkeypatch.setattr("obsdag.journal.recorder._LOOK_S", 0.0)

    async def trouble(ctx: Context) -> None:
        if ctx["n"] == 3:
            if how == "its folder is removed":
                shutil.rmtree(folder)
            elif how == "removed":
                path.unlink()
            elif how == "replaced":  # in one step, or it would be gone for a moment
                (folder / "other.db").write_bytes(b"")
                (folder / "other.db").replace(path)
            else:
                path.rename(folder / "elsewhere.db")
        await asyncio.sleep(0)

    with pytest.raises(JournalError, match="while it was open") as raised:
        await executor(SQLiteJournal(path), single(work=trouble)).run({"n": n} for n in range(100_000))
    assert "\n" not in str(raised.value)
    assert ("replaced" if how == "replaced" else "removed or moved away") in str(raised.value)


async def test_a_run_that_is_over_before_anybody_looked_says_so_too(tmp_path: Path) -> None:
    path = tmp_path / "j.db"

    async def trouble(_: Context) -> None:
        path.unlink(missing_ok=True)

    with pytest.raises(JournalError, match="removed or moved away while it was open"):
        await executor(SQLiteJournal(path), single(work=trouble)).run([{}, {}])


async def test_the_file_stays_the_same_where_the_process_changes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    journal = SQLiteJournal("j.db")
    monkeypatch.chdir(tmp_path / "other")
    assert len(await executor(journal).run([{}, {}])) == 2
    assert journal.path == str(tmp_path / "j.db")

    async def elsewhere(_: Context) -> None:
        monkeypatch.chdir(tmp_path)

    assert len(await executor(journal, single(work=elsewhere)).run([{}, {}])) == 2
    assert len(outcomes(tmp_path / "j.db")) == 4


async def test_pools_are_closed_where_the_journal_cannot_be(tmp_path: Path) -> None:
    dag = DAG("gone")

    @dag.task
    def work(ctx: Context) -> Context:
        return ctx

    with pytest.raises(JournalError, match="removed or moved away"):
        async with executor(SQLiteJournal(tmp_path / "j.db"), dag, task_worker_num=1).stream({}) as outputs:
            await anext(outputs)
            (tmp_path / "j.db").unlink()  # after the last commit
    assert [each.name for each in threading.enumerate() if each.name.startswith("obsdag")] == []


# --- keys


def keys_of(path: Path, count: int, dag: DAG, **options: Any) -> list[str]:
    seen: list[str] = []

    async def see(ctx: Context) -> None:
        seen.append(ctx.idempotency_key)

    journal = SQLiteJournal(path, durability="process", **options)
    executor(journal, single(dag.name, see)).run_sync([{} for _ in range(count)])
    return seen


def test_no_key_is_given_twice_although_all_is_pruned(tmp_path: Path) -> None:
    seen = [key for _ in range(3) for key in keys_of(tmp_path / "j.db", 5, single(), keep=0, keep_s=0)]
    assert outcomes(tmp_path / "j.db") == []
    assert len(set(seen)) == 15


def test_no_key_is_given_twice_although_nothing_was_committed(tmp_path: Path) -> None:
    """The process dies after a task has used its key and before anything of the context is in the file."""
    program = """
import os, sys
from obsdag import DAG, Executor, ExecutorConfig, SQLiteJournal
dag = DAG("d")
@dag.task
async def work(ctx):
    print(ctx.idempotency_key, flush=True)
    os._exit(0)
    return ctx
Executor(dag, config=ExecutorConfig(journal=SQLiteJournal(sys.argv[1], durability="process"))).run_sync([{}])
"""
    command = [sys.executable, "-c", program, str(tmp_path / "j.db")]
    seen = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    assert len(set(seen)) == 3


# --- a fork


FORK = """
import asyncio, gc, os, sys
from obsdag import DAG, Executor, ExecutorConfig, JournalError, SQLiteJournal
dag = DAG("forked")
path = sys.argv[1]

@dag.task
async def work(ctx):
    return ctx

def config(journal):
    return Executor(dag, config=ExecutorConfig(journal=journal))

async def main():
    journal = SQLiteJournal(path)
    await journal.acquire()
    await config(journal).run([{}])
    pid = os.fork()
    if pid == 0:
        return journal
    assert os.waitpid(pid, 0)[1] == 0
    await config(journal).run([{}, {}])
    os.kill(os.getpid(), 9)

loop = asyncio.new_event_loop()
journal = loop.run_until_complete(main())
for other in (journal, SQLiteJournal(path)):
    try:
        config(other).run_sync([{}])
    except JournalError as error:
        print(error, flush=True)
journal.writer.store.close()
del journal, other
gc.collect()
os._exit(0)  # not in order: asyncio would take its parent's loop off the epoll that both share
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_forked_process_leaves_its_parents_journal_alone(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        told, errors = parent.communicate()
    assert parent.returncode == -9, errors
    refused, in_use = told.splitlines()
    assert "was opened before this process was forked" in refused
    assert f"in use by process {parent.pid}: one process at a time" in in_use
    assert [row.outcome for row in outcomes(path)] == ["output"] * 3, "what the parent wrote after that is there"


# --- clocks and names


def test_a_clock_that_is_set_back_makes_no_wait_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dag = DAG("timers")

    @dag.task(retry_times=1, retry_interval=60)
    async def later(ctx: Context) -> Context:
        if ctx.attempt == 1:
            raise OSError("not yet")
        return ctx

    left_behind(tmp_path / "j.db", dag, 2)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 86_400)

    async def main() -> float:
        assert len(await executor(inline(tmp_path / "j.db"), dag).recover()) == 2
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) < 61


NAMES = ["it's", 'a "quoted" name', "semi;colon--", "new\nline", "nul\0", "\ud800 half a surrogate", "ü" * 500, ""]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_only_names(tmp_path: Path, name: str) -> None:
    dag = slow('it\'s a "dag"; DROP TABLE contexts')
    path = tmp_path / "it's 100%?mode=memory#;.db"

    async def main() -> None:
        inputs = [Context(data={"n": 1, name: name}, name=name), Context(name="plain")]
        run = asyncio.ensure_future(executor(inline(path), dag).run(inputs))
        await asyncio.sleep(1)
        run.cancel()
        await asyncio.wait([run])

    run_virtual(main())
    assert path.exists()
    assert {row.id for row in outcomes(path)} >= {"plain", name} - {""}
    result = recovered(dag, path)
    assert result[0].to_dict() == {"n": 2, name: name}
    assert {row.outcome for row in outcomes(path)} == {"output"}


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot say")


@pytest.mark.parametrize("error", [OSError("no file \udcff.txt"), Mute(), ValueError("x" * 100_000)])
def test_whatever_an_error_says_is_no_trouble(tmp_path: Path, error: Exception) -> None:
    dag = DAG("errors")

    @dag.task
    async def work(ctx: Context) -> Context:
        raise error

    async def main() -> None:
        result = await executor(inline(tmp_path / "j.db"), dag).run([{}])
        assert [failure.exception for failure in result.failures] == [error]

    run_virtual(main())
    assert [row.outcome for row in outcomes(tmp_path / "j.db")] == ["failed"]


def test_the_contexts_of_another_dag_stay_for_it(tmp_path: Path) -> None:
    other = DAG("other")

    @other.task
    async def different(ctx: Context) -> Context:
        return ctx

    left_behind(tmp_path / "j.db", slow("one"), 3)
    assert recovered(other, tmp_path / "j.db").counts["entered"] == 0
    assert len(recovered(single("one"), tmp_path / "j.db")) == 3


class Odd:
    """Encoded by pickle, and cannot be read back once it is gone."""


def test_data_whose_class_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dag = slow()

    async def main() -> None:
        given = Context(data={"odd": Odd()}, name="the odd one")
        run = asyncio.ensure_future(executor(inline(tmp_path / "j.db", allow_pickle=True), dag).run(given))
        await asyncio.sleep(1)
        run.cancel()
        await asyncio.wait([run])

    run_virtual(main())
    monkeypatch.delattr(sys.modules[__name__], "Odd")

    async def recover() -> None:
        await executor(inline(tmp_path / "j.db", allow_pickle=True), dag).recover()

    with pytest.raises(JournalError, match="data of context 'the odd one' cannot be read: AttributeError"):
        run_virtual(recover())


def test_a_recorder_that_breaks_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An observer that raises is detached; of the journal that would be silent loss."""
    monkeypatch.setattr("obsdag.journal.recorder.Recorder.context_finished", lambda *_: 1 / 0)

    async def main() -> None:
        await executor(inline(tmp_path / "j.db")).run([{}])

    with pytest.raises(JournalError, match="cannot be written: context_finished: ZeroDivisionError"):
        run_virtual(main())
