"""The metrics of the journal, part of `metric_specs.METRICS`; its spans and their attributes, part of the catalogue."""

from __future__ import annotations

from typing import Final

from obsdag.telemetry.specs import AttributeSpec, MetricSpec, SpanSpec

__all__ = ["JOURNAL_ATTRIBUTES", "JOURNAL_METRICS", "JOURNAL_SPANS", "SLOW_COMMIT_S"]

SLOW_COMMIT_S: Final = 0.1
"""From so many seconds a commit has a span."""

_RUN: Final = ("obsdag.engine", "obsdag.dag")

JOURNAL_SPANS: Final = (
    SpanSpec(
        "journal commit",
        "INTERNAL",
        "`run`",
        "a commit of the journal that took >= 100 ms, at most one a second, or that failed for good",
        (),
        (*_RUN, "obsdag.journal.rows", "obsdag.journal.depth", "obsdag.journal.left_out", "error.type"),
    ),
    SpanSpec(
        "journal recover",
        "INTERNAL",
        "`run`",
        "a run takes up the contexts of an earlier process",
        (),
        (
            *_RUN,
            *("obsdag.journal.contexts", "obsdag.journal.replayed", "obsdag.journal.dead_letters"),
            "obsdag.journal.took_s",
        ),
    ),
)

JOURNAL_ATTRIBUTES: Final = (
    AttributeSpec("obsdag.journal.rows", "int", "journal commit", "rows of the commit, one per context"),
    AttributeSpec("obsdag.journal.depth", "int", "journal commit", "rows that still waited"),
    AttributeSpec(
        "obsdag.journal.left_out", "int", "journal commit", "slow commits since the one before that have no span"
    ),
    AttributeSpec("obsdag.journal.contexts", "int", "journal recover", "contexts that were taken up"),
    AttributeSpec("obsdag.journal.replayed", "int", "journal recover", "executions that may run twice"),
    AttributeSpec(
        "obsdag.journal.dead_letters", "int", "journal recover", "contexts that failed: running at too many crashes"
    ),
    AttributeSpec(
        "obsdag.journal.took_s",
        "double",
        "journal recover",
        "seconds to read them, before the run, and to take them up",
    ),
)

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
