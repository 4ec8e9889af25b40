"""Process tasks: the function runs in a worker process, on a detached context (SEMANTICS T11).

    parent    encode_job -> bytes -> ProcessPool.submit -> bytes -> decode_outcome -> apply_outcome
    worker    run_job: builds the DetachedContext, calls the function, turns what came of it into bytes

The Environment cannot cross to another process: a process task's function takes only the context. Outcomes,
exceptions included, are turned into bytes in the worker, so that no class can break the pool. Spans or other facts
made in the worker travel back as `extras`: what the callables in `extra_sources`, filled by the pool's initializer,
give after each job.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import logging
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from obsdag.errors import ContextError, EncodingError
from obsdag.pools import _worker
from obsdag.pools.carry import (
    Packer,
    RemoteFailure,
    Unpacker,
    dumps,
    loads,
    main_name,
    pack_error,
    str_of,
    unpack_error,
)
from obsdag.tasks.base import RunsOn
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

extra_sources: list[Callable[[], Iterable[bytes]]] = []
"""In a worker process: asked after each job for what shall travel back with its outcome."""


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
        try:
            _refer_to(self.func)
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
    name = func.__qualname__
    if name == "<lambda>" or name.endswith(".<lambda>"):
        raise EncodingError("its function is a lambda, which a worker process cannot import: define it in a module")
    if "<locals>" in name:
        raise EncodingError(
            f"its function {name} is defined inside a function, where a worker process cannot import it: "
            "move it to the top of its module"
        )
    module = func.__module__
    if module in _worker.MAIN_NAMES and _worker.find_main() is None:
        raise EncodingError(
            f"its function {name} is defined in a session or notebook, which a worker process cannot import: "
            "put it into a module"
        )
    try:
        found = _attribute(sys.modules[module], name)
    except (KeyError, AttributeError):
        raise EncodingError(f"its function cannot be found as {module}.{name} by a worker process") from None
    if found is not func:
        raise EncodingError(f"{module}.{name} is not its function but {found!r}: a worker process would find that one")
    return module, name


def _attribute(module: Any, qualified_name: str) -> Any:
    found = module
    for part in qualified_name.split("."):
        found = getattr(found, part)
    # A decorator may have left the task under the function's name.
    return getattr(found, "func", found) if not isinstance(found, FunctionType) else found


def _find(reference: tuple[str, str] | bytes) -> Callable[..., Any]:
    if isinstance(reference, bytes):
        return loads(reference)  # type: ignore[no-any-return]
    module, name = reference
    if module in _worker.MAIN_NAMES:
        module = main_name()
    __import__(module)
    return _attribute(sys.modules[module], name)  # type: ignore[no-any-return]


# --- the context in the worker process


class DetachedContext(MutableMapping[str, Any]):
    """What a process task's function gets (T11): data, `id`, `name` and `attempt` of a context that lives in another
    process.

    A mutable mapping as Context is. Changed and deleted keys are applied there when the function has succeeded,
    in-place changes of lists, dicts and the like included. `create` and `create_child` make further detached
    contexts, which become real when they are returned. The tree, the lock, freeze, thaw and destroy raise ContextError.
    """

    def __init__(self, id: str, name: str, attempt: int, data: dict[str, Any], parent: DetachedContext | None) -> None:
        self.id = id
        self.name = name
        self.attempt = attempt
        self._id = id
        self._data = data
        self._parent = None  # as it stands on a root: OutputContext takes it over
        self._made_by = self if parent is None else parent
        self._job: DetachedContext = self if parent is None else parent._job
        self._made: list[DetachedContext] = []  # on the job's own context: all, in order
        self._is_child = False

    def __repr__(self) -> str:
        return f"<DetachedContext {self.id!r}>"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._data[key] = value

    def __delitem__(self, key: str) -> None:
        del self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._data))

    def __len__(self) -> int:
        return len(self._data)

    def to_dict(self) -> dict[str, Any]:
        """A shallow copy of the data."""
        return dict(self._data)

    def create(self, copy_data: bool = False, deep_copy: bool = False, name: str = "") -> DetachedContext:
        """A new root, with a shallow or deep copy of this context's data if asked for (C3)."""
        data = copy.deepcopy(self._data) if deep_copy else dict(self._data) if copy_data else {}
        return self._make(name, data, is_child=False)

    def create_child(self, num: int | None = 0, name: str | list[str] | None = None) -> Any:
        """One new child (num=0), or a list of `num`, without data (C3). Raises ContextError as Context.create_child
        does.
        """
        count = num or 0
        if count < 0:
            raise ContextError(f"context {self.id!r}: create_child(num={num}) must be >= 0")
        names = name if isinstance(name, list) else [name or ""] * (count or 1)
        if len(names) != (count or 1):
            raise ContextError(f"context {self.id!r}: {len(names)} names for {count or 1} children")
        children = [self._make(child_name, {}, is_child=True) for child_name in names]
        return children if count else children[0]

    def _make(self, name: str, data: dict[str, Any], is_child: bool) -> DetachedContext:
        made = self._job._made
        new = DetachedContext(name or f"{self._job.id}/new-{len(made) + 1}", name, 1, data, self)
        new._is_child = is_child
        made.append(new)
        return new

    def _detached(self, what: str) -> NoReturn:
        raise ContextError(
            f"context {self.id!r} is detached: it is a copy in a worker process, so `{what}` cannot be used; "
            "do that in a task that runs in the engine's own process"
        )

    def freeze(self) -> NoReturn:
        """Raises ContextError."""
        self._detached("freeze")

    def thaw(self) -> NoReturn:
        """Raises ContextError."""
        self._detached("thaw")

    def destroy(self) -> NoReturn:
        """Raises ContextError."""
        self._detached("destroy")


_ELSEWHERE = (
    "available_tasks children completed_tasks depth destroyed error_info frozen ledger lock outcome parent root runtime"
)


def _raise_detached(name: str) -> property:
    return property(lambda self: self._detached(name), doc="Raises ContextError.")


for _name in _ELSEWHERE.split():
    setattr(DetachedContext, _name, _raise_detached(_name))


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

    changed, deleted: of the context's data. returned: what the function returned, as a list, or None. made: the contexts
    that were returned, and those that they hang on, each after the one that made it. extras: see `extra_sources`.
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
    assert task.func is not None
    items = list(dict(data).items())  # a snapshot: other branches may go on changing it
    try:
        reference = _refer_to(task.func)
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


# --- the worker's side


def run_job(payload: bytes) -> bytes:
    """In the worker process: runs a job of `encode_job` and gives an outcome for `decode_outcome`. Never raises."""
    try:
        unpacker = Unpacker(payload)
        reference, task_id, context_id, name, attempt, carrier, count = unpacker.take()
        where = f"task {task_id!r}, context {context_id!r}"
        data = unpacker.take_data(count, where, "to")
        function = _find(reference)
        context = DetachedContext(context_id, name, attempt, data, None)
        before = {key: (value, _fingerprint(value)) for key, value in data.items()}
        with _trace_context(carrier):
            returned = function(context)
        return _encode_success(where, context, before, returned)
    except BaseException as error:  # sys.exit and all: the pool must get an answer
        return dumps(("error", tuple(pack_error(error)), _extras()))


_SEVERAL = (list, tuple, set, frozenset)
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def _fingerprint(value: Any) -> bytes | None:
    """A digest of the pickled value, to find what was changed in place; None where it cannot change, or cannot be told.

    Made here, not from what the parent sent: pickling the same value in two processes may give different bytes (the
    order of sets, the main module's name).
    """
    if type(value) in _PLAIN:
        return None
    digest = _Digest()
    try:
        pickle.Pickler(digest, 5).dump(value)
    except Exception:  # cannot be sent back: an error only if it was replaced, or its keeping looks the same
        return None
    return digest.hash.digest()


class _Digest:
    """A file that only hashes, so that a large value is not held twice."""

    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=16)

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)


def _is_changed(old: Any, old_print: bytes | None, new: Any) -> bool:
    if type(old) in _PLAIN:
        return new is not old and (type(new) is not type(old) or new != old or type(old) in (float, complex))  # -0.0
    new_print = _fingerprint(new)
    return new_print != old_print or (new_print is None and new is not old)


def _encode_success(
    where: str, context: DetachedContext, before: dict[str, tuple[Any, bytes | None]], returned: Any
) -> bytes:
    after = context._data
    changed = [(key, after[key]) for key in after if key not in before or _is_changed(*before[key], after[key])]
    deleted = [key for key in before if key not in after]
    items = [] if returned is None else list(returned) if isinstance(returned, _SEVERAL) else [returned]
    made = _wanted(context, items)
    number = {id(new): index for index, new in enumerate(made)}
    heads = [(number.get(id(new._made_by)), new._is_child, new.name, len(new._data)) for new in made]
    packer = Packer()
    references = None if returned is None else [_reference(item, context, number) for item in items]
    packer.put(("ok", where, deleted, len(changed), heads, references, _extras()))
    packer.put_data(changed, where, "back from")
    for new in made:
        packer.put_data(list(new._data.items()), f"{where}, a made context", "back from")
    return packer.bytes()


def _wanted(own: DetachedContext, items: list[Any]) -> list[DetachedContext]:
    """Contexts of this job that are returned, and those that they hang on, in order of creation."""
    wanted: set[int] = set()
    for item in items:
        context = _inner(item)
        while isinstance(context, DetachedContext) and context is not own and context._job is own:
            if id(context) in wanted:
                break
            wanted.add(id(context))
            context = context._made_by
    return [new for new in own._made if id(new) in wanted]


def _inner(item: Any) -> Any:
    return item if isinstance(item, DetachedContext) else getattr(item, "context", None)


def _reference(item: Any, own: DetachedContext, number: dict[int, int]) -> tuple[Any, ...]:
    context = _inner(item)
    if isinstance(context, DetachedContext) and context._job is own:
        index = None if context is own else number[id(context)]
        kind = type(item).__name__
        if item is context:
            return ("context", index)
        if kind == "RateLimitContext":
            return ("limit", index, item.delay)
        if kind == "OutputContext":
            return ("output", index)
    text = str_of(item, repr)
    return ("foreign", text if len(text) <= 300 else f"{text[:300]}...")


def _extras() -> list[bytes]:
    extras: list[bytes] = []
    for source in extra_sources:
        try:
            extras += source()
        except Exception:  # what is only told must not change the outcome
            logging.getLogger("obsdag.worker").exception("an extra source raised: %r", source)
    return extras


@contextlib.contextmanager
def _trace_context(carrier: Mapping[str, str]) -> Iterator[None]:
    """Makes the caller's span the parent of spans that the function makes (T12)."""
    if not carrier:
        yield
        return
    try:
        from opentelemetry import context, propagate
    except ImportError:
        yield
        return
    token = context.attach(propagate.extract(carrier))
    try:
        yield
    finally:
        context.detach(token)
