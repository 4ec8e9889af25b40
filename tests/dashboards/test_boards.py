"""The committed dashboards: what is generated, what every panel must have, and what their queries ask for."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from obsdag.dashboards import folder
from obsdag.dashboards.boards import BOARDS
from obsdag.dashboards.generate import generated
from obsdag.dashboards.panels import JAEGER_UID, PROMETHEUS_UID
from obsdag.telemetry.catalogue import METRICS, metric
from tests.dashboards.queries import BOARDS as NAMES
from tests.dashboards.queries import FOREIGN, NAME, Target, board, metrics_in, panels, substituted, targets

with warnings.catch_warnings():  # as in obsdag.dashboards.grafana
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.models import dashboard

FOLDER = folder()
VARIABLES = ("datasource", "job", "instance", "engine", "dag")
UNITS = {"short", "none", "s", "ops", "percentunit", "bytes", "dateTimeFromNow"}
"""Grafana's ids of units that the dashboards use; anything else is a mistake until it is looked up and added here."""

EXCUSED: dict[str, str] = {}
"""Metrics that no dashboard shows, and why."""


PANELS = [pytest.param(name, each, id=f"{name}-{each['title']}") for name in NAMES for each in panels(name)]
TARGETS = targets()


def test_what_is_committed_is_what_is_generated() -> None:
    different = [name for name, text in generated(FOLDER).items() if (FOLDER / name).read_text() != text]

    assert not different, "run `python -m obsdag.dashboards`"
    assert {path.stem for path in (FOLDER / "grafana").glob("*.json")} == set(NAMES) == {each.name for each in BOARDS}


@pytest.mark.parametrize("name", NAMES)
def test_each_dashboard_can_be_provisioned_and_found(name: str) -> None:
    found = board(name)

    assert (found["uid"], found["title"], found["tags"]) == (f"obsdag-{name}", f"obsdag: {name}", ["obsdag"])
    assert found.get("id") is None, "an id belongs to one Grafana"
    assert found["annotations"] == {"list": []}
    ids = [each["id"] for each in found["panels"]]
    assert len(ids) == len(set(ids))
    assert [each["name"] for each in found["templating"]["list"]] == [
        *VARIABLES,
        *(["task"] if name == "tasks" else []),
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Prefer using dashboardv2")
def test_nothing_is_in_them_that_grafanas_own_types_do_not_know(name: str) -> None:
    plugins.register_default_plugins()  # panels and queries of each kind

    read = dashboard.Dashboard.from_json(board(name))

    assert json.loads(json.dumps(read, cls=JSONEncoder)) == board(name)


@pytest.mark.parametrize("name", NAMES)
def test_variables_come_from_what_is_chosen_before_them(name: str) -> None:
    source, *others = board(name)["templating"]["list"]

    assert (source["type"], source["query"], source["current"]["value"]) == ("datasource", "prometheus", PROMETHEUS_UID)
    known = {"datasource"}
    for each in others:
        assert (each["type"], each["multi"], each["includeAll"]) == ("query", True, True)
        assert each["allValue"] == ".*", "'All' must match series that lack the label, too"
        assert each["datasource"]["uid"] == "${datasource}"
        query = each["query"]["query"]
        assert set(re.findall(r"\$(\w+)", query)) <= known
        known.add(each["name"])
        found = re.fullmatch(r"label_values\((\w+)(\{.*\})?, (\w+)\)", query)
        assert found
        assert metric(found[1])
        assert found[3] == each["name"]


@pytest.mark.parametrize(("name", "each"), PANELS)
def test_each_panel_says_what_it_shows_and_what_a_bad_value_means(name: str, each: dict[str, Any]) -> None:
    what, _, bad = each["description"].partition("\n**Bad:** ")

    assert each["title"]
    assert len(what.strip()) > 15
    assert len(bad.strip()) > 15, "say what a bad value means and what to do"
    assert each["fieldConfig"]["defaults"]["unit"] in UNITS
    assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert each["targets"]
    assert 0 <= each["gridPos"]["x"] <= each["gridPos"]["x"] + each["gridPos"]["w"] <= 24


@pytest.mark.parametrize("name", NAMES)
def test_panels_do_not_lie_on_one_another(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for each in board(name)["panels"]:
        place = each["gridPos"]
        for x in range(place.get("x", 0), place.get("x", 0) + place["w"]):
            for y in range(place.get("y", 0), place.get("y", 0) + place["h"]):
                assert taken.setdefault((x, y), each["title"]) == each["title"]


@pytest.mark.parametrize(
    "target", TARGETS, ids=lambda each: f"{each.board}-{each.panel['title']}-{each.query['refId']}"
)
def test_each_query_parses_and_reads_known_metrics_with_known_labels(target: Target) -> None:
    promql_parser.parse(substituted(target.expr))

    for name, labels in metrics_in(substituted(target.expr)):
        if name in FOREIGN:
            assert labels <= FOREIGN[name]
            continue
        spec = metric(NAME.sub("", name) if name not in {each.name for each in METRICS} else name)
        assert (NAME.search(name) is not None and name != spec.name) == (spec.kind == "histogram"), name
        assert labels <= {"job", "instance", "engine", "dag", "le", *spec.label_names()}, name
        assert {"job", "instance", "engine", "dag"} <= labels, f"{name} is not chosen by the variables"


@pytest.mark.parametrize(
    "target", TARGETS, ids=lambda each: f"{each.board}-{each.panel['title']}-{each.query['refId']}"
)
def test_each_range_is_the_rate_interval_and_each_counter_a_rate(target: Target) -> None:
    assert set(re.findall(r"\[([^\]]*)\]", target.expr)) <= {"$__rate_interval"}
    for name, _ in metrics_in(substituted(target.expr)):
        if name.endswith(("_total", "_bucket", "_sum", "_count")):
            assert re.search(rf"(rate|increase)\({name}{{", target.expr), f"{name} is read as it stands"
    assert target.query["datasource"]["uid"] == "${datasource}"


def test_every_metric_is_on_a_dashboard() -> None:
    shown = {NAME.sub("", name) for target in TARGETS for name, _ in metrics_in(substituted(target.expr))}
    shown |= {name for target in TARGETS for name, _ in metrics_in(substituted(target.expr))}
    catalogued = {spec.name for spec in METRICS}

    assert catalogued - shown == set(EXCUSED)
    assert all(EXCUSED.values())


def test_each_metric_is_on_the_dashboard_that_it_was_declared_for() -> None:
    missing = [
        spec.name
        for spec in METRICS
        if spec.name not in EXCUSED
        and not any(
            target.board == spec.board
            and spec.name
            in {part for name, _ in metrics_in(substituted(target.expr)) for part in (name, NAME.sub("", name))}
            for target in TARGETS
        )
    ]

    assert not missing


def test_exemplars_are_asked_for_wherever_the_engine_has_some() -> None:
    for spec in METRICS:
        asked = [
            target.query.get("exemplar")
            for target in TARGETS
            if f"{spec.name}_bucket" in target.expr and target.panel["type"] != "stat"
        ]
        assert not asked or set(asked) == {spec.exemplars}, spec.name


def test_names_of_data_sources_are_the_provisioned_ones() -> None:
    text = (FOLDER / "grafana" / "provisioning" / "datasources" / "obsdag.yml").read_text()
    sources = {each["uid"]: each for each in yaml.safe_load(text)["datasources"]}

    assert {uid: each["type"] for uid, each in sources.items()} == {PROMETHEUS_UID: "prometheus", JAEGER_UID: "jaeger"}
    assert sources[PROMETHEUS_UID]["isDefault"]
    (exemplars,) = sources[PROMETHEUS_UID]["jsonData"]["exemplarTraceIdDestinations"]
    assert (exemplars["name"], exemplars["datasourceUid"]) == ("trace_id", JAEGER_UID)
    to_metrics = sources[JAEGER_UID]["jsonData"]["tracesToMetrics"]
    assert to_metrics["datasourceUid"] == PROMETHEUS_UID
    for each in to_metrics["queries"]:
        query = each["query"].replace("$$__tags", 'engine="e", dag="d"').replace("$$__rate_interval", "1m")
        assert [NAME.sub("", name) for name, _ in metrics_in(query)] == ["obsdag_root_seconds"]


def test_dashboards_are_provisioned_from_where_compose_puts_them() -> None:
    text = (FOLDER / "grafana" / "provisioning" / "dashboards" / "obsdag.yml").read_text()
    (provider,) = yaml.safe_load(text)["providers"]
    compose = yaml.safe_load((FOLDER.parent / "docker-compose.yml").read_text())

    mounts = [each.split(":")[:2] for each in compose["services"]["grafana"]["volumes"]]
    assert ["./dashboards/grafana", provider["options"]["path"]] in mounts


def test_links_to_traces_are_searches_by_labels_that_the_series_have() -> None:
    links = [
        (each, link["url"])
        for name in NAMES
        for each in panels(name)
        for link in each["fieldConfig"]["defaults"].get("links", ())
    ]

    assert links
    for panel, url in links:
        panes = json.loads(parse_qs(urlsplit(url.replace("${", "%24%7B")).query)["panes"][0])
        (pane,) = panes.values()
        (search,) = pane["queries"]
        assert (pane["datasource"], search["queryType"]) == (JAEGER_UID, "search")
        used = set(re.findall(r"\$\{__field\.labels\.(\w+)\}", unquote(url)))
        for query in panel["targets"]:
            assert used <= set(re.findall(r"\{\{(\w+)\}\}", query["legendFormat"])), panel["title"]


def test_generating_anew_keeps_the_text_around_the_runbooks_table(tmp_path: Path) -> None:
    runbook = (FOLDER / "RUNBOOK.md").read_text()
    (tmp_path / "RUNBOOK.md").write_text(re.sub(r"^\| .*\|\n", "", runbook, flags=re.MULTILINE))

    assert generated(tmp_path)["RUNBOOK.md"] == runbook
