"""Objects, contexts' data and exceptions as bytes: what goes to a worker process and comes back (SEMANTICS T11).

Kept light: a worker process imports this and none of the asyncio parts.

Data is written key by key by one Pickler, whose memo lives on between its dumps: what two keys share is still shared on
the other side, and the key that cannot be carried is known by name.
"""

from __future__ import annotations

import io
import os
import pickle
import traceback
from collections.abc import Iterable
from typing import Any, NamedTuple

from obsdag.errors import EncodingError, PoolError, RemoteError
from obsdag.pools import _worker

__all__ = ["Packer", "RemoteFailure", "Unpacker", "dumps", "loads", "pack_error", "unpack_error"]

_PROTOCOL = 5


class _Loader(pickle.Unpickler):
    """Finds what belongs to the main module, which has another name in a worker and is imported there when needed."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _worker.MAIN_NAMES:
            module = main_name()
        return super().find_class(module, name)


def main_name() -> str:
    """The name of the main module here; in a worker process it is imported by this. Raises PoolError if it cannot."""
    if not _worker.in_worker:
        return "__main__"
    try:
        _worker.load_main()
    except RuntimeError as error:
        raise PoolError(str(error)) from error.__cause__
    return "__mp_main__"


def dumps(value: Any) -> bytes:
    """`value` as bytes for `loads`; raises whatever pickling it raises."""
    return pickle.dumps(value, _PROTOCOL)


def loads(data: bytes) -> Any:
    """What `dumps` was given."""
    return _Loader(io.BytesIO(data)).load()


class Packer:
    """Writes values one after the other."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        self._pickler = pickle.Pickler(self._file, _PROTOCOL)

    def put(self, value: Any) -> None:
        """Writes one value; raises whatever pickling it raises."""
        self._pickler.dump(value)

    def put_data(self, data: Iterable[tuple[Any, Any]], where: str, way: str) -> None:
        """Writes the items of a context. Raises EncodingError that names `where`, key and type, and the `way`."""
        for key, value in data:
            try:
                self._pickler.dump(key)
                self._pickler.dump(value)
            except Exception as error:
                raise EncodingError(
                    f"{where}: data[{key!r}] of type {type_name(type(value))} cannot be carried {way} a worker process "
                    f"({_text(error)}); keep it out of the context, or use a sync task"
                ) from error

    def bytes(self) -> bytes:
        """All that was written."""
        return self._file.getvalue()


class Unpacker:
    """Reads what a Packer wrote, in the same order."""

    def __init__(self, data: bytes) -> None:
        self._loader = _Loader(io.BytesIO(data))

    def take(self) -> Any:
        """The next value; raises whatever unpickling it raises."""
        return self._loader.load()

    def take_data(self, count: int, where: str, way: str) -> dict[Any, Any]:
        """The next `count` items as a dict. Raises EncodingError that names `where`, the key and the `way`."""
        data: dict[Any, Any] = {}
        for _ in range(count):
            key: Any = "?"
            try:
                key = self._loader.load()
                data[key] = self._loader.load()
            except PoolError:
                raise  # the main module's: not this value's fault
            except Exception as error:
                raise EncodingError(
                    f"{where}: data[{key!r}] was pickled, but cannot be unpickled on its way {way} a worker process "
                    f"({_text(error)})"
                ) from error
        return data


class RemoteFailure(NamedTuple):
    """An exception of a worker process. pickled: itself, if it survives that; else only what people need to know."""

    pickled: bytes | None
    type_name: str
    text: str
    trace: str


def pack_error(error: BaseException) -> RemoteFailure:
    """`error` in a form that always arrives (FACTS: some classes can be pickled and not unpickled). Never raises."""
    pickled: bytes | None
    try:
        pickled = dumps(error)
        if type(loads(pickled)) is not type(error):
            pickled = None
    except BaseException:  # __reduce__ and __init__ of anybody's class run here
        pickled = None
    return RemoteFailure(pickled, type_name(type(error)), str_of(error), _trace_of(error))


def unpack_error(failure: RemoteFailure) -> BaseException:
    """The exception itself, else a RemoteError with its type and text; the remote traceback is a note of it."""
    error: BaseException
    try:
        if failure.pickled is None:
            raise ValueError
        error = loads(failure.pickled)
        if not isinstance(error, BaseException):
            raise ValueError
    except Exception:
        error = RemoteError(f"{failure.type_name}: {failure.text}")
    error.add_note(failure.trace)
    return error


def str_of(value: Any, form: Any = str) -> str:
    """`str(value)`, or what can be said if that raises."""
    try:
        return str(form(value))
    except BaseException as error:
        return f"<{type_name(type(value))}, whose {form.__name__}() raised {type(error).__name__}>"


def type_name(kind: type) -> str:
    """The class's full name, without the module for builtins."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str_of(error)}"


def _trace_of(error: BaseException) -> str:
    try:
        shown = "".join(traceback.format_exception(error)).rstrip()
    except BaseException:
        shown = _text(error)
    return f"In worker process {os.getpid()}:\n{shown}"
