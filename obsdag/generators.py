"""Streams, loops and maps: tasks around generators (SEMANTICS T5, T14).

A generator function without parameters (seed) is started up to its first `yield` and then sent the context; one with a
parameter is given it. What follows is the same: each `yield` gives out contexts, and receives the next one. Sync
generators run in a thread (or on the loop, in the foreground kinds), one step at a time, so no two threads are ever in
the same generator.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from obsdag.context import Context
from obsdag.core.records import Execution, Pull
from obsdag.errors import TaskError

if TYPE_CHECKING:
    from obsdag.runners import Runners
    from obsdag.tasks.base import Task

__all__ = ["LoopRunner", "MapRunner", "StreamRunner"]

_END: Any = object()
Finished = Callable[[], None]


class _GeneratorRunner:
    """What they share: making a generator, one step of it, closing it."""

    def __init__(self, runners: Runners, task: Task) -> None:
        self.runners = runners
        self.shell = runners.shell
        self.task = task
        self.takes_context = getattr(task, "takes_context", True)

    def _make(self, context: Context) -> Any:
        assert self.task.func is not None
        signature: Any = getattr(self.task, "signature", None)
        env = (self.shell.env,) if signature is not None and signature.takes_env else ()
        return self.task.func(*((context,) if self.takes_context else ()), *env)

    async def _first(self, execution: Execution, generator: Any, context: Context) -> Any:
        """The first item: of a generator that was given the context, or that is sent it after its first `yield`."""
        if self.takes_context:
            return await self._step(execution, generator, None)
        if await self._step(execution, generator, None) is _END:
            return _END
        return await self._step(execution, generator, context)

    async def _step(self, execution: Execution, generator: Any, value: Any) -> Any:
        """One item, or _END; within the task's timeout, where the task runs."""
        runners = self.runners
        if isinstance(generator, AsyncIterator):
            return await runners.timed(execution, _async_step(generator, value))
        if self.task.runs_on == "thread" and not isinstance(generator, type(iter([]))):
            return await runners.in_thread(execution, _sync_step, generator, value)
        return _sync_step(generator, value)

    async def _dispose(self, generator: Any) -> None:
        """Closes a generator that no execution is in; what it raises is reported."""
        try:
            if hasattr(generator, "aclose"):
                if not getattr(generator, "ag_running", False):
                    await generator.aclose()
            elif hasattr(generator, "close") and not getattr(generator, "gi_running", False):
                if self.task.runs_on == "thread":
                    job = self.shell.pools.threads().submit(generator.close, context=self.shell.base.copy())
                    await job.future
                else:
                    generator.close()
        except (Exception, asyncio.CancelledError) as error:
            self.runners.report(f"closing the generator of task {self.task.id!r}", error)


class StreamRunner(_GeneratorRunner):
    """One generator for the run; the core lets one execution at a time through (T5)."""

    def __init__(self, runners: Runners, task: Task) -> None:
        super().__init__(runners, task)
        self.generator: Any = None

    async def run(self, execution: Execution) -> Finished:
        """Sends the context in and takes what comes out; a generator that broke or ended is made anew for the next
        one.
        """
        context = execution.context
        generator = self.generator
        try:
            if generator is None:
                generator = self.generator = self._make(context)
                item = await self._first(execution, generator, context)
            else:
                item = await self._step(execution, generator, context)
            if item is _END:
                raise TaskError(
                    f"the generator of stream task {self.task.id!r} ended before it gave anything for this context"
                )
        except BaseException as error:
            self.generator = None
            self._lost(error)
            if not execution.abandoned:
                await self._dispose(generator)
            raise
        return partial(self.shell.finish, execution, item)

    def _lost(self, error: BaseException) -> None:
        tell = self.shell.run.facts.task_restarted
        if tell is not None:
            tell(self.task, "stream", error)

    async def close(self, grace: float) -> None:
        """Closes the generator at the run's end."""
        if self.generator is not None:
            await self._dispose(self.generator)


class LoopRunner(_GeneratorRunner):
    """A generator per input; each execution asks it for one item (T14, C10)."""

    async def run(self, execution: Execution) -> Finished:
        """Opens the loop on its first execution; then the next item, or the end."""
        run = self.shell.run
        pull = self._pull_of(execution)
        first = pull is None
        if pull is None:
            pull = run.open_pull(execution)
        try:
            if first:
                pull.generator = await self._open(execution)
                item = await self._first_item(execution, pull)
                if pull.items and item is not _END:
                    item = await self._pass_over(execution, pull, item)
            else:
                item = await self._step(execution, pull.generator, self._sent(pull))
            items = () if item is _END else self._items(pull, item)
        except BaseException:
            execution.final = bool(pull.items)
            run.abort_pull(pull)
            if pull.generator is not None and not execution.abandoned:
                await self._dispose(pull.generator)
            raise
        if item is _END:
            return partial(self._ended, execution, pull)
        return partial(self._pulled, execution, pull, items)

    def _pull_of(self, execution: Execution) -> Pull | None:
        more = execution.context._more
        if more is None or not more.pulls:
            return None
        pull = more.pulls.get(execution.index)
        return pull if pull is not None and pull.execution is not execution else None

    async def _open(self, execution: Execution) -> Any:
        return self._make(execution.context)

    async def _first_item(self, execution: Execution, pull: Pull) -> Any:
        return await self._first(execution, pull.generator, execution.context)

    async def _pass_over(self, execution: Execution, pull: Pull, item: Any) -> Any:
        """After a crash: a loop begins anew, or where its context's data says."""
        return item

    def _sent(self, pull: Pull) -> Any:
        return None if self.takes_context else pull.marker

    def _items(self, pull: Pull, item: Any) -> Iterable[Context]:
        """The contexts of one `yield`: one, several, or none this time."""
        items = item if isinstance(item, list | tuple) else () if item is None else (item,)
        for each in items:
            if not isinstance(each, Context):
                raise TaskError(
                    f"loop task {self.task.id!r} yielded {each!r:.80}; it yields contexts, or lists of them"
                )
        return items

    def _pulled(self, execution: Execution, pull: Pull, items: Iterable[Context]) -> None:
        shell = self.shell
        shell.run.pulled(execution, pull, items, shell.clock())
        if shell.run.dirty:
            shell.pump()

    def _ended(self, execution: Execution, pull: Pull) -> None:
        self.shell.run.pull_ended(execution, pull, self.shell.clock())
        self.shell.pump()

    async def close_pull(self, pull: Pull) -> None:
        """Closes the generator of a pull whose context has ended."""
        generator, pull.generator = pull.generator, None
        if generator is not None:
            await self._dispose(generator)


class MapRunner(LoopRunner):
    """The function gives children: as a generator, or as an iterable that it returns (T5, T15)."""

    async def _open(self, execution: Execution) -> Any:
        func = self.task.func
        assert func is not None
        made = await self.runners.call(execution, self.task, func, execution.context)
        if isinstance(made, Mapping | str | bytes):
            raise TaskError(
                f"map task {self.task.id!r} returned {made!r:.80}; it returns an iterable of contexts or mappings"
            )
        if hasattr(made, "__aiter__"):
            return aiter(made)
        if made is None or not isinstance(made, Iterable):
            raise TaskError(
                f"map task {self.task.id!r} returned {made!r:.80}; it returns an iterable of contexts or mappings"
            )
        return iter(made)

    async def _first_item(self, execution: Execution, pull: Pull) -> Any:
        return await self._step(execution, pull.generator, None)

    def _sent(self, pull: Pull) -> Any:
        return None

    async def _pass_over(self, execution: Execution, pull: Pull, item: Any) -> Any:
        """After a crash: the items that came before it are children already. One with a cursor knows where it is."""
        if "cursor" in execution.context:
            return item
        left = pull.items
        while item is not _END:
            count = len(item) if isinstance(item, list | tuple) else item is not None
            if count > left:
                return item[left:] if isinstance(item, list | tuple) else item
            left -= count
            item = await self._step(execution, pull.generator, None)
        return item

    def _items(self, pull: Pull, item: Any) -> Iterable[Context]:
        items = item if isinstance(item, list | tuple) else () if item is None else (item,)
        return [self._child(pull.context, each) for each in items]

    def _child(self, parent: Context, item: Any) -> Context:
        """An item as a child: a mapping becomes one, a new context is adopted."""
        if not isinstance(item, Context):
            if not isinstance(item, Mapping):
                raise TaskError(f"map task {self.task.id!r} gave {item!r:.80}; it gives contexts or mappings")
            return parent._child(data=item)
        if item is parent:
            raise TaskError(f"map task {self.task.id!r} gave its own context; it gives children: contexts or mappings")
        if item._parent is None and item._run is None:
            item._parent = parent
            if parent._children is None:
                parent._children = {}
            parent._children[item] = None
        return item


async def _async_step(generator: Any, value: Any) -> Any:
    try:
        if value is None:
            return await anext(generator)
        return await generator.asend(value)
    except StopAsyncIteration:
        return _END


def _sync_step(generator: Iterator[Any], value: Any) -> Any:
    try:
        if value is None:
            return next(generator)
        return generator.send(value)  # type: ignore[attr-defined]
    except StopIteration:
        return _END
