"""The figure of several density curves: which predictions need little of a model, and which need much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from tracedensity.curve import DensityCurve, require_thresholds
from tracedensity.plot.curve import EMPTY, MEASURES
from tracedensity.plot.theme import (
    COLOURS,
    DARK,
    DEAD,
    FAINT,
    MUTED,
    PAPER,
    Theme,
    colour_bar,
    colour_scale,
    edge_ticks,
    finished,
    label,
    percent,
    plain,
    quoted,
    share_ticks,
    visible,
)  # fmt: skip
from tracedensity.tight import TightCurve

MAX_NAMED = 6
"""Curves that colours, dashes and a legend tell apart; more are thin lines coloured by size."""

MAX_LABELLED = 20
"""Curves whose rows have labels; of more, names are under the mouse."""

_LOOKS = (  # from sparse to dense; the last is the densest curve's, however many there are
    (COLOURS["head"], "solid"),
    (COLOURS["inverse"], "dash"),
    (COLOURS["random"], "dashdot"),
    (COLOURS["published"], "dot"),
    (COLOURS["circuit"], "longdash"),
    (COLOURS["mlp"], "longdashdot"),
)
_SCALE = (COLOURS["head"], COLOURS["residual"], COLOURS["mlp"])  # no shade of it comes near that of the paper
_CURVES, _BETWEEN, _ROW = 320, 108, 38  # px: height of the upper part, room below it, one row
_LEFT = 64  # px
_NAME = 36  # characters that leave room for a size in a narrow figure


def plot_curves(
    curves: Sequence[DensityCurve] | Mapping[str, DensityCurve],
    *,
    names: Sequence[str] | None = None,
    threshold: float | int = 0.9,
    theme: Theme | str = "light",
) -> go.Figure:
    """Several density curves in one figure, from the sparsest prediction to the densest.

    Above is faithfulness over circuit size, as share of all edges; a large dot is the first circuit of a curve that
    reaches the threshold. Up to `MAX_NAMED` curves have a colour, a dash and a line of the legend each, more of them
    the colour of that circuit's size. Below, each curve has a row, the sparsest on top: its minimal sizes at the
    threshold and at those that all curves have.

    Args:
        curves: What to compare, all of one metric, as a list or by name; loaded ones will do, no model is run.
        names: What to call each; if nothing is given, its prediction and prompt, or its task.
        threshold: Faithfulness by which curves are sorted and coloured, in (0, 1].
        theme: "light" or "dark".

    Raises:
        ValueError: If there is no curve, metrics differ, or there is not one name for each.
    """
    if isinstance(curves, DensityCurve):
        raise ValueError("`curves` must be a list of curves, or curves by name, got one: draw it with `plot_curve`.")
    if isinstance(curves, Mapping):
        if names is not None:
            raise ValueError(f"`names` must be left out where `curves` are given by name, got {[*names]}.")
        names, curves = [*curves], [*curves.values()]
    _require_comparable(curves, names)
    require_thresholds((threshold,))
    common, own = _facts(curves)
    called = [*map(_name, curves, own)] if names is None else [plain(name, _NAME) for name in names]
    sheet = _Sheet.of(curves, called, threshold)
    figure = go.Figure()
    _add_curves(figure, sheet, theme)
    _add_rows(figure, sheet)
    _add_axes(figure, sheet)
    n_coarse = sum(threshold not in curve.thresholds for curve in curves)
    return finished(
        figure,
        _question(curves),
        [*common, f"large dots: the first circuit that reaches {threshold:g}"],
        plot_height=sheet.height,
        theme=theme,
        remark=f"{n_coarse} of {len(curves)} curves are coarse around {threshold:g}" if n_coarse else "",
        above=44 if sheet.n_edges is not None else 0,
        left=_LEFT,
        right=24 if sheet.named else 84,
    )


@dataclass(frozen=True, eq=False)
class _Entry:
    """A curve, its name in plain text, and its minimal size at each threshold of the sheet."""

    curve: DensityCurve
    name: str
    sizes: list[int]


@dataclass(frozen=True, eq=False)
class _Sheet:
    """What is drawn, the sparsest first; `at` is the place of the chosen one among the thresholds."""

    entries: list[_Entry]
    thresholds: list[float]
    at: int

    @classmethod
    def of(cls, curves: Sequence[DensityCurve], names: Sequence[str], threshold: float) -> "_Sheet":
        common = set(curves[0].thresholds).intersection(*(curve.thresholds for curve in curves))
        thresholds = sorted({*common, threshold})
        entries = [
            _Entry(curve, name, [curve.minimal_size(each) for each in thresholds])
            for curve, name in zip(curves, names, strict=True)
        ]
        at = thresholds.index(threshold)
        return cls(sorted(entries, key=lambda entry: entry.sizes[at] / entry.curve.n_edges), thresholds, at)

    @property
    def named(self) -> bool:
        return len(self.entries) <= MAX_NAMED

    @property
    def labelled(self) -> bool:
        return len(self.entries) <= MAX_LABELLED

    @property
    def n_edges(self) -> int | None:
        """Edges of the whole graph, if it is as large for all curves."""
        sizes = {entry.curve.n_edges for entry in self.entries}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def empty(self) -> float:
        """Where the circuit of no edge is drawn: left of the smallest share that any curve has."""
        return EMPTY / max(entry.curve.n_edges for entry in self.entries)

    @property
    def rows_height(self) -> int:
        return _ROW * len(self.entries) if self.labelled else min(12 * len(self.entries), 480)

    @property
    def height(self) -> int:
        return _CURVES + _BETWEEN + self.rows_height

    @property
    def logs(self) -> list[float]:
        """Logarithm of each minimal share at the chosen threshold, which is what colours are of."""
        return [log10(self.place(entry, entry.sizes[self.at])) for entry in self.entries]

    def place(self, entry: _Entry, size: int) -> float:
        """Where a size is drawn."""
        return size / entry.curve.n_edges if size else self.empty

    def looks(self, theme: Theme | str = "light") -> list[tuple[str, str]]:
        """Colour and dash of each curve; those of up to `MAX_NAMED` curves are of the light theme, to be mapped."""
        if self.named:
            return [*_LOOKS[: max(len(self.entries) - 1, 1)], _LOOKS[-1]][: len(self.entries)]
        low, high = self.logs[0], self.logs[-1]
        scale = colour_scale([DARK[colour] if theme == "dark" else colour for colour in _SCALE])
        colours = sample_colorscale(scale, [(value - low) / ((high - low) or 1) for value in self.logs])
        return [(str(colour), "solid") for colour in colours]


def _require_comparable(curves: Sequence[DensityCurve], names: Sequence[str] | None) -> None:
    if not len(curves):
        raise ValueError("`curves` must be at least one density curve, got none: make some with `td.density`.")
    if others := sorted({type(curve).__name__ for curve in curves if not isinstance(curve, DensityCurve)}):
        raise ValueError(f"`curves` must be density curves, as `td.density` makes them, got {', '.join(others)}.")
    if len(metrics := sorted({curve.metric for curve in curves})) > 1:
        raise ValueError(f"`curves` must be of one metric, got {', '.join(metrics)}: draw a figure for each of these.")
    if names is not None and len(names) != len(curves):
        raise ValueError(f"`names` must be one for each of {len(curves)} curves, got {len(names)}.")


def _facts(curves: Sequence[DensityCurve]) -> tuple[list[str], list[str]]:
    """How all curves were made, part by part, and how each was where they differ."""
    columns = [*zip(*map(_made, curves), strict=True)]
    differ = [column for column in columns if len(set(column)) > 1]
    common = [column[0] for column in columns if column not in differ and column[0]]
    sizes = sorted({curve.n_edges for curve in curves})
    own = [", ".join(column[i].removeprefix("edges by ") for column in differ if column[i]) for i in range(len(curves))]
    return [*common, f"{' to '.join(f'{size:,}' for size in (sizes[0], sizes[-1])[: len(sizes)])} edges"], own


def _made(curve: DensityCurve) -> tuple[str, ...]:
    """How a curve was made; "" is the usual."""
    conditions = curve.conditions
    ranked = f"edges by {plain(curve.provenance.method, 20)}, {plain(curve.ranking.family, 20)}"
    return (
        plain(curve.provenance.model, 20),
        "tight" if isinstance(curve, TightCurve) else ranked,
        "" if conditions.ablation == "zero" else f"{plain(conditions.ablation, 20)} ablation",
        "all skips kept" * conditions.keep_residual,
        "absent attention edges not ablated" * (conditions.attention == "open"),
        type(curve.ranking.graph).__name__.removesuffix("Graph").lower() + " graph",
    )


def _name(curve: DensityCurve, own: str) -> str:
    """The task, or the prediction and the end of the prompt, and what else sets the curve apart."""
    own = f", {plain(own, 20)}" if own else ""
    if (task := curve.provenance.named_task) is not None:
        return plain(task.name, _NAME - len(own)) + own
    prediction = f"{quoted(curve.top_text, 10)} after "
    text, length = visible(curve.provenance.prompt), max(_NAME - len(prediction) - len(own) - 2, 8)
    if len(text) > length:
        end = text[1 - length :]
        text = "…" + (end.partition(" ")[2] or end)  # from the start of a word
    return f"{prediction}'{text}'{own}"


def _question(curves: Sequence[DensityCurve]) -> str:
    noun = "task" if all(curve.provenance.named_task for curve in curves) else "prediction"
    if len(curves) == 1:
        return f"How much does this {noun} need?"
    return f"How much do these {len(curves)} {noun}s need?"


def _add_curves(figure: go.Figure, sheet: _Sheet, theme: Theme | str) -> None:
    """A line per curve, the circuit of no edge apart, and one large dot on it."""
    threshold = sheet.thresholds[sheet.at]
    figure.add_scatter(  # no shape, because the second axis is not drawn without a trace of its own
        x=[0.8 * sheet.empty, 1.15], y=[threshold, threshold], xaxis="x2", mode="lines", hoverinfo="skip",
        line={"color": MUTED, "width": 0.75, "dash": "dot"}, name="threshold", showlegend=False,
    )  # fmt: skip
    for entry, (colour, dash) in zip(sheet.entries, sheet.looks(theme), strict=True):
        curve, first = entry.curve, entry.sizes[sheet.at]
        points: list[tuple[float | None, float | None, int, str]] = []
        for size, height in zip(curve.sizes.tolist(), curve.faithfulness.tolist(), strict=True):
            dot = 10 if size == first else 4 if sheet.named or size == 0 else 0
            hover = f"{_asked(entry)}<br>{_edges(curve, size)}<br>faithfulness {height:.3f}"
            points.append((sheet.place(entry, size), height, dot, hover))
            if size == 0:
                points.append((None, None, 0, ""))  # a gap, because 0 is no point of the scale
        x, y, dots, texts = zip(*points, strict=True)
        line = {"color": colour, "dash": dash, "width": 2 if sheet.named else 1}
        if isinstance(curve, TightCurve):  # between two points the smaller circuit is the best that is known
            line["shape"] = "hv"
        rim = {"color": PAPER, "width": [int(dot == max(dots)) for dot in dots]}
        figure.add_scatter(
            x=x, y=y, mode="lines+markers", line=line, text=texts, hovertemplate="%{text}<extra></extra>",
            marker={"size": dots, "color": colour, "opacity": 1, "line": rim},
            name=f"{label(entry.name)}: {_edges(curve, first)}", showlegend=sheet.named,
        )  # fmt: skip


def _asked(entry: _Entry) -> str:
    """The name, and all that was asked where the name is short for it."""
    curve = entry.curve
    if (task := curve.provenance.named_task) is not None:
        asked = [f"{plain(task.name)}: {len(task)} {'pair' if len(task) == 1 else 'pairs'}"]
    else:
        prompt = f"{quoted(curve.top_text, 20)} after {quoted(curve.provenance.prompt)}"
        asked = [prompt, f"entropy {curve.entropy:.2f} nats"]
    return "<br>".join([f"<b>{label(entry.name)}</b>", *map(label, asked)])


def _edges(curve: DensityCurve, size: int) -> str:
    return f"{size:,} {'edge' if size == 1 else 'edges'} ({percent(size / curve.n_edges)})"


def _add_rows(figure: go.Figure, sheet: _Sheet) -> None:
    """The minimal sizes of each curve on a line of its own, below its name."""
    n_rows, n_dots = len(sheet.entries), len(sheet.thresholds)
    x = np.array([[sheet.place(entry, size) for size in entry.sizes] for entry in sheet.entries])
    ends = np.stack([x[:, 0], x[:, -1], np.full(n_rows, np.nan)], axis=1)  # NaN is the gap between two rows
    colour: dict[str, Any] = {"color": [colour for colour, _ in sheet.looks() for _ in range(n_dots)]}
    if not sheet.named:
        colour = {"color": np.repeat(sheet.logs, n_dots), "coloraxis": "coloraxis"}
    large, small = (11, 7) if sheet.labelled else (6, 4)
    shared = {"xaxis": "x3", "yaxis": "y2", "showlegend": False}
    figure.add_scatter(
        x=ends.flatten(), y=np.repeat(np.arange(n_rows), 3), mode="lines", hoverinfo="skip", name="ranges",
        line={"color": DEAD, "width": 2 if sheet.labelled else 1}, **shared,
    )  # fmt: skip
    figure.add_scatter(
        x=x.flatten(), y=np.repeat(np.arange(n_rows), n_dots), mode="markers", name="minimal sizes",
        marker={
            "size": [large if i == sheet.at else small for i in range(n_dots)] * n_rows, "opacity": 1, **colour,
            "line": {"color": PAPER, "width": int(sheet.labelled)},
        },
        text=[
            f"{_asked(entry)}<br>minimal size for {threshold:g}: {_edges(entry.curve, size)}"
            for entry in sheet.entries
            for threshold, size in zip(sheet.thresholds, entry.sizes, strict=True)
        ],
        hovertemplate="%{text}<extra></extra>", **shared,
    )  # fmt: skip
    written = {"xref": "paper", "showarrow": False, "font": {"size": 11}, "yanchor": "bottom", "yshift": 5}
    for row, entry in enumerate(sheet.entries[: n_rows * sheet.labelled]):
        found = percent(entry.sizes[sheet.at] / entry.curve.n_edges)
        if entry.curve.provenance.named_task is None:
            found += f" · {entry.curve.entropy:.2f} nats"
        figure.add_annotation(
            x=0, xanchor="left", xshift=8 - _LEFT, y=row, yref="y2", text=label(entry.name), **written
        )
        figure.add_annotation(x=1, xanchor="right", y=row, yref="y2", text=found, **written)
    figure.add_annotation(
        x=0, xanchor="left", xshift=8 - _LEFT, y=sheet.rows_height / sheet.height, yref="paper", align="left",
        text=_heading(sheet), **{**written, "font": {"size": 11, "color": MUTED}},
    )  # fmt: skip


def _heading(sheet: _Sheet) -> str:
    """What the dots of the rows are."""
    each = [f"<b>{value:g}</b>" if i == sheet.at else f"{value:g}" for i, value in enumerate(sheet.thresholds)]
    which = ", ".join(each) if len(each) <= 6 else f"{each[0]} to {each[-1]}"
    dots = f"smallest circuits for {which}{', from left to right' * (len(each) > 1)}"
    asked = any(entry.curve.provenance.named_task is None for entry in sheet.entries)
    return f"{dots}<br>numbers: share for {each[sheet.at]}{', entropy of the prediction' * asked}"


def _add_axes(figure: go.Figure, sheet: _Sheet) -> None:
    curves = [entry.curve for entry in sheet.entries]
    most = max(curve.n_edges for curve in curves)
    scale, low = share_ticks(most), 0.9 / most
    decades = 10.0 ** np.arange(-int(log10(most)), 1)
    scale["minor"] = {"ticks": "outside", "tickvals": np.outer(decades, range(2, 10)).ravel().tolist(), "ticklen": 2}
    if any(int(curve.sizes[0]) == 0 for curve in curves):
        scale |= {"tickvals": [sheet.empty, *scale["tickvals"]], "ticktext": ["0", *scale["ticktext"]]}
        low = 0.8 * sheet.empty
        figure.add_shape(  # 0 is no point of the scale
            type="line", x0=2**0.5 * sheet.empty, x1=2**0.5 * sheet.empty, yref="y domain", y0=0, y1=1,
            line={"color": FAINT, "width": 1}, layer="below",
        )  # fmt: skip
    scale["range"] = [log10(low), log10(1.15)]
    numbers = edge_ticks(most)
    lowest = min(float(curve.faithfulness.min()) for curve in curves)
    highest = max(float(curve.faithfulness.max()) for curve in curves)
    metric = curves[0].metric
    figure.update_layout(
        xaxis={**scale, "title": {"text": "circuit size (share of all edges)"}},
        xaxis2={  # the same scale, read as numbers
            **scale, "matches": "x", "overlaying": "x", "side": "top", "visible": sheet.n_edges is not None,
            "tickvals": [number / most for number in numbers["tickvals"]], "ticktext": numbers["ticktext"],
            "minor": None, "title": {"text": "circuit size (edges)"},
        },
        xaxis3={**scale, "matches": "x", "anchor": "y2", "title": {"text": "minimal size (share of all edges)"}},
        yaxis={
            "domain": [1 - _CURVES / sheet.height, 1],
            # a share of a difference may leave the unit interval
            "range": [min(-0.03, lowest - 0.05), max(1.05, highest + 0.05)],
            "dtick": 0.2 if highest - lowest < 2 else None,
            "title": {"text": f"faithfulness ({MEASURES.get(metric, label(metric))})"},
        },
        yaxis2={  # the first row on top
            "domain": [0, sheet.rows_height / sheet.height], "range": [len(curves) - 0.6, -0.7 - 0.2 * sheet.labelled],
            "visible": False, "fixedrange": True,
        },
    )  # fmt: skip
    if not sheet.named:
        logs = sheet.logs
        marks = sorted({logs[0], (logs[0] + logs[-1]) / 2, logs[-1]})
        figure.update_layout(
            coloraxis={
                "colorscale": colour_scale(_SCALE),
                "cmin": logs[0],
                "cmax": logs[-1],
                "colorbar": colour_bar(
                    f"minimal size for {sheet.thresholds[sheet.at]:g} (share)",
                    tickvals=marks, ticktext=[percent(10**mark) for mark in marks],
                    y=1, yanchor="top", len=_CURVES, lenmode="pixels",
                ),
            }
        )  # fmt: skip
