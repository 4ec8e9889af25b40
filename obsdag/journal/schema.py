"""The tables of a journal, their version, and how an older file becomes a newer one.

    meta       what the file says of itself: the journal's id, whether a process has it open, crashes in a row
    plans      each DAG whose contexts are in here: its tasks with kinds and upstreams, by fingerprint
    contexts   one row per context: the living ones and, until they are pruned, the ended ones

A context's `tree` is the row of the submission or input that it was made from. Rows are written whole, by key.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

__all__ = ["APPLICATION_ID", "COLUMNS", "MIGRATIONS", "VERSION", "Row", "checksum", "create", "insert_rows"]

APPLICATION_ID: Final = 0x6F626467  # "obdg"
VERSION: Final = 1

_TABLES: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
    "CREATE TABLE plans (number INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, dag TEXT NOT NULL, "
    "tasks TEXT NOT NULL)",
    "CREATE TABLE contexts (key INTEGER PRIMARY KEY, id TEXT NOT NULL, plan INTEGER NOT NULL REFERENCES plans(number), "
    "parent INTEGER, tree INTEGER NOT NULL, lend INTEGER, outcome TEXT, ended REAL, body BLOB NOT NULL, data BLOB, "
    "sum INTEGER NOT NULL)",
    "CREATE INDEX living ON contexts (key) WHERE outcome IS NULL",
    "CREATE INDEX ended ON contexts (ended) WHERE outcome IS NOT NULL",
)


class Row(NamedTuple):
    """One row of `contexts`. parent, tree: keys. lend: the task of the parent that lent the branch. outcome, ended:
    None while it lives; ended is Unix time. body: `codec.Body`. data: `Codec.encode`, None where it could not be
    encoded.
    """

    key: int
    id: str
    plan: int
    parent: int | None
    tree: int
    lend: int | None
    outcome: str | None
    ended: float | None
    body: bytes
    data: bytes | None
    sum: int


def checksum(row: Sequence[Any], data: bytes | None) -> int:
    """CRC-32 of a row: of all that stands before its data, and of that."""
    key, name, plan, parent, tree, lend, outcome, ended, body, *_ = row
    head = f"{key} {name} {plan} {parent} {tree} {lend} {outcome} {ended}".encode("utf-8", "surrogatepass")
    return zlib.crc32(data or b"", zlib.crc32(body, zlib.crc32(head)))


COLUMNS: Final = ", ".join(Row._fields)
_PLACE: Final = f"({', '.join('?' * len(Row._fields))})"

MIGRATIONS: Final[dict[int, Callable[[sqlite3.Connection], None]]] = {}
"""Version -> what turns a file of that version into one of the next, inside a transaction. Append only."""


def create(connection: sqlite3.Connection) -> None:
    """Makes the tables of an empty file, inside the caller's transaction."""
    for statement in _TABLES:
        connection.execute(statement)


def insert_rows(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Writes rows by one statement, which is a transaction of its own where the caller has not begun one.

    One statement instead of `executemany`: the sqlite3 module gives the GIL away for each step, and gets it back from a
    busy event loop up to 5 ms later.
    """
    values: list[object] = []
    for row in rows:
        values += row
    connection.execute(f"INSERT OR REPLACE INTO contexts VALUES {', '.join([_PLACE] * len(rows))}", values)
