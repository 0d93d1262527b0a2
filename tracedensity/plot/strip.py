"""A text whose tokens are coloured by how much of the model the prediction of each needs."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log10
from os import PathLike

from plotly.colors import sample_colorscale, unlabel_rgb

from tracedensity.curve import DensityCurve, require_thresholds
from tracedensity.files import replace_file
from tracedensity.plot.curve import EMPTY
from tracedensity.plot.theme import (
    DARK,
    FONT,
    INK,
    MUTED,
    PAPER,
    SEQUENTIAL,
    Theme,
    colour_scale,
    percent,
    plain,
    quoted,
    visible,
)  # fmt: skip

MAX_LINES = 24
"""Predictions that a strip lists as plain text."""

_SCALE = SEQUENTIAL[1:]  # the first is nearly that of the paper, which is for tokens without a curve
_INKS = ("#000000", "#FFFFFF")  # on every colour, one of these two has a contrast of at least 4.5


@dataclass(frozen=True, repr=False)
class Strip:
    """A text in colours, made by `density_strip`; a notebook shows it as it is.

    Attributes:
        html: A ``<div>`` that needs no style sheet and no script.
        text: The same as plain text: each token with its number of edges.
        theme: "light" or "dark".
    """

    html: str
    text: str
    theme: Theme | str = "light"

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | PathLike[str]) -> None:
        """Write as one HTML file.

        Raises:
            ValueError: If there is no such folder.
        """
        page = (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>tracedensity</title>\n'
            f'</head>\n<body style="margin:0;background:{_in(self.theme, PAPER)}">\n{self.html}\n</body>\n</html>\n'
        )
        replace_file(path, page)


def density_strip(
    curves: Sequence[DensityCurve], *, threshold: float | int = 0.9, theme: Theme | str = "light"
) -> Strip:
    """The tokens of a text, each coloured by the smallest circuit found for the prediction made in its place.

    What the model predicts there, under the mouse, need not be the token that comes. After the text, in italics, is its
    prediction of what comes next. Tokens without a curve have no colour. Colours stand for shares of all edges on a
    logarithmic scale, from the smallest of the text to the largest.

    Args:
        curves: Curves of predictions at positions of one text, for example
            ``[td.density(model, text, position=i, baselines=False) for i in range(1, 9)]``.
        threshold: Faithfulness that circuits have to reach, in (0, 1].
        theme: "light" or "dark".

    Raises:
        ValueError: If there is no curve, they differ in text, model or metric, or two are of one position.
    """
    if theme not in ("light", "dark"):
        raise ValueError(f"`theme` must be 'light' or 'dark', got {theme!r}.")
    require_thresholds((threshold,))
    needs = [_Need(curve, curve.minimal_size(threshold)) for curve in _in_order(curves)]
    least, most = min(needs, key=_Need.log), max(needs, key=_Need.log)
    span = most.log() - least.log()
    scale = [_in(theme, colour) for colour in (_SCALE if span else _SCALE[:1] * 2)]
    places = [(need.log() - least.log()) / (span or 1) for need in needs]
    colours = map(str, sample_colorscale(colour_scale(scale), places))
    whole = needs[-1].curve.provenance
    texts = [*whole.texts, needs[-1].curve.top_text]
    words, lines = [_word(text) for text in whole.texts], []
    for need, colour in zip(needs, colours, strict=True):
        curve, last = need.curve, need is needs[-1]
        place = len(curve.provenance.token_ids)
        style = f"background:{colour};color:{_ink(colour)};border-radius:3px;margin-right:2px;"
        style += f"font-style:italic;outline:2px dotted {_in(theme, MUTED)};padding:0 3px;margin-left:4px;" * last
        predicted = f"{quoted(curve.top_text)}, p = {curve.top_probability:.2f}, entropy {curve.entropy:.2f} nats"
        word = _word(texts[place], style, f"{need} for {threshold:g}\npredicted: {predicted}")
        words[place : place + 1] = [word]  # the last one is appended
        lines.append(f"  {quoted(texts[place], 20):<22}  {need}{'  (predicted)' * last}")
    lines[MAX_LINES:] = [f"  and {len(lines) - MAX_LINES} more"] * (len(lines) > MAX_LINES)
    about = f"smallest circuit for each prediction, faithfulness {threshold:g}, {plain(whole.model)}"
    return Strip(_div(about, words, scale, [least, most][: 1 + (span > 0)], theme), "\n".join([about, *lines]), theme)


@dataclass(frozen=True, eq=False)
class _Need:
    """A curve and its minimal size."""

    curve: DensityCurve
    size: int

    def log(self) -> float:
        """Logarithm of the share of all edges; no edge counts as half of one."""
        return log10(max(self.size, EMPTY) / self.curve.n_edges)

    def __str__(self) -> str:
        return f"{self.size:,} of {self.curve.n_edges:,} edges ({percent(self.size / self.curve.n_edges)})"


def _in_order(curves: Sequence[DensityCurve]) -> list[DensityCurve]:
    """The curves, that of the shortest prompt first, if they are of positions of one text."""
    if not len(curves):
        raise ValueError("`curves` must be at least one density curve, got none: make one for each position of a text.")
    tasks = [plain(task.name) for curve in curves if (task := curve.provenance.named_task) is not None]
    if tasks:
        raise ValueError(f"`curves` must be of a text, got some of tasks: {', '.join(tasks)}. See `plot_curves`.")
    ordered = sorted(curves, key=lambda curve: len(curve.provenance.token_ids))
    for name, values in (
        ("model", {curve.provenance.fingerprint: plain(curve.provenance.model) for curve in curves}),
        ("metric", {curve.metric: plain(curve.metric) for curve in curves}),
    ):
        if len(values) > 1:
            raise ValueError(f"`curves` must be of one {name}, got {', '.join(values.values())}.")
    whole = ordered[-1].provenance
    for one, other in pairwise(about.provenance for about in ordered):
        n_tokens = len(one.token_ids)
        if n_tokens == len(other.token_ids):
            raise ValueError(f"`curves` must be one for each position, got two after {n_tokens} tokens.")
        if one.token_ids != whole.token_ids[:n_tokens]:
            raise ValueError(
                "`curves` must be of positions of one text, each prompt the beginning of the longest, got "
                f"{quoted(one.prompt)} and {quoted(whole.prompt)}."
            )
    return ordered


def _div(about: str, words: Sequence[str], scale: Sequence[str], ends: Sequence[_Need], theme: Theme | str) -> str:
    """The text, below it its scale."""
    muted = f"color:{_in(theme, MUTED)};font-size:12px"
    low, *high = [
        f"<span>{percent(end.size / end.curve.n_edges)} ({end.size:,} edge{'s' * (end.size != 1)})</span>"
        for end in ends
    ]
    bar = f'<span style="width:120px;height:10px;background:linear-gradient(to right,{",".join(scale)})"></span>'
    return (
        f'<div style="font:16px/2 {FONT};color:{_in(theme, INK)};background:{_in(theme, PAPER)};padding:16px">\n'
        f'<div style="{muted}">{html.escape(about)}; share of all edges on a log scale</div>\n'
        f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{"".join(words)}</div>\n'
        f'<div style="{muted};display:flex;flex-wrap:wrap;gap:0 8px;align-items:center;margin-top:8px">'
        f"{low}{bar}{''.join(high)}</div>\n</div>"
    )


def _word(text: str, style: str = "", about: str = "") -> str:
    """A token as one block: not broken after its leading space, nor moved where it is written from right to left."""
    title = f' title="{html.escape(about)}"'.replace("\n", "&#10;") if about else ""
    style = f"display:inline-block;line-height:1.5;max-width:100%;{style}"
    return f'<span style="{style}"{title}>{html.escape(visible(text))}</span>'


def _in(theme: Theme | str, colour: str) -> str:
    return DARK[colour] if theme == "dark" else colour


def _ink(ground: str) -> str:
    """That of the two inks which is read more easily on a colour such as ``rgb(1, 2, 3)``.

    References:
        Web Content Accessibility Guidelines 2.1, relative luminance and contrast ratio.
    """
    parts = [part / 255 for part in unlabel_rgb(ground)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _INKS[0] if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else _INKS[1]
