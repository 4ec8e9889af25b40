"""What observers are told of, where they say that they need less (ARCHITECTURE, idea 2)."""

from __future__ import annotations

import asyncio
from inspect import signature
from typing import Any, ClassVar

import pytest

from obsdag import DAG, Context, Executor, ExecutorConfig, Observer, RateLimit, RunResult, Telemetry
from obsdag.core.observer import FACTS, Facts
from obsdag.core.records import Execution
from obsdag.core.state import RunState
from obsdag.core.states import STATES
from obsdag.testing import run_virtual


class Stays(Observer):
    """The stays that it is told of."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float]] = []

    def state_left(self, context: Context, state: int, stayed_s: float, now: float) -> None:
        self.told.append((STATES[state], stayed_s))


class LongStays(Stays):
    min_stay_s: ClassVar[float] = 1.0  # type: ignore[misc]


def stays_of(*observers: Observer) -> None:
    dag = DAG()

    @dag.task(limiter=RateLimit(1, per=2.0))
    async def paced(ctx: Context) -> Context:
        return ctx

    executor = Executor(dag, config=ExecutorConfig(context_worker_num=2, observers=observers))
    run_virtual(executor.run([{}, {}]))


def test_who_wants_long_stays_only_is_not_told_of_short_ones() -> None:
    long_stays = LongStays()
    stays_of(long_stays)
    assert long_stays.told == [("limit_wait", 2.0)]


def test_who_wants_all_stays_is_told_of_all_beside_one_that_does_not() -> None:
    all_stays, long_stays = Stays(), LongStays()
    stays_of(all_stays, long_stays)
    assert ("running", 0.0) in all_stays.told
    assert all_stays.told == long_stays.told


class Ends(Observer):
    """The ends of executions and the beginnings of visits that it is told of; some executions are watched."""

    watched: ClassVar[frozenset[int]] = frozenset()

    def __init__(self) -> None:
        self.ends: list[tuple[str, int, str]] = []
        self.waits: list[float] = []
        self.run: RunState | None = None

    def run_started(self, run: RunState, now: float) -> None:
        self.run = run

    def execution_started(self, execution: Execution, now: float) -> None:
        execution.watched = execution.context["n"] in self.watched

    def execution_finished(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        self.ends.append((execution.task.id, execution.context["n"], outcome))

    def visit_started(self, context: Context, worker: int, lane: int, waited_s: float, now: float) -> None:
        self.waits.append(waited_s)


class SlowEnds(Ends):
    quick_s: ClassVar[float] = 1.0  # type: ignore[misc]


class SlowAndWatchedEnds(SlowEnds):
    watched: ClassVar[frozenset[int]] = frozenset({1, 2})


def ends_of(*observers: Observer) -> RunResult:
    """Context 0 is quick, 1 quick, 2 takes two seconds in its second task, 3 fails at once in its second."""
    dag = DAG()

    @dag.task
    async def first(ctx: Context) -> Context:
        return ctx

    @dag.task(after=first)
    async def second(ctx: Context) -> Context:
        if ctx["n"] == 2:
            await asyncio.sleep(2.0)
        if ctx["n"] == 3:
            raise ValueError("no")
        return ctx

    # Alone: who asked for `obsdag.logs.add_context` before has an observer in every run that wants all ends.
    config = ExecutorConfig(context_worker_num=1, telemetry=Telemetry.off(), observers=observers)
    result: RunResult = run_virtual(Executor(dag, config=config).run([{"n": n} for n in range(4)]))
    return result


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (SlowEnds, [("second", 2, "success"), ("second", 3, "error")]),
        (
            SlowAndWatchedEnds,
            [
                *(("first", 1, "success"), ("second", 1, "success")),
                *(("first", 2, "success"), ("second", 2, "success"), ("second", 3, "error")),
            ],
        ),
    ],
)
def test_who_wants_slow_ends_only_is_told_of_those_of_failures_and_of_what_it_watches(
    kind: type[Ends], told: list[Any]
) -> None:
    observer = kind()
    result = ends_of(observer)

    assert observer.ends == told
    assert observer.run is not None
    assert sum(observer.run.told_executions) == len(told)
    assert sum(observer.run.quick_executions) == 8 - len(told)
    assert sum(observer.run.task_executions) == 8
    assert sum(observer.run.task_seconds) == 2.0
    assert result.counts["output"] == 3


def test_who_wants_all_waits_has_the_others_told_of_all() -> None:
    everything, slow = Ends(), SlowEnds()
    ends_of(everything, slow)
    assert len(everything.waits) == len(slow.waits) == 4


def test_waits_that_nobody_wants_to_know_are_counted_by_lane() -> None:
    observer = SlowEnds()
    ends_of(observer)
    assert observer.waits == []
    assert observer.run is not None
    assert observer.run.quick_visits == [0, 4, 0]
    assert sum(observer.run.busy_s) == 2.0
    assert set(observer.run.visit_since) == {-1.0}


class Marked(Execution):
    """With room for a mark."""

    __slots__ = ("mark",)

    mark: str


class Marking(Observer):
    execution_class = Marked

    def __init__(self) -> None:
        self.marks: list[str] = []

    def execution_started(self, execution: Execution, now: float) -> None:
        assert isinstance(execution, Marked)
        execution.mark = execution.task.id

    def execution_finished(self, execution: Execution, outcome: str, error: BaseException | None, now: float) -> None:
        assert isinstance(execution, Marked)
        self.marks.append(execution.mark)


def test_an_observer_may_have_room_of_its_own_on_every_execution() -> None:
    observer = Marking()
    ends_of(observer)
    assert sorted(observer.marks) == ["first"] * 4 + ["second"] * 4


class Guarding(Observer):
    """Guards what it is told at the beginning of an execution, and cannot take it."""

    guarded = frozenset({"execution_started"})

    def __init__(self) -> None:
        self.run: RunState | None = None
        self.calls = 0

    def run_started(self, run: RunState, now: float) -> None:
        self.run = run

    def execution_started(self, execution: Execution, now: float) -> None:
        try:
            self.calls += 1
            raise RuntimeError("cannot")
        except RuntimeError as error:
            assert self.run is not None
            if not self.run.facts.detach(self, "execution_started", error):
                raise


class Failures(Observer):
    def __init__(self) -> None:
        self.told: list[tuple[Observer, str, str]] = []

    def observer_failed(self, observer: Observer, fact: str, error: BaseException) -> None:
        self.told.append((observer, fact, str(error)))


@pytest.mark.parametrize("others", [(), (Marking,)])
def test_an_observer_that_guards_a_fact_itself_is_detached_like_any_other(others: tuple[type[Observer], ...]) -> None:
    guarding, failures = Guarding(), Failures()
    result = ends_of(guarding, failures, *(other() for other in others))

    assert guarding.calls == 1
    assert failures.told == [(guarding, "execution_started", "cannot")]
    assert guarding.run is not None
    assert guarding.run.facts.failures == 1
    assert result.counts["output"] == 3


class Duck:
    """No `Observer`, but it has one fact's method, which is enough."""

    def __init__(self) -> None:
        self.started = 0

    def execution_started(self, execution: Execution, now: float) -> None:
        self.started += 1


def test_an_observer_need_not_be_one_by_its_class() -> None:
    duck: Any = Duck()
    ends_of(duck)
    assert duck.started == 8


def test_who_wants_all_ends_does_not_have_the_others_told_of_quick_ones() -> None:
    all_ends, slow = Ends(), SlowEnds()
    ends_of(all_ends, slow)

    assert sorted(all_ends.ends) == sorted(
        [
            *(("first", n, "success") for n in range(4)),
            *(("second", n, "success") for n in range(3)),
            ("second", 3, "error"),
        ]
    )
    assert slow.ends == [("second", 2, "success"), ("second", 3, "error")]
    assert slow.run is not None
    assert slow.run.told_executions[1:3] == [0, 2]
    assert slow.run.quick_executions[1:3] == [4, 2]


def test_who_fails_at_a_quick_end_is_not_told_again_and_the_others_are() -> None:
    class Fails(Ends):
        def execution_finished(
            self, execution: Execution, outcome: str, error: BaseException | None, now: float
        ) -> None:
            self.ends.append((execution.task.id, execution.context["n"], outcome))
            raise RuntimeError("a bug")

    fails, all_ends, slow = Fails(), Ends(), SlowEnds()
    ends_of(fails, all_ends, slow)

    assert len(fails.ends) == 1
    assert len(all_ends.ends) == 8
    assert slow.ends == [("second", 2, "success"), ("second", 3, "error")]


@pytest.mark.parametrize("fact", sorted(set(FACTS) - {"observer_failed"}))
def test_after_one_that_raises_the_next_is_told_the_same(fact: str) -> None:
    told: list[tuple[Any, ...]] = []

    def fails(self: Observer, *facts: Any) -> None:
        raise RuntimeError("a bug")

    first = type("First", (Observer,), {fact: fails})()
    second = type("Second", (Observer,), {fact: lambda self, *given: told.append(given)})()
    given = tuple(object() for _ in list(signature(getattr(Observer, fact)).parameters)[1:])
    facts = Facts([first, second])
    getattr(facts, fact)(*given)
    getattr(facts, fact)(*given)

    assert told == [given, given]
    assert facts.failures == 1


def test_one_that_guards_itself_and_raises_beside_others_does_not_reach_the_engine() -> None:
    class Guards(Ends):
        guarded: ClassVar[frozenset[str]] = frozenset({"execution_finished"})  # type: ignore[misc]
        facts: ClassVar[list[Facts]] = []

        def run_started(self, run: RunState, now: float) -> None:
            self.facts.append(run.facts)

        def execution_finished(
            self, execution: Execution, outcome: str, error: BaseException | None, now: float
        ) -> None:
            self.ends.append((execution.task.id, execution.context["n"], outcome))
            problem = RuntimeError("a bug")
            if not self.facts[0].detach(self, "execution_finished", problem):
                raise problem

    guards, slow = Guards(), SlowEnds()
    result = ends_of(guards, slow)

    assert result.counts["output"] == 3
    assert len(guards.ends) == 1
    assert slow.ends == [("second", 2, "success"), ("second", 3, "error")]
