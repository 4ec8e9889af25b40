"""The driver's journal: which roots were accepted, and what became of them. What happens inside of one is not in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from obsdag.context import Context
from obsdag.errors import JournalError

if TYPE_CHECKING:
    from obsdag.journal.recover import Recovery
    from obsdag.plan import Plan

__all__ = ["found"]


def found(recorder: Any, recovery: Recovery, plan: Plan) -> list[Context]:
    """What an earlier process had accepted, and what has no outcome: it is the business of this run from now on.

    Raises JournalError for contexts with progress, which a local executor has written down and can go on with.
    """
    contexts = []
    for saved in recovery.saved:
        context = saved.context
        is_root = context._parent is None and context._entry.key == context._entry.tree
        if not is_root or saved.done & ~plan.bit[plan.source]:
            raise JournalError(
                f"context {context.id!r} was begun by a local executor, whose journal knows more of it than shards can "
                "go on with: let an Executor or ServeExecutor recover it"
            )
        contexts.append(context)
    if contexts:
        from obsdag.telemetry.carrier import restore_callers

        restore_callers(contexts)
    recorder.lasting.update(context._entry.key for context in contexts)
    recorder.journal.recovered += len(contexts)
    recorder.journal.replayed += len(contexts)
    return contexts
