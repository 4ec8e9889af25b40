"""A cluster that the executor starts for itself, and clusters that it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from obsdag import DAG, ConfigError, Context, ExecutorConfig, Telemetry

pytest.importorskip("ray", reason="needs Ray: pip install 'obsdag[ray]'")
from obsdag.ray import RayExecutor
from obsdag.ray.cluster import carry_dag

ROOT = Path(__file__).parent.parent.parent
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def dag() -> DAG:
    found = DAG("d")

    @found.task
    async def nothing(context: Context) -> Context:
        return context

    return found


def _python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    here = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # of the tests' cluster
    return subprocess.run(
        [sys.executable, *arguments],
        env={**here, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.slow
def test_a_cluster_of_its_own_listens_on_loopback_only_and_is_gone_afterwards(tmp_path: Path) -> None:
    done = _python(tmp_path, str(Path(__file__).with_name("local_run.py")))

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["sum"] == sum(range(1000)) + 2 * 1000
    assert told["counts"]["output"] == 1000
    assert len(told["listeners"]) > 3
    assert set(told["listeners"]) <= LOOPBACK


@pytest.mark.slow
def test_the_command_gives_the_same_lines_on_shards(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(f'{{"x": {number}}}\n' for number in range(300)))
    found = []
    for place in ([], ["--ray", "local", "--shards", "1"]):
        files = ["-i", "in.jsonl", "-o", "out.jsonl", "--failures", "bad.jsonl", "-q"]
        done = _python(tmp_path, "-m", "obsdag", "run", "tests.shards.dags:mixed", *files, *place)
        assert done.returncode == 1, done.stderr
        bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
        found.append((sorted((tmp_path / "out.jsonl").read_text().splitlines()), sorted(map(repr, bad))))

    assert found[0] == found[1]
    assert len(found[0][1]) == 30


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--ray", "10.1.2.3:6379"], r"\(--insecure\)"),
        (["--ray", "local", "--shards", "0"], "shards must be a whole number"),
        (["--shards", "2"], "--ray ADDRESS"),
        (["--insecure"], "--ray ADDRESS"),
        (["--ray", "local", "--log-level", "info"], "warnings and errors only"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(options: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{}\n")

    done = _python(tmp_path, "-m", "obsdag", "run", "tests.shards.dags:mixed", "-i", "in.jsonl", *options)

    assert done.returncode == 2
    assert re.search(told, done.stderr), done.stderr


@pytest.fixture
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsdag.ray.cluster._asks_for_token", lambda: False)


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_that_is_not_here_is_told_in_one_line(tmp_path: Path) -> None:
    arguments = ["run", "tests.shards.dags:mixed", "--ray", "127.0.0.1:6399", "-i", "/dev/null"]

    done = _python(tmp_path, "-m", "obsdag", *arguments, HOME=str(tmp_path), RAY_AUTH_MODE="token")

    [line] = [each for each in done.stderr.splitlines() if "token" in each]
    assert done.returncode == 2
    assert "address='127.0.0.1:6399': Token authentication is enabled but no authentication token was found;" in line
    assert "`ray get-auth-token --generate` once" in line
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("_no_token")
@pytest.mark.parametrize("address", ["10.1.2.3:6379", "head.example:6379", "[2001:db8::1]:6379"])
def test_an_address_that_others_can_reach_is_refused_without_a_token(address: str) -> None:
    with pytest.raises(ConfigError, match="token authentication"):
        RayExecutor(dag(), address=address)

    RayExecutor(dag(), address=address, insecure=True)


@pytest.mark.usefixtures("_no_token")
@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "[::1]:6379"])
def test_an_address_of_this_machine_alone_is_taken(address: str) -> None:
    RayExecutor(dag(), address=address)


def test_a_token_makes_an_address_acceptable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsdag.ray.cluster._asks_for_token", lambda: True)

    RayExecutor(dag(), address="10.1.2.3:6379")


def test_a_client_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="on a machine of the cluster"):
        RayExecutor(dag(), address="ray://10.1.2.3:10001")


async def test_a_list_of_targets_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: Path) -> None:
    place = tmp_path / "nowhere" / "shards.json"
    with pytest.raises(ConfigError, match=r"file_sd='.*nowhere/shards.json' cannot be written .*: name another"):
        await RayExecutor(dag(), shards=1, ops={}, file_sd=place).run([{}])


@pytest.mark.parametrize("shards", [0, -1, 1.5, True, "all", (1,), (0, 2), (3, 2), (1, "2")])
def test_shards_are_a_number_or_a_span(shards: Any) -> None:
    with pytest.raises(ConfigError, match="shards"):
        RayExecutor(dag(), shards=shards)


async def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="a telemetry for each shard"):
        RayExecutor(dag(), ExecutorConfig(telemetry=Telemetry()))
    with pytest.raises(ConfigError, match="nothing to recover from"):
        await RayExecutor(dag()).recover()


def test_the_dag_of_a_program_run_as_a_module_goes_as_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    program, carried = ModuleType("__main__"), dag()
    program.__spec__ = ModuleSpec("package.program", None)  # as under `python -m`
    vars(program)["dag"] = carried
    for name in ("__main__", "__mp_main__"):
        monkeypatch.setitem(sys.modules, name, program)

    assert isinstance(carry_dag(carried)[1], bytes), "a shard has another main program"


def test_a_cluster_that_cannot_be_joined_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "dags.py").write_text("from obsdag import DAG\ndag = DAG('d')\ndag.task(print, name='p')\n")

    told = _python(tmp_path, "-m", "obsdag", "run", "--ray", "127.0.0.1:x", "-i", os.devnull, "dags.py:dag")

    assert (told.returncode, told.stdout) == (2, "")
    (line,) = told.stderr.splitlines()
    assert line.startswith("obsdag run: error: ")
    assert "address='127.0.0.1:x': Unable to parse port number" in line
    assert "; `ray start` begins one and tells its address" in line
