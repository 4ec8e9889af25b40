"""The DAG that a command names: `module:dag`, `path/to/file.py:dag`, or a TOML file.

The part after the colon is a DAG, or a function without parameters that makes one. Modules are looked for in the
current directory first, and a file is a module of its own directory, as when Python runs it: worker processes find the
functions of process tasks in the same way.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from obsdag.cli.common import CliError, one_line
from obsdag.errors import GraphError, ObsdagError
from obsdag.graph import DAG
from obsdag.tasks.base import Task

__all__ = ["load_dag"]

_FORMS = "write module:dag, path/to/file.py:dag, or path/to/file.toml"


def load_dag(target: str) -> DAG:
    """The DAG that `target` names, built. Raises CliError that says what is wrong with it, and where."""
    if not Path.cwd().exists():
        raise CliError("the current directory does not exist any more: change to another one")
    _look_in(os.getcwd())
    if target.endswith(".toml"):
        return _from_toml(target)
    name, colon, attribute = target.rpartition(":")
    if not colon or not name or not attribute:
        raise CliError(f"{target!r} names no DAG: {_FORMS}")
    module = _from_file(name) if name.endswith(".py") else _from_name(name)
    dag = _as_dag(_find(module, name, attribute), target)
    try:
        dag.build()
    except GraphError as error:
        raise CliError(f"the DAG {target!r} cannot be built: {one_line(error)}") from error
    return dag


def _look_in(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _from_toml(path: str) -> DAG:
    if not Path(path).is_file():
        raise CliError(f"there is no file {path!r}")
    _look_in(str(Path(path).resolve().parent))
    try:
        dag = DAG.from_config(path)
        dag.build()
    except ObsdagError as error:
        raise CliError(f"{path}: {one_line(error)}") from error
    except Exception as error:  # of a module that it names
        raise CliError(f"{path}: {_told(error)}") from error
    return dag


def _from_file(path: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        raise CliError(f"there is no file {path!r}")
    if "." in file.stem:
        raise CliError(f"{path!r} cannot be imported, because of the dot in its name: rename it")
    if file.stem in sys.stdlib_module_names:  # whoever imports that later would get this one
        raise CliError(f"{path!r} has the name of another module, of Python's own: rename it")
    folder = str(file.resolve().parent)
    if sys.path[0] != folder:
        sys.path.insert(0, folder)
    module = _imported(file.stem, path)
    found = getattr(module, "__file__", None)
    if not found or not os.path.samefile(found, file):
        raise CliError(f"{path!r} has the name of another module, {found or 'which is built into Python'}: rename it")
    return module


def _from_name(name: str) -> ModuleType:
    if os.sep in name:
        raise CliError(f"{name!r} is no module's name: {_FORMS}")
    if not all(part.isidentifier() for part in name.split(".")):
        raise CliError(f"{name!r} is no module's name (no relative ones either): {_FORMS}")
    return _imported(name, name)


def _imported(name: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            where = f"in {os.getcwd()} and among the installed packages"
            raise CliError(f"there is no module {error.name!r} {where}: {_FORMS}") from error
        raise CliError(f"{place} cannot be imported: {_told(error)}") from error
    except (Exception, SystemExit) as error:
        raise CliError(f"{place} cannot be imported: {_told(error)}") from error


def _told(error: BaseException) -> str:
    """The exception and the line that raised it, on one line."""
    text = one_line(error.msg if isinstance(error, SyntaxError) else error)
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{what} ({error.filename}:{error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen ")]
    return f"{what} ({frames[-1].filename}:{frames[-1].lineno})" if frames else what


def _find(module: ModuleType, name: str, attribute: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise CliError(f"{name!r} has no attribute {attribute!r}{_instead(module, attribute)}") from None
    return found


def _instead(module: ModuleType, wrong: str) -> str:
    dags = sorted(name for name, value in vars(module).items() if isinstance(value, DAG))
    if dags:
        return f"; its DAGs: {', '.join(dags)}"
    close = get_close_matches(wrong, [name for name in vars(module) if not name.startswith("_")], n=1)
    return f"; did you mean {close[0]!r}?" if close else ", and no DAG at all"


def _as_dag(found: Any, target: str) -> DAG:
    wanted = "it must be a DAG, or a function without parameters that makes one"
    if isinstance(found, DAG):
        return found
    if isinstance(found, Task):
        raise CliError(f"{target!r} is the task {found.id!r}: name the DAG that it is in")
    if not callable(found):
        raise CliError(f"{target!r} is of type {type(found).__name__}: {wanted}")
    made = _called(found, target)
    if inspect.iscoroutine(made):
        made.close()
        raise CliError(f"{target!r} is a coroutine function: {wanted}")
    if not isinstance(made, DAG):
        raise CliError(f"{target!r} gave something of type {type(made).__name__} when called: {wanted}")
    return made


def _called(function: Callable[[], Any], target: str) -> Any:
    needed: object = ""
    try:
        needed = signature = inspect.signature(function)
        signature.bind()
    except TypeError:
        raise CliError(f"{target!r} takes parameters {needed}: name a function without any that makes it") from None
    except ValueError:
        pass  # a builtin that does not tell; calling it will
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise CliError(f"{target!r} could not make its DAG: {_told(error)}") from error
