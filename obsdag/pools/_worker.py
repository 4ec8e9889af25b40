"""What runs in a worker process. A script: it imports nothing of obsdag by itself, so that a worker starts quickly.

Called as `python -P _worker.py CHANNEL LIFELINE` with two inherited file descriptors: the channel, a socket on which
frames go both ways, and the lifeline, a pipe that ends when the parent process dies.

A frame is a kind (one byte), the length of its body (8 bytes, big-endian), and the body:

    parent -> worker    SETUP once, then JOB or CALL, one at a time; end of file: finish and leave
    worker -> parent    READY or FAILED (why) once, then TAKEN and DONE (outcome) for each job

The script becomes `sys.modules["obsdag.pools._worker"]`, so that obsdag's modules in this process find its state here.
The main module of the parent is executed only when a job needs something of it, under the name `__mp_main__` as
multiprocessing does, so that the guard `if __name__ == "__main__":` holds.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

__all__ = ["MAIN_NAMES", "MainModule", "Setup", "find_main", "forbid_pools", "in_worker", "load_main", "main"]

FRAME = struct.Struct(">cQ")
SETUP, JOB, CALL = b"S", b"J", b"C"
READY, FAILED, TAKEN, DONE = b"R", b"F", b"T", b"D"

MAIN_NAMES = ("__main__", "__mp_main__")
UNGUARDED = (
    "the main module starts work when it is imported, and a worker process has to import it to find what is defined "
    'there: put what starts the work under `if __name__ == "__main__":`, or the functions into a module of their own'
)


class MainModule(NamedTuple):
    """Where the parent's main module can be found again: its name if it was run with `-m`, else its file."""

    name: str
    path: str


class Setup(NamedTuple):
    """What a worker gets told first. entries: kind of job -> "module:function", a function of bytes to bytes.

    initializer: None, or a pickled function with its arguments, called once when everything else is there.
    """

    sys_path: list[str]
    argv: list[str]
    main: MainModule | None
    entries: dict[bytes, str]
    initializer: bytes | None


in_worker = False  # whether this process is a worker

_main_module: MainModule | None = None
_main_loaded = False
_main_error: BaseException | None = None
_main_is_loading = False
_pool_was_asked_for = False


def find_main() -> MainModule | None:
    """The main module of this process, or None if no other process could find it (a session, a notebook, `-c`)."""
    module = sys.modules.get("__main__")
    spec_name = getattr(getattr(module, "__spec__", None), "name", "")
    path = getattr(module, "__file__", None)
    if spec_name and spec_name != "__main__":  # "__main__": a directory or an archive was run
        return MainModule(spec_name, path or "")
    if path and os.path.isfile(path):
        return MainModule("", os.path.abspath(path))
    return None


def forbid_pools() -> str | None:
    """Why no process pool can be made here, now: None except while a worker executes the main module."""
    global _pool_was_asked_for  # noqa: PLW0603 - a worker is one per process
    if not _main_is_loading:
        return None
    _pool_was_asked_for = True
    return UNGUARDED


def load_main() -> None:
    """Executes the parent's main module as `__mp_main__`, once. Raises RuntimeError if it cannot, each time."""
    global _main_loaded, _main_is_loading, _main_error  # noqa: PLW0603
    if _main_loaded:
        return
    if _main_error is None:
        _main_is_loading = True
        try:
            _execute_main()
            if _pool_was_asked_for:  # the script may have swallowed the error that it got
                raise RuntimeError(UNGUARDED)
            _main_loaded = True
            return
        except BaseException as error:
            _main_error = error
        finally:
            _main_is_loading = False
    if _pool_was_asked_for:
        raise RuntimeError(UNGUARDED)
    raise RuntimeError(
        f"the main module cannot be imported in a worker process: {type(_main_error).__name__}: {_main_error}"
    ) from _main_error


def _execute_main() -> None:
    if _main_module is None:
        raise ImportError("it has no file (a session or a notebook): put the function into a module")
    before = {name: sys.modules.get(name) for name in MAIN_NAMES}
    module = ModuleType("__mp_main__")
    code = _code_of(_main_module, module)
    for name in MAIN_NAMES:  # before it is executed: its dataclasses look their module up
        sys.modules[name] = module
    try:
        exec(code, module.__dict__)
    except BaseException:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
        raise


def _code_of(main: MainModule, module: ModuleType) -> Any:
    if main.name:
        from importlib.util import find_spec

        spec = find_spec(main.name)
        if spec is None or spec.loader is None:
            raise ImportError(f"no module {main.name!r}")
        module.__spec__, module.__package__, module.__file__ = spec, spec.parent, spec.origin
        return spec.loader.get_code(main.name)  # type: ignore[attr-defined]
    import io

    module.__file__ = main.path
    with io.open_code(main.path) as file:
        return compile(file.read(), main.path, "exec")


# --- the process


def main() -> None:
    """The life of a worker process."""
    global in_worker  # noqa: PLW0603
    in_worker = True
    sys.modules["obsdag.pools._worker"] = sys.modules["__main__"]
    channel, lifeline = int(sys.argv[1]), int(sys.argv[2])
    for descriptor in (channel, lifeline):
        os.set_inheritable(descriptor, False)
    # Ctrl-C is the parent's, which stops its workers. A handler, because SIG_IGN would be inherited by what jobs start.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    threading.Thread(target=_die_with_parent, args=(lifeline,), name="obsdag-lifeline", daemon=True).start()
    try:
        entries = _set_up(channel)
    except BaseException as error:
        import traceback

        _write(channel, FAILED, f"{type(error).__name__}: {error}\n{traceback.format_exc()}".encode(errors="replace"))
        sys.exit(1)
    if entries is not None:
        _serve(channel, entries)


def _set_up(channel: int) -> dict[bytes, str] | None:
    global _main_module  # noqa: PLW0603
    frame = _read(channel)
    if frame is None:
        return None
    setup = Setup(*pickle.loads(frame[1]))
    sys.path[:] = setup.sys_path
    sys.argv[:] = setup.argv
    _main_module = setup.main and MainModule(*setup.main)
    _function(setup.entries[JOB])  # its imports are paid for before the first job is taken
    if setup.initializer is not None:
        from obsdag.pools.carry import loads

        function, arguments = loads(setup.initializer)
        function(*arguments)
    return setup.entries


def _serve(channel: int, entries: dict[bytes, str]) -> None:
    _write(channel, READY)
    own_pid = os.getpid()
    while (frame := _read(channel)) is not None:
        _write(channel, TAKEN)
        kind, body = frame
        del frame
        outcome = _function(entries[kind])(body)
        del body  # an idle worker must not keep a job's objects alive
        if os.getpid() != own_pid:
            os._exit(0)  # a job forked, and its child came back here: the channel is not its own
        _write(channel, DONE, outcome)
        del outcome


def _function(entry: str) -> Callable[[bytearray], bytes]:
    from importlib import import_module

    module, _, name = entry.partition(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def _read(channel: int) -> tuple[bytes, bytearray] | None:
    head = _read_exactly(channel, FRAME.size)
    if head is None:
        return None
    kind, length = FRAME.unpack(head)
    body = _read_exactly(channel, length)
    return None if body is None else (kind, body)


def _read_exactly(channel: int, length: int) -> bytearray | None:
    data = bytearray()
    while len(data) < length:
        try:
            part = os.read(channel, min(length - len(data), 1 << 20))
        except ConnectionResetError:
            return None
        if not part:
            return None
        data += part
    return data


def _write(channel: int, kind: bytes, body: bytes = b"") -> None:
    data = memoryview(FRAME.pack(kind, len(body)) + body if len(body) < 1 << 16 else FRAME.pack(kind, len(body)))
    rest = memoryview(body) if len(body) >= 1 << 16 else None
    for view in (data, rest):
        while view:
            try:
                view = view[os.write(channel, view) :]
            except BrokenPipeError:  # the parent hung up: nobody is interested, and end of file comes next
                return


def _die_with_parent(lifeline: int) -> NoReturn:
    while os.read(lifeline, 1):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)  # with whatever a job has started
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit  # not reached


if __name__ == "__main__":
    main()
