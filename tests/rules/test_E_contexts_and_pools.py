"""E10 to E14 and E16 to E18: what belongs to a worker, to the runtime, to a visit; room; discarded contexts; pools."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from obsdag import (
    DAG,
    Context,
    Executor,
    ExecutorConfig,
    Runtime,
    StopContext,
    WorkerLocalProxy,
    worker_local,
)
from tests.rules.helpers import assert_counts
from tests.rules.virtual import execute, make, now, passing, virtual

every_number = pytest.mark.parametrize("workers", [1, 4, 64])


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"n": n} for n in range(count)]


def double(ctx: Context) -> Context:
    ctx["pid"] = os.getpid()
    return ctx


# --- E10


@every_number
@virtual
async def test_E10_attributes_are_per_worker_for_a_run(workers: int) -> None:
    dag = DAG()

    @dag.task
    async def work(ctx: Context) -> Context:
        if "made" not in worker_local:
            worker_local.made = []
        worker_local.made.append(ctx["n"])
        ctx["made"] = worker_local.made
        await asyncio.sleep(1)
        return ctx

    for _ in range(2):  # the second run finds nothing of the first
        result = await execute(dag, numbered(128), workers)
        lists = {id(output["made"]): output["made"] for output in result}
        assert len(lists) == workers
        assert sorted(n for made in lists.values() for n in made) == list(range(128))


@virtual
async def test_E10_threads_and_parallel_tasks_have_those_of_their_worker() -> None:
    dag = DAG()

    @dag.task
    async def first(ctx: Context) -> Context:
        worker_local.mine = ctx["n"]
        await asyncio.sleep(1)
        return ctx

    @dag.task(after=first)
    def in_thread(ctx: Context) -> Context:
        assert worker_local.mine == ctx["n"]
        worker_local.thread = threading.get_ident()
        return ctx

    @dag.task(after=first)
    async def beside(ctx: Context) -> Context:
        assert worker_local.mine == ctx["n"]
        return ctx

    @dag.task(after=[in_thread, beside])
    async def last(ctx: Context) -> Context:
        assert sorted(worker_local) == ["mine", "thread"]
        assert worker_local.thread != threading.get_ident()
        del worker_local.thread
        return ctx

    assert_counts(await execute(dag, numbered(4), 4, 0), output=4)


def test_E10_outside_a_worker_it_is_empty_and_refuses_to_be_set() -> None:
    assert isinstance(worker_local, WorkerLocalProxy)
    assert "anything" not in worker_local
    assert list(worker_local) == []
    with pytest.raises(AttributeError, match="anything"):
        _ = worker_local.anything
    with pytest.raises(RuntimeError, match="only inside a task"):
        worker_local.anything = 1
    with pytest.raises(RuntimeError, match="only inside a task"):
        del worker_local.anything
    assert getattr(worker_local, "anything", 5) == 5


@virtual
async def test_E10_what_is_missing_on_a_worker_is_an_attribute_error() -> None:
    dag = DAG()

    @dag.task
    async def work(ctx: Context) -> Context:
        with pytest.raises(AttributeError, match="missing"):
            _ = worker_local.missing
        with pytest.raises(AttributeError, match="missing"):
            del worker_local.missing
        return ctx

    assert_counts(await execute(dag), output=1)


# --- E11


def discarding(seen: list[Context]) -> DAG:
    """Drops odd numbers and replaces even ones; `look` then finds what is left of all of them."""
    dag = DAG()

    @dag.task(may_drop=True)
    async def sort(ctx: Context) -> Context | None:
        seen.append(ctx)
        return ctx.create(copy_data=True) if ctx["n"] % 2 == 0 else None

    @dag.task(after=sort)
    async def look(ctx: Context) -> Context:
        await asyncio.sleep(10)
        ctx["outcomes"] = [each.outcome for each in seen]
        return ctx

    return dag


@every_number
@virtual
async def test_E11_discarded_and_replaced_contexts_end_at_once(workers: int) -> None:
    seen: list[Context] = []
    result = await execute(discarding(seen), numbered(4), workers)
    assert_counts(result, output=2, split=2, dropped=2)
    outcomes = [output["outcomes"] for output in result]
    assert outcomes[-1] == [("dropped" if each["n"] % 2 else "split") for each in seen][: len(outcomes[-1])]


@every_number
@virtual
async def test_E11_without_gc_they_stay_living_and_readable_until_the_run_ends(workers: int) -> None:
    seen: list[Context] = []
    result = await execute(discarding(seen), numbered(4), workers, enable_context_gc=False)
    assert_counts(result, output=2, split=2, dropped=2)
    assert {outcome for output in result for outcome in output["outcomes"]} == {None}
    assert [each.outcome for each in seen] == [("dropped" if each["n"] % 2 else "split") for each in seen]
    assert sorted(each["n"] for each in seen) == [0, 1, 2, 3]


@virtual
async def test_E11_no_deadline_ends_what_is_only_kept_readable() -> None:
    seen: list[Context] = []
    result = await execute(discarding(seen), [{"n": 1}, {"n": 2}], 4, enable_context_gc=False, context_deadline=5.0)
    assert_counts(result, dropped=1, split=1, failed=1)


@virtual
async def test_E11_what_is_kept_is_living_by_the_counts_and_takes_no_room() -> None:
    seen: list[Context] = []
    executor = make(discarding(seen), 1, max_live_contexts=2, enable_context_gc=False)
    async with executor.stream(numbered(41)) as outputs:  # the last one of them is the last to come out
        kept = [executor.stats()["living"] async for _ in outputs]
    assert kept[-1] == 41  # neither dropped nor replaced ones have ended while the run goes on
    assert_counts(outputs.counts, output=21, split=21, dropped=20)


# --- E12


def two_branches(log: list[tuple[str, bool]]) -> DAG:
    """left makes a new context; right is the branch beside it."""
    dag = DAG()

    def note(name: str) -> Any:
        async def run(ctx: Context) -> Context:
            log.append((name, "made" in ctx))
            return ctx

        return run

    dag.task(note("first"), name="first")

    @dag.task(after="first")
    async def left(ctx: Context) -> Context:
        made = ctx.create()
        made["made"] = True
        return made

    dag.task(note("below left"), name="below left", after=left)
    dag.task(note("right"), name="right", after="first")
    dag.task(note("below right"), name="below right", after="right")
    dag.task(note("end"), name="end", after=["below left", "below right"])
    dag.task(note("apart"), name="apart")
    return dag


@every_number
@virtual
async def test_E12_a_made_context_has_only_what_is_below_its_maker_before_it(workers: int) -> None:
    log: list[tuple[str, bool]] = []
    dag = two_branches(log)
    result = await execute(dag, None, workers)
    assert_counts(result, output=1, split=1)
    assert sorted(name for name, made in log if made) == ["below left", "end"]
    (output,) = result
    assert set(output.context.completed_tasks) == set(dag.tasks)


@every_number
@virtual
async def test_E12_without_bypass_it_has_the_other_branches_before_it_too(workers: int) -> None:
    log: list[tuple[str, bool]] = []
    result = await execute(two_branches(log), None, workers, enable_context_bypass=False)
    assert_counts(result, output=1, split=1)
    assert sorted(name for name, made in log if made) == ["apart", "below left", "below right", "end", "right"]


# --- E13


class Divided:
    """One context is made into two children; the run's only worker is held in `work` on the first that comes there."""

    def __init__(self, frozen: bool = False) -> None:
        self.dag = DAG()
        self.release = asyncio.Event()
        self.held: Context | None = None
        self.children: list[Context] = []

        @self.dag.task
        async def divide(ctx: Context) -> list[Context]:
            self.children = list(ctx.create_child(2))
            if frozen:
                self.children[1].freeze()
            return self.children

        @self.dag.task(after=divide)
        async def work(ctx: Context) -> Context:
            if self.held is None:
                self.held = ctx
                await self.release.wait()
            return ctx

    def other(self) -> Context:
        """The child that the worker has not got."""
        return next(child for child in self.children if child is not self.held)


@virtual
async def test_E13_ones_own_worker_gets_the_next_context_and_it_counts_as_running() -> None:
    divided = Divided()
    executor = make(divided.dag, 1)
    run = asyncio.create_task(executor.run())
    await asyncio.sleep(1)
    async with executor.check_get_context() as context:
        assert context is divided.other()
        divided.release.set()
        await asyncio.sleep(50)  # the engine's worker has nothing else to do, and does not take it
        assert divided.held is not None
        assert divided.held.outcome == "output"
        assert context.outcome is None
        assert set(context.available_tasks) == {"work"}
        assert not run.done()
    assert_counts(await run, output=2, split=1)  # on leaving it was evaluated, and went on
    assert now() == 51


@virtual
async def test_E13_it_is_waited_for_and_comes_when_there_is_one() -> None:
    divided = Divided(frozen=True)
    executor = make(divided.dag, 1)
    run = asyncio.create_task(executor.run())
    await asyncio.sleep(1)
    asyncio.get_running_loop().call_later(3, divided.children[1].thaw)
    async with executor.check_get_context(timeout=5) as context:
        assert context is divided.children[1]
        assert now() == 4
    divided.release.set()
    assert_counts(await run, output=2, split=1)


@virtual
async def test_E13_an_exception_in_the_block_leaves_the_context_to_the_run() -> None:
    divided = Divided()
    executor = make(divided.dag, 1)
    run = asyncio.create_task(executor.run())
    await asyncio.sleep(1)
    with pytest.raises(KeyError):
        async with executor.check_get_context():
            raise KeyError("mine")
    divided.release.set()
    assert_counts(await run, output=2, split=1)


@virtual
async def test_E13_a_run_that_ends_while_one_waits_gives_a_stop_context() -> None:
    dag = DAG()

    @dag.task
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(9)
        return ctx

    executor = make(dag, 1)
    run = asyncio.create_task(executor.run())
    await asyncio.sleep(1)
    async with executor.check_get_context() as context:
        assert isinstance(context, StopContext)
        assert now() == 9
    assert_counts(await run, output=1)


@virtual
async def test_E13_a_stop_context_when_nothing_lives_or_no_run_is_active() -> None:
    dag = DAG()
    passing(dag, "a", "b")
    executor = make(dag, 1)
    async with executor.check_get_context(timeout=1) as context:
        assert isinstance(context, StopContext)
    await executor.run()
    async with executor.check_get_context() as context:
        assert isinstance(context, StopContext)
    async with executor.check_get_context(use_counter=False) as context:
        assert isinstance(context, StopContext)
    assert now() == 0


@virtual
async def test_E13_timeout_error_when_none_came_in_time() -> None:
    dag, held = DAG(), asyncio.Event()

    @dag.task
    async def hold(ctx: Context) -> Context:
        await held.wait()
        return ctx

    executor = make(dag, 1)
    run = asyncio.create_task(executor.run())
    await asyncio.sleep(1)
    with pytest.raises(TimeoutError):
        async with executor.check_get_context(timeout=7):
            raise AssertionError("there is nothing to be taken")
    assert now() == 8
    held.set()
    assert_counts(await run, output=1)


# --- E14


@virtual
async def test_E14_the_counter_counts_what_is_made_or_entered_and_not_ended() -> None:
    runtime, seen = Runtime(), []
    dag = DAG()

    @dag.task
    async def divide(ctx: Context) -> list[Context]:
        seen.append(runtime.counter)
        children = ctx.create_child(3)
        seen.append(runtime.counter)
        return list(children)

    @dag.task(after=divide)
    async def look(ctx: Context) -> Context:
        seen.append(runtime.counter)
        return ctx

    assert runtime.counter == 0
    context = Context(runtime)
    assert runtime.counter == 1
    assert_counts(await execute(dag, context, 1, runtime=runtime), output=3, split=1)
    assert seen[0] == 1
    assert seen[1] == 4
    assert max(seen[2:]) <= 4
    assert runtime.counter == 0
    kept = Context(runtime)
    assert runtime.counter == 1
    del kept
    assert runtime.counter == 0


@virtual
async def test_E14_a_run_ends_on_its_own_count() -> None:
    runtime, dag = Runtime(), DAG()
    passing(dag, "a", "b")
    outside = Context(runtime)  # counted, and in no run
    executor = make(dag, 2, runtime=runtime)
    assert_counts(await executor.run(numbered(3)), output=3)
    assert now() == 0
    assert runtime.counter == 1
    assert outside.outcome is None


@virtual
async def test_E14_two_executors_of_a_runtime_count_together() -> None:
    runtime, seen = Runtime(), []
    dag = DAG()

    @dag.task
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(1)
        seen.append(runtime.counter)
        await asyncio.sleep(1)
        return ctx

    executors = [make(dag, 4, runtime=runtime) for _ in range(2)]
    await asyncio.gather(*(executor.run(numbered(3)) for executor in executors))
    assert set(seen) == {6}
    assert runtime.counter == 0


# --- E16


@every_number
@virtual
async def test_E16_inputs_map_items_and_loop_items_are_admitted(workers: int) -> None:
    dag, living, most = DAG(), [0], [0]

    @dag.loop
    async def loop(ctx: Context) -> AsyncIterator[Context]:
        for _ in range(30):
            yield ctx.create()

    @dag.map(after=loop)
    async def parts(ctx: Context) -> Iterator[dict[str, Any]]:
        return iter([{"n": n} for n in range(3)])

    @dag.task(after=parts)
    async def work(ctx: Context) -> Context:
        living[0] += 1
        most[0] = max(most[0], living[0])
        await asyncio.sleep(1)
        living[0] -= 1
        return ctx

    result = await execute(dag, numbered(4), workers, max_live_contexts=12)
    assert_counts(result, output=360, split=124)
    assert most[0] <= 12


@virtual
async def test_E16_what_tasks_return_always_enters() -> None:
    dag = DAG()

    @dag.task
    async def divide(ctx: Context) -> list[Context]:
        return list(ctx.create_child(50))

    passing(dag, "work", after=divide)
    executor = make(dag, 1, max_live_contexts=2)
    async with executor.stream(numbered(3)) as outputs:
        assert len([output async for output in outputs]) == 150
    assert_counts(outputs.counts, output=150, split=3)


@every_number
@virtual
async def test_E16_contexts_that_wait_at_a_join_take_no_room(workers: int) -> None:
    dag = DAG()

    @dag.map
    async def parts(ctx: Context) -> AsyncIterator[dict[str, Any]]:
        for n in range(100):
            yield {"n": n}

    passing(dag, "work", after=parts)

    @dag.join(after="work")
    async def together(parent: Context, children: list[Context]) -> Context:
        parent["n"] = len(children)
        return parent

    result = await execute(dag, [{}, {}], workers, max_live_contexts=3)
    assert [output["n"] for output in result] == [100, 100]


@virtual
async def test_E16_those_that_wait_at_a_join_do_not_slow_down_their_siblings() -> None:
    dag = DAG()

    @dag.map
    async def parts(ctx: Context) -> AsyncIterator[dict[str, Any]]:
        for n in range(99):
            yield {"n": n}

    @dag.task(after=parts)
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(1)
        return ctx

    @dag.join(after=work)
    async def together(parent: Context, children: list[Context]) -> Context:
        return parent

    assert_counts(await execute(dag, None, 8, max_live_contexts=4), output=1, merged=99)
    assert now() == 33  # the parent and three children at a time, to the end


@every_number
@virtual
async def test_E16_the_deepest_waiting_map_gets_a_place_when_nothing_else_can_go_on(workers: int) -> None:
    dag, above = DAG(), ()
    for depth in range(4):

        async def parts(ctx: Context) -> AsyncIterator[dict[str, Any]]:
            for n in range(3):
                yield {"n": n}

        above = dag.map(parts, name=f"map {depth}", after=above)
    passing(dag, "leaf", after=above)
    above = "leaf"
    for depth in range(4):

        async def together(parent: Context, children: list[Context]) -> Context:
            parent["leaves"] = sum(child.get("leaves", 1) for child in children)
            return parent

        above = dag.join(together, name=f"join {depth}", after=above)
    (output,) = await execute(dag, None, workers, max_live_contexts=1)
    assert output["leaves"] == 81


# --- E17

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.mark.parametrize("tasks", [1, 0])
@every_number
@virtual
async def test_E17_each_visit_runs_in_a_fresh_copy_of_the_callers_variables(workers: int, tasks: int) -> None:
    dag = DAG()

    @dag.task
    async def work(ctx: Context) -> Context:
        ctx["found"] = variable.get()
        variable.set(f"left by {ctx.id}")
        await asyncio.sleep(1)
        assert variable.get() == f"left by {ctx.id}"
        return ctx

    @dag.task(after=work)
    def in_thread(ctx: Context) -> Context:
        variable.set("left in the thread")
        return ctx

    token = variable.set("the caller's")
    try:
        result = await execute(dag, numbered(20), workers, tasks)
        assert {output["found"] for output in result} == {"the caller's"}
        assert variable.get() == "the caller's"
    finally:
        variable.reset(token)


# --- E18


async def ids_of(executor: Executor, name: str) -> set[int]:
    return {output[name] for output in await executor.run(numbered(6))}


async def test_E18_pools_start_at_first_use_and_close_with_the_run() -> None:
    dag, calm = DAG(), DAG()
    dag.task(double, kind="process")
    passing(calm, "a")
    settings: dict[str, Any] = {"process_pool_worker_num": 1, "thread_pool_worker_num": 1}
    before = set(threading.enumerate())
    assert_counts(await make(calm, 1, **settings).run(numbered(3)), output=3)
    assert set(threading.enumerate()) == before  # nobody used them
    executor = make(dag, 1, **settings)
    first = await ids_of(executor, "pid")
    for pid in first:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not first & await ids_of(executor, "pid")


async def test_E18_an_open_executor_keeps_its_pools_over_several_runs() -> None:
    dag = DAG()

    @dag.task
    def work(ctx: Context) -> Context:
        ctx["thread"] = threading.get_native_id()
        return ctx

    dag.task(double, kind="process", after=work)
    config = ExecutorConfig(thread_pool_worker_num=1, process_pool_worker_num=1)
    async with Executor(dag, config=config) as executor:
        runs = [await executor.run(numbered(3)) for _ in range(3)]
        assert len({output["thread"] for run in runs for output in run}) == 1
        (pid,) = {output["pid"] for run in runs for output in run}
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_E18_an_executor_is_of_one_loop_at_a_time_and_says_so() -> None:
    dag, inside, leave = DAG(), threading.Event(), threading.Event()

    @dag.task
    def work(ctx: Context) -> Context:
        inside.set()
        assert leave.wait(30)
        return ctx

    executor, results = Executor(dag), []
    other = threading.Thread(target=lambda: results.append(executor.run_sync([{}])))
    other.start()
    assert inside.wait(30)
    with pytest.raises(RuntimeError, match="runs in another thread's event loop: make one for each"):
        executor.run_sync([{}])
    leave.set()
    other.join()
    assert_counts(results[0], output=1)
    assert_counts(executor.run_sync([{}]), output=1)  # it has ended there
    assert_counts(Executor(dag).run_sync([{}]), output=1)
