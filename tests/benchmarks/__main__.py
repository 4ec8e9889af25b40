"""What obsdag costs, beside what else one would use, in one run:

    python -m tests.benchmarks --install DIR     environments for what it is compared with (once)
    python -m tests.benchmarks --peers DIR --readme --plot tests/benchmarks/benchmark.svg --json benchmark.json

Every contender is a process of its own; each round asks all of them in turn, so that a machine whose speed drifts
treats them alike, and the ratio to the hand-written loop of the same round is what counts. Without `--peers` only what
obsdag's own environment holds is run. Times are shown and compared, never asserted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks import report
from tests.benchmarks.cases import CASES
from tests.benchmarks.children import CONTENDERS, ROOT, install
from tests.benchmarks.measure import compare, warn
from tests.benchmarks.workloads import WORKLOADS


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.install is not None:
        install(options.install)
        return 0
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        warn("--plot needs matplotlib: pip install -r tests/benchmarks/requirements/plot.txt")
        return 2
    results = _measure(options) if options.known is None else json.loads(options.known.read_text(encoding="utf-8"))
    print(report.text(results))
    if options.readme:
        report.write_readme(ROOT / "README.md", results)
    if options.plot is not None:
        from tests.benchmarks.plot import plot

        plot(results, options.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", type=Path, metavar="DIR", help="make the peers' environments in DIR, and end")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where they are")
    parser.add_argument("--contenders", type=_names(CONTENDERS), default=list(CONTENDERS), help="only these: a,b")
    parser.add_argument("--workloads", type=_names(WORKLOADS), default=list(WORKLOADS), help="only these: W1,W2")
    parser.add_argument("--cases", type=_names(CASES), default=list(CASES), help="only these, or none: w6_serve,...")
    parser.add_argument("--repeats", type=int, default=9, help="rounds (9); the cases run a third as often")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="of obsdag and the loop")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, run beside this one")
    parser.add_argument("--quick", action="store_true", help="little work, to see that the program runs")
    parser.add_argument(
        "--from", dest="known", type=Path, metavar="FILE", help="figures of an earlier --json, not new ones"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them, as SVG or PNG")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    return parser


def _names(known: Any) -> Any:
    def names(text: str) -> list[str]:
        found = [] if text == "none" else text.split(",")
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return found

    return names


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    repeats = 1 if options.quick else options.repeats
    rows = compare(
        options.contenders,
        options.workloads,
        repeats,
        options.peers,
        quick=options.quick,
        loop=options.loop,
        against=options.against,
        say=warn,
    )
    results = {"environment": report.environment(options.peers, options.loop, repeats), "contenders": rows, "cases": {}}
    _write(options.json, results)
    for name in options.cases:
        results["cases"][name] = _case(name, max(1, repeats // 3), options.quick)
        _write(options.json, results)  # what was measured is kept, whatever becomes of the rest
    return results


def _write(target: Path | None, results: dict[str, Any]) -> None:
    if target is not None:
        target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _case(name: str, repeats: int, quick: bool) -> dict[str, float]:
    """Medians of a case's figures over processes."""
    warn(name)
    command = [sys.executable, "-m", "tests.benchmarks.cases", name, *(["--quick"] if quick else [])]
    runs = [
        json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        for _ in range(repeats)
    ]
    return {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}


if __name__ == "__main__":
    sys.exit(main())
