"""The picture for the README: CPU microseconds per execution of W1 and W2 on a logarithmic scale, obsdag's in color."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from tests.benchmarks.report import title

__all__ = ["plot"]

COLORS = {"obsdag_off": "#9ecae1", "obsdag_on": "#08519c", "obsdag_live": "#6baed6", "loop": "#636363"}
OTHERS = "#bdbdbd"
SHOWN = ("W1", "W2")


def plot(results: dict[str, Any], target: Path) -> None:
    """Draws one row of bars per contender, the fastest on top; the format is that of the file's name."""
    rows = {name: row for name, row in results["contenders"].items() if any(each in row for each in SHOWN)}
    figure, places = plt.subplots(1, len(SHOWN), figsize=(9.5, 0.38 * len(rows) + 1.1), sharey=True)
    names = sorted(rows, key=lambda name: -min(rows[name][each]["cpu_us"] for each in SHOWN if each in rows[name]))
    for place, workload in zip(places, SHOWN, strict=True):
        us = [rows[name].get(workload, {}).get("cpu_us", 0.0) for name in names]
        bars = place.barh([title(name) for name in names], us, color=[COLORS.get(name, OTHERS) for name in names])
        place.bar_label(bars, labels=[f"{each:.3g}" if each else "" for each in us], padding=3, fontsize=8)
        place.set_xscale("log")
        place.set_xlim(0.5, max(us) * 4)
        place.set_title(workload, fontsize=10)
        place.set_xlabel("CPU µs per execution", fontsize=9)
        place.tick_params(labelsize=8)
        place.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None, dpi=130)
    plt.close(figure)
