"""The command `obsdag`: run a DAG over lines of JSON, draw one, see one at work.

    run     lines of JSON through a DAG        demo        a census of a source tree, or a service under load
    graph   a DAG as a picture                 dashboards  for Grafana and Prometheus
    top     a running program in the terminal  journal     what a journal holds, and what failed in it

Each command has a module with `add_command`, which says what its options are. `target` finds the DAG, `settings` makes
options of the executor's settings, `jsonl` and `files` read and write, `progress` shows. A mistake of the user's is a
`CliError`: one line on standard error and exit status 2.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from textwrap import wrap
from typing import Any, NoReturn

from obsdag import __version__
from obsdag.cli import dashboards, demo, graph, journal, run, top
from obsdag.cli.common import BAD_INPUT, INTERRUPTED, CliError, open_closed_streams

__all__ = ["main"]

_COMMANDS = (run, graph, demo, top, journal, dashboards)
_BROKEN_PIPE = 141  # as the shell reports a command that SIGPIPE ended


class _Parser(argparse.ArgumentParser):
    """Tells mistakes in one line, and keeps the line breaks of its epilog."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        raise CliError(f"{message}; see '{self.prog} --help'")


class _Help(argparse.HelpFormatter):
    """Keeps the lines of descriptions and epilogs, and wraps each of them below its own text."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 28, **options})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = []
        for line in text.splitlines():
            text_at = _TEXT_AT.match(line)
            below = indent + " " * (text_at.end() if text_at else 0)
            lines += wrap(line, width, initial_indent=indent, subsequent_indent=below, break_on_hyphens=False) or [""]
        return "\n".join(lines)


_TEXT_AT = re.compile(r" +(\S+ {2,})?")  # where the text of a line begins, behind a name if it has one


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line (None: that of this process); returns the exit status."""
    name = "obsdag"
    open_closed_streams()
    try:
        args = _parse(sys.argv[1:] if arguments is None else arguments)
        name = f"obsdag {args.name}"
        status: int = args.command(args)
        return status
    except CliError as error:
        _complain(f"{name}: error: {error}")
        return BAD_INPUT
    except BrokenPipeError:
        return _BROKEN_PIPE
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="obsdag", description="Runs data through a DAG of asyncio tasks.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"obsdag {__version__}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        module.add_command(commands)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        own = commands.choices[args.name]
        close = get_close_matches(unknown[0].split("=")[0], own._option_string_actions, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise CliError(f"{args.name}: unknown argument {unknown[0]!r}; {hint}see '{own.prog} --help'")
    return args


_EPILOG = """\
examples:
  obsdag demo
  obsdag run orders:dag -i orders.jsonl -o results.jsonl --workers 8
  obsdag graph orders:dag --format svg --output orders.svg
  obsdag top http://127.0.0.1:9464
"""


def _complain(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # nobody reads it
        return
