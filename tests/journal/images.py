"""Crashes at every call of the journal, in virtual time: the file as it is before and after each commit.

A workload runs once with a journal whose commits happen where they are asked for. Each commit keeps a copy of the file
from before and from after it: what a process would leave that died there. Each copy is then recovered.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obsdag import DAG, Executor, ExecutorConfig, RunResult, SQLiteJournal
from obsdag.journal.schema import Row
from obsdag.journal.store import Store
from obsdag.testing import run_virtual

__all__ = ["Image", "inline", "outcomes", "photographed", "recovered"]


@dataclass(frozen=True)
class Image:
    """The file of a process that died. accepted: ids of inputs in it. given: ids of what had left the engine by
    then.
    """

    path: Path
    given: tuple[Any, ...]


def inline(path: Path, **options: Any) -> SQLiteJournal:
    """A journal without a thread: a commit happens where it is asked for."""
    journal = SQLiteJournal(path, durability="process", **options)
    journal._inline = True
    return journal


def photographed(
    dag: DAG, inputs: Any, folder: Path, monkeypatch: Any, every: int = 1, **settings: Any
) -> tuple[RunResult, list[Image]]:
    """Runs the inputs in virtual time; an image before and after each commit (of every so many)."""
    images: list[Image] = []
    given: list[Any] = []
    commit, calls = Store.commit, 0

    def copy(store: Store) -> None:
        target = folder / f"{len(images)}.db"
        for suffix in ("", "-wal"):
            source = Path(store.path + suffix)
            if source.exists():
                shutil.copyfile(source, f"{target}{suffix}")
        images.append(Image(target, tuple(given)))

    def photograph(store: Store, rows: Sequence[Row]) -> None:
        nonlocal calls
        calls += 1
        if calls % every:
            commit(store, rows)
            return
        copy(store)
        commit(store, rows)
        copy(store)

    async def main() -> RunResult:
        config = ExecutorConfig(journal=inline(folder / "j.db"), debug=True, **settings)
        async with Executor(dag, config=config).stream(inputs) as outputs:
            async for output in outputs:
                given.append(output["n"])
        result = RunResult()
        result.failures, result.counts, result.stalled = outputs.failures, outputs.counts, outputs.stalled
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", photograph)
        result = run_virtual(main())
    result.extend(given)
    return result, images


def recovered(dag: DAG, path: Path, **settings: Any) -> RunResult:
    """Takes up what is in the file, in virtual time."""

    async def main() -> RunResult:
        return await Executor(dag, config=ExecutorConfig(journal=inline(path), debug=True, **settings)).recover()

    return run_virtual(main())


def outcomes(path: Path) -> list[Row]:
    """The rows of a file that nobody has open, in order of key."""
    store = Store(str(path), look=True)
    store.open()
    try:
        return list(store.rows())
    finally:
        store.close()
