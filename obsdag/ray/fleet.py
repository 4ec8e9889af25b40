"""The shards of an executor between runs: started when a run needs them, kept if the executor is kept open."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from obsdag.errors import ConfigError
from obsdag.ray.cluster import Cluster

if TYPE_CHECKING:
    from obsdag.ray.sharding import Shard

__all__ = ["Fleet", "Member"]


FOLLOW_S = 2.0
"""Time between two looks at the size of a cluster that shards are to follow."""
_log = logging.getLogger("obsdag.ray")


class Member(NamedTuple):
    """A shard: its name, which no other shard of the executor ever has, and its actor."""

    name: str
    actor: Any


class Fleet:
    """The shards of one executor. shards: how many a run has. options: of Ray, for each actor. span: between which two
    numbers it is as many as the cluster has room for; None for a fixed number.

    targets: where `/metrics` of each living shard is, by its name. file_sd: a file that has them, for Prometheus.

    States: nobody uses it -> (enter) connected -> (leave) not connected, no actor left.
    """

    def __init__(
        self,
        cluster: Cluster,
        dag: Any,
        config: bytes,
        shards: int,
        options: Mapping[str, Any],
        file_sd: str | os.PathLike[str] | None = None,
    ) -> None:
        self.shards = shards
        self.span: tuple[int, float] | None = None
        self.targets: dict[str, str] = {}
        self._file_sd = None if file_sd is None else Path(file_sd)
        self._is_listed = True
        self._cluster = cluster
        self._carried = dag, config
        self._options = dict(options)
        self._idle: list[Member] = []
        self._ready: set[str] = set()
        self._users = 0
        self._number = 0

    def enter(self) -> None:
        """Connects, for the first user. Raises ConfigError where the list of targets cannot be written."""
        if not self._users:
            try:
                self._write_targets()
            except OSError as error:
                raise ConfigError(f"file_sd={str(self._file_sd)!r} cannot be written ({error}): name another") from None
            self._cluster.acquire()
        self._users += 1

    @property
    def is_kept(self) -> bool:
        """Whether there are users beside the one that asks."""
        return self._users > 1

    async def leave(self, grace_s: float) -> None:
        """For the last user: idle shards close what they hold, for `grace_s` seconds at most, and end."""
        self._users -= 1
        if self._users:
            return
        idle, self._idle = self._idle, []
        try:
            for member in idle:
                if member.name not in self._ready:  # nothing to close in there, and maybe no place for it, ever
                    self.drop(member)
            ready = [member for member in idle if member.name in self._ready]
            await asyncio.gather(*(self.close(member, grace_s) for member in ready))
        finally:
            self._cluster.release()

    async def close(self, member: Member, grace_s: float) -> None:
        """Ends a shard that has no run: it closes what it holds, for `grace_s` seconds at most."""
        try:
            with contextlib.suppress(Exception):  # it is dead, takes too long, or is out of reach: it ends all the same
                async with asyncio.timeout(grace_s):
                    await member.actor.close.remote()
        finally:
            self.drop(member)

    def fit(self, places: int) -> None:
        """The cluster has room for so many shards: from now on there are to be as many, within the span."""
        if self.span is not None:
            self.shards = int(max(self.span[0], min(places, self.span[1])))

    def places(self) -> int:
        """How many shards the cluster has room for; asks it, which takes milliseconds."""
        return self._cluster.places(self._options)

    async def follow(self, changed: Callable[[], None]) -> None:
        """Looks now and then how large the cluster is, as long as a run goes on; `changed` lets it grow or shrink."""
        while True:
            await asyncio.sleep(FOLLOW_S)
            before = self.shards
            with contextlib.suppress(Exception):  # it does not answer: what runs, runs
                self.fit(await asyncio.to_thread(self.places))
            if self.shards != before:
                changed()

    def take(self) -> list[Member]:
        """The shards for a run: idle ones, and new ones."""
        taken, self._idle = self._idle[: self.shards], self._idle[self.shards :]
        return taken + [self.start() for _ in range(self.shards - len(taken))]

    def start(self) -> Member:
        """A new shard, on its way."""
        self._number += 1
        name = f"shard-{self._number}"
        return Member(name, self._cluster.start(name, *self._carried, self._options))

    def serves(self, member: Member, target: str) -> None:
        """A shard is ready for runs, and has said where its `/metrics` is, if it has any."""
        self._ready.add(member.name)
        if target and self.targets.get(member.name) != target:
            self.targets[member.name] = target
            self._list_targets()

    def _list_targets(self) -> None:
        """Writes the list anew; where that has become impossible shards go on unlisted, and the next change tries it
        again.
        """
        try:
            self._write_targets()
        except OSError as error:
            if self._is_listed:
                _log.warning("%s cannot be written, Prometheus has an old list of shards: %s", self._file_sd, error)
            self._is_listed = False
        else:
            self._is_listed = True

    def _write_targets(self) -> None:
        """The list for Prometheus's `file_sd_configs`, whole or not at all."""
        if self._file_sd is None:
            return
        groups = [{"targets": [target], "labels": {"shard": name}} for name, target in self.targets.items()]
        draft = self._file_sd.with_name(f"{self._file_sd.name}.{os.getpid()}.draft")
        draft.write_text(json.dumps(groups) + "\n", encoding="utf-8")
        draft.replace(self._file_sd)

    def give_back(self, member: Member) -> None:
        """A run is done with it."""
        self._idle.append(member)

    def drop(self, member: Member) -> None:
        """It is dead, or has to be."""
        self._cluster.kill(member.actor)
        self._ready.discard(member.name)
        if self.targets.pop(member.name, None) is not None:
            self._list_targets()

    def seen(self, member: Member, shard: Shard | None) -> dict[str, Any]:
        """One of them as plain values; shard: what its run knows of it, None before it has begun there."""
        return {
            "name": member.name,
            "phase": "starting" if shard is None else "leaving" if shard.leaving else "running",
            "roots": 0 if shard is None else len(shard.roots),
            "ahead": 0 if shard is None else shard.given - shard.taken,
            "target": self.targets.get(member.name, ""),
        }

    def shortage(self) -> str:
        """What the cluster has, in words."""
        return self._cluster.shortage()
