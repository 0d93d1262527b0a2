"""The figure of a composition: what circuits are made of, over their size."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Int
from torch import Tensor

from tracedensity.composition import Composition, composition
from tracedensity.curve import DensityCurve
from tracedensity.extract import Ranking
from tracedensity.plot.caption import asked
from tracedensity.plot.theme import COLOURS, PAPER, SEQUENTIAL, Theme, edge_ticks, finished, plain, share_ticks

_COLOURS = {
    "embedding": COLOURS["residual"],
    "heads": COLOURS["head"],
    "MLPs": COLOURS["mlp"],
    "skip connections": COLOURS["residual"],
}


def plot_composition(made: Composition | DensityCurve | Ranking, *, theme: Theme | str = "light") -> go.Figure:
    """Which share of the circuit of each size is heads, MLPs and skip connections, and from which layers it is.

    Sizes are on a logarithmic axis, as numbers of edges below and as shares of all edges above. At its right end is the
    whole graph, whose shares are dotted lines: what is wider than there is over-represented.

    Args:
        made: What to draw, or a curve or ranking whose `composition` is drawn.
        theme: "light" or "dark".
    """
    made = made if isinstance(made, Composition) else composition(made)
    figure = go.Figure()
    _add_areas(figure, made, made.by_part, [_COLOURS[part] for part in made.parts], axes=("x2", "y"))
    layers = dict(zip(map(_named, made.quarters), made.by_quarter.unbind(1), strict=True))
    # the lightest colour is hardly seen; in between as far apart as may be
    shades = [SEQUENTIAL[place] for place in np.linspace(4, 1, len(layers)).round().astype(int)[::-1]]
    _add_areas(figure, made, layers, shades, axes=("x", "y2"))
    _add_axes(figure, made)
    how = "the best circuits known" if made.family == "tight" else f"edges by {made.provenance.method}, {made.family}"
    about = [
        plain(made.provenance.model),
        plain(how),
        f"{int(made.sizes[-1]):,} edges",
        "dotted, and at the right end: the whole graph; what is wider than there is over-represented",
    ]
    title = f"What circuits for {asked(made.provenance)} are made of"
    return finished(figure, title, about, plot_height=400, theme=theme, above=44)


def _named(layers: range) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"


def _add_areas(
    figure: go.Figure,
    made: Composition,
    counts: dict[str, Int[Tensor, " point"]],
    colours: Sequence[str],
    axes: tuple[str, str],
) -> None:
    """Areas on one another that add up to 100%, and a line at what each adds up to in the whole graph."""
    below = 0.0
    # between two points of a tight curve the smaller circuit is the best that is known
    line = {"color": PAPER, "width": 0.5, "shape": "hv" if made.family == "tight" else "linear"}
    for (name, count), colour in zip(counts.items(), colours, strict=True):
        shares = (100 * count / made.sizes).tolist()
        texts = [
            f"{name} {n:,} of {size:,} ({share:.3g}%, whole graph {shares[-1]:.3g}%)"
            for n, size, share in zip(count.tolist(), made.sizes.tolist(), shares, strict=True)
        ]
        figure.add_scatter(
            x=made.sizes.tolist(), y=shares, xaxis=axes[0], yaxis=axes[1], name=name, stackgroup=axes[1], mode="lines",
            line=line, fillcolor=colour, text=texts, hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
        below += shares[-1]
        figure.add_shape(
            type="line", xref=f"{axes[0]} domain", x0=0, x1=1, yref=axes[1], y0=below, y1=below,
            line={"color": PAPER, "width": 1.5, "dash": "dot"}, visible=below < 99.99,
        )  # fmt: skip


def _add_axes(figure: go.Figure, made: Composition) -> None:
    n_edges = int(made.sizes[-1])
    sizes = {"range": np.log10([int(made.sizes[0]), n_edges]).tolist(), "hoverformat": ",d"}
    share = {"range": [0, 100], "tickvals": [0, 50, 100]}
    figure.update_layout(
        hovermode="x unified",
        legend={"traceorder": "normal"},  # not that of the areas, in which layers would come before parts
        xaxis={
            **edge_ticks(n_edges),
            **sizes,
            "anchor": "y2",
            "title": {"text": "circuit size (edges)"},
        },
        xaxis2={  # the same scale, read as shares
            **share_ticks(n_edges, n_edges),
            **sizes,
            "matches": "x",
            "anchor": "y",
            "side": "top",
            "title": {"text": "circuit size (share of all edges)"},
        },
        yaxis={**share, "domain": [0.54, 1], "title": {"text": "parts (% of edges)"}},
        yaxis2={**share, "domain": [0, 0.46], "title": {"text": "layers (% of edges)"}, "anchor": "x"},
    )
