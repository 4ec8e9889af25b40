"""One shard: the ordinary engine on its own event loop, fed with batches of roots, asked for what came of them.

Nothing of Ray is in here; the actor around it (cluster.py) is three lines for each method. `answers` waits until there
is something to say: roots have ended, or workers have nothing to do. What is said once is not said again, so an idle
shard is silent; and one that has plenty before it gathers what to say for a hundredth of a second, as a message costs
both ends what a dozen roots do.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from obsdag.context import Context, OutputContext
from obsdag.core.observer import Observer
from obsdag.core.records import Execution, Scope, Stall
from obsdag.errors import EncodingError
from obsdag.executor import Executor, RunResult, _numbers
from obsdag.pools.carry import pack_error, str_of
from obsdag.ray.wire import (
    Answers,
    Codec,
    Ended,
    Failing,
    Made,
    Seed,
    Stalling,
    decode_batch,
    encode,
    packed,
    written,
)
from obsdag.shell import RunShell
from obsdag.telemetry.carrier import capture_caller, carried

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.graph import DAG
    from obsdag.worker import Worker

__all__ = ["ShardEngine"]

MOST_ENDED = 5_000
"""Outcomes in one message: what a driver decodes in some 20 ms."""
GATHER_S = 0.01
"""How long an outcome waits for others while more roots wait for a worker: a twentieth of what a shard has ahead."""


class _Tree(Scope):
    """A `root` and all that is made from it. entered: its contexts; ends: their outcomes, None while it is the root."""

    __slots__ = ("ends", "entered", "root", "seed", "stalls")

    def __init__(self, root: Context, seed: Seed, on_done: Any) -> None:
        super().__init__(on_done)
        self.root = root
        self.seed = seed
        self.entered = 0
        self.ends: Counter[str] | None = None
        self.stalls: list[Stall] | None = None


class _Trees(Observer):
    """Counts what becomes of each tree, so that a root that ran twice is counted once (C9)."""

    def context_entered(self, context: Context, kind: str, maker: Execution | None, now: float) -> None:
        """A context entered."""
        tree: Any = context._scope
        tree.entered += 1

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        """A context ended. Of a tree of one context nothing is kept but the context."""
        tree: Any = context._scope
        if tree.entered > 1:
            if tree.ends is None:
                tree.ends = Counter()
            tree.ends[outcome] += 1

    def context_stalled(self, context: Context, stall: Stall, now: float) -> None:
        """A context can never go on."""
        tree: Any = context._scope
        tree.stalls = [*(tree.stalls or ()), stall]


class _KeptTrees(_Trees):
    """The same where discarded contexts stay readable until the run ends (E11): their trees do not wait for that."""

    def __init__(self) -> None:
        self._counted: set[Context] = set()

    def context_changed(self, context: Context, now: float) -> None:
        """It may have been discarded: then its outcome is fixed, though it lives on."""
        kept = context._more.pending_end if context._more is not None else None
        if kept and context not in self._counted:
            self._counted.add(context)
            super().context_finished(context, kept, now)

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        """A context ended, and is counted if it was not before."""
        if context in self._counted:
            self._counted.remove(context)
        else:
            super().context_finished(context, outcome, now)


class _ShardShell(RunShell):
    """A run whose input comes in batches; `wanting` is told when a worker finds nothing to do."""

    wanting: Any = None

    def worker_idle(self, worker: Worker) -> None:
        """A worker found nothing to do."""
        super().worker_idle(worker)
        if self.wanting is not None:
            self.wanting()


class ShardEngine(Executor):
    """Runs roots that are fed to it. One run at a time: `begin`, `feed` and `answers` as often as wanted, `end`."""

    shell_class = _ShardShell

    def __init__(self, dag: DAG, config: ExecutorConfig, codec: Codec) -> None:
        super().__init__(dag, None, config)
        self._codec = codec
        self._trees = _Trees() if config.enable_context_gc else _KeptTrees()
        self._inbox: deque[Context] = deque()
        self._ended: deque[_Tree | Ended] = deque()
        self._by_number: dict[int, _Tree] = {}
        self._news = asyncio.Event()
        self._hurry = asyncio.Event()
        self._taken = self._told_taken = 0
        self._told_asks = 0
        self._shard: _ShardShell | None = None

    # --- one run

    async def begin(self, headers: Mapping[str, str]) -> int:
        """A run begins; the number of roots that its workers can begin with.

        headers: the span and the baggage in which the driver's run began, as W3C headers; empty if there are none.
        """
        self._inbox.clear()
        self._ended.clear()
        self._by_number.clear()
        self._news.clear()
        self._taken = self._told_taken = 0
        self._told_asks = self.config.context_worker_num
        shell = self._open_shell("stream", iter(()))
        assert isinstance(shell, _ShardShell)
        self._shard = shell
        shell.open_ended = True
        shell.wanting = shell.refill = self._wanting
        with carried(headers) if headers else nullcontext():
            self._begin(shell)
        shell.done.add_done_callback(lambda _: self._tell_now())
        return self.config.context_worker_num

    def _observers(self, shell: RunShell) -> list[Observer]:
        return [self._trees, *super()._observers(shell)]

    def feed(self, encoded: bytes) -> None:
        """Roots to run, as a Batch. A batch that cannot be read ends the run; a root whose data cannot is a failure."""
        shell = self._running()
        try:
            seeds = decode_batch(encoded).seeds
        except Exception as error:
            shell.end_early("error", error)
            return
        for seed in seeds:
            try:
                self._take_in(seed, self._codec.decode(seed.data))
            except Exception as error:  # pickled, of a class say that cannot be imported here
                self._refuse(seed, error)
        self._told_asks = 0
        shell.inputs = _Pulled(self)
        shell.kick()

    def _take_in(self, seed: Seed, data: dict[str, Any]) -> None:
        context = Context(None, data, seed.id if seed.named else "")
        context._id = seed.id
        if seed.caller is not None:
            mode, headers = seed.caller
            context._trace = capture_caller(headers, mode)
        tree = self._by_number[seed.number] = _Tree(context, seed, self._tree_done)
        context._scope = tree
        self._inbox.append(context)

    def _refuse(self, seed: Seed, error: Exception) -> None:
        text = f"the input cannot be read on a shard ({type(error).__name__}: {str_of(error)})"
        failing = Failing.of(Made(), "source", 1, EncodingError(text))
        self._ended.append(Ended(seed.number, seed.token, "failed", outputs=[], failures=[failing]))
        self._taken += 1
        self._news.set()

    def cancel(self, number: int) -> None:
        """The driver wants nothing more of the root of that number: all that lives of it is cancelled."""
        tree, shell = self._by_number.pop(number, None), self._shard
        if tree is None or shell is None:
            return
        if tree.root in self._inbox:
            self._inbox.remove(tree.root)
            self._taken += 1
            return
        now = shell.clock()
        for context in [each for each in shell.run.contexts if each._scope is tree]:
            shell.run.cancel(context, now)
        shell.pump()

    async def answers(self) -> bytes:
        """Waits until there is something to say, and says it, as Answers; nothing if the run ends meanwhile."""
        shell = self._running()
        await self._news.wait()
        if len(self._inbox) > self._taken - self._told_taken:
            self._hurry.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(GATHER_S):
                    await self._hurry.wait()
        if self._shard is not shell:
            return b""
        most = min(len(self._ended), MOST_ENDED)
        ended = [self._ended_of(self._ended.popleft()) for _ in range(most)]
        fault = packed(shell.fatal or RuntimeError(shell.early)) if shell.early else None
        if not self._ended and fault is None:
            self._news.clear()
        self._told_asks, self._told_taken = self._asks(), self._taken
        return encode(Answers(self._taken, self._told_asks, ended, fault))

    async def end(self, early: bool) -> dict[str, Any]:
        """The run ends; early: what lives is cancelled. Gives what `RunResult` tells of the end, and plain counters."""
        shell = self._running()
        shell.wanting = shell.refill = None
        shell.open_ended, shell.inputs = False, None
        if early or not shell.run.settled():
            shell.early = shell.early or "left"
        result = RunResult()
        self._shard = None
        self._tell_now()  # whoever waits for answers gets none
        await self._close(shell, result)
        errors = [(what, tuple(pack_error(error))) for what, error in result.cleanup_errors]
        return {"cleanup_errors": errors, "abandoned": result.abandoned, "numbers": dict(_numbers(shell))}

    def _running(self) -> _ShardShell:
        if self._shard is None:
            raise RuntimeError("no run has begun on this shard")
        return self._shard

    # --- what the engine tells

    def _pull(self) -> Context:
        if not self._inbox:
            raise StopIteration
        self._taken += 1
        return self._inbox.popleft()

    def _asks(self) -> int:
        """Idle workers, if nothing waits for them and there is room."""
        shell = self._running()
        return 0 if self._inbox or not shell.run.has_room() else len(shell.free)

    def _wanting(self) -> None:
        if self._asks() > self._told_asks:
            self._tell_now()

    def _tell_now(self) -> None:
        self._news.set()
        self._hurry.set()

    def _tree_done(self, scope: Scope) -> None:
        assert isinstance(scope, _Tree)
        self._by_number.pop(scope.seed.number, None)
        self._ended.append(scope)
        self._news.set()

    # --- what came of a root

    def _ended_of(self, tree: _Tree | Ended) -> Ended:
        if isinstance(tree, Ended):  # of a root that was refused
            return tree
        root, seed = tree.root, tree.seed
        kept = root._more.pending_end if root._more is not None else None
        ended = Ended(seed.number, seed.token, root._outcome or kept or "cancelled")
        if tree.ends is not None:
            ended.counts = dict(tree.ends)
        data = self._encoded(root) if ended.outcome in ("output", "failed") else None
        if isinstance(data, bytes):
            ended.data = data
        if len(tree.outputs) != 1 or not _is_plain(tree.outputs[0], root) or not isinstance(data, bytes):
            ended.outputs = []
            for output in tree.outputs:
                self._add_output(ended, output, root, data)
        for failure in tree.failures:
            made = self._made(failure.context, root, failure.context)
            ended.failures.append(Failing.of(made, failure.task, failure.attempts, failure.exception))
        for stall in tree.stalls or ():
            made = self._made(stall.context, root, stall.context)
            ended.stalls.append(Stalling(made, stall.task, list(stall.missing), stall.reason))
        return ended

    def _add_output(
        self, ended: Ended, output: OutputContext, root: Context, data: bytes | EncodingError | None
    ) -> None:
        context = output.context or root
        own = data if _is_plain(output, root) else self._encoded(output)
        made = self._made(context, root, None)
        if isinstance(own, EncodingError):
            self._unfit(ended, made, Failing.of(made, self._task_of(context), 1, own))
            return
        made.data = None if own is data else own
        assert ended.outputs is not None
        ended.outputs.append(made)

    def _task_of(self, context: Context) -> str:
        """The task whose result an output is: the last on its way; the sink if that were several, or it left early."""
        plan, more = self.plan, context._more
        last = plan.up[plan.sink]
        if last & ~context._done:  # a task returned an OutputContext
            last = 0
        elif more is not None:
            last &= ~(more.skipped | (more.dead or {}).get(plan.sink, 0))
        names = plan.names(last)
        return names[0] if len(names) == 1 else plan.tasks[plan.sink].id

    def _unfit(self, ended: Ended, made: Made, failing: Failing) -> None:
        """An output whose data cannot be carried to the driver: a failure, and no output."""
        ended.failures.append(failing)
        counts = Counter(ended.counts or {ended.outcome: 1})
        counts["output"] -= 1
        counts["failed"] += 1
        ended.counts = {name: number for name, number in counts.items() if number}
        if not made.id:
            ended.outcome = "failed"

    def _made(self, context: Context, root: Context, shown: Context | None) -> Made:
        """Which context of the root's tree it is; with the data of `shown`, if that has a form."""
        if context is root:
            return Made()
        above: list[str] = []
        parent = context._parent
        while parent is not None and parent is not root:
            above.append(written(parent.id))
            parent = parent._parent
        data = None if shown is None else self._encoded(shown)
        found = above if parent is root else None
        return Made(written(context.id), bool(context.name), found, data if isinstance(data, bytes) else None)

    def _encoded(self, context: Context) -> bytes | EncodingError:
        try:
            return self._codec.encode(context._data)
        except EncodingError as error:
            return error


class _Pulled(Iterator[Context]):
    """The inbox as the input of the run: a worker that finds nothing else to do takes the next root (E4)."""

    def __init__(self, engine: ShardEngine) -> None:
        self._engine = engine

    def __next__(self) -> Context:
        return self._engine._pull()


def _is_plain(output: OutputContext, root: Context) -> bool:
    return output.context is root and output._data is root._data
