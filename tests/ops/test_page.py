"""The live page in a real Chromium: it follows a run, names what is wrong, and asks nobody else."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from obsdag import DAG, Context, Executor, ExecutorConfig
from obsdag.ops import start_ops_server
from tests.ops.browser import chromium, needs_chromium, visit
from tests.ops.scenes import orders, steady, telemetry, wide
from tests.ops.web import goes_on, one_task, service

pytestmark = [pytest.mark.e2e, needs_chromium]

LINKS = "() => [...document.querySelectorAll('.list a[target]')].map((a) => `${a.href} ${a.rel}`)"
FOUND = "() => [...document.querySelectorAll('#findings li')].map((li) => li.className + ': ' + li.innerText)"


async def test_it_shows_a_run_as_it_goes_a_waiting_join_and_a_failure(tmp_path: Path) -> None:
    async with steady(orders()) as executor, chromium() as browser:
        with start_ops_server(executor, port=0, interval_s=0.25) as ops:
            await executor.submit({"stuck": 60.0, "lines": 3}, id="order-4711")
            await executor.submit({"fail": "<b>bold</b> & refused", "lines": 1}, id="order-4712")
            async with visit(browser, ops.url) as seen:
                boxes = seen.page.locator(".box")
                await seen.until("() => document.querySelectorAll('.box.running').length > 0")
                assert await boxes.count() == 9
                before = await seen.text("#tasks-body tr:nth-child(1) td:nth-child(4)")
                await seen.until(
                    "(old) => document.querySelector('#tasks-body td:nth-child(4)').innerText !== old", before
                )
                await seen.until("() => document.querySelector('#joins-list').innerText.includes('order-4711')")
                joins = await seen.text("#joins-list")
                await seen.until("() => document.querySelector('#failures-list').innerText.includes('order-4712')")
                failures = await seen.text("#failures-list")
                await seen.until("() => document.querySelector('#findings li.bad') !== null")
                findings = await seen.page.evaluate(FOUND)
                shot = await seen.page.screenshot(path=tmp_path / "page.png")

    assert "all_lines" in joins
    assert "2 arrived; for 1 child under way (1 at reserve_stock)" in joins
    assert "ConnectionError" in failures
    assert "<b>bold</b> & refused" in failures, "texts from users are shown as they are, and are not markup"
    assert any("failed within a minute, the last at score_risk: ConnectionError" in each for each in findings)
    assert len(shot) > 20_000


async def test_failures_and_kept_traces_lead_to_jaeger() -> None:
    tracing = {"mode": "deferred", "processors": [SimpleSpanProcessor(InMemorySpanExporter())], "sample": 0.0}
    executor = service(_refusing(), telemetry=telemetry(**tracing))
    with start_ops_server(executor, port=0, interval_s=0.25, jaeger_url="http://127.0.0.1:16686/jaeger/") as ops:
        async with executor, chromium() as browser:
            await executor.submit({})
            async with visit(browser, ops.url) as seen:
                await seen.until(
                    "() => document.querySelector('#traces-list a') && document.querySelector('#failures-list a')"
                )
                links = await seen.page.evaluate(LINKS)

    assert len(set(links)) == 1, "both lists lead to the same trace"
    assert re.fullmatch(r"http://127\.0\.0\.1:16686/jaeger/trace/[0-9a-f]{32} noopener noreferrer", links[0])


def _refusing() -> DAG:
    async def refuses(ctx: Context) -> Context:
        raise ValueError("refused")

    return one_task(refuses)


async def test_a_server_that_goes_and_comes_back_is_told_and_found_again() -> None:
    executor = service(one_task(goes_on))
    ops = start_ops_server(executor, port=0, interval_s=0.25)
    async with executor, chromium() as browser, visit(browser, ops.url) as seen:
        try:
            await seen.until("() => document.querySelector('#live').innerText === 'live'")
            ops.close()
            await seen.until("() => document.querySelector('#live').innerText.startsWith('no update for')")
            assert await seen.page.evaluate("() => document.body.classList.contains('stale')")
            ops = start_ops_server(executor, port=ops.port, interval_s=0.25)
            await seen.until("() => document.querySelector('#live').innerText === 'live'")
            await executor.execute({})
            await seen.until("() => document.querySelector('#tasks-body td:nth-child(4)').innerText === '1'")
        finally:
            ops.close()
        assert {each for each in seen.complaints if "ERR_CONNECTION_REFUSED" not in each} <= _BROKEN_STREAM
        seen.complaints.clear()


_BROKEN_STREAM = {"error: Failed to load resource: net::ERR_INCOMPLETE_CHUNKED_ENCODING"}


async def test_a_stalled_context_is_named_with_what_it_misses() -> None:
    dag = DAG("branches")

    @dag.task
    async def start(ctx: Context) -> Any:
        return ctx.create_child()

    @dag.task(after=start)
    async def left(ctx: Context) -> Context:
        return ctx

    @dag.task
    async def other(ctx: Context) -> Context:
        ctx.freeze()
        return ctx

    dag.task(name="meet", after=[left, other])(goes_on)
    config = ExecutorConfig(worker_idle_times=1, context_queue_timeout=0.2, telemetry=telemetry())
    executor = Executor(dag, config=config)
    with start_ops_server(executor, port=0, interval_s=0.25) as ops:
        result = await executor.run({})
        assert result.stalled
        async with chromium() as browser, visit(browser, ops.url) as seen:
            failures, findings = await seen.text("#failures-list"), await seen.page.evaluate(FOUND)

    assert "stalled" in failures
    assert result.stalled[0].task in failures
    assert any("stalled within a minute" in each for each in findings)


async def test_a_blocked_loop_is_the_first_thing_said() -> None:
    async def blocks(ctx: Context) -> Context:
        time.sleep(4.0)  # noqa: ASYNC251 - the mistake that this is about
        return ctx

    executor = service(one_task(blocks))
    with start_ops_server(executor, port=0, interval_s=0.25) as ops:
        async with executor:
            found = asyncio.ensure_future(asyncio.to_thread(_findings_aside, ops.url))
            await asyncio.sleep(2.5)  # the browser starts on a loop of its own meanwhile
            await executor.execute({})
            findings = await found

    assert "event loop has been blocked" in findings[0]
    assert "by task blocks" in findings[0]


def _findings_aside(url: str) -> list[str]:
    """The findings once there is a bad one, from another thread: this test's own loop is blocked."""

    async def look() -> list[str]:
        async with chromium() as browser, visit(browser, url) as seen:
            await seen.until("() => document.querySelector('#findings li.bad') !== null")
            return list(await seen.page.evaluate(FOUND))

    return asyncio.run(look())


async def test_five_thousand_tasks_by_groups_and_search() -> None:
    executor = Executor(wide(5_000), config=ExecutorConfig(telemetry=telemetry("estate")))
    with start_ops_server(executor, port=0, interval_s=0.25) as ops:
        await executor.run([{}, {}])
        async with chromium() as browser, visit(browser, ops.url) as seen:
            page = seen.page
            assert 2 < await page.locator(".box").count() <= 48
            await page.get_by_role("button", name="region-3/").first.click()
            await page.get_by_role("button", name="shop-12/").first.click()
            steps = await page.locator(".box .box-name").all_inner_texts()
            crumbs = await seen.text("#crumbs")
            await page.keyboard.press("Escape")
            assert await page.locator(".box").count() == 41
            await page.keyboard.press("/")
            await page.keyboard.type("shop-12 price region-3/")
            rows = await page.locator("#tasks-body tr td:first-child").all_inner_texts()
            await page.keyboard.press("Enter")
            chosen = await seen.text("#filter")
            drawn = await page.evaluate("() => document.querySelectorAll('*').length")

    assert steps == ["load", "clean", "price", "stock", "publish"]
    assert "region-3/shop-12/" in crumbs
    assert rows == ["region-3/shop-12/price"]
    assert "region-3/shop-12/price" in chosen
    assert drawn < 2_000, "5,000 tasks are not 5,000 rows"


async def test_by_keyboard_in_the_dark_on_a_phone() -> None:
    async with steady(orders()) as executor, chromium() as browser:
        other = service(one_task(goes_on), telemetry=executor.config.telemetry)
        with start_ops_server(executor, other, port=0, interval_s=0.25) as ops:
            phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True}
            async with visit(browser, ops.url, **phone) as seen:
                page = seen.page
                await page.wait_for_selector(".box")
                assert await page.evaluate("() => document.documentElement.scrollWidth") <= 390
                assert await page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 22)"
                await page.locator(".box").first.focus()
                await page.keyboard.press("Enter")
                assert "fetch" in await seen.text("#filter")
                await page.keyboard.press("Escape")
                assert await page.locator("#filter").is_hidden()
                await page.keyboard.press("2")
                await seen.until("() => document.querySelectorAll('.box').length === 1")
                await page.keyboard.press("1")
                await page.keyboard.press("p")
                assert await seen.text("#live") == "paused"
                await page.keyboard.press("t")
                assert await page.evaluate("() => document.documentElement.dataset.theme") == "light"
                await page.keyboard.press("?")
                assert await page.locator("#keys").is_visible()


async def test_texts_of_users_are_never_markup() -> None:
    evil = "<img src=x onerror=alert(1)>"
    dag = DAG(f"{evil}dag")

    async def raises(ctx: Context) -> Context:
        raise ValueError(f"{evil}{ctx.id}")

    dag.task(name=f"{evil}task")(raises)
    executor = service(dag)
    with start_ops_server(executor, port=0, interval_s=0.25, jaeger_url="http://127.0.0.1:1") as ops:
        async with executor, chromium() as browser:
            await executor.submit({}, id=f"{evil}id")
            async with visit(browser, ops.url) as seen:
                await seen.until("() => document.querySelector('#failures-list').innerText.includes('onerror')")
                images = await seen.page.locator("main img").count()
                failures = await seen.text("#failures-list")

    assert images == 0
    assert failures.count(evil) >= 3  # the task, the id, the text


async def test_with_a_token_the_browser_asks_once_and_streams(tmp_path: Path) -> None:
    executor = service(one_task(goes_on))
    with start_ops_server(executor, port=0, interval_s=0.25, token="correct-horse") as ops:
        async with executor, chromium() as browser:
            with_token = {"http_credentials": {"username": "", "password": "correct-horse"}}
            async with visit(browser, ops.url, **with_token) as seen:
                await executor.execute({})
                await seen.until("() => document.querySelector('#tasks-body td:nth-child(4)').innerText === '1'")
