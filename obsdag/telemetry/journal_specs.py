"""The metrics of the journal; part of `metric_specs.METRICS`."""

from __future__ import annotations

from typing import Final

from obsdag.telemetry.specs import MetricSpec

__all__ = ["JOURNAL_METRICS"]

JOURNAL_METRICS: Final = (
    MetricSpec(
        "obsdag_journal_commit_seconds",
        "histogram",
        "Time of one commit of the journal; its number, beside that of the rows, is the size of a group.",
        (),
        "seconds",
        "journal_committed",
        bad="Long: a slow or busy disk; submits wait as long.",
    ),
    MetricSpec(
        "obsdag_journal_rows_total",
        "counter",
        "Rows that the journal has committed, one per context in a group.",
        source="journal_committed",
        bad="Far more than contexts finish: many small steps of long-lived contexts.",
    ),
    MetricSpec(
        "obsdag_journal_inbox_rows",
        "gauge",
        "Rows that waited when the journal committed last.",
        source="journal_committed",
        bad="Growing: the disk does not keep up, and beyond 8,192 nothing new is taken in.",
    ),
    MetricSpec(
        "obsdag_journal_recovered_total",
        "counter",
        "Contexts of an earlier process that were taken up again.",
        source="journal_recovered",
        bad="Again and again: the process keeps dying.",
    ),
    MetricSpec(
        "obsdag_journal_replayed_total",
        "counter",
        "Executions of recovered contexts that were ready, or ran, when the process died: these may run twice.",
        source="journal_recovered",
        bad="Many: tasks with effects outside should use `ctx.idempotency_key`.",
    ),
    MetricSpec(
        "obsdag_journal_dead_letters_total",
        "counter",
        "Contexts that were running too often when the process died, and are not run again.",
        source="journal_recovered",
        bad="Any: `obsdag journal failed FILE` names them; mend the task, then `obsdag journal retry`.",
    ),
)
