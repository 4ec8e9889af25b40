"""What is said first, from states as they come: pure, with time handed in."""

from __future__ import annotations

from typing import Any

import pytest

from obsdag.core.states import OUTCOMES, STATES
from obsdag.ops.findings import Story
from obsdag.ops.words import ago, count, duration, plural, rate

NOW = 1_000_000.0


def state(**changes: Any) -> dict[str, Any]:
    """A healthy service; `outcome__failed=3` changes what is nested."""
    found: dict[str, Any] = {
        "phase": "accepting",
        "runs": 1,
        "living": 2,
        "unaccounted": 0,
        "in_flight": 2,
        "pending": 0,
        "counts": {"entered": 10, **dict.fromkeys(OUTCOMES, 0), "output": 8},
        "states": {**dict.fromkeys(STATES, 0), "running": 2},
        "rate": {"entered": 5.0, "ended": 5.0},
        "lanes": {"continuing": 0, "new": 0, "loop": 0},
        "workers": {"busy": 2, "doing": []},
        "capacity": {"workers": 4, "live_contexts": 100, "pending": 10},
        "limits": [],
        "joins": [],
        "failures": [],
        "events": [],
        "rejected": {},
        "blocked": None,
        "last_run": None,
    }
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            found[part] = {**found[part], key: value}
        else:
            found[part] = value
    return found


def failure(error: str = "ValueError", ago_s: float = 5.0) -> dict[str, Any]:
    return {"at": NOW - ago_s, "error": error, "task": "parse"}


def said(story: Story | None = None, now: float = NOW, **changes: Any) -> list[tuple[str, str]]:
    findings = (story or Story()).findings(state(**changes), now)
    return [(level, sentence) for level, sentence, _ in findings]


def test_all_is_well_once_and_only_then() -> None:
    assert said() == [("good", "All well: 2 contexts under way, 5.0/s end")]
    assert said(living=0) == [("good", "All well: nothing is under way")]
    assert said(runs=0, living=0, last_run={"outcome": "ok", "duration_s": 90.0}) == [
        ("good", "Idle. The last run ended as ok after 1 min 30 s")
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"blocked": {"task": "parse", "for_s": 3.0}},
            ("bad", "The event loop has been blocked for 3.0 s by task parse: nothing else can run"),
        ),
        ({"unaccounted": -1}, ("bad", "1 context is unaccounted for: a bug of obsdag, please report it")),
        ({"failures": [failure()]}, ("bad", "1 context failed within a minute, the last at parse: ValueError")),
        ({"failures": [failure("stalled")]}, ("bad", "1 context has stalled within a minute, the last at parse")),
        ({"phase": "draining"}, ("warn", "Draining: nothing more is accepted, 2 submissions in flight")),
        ({"phase": "stopped"}, ("warn", "Stopped: nothing is accepted")),
        (
            {"joins": [{"waits_s": 61.0, "join": "gather", "from": "spread", "context": "c-1"}]},
            ("warn", "A join has waited for 1 min 1 s: gather of c-1"),
        ),
        (
            {"events": [{"at": NOW - 120, "level": "warn", "event": "pool rebuilt", "text": "(process): killed"}]},
            ("warn", "pool rebuilt (process): killed, 2 min 0 s ago"),
        ),
    ],
)
def test_what_is_wrong_comes_first(changes: dict[str, Any], expected: tuple[str, str]) -> None:
    assert said(**changes)[0] == expected


def test_old_trouble_is_told_below_that_all_is_well() -> None:
    assert said(counts__failed=3, failures=[failure(ago_s=600)]) == [
        ("good", "All well: 2 contexts under way, 5.0/s end"),
        ("info", "3 contexts have failed or stalled before, the last 10 min 0 s ago"),
    ]


def test_saturation_must_last_before_it_is_told() -> None:
    story, full = Story(), {"workers__busy": 4, "lanes__new": 7}
    told = [said(story, NOW + seconds, counts__output=seconds, **full)[0] for seconds in (0, 9, 11)]

    assert [level for level, _ in told] == ["good", "good", "warn"]
    assert told[-1][1] == "All 4 workers have been busy for 11 s, with 7 contexts queued"
    assert said(story, NOW + 12, counts__output=12)[0][0] == "good"


def test_work_that_is_turned_away_is_told_for_a_minute() -> None:
    story = Story()
    assert said(story, NOW, rejected={"queue_full": 5})[0][0] == "good", "nobody knows when those were"
    assert said(story, NOW + 1, rejected={"queue_full": 6})[0] == ("bad", "Work is turned away: 6 queue full so far")
    assert said(story, NOW + 100, rejected={"queue_full": 6}, counts__output=9)[0][0] == "good"


def test_silence_is_told_unless_others_are_to_move_first() -> None:
    story = Story()
    assert said(story)[0][0] == "good"
    assert said(story, NOW + 31)[0] == ("warn", "Nothing has ended for 31 s, and 2 contexts are under way")
    frozen = {"states__running": 0, "states__frozen": 2}
    assert said(story, NOW + 31, **frozen)[0][0] == "good"
    assert said(story, NOW + 32, counts__output=9)[0][0] == "good"


def test_numbers_and_times_are_short() -> None:
    times = [None, 0.00002, 0.0012, 0.25, 3.21, 12.9, 200, 7_500, 200_000]
    assert [duration(each) for each in times] == [
        *("\u2013", "20 \u00b5s", "1.2 ms", "250 ms", "3.2 s", "12 s", "3 min 20 s", "2 h 5 min", "2 d 7 h"),
    ]
    assert [count(each) for each in (0, 9_999, 12_345, 123_456, 4_500_000)] == ["0", "9999", "12.3 k", "123 k", "4.5 M"]
    assert [rate(each) for each in (None, 0, 0.05, 2.34, 250)] == ["\u2013", "0/s", "3.0/min", "2.3/s", "250/s"]
    assert (ago(10, 10.2), ago(10, 25)) == ("now", "15 s ago")
    assert (plural(1, "box", "boxes"), plural(2, "box", "boxes")) == ("1 box", "2 boxes")
