"""The ASGI application: a handful of fixed addresses, GET and HEAD only, and nothing read from the request but headers.

It is written on ASGI itself: there is no form, no parameter, no body and no template here, and a service that mounts it
need not install a web framework for it. No file system path is ever made from a request: what is not in the table of
addresses is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from obsdag.errors import ConfigError
from obsdag.executor import Executor
from obsdag.ops.feed import Feed
from obsdag.ops.guard import LOOPBACK_HOSTS, SECURITY_HEADERS, Guard, Refusal
from obsdag.ops.health import Pulse, readiness
from obsdag.ops.state import Reader
from obsdag.ops.watch import Far, Watch

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["OpsApp", "Scope", "create_app"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_SCRAPES_AT_ONCE: Final = 4
_PATIENCE_S: Final = 0.5  # a probe's usual time-out is one second
_GZIP_FROM: Final = 1_000
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class Answer(NamedTuple):
    """A whole response. packed: the same body, compressed, where that was worth it."""

    status: int
    headers: dict[str, str]
    body: bytes
    packed: bytes | None = None


def create_app(
    *executors: Executor | Far,
    registry: CollectorRegistry | None = None,
    token: str | None = None,
    metrics_token: str | None = None,
    allowed_hosts: Iterable[str] = LOOPBACK_HOSTS,
    jaeger_url: str | None = None,
    interval_s: float = 1.0,
    max_streams: int = 16,
) -> OpsApp:
    """The ASGI application that shows `executors`, to be mounted in a service or served on its own.

    executors: local ones, or those of a Ray cluster, of which the driver's side is shown, and where each shard's is.
    registry: of `/metrics` (None: that of the executors' telemetry, else prometheus_client's default). token: for the
    page and `/api/*`; without one they are answered to this machine only. metrics_token: for `/metrics` (None: open).
    allowed_hosts: names in the Host header under which the page and `/api/*` are asked for ("*": any). jaeger_url: of a
    Jaeger's own page, for links to traces. interval_s: between updates of the page. max_streams: pages open at once.
    Raises ConfigError by name.
    """
    return OpsApp(
        executors,
        registry,
        Guard(token, metrics_token, allowed_hosts),
        jaeger_url=jaeger_url,
        interval_s=interval_s,
        max_streams=max_streams,
    )


class OpsApp:
    """What `create_app` makes. `close` takes its watches off the executors again."""

    def __init__(
        self,
        executors: tuple[Executor | Far, ...],
        registry: CollectorRegistry | None,
        guard: Guard,
        *,
        jaeger_url: str | None,
        interval_s: float,
        max_streams: int,
    ) -> None:
        _check(executors, jaeger_url, interval_s, max_streams)
        self._registry = registry if registry is not None else _registry_of(executors)
        self._guard = guard
        self.watches = [Watch(executor) for executor in executors]
        self._pulse = Pulse(self.watches, _PATIENCE_S)
        common = {"version": _version(), "interval_s": interval_s, "jaeger_url": (jaeger_url or "").rstrip("/") or None}
        self._feed = Feed([Reader(watch) for watch in self.watches], interval_s, common)
        self._max_streams = max_streams
        self._scrapes = 0
        self._assets = _assets()
        self._open = {"/healthz": self._health, "/readyz": self._ready}

    def close(self) -> None:
        """Watches no longer."""
        for watch in self.watches:
            watch.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; also the lifespan of a server that serves nothing else."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        path = _own_path(scope)
        if scope["method"] not in ("GET", "HEAD"):
            answer = _text(405, "Read-only: GET or HEAD.", {"allow": "GET, HEAD"})
        elif path in self._open:
            answer = await self._open[path]()
        elif path == "/metrics":
            answer = await self._metrics(scope, headers)
        elif (refusal := self._guard.private(headers, scope.get("client"))) is not None:
            answer = _refused(refusal)
        elif path == "/api/events" and scope["method"] == "GET":
            await self._stream(receive, send)
            return
        else:
            answer = await self._private(path, scope, headers)
        await _send(answer, scope, headers, send)

    # --- open to probes and to Prometheus

    async def _health(self) -> Answer:
        healthy, body = await self._pulse.health()
        return _json(200 if healthy else 503, body)

    async def _ready(self) -> Answer:
        ready, body = readiness(self.watches)
        return _json(200 if ready else 503, body)

    async def _metrics(self, scope: Scope, headers: dict[str, str]) -> Answer:
        refusal = self._guard.metrics(headers)
        if refusal is not None:
            return _refused(refusal)
        if self._scrapes >= _SCRAPES_AT_ONCE:
            return _text(503, "Too many scrapes at once.", {"retry-after": "1"})
        self._scrapes += 1
        try:
            return await asyncio.to_thread(self._render, headers.get("accept", ""), headers.get("accept-encoding", ""))
        finally:
            self._scrapes -= 1

    def _render(self, accept: str, accept_encoding: str) -> Answer:
        from prometheus_client.exposition import choose_encoder, gzip_accepted

        encoder, content_type = choose_encoder(accept)
        body = encoder(self._metrics_registry())
        packed = gzip.compress(body, 5) if gzip_accepted(accept_encoding) else None
        return Answer(200, {"content-type": content_type, "vary": "accept, accept-encoding"}, body, packed)

    def _metrics_registry(self) -> CollectorRegistry:
        if self._registry is None:
            from prometheus_client import REGISTRY

            return REGISTRY
        return self._registry

    # --- for people

    async def _private(self, path: str, scope: Scope, headers: dict[str, str]) -> Answer:
        if path == "":  # mounted, and asked for without the slash that the page's own links need
            return Answer(308, {"location": f"{scope.get('root_path', '')}/"}, b"")
        if path == "/api/state":
            return await asyncio.to_thread(self._state, "gzip" in headers.get("accept-encoding", ""))
        asset = self._assets.get(path)
        if asset is None:
            return _text(404, "Nothing here: /, /metrics, /healthz, /readyz, /api/state.")
        if headers.get("if-none-match") == asset.headers["etag"]:
            return Answer(304, asset.headers, b"")
        return asset

    def _state(self, packing: bool) -> Answer:
        return _json_bytes(200, self._feed.full(), packing)

    async def _stream(self, receive: Receive, send: Send) -> None:
        if self._feed.streams >= self._max_streams:
            await _send_plain(_text(503, "Too many pages are open.", {"retry-after": "10"}), send)
            return
        self._feed.streams += 1
        sending = asyncio.ensure_future(self._send_events(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._feed.streams -= 1
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send_events(self, send: Send) -> None:
        headers = {"content-type": "text/event-stream", "cache-control": "no-store", "x-accel-buffering": "no"}
        await send({"type": "http.response.start", "status": 200, "headers": _header_list(headers)})
        await send({"type": "http.response.body", "body": b"retry: 2000\n\n", "more_body": True})
        async with contextlib.aclosing(self._feed.events()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})


# --- requests


def _headers(scope: Scope) -> dict[str, str]:
    """By lower-case name; of repeated ones the first, so that nothing can be added behind what was checked."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key == "accept" and key in found:
            found[key] += "," + value.decode("latin-1")
        else:
            found.setdefault(key, value.decode("latin-1"))
    return found


def _own_path(scope: Scope) -> str:
    """The path below the place where the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path") or "").rstrip("/")
    if root and (path == root or path.startswith(root + "/")):
        path = path[len(root) :]
    return path


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


# --- answers


def _text(status: int, text: str, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, {"content-type": "text/plain; charset=utf-8", **(headers or {})}, f"{text}\n".encode())


def _refused(refusal: Refusal) -> Answer:
    return _text(refusal.status, refusal.text, refusal.headers)


def _json(status: int, value: object) -> Answer:
    return _json_bytes(status, json.dumps(value).encode(), packing=False)


def _json_bytes(status: int, body: bytes, packing: bool) -> Answer:
    headers = {"content-type": "application/json", "cache-control": "no-store"}
    return Answer(status, headers, body, gzip.compress(body, 1) if packing and len(body) > _GZIP_FROM else None)


async def _send(answer: Answer, scope: Scope, headers: dict[str, str], send: Send) -> None:
    if answer.packed is not None and "gzip" in headers.get("accept-encoding", ""):
        vary = answer.headers.get("vary", "accept-encoding")
        answer = Answer(answer.status, {**answer.headers, "content-encoding": "gzip", "vary": vary}, answer.packed)
    await _send_plain(answer, send, head=scope["method"] == "HEAD")


async def _send_plain(answer: Answer, send: Send, head: bool = False) -> None:
    own = answer.headers if answer.status == 304 else {**answer.headers, "content-length": str(len(answer.body))}
    await send({"type": "http.response.start", "status": answer.status, "headers": _header_list(own)})
    await send({"type": "http.response.body", "body": b"" if head else answer.body})


def _header_list(own: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in {**SECURITY_HEADERS, **own}.items()]


def _assets() -> dict[str, Answer]:
    """The page's files by address, read once."""
    found: dict[str, Answer] = {}
    for file in resources.files("obsdag.ops").joinpath("static").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in _TYPES:
            body = file.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
            headers = {"content-type": _TYPES[suffix], "etag": etag, "cache-control": "no-cache"}
            address = "/" if file.name == "index.html" else f"/static/{file.name}"
            found[address] = Answer(200, headers, body, gzip.compress(body) if len(body) > _GZIP_FROM else None)
    return found


# --- settings


def _registry_of(executors: tuple[Executor | Far, ...]) -> CollectorRegistry | None:
    """The one registry that the executors' telemetry reports to; their series are there from now on."""
    found: list[CollectorRegistry] = []
    for executor in executors:
        telemetry = executor.config.telemetry
        if telemetry is None or getattr(telemetry, "_off", False):
            continue
        telemetry.metrics.declare(executor.plan)
        if telemetry.metrics.registry not in found:
            found.append(telemetry.metrics.registry)
    if len(found) > 1:
        raise ConfigError("the executors report to several registries: say with registry= which of them /metrics shows")
    return found[0] if found else None


def _check(executors: tuple[Any, ...], jaeger_url: Any, interval_s: Any, max_streams: Any) -> None:
    for executor in executors:
        if not isinstance(executor, Executor | Far):
            raise ConfigError(f"create_app takes executors, not {executor!r:.80}")
    if jaeger_url is not None and not (
        isinstance(jaeger_url, str) and jaeger_url.startswith(("http://", "https://")) and jaeger_url.isprintable()
    ):
        raise ConfigError(f"jaeger_url must be the http or https address of a Jaeger, not {jaeger_url!r}")
    if isinstance(interval_s, bool) or not isinstance(interval_s, int | float) or not 0.1 <= interval_s <= 60:
        raise ConfigError(f"interval_s must be a number of seconds from 0.1 to 60, not {interval_s!r}")
    if isinstance(max_streams, bool) or not isinstance(max_streams, int) or max_streams < 0:
        raise ConfigError(f"max_streams must be a whole number >= 0, not {max_streams!r}")


def _version() -> str:
    from obsdag import __version__

    return __version__
