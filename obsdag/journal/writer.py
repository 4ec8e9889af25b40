"""The writer: one thread that owns the store and commits groups of whole units.

A unit is the rows of one turn of the event loop: every row that the transitions of that turn touched, so that the file
never shows half of one. Units are committed in order, several in a group: until 256 rows are together, 2 ms have
passed, or nothing else is pending; of several rows of one context only the latest is written. While more is pending
than that, a group is up to four times as large: a busy event loop gives this thread the GIL only every 5 ms, once per
commit, and each look for I/O begins the 5 ms anew. So whoever puts as much as a group gives it away for a moment: this
thread ends its last commit and begins the next, which then goes on beside the loop (without that it began when the
inbox was full and the loop at rest, and a run of short contexts took some percent longer).

Who may do what: `put`, `call` and `close` from any thread. The inbox is bounded: beyond `inbox_rows`, `behind` says so,
for whoever can take less work in, and what comes is merged into the newest unit, so that it holds a row per context at
most. A commit that fails is tried again for 0.7 s, since disks recover; then the writer has failed for good: it
takes nothing more, and tells its listeners why.

The end, by steps: 1. what is pending is committed; 2. the store is closed; 3. the thread ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from obsdag.errors import JournalError
from obsdag.journal.schema import Cells
from obsdag.journal.store import Store

__all__ = ["Listener", "Writer", "WriterStats"]

_T = TypeVar("_T")
_PAUSES_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
_GIL_S = 3e-5
"""Time for another thread to wake up and take the GIL; three times as much gained nothing."""


class Listener(Protocol):
    """Who is told, from the writer's thread, what became of units."""

    def committed(self, number: int, rows: int, took_s: float) -> None:
        """Every unit up to `number` is in the file, the latest by a commit of so many rows and seconds."""

    def failed(self, error: JournalError) -> None:
        """Nothing more will be committed."""


class WriterStats:
    """Plain numbers for metrics. Written by the writer's thread, read by anybody."""

    __slots__ = ("commit_s", "commits", "longest_s", "retries", "rows", "written")

    def __init__(self) -> None:
        self.commits = self.rows = self.written = self.retries = 0
        self.commit_s = self.longest_s = 0.0


class Writer:
    """The thread of one open journal. depth: rows that wait. most_rows: of a group, while many wait."""

    def __init__(
        self,
        store: Store,
        *,
        group_rows: int = 256,
        group_s: float = 0.002,
        inbox_rows: int = 8_192,
        inline: bool = False,
    ) -> None:
        self.store = store
        self.stats = WriterStats()
        self.error: JournalError | None = None
        self.depth = 0
        self.most_rows = 4 * group_rows
        self._group_rows, self._group_s, self._inbox_rows = group_rows, group_s, inbox_rows
        self._inbox: deque[tuple[int, dict[int, Cells]]] = deque()
        self._calls: deque[tuple[int, Callable[[Store], Any], Future[Any]]] = deque()  # behind which unit they stand
        self._number = 0
        self._done = 0  # units up to this one are committed, or given up
        self._listeners: list[Listener] = []
        self._wake = threading.Condition()
        self._closing = self._gone = False
        self._ended: Future[None] = Future()
        self._inline = inline
        self._thread: threading.Thread | None = None

    def start(self) -> Future[None]:
        """Opens the store on the writer's thread; the future raises JournalError."""
        opened = self._queue_call(Store.open)
        if self._inline:
            self._work_off()
        else:
            thread = threading.Thread(target=self._main, name="obsdag-journal", daemon=True)
            thread.start()
            self._thread = thread
        return opened

    # --- from any thread

    @property
    def behind(self) -> bool:
        """Whether more rows wait than should."""
        return self.depth > self._inbox_rows

    def listen(self, listener: Listener) -> None:
        """Tells `listener` of commits from now on; of the failure, too, if that has come already."""
        with self._wake:
            self._listeners.append(listener)
        if self.error is not None:
            listener.failed(self.error)

    def leave(self, listener: Listener) -> None:
        """Tells it nothing more."""
        with self._wake:
            self._listeners.remove(listener)

    def put(self, rows: Iterable[Cells]) -> int:
        """Hands in the rows of one unit; returns its number, which `committed` will tell. Never waits for the disk.

        Raises JournalError when the writer has ended.
        """
        unit = {row[0]: row for row in rows}
        with self._wake:
            if self._gone:
                raise self._closed()
            self._number += 1
            if self.depth + len(unit) > self._inbox_rows and self._inbox:
                _, newest = self._inbox.pop()
                before = len(newest)
                newest.update(unit)
                self._inbox.append((self._number, newest))
                self.depth += len(newest) - before
            else:
                self._inbox.append((self._number, unit))
                self.depth += len(unit)
            self._wake.notify()
            number = self._number
        if self._inline:
            self._work_off()
        elif len(unit) >= self._group_rows:
            time.sleep(_GIL_S)
        return number

    def call(self, function: Callable[[Store], _T]) -> Future[_T]:
        """Has the writer call `function(store)` after what is pending now; when it has ended, that is JournalError."""
        future = self._queue_call(function)
        if self._inline:
            self._work_off()
        return future

    def look(self) -> None:
        """Has it see whether the file is still there; if not, it has failed for good."""
        if self.error is None:
            self.call(self._look)

    def _queue_call(self, function: Callable[[Store], _T]) -> Future[_T]:
        future: Future[_T] = Future()
        with self._wake:
            if self._gone:
                future.set_exception(self._closed())
                return future
            self._calls.append((self._number, function, future))
            self._wake.notify()
        return future

    def _closed(self) -> JournalError:
        return JournalError(f"journal {self.store.path} is closed")

    def end(self) -> Future[None]:
        """Has it commit what is pending and close the store; the future says when that is done. Never raises."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._inline or self._thread is None:
            self._work_off()
            self._gone = True
            self._shut()
        return self._ended

    def close(self) -> None:
        """`end`, and waits for it and for the thread."""
        self.end().result()
        if self._thread is not None:
            self._thread.join()

    # --- the thread

    def _main(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._calls or self._closing):
                    self._wake.wait()
                if self._closing and not self._inbox and not self._calls:
                    self._gone = True
                    break
            self._work_off()
        self._shut()

    def _shut(self) -> None:
        try:
            self.store.close()
        except JournalError as error:
            self.error = self.error or error
        if not self._ended.done():
            self._ended.set_result(None)

    def _work_off(self) -> None:
        """Commits units, and answers each call when the units that stood before it are committed: where more and more
        come it would else wait for ever.
        """
        while True:
            with self._wake:
                call = None
                if self._calls and (self._calls[0][0] <= self._done or not self._inbox):
                    call = self._calls.popleft()
                elif not self._inbox:
                    return
            if call is not None:
                self._answer(call[1], call[2])
            else:
                last, group = self._gather()
                self._commit(last, list(group.values()))
                self._done = max(self._done, last)  # in line, what is told of a commit may have made another

    def _answer(self, function: Callable[[Store], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return  # whoever asked was cancelled meanwhile
        try:
            future.set_result(function(self.store))
        except BaseException as error:
            future.set_exception(error)

    def _gather(self) -> tuple[int, dict[int, Cells]]:
        """Whole units: until there are rows enough, the time is over, or nothing else is pending. Where one more would
        be too many for one statement it is left: two, in a transaction, give the GIL away four times instead of once.
        """
        end = time.monotonic() + self._group_s
        group: dict[int, Cells] = {}
        last = 0
        while True:
            with self._wake:
                if not self._inbox or (group and len(group) + len(self._inbox[0][1]) > self.most_rows):
                    return last, group
                last, unit = self._inbox.popleft()
                self.depth -= len(unit)
                most = self.most_rows if self.depth > self._group_rows else self._group_rows
            group.update(unit)
            self.stats.rows += len(unit)
            if len(group) >= most or time.monotonic() > end:
                return last, group

    def _commit(self, last: int, rows: list[Cells]) -> None:
        if self.error is not None:
            return
        began = time.monotonic()
        error = self._try_commit(rows)
        if error is not None:
            error.rows, error.took_s = len(rows), time.monotonic() - began
            self._fail(error)
            return
        took = time.monotonic() - began
        stats = self.stats
        stats.commits += 1
        stats.written += len(rows)
        stats.commit_s += took
        stats.longest_s = max(stats.longest_s, took)
        if not self._inbox:  # while more waits, once a second is enough: a look costs this thread the GIL
            self._look(self.store)
            if self.error is not None:
                return  # nobody is told of rows that nobody will find
        for listener in list(self._listeners):
            listener.committed(last, len(rows), took)

    def _fail(self, error: JournalError) -> None:
        self.error = error
        for listener in list(self._listeners):
            listener.failed(error)

    def _look(self, store: Store) -> None:
        try:
            store.check_file()
        except JournalError as error:
            self._fail(error)

    def _try_commit(self, rows: list[Cells]) -> JournalError | None:
        """Commits, again after a pause if it fails; what it failed of for good."""
        for pause in (*_PAUSES_S, None):
            try:
                self.store.commit(rows)
            except JournalError as error:
                if pause is None:
                    return error
                self.stats.retries += 1
                if not self._inline:
                    time.sleep(pause)
            except Exception as error:  # a value that SQLite does not take: no disk gets over that
                return JournalError(f"journal {self.store.path} cannot be written: {error!r}")
            else:
                return None
        return None
