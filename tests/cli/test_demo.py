"""`obsdag demo`: the report, the files, the statuses, on trees of all kinds; the standard library is the slow one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import ROOT, TIMEOUT_S, command, environ, lines, on_terminal, start, wait_for

FILES = ("census.jsonl", "failures.jsonl", "summary.json")
GOOD = "import os, sys\nfrom json import loads\n\n\nclass A:\n    def first(self):  # a comment\n        return 1\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree with a file of each kind."""
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "good.py").write_text(GOOD)
    (tree / "inner" / "same.py").write_text(GOOD)
    (tree / "empty.py").write_text("")
    (tree / "two.py").write_text("print 'two'\n")
    (tree / "latin.py").write_bytes("x = 'é'\n".encode("latin-1"))
    (tree / "notes.txt").write_text("no Python")
    return tree


def _demo(folder: Path, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return command("demo", "--processes", "1", "--out", folder / "out", *arguments, folder=folder, **env)


def _summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
    return found


def test_a_small_tree_is_counted_and_reported(tmp_path: Path, tree: Path) -> None:
    done = _demo(tmp_path, "--path", tree)

    assert done.returncode == 0
    assert done.stderr == ""
    files = {each["path"]: each for each in lines((tmp_path / "out" / "census.jsonl").read_text())}
    assert set(files) == {"good.py", "inner/same.py", "empty.py"}
    good = files["good.py"]
    assert (good["lines"], good["code_lines"], good["comment_lines"]) == (7, 5, 1)
    assert (good["functions"], good["classes"], good["imports"]) == (1, 1, ["json", "os", "sys"])
    assert ("same_as" in good) != ("same_as" in files["inner/same.py"])
    assert (files["empty.py"]["lines"], files["empty.py"]["bytes"]) == (0, 0)
    for text in ("5 files below ", "expected of real files: 1 undecodable, 1 unparsable", "two.py", "latin.py"):
        assert text in done.stdout
    for name in FILES:
        assert str(tmp_path / "out" / name) in done.stdout


def test_the_summary_agrees_with_the_files(tmp_path: Path, tree: Path) -> None:
    _demo(tmp_path, "--path", tree)

    summary = _summary(tmp_path)
    files = lines((tmp_path / "out" / "census.jsonl").read_text())
    failures = lines((tmp_path / "out" / "failures.jsonl").read_text())
    assert summary["outcomes"] == {"output": len(files), "failed": len(failures), "split": 1}
    assert summary["census"]["lines"] == sum(each["lines"] for each in files)
    assert summary["expected_failures"] == {"undecodable": 1, "unparsable": 1}
    assert {(each["file"], each["error_type"], each["expected"]) for each in failures} == {
        ("two.py", "Unparsable", True),
        ("latin.py", "Undecodable", True),
    }
    assert summary["tasks"]["syntax"]["executions"] == 4
    for slow in summary["slowest"]:
        assert slow["seconds"] == pytest.approx(sum(slow["ledger"].values()), abs=1e-4)
        assert slow["critical_path"][0]["task"] == "read"


def test_the_flaky_step_is_retried_for_the_same_files_each_time(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(64):
        (tree / f"file{number}.py").write_text(f"number = {number}\n")

    first, second = _demo(tmp_path, "--path", tree), None
    stumbled = {each["path"] for each in lines((tmp_path / "out" / "census.jsonl").read_text()) if "hiccup" in each}
    second = _demo(tmp_path, "--path", tree)
    again = {each["path"] for each in lines((tmp_path / "out" / "census.jsonl").read_text()) if "hiccup" in each}

    assert (first.returncode, second.returncode) == (0, 0)
    assert stumbled == again
    assert 0 < len(stumbled) < 32
    assert _summary(tmp_path)["retries"] == {"Hiccup": len(stumbled)}
    assert f"register failed {len(stumbled)} times on purpose" in first.stdout


def test_names_and_files_of_all_kinds(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in (b"quote'\".py", b"line\nbreak.py", b"[red]markup.py", b"caf\xe9.py", "日本.py".encode(), b"-.py"):
        Path(os.fsdecode(os.path.join(os.fsencode(tree), name))).write_text("x = 1\n")
    (tree / "around.py").symlink_to("around.py")
    (tree / "gone.py").symlink_to("nothing.py")
    (tree / "loop").symlink_to(".")
    os.mkfifo(tree / "pipe.py")
    (tree / "folder.py").mkdir()
    (tree / "zero.py").write_bytes(b"x = '\0'\n")
    (tree / ".hidden").mkdir()
    (tree / ".hidden" / "unseen.py").write_text("x = 1\n")
    denied = tree / "denied.py"
    denied.write_text("x = 1\n")
    denied.chmod(0)

    done = _demo(tmp_path, "--path", tree, PYTHONUTF8="1")

    assert done.returncode == 0
    summary = _summary(tmp_path)
    unreadable = 2 + (os.getuid() != 0)
    assert summary["outcomes"] == {"output": 6 + (os.getuid() == 0), "failed": unreadable + 1, "split": 1}
    assert summary["expected_failures"] == {"unreadable": unreadable, "unparsable": 1}
    written = {each["path"] for each in lines((tmp_path / "out" / "census.jsonl").read_text())}
    assert {"line\nbreak.py", "caf\udce9.py", "日本.py", "quote'\".py"} <= written


def test_a_tree_in_which_everything_fails_as_expected(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "two.py").write_text("print 'two'\n")

    done = _demo(tmp_path, "--path", tree)

    assert done.returncode == 0
    assert "no file that could be counted" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--path", "nowhere"], "--path 'nowhere' is no folder that can be read: No such file or directory"),
        (["--path", "file"], "--path 'file' is no folder that can be read: Not a directory"),
        (["--path", "bare"], "--path 'bare': there is no .py file below it (hidden folders and site-packages are "),
        (["--path", "tree", "--out", "file"], "--out 'file' is a file: name a folder"),
        (["--path", "tree", "--out", "no/where"], "--out 'no/where' cannot be made: No such file or directory"),
        (["--path", "tree", "--processes", "0"], "task 'syntax' runs in a process: set "),
        (["--path", "tree", "--workers", "many"], "--workers must be a whole number from 1 to 100,000, not 'many'"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_line_and_leaves_nothing(
    tmp_path: Path, tree: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "file.txt").write_text("")
    before = set(tmp_path.rglob("*"))

    done = command("demo", *arguments, folder=tmp_path, TMPDIR=str(tmp_path))

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.partition("error: ")[2].startswith(message)
    assert set(tmp_path.rglob("*")) == before


def test_a_failure_that_is_not_expected_is_shown_and_makes_the_status_1(tmp_path: Path, tree: Path) -> None:
    script = tmp_path / "with_bug.py"
    script.write_text(
        "import sys\nfrom obsdag.cli import main\nfrom obsdag.examples import census\n"
        "async def measure(ctx):\n    ctx.pop('source')\n    raise KeyError('lines')\n"
        "if __name__ == '__main__':\n    census.measure = measure\n    sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", script, "demo", "--path", tree, "--out", "out", "--processes", "1"],
        cwd=tmp_path,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    assert done.returncode == 1
    assert "4 UNEXPECTED" in done.stdout
    assert "Unexpected: these are bugs" in done.stdout
    assert "context 'good.py' failed at task 'measure' after 1 attempt(s): KeyError: 'lines'" in done.stdout
    assert _summary(tmp_path)["unexpected_failures"] == 4


def test_a_deadline_is_not_expected_either(tmp_path: Path, tree: Path) -> None:
    done = _demo(tmp_path, "--path", tree, "--deadline", "0.001")

    assert done.returncode == 1
    assert "the run did not finish within its deadline of 0.001 s" in done.stdout


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_the_report_keeps_within_the_width(tmp_path: Path, tree: Path, columns: int) -> None:
    plain = _demo(tmp_path, "--path", tree, COLUMNS=str(columns))
    _, seen = on_terminal(
        *("demo", "--path", tree, "--out", "out", "--processes", "1", "-q"),
        folder=tmp_path,
        columns=columns,
        NO_COLOR="1",
    )

    for text in (plain.stdout, seen):
        tables = text.partition("Written")[0].replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[2m", "")
        assert max(len(line) for line in tables.splitlines()) <= columns
        assert "Tasks by time" in tables


def test_a_stream_that_takes_ascii_only_gets_escapes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "日本.py").write_text("print 'two'\n")

    done = _demo(tmp_path, "--path", tree, PYTHONIOENCODING="ascii")

    assert done.returncode == 0
    assert "\\u65e5\\u672c.py" in done.stdout


def test_without_rich_a_terminal_gets_the_plain_report(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ImportError('not installed')\n")

    status, seen = on_terminal("demo", "--path", tree, "--out", "out", "--processes", "1", folder=tmp_path)

    assert status == 0
    assert "\x1b[" not in seen
    assert "expected of real files: 1 undecodable, 1 unparsable" in seen


def test_E9_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(6_000):
        (tree / f"file{number}.py").write_text(GOOD)
    with start("demo", "--path", tree, "--out", "out", "--processes", "1", folder=tmp_path) as process:
        wait_for(process, b"census of tree: ")
        process.send_signal(signal.SIGINT)
        written, told = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 130
    assert written == b""
    assert b"obsdag demo: interrupted after " in told
    assert b"Traceback" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_standard_library_is_counted(tmp_path: Path) -> None:
    done = command("demo", "--out", "out", folder=tmp_path)

    assert done.returncode == 0, done.stdout
    summary = _summary(tmp_path)
    assert summary["folder"] == sysconfig.get_path("stdlib")
    assert summary["outcomes"]["output"] > 400
    assert summary["unexpected_failures"] == 0
    assert "json/decoder.py" in {each["path"] for each in lines((tmp_path / "out" / "census.jsonl").read_text())}


def test_the_census_needs_nothing_of_the_command_line() -> None:
    code = (
        "import sys, obsdag.examples.census\n"
        "print(sorted(name for name in sys.modules if name.startswith(('obsdag.cli', 'rich', 'argparse'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
