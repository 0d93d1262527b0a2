"""Figures of activations: where heads attend, and which heads or neurons write most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import torch

from tracedensity.activations import Activations, Head, Top, head_name
from tracedensity.plot.theme import (
    COLOURS,
    NARROW,
    SEQUENTIAL,
    Theme,
    colour_bar,
    colour_scale,
    finished,
    plain,
    quoted,
    rounded,
    shortened,
    token,
    visible,
)  # fmt: skip

MAX_HEADS = 12
"""Heads that one figure shows."""

_WIDE = 1200  # px that a screen has
_MAX_LABELS = 44  # along an axis; where there are more tokens, not all have one
_KINDS = {"heads": "head", "neurons": "mlp"}
_LENGTH = 9  # characters of a token's text
_BAR, _GAP, _TITLE = 64, 10, 26  # px: the colour bar, between panels, above each
_LABEL, _MARGINS = 10, 32  # px: from one label to the next; beside a figure on its page


def plot_attention(
    activations: Activations, heads: str | Sequence[str] | None = None, *, n: int = 6, theme: Theme | str = "light"
) -> go.Figure:
    """Attention patterns, a panel for each head: rows are the tokens that attend, columns what they attend to.

    Args:
        activations: What was captured, patterns among it.
        heads: Names such as ``"a3.h1"``, up to `MAX_HEADS`; if none are given, those that write most at the last token
            or, where `z` was not captured, the first ones.
        n: How many to show if none are given.
        theme: "light" or "dark".

    Raises:
        ValueError: If patterns were not captured, there is no such head, or there are none or too many.
    """
    shown, which = _chosen(activations, heads, n)
    texts = activations.texts
    grid = _Grid.of(len(shown), texts)
    places = [f"{place} {token(text, _LENGTH)}" for place, text in enumerate(texts)]  # numbers tell equal tokens apart
    later = torch.ones(len(texts), len(texts), dtype=torch.bool).triu(1)
    figure = go.Figure()
    for i, head in enumerate(shown):
        figure.add_heatmap(
            x=places, y=places, z=head.pattern.float().cpu().masked_fill(later, torch.nan).numpy(),
            xaxis=f"x{i + 1}", yaxis=f"y{i + 1}", coloraxis="coloraxis", name=head.name, hoverongaps=False,
            hovertemplate=f"<b>{head.name}</b><br>from %{{x}}<br>to %{{y}}<br>weight %{{z:.3f}}<extra></extra>",
        )  # fmt: skip
        _add_axes(figure, grid, i, head.name)
    length = min(grid.height, 240)
    bar = colour_bar("attention weight", len=length, lenmode="pixels", y=1, yanchor="top", dtick=0.2)
    scale = colour_scale(SEQUENTIAL)
    figure.update_layout(coloraxis={"colorscale": scale, "cmin": 0, "cmax": 1, "colorbar": bar})
    return finished(
        figure,
        f"Attention of {shown[0].name if len(shown) == 1 else f'{len(shown)} heads'}",
        [plain(activations.transformer.name), quoted(activations.prompt), which],
        plot_height=grid.height,
        theme=theme,
        above=_TITLE,
        below=grid.along,
        left=grid.along,
        right=_BAR,
        min_width=grid.min_width,
    )


def _chosen(activations: Activations, heads: str | Sequence[str] | None, n: int) -> tuple[list[Head], str]:
    """Heads, and how they were chosen if nobody named them."""
    which = ""
    if heads is None:
        if not 1 <= n <= MAX_HEADS:
            raise ValueError(f"`n` must be from 1 to {MAX_HEADS}, got {n}. More heads need more figures.")
        n_heads = activations.transformer.n_heads
        n = min(n, len(activations.layers) * n_heads)
        if "z" in activations.values:
            heads, which = activations.top_heads(n).names, "heads that write most at the last token"
        else:
            heads = [head_name(layer, head) for layer in activations.layers for head in range(n_heads)][:n]
            which = "the first heads: `z`, which says how much they write, was not captured"
    heads = [heads] if isinstance(heads, str) else heads
    if not 1 <= len(heads) <= MAX_HEADS:
        raise ValueError(f"`heads` must be 1 to {MAX_HEADS} names, got {len(heads)}. More heads need more figures.")
    return [activations.head(name) for name in heads], which


@dataclass(frozen=True)
class _Grid:
    """Where panels are, in px.

    Attributes:
        n_panels: How many there are.
        columns: How many of them side by side.
        panel: Height of one.
        along: Room for labels and a title beside an axis.
        step: Every how many tokens there is a label.
        min_width: Of the figure.
    """

    n_panels: int
    columns: int
    panel: int
    along: int
    step: int
    min_width: int

    @classmethod
    def of(cls, n_panels: int, texts: Sequence[str]) -> "_Grid":
        """As many columns as fit on a narrow page, or else on a wide one, but no more than three."""
        longest = max(len(shortened(visible(text), _LENGTH)) for text in texts) + 1 + len(str(len(texts) - 1))
        step = -(-len(texts) // _MAX_LABELS)
        panel = _LABEL * min(len(texts), _MAX_LABELS)
        along = 6 * longest + 28
        widths = {columns: along + _BAR + columns * (panel + _GAP) - _GAP for columns in range(1, min(n_panels, 3) + 1)}
        narrow = NARROW - _MARGINS
        fit = [columns for limit in (_WIDE, narrow) for columns in widths if columns > 1 and widths[columns] <= limit]
        columns = fit[-1] if fit else 1
        return cls(n_panels, columns, max(panel, 200), along, step, max(widths[columns], NARROW))

    @property
    def height(self) -> int:
        return -(-self.n_panels // self.columns) * (self.panel + _TITLE) - _TITLE

    def domains(self, i: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Where the panel of that number is, across and up, as shares of all."""
        row, column = divmod(i, self.columns)
        gap = 0.03  # no number of px, because the width is known to the browser only
        across, up = (1 - gap * (self.columns - 1)) / self.columns, self.panel / self.height
        left, top = column * (across + gap), 1 - row * (self.panel + _TITLE) / self.height
        return (left, left + across), (max(top - up, 0.0), top)


def _add_axes(figure: go.Figure, grid: _Grid, i: int, name: str) -> None:
    """Axes of a panel, which zoom together with those of others, and its name above."""
    across, up = grid.domains(i)
    lowest, leftmost = i + grid.columns >= grid.n_panels, i % grid.columns == 0
    shared: dict[str, Any] = {
        "tick0": 0, "dtick": grid.step, "tickfont": {"size": _LABEL - 1}, "ticks": "", "showline": False,
    }  # fmt: skip
    figure.update_layout({
        f"xaxis{i + 1}": {
            **shared, "domain": across, "anchor": f"y{i + 1}", "matches": "x" if i else None, "tickangle": -90,
            "showticklabels": lowest, "title": {"text": "from (src)" if lowest else ""},
        },
        f"yaxis{i + 1}": {
            **shared, "domain": up, "anchor": f"x{i + 1}", "matches": "y" if i else None, "autorange": "reversed",
            "showticklabels": leftmost, "title": {"text": "to (dest)" if leftmost else ""},
        },
    })  # fmt: skip
    figure.add_annotation(
        x=across[0], xref="paper", xanchor="left", y=up[1], yref="paper", yanchor="bottom", showarrow=False,
        text=f"<b>{name}</b>",
    )  # fmt: skip


def plot_top(top: Top, *, theme: Theme | str = "light") -> go.Figure:
    """The heads or neurons that write most, as bars, the largest on top."""
    norms = top.norm.tolist()
    n_rows = min(max(len(norms), 3), _MAX_LABELS)  # of more bars, some have a name
    figure = go.Figure()
    figure.add_bar(
        x=norms, y=top.names, orientation="h", name=top.kind, marker={"color": COLOURS[_KINDS[top.kind]]},
        text=[rounded(norm, 3) for norm in norms] if len(norms) <= n_rows else None,
        textposition="outside", textfont={"size": 11}, cliponaxis=False,
        hovertemplate="<b>%{y}</b><br>norm %{x:.4g}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        bargap=0.3,
        xaxis={"rangemode": "tozero", "title": {"text": "L2 norm of what is written"}},
        yaxis={"autorange": "reversed", "ticks": "", "tickfont": {"size": 11}},
    )
    return finished(
        figure,
        f"{top.kind.capitalize()} that write most at token {top.position}, {quoted(top.token, 14)}",
        ["a large vector need not matter for the prediction"],
        plot_height=20 * n_rows,
        theme=theme,
        right=56,
    )
