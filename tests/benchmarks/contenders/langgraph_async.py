"""LangGraph: a compiled StateGraph without a checkpointer, invoked per item; W3 by `Send`."""

from __future__ import annotations

import operator
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from tests.benchmarks.contenders import Job, by_workers
from tests.benchmarks.workloads import CHILDREN, GRAPHS, STEPS, WORKERS

__all__ = ["prepare"]


def _newer(one: Any, other: Any) -> Any:
    return other


class State(TypedDict):
    n: Annotated[int, _newer]


class Family(TypedDict):
    n: Annotated[int, _newer]
    done: Annotated[list[int], operator.add]


async def no_op(state: State) -> dict[str, Any]:
    return {"n": state["n"]}


def prepare(workload: str) -> Job | None:
    """W1 to W3."""
    if workload == "W3":
        return _job(_fan_out(), {"done": []})
    return _job(_compiled(GRAPHS[workload]), {}) if workload in ("W1", "W2") else None


def _compiled(graph: Any) -> Any:
    built = StateGraph(State)
    for task, above in graph.items():
        built.add_node(f"t{task}", no_op)
        built.add_edge([f"t{upstream}" for upstream in above] if above else START, f"t{task}")
    built.add_edge(f"t{max(graph)}", END)
    return built.compile()


def _fan_out() -> Any:
    chain = _compiled({step: (step - 1,) if step else () for step in range(STEPS)})

    async def each(state: State) -> dict[str, Any]:
        return {"done": [(await chain.ainvoke(state))["n"]]}

    async def make(state: Family) -> dict[str, Any]:
        return {"n": state["n"]}

    async def join(state: Family) -> dict[str, Any]:
        assert len(state["done"]) == CHILDREN
        return {"n": state["n"]}

    built = StateGraph(Family)
    built.add_node("make", make)
    built.add_node("each", each)
    built.add_node("join", join)
    built.add_edge(START, "make")
    built.add_conditional_edges("make", lambda _: [Send("each", {"n": n}) for n in range(CHILDREN)], ["each"])
    built.add_edge("each", "join")
    built.add_edge("join", END)
    return built.compile()


def _job(graph: Any, more: dict[str, Any]) -> Job:
    async def one(number: int) -> None:
        assert (await graph.ainvoke({"n": number, **more}))["n"] == number

    async def job(items: int) -> int:
        return await by_workers(items, one, WORKERS)

    return job
