"""Worker processes and process tasks, with real processes (SEMANTICS T11, T12, T13, E9, E18)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from obsdag.config import ExecutorConfig
from obsdag.context import Context, RateLimitContext
from obsdag.errors import ConfigError, EncodingError, ExecutionTimeout, PoolError, RemoteError
from obsdag.executor import Executor
from obsdag.graph import DAG
from obsdag.pools import PoolJob, ProcessPool
from obsdag.tasks.base import TaskConfig
from obsdag.tasks.process import (
    Foreign,
    Output,
    OwnContext,
    ProcessOutcome,
    ProcessTask,
    apply_outcome,
    decode_outcome,
    encode_job,
)
from tests import process_jobs as jobs

LONG_S = 60.0  # a bound for what must happen at once; reaching it is a failure


class Events:
    def __init__(self) -> None:
        self.rebuilt: list[str] = []
        self.told = asyncio.Event()

    def thread_abandoned(self, thread: str, what: str, running_s: float) -> None:
        raise AssertionError("a process pool has no threads")

    def pool_rebuilt(self, pool: str, reason: str) -> None:
        assert pool == "process"
        self.rebuilt.append(reason)
        self.told.set()


@contextlib.asynccontextmanager
async def open_pool(size: int = 1, **options: Any) -> AsyncIterator[ProcessPool]:
    pool = ProcessPool(size, **options)
    try:
        yield pool
    finally:
        await pool.close(LONG_S)


def submit(pool: ProcessPool, function: Callable[..., Any], **data: Any) -> PoolJob:
    task = ProcessTask(function)
    return pool.submit(encode_job(task, "c1", "", data, 1, {}), task.id)


async def outcome_of(job: PoolJob) -> ProcessOutcome:
    return decode_outcome(await asyncio.wait_for(job.future, LONG_S))


async def run(pool: ProcessPool, function: Callable[..., Any], **data: Any) -> ProcessOutcome:
    return await outcome_of(submit(pool, function, **data))


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return str(path)


async def hear(fifo: str) -> str:
    return await asyncio.wait_for(asyncio.to_thread(Path(fifo).read_text), LONG_S)


@contextlib.contextmanager
def watched(pid: int) -> Iterator[Callable[[], bool]]:
    """Gives a function that waits for the death of any process, child or not, and tells whether it came."""
    descriptor = os.pidfd_open(pid)
    try:
        yield lambda: bool(select.select([descriptor], [], [], LONG_S)[0])
    finally:
        os.close(descriptor)


def start_script(tmp_path: Path, text: str, *arguments: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(text))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def run_script(tmp_path: Path, text: str, *arguments: str) -> tuple[str, str]:
    with start_script(tmp_path, text, *arguments) as process:
        out, err = process.communicate(timeout=LONG_S)
    return out, err


# --- the pool


async def test_T11_jobs_run_in_processes_of_their_own() -> None:
    async with open_pool(2) as pool:
        assert pool.workers == 0
        outcomes = await asyncio.gather(*(run(pool, jobs.double, n=n) for n in range(10)))
        assert [outcome.changed["n"] if n else 0 for n, outcome in enumerate(outcomes)] == [2 * n for n in range(10)]
        pids = {outcome.changed["pid"] for outcome in outcomes}
        assert os.getpid() not in pids
        assert len(pids) <= 2
        assert (pool.workers, pool.busy, pool.queued) == (2, 0, 0)


async def test_E18_processes_start_on_demand_and_tell_when_they_take_a_job() -> None:
    async with open_pool(2) as pool:
        started = []
        job = submit(pool, jobs.nothing)
        job.on_start = lambda: started.append(threading.get_ident())
        assert not job.started
        assert (pool.workers, pool.queued) == (1, 1)
        await outcome_of(job)
        assert job.started
        assert job.over
        assert started == [threading.get_ident()]
        await run(pool, jobs.nothing)
        assert pool.workers == 1


async def test_large_payloads_cross_in_both_directions() -> None:
    async with open_pool() as pool:
        big = os.urandom(20_000_000)
        outcome = await run(pool, jobs.fork_out, big=big)
        assert [new.data.get("of") == big for new in outcome.made] == [True, True, False, False]


async def test_T11_a_killed_worker_fails_its_own_job_and_no_other() -> None:
    events = Events()
    async with open_pool(2, events=events) as pool:
        submitted = [submit(pool, jobs.kill_if_told, die=number == 100) for number in range(200)]
        results = await asyncio.gather(*(outcome_of(job) for job in submitted), return_exceptions=True)
        failed = [number for number, result in enumerate(results) if isinstance(result, BaseException)]
        assert failed == [100]
        error = results[100]
        assert isinstance(error, PoolError)
        assert "was killed by SIGKILL while it ran kill_if_told" in str(error)
        assert all(result.changed == {"done": True} for n, result in enumerate(results) if n != 100)  # type: ignore[union-attr]
        assert events.rebuilt == [str(error)]


async def test_T11_a_job_given_to_a_process_that_was_dead_already_runs_in_another() -> None:
    events = Events()
    async with open_pool(1, events=events) as pool:
        pid = (await run(pool, jobs.double, n=1)).changed["pid"]
        with watched(pid) as died:
            os.kill(pid, signal.SIGKILL)
            assert died()  # the loop was not running meanwhile: the pool cannot know
        outcome = await run(pool, jobs.double, n=2)
        assert outcome.changed["n"] == 4
        assert outcome.changed["pid"] != pid
        assert len(events.rebuilt) == 1


async def test_a_process_that_dies_idle_is_told_and_replaced() -> None:
    events = Events()
    async with open_pool(1, events=events) as pool:
        pid = (await run(pool, jobs.double, n=1)).changed["pid"]
        os.kill(pid, signal.SIGTERM)
        await asyncio.wait_for(events.told.wait(), LONG_S)
        assert events.rebuilt == [f"worker process {pid} was killed by SIGTERM while it was idle"]
        assert pool.workers == 0
        assert (await run(pool, jobs.double, n=2)).changed["n"] == 4


async def test_a_death_is_noticed_though_another_process_holds_the_channel_open(fifo: str) -> None:
    async with open_pool() as pool:
        with pytest.raises(PoolError, match="ended with exit code 3"):
            await run(pool, jobs.leave_with_channel_held_open, fifo=fifo)
        await asyncio.wait_for(asyncio.to_thread(jobs.tell, fifo, "leave"), LONG_S)


async def test_E9_a_process_that_dies_takes_along_what_it_started(fifo: str) -> None:
    async with open_pool() as pool:
        job = submit(pool, jobs.exit_with_child, fifo=fifo)
        with watched(int(await hear(fifo))) as child_died:
            jobs.tell(fifo, "go on")
            with pytest.raises(PoolError, match="exit code 3"):
                await job.future
            assert child_died()


async def test_without_pidfd_the_end_of_the_channel_tells_of_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(pid: int, flags: int = 0) -> int:
        raise OSError("not here")

    monkeypatch.setattr(os, "pidfd_open", absent)
    async with open_pool(2) as pool:
        died, lived = submit(pool, jobs.kill_if_told, die=True), submit(pool, jobs.kill_if_told, die=False)
        with pytest.raises(PoolError, match="SIGKILL"):
            await died.future
        assert (await outcome_of(lived)).error is None


async def test_a_job_that_forks_and_comes_back_twice_answers_once() -> None:
    async with open_pool() as pool:
        assert (await run(pool, jobs.fork_and_return)).changed == {"from": "parent"}
        assert (await run(pool, jobs.double, n=1)).changed["n"] == 2


async def test_a_worker_takes_no_interrupt_but_what_it_starts_does() -> None:
    async with open_pool() as pool:
        assert (await run(pool, jobs.survive_interrupt)).changed == {"child takes it": "True"}


# --- abandoned


async def test_T13_abandoning_a_running_job_kills_its_process_and_tells_when_it_is_dead(fifo: str) -> None:
    events = Events()
    async with open_pool(1, events=events) as pool:
        job = submit(pool, jobs.hang_with_child, fifo=fifo)
        pid, child = map(int, (await hear(fifo)).split())
        returned = asyncio.Event()
        job.on_return = returned.set
        with watched(pid) as died, watched(child) as child_died:
            assert job.abandon() is False
            assert job.future.cancelled()
            await asyncio.wait_for(returned.wait(), LONG_S)
            assert died()
            assert child_died()
        assert job.abandon() is True
        assert (await run(pool, jobs.double, n=1)).changed["n"] == 2
        assert pool.killed == 1
        assert events.rebuilt == []


async def test_T13_a_job_that_waits_is_really_over_when_abandoned(fifo: str) -> None:
    async with open_pool() as pool:
        running, waiting = submit(pool, jobs.hang, fifo=fifo), submit(pool, jobs.nothing)
        await hear(fifo)
        assert waiting.abandon() is True
        assert pool.queued == 0
        assert running.abandon() is False


async def test_T13_a_job_on_its_way_to_a_process_is_not_over_before_that_is_dead() -> None:
    async with open_pool() as pool:
        pid = (await run(pool, jobs.double, n=1)).changed["pid"]
        os.kill(pid, signal.SIGSTOP)  # it will not take the job
        job = submit(pool, jobs.nothing)
        returned = asyncio.Event()
        job.on_return = returned.set
        assert not job.started
        assert job.abandon() is False
        await asyncio.wait_for(returned.wait(), LONG_S)
        assert not job.started
        assert job.over


async def test_a_job_that_no_process_survives_to_take_fails_in_the_end() -> None:
    events = Events()
    async with open_pool(1, initializer=jobs.die_before_taking, events=events) as pool:
        with pytest.raises(PoolError, match="ended with exit code 7 while it ran nothing"):
            await run(pool, jobs.nothing)
        assert len(events.rebuilt) == 3


async def test_a_cancelled_future_does_not_break_the_pool() -> None:
    async with open_pool() as pool:
        first, second = submit(pool, jobs.nothing), submit(pool, jobs.nothing)
        first.future.cancel()
        second.future.cancel()
        assert (await run(pool, jobs.double, n=1)).changed["n"] == 2


# --- start and end


async def test_processes_that_cannot_start_fail_the_jobs_that_wait_and_say_why() -> None:
    events = Events()
    async with open_pool(2, initializer=jobs.refuse_to_start, events=events) as pool:
        submitted = [submit(pool, jobs.nothing) for _ in range(5)]
        for job in submitted:
            with pytest.raises(PoolError, match="worker processes cannot start: RuntimeError: no licence"):
                await asyncio.wait_for(job.future, LONG_S)
        assert len(events.rebuilt) <= 4
        assert "could not start: RuntimeError: no licence" in events.rebuilt[0]


async def test_processes_that_die_while_they_start_fail_the_jobs_that_wait() -> None:
    async with open_pool(1, initializer=jobs.die_at_start) as pool:
        with pytest.raises(PoolError, match="worker processes cannot start: it ended with exit code 5"):
            await run(pool, jobs.nothing)


async def test_what_an_initializer_installs_travels_back_with_each_outcome() -> None:
    async with open_pool(1, initializer=jobs.send_extras, initargs=(b"span",)) as pool:
        assert (await run(pool, jobs.nothing)).extras == [b"span"]
        assert (await run(pool, jobs.raise_two_arguments)).extras == [b"span"]


async def test_E9_close_leaves_no_process_and_no_descriptor(fifo: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    pool = ProcessPool(2)
    await asyncio.gather(*(run(pool, jobs.double, n=n) for n in range(4)))
    hung = submit(pool, jobs.hang, fifo=fifo)
    pid = int(await hear(fifo))
    with watched(pid) as died:
        assert await pool.close(0.05) == [f"worker process {pid} was killed while it ran hang"]
        assert died()
    with pytest.raises(PoolError, match="SIGKILL"):
        await hung.future
    assert pool.workers == 0
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(PoolError, match="closed"):
        submit(pool, jobs.nothing)
    assert await pool.close(0) == []


async def test_E9_close_lets_running_jobs_finish_and_fails_waiting_ones(fifo: str) -> None:
    pool = ProcessPool(1)
    running = submit(pool, jobs.tell_then_double, fifo=fifo, n=1)
    waiting = submit(pool, jobs.nothing)
    await hear(fifo)
    closing = asyncio.create_task(pool.close(LONG_S))
    with pytest.raises(PoolError, match="before nothing could start"):
        await waiting.future
    jobs.tell(fifo, "go on")
    assert await closing == []
    assert (await outcome_of(running)).changed["n"] == 2


async def test_E9_a_cancelled_close_kills_at_once(fifo: str) -> None:
    pool = ProcessPool(1)
    job = submit(pool, jobs.hang, fifo=fifo)
    pid = int(await hear(fifo))
    closing = asyncio.create_task(pool.close(LONG_S))
    await asyncio.sleep(0)
    with watched(pid) as died:
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert died()
    with pytest.raises(PoolError, match="SIGKILL"):
        await job.future


def test_sizes_are_checked() -> None:
    with pytest.raises(ConfigError, match="size must be >= 1, not 0"):
        ProcessPool(0)


def test_E9_workers_die_with_their_parent(tmp_path: Path, fifo: str) -> None:
    script = """
    import asyncio, sys
    from obsdag.pools import ProcessPool
    from obsdag.tasks.process import ProcessTask, encode_job
    from tests import process_jobs as jobs

    async def main():
        pool = ProcessPool(1)
        await pool.submit(encode_job(ProcessTask(jobs.hang), "c", "", {"fifo": sys.argv[1]}, 1, {})).future

    if __name__ == "__main__":
        asyncio.run(main())
    """
    with start_script(tmp_path, script, fifo) as parent:
        worker = int(Path(fifo).read_text())
        with watched(worker) as died:
            parent.kill()
            assert died()


# --- the main module


MAIN = """
import asyncio
from dataclasses import dataclass
from obsdag.pools import ProcessPool
from obsdag.tasks.process import ProcessTask, apply_outcome, decode_outcome, encode_job
from obsdag.context import Context

print("imported as", __name__)

@dataclass
class Point:
    x: int
    y: int

def move(context):
    context["point"] = Point(context["point"].x + 1, 0)
    return context

async def run(function, data):
    pool = ProcessPool(2)
    try:
        job = pool.submit(encode_job(ProcessTask(function), "c", "", data, 1, {}))
        return decode_outcome(await job.future)
    finally:
        await pool.close(30)

async def main():
    context = Context(None, {"point": Point(1, 2), "other": Point(3, 4)})
    outcome = await run(move, context)
    apply_outcome(outcome, context)
    print(context["point"] == Point(2, 0), list(outcome.changed))
"""


def test_T11_functions_and_classes_of_the_main_module_work(tmp_path: Path) -> None:
    out, err = run_script(tmp_path, MAIN + "\nif __name__ == '__main__':\n    asyncio.run(main())\n")
    assert out.split("\n")[-2] == "True ['point']", err
    assert "imported as __mp_main__" in out


def test_the_main_module_is_not_imported_if_nothing_of_it_is_needed(tmp_path: Path) -> None:
    # So a script without guard works, as long as its functions live in modules.
    text = MAIN + "\nfrom tests import process_jobs\nprint(asyncio.run(run(process_jobs.nothing, {})).error)\n"
    out, err = run_script(tmp_path, text)
    assert out == "imported as __main__\nNone\n", err


@pytest.mark.parametrize("swallow", [False, True])
def test_T11_a_main_module_without_guard_gets_a_clear_error_and_no_fork_bomb(tmp_path: Path, swallow: bool) -> None:
    call = "asyncio.run(run(move, {'point': Point(1, 2)})).error"
    start = f"try:\n    print(repr({call}))\nexcept Exception as error:\n    print('caught', error)\n"
    out, err = run_script(tmp_path, MAIN + (start if swallow else f"\nprint(repr({call}))\n"))
    assert "PoolError('the main module starts work when it is imported" in out, err
    assert '__name__ == "__main__"' in out
    assert out.count("imported as") == 2


def test_T11_a_main_module_run_by_name_works(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    guard = "\nif __name__ == '__main__':\n    asyncio.run(main())\n"
    (package / "__main__.py").write_text(
        MAIN.replace("\nprint(", "\nfrom . import __name__ as package\nprint(") + guard
    )
    ended = subprocess.run(
        [sys.executable, "-m", "package"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    assert "True ['point']" in ended.stdout, ended.stderr


def test_T11_functions_of_a_session_are_refused_at_build() -> None:
    text = "from obsdag.tasks.process import ProcessTask\ndef f(c): return c\nprint(*ProcessTask(f).problems())"
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=LONG_S, check=True)
    assert "its function f is defined in a session or notebook" in ended.stdout


def test_a_worker_starts_light() -> None:
    heavy = "asyncio opentelemetry prometheus_client structlog multiprocessing"
    text = f"import obsdag.tasks.detached, sys; print(*[name for name in '{heavy}'.split() if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=LONG_S, check=True)
    assert ended.stdout == "\n", "what a worker process imports before its first job costs each of its starts"


# --- process tasks: what crosses


async def test_T11_changed_and_deleted_keys_come_back_and_unchanged_ones_do_not() -> None:
    shared = ["kept"]
    data = {
        "replaced": "old",
        "same": "same as it was",
        "grown": [1, 2, 3],
        "nested": {"inner": {}},
        "gone": 1,
        "shared": shared,
        "untouched": {"a": {1, 2, 3}},
    }
    context = Context(None, data)
    async with open_pool() as pool:
        outcome = await outcome_of(pool.submit(encode_job(ProcessTask(jobs.change), "c", "", context, 1, {})))
    assert outcome.changed == {
        "replaced": "new",
        "grown": [1, 2, 3, 4],
        "nested": {"inner": {"x": 1}},
        "added": ["kept"],
    }
    assert outcome.deleted == ["gone"]
    assert outcome.returned == [OwnContext()]
    assert apply_outcome(outcome, context) == [context]
    assert set(context) == {"replaced", "same", "grown", "nested", "shared", "untouched", "added"}
    assert context["shared"] is shared


async def test_T11_nothing_is_applied_on_failure() -> None:
    context = Context(None, {"n": 1})
    async with open_pool() as pool:
        outcome = await run(pool, jobs.change_and_raise, **context)
    assert (outcome.changed, outcome.deleted, outcome.returned) == ({}, [], None)
    with pytest.raises(jobs.Faithful):
        apply_outcome(outcome, context)
    assert dict(context) == {"n": 1}


async def test_T11_contexts_made_there_are_made_here() -> None:
    context = Context(None, {"big": "data"})
    async with open_pool() as pool:
        outcome = await run(pool, jobs.fork_out, **context)
    returned = apply_outcome(outcome, context)
    assert returned is not None
    second, inner, root, own = returned
    first = inner.parent
    assert own is context
    assert context.children == [first, second]
    assert (dict(first), dict(second), dict(inner)) == ({"of": "data"}, {"of": "data"}, {})
    assert inner.id == "inner"
    assert root.parent is None
    assert root.id == "root"
    assert dict(root) == {"big": "data", "more": 1}


async def test_T11_contexts_made_by_their_class_are_made_here_too() -> None:
    context = Context(None, {})
    async with open_pool() as pool:
        returned = apply_outcome(await run(pool, jobs.make_by_class), context)
    assert returned is not None
    child, own = returned
    assert own is context
    assert (child.id, child.parent.id, dict(child.parent)) == ("child of plain", "plain", {"by": "class"})
    assert child.parent.parent is None


async def test_T1_none_a_list_markers_and_anything_else_are_told_apart() -> None:
    context = Context(None, {})
    async with open_pool() as pool:
        assert apply_outcome(await run(pool, jobs.nothing), context) is None
        returned = apply_outcome(await run(pool, jobs.foreign), context)
        assert returned is not None
        assert returned[:2] == [context, Foreign("42")]
        assert repr(returned[1]) == "42"
        assert len(repr(returned[2])) < 400
        (limit,) = apply_outcome(await run(pool, jobs.limited), context) or ()
        assert isinstance(limit, RateLimitContext)
        assert (limit.context, limit.delay) == (context, 1.5)
        assert (await run(pool, jobs.output)).returned == [Output(OwnContext())]


async def test_T11_tree_lock_freeze_and_destroy_raise_there() -> None:
    async with open_pool() as pool:
        task = ProcessTask(jobs.detached)
        outcome = await outcome_of(pool.submit(encode_job(task, "the-id", "the-name", {}, 3, {})))
    assert outcome.changed["known"] == ("the-id", "the-name", 3)
    assert len(outcome.changed["refused"]) == 9
    assert all("context 'the-id' is detached" in text for text in outcome.changed["refused"])


async def test_T11_an_exception_comes_back_as_itself_with_the_remote_traceback() -> None:
    async with open_pool() as pool:
        error = (await run(pool, jobs.change_and_raise, n=1)).error
    assert type(error) is jobs.Faithful
    assert error.args == (7, "after the change")
    (note,) = error.__notes__
    assert note.startswith("In worker process ")
    assert "in change_and_raise" in note


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (jobs.raise_two_arguments, "tests.process_jobs.TwoArguments: 404 not found"),
        (jobs.raise_unpicklable, "ValueError: holds a lock"),
    ],
)
async def test_T11_an_exception_that_cannot_be_carried_breaks_nothing(function: Any, text: str) -> None:
    async with open_pool() as pool:
        outcome = await run(pool, function)
        assert type(outcome.error) is RemoteError
        assert str(outcome.error) == text
        assert f"in {function.__name__}" in outcome.error.__notes__[0]
        assert (await run(pool, jobs.double, n=1)).changed["n"] == 2
        assert pool.workers == 1


async def test_E6_sys_exit_in_the_function_is_its_outcome_and_not_the_workers_end() -> None:
    async with open_pool() as pool:
        error = (await run(pool, jobs.exit_with, code=9)).error
        assert isinstance(error, SystemExit)
        assert error.code == 9
        await run(pool, jobs.nothing)
        assert pool.workers == 1


def test_T11_data_that_cannot_be_pickled_is_named_by_key_and_type() -> None:
    data = {"fine": 1, "bad": {"deep": threading.Lock()}, "also bad": threading.Lock()}
    with pytest.raises(
        EncodingError, match=r"task 'nothing', context 'c7': data\['bad'\] of type dict cannot be carried to"
    ):
        encode_job(ProcessTask(jobs.nothing), "c7", "", data, 1, {})


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            jobs.keep_lock,
            "task 'keep_lock', context 'c1': data['bad'] of type _thread.lock cannot be carried back from",
        ),
        (jobs.child_with_lock, "context 'c1', a made context: data['bad'] of type _thread.lock cannot be carried back"),
        (jobs.keep_only_here, "context 'c1': data['bad'] was pickled, but cannot be unpickled on its way back from"),
    ],
)
async def test_T11_results_that_cannot_be_carried_are_named_by_key(function: Any, text: str) -> None:
    async with open_pool() as pool:
        outcome = await run(pool, function)
        assert type(outcome.error) is EncodingError
        assert text in str(outcome.error)
        assert outcome.changed == {}


async def test_T12_the_trace_context_reaches_the_function() -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    carrier = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    async with open_pool() as pool:
        task = ProcessTask(jobs.trace_id)
        outcome = await outcome_of(pool.submit(encode_job(task, "c", "", {}, 1, carrier)))
        assert outcome.changed == {"trace": trace}
        outcome = await run(pool, jobs.trace_id)
        assert outcome.changed == {"trace": "0" * 32}  # nothing of it is left for the next job


async def test_T11_functions_are_found_by_name_under_a_decorator_and_as_partials() -> None:
    async with open_pool() as pool:
        assert (await run(pool, jobs._decorated)).changed == {"decorated": True}
        assert list(ProcessTask(functools.partial(jobs.double), name="p").problems()) == []
        assert (await run(pool, functools.partial(jobs.double), n=3)).changed["n"] == 6


async def test_T11_in_a_run_outputs_failures_and_timeouts_are_where_they_belong() -> None:
    dag = DAG("processes")
    dag.add_task(ProcessTask(jobs.double))
    dag.add_task(ProcessTask(jobs.kill_if_told), "double")
    dag.add_task(ProcessTask(jobs.output_or_hang, TaskConfig(timeout=3.0)), "kill_if_told")
    config = ExecutorConfig(process_pool_worker_num=2, context_worker_num=3)
    inputs = [{"n": n, "die": n == 3, "hang": n == 5} for n in range(8)]
    result = await Executor(dag, config=config).run(inputs)
    assert sorted(output["n"] for output in result) == [0, 2, 4, 8, 12, 14]
    failures = {failure.context["n"] // 2: type(failure.exception) for failure in result.failures}
    assert failures == {3: PoolError, 5: ExecutionTimeout}


# --- process tasks: what is refused at build


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (jobs.nested_lambda[0], "is a lambda"),
        (jobs.make_nested(), "make_nested.<locals>.nested is defined inside a function"),
        (jobs.original_of_shadowed, "process_jobs.shadowed is not its function but"),
        (functools.partial(jobs.nested_lambda[0]), "its partial cannot be carried to a worker process"),
        (jobs.asynchronous, "not a coroutine function"),
        (jobs.generating, "not a generator function"),
        (jobs.with_environment, "the Environment cannot cross"),
        (jobs.with_resource, "a pooled resource cannot cross"),
    ],
)
def test_T11_functions_that_cannot_run_there_are_refused_at_build(function: Any, text: str) -> None:
    (problem,) = ProcessTask(function, name="t").problems()
    assert text in problem


@pytest.mark.parametrize("function", [jobs.double, jobs.with_optional_environment, jobs._decorated])
def test_T11_functions_that_can_run_there_are_not(function: Any) -> None:
    assert list(ProcessTask(function).problems()) == []


# --- the executor for users' functions


async def test_users_functions_run_in_the_pool_by_its_executor() -> None:
    async with open_pool() as pool:
        loop = asyncio.get_running_loop()
        assert isinstance(pool.executor, concurrent.futures.Executor)
        assert await loop.run_in_executor(pool.executor, jobs.add, 2, 3) == 5
        assert await asyncio.to_thread(pool.executor.submit(jobs.add, 1, b=2).result, LONG_S) == 3
        assert await asyncio.to_thread(lambda: list(pool.executor.map(jobs.add, range(5)))) == [0, 1, 2, 3, 4]


async def test_the_executor_carries_failures_and_what_cannot_be_pickled() -> None:
    async with open_pool() as pool:
        loop = asyncio.get_running_loop()
        with pytest.raises(jobs.Faithful):
            await loop.run_in_executor(pool.executor, jobs.fail, 1)
        with pytest.raises(EncodingError, match=r"result of type _thread\.lock"):
            await loop.run_in_executor(pool.executor, jobs.lock)
        with pytest.raises(EncodingError, match="the call of <function"):
            await loop.run_in_executor(pool.executor, lambda: None)
        with pytest.raises(PoolError, match="SIGKILL"):
            await loop.run_in_executor(pool.executor, os.kill, 0, signal.SIGKILL)


async def test_the_executor_refuses_to_block_its_own_loop() -> None:
    async with open_pool() as pool:
        future = pool.executor.submit(jobs.add, 1)
        with pytest.raises(RuntimeError, match="would block the event loop"):
            future.result()
        assert await asyncio.wrap_future(future) == 1
        assert future.result() == 1


async def test_a_call_that_is_cancelled_while_it_waits_is_not_made(fifo: str) -> None:
    async with open_pool() as pool:
        running = pool.executor.submit(jobs.tell_and_wait, fifo)
        waiting = pool.executor.submit(jobs.add, 1)
        await hear(fifo)
        assert waiting.cancel()
        assert not running.cancel()
        await asyncio.sleep(0)  # one turn of the loop, for the message of the cancellation
        assert pool.queued == 0
        assert await pool.close(0) != []
        with pytest.raises(PoolError):
            running.result()
