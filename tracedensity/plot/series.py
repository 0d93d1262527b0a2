"""The figure of a series of sweeps: density over training, or over languages."""

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tracedensity.plot.theme import COLOURS, INK, Theme, finished, label, plain, require_result, wide_enough
from tracedensity.study.covariates import AREAS

if TYPE_CHECKING:
    from tracedensity.study.series import Trend

_PANEL = 170  # px
_LEFT = 84


def plot_trend(trend: "Trend", *, theme: Theme | str = "light") -> go.Figure:
    """Means of a measure from sweep to sweep, and its correlation with the last sweep where they share inputs.

    Lines are bootstrap intervals over documents.

    Args:
        trend: What `tracedensity.study.trend` has found.
        theme: "light" or "dark".

    Raises:
        ValueError: If it is something else.
    """
    from tracedensity.study.series import Trend

    require_result("trend", trend, Trend, "`td.study.trend(tables)`")
    table: Any = trend.table
    # the last one's correlation with itself says nothing of the others
    shared = bool(table["rho"].iloc[:-1].notna().any())
    figure = make_subplots(rows=1 + shared, cols=1, shared_xaxes=True, vertical_spacing=0.1)
    outcome = trend.outcome.replace("_", " ") if trend.outcome in AREAS else f"log10 {trend.outcome.replace('_', ' ')}"
    panels = [("mean", "low", "high", outcome, INK)]
    if shared:
        panels.append(("rho", "rho_low", "rho_high", "correlation<br>with the last", COLOURS["circuit"]))
    place = np.arange(len(table))
    for row, (middle, lower, upper, title, colour) in enumerate(panels, start=1):
        value, low, high = (table[each].to_numpy(float) for each in (middle, lower, upper))
        figure.add_scatter(
            x=place, y=value, mode="lines+markers", line={"color": colour, "width": 1.5}, showlegend=False,
            customdata=[label(str(each)) for each in table["name"]],
            error_y={
                "type": "data", "array": np.nan_to_num(high - value), "arrayminus": np.nan_to_num(value - low),
                "color": colour, "thickness": 1.5, "width": 0,
            },
            hovertemplate="%{customdata}: %{y:.3f}<extra></extra>", row=row, col=1,
        )  # fmt: skip
        figure.update_yaxes(title=title if row > 1 else label(title), row=row, col=1)
    if shared:
        figure.update_yaxes(range=[min(-0.05, float(np.nanmin(table["rho_low"])) - 0.05), 1.05], row=2, col=1)
    names = [plain(str(each), 16) for each in table["name"]]
    ticks = [*map(label, names)]
    figure.update_xaxes(tickvals=place, ticktext=ticks, tickangle=0, range=[-0.5, len(table) - 0.5])
    n = table["n"]
    count = f"{n.max()} inputs" if n.min() == n.max() else f"{n.min()} to {n.max()} inputs"
    said = [count] if trend.outcome in AREAS else [count, f"faithfulness {trend.threshold:g}"]
    return finished(
        figure, "Density from sweep to sweep", said, plot_height=_PANEL * (1 + shared), theme=theme, left=_LEFT,
        min_width=wide_enough(names, _LEFT),
    )  # fmt: skip
