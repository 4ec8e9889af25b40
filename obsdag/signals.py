"""SIGTERM and SIGINT as calls on an event loop, for whoever asked for that (SEMANTICS S3)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable

from obsdag.errors import ServeError

__all__ = ["Signals"]

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_REFUSALS = (ValueError, RuntimeError, NotImplementedError)


class Signals:
    """The handlers of one program; `wanted` is False by default, and then nothing is touched."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    def take(self, callback: Callable[[], None]) -> None:
        """Calls back for each signal, on the running loop. Raises ServeError where that is not possible."""
        if self.wanted:
            loop = asyncio.get_running_loop()
            try:
                for number in _NUMBERS:
                    loop.add_signal_handler(number, callback)
            except _REFUSALS as error:
                self.release(loop)
                raise ServeError(f"handle_signals needs the main thread and a Unix event loop: {error}") from error

    def release(self, loop: asyncio.AbstractEventLoop) -> None:
        """Gives the signals back."""
        if self.wanted:
            with contextlib.suppress(*_REFUSALS):
                for number in _NUMBERS:
                    loop.remove_signal_handler(number)
