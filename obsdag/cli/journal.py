"""`obsdag journal`: what is in a journal, what failed in it, once more what failed, and all of it as lines of JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from obsdag.cli.common import FAILED, OK, CliError, one_line, shown
from obsdag.errors import ObsdagError

if TYPE_CHECKING:
    from obsdag.journal.store import Store

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "journal",
        help="look into a journal, run again what failed",
        description=_ALONE,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, command, text in (
        ("show", show, "how many contexts live and ended how; with ID, how far those of that id have come"),
        ("failed", failed, "what failed or stalled, each with its error"),
        ("retry", retry, "take the outcome of what failed back: the next recovery runs it from where it failed"),
        ("export", export, "every context as a line of JSON"),
    ):
        description = f"{text[0].upper()}{text[1:]}.\n{_EXPORTED if name == 'export' else ''}{_ALONE}"
        action = actions.add_parser(name, help=text, description=description)
        action.add_argument("file", metavar="FILE", help="the path that SQLiteJournal has")
        if name in ("show", "retry"):
            action.add_argument("ids", metavar="ID", nargs="*", help="of a context; none: all")
        action.set_defaults(command=command)


_ALONE = (
    "A command opens the file alone: stop the service that has it open first. "
    "To look, it is enough to have the right to read it."
)
_EXPORTED = (
    'NaN and infinities are text ("NaN", "Infinity", "-Infinity"), and so is what else JSON has no form of: dates, '
    "bytes, whole numbers of more than 64 bits. Tuples and sets are lists; a mapping with keys that are alike as text "
    "is a list of pairs. A damaged row is told of on standard error and left out; the exit status is 1 then.\n"
)


@contextmanager
def _opened(path: str) -> Iterator[Store]:
    """An open store; its errors are the command's. What needs the extra is imported inside, where it is there."""
    try:
        from obsdag.journal.store import Store
    except ImportError as error:
        raise CliError(str(error)) from None
    store = Store(path, look=True)
    try:
        store.open()
        yield store
    except ObsdagError as error:
        raise CliError(one_line(error)) from error
    finally:
        store.close()


class _Damage:
    """Told of damaged rows, which are left out; the exit status of a command that met some."""

    def __init__(self) -> None:
        self.status = OK

    def __call__(self, error: ObsdagError) -> None:
        self.status = FAILED
        print(f"obsdag journal: {one_line(error)}; it is left out", file=sys.stderr)


def show(args: argparse.Namespace) -> int:
    """Counts, or the contexts of the given ids and what was made from them."""
    with _opened(args.file) as store:
        from obsdag.journal.repair import records

        if not args.ids:
            _show_counts(args.file, store.counts())
            if store.get("open"):
                print(f"process {store.get('open')} died with it open; deaths in a row before: {store.get('crashes')}")
            return OK
        where, values = _of_ids(store, args)
        damage = _Damage()
        for each in records(store, f"tree IN (SELECT tree FROM contexts WHERE {where})", values, damage):
            print(_line(each, f"done: {', '.join(map(shown, each['done'])) or 'nothing'}"))
    return damage.status


def _of_ids(store: Store, args: argparse.Namespace) -> tuple[str, list[str | bytes]]:
    """A condition for the rows of the given ids, and its values. Raises CliError for ids that are in no row."""
    where = f"id IN ({', '.join('?' * len(args.ids))})"
    from obsdag.journal.schema import storable_id

    ids = [storable_id(each) for each in args.ids]
    if missing := set(args.ids) - {row.id for row in store.rows(where, ids)}:
        raise CliError(f"{shown(args.file)} has no context of id {', '.join(map(repr, sorted(missing)))}")
    return where, ids


def _show_counts(file: str, counts: dict[str, dict[str, int]]) -> None:
    total = sum(sum(each.values()) for each in counts.values())
    print(f"{shown(file)}: {total} contexts of {len(counts)} DAG(s)")
    for dag, found in counts.items():
        print(f"{shown(dag)}: {', '.join(f'{number} {outcome}' for outcome, number in found.items()) or 'none'}")


def failed(args: argparse.Namespace) -> int:
    """The dead letters."""
    damage = _Damage()
    with _opened(args.file) as store:
        from obsdag.journal import repair

        for each in repair.records(store, "outcome IN (?, ?)", repair.FAILED, damage):
            error = each["error"] or {"task": "?", "attempts": 0, "type": "unknown", "text": ""}
            tried = f"at {error['task']} after {error['attempts']} attempt(s): {error['type']}: {error['text']}"
            print(_line(each, shown(one_line(tried))))
    return damage.status


def retry(args: argparse.Namespace) -> int:
    """Takes outcomes back."""
    with _opened(args.file) as store:
        from obsdag.journal import repair

        _of_ids(store, args)
        again, never = repair.retry(store, args.ids)
        if missing := set(args.ids) - {*again, *never}:
            print(f"not failed, or part of another that is retried: {', '.join(map(shown, sorted(missing)))}")
    print(f"{len(again)} context(s) go on at the next recovery")
    if never:
        names = ", ".join(map(shown, never))
        print(
            f"left as they are, since their data had no form and is not here (enter them anew): {names}",
            file=sys.stderr,
        )
    return FAILED if never else OK


def export(args: argparse.Namespace) -> int:
    """Lines of JSON; what JSON does not know is text."""
    sys.setrecursionlimit(10_000)  # the codec takes data of nearly a thousand levels; a level is two calls here
    damage = _Damage()
    with _opened(args.file) as store:
        from obsdag.journal.repair import records

        for each in records(store, damaged=damage):
            print(json.dumps(_plain(each), ensure_ascii=True, allow_nan=False))
    return damage.status


def _line(record: dict[str, Any], rest: str) -> str:
    when = record["ended"] or record["entered"]
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))
    return f"{moment}  {record['outcome'] or 'living'}  {shown(record['id'])}  {rest}"


def _plain(value: Any) -> Any:
    """A value as a strict parser of JSON takes it, whatever depth and keys it has."""
    if isinstance(value, dict):
        return _plain_dict(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, str):  # with half a surrogate, say
        return value if value.isascii() else value.encode(errors="backslashreplace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, int) and value not in _INT64:
        return str(value) if value.bit_length() < _LONG_BITS else hex(value)
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _plain_dict(value: dict[Any, Any]) -> Any:
    plain = {}
    for key, each in value.items():
        name = _plain(key)
        plain[name if isinstance(name, str) else _key_text(key)] = _plain(each)
    if len(plain) < len(value):  # keys that are alike as text
        return [[_plain(key), _plain(each)] for key, each in value.items()]
    return plain


def _key_text(key: Any) -> str:
    try:
        return str(key)
    except ValueError:  # a tuple with a whole number that Python refuses to write
        return json.dumps(_plain(key))


_INT64 = range(-(1 << 63), 1 << 64)
_LONG_BITS = 14_000  # Python refuses to write more than 4300 digits
