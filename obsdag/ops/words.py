"""How numbers and times are written for people: short, and always with their unit. static/format.js does the same."""

from __future__ import annotations

__all__ = ["ago", "count", "duration", "plural", "rate", "state_name"]

_STATES = {
    "pool_wait": "waits for a thread or process",
    "queued": "queued for a worker",
    "service_wait": "waits for a service",
    "limit_wait": "waits for a limit",
    "retry_wait": "waits for a retry",
    "room_wait": "waits for room (loop or map)",
    "join_wait": "arrived at a join",
    "lent": "its children are under way",
    "source_wait": "its loop goes on",
    "discarded": "discarded, kept readable",
}


def duration(seconds: float | None) -> str:
    """`12 s`, `3 min 20 s`, `0.9 ms`; a dash for None."""
    if seconds is None:
        return "\N{EN DASH}"
    if seconds < 1:
        return _below_one(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    for unit, smaller, per, size in (("min", "s", 60, 1), ("h", "min", 3_600, 60), ("d", "h", 86_400, 3_600)):
        if unit == "d" or whole < per * (60 if unit == "min" else 24):
            return f"{whole // per} {unit} {whole % per // size} {smaller}"
    raise AssertionError


def _below_one(seconds: float) -> str:
    if seconds < 0.0001:
        return f"{seconds * 1e6:.0f} \N{MICRO SIGN}s"
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"


def count(number: float) -> str:
    """`9999`, `12.3 k`, `4.5 M`."""
    if number < 10_000:
        return f"{number:.0f}"
    if number < 1_000_000:
        return f"{number / 1e3:.{1 if number < 100_000 else 0}f} k"
    return f"{number / 1e6:.{1 if number < 1e8 else 0}f} M"


def rate(per_s: float | None) -> str:
    """`12/s`, `0.3/s`, `1.5/min`; a dash for None."""
    if per_s is None:
        return "\N{EN DASH}"
    if per_s == 0:
        return "0/s"
    if per_s < 0.1:
        return f"{per_s * 60:.1f}/min"
    return f"{per_s:.1f}/s" if per_s < 10 else f"{count(round(per_s))}/s"


def ago(at: float, now: float) -> str:
    """`now`, `12 s ago`."""
    return "now" if now - at < 1 else f"{duration(now - at)} ago"


def plural(number: int, one: str, many: str | None = None) -> str:
    """`1 context`, `3 contexts`."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def state_name(state: str) -> str:
    """A context's state in words."""
    return _STATES.get(state, state)
