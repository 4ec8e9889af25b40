"""What the tests of process tasks run in worker processes: importable there, and light."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

__all__ = [
    "Unfaithful",
    "count_attempts",
    "die_once",
    "do_what_is_forbidden",
    "edit",
    "edit_and_raise",
    "give_back_what_cannot_be_pickled",
    "make_others",
    "raise_unfaithful",
    "return_rubbish",
    "say_attempt",
    "trace_id",
    "wait_for_file",
]


class Unfaithful(Exception):
    """Cannot be made again from its pickle: two arguments in, one kept."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")


def edit(ctx: Any) -> Any:
    """Changes, adds and deletes keys."""
    ctx["pid"] = os.getpid()
    ctx["n"] += 1
    ctx["list"].append(ctx["n"])
    del ctx["gone"]
    return ctx


def edit_and_raise(ctx: Any) -> Any:
    """Changes data and fails."""
    ctx["n"] = -1
    del ctx["gone"]
    raise ValueError("after the change")


def raise_unfaithful(ctx: Any) -> Any:
    """Raises what breaks other pools."""
    raise Unfaithful(7, "cannot be carried")


def return_rubbish(ctx: Any) -> Any:
    """Returns what no task returns."""
    return 5


def make_others(ctx: Any) -> Any:
    """Returns itself, a child or two, another root, or nothing."""
    way = ctx["way"]
    if way == "children":
        children = ctx.create_child(2)
        for n, child in enumerate(children):
            child["n"] = n
        return children
    if way == "other":
        other = ctx.create(copy_data=True, name="other")
        other["made"] = True
        return other
    return {"itself": ctx, "nothing": None, "both": [ctx, ctx.create(name="both")]}[way]


def do_what_is_forbidden(ctx: Any) -> Any:
    """Uses what a detached context does not have; notes which of it raised."""
    raised = []
    for name in ("parent", "children", "root", "lock"):
        try:
            getattr(ctx, name)
        except Exception:
            raised.append(name)
    for name in ("freeze", "thaw", "destroy"):
        try:
            getattr(ctx, name)()
        except Exception:
            raised.append(name)
    ctx["raised"] = raised
    return ctx


def give_back_what_cannot_be_pickled(ctx: Any) -> Any:
    """Puts a function of no name into the data."""
    ctx["func"] = lambda: None
    return ctx


def die_once(ctx: Any) -> Any:
    """Kills its own process, unless it is told that this is over."""
    if ctx["n"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return ctx


def say_attempt(ctx: Any) -> Any:
    """Notes id and attempt; fails at first."""
    if ctx.attempt < 3:
        raise ValueError(ctx.attempt)
    ctx["said"] = (ctx.id, ctx.attempt)
    return ctx


def count_attempts(ctx: Any) -> Any:
    """Waits for a file if its data says so; appends a line per start."""
    with Path(ctx["log"]).open("a") as file:
        file.write(f"{ctx['n']}\n")
    if ctx["n"] == 0:
        while len(Path(ctx["log"]).read_text().split()) < 2:
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    return ctx


def wait_for_file(ctx: Any) -> Any:
    """Spins until the file is there."""
    while not Path(ctx["file"]).exists():
        pass
    return ctx


def trace_id(ctx: Any) -> Any:
    """Notes the trace that is current in the worker process."""
    from opentelemetry import trace

    ctx["trace"] = trace.get_current_span().get_span_context().trace_id
    return ctx
