"""Figures: what is drawn where, checked against the curve and the circuit, and pages that run no foreign script."""

import html
import re
import subprocess
import sys

import numpy as np
import plotly.io as pio
import pytest
import torch

import tracedensity as td
from tracedensity.curve import DensityCurve, Points
from tracedensity.extract import Ranking
from tracedensity.graph import unflatten
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.plot import circuit as circuit_module
from tracedensity.plot import density_page, plot_circuit, plot_curve, theme, write_html
from tracedensity.provenance import Provenance
from tracedensity.run import Conditions

GRAPH = TokenGraph(n_layers=2, n_heads=3, n_pos=4)
HOSTILE = ("<s>", " </script><script>alert(1)</script>", " \"quoted' & $x$", "\n\u202e")


def provenance(texts):
    return Provenance("tiny", "abc", tuple(range(len(texts))), tuple(texts), "norm")


PROVENANCE = provenance(("<s>", " there", " was", " was"))


def make_circuit(*names, graph=GRAPH, **fields):
    kept = {kind: torch.zeros_like(mask) for kind, mask in graph.exists.items()}
    for name in names:
        kind, index = graph.edge_index(name)
        kept[kind][index] = True
    return Circuit(graph, kept, provenance([f" t{i}" for i in range(graph.n_pos)]), **fields)


def whole(graph):
    return Circuit(graph, graph.exists, provenance([f" t{i}" for i in range(graph.n_pos)]))


def make_curve(sizes, faithfulness, thresholds=(0.5, 0.9), texts=PROVENANCE.texts, top_text=" a", **fields):
    n_edges = GRAPH.n_edges
    rank = unflatten(GRAPH, torch.arange(n_edges, dtype=torch.int32).flip(0), -1)
    return DensityCurve(
        torch.tensor([*sizes, n_edges]),
        torch.tensor([*faithfulness, 1.0], dtype=torch.float64),
        Ranking(GRAPH, rank, "greedy", provenance(texts)),
        thresholds,
        "tv",
        Conditions(),
        entropy=1.25,
        top_token=3,
        top_text=top_text,
        top_probability=0.5,
        **fields,
    )


# passes 0.5 at 4 edges and for good at 16, passes 0.9 at 20
CURVE = make_curve([0, 1, 4, 8, 16, 20], [0.0, 0.25, 0.625, 0.375, 0.75, 0.9375])


def traces(figure, name):
    return [trace for trace in figure.data if trace.name == name]


def segments(trace):
    """The lines of a trace, each a list of its corners."""
    lines, line = [], []
    for x, y in zip(np.asarray(trace.x).tolist(), np.asarray(trace.y).tolist(), strict=True):
        if np.isnan(x):
            lines.append(line)
            line = []
        else:
            line.append((x, y))
    return lines


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
        (minimal,) = traces(figure, "minimal: the first circuit to reach a threshold")
        assert (list(minimal.x), list(minimal.y)) == ([4, 20], [0.5, 0.9])
        (stable,) = traces(figure, "stable: all larger circuits reach it too")
        assert (list(stable.x), list(stable.y)) == ([16], [0.5])  # only where it differs
        assert GRAPH.n_edges == 57
        notes = [note.text for note in figure.layout.annotations]
        assert "<b>0.5</b>  4 (7.02%)" in notes
        assert "<b>0.9</b>  20 (35.1%)" in notes
        dotted = {shape.y0 for shape in figure.layout.shapes if shape.line.dash == "dot"}
        assert dotted == {0.5, 0.9}

    def test_no_marker_and_no_legend_for_stable_sizes_that_are_the_minimal_ones(self):
        figure = plot_curve(make_curve([1, 20], [0.25, 0.9]))
        (stable,) = traces(figure, "stable: all larger circuits reach it too")
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
        assert more == {"random: connected, all skips kept", "inverse: all but the circuit, all skips kept"}
        figure = plot_curve(make_curve([1], [0.5], inverse=points))
        joined, empty = traces(figure, "inverse: all but the circuit, all skips kept")
        assert (list(joined.x), list(joined.y)) == ([10, 57], [0.5, 0.0])
        assert (list(empty.x), list(empty.y)) == ([0.5], [1.0])

    def test_title_says_what_is_predicted_from_what_and_how(self):
        title = plot_curve(CURVE).layout.title
        assert html.unescape(title.text) == "' a' after '<s> there was was'"
        assert title.subtitle.text == "tiny · edges by norm, greedy · 57 edges · p = 0.50, entropy 1.25 nats"

    def test_unusual_conditions_are_named(self):
        from dataclasses import replace

        curve = replace(CURVE, conditions=Conditions(keep_residual=True, attention="open"))
        subtitle = plot_curve(curve).layout.title.subtitle.text
        assert subtitle.endswith("all skips kept · absent attention edges not ablated")

    def test_a_long_prompt_is_shortened_in_the_middle(self):
        texts = ("<s>", *[f" word{i}" for i in range(500)], " the end")
        title = html.unescape(plot_curve(make_curve([1], [0.5], texts=texts)).layout.title.text)
        assert len(title) < 70
        assert title.startswith("' a' after '<s> word0")
        assert "…" in title
        assert title.endswith("word499 the end'")


class TestCircuit:
    def test_each_edge_is_one_line_from_its_source_to_its_target(self):
        figure = plot_circuit(make_circuit("a0.h1@0->2", "m0@2", "r0.attn@1", "r1.mlp@3"))
        (lines, _) = traces(figure, "1 head")
        assert segments(lines) == [[(0, 0), (2, 1)]]  # from the embedding of token 0 to token 2 after attention
        (skips,) = traces(figure, "skip connection")
        assert segments(skips) == [[(1, 0), (1, 1)], [(3, 3), (3, 4)]]
        bars, detour, touch = traces(figure, "MLP")
        assert len(segments(bars)) == 1
        (line,) = segments(detour)
        assert (line[0], line[-1]) == ((2, 1), (2, 2))
        assert list(touch.text) == ["m0<br>' t2' (2)"]

    def test_heads_between_the_same_tokens_are_one_line_that_lists_them(self):
        figure = plot_circuit(make_circuit("a1.h0@1->3", "a1.h2@1->3", "a1.h2@0->3"))
        (pair, _), (single, _) = traces(figure, "2 heads"), traces(figure, "1 head")
        assert segments(pair) == [[(1, 2), (3, 3)]]
        assert segments(single) == [[(0, 2), (3, 3)]]
        assert pair.line.width > single.line.width
        (touch,) = traces(figure, "heads")
        assert set(touch.text) == {"a1.h2<br>' t0' (0) → ' t3' (3)", "a1.h0, a1.h2<br>' t1' (1) → ' t3' (3)"}

    def test_a_head_that_stays_on_its_token_keeps_off_the_skip_connection(self):
        figure = plot_circuit(make_circuit("a0.h0@2->2", "r0.attn@2"))
        ((line, *_),) = [segments(trace) for trace in traces(figure, "1 head") if len(segments(trace)[0])]
        assert (line[0], line[-1]) == ((2, 0), (2, 1))
        assert min(x for x, _ in line) < 2

    @pytest.mark.parametrize("has_mlp", [True, False])
    def test_as_many_lines_as_edges(self, has_mlp):
        graph = TokenGraph(3, 2, 5, has_mlp)
        circuit = whole(graph)
        figure = plot_circuit(circuit)
        composition = circuit.composition()
        assert len(segments(traces(figure, "2 heads")[0])) == composition["head"] / 2
        skips = composition["resid_attn"] + composition.get("resid_mlp", 0)
        assert len(segments(traces(figure, "skip connection")[0])) == skips
        assert len(traces(figure, "MLP")) == (3 if has_mlp else 0)
        (states,) = traces(figure, "state")
        assert len(states.x) == graph.n_nodes - 1  # all but the prediction, which has its own mark
        (prediction,) = traces(figure, "prediction")
        assert (prediction.x[0], prediction.y[0]) == (4, 6 if has_mlp else 3)
        assert figure.layout.yaxis.ticktext == ("0", "1", "2")

    def test_no_two_links_are_touched_at_the_same_place(self):
        figure = plot_circuit(whole(TokenGraph(2, 1, 12)))
        (touch,) = traces(figure, "heads")
        places = set(zip(touch.x.round(3).tolist(), touch.y.round(3).tolist(), strict=True))
        assert len(places) == len(touch.text) == 12 * 13 / 2 + 12

    def test_only_states_of_the_circuit_have_dots(self):
        (states,) = traces(plot_circuit(make_circuit("a0.h1@0->2", "m0@2")), "state")
        assert set(zip(states.x.tolist(), states.y.tolist(), strict=True)) == {(0, 0), (2, 1), (2, 2)}

    def test_tokens_are_the_ticks_and_those_that_are_not_read_are_grey(self):
        circuit = Circuit(GRAPH, make_circuit("a0.h1@1->2").kept, PROVENANCE)
        axis = plot_circuit(circuit).layout.xaxis
        assert list(axis.tickvals) == [0, 1, 2, 3]
        plain = [html.unescape(re.sub("<[^>]*>", "", text)) for text in axis.ticktext]
        assert plain == ["<s>", "·there", "·was", "·was"]
        assert ["color" in text for text in axis.ticktext] == [True, False, True, True]

    def test_title_gives_size_share_faithfulness_and_prompt(self):
        circuit = Circuit(GRAPH, make_circuit("m0@1", "m0@2").kept, PROVENANCE, faithfulness=0.91234)
        title = plot_circuit(circuit).layout.title
        assert title.text == "Circuit of 2 of 57 edges (3.51%), faithfulness 0.912"
        assert html.unescape(title.subtitle.text) == "'<s> there was was' · norm on tiny"
        assert plot_circuit(make_circuit("m0@1")).layout.title.text.endswith("not run")

    def test_the_predicted_token_is_written_where_it_is_known(self):
        (mark,) = traces(plot_circuit(make_circuit("m0@1"), prediction=" <b>"), "prediction")
        assert mark.text[0] == "<b>' &lt;b&gt;'</b>"

    def test_an_empty_circuit_is_drawn_too(self):
        figure = plot_circuit(make_circuit())
        assert not traces(figure, "1 head")
        assert segments(traces(figure, "skip connection")[0]) == []

    def test_a_large_circuit_shows_the_heads_into_the_last_token_and_says_so(self, monkeypatch):
        monkeypatch.setattr(circuit_module, "MAX_LINKS", 5)
        figure = plot_circuit(whole(GRAPH))
        lines = segments(traces(figure, "3-4 heads")[0])
        assert len(lines) == 8
        assert {line[-1][0] for line in lines} == {3}
        assert figure.layout.title.subtitle.text.endswith(
            "<br>only heads into the last token are drawn: all 14 lines would be too many"
        )

    def test_few_traces_however_many_edges(self):
        generator = torch.Generator().manual_seed(0)
        graph = TokenGraph(12, 12, 64)
        kept = {
            kind: mask & (torch.rand(mask.shape, generator=generator) < 0.05) for kind, mask in graph.exists.items()
        }
        figure = plot_circuit(Circuit(graph, kept, provenance([f" t{i}" for i in range(64)])))
        assert len(figure.data) <= 20
        assert len(figure.to_json()) < 2_000_000

    def test_another_graph_is_refused(self):
        class Other:
            shapes, exists, n_edges = {}, {}, 0

        circuit = Circuit.__new__(Circuit)
        object.__setattr__(circuit, "graph", Other())
        with pytest.raises(ValueError, match="must be one of a TokenGraph to be drawn, got Other"):
            plot_circuit(circuit)


class TestPage:
    def test_a_page_holds_curve_circuit_and_numbers_and_plotly_once(self):
        page = density_page(CURVE, faithfulness=0.5)
        assert page.count("Plotly.newPlot") - plotly_source().count("Plotly.newPlot") == 2
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
        assert len(re.findall("<script", page)) == len(re.findall("</script", page)) == 3  # plotly.js and two figures

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
        assert html.unescape(title.text).replace("\u200b", "").endswith(": 2 pairs")
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
        assert {"random: connected", "inverse: all but the circuit"} <= names

    def test_a_page_holds_the_pairs_the_curve_and_the_circuit_and_runs_no_foreign_script(self, curve):
        page = density_page(curve, faithfulness=0.5).replace(plotly_source(), "")
        circuit = curve.circuit(faithfulness=0.5)
        assert page.count("Plotly.newPlot") == 2
        assert f"{circuit.pruned_size:,} of them are on a path from the input to the logits" in html.unescape(page)
        assert "<th>after pruning (edges)</th>" in page
        assert f"<td>{circuit.pruned_size:,}</td></tr>" in page
        assert "1 2 3" in page or "[1, 2, 3]" in page
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
