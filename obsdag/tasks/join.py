"""Join tasks: the parent and its finished children come together again (T5, T15)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from obsdag.errors import ConfigError
from obsdag.tasks.base import Shape, TaskConfig
from obsdag.tasks.function import NOTHING_COMES_BACK, FunctionTask

__all__ = ["JoinTask"]


class JoinTask(FunctionTask):
    """`func(parent, children[, env])`, plain (in a thread) or async (on the loop), returns what goes on.

    on_child_failure: "fail": a failed child fails the parent; "skip": the join is called with the others.
    Raises ConfigError for another value.
    """

    kind = "join"
    shape: ClassVar[Shape] = "join"
    given = ("the parent", "its children")
    may_pass_through = True
    nothing_comes_back = NOTHING_COMES_BACK

    def __init__(
        self,
        func: Callable[..., Any],
        config: TaskConfig | None = None,
        name: str = "",
        on_child_failure: Literal["fail", "skip"] = "fail",
        **options: Any,
    ) -> None:
        super().__init__(func, config, name, **options)
        if on_child_failure not in ("fail", "skip"):
            raise ConfigError(f"task {self.id!r}: on_child_failure must be 'fail' or 'skip', not {on_child_failure!r}")
        self.on_child_failure = on_child_failure
        # the base declares it per class; here the function decides
        vars(self)["runs_on"] = "loop" if self.signature.kind == "coroutine" else "thread"
