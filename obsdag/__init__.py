"""obsdag: run data through a DAG of tasks on asyncio, and see of every item where it is, waits, or failed.

The floors, from the ground up; a module imports from its own floor and those below it (tests/test_architecture.py):

    errors                      every exception, one tree
    config, limits              settings; rate limits, concurrency limits, resource pools
    runtime, context, tasks     what runs share; one unit of data; the kinds of tasks
    plan                        the compiled graph: indices and bit masks
    core                        decides: lanes, readiness, joins, retries, outcomes; no asyncio, no clock, no telemetry
"""

from obsdag.config import ExecutorConfig
from obsdag.context import Context

__all__ = ["Context", "ExecutorConfig", "__version__"]

__version__ = "0.1.0"
