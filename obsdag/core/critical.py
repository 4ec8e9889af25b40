"""The critical path of a finished root, and the slack of every execution on the way.

The critical path method (Kelley and Walker, "Critical-Path Planning and Scheduling", 1959) over what really happened:
an execution depends on the executions that had to end before it could be ready. The chain that decided the root's
duration is walked backwards through `released_by`: each execution was released by the last of its upstreams. The slack
of an execution is how much later it could have ended without delaying the root: the least, over what depends on it, of
that one's slack plus the time between this end and the moment at which the dependent became ready.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from obsdag.core.records import CriticalStep, Execution

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.plan import Plan

__all__ = ["critical_executions", "critical_path"]


def critical_path(plan: Plan, root: Context) -> list[CriticalStep]:
    """Every recorded execution of `root` and its descendants, in order of start, with slack in seconds."""
    executions = list(root._run.records.get(root, ()) if root._run is not None else ())
    chain = {id(execution): execution for execution in _chain(root)}
    known = {id(execution) for execution in executions}
    executions += [execution for key, execution in chain.items() if key not in known and execution.outcome is not None]
    executions = [execution for execution in executions if _belongs(execution, root)]
    if not executions:
        return []
    slack = _slack(plan, executions, root._since, set(chain))
    steps = [
        CriticalStep(e.task.id, e.context.id, e.started, e.ended, slack[id(e)], id(e) in chain)
        for e in sorted(executions, key=lambda each: (each.started, each.ended))
    ]
    return steps


def critical_executions(root: Context) -> Iterator[Execution]:
    """The executions on the critical path of a finished root, the last one first: without slack, for a fraction of
    the cost.
    """
    return (each for each in _chain(root) if each.outcome is not None and _belongs(each, root))


def _chain(root: Context) -> Iterator[Execution]:
    # It ends: an execution is released by one that was there before it.
    last = root._maker
    while last is not None:
        yield last
        last = last.released_by


def _belongs(execution: Execution, root: Context) -> bool:
    context: Context | None = execution.context
    while context is not None and context is not root:
        context = context._parent
    return context is root


def _slack(plan: Plan, executions: list[Execution], end: float, critical: set[int]) -> dict[int, float]:
    """Backwards over the executions in order of their ends; each tells its dependencies how late they may be."""
    latest: dict[tuple[int, int], Execution] = {}
    for execution in executions:
        key = (id(execution.context), execution.index)
        if key not in latest or execution.ended > latest[key].ended:
            latest[key] = execution
    slack = {id(execution): max(0.0, end - execution.ended) for execution in executions}
    for execution in sorted(executions, key=lambda each: each.ended, reverse=True):
        if id(execution) in critical:
            slack[id(execution)] = 0.0
        above = [latest.get((id(execution.context), up)) for up in plan.up_list[execution.index]]
        before = [each for each in (*above, execution.released_by) if each is not None and id(each) in slack]
        ready = max((each.ended for each in before), default=execution.started)
        for each in before:
            slack[id(each)] = min(slack[id(each)], slack[id(execution)] + max(0.0, ready - each.ended))
    return slack
