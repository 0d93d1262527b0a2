"""The figure of a density curve: faithfulness over the size of the circuit."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from tracedensity.curve import DensityCurve, Points
from tracedensity.graph.component import ComponentGraph
from tracedensity.plot.caption import predicted
from tracedensity.plot.theme import (
    COLOURS,
    FAINT,
    MUTED,
    Theme,
    edge_ticks,
    finished,
    label,
    percent,
    plain,
    require_result,
    share_ticks,
)
from tracedensity.tight import TightCurve

EMPTY = 0.5
"""Where the circuit of no edge is drawn: a logarithmic axis has no 0."""

MEASURES = {
    "tv": "1 - total variation",
    "kl": "exp(-KL)",
    "js": "1 - JS / ln 2",
    "top1": "same most probable token",
    "nucleus": "recovered nucleus mass",
}


def plot_curve(curve: DensityCurve, *, theme: Theme | str = "light") -> go.Figure:
    """Faithfulness over circuit size, the minimal size at each threshold, and the baselines.

    Sizes are on a logarithmic axis, as numbers of edges below and as shares of all edges above. The empty
    circuit stands at the left, apart, under the label 0. Filled markers are the first circuits that reach
    a threshold, hollow ones, where they differ, those from which on every larger circuit does.

    Args:
        curve: What to draw; a loaded one will do, no model is run.
        theme: "light" or "dark".

    Raises:
        ValueError: If it is no curve, or there is no such theme.
    """
    require_result("curve", curve, DensityCurve, "as `td.density` makes it")
    figure = go.Figure()
    skips = "" if isinstance(curve.ranking.graph, ComponentGraph) else ", all skips kept"
    for name, points, dash, of, text in (
        ("random", curve.random, "dash", "size", f"random, connected{skips}"),
        ("inverse", curve.inverse, "dot", "edges left out", f"inverse: all but the circuit{skips}"),
    ):
        if points is not None:
            line = {"color": COLOURS[name], "width": 1.5, "dash": dash}
            figure.add_traces(_lines(points, curve.n_edges, text, of, line, size=4))
    if isinstance(curve, TightCurve):
        ranked = curve.published.provenance.method, curve.published.ranking.family
        line = {"color": COLOURS["published"], "width": 1.5}
        text = f"published: {', '.join(label(plain(each, 20)) for each in ranked)}"
        figure.add_traces(_lines(curve.published, curve.n_edges, text, "size", line, size=4))
    if curve.robust is not None:
        line = {"color": COLOURS["circuit"], "width": 1.5, "dash": "dashdot"}
        if isinstance(curve.robust, TightCurve):
            line["shape"] = "hv"
        text = f"robust: the least of {len(curve.robust.situations)} situations"
        figure.add_traces(_lines(curve.robust, curve.n_edges, text, "size", line, size=4))
    line, text = {"color": COLOURS["circuit"], "width": 2}, "circuit"
    if isinstance(curve, TightCurve):  # between two points the smaller circuit is the best that is known
        line, text = {**line, "shape": "hv"}, "tight: the best circuit known"
    figure.add_traces(_lines(curve, curve.n_edges, text, "size", line, size=5))
    _add_thresholds(figure, curve)
    _add_axes(figure, curve)
    title, about = _said(curve)
    return finished(figure, title, about, plot_height=360, theme=theme, above=52, right=132)


def _lines(points: Points, n_edges: int, name: str, of: str, line: dict[str, Any], size: int) -> list[go.Scatter]:
    """The points, joined; the circuit of no edge, if it is one of them, stands alone."""
    sizes, faithfulness = points.sizes.tolist(), points.faithfulness.tolist()
    hover = [
        f"{of} {edges:,} ({percent(edges / n_edges)})<br>faithfulness {value:.3f}"
        for edges, value in zip(sizes, faithfulness, strict=True)
    ]
    n_empty = int(sizes[0] == 0)
    shared = {"mode": "lines+markers", "line": line, "marker": {"size": size}, "legendgroup": name, "name": name}
    shared |= {"hovertemplate": "%{text}", "legendrank": 1 if name.startswith(("circuit", "tight")) else 3}
    joined = slice(n_empty, None)
    traces = [go.Scatter(x=sizes[joined], y=faithfulness[joined], text=hover[joined], **shared)]
    if n_empty:
        traces.append(go.Scatter(x=[EMPTY], y=faithfulness[:1], text=hover[:1], showlegend=False, **shared))
    return traces


def _add_thresholds(figure: go.Figure, curve: DensityCurve) -> None:
    """A dotted line at each threshold, with the first and the stable minimal circuit on it."""
    first = [curve.minimal_size(threshold) for threshold in curve.thresholds]
    stable = [curve.minimal_size(threshold, stable=True) for threshold in curve.thresholds]
    heights = _apart(curve.thresholds)
    figure.add_annotation(
        x=1, xref="paper", xanchor="left", xshift=20, y=1, yref="paper", yanchor="bottom", showarrow=False,
        text="minimal size", font={"size": 11, "color": MUTED},
    )  # fmt: skip
    for threshold, height, size, later in zip(curve.thresholds, heights, first, stable, strict=True):
        figure.add_hline(threshold, line={"color": MUTED, "width": 0.75, "dash": "dot"}, layer="below")
        figure.add_annotation(
            x=1, xref="paper", xanchor="left", xshift=6, y=height, showarrow=False, font={"size": 11},
            text=f"<b>{threshold:g}</b>  {size:,} ({percent(size / curve.n_edges)})",
        )  # fmt: skip
        if later != size:
            figure.add_shape(
                type="line", x0=max(size, EMPTY), x1=later, y0=threshold, y1=threshold,
                line={"color": COLOURS["head"], "width": 1.5}, layer="below",
            )  # fmt: skip
    differs = [i for i in range(len(first)) if stable[i] != first[i]]
    for name, symbol, axis, sizes, which in (
        # on the second axis, because an axis without a trace is not drawn
        ("minimal: first to reach a threshold", "circle", "x2", first, range(len(first))),
        ("stable: all larger ones reach it too", "circle-open", "x", stable, differs),
    ):
        figure.add_scatter(
            x=[max(sizes[i], EMPTY) for i in which],
            y=[curve.thresholds[i] for i in which],
            xaxis=axis,
            mode="markers",
            marker={
                "symbol": symbol,
                "size": 9,
                "color": COLOURS["head"],
                "line": {"width": 2, "color": COLOURS["head"]},
            },
            name=name,
            legendrank=2,
            visible=bool(which),
            text=[f"{name.split(':')[0]} size for {curve.thresholds[i]:g}: {_size(curve, sizes[i])}" for i in which],
            hovertemplate="%{text}<extra></extra>",
        )


def _size(curve: DensityCurve, size: int) -> str:
    return f"{size:,} edges ({percent(size / curve.n_edges)})"


def _apart(heights: tuple[float, ...], gap: float = 0.05) -> list[float]:
    """Rising heights moved down where they must be, the highest first, so that labels do not overlap."""
    moved: list[float] = []
    for height in reversed(heights):
        moved.append(min([height, *(above - gap for above in moved[-1:])]))
    return moved[::-1]


def _add_axes(figure: go.Figure, curve: DensityCurve) -> None:
    drawn = [curve, curve.random, curve.inverse, curve.robust]
    drawn += [curve.published] if isinstance(curve, TightCurve) else []
    shown = [points for points in drawn if points is not None]
    smallest = min(int(points.sizes[0]) for points in shown)
    ticks = edge_ticks(curve.n_edges)
    if smallest == 0:
        ticks |= {"tickvals": [EMPTY, *ticks["tickvals"]], "ticktext": ["0", *ticks["ticktext"]]}
        figure.add_vline(EMPTY**0.5, line={"color": FAINT, "width": 1}, layer="below")  # 0 is no point of the scale
    low = EMPTY * 0.8 if smallest == 0 else 0.9
    limits = np.log10([low, curve.n_edges * 1.15]).tolist()
    measure = MEASURES.get(curve.metric, label(curve.metric))
    reached = torch.cat([points.faithfulness.double() for points in shown])
    figure.update_layout(
        xaxis={**ticks, "range": limits, "title": {"text": "circuit size (edges)"}},
        xaxis2={  # the same scale, read as shares
            **share_ticks(curve.n_edges, curve.n_edges),
            "matches": "x",
            "overlaying": "x",
            "side": "top",
            "title": {"text": "circuit size (share of all edges)"},
        },
        yaxis={
            # a share of a difference may leave the unit interval
            "range": [min(-0.03, float(reached.min()) - 0.05), max(1.05, float(reached.max()) + 0.05)],
            "dtick": 0.2 if float(reached.max() - reached.min()) < 2 else None,
            "title": {"text": f"faithfulness ({measure})"},
        },
    )


def _said(curve: DensityCurve) -> tuple[str, list[str]]:
    """What is predicted from what, and how edges were ranked and circuits run."""
    if curve.full is None or curve.empty is None:
        found = f"p = {curve.top_probability:.2f}, entropy {curve.entropy:.2f} nats"
    else:
        found = f"{plain(curve.metric)} {float(curve.full.mean()):.2f}, ablated {float(curve.empty.mean()):.2f}"
    ranked = [] if isinstance(curve, TightCurve) else [curve.provenance.method, curve.ranking.family]
    return predicted(curve), [
        plain(curve.provenance.model),
        *([f"edges by {', '.join(map(plain, ranked))}"] if ranked else []),
        f"{curve.n_edges:,} edges",
        found,
        *([] if curve.conditions.ablation == "zero" else [f"{plain(curve.conditions.ablation)} ablation"]),
        *(["all skips kept"] * curve.conditions.keep_residual),
        *(["absent attention edges not ablated"] * (curve.conditions.attention == "open")),
    ]
