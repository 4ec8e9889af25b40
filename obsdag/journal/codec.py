"""A context's data and progress as bytes and back.

What comes back is what went in, or it is refused (`EncodingError` with the key and the type). Plain msgpack turns
tuples into lists, dates and UUIDs into text; so what was encoded is read back and compared, and data that differs is
encoded again, value by value, with extension types. The first byte of the bytes says which way it was.

What is equal counts as the same: of subclasses of str, int, float and dict (a `StrEnum`, say) the plain value comes
back, of a datetime with a zone the same moment in UTC, of a bytearray bytes. NaN, sets, tuples, dates, UUIDs, Decimals
and integers of any size come back as they were.
"""

from __future__ import annotations

import datetime
import decimal
import pickle
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final

from obsdag.errors import EncodingError, JournalError, unless_missing

try:
    import msgspec
    from msgspec.msgpack import Ext
except ImportError as error:  # pragma: no cover - the tests have it
    raise ImportError("the journal needs msgspec: pip install 'obsdag[journal]'") from unless_missing(error, "msgspec")

__all__ = ["Body", "Codec", "Failed", "Rare", "mask_of", "pack_mask"]

PLAIN: Final = b"\x01"
TAGGED: Final = b"\x02"

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode
_INT64 = range(-(1 << 63), 1 << 64)
_PICKLE: Final = 9
_MAX_DEPTH: Final = 200


class Codec:
    """Data to bytes and back. allow_pickle: what has no other form is pickled, and unpickled when it is read.

    For the texts of errors, `whose` form it is, and the `switch` that allows pickling.
    """

    def __init__(
        self,
        allow_pickle: bool = False,
        whose: str = "the journal",
        switch: str = "SQLiteJournal(..., allow_pickle=True)",
    ) -> None:
        self.allow_pickle = allow_pickle
        self._whose = whose
        self._switch = switch
        self._tagged = msgspec.msgpack.Decoder(ext_hook=self._untag).decode

    def encode(self, data: Mapping[str, Any]) -> bytes:
        """The bytes of a context's data. Raises EncodingError with the first key that has no form, and its type."""
        try:
            encoded = _encode(data)
            for key, value in data.items():  # a third of the time that reading back takes
                if type(key) is not str:
                    break
                kind = type(value)
                if kind not in _SCALARS and not (kind is list and _SCALARS.issuperset(map(type, value))):
                    break
            else:
                return PLAIN + encoded
            if _decode(encoded) == data:
                return PLAIN + encoded
        except Exception:  # whatever msgspec, or the comparison of a user's value, does not like: value by value then
            return self._encode_tagged(data)
        return self._encode_tagged(data)

    def _encode_tagged(self, data: Mapping[str, Any]) -> bytes:
        tagged: list[tuple[Any, Any]] = []  # pairs: a key with an extension type cannot be one of a mapping's
        for key, value in data.items():
            try:
                tagged.append((self._tag(key, 0), self._tag(value, 0)))
            except _Obstacle as found:
                raise EncodingError(
                    f"key {key!r} holds a {found.kind}, which {self._whose} cannot encode{found.why}"
                ) from None
            except Exception as error:  # another thread changes it meanwhile, say
                kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
                raise EncodingError(f"key {key!r} holds a {kind} that cannot be encoded now: {error!r}") from error
        return TAGGED + _encode(tagged)

    def decode(self, encoded: bytes) -> dict[str, Any]:
        """The data of `encode`. Raises JournalError if it was pickled and that is not allowed, or is unknown."""
        head, rest = encoded[:1], encoded[1:]
        if head == PLAIN:
            found = _decode(rest)
        elif head == TAGGED:
            found = self._tagged(rest)
        else:
            raise JournalError(f"data is encoded as {head!r}, which this version of obsdag does not know")
        return dict(found)

    # --- value by value

    def _tag(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if depth > _MAX_DEPTH:
            raise _Obstacle("value", f": it is nested more than {_MAX_DEPTH} levels deep")
        if kind in _SCALARS:
            return self._tag_scalar(kind, value)
        if kind is list:
            return [self._tag(each, depth + 1) for each in value]
        if kind is dict:
            return Ext(1, _encode([[self._tag(k, depth + 1), self._tag(v, depth + 1)] for k, v in value.items()]))
        if kind in _GROUPS:
            return Ext(_GROUPS[kind], _encode([self._tag(each, depth + 1) for each in value]))
        writer = _WRITERS.get(kind)
        if writer is not None:
            code, write = writer
            return Ext(code, write(value))
        return self._pickled(value)

    def _tag_scalar(self, kind: type, value: Any) -> Any:
        if kind is int and value not in _INT64:
            return Ext(8, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
        if kind is str and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return Ext(10, value.encode("utf-8", "surrogatepass"))
        return value

    def _pickled(self, value: Any) -> Ext:
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        if not self.allow_pickle:
            raise _Obstacle(kind, f"; keep plain values, or allow pickling by {self._switch}")
        try:
            return Ext(_PICKLE, pickle.dumps(value, protocol=5))
        except Exception as error:
            raise _Obstacle(kind, f": it cannot be pickled ({error})") from error

    def _untag(self, code: int, view: memoryview) -> Any:
        content = bytes(view)
        if code == 1:
            return dict(self._tagged(content))
        for kind, number in _GROUPS.items():
            if code == number:
                return kind(self._tagged(content))
        if code == 8:
            return int.from_bytes(content, "big", signed=True)
        if code == 10:
            return content.decode("utf-8", "surrogatepass")
        if code == _PICKLE:
            if not self.allow_pickle:
                raise JournalError(f"data was pickled: read it with {self._switch}")
            return pickle.loads(content)
        if code in _READERS:
            return _READERS[code](content)
        raise JournalError(f"data holds a value of type {code}, which this version of obsdag does not know")


class _Obstacle(Exception):
    """A value that has no form; kind: its type. why: what to add to the message."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(kind, why)
        self.kind = kind
        self.why = why


def _iso(value: Any) -> bytes:
    # a time zone other than a fixed offset comes back as the offset it had
    fold = b"\x01" if getattr(value, "fold", 0) else b"\x00"
    text: str = value.isoformat()
    return fold + text.encode()


def _from_iso(kind: Any) -> Callable[[bytes], Any]:
    def read(content: bytes) -> Any:
        value = kind.fromisoformat(content[1:].decode())
        return value.replace(fold=1) if content[:1] == b"\x01" else value

    return read


_SCALARS = frozenset({type(None), bool, int, float, str, bytes})
_GROUPS: dict[type, int] = {tuple: 2, set: 3, frozenset: 4}
_WRITERS: dict[type, tuple[int, Callable[[Any], bytes]]] = {
    datetime.datetime: (11, _iso),
    datetime.date: (12, _iso),
    datetime.time: (13, _iso),
    datetime.timedelta: (14, lambda value: _encode([value.days, value.seconds, value.microseconds])),
    uuid.UUID: (15, lambda value: value.bytes),
    decimal.Decimal: (16, lambda value: str(value).encode()),
    bytearray: (5, bytes),
    complex: (17, lambda value: _encode([value.real, value.imag])),
}
_READERS: dict[int, Callable[[bytes], Any]] = {
    5: bytearray,
    11: _from_iso(datetime.datetime),
    12: _from_iso(datetime.date),
    13: _from_iso(datetime.time),
    14: lambda content: datetime.timedelta(*_decode(content)),
    15: lambda content: uuid.UUID(bytes=content),
    16: lambda content: decimal.Decimal(content.decode()),
    17: lambda content: complex(*_decode(content)),
}


# --- progress


class Failed(msgspec.Struct, array_like=True, frozen=True):
    """Why a context failed or stalled: the task, the attempts, type and text of the exception."""

    task: str
    attempts: int
    kind: str
    text: str


class Rare(msgspec.Struct, array_like=True):
    """The rare parts of a context's progress (`core.records.More`). Times are Unix seconds.

    waits: task -> (due, retry or limit). lends: (task, a map's, its map has not ended). lend: the branch it belongs to,
    by task. pulls: open loop or map -> items so far. reason: why it was garbage-collected.
    """

    skipped: int | bytes = 0
    dead: dict[int, int | bytes] = {}
    attempts: dict[int, int] = {}
    first_try: dict[int, float] = {}
    waits: dict[int, tuple[float, str]] = {}
    lends: list[tuple[int, bool, bool]] = []
    pulls: dict[int, int] = {}
    frozen: bool = False
    deadline: float | None = None
    reason: str = ""


class Body(msgspec.Struct, array_like=True, gc=False):
    """What a row says of a context beside its data. entered: Unix seconds. key: its idempotency key, if it was asked
    for before the context was accepted. crashes: how often in a row it was running when the process died; started: it
    is running now (written down only while the process keeps dying). due: a submission's deadline, Unix seconds.
    caller: of a submission whose caller has a trace, its mode (child or link) and headers.
    """

    kind: str
    entered: float
    done: int | bytes
    rare: Rare | None = None
    failed: Failed | None = None
    key: str | None = None
    crashes: int = 0
    started: bool = False
    due: float | None = None
    caller: tuple[str, dict[str, str]] | None = None


def pack_mask(mask: int) -> int | bytes:
    """A mask of any length for a Body: msgpack's integers end at 64 bits."""
    return mask if mask < 1 << 63 else mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def mask_of(packed: int | bytes) -> int:
    """The mask that was packed."""
    return packed if isinstance(packed, int) else int.from_bytes(packed, "little")
