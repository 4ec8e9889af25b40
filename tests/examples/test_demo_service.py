"""The demo service as a program: what it is told, what it says, how it ends. tests/e2e have its numbers and traces."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import pytest

from obsdag.examples.demo_service import TROUBLES, Troubles, trouble_periods
from tests.cli.command import command
from tests.e2e.servers import demo, request, until


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_stop(number: int, tmp_path: Path) -> None:
    with demo(tmp_path, "--trouble=deadlock=0.5,drops=0.7", "--rate=40") as service:
        assert set(service.troubles) == set(TROUBLES)
        until(lambda: service.lines("run.deadlocked"), "trouble of its own accord")
        until(lambda: service.lines("telemetry.dropping"), "the other kind")
        assert request(f"http://{service.address}/")[0] == 200, "the live page"
        assert request(service.alerts_url, b"no JSON")[0] == 400
        assert request(service.alerts_url, b"[]")[0] == 400
        assert request(service.alerts_url.replace("alerts", "elsewhere"), b"")[0] == 404
        service.process.send_signal(number)
        status = service.process.wait(15)

    assert status == 0
    (drained,) = service.lines("drain.finished")
    assert drained["manifest"]["abandoned"] == []


def test_it_ends_soon_under_more_load_than_it_can_bear(tmp_path: Path) -> None:
    with demo(tmp_path, "--rate=1000") as service:
        full = re.compile(r'^obsdag_pending_contexts{.*"shop"} (99|100)\.0$', re.MULTILINE)
        until(lambda: full.search(service.scrape()), "a line that is full", 60.0)
        service.process.send_signal(signal.SIGTERM)
        status = service.process.wait(15)

    assert status == 0
    assert service.lines("drain.finished")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--port", "99999"), "--port must be a port, 0 to 65535, not '99999'"),
        (("--control-port", "x"), "--control-port must be a port"),
        (("--rate", "0"), "--rate must be a number of orders per second"),
        (("--rate", "nan"), "--rate must be a number"),
        (("--trouble", "flood=3"), "trouble 'flood=3' is not NAME=SECONDS with a name of deadlock, "),
        (("--host", "0.0.0.0"), "give a token"),
        (("--token", "short"), "token must be at least 8"),
        (("--workers", "3"), "--serve goes with --host, --port, "),
        (("--path", "."), "--serve goes with"),
    ],
)
def test_what_it_cannot_do_is_told_in_one_line(options: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = command("demo", "--serve", *options, folder=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for option in ("--port", "--control-port"):
            other = {"--port": "--control-port", "--control-port": "--port"}[option]
            port = str(taken.getsockname()[1])
            done = command("demo", "--serve", option, port, other, "0", folder=tmp_path)

            assert done.returncode == 2
            assert "cannot listen: Address already in use" in done.stderr


def test_the_census_does_not_take_options_of_the_service(tmp_path: Path) -> None:
    done = command("demo", "--rate", "3", folder=tmp_path)

    assert (done.returncode, done.stderr) == (2, "obsdag demo: error: --rate goes with --serve only\n")


def test_trouble_is_made_as_often_as_it_is_asked_for() -> None:
    troubles = Troubles()
    assert not troubles.take("deadlock")
    troubles.ask("deadlock", 2)
    assert [troubles.take("deadlock") for _ in range(3)] == [True, True, False]
    with pytest.raises(KeyError):
        troubles.ask("flood")


def test_periods_of_trouble() -> None:
    assert trouble_periods("") == {}
    assert trouble_periods("deadlock=60, block=1.5,") == {"deadlock": 60.0, "block": 1.5}
    for wrong in ("deadlock", "deadlock=", "deadlock=0", "deadlock=-1", "deadlock=nan", "=3", "flood=3"):
        with pytest.raises(ValueError, match="NAME=SECONDS"):
            trouble_periods(wrong)
