"""What can be known of a task's function before it runs: how it is called, and whether it returns anything.

The outermost object is judged, never what a decorator wraps: a plain wrapper around a coroutine function is a plain
function to its caller. Everything here is done once per task, when it is defined or built: `iscoroutinefunction` alone
costs 0.8 us.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any, Literal

__all__ = ["CallKind", "Signature", "call_kind", "generator_signature", "read_signature", "returns_only_none"]

CallKind = Literal["function", "coroutine", "generator", "asyncgen"]

_Parameter = inspect.Parameter
_POSITIONAL = (_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD)
_ENVIRONMENT_NAMES = ("env", "environment")
_SIGNATURE_OPTIONS: dict[str, Any] = {}
if sys.version_info >= (3, 14):
    from annotationlib import Format

    # annotations are evaluated there when asked for; those under TYPE_CHECKING would raise NameError
    _SIGNATURE_OPTIONS["annotation_format"] = Format.FORWARDREF


@dataclass(frozen=True, slots=True)
class Signature:
    """How the engine calls a task's function: `func(context[, env][, resource=...])`.

    kind: what a call gives: a value, a coroutine, a generator, or an async generator.
    takes_env: the Environment is passed as the next positional argument: there is a further parameter, without a
        default or named `env` or `environment` (one with another name and a default is the user's own).
    takes_resource: the engine fills the parameter `resource`, by keyword, from the task's ResourcePool (T7).
    needs_resource: that parameter has no default.
    problems: why the engine cannot call it, each a sentence; empty if it can, or if nothing is known (a builtin, say).
    """

    kind: CallKind
    takes_env: bool = False
    takes_resource: bool = False
    needs_resource: bool = False
    problems: tuple[str, ...] = ()


def call_kind(func: Callable[..., Any]) -> CallKind:
    """What calling `func` gives; looks through partials, bound and static methods, and `__call__` of objects."""
    target = _called_function(func)
    if inspect.iscoroutinefunction(func) or (target is not None and inspect.iscoroutinefunction(target)):
        return "coroutine"
    if target is None:
        return "function"
    if inspect.isasyncgenfunction(target):
        return "asyncgen"
    return "generator" if inspect.isgeneratorfunction(target) else "function"


def read_signature(func: Callable[..., Any], given: tuple[str, ...] = ("the context",)) -> Signature:
    """The Signature of `func` if the engine passes `given` (named for messages) and, where taken, the Environment."""
    kind = call_kind(func)
    try:
        parameters = _parameters(func)
    except (TypeError, ValueError):
        return Signature(kind)
    resource = next((p for p in parameters if p.name == "resource" and p.kind is not _Parameter.VAR_POSITIONAL), None)
    positional = [p for p in parameters if p.kind in _POSITIONAL and p is not resource]
    variadic = any(p.kind is _Parameter.VAR_POSITIONAL for p in parameters)
    beyond = positional[len(given) :]
    takes_env = bool(beyond) and (beyond[0].default is _Parameter.empty or beyond[0].name in _ENVIRONMENT_NAMES)
    problems = [
        *_positional_problems(positional, variadic, given),
        *_keyword_problems(parameters, positional[: len(given) + takes_env], resource),
    ]
    return Signature(
        kind,
        takes_env=takes_env,
        takes_resource=resource is not None,
        needs_resource=resource is not None and resource.default is _Parameter.empty,
        problems=tuple(problems),
    )


def generator_signature(func: Callable[..., Any]) -> tuple[Signature, bool]:
    """The Signature of a stream's or loop's generator function, and whether it is given its first context.

    Without a parameter (seed), or with the environment only, it is sent that context too, after its first `yield`.
    """
    try:
        names = [p.name for p in _parameters(func) if p.kind in _POSITIONAL and p.name != "resource"]
    except (TypeError, ValueError):
        return read_signature(func), True
    if not names or (len(names) == 1 and names[0] in _ENVIRONMENT_NAMES):
        return read_signature(func, ()), False
    return read_signature(func), True


def returns_only_none(func: Callable[..., Any]) -> bool:
    """Whether every way out of a function (or coroutine function) that returns, returns None (SEMANTICS T4).

    Read from its bytecode. False for what can only raise or never ends, for generators, and wherever it cannot be
    decided.
    """
    if call_kind(func) not in ("function", "coroutine"):
        return False
    target = _called_function(func)
    return target is not None and _code_returns_only_none(target.__code__)


def _called_function(func: Any) -> FunctionType | None:
    """The Python function whose code runs when `func` is called; None for classes and what is not written in Python."""
    for _ in range(100):
        if isinstance(func, FunctionType):
            return func
        if isinstance(func, type):
            return None
        if isinstance(func, partial):
            func = func.func
        elif isinstance(func, MethodType | staticmethod):
            func = func.__func__
        else:
            func = getattr(type(func), "__call__", None)  # noqa: B004 - what it runs is wanted, not whether
            if not isinstance(func, FunctionType | partial | staticmethod):
                return None
    return None


def _parameters(func: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(func, follow_wrapped=False, **_SIGNATURE_OPTIONS).parameters.values())
    if any(p.kind is _Parameter.VAR_POSITIONAL for p in parameters):
        # a decorator's (*args, **kwargs) takes what the function that it wraps takes
        parameters = list(inspect.signature(func, **_SIGNATURE_OPTIONS).parameters.values())
    return parameters


def _positional_problems(
    positional: Sequence[inspect.Parameter], variadic: bool, given: tuple[str, ...]
) -> Iterator[str]:
    required = sum(p.default is _Parameter.empty for p in positional)
    if len(positional) < len(given) and not variadic:
        yield f"its function takes {_count(len(positional))}, but is called with {' and '.join(given)}"
    if required > len(given) + 1:
        yield (
            f"its function needs {_count(required)}, but gets {', '.join(given)} and at most the environment; "
            "bind the others with functools.partial"
        )


def _keyword_problems(
    parameters: Sequence[inspect.Parameter], filled: Sequence[inspect.Parameter], resource: inspect.Parameter | None
) -> Iterator[str]:
    for p in parameters:
        if p.kind is _Parameter.KEYWORD_ONLY and p is not resource and p.default is _Parameter.empty:
            yield f"its function needs the keyword {p.name!r}, which nobody gives; bind it with functools.partial"
    if resource is None:
        return
    if resource.kind is _Parameter.POSITIONAL_ONLY:
        yield "its parameter 'resource' is positional-only, but is filled by keyword"
    elif any(parameters.index(p) > parameters.index(resource) for p in filled):
        yield "its parameter 'resource' must come after the others: it is filled by keyword"


def _count(number: int) -> str:
    return f"{number or 'no'} positional parameter{'' if number == 1 else 's'}"


@lru_cache(maxsize=1024)
def _code_returns_only_none(code: CodeType) -> bool:
    # CPython 3.11 and 3.14 write LOAD_CONST None, RETURN_VALUE; 3.12 and 3.13 RETURN_CONST None. A RETURN_VALUE that is
    # jumped to (`return a or None`) may return something else: not decided, so not refused.
    found = False
    before: dis.Instruction | None = None
    for step in dis.get_instructions(code):
        if step.opname == "RETURN_CONST":
            if step.argval is not None:
                return False
            found = True
        elif step.opname == "RETURN_VALUE":
            constant = before is not None and before.opname.startswith("LOAD_CONST") and before.argval is None
            if step.is_jump_target or not constant:
                return False
            found = True
        before = step
    return found
