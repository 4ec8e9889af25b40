"""The README's pictures of the live page: `python -m tests.ops.photos` makes them anew in dashboards/images.

A shop's orders under steady load, one order whose stock is not answered for, one that waits for a person, some that
fail: what is on the pictures is what the engine says.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from obsdag.ops import start_ops_server
from tests.ops.browser import chromium, visit
from tests.ops.scenes import orders, steady, telemetry

__all__ = ["take"]

IMAGES = Path(__file__).parent.parent.parent / "dashboards" / "images"
SHOTS = {
    "live-page.png": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "live-page-phone.png": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}


async def take(folder: Path, seconds: float) -> None:
    """Takes all pictures after so many seconds of load."""
    tracing = {"mode": "deferred", "processors": [SimpleSpanProcessor(InMemorySpanExporter())], "sample": 0.01}
    async with steady(orders(), telemetry=telemetry(**tracing)) as executor, chromium() as browser:
        with start_ops_server(executor, port=0, jaeger_url="http://127.0.0.1:16686") as ops:
            await executor.submit({"stuck": seconds + 60.0, "lines": 3}, id="order-4711")
            await executor.submit({"freeze": True, "lines": 1}, id="order-4712")
            for name, options in SHOTS.items():
                async with visit(browser, ops.url, **options) as seen:
                    await asyncio.sleep(seconds)  # curves need real time
                    await seen.page.screenshot(path=folder / name)


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    asyncio.run(take(Path(sys.argv[1]) if sys.argv[1:] else IMAGES, seconds=35.0))
