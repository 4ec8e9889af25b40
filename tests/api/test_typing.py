"""What a user's program sees of obsdag's types under mypy --strict, and that the same program runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROGRAM = Path(__file__).parent / "user_program.py"
WRONG = Path(__file__).parent / "wrong_program.py"

pytestmark = pytest.mark.slow  # a type checker reads all of obsdag


def mypy(program: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """As a user calls it: strict, with no settings of this project's, obsdag an installed package with `py.typed`."""
    settings = cache / "mypy.ini"
    settings.write_text(f"[mypy]\nmypy_path = {ROOT}\n")
    words = ["--strict", "--config-file", str(settings), "--cache-dir", str(cache), "--follow-imports", "silent"]
    return subprocess.run(
        [sys.executable, "-m", "mypy", *words, str(program)],
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_a_typed_program_of_every_kind_of_task_is_accepted(tmp_path: Path) -> None:
    done = mypy(PROGRAM, tmp_path)

    assert done.stdout == "Success: no issues found in 1 source file\n", done.stdout + done.stderr


def test_mistakes_are_found_in_the_lines_that_have_them(tmp_path: Path) -> None:
    done = mypy(WRONG, tmp_path)

    found = {int(number) for number in re.findall(r"^.*wrong_program\.py:(\d+): error", done.stdout, re.MULTILINE)}
    wrong = {n for n, line in enumerate(WRONG.read_text().splitlines(), 1) if line.endswith("# wrong")}
    assert found == wrong, done.stdout + done.stderr


def test_the_typed_program_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAM)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("4 [] {'entered': 24, 'output': 4, 'split': 2, 'merged': 16, 'dropped': 2,")
    assert second in ("[1, 2] 1", "[2, 1] 1")  # in the order of completion, which threads decide
    assert done.stderr == ""
