"""What observers are told in a simulated run, to be compared with what the model of the rules says they are to hear."""

from __future__ import annotations

from typing import Any

from obsdag.context import Context
from obsdag.core.observer import Facts, Observer
from obsdag.core.states import STATES
from tests.simulation.model import Model, ModelError

__all__ = ["Told"]


class Told(Observer):
    """Writes down what it is told; `compare` holds it against the model's facts.

    level: 1 only listens, with 2 and 3 records and slack are kept, too. quick_s: as of any observer. alone: no
    execution ends a context of another tree, so that each critical path ends with its root.
    """

    def __init__(self, level: int, quick_s: float = 0.0, *, alone: bool = True) -> None:
        self.alone = alone
        self.needs_records, self.needs_slack = level > 1, level > 2
        self.quick_s = self.min_stay_s = quick_s
        self.facts: list[tuple[Any, ...]] = []
        self.wrong: list[str] = []  # what an observer raises is caught
        self.running: set[Any] = set()
        self.stays: dict[Context, dict[str, float]] = {}  # how long each was in the states that it has left
        self.states: dict[Context, tuple[str, float]] = {}  # by the rules: in which state it is, since when

    # --- facts that the model tells word for word

    def context_entered(self, context: Context, kind: str, maker: Any, now: float) -> None:
        self.facts.append(("context_entered", context, kind, maker and (maker.context, maker.index)))

    def context_queued(self, context: Context, lane: int, now: float) -> None:
        self.facts.append(("context_queued", context, lane))

    def context_destroyed(self, context: Context, task: Any, reason: str, now: float) -> None:
        index = None if task is None else self._index(context, task)
        self.facts.append(("context_destroyed", context, reason, None if reason in ("spread", "emptied") else index))

    def context_dropped(self, context: Context, task: Any, now: float) -> None:
        self.facts.append(("context_dropped", context, self._index(context, task)))

    def context_stalled(self, context: Context, stall: Any, now: float) -> None:
        self.facts.append(("context_stalled", context))
        run: Any = context._run
        if run.stalls[-1] is not stall or stall.context is not context or stall.task not in run.plan.index:
            self.wrong.append(f"{stall} is told of {context!r}, and the last known is {run.stalls[-1]}")

    def context_failed(self, context: Context, failure: Any, execution: Any, now: float) -> None:
        run: Any = context._run
        self.facts.append(("context_failed", context, run.plan.index[failure.task], failure.attempts))
        if run.failures[-1] is not failure or failure.exception is not context._error:
            self.wrong.append(f"{failure} is told, and the last known is {run.failures[-1]}")

    def context_changed(self, context: Context, now: float) -> None:
        self.facts.append(("context_changed", context))

    def tasks_bypassed(self, context: Context, count: int, now: float) -> None:
        self.facts.append(("tasks_bypassed", context, count))

    def visit_started(self, context: Context, worker: int, lane: int, waited_s: float, now: float) -> None:
        self.facts.append(("visit_started", context, lane, waited_s))

    def visit_finished(self, context: Context, worker: int, busy_s: float, now: float) -> None:
        self.facts.append(("visit_finished", context))

    def retry_scheduled(self, execution: Any, error: BaseException, delay_s: float, now: float) -> None:
        self.facts.append(("retry_scheduled", execution, error, delay_s))

    def limit_deferred(self, context: Context, task: Any, limiter: str, now: float) -> None:
        self._limited(context, task, limiter)
        self.facts.append(("limit_deferred", context, self._index(context, task)))

    def limit_granted(self, context: Context, task: Any, limiter: str, waited_s: float, now: float) -> None:
        self._limited(context, task, limiter)
        self.facts.append(("limit_granted", context, self._index(context, task), waited_s))

    def join_waiting(self, context: Context, task: Any, now: float) -> None:
        self.facts.append(("join_waiting", context, self._index(context, task)))

    def join_released(self, parent: Context, task: Any, children: int, waited_s: float, now: float) -> None:
        self.facts.append(("join_released", parent, self._index(parent, task), children, waited_s))

    def loop_item(self, context: Context, task: Any, now: float) -> None:
        self.facts.append(("loop_item", context, task.id))

    def _index(self, context: Context, task: Any) -> int:
        run: Any = context._run
        index: int = run.plan.index[task.id]
        return index

    def _limited(self, context: Context, task: Any, limiter: str) -> None:
        run: Any = context._run
        names = [run.limiter_names[limit] for limit in run.limits[self._index(context, task)]]
        if limiter not in (*names, task.id):
            self.wrong.append(f"{context!r} is told to wait for {limiter!r} at {task.id!r}, which has {names}")

    # --- executions

    def execution_started(self, execution: Any, now: float) -> None:
        if execution in self.running or execution.started != now or execution.outcome is not None:
            self.wrong.append(f"{execution!r} is told to start at {now}")
        self.running.add(execution)

    def execution_finished(self, execution: Any, outcome: str, error: BaseException | None, now: float) -> None:
        if execution.ended != now or execution.outcome != outcome:
            self.wrong.append(f"{execution!r} is told to end at {now} as {outcome}")
        self.running.discard(execution)
        self.facts.append(("execution_finished", execution, outcome, error))

    # --- states: the stays of each context follow one another, and are those of the rules

    def state_left(self, context: Context, state: int, stayed_s: float, now: float) -> None:
        if not stayed_s:
            return
        stays = self.stays.setdefault(context, dict.fromkeys(STATES, 0.0))
        stays[STATES[state]] += stayed_s
        known, since = self.states.get(context, (STATES[state], now - stayed_s))
        if (known, since) != (STATES[state], now - stayed_s) and not (state == 6 and since == now - stayed_s):
            self.wrong.append(f"{context!r} left {STATES[state]} after {stayed_s}, by the rules {known} since {since}")
        self.states[context] = (known, now)

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        self.facts.append(("context_finished", context, outcome))
        self.states.pop(context, None)
        stays = self.stays.pop(context, None) or dict.fromkeys(STATES, 0.0)
        stayed = sum(stays.values())
        if not self.min_stay_s and abs(stayed - (now - context._entered)) > 1e-9:
            self.wrong.append(f"{context!r} stayed {stayed} in all, and lived {now - context._entered}")
        run: Any = context._run
        ledger = run.ledger_of(context)
        if not self.min_stay_s and any(abs(ledger[state] - stays[state]) > 1e-9 for state in ledger):
            self.wrong.append(f"the ledger of {context!r} is {ledger}, its stays {stays}")
        if self.needs_slack and context._ledger is not None:
            self._check_path(run.critical_path(context), outcome, now)

    def _check_path(self, path: list[Any], outcome: str, now: float) -> None:
        critical = [step for step in path if step.critical]
        late = [step for step in path if step.ended > now or step.ended < step.started or step.slack_s < 0]
        if late or [step.started for step in path] != sorted(step.started for step in path):
            self.wrong.append(f"the critical path {path} of what ended at {now}")
        if self.alone and outcome == "output" and path and (not critical or critical[-1].ended != now):
            self.wrong.append(f"nothing is critical in {path}")

    # --- the comparison

    def compare(self, model: Model, what: str, facts: Facts) -> None:
        """What was told since the last time is what the model says, each as often."""
        if self.wrong:
            raise ModelError(f"after {what}: {self.wrong[0]}")
        told, self.facts = self.facts, []
        due, model.facts = model.facts, []
        if self.quick_s:  # quick successes and short waits need not be told
            due = [fact for fact in due if not self._quick(fact, model.now, facts)]
        left = list(told)
        missing = []
        for fact in due:
            if fact in left:
                left.remove(fact)
            elif fact[0] != "context_changed":  # the same change may be told once
                missing.append(fact)
        extra = [fact for fact in left if fact[0] != "context_changed" or fact not in due]
        if missing or extra:
            raise ModelError(f"after {what}: was not told {missing}, and was told {extra} against the rules")

    def _quick(self, fact: tuple[Any, ...], now: float, facts: Facts) -> bool:
        if fact[0] == "execution_finished":
            quick: bool = fact[2] == "success" and now - fact[1].started < facts.skip_s
            self.running -= {fact[1]} if quick else set()
            return quick
        return bool(fact[0] == "visit_started" and fact[3] < facts.quick_wait_s)
