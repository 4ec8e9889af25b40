"""What the live page knows beyond the moment: recent failures and events, rates, and traces that were kept.

A `Watch` looks at one executor. It is an observer of rare facts only, so a run pays nothing for being watched while
nothing goes wrong. Facts come on the run's thread (`loop_blocked`: on the watchdog's), readers on any: deques and dicts
are copied in one step.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, runtime_checkable

from obsdag.core.observer import Facts, Observer

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.context import Context
    from obsdag.core.records import Execution, Failure, Stall
    from obsdag.core.state import RunState
    from obsdag.executor import Executor
    from obsdag.plan import Plan
    from obsdag.shell import RunShell
    from obsdag.tasks.base import Task
    from obsdag.telemetry.selfstats import Kept, SelfStats

__all__ = ["KEPT", "Far", "Rates", "Sample", "Watch"]

KEPT: Final = 50
"""Failures, events and traces that are remembered, the newest."""
_TEXT: Final = 500
_BLOCKED: Final = "event loop blocked"
_SAME_S: Final = 0.1
_LONG_S: Final = 1.0  # a loop that was blocked for less is worth a line in the list, and no warning on top of the page
_WINDOW_S: Final = 10.0
_SPACING_S: Final = 0.9


@runtime_checkable
class Far(Protocol):
    """An executor whose runs are elsewhere: of its shards it knows what they have been given."""

    config: ExecutorConfig
    plan: Plan
    _shells: list[RunShell]  # none: its runs have no shell here
    _totals: Counter[str]
    _drivers: list[Any]

    def seen(self) -> dict[str, Any]:
        """The present moment: `runs`, `up_s`, `counts`, `living`, and `shards`, a dict of plain values for each."""


class Watch(Observer):
    """Remembers the trouble of one executor's runs. `close` takes it off again."""

    def __init__(self, executor: Executor | Far) -> None:
        self.executor = executor
        self.failures: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.events: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.traces: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.failed: Counter[str] = Counter()
        self.retried: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.last_run: dict[str, Any] | None = None
        self._blocked = (0.0, 0.0, "")  # the last block: since when, told when (monotonic seconds), by which task
        self._redact: Callable[[str], str] | None = getattr(executor.config.telemetry, "_redact", None)
        executor.config = replace(executor.config, observers=(*executor.config.observers, self))
        for shell in list(executor._shells):
            shell._threadsafe(self._join, shell.run.facts)
        self._kept = _kept_listeners(executor)
        if self._kept is not None:
            self._kept.append(self._trace_kept)

    def _join(self, facts: Facts) -> None:
        """Begins to watch a run that had started before."""
        failures = facts.failures
        Facts.__init__(facts, [*facts._observers, self])
        facts.failures = failures

    def close(self) -> None:
        """Watches no further runs."""
        executor = self.executor
        executor.config = replace(
            executor.config, observers=tuple(each for each in executor.config.observers if each is not self)
        )
        if self._kept is not None and self._trace_kept in self._kept:
            self._kept.remove(self._trace_kept)

    # --- facts

    def run_finished(self, run: RunState, outcome: str, duration_s: float, now: float) -> None:
        """What is left of a run when it is gone."""
        self.last_run = {
            "kind": run.kind,
            "outcome": outcome,
            "duration_s": duration_s,
            "at": now + run.epoch,
            "counts": run.counts,
        }

    def context_failed(self, context: Context, failure: Failure, execution: Execution | None, now: float) -> None:
        """For the list of recent failures."""
        self.failed[failure.task] += 1
        error = failure.exception
        self._trouble(context, execution, now, failure.task, type(error).__name__, str(error), failure.attempts)

    def context_stalled(self, context: Context, stall: Stall, now: float) -> None:
        """Stalls are among the failures: both want a person to look."""
        self.failed[stall.task] += 1
        missing = f" (missing: {', '.join(stall.missing)})" if stall.missing else ""
        self._trouble(context, None, now, stall.task, "stalled", f"{stall.reason}{missing}", 0)

    def _trouble(
        self, context: Context, execution: Execution | None, now: float, task: str, error: str, text: str, attempts: int
    ) -> None:
        run = context._run
        self.failures.append(
            {
                "at": now + run.epoch if run is not None else time.time(),
                "context": context.id,
                "task": task,
                "attempts": attempts,
                "error": error,
                "message": self.redacted(text),
                "trace_id": trace_id_of(context, execution),
            }
        )

    def redacted(self, text: str) -> str:
        """A text of the user's as it may be shown: redacted as in spans and log lines, and not too long."""
        if self._redact is not None:
            try:
                text = self._redact(text)
            except Exception:  # a user's function: rather no text than the unredacted one
                text = "[redaction failed]"
        return text if len(text) <= _TEXT else text[: _TEXT - 1] + "\N{HORIZONTAL ELLIPSIS}"

    def retry_scheduled(self, execution: Execution, error: BaseException, delay_s: float, now: float) -> None:
        """Counts retries by task."""
        self.retried[execution.task.id] += 1

    def submit_rejected(self, reason: str, now: float) -> None:
        """Counts what was turned away."""
        self.rejected[reason] += 1

    def _event(self, what: str, text: str, detail: str = "", level: str = "warn") -> None:
        head = {"at": time.time(), "event": what, "level": level}
        self.events.append({**head, "text": self.redacted(text), "detail": self.redacted(detail)})

    def loop_blocked(self, execution: Execution | None, blocked_s: float, stack: str) -> None:
        """Who keeps the event loop from turning."""
        now = time.monotonic()
        if now - blocked_s - self._blocked[0] < _SAME_S and self.events and self.events[-1]["event"] == _BLOCKED:
            self.events.pop()  # it is told again as it becomes longer
        self._blocked = (now - blocked_s, now, execution.task.id if execution is not None else "")
        who = f", by task {execution.task.id!r} on {execution.context.id}" if execution is not None else ""
        self._event(
            "event loop blocked", f"for {blocked_s:.1f} s{who}", stack, "warn" if blocked_s >= _LONG_S else "info"
        )

    def blocked_for(self, now: float) -> tuple[float, str]:
        """Of a loop that is blocked: seconds since when, and by which task, as far as the watchdog knows."""
        since, told, task = self._blocked
        current = now - since <= 2 * (told - since) + 0.5  # it tells again each time that the block has doubled
        return (now - since, task) if current else (0.0, "")

    def pool_rebuilt(self, pool: str, reason: str) -> None:
        """A worker process died."""
        self._event("pool rebuilt", f"({pool}): {reason}")

    def thread_abandoned(self, thread: str, task: str, running_s: float) -> None:
        """A thread does not come back."""
        self._event("thread abandoned", f"{thread} in task {task!r} after {running_s:.1f} s")

    def task_restarted(self, task: Task, kind: str, error: BaseException | None) -> None:
        """A stream or service is made anew."""
        self._event(f"{kind} restarted", f"of task {task.id!r}{'' if error is None else f': {error!r}'}")

    def cleanup_failed(self, what: str, error: BaseException) -> None:
        """A shutdown hook raised."""
        self._event("cleanup failed", f"{what}: {error!r}")

    def phase_changed(self, phase: str, now: float) -> None:
        """A serving period goes on to its next phase."""
        self._event("phase", phase, level="info")

    def drain_finished(self, manifest: dict[str, Any], now: float) -> None:
        """What a drain cancelled."""
        names = ", ".join(str(each["id"]) for each in manifest["cancelled"][:10])
        text = f"{manifest['finished']} finished, {len(manifest['cancelled'])} cancelled in {manifest['seconds']:.1f} s"
        self._event("drained", f"{text}: {names}" if names else text, level="warn" if names else "info")

    def _trace_kept(self, kept: Sequence[Kept]) -> None:
        """Told of what tracing exports of a root, on its own thread."""
        for each in kept:
            if each.what == "root" and each.dag == self.executor.plan.name:
                trace_id = f"{each.trace_id:032x}"
                self.traces.append(
                    {"at": each.unix_s, "outcome": each.label, "seconds": each.seconds, "trace_id": trace_id}
                )


def trace_id_of(context: Context, execution: Execution | None = None) -> str | None:
    """The trace of a context, in hex; None if it has none."""
    if context._trace is None:
        return None
    from obsdag.telemetry import trace_ids_of

    try:
        return trace_ids_of(context, execution)[0]
    except AttributeError:  # not a record of a tracer's: the caller's, where nobody traces
        return None


def _kept_listeners(executor: Executor | Far) -> list[Callable[[Sequence[Kept]], None]] | None:
    stats: SelfStats | None = getattr(executor.config.telemetry, "stats", None)
    return None if stats is None else stats.on_kept


class Sample(NamedTuple):
    """Numbers of one moment that only ever grow. at: monotonic seconds; the lists are by task."""

    at: float
    executions: list[int]
    seconds: list[float]
    rows: list[list[float]] | None
    entered: int
    ended: int


class Rates:
    """Samples of the last ten seconds; what changed since the oldest of them."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def add(self, sample: Sample) -> Sample | None:
        """Takes a sample in; returns the one to compare it with, if there is one."""
        samples = self._samples
        while len(samples) > 1 and sample.at - samples[1].at >= _WINDOW_S:
            samples.popleft()
        if samples and (sample.at - samples[0].at > 6 * _WINDOW_S or samples[0].entered > sample.entered):
            samples.clear()  # nobody looked for a minute
        before = samples[0] if samples else None
        if not samples or sample.at - samples[-1].at >= _SPACING_S:
            samples.append(sample)
        return before if before is not None and sample.at - before.at >= _SPACING_S / 2 else None
