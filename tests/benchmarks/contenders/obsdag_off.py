"""obsdag without observers."""

from __future__ import annotations

from obsdag import Telemetry
from tests.benchmarks.contenders import Job
from tests.benchmarks.contenders.ours import job_of

__all__ = ["prepare"]


def prepare(workload: str) -> Job:
    """The workload with `Telemetry.off()`."""
    return job_of(workload, Telemetry.off())
