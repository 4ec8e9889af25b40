"""The two tasks that every built DAG has and no function stands behind: where contexts come in and outputs go out."""

from __future__ import annotations

from typing import ClassVar

from obsdag.tasks.base import Shape, Task

__all__ = ["SinkNode", "SourceNode"]


class SourceNode(Task):
    """`dag.in_task`: above every task; what enters the run starts here (G2)."""

    kind = "source"
    shape: ClassVar[Shape] = "node"

    def __init__(self, name: str = "source") -> None:
        super().__init__(None, None, name)


class SinkNode(Task):
    """`dag.out_task`: below every task; a context that reaches it is an output (G2)."""

    kind = "sink"
    shape: ClassVar[Shape] = "node"

    def __init__(self, name: str = "sink") -> None:
        super().__init__(None, None, name)
