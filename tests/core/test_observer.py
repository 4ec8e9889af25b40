"""What observers are told of, where they say that they need less (ARCHITECTURE, idea 2)."""

from __future__ import annotations

from typing import ClassVar

from obsdag import DAG, Context, Executor, ExecutorConfig, Observer, RateLimit
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
