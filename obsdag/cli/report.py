"""The report at the end of `obsdag demo`: with rich on a terminal, else as plain text of the same parts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from textwrap import wrap
from typing import Any, TextIO

from obsdag.cli.common import shown

__all__ = ["Part", "parts", "print_report", "seconds", "size"]

_EXAMPLES = 8
_INDENT = 2
_NARROW = 6
_WORTH_TELLING_S = 0.001
_NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, slots=True)
class Part:
    """A table of the report, or lines without columns. numbers: the columns aligned to the right. notes: below."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: frozenset[int] = frozenset()
    notes: list[str] = field(default_factory=list)
    alarm: bool = False


def seconds(value: float) -> str:
    """A duration for people: "1.24 s", "35 ms", "0.4 ms", "27 us"."""
    if value >= 100:
        return f"{value:,.0f} s"
    if value >= 1:
        return f"{value:.2f} s"
    if value >= 0.0001:
        return f"{value * 1000:.0f} ms" if value >= 0.01 else f"{value * 1000:.1f} ms"
    return f"{value * 1e6:.0f} us" if value else "0 s"


def size(value: float) -> str:
    """A number of bytes for people: "31.5 MB"."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def parts(facts: Mapping[str, Any], files: list[str]) -> Iterator[Part]:
    """The report's parts, top down."""
    yield _outcomes(facts)
    if facts["failures"]:
        yield _failures(facts)
    if facts["unexpected_failures"]:
        more = facts["unexpected_failures"] - len(facts["unexpected"])
        notes = [f"and {more:,} more, in failures.jsonl"] if more else []
        rows = [(shown(line),) for line in facts["unexpected"]]
        yield Part("Unexpected: these are bugs", (), rows, notes=notes, alarm=True)
    yield _found(facts["census"])
    yield _tasks(facts["tasks"])
    if facts["ledger"]:
        yield _ledger(facts["ledger"])
    if facts["slowest"]:
        yield _slowest(facts["slowest"])
    yield Part("Written", (), [(shown(file),) for file in files])


def _headline(facts: Mapping[str, Any]) -> str:
    files = facts["outcomes"]["output"] + facts["outcomes"]["failed"]
    took = max(facts["seconds"], 1e-3)
    lines = facts["census"]["lines"] if facts["census"]["files"] else 0
    return (
        f"{files:,} files below {shown(facts['folder'])} in {seconds(facts['seconds'])}: "
        f"{files / took:,.0f} files and {lines / took:,.0f} lines per second"
    )


_MEANING = {
    "output": "went all the way",
    "split": "the walk through the folder, which became the files",
    "dropped": "discarded by a task",
    "cancelled": "did not end in time",
    "stalled": "could not go on",
}


def _outcomes(facts: Mapping[str, Any]) -> Part:
    expected = facts["expected_failures"]
    kinds = [f"{number:,} {kind}" for kind, number in sorted(expected.items())]
    told = f"expected of real files: {', '.join(kinds)}" if kinds else "none"
    if facts["unexpected_failures"]:
        told += f"; {facts['unexpected_failures']:,} UNEXPECTED"
    meaning = _MEANING | {"failed": told}
    rows = [(name, f"{number:,}", meaning[name]) for name, number in facts["outcomes"].items()]
    notes = []
    hiccups = facts["retries"].get("Hiccup", 0)
    if hiccups:
        notes.append(f"register failed {hiccups:,} times on purpose (for one file in 16, by digest) and was retried.")
    return Part(_headline(facts), ("outcome", "contexts", "what that means"), rows, frozenset({1}), notes)


def _failures(facts: Mapping[str, Any]) -> Part:
    found = facts["failures"]
    rows = [(each["kind"], each["file"], shown(each["error"])) for each in found[:_EXAMPLES]]
    more = sum(facts["expected_failures"].values()) - len(rows)
    notes = [f"and {more:,} more, in failures.jsonl"] if more else []
    return Part("Expected failures", ("kind", "file", "why"), rows, notes=notes)


def _found(census: Mapping[str, Any]) -> Part:
    if not census["files"]:
        return Part("Found", (), [("no file that could be counted",)])
    verdicts = ", ".join(f"{number:,} {verdict}" for verdict, number in census["verdicts"].items())
    rows = [
        ("files", f"{census['files']:,} ({verdicts}); {census['files_equal_to_another']:,} equal to another one"),
        (
            "size",
            f"{size(census['bytes'])} in {census['lines']:,} lines: {census['code_lines']:,} with code, "
            f"{census['comment_lines']:,} with a comment",
        ),
        ("contents", f"{census['functions']:,} functions, {census['classes']:,} classes, {census['tokens']:,} tokens"),
    ]
    if census["most_imported"]:
        most = list(census["most_imported"].items())[:6]
        rows.append(("imported most", ", ".join(f"{name} ({number:,})" for name, number in most)))
    if census["longest_functions"]:
        longest = census["longest_functions"][0]
        where = f"{longest['function']}, {longest['lines']:,} lines, in {shown(longest['file'])}"
        rows.append(("longest function", where))
    return Part("Found", (), rows)


def _tasks(tasks: Mapping[str, Mapping[str, Any]]) -> Part:
    whole = sum(numbers["seconds"] for numbers in tasks.values()) or 1.0
    rows = []
    for name, numbers in sorted(tasks.items(), key=lambda item: -item[1]["seconds"]):
        runs = numbers["executions"]
        mean = seconds(numbers["seconds"] / runs) if runs else ""
        share = numbers["seconds"] / whole
        rows.append(
            (name, numbers["runs_on"], f"{runs:,}", seconds(numbers["seconds"]), mean, f"{share:.0%}", _bar(share))
        )
    columns = ("task", "where", "runs", "time", "mean", "share", "")
    return Part("Tasks by time (waiting for a thread or process included)", columns, rows, frozenset({2, 3, 4, 5}))


_STATES = {
    "running": "some task ran, in a thread or process too",
    "pool_wait": "waited for a free thread or process",
    "queued": "waited for a worker, or for its turn on it",
    "limit_wait": "waited for one of the limits of its next task",
    "retry_wait": "waited for the next attempt",
}


def _ledger(ledger: Mapping[str, float]) -> Part:
    whole = sum(ledger.values()) or 1.0
    rows = [
        (state, _STATES.get(state, ""), seconds(value), f"{value / whole:.0%}", _bar(value / whole))
        for state, value in sorted(ledger.items(), key=lambda item: -item[1])
    ]
    columns = ("state", "a file", "time", "share", "")
    return Part("Where the time of all files went", columns, rows, frozenset({2, 3}))


def _bar(share: float) -> str:
    return "#" * round(share * 10)


def _slowest(slowest: list[Mapping[str, Any]]) -> Part:
    rows = []
    for slow in slowest:
        ledger = sorted(slow["ledger"].items(), key=lambda item: -item[1])
        where = ", ".join(_whole(f"{state} {seconds(value)}") for state, value in ledger if value >= _WORTH_TELLING_S)
        path = " > ".join(_step(step["task"], step["seconds"]) for step in slow["critical_path"])
        rows.append((slow["context"], seconds(slow["seconds"]), where, path))
    return Part("Slowest contexts", ("context", "took", "where the time went", "critical path"), rows, frozenset({1}))


def _step(task: str, took_s: float) -> str:
    return _whole(f"{task} {seconds(took_s)}") if took_s >= _WORTH_TELLING_S else task


def _whole(text: str) -> str:
    """The text as one word, for those who wrap; who prints it undoes it."""
    return text.replace(" ", _NO_BREAK)


# --- drawing


def print_report(facts: Mapping[str, Any], files: list[str], stream: TextIO) -> None:
    """Writes the report. What the stream's encoding cannot show is escaped."""
    found = list(parts(facts, files))
    if stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        try:
            _print_rich(found, stream)
            return
        except ImportError:
            pass
    text = "\n\n".join("\n".join(_plain(part, _width(stream))) for part in found)
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def _width(stream: TextIO) -> int:
    """Of the terminal; for a pipe or file what COLUMNS says, or 100."""
    if stream.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return max(40, shutil.get_terminal_size().columns)
    return 100


def _plain(part: Part, width: int) -> Iterator[str]:
    yield from wrap(part.title, width, break_on_hyphens=False)
    rows = [part.columns, *part.rows] if part.columns else list(part.rows)
    widths = _fitted([max(map(len, column)) for column in zip(*rows, strict=True)], width - _INDENT, part.numbers)
    for row in rows:
        cells = [wrap(cell, size, break_on_hyphens=False) or [""] for cell, size in zip(row, widths, strict=True)]
        for line in zip_longest(*cells, fillvalue=""):
            sides = [
                (text.rjust(size) if i in part.numbers else text.ljust(size)).replace(_NO_BREAK, " ")
                for i, (text, size) in enumerate(zip(line, widths, strict=True))
            ]
            yield (" " * _INDENT + "  ".join(sides)).rstrip()
    for note in part.notes:
        yield from wrap(note, width, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)


def _fitted(widths: list[int], room: int, numbers: Collection[int]) -> list[int]:
    """Widths of columns, two apart, that fit into `room`: the widest column of text gives way, while it is wide."""
    widths = list(widths)
    while sum(widths) + 2 * (len(widths) - 1) > room:
        widest = max((i for i in range(len(widths)) if i not in numbers), key=widths.__getitem__, default=None)
        if widest is None or widths[widest] <= _NARROW:
            break
        widths[widest] -= 1
    return [max(1, each) for each in widths]


def _print_rich(found: list[Part], stream: TextIO) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    for number, part in enumerate(found):
        before = found[number - 1]
        if not number or before.notes or not before.columns:  # a table with a head brings its own empty line
            console.print()
        console.print(Text(part.title, style="bold red" if part.alarm else "bold"))
        if part.columns or any(len(row) > 1 for row in part.rows):
            console.print(_rich_table(part))
        else:
            for row in part.rows:
                console.print(Text(f"  {row[0]}", style="red" if part.alarm else ""), soft_wrap=True)
        for note in part.notes:
            console.print(Text(f"  {note}", style="dim"))


def _rich_table(part: Part) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD if part.columns else None, show_header=bool(part.columns))
    for i in range(max(map(len, part.rows), default=0)):
        title = part.columns[i] if part.columns else ""
        is_number = i in part.numbers
        style = "cyan" if i == 0 else "green" if part.columns and not title else ""
        table.add_column(
            title, justify="right" if is_number else "left", style=style, no_wrap=is_number, overflow="fold"
        )
    for row in part.rows:
        table.add_row(*(Text(cell.replace(_NO_BREAK, " ")) for cell in row))
    return table
