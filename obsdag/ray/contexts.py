"""Contexts as messages, on the driver's side: a root that goes to a shard, and those that a shard speaks of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from obsdag.context import Context, OutputContext
from obsdag.core.records import Failure, Stall
from obsdag.errors import EncodingError
from obsdag.ray.sharding import Root
from obsdag.ray.wire import Batch, Codec, Ended, Made, Seed, encode

__all__ = ["Told", "batch_of", "check_id", "read"]


class Told(NamedTuple):
    """What came of a root, as objects."""

    outputs: list[OutputContext]
    failures: list[Failure]
    stalls: list[Stall]


def check_id(context: Context) -> None:
    """Raises EncodingError for an id that has no form as UTF-8: half of a surrogate pair, out of a file's name, say."""
    if context.id.isascii():
        return
    try:
        context.id.encode()
    except UnicodeEncodeError as error:
        raise EncodingError(f"the id {context.id!r} cannot cross to a shard ({error.reason}): give another") from None


def batch_of(roots: Iterable[Root]) -> bytes:
    """Roots as they go to a shard."""
    return encode(Batch([_seed_of(root) for root in roots]))


def _seed_of(root: Root) -> Seed:
    """A root, with what goes on there of its caller's trace."""
    context: Context = root.context
    caller = None
    if context._trace is not None:
        from obsdag.telemetry.carrier import caller_of

        caller = caller_of(context)
    return Seed(root.number, root.token, context.id, bool(context.name), root.data, caller)


def read(ended: Ended, root: Context, codec: Codec) -> Told:
    """What a shard tells of a root, whose data is from then on that of its end. Raises if any of it cannot be read."""
    if ended.data is not None:
        root._data = codec.decode(ended.data)
    given = [Made()] if ended.outputs is None else ended.outputs
    failures = [
        Failure(_context_of(each.made, root, "failed", codec), each.task, each.attempts, each.exception())
        for each in ended.failures
    ]
    stalls = [
        Stall(_context_of(each.made, root, "stalled", codec), each.task, tuple(each.missing), each.reason)
        for each in ended.stalls
    ]
    return Told([_output_of(made, root, codec) for made in given], failures, stalls)


def _output_of(made: Made, root: Context, codec: Codec) -> OutputContext:
    output = OutputContext(_context_of(made, root, "output", codec))
    if not made.id and made.data is not None:
        output._data = codec.decode(made.data)  # the task returned an OutputContext of its own
    output._outcome = "output"
    return output


def _context_of(made: Made, root: Context, outcome: str, codec: Codec) -> Context:
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
