"""`SQLiteJournal`: where a file is, how safe it has to be, and the one open writer that all runs of it share.

It is opened by the first run that needs it, off the event loop, and closed when the last is over: what keeps it open
(`acquire`, `release`) are runs and `async with executor:` blocks.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Final

from obsdag.errors import ConfigError, JournalError
from obsdag.journal.codec import Codec
from obsdag.journal.store import PRUNED_AT_ONCE, Durability, Store
from obsdag.journal.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obsdag.journal.recorder import Recorder
    from obsdag.journal.recover import Recovery
    from obsdag.plan import Plan

__all__ = ["SQLiteJournal"]

_DAY_S: Final = 86_400.0
_WATCHED_CRASHES: Final = 2
"""From so many deaths in a row, the starts of recovered contexts are written down: a commit each."""


class SQLiteJournal:
    """A journal in one SQLite file, for `ExecutorConfig(journal=...)`; made when it is not there.

    path: the file; beside it SQLite keeps `-wal`. durability: "power" survives a loss of power (an fsync per commit),
    "process" the death of the process. allow_pickle: data that has no other form is pickled: then whoever can write the
    file can run code here. keep_s, keep: ended contexts are deleted after so many seconds, and beyond so many; failed
    ones stay until `obsdag journal` retries or exports them. max_crashes: a context that was running when the process
    died so many times in a row is failed instead of run again. dags: old name of a DAG -> its name now, where it was
    renamed: its contexts go on under that. Raises ConfigError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: Durability = "power",
        allow_pickle: bool = False,
        keep_s: float = 7 * _DAY_S,
        keep: int = 100_000,
        max_crashes: int = 5,
        dags: Mapping[str, str] | None = None,
        max_page_count: int | None = None,
    ) -> None:
        if durability not in ("power", "process"):
            raise ConfigError(f"SQLiteJournal(durability={durability!r}): it is 'power' or 'process'")
        for name, value, least in (("keep_s", keep_s, 0), ("keep", keep, 0), ("max_crashes", max_crashes, 1)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
                raise ConfigError(f"SQLiteJournal({name}={value!r}): it is a number >= {least}")
        self.path = os.fspath(path)
        if self.path in ("", ":memory:") or self.path.startswith("file:"):
            what = "it is the path of a file, such as 'orders.db'; leave the journal out to keep nothing"
            raise ConfigError(f"SQLiteJournal({self.path!r}): {what}")
        self.path = os.path.abspath(self.path)  # the same file, whatever folder the process is in later
        self.durability: Durability = durability
        self.codec = Codec(allow_pickle)
        self.keep_s, self.keep, self.max_crashes = keep_s, keep, max_crashes
        self.dags = dict(dags or {})
        self.recorders: list[Recorder] = []
        self.writer: Writer | None = None
        self.next_key = 0
        self.recovered = self.replayed = self.dead_letters = self.pruned = 0
        self._max_pages = max_page_count
        self._users = 0
        self._opening: asyncio.Task[Writer] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._loading = asyncio.Lock()
        self._left: set[str] = set()  # DAGs of which it was said what an earlier process has left
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._inline = False  # for tests in virtual time: commits happen where they are asked for

    def __repr__(self) -> str:
        return f"SQLiteJournal({self.path!r}, durability={self.durability!r})"

    # --- life

    async def acquire(self) -> Writer:
        """Opens it, unless it is open, and keeps it so until `release`. Raises JournalError."""
        loop = asyncio.get_running_loop()
        self._settle_on(loop)
        self._users += 1
        try:
            if self._opening is None:
                self._opening = loop.create_task(self._open(self._closing))
            return await asyncio.shield(self._opening)
        except BaseException:
            await self.release()
            raise

    def _settle_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """All that use it at a time share an event loop; one that is no more has left it open."""
        if self._loop is not loop:
            if self._users and self._pid != os.getpid():
                raise JournalError(f"journal {self.path} was opened before this process was forked: make another one")
            if self._loop is not None and self._users and not self._loop.is_closed():
                raise JournalError(f"journal {self.path} is in use on another event loop: one at a time can have it")
            if self.writer is not None:
                self.writer.close()
            self._users, self._loop, self._loading, self._pid = 0, loop, asyncio.Lock(), os.getpid()
            self.writer = self._opening = self._closing = None
            self.recorders.clear()

    async def _open(self, closing: asyncio.Task[None] | None) -> Writer:
        if closing is not None:
            await asyncio.wait([closing])
        store = Store(self.path, self.durability, max_page_count=self._max_pages)
        writer = Writer(store, inline=self._inline)
        try:
            await asyncio.wrap_future(writer.start())
            await asyncio.wrap_future(writer.call(self._prune))
        except BaseException:
            await _off_the_loop(writer)
            raise
        self.writer, self.next_key = writer, store.first_key
        self._left.clear()
        return writer

    def _prune(self, store: Store) -> None:
        """Deletes some of what is too old or too much, and asks for more of it behind what waits to be committed."""
        count = store.prune(time.time() - self.keep_s, self.keep)
        self.pruned += count
        if count == PRUNED_AT_ONCE and self.writer is not None:
            self.writer.call(self._prune)

    async def release(self) -> None:
        """Closes it when nobody else needs it open; what is pending is committed first."""
        self._users -= 1
        if not self._users and self._opening is not None:
            opening, self._opening = self._opening, None
            self._closing = asyncio.get_running_loop().create_task(self._close(opening))
            await asyncio.shield(self._closing)

    async def _close(self, opening: asyncio.Task[Writer]) -> None:
        await asyncio.wait([opening])
        if opening.cancelled() or opening.exception() is not None:
            return
        writer, self.writer = self.writer, None
        if writer is not None:
            if writer.error is None:
                writer.call(self._prune)
            await _off_the_loop(writer)

    # --- what runs ask

    @property
    def depth(self) -> int:
        """Rows that wait to be committed."""
        return self.writer.depth if self.writer is not None else 0

    def open_writer(self) -> Writer:
        """The writer. Raises JournalError while the journal is not open, and once it has failed."""
        if self.writer is None:
            raise JournalError(f"journal {self.path} is not open")
        if self.writer.error is not None:
            raise self.writer.error
        return self.writer

    async def record(self, plan: Plan) -> Recorder:
        """What a run on `plan` is recorded by; the journal is open. Raises JournalError."""
        from obsdag.journal.recorder import Recorder
        from obsdag.journal.watchful import WatchfulRecorder

        dying = self.open_writer().store.crashes >= _WATCHED_CRASHES
        recorder = WatchfulRecorder(self, plan) if dying else Recorder(self, plan)
        await recorder.open()
        return recorder

    async def left(self, plan: Plan) -> int:
        """How many contexts on DAGs of this name an earlier process has left that no run has taken up.

        Asked again while the journal is open it is 0: once is enough to be told of it. Raises JournalError.
        """
        async with self._loading:
            if plan.name in self._left:
                return 0
            dags = [plan.name, *(old for old, new in self.dags.items() if new == plan.name)]
            taken = {key for recorder in self.recorders for key in recorder.keys}
            found = await asyncio.wrap_future(self.open_writer().call(lambda store: store.left(dags, taken)))
            self._left.add(plan.name)
            return found

    async def load(self, plan: Plan, tasks: Mapping[str, str | None] | None = None) -> Recovery:
        """The contexts on DAGs of this name that have no outcome and are no living run's business.

        Raises PlanChangedError, JournalError.
        """
        from obsdag.journal.recover import Theirs, load

        async with self._loading:  # whoever loads takes up what it found before the next one looks
            taken = {key for recorder in self.recorders for key in recorder.keys}
            theirs = Theirs(taken, self.next_key)
            found = self.open_writer().call(
                lambda store: load(store, plan, self.codec, tasks, self.dags, theirs, self.max_crashes)
            )
            return await asyncio.wrap_future(found)


async def _off_the_loop(writer: Writer) -> None:
    """Closes a writer without holding up the event loop, whatever becomes of whoever asked."""
    await asyncio.shield(asyncio.wrap_future(writer.end()))
    writer.close()
