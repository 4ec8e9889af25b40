"""Real servers for end-to-end tests, each on a free port of this machine, in a process of its own.

What they are configured with is what is shipped in dashboards/: only targets, paths and intervals are replaced.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import yaml

from obsdag.dashboards import folder
from tests.cli.command import environ

__all__ = [
    "SHORT",
    "Demo",
    "Jaeger",
    "Prometheus",
    "Webhook",
    "alertmanager",
    "demo",
    "faster",
    "jaeger",
    "jaeger_binary",
    "missing",
    "prometheus",
    "until",
    "webhook",
]

START_S = 20.0
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))
T = TypeVar("T")

SHORT = {"5m": "6s", "10m": "10s", "15m": "10s", "1h": "20s", "1d": "30s"}
"""Windows of the shipped rules, and what they are when tests run them."""


def missing(*programs: str) -> str:
    """Why a test that needs these cannot run; empty if it can."""
    packages = {
        "prometheus": "prometheus",
        "promtool": "prometheus",
        "prometheus-alertmanager": "prometheus-alertmanager",
    }
    absent = [each for each in programs if shutil.which(each) is None]
    wanted = sorted({packages[each] for each in absent})
    return f"{', '.join(absent)} not found: apt-get install {' '.join(wanted)}" if absent else ""


def jaeger_binary() -> str | None:
    """A Jaeger (v2) that is there; none is ever built or downloaded."""
    return os.environ.get("OBSDAG_JAEGER_BIN") or shutil.which("jaeger")


def until(look: Callable[[], T | None], what: str, timeout_s: float = START_S) -> T:
    """What `look` gives once that is something. Fails with `what` after the time."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.05)


def request(url: str, data: bytes | None = None, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Status and body, whatever the status; 0 if nobody answers."""
    asked = urllib.request.Request(url, data=data, headers=dict(headers or {}))
    try:
        with _HTTP.open(asked, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except (urllib.error.URLError, OSError):
        return 0, b""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _process(
    arguments: list[str], log: Path, ready: Callable[[], bool], env: dict[str, str], end: int = signal.SIGTERM
) -> Iterator[Any]:
    """A running program whose output goes to `log`; told to end afterwards by that signal, and made to."""
    with log.open("wb") as out:
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, cwd=log.parent)
        try:
            deadline = time.monotonic() + START_S
            while not ready():
                assert process.poll() is None, f"{arguments[0]} ended: {log.read_text(errors='replace')[-2000:]}"
                assert time.monotonic() < deadline, f"{arguments[0]} did not start: {log.read_text()[-2000:]}"
                time.sleep(0.02)
            yield process
        finally:
            process.send_signal(end)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# --- the demo service


class Demo:
    """`obsdag demo --serve`, running. process: its own. log: all that it writes."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        text = log.read_text()
        self.address = re.findall(r"^metrics: http://(\S+)/metrics$", text, re.MULTILINE)[0]
        self._controls = re.findall(r"POST (http://\S+)/trouble/", text)[0]
        self.troubles = re.findall(r"/NAME, of (.*)$", text, re.MULTILINE)[0].split(", ")

    @property
    def alerts_url(self) -> str:
        """Where it takes an Alertmanager's notifications."""
        return f"{self._controls}/alerts"

    def scrape(self, accept: str = "text/plain") -> str:
        """/metrics as it is now."""
        status, body = request(f"http://{self.address}/metrics", headers={"Accept": accept})
        assert status == 200
        return body.decode()

    def make(self, trouble: str) -> int:
        """Asks for trouble; the status of the answer."""
        return request(f"{self._controls}/trouble/{trouble}", b"")[0]

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Its log lines of that event."""
        found = [json.loads(each) for each in self.log.read_text().splitlines() if each.startswith("{")]
        return [each for each in found if each.get("event", "").startswith(event)]


@contextmanager
def demo(place: Path, *options: str, **env: str) -> Iterator[Demo]:
    """A demo service on free ports, with warnings as errors."""
    place.mkdir(exist_ok=True)
    arguments = [sys.executable, "-W", "error", "-m", "obsdag", "demo", "--serve", "--port=0", "--control-port=0"]
    log = place / "demo.log"
    kept = {name: value for name, value in environ(**env).items() if name in env or not name.startswith("OTEL_")}

    with _process([*arguments, *options], log, lambda: "trouble: POST" in log.read_text(), kept) as process:
        yield Demo(process, log)


# --- Prometheus and Alertmanager


def faster(rules: str) -> str:
    """The text of a rule file with short windows and times."""
    text = re.sub(r"\[(\w+)\]", lambda found: f"[{SHORT[found[1]]}]", rules)
    text = re.sub(r"offset (\w+)", lambda found: f"offset {SHORT[found[1]]}", text)
    return re.sub(r"for: (\d+)s", lambda found: f"for: {int(found[1]) // 60}s", text)


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def api(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of its API."""
        status, body = request(f"{self.url}/api/v1/{path}", urllib.parse.urlencode(parameters).encode())
        if status == 405:  # some parts are asked with GET only
            status, body = request(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        answer = json.loads(body)
        assert answer["status"] == "success", f"{path} {parameters}: {answer}"
        assert not answer.get("warnings"), answer
        return answer["data"]

    def now(self, expr: str) -> list[dict[str, Any]]:
        """The series of an instant query, as {"metric": ..., "value": [time, text]}."""
        found: list[dict[str, Any]] = self.api("query", query=expr)["result"]
        return found

    def lately(self, expr: str, seconds: float = 90.0, step_s: float = 1.0) -> list[list[float]]:
        """The values of each series over the last seconds, without NaN."""
        end = time.time()
        result = self.api("query_range", query=expr, start=end - seconds, end=end, step=step_s)["result"]
        values = [[float(value) for _, value in each["values"] if value != "NaN"] for each in result]
        return [each for each in values if each]

    def exemplars(self, expr: str, seconds: float = 120.0) -> list[dict[str, Any]]:
        """The exemplars of all series that the expression reads."""
        end = time.time()
        result = self.api("query_exemplars", query=expr, start=end - seconds, end=end + 1)
        return [exemplar for series in result for exemplar in series["exemplars"]]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {each["labels"]["alertname"] for each in self.api("alerts")["alerts"] if each["state"] == "firing"}


@contextmanager
def prometheus(
    place: Path, target: str, alerts_to: str = "127.0.0.1:9", interval: str = "500ms"
) -> Iterator[Prometheus]:
    """A Prometheus with the shipped configuration and rules, but short times."""
    shipped = folder() / "prometheus"
    (place / "rules").mkdir(parents=True, exist_ok=True)
    for file in (shipped / "rules").glob("*.yml"):
        (place / "rules" / file.name).write_text(faster(file.read_text()))
    text = (shipped / "prometheus.yml").read_text()
    text = text.replace("demo:9464", target).replace("alertmanager:9093", alerts_to)
    text = text.replace("/etc/prometheus/", "").replace("interval: 5s", f"interval: {interval}")
    (place / "prometheus.yml").write_text(text)
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = [
        "prometheus",
        "--config.file=prometheus.yml",
        "--storage.tsdb.path=data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    ]

    with _process(arguments, place / "log", lambda: request(f"{url}/-/ready")[0] == 200, dict(os.environ)):
        yield Prometheus(url)


@contextmanager
def alertmanager(place: Path, notify: str) -> Iterator[str]:
    """An Alertmanager with the shipped configuration, but short times, that notifies that URL; its host and port."""
    place.mkdir(parents=True, exist_ok=True)
    config = yaml.safe_load((folder() / "alertmanager" / "alertmanager.yml").read_text())
    config["route"] |= {"group_wait": "200ms", "group_interval": "1s"}
    (receiver,) = config["receivers"]
    (hook,) = receiver["webhook_configs"]
    hook["url"] = notify
    (place / "alertmanager.yml").write_text(yaml.safe_dump(config))
    port = _free_port()
    address = f"127.0.0.1:{port}"
    arguments = [
        "prometheus-alertmanager",
        "--config.file=alertmanager.yml",
        "--storage.path=data",
        f"--web.listen-address={address}",
        "--cluster.listen-address=",
    ]

    with _process(arguments, place / "log", lambda: request(f"http://{address}/-/ready")[0] == 200, dict(os.environ)):
        yield address


class Webhook:
    """What an Alertmanager sent, from the first on."""

    def __init__(self) -> None:
        self.url = ""
        self.notifications: list[dict[str, Any]] = []

    def alerts(self, name: str, status: str = "firing") -> list[dict[str, Any]]:
        """All alerts of that name that came with that status."""
        return [
            alert
            for each in tuple(self.notifications)
            for alert in each["alerts"]
            if alert["labels"]["alertname"] == name and alert["status"] == status
        ]


@contextmanager
def webhook(forward_to: str = "") -> Iterator[Webhook]:
    """A server that keeps what is posted to it, and passes it on."""
    hook = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hook.notifications.append(json.loads(body))
            status = request(forward_to, body)[0] if forward_to else 200
            self.send_response(status or 502)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hook.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="webhook", daemon=True)
        thread.start()
        try:
            yield hook
        finally:
            server.shutdown()
            thread.join()


# --- Jaeger


class Jaeger:
    """A running Jaeger: where it takes OTLP, and its query API."""

    def __init__(self, http: str, grpc: str, query: str) -> None:
        self.otlp = {"http/protobuf": http, "grpc": grpc}
        self._query = query

    def api(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of its query API."""
        url = f"{self._query}/api/{path}?{urllib.parse.urlencode(parameters)}"
        status, body = request(url)
        assert status == 200, f"{url}: {status} {body[:300]!r}"
        return json.loads(body)["data"]

    def traces(self, service: str, limit: int = 200, **search: Any) -> list[dict[str, Any]]:
        """The newest traces that a search finds."""
        if "tags" in search:
            search["tags"] = json.dumps(search["tags"])
        found: list[dict[str, Any]] = self.api("traces", service=service, limit=limit, lookback="1h", **search)
        return found

    def whole(self, trace_id: str) -> dict[str, Any]:
        """One trace in OTLP's JSON."""
        status, body = request(f"{self._query}/api/v3/traces/{trace_id}")
        assert status == 200, f"{trace_id}: {status} {body[:300]!r}"
        found: dict[str, Any] = json.loads(body)["result"]
        return found


@contextmanager
def jaeger(place: Path) -> Iterator[Jaeger]:
    """A Jaeger with the shipped configuration, but ports of its own."""
    binary = jaeger_binary()
    assert binary is not None
    place.mkdir(parents=True, exist_ok=True)
    text = (folder() / "jaeger" / "jaeger.yml").read_text()
    addresses = {port: f"127.0.0.1:{_free_port()}" for port in (16686, 16685, 13133, 4317, 4318)}
    for port, address in addresses.items():
        text = text.replace(f"0.0.0.0:{port}", address)
    text = text.replace("timeout: 1s", "timeout: 200ms")
    (place / "jaeger.yml").write_text(text)
    query = f"http://{addresses[16686]}"

    with _process(
        [binary, "--config=jaeger.yml"],
        place / "log",
        lambda: request(f"{query}/api/services")[0] == 200,
        dict(os.environ),
        signal.SIGKILL,  # asked to end, it takes its time, and there is nothing to keep
    ):
        yield Jaeger(f"http://{addresses[4318]}", f"http://{addresses[4317]}", query)
