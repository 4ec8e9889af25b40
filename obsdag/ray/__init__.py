"""Beyond one machine: the same DAG on a Ray cluster, as `RayExecutor` and `RayServeExecutor` (extra `obsdag[ray]`).

sharding    which root goes where, and again when a shard dies; no Ray, no clock
wire        the two kinds of messages between driver and shards, as bytes
shard       the ordinary engine, fed with batches and asked for answers; no Ray either
jobs        single tasks on a cluster, from a local executor: `RayCluster`
cluster     all that is Ray's: connection, actors, what is refused
fleet       the shards between runs
contexts    roots, and contexts that shards speak of, as messages
accepted    the driver's journal: what was accepted, and what became of it
feed        an async input: asked for items, and ended
driver      one run, on the driver's event loop
executor    `RayExecutor`: opens runs and sees them to their end
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obsdag.ray.executor import RayExecutor, RayStream
    from obsdag.ray.jobs import RayCluster
    from obsdag.ray.serve import RayServeExecutor

__all__ = ["RayCluster", "RayExecutor", "RayServeExecutor", "RayStream"]

if not TYPE_CHECKING:  # a type checker would take every name for defined

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = {"RayServeExecutor": "serve", "RayCluster": "jobs"}.get(name, "executor")
        return getattr(import_module(f"obsdag.ray.{home}"), name)  # late: `sharding` and `shard` need no Ray
