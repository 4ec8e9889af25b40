"""Everything that the engine tells the outside, declared once: metrics, spans, attributes, log events.

The names are public API: dashboards, rules, documentation and tests are made from these declarations. Change one only
with its dashboards, rules, tests and CHANGELOG line. `python -m obsdag.telemetry.catalogue` prints the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from obsdag.core.states import EXECUTION_OUTCOMES, LANES, OUTCOMES, STATES
from obsdag.telemetry.journal_specs import JOURNAL_ATTRIBUTES, JOURNAL_SPANS
from obsdag.telemetry.metric_specs import METRICS
from obsdag.telemetry.specs import (
    ALL_DAGS,
    COMMON_LABELS,
    DROP_REASONS,
    NO_TASK,
    OTHER,
    PHASES,
    POOLS,
    REJECT_REASONS,
    RESOURCES,
    RESTART_KINDS,
    RUN_OUTCOMES,
    SIGNALS,
    TRACE_DECISIONS,
    WORKER_STATES,
    AttributeSpec,
    EventSpec,
    Label,
    MetricSpec,
    SpanSpec,
    error_type_of,
)

__all__ = [
    "ALL_DAGS",
    "ATTRIBUTES",
    "COMMON_LABELS",
    "DROP_REASONS",
    "EVENTS",
    "METRICS",
    "NO_TASK",
    "OTHER",
    "PHASES",
    "POOLS",
    "REJECT_REASONS",
    "RESOURCES",
    "RESTART_KINDS",
    "RUN_OUTCOMES",
    "SCOPE",
    "SIGNALS",
    "SPANS",
    "TRACE_DECISIONS",
    "WORKER_STATES",
    "AttributeSpec",
    "EventSpec",
    "Label",
    "MetricSpec",
    "SpanSpec",
    "attributes_table",
    "error_type_of",
    "event",
    "events_table",
    "metric",
    "metrics_table",
    "reference",
    "spans_table",
]

SCOPE: Final = "obsdag"
"""The instrumentation scope of all spans, and the name of the logger."""

_ALWAYS = ("obsdag.engine", "obsdag.dag", "obsdag.context.id")

SPANS: Final = (
    SpanSpec(
        "context {dag}",
        "CONSUMER",
        '`execute` in serving and `submit(trace="child")`: the caller, also after a crash with a journal; else none',
        "a root context from entering to its outcome",
        ("submitter", "run", "maker", "continuation"),
        (
            *_ALWAYS,
            *("obsdag.context.outcome", "obsdag.context.parent_id", "obsdag.ledger.{state}", "error.type"),
            *("obsdag.stall.task", "obsdag.stall.missing"),
        ),
    ),
    SpanSpec(
        "execute {task}",
        "INTERNAL",
        "of a root: its `context` span; of a child: the execution that made it",
        "one attempt of one task on one context",
        ("retry", "upstream"),
        (
            *_ALWAYS,
            *("obsdag.task", "obsdag.attempt", "obsdag.execution.outcome", "obsdag.wait_s.{state}", "obsdag.lane"),
            *(
                "obsdag.worker",
                "obsdag.executor",
                "obsdag.critical",
                "obsdag.context.outcome",
                "obsdag.context.parent_id",
            ),
            *("error.type", "obsdag.loop.iteration", "obsdag.join.upstream_count"),
        ),
    ),
    SpanSpec(
        "wait {state}",
        "INTERNAL",
        "`context`",
        "a stay in one waiting state, where it lasted >= 100 ms",
        (),
        (*_ALWAYS, "obsdag.task"),
    ),
    SpanSpec("run {dag}", "INTERNAL", "the caller", "an `Executor.run`", (), ("obsdag.engine", "obsdag.dag")),
    SpanSpec(
        "dispatch {task}",
        "PRODUCER",
        "the execution",
        "hand-over to a process or machine; the far side continues the trace",
        (),
        (*_ALWAYS, "obsdag.task", "obsdag.executor"),
    ),
    *JOURNAL_SPANS,
)

ATTRIBUTES: Final = (
    AttributeSpec("obsdag.engine", "string", "all spans", "name of the engine: `Telemetry(engine=)`"),
    AttributeSpec("obsdag.dag", "string", "all spans", "name of the DAG"),
    AttributeSpec("obsdag.context.id", "string", "all but `run`, `journal`", "id of the context"),
    AttributeSpec("obsdag.task", "string", "execute, dispatch, wait", "id of the task"),
    AttributeSpec("obsdag.attempt", "int", "execute", "number of the attempt, from 1"),
    AttributeSpec("obsdag.execution.outcome", "string", "execute", "how the attempt ended", EXECUTION_OUTCOMES),
    AttributeSpec(
        "obsdag.wait_s.{state}", "double", "execute", "seconds in a state between ready and started", STATES[1:]
    ),
    AttributeSpec("obsdag.lane", "string", "execute", "lane of the queue it came by", LANES),
    AttributeSpec("obsdag.worker", "int", "execute", "number of the driving worker, -1 for none"),
    AttributeSpec(
        "obsdag.executor", "string", "execute, dispatch", "where it ran", ("loop", "thread", "process", "remote")
    ),
    AttributeSpec("obsdag.critical", "bool", "execute", "whether it is on the critical path of its root"),
    AttributeSpec("obsdag.context.outcome", "string", "context, execute", "how the context ended", OUTCOMES),
    AttributeSpec(
        "obsdag.context.parent_id", "string", "context, execute", "id of the context's parent, where it has one"
    ),
    AttributeSpec("obsdag.ledger.{state}", "double", "context", "seconds that the root spent in a state", STATES),
    AttributeSpec("obsdag.stall.task", "string", "context", "the task that a stalled context waits at"),
    AttributeSpec("obsdag.stall.missing", "string", "context", "upstreams that will never complete, by commas"),
    AttributeSpec(
        "error.type", "string", "context, execute, journal commit", "class of the exception, with its module"
    ),
    AttributeSpec("obsdag.loop.iteration", "int", "execute", "number of the item that a loop gave, from 0"),
    AttributeSpec(
        "obsdag.join.upstream_count", "int", "execute", "executions that were joined, links beyond 64 included"
    ),
    AttributeSpec(
        "obsdag.link.type",
        "string",
        "links",
        "why a span is linked",
        ("submitter", "run", "maker", "retry", "upstream", "continuation"),
    ),
    *JOURNAL_ATTRIBUTES,
)

_EXECUTION = ("context_id", "root_id", "task", "attempt", "worker", "trace_id", "span_id")
_CONTEXT = ("context_id", "root_id", "trace_id", "span_id")
_COUNTS = ("entered", *OUTCOMES)  # outcomes that did not occur are left out

EVENTS: Final = (
    EventSpec("context.entered", "debug", "a context entered", (*_CONTEXT, "kind", "maker"), "context_entered"),
    EventSpec("execution.started", "debug", "an attempt begins", _EXECUTION, "execution_started"),
    EventSpec(
        "execution.succeeded", "debug", "an attempt succeeded", (*_EXECUTION, "duration_s"), "execution_finished"
    ),
    EventSpec(
        "limit.deferred", "debug", "an execution waits for a permit", (*_CONTEXT, "task", "limiter"), "limit_deferred"
    ),
    EventSpec("context.bypassed", "debug", "a new context need not run tasks", (*_CONTEXT, "count"), "tasks_bypassed"),
    EventSpec(
        "context.destroyed",
        "debug",
        "a context ended by garbage collection",
        (*_CONTEXT, "task", "reason"),
        "context_destroyed",
    ),
    EventSpec("run.started", "info", "a run begins", ("run_id", "kind", "tasks"), "run_started"),
    EventSpec(
        "run.finished",
        "info",
        "a run ended: the one canonical line; suppressed: lines of the run that were throttled away",
        ("run_id", "outcome", "duration_s", *_COUNTS, "executions", "retries", "slowest", "suppressed"),
        "run_finished",
    ),
    EventSpec(
        "run.progress",
        "info",
        "how far a run is, every 10 s",
        ("run_id", "living", *_COUNTS, "executions", "busy_workers", "queue", "states"),
        "loop_lagged",
    ),
    EventSpec(
        "context.finished",
        "info",
        "a root context ended, and where its time went (sampled: one per outcome and second)",
        (*_CONTEXT, "outcome", "duration_s", "ledger"),
        "context_finished",
        throttled=True,
    ),
    EventSpec(
        "drain.started",
        "info",
        "no more is accepted, what is in flight is finished",
        ("run_id", "living"),
        "phase_changed",
    ),
    EventSpec(
        "drain.finished",
        "info",
        "draining ended: the manifest of what was cancelled",
        ("run_id", "manifest"),
        "drain_finished",
    ),
    EventSpec(
        "execution.retry_scheduled",
        "warning",
        "a failed attempt will be followed by another",
        (*_EXECUTION, "delay_s", "error_type", "error"),
        "retry_scheduled",
        throttled=True,
    ),
    EventSpec(
        "context.dropped",
        "warning",
        "a task returned nothing; said once per task and interval, not for `pass_through` or `may_drop`",
        (*_CONTEXT, "task"),
        "context_dropped",
        throttled=True,
    ),
    EventSpec(
        "event_loop.blocked",
        "warning",
        "a task keeps the event loop from turning; line: the line of its code that does",
        (*_EXECUTION, "blocked_s", "line"),
        "loop_blocked",
        throttled=True,
    ),
    EventSpec(
        "submit.rejected", "warning", "a submission was turned away", ("reason",), "submit_rejected", throttled=True
    ),
    EventSpec(
        "pool.rebuilt",
        "warning",
        "a worker of a pool died and was replaced",
        ("pool", "reason"),
        "pool_rebuilt",
        throttled=True,
    ),
    EventSpec(
        "service.restarted",
        "warning",
        "a stream, service or thread ended or raised and is made anew",
        ("task", "kind", "error_type", "error"),
        "task_restarted",
        throttled=True,
    ),
    EventSpec(
        "thread.abandoned",
        "warning",
        "a thread does not come back",
        ("task", "pool_thread", "running_s"),
        "thread_abandoned",
        throttled=True,
    ),
    EventSpec(
        "telemetry.dropping",
        "warning",
        "telemetry loses data (how much, and in all by signal and reason), or an observer raised and was detached",
        ("dropped", "totals", "observer", "fact", "error_type", "error"),
        "observer_failed",
        throttled=True,
    ),
    EventSpec(
        "telemetry.labels_capped",
        "warning",
        "more names than a label may tell apart; the rest is counted as `_other`; said once per label",
        ("label", "cap", "first"),
    ),
    EventSpec(
        "telemetry.multiprocess_ignored",
        "warning",
        "PROMETHEUS_MULTIPROC_DIR is set, and each process shows its own metrics on a port of its own; said once",
        ("advice",),
    ),
    EventSpec(
        "telemetry.collect_failed",
        "warning",
        "a part of a scrape failed and was left out",
        ("part", "error"),
        throttled=True,
    ),
    EventSpec(
        "journal.recovered",
        "info",
        "a run took up contexts of an earlier process; replayed: executions that may run twice",
        ("contexts", "replayed", "dead_letters", "duration_s"),
        "journal_recovered",
    ),
    EventSpec(
        "journal.left",
        "warning",
        "an earlier process left contexts without an outcome, which this run does not take up: `recover` does; said "
        "once while the journal is open",
        ("contexts", "advice"),
        "journal_left",
    ),
    EventSpec(
        "journal.failed",
        "error",
        "nothing more can be committed to the journal: the run ends, and what was committed is safe",
        ("error_type", "error"),
        "journal_failed",
    ),
    EventSpec(
        "execution.failed",
        "error",
        "a context failed for good, with exception",
        (*_EXECUTION, "duration_s", "error_type", "error"),
        "context_failed",
        throttled=True,
    ),
    EventSpec(
        "context.stalled",
        "error",
        "a context cannot go on: the diagnosis",
        (*_CONTEXT, "task", "missing", "reason"),
        "context_stalled",
        throttled=True,
    ),
    EventSpec(
        "run.deadlocked",
        "error",
        "a run ended with stalled contexts: how many, at which tasks, and the first of them",
        ("run_id", "stalled", "tasks", "first"),
        "run_deadlocked",
    ),
    EventSpec(
        "run.failed",
        "error",
        "a run was ended by a failure, an input that raised, or its deadline",
        ("run_id", "outcome", "duration_s", *_COUNTS),
        "run_finished",
    ),
)

_METRICS: Final = {spec.name: spec for spec in METRICS}
_EVENTS: Final = {spec.name: spec for spec in EVENTS}


def metric(name: str) -> MetricSpec:
    """The declaration of a metric by its name; raises KeyError for one that does not exist."""
    return _METRICS[name]


def event(name: str) -> EventSpec:
    """The declaration of a log event by its name; raises KeyError for one that does not exist."""
    return _EVENTS[name]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _label_cell(label: Label) -> str:
    if label.values and label.cap is None:
        return f"`{label.name}` ({', '.join(label.values)})"
    return f"`{label.name}` (at most {label.cap}, then `{OTHER}`)" if label.cap else f"`{label.name}`"


def metrics_table() -> str:
    """All metrics as a Markdown table. E: its buckets have exemplars; S: it is read at scrape."""
    rows = []
    for spec in METRICS:
        marks = [mark for mark, holds in (("E", spec.exemplars), ("S", "scrape" in spec.source)) if holds]
        labels = ", ".join(map(_label_cell, spec.labels)) or "-"
        rows.append((f"`{spec.name}`", spec.kind, spec.unit or "-", labels, " ".join(marks) or "-", spec.help))
    return _table(("metric", "type", "unit", "labels beside `engine`, `dag`", "", "meaning"), rows)


def spans_table() -> str:
    """All kinds of spans as a Markdown table."""
    rows = (
        (f"`{s.name}`", s.meaning, s.kind, s.parent, ", ".join(f"`{link}`" for link in s.links) or "-") for s in SPANS
    )
    return _table(("span", "what", "kind", "parent", "links"), rows)


def attributes_table() -> str:
    """All attributes as a Markdown table."""
    rows = (
        (f"`{a.key}`", a.type, a.on, a.meaning + (f" ({', '.join(a.values)})" if a.values else "")) for a in ATTRIBUTES
    )
    return _table(("attribute", "type", "on", "meaning"), rows)


def events_table() -> str:
    """All log events as a Markdown table."""
    rows = (
        (
            f"`{e.name}`",
            e.level,
            e.meaning + (" (throttled)" if e.throttled else ""),
            ", ".join(f"`{k}`" for k in e.keys),
        )
        for e in EVENTS
    )
    return _table(("event", "level", "meaning", "keys beside `engine`, `dag`"), rows)


_HEAD: Final = """# What obsdag tells

Made from the code by `python -m obsdag.telemetry.catalogue > dashboards/TELEMETRY.md`. Every name is public, and
changing one is a breaking change. Metrics: E, its buckets have exemplars of kept traces; S, it is read when somebody
scrapes.

"""


def reference() -> str:
    """The whole catalogue as Markdown, for the documentation."""
    parts = (
        ("Metrics", metrics_table()),
        ("Spans", spans_table()),
        ("Attributes", attributes_table()),
        ("Log events", events_table()),
    )
    return _HEAD + "\n\n".join(f"## {title}\n\n{table}" for title, table in parts) + "\n"


if __name__ == "__main__":
    print(reference(), end="")  # noqa: T201
