"""kill -9: a hundred trials. `python -m tests.journal.killing --trials 5000` is the whole proof."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.journal.killing import Totals, trial


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_acknowledged_is_lost_and_nothing_comes_twice(tmp_path: Path) -> None:
    totals = Totals()
    for seed in range(1, 101):
        trial(seed, tmp_path, totals)
        assert not totals.problems, totals.problems
    assert totals.kills > 100
    assert totals.acknowledged > 100, str(totals)
    assert totals.recovered > 50, str(totals)
