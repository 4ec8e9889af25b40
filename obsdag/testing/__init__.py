"""What helps to test DAGs and programs that use obsdag.

clock       virtual time: hours of retries in milliseconds, and proof that nothing polls
simulation  the core under schedules that a seed chooses: thousands of orders a minute, each replayed by its seed
telemetry   assertions on log lines, metrics, facts and spans
"""

from obsdag.testing.clock import HangError, VirtualLoop, run_virtual
from obsdag.testing.simulation import Simulation, SimulationError, explore, simulate, sleep
from obsdag.testing.telemetry import CollectedSpans, RecordedFacts, capture_logs, metric, metric_change

__all__ = [
    "CollectedSpans",
    "HangError",
    "RecordedFacts",
    "Simulation",
    "SimulationError",
    "VirtualLoop",
    "capture_logs",
    "explore",
    "metric",
    "metric_change",
    "run_virtual",
    "simulate",
    "sleep",
]
