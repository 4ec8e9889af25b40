"""Facts as log lines: exactly the events of TELEMETRY section 5, each with its level.

Three classes of observer, one on top of the other, because the fan-out only calls what a class overrides: `Warnings`
hears nothing that happens per execution or per context that goes well, `Sampled` adds what info needs, `Everything`
what debug needs. Which one a run gets is decided when it starts; where the watchdog ticks, a level that is changed
later takes effect within `RECHECK_S`.

    debug     context.entered execution.started execution.succeeded limit.deferred context.bypassed context.destroyed
    info      run.started run.finished run.progress context.finished drain.started drain.finished
    warning   execution.retry_scheduled context.dropped event_loop.blocked submit.rejected pool.rebuilt
    service.restarted
              thread.abandoned telemetry.dropping
    error     execution.failed context.stalled run.deadlocked run.failed
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from obsdag.core.observer import Observer
from obsdag.core.states import LANES, OUTCOMES, STATES
from obsdag.telemetry.catalogue import EVENTS
from obsdag.telemetry.lines import Line, Redact, Throttle, brief, error_keys, is_heard, line_logger
from obsdag.telemetry.selfstats import SelfStats

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.core.records import Execution, Failure, Stall
    from obsdag.core.state import RunState
    from obsdag.tasks.base import Task

__all__ = ["PROGRESS_S", "RATES", "RECHECK_S", "Logs", "TraceIds"]

RATES: Final[Mapping[str | None, tuple[int, float]]] = {
    None: (10, 10.0),
    "context.dropped": (1, 60.0),
    "context.finished": (1, 1.0),
    "telemetry.dropping": (1, 30.0),
}
"""Lines per interval (seconds) of one event and task, for what the catalogue calls throttled; `None`: of those not
named."""

PROGRESS_S: Final = 10.0
RECHECK_S: Final = 1.0
_LEVELS: Final = {spec.name: getattr(logging, spec.level.upper()) for spec in EVENTS}
_METHODS: Final = {spec.name: spec.level for spec in EVENTS}
_THROTTLED: Final = frozenset(spec.name for spec in EVENTS if spec.throttled)

TraceIds = Callable[["Context | None", "Execution | None"], tuple[str | None, str | None]]
"""(trace id, span id) in hex of an execution, else of a context; None for what there is not."""


class Logs:
    """The logs of one `Telemetry`: makes an observer for each run, and keeps what its runs share, the throttle.

    engine: its name on every line. trace_ids: asks the tracing for ids. redact: applied to exception messages. stats:
    whose losses are told as `telemetry.dropping`. warnings_only: warnings and errors, whatever the level (for executors
    without telemetry).
    """

    def __init__(
        self,
        engine: str = "obsdag",
        trace_ids: TraceIds | None = None,
        redact: Redact | None = None,
        stats: SelfStats | None = None,
        warnings_only: bool = False,
    ) -> None:
        self.engine = engine
        self.trace_ids = trace_ids
        self.redact = redact
        self.stats = stats if stats is not None else SelfStats()
        self.warnings_only = warnings_only
        self.throttle = Throttle(RATES)
        self.lost = 0

    def observer(self, run: RunState) -> Observer:
        """The observer for `run`, of the class that the logger's level now asks for."""
        return self.wanted()(_Writer(self, run))

    def say(self, event: str, **keys: Any) -> None:
        """Writes a line that belongs to no run; `event` is one of the catalogue's (KeyError otherwise)."""
        if is_heard(_LEVELS[event]):
            getattr(line_logger().bind(engine=self.engine), _METHODS[event])(event, **keys)

    def wanted(self) -> type[_Warnings]:
        """The class of observer that the logger's level now asks for."""
        if self.warnings_only:
            return _Warnings
        if is_heard(logging.DEBUG):
            return _Everything
        return _Sampled if is_heard(logging.INFO) else _Watched


class _Writer:
    """Writes the lines of one run: keys that every line has, throttling. suppressed: lines not written."""

    def __init__(self, logs: Logs, run: RunState) -> None:
        self.logs = logs
        self.run = run
        self.dag = run.plan.name
        self.suppressed = 0
        self._line: Line | None = None

    def write(
        self,
        event: str,
        context: Context | None = None,
        execution: Execution | None = None,
        task: str = "",
        attempt: int = 0,
        error: BaseException | None = None,
        **keys: Any,
    ) -> bool:
        """Writes a line, unless nobody would see it or it is throttled; says whether it did."""
        level = _LEVELS[event]
        if not is_heard(level):
            return False
        started = perf_counter()
        if execution is not None:
            context, task, attempt = execution.context, execution.task.id, execution.attempt
        if event in _THROTTLED and not self._admit(event, task, keys):
            return False
        keys = {key: round(value, 6) if type(value) is float else value for key, value in keys.items()}
        keys.update(error_keys(error, self.logs.redact, trace=level >= logging.ERROR))
        try:
            getattr(self._bound(), _METHODS[event])(event, **self._whose(context, execution, task, attempt), **keys)
        except Exception:  # of a filter or handler of the host's: this line is lost, those to come need not be
            self.logs.stats.drop("logs", "export_failed", dag=self.dag)
        self.logs.stats.spend("logs", perf_counter() - started, dag=self.dag)
        return True

    def _admit(self, event: str, task: str, keys: dict[str, Any]) -> bool:
        unix_s = self.run.clock() + self.run.epoch
        suppressed = self.logs.throttle.admit(event, self.dag, task or _sort(keys), unix_s)
        if suppressed is None:
            self.suppressed += 1
            return False
        if suppressed or "suppressed" in keys:
            keys["suppressed"] = suppressed + keys.get("suppressed", 0)
        return True

    def _bound(self) -> Line:
        if self._line is None:
            self._line = line_logger().bind(engine=self.logs.engine, dag=self.dag)
        return self._line

    def _whose(self, context: Context | None, execution: Execution | None, task: str, attempt: int) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        if context is not None:
            keys |= {"context_id": context.id, "root_id": context.root.id}
        if task:
            keys["task"] = task
        if attempt:
            keys["attempt"] = attempt
        if execution is not None and execution.worker >= 0:
            keys["worker"] = execution.worker
        if self.logs.trace_ids is not None and context is not None:
            trace_id, span_id = self.logs.trace_ids(context, execution)
            keys |= {"trace_id": trace_id} if trace_id else {}
            keys |= {"span_id": span_id} if span_id else {}
        return keys


class _Warnings(Observer):
    """Warnings and errors, and what a run has once: nothing here is told per execution or context that goes well."""

    signal = "logs"  # whose loss it is when this observer is detached

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer
        self._write = writer.write

    # --- runs

    def run_finished(self, run: RunState, outcome: str, duration_s: float, now: float) -> None:
        if _is_broken_off(run, outcome):
            self._write("run.failed", run_id=run.id, outcome=outcome, duration_s=duration_s, **_counts(run))

    def run_deadlocked(self, run: RunState, stalls: list[Stall], now: float) -> None:
        by_task = Counter(stall.task for stall in stalls)
        reason = str(stalls[0]) if stalls else ""
        self._write(
            "run.deadlocked", run_id=run.id, stalled=len(stalls), tasks=dict(by_task.most_common(10)), first=reason
        )

    # --- contexts

    def context_dropped(self, context: Context, task: Task, now: float) -> None:
        self._write("context.dropped", context, task=task.id)

    def context_stalled(self, context: Context, stall: Stall, now: float) -> None:
        self._write("context.stalled", context, task=stall.task, missing=list(stall.missing), reason=stall.reason)

    def context_failed(self, context: Context, failure: Failure, execution: Execution | None, now: float) -> None:
        keys: dict[str, Any] = {} if execution is None else {"duration_s": execution.ended - execution.started}
        self._write(
            "execution.failed",
            context,
            execution,
            failure.task,
            failure.attempts,
            failure.exception,
            **keys,
        )

    def retry_scheduled(self, execution: Execution, error: BaseException, delay_s: float, now: float) -> None:
        self._write("execution.retry_scheduled", execution=execution, error=error, delay_s=delay_s)

    # --- pools, services, the event loop

    def pool_rebuilt(self, pool: str, reason: str) -> None:
        self._write("pool.rebuilt", pool=pool, reason=reason)

    def thread_abandoned(self, thread: str, task: str, running_s: float) -> None:
        self._write("thread.abandoned", task=task, pool_thread=thread, running_s=running_s)

    def task_restarted(self, task: Task, kind: str, error: BaseException | None) -> None:
        self._write("service.restarted", task=task.id, kind=kind, error=error)

    def journal_recovered(self, contexts: int, replayed: int, dead_letters: int, took_s: float) -> None:
        write = self._write
        write("journal.recovered", contexts=contexts, replayed=replayed, dead_letters=dead_letters, duration_s=took_s)

    def journal_left(self, contexts: int) -> None:
        self._write("journal.left", contexts=contexts, advice="await executor.recover()")

    def journal_failed(self, error: BaseException) -> None:
        self._write("journal.failed", error=error)

    def loop_blocked(self, execution: Execution | None, blocked_s: float, stack: str) -> None:
        self._write("event_loop.blocked", execution=execution, blocked_s=blocked_s, line=stack)

    # --- serving, and the telemetry itself

    def submit_rejected(self, reason: str, now: float) -> None:
        self._write("submit.rejected", reason=reason)

    def observer_failed(self, observer: Observer, fact: str, error: BaseException) -> None:
        self._write("telemetry.dropping", observer=type(observer).__qualname__, fact=fact, error=error)


class _Watched(_Warnings):
    """What an executor with telemetry adds: lines that a run has once, and a look at level and losses now and then."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__(writer)
        self._next_look = writer.run.clock() + RECHECK_S

    def run_started(self, run: RunState, now: float) -> None:
        self._write("run.started", run_id=run.id, kind=run.kind, tasks=len(run.plan.tasks) - 2)

    def run_finished(self, run: RunState, outcome: str, duration_s: float, now: float) -> None:
        super().run_finished(run, outcome, duration_s, now)
        self._tell_losses()
        self._write(
            "run.finished",
            run_id=run.id,
            outcome=outcome,
            duration_s=duration_s,
            **_counts(run),
            executions=sum(run.task_executions),
            retries=run.retries_total,
            slowest=_slowest(run),
            suppressed=self._writer.suppressed,
        )

    def phase_changed(self, phase: str, now: float) -> None:
        if phase == "draining":
            run = self._writer.run
            self._write("drain.started", run_id=run.id, living=run.living)

    def drain_finished(self, manifest: dict[str, Any], now: float) -> None:
        self._write("drain.finished", run_id=self._writer.run.id, manifest=brief(manifest))

    def loop_lagged(self, lag_s: float) -> None:
        # The watchdog's tick serves as the clock of everything that is looked at now and then.
        now = self._writer.run.clock()
        if now >= self._next_look:
            self._next_look = now + RECHECK_S
            self._look()

    def _look(self) -> None:
        self._tell_losses()
        wanted = self._writer.logs.wanted()
        if wanted is not type(self):
            self._writer.run.facts.replace(self, wanted(self._writer))

    def _tell_losses(self) -> None:
        logs = self._writer.logs
        lost = {f"{signal}.{why}": count for (signal, why), count in logs.stats.dropped.items() if count}
        total = sum(lost.values())
        if total > logs.lost and self._write("telemetry.dropping", dropped=total - logs.lost, totals=lost):
            logs.lost = total


class _Sampled(_Watched):
    """Info: of ended roots one line per outcome and second, and the run's progress."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__(writer)
        self._sample_at = dict.fromkeys(OUTCOMES, -math.inf)
        self._left_out = dict.fromkeys(OUTCOMES, 0)
        self._progress_at = writer.run.clock() + PROGRESS_S

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        if now < self._sample_at[outcome]:  # first, as this is all that most contexts cost
            if context._parent is None:
                self._left_out[outcome] += 1
        elif context._parent is None:
            self._sample_at[outcome] = now + RATES["context.finished"][1]
            left_out, self._left_out[outcome] = self._left_out[outcome], 0
            ledger = {state: round(spent_s, 6) for state, spent_s in context.ledger.items() if spent_s}
            keys: dict[str, Any] = {"suppressed": left_out} if left_out else {}
            duration_s = round(sum(ledger.values()), 6)
            if not self._write(
                "context.finished", context, outcome=outcome, duration_s=duration_s, ledger=ledger, **keys
            ):
                self._left_out[outcome] += left_out

    def _look(self) -> None:
        if self._writer.run.clock() >= self._progress_at:
            self._progress_at += PROGRESS_S
            self._tell_progress()
        super()._look()

    def _tell_progress(self) -> None:
        run = self._writer.run
        self._write(
            "run.progress",
            run_id=run.id,
            living=run.living,
            **_counts(run),
            executions=sum(run.task_executions),
            busy_workers=run.busy_workers,
            queue=dict(zip(LANES, run.queue_lengths(), strict=True)),
            states={state: count for state, count in zip(STATES, run.state_counts, strict=True) if count},
        )


class _Everything(_Sampled):
    """Debug: each context and each execution."""

    def context_entered(self, context: Context, kind: str, maker: Execution | None, now: float) -> None:
        keys: dict[str, Any] = {} if maker is None else {"maker": maker.task.id}
        self._write("context.entered", context, kind=kind, **keys)

    def context_destroyed(self, context: Context, task: Task | None, reason: str, now: float) -> None:
        self._write("context.destroyed", context, task="" if task is None else task.id, reason=reason)

    def tasks_bypassed(self, context: Context, count: int, now: float) -> None:
        self._write("context.bypassed", context, count=count)

    def limit_deferred(self, context: Context, task: Task, limiter: str, now: float) -> None:
        self._write("limit.deferred", context, task=task.id, limiter=limiter)

    def execution_started(self, execution: Execution, now: float) -> None:
        self._write("execution.started", execution=execution)

    def execution_finished(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        if outcome == "success":
            self._write("execution.succeeded", execution=execution, duration_s=execution.ended - execution.started)


def _sort(keys: Mapping[str, Any]) -> str:
    """What tells lines without a task apart for the throttle: a key whose values are a closed set."""
    return str(keys.get("outcome") or keys.get("reason") or keys.get("pool") or keys.get("observer") or "")


def _is_broken_off(run: RunState, outcome: str) -> bool:
    """A run that goes on past failures has a line for each; only one that ended by what happened failed itself."""
    failed = outcome == "failed" and (run.config.on_failure == "raise" or not run.finished[OUTCOMES.index("failed")])
    return failed or outcome == "deadline"


def _counts(run: RunState) -> dict[str, Any]:
    return {"entered": sum(run.entered), **{name: n for name, n in zip(OUTCOMES, run.finished, strict=True) if n}}


def _slowest(run: RunState) -> dict[str, float]:
    """The three tasks that most time went to, and how many seconds each."""
    spent = {task.id: spent_s for task, spent_s in zip(run.plan.tasks, run.task_seconds, strict=True) if spent_s}
    return {task: round(spent[task], 6) for task in sorted(spent, key=spent.__getitem__, reverse=True)[:3]}
