"""Drawings: Mermaid, Graphviz, dict, SVG (SEMANTICS G6)."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdag.errors import GraphError
from obsdag.graph import DAG
from obsdag.layout import lay_out
from obsdag.limits import RateLimit
from obsdag.plan import topological_order
from obsdag.tasks import Fixed

SVG = "{http://www.w3.org/2000/svg}"


def same(ctx: Any) -> Any:
    return ctx


def items(ctx: Any) -> Any:
    yield ctx


def busy(error: BaseException) -> bool:
    return True


def shop() -> DAG:
    dag = DAG("shop")
    dag.task(name="load", retry_times=2, retry_interval=Fixed(0.5), retry_on=(OSError, KeyError))(same)
    dag.router(name="by kind", after="load", targets=["split", "store"], kind="foreground_router")(same)
    dag.map(name="split", after="by kind", limiter=RateLimit(3, name="api"))(items)
    dag.join(name="gather", after="split", on_child_failure="skip")(lambda parent, children: parent)
    dag.task(name="store", after=["gather", "by kind"], retry_on=busy)(same)
    return dag


def test_G6_to_mermaid() -> None:
    assert shop().to_mermaid() == (
        "flowchart TD\n"
        '    t0["load"]\n'
        '    t1{"by kind"}\n'
        '    t2[/"split"\\]\n'
        '    t3[\\"gather"/]\n'
        '    t4["store"]\n'
        "    t0 --> t1\n"
        "    t1 --> t2\n"
        "    t2 --> t3\n"
        "    t3 --> t4\n"
        "    t1 --> t4\n"
    )


def test_G6_to_dot() -> None:
    assert shop().to_dot() == (
        'digraph "shop" {\n'
        '    node [fontname="sans-serif"];\n'
        '    t0 [label="load", shape=box];\n'
        '    t1 [label="by kind", shape=diamond];\n'
        '    t2 [label="split", shape=trapezium];\n'
        '    t3 [label="gather", shape=invtrapezium];\n'
        '    t4 [label="store", shape=box];\n'
        "    t0 -> t1;\n"
        "    t1 -> t2;\n"
        "    t2 -> t3;\n"
        "    t3 -> t4;\n"
        "    t1 -> t4;\n"
        "}\n"
    )


def test_G6_to_dict() -> None:
    assert shop().to_dict() == {
        "name": "shop",
        "nodes": [
            {
                "id": "load",
                "kind": "sync",
                "config": {
                    "retry_times": 2,
                    "retry_interval": "Fixed(interval=0.5)",
                    "retry_on": ["builtins:OSError", "builtins:KeyError"],
                },
            },
            {"id": "by kind", "kind": "foreground_router", "config": {}, "targets": ["split", "store"]},
            {
                "id": "split",
                "kind": "map",
                "config": {"limiter": ["RateLimit(n=3, per=1.0, burst=None, name='api')"]},
            },
            {"id": "gather", "kind": "join", "config": {}, "on_child_failure": "skip"},
            {"id": "store", "kind": "sync", "config": {"retry_on": f"{__name__}:busy"}},
        ],
        "edges": [
            ["load", "by kind"],
            ["by kind", "split"],
            ["by kind", "store"],
            ["split", "gather"],
            ["gather", "store"],
        ],
    }


def test_G6_to_dict_is_stable_and_json() -> None:
    class Odd:
        def __call__(self, ctx: Any) -> float:
            return 1.0

    def make() -> DAG:
        dag = DAG()
        dag.task(name="a", retry_interval=Odd())(same)
        return dag

    one, two = make(), make()
    assert json.dumps(one.to_dict()) == json.dumps(two.to_dict())
    assert "0x" not in json.dumps(one.to_dict())


@pytest.mark.parametrize("method", ["to_mermaid", "to_dot", "to_dict", "to_svg"])
def test_G6_built_and_unbuilt_look_the_same(method: str) -> None:
    dag = shop()
    before = getattr(dag, method)()
    dag.build()
    assert getattr(dag, method)() == before


@pytest.mark.parametrize("method", ["to_mermaid", "to_dot", "to_dict", "to_svg"])
def test_G6_source_and_sink_on_demand_once_built(method: str) -> None:
    dag = shop()
    with pytest.raises(GraphError, match="'shop' is not built: call build\\(\\) before asking for its source and sink"):
        getattr(dag, method)(internal=True)
    dag.build()
    assert "sink" in str(getattr(dag, method)(internal=True))
    assert "sink" not in str(getattr(dag, method)())


def test_G6_internal_edges() -> None:
    dag = DAG()
    dag.task(name="a")(same)
    dag.build()
    assert dag.to_dict(internal=True)["edges"] == [["source", "a"], ["a", "sink"]]
    assert dag.to_dict(internal=True)["nodes"][-1] == {"id": "sink", "kind": "sink", "config": {}}
    assert 't0(("source"))' in dag.to_mermaid(internal=True)


def test_G6_an_unbuilt_dag_with_mistakes_is_drawn_as_far_as_it_goes() -> None:
    dag = DAG()
    dag.task(name="a", after=["b", "zzz"])(same)
    dag.task(name="b", after="a")(same)
    assert dag.to_mermaid().count("-->") == 2
    root = ElementTree.fromstring(dag.to_svg())
    assert len(root.findall(f"{SVG}path")) == 1


ODD_IDS = [
    'a "quoted" one',
    "two\nlines\r\n\ttab",
    "<b>bold</b> & co",
    "späße 日本語",
    "back\\slash",
    "`code`;#1",
    "]]></svg>",
    "--> t0",
    "%%{init}%%",
    "1. **bold**",
    'style: "x"',
    "x\x00\x1b\ud800y",
]


@pytest.mark.parametrize("odd", ODD_IDS)
def test_G6_ids_are_escaped(odd: str) -> None:
    dag = DAG(odd)
    dag.task(name=odd)(same)
    dag.task(name="b", after=odd)(same)
    mermaid, dot = dag.to_mermaid().split("\n"), dag.to_dot().split("\n")
    assert len(mermaid) == 5
    assert re.fullmatch(r'    t0\["(?:[^\W_]|[ _/,()-]|#\d+;|\ufffd)*"\]', mermaid[1])
    assert len(dot) == 7
    assert re.fullmatch(r'    t0 \[label="(?:[^"\\]|\\\\|\\")*", shape=box\];', dot[2])
    root = ElementTree.fromstring(dag.to_svg().encode())
    shown = re.sub(r"[\t\r\n]+", " ", re.sub("[\x00\x1b\ud800]", "\N{REPLACEMENT CHARACTER}", odd))
    assert [text.text for text in root.iter(f"{SVG}text")] == [shown, "sync", "b", "sync"]
    assert dag.to_dict()["nodes"][0]["id"] == odd


def test_G6_dot_does_not_take_an_id_for_an_entity() -> None:
    dag = DAG()
    dag.task(name="a & b &lt; c &#38; d")(same)
    assert '[label="a & b &amp;lt; c &amp;#38; d"' in dag.to_dot()


def test_G6_mermaid_text_comes_back_out_of_its_codes() -> None:
    dag = DAG()
    dag.task(name='a "b" <c> #1; d`')(same)
    label = re.search(r'"(.*)"', dag.to_mermaid())
    assert label
    assert re.sub(r"#(\d+);", lambda code: chr(int(code[1])), label[1]) == 'a "b" <c> #1; d`'


def test_G6_svg_shortens_long_ids_and_keeps_them_as_tooltips() -> None:
    dag = DAG()
    name = "an id that is far longer than any box should be wide"
    dag.task(name=name)(same)
    root = ElementTree.fromstring(dag.to_svg())
    [text, _] = [each.text or "" for each in root.iter(f"{SVG}text")]
    assert len(text) == 32
    assert "\N{HORIZONTAL ELLIPSIS}" in text
    assert f"{name} (sync)" in [title.text for title in root.iter(f"{SVG}title")]


def test_G6_svg_boxes_do_not_overlap_and_stay_inside() -> None:
    root = ElementTree.fromstring(shop().to_svg())
    _, _, width, height = (float(number) for number in root.attrib["viewBox"].split())
    boxes = [[float(rect.attrib[key]) for key in ("x", "y", "width", "height")] for rect in root.iter(f"{SVG}rect")]
    assert len(boxes) == 5
    for i, (x, y, w, h) in enumerate(boxes):
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
        for x2, y2, w2, h2 in boxes[i + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_G6_svg_of_nothing() -> None:
    ElementTree.fromstring(DAG().to_svg())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 12).flatmap(lambda n: st.tuples(*[st.sets(st.integers(0, max(i - 1, 0))) for i in range(n)])))
def test_G6_layout_keeps_nodes_apart_and_edges_downwards(sets: tuple[set[int], ...]) -> None:
    upstreams = [sorted(above for above in found if above < node) for node, found in enumerate(sets)]
    widths = [30.0 + 7 * node for node in range(len(sets))]
    layout = lay_out(widths, upstreams, topological_order(upstreams)[0], height=40, gap=20)
    for node, (x, y) in enumerate(layout.centers):
        assert -0.001 <= x - widths[node] / 2 <= x + widths[node] / 2 <= layout.width + 0.001
        assert 20 <= y <= layout.height - 20
        for other in range(node):
            x2, y2 = layout.centers[other]
            assert y != y2 or abs(x - x2) >= (widths[node] + widths[other]) / 2 + 19.999
    assert set(layout.paths) == {(above, node) for node, found in enumerate(upstreams) for above in found}
    for points in layout.paths.values():
        assert [y for _, y in points] == sorted({y for _, y in points})


def test_G6_layout_has_no_crossing_where_none_is_needed() -> None:
    # two chains, given so that the first order of the second layer crosses
    layout = lay_out([40] * 4, [[], [], [1], [0]], [0, 1, 2, 3])
    assert (layout.centers[0][0] < layout.centers[1][0]) == (layout.centers[3][0] < layout.centers[2][0])
