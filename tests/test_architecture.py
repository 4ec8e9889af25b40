"""The shape of the house, read from the source: floors, purity, documentation, lengths, and what may be tracked.

The floors are those of the map in `obsdag/__init__.py`. A failing test here names the place and the way out.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import obsdag

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "obsdag"

_FLOOR = re.compile(r"^    (?P<entries>[a-z_.]+(?:, [a-z_.]+)*)  +\S", re.MULTILINE)
FLOORS = [found["entries"].split(", ") for found in _FLOOR.finditer(obsdag.__doc__ or "")]
"""From the ground up, read from the map. A module may import from its own floor and those below it."""

TELEMETRY_LIBRARIES = {"opentelemetry", "prometheus_client", "structlog", "logging"}
IMPURE = TELEMETRY_LIBRARIES | {
    *("asyncio", "concurrent", "multiprocessing", "selectors", "signal", "socket", "subprocess", "threading", "time")
}
GRAPH = ("config", "context", "dag_config", "draw", "errors", "graph", "layout", "limits", "plan", "runtime", "tasks")
FORBIDDEN: dict[str, set[str]] = {
    "core": IMPURE,
    "tasks.detached": set(),  # runs in worker processes, where it takes up the caller's trace (T12)
    **dict.fromkeys((*GRAPH, "validation"), TELEMETRY_LIBRARIES | {"asyncio"}),
}
"""What a module must not import at all, not even for its types."""

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
LONGER_FILES: dict[str, int] = {}
LONGER_FUNCTIONS = {
    "obsdag.worker.Worker._work": 70,  # the hot loop
}
SLACK_LINES = 15
"""Exceptions with their own bounds, which may only shrink: one that is looser than the slack fails, too."""

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "dashboards",
    "docker-compose.yml",
    "obsdag",
    "pyproject.toml",
    "tests",
}

# Written with a class in the middle so that this file does not match itself.
MACHINE = re.compile(r"/wor[k]/|/tm[p]/venv|/roo[t]/|/hom[e]/[a-z]|C:[\\]Users")
REGISTRIES = re.compile(
    r"pypi[.]org|pythonhosted[.]org|registry[.]npmjs|proxy[.]golang|docker[.]io|ghcr[.]io|deb[.]debian[.]org"
)


class Import(NamedTuple):
    """One imported module: where, what, whether only for types, and whether inside a function."""

    place: str
    module: str
    for_types: bool
    late: bool


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def _imports(name: str) -> Iterator[Import]:
    pending: list[tuple[ast.AST, bool, bool]] = [(TREES[name], False, False)]
    while pending:
        node, for_types, late = pending.pop()
        place = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (Import(place, alias.name, for_types, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{place}: relative import; write the full name"
            yield from (Import(place, module, for_types, late) for module in _sources(node))
        late = late or isinstance(node, FUNCTION | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += [(child, True, late) for child in node.body]
            pending += [(child, for_types, late) for child in node.orelse]
        else:
            pending += [(child, for_types, late) for child in ast.iter_child_nodes(node)]


def _sources(node: ast.ImportFrom) -> set[str]:
    """The modules that `from x import a, b` reads: x, or x.a where that is a module."""
    base = node.module or ""
    names = {alias.name for alias in node.names} - {"__version__"}  # which is there before anything is imported
    return {f"{base}.{name}" if f"{base}.{name}" in MODULES else base for name in names}


def _is_within(module: str, entry: str) -> bool:
    return module == f"obsdag.{entry}" or module.startswith(f"obsdag.{entry}.")


def _entry_of(module: str, entries: Iterable[str]) -> str | None:
    """The longest entry that the module lies in."""
    return max((entry for entry in entries if _is_within(module, entry)), key=len, default=None)


def _floor(module: str) -> int:
    """The number of the module's floor; the package itself, with all public names, is as high as the highest."""
    if module == "obsdag":
        return len(FLOORS) - 1
    floors = {entry: number for number, entries in enumerate(FLOORS) for entry in entries}
    entry = _entry_of(module, floors)
    assert entry, f"{module} has no floor: put it into the map in the docstring of obsdag/__init__.py"
    return floors[entry]


def test_the_map_shows_what_is_there() -> None:
    assert len(FLOORS) >= 6, "the map in the docstring of obsdag/__init__.py cannot be read"
    unknown = [each for entries in FLOORS for each in entries if not any(_is_within(name, each) for name in MODULES)]
    assert not unknown, f"the map in obsdag/__init__.py shows what is not there: {unknown}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name: str) -> None:
    upwards = [
        f"{found.place} imports {found.module}"
        for found in _imports(name)
        if found.module.split(".")[0] == "obsdag" and not found.for_types and _floor(found.module) > _floor(name)
    ]

    assert not upwards, f"a lower floor must not know a higher one: {upwards}"


def test_no_module_needs_itself_to_be_imported() -> None:
    graph = {
        name: {
            each.module for each in _imports(name) if each.module in MODULES and not each.for_types and not each.late
        }
        for name in MODULES
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import one another in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", MODULES)
def test_deciding_code_is_pure(name: str) -> None:
    forbidden = FORBIDDEN.get(_entry_of(name, FORBIDDEN) or "", set())
    found = [f"{each.place} imports {each.module}" for each in _imports(name) if each.module.split(".")[0] in forbidden]

    assert not found, f"time is handed in, facts are told to observers: {found}"


@pytest.mark.parametrize("module", ["obsdag", *(name for name in MODULES if name.startswith("obsdag.core"))])
def test_the_engine_loads_no_telemetry_library(module: str) -> None:
    heavy = "{'prometheus_client', 'opentelemetry.sdk', 'structlog', 'rich'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_docstring_and_says_what_it_exports(name: str) -> None:
    assert ast.get_docstring(TREES[name]), f"{name} needs a docstring that says what it is for"
    if MODULES[name].name == "__main__.py":
        return
    if name.startswith("obsdag.ray") and importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray: pip install 'obsdag[ray]'")
    module = importlib.import_module(name)
    missing = [each for each in module.__all__ if not hasattr(module, each)]

    assert not missing, f"{name}.__all__ names what is not there: {missing}"
    assert list(module.__all__) == sorted(set(module.__all__), key=_ruff_order), f"sort {name}.__all__ (ruff RUF022)"


def _ruff_order(name: str) -> tuple[int, str]:
    """RUF022's order: CONSTANTS, then Classes, then the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_every_module_is_found_by_import() -> None:
    walked = {each.name for each in pkgutil.walk_packages([str(PACKAGE)], "obsdag.")} | {"obsdag"}

    assert {name for name in MODULES if not name.endswith("__main__")} <= walked, "a folder lacks its __init__.py"


def test_files_do_not_grow_beyond_their_bound() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}

    _ratchet(lengths, MAX_FILE_LINES, LONGER_FILES, "LONGER_FILES")


def test_functions_do_not_grow_beyond_their_bound() -> None:
    lengths = {place: lines for name, tree in TREES.items() for place, lines in _functions(tree, name)}

    _ratchet(lengths, MAX_FUNCTION_LINES, LONGER_FUNCTIONS, "LONGER_FUNCTIONS")


def _functions(node: ast.AST, place: str) -> Iterator[tuple[str, int]]:
    for child in ast.iter_child_nodes(node):
        name = f"{place}.{child.name}" if isinstance(child, ast.ClassDef | FUNCTION) else place
        if isinstance(child, FUNCTION):
            yield name, (child.end_lineno or child.lineno) - child.lineno + 1
        yield from _functions(child, name)


def _ratchet(lengths: dict[str, int], bound: int, longer: dict[str, int], table: str) -> None:
    too_long = {place: lines for place, lines in lengths.items() if lines > longer.get(place, bound)}
    assert not too_long, f"cut these into smaller pieces (bound {bound} lines): {too_long}"
    loose = {place: lengths.get(place, 0) for place, own in longer.items() if lengths.get(place, 0) + SLACK_LINES < own}
    assert not loose, f"these became shorter: lower or remove their bounds in {table}: {loose}"
    needless = {place: own for place, own in longer.items() if lengths.get(place, 0) <= bound}
    assert not needless, f"these are within the common bound: remove them from {table}: {needless}"


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_top_of_the_repository_stays_small() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in _tracked()}

    assert top <= TOP_LEVEL, "put it into one of the folders, or say here why not"


@pytest.mark.parametrize(
    ("pattern", "what"), [(MACHINE, "a path of one machine"), (REGISTRIES, "a package registry's host")]
)
def test_tracked_files_name_no(pattern: re.Pattern[str], what: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in _tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1)
        if pattern.search(line)
    ]

    assert not found, f"{what} is named in {found}"


def test_the_public_surface_is_one_for_readers_checkers_and_the_interpreter() -> None:
    typed = {
        alias.name
        for node in ast.walk(TREES["obsdag"])
        if isinstance(node, ast.ImportFrom) and _sources(node) & set(MODULES)
        for alias in node.names
    }

    assert typed | {"__version__"} == set(obsdag.__all__)
    assert set(obsdag.__all__) <= set(dir(obsdag))
    strangers = [name for name in obsdag.__all__ if not _is_own(getattr(obsdag, name))]
    assert not strangers, f"these come from elsewhere: {strangers}"
    with pytest.raises(AttributeError, match="'obsdag' has no attribute 'Exekutor'"):
        getattr(obsdag, "Exekutor")  # noqa: B009


def _is_own(value: object) -> bool:
    return getattr(value, "__module__", "obsdag").split(".")[0] == "obsdag"
