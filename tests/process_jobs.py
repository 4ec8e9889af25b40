"""What the tests of process tasks run in worker processes: importable there, and light."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

from obsdag.tasks.base import Task


class TwoArguments(Exception):
    """Can be pickled, and not unpickled (FACTS: breaks concurrent.futures' pool)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")


class Faithful(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code


class OnlyHere:
    """Can be pickled, and unpickled in a worker process only."""

    def __reduce__(self) -> Any:
        return (_only_in, (os.getpid(),))


def _only_in(pid: int) -> str:
    if os.getpid() != pid:
        raise LookupError("not in this process")
    return "here"


def double(context: Any) -> Any:
    context["n"] = context["n"] * 2
    context["pid"] = os.getpid()
    return context


def nothing(context: Any) -> None:
    pass


def change(context: Any) -> Any:
    context["replaced"] = "new"
    context["same"] = "same as it was"
    context["grown"].append(4)
    context["nested"]["inner"]["x"] = 1
    del context["gone"]
    context["added"] = context["shared"]
    return context


def change_and_raise(context: Any) -> Any:
    context["n"] = -1
    raise Faithful(7, "after the change")


def fork_out(context: Any) -> list[Any]:
    first, second = context.create_child(2)
    first["of"] = second["of"] = context["big"]
    inner = first.create_child(name="inner")
    root = context.create(copy_data=True, name="root")
    root["more"] = 1
    context.create_child()  # neither returned nor needed
    return [second, inner, root, context]


def foreign(context: Any) -> Any:
    return [context, 42, "x" * 1000]


def make_by_class(context: Any) -> Any:
    from obsdag.context import Context

    new = Context(None, {"by": "class"}, "plain")
    return [new.create_child(name="child of plain"), context]


def limited(context: Any) -> Any:
    from obsdag.context import RateLimitContext

    return RateLimitContext(context, 1.5)


def output(context: Any) -> Any:
    from obsdag.context import OutputContext

    return OutputContext(context)


def output_or_hang(context: Any) -> Any:
    if context["hang"]:
        threading.Event().wait()
    return output(context)


def detached(context: Any) -> Any:
    refused = []
    for name in ("parent", "children", "root", "lock", "depth", "outcome"):
        try:
            getattr(context, name)
        except ValueError as error:
            refused.append(str(error))
    for name in ("freeze", "thaw", "destroy"):
        try:
            getattr(context, name)()
        except ValueError as error:
            refused.append(str(error))
    context["refused"] = refused
    context["known"] = (context.id, context.name, context.attempt)
    return context


def raise_two_arguments(context: Any) -> Any:
    raise TwoArguments(404, "not found")


def raise_unpicklable(context: Any) -> Any:
    error = ValueError("holds a lock")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    raise error


def exit_with(context: Any) -> Any:
    sys.exit(context["code"])


def keep_lock(context: Any) -> Any:
    context["fine"] = 1
    context["bad"] = threading.Lock()
    return context


def child_with_lock(context: Any) -> Any:
    child = context.create_child()
    child["bad"] = threading.Lock()
    return child


def keep_only_here(context: Any) -> Any:
    context["bad"] = OnlyHere()
    return context


def kill_if_told(context: Any) -> Any:
    if context["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
    context["done"] = True
    return context


def hang(context: Any) -> Any:
    tell_and_wait(context["fifo"])
    return context


def tell_and_wait(fifo: str) -> None:
    """Writes the process's id into a FIFO, then waits for ever."""
    tell(fifo, str(os.getpid()))
    threading.Event().wait()


def tell(fifo: str, text: str) -> None:
    with open(fifo, "w") as file:
        file.write(text)


def hang_with_child(context: Any) -> Any:
    child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
    tell(context["fifo"], f"{os.getpid()} {child.pid}")
    threading.Event().wait()


def exit_with_child(context: Any) -> Any:
    child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
    tell(context["fifo"], str(child.pid))
    with open(context["fifo"]) as file:
        file.read()
    os._exit(3)


def leave_with_channel_held_open(context: Any) -> Any:
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # out of the worker's group, with a copy of its channel
        with open(context["fifo"]) as file:
            file.read()
        os._exit(0)
    while os.getpgid(child) != child:
        os.sched_yield()
    os._exit(3)


def fork_and_return(context: Any) -> Any:
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        context["from"] = "parent"
    return context


def survive_interrupt(context: Any) -> Any:
    os.kill(os.getpid(), signal.SIGINT)
    started = subprocess.run(
        [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"],
        capture_output=True,
        text=True,
        check=True,
    )
    context["child takes it"] = started.stdout.strip()
    return context


def trace_id(context: Any) -> Any:
    from opentelemetry import trace

    context["trace"] = f"{trace.get_current_span().get_span_context().trace_id:032x}"
    return context


def send_extras(value: bytes) -> None:
    """A pool's initializer."""
    from obsdag.tasks.process import extra_sources

    extra_sources.append(lambda: [value])


def refuse_to_start() -> None:
    raise RuntimeError("no licence")


def die_at_start() -> None:
    os._exit(5)


def die_before_taking() -> None:
    """A pool's initializer: the process dies over each job before it says that it has taken it."""
    from obsdag.pools import _worker

    write = _worker._write

    def die(channel: int, kind: bytes, body: bytes = b"") -> None:
        if kind == _worker.TAKEN:
            os._exit(7)
        write(channel, kind, body)

    _worker._write = die


def add(a: int, b: int = 0) -> int:
    return a + b


def fail(code: int) -> None:
    raise Faithful(code, "called")


def lock() -> Any:
    return threading.Lock()


def with_environment(context: Any, env: Any) -> Any:
    return context


def with_optional_environment(context: Any, env: Any = None) -> Any:
    return context


def with_resource(context: Any, *, resource: Any) -> Any:
    return context


async def asynchronous(context: Any) -> Any:
    return context


def generating(context: Any) -> Any:
    yield context


def _decorated(context: Any) -> Any:
    context["decorated"] = True
    return context


class _Holder(Task):
    kind = "holder"


decorated = _Holder(_decorated)  # as if a decorator had left the task under the function's name
_decorated.__qualname__ = _decorated.__name__ = "decorated"
nested_lambda = [lambda context: context]


def make_nested() -> Any:
    def nested(context: Any) -> Any:
        return context

    return nested


def shadowed(context: Any) -> Any:
    return context


original_of_shadowed = shadowed


def shadowed(context: Any) -> Any:  # type: ignore[no-redef]
    return None


def tell_then_double(context: Any) -> Any:
    tell(context["fifo"], "running")
    with open(context["fifo"]) as file:
        file.read()
    return double(context)
