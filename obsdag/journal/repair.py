"""A journal by hand: what is in it, what failed, and once more what failed.

All on an open `Store` (`look=True`) of a file that no process has open.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import msgspec

from obsdag.errors import EncodingError, JournalError
from obsdag.journal.codec import Body, Codec, Rare, mask_of
from obsdag.journal.schema import Row, sealed, storable_id
from obsdag.journal.store import Store

__all__ = ["FAILED", "Retried", "describe", "records", "retry"]

FAILED: Final = ("failed", "stalled")
_REVIVED: Final = (*FAILED, "cancelled")
_NO_FORM: Final = f"{EncodingError.__module__}.{EncodingError.__qualname__}"
_decode = msgspec.msgpack.Decoder(Body).decode


class Retried(NamedTuple):
    """Ids of the topmost contexts that are run again, and of those that cannot be, as their data is not in the file."""

    again: list[str]
    never: list[str]


def records(
    store: Store,
    where: str = "1",
    values: Sequence[object] = (),
    damaged: Callable[[JournalError], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows as mappings for people and for JSON: ids and names instead of numbers and masks. For what is asked and what
    becomes of damaged ones, see `Store.rows`.
    """
    codec, plans = Codec(), _readable_plans(store)
    for row in store.rows(where, values, damaged):
        if row.plan in plans:
            yield describe(row, codec, *plans[row.plan])
            continue
        error = store.damage(row, "is of a plan that cannot be read")
        if damaged is None:
            raise error
        damaged(error)


def _readable_plans(store: Store) -> dict[int, tuple[str, list[str]]]:
    plans = {}
    for number, (_, dag, tasks) in store.plans().items():
        with suppress(ValueError, TypeError, LookupError):  # it is damaged
            plans[number] = (dag, [each[0] for each in json.loads(tasks)])
    return plans


def describe(row: Row, codec: Codec, dag: str, tasks: Sequence[str]) -> dict[str, Any]:
    """One row: key, id, dag, parent and tree (keys), outcome, done and skipped (task ids), times, error, data."""
    body = _decode(row.body)
    done, skipped = mask_of(body.done), mask_of(body.rare.skipped) if body.rare is not None else 0
    told: dict[str, Any] = {"key": row.key, "id": row.id, "dag": dag, "parent": row.parent, "tree": row.tree}
    told |= {"outcome": row.outcome, "entered": body.entered, "ended": row.ended}
    told["done"] = [name for index, name in enumerate(tasks[1:-1], 1) if (done & ~skipped) >> index & 1]
    told["error"] = None
    if body.failed is not None:
        error = body.failed
        told["error"] = {"task": error.task, "attempts": error.attempts, "type": error.kind, "text": error.text}
    try:
        told["data"] = None if row.data is None else codec.decode(row.data)
    except JournalError as obstacle:
        told["data"], told["note"] = None, str(obstacle)
    return told


def retry(store: Store, ids: Collection[str] = ()) -> Retried:
    """Takes the outcome of failed and stalled contexts back, so that `recover` runs them again from where they failed.

    ids: only these; none: all. With a context go those of its descendants that it took with it, and if the data of one
    of them had no form, which it failed by, all of them stay as they are. Ids are in order of key.
    """
    wanted = "outcome IN (?, ?)" + (f" AND id IN ({', '.join('?' * len(ids))})" if ids else "")
    found = store.rows(f"tree IN (SELECT tree FROM contexts WHERE {wanted})", (*FAILED, *map(storable_id, ids)))
    rows = {row.key: row for row in found}
    chosen = [row for row in rows.values() if row.outcome in FAILED and (not ids or row.id in ids)]
    children: dict[int, list[int]] = {}
    for row in rows.values():
        if row.parent is not None:
            children.setdefault(row.parent, []).append(row.key)
    revived: dict[int, Row] = {}
    never: dict[int, str] = {}
    for row in chosen:
        if row.key in revived or row.key in never:
            continue
        taken = [row.key]
        for key in taken:  # grows while it is walked
            taken.extend(child for child in children.get(key, ()) if rows[child].outcome in _REVIVED)
        if any(_had_no_form(rows[key]) for key in taken):
            never[row.key] = row.id
        else:
            revived |= {key: _revive(rows[key]) for key in taken}
    if revived:
        store.commit(list(revived.values()))
    return Retried([row.id for row in chosen if row.key in revived and row.parent not in revived], list(never.values()))


def _had_no_form(row: Row) -> bool:
    failed = _decode(row.body).failed
    return failed is not None and failed.kind == _NO_FORM


def _revive(row: Row) -> Row:
    body = _decode(row.body)
    rare = body.rare or Rare()
    rare = msgspec.structs.replace(rare, attempts={}, first_try={}, waits={}, frozen=False, deadline=None, reason="")
    body = msgspec.structs.replace(body, rare=rare, failed=None, crashes=0, started=False, due=None)
    return Row._make(sealed(row._replace(outcome=None, ended=None, body=msgspec.msgpack.encode(body))[:-1]))
