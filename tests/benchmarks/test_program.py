"""The benchmark program itself, on little work: that it runs and what it writes. No time is asserted anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.cases import CASES
from tests.benchmarks.children import ROOT
from tests.benchmarks.measure import medians
from tests.benchmarks.report import BEGIN, END, verdicts, write_readme
from tests.benchmarks.workloads import WORKLOADS

pytestmark = [pytest.mark.benchmark]
OURS = "loop,obsdag_off,obsdag_on,obsdag_live,usual"


def _run(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.benchmarks", "--quick", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_workload_on_what_needs_no_further_library(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"

    printed = _run("--contenders", OURS, "--cases", "none", "--json", str(target))

    found = json.loads(target.read_text(encoding="utf-8"))
    assert list(found["contenders"]) == OURS.split(",")
    for name in ("loop", "obsdag_off", "obsdag_on"):
        assert list(found["contenders"][name]) == list(WORKLOADS)
        assert all(figures["us"] > 0 for figures in found["contenders"][name].values())
    assert found["contenders"]["obsdag_on"]["W3"]["bytes_per_context"] > 0
    assert "obsdag, everything on" in printed


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_case(case: str, tmp_path: Path) -> None:
    target = tmp_path / "figures.json"

    _run("--contenders", "none", "--cases", case, "--json", str(target))

    figures = json.loads(target.read_text(encoding="utf-8"))["cases"][case]
    assert figures
    assert all(value >= 0 for value in figures.values())


def test_medians_are_of_the_ratios_of_one_round() -> None:
    def answer(seconds: float) -> dict[str, Any]:
        return {"seconds": seconds, "cpu_seconds": seconds, "per": 1e6}

    taken = {
        "loop": [answer(1e-6), answer(2e-6), answer(4e-6)],
        "obsdag_off": [answer(2e-6), answer(4e-6), answer(4e-6)],
    }

    found = medians(taken)

    assert found["obsdag_off"]["ratio"] == pytest.approx(2.0)
    assert found["obsdag_off"]["us"] == pytest.approx(4.0)
    assert found["obsdag_off"]["us_least"] == pytest.approx(2.0)


def _results(on_us: float) -> dict[str, Any]:
    def row(us: float) -> dict[str, Any]:
        return {"W1": {"us": us, "us_least": us, "cpu_us": us, "per_second": 1e6 / us, "ratio": us, "cpu_ratio": us}}

    return {
        "environment": {"python": "3.11", "machine": "2 cores", "event_loop": "asyncio", "rounds": 1, "versions": {}},
        "contenders": {"loop": row(1.0), "obsdag_on": row(on_us), "burr_async": row(40.0), "earlier": row(100.0)},
        "cases": {"w8_workers": {"64 workers / 1": 1.05}},
    }


def test_verdicts_say_what_was_met_and_what_was_not() -> None:
    assert [met for _, met in verdicts(_results(3.0))] == [True, True, True, True]
    assert [met for _, met in verdicts(_results(6.0))] == [False, False, False, True]


def test_the_table_replaces_the_one_before(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")

    write_readme(readme, _results(3.0))
    write_readme(readme, _results(3.5))

    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n| CPU µs per execution")
    assert text.endswith(f"{END}\nafter\n")
    assert "| obsdag, everything on | 3.50 (3.5) |" in text
    assert "old" not in text


def test_the_readme_has_its_place() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    assert text.index(BEGIN) < text.index(END)
