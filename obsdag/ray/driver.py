"""One run on shards, seen from the driver: inputs in, outcomes out, and what to do when a shard dies.

Everything happens on the driver's event loop. There is a task for each shard, which waits for what the shard says; and
`_pump`, which gives roots to the shards that have room whenever something has changed. What goes where is decided by
`Sharding`.

The end of a run, by steps (`close`): 1. an async input is ended and closed, or given up after the grace; 2. shards are
told to end, which cancels what lives there if the run ends early; 3. those that do not answer within the grace are
killed; 4. what has no outcome yet is `cancelled`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from obsdag.context import Context, OutputContext
from obsdag.core.base import more_of
from obsdag.core.observer import Facts
from obsdag.core.records import Failure, Stall
from obsdag.core.states import OUTCOMES
from obsdag.durable import accept
from obsdag.errors import ContextError, EncodingError, PoolError
from obsdag.inputs import as_context
from obsdag.pools.carry import RemoteFailure, str_of, unpack_error
from obsdag.ray.cluster import ShardDied, ShardRaised
from obsdag.ray.contexts import batch_of, check_id, read
from obsdag.ray.feed import Feed
from obsdag.ray.sharding import Root, Shard, Sharding
from obsdag.ray.wire import Codec, Ended, decode_answers

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.ray.fleet import Fleet, Member

__all__ = ["Driver"]

BATCH = 500
"""Roots in one message."""
START_S = 60.0
"""A run without any shard waits this long for one."""
_STILLBORN = 3  # deaths of shards that had nothing to do, in a row, for each shard


class Driver:
    """One run. emit: told of each output. `done` is resolved when every root has its outcome, or the run ends early.

    headers: of the span and the baggage in which it begins (W3C); shards go on with them. open_ended: more may be
    submitted at any time; on_ended: told of each root when all of it is here. counts: `entered` and each outcome, of
    answered roots and what was made from them, `entered` of all. early: why the run ends early, fatal: the error, if
    any. buffered: outputs that nobody has taken yet. recorder: of the journal; it gives outputs out after their commit.
    numbers: of the engines of shards that have ended the run.
    """

    def __init__(
        self,
        fleet: Fleet,
        config: ExecutorConfig,
        codec: Codec,
        inputs: Iterator[Any] | AsyncIterator[Any],
        headers: dict[str, str],
    ) -> None:
        self.config = config
        self.loop = asyncio.get_running_loop()
        self.clock = self.loop.time
        self.started = self.clock()
        self.epoch = time.time() - self.started
        self.max_live = config.max_live_contexts
        self.recorder: Any = None
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.emit: Callable[[OutputContext], None] = _nobody
        self.on_ended: Callable[[Context], None] = _nobody
        self.open_ended = False
        self.counts: dict[str, int] = {"entered": 0, **dict.fromkeys(OUTCOMES, 0)}
        self.failures: deque[Failure] = deque()
        self.stalls: list[Stall] = []
        self.failures_kept: int | None = None
        self.numbers: Counter[str] = Counter()
        self.cleanup_errors: list[tuple[str, BaseException]] = []
        self.abandoned: list[str] = []
        self.buffered = 0
        self.early = ""
        self.fatal: BaseException | None = None
        self.first_entered: float | None = None
        self.facts = Facts(config.observers)
        self.sharding = Sharding(self._supply, most_ahead=min(2_000, config.max_live_contexts))
        self._fleet = fleet
        self._codec = codec
        self._headers = headers
        self._inputs: Iterator[Any] | None = inputs if isinstance(inputs, Iterator) else None
        self._feed = None if isinstance(inputs, Iterator) else Feed(inputs, self)
        self._living: dict[Context, Root | None] = {}
        self._members: dict[str, Member] = {}
        self._attending: dict[str, asyncio.Task[None]] = {}
        self._begun: set[str] = set()
        self._leaving: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stillborn = 0
        self._pumping = False
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def run(self) -> Driver:
        """Itself: it stands where a shell stands that has a run (`_early_error`)."""
        return self

    # --- beginning and end

    def begin(self) -> None:
        """Starts the run on all shards of the fleet."""
        if self.recorder is not None:
            self.recorder.attach(self)
            self.recorder.tell_left()
        self._watch_for_shards()
        if self._fleet.span is not None:
            self._fleet.fit(self._fleet.places())
            self._spawn(self._fleet.follow(self.resize))
        for member in self._fleet.take():
            self._take_in(member)
        if self._feed is not None:
            self._feed.task = self._spawn(self._feed.run())

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _take_in(self, member: Member) -> None:
        self._members[member.name] = member
        self._attending[member.name] = self._spawn(self._attend(member))

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.end_early("error", error)

    def end_early(self, why: str, error: BaseException | None) -> None:
        """The run is to end as E9; the first reason counts."""
        if not self.early:
            self.early, self.fatal = why, error
        if not self.done.done():
            self.done.set_result(None)

    async def close(self) -> None:
        """Ends the run by the steps at the top of this module."""
        if self._alarm is not None:
            self._alarm.cancel()
        tasks = self._tasks - {None if self._feed is None else self._feed.task}
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)  # ours, which end
            if self._feed is not None:
                self.abandoned += await self._feed.close(self.config.shutdown_grace)
        finally:  # the inputs are the caller's code, and may raise
            try:
                await asyncio.gather(*(self._let_go(member) for member in list(self._members.values())))
            finally:
                self._close_living()

    def _close_living(self) -> None:
        """What has no outcome yet is `cancelled`; where there is a journal the next process takes it up."""
        if self.early and self.recorder is not None:
            self.recorder.suspend()
        for context in list(self._living):
            self._close(context, "cancelled", None)
            self.on_ended(context)

    async def _let_go(self, member: Member) -> None:
        """A shard goes back to the fleet; one that is not ready yet, too, if the fleet is kept for further runs."""
        if (self._fleet.is_kept and member.name not in self._begun) or await self._end(member):
            self._fleet.give_back(member)

    async def _end(self, member: Member) -> bool:
        """Tells a shard that the run is over for it; one that does not answer, or never began, is killed: False."""
        if member.name not in self._begun:
            self._fleet.drop(member)
            return False
        try:
            async with asyncio.timeout(self.config.shutdown_grace + 5.0):
                told = await member.actor.end.remote(bool(self.early))
        except Exception as raised:
            if not isinstance(raised, TimeoutError | ShardDied | ShardRaised):  # Ray's connection is gone, say
                self._cleanup_failed(f"the end of {member.name}", raised)
            self._fleet.drop(member)
            return False
        self.numbers.update({name: told["numbers"][name] for name in told["numbers"] if name not in self.counts})
        self.abandoned += [f"{member.name}: {each}" for each in told["abandoned"]]
        for what, error in told["cleanup_errors"]:
            self._cleanup_failed(what, unpack_error(RemoteFailure(*error)))
        return True

    def _cleanup_failed(self, what: str, error: BaseException) -> None:
        self.cleanup_errors.append((what, error))
        if self.facts.cleanup_failed is not None:
            self.facts.cleanup_failed(what, error)

    # --- a shard's life

    async def _attend(self, member: Member) -> None:
        """From a shard's start to its death, or the run's end."""
        shard: Shard | None = None
        try:
            self._fleet.serves(member, await member.actor.open.remote())
            self._begun.add(member.name)  # from here on it is to be told of the end, too
            asks = await member.actor.begin.remote(self._headers)
            shard = self.sharding.add(member.name, asks, self.clock())
            self._watch_for_shards()
            while True:
                self._pump()
                answers = decode_answers(await member.actor.answers.remote())
                self._stillborn = 0
                self.sharding.heard(shard, answers.taken, answers.asks, self.clock())
                for ended in answers.ended:
                    self._answered(shard, ended)
                if answers.fault is not None:
                    self.end_early("error", unpack_error(answers.fault))
                    return
                if shard.leaving and not shard.roots:
                    await self._see_off(member)
                    return
        except ShardDied as error:
            self._shard_died(member, shard, error)
        except ShardRaised as error:
            self.end_early("error", error.cause)

    def _shard_died(self, member: Member, shard: Shard | None, error: Exception) -> None:
        """Its roots go to others, and another shard takes its place."""
        self._fleet.drop(member)
        self._forget(member)
        self._stillborn = self._stillborn + 1 if shard is None or not shard.roots else 0
        if shard is not None:
            for root in self.sharding.lose(shard):
                why = f"{root.deaths} shards died under context {root.context.id!r}, the last with nothing else on it"
                self._fail(root.context, PoolError(why), root.token)
        if self._stillborn >= _STILLBORN * self._fleet.shards:
            self.end_early("error", PoolError(f"shards die one after the other, without any work: {error}"))
            return
        self._watch_for_shards()
        self.resize()

    def resize(self) -> None:
        """Starts shards, or lets some go, until there are as many as the fleet is to have.

        One that goes gets nothing more, and is gone when it has answered what it has.
        """
        if self.early or self.done.done():
            return
        staying = [member for member in self._members.values() if member.name not in self._leaving]
        for _ in range(self._fleet.shards - len(staying)):
            self._take_in(self._fleet.start())
        staying.sort(key=lambda member: self.sharding.load(member.name))
        for member in staying[: max(len(staying) - self._fleet.shards, 0)]:
            self._leaving.add(member.name)
            shard = self.sharding.shards.get(member.name)
            if shard is not None:
                self.sharding.retire(shard)
            if shard is None or not shard.roots:  # it has nothing to say any more
                self._attending[member.name].cancel()
                self._spawn(self._see_off(member))
        self._pump()

    async def _see_off(self, member: Member) -> None:
        """A shard that has nothing to do, and is to have nothing, ends."""
        if await self._end(member):
            await self._fleet.close(member, self.config.shutdown_grace)
        shard = self.sharding.shards.get(member.name)
        if shard is not None:
            self.sharding.leave(shard)
            self._watch_for_shards()
        self._forget(member)

    def _forget(self, member: Member) -> None:
        del self._members[member.name], self._attending[member.name]
        self._begun.discard(member.name)
        self._leaving.discard(member.name)

    def _watch_for_shards(self) -> None:
        """While there is none, one has to start within `START_S`."""
        if self.sharding.shards and self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        elif not self.sharding.shards and self._alarm is None:
            self._alarm = self.loop.call_later(START_S, self._no_shard)

    def _no_shard(self) -> None:
        self.end_early("error", PoolError(f"no shard has started within {START_S:g} s: {self._fleet.shortage()}"))

    def shards_seen(self) -> list[dict[str, Any]]:
        """Each shard as plain values, for any thread to read."""
        return [self._fleet.seen(each, self.sharding.shards.get(each.name)) for each in list(self._members.values())]

    # --- giving

    def _pump(self) -> None:
        """Gives roots to the shards that have room, and looks whether the run is done."""
        self._pumping = False
        if self.early or self.done.done():
            return
        with self._sending():
            for shard in list(self.sharding.hungry()):
                roots = self._take(shard)
                while roots:
                    self._members[shard.name].actor.feed.remote(batch_of(roots))
                    roots = self._take(shard) if len(roots) == BATCH else []
        if self._feed is not None:
            full = self.buffered >= self.config.max_live_contexts
            self._feed.allow(0 if full else sum(map(self.sharding.room, self.sharding.shards.values())))
        if not (self._has_inputs() or self.open_ended or self.early) and (self.recorder or self).settled():
            self.done.set_result(None)

    def _has_inputs(self) -> bool:
        return self._inputs is not None or (self._feed is not None and not self._feed.ended)

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """A run ends where Ray sends nothing, for want of a connection or as more than it may is on its way."""
        try:
            yield
        except Exception as error:
            self.end_early("error", error)

    def _take(self, shard: Shard) -> list[Root]:
        full = self.buffered >= self.config.max_live_contexts  # whoever takes the outputs is slow
        return [] if full or self.early else self.sharding.take(shard, BATCH)

    def settled(self) -> bool:
        """Whether all that entered has ended."""
        return self.sharding.settled()

    def pump_soon(self) -> None:
        """`_pump` in this turn of the loop or the next, however often it is asked for."""
        if not self._pumping:
            self._pumping = True
            self.loop.call_soon(self._pump)

    kick = pump_soon  # by the journal: outputs may be out, the run over

    def _supply(self) -> Root | None:
        """The next input; None if there is none, or none now."""
        while self._inputs is not None and not self.early:
            try:
                root = self._enter(next(self._inputs))
            except StopIteration:
                self._inputs = None
            except BaseException as error:
                self.end_early("input", error)
            else:
                if root is not None:
                    return root
        return None

    def _enter(self, item: Any) -> Root | None:
        """An input enters; None if its data cannot cross, by which it has failed."""
        context = as_context(item)
        if context in self._living:
            raise ContextError(f"context {context.id!r} is in a run and cannot be input again")
        self.counts["entered"] += 1
        if self.first_entered is None:
            self.first_entered = self.clock()
        self._living[context] = None
        try:
            return self._root_of(context, None)
        except EncodingError as error:
            self._fail(context, error)
            return None

    def _root_of(self, context: Context, due: float | None) -> Root:
        """The context as a root, written down where there is a journal. Raises EncodingError, with nothing changed."""
        data = self._codec.encode(context._data)
        check_id(context)
        if self.recorder is not None:
            accept(self.recorder, context, self.clock(), due)
        root = self._living[context] = Root.new(context, data)
        return root

    def take_up(self, contexts: Iterable[Context]) -> None:
        """Roots that an earlier process had accepted, before the run begins."""
        for context in contexts:
            self.counts["entered"] += 1
            root = self._living[context] = Root.new(context, self._codec.encode(context._data))
            self.sharding.queue.append(root)
        self.first_entered = self.clock()

    # --- serving

    def submit(self, context: Context, due: float | None) -> None:
        """A submission is to run. Raises EncodingError if its data cannot cross; nothing is changed then."""
        self.sharding.queue.append(self._root_of(context, due))
        self.counts["entered"] += 1
        self.pump_soon()

    def withdraw(self, context: Context, error: BaseException | None) -> bool:
        """A submission ends now: as failed by `error`, or as cancelled; False if it has ended. Its shard is told."""
        root = self._living.get(context)
        if root is None:  # with a journal its ticket is open until the commit
            return False
        shard = self.sharding.withdraw(root)
        if shard is not None:
            with self._sending():
                self._members[shard.name].actor.cancel.remote(root.number)
        if error is not None:
            self._fail(context, error)
        else:
            self._close(context, "cancelled", None)
            self.on_ended(context)
        self.pump_soon()
        return True

    def shard_of(self, context: Context) -> str | None:
        """The name of the shard that has it; None while it waits, and when it has ended."""
        root = self._living.get(context)
        shard = None if root is None else self.sharding.shard_of(root)
        return None if shard is None else shard.name

    # --- inputs

    def take(self, item: Any) -> bool:
        """An item of an async input enters; whether it is on its way to a shard."""
        root = self._enter(item)
        if root is not None:
            self.sharding.queue.append(root)
        self.pump_soon()
        return root is not None

    # --- what came of a root

    def _answered(self, shard: Shard, ended: Ended) -> None:
        root = self.sharding.answered(shard, ended.number, ended.token)
        if root is None:
            return
        context: Context = root.context
        try:
            told = read(ended, context, self._codec)
        except Exception as error:  # pickled, of a class say that a shard knows and this process does not
            text = f"what came of it cannot be read here ({type(error).__name__}: {str_of(error)})"
            self._fail(context, EncodingError(text), ended.token)
            return
        if ended.counts is not None:
            self.counts["entered"] += sum(ended.counts.values()) - 1
        self._close(context, ended.outcome, ended.counts)
        for output in told.outputs:
            if context._scope is not None:
                context._scope.outputs.append(output)
            else:
                self.emit(output)
        for failure in told.failures:
            self._failed(failure, context)
        for stall in told.stalls:
            self._stalled(stall)
        self.on_ended(context)

    def _fail(self, context: Context, error: BaseException, attempts: int = 1) -> None:
        """A root that fails on its way to a shard, or by what it does to shards."""
        self._close(context, "failed", None)
        self._failed(Failure(context, "source", attempts, error), context)
        self.on_ended(context)

    def _close(self, context: Context, outcome: str, counts: dict[str, int] | None) -> None:
        """A root and what was made from it have ended."""
        for name, number in ({outcome: 1} if counts is None else counts).items():
            self.counts[name] += number
        context._outcome = outcome
        if self.recorder is not None and getattr(context, "_entry", None) is not None:
            self.recorder.context_finished(context, outcome, self.clock())
        if context._token is not None:
            context._token.release()
        del self._living[context]

    def _failed(self, failure: Failure, root: Context) -> None:
        context = failure.context
        if self.recorder is not None:
            self.recorder.context_failed(context, failure, None, self.clock())
        if root._scope is not None:
            root._scope.failures.append(failure)
        context._error = failure.exception
        more_of(context).why = failure.task
        if self.failures_kept is None or self.failures_kept:
            if self.failures_kept is not None and len(self.failures) >= self.failures_kept:
                self.failures.popleft()
            self.failures.append(failure)
        if self.facts.context_failed is not None:
            self.facts.context_failed(context, failure, None, self.clock())
        if self.config.on_failure == "raise":
            self.end_early("failure", None)

    def _stalled(self, stall: Stall) -> None:
        self.stalls.append(stall)
        if self.facts.context_stalled is not None:
            self.facts.context_stalled(stall.context, stall, self.clock())


def _nobody(context: Context) -> None:
    """Nobody is interested."""
