"""One SQLite file and the only connection to it. All methods belong to the thread that opened it.

Opening, by steps: 1. no other journal of this process has the file; 2. SQLite takes it exclusively (a second connection
to a live WAL can corrupt it before SQLite 3.51.3), so that another process is refused; 3. it is a journal, of a version
that is known; 4. WAL and `synchronous` are set and read back; 5. if the last process died, its pages are checked; 6. an
older version is backed up and migrated.

Whoever only looks (`look`) and may not write has SQLite read the file as it stands (`immutable`), under the lock that
its readers have. What a process that died left in `-wal` would be passed over then, so that is refused.

Errors of SQLite become `JournalError`, one line that says what to do; the file is as the last commit left it.

A key is never used twice: its upper half is the number of the session (of the opening), which is committed before the
first key is given away. `ctx.idempotency_key` is made of it and of the session's token, 64 random bits: where an old
backup was restored, numbers of sessions come again, keys do not.

A process that was forked must not touch its parent's connection, not even to close it, which would delete the log that
the parent goes on writing to: it leaves it alone and open (`_leave_to_parent`).
"""

from __future__ import annotations

import ctypes
import os
import secrets
import sqlite3
import threading
import weakref
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from obsdag.errors import JournalError
from obsdag.journal.access import READ_ONLY, beside, in_use, lock_for_reading, may_write
from obsdag.journal.schema import (
    APPLICATION_ID,
    COLUMNS,
    MIGRATIONS,
    VERSION,
    Cells,
    Row,
    create,
    insert_rows,
    is_whole,
    readable,
    storable,
)

__all__ = ["PRUNED_AT_ONCE", "Durability", "Store"]

Durability = Literal["power", "process"]
_SYNCHRONOUS: Final = {"power": ("FULL", 2), "process": ("NORMAL", 1)}
_SIZES: Final = (*range(1, 17), *range(20, 65, 4), *range(72, 129, 8), *range(144, 257, 16), 384, 512, 768, 1024)
"""Rows per statement, so that not too many are prepared; the last row is written again until one of these is full."""

PRUNED_AT_ONCE: Final = 1_024
"""Rows per deletion: commits wait for it some milliseconds."""

_SESSION_BITS: Final = 32
_NO_KEY: Final = (1 << 63) - 1
_TOKEN: Final = "token."

_open_files: set[tuple[int, int]] = set()
_open_lock = threading.Lock()
_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """After a fork, in the child."""
    _open_lock.release()
    _open_files.clear()
    for store in _stores:
        if store._connection is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(store._connection))  # never closed, not even by the collector
            store._connection = store._claim = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_open_lock.acquire, after_in_parent=_open_lock.release, after_in_child=_leave_to_parent)


class Store:
    """An open journal file. crashes: how many processes in a row died with it open, until now. first_key, token: of
    this session.

    look: neither made nor migrated, and no session of its own: for whoever only reads, or repairs by hand.
    max_page_count: a bound on the file's size, in pages.
    """

    def __init__(
        self, path: str, durability: Durability = "power", *, look: bool = False, max_page_count: int | None = None
    ) -> None:
        self.path = os.fspath(path)
        self.durability = durability
        self.look = look
        self.id = ""
        self.token = ""
        self.crashes = 0
        self.first_key = 1
        self._max_pages = max_page_count
        self._claim: tuple[int, int] | None = None
        self._lock: int | None = None
        self._connection: sqlite3.Connection | None = None
        _stores.add(self)

    # --- life

    def open(self) -> None:
        """Opens the file by the steps at the top of this module. Raises JournalError."""
        try:
            with self._told("opened"):
                self._check_place()
                self._connect()
        except BaseException:
            self._give_up()
            raise

    def _check_place(self) -> None:
        folder = Path(self.path).resolve().parent
        if not folder.is_dir():
            raise JournalError(f"journal {self.path}: there is no folder {folder}")
        try:
            os.stat(self.path)
        except FileNotFoundError:
            if self.look:
                raise JournalError(f"journal {self.path}: there is no such file") from None
        if os.path.isdir(self.path):
            raise JournalError(f"journal {self.path} is a folder: name the file in it")

    def _claim_file(self) -> None:
        found = os.stat(self.path)
        claim = (found.st_dev, found.st_ino)
        with _open_lock:
            if claim in _open_files:
                raise JournalError(f"journal {self.path} is open in this process already: share one SQLiteJournal")
            _open_files.add(claim)
        self._claim = claim

    def _connect(self) -> None:
        if not os.path.exists(self.path):
            if not os.access(Path(self.path).resolve().parent, os.W_OK):
                raise JournalError(f"journal {self.path} cannot be made: its folder cannot be written to")
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        self._claim_file()
        connection = self._take() if may_write(self.path) else self._take_as_it_stands()
        fresh = self._check_kind(connection)
        if self.look:
            self.id = self.get("id") or ""
            return
        self._set_up(connection)
        if fresh:
            self._make(connection)
        self._migrate(connection)
        self._begin_session(connection)

    def _take(self) -> sqlite3.Connection:
        connection = self._connect_by("mode=rw")
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("COMMIT")
        return connection

    def _take_as_it_stands(self) -> sqlite3.Connection:
        """The file without a right to write. Raises JournalError if there is more to do than to read it."""
        if not self.look:
            raise JournalError(f"journal {self.path} cannot be opened: {READ_ONLY}")
        self._lock = lock_for_reading(self.path)
        if self._lock is None:
            raise JournalError(f"journal {self.path} {in_use(self.path)}")
        for left in (beside(self.path, "-wal"), beside(self.path, "-journal")):
            if os.path.exists(left):
                raise JournalError(
                    f"journal {self.path} is read-only, and a process that died left {left}, which SQLite has to write "
                    "into it first: run it as a user who may write both, or copy both to a folder of your own"
                )
        return self._connect_by("mode=ro&immutable=1")

    def _connect_by(self, how: str) -> sqlite3.Connection:
        uri = f"{Path(self.path).resolve().as_uri()}?{how}"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=0.2, check_same_thread=False)
        connection.text_factory = _text  # else one damaged row ends the reading of all
        self._connection = connection
        return connection

    def _check_kind(self, connection: sqlite3.Connection) -> bool:
        """Whether the file is empty. Raises JournalError for another program's, and for a newer version's."""
        kind, version = _pragma(connection, "application_id"), _pragma(connection, "user_version")
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not kind and not version and not tables:
            if self.look:
                raise JournalError(f"journal {self.path} is empty: nothing was ever committed")
            return True
        if kind != APPLICATION_ID:
            raise JournalError(f"journal {self.path}: this SQLite file is not a journal of obsdag")
        if version > VERSION:
            raise JournalError(
                f"journal {self.path} is of version {version}; this obsdag knows versions up to {VERSION}: update it"
            )
        return False

    def _set_up(self, connection: sqlite3.Connection) -> None:
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise JournalError(f"journal {self.path}: the file system allows no write-ahead log (it stays {mode!r})")
        name, number = _SYNCHRONOUS[self.durability]
        connection.execute(f"PRAGMA synchronous = {name}")
        connection.execute("PRAGMA foreign_keys = ON")
        if _pragma(connection, "synchronous") != number or _pragma(connection, "foreign_keys") != 1:
            raise JournalError(f"journal {self.path}: this build of SQLite does not take synchronous={name}")
        if self._max_pages is not None:
            connection.execute(f"PRAGMA max_page_count = {self._max_pages}")

    def _make(self, connection: sqlite3.Connection) -> None:
        with self._transaction(connection):
            create(connection)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("INSERT INTO meta VALUES ('id', ?)", (secrets.token_hex(6),))

    def _migrate(self, connection: sqlite3.Connection) -> None:
        version = _pragma(connection, "user_version")
        if version < VERSION:
            self._back_up(connection, version)
        while version < VERSION:
            with self._transaction(connection):
                MIGRATIONS[version](connection)
                version += 1
                connection.execute(f"PRAGMA user_version = {version}")

    def _back_up(self, connection: sqlite3.Connection, version: int) -> None:
        target = f"{self.path}.v{version}.bak"
        copy = sqlite3.connect(target)
        try:
            connection.backup(copy)
        finally:
            copy.close()

    def _begin_session(self, connection: sqlite3.Connection) -> None:
        self.id = self.get("id") or ""
        self.crashes = int(self.get("crashes") or 0)
        if self.get("open"):
            self.crashes += 1
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise JournalError(f"journal {self.path} is damaged ({' '.join(found.split())}): restore a backup")
        used = connection.execute("SELECT coalesce(max(key), 0) FROM contexts").fetchone()[0] >> _SESSION_BITS
        session = max(int(self.get("session") or 0), used) + 1
        self.first_key = (session << _SESSION_BITS) + 1
        self.token = secrets.token_hex(8)
        with self._transaction(connection):
            connection.execute(
                f"DELETE FROM meta WHERE name LIKE '{_TOKEN}%' AND CAST(substr(name, {len(_TOKEN) + 1}) AS INTEGER) "
                f"NOT IN (SELECT DISTINCT key >> {_SESSION_BITS} FROM contexts)"
            )
            self.set("crashes", str(self.crashes))
            self.set("session", str(session))
            self.set(f"{_TOKEN}{session}", self.token)
            self.set("open", str(os.getpid()))

    def tokens(self) -> Callable[[int], str]:
        """Key -> the token of its session."""
        with self._told("read"):
            found = dict(
                self.connection.execute(f"SELECT name, value FROM meta WHERE name LIKE '{_TOKEN}%'").fetchall()
            )
        return lambda key: found.get(f"{_TOKEN}{key >> _SESSION_BITS}", self.id)

    def check_file(self) -> None:
        """Raises JournalError if the file is not where it was: what is committed would be in one that nobody finds."""
        try:
            found = os.stat(self.path)
        except OSError:
            found = None
        if self._claim is not None and (found is None or (found.st_dev, found.st_ino) != self._claim):
            what = "removed or moved away" if found is None else "replaced"
            raise JournalError(f"journal {self.path} was {what} while it was open: stop, and look for it with its -wal")

    def end_crash_streak(self) -> None:
        """The process lives long enough not to count as one that dies at once."""
        if self.crashes:
            self.crashes = 0
            with self._told("written"):
                self.set("crashes", "0")

    def close(self) -> None:
        """Ends the session in order: the next process knows that this one did not die."""
        if self._connection is not None and not self.look:
            try:
                with self._told("closed"), self._transaction(self._connection):
                    self.set("open", "")
                    self.set("crashes", "0")
            finally:
                self._give_up()
        self._give_up()

    def _give_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._claim is not None:
            with _open_lock:
                _open_files.discard(self._claim)
            self._claim = None

    # --- writing

    @property
    def connection(self) -> sqlite3.Connection:
        """The open connection. Raises JournalError when the store is closed."""
        if self._connection is None:
            raise JournalError(f"journal {self.path} is closed")
        return self._connection

    def commit(self, rows: Sequence[Cells]) -> None:
        """Writes rows in one transaction. Raises JournalError; nothing of it is in the file then."""
        try:
            self._commit(self.connection, rows)
        except UnicodeEncodeError:  # an id with half a surrogate: of a file name that is not UTF-8, say
            self._commit(self.connection, [storable(row) for row in rows])

    def _commit(self, connection: sqlite3.Connection, rows: Sequence[Cells]) -> None:
        with self._told("written"):
            if len(rows) <= _SIZES[-1]:
                insert_rows(connection, _padded(rows))
                return
            with self._transaction(connection):
                for start in range(0, len(rows), _SIZES[-1]):
                    insert_rows(connection, _padded(rows[start : start + _SIZES[-1]]))

    def plan_number(self, fingerprint: str, dag: str, tasks: str) -> int:
        """The number of a plan, entered now if it is new. tasks: JSON."""
        with self._told("written"):
            self.connection.execute(
                "INSERT OR IGNORE INTO plans (fingerprint, dag, tasks) VALUES (?, ?, ?)", (fingerprint, dag, tasks)
            )
            found = self.connection.execute(
                "SELECT number FROM plans WHERE fingerprint = ? AND dag = ?", (fingerprint, dag)
            )
            return int(found.fetchone()[0])

    def prune(self, ended_before: float, keep: int, at_most: int = PRUNED_AT_ONCE) -> int:
        """Deletes ended trees, the oldest first: those that ended before (Unix seconds), and those beyond `keep` ended
        contexts.

        Failed ones stay, and whatever belongs to a tree that lives. Returns the number of rows; of `at_most` there may
        be more.
        """
        with self._told("written"):
            nth = self.connection.execute(
                "SELECT ended, key FROM contexts WHERE outcome IS NOT NULL ORDER BY ended DESC, key DESC "
                "LIMIT 1 OFFSET ?",
                (keep,),
            ).fetchone()
            last, key = max(nth or (ended_before, _NO_KEY), (ended_before, _NO_KEY))
            return self.connection.execute(
                "DELETE FROM contexts WHERE key IN (SELECT key FROM contexts WHERE outcome IS NOT NULL "
                "AND outcome NOT IN ('failed', 'stalled') AND ended <= ? AND (ended < ? OR key <= ?) "
                "AND tree NOT IN (SELECT tree FROM contexts WHERE outcome IS NULL "
                "UNION ALL SELECT tree FROM contexts WHERE outcome IN ('failed', 'stalled')) "
                "ORDER BY ended, key LIMIT ?)",
                (last, last, key, at_most),
            ).rowcount

    # --- reading

    def left(self, dags: Sequence[str], taken: Collection[int]) -> int:
        """How many contexts of these DAGs earlier sessions have left without an outcome; `taken` keys do not count."""
        with self._told("read"):
            found = self.connection.execute(
                "SELECT key FROM contexts WHERE outcome IS NULL AND key < ? AND plan IN "
                f"(SELECT number FROM plans WHERE dag IN ({', '.join('?' * len(dags))}))",
                (self.first_key, *dags),
            )
            return sum(key not in taken for (key,) in found)

    def rows(
        self, where: str = "1", values: Sequence[object] = (), damaged: Callable[[JournalError], None] | None = None
    ) -> Iterator[Row]:
        """Rows in order of key, each checked. One that does not match its checksum is left out and handed to `damaged`
        as the error that it is. Raises that where there is none.
        """
        with self._told("read"):
            for found in self.connection.execute(f"SELECT {COLUMNS} FROM contexts WHERE {where} ORDER BY key", values):
                row = readable(Row._make(found))
                if is_whole(row):
                    yield row
                    continue
                error = self.damage(row, "does not match its checksum")
                if damaged is None:
                    raise error
                damaged(error)

    def damage(self, row: Row, what: str) -> JournalError:
        """The error that a row is damaged; what: how that shows."""
        which = f"row {row.key} (context {row.id!r})"
        return JournalError(f"journal {self.path} is damaged: {which} {what}: restore a backup")

    def last_end(self) -> float:
        """The latest Unix time at which a context ended, 0 if none has."""
        with self._told("read"):
            found = self.connection.execute("SELECT max(ended) FROM contexts WHERE outcome IS NOT NULL").fetchone()[0]
        return found or 0.0

    def plans(self) -> dict[int, tuple[str, str, str]]:
        """Number -> (fingerprint, dag, tasks as JSON)."""
        with self._told("read"):
            found = self.connection.execute("SELECT number, fingerprint, dag, tasks FROM plans").fetchall()
        return {number: (fingerprint, dag, tasks) for number, fingerprint, dag, tasks in found}

    def counts(self) -> dict[str, dict[str, int]]:
        """DAG -> outcome (`living` for none) -> number of contexts; for each DAG that was ever journalled."""
        told: dict[str, dict[str, int]] = {dag: {} for _, dag, _ in self.plans().values()}
        with self._told("read"):
            found = self.connection.execute(
                "SELECT dag, outcome, count(*) FROM contexts JOIN plans ON plan = number GROUP BY dag, outcome "
                "ORDER BY dag, outcome"
            )
            for dag, outcome, number in found:
                told[dag][outcome or "living"] = number
        return told

    def get(self, name: str) -> str | None:
        """A value of `meta`."""
        found = self.connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if found is None else found[0]

    def set(self, name: str, value: str) -> None:
        """Sets a value of `meta`, inside a transaction of the caller's if there is one."""
        self.connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    # --- errors

    @contextmanager
    def _transaction(self, connection: sqlite3.Connection) -> Iterator[None]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            known = self._known_reason(doing, error)  # says all that the error does
            reason = known or f"cannot be {doing}: {error}"
            raise JournalError(f"journal {self.path} {reason}") from (None if known else error)
        except PermissionError:
            reason = "it, or a folder above it, is closed to this user: run it as one who may read and write it"
            raise JournalError(f"journal {self.path} cannot be {doing}: {reason}") from None
        except OSError as error:
            raise JournalError(f"journal {self.path} cannot be {doing}: {error.strerror or error}") from error

    def _known_reason(self, doing: str, error: sqlite3.Error) -> str | None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return in_use(self.path)
        if code == sqlite3.SQLITE_FULL:
            return f"cannot be {doing}: the disk is full ({error}); free some space and start again"
        if code == sqlite3.SQLITE_READONLY:
            return f"cannot be {doing}: {READ_ONLY}"
        if code == sqlite3.SQLITE_CANTOPEN:
            return f"cannot be {doing}: the file cannot be opened; look at its permissions and its folder's"
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return f"is damaged ({error}): restore a backup"
        return None


def _padded(rows: Sequence[Cells]) -> Sequence[Cells]:
    size = _SIZES[bisect_left(_SIZES, len(rows))]
    return [*rows, *([rows[-1]] * (size - len(rows)))]


def _text(stored: bytes) -> str:
    return stored.decode(errors="surrogateescape")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
