"""What crosses between driver and shards: two kinds of messages, as msgpack. Data inside is the codec's bytes.

    driver -> shard    Batch: roots to run
    shard -> driver    Answers: how many roots it has begun, and what came of those that ended

A root that came out as it is, which is the usual case, is `Ended(number, token, "output", data)` and nothing else.
"""

from __future__ import annotations

from typing import Any

from obsdag.errors import unless_missing
from obsdag.journal.codec import Codec
from obsdag.pools.carry import RemoteFailure, pack_error, unpack_error

try:
    import msgspec
except ImportError as error:  # pragma: no cover - the codec's import has told it before
    raise ImportError("RayExecutor needs msgspec: pip install 'obsdag[ray]'") from unless_missing(error, "msgspec")

__all__ = [
    "Answers",
    "Batch",
    "Codec",
    "Ended",
    "Failing",
    "Made",
    "Seed",
    "Stalling",
    "codec_of",
    "decode_answers",
    "decode_batch",
    "encode",
    "packed",
    "written",
]


class Seed(msgspec.Struct, array_like=True):
    """One root to run. named: whether its id is a name that was given. caller: how the trace of whoever submitted it
    goes on ("child" or "link"), and W3C headers; None if there is none.
    """

    number: int
    token: int
    id: str
    named: bool
    data: bytes
    caller: tuple[str, dict[str, str]] | None = None


class Batch(msgspec.Struct, array_like=True):
    """Roots for a shard."""

    seeds: list[Seed]


class Made(msgspec.Struct, array_like=True):
    """A context other than the root, or the root where `id` is empty. above: ids up to the root, nearest first, without
    the root's; None if it is no descendant of the root. data: None where it is the root's, or has no form.
    """

    id: str = ""
    named: bool = False
    above: list[str] | None = None
    data: bytes | None = None


class Failing(msgspec.Struct, array_like=True):
    """A failure. error: as `pools.carry` packs it."""

    made: Made
    task: str
    attempts: int
    error: RemoteFailure

    @classmethod
    def of(cls, made: Made, task: str, attempts: int, error: BaseException) -> Failing:
        """Packs the error."""
        return cls(made, task, attempts, packed(error))

    def exception(self) -> BaseException:
        """The error, or a RemoteError with its text."""
        return unpack_error(self.error)


class Stalling(msgspec.Struct, array_like=True):
    """A stall."""

    made: Made
    task: str
    missing: list[str]
    reason: str


class Ended(msgspec.Struct, array_like=True):
    """What came of one root and all that was made from it. data: the root's at its end, None if it has no form.

    outputs: None if it is the root alone. counts: outcomes of all that was made from it and itself, None if it alone.
    """

    number: int
    token: int
    outcome: str
    data: bytes | None = None
    outputs: list[Made] | None = None
    counts: dict[str, int] | None = None
    failures: list[Failing] = []
    stalls: list[Stalling] = []


class Answers(msgspec.Struct, array_like=True):
    """taken: roots that the engine has begun in all. asks: idle workers. fault: why the shard's run ended by itself."""

    taken: int
    asks: int
    ended: list[Ended]
    fault: RemoteFailure | None = None


_encoder = msgspec.msgpack.Encoder()
_batches = msgspec.msgpack.Decoder(Batch)
_answers = msgspec.msgpack.Decoder(Answers)


def codec_of(allow_pickle: bool) -> Codec:
    """For data that crosses, either way."""
    return Codec(allow_pickle, "a message between driver and shard", "RayExecutor(..., allow_pickle=True)")


def packed(error: BaseException) -> RemoteFailure:
    """The error as `pools.carry` packs it, of texts that have a form as UTF-8."""
    failure = pack_error(error)
    return RemoteFailure(failure.pickled, *map(written, failure[1:]))


def written(text: str) -> str:
    """A text whose lone surrogates, which a file's name may bring along, are written out: UTF-8 has no form of them."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def encode(message: Any) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def decode_batch(encoded: bytes) -> Batch:
    """The driver's message."""
    return _batches.decode(encoded)


def decode_answers(encoded: bytes) -> Answers:
    """A shard's message."""
    return _answers.decode(encoded)
