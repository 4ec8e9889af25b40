"""The polling example in virtual time: its calls come exactly as far apart as the limit says."""

from __future__ import annotations

import pytest

from obsdag.examples.polling import Feed, read
from obsdag.testing import run_virtual


def test_polling_never_calls_faster_than_the_limit_and_misses_nothing() -> None:
    feed = Feed(5)
    result = run_virtual(read(feed, calls_per_second=200))

    assert sorted(entry["number"] for entry in result) == [1, 2, 3, 4, 5]
    assert result.counts["failed"] == 0
    whose = [call.split()[0] for _, call in feed.calls]
    assert (whose.count("poll"), whose.count("details")) == (6, 6)  # one entry was busy, two polls gave nothing new
    assert [at for at, _ in feed.calls] == pytest.approx([number / 200 for number in range(12)])
