"""One shard without a cluster: what it says, and when, in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from obsdag import DAG, Context, ExecutorConfig, OutputContext, Telemetry
from obsdag.testing import run_virtual

pytest.importorskip("msgspec", reason="needs msgspec: pip install 'obsdag[journal]'")
from obsdag.ray.shard import GATHER_S, ShardEngine
from obsdag.ray.wire import Batch, Seed, codec_of, decode_answers, encode

WORK_S = 0.003
dag = DAG("d")


@dag.task
async def work(context: Context) -> Context:
    await asyncio.sleep(WORK_S)
    return context


def fed(engine: ShardEngine, numbers: range, data: bytes | None = None) -> None:
    codec = codec_of(False)
    seeds = [Seed(number, 1, f"s{number}", False, data or codec.encode({"x": number})) for number in numbers]
    engine.feed(encode(Batch(seeds)))


async def heard(engine: ShardEngine, count: int) -> list[tuple[float, list[int]]]:
    """When, and of which roots, until `count` of them have been told of."""
    loop = asyncio.get_running_loop()
    told: list[tuple[float, list[int]]] = []
    while sum(len(numbers) for _, numbers in told) < count:
        answers = decode_answers(await engine.answers())
        told.append((loop.time(), [ended.number for ended in answers.ended]))
    return told


def engine_of(**config: Any) -> ShardEngine:
    return ShardEngine(dag, ExecutorConfig(telemetry=Telemetry.off(), **config), codec_of(False))


def test_what_ends_while_plenty_waits_is_told_of_together() -> None:
    async def main() -> list[tuple[float, list[int]]]:
        engine = engine_of()
        await engine.begin({})
        fed(engine, range(40))
        told = await heard(engine, 40)
        await engine.end(False)
        return told

    told = run_virtual(main())

    assert [number for _, numbers in told for number in numbers] == list(range(40))
    assert len(told) < 25, "one each while little waits, several while plenty does"
    assert max(len(numbers) for _, numbers in told) >= GATHER_S / WORK_S


def test_what_ends_while_nothing_waits_is_told_of_at_once() -> None:
    async def main() -> float:
        engine = engine_of()
        loop = asyncio.get_running_loop()
        await engine.begin({})
        began = loop.time()
        fed(engine, range(1))
        await heard(engine, 1)
        took_s = loop.time() - began
        await engine.end(False)
        return took_s

    assert run_virtual(main()) == pytest.approx(WORK_S, abs=1e-6)


def test_workers_without_work_and_an_end_hurry_what_is_gathered() -> None:
    async def main() -> tuple[list[tuple[float, list[int]]], bytes]:
        engine = engine_of(context_worker_num=8)
        await engine.begin({})
        fed(engine, range(16))
        told = await heard(engine, 16)
        asking = asyncio.ensure_future(engine.answers())
        await asyncio.sleep(0)
        await engine.end(False)
        return told, await asking

    told, last = run_virtual(main())

    assert told[-1][0] - told[0][0] < GATHER_S
    assert last == b""


def test_a_root_whose_data_cannot_be_read_fails_alone() -> None:
    async def main() -> list[tuple[int, str, str]]:
        engine = engine_of()
        await engine.begin({})
        fed(engine, range(1))
        fed(engine, range(1, 2), b"?")
        fed(engine, range(2, 3))
        found: list[tuple[int, str, str]] = []
        while len(found) < 3:
            answers = decode_answers(await engine.answers())
            assert answers.fault is None
            found += [
                (each.number, each.outcome, str(each.failures[0].exception()) if each.failures else "")
                for each in answers.ended
            ]
        assert answers.taken == 3
        await engine.end(False)
        return sorted(found)

    ended = run_virtual(main())

    assert [each[:2] for each in ended] == [(0, "output"), (1, "failed"), (2, "output")]
    assert "the input cannot be read on a shard (JournalError: " in ended[1][2]


def odd_results(dag: DAG, count: int = 1) -> list[tuple[int, str]]:
    """For each root of `dag`, fed with x = 0, 1, ..., where its result, which has no form, is said to be from."""

    async def main() -> list[tuple[int, str]]:
        engine = ShardEngine(dag, ExecutorConfig(telemetry=Telemetry.off()), codec_of(False))
        await engine.begin({})
        fed(engine, range(count))
        found: list[tuple[int, str]] = []
        while len(found) < count:
            ended = decode_answers(await engine.answers()).ended
            found += [(each.number, failing.task) for each in ended for failing in each.failures]
            assert all(each.outcome == "failed" for each in ended)
        await engine.end(False)
        return sorted(found)

    return run_virtual(main())


def odd(context: Context) -> Context:
    context["thing"] = object()
    return context


def test_a_result_without_a_form_is_the_failure_of_the_task_that_it_is_of() -> None:
    chain = DAG("chain")
    chain.task(lambda context: context, name="first")
    chain.task(odd, name="last", after="first")
    routed = DAG("routed")
    routed.router(lambda context: "left" if context["x"] else "right", name="choose")
    routed.task(odd, name="left", after="choose")
    routed.task(odd, name="right", after="choose")

    assert odd_results(chain) == [(0, "last")]
    assert odd_results(routed, 2) == [(0, "right"), (1, "left")]


def test_a_result_of_several_tasks_without_a_form_is_the_failure_of_the_sink() -> None:
    forked = DAG("forked")
    forked.task(odd, name="left")
    forked.task(lambda context: context, name="right")
    early = DAG("early")
    early.task(lambda context: OutputContext(odd(context)), name="first")
    early.task(lambda context: context, name="last", after="first")

    assert odd_results(forked) == [(0, "sink")]
    assert odd_results(early) == [(0, "sink")]
