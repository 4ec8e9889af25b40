"""The recorder of a process that follows several that died: it writes down who runs, so that somebody is judged."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from obsdag.journal.entries import row_of
from obsdag.journal.recorder import Recorder

if TYPE_CHECKING:
    from obsdag.core.records import Execution

__all__ = ["WatchfulRecorder"]


class WatchfulRecorder(Recorder):
    """While the process dies again and again: a recovered context's start is committed before its function runs."""

    def execution_started(self, execution: Execution, now: float) -> None:
        """Whoever runs when the process dies is known afterwards."""
        entry = getattr(execution.context, "_entry", None)
        if entry is None or not entry.suspect or entry.started or self._suspended:
            return
        self._flush_all_but_refused()  # a row of one context alone must not run ahead of what this turn did to others
        entry.started = True
        epoch = self._shell.run.epoch if self._shell is not None else 0.0
        self._writer.put([row_of(execution.context, self._number, self._at_source, epoch, time.time())])
        self._writer.call(lambda _: None).result()

    def _flush_all_but_refused(self) -> None:
        """As `flush`, in the middle of a transition: whose data has no form ends with the turn, and stays touched."""
        refused, self._refused = self._refused, deque()
        for context in refused:
            if context._outcome is None:
                self._refused.append(context)
            else:
                self._refuse(context)  # it has ended: its row says why
        later = [each for each in self._refused if self._touched.pop(each, self) is None]
        if self._touched:
            self._hand_over()
        self._touched.update(dict.fromkeys(later))
