"""What a person should know first: the engine's state as a few sentences, the worst first.

A finding is (level, sentence, panel): bad, warn or info, or one that is good if nothing is worse than info; `panel` is
the part of the page that tells more, "" for none. The page, `obsdag top` and `/api/state` all show these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from obsdag.ops.words import ago, count, duration, plural, rate

__all__ = ["Finding", "Story"]

Finding = tuple[str, str, str]

_RECENT_S: Final = 60.0
_RARE_S: Final = 600.0
_QUIET_S: Final = 30.0
_SATURATED_S: Final = 10.0
_JOIN_S: Final = 30.0
_RANK: Final = {"bad": 0, "warn": 1, "info": 2}
_MOVED_BY_OTHERS: Final = ("frozen", "source_wait", "discarded")


class Story:
    """One executor over time, as far as somebody has looked. `now` is Unix time."""

    def __init__(self) -> None:
        self._ended = -1
        self._ended_at = 0.0
        self._saturated_since: float | None = None
        self._rejected: int | None = None
        self._rejected_at = float("-inf")

    def findings(self, state: Mapping[str, Any], now: float) -> list[Finding]:
        """Takes in what is read now, and says what is to be said of it."""
        self._see(state, now)
        found = [
            *_blocked(state),
            *_trouble(state, now),
            *_phase(state),
            *self._pressure(state, now),
            *_joins(state),
            *_events(state, now),
        ]
        found += self._quiet(state, now, found)
        found.sort(key=lambda finding: _RANK[finding[0]])
        if all(level == "info" for level, _, _ in found):
            found.insert(0, ("good", _well(state), ""))
        return found

    def _see(self, state: Mapping[str, Any], now: float) -> None:
        ended = sum(number for name, number in state["counts"].items() if name != "entered")
        if ended != self._ended or not state["living"]:
            self._ended, self._ended_at = ended, now
        full = state["workers"]["busy"] >= state["capacity"]["workers"] and _backlog(state) > 0
        self._saturated_since = (self._saturated_since or now) if full else None
        rejected = sum(state["rejected"].values())
        if self._rejected is not None and rejected > self._rejected:
            self._rejected_at = now
        self._rejected = rejected

    def _pressure(self, state: Mapping[str, Any], now: float) -> Iterable[Finding]:
        if now - self._rejected_at < _RECENT_S:
            why = ", ".join(
                f"{count(number)} {reason.replace('_', ' ')}" for reason, number in state["rejected"].items()
            )
            yield "bad", f"Work is turned away: {why} so far", "flow"
        if self._saturated_since is not None and now - self._saturated_since >= _SATURATED_S:
            since, queued = duration(now - self._saturated_since), plural(_backlog(state), "context")
            workers = state["capacity"]["workers"]
            who = "The only worker has" if workers == 1 else f"All {count(workers)} workers have"
            yield "warn", f"{who} been busy for {since}, with {queued} queued", "workers"
        for limit in state["limits"]:
            if limit["waiting"]:
                waiting = plural(limit["waiting"], "context waits", "contexts wait")
                yield "info", f"{waiting} for the limit {limit['name']}", "flow"

    def _quiet(self, state: Mapping[str, Any], now: float, found: list[Finding]) -> Iterable[Finding]:
        quiet = now - self._ended_at
        moving = state["living"] - sum(state["states"][name] for name in _MOVED_BY_OTHERS)
        if moving > 0 and quiet >= _QUIET_S and not any(level == "bad" for level, _, _ in found):
            living = plural(moving, "context is", "contexts are")
            yield "warn", f"Nothing has ended for {duration(quiet)}, and {living} under way", "slowest"


def _backlog(state: Mapping[str, Any]) -> int:
    lanes = state["lanes"]
    return int(lanes["continuing"] + lanes["new"] + state["pending"])


def _blocked(state: Mapping[str, Any]) -> Iterable[Finding]:
    blocked = state["blocked"]
    if blocked:
        by = f"by task {blocked['task']}" if blocked["task"] else "by something that is no task"
        since = duration(blocked["for_s"])
        yield "bad", f"The event loop has been blocked for {since} {by}: nothing else can run", "events"


def _trouble(state: Mapping[str, Any], now: float) -> Iterable[Finding]:
    if state["unaccounted"]:
        lost = plural(abs(state["unaccounted"]), "context is", "contexts are")
        yield "bad", f"{lost} unaccounted for: a bug of obsdag, please report it", "where"
    recent = [each for each in state["failures"] if now - each["at"] < _RECENT_S]
    stalled = [each for each in recent if each["error"] == "stalled"]
    failed = [each for each in recent if each["error"] != "stalled"]
    if stalled:
        number = plural(len(stalled), "context has", "contexts have")
        yield "bad", f"{number} stalled within a minute, the last at {stalled[0]['task']}", "failures"
    if failed:
        number = ("at least " if len(recent) >= 50 else "") + plural(len(failed), "context")
        last = f"the last at {failed[0]['task']}: {failed[0]['error']}"
        yield "bad", f"{number} failed within a minute, {last}", "failures"
    older = state["counts"]["failed"] + state["counts"]["stalled"]
    if older and not recent:
        last = f", the last {ago(state['failures'][0]['at'], now)}" if state["failures"] else ""
        yield "info", f"{plural(older, 'context has', 'contexts have')} failed or stalled before{last}", "failures"


def _phase(state: Mapping[str, Any]) -> Iterable[Finding]:
    if state["phase"] == "draining":
        flying = plural(state["in_flight"], "submission")
        yield "warn", f"Draining: nothing more is accepted, {flying} in flight", "slowest"
    if state["phase"] == "stopped":
        yield "warn", "Stopped: nothing is accepted", ""


def _joins(state: Mapping[str, Any]) -> Iterable[Finding]:
    for longest in state["joins"][:1]:
        if longest["waits_s"] >= _JOIN_S:
            which = f"{longest['join'] or 'below ' + longest['from']} of {longest['context']}"
            yield "warn", f"A join has waited for {duration(longest['waits_s'])}: {which}", "joins"


def _events(state: Mapping[str, Any], now: float) -> Iterable[Finding]:
    rare = [each for each in state["events"] if each["level"] == "warn" and now - each["at"] < _RARE_S]
    if rare and not state["blocked"]:
        yield "warn", f"{rare[0]['event']} {rare[0]['text']}, {ago(rare[0]['at'], now)}", "events"


def _well(state: Mapping[str, Any]) -> str:
    if state["runs"]:
        if not state["living"]:
            return "All well: nothing is under way"
        return f"All well: {plural(state['living'], 'context')} under way, {rate(state['rate']['ended'])} end"
    last = state["last_run"]
    if last is None:
        return "Idle: nothing has run yet"
    return f"Idle. The last run ended as {last['outcome']} after {duration(last['duration_s'])}"
