"""The compiled plan: order, masks, straight stretches, ranks, fingerprint (SEMANTICS G4, G7)."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdag.graph import DAG
from obsdag.plan import Plan, indices, topological_order
from obsdag.tasks import ForegroundSyncFunctionTask, TaskConfig


def same(ctx: Any) -> Any:
    return ctx


def dag_of(edges: dict[str, list[str]], priority: dict[str, int] | None = None, name: str = "dag") -> DAG:
    """A DAG of foreground tasks; `edges` is task -> its direct upstreams."""
    dag = DAG(name)
    for task_id, above in edges.items():
        config = TaskConfig(priority=(priority or {}).get(task_id, 0))
        dag.add_task(ForegroundSyncFunctionTask(same, config, task_id), above)
    return dag


def named(plan: Plan, masks: tuple[int, ...]) -> dict[str, set[str]]:
    return {task.id: set(plan.names(mask)) for task, mask in zip(plan.tasks, masks, strict=True)}


DIAMOND: dict[str, list[str]] = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


def test_G4_order_is_topological_and_keeps_the_order_of_definition() -> None:
    plan = dag_of({"z": [], "late": ["y"], "y": [], "x": ["z"]}).build()
    assert [task.id for task in plan.tasks] == ["source", "z", "y", "late", "x", "sink"]
    assert (plan.source, plan.sink) == (0, 5)
    assert plan.index["late"] == 3
    assert len(plan) == 6


def test_G4_masks_of_a_diamond() -> None:
    plan = dag_of(DIAMOND).build()
    assert named(plan, plan.up)["d"] == {"b", "c"}
    assert named(plan, plan.down)["a"] == {"b", "c"}
    assert named(plan, plan.ancestors)["d"] == {"source", "a", "b", "c"}
    assert named(plan, plan.descendants)["a"] == {"b", "c", "d", "sink"}
    assert named(plan, plan.bypass) == {
        "source": set(), "a": set(), "b": {"c"}, "c": {"b"}, "d": set(), "sink": set()
    }  # fmt: skip
    assert plan.names(plan.all_mask) == ["source", "a", "b", "c", "d", "sink"]
    assert plan.mask("a", "d") == plan.bit[1] | plan.bit[4]


def test_G4_follow_names_the_straight_stretches() -> None:
    plan = dag_of({"a": [], "b": ["a"], "c": ["a"], "d": ["c"], "e": ["b", "d"]}).build()
    follow = {plan.tasks[i].id: plan.tasks[j].id for i, j in enumerate(plan.follow) if j >= 0}
    assert follow == {"source": "a", "c": "d", "e": "sink"}


def test_G4_priority_orders_downstreams_and_ranks() -> None:
    plan = dag_of({"a": [], "b": ["a"], "c": ["a"], "d": ["a"]}, {"c": 5, "d": -1}).build()
    assert [plan.tasks[i].id for i in plan.down_list[plan.index["a"]]] == ["c", "b", "d"]
    assert plan.rank is not None
    assert sorted("abcd", key=lambda task_id: plan.rank[plan.index[task_id]]) == ["c", "a", "b", "d"]
    assert sorted(plan.rank) == list(range(len(plan)))


def test_G4_without_priorities_the_index_is_the_rank() -> None:
    assert dag_of(DIAMOND).build().rank is None


def test_G4_masks_by_shape_and_setting() -> None:
    dag = DAG()
    dag.task(name="r", kind="foreground_router")(lambda ctx: "f")
    dag.task(name="f", after="r", pass_through=True)(same)
    dag.task(name="m", after="r", may_drop=True, kind="map")(lambda ctx: [])
    dag.task(name="s", after="m", kind="service")(same)
    dag.task(name="j", after="s", kind="join")(lambda parent, children: parent)

    @dag.stream(after="f")
    def st(ctx: Any) -> Any:
        yield ctx

    @dag.loop(after="f")
    def lo(ctx: Any) -> Any:
        yield ctx

    plan = dag.build()
    fields = ("routers", "joins", "maps", "streams", "loops", "services", "pass_through", "may_drop")
    assert {field: plan.names(getattr(plan, field)) for field in fields} == {
        "routers": ["r"], "joins": ["j"], "maps": ["m"], "streams": ["st"], "loops": ["lo"], "services": ["s"],
        "pass_through": ["f"], "may_drop": ["m"],
    }  # fmt: skip
    assert plan.names(plan.fan_outs_above[plan.index["j"]]) == ["m", "s"]


def test_G4_a_plan_cannot_be_changed() -> None:
    plan = dag_of(DIAMOND).build()
    with pytest.raises(FrozenInstanceError):
        plan.all_mask = 0  # type: ignore[misc]


@given(st.sets(st.integers(0, 400)))
def test_G4_indices_of_a_mask(members: set[int]) -> None:
    assert list(indices(sum(1 << i for i in members))) == sorted(members)


@st.composite
def random_edges(draw: st.DrawFn) -> dict[str, list[str]]:
    """A random DAG whose definition order is not its topological order."""
    count = draw(st.integers(1, 9))
    places = draw(st.permutations(range(count)))
    edges = {}
    for i in range(count):
        above = [j for j in range(count) if places[j] < places[i] and draw(st.booleans())]
        edges[f"t{i}"] = [f"t{j}" for j in above]
    return edges


def slow_ancestors(edges: dict[str, set[str]], task_id: str) -> set[str]:
    """All tasks from which a walk along the edges comes to `task_id`: grown until nothing is added."""
    found = set(edges[task_id])
    while True:
        more = found | {above for task in found for above in edges[task]}
        if more == found:
            return found
        found = more


@settings(max_examples=150, deadline=None)
@given(random_edges())
def test_G4_masks_agree_with_a_slow_model(edges: dict[str, list[str]]) -> None:
    plan = dag_of(edges).build()
    full = {task_id: set(above) or {"source"} for task_id, above in edges.items()}
    full["source"] = set()
    full["sink"] = {task_id for task_id in edges if not any(task_id in above for above in edges.values())}
    ancestors = {task_id: slow_ancestors(full, task_id) for task_id in full}
    descendants = {task_id: {other for other in full if task_id in ancestors[other]} for task_id in full}
    downs = {task_id: {other for other in full if task_id in full[other]} for task_id in full}

    assert named(plan, plan.up) == full
    assert named(plan, plan.down) == downs
    assert named(plan, plan.ancestors) == ancestors
    assert named(plan, plan.descendants) == descendants
    assert named(plan, plan.bypass) == {
        task_id: set(full) - ancestors[task_id] - descendants[task_id] - {task_id} for task_id in full
    }
    assert all(above < i for i, ups in enumerate(plan.up_list) for above in ups)
    for i, follows in enumerate(plan.follow):
        below = downs[plan.tasks[i].id]
        straight = len(below) == 1 and full[next(iter(below))] == {plan.tasks[i].id}
        assert follows == (plan.index[next(iter(below))] if straight else -1)
    assert {task.id for task in plan.tasks[plan.index["t0"]].upstream_tasks} == full["t0"]
    assert {task.id for task in plan.tasks[plan.index["t0"]].downstream_tasks} == downs["t0"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=7, max_size=7))
def test_G3_an_order_or_a_cycle_is_always_found(upstreams: list[list[int]]) -> None:
    order, cycles = topological_order(upstreams)
    if cycles:
        for cycle in cycles:
            for above, node in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
                assert above in upstreams[node]
        members = [node for cycle in cycles for node in cycle]
        assert len(members) == len(set(members))
    else:
        assert sorted(order) == list(range(7))
        assert all(order.index(above) < order.index(node) for node in range(7) for above in upstreams[node])


def test_G4_the_fingerprint_tells_names_kinds_and_edges_apart_and_nothing_else() -> None:
    base = dag_of(DIAMOND).build().fingerprint
    assert dag_of(DIAMOND, name="other").build().fingerprint == base
    assert dag_of(DIAMOND, {"d": 3}).build().fingerprint == base
    assert dag_of({**DIAMOND, "d": ["b"]}).build().fingerprint != base
    assert dag_of({**DIAMOND, "e": ["d"]}).build().fingerprint != base
    other_kind = dag_of({key: above for key, above in DIAMOND.items() if key != "d"})
    other_kind.task(name="d", after=["b", "c"], kind="sync")(same)
    assert other_kind.build().fingerprint != base


def test_G4_the_fingerprint_is_the_same_in_another_process() -> None:
    program = (
        "from obsdag.graph import DAG\n"
        "dag = DAG()\n"
        "for name, above in {'a': [], 'b': ['a'], 'c': ['a'], 'd': ['b', 'c']}.items():\n"
        "    dag.task(name=name, after=above, kind='foreground')(lambda ctx: ctx)\n"
        "print(dag.build().fingerprint)\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == dag_of(DIAMOND).build().fingerprint


def test_G7_a_chain_of_10_000_tasks() -> None:
    tracemalloc.start()
    try:
        dag = dag_of({f"t{i}": [f"t{i - 1}"] if i else [] for i in range(10_000)})
        plan = dag.build()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert plan.ancestors[plan.sink] == plan.all_mask ^ plan.bit[plan.sink]
    assert plan.bypass[5_000] == 0
    assert plan.follow == (*range(1, 10_002), -1)
    assert peak < 150e6
    assert dag.to_mermaid().count("-->") == 9_999
    assert dag.to_svg().count("<rect") == 10_000


def test_G7_a_cycle_of_10_000_tasks_is_found_and_shown_shortened() -> None:
    dag = dag_of({f"t{i}": [f"t{(i - 1) % 10_000}"] for i in range(10_000)})
    [problem] = dag.find_problems()
    assert problem.text.startswith("cycle: t0 -> t1 -> ")
    assert problem.text.endswith(" -> t9999 -> t0")
    assert len(problem.text) < 500


def test_G7_10_000_tasks_side_by_side() -> None:
    plan = dag_of({f"t{i}": [] for i in range(10_000)}).build()
    assert plan.bypass[1].bit_count() == 9_999
    assert len(plan.down_list[plan.source]) == 10_000
