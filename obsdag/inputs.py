"""What a run takes as input (SEMANTICS E2): contexts, mappings, and iterables of these, plain or async."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

from obsdag.context import Context, LoopContext, OutputContext, RateLimitContext, StopContext
from obsdag.errors import ContextError, InputError

__all__ = ["Inputs", "as_context", "open_inputs"]

Inputs = (
    Context
    | Mapping[str, Any]
    | Iterable[Context | Mapping[str, Any]]
    | AsyncIterable[Context | Mapping[str, Any]]
    | None
)
_ROLES = (LoopContext, OutputContext, RateLimitContext, StopContext)


def as_context(item: Any) -> Context:
    """The item as a new context. Raises InputError for what is none, ContextError for one that was input before."""
    if type(item) is dict:
        return Context(None, item)
    if isinstance(item, Context):
        if isinstance(item, _ROLES):
            raise InputError(f"a {type(item).__name__} is no input; use its create(copy_data=True)")
        if item._run is not None or item._outcome is not None:
            where = "has ended" if item._outcome else "is in a run"
            raise ContextError(f"context {item.id!r} {where} and cannot be input again; use its create(copy_data=True)")
        return item
    if isinstance(item, Mapping):
        return Context(None, item)
    raise InputError(f"an input must be a Context or a mapping, not {type(item).__name__} {item!r:.80}")


def open_inputs(inputs: Inputs) -> Iterator[Any] | AsyncIterator[Any]:
    """An iterator over the inputs of a run. What can be checked beforehand is: nothing starts on bad input."""
    if inputs is None:
        return iter([Context()])
    if isinstance(inputs, Context | Mapping):
        return iter([as_context(inputs)])
    if isinstance(inputs, AsyncIterable):
        return aiter(inputs)
    if isinstance(inputs, str | bytes | bytearray) or not isinstance(inputs, Iterable):
        raise InputError(
            f"inputs must be a Context, a mapping, an iterable or async iterable of these, or None, not {inputs!r:.80}"
        )
    if isinstance(inputs, list | tuple):
        for item in inputs:
            if type(item) is not dict and (isinstance(item, Context) or not isinstance(item, Mapping)):
                as_context(item)
    return iter(inputs)
