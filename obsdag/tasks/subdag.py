"""`SubDAG`: another DAG's tasks inside this one, under a name (G5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from obsdag.errors import ConfigError
from obsdag.tasks.base import Shape, Task, TaskConfig

if TYPE_CHECKING:
    from obsdag.graph import DAG

__all__ = ["SubDAG"]


class SubDAG(Task):
    """Stands for the tasks of `dag` where dependencies are told; it is never in a plan itself.

    Added to a DAG (`add_task`, or `dag.include`, which makes one), copies of the other's tasks appear there as
    `name/task`. As a dependency it means all its exit tasks. `members`, `entries` and `exits` are ids in the DAG that
    it was added to: all its tasks, those without and those with nothing after them. It takes no
    config: the members have their own.
    """

    kind = "subdag"
    shape: ClassVar[Shape] = "subdag"

    def __init__(self, dag: DAG, config: TaskConfig | None = None, name: str = "") -> None:
        if not hasattr(dag, "find_problems"):  # the class itself is on a floor above
            raise TypeError(f"only a DAG can be included, not {dag!r}")
        if config not in (None, TaskConfig()):
            raise ConfigError(f"included DAG {name or dag.name!r}: a config is for a task, not for a whole DAG")
        super().__init__(None, config, name or dag.name)
        self.dag = dag
        self.members: tuple[str, ...] = ()
        self.entries: tuple[str, ...] = ()
        self.exits: tuple[str, ...] = ()
