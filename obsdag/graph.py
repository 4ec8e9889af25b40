"""The DAG that users define: tasks and dependencies, decorators, other DAGs inside it (SEMANTICS section 2).

A DAG is changeable until it is built, and never after: `build` adds source and sink, validates, and makes the `Plan`
that every run works from. What a run changes belongs to the run (T10).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import Any, TypeVar, overload

from obsdag import draw
from obsdag.errors import GraphError
from obsdag.plan import Plan, compile_plan, topological_order
from obsdag.tasks.base import Task, TaskConfig
from obsdag.tasks.function import FunctionTask
from obsdag.tasks.kinds import did_you_mean, make_task
from obsdag.tasks.special import SinkNode, SourceNode
from obsdag.tasks.subdag import SubDAG
from obsdag.validation import Problem, find_problems

__all__ = ["DAG", "Dependency", "KindDecorator"]

Function = Callable[..., Any]
Dependency = Task | str | Function | Iterable[Task | str | Function]
"""What a task can be after: a task, a task id, a function that was decorated, or an iterable of these."""
_TaskT = TypeVar("_TaskT", bound=Task)


class KindDecorator:
    """`dag.router`, `dag.map`, ...: `dag.task` with its kind given, used bare or called with the same keywords."""

    __slots__ = ("_dag", "_kind")

    def __init__(self, dag: DAG, kind: str) -> None:
        self._dag = dag
        self._kind = kind

    @overload
    def __call__(self, func: Function, /, **settings: Any) -> Task: ...

    @overload
    def __call__(self, func: None = None, /, **settings: Any) -> Callable[[Function], Task]: ...

    def __call__(self, func: Function | None = None, /, **settings: Any) -> Task | Callable[[Function], Task]:
        """As `DAG.task`; `kind` may be given to be more exact, such as "foreground_router"."""
        decorate = self._dag.task(**{"kind": self._kind, **settings})
        return decorate if func is None else decorate(func)


class DAG:
    """Tasks and dependencies between one source, `in_task`, and one sink, `out_task` (G1, G2).

    Mistakes are collected and told together by `build`, as a GraphError with all of them in `problems` (G3). Changing a
    built DAG raises GraphError.
    """

    def __init__(self, name: str = "dag") -> None:
        if not isinstance(name, str) or not name:
            raise GraphError(f"a DAG's name must be a non-empty text, not {name!r}")
        self._name = name
        self.in_task: Task = SourceNode()
        self.out_task: Task = SinkNode()
        self._tasks: dict[str, Task] = {}
        self._after: dict[str, list[str | Task]] = {}
        self._by_function: dict[int, list[Task]] = {}
        self._included: dict[str, SubDAG] = {}
        self._scope: dict[str, str] = {}  # id of an included task -> what its DAG's ids begin with here, "name/"
        self._problems: list[Problem] = []
        self._plan: Plan | None = None
        self._building = threading.Lock()

    def __repr__(self) -> str:
        state = "built" if self._plan else "not built"
        return f"<DAG {self.name!r}: {len(self._tasks)} tasks, {state}>"

    @property
    def name(self) -> str:
        """Its name, on metrics, traces and lines; fixed when it is built (G2)."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._refuse_if_built(f"name it {name!r}")
        self._name = name

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks by id, in the order in which they were added; without source and sink."""
        return MappingProxyType(self._tasks)

    @property
    def plan(self) -> Plan | None:
        """The plan, once the DAG is built."""
        return self._plan

    # Defining ---------------------------------------------------------------------------------------------------------

    def add_task(self, task: _TaskT, dependencies: Dependency = ()) -> _TaskT:
        """Adds `task` after `dependencies` and returns it; an id may be of a task that is added later (G1).

        Raises TypeError for what is no task or no dependency, GraphError if the DAG is built.
        """
        self._refuse_if_built(f"add {task!r}")
        if not isinstance(task, Task):
            raise TypeError(f"{task!r} is no task: decorate a function with @dag.task, or wrap it in a task class")
        wanted = self._references(dependencies, task.id)
        if isinstance(task, SubDAG):
            self._include(task, wanted)
        elif self._may_be_named(task):
            self._put(task, wanted)
        return task

    def include(self, other: DAG, name: str = "", after: Dependency = ()) -> SubDAG:
        """Puts copies of another DAG's tasks into this one, as `name/task` (G5); `name` is the other's if not given.

        Those that come first there come after `after` here. The result can be depended on: it means all those that
        nothing comes after. What is added to the other DAG later does not appear here.
        """
        return self.add_task(SubDAG(other, name=name), after)

    @overload
    def task(
        self,
        func: Function,
        /,
        *,
        after: Dependency = (),
        name: str = "",
        kind: str | type[Task] | None = None,
        config: TaskConfig | None = None,
        **settings: Any,
    ) -> Task: ...

    @overload
    def task(
        self,
        func: None = None,
        /,
        *,
        after: Dependency = (),
        name: str = "",
        kind: str | type[Task] | None = None,
        config: TaskConfig | None = None,
        **settings: Any,
    ) -> Callable[[Function], Task]: ...

    def task(
        self,
        func: Function | None = None,
        /,
        *,
        after: Dependency = (),
        name: str = "",
        kind: str | type[Task] | None = None,
        config: TaskConfig | None = None,
        **settings: Any,
    ) -> Task | Callable[[Function], Task]:
        """Decorator: makes a task of the function, adds it, and puts the Task in the function's place (`task.func`).

        after: what it comes after. name: its id, else the function's name. kind: one of `obsdag.tasks.kinds.KINDS`, or
        a class of task; None: by the function, which is a coroutine function, plain, or either as a generator (G1).
        config, settings: a TaskConfig, and its fields by name, which win; also options of the kind, such as `targets`.
        Raises ConfigError for unknown or out-of-range settings.
        """

        def decorate(func: Function) -> Task:
            task = self.add_task(make_task(func, kind, name, config, settings), after)
            self._by_function.setdefault(id(func), []).append(task)
            return task

        return decorate if func is None else decorate(func)

    @property
    def router(self) -> KindDecorator:
        """`@dag.task(kind="router")`: the function returns ids of tasks right after it (T9); takes `targets=` too."""
        return KindDecorator(self, "router")

    @property
    def map(self) -> KindDecorator:
        """`@dag.task(kind="map")`: the function gives the children of its context (T15)."""
        return KindDecorator(self, "map")

    @property
    def join(self) -> KindDecorator:
        """`@dag.task(kind="join")`: the function gets parent and children (T15); takes `on_child_failure=` too."""
        return KindDecorator(self, "join")

    @property
    def stream(self) -> KindDecorator:
        """`@dag.task(kind="stream")`: a generator, plain or async, that is sent contexts (T5)."""
        return KindDecorator(self, "stream")

    @property
    def loop(self) -> KindDecorator:
        """`@dag.task(kind="loop")`: a generator, plain or async, that makes new contexts out of one (T5, T14)."""
        return KindDecorator(self, "loop")

    @property
    def service(self) -> KindDecorator:
        """`@dag.task(kind="service")`: a function, plain or async, that answers a queue of (context, future) (T5).

        At the end of the run it gets `(StopContext(), future)`, and is to return; see `obsdag.examples.batching`.
        """
        return KindDecorator(self, "service")

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | PathLike[str]) -> DAG:
        """A DAG from a mapping or the path of a TOML file (G8); raises GraphError with every mistake and its place."""
        from obsdag.dag_config import dag_from_config

        return dag_from_config(config, cls)

    # Building ---------------------------------------------------------------------------------------------------------

    def build(self) -> Plan:
        """Adds source and sink, validates and compiles (G2); again, it returns the same plan. Raises GraphError."""
        with self._building:
            if self._plan is None:
                upstreams, problems = self._checked()
                if problems:
                    raise GraphError([str(problem) for problem in problems])
                self._plan = self._compile(upstreams)
            return self._plan

    def find_problems(self) -> list[Problem]:
        """Every mistake that `build` would tell (G3), each with the task that it is about."""
        return [] if self._plan else self._checked()[1]

    def edges(self, internal: bool = False) -> list[tuple[str, str]]:
        """The edges as (upstream id, downstream id), in order of the downstreams; with source and sink if `internal`.

        Dependencies that were never added are left out. `internal` needs a built DAG.
        """
        if internal:
            plan = self._needs_plan("its source and sink")
            return [(plan.tasks[above].id, task.id) for i, task in enumerate(plan.tasks) for above in plan.up_list[i]]
        upstreams, _ = self._upstreams()
        return [(above, task_id) for task_id, ids in upstreams.items() for above in ids]

    # Drawing (G6) -----------------------------------------------------------------------------------------------------

    def to_mermaid(self, internal: bool = False) -> str:
        """The DAG as a Mermaid flowchart; with source and sink if `internal`, which needs a built DAG."""
        return draw.to_mermaid(self, internal)

    def to_dot(self, internal: bool = False) -> str:
        """The DAG in Graphviz's language; with source and sink if `internal`, which needs a built DAG."""
        return draw.to_dot(self, internal)

    def to_dict(self, internal: bool = False) -> dict[str, Any]:
        """`{"name", "nodes": [{"id", "kind", "config"}], "edges": [[upstream, downstream]]}`, equal for equal DAGs."""
        return draw.to_dict(self, internal)

    def to_svg(self, internal: bool = False) -> str:
        """The DAG as a picture of its own layout, readable for up to about 50 tasks, in light and dark pages."""
        return draw.to_svg(self, internal)

    # Inside -----------------------------------------------------------------------------------------------------------

    def _refuse_if_built(self, wish: str) -> None:
        if self._plan is not None:
            raise GraphError(f"DAG {self.name!r} is built and cannot be changed any more: cannot {wish}")

    def _needs_plan(self, what: str) -> Plan:
        if self._plan is None:
            raise GraphError(f"DAG {self.name!r} is not built: call build() before asking for {what}")
        return self._plan

    def _references(self, after: Any, wanted_by: str) -> list[str | Task]:
        many = [after] if isinstance(after, str | Task) or callable(after) else after
        if not isinstance(many, Iterable):
            raise TypeError(
                f"task {wanted_by!r}: a dependency is a task, a task id or a decorated function, not {after!r}"
            )
        found: list[str | Task] = []
        for each in many:
            if isinstance(each, str | Task):
                found.append(each)
            elif callable(each):
                found.extend(self._tasks_of(each, wanted_by))
            else:
                raise TypeError(
                    f"task {wanted_by!r}: a dependency is a task, a task id or a decorated function, not {each!r}"
                )
        return found

    def _tasks_of(self, func: Function, wanted_by: str) -> list[Task]:
        tasks = self._by_function.get(id(func), [])
        if len(tasks) != 1:
            count = f"{len(tasks)} tasks were" if tasks else "no task was"
            name = getattr(func, "__qualname__", func)
            text = f"depends on the function {name!r}, of which {count} made: name the task instead"
            self._problems.append(Problem(wanted_by, text, "after"))
        return tasks

    def _may_be_named(self, task: Task) -> bool:
        if isinstance(task, SourceNode | SinkNode):
            self._problems.append(Problem(task.id, "every DAG has its own source and sink: add other tasks only"))
        elif not isinstance(task.id, str) or not task.id:
            self._problems.append(Problem("", f"a task's id must be a non-empty text, not {task.id!r}"))
        elif self._tasks.get(task.id) is task:
            self._problems.append(Problem(task.id, "was added twice"))
        elif task.id in self._tasks or task.id in self._included:
            self._problems.append(Problem(task.id, "another task has that id already: give one of them a name"))
        else:
            return True
        return False

    def _put(self, task: Task, after: list[str | Task]) -> None:
        self._tasks[task.id] = task
        self._after[task.id] = after

    def _include(self, handle: SubDAG, after: list[str | Task]) -> None:
        other, prefix = handle.dag, f"{handle.id}/"
        if not self._may_be_named(handle):
            return
        self._problems += [
            Problem(prefix + p.task if p.task else handle.id, p.text, p.setting) for p in other._problems
        ]
        nested = [_handle_within(inner, prefix) for inner in other._included.values()]
        if not other._tasks:
            self._problems.append(Problem(handle.id, f"the included DAG {other.name!r} has no task"))
        upstreams, unknown = other._upstreams()
        self._problems += [Problem(prefix + p.task, p.text, p.setting) for p in unknown]
        with_downstreams = {above for ids in upstreams.values() for above in ids}
        for task_id, task in list(other._tasks.items()):
            mine = _copy_named(task, prefix + task_id)
            if self._may_be_named(mine):
                above: list[str | Task] = [prefix + each for each in upstreams[task_id]]
                self._put(mine, above or list(after))
                self._scope[mine.id] = prefix + other._scope.get(task_id, "")
        handle.members = tuple(prefix + task_id for task_id in upstreams)
        handle.entries = tuple(prefix + task_id for task_id, ids in upstreams.items() if not ids)
        handle.exits = tuple(prefix + task_id for task_id in upstreams if task_id not in with_downstreams)
        self._included |= {each.id: each for each in [handle, *nested]}

    def _upstreams(self) -> tuple[dict[str, list[str]], list[Problem]]:
        """The ids of the direct upstreams of each task, without repeats; and the dependencies that were never added."""
        upstreams: dict[str, list[str]] = {}
        problems: list[Problem] = []
        for task_id, wanted in self._after.items():
            ids: dict[str, None] = {}
            for each in wanted:
                found = self._resolve(each)
                if found is None:
                    problems.append(Problem(task_id, self._never_added(each), "after"))
                else:
                    ids.update(dict.fromkeys(found))
            upstreams[task_id] = list(ids)
        return upstreams, problems

    def _resolve(self, wanted: str | Task) -> Sequence[str] | None:
        if wanted is self.in_task or (wanted == self.in_task.id and wanted not in self._tasks):
            return ()
        if isinstance(wanted, str):
            if wanted in self._included:
                return self._included[wanted].exits
            return (wanted,) if wanted in self._tasks else None
        if isinstance(wanted, SubDAG):
            return wanted.exits if self._included.get(wanted.id) is wanted else None
        return (wanted.id,) if self._tasks.get(wanted.id) is wanted else None

    def _never_added(self, wanted: str | Task) -> str:
        if isinstance(wanted, str):
            return f"depends on {wanted!r}, which was never added{did_you_mean(wanted, self._tasks)}"
        if wanted.id in self._tasks:
            return f"depends on a task {wanted.id!r} that was never added: another task has that id here"
        return f"depends on {wanted.id!r}, which was never added"

    def _checked(self) -> tuple[dict[str, list[str]], list[Problem]]:
        upstreams, unknown = self._upstreams()
        problems = [*self._problems, *unknown]
        problems += find_problems(self._tasks, upstreams, self._choices(upstreams))
        for task in self._tasks.values():
            if task.upstream_tasks or task.downstream_tasks:
                problems.append(
                    Problem(task.id, "belongs to another DAG, which is built: make a new task, or include that DAG")
                )
        return upstreams, problems

    def _choices(self, upstreams: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[str]]]:
        """What each router may return, and the direct downstreams that it stands for (`Plan.choices`)."""
        below: dict[str, list[str]] = {task_id: [] for task_id, task in self._tasks.items() if task.shape == "router"}
        for task_id, ids in upstreams.items():
            for above in ids:
                if above in below:
                    below[above].append(task_id)
        choices: dict[str, dict[str, list[str]]] = {}
        for router_id, ids in below.items():
            names = {task_id: [task_id] for task_id in ids}
            for handle in self._included.values():
                if entries := [task_id for task_id in handle.entries if task_id in names]:
                    names[handle.id] = entries
            scope = self._scope.get(router_id, "")
            local = {name.removeprefix(scope): found for name, found in names.items() if name.startswith(scope)}
            choices[router_id] = local | names
        return choices

    def _compile(self, upstreams: Mapping[str, Sequence[str]]) -> Plan:
        for node in (self.in_task, self.out_task):
            while node.id in self._tasks or node.id in self._included:
                node.id = f"_{node.id}"
        inner = list(self._tasks)
        position = {task_id: i for i, task_id in enumerate(inner)}
        order, _ = topological_order([[position[above] for above in upstreams[task_id]] for task_id in inner])
        with_downstreams = {above for ids in upstreams.values() for above in ids}
        ids = [self.in_task.id, *(inner[i] for i in order), self.out_task.id]
        above_of: dict[str, Sequence[str]] = {
            self.in_task.id: (),
            **{task_id: above or (self.in_task.id,) for task_id, above in upstreams.items()},
            self.out_task.id: [task_id for task_id in inner if task_id not in with_downstreams],
        }
        tasks = [self.in_task, *(self._tasks[task_id] for task_id in ids[1:-1]), self.out_task]
        index = {task_id: i for i, task_id in enumerate(ids)}
        plan = compile_plan(
            self.name,
            tasks,
            [[index[above] for above in above_of[task_id]] for task_id in ids],
            self._choices(upstreams),
        )
        for i, task in enumerate(tasks):
            task.upstream_tasks.update(tasks[above] for above in plan.up_list[i])
            task.downstream_tasks.update(tasks[below] for below in plan.down_list[i])
            task._built = True
        return plan


def _copy_named(task: Task, task_id: str) -> Task:
    # not the kind's own for_run: a shutdown task's object is copied for a run, not for an inclusion
    mine = FunctionTask.for_run(task) if isinstance(task, FunctionTask) else task.free_copy()
    mine.id = task_id
    mine.upstream_tasks, mine.downstream_tasks = set(), set()
    return mine


def _handle_within(inner: SubDAG, prefix: str) -> SubDAG:
    mine = SubDAG(inner.dag, name=prefix + inner.id)
    mine.members, mine.entries, mine.exits = (
        tuple(prefix + task_id for task_id in ids) for ids in (inner.members, inner.entries, inner.exits)
    )
    return mine
