"""A folder with a DAG in it, to run the command in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import PIPELINE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "orders.py").write_text(PIPELINE)
    return tmp_path
