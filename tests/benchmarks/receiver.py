"""An OTLP/HTTP receiver in a process of its own: it takes what is posted and says how much that was. Standard library.

    python -m tests.benchmarks.receiver      prints its address; a GET of it answers with requests and bytes as JSON

It does not decode: the work of a collector is not what is measured, and must not take the second core away from it.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class Receiver(BaseHTTPRequestHandler):
    """Answers every export with success."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    taken: ClassVar = [0, 0]

    def do_POST(self) -> None:
        self.taken[0] += 1
        self.taken[1] += len(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(b"", "application/x-protobuf")

    def do_GET(self) -> None:
        requests, size = self.taken
        self._answer(json.dumps({"requests": requests, "bytes": size}).encode(), "application/json")

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def main() -> None:
    """Serves until standard input ends."""
    import threading

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()
    server.shutdown()


if __name__ == "__main__":
    main()
