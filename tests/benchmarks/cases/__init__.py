"""What one number of microseconds does not say: latency under load, growth, workers, scrapes. Of obsdag alone.

    python -m tests.benchmarks.cases NAME [--quick]      prints the figures of one of them as JSON

Each is a module with `run(quick)`, which gives figures by name; `TARGETS` are bounds that they are to stay within.
"""

from __future__ import annotations

__all__ = ["CASES", "TARGETS"]

CASES = ("w5_limits", "w6_serve", "w7_contexts", "w7_tasks", "w7_memory", "w8_workers", "w9_observers")

TARGETS = {
    "p99 at half load, ms": 1.0,
    "1,000,000 inputs / 1,000": 1.3,
    "1,000,000 living / 1,000": 1.3,
    "10,000 tasks / 10": 1.3,
    "queued, bytes": 600.0,
    "at a join, bytes": 600.0,
    "for a limit, bytes": 600.0,
    "for a retry, bytes": 600.0,
    "frozen, bytes": 600.0,
    "64 workers / 1": 1.1,
}
"""Figure -> the most that it may be."""
