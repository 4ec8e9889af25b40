"""Shards in this process: the real driver, fleet and engines, with actors that need no cluster, for a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from obsdag.ray import RayExecutor
from obsdag.ray.cluster import Cluster, _ShardActor
from obsdag.telemetry.lines import PROCESS

__all__ = ["Actor", "Nearby", "nearby"]


class Actor:
    """A shard's actor: calls run on this loop at once, and raise as Ray's do. refuses: method -> what its `.remote`
    raises.
    """

    def __init__(self, name: str, dag: Any, config: bytes) -> None:
        self._shard = _ShardActor(name, dag, config)
        self._calls: set[asyncio.Task[Any]] = set()
        self._dead = False
        self.refuses: dict[str, Exception] = {}

    def __getattr__(self, method: str) -> Any:
        return _Method(self, method)

    def call(self, method: str, arguments: tuple[Any, ...]) -> asyncio.Task[Any]:
        """Begins a call."""
        if method in self.refuses:
            raise self.refuses[method]
        task = asyncio.get_running_loop().create_task(self._run(method, arguments))
        self._calls.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # of a call that nobody awaits nobody hears

    async def _run(self, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            if not self._dead:
                return await getattr(self._shard, method)(*arguments)
        except Exception as error:
            raise RayTaskError(method, "", error) from error
        raise RayActorError

    async def kill(self) -> None:
        """What lived in it is gone."""
        self._dead = True
        for call in list(self._calls):
            call.cancel()
        engine = self._shard._engine
        if engine is not None and engine._shard is not None:
            await engine.end(True)
        await self._shard.close()


class _Method:
    def __init__(self, actor: Actor, name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *arguments: Any) -> asyncio.Task[Any]:
        """Begins the call."""
        return self._actor.call(self._name, arguments)


class Nearby(Cluster):
    """Where such actors live. prepare: told of each actor that starts. users: who has not released it."""

    def __init__(self, prepare: Callable[[Actor], None] = lambda actor: None) -> None:
        super().__init__(None, False, 1)
        self.prepare = prepare
        self.actors: list[Actor] = []
        self.ends: list[asyncio.Task[None]] = []

    def acquire(self) -> None:
        """One user more."""
        self._users += 1

    def release(self) -> None:
        """One user less."""
        self._users -= 1

    def start(self, name: str, dag: Any, config: bytes, options: Mapping[str, Any]) -> Actor:
        """An actor."""
        actor = Actor(name, dag, config)
        self.prepare(actor)
        self.actors.append(actor)
        return actor

    def places(self, options: Mapping[str, Any]) -> int:
        """Plenty."""
        return 100

    def kill(self, actor: Actor) -> None:
        """Ends it."""
        self.ends.append(asyncio.get_running_loop().create_task(actor.kill()))

    async def gone(self) -> None:
        """Returns when nothing of them is left."""
        await asyncio.gather(*self.ends)
        PROCESS.pop("shard", None)


def nearby(executor: RayExecutor, prepare: Callable[[Actor], None] = lambda actor: None) -> Nearby:
    """Has the executor's shards in this process."""
    cluster = executor._fleet._cluster = Nearby(prepare)
    return cluster
