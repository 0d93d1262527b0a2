"""(b) Is density dynamic: does it differ between inputs by more than its measurement's noise?"""

from itertools import product
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int

from studies.corpora import CORPORA, NULL, TARGET, THRESHOLDS
from studies.findings.answer import (
    HUES,
    Finding,
    Holds,
    Row,
    Sweeps,
    as_number,
    details_of,
    each_of,
    of_sweep,
    shares,
    table_of,
    verdict_of,
)
from tracedensity.plot.theme import finished
from tracedensity.study.covariates import outcome_of, unique_prompts
from tracedensity.study.grid import half_areas
from tracedensity.study.statistics import codes

RANGE = 3
"""Sizes of the 90th over that of the 10th percentile from which density is called dynamic."""


def find(sweeps: Sweeps) -> Finding:
    """How far sizes differ between contexts of one length, and how much of the area's variance is noise."""
    rows: list[Row] = []
    holds: Holds = {}
    untrained: Holds = {}
    figure = go.Figure()
    for model, corpus in product(sweeps.models, CORPORA):
        known = unique_prompts(sweeps.rows(model, corpus))
        other = unique_prompts(sweeps.rows(model, corpus, "flow"))
        row: Row = {"model": model, "text": corpus}
        where, asked = of_sweep(model, corpus), untrained if model == NULL else holds
        for threshold in THRESHOLDS:
            size = outcome_of(known, "fraction", threshold)
            both = np.stack([size, np.log(known["n_tokens"].to_numpy(float))], axis=1)
            given = (ratio_given_length(both), *sweeps.interval(both, known["document"], ratio_given_length))
            row[f"90th / 10th at {threshold:g}"] = f"{_ratio(size):.1f}; given length {as_number(given, '.1f')}"
            asked.setdefault(f"sizes differ at {threshold:g}", {})[where] = given[1] >= RANGE
        halves = np.array([half_areas(*each) for each in zip(known["sizes"], known["faithfulness"], strict=True)])
        upper = sweeps.correlation(halves, known["document"])
        area = outcome_of(known, "area")
        both = known.loc[known.index.intersection(other.index)], other.loc[known.index.intersection(other.index)]
        areas = np.stack([outcome_of(each, "area") for each in both], axis=1)
        lower = sweeps.correlation(areas, both[0]["document"])
        rows.append({
            **row,
            "correlation of halves": as_number(upper),
            "with another scoring": as_number(lower),
            "noise": " to ".join(f"{each:.0%}" for each in sorted((1 - upper[0], 1 - max(lower[0], 0)))),
            "between articles": f"{max(intraclass(area, codes(known['document'].to_numpy())), 0):.0%}",
            "contexts (other scoring)": f"{len(known)} ({len(both[0])})",
        })  # fmt: skip
        asked.setdefault("beyond noise by halves", {})[where] = upper[1] > 0.5
        asked.setdefault("beyond noise by another scoring", {})[where] = lower[1] > 0.5
        if corpus != "wikitext":
            continue
        share = np.sort(10 ** outcome_of(known, "fraction", TARGET))
        figure.add_scatter(
            x=share, y=(np.arange(len(share)) + 0.5) / len(share), name=model, mode="lines",
            line={"color": HUES[model], "dash": "dot" if model == NULL else "solid"},
        )  # fmt: skip
    finished(
        figure, f"What contexts need for {TARGET:.0%} faithfulness", ["WikiText", "published estimator"],
        plot_height=300,
    )  # fmt: skip
    figure.update_xaxes(title="share of all edges", **shares())
    figure.update_yaxes(title="share of contexts", tickformat=".0%")
    bound = each_of(sweeps.trained, lambda model: f"{_most(sweeps.rows(model)):.1f}")
    return Finding(verdict_of(holds), details_of(holds, untrained), table_of(rows), {"": figure}, {"bound": bound})


def _ratio(log_size: Float[np.ndarray, " row"]) -> float:
    return float(10 ** (np.quantile(log_size, 0.9) - np.quantile(log_size, 0.1)))


def ratio_given_length(both: Float[np.ndarray, "row 2"]) -> float:
    """The ratio of what a straight line over the logarithm of the length leaves of log10 of size."""
    size, length = both.T
    slope, _ = np.polyfit(length, size, 1) if np.ptp(length) > 0 else (0.0, 0.0)
    return _ratio(size - slope * length)


def _most(known: Any) -> float:
    """The largest ratio that is possible: of all edges to those of the 10th percentile."""
    return float(10 ** -np.quantile(outcome_of(unique_prompts(known), "fraction", TARGET), 0.1))


def intraclass(values: Float[np.ndarray, " row"], group: Int[np.ndarray, " row"]) -> float:
    """Share of variance that lies between groups: ICC(1) of a one-way analysis of variance."""
    count = np.bincount(group)
    n, n_groups = len(values), len(count)
    means = np.bincount(group, values) / count
    between = (count * (means - values.mean()) ** 2).sum() / (n_groups - 1)
    within = ((values - means[group]) ** 2).sum() / (n - n_groups) if n > n_groups else np.nan
    size = (n - (count**2).sum() / n) / (n_groups - 1)  # of a group, where they differ
    return float((between - within) / (between + (size - 1) * within))
