"""Which root goes to which shard, and what a shard that dies leaves to the others: plain data, no Ray, no clock.

The way of a root: queue -> `take`n for a shard, under a new token -> `answered`, once; or its shard is `lost`, and it
is at the head of the queue again. At least once, one outcome: an answer with an older token than the root's is refused.

How much a shard is given ahead of its need follows from what it takes: as many roots as it begins in `horizon_s`. A
shard of heavy roots gets one when it asks for one, so nothing waits behind a slow one while another is idle; a shard
of light roots gets thousands, so it does not wait for the driver. A slow shard holds back nobody but itself.

A root that kills whatever it runs on would take one shard after the other. After `SUSPECT` deaths under it a root is
given to a shard of its own, and if that dies `ALONE` times, it is the root: `lost` gives it back, to be failed.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, Self

__all__ = ["Root", "Shard", "Sharding"]

SUSPECT: Final = 2
ALONE: Final = 2
MOST_AHEAD: Final = 2_000
_MEMORY: Final = 0.875
_numbers = itertools.count(1)


class Root:
    """One root of the run. token: of its newest attempt. deaths: of shards, under it; alone_deaths: with nothing else
    there. context, data: the driver's own, handed through. number: of `new` ones never given twice in a process, so
    that what a kept shard does late for one run, as calls of an actor may overtake one another, is not taken for
    another's.
    """

    __slots__ = ("alone_deaths", "context", "data", "deaths", "number", "token")

    def __init__(self, number: int, context: Any, data: bytes) -> None:
        self.number = number
        self.context = context
        self.data = data
        self.token = 0
        self.deaths = 0
        self.alone_deaths = 0

    @classmethod
    def new(cls, context: Any, data: bytes) -> Self:
        """One with a number of its own."""
        return cls(next(_numbers), context, data)

    def __repr__(self) -> str:
        return f"<Root {self.number}, attempt {self.token}>"


class Shard:
    """What is known of one shard. roots: given and not answered, by number. given: roots in all; taken: those that its
    engine has begun, as it says. asks: its workers without work. pace_s: seconds from one beginning to the next, None
    before the first. ahead: roots that it may have and not have begun. leaving: it gets nothing more. alone: what it
    has is one suspect.
    """

    __slots__ = ("ahead", "alone", "asks", "given", "heard_at", "leaving", "name", "pace_s", "roots", "taken")

    def __init__(self, name: str, asks: int, now: float) -> None:
        self.name = name
        self.asks = asks
        self.roots: dict[int, Root] = {}
        self.given = 0
        self.taken = 0
        self.pace_s: float | None = None
        self.ahead = 0
        self.heard_at = now
        self.leaving = False
        self.alone = False

    def __repr__(self) -> str:
        return f"<Shard {self.name}: {len(self.roots)} roots>"


class Sharding:
    """The roots of one run, and its shards. supply: gives the next input as a root, None if there is none now.

    horizon_s: seconds of work that a shard is given ahead. most_ahead: roots, at most. shards: those that live.
    """

    def __init__(self, supply: Callable[[], Root | None], horizon_s: float = 0.2, most_ahead: int = MOST_AHEAD) -> None:
        self._supply = supply
        self._horizon_s = horizon_s
        self._most_ahead = most_ahead
        self.shards: dict[str, Shard] = {}
        self.queue: deque[Root] = deque()
        self.suspects: deque[Root] = deque()
        self.refused = 0
        self.requeued = 0
        self.out = 0

    # --- shards come and go

    def add(self, name: str, asks: int, now: float) -> Shard:
        """A shard is there, with `asks` idle workers."""
        shard = self.shards[name] = Shard(name, asks, now)
        return shard

    def retire(self, shard: Shard) -> None:
        """The shard gets nothing more; it is `idle` when it has answered what it has."""
        shard.leaving = True

    def leave(self, shard: Shard) -> None:
        """A retired shard that has answered everything is gone."""
        del self.shards[shard.name]

    def lose(self, shard: Shard) -> list[Root]:
        """The shard died: what it has not answered goes to others. Gives those roots that are found to be the cause."""
        del self.shards[shard.name]
        self.out -= len(shard.roots)
        culprits = []
        for root in reversed(shard.roots.values()):
            root.deaths += 1
            root.alone_deaths += shard.alone
            if root.alone_deaths >= ALONE:
                culprits.append(root)
                continue
            self.requeued += 1
            if root.deaths >= SUSPECT:
                self.suspects.appendleft(root)
            else:
                self.queue.appendleft(root)
        shard.roots.clear()
        return culprits

    def load(self, name: str) -> int:
        """Roots that the shard of that name has; -1 if it is not there yet."""
        shard = self.shards.get(name)
        return -1 if shard is None else len(shard.roots)

    # --- giving

    def room(self, shard: Shard) -> int:
        """How many roots the shard may be given now."""
        if shard.leaving or shard.alone:
            return 0
        return max(max(shard.ahead, shard.asks) - (shard.given - shard.taken), 0)

    def hungry(self) -> Iterator[Shard]:
        """The shards that have room, those with the fewest roots first: the first roots of a run go to all of them."""
        found = [shard for shard in self.shards.values() if self.room(shard)]
        yield from sorted(found, key=lambda shard: len(shard.roots))

    def take(self, shard: Shard, most: int) -> list[Root]:
        """Up to `most` roots for the shard, as far as it has room, each under a new token."""
        if self.suspects and shard is self._cell():
            return self._take_alone(shard)
        taken: list[Root] = []
        room = min(self.room(shard), most)
        while len(taken) < room:
            root = self.queue.popleft() if self.queue else self._supply()
            if root is None:
                break
            taken.append(root)
        self._give(shard, taken)
        return taken

    def _cell(self) -> Shard | None:
        """Where suspects go: the shard with the fewest roots, which gets nothing else until it has none."""
        return min(
            (shard for shard in self.shards.values() if not shard.leaving),
            key=lambda shard: (len(shard.roots), shard.name),
            default=None,
        )

    def _take_alone(self, shard: Shard) -> list[Root]:
        if shard.roots:
            return []
        root = self.suspects.popleft()
        shard.alone = True
        self._give(shard, [root])
        return [root]

    def _give(self, shard: Shard, roots: list[Root]) -> None:
        for root in roots:
            root.token += 1
            shard.roots[root.number] = root
        shard.given += len(roots)
        self.out += len(roots)

    # --- hearing

    def heard(self, shard: Shard, taken: int, asks: int, now: float) -> None:
        """The shard says that its engine has begun `taken` roots in all, and has `asks` idle workers."""
        begun, passed_s = taken - shard.taken, now - shard.heard_at
        shard.taken, shard.asks = taken, asks
        if begun <= 0:
            return
        shard.heard_at = now
        if shard.pace_s is None:
            shard.pace_s = passed_s / begun
        # The mean of times, not of rates, which a single short root would drive up; and a doubling at most, for what
        # was given cannot be taken back.
        shard.pace_s += (1.0 - _MEMORY**begun) * (passed_s / begun - shard.pace_s)
        wanted = self._most_ahead if shard.pace_s <= 0.0 else int(self._horizon_s / shard.pace_s)
        shard.ahead = min(wanted, max(2 * shard.ahead, 1), self._most_ahead)

    def answered(self, shard: Shard, number: int, token: int) -> Root | None:
        """The root that the shard has an outcome of; None if that attempt is not its newest, or has its outcome."""
        root = shard.roots.get(number)
        if root is None or root.token != token:
            self.refused += 1
            return None
        del shard.roots[number]
        shard.alone = False
        self.out -= 1
        return root

    def withdraw(self, root: Root) -> Shard | None:
        """The root is wanted no more. Gives the shard that has it, whose answer is going to be refused."""
        for waiting in (self.queue, self.suspects):
            if root in waiting:
                waiting.remove(root)
                return None
        shard = self.shard_of(root)
        if shard is not None:
            del shard.roots[root.number]
            shard.alone = False
            self.out -= 1
        return shard

    def shard_of(self, root: Root) -> Shard | None:
        """The shard that has the root; None while it waits."""
        return next((shard for shard in self.shards.values() if root.number in shard.roots), None)

    def settled(self) -> bool:
        """Whether no root waits and none is out."""
        return not self.out and not self.queue and not self.suspects
