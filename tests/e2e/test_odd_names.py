"""Dashboards and rules on what is unusual: names with quotes, two DAGs in one engine, engines without task labels."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pytest
from prometheus_client import CollectorRegistry

from obsdag import DAG, Context, Executor, ExecutorConfig, Telemetry
from obsdag.dashboards.rules import ALERTS, RECORDINGS
from obsdag.ops import start_ops_server
from tests.dashboards.queries import ALL, Target, substituted, targets
from tests.e2e.servers import Prometheus, faster, missing, prometheus, request, until

ABSENT = missing("prometheus", "promtool")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(ABSENT), reason=ABSENT),
    pytest.mark.leaves("threads", "the module's engines work while tests begin and end"),
    pytest.mark.leaves("files", "the same: connections to their server"),
]

ODD = "the \"best\" of O'Neill\\'s {{engines}} $1, 100% (.*)"
PLAIN = "engine of few labels"
WINDOW = "4s"


class Odd(NamedTuple):
    """A Prometheus that scrapes, and where from."""

    prometheus: Prometheus
    url: str


def _dag(name: str) -> DAG:
    dag = DAG(name)

    async def step(ctx: Context) -> Context:
        await asyncio.sleep(0.05)
        if ctx["number"] == 3:
            raise ValueError("three")
        return ctx

    dag.task(step, name='say "hi"')
    dag.task(step, name="after\\all", after='say "hi"')
    return dag


async def _work(executors: list[Executor], stop: threading.Event) -> None:
    while not stop.is_set():
        for executor in executors:
            await executor.run({"number": number} for number in range(10))
        await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Odd]:
    registry, stop = CollectorRegistry(), threading.Event()
    full = Telemetry(ODD, registry, logs=False)
    low = Telemetry(PLAIN, registry, logs=False, cardinality="low")
    told = [(_dag('first "one"'), full), (_dag("second"), full), (_dag("second"), low)]
    executors = [Executor(dag, config=ExecutorConfig(context_worker_num=2, telemetry=each)) for dag, each in told]
    worker = threading.Thread(target=lambda: asyncio.run(_work(executors, stop)), daemon=True)
    with start_ops_server(*executors, registry=registry, port=0) as ops:
        worker.start()
        address = ops.url.removeprefix("http://")
        with prometheus(tmp_path_factory.mktemp("odd"), address) as server:
            counted = "sum by (engine, dag) (increase(obsdag_contexts_finished_total[2s])) > 0"
            until(lambda: len(server.now(counted)) == 3, "three DAGs at work")
            yield Odd(server, ops.url)
        stop.set()
        worker.join()


def _chosen(name: str) -> str:
    """A value as Grafana puts it into a query where several may be chosen: a pattern, in a PromQL string."""
    return json.dumps(re.sub(r"[\\^$.*+?()\[\]{}|]", r"\\\g<0>", name), ensure_ascii=False)[1:-1]


def test_the_scrape_is_clean(odd: Odd) -> None:
    _, text = request(f"{odd.url}/metrics", headers={"Accept": "text/plain"})

    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)

    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


WITHOUT_DATA = {
    "Capacity used",
    "Made anew",
    "Alerts",
    "Wait for a permit, 99th percentile",
    "Waiting for a permit",
    "Deferrals",
}
WITHOUT_DATA |= {"Items of loops and maps", "Joins that wait", "Wait of joins", "Age of the oldest context"}
WITHOUT_DATA |= {"Processor", "Memory", "Time of submissions", "Phase", "Rows per commit"}
"""Panels about what these DAGs have not, or what is not in their registry; and one that is empty between two runs."""


@pytest.mark.parametrize("target", targets(), ids=lambda each: each.label)
def test_every_query_is_answered_for_one_engine_one_dag_and_all(target: Target, odd: Odd) -> None:
    for engine, dag in ((ODD, 'first "one"'), (PLAIN, "second"), (None, None)):
        chosen = dict(ALL)
        if engine is not None and dag is not None:
            chosen |= {"engine": _chosen(engine), "dag": _chosen(dag)}
        expr = substituted(target.expr, WINDOW, chosen)
        odd.prometheus.now(expr)
        if target.panel["title"] not in WITHOUT_DATA:
            until(partial(odd.prometheus.lately, expr), expr)


def test_two_dags_of_an_engine_are_told_apart(odd: Odd) -> None:
    entered = f'obsdag_contexts_entered_total{{engine=~"{_chosen(ODD)}"}}'

    found = odd.prometheus.now(f"sum by (dag) (increase({entered}[4s])) > 0")

    assert {each["metric"]["dag"] for each in found} == {'first "one"', "second"}


def test_without_task_labels_failures_are_still_seen(odd: Odd) -> None:
    (share,) = [each for each in targets() if each.panel["title"] == "Share of attempts that failed"]
    chosen = {**ALL, "engine": _chosen(PLAIN)}

    (series,) = odd.prometheus.now(substituted(share.expr, WINDOW, chosen))

    assert series["metric"] == {"engine": PLAIN}
    assert 0.02 < float(series["value"][1]) < 0.2


def test_rules_work_for_all_of_them(odd: Odd) -> None:
    until(
        lambda: {group["evaluationTime"] > 0 for group in odd.prometheus.api("rules")["groups"]} == {True},
        "an evaluation of each group",
    )
    rules = [rule for group in odd.prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert {(rule["health"], rule.get("lastError", "")) for rule in rules} == {("ok", "")}
    for recording in RECORDINGS:
        if "limit" not in recording.record and "join" not in recording.record:
            found = until(partial(odd.prometheus.now, recording.record), recording.record)
            assert {each["metric"]["engine"] for each in found} == {ODD, PLAIN}
    for alert in ALERTS:
        odd.prometheus.now(faster(alert.expr))
