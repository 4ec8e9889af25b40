"""A process task's function in its worker: the detached context, the call, the outcome as bytes (SEMANTICS T11).

The other half is process.py, in the engine's own process. Kept light, as a worker process has to import it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any, NoReturn

from obsdag.context import Context, OutputContext, RateLimitContext
from obsdag.errors import ContextError
from obsdag.pools import _worker
from obsdag.pools.carry import Packer, Unpacker, dumps, loads, main_name, pack_error, str_of

__all__ = ["DetachedContext", "attribute", "extra_sources", "run_job"]

extra_sources: list[Callable[[], Iterable[bytes]]] = []
"""In a worker process: asked after each job for what shall travel back with its outcome."""


# --- the context in the worker process


_SLOTS = [slot for slot in Context.__slots__ if slot != "__weakref__"]


class DetachedContext(Context):
    """What a process task's function gets (T11): data, id, name and attempt of a context that lives in another process.

    A Context in everything that concerns data. Changed and deleted keys are applied to the real one when the function
    has succeeded, in-place changes of lists, dicts and the like included. `create` and `create_child` make further
    detached contexts, which become real when they are returned. The tree, the progress, the lock, freeze, thaw and
    destroy raise ContextError.
    """

    __slots__ = ("_attempt", "_made")

    def __init__(
        self,
        id: str,
        name: str,
        attempt: int,
        data: Mapping[str, Any] | Iterable[tuple[str, Any]],
        made: list[DetachedContext] | None = None,
    ) -> None:
        super().__init__(None, data, name)
        for slot in _SLOTS:
            if not hasattr(self, slot):
                setattr(self, slot, None)  # a run would set it; OutputContext(context) reads it
        if id:
            self._id = id
        self._attempt = attempt
        self._made: list[DetachedContext] = [] if made is None else made  # of one job: all in order, but its own

    def __repr__(self) -> str:
        return f"<DetachedContext {self.id!r}>"

    @property
    def attempt(self) -> int:
        """The number of the attempt, from 1."""
        return self._attempt

    def create(self, copy_data: bool = False, deep_copy: bool = False, name: str = "") -> DetachedContext:
        """A new root, with a shallow or deep copy of this context's data if asked for (C3)."""
        return self._make(name, self._copied(copy_data, deep_copy))

    def _child(self, name: str = "", data: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> DetachedContext:
        child = self._make(name, data)
        child._parent = self
        return child

    def _make(self, name: str, data: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> DetachedContext:
        new = DetachedContext("", name, 1, data, self._made)
        self._made.append(new)
        return new

    def _refuse(self, what: str) -> NoReturn:
        raise ContextError(
            f"context {self.id!r} is detached: it is a copy in a worker process, so `{what}` cannot be used; "
            "do that in a task that runs in the engine's own process"
        )

    def freeze(self) -> NoReturn:
        """Raises ContextError."""
        self._refuse("freeze")

    def thaw(self) -> NoReturn:
        """Raises ContextError."""
        self._refuse("thaw")

    def destroy(self) -> NoReturn:
        """Raises ContextError."""
        self._refuse("destroy")

    def keep_trace(self) -> NoReturn:
        """Raises ContextError."""
        self._refuse("keep_trace")


_ELSEWHERE = (
    "available_tasks children completed_tasks depth destroyed error_info frozen ledger lock outcome parent root"
)


def _raise_detached(name: str) -> property:
    return property(lambda self: self._refuse(name), doc="Raises ContextError.")


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
        context = DetachedContext(context_id, name, attempt, data)
        before = {key: (value, _fingerprint(value)) for key, value in data.items()}
        with _trace_context(carrier):
            returned = function(context)
        return _encode_success(where, context, before, returned)
    except BaseException as error:  # sys.exit and all: the pool must get an answer
        return dumps(("error", tuple(pack_error(error)), _extras()))


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
    several = isinstance(returned, list | tuple | set | frozenset)
    items = [] if returned is None else list(returned) if several else [returned]
    made = _wanted(context, items)
    number: dict[Any, int | None] = {new: index for index, new in enumerate(made)}
    heads = [(number.get(new._parent), new._parent is not None, new.name, len(new._data)) for new in made]
    number[context] = None
    references = None if returned is None else [_reference(item, number) for item in items]
    packer = Packer()
    packer.put(("ok", where, deleted, len(changed), heads, references, _extras()))
    packer.put_data(changed, where, "back from")
    for new in made:
        packer.put_data(list(new._data.items()), f"{where}, a made context", "back from")
    return packer.bytes()


def _wanted(own: DetachedContext, items: list[Any]) -> list[Context]:
    """New contexts that are returned, and those that they are descendants of, in order of creation."""
    wanted: dict[Context, None] = {}
    for item in items:
        line: list[Context] = []
        context = _inner(item)
        while context is not None and context is not own and context not in wanted:
            line.append(context)
            context = context._parent
        wanted.update(dict.fromkeys(reversed(line)))
    place = {made: index for index, made in enumerate(own._made)}
    # Contexts made otherwise, by Context(...), come last; their ancestors are before them already.
    return sorted(wanted, key=lambda new: place.get(new, len(place)))  # type: ignore[call-overload]


def _inner(item: Any) -> Context | None:
    """The context that a returned item stands for; None if it is none."""
    context = item.context if isinstance(item, RateLimitContext | OutputContext) else item
    if isinstance(context, DetachedContext):
        return context
    return context if type(context) is Context else None


def _reference(item: Any, number: dict[Any, int | None]) -> tuple[Any, ...]:
    context = _inner(item)
    if context not in number:
        text = str_of(item, repr)
        return ("foreign", text if len(text) <= 300 else f"{text[:300]}...")
    if isinstance(item, RateLimitContext):
        return ("limit", number[context], item.delay)
    return ("output" if isinstance(item, OutputContext) else "context", number[context])


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
    """Makes the caller's span current (T12): spans that the function makes are its children, what it says about it
    travels back.
    """
    if not carrier:
        yield
        return
    tracing = importlib.import_module("obsdag.telemetry.carrier")  # of a floor above: whoever sent a carrier has it
    if tracing.returning not in extra_sources:
        extra_sources.append(tracing.returning)
    with tracing.remote_span(carrier):
        yield


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
