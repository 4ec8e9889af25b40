"""Options that stand for fields of `ExecutorConfig`: made from its declaration, in name, range and meaning.

Later ones win: the DAG's TOML file, --config, OBSDAG_* variables, then the options in the order of the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final

from obsdag.cli.common import CliError, one_line
from obsdag.config import ExecutorConfig, Setting
from obsdag.errors import ConfigError

__all__ = ["OPTIONS", "add_settings", "load_config", "settings_help"]

OPTIONS: Final[Mapping[str, str]] = {
    "--workers": "context_worker_num",
    "--task-workers": "task_worker_num",
    "--threads": "thread_pool_worker_num",
    "--processes": "process_pool_worker_num",
    "--deadline": "deadline",
}
"""Options of their own for what is set most often; all other fields: --set."""

_FIELDS: Final = {each.name: each for each in dataclasses.fields(ExecutorConfig)}
_METAVARS: Final = {"whole": "N", "seconds": "SECONDS"}


def add_settings(parser: argparse.ArgumentParser, defaults: Mapping[str, Any] | None = None) -> None:
    """Adds the options to a command's parser; `defaults`: what the command sets where the user does not."""
    group = parser.add_argument_group("execution")
    for option, name in OPTIONS.items():
        setting = _setting(name)
        default = (defaults or {}).get(name, _FIELDS[name].default)
        note = "" if default is None else f"; default {default}"
        help_text = f"{setting.meaning} ({setting.allowed}{note})"
        group.add_argument(option, metavar=_METAVARS[setting.kind], action=_Option, help=help_text.replace("%", "%%"))
    group.add_argument("--config", metavar="FILE.toml", help="settings from the table [executor] of a TOML file")
    group.add_argument(
        "--set", metavar="NAME=VALUE", action=_Option, help="any setting below by its name; may be given several times"
    )
    parser.set_defaults(settings=(), setting_defaults=dict(defaults or {}))


def settings_help(defaults: Mapping[str, Any] | None = None) -> str:
    """The settings as they stand in the help; `defaults` as in `add_settings`."""
    rows = [row for row in ExecutorConfig.describe() if row.variable]
    width = max(len(row.name) for row in rows)
    own = {name: repr(value) for name, value in (defaults or {}).items()}
    lines = []
    for row in rows:
        default = own.get(row.name, row.default)
        lines += [f"  {row.name:{width}}  {row.meaning}", f"  {'':{width}}  ({row.allowed}; default {default})"]
    return "\n".join(["settings for --set, a table [executor], or variables such as OBSDAG_DEADLINE:", *lines])


def load_config(args: argparse.Namespace, target: str = "") -> ExecutorConfig:
    """The configuration of a command. Raises CliError that names the option, file or variable."""
    settings = dict(args.settings)
    try:
        base = _file_settings(args, target)
        return ExecutorConfig.load({**args.setting_defaults, **base}, None, **settings)
    except ConfigError as error:
        raise CliError(one_line(error)) from error


def _file_settings(args: argparse.Namespace, target: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if target.endswith(".toml"):
        found |= _given_in(target, needed=False)
    if args.config is not None:
        found |= _given_in(args.config)
    return found


def _given_in(path: str, needed: bool = True) -> dict[str, Any]:
    """The settings that a TOML file has, checked; a file without any is a mistake only if they are `needed` of it."""
    try:
        with open(path, "rb") as file:
            given = tomllib.load(file).get("executor")
        if given is None and not needed:
            return {}
        config = ExecutorConfig.from_toml(path)
    except OSError as error:
        if not needed:
            return {}  # told when the DAG is read
        raise CliError(f"--config {path} cannot be read: {error.strerror or error}") from error
    except ConfigError:
        raise
    except ValueError as error:  # also UnicodeDecodeError
        raise CliError(f"{path} is not TOML: {one_line(error)}") from error
    return {name: getattr(config, name) for name in given or ()}


def _setting(name: str) -> Setting:
    setting: Setting = _FIELDS[name].metadata["setting"]
    return setting


class _Option(argparse.Action):
    """Reads a value by its setting's declaration, and keeps it with the others in order."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        option = option_string or self.dest
        name, text = (OPTIONS[option], str(values)) if option in OPTIONS else _split(str(values))
        place = option if option in OPTIONS else f"--set {name}"
        namespace.settings = (*namespace.settings, (name, _read(place, name, text)))


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise CliError(f"--set {text!r} sets nothing: write NAME=VALUE, such as --set deadline=60")
    known = [row.name for row in ExecutorConfig.describe() if row.variable]
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the settings are {', '.join(known)}"
        raise CliError(f"--set: there is no setting {name!r}; {hint}")
    return name, value


def _read(place: str, name: str, text: str) -> Any:
    setting = _setting(name)
    try:
        value = setting.parse(text)
    except ValueError:
        value = text
    if not setting.allows(value):
        raise CliError(f"{place} must be {setting.allowed}, not {text!r}")
    return value
