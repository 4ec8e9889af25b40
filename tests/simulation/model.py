"""A second, slow, obviously right model of SEMANTICS.md, written from its text and from nothing else.

Everything is sets, worked out anew from first principles whenever it is asked for: no masks, no counters that could
drift, no short cuts. The model is told what the shell tells the core (which context was taken, what a function
returned) and says what must be true afterwards: what is completed, skipped, ready, waiting, held, ended. It never
decides what the schedule decides. Rules are named where they are carried out.

Tasks are numbers: 0 is the source, then the tasks in order of addition, then the sink.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from obsdag.errors import ExecutionTimeout

__all__ = ["Branch", "Graph", "Model", "ModelError", "Node"]

SUCCESS_BELOW = ("output", "split")


class ModelError(AssertionError):
    """The engine did what the rules forbid, or did not do what they demand."""


@dataclass
class Graph:
    """A DAG as sets. shapes: what each task is. priorities, limits, on_child_failure: by task."""

    ups: list[set[int]]
    shapes: list[str]
    priorities: list[int]
    limits: list[list[Any]]
    skips_failed: set[int] = field(default_factory=set)
    pass_through: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        count = len(self.ups)
        self.source, self.sink = 0, count - 1
        self.downs: list[set[int]] = [{t for t in range(count) if u in self.ups[t]} for u in range(count)]
        self.anc = [self._reach(t, self.ups) for t in range(count)]
        self.desc = [self._reach(t, self.downs) for t in range(count)]
        self.joins = {t for t in range(count) if self.shapes[t] == "join"}

    def _reach(self, start: int, near: list[set[int]]) -> set[int]:
        found: set[int] = set()
        pending = list(near[start])
        while pending:
            task = pending.pop()
            if task not in found:
                found.add(task)
                pending.extend(near[task])
        return found

    def bypass(self, task: int) -> set[int]:
        """G4."""
        return set(range(len(self.ups))) - self.desc[task] - self.anc[task] - {task}

    def join_below(self, task: int) -> int | None:
        """The first join below that is not the join of another map in between (T15), along every path."""
        depth = {task: 1}
        for each in range(task + 1, len(self.ups)):
            above = [depth[u] for u in self.ups[each] if u in depth]
            if not above:
                continue
            here = max(above)
            if each in self.joins:
                if here == 1:
                    return each
                here -= 1
            depth[each] = here + (self.shapes[each] == "map")
        return None


@dataclass(eq=False)
class Branch:
    """What a context lent to children at a task (C5)."""

    parent: Node
    task: int
    children: list[Node] = field(default_factory=list)
    open: bool = False  # its map has not ended
    mapped: bool = False
    joining: int | None = None
    closed: bool = False  # handed back
    first_arrival: float = 0.0


@dataclass(eq=False)
class Node:
    """What the rules know of one context."""

    context: Any
    parent: Node | None
    number: int
    completed: set[int]
    choices: dict[int, set[int]] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)  # skipped on its maker, by routers above
    children: list[Node] = field(default_factory=list)
    executions: dict[int, Any] = field(default_factory=dict)
    waiting: dict[int, float | None] = field(default_factory=dict)  # task -> when it is due; None: not known
    reserved: set[int] = field(default_factory=set)
    branches: dict[int, Branch] = field(default_factory=dict)
    branch: Branch | None = None
    sources: dict[int, int] = field(default_factory=dict)  # open loops and maps -> items so far
    maps: dict[int, Branch] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    frozen: bool = False
    arrived: int | None = None
    outcome: str | None = None
    readable: bool = False  # ended, but counted as living until the run ends (E11)
    visited: bool = False
    lane: int | None = None
    stamp: int = 0
    failed_by: Any = None
    destroyed: bool = False
    left_branch: bool = False
    queued_at: float | None = None  # since when it has been in the queue and nothing of it was running
    waits: dict[int, str] = field(default_factory=dict)  # of those in `waiting`: "limit" or "retry"
    inside: dict[int, str] = field(default_factory=dict)  # executions that wait for a "pool" or a "service"
    begun: dict[int, float] = field(default_factory=dict)  # task -> when its execution began
    asked: dict[int, float] = field(default_factory=dict)  # open loops and maps -> since when the next item is wanted
    reason: str = ""  # why it was garbage-collected

    @property
    def living(self) -> bool:
        return self.outcome is None


class Request:
    """A wish for permits of all `limits` of a task (T7)."""

    def __init__(self, node: Node, task: int, limits: list[Any], asked_at: float) -> None:
        self.node, self.task, self.limits, self.asked_at = node, task, limits, asked_at


class Model:
    """The rules, applied to what happens."""

    def __init__(self, graph: Graph, gc: bool = True, bypass: bool = True) -> None:
        self.graph = graph
        self.gc, self.bypass = gc, bypass
        self.nodes: dict[Any, Node] = {}
        self.changed: list[Node] = []  # ended since somebody looked
        self._due: dict[Node, set[int]] = {}  # worked out since the last change
        self.transition = 0
        self.capacity: dict[Any, int] = {}
        self.held: dict[Any, list[Any]] = {}
        self.line: list[Request] = []
        self.started = [0] * len(graph.ups)
        self.ended = [0] * len(graph.ups)
        self.seconds = [0.0] * len(graph.ups)
        self.now = 0.0
        self.facts: list[tuple[Any, ...]] = []  # what is to be told, since somebody looked
        self.pulling: set[Any] = set()  # executions that ask an open loop or map for an item: each has room reserved
        self.grants: dict[Any, list[Any]] = {}  # execution -> limits
        for limits in graph.limits:
            for limit in limits:
                self.capacity.setdefault(limit, getattr(limit, "n", 0) or len(getattr(limit, "items", ())) or 10**9)
                self.held.setdefault(limit, [])

    def tell(self, *fact: Any) -> None:
        """What every observer is to hear of this transition."""
        self.facts.append(fact)

    # --- what a context's progress is (C4)

    def dead(self, node: Node, skipped: set[int], above: int, below: int) -> bool:
        return (
            above in skipped or above in node.left_out or (above in node.choices and below not in node.choices[above])
        )

    def skipped(self, node: Node) -> set[int]:
        """A task whose every in-edge is dead is skipped."""
        found: set[int] = set()
        if node.choices or node.left_out:
            for task in range(1, len(self.graph.ups)):
                ups = self.graph.ups[task]
                if task not in node.completed and all(self.dead(node, found, up, task) for up in ups):
                    found.add(task)
        return found

    def lent(self, node: Node) -> set[int]:
        """What is below a lent branch's task is not ready on the context itself (C5), except the join that fires."""
        tasks: set[int] = set()
        firing = {branch.joining for branch in node.branches.values()}
        for branch in node.branches.values():
            tasks |= self.graph.desc[branch.task]
        return tasks - firing

    def due(self, node: Node) -> set[int]:
        """Every task whose turn has come by C4, joins of a lent branch and the sink included."""
        found = self._due.get(node)
        if found is None:
            found = self._due[node] = self._find_due(node)
        return found

    def _find_due(self, node: Node) -> set[int]:
        skipped, lent = self.skipped(node), self.lent(node)
        done = node.completed | skipped
        firing = {branch.joining for branch in node.branches.values()}
        found = set()
        for task in range(1, len(self.graph.ups)):
            busy = task in node.executions or task in node.waiting or task in node.sources or task in node.kept
            if busy or task in lent or (task in done and task not in firing):
                continue
            live = [up for up in self.graph.ups[task] if not self.dead(node, skipped, up, task)]
            if task in firing or all(up in node.completed for up in live):
                found.add(task)
        return found

    def awaited_join(self, node: Node) -> int | None:
        """The join of its branch that is ready on a child: there it waits for the others (T15)."""
        if node.branch is None:
            return None
        joins = self.due(node) & self.graph.joins & self.graph.desc[node.branch.task]
        firing = {branch.joining for branch in node.branches.values()}
        return min(joins - firing, default=None)

    def joinable(self, node: Node) -> bool:
        """Whether somebody waits for the child at a join: its branch was not handed back, its parent lives."""
        return node.branch is not None and not node.branch.closed and node.branch.parent.living

    def ready(self, node: Node) -> set[int]:
        """What may start now on the context."""
        if not node.living:
            return set()
        found = self.due(node)
        if node.branch is not None:
            firing = {branch.joining for branch in node.branches.values()}
            found = found - ((self.graph.joins & self.graph.desc[node.branch.task]) - firing)
        return found

    # --- holds (C6)

    def descendants(self, node: Node) -> list[Node]:
        found = list(node.children)
        for each in found:
            found.extend(each.children)
        return found

    def held_by(self, node: Node) -> str:
        """What holds a living context; empty if nothing does."""
        if node.visited:
            return "a worker"
        if self.ready(node):
            return "a place in the queue"
        if node.executions:
            return "an execution"
        if node.waiting:
            return "a timer or a limit"
        if node.frozen:
            return "a freeze"
        if node.sources:
            return "an open loop or map"
        for each in self.descendants(node):
            if each.executions:
                return "an execution of a descendant"
            if each.living and each.arrived is None:
                return "a living child"
        return ""

    def state(self, node: Node) -> str:
        """Where a living context is: the first that applies, in the order of the enumeration of states."""
        waits = {node.waits[task] for task in node.waiting}
        if set(node.executions) - set(node.inside):
            return "running"
        if "pool" in node.inside.values():
            return "pool_wait"
        if node.stamp and not node.frozen:
            return "queued"
        if node.visited:
            return "running"
        for kind, found in (("service", node.inside.values()), ("limit", waits), ("retry", waits)):
            if kind in found:
                return f"{kind}_wait"
        open_sources = set(node.sources) - set(node.executions)  # or "room_wait", which only a worker finds out
        if self.awaited_join(node) is not None:
            return "join_wait"
        if node.branches:
            return "lent"
        if open_sources:
            return "source_wait"
        return "frozen" if node.frozen else "lent"

    # --- entering and ending

    def orphaned(self, parent: Node | None) -> bool:
        """New contexts whose ancestor failed, was cancelled or destroyed are ignored (C12)."""
        while parent is not None:
            if parent.outcome in ("failed", "cancelled") or parent.destroyed:
                return True
            parent = parent.parent
        return False

    def enter(self, context: Any, completed: set[int], maker: Any = None) -> Node:
        parent = self.nodes.get(context.parent) if context.parent is not None else None
        node = Node(context, parent, len(self.nodes), completed)
        node.frozen = context._frozen
        self.nodes[context] = node
        kind = "input" if maker is None else "made" if context.parent is None else "child"
        self.tell("context_entered", context, kind, maker and (maker.context, maker.index))
        if parent is not None:
            parent.children.append(node)
        node.lane = 1
        return node

    def enter_made(self, context: Any, maker: Node, task: int, execution: Any) -> Node:
        """E12."""
        above = {task} | self.graph.anc[task]
        if self.bypass:
            bypassed = self.graph.bypass(task)
            if bypassed:
                self.tell("tasks_bypassed", context, len(bypassed))
            return self.enter(context, above | bypassed, execution)
        node = self.enter(context, above | {0}, execution)
        node.choices = {router: set(chosen) for router, chosen in maker.choices.items() if router in above}
        node.left_out = maker.left_out & above
        node.left_out |= {t for t in self.skipped(maker) if self._left_out_above(maker, t, above)}
        return node

    def _left_out_above(self, maker: Node, task: int, above: set[int]) -> bool:
        """Whether it is skipped on the maker whatever the routers that are not in `above` choose."""
        chosen, left_out = maker.choices, maker.left_out
        maker.choices = {router: into for router, into in chosen.items() if router in above}
        maker.left_out = left_out & above
        try:
            return task in self.skipped(maker)
        finally:
            maker.choices, maker.left_out = chosen, left_out

    def end(self, node: Node, outcome: str, readable: bool = False) -> None:
        """One outcome; what it waited for and had reserved is given back; its executions are cancelled."""
        if node.outcome is not None:
            raise ModelError(f"{node.context!r} ended twice")
        node.outcome = outcome
        if outcome == "stalled":
            self.tell("context_stalled", node.context)
        if readable:
            self.tell("context_changed", node.context)
        else:
            self.tell("context_finished", node.context, outcome)
        self.changed.append(node)
        node.waiting.clear()
        node.sources.clear()
        node.kept.clear()
        node.arrived = None
        node.frozen = False
        self.line = [request for request in self.line if request.node is not node]
        for task in node.reserved:
            for limit in self.graph.limits[task]:
                self.held[limit].remove((node, task))
        node.reserved.clear()

    def collect(self, node: Node, outcome: str, reason: str, task: int | None = None) -> None:
        """Ends by garbage collection; without it, stays readable until the run ends (E11)."""
        node.reason = reason
        if self.gc:
            self.tell("context_destroyed", node.context, reason, task)
        self.end(node, outcome, readable=not self.gc)
        node.readable = not self.gc

    def end_readable(self) -> None:
        """At the end of the run."""
        for node in self.nodes.values():
            if node.readable:
                node.readable = False
                self.tell("context_destroyed", node.context, node.reason, None)
                self.tell("context_finished", node.context, node.outcome)

    def end_below(self, node: Node) -> None:
        """Living descendants end cancelled (C8)."""
        for each in self.descendants(node):
            if each.living:
                self.tell("context_destroyed", each.context, "cascade", None)
                self.end(each, "cancelled")

    def stop_branches(self, node: Node) -> None:
        """T3, C10: its other branches are stopped."""
        for branch in node.branches.values():
            for child in branch.children:
                if child.living and not child.left_branch:
                    self.end(child, "cancelled")
                    self.end_below(child)

    def fail(self, node: Node, error: Any, task: int, attempts: int = 1) -> None:
        node.failed_by = error
        self.tell("context_failed", node.context, task, attempts)
        self.end(node, "failed")
        self.end_below(node)

    # --- settling, after each transition

    def settle(self) -> None:
        """What follows of itself: outputs, arrivals, joins, lost last holds, permits; until nothing changes."""
        self.changes()
        while self._outputs() or self._joins() or self._last_holds() or self._permits():
            self.changes()
        self.transition += 1
        for node in self.nodes.values():
            if node.living:
                startable = bool(self.ready(node)) and not node.frozen and not node.visited
                if startable and not node.stamp:
                    node.stamp = self.transition
                    node.lane = 1 if node.lane == 1 else 0
                    self.tell("context_queued", node.context, node.lane)
                elif not self.ready(node) or node.visited or node.frozen:
                    node.stamp = 0
                if not node.stamp:
                    node.lane = None
                if self.state(node) != "queued":
                    node.queued_at = None
                elif node.queued_at is None:
                    node.queued_at = self.now
            else:
                node.stamp = 0

    def changes(self) -> None:
        """Something has changed or is about to: what was worked out is worth nothing."""
        self._due.clear()

    def _outputs(self) -> bool:
        for node in self._living():
            if self.graph.sink in self.due(node):
                self.end(node, "output")
                return True
        return False

    def _living(self) -> list[Node]:
        return [node for node in reversed(self.nodes.values()) if node.living]

    def _joins(self) -> bool:
        """Fires the joins that have all that they wait for (T15)."""
        for node in self._living():
            for join in sorted({self._join_of(branch) for branch in node.branches.values()} - {None}):  # type: ignore[type-var]
                if self._try_join(node, join):
                    return True
        return False

    def _join_of(self, branch: Branch) -> int | None:
        """Where all living children of a branch wait; with none living and none gone elsewhere, the branch's own."""
        if branch.open or branch.joining is not None:
            return None
        living = [child for child in branch.children if child.living and not child.left_branch]
        if living:
            where = {child.arrived for child in living}
            return where.pop() if len(where) == 1 else None
        if any(child.outcome in SUCCESS_BELOW for child in branch.children if not child.left_branch):
            return None
        return self.graph.join_below(branch.task)

    def _try_join(self, parent: Node, join: int) -> bool:
        branches = [branch for branch in parent.branches.values() if join in self.graph.desc[branch.task]]
        if any(branch.joining is not None for branch in branches):
            return False
        meeting = [branch for branch in branches if self._join_of(branch) == join]
        for branch in branches:
            if branch in meeting:
                continue
            over = not branch.open and not any(c.living and not c.left_branch for c in branch.children)
            if not over or self._join_of(branch) is not None:
                return False  # one of the branches that meet here is not there yet
        inside = {branch.task for branch in meeting}.union(*(self.graph.desc[branch.task] for branch in meeting))
        done = parent.completed | self.skipped(parent)
        if not all(above in done for above in self.graph.anc[join] - inside - {0}):
            return False
        failed = [c for b in meeting for c in b.children if c.outcome == "failed" and not c.left_branch]
        if failed and join not in self.graph.skips_failed:
            self.fail(parent, failed[0].failed_by, join)
            return True
        arrived = [c for b in meeting for c in b.children if c.arrived == join and not c.left_branch]
        first = min((b.first_arrival for b in meeting if any(c in arrived for c in b.children)), default=self.now)
        self.tell("join_released", parent.context, join, len(arrived), self.now - first)
        for branch in meeting:
            branch.joining = join
        return True

    def _last_holds(self) -> bool:
        for node in self._living():
            if node.arrived is not None and not self.joinable(node):
                node.arrived = None
            if node.arrived is None and not self.held_by(node):
                self._lost(node)
                return True
        return False

    def _lost(self, node: Node) -> None:
        """The last hold is lost (C6)."""
        join = self.awaited_join(node)
        children = [c for branch in node.branches.values() for c in branch.children if c.living and not c.left_branch]
        if join is not None and self.joinable(node) and not children:
            assert node.branch is not None
            if not any(c.arrived is not None for c in node.branch.children if not c.left_branch):
                node.branch.first_arrival = self.now
            node.arrived = join
            self.tell("join_waiting", node.context, join)
            return
        if not node.branches:
            self.end(node, "stalled")
            return
        if children:  # they wait at a join that can never fire (E8)
            self.end(node, "stalled")
            for child in children:
                self.end(child, "stalled")
            return
        ended = [(c, branch) for branch in node.branches.values() for c in branch.children if not c.left_branch]
        outcomes = {c.outcome for c, _ in ended}
        if outcomes & set(SUCCESS_BELOW):
            self.collect(node, "split", "spread")
        elif "failed" in outcomes:
            child, branch = next((c, branch) for c, branch in ended if c.outcome == "failed")
            self.fail(node, child.failed_by, branch.task)
        elif "stalled" in outcomes:
            self.end(node, "stalled")
        else:
            self.collect(node, "dropped", "emptied")

    # --- limits (T7)

    def _permits(self) -> bool:
        """In order of asking, all together or not at all."""
        first: set[Any] = set()
        for request in self.line:
            free = all(len(self.held[limit]) < self.capacity[limit] for limit in request.limits)
            if free and not any(limit in first for limit in request.limits):
                self.line.remove(request)
                request.node.waiting.pop(request.task, None)
                self.tell("limit_granted", request.node.context, request.task, self.now - request.asked_at)
                if not request.node.frozen:  # which asks again when it is thawed
                    self._grant(request.node, request.task)
                return True
            first.update(request.limits)
        return False

    def _grant(self, node: Node, task: int) -> None:
        node.reserved.add(task)
        for limit in self.graph.limits[task]:
            self.held[limit].append((node, task))

    def _ask(self, node: Node, task: int) -> bool:
        limits = self.graph.limits[task]
        if not limits or task in node.reserved:
            return True
        waited_for = {limit for request in self.line for limit in request.limits}
        if any(limit in waited_for or len(self.held[limit]) >= self.capacity[limit] for limit in limits):
            self.line.append(Request(node, task, limits, self.now))
            node.waiting[task], node.waits[task] = None, "limit"
            self.tell("limit_deferred", node.context, task)
            return False
        self._grant(node, task)
        return True

    def give_back(self, execution: Any) -> None:
        """T8."""
        for limit in self.grants.pop(execution, ()):
            self.held[limit].remove(execution)

    # --- what the shell tells

    def accept(self, context: Any, visited: bool) -> None:
        node = self.enter(context, {0})
        node.visited = visited
        if visited:
            node.lane = None
            self.tell("visit_started", context, 1, 0.0)

    def take(self, context: Any) -> None:
        """E4: continuing contexts last in first out, then new ones first in first out."""
        node = self.nodes[context]
        queued = [n for n in self.nodes.values() if n.stamp and not n.frozen]
        if node not in queued:
            raise ModelError(f"{context!r} was taken and has no place in the queue")
        going_on = [n for n in queued if n.lane == 0]
        if node.lane != 0 and going_on:
            raise ModelError(f"the new {context!r} was taken before {going_on[0].context!r}, which goes on (E4)")
        if node.lane == 0 and node.stamp < max(n.stamp for n in going_on):
            raise ModelError(f"{context!r} was taken before one that went on later (E4: last in, first out)")
        if node.lane != 0 and (node.stamp, node.number) > min((n.stamp, n.number) for n in queued):
            raise ModelError(f"{context!r} was taken before one that entered earlier (E4: first in, first out)")
        since = self.now if node.queued_at is None else node.queued_at
        self.tell("visit_started", context, node.lane, self.now - since)
        node.visited = True
        node.lane = None

    def begin(self, context: Any, execution: Any) -> None:
        """The next ready task, by priority; limits and freezes hold back (T6, T7, C7)."""
        node = self.nodes[context]
        expected = None
        if not node.frozen and node.living:
            for task in sorted(self.ready(node), key=lambda t: (-self.graph.priorities[t], t)):
                if self._ask(node, task):
                    expected = task
                    break
        found = None if execution is None else execution.index
        if found != expected:
            raise ModelError(f"{context!r}: task {found} was begun, and it is {expected}'s turn")
        if expected is not None:
            self.start(node, expected, execution)

    def start(self, node: Node, task: int, execution: Any) -> None:
        node.executions[task] = execution
        node.begun[task] = self.now
        self.started[task] += 1
        if task in node.reserved:
            node.reserved.discard(task)
            self.grants[execution] = self.graph.limits[task]
            for limit in self.graph.limits[task]:
                self.held[limit][self.held[limit].index((node, task))] = execution

    def leave(self, context: Any) -> None:
        self.nodes[context].visited = False
        self.nodes[context].lane = None
        self.tell("visit_finished", context)

    def execution_ends(
        self, execution: Any, task: int | None = None, outcome: str = "success", error: Any = None
    ) -> Node:
        """Each execution ends once, is counted and told with what it took (T8)."""
        node = self.nodes[execution.context]
        index = execution.index if task is None else task
        self.tell("execution_finished", execution, outcome, error)
        self.ended[index] += 1
        self.seconds[index] += self.now - node.begun.get(index, self.now)
        node.inside.pop(index, None)
        if node.executions.pop(execution.index if task is None else task, None) is not execution:
            raise ModelError(f"{execution!r} ended and did not run")
        if not execution.abandoned:
            self.give_back(execution)
        return node

    def cancelled(self, execution: Any) -> None:
        self.execution_ends(execution, outcome="cancelled")

    def failed(self, execution: Any, error: Any, delay: float | None, now: float) -> None:
        """E6; T13: a retry of what was abandoned starts only when it has really returned."""
        timed_out = isinstance(error, ExecutionTimeout)
        node = self.execution_ends(execution, outcome="timeout" if timed_out else "error", error=error)
        if not node.living or execution.cancelling:
            return
        if delay is None:
            self.fail(node, error, execution.index, execution.attempt)
            return
        self.tell("retry_scheduled", execution, error, delay)
        node.waits[execution.index] = "retry"
        if execution.abandoned:
            node.waiting[execution.index] = None
        elif delay > 0:
            node.waiting[execution.index] = now + delay

    def returned(self, execution: Any, retry_at: float | None, now: float) -> None:
        """An abandoned execution has come back (T13)."""
        self.give_back(execution)
        node = self.nodes[execution.context]
        if retry_at is not None and node.living and execution.index in node.waiting:
            del node.waiting[execution.index]
            if retry_at > now:
                node.waiting[execution.index] = retry_at

    def time(self, now: float) -> None:
        """Timers that are due."""
        for node in self.nodes.values():
            for task, due in list(node.waiting.items()):
                if due is not None and due <= now:
                    del node.waiting[task]

    def moving(self) -> bool:
        """Whether anything but frozen contexts can go on (E8)."""
        for node in self.nodes.values():
            if node.executions or node.waiting:
                return True
            if node.living and not node.frozen and (self.ready(node) or node.visited):
                return True
        return False

    def stall_frozen(self) -> None:
        """E8."""
        for node in list(self.nodes.values()):
            if node.living and node.frozen:
                self.end(node, "stalled")

    def routed(self, execution: Any, chosen: set[int]) -> None:
        """T9."""
        node = self.execution_ends(execution)
        if not node.living:
            return
        if not chosen:
            self.drop(node, execution.index)
        else:
            node.completed.add(execution.index)
            node.choices[execution.index] = set(chosen)

    def drop(self, node: Node, task: int) -> None:
        """T3: dropping is whole. `task` is the one that did it."""
        self.stop_branches(node)
        self.collect(node, "dropped", "discarded", task)
        if task not in self.graph.pass_through:
            self.tell("context_dropped", node.context, task)

    def finished(self, execution: Any, result: Iterable[Any], task: int | None = None) -> None:
        """T1, T3, C5. `result`: the contexts that were returned, in order, each once."""
        node = self.execution_ends(execution, task)
        if execution.cancelling:
            return
        task = execution.index if task is None else task
        returned = [each for each in result if not self._ignored(each)]
        if task in self.graph.joins:
            self._joined(node, task, returned)
        own = node.context in returned
        lent = made = False
        handed = any(self._handed_back_before(each, node, task) for each in result)
        for context in returned:
            if context is node.context:
                continue
            other = self.nodes.get(context)
            made = True
            if other is not None:
                handed |= self._completed_for(other, node, task)
                continue
            new = self.enter_made(context, node, task, execution)
            if new.parent is node and node.living and not own:
                self.lend(node, task, new)
                lent = True
        if not node.living:
            return
        if own:
            node.kept.discard(task)
            node.completed.add(task)
        elif lent:
            pass
        elif node.frozen:
            node.kept.add(task)
        elif handed:
            self.stop_branches(node)
            self.end(node, "merged")
        elif made:
            self.stop_branches(node)
            self.collect(node, "split", "replaced", task)
        else:
            self.drop(node, task)

    def _handed_back_before(self, context: Any, node: Node, task: int) -> bool:
        """C5 for all children but the first that hand a branch back, when the parent has gone on and ended since."""
        other = self.nodes.get(context)
        if other is None or other.living or task not in other.completed:
            return False
        child = node
        while child.parent is not None and child.parent is not other:
            child = child.parent
        return child.parent is other and child.branch is not None

    def _ignored(self, context: Any) -> bool:
        """Ended ones, and new ones whose ancestor failed, was cancelled or destroyed (C12)."""
        node = self.nodes.get(context)
        if node is not None:
            return not node.living
        parent = self.nodes.get(context.parent) if context.parent is not None else None
        ended_before = context.outcome is not None and context._run is None  # it may have entered and ended just now
        return ended_before or self.orphaned(parent)

    def lend(self, parent: Node, task: int, child: Node) -> None:
        branch = self.branch_at(parent, task)
        branch.children.append(child)
        child.branch = branch

    def branch_at(self, parent: Node, task: int) -> Branch:
        parent.completed.add(task)  # S is done
        if task not in parent.branches:  # what was lent keeps no permit from the children
            firing = {branch.joining for branch in parent.branches.values()}
            for below in self.graph.desc[task] - firing:
                if below in parent.reserved or any((r.node, r.task) == (parent, below) for r in self.line):
                    self._unask(parent, below)
        return parent.branches.setdefault(task, Branch(parent, task))

    def _completed_for(self, other: Node, node: Node, task: int) -> bool:
        """T1: the task is completed for each returned context; C5: for an ancestor that lent, the branch is handed
        back.
        """
        self.tell("context_changed", other.context)
        child = node
        while child.parent is not None and child.parent is not other:
            child = child.parent
        below = child.parent is other
        branch = child.branch if below else None
        if other.kept:
            other.completed |= other.kept
            other.kept.clear()
            other.frozen = False
        if branch is not None and other.branches.get(branch.task) is branch:
            self.hand_back(other, branch, task)
            return True
        if other.branch is not None and self.awaited_join(other) == task:
            other.left_branch, other.branch = True, None
        other.arrived = None
        firing = {each.joining for each in other.branches.values()}  # a join that is called all the same
        if task not in firing and task not in self.skipped(other):
            other.completed.add(task)
            self._unask(other, task)
        return below

    def _unask(self, node: Node, task: int) -> None:
        """A completed task waits for nothing any more (C4)."""
        if task in node.waiting:
            del node.waiting[task]
            self.line = [each for each in self.line if (each.node, each.task) != (node, task)]
        if task in node.reserved:
            node.reserved.discard(task)
            for limit in self.graph.limits[task]:
                self.held[limit].remove((node, task))

    def hand_back(self, parent: Node, branch: Branch, task: int, returned: bool = True) -> None:
        """C5: S, M and the tasks between them are completed for the parent; M if that was returned (T1)."""
        del parent.branches[branch.task]
        branch.closed = True
        between = self.graph.desc[branch.task] & self.graph.anc[task]
        firing = {each.joining for each in parent.branches.values()}  # a join is called all the same
        but = self.skipped(parent) | firing
        parent.completed |= (between - but) | {branch.task}
        if returned and task not in but:
            parent.completed.add(task)
            self._unask(parent, task)

    def _joined(self, parent: Node, join: int, returned: list[Any]) -> None:
        """T15: the children are merged, except those that the join returned."""
        for branch in [each for each in parent.branches.values() if each.joining == join]:
            for child in branch.children:
                if child.left_branch:
                    continue
                if child.living and child.context not in returned:
                    self.end(child, "merged")
                elif child.living:
                    child.arrived, child.branch, child.left_branch = None, None, True
            if parent.living:
                self.hand_back(parent, branch, join, parent.context in returned)

    def rate_limited(self, execution: Any, due: float) -> None:
        """C10: a timer, and no attempt."""
        node = self.execution_ends(execution)
        if node.living and not execution.cancelling:
            node.waiting[execution.index], node.waits[execution.index] = due, "limit"
            self.tell("limit_deferred", node.context, execution.index)

    def output(self, execution: Any) -> None:
        """C10: the context ends as output at once, its other branches are stopped."""
        node = self.execution_ends(execution)
        if node.living and not execution.cancelling:
            if execution.index in self.graph.joins:
                self._joined(node, execution.index, [])
            self.stop_branches(node)
            self.end(node, "output")

    def freeze(self, context: Any) -> None:
        node = self.nodes[context]
        if node.living:
            if not node.frozen:
                self.tell("context_changed", context)
            node.frozen = True
            for task in node.reserved:  # it keeps no permit from others
                for limit in self.graph.limits[task]:
                    self.held[limit].remove((node, task))
            node.reserved.clear()

    def thaw(self, context: Any) -> None:
        node = self.nodes[context]
        if node.living and node.frozen:
            self.tell("context_changed", context)
            node.frozen = False
            if node.kept:
                self.drop(node, min(node.kept))

    def destroy(self, context: Any, caller: Any) -> None:
        node = self.nodes[context]
        if node.living:
            node.destroyed = True
            self.tell("context_destroyed", context, "destroyed", caller and caller.index)
            self.end(node, "dropped")
            self.end_below(node)

    def cancel(self, context: Any) -> None:
        node = self.nodes[context]
        if node.living:
            self.end(node, "cancelled")
            self.end_below(node)

    # --- loops and maps (T14, T15)

    def opened(self, execution: Any) -> None:
        task, node = execution.index, self.nodes[execution.context]
        self.pulling.add(execution)
        node.sources[task] = 0
        if self.graph.shapes[task] == "map":
            branch = node.maps[task] = self.branch_at(node, task)
            branch.open = branch.mapped = True

    def pulled(self, execution: Any, items: Iterable[Any], closed: bool) -> None:
        node = self.execution_ends(execution)
        task = execution.index
        self.pulling.discard(execution)
        if closed or not node.living:
            return
        node.asked[task] = self.now
        for context in items:
            self.tell("loop_item", context, execution.task.id)
            node.sources[task] += 1
            other = self.nodes.get(context)
            if context is node.context:
                node.completed.add(task)
            elif other is not None:
                if other.living:
                    self._completed_for(other, node, task)
            elif not self._ignored(context):
                new = self.enter_made(context, node, task, execution)
                branch = node.maps.get(task)
                if branch is not None and new.parent is node:
                    branch.children.append(new)
                    new.branch = branch

    def pull_ended(self, execution: Any) -> None:
        node = self.execution_ends(execution)
        task = execution.index
        self.pulling.discard(execution)
        if not node.living:
            return
        items = node.sources.pop(task)
        if self.graph.shapes[task] == "map":
            node.maps[task].open = False
        elif task not in node.completed:
            self.stop_branches(node)
            self.collect(node, *(("split", "replaced", task) if items else ("dropped", "emptied")))

    def pull_broken(self, execution: Any) -> None:
        """A map that has no child yet is as if it had not begun (T14)."""
        node = self.nodes[execution.context]
        self.pulling.discard(execution)
        items = node.sources.pop(execution.index, None)
        if items == 0 and self.graph.shapes[execution.index] == "map":
            del node.branches[execution.index]
            node.completed.discard(execution.index)

    # --- room (E16)

    def taken(self) -> int:
        """Contexts that wait at a join take no room; each item that is being made has its room reserved."""
        return sum(node.living and node.arrived is None for node in self.nodes.values()) + len(self.pulling)

    def waiting_sources(self) -> list[tuple[Node, int]]:
        """Open loops and maps whose next item may be asked for."""
        return [
            (node, task)
            for node in self.nodes.values()
            for task in node.sources
            if node.living and not node.frozen and task not in node.executions and task not in node.waiting
        ]

    def check_pull(self, node: Node, task: int, room: int) -> None:
        """There is room for an item, or nothing else goes on and it is the deepest that waits."""
        waiting = self.waiting_sources()
        if (node, task) not in waiting:
            raise ModelError(f"{node.context!r} was asked for an item of task {task} and is not open for it")
        if self.taken() >= room:
            going = [n.context for n in self.nodes.values() if n.executions or n.waiting or (n.stamp and not n.frozen)]
            deepest = max(each.context.depth for each, _ in waiting)
            if going or node.context.depth < deepest:
                raise ModelError(f"an item of {node.context!r} was let in beside {self.taken()} others; {going} go on")

    def check_no_pull(self, room: int) -> None:
        """A worker found nothing to do, the queue being empty."""
        waiting = self.waiting_sources()
        if waiting and self.taken() < room:
            raise ModelError(f"there is room beside {self.taken()}, and {waiting[0][0].context!r} was not asked")

    def stop(self) -> None:
        """E9."""
        self.end_readable()
        for node in list(self.nodes.values()):
            if node.living:
                self.end(node, "cancelled")
