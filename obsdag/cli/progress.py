"""How a run is shown while it goes on, on standard error: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TextIO

from obsdag.cli.common import shown

__all__ = ["LINE_S", "Bar", "Lines", "Progress", "Silent", "Status", "make_progress"]

LINE_S: Final = 3.0
"""Seconds between plain lines."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a run stands: contexts by how they ended, those that are in it, and the share of all work that is done."""

    outputs: int = 0
    failed: int = 0
    living: int = 0
    fraction: float | None = None

    def told(self, elapsed_s: float, with_living: bool = True) -> str:
        """The numbers, on one line."""
        rate = self.outputs / elapsed_s if elapsed_s > 0 else 0.0
        living = [f"{self.living:,} in flight"] if with_living else []
        return ", ".join([f"{self.outputs:,} out", f"{self.failed:,} failed", *living, f"{rate:,.0f}/s"])


class Progress(Protocol):
    """What a command tells while it works: how the run stands, and lines that stay."""

    def start(self) -> None:
        """Begins to show it."""

    def update(self, status: Status) -> None:
        """Shows how the run stands, if it is time to."""

    def say(self, line: str) -> None:
        """Shows a line."""

    def stop(self) -> None:
        """Ends to show it; again is a no-op."""


class Silent:
    """Shows lines that stay, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def start(self) -> None:
        """Nothing."""

    def update(self, status: Status) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Writes the line."""
        try:
            print(line, file=self.stream, flush=True)
        except (OSError, ValueError):  # nobody reads standard error, or it is closed: that must not end the run
            return

    def stop(self) -> None:
        """Nothing."""


class Lines(Silent):
    """A line every `LINE_S` seconds at most, by the clock that is handed in."""

    def __init__(self, title: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._title = title
        self._clock = clock
        self._started = self._last = clock()

    def start(self) -> None:
        """Time counts from here."""
        self._started = self._last = self._clock()

    def update(self, status: Status) -> None:
        """Writes a line if the last one is long enough ago."""
        now = self._clock()
        if now - self._last < LINE_S:
            return
        self._last = now
        share = "" if status.fraction is None else f"{status.fraction:.0%}, "
        self.say(f"{self._title}: {share}{status.told(now - self._started)}")


class Bar(Silent):
    """A bar that is drawn in place, by rich."""

    def __init__(self, title: str, stream: TextIO) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        super().__init__(stream)
        self._console = Console(file=stream)
        columns: list[Any] = [
            SpinnerColumn(),
            TextColumn("[bold]{task.description}", table_column=_column(max_width=24)),
            BarColumn(bar_width=None, table_column=_column(ratio=1)),
            TextColumn("{task.fields[share]}", justify="right"),
            TextColumn("{task.fields[told]}", style="cyan"),
            TimeElapsedColumn(),
        ]
        self._bar = RichProgress(*columns, console=self._console, expand=True, transient=True, refresh_per_second=8)
        self._task = self._bar.add_task(escape(title), total=None, share="", told="")
        self._started = time.monotonic()

    def start(self) -> None:
        """Draws it."""
        self._started = time.monotonic()
        self._bar.start()

    def update(self, status: Status) -> None:
        """Draws the new state, at rich's own pace."""
        told = status.told(time.monotonic() - self._started, with_living=self._console.width >= 100)
        fields: dict[str, Any] = {"told": told, "share": ""}
        if status.fraction is not None:
            fields |= {"total": 1.0, "completed": status.fraction, "share": f"{status.fraction:.0%}"}
        self._bar.update(self._task, **fields)

    def say(self, line: str) -> None:
        """Writes the line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Removes it."""
        self._bar.stop()


def _column(**options: Any) -> Any:
    from rich.table import Column

    return Column(no_wrap=True, overflow="ellipsis", **options)


def make_progress(title: str, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """What suits standard error: a bar on a terminal where rich is installed, else lines; with `quiet`, neither."""
    stream = stream if stream is not None else sys.stderr
    title = shown(title)
    if quiet:
        return Silent(stream)
    if not stream.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        return Lines(title, stream)
    try:
        return Bar(title, stream)
    except ImportError:
        return Lines(title, stream)
