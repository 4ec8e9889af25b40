"""What a journal knows of a context beside the context itself (`Entry`), and the row that says both (`row_of`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from obsdag.core.base import _DISCARDED
from obsdag.core.records import TimedWait
from obsdag.core.states import State
from obsdag.errors import EncodingError
from obsdag.journal.codec import Body, Failed, Rare, pack_mask
from obsdag.journal.schema import Cells, sealed

if TYPE_CHECKING:
    from obsdag.context import Context
    from obsdag.core.records import More, Wait
    from obsdag.plan import Plan

__all__ = ["Entry", "describe_plan", "failed_of", "is_on_trial", "row_of"]

_encode = msgspec.msgpack.Encoder().encode
_TEXT: Final = 4_000
_WAITS: Final = {State.RETRY_WAIT.value: "retry", State.LIMIT_WAIT.value: "limit"}


class Entry(msgspec.Struct, eq=False, gc=False):
    """What the journal knows of one context: its key and what cannot be read from the context itself.

    token: of the session that gave out its key. data: encoded when one of its executions finished last. crashes,
    started, suspect: see `Body`; a suspect was recovered and has made no progress since. caller: of a submission, see
    `Body`. over: its outcome is written down. problem: why its data has no form, and the task that set it. own_key: its
    idempotency key, if that was asked for before. A struct, since one is made per context and C makes it seven times as
    fast; without cycles, so that the collector need not look at it.
    """

    token: str
    key: int
    tree: int
    kind: str
    entered: float
    data: bytes | None = None
    failed: Failed | None = None
    problem: tuple[EncodingError, str | None] | None = None
    due: float | None = None
    caller: tuple[str, dict[str, str]] | None = None
    crashes: int = 0
    started: bool = False
    suspect: bool = False
    over: bool = False
    own_key: str | None = None

    @property
    def idempotency_key(self) -> str:
        """What `Context.idempotency_key` is, unless it was asked for before the context was accepted."""
        return f"{self.token}-{self.key:x}"


def row_of(context: Context, plan: int, at_source: int | bytes, epoch: float, now: float) -> Cells:
    """The row of a context as it is now; with its outcome it is its last (`Entry.over`).

    plan: its number in the file. at_source: what is done of a context that waits for room. epoch: the zero of the run's
    clock, and now: both Unix seconds.
    """
    entry: Entry = context._entry
    outcome, more, data = context._outcome, context._more, entry.data
    if more is not None and more.pending_end and outcome is None and context._state == _DISCARDED:
        outcome = more.pending_end
    ended = None
    if outcome is not None:
        ended, entry.over, entry.data = now, True, None  # nobody writes it down again
    above = None if context._parent is None else getattr(context._parent, "_entry", None)
    parent = None if above is None else above.key
    run = context._run
    due = None if run is None else run.deadline_of(context)
    lend = rare = None
    if more is not None or due is not None or context._frozen:
        lend = None if more is None or more.lend is None else more.lend.index
        rare = _rare(context, more, epoch, None if due is None else due + epoch)
    done = at_source if run is None else pack_mask(context._done)
    body = _encode(
        Body(
            entry.kind,
            entry.entered,
            done,
            rare,
            entry.failed,
            entry.own_key,
            entry.crashes,
            entry.started,
            entry.due,
            entry.caller,
        )
    )
    return sealed((entry.key, context.id, plan, parent, entry.tree, lend, outcome, ended, body, data))


def _rare(context: Context, more: More | Wait | None, epoch: float, deadline: float | None) -> Rare:
    if more is None:
        return Rare(frozen=context._frozen, deadline=deadline)
    timed = [wait for wait in more.each_wait() if isinstance(wait, TimedWait)]
    return Rare(
        pack_mask(more.skipped),
        {index: pack_mask(mask) for index, mask in (more.dead or {}).items()},
        {wait.index: wait.failed for wait in timed if wait.failed},
        {wait.index: wait.first_started + epoch for wait in timed if wait.failed},
        {wait.index: (wait.due + epoch, _WAITS[wait.state]) for wait in timed if wait.due is not None},
        [(lend.index, lend.mapped, lend.pulling) for lend in (more.lends or {}).values()],
        {index: pull.items for index, pull in (more.pulls or {}).items()},
        context._frozen and not more.kept,
        deadline,
        "" if context._error is not None else more.why,
    )


def failed_of(task: str, attempts: int, error: object) -> Failed:
    """Why a context ended, for its row: an exception, or a stall."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    return Failed(task, attempts, kind if isinstance(error, BaseException) else "stalled", _text_of(error))


def _text_of(error: object) -> str:
    """What it says of itself, as text that can be written down: with file names, say, that are no UTF-8."""
    try:
        text = str(error)[:_TEXT]
    except Exception:  # an exception whose __str__ raises
        text = f"a {type(error).__qualname__} that cannot be told"
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def describe_plan(plan: Plan) -> list[list[Any]]:
    """A plan's tasks in order: id, kind, ids of the upstreams; what a changed DAG is compared with."""
    return [
        [task.id, task.kind, [plan.tasks[above].id for above in plan.up_list[index]]]
        for index, task in enumerate(plan.tasks)
    ]


def is_on_trial(context: Context) -> bool:
    """Whether it was running when the process died, and can be running again now."""
    entry: Entry = context._entry
    return context._outcome is None and entry.suspect and bool(context._running or context._ready)
