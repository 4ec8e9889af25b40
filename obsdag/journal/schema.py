"""The tables of a journal, their version, and how an older file becomes a newer one.

    meta       what the file says of itself: the journal's id, whether a process has it open, crashes in a row, and
               per session (opening) whose contexts are in here, a random token
    plans      each DAG whose contexts are in here: its tasks with kinds and upstreams, by fingerprint
    contexts   one row per context: the living ones and, until they are pruned, the ended ones

A context's `tree` is the row of the submission or input that it was made from. Rows are written whole, by key.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Final, NamedTuple

import msgspec

__all__ = [
    "APPLICATION_ID",
    "COLUMNS",
    "MIGRATIONS",
    "VERSION",
    "Cells",
    "Content",
    "Row",
    "create",
    "insert_rows",
    "is_whole",
    "readable",
    "sealed",
    "storable",
    "storable_id",
]

_SURROGATES: Final = "surrogatepass"
APPLICATION_ID: Final = 0x6F626467  # "obdg"
VERSION: Final = 1

_TABLES: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
    "CREATE TABLE plans (number INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, dag TEXT NOT NULL, "
    "tasks TEXT NOT NULL, UNIQUE (fingerprint, dag))",
    "CREATE TABLE contexts (key INTEGER PRIMARY KEY, id TEXT NOT NULL, plan INTEGER NOT NULL REFERENCES plans(number), "
    "parent INTEGER, tree INTEGER NOT NULL, lend INTEGER, outcome TEXT, ended REAL, body BLOB NOT NULL, data BLOB, "
    "sum INTEGER NOT NULL)",
    "CREATE INDEX living ON contexts (key) WHERE outcome IS NULL",
    "CREATE INDEX ended ON contexts (ended) WHERE outcome IS NOT NULL",
    "CREATE INDEX failed ON contexts (tree) WHERE outcome IN ('failed', 'stalled')",
)


Content = tuple[int, str, int, int | None, int, int | None, str | None, float | None, bytes, bytes | None]
"""A row without its checksum."""

Cells = tuple[int, str, int, int | None, int, int | None, str | None, float | None, bytes, bytes | None, int]
"""A row as the recorder hands it on: making a `Row` of it takes three times as long."""

_encode = msgspec.msgpack.Encoder().encode


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


def sealed(content: Content) -> Cells:
    """The content and its checksum: CRC-32 of it as msgpack (one call: as text it took five times as long)."""
    try:
        encoded = _encode(content)
    except UnicodeEncodeError:  # an id with half a surrogate
        key, name, *rest = content
        encoded = _encode((key, name.encode("utf-8", _SURROGATES), *rest))
    return content + (zlib.crc32(encoded),)  # noqa: RUF005 - unpacking takes twice as long


def storable(row: Cells) -> Cells:
    """The row with an id that SQLite takes."""
    return (row[0], storable_id(row[1]), *row[2:])  # type: ignore[return-value] # SQLite keeps bytes as a blob


def storable_id(name: str) -> str | bytes:
    """An id as SQLite takes it: with half a surrogate (of a file name that is not UTF-8, say), as bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode(errors=_SURROGATES)
    return name


def readable(row: Row) -> Row:
    """The row that was `storable`, with its id as text again."""
    if not isinstance(row.id, bytes):
        return row
    try:
        return row._replace(id=row.id.decode(errors=_SURROGATES))
    except UnicodeDecodeError:  # damaged
        return row


def is_whole(row: Row) -> bool:
    """Whether it matches its checksum."""
    try:
        return row.sum == sealed(row[:-1])[-1]
    except (UnicodeError, AttributeError):  # where SQLite says there is text, there is none
        return False


COLUMNS: Final = ", ".join(Row._fields)
_PLACE: Final = f"({', '.join('?' * len(Row._fields))})"

MIGRATIONS: Final[dict[int, Callable[[sqlite3.Connection], None]]] = {}
"""Version -> what turns a file of that version into one of the next, inside a transaction. Append only."""


def create(connection: sqlite3.Connection) -> None:
    """Makes the tables of an empty file, inside the caller's transaction."""
    for statement in _TABLES:
        connection.execute(statement)


def insert_rows(connection: sqlite3.Connection, rows: Sequence[Cells]) -> None:
    """Writes rows by one statement, which is a transaction of its own where the caller has not begun one.

    One statement with all values: the sqlite3 module gives the GIL away for each step, and gets it back from a busy
    event loop up to 5 ms later. By `executemany`, once: `execute` gives it away again to ask for the last row's id.
    """
    connection.executemany(_insertion(len(rows)), (list(chain.from_iterable(rows)),))


@cache
def _insertion(count: int) -> str:
    return f"INSERT OR REPLACE INTO contexts VALUES {', '.join([_PLACE] * count)}"
