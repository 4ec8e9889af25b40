"""What helps to test DAGs and programs that use obsdag.

clock       virtual time: hours of retries in milliseconds, and proof that nothing polls
telemetry   assertions on log lines, metrics, facts and spans
"""

from obsdag.testing.clock import HangError, VirtualLoop, run_virtual
from obsdag.testing.telemetry import CollectedSpans, RecordedFacts, capture_logs, metric, metric_change

__all__ = [
    "CollectedSpans",
    "HangError",
    "RecordedFacts",
    "VirtualLoop",
    "capture_logs",
    "metric",
    "metric_change",
    "run_virtual",
]
