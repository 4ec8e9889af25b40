"""What is run: graphs, their sizes, and how many executions an item stands for. Standard library only: peers read it.

W1 a chain of 10; W2 a diamond 1-4-1; W3 one task makes 1,000 items, each through 3 tasks, joined; W4 a chain of 3 sync
tasks in threads; W5 a chain of 3 with a task whose first attempt fails on every item and one under a rate limit that
does not bind. All tasks do nothing: what is measured is what drives them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHILDREN", "GRAPHS", "WORKERS", "WORKLOADS", "Graph", "Workload"]

Graph = dict[int, tuple[int, ...]]
"""Task number -> the numbers of its upstreams; the last task is the only one with nothing below it."""

GRAPHS: dict[str, Graph] = {
    "W1": {task: (task - 1,) if task else () for task in range(10)},
    "W2": {0: (), 1: (0,), 2: (0,), 3: (0,), 4: (0,), 5: (1, 2, 3, 4)},
    "W4": {task: (task - 1,) if task else () for task in range(3)},
}
WORKERS = 4
CHILDREN = 1_000
STEPS = 3


@dataclass(frozen=True)
class Workload:
    """items: roots in one run of a quick contender; W1 and W2 take a third of a second with everything on, so that the
    run's own beginning and end do not show. executions: per root, failed attempts included.
    """

    title: str
    items: int
    executions: int


WORKLOADS = {
    "W1": Workload("chain of 10", 10_000, 10),
    "W2": Workload("diamond 1-4-1", 10_000, 6),
    "W3": Workload("1 makes 1,000, 3 tasks each, joined", 4, CHILDREN * STEPS + 2),
    "W4": Workload("3 sync tasks in threads", 300, 3),
    "W5": Workload("a retry and a rate limit in 3 tasks", 1_000, 4),
}
