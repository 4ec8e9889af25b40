"""The parts of tracing on their own: ids, budget, quantile, carriers."""

from __future__ import annotations

import itertools
import random
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage
from opentelemetry import context as otel_context
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, SpanContext, TraceFlags, get_current_span, use_span

from obsdag import ConfigError
from obsdag.telemetry.attach import SPAN_KEY
from obsdag.telemetry.carrier import Caller, capture_caller, carry, inject, remote_span, returning
from obsdag.telemetry.executions import TracedExecution, record_of, taken
from obsdag.telemetry.records import ExecutionSpan, RootTrace, new_span_id, new_trace_id, span_in
from obsdag.telemetry.sampling import KeepBudget, RunningQuantile, ratio_bound
from tests.telemetry.corerun import CoreRun

LOW = (1 << 64) - 1


# --- ids


def test_ids_do_not_repeat_when_a_user_seeds_random() -> None:
    random.seed(7)
    first = [new_trace_id() for _ in range(100)] + [new_span_id() for _ in range(100)]
    random.seed(7)
    second = [new_trace_id() for _ in range(100)] + [new_span_id() for _ in range(100)]

    assert len({*first, *second}) == 400
    assert all(first)


# --- the current context


def test_the_context_of_an_execution_looks_like_any_other() -> None:
    base = baggage.set_baggage("tenant", "blue", otel_context.Context())
    context = span = span_in(RootTrace.begun(None, 1, 0.0, 10), 1, base)
    (key,) = base
    plain = otel_context.Context({**base, SPAN_KEY: span})

    assert get_current_span(context) is span
    assert baggage.get_baggage("tenant", context) == "blue"
    assert context
    assert context == span != plain
    assert dict(context) == {**context} == dict(plain)
    assert (list(context), len(context)) == ([key, SPAN_KEY], 2)
    assert list(context.keys()) == [key, SPAN_KEY]
    assert list(context.items()) == list(plain.items())
    assert list(context.values()) == list(plain.values())
    assert context[SPAN_KEY] is span
    assert SPAN_KEY in context
    assert "other" not in context
    assert context.get("other", 3) == 3
    with pytest.raises(KeyError):
        context["other"]
    changed = otel_context.set_value("more", 1, context)
    assert get_current_span(changed) is span
    assert baggage.get_baggage("tenant", changed) == "blue"


def test_an_execution_is_a_context_too_whose_span_is_made_when_somebody_looks() -> None:
    run = CoreRun()
    execution = TracedExecution.begun(run.enter(), 1, 1, 0.0, 0)
    execution.trace = RootTrace.begun(None, 1, 0.0, 10)
    context: Any = execution
    assert execution.span is None
    assert not execution.watched

    span = get_current_span(context)
    plain = otel_context.Context({SPAN_KEY: span})

    assert type(span) is ExecutionSpan
    assert execution.span is span
    assert execution.watched
    assert context
    assert context == execution != plain
    assert hash(context) == hash(execution)
    assert dict(context) == {**context} == dict(plain)
    assert (list(context), len(context)) == ([SPAN_KEY], 1)
    assert list(context.items()) == list(plain.items())
    assert context[SPAN_KEY] is span
    assert SPAN_KEY in context
    assert "other" not in context
    assert context.get("other", 3) == 3
    with pytest.raises(KeyError):
        context["other"]
    changed = otel_context.set_value("more", 1, context)
    assert get_current_span(changed) is span
    assert otel_context.get_value("more", changed) == 1
    assert not span.ended
    execution.outcome = "success"
    assert span.ended


def test_what_has_failed_is_taken_only_with_its_error() -> None:
    run = CoreRun()
    executions = [TracedExecution.begun(run.enter(), 1, attempt, 0.0, 0) for attempt in (1, 2, 3)]
    for execution, outcome in zip(executions, ("success", "error", None), strict=True):
        execution.trace = RootTrace.begun(None, 1, 0.0, 10)
        execution.outcome = outcome
    records: list[Any] = [*executions, record_of(executions[1], ValueError())]

    found = taken(records)

    assert [(record[2], record[8]) for record in found] == [(1, "success"), (2, "error")]
    assert records == executions[1:]


# --- ratio


@given(st.integers(1, (1 << 128) - 1), st.floats(0.0, 1.0))
def test_the_ratio_agrees_with_the_sdk(trace_id: int, rate: float) -> None:
    sampled = TraceIdRatioBased(rate).should_sample(None, trace_id, "any").decision is Decision.RECORD_AND_SAMPLE

    assert ((trace_id & LOW) < ratio_bound(rate)) is sampled


# --- budget


@given(st.floats(0.05, 50.0), st.lists(st.floats(0.0, 2.0), max_size=200))
def test_the_budget_keeps_no_more_than_it_says_and_one_per_interval(per_s: float, gaps: list[float]) -> None:
    budget, now = KeepBudget(per_s), 1_000.0
    times = []
    for gap in gaps:
        now += gap
        times.append((now, budget.take(("dag", "task", "Error"), now)))

    interval_s = max(1.0, 1.0 / per_s)
    kept = [when for when, is_kept in times if is_kept]
    if times:
        assert times[0][1]
        intervals = (times[-1][0] - times[0][0]) / interval_s + 1
        assert len(kept) <= max(1, int(per_s)) * intervals
    for before, after in itertools.pairwise(kept):
        between = [when for when, _ in times if before < when < after]
        assert all(when - before < 2 * interval_s for when in between)


def test_budgets_of_different_troubles_are_apart() -> None:
    budget = KeepBudget(1)

    assert budget.take(("dag", "a", "ValueError"), 0.0)
    assert budget.take(("dag", "b", "ValueError"), 0.0)
    assert budget.take(("dag", "a", "KeyError"), 0.0)
    assert not budget.take(("dag", "a", "ValueError"), 0.5)
    assert budget.take(("dag", "a", "ValueError"), 1.0)


def test_endless_error_types_share_one_budget_in_the_end() -> None:
    budget = KeepBudget(1)
    kept = [budget.take(("dag", "a", f"Error{number}"), 0.0) for number in range(5_000)]

    assert sum(kept) == 1_001
    assert len(budget._windows) == 1_001


# --- quantile


def test_the_quantile_says_nothing_of_a_few() -> None:
    quantile = RunningQuantile()
    for _ in range(99):
        quantile.observe(0.1)
    assert quantile.limit_s is None
    quantile.observe(0.1)
    assert quantile.limit_s == pytest.approx(0.1, rel=0.11)


def test_the_quantile_is_right_to_a_bucket_and_follows_the_present() -> None:
    quantile, chance = RunningQuantile(), random.Random(1)
    seen = [chance.lognormvariate(-3.0, 1.0) for _ in range(5_000)]
    for seconds in seen:
        quantile.observe(seconds)
    exact = sorted(seen)[int(0.99 * len(seen))]
    assert quantile.limit_s is not None
    assert exact <= quantile.limit_s * 1.05
    assert quantile.limit_s <= exact * 1.25

    for _ in range(100_000):
        quantile.observe(10.0)
    assert quantile.limit_s >= 10.0


@given(st.lists(st.floats(0.0, 1e6), min_size=100, max_size=300))
def test_the_quantile_takes_any_duration(durations: list[float]) -> None:
    quantile = RunningQuantile()
    for seconds in durations:
        quantile.observe(seconds)

    assert quantile.limit_s is not None
    assert quantile.limit_s > 0.0


# --- carriers

TRACEPARENT = f"00-{0xABC:032x}-{0xDEF:016x}-01"


def test_S4_a_carrier_is_read_whatever_the_case_of_its_names() -> None:
    caller = capture_caller({"Traceparent": TRACEPARENT, "TRACESTATE": "vendor=1", "Baggage": "tenant=blue"})

    assert caller is not None
    assert caller.parent is not None
    assert (caller.parent.trace_id, caller.parent.span_id) == (0xABC, 0xDEF)
    assert caller.parent.trace_flags.sampled
    assert caller.trace_state_of(0xABC).to_header() == "vendor=1"
    assert caller.trace_state_of(0x123).to_header() == ""
    assert baggage.get_baggage("tenant", caller.base) == "blue"
    assert get_current_span(caller.base) is INVALID_SPAN


@pytest.mark.parametrize("carrier", [{}, {"traceparent": "00-nonsense"}, {"traceparent": f"00-{0:032x}-{0:016x}-01"}])
def test_S4_nothing_to_carry_is_nobody(carrier: dict[str, str]) -> None:
    assert capture_caller(carrier) is None
    assert capture_caller() is None


def test_S4_the_current_span_is_the_caller_without_a_carrier() -> None:
    with use_span(NonRecordingSpan(SpanContext(1, 2, False, TraceFlags(0)))):
        caller = capture_caller(mode="link")

    assert caller is not None
    assert caller.parent is None
    assert caller.span_context == SpanContext(1, 2, False, TraceFlags(0))


def test_S4_another_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="'child' or 'link'"):
        Caller(None, "sibling")


def test_T12_without_deferred_tracing_the_current_span_is_carried() -> None:
    with use_span(NonRecordingSpan(SpanContext(0xABC, 0xDEF, False, TraceFlags(1)))):
        assert inject(None) == {"traceparent": TRACEPARENT}
    assert inject(None) == {}


@pytest.mark.parametrize(("name", "value"), [("file", "a\udcff"), ("\udcff", "a")])
def test_T12_baggage_that_utf8_has_no_form_of_is_left_out(name: str, value: str) -> None:
    token = otel_context.attach(baggage.set_baggage(name, value, baggage.set_baggage("customer", "c7")))
    try:
        with use_span(NonRecordingSpan(SpanContext(0xABC, 0xDEF, False, TraceFlags(1)))):
            assert inject(None) == carry() == {"traceparent": TRACEPARENT, "baggage": "customer=c7"}
            assert baggage.get_baggage(name) == value, "it is there where it is"
    finally:
        otel_context.detach(token)


def test_T12_the_far_side_goes_on_and_sends_back_plain_values() -> None:
    before = otel_context.get_current()
    with remote_span({"traceparent": TRACEPARENT, "baggage": "tenant=blue"}) as span:
        assert get_current_span() is span
        assert baggage.get_baggage("tenant") == "blue"
        current: Any = get_current_span()
        current.set_attributes({"rows": 3, "object": object(), "list": [1, 2]})
        current.record_exception(ValueError("secret"))
    (extra,) = returning()

    assert b"secret" not in extra
    assert b'"rows": 3' in extra
    assert b"object" not in extra
    assert returning() == []
    assert otel_context.get_current() is before


def test_T12_no_trace_and_nothing_said_sends_nothing_back() -> None:
    with remote_span({}) as span:
        assert span is None
    with remote_span({"traceparent": TRACEPARENT}):
        pass

    assert returning() == []


def test_ids_of_one_span_are_the_same_in_all_threads() -> None:
    for _ in range(200):
        span = span_in(RootTrace.begun(None, 1, 0.0, 10), 1)
        meeting, found = threading.Barrier(4), []

        def ask(span: Any = span, meeting: Any = meeting, found: Any = found) -> None:
            meeting.wait()
            found.append(span.id)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1
