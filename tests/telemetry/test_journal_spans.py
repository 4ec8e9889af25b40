"""Spans of the journal's own: a recovery, slow commits, the one that failed for good; in a real file, both modes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from obsdag import DAG, Context, Executor, ExecutorConfig, JournalError, SQLiteJournal
from obsdag.journal.store import Store
from obsdag.telemetry.journal_specs import JOURNAL_SPANS
from obsdag.telemetry.tracing import Tracing
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.telemetry.corerun import CoreRun
from tests.telemetry.tracing_helpers import Collected, check_shape, telemetry_of


def orders(stuck: bool = False) -> DAG:
    dag = DAG("orders")

    @dag.task
    async def pay(ctx: Context) -> Context:
        if stuck:
            await asyncio.Event().wait()
        return ctx

    return dag


def executor_of(path: Path, tracing: Tracing, dag: DAG | None = None) -> Executor:
    journal = SQLiteJournal(path, durability="process")
    config = ExecutorConfig(telemetry=telemetry_of(tracing), journal=journal, context_worker_num=4)
    return Executor(dag or orders(), config=config)


async def interrupt(path: Path, tracing: Tracing) -> None:
    """Leaves three contexts in the file."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await executor_of(path, tracing, orders(stuck=True)).run([{} for _ in range(3)])


@pytest.fixture(params=["deferred", "live"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Collected, Tracing]]:
    """Where spans arrive, and the tracing that sends them there; by itself it keeps no trace."""
    collected = Collected()
    if request.param == "deferred":
        yield collected, Tracing([collected], sample=0.0)
        return
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(collected)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield collected, Tracing()


def declared(span: ReceivedSpan) -> None:
    spec = next(spec for spec in JOURNAL_SPANS if spec.name == span.name)
    assert set(span.attributes) <= set(spec.attributes)
    assert span.kind == spec.kind


async def test_a_recovery(tmp_path: Path, kept: tuple[Collected, Tracing]) -> None:
    collected, tracing = kept
    await interrupt(tmp_path / "j.db", Tracing(mode="off"))
    await executor_of(tmp_path / "j.db", tracing).recover()
    await tracing.flush()

    span, run = collected.one("journal recover"), collected.one("run orders")
    declared(span)
    assert span.parent_id == run.span_id
    assert span.trace_id == run.trace_id
    assert run.start_ns <= span.start_ns <= span.end_ns <= run.end_ns
    took_s = span.attributes.pop("obsdag.journal.took_s")
    assert 0 < took_s < 10
    assert span.attributes == {
        "obsdag.engine": "test",
        "obsdag.dag": "orders",
        "obsdag.journal.contexts": 3,
        "obsdag.journal.replayed": 3,
        "obsdag.journal.dead_letters": 0,
    }
    assert span.status == "UNSET"


async def test_ordinary_commits_have_none(tmp_path: Path) -> None:
    collected = Collected()
    tracing = Tracing([collected], sample=0.0)
    await executor_of(tmp_path / "j.db", tracing).run([{} for _ in range(50)])
    await tracing.flush()
    assert collected.spans == []


async def test_a_commit_that_was_slow(
    tmp_path: Path, kept: tuple[Collected, Tracing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses four times, so that the writer's pauses make it slow."""
    collected, tracing = kept
    commit, refusals = Store.commit, [None] * 4

    def reluctant(store: Store, rows: list[object]) -> None:
        if refusals:
            refusals.pop()
            raise JournalError("the disk is busy")
        commit(store, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "commit", reluctant)
    result = await executor_of(tmp_path / "j.db", tracing).run([{} for _ in range(3)])
    await tracing.flush()

    span, run = collected.one("journal commit"), collected.one("run orders")
    declared(span)
    check_shape(collected.spans)
    assert len(result) == 3
    assert span.parent_id == run.span_id
    assert run.start_ns <= span.start_ns
    assert span.end_ns <= run.end_ns
    assert (span.end_ns - span.start_ns) * 1e-9 >= 0.1
    assert span.attributes["obsdag.journal.rows"] >= 1
    assert span.attributes["obsdag.journal.left_out"] == 0
    assert span.status == "UNSET"


async def test_a_commit_that_failed_for_good(
    tmp_path: Path, kept: tuple[Collected, Tracing], monkeypatch: pytest.MonkeyPatch
) -> None:
    collected, tracing = kept

    def refused(store: Store, rows: list[object]) -> None:
        raise JournalError("the disk is full")

    monkeypatch.setattr(Store, "commit", refused)
    with pytest.raises(JournalError, match="the disk is full"):
        await executor_of(tmp_path / "j.db", tracing).run([{} for _ in range(3)])
    await tracing.flush()

    span = collected.one("journal commit")
    declared(span)
    assert span.parent_id == collected.one("run orders").span_id
    assert (span.status, span.attributes["error.type"]) == ("ERROR", "obsdag.errors.JournalError")
    assert span.attributes["obsdag.journal.rows"] >= 1
    assert (span.end_ns - span.start_ns) * 1e-9 >= 0.5, "six pauses"
    ((name, told, _),) = span.events
    assert name == "exception"
    assert told["exception.message"] == "the disk is full"


def test_slow_commits_have_one_a_second_and_say_how_many_had_none(tmp_path: Path) -> None:
    collected = Collected()
    tracing = Tracing([collected], sample=0.0)
    run = CoreRun(journal=SQLiteJournal(tmp_path / "j.db"))
    run.observe(*tracing.observers(run.state, engine="test"))
    for _ in range(25):
        run.now += 0.125
        run.tell("journal_committed", 8, 0.2, 3)
    tracing.flush_sync()
    assert [span.attributes["obsdag.journal.left_out"] for span in collected.named("journal commit")] == [0, 7, 7, 7]


async def test_a_receiver_gets_them(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'obsdag[otlp]'")
    await interrupt(tmp_path / "j.db", Tracing(mode="off"))
    with OtlpReceiver() as receiver:
        tracing = Tracing.otlp(receiver.endpoint, sample=0.0)
        await executor_of(tmp_path / "j.db", tracing).recover()
        await tracing.flush()
        names = {span.name for span in receiver.spans}
    assert {"journal recover", "run orders"} <= names
