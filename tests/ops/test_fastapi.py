"""The FastAPI example as people start it: uvicorn, real requests, real load, real signals."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.servers import Prometheus, _free_port, _process, missing, request, until
from tests.ops.load import WRK, Service, Tally, example, load
from tests.ops.web import Seen, ask
from tests.otlp_receiver import OtlpReceiver

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        None in (importlib.util.find_spec("fastapi"), importlib.util.find_spec("uvicorn")),
        reason="no web framework: pip install '.[dev]'",
    ),
]
needs_wrk = pytest.mark.skipif(WRK is None, reason="no load generator: apt-get install wrk")

ORDER = json.dumps({"items": ["tea", "honey"]}).encode()
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def quote(service: Service, body: bytes = ORDER, **headers: str) -> Seen:
    return ask(f"{service.url}/quotes", "POST", body, Content_Type="application/json", **headers)


def only(service: Service) -> dict[str, Any]:
    """What the one process has counted; nothing may be left in it."""
    (counts,) = service.counts()
    assert counts["phase"] == "stopped"
    assert counts["in_flight"] == counts["pending"] == counts["unfetched"] == 0
    assert sum(counts["begun"].values()) == sum(counts["answered"].values())
    assert counts["manifest"]["cancelled"] == counts["manifest"]["abandoned"] == []
    return counts


def test_quotes_mistakes_deadlines_traces_and_the_page_below_a_path(tmp_path: Path) -> None:
    with OtlpReceiver("http") as collector, example(tmp_path, ORDERS_OTLP=collector.endpoint) as service:
        good = quote(service, traceparent=f"00-{TRACE}-{CALLER}-01")
        unknown = quote(service, b'{"items": ["snow"]}')
        empty = quote(service, b'{"items": []}')
        late = quote(service, X_Request_Timeout="0.0005")
        wrong = quote(service, X_Request_Timeout="soon")
        page, moved = ask(f"{service.url}/ops/"), ask(f"{service.url}/ops")
        script, state = ask(f"{service.url}/ops/static/app.js"), ask(f"{service.url}/ops/api/state")
        metrics, health = ask(f"{service.url}/ops/metrics"), ask(f"{service.url}/ops/healthz")
        foreign = ask(f"{service.url}/ops/", Host="evil.example")
        spans = collector.wait(lambda found: any(each.name == "context quotes" for each in found))
        service.stop()
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]

    assert (good.status, good.json["quote"]) == (200, "9.60 in 1 days")
    assert (unknown.status, unknown.json["detail"]) == (422, "not sold here: snow")
    assert (late.status, late.json["detail"]) == (504, "no quote within 0.0005 s")
    assert empty.status == wrong.status == 422
    assert page.status == script.status == state.status == health.status == 200
    assert moved.status in (307, 308)
    assert foreign.status == 421
    assert state.json["executors"][0]["state"]["counts"]["output"] == 1
    assert b'obsdag_contexts_finished_total{dag="quotes",engine="quotes",outcome="output"} 1.0' in metrics.body
    ours = {span.name: span for span in spans if span.trace_id == TRACE}
    assert ours["context quotes"].parent_id == CALLER
    assert {"execute check", "execute price", "execute stock", "execute quote"} <= set(ours)
    assert {line["event"] for line in lines} >= {"run.started", "execution.failed", "drain.finished", "run.finished"}
    assert only(service)["answered"]["/quotes 200"] == 1


@needs_wrk
@pytest.mark.slow
def test_under_load_nothing_is_lost_and_sigterm_in_the_middle_drains(tmp_path: Path) -> None:
    with example(tmp_path) as service:
        with load(tmp_path, service.url, 8) as tallies:
            time.sleep(4)  # in the middle of the load, which is real time
            memory_mb = service.resident_mb()
            service.stop()
        (tally,) = tallies

    counts = only(service)
    assert set(tally.statuses) == {200}
    assert tally.answers > 200
    assert tally.answers == counts["answered"]["/quotes 200"] == counts["begun"]["/quotes"], "an answer was lost"
    assert counts["stats"]["entered"] == counts["stats"]["output"] == tally.answers
    assert memory_mb < 200


@needs_wrk
@pytest.mark.slow
def test_overload_is_answered_503_with_retry_after_and_nothing_worse(tmp_path: Path) -> None:
    small = {"OBSDAG_MAX_LIVE_CONTEXTS": "4", "OBSDAG_MAX_PENDING": "4", "ORDERS_CALL_S": "0.05"}
    with example(tmp_path, **small) as service:
        with load(tmp_path, service.url, 5, connections=64) as tallies:
            pass
        (tally,) = tallies
        until(lambda: quote(service).status == 200, "a quote, once what wrk left behind is answered")
        service.stop()

    assert set(tally.statuses) == {200, 503}
    assert tally.retry_after == tally.statuses[503]
    assert sum(tally.errors.values()) == 0
    counts = only(service)
    assert counts["stats"]["output"] == counts["answered"]["/quotes 200"]


@needs_wrk
@pytest.mark.slow
@pytest.mark.skipif(bool(missing("prometheus")), reason=missing("prometheus"))
def test_four_processes_have_a_port_each_and_prometheus_finds_them(tmp_path: Path) -> None:
    targets = tmp_path / "targets"
    with (
        example(tmp_path / "service", "--workers=4", ORDERS_FILE_SD=str(targets)) as service,
        _prometheus(tmp_path / "prometheus", targets) as prometheus,
    ):
        until(lambda: len(list(targets.glob("*.json"))) == 4, "four target files")
        until(lambda: len(prometheus.now("up == 1")) == 4, "four targets that are up")
        done = 'sum(obsdag_contexts_finished_total{outcome="output"})'
        tallies: list[Tally] = []
        by_process: list[Any] = []
        while len(by_process) < 2 and len(tallies) < 20:  # the kernel may give all connections of a load to one process
            with load(tmp_path, service.url, 1) as found:
                pass
            tallies += found
            answers = sum(tally.answers for tally in tallies)
            until(lambda: _value(prometheus, done) >= answers, "all quotes in Prometheus")  # noqa: B023 (called here)
            by_process = prometheus.now(done.replace("sum(", "sum by (process) (") + " > 0")
        service.stop()

    assert all(set(tally.statuses) == {200} for tally in tallies)
    assert len({each["metric"]["process"] for each in by_process}) >= 2
    assert sum(sum(counts["answered"].values()) for counts in service.counts()) >= answers
    assert list(targets.iterdir()) == [], "targets that are gone are no targets"


def _value(prometheus: Prometheus, expr: str) -> float:
    return sum(float(each["value"][1]) for each in prometheus.now(expr))


@contextmanager
def _prometheus(place: Path, targets: Path) -> Iterator[Prometheus]:
    """One that finds its targets by files."""
    place.mkdir()
    (place / "prometheus.yml").write_text(
        "global: {scrape_interval: 500ms}\n"
        "scrape_configs:\n"
        "  - job_name: quotes\n"
        "    file_sd_configs:\n"
        f"      - {{files: ['{targets}/*.json'], refresh_interval: 1s}}\n"
    )
    address = f"127.0.0.1:{_free_port()}"
    options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    ready = lambda: request(f"http://{address}/-/ready")[0] == 200  # noqa: E731
    with _process(["prometheus", *options], place / "log", ready, dict(os.environ)):
        yield Prometheus(f"http://{address}")
