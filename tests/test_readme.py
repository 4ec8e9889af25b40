"""README.md says nothing that was not run: its code, its commands, its settings, its links."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from obsdag.config import ExecutorConfig, settings_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND_S = 100
"""A command of the README that takes longer is not what a reader wants to try first."""


class Block(NamedTuple):
    """A fenced block: its language, text and line, and the expected output in a text block right behind it, if any."""

    language: str
    text: str
    line: int
    output: str | None


def _blocks() -> list[Block]:
    fence = re.compile(r"^```(\w*)\n(.*?)^```$(?:\n\n?^```text\n(?P<output>.*?)^```$)?", re.MULTILINE | re.DOTALL)
    return [
        Block(found[1], found[2], README.count("\n", 0, found.start()) + 1, found["output"])
        for found in fence.finditer(README)
    ]


BLOCKS = _blocks()
COMMANDS = [
    pytest.param(block.line, command.strip(), marks=[pytest.mark.slow] if "/obsdag " in command else [])
    for block in BLOCKS
    if block.language == "console"
    for line in block.text.splitlines()
    if line.startswith("$ ")
    for command in line.removeprefix("$ ").split("&&")
]


def _of(language: str) -> list[object]:
    return [pytest.param(block, id=f"line{block.line}") for block in BLOCKS if block.language == language]


def _run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OBSDAG_")}
    environ |= {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": tempfile.gettempdir()}  # its sockets' paths must be short
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        env=environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )


@pytest.mark.parametrize("block", _of("python"))
def test_python_blocks_run_as_they_stand(block: Block, tmp_path: Path) -> None:
    if "obsdag.ray" in block.text:
        pytest.importorskip("ray", reason="needs Ray: pip install 'obsdag[ray]'")
    script = tmp_path / "readme.py"
    script.write_text(block.text)

    done = _run([str(script)], tmp_path)

    assert done.returncode == 0, f"README.md:{block.line}: {done.stderr}"
    if block.output is not None:
        assert done.stdout == block.output


EXTRAS = {"start_ops_server(": "ops", "Tracing.otlp(": "otlp", "SQLiteJournal(": "journal", "obsdag.ray": "ray"}


@pytest.mark.parametrize("block", _of("python"))
def test_what_a_block_needs_is_named_above_it(block: Block) -> None:
    above = "\n".join(README.splitlines()[: block.line - 1]).rpartition("\n```\n")[2]
    named = {extra for found in re.findall(r"pip install '\.\[([\w,]+)\]'", above) for extra in found.split(",")}

    assert {extra for word, extra in EXTRAS.items() if word in block.text} <= named


@pytest.mark.parametrize(("line", "command"), COMMANDS)
def test_commands_do_what_they_say(line: int, command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    if words[:3] == ["python3", "-m", "venv"] or words[-2:] == ["-m", "pytest"]:
        return  # .ci/run runs exactly these
    if words[1:2] == ["install"]:
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[-1])
        assert extras, f"README.md:{line}: installs something else than this project"
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set((extras[1] or "dev").split(",")) <= set(known)
        return
    assert Path(words[0]).name == "obsdag", f"README.md:{line}: teach tests/test_readme.py how to check {command!r}"
    from obsdag.examples.routing import PARCELS

    (tmp_path / "parcels.jsonl").write_text("".join(f"{json.dumps(parcel)}\n" for parcel in PARCELS))
    done = _run(["-c", "import sys; from obsdag.cli import main; sys.exit(main())", *words[1:]], tmp_path)
    assert done.returncode == 0, f"README.md:{line}: {done.stderr}"


@pytest.mark.parametrize("block", _of("toml"))
def test_toml_blocks_are_settings(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(block.text)

    ExecutorConfig.load(file, environ={})


def test_blocks_are_of_kinds_that_are_checked() -> None:
    unknown = [(block.line, block.language) for block in BLOCKS if block.language not in CHECKED]

    assert not unknown, f"a block that nothing checks; its language is one of {', '.join(CHECKED)}"


CHECKED = ("console", "mermaid", "python", "text", "toml")


def test_the_test_command_is_one_line_that_the_build_finds() -> None:
    found = re.findall(r"^\$ (.*pytest.*)$", README, re.MULTILINE)

    assert len(found) == 1
    assert "s/^\\$ \\(.*pytest.*\\)$/\\1/p" in (ROOT / ".ci" / "run").read_text()


def test_settings_are_the_declared_ones() -> None:
    assert settings_table() in README, "put the output of `python -m obsdag.config` there"


def test_links_lead_somewhere() -> None:
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", README)]
    missing = [target for target in targets if target and "://" not in target and not (ROOT / target).exists()]

    assert not missing


def test_the_contents_name_every_section() -> None:
    sections = re.findall(r"^## (.+)$", README, re.MULTILINE)
    linked = re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", README.partition("## ")[0])

    assert linked == [(name, name.lower().replace(" ", "-")) for name in sections]
