"""Which traces are kept: the state of one run's tracing, the decisions, and the places that records take in the buffer.

How a root's trace is decided, `RootTrace.decision` being set once:
    kept at once       followed (parent), asked, retried, error, stalled, slow: exported from then on
    kept at its end    cancelled, slow, ratio
    not kept           over_budget, dropped
A trace is over when no context of its tree lives and no execution of it runs (`RootTrace.open` is 0): a root that
reached the sink may have children that go on, and a cancelled execution ends after its context.

Everything runs on the run's thread except `hunt` (the pipeline's thread), `charge` (a task's), and what builds spans;
the pipeline's lock guards what several of them decide.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.context import Context as OtelContext
from opentelemetry.trace import SpanContext

from obsdag.core.observer import Observer
from obsdag.core.states import STATES
from obsdag.telemetry.executions import taken
from obsdag.telemetry.materialize import ErrorTexts
from obsdag.telemetry.records import RootTrace, new_span_id, new_trace_id
from obsdag.telemetry.sampling import ratio_bound
from obsdag.telemetry.specs import clean

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    from obsdag.context import Context
    from obsdag.core.state import RunState
    from obsdag.tasks.base import Task
    from obsdag.telemetry.kept_span import Shared
    from obsdag.telemetry.pipeline import Pipeline
    from obsdag.telemetry.selfstats import SelfStats

__all__ = ["Keeper"]

BLOCK: Final = 256
"""Buffer places that a run takes at a time."""
LOW_BITS: Final = (1 << 64) - 1
IN_TURN: Final = getattr(sys, "_is_gil_enabled", bool)() or not hasattr(sys, "_is_gil_enabled")
"""Whether nobody else decides between two steps without a call between them, as with the GIL."""


class Keeper(Observer):
    """See the module; `DeferredTracer` adds the facts. Made by `Tracing.observers`.

    room: places in the buffer that this run has taken and not used; below 0 it is in debt.
    """

    needs_records = True

    __slots__ = (  # as those of `RunBase`
        *("_base", "_bound", "_dropped", "_epoch_ns", "_follow", "_hot", "_hunts", "_kept_any", "_most", "_outside"),
        *("_over", "_pipeline", "_plain", "_pulls", "_quantile", "_slow_s", "_slow_tasks", "_special", "_started"),
        *("_timed", "dag", "engine", "epoch", "give_places", "lock", "new_span_id", "plan", "room", "run"),
        *("run_parent", "run_span_id", "run_trace_id", "shared", "source", "stats", "take_places", "texts"),
    )

    def __init__(
        self,
        run: RunState,
        pipeline: Pipeline,
        *,
        engine: str,
        stats: SelfStats,
        resource: Resource,
        scope: InstrumentationScope,
        redact: Callable[[str], str] | None,
        sample: float,
        slow_after: float | str | None,
        follow_parent: bool,
        max_spans_per_trace: int,
    ) -> None:
        self.run = run
        self.plan = run.plan
        self.engine = clean(engine)
        self.dag = clean(run.plan.name)
        self.stats = stats
        self.source = resource, scope
        self.epoch = run.epoch
        self.room = 0
        self.run_trace_id, self.run_span_id = new_trace_id(), new_span_id()
        self.new_span_id = new_span_id
        self.take_places = pipeline.take_places
        self.give_places = pipeline.give_places
        self._epoch_ns = int(run.epoch * 1e9)
        self._pipeline = pipeline
        self.lock = pipeline.lock
        self.texts = ErrorTexts(redact)
        self.shared: dict[tuple[Any, ...], Shared] = {}  # of `materialize`; any thread, each by single operations
        self._bound = ratio_bound(sample)
        self._follow = follow_parent
        self._most = max_spans_per_trace
        self._slow_s = float(slow_after) if isinstance(slow_after, int | float) else None
        self._quantile = pipeline.quantile_of(self.dag) if slow_after == "p99" else None
        self._slow_tasks = _slow_tasks(run.plan.tasks)
        self._hot = self._slow_tasks is not None or bool(run.plan.loops | run.plan.maps | run.plan.joins)
        self._plain = not self._hot
        self._special = run.plan.loops | run.plan.joins  # tasks of which more is to be noted when they start
        self._base: OtelContext = OtelContext()
        self._outside: OtelContext = self._base
        self.run_parent: SpanContext | None = None
        self._started = 0.0
        self._timed = 0
        self._hunts = self._slow_s is not None or self._quantile is not None
        self._dropped = [0]
        self._over: Context | None = None  # the latest whose trace was dropped: other observers may still ask for ids
        self._kept_any = False
        self._pulls: dict[int, RootTrace] = {}

    # --- what materialization asks for; any thread

    def unix_ns(self, at: float) -> int:
        """Nanoseconds since 1970 of a time on the run's clock; monotonic, so what lies within stays within."""
        return self._epoch_ns + int(at * 1e9)

    def unix_ns_now(self) -> int:
        """Nanoseconds since 1970, now."""
        return self.unix_ns(self.run.clock())

    def hand_in(self, span: ReadableSpan) -> None:
        """A finished span below the `run` span, which is exported for it."""
        self._kept_any = True
        if not self._pipeline.submit(lambda: self._pipeline.emit(span)):
            self.stats.drop("traces", "buffer_cap", dag=self.dag)

    def now(self) -> float:
        """The run's clock."""
        return self.run.clock()

    def is_sampled(self, trace_id: int) -> bool:
        """Whether the ratio keeps the trace, by the SDK's rule."""
        return (trace_id & LOW_BITS) < self._bound

    def charge(self, root: RootTrace, places: int) -> bool:
        """Takes buffer places for what a task says about its span; False, and counted, if the buffer is full."""
        if not self._pipeline.take_places(places):
            self.stats.drop("traces", "buffer_cap", dag=self.dag)
            return False
        with self.lock:
            root.rare().units += places
        return True

    # --- the decision at the end

    def _is_plain(self, root: RootTrace, outcome: str, now: float) -> bool:
        """Whether nothing about the end of a root speaks for keeping its trace: the common case."""
        took_s = now - root.entered
        if self._quantile is not None:
            self._slow_s = self._quantile.limit_s
            self._quantile.observe(took_s)
        if outcome == "cancelled" or (self._slow_s is not None and took_s > self._slow_s):
            return False
        if root.more is None:
            return (root.trace_id & LOW_BITS) >= self._bound
        return not self.is_headed(root)

    def is_headed(self, root: RootTrace) -> bool:
        """Whether the ratio will keep the root's trace, which its id says from the start."""
        parts = root.more.parts if root.more is not None else None
        trace_id = root.trace_id if parts is None else parts[0].trace_id
        return (trace_id & LOW_BITS) < self._bound and not (root.more is not None and self._unfollowed(root))

    def _unfollowed(self, root: RootTrace) -> bool:
        """Whether the caller decided against this trace: then a ratio of our own would only make orphans."""
        caller = root.more.caller if root.more is not None else None
        parent = caller.parent if caller is not None else None
        return self._follow and parent is not None and not parent.trace_flags.sampled

    def _drop(self, root: RootTrace) -> bool:
        """Forgets an undecided trace; False if the hunt for slow ones has kept it a moment ago."""
        more = root.more
        if more is None and (IN_TURN or not self._hunts):
            if root.decision is not None:
                return False
            root.decision = "dropped"
        else:
            with self.lock:
                if root.decision is not None:
                    return False
                root.decision = "over_budget" if more is not None and more.over else "dropped"
        if root.decision == "dropped":
            dropped = self._dropped
            dropped[0] += 1
            if not dropped[0] % BLOCK:
                self._now_and_then()
        else:
            self.stats.decide(root.decision, dag=self.dag)
        if more is not None:
            self._forget(root)
        self.room += len(root.records) + 1
        root.records.clear()
        if self.room > 2 * BLOCK:
            self._give_back()
        return True

    def _give_back(self) -> None:
        self._pipeline.give_places(self.room - BLOCK)
        self.room = BLOCK

    def _now_and_then(self) -> None:
        """Called once in many dropped roots."""

    def _forget(self, root: RootTrace) -> None:
        more = root.rare()
        with self.lock:
            places = more.units + len(more.held)
            more.units = 0
            more.held.clear()
            _release_user_spans(root)
        more.joins.clear()
        if places:
            self._pipeline.give_places(places)

    def _decide(self, root: RootTrace, now: float) -> None:
        """The tree is over: keep it or forget it."""
        more = root.rare()
        # Workers hand over the times that they looked at the clock, which may be a moment earlier than another's.
        more.closed = max(now, more.closed, *[_ended(record) for record in root.records])
        if root.decision is None:
            if more.outcome == "cancelled" and not self._keep(root, "cancelled", ("", "cancelled")):
                more.over = True
            slow = self._slow_s is not None and now - root.entered > self._slow_s
            if slow and root.decision is None and not self._keep(root, "slow", ("", "slow")):
                more.over = True
            if root.decision is None and self.is_headed(root):
                self._keep(root, "ratio")
        if root.decision is None:
            self._drop(root)
        if root.kept:
            self._finish(root)

    def _finish(self, root: RootTrace) -> None:
        if self.room < 0 and not self._refill(reserve=root.decision != "ratio"):
            self._lose_all(root)
            return
        with self.lock:
            root.rare().finished = True
            root.records[:] = taken(root.records)  # from here on nothing may keep the context's data alive
            _release_user_spans(root)
        self._pipeline.kept(root)

    def _lose_all(self, root: RootTrace) -> None:
        """The buffer is full, and nobody takes from it: what is left of a kept trace is lost, and counted."""
        with self.lock:
            lost = len(taken(root.records)) + 1
        self.room += lost
        self._forget(root)
        self.stats.drop("traces", "buffer_cap", lost, dag=self.dag)

    # --- the decision before it

    def _keep(self, root: RootTrace, reason: str, trouble: tuple[str, str] | None = None) -> bool:
        """Keeps a trace from now on; False if the budget for `trouble` (task, error type) is used up. Any thread."""
        with self.lock:
            if root.decision is not None:
                return root.kept
            if trouble is not None and not self._pipeline.budget.take((self.dag, *trouble), self.epoch + self.now()):
                root.rare().over = True
                return False
            root.decision = reason
            root.hot, root.plain = True, False
            _release_user_spans(root)
        self._kept_any = True
        self.stats.decide(reason, dag=self.dag)
        if root.open > 0 and (root.records or (root.more is not None and root.more.held)):
            self._pipeline.kept(root)  # one that is over is handed over by `_finish`, once
        return True

    # --- places in the buffer

    def _refill(self, reserve: bool = False) -> bool:
        """Takes another block of places, or the one place that is missing; False if the buffer is full."""
        for places in (BLOCK - self.room, -self.room):
            if self._pipeline.take_places(places, reserve):
                self.room += places
                return True
        return False

    def _lose_last(self, root: RootTrace) -> None:
        """The buffer is full: the newest record is lost, and counted."""
        with self.lock:
            if not root.records:  # tracing's thread took it a moment ago, and gives its place back
                return
            root.records.pop()
            root.rare().dropped += 1
        self.room += 1
        self.stats.drop("traces", "buffer_cap", dag=self.dag)

    # --- the hunt for slow contexts; on the pipeline's thread

    @property
    def hunts_slow(self) -> bool:
        """Whether contexts that are still under way can be slow."""
        return self._hunts

    def hunt(self) -> None:
        """Keeps roots that have been under way for longer than `slow_after`, so that one that hangs is seen."""
        limit_s = self._slow_s if self._quantile is None else self._quantile.limit_s
        if limit_s is None:
            return
        now = self.now()
        for context in list(self.run.contexts):
            trace = context._trace
            if type(trace) is not RootTrace:
                continue
            root = trace
            if now - root.entered <= limit_s:
                if root.more is None or not root.more.pull:
                    break  # they stand in the order in which they entered
                continue
            if not (root.more is not None and root.more.marked) and not _is_source(context):
                self._mark_slow(root, context, now)

    def _mark_slow(self, root: RootTrace, context: Context, now: float) -> None:
        root.rare().marked = True
        if root.open > 0 and self._keep(root, "slow", ("", "slow")):
            running = tuple(execution.task.id for execution in tuple(context._executions or ()))
            self._pipeline.emit_marker(root, now, running, STATES[context._state])


def _slow_tasks(tasks: tuple[Task, ...]) -> list[float | None] | None:
    limits = [task.config.slow_after for task in tasks]
    return limits if any(limit is not None for limit in limits) else None


def _ended(record: Any) -> float:
    """When a record's execution or wait ended."""
    ended: float = record[4] if type(record) is tuple else record.ended
    return ended


def _is_source(context: Context) -> bool:
    """Whether it is the input of a loop or map, which lives as long as items come."""
    return context._more is not None and bool(context._more.pulls)


def _release_user_spans(root: RootTrace) -> None:
    """Holders forget the spans that have ended; those still open are forgotten when they end."""
    if root.more is not None:
        for span_id, (known, ended) in root.more.user_spans.items():
            if ended:
                known.pop(span_id, None)
        root.more.user_spans.clear()
