"""From rows back to contexts: whose outcome is missing, in which DAG they were, what of it is still known.

A DAG that has changed is refused with its differences, unless the caller says what became of its tasks. Tasks that are
new have not been done by any context.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from obsdag.context import Context
from obsdag.core.base import more_of
from obsdag.core.restoring import Saved
from obsdag.errors import JournalError, PlanChangedError, RemoteError
from obsdag.journal.codec import Body, Codec, Rare, mask_of
from obsdag.journal.entries import Entry, describe_plan
from obsdag.journal.schema import Row
from obsdag.journal.store import Store

if TYPE_CHECKING:
    from obsdag.plan import Plan

__all__ = ["Recovery", "Theirs", "load"]

TaskNames = Mapping[str, str | None]
_SUSPECT_CRASHES: Final = 2
_decode = msgspec.msgpack.Decoder(Body).decode


class Recovery:
    """Contexts of a journal, ready to be put into a run: `saved`, in order of key.

    culprits: those that were running too often when the process died. suspects: trees of some that were, repeatedly.
    moved: those that are written down for the DAG as it was, or was called, before. behind_s: by how much the clock is
    behind the latest time in the file: it was set back, and waits would become so much longer. took_s: to read them.
    """

    def __init__(self) -> None:
        self.saved: list[Saved] = []
        self.times: dict[Context, tuple[Rare, float]] = {}
        self.culprits: list[Context] = []
        self.suspects: set[int] = set()
        self.moved: set[Context] = set()
        self.behind_s = self.took_s = 0.0

    @property
    def living(self) -> list[Context]:
        """The contexts that go on."""
        return [each.context for each in self.saved if each.context._outcome is None]

    def on_clock(self, epoch: float) -> list[Saved]:
        """`saved` with its Unix times on the clock of a run whose zero is `epoch`."""
        epoch += self.behind_s
        for saved in self.saved:
            rare, _ = self.times.get(saved.context, (None, 0.0))
            if rare is not None:
                saved.waits = {index: (due - epoch, kind) for index, (due, kind) in saved.waits.items()}
                saved.first_try = {index: first - epoch for index, first in saved.first_try.items()}
                saved.deadline = None if rare.deadline is None else rare.deadline - epoch
        self.times.clear()
        return self.saved


class Theirs(NamedTuple):
    """What living runs of this process are busy with: the keys that they had when it was looked, and all later ones."""

    keys: Collection[int]
    next_key: int

    def __contains__(self, key: object) -> bool:
        return isinstance(key, int) and (key >= self.next_key or key in self.keys)


def load(
    store: Store,
    plan: Plan,
    codec: Codec,
    tasks: TaskNames | None,
    dags: Mapping[str, str],
    taken: Theirs,
    max_crashes: int,
) -> Recovery:
    """Reads what has no outcome, and what it needs of its ended relatives.

    tasks: old task id -> its id now, None if it is gone. dags: old name of a DAG -> its name now. Raises
    PlanChangedError, and JournalError for a row that is damaged or cannot be read.
    """
    began = time.monotonic()
    translations = _translations(store, plan, tasks, dags)
    rows = list(store.rows("tree IN (SELECT tree FROM contexts WHERE outcome IS NULL)"))
    wanted = {row.tree for row in rows if row.outcome is None and row.key not in taken and row.plan in translations}
    rows = [row for row in rows if row.tree in wanted and row.key not in taken]
    for number in {row.plan for row in rows} - translations.keys():  # of before a renaming: the tree has moved since
        translations[number] = _Translation(store.plans()[number], plan, tasks)
    for row in rows:
        _refuse_changed(translations[row.plan], plan)
    if not rows:
        _refuse_renamed(store, plan, dags)
    builder = _Builder(store.tokens(), plan, codec, translations, max_crashes)
    counts = _children_of_lends(rows)
    for row in rows:
        builder.add(row, counts)
    recovery = builder.recovery
    recovery.suspects -= {culprit._entry.tree for culprit in recovery.culprits}
    latest = max([store.last_end(), *(each.context._entry.entered for each in recovery.saved)])
    recovery.behind_s = max(latest - time.time(), 0.0)
    recovery.took_s = time.monotonic() - began
    return recovery


class _Translation:
    """Old masks and indices to those of the plan now; `differences` that nobody has answered for. described: a row of
    `plans`. same: they are those of now; moved: they, or the DAG's name, are not.
    """

    def __init__(self, described: tuple[str, str, str], plan: Plan, tasks: TaskNames | None) -> None:
        _, dag, listed = described
        old: Sequence[Sequence[Any]] = json.loads(listed)
        names = tasks or {}
        self.same = [list(each) for each in old] == describe_plan(plan)
        self.moved = not self.same or dag != plan.name
        self.differences = [] if self.same else _differences(old, plan, names, tasks is not None)
        self.index: dict[int, int] = {}
        for number, (name, *_) in enumerate(old):
            now = names.get(name, name)
            if now is not None and now in plan.index:
                self.index[number] = plan.index[now]

    def mask(self, packed: int | bytes) -> int:
        """The mask over the plan of now."""
        mask = mask_of(packed)
        if self.same:
            return mask
        result = 0
        for old, new in self.index.items():
            if mask >> old & 1:
                result |= 1 << new
        return result

    def keys(self, found: Mapping[int, Any]) -> dict[int, Any]:
        """A mapping by task, over the plan of now."""
        return {self.index[index]: value for index, value in found.items() if index in self.index}


def _translations(
    store: Store, plan: Plan, tasks: TaskNames | None, dags: Mapping[str, str]
) -> dict[int, _Translation]:
    """Of each plan in the journal that is of a DAG of this name, now."""
    found: dict[int, _Translation] = {}
    for number, described in store.plans().items():
        if dags.get(described[1], described[1]) == plan.name:
            found[number] = _Translation(described, plan, tasks)
    return found


def _differences(old: Sequence[Sequence[Any]], plan: Plan, names: TaskNames, lenient: bool) -> list[str]:
    told: list[str] = []
    now = {name: (kind, set(above)) for name, kind, above in describe_plan(plan)}
    seen = set()
    for name, kind, above in old:
        new = names.get(name, name)
        if new is None:
            continue
        seen.add(new)
        if new not in now:
            told.append(f"task {name!r} is gone" if new == name else f"task {name!r} cannot be {new!r}: there is none")
            continue
        was = {renamed for each in above if (renamed := names.get(each, each)) is not None}
        if now[new][0] != kind:
            told.append(f"task {new!r} was {kind}, is {now[new][0]}")
        elif now[new][1] != was and not lenient:
            told.append(f"task {new!r} was after {_listed(was)}, is after {_listed(now[new][1])}")
    if not lenient:
        told += [f"task {name!r} is new" for name in now if name not in seen]
    if told:
        of_then = {name for name, *_ in old}
        unknown = [(name, new) for name, new in names.items() if name not in of_then]
        told += [f"there was no task {name!r} that could be {new!r}" for name, new in unknown]
    return told


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "nothing"


def _refuse_changed(translation: _Translation, plan: Plan) -> None:
    if translation.differences:
        raise PlanChangedError(
            f"DAG {plan.name!r} has changed since its contexts were journalled: {'; '.join(translation.differences)}. "
            "Say what became of its tasks by recover(tasks={'old id': 'new id', 'gone': None}), {} if only new "
            "ones came; in serving, by start(tasks=...)",
            translation.differences,
        )


def _refuse_renamed(store: Store, plan: Plan, dags: Mapping[str, str]) -> None:
    """A DAG that has no contexts here is a renamed one if another name's, with the same tasks, have no outcome yet."""
    counts = store.counts()
    if any(counts.get(plan.name, {}).values()):
        return
    now = describe_plan(plan)
    for _, dag, described in store.plans().values():
        living = counts[dag].get("living", 0)
        if living and dag not in dags and [list(each) for each in json.loads(described)] == now:
            raise PlanChangedError(
                f"journal {store.path} holds {living} unfinished context(s) of DAG {dag!r}, which has the tasks of DAG "
                f"{plan.name!r}: if it was renamed, say SQLiteJournal(..., dags={{{dag!r}: {plan.name!r}}}), "
                f"if it is another one, dags={{{dag!r}: {dag!r}}}",
                [f"DAG {dag!r} is {plan.name!r}"],
            )


def _children_of_lends(rows: Sequence[Row]) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for row in rows:
        if row.parent is not None and row.lend is not None:
            counts[row.parent, row.lend] = counts.get((row.parent, row.lend), 0) + 1
    return counts


class _Builder:
    """Makes contexts of rows, in order of key."""

    def __init__(
        self,
        tokens: Callable[[int], str],
        plan: Plan,
        codec: Codec,
        translations: Mapping[int, _Translation],
        max_crashes: int,
    ) -> None:
        self.recovery = Recovery()
        self._token_of = tokens
        self._plan, self._codec = plan, codec
        self._translations, self._max_crashes = translations, max_crashes
        self._by_key: dict[int, Context] = {}
        self._waiting: dict[int, list[Context]] = {}

    def add(self, row: Row, counts: Mapping[tuple[int, int], int]) -> None:
        """One row: a context, with its place in the tree."""
        body = _decode(row.body)
        context = Context(None, self._data(row))
        context._id = row.id
        self._by_key[row.key] = context
        self._tie(context, row)
        context._entry = entry = Entry(self._token_of(row.key), row.key, row.tree, body.kind, body.entered)
        entry.data, entry.failed, entry.crashes = row.data, body.failed, body.crashes
        entry.due, entry.caller = body.due, body.caller
        if body.key is not None:
            context._idempotency = entry.own_key = body.key
        if row.outcome is not None:
            self._end(context, row, body)
        saved = self._saved(context, row, body, counts)
        self.recovery.saved.append(saved)
        if row.outcome is None:
            self._suspect(context, entry, body)
            if self._translations[row.plan].moved:
                self.recovery.moved.add(context)

    def _data(self, row: Row) -> dict[str, Any]:
        try:
            return {} if row.data is None else self._codec.decode(row.data)
        except Exception as error:  # a pickled value's class is gone, say
            reason = str(error) if isinstance(error, JournalError) else repr(error)
            raise JournalError(f"the data of context {row.id!r} cannot be read: {reason}") from error

    def _tie(self, context: Context, row: Row) -> None:
        """Parents mostly come first; one that entered after its child is tied when it comes."""
        for child in self._waiting.pop(row.key, ()):
            self._adopt(context, child)
        if row.parent is not None:
            parent = self._by_key.get(row.parent)
            if parent is None:
                self._waiting.setdefault(row.parent, []).append(context)
            else:
                self._adopt(parent, context)

    def _adopt(self, parent: Context, child: Context) -> None:
        child._parent = parent
        if parent._children is None:
            parent._children = {}
        parent._children[child] = None

    def _end(self, context: Context, row: Row, body: Body) -> None:
        context._outcome = row.outcome
        if body.rare is not None and body.rare.reason:
            more_of(context).why = body.rare.reason
        if body.failed is not None and row.outcome == "failed":
            context._error = RemoteError(f"{body.failed.kind}: {body.failed.text}")
            more_of(context).why = body.failed.task

    def _suspect(self, context: Context, entry: Entry, body: Body) -> None:
        entry.suspect = True
        entry.crashes = body.crashes + (1 if body.started else 0)
        if entry.crashes >= self._max_crashes:
            self.recovery.culprits.append(context)
        elif entry.crashes >= _SUSPECT_CRASHES:
            self.recovery.suspects.add(entry.tree)

    def _saved(self, context: Context, row: Row, body: Body, counts: Mapping[tuple[int, int], int]) -> Saved:
        now = self._translations[row.plan]
        lend = None if row.lend is None else now.index.get(row.lend)
        saved = Saved(context, body.kind, now.mask(body.done), lend=lend)
        rare = body.rare
        if rare is None or row.outcome is not None:
            return saved
        self.recovery.times[context] = rare, body.entered
        saved.skipped = now.mask(rare.skipped)
        saved.dead = {index: now.mask(mask) for index, mask in now.keys(rare.dead).items()}
        saved.attempts = now.keys(rare.attempts)
        saved.first_try, saved.waits = now.keys(rare.first_try), now.keys(rare.waits)
        saved.lends = [(now.index[i], mapped, pulling) for i, mapped, pulling in rare.lends if i in now.index]
        items = dict(rare.pulls)
        for index, mapped, pulling in rare.lends:
            if mapped and pulling:
                items[index] = max(items.get(index, 0), counts.get((row.key, index), 0))
        saved.pulls = now.keys(items)
        saved.frozen = rare.frozen
        return saved
