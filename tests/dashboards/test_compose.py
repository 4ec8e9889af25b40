"""docker-compose.yml: valid, pinned, closed to other machines, and all that it mounts or copies is there.

No container is started: there is no engine for them here. The programs themselves run with the same configuration in
tests/e2e.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from obsdag.cli import serve_demo
from obsdag.dashboards import folder
from obsdag.examples.demo_service import TROUBLES, trouble_periods

ROOT = folder().parent
FILE = ROOT / "docker-compose.yml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
LOADS = {"prometheus": "prometheus/prometheus.yml", "alertmanager": "alertmanager/alertmanager.yml"}
LOADS |= {"jaeger": "jaeger/jaeger.yml"}


def test_it_is_what_compose_reads() -> None:
    arguments = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert set(SERVICES) == {"demo", "prometheus", "alertmanager", "grafana", "jaeger"}


def _dockerfile() -> list[list[str]]:
    return [shlex.split(line) for line in SERVICES["demo"]["build"]["dockerfile_inline"].splitlines()]


def test_images_are_pinned() -> None:
    images = [each["image"] for each in SERVICES.values() if "image" in each]
    images += [words[1] for words in _dockerfile() if words[0] == "FROM"]

    assert len(images) == len(SERVICES)
    for image in images:
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+(-\w+)*", image), f"{image} has no full version"


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_open_to_this_machine_only(name: str) -> None:
    assert SERVICES[name]["ports"]
    for port in SERVICES[name]["ports"]:
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port), port
    assert "network_mode" not in SERVICES[name]


def test_no_two_services_want_one_port() -> None:
    ports = [port for each in SERVICES.values() for port in each["ports"]]

    assert len(ports) == len(set(ports))


def test_what_is_mounted_is_there_and_only_read() -> None:
    mounts = [mount.split(":") for each in SERVICES.values() for mount in each.get("volumes", ())]

    assert mounts
    for source, target, mode in mounts:
        assert (ROOT / source).exists(), source
        assert source.startswith("./dashboards/")
        assert target.startswith("/")
        assert mode == "ro"


@pytest.mark.parametrize("name", LOADS)
def test_each_server_is_told_to_read_what_is_mounted(name: str) -> None:
    service = SERVICES[name]
    (option,) = [each for each in service["command"] if each.startswith(("--config.file=", "--config="))]
    mounts = {mount.split(":")[1]: mount.split(":")[0] for mount in service["volumes"]}

    assert mounts[option.split("=")[1]] == f"./dashboards/{LOADS[name]}"


def test_rules_are_mounted_where_prometheus_looks_for_them() -> None:
    config = yaml.safe_load((folder() / "prometheus" / "prometheus.yml").read_text())
    mounts = {mount.split(":")[1]: mount.split(":")[0] for mount in SERVICES["prometheus"]["volumes"]}

    assert [mounts[str(Path(each).parent)] for each in config["rule_files"]] == ["./dashboards/prometheus/rules"]
    assert "--enable-feature=exemplar-storage" in SERVICES["prometheus"]["command"]


def _addresses(value: Any) -> list[tuple[str, int]]:
    """Every `host:port` of a configuration, in URLs too."""
    if isinstance(value, dict):
        return [each for part in value.values() for each in _addresses(part)]
    if isinstance(value, list):
        return [each for part in value for each in _addresses(part)]
    found = re.findall(r"^(?:https?://)?([a-z]+):(\d+)(?:/.*)?$", str(value))
    return [(host, int(port)) for host, port in found]


def test_services_reach_one_another_by_names_and_ports_that_are_there() -> None:
    files = [
        "prometheus/prometheus.yml",
        "alertmanager/alertmanager.yml",
        "grafana/provisioning/datasources/obsdag.yml",
    ]
    used = [each for name in files for each in _addresses(yaml.safe_load((folder() / name).read_text()))]
    used += _addresses(SERVICES["demo"]["environment"])

    open_ports = {(name, int(port.split(":")[2])) for name, each in SERVICES.items() for port in each["ports"]}
    assert set(used) <= open_ports
    assert {host for host, _ in used} == {"demo", "prometheus", "alertmanager", "jaeger"}


def test_jaeger_listens_where_its_ports_are() -> None:
    config = yaml.safe_load((folder() / "jaeger" / "jaeger.yml").read_text())
    otlp = config["receivers"]["otlp"]["protocols"]
    endpoints = [config["extensions"]["jaeger_query"]["http"], otlp["grpc"], otlp["http"]]

    listened = {int(each["endpoint"].removeprefix("0.0.0.0:")) for each in endpoints}
    assert listened == {int(port.split(":")[2]) for port in SERVICES["jaeger"]["ports"]}


def test_the_demo_is_started_with_options_that_it_has() -> None:
    given = dict(each.removeprefix("--").split("=", 1) for each in SERVICES["demo"]["command"] if "=" in each)

    assert SERVICES["demo"]["command"][:2] == ["demo", "--serve"]
    assert len(given) == len(SERVICES["demo"]["command"]) - 2
    assert {f"--{name}" for name in given} <= set(serve_demo.OPTIONS)
    assert set(trouble_periods(given["trouble"])) <= set(TROUBLES)
    assert "deadlock" in given["trouble"]
    assert len(given["token"]) >= 8


def test_the_page_of_grafana_needs_no_login_and_begins_with_the_overview() -> None:
    environment = SERVICES["grafana"]["environment"]
    mounts = {mount.split(":")[1]: mount.split(":")[0] for mount in SERVICES["grafana"]["volumes"]}
    home = Path(environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])

    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "true"
    assert (ROOT / mounts[str(home.parent)] / home.name).is_file()
    assert mounts["/etc/grafana/provisioning"] == "./dashboards/grafana/provisioning"


@pytest.mark.slow
def test_the_image_gets_all_that_the_package_is_built_from(tmp_path: Path) -> None:
    """The Dockerfile's COPY lines, done by hand: a wheel can be built of what they bring, data files and all."""
    copies = [words[1:] for words in _dockerfile() if words[0] == "COPY"]
    for *sources, target in copies:
        for source in sources:
            to = tmp_path / target.lstrip("/")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                to.mkdir(exist_ok=True)
                shutil.copy(ROOT / source, to)
    (installed,) = [words for words in _dockerfile() if words[0] == "RUN"]

    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"],
        cwd=tmp_path / "src",
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert installed[1:5] == ["pip", "install", "--no-cache-dir", "/src[journal,ops,otlp]"]
    assert {path.name.partition("-")[0] for path in (tmp_path / "dist").iterdir()} == {"obsdag"}
