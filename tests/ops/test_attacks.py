"""The attack list (issue 6): each against a real server, from a real socket."""

from __future__ import annotations

import asyncio
import base64
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from prometheus_client import CollectorRegistry

from obsdag import ConfigError
from obsdag.ops import OpsServer, create_app, start_ops_server
from obsdag.ops.http import Bounds
from obsdag.ops.server import _bind
from tests.ops.web import ask, goes_on, one_task, raw, service

PRIVATE = ["/", "/static/app.js", "/api/state", "/api/events"]
TOKEN = "correct-horse-battery"


@pytest.fixture
def ops() -> Iterator[OpsServer]:
    with start_ops_server(service(one_task(goes_on)), port=0) as server:
        yield server


@pytest.fixture
def hasty() -> Iterator[OpsServer]:
    """One whose bounds can be waited for."""
    bounds = Bounds(head_s=0.3, idle_s=0.3, write_s=0.5, connections=4)
    server = OpsServer(create_app(registry=CollectorRegistry()), _bind("127.0.0.1", 0), bounds, None, None)
    yield server
    server.close()


@pytest.fixture
def guarded() -> Iterator[OpsServer]:
    with start_ops_server(port=0, registry=CollectorRegistry(), token=TOKEN, metrics_token="scrape-me") as server:
        yield server


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# --- Host and origin


@pytest.mark.parametrize("path", PRIVATE)
@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:9464", "localhost.evil.example", "[::2]", ""])
def test_a_host_that_is_not_allowed_gets_nothing(ops: OpsServer, path: str, host: str) -> None:
    seen = ask(ops.url + path, Host=host)

    assert seen.status == 421
    assert b"allowed_hosts" in seen.body


def test_hosts_are_compared_without_case_port_and_dot(ops: OpsServer) -> None:
    for host in ("LOCALHOST:1234", "localhost.", "127.0.0.1", "[::1]:9464"):
        assert ask(ops.url + "/api/state", Host=host).status == 200


def test_probes_and_prometheus_come_with_any_host(ops: OpsServer) -> None:
    answers = {path: ask(ops.url + path, Host="10.1.2.3:9464").status for path in ("/healthz", "/readyz", "/metrics")}

    assert answers == {"/healthz": 200, "/readyz": 503, "/metrics": 200}


@pytest.mark.parametrize("path", PRIVATE)
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ],
)
def test_other_origins_get_nothing(ops: OpsServer, path: str, headers: dict[str, str]) -> None:
    assert ask(ops.url + path, **headers).status == 403


def test_a_link_from_elsewhere_may_open_the_page(ops: OpsServer) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Origin": ops.url}

    assert ask(ops.url + "/", **link).status == 200
    assert ask(ops.url + "/api/state", **own).status == 200


@pytest.mark.parametrize("path", [*PRIVATE, "/healthz", "/metrics", "/nothing"])
def test_every_answer_is_locked_down(ops: OpsServer, path: str) -> None:
    headers = ask(ops.url + path, "HEAD").headers

    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in headers
    assert "server" not in headers


# --- tokens


@pytest.mark.parametrize("path", PRIVATE)
@pytest.mark.parametrize(
    "given",
    [
        None,
        "Bearer wrong",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Token {TOKEN}",
        TOKEN,
        "Bearer",
        "Basic not-base-64!",
        "Basic " + base64.b64encode(f"{TOKEN}:".encode()).decode(),
        "Bearer scrape-me",
        "Bearer \xe9",
    ],
)
def test_no_token_no_page(guarded: OpsServer, path: str, given: str | None) -> None:
    seen = ask(guarded.url + path, **({} if given is None else {"Authorization": given}))

    assert seen.status == 401
    assert seen.headers["www-authenticate"].startswith("Basic ")
    assert TOKEN.encode() not in seen.body


def test_the_token_opens_as_bearer_and_as_password_only_for_an_allowed_host(guarded: OpsServer) -> None:
    basic = "Basic " + base64.b64encode(f"anybody:{TOKEN}".encode()).decode()

    assert ask(guarded.url + "/api/state", Authorization=f"Bearer {TOKEN}").status == 200
    assert ask(guarded.url + "/", Authorization=basic).status == 200
    assert ask(guarded.url + "/", Authorization=basic, Host="evil.example").status == 421


def test_metrics_have_a_token_of_their_own_and_health_none(guarded: OpsServer) -> None:
    assert ask(guarded.url + "/metrics").status == 401
    assert ask(guarded.url + "/metrics", Authorization=f"Bearer {TOKEN}").status == 401
    assert ask(guarded.url + "/metrics", Authorization="Bearer scrape-me", Host="10.0.0.9").status == 200
    assert ask(guarded.url + "/healthz").status == ask(guarded.url + "/readyz").status == 200


@pytest.mark.parametrize("token", ["", "short", "with space in it", "t\u00f6kenst\u00f6ken", 12345678, b"bytes-bytes"])
def test_tokens_that_protect_nothing_are_refused(token: object) -> None:
    with pytest.raises(ConfigError, match="token must be"):
        create_app(token=token)  # type: ignore[arg-type]


def test_without_a_token_a_client_from_elsewhere_gets_nothing_even_when_mounted() -> None:
    app = create_app(registry=CollectorRegistry())

    async def answer(client: object) -> int:
        sent: list[dict[str, object]] = []

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")], "client": client}
        await app(scope, None, send)  # type: ignore[arg-type]
        return int(str(sent[0]["status"]))

    clients = [("127.0.0.1", 1), ("::1", 1), ("::ffff:127.0.0.1", 1), ("10.0.0.7", 1), ("not an address", 1), None]
    assert [asyncio.run(answer(client)) for client in clients] == [200, 200, 200, 403, 403, 403]


# --- requests that are none


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_but_reading(ops: OpsServer, method: str) -> None:
    for path in ("/", "/metrics", "/healthz", "/api/state", "/api/events"):
        assert ask(ops.url + path, method).status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/../../guard.py",
        "/static/..%2f..%2fguard.py",
        "/static/%2e%2e/%2e%2e/guard.py",
        "/static/....//guard.py",
        "//etc/passwd",
        "/static//etc/passwd",
        "/static/%00",
        "/static/app.js%00.css",
        "/static/",
        "/static/app.js/",
        "/..",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/api/../metrics",
    ],
)
def test_paths_lead_nowhere_else(ops: OpsServer, path: str) -> None:
    answer = raw(ops.port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())

    assert status(answer) == 404
    assert b"root:" not in answer
    assert b"import" not in answer


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /%ff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\x00\r\n\r\n",
        b"CONNECT evil.example:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS, say",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_what_is_no_proper_request_is_refused_and_closed(hasty: OpsServer, sent: bytes) -> None:
    answer = raw(hasty.port, sent)

    assert answer == b"" or status(answer) in (400, 403, 405, 408, 413, 421, 501, 505)
    assert ask(hasty.url + "/healthz").status == 200


def test_huge_headers_are_cut_off(ops: OpsServer) -> None:
    sent, answer = 0, b""
    with socket.create_connection(("127.0.0.1", ops.port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        with suppress(OSError):
            while sent < 2_000 * 65_536:
                connection.sendall(b"a" * 65_536)
                sent += 65_536
        with suppress(OSError):  # closed with unread bytes: a reset may overtake the answer
            answer = connection.recv(65_536)

    assert sent < 2_000 * 65_536, "it read 130 MB of headers"
    assert answer == b"" or status(answer) == 431
    assert ask(ops.url + "/healthz").status == 200


def test_many_headers_and_a_long_address_are_431(ops: OpsServer) -> None:
    many = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(2_000))

    assert status(raw(ops.port, many)) == 431
    assert status(raw(ops.port, b"GET /" + b"a" * 20_000)) == 431


def test_slow_heads_run_out_of_time(hasty: OpsServer) -> None:
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as connection:
        answer = b""
        connection.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(200):  # a byte at a time, for ever if it were let
            try:
                connection.sendall(b"X")
                connection.settimeout(0.05)
                answer = connection.recv(1_000)
                break
            except TimeoutError:
                continue

    assert status(answer) == 408
    assert time.monotonic() - started < 5


def test_connections_that_say_nothing_are_closed(hasty: OpsServer) -> None:
    assert raw(hasty.port, b"") == b""


@pytest.mark.parametrize("kind", [b"Content-Length: 1000000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_bodies_are_not_waited_for(ops: OpsServer, method: bytes, kind: bytes) -> None:
    started = time.monotonic()
    answer = raw(ops.port, method + b" /api/state HTTP/1.1\r\nHost: localhost\r\n" + kind + b"\r\n\r\n")

    assert status(answer) == 413
    assert time.monotonic() - started < 5


def test_more_connections_than_allowed_are_told_to_come_back(hasty: OpsServer) -> None:
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(socket.create_connection(("127.0.0.1", hasty.port)))
        time.sleep(0.1)  # until the server's thread has accepted them
        answer = raw(hasty.port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert status(answer) == 503
    assert b"Retry-After" in answer
    deadline = time.monotonic() + 5
    while ask(hasty.url + "/healthz").status != 200:
        assert time.monotonic() < deadline


def test_a_reader_that_does_not_read_loses_its_connection() -> None:
    server = OpsServer(create_app(registry=CollectorRegistry()), _bind("127.0.0.1", 0), Bounds(write_s=0.5), None, None)
    request = b"GET /static/page.css HTTP/1.1\r\nHost: localhost\r\n\r\n"
    try:
        with socket.socket() as connection, pytest.raises((ConnectionError, BrokenPipeError)):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            connection.settimeout(10)  # a server that waits for ever ends this with a TimeoutError
            connection.connect(("127.0.0.1", server.port))
            while True:
                connection.sendall(request * 100)  # and reads nothing of the answers
        assert ask(server.url + "/healthz").status == 200
    finally:
        server.close()


def test_requests_that_follow_on_one_connection_are_answered_in_order(ops: OpsServer) -> None:
    one = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = raw(ops.port, one + one + last)

    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.rindex(b"HTTP/1.1 404") > answer.rindex(b"HTTP/1.1 200")


def test_event_streams_are_counted_and_given_back() -> None:
    executor = service(one_task(goes_on))
    app = create_app(executor, interval_s=0.1, max_streams=2)
    server = OpsServer(app, _bind("127.0.0.1", 0), Bounds(), None, None)
    request = b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
    try:
        with ExitStack() as held:
            for _ in range(2):
                connection = held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
                connection.sendall(request)
                assert connection.recv(1_000).startswith(b"HTTP/1.1 200")
            assert ask(server.url + "/api/events").status == 503
        deadline = time.monotonic() + 5
        while app._feed.streams:
            assert time.monotonic() < deadline, "a stream whose reader has left is still there"
            time.sleep(0.02)
    finally:
        server.close()
