"""`python -m tests.shards.trials 50`: shards and nodes are killed during joins, with retries pending, as often as told.

Each trial runs 200 roots through `dags.slow`, kills a shard's process (SIGKILL) or a whole node when a random number of
outputs has come, and looks at the outcomes: each root exactly one. A seed gives the same kills again, not the same
schedule. The status is 1 if a trial found anything.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from typing import Any

from obsdag import ExecutorConfig
from obsdag.ray import RayExecutor
from tests.shards import dags
from tests.shards.conftest import GIVEN, SMALL

ROOTS = 200


def make_whole(cluster: Any) -> None:
    """Two nodes beside the head, as the tests have them."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=2, resources={"shard": 2}, **SMALL)
    cluster.wait_for_nodes()


def kill(cluster: Any, kind: str, pid: int, chance: random.Random) -> None:
    """Ends a shard's process, or a node and all that is on it."""
    if kind == "shard":
        os.kill(pid, signal.SIGKILL)
    else:
        nodes = sorted(cluster.worker_nodes, key=lambda node: str(node.node_id))
        cluster.remove_node(chance.choice(nodes), allow_graceful=False)


async def trial(cluster: Any, kind: str, after: int, chance: random.Random) -> tuple[list[str], int]:
    """One run with one kill; what is wrong with its outcomes, and how many processes had a part in them."""
    executor = RayExecutor(
        dags.slow,
        ExecutorConfig(context_worker_num=8, task_worker_num=0),
        shards=2,
        shard_options={"resources": {"shard": 1}, "num_cpus": 1},
    )
    found = []
    async with executor.stream({"x": number} for number in range(ROOTS)) as outputs:
        async for output in outputs:
            found.append(output)
            if len(found) == after:
                kill(cluster, kind, output["pid"], chance)
    wrong = [f"root {x} came out {n} times" for x, n in Counter(o["x"] for o in found).items() if n != 1]
    wrong += [f"root {o['x']} was joined from {o['parts']}" for o in found if o["parts"] != [0, 1, 2]]
    expected = {"entered": 4 * ROOTS, "output": ROOTS, "merged": 3 * ROOTS}
    if {name: number for name, number in outputs.counts.items() if number} != expected:
        wrong.append(f"counts {outputs.counts}")
    return wrong, len({output["pid"] for output in found})


def main() -> int:
    """Runs the trials and tells of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trials", type=int)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    os.environ.update(GIVEN)
    import ray
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    ray_constants.ENABLE_RAY_CLUSTER = False
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **SMALL})
    chance, bad = random.Random(given.seed), 0
    try:
        ray.init(address=cluster.address, configure_logging=False, log_to_driver=False)
        for number in range(given.trials):
            make_whole(cluster)
            kind, after = ("shard", "node")[number % 2], chance.randint(1, ROOTS - 20)
            started = time.monotonic()
            wrong, processes = asyncio.run(trial(cluster, kind, after, chance))
            bad += bool(wrong)
            told = "; ".join(wrong[:5]) or "ok"
            took_s = time.monotonic() - started
            print(
                f"{number + 1:3} {kind:5} after {after:3}: {processes} processes, {took_s:4.1f} s, {told}", flush=True
            )
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(f"{given.trials} trials, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
