"""The figure of thresholds chosen where a curve bends."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from tracedensity.plot.theme import COLOURS, INK, Theme, finished, percent, require_result, share_ticks

if TYPE_CHECKING:
    from tracedensity.study.knees import Thresholds


def plot_thresholds(thresholds: "Thresholds", *, theme: Theme | str = "light") -> go.Figure:
    """The mean curve, its straight pieces, and where each choice falls when documents are resampled.

    Args:
        thresholds: What `tracedensity.study.thresholds` has found.
        theme: "light" or "dark".

    Raises:
        ValueError: If it is something else.
    """
    from tracedensity.study.knees import Thresholds

    require_result("thresholds", thresholds, Thresholds, "`td.study.thresholds(table)`")
    figure = go.Figure()
    figure.add_scatter(
        x=thresholds.shares, y=thresholds.faithfulness, mode="lines+markers", name="mean curve",
        line={"color": INK, "width": 1.5}, marker={"size": 5},
        hovertemplate="%{x:.2~%} of all edges: %{y:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=thresholds.shares, y=1 - thresholds.segments.fitted, mode="lines", name="straight pieces",
        line={"color": COLOURS["residual"], "width": 1.5, "dash": "dash"}, hoverinfo="skip",
    )  # fmt: skip
    # the second mark is smaller, so that both are seen where they agree
    for how, colour, size in (("knee", COLOURS["head"], 14), ("segments", COLOURS["mlp"], 8)):
        choice, again = thresholds.choices[how], thresholds.again.get(how, np.empty(0))
        height = -0.04 if how == "knee" else -0.1
        if len(again):
            where, count = np.unique(again, return_counts=True)
            figure.add_scatter(
                x=where, y=np.full(len(where), height), mode="markers", showlegend=False,
                marker={"color": colour, "size": 4 + 16 * np.sqrt(count / count.max()), "opacity": 0.5},
                customdata=count / len(again),
                hovertemplate="%{x:.2~%}: %{customdata:.0%} of resampled curves<extra></extra>",
            )  # fmt: skip
        if choice.share is not None:
            figure.add_scatter(
                x=[choice.share], y=[choice.faithfulness], mode="markers", name=how,
                marker={"color": colour, "size": size, "symbol": "diamond"},
                hovertemplate=f"{how}: %{{x:.2~%}} of all edges, faithfulness %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title="size (share of all edges)", **share_ticks(100_000))
    figure.update_yaxes(title="faithfulness", range=[-0.16, 1.04], tickvals=[0, 0.25, 0.5, 0.75, 1])
    shares = [f"{how} at {percent(each.share)}" for how, each in thresholds.choices.items() if each.share is not None]
    return finished(
        figure, "Where the mean curve bends", shares or ["nowhere"], plot_height=320, theme=theme,
        remark="Below: where it bends when documents are resampled.",
    )  # fmt: skip
