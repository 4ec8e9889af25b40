"""Tasks whose function runs on a Ray cluster: `@dag.task(runner="ray", resources={"num_gpus": 1})` (SEMANTICS T11).

What crosses, and how, is process.py's; the other end of it, on a machine of the cluster, is detached.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType
from typing import Any, ClassVar

from obsdag.errors import ConfigError
from obsdag.pools import _worker
from obsdag.tasks.base import RunsOn, TaskConfig
from obsdag.tasks.process import ProcessTask, _why_unreachable

__all__ = ["RemoteTask"]


class RemoteTask(ProcessTask):
    """Calls a plain function as a Ray task: `def f(context)` returns what goes on, on a DetachedContext (T1, T11).

    resources: what it needs there, by Ray's names: num_cpus, num_gpus, memory (bytes), or resources of one's own;
    num_cpus is 1 unless it says otherwise. A function of a module is imported there; any other goes as a copy. An
    execution that times out or is cancelled is ended by killing its process. A worker that dies fails the execution.
    """

    kind = "ray"
    runs_on: ClassVar[RunsOn] = "remote"

    def __init__(
        self,
        func: Callable[..., Any],
        config: TaskConfig | None = None,
        name: str = "",
        resources: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(func, config, name)
        self.resources = _checked(self.id, {} if resources is None else resources)

    @cached_property
    def reference(self) -> tuple[str, str] | bytes:
        """How the cluster finds the function: its module and name, or a copy of it. Raises what copying raises."""
        func = self.func
        if (
            isinstance(func, FunctionType)
            and func.__module__ not in _worker.MAIN_NAMES  # which is Ray's own program there
            and _why_unreachable(func.__module__, func.__qualname__, func) is None
        ):
            return func.__module__, func.__qualname__
        copied: bytes = import_module("ray.cloudpickle").dumps(func)
        return copied

    def unreachable(self) -> Iterable[str]:
        """Ray is missing, or the function cannot be copied."""
        if find_spec("ray") is None:
            yield "it runs on a Ray cluster, and Ray is not installed here: pip install 'obsdag[ray]'"
            return
        try:
            _ = self.reference
        except Exception as error:
            yield f"its function cannot be carried to a Ray cluster ({error}): use a function of a module"


def _checked(task: str, resources: Any) -> dict[str, float]:
    if not isinstance(resources, Mapping) or not all(isinstance(name, str) and name for name in resources):
        raise ConfigError(f"task {task!r}: resources must be names and amounts, not {resources!r}")
    for name, amount in resources.items():
        number = isinstance(amount, int | float) and not isinstance(amount, bool)
        if not number or not 0 <= amount < math.inf:
            raise ConfigError(f"task {task!r}: resources[{name!r}] must be a number >= 0, not {amount!r}")
    return dict(resources)
