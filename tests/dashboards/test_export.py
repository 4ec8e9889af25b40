"""`obsdag dashboards export`: from the source tree, and from a wheel that was built and installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from obsdag.dashboards import PARTS, export, folder
from tests.cli.command import ROOT, command

FILES = {
    path.relative_to(folder()).as_posix(): path.read_bytes()
    for part in PARTS
    for path in [folder() / part, *(folder() / part).rglob("*")]
    if path.is_file()
}


def _below(where: Path) -> dict[str, bytes]:
    return {path.relative_to(where).as_posix(): path.read_bytes() for path in where.rglob("*") if path.is_file()}


def test_export_writes_all_files_and_replaces_older_ones(tmp_path: Path) -> None:
    (tmp_path / "to" / "grafana").mkdir(parents=True)
    (tmp_path / "to" / "grafana" / "tasks.json").write_text("of an older version")
    (tmp_path / "to" / "grafana" / "own.json").write_text("somebody's own")

    done = command("dashboards", "export", "to", folder=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{len(FILES)} files below to; RUNBOOK.md says what goes where\n"
    assert _below(tmp_path / "to") == FILES | {"grafana/own.json": b"somebody's own"}
    assert {"RUNBOOK.md", "grafana/overview.json", "prometheus/rules/alerts.yml"} <= set(FILES)


@pytest.mark.parametrize("to", ["file", "file/below", "\0", ""])
def test_what_cannot_be_written_is_told_in_one_line(to: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    if to == "\0":
        with pytest.raises(ValueError, match="null"):
            export(Path(to))
        return

    done = command("dashboards", "export", to, folder=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("obsdag dashboards: error: ")
    assert done.stderr.count("\n") == 1


def test_nothing_is_left_out_but_pictures() -> None:
    assert {path.name for path in folder().iterdir()} - {"images"} == set(PARTS)


def test_without_an_action_it_says_what_there_is(tmp_path: Path) -> None:
    done = command("dashboards", folder=tmp_path)

    assert done.returncode == 2
    assert "ACTION" in done.stderr


@pytest.mark.slow
@pytest.mark.leaves("files", "compiled modules below the test's own folder")
def test_a_wheel_takes_them_along(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"],
        cwd=ROOT,
        capture_output=True,
        timeout=100,
        check=True,
    )
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    done = subprocess.run(
        [sys.executable, "-m", "obsdag", "dashboards", "export", tmp_path / "to"],
        cwd=tmp_path / "site",
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert _below(tmp_path / "to") == FILES
    assert _below(tmp_path / "site" / "obsdag" / "dashboards" / "data") == FILES
