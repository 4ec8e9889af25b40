"""Runs on a real Ray cluster of several nodes on this machine: the same counts as locally, whatever dies."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from obsdag import (
    ConfigError,
    Context,
    DeadlineExceeded,
    EncodingError,
    Executor,
    ExecutorConfig,
    OutputContext,
    RunFailed,
    Telemetry,
)
from obsdag.errors import PoolError, RemoteError
from tests.shards import dags
from tests.shards.conftest import SMALL

pytest.importorskip("ray", reason="needs Ray: pip install 'obsdag[ray]'")
from obsdag.ray import RayExecutor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.leaves("processes", "nodes that a test before killed are added again"),
    pytest.mark.leaves(
        "files", "the connection to Ray opens sockets to its processes as it needs them, and keeps them"
    ),
]

PLACE = {"resources": {"shard": 1}, "num_cpus": 1}
PARALLEL = ExecutorConfig(context_worker_num=8, task_worker_num=0)


def executor(dag: Any, config: ExecutorConfig = PARALLEL, shards: int = 2) -> RayExecutor:
    return RayExecutor(dag, config, shards=shards, shard_options=PLACE)


def numbers(end: int) -> Iterator[dict[str, int]]:
    return ({"x": number} for number in range(end))


def shown(outputs: list[OutputContext]) -> list[str]:
    return sorted(repr(sorted(output.to_dict().items())) for output in outputs)


async def test_E15_outputs_counts_and_failures_are_those_of_a_local_run(nodes: Any) -> None:
    local = await Executor(dags.mixed, config=PARALLEL).run(numbers(1500))

    async with executor(dags.mixed) as shards:
        for _ in range(2):
            result = await shards.run(numbers(1500))

            assert result.counts == local.counts
            assert shown(result) == shown(local)
            assert sorted(str(each.exception) for each in result.failures) == sorted(
                str(each.exception) for each in local.failures
            )
            assert {each.task for each in result.failures} == {"sort_out"}
            assert not result.stalled
            assert not result.cleanup_errors


async def test_a_context_that_was_given_is_the_one_that_comes_out(nodes: Any) -> None:
    given = [Context(None, {"x": number}, f"n{number}") for number in (0, 1, 6, 9)]

    result = await executor(dags.mixed).run(given)

    by_id = {each.id: each for each in given}
    for output in result:
        if output.context is not None and output.context.parent is None:
            assert output.context is by_id[output.id]
        else:
            assert output.context is not None
            assert output.context.root is by_id["n6"]
    assert [each.outcome for each in given] == ["output", "output", "split", "failed"]
    assert given[3].error_info.error_node == "sort_out"
    assert given[0]["total"] == 3


async def test_a_stream_of_an_async_input_gives_all_outputs(nodes: Any) -> None:
    async def inputs() -> AsyncIterator[dict[str, int]]:
        for number in range(700):
            if number % 100 == 0:
                await asyncio.sleep(0)
            yield {"x": number}

    local = await Executor(dags.mixed, config=PARALLEL).run(numbers(700))
    async with executor(dags.mixed).stream(inputs()) as outputs:
        found = [output async for output in outputs]

    assert outputs.counts == local.counts
    assert shown(found) == shown(local)


async def test_E9_a_stream_that_is_left_ends_what_runs(nodes: Any) -> None:
    async with executor(dags.slow).stream({"x": 1} for _ in iter(int, 1)) as outputs:
        async for _ in outputs:
            break

    assert outputs.counts["cancelled"] > 0
    assert outputs.counts["entered"] >= sum(outputs.counts.values()) - outputs.counts["entered"]


async def test_E9_a_deadline_ends_a_run(nodes: Any) -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        await executor(dags.stuck, ExecutorConfig(deadline=4.0, shutdown_grace=2.0)).run(numbers(4))

    assert caught.value.result is not None
    assert caught.value.result.counts["cancelled"] == 2, "one for each worker"


async def test_E6_a_failure_ends_a_run_that_says_so(nodes: Any) -> None:
    with pytest.raises(RunFailed, match="bad"):
        await executor(dags.mixed, ExecutorConfig(on_failure="raise")).run(numbers(100))


async def test_data_that_cannot_cross_fails_its_own_context(nodes: Any) -> None:
    result = await executor(dags.odd).run([*numbers(5), {"x": 7, "odd": object()}])

    assert result.counts == {**result.counts, "entered": 6, "output": 4, "failed": 2}
    assert {each.task for each in result.failures} == {"source", "strange"}
    assert all("object" in str(each.exception) for each in result.failures)


async def test_data_that_cannot_be_read_where_it_arrives_fails_its_own_context(nodes: Any) -> None:
    inputs = [{"x": 0}, {"x": 1}, {"x": 2, "guest": dags.Homebody()}, *({"x": number} for number in range(3, 40))]

    async with RayExecutor(dags.homebodies, PARALLEL, shards=2, shard_options=PLACE, allow_pickle=True) as shards:
        for _ in range(2):
            result = await shards.run(dict(each) for each in inputs)

            assert result.counts == {**result.counts, "entered": 40, "output": 38, "failed": 2}
            assert sorted(each["x"] for each in result) == [0, *range(3, 40)]
            assert sorted(str(each.exception) for each in result.failures) == [
                "the input cannot be read on a shard (LookupError: not at home)",
                "what came of it cannot be read here (LookupError: not at home)",
            ]
            assert all(isinstance(each.exception, EncodingError) for each in result.failures)


async def test_what_shards_die_of_is_found_and_failed(nodes: Any) -> None:
    result = await executor(dags.deadly, ExecutorConfig(context_worker_num=4)).run(numbers(40))

    assert result.counts == {**result.counts, "entered": 40, "output": 39, "failed": 1}
    assert isinstance(result.failures[0].exception, PoolError)
    assert result.failures[0].context["x"] == 5


async def _run_and_kill(number: int, kill: Any, after: int) -> tuple[list[OutputContext], dict[str, int]]:
    """A stream of `slow`; `kill` is called with the first pid of a shard, when `after` outputs have come."""
    found: list[OutputContext] = []
    async with executor(dags.slow).stream({"x": x} for x in range(number)) as outputs:
        async for output in outputs:
            found.append(output)
            if len(found) == after:
                kill(output["pid"])
    return found, outputs.counts


def _check(found: list[OutputContext], counts: dict[str, int], number: int) -> None:
    assert sorted(output["x"] for output in found) == list(range(number)), "each root has exactly one outcome"
    assert all(output["parts"] == [0, 1, 2] for output in found)
    assert counts == {**dict.fromkeys(counts, 0), "entered": 4 * number, "output": number, "merged": 3 * number}


@pytest.mark.parametrize("after", [1, 60, 150])
async def test_a_shard_killed_during_joins_and_retries_costs_no_root(nodes: Any, after: int) -> None:
    found, counts = await _run_and_kill(200, lambda pid: os.kill(pid, signal.SIGKILL), after)

    _check(found, counts, 200)
    assert len({output["pid"] for output in found}) >= 2


@pytest.mark.parametrize("after", [1, 60, 150])
async def test_a_node_killed_during_joins_and_retries_costs_no_root(nodes: Any, after: int) -> None:
    def kill_node(pid: int) -> None:
        nodes.remove_node(sorted(nodes.worker_nodes, key=lambda node: node.node_id)[0], allow_graceful=False)

    found, counts = await _run_and_kill(200, kill_node, after)

    _check(found, counts, 200)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_shards_come_and_go_while_a_run_goes_on(nodes: Any) -> None:
    shards = executor(dags.slow, shards=1)
    found: list[OutputContext] = []
    async with shards.stream({"x": number} for number in count()) as outputs:
        wanted, pids, gone = True, [], False
        async for output in outputs:
            found.append(output)
            if output["pid"] not in pids:
                pids.append(output["pid"])
            if len(found) == 20:
                shards.scale(2)
            elif len(pids) == 2 and wanted:
                wanted = False
                shards.scale(1)
            gone = gone or (len(pids) == 2 and not all(map(_alive, pids)))
            if gone:
                break

    assert gone, "the shard that went has ended while the other went on"
    assert len({output["x"] for output in found}) == len(found)


async def test_a_run_that_shrinks_and_grows_loses_no_root(nodes: Any) -> None:
    shards = executor(dags.slow, shards=2)
    found: list[OutputContext] = []
    async with shards:
        async with shards.stream(numbers(200)) as outputs:
            async for output in outputs:
                found.append(output)
                if len(found) in (30, 110):
                    shards.scale(1)
                elif len(found) == 70:
                    shards.scale(2)

        assert shards.shards == 1
        again = await shards.run(numbers(20))

    _check(found, outputs.counts, 200)
    _check(again, again.counts, 20)


def _scraped(target: str) -> dict[str, float]:
    """The values of the counter of ended contexts, by outcome."""
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found: dict[str, float] = Counter()
    for family in families:
        for sample in family.samples:
            if sample.name == "obsdag_contexts_finished_total":
                found[sample.labels["outcome"]] += sample.value
    return found


async def test_the_sum_of_the_shards_counters_is_the_drivers(nodes: Any, tmp_path: Path) -> None:
    targets = tmp_path / "shards.json"
    options: dict[str, Any] = {"telemetry": lambda shard: Telemetry(), "ops": {}, "file_sd": targets}
    async with RayExecutor(dags.mixed, PARALLEL, shards=2, shard_options=PLACE, **options) as shards:
        counts: dict[str, float] = Counter()
        while len(shards.targets) < 2:  # one may have done everything before the other was there
            counts.update((await shards.run(numbers(600))).counts)
        listed = json.loads(targets.read_text())
        sums: dict[str, float] = Counter()
        for group in listed:
            sums.update(_scraped(group["targets"][0]))

        assert {group["labels"]["shard"]: group["targets"][0] for group in listed} == shards.targets
        assert all(target.startswith("127.0.0.1:") for target in shards.targets.values())
        assert {name: number for name, number in sums.items() if number} == {
            name: number for name, number in counts.items() if number and name != "entered"
        }

    assert json.loads(targets.read_text()) == []
    assert not shards.targets


async def test_a_list_that_can_no_longer_be_written_costs_no_root(
    nodes: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "targets"
    folder.mkdir()
    options: dict[str, Any] = {"telemetry": lambda shard: Telemetry(), "ops": {}, "file_sd": folder / "shards.json"}
    async with RayExecutor(dags.mixed, PARALLEL, shards=2, shard_options=PLACE, **options) as shards:
        assert json.loads((folder / "shards.json").read_text()) == []
        shutil.rmtree(folder)
        await shards.run(numbers(10))
        folder.mkdir()
        shards.scale(1)
        result = await shards.run(numbers(10))

    assert sum(result.counts.values()) == 2 * result.counts["entered"]  # which is one of the counts
    assert [record.message.partition(":")[0] for record in caplog.records if record.name == "obsdag.ray"] == [
        f"{folder / 'shards.json'} cannot be written, Prometheus has an old list of shards"
    ]
    assert json.loads((folder / "shards.json").read_text()) == []


async def test_shards_follow_the_machines_of_the_cluster(nodes: Any) -> None:
    place = {"resources": {"shard": 2}, "num_cpus": 1}  # all that a machine has: one shard on each
    shards = RayExecutor(dags.slow, PARALLEL, shards=(1, 3), shard_options=place)
    found: list[OutputContext] = []
    seen: list[int] = []
    third: Any = None
    removed = False
    async with shards.stream({"x": number} for number in count()) as outputs:
        async for output in outputs:
            found.append(output)
            if not seen or shards.shards != seen[-1]:
                seen.append(shards.shards)
            running = sum(each["phase"] == "running" for each in shards.seen()["shards"])
            if third is None and running == 2:
                third = nodes.add_node(num_cpus=2, resources={"shard": 2}, **SMALL)
            elif third is not None and not removed and running == 3:
                removed = True
                nodes.remove_node(third, allow_graceful=False)
            elif removed and len(seen) == 3 and running == 2:
                break

    assert seen == [2, 3, 2]
    numbers = [output["x"] for output in found]
    assert len(set(numbers)) == len(numbers)


# --- odd uses


async def test_no_input_and_two_runs_at_once_and_a_cancelled_one(nodes: Any) -> None:
    async with executor(dags.slow) as shards:
        nothing = await shards.run([])
        first, second = await asyncio.gather(shards.run(numbers(40)), shards.run(numbers(30)))
        third = asyncio.create_task(shards.run({"x": number} for number in count()))
        while shards.stats()["output"] < 80:
            await asyncio.sleep(0.01)
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        again = await shards.run(numbers(20))

    assert (list(nothing), nothing.counts["entered"]) == ([], 0)
    _check(first, first.counts, 40)
    _check(second, second.counts, 30)
    _check(again, again.counts, 20)
    assert shards.stats()["living"] == 0


async def test_names_with_quotes_and_exceptions_of_two_arguments(nodes: Any) -> None:
    name = 'a "quoted"\n\u2028 name\'s'
    result = await executor(dags.quoted, shards=1).run([Context(None, {"x": 1}, name), Context(None, {"x": 2}, "b")])

    assert [output.id for output in result] == [name]
    (failure,) = result.failures
    assert failure.task == 'it\'s a "task"'
    assert isinstance(failure.exception, RemoteError)
    assert "one and two" in str(failure.exception)


async def test_texts_that_have_no_form_as_utf8_cost_no_other_root(nodes: Any) -> None:
    roots = [*numbers(4), Context(None, {"x": 0}, "r\udcff")]

    result = await executor(dags.unwritable, shards=1).run(roots)

    assert (result.counts["output"], result.counts["failed"]) == (3, 2)
    by_kind = {type(each.exception): str(each.exception) for each in result.failures}
    assert by_kind[FileNotFoundError] == "no file b\udcff"
    assert "'r\\udcff' cannot cross to a shard" in by_kind[EncodingError]


async def test_an_input_that_raises_when_it_is_closed_leaves_no_run_and_no_shard(nodes: Any) -> None:
    async def inputs() -> AsyncIterator[dict[str, int]]:
        try:
            for number in count(1):
                yield {"x": number}
        finally:
            raise ValueError("of the input")

    async with executor(dags.mixed, shards=1) as shards:
        with pytest.raises(ValueError, match="of the input"):
            async with shards.stream(inputs()) as outputs:
                await anext(outputs)

        assert shards.seen()["runs"] == 0
        assert shards.stats()["living"] == 0
        assert [member.name for member in shards._fleet._idle] == ["shard-1"], "it is there for the next run"


async def test_a_process_that_is_connected_takes_that_cluster_or_says_why_not(nodes: Any) -> None:
    result = await RayExecutor(dags.mixed, shards=1, shard_options=PLACE, address="auto").run({"x": 1})

    assert result.counts["output"] == 1
    with pytest.raises(
        ConfigError, match=r"connected to the Ray cluster at \S+ already, so it cannot use 'local': leave"
    ):
        await RayExecutor(dags.mixed, address="local").run({"x": 1})
