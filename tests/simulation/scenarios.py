"""Random scenarios: a DAG, what its tasks do, a schedule; all of it from one seed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from obsdag.config import ExecutorConfig
from obsdag.context import Context, OutputContext, RateLimitContext
from obsdag.core.observer import Observer
from obsdag.errors import GraphError
from obsdag.graph import DAG
from obsdag.limits import ConcurrencyLimit
from obsdag.tasks import (
    AsyncFunctionTask,
    AsyncLoopTask,
    AsyncRouterTask,
    AsyncServiceTask,
    AsyncStreamTask,
    JoinTask,
    MapTask,
    SyncFunctionTask,
    Task,
    TaskConfig,
)
from obsdag.testing.bodies import HANDED
from tests.simulation.checked import Checked
from tests.simulation.model import Graph
from tests.simulation.told import Told

__all__ = ["FEATURES", "Scenario", "graph_of", "make_scenario", "run_scenario"]

FEATURES = (
    "drop", "fail", "retry", "router", "children", "handback", "map", "join", "roots", "output", "ratelimit", "limits",
    "freeze", "destroy", "loop", "stream", "service", "thread", "cancel", "stop", "gc_off", "bypass_off", "rooms",
    "timeout", "priority", "skip_failed", "pass_through", "others", "deadline",
)  # fmt: skip
"""What a scenario may have. Each seed draws some of them, so that they meet in all combinations."""


@dataclass
class Spec:
    """One task."""

    name: str
    kind: str
    ups: list[int]
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Scenario:
    """All that a seed stands for, but the schedule."""

    seed: int
    features: frozenset[str]
    specs: list[Spec]
    inputs: int
    settings: dict[str, Any]
    dag: DAG
    graph: Graph
    limit_of_contexts: int = 24


# --- random DAGs


def make_scenario(seed: int, allowed: frozenset[str] = frozenset(FEATURES)) -> Scenario:
    random = Random(seed)
    features = frozenset(name for name in FEATURES if name in allowed and random.random() < 0.4)
    size = random.choice((1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8))
    specs: list[Spec] = []
    depth: list[int] = []  # open maps above
    for number in range(1, size + 1):
        ups = _ups(random, number)
        specs.append(_spec(random, number, ups, features, specs, depth))
    for number, spec in enumerate(specs, 1):  # a router needs something to choose from
        if spec.kind == "router" and not any(number in each.ups for each in specs):
            spec.kind = "async"
    if not PARALLEL_JOINS:
        _drop_parallel_joins(specs)
    limits = [ConcurrencyLimit(random.choice((1, 1, 2)), name=f"limit{n}") for n in range(2)]
    if "limits" in features:
        for spec in specs:
            if random.random() < 0.5 and spec.kind not in ("map", "loop"):
                spec.config["limiter"] = tuple(random.sample(limits, random.choice((1, 1, 2))))
            elif random.random() < 0.3 and spec.kind not in ("map", "loop", "stream"):
                spec.config["parallel_num"] = random.choice((1, 2))
    try:
        dag = _dag(specs)
    except GraphError:  # a join with nothing above it that could make children
        for spec in specs:
            if spec.kind == "join":
                spec.kind, spec.options = "async", {}
        dag = _dag(specs)
    settings: dict[str, Any] = {
        "context_worker_num": random.choice((1, 1, 2, 3, 5)),
        "task_worker_num": random.choice((0, 1, 1, 2, 3)),
        "enable_context_gc": not ("gc_off" in features and random.random() < 0.5),
        "enable_context_bypass": not ("bypass_off" in features and random.random() < 0.7),
        "max_live_contexts": random.choice((1, 2, 3, 5)) if "rooms" in features else 10_000,
    }
    inputs = random.choice((1, 1, 2, 3, 4))
    return Scenario(seed, features, specs, inputs, settings, dag, graph_of(dag))


# Known and not fixed: two joins side by side below one map. A child is ready at both; at which one it arrives depends
# on the schedule, and children that arrive at different ones are stalled.
PARALLEL_JOINS = False


def _drop_parallel_joins(specs: list[Spec]) -> None:
    """Makes functions of joins that are not on one line with another join."""
    above: list[set[int]] = [set()]
    joins: list[int] = []
    for number, spec in enumerate(specs, 1):
        above.append(set(spec.ups).union(*(above[up] for up in spec.ups)))
        if spec.kind == "join":
            if all(join in above[number] for join in joins):
                joins.append(number)
            else:
                spec.kind, spec.options = "async", {}


def _ups(random: Random, number: int) -> list[int]:
    if number == 1 or random.random() < 0.08:
        return []
    wanted = random.choice((1, 1, 1, 2, 2, 3))
    near = list(range(max(1, number - 3), number)) if random.random() < 0.7 else list(range(1, number))
    return sorted(random.sample(near, min(wanted, len(near))))


def _spec(
    random: Random, number: int, ups: list[int], features: frozenset[str], specs: list[Spec], depth: list[int]
) -> Spec:
    here = max((depth[up - 1] for up in ups), default=0)
    kinds = ["async"] * 5
    for kind in ("map", "loop", "stream", "service", "router", "thread"):
        if kind in features:
            kinds += [kind] * (2 if kind in ("map", "router") else 1)
    if "join" in features and (here or ("children" in features and ups)):
        kinds += ["join"] * (8 if here else 1)
    kind = random.choice(kinds)
    spec = Spec(f"t{number}", kind, ups)
    depth.append(here + (kind == "map") - (kind == "join" and here > 0))
    if kind == "join" and "skip_failed" in features:
        spec.options["on_child_failure"] = "skip"
    if "retry" in features and random.random() < 0.5:
        spec.config["retry_times"] = random.choice((1, 2))
        spec.config["retry_interval"] = random.choice((0, 1.0, 2.5))
    if "priority" in features:
        spec.config["priority"] = random.choice((0, 0, 1, 2))
    if "pass_through" in features and kind in ("async", "thread") and random.random() < 0.2:
        spec.config["pass_through"] = True
    if "timeout" in features and random.random() < 0.3:
        spec.config["timeout"] = 3.0
    return spec


async def _function(ctx: Context) -> Any:
    return ctx


def _sync(ctx: Context) -> Any:
    return ctx


async def _generator(ctx: Context) -> Any:
    yield ctx


async def _service(queue: Any) -> None:
    await queue.get()


async def _join(parent: Context, children: Any) -> Any:
    return parent


_CLASSES: dict[str, tuple[type[Task], Callable[..., Any]]] = {
    "async": (AsyncFunctionTask, _function),
    "thread": (SyncFunctionTask, _sync),
    "router": (AsyncRouterTask, _function),
    "map": (MapTask, _generator),
    "loop": (AsyncLoopTask, _generator),
    "stream": (AsyncStreamTask, _generator),
    "service": (AsyncServiceTask, _service),
    "join": (JoinTask, _join),
}


def _dag(specs: list[Spec]) -> DAG:
    dag = DAG()
    for spec in specs:
        cls, func = _CLASSES[spec.kind]
        task = cls(func, TaskConfig(**spec.config), spec.name, **spec.options)
        dag.add_task(task, [specs[up - 1].name for up in spec.ups])
    dag.build()
    return dag


def graph_of(dag: DAG) -> Graph:
    """The DAG as sets, for the model."""
    plan = dag.plan
    assert plan is not None
    ups: list[set[int]] = [set() for _ in plan.tasks]
    for above, below in dag.edges(internal=True):
        ups[plan.index[below]].add(plan.index[above])
    tasks = plan.tasks
    return Graph(
        ups,
        [task.shape for task in tasks],
        [task.config.priority for task in tasks],
        [list(task.config.limits) for task in tasks],
        {n for n, task in enumerate(tasks) if getattr(task, "on_child_failure", "") == "skip"},
        {n for n, task in enumerate(tasks) if task.config.pass_through},
    )


# --- what tasks do

QUICK_S = 1.0
"""Virtual seconds: what is quicker need not be told to the observers of half of the scenarios."""


def mix(*values: int) -> int:
    """A number that depends on all values; the same in every process."""
    return hash((values, 0x9E3779B97F4A7C15)) & 0x7FFFFFFFFFFFFFFF


class Player(Checked):
    """Plays a scenario. What an execution does depends on its context's own history only (E15), and on the seed."""

    more_observers: tuple[Observer, ...] = ()

    def __init__(self, scenario: Scenario, schedule: int, choose: Callable[[int], int] | None = None) -> None:
        self.scenario = scenario
        self.made = 0
        self.external = Random(schedule ^ 0x5DEECE66D)
        inputs = [Context(data={"key": mix(scenario.seed, n)}, name=f"i{n}") for n in range(scenario.inputs)]
        level = schedule % 4  # with nobody who listens, the core goes other ways
        book = Told(level, QUICK_S if schedule & 4 else 0.0, alone="others" not in scenario.features) if level else None
        super().__init__(
            scenario.graph,
            scenario.dag,
            inputs,
            seed=schedule,
            choose=choose,
            observers=(*self.more_observers, *((book,) if book else ())),
            config=ExecutorConfig(**scenario.settings),
        )
        self.book = book
        assert self.model is not None
        for index, limits in enumerate(self.run.limits):
            scenario.graph.limits[index] = list(limits)
        self.model.__init__(scenario.graph, self.model.gc, self.model.bypass)  # type: ignore[misc] # the run's own limits are known now
        for index, limits in enumerate(self.run.limits):  # those that the run makes have what the task's config says
            task = self.plan.tasks[index]
            parallel = 1 if task.shape == "stream" else task.config.parallel_num
            if parallel:
                self.model.capacity[limits[-1]] = parallel
        self._bodies.of = self.body  # type: ignore[method-assign]

    def has(self, feature: str) -> bool:
        return feature in self.scenario.features

    def roll(self, execution: Any, salt: int = 0) -> Random:
        attempt = execution.context._data.get(("limited", execution.index), 0) * 100 + execution.attempt
        return Random(mix(self.scenario.seed, execution.context["key"], execution.index, attempt, salt))

    def body(self, execution: Any) -> Generator[Any, Any, Any]:
        return getattr(self, f"_body_{execution.task.shape}")(execution, self.roll(execution))

    def child(self, of: Context, key: int) -> Context:
        self.made += 1
        child = of.create_child(name=f"c{len(self.model.nodes) if self.model else 0}.{self.made}")
        child["key"] = key
        return child

    def root(self, of: Context, key: int) -> Context:
        self.made += 1
        root = of.create(name=f"r{self.made}")
        root["key"] = key
        return root

    # --- bodies

    def _pauses(self, execution: Any, random: Random) -> Generator[Any, Any, None]:
        if execution.task.runs_on == "thread" and random.random() < 0.3:
            yield "pool"
        if random.random() < 0.25:
            swallows = random.random() < 0.3
            try:
                yield random.choice((None, 0.5, 2.0, 4.0))
            except asyncio.CancelledError:
                if not swallows:
                    raise

    def _body_function(self, execution: Any, random: Random) -> Generator[Any, Any, Any]:
        yield from self._pauses(execution, random)
        return (yield from self._act(execution, random))

    def _body_service(self, execution: Any, random: Random) -> Generator[Any, Any, Any]:
        yield HANDED
        yield from self._pauses(execution, random)
        return (yield from self._act(execution, random))

    def _body_stream(self, execution: Any, random: Random) -> Generator[Any, Any, Any]:
        yield from self._pauses(execution, random)
        return (yield from self._act(execution, random))

    def _body_join(self, execution: Any, random: Random) -> Generator[Any, Any, Any]:
        arrived, _, _ = self.run.join_children(execution.context, execution.index)
        self._check_join(execution, arrived)
        yield from self._pauses(execution, random)
        if self.has("children") and arrived and random.random() < 0.1:
            return [arrived[0]] if random.random() < 0.5 else [execution.context, arrived[0]]
        return (yield from self._act(execution, random))

    def _check_join(self, execution: Any, arrived: list[Context]) -> None:
        assert self.model is not None
        node = self.model.nodes[execution.context]
        branches = [branch for branch in node.branches.values() if branch.joining == execution.index]
        children = {id(c) for branch in branches for c in branch.children if c.living and not c.left_branch}
        wanted = [each.context for each in node.children if id(each) in children]
        assert arrived == wanted, f"join called with {arrived}, by T15 {wanted}"

    def _body_router(self, execution: Any, random: Random) -> Generator[Any, Any, Any]:
        yield from self._pauses(execution, random)
        self._may_fail(execution, random)
        below = [self.plan.tasks[t].id for t in self.plan.down_list[execution.index]]
        if self.has("drop") and random.random() < 0.08:
            return None
        return random.sample(below, random.randint(1, len(below)))

    def _body_map(self, execution: Any, random: Random) -> Generator[Any, Any, Any]:
        return (yield from self._bodies._pulled(execution))

    _body_loop = _body_map

    def _may_fail(self, execution: Any, random: Random) -> None:
        if self.has("fail") and random.random() < 0.06:
            raise ValueError("fails")
        if self.has("retry") and execution.attempt <= execution.task.config.retry_times and random.random() < 0.3:
            raise ValueError("fails at first")

    def _act(self, execution: Any, random: Random) -> Generator[Any, Any, Any]:
        """One of the things that a function may do."""
        self._may_fail(execution, random)
        context, key = execution.context, execution.context["key"]
        full = self.made > self.scenario.limit_of_contexts

        def keys(n: int) -> int:
            return mix(key, execution.index, execution.attempt, n)

        chance = random.random()
        if self.has("children") and chance < 0.15 and not full:
            made = [self.child(context, keys(n)) for n in range(random.choice((1, 2, 2, 3)))]
            if random.random() < 0.15:
                made.insert(0, context)
            return made
        if self.has("handback") and context.parent is not None and chance < 0.30:
            parents = [context.parent]
            if context.parent.parent is not None and random.random() < 0.2:
                parents = [context.parent.parent]
            return [*parents, context] if random.random() < 0.2 else parents
        if self.has("roots") and chance < 0.40 and chance > 0.30 and not full:
            made = [self.root(context, keys(n)) for n in range(random.choice((1, 1, 2)))]
            if random.random() < 0.4:
                made.append(context)
            return made
        if self.has("drop") and 0.40 < chance < 0.46:
            return random.choice((None, []))
        if self.has("output") and 0.46 < chance < 0.49:
            return OutputContext()
        if self.has("ratelimit") and 0.49 < chance < 0.60 and not context._data.get(("limited", execution.index)):
            context._data[("limited", execution.index)] = 1
            return RateLimitContext(context, random.choice((0.5, 1.0, 3.0)))
        if self.has("freeze") and 0.60 < chance < 0.70:
            return (yield from self._freeze(execution, random))
        if self.has("destroy") and 0.70 < chance < 0.73:
            self._any_context(random, context).destroy()
            yield None
            return random.choice(([context], [], [self.root(context, keys(9))], [self.child(context, keys(8))]))
        if self.has("others") and 0.73 < chance < 0.78:
            return [context, self._any_context(random, context)]
        return context

    def _any_context(self, random: Random, own: Context) -> Context:
        others = [own, *self.run.contexts]
        return others[random.randrange(len(others))]

    def _freeze(self, execution: Any, random: Random) -> Generator[Any, Any, Any]:
        context = execution.context
        context.freeze()
        if random.random() < 0.8:
            self.later(f"thaw {context._id}", context.thaw)
        yield random.choice((None, 1.0))
        return random.choice((context, context, None))


async def _map_items(player: Player, execution: Any) -> Any:
    random = player.roll(execution, 1)
    context = execution.context
    number = random.choice((0, 1, 2, 2, 3)) if player.made < player.scenario.limit_of_contexts else 0
    for n in range(number):
        if player.has("fail") and random.random() < 0.04:
            raise ValueError("map fails")
        key = mix(context["key"], execution.index, n)
        player.made += 1
        if execution.task.shape == "map":
            kind = random.random()
            if kind < 0.6:
                yield {"key": key}
            elif kind < 0.9:
                yield player.child(context, key)
            else:
                yield [player.child(context, key), {"key": key + 1}]
        elif random.random() < 0.1:
            yield context
        else:
            yield player.root(context, key)
    if player.has("fail") and random.random() < 0.04:
        raise ValueError("map fails at its end")


def play(scenario: Scenario, schedule: int, choose: Callable[[int], int] | None = None) -> Player:
    """A player with its external events set, not yet run."""
    player = Player(scenario, schedule, choose)
    set_up(player, scenario)
    return player


def set_up(player: Player, scenario: Scenario) -> None:
    """Its loops and maps give what the scenario says; the external events come some time."""
    bodies = player._bodies

    def make(execution: Any) -> Any:
        return _map_items(player, execution)

    bodies._make = make  # type: ignore[method-assign]
    bodies._first = bodies_first  # type: ignore[method-assign,assignment]
    random = player.external

    def poke(action: str) -> Callable[[], None]:
        def call() -> None:
            contexts = list(player.run.contexts)
            if contexts:
                context = contexts[random.randrange(len(contexts))]
                if action == "cancel":
                    player.run.call(player.run.cancel, context)
                else:
                    getattr(context, action)()
                if action == "freeze":
                    player.later(f"thaw {context._id}", context.thaw)

        return call

    for feature, action in (("cancel", "cancel"), ("destroy", "destroy"), ("freeze", "freeze"), ("freeze", "thaw")):
        if player.has(feature) and random.random() < 0.5:
            player.later(action, poke(action))
    if player.has("stop") and random.random() < 0.2:
        player.later("stop", player.stop)


def bodies_first(task: Any, generator: Any, context: Any) -> Any:
    from obsdag.testing.bodies import _step

    return (yield from _step(generator, None))


def run_scenario(seed: int, allowed: frozenset[str] = frozenset(FEATURES), schedules: int = 1) -> list[Any]:
    """Plays a scenario under some schedules; raises where the engine and the rules part."""
    scenario = make_scenario(seed, allowed)
    results = []
    for number in range(schedules):
        player = play(scenario, mix(seed, number))
        results.append(player.finish(20_000))
    return results
