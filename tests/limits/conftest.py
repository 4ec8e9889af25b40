from __future__ import annotations

import pytest

from obsdag.limits import LimitBook
from tests.limits.owners import Run


@pytest.fixture
def book() -> LimitBook:
    return LimitBook()


@pytest.fixture
def run() -> Run:
    return Run()
