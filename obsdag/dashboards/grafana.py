"""Boards as Grafana's JSON, by the official foundation SDK, which only development needs (`obsdag[dev]`)."""

from __future__ import annotations

import json
import warnings
from typing import Any, Final
from urllib.parse import quote

from obsdag.dashboards.panels import JAEGER_UID, PROMETHEUS_UID, Board, Panel, Query

with warnings.catch_warnings():  # it recommends its own next version, whose files only the newest Grafana reads
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.builders import (
        common,
        dashboard,
        heatmap,
        prometheus,
        stat,
        statetimeline,
        timeseries,
    )
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import common as common_models
    from grafana_foundation_sdk.models import dashboard as models
    from grafana_foundation_sdk.models import heatmap as heatmap_models
    from grafana_foundation_sdk.models import prometheus as prometheus_models

__all__ = ["to_json"]

_SOURCE: Final = common_models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_LABEL_VALUES: Final = 1  # as Grafana's own editor writes such queries
_HEIGHT: Final = {"stat": 4, "timeline": 6}
_TARGET: Final = 'job=~"$job", instance=~"$instance"'
_ENGINE: Final = f'{_TARGET}, engine=~"$engine"'


def to_json(board: Board) -> str:
    """The dashboard as it is committed and provisioned."""
    builder = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["obsdag"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("obsdag")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["obsdag"])
            .keep_time(True)
            .include_vars(True)
        )
    )
    for variable in _variables(board):
        builder = builder.with_variable(variable)
    number = 0
    for place, row in enumerate(board.rows):
        builder = builder.with_row(dashboard.Row(row.title).id(100 + place))
        for panel in row.panels:
            number += 1
            builder = builder.with_panel(_panel(panel).id(number))
    found = json.loads(json.dumps(builder.build(), cls=JSONEncoder))
    found["annotations"] = {"list": []}  # the SDK gives an object without the list that Grafana wants
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


def _variables(board: Board) -> list[Any]:
    source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    source = source.current(models.VariableOption(text="Prometheus", value=PROMETHEUS_UID, selected=True))
    found = [
        source,
        _variable("job", "label_values(obsdag_build_info, job)"),
        _variable("instance", 'label_values(obsdag_build_info{job=~"$job"}, instance)'),
        _variable("engine", f"label_values(obsdag_build_info{{{_TARGET}}}, engine)"),
        _variable("dag", f"label_values(obsdag_contexts{{{_ENGINE}}}, dag)"),
    ]
    if board.has_tasks:
        query = f'label_values(obsdag_task_executions_total{{{_ENGINE}, dag=~"$dag"}}, task)'
        found.append(_variable("task", query))
    return found


def _variable(name: str, query: str) -> Any:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize() if name != "dag" else "DAG")
        .datasource(_SOURCE)
        .query({"qryType": _LABEL_VALUES, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")  # not ".+": with cardinality="low" series have no task
        .current(models.VariableOption(text="All", value="$__all", selected=True))
    )


def _panel(panel: Panel) -> Any:
    makers = {"stat": _stat, "heatmap": _heatmap, "timeline": _timeline}
    builder = makers.get(panel.kind, _series)(panel)
    builder = (
        builder.title(panel.title)
        .description(panel.description)
        .datasource(_SOURCE)
        .unit(panel.unit)
        .height(_HEIGHT.get(panel.kind, 8))
        .span(panel.width)
        .thresholds(_thresholds(panel.warn_at))
    )
    if panel.maximum is not None:
        builder = builder.max(panel.maximum)
    if panel.traces:
        builder = builder.data_links([_to_traces(panel)])
    for place, query in enumerate(panel.queries):
        builder = builder.with_target(_target(query, "ABCDEFGH"[place], panel))
    return builder


def _target(query: Query, name: str, panel: Panel) -> Any:
    target = prometheus.Dataquery().ref_id(name).datasource(_SOURCE).expr(query.expr).legend_format(query.legend)
    if panel.kind == "heatmap":
        target = target.format(prometheus_models.PromQueryFormat.HEATMAP)
    if panel.kind == "stat":
        return target.instant()
    return target.range().exemplar(query.exemplar)


def _series(panel: Panel) -> Any:
    legend = common.VizLegendOptions().show_legend(True).placement(common_models.LegendPlacement.BOTTOM)
    legend = legend.display_mode(common_models.LegendDisplayMode.LIST)
    builder = timeseries.Panel().axis_soft_min(0).legend(legend).fill_opacity(10)
    builder = builder.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    if panel.kind == "stack":
        mode = common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A")
        builder = builder.stacking(mode).fill_opacity(40)
    if panel.warn_at is not None:
        line = common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.LINE)
        builder = builder.thresholds_style(line)
    if panel.kind == "bars":
        builder = builder.draw_style(common_models.GraphDrawStyle.BARS).fill_opacity(60)
    return builder


def _stat(panel: Panel) -> Any:
    reduced = common.ReduceDataOptions().calcs(["lastNotNull"])
    return stat.Panel().reduce_options(reduced).color_mode(common_models.BigValueColorMode.VALUE)


def _heatmap(panel: Panel) -> Any:
    color = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    return heatmap.Panel().calculate(False).color(color).y_axis(heatmap.YAxisConfig().unit(panel.unit))


def _timeline(panel: Panel) -> Any:
    return statetimeline.Panel().merge_values(True).show_value(common_models.VisibilityMode.NEVER)


def _thresholds(warn_at: float | None) -> Any:
    steps = [models.Threshold(value=None, color="green")]
    if warn_at is not None:
        steps.append(models.Threshold(value=warn_at, color="red"))
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _to_traces(panel: Panel) -> Any:
    """To a search in Jaeger, for executions of the series' task if it has one, else for whole contexts.

    Jaeger asks for a service: that is the engine, unless the process names its service otherwise.
    """
    labels = {name: "${__field.labels." + name + "}" for name in ("engine", "dag", "task")}
    by_task = any("{{task}}" in query.legend for query in panel.queries)
    operation = f"execute {labels['task']}" if by_task else f"context {labels['dag']}"
    search = {"refId": "A", "queryType": "search", "service": labels["engine"], "operation": operation}
    pane = {"datasource": JAEGER_UID, "queries": [search], "range": {"from": "${__from}", "to": "${__to}"}}
    panes = quote(json.dumps({"obsdag": pane}, separators=(",", ":")), safe="${}:,._")
    return dashboard.DashboardLink("Traces").url(f"/explore?schemaVersion=1&panes={panes}").target_blank(True)
