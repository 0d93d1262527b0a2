"""The figure of several models: whether the same inputs are dense for them."""

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tracedensity.plot.theme import (
    COLOURS,
    DIVERGING,
    MUTED,
    Theme,
    colour_scale,
    finished,
    label,
    plain,
    require_result,
    wide_enough,
)

if TYPE_CHECKING:
    from tracedensity.study.comparison import Comparison

_ROW = 34  # px
_LEFT = 190


def plot_models(comparison: "Comparison", *, theme: Theme | str = "light") -> go.Figure:
    """The matrix of correlations, and for each pair what is left given lengths, entropies and rarities.

    Args:
        comparison: What `tracedensity.study.compare` has found.
        theme: "light" or "dark".

    Raises:
        ValueError: If it is something else.
    """
    from tracedensity.study.comparison import Comparison

    require_result("comparison", comparison, Comparison, "`td.study.compare(tables)`")
    table: Any = comparison.table
    names = [plain(each, 18) for each in comparison.matrix.columns]
    ticks = {"tickvals": [*range(len(names))], "ticktext": [*map(label, names)]}  # names may be alike once shortened
    whole = [label(plain(each)) for each in comparison.matrix.columns]
    matrix = comparison.matrix.to_numpy(float)
    upper, lower = max(120, 44 * len(names)), _ROW * max(3, len(table))
    figure = make_subplots(
        rows=2, cols=1, row_heights=[upper, lower], vertical_spacing=min(0.4, 96 / (upper + lower + 96))
    )
    figure.add_heatmap(
        z=matrix, zmin=-1, zmax=1, colorscale=colour_scale(DIVERGING), showscale=False,
        texttemplate="%{z:.2f}", customdata=[[f"{a}, {b}" for b in whole] for a in whole],
        hovertemplate="%{customdata}: %{z:.3f}<extra></extra>", xgap=1, ygap=1, row=1, col=1,
    )  # fmt: skip
    place = np.arange(len(table))[::-1]
    looks = (
        ("", "correlation", COLOURS["circuit"], 0.2),
        ("length_", "given lengths", COLOURS["head"], 0.0),
        ("partial_", "given entropies and rarities too", COLOURS["mlp"], -0.2),
    )
    figure.add_shape(
        type="line", x0=0, x1=0, y0=-0.6, y1=len(table) - 0.4, line={"color": MUTED, "width": 1}, row=2, col=1
    )
    for prefix, name, colour, shift in looks:
        rho, low, high = (table[f"{prefix}{each}"].to_numpy(float) for each in ("rho", "low", "high"))
        figure.add_scatter(
            x=rho, y=place + shift, mode="markers", name=name, marker={"color": colour, "size": 8},
            error_x={
                "type": "data", "array": np.nan_to_num(high - rho), "arrayminus": np.nan_to_num(rho - low),
                "color": colour, "thickness": 1.5, "width": 0,
            },
            hovertemplate="%{x:.3f}<extra>" + name + "</extra>", row=2, col=1,
        )  # fmt: skip
    pairs = [label(f"{plain(a, 12)}, {plain(b, 12)}") for a, b in zip(table["a"], table["b"], strict=True)]
    figure.update_yaxes(tickvals=place, ticktext=pairs, range=[-0.6, len(table) - 0.4], row=2, col=1)
    figure.update_yaxes(autorange="reversed", **ticks, row=1, col=1)
    figure.update_xaxes(tickangle=0, **ticks, row=1, col=1)
    figure.update_xaxes(title="Spearman correlation", range=[-1.02, 1.02], row=2, col=1)
    return finished(
        figure, "Are the same inputs dense for different models?",
        [f"{table['n'].max()} inputs", f"mean {comparison.mean:.2f} ({comparison.low:.2f} to {comparison.high:.2f})"],
        plot_height=upper + lower + 96, theme=theme, left=_LEFT,
        min_width=wide_enough(names, _LEFT),
    )  # fmt: skip
