"""`obsdag dashboards`: Grafana dashboards, Prometheus rules and the runbook, written from the installed package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from obsdag.cli.common import OK, CliError, shown

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "dashboards",
        help="write dashboards, alert rules and the runbook",
        description="Grafana dashboards, Prometheus rules with their unit tests, configuration to start from, and the"
        " runbook of the alerts.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    export = actions.add_parser(
        "export",
        help="write them into a folder",
        description="Writes them below DIR, which is made if it is not there. Files of the same names are replaced.",
    )
    export.add_argument("folder", metavar="DIR")
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    """Does what the command line asks for; the exit status. Raises CliError."""
    from obsdag.dashboards import export

    if not args.folder:
        raise CliError("DIR is empty: name a folder")
    try:
        written = export(Path(args.folder))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CliError(f"the dashboards cannot be written to {args.folder!r}: {reason}") from error
    print(f"{len(written)} files below {shown(str(args.folder))}; RUNBOOK.md says what goes where")
    return OK
