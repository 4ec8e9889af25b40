"""The file: what it promises, and one line for each way in which it can be broken. No mocks: the disk, the locks and
the limits are the system's own.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import sqlite3
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from obsdag import JournalError
from obsdag.journal.schema import VERSION
from obsdag.journal.store import Store
from obsdag.journal.writer import Writer
from tests.journal.rows import open_store, read, row


def test_what_was_committed_is_there(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    store = open_store(path)
    store.commit([row(1, n=1), row(2, n=2)])
    store.commit([row(key) for key in range(3, 2003)])
    store.commit([row(1, outcome="output", ended=5.0)])
    store.close()

    assert read(path) == list(range(1, 2003))
    store = open_store(path)
    assert store.counts() == {"dag": {"living": 2001, "output": 1}}
    store.close()


@pytest.mark.parametrize(("durability", "number"), [("power", 2), ("process", 1)])
def test_it_is_as_durable_as_it_says(tmp_path: Path, durability: str, number: int) -> None:
    store = open_store(tmp_path / "j.db", durability=durability)

    asked = [store.connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert asked == ["wal", number]
    assert store.connection.execute("PRAGMA locking_mode").fetchone()[0] == "exclusive"
    assert store.connection.execute("PRAGMA foreign_keys").fetchone()[0] == 1
    with pytest.raises(JournalError, match="FOREIGN KEY"):
        store.commit([row(1)._replace(plan=99)])
    store.close()


def test_a_full_disk_is_said_and_breaks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    store = open_store(path, max_page_count=40)
    written = 0
    with pytest.raises(JournalError, match=r"be written: the disk is full .*; free some space and start again$"):
        while True:
            store.commit([row(written + 1, text="x" * 1000)])
            written += 1
    store.close()

    assert written > 20
    assert read(path) == list(range(1, written + 1))


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_read_only_place_is_said(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for each in (tmp_path, *tmp_path.parents):
        if each.stat().st_uid == os.geteuid() and each != Path("/"):
            each.chmod(each.stat().st_mode | 0o055)
    path = folder / "j.db"
    if what == "file":
        open_store(path).close()
        path.chmod(0o444)
        folder.chmod(0o777)
        reason = "opened: the file or its folder is read-only: run it as a user who may write both, or take a copy"
    else:
        folder.chmod(0o555)
        reason = "(made: its folder cannot be written to|opened: it, or a folder above it, is closed to this user)"
    with as_nobody(), pytest.raises(JournalError, match=rf"j\.db cannot be {reason}") as found:
        Store(str(path)).open()
    assert "\n" not in str(found.value)
    folder.chmod(0o755)


HOLD = """
import sys
from obsdag.journal.store import Store
store = Store(sys.argv[1]); store.open(); print("open", flush=True); sys.stdin.read(); store.close()
"""
FOREIGN = """
import sqlite3, sys
c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute("BEGIN EXCLUSIVE"); print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("program", [HOLD, FOREIGN], ids=["another journal", "a stranger"])
def test_another_process_that_has_it_is_named(tmp_path: Path, program: str) -> None:
    path = tmp_path / "j.db"
    open_store(path).close()
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(JournalError, match=f"in use by process {other.pid}: one process at a time") as found:
            Store(str(path)).open()
        assert "".join(traceback.format_exception(found.value)).count("Traceback") == 1
        assert other.stdin is not None
        other.stdin.close()
        other.wait()
    open_store(path).close()


def test_a_second_journal_of_this_process_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "j.db")
    (tmp_path / "link.db").symlink_to(tmp_path / "j.db")
    with pytest.raises(JournalError, match="open in this process already"):
        Store(str(tmp_path / "link.db")).open()
    store.commit([row(1)])
    store.close()


def test_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    open_store(path).close()
    with sqlite3.connect(path) as newer:
        newer.execute(f"PRAGMA user_version = {VERSION + 1}")
    newer.close()
    before = path.read_bytes()
    with pytest.raises(
        JournalError, match=f"is of version {VERSION + 1}; this obsdag knows versions up to {VERSION}: "
    ):
        Store(str(path)).open()
    assert path.read_bytes() == before


def test_an_older_version_is_backed_up_and_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j.db"
    store = open_store(path)
    store.commit([row(1)])
    store.close()
    monkeypatch.setattr("obsdag.journal.store.VERSION", VERSION + 1)
    monkeypatch.setitem(
        sys.modules["obsdag.journal.store"].MIGRATIONS,  # type: ignore[attr-defined]
        VERSION,
        lambda connection: connection.execute("ALTER TABLE contexts ADD COLUMN note TEXT"),
    )
    store = open_store(path)
    assert "note" in [each[1] for each in store.connection.execute("PRAGMA table_info(contexts)")]
    store.close()

    monkeypatch.undo()
    assert read(tmp_path / f"j.db.v{VERSION}.bak") == [1]


def test_other_files_are_not_taken_for_journals(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(JournalError, match="not a journal of obsdag"):
        Store(str(tmp_path / "other.db")).open()
    (tmp_path / "text.db").write_text("a letter to somebody, longer than the head of a file of SQLite's would be" * 9)
    with pytest.raises(JournalError, match=r"is damaged \(file is not a database\): restore a backup"):
        Store(str(tmp_path / "text.db")).open()
    with pytest.raises(JournalError, match="there is no folder"):
        Store(str(tmp_path / "nowhere" / "j.db")).open()


def filled(path: Path) -> bytes:
    """A journal with 300 rows whose process died: its bytes."""
    store = open_store(path)
    store.commit([row(key, text="x" * 300) for key in range(1, 301)])
    store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store._give_up()
    return path.read_bytes()


def damages() -> list[tuple[str, Callable[[bytes, random.Random], bytes]]]:
    def flip(content: bytes, chance: random.Random) -> bytes:
        changed = bytearray(content)
        changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        return bytes(changed)

    return [
        ("a flipped bit", flip),
        ("truncated", lambda content, chance: content[: chance.randrange(1, len(content))]),
    ]


@pytest.mark.parametrize(("what", "damage"), damages(), ids=lambda each: each if isinstance(each, str) else "")
def test_damage_is_found_or_harmless(
    tmp_path: Path, what: str, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    """A flipped bit in what is read is an error in one line; what is read in silence is what was written."""
    content, chance = filled(tmp_path / "j.db"), random.Random(7)
    expected = [row(key, text="x" * 300) for key in range(1, 301)]
    told = 0
    for number in range(150):
        path = tmp_path / f"{number}.db"
        path.write_bytes(damage(content, chance))
        store = Store(str(path))
        try:
            store.open()
            found = list(store.rows())
        except JournalError as error:
            assert "\n" not in str(error)
            told += 1
        else:
            assert found == expected
        finally:
            store._give_up()
            path.unlink()
    assert told > (100 if what == "truncated" else 80)


def test_pruning_leaves_what_lives_and_what_failed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "j.db")
    ended = [row(key, outcome="output", ended=float(key)) for key in range(1, 11)]
    child_of_living = row(11, outcome="merged", ended=1.0, tree=20)
    store.commit([*ended, child_of_living, row(20), row(30, outcome="failed", ended=1.0)])

    assert store.prune(ended_before=3.0, keep=100) == 3
    assert [each.key for each in store.rows()] == [4, 5, 6, 7, 8, 9, 10, 11, 20, 30]
    assert store.prune(ended_before=0.0, keep=5) == 2
    assert [each.key for each in store.rows()] == [6, 7, 8, 9, 10, 11, 20, 30]
    store.close()


def test_pruning_by_and_by_goes_by_the_end_and_then_by_the_key(tmp_path: Path) -> None:
    """Rows of one commit ended at the same moment: no more of them go than are too many."""
    store = open_store(tmp_path / "j.db")
    store.commit([row(key, outcome="output", ended=5.0) for key in range(1, 101)])
    assert store.prune(ended_before=0.0, keep=40, at_most=50) == 50
    assert [each.key for each in store.rows()] == list(range(51, 101))
    assert store.prune(ended_before=0.0, keep=40, at_most=50) == 10
    assert store.prune(ended_before=0.0, keep=40) == 0
    assert [each.key for each in store.rows()] == list(range(61, 101))
    store.close()


def test_pruning_a_full_file_reads_no_more_than_it_must(tmp_path: Path) -> None:
    store = open_store(tmp_path / "j.db")
    plan = store.connection.execute(
        "EXPLAIN QUERY PLAN SELECT tree FROM contexts WHERE outcome IS NULL "
        "UNION ALL SELECT tree FROM contexts WHERE outcome IN ('failed', 'stalled')"
    ).fetchall()
    store.close()
    told = " ".join(step[-1] for step in plan)
    assert "INDEX living" in told
    assert "INDEX failed" in told


# --- the writer


class Listening:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.errors: list[JournalError] = []
        self.told = threading.Event()

    def committed(self, number: int, rows: int, took_s: float) -> None:
        self.numbers.append(number)
        self.told.set()

    def failed(self, error: JournalError) -> None:
        self.errors.append(error)
        self.told.set()


def started(path: Path, **options: object) -> tuple[Writer, Listening]:
    writer, listening = Writer(Store(str(path)), **options), Listening()  # type: ignore[arg-type]
    writer.start().result()
    writer.call(lambda store: store.plan_number("f" * 32, "dag", "[]")).result()
    writer.listen(listening)
    return writer, listening


def test_units_are_committed_whole_and_in_order(tmp_path: Path) -> None:
    writer, listening = started(tmp_path / "j.db", group_rows=4)
    held = threading.Event()
    writer.call(lambda _: held.wait(10))
    for number in range(10):
        writer.put([row(1, n=number), row(2 + number)])
    held.set()
    writer.close()

    assert listening.numbers == sorted(listening.numbers)
    assert listening.numbers[-1] == 10
    assert 2 <= writer.stats.commits <= 10
    assert read(tmp_path / "j.db") == list(range(1, 12))


def test_a_group_of_whole_units_is_one_statement_where_it_can_be(tmp_path: Path) -> None:
    writer, _ = started(tmp_path / "j.db", group_rows=4)
    sizes = []
    commit = writer.store.commit
    writer.store.commit = lambda rows: (sizes.append(len(rows)), commit(rows))[1]  # type: ignore[method-assign]
    held = threading.Event()
    writer.call(lambda _: held.wait(10))
    for first in (10, 20, 40, 60, 90):  # 10, 10, 3, 20 and 1 rows; a group has 16 at most while many wait
        writer.put([row(key) for key in range(first, first + {40: 3, 60: 20, 90: 1}.get(first, 10))])
    held.set()
    writer.close()

    assert sizes == [10, 13, 20, 1]
    assert len(read(tmp_path / "j.db")) == 44


def test_a_call_sees_what_came_before_it(tmp_path: Path) -> None:
    writer, _ = started(tmp_path / "j.db")
    held = threading.Event()
    writer.call(lambda _: held.wait(10))
    writer.put([row(1)])
    seen = writer.call(Store.counts)
    held.set()
    assert seen.result() == {"dag": {"living": 1}}
    writer.close()


@pytest.mark.parametrize("inline", [False, True])
def test_a_writer_that_has_ended_says_so(tmp_path: Path, inline: bool) -> None:
    writer, _ = started(tmp_path / "j.db", inline=inline)
    writer.close()
    with pytest.raises(JournalError, match="is closed"):
        writer.call(Store.counts).result(20)
    with pytest.raises(JournalError, match="is closed"):
        writer.put([row(1)])
    writer.close()
    assert read(tmp_path / "j.db") == []


def test_a_call_is_answered_however_much_comes_after_it(tmp_path: Path) -> None:
    writer, listening = started(tmp_path / "j.db")
    numbers = itertools.count(1)
    calling = threading.Event()

    def more(number: int, rows: int, took_s: float) -> None:  # so that there is always something to commit
        if not calling.is_set():
            writer.put([row(next(numbers))])
            writer.put([row(next(numbers))])

    listening.committed = more  # type: ignore[method-assign]
    writer.put([row(next(numbers))])
    try:
        assert writer.call(lambda _: "answered").result(20) == "answered"
    finally:
        calling.set()
        writer.close()


def test_an_inbox_beyond_its_bound_says_so_and_stays_bounded(tmp_path: Path) -> None:
    writer, listening = started(tmp_path / "j.db", inbox_rows=10)
    held = threading.Event()
    blocked = writer.call(lambda _: held.wait(10))
    for number in range(1000):
        writer.put([row(number % 20 + 1, n=number)])
    assert writer.behind
    assert writer.depth <= 31  # the bound, and a row per context in the newest unit
    held.set()
    blocked.result()
    writer.close()
    assert not writer.behind
    assert listening.numbers[-1] == 1000
    assert read(tmp_path / "j.db") == list(range(1, 21))


@contextmanager
def no_file_grows(path: Path, by_bytes: int = 0) -> Iterator[Callable[[], None]]:
    """The system refuses to let files grow beyond what this one has and so much more; gives what ends that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = max(each.stat().st_size for each in path.parent.iterdir()) + by_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    def end() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        yield end
    finally:
        end()


WRITES = [pytest.param(number * 4096 + part, id=f"write {number + 1}{' in the middle' if part else ''}")
          for number in (0, 1, 2, 5, 13, 24) for part in (0, 1000)]  # fmt: skip
"""A row of 100,000 bytes is some 25 pages: at which write to the log the system says no."""


@pytest.mark.parametrize("by_bytes", WRITES)
def test_an_error_that_passes_is_got_over(tmp_path: Path, by_bytes: int) -> None:
    writer, listening = started(tmp_path / "j.db")
    writer.put([row(1)])
    assert listening.told.wait(10)
    listening.told.clear()
    with no_file_grows(tmp_path / "j.db", by_bytes) as end:
        writer.put([row(2, text="x" * 100_000)])
        while not writer.stats.retries:
            assert not listening.errors
        end()
        assert listening.told.wait(10)
    writer.close()
    assert not listening.errors
    assert read(tmp_path / "j.db") == [1, 2]


@pytest.mark.parametrize("by_bytes", WRITES)
def test_an_error_that_stays_ends_the_writer_and_not_the_file(tmp_path: Path, by_bytes: int) -> None:
    writer, listening = started(tmp_path / "j.db")
    writer.put([row(1)])
    assert listening.told.wait(10)
    listening.told.clear()
    with no_file_grows(tmp_path / "j.db", by_bytes):
        writer.put([row(2, text="x" * 100_000)])
        assert listening.told.wait(10)
        writer.put([row(3)])
        writer.call(lambda _: None).result()
    writer.close()
    assert [str(error) for error in listening.errors] == [str(writer.error)]
    assert "cannot be written: disk I/O error" in str(writer.error)
    assert listening.numbers == [1]
    assert read(tmp_path / "j.db") == [1]
