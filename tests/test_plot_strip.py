"""The coloured text: which token has which colour, what is said of it, and that no text of a prompt is ever run."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import drawn
import pytest
import torch

from tracedensity.extract import Ranking
from tracedensity.graph import unflatten
from tracedensity.graph.token import TokenGraph
from tracedensity.plot.strip import _SCALE, _ink, density_strip
from tracedensity.plot.theme import DARK
from tracedensity.provenance import Provenance
from tracedensity.task import Task

GRAPH = TokenGraph(n_layers=2, n_heads=3, n_pos=4)  # 57 edges
TEXTS = ("<s>", " there", " was", " a")
HOSTILE = ("<s>", " </script><script>alert(1)</script>", "\" onclick='alert(2)' & $x$", "\n\u202e")


def make_curve(size, texts, top_text=" man", ids=None, task=None):
    """A curve that reaches 0.9 at one size, of what follows some texts."""
    about = Provenance("tiny", "abc", tuple(ids or range(len(texts))), tuple(texts), "norm", task=task)
    rank = unflatten(GRAPH, torch.arange(57, dtype=torch.int32).flip(0), -1)
    made = drawn.make_curve([size], [0.9375], top_text=top_text)
    return replace(made, ranking=Ranking(GRAPH, rank, "greedy", about))


# predictions of " was", of " a", and of what follows
CURVES = [make_curve(2, TEXTS[:2]), make_curve(32, TEXTS[:3], " the"), make_curve(8, TEXTS, " man")]


class Reader(HTMLParser):
    """The words of a strip: text, style and tooltip of each; and all tags and attributes that there are."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.attributes, self._depth = [], set(), set(), 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        known = dict(attributes)
        if "inline-block" in known.get("style", ""):
            self.words.append(["", known["style"], known.get("title")])

    def handle_data(self, data):
        if self.words and self.words[-1][0] == "":
            self.words[-1][0] = data


def words(strip):
    return Reader(strip.html).words


def ground(style):
    found = re.search(r"background:(rgb\([^)]*\))", style)
    return found and found[1]


def test_the_token_after_a_prompt_has_its_colour_and_the_last_one_is_the_prediction():
    found = words(density_strip(CURVES))
    assert [text for text, _, _ in found] == ["<s>", " there", " was", " a", " man"]
    assert [bool(ground(style)) for _, style, _ in found] == [False, False, True, True, True]
    assert ["italic" in style and "dotted" in style for _, style, _ in found] == [False] * 4 + [True]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_on_a_logarithmic_scale_of_shares(theme):
    scale = [tuple(bytes.fromhex(colour[1:])) for colour in (_SCALE if theme == "light" else map(DARK.get, _SCALE))]
    colours = [ground(style) for _, style, _ in words(density_strip(CURVES, theme=theme))][2:]
    half = tuple(round((one + other) / 2) for one, other in zip(scale[1], scale[2], strict=True))
    for colour, expected in zip(colours, (scale[0], scale[3], half), strict=True):  # 8 is halfway from 2 to 32
        assert [int(part) for part in re.findall(r"\d+", colour)] == pytest.approx(expected, abs=1)


def test_the_tooltip_says_how_much_is_needed_and_what_was_predicted():
    tips = [tip for _, _, tip in words(density_strip(CURVES))]
    assert tips[:2] == [None, None]
    assert tips[3] == "32 of 57 edges (56.1%) for 0.9\npredicted: ' the', p = 0.50, entropy 1.25 nats"


def test_the_scale_is_labelled_with_its_ends():
    strip = density_strip(CURVES).html
    low, high = strip.index("3.51% (2 edges)"), strip.index("56.1% (32 edges)")
    assert low < strip.index(f"linear-gradient(to right,{','.join(_SCALE)})") < high


def test_one_prediction_makes_a_strip_of_one_colour():
    strip = density_strip(CURVES[:1])
    assert ground(words(strip)[-1][1]) == "rgb(191, 215, 234)"
    assert strip.html.count("3.51% (2 edges)") == 1
    assert f"linear-gradient(to right,{_SCALE[0]},{_SCALE[0]})" in strip.html
    assert "(1 edge)" in density_strip([make_curve(1, TEXTS)]).html


def test_what_needs_no_edge_has_a_colour_below_that_of_one_edge():
    none, one = [
        ground(style) for _, style, _ in words(density_strip([make_curve(0, TEXTS[:3]), make_curve(1, TEXTS)]))
    ][3:]
    assert (none, one) == ("rgb(191, 215, 234)", "rgb(8, 64, 107)")  # the ends of the scale


def test_positions_may_be_left_out_and_given_in_any_order():
    assert density_strip(CURVES[::-1]).html == density_strip(CURVES).html
    assert [bool(ground(style)) for _, style, _ in words(density_strip(CURVES[::2]))] == [False] * 2 + [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(theme):
    scale = _SCALE if theme == "light" else [DARK[colour] for colour in _SCALE]
    stops = torch.tensor([list(bytes.fromhex(colour[1:])) for colour in scale], dtype=torch.float64)
    for place in torch.linspace(0, 3, 301).tolist():
        low = min(int(place), 2)
        colour = stops[low] + (place - low) * (stops[low + 1] - stops[low])
        ink = _ink(f"rgb({', '.join(map(str, colour.tolist()))})")
        black_or_white = torch.full((3,), {"#000000": 0.0, "#FFFFFF": 255.0}[ink], dtype=torch.float64)
        dark, light = sorted([luminance(colour), luminance(black_or_white)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def luminance(colour):
    """Of the Web Content Accessibility Guidelines."""
    parts = colour / 255
    linear = torch.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64))


def test_hostile_text_is_shown_and_never_run():
    strip = density_strip([make_curve(2 + i, HOSTILE[:i], HOSTILE[2]) for i in range(1, 5)])
    reader = Reader(strip.html)
    assert reader.tags == {"div", "span"}
    assert reader.attributes == {"style", "title"}
    assert [text for text, _, _ in reader.words] == [*HOSTILE[:3], r"↵\u202e", HOSTILE[2]]
    assert HOSTILE[2] in reader.words[-1][2]
    assert "\u202e" not in strip.html + repr(strip)


def test_as_plain_text_it_lists_tokens_and_sizes():
    assert repr(density_strip(CURVES)).splitlines() == [
        "smallest circuit for each prediction, faithfulness 0.9, tiny",
        "  ' was'                  2 of 57 edges (3.51%)",
        "  ' a'                    32 of 57 edges (56.1%)",
        "  ' man'                  8 of 57 edges (14%)  (predicted)",
    ]
    texts = [f" {i}" for i in range(40)]
    lines = repr(density_strip([make_curve(2, texts[:i]) for i in range(1, 31)])).splitlines()
    assert (len(lines), lines[-1]) == (26, "  and 6 more")


def test_a_notebook_shows_the_html_and_a_file_is_a_page(tmp_path):
    strip = density_strip(CURVES, theme="dark")
    assert strip._repr_html_() == strip.html
    strip.save(tmp_path / "strip.html")
    page = (tmp_path / "strip.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert strip.html in page and "background:#15171B" in page.split(strip.html)[0]
    assert "<script" not in page
    with pytest.raises(ValueError, match="`path` must be a file in a folder that exists"):
        strip.save(tmp_path / "nowhere" / "strip.html")


OTHER = make_curve(2, TEXTS[:2], ids=[0, 9])


@pytest.mark.parametrize(
    ("curves", "options", "words"),
    [
        pytest.param([], {}, "`curves` must be at least one density curve, got none", id="nothing"),
        pytest.param([OTHER, CURVES[2]], {}, "each prompt the beginning of the longest, got '<s> there'", id="text"),
        pytest.param([CURVES[0], OTHER], {}, "must be one for each position, got two after 2 tokens", id="twice"),
        pytest.param([CURVES[0], replace(CURVES[1], metric="kl")], {}, "of one metric, got tv, kl", id="metric"),
        pytest.param(
            [make_curve(2, TEXTS, task=Task([[1]], [[2]], [3], [4], name="why"))], {},
            "must be of a text, got some of tasks: why. See `plot_curves`", id="a task",
        ),
        pytest.param(CURVES, {"threshold": 0.0}, "above 0 and at most 1", id="threshold"),
        pytest.param(CURVES, {"theme": "blue"}, "`theme` must be 'light' or 'dark', got 'blue'", id="theme"),
    ],
)  # fmt: skip
def test_what_makes_no_strip_is_refused(curves, options, words):
    with pytest.raises(ValueError, match=words):
        density_strip(curves, **options)


def test_curves_of_two_models_make_no_strip():
    about = replace(CURVES[1].provenance, model="other", fingerprint="xyz")
    with pytest.raises(ValueError, match="must be of one model, got tiny, other"):
        density_strip([CURVES[0], replace(CURVES[1], ranking=replace(CURVES[1].ranking, provenance=about))])
