"""The figures as text and as the README's table, with what they were measured on and what they are to be."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import TARGETS
from tests.benchmarks.children import CONTENDERS, REQUIREMENTS
from tests.benchmarks.workloads import WORKLOADS

__all__ = ["environment", "text", "title", "verdicts", "write_readme"]

Results = dict[str, Any]
BEGIN, END = "<!-- figures of python -m tests.benchmarks -->", "<!-- end of figures -->"
OURS = ("obsdag_off", "obsdag_on")


def environment(environments: Path | None, loop: str, repeats: int) -> dict[str, Any]:
    """What it was measured on and with."""
    own = ("obsdag", "opentelemetry-sdk", "prometheus-client", "structlog")
    versions = {name: metadata.version(name) for name in own}
    for name in ("peers", "earlier"):
        if environments is not None and (environments / name).exists():
            pinned = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
            versions |= dict(re.findall(r"^([\w.-]+)==(\S+)$", pinned, re.MULTILINE))
    return {
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "event_loop": loop,
        "rounds": repeats,
        "versions": versions,
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def title(name: str) -> str:
    """A contender's name in the table; that of another checkout has it behind the @."""
    module, _, checkout = name.partition("@")
    return CONTENDERS[module].title + (f" ({checkout})" if checkout else "")


def text(results: Results) -> str:
    """Everything, for a terminal."""
    about = results["environment"]
    lines = [
        f"Python {about['python']}, {about['machine']}, {about['event_loop']}, medians of {about['rounds']} rounds",
        "",
        *_wide_table(results["contenders"]),
        "",
    ]
    for case, figures in results["cases"].items():
        lines.append(case)
        lines += [f"  {name:32} {value:12,.2f}{_target(name)}" for name, value in figures.items()]
    lines += ["", *(f"{'met   ' if met else 'MISSED'} {what}" for what, met in verdicts(results))]
    return "\n".join(lines)


def _target(name: str) -> str:
    return f"   (at most {TARGETS[name]:g})" if name in TARGETS else ""


def _wide_table(rows: dict[str, Any]) -> Iterator[str]:
    heads = ("us", "least", "CPU us", "per second", "ratio", "of CPU", "bytes/context")
    yield f"{'':37} {' '.join(f'{head:>13}' for head in heads)}"
    for workload in WORKLOADS:
        for name, row in rows.items():
            if workload in row:
                found = row[workload]
                figures = [found[key] for key in ("us", "us_least", "cpu_us")]
                figures += [found["per_second"], found.get("ratio", 0.0), found.get("cpu_ratio", 0.0)]
                figures += [found["bytes_per_context"]] if "bytes_per_context" in found else []
                yield f"{title(name):32} {workload:4} {' '.join(f'{figure:13,.2f}' for figure in figures)}"


def verdicts(results: Results) -> Iterator[tuple[str, bool]]:
    """What was to be shown, with the figure, and whether it was."""
    rows = results["contenders"]
    for workload in ("W1", "W2"):
        for name, most in zip(OURS, (2.0, 3.5), strict=True):
            ratio = rows.get(name, {}).get(workload, {}).get("ratio")
            if ratio is not None:
                yield f"{workload}: {title(name)} {ratio:.2f} x the hand-written loop, at most {most:g}", ratio <= most
        yield from _faster(rows, workload)
    for figures in results["cases"].values():
        for name, value in figures.items():
            if name in TARGETS:
                yield f"{name}: {value:.2f}, at most {TARGETS[name]:g}", value <= TARGETS[name]


def _faster(rows: dict[str, Any], workload: str) -> Iterator[tuple[str, bool]]:
    on = rows.get("obsdag_on", {}).get(workload)
    if on is None:
        return
    others = {
        name: row[workload]["us"]
        for name, row in rows.items()
        if CONTENDERS[name.partition("@")[0]].environment and workload in row
    }
    earlier = others.pop("earlier", None)
    for name, us, least in (
        ("the earlier system", earlier, 20.0),
        ("the fastest peer", min(others.values(), default=None), 8.0),
    ):
        if us is not None:
            times = us / on["us"]
            yield f"{workload}: everything on {times:.1f} x faster than {name}, at least {least:g}", times >= least


def _markdown(results: Results) -> Iterator[str]:
    workloads = [name for name in WORKLOADS if any(name in row for row in results["contenders"].values())]
    yield f"| CPU µs per execution, all threads (times the loop) | {' | '.join(workloads)} | bytes per context |"
    yield f"|---|{'---:|' * (len(workloads) + 1)}"
    for name, row in results["contenders"].items():
        cells = [_cell(row.get(workload)) for workload in workloads]
        memory = row.get("W3", {}).get("bytes_per_context")
        yield f"| {title(name)} | {' | '.join(cells)} | {f'{memory:,.0f}' if memory else ''} |"
    yield ""
    yield ". ".join(f"{name}: {WORKLOADS[name].title}" for name in workloads) + "."
    about = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    yield f"Python {about['python']}, {about['machine']}; medians of {about['rounds']} rounds; {versions}."
    cases = {name: value for figures in results["cases"].values() for name, value in figures.items()}
    shown = (f"{name}: {value:.{0 if 'bytes' in name else 2}f}" for name, value in cases.items() if name in TARGETS)
    yield "; ".join(shown)


def _cell(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    digits = 2 if found["cpu_us"] < 10 else 0
    ratio = f" ({found['cpu_ratio']:.1f})" if "cpu_ratio" in found else ""
    return f"{found['cpu_us']:.{digits}f}{ratio}"


def write_readme(readme: Path, results: Results) -> None:
    """Puts the table between the marks of the README's section. Raises ValueError if it has none."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no {BEGIN} and {END}")
    table = "\n".join(_markdown(results))
    readme.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
