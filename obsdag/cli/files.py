"""The files that a command writes: whole or not at all.

A regular file is written under another name beside its target, which takes the target's place at the end (`commit`). A
run that ends early leaves what it had as TARGET.partial, of complete lines (`keep_partial`); bad input leaves nothing
(`discard`). Standard output, pipes and devices are written as lines come.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import stat
from pathlib import Path

from obsdag.cli.common import CliError
from obsdag.cli.jsonl import in_daemon_thread

__all__ = ["LineSink", "check_apart", "open_input"]

_FLUSH_BYTES = 1 << 16


def open_input(path: str, option: str) -> int:
    """A descriptor to read `path` from. Raises CliError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise CliError(f"{option} {path!r} cannot be read: {_reason(error)}") from error
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CliError(f"{option} {path!r} is a folder: name a file")
    return descriptor


def check_apart(files: list[tuple[str, str | int | None]]) -> None:
    """Raises CliError if two of `files`, each an option and its path or descriptor, are the same file."""
    known: dict[object, str] = {}
    for option, file in files:
        identity = None if file is None else _identity(file)
        if identity is None:
            continue
        if identity in known:
            raise CliError(f"{known[identity]} and {option} are the same file: name another one for one of them")
        known[identity] = option


def _identity(file: str | int) -> object:
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return os.path.realpath(file) if isinstance(file, str) else None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


class LineSink:
    """Lines to a file. `put` never blocks; `flush` writes what was put, in a thread. Raises CliError if it cannot."""

    def __init__(self, path: str | None, option: str, descriptor: int | None = None) -> None:
        """path: the target, checked and opened now. descriptor: where to write instead of opening a path."""
        self.name = path if path is not None else "standard output"
        self.lines = 0
        self._option = option
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._writing: asyncio.Future[None] | None = None
        self._temporary: Path | None = None
        self._target: Path | None = None
        self._mine = path is not None
        self._descriptor = self._open(path) if path is not None else descriptor if descriptor is not None else 1

    def _open(self, path: str) -> int:
        try:
            target = Path(os.path.realpath(path))
            if target.is_dir():
                raise CliError(f"{self._option} {path!r} is a folder: name a file in it")
            if target.exists() and not target.is_file():
                return os.open(target, os.O_WRONLY | os.O_CLOEXEC)  # a pipe or a device: nothing to be replaced
            if not target.parent.is_dir():
                raise CliError(f"{self._option} {path!r}: there is no folder {str(target.parent)!r}: make it first")
            self._temporary = target.with_name(f".obsdag-{secrets.token_hex(6)}.tmp")
            self._target = target
            descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            if target.exists():
                os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
        except (OSError, ValueError) as error:
            raise CliError(f"{self._option} {path!r} cannot be written: {_reason(error)}") from error
        return descriptor

    def put(self, line: bytes) -> None:
        """Takes a line, with its newline."""
        self._pending.append(line)
        self._pending_bytes += len(line)
        self.lines += 1

    @property
    def is_full(self) -> bool:
        """Whether it is time to flush before more is put."""
        return self._pending_bytes >= _FLUSH_BYTES

    async def flush(self) -> None:
        """Writes what was put so far. Raises CliError; BrokenPipeError if nobody reads any more."""
        while self._writing is not None:
            await asyncio.shield(self._writing)
        if not self._pending:
            return
        data = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        writing = asyncio.ensure_future(self._write(data))
        self._writing = writing
        writing.add_done_callback(self._written)
        await asyncio.shield(writing)

    def _written(self, writing: asyncio.Future[None]) -> None:
        self._writing = None
        if not writing.cancelled():
            writing.exception()  # told by `flush`, or by the next one

    async def _write(self, data: bytes) -> None:
        try:
            await in_daemon_thread(_write_all, self._descriptor, data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CliError(f"{self.name} cannot be written: {_reason(error)}") from error

    async def settle(self, timeout_s: float) -> None:
        """Waits for a write that is under way, whatever comes of it; for a reader that does not read, not for ever."""
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=timeout_s)

    def _close(self) -> None:
        if self._mine:
            self._mine = False
            os.close(self._descriptor)

    def commit(self) -> None:
        """After the last flush: the file takes its target's place. Raises CliError."""
        self._rename(self._target)

    def keep_partial(self) -> str:
        """After the last flush: keeps what there is beside the target; says where, empty if there is no target."""
        if self._temporary is None or self._target is None:
            return ""
        partial = self._target.with_name(f"{self._target.name}.partial")
        self._rename(partial)
        return f"{self.name}.partial"

    def _rename(self, target: Path | None) -> None:
        self._close()
        if self._temporary is not None and target is not None:
            try:
                os.replace(self._temporary, target)
            except OSError as error:
                raise CliError(f"{self.name} cannot be written: {_reason(error)}") from error
            self._temporary = None

    def discard(self) -> None:
        """Removes what was written beside the target, if anything is left there."""
        self._close()
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = None


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
