"""The recorder: the observer that writes down, per turn of the event loop, what the transitions of a run changed.

All transitions are synchronous on the loop's thread, so the state between two callbacks is consistent. A fact marks its
context as touched; at the end of the turn, or as soon as the writer can use it, `flush` makes one row per touched
context from its state at that moment and hands them to the writer as one unit. Only data is taken earlier: at the
moment an execution has finished, since the next one may already have changed half of it when the turn ends.

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
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

from obsdag.context import Context, OutputContext
from obsdag.core.base import _nobody
from obsdag.core.observer import Observer
from obsdag.errors import EncodingError, JournalError
from obsdag.journal.codec import pack_mask
from obsdag.journal.entries import Entry, describe_plan, failed_of, row_of
from obsdag.journal.restorer import Restorer
from obsdag.journal.store import PRUNED_AT_ONCE, Store

if TYPE_CHECKING:
    from obsdag.core.records import Execution, Failure, Stall
    from obsdag.journal.journal import SQLiteJournal
    from obsdag.plan import Plan
    from obsdag.shell import RunShell

__all__ = ["Recorder"]

_ALIVE_S: Final = 60.0
_PRUNE_S: Final = 300.0
_LOOK_S: Final = 1.0
_UNDER_WAY: Final = 2
"""Units at the writer's: one that it commits, and one that it goes on with."""


class Recorder(Restorer):
    """One per run. Everything here happens on the run's thread, except `committed` and `failed`.

    loop: whose turns make units; None: the running one.
    """

    def __init__(self, journal: SQLiteJournal, plan: Plan, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(journal, loop)
        self.plan = plan
        self.error: JournalError | None = None
        self.left = 0  # contexts of an earlier process that are nobody's business
        self._writer = journal.open_writer()
        self._token, self._encode = self._writer.store.token, journal.codec.encode
        self._at_source = pack_mask(plan.bit[plan.source])
        self._number = 0  # of the plan
        self._touched: dict[Context, None] = {}  # whoever is the first in it asks for `_turn_over`
        self._many = self._writer.most_rows * 7 // 8  # the turn adds some: they go to the writer, however much it has
        self._coming = False  # `_turn_over`, before anything new
        self._urgent = False  # somebody waits for what was touched
        self._refused: deque[Context] = deque()  # their data has no form (`Entry.problem`)
        self._sent = self._committed = 0
        self._units: deque[tuple[int, int]] = deque()  # (the writer's number, ours)
        self._news: deque[tuple[int, int, float]] = deque()  # what `committed` was told
        self._held: deque[tuple[int, deque[Callable[[], None] | OutputContext]]] = deque()  # by the unit they wait for
        self._emit: Callable[[OutputContext], None] = _nobody
        self._idle: asyncio.Future[None] | None = None
        self._slowed = self._lived = False
        self._over = 0  # contexts that ended since it was pruned
        self._pruning: Future[None] = Future()
        self._pruning.set_result(None)
        self._began = self._pruned = self._looked = time.monotonic()

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
        self._emit, shell.run.emit = shell.run.emit, self._hold_output

    def tell_left(self) -> None:
        """The run, which has begun, tells of `left`."""
        tell = None if self._facts is None or not self.left else self._facts.journal_left
        if tell is not None:
            tell(self.left)

    def suspend(self) -> None:
        """The run ends early: what it has reached is written down, what ends from here on is not."""
        self.flush()
        self._suspended = True

    async def close(self) -> None:
        """Returns when all that was written down is committed, or can never be. Closing again is harmless.

        Raises JournalError if the file is not there any more: what was given out as durable is not.
        """
        self.flush()
        self._suspended = True
        while self.error is None and self._committed < self._sent:
            if self._idle is None or self._idle.done():
                self._idle = self._loop.create_future()
            await asyncio.shield(self._idle)
        self._release_held()
        self._shell, self._emit = None, _nobody
        if self in self.journal.recorders:
            self.journal.recorders.remove(self)
            self._writer.leave(self)
            if self.error is None:
                await asyncio.wrap_future(self._writer.call(Store.check_file))

    @property
    def keys(self) -> set[int]:
        """Of contexts that have no outcome and are this run's business; most come and go between two looks."""
        return self.lasting.union(context._entry.key for context in self._touched)

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
            self._hold(wanted, callback)
            self._urgent = True
            if self._touched and not self._coming:
                self._ask()
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

    def _hold_output(self, output: OutputContext) -> None:
        wanted = self._sent + (1 if self._touched else 0)
        if self.error is not None:
            return
        held = self._held
        if held and held[-1][0] == wanted:
            held[-1][1].append(output)
        elif held or self._committed < wanted:
            held.append((wanted, deque((output,))))
        else:
            self._emit(output)

    def _hold(self, wanted: int, waiting: Callable[[], None] | OutputContext) -> None:
        held = self._held
        if held and held[-1][0] == wanted:
            held[-1][1].append(waiting)
        else:
            held.append((wanted, deque((waiting,))))

    def _release_held(self) -> None:
        held = self._held
        while held and (held[0][0] <= self._committed or self.error is not None):
            group = held[0][1]
            while group:
                waiting = group.popleft()
                if not isinstance(waiting, OutputContext):
                    waiting()
                elif self.error is None:
                    self._emit(waiting)
            if held and held[0][1] is group:  # what was called may have released it all
                held.popleft()

    # --- told by the writer, on its thread

    def committed(self, number: int, rows: int, took_s: float) -> None:
        """Units up to `number` are in the file.

        When `_turn_over` is coming anyway the loop need not be woken, which would cost this thread the GIL, up to 5 ms.
        """
        self._news.append((number, rows, took_s))
        if not self._coming:
            self._carry(self._turn_over)

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
        """A submission is accepted, and may wait for room before it enters. due: on the run's clock. Raises
        EncodingError, with nothing changed.
        """
        data = self.journal.codec.encode(context._data)
        entry = self._enter(context, "input", None, now)
        entry.data = data
        if due is not None and self._shell is not None:
            entry.due = due + self._shell.run.epoch
        self._touch(context)

    def context_entered(self, context: Context, kind: str, maker: Execution | None, now: float) -> None:
        """A context is in the run: a new one gets its key."""
        if self._suspended:
            return
        if (context._scope is not None or self._restoring) and hasattr(context, "_entry"):
            return  # a submission, or one of an earlier process; asking each context takes 0.4 us
        entry = self._enter(context, kind, maker, now)
        try:  # `_take_data` and `_touch` written out, here and below: a call each per context
            entry.data = self._encode(context._data.copy())
        except EncodingError as error:
            self._no_form(context, entry, error, None if maker is None else maker.task.id)
        touched = self._touched
        if (not touched or len(touched) == self._many) and not self._coming:
            self._ask()
        touched[context] = None

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        """A context has its outcome."""
        if context not in self._touched:
            self._touch(context)

    def context_failed(self, context: Context, failure: Failure, execution: Execution | None, now: float) -> None:
        """Why it fails is written down with it."""
        entry = getattr(context, "_entry", None)
        if entry is not None:
            entry.failed = failed_of(failure.task, failure.attempts, failure.exception)

    def context_stalled(self, context: Context, stall: Stall, now: float) -> None:
        """Why it stalls is written down with it."""
        entry = getattr(context, "_entry", None)
        if entry is not None:
            entry.failed = failed_of(stall.task, 0, stall)

    def context_changed(self, context: Context, now: float) -> None:
        """Another's return, or a freeze, changed it."""
        entry = getattr(context, "_entry", None)
        if entry is None:
            return
        if not self._suspended and context._outcome is None:
            self._take_data(context, entry, None)
        self._touch(context)

    def execution_finished(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        """An execution is over: after a success its data counts."""
        context = execution.context
        if self._suspended or context._outcome is not None:
            return
        entry = context._entry
        if outcome == "success":
            try:
                entry.data = self._encode(context._data.copy())
            except EncodingError as error:
                self._no_form(context, entry, error, execution.task.id)
            if entry.suspect:
                entry.suspect = entry.started = False
                entry.crashes = 0
        elif outcome == "cancelled" or outcome == "interrupted":
            return
        else:
            entry.started = False  # it did not kill the process this time, and may wait for long
        if context not in self._touched:
            self._touch(context)

    def observer_failed(self, observer: Observer, fact: str, error: BaseException) -> None:
        """A bug of obsdag's here must not pass for durability: the run ends, as with a disk that fails."""
        if observer is self:
            self._on_failed(JournalError(f"journal {self.journal.path} cannot be written: {fact}: {error!r}"))

    # --- rows

    def _enter(self, context: Context, kind: str, maker: Execution | None, now: float) -> Entry:
        key = tree = self.journal.next_key
        self.journal.next_key += 1
        made_by = context._parent if context._parent is not None else maker.context if maker is not None else None
        if made_by is not None and (above := getattr(made_by, "_entry", None)) is not None:
            tree = above.tree
        epoch = self._shell.run.epoch if self._shell is not None else 0.0
        context._entry = entry = Entry(self._token, key, tree, kind, now + epoch)
        if Context._keys_asked_early:
            entry.own_key = getattr(context, "_idempotency", None)
        return entry

    def _no_form(self, context: Context, entry: Entry, error: EncodingError, task: str | None) -> None:
        entry.problem = error.with_traceback(None), task
        self._refused.append(context)
        if not (self._coming or self._suspended):
            self._ask()  # it ends with this turn, however slow the disk is

    def _take_data(self, context: Context, entry: Entry, task: str | None) -> None:
        try:
            entry.data = self._encode(context._data.copy())
        except EncodingError as error:
            self._no_form(context, entry, error, task)

    def _touch(self, context: Context) -> None:
        if self._suspended or context._entry.over:
            return
        touched = self._touched
        if (not touched or len(touched) == self._many) and not self._coming:
            self._ask()
        touched[context] = None

    def _ask(self) -> None:
        self._coming = True
        self._loop.call_soon(self._turn_over)

    def _turn_over(self) -> None:
        """Hears what was committed, and flushes unless two units are on their way: the next news will do it then.

        The writer has always one to go on with, and what changes meanwhile is one row in the end. Where somebody waits
        for an answer, as in serving, each turn is a unit: a commit sooner is an answer sooner.
        """
        self._coming = False  # before the news are read: what the writer adds after that wakes the loop
        try:
            while self._news:
                self._on_committed(*self._news.popleft())
            if self._urgent or self._refused or len(self._units) < _UNDER_WAY or len(self._touched) >= self._many:
                self.flush()
        except Exception as error:  # a bug of obsdag's must not pass for durability
            self._on_failed(JournalError(f"journal {self.journal.path} cannot be written: {error!r}"))

    def flush(self) -> None:
        """Hands the rows of what was touched to the writer, as one unit; fails contexts that cannot be encoded."""
        if self._suspended or not self._touched:
            return
        while self._refused:
            self._refuse(self._refused.popleft())
        self._hand_over()

    def _hand_over(self) -> None:
        now = time.time()
        number, at_source = self._number, self._at_source
        epoch = self._shell.run.epoch if self._shell is not None else 0.0
        rows = [row_of(context, number, at_source, epoch, now) for context in self._touched]
        over = [row[0] for row in rows if row[6] is not None]
        self._over += len(over)
        if self.lasting:
            self.lasting.difference_update(over)
        if len(over) < len(rows):
            self.lasting.update(row[0] for row in rows if row[6] is None)
        self._touched.clear()
        self._urgent = False
        self._sent += 1
        self._units.append((self._writer.put(rows), self._sent))
        self._pace()
        self._keep_house()

    def _refuse(self, context: Context) -> None:
        """A context whose data cannot be encoded ends; what that touches is part of the same unit."""
        entry, shell = context._entry, self._shell
        found, entry.problem = entry.problem, None
        if found is None or entry.over:
            return
        problem, task = found
        if context._outcome is not None:
            entry.failed = entry.failed or failed_of(task or "", 0, problem)
        elif shell is not None and context._run is not None:
            now = shell.clock()
            shell.run.fail_context(context, problem, None, now, task)
            shell.run._settle_all(now)
            self._loop.call_soon(shell.pump)

    def _keep_house(self) -> None:
        now = time.monotonic()
        if self._writer.store.crashes and not self._lived and now - self._began > _ALIVE_S:
            self._lived = True
            self._writer.call(Store.end_crash_streak)
        if now - self._looked > _LOOK_S:
            self._looked = now
            self._writer.look()
        if now - self._pruned > _PRUNE_S or (self._over >= PRUNED_AT_ONCE and self._pruning.done()):
            self._pruned, self._over = now, 0
            self._pruning = self._writer.call(self.journal._prune)
