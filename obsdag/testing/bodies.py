"""How a simulation plays the functions of tasks: as generators that yield where other things may happen.

A body yields None (other things may happen), a number of seconds (virtual sleep), "pool" (no thread is free yet) or
HANDED (a service has it now), and returns what the function returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from obsdag.context import Context
from obsdag.core.records import Execution, Pull
from obsdag.errors import ObsdagError, TaskError
from obsdag.limits import MAKE
from obsdag.runners import JoinChildren
from obsdag.tasks.base import Environment, Task

if TYPE_CHECKING:
    from obsdag.graph import DAG
    from obsdag.testing.simulation import Simulation

__all__ = ["HANDED", "Bodies", "Body", "Opened", "SimulationError"]

Body = Generator[Any, Any, Any]
HANDED: Any = object()
_END: Any = object()


class SimulationError(ObsdagError):
    """The simulation cannot go on: the message says what is missing, or what everything waits for."""


class Opened:
    """What a step of a loop or map came to: items, or its end."""

    def __init__(self, simulation: Simulation, pull: Pull, items: Iterable[Context] | None) -> None:
        self.simulation = simulation
        self.pull = pull
        self.items = items

    def tell(self, execution: Execution) -> None:
        """Tells the core."""
        simulation, pull = self.simulation, self.pull
        if self.items is None:
            simulation.run.pull_ended(execution, pull, simulation.now)
            simulation.told("pull_ended", execution, pull)
        else:
            simulation.run.pulled(execution, pull, self.items, simulation.now)
            simulation.told("pulled", execution, pull, self.items)
        if simulation.run.dirty:
            simulation._pump()


class Bodies:
    """The functions of one simulated run, with the generators of its streams, loops and maps."""

    def __init__(self, simulation: Simulation, dag: DAG, stand_ins: Mapping[str, Callable[..., Any]]) -> None:
        self.simulation = simulation
        self.env = Environment(simulation.run.runtime, None, dag)
        self.stand_ins = stand_ins
        self.streams: dict[int, Any] = {}

    def of(self, execution: Execution) -> Body:
        """The body of an execution."""
        task = execution.task
        shape = task.shape
        if shape == "service":
            return self._served(execution)
        if shape == "stream" and task.id not in self.stand_ins:
            return self._streamed(execution)
        if shape in ("loop", "map"):
            return self._pulled(execution)
        return self._called(execution)

    # --- functions

    def _function(self, task: Task) -> Callable[..., Any]:
        function = self.stand_ins.get(task.id, task.func)
        assert function is not None
        return function

    def _arguments(self, execution: Execution) -> tuple[list[Any], dict[str, Any]]:
        task = execution.task
        given: list[Any] = [execution.context]
        keywords: dict[str, Any] = {}
        if task.shape == "join":
            arrived, failed, dropped = self.simulation.run.join_children(execution.context, execution.index)
            children = JoinChildren(arrived)
            children.failed, children.dropped = failed, dropped
            given.append(children)
        if task.id in self.stand_ins:
            return given, keywords
        signature: Any = getattr(task, "signature", None)
        if signature is not None and signature.takes_env:
            given.append(self.env)
        return given, keywords

    def _called(self, execution: Execution) -> Body:
        given, keywords = self._arguments(execution)
        signature: Any = getattr(execution.task, "signature", None)
        if execution.grant is not None and execution.grant.resources:
            items = yield from self._resources(execution)
            if signature is not None and signature.takes_resource and execution.task.id not in self.stand_ins:
                keywords["resource"] = items[0] if len(items) == 1 else tuple(items)
        result = self._function(execution.task)(*given, **keywords)
        if inspect.isawaitable(result):
            result = yield from result.__await__()
        return result

    def _served(self, execution: Execution) -> Body:
        function = self.stand_ins.get(execution.task.id)
        if function is None:
            raise SimulationError(f"service {execution.task.id!r} needs a stand-in: a function of the context")
        yield HANDED
        result = function(execution.context)
        if inspect.isawaitable(result):
            result = yield from result.__await__()
        return result

    def _resources(self, execution: Execution) -> Generator[Any, Any, list[Any]]:
        grant, book = execution.grant, self.simulation.run.runtime.limits
        assert grant is not None
        for pool, item in grant.resources.items():
            if item is MAKE:
                assert pool.factory is not None
                made = pool.factory()
                if inspect.isawaitable(made):
                    made = yield from made.__await__()
                book.resource_made(grant, pool, made, self.simulation.now)
        return list(grant.resources.values())

    def chosen(self, execution: Execution, chosen: Any) -> int:
        """The downstream tasks that a router named, as a mask. Raises TaskError for anything else."""
        names: Iterable[Any] = (chosen,) if isinstance(chosen, str | Task) else (chosen or ())
        choices = self.simulation.plan.choices[execution.index]
        mask = 0
        for name in names:
            target = getattr(name, "id", name)
            if target not in choices:
                raise TaskError(f"router {execution.task.id!r} chose {target!r:.80}")
            mask |= choices[target]
        return mask

    # --- generators

    def _make(self, execution: Execution) -> Any:
        task = execution.task
        given: tuple[Any, ...] = (execution.context,) if getattr(task, "takes_context", True) else ()
        signature: Any = getattr(task, "signature", None)
        if signature is not None and signature.takes_env and task.id not in self.stand_ins:
            given = (*given, self.env)
        return self._function(task)(*given)

    def _first(self, task: Task, generator: Any, context: Context) -> Body:
        if getattr(task, "takes_context", True):
            return (yield from _step(generator, None))
        if (yield from _step(generator, None)) is _END:
            return _END
        return (yield from _step(generator, context))

    def _streamed(self, execution: Execution) -> Body:
        index, context = execution.index, execution.context
        generator = self.streams.get(index)
        try:
            if generator is None:
                generator = self.streams[index] = self._make(execution)
                item = yield from self._first(execution.task, generator, context)
            else:
                item = yield from _step(generator, context)
            if item is _END:
                raise TaskError(f"the generator of stream task {execution.task.id!r} ended")
        except BaseException:
            self.streams.pop(index, None)
            raise
        return item

    def _pulled(self, execution: Execution) -> Body:
        simulation = self.simulation
        pull = self.pull_of(execution)
        first = pull is None
        if pull is None:
            pull = simulation.run.open_pull(execution)
            simulation.told("open_pull", execution, pull)
        try:
            yield None  # up to here it goes at once
            if first:
                yield from self._open(execution, pull)
                item = yield from self._first_item(execution, pull)
            else:
                item = yield from _step(pull.generator, None)
            items = None if item is _END else self._items(pull, item)
        except BaseException:
            self.broken(execution, pull)
            raise
        return Opened(simulation, pull, items)

    def _open(self, execution: Execution, pull: Pull) -> Body:
        made = self._make(execution)
        if execution.task.shape == "map":
            if inspect.isawaitable(made):
                made = yield from made.__await__()
            if not hasattr(made, "__anext__"):
                made = iter(made)
        pull.generator = made

    def _first_item(self, execution: Execution, pull: Pull) -> Body:
        if execution.task.shape == "map":
            return (yield from _step(pull.generator, None))
        return (yield from self._first(execution.task, pull.generator, execution.context))

    def _items(self, pull: Pull, item: Any) -> list[Context]:
        items = item if isinstance(item, list | tuple) else () if item is None else (item,)
        return [self._child(pull, each) for each in items]

    def _child(self, pull: Pull, item: Any) -> Context:
        if pull.task.shape == "map":
            if isinstance(item, Mapping) and not isinstance(item, Context):
                return pull.context._child(data=item)
            if item._parent is None and item._run is None and item is not pull.context:
                item._parent = pull.context
                if pull.context._children is None:
                    pull.context._children = {}
                pull.context._children[item] = None
        if not isinstance(item, Context):
            raise TaskError(f"task {pull.task.id!r} gave {item!r:.80}; it gives contexts, a map also mappings")
        return item

    def pull_of(self, execution: Execution) -> Pull | None:
        """The open loop or map whose next item the execution asks for."""
        more = execution.context._more
        pull = more.pulls.get(execution.index) if more is not None and more.pulls else None
        return pull if pull is not None and pull.execution is not execution else None

    def broken(self, execution: Execution, pull: Pull | None = None) -> None:
        """A step of a loop or map raised, was cancelled or timed out."""
        if pull is None:
            more = execution.context._more
            pull = more.pulls.get(execution.index) if more is not None and more.pulls else None
        if pull is None:
            return
        execution.final = bool(pull.items)
        self.simulation.run.abort_pull(pull)
        self.simulation.told("abort_pull", execution, pull)

    def close_pull(self, pull: Pull) -> None:
        """The context of a loop or map has ended."""
        pull.generator = None

    def close(self) -> None:
        """The run is over."""
        self.streams.clear()


def _step(generator: Any, value: Any) -> Body:
    """One item, or _END."""
    if hasattr(generator, "__anext__"):
        try:
            waiting = anext(generator) if value is None else generator.asend(value)
            return (yield from waiting.__await__())
        except StopAsyncIteration:
            return _END
    try:
        return next(generator) if value is None else generator.send(value)
    except StopIteration:
        return _END
