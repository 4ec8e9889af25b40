"""The simulation with a journal; `python -m tests.journal.simulated --count 2000` is more of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from obsdag.testing import SimulationError
from tests.journal.simulated import SAME, check_seed
from tests.simulation.scenarios import FEATURES

SEEDS = 20


def _check(seed: int, folder: Path, troubles: int | None, allowed: frozenset[str]) -> int:
    folder.mkdir(exist_ok=True)
    try:
        return check_seed(seed, folder, troubles, allowed)
    except SimulationError as error:
        if "has not ended after" not in str(error):
            raise
        return 0  # too long for this


@pytest.mark.parametrize("allowed", [SAME, frozenset(FEATURES)], ids=["the same whatever happens", "all features"])
def test_scenarios_whose_process_dies_or_whose_disk_fails(tmp_path: Path, allowed: frozenset[str]) -> None:
    assert sum(_check(seed, tmp_path, 3, allowed) for seed in range(SEEDS)) > 50


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("allowed", [SAME, frozenset(FEATURES)], ids=["the same whatever happens", "all features"])
def test_every_trouble_at_every_call_of_the_journal(tmp_path: Path, allowed: frozenset[str]) -> None:
    assert sum(_check(seed, tmp_path, None, allowed) for seed in range(6)) > 100
