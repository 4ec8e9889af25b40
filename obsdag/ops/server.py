"""`start_ops_server`: the application on a thread and an event loop of its own, so that it answers while a task blocks
the engine's.

Beginning: 1. the port is bound in the caller's thread, so that a port that is taken is raised there; 2. the thread
starts and serves. Closing: 1. the loop is told, stops listening and ends its connections; 2. the thread is waited for;
3. the target file is removed and the watches are taken off.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from obsdag.errors import ConfigError, unless_missing
from obsdag.ops.app import OpsApp, create_app
from obsdag.ops.guard import LOOPBACK_HOSTS
from obsdag.ops.targets import TargetFile

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from obsdag.executor import Executor
    from obsdag.ops.http import Bounds
    from obsdag.ops.watch import Far

__all__ = ["OpsServer", "start_ops_server"]

_CLOSE_S: Final = 5.0


def start_ops_server(
    *executors: Executor | Far,
    port: int = 9464,
    host: str = "127.0.0.1",
    registry: CollectorRegistry | None = None,
    token: str | None = None,
    metrics_token: str | None = None,
    allowed_hosts: Iterable[str] = LOOPBACK_HOSTS,
    jaeger_url: str | None = None,
    file_sd: str | os.PathLike[str] | None = None,
    labels: Mapping[str, str] | None = None,
    interval_s: float = 1.0,
    max_connections: int = 64,
) -> OpsServer:
    """Serves `/metrics`, health, and the live page of `executors` on its own thread; close the handle at the end.

    port: 0 for any free one. host: an address to listen on; other than loopback only with a token. file_sd: a folder
    for Prometheus's `file_sd_configs`, with `labels` for its target. The others as `create_app` takes them. Raises
    ConfigError by name, OSError if the port cannot be had.
    """
    bounds = _bounds(max_connections)
    if token is None and not _is_loopback_name(host):
        raise ConfigError(f"host={host!r} is open to other machines: give a token, or listen on 127.0.0.1")
    app = create_app(
        *executors,
        registry=registry,
        token=token,
        metrics_token=metrics_token,
        allowed_hosts=allowed_hosts,
        jaeger_url=jaeger_url,
        interval_s=interval_s,
    )
    try:
        return OpsServer(app, _bind(host, port), bounds, file_sd, labels)
    except BaseException:
        app.close()
        raise


class OpsServer:
    """A running ops server. url: of its page. Closed by `close`, or as a context manager."""

    def __init__(
        self,
        app: OpsApp,
        listening: socket.socket,
        bounds: Bounds,
        file_sd: str | os.PathLike[str] | None,
        labels: Mapping[str, str] | None,
    ) -> None:
        self.app = app
        host, self.port = listening.getsockname()[:2]
        self.host = f"[{host}]" if ":" in host else host
        self.url = f"http://{self.host}:{self.port}"
        self._listening = listening
        self._bounds = bounds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._began = threading.Event()
        self._failed: BaseException | None = None
        self._pid = os.getpid()
        self._target = None if file_sd is None else TargetFile(file_sd, f"{self.host}:{self.port}", labels)
        self._thread = threading.Thread(target=self._main, name="obsdag-ops", daemon=True)
        self._thread.start()
        self._began.wait()
        if self._failed is not None:
            self.close()
            raise self._failed

    def __repr__(self) -> str:
        return f"<OpsServer {self.url}{'' if self._thread.is_alive() else ' closed'}>"

    def _main(self) -> None:
        try:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()
                runner.run(self._serve())
        except BaseException as error:
            if self._began.is_set():
                raise
            self._failed = error
        finally:
            self._began.set()
            self._listening.close()

    async def _serve(self) -> None:
        from obsdag.ops.http import Connections

        connections = Connections(self.app, self._bounds)
        server = await asyncio.start_server(connections.handle, sock=self._listening, limit=self._bounds.head_bytes)
        self._began.set()
        try:
            await self._stop.wait()
        finally:
            server.close()
            for task in tuple(connections.tasks):
                task.cancel()
            await asyncio.gather(*connections.tasks, return_exceptions=True)

    def close(self) -> None:
        """Ends it, connections and event streams included; again is harmless."""
        if self._pid != os.getpid():  # a forked child has no such thread, and its parent's file must stay
            return
        if self._loop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # closed in between
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_CLOSE_S)
        if self._target is not None:
            self._target.remove()
        self.app.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bounds(max_connections: Any) -> Bounds:
    try:
        from obsdag.ops.http import Bounds
    except ImportError as error:
        told = "start_ops_server needs the package h11: pip install 'obsdag[ops]'"
        raise ConfigError(told) from unless_missing(error, "h11")
    if isinstance(max_connections, bool) or not isinstance(max_connections, int) or max_connections < 1:
        raise ConfigError(f"max_connections must be a whole number >= 1, not {max_connections!r}")
    return Bounds(connections=max_connections)


def _is_loopback_name(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _bind(host: str, port: int) -> socket.socket:
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65_535:
        raise ConfigError(f"port must be a whole number from 0 to 65535, not {port!r}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=128)
    listening.setblocking(False)
    return listening
