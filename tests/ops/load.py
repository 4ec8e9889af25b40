"""Load on the FastAPI example: uvicorn as people start it, and wrk (Debian's package) asking for quotes.

python -m tests.ops.load [REQUESTS [CONNECTIONS]]: a long run by hand, and what memory does; 200,000 unless told.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.e2e.servers import _free_port, _process, request

__all__ = ["WRK", "Service", "Tally", "example", "load"]

WRK = shutil.which("wrk")
ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
wrk.method = "POST"
wrk.body = '{"items": ["tea", "milk", "honey"]}'
wrk.headers["Content-Type"] = "application/json"
local seen = {}
local threads = {}
function setup(thread) table.insert(threads, thread) end
function init(args) counts = {} retry_after = 0 end
function response(status, headers, body)
  counts[status] = (counts[status] or 0) + 1
  if headers["retry-after"] then retry_after = retry_after + 1 end
  thread_counts = counts
end
function done(summary, latency, requests)
  local parts, retries = {}, 0
  for _, thread in ipairs(threads) do
    local counts = thread:get("counts")
    retries = retries + thread:get("retry_after")
    for status, number in pairs(counts) do
      table.insert(parts, string.format('["%d", %d]', status, number))
    end
  end
  io.write(string.format(
    '\\nRESULT {"statuses": [%s], "retry_after": %d, "requests": %d, "duration_s": %f, ' ..
    '"p50_ms": %f, "p99_ms": %f, "connect": %d, "read": %d, "write": %d, "timeout": %d}\\n',
    table.concat(parts, ", "), retries, summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    summary.errors.connect, summary.errors.read, summary.errors.write, summary.errors.timeout))
end
"""


class Tally(NamedTuple):
    """What wrk got: answers by status, how many said Retry-After, errors of connections, and figures."""

    statuses: dict[int, int]
    retry_after: int
    errors: dict[str, int]
    duration_s: float
    p50_ms: float
    p99_ms: float

    @property
    def answers(self) -> int:
        return sum(self.statuses.values())


class Service:
    """The example, running. process: uvicorn, or its supervisor. place: what it writes."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, place: Path) -> None:
        self.process = process
        self.url = url
        self.place = place

    def stop(self, timeout_s: float = 60.0) -> None:
        """SIGTERM, and the end."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout_s)

    def counts(self) -> list[dict[str, Any]]:
        """What each process has counted, once it has ended."""
        return [json.loads(file.read_text()) for file in sorted((self.place / "counts").glob("*.json"))]

    def resident_mb(self) -> float:
        """Memory of the process itself."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) / 1024


@contextmanager
def example(place: Path, *options: str, **env: str) -> Iterator[Service]:
    """`uvicorn tests.ops.counted_service:app`, which is the example and counts."""
    (place / "counts").mkdir(parents=True)
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = [sys.executable, "-W", "error", "-m", "uvicorn", "tests.ops.counted_service:app", f"--port={port}"]
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("OBSDAG_", "ORDERS_"))}
    environ |= {"PYTHONPATH": str(ROOT), "COUNTS_DIR": str(place / "counts"), **env}
    ready = lambda: request(f"{url}/ops/readyz")[0] == 200  # noqa: E731
    with _process([*arguments, "--no-access-log", *options], place / "log", ready, environ) as process:
        yield Service(process, url, place)


@contextmanager
def load(place: Path, url: str, seconds: float, connections: int = 32) -> Iterator[list[Tally]]:
    """wrk at work while the block runs; afterwards the list has its tally."""
    assert WRK is not None
    script = place / "quotes.lua"
    script.write_text(SCRIPT)
    arguments = [WRK, "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--timeout=30s", f"-s{script}", f"{url}/quotes"]
    found: list[Tally] = []
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield found
            said, _ = process.communicate(timeout=seconds + 60)
        finally:
            process.kill()
    result = json.loads(said.partition("RESULT ")[2])
    errors = {name: result[name] for name in ("connect", "read", "write", "timeout")}
    statuses: dict[int, int] = {}
    for status, number in result["statuses"]:
        statuses[int(status)] = statuses.get(int(status), 0) + number
    figures = (result["duration_s"], result["p50_ms"], result["p99_ms"])
    found.append(Tally(statuses, result["retry_after"], errors, *figures))


def _by_hand(requests: int, connections: int) -> None:
    with tempfile.TemporaryDirectory() as folder, example(Path(folder)) as service:
        answers, begun, round_s = 0, time.monotonic(), 20.0
        statuses: dict[int, int] = {}
        errors: dict[str, int] = {}
        print(f"start: {service.resident_mb():.1f} MB")
        while answers < requests and time.monotonic() - begun < 3_000:
            with load(Path(folder), service.url, round_s, connections) as tallies:
                pass
            (tally,) = tallies
            answers += tally.answers
            for status, number in tally.statuses.items():
                statuses[status] = statuses.get(status, 0) + number
            for kind, number in tally.errors.items():
                errors[kind] = errors.get(kind, 0) + number
            rate = tally.answers / tally.duration_s
            print(
                f"{answers:>7} answers {statuses} errors {errors}: {rate:.0f}/s, p50 {tally.p50_ms:.0f} ms, "
                f"p99 {tally.p99_ms:.0f} ms, {service.resident_mb():.1f} MB",
                flush=True,
            )
        service.stop()
        print(json.dumps(service.counts(), indent=1))


if __name__ == "__main__":
    _by_hand(*(int(each) for each in [*sys.argv[1:], "200000", "32"][:2]))
