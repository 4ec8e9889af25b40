"""What users write: how a limit is defined. Immutable, and without any state (see `obsdag.limits`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import InitVar, dataclass, field
from typing import Any, Final

from obsdag.errors import ConfigError

__all__ = ["MAKE", "ConcurrencyLimit", "Limit", "RateLimit", "ResourcePool"]


class _Make:
    def __repr__(self) -> str:
        return "MAKE"


MAKE: Final = _Make()
"""Stands in `LimitRequest.resources` for an item that the request's owner has to make first."""


class Limit:
    """A limit's definition: hashed and compared by identity, never copied. Users of one object share the limit."""

    __slots__ = ()
    name: str | None

    def __copy__(self) -> Limit:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Limit:
        return self


@dataclass(frozen=True, eq=False, slots=True)
class RateLimit(Limit):
    """`n` permits per `per` seconds. Raises ConfigError by name.

    burst=None: permits are at least per / n apart. burst=b: up to b at once after a pause of b * per / n, then per /
    n apart; any w seconds see at most b + w * n / per permits.

    Decided by the generic cell rate algorithm in its virtual scheduling form (ITU-T Recommendation I.371; the same as a
    token bucket of size b), with increment per / n and tolerance (b - 1) * per / n. Without a burst, a late wake-up
    is not made up for: the next permit comes per / n after the time at which the last one was really granted.

    A permit that is given back unused is there again once every permit granted after it was given back unused, too.
    Else it is lost: without a burst it could not be used anyway, with one the limit is slower for a moment, never
    faster.
    """

    n: int
    per: float = 1.0
    burst: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        _check_count("RateLimit.n", self.n)
        per: Any = self.per
        if isinstance(per, bool) or not isinstance(per, int | float) or not math.isfinite(per) or per <= 0:
            raise ConfigError(f"RateLimit.per must be a number of seconds > 0, not {per!r}")
        if self.burst is not None:
            _check_count("RateLimit.burst", self.burst)
        _check_name("RateLimit.name", self.name)


@dataclass(frozen=True, eq=False, slots=True)
class ConcurrencyLimit(Limit):
    """At most `n` executions at once. Raises ConfigError by name."""

    n: int
    name: str | None = None

    def __post_init__(self) -> None:
        _check_count("ConcurrencyLimit.n", self.n)
        _check_name("ConcurrencyLimit.name", self.name)


@dataclass(frozen=True, eq=False, slots=True)
class ResourcePool(Limit):
    """Each execution gets an item of its own for as long as it runs. Raises ConfigError by name.

    items_or_factory: an iterable of ready items, or a callable without arguments (sync or async) that makes one.
    Items are made when one is needed and none is idle, at most `size` (None: unbounded). What came back last is given
    out first.
    close: called (sync or async) with each idle item when the last run that uses the pool ends. Ready items are
    closed, too: give a factory if the pool is to serve further runs after that.
    """

    items_or_factory: InitVar[Iterable[Any] | Callable[[], Any]]
    close: Callable[[Any], Any] | None = field(default=None, repr=False)
    name: str | None = None
    size: int | None = field(default=None, kw_only=True)
    items: tuple[Any, ...] = field(init=False, repr=False)
    factory: Callable[[], Any] | None = field(init=False, repr=False)

    def __post_init__(self, items_or_factory: Any) -> None:
        made = callable(items_or_factory)
        object.__setattr__(self, "factory", items_or_factory if made else None)
        object.__setattr__(self, "items", () if made else _ready_items(items_or_factory))
        if self.close is not None and not callable(self.close):
            raise ConfigError(f"ResourcePool.close must be a callable of the item, or None, not {self.close!r}")
        _check_name("ResourcePool.name", self.name)
        if self.size is not None:
            _check_count("ResourcePool.size", self.size)
            if not made:
                raise ConfigError(
                    "ResourcePool.size is for a factory: a pool of ready items has as many as it was given"
                )


def _ready_items(items: Any) -> tuple[Any, ...]:
    if isinstance(items, str | bytes) or not isinstance(items, Iterable):
        kind = type(items).__name__  # not its value: a text is likely an address with a password
        raise ConfigError(f"ResourcePool.items_or_factory must be an iterable of items, or a callable, not a {kind}")
    ready = tuple(items)
    if not ready:
        raise ConfigError("ResourcePool.items_or_factory has no items: give some, or a callable that makes one")
    return ready


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number >= 1, not {value!r}")


def _check_name(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigError(f"{name} must be a non-empty text or None, not {value!r}")
