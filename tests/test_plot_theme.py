"""The look of figures: colours that can be told apart, light and dark, and text that fits."""

from itertools import combinations

import numpy as np
import plotly.graph_objects as go
import pytest

from tracedensity.plot import dark, theme

# What is seen without one kind of cones: Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SEEN = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def linear(colour):
    rgb = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(colour, seen):
    """CIE L*a*b* of a colour as it is seen."""
    xyz = np.array(TO_XYZ) @ np.clip(np.array(seen) @ linear(colour), 0, 1) / [0.95047, 1.0, 1.08883]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def luminance(colour):
    return float(np.array(TO_XYZ[1]) @ linear(colour))


def contrast(one, other):
    """As WCAG 2 has it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("kind", ["light", "dark"])
@pytest.mark.parametrize("seen", SEEN)
def test_no_two_colours_look_alike(kind, seen):
    palette = [colour if kind == "light" else theme.DARK[colour] for colour in theme.COLOURS.values()]
    for one, other in combinations(palette, 2):
        assert np.linalg.norm(lab(one, SEEN[seen]) - lab(other, SEEN[seen])) > 12, (one, other)


@pytest.mark.parametrize("kind", ["light", "dark"])
def test_text_and_lines_stand_out_from_the_ground(kind):
    def shown(colour):
        return colour if kind == "light" else theme.DARK[colour]

    assert contrast(shown(theme.INK), shown(theme.PAPER)) > 12
    assert contrast(shown(theme.MUTED), shown(theme.PAPER)) > 4.5
    for name, colour in theme.COLOURS.items():
        assert contrast(shown(colour), shown(theme.PAPER)) > 2.1, name


def test_scales_go_one_way_and_their_ends_are_far_apart():
    for scale in (theme.SEQUENTIAL, tuple(theme.DARK[colour] for colour in theme.SEQUENTIAL)):
        steps = np.diff([luminance(colour) for colour in scale])
        assert (steps < 0).all() or (steps > 0).all()
        assert contrast(scale[0], scale[-1]) > 7


def test_no_two_colours_are_one_in_the_dark():
    assert len(set(theme.DARK.values())) == len(theme.DARK)


def test_dark_replaces_colours_wherever_they_are_and_leaves_text_alone():
    light = go.Figure(
        go.Scatter(x=[0], y=[0], marker={"color": [theme.INK]}, text=[f"{theme.INK} is a colour"], name=theme.INK),
        {"xaxis": {"ticktext": [f'<span style="color:{theme.MUTED}">a</span>'], "tickvals": [0]}},
    )
    light.add_heatmap(z=[[1]], colorscale=theme.colour_scale(theme.SEQUENTIAL))
    made = dark(light)
    assert made.data[0].marker.color == (theme.DARK[theme.INK],)
    assert made.data[0].text == (f"{theme.INK} is a colour",)
    assert made.data[0].name == theme.INK
    assert made.layout.xaxis.ticktext == (f'<span style="color:{theme.DARK[theme.MUTED]}">a</span>',)
    assert made.data[1].colorscale[0][1] == theme.DARK[theme.SEQUENTIAL[0]]
    assert light.data[0].marker.color == (theme.INK,)


def test_titles_and_legends_fit_narrow_windows():
    figure = go.Figure([go.Scatter(x=[0], y=[0], name="a name of some length " * 2, showlegend=True)] * 3)
    theme.finished(figure, "word " * 20, ["part " * 5, "part " * 3, "x" * 100], plot_height=100, below=50)
    title = figure.layout.title
    assert max(map(len, title.text.split("<br>"))) <= 44
    assert [len(line) for line in title.subtitle.text.split("<br>")] == [42, 60, 40]
    assert figure.layout.margin.b == 50 + 3 * 20 + 8  # each entry a line of its own
    assert figure.layout.height == 100 + figure.layout.margin.t + figure.layout.margin.b


def test_another_theme_is_refused():
    with pytest.raises(ValueError, match="`theme` must be 'light' or 'dark', got 'blue'"):
        theme.finished(go.Figure(), "", [], plot_height=100, theme="blue")


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ("abcdefghij", 10, "abcdefghij"),
        ("abcdefghijk", 10, "abc…fghijk"),
        ("漢字漢字漢字", 12, "漢字漢字漢字"),  # two columns each
        ("漢字漢字漢字", 8, "漢…漢字"),  # 2 of 2 columns, and 4 of 5
    ],
)
def test_long_text_loses_its_middle(text, length, expected):
    assert theme.shortened(text, length) == expected
    assert theme.breadth(expected) <= length
