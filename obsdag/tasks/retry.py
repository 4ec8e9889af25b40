"""When a failed execution is tried again, and after how long.

A `TaskConfig.retry_interval` is a number of seconds, a callable of the context (seed), or a `RetryStrategy`.
Everything here is a decision over values handed in: no clock, no global random generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from obsdag.errors import ConfigError

if TYPE_CHECKING:
    from obsdag.context import Context

__all__ = ["Exponential", "Fixed", "RetryInterval", "RetryOn", "RetryStrategy", "interval_of", "retries_on"]


@runtime_checkable
class RetryStrategy(Protocol):
    """Decides how long to wait before the next attempt."""

    def delay(self, attempt: int, context: Context, error: BaseException, random: Random) -> float:
        """Seconds to wait after `attempt` (1 for the first) failed with `error`; 0 for at once."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same `interval` (seconds) before every retry."""

    interval: float = 0.0

    def __post_init__(self) -> None:
        _check_seconds("Fixed.interval", self.interval)

    def delay(self, attempt: int, context: Context, error: BaseException, random: Random) -> float:
        """`interval`, whatever happened."""
        return self.interval


@dataclass(frozen=True, slots=True)
class Exponential:
    """Exponential backoff with full jitter: uniform in [0, min(cap, base * factor ** (attempt - 1))], in seconds.

    Source of the formula: Marc Brooker, "Exponential Backoff And Jitter" (2015): full jitter spreads the retries of
    many clients over the whole interval and so needs the fewest calls in all. `jitter=False` takes the upper end.
    """

    base: float = 0.1
    factor: float = 2.0
    cap: float = 60.0
    jitter: bool = True

    def __post_init__(self) -> None:
        _check_seconds("Exponential.base", self.base)
        _check_seconds("Exponential.cap", self.cap)
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ConfigError(f"Exponential.factor must be a number >= 1, not {self.factor!r}")

    def delay(self, attempt: int, context: Context, error: BaseException, random: Random) -> float:
        """The backoff after `attempt` failed."""
        try:
            ceiling = min(self.cap, self.base * self.factor ** (attempt - 1))
        except OverflowError:
            ceiling = self.cap
        return random.uniform(0.0, ceiling) if self.jitter else ceiling


RetryInterval = float | RetryStrategy | Callable[["Context"], float]
RetryOn = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]


def interval_of(interval: RetryInterval, attempt: int, context: Context, error: BaseException, random: Random) -> float:
    """Seconds until the next attempt by any of the three forms of `retry_interval`.

    Raises ConfigError if a user's callable gives something that is not a finite number >= 0.
    """
    if isinstance(interval, int | float):
        return interval
    if isinstance(interval, RetryStrategy):
        delay: Any = interval.delay(attempt, context, error, random)
    else:
        delay = interval(context)
    _check_seconds("the value of retry_interval", delay)
    return float(delay)


def retries_on(rule: RetryOn | None, error: BaseException) -> bool:
    """Whether `retry_on` allows another attempt after `error`; without a rule, any Exception is retried."""
    if rule is None:
        return isinstance(error, Exception)
    if isinstance(rule, type | tuple):
        return isinstance(error, rule)
    return bool(rule(error))


def _check_seconds(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name} must be a number of seconds >= 0, not {value!r}")
