"""What a run with a journal promises beside coming back: acknowledgments, refusals, early ends, special tasks."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from obsdag import (
    DAG,
    ConfigError,
    Context,
    EncodingError,
    Executor,
    ExecutorConfig,
    JournalError,
    Observer,
    PlanChangedError,
    RunFailed,
    SQLiteJournal,
)
from obsdag.journal.codec import Body, Codec
from obsdag.journal.schema import sealed
from obsdag.journal.store import Store
from obsdag.testing import run_virtual
from tests.journal.images import inline, outcomes, photographed, recovered
from tests.journal.rows import open_store


def rows(path: Path) -> list[tuple[str | None, dict[str, Any]]]:
    """Outcome and data of each context in the file."""
    return [(row.outcome, Codec().decode(row.data) if row.data is not None else {}) for row in outcomes(path)]


def plus(name: str = "plus") -> DAG:
    dag = DAG(name)

    @dag.task
    async def first(ctx: Context) -> Context:
        ctx["n"] += 1
        await asyncio.sleep(1)
        return ctx

    @dag.task(after=first)
    async def second(ctx: Context) -> Context:
        ctx["n"] *= 2
        await asyncio.sleep(1)
        return ctx

    return dag


@pytest.mark.parametrize("path", [":memory:", "", "file:orders.db?mode=rwc"])
def test_a_journal_is_a_file(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        SQLiteJournal(path)
    assert str(refused.value) == (
        f"SQLiteJournal({path!r}): it is the path of a file, such as 'orders.db'; leave the journal out to keep nothing"
    )


async def test_a_real_run_and_its_file(tmp_path: Path) -> None:
    dag = DAG()

    @dag.task
    async def work(ctx: Context) -> Context:
        ctx["done"] = True
        return ctx

    executor = Executor(dag, config=ExecutorConfig(context_worker_num=4, journal=SQLiteJournal(tmp_path / "j.db")))
    result = await executor.run({"n": n} for n in range(500))
    async with executor:
        again = await executor.run([{"n": 500}])
        nothing = await executor.recover()

    assert (len(result), len(again), len(nothing)) == (500, 1, 0)
    assert sorted(data["n"] for _, data in rows(tmp_path / "j.db")) == list(range(501))
    assert {outcome for outcome, _ in rows(tmp_path / "j.db")} == {"output"}


def hang(patch: pytest.MonkeyPatch) -> threading.Event:
    """From now on commits wait for what is returned."""
    disk, commit = threading.Event(), Store.commit

    def hanging(store: Store, given: Any) -> None:
        disk.wait(60)
        commit(store, given)

    patch.setattr(Store, "commit", hanging)
    return disk


async def test_a_disk_that_hangs_holds_new_contexts_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total, pulled = 40_000, 0

    def inputs() -> Iterator[dict[str, int]]:
        nonlocal pulled
        for pulled in range(1, total + 1):
            yield {"n": pulled}

    dag, journal = DAG(), SQLiteJournal(tmp_path / "j.db")

    @dag.task
    async def work(ctx: Context) -> Context:
        return ctx

    async with Executor(dag, config=ExecutorConfig(journal=journal)) as executor:
        disk = hang(monkeypatch)
        running = asyncio.create_task(executor.run(inputs()))
        while journal.writer is None or not (journal.writer.behind or pulled == total):
            await asyncio.sleep(0)
        held_at = pulled
        for _ in range(100):
            await asyncio.sleep(0)
        try:
            assert held_at < 15_000, "what its inbox holds, and what is touched"
            assert pulled - held_at < 2_000, "those that a worker had begun with"
        finally:
            disk.set()
        result = await running

    assert len(result) == total
    assert [data["n"] for outcome, data in rows(tmp_path / "j.db") if outcome == "output"] == list(range(1, total + 1))


async def test_data_without_a_form_ends_its_context_however_slow_the_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dag = DAG()
    seen: list[int] = []

    @dag.task
    async def first(ctx: Context) -> Context:
        for _ in range(20):  # so long that two units are at the writer's
            await asyncio.sleep(0)
        if ctx["n"] == 1:
            ctx["thing"] = object()
        return ctx

    @dag.task(after=first)
    async def second(ctx: Context) -> Context:
        for _ in range(20):
            await asyncio.sleep(0)
        seen.append(ctx["n"])
        if len(seen) == 3:
            disk.set()
        return ctx

    config = ExecutorConfig(context_worker_num=1, journal=SQLiteJournal(tmp_path / "j.db"))
    async with Executor(dag, config=config) as executor:
        disk = hang(monkeypatch)
        result = await executor.run({"n": n} for n in range(4))

    assert sorted(seen) == [0, 2, 3]
    assert [type(failure.exception) for failure in result.failures] == [EncodingError]
    assert sorted(output["n"] for output in result) == [0, 2, 3]


def test_on_failure_raise_ends_a_run_by_data_without_a_form(tmp_path: Path) -> None:
    dag = DAG("raise")

    @dag.task
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(ctx["n"])
        return ctx

    async def main(**settings: Any) -> Any:
        config = ExecutorConfig(4, journal=inline(tmp_path / "j.db"), debug=True, **settings)
        return await Executor(dag, config=config).run([{"n": 1}, {"n": 100}, {"n": 2, "x": object()}])

    with pytest.raises(RunFailed) as caught:
        run_virtual(main(on_failure="raise"))
    assert [type(error) for error in caught.value.exceptions] == [EncodingError]
    assert caught.value.result is not None
    assert caught.value.result.counts["failed"] == 1
    result = run_virtual(Executor(dag, config=ExecutorConfig(journal=inline(tmp_path / "j.db"))).recover())
    assert [output["n"] for output in result] == [1, 100]  # what was cancelled is taken up


async def test_recovering_needs_a_journal() -> None:
    with pytest.raises(ConfigError, match="set ExecutorConfig"):
        await Executor(plus()).recover()


def test_what_an_early_end_cancels_goes_on_later(tmp_path: Path) -> None:
    async def main() -> None:
        executor = Executor(plus(), config=ExecutorConfig(journal=inline(tmp_path / "j.db"), context_worker_num=2))
        run = asyncio.ensure_future(executor.run([{"n": 1}, {"n": 2}, {"n": 3}]))
        await asyncio.sleep(1.5)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    run_virtual(main())
    assert [outcome for outcome, _ in rows(tmp_path / "j.db")] == [None, None]
    result = recovered(plus(), tmp_path / "j.db")
    assert sorted(output["n"] for output in result) == [4, 6]


def test_data_that_cannot_be_encoded_ends_its_own_context(tmp_path: Path) -> None:
    dag = plus()
    bad = DAG("bad")

    @bad.task
    async def spoil(ctx: Context) -> Context:
        if ctx["n"] == 1:
            ctx["lock"] = asyncio.Lock()
        await asyncio.sleep(1)
        return ctx

    @bad.task(after=spoil)
    async def after(ctx: Context) -> Context:
        await asyncio.sleep(1)
        return ctx

    async def main(dag: DAG, inputs: Any) -> Any:
        return await Executor(dag, config=ExecutorConfig(journal=inline(tmp_path / "j.db"), debug=True)).run(inputs)

    result = run_virtual(main(dag, [{"n": 1, "x": object()}, {"n": 2}]))
    assert [str(failure.exception) for failure in result.failures] == [
        "key 'x' holds a object, which the journal cannot encode; keep plain values, or allow pickling by "
        "SQLiteJournal(..., allow_pickle=True)"
    ]
    assert isinstance(result.failures[0].exception, EncodingError)
    assert [output["n"] for output in result] == [6]
    result = run_virtual(main(bad, [{"n": 1}, {"n": 2}]))
    assert "key 'lock' holds a asyncio.locks.Lock" in str(result.failures[0].exception)
    assert result.failures[0].task == "spoil"
    assert len(result) == 1
    assert [outcome for outcome, _ in rows(tmp_path / "j.db")] == ["failed", "output", "failed", "output"]


def test_data_that_two_tasks_spoil_in_one_turn_is_blamed_on_the_one_whose_key_is_told(tmp_path: Path) -> None:
    dag = DAG("worse")

    @dag.task
    async def first(ctx: Context) -> Context:
        ctx["bad"] = object()
        return ctx

    @dag.task(after=first)
    async def second(ctx: Context) -> Context:
        ctx["bad"] = None
        ctx["worse"] = object()
        return ctx

    @dag.task(after=second)
    async def third(ctx: Context) -> Context:
        await asyncio.sleep(1)
        return ctx

    config = ExecutorConfig(journal=inline(tmp_path / "j.db"))
    (failure,) = run_virtual(Executor(dag, config=config).run({})).failures
    assert (failure.task, str(failure.exception)[:18]) == ("second", "key 'worse' holds ")


def test_a_journal_that_fails_ends_the_run_and_gives_nothing_out(tmp_path: Path) -> None:
    async def main() -> list[Any]:
        given: list[Any] = []
        config = ExecutorConfig(journal=inline(tmp_path / "j.db", max_page_count=24))
        with pytest.raises(JournalError, match="the disk is full"):
            async with Executor(plus(), config=config).stream({"n": n, "x": "x" * 500} for n in range(999)) as outputs:
                async for output in outputs:
                    given.append(output["n"])
        return given

    given = run_virtual(main())
    committed = [data["n"] for outcome, data in rows(tmp_path / "j.db") if outcome == "output"]
    assert given
    assert set(given) <= set(committed)
    assert len(recovered(plus(), tmp_path / "j.db")) == len(rows(tmp_path / "j.db")) - len(committed)


# --- a changed DAG


def interrupted(path: Path, dag: DAG, after_s: float) -> None:
    """A journal whose run ended after so many virtual seconds."""

    async def main() -> None:
        executor = Executor(dag, config=ExecutorConfig(journal=inline(path), context_worker_num=9))
        run = asyncio.ensure_future(executor.run([{"n": 1}, {"n": 2}]))
        await asyncio.sleep(after_s)
        run.cancel()
        await asyncio.wait([run])

    run_virtual(main())


def renamed() -> DAG:
    dag = DAG("plus")

    @dag.task
    async def begin(ctx: Context) -> Context:
        raise AssertionError("it was done under another name")

    @dag.task(after=begin)
    async def extra(ctx: Context) -> Context:
        ctx["extra"] = True
        return ctx

    @dag.task(after=extra)
    async def second(ctx: Context) -> Context:
        ctx["n"] *= 2
        return ctx

    return dag


def test_a_changed_dag_is_refused_with_its_differences(tmp_path: Path) -> None:
    interrupted(tmp_path / "j.db", plus(), 1.5)
    with pytest.raises(PlanChangedError) as found:
        recovered(renamed(), tmp_path / "j.db")
    assert found.value.differences == (
        "task 'first' is gone",
        "task 'second' was after 'first', is after 'extra'",
        "task 'begin' is new",
        "task 'extra' is new",
    )
    with pytest.raises(PlanChangedError, match="task 'first' is gone"):
        run_virtual(Executor(renamed(), config=ExecutorConfig(journal=inline(tmp_path / "j.db"))).recover({}))


def test_a_mapping_that_names_what_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    interrupted(tmp_path / "j.db", plus(), 1.5)
    executor = Executor(renamed(), config=ExecutorConfig(journal=inline(tmp_path / "j.db")))
    with pytest.raises(PlanChangedError) as found:
        run_virtual(executor.recover({"frist": "begin", "second": "last"}))
    assert found.value.differences == (
        "task 'first' is gone",
        "task 'second' cannot be 'last': there is none",
        "there was no task 'frist' that could be 'begin'",
    )


def test_what_an_earlier_process_left_is_told_once_by_a_run_that_leaves_it_alone(tmp_path: Path) -> None:
    interrupted(tmp_path / "j.db", plus(), 1.5)
    told: list[int] = []

    class Told(Observer):
        def journal_left(self, contexts: int) -> None:
            told.append(contexts)

    async def main() -> None:
        config = ExecutorConfig(journal=inline(tmp_path / "j.db"), observers=[Told()])
        async with Executor(plus(), config=config) as executor:
            await executor.run({"n": 3})
            await executor.run({"n": 4})
        async with Executor(plus(), config=config) as executor, executor.stream({"n": 5}) as outputs:
            assert [output["n"] async for output in outputs] == [12]
        async with Executor(plus("another"), config=config) as executor:
            await executor.run({"n": 3})
        async with Executor(plus(), config=config) as executor:
            going_on = asyncio.ensure_future(executor.recover())
            await asyncio.sleep(0.5)
            await executor.run({"n": 6})
            assert len(await going_on) == 2
        async with Executor(plus(), config=config) as executor:
            await executor.run({"n": 7})

    run_virtual(main())
    assert told == [2, 2]


@contextmanager
def busy(journal: SQLiteJournal) -> Iterator[None]:
    """The journal's thread does nothing else until the block ends."""
    gate = threading.Event()
    assert journal.writer is not None
    journal.writer.call(lambda _: gate.wait(20))
    try:
        yield
    finally:
        gate.set()


async def test_a_run_that_is_cancelled_while_it_asks_what_was_left_does_not_silence_the_next(tmp_path: Path) -> None:
    await asyncio.to_thread(interrupted, tmp_path / "j.db", plus(), 1.5)
    journal, plan = SQLiteJournal(tmp_path / "j.db", durability="process"), plus().build()
    await journal.acquire()
    with busy(journal):
        asking = asyncio.ensure_future(journal.left(plan))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
    assert [await journal.left(plan), await journal.left(plan)] == [2, 0]
    await journal.release()


async def test_what_a_recovery_ends_while_it_is_asked_was_not_left(tmp_path: Path) -> None:
    await asyncio.to_thread(interrupted, tmp_path / "j.db", plus(), 1.5)
    journal, plan = SQLiteJournal(tmp_path / "j.db", durability="process"), plus().build()
    await journal.acquire()
    recorder = await journal.record(plan)
    assert journal.writer is not None
    found = journal.writer.call(lambda store: [row.key for row in store.rows("outcome IS NULL")])
    recorder.lasting.update(await asyncio.wrap_future(found))
    with busy(journal):
        asking = asyncio.ensure_future(journal.left(plan))
        await asyncio.sleep(0)
        recorder.lasting.clear()
    assert await asking == 0
    await recorder.close()
    await journal.release()


def test_a_mapping_of_tasks_carries_progress_over(tmp_path: Path) -> None:
    interrupted(tmp_path / "j.db", plus(), 1.5)
    executor = Executor(renamed(), config=ExecutorConfig(journal=inline(tmp_path / "j.db"), debug=True))
    result = run_virtual(executor.recover({"first": "begin"}))
    assert [output.to_dict() for output in result] == [{"n": 4, "extra": True}, {"n": 6, "extra": True}]


def test_another_order_of_the_same_tasks_is_no_change_once_it_is_mapped(tmp_path: Path) -> None:
    def two(order: bool) -> DAG:
        dag = DAG("two")

        async def work(ctx: Context) -> Context:
            await asyncio.sleep(1 if ctx.attempt else 0)
            ctx.update(n=ctx["n"] + 1)
            return ctx

        for name in ("a", "b") if order else ("b", "a"):
            dag.task(name=name)(work)
        return dag

    interrupted(tmp_path / "j.db", two(True), 1.5)
    result = recovered(two(False), tmp_path / "j.db")
    assert [output["n"] for output in result] == [3, 4]


# --- special tasks


def test_a_loop_goes_on_from_its_cursor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pages(with_cursor: bool) -> DAG:
        dag = DAG("pages")

        @dag.task(kind="loop")
        async def fetch(ctx: Context) -> Any:
            for page in range(ctx.get("cursor", 0), 5):
                if with_cursor:
                    ctx["cursor"] = page + 1
                await asyncio.sleep(1)
                yield ctx.create() if False else Context(None, {"n": page})

        @dag.task(after=fetch)
        async def store(ctx: Context) -> Context:
            await asyncio.sleep(3)
            return ctx

        return dag

    for with_cursor in (True, False):
        folder = tmp_path / str(with_cursor)
        folder.mkdir()
        whole, images = photographed(pages(with_cursor), [{}], folder, monkeypatch, context_worker_num=3)
        assert sorted(whole) == [0, 1, 2, 3, 4]  # type: ignore[type-var]
        for image in images:
            recovered(pages(with_cursor), image.path, context_worker_num=3)
            seen = sorted(data["n"] for outcome, data in rows(image.path) if outcome == "output")
            if not rows(image.path):
                continue
            assert set(seen) == {0, 1, 2, 3, 4}, "every item comes"
            if with_cursor:
                assert seen == [0, 1, 2, 3, 4], "and once"


def test_a_service_and_a_stream_see_their_contexts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from obsdag import StopContext

    dag = DAG("served")

    @dag.task(kind="service")
    async def serve(queue: asyncio.Queue[Any]) -> None:
        while True:
            ctx, future = await queue.get()
            if isinstance(ctx, StopContext):
                return
            await asyncio.sleep(1)
            ctx["served"] = True
            future.set_result(ctx)

    @dag.task(after=serve, kind="stream")
    async def pairs() -> Any:
        ctx = yield
        held = None
        while True:
            if held is None:
                held = ctx
                ctx.freeze()
                ctx = yield []
            else:
                first, held = held, None
                ctx = yield [first, ctx]

    inputs = [{"n": n} for n in range(4)]
    whole, images = photographed(dag, inputs, tmp_path, monkeypatch, context_worker_num=4, context_queue_timeout=1)
    assert sorted(whole) == [0, 1, 2, 3]  # type: ignore[type-var]
    for image in images:
        before = rows(image.path)
        result = recovered(dag, image.path, context_worker_num=4)
        ended = [outcome for outcome, _ in rows(image.path)]
        assert len(ended) == len(before)
        # an odd one out waits for a partner that does not come: it stalls, and says so
        assert ended.count("stalled") == len(result.stalled) == sum(not outcome for outcome, _ in before) % 2


def test_a_freeze_survives(tmp_path: Path) -> None:
    dag = DAG("frozen")

    @dag.task
    async def ask(ctx: Context) -> Context:
        ctx.freeze()
        return ctx

    @dag.task(after=ask)
    async def approved(ctx: Context) -> Context:
        raise AssertionError("nobody approved")

    interrupted(tmp_path / "j.db", dag, 1.0)
    result = recovered(dag, tmp_path / "j.db", context_queue_timeout=0.1)
    assert result.counts["stalled"] == 2


def test_every_attempt_has_the_same_idempotency_key(tmp_path: Path) -> None:
    keys: dict[int, list[str]] = {1: [], 2: []}

    def dag() -> DAG:
        made = DAG("keys")

        @made.task(retry_times=1, retry_interval=1)
        async def pay(ctx: Context) -> Context:
            keys[ctx["n"]].append(ctx.idempotency_key)
            if len(keys[ctx["n"]]) == 1:
                raise OSError("no line")
            await asyncio.sleep(5)
            return ctx

        return made

    interrupted(tmp_path / "j.db", dag(), 3)
    recovered(dag(), tmp_path / "j.db")
    assert [len(keys[1]), len(set(keys[1])), len(set(keys[1] + keys[2]))] == [3, 1, 2]


def test_a_key_that_was_asked_for_before_is_kept(tmp_path: Path) -> None:
    seen: list[str] = []
    dag = DAG("kept")

    @dag.task
    async def see(ctx: Context) -> Context:
        seen.append(ctx.idempotency_key)
        await asyncio.sleep(5)
        return ctx

    async def main(given: Context) -> None:
        executor = Executor(dag, config=ExecutorConfig(journal=inline(tmp_path / "j.db")))
        run = asyncio.ensure_future(executor.run(given))
        await asyncio.sleep(1)
        run.cancel()
        await asyncio.wait([run])

    given = Context()
    key = given.idempotency_key
    run_virtual(main(given))
    recovered(dag, tmp_path / "j.db")
    assert seen == [key, key]


def test_timers_go_by_the_clock_on_the_wall(tmp_path: Path) -> None:
    dag = DAG("timers")

    @dag.task(retry_times=1, retry_interval=3600)
    async def later(ctx: Context) -> Context:
        if ctx.attempt == 1:
            raise OSError("not yet")
        ctx["attempt"] = ctx.attempt
        return ctx

    interrupted(tmp_path / "j.db", dag, 1)

    async def main() -> float:
        executor = Executor(dag, config=ExecutorConfig(journal=inline(tmp_path / "j.db"), debug=True))
        result = await executor.recover()
        assert [output["attempt"] for output in result] == [2, 2]
        return asyncio.get_running_loop().time()

    assert 3590 < run_virtual(main()) <= 3601


def test_dead_letters_are_told_although_nothing_else_is_taken_up(tmp_path: Path) -> None:
    interrupted(tmp_path / "j.db", plus(), 0.5)
    store = open_store(tmp_path / "j.db")
    for row in list(store.rows()):
        body = msgspec.msgpack.decode(row.body, type=Body)
        body.crashes = 5
        store.commit([sealed(row._replace(body=msgspec.msgpack.encode(body))[:-1])])
    store.close()

    class Told(Observer):
        def journal_recovered(self, contexts: int, replayed: int, dead_letters: int, took_s: float) -> None:
            told.append((contexts, replayed, dead_letters))

    told: list[tuple[int, int, int]] = []
    assert recovered(plus(), tmp_path / "j.db", observers=(Told(),)).counts["failed"] == 2
    assert told == [(2, 0, 2)]


KILLER = """
import asyncio, os, sys
from obsdag import DAG, Executor, ExecutorConfig, SQLiteJournal
dag = DAG("killer")

@dag.task
async def work(ctx):
    await asyncio.sleep(0.3)  # by then it is committed that it was accepted
    if ctx["n"] == 7:
        os._exit(7)
    return ctx

async def main():
    journal = SQLiteJournal(sys.argv[1], durability="process")
    executor = Executor(dag, config=ExecutorConfig(journal=journal, context_worker_num=20))
    if sys.argv[2] == "run":
        async with executor.stream({"n": n} for n in range(20)) as outputs:
            async for output in outputs:
                pass
    result = await executor.recover()
    print(len(result), [str(failure.exception) for failure in result.failures])

asyncio.run(main())
"""


@pytest.mark.slow
def test_what_kills_the_process_again_and_again_is_set_aside(tmp_path: Path) -> None:
    path = str(tmp_path / "j.db")
    deaths, done = 0, None
    for number in range(12):
        command = [sys.executable, "-c", KILLER, path, "recover" if number else "run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == 7
        deaths += 1
    assert done is not None
    assert "was running 5 times in a row when the process died" in done.stdout
    assert done.stdout.count("when the process died") == 1
    assert deaths == 7  # two before anybody watches, and five; the innocent were cleared
    assert [data["n"] for outcome, data in rows(tmp_path / "j.db") if outcome == "failed"] == [7]


def test_recovered_contexts_keep_their_ids_and_parents(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []
    dag = DAG("names")

    @dag.task(kind="map")
    async def spread(ctx: Context) -> Any:
        return [ctx.create_child(name=f"part-{number}") for number in range(2)]

    @dag.task(after=spread)
    async def work(ctx: Context) -> Context:
        assert ctx.parent is not None
        seen.append((ctx.id, ctx.parent.id))
        await asyncio.sleep(5)
        return ctx

    async def main() -> None:
        executor = Executor(dag, config=ExecutorConfig(journal=inline(tmp_path / "j.db"), context_worker_num=4))
        run = asyncio.ensure_future(executor.run(Context(name="order-7")))
        await asyncio.sleep(1)
        run.cancel()
        await asyncio.wait([run])

    run_virtual(main())
    recovered(dag, tmp_path / "j.db")
    assert sorted(seen) == [("part-0", "order-7")] * 2 + [("part-1", "order-7")] * 2


def test_the_plan_is_in_the_file_to_be_read(tmp_path: Path) -> None:
    interrupted(tmp_path / "j.db", plus(), 0.5)
    store = Store(str(tmp_path / "j.db"), look=True)
    store.open()
    (_, dag, tasks) = store.plans()[1]
    store.close()
    assert dag == "plus"
    assert [name for name, *_ in json.loads(tasks)][1:-1] == ["first", "second"]


def test_what_is_only_kept_readable_has_its_outcome_once(tmp_path: Path) -> None:
    dag = DAG("kept readable")

    @dag.task(may_drop=True)
    async def drop(ctx: Context) -> Context | None:
        return None if ctx["n"] else ctx

    @dag.task(after=drop)
    async def slow(ctx: Context) -> Context:
        await asyncio.sleep(5)
        return ctx

    async def main() -> None:
        config = ExecutorConfig(
            journal=inline(tmp_path / "j.db"), enable_context_gc=False, context_worker_num=2, debug=True
        )
        run = asyncio.ensure_future(Executor(dag, config=config).run([{"n": 0}, {"n": 1}]))
        await asyncio.sleep(1)
        assert [outcome for outcome, _ in rows_of_living(config)] == [None, "dropped"]
        await run

    def rows_of_living(config: ExecutorConfig) -> list[tuple[str | None, int]]:
        assert config.journal is not None
        return [(row.outcome, row.key) for row in config.journal.writer.store.rows()]

    run_virtual(main())
    assert [(outcome, data["n"]) for outcome, data in rows(tmp_path / "j.db")] == [("output", 0), ("dropped", 1)]


def test_metrics_tell_of_commits_and_of_what_was_taken_up(tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry

    from obsdag import Telemetry

    interrupted(tmp_path / "j.db", plus(), 1.5)
    registry = CollectorRegistry()
    telemetry = Telemetry(engine="e", registry=registry)
    config = ExecutorConfig(journal=inline(tmp_path / "j.db"), telemetry=telemetry)
    run_virtual(Executor(plus(), config=config).recover())

    def value(name: str) -> float | None:
        return registry.get_sample_value(name, {"engine": "e", "dag": "plus"})

    assert value("obsdag_journal_recovered_total") == 2
    assert value("obsdag_journal_replayed_total") == 2
    assert value("obsdag_journal_dead_letters_total") == 0
    assert value("obsdag_journal_inbox_rows") == 0
    assert (value("obsdag_journal_rows_total") or 0) >= 2
    assert (value("obsdag_journal_commit_seconds_count") or 0) >= 1
