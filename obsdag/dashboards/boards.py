"""The four dashboards: which panels there are, and what each of them asks (TELEMETRY section 6)."""

from __future__ import annotations

from typing import Final

from obsdag.dashboards.panels import (
    Board,
    Panel,
    Query,
    Row,
    average,
    described,
    heat,
    now,
    panel,
    quantile,
    quantiles,
    ratio,
    selector,
    speed,
    usually,
)

__all__ = ["BOARDS"]

_TARGET = 'job=~"$job", instance=~"$instance"'
_HOST = f"{{{_TARGET}}}"
_FAILED = 'outcome=~"failed|stalled"'


def _plain(expr: str, legend: str = "__auto", *metrics: str) -> Query:
    return Query(expr, legend, metrics)


def _roots(extra: str = "", legend: str = "roots") -> Query:
    """Roots that ended, per second."""
    own = selector("obsdag_root_seconds", extra=extra)
    return Query(f"sum (rate(obsdag_root_seconds_count{own}[$__rate_interval]))", legend, ("obsdag_root_seconds",))


def _age() -> Query:
    own = selector("obsdag_oldest_context_timestamp_seconds")
    name = "obsdag_oldest_context_timestamp_seconds"
    return Query(f"max by (engine, dag) (time() - {name}{own})", "{{engine}} {{dag}}", (name,))


def _commits() -> Query:
    """Commits of the journal per second."""
    name = "obsdag_journal_commit_seconds"
    return Query(f"sum (rate({name}_count{selector(name)}[$__rate_interval]))", "commits", (name,))


_UTILIZATION = ratio(speed("obsdag_worker_busy_seconds_total"), usually("obsdag_workers"), "busy")
_FAILURE_RATIO = ratio(_roots(_FAILED), _roots(), "failed or stalled")
_ALERTS = 'ALERTS{alertname=~"Obsdag.+", engine=~"$engine|", dag=~"$dag|"}'


def _stats() -> tuple[Panel, ...]:
    return (
        panel(
            "Targets that answer",
            _plain(f"sum (up{_HOST})", "up"),
            kind="stat",
            width=3,
            unit="short",
            text=(
                "Processes that Prometheus scrapes and that answer.\n\n**Bad:** fewer than run: look at the process"
                " and at"
                " the targets page of Prometheus, which has the error."
            ),
        ),
        panel(
            "Alerts firing",
            _plain('count (ALERTS{alertname=~"Obsdag.+", alertstate="firing"}) or vector(0)', "firing"),
            kind="stat",
            width=3,
            unit="short",
            warn_at=1,
            text=(
                "Alerts of obsdag's rules that fire, of all engines.\n\n**Bad:** any: the row at the bottom names"
                " them, the"
                " runbook says what to do."
            ),
        ),
        panel(
            "Roots ended",
            _roots(),
            kind="stat",
            width=4,
            unit="ops",
            text=(
                "Root contexts that ended, per second: what came in as input or submission and is done"
                " with.\n\n**Bad:**"
                " nothing while contexts live: look at their states, then at the oldest one."
            ),
        ),
        panel(
            "Roots that failed",
            _FAILURE_RATIO,
            kind="stat",
            width=4,
            unit="percentunit",
            warn_at=0.05,
            text=(
                "Share of ended roots that failed or stalled.\n\n**Bad:** more than usual: failures by type are on the"
                " dashboard of tasks; each failed root has a trace."
            ),
        ),
        panel("99th percentile", quantile(0.99, "obsdag_root_seconds"), kind="stat", width=3),
        panel("Living contexts", now("obsdag_contexts", legend="living"), kind="stat", width=3),
        panel("Workers busy", _UTILIZATION, kind="stat", width=4, unit="percentunit", warn_at=0.9),
    )


_OVERVIEW = Board(
    "overview",
    "obsdag: overview",
    "Rate, errors and duration of roots; utilization and saturation of workers; where time goes.",
    (
        Row("Now", _stats()),
        Row(
            "Roots: rate, errors, duration",
            (
                panel(
                    "Roots ended, by outcome",
                    Query(
                        f"sum by (outcome) (rate(obsdag_root_seconds_count{selector('obsdag_root_seconds')}"
                        "[$__rate_interval]))",
                        "{{outcome}}",
                        ("obsdag_root_seconds",),
                    ),
                    kind="stack",
                    unit="ops",
                    text="Root contexts that ended, per second, by their outcome; output, split and merged are success."
                    "\n\n**Bad:** `failed` and `stalled` on the rise: see failures by type on the dashboard of tasks.",
                ),
                panel(
                    "Share of roots that failed",
                    _FAILURE_RATIO,
                    unit="percentunit",
                    maximum=1,
                    text="Failed or stalled roots of all that ended.\n\n**Bad:** above the usual: find the task and the"
                    " type of the exception on the dashboard of tasks, then a trace.",
                ),
                panel("Duration of roots", *quantiles("obsdag_root_seconds", "engine, dag"), traces=True),
            ),
        ),
        Row(
            "Workers: utilization, saturation",
            (
                panel("Utilization", _UTILIZATION, unit="percentunit", maximum=1),
                panel("Workers", now("obsdag_workers", "state"), kind="stack"),
                panel(
                    "Capacity used",
                    ratio(
                        now("obsdag_workers", extra='state="busy"'),
                        now("obsdag_capacity", extra='resource="workers"'),
                        "workers",
                    ),
                    ratio(now("obsdag_contexts"), now("obsdag_capacity", extra='resource="live_contexts"'), "contexts"),
                    ratio(
                        now("obsdag_pool_workers", extra='pool="process"'),
                        now("obsdag_capacity", extra='resource="processes"'),
                        "processes",
                    ),
                    unit="percentunit",
                    text=described("obsdag_capacity"),
                ),
            ),
        ),
        Row(
            "Queue, by lane",
            (
                panel("Contexts in the queue", now("obsdag_queue_contexts", "lane"), kind="stack", width=12),
                panel(
                    "Wait in the queue",
                    quantile(0.5, "obsdag_queue_wait_seconds", "lane"),
                    quantile(0.99, "obsdag_queue_wait_seconds", "lane"),
                    width=12,
                ),
            ),
        ),
        Row(
            "Where time goes",
            (
                panel(
                    "Time of roots, by state",
                    speed("obsdag_ledger_seconds_total", "state"),
                    kind="stack",
                    unit="s",
                    width=12,
                    text="Seconds that roots spent in each state, per second; counted when they end.\n\n"
                    "**Bad:** the largest share other than `running` is what to fix first.",
                ),
                panel("Runs that ended", speed("obsdag_runs_total", "outcome"), width=6),
                panel("Runs that go on", now("obsdag_runs_active", "engine, dag"), width=6),
            ),
        ),
        Row(
            "Alerts",
            (
                panel(
                    "Alerts",
                    _plain(_ALERTS, "{{alertname}} {{engine}} {{dag}} {{task}} {{alertstate}}"),
                    kind="timeline",
                    unit="short",
                    width=24,
                    warn_at=1,
                    text=(
                        "Alerts of obsdag's rules, pending and firing.\n\n**Bad:** any that fires: look it up by"
                        " its name in"
                        " the runbook, which says what it means and what to do first."
                    ),
                ),
            ),
        ),
    ),
)

_ENDED = speed("obsdag_task_executions_total", "engine, task", tasks=True)
_NOT_WELL = speed("obsdag_task_executions_total", "engine, task", tasks=True, extra='outcome=~"error|timeout"')

_TASKS = Board(
    "tasks",
    "obsdag: tasks",
    "Executions of each task: rate, errors, duration, retries, and which task decides how long a root takes.",
    (
        Row(
            "Rate and errors",
            (
                panel("Executions, by outcome", speed("obsdag_task_executions_total", "task, outcome", tasks=True)),
                panel(
                    "Share of attempts that failed",
                    ratio(_NOT_WELL, _ENDED, "{{engine}} {{task}}"),
                    unit="percentunit",
                    maximum=1,
                    traces=True,
                ),
                panel(
                    "Failures for good, by type",
                    speed("obsdag_task_failures_total", "task, error_type", tasks=True),
                    kind="stack",
                ),
            ),
        ),
        Row(
            "Duration",
            (
                panel(
                    "Duration, 99th percentile",
                    quantile(0.99, "obsdag_task_seconds", "engine, task", tasks=True),
                    traces=True,
                ),
                panel(
                    "Duration, median and mean",
                    quantile(0.5, "obsdag_task_seconds", "task", tasks=True),
                    average("obsdag_task_seconds", "task", tasks=True),
                ),
                panel("Duration of all chosen tasks", heat("obsdag_task_seconds", tasks=True), kind="heatmap"),
            ),
        ),
        Row(
            "What decides",
            (
                panel(
                    "Time on critical paths",
                    speed("obsdag_critical_seconds_total", "task", tasks=True),
                    kind="stack",
                    unit="s",
                    text=described("obsdag_critical_seconds_total"),
                ),
                panel("Executions that run", now("obsdag_task_running", "task", tasks=True), kind="stack"),
                panel("Retries", speed("obsdag_task_retries_total", "task", tasks=True)),
            ),
        ),
    ),
    has_tasks=True,
)

_CONTEXTS = Board(
    "contexts",
    "obsdag: contexts",
    "Where contexts are, what they wait for, and how they end.",
    (
        Row(
            "States",
            (
                panel("Living contexts, by state", now("obsdag_contexts", "state"), kind="stack", width=12),
                panel("Entered, by kind", speed("obsdag_contexts_entered_total", "kind"), width=6),
                panel("Ended, by outcome", speed("obsdag_contexts_finished_total", "outcome"), width=6),
                panel("Age of the oldest context", _age(), unit="s"),
                panel("Unaccounted for", now("obsdag_unaccounted_contexts", "engine, dag"), warn_at=1),
                panel(
                    "Deadlocks",
                    Query(
                        f"sum by (engine, dag) (increase(obsdag_deadlocks_total{selector('obsdag_deadlocks_total')}"
                        "[$__rate_interval]))",
                        "{{engine}} {{dag}}",
                        ("obsdag_deadlocks_total",),
                    ),
                    kind="bars",
                    unit="short",
                    warn_at=1,
                ),
            ),
        ),
        Row(
            "Limits and timers",
            (
                panel(
                    "Wait for a permit, 99th percentile",
                    quantile(0.99, "obsdag_limit_wait_seconds", "limiter"),
                    width=6,
                ),
                panel("Waiting for a permit", now("obsdag_limit_waiting", "limiter"), width=6),
                panel("Deferrals", speed("obsdag_limit_deferrals_total", "limiter"), width=6),
                panel("Timers", now("obsdag_retry_timers", "engine, dag"), width=6),
            ),
        ),
        Row(
            "Loops, maps, joins",
            (
                panel("Items of loops and maps", speed("obsdag_loop_items_total", "task")),
                panel("Joins that wait", now("obsdag_joins_pending", "task")),
                panel("Wait of joins", *quantiles("obsdag_join_wait_seconds", "task")),
            ),
        ),
        Row(
            "Garbage collection",
            (
                panel(
                    "Ended by garbage collection",
                    speed("obsdag_gc_destroyed_total", "task, reason"),
                    kind="stack",
                    width=16,
                ),
                panel("Bypassed tasks", speed("obsdag_bypassed_tasks_total", "engine, dag")),
            ),
        ),
    ),
)

_IN_PHASE = now("obsdag_phase", "engine, dag, phase")
_PHASE = Query(f"{_IN_PHASE.expr} > 0", _IN_PHASE.legend, _IN_PHASE.metrics)

_ENGINE = Board(
    "engine",
    "obsdag: engine",
    "The engine itself: event loop, pools, process, serving, and what telemetry costs and loses.",
    (
        Row(
            "Serving",
            (
                panel("Phase", _PHASE, kind="timeline", width=6, unit="none"),
                panel("Pending submissions", now("obsdag_pending_contexts", "engine, dag"), width=6),
                panel("Time of submissions", *quantiles("obsdag_submit_seconds"), width=6),
                panel(
                    "Turned away",
                    speed("obsdag_submit_rejected_total", "reason"),
                    speed("obsdag_results_expired_total", legend="result expired"),
                    width=6,
                    text=described("obsdag_submit_rejected_total", "obsdag_results_expired_total"),
                ),
            ),
        ),
        Row(
            "Event loop and process",
            (
                panel("Lag of the event loop", *quantiles("obsdag_event_loop_lag_seconds"), width=6, warn_at=0.25),
                panel("Lag of the event loop, all", heat("obsdag_event_loop_lag_seconds"), kind="heatmap", width=6),
                panel(
                    "Processor",
                    _plain(
                        f"sum by (instance) (rate(process_cpu_seconds_total{_HOST}[$__rate_interval]))", "{{instance}}"
                    ),
                    width=6,
                    unit="percentunit",
                    text=(
                        "Share of one processor that the process takes; threads add up.\n\n**Bad:** near 1 for an"
                        " event loop"
                        " that does the work itself: move it into process tasks."
                    ),
                ),
                panel(
                    "Memory",
                    _plain(f"sum by (instance) (process_resident_memory_bytes{_HOST})", "{{instance}}"),
                    width=6,
                    unit="bytes",
                    text=(
                        "Memory of the process.\n\n**Bad:** only growing: compare with living contexts; if they stay"
                        " constant, tasks hold on to data."
                    ),
                ),
            ),
        ),
        Row(
            "Pools",
            (
                panel("Threads and processes", now("obsdag_pool_workers", "pool"), width=5),
                panel("Waiting for a thread or process", now("obsdag_pool_queued", "pool"), width=5),
                panel("Workers that died", speed("obsdag_pool_broken_total", "pool"), width=5),
                panel("Threads that do not come back", now("obsdag_threads_abandoned", "pool"), width=5, warn_at=1),
                panel("Made anew", speed("obsdag_restarts_total", "task, kind"), width=4),
            ),
        ),
        Row(
            "Journal",
            (
                panel("Commits, by time", heat("obsdag_journal_commit_seconds"), kind="heatmap", width=5),
                panel("Rows committed", speed("obsdag_journal_rows_total", legend="rows"), width=5),
                panel(
                    "Rows per commit",
                    ratio(speed("obsdag_journal_rows_total"), _commits(), "rows"),
                    unit="short",
                    text=(
                        "Mean size of a group.\n\n**Bad:** near 1,024: the journal is behind, what is accepted waits"
                        " for it; compare the time of commits."
                    ),
                    width=5,
                ),
                panel("Rows that wait", now("obsdag_journal_inbox_rows", legend="rows"), width=4, warn_at=8192),
                panel(
                    "After a crash",
                    speed("obsdag_journal_recovered_total", legend="taken up"),
                    speed("obsdag_journal_replayed_total", legend="run again"),
                    speed("obsdag_journal_dead_letters_total", legend="set aside"),
                    width=5,
                    text=described("obsdag_journal_recovered_total", "obsdag_journal_dead_letters_total"),
                ),
            ),
        ),
        Row(
            "Shards",
            (
                panel(
                    "Roots ended, by shard",
                    Query(
                        f"sum by (shard, instance) (rate(obsdag_root_seconds_count{selector('obsdag_root_seconds')}"
                        "[$__rate_interval]))",
                        "{{shard}} {{instance}}",
                        ("obsdag_root_seconds",),
                    ),
                    kind="stack",
                    unit="ops",
                    text="Root contexts that ended, per second, by shard of a Ray cluster (label `shard` of the list of"
                    " targets that the driver writes) and process.\n\n**Bad:** one far below the others, though it is"
                    " busy: its machine is slower, or shared with others.",
                ),
                panel("Living contexts, by shard", now("obsdag_contexts", "shard, instance"), kind="stack"),
                panel(
                    "Utilization, by shard",
                    ratio(
                        speed("obsdag_worker_busy_seconds_total", "shard, instance"),
                        usually("obsdag_workers", "shard, instance"),
                        "{{shard}} {{instance}}",
                    ),
                    unit="percentunit",
                    maximum=1,
                ),
            ),
        ),
        Row(
            "Telemetry",
            (
                panel("Lost", speed("obsdag_telemetry_dropped_total", "signal, reason"), width=6),
                panel("Spans held", now("obsdag_telemetry_spans_buffered", "engine"), width=6),
                panel("Time of telemetry", speed("obsdag_telemetry_seconds_total", "signal"), width=6),
                panel("Traces, by decision", speed("obsdag_traces_total", "decision"), kind="stack", width=6),
                panel(
                    "Time of a scrape",
                    Query(
                        f"sum by (engine) (obsdag_collect_seconds{selector('obsdag_collect_seconds')})",
                        "{{engine}}",
                        ("obsdag_collect_seconds",),
                    ),
                    _plain(f"max by (instance) (scrape_duration_seconds{_HOST})", "whole scrape {{instance}}"),
                ),
                panel("Parts of scrapes that failed", speed("obsdag_collect_errors_total", "engine"), warn_at=0.001),
                panel(
                    "Version",
                    Query(
                        f"count by (engine, version) (obsdag_build_info{selector('obsdag_build_info')})",
                        "{{engine}} {{version}}",
                        ("obsdag_build_info",),
                    ),
                    kind="stat",
                    unit="short",
                    text="Version of obsdag by engine: how many processes run it.\n\n**Bad:** two versions of one"
                    " engine"
                    " for longer than a roll-out takes: a process was left behind.",
                ),
            ),
        ),
    ),
)

BOARDS: Final = (_OVERVIEW, _TASKS, _CONTEXTS, _ENGINE)
