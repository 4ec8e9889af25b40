"""From records to spans: `KeptSpan`s of kept traces, built off the event loop's thread (TELEMETRY section 3).

Built directly: going through `start_span` costs ten times as much and would ask the sampler again. Every name and
attribute key here is public API.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.trace import Event
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode

from obsdag import context as contexts
from obsdag.core.states import LANES, STATES
from obsdag.telemetry.kept_span import UNSET, KeptSpan, Lead, Shared
from obsdag.telemetry.records import MAX_DETAILS, SAMPLED, Details, ExecutionSpan, Part, RootMore, RootTrace
from obsdag.telemetry.specs import clean, error_type_of

if TYPE_CHECKING:
    from obsdag.telemetry.deferred import DeferredTracer

__all__ = [
    "MAX_LINKS",
    "ErrorText",
    "build_marker",
    "build_run_span",
    "build_spans",
    "context_id",
    "error_text",
    "shared_of_all",
]

MAX_LINKS: Final = 64
"""The SDK keeps the newest 128 only; 64 tell the story, and the true number is an attribute."""
MAX_LATEST: Final = 4_096
"""Executions of one root that later ones may link to: enough for any DAG, bounded for endless fan-outs."""
MAX_SHARED: Final = 4_096
"""How much of what spans have in common a run's tracer remembers, such as that of a task's executions by one worker."""


class ErrorText:
    """What is left of an exception where its trace may not be kept: type and text, without frames."""

    __slots__ = ("message", "name", "stack")

    def __init__(self, name: str, message: str, stack: str = "") -> None:
        self.name = name
        self.message = message
        self.stack = stack


def error_text(error: BaseException) -> ErrorText:
    """Type and text of an exception whose `__str__` may itself be broken."""
    try:
        message = str(error)
    except Exception as broken:
        message = f"<{type(broken).__name__} while asking for its text>"
    return ErrorText(error_type_of(error), message)


class ErrorTexts:
    """Texts of exceptions as they may leave the process. redact: the telemetry's own; None lets all through."""

    def __init__(self, redact: Callable[[str], str] | None) -> None:
        self._redact = redact

    def redacted(self, text: str) -> str:
        """The text as it may be exported."""
        if self._redact is None or not text:
            return clean(text)
        try:
            return clean(str(self._redact(text)))
        except Exception:  # a user's function: rather no text than the unredacted one
            return "[redaction failed]"

    def attributes(self, error: BaseException) -> dict[str, str]:
        """The attributes of an `exception` event."""
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        return {
            "exception.type": name,
            "exception.message": self.redacted(error_text(error).message),
            "exception.stacktrace": self.redacted(_stack_text(error)),
        }


def _stack_text(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception:  # a user's exception may break rendering
        return ""


def context_id(raw: str | int) -> str:
    """`Context.id` of a context that may be gone, from its raw form."""
    if isinstance(raw, str):
        return clean(raw)
    return f"{contexts._prefix}-{raw:x}"


def build_spans(
    tracer: DeferredTracer, root: RootTrace, records: list[tuple[Any, ...]], finished: bool
) -> Iterator[KeptSpan]:
    """The spans of what was taken from `root`, in order of their ends; its `context` spans last, if `finished`."""
    for record in records:
        if record[0] is None:
            yield _wait_span(tracer, root, record)
            continue
        details = record[0].details
        if details is not None and details.dispatch is not None:
            yield _dispatch_span(tracer, record, details.dispatch)
        yield _execution_span(tracer, root, record)
    if finished:
        yield from _context_spans(tracer, root)


# --- executions


def _execution_span(tracer: DeferredTracer, root: RootTrace, record: tuple[Any, ...]) -> KeptSpan:
    span, index, attempt, started, ended, worker, lane, waits, outcome, error = record
    more, raw_id, trace_id = root.rare(), span.trace.raw_id, span.trace_id
    shared = tracer.shared.get((index, attempt, outcome, lane, worker))
    if shared is None:
        shared = _shared_of_executions(tracer, index, attempt, outcome, lane, worker)
    own: dict[str, Any] = {"obsdag.context.id": context_id(raw_id)}
    for state, waited_s in enumerate(waits or ()):
        if waited_s > 0.0:
            own[f"obsdag.wait_s.{STATES[state]}"] = waited_s
    if (raw_id, index, started) in more.critical:
        own["obsdag.critical"] = True
    if more.iteration:
        own["obsdag.loop.iteration"] = more.iteration
    leads = _links_of(tracer, more, record, own)
    events: list[Event] = []
    status = UNSET
    if error is not None:
        events, status = _error_of(tracer, outcome, error, tracer.unix_ns(ended), own)
    if span.details is not None:
        status = _user_part(span.details, shared, own, events, leads, status)
    part = root.part_of(trace_id)
    began = part.started
    return KeptSpan(
        tracer.source,
        shared,
        trace_id,
        span.id,
        _state(root, trace_id),
        _parent_of(root, span, part, leads),
        tracer.unix_ns(started if started > began else began),
        tracer.unix_ns(ended if ended > began else began),
        own,
        leads,
        events,
        status,
    )


def _state(root: RootTrace, trace_id: int) -> Any:
    caller = root.more.caller if root.more is not None else None
    return caller.trace_state_of(trace_id) if caller is not None else None


def shared_of_all(tracer: DeferredTracer, name: str, kind: SpanKind = SpanKind.INTERNAL) -> Shared:
    """Name, kind, and what all spans of a tracer have."""
    found = tracer.shared.get((name, kind))
    return _share(tracer, (name, kind), name, {}, kind) if found is None else found


def _shared_of_executions(
    tracer: DeferredTracer, index: int, attempt: int, outcome: str, lane: int, worker: int
) -> Shared:
    told = _told_of_task(tracer, index)
    told |= {
        "obsdag.attempt": attempt,
        "obsdag.execution.outcome": outcome,
        "obsdag.lane": LANES[lane],
        "obsdag.worker": worker,
    }
    return _share(tracer, (index, attempt, outcome, lane, worker), f"execute {told['obsdag.task']}", told)


def _told_of_task(tracer: DeferredTracer, index: int) -> dict[str, Any]:
    task = tracer.plan.tasks[index]
    return {"obsdag.task": clean(task.id), "obsdag.executor": task.runs_on}


def _share(
    tracer: DeferredTracer, key: tuple[Any, ...], name: str, told: dict[str, Any], kind: SpanKind = SpanKind.INTERNAL
) -> Shared:
    if len(tracer.shared) >= MAX_SHARED:
        tracer.shared.clear()
    found = Shared(name, {"obsdag.engine": tracer.engine, "obsdag.dag": tracer.dag, **told}, kind)
    tracer.shared[key] = found
    return found


def _parent_of(root: RootTrace, span: ExecutionSpan, part: Part, links: list[Link | Lead]) -> SpanContext | None:
    """The execution that made the child, if it is in the same trace; else the `context` span of that trace."""
    maker = span.trace.maker
    if maker is not None and maker.trace_id == span.trace_id:
        return SpanContext(maker.trace_id, maker.id, False, SAMPLED)
    if maker is not None and len(links) < MAX_LINKS:
        links.append(("maker", maker.trace_id, maker.id))
    more = root.more
    if more is not None and more.pull in ("open", "ended"):
        return None  # a pull that gave nothing has no context: its execution is the whole trace
    return part.context


def _links_of(
    tracer: DeferredTracer, more: RootMore, record: tuple[Any, ...], attributes: dict[str, Any]
) -> list[Link | Lead]:
    """To the attempt before, and to the executions joined: several upstreams, or the children of a join."""
    span, index, latest = record[0], record[1], more.latest
    key, details, above = id(span.trace), span.details, tracer.plan.up_list[index]
    links: list[Link | Lead] = []
    before = latest.get((key, index))
    if before is not None and before[1] != "success":
        links.append(("retry", before[0].trace_id, before[0].id))
    upstream = [latest[key, up][0] for up in above if (key, up) in latest] if len(above) > 1 else []
    count = len(upstream)
    if details is not None and details.upstream_count:
        count += details.upstream_count
        upstream += details.upstream
    if count:
        attributes["obsdag.join.upstream_count"] = count
        links += [("upstream", each.trace_id, each.id) for each in upstream[: MAX_LINKS - len(links)]]
    if len(latest) >= MAX_LATEST:
        for old in list(latest)[: MAX_LATEST // 2]:
            del latest[old]
    latest[key, index] = (span, record[8])
    if more.pull in ("open", "ended"):
        links += more.links
    return links


def _error_of(
    tracer: DeferredTracer, outcome: str, error: Any, at_ns: int, attributes: dict[str, Any]
) -> tuple[list[Event], Status]:
    """A failed attempt is an ERROR with its exception; cancellations, interruptions and deferrals are not errors."""
    if error is None or outcome not in ("error", "timeout"):
        return [], UNSET
    if isinstance(error, BaseException):
        text = error_text(error)
        event = tracer.texts.attributes(error)
    else:
        text = error
        event = {"exception.type": text.name, "exception.message": tracer.texts.redacted(text.message)}
    attributes["error.type"] = text.name
    return [Event("exception", event, at_ns)], Status(StatusCode.ERROR, event["exception.message"] or text.name)


def _user_part(
    details: Details,
    always: Shared,
    attributes: dict[str, Any],
    events: list[Event],
    links: list[Link | Lead],
    status: Status,
) -> Status:
    """What the task said about its own span; the engine's own keys win."""
    for key, value in (BoundedAttributes(MAX_DETAILS, details.attributes, immutable=False) or {}).items():
        if key not in always.attributes:
            attributes.setdefault(key, value)
    events[:0] = [Event(name, BoundedAttributes(MAX_DETAILS, dict(given)), at) for name, given, at in details.events]
    links += [Link(context, given) for context, given in details.links[: MAX_LINKS - len(links)]]
    if details.dropped:
        attributes["obsdag.dropped_details"] = details.dropped
    if details.iteration:
        attributes["obsdag.loop.iteration"] = details.iteration
    return details.status if details.status is not None and status is UNSET else status


def _dispatch_span(tracer: DeferredTracer, record: tuple[Any, ...], dispatch: tuple[int, float]) -> KeptSpan:
    span, index, ended = record[0], record[1], record[4]
    found = tracer.shared.get((index, "dispatch"))
    if found is None:
        told = _told_of_task(tracer, index)
        found = _share(tracer, (index, "dispatch"), f"dispatch {told['obsdag.task']}", told, SpanKind.PRODUCER)
    return KeptSpan(
        tracer.source,
        found,
        span.trace_id,
        dispatch[0],
        _state(span.trace.root, span.trace_id),
        SpanContext(span.trace_id, span.id, False, SAMPLED),
        tracer.unix_ns(dispatch[1]),
        tracer.unix_ns(max(ended, dispatch[1])),
        {"obsdag.context.id": context_id(span.trace.raw_id)},
    )


# --- waits and contexts


def _wait_span(tracer: DeferredTracer, root: RootTrace, record: tuple[Any, ...]) -> KeptSpan:
    _, trace, state, started, ended = record
    part = _part_at(root, started)
    own = {"obsdag.context.id": context_id(trace.raw_id)}
    return _below(tracer, root, part, f"wait {STATES[state]}", max(started, part.started), ended, own)


def _part_at(root: RootTrace, at: float) -> Part:
    parts = root.more.parts if root.more is not None else None
    if parts is None:
        return root.first
    return next((part for part in reversed(parts) if part.started <= at), parts[0])


def build_marker(tracer: DeferredTracer, root: RootTrace, now: float, running: tuple[str, ...], state: str) -> KeptSpan:
    """`open {dag}`: a context that is still under way after `slow_after`, from its entry until now, and where it is.

    A span can only be exported once it has ended, so a context that hangs in its first task would otherwise never be
    seen.
    """
    part = _part_at(root, now)
    own = {
        "obsdag.context.id": context_id(root.raw_id),
        "obsdag.open.tasks": running,
        "obsdag.open.state": state,
    }
    return _below(tracer, root, part, f"open {tracer.dag}", part.started, now, own)


def _below(
    tracer: DeferredTracer, root: RootTrace, part: Part, title: str, started: float, ended: float, own: dict[str, Any]
) -> KeptSpan:
    """A span of no execution, below the `context` span of a part."""
    return KeptSpan(
        tracer.source,
        shared_of_all(tracer, title),
        part.trace_id,
        tracer.new_span_id(),
        _state(root, part.trace_id),
        part.context,
        tracer.unix_ns(started),
        tracer.unix_ns(ended),
        own,
    )


def _context_spans(tracer: DeferredTracer, root: RootTrace) -> Iterator[KeptSpan]:
    """One `context` span per part, linked both ways; none for a pull that no item came of."""
    more = root.rare()
    if more.pull in ("open", "ended"):
        return
    parts = more.parts or [root.first]
    for number, part in enumerate(parts):
        parent = more.caller.parent if more.caller is not None and number == 0 else None
        links = _context_links(tracer, root, parts, number)
        attributes = _context_attributes(tracer, root, number)
        attributes["obsdag.links"] = len(links)
        if len(links) <= MAX_LINKS:
            del attributes["obsdag.links"]
        yield KeptSpan(
            tracer.source,
            shared_of_all(tracer, f"context {tracer.dag}", SpanKind.CONSUMER),
            part.trace_id,
            part.span_id,
            _state(root, part.trace_id),
            parent,
            tracer.unix_ns(part.started),
            tracer.unix_ns(more.closed),
            attributes,
            links[:MAX_LINKS],
            _outcome_event(tracer, root),
            _context_status(tracer, root),
        )


def build_run_span(tracer: DeferredTracer, outcome: str, started: float, ended: float) -> KeptSpan:
    """The `run {dag}` span, a child of whoever called `Executor.run`."""
    failed = outcome in ("failed", "deadlocked", "deadline")
    own = {
        "obsdag.run.id": tracer.run.id,
        "obsdag.run.kind": tracer.run.kind,
        "obsdag.run.outcome": outcome,
    }
    if failed:
        own["error.type"] = outcome
    return KeptSpan(
        tracer.source,
        shared_of_all(tracer, f"run {tracer.dag}"),
        tracer.run_trace_id,
        tracer.run_span_id,
        None,
        tracer.run_parent,
        tracer.unix_ns(started),
        tracer.unix_ns(ended),
        own,
        result=Status(StatusCode.ERROR, outcome) if failed else UNSET,
    )


def _context_links(tracer: DeferredTracer, root: RootTrace, parts: list[Part], number: int) -> list[Link | Lead]:
    more = root.rare()
    links: list[Link | Lead] = []
    if number == 0:
        if more.caller is not None and more.caller.mode == "link" and more.caller.span_context is not None:
            links.append(Link(more.caller.span_context, {"obsdag.link.type": "submitter"}))
        links += more.links
    links.append(("run", tracer.run_trace_id, tracer.run_span_id))
    links += [
        ("continuation", other.trace_id, other.span_id)
        for other in (*parts[max(0, number - 1) : number], *parts[number + 1 : number + 2])
    ]
    return links


def _context_attributes(tracer: DeferredTracer, root: RootTrace, number: int) -> dict[str, Any]:
    more = root.rare()
    attributes: dict[str, Any] = {"obsdag.context.id": context_id(root.raw_id), "obsdag.context.outcome": more.outcome}
    if more.parent_id:
        attributes["obsdag.context.parent_id"] = more.parent_id
    if more.iteration:
        attributes["obsdag.loop.iteration"] = more.iteration
    if more.error is not None and more.outcome == "failed":
        attributes["error.type"] = more.error[0]
    if more.stall is not None:
        attributes["obsdag.stall.task"], attributes["obsdag.stall.missing"] = more.stall
        if more.outcome == "stalled":
            attributes["error.type"] = "stalled"
    if more.dropped:
        attributes["obsdag.dropped_spans"] = more.dropped
    if number:
        attributes["obsdag.continuation"] = number
    else:
        attributes.update({f"obsdag.ledger.{state}": spent for state, spent in more.ledger.items() if spent})
    return attributes


def _outcome_event(tracer: DeferredTracer, root: RootTrace) -> list[Event]:
    """Where what it made outlived the context, its span covers that too, and the outcome is an event within."""
    more = root.rare()
    if more.closed <= more.ended:
        return []
    return [Event("outcome", {"obsdag.context.outcome": more.outcome}, tracer.unix_ns(more.ended))]


def _context_status(tracer: DeferredTracer, root: RootTrace) -> Status:
    more = root.rare()
    if more.outcome == "failed" and more.error is not None:
        return Status(StatusCode.ERROR, tracer.texts.redacted(more.error[1]) or more.error[0])
    if more.outcome == "stalled":
        where = f"stalled at task {more.stall[0]!r}" if more.stall is not None else "stalled"
        return Status(StatusCode.ERROR, where)
    return UNSET
