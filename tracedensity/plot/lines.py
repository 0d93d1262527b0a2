"""Many edges as few traces: lines end to end with gaps, points under the mouse, and what the legend says of widths."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int, Shaped
from numpy import ndarray

from tracedensity.plot.theme import MUTED, WIDTHS, rounded


def joined(
    x: Float[ndarray, "line step"],
    y: Float[ndarray, "line step"],
    name: str,
    line: dict[str, Any],
    *,
    opacity: float = 1.0,
) -> go.Scatter:
    """Lines through their corners, end to end; those with fewer corners than others have NaN in place of the last."""
    corners = [np.pad(each, ((0, 0), (0, 1)), constant_values=np.nan) for each in (x, y)]
    needed = np.ones_like(corners[0], dtype=bool)
    needed[:, 1:] = ~np.isnan(corners[0][:, :-1])  # one gap after each line is enough
    xs, ys = (each[needed].astype(np.float32) for each in corners)
    return go.Scatter(
        x=xs, y=ys, mode="lines", line=line, opacity=opacity, name=name, legendgroup=name, showlegend=False,
        hoverinfo="skip",
    )  # fmt: skip


def in_legend(name: str, colour: str, width: float) -> go.Scatter:
    """An entry of the legend, legible however faint the lines are that it stands for."""
    line = {"color": colour, "width": width}
    return go.Scatter(
        x=[np.nan], y=[np.nan], mode="lines", line=line, name=name, legendgroup=name, showlegend=True, hoverinfo="skip"
    )


def touched(
    x: Float[ndarray, " point"],
    y: Float[ndarray, " point"],
    said: Shaped[ndarray, "all column"],
    template: str,
    name: str,
    colour: str | list[str],
) -> go.Scatter:
    """Points without ink, and without an element of the page each, that answer the mouse."""
    return go.Scatter(
        x=x.astype(np.float32), y=y.astype(np.float32), mode="none", customdata=said, hovertemplate=template,
        hoverlabel={"bordercolor": colour}, name=name, showlegend=False,
    )  # fmt: skip


def width_classes(importance: Float[ndarray, " edge"], strongest: float) -> Int[ndarray, " edge"]:
    """Which of `WIDTHS` each edge has."""
    if strongest <= 0:
        return np.zeros(len(importance), dtype=np.int64)
    return np.searchsorted([share for share, _ in WIDTHS[1:]], importance / strongest, side="right")


def width_entries(classes: Int[ndarray, " edge"], strongest: float, signed: bool) -> list[go.Scatter]:
    """Entries of the legend that say which score is how wide."""
    if strongest <= 0:
        return []
    what = "|score| " if signed else "score "
    entries = []
    for place in np.unique(classes).tolist():
        bound = WIDTHS[max(place, 1)][0] * strongest
        entries.append(in_legend(f"{what}{'≥' if place else '<'} {rounded(bound)}", MUTED, WIDTHS[place][1]))
        what = ""
    return entries
