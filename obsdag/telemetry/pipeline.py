"""Where kept traces go: a bounded buffer, a thread that builds spans for the processors, and flushing in time.

States of a kept root here: *waiting* (kept, still under way: looked at once `LINGER_S` has passed, so that its spans
go out in batches and a root that ends meanwhile has its critical path marked), *ready* (ended, or due), gone. Nothing
in here is on the way of a run: the event loop's thread only appends to a deque and takes an uncontended lock.

The thread starts with the first kept root, and ends when nothing is left to do and no run needs it. Shutdown steps:
(1) everything waiting becomes ready, (2) the thread hands it to the processors, (3) it calls their `force_flush`,
which may block for longer than it promises, (4) whoever waits stops waiting at the deadline.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context as OtelContext
from opentelemetry.context import attach, detach

from obsdag.core.states import LANES, State
from obsdag.telemetry.executions import taken
from obsdag.telemetry.export import QueueProcessor
from obsdag.telemetry.materialize import build_marker, build_spans
from obsdag.telemetry.sampling import KeepBudget, RunningQuantile
from obsdag.telemetry.selfstats import Kept

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

    from obsdag.telemetry.deferred import DeferredTracer
    from obsdag.telemetry.records import RootTrace
    from obsdag.telemetry.selfstats import SelfStats

__all__ = ["LINGER_S", "Pipeline"]

LINGER_S: Final = 0.5
"""How long a kept root that is still under way collects spans before they are exported."""
TICK_S: Final = 0.1
"""How often the thread looks: a kept root that ended is exported after at most this long."""
IDLE_S: Final = 1.0
EXIT_FLUSH_S: Final = 2.0
_QUEUED: Final = State.QUEUED.value
MAX_CALLS: Final = 1_000
"""Spans of runs, and markers, that wait: beyond this many a processor is blocked, and further ones are lost."""
_SUPPRESS: Final[str] = getattr(otel_context, "_SUPPRESS_INSTRUMENTATION_KEY", "suppress_instrumentation")
_log = logging.getLogger("obsdag.tracing")


class Pipeline:
    """The buffer and thread of one `Tracing`, shared by the runs that use it.

    places: how many buffered spans there may be (`max_buffered_spans`, `max_buffered_bytes`); runs take and give back
    places in blocks, so that the hot path does not lock. linger_s: see `LINGER_S`.
    """

    def __init__(
        self, processors: Iterable[SpanProcessor], places: int, budget_per_s: float, linger_s: float = LINGER_S
    ) -> None:
        self.processors = list(processors)
        self.places = places
        self.linger_s = linger_s
        self.lock = threading.Lock()
        self.budget = KeepBudget(budget_per_s)
        self.quantiles: dict[str, RunningQuantile] = {}
        self._taken = 0
        self._tracers: list[DeferredTracer] = []
        self._waiting: deque[tuple[float, RootTrace]] = deque()
        self._ready: deque[RootTrace] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._flushes: deque[_Flush] = deque()
        self._stats: SelfStats | None = None
        self._used = False

    # --- runs

    def opened(self, tracer: DeferredTracer) -> None:
        """A run begins; if slow contexts are to be found, the thread looks for them."""
        with self.lock:
            self._tracers.append(tracer)
            self._stats = tracer.stats
        if tracer.hunts_slow:
            self._ensure_thread()

    def closed(self, tracer: DeferredTracer) -> None:
        """A run is over: what it kept is ready, and the thread may end."""
        with self.lock:
            if tracer in self._tracers:
                self._tracers.remove(tracer)
        if not self._tracers:
            self._wake.set()

    def quantile_of(self, dag: str) -> RunningQuantile:
        """The running p99 of a DAG, shared by its runs."""
        with self.lock:
            return self.quantiles.setdefault(dag, RunningQuantile())

    # --- places

    def take_places(self, count: int, reserve: bool = False) -> bool:
        """Takes `count` places; False if there are not so many. A tenth more is in reserve for failures."""
        with self.lock:
            if self._taken + count > self.places + (self.places // 10 + 100 if reserve else 0):
                return False
            self._taken += count
            return True

    def give_places(self, count: int) -> None:
        """Gives places back."""
        with self.lock:
            self._taken -= count

    def buffered(self) -> int:
        """Spans in the buffer now."""
        with self.lock:
            return max(0, self._taken - sum(max(0, tracer.room) for tracer in self._tracers))

    # --- kept roots; called with or without the lock held by nobody else's rule: deques are atomic

    def kept(self, root: RootTrace) -> None:
        """A root is kept and has records: it is looked at in a while, or at once if it has ended."""
        more = root.rare()
        if more.finished:
            self._ready.append(root)
        elif not more.scheduled:
            more.scheduled = True
            self._waiting.append((time.monotonic() + self.linger_s, root))
        self._ensure_thread()

    def submit(self, call: Callable[[], None]) -> bool:
        """Has the thread make a call: handing a run's span or a marker to processors. False if too many wait."""
        if len(self._calls) >= MAX_CALLS:
            return False
        self._calls.append(call)
        self._ensure_thread()
        return True

    def emit(self, *spans: ReadableSpan) -> None:
        """Gives spans to every processor; one that raises does not keep them from the others."""
        for processor in self.processors:
            if type(processor) is QueueProcessor:
                processor.take(spans)
                continue
            for span in spans:
                try:
                    processor.on_end(span)
                except Exception:
                    _log.debug("a span processor raised", exc_info=True)

    # --- flushing

    def flush(self, timeout_s: float) -> bool:
        """Exports what is kept so far; False if that was not done within `timeout_s`. Blocks for at most so long."""
        return self._wait(timeout_s, shutdown=False)

    def shutdown(self, timeout_s: float) -> bool:
        """Flushes and shuts the processors down; blocks for at most `timeout_s`."""
        return self._wait(timeout_s, shutdown=True)

    def begin_flush(self, timeout_s: float, done: Callable[[bool], None], shutdown: bool = False) -> bool:
        """Has the thread export what is kept and flush (or shut down) the processors, then call `done(in time)` there.

        False, and `done` is never called, if nothing was ever handed over or no thread can start any more.
        """
        if not self._used and not shutdown:
            return False
        self._flushes.append(_Flush(time.monotonic() + timeout_s, done, shutdown))
        if not self._ensure_thread():
            return False
        self._wake.set()
        return True

    def _wait(self, timeout_s: float, shutdown: bool) -> bool:
        ended, results = threading.Event(), [False]

        def done(in_time: bool) -> None:
            results[0] = in_time
            ended.set()

        if not self.begin_flush(timeout_s, done, shutdown):
            return True
        return ended.wait(timeout_s) and results[0]

    def _run_flushes(self) -> None:
        while self._flushes:
            flush = self._flushes.popleft()
            self._export_due(all_of_it=True)  # what was kept before this was asked for, maybe during the one before
            results = [self._flush_one(processor, flush) for processor in self.processors]
            flush.done(all(results))

    def _flush_one(self, processor: SpanProcessor, flush: _Flush) -> bool:
        left_s = max(0.05, flush.deadline - time.monotonic())
        if flush.shutdown:
            left_s *= 0.9  # so that what is lost is counted before nobody waits any more
        try:
            in_time = processor.force_flush(int(left_s * 1000)) is not False
            if flush.shutdown:
                processor.shutdown()
        except Exception:
            _log.debug("a span processor raised", exc_info=True)
            return True  # it will not do better for being waited for
        return in_time

    def _pending(self) -> bool:
        return bool(self._ready or self._waiting or self._calls or self._flushes)

    # --- the thread

    def _ensure_thread(self) -> bool:
        thread = self._thread
        if thread is not None and thread.is_alive():
            return True
        with self.lock:
            if self._thread is not None and self._thread.is_alive():
                return True
            if not self._used:
                self._used = True
                atexit.register(self._at_exit)
            thread = threading.Thread(target=self._work, name="obsdag-traces", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is shutting down
                return False
            self._thread = thread
            return True

    def _at_exit(self) -> None:
        """The last chance, for programs that end in the middle of a run; after a run's own flush the thread is gone."""
        if self._thread is not None and self._thread.is_alive():
            self.flush(EXIT_FLUSH_S)

    def _work(self) -> None:
        idle_since = time.monotonic()
        token = attach(OtelContext({_SUPPRESS: True}))  # an exporter's own HTTP calls are not to be traced
        try:
            while True:
                self._wake.wait(TICK_S)
                self._wake.clear()
                if self._turn():
                    idle_since = time.monotonic()
                if self._may_end(idle_since):
                    return
        finally:
            detach(token)

    def _may_end(self, idle_since: float) -> bool:
        """Whether the thread ends now; decided under the lock, so that nobody relies on it meanwhile."""
        with self.lock:
            if self._pending() or any(tracer.hunts_slow for tracer in self._tracers):
                return False
            if self._tracers and time.monotonic() - idle_since < IDLE_S:
                return False
            self._thread = None
            return True

    def _turn(self) -> bool:
        """Looks for slow contexts, then exports what is due; whether there was anything."""
        began, worked = time.thread_time(), False
        try:
            for tracer in tuple(self._tracers):
                if tracer.hunts_slow:
                    tracer.hunt()
            worked = self._export_due()
            self._run_flushes()
        except Exception:
            _log.debug("tracing failed to export", exc_info=True)
        if worked and self._stats is not None:
            self._stats.spend("traces", time.thread_time() - began)
        return worked

    def _export_due(self, all_of_it: bool = False) -> bool:
        now, worked = time.monotonic(), False
        while self._waiting and (all_of_it or self._flushes or not self._tracers or self._waiting[0][0] <= now):
            self._ready.append(self._waiting.popleft()[1])
        while self._calls:
            call = self._calls.popleft()
            worked = True
            try:
                call()
            except Exception:
                _log.debug("a deferred export failed", exc_info=True)
        while self._ready:
            worked = True
            self._export(self._ready.popleft())
        return worked

    def _export(self, root: RootTrace) -> None:
        """Builds and hands over what a kept root has now; its places are free again afterwards."""
        tracer: DeferredTracer = root.tracer
        more = root.rare()
        with self.lock:
            more.scheduled = False
            records = taken(root.records)
            held, more.held = more.held, []
            units, more.units = more.units, 0
            finished, more.finished = more.finished, False
        try:
            self.emit(*build_spans(tracer, root, records, finished))
            for release, span in held:
                release(span)
            self._tell_kept(tracer, root, records, finished)
        finally:
            self.give_places(len(records) + len(held) + units + (1 if finished else 0))
            if finished:
                more.latest.clear()
                more.joins.clear()

    def emit_marker(self, root: RootTrace, now: float, running: tuple[str, ...], state: str) -> None:
        """Exports the sign that a context is still under way (see `build_marker`)."""
        tracer: DeferredTracer = root.tracer
        if not self.submit(lambda: self.emit(build_marker(tracer, root, now, running, state))):
            tracer.stats.drop("traces", "buffer_cap", dag=tracer.dag)

    def _tell_kept(
        self, tracer: DeferredTracer, root: RootTrace, records: list[tuple[Any, ...]], finished: bool
    ) -> None:
        """For exemplars: metrics lead to what is exported, and to nothing else."""
        listeners = tracer.stats.on_kept
        if not listeners:
            return
        told: list[Kept] = []
        dag, epoch, tasks = tracer.dag, tracer.epoch, tracer.plan.tasks
        for record in records:
            if record[0] is None:
                continue
            span, index, _, started, ended, _, lane, waits, _, _ = record
            trace_id, span_id, unix_s = span.trace_id, span.id, epoch + ended
            told.append(Kept("task", dag, tasks[index].id, ended - started, trace_id, span_id, unix_s))
            if waits is not None and waits[_QUEUED] > 0.0:
                told.append(Kept("queue", dag, LANES[lane], waits[_QUEUED], trace_id, span_id, unix_s))
        if finished and root.more is not None and root.more.outcome:
            more = root.more
            ids = (root.first.trace_id, root.first.span_id, tracer.epoch + more.ended)
            told.append(Kept("root", tracer.dag, more.outcome, more.ended - root.entered, *ids))
        for listener in listeners:
            listener(told)


class _Flush:
    """A request to flush: until when (monotonic), whom to tell, and whether the processors are shut down afterwards."""

    __slots__ = ("deadline", "done", "shutdown")

    def __init__(self, deadline: float, done: Callable[[bool], None], shutdown: bool) -> None:
        self.deadline = deadline
        self.done = done
        self.shutdown = shutdown
