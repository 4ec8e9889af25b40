"""What the tests of serving share: DAGs with a gate that opens when the test says so, and the sums that must hold."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from obsdag import DAG, Context, ExecutorConfig, ServeExecutor
from obsdag.core.states import OUTCOMES
from obsdag.testing import RecordedFacts, run_virtual

__all__ = ["Gate", "balanced", "serve", "sleeper", "virtual"]


class Gate:
    """A DAG of one task that waits at a gate; `entered` contexts are those that came to it."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.entered: list[str] = []
        self.most = 0
        self._now = 0
        self.dag = DAG("gate")
        self.dag.task(self.wait)

    async def wait(self, ctx: Context) -> Context:
        self.entered.append(ctx.id)
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            await self.open.wait()
        finally:
            self._now -= 1
        return ctx


def sleeper() -> DAG:
    """ctx["s"] seconds in a task; ctx["fail"] raises; ctx["drop"] is discarded."""
    dag = DAG("sleeper")

    @dag.task(may_drop=True)
    async def sleep(ctx: Context) -> Context | None:
        await asyncio.sleep(ctx.get("s", 0))
        if "fail" in ctx:
            raise ValueError(ctx["fail"])
        return None if ctx.get("drop") else ctx

    return dag


def serve(dag: DAG, facts: RecordedFacts | None = None, **settings: Any) -> ServeExecutor:
    """An executor that checks its own invariants."""
    settings.setdefault("context_worker_num", 4)
    observers = () if facts is None else (facts,)
    return ServeExecutor(dag, config=ExecutorConfig(debug=True, observers=observers, **settings))


def balanced(executor: ServeExecutor) -> dict[str, int]:
    """The counts of a stopped executor, after a look that nothing lives, waits or is kept (C9, S3)."""
    stats = executor.stats()
    assert stats["living"] == 0 == executor.in_flight == executor.pending
    assert stats["entered"] == sum(stats[outcome] for outcome in OUTCOMES)
    assert executor.phase == "stopped"
    assert not executor._line
    return stats


def virtual(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Runs an async test in virtual time: minutes of grace and expiry cost nothing."""

    def run() -> None:
        async def main() -> None:
            await test()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            timers = [each for each in asyncio.get_running_loop()._scheduled if not each.cancelled()]  # type: ignore[attr-defined]
            assert not left
            assert not timers

        run_virtual(main())

    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    return run
