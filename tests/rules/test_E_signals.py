"""Signals and forks that meet a run anywhere (SEMANTICS E9): it ends, its hooks have run, no process is left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from obsdag import DAG, Context, Executor, ExecutorConfig

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import asyncio, sys, time
from obsdag import DAG, AsyncFunctionTask, Executor, ExecutorConfig

class Hooked(AsyncFunctionTask):
    async def shutdown(self):
        print("hook", flush=True)

async def begin(ctx):
    await asyncio.sleep(0.001)
    return ctx

def in_thread(ctx):
    time.sleep(0.002)
    return ctx

def in_process(ctx):
    time.sleep(0.002)
    return ctx

dag = DAG()
dag.add_task(Hooked(begin, name="begin"))
dag.task(in_thread, after="begin")
dag.task(in_process, kind="process", after="begin")

async def main():
    config = ExecutorConfig(context_worker_num=8, task_worker_num=0, process_pool_worker_num=2, shutdown_grace=5)
    async with Executor(dag, config=config).stream({} for _ in iter(int, 1)) as outputs:
        async for output in outputs:
            if output is not None:
                print("goes on", flush=True)

if __name__ == "__main__":
    asyncio.run(main())
"""


def _below(pid: int) -> set[int]:
    """Processes whose parent it is, and theirs."""
    found: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        if parent == pid:
            found |= {int(entry.parent.name)} | _below(int(entry.parent.name))
    return found


def _gone(pids: set[int], within_s: float = 20.0) -> bool:
    end = time.monotonic() + within_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_E9_a_signal_at_any_moment_ends_the_run_and_leaves_no_process(tmp_path: Path, number: int, seed: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "goes on\n"
        time.sleep(random.Random(seed).random() * 0.3)  # anywhere: that is what is tried here
        workers = _below(process.pid)
        assert workers
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
    assert _gone(workers)
    if number == signal.SIGINT:  # asyncio cancels its main task: E9
        assert process.returncode != 0
        assert out.splitlines().count("hook") == 1
        assert errors.splitlines()[-1] == "KeyboardInterrupt"
    else:  # nobody asked for its handling: the program ends as any does, its workers with it
        assert process.returncode == -signal.SIGTERM
        assert errors == ""


def _wait_for(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def test_E9_a_task_may_fork_and_the_run_is_its_parents_alone() -> None:
    dag = DAG()

    @dag.task
    async def forks(ctx: Context) -> Context:
        child = os.fork()
        if not child:
            os._exit(7)
        ctx["ended"] = _wait_for(child)
        return ctx

    @dag.task(after=forks)
    def in_thread(ctx: Context) -> Context:
        return ctx

    outputs = await Executor(dag, config=ExecutorConfig(context_worker_num=2)).run([{} for _ in range(4)])
    assert [output.context["ended"] for output in outputs] == [7] * 4


def _run_in_child(dag: DAG) -> int:
    return len(asyncio.run(Executor(dag).run([{} for _ in range(5)])))


def test_E9_a_child_forked_beside_an_open_executor_makes_its_own() -> None:
    dag = DAG()

    @dag.task
    def in_thread(ctx: Context) -> Context:
        return ctx

    async def main() -> tuple[int, int]:
        async with Executor(dag) as executor:
            before = len(await executor.run([{} for _ in range(5)]))
            child = os.fork()
            if not child:
                asyncio.events._set_running_loop(None)  # a forked child is not in its parent's loop
                os._exit(_run_in_child(dag))
            status = _wait_for(child)
            return status, before + len(await executor.run([{} for _ in range(5)]))

    assert asyncio.run(main()) == (5, 10)
