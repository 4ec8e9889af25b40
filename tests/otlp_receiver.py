"""An OTLP receiver for tests: what an exporter sends over HTTP or gRPC, decoded; and one that misbehaves on demand.

    with OtlpReceiver() as receiver:                       # protocol="http" or "grpc"
        Tracing.otlp(receiver.endpoint, sample=1.0) ...
        spans = receiver.wait(lambda spans: len(spans) >= 3)

Modes, to be changed at any time: "ok"; "error" (HTTP 500, gRPC INTERNAL); "refuse" (connections are closed unanswered);
"hang" (requests are read and not answered until the receiver is closed); "slow" (answered after `delay_s`).
"""

from __future__ import annotations

import gzip
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

__all__ = ["MODES", "OtlpReceiver", "ReceivedSpan"]

MODES = ("ok", "error", "refuse", "hang", "slow")
KINDS = ("UNSPECIFIED", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
STATUSES = ("UNSET", "OK", "ERROR")


@dataclass(frozen=True)
class ReceivedSpan:
    """One span as it came over the wire. Ids are hex, `parent_id` is empty for a root, times are Unix nanoseconds.

    links: (trace id, span id, attributes). events: (name, attributes, nanoseconds).
    """

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: str
    start_ns: int
    end_ns: int
    status: str
    status_message: str
    trace_state: str
    scope: str
    attributes: dict[str, Any] = field(default_factory=dict)
    resource: dict[str, Any] = field(default_factory=dict)
    links: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any], int]] = field(default_factory=list)

    def linked(self, kind: str) -> list[str]:
        """Span ids of the links of one `obsdag.link.type`."""
        return [span_id for _, span_id, attributes in self.links if attributes.get("obsdag.link.type") == kind]


class OtlpReceiver:
    """Listens on a free port of 127.0.0.1 from `__enter__` to `__exit__`, on threads of its own."""

    def __init__(self, protocol: str = "http", mode: str = "ok", delay_s: float = 0.2) -> None:
        assert protocol in ("http", "grpc")
        assert mode in MODES
        self.protocol = protocol
        self.mode = mode
        self.delay_s = delay_s
        self.requests = 0
        self.authorization = ""  # of the latest request
        self._spans: list[ReceivedSpan] = []
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self.port = 0

    @property
    def endpoint(self) -> str:
        """What an exporter is given."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def spans(self) -> list[ReceivedSpan]:
        """All spans that were accepted so far, in order of arrival."""
        with self._changed:
            return list(self._spans)

    def wait(self, enough: Callable[[list[ReceivedSpan]], bool], timeout_s: float = 10.0) -> list[ReceivedSpan]:
        """The spans, once `enough(spans)`; AssertionError with what came if that takes too long."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not enough(list(self._spans)):
                left_s = deadline - time.monotonic()
                assert left_s > 0, f"not enough spans: {sorted(span.name for span in self._spans)}"
                self._changed.wait(left_s)
            return list(self._spans)

    def wait_requests(self, count: int, timeout_s: float = 10.0) -> None:
        """Waits until so many requests have come in, however they are answered."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self.requests < count:
                left_s = deadline - time.monotonic()
                assert left_s > 0, f"{self.requests} requests, not {count}"
                self._changed.wait(left_s)

    def take(self, body: bytes) -> None:
        """Decodes and stores one request's spans."""
        request = ExportTraceServiceRequest.FromString(body)
        with self._changed:
            self._spans.extend(_decoded(request))
            self._changed.notify_all()

    def came(self) -> str:
        """Notes that a request came; the mode it is to be answered by, after hanging or being slow."""
        with self._changed:
            self.requests += 1
            self._changed.notify_all()
        mode = self.mode
        if mode == "hang":
            self._closing.wait()
        elif mode == "slow":
            self._closing.wait(self.delay_s)
        return mode

    def __enter__(self) -> OtlpReceiver:
        if self.protocol == "http":
            self._start_http()
        else:
            self._start_grpc()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self.protocol == "http":
            self._server.shutdown()
            self._server.server_close()
            assert self._thread is not None
            self._thread.join()
        else:
            self._server.stop(0.2).wait()
            self._pool.shutdown(wait=True)

    def _start_http(self) -> None:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                mode = receiver.came()
                if mode in ("refuse", "hang"):
                    self.close_connection = True
                    return
                status, answer = 500, b""
                path = urlsplit(self.path).path  # a proxy is asked for a whole URL
                receiver.authorization = self.headers.get("Authorization", "")
                if mode != "error" and path == "/v1/traces":
                    receiver.take(_inflated(body, self.headers.get("Content-Encoding", "")))
                    status, answer = 200, ExportTraceServiceResponse().SerializeToString()
                elif path != "/v1/traces":
                    status = 404
                self.send_response(status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.send_header("Connection", "close")  # a kept connection would be a file that a test leaves behind
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="otlp-receiver")
        self._thread.start()

    def _start_grpc(self) -> None:
        import grpc

        receiver = self

        class Service(TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:
                mode = receiver.came()
                if mode in ("error", "refuse", "hang"):
                    context.abort(grpc.StatusCode.INTERNAL, f"receiver in mode {mode}")
                receiver.take(request.SerializeToString())
                return ExportTraceServiceResponse()

        self._pool = ThreadPoolExecutor(4, thread_name_prefix="otlp-receiver")
        self._server = grpc.server(self._pool)
        add_TraceServiceServicer_to_server(Service(), self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()


def _inflated(body: bytes, encoding: str) -> bytes:
    if encoding == "gzip":
        return gzip.decompress(body)
    return zlib.decompress(body) if encoding == "deflate" else body


def _decoded(request: ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for group in request.resource_spans:
        resource = _attributes(group.resource.attributes)
        for scoped in group.scope_spans:
            for span in scoped.spans:
                yield ReceivedSpan(
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    kind=KINDS[span.kind],
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    status=STATUSES[span.status.code],
                    status_message=span.status.message,
                    trace_state=span.trace_state,
                    scope=scoped.scope.name,
                    attributes=_attributes(span.attributes),
                    resource=resource,
                    links=[(to.trace_id.hex(), to.span_id.hex(), _attributes(to.attributes)) for to in span.links],
                    events=[(e.name, _attributes(e.attributes), e.time_unix_nano) for e in span.events],
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None
