"""What the tests of this folder run in worker processes: importable there, and light."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


def die_once(context: Any) -> Any:
    """Kills its own process on the first attempt of a context that says so."""
    if context["die"] and context.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    context["done"] = context.attempt
    return context


def hang_if_told(context: Any) -> Any:
    if context["hang"] and context.attempt == 1:
        threading.Event().wait()
    context["attempt"] = context.attempt
    return context


def raise_if_told(context: Any) -> Any:
    if context["bad"]:
        raise ValueError("told so")
    return context


class Outside(BaseException):
    """What no `except Exception` catches."""


def raise_outside_if_told(context: Any) -> Any:
    if context["bad"]:
        raise Outside
    return context
