"""A simulation whose every transition is compared with the model of the rules."""

from __future__ import annotations

from typing import Any

from obsdag.context import Context, LoopContext, OutputContext, RateLimitContext, StopContext
from obsdag.core.base import _DISCARDED
from obsdag.core.queue import IDLE, QUEUED, VISITED
from obsdag.core.states import STATES
from obsdag.plan import indices
from obsdag.testing.simulation import Simulation
from tests.simulation.model import Graph, Model, ModelError, Node
from tests.simulation.told import Told

__all__ = ["Checked"]


class Checked(Simulation):
    """After each transition: the core's own check (C9), and every context as the model says."""

    def __init__(self, graph: Graph, *arguments: Any, **keywords: Any) -> None:
        self.model: Model | None = None  # until the run has begun
        self.graph = graph
        self.transitions = 0
        self.quiet_since = 0.0
        self.book: Told | None = None
        super().__init__(*arguments, **keywords)
        self.model = Model(graph, self.config.enable_context_gc, self.config.enable_context_bypass)

    # --- what happened, for the model

    def told(self, what: str, *about: Any) -> None:
        """The model goes the same step; then both must agree."""
        model = self.model
        assert model is not None
        self.transitions += 1
        model.changes()
        model.now = self.now
        getattr(self, f"_told_{what}")(model, *about)
        if what not in ("wake", "close", "freeze", "thaw", "returned", "nudge"):
            self.quiet_since = self.now
        if what == "abort_pull":  # `fail` follows at once
            return
        model.settle()
        self.compare(what)
        if self.transitions % 8 == 0:
            self.run.check(deep=True)

    def _told_accept(self, model: Model, context: Context, visited: bool) -> None:
        taken = model.taken()
        if taken >= self.config.max_live_contexts:
            raise ModelError(f"{context!r} was let in beside {taken} others (E16)")
        model.accept(context, visited)

    def _told_take(self, model: Model, context: Context | None) -> None:
        if context is None or isinstance(context, LoopContext):
            queued = [n.context for n in model.nodes.values() if n.stamp and not n.frozen]
            if queued:
                raise ModelError(f"{context!r} was taken while {queued} wait in the queue")
            if context is None:
                model.check_no_pull(self.config.max_live_contexts)
        else:
            model.take(context)

    def _told_begin(self, model: Model, context: Context, execution: Any) -> None:
        if not isinstance(context, LoopContext):
            model.begin(context, execution)

    def _told_leave(self, model: Model, context: Context) -> None:
        model.leave(context)

    def _told_finish(self, model: Model, execution: Any, result: Any) -> None:
        items = result if isinstance(result, list | tuple) else [result]
        if result is None:
            items = [execution.context] if execution.index in self.graph.pass_through else []
        if any(isinstance(each, OutputContext) for each in items):
            model.output(execution)
            return
        limited = [each for each in items if isinstance(each, RateLimitContext) and each.context is execution.context]
        if limited:
            model.rate_limited(execution, self.now + limited[-1].delay)
            return
        model.finished(execution, list(dict.fromkeys(e for e in items if not isinstance(e, LoopContext | StopContext))))

    def _told_finish_and_begin(self, model: Model, execution: Any, following: Any, index: int) -> None:
        model.finished(execution, [execution.context], index)
        if following is not None:
            model.settle()
            model.begin(execution.context, following)

    def _told_finish_routed(self, model: Model, execution: Any, mask: int) -> None:
        model.routed(execution, set(indices(mask)))

    def _told_fail(self, model: Model, execution: Any, error: BaseException, delay: float | None) -> None:
        model.failed(execution, error, delay, self.now)

    def _told_cancelled(self, model: Model, execution: Any) -> None:
        model.cancelled(execution)

    def _told_returned(self, model: Model, execution: Any) -> None:
        model.returned(execution, execution.retry_at, self.now)

    def _told_wake(self, model: Model) -> None:
        model.time(self.now)
        stalled = [n for n in model.nodes.values() if n.frozen and n.context._outcome == "stalled"]
        if stalled:
            model.settle()
            patience = self.config.worker_idle_times * (self.config.context_queue_timeout or float("inf"))
            if model.moving() or self.now - self.quiet_since < patience - 1e-9:
                raise ModelError(f"{stalled[0].context!r} was given up while something moved (E8)")
            model.stall_frozen()

    def _told_begin_pull(self, model: Model, execution: Any, pull: Any) -> None:
        node, task = model.nodes[pull.context], execution.index
        model.check_pull(node, task, self.config.max_live_contexts)
        model.tell("visit_started", pull.context, 2, self.now - node.asked[task])
        model.pulling.add(execution)
        model.start(node, task, execution)

    def _told_leave_pull(self, model: Model, context: Context) -> None:
        model.tell("visit_finished", context)

    def _told_open_pull(self, model: Model, execution: Any, pull: Any) -> None:
        model.opened(execution)

    def _told_pulled(self, model: Model, execution: Any, pull: Any, items: Any) -> None:
        model.pulled(execution, items, execution.cancelling)

    def _told_pull_ended(self, model: Model, execution: Any, pull: Any) -> None:
        model.pull_ended(execution)

    def _told_abort_pull(self, model: Model, execution: Any, pull: Any) -> None:
        model.pull_broken(execution)

    def _told_service_waits(self, model: Model, execution: Any) -> None:
        self._waits_inside(model, execution, "service")

    def _told_pool_waits(self, model: Model, execution: Any) -> None:
        self._waits_inside(model, execution, "pool")

    def _waits_inside(self, model: Model, execution: Any, kind: str) -> None:
        node = model.nodes[execution.context]
        if node.executions.get(execution.index) is execution:  # it may have timed out meanwhile
            node.inside[execution.index] = kind

    def _told_pool_started(self, model: Model, execution: Any) -> None:
        node = model.nodes[execution.context]
        if node.executions.get(execution.index) is execution:  # it may have timed out meanwhile
            node.inside.pop(execution.index, None)

    def _told_nudge(self, model: Model) -> None:
        """Nothing of its own."""

    def _told_close(self, model: Model) -> None:
        model.end_readable()
        run = self.run
        if run.task_started != model.started:
            raise ModelError(f"{run.task_started} executions were counted, by the rules {model.started}")
        if run.task_executions != model.ended:
            raise ModelError(f"{run.task_executions} executions were counted as ended, by the rules {model.ended}")
        if any(abs(took - due) > 1e-6 for took, due in zip(run.task_seconds, model.seconds, strict=True)):
            raise ModelError(f"executions took {run.task_seconds}, by the rules {model.seconds}")
        if self.book is not None and self.book.running:
            raise ModelError(f"{self.book.running} were told to have started and not to have ended")

    def _told_freeze(self, model: Model, context: Context) -> None:
        model.freeze(context)

    def _told_thaw(self, model: Model, context: Context) -> None:
        model.thaw(context)

    def _told_destroy(self, model: Model, context: Context, caller: Any) -> None:
        model.destroy(context, caller)

    def _told_cancel(self, model: Model, context: Context) -> None:
        model.cancel(context)

    def _told_stop(self, model: Model) -> None:
        model.stop()

    # --- both must agree

    def compare(self, what: str) -> None:
        model, run = self.model, self.run
        assert model is not None
        model.changed, ended = [], model.changed
        living = [n for n in model.nodes.values() if n.living]
        for node in (*ended, *living):
            self._compare_context(node, what)
        ends = [n for n in model.nodes.values() if n.outcome is not None and not n.readable]
        counts = {"entered": len(model.nodes)}
        for node in ends:
            assert node.outcome is not None
            counts[node.outcome] = counts.get(node.outcome, 0) + 1
        found = {name: number for name, number in run.counts.items() if number}
        if found != {name: number for name, number in counts.items() if number}:
            raise ModelError(f"after {what}: the counts are {found}, by the rules {counts}")
        if run.living != len(model.nodes) - len(ends):
            raise ModelError(f"after {what}: {run.living} live, by the rules {len(model.nodes) - len(ends)}")
        self._compare_permits(model, what)
        waiting = [n for n in living if n.arrived is not None]
        pending = [join for _, join in {(n.branch, n.arrived) for n in waiting}]
        if run.at_joins != len(waiting) or sum(run.joins_pending) != len(pending):
            raise ModelError(f"after {what}: {run.at_joins} wait at {run.joins_pending} joins, by the rules {waiting}")
        if any(run.joins_pending[join] != pending.count(join) for join in pending):
            raise ModelError(f"after {what}: {run.joins_pending} joins are pending, by the rules {pending}")
        if self.book is not None:
            if run.facts.failures:
                raise ModelError(f"after {what}: an observer raised")
            self.book.compare(model, what, run.facts)
            for node in model.nodes.values():
                if node.living or node.readable:
                    self._note_state(self.book, node)
        else:
            model.facts.clear()

    def _note_state(self, book: Told, node: Node) -> None:
        """Since when it is in its state, for what is told when it leaves that."""
        state = STATES[node.context._state]
        known = book.states.get(node.context)
        if known is None or known[0] != state:
            book.states[node.context] = (state, self.now)

    def _compare_permits(self, model: Model, what: str) -> None:
        for limit, holders in model.held.items():
            in_use = self.run.runtime.limits.in_use(limit)
            if in_use != len(holders):
                raise ModelError(f"after {what}: {in_use} permits of {limit!r} are out, by the rules {holders}")
        if self.run.waiting_limits != len(model.line):
            raise ModelError(f"after {what}: {self.run.waiting_limits} wait in line, by the rules {model.line}")

    def _compare_context(self, node: Node, what: str) -> None:
        context, model = node.context, self.model
        assert model is not None
        outcome = context._outcome
        if context._state == _DISCARDED and outcome is None:
            outcome = context._more.pending_end
        if outcome != node.outcome:
            raise ModelError(f"after {what}: {context!r} is {outcome or 'living'}, by the rules {node.outcome}")
        running = set(indices(context._running))
        if running != set(node.executions):
            raise ModelError(f"after {what}: on {context!r} {running} run, by the rules {set(node.executions)}")
        if not node.living:
            return
        done = set(indices(context._done))
        expected = node.completed | model.skipped(node) | {0}
        if done != expected:
            raise ModelError(f"after {what}: {context!r} has done {done}, by the rules {expected}")
        ready = model.ready(node)
        if set(indices(context._ready)) != ready:
            raise ModelError(f"after {what}: on {context!r} {set(indices(context._ready))} is ready, not {ready}")
        if (context in self.run._freezes) != node.frozen:
            raise ModelError(f"after {what}: {context!r} is frozen or not, against the rules")
        state = model.state(node)
        if STATES[context._state] not in (state, "room_wait" if node.sources else state):
            raise ModelError(f"after {what}: {context!r} is counted as {STATES[context._state]}, by the rules {state}")
        place = VISITED if node.visited else QUEUED if node.stamp and not node.frozen else IDLE
        if context._place != place and not node.frozen:
            raise ModelError(f"after {what}: {context!r} has place {context._place}, by the rules {place}")
