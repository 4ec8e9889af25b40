"""The standalone server: on its own thread, whatever the engine's loop does."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text

from obsdag import ConfigError, Context
from obsdag.ops import start_ops_server
from tests.ops.web import ask, ask_aside, goes_on, one_task, service

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


async def test_metrics_as_text_and_as_openmetrics_packed_or_not() -> None:
    executor = service(one_task(goes_on))
    with start_ops_server(executor, port=0) as ops:
        async with executor:
            await executor.execute({})
            plain = await ask_aside(ops.url + "/metrics")
            modern = await ask_aside(ops.url + "/metrics", Accept=OPENMETRICS)
            packed = await ask_aside(ops.url + "/metrics", Accept=OPENMETRICS, Accept_Encoding="gzip")

    assert plain.headers["content-type"].startswith("text/plain")
    assert "obsdag_contexts_entered" in {family.name for family in text(plain.body.decode())}
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert modern.body.endswith(b"# EOF\n")
    assert packed.headers["content-encoding"] == "gzip"
    families = {family.name: family for family in openmetrics(gzip.decompress(packed.body).decode())}
    outputs = [s for s in families["obsdag_contexts_finished"].samples if s.labels["outcome"] == "output"]
    assert [sample.value for sample in outputs] == [1.0]


async def test_ready_only_while_it_accepts() -> None:
    gate = asyncio.Event()

    async def waits(ctx: Context) -> Context:
        await gate.wait()
        return ctx

    executor = service(one_task(waits))
    with start_ops_server(executor, port=0) as ops:
        before = await ask_aside(ops.url + "/readyz")
        async with executor:
            ticket = await executor.submit({})
            accepting = await ask_aside(ops.url + "/readyz")
            executor.request_drain()
            draining, alive = await ask_aside(ops.url + "/readyz"), await ask_aside(ops.url + "/healthz")
            gate.set()
            await ticket.result()
        stopped = await ask_aside(ops.url + "/readyz")

    assert [before.status, accepting.status, draining.status, stopped.status] == [503, 200, 503, 503]
    assert draining.json["executors"] == [{"dag": "orders", "phase": "draining"}]
    assert alive.status == 200


async def test_a_task_that_blocks_the_loop_blocks_no_scrape_and_health_says_so() -> None:
    async def blocks(ctx: Context) -> Context:
        time.sleep(2.0)  # noqa: ASYNC251 - the mistake that this is about
        return ctx

    executor = service(one_task(blocks))
    with start_ops_server(executor, port=0) as ops:

        def look() -> list:
            time.sleep(0.4)  # the loop is blocked by now
            return [ask(ops.url + path) for path in ("/metrics", "/metrics", "/healthz", "/api/state")]

        async with executor:
            ticket = await executor.submit({})
            first, second, health, state = await asyncio.to_thread(look)
            await ticket.result()
            after = await ask_aside(ops.url + "/healthz")

    assert first.status == second.status == 200
    assert min(first.took_s, second.took_s) < 0.1  # the bound; a machine under load may spoil one of two
    assert health.status == 503
    assert health.json["status"] == "blocked"
    (blocked,) = health.json["loops"]
    assert (blocked["dags"], blocked["tasks"]) == (["orders"], ["blocks"])
    assert 0.4 < blocked["blocked_s"] < 2.5
    assert state.json["executors"][0]["state"]["workers"]["busy"] == 1
    assert after.status == 200


def test_without_an_executor_it_serves_the_registry() -> None:
    with start_ops_server(port=0, registry=CollectorRegistry()) as ops:
        answers = [ask(ops.url + path).status for path in ("/metrics", "/healthz", "/readyz", "/api/state", "/")]

    assert answers == [200] * 5


def test_a_port_that_is_taken_is_said_where_it_was_asked_for() -> None:
    with start_ops_server(port=0) as ops, pytest.raises(OSError, match="in use"):
        start_ops_server(port=ops.port)


def test_closing_twice_is_harmless_and_ends_open_connections() -> None:
    ops = start_ops_server(port=0)
    assert ask(ops.url + "/healthz").status == 200
    ops.close()
    ops.close()
    assert repr(ops).endswith("closed>")
    with pytest.raises(ConnectionRefusedError):
        ask(ops.url + "/healthz")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_other_machines_are_served_only_with_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="give a token"):
        start_ops_server(port=0, host=host)


def test_without_h11_the_standalone_server_says_what_to_install_and_mounting_works() -> None:
    code = """
import sys
sys.modules["h11"] = None
from obsdag import ConfigError
from obsdag.ops import create_app, start_ops_server
create_app()
try:
    start_ops_server(port=0)
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "start_ops_server needs the package h11: pip install 'obsdag[ops]'\n"


def test_the_page_is_in_the_wheel(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(Path(__file__).parents[2])).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as packed:
        files = {name for name in packed.namelist() if name.startswith("obsdag/ops/static/")}

    assert {"obsdag/ops/static/index.html", "obsdag/ops/static/app.js", "obsdag/ops/static/page.css"} <= files
