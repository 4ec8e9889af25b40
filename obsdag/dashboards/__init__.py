"""Dashboards, alert rules and configuration for them: `obsdag dashboards export DIR` writes them, wherever obsdag is.

    panels   queries and panels as data, described from the catalogue     boards    the four dashboards
    rules    recording and alert rules, and the runbook's table           grafana   boards as JSON (needs the SDK)

The files themselves are kept in `dashboards/` of the repository, which the wheel takes along. What is generated there
is made anew by `python -m obsdag.dashboards`, and a test fails when they differ.
"""

from __future__ import annotations

import shutil
from pathlib import Path

__all__ = ["PARTS", "export", "folder"]

PARTS = ("RUNBOOK.md", "TELEMETRY.md", "alertmanager", "grafana", "jaeger", "prometheus")
"""What the wheel takes along and `export` writes; pictures for the README are not among it."""


def folder() -> Path:
    """Where the files are: in the installed package, or in the source tree beside it. Raises FileNotFoundError."""
    packed = Path(__file__).with_name("data")
    found = packed if packed.is_dir() else Path(__file__).resolve().parents[2] / "dashboards"
    if not (found / "RUNBOOK.md").is_file():
        raise FileNotFoundError(f"the dashboards are not at {found}: this installation of obsdag is incomplete")
    return found


def export(to: Path) -> list[Path]:
    """Writes all files below `to`, which is made; files of the same names are replaced. Gives their paths.

    Raises OSError if that cannot be done.
    """
    source, written = folder(), []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and name.parts[0] in PARTS:
            target = to / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            written.append(target)
    return written
