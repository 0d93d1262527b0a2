"""(e) Does longer context lower density?"""

from typing import Any

import numpy as np
import plotly.graph_objects as go

import tracedensity as td
from studies.corpora import NULL, TARGET, THRESHOLDS
from studies.findings.answer import (
    HUES,
    PERMUTATIONS,
    Finding,
    Holds,
    Row,
    Sweeps,
    corrected,
    details_of,
    star,
    table_of,
    verdict_of,
)
from tracedensity.plot.theme import MUTED, finished
from tracedensity.study.covariates import SIZES, outcome_of

CEILING = 0.5
"""From this share of contexts at the largest value on, a normalisation has no room to move, and is not judged."""

_AREAS = {"area": "area", "auc_of_edges": "area of one edge or more"}

_SHORT = {"auc_of_edges": "area of<br>1+ edges"}  # on an axis


def find(sweeps: Sweeps) -> Finding:
    """Slopes of density over the length of the context, for the same targets, counted in every way."""
    found: dict[tuple[str, float], Any] = {}
    full: dict[tuple[str, float], float] = {}
    for model in sweeps.models:
        nested = sweeps.rows(model, kind="nested")
        for threshold in THRESHOLDS:
            # areas have no threshold
            outcomes = [*SIZES, *(_AREAS if threshold == TARGET else [])]
            found[model, threshold] = td.study.lengths(
                nested, outcomes=outcomes, threshold=threshold, n_bootstrap=sweeps.n_draws
            )
            full[model, threshold] = float((outcome_of(nested, "component_share", threshold) > -1e-9).mean())
    tests = corrected(found, ("p",), PERMUTATIONS)
    rows: list[Row] = []
    areas: dict[str, Row] = {}
    holds: Holds = {}
    rises: Holds = {}
    untrained: Holds = {}
    for (model, threshold), table in tests.items():
        row: Row = {"model": model, "at": f"{threshold:g}"}
        for each in table.to_dict("records"):
            outcome = str(each["outcome"])
            name = _AREAS.get(outcome, outcome.replace("_", " "))
            mark = star(each["p_holm"])
            said = f"{each['slope']:+.3f}{mark} ({each['low']:+.3f} to {each['high']:+.3f})"
            where = model if outcome in _AREAS else f"{model} at {threshold:g}"
            if outcome in _AREAS:
                areas.setdefault(model, {"model": model})[name] = said
            elif outcome == "component_share" and full[model, threshold] >= CEILING:
                row[name] = f"{said}, at its ceiling in {full[model, threshold]:.0%}"
                continue
            else:
                row[name] = said
            falls, grows = (bool(mark) and sign * each["slope"] > 0 for sign in (-1, 1))
            if model == NULL:
                untrained.setdefault(name, {})[where] = falls
            else:
                holds.setdefault(name, {})[where] = falls
                rises.setdefault(name, {})[where] = grows
        rows.append({**row, "targets": table["n"].to_numpy().max()})
    verdict, also = verdict_of(holds), {"areas": table_of([*areas.values()])}
    if up := [name for name, each in rises.items() if all(each.values())]:
        verdict += f"; it rises everywhere by {', '.join(up)}"
    return Finding(verdict, details_of(holds, untrained), table_of(rows), {"": _figure(found)}, also)


def _figure(found: dict[tuple[str, float], Any]) -> go.Figure:
    """All slopes on one scale: models side by side, the lowest and the highest faithfulness."""
    figure = go.Figure()
    figure.add_hline(y=0, line={"color": MUTED, "width": 1})
    names = [*_AREAS, *SIZES]
    models = list(dict.fromkeys(model for model, _ in found))
    for number, model in enumerate(models):
        for threshold, symbol in ((THRESHOLDS[0], "circle-open"), (TARGET, "circle")):
            table: Any = found[model, threshold].table.set_index("outcome")
            known = [name for name in names if name in table.index]
            mean, low, high = (table.loc[known, column].to_numpy(float) for column in ("slope", "low", "high"))
            shift = 0.16 * (number - (len(models) - 1) / 2) + (0.05 if symbol == "circle" else -0.03)
            figure.add_scatter(
                x=np.array([names.index(name) for name in known]) + shift, y=mean, mode="markers",
                name=f"{model}, {threshold:g}", marker={"color": HUES[model], "symbol": symbol, "size": 7},
                error_y={
                    "type": "data", "array": high - mean, "arrayminus": mean - low, "color": HUES[model],
                    "thickness": 1.2, "width": 0,
                },
            )  # fmt: skip
    short = [_SHORT.get(name, name.replace("_", "<br>").replace("per<br>", "per ")) for name in names]
    figure.update_xaxes(tickvals=[*range(len(names))], ticktext=short, range=[-0.6, len(names) - 0.4])
    figure.update_yaxes(title="change per doubling")
    return finished(
        figure, "The same predictions from longer contexts", ["areas; log10 of sizes at two faithfulnesses"],
        plot_height=340,
    )  # fmt: skip
