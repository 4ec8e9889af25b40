"""The settings of an executor: declared once, in `ExecutorConfig`, and derived from there everywhere.

A field carries its `Setting`: which values it takes, in which unit, and what it means. Validation, error texts, the
reading of TOML files and of `OBSDAG_*` variables, and the table in the README are made from that. Later sources win:
defaults, then a TOML table, then the environment, then what the program says itself (`ExecutorConfig.load`).
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from obsdag.errors import ConfigError

__all__ = ["ENV_PREFIX", "ExecutorConfig", "Setting", "SettingRow", "settings_table"]

ENV_PREFIX = "OBSDAG_"

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True)
class Setting:
    """What one field takes and means.

    kind: whole number, finite number of seconds, True or False, one of `choices`, an object, or several objects.
    meaning: a phrase for the reader of the README. minimum: the least value allowed or, with `above`, the greatest that
    is not. maximum: the greatest allowed. none: what None means, empty where None is not allowed.
    """

    kind: Literal["whole", "seconds", "switch", "choice", "object", "objects"]
    meaning: str
    minimum: float | None = None
    maximum: int | None = None
    above: bool = False
    none: str = ""
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """The values allowed, as a phrase: "a number of seconds > 0, or None (no deadline)"."""
        bound = "" if self.minimum is None else f" {'>' if self.above else '>='} {self.minimum:g}"
        if self.maximum is not None:
            bound = f" from {self.minimum:g} to {self.maximum:,}"
        phrase = {
            "whole": f"a whole number{bound}",
            "seconds": f"a number of seconds{bound}",
            "switch": "True or False",
            "choice": " or ".join(map(repr, self.choices)),
            "object": "an object",
            "objects": "objects",
        }[self.kind]
        return f"{phrase}, or None ({self.none})" if self.none else phrase

    def allows(self, value: Any) -> bool:
        """Whether `value` is one of the allowed ones."""
        if value is None:
            return bool(self.none)
        if self.kind == "switch":
            return isinstance(value, bool)
        if self.kind == "choice":
            return value in self.choices
        if self.kind == "object":
            return _is_instance(value)
        if self.kind == "objects":
            return isinstance(value, tuple) and all(map(_is_instance, value))
        return self._is_number(value) and self._is_in_range(value)

    def parse(self, text: str) -> Any:
        """The value that `text` (of a variable or a file) stands for; ValueError if it stands for none of this kind."""
        text = text.strip()
        if self.none and text.lower() == "none":
            return None
        readers: dict[str, Callable[[str], Any]] = {
            "whole": int,
            "seconds": float,
            "choice": str,
            "switch": _read_switch,
        }
        if self.kind not in readers:
            raise ValueError("set it in the program")
        return readers[self.kind](text)

    def _is_number(self, value: Any) -> bool:
        if isinstance(value, bool):
            return False
        if self.kind == "whole":
            return isinstance(value, int)
        return isinstance(value, int | float) and math.isfinite(value)

    def _is_in_range(self, value: float) -> bool:
        if self.minimum is None:
            return True
        if self.maximum is not None and value > self.maximum:
            return False
        return value > self.minimum if self.above else value >= self.minimum


class SettingRow(NamedTuple):
    """One line of the reference: texts, ready to print. `variable` is empty for what only a program can set."""

    name: str
    default: str
    allowed: str
    meaning: str
    variable: str


MOST_WORKERS = 100_000
MOST_THREADS = 10_000
MOST_PROCESSES = 1_000
"""Beyond these a number is a slip of the keyboard, which must not end in a machine without memory."""


def _setting(setting: Setting) -> dict[str, Setting]:
    return {"setting": setting}


def _whole(meaning: str, minimum: int | None = 0, maximum: int | None = None, none: str = "") -> dict[str, Setting]:
    return _setting(Setting("whole", meaning, minimum=minimum, maximum=maximum, none=none))


def _seconds(meaning: str, *, above: bool = False, none: str = "") -> dict[str, Setting]:
    return _setting(Setting("seconds", meaning, minimum=0.0, above=above, none=none))


def _switch(meaning: str) -> dict[str, Setting]:
    return _setting(Setting("switch", meaning))


@dataclass(frozen=True, slots=True)
class ExecutorConfig:
    """The settings of an executor (SEMANTICS E1); the first eight keep the names and defaults of the seed.

    Unknown names (`from_mapping`, `load`) and values out of range raise ConfigError, all mistakes in one line.
    `ExecutorConfig.describe()` gives every field with its default, its range and its meaning.
    """

    context_worker_num: int = field(default=1, metadata=_whole("contexts driven at once", 1, MOST_WORKERS))
    task_worker_num: int = field(
        default=1, metadata=_whole("ready tasks of one context that run at once; 0: all of them")
    )
    context_queue_timeout: float | None = field(
        default=1,
        metadata=_seconds("unit of the wait for frozen contexts, see `worker_idle_times`", none="wait without end"),
    )
    thread_pool_worker_num: int = field(
        default=0, metadata=_whole("threads for sync tasks; 0: a pool of default size", 0, MOST_THREADS)
    )
    process_pool_worker_num: int = field(
        default=0, metadata=_whole("worker processes for process tasks; 0: none", 0, MOST_PROCESSES)
    )
    enable_context_gc: bool = field(
        default=True,
        metadata=_switch("discarded and replaced contexts end at once; off: they stay readable until the run ends"),
    )
    enable_context_bypass: bool = field(
        default=True,
        metadata=_switch(
            "a context that a task makes has only what is below that task before it; off: other branches too"
        ),
    )
    worker_idle_times: int = field(
        default=20,
        metadata=_whole("when all that lives is frozen, the run waits this many times `context_queue_timeout`"),
    )
    max_live_contexts: int = field(
        default=10_000,
        metadata=_whole("contexts alive at once, beyond which input, map and loop items wait", minimum=1),
    )
    on_failure: Literal["continue", "raise"] = field(
        default="continue",
        metadata=_setting(Setting("choice", "what a failed context does to its run", choices=("continue", "raise"))),
    )
    deadline: float | None = field(
        default=None, metadata=_seconds("time for a whole run, which is then cancelled", above=True, none="no deadline")
    )
    context_deadline: float | None = field(
        default=None,
        metadata=_seconds("time for each root context and all that is made of it", above=True, none="no deadline"),
    )
    shutdown_grace: float = field(
        default=5.0, metadata=_seconds("time for cancelled executions to end, before they are abandoned and reported")
    )
    telemetry: Any | None = field(
        default=None,
        metadata=_setting(Setting("object", "the `Telemetry` that the executor reports to", none="no telemetry")),
    )
    observers: tuple[Any, ...] = field(
        default=(), metadata=_setting(Setting("objects", "further observers of the executor's runs"))
    )
    journal: Any | None = field(
        default=None,
        metadata=_setting(Setting("object", "the `SQLiteJournal` that accepted work survives a crash in", none="none")),
    )
    ray: Any | None = field(
        default=None,
        metadata=_setting(Setting("object", 'the `RayCluster` that tasks with `runner="ray"` run on', none="none")),
    )
    debug: bool = field(default=False, metadata=_switch("check the engine's own invariants after every transition"))
    failures_kept: int = field(
        default=1_000, metadata=_whole("failures that a stream or a serving period keeps: the newest")
    )
    max_pending: int = field(default=1_000, metadata=_whole("serving: submitted contexts that wait for room"))
    result_ttl: float = field(
        default=300.0, metadata=_seconds("serving: time that a result waits to be fetched", above=True)
    )
    drain_grace: float = field(
        default=30.0, metadata=_seconds("serving: time to finish what was accepted, before the rest is cancelled")
    )
    turn_s: float = field(default=0.001, metadata=_seconds("longest time that workers keep the event loop from others"))
    seed: int | None = field(
        default=None,
        metadata=_whole("seed of the retry jitter, to replay a run", minimum=None, none="a new one for each run"),
    )

    def __post_init__(self) -> None:
        if isinstance(self.observers, list):
            object.__setattr__(self, "observers", tuple(self.observers))
        problems = [
            f"{type(self).__name__}.{name} must be {setting.allowed}, not {getattr(self, name)!r}"
            for name, setting in _settings(type(self)).items()
            if not setting.allows(getattr(self, name))
        ]
        if problems:
            raise ConfigError("; ".join(problems))

    def replace(self, **changes: Any) -> ExecutorConfig:
        """A copy with `changes`, validated as a whole. Raises ConfigError."""
        _check_names(changes, type(self).__name__)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> ExecutorConfig:
        """A configuration from names and values. Raises ConfigError that names what is unknown and what was meant."""
        _check_names(settings, cls.__name__)
        return cls(**dict(settings))

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], table: str = "executor") -> ExecutorConfig:
        """A configuration from a TOML file's `table` (dots name a table in a table).

        TOML knows no None: write "none". Raises ConfigError naming the file; OSError if it cannot be read.
        """
        return cls.from_mapping(_read_toml(path, table))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, prefix: str = ENV_PREFIX) -> ExecutorConfig:
        """A configuration from variables such as OBSDAG_CONTEXT_WORKER_NUM=8 (`environ`: None reads os.environ).

        Empty variables count as not set. Raises ConfigError naming the variable: for a bad value, and for a variable
        with the prefix that is no setting, since a misspelled one would otherwise be ignored in silence.
        """
        return cls.from_mapping(_read_env(os.environ if environ is None else environ, prefix))

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> ExecutorConfig:
        """A configuration from all sources, later ones winning: defaults < `source` < environment < `overrides`.

        source: a TOML file with a table [executor], or that table itself as a mapping. environ: None reads os.environ,
        {} reads none. Raises ConfigError that names the place.
        """
        base: Mapping[str, Any] = {}
        if isinstance(source, Mapping):
            base = _read_table(source, "the table [executor]")
        elif source is not None:
            base = _read_toml(source, "executor")
        variables = _read_env(os.environ if environ is None else environ, ENV_PREFIX)
        return cls.from_mapping({**base, **variables, **overrides})

    @classmethod
    def describe(cls) -> tuple[SettingRow, ...]:
        """Every field in order: name, default, allowed values, meaning, environment variable."""
        rows = []
        for each in dataclasses.fields(cls):
            setting: Setting = each.metadata["setting"]
            variable = "" if setting.kind.startswith("object") else ENV_PREFIX + each.name.upper()
            rows.append(SettingRow(each.name, repr(each.default), setting.allowed, setting.meaning, variable))
        return tuple(rows)


def settings_table() -> str:
    """The fields of ExecutorConfig as a Markdown table, as it stands in the README (`python -m obsdag.config`)."""
    rows = ExecutorConfig.describe()
    lines = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | `{default}` | {allowed} | {meaning} |" for name, default, allowed, meaning, _ in rows]
    return "\n".join(lines)


def _settings(config: type[ExecutorConfig]) -> dict[str, Setting]:
    return {each.name: each.metadata["setting"] for each in dataclasses.fields(config)}


def _check_names(names: Iterable[Any], place: str) -> None:
    known = list(_settings(ExecutorConfig))
    unknown = [str(name) for name in names if name not in known]
    if unknown:
        raise ConfigError("; ".join(f"{place} has no setting {name!r}; {_hint(name, known)}" for name in unknown))


def _hint(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"the settings are {', '.join(known)}"


def _read_toml(path: str | os.PathLike[str], table: str) -> dict[str, Any]:
    place = os.fspath(path)
    with open(path, "rb") as file:
        try:
            found: Any = tomllib.load(file)
        except ValueError as error:  # also UnicodeDecodeError
            raise ConfigError(f"{place} is not TOML: {error}") from None
    for part in table.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise ConfigError(f"{place} has no table [{table}]")
    return _read_table(found, f"{place} [{table}]")


def _read_table(table: Mapping[str, Any], place: str) -> dict[str, Any]:
    _check_names(table, place)
    return {name: _from_text(f"{place} {name}", name, value) for name, value in table.items()}


def _read_env(environ: Mapping[str, str], prefix: str) -> dict[str, Any]:
    known = [prefix + name.upper() for name in _settings(ExecutorConfig)]
    given = {name: text for name, text in environ.items() if name.startswith(prefix) and text.strip()}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(
            "; ".join(f"environment variable {name} is no setting; {_hint(name, known)}" for name in unknown)
        )
    fields = {name: name.removeprefix(prefix).lower() for name in given}
    return {fields[name]: _from_text(f"environment variable {name}", fields[name], given[name]) for name in given}


def _from_text(place: str, name: str, value: Any) -> Any:
    setting = _settings(ExecutorConfig)[name]
    try:
        parsed = setting.parse(value) if isinstance(value, str) else value
    except ValueError:
        parsed = value
    if not setting.allows(parsed):
        if setting.kind.startswith("object"):
            raise ConfigError(f"{place}: {name} can only be set in the program")
        raise ConfigError(f"{place} must be {setting.allowed}, not {value!r}")
    return parsed


def _read_switch(text: str) -> bool:
    if text.lower() not in _WORDS:
        raise ValueError(text)
    return _WORDS[text.lower()]


def _is_instance(value: Any) -> bool:
    # The mistakes that happen: the class instead of an instance, an address or a name instead of the object.
    return not isinstance(value, type | str | bytes | int | float | Mapping)


if __name__ == "__main__":
    print(settings_table())  # noqa: T201
