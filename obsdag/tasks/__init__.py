"""The kinds of tasks, which a user defines a DAG of (SEMANTICS section 4); the executor's runners drive them."""

from __future__ import annotations

from obsdag.tasks.base import Environment, Task, TaskConfig
from obsdag.tasks.function import (
    AsyncFunctionShutdownTask,
    AsyncFunctionTask,
    AsyncTask,
    ForegroundSyncFunctionShutdownTask,
    ForegroundSyncFunctionTask,
    ForegroundTask,
    FunctionTask,
    ShutdownTask,
    SyncFunctionShutdownTask,
    SyncFunctionTask,
    SyncTask,
)
from obsdag.tasks.join import JoinTask
from obsdag.tasks.loop import AsyncLoopTask, ForegroundSyncLoopTask, LoopTask, SyncLoopTask
from obsdag.tasks.map import MapTask
from obsdag.tasks.process import ProcessTask
from obsdag.tasks.retry import Exponential, Fixed, RetryStrategy
from obsdag.tasks.router import AsyncRouterTask, ForegroundSyncRouterTask, RouterTask, SyncRouterTask
from obsdag.tasks.service import AsyncServiceTask, ServiceTask, SyncThreadTask
from obsdag.tasks.special import SinkNode, SourceNode
from obsdag.tasks.stream import AsyncStreamTask, ForegroundSyncStreamTask, StreamTask, SyncStreamTask
from obsdag.tasks.subdag import SubDAG

__all__ = [
    "AsyncFunctionShutdownTask",
    "AsyncFunctionTask",
    "AsyncLoopTask",
    "AsyncRouterTask",
    "AsyncServiceTask",
    "AsyncStreamTask",
    "AsyncTask",
    "Environment",
    "Exponential",
    "Fixed",
    "ForegroundSyncFunctionShutdownTask",
    "ForegroundSyncFunctionTask",
    "ForegroundSyncLoopTask",
    "ForegroundSyncRouterTask",
    "ForegroundSyncStreamTask",
    "ForegroundTask",
    "FunctionTask",
    "JoinTask",
    "LoopTask",
    "MapTask",
    "ProcessTask",
    "RetryStrategy",
    "RouterTask",
    "ServiceTask",
    "ShutdownTask",
    "SinkNode",
    "SourceNode",
    "StreamTask",
    "SubDAG",
    "SyncFunctionShutdownTask",
    "SyncFunctionTask",
    "SyncLoopTask",
    "SyncRouterTask",
    "SyncStreamTask",
    "SyncTask",
    "SyncThreadTask",
    "Task",
    "TaskConfig",
]
