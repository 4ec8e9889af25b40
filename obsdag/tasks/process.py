"""Process tasks: the function runs in a worker process, on a detached context (SEMANTICS T11).

    parent    encode_job -> bytes -> ProcessPool.submit -> bytes -> decode_outcome -> apply_outcome
    worker    run_job (detached.py): builds the DetachedContext, calls the function, turns what came of it into bytes

The Environment cannot cross to another process: a process task's function takes only the context. Outcomes,
exceptions included, are turned into bytes in the worker, so that no class can break the pool. Spans or other facts
made in the worker travel back as `extras`: what the callables in `extra_sources`, filled by the pool's initializer,
give after each job.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar

from obsdag.errors import EncodingError
from obsdag.pools import _worker
from obsdag.pools.carry import Packer, RemoteFailure, Unpacker, dumps, unpack_error
from obsdag.tasks.base import RunsOn
from obsdag.tasks.detached import DetachedContext, attribute, extra_sources, run_job
from obsdag.tasks.function import NOTHING_COMES_BACK, FunctionTask

if TYPE_CHECKING:
    from obsdag.context import Context

__all__ = [
    "DetachedContext",
    "Foreign",
    "NewContext",
    "Output",
    "OwnContext",
    "ProcessOutcome",
    "ProcessTask",
    "RateLimited",
    "apply_outcome",
    "decode_outcome",
    "encode_job",
    "extra_sources",
    "run_job",
]

# --- the task


class ProcessTask(FunctionTask):
    """Calls a plain function in a worker process: `def f(context)` returns what goes on (T1, T11).

    The function must be importable there by its module and name (or be picklable, as a functools.partial of such a
    one). Its context is a DetachedContext. An execution that times out or is cancelled is ended by killing its process.
    """

    kind = "process"
    runs_on: ClassVar[RunsOn] = "process"
    accepts = ("function",)
    may_pass_through = True
    nothing_comes_back = NOTHING_COMES_BACK

    def problems(self) -> Iterable[str]:
        """Also: the function cannot be found by a worker process, or takes what cannot cross to it."""
        yield from super().problems()
        if self.func is None:
            return
        if self.signature.takes_env and not _takes_only_a_context(self.func):
            yield "its function takes a second parameter, but the Environment cannot cross to a worker process"
        if self.signature.needs_resource:
            yield "its function needs the parameter 'resource', but a pooled resource cannot cross to a worker process"
        yield from self.unreachable()

    @property
    def reference(self) -> tuple[str, str] | bytes:
        """How a worker process finds the function. Raises EncodingError."""
        assert self.func is not None
        return _refer_to(self.func)

    def unreachable(self) -> Iterable[str]:
        """Why the function cannot be had where it is to run."""
        try:
            _ = self.reference
        except EncodingError as error:
            yield str(error)


def _takes_only_a_context(func: Callable[..., Any]) -> bool:
    try:
        inspect.signature(func).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def _refer_to(func: Callable[..., Any]) -> tuple[str, str] | bytes:
    """How a worker process finds the function: its module and name, or its pickled form. Raises EncodingError."""
    if not isinstance(func, FunctionType):
        try:
            return dumps(func)
        except Exception as error:
            raise EncodingError(
                f"its {type(func).__name__} cannot be carried to a worker process ({error}); use a function of a module"
            ) from error
    obstacle = _why_unreachable(func.__module__, func.__qualname__, func)
    if obstacle:
        raise EncodingError(obstacle)
    return func.__module__, func.__qualname__


def _why_unreachable(module: str, name: str, func: FunctionType) -> str | None:
    if name.endswith("<lambda>"):
        return "its function is a lambda, which a worker process cannot import: define it in a module"
    if "<locals>" in name:
        return (
            f"its function {name} is defined inside a function, where a worker process cannot import it: "
            "move it to the top of its module"
        )
    if module in _worker.MAIN_NAMES and _worker.find_main() is None:
        return (
            f"its function {name} is defined in a session or notebook, which a worker process cannot import: "
            "put it into a module"
        )
    try:
        found = attribute(sys.modules[module], name)
    except (KeyError, AttributeError):
        return f"its function cannot be found as {module}.{name} by a worker process"
    if found is not func:
        return f"{module}.{name} is not its function but {found!r}: a worker process would find that one"
    return None


# --- what comes back


@dataclass(frozen=True, slots=True)
class OwnContext:
    """The function returned the context that it was given."""


@dataclass(frozen=True, slots=True, eq=False)
class NewContext:
    """A context that the function made: to be made here.

    index: its place in `ProcessOutcome.made`. parent: the index of the context that made it, None for the task's own.
    is_child: whether it is a child of that one, or a root.
    """

    index: int
    parent: int | None
    is_child: bool
    name: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RateLimited:
    """The function returned a RateLimitContext around `context`, with `delay` in seconds (C10)."""

    context: OwnContext | NewContext
    delay: float


@dataclass(frozen=True, slots=True)
class Output:
    """The function returned an OutputContext around `context` (C10)."""

    context: OwnContext | NewContext


@dataclass(frozen=True, slots=True)
class Foreign:
    """Anything else that the function returned, of which only its repr is here: a TaskError shows it (T1)."""

    text: str

    def __repr__(self) -> str:
        return self.text


Returned = OwnContext | NewContext | RateLimited | Output | Foreign


@dataclass(frozen=True, slots=True)
class ProcessOutcome:
    """What came of an execution in a worker process. With an `error`, nothing is to be applied.

    changed, deleted: of the context's data. returned: what the function returned, as a list, or None. made: the
    contexts returned, and those that they hang on, each after the one that made it. extras: see `extra_sources`.
    """

    error: BaseException | None = None
    changed: dict[str, Any] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    returned: list[Returned] | None = None
    made: list[NewContext] = field(default_factory=list)
    extras: list[bytes] = field(default_factory=list)


# --- the parent's side


def encode_job(
    task: ProcessTask, context_id: str, name: str, data: Mapping[str, Any], attempt: int, carrier: Mapping[str, str]
) -> bytes:
    """A job for `run_job`. carrier: W3C trace context, or empty.

    Raises EncodingError that names the key and the type of the first value that cannot be pickled (T11).
    """
    items = list(dict(data).items())  # a snapshot: other branches may go on changing it
    try:
        reference = task.reference
    except EncodingError as error:
        raise EncodingError(f"task {task.id!r}: {error}") from error
    packer = Packer()
    packer.put((reference, task.id, context_id, name, attempt, dict(carrier), len(items)))
    packer.put_data(items, f"task {task.id!r}, context {context_id!r}", "to")
    return packer.bytes()


def decode_outcome(data: bytes) -> ProcessOutcome:
    """What `run_job` made; never raises: what cannot be unpickled here is the outcome's error."""
    try:
        unpacker = Unpacker(data)
        head = unpacker.take()
        if head[0] == "error":
            return ProcessOutcome(error=unpack_error(RemoteFailure(*head[1])), extras=head[2])
        _, where, deleted, count, made_heads, returned, extras = head
        changed = unpacker.take_data(count, where, "back from")
        made = [
            NewContext(index, parent, is_child, name, unpacker.take_data(size, f"{where}, a made context", "back from"))
            for index, (parent, is_child, name, size) in enumerate(made_heads)
        ]
    except EncodingError as error:
        return ProcessOutcome(error=error)
    except Exception as error:
        return ProcessOutcome(error=EncodingError(f"the outcome of a worker process cannot be read: {error}"))
    found = None if returned is None else [_returned(item, made) for item in returned]
    return ProcessOutcome(None, changed, deleted, found, made, extras)


def _returned(item: tuple[Any, ...], made: list[NewContext]) -> Returned:
    kind, value, *rest = item
    if kind == "foreign":
        return Foreign(value)
    context: OwnContext | NewContext = OwnContext() if value is None else made[value]
    if kind == "limit":
        return RateLimited(context, rest[0])
    return Output(context) if kind == "output" else context


def apply_outcome(outcome: ProcessOutcome, context: Context) -> list[Any] | None:
    """Applies a success to the real context, makes the new ones, and gives what the function would have returned here.

    A `Foreign` stays what it is, for the TaskError that shows it. Raises the outcome's error, with nothing applied.
    """
    if outcome.error is not None:
        raise outcome.error
    for key in outcome.deleted:
        context.pop(key, None)
    context.update(outcome.changed)
    made: list[Context] = []
    for new in outcome.made:
        maker = context if new.parent is None else made[new.parent]
        real = maker.create_child(name=new.name or None) if new.is_child else maker.create(name=new.name)
        real.update(new.data)
        made.append(real)
    return None if outcome.returned is None else [_real(item, context, made) for item in outcome.returned]


def _real(item: Returned, context: Context, made: list[Context]) -> Any:
    from obsdag.context import OutputContext, RateLimitContext

    if isinstance(item, OwnContext):
        return context
    if isinstance(item, NewContext):
        return made[item.index]
    if isinstance(item, RateLimited):
        return RateLimitContext(_real(item.context, context, made), item.delay)
    return OutputContext(_real(item.context, context, made)) if isinstance(item, Output) else item
