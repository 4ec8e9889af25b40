"""What the commands share: the one kind of error they report, statuses, and standard output kept for the output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "OK", "CliError", "one_line", "output_descriptor", "shown"]

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


@contextmanager
def output_descriptor() -> Iterator[int]:
    """A file descriptor for standard output that is this command's alone.

    Meanwhile whatever else is written to standard output (by a `print` in a task, a library, a child process) goes to
    standard error, so that the output stays readable for a machine.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield kept
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
