"""The FastAPI example between two counters, for tests that must know what became of every request.

Counted are requests that reached the application, and answers that were handed to the server whole. At the end of its
lifespan the process writes both, and what the executor says of itself, to COUNTS_DIR/PID.json.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from obsdag.examples.fastapi_service import app as example
from obsdag.examples.fastapi_service import executor

begun: Counter[str] = Counter()
answered: Counter[str] = Counter()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """The ASGI application."""
    if scope["type"] == "lifespan":
        await example(scope, receive, _after_shutdown(send))
        return
    begun[scope["path"]] += 1
    status = 0

    async def counting(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        await send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            answered[f"{scope['path']} {status}"] += 1

    await example(scope, receive, counting)


def _after_shutdown(send: Any) -> Any:
    async def sending(message: Any) -> None:
        if message["type"] == "lifespan.shutdown.complete":
            _write()
        await send(message)

    return sending


def _write() -> None:
    stats = executor.stats()
    found = {
        "begun": begun,
        "answered": answered,
        "stats": {name: number for name, number in stats.items() if name != "tasks"},
        "manifest": executor.manifest,
        "in_flight": executor.in_flight,
        "pending": executor.pending,
        "unfetched": executor.unfetched,
        "phase": executor.phase,
    }
    Path(os.environ["COUNTS_DIR"], f"{os.getpid()}.json").write_text(json.dumps(found))
