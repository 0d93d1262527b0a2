"""Figures of Shapley values: all prompts and covariates, or one covariate."""

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int

from tracedensity.plot.theme import (
    COLOURS,
    MUTED,
    Theme,
    colour_bar,
    colour_scale,
    finished,
    label,
    require_result,
)
from tracedensity.study.covariates import AREAS, NUMERIC

if TYPE_CHECKING:
    from tracedensity.study.shapley import ShapValues

_ROW = 44  # px per covariate
_BINS = 60
_POINTS = 1000
"""Prompts that are drawn, without WebGL: a browser has fewer canvases for it than a page has figures."""


def plot_shap(values: "ShapValues", *, theme: Theme | str = "light") -> go.Figure:
    """Shapley values of prompts, a row per covariate, coloured by what the covariate is there (beeswarm).

    Of more than 1,000 prompts as many are drawn, at random.

    Args:
        values: What `tracedensity.study.shap_values` has found.
        theme: "light" or "dark".

    Raises:
        ValueError: If it is something else.
    """
    _require(values)
    table: Any = values.table
    names = list(table["covariate"])[::-1]
    drawn = _drawn(len(values.values))
    figure = go.Figure()
    figure.add_vline(x=0, line={"color": MUTED, "width": 1})
    for row, name in enumerate(names):
        phi = values.values[name].to_numpy(float)
        of = values.covariates[name].to_numpy(float)
        rank = (np.argsort(np.argsort(of, kind="stable"), kind="stable") + 0.5) / len(of)
        figure.add_scatter(
            x=phi[drawn], y=row + _spread(phi[drawn]), mode="markers", showlegend=False, name=name,
            customdata=of[drawn],
            marker={
                "size": 4, "opacity": 0.8, "color": rank[drawn], "cmin": 0, "cmax": 1,
                "colorscale": colour_scale((COLOURS["head"], COLOURS["residual"], COLOURS["mlp"])),
                "showscale": row == 0,
                "colorbar": colour_bar("covariate (rank)", tickvals=[0.02, 0.98], ticktext=["low", "high"]),
            },
            hovertemplate=label(name.replace("_", " ")) + " %{customdata:.3g}<br>%{x:.3g}<extra></extra>",
        )  # fmt: skip
    shown = [name.replace("_", " ") + ("" if counts else " *") for name, counts in _counts(table, names)]
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=[label(each) for each in shown])
    figure.update_yaxes(range=[-0.6, len(names) - 0.4])
    figure.update_xaxes(title=f"Shapley value (in units of {_unit(values.outcome)})")
    return finished(
        figure, "What a regression of density draws on",
        [f"R² out of fold {values.r2:.2f}", _prompts(values), f"{values.n_documents} documents"],
        plot_height=_ROW * max(3, len(names)), theme=theme, left=140, right=84,
        remark="It explains the regression, not the model. * no more than chance gives the largest of those compared.",
    )  # fmt: skip


def plot_shap_dependence(values: "ShapValues", covariate: str, *, theme: Theme | str = "light") -> go.Figure:
    """Shapley values of one covariate over what it is, of the same prompts.

    Args:
        values: What `tracedensity.study.shap_values` has found.
        covariate: Which.
        theme: "light" or "dark".

    Raises:
        ValueError: If it is something else, or has no such covariate.
    """
    _require(values)
    if covariate not in values.values.columns:
        raise ValueError(f"`covariate` must be one of {list(values.values.columns)}, got {covariate!r}.")
    drawn = _drawn(len(values.values))
    x, phi = (each[covariate].to_numpy(float)[drawn] for each in (values.covariates, values.values))
    figure = go.Figure()
    figure.add_hline(y=0, line={"color": MUTED, "width": 1})
    figure.add_scatter(
        x=x, y=phi, mode="markers", showlegend=False, marker={"size": 4, "color": COLOURS["head"], "opacity": 0.6},
        hovertemplate="%{x:.3g}: %{y:.3g}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title=label(NUMERIC.get(covariate, covariate)))
    figure.update_yaxes(title=f"Shapley value ({_unit(values.outcome)})")
    return finished(
        figure, f"What {covariate.replace('_', ' ')} adds to predicted density", [_prompts(values)],
        plot_height=320, theme=theme, left=76,
        remark="It explains the regression, not the model.",
    )  # fmt: skip


def _require(values: object) -> None:
    from tracedensity.study.shapley import ShapValues

    require_result("values", values, ShapValues, "`td.study.shap_values(table)`")


def _drawn(n_prompts: int) -> Int[np.ndarray, " point"]:
    """Which prompts are drawn; always the same."""
    return np.sort(np.random.default_rng(0).permutation(n_prompts)[:_POINTS])


def _prompts(values: "ShapValues") -> str:
    n = len(values.values)
    return f"{_POINTS:,} of {n:,} prompts" if n > _POINTS else f"{n} prompts"


def _counts(table: Any, names: list[str]) -> list[tuple[str, bool]]:
    known = dict(zip(table["covariate"], table["counts"], strict=True))
    return [(name, bool(known[name])) for name in names]


def _unit(outcome: str) -> str:
    return "area" if outcome in AREAS else "log10 of size"


def _spread(values: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """Heights within a row, so that many equal values lie side by side; always the same."""
    low, high = values.min(), values.max()
    which = np.clip(((values - low) / max(high - low, 1e-12) * _BINS).astype(int), 0, _BINS - 1)
    most = np.bincount(which).max()
    offset = np.empty(len(values))
    for each in np.unique(which):
        members = np.flatnonzero(which == each)
        offset[members] = (np.arange(len(members)) - (len(members) - 1) / 2) / max(most, 12) * 0.8
    return offset
