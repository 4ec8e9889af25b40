"""`obsdag --help`, `--version` and `obsdag graph`; and that options are those that ExecutorConfig declares."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from obsdag import __version__
from obsdag.cli.demo import DEFAULTS
from obsdag.cli.settings import OPTIONS
from obsdag.config import ExecutorConfig
from tests.cli.command import command, environ


def test_the_version_is_told(folder: Path) -> None:
    assert command("--version", folder=folder).stdout == f"obsdag {__version__}\n"


@pytest.mark.parametrize("words", [[], ["run"], ["graph"], ["demo"]], ids=str)
def test_help_fits_the_terminal_and_names_what_there_is(folder: Path, words: list[str]) -> None:
    done = command(*words, "--help", folder=folder, COLUMNS="80")

    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {' '.join(['obsdag', *words])} ")
    assert max(map(len, done.stdout.splitlines())) <= 80
    if not words:
        assert all(f"    {name} " in done.stdout for name in ("run", "graph", "demo"))


@pytest.mark.parametrize("name", ["run", "demo"])
def test_E1_options_and_settings_are_told_as_declared(folder: Path, name: str) -> None:
    told = " ".join(command(name, "--help", folder=folder).stdout.split())
    own = {field: repr(value) for field, value in DEFAULTS.items()} if name == "demo" else {}
    rows = {row.name: row._replace(default=own.get(row.name, row.default)) for row in ExecutorConfig.describe()}

    for option, setting in OPTIONS.items():
        assert f"{option} " in told
        assert rows[setting].meaning in told
    for row in rows.values():
        assert (f" {row.name} {row.meaning} ({row.allowed}; default {row.default})" in told) == bool(row.variable)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "obsdag: error: the following arguments are required: COMMAND; see 'obsdag --help'"),
        (["rnu"], "obsdag: error: argument COMMAND: invalid choice: 'rnu'"),
        (["run"], "obsdag: error: the following arguments are required: DAG; see 'obsdag run --help'"),
        (["graph", "orders:dag", "--format", "png"], "obsdag: error: argument -f/--format: invalid choice: 'png'"),
        (["graph", "orders:dag", "more"], "obsdag: error: graph: unknown argument 'more'; see 'obsdag graph --help'"),
        (["graph", "orders:dag", "-o", "no/x"], "obsdag graph: error: --output 'no/x': there is no folder "),
    ],
)
def test_mistakes_are_told_in_one_line(folder: Path, words: list[str], message: str) -> None:
    done = command(*words, folder=folder)

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(message)


def test_graph_gives_what_the_dag_gives(folder: Path) -> None:
    mermaid = command("graph", "orders:dag", folder=folder)
    dot = command("graph", "orders:dag", "--format", "dot", folder=folder)
    data = command("graph", "orders:dag", "--format", "json", folder=folder)

    assert mermaid.returncode == dot.returncode == data.returncode == 0
    assert mermaid.stdout.startswith("flowchart ")
    assert dot.stdout.startswith("digraph ")
    assert json.loads(data.stdout)["edges"] == [["look", "store"]]


def test_graph_writes_a_picture_into_a_file(folder: Path) -> None:
    done = command("graph", "orders:dag", "--format", "svg", "--output", "dag.svg", folder=folder)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert ET.parse(folder / "dag.svg").getroot().tag.endswith("svg")


def test_graph_shows_source_and_sink_when_asked_to(folder: Path) -> None:
    data = command("graph", "orders:dag", "--format", "json", "--internal", folder=folder)

    assert [each["id"] for each in json.loads(data.stdout)["nodes"]] == ["source", "look", "store", "sink"]


INTERRUPTED_WHILE_LOADING = """
import sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "obsdag.cli.jsonl":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
from obsdag.__main__ import main
sys.exit(main())
"""


def test_ctrl_c_while_the_command_loads_is_an_interruption_like_any_other(folder: Path) -> None:
    words = [sys.executable, "-c", INTERRUPTED_WHILE_LOADING, "demo"]
    done = subprocess.run(words, cwd=folder, env=environ(), capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
