"""The immutable plan that a DAG is compiled to: indices and bit masks, plain data (SEMANTICS G4).

Every task has an index, in topological order: index 0 is the source, the last is the sink; tasks that do not depend on
each other stand in the order in which they were added. A set of tasks is an integer with the bits of its members set:
the progress of a context is a few integers, and what is ready, skipped or bypassed is bit operations. Nothing here
recurses (G7).
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Final

from obsdag.tasks.base import Task

__all__ = ["FAN_OUT_SHAPES", "MAX_WAYS", "Plan", "Step", "compile_plan", "indices", "topological_order"]


Way = tuple[int, int, int, int, bool]
"""What follows a task on a context of which nothing else runs: of the masks of completed and of ready tasks it is a
function. ready: before; index and bit of the task that begins; what is ready then; whether the task released any.
"""
Step = tuple[int, int, int, tuple[tuple[int, int], ...], dict[int, Way] | None]
"""What the core's short way from an execution to the next needs to know of a task, None where that must not be taken:
its bit; the index of the only task below it, if nothing but this one is above that, else 0 (the source's); the mask of
the tasks below that wait for nothing else; of the others below, the bit and the mask of what they wait for; the ways on
that were found so far, by what is completed (None: masks are too big to be remembered).
"""
MAX_WAYS: Final = 8
"""Ways remembered per task: one runner at a time takes tasks in order, so that most have one or two."""
_MAX_TASKS_WITH_WAYS: Final = 300


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What the core needs to know of a DAG. Tuples are indexed by the task's index; masks are ORs of `bit`.

    index: task id -> index.
    all_mask: every task, source and sink included.
    bit: `1 << i`.
    up, down: the direct upstreams and downstreams; ancestors, descendants: all of them, without the task itself.
    bypass: all - descendants - ancestors - itself: what an entering context may count as done at that task (G4, E12).
    up_list, down_list: the direct neighbors as indices; `down_list` by (priority descending, index).
    follow: the only downstream, if this task is its only upstream; else -1. The straight stretches of the graph.
    below: of each direct downstream its bit and the mask of all that it waits for. steps: see `Step`.
    rank: the position of each task in (priority descending, index); None if no task has a priority.
    routers, joins, maps, streams, loops, services: tasks of a shape; pass_through, may_drop: tasks with that setting;
        limited: those that take permits.
    choices: router index -> what it may return (id; for an included router also the id within its own DAG, and the
        names of included DAGs) -> the mask of direct downstreams that it stands for (T9).
    fan_outs_above: join index -> the ancestors that can make children; never empty in a plan that was validated (G3).
    fingerprint: hex digest of names, kinds, order and edges: equal wherever progress means the same.
    """

    name: str
    tasks: tuple[Task, ...]
    index: Mapping[str, int]
    source: int
    sink: int
    all_mask: int
    bit: tuple[int, ...]
    up: tuple[int, ...]
    down: tuple[int, ...]
    ancestors: tuple[int, ...]
    descendants: tuple[int, ...]
    bypass: tuple[int, ...]
    up_list: tuple[tuple[int, ...], ...]
    down_list: tuple[tuple[int, ...], ...]
    follow: tuple[int, ...]
    below: tuple[tuple[tuple[int, int], ...], ...]
    steps: tuple[Step | None, ...]
    rank: tuple[int, ...] | None
    routers: int
    joins: int
    maps: int
    streams: int
    loops: int
    services: int
    pass_through: int
    may_drop: int
    limited: int
    choices: Mapping[int, Mapping[str, int]]
    fan_outs_above: Mapping[int, int]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tasks)

    def names(self, mask: int) -> list[str]:
        """The ids of the tasks in `mask`, in order."""
        return [self.tasks[i].id for i in indices(mask)]

    def mask(self, *ids: str) -> int:
        """The mask of the tasks with these ids; raises KeyError for an unknown one."""
        return reduce(or_, (self.bit[self.index[task_id]] for task_id in ids), 0)


def indices(mask: int) -> Iterator[int]:
    """The indices of the bits set in `mask`, ascending; the time goes with their number."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def topological_order(upstreams: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The nodes 0..n-1, each after its `upstreams` and the lowest of those that could come next; and the cycles.

    The second is empty if there is an order. Else the first means nothing, and the second holds one cycle after the
    other, each as nodes from upstream to downstream, until no cycle is left that shares no node with these.
    """
    downstreams: list[list[int]] = [[] for _ in upstreams]
    missing = [0] * len(upstreams)
    for node, above in enumerate(upstreams):
        for upstream in set(above):
            downstreams[upstream].append(node)
            missing[node] += 1
    ready = [node for node, count in enumerate(missing) if not count]
    left = dict.fromkeys(range(len(upstreams)))
    order: list[int] = []
    cycles: list[list[int]] = []
    while left:
        if not ready:
            cycles.append(_cycle_among(left, upstreams))
            ready = sorted(cycles[-1])
        node = heapq.heappop(ready)
        if node not in left:  # of a cycle that was cut, and free since
            continue
        del left[node]
        order.append(node)
        for downstream in downstreams[node]:
            missing[downstream] -= 1
            if not missing[downstream]:
                heapq.heappush(ready, downstream)
    return order, cycles


def _cycle_among(left: Mapping[int, None], upstreams: Sequence[Sequence[int]]) -> list[int]:
    # every node left waits for another one left, so walking upwards must come back
    node = next(iter(left))
    seen: dict[int, None] = {}
    while node not in seen:
        seen[node] = None
        node = next(upstream for upstream in upstreams[node] if upstream in left)
    walked = list(seen)
    cycle = walked[walked.index(node) :][::-1]
    first = cycle.index(min(cycle))
    return cycle[first:] + cycle[:first]


def compile_plan(
    name: str,
    tasks: Sequence[Task],
    upstreams: Sequence[Sequence[int]],
    choices: Mapping[str, Mapping[str, Iterable[str]]] | None = None,
) -> Plan:
    """The Plan of `tasks` (in topological order, with source and sink) and the positions of their direct upstreams.

    choices: router id -> what it may return -> the ids of the downstreams that it stands for; each downstream's own id
        is added.
    """
    count = len(tasks)
    index = {task.id: i for i, task in enumerate(tasks)}
    bit = tuple(1 << i for i in range(count))
    up_list = tuple(tuple(sorted(set(above))) for above in upstreams)
    key = [(-task.config.priority, i) for i, task in enumerate(tasks)]
    down_list = _down_list(up_list, key)
    up, down = _masks(up_list, bit), _masks(down_list, bit)
    ancestors, descendants = _reach(up_list, bit, range(count)), _reach(down_list, bit, range(count - 1, -1, -1))
    all_mask = (1 << count) - 1
    joins, limited = _of_shape(tasks, bit, "join"), _where(tasks, bit, _takes_permits)
    rank, below = _rank(key), tuple(tuple((bit[i], up[i]) for i in near) for near in down_list)
    follow = tuple(near[0] if len(near) == 1 and len(up_list[near[0]]) == 1 else -1 for near in down_list)
    odd = all_mask if rank is not None else joins | limited
    return Plan(
        name=name,
        tasks=tuple(tasks),
        index=index,
        source=0,
        sink=count - 1,
        all_mask=all_mask,
        bit=bit,
        up=up,
        down=down,
        ancestors=ancestors,
        descendants=descendants,
        bypass=tuple(all_mask ^ (ancestors[i] | descendants[i] | bit[i]) for i in range(count)),
        up_list=up_list,
        down_list=down_list,
        follow=follow,
        below=below,
        steps=tuple(_step(i, bit, below[i], follow[i], odd) for i in range(count)),
        rank=rank,
        routers=_of_shape(tasks, bit, "router"),
        joins=joins,
        maps=_of_shape(tasks, bit, "map"),
        streams=_of_shape(tasks, bit, "stream"),
        loops=_of_shape(tasks, bit, "loop"),
        services=_of_shape(tasks, bit, "service"),
        pass_through=_where(tasks, bit, lambda task: task.config.pass_through),
        may_drop=_where(tasks, bit, lambda task: task.config.may_drop),
        limited=limited,
        choices=_choices(tasks, index, bit, down_list, choices or {}),
        fan_outs_above=_fan_outs_above(tasks, bit, ancestors),
        fingerprint=_fingerprint(tasks, up_list),
    )


def _takes_permits(task: Task) -> bool:
    return bool(task.shape == "stream" or task.config.parallel_num or task.config.limits)


def _step(index: int, bit: Sequence[int], below: Sequence[tuple[int, int]], follow: int, odd: int) -> Step | None:
    frees, rest = 0, []
    if odd and (odd & bit[index] or any(odd & each for each, _ in below)):
        return None
    for each, waits_for in below:
        if waits_for == bit[index]:
            frees = frees | each if frees else each
        else:
            rest.append((each, waits_for))
    sink = len(bit) - 1
    ways: dict[int, Way] | None = {} if sink < _MAX_TASKS_WITH_WAYS else None
    return bit[index], follow if 0 < follow < sink else 0, frees, tuple(rest), ways


FAN_OUT_SHAPES = ("function", "stream", "loop", "service", "map")


def _down_list(up_list: Sequence[Sequence[int]], key: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    below: list[list[int]] = [[] for _ in up_list]
    for i, above in enumerate(up_list):
        for upstream in above:
            below[upstream].append(i)
    return tuple(tuple(sorted(nodes, key=key.__getitem__)) for nodes in below)


def _masks(neighbors: Sequence[Sequence[int]], bit: Sequence[int]) -> tuple[int, ...]:
    # a single neighbor's mask is its bit itself, not an equal integer: 10,000 of them would take 12 MB
    return tuple(bit[near[0]] if len(near) == 1 else reduce(or_, (bit[i] for i in near), 0) for near in neighbors)


def _reach(neighbors: Sequence[Sequence[int]], bit: Sequence[int], order: Iterable[int]) -> tuple[int, ...]:
    reach = [0] * len(neighbors)
    for i in order:
        for near in neighbors[i]:
            reach[i] |= reach[near] | bit[near]
    return tuple(reach)


def _rank(key: Sequence[tuple[int, int]]) -> tuple[int, ...] | None:
    if not any(priority for priority, _ in key):
        return None
    rank = [0] * len(key)
    for position, (_, i) in enumerate(sorted(key)):
        rank[i] = position
    return tuple(rank)


def _where(tasks: Sequence[Task], bit: Sequence[int], holds: Callable[[Task], bool]) -> int:
    return reduce(or_, (bit[i] for i, task in enumerate(tasks) if holds(task)), 0)


def _of_shape(tasks: Sequence[Task], bit: Sequence[int], shape: str) -> int:
    return _where(tasks, bit, lambda task: task.shape == shape)


def _choices(
    tasks: Sequence[Task],
    index: Mapping[str, int],
    bit: Sequence[int],
    down_list: Sequence[Sequence[int]],
    choices: Mapping[str, Mapping[str, Iterable[str]]],
) -> dict[int, Mapping[str, int]]:
    result: dict[int, Mapping[str, int]] = {}
    for i, task in enumerate(tasks):
        if task.shape == "router":
            known = {
                name: reduce(or_, (bit[index[task_id]] for task_id in ids), 0)
                for name, ids in choices.get(task.id, {}).items()
            }
            result[i] = known | {tasks[below].id: bit[below] for below in down_list[i]}
    return result


def _fan_outs_above(tasks: Sequence[Task], bit: Sequence[int], ancestors: Sequence[int]) -> dict[int, int]:
    fan_outs = _where(tasks, bit, lambda task: task.shape in FAN_OUT_SHAPES and not task.config.pass_through)
    return {i: ancestors[i] & fan_outs for i, task in enumerate(tasks) if task.shape == "join"}


def _fingerprint(tasks: Sequence[Task], up_list: Sequence[Sequence[int]]) -> str:
    nodes = [[task.id, task.kind, list(above)] for task, above in zip(tasks, up_list, strict=True)]
    return hashlib.sha256(json.dumps(nodes, separators=(",", ":")).encode()).hexdigest()[:32]
