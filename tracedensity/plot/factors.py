"""Figures of what density goes with: correlations with covariates, and the effect of length."""

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tracedensity.plot.theme import COLOURS, INK, MUTED, Theme, finished, label, require_result
from tracedensity.study.covariates import AREAS, NUMERIC, OUTCOMES

if TYPE_CHECKING:
    from tracedensity.study.associations import Factors
    from tracedensity.study.nested import Lengths

_ROW = 30  # px per covariate
_PANEL = 150  # px per outcome


def plot_factors(factors: "Factors", outcome: str | None = None, *, theme: Theme | str = "light") -> go.Figure:
    """Rank correlations of an outcome with covariates, strongest on top: plain, and given the controls.

    Lines are bootstrap intervals over documents. A filled point is a correlation that stays after correction for all
    that was tested.

    Args:
        factors: What `tracedensity.study.factors` has found.
        outcome: Which of its outcomes; by default the first.
        theme: "light" or "dark".

    Raises:
        ValueError: If it is something else, or has no such outcome.
    """
    from tracedensity.study.associations import Factors

    require_result("factors", factors, Factors, "`td.study.factors(table)`")
    table: Any = factors.table
    known = list(dict.fromkeys(table["outcome"]))
    asked = known[0] if outcome is None else outcome
    if asked not in known:
        raise ValueError(f"`outcome` must be one of {known}, got {outcome!r}.")
    table = table[(table["outcome"] == asked) & table["rho"].notna()]
    table = table.iloc[table["rho"].abs().argsort(kind="stable")]
    place = np.arange(len(table))
    figure = go.Figure()
    figure.add_vline(x=0, line={"color": MUTED, "width": 1})
    looks = (("", "correlation", COLOURS["circuit"], 0.14), ("partial_", "given the controls", COLOURS["mlp"], -0.14))
    for prefix, name, colour, shift in looks:
        rho, low, high = (table[f"{prefix}{each}"].to_numpy(float) for each in ("rho", "low", "high"))
        stays = table[f"{prefix}p_holm"].to_numpy(float) < 0.05
        said = np.stack([[label(NUMERIC.get(each, each)) for each in table["covariate"]], table["controls"]], axis=1)
        figure.add_scatter(
            x=rho, y=place + shift, mode="markers", name=name, customdata=said,
            marker={
                "color": colour, "size": 8, "symbol": ["circle" if each else "circle-open" for each in stays],
                "line": {"width": 1.5, "color": colour},
            },
            error_x={
                "type": "data", "array": np.nan_to_num(high - rho), "arrayminus": np.nan_to_num(rho - low),
                "color": colour, "thickness": 1.5, "width": 0,
            },
            hovertemplate="%{customdata[0]}<br>%{x:.3f}" + ("<br>given %{customdata[1]}" if prefix else "")
            + "<extra></extra>",
        )  # fmt: skip
    names = [each.replace("_", " ") for each in table["covariate"]]
    at = [] if asked in AREAS else [f"faithfulness {factors.threshold:g}"]
    figure.update_yaxes(tickvals=place, ticktext=[label(each) for each in names], range=[-0.6, len(table) - 0.4])
    figure.update_xaxes(title="Spearman correlation", range=[-1.02, 1.02])
    return finished(
        figure, f"What {_about(asked)} goes with",
        [f"{table['n'].max()} prompts", f"{factors.n_documents} documents", *at],
        plot_height=_ROW * max(4, len(table)), theme=theme, left=132,
        remark="Filled: p < 0.05 after Holm's correction. Controls: " + ", ".join(factors.controls) + ".",
    )  # fmt: skip


def plot_lengths(lengths: "Lengths", *, theme: Theme | str = "light") -> go.Figure:
    """Means of each outcome over the length of the context, with bootstrap intervals, for the same predictions.

    Args:
        lengths: What `tracedensity.study.lengths` has found.
        theme: "light" or "dark".

    Raises:
        ValueError: If it is something else.
    """
    from tracedensity.study.nested import Lengths

    require_result("lengths", lengths, Lengths, "`td.study.lengths(table)`")
    table: Any = lengths.by_length
    outcomes = list(dict.fromkeys(table["outcome"]))
    figure = make_subplots(rows=len(outcomes), cols=1, shared_xaxes=True, vertical_spacing=0.3 / len(outcomes) / 2)
    for row, outcome in enumerate(outcomes, start=1):
        some = table[table["outcome"] == outcome]
        mean, low, high = (some[each].to_numpy(float) for each in ("mean", "low", "high"))
        figure.add_scatter(
            x=some["length"], y=mean, mode="lines+markers", line={"color": INK, "width": 1.5}, showlegend=False,
            error_y={
                "type": "data", "array": np.nan_to_num(high - mean), "arrayminus": np.nan_to_num(mean - low),
                "color": INK, "thickness": 1.5, "width": 0,
            },
            hovertemplate="%{x} tokens: %{y:.3f}<extra></extra>", row=row, col=1,
        )  # fmt: skip
        axis = outcome.replace("_", " ") if outcome in AREAS else f"log10 {outcome.replace('_', ' ')}"
        figure.update_yaxes(title=label(axis), row=row, col=1)
    ticks = sorted(set(table["length"]))
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[str(each) for each in ticks])
    figure.update_xaxes(title="context (tokens)", row=len(outcomes), col=1)
    targets: Any = lengths.table
    return finished(
        figure, "The same predictions from longer contexts",
        [f"{targets['n'].max()} targets", f"{lengths.n_documents} documents", f"faithfulness {lengths.threshold:g}"],
        plot_height=_PANEL * len(outcomes), theme=theme, left=104,
    )  # fmt: skip


def _about(outcome: str) -> str:
    if outcome in AREAS:
        return f"density ({outcome.replace('_', ' ')})"
    return f"the size of circuits ({OUTCOMES[outcome]})"
