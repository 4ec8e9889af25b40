"""A real headless Chromium with the live page in it, and what it asked for and complained of."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright

__all__ = ["CHROMIUM", "Visit", "chromium", "needs_chromium", "visit"]

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync"),
]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")


class Visit:
    """One page, and the record of it: console messages and errors, and requests to anywhere else."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("request", lambda request: None if request.url.startswith(url) else self.elsewhere.append(request.url))
        page.set_default_timeout(15_000)

    async def until(self, condition: str, argument: Any = None) -> None:
        """Waits for a JavaScript condition."""
        await self.page.wait_for_function(condition, arg=argument)

    async def text(self, selector: str) -> str:
        """What a person reads there."""
        return await self.page.locator(selector).inner_text()


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser with an empty profile of its own."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def visit(browser: Browser, url: str, path: str = "/", **options: Any) -> AsyncIterator[Visit]:
    """The page at `url`, once it shows something; at the end it must have complained of nothing."""
    options = {"viewport": {"width": 1440, "height": 1000}, "color_scheme": "light", **options}
    context = await browser.new_context(**options)
    try:
        found = Visit(await context.new_page(), url)
        await found.page.goto(url + path)
        await found.page.wait_for_selector("#main:not([hidden]), #empty:not([hidden])")
        yield found
        assert found.complaints == []
        assert found.elsewhere == []
    finally:
        await context.close()
