"""Puts what an earlier process has left into a run that begins: the half of the recorder that is used once.

Trees of which something was running when the process died, repeatedly, go on one by one: one of them may have killed
it, and the others are cleared.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from obsdag.core.observer import Facts, Observer
from obsdag.core.queue import CONTINUING, NEW
from obsdag.core.restoring import Saved, restore
from obsdag.errors import JournalError
from obsdag.journal.entries import is_on_trial

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.journal.journal import SQLiteJournal
    from obsdag.journal.recover import Recovery
    from obsdag.shell import RunShell

__all__ = ["Restorer"]


class Restorer(Observer):
    """See the module. lasting: keys of contexts that had no outcome when they were written down.

    loop: of the run; None: the running one.
    """

    def __init__(self, journal: SQLiteJournal, loop: asyncio.AbstractEventLoop | None) -> None:
        self.journal = journal
        self.lasting: set[int] = set()
        self._shell: RunShell | None = None
        self._loop = loop if loop is not None else asyncio.get_running_loop()
        self._trials: deque[list[Saved]] = deque()
        self._tried: list[Context] = []
        self._moved: set[Context] = set()  # see Recovery; each is written down when it is in the run
        self._restoring = self._suspended = False

    def _touch(self, context: Context) -> None:
        """Has the context written down."""
        raise NotImplementedError

    @property
    def _facts(self) -> Facts | None:
        return None if self._shell is None else self._shell.run.facts

    def take_up(self, recovery: Recovery, now: float) -> None:
        """Puts the contexts of a journal into the run that begins; those that keep killing the process fail."""
        shell = self._shell
        assert shell is not None
        contexts = len(recovery.living)
        self.lasting.update(context._entry.key for context in recovery.living)
        self.journal.recovered += contexts
        calm: list[Saved] = []
        trials: dict[int, list[Saved]] = {}
        for saved in recovery.on_clock(shell.run.epoch):
            tree = saved.context._entry.tree
            trials.setdefault(tree, []).append(saved) if tree in recovery.suspects else calm.append(saved)
        self._trials.extend(trials.values())
        self._moved = recovery.moved
        self._restore(shell, calm, now, NEW)
        for context in recovery.culprits:
            if context._outcome is not None:
                continue  # it ended with one above it
            times = context._entry.crashes
            error = JournalError(f"context {context.id!r} was running {times} times in a row when the process died")
            shell.run.fail_context(context, error, None, now)
            self.journal.dead_letters += 1
        shell.run._settle_all(now)
        replayed = sum(getattr(context, "_ready", 0).bit_count() for context in recovery.living)
        self.journal.replayed += replayed
        facts = shell.run.facts
        if contexts and facts.journal_recovered is not None:
            took_s = recovery.took_s + shell.clock() - now
            facts.journal_recovered(contexts, replayed, len(recovery.culprits), took_s)
        self._next_trial()

    def _restore(self, shell: RunShell, saved: list[Saved], now: float, lane: int) -> None:
        self._restoring = True
        try:
            restore(shell.run, saved, now, lane)
        finally:
            self._restoring = False
        for context in [each.context for each in saved if each.context in self._moved] if self._moved else ():
            self._moved.remove(context)
            self._touch(context)

    def _next_trial(self) -> None:
        """Trees of which one was running when the process died, repeatedly, go on one by one: the innocent are cleared.

        They go before new work, behind which they could wait until the process dies again, and be judged never.
        """
        shell = self._shell
        while self._trials and shell is not None and not self._suspended and not any(map(is_on_trial, self._tried)):
            now = shell.clock()
            saved = self._trials.popleft()
            self._tried = [each.context for each in saved if each.context._outcome is None]
            self._restore(shell, saved, now, CONTINUING)
            shell.run.dirty = True
            self._loop.call_soon(shell.pump)

    def end_trial(self, context: Context, now: float) -> None:
        """A tree that waits for its trial enters, only to end: its ticket's deadline has passed, or it is cancelled."""
        for saved in self._trials:
            if saved[0].context._entry.tree == context._entry.tree and self._shell is not None:
                self._trials.remove(saved)
                self._restore(self._shell, saved, now, CONTINUING)
                return
