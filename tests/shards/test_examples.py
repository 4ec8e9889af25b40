"""The demo and the web service run unchanged on a cluster, and give the same counts as on one machine."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import command
from tests.ops.load import example
from tests.ops.web import ask
from tests.otlp_receiver import OtlpReceiver

pytest.importorskip("ray", reason="needs Ray: pip install 'obsdag[ray]'")
pytest.importorskip("fastapi", reason="no web framework: pip install '.[dev]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.leaves("processes", "the cluster's nodes stay for the tests of this folder"),
    pytest.mark.leaves(
        "files", "the connection to Ray opens sockets to its processes as it needs them, and keeps them"
    ),
]

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def tree_of(folder: Path) -> Path:
    """Files of each kind: good ones, twins, some that are no Python, and one that is no text."""
    for number in range(40):
        place = folder / f"part{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"m{number}.py").write_text(f"import os\n\n\ndef f{number % 30}():\n    return {number % 30}\n")
    (folder / "two.py").write_text("print 'two'\n")
    (folder / "latin.py").write_bytes("x = 'é'\n".encode("latin-1"))
    return folder


def test_the_demo_on_shards_tells_the_same_of_a_tree(nodes: Any, tmp_path: Path) -> None:
    tree = tree_of(tmp_path / "tree")
    found = []
    for place in ([], ["--ray", nodes.address, "--shards", "1"]):
        done = command("demo", "--processes", "1", "--path", tree, "--out", tmp_path / "out", *place, folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        found.append(json.loads((tmp_path / "out" / "summary.json").read_text()))

    local, far = found
    same = ("outcomes", "expected_failures", "unexpected_failures", "census", "retries")
    assert {name: far[name] for name in same} == {name: local[name] for name in same}
    assert local["outcomes"] == {"output": 40, "failed": 2, "split": 1}
    assert local["retries"], "the files are such that some have been retried"
    executions = [{name: task["executions"] for name, task in each["tasks"].items()} for each in found]
    assert executions[0] == executions[1]


def ask_for_quotes(url: str) -> Counter[tuple[int, str]]:
    """Requests of each kind; their answers without the time that they took."""

    def quote(body: Any, **headers: str) -> tuple[int, str]:
        seen = ask(f"{url}/quotes", "POST", json.dumps(body).encode(), Content_Type="application/json", **headers)
        told = json.loads(seen.body)
        told.pop("took_ms", None)
        return seen.status, json.dumps(told)

    found = Counter(quote({"items": ["tea"] * (1 + number % 25)}) for number in range(60))
    found.update(quote({"items": ["snow", "tea"]}) for _ in range(3))
    found.update(quote({"items": []}) for _ in range(2))
    found[quote({"items": ["milk"]}, X_Request_Timeout="0.000001")] += 1
    found[quote({"items": ["milk"]}, X_Request_Timeout="30", traceparent=f"00-{TRACE}-{CALLER}-01")] += 1
    return found


def test_the_web_service_on_shards_answers_and_counts_alike(nodes: Any, tmp_path: Path) -> None:
    answers, counts, traced = [], [], []
    for name, env in (("here", {}), ("there", {"ORDERS_RAY": nodes.address, "ORDERS_SHARDS": "2"})):
        with OtlpReceiver() as collector, example(tmp_path / name, ORDERS_OTLP=collector.endpoint, **env) as service:
            answers.append(ask_for_quotes(service.url))
            state = json.loads(ask(f"{service.url}/ops/api/state").body)["executors"][0]["state"]
            service.stop()
            (told,) = service.counts()
            spans = collector.wait(lambda found: any(each.trace_id == TRACE for each in found))
        counts.append({each: told["stats"][each] for each in ("entered", "output", "failed", "cancelled", "dropped")})
        traced.append(sorted(each.name for each in spans if each.trace_id == TRACE))
        assert told["phase"] == "stopped"
        assert told["in_flight"] == told["pending"] == 0
        assert state["counts"]["output"] == 61

    assert answers[0] == answers[1]
    assert counts[0] == counts[1] == {"entered": 65, "output": 61, "failed": 4, "cancelled": 0, "dropped": 0}
    assert traced[0] == traced[1]
    assert "context quotes" in traced[0]
    assert os.environ.get("ORDERS_RAY") is None
