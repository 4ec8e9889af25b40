"""The book against a slow model, right by reading: no lines, no timers, no sums; every answer comes from history."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from obsdag.limits import MAKE, ConcurrencyLimit, Limit, LimitBook, LimitRequest, RateLimit, ResourcePool
from tests.limits.owners import Run

TICK = Fraction(1, 8)  # all times are multiples of it, and so exact as floats
RATES = (RateLimit(1), RateLimit(2), RateLimit(1, 1.0, 2), RateLimit(4, 1.0, 3), RateLimit(4, 2.0, 4))
COUNTED = (ConcurrencyLimit(1), ConcurrencyLimit(3), ResourcePool(["a", "b"]), ResourcePool(object, size=2))
LIMITS: tuple[Limit, ...] = RATES + COUNTED


@dataclass(eq=False)
class Wish:
    """A request as the model sees it."""

    limits: tuple[Limit, ...]
    owner: Run
    state: str = "waiting"
    holds: set[Limit] = field(default_factory=set)


class Model:
    """Wishes in order of asking, and the permits of each rate in order of granting, with their times."""

    def __init__(self) -> None:
        self.wishes: list[Wish] = []
        self.permits: dict[Limit, list[tuple[Fraction, Wish]]] = {limit: [] for limit in RATES}
        self.unused: set[tuple[Limit, Wish]] = set()
        self.now = Fraction(0)

    def next_at(self, limit: Limit) -> Fraction | float:
        """When a permit is there, if nobody else asks: infinity if somebody has to give one back first."""
        if isinstance(limit, RateLimit):
            return self._bucket_has_one_at(limit)
        most = limit.n if isinstance(limit, ConcurrencyLimit) else len(limit.items) or limit.size or 0  # type: ignore[attr-defined]
        return self.now if sum(limit in wish.holds for wish in self.wishes) < most else math.inf

    def _bucket_has_one_at(self, limit: RateLimit) -> Fraction:
        burst, spacing = limit.burst or 1, Fraction(limit.per) / limit.n
        tokens, before = Fraction(burst), Fraction(0)
        for at, _ in self.permits[limit]:
            tokens = min(Fraction(burst), tokens + (at - before) / spacing) - 1
            assert tokens >= 0
            before = at
        return max(self.now, before + (1 - tokens) * spacing) if tokens < 1 else self.now

    def first(self) -> list[Wish]:
        """Those who wait and have nobody before them in the line of any of their limits."""
        taken: set[Limit] = set()
        found = []
        for wish in self.wishes:
            if wish.state == "waiting":
                if taken.isdisjoint(wish.limits):
                    found.append(wish)
                taken.update(wish.limits)
        return found

    def settle(self) -> list[Wish]:
        """Grant until nobody can be granted any more; who was, in that order."""
        granted = []
        while able := [wish for wish in self.first() if all(self.next_at(limit) <= self.now for limit in wish.limits)]:
            for wish in able:
                wish.state = "held"
                wish.holds.update(wish.limits)
                for limit in wish.limits:
                    if isinstance(limit, RateLimit):
                        self.permits[limit].append((self.now, wish))
            granted += able
        return granted

    def release(self, wish: Wish, unused: bool) -> None:
        if wish.state == "held" and unused:
            for limit in wish.limits:
                self.unused.add((limit, wish))
        for limit, permits in self.permits.items():
            while permits and (limit, permits[-1][1]) in self.unused:
                permits.pop()
        wish.state = "done"
        wish.holds.clear()

    def due(self, owner: Run) -> Fraction | None:
        times = [max(map(self.next_at, wish.limits)) for wish in self.first() if wish.owner is owner]
        return min((at for at in times if isinstance(at, Fraction)), default=None)


class BookAgainstModel(RuleBasedStateMachine):
    """One step of each, then they must agree on everything that can be asked."""

    @initialize()
    def open(self) -> None:
        self.book = LimitBook()
        self.book.attach(LIMITS)
        self.model = Model()
        self.runs = [Run(), Run()]
        self.pairs: list[tuple[LimitRequest, Wish]] = []
        self.used: dict[Limit, list[float]] = {limit: [] for limit in RATES}
        self.expected: dict[Run, set[Wish]] = {run: set() for run in self.runs}

    def settle(self) -> None:
        for wish in self.model.settle():
            self.expected[wish.owner].add(wish)

    @rule(
        choice=st.lists(st.sampled_from(LIMITS), min_size=1, max_size=4),
        count=st.integers(1, 3),
        owner=st.integers(0, 1),
    )
    def asks(self, choice: list[Limit], count: int, owner: int) -> None:
        for _ in range(count):
            wish = Wish(tuple(dict.fromkeys(choice)), self.runs[owner])
            self.model.wishes.append(wish)
            at_once = wish in self.model.settle()
            request = self.book.request(self.runs[owner], wish, tuple(choice), float(self.model.now))
            assert request.granted is at_once
            self.pairs.append((request, wish))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), unused=st.booleans())
    def releases(self, data: st.DataObject, unused: bool) -> None:
        pair = request, wish = data.draw(st.sampled_from(self.pairs), label="which")
        self.pairs.remove(pair)
        if request.granted and not unused:
            for limit in wish.limits:
                if limit in self.used:
                    self.used[limit].append(request.granted_at)
        self.model.release(wish, unused)
        self.settle()
        assert self.book.release(request, float(self.model.now), unused) == ()
        self.book.release(request, float(self.model.now), not unused)

    @precondition(lambda self: any(MAKE in request.resources.values() for request, _ in self.pairs))
    @rule(data=st.data(), fails=st.booleans())
    def makes(self, data: st.DataObject, fails: bool) -> None:
        making = [pair for pair in self.pairs if MAKE in pair[0].resources.values()]
        request, wish = data.draw(st.sampled_from(making), label="which")
        (pool,) = [pool for pool, item in request.resources.items() if item is MAKE]
        if fails:
            wish.holds.remove(pool)
            self.settle()
            self.book.resource_failed(request, pool, float(self.model.now))
        else:
            assert self.book.resource_made(request, pool, object(), float(self.model.now))

    @rule(ticks=st.integers(1, 12))
    def time_passes(self, ticks: int) -> None:
        self._advance(self.model.now + ticks * TICK)

    @precondition(lambda self: any(self.book.due(run) is not None for run in self.runs))
    @rule(owner=st.integers(0, 1))
    def a_timer_fires(self, owner: int) -> None:
        at = self.book.due(self.runs[owner])
        if at is not None:
            self._advance(Fraction(at))
            assert self.runs[owner].told[-1].granted_at == at  # a wake-up on time is never for nothing

    def _advance(self, now: Fraction) -> None:
        self.model.now = now
        self.settle()
        self.book.advance(float(now))

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "book"):
            return
        for request, wish in self.pairs:
            assert request.granted is (wish.state == "held")
            assert request.blocking in request.limits or wish.state == "held"
            assert set(request.resources) == {limit for limit in wish.holds if isinstance(limit, ResourcePool)}
        for limit in LIMITS:
            waiting = sum(limit in wish.limits for _, wish in self.pairs if wish.state == "waiting")
            assert self.book.waiting(limit) == waiting
            assert self.book.in_use(limit) == sum(limit in wish.holds for _, wish in self.pairs)
        for run in self.runs:
            assert self.book.due(run) == self.model.due(run)
            told = [request.key for request in run.told]
            assert len(told) == len(set(told))
            assert set(told) == self.expected[run]

    @invariant()
    def nobody_shares_an_item(self) -> None:
        items = [item for request, _ in getattr(self, "pairs", ()) for item in request.resources.values()]
        made = [id(item) for item in items if item is not MAKE]
        assert len(made) == len(set(made))

    def teardown(self) -> None:
        """No window saw more used permits than the rate allows, whatever was given back in between."""
        for limit, used in getattr(self, "used", {}).items():
            held = [request.granted_at for request, wish in self.pairs if limit in wish.holds]
            times = sorted(Fraction(at) for at in used + held)
            for (i, start), (j, end) in combinations(enumerate(times), 2):
                assert j - i + 1 <= (limit.burst or 1) + (end - start) * limit.n / Fraction(limit.per)


BookAgainstModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBookAgainstModel = BookAgainstModel.TestCase
