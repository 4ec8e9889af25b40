"""What the commands share: the one kind of error they report, statuses, and standard output kept for the output."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = [
    "BAD_INPUT",
    "FAILED",
    "INTERRUPTED",
    "OK",
    "CliError",
    "one_line",
    "open_closed_streams",
    "output_descriptor",
    "shown",
]

OK: Final = 0
FAILED: Final = 1  # the command did its work, and some contexts failed or stalled
BAD_INPUT: Final = 2  # the command could not do its work with what it was given
INTERRUPTED: Final = 130


class CliError(Exception):
    """What the user gave cannot be used: one line that names the place and the way out. Exit status 2."""


def one_line(text: object) -> str:
    """`text` on one line, for messages of others that may have several."""
    return " ".join(str(text).split())


def shown(text: str) -> str:
    """`text` on one line and safe to print anywhere: what is not printable is escaped, lone surrogates included."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def open_closed_streams() -> None:
    """Standard output and error that the caller closed become the null device.

    Else the next file that is opened takes their place, and gets what tasks print. `output_descriptor` still knows.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_WRONLY)
        if null != number:
            os.dup2(null, number)
            os.close(null)
        os.set_inheritable(number, True)
        stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for the rest of the process
        setattr(sys, name, stream)
        _was_closed.add(name)


_was_closed: set[str] = set()


@contextmanager
def output_descriptor() -> Iterator[int]:
    """A file descriptor for standard output that is this command's alone.

    Meanwhile whatever else is written to standard output (by a `print` in a task, a library, a child process) goes to
    standard error, so that the output stays readable for a machine. Raises CliError if the caller closed it.
    """
    if "stdout" in _was_closed:
        raise CliError("standard output is closed: give --output FILE")
    sys.stdout.flush()
    kept = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)  # never 0, which may be closed: it would be read as the input
    try:
        os.dup2(2, 1)
        yield kept
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
