"""Deferred tracing: ids up front, records per root, spans only of what turns out to be wanted (TELEMETRY section 3).

The observer of one run, told on its thread. It says which trace a context and an execution belong to, makes the
execution the current span, and leaves records; `keeping` decides about them.

Which trace: a root has its own, a child that of its root. One pull of a loop has one that the item it gives adopts, so
that the trace of an endless input does not grow for ever. What is made after its parent's trace is over has its own.
"""

from __future__ import annotations

import contextvars
import math
from time import perf_counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.context import get_current
from opentelemetry.trace import INVALID_SPAN, get_current_span, set_span_in_context

from obsdag.core.critical import critical_executions
from obsdag.core.states import LANES, State
from obsdag.telemetry.attach import current, make_current
from obsdag.telemetry.carrier import Caller, without_span
from obsdag.telemetry.executions import TracedExecution, record_of, span_of
from obsdag.telemetry.keeping import BLOCK, IN_TURN, LOW_BITS, Keeper
from obsdag.telemetry.materialize import MAX_LINKS, build_run_span, error_text
from obsdag.telemetry.records import (
    ContextTrace,
    ExecutionSpan,
    Part,
    RootTrace,
    new_span_id,
    new_trace_id,
    random_bits,
    span_in,
)
from obsdag.telemetry.specs import error_type_of

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.core.records import Execution, Failure, Stall
    from obsdag.core.state import RunState
    from obsdag.tasks.base import Task

__all__ = ["DeferredTracer"]

WAIT_SPAN_S: Final = 0.1
"""A stay in a waiting state becomes a span from this length on."""
_RUNNING: Final = State.RUNNING.value
_LOOP_LANE: Final = LANES.index("loop")
_OWN: Final = (TracedExecution, ExecutionSpan)


class DeferredTracer(Keeper):
    """Traces one run; see the module. Made by `Tracing.observers`."""

    execution_class = TracedExecution
    quick_s = math.inf
    min_stay_s = WAIT_SPAN_S
    guarded = frozenset({"context_entered", "execution_started", "visit_finished"})
    __slots__ = ()

    # --- runs

    def run_started(self, run: RunState, now: float) -> None:
        """The caller's span is the parent of the `run` span; its baggage is seen by every task."""
        context = get_current()
        caller = get_current_span(context).get_span_context()
        self._base = without_span(context)
        self._outside = set_span_in_context(INVALID_SPAN, context)
        if caller.is_valid:
            self.run_parent = caller
            self.run_trace_id = caller.trace_id
        self._started = now
        self._plain = not (self._hot or self._special or self._base)
        self._dropped = self.stats.count_dropped(dag=self.dag)
        self._pipeline.opened(self)

    def run_finished(self, run: RunState, outcome: str, duration_s: float, now: float) -> None:
        """Exports the `run` span if anything leads to it; what is pending is decided."""
        for key in list(self._pulls):
            self._end_pull(key, now)
        followed = self._follow and self.run_parent is not None and self.run_parent.trace_flags.sampled
        if self._kept_any or followed or outcome != "ok" or self.is_sampled(self.run_trace_id):
            span = build_run_span(self, outcome, self._started, now)
            if not self._pipeline.submit(lambda: self._pipeline.emit(span)):
                self.stats.drop("traces", "buffer_cap", dag=self.dag)
        self.stats.counted_dropped(self._dropped, dag=self.dag)
        self._dropped = [0]
        self._time_executions()
        room, self.room = self.room, 0
        self._pipeline.give_places(room)
        self._pipeline.closed(self)
        self._over = None

    # --- contexts

    def context_entered(self, context: Context, kind: str, maker: Execution | None, now: float) -> None:
        """A root gets a trace, a child belongs to its root's, an item of a loop to its pull's."""
        try:
            if maker is not None or context._parent is not None or context._trace is not None:
                self._enter(context, maker, now)
                return
            context._trace = root = RootTrace()  # the common case: `RootTrace.begun` written out
            root.tracer = self
            root.raw_id = context._id
            root.entered = now
            root.left = self._most
            root.trace_id = random_bits(128) or 1
            root.records = []
            root.open = 1
            root.hot, root.plain = self._hot, self._plain
            root.decision = root.more = root.last = None
            root._span_id = 0
            self.room -= 1
            if self.room < 0:
                self._refill()
        except Exception as error:
            self._broke("context_entered", error)

    def _enter(self, context: Context, maker: Execution | None, now: float) -> None:
        made_by = span_of(maker)
        if made_by is not None and self._pulls and self._adopt(context, made_by):
            return
        parent = context._parent
        if parent is not None:
            above = parent._trace
            if isinstance(above, ContextTrace) and above.root.open > 0:
                root = made_by.trace.root if made_by is not None and made_by.trace.root.open > 0 else above.root
                context._trace = ContextTrace.below(root, context._id, made_by)
                root.open += 1
                return
        root = RootTrace.begun(self, context._id, now, self._most)
        root.hot, root.plain = self._hot, self._plain
        given = context._trace
        context._trace = root
        self.room -= 1
        if self.room < 0:
            self._refill()
        if given is not None or made_by is not None or parent is not None:
            self._note_entry(root, given, made_by, parent)

    def _note_entry(self, root: RootTrace, given: Any, made_by: ExecutionSpan | None, parent: Context | None) -> None:
        more = root.rare()
        if parent is not None:
            more.parent_id = parent.id
        if made_by is not None:
            more.links.append(("maker", made_by.trace_id, made_by.id))
            above = made_by.trace.root.more
            more.base = above.base if above is not None else None
            root.plain &= more.base is None
        if type(given) is Caller:
            more.caller, more.base = given, given.base
            root.plain = False
            if given.parent is not None:
                root.trace_id = given.parent.trace_id
            sampled = given.span_context is not None and given.span_context.trace_flags.sampled
            if self._follow and sampled:
                self._keep(root, "parent")

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        """The last context of a tree to end brings the decision."""
        root = context._trace
        if (  # the common case written out: nothing speaks for keeping the trace, and nothing of it goes on
            type(root) is RootTrace
            and root.open == 1
            and root.more is None
            and (root.trace_id & LOW_BITS) >= self._bound
            and not (context._executions or self._pulls or self._quantile)
            and outcome != "cancelled"
            and (self._slow_s is None or now - root.entered <= self._slow_s)
            and (IN_TURN or not self._hunts)
            and root.decision is None
        ):
            root.decision = "dropped"  # `_drop` written out, where it has no lock to take
            self._dropped[0] += 1
            if not self._dropped[0] % BLOCK:
                self._now_and_then()
            self.room += len(root.records) + 1
            root.records.clear()
            if self.room > 2 * BLOCK:
                self._give_back()
            root.open = 0
            root.last = None
            over, self._over = self._over, context
            if over is not None:
                over._trace = None  # results keep their contexts; memory that is used again is still in the cache
        else:
            self._end(context, outcome, now)

    def _end(self, context: Context, outcome: str, now: float) -> None:
        trace = context._trace
        root: RootTrace = trace.root
        trace.last = None
        if self._pulls and id(trace) in self._pulls:
            self._end_pull(id(trace), now)
        if root.more is not None:
            root.more.joins.pop(id(trace), None)
        if context._executions:
            self._note_tail(context._executions)
        root.open -= 1
        if trace.top:
            plain = self._is_plain(root, outcome, now)
            if plain and root.open == 0 and root.decision is None and self._drop(root):
                return
            self._note_end(root, context, outcome, now, plain)
        if root.open == 0:
            self._decide(root, now)

    def _note_end(self, root: RootTrace, context: Context, outcome: str, now: float, plain: bool) -> None:
        more = root.rare()
        more.outcome, more.ended, more.ledger = outcome, now, context.ledger
        if root.kept or not plain:
            more.critical = frozenset(
                [(each.context._id, each.index, each.started) for each in critical_executions(context)]
            )

    def _note_tail(self, executions: list[Execution]) -> None:
        """Executions that still run on an ended context keep its trace open."""
        for execution in executions:
            span = span_of(execution)
            if span is not None and not span.ended:
                root = span.trace.root
                if span not in root.rare().tail:
                    root.rare().tail.add(span)
                    root.open += 1
                    root.hot = execution.watched = True
                    root.plain = False

    # --- reasons to keep

    def context_failed(self, context: Context, failure: Failure, execution: Execution | None, now: float) -> None:
        """A failed context keeps its root's trace, within the budget for that task and error."""
        text = error_text(failure.exception)
        for root in self._roots_of(context, execution):
            self._trouble(root, "error", failure.task, text.name)
            if root is context._trace.root and (context._trace.top or root.rare().error is None):
                root.rare().error = (text.name, text.message)

    def retry_scheduled(self, execution: Execution, error: BaseException, delay_s: float, now: float) -> None:
        """A retried execution keeps its root's trace."""
        for root in self._roots_of(execution.context, execution):
            self._trouble(root, "retried", execution.task.id, error_type_of(error))

    def context_stalled(self, context: Context, stall: Stall, now: float) -> None:
        """A stalled context keeps its root's trace."""
        root = context._trace.root
        if context._trace.top or root.rare().stall is None:
            root.rare().stall = (stall.task, tuple(stall.missing))
        self._trouble(root, "stalled", stall.task, "stalled")

    def context_kept(self, context: Context, now: float) -> None:
        """Somebody asked: no budget applies."""
        trace = context._trace
        if isinstance(trace, ContextTrace) and trace.root.open > 0:
            self._keep(trace.root, "asked")

    def _roots_of(self, context: Context, execution: Execution | None) -> set[RootTrace]:
        """The trace of the context, and that of the pull where the execution is one."""
        roots = {context._trace.root}
        span = span_of(execution)
        if span is not None:
            roots.add(span.trace.root)
        return roots

    def _trouble(self, root: RootTrace, reason: str, task: str, error_type: str) -> None:
        if not self._keep(root, reason, (task, error_type)) and root.records:
            last = root.records[-1]  # its exception holds frames, and what they hold: text is enough for a ratio
            if type(last) is tuple and last[0] is not None and isinstance(last[9], BaseException):
                root.records[-1] = (*last[:9], error_text(last[9]))

    # --- executions: the hot path

    def execution_started(self, execution: Execution, now: float) -> None:
        """Makes the execution current, and leaves a record of it: of its end nothing need be told if that is quick."""
        if TYPE_CHECKING:
            assert isinstance(execution, TracedExecution)  # of `execution_class`
        try:
            trace, room = execution.context._trace, self.room
            if trace.plain and room > 0 and (left := trace.left) > 0:
                trace.left = left - 1
                self.room = room - 1
                execution.trace = trace
                execution.listed = True
                trace.records.append(execution)
                make_current(execution)  # type: ignore[arg-type]  # looks like one, and a dict would be another object
            else:
                self._start(execution, trace, now)
        except Exception as error:
            self._broke("execution_started", error)

    def _broke(self, fact: str, error: Exception) -> None:
        if not self.run.facts.detach(self, fact, error):
            raise error

    def execution_finished(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        """Leaves a record, or completes it."""
        if TYPE_CHECKING:
            assert isinstance(execution, TracedExecution)
        trace, root = execution.trace, execution.trace.root
        if not execution.listed:
            self.room -= 1
            quick = root is trace and outcome == "success"
            root.records.append(execution if quick else record_of(execution, error))
        elif outcome != "success":
            self._replace(root, execution, error)
        if execution.span is not None:
            execution.span.execution = None
        if self.room < 0 or root.hot:
            self._after(execution, root, now)

    def _replace(self, root: RootTrace, execution: TracedExecution, error: BaseException | None) -> None:
        """The record of an execution that went wrong says why; it is the newest now."""
        with self.lock:
            if execution in root.records:
                root.records.remove(execution)
            else:
                self.room -= 1  # it was lost, and is counted; its end may find a place
            root.records.append(record_of(execution, error))

    def _now_and_then(self) -> None:
        self._time_executions()

    def _time_executions(self) -> None:
        """What following the executions since the last time has cost, by the time that one of nobody's takes."""
        ended = sum(self.run.task_executions)
        if ended <= self._timed or self.room <= 0:
            return
        took_s = contextvars.Context().run(self._time_nobodys)  # in contextvars of its own, where it is left current
        self.room += 1
        self.stats.spend("traces", took_s * (ended - self._timed), dag=self.dag)
        self._timed = ended

    def _time_nobodys(self) -> float:
        nobodys: Any = SimpleNamespace(_trace=RootTrace.begun(self, 0, 0.0, 1), _lane=0)
        started = perf_counter()
        self.execution_started(TracedExecution.begun(nobodys, 0, 1, 0.0, -1), 0.0)
        return perf_counter() - started

    def visit_finished(self, context: Context, worker: int, busy_s: float, now: float) -> None:
        """What was current before the visit's executions is current again (E17)."""
        try:
            if worker >= 0:
                make_current(self._outside)
        except Exception as error:
            self._broke("visit_finished", error)

    def _after(self, execution: TracedExecution, root: RootTrace, now: float) -> None:
        """What is more than a record: a full buffer, a kept trace, an end that was waited for, a slow task."""
        if self.plan.joins and execution.context._outcome is None:
            execution.trace.last = execution.own_span()
        if execution.lane == _LOOP_LANE and type(current(None)) in _OWN:
            make_current(self._outside)  # a pull is no visit, so nobody does it later
        if self.room < 0 and not self._refill(reserve=execution.outcome not in ("success", None)):
            self._lose_last(root)
        if self._slow_tasks is not None:
            limit_s = self._slow_tasks[execution.index]
            if limit_s is not None and execution.ended - execution.started > limit_s:
                self._keep(root, "slow", (execution.task.id, "slow"))
        more = root.more
        if more is not None and execution.span in more.tail:
            more.tail.discard(execution.span)
            execution.trace.last = None
            root.open -= 1
            if root.open == 0 and more.pull != "open":
                self._decide(root, now)
                return
        if root.kept:
            root.rare().closed = max(root.rare().closed, execution.ended)
            self._pipeline.kept(root)

    # --- waits, joins, loops, long traces

    def state_left(self, context: Context, state: int, stayed_s: float, now: float) -> None:
        """A long stay in a waiting state becomes a span."""
        if stayed_s < WAIT_SPAN_S or state == _RUNNING:
            return
        trace = context._trace
        root = trace.root
        self.room -= 1
        root.records.append((None, trace, state, now - stayed_s, now))
        if self.room < 0 and not self._refill():
            self._lose_last(root)
        elif root.kept:
            self._pipeline.kept(root)

    def join_waiting(self, context: Context, task: Task, now: float) -> None:
        """The child's latest execution is one that the join will link to."""
        more = context._more
        parent = more.lend.parent if more is not None and more.lend is not None else context._parent
        span = context._trace.last
        if parent is None or span is None or not isinstance(parent._trace, ContextTrace):
            return
        joins = parent._trace.root.rare().joins.setdefault(id(parent._trace), {})
        spans, count = joins.setdefault(self.plan.index[task.id], ([], [0]))
        count[0] += 1
        if len(spans) < MAX_LINKS:
            spans.append(span)

    def _start(self, execution: TracedExecution, trace: ContextTrace, now: float) -> None:
        """Its record is left at its end. A long trace goes on in a new one, a pull has one of its own, a join gets its
        links, baggage is carried.
        """
        root, bit = trace.root, self.plan.bit[execution.index]
        root.left -= 1
        if root.left < 0:
            self._continue(root, now)
        more = root.more
        if not (bit & self._special or self._base) and (more is None or not (more.base or more.pull)):
            # Nothing special itself: a join or loop elsewhere in the DAG, a kept trace, a child, a full buffer.
            execution.trace, execution.listed, execution.watched = trace, False, True
            make_current(execution)  # type: ignore[arg-type]  # looks like one, see `execution_started`
            return
        if bit & self.plan.loops:
            trace = self._start_pull(trace, now)
            root = trace.root
            more = root.more
        base = more.base if more is not None and more.base is not None else self._base
        execution.trace = trace
        execution.listed, execution.watched = False, True
        span = execution.span = span_in(trace, root.trace_id, base, execution)
        if more is not None and more.pull == "open":
            more.tail.add(span)
        if more is not None and bit & self.plan.joins:
            arrived = more.joins.get(id(trace), {}).get(execution.index)
            if arrived is not None:
                span.detail().upstream, span.detail().upstream_count = list(arrived[0]), arrived[1][0]
        make_current(span)

    def _continue(self, root: RootTrace, now: float) -> None:
        more = root.rare()
        if more.parts is None:
            more.parts = [Part(root.trace_id, root.span_id, root.entered)]
        for record in list(root.records):
            if type(record) is TracedExecution:
                record.own_span()  # while it would still be in this part
        root.trace_id, root.span_id, root.left = new_trace_id(), new_span_id(), self._most - 1
        more.parts.append(Part(root.trace_id, root.span_id, now))

    def _start_pull(self, trace: ContextTrace, now: float) -> ContextTrace:
        """A trace for one pull; the item that it gives adopts it."""
        before = self._pulls.get(id(trace))
        number = 1 if before is None else before.rare().iteration + 1
        self._end_pull(id(trace), now)
        trace.root.left += 1
        root = RootTrace.begun(self, trace.raw_id, now, self._most - 1)
        root.hot, root.plain = True, False
        self.room -= 1
        more = root.rare()
        more.pull, more.iteration = "open", number
        more.base = trace.root.more.base if trace.root.more is not None else None
        more.links.append(("input", trace.root.trace_id, trace.root.span_id))
        self._pulls[id(trace)] = root
        return ContextTrace.below(root, trace.raw_id, None)

    def _adopt(self, context: Context, made_by: ExecutionSpan) -> bool:
        """The first item of a pull is what its trace is about; False for further ones, and for what no pull made."""
        root = made_by.trace.root
        more = root.more
        if more is None or more.pull != "open":
            return False
        more.pull = "adopted"
        more.links.append(("maker", made_by.trace_id, made_by.id))
        if context._parent is not None:
            more.parent_id = context._parent.id
        root.raw_id = context._id
        root.open += 1
        context._trace = root
        return True

    def _end_pull(self, key: int, now: float) -> None:
        """The next pull has begun, or the loop is over: a pull that gave nothing is decided on its own."""
        root = self._pulls.pop(key, None)
        if root is not None and root.rare().pull == "open":
            root.rare().pull = "ended"
            if root.open == 0:
                self._decide(root, now)
