"""Every test runs between two looks at what the process holds: what it leaves behind fails it (tests/leaks.py)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from opentelemetry.trace import get_current_span

from tests.leaks import KINDS, Snapshot, loop_leftovers, summary


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    before, current = Snapshot.take(), get_current_span()
    yield
    found = before.leftovers(_allowed(request))
    if get_current_span() is not current:
        found.append(f"the current span {get_current_span()}")
    if found:
        pytest.fail(f"left behind by the test: {summary(found)}", pytrace=False)


@pytest.fixture(autouse=True)
def _leaves_its_loop_clean(request: pytest.FixtureRequest, _leaves_nothing: None) -> None:
    # Depends on the fixture above so that the loop, and what its closing ends, is gone before that one looks.
    test = request.function
    if inspect.iscoroutinefunction(getattr(getattr(test, "hypothesis", None), "inner_test", test)):
        request.getfixturevalue("_clean_loop")


@pytest_asyncio.fixture
async def _clean_loop(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    yield
    found = loop_leftovers(asyncio.get_running_loop(), _allowed(request))
    if found:
        pytest.fail(f"left behind in the test's event loop: {summary(found)}", pytrace=False)


def _allowed(request: pytest.FixtureRequest) -> set[str]:
    kinds = set()
    for marker in request.node.iter_markers("leaves"):
        kind, _why = marker.args  # the reason is for the reader
        if kind not in KINDS:
            pytest.fail(f"the marker leaves({kind!r}) is none of {', '.join(KINDS)}")
        kinds.add(kind)
    return kinds
