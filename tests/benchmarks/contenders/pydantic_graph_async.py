"""pydantic-graph's GraphBuilder: a graph built once, run per item, without its logfire spans."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from pydantic_graph import GraphBuilder, StepContext, reduce_list_append

from tests.benchmarks.contenders import Job, by_workers
from tests.benchmarks.workloads import CHILDREN, GRAPHS, STEPS, WORKERS

__all__ = ["prepare"]


def prepare(workload: str) -> Job | None:
    """W1 to W3."""
    if workload == "W3":
        return _job(_fan_out())
    return _job(_graph(GRAPHS[workload])) if workload in ("W1", "W2") else None


def _step(builder: Any, name: str) -> Any:
    async def no_op(context: StepContext[None, None, Any]) -> Any:
        return context.inputs

    return builder.step(no_op, node_id=name)


def _graph(graph: Any) -> Any:
    builder = GraphBuilder(input_type=Any, output_type=Any, auto_instrument=False)
    steps = {task: _step(builder, f"t{task}") for task in graph}
    below = {task: [steps[other] for other, above in graph.items() if task in above] for task in graph}
    builder.add(builder.edge_from(builder.start_node).to(steps[0]))
    for task, above in graph.items():
        if len(above) > 1:
            join = builder.join(reduce_list_append, initial_factory=list, node_id=f"join{task}")
            builder.add(builder.edge_from(*(steps[upstream] for upstream in above)).to(join))
            builder.add(builder.edge_from(join).to(steps[task]))
    for task, followers in below.items():
        if followers and all(len(graph[other]) == 1 for other in graph if task in graph[other]):
            builder.add(builder.edge_from(steps[task]).to(*followers))
    builder.add(builder.edge_from(steps[max(graph)]).to(builder.end_node))
    return builder.build()


def _fan_out() -> Any:
    builder = GraphBuilder(input_type=Any, output_type=Any, auto_instrument=False)

    async def make(context: StepContext[None, None, Any]) -> list[int]:
        return list(range(CHILDREN))

    steps = [builder.step(make, node_id="make"), *(_step(builder, f"t{step}") for step in range(STEPS))]
    join = builder.join(reduce_list_append, initial_factory=list, node_id="gather")
    builder.add(builder.edge_from(builder.start_node).to(steps[0]))
    builder.add(builder.edge_from(steps[0]).map().to(steps[1]))
    for above, below in pairwise(steps[1:]):
        builder.add(builder.edge_from(above).to(below))
    last = _step(builder, "join")
    builder.add(builder.edge_from(steps[-1]).to(join))
    builder.add(builder.edge_from(join).to(last), builder.edge_from(last).to(builder.end_node))
    return builder.build()


def _job(graph: Any) -> Job:
    async def one(number: int) -> None:
        assert await graph.run(inputs=number) is not None

    async def job(items: int) -> int:
        return await by_workers(items, one, WORKERS)

    return job
