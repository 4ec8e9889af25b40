"""The journal's part of `MetricsObserver`: commits, and what was taken up after a crash."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from obsdag.core.observer import Observer

if TYPE_CHECKING:
    from obsdag.telemetry.histogram import Buckets
    from obsdag.telemetry.totals import Totals

__all__ = ["JournalTally"]

_COUNTS: Final = ("rows_total", "inbox_rows", "recovered_total", "replayed_total", "dead_letters_total")


class JournalTally(Observer):
    """Counts the journal's facts of one run at a time."""

    def __init__(self, buckets: Buckets) -> None:
        self._commit_buckets = buckets
        self._commit_row = buckets.row()
        self._journal = dict.fromkeys(_COUNTS, 0)

    def journal_committed(self, rows: int, took_s: float, depth: int) -> None:
        """Counts a commit of the journal."""
        self._commit_buckets.observe(self._commit_row, took_s)
        self._journal["rows_total"] += rows
        self._journal["inbox_rows"] = depth

    def journal_recovered(self, contexts: int, replayed: int, dead_letters: int, took_s: float) -> None:
        """Counts what a run took up again."""
        self._journal["recovered_total"] += contexts
        self._journal["replayed_total"] += replayed
        self._journal["dead_letters_total"] += dead_letters

    def add_journal(self, totals: Totals) -> None:
        """Adds what it counted."""
        totals.add_row("obsdag_journal_commit_seconds", (), self._commit_row)
        for name, number in self._journal.items():
            totals.add(f"obsdag_journal_{name}", (), number)
