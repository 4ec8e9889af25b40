"""Which root goes where, on a virtual clock: every root has one outcome, whatever dies."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from obsdag.errors import EncodingError
from obsdag.ray.sharding import ALONE, MOST_AHEAD, SUSPECT, Root, Shard, Sharding
from obsdag.ray.wire import codec_of


def roots(count: int) -> Iterator[Root]:
    return (Root(number, number, b"") for number in range(count))


def sharding(count: int, shards: int = 1, asks: int = 1) -> Sharding:
    supply = roots(count)
    found = Sharding(lambda: next(supply, None))
    for number in range(shards):
        found.add(f"s{number}", asks, 0.0)
    return found


def test_a_shard_gets_what_it_asks_for_and_no_more() -> None:
    book = sharding(100, asks=4)
    shard = book.shards["s0"]

    assert len(book.take(shard, 500)) == 4
    assert not list(book.hungry())


def steady(pace_s: float, rounds: int = 40) -> Shard:
    """A shard that begins a root every `pace_s` seconds as long as it has any, and says so when it has none."""
    book = sharding(100_000)
    shard = book.shards["s0"]
    now = 0.0
    for _ in range(rounds):
        given = len(book.take(shard, 5_000))
        now += pace_s * given
        book.heard(shard, shard.given, 1, now)
    return shard


def test_a_shard_of_light_roots_is_given_ahead_what_it_begins_in_the_horizon() -> None:
    assert steady(0.001).ahead == pytest.approx(200, abs=1)


def test_no_shard_is_given_more_ahead_than_the_bound() -> None:
    assert steady(1e-6).ahead == MOST_AHEAD


def test_a_shard_of_heavy_roots_is_given_nothing_ahead() -> None:
    assert steady(10.0).ahead == 0


def test_one_short_root_among_heavy_ones_makes_no_shard_greedy() -> None:
    book = sharding(100)
    shard = book.shards["s0"]
    book.take(shard, 500)
    book.heard(shard, 1, 1, 0.0001)

    assert shard.ahead == 1

    book.take(shard, 500)
    book.heard(shard, 2, 0, 10.0)

    assert shard.ahead == 0


def test_the_first_roots_go_to_all_shards() -> None:
    book = sharding(100, shards=3, asks=2)

    for shard in book.hungry():
        book.take(shard, 500)

    assert [len(shard.roots) for shard in book.shards.values()] == [2, 2, 2]


def test_what_a_dead_shard_has_not_answered_goes_first_and_in_order() -> None:
    book = sharding(10, shards=2, asks=3)
    first, second = book.shards.values()
    given = book.take(first, 500)
    book.answered(first, given[1].number, given[1].token)

    assert book.lose(first) == []

    assert [root.number for root in book.take(second, 500)] == [0, 2, 3]


def test_an_answer_of_an_older_attempt_is_refused() -> None:
    book = sharding(1, shards=2)
    first, second = book.shards.values()
    [root] = book.take(first, 500)
    stale = root.token
    book.lose(first)
    book.take(second, 500)

    assert book.answered(first, root.number, stale) is None
    assert book.answered(second, root.number, stale) is None
    assert book.answered(second, root.number, root.token) is root
    assert book.answered(second, root.number, root.token) is None
    assert book.refused == 3
    assert book.settled()


def test_an_answer_of_an_earlier_run_is_refused() -> None:
    """Calls of an actor may overtake one another, so a kept shard may do for one run what it was given in another."""
    roots = [Root.new("earlier", b""), Root.new("later", b"")]
    books = [Sharding(iter([root]).__next__) for root in roots]
    [earlier], [later] = [book.take(book.add("shard-1", 1, 0.0), 500) for book in books]
    [shard] = books[1].shards.values()

    assert books[1].answered(shard, earlier.number, earlier.token) is None
    assert books[1].answered(shard, later.number, later.token) is later


def test_what_is_withdrawn_is_refused_wherever_it_was() -> None:
    book = sharding(4, shards=2)
    first, _ = book.shards.values()
    [given] = book.take(first, 500)
    waiting = Root(9, 9, b"")
    book.queue.append(waiting)

    assert book.withdraw(waiting) is None
    assert book.withdraw(given) is first
    assert book.answered(first, given.number, given.token) is None
    assert book.shard_of(given) is None
    assert book.settled()


def test_a_retired_shard_gets_nothing_more_and_leaves_when_it_has_answered() -> None:
    book = sharding(10, shards=2)
    first, _ = book.shards.values()
    [root] = book.take(first, 500)

    book.retire(first)

    assert not book.room(first)
    assert book.answered(first, root.number, root.token) is root
    book.leave(first)
    assert list(book.shards) == ["s1"]


def test_a_root_that_kills_its_shards_is_found_and_the_others_are_not_blamed() -> None:
    book = sharding(6, asks=3)
    killer, ended, culprits, deaths = 4, Counter[int](), [], 0
    for number in range(100):
        name = next(iter(book.shards))
        shard = book.shards[name]
        for root in book.take(shard, 500):
            assert root.number != killer or shard.alone or root.deaths < SUSPECT
        if killer in shard.roots:
            deaths += 1
            culprits += book.lose(shard)
            book.add(f"r{number}", 3, float(number))
            continue
        for root in list(shard.roots.values()):
            ended[root.number] += 1
            book.answered(shard, root.number, root.token)
        shard.taken = shard.given

    assert [root.number for root in culprits] == [killer]
    assert ended == dict.fromkeys([0, 1, 2, 3, 5], 1)
    assert deaths == SUSPECT + ALONE


class Simulated:
    """Shards with `workers` each on a virtual clock: a root takes what `took` says; messages take `hop_s`."""

    def __init__(
        self, book: Sharding, took: dict[int, float], seed: int, hop_s: float = 0.002, workers: int = 1
    ) -> None:
        self.book, self.took, self.hop_s, self.workers = book, took, hop_s, workers
        self.random = Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, str, object]] = []
        self.order = 0
        self.inbox: dict[str, list[tuple[int, int]]] = {}
        self.running: dict[str, dict[int, int]] = {}
        self.begun: Counter[str] = Counter()
        self.busy_s: Counter[str] = Counter()
        self.ended: Counter[int] = Counter()
        self.begun_times: Counter[int] = Counter()
        self.dead: set[str] = set()
        self.finished_at = 0.0

    def at(self, delay: float, kind: str, what: object) -> None:
        self.order += 1
        heapq.heappush(self.events, (self.now + delay, self.order, kind, what))

    def start(self, name: str) -> None:
        self.book.add(name, self.workers, self.now)
        self.inbox[name], self.running[name] = [], {}

    def pump(self, shard: Shard | None = None) -> None:
        for each in [shard] if shard is not None else list(self.book.hungry()):
            given = self.book.take(each, 500)
            if given:
                self.at(self.hop_s, "fed", (each.name, [(root.number, root.token) for root in given]))

    def run(self, kills: dict[float, int] | None = None, replace_s: float = 3.0) -> None:
        for when in kills or {}:
            self.at(when, "kill", (kills or {})[when])
        self.pump()
        while not self.book.settled():
            self.now, _, kind, what = heapq.heappop(self.events)
            getattr(self, f"on_{kind}")(what, replace_s)
        self.finished_at = self.now

    def on_fed(self, what: object, _: float) -> None:
        name, given = what  # type: ignore[misc]
        if name not in self.dead:
            self.inbox[name] += given
            self.work(name)

    def work(self, name: str) -> None:
        while self.inbox[name] and len(self.running[name]) < self.workers:
            number, token = self.inbox[name].pop(0)
            self.begun[name] += 1
            self.begun_times[number] += 1
            self.running[name][number] = token
            self.at(self.took[number], "ended", (name, number, token))

    def on_ended(self, what: object, _: float) -> None:
        name, number, token = what  # type: ignore[misc]
        if name in self.dead:
            return
        del self.running[name][number]
        self.busy_s[name] += self.took[number]
        self.work(name)
        asks = 0 if self.inbox[name] else self.workers - len(self.running[name])
        self.at(self.hop_s, "told", (name, self.begun[name], asks, number, token))

    def on_told(self, what: object, _: float) -> None:
        name, begun, asks, number, token = what  # type: ignore[misc]
        shard = self.book.shards.get(name)
        if shard is None:
            return  # the connection went with the shard
        self.book.heard(shard, begun, asks, self.now)
        if self.book.answered(shard, number, token) is not None:
            self.ended[number] += 1
        if self.book.room(shard):
            self.pump(shard)

    def on_kill(self, number: object, replace_s: float) -> None:
        names = sorted(self.book.shards)
        for name in self.random.sample(names, min(int(number), len(names))):  # type: ignore[call-overload]
            self.dead.add(name)
            assert not self.book.lose(self.book.shards[name])
            self.at(replace_s, "start", f"{name}+")
        self.pump()

    def on_start(self, name: object, _: float) -> None:
        self.start(str(name))
        self.pump()


def simulated(count: int, shards: int, took: dict[int, float], seed: int, workers: int = 1) -> Simulated:
    supply = roots(count)
    simulation = Simulated(Sharding(lambda: next(supply, None)), took, seed, workers=workers)
    for number in range(shards):
        simulation.start(f"s{number}")
    return simulation


@pytest.mark.parametrize("seed", range(30))
def test_every_root_has_one_outcome_whatever_dies(seed: int) -> None:
    random = Random(seed)
    count = 400
    took = {number: random.choice([0.0005, 0.01, 0.3]) for number in range(count)}
    simulation = simulated(count, 4, took, seed, workers=random.choice([1, 3]))

    simulation.run({random.random() * 4.0: random.choice([1, 1, 2]) for _ in range(random.randint(0, 1))})

    assert simulation.ended == dict.fromkeys(range(count), 1)


def test_a_thousand_shards_share_heavy_roots_evenly_and_a_lost_node_costs_its_own_work_only() -> None:
    random = Random(1)
    count, shards = 20_000, 1_000
    took = {number: random.expovariate(1.0) for number in range(count)}
    quiet = simulated(count, shards, took, 1)
    quiet.run()
    ideal = sum(took.values()) / shards
    lossy = simulated(count, shards, took, 1)
    lossy.run({10.0: 20})  # a node with 20 shards

    assert quiet.ended == lossy.ended == dict.fromkeys(range(count), 1)
    assert quiet.finished_at < ideal + max(took.values())
    assert max(quiet.busy_s.values()) < ideal + max(took.values())
    assert 20 <= lossy.begun_times.total() - count <= 40, "what ran on the lost shards, and no more, ran twice"


def test_light_roots_keep_shards_busy_in_spite_of_the_way_there() -> None:
    count = 40_000
    simulation = simulated(count, 8, dict.fromkeys(range(count), 0.0005), 1)

    simulation.run()

    ideal = count * 0.0005 / 8
    assert simulation.ended == dict.fromkeys(range(count), 1)
    assert simulation.finished_at < ideal * 1.1


def test_data_that_cannot_cross_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        EncodingError, match=r"between driver and shard cannot encode; .* by RayExecutor\(\.\.\., allow"
    ):
        codec_of(False).encode({"x": object()})
