"""(a) Is processing dense?"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go

from studies.corpora import NULL, TARGET, THRESHOLDS
from studies.findings.answer import (
    HUES,
    Estimate,
    Finding,
    Holds,
    Row,
    Sweeps,
    as_number,
    as_percent,
    each_of,
    shares,
    table_of,
    word_of,
)
from tracedensity.plot.theme import finished

DENSE, SPARSE = 0.5, 0.1
"""Shares of all edges above which a prediction is called dense, and below which sparse."""

_APART = 0.012  # of faithfulness, so that bars at one threshold do not hide each other


def find(sweeps: Sweeps) -> Finding:
    """How many edges the median context needs, by both estimators."""
    rows: list[Row] = []
    words: dict[str, dict[str, dict[str, str]]] = {"published": {}, "tight": {}}
    figure = go.Figure()

    def add(model: str, corpus: str, kind: str, estimator: str) -> None:
        known = sweeps.rows(model, corpus, kind, "thresholds")
        at = {threshold: known[known["threshold"] == threshold] for threshold in THRESHOLDS}
        found = {threshold: _median(sweeps, each) for threshold, each in at.items()}
        row: Row = {"model": model, "text": corpus, "estimator": estimator}
        row |= {f"at {threshold:g}": as_percent(each) for threshold, each in found.items()}
        most = at[TARGET]
        falls = (most["stable_size"] > most["size"]).mean()
        row |= {f"lasting at {TARGET:g}": as_percent(_median(sweeps, most, "stable_fraction"))}
        rows.append({
            **row, "differ": f"{falls:.0%}", "contexts": known["index"].nunique(),
            "documents": known["document"].nunique(),
        })  # fmt: skip
        _, low, high = found[TARGET]
        word = "dense" if low > DENSE else "sparse" if high < SPARSE else "in between"
        if model != NULL:
            words[estimator].setdefault(model, {})[corpus] = word
        if corpus == "wikitext":
            dash = {"published": "solid", "tight": "dot"}[estimator]
            shift = _APART * (sweeps.models.index(model) - 1.5 + (estimator == "tight") / 2)
            _quartiles(figure, at.values(), shift, f"{model}, {estimator}", HUES[model], dash)

    for model in sweeps.models:
        add(model, "wikitext", "norm", "published")
        add(model, "books", "norm", "published")
        if model != NULL:
            add(model, "wikitext", "tight", "tight")
    finished(
        figure, "How much of the network a prediction needs", ["share of all edges, median and quartiles", "WikiText"],
        plot_height=300, left=84,
    )  # fmt: skip
    figure.update_xaxes(title="faithfulness", tickvals=[*THRESHOLDS], range=[0.42, 0.98])
    figure.update_yaxes(title="share of all edges", **shares())
    holds: Holds = {}  # of models, of which all of it is asked
    for estimator, found in words.items():
        for model, said in found.items():
            for corpus, word in said.items():
                holds.setdefault(f"{estimator}, {corpus}", {})[model] = word == "dense"
    few = min(int(row["contexts"]) for row in rows if row["estimator"] == "tight")
    names = {"published": "published", "tight": f"tight (of {few} contexts)"}
    kinds = "; ".join(f"{names[estimator]} {_said(found)}" for estimator, found in words.items())
    also = {
        "ratios": each_of(sweeps.trained, lambda model: _ratio(sweeps, model)),
        "entropy": each_of(sweeps.models, lambda model: f"{sweeps.rows(model)['entropy'].median():.2f}"),
        "null": each_of(sweeps.models, lambda model: _gain(sweeps, model)),
    }
    return Finding(f"{word_of(holds)}: {kinds}", "", table_of(rows), {"": figure}, also)


def _said(words: dict[str, dict[str, str]]) -> str:
    """What is said of each model, of its texts together where that is the same."""
    where: dict[str, list[str]] = {}
    for model, by_text in words.items():
        for corpus, word in by_text.items():
            name = model if len({*by_text.values()}) == 1 else f"{model} on {corpus}"
            where.setdefault(word, [])
            where[word] += [name] * (name not in where[word])
    return next(iter(where)) if len(where) == 1 else ", ".join(f"{w} for {' and '.join(n)}" for w, n in where.items())


def _ratio(sweeps: Sweeps, model: str) -> str:
    """Size of the published circuits over that of the tight ones, of the same contexts."""
    tight, published = (sweeps.rows(model, kind=kind, table="thresholds") for kind in ("tight", "norm"))
    both = tight.merge(published, on=["id", "threshold"], suffixes=("", "_published"))
    both = both[both["threshold"] == TARGET]
    ratio = np.log(both["size_published"].to_numpy(float) / both["size"].to_numpy(float))
    low, high = np.exp(sweeps.interval(ratio, both["document"], np.mean))
    return as_number((float(np.exp(ratio.mean())), low, high), ".1f")


def _gain(sweeps: Sweeps, model: str) -> str:
    """How much larger the area of random circuits is."""
    known = sweeps.rows(model)
    gain = (known["auc_random"] - known["auc_coarse"]).to_numpy(float)
    low, high = sweeps.interval(gain, known["document"], np.mean)
    return f"{gain.mean():.2f} ({low:.2f} to {high:.2f}, above zero for {(gain > 0).mean():.0%})"


def _median(sweeps: Sweeps, rows: Any, column: str = "fraction") -> Estimate:
    values = rows[column].to_numpy(float)
    return float(np.median(values)), *sweeps.interval(values, rows["document"], np.median)


def _quartiles(figure: go.Figure, rows: Iterable[Any], shift: float, name: str, colour: str, dash: str) -> None:
    values = [each["fraction"].to_numpy(float) for each in rows]
    low, middle, high = (np.array([np.quantile(each, q) for each in values]) for q in (0.25, 0.5, 0.75))
    figure.add_scatter(
        x=np.array(THRESHOLDS) + shift, y=middle, name=name, mode="lines+markers",
        line={"color": colour, "dash": dash},
        error_y={"type": "data", "array": high - middle, "arrayminus": middle - low, "thickness": 1, "width": 0},
    )  # fmt: skip
