"""A real run of the core without a shell: tests tell it what a shell would, and move its clock by hand."""

from __future__ import annotations

import contextvars
from typing import Any

from obsdag.config import ExecutorConfig
from obsdag.context import Context
from obsdag.core.observer import Facts, Observer
from obsdag.core.records import Execution
from obsdag.core.state import RunState
from obsdag.graph import DAG
from obsdag.runtime import Runtime
from obsdag.tasks.base import TaskConfig

__all__ = ["CoreRun", "chain"]

EPOCH = 1_700_000_000.0


def chain(*names: str, dag: str = "etl", config: TaskConfig | None = None) -> DAG:
    """A DAG of tasks one after the other."""
    made = DAG(dag)
    before: tuple[str, ...] = ()
    for name in names:

        async def function(ctx: Context) -> Context:
            return ctx

        made.task(name=name, after=before, **({} if config is None else {"config": config}))(function)
        before = (name,)
    return made


class CoreRun:
    """One run; `now` is its clock. What it tells is told in contextvars of its own, as in the frames of a worker."""

    def __init__(self, *names: str, dag: str = "etl", task: TaskConfig | None = None, **settings: Any) -> None:
        self.now = 0.0
        self.frame = contextvars.copy_context()
        plan = chain(*(names or ("load", "store")), dag=dag, config=task).build()
        self.state = RunState(
            plan, ExecutorConfig(**{"context_worker_num": 4} | settings), Runtime(), lambda: self.now, EPOCH
        )

    def observe(self, *observers: Observer) -> CoreRun:
        self.state.observe(Facts(observers))
        self.tell("run_started", self.state, self.now)
        return self

    def tell(self, fact: str, *arguments: Any) -> None:
        """Tells a fact that only a shell can know."""
        call = getattr(self.state.facts, fact)
        if call is not None:
            self.frame.run(call, *arguments)

    def enter(self, name: str = "") -> Context:
        context = Context(name=name)
        self.state.accept(context, self.now)
        return context

    def begin(self, context: Context, worker: int = 3) -> Execution:
        """Starts the next ready task of `context`, as a worker's visit does."""
        assert self.state.take(worker, self.now) is context
        return self.go_on(context, worker)

    def go_on(self, context: Context, worker: int = 3) -> Execution:
        execution = self.state.begin(context, self.now, worker)
        assert execution is not None
        self.tell("execution_started", execution, self.now)
        return execution

    def succeed(self, execution: Execution, result: Any = None, took_s: float = 0.5) -> None:
        self.now += took_s
        self.frame.run(self.state.finish, execution, execution.context if result is None else result, self.now)

    def fail(
        self, execution: Execution, error: BaseException, took_s: float = 0.5, retry_in_s: float | None = None
    ) -> None:
        self.now += took_s
        self.frame.run(self.state.fail, execution, error, self.now, retry_in_s)

    def leave(self, context: Context, worker: int = 3) -> None:
        self.state.leave(context, worker, 0.0, self.now)

    def drive(self, name: str = "", took_s: float = 0.5) -> Context:
        """A context from its entry to the sink."""
        context = self.enter(name)
        execution = self.begin(context)
        self.succeed(execution, took_s=took_s)
        while context._ready:
            self.succeed(self.go_on(context), took_s=took_s)
        self.leave(context)
        return context

    def end(self, outcome: str = "ok") -> None:
        self.tell("run_finished", self.state, outcome, self.now - self.state.started, self.now)
