"""The figures of activations: each weight in its place, the panels that were asked for, and what has labels."""

import html
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import tracedensity as td
from tracedensity.activations import Activations, Top
from tracedensity.plot.attention import _Grid, plot_attention, plot_top
from tracedensity.plot.theme import COLOURS, DARK

HOSTILE = ["<s>", " </script><script>alert(1)</script>", " \"quoted' & $x$", "\n\u202e"]
TOKENS = [1, 2, 3, 2]  # a token twice


@pytest.fixture(scope="module")
def activations(tiny_gpt2):
    return td.capture(tiny_gpt2, TOKENS)


def axes(figure, kind):
    return [figure.layout[f"{kind}axis{i or ''}"] for i in (0, *range(2, len(figure.data) + 1))]


def test_a_panel_holds_the_weights_of_its_head_and_nothing_above_the_diagonal(activations):
    figure = plot_attention(activations, ["a1.h2", "a0.h3"])
    assert [trace.name for trace in figure.data] == ["a1.h2", "a0.h3"]
    for trace, (layer, head) in zip(figure.data, [(1, 2), (0, 3)], strict=True):
        pattern = activations.pattern[layer, head].numpy()
        for dest in range(4):
            np.testing.assert_array_equal(trace.z[dest, : dest + 1], pattern[dest, : dest + 1])
            assert np.isnan(trace.z[dest, dest + 1 :]).all()
        assert trace.hoverongaps is False
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 1)


def test_tokens_are_numbered_because_they_recur(activations):
    (trace,) = plot_attention(activations, "a0.h0").data
    assert list(trace.x) == list(trace.y) == ["0 1", "1 2", "2 3", "3 2"]
    assert trace.hovertemplate == "<b>a0.h0</b><br>from %{x}<br>to %{y}<br>weight %{z:.3f}<extra></extra>"
    assert plot_attention(activations, "a0.h0").layout.yaxis.autorange == "reversed"  # the first token on top


def test_heads_that_write_most_are_shown_if_none_are_named(activations):
    figure = plot_attention(activations, n=3)
    assert [trace.name for trace in figure.data] == activations.top_heads(3).names
    assert "heads that write most at the last token" in figure.layout.title.subtitle.text
    assert len(plot_attention(activations, n=12).data) == 8  # all that there are


def test_the_first_heads_are_shown_where_it_is_not_known_how_much_they_write(tiny_gpt2):
    figure = plot_attention(td.capture(tiny_gpt2, TOKENS, keep="pattern", layers=[1]), n=2)
    assert [trace.name for trace in figure.data] == ["a1.h0", "a1.h1"]
    assert "the first heads: `z`" in figure.layout.title.subtitle.text


def test_only_the_outer_panels_have_labels(activations):
    figure = plot_attention(activations, [f"a0.h{i}" for i in range(4)] + ["a1.h0"])  # three above, two below
    assert [axis.showticklabels for axis in axes(figure, "x")] == [False, False, True, True, True]
    assert [axis.showticklabels for axis in axes(figure, "y")] == [True, False, False, True, False]
    assert [bool(axis.title.text) for axis in axes(figure, "x")] == [False, False, True, True, True]


def test_panels_do_not_overlap_and_each_has_its_name_above(activations):
    figure = plot_attention(activations, n=8)
    places = [(*x.domain, *y.domain) for x, y in zip(axes(figure, "x"), axes(figure, "y"), strict=True)]
    for i, (left, right, low, high) in enumerate(places):
        assert 0 <= left < right <= 1 + 1e-9 and 0 <= low < high <= 1
        for start, end, bottom, top in places[:i]:
            assert left >= end or right <= start or high <= bottom or low >= top
    for note, trace, (left, _, _, high) in zip(figure.layout.annotations, figure.data, places, strict=True):
        assert (note.text, note.x, note.y) == (f"<b>{trace.name}</b>", left, high)


@pytest.mark.parametrize(
    ("n_panels", "n_tokens", "columns", "widest"),
    [
        pytest.param(6, 5, 3, 400, id="three fit on a narrow page"),
        pytest.param(6, 10, 2, 400, id="two do"),
        pytest.param(6, 20, 3, 1200, id="three fit on a wide page"),
        pytest.param(6, 40, 2, 1200, id="two do on that"),
        pytest.param(6, 500, 2, 1200, id="not every token has a label"),
        pytest.param(1, 10, 1, 400, id="one head"),
        pytest.param(1, 40, 1, 700, id="one head on a long prompt"),
    ],
)
def test_as_many_columns_as_can_be_read(n_panels, n_tokens, columns, widest):
    grid = _Grid.of(n_panels, [" it"] * n_tokens)
    assert grid.columns == columns
    assert grid.min_width <= widest
    labels = -(-n_tokens // grid.step)
    plot = grid.min_width - grid.along - 64  # the colour bar
    assert plot / columns >= 10 * labels
    assert grid.panel >= 10 * labels


def test_half_precision_is_drawn_too(activations):
    half = replace(activations, values={name: value.bfloat16() for name, value in activations.values.items()})
    (trace,) = plot_attention(half, "a0.h1").data
    np.testing.assert_allclose(trace.z[3], activations.pattern[0, 1, 3], atol=0.005)


def test_hostile_tokens_are_shown_as_they_are(activations, monkeypatch):
    monkeypatch.setattr(Activations, "texts", property(lambda _: HOSTILE))
    figure = plot_attention(activations, n=2)
    written = " ".join([*figure.data[0].x, figure.layout.title.subtitle.text])
    assert "0 <s>" in html.unescape(written)
    assert set(re.findall(r"<[^>]*>", written)) <= {"<br>"}
    assert not set("$\n\u202e") & set(written)


@pytest.mark.parametrize(
    ("heads", "options", "words"),
    [
        pytest.param(["a0.h0"] * 13, {}, "`heads` must be 1 to 12 names, got 13. More heads need more", id="too many"),
        pytest.param([], {}, "`heads` must be 1 to 12 names, got 0", id="none"),
        pytest.param(None, {"n": 0}, "`n` must be from 1 to 12, got 0", id="n is 0"),
        pytest.param(None, {"n": 13}, "`n` must be from 1 to 12, got 13", id="n is too large"),
        pytest.param("a9.h0", {}, "must be a head of .* from a0.h0 to a1.h3, got 'a9.h0'", id="no such head"),
        pytest.param("m0", {}, "must be that of a head, such as 'a3.h1', got 'm0'", id="no head"),
        pytest.param("a0.h0", {"theme": "blue"}, "`theme` must be 'light' or 'dark', got 'blue'", id="theme"),
    ],
)
def test_what_cannot_be_drawn_is_refused(activations, heads, options, words):
    with pytest.raises(ValueError, match=words):
        plot_attention(activations, heads, **options)


def test_patterns_must_have_been_captured(tiny_gpt2):
    with pytest.raises(ValueError, match="`pattern` must be captured before it is read; held are z"):
        plot_attention(td.capture(tiny_gpt2, TOKENS, keep="z"))


@pytest.mark.parametrize(
    "draw", [lambda it: plot_attention(it, theme="dark"), lambda it: plot_top(it.top_neurons(3), theme="dark")]
)
def test_a_dark_figure_has_dark_colours_only(activations, draw):
    assert set(re.findall("#[0-9A-F]{6}", draw(activations).to_json())) <= set(DARK.values())


TOP = Top("heads", torch.tensor([1, 0]), torch.tensor([3, 2]), torch.tensor([4.0, 0.5]), 7, " <b>$x$")


def test_bars_are_as_long_as_norms_and_the_largest_is_on_top():
    figure = plot_top(TOP)
    (bars,) = figure.data
    assert (list(bars.x), list(bars.y), list(bars.text)) == ([4.0, 0.5], ["a1.h3", "a0.h2"], ["4", "0.5"])
    assert (figure.layout.yaxis.autorange, bars.marker.color) == ("reversed", COLOURS["head"])
    assert figure.layout.xaxis.title.text == "L2 norm of what is written"
    assert figure.layout.title.text == "Heads that write most at token 7, ' &lt;b&gt;&#36;x&#36;'"


def test_neurons_have_their_own_names_and_colour():
    (bars,) = plot_top(replace(TOP, kind="neurons")).data
    assert (list(bars.y), bars.marker.color) == (["m1.n3", "m0.n2"], COLOURS["mlp"])


def test_many_bars_make_no_endless_figure():
    many = torch.arange(500)
    figure = plot_top(Top("neurons", many * 0, many, 500.0 - many, 7, " it"))
    assert figure.layout.height < 1500
    assert figure.data[0].text is None
