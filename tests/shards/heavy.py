"""Functions of tasks that run on a cluster."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

__all__ = ["Two", "double", "grow", "kill_itself", "odd_back", "raise_two", "second_time", "split", "stay"]


class Two(Exception):
    """Its arguments are not those of its text: it cannot be unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def double(context: Any) -> Any:
    context["x"] *= 2
    context["seen"].append("there")
    context["pid"] = os.getpid()
    del context["gone"]
    return context


def split(context: Any) -> Any:
    children = context.create_child(2)
    for number, child in enumerate(children):
        child["part"] = number
    return children


def grow(context: Any) -> Any:
    context["y"] = 1
    raise ValueError(f"bad {context['x']}")


def raise_two(context: Any) -> Any:
    raise Two("one", "two")


def second_time(context: Any) -> Any:
    if context.attempt == 1:
        raise OSError("the first attempt always fails")
    context["attempt"] = context.attempt
    return context


def kill_itself(context: Any) -> Any:
    if context["x"] == 1 and context.attempt <= context.get("deaths", 9):
        os.kill(os.getpid(), signal.SIGKILL)
    return context


def odd_back(context: Any) -> Any:
    context["lock"] = time.sleep if context["x"] else (lambda: None)
    return context


def stay(context: Any) -> Any:
    Path(context["file"]).write_text(str(os.getpid()))
    time.sleep(3600)
    return context
