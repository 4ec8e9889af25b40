"""Running the command as people do: in a process of its own, with files in a folder of its own, or on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shlex
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "PIPELINE",
    "ROOT",
    "TIMEOUT_S",
    "command",
    "environ",
    "jsonl",
    "lines",
    "on_terminal",
    "shell",
    "start",
    "wait_for",
]

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 60.0

PIPELINE = '''\
"""A DAG for the tests of the command line."""
import asyncio
from obsdag import DAG, Context

dag = DAG("orders")

@dag.task
async def look(ctx):
    print("a task that prints", flush=True)
    if ctx.get("fail"):
        raise ValueError("nobody orders\\nseven")
    if ctx.get("hang"):
        await asyncio.Event().wait()
    if ctx.get("odd"):
        ctx["odd"] = {"deep": [1, {2}]}
    return ctx

@dag.task(after=look)
def store(ctx):
    ctx["seen"] = True
    return ctx


def double(ctx):
    print("a worker that prints", flush=True)
    ctx["n"] *= 2
    return ctx

def in_process():
    made = DAG("doubling")
    made.task(double, kind="process")
    return made


def stalling():
    made = DAG("stalling")
    @made.task
    async def wait(ctx):
        ctx.freeze()
        return ctx
    @made.task(after=wait)
    async def both(ctx):
        return ctx
    return made


def needs(thing): return dag
def raises(): raise RuntimeError("no database")
def nothing(): return None
async def coroutine(): return dag
def broken():
    made = DAG("broken")
    made.task(double, name="a", after="b")
    made.task(double, name="c", after="d")
    return made
number = 5
'''


def environ(**more: str) -> dict[str, str]:
    """What the command finds in its environment: nothing of this project's but the code."""
    others = ("OBSDAG_", "COLUMNS", "NO_COLOR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | more


def _words(arguments: tuple[str | Path, ...]) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "obsdag", *map(str, arguments)]


def command(
    *arguments: str | Path, folder: Path, given: str | bytes = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """The command's end: status, standard output and standard error as text."""
    done = subprocess.run(
        _words(arguments),
        cwd=folder,
        env=environ(**env),
        input=given.encode() if isinstance(given, str) else given,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The end of the command in a line of the shell: `line` has its arguments and the shell's redirections."""
    words = [shlex.quote(word) for word in _words(())]
    return subprocess.run(
        f"{' '.join(words)} {line}",
        shell=True,
        cwd=folder,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@contextmanager
def start(*arguments: str | Path, folder: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command at work, with pipes to it; it is gone afterwards."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        _words(arguments), cwd=folder, env=environ(**env), stdin=pipe, stdout=pipe, stderr=pipe
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            for each in (process.stdout, process.stderr):
                if each is not None:
                    each.close()


def wait_for(process: subprocess.Popen[bytes], text: bytes, times: int = 1) -> None:
    """Reads standard error until `text` came so many times. Fails if it ends before."""
    assert process.stderr is not None
    seen = b""
    while seen.count(text) < times:
        line = process.stderr.readline()
        assert line, f"it ended before {text!r} came {times} times: {seen!r}"
        seen += line


def on_terminal(
    *arguments: str | Path, folder: Path, columns: int = 80, keys: bytes = b"", when: bytes = b"", **env: str
) -> tuple[int, str]:
    """Status and all that a terminal of that width was sent. keys: typed when the text `when` has appeared."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        _words(arguments),
        cwd=folder,
        env=environ(TERM="xterm", **env),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_take_terminal,  # noqa: PLW1509 - tests have one thread
    )
    os.close(theirs)
    try:
        seen = _talk(ours, keys, when)
        return process.wait(TIMEOUT_S), seen.decode(errors="replace")
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _talk(terminal: int, keys: bytes, when: bytes) -> bytes:
    seen = bytearray()
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        if keys and when in seen:
            os.write(terminal, keys)
            keys = b""
        ready, _, _ = select.select([terminal], [], [], 0.1)
        if not ready:
            continue
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    return bytes(seen)


def lines(text: str) -> list[dict[str, Any]]:
    """The objects of JSON Lines; each line must be whole."""
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def jsonl(file: Path, *objects: dict[str, Any]) -> Path:
    """A file with the objects as lines."""
    file.write_text("".join(f"{json.dumps(each)}\n" for each in objects))
    return file
