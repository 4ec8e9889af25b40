"""The OpenTelemetry context of an execution, and making it the current one in as little time as can be (TELEMETRY 3).

Executions of a visit replace one another, and the end of the visit puts back what workers start with (SEMANTICS E17).
Nothing is attached and detached by token: whoever sets does so in a frame of the engine's own, in contextvars that end
with it. A token made, kept and given back costs 0.25 us, setting 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context as OtelContext
from opentelemetry.trace import INVALID_SPAN, set_span_in_context

__all__ = ["EXECUTION_KEY", "SPAN_KEY", "OwnContext", "current", "make_current"]

SPAN_KEY: Final = next(iter(set_span_in_context(INVALID_SPAN, OtelContext())))
"""The key of the current span in an OpenTelemetry context, asked for once."""
EXECUTION_KEY: Final = "obsdag-execution"
"""The key of the execution's own span in contexts that were made from its own."""


class OwnContext(OtelContext):
    """A span that is its own OpenTelemetry context, for executions in which more is current than the span (baggage).

    To every reader the span looks like an entry of the dict, whose real ones (baggage) are those of its base.
    """

    __slots__ = ()

    def get(self, key: Any, default: Any = None) -> Any:
        """The span, or what the base has under `key`."""
        return self if key in (SPAN_KEY, EXECUTION_KEY) else super().get(key, default)

    def copy(self) -> dict[str, Any]:
        """All entries, as the API asks for before it sets one, and the execution, so that it is known inside a span of
        the user's own as well.
        """
        return {**self._entries(), EXECUTION_KEY: self}

    def _entries(self) -> dict[str, Any]:
        return {**dict(dict.items(self)), SPAN_KEY: self}

    def __getitem__(self, key: Any) -> Any:
        return self if key == SPAN_KEY else super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return key == SPAN_KEY or super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return super().__len__() + 1

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self is other  # as a span; two executions never have the same context

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none, a span needs one
        return id(self) >> 4

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {id(self):#x}>"

    def keys(self) -> Any:
        """Of all entries, as values and items."""
        return self._entries().keys()

    def values(self) -> Any:
        """See `keys`."""
        return self._entries().values()

    def items(self) -> Any:
        """See `keys`."""
        return self._entries().items()


def _nothing(default: Any) -> Any:
    return otel_context.get_current()


_variable: Any = getattr(getattr(otel_context, "_RUNTIME_CONTEXT", None), "_current_context", None)
if not isinstance(_variable, ContextVar):  # pragma: no cover - another runtime context was installed by an entry point
    _variable = None

make_current: Final[Callable[[OtelContext], object]] = otel_context.attach if _variable is None else _variable.set
"""Makes an OpenTelemetry context the current one of this frame's contextvars."""
current: Final[Callable[[Any], Any]] = _nothing if _variable is None else _variable.get
"""The current OpenTelemetry context: `current(None)`."""
