"""The simulation with a journal: `python -m tests.journal.simulated --first 0 --count 2000`.

A random scenario of tests.simulation runs with a recorder, whose turns the seed chooses, and is compared with the model
of the rules as without one. Its file must say of every context what the core says. Then the process dies at a call of
the journal, before or after it, or the disk fails from one call on, and what is in the file goes on in another
simulation. An error that passes changes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from obsdag import JournalError, SQLiteJournal
from obsdag.journal.codec import Codec
from obsdag.journal.entries import describe_plan
from obsdag.journal.recorder import Recorder
from obsdag.journal.recover import Theirs, load
from obsdag.journal.schema import Row
from obsdag.journal.store import Store
from obsdag.journal.writer import Writer
from obsdag.testing import SimulationError
from tests.simulation.scenarios import FEATURES, Player, Scenario, make_scenario, mix, set_up

__all__ = ["SAME", "check_seed"]

SAME = frozenset((
    "retry", "router", "children", "map", "join", "limits", "stream", "service", "thread", "bypass_off", "rooms",
    "priority", "pass_through", "skip_failed",
))  # fmt: skip
"""Features with which a tree comes to the same outcomes whatever happens in between (E15)."""


STEPS = 3_000
"""A scenario that has not ended after so many is too long for this."""


class Died(BaseException):
    """The process is no more."""


class Turns:
    """An event loop of which only the turns are left."""

    def __init__(self) -> None:
        self.calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()

    def call_soon(self, function: Callable[..., object], *arguments: Any) -> None:
        self.calls.append((function, arguments))

    call_soon_threadsafe = call_soon

    def turn(self) -> None:
        """What was asked for until now is called."""
        for _ in range(len(self.calls)):
            function, arguments = self.calls.popleft()
            function(*arguments)


TROUBLES = ("dies before", "dies after", "fails once", "fails for good")


class MortalStore(Store):
    """Has its trouble at the `moment`th commit."""

    commits = moment = 0
    trouble = ""

    def commit(self, rows: Sequence[Row]) -> None:
        self.commits += 1
        now = self.commits == self.moment
        if (self.trouble == "fails for good" and self.commits >= self.moment) or (self.trouble == "fails once" and now):
            raise JournalError("input/output error")
        if self.trouble == "dies before" and now:
            raise Died
        super().commit(rows)
        if self.trouble == "dies after" and now:
            raise Died


class Shell:
    """What a recorder knows of a run's shell: RunShell's methods."""

    def __init__(self, player: JournalPlayer) -> None:
        self.player = player
        self.run = player.run
        self.recorder: Any = None
        self.error: BaseException | None = None

    def clock(self) -> float:
        """Of the simulation."""
        return self.player.now

    def pump(self) -> None:
        """Does what the core left to do."""
        self.player._pump()

    kick = pump

    def end_early(self, why: str, error: BaseException | None) -> None:
        """The journal has failed."""
        self.error = error
        self.player._end_early(why)


class JournalPlayer(Player):
    """A player whose facts are written down; between two steps the loop turns, or not."""

    journal_recorder: Recorder
    turns: Turns
    shell: Shell | None = None

    def __init__(self, scenario: Scenario, schedule: int) -> None:
        self.chance = Random(mix(schedule, 17))
        super().__init__(scenario, schedule)

    def step(self) -> bool:
        goes_on = super().step()
        if self.chance.random() < 0.6:
            self.turns.turn()
        return goes_on

    def _is_done(self) -> bool:
        if not super()._is_done():
            return False
        while self.turns.calls:
            self.turns.turn()
        return super()._is_done() and (bool(self.stopped) or self.journal_recorder.settled())

    def _end_early(self, why: str) -> None:
        if not self.stopped:
            self.journal_recorder.suspend()
        super()._end_early(why)


class Revived(JournalPlayer):
    """Plays on what a journal has kept; no model knows how it came there, so the core's own check has to do."""

    def told(self, what: str, *about: Any) -> None:
        self.transitions += 1
        if self.transitions % 4 == 0 and self.model is not None:
            self.run.check(deep=True)

    def _check_join(self, execution: Any, arrived: list[Any]) -> None:
        assert len(set(arrived)) == len(arrived)


class Life:
    """One process: its journal and its simulation, made with what is in the file unless that is new."""

    def __init__(self, path: Path, scenario: Scenario, schedule: int, *, revived: bool = False) -> None:
        self.journal = journal = SQLiteJournal(path, durability="process")
        self.store = MortalStore(str(path), "process")
        journal.writer = Writer(self.store, inline=True)
        journal.writer.start().result()
        journal.next_key = self.store.first_key
        kind = Revived if revived else JournalPlayer
        turns = Turns()
        assert scenario.dag.plan is not None
        plan = scenario.dag.plan
        self.recorder = recorder = Recorder(journal, plan, turns)  # type: ignore[arg-type]
        recorder._number = self.store.plan_number(plan.fingerprint, plan.name, json.dumps(describe_plan(plan)))
        journal.writer.listen(recorder)
        journal.recorders.append(recorder)
        player = type(kind.__name__, (kind,), {"more_observers": (recorder,)})
        player.journal_recorder, player.turns = recorder, turns
        given = dataclasses.replace(scenario, inputs=0) if revived else scenario
        self.player: JournalPlayer = player(given, schedule)
        self.shell = Shell(self.player)
        recorder.attach(self.shell)  # type: ignore[arg-type]
        set_up(self.player, given)
        if revived:
            self._take_up(plan)

    def _take_up(self, plan: Any) -> None:
        player = self.player
        _pass_over(player)
        found = load(self.store, plan, self.journal.codec, None, {}, Theirs((), self.journal.next_key), 5)
        self.recorder.take_up(found, player.now)
        player._pump()

    def live(self) -> None:
        """To its end, or its death. Raises Died."""
        try:
            self.player.finish(STEPS)
            self.recorder.suspend()
            if self.shell.error is not None:
                raise self.shell.error
            self.store.close()
        finally:
            self.store._give_up()


def _pass_over(player: JournalPlayer) -> None:
    """A map passes over the items that are children already, as in obsdag.generators."""
    make = player._bodies._make

    def made(execution: Any) -> Any:
        left = execution.context._more.pulls[execution.index].items
        return make(execution) if execution.task.shape == "loop" else _without(make(execution), left)

    player._bodies._make = made  # type: ignore[method-assign]


async def _without(items: Any, left: int) -> Any:
    async for item in items:
        many = item if isinstance(item, list) else [item]
        if len(many) > left:
            yield many[left:] if isinstance(item, list) else item
        left = max(left - len(many), 0)


# --- what must hold


def rows_of(path: Path) -> list[Row]:
    """What is in the file."""
    store = Store(str(path), look=True)
    try:
        store.open()
        return list(store.rows())
    except JournalError as error:
        if "is empty" in str(error) or "no such file" in str(error):
            return []
        raise
    finally:
        store.close()


def trees(rows: Sequence[Row]) -> dict[Any, Counter[str | None]]:
    """Of each input, by its key, the outcomes of all that was made from it."""
    keys = {row.key: Codec().decode(row.data or b"")["key"] for row in rows if row.key == row.tree}
    found: dict[Any, Counter[str | None]] = {key: Counter() for key in keys.values()}
    for row in rows:
        found[keys[row.tree]][row.outcome] += 1
    return found


def _agree(life: Life, path: Path, before: Sequence[Row] = ()) -> None:
    """The file says what the core says, and what it said before of what had ended."""
    rows, counts = rows_of(path), life.player.run.counts
    now = {row.key: row for row in rows}
    ended = [row for row in before if row.outcome is not None]
    assert all(now[row.key] == row for row in ended), "an outcome is recorded once"
    found = Counter(row.outcome for row in rows) - Counter(row.outcome for row in ended)
    if life.player.stopped:
        assert all(number <= counts.get(outcome or "", number) for outcome, number in found.items()), (found, counts)
        return
    assert None not in found, "everything accepted has an outcome"
    told = {name: number for name, number in counts.items() if number and name != "entered"}
    assert found == told, f"in the file {found}, by the core {told}"


def check_seed(seed: int, folder: Path, troubles: int | None = 3, allowed: frozenset[str] = frozenset(FEATURES)) -> int:
    """A scenario in peace, then with each trouble at each commit (with so many, by chance); how many troubles."""
    schedule = mix(seed, 0)
    path = folder / f"{seed}.db"
    whole = Life(path, _scenario(seed, allowed), schedule)
    whole.live()
    _agree(whole, path)
    expected = trees(rows_of(path))
    moments = [(number, trouble) for number in range(1, whole.store.commits + 1) for trouble in TROUBLES]
    if troubles is not None:
        moments = Random(seed).sample(moments, min(troubles, len(moments)))
    for number, trouble in moments:
        lives = [_scenario(seed, allowed) for _ in range(3)]
        path = folder / f"{seed}-{number}-{trouble}.db"
        life = Life(path, lives[0], schedule)
        life.store.moment, life.store.trouble = number, trouble
        if trouble == "fails once":
            life.live()
            _agree(life, path)
            assert trees(rows_of(path)) == expected
        else:
            with pytest.raises(JournalError if trouble == "fails for good" else Died):
                life.live()
            _go_on(path, lives[1:], mix(schedule, number), expected)
        path.unlink()
    return len(moments)


def _go_on(path: Path, lives: Sequence[Scenario], schedule: int, expected: Any) -> None:
    """What is in the file comes to its end in the next life, and nothing is left for the one after."""
    left = rows_of(path)
    life = Life(path, lives[0], schedule, revived=True)
    life.live()
    _agree(life, path, left)
    rows = rows_of(path)
    assert {row.key for row in left} <= {row.key for row in rows}, "nothing is lost"
    if life.player.stopped:
        return
    if lives[0].features <= SAME:
        found = trees(rows)
        assert all(expected[key] == outcomes for key, outcomes in found.items()), (found, expected)
    last = Life(path, lives[1], schedule, revived=True)
    last.live()
    assert not last.player.run.counts["entered"], "nothing is left to be taken up"


def _scenario(seed: int, allowed: frozenset[str]) -> Scenario:
    """With a DAG of its own, as each process has it."""
    scenario = make_scenario(seed, allowed)
    scenario.limit_of_contexts = 1_000_000  # what a map gives must not depend on what came before
    return scenario


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.journal.simulated", description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--troubles", type=int, default=3, help="per scenario; 0: all at every call of the journal")
    options = parser.parse_args()
    wrong = troubles = long = 0
    for seed in range(options.first, options.first + options.count):
        with tempfile.TemporaryDirectory() as folder:
            for allowed in (frozenset(FEATURES), SAME):
                try:
                    place = Path(folder) / str(len(allowed))
                    place.mkdir()
                    troubles += check_seed(seed, place, options.troubles or None, allowed)
                except SimulationError as error:
                    if "has not ended after" not in str(error):
                        raise
                    long += 1
                except Exception as error:
                    wrong += 1
                    print(f"seed {seed} ({len(allowed)} features): {type(error).__name__}: {error!s:.300}", flush=True)
    print(f"{options.count} seeds, twice; {troubles} troubles, {long} too long, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
