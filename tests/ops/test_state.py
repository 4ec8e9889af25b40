"""What is read of a running engine: whole, balanced, from any thread, and without the users' data."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from obsdag import DAG, ConfigError, Context, Executor, ExecutorConfig, Telemetry, Tracing
from obsdag.core.states import OUTCOMES
from obsdag.ops import create_app
from obsdag.ops.feed import Feed
from obsdag.ops.state import COLUMNS, Reader
from obsdag.ops.watch import Watch
from tests.ops.scenes import orders, steady, telemetry, wide
from tests.ops.web import goes_on, one_task, service


def reader_of(executor: Executor) -> Reader:
    return Reader(Watch(executor))


def numbers(reader: Reader, rows: list[list[Any]], task: str) -> dict[str, Any]:
    place = [node["id"] for node in reader.graph].index(task)
    return dict(zip(COLUMNS, rows[place], strict=True))


async def test_before_during_and_after_a_run() -> None:
    gate, inside = asyncio.Event(), asyncio.Event()

    async def waits(ctx: Context) -> Context:
        inside.set()
        await gate.wait()
        return ctx

    executor = Executor(one_task(waits), config=ExecutorConfig(telemetry=telemetry()))
    reader = reader_of(executor)
    before, _ = reader.read()
    running = asyncio.ensure_future(executor.run([{}, {}]))
    await inside.wait()
    during, rows = reader.read()
    gate.set()
    await running
    after, last = reader.read()

    assert (before["phase"], before["runs"], before["living"]) == ("idle", 0, 0)
    assert before["findings"] == [("good", "Idle: nothing has run yet", "")]
    assert (during["phase"], during["runs"], during["workers"]["busy"]) == ("running", 1, 1)
    assert numbers(reader, rows, "waits")["running"] == 1
    (worker,) = during["workers"]["doing"]
    assert worker["tasks"] == ["waits"]
    assert (after["phase"], after["living"], after["counts"]["output"]) == ("idle", 0, 2)
    assert after["last_run"]["outcome"] == "ok"
    assert numbers(reader, last, "waits")["executions"] == 2


async def test_rates_means_and_quantiles_are_of_the_last_seconds() -> None:
    async def sleeps(ctx: Context) -> Context:
        await asyncio.sleep(0.02)
        return ctx

    executor = service(one_task(sleeps))
    reader = reader_of(executor)
    async with executor:
        reader.read()
        await asyncio.gather(*(executor.execute({}) for _ in range(100)))  # half a second of real time, four at once
        state, rows = reader.read()

    found = numbers(reader, rows, "sleeps")
    assert 20 < found["rate"] < 250
    assert 0.019 < found["mean_s"] < 0.5
    assert 0.01 < found["p95_s"] < 1.0
    assert 20 < state["rate"]["ended"] < 250
    assert state["floor_s"] == 0.001


async def test_a_block_that_becomes_longer_is_one_event() -> None:
    async def blocks(ctx: Context) -> Context:
        time.sleep(1.2)  # noqa: ASYNC251 - the mistake that this is about
        return ctx

    executor = service(one_task(blocks))
    reader = reader_of(executor)
    async with executor:
        await executor.execute({}, id="slow")
        state, _ = reader.read()

    (event,) = [each for each in state["events"] if each["event"] == "event loop blocked"]
    assert re.fullmatch(r"for [01]\.\d s, by task 'blocks' on slow", event["text"])
    assert "time.sleep(1.2)" in event["detail"]


async def test_a_watch_that_comes_late_sees_what_follows_and_goes_without_a_trace() -> None:
    async def fails(ctx: Context) -> Context:
        raise ValueError("no such order")

    executor = service(one_task(fails))
    own = executor.config.observers
    async with executor:
        first = await executor.submit({})
        await asyncio.wait_for(first._ended(), 5)
        reader = reader_of(executor)
        await asyncio.sleep(0)  # the run's own thread takes it in
        second = await executor.submit({}, id="late")
        await asyncio.wait_for(second._ended(), 5)
        state, rows = reader.read()
        reader.watch.close()
        assert executor.config.observers == own

    assert [each["context"] for each in state["failures"]] == ["late"]
    assert state["counts"]["failed"] == 2
    assert numbers(reader, rows, "fails")["failed"] == 1
    assert state["findings"][0][0] == "bad"


async def test_users_data_is_nowhere_and_texts_are_redacted_and_cut() -> None:
    async def fails(ctx: Context) -> Context:
        raise ValueError(f"card {ctx['card']} refused " + "x" * 2_000)

    told = Telemetry(
        "shop", CollectorRegistry(), Tracing(mode="off"), logs=False, redact=lambda text: text.replace("4111", "[card]")
    )
    executor = service(one_task(fails), telemetry=told)
    reader = reader_of(executor)
    async with executor:
        ticket = await executor.submit({"card": "4111", "name": "Ada"})
        await asyncio.wait_for(ticket._ended(), 5)
        state, rows = reader.read()

    text = json.dumps([state, rows])
    assert "4111" not in text
    assert "Ada" not in text
    (failure,) = state["failures"]
    assert failure["message"].startswith("card [card] refused x")
    assert len(failure["message"]) == 500


async def test_a_redaction_that_raises_shows_nothing() -> None:
    def broken(text: str) -> str:
        raise RuntimeError

    async def fails(ctx: Context) -> Context:
        raise ValueError("secret")

    told = Telemetry("shop", CollectorRegistry(), Tracing(mode="off"), logs=False, redact=broken)
    executor = service(one_task(fails), telemetry=told)
    reader = reader_of(executor)
    async with executor:
        ticket = await executor.submit({})
        await asyncio.wait_for(ticket._ended(), 5)

    assert "secret" not in json.dumps(reader.read())


async def test_reading_from_a_thread_while_the_engine_runs_is_always_whole() -> None:
    found: list[dict[str, Any]] = []
    stop = threading.Event()
    dag = DAG("branches")

    @dag.map
    async def spread(ctx: Context) -> Any:
        for _ in range(3):
            yield ctx.create_child()

    dag.task(name="work", after=[spread], retry_times=1)(goes_on)

    @dag.join(after="work")
    async def gather(ctx: Context, children: list[Context]) -> Context:
        return ctx

    executor = Executor(dag, config=ExecutorConfig(context_worker_num=8, max_live_contexts=500, telemetry=telemetry()))
    feed = Feed([reader_of(executor)], 0.1, {})

    def read() -> None:
        while not stop.is_set():
            feed._last = feed._last._replace(at=float("-inf"))  # each look is a new one
            found.append(json.loads(feed.full())["executors"][0]["state"])

    thread = threading.Thread(target=read)
    thread.start()
    try:
        result = await executor.run({} for _ in range(600))
    finally:
        stop.set()
        thread.join()

    assert result.counts["output"] == 600
    assert len(found) > 3
    for state in found:
        assert state["unreadable"] == []
        assert state["unaccounted"] == 0
        assert state["counts"]["entered"] == state["living"] + sum(state["counts"][name] for name in OUTCOMES)


async def test_a_stream_is_one_full_event_and_then_what_changed() -> None:
    executor = Executor(wide(300), config=ExecutorConfig(telemetry=telemetry()))
    feed = Feed([reader_of(executor)], 0.1, {"version": "x"})
    events = feed.events()
    first = await anext(events)
    await anext(events)
    idle = await anext(events)
    await executor.run([{}])
    after = await anext(events)
    await events.aclose()

    kind, _, data = first.partition(b"\n")
    full = json.loads(data.removeprefix(b"data: "))
    assert kind == b"event: full"
    assert first.endswith(b"\n\n")
    assert first.count(b"\n") == 3, "one line of data"
    assert (full["columns"], len(full["executors"][0]["graph"])) == (list(COLUMNS), 300)
    assert idle.startswith(b"event: tick\n")
    assert _changed(idle) == 0
    assert _changed(after) == 300


def _changed(event: bytes) -> int:
    return len(json.loads(event.partition(b"data: ")[2])["executors"][0]["rows"])


async def test_limits_timers_pools_and_kept_traces_are_shown() -> None:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    tracing = {"mode": "deferred", "processors": [SimpleSpanProcessor(InMemorySpanExporter())], "sample": 1.0}
    async with steady(orders(), telemetry=telemetry(**tracing)) as executor:
        reader = reader_of(executor)
        for n in range(30):
            await executor.submit({"flaky": True, "lines": 1, "n": n})
        seen: dict[str, Any] = {}
        for _ in range(100):
            await asyncio.sleep(0.05)
            state, _ = reader.read()
            for name in ("limits", "pools", "traces", "slowest"):
                seen.setdefault(name, None)
                seen[name] = state[name] or seen[name]
            if state["timers"]["armed"]:
                seen["timers"] = state["timers"]
            if all(seen.values()) and "timers" in seen:
                break

    assert {each["name"] for each in seen["limits"]} == {"catalog API", "stock database"}
    assert seen["pools"][0]["pool"] == "thread"
    assert len(seen["traces"][0]["trace_id"]) == 32
    assert seen["timers"]["next_in_s"] is None or seen["timers"]["next_in_s"] >= 0
    assert all(each["trace_id"] for each in seen["slowest"])


def test_settings_that_cannot_be_used_are_refused_by_name() -> None:
    executor = service(one_task(goes_on))
    for options, expected in (
        ({"interval_s": 0}, "interval_s must be"),
        ({"interval_s": True}, "interval_s must be"),
        ({"max_streams": -1}, "max_streams must be"),
        ({"jaeger_url": "javascript:alert(1)"}, "jaeger_url must be"),
        ({"jaeger_url": "http://x\n"}, "jaeger_url must be"),
        ({"allowed_hosts": "localhost"}, "write \\['localhost'\\]"),
        ({"allowed_hosts": [""]}, "host names without a port"),
    ):
        with pytest.raises(ConfigError, match=expected):
            create_app(executor, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes executors"):
        create_app("orders")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="several registries"):
        create_app(executor, service(one_task(goes_on)))
