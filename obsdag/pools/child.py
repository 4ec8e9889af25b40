"""The parent's handle of one worker process: its start, its channel, its death.

A worker is started as a fresh interpreter (spawn): forking a process with threads copies locks that nobody will
release, and a fork server outlives its pool. It is started without `multiprocessing`, whose resource tracker outlives
the pool as well.

States:  alive -> (kill, hang_up, or by itself) -> dead. `died` is called exactly once, when the process is reaped, its
descriptors are closed and whatever it wrote before was told to `got`. All on the loop's thread.

A worker is the leader of a process group: the terminal's Ctrl-C does not reach it, and what its jobs have started
dies with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys

from obsdag.pools import _worker

__all__ = ["WorkerProcess"]

_READ_BYTES = 1 << 18


class WorkerProcess:
    """One worker process. Raises OSError if it cannot be started. A subclass says what happens with `got` and
    `died`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._in = bytearray()
        self._out: list[memoryview] = []
        self._writing = False
        self._hanging_up = False
        self._reaped = False
        with contextlib.ExitStack() as undo:
            self._channel, theirs = socket.socketpair()
            undo.callback(self._channel.close)
            with theirs:
                lifeline, self._lifeline = os.pipe()
                undo.callback(os.close, self._lifeline)
                try:
                    self._process = _launch(theirs.fileno(), lifeline)
                finally:
                    os.close(lifeline)
            undo.pop_all()
        self.pid = self._process.pid
        self._channel.setblocking(False)
        self._pidfd = _open_pidfd(self.pid)
        loop.add_reader(self._channel, self._readable)
        if self._pidfd is not None:
            loop.add_reader(self._pidfd, self._end)

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.pid}{' dead' if self._reaped else ''}>"

    def got(self, kind: bytes, body: bytes) -> None:
        """A frame came (see _worker.py)."""
        raise NotImplementedError

    def died(self) -> None:
        """It is gone; `ending` says how."""
        raise NotImplementedError

    @property
    def ending(self) -> str:
        """How the process ended, for people: "was killed by SIGKILL", "ended with exit code 3"."""
        code = self._process.returncode
        if code is None:
            return "is alive"
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"

    @property
    def has_unsent(self) -> bool:
        """Whether something of what was sent is not in the channel yet."""
        return bool(self._out)

    def send(self, kind: bytes, body: bytes) -> None:
        """Sends a frame, now or as the channel takes it. To a process that is dying it goes nowhere; its death
        follows.
        """
        self._out += [memoryview(_worker.FRAME.pack(kind, len(body))), memoryview(body)]
        self._write()

    def hang_up(self) -> None:
        """No more frames come: the process leaves by itself when it is done with its job."""
        self._hanging_up = True
        self._write()

    def kill(self) -> None:
        """Kills the process and what it started; `died` follows. Again is a no-op."""
        if not self._reaped:  # until then its number cannot be anybody else's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # a job may have moved it out of its group

    def reap(self) -> None:
        """Kills the process, waits until it is dead and lets go of it, without telling; for a loop that is at its
        end.
        """
        self.kill()
        self._let_go()

    # --- reading and writing

    def _readable(self) -> None:
        if self._receive() == 0:
            self._loop.remove_reader(self._channel)
            if self._pidfd is None:
                self._end()
            else:
                self.kill()  # alive or not, it cannot answer any more; its death is told by the pidfd

    def _receive(self) -> int | None:
        """Reads what is there, at most one portion: its number of bytes, 0 at the end of file, None if there is
        nothing.
        """
        try:
            part = self._channel.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return 0
        self._in += part
        head = _worker.FRAME.size
        while len(self._in) >= head and not self._reaped:
            kind, length = _worker.FRAME.unpack_from(self._in)
            if len(self._in) < head + length:
                break
            with memoryview(self._in) as view:
                body = bytes(view[head : head + length])
            del self._in[: head + length]
            self.got(kind, body)
        return len(part)

    def _write(self) -> None:
        try:
            while self._out:
                sent = self._channel.send(self._out[0])
                if sent == len(self._out[0]):
                    del self._out[0]
                else:
                    self._out[0] = self._out[0][sent:]
        except (BlockingIOError, InterruptedError):
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._channel, self._write)
            return
        except OSError:
            self._out.clear()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._channel)
        if self._hanging_up:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_WR)

    # --- the end

    def _end(self) -> None:
        self.kill()  # what it started
        while self._receive():  # what it wrote before it died, to the end of file or, if others hold it open, of data
            pass
        self._let_go()
        self.died()

    def _let_go(self) -> None:
        if self._reaped:
            return
        self._process.wait()
        self._reaped = True
        self._loop.remove_reader(self._channel)
        self._loop.remove_writer(self._channel)
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        self._channel.close()
        os.close(self._lifeline)
        self._out.clear()
        self._in.clear()


def _launch(channel: int, lifeline: int) -> subprocess.Popen[bytes]:
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    # -P: the script's own directory must not shadow top-level modules; sys.path is set from the parent's afterwards.
    script = os.path.abspath(_worker.__file__)
    return subprocess.Popen(
        [sys.executable, *flags, "-P", script, str(channel), str(lifeline)],
        stdin=subprocess.DEVNULL,
        pass_fds=(channel, lifeline),
        process_group=0,
    )


def _open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process dies; None where there is none: then its channel's end
    tells.
    """
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
