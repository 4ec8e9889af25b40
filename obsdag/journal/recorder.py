"""The recorder: the observer that writes down, per turn of the event loop, what the transitions of a run changed.

All transitions are synchronous on the loop's thread, so the state between two callbacks is consistent. A fact marks its
context as touched; the first mark of a turn asks for `flush`, which makes one row per touched context from its state at
that moment and hands them to the writer as one unit. Only data is taken earlier: at the moment an execution has
finished, since the next one may already have changed half of it when the turn ends.

What leaves the engine waits: `after_commit` calls back when everything that has happened until now is in the file.
Executions that follow do not wait, so after a crash a task may run again on a context (at least once).

When a run is ended early (E9), what it cancels keeps its progress and no outcome: `recover` takes it up (`suspend`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from obsdag.core.base import _DISCARDED
from obsdag.core.observer import Facts, Observer
from obsdag.core.restoring import Saved, restore
from obsdag.errors import EncodingError, JournalError
from obsdag.journal.codec import Body, Failed, Rare, pack_mask
from obsdag.journal.schema import Row, checksum
from obsdag.journal.store import Store

if TYPE_CHECKING:
    from obsdag.context import Context, OutputContext
    from obsdag.core.records import Execution, Failure, More, Stall
    from obsdag.journal.journal import SQLiteJournal
    from obsdag.journal.recover import Recovery
    from obsdag.plan import Plan
    from obsdag.shell import RunShell

__all__ = ["Entry", "Recorder", "describe_plan"]

_encode = msgspec.msgpack.Encoder().encode
_ALIVE_S: Final = 60.0
_PRUNE_S: Final = 300.0
_TEXT: Final = 4_000


class Entry:
    """What the journal knows of one context: its key and what cannot be read from the context itself.

    data: encoded when one of its executions finished last. crashes, started, suspect: see `Body`; a suspect was
    recovered and has made no progress since. caller: of a submission, see `Body`. over: its outcome is written down.
    problem: why its data has no form.
    """

    __slots__ = (
        *("caller", "crashes", "data", "due", "entered", "failed", "journal", "key", "kind"),
        *("over", "problem", "started", "suspect", "tree"),
    )

    def __init__(self, journal: str, key: int, tree: int, kind: str, entered: float) -> None:
        self.journal = journal
        self.key = key
        self.tree = tree
        self.kind = kind
        self.entered = entered
        self.data: bytes | None = None
        self.failed: Failed | None = None
        self.problem: EncodingError | None = None
        self.due: float | None = None
        self.caller: tuple[str, dict[str, str]] | None = None
        self.crashes = 0
        self.started = self.suspect = self.over = False

    @property
    def idempotency_key(self) -> str:
        """What `Context.idempotency_key` is, unless it was asked for before the context was accepted."""
        return f"{self.journal}-{self.key:x}"


class Recorder(Observer):
    """One per run. Everything here happens on the run's thread, except `committed` and `failed`.

    loop: whose turns make units; None: the running one.
    """

    def __init__(self, journal: SQLiteJournal, plan: Plan, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.journal = journal
        self.plan = plan
        self.error: JournalError | None = None
        self.keys: set[int] = set()  # of contexts that have no outcome and are this run's business
        self._writer = journal.open_writer()
        self._number = 0  # of the plan
        self._shell: RunShell | None = None
        self._loop = loop if loop is not None else asyncio.get_running_loop()
        self._touched: dict[Context, None] = {}
        self._asked = False
        self._sent = self._committed = 0
        self._units: deque[tuple[int, int]] = deque()  # (the writer's number, ours)
        self._held: deque[tuple[int, Callable[..., None], OutputContext | None]] = deque()
        self._idle: asyncio.Future[None] | None = None
        self._trials: deque[list[Saved]] = deque()
        self._tried: list[Context] = []
        self._suspended = self._slowed = False
        self._began = self._pruned = time.monotonic()

    # --- life

    async def open(self) -> None:
        """Enters the plan into the journal and listens to the writer."""
        tasks = json.dumps(describe_plan(self.plan))
        plan = self.plan
        number = self._writer.call(lambda store: store.plan_number(plan.fingerprint, plan.name, tasks))
        self._number = await asyncio.wrap_future(number)
        self._writer.listen(self)
        self.journal.recorders.append(self)

    def attach(self, shell: RunShell) -> None:
        """Belongs to a run's shell from now on: its outputs are given out after their commit."""
        self._shell = shell
        shell.recorder = self
        emit = shell.run.emit
        shell.run.emit = lambda output: self._hold_output(emit, output)

    def take_up(self, recovery: Recovery, now: float) -> None:
        """Puts the contexts of a journal into the run that begins; those that keep killing the process fail."""
        shell = self._shell
        assert shell is not None
        self.keys.update(context._entry.key for context in recovery.living)
        self.journal.recovered += len(recovery.living)
        calm: list[Saved] = []
        trials: dict[int, list[Saved]] = {}
        for saved in recovery.on_clock(shell.run.epoch):
            tree = saved.context._entry.tree
            trials.setdefault(tree, []).append(saved) if tree in recovery.suspects else calm.append(saved)
        self._trials.extend(trials.values())
        restore(shell.run, calm, now)
        for context in recovery.culprits:
            times = context._entry.crashes
            error = JournalError(f"context {context.id!r} was running {times} times in a row when the process died")
            shell.run.fail_context(context, error, None, now)
            self.journal.dead_letters += 1
        shell.run._settle_all(now)
        replayed = sum(getattr(context, "_ready", 0).bit_count() for context in recovery.living)
        self.journal.replayed += replayed
        facts = shell.run.facts
        if recovery.living and facts.journal_recovered is not None:
            facts.journal_recovered(len(recovery.living), replayed, len(recovery.culprits))
        self._next_trial()

    def _next_trial(self) -> None:
        """Trees of which one was running when the process died, repeatedly, go on alone: the innocent are cleared."""
        shell = self._shell
        while self._trials and shell is not None and not self._suspended and not any(map(_is_on_trial, self._tried)):
            now = shell.clock()
            saved = self._trials.popleft()
            self._tried = [each.context for each in saved if each.context._outcome is None]
            restore(shell.run, saved, now)
            shell.run.dirty = True
            self._loop.call_soon(shell.pump)

    def suspend(self) -> None:
        """The run ends early: what it has reached is written down, what ends from here on is not."""
        self.flush()
        self._suspended = True

    async def close(self) -> None:
        """Returns when all that was written down is committed, or can never be. Closing again is harmless."""
        self.flush()
        self._suspended = True
        while self.error is None and self._committed < self._sent:
            if self._idle is None or self._idle.done():
                self._idle = self._loop.create_future()
            await asyncio.shield(self._idle)
        self._release_held()
        self._shell = None
        if self in self.journal.recorders:
            self.journal.recorders.remove(self)
            self._writer.leave(self)

    @property
    def _facts(self) -> Facts | None:
        return None if self._shell is None else self._shell.run.facts

    # --- what others wait for

    def settled(self) -> bool:
        """Whether everything that happened is committed, so that the run may end; a failed journal ends it, too."""
        self._next_trial()
        if self._trials or (self._shell is not None and not self._shell.run.settled()):
            return self.error is not None
        return self.error is not None or not (self._touched or self._held or self._committed < self._sent)

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Calls back when all that has happened until now is committed, in order; or when the journal has failed."""
        wanted = self._sent + (1 if self._touched else 0)
        if self.error is None and (self._held or self._committed < wanted):
            self._held.append((wanted, callback, None))
        else:
            callback()

    async def commit(self) -> None:
        """Returns when all that has happened until now is committed. Raises JournalError."""
        done = self._loop.create_future()

        def tell() -> None:
            if not done.done():
                done.set_result(None)

        self.after_commit(tell)
        await done
        if self.error is not None:
            raise self.error

    def _hold_output(self, emit: Callable[[OutputContext], None], output: OutputContext) -> None:
        wanted = self._sent + (1 if self._touched else 0)
        if self.error is not None:
            return
        if self._held or self._committed < wanted:
            self._held.append((wanted, emit, output))
        else:
            emit(output)

    def _release_held(self) -> None:
        while self._held and (self._held[0][0] <= self._committed or self.error is not None):
            _, call, output = self._held.popleft()
            if output is None:
                call()
            elif self.error is None:
                call(output)

    # --- told by the writer, on its thread

    def committed(self, number: int, rows: int, took_s: float) -> None:
        """Units up to `number` are in the file."""
        self._carry(self._on_committed, number, rows, took_s)

    def failed(self, error: JournalError) -> None:
        """The journal has failed for good."""
        self._carry(self._on_failed, error)

    def _carry(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    def _on_committed(self, number: int, rows: int, took_s: float) -> None:
        before = self._committed
        while self._units and self._units[0][0] <= number:
            self._committed = self._units.popleft()[1]
        tell = None if self._facts is None or self._committed == before else self._facts.journal_committed
        if tell is not None:  # a group may hold units of several runs; each that has some tells of it
            tell(rows, took_s, self._writer.depth)
        self._release_held()
        self._pace()
        self._next_trial()
        self._notify()

    def _on_failed(self, error: JournalError) -> None:
        if self.error is None and self._facts is not None and self._facts.journal_failed is not None:
            self._facts.journal_failed(error)
        self.error = error
        self._suspended = True
        if self._shell is not None:
            self._shell.end_early("journal", error)
        self._release_held()
        self._notify()

    def _notify(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        if self._shell is not None and (self._committed == self._sent or self.error is not None):
            self._shell.kick()

    def _pace(self) -> None:
        """While the journal is behind nothing new enters: its inbox holds a row per living context at most."""
        if self._shell is None or self._slowed == self._writer.behind:
            return
        run = self._shell.run
        self._slowed = not self._slowed
        run.buffered += run.max_live if self._slowed else -run.max_live
        if not self._slowed:
            self._shell.kick()

    # --- facts

    def accepted(self, context: Context, now: float, due: float | None = None) -> None:
        """A submission is accepted, and may wait for room before it enters. Raises EncodingError."""
        data = self.journal.codec.encode(context._data)
        entry = self._enter(context, "input", None, now)
        entry.data = data
        if due is not None and self._shell is not None:
            entry.due = due + self._shell.run.epoch
        self._touch(context)

    def context_entered(self, context: Context, kind: str, maker: Execution | None, now: float) -> None:
        """A context is in the run: a new one gets its key."""
        if self._suspended or hasattr(context, "_entry"):
            return
        entry = self._enter(context, kind, maker, now)
        self._take_data(context, entry)
        self._touch(context)

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        """A context has its outcome."""
        self._touch(context)

    def context_failed(self, context: Context, failure: Failure, execution: Execution | None, now: float) -> None:
        """Why it fails is written down with it."""
        error = failure.exception
        kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
        entry = getattr(context, "_entry", None)
        if entry is not None:
            entry.failed = Failed(failure.task, failure.attempts, kind, _text_of(error))

    def context_stalled(self, context: Context, stall: Stall, now: float) -> None:
        """Why it stalls is written down with it."""
        entry = getattr(context, "_entry", None)
        if entry is not None:
            entry.failed = Failed(stall.task, 0, "stalled", _text_of(stall))

    def context_changed(self, context: Context, now: float) -> None:
        """Another's return, or a freeze, changed it."""
        entry = getattr(context, "_entry", None)
        if entry is not None and not self._suspended and context._outcome is None:
            self._take_data(context, entry)
        self._touch(context)

    def execution_finished(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        """An execution is over: after a success its data counts."""
        context = execution.context
        if self._suspended or context._outcome is not None:
            return
        entry = context._entry
        if outcome == "success":
            self._take_data(context, entry)
            if entry.suspect:
                entry.suspect = entry.started = False
                entry.crashes = 0
        elif outcome == "cancelled" or outcome == "interrupted":
            return
        self._touch(context)

    def observer_failed(self, observer: Observer, fact: str, error: BaseException) -> None:
        """A bug of obsdag's here must not pass for durability: the run ends, as with a disk that fails."""
        if observer is self:
            self._on_failed(JournalError(f"journal {self.journal.path} cannot be written: {fact}: {error!r}"))

    # --- rows

    def _enter(self, context: Context, kind: str, maker: Execution | None, now: float) -> Entry:
        key = self.journal.take_key()
        made_by = context._parent if context._parent is not None else maker.context if maker is not None else None
        above = getattr(made_by, "_entry", None)
        epoch = self._shell.run.epoch if self._shell is not None else 0.0
        entry = Entry(self._writer.store.id, key, key if above is None else above.tree, kind, now + epoch)
        context._entry = entry
        self.keys.add(key)
        return entry

    def _take_data(self, context: Context, entry: Entry) -> None:
        try:
            entry.data = self.journal.codec.encode(dict(context._data))
        except EncodingError as error:
            entry.problem = error

    def _touch(self, context: Context) -> None:
        if self._suspended or context._entry.over:
            return
        self._touched[context] = None
        if not self._asked:
            self._asked = True
            self._loop.call_soon(self._flush_soon)

    def _flush_soon(self) -> None:
        try:
            self.flush()
        except Exception as error:  # a bug of obsdag's must not pass for durability
            self._on_failed(JournalError(f"journal {self.journal.path} cannot be written: {error!r}"))

    def flush(self) -> None:
        """Hands the rows of what was touched to the writer, as one unit; fails contexts that cannot be encoded."""
        self._asked = False
        if self._suspended or not self._touched:
            return
        for context in [each for each in self._touched if each._entry.problem is not None]:
            self._refuse(context)
        rows = [self._row(context) for context in self._touched]
        self._touched.clear()
        self._sent += 1
        self._units.append((self._writer.put(rows), self._sent))
        self._pace()
        self._keep_house()

    def _refuse(self, context: Context) -> None:
        """A context whose data cannot be encoded ends; what that touches is part of the same unit."""
        entry, shell = context._entry, self._shell
        problem, entry.problem = entry.problem, None
        if context._outcome is not None:
            entry.failed = entry.failed or Failed("", 0, "EncodingError", _text_of(problem))
        elif shell is not None and context._run is not None:
            self._asked = True  # no further flush is asked for meanwhile
            now = shell.clock()
            shell.run.fail_context(context, problem, None, now)
            shell.run._settle_all(now)
            self._loop.call_soon(shell.pump)
            self._asked = False

    def _row(self, context: Context) -> Row:
        entry: Entry = context._entry
        outcome, more = context._outcome, context._more
        if more is not None and more.pending_end and outcome is None and context._state == _DISCARDED:
            outcome = more.pending_end
        ended = None
        if outcome is not None:
            ended, entry.over = time.time(), True
            self.keys.discard(entry.key)
        above = None if context._parent is None else getattr(context._parent, "_entry", None)
        body = _encode(self._body(context, entry, more))
        lend = None if more is None or more.lend is None else more.lend.index
        parent = None if above is None else above.key
        head = (entry.key, context.id, self._number, parent, entry.tree, lend, outcome, ended, body)
        data = entry.data
        if entry.over:
            entry.data = None  # nobody writes it down again
        return tuple.__new__(Row, (*head, data, checksum(head, data)))

    def _body(self, context: Context, entry: Entry, more: More | None) -> Body:
        done = self.plan.bit[self.plan.source] if context._run is None else context._done
        key = getattr(context, "_idempotency", None)
        if key == entry.idempotency_key:
            key = None
        rare = None if more is None and not context._frozen else self._rare(context, more)
        watched = entry.crashes, entry.started
        return Body(
            entry.kind, entry.entered, pack_mask(done), rare, entry.failed, key, *watched, entry.due, entry.caller
        )

    def _rare(self, context: Context, more: More | None) -> Rare:
        epoch = self._shell.run.epoch if self._shell is not None else 0.0
        if more is None:
            return Rare(frozen=context._frozen)
        return Rare(
            pack_mask(more.skipped),
            {index: pack_mask(mask) for index, mask in (more.dead or {}).items()},
            dict(more.attempts or {}),
            {index: first + epoch for index, first in (more.first_try or {}).items()},
            {index: (timer.when + epoch, timer.argument[2]) for index, timer in (more.timers or {}).items()},
            [(lend.index, lend.mapped, lend.pulling) for lend in (more.lends or {}).values()],
            {index: pull.items for index, pull in (more.pulls or {}).items()},
            context._frozen and not more.kept,
            None if more.deadline is None else more.deadline.when + epoch,
            more.reason,
        )

    def _keep_house(self) -> None:
        now = time.monotonic()
        if self._writer.store.crashes and now - self._began > _ALIVE_S:
            self._writer.call(Store.end_crash_streak)
        if now - self._pruned > _PRUNE_S:
            self._pruned = now
            self._writer.call(self.journal._prune)


def _text_of(error: object) -> str:
    """What it says of itself, as text that can be written down: with file names, say, that are no UTF-8."""
    try:
        text = str(error)[:_TEXT]
    except Exception:  # an exception whose __str__ raises
        text = f"a {type(error).__qualname__} that cannot be told"
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def _is_on_trial(context: Context) -> bool:
    entry: Entry = context._entry
    return context._outcome is None and entry.suspect and bool(context._running or context._ready)


class WatchfulRecorder(Recorder):
    """While the process dies again and again: a recovered context's start is committed before its function runs."""

    def execution_started(self, execution: Execution, now: float) -> None:
        """Whoever runs when the process dies is known afterwards."""
        entry = getattr(execution.context, "_entry", None)
        if entry is None or not entry.suspect or entry.started or self._suspended:
            return
        self.flush()  # a row of one context alone must not run ahead of what the same turn did to others
        entry.started = True
        self._writer.put([self._row(execution.context)])
        self._writer.call(lambda _: None).result()


def describe_plan(plan: Plan) -> list[list[Any]]:
    """A plan's tasks in order: id, kind, ids of the upstreams; what a changed DAG is compared with."""
    return [
        [task.id, task.kind, [plan.tasks[above].id for above in plan.up_list[index]]]
        for index, task in enumerate(plan.tasks)
    ]
