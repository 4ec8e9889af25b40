"""Serving as a state machine: any order of submitting, cancelling, fetching, waiting and draining keeps the books."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from obsdag import (
    ContextFailedError,
    DuplicateIdError,
    NoOutputError,
    NotAcceptingError,
    QueueFullError,
    SQLiteJournal,
    Ticket,
)
from obsdag.testing import VirtualLoop
from tests.journal.images import inline, outcomes
from tests.serve.helpers import balanced, serve, sleeper

ENDS = {"output", "failed", "dropped", "cancelled"}


class Serving(RuleBasedStateMachine):
    """Tickets by the number of their submission; `waiting`: submits that have not returned."""

    journal: SQLiteJournal | None = None
    commit_turns = 0  # of the event loop, until what was accepted is committed

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop(settle_s=0.0)
        self.tickets: list[Ticket] = []
        self.waiting: list[asyncio.Task[Ticket]] = []
        self.turned_away = 0

    def _do(self, coroutine: Any) -> Any:
        async def do() -> Any:
            try:
                return await coroutine
            finally:
                for _ in range(self.commit_turns):
                    await asyncio.sleep(0)

        try:
            return self.loop.run_until_complete(do())
        finally:
            self._collect()  # whatever was done may have let one in that was waiting in line

    @initialize(live=st.integers(1, 3), pending=st.integers(0, 2), workers=st.integers(1, 3))
    def start(self, live: int, pending: int, workers: int) -> None:
        self.live, self.max_pending = live, pending
        self.executor = serve(
            sleeper(),
            context_worker_num=workers,
            max_live_contexts=live,
            max_pending=pending,
            result_ttl=50,
            drain_grace=30,
            journal=self.journal,
        )
        self._do(self.executor.start())

    @rule(
        seconds=st.sampled_from([0, 1, 7, 100]),
        end=st.sampled_from(["output", "fail", "drop"]),
        deadline=st.sampled_from([None, 5]),
        wait=st.sampled_from([True, False, 3]),
        id=st.sampled_from([None, "a", "b"]),
    )
    def submit(self, seconds: int, end: str, deadline: float | None, wait: bool | int, id: str | None) -> None:
        data = {"s": seconds} | ({} if end == "output" else {end: end})

        async def begin() -> None:
            submitting = asyncio.ensure_future(self.executor.submit(data, id, deadline=deadline, wait=wait))
            self.waiting.append(submitting)
            await asyncio.sleep(0)

        self._do(begin())

    def _collect(self) -> None:
        for task in [task for task in self.waiting if task.done()]:
            self.waiting.remove(task)
            if task.cancelled():
                continue
            error = task.exception()
            if error is None:
                self.tickets.append(task.result())
            else:
                assert isinstance(error, QueueFullError | DuplicateIdError | NotAcceptingError), error
                self.turned_away += 1

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 20.0, 60.0]))
    def let_time_pass(self, seconds: float) -> None:
        self._do(asyncio.sleep(seconds))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))

        async def cancel() -> None:
            had_ended = ticket.done
            assert ticket.cancel() is not had_ended

        self._do(cancel())
        assert ticket.done

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up_waiting(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.waiting)).cancel()
        self._do(asyncio.sleep(0))

    @precondition(lambda self: any(ticket.done for ticket in self.tickets))
    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from([ticket for ticket in self.tickets if ticket.done]))
        if ticket._expired:
            return
        try:
            self._do(ticket.result())
            assert ticket.status == "output"
        except ContextFailedError:
            assert ticket.status == "failed"
        except NoOutputError as error:
            assert error.outcome == ticket.status in ("dropped", "cancelled")

    @rule()
    def ask_to_drain(self) -> None:
        async def ask() -> None:
            self.executor.request_drain()
            assert self.executor.phase != "accepting"

        self._do(ask())

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "executor"):
            return
        executor = self.executor
        assert executor.pending <= self.max_pending
        for shell in executor._shells:
            assert shell.run.living <= self.live
            shell.run.check(deep=True)
        open_ = [ticket for ticket in self.tickets if not ticket.done]
        assert executor.in_flight == len(open_)
        assert all(ticket.status in ENDS for ticket in self.tickets if ticket.done)
        room = executor.phase == "accepting" and executor._shells and executor._shells[0].run.has_room()
        assert not (room and executor.pending), "room is left and a context is pending"

    def teardown(self) -> None:
        if hasattr(self, "executor"):
            self._do(self.executor.drain())
            self._do(asyncio.sleep(0))
            assert not self.waiting
            assert all(ticket.status in ENDS for ticket in self.tickets)
            counts = balanced(self.executor)
            assert counts["entered"] == len(self.tickets)
            assert not [timer for timer in self.loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        self.loop.close()


class Durable(Serving):
    """The same with a journal, which must say of each ticket what the ticket says."""

    commit_turns = 8

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "j.db"
        self.journal = inline(self.path)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "executor"):
            found = {row.id: row.outcome for row in outcomes(self.path)}
            assert len(found) == len({ticket.id for ticket in self.tickets})
            for ticket in self.tickets:
                # what the end of the grace cut off is left to the next process; of several of an id the latest is kept
                assert found[ticket.id] in (ticket.status, None) or ticket.id in ("a", "b")
        self.folder.cleanup()


TestServing = Serving.TestCase
TestServing.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestDurable = Durable.TestCase
TestDurable.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
