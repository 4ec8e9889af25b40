"""Whatever moment a process dies at, what was accepted comes to the outcomes that it would have come to, once each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from obsdag import DAG, Context, RateLimit
from obsdag.journal.codec import Codec
from tests.journal.images import outcomes, photographed, recovered


def chain() -> DAG:
    dag = DAG("chain")

    @dag.task
    async def a(ctx: Context) -> Context:
        await asyncio.sleep(1)
        ctx["n"] *= 10
        return ctx

    @dag.task(after=a)
    async def b(ctx: Context) -> Context:
        ctx["half"] = True
        await asyncio.sleep(1)
        ctx["n"] += 1
        return ctx

    @dag.task(after=b)
    def c(ctx: Context) -> Context:
        ctx["m"] = (ctx["n"], {ctx["n"]})
        return ctx

    return dag


def branches() -> DAG:
    dag = DAG("branches")

    @dag.task
    async def start(ctx: Context) -> Context:
        return ctx

    @dag.task(after=start)
    async def left(ctx: Context) -> Context:
        await asyncio.sleep(1)
        ctx["left"] = ctx["n"]
        return ctx

    @dag.task(after=start, kind="router")
    async def choose(ctx: Context) -> str:
        await asyncio.sleep(2)
        return "odd" if ctx["n"] % 2 else "even"

    @dag.task(after=choose)
    async def odd(ctx: Context) -> Context:
        await asyncio.sleep(1)
        ctx["kind"] = "odd"
        return ctx

    @dag.task(after=choose)
    async def even(ctx: Context) -> Context:
        await asyncio.sleep(3)
        ctx["kind"] = "even"
        return ctx

    @dag.task(after=[left, odd, even])
    async def end(ctx: Context) -> Context:
        assert ctx["left"] == ctx["n"]
        assert ctx["kind"] == ("odd" if ctx["n"] % 2 else "even")
        return ctx

    return dag


def retries() -> DAG:
    dag = DAG("retries")

    @dag.task(retry_times=3, retry_interval=10)
    async def flaky(ctx: Context) -> Context:
        await asyncio.sleep(1)
        if ctx.attempt <= ctx["n"]:
            raise ValueError(f"attempt {ctx.attempt}")
        return ctx

    @dag.task(after=flaky, limiter=RateLimit(1, per=2))
    async def slow(ctx: Context) -> Context:
        return ctx

    return dag


def maps() -> DAG:
    dag = DAG("maps")

    @dag.task(kind="map")
    async def spread(ctx: Context) -> Any:
        for i in range(ctx["n"]):
            await asyncio.sleep(0.5)
            yield {"i": i}

    @dag.task(after=spread)
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(1 + ctx["i"] % 3)
        ctx["square"] = ctx["i"] ** 2
        if ctx["i"] == 5:
            raise ValueError("five")
        return ctx

    @dag.task(after=work, kind="join", on_child_failure="skip")
    async def gather(ctx: Context, children: list[Context]) -> Context:
        ctx["squares"] = [child["square"] for child in children]
        ctx["failed"] = [child["i"] for child in children.failed]  # type: ignore[attr-defined]
        await asyncio.sleep(1)
        return ctx

    @dag.task(after=gather)
    async def check(ctx: Context) -> Context:
        wanted = [i for i in range(ctx["n"]) if i != 5]
        assert ctx["squares"] == [i * i for i in wanted]
        assert ctx["failed"] == [5] * (ctx["n"] > 5)
        await asyncio.sleep(1)
        return ctx

    return dag


def children() -> DAG:
    dag = DAG("children")

    @dag.task
    async def split(ctx: Context) -> list[Context]:
        made = ctx.create_child(3)
        for number, child in enumerate(made):
            child["i"] = number
        await asyncio.sleep(1)
        return made

    @dag.task(after=split)
    async def work(ctx: Context) -> Context:
        await asyncio.sleep(ctx["i"])
        return ctx

    @dag.task(after=work)
    async def back(ctx: Context) -> Context | None:
        assert ctx.parent is not None
        ctx.parent[f"got{ctx['i']}"] = True
        return ctx.parent if ctx["i"] == 2 else None

    @dag.task(after=back)
    async def end(ctx: Context) -> Context:
        await asyncio.sleep(1)
        return ctx

    return dag


def replaced() -> DAG:
    dag = DAG("replaced")

    @dag.task
    async def turn(ctx: Context) -> Context:
        await asyncio.sleep(1)
        other = ctx.create(copy_data=True)
        return other

    @dag.task(after=turn)
    async def end(ctx: Context) -> Context:
        await asyncio.sleep(1)
        return ctx

    return dag


WORKLOADS: dict[str, tuple[Callable[[], DAG], list[int]]] = {
    "chain": (chain, list(range(8))),
    "branches": (branches, list(range(8))),
    "retries": (retries, [0, 1, 2, 3, 4]),
    "maps": (maps, [0, 1, 4, 8]),
    "children": (children, [1, 2, 3]),
    "replaced": (replaced, [1, 2, 3]),
}


def roots(path: Path) -> Counter[tuple[Any, str | None]]:
    """What became of trees: the `n` of the input and each outcome that is not in the middle of it."""
    found: Counter[tuple[Any, str | None]] = Counter()
    for row in outcomes(path):
        if row.parent is None:
            data = Codec().decode(row.data) if row.data is not None else {}
            found[data.get("n"), row.outcome] += 1
    return found


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("workers", [1, 4])
def test_a_crash_at_every_commit(name: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, numbers = WORKLOADS[name]
    settings = {"context_worker_num": workers, "task_worker_num": workers}
    inputs = [{"n": n} for n in numbers]
    whole, images = photographed(make(), inputs, tmp_path, monkeypatch, **settings)
    expected = roots(tmp_path / "j.db")
    assert len(images) >= 8

    for image in images:
        accepted = {row.key for row in outcomes(image.path) if row.parent is None and row.key == row.tree}
        done = [row for row in outcomes(image.path) if row.outcome is not None]
        result = recovered(make(), image.path, **settings)

        rows = outcomes(image.path)
        assert all(row.outcome for row in rows), "everything accepted has an outcome"
        now = {row.key: row for row in rows}
        assert all(now[row.key] == row for row in done), "an outcome is recorded once"
        trees = {row.tree for row in rows}
        assert trees == accepted, "nothing is lost and nothing is made up"
        assert roots(image.path) <= expected
        if len(accepted) == len(numbers):
            assert roots(image.path) == expected
            outputs = [output["n"] for output in result] + [
                Codec().decode(row.data)["n"] for row in done if row.outcome == "output" and row.data
            ]
            assert Counter(outputs) == Counter(whole), "each output once"
        committed = Counter(Codec().decode(row.data).get("n") for row in done if row.outcome == "output" and row.data)
        assert Counter(image.given) <= committed, "nothing was given out before its commit"
        assert recovered(make(), image.path).counts["entered"] == 0
