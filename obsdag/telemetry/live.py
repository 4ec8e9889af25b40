"""Live tracing: ordinary SDK spans through the host's tracer provider, which samples them (TELEMETRY section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context as OtelContext
from opentelemetry.context import attach, detach, get_current
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode, set_span_in_context

from obsdag.core.observer import Observer
from obsdag.core.states import LANES, STATES, State
from obsdag.telemetry.carrier import Caller, without_span
from obsdag.telemetry.materialize import MAX_LINKS, ErrorTexts, error_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from obsdag.context import Context
    from obsdag.core.records import Execution, Failure, Stall
    from obsdag.core.state import RunState
    from obsdag.tasks.base import Task

__all__ = ["LiveTracer"]

WAIT_SPAN_S = 0.1


class _Root:
    """A root's `context` span, open until the last of its tree has ended. base: baggage for its tasks."""

    __slots__ = ("base", "open", "span")

    def __init__(self, span: Span, base: OtelContext) -> None:
        self.span = span
        self.base = base
        self.open = 1


class _Live:
    """What live tracing knows of a context: its root, the span that made it, its latest attempts for links."""

    __slots__ = ("arrived", "latest", "maker", "root", "top")

    def __init__(self, root: _Root, maker: Span | None, top: bool) -> None:
        self.root = root
        self.maker = maker
        self.top = top
        self.latest: dict[int, tuple[SpanContext, str]] = {}
        self.arrived: dict[int, list[SpanContext]] = {}


class _LiveSpan:
    """`Execution.span` in live mode: the SDK's span, what detaches it, and whether it outlives its context."""

    __slots__ = ("is_tail", "span", "token", "trace")

    def __init__(self, span: Span, trace_: _Live, token: Any) -> None:
        self.span = span
        self.trace = trace_
        self.token = token
        self.is_tail = False

    def get_span_context(self) -> SpanContext:
        """The ids of the SDK's span."""
        return self.span.get_span_context()


class LiveTracer(Observer):
    """Traces one run by ordinary spans. `provider`: None takes the host's."""

    needs_records = True
    min_stay_s = WAIT_SPAN_S

    def __init__(
        self,
        run: RunState,
        *,
        engine: str,
        redact: Callable[[str], str] | None = None,
        provider: trace.TracerProvider | None = None,
    ) -> None:
        self.plan = run.plan
        self.engine = engine
        self.dag = run.plan.name
        self._run = run
        self.texts = ErrorTexts(redact)
        self._epoch_ns = int(run.epoch * 1e9)
        self._tracer = trace.get_tracer("obsdag", tracer_provider=provider)
        self._base = OtelContext()
        self._span: Span = trace.INVALID_SPAN

    def unix_ns(self, at: float) -> int:
        """Nanoseconds since 1970 of a time on the run's clock."""
        return self._epoch_ns + int(at * 1e9)

    # --- runs

    def run_started(self, run: RunState, now: float) -> None:
        """Opens the `run` span, a child of the caller's."""
        context = get_current()
        self._base = without_span(context)
        attributes = {"obsdag.engine": self.engine, "obsdag.dag": self.dag}
        attributes |= {"obsdag.run.id": run.id, "obsdag.run.kind": run.kind}
        self._span = self._tracer.start_span(
            f"run {self.dag}", context, attributes=attributes, start_time=self.unix_ns(now), record_exception=False
        )

    def run_finished(self, run: RunState, outcome: str, duration_s: float, now: float) -> None:
        """Ends the `run` span."""
        self._span.set_attribute("obsdag.run.outcome", outcome)
        if outcome in ("failed", "deadlocked", "deadline"):
            self._span.set_attribute("error.type", outcome)
            self._span.set_status(StatusCode.ERROR, outcome)
        self._span.end(self.unix_ns(now))

    def begin_below_run(self, name: str, start: float, attributes: dict[str, Any]) -> Span:
        """A span below the `run` span that began at `start` on the run's clock."""
        above = trace.set_span_in_context(self._span, self._base)
        return self._tracer.start_span(name, above, attributes=attributes, start_time=self.unix_ns(start))

    # --- contexts

    def context_entered(self, context: Context, kind: str, maker: Execution | None, now: float) -> None:
        """Opens a `context` span for a root; a child belongs to its root's, an item of a loop has its own."""
        made_by = maker.span.span if maker is not None and maker.span is not None else None
        parent = context._parent
        looped = maker is not None and maker.task.shape == "loop"
        if parent is not None and not looped and type(parent._trace) is _Live and parent._trace.root.open > 0:
            root: _Root = parent._trace.root
            root.open += 1
            context._trace = _Live(root, made_by, False)
            return
        caller = context._trace if type(context._trace) is Caller else None
        base = caller.base if caller is not None and caller.base is not None else self._base
        links = [_link("run", self._span.get_span_context())]
        if made_by is not None:
            links.append(_link("maker", made_by.get_span_context()))
        if maker is not None and looped and type(maker.context._trace) is _Live:
            links.append(_link("input", maker.context._trace.root.span.get_span_context()))
        if caller is not None and caller.span_context is not None and caller.mode == "link":
            links.append(_link("submitter", caller.span_context))
        above = base
        if caller is not None and caller.parent is not None:
            above = set_span_in_context(trace.NonRecordingSpan(caller.parent), base)
        attributes = self._attributes(context)
        if parent is not None:
            attributes["obsdag.context.parent_id"] = parent.id
        span = self._tracer.start_span(
            f"context {self.dag}",
            above,
            SpanKind.CONSUMER,
            attributes,
            links,
            self.unix_ns(now),
            record_exception=False,
        )
        context._trace = _Live(_Root(span, base), None, True)

    def context_finished(self, context: Context, outcome: str, now: float) -> None:
        """Ends the `context` span once nothing of its tree lives."""
        own: _Live = context._trace
        root = own.root
        if own.top:
            root.span.set_attribute("obsdag.context.outcome", outcome)
            if root.span.is_recording():
                ledger = {f"obsdag.ledger.{state}": spent for state, spent in context.ledger.items() if spent}
                root.span.set_attributes(ledger)
        for execution in context._executions or ():
            live = execution.span
            if type(live) is _LiveSpan and not live.is_tail:
                live.is_tail = True
                root.open += 1
        root.open -= 1
        if own.top and root.open:  # what it made outlives it, and its span covers that too
            root.span.add_event("outcome", {"obsdag.context.outcome": outcome}, self.unix_ns(now))
        own.latest, own.arrived = {}, {}
        self._close(root, now)

    def _close(self, root: _Root, now: float) -> None:
        if root.open == 0:
            root.span.end(self.unix_ns(now))

    def context_failed(self, context: Context, failure: Failure, execution: Execution | None, now: float) -> None:
        """The `context` span of a root that fails is an error."""
        own: _Live = context._trace
        if own.top:
            text = error_text(failure.exception)
            own.root.span.set_attribute("error.type", text.name)
            own.root.span.set_status(StatusCode.ERROR, self.texts.redacted(text.message) or text.name)

    def context_stalled(self, context: Context, stall: Stall, now: float) -> None:
        """The `context` span of a root that stalls is an error, and says where."""
        own: _Live = context._trace
        if own.top:
            span = own.root.span
            span.set_attributes({"obsdag.stall.task": stall.task, "obsdag.stall.missing": tuple(stall.missing)})
            span.set_attribute("error.type", "stalled")
            span.set_status(StatusCode.ERROR, f"stalled at task {stall.task!r}")

    def state_left(self, context: Context, state: int, stayed_s: float, now: float) -> None:
        """A long stay in a waiting state is a span."""
        if stayed_s >= WAIT_SPAN_S and state != State.RUNNING:
            root: _Root = context._trace.root
            start = self.unix_ns(now - stayed_s)
            above = set_span_in_context(root.span, root.base)
            span = self._tracer.start_span(
                f"wait {STATES[state]}", above, attributes=self._attributes(context), start_time=start
            )
            span.end(self.unix_ns(now))

    def join_waiting(self, context: Context, task: Task, now: float) -> None:
        """The child's latest execution is one that the join will link to."""
        more = context._more
        parent = more.lend.parent if more is not None and more.lend is not None else context._parent
        latest = list(context._trace.latest.values())
        if parent is not None and latest and type(parent._trace) is _Live:
            parent._trace.arrived.setdefault(self.plan.index[task.id], []).append(latest[-1][0])

    # --- executions

    def execution_started(self, execution: Execution, now: float) -> None:
        """Opens the `execute` span and makes it current."""
        own: _Live = execution.context._trace
        root, task = own.root, execution.task
        attributes = self._attributes(execution.context)
        attributes |= {
            "obsdag.task": task.id,
            "obsdag.attempt": execution.attempt,
            "obsdag.lane": LANES[execution.lane],
            "obsdag.worker": execution.worker,
            "obsdag.executor": task.runs_on,
        }
        for state, waited_s in enumerate(execution.waits or ()):
            if waited_s > 0.0:
                attributes[f"obsdag.wait_s.{STATES[state]}"] = waited_s
        links = self._links(own, execution, attributes)
        above = set_span_in_context(own.maker or root.span, root.base)
        if task.shape == "loop":  # a pull is a trace of its own: that of an endless input would grow for ever
            above = root.base
            links.append(_link("input", root.span.get_span_context()))
        span = self._tracer.start_span(
            f"execute {task.id}",
            above,
            attributes=attributes,
            links=links,
            start_time=self.unix_ns(now),
            record_exception=False,
        )
        execution.span = _LiveSpan(span, own, attach(set_span_in_context(span, root.base)))

    def _links(self, own: _Live, execution: Execution, attributes: dict[str, Any]) -> list[Link]:
        links = []
        before = own.latest.get(execution.index)
        if before is not None and before[1] != "success":
            links.append(_link("retry", before[0]))
        above = self.plan.up_list[execution.index]
        joined = [own.latest[up][0] for up in above if up in own.latest] if len(above) > 1 else []
        joined += own.arrived.get(execution.index, ())
        if joined:
            attributes["obsdag.join.upstream_count"] = len(joined)
        return (links + [_link("upstream", each) for each in joined])[:MAX_LINKS]

    def execution_finished(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        """Ends the `execute` span."""
        live: _LiveSpan = execution.span
        detach(live.token)
        span, own = live.span, live.trace
        span.set_attribute("obsdag.execution.outcome", outcome)
        if error is not None and outcome in ("error", "timeout"):
            text = error_text(error)
            span.set_attribute("error.type", text.name)
            span.add_event("exception", self.texts.attributes(error), self.unix_ns(now))
            span.set_status(StatusCode.ERROR, self.texts.redacted(text.message) or text.name)
        span.end(self.unix_ns(execution.ended))
        if live.is_tail:
            own.root.open -= 1
            self._close(own.root, now)
        else:
            own.latest.pop(execution.index, None)
            own.latest[execution.index] = (span.get_span_context(), outcome)

    # --- attributes

    def _attributes(self, context: Context) -> dict[str, Any]:
        return {"obsdag.engine": self.engine, "obsdag.dag": self.dag, "obsdag.context.id": context.id}


def _link(kind: str, context: SpanContext) -> Link:
    return Link(context, {"obsdag.link.type": kind})
