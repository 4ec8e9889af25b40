"""What every task is: a node with a name, a configuration, neighbours, and a function that a kind knows how to call.

A `Task` is a definition and never changes while it runs: each run works on its own copy (`Task.for_run`, SEMANTICS
T10), so one DAG can run in two executors at once. What a kind adds is declared by three class attributes (`kind`,
`runs_on`, `shape`) and the hooks `problems`, `startup` and `shutdown`; how it is driven is the business of the
executor's runners.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from obsdag.errors import ConfigError, GraphError
from obsdag.tasks.retry import RetryInterval, RetryOn, RetryStrategy

if TYPE_CHECKING:
    from concurrent.futures import Executor as FuturesExecutor

    from obsdag.graph import DAG
    from obsdag.limits import Limit
    from obsdag.runtime import Runtime

__all__ = ["Environment", "RunsOn", "Task", "TaskConfig"]

RunsOn = Literal["loop", "thread", "process", "remote"]
Shape = Literal["function", "router", "stream", "loop", "service", "map", "join", "subdag", "node"]


@dataclass(frozen=True, slots=True)
class Environment:
    """What a task's second parameter gives it (seed): the runtime, the process pool or None, and the DAG."""

    runtime: Runtime
    process_pool: FuturesExecutor | None
    dag: DAG


@dataclass(frozen=True, slots=True, kw_only=False)
class TaskConfig:
    """How a task is executed (SEMANTICS T6). Unknown names and out-of-range values raise ConfigError by name.

    retry_times: further attempts after a failed one (0: none).
    retry_interval: seconds before the next attempt: a number, a callable of the context, or a RetryStrategy.
    parallel_num: executions of this task at once within a run (0: no limit).
    limiter: a RateLimit, ConcurrencyLimit or ResourcePool, or several; all permits are taken together (T7).
    timeout: seconds that one execution may take (None: for ever).
    retry_on: exception types, or a predicate on the exception; None retries on every Exception.
    retry_for: seconds from the first attempt's start after which no further attempt is scheduled (None: no cap).
    priority: order among ready tasks of one context, higher first.
    slow_after: seconds after which an execution counts as slow for tracing (None: the tracing's own rule).
    pass_through: the function returns nothing and its context goes on (T3).
    may_drop: dropping contexts is this task's job: no warning and no alert.
    """

    retry_times: int = 0
    retry_interval: RetryInterval = 0
    parallel_num: int = 0
    limiter: Limit | Iterable[Limit] | None = None
    timeout: float | None = None
    retry_on: RetryOn | None = None
    retry_for: float | None = None
    priority: int = 0
    slow_after: float | None = None
    pass_through: bool = False
    may_drop: bool = False

    def __post_init__(self) -> None:
        _check_count("retry_times", self.retry_times)
        _check_count("parallel_num", self.parallel_num)
        if not isinstance(self.priority, int) or isinstance(self.priority, bool):
            raise ConfigError(f"TaskConfig.priority must be a whole number, not {self.priority!r}")
        if not callable(self.retry_interval) and not isinstance(self.retry_interval, RetryStrategy):
            _check_seconds("retry_interval", self.retry_interval, minimum=0.0)
        for name in ("timeout", "slow_after", "retry_for"):
            if getattr(self, name) is not None:
                _check_seconds(name, getattr(self, name))
        if self.retry_on is not None and not _is_retry_rule(self.retry_on):
            raise ConfigError(
                f"TaskConfig.retry_on must be exception types or a callable of the exception, not {self.retry_on!r}"
            )
        for name in ("pass_through", "may_drop"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"TaskConfig.{name} must be True or False, not {getattr(self, name)!r}")
        object.__setattr__(self, "limiter", _limits(self.limiter))

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The task's limiters as a tuple, empty without any."""
        return self.limiter  # type: ignore[return-value]

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> TaskConfig:
        """A TaskConfig from names and values; raises ConfigError that names what is unknown and what is known."""
        known = [field.name for field in fields(cls)]
        unknown = [str(name) for name in settings if name not in known]
        if unknown:
            raise ConfigError(f"TaskConfig has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
        return cls(**dict(settings))

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, in a form that compares and prints the same every time (G6)."""
        shown: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            default = () if field.name == "limiter" else field.default
            if value != default:
                shown[field.name] = _stable(value)
        return shown


class Task:
    """A node of the graph: `id` (its name), `config`, `upstream_tasks`, `downstream_tasks` (SEMANTICS section 1).

    Raises ConfigError if `config` is no TaskConfig and TypeError if `func` cannot be called. What else is wrong with
    the function is found when the DAG is built (`problems`), so that all mistakes are told at once (G3). From then on
    id, function and config are fixed (G2): setting one raises GraphError. A run's own copy is free.
    """

    _built = False

    kind: ClassVar[str] = "task"
    runs_on: ClassVar[RunsOn] = "loop"
    shape: ClassVar[Shape] = "function"

    def __init__(
        self, func: Callable[..., Any] | None, config: TaskConfig | None = None, name: str = "", **_: Any
    ) -> None:
        if config is None:
            config = TaskConfig()
        if not isinstance(config, TaskConfig):
            raise ConfigError(f"task {name or func!r}: config must be a TaskConfig, not {config!r}")
        if func is not None and not callable(func):
            raise TypeError(f"task {name!r}: {func!r} is not a function")
        self.id: str = name or getattr(func, "__name__", "") or type(func).__name__
        self.func = func
        self.config = config
        self.upstream_tasks: set[Task] = set()
        self.downstream_tasks: set[Task] = set()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r}>"

    def __setattr__(self, name: str, value: Any) -> None:
        if self._built and name in _FIXED:
            raise GraphError(f"task {self.id!r} is part of a built DAG, which does not change: `{name}` cannot be set")
        super().__setattr__(name, value)

    def free_copy(self) -> Self:
        """A copy that may be changed, whatever this one is part of."""
        mine = copy.copy(self)
        mine.__dict__.pop("_built", None)
        return mine

    def problems(self) -> Iterable[str]:
        """What is wrong with the definition, each a sentence without the task's name; told by `DAG.build` (G3)."""
        return ()

    def for_run(self) -> Task:
        """A copy whose own attributes a run may change (T10): `startup` and `shutdown` are called on the copy."""
        return self.free_copy()


_FIXED = frozenset({"id", "func", "config", "upstream_tasks", "downstream_tasks"})


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"TaskConfig.{name} must be a whole number >= 0, not {value!r}")


def _check_seconds(name: str, value: Any, minimum: float | None = None) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (value < 0 if minimum is not None else value <= 0):
        bound = ">= 0" if minimum is not None else "> 0"
        raise ConfigError(f"TaskConfig.{name} must be a number of seconds {bound}, not {value!r}")


def _is_retry_rule(rule: Any) -> bool:
    kinds = rule if isinstance(rule, tuple) else (rule,)
    if all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
        return bool(kinds)
    return callable(rule) and not isinstance(rule, type)


def _limits(limiter: Any) -> tuple[Limit, ...]:
    from obsdag.limits import Limit  # the room below needs no TaskConfig; imported late to keep this module light

    if limiter is None:
        return ()
    limits = tuple(limiter) if isinstance(limiter, list | tuple | set | frozenset) else (limiter,)
    for limit in limits:
        if not isinstance(limit, Limit):
            raise ConfigError(
                f"TaskConfig.limiter must be a RateLimit, ConcurrencyLimit or ResourcePool, or several, not {limit!r}"
            )
    return limits


def _stable(value: Any) -> Any:
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, tuple | list):
        return [_stable(item) for item in value]
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    return repr(value)
