"""Every exception that obsdag raises: one tree, each with one sentence on whose fault it is and what to do.

ObsdagError
├── ConfigError            (ValueError)    a setting is unknown or out of range: change the setting
├── GraphError             (ValueError)    the DAG cannot be built: all its mistakes are in `.problems`
├── InputError             (ValueError)    what was given to `run`, `stream` or `submit` is no input
├── ContextError           (ValueError)    a context was used where it cannot be: again, detached, in another run
├── TaskError                              a task broke the rules of its kind: fix the task
│   ├── ExecutionTimeout   (TimeoutError)  an execution took longer than its `timeout`
│   ├── EncodingError                      data cannot be carried to another process: names key and type
│   ├── RemoteError                        an exception of a worker process that cannot be carried here itself
│   └── ServiceError                       the service or thread that worked on the context died
├── PoolError                              a worker process died under its execution, or a pool cannot be used
├── ResourceError                          a pooled resource could not be made
├── DeadlineExceeded       (TimeoutError)  the run's or the root context's deadline passed
├── JournalError                           the journal cannot be opened, read or written: the message says why
│   └── PlanChangedError                   the DAG is not the one that the journal's contexts were in
├── RunFailed              (ExceptionGroup) a run with on_failure="raise" ended by a failure
├── ServeError                             a request that the serving executor cannot take or answer
│   ├── QueueFullError                     too much is pending: wait, or answer 503
│   ├── NotAcceptingError                  the executor is not started, drains, or is stopped
│   ├── DuplicateIdError   (ValueError)    a living context has that id already
│   ├── UnknownTicketError (KeyError)      no ticket of that id: never given out, fetched, or expired
│   ├── NoOutputError                      the context ended without output; `.outcome` says how
│   └── ContextFailedError                 the context failed; its cause is `__cause__`
└── InternalError                          obsdag broke one of its own invariants: report it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obsdag.executor import RunResult

__all__ = [
    "ConfigError",
    "ContextError",
    "ContextFailedError",
    "DeadlineExceeded",
    "DuplicateIdError",
    "EncodingError",
    "ExecutionTimeout",
    "GraphError",
    "InputError",
    "InternalError",
    "JournalError",
    "NoOutputError",
    "NotAcceptingError",
    "ObsdagError",
    "PlanChangedError",
    "PoolError",
    "QueueFullError",
    "RemoteError",
    "ResourceError",
    "RunFailed",
    "ServeError",
    "ServiceError",
    "TaskError",
    "UnknownTicketError",
]


def unless_missing(error: ImportError, package: str) -> ImportError | None:
    """The cause of an error that tells what to install: none if the package is not there, which the error says; `error`
    if it is there and cannot be imported.
    """
    return None if isinstance(error, ModuleNotFoundError) and error.name == package else error


class ObsdagError(Exception):
    """The root of everything that obsdag raises on its own account."""


class ConfigError(ObsdagError, ValueError):
    """A setting is unknown or out of range; the message names the setting, its value and what is allowed."""


class GraphError(ObsdagError, ValueError):
    """The DAG cannot be built (SEMANTICS G3). `problems` holds every mistake, each naming the tasks involved."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


class InputError(ObsdagError, ValueError):
    """What was given as input is not a context, a mapping, or an iterable of these (SEMANTICS E2)."""


class ContextError(ObsdagError, ValueError):
    """A context was used where it cannot be (SEMANTICS C12, T11); the message names the context."""


class TaskError(ObsdagError):
    """A task did what its kind does not allow (SEMANTICS T1); the message names the task and shows the value."""


class ExecutionTimeout(TaskError, TimeoutError):
    """An execution took longer than the task's `timeout`."""


class EncodingError(TaskError):
    """Data cannot be carried to another process or journal; names the key and the type (SEMANTICS T11)."""


class RemoteError(TaskError):
    """An exception of a worker process that could not be carried here; its type and text are in the message."""


class ServiceError(TaskError):
    """The service or thread that worked on the context ended before it answered (SEMANTICS T14)."""


class PoolError(ObsdagError):
    """A worker process died under the execution that it ran, or the pool is closed or not configured."""


class ResourceError(ObsdagError):
    """A pooled resource could not be made; the cause is `__cause__`."""


class DeadlineExceeded(ObsdagError, TimeoutError):
    """The deadline of a run or of a root context passed. `result` is what a run had reached, None for a context."""

    def __init__(self, message: str, result: RunResult | None = None) -> None:
        super().__init__(message)
        self.result = result


class JournalError(ObsdagError):
    """A journal cannot be opened, read or written; the reason is in the message, in one line. Nothing in it is lost.

    rows, took_s: of the commit that failed, if it was one.
    """

    rows: int = 0
    took_s: float = 0.0


class PlanChangedError(JournalError):
    """The DAG is not the one that the journal's contexts were in; `differences` says how, task by task."""

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class RunFailed(ObsdagError, ExceptionGroup[Exception]):
    """A run with `on_failure="raise"` ended because a context failed. `result` is what it had reached."""

    result: RunResult | None = None

    def derive(self, excs: Sequence[Exception], /) -> RunFailed:  # type: ignore[override]
        """The same kind of group over `excs`, so that `split` and `except*` keep type and result."""
        group = RunFailed(self.message, excs)
        group.result = self.result
        return group


class ServeError(ObsdagError):
    """A request that the serving executor cannot take or answer."""


class QueueFullError(ServeError):
    """`max_pending` contexts wait already (SEMANTICS S2): wait, or tell the caller to come back."""


class NotAcceptingError(ServeError):
    """The serving executor is not started, is draining, or is stopped (SEMANTICS S3)."""


class DuplicateIdError(ServeError, ValueError):
    """A living context has the submitted id already (SEMANTICS S1)."""


class UnknownTicketError(ServeError, KeyError):
    """No ticket has that id: it was never given out, its result was fetched, or it expired."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class NoOutputError(ServeError):
    """A submitted context ended without an output; `outcome` is how it ended (SEMANTICS S1)."""

    def __init__(self, message: str, outcome: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class ContextFailedError(ServeError):
    """A submitted context failed; the task's exception is `__cause__`, `error_info` says where."""

    def __init__(self, message: str, error_info: Any = None) -> None:
        super().__init__(message)
        self.error_info = error_info


class InternalError(ObsdagError):
    """obsdag broke one of its own invariants (SEMANTICS C9). This is a bug of obsdag: please report the message."""
