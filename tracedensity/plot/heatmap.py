"""Heat maps: one number per head, or per sublayer and token, of one result or of two that are compared."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Shaped
from numpy import ndarray

from tracedensity.curve import DensityCurve
from tracedensity.extract import Ranking
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.plot.caption import asked, found, scored
from tracedensity.plot.theme import (
    DEAD,
    DIVERGING,
    NARROW,
    SEQUENTIAL,
    TOKEN,
    Theme,
    colour_bar,
    colour_scale,
    finished,
    label,
    named_tokens,
    percent,
    plain,
    quoted,
    token,
)  # fmt: skip
from tracedensity.score import Scores
from tracedensity.summary import Over, Summary, difference, summary

Result: TypeAlias = Circuit | Scores | Ranking | DensityCurve

_TITLES = {
    "presence": "Circuit edges by {}",
    "importance": "Importance by {}",
    "entry": "Circuit size at which each {} enters",
}


def plot_heatmap(
    result: Result, *, over: Over | str = "head", minus: Result | None = None, theme: Theme | str = "light"
) -> go.Figure:
    """How much the edges of each head and MLP, or of each sublayer at each token, have to do with a prediction.

    Of a circuit: how many of them are in it. Of scores: the sum of their importance. Of a ranking, or of a curve's: the
    size of the smallest circuit that has one of them. Skip connections are left out. On the component graph a head or
    MLP has the edges that it writes, so that those of the embedding are left out too, and a sublayer at a token has
    those that it reads there.

    Args:
        result: What to draw; no model is run.
        over: ``"head"``: heads across and layers up, MLPs in a column apart. ``"token"``: tokens across and sublayers
            up; on the component graph only where it tells positions apart.
        minus: Another result of the same type to compare with, see `tracedensity.summary.difference`. By head, prompts
            may be different ones and of any length.
        theme: "light" or "dark".

    Raises:
        ValueError: If `over` is unknown, there are no tokens, or results are not of the same quantity and cells.
    """
    results = [result] if minus is None else [result, minus]
    shown = [summary(each, over) for each in results]
    z, drawn = _alone(*shown) if minus is None else _compared(*shown)
    text, columns = _texts(shown, over), shown[0].groups.columns
    places = np.arange(len(columns) + 1) - 0.5
    if columns[-1] == "MLP":  # a gap before the last column
        places = np.append(places[:-1], places[-2:] + _gap(columns))
        z, text = np.insert(z, -1, np.nan, axis=1), np.insert(text, -1, "", axis=1)
    figure = go.Figure()
    figure.add_heatmap(
        z=z, text=text, x=places, y=np.arange(len(z)), xgap=1, ygap=1, hoverongaps=over == "token",
        hovertemplate="%{text}<extra></extra>", **drawn,
    )  # fmt: skip
    remark = ""
    if over == "token" and np.isnan(z).any():
        y, x = np.isnan(z).nonzero()
        cross = {"symbol": "x-thin", "size": 5, "line": {"color": DEAD, "width": 1}}
        figure.add_scatter(x=x, y=y, mode="markers", marker=cross, hoverinfo="skip", showlegend=False)
        remark = "crosses: nothing there reaches the prediction"
    elif over == "head" and isinstance(shown[0].groups.graph, ComponentGraph):
        remark = "edges are those that a head or MLP writes"
    _add_axes(figure, shown[0], over)
    title = _TITLES[shown[0].quantity].format(over) + ": first against second" * (len(shown) == 2)
    height = max(240, min(24 * len(z), 640))
    if over == "head":
        return finished(figure, title, _about(results), remark=remark, plot_height=height, theme=theme)
    longest = max(map(len, _tokens(shown[0])))
    return finished(
        figure, title, _about(results), remark=remark, plot_height=height, theme=theme, below=48 + 6 * min(longest, 14),
        min_width=max(NARROW, 170 + TOKEN * len(columns)),
    )  # fmt: skip


def _alone(shown: Summary) -> tuple[Float[ndarray, "row column"], dict[str, Any]]:
    """Values on a scale from nothing to much; of sizes of entry their log10, the smallest being much."""
    z = shown.values.numpy()
    if shown.quantity != "entry":
        title = f"number of {shown.unit}" if shown.quantity == "presence" else f"sum of {plain(shown.unit, 30)}"
        return z, _scale(SEQUENTIAL, min(0.0, float(np.nanmin(z))), float(np.nanmax(z)), title)
    z = np.log10(z)
    decades = range(int(np.nanmax(z)) + 1)
    ticks = {"tickvals": list(decades), "ticktext": [f"{10**decade:,}" for decade in decades]}
    return z, _scale(SEQUENTIAL[::-1], 0.0, float(np.nanmax(z)), "circuit size (edges)", **ticks)


def _compared(first: Summary, second: Summary) -> tuple[Float[ndarray, "row column"], dict[str, Any]]:
    """Differences on a scale with nothing in the middle; blue is where the first has more, or is earlier."""
    z = difference(first, second).numpy()
    bound = float(np.nanmax(np.abs(z))) or 1.0
    if first.quantity != "entry":
        what = "share of edges (%)" if first.quantity == "presence" else plain(first.unit, 24)
        return z, _scale(DIVERGING[::-1], -bound, bound, f"{what}: first - second")
    bound = max(bound, float(np.log10(2)))
    factors = [10**decade for decade in range(1, int(bound) + 1)] or [
        each for each in (2, 5) if np.log10(each) <= bound
    ]
    ticks = {
        "tickvals": [*(-np.log10(factors[::-1])), 0.0, *np.log10(factors)],
        "ticktext": [
            *(f"{each:,}x earlier" for each in factors[::-1]),
            "same",
            *(f"{each:,}x later" for each in factors),
        ],
    }
    return z, _scale(DIVERGING, -bound, bound, "first, against second", **ticks)


def _scale(colours: Sequence[str], low: float, high: float, title: str, **ticks: Any) -> dict[str, Any]:
    return {
        "zmin": low,
        "zmax": high if high > low else low + 1,
        "colorscale": colour_scale(colours),
        "colorbar": colour_bar(label(title), **ticks),
    }


def _texts(shown: Sequence[Summary], over: str) -> Shaped[ndarray, "row column"]:
    """What stands under the mouse: the name of each cell, and what is known of it."""
    rows, columns = shown[0].groups.rows, shown[0].groups.columns
    if over == "head":
        names = [[f"m{row}" if column == "MLP" else f"a{row}.{column}" for column in columns] for row in rows]
    else:
        texts = dict.fromkeys(_tokens(each) for each in shown)  # of both, where they differ
        tokens = [" / ".join(label(quoted(text, 24)) for text in both) for both in zip(*texts, strict=True)]
        names = [[f"{row} at {each} ({pos})" for pos, each in enumerate(tokens)] for row in rows]
    of = ("first: ", "second: ") if len(shown) == 2 else ("",)
    lines = [np.array(names, dtype=object)]
    for which, each in zip(of, shown, strict=True):
        lines.append("<br>" + which + np.array(_said(each), dtype=object))
    return np.sum(lines, axis=0)


def _said(shown: Summary) -> list[list[str]]:
    """Of each cell its number, in words."""
    unit, n_all = label(plain(shown.unit, 30)), shown.groups.graph.n_edges

    def said(value: float, n: int) -> str:
        if not n:
            return "no edges"
        if shown.quantity == "presence":
            return f"{int(value):,} of {n:,} edges ({percent(value / n)})"
        if shown.quantity == "entry":
            return f"in circuits of {int(value):,} edges or more ({percent(value / n_all)})"
        return f"{value:.3g}, sum of {unit} of {n:,} edges"

    rows = zip(shown.values.tolist(), shown.groups.n_edges.tolist(), strict=True)
    return [[said(value, n) for value, n in zip(*row, strict=True)] for row in rows]


def _tokens(shown: Summary) -> tuple[str, ...]:
    """Texts of the tokens; their positions where texts are not known."""
    texts, columns = shown.provenance.texts, shown.groups.columns
    return texts if len(texts) == len(columns) else columns


def _about(results: Sequence[Result]) -> list[str]:
    of = ("first: ", "second: ") if len(results) == 2 else ("",)
    about = []
    for which, each in zip(of, results, strict=True):
        ranking = each.ranking if isinstance(each, DensityCurve) else each
        kept = f"{ranking.n_edges:,} of " if isinstance(ranking, Circuit) else ""
        order = f", {plain(ranking.family)}" if isinstance(ranking, Ranking) else ""
        made = found(ranking) if isinstance(ranking, Circuit) else scored(ranking.provenance)
        about += [which + asked(ranking.provenance), made + order]
        about.append(f"{kept}{ranking.graph.n_edges:,} edges")
    return about


def _add_axes(figure: go.Figure, shown: Summary, over: str) -> None:
    rows = shown.groups.rows
    every = -(-len(rows) // 40)  # more names do not fit above one another
    bare = {"ticks": "", "showline": False}
    figure.update_layout(
        xaxis={**bare, **(_heads(shown.groups.columns) if over == "head" else _named(_tokens(shown)))},
        yaxis={
            **bare,
            "range": [-0.5, len(rows) - 0.5],
            "tickvals": list(range(0, len(rows), every)),
            "ticktext": rows[::every],
            "title": {"text": "layer" if over == "head" else "sublayer (a: attention, m: MLP)"},
        },
    )


def _heads(columns: Sequence[str]) -> dict[str, Any]:
    """Heads by their numbers, as many as fit in a narrow window, and the MLPs apart."""
    heads = [column.removeprefix("h") for column in columns if column != "MLP"]
    every = -(-len(heads) // 12)
    places, names = list(range(0, len(heads), every)), heads[::every]
    if columns[-1] == "MLP":
        places, names = [*places, len(heads) + _gap(columns)], [*names, "MLP"]
    return {"tickvals": places, "ticktext": names, "tickangle": 0, "title": {"text": "head"}}


def _gap(columns: Sequence[str]) -> float:
    """Columns between heads and MLPs: enough that their names do not touch in a narrow window."""
    return max(0.5, len(columns) / 12)


def _named(texts: Sequence[str]) -> dict[str, Any]:
    named, title = named_tokens(len(texts))
    return {
        "range": [-0.5, len(texts) - 0.5],
        "tickvals": named,
        "ticktext": [token(texts[pos]) for pos in named],
        "tickangle": -90 if len(texts) > 16 else None,
        "autotickangles": [0, -90],  # of fewer tokens as the window is wide
        "tickfont": {"size": 11},
        "title": {"text": title},
    }
