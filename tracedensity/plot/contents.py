"""Figures of what the circuits of a corpus hold."""

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from tracedensity.plot.theme import (
    COLOURS,
    INK,
    SEQUENTIAL,
    Theme,
    finished,
    label,
    percent,
    require_result,
    share_ticks,
)

if TYPE_CHECKING:
    from tracedensity.study.inventory import Contents

_PARTS = {
    "heads": COLOURS["head"], "MLPs": COLOURS["mlp"], "skip connections": COLOURS["residual"],
    "embedding": COLOURS["inverse"],
}  # fmt: skip
_NAMED = 40
"""Components whose names fit under one another."""


def plot_contents(contents: "Contents", what: str = "composition", *, theme: Theme | str = "light") -> go.Figure:
    """What circuits of each size are made of; which components come again; what they predict; whether there are phases.

    Args:
        contents: What `tracedensity.study.contents` has found.
        what: ``"composition"``, ``"layers"``, ``"recurrence"``, ``"prediction"`` or ``"phases"``.
        theme: "light" or "dark".

    Raises:
        ValueError: If it is something else, or there is no such figure.
    """
    from tracedensity.study.inventory import Contents

    require_result("contents", contents, Contents, "`td.study.contents(folder)`")
    drawn = {
        "composition": _composition, "layers": _layers, "recurrence": _recurrence, "prediction": _prediction,
        "phases": _phases,
    }  # fmt: skip
    if what not in drawn:
        raise ValueError(f"`what` must be one of {list(drawn)}, got {what!r}.")
    return drawn[what](contents, theme)


def _composition(contents: "Contents", theme: Theme | str) -> go.Figure:
    table: Any = contents.by_size
    figure = go.Figure()
    for column in (each for each in table.columns if each.startswith("part=")):
        name = column.removeprefix("part=")
        _area(figure, table["share"], table[column], name, _PARTS[name])
    return _stacked(figure, contents, "What circuits are made of", theme)


def _layers(contents: "Contents", theme: Theme | str) -> go.Figure:
    table: Any = contents.by_size
    columns = [each for each in table.columns if each.startswith("quarter=")]
    figure = go.Figure()
    for number, column in enumerate(columns):
        name = f"quarter {number + 1}" + (" (lowest)" if not number else "")
        _area(figure, table["share"], table[column], name, SEQUENTIAL[1:][number])
    return _stacked(figure, contents, "Which layers the edges of circuits are in", theme)


def _area(figure: go.Figure, x: Any, y: Any, name: str, colour: str) -> None:
    known = np.isfinite(y.to_numpy(float))  # a circuit without edges is made of nothing
    figure.add_scatter(
        x=x[known], y=y[known], mode="lines", name=label(name), stackgroup="all", line={"color": colour, "width": 0.5},
        fillcolor=colour, hovertemplate="%{x:.2~%} of all edges: %{y:.0%}<extra>" + label(name) + "</extra>",
    )  # fmt: skip


def _stacked(figure: go.Figure, contents: "Contents", title: str, theme: Theme | str) -> go.Figure:
    figure.update_xaxes(title="size (share of all edges)", **share_ticks(100_000))
    figure.update_yaxes(title="share of the circuit's edges", tickformat=".0%", range=[0, 1])
    return finished(figure, title, [f"mean over {contents.n} prompts"], plot_height=300, theme=theme)


def _recurrence(contents: "Contents", theme: Theme | str) -> go.Figure:
    table: Any = contents.recurrence.sort_values("often", ascending=False)
    if len(table) > _NAMED:
        table = table.iloc[:_NAMED]
    names, often = [label(each) for each in table["component"]], table["often"].to_numpy(float)
    stays = table["p_holm"].to_numpy(float) < 0.05
    place = np.arange(len(table))[::-1]
    figure = go.Figure()
    figure.add_bar(
        x=often, y=place, orientation="h", showlegend=False,
        marker={"color": [COLOURS["head"] if each else COLOURS["residual"] for each in stays]},
        hovertemplate="%{x:.0%} of prompts<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=table["expected"], y=place, mode="markers", showlegend=False,
        marker={"symbol": "line-ns", "size": 11, "line": {"color": INK, "width": 2}},
        hovertemplate="%{x:.0%} by chance<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(tickvals=place, ticktext=names)
    figure.update_xaxes(title="share of prompts", tickformat=".0%", range=[0, 1.02])
    about = [f"circuits of {percent(contents.share)} of all edges", f"{contents.n} prompts"]
    left_out = len(contents.recurrence) - len(table)
    return finished(
        figure, "Which components come again", about, plot_height=max(120, 16 * len(table)), theme=theme, left=84,
        remark=(f"The first {_NAMED}; {left_out} are left out. " if left_out else "")
        + "Ticks: if each prompt drew as many of the kind at random. Grey: no further from that than chance.",
    )  # fmt: skip


def _prediction(contents: "Contents", theme: Theme | str) -> go.Figure:
    table: Any = contents.by_size
    figure = go.Figure()
    looks = (
        ("faithfulness", "faithfulness", INK, "solid"), ("top1", "same top token", COLOURS["head"], "solid"),
        ("nucleus", "nucleus recovered", COLOURS["inverse"], "dash"),
        ("unigram_tv", "distance to token frequencies", COLOURS["mlp"], "dot"),
    )  # fmt: skip
    for name, shown, colour, dash in looks:
        if name in table.columns:
            _band(figure, table, name, shown, colour, dash)
    figure.update_xaxes(title="size (share of all edges)", **share_ticks(100_000))
    figure.update_yaxes(title="mean over prompts", range=[0, 1.02])
    return finished(
        figure, "What circuits of each size predict", [f"{contents.n} prompts"], plot_height=320, theme=theme
    )


def _phases(contents: "Contents", theme: Theme | str) -> go.Figure:
    table: Any = contents.by_size
    figure = go.Figure()
    looks = (("faithfulness", "circuits", INK), ("random", "random", COLOURS["random"]))
    said = []
    for name, key, colour in looks:
        if name not in table.columns:
            continue
        shown = "circuits" if key == "circuits" else "random circuits"
        _band(figure, table[table[name].notna()], name, shown, colour)
        phases = contents.phases.get(key)
        if phases is not None and phases.break_at is not None:
            figure.add_vline(x=phases.break_at, line={"color": colour, "dash": "dot", "width": 1.5})
            said.append(f"{shown}: break at {percent(phases.break_at)} of all edges")
        elif phases is not None:
            said.append(f"{shown}: no break")
    figure.update_xaxes(title="size (share of all edges)", **share_ticks(100_000))
    figure.update_yaxes(title="faithfulness", range=[0, 1.02])
    return finished(figure, "Are there two phases?", said, plot_height=320, theme=theme)


def _band(figure: go.Figure, table: Any, name: str, shown: str, colour: str, dash: str = "solid") -> None:
    x, mean = table["share"].to_numpy(float), table[name].to_numpy(float)
    low, high = (table[f"{name}_{each}"].to_numpy(float) for each in ("low", "high"))
    figure.add_scatter(
        x=x, y=mean, mode="lines", name=shown, line={"color": colour, "width": 2, "dash": dash},
        error_y={
            "type": "data", "array": np.nan_to_num(high - mean), "arrayminus": np.nan_to_num(mean - low),
            "color": colour, "thickness": 1, "width": 0,
        },
        hovertemplate="%{x:.2~%} of all edges: %{y:.3f}<extra>" + shown + "</extra>",
    )  # fmt: skip
