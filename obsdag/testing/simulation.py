"""A run of the pure core under a schedule that a seed chooses: no event loop, no threads, no waiting.

    def test_every_order_gives_the_same_sum() -> None:
        for seed in range(1_000):
            assert simulate(dag, orders, seed=seed, context_worker_num=4).counts["output"] == len(orders)

What the core decides is real: readiness, lanes, limits, retries, joins, outcomes, stalls. What asyncio would decide is
chosen by the seed: which execution goes on next, which worker starts, whether a timer is due before a task returns. So
a thousand runs meet orders that a thousand real runs never would, and `seed` replays each of them exactly.

Functions run as they are, on the calling thread, whatever their kind. A coroutine may be left at `await sleep(seconds)`
of this module, which is virtual, and at `await asyncio.sleep(0)`; what awaits anything else, and services, get a
stand-in: `stand_ins={"fetch": fake_fetch}`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Iterator, Mapping
from random import Random
from types import coroutine
from typing import TYPE_CHECKING, Any

from obsdag.config import ExecutorConfig
from obsdag.core.observer import Facts
from obsdag.core.queue import IDLE
from obsdag.core.records import Execution
from obsdag.core.state import RunState
from obsdag.executor import RunResult
from obsdag.inputs import Inputs, open_inputs
from obsdag.runtime import Runtime
from obsdag.testing.bodies import Bodies, SimulationError
from obsdag.testing.steps import Runner, Steps

if TYPE_CHECKING:
    from obsdag.core.observer import Observer
    from obsdag.graph import DAG

__all__ = ["Simulation", "SimulationError", "explore", "simulate", "sleep"]

Chooser = Callable[[int], int]
StandIns = Mapping[str, Callable[..., Any]]


@coroutine
def sleep(seconds: float) -> Generator[float, None, None]:
    """In a task under simulation: other things happen for so many virtual seconds."""
    yield float(seconds)


class Simulation(Steps):
    """One simulated run. `step` does one thing of those that could happen next; `finish` goes on to the end.

    dag, inputs, observers and settings: as for an `Executor`. seed: of the schedule; or `choose(n)` gives the number
    0..n-1 of what happens next. eager: workers never pause between two steps, so that only the order in which functions
    go on is left to choose. stand_ins: task id -> function to be called instead of the task's own. run: the core's
    state; now: seconds of the virtual clock; schedule: what has happened, in words. `later(name, function)` has
    `function()` called at a moment that the schedule chooses (a freeze from outside, say); `stop` ends the run early.
    """

    def __init__(
        self,
        dag: DAG,
        inputs: Inputs = None,
        *,
        seed: int = 0,
        choose: Chooser | None = None,
        eager: bool = False,
        stand_ins: StandIns | None = None,
        runtime: Runtime | None = None,
        observers: tuple[Observer, ...] = (),
        config: ExecutorConfig | None = None,
        **settings: Any,
    ) -> None:
        self.plan = dag.plan or dag.build()
        self.config = config or ExecutorConfig(**settings)
        self.now = 0.0
        self.seed = seed
        random = Random(seed)
        self.random = Random(random.random())  # for retry jitter: apart from the schedule's
        self.choose: Chooser = choose or random.randrange
        self.eager = eager
        self.run = run = RunState(self.plan, self.config, runtime or Runtime(), lambda: self.now)
        run.dispatch, run.caller, run.nudge = self._dispatch, lambda: self._calling, self._nudge
        run.emit = self._emit
        self.outputs = RunResult()
        opened = open_inputs(inputs)
        if not isinstance(opened, Iterator):
            raise SimulationError("the inputs of a simulation cannot be an async iterable")
        self.inputs: Iterator[Any] | None = opened
        self.schedule: list[str] = []
        self.over = False
        self.stopped = ""
        self._bodies = Bodies(self, dag, stand_ins or {})
        self._options: list[tuple[str, Callable[[Any], None], Any]] = []
        self._sleepers: list[tuple[float, int, Runner]] = []
        self._slept = 0
        self._free = list(range(self.config.context_worker_num - 1, -1, -1))
        self._calling: Execution | None = None
        self._nudged = False
        run.observe(Facts((*self.config.observers, *observers)))
        run.runtime._opened(run)
        run.runtime.limits.attach({limit: None for limits in run.limits for limit in limits})
        if run.facts.run_started is not None:
            run.facts.run_started(run, self.now)
        self._pump()

    # --- what a user calls

    def finish(self, max_steps: int = 1_000_000) -> RunResult:
        """Goes on to the end of the run and returns its result.

        Raises SimulationError when nothing can happen any more and something lives, or after `max_steps`.
        """
        for _ in range(max_steps):
            if not self.step():
                return self.outputs
        raise SimulationError(f"seed {self.seed}: the run has not ended after {max_steps} steps: {self._story()}")

    def step(self) -> bool:
        """One thing happens; False when the run is over."""
        if self._is_done():
            self._close()
            return False
        due = self._next_due()
        number = len(self._options) + (due is not None)
        if not number:
            raise SimulationError(f"seed {self.seed}: nothing can happen any more: {self._story()}")
        chosen = self._at_once() if self.eager else -1
        if chosen < 0:
            chosen = self.choose(number) if number > 1 else 0
        if chosen < len(self._options):
            name, function, argument = self._options.pop(chosen)
            self.schedule.append(name)
            function(argument)
        else:
            assert due is not None
            self._time_comes(due)
        return True

    def _at_once(self) -> int:
        """The first thing that a worker does without waiting for anything; -1 if there is none."""
        eager = (self._work, self._begin, self._cancel, self._nudge_comes)
        return next((index for index, option in enumerate(self._options) if option[1] in eager), -1)

    def later(self, name: str, function: Callable[[], None]) -> None:
        """Has `function()` called at a moment that the schedule chooses."""
        self._options.append((name, lambda _: function(), None))

    def stop(self) -> None:
        """Ends the run early: what lives is cancelled (E9)."""
        self._end_early("stopped")

    # --- time

    def _next_due(self) -> float | None:
        due = self.run.next_wake()
        if self._sleepers and (due is None or self._sleepers[0][0] < due):
            return self._sleepers[0][0]
        return due

    def _time_comes(self, due: float) -> None:
        self.now = max(self.now, due)
        self.schedule.append(f"time {self.now:g}")
        while self._sleepers and self._sleepers[0][0] <= self.now:
            self._goes_on(heapq.heappop(self._sleepers)[2])
        wake = self.run.next_wake()
        if wake is not None and wake <= self.now:
            self.run.wake(self.now)
            self.told("wake")
            self._pump()

    # --- the end

    def _is_done(self) -> bool:
        if self.stopped:
            return not self.run.active
        return self.inputs is None and self.run.settled() and not self.run.busy_workers

    def _end_early(self, why: str) -> None:
        if not self.stopped:
            self.stopped, self.inputs = why, None
            self.run.stop(self.now)
            self.told("stop")
            self._pump()

    def _close(self) -> None:
        if self.over:
            return
        self.over = True
        run, result = self.run, self.outputs
        run.runtime.limits.detach({limit: None for limits in run.limits for limit in limits})
        run.close(self.now)
        self.told("close")
        run.runtime._closed(run)
        self._bodies.close()
        result.counts = run.counts
        result.failures, result.stalled = run.failures, run.stalls
        result.duration_s = self.now - run.started

    def _story(self) -> str:
        run = self.run
        living = [f"{each!r} {run.plan.names(each._ready | each._running | each._parked)}" for each in run.contexts]
        return (
            f"{len(living)} contexts live ({'; '.join(living[:5])}), {run.active} executions, "
            f"{run.busy_workers} busy workers, idle {[each for each in run.contexts if each._place == IDLE][:5]}; "
            f"the last steps were {self.schedule[-10:]}"
        )


class _Path:
    """The choices of one run: those given, then the first of each; `go_on` turns to the next path, if there is one."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.numbers: list[int] = []
        self.position = 0

    def choose(self, number: int) -> int:
        if self.position == len(self.taken):
            self.taken.append(0)
            self.numbers.append(number)
        self.position += 1
        return self.taken[self.position - 1]

    def go_on(self) -> bool:
        self.position = 0
        while self.taken and self.taken[-1] + 1 == self.numbers[-1]:
            self.taken.pop()
            self.numbers.pop()
        if self.taken:
            self.taken[-1] += 1
        return bool(self.taken)


def explore(make: Callable[[Chooser], Simulation], limit: int = 100_000) -> Iterator[RunResult]:
    """The results under every schedule there is, one after the other, each of a new `make(choose)`.

    For small cases, and with `eager=True`: the number of schedules grows like the factorial of what runs at once.
    Raises SimulationError after `limit` schedules.
    """
    path = _Path()
    for _ in range(limit):
        yield make(path.choose).finish()
        if not path.go_on():
            return
    raise SimulationError(f"there are more than {limit} schedules: make the case smaller, or the limit larger")


def simulate(dag: DAG, inputs: Inputs = None, *, seed: int = 0, **keywords: Any) -> RunResult:
    """A whole simulated run (see `Simulation` for the keywords): its result, as of `Executor.run`."""
    return Simulation(dag, inputs, seed=seed, **keywords).finish()
