"""JSON Lines: contexts out of lines, and lines out of contexts, with the place of every mistake."""

from __future__ import annotations

import asyncio
import json
import math
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from obsdag.cli.common import CliError, one_line, shown
from obsdag.context import Context

__all__ = ["LineSource", "in_daemon_thread", "lenient_line", "line_of", "why_not_json"]

_READ_BYTES = 1 << 16
_T = TypeVar("_T")


async def in_daemon_thread(function: Callable[..., _T], *arguments: Any) -> _T:
    """Calls what may block for ever, in a thread that the interpreter's exit does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def tell(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        outcome: tuple[_T | None, BaseException | None]
        try:
            outcome = function(*arguments), None
        except BaseException as error:
            outcome = None, error
        try:
            loop.call_soon_threadsafe(tell, *outcome)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    threading.Thread(target=work, name="obsdag-cli-io", daemon=True).start()
    return await future


class LineSource:
    """The input of a run: one context for each line, which is a JSON object. Blank lines are left out.

    A context is named after its line, "orders.jsonl:17", so that a failure says where its input stands. The file is
    read once and as it is needed, so it may be a pipe, and larger than memory; lines_read and bytes_read tell how far.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self.lines_read = 0
        self.bytes_read = 0
        self._rest: list[bytes] = []  # of a line whose end has not been read
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        self._is_file = stat.S_ISREG(status.st_mode)
        self.size_bytes: int | None = status.st_size if self._is_file else None

    @property
    def fraction(self) -> float | None:
        """How much of the input is read, 0 to 1; None if its size is not known."""
        if self.size_bytes is None:
            return None
        return min(1.0, self.bytes_read / self.size_bytes) if self.size_bytes else 1.0

    def contexts(self) -> Iterator[Context] | AsyncIterator[Context]:
        """The contexts, as they are asked for. Raises CliError with the place of the first line that is no object."""
        return self._from_file() if self._is_file else self._from_pipe()

    def _from_file(self) -> Iterator[Context]:
        while chunk := self._read():
            yield from self._contexts(chunk)
        yield from self._last()

    async def _from_pipe(self) -> AsyncIterator[Context]:
        while chunk := await in_daemon_thread(self._read):  # which may come late, and must not keep the loop
            for context in self._contexts(chunk):
                yield context
        for context in self._last():
            yield context

    def _read(self) -> bytes:
        try:
            return os.read(self._descriptor, _READ_BYTES)
        except OSError as error:
            raise CliError(f"{self.name} cannot be read: {error.strerror or error}") from error

    def _contexts(self, chunk: bytes) -> Iterator[Context]:
        first, *others = chunk.split(b"\n")
        self._rest.append(first)
        if not others:
            return
        lines = [b"".join(self._rest), *others]
        self._rest = [lines.pop()]
        for line in lines:
            context = self._context(line)
            if context is not None:
                yield context
            self.bytes_read += len(line) + 1

    def _last(self) -> Iterator[Context]:
        context = self._context(b"".join(self._rest))
        if context is not None:
            yield context
        self.bytes_read = self.size_bytes or self.bytes_read

    def _context(self, line: bytes) -> Context | None:
        self.lines_read += 1
        if self.lines_read == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            return None
        place = f"{self.name}:{self.lines_read}"
        try:
            data = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise CliError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
        except UnicodeDecodeError as error:
            raise CliError(f"{place}: not UTF-8: {error.reason} at byte {error.start + 1}") from None
        except RecursionError:
            raise CliError(f"{place}: nested too deep to be read") from None
        except ValueError as error:
            raise CliError(f"{place}: {one_line(error)}") from None
        if not isinstance(data, dict):
            raise CliError(f'{place}: {_kind(data)}, but each line must be an object such as {{"key": 1}}')
        return Context(None, data, place)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is no JSON number; write null or a text")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "an array"}
    return names[type(value)]


# --- writing


def line_of(data: Mapping[str, Any]) -> bytes:
    """The data as one line. Raises TypeError, ValueError or RecursionError for what JSON cannot write."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # lone surrogates, as in names of files that are not UTF-8
        return json.dumps(data, allow_nan=False).encode() + b"\n"


def lenient_line(data: Mapping[str, Any]) -> bytes:
    """The same for reports of failures: what JSON cannot write is replaced by how Python shows it."""
    try:
        return line_of(data)
    except (TypeError, ValueError, RecursionError):
        return line_of({str(key): _lenient(value) for key, value in data.items()})


def _lenient(value: Any) -> Any:
    try:
        line_of({"": value})
    except (TypeError, ValueError, RecursionError):
        if isinstance(value, dict) and len(value) < 1000:
            return {str(key): _flat(each) for key, each in value.items()}
        return _flat(value)
    return value


def _flat(value: Any) -> Any:
    try:
        line_of({"": value})
    except (TypeError, ValueError, RecursionError):
        try:
            return repr(value)[:1000]
        except Exception:  # of the user's own __repr__
            return f"<{type(value).__name__}>"
    return value


def why_not_json(data: Mapping[str, Any]) -> str:
    """Where the first value is that JSON cannot write, and what it is."""
    pending: list[tuple[str, Any, tuple[int, ...]]] = [("", dict(data), ())]
    while pending:
        place, value, above = pending.pop()
        if isinstance(value, dict | list | tuple):
            if id(value) in above:
                return f"the value at {shown(place)} contains itself"
            if len(above) > 500:
                return f"the value at {shown(place[:80])}... is nested too deep"
            inner = (*above, id(value))
            if isinstance(value, dict):
                for key in value:
                    if not isinstance(key, str | int | float | bool | None):
                        return f"the key {key!r:.80} at {shown(place) or 'the top'} is of type {type(key).__name__}"
                items = [(f"{place}.{key}" if place else str(key), each, inner) for key, each in value.items()]
            else:
                items = [(f"{place}[{number}]", each, inner) for number, each in enumerate(value)]
            pending.extend(reversed(items))
        elif isinstance(value, float) and not math.isfinite(value):
            return f"the value at {shown(place)} is {value!r}, which JSON has no number for"
        elif not isinstance(value, str | int | float | bool | None):
            return f"the value at {shown(place)} is of type {type(value).__name__}"
    return "JSON cannot write it"
