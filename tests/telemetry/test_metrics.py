"""The collector: exactly the catalogue, from the start, as servers read it, whatever becomes of engines."""

from __future__ import annotations

import gc
import importlib
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.openmetrics import exposition as openmetrics

from obsdag.core.observer import Facts
from obsdag.errors import ConfigError
from obsdag.telemetry import collector as collector_module
from obsdag.telemetry.catalogue import ALL_DAGS, METRICS, MetricSpec, metric
from obsdag.telemetry.histogram import DEFAULT_BUCKETS
from obsdag.telemetry.metrics import SAMPLE_EVERY, Metrics
from obsdag.telemetry.selfstats import Kept, SelfStats
from obsdag.testing.telemetry import capture_logs
from tests.telemetry.corerun import EPOCH, CoreRun, chain
from tests.telemetry.scrapes import Reports, scrape, text


def observed(reports: Reports, *tasks: str, **settings: Any) -> CoreRun:
    run = CoreRun(*tasks, **settings)
    return run.observe(reports.metrics.observer(run.state))


@pytest.fixture(autouse=True)
def _no_observer_is_detached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    failures: list[object] = []
    monkeypatch.setattr(Facts, "_detach", lambda *arguments: failures.append(arguments))
    yield
    assert not failures


def kept(what: str = "task", label: str = "load", seconds: float = 0.02, trace: int = 7, dag: str = "etl") -> Kept:
    return Kept(what, dag, label, seconds, trace, trace, 1_700_000_001.5)


# --- the catalogue and nothing else


@pytest.fixture(scope="module")
def busy() -> Reports:
    reports = Reports()
    run = observed(reports)
    run.drive("a")
    run.fail(run.begin(run.enter("b")), ValueError("no"))
    for fact, arguments in (("submit_rejected", ("queue_full", 1.0)), ("loop_lagged", (0.02,))):
        run.tell(fact, *arguments)
    reports.metrics._engine.book("etl")  # the same again
    return reports


@pytest.mark.parametrize("form", ["openmetrics", "text"])
@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_a_scrape_has_the_names_types_and_labels_of_the_catalogue(busy: Reports, spec: MetricSpec, form: str) -> None:
    family = busy.scrape(form).families[spec.family if form == "openmetrics" or spec.kind != "info" else spec.name]

    assert family.type == ("gauge" if form == "text" and spec.kind == "info" else spec.kind)
    assert family.documentation == spec.help
    assert form == "text" or family.unit == spec.unit
    for sample in family.samples:
        extra = {"le"} if sample.name.endswith("_bucket") else set()
        assert set(sample.labels) == {"engine", "dag", *spec.label_names(), *extra}
        assert sample.labels["engine"] == "orders"


def test_a_scrape_has_no_metric_beyond_the_catalogue(busy: Reports) -> None:
    assert set(busy.scrape().families) == {spec.family for spec in METRICS}


def test_there_are_no_created_samples(busy: Reports) -> None:
    assert "_created" not in text(busy.registry) + openmetrics.generate_latest(busy.registry).decode()


def test_describe_names_every_family_without_samples(busy: Reports) -> None:
    described = list(busy.metrics.collector.describe())

    assert [family.name for family in described] == [spec.family for spec in METRICS]
    assert not any(family.samples for family in described)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus")
def test_promtool_finds_nothing_to_complain_about(busy: Reports) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text(busy.registry),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("cardinality", ["full", "low"])
def test_closed_label_sets_are_zero_before_the_first_run(cardinality: Any) -> None:
    reports = Reports(cardinality=cardinality)
    reports.metrics.declare(chain("load", "store", dag="etl").build())

    seen = reports.scrape()

    for spec in METRICS:
        if spec.optional or spec.scope == "engine" or spec.name in ("obsdag_build_info", "obsdag_limit_waiting"):
            continue
        name = spec.name + "_count" if spec.kind == "histogram" else spec.name
        names = spec.label_names(low=cardinality == "low")
        for labels in spec.closed_label_sets(low=cardinality == "low"):
            assert seen.value(name, dag="etl", **dict(zip(names, labels, strict=True))) == 0
    if cardinality == "full":
        for outcome in ("success", "error", "timeout", "cancelled", "interrupted"):
            assert seen.value("obsdag_task_executions_total", task="store", outcome=outcome) == 0
        assert seen.value("obsdag_task_failures_total", task="load", error_type="_other") == 0
        assert seen.value("obsdag_task_running", task="load") == 0


def test_an_engine_shows_its_own_health_before_it_has_any_dag() -> None:
    seen = Reports().scrape()

    assert seen.value("obsdag_collect_errors_total", engine="orders", dag=ALL_DAGS) == 0
    assert seen.value("obsdag_telemetry_dropped_total", signal="traces", reason="queue_full") == 0
    assert seen.value("obsdag_traces_total", decision="error") == 0
    assert seen.value("obsdag_build_info", dag=ALL_DAGS) == 1


def test_histograms_have_the_twelve_buckets_unless_others_are_asked_for() -> None:
    default, own = Reports(), Reports(buckets=[0.5, 2])
    for reports in (default, own):
        observed(reports).drive(took_s=1.0)

    bounds = [s.labels["le"] for s in default.scrape().samples if s.name == "obsdag_event_loop_lag_seconds_bucket"]
    assert [float(le) for le in bounds] == [*DEFAULT_BUCKETS, float("inf")]
    assert len(DEFAULT_BUCKETS) == 12
    seen = own.scrape()
    counted = {le: seen.value("obsdag_task_seconds_bucket", task="load", le=le) for le in ("0.5", "2.0", "+Inf")}
    assert counted == {"0.5": 0, "2.0": 1, "+Inf": 1}


@pytest.mark.parametrize("on_bound", DEFAULT_BUCKETS)
def test_a_value_on_a_bound_is_in_its_bucket(on_bound: float) -> None:
    reports = Reports()
    run = observed(reports)
    run.tell("loop_lagged", on_bound)

    assert reports.scrape().value("obsdag_event_loop_lag_seconds_bucket", le=repr(on_bound)) == 1


@pytest.mark.parametrize("buckets", [[], [1, 1], [2, 1], [0], [-1.0], [float("inf")], [float("nan")], ["1"], [True]])
def test_buckets_that_make_no_histogram_are_refused(buckets: Any) -> None:
    with pytest.raises(ConfigError, match="buckets must"):
        Metrics(registry=CollectorRegistry(), buckets=buckets)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"engine": ""}, "engine must be a name"),
        ({"cardinality": "medium"}, "cardinality must be"),
        ({"max_task_labels": 0}, "max_task_labels must be"),
        ({"max_error_types": True}, "max_error_types must be"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Metrics(**{"registry": CollectorRegistry(), **options})


# --- registries and engines


def test_registering_twice_is_harmless() -> None:
    one = Reports()
    two = Reports(registry=one.registry)
    observed(one).drive()
    observed(two).drive()

    assert one.metrics.collector is two.metrics.collector
    assert scrape(one.registry).value("obsdag_contexts_entered_total", kind="input") == 2


def test_a_registry_that_lost_its_collector_gets_it_back() -> None:
    one = Reports()
    one.registry.unregister(one.metrics.collector)
    assert not one.scrape().families

    Reports(registry=one.registry)

    assert one.scrape().families


def test_a_reload_of_the_module_finds_the_collector_again() -> None:
    one = Reports()
    observed(one).drive()
    before = collector_module.__dict__.copy()
    try:
        again = importlib.reload(collector_module).collector_of(one.registry)
    finally:
        collector_module.__dict__.update(before)

    assert again is one.metrics.collector
    assert one.scrape().value("obsdag_contexts_entered_total", kind="input") == 1


def test_names_that_somebody_else_registered_are_a_clear_error() -> None:
    registry = CollectorRegistry()
    Counter("obsdag_runs", "Not ours.", registry=registry)

    with pytest.raises(ConfigError, match="give Telemetry another one"):
        Metrics(registry=registry)


def test_the_default_registry_is_prometheus_clients_own(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", registry)

    assert Metrics().registry is registry


def test_two_registries_do_not_see_each_other() -> None:
    one, two = Reports(), Reports()
    observed(one).drive()

    assert one.scrape().values("obsdag_runs_active", dag="etl")
    assert not two.scrape().values("obsdag_runs_active", dag="etl")


def test_two_engines_and_two_dags_are_told_apart_in_one_registry() -> None:
    one = Reports("orders")
    two = Reports("mails", registry=one.registry)
    observed(one, dag="a").drive()
    observed(one, dag="b").drive()
    observed(two, dag="a").drive()

    seen = one.scrape()

    for engine, dag in (("orders", "a"), ("orders", "b"), ("mails", "a")):
        assert seen.value("obsdag_contexts_finished_total", engine=engine, dag=dag, outcome="output") == 1
    assert not seen.values("obsdag_runs_active", engine="mails", dag="b")


def test_an_engine_cannot_have_two_kinds_of_buckets() -> None:
    one = Reports()
    Reports(registry=one.registry, buckets=[1.0])  # nothing has been counted yet
    observed(Reports(registry=one.registry, buckets=[1.0]))
    with pytest.raises(ConfigError, match="reports to this registry already"):
        Reports(registry=one.registry, buckets=[2.0])


def test_two_scrapers_read_the_same_on_a_quiet_engine(busy: Reports) -> None:
    first, second = busy.scrape().quiet(), busy.scrape().quiet()

    assert first == second
    assert busy.scrape("text").value("obsdag_contexts_entered_total", kind="input", dag="etl") == 2


# --- labels


def test_task_labels_are_capped_and_that_is_said_once() -> None:
    reports = Reports(max_task_labels=2)
    run = observed(reports, "a", "b", "c", "d")
    run.drive()
    observed(reports, "a", "x").drive()

    seen = reports.scrape()

    assert seen.by("task", "obsdag_task_executions_total") == {"a": 2, "b": 1, "_other": 3}
    assert seen.value("obsdag_task_seconds_count", task="_other") == 3
    assert reports.said == [
        ("telemetry.labels_capped", {"engine": "orders", "dag": "etl", "label": "task", "cap": 2, "first": "c"})
    ]


def test_two_hundred_tasks_are_told_apart_by_default() -> None:
    reports = Reports()
    observed(reports, *(f"t{number}" for number in range(202)))

    tasks = {s.labels["task"] for s in reports.scrape().samples if s.name == "obsdag_task_running"}

    assert len(tasks) == 201
    assert "_other" in tasks


def test_error_types_are_capped_at_twenty() -> None:
    reports = Reports()
    run = observed(reports, "load")
    for number in range(25):
        run.fail(run.begin(context := run.enter()), type(f"Error{number}", (Exception,), {"__module__": "shop"})())
        run.leave(context)

    seen = reports.scrape().by("error_type", "obsdag_task_failures_total", task="load")

    assert len(seen) == 21
    assert seen["shop.Error0"] == 1
    assert seen["_other"] == 5
    assert [keys["label"] for _, keys in reports.said] == ["error_type"]


def test_low_cardinality_sums_over_tasks() -> None:
    reports = Reports(cardinality="low")
    run = observed(reports, "a", "b", "c")
    run.drive(took_s=0.5)
    run.fail(run.begin(run.enter()), ValueError())

    seen = reports.scrape()

    assert not any("task" in sample.labels for sample in seen.samples)
    assert seen.value("obsdag_task_executions_total", outcome="success") == 3
    assert seen.value("obsdag_task_executions_total", outcome="error") == 1
    assert seen.value("obsdag_task_seconds_count") == 4
    assert seen.value("obsdag_task_seconds_sum") == 2.0
    assert seen.value("obsdag_task_failures_total", error_type="ValueError") == 1


@pytest.mark.parametrize("name", ['with "quotes"', "back\\slash", "two\nlines", "Größe", "a{b}=c,d"])
@pytest.mark.parametrize("form", ["openmetrics", "text"])
def test_label_values_survive_every_character(name: str, form: str) -> None:
    reports = Reports(engine=name)
    observed(reports, name, dag=name).drive()

    assert reports.scrape(form).value("obsdag_task_executions_total", engine=name, dag=name, outcome="success") == 1


def test_a_label_that_is_no_text_does_not_break_the_scrape() -> None:
    reports = Reports(engine="bad\udc80")
    observed(reports, "t\ud800", dag="d\udfff").drive()

    assert reports.scrape().value("obsdag_task_executions_total", task="t?", dag="d?", outcome="success") == 1


# --- exemplars


def test_a_kept_trace_is_the_exemplar_of_its_bucket_in_openmetrics_only() -> None:
    reports = Reports()
    observed(reports).drive(took_s=0.02)
    for tell in reports.metrics.stats.on_kept:
        tell([kept(trace=1), kept(trace=2, seconds=0.025), kept("root", "output", 4.0, 3), kept("queue", "new", 0, 4)])
        tell([])

    samples = [s for s in reports.scrape().samples if s.exemplar]

    found = {(s.name, s.labels["le"]): (s.exemplar.labels["trace_id"][-1], s.exemplar.value) for s in samples}
    assert found == {
        ("obsdag_task_seconds_bucket", "0.03"): ("2", 0.025),
        ("obsdag_root_seconds_bucket", "10.0"): ("3", 4.0),
        ("obsdag_queue_wait_seconds_bucket", "0.001"): ("4", 0.0),
    }
    assert {float(s.exemplar.timestamp) for s in samples} == {1_700_000_001.5}
    assert all(len(s.exemplar.labels["span_id"]) == 16 for s in samples)
    assert all(metric(s.name.removesuffix("_bucket")).exemplars for s in samples)
    assert "trace_id" not in text(reports.registry)


@pytest.mark.parametrize(("options", "label"), [({"max_task_labels": 1}, "_other"), ({"cardinality": "low"}, None)])
def test_exemplars_follow_the_labels_that_are_left(options: dict[str, Any], label: str | None) -> None:
    reports = Reports(**options)
    observed(reports, "load", "store").drive(took_s=0.02)
    for tell in reports.metrics.stats.on_kept:
        tell([kept(label="store")])

    exemplars = [s for s in reports.scrape().samples if s.exemplar]

    assert [s.labels.get("task") for s in exemplars] == [label]


# --- when something breaks


def test_a_run_that_cannot_be_read_costs_its_gauge_and_nothing_else() -> None:
    reports = Reports()
    run = observed(reports)
    run.drive()
    run.state.queue = None  # type: ignore[assignment]

    first, second = reports.scrape(), reports.scrape()

    assert first.value("obsdag_collect_errors_total") == 1
    assert second.value("obsdag_collect_errors_total") == 2
    assert first.value("obsdag_contexts_finished_total", outcome="output") == 1
    assert first.value("obsdag_workers", state="idle") == 4
    assert [(event, keys["part"]) for event, keys in reports.said] == [("telemetry.collect_failed", "queue")]


def test_counts_that_cannot_be_read_keep_their_last_known_value() -> None:
    reports = Reports()
    run = observed(reports)
    run.drive()
    run.state.state_counts = None  # type: ignore[assignment]

    seen = reports.scrape()

    assert seen.value("obsdag_collect_errors_total") == 1
    assert seen.value("obsdag_contexts_finished_total", outcome="output") == 1


def test_a_gauge_of_tracing_that_raises_is_counted() -> None:
    reports = Reports()
    reports.metrics.stats.gauges["spans_buffered"] = lambda: 1 / 0

    assert reports.scrape().value("obsdag_collect_errors_total") == 1
    reports.metrics.stats.gauges["spans_buffered"] = lambda: 12
    assert reports.scrape().value("obsdag_telemetry_spans_buffered") == 12


def test_an_observer_that_is_detached_is_counted() -> None:
    reports = Reports()
    run = observed(reports)
    run.tell("observer_failed", object(), "context_entered", ValueError())
    run.tell("observer_failed", reports.metrics.observer(run.state), "context_entered", ValueError())

    lost = reports.scrape().by("signal", "obsdag_telemetry_dropped_total", reason="observer_failed")

    assert lost == {"observers": 1, "metrics": 1}


# --- what telemetry counts about itself


def test_self_statistics_are_shown_by_dag_and_for_the_whole() -> None:
    stats = SelfStats()
    reports = Reports(stats=stats)
    observed(reports)
    stats.drop("traces", "queue_full", 3)
    stats.drop("logs", "buffer_cap", 2, dag="etl")
    stats.decide("ratio", dag="etl")
    stats.spend("traces", 0.5)

    seen = reports.scrape()

    assert seen.value("obsdag_telemetry_dropped_total", dag=ALL_DAGS, signal="traces", reason="queue_full") == 3
    assert seen.value("obsdag_telemetry_dropped_total", dag="etl", signal="logs", reason="buffer_cap") == 2
    assert seen.value("obsdag_traces_total", dag="etl", decision="ratio") == 1
    assert seen.value("obsdag_telemetry_seconds_total", dag=ALL_DAGS, signal="traces") == 0.5
    assert (stats.dropped["traces", "queue_full"], stats.traces["ratio"], stats.seconds["traces"]) == (3, 1, 0.5)


class Speaker:
    """What a `Telemetry` logs with, and what it owns."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.heard: list[str] = []
        self.metrics = Metrics(registry=registry, max_task_labels=1, say=self.say)

    def say(self, event: str, **keys: Any) -> None:
        self.heard.append(event)


def test_a_registry_does_not_keep_a_telemetry_alive_but_what_it_counted() -> None:
    registry = CollectorRegistry()
    speaker = Speaker(registry)
    speaker.metrics.stats.drop("traces", "shutdown", 5)
    gone = weakref.ref(speaker.metrics)
    del speaker
    gc.collect()

    assert gone() is None
    for _ in range(2):
        assert scrape(registry).value("obsdag_telemetry_dropped_total", signal="traces", reason="shutdown") == 5


def test_warnings_are_said_by_the_telemetry_while_it_lives_and_by_the_logger_after_it() -> None:
    registry = CollectorRegistry()
    speaker = Speaker(registry)
    speaker.metrics.declare(chain("a", "b", dag="one").build())
    assert speaker.heard == ["telemetry.labels_capped"]
    later = Metrics(registry=registry, max_task_labels=1)
    del speaker
    gc.collect()

    with capture_logs() as lines:
        later.declare(chain("a", "b", dag="two").build())

    assert [(line["event"], line["dag"], line["label"]) for line in lines] == [
        ("telemetry.labels_capped", "two", "task")
    ]


def test_a_directory_for_multiprocess_mode_is_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "somewhere")
    registry = CollectorRegistry()
    with capture_logs() as lines:
        for engine in ("one", "two", "one"):
            Metrics(engine, registry)

    assert [(line["event"], line["engine"]) for line in lines] == [("telemetry.multiprocess_ignored", "one")]
    assert "file_sd" in lines[0]["advice"]


def test_the_share_of_time_is_measured_on_a_sample_of_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(
        "obsdag.telemetry.tally.perf_counter", lambda: float(next(ticks))
    )  # each reading a second later
    reports = Reports()
    run = observed(reports, "load")
    observer = reports.metrics.observer(run.state)
    context = run.enter()
    execution = run.begin(context)
    execution.ended = 1.0
    run.state.told_executions[1] = 7
    for _ in range(SAMPLE_EVERY * 3):
        observer.context_finished(context, "output", 1.0)
    observer.execution_finished(execution, "success", None, 1.0)

    seen = reports.scrape()

    # three ends of roots, each for all since the one before; seven executions, by the time that one takes
    assert seen.total("obsdag_telemetry_seconds_total", dag="etl", signal="metrics") == 3 * SAMPLE_EVERY + 7
    assert seen.value("obsdag_task_executions_total", outcome="success") == 1


def test_a_dag_whose_name_is_that_of_all_of_them_is_told_apart() -> None:
    reports = Reports()
    observed(reports, dag=ALL_DAGS).drive()

    assert reports.scrape().value("obsdag_contexts_finished_total", outcome="output", dag="_all_") == 1


def test_times_are_in_unix_seconds_on_the_outside() -> None:
    reports = Reports()
    run = observed(reports)
    assert not reports.scrape().values("obsdag_oldest_context_timestamp_seconds")
    run.now = 5.0
    first = run.enter()
    run.now = 9.0
    run.enter()

    assert reports.scrape().value("obsdag_oldest_context_timestamp_seconds") == EPOCH + 5.0
    first.freeze()
    first.destroy()
