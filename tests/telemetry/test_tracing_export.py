"""Out of the process: a collector that is down, slow or hangs never delays or changes a run (TELEMETRY 1, 2)."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from obsdag import DAG, ConfigError, Context
from obsdag.telemetry.export import QueueProcessor
from obsdag.telemetry.tracing import Tracing, count_drops
from tests.otlp_receiver import OtlpReceiver
from tests.telemetry.tracing_helpers import Collected, run_traced, telemetry_of


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The official exporters log their failures; here they are meant."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def dag_of(name: str = "dag") -> DAG:
    dag = DAG(name)

    @dag.task
    async def step(ctx: Context) -> Context:
        if ctx.get("n", 0) % 2:
            raise ValueError("odd")
        return ctx

    return dag


async def outcome_of(
    tracing: Tracing, flush_s: float = 0.0
) -> tuple[dict[str, int], dict[tuple[str, str], int], float]:
    """Counts of a run of ten contexts, what telemetry lost, and the seconds that the run took without its flush."""
    telemetry = telemetry_of(tracing)
    telemetry._no_flush_before = float("inf")  # no flush by the run itself
    began = time.monotonic()
    result = await run_traced(dag_of(), [{"n": n} for n in range(10)], tracing=tracing, telemetry=telemetry)
    took_s = time.monotonic() - began
    if flush_s:
        await tracing.flush(flush_s)
    return dict(result.counts), telemetry.stats.dropped, took_s


PLAIN = {"entered": 10, "output": 5, "split": 0, "merged": 0, "dropped": 0, "failed": 5, "cancelled": 0, "stalled": 0}


@pytest.mark.leaves("files", "grpc keeps its poller's descriptors for the process")
@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("mode", ["error", "refuse"])
async def test_a_collector_that_refuses_changes_nothing_and_every_span_is_counted(protocol: str, mode: str) -> None:
    with OtlpReceiver(protocol, mode="error" if protocol == "grpc" else mode) as receiver:
        tracing = Tracing.otlp(receiver.endpoint, protocol=protocol, sample=1.0)
        counts, dropped, _ = await outcome_of(tracing)
        receiver.wait_requests(1)
        tracing.shutdown(0.2)

    assert counts == PLAIN
    assert await asyncio.to_thread(_settles, dropped, 10 + 10 + 1)  # contexts, executions, the run


@pytest.mark.leaves("files", "grpc keeps its poller's descriptors for the process")
@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_no_collector_at_all(protocol: str) -> None:
    with OtlpReceiver(protocol) as receiver:
        endpoint = receiver.endpoint  # a port that nobody listens on any more
    tracing = Tracing.otlp(endpoint, protocol=protocol, sample=1.0)

    counts, dropped, _ = await outcome_of(tracing)
    await tracing.flush(0.3)
    tracing.shutdown(1.0)

    assert counts == PLAIN
    assert await asyncio.to_thread(_settles, dropped, 21)


def _settles(dropped: dict[tuple[str, str], int], lost: int) -> bool:
    """Whether all spans are counted as lost before long: an export under way ends after its shutdown."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if sum(count for (signal, _), count in dropped.items() if signal == "traces") == lost:
            return True
        time.sleep(0.01)
    return False


async def test_a_collector_that_hangs_delays_a_flush_until_its_deadline_and_nothing_else() -> None:
    with OtlpReceiver(mode="hang") as receiver:
        tracing = Tracing.otlp(receiver.endpoint, sample=1.0)
        counts, _, took_s = await outcome_of(tracing)
        receiver.wait_requests(1)
        began = time.monotonic()
        flushed = await tracing.flush(0.3)
        flush_s = time.monotonic() - began

    tracing.shutdown(1.0)
    assert counts == PLAIN
    assert flushed is False
    assert flush_s < 2.0
    assert took_s < 2.0


async def test_closing_with_a_collector_that_hangs_takes_two_seconds_and_counts_every_span() -> None:
    with OtlpReceiver(mode="hang") as receiver:
        tracing = Tracing.otlp(receiver.endpoint, sample=1.0)
        telemetry = telemetry_of(tracing)
        telemetry._no_flush_before = float("inf")
        await run_traced(dag_of(), [{"n": n} for n in range(10)], tracing=tracing, telemetry=telemetry)
        began = time.monotonic()
        assert await telemetry.close() is False
        took_s = time.monotonic() - began

        assert took_s < 2.2
        assert telemetry.stats.dropped["traces", "shutdown"] == 21


async def test_a_slow_collector_gets_everything() -> None:
    with OtlpReceiver(mode="slow", delay_s=0.2) as receiver:
        tracing = Tracing.otlp(receiver.endpoint, sample=1.0)
        counts, dropped, _ = await outcome_of(tracing, flush_s=5.0)
        spans = receiver.spans

    assert counts == PLAIN
    assert len(spans) == 21
    assert not any(dropped.values())


async def test_a_collector_that_comes_back_gets_what_is_kept_from_then_on() -> None:
    with OtlpReceiver(mode="error") as receiver:
        tracing = Tracing.otlp(receiver.endpoint, sample=1.0)
        _, dropped, _ = await outcome_of(tracing, flush_s=10.0)
        receiver.mode = "ok"
        await outcome_of(tracing, flush_s=5.0)
        assert len(receiver.spans) == 21

    assert dropped["traces", "export_failed"] == 21


class Hanging(SpanProcessor):
    """A user's processor that blocks in everything it is asked, until told otherwise."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.entered = threading.Event()

    def on_end(self, span: ReadableSpan) -> None:
        self.entered.set()
        self.release.wait(10)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        self.release.wait(10)
        return True


async def test_a_processor_that_blocks_does_not_block_the_run() -> None:
    hanging = Hanging()
    tracing = Tracing([hanging], sample=1.0)

    counts, _, _ = await outcome_of(tracing)
    assert await asyncio.to_thread(hanging.entered.wait, 5)
    flushed = await tracing.flush(0.1)
    hanging.release.set()

    assert counts == PLAIN
    assert flushed is False
    assert await tracing.flush(5.0) is True


async def test_what_was_kept_during_another_flush_is_exported_by_the_next() -> None:
    class Collecting(Collected):
        entered, release = threading.Event(), threading.Event()

        def force_flush(self, timeout_millis: int = 30000) -> bool:
            self.entered.set()
            return self.release.wait(10)

    kept, told = Collecting(), []
    tracing = Tracing([kept], sample=1.0)
    telemetry = telemetry_of(tracing)
    telemetry._no_flush_before = float("inf")
    ended = threading.Event()

    def done(in_time: bool) -> None:
        told.append((in_time, len(kept.named("context dag"))))
        if len(told) == 2:
            ended.set()

    await run_traced(dag_of(), [{"n": 1}], tracing=tracing, telemetry=telemetry)
    tracing._pipeline.begin_flush(10.0, done)
    assert await asyncio.to_thread(kept.entered.wait, 5)
    await run_traced(dag_of(), [{"n": 2}], tracing=tracing, telemetry=telemetry)
    tracing._pipeline.begin_flush(10.0, done)
    kept.release.set()
    assert await asyncio.to_thread(ended.wait, 5)

    assert told == [(True, 1), (True, 2)]


async def test_a_blocked_processor_lets_the_buffer_run_full_and_no_further() -> None:
    hanging = Hanging()
    tracing = Tracing([hanging], sample=1.0, max_buffered_spans=50, keep_budget_per_s=10_000)
    telemetry = telemetry_of(tracing)
    telemetry._no_flush_before = float("inf")

    for _ in range(20):
        await run_traced(dag_of(), [{"n": n} for n in range(50)], tracing=tracing, telemetry=telemetry)
    buffered, lost = telemetry.stats.gauge("spans_buffered"), telemetry.stats.dropped["traces", "buffer_cap"]
    hanging.release.set()
    await tracing.flush(5.0)

    assert lost > 0
    assert buffered <= 50 + 105 + 2 * 50  # the cap, the reserve for failures, and the debt of the roots of one run
    assert telemetry.stats.gauge("spans_buffered") == 0


async def test_a_processor_that_raises_does_not_keep_spans_from_the_others() -> None:
    class Raising(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            raise RuntimeError("broken processor")

        def force_flush(self, timeout_millis: int = 30000) -> bool:
            raise RuntimeError("broken flush")

    kept = Collected()
    counts, _, _ = await outcome_of(Tracing([Raising(), kept], sample=1.0), flush_s=5.0)

    assert counts == PLAIN
    assert len(kept.spans) == 21


# --- the queue


class Gate(SpanExporter):
    """Exports when it is let."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.entered = threading.Event()
        self.batches: list[int] = []
        self.result = SpanExportResult.SUCCESS

    def export(self, spans: Any) -> SpanExportResult:
        self.entered.set()
        self.release.wait(10)
        self.batches.append(len(spans))
        return self.result


def span_of(number: int) -> ReadableSpan:
    context = trace.SpanContext(1, number + 1, False, trace.TraceFlags(1))
    return ReadableSpan(f"span {number}", context=context, resource=Resource.get_empty(), start_time=1, end_time=2)


def test_a_full_queue_loses_the_newest_and_counts_them() -> None:
    gate = Gate()
    queue = QueueProcessor(gate, queue_spans=10, batch_spans=5, delay_s=0.01)
    for number in range(5):
        queue.on_end(span_of(number))
    assert gate.entered.wait(5)
    for number in range(30):
        queue.on_end(span_of(number))
    gate.release.set()
    assert queue.force_flush(5_000)

    assert sum(gate.batches) == 15
    assert queue.counts.dropped == {"queue_full": 20}


def test_what_is_queued_at_shutdown_is_counted_once() -> None:
    gate = Gate()
    queue = QueueProcessor(gate, delay_s=0.01)
    queue.on_end(span_of(0))
    assert gate.entered.wait(5)
    for number in range(4):
        queue.on_end(span_of(number))
    queue.shutdown()
    queue.on_end(span_of(9))
    gate.release.set()

    assert queue.counts.dropped == {"shutdown": 6}  # one under way, four that wait, one too late


def test_unsampled_spans_are_not_queued() -> None:
    queue = QueueProcessor(Gate(), delay_s=0.01)
    unsampled = trace.SpanContext(1, 1, False, trace.TraceFlags(0))
    queue.on_end(ReadableSpan("no", context=unsampled, resource=Resource.get_empty()))

    assert queue._thread is None


def test_counting_an_exporter_that_fails_or_raises() -> None:
    class Raising(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            raise RuntimeError

    counting = count_drops(Raising())

    assert counting.export([span_of(0), span_of(1)]) is SpanExportResult.FAILURE
    assert counting.dropped == {"export_failed": 2}
    assert count_drops(InMemorySpanExporter()).export([span_of(0)]) is SpanExportResult.SUCCESS


@pytest.mark.parametrize("processor", [SimpleSpanProcessor, BatchSpanProcessor])
async def test_a_users_exporter_is_counted_by_the_engine_that_uses_it(processor: Any) -> None:
    gate = Gate()
    gate.release.set()
    gate.result = SpanExportResult.FAILURE
    used = processor(count_drops(gate))

    _, dropped, _ = await outcome_of(Tracing([used], sample=1.0), flush_s=5.0)
    used.shutdown()

    assert dropped["traces", "export_failed"] == 21


# --- the end of a process


PROGRAM = """
import asyncio, sys
from obsdag import DAG, Executor, ExecutorConfig
from obsdag.telemetry import Telemetry
from obsdag.telemetry.tracing import Tracing

dag = DAG("short")

@dag.task
async def step(ctx):
    ctx.keep_trace()
    return ctx

@dag.task(after=step)
async def leave(ctx):
    if sys.argv[2] == "exit":
        sys.exit(0)
    return ctx

tracing = Tracing.otlp(sys.argv[1], sample=0.0)
config = ExecutorConfig(telemetry=Telemetry(tracing=tracing, logs=False))
asyncio.run(Executor(dag, config=config).run())
"""


@pytest.mark.parametrize("ending", ["return", "exit"])
def test_a_program_that_ends_exports_what_it_kept(ending: str) -> None:
    with OtlpReceiver() as receiver:
        subprocess.run([sys.executable, "-c", PROGRAM, receiver.endpoint, ending], check=True, timeout=60)
        names = {span.name for span in receiver.spans}

    assert {"execute step", "context short"} <= names


def test_a_program_ends_in_time_when_the_collector_hangs() -> None:
    with OtlpReceiver(mode="hang") as receiver:
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", PROGRAM, receiver.endpoint, "return"], check=True, timeout=60)
        took_s = time.monotonic() - began

    assert (
        took_s < 9.0
    )  # not the exporter's 10 s: 2 s for the run's flush, 2 s at exit, and the start of an interpreter


# --- settings


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "sometimes"}, "mode"),
        ({"mode": "deferred"}, "mode"),
        ({"sample": 1.5}, "sample"),
        ({"sample": True}, "sample"),
        ({"sample": float("nan")}, "sample"),
        ({"slow_after": -1}, "slow_after"),
        ({"slow_after": "p50"}, "slow_after"),
        ({"follow_parent": 1}, "follow_parent"),
        ({"max_spans_per_trace": 0}, "max_spans_per_trace"),
        ({"max_buffered_spans": 1.5}, "max_buffered_spans"),
        ({"max_buffered_bytes": 100}, "max_buffered_bytes"),
        ({"keep_budget_per_s": 0}, "keep_budget_per_s"),
        ({"processors": [object()]}, "processors"),
        ({"processors": Collected()}, "processors"),
        ({"processors": 3}, "processors"),
    ],
)
def test_bad_settings_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^Tracing\.{named}") as caught:
        Tracing(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"protocol": "udp"}, "protocol"), ({"endpoint": "localhost:4318"}, "endpoint"), ({"endpoint": 4318}, "endpoint")],
)
def test_bad_otlp_settings_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Tracing.otlp(**options)


@pytest.mark.parametrize("path", ["", "/", "/v1/traces"])
async def test_the_signal_path_is_appended_once(path: str) -> None:
    with OtlpReceiver() as receiver:
        await outcome_of(Tracing.otlp(f"{receiver.endpoint}{path}", sample=1.0), flush_s=5.0)

        assert len(receiver.spans) == 21


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
async def test_the_environment_names_the_collector(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with OtlpReceiver() as receiver:
        suffix = "/v1/traces" if "TRACES" in name else ""
        monkeypatch.setenv(name, receiver.endpoint + suffix)
        await outcome_of(Tracing.otlp(sample=1.0), flush_s=5.0)

        assert len(receiver.spans) == 21


@pytest.mark.leaves("files", "grpc keeps its poller's descriptors for the process")
async def test_the_environment_chooses_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    with OtlpReceiver("grpc") as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        tracing = Tracing.otlp(receiver.endpoint, sample=1.0)
        await outcome_of(tracing, flush_s=5.0)
        tracing.shutdown()

        assert len(receiver.spans) == 21


def test_the_environment_sets_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "7")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "250")
    (queue,) = Tracing.otlp("http://localhost:1").processors

    assert (queue._most, queue._delay_s) == (7, 0.25)  # type: ignore[attr-defined]

    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "many")
    with pytest.raises(ConfigError, match="OTEL_BSP_MAX_QUEUE_SIZE"):
        Tracing.otlp("http://localhost:1")


def test_a_disabled_sdk_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")

    assert Tracing.otlp("http://localhost:1").resolved_mode() == "off"


async def service_of(tracing: Tracing) -> dict[str, Any]:
    kept = tracing.processors[0]
    assert isinstance(kept, Collected)
    await outcome_of(tracing, flush_s=5.0)
    return kept.spans[0].resource


async def test_the_service_is_named_after_the_engine_unless_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (await service_of(Tracing([Collected()], sample=1.0)))["service.name"] == "test"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "from-environment")
    assert (await service_of(Tracing([Collected()], sample=1.0)))["service.name"] == "from-environment"


async def test_the_service_name_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "from-environment")
    with OtlpReceiver() as receiver:
        tracing = Tracing.otlp(receiver.endpoint, service_name="orders", resource={"region": "eu"}, sample=1.0)
        await outcome_of(tracing, flush_s=5.0)
        resource = receiver.spans[0].resource

    assert (resource["service.name"], resource["region"]) == ("orders", "eu")
    assert resource["telemetry.sdk.language"] == "python"


def test_auto_is_deferred_with_processors_and_off_without_a_provider() -> None:
    assert Tracing([Collected()]).resolved_mode() == "deferred"
    assert Tracing().resolved_mode() == "off"
    assert Tracing([Collected()], mode="off").resolved_mode() == "off"
