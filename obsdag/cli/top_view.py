"""How `obsdag top` looks: a state as lines of text with colors, as many of them as the terminal has room for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from obsdag.cli.common import CliError, shown
from obsdag.ops.words import ago, count, duration, rate, state_name

__all__ = ["Screen"]

_LEVELS: Final = {
    "bad": ("bold red", "\N{MULTIPLICATION X}"),
    "warn": ("yellow", "!"),
    "good": ("green", "\N{CHECK MARK}"),
    "info": ("dim", "\N{MIDDLE DOT}"),
}
_COLORS: Final = {
    "running": "blue",
    "pool_wait": "cyan",
    "queued": "white",
    "service_wait": "magenta",
    "limit_wait": "yellow",
    "retry_wait": "bright_red",
    "join_wait": "bright_magenta",
    "frozen": "bright_cyan",
}
_HEADS: Final = ("running", "waiting", "done", "rate", "mean", "p95", "failed", "retried")
_UNBOUNDED: Final = 10_000  # lines, where nothing has to fit on a screen


class Screen:
    """The state that was taken last, and which of its executors is shown. dag: its name (None: the first)."""

    def __init__(self, found: dict[str, Any], dag: str | None, sort: str) -> None:
        self.sort = sort
        self.lost = ""
        self._live: Live | None = None
        self._number = 0
        self.take(found)
        names = [each["state"]["dag"] for each in found["executors"]]
        if dag is not None:
            if dag not in names:
                raise CliError(f"no executor of a DAG {shown(dag)!r} there: {', '.join(map(shown, names))}")
            self._number = names.index(dag)

    def take(self, found: dict[str, Any]) -> None:
        """A newer state."""
        self._found, self.lost, self._taken = found, "", time.monotonic()

    def turn(self) -> None:
        """On to the next executor."""
        self._number = (self._number + 1) % len(self._found["executors"])

    def print(self, stream: TextIO) -> None:
        """All of it, once; without colors unless `stream` is a terminal."""
        console = Console(file=stream, highlight=False)
        width = console.width if stream.isatty() else 120
        for line in self._lines(width, _UNBOUNDED):
            console.print(line, soft_wrap=True, no_wrap=True, overflow="ignore", crop=False)

    @contextlib.contextmanager
    def shown(self, stream: TextIO) -> Iterator[None]:
        """Takes the terminal's screen, and gives it back as it was."""
        console = Console(file=stream, highlight=False)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            self._live = live
            self.draw()
            yield
        self._live = None

    def draw(self) -> None:
        """Draws what is known now."""
        assert self._live is not None
        console = self._live.console
        lines = islice(self._lines(console.width, console.height), console.height)
        self._live.update(Group(*lines), refresh=True)

    # --- lines

    def _lines(self, width: int, height: int) -> Iterator[Text]:
        now = self._found["at"]
        executor = self._found["executors"][min(self._number, len(self._found["executors"]) - 1)]
        state = executor["state"]
        top = [self._head(state), *_findings(state), Text(), _figures(state), *_states(state, width), Text()]
        yield from (_fit(line, width) for line in top)
        left = height - len(top)
        lists = [_failures(state, now), _joins(state), _slowest(state), _workers(state), _waits(state)]
        wanted = sum(min(len(lines), 6) + 2 for lines in lists if len(lines) > 1)
        tasks = self._tasks(executor, width, max(left - wanted, min(left, 8)))
        yield from tasks
        left -= len(tasks)
        for lines in lists:
            if len(lines) > 1 and left > 2:
                most = len(lines) if height == _UNBOUNDED else min(len(lines), 7, left - 1)
                yield Text()
                yield from (_fit(line, width) for line in lines[:most])
                left -= most + 1

    def _head(self, state: dict[str, Any]) -> Text:
        many = len(self._found["executors"])
        engine = f"{shown(state['engine'])} / " if state["engine"] else ""
        head = Text.assemble((f"{engine}{shown(state['dag'])}", "bold"), f"  {state['phase']}")
        if many > 1:
            head.append(f"  ({self._number + 1} of {many}, n: next)", "dim")
        if self.lost:
            head.append(f"  no answer for {duration(time.monotonic() - self._taken)}: {shown(self.lost)}", "bold red")
        return head

    def _tasks(self, executor: dict[str, Any], width: int, most: int) -> list[Text]:
        columns = {name: n for n, name in enumerate(self._found["columns"])}
        rows = list(zip((node["id"] for node in executor["graph"]), executor["rows"], strict=False))
        rows.sort(key=lambda row: self._order(row, columns))
        name_width = max(width - 9 * len(_HEADS), 12)
        head = f"{f'TASK (by {self.sort})':<{name_width}}" + "".join(f"{name.upper():>9}" for name in _HEADS)
        lines = [Text(head, "dim bold")]
        shown_rows = rows if len(rows) < most else rows[: max(most - 2, 1)]
        floor_s = executor["state"]["floor_s"]
        lines += [_task(name, row, columns, name_width, floor_s) for name, row in shown_rows]
        if len(shown_rows) < len(rows):
            lines.append(Text(f"and {count(len(rows) - len(shown_rows))} more", "dim"))
        return [_fit(line, width) for line in lines]

    def _order(self, row: tuple[str, list[Any]], columns: dict[str, int]) -> Any:
        name, numbers = row
        running, waiting, failed = (numbers[columns[each]] for each in ("running", "waiting", "failed"))
        if self.sort == "activity":
            return -(running + waiting), -(numbers[columns["rate"]] or 0), -failed
        if self.sort == "failed":
            return -failed, -numbers[columns["retried"]]
        return -(numbers[columns["p95_s"]] or 0) if self.sort == "p95" else name


def _fit(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return line


def _findings(state: dict[str, Any]) -> list[Text]:
    found = []
    for level, sentence, _ in state["findings"][:5]:
        style, sign = _LEVELS.get(level, _LEVELS["info"])
        found.append(Text(f"{sign} {shown(sentence)}", style))
    return found


def _figures(state: dict[str, Any]) -> Text:
    counts, capacity = state["counts"], state["capacity"]
    queued = state["lanes"]["new"] + state["lanes"]["continuing"] + state["pending"]
    bad = counts["failed"] + counts["stalled"]
    figures = Text.assemble(
        ("in ", "dim"), f"{rate(state['rate']['entered'])}   ", ("out ", "dim"), f"{rate(state['rate']['ended'])}   ",
        ("living ", "dim"), f"{count(state['living'])}   ", ("queued ", "dim"), f"{count(queued)}   ",
        ("workers ", "dim"), f"{count(state['workers']['busy'])}/{count(capacity['workers'])}   ",
        ("entered ", "dim"), f"{count(counts['entered'])}   ", ("outputs ", "dim"), f"{count(counts['output'])}   ",
    )  # fmt: skip
    figures.append("failed or stalled ", "dim")
    figures.append(count(bad), "bold red" if bad else "")
    return figures


def _states(state: dict[str, Any], width: int) -> list[Text]:
    living = [(name, number) for name, number in state["states"].items() if number]
    total = sum(number for _, number in living)
    if not total:
        return []
    bar, legend = Text(), Text()
    for name, number in living:
        color = _COLORS.get(name, "bright_black")
        bar.append("\N{FULL BLOCK}" * max(round(number / total * min(width, 100)), 1), color)
        legend.append("\N{BLACK SQUARE} ", color)
        legend.append(f"{count(number)} {state_name(name)}  ")
    return [bar, legend]


def _task(name: str, row: list[Any], columns: dict[str, int], width: int, floor_s: float | None) -> Text:
    numbers = {each: row[n] for each, n in columns.items()}
    label = shown(name)
    label = label if len(label) < width else f"{label[: width - 2]}\N{HORIZONTAL ELLIPSIS}"
    line = Text(f"{label:<{width}}")
    for value, style in (
        (count(numbers["running"]), "bold blue" if numbers["running"] else "dim"),
        (count(numbers["waiting"]), "" if numbers["waiting"] else "dim"),
        (count(numbers["executions"]), "" if numbers["executions"] else "dim"),
        (rate(numbers["rate"]), "" if numbers["rate"] else "dim"),
        (duration(numbers["mean_s"]), ""),
        (_quantile(numbers["p95_s"], floor_s), ""),
        (count(numbers["failed"]), "bold red" if numbers["failed"] else "dim"),
        (count(numbers["retried"]), "" if numbers["retried"] else "dim"),
    ):
        line.append(f"{value:>9}", style)
    return line


def _quantile(seconds: float | None, floor_s: float | None) -> str:
    """From buckets: of what is below the first bound, only that is known."""
    if seconds is not None and floor_s is not None and seconds <= floor_s:
        return f"\N{LESS-THAN OR EQUAL TO} {duration(floor_s)}"
    return duration(seconds)


def _title(text: str) -> Text:
    return Text(text, "dim bold")


def _failures(state: dict[str, Any], now: float) -> list[Text]:
    lines = [_title("RECENT FAILURES AND STALLS")]
    for each in state["failures"]:
        style = "yellow" if each["error"] == "stalled" else "red"
        where = f"{ago(each['at'], now):>11}  {shown(each['task'])}  "
        what = (f"{shown(each['error'])}", style)
        lines.append(Text.assemble(where, what, f"  {shown(each['message'])}  ", (shown(each["context"]), "dim")))
    return lines


def _joins(state: dict[str, Any]) -> list[Text]:
    lines = [_title("JOINS THAT WAIT")]
    for each in state["joins"]:
        at = ", ".join(f"{count(number)} at {shown(task)}" for task, number in each["children_at"].items())
        missing = f"; the parent's {', '.join(map(shown, each['missing']))}" if each["missing"] else ""
        pulling = "; its map goes on" if each["pulling"] else ""
        waits = (
            f"{count(each['arrived'])} of {count(each['living'])} arrived{f'; {at}' if at else ''}{missing}{pulling}"
        )
        name = f"{duration(each['waits_s']):>11}  {shown(each['join'] or each['from'])}  {waits}  "
        lines.append(Text.assemble(name, (shown(each["context"]), "dim")))
    return lines


def _slowest(state: dict[str, Any]) -> list[Text]:
    lines = [_title("SLOWEST LIVING CONTEXTS")]
    for each in state["slowest"]:
        shares = sorted(each["ledger"].items(), key=lambda share: -share[1])[:3]
        spent = ", ".join(f"{duration(seconds)} {name.replace('_', ' ')}" for name, seconds in shares)
        what = f"{duration(each['age_s']):>11}  {shown(each['tasks'][0])}: {state_name(each['state'])}  "
        lines.append(Text.assemble(what, (f"{spent}  ", "dim"), (shown(each["context"]), "dim")))
    return lines


def _workers(state: dict[str, Any]) -> list[Text]:
    lines = [_title("WORKERS")]
    for each in state["workers"]["doing"]:
        tasks = ", ".join(map(shown, each["tasks"])) or "between tasks"
        what = f"{duration(each['for_s']):>11}  {each['n']}: {tasks}  "
        lines.append(Text.assemble(what, (shown(each["context"]), "dim")))
    return lines


def _waits(state: dict[str, Any]) -> list[Text]:
    timers, lines = state["timers"], [_title("LIMITS, TIMERS, POOLS")]
    for each in state["limits"]:
        capacity = "" if each["capacity"] is None else f" of {count(each['capacity'])}"
        waiting = (f", {count(each['waiting'])} waiting", "yellow" if each["waiting"] else "dim")
        lines.append(Text.assemble(f"  {shown(each['name'])}: {count(each['in_use'])}{capacity} in use", waiting))
    if timers["armed"]:
        lines.append(Text(f"  {count(timers['armed'])} timers, the next in {duration(timers['next_in_s'])}"))
    for each in state["pools"]:
        busy = f"{count(each['busy'])} of {count(each['size'])} busy, {count(each['queued'])} queued"
        lines.append(Text(f"  {each['pool']} pool: {busy}"))
    return lines
