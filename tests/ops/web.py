"""What the ops tests share: a real HTTP client that says what it saw, and DAGs that keep a loop or a thread busy."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from contextlib import closing
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry

from obsdag import DAG, Context, ExecutorConfig, ServeExecutor, Telemetry, Tracing

__all__ = ["Seen", "ask", "ask_aside", "raw", "service"]


class Seen(NamedTuple):
    """A response: status, headers by lower-case name, body, and the seconds that it took."""

    status: int
    headers: dict[str, str]
    body: bytes
    took_s: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Seen:
    """One request on a connection of its own; keywords are headers, with _ for -."""
    parts = urlsplit(url)
    assert parts.hostname
    with closing(http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)) as connection:
        started = time.perf_counter()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), body, names)
        response = connection.getresponse()
        found = response.read()
        took_s = time.perf_counter() - started
        return Seen(response.status, {k.lower(): v for k, v in response.getheaders()}, found, took_s)


async def ask_aside(url: str, **headers: str) -> Seen:
    """`ask` without keeping the test's loop from turning."""
    return await asyncio.to_thread(ask, url, **headers)


def raw(port: int, sent: bytes, timeout_s: float = 10.0) -> bytes:
    """What the server says to these bytes, until it closes."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=timeout_s)) as connection:
        connection.sendall(sent)
        found = b""
        while data := connection.recv(65_536):
            found += data
        return found


def service(dag: DAG, **settings: Any) -> ServeExecutor:
    """A serving executor with a registry and an engine of its own."""
    settings.setdefault("telemetry", Telemetry("ops", CollectorRegistry(), Tracing(mode="off"), logs=False))
    settings.setdefault("context_worker_num", 4)
    return ServeExecutor(dag, config=ExecutorConfig(**settings))


def one_task(function: Any, **options: Any) -> DAG:
    """A DAG of one task."""
    dag = DAG("orders")
    dag.task(**options)(function)
    return dag


async def goes_on(ctx: Context) -> Context:
    """A task that does nothing."""
    return ctx
