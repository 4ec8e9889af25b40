"""The recorder of a process that follows several that died: it writes down who runs, so that somebody is judged."""

from __future__ import annotations

import time
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
        if self._refused:
            return  # they end with this turn, not in the middle of a transition: this start is not written down
        self.flush()  # a row of one context alone must not run ahead of what the same turn did to others
        entry.started = True
        epoch = self._shell.run.epoch if self._shell is not None else 0.0
        self._writer.put([row_of(execution.context, self._number, self._at_source, epoch, time.time())])
        self._writer.call(lambda _: None).result()
