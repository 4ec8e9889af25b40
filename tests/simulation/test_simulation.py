"""The engine's core against the model of its rules, under random schedules; 20,000 scenarios where it may take long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FEW, MANY = 400, 20_000
SHARES = 2
"""Processes for the many: CI has two cores."""


def _start(first: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.simulation", "--first", str(first), "--count", str(count)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)


def _play(first: int, count: int, shares: int) -> None:
    each = count // shares
    processes = [_start(first + number * each, each) for number in range(shares)]
    told = [process.communicate()[0] for process in processes]
    wrong = [text for process, text in zip(processes, told, strict=True) if process.returncode]
    assert not wrong, "the engine and the rules part; each line replays one:\n" + "\n".join(wrong)


def test_every_transition_of_random_scenarios_is_as_the_rules_say() -> None:
    _play(0, FEW, 1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_transition_of_many_random_scenarios_is_as_the_rules_say() -> None:
    _play(FEW, MANY, SHARES)
