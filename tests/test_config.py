"""ExecutorConfig: every field is declared once, validated by name, and read alike from every source (SEMANTICS E1)."""

from __future__ import annotations

import dataclasses
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest

from obsdag.config import ExecutorConfig, settings_table
from obsdag.errors import ConfigError

SEED_DEFAULTS = {
    "context_worker_num": 1,
    "task_worker_num": 1,
    "context_queue_timeout": 1,
    "thread_pool_worker_num": 0,
    "process_pool_worker_num": 0,
    "enable_context_gc": True,
    "enable_context_bypass": True,
    "worker_idle_times": 20,
}


def test_E1_seed_fields_come_first_with_their_defaults() -> None:
    first = dataclasses.fields(ExecutorConfig)[: len(SEED_DEFAULTS)]

    assert {each.name: each.default for each in first} == SEED_DEFAULTS
    assert ExecutorConfig(4, 2, None).context_worker_num == 4


def test_E1_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ExecutorConfig().debug = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("context_worker_num", 0, "a whole number from 1 to 100,000"),
        ("context_worker_num", 2.0, "a whole number from 1 to 100,000"),
        ("context_worker_num", True, "a whole number from 1 to 100,000"),
        ("context_worker_num", None, "a whole number from 1 to 100,000"),
        ("context_worker_num", 100_001, "a whole number from 1 to 100,000"),
        ("thread_pool_worker_num", 10_001, "a whole number from 0 to 10,000"),
        ("process_pool_worker_num", 1_001, "a whole number from 0 to 1,000"),
        ("task_worker_num", -1, "a whole number >= 0"),
        ("context_queue_timeout", -0.1, "a number of seconds >= 0, or None (wait without end)"),
        ("deadline", 0, "a number of seconds > 0, or None (no deadline)"),
        ("deadline", float("inf"), "a number of seconds > 0, or None (no deadline)"),
        ("context_deadline", float("nan"), "a number of seconds > 0, or None (no deadline)"),
        ("shutdown_grace", None, "a number of seconds >= 0"),
        ("enable_context_gc", 1, "True or False"),
        ("on_failure", "stop", "'continue' or 'raise'"),
        ("on_failure", ["raise"], "'continue' or 'raise'"),
        ("max_live_contexts", 0, "a whole number >= 1"),
        ("failures_kept", "many", "a whole number >= 0"),
        ("seed", "abc", "a whole number, or None (a new one for each run)"),
        ("telemetry", "http://localhost:4318", "an object, or None (no telemetry)"),
        ("telemetry", SimpleNamespace, "an object, or None (no telemetry)"),
        ("observers", (SimpleNamespace,), "objects"),
        ("observers", SimpleNamespace(), "objects"),
    ],
)
def test_E1_a_value_out_of_range_is_refused_by_name(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        ExecutorConfig(**{name: value})

    assert str(caught.value) == f"ExecutorConfig.{name} must be {allowed}, not {value!r}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_worker_num", 0),
        ("context_queue_timeout", None),
        ("context_queue_timeout", 0),
        ("deadline", 0.5),
        ("shutdown_grace", 0),
        ("worker_idle_times", 0),
        ("turn_s", 0),
        ("seed", -3),
        ("observers", ()),
        ("telemetry", SimpleNamespace(engine="orders")),
    ],
)
def test_E1_values_at_the_edge_are_taken(name: str, value: Any) -> None:
    assert getattr(ExecutorConfig(**{name: value}), name) == value


def test_E1_all_mistakes_are_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match="context_worker_num") as caught:
        ExecutorConfig(context_worker_num=0, debug="yes")  # type: ignore[arg-type]

    assert "ExecutorConfig.debug must be True or False" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_of_observers_becomes_a_tuple() -> None:
    observer = SimpleNamespace()

    assert ExecutorConfig(observers=[observer]).observers == (observer,)  # type: ignore[arg-type]


def test_unknown_names_are_refused_with_what_was_meant() -> None:
    with pytest.raises(ConfigError, match="no setting 'context_workers_num'; did you mean 'context_worker_num'"):
        ExecutorConfig.from_mapping({"context_workers_num": 2})
    with pytest.raises(ConfigError, match="no setting 'colour'; the settings are context_worker_num, "):
        ExecutorConfig().replace(colour="red")


def test_replace_validates_and_leaves_the_original() -> None:
    config = ExecutorConfig()

    assert config.replace(debug=True) == ExecutorConfig(debug=True)
    assert not config.debug
    with pytest.raises(ConfigError, match="turn_s"):
        config.replace(turn_s=-1)


def test_toml_table_is_read_and_none_is_written_as_text(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text('[tool.orders]\ncontext_worker_num = 8\ncontext_queue_timeout = "none"\non_failure = "raise"\n')

    config = ExecutorConfig.from_toml(file, table="tool.orders")

    assert config == ExecutorConfig(context_worker_num=8, context_queue_timeout=None, on_failure="raise")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[executer]\n", "has no table [executor]"),
        ("executor = 3\n", "has no table [executor]"),
        ("[executor\n", "is not TOML: "),
        (
            "[executor]\ncontext_worker_num = 0\n",
            "[executor] context_worker_num must be a whole number from 1 to 100,000, not 0",
        ),
        ("[executor]\ntelemetry = 'x'\n", "[executor] telemetry: telemetry can only be set in the program"),
        ("[executor]\ndebugg = true\n", "[executor] has no setting 'debugg'; did you mean 'debug'?"),
    ],
)
def test_a_mistake_in_a_toml_file_names_the_file(tmp_path: pathlib.Path, text: str, message: str) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text(text)

    with pytest.raises(ConfigError, match=r"pipeline\.toml") as caught:
        ExecutorConfig.from_toml(file)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("CONTEXT_WORKER_NUM", "8", 8),
        ("ENABLE_CONTEXT_GC", "Off", False),
        ("DEBUG", "1", True),
        ("DEADLINE", "none", None),
        ("DEADLINE", "2.5", 2.5),
        ("ON_FAILURE", "raise", "raise"),
        ("SEED", "", None),
        ("MAX_PENDING", "", 1000),
    ],
)
def test_variables_are_read_by_the_type_of_their_field(variable: str, text: str, value: Any) -> None:
    config = ExecutorConfig.from_env({f"OBSDAG_{variable}": text, "PATH": "/usr/bin"})

    assert getattr(config, variable.lower()) == value


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBSDAG_TURN_S", "0.5")

    assert ExecutorConfig.from_env().turn_s == 0.5
    assert ExecutorConfig.load().turn_s == 0.5
    assert ExecutorConfig.load(environ={}).turn_s == 0.001


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("OBSDAG_DEBUG", "maybe", "environment variable OBSDAG_DEBUG must be True or False, not 'maybe'"),
        (
            "OBSDAG_CONTEXT_WORKER_NUM",
            "8.5",
            "OBSDAG_CONTEXT_WORKER_NUM must be a whole number from 1 to 100,000, not '8.5'",
        ),
        (
            "OBSDAG_CONTEXT_WORKER_NUM",
            "0",
            "OBSDAG_CONTEXT_WORKER_NUM must be a whole number from 1 to 100,000, not '0'",
        ),
        ("OBSDAG_TELEMETRY", "x", "OBSDAG_TELEMETRY: telemetry can only be set in the program"),
        ("OBSDAG_DEADLIN", "3", "OBSDAG_DEADLIN is no setting; did you mean 'OBSDAG_DEADLINE'?"),
    ],
)
def test_a_bad_variable_is_named(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=variable) as caught:
        ExecutorConfig.from_env({variable: text})

    assert message in str(caught.value)


def test_another_prefix_reads_only_its_own_variables() -> None:
    environ = {"ORDERS_DEBUG": "true", "OBSDAG_DEADLIN": "3"}

    assert ExecutorConfig.from_env(environ, prefix="ORDERS_").debug


def test_later_sources_win(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[executor]\ncontext_worker_num = 2\ntask_worker_num = 2\nmax_pending = 2\n")
    environ = {"OBSDAG_TASK_WORKER_NUM": "3", "OBSDAG_MAX_PENDING": "3"}

    config = ExecutorConfig.load(file, environ, max_pending=4)

    assert (config.context_worker_num, config.task_worker_num, config.max_pending) == (2, 3, 4)
    assert ExecutorConfig.load({"turn_s": 2.0}, environ={}, turn_s=1.0).turn_s == 1.0
    assert ExecutorConfig.load({"deadline": "none", "telemetry": file}, environ={}).telemetry is file
    assert ExecutorConfig.load(environ={}) == ExecutorConfig()
    with pytest.raises(ConfigError, match=r"the table \[executor\] debug must be True or False, not 'perhaps'"):
        ExecutorConfig.load({"debug": "perhaps"}, environ={})


def test_describe_gives_every_field_and_its_values_are_valid() -> None:
    rows = ExecutorConfig.describe()

    assert [row.name for row in rows] == [each.name for each in dataclasses.fields(ExecutorConfig)]
    assert all(row.meaning and row.allowed and row.default for row in rows)
    deadline = next(row for row in rows if row.name == "deadline")
    assert deadline[1:3] == ("None", "a number of seconds > 0, or None (no deadline)")
    assert deadline.variable == "OBSDAG_DEADLINE"
    assert [row.name for row in rows if not row.variable] == ["telemetry", "observers", "journal", "ray"]


def test_settings_table_has_a_line_for_each_field() -> None:
    lines = settings_table().splitlines()

    assert len(lines) == 2 + len(dataclasses.fields(ExecutorConfig))
    assert {line.count(" | ") for line in lines[2:]} == {3}
