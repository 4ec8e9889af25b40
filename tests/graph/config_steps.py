"""What the tests' configurations name as module:attribute."""

from __future__ import annotations

from typing import Any

from obsdag.graph import DAG
from obsdag.limits import ConcurrencyLimit
from obsdag.tasks import ForegroundSyncFunctionTask

shared_limit = ConcurrencyLimit(2, name="shared")
not_callable = 3


class Busy(Exception):
    """What a retry is for."""


class OwnTask(ForegroundSyncFunctionTask):
    """A kind of the user's own."""

    kind = "own"

    def __init__(self, func: Any, config: Any = None, name: str = "", color: str = "red") -> None:
        super().__init__(func, config, name)
        self.color = color


async def fetch(ctx: Any, *, region: str = "us", page: int = 1) -> Any:
    return region, page


def store(ctx: Any) -> Any:
    return ctx


def nothing(ctx: Any) -> None: ...


def choose(ctx: Any) -> Any:
    return "store"


def interval(ctx: Any) -> float:
    return 1.0


@DAG().task
def decorated(ctx: Any) -> Any:
    return ctx


class Steps:
    @staticmethod
    def parse(ctx: Any) -> Any:
        return ctx
