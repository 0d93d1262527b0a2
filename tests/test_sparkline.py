"""Results in a notebook or terminal: small curves as text and SVG, tables, and no text of a prompt that is run."""

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from drawn import CURVE, GRAPH, HOSTILE, make_circuit, make_curve, provenance

import tracedensity as td
from tracedensity.activations import Top
from tracedensity.curve import DensityCurve
from tracedensity.extract import Ranking
from tracedensity.graph.token import TokenGraph
from tracedensity.reporting import Report
from tracedensity.run import Conditions
from tracedensity.score import Scores
from tracedensity.sparkline import spark_svg, spark_text
from tracedensity.tight import TightCurve

SVG = "{http://www.w3.org/2000/svg}"
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def drawn(svg):
    """The corners of the curve in an image, from the left; the image must be XML."""
    root = ET.fromstring(svg)
    base, curve = root.findall("path")
    assert {path.get("stroke") for path in (base, curve)} == {"currentColor"}
    assert curve.get("fill") == "none"
    width, height = (float(root.get(name)) for name in ("width", "height"))
    assert root.get("viewBox") == f"0 0 {width:g} {height:g}"
    corners, x, y = [], 0.0, 0.0
    for step, numbers in re.findall(r"([MLHV])([-\d. ]+)", curve.get("d")):
        values = [float(number) for number in numbers.split()]
        x, y = {"H": [*values, y], "V": [x, *values]}.get(step, values)
        corners.append((x, y))
    assert all(0 <= x <= width and 0 <= y <= height for x, y in corners)
    return corners


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([i / 7 for i in range(8)], "▁▂▃▄▅▆▇█", id="a bar for each seventh"),
        pytest.param([0.07, 0.08, 0.92, 0.93], "▁▂▇█", id="the nearest one"),
        pytest.param([-3.0, 1.5, math.inf], "▁██", id="what lies outside is cut off"),
        pytest.param([], "", id="nothing"),
    ],
)
def test_numbers_as_bars(values, expected):
    assert spark_text(values) == expected


def bars_of(curve):
    """The bars that a curve's text must hold: at each of 24 sizes, the circuit of the largest size that was run."""
    known = list(zip(curve.sizes.tolist(), curve.faithfulness.tolist(), strict=True))
    sizes = [round(curve.n_edges ** (i / 23)) for i in range(24)]
    return "".join("▁▂▃▄▅▆▇█"[round(7 * [height for at, height in known if at <= size][-1])] for size in sizes)


@pytest.mark.parametrize("curve", [CURVE, make_curve([0, 1, 2, 30], [0.0, 0.1, 0.6, 0.2])])
def test_a_curve_s_text_has_its_bars_on_a_line(curve):
    line = f"faithfulness of 1 to 57 edges  {bars_of(curve)}"
    assert line in repr(curve).splitlines()
    assert repr(curve).index(line) < repr(curve).index("minimal circuit")


def test_sizes_below_the_first_that_was_run_have_its_bar():
    curve = make_curve([20], [0.6])
    assert f"edges  {'▅' * 23}█" in repr(curve)


def test_the_last_bar_is_the_whole_graph_however_large_it_is():
    graph = TokenGraph(n_layers=12, n_heads=12, n_pos=256)
    assert graph.n_edges == 4_353_795  # a logarithm in float32 leads back to an edge less
    curve = DensityCurve(
        torch.tensor([0, graph.n_edges - 1, graph.n_edges]), torch.tensor([0.0, 0.5, 1.0]),
        Ranking(graph, {}, "greedy", provenance(["a"])), (0.9,), "tv", Conditions(), 1.0, 0, " a", 0.5,
    )  # fmt: skip
    assert f"faithfulness of 1 to 4,353,795 edges  {'▁' * 23}█" in repr(curve)


def test_a_tight_curve_s_text_has_bars_as_well():
    tight = TightCurve.of(CURVE, (), ())
    assert f"faithfulness of 1 to 57 edges  {bars_of(tight)}" in repr(tight).splitlines()
    assert bars_of(tight) != bars_of(CURVE)  # it never falls


def test_a_real_curve_s_text_has_bars(tiny_model):
    curve = td.density(tiny_model, [3, 1, 4], baselines=False)
    assert bars_of(curve) in repr(curve)


# -- images ----------------------------------------------------------------------------------------


def test_a_curve_as_an_image_by_hand():
    # 220 x 44 pixels of which 4 are left free all around
    assert drawn(spark_svg([0.0, 1.0, 4.0], [0.0, 0.5, 1.0], "t")) == [(4, 40), (57, 22), (216, 4)]


def test_steps_go_across_before_they_go_up():
    corners = drawn(spark_svg([0.0, 1.0, 4.0], [0.0, 0.5, 1.0], "t", steps=True))
    assert corners == [(4, 40), (57, 40), (57, 22), (216, 22), (216, 4)]


def test_what_lies_outside_is_drawn_at_the_edge():
    assert drawn(spark_svg([0.0, 1.0], [-2.0, 3.0], "t")) == [(4, 40), (216, 4)]


def test_one_point_is_drawn_too():
    assert drawn(spark_svg([5.0], [0.5], "t")) == [(4, 22)]


def test_the_title_says_what_is_seen():
    title = ET.fromstring(CURVE._spark_svg()).find("title")
    assert title.text == "faithfulness of circuits of 0 to 57 edges, log scale"


def test_the_image_of_a_curve_is_on_a_logarithmic_scale():
    corners = drawn(CURVE._spark_svg())
    places = [math.log(max(size, 0.5)) for size in CURVE.sizes.tolist()]  # the empty circuit stands at 1/2
    for (x, y), place, height in zip(corners, places, CURVE.faithfulness.tolist(), strict=True):
        share = (place - places[0]) / (places[-1] - places[0])
        assert (x, y) == pytest.approx((4 + 212 * share, 40 - 36 * height), abs=0.051)


def test_the_image_of_an_envelope_has_steps():
    corners = drawn(TightCurve.of(CURVE, (), ())._spark_svg())
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(corners))
    assert all(a[1] >= b[1] for a, b in pairwise(corners))


# -- notebooks -------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The tags and attributes of some HTML, which must all be closed, and its text."""

    VOID = frozenset(["br"])

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = set(), set(), "", []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()
        elif tag not in ("path",):
            raise AssertionError(f"</{tag}> closes nothing")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_data(self, data):
        self.text += data


def hostile_curve():
    curve = make_curve([0, 4, 20], [0.0, 0.6, 0.95], texts=HOSTILE, top_text=ATTACK)
    made = replace(curve.provenance, model=ATTACK, method=ATTACK)
    return replace(curve, ranking=replace(curve.ranking, provenance=made))


def hostile_tight():
    curve = hostile_curve()
    found = replace(make_circuit("m1@3", "r1.mlp@3"), provenance=curve.provenance, faithfulness=0.7)
    return TightCurve.of(curve, (), [found])


def hostile_robust():
    return replace(hostile_curve(), robust=replace(hostile_curve(), situations=(ATTACK,)))


def hostile_task_curve():
    task = td.Task([[1, 2, 3]], answer=[2], name=ATTACK)
    curve = hostile_curve()
    ranking = replace(curve.ranking, provenance=replace(curve.provenance, task=task))
    return replace(curve, ranking=ranking, metric=ATTACK, full=torch.tensor([2.0]), empty=torch.tensor([0.0]))


def hostile_circuit():
    return replace(make_circuit("m1@3"), provenance=hostile_curve().provenance)


def hostile_scores():
    values = {kind: torch.rand(shape) for kind, shape in GRAPH.shapes.items()}
    return Scores(GRAPH, values, hostile_curve().provenance)


def hostile_evaluation():
    values = {ATTACK: torch.tensor([0.5, 0.25])}
    return td.Evaluation(torch.tensor([1, 2]), values, 57, {ATTACK: torch.ones(2, 1)}, {ATTACK: torch.ones(1)})


def hostile_top():
    return Top("heads", torch.tensor([1, 0]), torch.tensor([3, 2]), torch.tensor([4.0, 0.5]), 7, ATTACK)


def hostile_report():
    finding = td.reporting.Finding(hostile_curve(), hostile_circuit(), hostile_scores(), None)
    return Report((finding, finding), 0.9, ATTACK)


NOTEBOOK = {
    "curve": hostile_curve,
    "tight curve": hostile_tight,
    "robust curve": hostile_robust,
    "curve of a task": hostile_task_curve,
    "circuit": hostile_circuit,
    "scores": hostile_scores,
    "evaluation": hostile_evaluation,
    "top": hostile_top,
    "report": hostile_report,
}


def assert_shown(shown):
    """A table, and nothing that is run or fetched."""
    found = Tags(shown)
    assert "table" in found.tags
    assert found.tags <= {
        "p", "b", "br", "code", "table", "thead", "tbody", "tr", "th", "td", "svg", "title", "path",
    }  # fmt: skip
    assert not {name for name in found.attributes if name.startswith("on") or name in ("src", "href")}
    assert "plotly" not in shown.lower()
    return found


@pytest.mark.parametrize("name", NOTEBOOK)
def test_a_notebook_shows_a_table_and_runs_no_text(name):
    shown = NOTEBOOK[name]()._repr_html_()
    assert_shown(shown)
    assert "<script" not in shown
    assert "alert(" in Tags(shown).text  # shown as it is


@pytest.mark.parametrize("name", [name for name in NOTEBOOK if "curve" in name or name == "report"])
def test_curves_come_with_an_image_that_needs_no_script(name):
    shown = NOTEBOOK[name]()._repr_html_()
    images = re.findall(r"<svg.*?</svg>", shown)
    assert len(images) == (2 if name == "report" else 1)
    for image in images:
        assert drawn(image)


def test_prompts_are_shown_as_they_are():
    text = Tags(hostile_curve()._repr_html_()).text
    assert repr("".join(HOSTILE)) in text
    assert "\u202e" not in text and "\n" not in text  # what turns text around is spelt out


def test_activations_of_a_model_with_a_hostile_name_are_shown(tiny_gpt2):
    held = td.capture(tiny_gpt2, [3, 1, 4])
    hostile = replace(held, transformer=replace(held.transformer, name=ATTACK))
    text = assert_shown(hostile._repr_html_()).text
    assert ATTACK in text and "layer head dest src" in text and "2, 4, 3, 3" in text


def test_a_real_result_of_each_kind_is_shown(tiny_gpt2):
    curve = td.density(tiny_gpt2, [3, 1, 4])
    scores = td.attribute(tiny_gpt2, [3, 1, 4])
    evaluation = td.evaluate(tiny_gpt2, [3, 1, 4], curve.ranking)
    for result in (curve, curve.circuit(size=5), scores, evaluation, td.capture(tiny_gpt2, [3, 1]).top_neurons(3)):
        assert_shown(result._repr_html_())
    assert f"{len(evaluation.sizes)} circuits" in repr(evaluation)
    assert evaluation._repr_html_().count("<tr") == len(evaluation.sizes) + 1


def test_a_report_says_how_to_get_its_page():
    shown = hostile_report()
    for text in (repr(shown), Tags(shown._repr_html_()).text):
        assert "Report.save('report.html') writes the page with all figures." in text
    assert repr(shown).count(repr(hostile_curve())) == 2
