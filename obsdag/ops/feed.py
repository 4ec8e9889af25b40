"""What the engines do now, as JSON, made once for all who look: for `/api/state` and for the page's event stream.

A stream begins with the event `full` (graphs, states, all tasks) and goes on with `tick`: the states, and only the
tasks whose numbers changed, which for 5,000 tasks is the difference between 600 kB and a few a second. Reading and
encoding are done in a thread, and not at all while nobody looks.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any, Final, NamedTuple

from obsdag.ops.state import COLUMNS, Reader

__all__ = ["Feed"]

_FRESH_S: Final = 0.25  # a reading this young is as good as a new one


class _Reading(NamedTuple):
    """at: monotonic. parts: (state, rows) of each reader."""

    number: int
    at: float
    parts: list[tuple[dict[str, Any], list[list[Any]]]]


class Feed:
    """Reads all readers at most four times a second, whoever asks. interval_s: between two events of a stream."""

    def __init__(self, readers: Iterable[Reader], interval_s: float, common: dict[str, Any]) -> None:
        self.interval_s = interval_s
        self.streams = 0
        self._readers = tuple(readers)
        self._common = common
        self._lock = threading.Lock()
        self._last = _Reading(0, float("-inf"), [])
        self._encoded: dict[tuple[int, int], bytes] = {}  # (from, to) -> event data; from 0: a full one

    # --- in a thread

    def full(self) -> bytes:
        """Everything, now."""
        with self._lock:
            return self._encode(None, self._read(_FRESH_S))

    def _next(self, before: _Reading | None) -> tuple[_Reading, bytes]:
        with self._lock:
            reading = self._read(0.9 * self.interval_s)
            key = (0 if before is None else before.number, reading.number)
            data = self._encoded.get(key)
            if data is None:
                self._encoded = {old: kept for old, kept in self._encoded.items() if old[1] == reading.number}
                data = self._encoded[key] = self._encode(before, reading)
            return reading, data

    def _read(self, fresh_s: float) -> _Reading:
        now = time.monotonic()
        if now - self._last.at > fresh_s:
            self._last = _Reading(self._last.number + 1, now, [reader.read() for reader in self._readers])
        return self._last

    def _encode(self, before: _Reading | None, reading: _Reading) -> bytes:
        executors: list[dict[str, Any]] = []
        for n, (state, rows) in enumerate(reading.parts):
            if before is None:
                executors.append({"graph": self._readers[n].graph, "state": state, "rows": rows})
            else:
                changed = {i: row for i, row in enumerate(rows) if row != before.parts[n][1][i]}
                executors.append({"state": state, "rows": changed})
        head = {"at": time.time(), **({} if before is not None else {"columns": COLUMNS, **self._common})}
        return json.dumps({**head, "executors": executors}, separators=(",", ":"), allow_nan=False).encode()

    # --- on the loop of who asks

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, without end."""
        before: _Reading | None = None
        due = time.monotonic()
        while True:
            reading, data = await asyncio.to_thread(self._next, before)
            if before is None or reading.number != before.number:
                yield b"event: %b\ndata: %b\n\n" % (b"full" if before is None else b"tick", data)
            before = reading
            due = max(due + self.interval_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
