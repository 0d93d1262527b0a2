"""The figure of several curves: what is drawn where, how curves are told apart, and which do not compare."""

import html
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tracedensity.curve import DensityCurve
from tracedensity.extract import Ranking
from tracedensity.graph import unflatten
from tracedensity.graph.token import TokenGraph
from tracedensity.plot.comparison import plot_curves
from tracedensity.plot.theme import COLOURS, DARK
from tracedensity.provenance import Provenance
from tracedensity.run import Conditions
from tracedensity.task import Task
from tracedensity.tight import TightCurve

GRAPH = TokenGraph(n_layers=2, n_heads=3, n_pos=4)  # 57 edges
TEXTS = ("<s>", " there", " was", " a")
HOSTILE = ("<s>", " </script><script>alert(1)</script>", " \"quoted' & $x$", "\n\u202e")


def make_curve(sizes, faithfulness, thresholds=(0.5, 0.9), graph=GRAPH, texts=TEXTS, top_text=" man", **fields):
    about = Provenance("tiny", "abc", tuple(range(len(texts))), tuple(texts), "norm", task=fields.pop("task", None))
    rank = unflatten(graph, torch.arange(graph.n_edges, dtype=torch.int32).flip(0), -1)
    return DensityCurve(
        torch.tensor([*sizes, graph.n_edges]),
        torch.tensor([*faithfulness, 1.0], dtype=torch.float64),
        Ranking(graph, rank, "greedy", about),
        thresholds,
        fields.pop("metric", "tv"),
        Conditions(),
        entropy=1.25,
        top_token=3,
        top_text=top_text,
        top_probability=0.5,
        **fields,
    )


DENSE = make_curve([0, 1, 4, 20, 30], [0.0, 0.25, 0.375, 0.5, 0.9375], top_text=" dense")  # 0.5 at 20, 0.9 at 30
SPARSE = make_curve([0, 1, 2, 3], [0.125, 0.25, 0.5, 0.9375], top_text=" sparse")  # 0.5 at 2, 0.9 at 3
TASK = Task([[1, 2, 3], [4, 5, 6]], [[1, 7, 3], [4, 8, 6]], [2, 3], [5, 6], name="<b>$a$</b>")


def first_at(size, **fields):
    """A curve that reaches 0.9 at one size."""
    return make_curve([1, size], [0.25, 0.9375], **fields)


def lines(figure):
    """The traces of the curves, by what is predicted."""
    return {trace.name: trace for trace in figure.data if trace.name not in ("threshold", "ranges", "minimal sizes")}


def rows(figure):
    (dots,) = [trace for trace in figure.data if trace.name == "minimal sizes"]
    return dots


def test_curves_are_drawn_over_shares_and_the_empty_circuit_apart():
    figure = plot_curves([DENSE])
    (line,) = lines(figure).values()
    assert list(line.x) == [0.5 / 57, None, 1 / 57, 4 / 57, 20 / 57, 30 / 57, 1]
    assert list(line.y) == [0.0, None, 0.25, 0.375, 0.5, 0.9375, 1.0]
    axis = figure.layout.xaxis
    assert (axis.type, axis.tickvals, axis.ticktext) == ("log", (0.5 / 57, 0.1, 1), ("0", "10%", "100%"))
    assert 10 ** axis.range[0] < 0.5 / 57 and 10 ** axis.range[1] > 1
    assert "<br>4 edges (7.02%)<br>faithfulness 0.375" in line.text[3]


def test_a_large_dot_is_on_the_first_circuit_that_reaches_the_threshold():
    (line,) = lines(plot_curves([DENSE], threshold=0.5)).values()
    assert [x for x, size in zip(line.x, line.marker.size, strict=True) if size == 10] == [20 / 57]
    (line,) = lines(plot_curves([DENSE])).values()
    assert [y for y, size in zip(line.y, line.marker.size, strict=True) if size == 10] == [0.9375]


def test_the_sparsest_is_first_and_blue_the_densest_last_and_vermilion():
    figure = plot_curves([DENSE, SPARSE])
    assert list(lines(figure)) == [
        "' sparse' after '&lt;s&gt; there was a': 3 edges (5.26%)",
        "' dense' after '&lt;s&gt; there was a': 30 edges (52.6%)",
    ]
    assert [trace.line.color for trace in lines(figure).values()] == [COLOURS["head"], COLOURS["mlp"]]
    labels = [note.text for note in figure.layout.annotations if note.xanchor == "left"][:2]
    assert labels == ["' sparse' after '&lt;s&gt; there was a'", "' dense' after '&lt;s&gt; there was a'"]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_few_curves_differ_in_colour_and_in_dash(count):
    figure = plot_curves([first_at(size, top_text=f" {size}") for size in range(2, count + 2)])
    looks = [trace.line for trace in lines(figure).values()]
    assert len({look.color for look in looks}) == len({look.dash for look in looks}) == count
    assert (looks[0].color, looks[-1].color) == (COLOURS["head"], COLOURS["mlp"])
    assert all(trace.showlegend for trace in lines(figure).values())
    dots = rows(figure)
    assert list(dots.marker.color[::2]) == [look.color for look in looks]


def test_a_row_has_a_dot_for_each_threshold_that_all_curves_have():
    more = replace(SPARSE, thresholds=(0.25, 0.5, 0.9))
    figure = plot_curves([DENSE, more])
    dots = rows(figure)
    assert list(dots.x) == [2 / 57, 3 / 57, 20 / 57, 30 / 57]
    assert list(dots.y) == [0, 0, 1, 1]
    assert dots.marker.size[1] > dots.marker.size[0]  # that of the threshold 0.9
    assert "minimal size for 0.5: 20 edges (35.1%)" in dots.text[2]
    (ranges,) = [trace for trace in figure.data if trace.name == "ranges"]
    np.testing.assert_equal(ranges.x, [2 / 57, 3 / 57, np.nan, 20 / 57, 30 / 57, np.nan])
    assert any("for 0.5, <b>0.9</b>, from left to right" in note.text for note in figure.layout.annotations)
    low, high = figure.layout.yaxis2.range
    assert low > 1 > 0 > high  # the first row on top


def test_a_threshold_that_curves_were_not_refined_for_is_drawn_and_said_to_be_coarse():
    figure = plot_curves([DENSE, SPARSE], threshold=0.75)
    assert list(rows(figure).x) == [2 / 57, 3 / 57, 3 / 57, 20 / 57, 30 / 57, 30 / 57]
    assert figure.layout.title.subtitle.text.endswith("<br>2 of 2 curves are coarse around 0.75")
    assert "coarse" not in plot_curves([DENSE]).layout.title.subtitle.text


def test_a_prediction_that_needs_no_edge_is_at_0():
    figure = plot_curves([DENSE, make_curve([0, 1], [0.9375, 0.9375])])
    assert list(rows(figure).x[:2]) == [0.5 / 57, 0.5 / 57]
    assert "minimal size for 0.9: 0 edges (0%)" in rows(figure).text[1]


def test_entropy_and_share_are_at_the_end_of_a_row():
    notes = [note.text for note in plot_curves([SPARSE]).layout.annotations]
    assert "5.26% · 1.25 nats" in notes


def test_a_second_axis_counts_edges_if_all_graphs_are_as_large():
    axis = plot_curves([DENSE, SPARSE]).layout.xaxis2
    assert (axis.visible, axis.matches) == (True, "x")
    assert dict(zip(axis.ticktext, axis.tickvals, strict=True)) == {"1": 1 / 57, "10": 10 / 57}
    figure = plot_curves([DENSE, first_at(3, graph=TokenGraph(2, 3, 5))])
    assert figure.layout.xaxis2.visible is False
    assert "57 to 78 edges" in figure.layout.title.subtitle.text


def test_many_curves_are_coloured_by_size_and_have_a_bar_instead_of_a_legend():
    figure = plot_curves([first_at(size) for size in (2, 3, 4, 8, 16, 20, 32)])
    drawn = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert not any(trace.showlegend for trace in drawn)
    assert [drawn[i].line.color for i in (0, 3, -1)] == [
        "rgb(0, 114, 178)",  # COLOURS["head"]
        "rgb(110, 110, 110)",  # COLOURS["residual"]: 8 is halfway from 2 to 32 on a logarithmic scale
        "rgb(213, 94, 0)",  # COLOURS["mlp"]
    ]
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == pytest.approx((np.log10(2 / 57), np.log10(32 / 57)))
    assert axis.colorbar.ticktext == ("3.51%", "14%", "56.1%")
    assert rows(figure).marker.color[:2] == pytest.approx([np.log10(2 / 57)] * 2)
    assert any("after" in note.text for note in figure.layout.annotations)


def test_so_many_curves_that_rows_have_no_names():
    figure = plot_curves([first_at(size) for size in range(2, 24)])
    assert not any("after" in note.text for note in figure.layout.annotations)
    assert "after '&lt;s&gt; there was a'" in rows(figure).text[0]
    assert len(plot_curves([SPARSE] * 200).data) == 203


def test_curves_that_need_the_same_are_drawn_too():
    assert len(plot_curves([SPARSE] * 7).data) == 10


def test_a_tight_curve_is_a_step():
    plain, tight = lines(plot_curves({"plain": SPARSE, "tight": TightCurve.of(DENSE, [], [])})).values()
    assert (plain.line.shape, tight.line.shape) == (None, "hv")
    assert lines(plot_curves([SPARSE, TightCurve.of(DENSE, [], [])])).keys() == {
        "' sparse' after '…was a', norm, greedy: 3 edges (5.26%)",
        "' dense' after '…was a', tight: 30 edges (52.6%)",
    }


@pytest.mark.parametrize("given", ["names", "mapping"])
def test_names_can_be_given(given):
    names = ["one", "an <i>other</i>"]
    if given == "names":
        figure = plot_curves([SPARSE, DENSE], names=names)
    else:
        figure = plot_curves(dict(zip(names, [SPARSE, DENSE], strict=True)))
    assert list(lines(figure)) == ["one: 3 edges (5.26%)", "an &lt;i&gt;other&lt;/i&gt;: 30 edges (52.6%)"]
    assert "' dense' after '&lt;s&gt; there was a'" in rows(figure).text[-1]


def test_a_long_prompt_is_named_by_its_end_from_the_start_of_a_word():
    curve = first_at(4, texts=("<s>", *[f" word{i}" for i in range(50)], " and shook his"), top_text=" head")
    (name,) = lines(plot_curves([curve]))
    assert name == "' head' after '…and shook his': 4 edges (7.02%)"


def test_what_sets_curves_apart_is_in_their_names_and_the_rest_in_the_title():
    other = replace(DENSE, conditions=Conditions(keep_residual=True))
    figure = plot_curves([SPARSE, other])
    assert figure.layout.title.subtitle.text.startswith("tiny · edges by norm, greedy · token graph · 57 edges")
    plain, kept = lines(figure)
    assert "all skips kept" not in plain
    assert ", all skips kept: 30 edges" in kept


def test_tasks_are_called_by_their_name_and_have_no_entropy():
    curve = make_curve([0, 4], [-0.5, 0.9375], task=TASK, metric="logit_diff")
    figure = plot_curves([curve])
    assert list(lines(figure)) == ["&lt;b&gt;&#36;a&#36;&lt;/b&gt;: 4 edges (7.02%)"]
    assert figure.layout.title.text == "How much does this task need?"
    assert figure.layout.yaxis.title.text == "faithfulness (logit_diff)"
    assert figure.layout.yaxis.range[0] < -0.5
    assert "nats" not in figure.to_json()
    assert ": 2 pairs" in rows(figure).text[0]


def test_hostile_text_is_shown_as_it_is():
    figure = plot_curves([SPARSE, make_curve([4], [0.9375], texts=HOSTILE, top_text=HOSTILE[1])], names=["$1", "<i>"])
    written = " ".join([
        figure.layout.title.subtitle.text, *(trace.name for trace in figure.data),
        *(note.text for note in figure.layout.annotations),
        *(text for trace in figure.data for text in trace.text or ()),
    ])  # fmt: skip
    assert "</script>" in html.unescape(written)
    assert set(re.findall(r"<[^>]*>", written)) <= {"<br>", "<b>", "</b>"}
    assert not set("$\n\u202e") & set(written)


@pytest.mark.parametrize("count", [2, 7])
def test_a_dark_figure_has_dark_colours_only(count):
    figure = plot_curves([first_at(size) for size in range(2, count + 2)], theme="dark")
    assert set(re.findall("#[0-9A-F]{6}", figure.to_json())) <= set(DARK.values())
    ends = [trace.line.color for trace in figure.data if trace.mode == "lines+markers"][:: count - 1]
    assert ends == (
        [DARK[COLOURS["head"]], DARK[COLOURS["mlp"]]] if count == 2 else ["rgb(86, 180, 233)", "rgb(232, 112, 42)"]
    )


@pytest.mark.parametrize(
    ("curves", "options", "words"),
    [
        pytest.param([], {}, "`curves` must be at least one density curve, got none", id="nothing"),
        pytest.param([DENSE, replace(DENSE, metric="kl")], {}, "must be of one metric, got kl, tv", id="metrics"),
        pytest.param([DENSE], {"names": ["a", "b"]}, "one for each of 1 curves, got 2", id="too many names"),
        pytest.param({"a": DENSE}, {"names": ["b"]}, r"must be left out .*got \['b'\]", id="two sets of names"),
        pytest.param([DENSE], {"threshold": 1.5}, "above 0 and at most 1", id="threshold"),
        pytest.param([DENSE], {"theme": "blue"}, "`theme` must be 'light' or 'dark', got 'blue'", id="theme"),
    ],
)
def test_what_cannot_be_compared_is_refused(curves, options, words):
    with pytest.raises(ValueError, match=words):
        plot_curves(curves, **options)


def test_what_is_no_curve_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"must be density curves, as `td\.density` makes them, got str"):
        plot_curves([DENSE, "curve"])
