"""`RayExecutor`: `run` and `stream` of a DAG on shards, each an ordinary engine in a Ray actor."""

from __future__ import annotations

import asyncio
import math
import os
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from obsdag.config import ExecutorConfig
from obsdag.context import OutputContext
from obsdag.core.records import Failure, Stall
from obsdag.core.states import OUTCOMES
from obsdag.errors import ConfigError
from obsdag.executor import RunResult, _early_error, _journalled
from obsdag.inputs import Inputs, open_inputs
from obsdag.mailbox import see_through
from obsdag.ray.accepted import found
from obsdag.ray.cluster import Cluster, Settings, carry_dag, is_off
from obsdag.ray.driver import Driver
from obsdag.ray.fleet import Fleet
from obsdag.ray.wire import codec_of

if TYPE_CHECKING:
    from obsdag.graph import DAG
    from obsdag.telemetry import Telemetry

__all__ = ["RayExecutor", "RayStream"]


class RayStream(AsyncIterator[OutputContext]):
    """The outputs of a run as they come; `counts`, `failures` and `stalled` tell how it stands. As OutputStream."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._ready: deque[OutputContext] = deque()
        self._waiter: asyncio.Future[None] | None = None
        driver.emit = self._emit

    def _emit(self, output: OutputContext) -> None:
        self._ready.append(output)
        self._driver.buffered += 1
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __anext__(self) -> OutputContext:
        driver = self._driver
        while not self._ready:
            if driver.done.done():
                if driver.early:
                    raise _early_error(driver, None)  # type: ignore[arg-type]
                raise StopAsyncIteration
            self._waiter = driver.loop.create_future()
            await asyncio.wait([self._waiter, driver.done], return_when=asyncio.FIRST_COMPLETED)
        if driver.buffered == driver.config.max_live_contexts:
            driver.pump_soon()
        driver.buffered -= 1
        return self._ready.popleft()

    @property
    def counts(self) -> dict[str, int]:
        """`entered` and each outcome so far."""
        return self._driver.counts

    @property
    def failures(self) -> list[Failure]:
        """The newest failures, `failures_kept` at most (1,000)."""
        return list(self._driver.failures)

    @property
    def stalled(self) -> list[Stall]:
        """Why contexts could not go on."""
        return self._driver.stalls


class RayExecutor:
    """Runs a DAG on a Ray cluster: roots are dealt out to `shards` actors, each running the ordinary engine.

    config: as for `Executor`; `max_live_contexts`, workers, pools and limits count for each shard, `deadline`,
    `on_failure`, `failures_kept` and `observers` (of failures, stalls and clean-up) for the run on the driver.
    shards: their number; or the least and the most of them, or "auto", to have as many as the machines of the cluster
    have room for, while machines come and go (its autoscaler's, say). address: None takes this process's connection to
    Ray, or starts a cluster on this machine for as long as it is needed; "local" always does; "auto" or "host:port"
    joins one. insecure: takes an address that others can reach although it asks for no token. shard_options: for each
    actor, as Ray's `.options(...)` takes them.
    allow_pickle: data that has no form of its own crosses pickled. Telemetry.off() silences the shards, which else log
    warnings and errors to their standard error.

    telemetry: called on each shard with its name, returns its Telemetry; traces go on from the span in which the run
    began, as locally, with a `run` span for each shard. ops: each shard has a `start_ops_server` with
    these arguments, on a free port unless they name one; `targets` has the addresses. file_sd: a file that lists them
    for Prometheus's `file_sd_configs`, with the label `shard`.

    With a journal, the driver writes down which roots were accepted and what became of them; see `recover`.

    A shard that dies is replaced; its roots run again elsewhere, at least once, with one outcome each. Limits are of
    each shard. `async with executor:` keeps connection and shards over several runs. Raises ConfigError, GraphError.
    """

    def __init__(
        self,
        dag: DAG,
        config: ExecutorConfig | None = None,
        *,
        shards: int | tuple[int, int] | Literal["auto"] = 2,
        address: str | None = None,
        insecure: bool = False,
        shard_options: Mapping[str, Any] | None = None,
        allow_pickle: bool = False,
        telemetry: Callable[[str], Telemetry] | None = None,
        ops: Mapping[str, Any] | None = None,
        file_sd: str | os.PathLike[str] | None = None,
    ) -> None:
        self.dag = dag
        self.plan = dag.build()
        self.config = config if config is not None else ExecutorConfig()
        self.codec = codec_of(allow_pickle)
        least, span = _read_shards(shards)
        if not (self.config.telemetry is None or is_off(self.config)):
            raise ConfigError(
                "RayExecutor has a telemetry for each shard: RayExecutor(..., telemetry=make), where make(shard) "
                "returns one"
            )
        if file_sd is not None and ops is None:
            raise ConfigError("file_sd lists the shards' ops servers: give ops={} to have them, on free ports")
        options = dict(shard_options or {})
        cluster = Cluster(address, insecure, least * float(options.get("num_cpus") or 1))
        settings = Settings(self.config, allow_pickle, telemetry, None if ops is None else dict(ops)).pack()
        self._fleet = Fleet(cluster, carry_dag(dag), settings, least, options, file_sd)
        self._fleet.span = span
        self._drivers: list[Driver] = []
        self._shells: list[Any] = []  # no run of its own has a shell here
        self._totals: Counter[str] = Counter()
        self._is_traced = telemetry is not None

    # --- running

    async def run(self, input_context: Inputs = None) -> RunResult:
        """Runs the inputs to their end and returns the outputs, in the order in which the driver hears of them (E2).

        Takes and raises what `Executor.run` does, and PoolError when no shard can be had or kept.
        """
        result = RunResult()
        async with self._driving(input_context, result, left_alone=True) as driver:
            await self._wait(driver, result)
        if driver.early:
            raise _early_error(driver, result)  # type: ignore[arg-type]
        return result

    async def recover(self, tasks: Mapping[str, str | None] | None = None) -> RunResult:
        """Runs what the journal holds of this DAG without an outcome, from the beginning: shards note no progress.

        tasks: for a DAG that has changed: old task id -> its id now, None if the task is gone. Raises ConfigError
        without a journal, PlanChangedError, JournalError, and as `run`.
        """
        if self.config.journal is None:
            raise ConfigError("there is nothing to recover from: set ExecutorConfig(journal=SQLiteJournal(...))")
        result = RunResult()
        async with self._driving([], result) as driver:
            recovery = await self.config.journal.load(self.plan, tasks)
            driver.take_up(found(driver.recorder, recovery, self.plan))
            await self._wait(driver, result)
        if driver.early:
            raise _early_error(driver, result)  # type: ignore[arg-type]
        return result

    async def _wait(self, driver: Driver, result: RunResult) -> None:
        driver.emit = result.append
        deadline = self._arm_deadline(driver)
        try:
            driver.begin()
            await driver.done
        except asyncio.CancelledError as error:
            driver.end_early("cancelled", error)
            raise
        finally:
            if deadline is not None:
                deadline.cancel()

    def run_sync(self, input_context: Inputs = None) -> RunResult:
        """`run` for scripts. Raises RuntimeError inside a running event loop."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass  # outside of this block, or each exception of the run would have this one as its context
        else:
            raise RuntimeError("run_sync cannot be used inside a running event loop: use `await executor.run(...)`")
        return asyncio.run(self.run(input_context))

    @asynccontextmanager
    async def stream(self, inputs: Inputs) -> AsyncIterator[RayStream]:
        """Runs the inputs and gives out outputs as they come (E3). Leaving early ends the run (E9).

        Whatever the number of inputs, each shard has at most `max_live_contexts` contexts and 2,000 roots that wait.
        """
        async with self._driving(inputs, RunResult(), left_alone=True) as driver:
            driver.failures_kept = self.config.failures_kept
            outputs = RayStream(driver)
            deadline = self._arm_deadline(driver)
            try:
                driver.begin()
                yield outputs
            finally:
                if deadline is not None:
                    deadline.cancel()
                if not driver.done.done():
                    driver.end_early("left", None)
        if driver.early not in ("", "left"):
            raise _early_error(driver, None)  # type: ignore[arg-type]

    @asynccontextmanager
    async def _driving(self, inputs: Inputs, result: RunResult, *, left_alone: bool = False) -> AsyncIterator[Driver]:
        opened = open_inputs(inputs)
        async with _journalled(self.config.journal, self.plan, left_alone=left_alone) as recorder:
            self._fleet.enter()
            try:
                driver = self._open_driver(opened)
                driver.recorder = recorder
                try:
                    yield driver
                finally:
                    end = driver.clock()
                    try:
                        await see_through(driver.close())
                    finally:
                        self._retire(driver)
                        self._note(driver, result, end)
            finally:
                await see_through(self._fleet.leave(self.config.shutdown_grace))

    def _open_driver(self, inputs: Any) -> Driver:
        headers = {}
        if self._is_traced:
            from obsdag.telemetry.carrier import carry

            headers = carry()
        driver = Driver(self._fleet, self.config, self.codec, inputs, headers)
        self._drivers.append(driver)
        return driver

    def _retire(self, driver: Driver) -> None:
        """Its run is over."""
        self._drivers.remove(driver)
        self._totals.update(driver.counts)
        self._totals.update(driver.numbers)
        self._totals["runs"] += 1

    def _note(self, driver: Driver, result: RunResult, end: float) -> None:
        result.failures, result.counts, result.stalled = list(driver.failures), driver.counts, driver.stalls
        result.duration_s = 0.0 if driver.first_entered is None else max(end - driver.first_entered, 0.0)
        result.cleanup_errors, result.abandoned = driver.cleanup_errors, driver.abandoned

    def _arm_deadline(self, driver: Driver) -> asyncio.TimerHandle | None:
        if self.config.deadline is None:
            return None
        return driver.loop.call_later(self.config.deadline, driver.end_early, "deadline", None)

    # --- looking, and the shards

    def stats(self) -> dict[str, Any]:
        """As `Executor.stats`; executions, retries and the numbers of tasks are those of runs that have ended.

        They are the engines' own: a shard that died takes with it what it had counted, and a root that ran twice
        counts twice.
        """
        totals = self._totals.copy()
        for driver in list(self._drivers):
            totals.update(driver.counts)
        entered, ended = totals["entered"], sum(totals[name] for name in OUTCOMES)
        tasks = {
            task.id: {"executions": int(totals[f"n:{task.id}"]), "seconds": float(totals[f"s:{task.id}"])}
            for task in self.plan.tasks[1:-1]
        }
        names = ("runs", "executions", "retries", "entered", *OUTCOMES)
        return {**{name: totals[name] for name in names}, "living": entered - ended, "tasks": tasks}

    @property
    def shards(self) -> int:
        """How many there are to be."""
        return self._fleet.shards

    @property
    def targets(self) -> dict[str, str]:
        """Where `/metrics` of each shard is, by its name, as long as it lives; with `ops` only."""
        return dict(self._fleet.targets)

    def seen(self) -> dict[str, Any]:
        """What the live page shows of it, read from any thread: `obsdag.ops` looks here (`Far`)."""
        drivers = list(self._drivers)
        counts = sum((Counter(driver.counts) for driver in drivers), Counter[str]())
        return {
            "phase": getattr(self, "phase", "running" if drivers else "idle"),
            "runs": len(drivers),
            "up_s": max((driver.clock() - driver.started for driver in drivers), default=0.0),
            "counts": dict(counts),
            "living": 2 * counts["entered"] - sum(counts.values()),
            "shards": [shard for driver in drivers for shard in driver.shards_seen()],
        }

    def scale(self, shards: int | tuple[int, int] | Literal["auto"]) -> None:
        """From now on there are to be `shards` of them, in runs that go on, too; on the event loop of these.

        To follow the cluster's size, runs have to begin with that; one that goes on can be given another span.

        New ones start as soon as the cluster has room, which its autoscaler may make; those that go first answer what
        they have. Raises ConfigError.
        """
        self._fleet.shards, self._fleet.span = _read_shards(shards)
        if self._drivers:
            self._fleet.fit(self._fleet.places())
        for driver in self._drivers:
            driver.resize()

    async def __aenter__(self) -> Self:
        """Keeps the connection, the shards, and the journal until the block ends."""
        self._fleet.enter()
        try:
            if self.config.journal is not None:
                await self.config.journal.acquire()
        except BaseException:
            await see_through(self._fleet.leave(0.0))
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await see_through(self._fleet.leave(self.config.shutdown_grace))
        finally:
            if self.config.journal is not None:
                await see_through(self.config.journal.release())


def _read_shards(shards: Any) -> tuple[int, tuple[int, float] | None]:
    """The number of shards, and the span of it where it is to follow the cluster. Raises ConfigError."""
    if shards == "auto":
        return 1, (1, math.inf)
    several = shards if isinstance(shards, tuple) and len(shards) == 2 else (shards,)
    if any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in several):
        raise ConfigError(
            f'shards must be a whole number >= 1, the least and the most as a tuple of two, or "auto", not {shards!r}'
        )
    if len(several) == 2 and several[0] > several[1]:
        raise ConfigError(f"shards: the least must not be above the most, as in {shards!r}")
    return several[0], several if len(several) == 2 else None
