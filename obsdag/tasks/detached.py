"""A process task's function in its worker: the detached context, the call, the outcome as bytes (SEMANTICS T11).

The other half is process.py, in the engine's own process. Kept light, as a worker process has to import it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from types import FunctionType
from typing import Any, NoReturn

from obsdag.errors import ContextError
from obsdag.pools import _worker
from obsdag.pools.carry import Packer, Unpacker, dumps, loads, main_name, pack_error, str_of

__all__ = ["DetachedContext", "attribute", "extra_sources", "run_job"]

extra_sources: list[Callable[[], Iterable[bytes]]] = []
"""In a worker process: asked after each job for what shall travel back with its outcome."""


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


# --- the job


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


def attribute(module: Any, qualified_name: str) -> Any:
    """What `module` has under that name; the function, if a decorator left the task there."""
    found = module
    for part in qualified_name.split("."):
        found = getattr(found, part)
    return getattr(found, "func", found) if not isinstance(found, FunctionType) else found


def _find(reference: tuple[str, str] | bytes) -> Callable[..., Any]:
    if isinstance(reference, bytes):
        return loads(reference)  # type: ignore[no-any-return]
    module, name = reference
    if module in _worker.MAIN_NAMES:
        module = main_name()
    __import__(module)
    return attribute(sys.modules[module], name)  # type: ignore[no-any-return]
