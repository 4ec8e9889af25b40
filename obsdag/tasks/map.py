"""Map tasks: one context becomes many children, pulled one at a time (T5, T14, T15)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from obsdag.tasks.base import Shape, TaskConfig
from obsdag.tasks.function import FunctionTask, no_resource

__all__ = ["MapTask"]


class MapTask(FunctionTask):
    """The function gives children of its context: contexts or mappings, each of which becomes a child.

    It is an async generator, a generator, or a function (plain or async) that returns an iterable. Async ones run on
    the loop, the others in a thread: `runs_on` is the instance's own.
    """

    kind = "map"
    shape: ClassVar[Shape] = "map"
    accepts = ("asyncgen", "generator", "function", "coroutine")
    nothing_comes_back = "every return of its function is None, so there are no children: return an iterable, or yield"

    def __init__(
        self, func: Callable[..., Any], config: TaskConfig | None = None, name: str = "", **options: Any
    ) -> None:
        super().__init__(func, config, name, **options)
        # the base declares it per class; here the function decides
        vars(self)["runs_on"] = "loop" if self.signature.kind in ("asyncgen", "coroutine") else "thread"

    def problems(self) -> Iterable[str]:
        """Also: a pooled resource is held for one execution, which the children's source outlives."""
        yield from super().problems()
        yield from no_resource(self)
