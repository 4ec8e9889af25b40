"""HTTP/1.1 for an ASGI application that only answers GET: one connection after another request, with hard bounds.

h11 reads the protocol, so that nothing here interprets bytes. The bounds are why this is not a ready-made server: those
have none for the time that a client takes to send its headers, and accept any number of connections that send nothing.

    a head (request line and headers)     16 KiB, 10 s; more is 431 and 408
    a body                                none: whoever announces one is answered and disconnected, unread
    waiting for the next request          30 s
    a client that does not read           30 s without progress
    connections                           `max_connections`; more are answered 503 at once
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from email.utils import formatdate
from typing import Any, Final, NamedTuple
from urllib.parse import unquote_to_bytes

import h11

__all__ = ["Bounds", "Connections"]

_READ: Final = 65_536
_PIECE: Final = 262_144
_LINGER_S: Final = 0.5
_LINGER_BYTES: Final = 1_000_000
_FULL: Final = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
App = Callable[[Any, Any, Any], Awaitable[None]]


class Bounds(NamedTuple):
    """Seconds and bytes; see the module."""

    head_bytes: int = 16_384
    head_s: float = 10.0
    idle_s: float = 30.0
    write_s: float = 30.0
    connections: int = 64


class Connections:
    """All connections of one server. `handle` is what `asyncio.start_server` calls for each."""

    def __init__(self, app: App, bounds: Bounds) -> None:
        self._app = app
        self.bounds = bounds
        self.tasks: set[asyncio.Task[Any]] = set()
        self._refusing = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection to its end."""
        task = asyncio.current_task()
        assert task is not None
        try:
            if len(self.tasks) >= self.bounds.connections:
                await self._refuse(reader, writer)
                return
            self.tasks.add(task)
            await _Connection(self._app, self.bounds, reader, writer).serve()
        except (ConnectionError, TimeoutError, asyncio.CancelledError):
            pass  # the client is gone, too slow, or the server is closing: nobody is left to be told
        finally:
            self.tasks.discard(task)
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing >= self.bounds.connections:  # a flood gets not even an answer
            return
        self._refusing += 1
        try:
            writer.write(_FULL)
            async with asyncio.timeout(_LINGER_S):
                await writer.drain()
            await _linger(reader, writer)
        finally:
            self._refusing -= 1


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads away, for a moment, what the client still sends: closed on unread bytes, it would never see the answer."""
    writer.write_eof()
    left = _LINGER_BYTES
    async with asyncio.timeout(_LINGER_S):
        while left > 0 and (data := await reader.read(_READ)):
            left -= len(data)


def _has_body(request: h11.Request) -> bool:
    """Whether one is announced, in whatever way: of two lengths that disagree, none is believed."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in request.headers
    )


class _Connection:
    """One connection: a request, its answer, the next request."""

    def __init__(self, app: App, bounds: Bounds, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._app = app
        self._bounds = bounds
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=bounds.head_bytes)
        self._responded = False

    async def serve(self) -> None:
        wait_s = self._bounds.head_s
        while True:
            try:
                request = await self._head(wait_s)
            except h11.RemoteProtocolError as error:
                await self._plain(error.error_status_hint, "This is not a request that can be read.")
                return
            except TimeoutError:
                if self._http.their_state is h11.IDLE and self._http.trailing_data[0]:
                    await self._plain(408, "The request took too long to arrive.")
                return
            if request is None or not await self._answer(request):
                return
            self._http.start_next_cycle()
            wait_s = self._bounds.idle_s

    async def _head(self, wait_s: float) -> h11.Request | None:
        """The next request; None when the client has closed. Raises TimeoutError."""
        async with asyncio.timeout(wait_s) as limit:
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Request):
                    return event
                if event is not h11.NEED_DATA:
                    return None
                data = await self._reader.read(_READ)
                if data and not self._http.trailing_data[0]:  # the first bytes of a head: the rest is in a hurry
                    limit.reschedule(asyncio.get_running_loop().time() + self._bounds.head_s)
                self._http.receive_data(data)

    async def _answer(self, request: h11.Request) -> bool:
        """Lets the application answer; whether another request may follow."""
        scope = self._scope(request)
        if scope is None:
            await self._plain(400, "The address of the request cannot be read.")
            return False
        if request.http_version not in (b"1.0", b"1.1"):
            await self._plain(505, "This is HTTP/1.1.")
            return False
        if _has_body(request) or not isinstance(self._http.next_event(), h11.EndOfMessage):  # it may come slowly
            await self._plain(413, "Requests have no body here.")
            return False
        self._responded = False
        await self._app(scope, self._receive, self._send)
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    def _scope(self, request: h11.Request) -> dict[str, Any] | None:
        target, _, query = request.target.partition(b"?")
        if not target.startswith(b"/"):
            return None
        try:
            path = unquote_to_bytes(target).decode()
        except UnicodeDecodeError:
            return None
        transport = self._writer.transport
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.http_version.decode(),
            "method": request.method.decode(),
            "scheme": "http",
            "path": path,
            "raw_path": target,
            "query_string": query,
            "root_path": "",
            "headers": [(bytes(name), bytes(value)) for name, value in request.headers],
            "client": transport.get_extra_info("peername"),
            "server": transport.get_extra_info("sockname"),
        }

    async def _receive(self) -> MutableMapping[str, Any]:
        """The (empty) body once, then nothing until the client is gone."""
        if not self._responded:
            self._responded = True
            return {"type": "http.request", "body": b"", "more_body": False}
        while (data := await self._reader.read(_READ)) and len(self._http.trailing_data[0]) < _READ:
            self._http.receive_data(data)  # a next request, sent ahead
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = [*message["headers"], (b"date", formatdate(usegmt=True).encode())]
            await self._write(h11.Response(status_code=message["status"], headers=headers))
            return
        body = message.get("body") or b""
        for at in range(0, len(body), _PIECE):  # so that time is measured for each piece, not for all of it
            await self._write(h11.Data(data=body[at : at + _PIECE]))
        if not message.get("more_body"):
            await self._write(h11.EndOfMessage())

    async def _write(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            self._writer.write(data)
            async with asyncio.timeout(self._bounds.write_s):
                await self._writer.drain()

    async def _plain(self, status: int, text: str) -> None:
        """An answer that ends the connection. What the client may still send is not read."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = f"{text}\n".encode()
        headers = [
            ("content-type", "text/plain; charset=utf-8"),
            ("content-length", str(len(body))),
            ("x-content-type-options", "nosniff"),
            ("connection", "close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):
            await self._write(h11.Response(status_code=status, headers=headers))
            await self._write(h11.Data(data=body))
            await self._write(h11.EndOfMessage())
        await _linger(self._reader, self._writer)
