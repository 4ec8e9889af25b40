"""Services (T5, T14): each context its own answer, whatever the order; late answers; services that die."""

from __future__ import annotations

import asyncio
import threading
from queue import Queue
from random import Random
from typing import Any

import pytest

from obsdag import (
    DAG,
    AsyncServiceTask,
    Context,
    ExecutionTimeout,
    Observer,
    ServiceError,
    StopContext,
    SyncThreadTask,
)
from tests.rules.helpers import ONE, Engine, assert_counts, every_worker_num


def shuffling(together: int, seed: int, kind: str) -> Any:
    """A service that answers only when `together` contexts are in it, in random order, each with its own number."""

    async def serve(queue: asyncio.Queue[Any]) -> None:
        batch: list[Any] = []
        while not isinstance((entry := await queue.get())[0], StopContext):
            batch = _answer_full([*batch, entry], together, seed)

    def serve_in_thread(queue: Queue[Any]) -> None:
        batch: list[Any] = []
        while not isinstance((entry := queue.get())[0], StopContext):
            batch = _answer_full([*batch, entry], together, seed)

    return serve if kind == "service" else serve_in_thread


def _answer_full(batch: list[Any], together: int, seed: int) -> list[Any]:
    if len(batch) < together:
        return batch
    Random(seed).shuffle(batch)
    for ctx, future in batch:
        ctx["answer"] = -ctx["n"]
        future.set_result(ctx)
    return []


@every_worker_num
@pytest.mark.parametrize("kind", ["service", "thread"])
async def test_T14_100_contexts_in_flight_each_get_their_own_answer(engine: Engine, kind: str) -> None:
    """One worker is enough: a context that waits for a service holds none."""
    dag = DAG()
    dag.task(shuffling(100, engine.workers, kind), kind=kind, name="serve")
    result = await engine.run(dag, ({"n": n} for n in range(200)))
    assert [out["answer"] for out in result] != sorted(out["answer"] for out in result)
    assert all(out["answer"] == -out["n"] for out in result)
    assert sorted(out["n"] for out in result) == list(range(200))
    assert_counts(result, output=200)
    assert not result.cleanup_errors


async def test_T14_a_late_answer_to_a_timed_out_or_destroyed_context_is_ignored() -> None:
    """The service keeps both futures, and answers them when nobody wants that any more."""
    dag = DAG()
    kept: list[tuple[Context, Any]] = []
    late: list[bool] = []
    both = asyncio.Event()

    @dag.service(timeout=0.02)
    async def serve(queue: asyncio.Queue[Any]) -> None:
        while True:
            ctx, future = await queue.get()
            if isinstance(ctx, StopContext):
                return
            if ctx["kind"] == "fine":
                for old, forgotten in kept:
                    late.append(forgotten.done())
                    forgotten.set_result(old)
                    forgotten.set_exception(ValueError("late"))
                future.set_result(ctx)
            else:
                kept.append((ctx, future))
                if ctx["kind"] == "destroy":
                    ctx.destroy()
                if len(kept) == 2:
                    both.set()

    @dag.task(after=serve)
    async def after(ctx: Context) -> Context:
        return ctx

    async def inputs() -> Any:
        yield {"kind": "slow"}
        yield {"kind": "destroy"}
        await both.wait()
        await asyncio.wait([future for _, future in kept])
        yield {"kind": "fine"}

    result = await Engine(4).run(dag, inputs())
    assert late == [True, True]
    assert [out["kind"] for out in result] == ["fine"]
    assert_counts(result, output=1, failed=1, dropped=1)
    assert isinstance(result.failures[0].exception, ExecutionTimeout)


async def test_T14_a_late_answer_from_a_thread_service_is_ignored() -> None:
    dag = DAG()
    timed_out = threading.Event()

    @dag.service(timeout=0.02)
    def serve(queue: Queue[Any]) -> None:
        ctx, future = queue.get()
        assert timed_out.wait(5)
        future.set_result(ctx)
        ctx, future = queue.get()
        future.set_result(ctx)
        queue.get()

    over = asyncio.Event()

    class Watch(Observer):
        def execution_finished(self, *_: Any) -> None:
            over.set()

    async def inputs() -> Any:
        yield {"n": 0}
        await over.wait()
        timed_out.set()
        yield {"n": 1}

    result = await Engine(4).run(dag, inputs(), observers=(Watch(),))
    assert [out["n"] for out in result] == [1]
    assert_counts(result, output=1, failed=1)


def _dying(kind: str, way: str, starts: list[int]) -> Any:
    """A service that ends over the context 3, by an exception or by returning."""

    def handled(ctx: Context, future: Any) -> bool:
        if isinstance(ctx, StopContext):
            return False
        if ctx["n"] == 3:
            if way == "raises":
                raise OSError("line cut")
            return False
        future.set_result(ctx)
        return True

    async def serve(queue: asyncio.Queue[Any]) -> None:
        starts.append(1)
        while handled(*await queue.get()):
            pass

    def serve_in_thread(queue: Queue[Any]) -> None:
        starts.append(1)
        while handled(*queue.get()):
            pass

    return serve if kind == "service" else serve_in_thread


@pytest.mark.parametrize("kind", ["service", "thread"])
@pytest.mark.parametrize("way", ["raises", "returns"])
async def test_T14_a_service_that_dies_fails_what_is_in_it_and_is_started_anew(kind: str, way: str) -> None:
    dag = DAG()
    starts: list[int] = []
    dag.task(_dying(kind, way, starts), kind=kind, name="serve")
    result = await ONE.run(dag, one_by_one(6))
    assert sorted(out["n"] for out in result) == [0, 1, 2, 4, 5]
    assert len(starts) == 2
    assert_counts(result, output=5, failed=1)
    (failure,) = result.failures
    assert failure.context["n"] == 3
    assert isinstance(failure.exception, ServiceError)
    assert "service 'serve' ended before it answered" in str(failure.exception)
    assert (failure.exception.__cause__ is None) == (way == "returns")


async def one_by_one(number: int) -> Any:
    """Inputs with turns of the loop between them, so that a death is noticed before the next one comes."""
    for n in range(number):
        yield {"n": n}
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("kind", ["service", "thread"])
@pytest.mark.parametrize("way", ["raises", "returns"])
@pytest.mark.parametrize("workers", [1, 4, 64])
async def test_T14_a_service_that_never_gets_going_fails_what_waits_for_it(kind: str, way: str, workers: int) -> None:
    dag, starts = DAG(), []

    def start() -> None:
        starts.append(1)
        if way == "raises":
            raise ConnectionError("no database")

    async def serve(queue: Any) -> None:
        start()

    def serve_in_thread(queue: Any) -> None:
        start()

    dag.task(serve if kind == "service" else serve_in_thread, kind=kind, name="serve", retry_times=1)
    result = await Engine(workers).run(dag, [{} for _ in range(9)])
    assert_counts(result, failed=9)
    for failure in result.failures:
        assert failure.attempts == 2
        assert "service 'serve' ended before it answered" in str(failure.exception)
        assert isinstance(failure.exception.__cause__, ConnectionError | ServiceError) == (way == "raises")
    assert len(starts) <= 2 * 9


async def test_T14_contexts_lost_in_a_dead_service_are_retried_in_the_new_one() -> None:
    dag = DAG()
    starts: list[int] = []

    @dag.service(retry_times=1)
    async def serve(queue: asyncio.Queue[Any]) -> None:
        starts.append(1)
        batch = [await queue.get() for _ in range(10)]
        if len(starts) == 1:
            raise OSError("line cut")
        for ctx, future in batch:
            future.set_result(ctx)
        await queue.get()

    result = await Engine(4).run(dag, ({"n": n} for n in range(10)))
    assert sorted(out["n"] for out in result) == list(range(10))
    assert len(starts) == 2
    assert_counts(result, output=10)


async def test_T14_parallel_num_bounds_what_is_in_a_service() -> None:
    dag = DAG()
    most = [0, 0]

    @dag.service(parallel_num=3)
    async def serve(queue: asyncio.Queue[Any]) -> None:
        while True:
            batch = [await queue.get()]
            await asyncio.sleep(0)
            while not queue.empty():
                batch.append(queue.get_nowait())
            if isinstance(batch[0][0], StopContext):
                return
            most.append(len(batch))
            for ctx, future in batch:
                future.set_result(ctx)

    result = await Engine(64).run(dag, ({"n": n} for n in range(30)))
    assert_counts(result, output=30)
    assert max(most) <= 3


async def test_T1_a_service_answers_with_what_a_task_may_return() -> None:
    dag = DAG()

    @dag.service(may_drop=True)
    async def serve(queue: asyncio.Queue[Any]) -> None:
        while True:
            ctx, future = await queue.get()
            if isinstance(ctx, StopContext):
                return
            match ctx["n"]:
                case 0:
                    future.set_result(None)
                case 1:
                    future.set_result([ctx, Context(data={"n": 10})])
                case 2:
                    future.set_result("not a context")
                case 3:
                    future.set_exception(LookupError("three"))
                case _:
                    future.cancel()

    result = await ONE.run(dag, ({"n": n} for n in range(5)))
    assert sorted(out["n"] for out in result) == [1, 10]
    assert_counts(result, dropped=1, output=2, failed=3)
    errors = {failure.context["n"]: failure.exception for failure in result.failures}
    assert "'not a context'" in str(errors[2])
    assert isinstance(errors[3], LookupError)
    assert isinstance(errors[4], asyncio.CancelledError)


def test_the_decorator_chooses_the_class_by_the_function() -> None:
    dag = DAG()
    assert isinstance(dag.service(shuffling(1, 0, "service"), name="a"), AsyncServiceTask)
    assert isinstance(dag.service(shuffling(1, 0, "thread"), name="b"), SyncThreadTask)
