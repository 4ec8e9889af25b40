"""Making an execution the current span, and taking back what was current, in as little time as can be (TELEMETRY 3).

Attach and detach stand in one frame and its contextvars. Executions of a visit replace one another; only the first
one's token is kept, and used when the visit ends (SEMANTICS E17).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context as OtelContext
from opentelemetry.trace import INVALID_SPAN, Span, set_span_in_context

__all__ = ["SPAN_KEY", "TraceContext", "clear_current", "make_current"]

SPAN_KEY: Final = next(iter(set_span_in_context(INVALID_SPAN, OtelContext())))
"""The key of the current span in an OpenTelemetry context, asked for once."""


class TraceContext(OtelContext):
    """The OpenTelemetry context of an execution: what its base holds (baggage), and the span.

    The span is a field and not an entry of the dict, which costs 0.2 us less per execution; to every reader it looks
    like an entry. token: takes back what was current when the visit began.
    """

    __slots__ = ("span", "token")

    span: Any
    token: Any

    def get(self, key: Any, default: Any = None) -> Any:
        """The span, or what the base has under `key`."""
        return self.span if key == SPAN_KEY else super().get(key, default)

    def copy(self) -> dict[str, Any]:
        """All entries, as the API asks for before it sets one."""
        return {**dict(dict.items(self)), SPAN_KEY: self.span}

    def __getitem__(self, key: Any) -> Any:
        return self.span if key == SPAN_KEY else super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return key == SPAN_KEY or super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.copy())

    def __len__(self) -> int:
        return len(self.copy())

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, dict) and self.copy() == dict(other))

    __hash__ = None  # type: ignore[assignment]  # as of any dict

    def keys(self) -> Any:
        """Of all entries, as values and items."""
        return self.copy().keys()

    def values(self) -> Any:
        """See `keys`."""
        return self.copy().values()

    def items(self) -> Any:
        """See `keys`."""
        return self.copy().items()


_variable: Any = getattr(getattr(otel_context, "_RUNTIME_CONTEXT", None), "_current_context", None)
if not isinstance(_variable, ContextVar):  # pragma: no cover - another runtime context was installed by an entry point
    _variable = None


def make_current(span: Span, base: OtelContext | None = None) -> None:
    """Makes a span current, in the place of one of ours that still is.

    Taking back what was current is left to `clear_current`, once per visit: a reset costs 0.2 us, a set 0.06.
    """
    context = TraceContext() if base is None else TraceContext(base)
    context.span = span
    if _variable is None:
        context.token = otel_context.attach(context)
        return
    before = _variable.get(None)
    if type(before) is TraceContext:
        context.token = before.token
        _variable.set(context)
    else:
        context.token = _variable.set(context)


def clear_current() -> None:
    """Takes back what was current before ours; not in a frame that copied ours from another, and ends anyway."""
    current = otel_context.get_current()
    if type(current) is not TraceContext:
        return
    if _variable is None:
        otel_context.detach(current.token)
        return
    try:  # noqa: SIM105 - suppress costs 0.3 us
        _variable.reset(current.token)
    except (ValueError, RuntimeError):
        pass
