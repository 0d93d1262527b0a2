"""Figures: what is drawn where, checked against the curve and the circuit, and pages that run no foreign script."""

import html
import re
import subprocess
import sys

import numpy as np
import plotly.io as pio
import pytest
import torch
from drawn import CURVE, GRAPH, HOSTILE, make_curve, traces

import tracedensity as td
from tracedensity.curve import Points
from tracedensity.plot import density_page, plot_circuit, plot_curve, theme, write_html
from tracedensity.run import Conditions


class TestCurve:
    def test_points_are_joined_but_for_the_empty_circuit(self):
        joined, empty = traces(plot_curve(CURVE), "circuit")
        assert list(joined.x) == [1, 4, 8, 16, 20, GRAPH.n_edges]
        assert list(joined.y) == [0.25, 0.625, 0.375, 0.75, 0.9375, 1.0]
        assert (list(empty.x), list(empty.y)) == ([0.5], [0.0])
        assert empty.text[0].startswith("size 0 (0%)")

    def test_the_empty_circuit_has_a_tick_that_says_so(self):
        axis = plot_curve(CURVE).layout.xaxis
        assert axis.type == "log"
        assert (axis.tickvals[0], axis.ticktext[0]) == (0.5, "0")
        assert 10 ** axis.range[0] < 0.5 < GRAPH.n_edges < 10 ** axis.range[1]

    def test_a_curve_without_the_empty_circuit_has_no_place_for_it(self):
        figure = plot_curve(make_curve([1, 20], [0.5, 0.9]))
        assert len(traces(figure, "circuit")) == 1
        assert figure.layout.xaxis.ticktext[0] == "1"

    def test_markers_are_at_the_minimal_and_stable_sizes(self):
        figure = plot_curve(CURVE)
        (minimal,) = traces(figure, "minimal: first to reach a threshold")
        assert (list(minimal.x), list(minimal.y)) == ([4, 20], [0.5, 0.9])
        (stable,) = traces(figure, "stable: all larger ones reach it too")
        assert (list(stable.x), list(stable.y)) == ([16], [0.5])  # only where it differs
        assert GRAPH.n_edges == 57
        notes = [note.text for note in figure.layout.annotations]
        assert "<b>0.5</b>  4 (7.02%)" in notes
        assert "<b>0.9</b>  20 (35.1%)" in notes
        dotted = {shape.y0 for shape in figure.layout.shapes if shape.line.dash == "dot"}
        assert dotted == {0.5, 0.9}

    def test_no_marker_and_no_legend_for_stable_sizes_that_are_the_minimal_ones(self):
        figure = plot_curve(make_curve([1, 20], [0.25, 0.9]))
        (stable,) = traces(figure, "stable: all larger ones reach it too")
        assert stable.visible is False

    def test_labels_of_close_thresholds_keep_apart(self):
        thresholds = (0.9, 0.99, 0.995, 0.999)
        figure = plot_curve(make_curve([1, 20], [0.25, 0.9], thresholds=thresholds))
        heights = [note.y for note in figure.layout.annotations if note.text.startswith("<b>")]
        assert min(np.diff(heights)) == pytest.approx(0.05)

    def test_upper_axis_reads_shares_of_all_edges(self):
        axis = plot_curve(CURVE).layout.xaxis2
        assert axis.matches == "x"
        assert dict(zip(axis.ticktext, axis.tickvals, strict=True)) == {"10%": pytest.approx(5.7), "100%": 57}

    def test_baselines_are_drawn_if_there_are_any_and_say_what_they_are(self):
        points = Points(torch.tensor([0, 10, 57]), torch.tensor([1.0, 0.5, 0.0]))
        names = {trace.name for trace in plot_curve(CURVE).data}
        more = {trace.name for trace in plot_curve(make_curve([1], [0.5], random=points, inverse=points)).data} - names
        assert more == {"random, connected, all skips kept", "inverse: all but the circuit, all skips kept"}
        figure = plot_curve(make_curve([1], [0.5], inverse=points))
        joined, empty = traces(figure, "inverse: all but the circuit, all skips kept")
        assert (list(joined.x), list(joined.y)) == ([10, 57], [0.5, 0.0])
        assert (list(empty.x), list(empty.y)) == ([0.5], [1.0])

    def test_title_says_what_is_predicted_from_what_and_how(self):
        title = plot_curve(CURVE).layout.title
        assert html.unescape(title.text) == "' a' after '<s> there was was'"
        assert title.subtitle.text == "tiny · edges by norm, greedy · 57 edges<br>p = 0.50, entropy 1.25 nats"

    def test_unusual_conditions_are_named(self):
        from dataclasses import replace

        curve = replace(CURVE, conditions=Conditions(keep_residual=True, attention="open"))
        subtitle = plot_curve(curve).layout.title.subtitle.text
        assert subtitle.replace("<br>", " · ").endswith("all skips kept · absent attention edges not ablated")

    def test_a_long_prompt_is_shortened_in_the_middle(self):
        texts = ("<s>", *[f" word{i}" for i in range(500)], " the end")
        title = html.unescape(plot_curve(make_curve([1], [0.5], texts=texts)).layout.title.text)
        title = title.replace("<br>", " ")
        assert len(title) < 70
        assert title.startswith("' a' after '<s> word0")
        assert "…" in title
        assert title.endswith("word499 the end'")


class TestPage:
    def test_a_page_holds_curve_circuit_and_numbers_and_plotly_once(self):
        page = density_page(CURVE, faithfulness=0.5)
        assert page.count("Plotly.newPlot") - plotly_source().count("Plotly.newPlot") == 3
        assert page.count(plotly_source()) == 1
        assert "<td>0.5</td><td>4</td><td>7.02%</td><td>16</td>" in page
        assert "Circuit of 4 of 57 edges" in page
        outside = page.replace(plotly_source(), "")
        assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", outside)

    def test_the_same_curve_makes_the_same_page(self):
        assert density_page(CURVE) == density_page(CURVE)

    def test_text_of_prompts_is_shown_and_never_run(self):
        curve = make_curve([0, 4], [0.0, 0.9], texts=HOSTILE, top_text="<img src=x onerror=alert(2)>")
        page = density_page(curve).replace(plotly_source(), "")
        assert "alert(1)" in page
        assert "<script>alert" not in page
        assert "</script><script>" not in page
        assert "<img" not in page
        n_scripts = 5  # plotly.js, three figures, the page's own
        assert len(re.findall("<script", page)) == len(re.findall("</script", page)) == n_scripts

    def test_figures_show_hostile_text_as_it_is(self):
        curve = make_curve([0, 4], [0.0, 0.9], texts=HOSTILE)
        for figure in (plot_curve(curve), plot_circuit(curve.circuit(size=57))):
            written = " ".join([
                figure.layout.title.text, figure.layout.title.subtitle.text, *(figure.layout.xaxis.ticktext or ()),
                *(text for trace in figure.data if isinstance(trace.text, tuple | list) for text in trace.text),
            ])  # fmt: skip
            assert set(re.findall(r"<[^>]*>", written)) <= {"<br>", "<b>", "</b>"}
            assert "$" not in written  # in a notebook MathJax would read it
            assert "\n" not in written
            assert "\u202e" not in written

    def test_a_figure_alone_is_a_page_too(self, tmp_path):
        path = tmp_path / "figure.html"
        write_html(plot_curve(CURVE), path)
        assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        assert plotly_source() in path.read_text(encoding="utf-8")

    def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch):
        path = tmp_path / "page.html"
        path.write_text("old")
        monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_html("new", path)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_folder_that_does_not_exist_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="`path` must be a file in a folder that exists, got "):
            write_html("page", tmp_path / "nowhere" / "page.html")


@pytest.fixture(scope="module")
def curve(tiny_gpt2):
    task = td.Task([[1, 2, 3], [4, 5, 6]], [[1, 7, 3], [4, 8, 6]], [2, 3], [5, 6], name="<b>$a$</b>")
    return td.density(tiny_gpt2, task, graph="component", method="eap")


class TestTask:
    """Curves of tasks on the component graph."""

    def test_title_says_what_is_asked_and_how(self, curve):
        title = plot_curve(curve).layout.title
        assert html.unescape(title.text).replace("\u200b", "").endswith("(2 pairs)")
        full, empty = float(curve.full.mean()), float(curve.empty.mean())
        assert f"logit_diff {full:.2f}, ablated {empty:.2f}" in title.subtitle.text
        assert "counterfactual ablation" in title.subtitle.text
        assert "edges by eap, greedy" in title.subtitle.text

    def test_all_that_is_reached_is_in_sight(self, curve):
        low, high = plot_curve(curve).layout.yaxis.range
        for points in (curve, curve.random, curve.inverse):
            assert low <= float(points.faithfulness.min()) <= float(points.faithfulness.max()) <= high

    def test_baselines_keep_no_skips_where_there_are_none(self, curve):
        names = {trace.name for trace in plot_curve(curve).data}
        assert {"random, connected", "inverse: all but the circuit"} <= names

    def test_a_page_holds_the_pairs_the_curve_and_the_circuit_and_runs_no_foreign_script(self, curve):
        page = density_page(curve, faithfulness=0.5).replace(plotly_source(), "")
        circuit = curve.circuit(faithfulness=0.5)
        assert page.count("Plotly.newPlot") == 3
        assert f"{circuit.pruned_size:,} of its edges are on a path from the input to the logits" in html.unescape(page)
        assert "<th>after pruning (edges)</th>" in page
        assert f"<td>{circuit.pruned_size:,}</td></tr>" in page
        assert "(1, 2, 3)" in page
        assert "<b>$a$" not in page


def plotly_source():
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def test_a_loaded_result_is_drawn_without_a_model(tmp_path):
    CURVE.save(tmp_path / "curve")
    assert td.load(tmp_path / "curve").plot().to_json() == CURVE.plot().to_json()
    circuit = CURVE.circuit(faithfulness=0.9)
    circuit.save(tmp_path / "circuit")
    assert td.load(tmp_path / "circuit").plot().to_json() == circuit.plot().to_json()


def test_only_plotting_imports_plotly_and_it_changes_no_default():
    program = (
        "import sys, tracedensity.curve, tracedensity.files\n"
        "assert not any(name == 'plotly' or name.startswith('plotly.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert pio.templates.default == "plotly"


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, "0%"), (1.0, "100%"), (0.054, "5.4%"), (0.15459, "15.5%"), (1 / 3e7, "0.00000333%")],
)
def test_percent_has_three_digits_and_no_power_of_ten(share, expected):
    assert theme.percent(share) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(" a b", "·a·b", id="spaces are seen"),
        pytest.param("\n\t", "↵⇥", id="so are line breaks and tabs"),
        pytest.param("\u202e", r"\u202e", id="what turns text around is spelt out"),
        pytest.param("<s>", "&lt;s&gt;", id="a tag is no tag"),
        pytest.param("$1", "&#36;1", id="a price is no formula"),
        pytest.param("\"'", "\"'", id="quotation marks have no name that plotly knows"),
        pytest.param("&lt;", "&amp;lt;", id="what looks escaped is not"),
        pytest.param("abcdefghijklmnopqrst", "abcd…lmnopqrst", id="long tokens lose their middle"),
    ],
)
def test_tokens_as_labels(text, expected):
    assert theme.token(text) == expected
