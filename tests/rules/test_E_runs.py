"""E1 to E3: configuration, what `run` takes and gives, streams."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import resource
import statistics
import threading
import tracemalloc
import types
import weakref
from collections import UserDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from obsdag import DAG, ConfigError, Context, Executor, ExecutorConfig, OutputContext, RunResult, Runtime
from obsdag.core.states import OUTCOMES
from tests.rules.helpers import assert_counts
from tests.rules.virtual import Ends, Held, assert_clean, execute, make, now, passing, virtual

every_number = pytest.mark.parametrize("workers", [1, 4, 64])


def one(**settings: Any) -> DAG:
    dag = DAG()
    passing(dag, "only", **settings)
    return dag


# --- E1


def test_E1_an_executor_is_made_of_dag_runtime_and_config() -> None:
    dag, runtime, config = one(), Runtime(), ExecutorConfig()
    executor = Executor(dag, runtime, config)
    assert (executor.dag, executor.runtime, executor.config) == (dag, runtime, config)
    alone = Executor(one())
    assert isinstance(alone.runtime, Runtime)
    assert alone.config == ExecutorConfig()
    assert Executor(one(), config=config, runtime=runtime).runtime is runtime


def test_E1_the_seeds_defaults() -> None:
    config = ExecutorConfig()
    seed = {
        "context_worker_num": 1,
        "task_worker_num": 1,
        "context_queue_timeout": 1,
        "thread_pool_worker_num": 0,
        "process_pool_worker_num": 0,
        "enable_context_gc": True,
        "enable_context_bypass": True,
        "worker_idle_times": 20,
    }
    assert {name: getattr(config, name) for name in seed} == seed
    added = {"max_live_contexts", "on_failure", "deadline", "shutdown_grace", "telemetry", "debug"}
    assert added <= {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context_worker_num", 0),
        ("context_worker_num", -1),
        ("context_worker_num", 1.5),
        ("context_worker_num", "4"),
        ("context_worker_num", True),
        ("task_worker_num", -1),
        ("context_queue_timeout", -1),
        ("context_queue_timeout", float("nan")),
        ("thread_pool_worker_num", -1),
        ("process_pool_worker_num", -1),
        ("enable_context_gc", 1),
        ("enable_context_bypass", "yes"),
        ("worker_idle_times", -1),
        ("max_live_contexts", 0),
        ("on_failure", "ignore"),
        ("deadline", 0),
        ("deadline", float("inf")),
        ("shutdown_grace", -0.1),
        ("debug", None),
    ],
)
def test_E1_values_are_validated_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        ExecutorConfig(**{name: value})


def test_E1_a_config_is_read_from_a_mapping_toml_and_variables(tmp_path: Path) -> None:
    assert ExecutorConfig.from_mapping({"task_worker_num": 3}).task_worker_num == 3
    file = tmp_path / "obsdag.toml"
    file.write_text('[executor]\ncontext_worker_num = 8\ncontext_queue_timeout = "none"\n', encoding="utf-8")
    config = ExecutorConfig.from_toml(file)
    assert (config.context_worker_num, config.context_queue_timeout) == (8, None)
    assert ExecutorConfig.from_env({"OBSDAG_MAX_LIVE_CONTEXTS": "7", "HOME": "x"}).max_live_contexts == 7
    with pytest.raises(ConfigError, match="contxt_worker_num"):
        ExecutorConfig.from_mapping({"contxt_worker_num": 3})


@pytest.mark.parametrize("config", [{"debug": True}, 4, ExecutorConfig])
def test_E1_a_config_of_another_type_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="config"):
        Executor(one(), None, config)


class Width:
    """How many executions ran at once, at most."""

    def __init__(self) -> None:
        self.running = self.most = 0

    async def hold(self, seconds: float = 1.0) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(seconds)
        self.running -= 1


@every_number
@virtual
async def test_E1_context_worker_num_contexts_are_driven_at_once(workers: int) -> None:
    dag, width = DAG(), Width()

    @dag.task
    async def hold(ctx: Context) -> Context:
        await width.hold()
        return ctx

    result = await execute(dag, [{} for _ in range(128)], workers)
    assert_counts(result, output=128)
    assert width.most == workers
    assert now() == pytest.approx(128 / workers)


@pytest.mark.parametrize(("tasks", "most"), [(1, 1), (2, 2), (3, 3), (5, 5), (9, 6), (0, 6)])
@virtual
async def test_E1_task_worker_num_ready_tasks_of_one_context_run_at_once(tasks: int, most: int) -> None:
    dag, width = DAG(), Width()

    async def hold(ctx: Context) -> Context:
        await width.hold()
        return ctx

    for number in range(6):
        dag.task(hold, name=f"t{number}")
    result = await execute(dag, {}, 1, tasks)
    assert_counts(result, output=1)
    assert width.most == most
    assert now() == -(-6 // most)


@pytest.mark.parametrize("threads", [1, 3])
async def test_E1_thread_pool_worker_num_threads_run_sync_tasks(threads: int) -> None:
    dag = DAG()
    idents: set[int] = set()
    meet = threading.Barrier(threads)

    @dag.task
    def work(ctx: Context) -> Context:
        idents.add(threading.get_ident())
        meet.wait(5)  # so many really run at once
        return ctx

    result = await make(dag, 8, thread_pool_worker_num=threads).run([{} for _ in range(4 * threads)])
    assert_counts(result, output=4 * threads)
    assert len(idents) == threads


async def test_E1_no_threads_asked_for_is_a_pool_of_default_size() -> None:
    dag = DAG()
    meet = threading.Barrier(4)

    @dag.task
    def work(ctx: Context) -> Context:
        meet.wait(5)
        return ctx

    assert_counts(await make(dag, 4, thread_pool_worker_num=0).run([{} for _ in range(4)]), output=4)


def process_work(ctx: Any) -> Any:
    return ctx


async def test_E1_no_process_pool_is_none() -> None:
    dag = DAG()
    seen: list[Any] = []

    @dag.task
    async def look(ctx: Context, env: Any) -> Context:
        seen.append(env.process_pool)
        return ctx

    await make(dag).run()
    assert seen == [None]

    wants = DAG()
    wants.task(process_work, kind="process")
    with pytest.raises(ConfigError, match="process_pool_worker_num"):
        Executor(wants)


# --- E2: what goes in


def generated(items: list[Any]) -> Iterator[Any]:
    yield from items


async def trickled(items: list[Any]) -> AsyncIterator[Any]:
    for item in items:
        await asyncio.sleep(0.5)
        yield item


FORMS: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "context": (lambda: Context(data={"n": 0}), [0]),
    "contexts": (lambda: [Context(data={"n": n}) for n in range(3)], [0, 1, 2]),
    "nothing": (lambda: None, [-1]),
    "no contexts": (list, []),
    "mapping": (lambda: {"n": 7}, [7]),
    "empty mapping": (dict, [-1]),
    "read-only mapping": (lambda: types.MappingProxyType({"n": 7}), [7]),
    "mapping of the user's": (lambda: UserDict({"n": 7}), [7]),
    "mappings": (lambda: [{"n": 1}, {"n": 2}], [1, 2]),
    "mixed": (lambda: [{"n": 1}, Context(data={"n": 2}), UserDict({"n": 3})], [1, 2, 3]),
    "tuple": (lambda: ({"n": 1}, {"n": 2}), [1, 2]),
    "generator": (lambda: generated([{"n": 1}, Context(data={"n": 2})]), [1, 2]),
    "map object": (lambda: map(dict, [[("n", 0)], [("n", 1)]]), [0, 1]),
    "async generator": (lambda: trickled([{"n": 1}, Context(data={"n": 2})]), [1, 2]),
    "empty async generator": (lambda: trickled([]), []),
}


@every_number
@pytest.mark.parametrize("form", FORMS)
@virtual
async def test_E2_run_takes(form: str, workers: int) -> None:
    build, numbers = FORMS[form]
    result = await execute(one(), build(), workers)
    assert [output.get("n", -1) for output in result] == numbers
    assert_counts(result, output=len(numbers))


@virtual
async def test_E2_the_input_context_itself_runs_and_a_mapping_is_copied() -> None:
    context, mapping = Context(name="mine"), {"n": 1}
    dag = DAG()

    @dag.task
    async def change(ctx: Context) -> Context:
        ctx["n"] = 2
        return ctx

    executor = make(dag)
    (output,) = await executor.run(context)
    assert output.context is context
    assert (context.outcome, context.id, output.id) == ("output", "mine", "mine")
    await executor.run([mapping])
    assert mapping == {"n": 1}


RUBBISH: list[Any] = [5, 0, 1.5, "text", b"bytes", bytearray(), object(), Context, len, True, Runtime()]


@pytest.mark.parametrize("rubbish", RUBBISH, ids=lambda value: type(value).__name__)
@virtual
async def test_E2_other_input_is_a_value_error(rubbish: Any) -> None:
    executor = make(one())
    with pytest.raises(ValueError, match="input"):
        await executor.run(rubbish)
    assert executor.stats()["entered"] == 0
    assert_clean()


@pytest.mark.parametrize(
    "rubbish", [5, "text", Context, None, [{}], OutputContext()], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("form", [list, tuple, generated, trickled])
@every_number
@virtual
async def test_E2_an_item_that_is_no_input_ends_the_run_with_a_value_error(
    rubbish: Any, form: Callable[[list[Any]], Any], workers: int
) -> None:
    executor = make(one(), workers)
    with pytest.raises(ValueError, match="input"):
        await executor.run(form([{}, {}, rubbish, {}]))
    stats = executor.stats()
    assert stats["living"] == 0
    assert stats["entered"] == sum(stats[name] for name in OUTCOMES) <= 2
    assert_clean()


# --- E2: what comes out


@every_number
@virtual
async def test_E2_outputs_come_in_order_of_completion(workers: int) -> None:
    dag = DAG()

    @dag.task
    async def wait(ctx: Context) -> Context:
        await asyncio.sleep(ctx["n"])
        return ctx

    result = await execute(dag, [{"n": n} for n in (3, 1, 2)], workers)
    assert isinstance(result, RunResult)
    assert isinstance(result, list)
    assert all(type(output) is OutputContext for output in result)
    assert [output["n"] for output in result] == ([3, 1, 2] if workers == 1 else [1, 2, 3])


@virtual
async def test_E2_the_result_has_failures_counts_stalled_and_duration() -> None:
    dag = DAG()

    @dag.task(may_drop=True)
    async def fate(ctx: Context) -> Context | None:
        await asyncio.sleep(2)
        if ctx["n"] == 1:
            raise ValueError("one")
        return ctx if ctx["n"] else None

    result = await execute(dag, [{"n": n} for n in range(4)], 1)
    assert isinstance(result.counts, Mapping)
    assert set(result.counts) == {"entered", *OUTCOMES}
    assert_counts(result, entered=4, output=2, failed=1, dropped=1)
    assert [failure.context["n"] for failure in result.failures] == [1]
    assert list(result.stalled) == []
    assert result.duration_s == 8.0


@virtual
async def test_E2_the_duration_is_from_the_first_input_to_the_last_outcome() -> None:
    class Work:
        async def __call__(self, ctx: Context) -> Context:
            await asyncio.sleep(3)
            return ctx

        async def shutdown(self) -> None:
            await asyncio.sleep(1)

    async def late() -> AsyncIterator[dict[str, Any]]:
        await asyncio.sleep(100)
        yield {}
        yield {}

    dag = DAG()
    dag.task(Work(), name="work")
    result = await execute(dag, late())
    assert now() == 107.0
    assert result.duration_s == 6.0


# --- E2: iterators that raise


class Broken(Exception):
    pass


def raising(count: int, error: BaseException, closed: list[str]) -> Iterator[dict[str, int]]:
    try:
        for n in range(count):
            yield {"n": n}
        raise error
    finally:
        closed.append("closed")


async def async_raising(count: int, error: BaseException, closed: list[str]) -> AsyncIterator[dict[str, int]]:
    try:
        for n in range(count):
            await asyncio.sleep(0)
            yield {"n": n}
        raise error
    finally:
        closed.append("closed")


@pytest.mark.parametrize("form", [raising, async_raising])
@pytest.mark.parametrize(
    "error", [Broken("no more"), OSError(5, "read"), KeyboardInterrupt(), asyncio.CancelledError()], ids=repr
)
@pytest.mark.parametrize("count", [0, 1, 3])
@virtual
async def test_E2_an_input_iterator_that_raises_ends_the_run_and_is_reraised(
    form: Any, error: BaseException, count: int
) -> None:
    ends = Ends()
    closed: list[str] = []
    dag = DAG()
    dag.task(Held(ends), name="held")
    executor = make(dag, 64)
    with pytest.raises(type(error)) as caught:
        await executor.run(form(count, error, closed))
    if not isinstance(error, asyncio.CancelledError):
        assert caught.value is error
    assert_clean()
    assert ends == ["execution"] * (len(ends) - 1) + ["shutdown"]
    assert closed == ["closed"]
    stats = executor.stats()
    assert (stats["entered"], stats["cancelled"], stats["living"]) == (count, count, 0)
    assert executor.runtime.counter == 0


@pytest.mark.parametrize("form", [generated, trickled])
@virtual
async def test_E2_inputs_come_in_while_a_worker_is_busy(form: Any) -> None:
    dag, started = DAG(), asyncio.Barrier(3)

    @dag.task
    async def meet(ctx: Context) -> Context:
        await started.wait()
        return ctx

    assert_counts(await execute(dag, form([{}, {}, {}]), 4), output=3)


@pytest.mark.parametrize("workers", [1, 64])
@virtual
async def test_E2_an_infinite_input_is_pulled_as_the_run_has_room(workers: int) -> None:
    dag, pulled = DAG(), []

    def endless() -> Iterator[dict[str, int]]:
        for n in itertools.count():
            pulled.append(n)
            yield {"n": n}

    @dag.task
    async def step(ctx: Context) -> Context:
        await asyncio.sleep(1)
        assert len(pulled) <= 4 + 1 + ctx["n"]
        return ctx

    executor = make(dag, workers, max_live_contexts=4, deadline=50)
    with pytest.raises(TimeoutError) as caught:
        await executor.run(endless())
    assert_clean()
    result = caught.value.result  # type: ignore[attr-defined]
    assert result.counts["output"] >= 49
    assert result.counts["entered"] == len(pulled)
    assert_counts(result, entered=len(pulled), output=len(result), cancelled=len(pulled) - len(result))


# --- E2: run_sync


def test_E2_run_sync_is_for_scripts() -> None:
    result = make(one(), 4).run_sync([{"n": 1}, {"n": 2}])
    assert [output["n"] for output in result] == [1, 2]
    assert isinstance(result, RunResult)


async def test_E2_run_sync_refuses_inside_a_running_loop() -> None:
    executor = make(one())
    with pytest.raises(RuntimeError, match="await"):
        executor.run_sync()
    assert_counts(await executor.run(), output=1)


def test_E2_run_sync_raises_what_run_raises() -> None:
    with pytest.raises(ValueError, match="input"):
        make(one()).run_sync(5)  # type: ignore[arg-type]


# --- E3


@every_number
@virtual
async def test_E3_outputs_are_given_out_as_they_come(workers: int) -> None:
    dag = DAG()
    came: list[tuple[int, float]] = []

    @dag.task
    async def step(ctx: Context) -> Context:
        await asyncio.sleep(10 if workers == 1 else 10 * (1 + ctx["n"]))
        return ctx

    async with make(dag, workers).stream([{"n": n} for n in range(3)]) as outputs:
        async for output in outputs:
            assert type(output) is OutputContext
            came.append((output["n"], now()))
    assert came == [(0, 10.0), (1, 20.0), (2, 30.0)]
    assert_counts(outputs.counts, output=3)
    assert_clean()


@virtual
async def test_E3_a_stream_keeps_counts_and_the_last_thousand_failures() -> None:
    dag = DAG()

    @dag.task
    async def fail(ctx: Context) -> Context:
        if ctx["n"] % 2:
            raise ValueError(ctx["n"])
        return ctx

    seen = 0
    async with make(dag, 4, debug=False).stream({"n": n} for n in range(3000)) as outputs:
        async for _ in outputs:
            seen += 1
    assert seen == 1500
    assert_counts(outputs.counts, output=1500, failed=1500)
    assert len(outputs.failures) == 1000
    assert [failure.context["n"] for failure in outputs.failures] == list(range(1001, 3000, 2))


@every_number
@pytest.mark.parametrize("bound", [1, 3, 20])
@virtual
async def test_E3_who_does_not_read_stops_the_input(workers: int, bound: int) -> None:
    pulled: list[int] = []

    def endless() -> Iterator[dict[str, int]]:
        for n in itertools.count():
            pulled.append(n)
            yield {"n": n}

    executor = make(one(), workers, max_live_contexts=bound)
    async with executor.stream(endless()) as outputs:
        for read in range(5):
            await asyncio.sleep(10)
            assert read + 1 <= len(pulled) <= read + bound + 1  # one more may be asked for before room is looked for
            assert (await anext(outputs))["n"] == read
    assert_clean()
    counts = outputs.counts
    assert counts["entered"] == len(pulled) == sum(counts[name] for name in OUTCOMES)


@every_number
@virtual
async def test_E3_an_early_leave_ends_the_run(workers: int) -> None:
    ends = Ends()
    dag = DAG()
    first = passing(dag, "first")
    dag.task(Held(ends), name="held", after=first)

    @dag.task(after=first)
    async def short(ctx: Context) -> Any:
        return OutputContext(ctx) if ctx["n"] == 0 else ctx

    executor = make(dag, workers, 0)
    async with executor.stream([{"n": n} for n in range(9)]) as outputs:
        assert (await anext(outputs))["n"] == 0
    assert_clean()
    assert ends[-1] == "shutdown"
    counts = outputs.counts
    assert counts["entered"] == sum(counts[name] for name in OUTCOMES)
    assert counts["output"] == 1
    assert executor.runtime.counter == 0


@virtual
async def test_E3_an_exception_in_the_block_ends_the_run_and_goes_on() -> None:
    ends = Ends()
    dag = DAG()
    dag.task(Held(ends), name="held")
    executor = make(dag, 4)

    async def leave() -> None:
        async with executor.stream([{}, {}]):
            await asyncio.sleep(1)
            raise Broken

    with pytest.raises(Broken):
        await leave()
    assert_clean()
    assert ends == ["execution", "execution", "shutdown"]
    assert executor.stats()["cancelled"] == 2


@virtual
async def test_E3_an_empty_stream_ends() -> None:
    async with make(one()).stream([]) as outputs:
        assert [output async for output in outputs] == []
    assert_counts(outputs.counts)


@pytest.mark.parametrize("form", [raising, async_raising])
@virtual
async def test_E3_an_input_that_raises_is_raised_to_the_reader(form: Any) -> None:
    closed: list[str] = []
    error = Broken("third")
    seen = []
    executor = make(one(), 1)

    async def read() -> None:
        async with executor.stream(form(3, error, closed)) as outputs:
            async for output in outputs:
                seen.append(output["n"])

    with pytest.raises(Broken) as caught:
        await read()
    assert caught.value is error
    assert seen == [0, 1, 2][: len(seen)]
    assert closed == ["closed"]
    assert_clean()


def stream_memory(count: int, workers: int, measure: Callable[[], int]) -> tuple[list[int], int]:
    """What `measure` says at twenty points of a stream of `count` contexts; the most marked contexts alive then."""
    dag = DAG()
    passing(dag, "a", "b")
    sizes: list[int] = []
    alive: list[int] = []
    known: weakref.WeakSet[Context] = weakref.WeakSet()

    def inputs() -> Iterator[Context]:
        for n in range(count):
            context = Context(data={"n": n})
            if n % 100 == 0:
                known.add(context)
            yield context

    async def main() -> None:
        step = count // 20
        seen = 0
        async with make(dag, workers, debug=False, max_live_contexts=100).stream(inputs()) as outputs:
            async for _ in outputs:
                seen += 1
                if seen % step == 0:
                    gc.collect()
                    sizes.append(measure())
                    alive.append(len(known))
        assert_counts(outputs.counts, output=count)

    asyncio.run(main())
    return sizes, max(alive)


def growth(sizes: list[int]) -> float:
    """Bytes from the first half of the stream to the second; medians, since what is in flight varies."""
    half = len(sizes) // 2
    return statistics.median(sizes[half:]) - statistics.median(sizes[1:half])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_E3_memory_does_not_grow_with_the_number_of_inputs() -> None:
    tracemalloc.start()
    try:
        sizes, alive = stream_memory(100_000, 8, lambda: tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert alive <= 3  # of the marked ones, one in a hundred
    assert growth(sizes) < 32 * 1024, sizes


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
def test_E3_memory_does_not_grow_over_a_million_inputs() -> None:
    sizes, alive = stream_memory(1_000_000, 8, resident_bytes)
    assert alive <= 3
    assert growth(sizes) < 1024 * 1024, sizes  # a context, its data and its output weigh about 700 bytes
