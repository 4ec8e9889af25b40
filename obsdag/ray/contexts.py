"""Contexts as messages, on the driver's side: a root that goes to a shard, and those that a shard speaks of."""

from __future__ import annotations

from obsdag.context import Context
from obsdag.errors import EncodingError
from obsdag.ray.sharding import Root
from obsdag.ray.wire import Codec, Made, Seed

__all__ = ["check_id", "context_of", "seed_of"]


def check_id(context: Context) -> None:
    """Raises EncodingError for an id that has no form as UTF-8: half of a surrogate pair, out of a file's name, say."""
    if context.id.isascii():
        return
    try:
        context.id.encode()
    except UnicodeEncodeError as error:
        raise EncodingError(f"the id {context.id!r} cannot cross to a shard ({error.reason}): give another") from None


def seed_of(root: Root) -> Seed:
    """A root as it goes to a shard, with what goes on there of its caller's trace."""
    context: Context = root.context
    caller = None
    if context._trace is not None:
        from obsdag.telemetry.carrier import caller_of

        caller = caller_of(context)
    return Seed(root.number, root.token, context.id, bool(context.name), root.data, caller)


def context_of(made: Made, root: Context, outcome: str, codec: Codec) -> Context:
    """A context that a shard speaks of: the root itself, or one like it that ended there."""
    if not made.id:
        return root
    data = {} if made.data is None else codec.decode(made.data)
    context = Context(root.runtime, data, made.id if made.named else "")
    context._id, context._outcome = made.id, outcome
    if context._token is not None:
        context._token.release()
    if made.above is not None:
        child = context
        for id in made.above:
            child._parent = Context(None)
            child = child._parent
            child._id = id
        child._parent = root
    return context
