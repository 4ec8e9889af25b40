"""A context: one unit of data on its way through a DAG. Data, tree and progress; no scheduling (SEMANTICS section 3).

Who may touch what. Public methods may be called from any thread. Everything with a leading underscore below `_run`
belongs to the core of the run that the context is in and is changed on that run's thread only; `freeze`, `thaw` and
`destroy` hand themselves over to it. The data dict is only ever touched by single dict operations, which are atomic;
`lock` is there for more than that.

Progress is integers over the plan's bit masks (ARCHITECTURE, idea 4):
    _done      completed or skipped tasks                       _running   tasks with an execution on this context
    _ready     tasks that may start now                         _parked    tasks that wait, and tasks of lent branches
"""

from __future__ import annotations

import copy
import itertools
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Set
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, overload

from obsdag.errors import ContextError

if TYPE_CHECKING:
    from obsdag.core.records import Execution, More, Pull, Scope, Wait
    from obsdag.core.state import RunState
    from obsdag.plan import Plan
    from obsdag.runtime import Runtime, _Token

__all__ = ["Context", "ErrorInfo", "LoopContext", "OutputContext", "RateLimitContext", "StopContext", "TaskSet"]

_numbers = itertools.count(1)
_prefix = secrets.token_hex(4)
_lock_maker = threading.Lock()


def _renew_prefix() -> None:
    global _prefix  # noqa: PLW0603 - a forked child must not give out its parent's ids
    _prefix = secrets.token_hex(4)


if hasattr(os, "register_at_fork"):  # pragma: no branch - absent on Windows only
    os.register_at_fork(after_in_child=_renew_prefix)


class ErrorInfo(NamedTuple):
    """Why a context failed (seed): whether it did, with which exception, at which task (its id)."""

    has_error: bool = False
    exception: BaseException | None = None
    error_node: str | None = None


_NO_ERROR = ErrorInfo()


class TaskSet(Set[str]):
    """Task ids in the plan's order; `in` takes a task as well as an id."""

    __slots__ = ("_names",)

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = dict.fromkeys(names)

    def __contains__(self, task: object) -> bool:
        return getattr(task, "id", task) in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"TaskSet({list(self._names)})"

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> set[Any]:
        return set(it)


if TYPE_CHECKING:
    _Mapping = MutableMapping[str, Any]
else:

    class _Mapping:
        """The mixin methods of MutableMapping without its metaclass: isinstance of an ABC costs 0.4 us, on every
        return.
        """

        __slots__ = ()

        keys = MutableMapping.keys
        items = MutableMapping.items
        values = MutableMapping.values
        popitem = MutableMapping.popitem
        update = MutableMapping.update

        def clear(self) -> None:
            """Removes every key; one dict operation."""
            self._data.clear()


class Context(_Mapping):
    """One unit of data (SEMANTICS C1): a mutable mapping, the same in async and sync tasks.

    runtime: the Runtime that counts it, or None. data: a mapping or pairs to start with. name: becomes its id when
    given. Two contexts are equal only if they are the same object, and a context is true even when it is empty.
    """

    _done: int
    _ready: int
    _running: int
    _parked: int
    _holds: int
    _state: int
    _since: float
    _entered: float
    _lane: int
    _entry: Any  # the journal's own record of this context, set only where there is a journal
    _idempotency: str  # set when it is first asked for
    _keys_asked_early: ClassVar[bool] = False  # of any context before a journal knew it: a journal looks at all then
    _ledger: float | list[float] | None  # of a root: seconds queued; per state, but running, when it was in others
    _waits: list[float] | None  # seconds per state since the last start, where an observer needs them

    __slots__ = (
        "__weakref__",
        "_children",
        "_data",
        "_done",
        "_entered",
        "_entry",
        "_error",
        "_executions",
        "_frozen",
        "_holds",
        "_id",
        "_idempotency",
        "_lane",
        "_ledger",
        "_lock",
        "_maker",
        "_more",
        "_outcome",
        "_parent",
        "_parked",
        "_place",
        "_ready",
        "_run",
        "_running",
        "_scope",
        "_since",
        "_state",
        "_token",
        "_trace",
        "_waits",
        "name",
        "runtime",
    )

    def __init__(
        self,
        runtime: Runtime | None = None,
        data: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        name: str = "",
    ) -> None:
        self.runtime = runtime
        self.name = name
        self._data: dict[str, Any] = data.copy() if type(data) is dict else dict(data)
        self._id: str | int = name or next(_numbers)
        self._parent: Context | None = None
        self._children: dict[Context, None] | None = None
        self._lock: threading.RLock | None = None
        self._token: _Token | None = None if runtime is None else runtime._token()
        self._frozen = False
        self._outcome: str | None = None
        self._error: BaseException | None = None
        self._run: RunState | None = None
        self._executions: list[Execution] | None = None
        self._maker: Execution | None = None
        self._more: More | Wait | None = None
        self._scope: Scope | None = None
        self._trace: Any = None  # the tracing observer's own record of this context
        self._place = 0
        # The rest is set when it enters a run (`Lifecycle._enter`), once.

    # --- identity

    @property
    def id(self) -> str:
        """The context's name if it was given one, else a number with a prefix that is random per process."""
        if type(self._id) is int:
            self._id = f"{_prefix}-{self._id:x}"
        return self._id  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r} {self._outcome or ('living' if self._run else 'new')}>"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __bool__(self) -> bool:
        return True

    # --- data (C1, C2)

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._data[key] = value

    def __delitem__(self, key: str) -> None:
        del self._data[key]

    def __len__(self) -> int:
        return len(self._data)

    def __contains__(self, key: object) -> bool:
        return key in self._data

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._data))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default`; one dict operation."""
        return self._data.get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """Removes `key` and gives its value; one dict operation."""
        return self._data.pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The value of `key`, set to `default` if it is missing; one dict operation."""
        return self._data.setdefault(key, default)

    def to_dict(self) -> dict[str, Any]:
        """A shallow copy of the data."""
        return dict(self._data)

    @property
    def lock(self) -> threading.RLock:
        """A re-entrant lock of this context, made at first use (C2); holders exclude each other, in any thread."""
        if self._lock is None:
            with _lock_maker:
                if self._lock is None:
                    self._lock = threading.RLock()
        return self._lock

    # --- making others (C3)

    def create(self, copy_data: bool = False, deep_copy: bool = False, name: str = "") -> Context:
        """A new root, unrelated to this context; with a shallow or deep copy of its data if asked for."""
        return Context(self.runtime, self._copied(copy_data, deep_copy), name)

    @overload
    def create_child(self, num: None = None, name: str | None = None) -> Context: ...
    @overload
    def create_child(self, num: int, name: str | list[str] | None = None) -> Any: ...

    def create_child(self, num: int | None = 0, name: str | list[str] | None = None) -> Any:
        """One new child of this context (num=0), or a list of `num`; children start without data.

        name: the child's name, or one name per child. Raises ContextError if `num` is negative or the names do not fit.
        """
        count = num or 0
        if count < 0:
            raise ContextError(f"context {self.id!r}: create_child(num={num}) must be >= 0")
        names = name if isinstance(name, list) else [name or ""] * (count or 1)
        if len(names) != (count or 1):
            raise ContextError(f"context {self.id!r}: {len(names)} names for {count or 1} children")
        children = [self._child(child_name) for child_name in names]
        return children if count else children[0]

    def _child(self, name: str = "", data: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> Context:
        child = Context(self.runtime, data, name)
        child._parent = self
        if self._children is None:
            with _lock_maker:
                if self._children is None:
                    self._children = {}
        self._children[child] = None
        return child

    def _copied(self, copy_data: bool, deep_copy: bool) -> dict[str, Any]:
        if deep_copy:
            return copy.deepcopy(dict(self._data))
        return dict(self._data) if copy_data else {}

    # --- tree and progress (C11)

    @property
    def parent(self) -> Context | None:
        """The context that this one is a child of, None for a root."""
        return self._parent

    @property
    def children(self) -> list[Context]:
        """The children so far. Those that a map made leave this list when they end, so that it stays bounded."""
        return list(self._children) if self._children else []

    @property
    def root(self) -> Context:
        """The topmost ancestor, or the context itself."""
        context = self
        while context._parent is not None:
            context = context._parent
        return context

    @property
    def depth(self) -> int:
        """Steps up to the root: 0 for a root."""
        depth, context = 0, self
        while context._parent is not None:
            depth, context = depth + 1, context._parent
        return depth

    @property
    def attempt(self) -> int:
        """The number of the attempt that asks, from 1; outside an execution, of the newest execution."""
        from obsdag.core.records import current_execution

        execution = current_execution.get()
        if execution is None and self._run is not None and self._executions and len(self._executions) > 1:
            execution = self._run.caller()
        if execution is not None and execution.context is self:
            return execution.attempt
        return self._executions[-1].attempt if self._executions else 1

    @property
    def idempotency_key(self) -> str:
        """A text of this context alone, the same for every attempt and, with a journal, after a crash."""
        if not hasattr(self, "_idempotency"):
            with _lock_maker:
                if not hasattr(self, "_idempotency"):
                    entry = getattr(self, "_entry", None)
                    if entry is None:
                        Context._keys_asked_early = True
                    self._idempotency = secrets.token_hex(12) if entry is None else entry.idempotency_key
        return self._idempotency

    @property
    def error_info(self) -> ErrorInfo:
        """Why it failed; `has_error` is False while it has not."""
        if self._error is None:
            return _NO_ERROR
        return ErrorInfo(True, self._error, self._more.why or None if self._more else None)

    @property
    def outcome(self) -> str | None:
        """output, split, merged, dropped, failed, cancelled or stalled (C9); None while it has not ended."""
        return self._outcome

    @property
    def destroyed(self) -> bool:
        """Whether the context ended without reaching an output: dropped, failed, cancelled or stalled."""
        return self._outcome in ("dropped", "failed", "cancelled", "stalled")

    @property
    def frozen(self) -> bool:
        """Whether `freeze` was called last, rather than `thaw`."""
        return self._frozen

    @property
    def completed_tasks(self) -> TaskSet:
        """Ids of the tasks that are completed for this context (skipped ones are not)."""
        plan = self._plan()
        if plan is None:
            return TaskSet()
        skipped = self._more.skipped if self._more else 0
        return TaskSet(plan.names(self._done & ~skipped & ~(plan.bit[plan.source] | plan.bit[plan.sink])))

    @property
    def available_tasks(self) -> TaskSet:
        """Ids of the tasks that are ready on this context and not started."""
        plan = self._plan()
        return TaskSet() if plan is None or self._outcome else TaskSet(plan.names(self._ready))

    @property
    def ledger(self) -> dict[str, float]:
        """Seconds that this root spent in each state of TELEMETRY section 4; the parts add up to its time in the run.

        Empty for a child and for a context that has not entered a run.
        """
        return {} if self._run is None else self._run.ledger_of(self)

    def _plan(self) -> Plan | None:
        return None if self._run is None else self._run.plan

    # --- steering (C7, C8)

    def freeze(self) -> None:
        """No new execution starts on this context until `thaw`; running ones go on. From any thread (C7)."""
        self._frozen = True
        if self._run is not None:
            self._run.call(self._run.freeze, self)

    def thaw(self) -> None:
        """Ends `freeze`: the context is evaluated again. From any thread (C7)."""
        self._frozen = False
        if self._run is not None:
            self._run.call(self._run.thaw, self)

    def destroy(self) -> None:
        """Ends the context as `dropped` and its descendants as `cancelled`. From any thread; again is a no-op (C8)."""
        if self._run is not None:
            self._run.call(self._run.destroy, self)
        elif self._outcome is None:
            self._outcome = "dropped"
            if self._token is not None:
                self._token.release()

    def keep_trace(self) -> None:
        """Asks for the trace of this context's root to be kept and exported, whatever sampling says (TELEMETRY 3)."""
        if self._run is not None:
            self._run.call(self._run.keep_trace, self)


MutableMapping.register(Context)


class LoopContext(Context):
    """Pulls the next item of a loop or map; a role, not counted as a context (C10)."""

    __slots__ = ("pull",)

    pull: Pull


class RateLimitContext(Context):
    """Says "not run, a limit was met": returned by a task, runs it again on `context` after `delay` seconds (> 0), no
    attempt.
    """

    __slots__ = ("context", "delay")

    def __init__(self, context: Context, delay: float) -> None:
        if isinstance(delay, bool) or not isinstance(delay, int | float) or not 0 < delay < float("inf"):
            raise ContextError(f"RateLimitContext(delay={delay!r}): delay must be a number of seconds > 0")
        super().__init__(None, name=f"RateLimit#{context.id}")
        self.context = context
        self.delay = float(delay)


class StopContext(Context):
    """The marker to stop, for one's own workers and services (C10)."""

    __slots__ = ()

    def __init__(self, name: str = "StopContext") -> None:
        super().__init__(None, name=name)


class OutputContext(Context):
    """What the sink gives out (C10): id and data of the context that reached it, which is `context`.

    Returned by a task, it ends that task's context as `output` at once.
    """

    __slots__ = ("context",)

    def __init__(self, context: Context | None = None, name: str = "OutputContext") -> None:
        self.context = context
        if context is None:
            super().__init__(None, name=name)
            return
        # It shows another context: the same data, tree and progress, without being in a run itself.
        self.runtime = context.runtime
        self.name = context.name
        self._id = context._id
        self._data = context._data
        self._parent = context._parent
        self._children = context._children
        self._run = context._run
        self._more = context._more
        self._outcome = context._outcome
        self._error = context._error
        if context._run is not None:
            self._ledger = context._ledger
            self._state = context._state
            self._since = context._since
            self._entered = context._entered
            self._done = context._done
        self._frozen = False
        self._executions = None
        self._lock = context._lock
        self._token = None
