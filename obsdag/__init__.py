"""obsdag: run data through a DAG of tasks on asyncio, and see of every item where it is, waits, or failed.

The way of one context: `Executor.run` -> `RunState.accept` -> `ContextQueue.take` -> `Worker` -> `Runners` -> the
task's function -> `RunState.finish` -> (queue | output | gone) -> `RunResult`.

The floors, from the ground up; a module imports from its own floor and those below it (tests/test_architecture.py reads
them here):

    errors, core.states, core.records   every exception, one tree; states of a context; records of what happened
    config, limits, pools               settings; rates, permits, resources; threads and processes to run things on
    runtime, context, tasks             what executors share; one unit of data; the kinds of tasks
    plan, validation                    the graph compiled to bit masks; its mistakes
    layout, draw, graph, dag_config     pictures of it; the DAG that users define; a DAG read from a file
    core                                what decides: lanes, readiness, joins, retries, outcomes; no asyncio, no clock
    journal                             accepted work survives a crash: what happened, in one SQLite file, and back
    telemetry, logs                     observers of the core: metrics, traces, logs; logging for scripts
    dashboards                          Grafana boards, alert rules and the runbook, made from the catalogue of metrics
    inputs, engine_pools                what a run takes in; the pools of an executor
    services, generators, runners       how an execution of each kind of task is run
    mailbox, worker, shell              calls of any thread; who drives a context; the shell around the core of one run
    executor                            `Executor`: opens runs and sees them to their end
    signals, tickets, durable           tickets for submissions, kept in a journal
    serving, serve                      what serving is, wherever work is done; `ServeExecutor`: has it done here
    ops                                 /metrics, health and the live page of what runs; `start_ops_server`
    ray                                 the same DAG on a Ray cluster: `RayExecutor` deals roots out to shards
    testing                             helpers for tests of one's own DAGs
    cli, examples, __main__             the command `obsdag`; programs to start from; `python -m obsdag`
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.context import Context, ErrorInfo, LoopContext, OutputContext, RateLimitContext, StopContext
    from obsdag.core.observer import Observer
    from obsdag.core.queue import ContextQueue
    from obsdag.core.records import Execution, Failure, Stall
    from obsdag.core.states import ContextPriority
    from obsdag.errors import (
        ConfigError,
        ContextError,
        ContextFailedError,
        DeadlineExceeded,
        DuplicateIdError,
        EncodingError,
        ExecutionTimeout,
        GraphError,
        InputError,
        InternalError,
        JournalError,
        NoOutputError,
        NotAcceptingError,
        ObsdagError,
        PlanChangedError,
        PoolError,
        QueueFullError,
        RemoteError,
        ResourceError,
        RunFailed,
        ServeError,
        ServiceError,
        TaskError,
        UnknownTicketError,
    )
    from obsdag.executor import Executor, OutputStream, RunResult
    from obsdag.graph import DAG
    from obsdag.journal import SQLiteJournal
    from obsdag.limits import ConcurrencyLimit, RateLimit, ResourcePool
    from obsdag.runtime import Runtime
    from obsdag.serve import ServeExecutor, Ticket
    from obsdag.tasks import (
        AsyncFunctionShutdownTask,
        AsyncFunctionTask,
        AsyncLoopTask,
        AsyncRouterTask,
        AsyncServiceTask,
        AsyncStreamTask,
        Environment,
        Exponential,
        Fixed,
        ForegroundSyncFunctionShutdownTask,
        ForegroundSyncFunctionTask,
        ForegroundSyncLoopTask,
        ForegroundSyncRouterTask,
        ForegroundSyncStreamTask,
        JoinTask,
        MapTask,
        ProcessTask,
        RetryStrategy,
        SubDAG,
        SyncFunctionShutdownTask,
        SyncFunctionTask,
        SyncLoopTask,
        SyncRouterTask,
        SyncStreamTask,
        SyncThreadTask,
        Task,
        TaskConfig,
    )
    from obsdag.telemetry import Telemetry, Tracing
    from obsdag.telemetry.export import count_drops
    from obsdag.telemetry.hold import hold
    from obsdag.telemetry.sampling import deferred_sampler
    from obsdag.worker import WorkerLocalProxy, worker_local

__all__ = [
    "DAG",
    "AsyncFunctionShutdownTask",
    "AsyncFunctionTask",
    "AsyncLoopTask",
    "AsyncRouterTask",
    "AsyncServiceTask",
    "AsyncStreamTask",
    "ConcurrencyLimit",
    "ConfigError",
    "Context",
    "ContextError",
    "ContextFailedError",
    "ContextPriority",
    "ContextQueue",
    "DeadlineExceeded",
    "DuplicateIdError",
    "EncodingError",
    "Environment",
    "ErrorInfo",
    "Execution",
    "ExecutionTimeout",
    "Executor",
    "ExecutorConfig",
    "Exponential",
    "Failure",
    "Fixed",
    "ForegroundSyncFunctionShutdownTask",
    "ForegroundSyncFunctionTask",
    "ForegroundSyncLoopTask",
    "ForegroundSyncRouterTask",
    "ForegroundSyncStreamTask",
    "GraphError",
    "InputError",
    "InternalError",
    "JoinTask",
    "JournalError",
    "LoopContext",
    "MapTask",
    "NoOutputError",
    "NotAcceptingError",
    "ObsdagError",
    "Observer",
    "OutputContext",
    "OutputStream",
    "PlanChangedError",
    "PoolError",
    "ProcessTask",
    "QueueFullError",
    "RateLimit",
    "RateLimitContext",
    "RemoteError",
    "ResourceError",
    "ResourcePool",
    "RetryStrategy",
    "RunFailed",
    "RunResult",
    "Runtime",
    "SQLiteJournal",
    "ServeError",
    "ServeExecutor",
    "ServiceError",
    "Stall",
    "StopContext",
    "SubDAG",
    "SyncFunctionShutdownTask",
    "SyncFunctionTask",
    "SyncLoopTask",
    "SyncRouterTask",
    "SyncStreamTask",
    "SyncThreadTask",
    "Task",
    "TaskConfig",
    "TaskError",
    "Telemetry",
    "Ticket",
    "Tracing",
    "UnknownTicketError",
    "WorkerLocalProxy",
    "__version__",
    "count_drops",
    "deferred_sampler",
    "hold",
    "worker_local",
]

__version__ = "0.1.0"

_HOMES = (
    *("errors", "config", "limits", "context", "core.states", "core.records", "core.observer", "core.queue"),
    *("runtime", "tasks", "graph", "worker", "executor", "serve"),
    *("telemetry", "telemetry.export", "telemetry.hold", "telemetry.sampling", "journal"),
)
"""Where the public names live, the lightest first. A name is imported when it is first used: a worker process, which
needs few modules, starts in half the time (66 instead of 121 ms), and telemetry libraries load only for who uses them.
"""

if not TYPE_CHECKING:  # a type checker would take every name for defined

    def __getattr__(name: str) -> Any:
        for home in _HOMES if name in __all__ else ():
            module = import_module(f"obsdag.{home}")
            if name in module.__all__:
                globals()[name] = getattr(module, name)
                return globals()[name]
        raise AttributeError(f"module 'obsdag' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
