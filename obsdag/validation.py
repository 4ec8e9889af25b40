"""What is wrong with a DAG before it is built, all of it at once (SEMANTICS G3). Nothing here recurses (G7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from obsdag.limits import Limit, ResourcePool
from obsdag.plan import FAN_OUT_SHAPES, topological_order
from obsdag.tasks.base import Task
from obsdag.tasks.function import FunctionTask
from obsdag.tasks.join import JoinTask
from obsdag.tasks.kinds import did_you_mean
from obsdag.tasks.router import RouterTask

__all__ = ["Problem", "find_problems"]

_SHOWN_OF_A_CYCLE = 20


class Problem(NamedTuple):
    """One mistake: the task that it is told of ("" for the DAG itself), the sentence, and the setting it is about."""

    task: str
    text: str
    setting: str = ""

    def __str__(self) -> str:
        return f"task {self.task!r}: {self.text}" if self.task else self.text


def find_problems(
    tasks: Mapping[str, Task],
    upstreams: Mapping[str, Sequence[str]],
    choices: Mapping[str, Mapping[str, Sequence[str]]],
) -> Iterator[Problem]:
    """Every mistake in `tasks` with these direct `upstreams`, all of which are in `tasks`.

    choices: router id -> what it may return -> the downstreams that it stands for.
    """
    if not tasks:
        yield Problem("", "the DAG has no task: add one with add_task or @dag.task")
    yield from _cycles(upstreams)
    yield from _routers(tasks, upstreams, choices)
    yield from _joins(tasks, upstreams)
    yield from _limits(tasks)
    for task in tasks.values():
        for text in task.problems():
            yield Problem(task.id, text)


def _cycles(upstreams: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    ids = list(upstreams)
    position = {task_id: i for i, task_id in enumerate(ids)}
    _, cycles = topological_order([[position[above] for above in upstreams[task_id]] for task_id in ids])
    for cycle in cycles:
        path = [ids[i] for i in [*cycle, cycle[0]]]
        if len(path) > _SHOWN_OF_A_CYCLE:
            half = _SHOWN_OF_A_CYCLE // 2
            path[half:-half] = [f"... ({len(path) - 2 * half} more) ..."]
        yield Problem("", f"cycle: {' -> '.join(path)}")


def _routers(
    tasks: Mapping[str, Task],
    upstreams: Mapping[str, Sequence[str]],
    choices: Mapping[str, Mapping[str, Sequence[str]]],
) -> Iterator[Problem]:
    with_downstreams = {above for ids in upstreams.values() for above in ids}
    for task in tasks.values():
        if not isinstance(task, RouterTask):
            continue
        if task.id not in with_downstreams:
            yield Problem(task.id, "is a router, but no task depends on it: it has nothing to choose from")
        for target in task.targets or ():
            if target not in choices[task.id]:
                hint = did_you_mean(target, choices[task.id])
                yield Problem(task.id, f"its target {target!r} is not right below it{hint}", "targets")


def _joins(tasks: Mapping[str, Task], upstreams: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    if not any(isinstance(task, JoinTask) for task in tasks.values()):
        return
    below: dict[str, list[str]] = {task_id: [] for task_id in tasks}
    for task_id, ids in upstreams.items():
        for above in ids:
            below[above].append(task_id)
    fed: set[str] = set()
    waiting = [task.id for task in tasks.values() if task.shape in FAN_OUT_SHAPES and not task.config.pass_through]
    while waiting:
        for task_id in below[waiting.pop()]:
            if task_id not in fed:
                fed.add(task_id)
                waiting.append(task_id)
    for task in tasks.values():
        if isinstance(task, JoinTask) and task.id not in fed:
            yield Problem(task.id, "is a join, but above it is no map, nor any other task that could return children")


def _limits(tasks: Mapping[str, Task]) -> Iterator[Problem]:
    named: dict[str, tuple[Limit, str]] = {}
    for task in tasks.values():
        for limit in task.config.limits:
            if limit.name is not None:
                first, where = named.setdefault(limit.name, (limit, task.id))
                if first is not limit:
                    text = (
                        f"its limiter {limit.name!r} has the name of another one, of task {where!r}: share or rename it"
                    )
                    yield Problem(task.id, text, "limiter")
        pools: list[Any] = [limit for limit in task.config.limits if isinstance(limit, ResourcePool)]
        if isinstance(task, FunctionTask) and task.signature.needs_resource and not pools:
            text = "its function takes a 'resource', but there is no ResourcePool among its limiters to fill it"
            yield Problem(task.id, text, "limiter")
