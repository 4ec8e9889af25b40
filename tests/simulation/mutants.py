"""Mutation testing of obsdag/core: `python -m tests.simulation.mutants --count 400 --seed 1 --jobs 2`.

Draws changes of one place each (a comparison, an operator, a condition, a constant, a statement left out), and looks
for each with, in this order, up to the first that fails: simulated scenarios, the tests that simulations left behind
with those of the core and of limits, the rules' tests, and those of telemetry. Prints what found it, and what survived;
at the end the score with its 95 % confidence interval (Wilson's).

A process is forked for each mutant from one that has imported everything but obsdag, whose mutated module is compiled
from its syntax tree: no file is written. `--site FILE:NUMBER` tries one mutant again, as it was printed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import os
import random
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent.parent
CORE = ROOT / "obsdag" / "core"
PASSED_OVER = {"__init__.py", "restoring.py"}  # the latter is the journal's, with tests of its own
SCENARIOS = 300
CPU_S, WALL_S = 240, 900
PRELOADED = (
    "asyncio", "concurrent.futures", "hypothesis", "multiprocessing.pool", "opentelemetry.sdk.trace.export",
    "prometheus_client.openmetrics.exposition", "pytest", "pytest_asyncio", "pytest_timeout", "sqlite3", "structlog",
    "tomllib",
)  # fmt: skip

STAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("units", ("tests/simulation/test_found.py", "tests/simulation/test_found_later.py", "tests/core", "tests/limits")),
    # One of the six schedules; nothing that measures memory, which a mutant in a forked process has of its own.
    ("rules", ("tests/rules", "-k", "not (1x1 or 1x0 or 4x1 or 64x1 or 64x0 or memory)", "-m", "not slow")),
    ("telemetry", ("tests/telemetry/test_tracing_golden.py", "tests/telemetry/test_tracing_shapes.py",
                   "tests/telemetry/test_metrics_runs.py", "tests/telemetry/test_telemetry.py")),
)  # fmt: skip

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
}  # fmt: skip


class Change(ast.NodeTransformer):
    """Counts the places of a module that could be changed, and changes number `wanted`. what: told in words."""

    def __init__(self, wanted: int = -1) -> None:
        self.wanted, self.number, self.what = wanted, 0, ""

    def _here(self, node: ast.AST) -> bool:
        here = self.number == self.wanted
        self.number += 1
        if here:
            self.what = f"{getattr(node, 'lineno', 0)}: {ast.unparse(node).splitlines()[0][:90]}"
        return here

    def _changed(self, node: Any) -> Any:
        self.what += f" -> {ast.unparse(node).splitlines()[0][:90]}"
        return node

    def visit_If(self, node: ast.If) -> Any:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node
        return self._condition(node)

    def _condition(self, node: Any) -> Any:
        if self._here(node):
            node.test = ast.UnaryOp(ast.Not(), node.test)
            return self._changed(node)
        return self.generic_visit(node)

    visit_While = visit_IfExp = _condition

    def visit_Compare(self, node: ast.Compare) -> Any:
        other = COMPARED.get(type(node.ops[0]))
        if other is not None and self._here(node):
            node.ops[0] = other()
            return self._changed(node)
        return self.generic_visit(node)

    def _computed(self, node: Any) -> Any:
        other = COMPUTED.get(type(node.op))
        if other is not None and self._here(node):
            node.op = other()
            return self._changed(node)
        return self.generic_visit(node)

    visit_BinOp = _computed

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        if self._here(node):
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            return self._changed(node)
        return self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not | ast.Invert) and self._here(node):
            return self._changed(node.operand)
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> Any:
        if type(node.value) in (int, bool) and self._here(node):
            node.value = (not node.value) if type(node.value) is bool else int(node.value) + 1  # type: ignore[arg-type]
            return self._changed(node)
        return node

    def _statement(self, node: Any) -> Any:
        if self._here(node):
            self.what += " -> left out"
            return ast.copy_location(ast.Pass(), node)
        return self.generic_visit(node)

    visit_Assign = visit_Delete = _statement

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        left_out = self._statement(node)
        return left_out if isinstance(left_out, ast.Pass) else self._computed(node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        return self._statement(node) if isinstance(node.value, ast.Call) else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.args.defaults = [self.visit(each) for each in node.args.defaults]
        node.body = [self.visit(each) for each in node.body]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        node.body = [self.visit(each) if isinstance(each, ast.FunctionDef) else each for each in node.body]
        return node

    def visit_Module(self, node: ast.Module) -> Any:
        node.body = [
            self.visit(each) if isinstance(each, ast.FunctionDef | ast.ClassDef) else each for each in node.body
        ]
        return node


def places() -> list[tuple[Path, int]]:
    """Every place that could be changed."""
    found = []
    for path in sorted(CORE.glob("*.py")):
        if path.name not in PASSED_OVER:
            change = Change()
            change.visit(ast.parse(path.read_text()))
            found += [(path, number) for number in range(change.number)]
    return found


class Mutated(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports one module with its change."""

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(f"obsdag.core.{path.stem}", str(path))
        self.number = number

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        tree = Change(self.number).visit(ast.parse(Path(self.path).read_text()))
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


class FirstFailure:
    """A pytest plugin: which test found it."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.partition("::")[2]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = f"import of {report.nodeid}"


def look_for(path: Path | None, number: int, stages: int = len(STAGES)) -> str:
    """In a process of its own: by what the mutant was found; empty if it was not."""
    if path is not None:
        sys.meta_path.insert(0, Mutated(path, number))
    try:
        from tests.simulation.scenarios import make_scenario, mix, play
    except Exception as error:
        return f"import: {error!r:.60}"
    for seed in range(SCENARIOS):
        try:
            play(make_scenario(seed), mix(seed, 0)).finish(20_000)
        except BaseException as error:
            return f"scenario {seed}: {error!s:.60}"
    import pytest

    for stage, arguments in STAGES[:stages]:
        first = FirstFailure()
        fixed = ["-x", "-q", "-p", "no:cacheprovider", "--timeout", "60", "--no-header", "--tb=no", "--assert=plain"]
        code = pytest.main([*fixed, *arguments], plugins=[first])
        if code:
            return f"{stage}: {first.name or code}"
    return ""


def start(path: Path | None, number: int, stages: int) -> tuple[int, int]:
    """Forks a process that looks for a mutant: its id, and where it will write by what it was found."""
    reads, writes = os.pipe()
    child = os.fork()
    if child:
        os.close(writes)
        return child, reads
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        try:
            found = look_for(path, number, stages) or "-"
        except BaseException as error:
            found = f"{error!r:.80}"
        os.write(writes, found.encode())
    finally:
        os._exit(0)


def results(
    sample: Sequence[tuple[Path | None, int]], jobs: int, minutes: float, stages: int = len(STAGES)
) -> Iterator[tuple[Any, int, str]]:
    """Each mutant with what found it, as they come; no new ones are begun after so many minutes."""
    waiting, running = list(reversed(sample)), {}
    end = time.monotonic() + minutes * 60
    while running or (waiting and time.monotonic() < end):
        while waiting and len(running) < jobs and time.monotonic() < end:
            path, number = waiting.pop()
            child, reads = start(path, number, stages)
            running[reads] = (path, number, child, time.monotonic() + WALL_S)
        ready, _, _ = select.select(list(running), [], [], 1.0)
        late = [reads for reads, each in running.items() if time.monotonic() > each[3]]
        for reads in {*ready, *late}:
            path, number, child, _ = running.pop(reads)
            found = os.read(reads, 4096).decode(errors="replace") if reads in ready else ""
            os.close(reads)
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            yield path, number, found or "does not end"


def wilson(found: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, Wilson's (Journal of the American Statistical Association 22, 1927)."""
    z, share = 1.96, found / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return middle - half, middle + half


def told(path: Path, number: int) -> str:
    """A mutant in words."""
    change = Change(number)
    change.visit(ast.parse(path.read_text()))
    return f"{path.name}:{number} line {change.what}"


def main() -> int:
    """Reads the command line; 1 if the code as it is does not pass."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--quick", action="store_true", help="scenarios and the first group of tests only")
    parser.add_argument("--unchecked", action="store_true", help="do not try the code as it is first")
    parser.add_argument("--site", action="append", default=[], help="FILE:NUMBER, as printed")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    for module in PRELOADED:
        importlib.import_module(module)
    assert not any(name.partition(".")[0] == "obsdag" for name in sys.modules)
    pool = places()
    if arguments.site:
        pairs = [site.rpartition(":") for site in arguments.site]
        sample = [(CORE / name, int(number)) for name, _, number in pairs]
    else:
        sample = random.Random(arguments.seed).sample(pool, min(arguments.count, len(pool)))
    print(f"{len(pool)} places, {len(sample)} drawn with seed {arguments.seed}", flush=True)
    stages = 1 if arguments.quick else len(STAGES)
    if not arguments.unchecked:
        ((_, _, by),) = results([(None, 0)], 1, math.inf, stages)
        if by != "-":
            print(f"the code as it is does not pass: {by}")
            return 1
    found = total = 0
    for path, number, by in results(sample, arguments.jobs, arguments.minutes, stages):
        total += 1
        found += by != "-"
        how = "SURVIVED" if by == "-" else f"found by {by}:"
        print(f"{how} {told(path, number)}", flush=True)
    low, high = wilson(found, total)
    print(f"{found} of {total} found: {found / total:.1%} (95 % interval {low:.1%} to {high:.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
