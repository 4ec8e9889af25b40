"""Replays a scenario, or plays many: `python -m tests.simulation --seed N`, or `--first N --count M`.

With one seed the whole story is printed: the DAG, the settings, every step. Failing seeds are printed with the command
that replays each.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from tests.simulation.scenarios import FEATURES, Scenario, make_scenario, mix, play

COMMAND = "python -m tests.simulation"


def tell(scenario: Scenario) -> None:
    """The scenario in words."""
    print(f"seed {scenario.seed}: {', '.join(sorted(scenario.features))}; {scenario.settings}")
    print(f"{scenario.inputs} inputs through")
    for spec in scenario.specs:
        print(
            f"  {spec.name} {spec.kind} after {[f't{up}' for up in spec.ups]} {spec.config or ''} {spec.options or ''}"
        )


def replay(seed: int, allowed: frozenset[str]) -> int:
    """Plays one scenario and prints its story."""
    scenario = make_scenario(seed, allowed)
    tell(scenario)
    player = play(scenario, mix(seed, 0))
    told = player.told

    def note(what: str, *about: Any) -> None:
        print(f"  {player.now:8g} {what} {', '.join(map(repr, about))}")
        told(what, *about)

    player.told = note  # type: ignore[method-assign]
    try:
        print(player.finish(20_000))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


def many(first: int, count: int, allowed: frozenset[str], minutes: float, every: int = 10_000) -> int:
    """Plays many scenarios, at most so many minutes; prints the seeds that fail."""
    failed: list[int] = []
    started = time.monotonic()
    transitions = played = 0
    for seed in range(first, first + count):
        scenario = make_scenario(seed, allowed)
        player = play(scenario, mix(seed, 0))
        played += 1
        try:
            player.finish(20_000)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not player.stopped:
                raise
            failed.append(seed)
            print(f"{COMMAND} --seed {seed}   # {type(error).__name__}: {error!s:.200}", flush=True)
        transitions += player.transitions
        took = time.monotonic() - started
        if played % every == 0:
            print(f"{played} scenarios, {transitions} transitions, {len(failed)} failed, {took:.0f} s", flush=True)
        if took > minutes * 60:
            break
    took = time.monotonic() - started
    print(f"{played} scenarios, {transitions} transitions, {len(failed)} failed, {took:.0f} s")
    return 1 if failed else 0


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this one and tell its story")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--features", default=",".join(FEATURES), help="only these, separated by commas")
    arguments = parser.parse_args()
    allowed = frozenset(arguments.features.split(","))
    if arguments.seed is not None:
        return replay(arguments.seed, allowed)
    return many(arguments.first, arguments.count, allowed, arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
