"""What the engine does now, as plain data for JSON: `snapshot` of one executor.

Read from any thread while the engine runs: plain numbers, lists of fixed length, and containers copied in one step.
Nothing is locked and nothing waits, so it can be read while a task blocks the event loop. Context data is never in it:
ids, states, times and counts are.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from obsdag.core.states import LANES, OUTCOMES, STATES, State
from obsdag.ops.findings import Story
from obsdag.ops.watch import Far, Rates, Sample, Watch, trace_id_of
from obsdag.serving import Serving
from obsdag.telemetry.gauges import settled_counts
from obsdag.telemetry.tally import MetricsObserver

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.core.records import Lend
    from obsdag.core.state import RunState
    from obsdag.shell import RunShell

__all__ = ["COLUMNS", "Reader"]

Living = list[tuple["RunShell", list["Context"]]]

COLUMNS: Final = ("running", "waiting", "executions", "failed", "retried", "rate", "mean_s", "p95_s")
"""A task's numbers, in the order in which rows hold them. rate: ends per second; mean_s, p95_s: of the same window."""

_ELSEWHERE: Final = frozenset((State.LENT, State.SOURCE_WAIT, State.DISCARDED))
"""States of contexts that are at no task: what was made from them is."""

_LOOKED_AT: Final = 2_000  # living contexts, the oldest, that are looked at one by one
_SLOWEST: Final = 12
_TRIES: Final = 5
_JOINS: Final = 20
_WORKERS: Final = 128
_CHILDREN: Final = 200


class Reader:
    """Reads one executor. `graph` never changes; `read` gives the rest, and a row of numbers for each task."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        executor = watch.executor
        self._plan = plan = executor.plan
        self._inner = [i for i in range(len(plan.tasks)) if i not in (plan.source, plan.sink)]
        place = {index: n for n, index in enumerate(self._inner)}
        self.graph: list[dict[str, Any]] = [
            {
                "id": plan.tasks[i].id,
                "kind": plan.tasks[i].kind,
                "up": [place[u] for u in plan.up_list[i] if u in place],
            }
            for i in self._inner
        ]
        self._number_keys = [(f"n:{plan.tasks[i].id}", f"s:{plan.tasks[i].id}") for i in self._inner]
        self._rates = Rates()
        self._story = Story()

    def read(self) -> tuple[dict[str, Any], list[list[Any]]]:
        """The present moment: everything but the tasks, and the tasks' rows (COLUMNS).

        A part that cannot be read, because the engine changed it meanwhile once too often, is named in `unreadable`.
        """
        executor, unreadable = self.watch.executor, list[str]()
        shells = list(executor._shells)
        far = executor.seen() if isinstance(executor, Far) else {}
        counts, states, unaccounted = self._counts(shells)
        for name, number in far.pop("counts", {}).items():
            counts[name] += number
        living = [(shell, _oldest(shell.run)) for shell in shells]
        rows, rate = self._rows(shells, living, counts)
        state = {
            **self._whole(shells),
            "counts": counts,
            "living": sum(states.values()),
            "unaccounted": unaccounted,
            "states": states,
            "rate": rate,
            "floor_s": next(iter(_bounds(shells)), None),
            **_parts(unreadable, shells, living),
            **self._remembered(),
            "unreadable": unreadable,
            "shards": None,
            **far,
        }
        state["findings"] = self._story.findings(state, time.time())
        return state, rows

    def _whole(self, shells: list[RunShell]) -> dict[str, Any]:
        executor = self.watch.executor
        serving = executor if isinstance(executor, Serving) else None
        return {
            "dag": self._plan.name,
            "engine": getattr(executor.config.telemetry, "engine", None),
            "phase": serving.phase if serving is not None else "running" if shells else "idle",
            "serving": serving is not None,
            "runs": len(shells),
            "up_s": max((shell.clock() - shell.run.started for shell in shells), default=0.0),
            "pending": serving.pending if serving is not None else 0,
            "in_flight": serving.in_flight if serving is not None else 0,
            "unfetched": serving.unfetched if serving is not None else 0,
            "capacity": {
                "workers": executor.config.context_worker_num,
                "live_contexts": executor.config.max_live_contexts,
                "pending": executor.config.max_pending,
            },
        }

    def _remembered(self) -> dict[str, Any]:
        watch = self.watch
        seconds, task = watch.blocked_for(time.monotonic())
        return {
            "failures": list(watch.failures)[::-1],
            "events": list(watch.events)[::-1],
            "traces": list(watch.traces)[::-1],
            "rejected": dict(watch.rejected),
            "last_run": watch.last_run,
            "blocked": {"task": task, "for_s": seconds} if seconds else None,
        }

    def _counts(self, shells: list[RunShell]) -> tuple[dict[str, int], dict[str, int], int]:
        """Entered and each outcome, of all runs so far, the living by state, and what does not add up (C9): 0."""
        totals = self.watch.executor._totals.copy()
        counts = {name: int(totals[name]) for name in ("entered", *OUTCOMES)}
        states, unaccounted = dict.fromkeys(STATES, 0), 0
        for shell in shells:
            found = settled_counts(shell.run)
            unaccounted += found.unaccounted
            counts["entered"] += sum(found.entered)
            for name, number in zip(OUTCOMES, found.finished, strict=True):
                counts[name] += number
            for name, number in zip(STATES, found.states, strict=True):
                states[name] += number
        return counts, states, unaccounted

    # --- tasks

    def _rows(
        self, shells: list[RunShell], living: Living, counts: dict[str, int]
    ) -> tuple[list[list[Any]], dict[str, float | None]]:
        watch, inner = self.watch, self._inner
        totals = watch.executor._totals.copy()
        executions = [int(totals[n]) for n, _ in self._number_keys]
        seconds = [float(totals[s]) for _, s in self._number_keys]
        running = [0] * len(inner)
        for shell in shells:
            started, ended, spent = (
                shell.run.task_started.copy(),
                shell.run.task_executions,
                shell.run.task_seconds,
            )
            for n, i in enumerate(inner):
                executions[n] += ended[i]
                seconds[n] += spent[i]
                running[n] += max(started[i] - ended[i], 0)
        ended_total = sum(counts[name] for name in OUTCOMES)
        sample = Sample(time.monotonic(), executions, seconds, self._histograms(shells), counts["entered"], ended_total)
        before = self._rates.add(sample)
        waiting = _waiting(living)
        tasks, bounds = self._plan.tasks, _bounds(shells)
        rows = []
        for n, i in enumerate(inner):
            name = tasks[i].id
            rate, mean, p95 = _latency(n, sample, before, bounds)
            rows.append(
                [running[n], waiting[name], executions[n], watch.failed[name], watch.retried[name], rate, mean, p95]
            )
        if before is None:
            return rows, {"entered": None, "ended": None}
        span = sample.at - before.at
        return rows, {
            "entered": (sample.entered - before.entered) / span,
            "ended": (sample.ended - before.ended) / span,
        }

    def _histograms(self, shells: list[RunShell]) -> list[list[float]] | None:
        """The rows of the metrics' histograms by task, if there are metrics; empty for tasks that share one."""
        tallies = _tallies(shells)
        if not tallies:
            return None
        sharing = Counter(map(id, tallies[0].rows))
        return [
            []
            if sharing[id(tallies[0].rows[i])] > 1
            else [sum(parts) for parts in zip(*(t.rows[i] for t in tallies), strict=True)]
            for i in self._inner
        ]


def _bounds(shells: list[RunShell]) -> tuple[float, ...]:
    tallies = _tallies(shells)
    return tallies[0]._buckets.bounds if tallies else ()


def _parts(unreadable: list[str], shells: list[RunShell], living: Living) -> dict[str, Any]:
    """What is read one by one from structures that change under the reader."""
    readers: dict[str, tuple[Callable[[], Any], Any]] = {
        "lanes": (lambda: _lanes(shells), dict.fromkeys(LANES, 0)),
        "workers": (lambda: _workers(shells), {"busy": 0, "doing": []}),
        "timers": (lambda: _timers(shells), {"armed": 0, "next_in_s": None}),
        "limits": (lambda: _limits(shells), []),
        "pools": (lambda: _pools(shells), []),
        "joins": (lambda: _joins(living), []),
        "slowest": (lambda: _slowest(living), []),
    }
    found: dict[str, Any] = {}
    for name, (read, otherwise) in readers.items():
        for _ in range(_TRIES):
            try:
                found[name] = read()
                break
            except (RuntimeError, LookupError, AttributeError, ValueError):  # changed in the middle of it
                continue
        else:
            found[name] = otherwise
            unreadable.append(name)
    return found


def _tallies(shells: list[RunShell]) -> list[MetricsObserver]:
    found = [each for shell in shells for each in shell.run.facts._observers if isinstance(each, MetricsObserver)]
    return list({id(each): each for each in found}.values())


def _latency(
    n: int, now: Sample, before: Sample | None, bounds: tuple[float, ...]
) -> tuple[float | None, float | None, float | None]:
    """Ends per second, mean and 95 % quantile of what took place between two samples."""
    if before is None:
        count, spent, span = now.executions[n], now.seconds[n], 0.0
    else:
        count, spent = now.executions[n] - before.executions[n], now.seconds[n] - before.seconds[n]
        span = now.at - before.at
    rate = round(count / span, 3) if span else None
    mean = round(spent / count, 6) if count > 0 else None
    p95 = None
    if now.rows is not None and bounds:
        counts = now.rows[n][1:]
        if before is not None and before.rows is not None:
            counts = [a - b for a, b in zip(counts, before.rows[n][1:], strict=True)]
        p95 = _quantile(counts, bounds, 0.95)
    return rate, mean, p95


def _quantile(counts: list[float], bounds: tuple[float, ...], share: float) -> float | None:
    """Linear within its bucket, as Prometheus's histogram_quantile; the last bound stands for all above it.

    The first bound stands for all below it: linear would make of microseconds almost a millisecond.
    """
    total = sum(counts)
    if total <= 0 or min(counts) < 0:
        return None
    wanted, seen, low = share * total, 0.0, 0.0
    for count, high in zip(counts, bounds, strict=False):
        if seen + count >= wanted:
            if not low:
                return high
            return round(low + (high - low) * (wanted - seen) / count, 6)
        seen, low = seen + count, high
    return bounds[-1]


# --- living contexts


def _oldest(run: RunState) -> list[Context]:
    """The living contexts that entered first."""
    for _ in range(8):
        try:
            return list(itertools.islice(run.contexts, _LOOKED_AT))
        except RuntimeError:  # changed under the reader's thread: try again
            continue
    return []


def _waiting(living: Living) -> Counter[str]:
    """Contexts that are at a task and do not run there: queued for it, or waiting."""
    found: Counter[str] = Counter()
    for shell, contexts in living:
        for context in contexts:
            with contextlib.suppress(AttributeError):  # it is only being made
                if context._outcome is None and not context._running and context._state not in _ELSEWHERE:
                    found[shell.run._waiting_at(context)] += 1
    return found


def _slowest(living: Living) -> list[dict[str, Any]]:
    """Roots that have been under way longest, and where their time went."""
    found: list[dict[str, Any]] = []
    for shell, contexts in living:
        run, now = shell.run, shell.clock()
        roots = (c for c in contexts if c._ledger is not None and c._outcome is None)
        for context in itertools.islice(roots, _SLOWEST):
            ledger = {name: seconds for name, seconds in run.ledger_of(context).items() if seconds >= 0.0005}
            found.append(
                {
                    "context": context.id,
                    "age_s": now - context._entered,
                    "state": _state_name(context),
                    "tasks": _tasks_of(run, context) or [""],
                    "ledger": ledger,
                    "trace_id": trace_id_of(context),
                }
            )
    return sorted(found, key=lambda each: -float(each["age_s"]))[:_SLOWEST]


def _state_name(context: Context) -> str:
    return STATES[context._state] if 0 <= context._state < len(STATES) else ""


def _tasks_of(run: RunState, context: Context) -> list[str]:
    """What it runs, else the task it waits at; nothing of one that is only being made."""
    try:
        names = [execution.task.id for execution in tuple(context._executions or ())]
        return names[:8] or [run._waiting_at(context)]
    except AttributeError:  # the run's thread is between making it and letting it in
        return []


def _joins(living: Living) -> list[dict[str, Any]]:
    """Joins that wait, and for what: children under way, upstreams of the parent, a map that still gives."""
    found: list[dict[str, Any]] = []
    for shell, contexts in living:
        if not shell.run.state_counts[State.LENT] and not any(shell.run.joins_pending):
            continue
        for context in contexts:
            more = context._more
            for lend in tuple((more.lends or {}).values()) if more is not None else ():
                if lend.keeps and context._outcome is None and len(found) < _JOINS:
                    found.append(_join(shell.run, context, lend, shell.clock()))
    return sorted(found, key=lambda each: -each["waits_s"])


def _join(run: RunState, parent: Context, lend: Lend, now: float) -> dict[str, Any]:
    arrived = dict(lend.arrived)
    join = next(iter(arrived), None)
    if join is None:
        join = run._join_below(lend.index)
    at: Counter[str] = Counter()
    for child in itertools.islice(tuple(lend.children), _CHILDREN):
        if child._outcome is None and not (child._more is not None and child._more.arrived):
            at.update(_tasks_of(run, child))
    lends = tuple((parent._more.lends or {}).values()) if parent._more is not None else ()
    branches = [each for each in lends if join is not None and each.mask & run.plan.bit[join]]
    missing = run.plan.names(run._outside(branches, join) & ~parent._done) if join is not None else []
    return {
        "context": parent.id,
        "join": run.plan.tasks[join].id if join is not None else None,
        "from": run.plan.tasks[lend.index].id,
        "arrived": sum(arrived.values()),
        "living": lend.living,
        "ended": dict(lend.outcomes),
        "children_at": dict(at.most_common(5)),
        "missing": missing,
        "pulling": lend.pulling,
        "waits_s": max(now - lend.first_arrival, 0.0) if arrived else 0.0,
    }


# --- lanes, workers, timers, limits, pools


def _lanes(shells: Iterable[RunShell]) -> dict[str, int]:
    lanes = dict.fromkeys(LANES, 0)
    for shell in shells:
        for name, length in zip(LANES, shell.run.queue_lengths(), strict=True):
            lanes[name] += length
    return lanes


def _workers(shells: list[RunShell]) -> dict[str, Any]:
    """How many are busy, and what each of the busy ones does, the longest first."""
    busy: list[dict[str, Any]] = []
    for n, shell in enumerate(shells):
        now = shell.clock()
        for worker in shell.workers:
            context = worker.context
            if context is None:
                continue
            since = worker.since
            pull = getattr(context, "pull", None)
            owner = context if pull is None else pull.context
            tasks = [each.task.id for each in tuple(owner._executions or ())][:8]
            busy.append(
                {"run": n, "n": worker.number, "context": owner.id, "tasks": tasks, "for_s": max(now - since, 0.0)}
            )
    busy.sort(key=lambda each: -each["for_s"])
    return {"busy": len(busy), "doing": busy[:_WORKERS]}


def _timers(shells: list[RunShell]) -> dict[str, Any]:
    armed, next_in = 0, None
    for shell in shells:
        armed += shell.run.timers_armed
        due = shell.run.timers.soonest()
        if due is not None:
            left = max(due - shell.clock(), 0.0)
            next_in = left if next_in is None else min(next_in, left)
    return {"armed": armed, "next_in_s": next_in}


def _limits(shells: list[RunShell]) -> list[dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for shell in shells:
        names, now = shell.run.limiter_names, shell.clock()
        for status in shell.run.runtime.limits.snapshot() if names else ():
            if status["limit"] in names:
                next_at = status["next_permit_at"]
                found[status["limit"]] = {
                    "name": names[status["limit"]],
                    "kind": status["kind"],
                    "capacity": status["capacity"],
                    "in_use": status["in_use"],
                    "waiting": status["waiting"],
                    "next_in_s": None if next_at is None else max(next_at - now, 0.0),
                }
    return list(found.values())


def _pools(shells: list[RunShell]) -> list[dict[str, Any]]:
    found = []
    for pools in {id(shell.pools): shell.pools for shell in shells}.values():
        for kind in ("thread", "process"):
            pool = getattr(pools, kind)
            if pool is not None:
                numbers = {name: getattr(pool, name, 0) for name in ("size", "workers", "busy", "queued", "abandoned")}
                found.append({"pool": kind, **numbers})
    return found
