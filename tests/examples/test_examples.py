"""The examples do what their docstrings say, as programs and as modules."""

from __future__ import annotations

import pkgutil
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from obsdag import examples
from obsdag.examples import batching, files, routing

NAMES = ("batching", "files", "polling", "routing")


def test_the_list_of_examples_is_complete() -> None:
    listed = set(re.findall(r"^(\w+)  ", examples.__doc__ or "", re.MULTILINE))
    assert listed == {module.name for module in pkgutil.iter_modules(examples.__path__)}
    assert set(NAMES) < listed


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("batching", r"199 orders in \d+ transactions\norder 198 refused: UNIQUE constraint failed: orders.number\n"),
        ("files", r"\d{5,} lines below obsdag\n( +\d+ [\w/]+\.py\n){3}"),
        ("polling", r"( +\d+ ms  .*\n){14}news:\n(  entry \d\n){6}"),
        ("routing", r"flowchart TD\n(.|\n)*\nHOME-001: .*\nOSLO-002: .*\nLIMA-004: .*\n1 refused\n"),
    ],
)
def test_one_command_runs_it(name: str, expected: str, tmp_path: Path) -> None:
    root = str(Path(examples.__path__[0]).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"obsdag.examples.{name}"],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(expected, done.stdout), done.stdout
    assert not list(tmp_path.iterdir())


def test_files_counts_all_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "one.py").write_text("1\n")
    (tmp_path / "deep" / "three.py").write_text("1\n2\n3\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    (tmp_path / "other.txt").write_text("not counted\n")

    files.main([str(tmp_path)])
    total, three, one, unreadable = capsys.readouterr().out.splitlines()
    assert total.startswith("4 lines below")
    assert (three.split(), one.split()) == (["3", "deep/three.py"], ["1", "one.py"])
    assert unreadable.startswith("unreadable: binary.py: 'utf-8' codec can't decode")


def test_files_answers_for_a_folder_without_files(tmp_path: Path) -> None:
    folder = files.count(tmp_path)
    assert (folder["lines"], folder["longest"], folder["unreadable"]) == (0, [], [])


def test_batching_writes_each_order_once_and_answers_it(tmp_path: Path) -> None:
    database = tmp_path / "orders.db"
    result = batching.write_orders(database, 120)

    with closing(sqlite3.connect(database)) as connection:
        rows = dict(connection.execute("SELECT number, batch FROM orders").fetchall())
    assert rows == {order["number"]: order["batch"] for order in result}
    assert sorted(rows) == list(range(119))
    (failure,) = result.failures
    assert failure.context["number"] == 118
    assert isinstance(failure.exception, sqlite3.IntegrityError)
    assert len(set(rows.values())) < 20


def test_routing_takes_each_way_once() -> None:
    result = routing.send(routing.PARCELS)

    ways = {order["number"]: order["way"] for order in result}
    assert ways == {
        1: ["check", "home/label", "home/load", "notify"],
        2: ["check", "customs", "abroad/label", "abroad/load", "notify"],
        4: ["check", "customs", "abroad/label", "abroad/load", "notify"],
    }
    assert result.counts["dropped"] == 1
