"""What helps to test DAGs and programs that use obsdag.

telemetry   assertions on log lines, metrics, facts and spans
"""

from obsdag.testing.telemetry import CollectedSpans, RecordedFacts, capture_logs, metric, metric_change

__all__ = ["CollectedSpans", "RecordedFacts", "capture_logs", "metric", "metric_change"]
