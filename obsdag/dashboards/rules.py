"""Recording and alert rules, and what to do about each alert: the rule files and the runbook are made of this.
" made of it.

An alert's expression is a list of conditions that must hold together, so that a test can ask a server for what each of
them compares. Alert names begin with `Obsdag`: names of alerts are shared by everything that one Prometheus watches.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Final

__all__ = ["ALERTS", "RECORDINGS", "Alert", "Condition", "Recording", "alerts_yaml", "recordings_yaml", "runbook_table"]

_RUN: Final = "job, instance, engine, dag"


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording rule: `record` is the new series' name."""

    record: str
    expr: str


@dataclass(frozen=True, slots=True)
class Condition:
    """`expr` compared: `test` is a comparison such as "> 0"; a `joiner` says how it goes with what is before it."""

    expr: str
    test: str
    joiner: str = "and"

    @property
    def text(self) -> str:
        """As PromQL."""
        return f"{self.expr} {self.test}".strip()


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert and its line of the runbook. for_s: seconds that it must hold. false_alarm: when it is none of ours."""

    name: str
    conditions: tuple[Condition, ...]
    for_s: int
    severity: str
    summary: str
    meaning: str
    action: str
    false_alarm: str

    @property
    def expr(self) -> str:
        """The whole expression."""
        first, *others = self.conditions
        return "\n".join([first.text, *(f"{each.joiner} {each.text}" for each in others)])

    @property
    def anchor(self) -> str:
        """Where the runbook tells of it."""
        return self.name.lower()


RECORDINGS: Final = (
    Recording("obsdag:contexts_living:sum", f"sum by ({_RUN}) (obsdag_contexts)"),
    Recording("obsdag:contexts_finished:rate5m", f"sum by ({_RUN}) (rate(obsdag_contexts_finished_total[5m]))"),
    Recording(
        "obsdag:roots_failed:ratio5m",
        f'sum by ({_RUN}) (rate(obsdag_root_seconds_count{{outcome=~"failed|stalled"}}[5m]))'
        f"\n/ sum by ({_RUN}) (rate(obsdag_root_seconds_count[5m]))",
    ),
    Recording(
        "obsdag:root_seconds:p99_5m",
        f"histogram_quantile(0.99, sum by (le, {_RUN}) (rate(obsdag_root_seconds_bucket[5m])))",
    ),
    Recording(
        "obsdag:queue_wait_seconds:p95_5m",
        f'histogram_quantile(0.95, sum by (le, {_RUN}) (rate(obsdag_queue_wait_seconds_bucket{{lane!="loop"}}[5m])))',
    ),
    Recording(
        "obsdag:workers_busy:ratio5m",
        f"sum by ({_RUN}) (rate(obsdag_worker_busy_seconds_total[5m]))"
        f"\n/ sum by ({_RUN}) (avg_over_time(obsdag_workers[5m]))",
    ),
    Recording(
        "obsdag:task_attempts_failed:ratio5m",
        f'sum by ({_RUN}, task) (rate(obsdag_task_executions_total{{outcome=~"error|timeout"}}[5m]))'
        f'\n/ sum by ({_RUN}, task) (rate(obsdag_task_executions_total{{outcome=~"success|error|timeout"}}[5m]))',
    ),
    Recording(
        "obsdag:task_seconds:p99_5m",
        f"histogram_quantile(0.99, sum by (le, {_RUN}, task) (rate(obsdag_task_seconds_bucket[5m])))",
    ),
    Recording(
        "obsdag:limit_wait_seconds:p95_5m",
        f"histogram_quantile(0.95, sum by (le, {_RUN}, limiter) (rate(obsdag_limit_wait_seconds_bucket[5m])))",
    ),
    Recording(
        "obsdag:event_loop_lag_seconds:p99_5m",
        f"histogram_quantile(0.99, sum by (le, {_RUN}) (rate(obsdag_event_loop_lag_seconds_bucket[5m])))",
    ),
)

_DROPPED: Final = 'obsdag_gc_destroyed_total{reason=~"discarded|emptied"}'
_AT_WORK: Final = 'obsdag_contexts{state!~"frozen|lent|source_wait"}'
_OF_TASK: Final = "job, engine, dag, task"

ALERTS: Final = (
    Alert(
        "ObsdagTargetDown",
        (
            Condition("up", "== 0"),
            Condition(
                "count by (job, instance) (count_over_time(obsdag_build_info[1d]))", "> 0", "and on (job, instance)"
            ),
        ),
        60,
        "critical",
        "{{ $labels.instance }} of {{ $labels.job }} does not answer scrapes",
        "A process that told of obsdag within the last day does not answer scrapes: it died, hangs, or cannot be"
        " reached.",
        "Is the process there? `Status > Targets` of Prometheus has the error. If it hangs: its last log lines, a"
        " stack.",
        "A process that was stopped on purpose and is still a target. A process that never answered is not seen by"
        " this.",
    ),
    Alert(
        "ObsdagNoProgress",
        (
            Condition(f"sum by ({_RUN}) ({_AT_WORK})", "> 0"),
            Condition(f"sum by ({_RUN}) ({_AT_WORK} offset 10m)", "> 0"),
            Condition(f"sum by ({_RUN}) (increase(obsdag_contexts_finished_total[10m]))", "== 0"),
            Condition(f"sum by ({_RUN}) (increase(obsdag_task_executions_total[10m]))", "== 0"),
        ),
        300,
        "critical",
        "{{ $labels.engine }}/{{ $labels.dag }}: contexts live, and nothing has ended for 10 minutes",
        "Contexts live, but for ten minutes none has ended and no execution has either.",
        "States on the dashboard of contexts: `running` means that a task hangs (give it a `timeout`), `limit_wait` or"
        " `pool_wait` what all wait for. With `slow_after`, the oldest context's trace is in Jaeger already.",
        "A single execution that rightly takes longer than a quarter of an hour.",
    ),
    Alert(
        "ObsdagDeadlock",
        (Condition(f"sum by ({_RUN}) (increase(obsdag_deadlocks_total[10m]))", "> 0"),),
        0,
        "critical",
        "{{ $labels.engine }}/{{ $labels.dag }}: a run ended with stalled contexts",
        "A run ended with contexts that could never have gone on.",
        "`context.stalled` in the log names each: the task it waits at, the missing upstreams, why.",
        "None; a first deadlock in a process's first scrape is missed, since a counter's first value is no increase.",
    ),
    Alert(
        "ObsdagUnaccounted",
        (Condition(f"sum by ({_RUN}) (abs(obsdag_unaccounted_contexts))", "> 0"),),
        60,
        "critical",
        "{{ $labels.engine }}/{{ $labels.dag }}: the books of contexts do not balance",
        "Contexts that entered are neither alive nor ended: a bug of obsdag.",
        "Please report it with the log. Restart the process if the number grows.",
        "None known: a single scrape in the middle of a transition does not last a minute.",
    ),
    Alert(
        "ObsdagTaskFailureRatioHigh",
        (
            Condition("obsdag:task_attempts_failed:ratio5m", "> 0.2"),
            Condition(
                f'sum by ({_RUN}, task) (increase(obsdag_task_executions_total{{outcome=~"error|timeout"}}[5m]))', "> 5"
            ),
        ),
        300,
        "warning",
        "{{ $labels.engine }}/{{ $labels.dag }}: {{ $value | humanizePercentage }} of attempts of {{ $labels.task"
        " }} fail",
        "More than a fifth of a task's attempts fail, and not just a few.",
        "Failures by type on the dashboard of tasks, then `execution.failed` in the log, then a trace.",
        "Tasks that are expected to fail often and are retried: raise the bound for them.",
    ),
    Alert(
        "ObsdagRetryStorm",
        (
            Condition(
                f"sum by ({_RUN}, task) (rate(obsdag_task_retries_total[5m]))"
                f" / sum by ({_RUN}, task) (rate(obsdag_task_executions_total[5m]))",
                "> 0.5",
            ),
            Condition(f"sum by ({_RUN}, task) (rate(obsdag_task_retries_total[5m]))", "> 1"),
        ),
        300,
        "warning",
        "{{ $labels.engine }}/{{ $labels.dag }}: most attempts of {{ $labels.task }} are followed by another",
        "Most attempts are retried, more than one a second: load on what already fails.",
        "What the task calls is down: lengthen `retry_interval` (exponential), lower the task's limit, or stop the"
        " input.",
        "A task whose retries poll for something: use `RateLimitContext`, which is no attempt.",
    ),
    Alert(
        "ObsdagQueueWaitHigh",
        (
            Condition("obsdag:queue_wait_seconds:p95_5m", "> 5"),
            Condition(f'sum by ({_RUN}) (obsdag_queue_contexts{{lane!="loop"}})', "> 0"),
        ),
        600,
        "warning",
        "{{ $labels.engine }}/{{ $labels.dag }}: contexts wait {{ $value | humanizeDuration }} for a worker",
        "A twentieth of the contexts waits longer than five seconds for a worker, and some wait now.",
        "Are workers idle? If not: more `context_worker_num`, or see which task holds them. If so: the event loop"
        " is blocked.",
        "A batch run that takes in all at once: waiting is then its normal state.",
    ),
    Alert(
        "ObsdagWorkersSaturated",
        (
            Condition("obsdag:workers_busy:ratio5m", "> 0.95"),
            Condition(f"sum by ({_RUN}) (avg_over_time(obsdag_queue_contexts[5m]))", "> 0"),
        ),
        900,
        "warning",
        "{{ $labels.engine }}/{{ $labels.dag }}: all workers are busy and contexts wait",
        "For a quarter of an hour nearly all workers were busy and contexts waited.",
        "If their tasks wait for something outside: more `context_worker_num`. If they compute: process tasks, more"
        " machines.",
        "Batch runs, which are meant to use all workers: leave them out by their engine's name.",
    ),
    Alert(
        "ObsdagEventLoopBlocked",
        (Condition("obsdag:event_loop_lag_seconds:p99_5m", "> 0.25"),),
        300,
        "warning",
        "{{ $labels.engine }}/{{ $labels.dag }}: the event loop is {{ $value | humanizeDuration }} late",
        "The event loop runs callbacks much too late: something blocks it, and everything waits.",
        "`event_loop.blocked` in the log has the task and the line. Make it async, or a sync or process task.",
        "A machine that is short of processor time: compare with the load of the machine.",
    ),
    Alert(
        "ObsdagContextStuck",
        (
            Condition(f"time() - min by ({_RUN}) (obsdag_oldest_context_timestamp_seconds)", "> 900"),
            Condition(
                f"time() - min by ({_RUN}) (obsdag_oldest_context_timestamp_seconds)"
                f" - 10 * max by ({_RUN}) (max_over_time(obsdag:root_seconds:p99_5m[1h]))",
                "> 0",
            ),
        ),
        300,
        "warning",
        "{{ $labels.engine }}/{{ $labels.dag }}: a context has lived for {{ $value | humanizeDuration }}",
        "A context lives for more than a quarter of an hour, and ten times longer than nearly all others.",
        "States on the dashboard of contexts; with `slow_after`, its trace in Jaeger: what it waits for is the last"
        " span.",
        "Work that takes long by nature. Where nothing has ended within the hour this says nothing:"
        " ObsdagNoProgress does.",
    ),
    Alert(
        "ObsdagContextLeak",
        (
            Condition(
                f"predict_linear(obsdag:contexts_living:sum[1h], 4 * 3600) / on ({_RUN})"
                f' max by ({_RUN}) (obsdag_capacity{{resource="live_contexts"}})',
                "> 1",
            ),
            Condition("deriv(obsdag:contexts_living:sum[1h])", "> 0"),
            Condition(
                f"obsdag:contexts_living:sum / on ({_RUN})"
                f' max by ({_RUN}) (obsdag_capacity{{resource="live_contexts"}})',
                "> 0.1",
            ),
        ),
        1800,
        "warning",
        "{{ $labels.engine }}/{{ $labels.dag }}: living contexts grow towards their bound",
        "Living contexts have grown for an hour, and will reach `max_live_contexts` within four.",
        "The state that grows, on the dashboard of contexts: `frozen` that nobody thaws, `join_wait` for a sibling"
        " that is stuck.",
        "Growing load: entered per second grows, too. A long batch that is being filled.",
    ),
    Alert(
        "ObsdagGCDestroysUnexpected",
        (
            Condition(f"sum by ({_OF_TASK}) (increase({_DROPPED}[10m]))", "> 0"),
            Condition(f"sum by ({_OF_TASK}) (increase({_DROPPED}[1d] offset 15m))", "> 0", f"unless on ({_OF_TASK})"),
            Condition(f"sum by ({_OF_TASK}) (obsdag_task_executions_total offset 1h)", "> 0", f"and on ({_OF_TASK})"),
        ),
        0,
        "warning",
        "{{ $labels.engine }}/{{ $labels.dag }}: {{ $labels.task }} has begun to drop contexts",
        "A task drops contexts and did not in the day before: mostly a forgotten `return context`.",
        "`context.dropped` in the log names the task. Return the context, or say `may_drop=True`"
        " (`pass_through=True`).",
        "A filter that drops less than once a day; a task that is new in the DAG.",
    ),
    Alert(
        "ObsdagLimitWaitHigh",
        (
            Condition("obsdag:limit_wait_seconds:p95_5m", "> 30"),
            Condition(f"sum by ({_RUN}, limiter) (obsdag_limit_waiting)", "> 0"),
        ),
        600,
        "warning",
        "{{ $labels.engine }}/{{ $labels.dag }}: executions wait {{ $value | humanizeDuration }} for {{"
        " $labels.limiter }}",
        "Executions wait longer than half a minute for a permit: more is asked for than the limit lets through.",
        "Raise the limit if what it protects allows; else take in less.",
        "Batch runs against a slow partner, where waiting is the plan.",
    ),
    Alert(
        "ObsdagSubmitRejected",
        (
            Condition(
                f'sum by ({_RUN}, reason) (increase(obsdag_submit_rejected_total{{reason!="duplicate"}}[5m]))', "> 0"
            ),
        ),
        120,
        "warning",
        "{{ $labels.engine }}/{{ $labels.dag }}: submissions are turned away ({{ $labels.reason }})",
        "Submissions are turned away: `queue_full`, more comes in than goes out; `not_accepting`, clients go on"
        " during a"
        " drain; `invalid`, a client has a bug.",
        "`queue_full`: as for ObsdagWorkersSaturated, or raise `max_pending`. `not_accepting`: take it out of"
        " balancing first.",
        "Clients that use `wait=False` to find out whether there is room.",
    ),
    Alert(
        "ObsdagDrainOverrun",
        (Condition(f'max by ({_RUN}) (obsdag_phase{{phase="draining"}})', "== 1"),),
        120,
        "warning",
        "{{ $labels.engine }}/{{ $labels.dag }}: drains for more than two minutes",
        "A service is draining for longer than any usual `drain_grace` (30 s): something does not end.",
        "`drain.started` and the running tasks: one swallows its cancellation, or a thread does not come back.",
        "A `drain_grace` of more than two minutes: lengthen `for`.",
    ),
    Alert(
        "ObsdagPoolBroken",
        (Condition(f"sum by ({_RUN}, pool) (increase(obsdag_pool_broken_total[10m]))", "> 0"),),
        0,
        "warning",
        "{{ $labels.engine }}/{{ $labels.dag }}: a worker of the {{ $labels.pool }} pool died",
        "A worker process died under its task: killed for its memory, or a crash in native code.",
        "`pool.rebuilt` in the log; the kernel's log for the memory killer. The execution that died has failed its"
        " context.",
        "Processes that were killed by hand.",
    ),
    Alert(
        "ObsdagTelemetryDropping",
        (
            Condition(
                "sum by (job, instance, engine, dag, signal, reason) (increase(obsdag_telemetry_dropped_total[10m]))",
                "> 0",
            ),
        ),
        60,
        "warning",
        "{{ $labels.engine }}: telemetry loses {{ $labels.signal }} ({{ $labels.reason }})",
        "Spans, lines or facts are lost: what is seen of the engine is not all of it. The work itself goes on.",
        "`export_failed`, `queue_full`: is the collector up? `buffer_cap`: many long roots. `observer_failed`: a"
        " bug, in the log.",
        "`shutdown`: a process that ended while its collector was away.",
    ),
    Alert(
        "ObsdagCollectErrors",
        (Condition("sum by (job, instance, engine) (increase(obsdag_collect_errors_total[10m]))", "> 0"),),
        0,
        "warning",
        "{{ $labels.engine }}: a part of the metrics could not be read",
        "A scrape had to leave a part out: a bug of obsdag. Other alerts may be blind.",
        "`telemetry.collect_failed` in the log has the error: please report it.",
        "None.",
    ),
)

_HEAD: Final = "# Generated by `python -m obsdag.dashboards`: change obsdag/dashboards/rules.py instead.\ngroups:\n"


def recordings_yaml() -> str:
    """The recording rules as Prometheus reads them."""
    rules = "".join(f"      - record: {each.record}\n{_field('expr', each.expr)}" for each in RECORDINGS)
    return f"{_HEAD}  - name: obsdag-recordings\n    rules:\n{rules}"


def alerts_yaml() -> str:
    """The alert rules as Prometheus reads them."""
    return f"{_HEAD}  - name: obsdag-alerts\n    rules:\n" + "".join(map(_alert_yaml, ALERTS))


def _alert_yaml(alert: Alert) -> str:
    return (
        f"      - alert: {alert.name}\n"
        f"{_field('expr', alert.expr)}"
        f"        for: {alert.for_s}s\n"
        f"        labels:\n          severity: {alert.severity}\n"
        "        annotations:\n"
        f"          summary: {_quoted(alert.summary)}\n"
        f"          description: {_quoted(f'{alert.meaning} First: {alert.action}')}\n"
        f"          runbook: dashboards/RUNBOOK.md#{alert.anchor}\n"
    )


def _field(name: str, text: str) -> str:
    return f"        {name}: |-\n" + textwrap.indent(text, " " * 10) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def runbook_table() -> str:
    """The alerts as a Markdown table, one line each, with an anchor by their name."""
    head = "| alert | expression | for | severity | meaning | first action | when it is a false alarm |\n"
    lines = [
        f'| <a id="{each.anchor}"></a>{each.name} | `{_cell(each.expr)}` | {each.for_s} s | {each.severity} |'
        f" {_cell(each.meaning)} | {_cell(each.action)} | {_cell(each.false_alarm)} |\n"
        for each in ALERTS
    ]
    return head + "|---|---|---|---|---|---|---|\n" + "".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
