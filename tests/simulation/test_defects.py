"""The twelve defects can be put back into the code as it is now; that each is found then takes `defects` minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulation.defects import DEFECTS, ROOT, Defect, patched


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: f"{defect.number} {defect.what}")
def test_a_defect_can_be_put_back(defect: Defect, tmp_path: Path) -> None:
    patched(defect, tmp_path)

    for file in {file for file, _, _ in defect.patches}:
        text = (tmp_path / file).read_text(encoding="utf-8")
        compile(text, file, "exec")
        assert text != (ROOT / file).read_text(encoding="utf-8")
    assert [test for test in defect.tests if not (ROOT / test).exists()] == []


def test_all_twelve_are_there() -> None:
    assert {defect.number for defect in DEFECTS} == set(range(1, 13))
