"""Rows and stores for tests that need no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from obsdag.journal.codec import Body, Codec
from obsdag.journal.schema import Row, sealed
from obsdag.journal.store import Store

__all__ = ["open_store", "read", "row"]


def row(key: int, outcome: str | None = None, ended: float | None = None, tree: int | None = None, **data: Any) -> Row:
    """A row as a recorder makes it."""
    body, encoded = msgspec.msgpack.encode(Body("input", 0.0, 1)), Codec().encode(data)
    return Row._make(sealed((key, f"c{key}", 1, None, tree or key, None, outcome, ended, body, encoded)))


def open_store(path: Path, **options: Any) -> Store:
    """An open store with one plan."""
    store = Store(str(path), **options)
    store.open()
    if not store.look:
        store.plan_number("f" * 32, "dag", "[]")
    return store


def read(path: Path) -> list[int]:
    """The keys that are in the file."""
    store = open_store(path, look=True)
    try:
        return [each.key for each in store.rows()]
    finally:
        store.close()
