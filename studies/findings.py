"""The findings: numbers with intervals and null controls, figures, and verdicts by rules, for `page.md` to say.

The rules, and the constants below, were written before the sweeps of 1,000 contexts were run, and changed once, in a
review, before anybody had looked at what came of them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int

import tracedensity as td
from studies.corpora import RANDOM, THRESHOLDS, TRAINED
from tracedensity.evaluation import RELATIVE_SIZES
from tracedensity.plot.theme import COLOURS, finished, percent
from tracedensity.study.comparison import unique_prompts
from tracedensity.study.covariates import known_outcomes, outcome_of
from tracedensity.study.grid import half_areas, on_grid
from tracedensity.study.inventory import shortest_path
from tracedensity.study.knees import segments
from tracedensity.study.statistics import codes, holm, interval, rank_correlations, resampled

DENSE, SPARSE = 0.5, 0.1
"""Shares of all edges above which a prediction is called dense, and below which sparse."""

RANGE = 3
"""Sizes of the 90th over that of the 10th percentile from which density is called dynamic."""

NEARER = 0.05
"""Total variation distance by which small circuits are nearer to the frequencies of tokens to count as shallow."""

SIGNIFICANT = 0.05
_TARGET = THRESHOLDS[-1]
_DRAWS = 2000
_HUES = (COLOURS["head"], COLOURS["mlp"], COLOURS["circuit"], COLOURS["residual"])

Row = dict[str, Any]
Estimate = tuple[float, float, float]  # and its interval


@dataclass(frozen=True)
class Finding:
    """An answer.

    Attributes:
        verdict: What the rule says.
        table: The numbers, as Markdown.
        figures: By what they are of; the main one by nothing.
        also: Other numbers that the page asks for, by name.
    """

    verdict: str
    table: str
    figures: Mapping[str, go.Figure]
    also: Mapping[str, str]


@dataclass(frozen=True)
class Sweeps:
    """The tables of all sweeps.

    Attributes:
        folder: Where the sweeps are.
    """

    folder: Path

    @cached_property
    def trained(self) -> list[str]:
        """The trained models that were swept."""
        return [name for name in TRAINED if self.path(name).is_dir()]

    def path(self, model: str, corpus: str = "wikitext", kind: str = "norm") -> Path:
        return self.folder / f"{model}-{corpus}-{kind}"

    def prompts(self, model: str, corpus: str = "wikitext", kind: str = "norm", table: str = "prompts") -> Any:
        return td.read_sweep(self.path(model, corpus, kind), table)


# -- (a) ---------------------------------------------------------------------------------------------


def dense(sweeps: Sweeps) -> Finding:
    """Is processing dense?"""
    rows: list[Row] = []
    words: dict[str, list[str]] = {}
    figure = go.Figure()

    def add(model: str, corpus: str, kind: str, estimator: str) -> None:
        known = sweeps.prompts(model, corpus, kind, "thresholds")
        at = {threshold: known[known["threshold"] == threshold] for threshold in THRESHOLDS}
        found = {threshold: _median(each) for threshold, each in at.items()}
        shares = {f"at {threshold:g}": _percent(each) for threshold, each in found.items()}
        most = at[_TARGET]
        falls = (most["stable_size"] > most["size"]).mean()
        shares |= {f"lasting at {_TARGET:g}": _percent(_median(most, "stable_fraction")), "differ": f"{falls:.0%}"}
        n = known["index"].nunique()
        rows.append({"model": model, "text": corpus, "estimator": estimator, **shares, "contexts": n})
        _, low, high = found[_TARGET]
        words.setdefault(estimator, []).append("dense" if low > DENSE else "sparse" if high < SPARSE else "in between")
        if corpus == "wikitext":
            dash = {"published": "solid", "tight": "dot"}[estimator]
            _quartiles(figure, at.values(), f"{model}, {estimator}", _HUES[sweeps.trained.index(model)], dash)

    for model in sweeps.trained:
        add(model, "wikitext", "norm", "published")
        add(model, "books", "norm", "published")
        add(model, "wikitext", "tight", "tight")
    finished(
        figure, "How much of the network a prediction needs", ["share of all edges, median and quartiles", "WikiText"],
        plot_height=300, left=84,
    )  # fmt: skip
    figure.update_xaxes(title="faithfulness", tickvals=[*THRESHOLDS], range=[0.42, 0.98])
    figure.update_yaxes(title="share of all edges", **_shares())
    is_dense = {name: [each == "dense" for each in found] for name, found in words.items()}
    kinds = "; ".join(f"{name} {', '.join(dict.fromkeys(found))}" for name, found in words.items())
    also = {
        "ratios": _each(sweeps.trained, lambda model: _ratio(sweeps, model)),
        "null": _each([*sweeps.trained, RANDOM], lambda model: _gain(sweeps.prompts(model))),
    }
    return Finding(f"{_verdict(is_dense)}: {kinds}", _table(rows), {"": figure}, also)


def _ratio(sweeps: Sweeps, model: str) -> str:
    """Size of the published circuits over that of the tight ones, of the same contexts."""
    tight, published = (sweeps.prompts(model, kind=kind, table="thresholds") for kind in ("tight", "norm"))
    both = tight.merge(published, on=["id", "threshold"], suffixes=("", "_published"))
    both = both[both["threshold"] == _TARGET]
    ratio = np.log(both["size_published"].to_numpy(float) / both["size"].to_numpy(float))
    low, high = np.exp(_bootstrap(ratio, both["document"], np.mean))
    return f"{np.exp(ratio.mean()):.1f} ({low:.1f} to {high:.1f})"


def _gain(known: Any) -> str:
    """How much larger the area of random circuits is."""
    gain = (known["auc_random"] - known["auc_coarse"]).to_numpy(float)
    low, high = _bootstrap(gain, known["document"], np.mean)
    return f"{gain.mean():.2f} ({low:.2f} to {high:.2f}, above zero for {(gain > 0).mean():.0%})"


def _median(rows: Any, column: str = "fraction") -> Estimate:
    values = rows[column].to_numpy(float)
    return float(np.median(values)), *_bootstrap(values, rows["document"], np.median)


def _quartiles(figure: go.Figure, rows: Iterable[Any], name: str, colour: str, dash: str) -> None:
    values = [each["fraction"].to_numpy(float) for each in rows]
    low, middle, high = (np.array([np.quantile(each, q) for each in values]) for q in (0.25, 0.5, 0.75))
    figure.add_scatter(
        x=THRESHOLDS, y=middle, name=name, mode="lines+markers", line={"color": colour, "dash": dash},
        error_y={"type": "data", "array": high - middle, "arrayminus": middle - low, "thickness": 1, "width": 0},
    )  # fmt: skip


# -- (b) ---------------------------------------------------------------------------------------------


def dynamic(sweeps: Sweeps) -> Finding:
    """Does density differ between inputs by more than its measurement's noise?"""
    rows: list[Row] = []
    holds: dict[str, list[bool]] = {}
    figure = go.Figure()
    for hue, model in zip(_HUES, (*sweeps.trained, RANDOM), strict=False):
        known = unique_prompts(sweeps.prompts(model))
        other = unique_prompts(sweeps.prompts(model, kind="flow"))
        shares = {threshold: 10 ** outcome_of(known, "fraction", threshold) for threshold in THRESHOLDS}
        spread = {at: (_range(share), *_bootstrap(share, known["document"], _range)) for at, share in shares.items()}
        halves = np.array([half_areas(*row) for row in zip(known["sizes"], known["faithfulness"], strict=True)])
        upper = _correlation(halves, known["document"])
        area = outcome_of(known, "area")
        mine = area[known.index.get_indexer(other.index)]
        lower = _correlation(np.stack([mine, outcome_of(other, "area")], axis=1), other["document"])
        rows.append({
            "model": model,
            "SD of the area": f"{area.std(ddof=1):.3f}",
            **{f"90th / 10th at {at:g}": f"{each[0]:.1f} ({each[1]:.1f} to {each[2]:.1f})"
               for at, each in spread.items()},
            "correlation of halves": _estimate(upper),
            "with another scoring": _estimate(lower),
            "noise": " to ".join(f"{each:.0%}" for each in sorted((1 - upper[0], 1 - max(lower[0], 0)))),
            "between articles": f"{max(intraclass(area, codes(known['document'].to_numpy())), 0):.0%}",
        })  # fmt: skip
        share = np.sort(shares[_TARGET])
        figure.add_scatter(
            x=share, y=(np.arange(len(share)) + 0.5) / len(share), name=model, mode="lines",
            line={"color": hue, "dash": "dot" if model == RANDOM else "solid"},
        )  # fmt: skip
        if model != RANDOM:
            holds.setdefault("sizes differ", []).append(spread[_TARGET][1] >= RANGE)
            holds.setdefault("beyond noise by halves", []).append(upper[1] > 0.5)
            holds.setdefault("beyond noise by another scoring", []).append(lower[1] > 0.5)
    finished(
        figure, f"What contexts need for {_TARGET:.0%} faithfulness", ["WikiText", "published estimator"],
        plot_height=300,
    )  # fmt: skip
    figure.update_xaxes(title="share of all edges", **_shares())
    figure.update_yaxes(title="share of contexts", tickformat=".0%")
    return Finding(_verdict(holds), _table(rows), {"": figure}, {})


def _range(size: Float[np.ndarray, " row"]) -> float:
    return float(np.quantile(size, 0.9) / np.quantile(size, 0.1))


def intraclass(values: Float[np.ndarray, " row"], group: Int[np.ndarray, " row"]) -> float:
    """Share of variance that lies between groups: ICC(1) of a one-way analysis of variance."""
    count = np.bincount(group)
    n, n_groups = len(values), len(count)
    means = np.bincount(group, values) / count
    between = (count * (means - values.mean()) ** 2).sum() / (n_groups - 1)
    within = ((values - means[group]) ** 2).sum() / (n - n_groups) if n > n_groups else np.nan
    size = (n - (count**2).sum() / n) / (n_groups - 1)  # of a group, where they differ
    return float((between - within) / (between + (size - 1) * within))


# -- (c) ---------------------------------------------------------------------------------------------


def shared(sweeps: Sweeps) -> Finding:
    """Are the same inputs dense for different models?"""
    tables = {model: sweeps.prompts(model) for model in (*sweeps.trained, RANDOM)}
    others = {model: sweeps.prompts(model, kind="flow") for model in tables}
    found = td.study.compare(tables, others=others, n_bootstrap=_DRAWS)
    trained = td.study.compare({model: tables[model] for model in sweeps.trained}, n_bootstrap=_DRAWS)
    rows: list[Row] = []
    holds: dict[str, list[bool]] = {}
    for row in found.table.to_dict("records"):
        plain, length, partial = (
            (row[f"{kind}rho"], row[f"{kind}low"], row[f"{kind}high"]) for kind in ("", "length_", "partial_")
        )
        rows.append({
            "models": f"{row['a']}, {row['b']}", "correlation": _estimate(plain),
            "given lengths": _estimate(length), "its p": f"{row['length_p_holm']:.2g}",
            "given entropies and rarities too": _estimate(partial), "p of that": f"{row['partial_p_holm']:.2g}",
            "ceiling": f"{row['ceiling_low']:.2f} to {row['ceiling_high']:.2f}", "contexts": row["n"],
        })  # fmt: skip
        if RANDOM not in (row["a"], row["b"]):
            for name, kind in (("given lengths", "length"), ("beyond entropy and rarity", "partial")):
                significant = row[f"{kind}_low"] > 0 and row[f"{kind}_p_holm"] < SIGNIFICANT
                holds.setdefault(name, []).append(significant)
    mean = f"{trained.mean:.2f} ({trained.low:.2f} to {trained.high:.2f})"
    return Finding(_verdict(holds), _table(rows), {"": trained.plot()}, {"mean": mean})


# -- (d) ---------------------------------------------------------------------------------------------

_RARITIES = {
    "rarity_target": "rarity of the target", "rarity_top": "of the prediction", "rarity_expected": "expected",
    "entropy": "entropy",
}  # fmt: skip


def rare(sweeps: Sweeps) -> Finding:
    """Do rarer tokens need more?"""
    rows: list[Row] = []
    holds: dict[str, list[bool]] = {}
    found: dict[tuple[str, str], Any] = {}
    for model, corpus in [(model, corpus) for model in sweeps.trained for corpus in ("wikitext", "books")] + [
        (RANDOM, "wikitext")
    ]:
        found[model, corpus] = td.study.factors(sweeps.prompts(model, corpus), outcomes=("area",), n_bootstrap=_DRAWS)
    _correct(found.values(), ("p", "partial_p"))
    for (model, corpus), factors in found.items():
        known: Any = factors.table.set_index("covariate")
        row: Row = {"model": model, "text": corpus}
        for covariate, name in _RARITIES.items():
            each = known.loc[covariate]
            above = [each[f"{kind}low"] > 0 and each[f"{kind}p_holm"] < SIGNIFICANT for kind in ("", "partial_")]
            below = [each[f"{kind}high"] < 0 and each[f"{kind}p_holm"] < SIGNIFICANT for kind in ("", "partial_")]
            stars = ["*" * bool(up or down) for up, down in zip(above, below, strict=True)]
            row[name] = f"{each['rho']:.2f}{stars[0]}, {each['partial_rho']:.2f}{stars[1]}"
            if model != RANDOM and covariate != "entropy":
                holds.setdefault(name, []).append(all(above))
        rows.append(row)
    return Finding(_verdict(holds), _table(rows), {"": next(iter(found.values())).plot()}, {})


# -- (e) ---------------------------------------------------------------------------------------------


def long(sweeps: Sweeps) -> Finding:
    """Does longer context lower density?"""
    rows: list[Row] = []
    holds: dict[str, list[bool]] = {}
    rises: dict[str, list[bool]] = {}
    untrained: list[str] = []
    found = {}
    for model in (*sweeps.trained, RANDOM):
        nested = sweeps.prompts(model, kind="nested")
        outcomes = [each for each in known_outcomes(nested) if each != "auc"]
        found[model] = td.study.lengths(nested, outcomes=outcomes, threshold=_TARGET, n_bootstrap=_DRAWS)
    _correct(found.values(), ("p",))
    for model, lengths in found.items():
        row: Row = {"model": model}
        for each in lengths.table.to_dict("records"):
            name = str(each["outcome"]).replace("_", " ")
            star = _star(each["p_holm"])
            row[name] = f"{each['slope']:+.3f}{star} ({each['low']:+.3f} to {each['high']:+.3f})"
            falls, grows = (bool(star) and sign * each["slope"] > 0 for sign in (-1, 1))
            if model == RANDOM:
                untrained += [name] * falls
                continue
            holds.setdefault(name, []).append(falls)
            rises.setdefault(name, []).append(grows)
        rows.append({**row, "targets": lengths.table["n"].to_numpy().max()})
    up = [name for name, each in rises.items() if all(each)]
    verdict = _verdict(holds) + (f"; it rises, for all of them, by {', '.join(up)}" if up else "")
    if untrained:
        verdict += f"; that of an untrained model falls as well by {', '.join(untrained)}"
    return Finding(verdict, _table(rows), {"": next(iter(found.values())).plot()}, {})


# -- (f) ---------------------------------------------------------------------------------------------


def phases(sweeps: Sweeps) -> Finding:
    """Are there two phases, construction and refinement?"""
    rows: list[Row] = []
    holds: dict[str, list[bool]] = {}
    figures: dict[str, go.Figure] = {}
    untrained = None
    for model in (RANDOM, *sweeps.trained):
        found = td.study.contents(sweeps.path(model), n_bootstrap=_DRAWS, n_null=200)
        circuits, random = found.phases["circuits"], found.phases["random"]
        table: Any = found.by_size
        lasting = table["share"][~(table["top1"] < 0.5)[::-1].cummax()[::-1]]
        share, nearer = _nearer(sweeps, model)
        rows.append({
            "model": model, "break": _break(circuits), "three pieces": _pieces(sweeps, model),
            "break of random circuits": _break(random),
            "top token in half from": f"{lasting.iloc[0]:.2%}",
            "nearest to the frequencies at": f"{share:.2%}", "nearer than the model by": _estimate(nearer),
        })  # fmt: skip
        if model == RANDOM:
            untrained = circuits
            continue
        figures = figures or {"": found.plot("phases"), "predictions": found.plot("prediction")}
        assert untrained is not None
        apart = untrained.break_at is None or circuits.high < untrained.low or circuits.low > untrained.high
        bent = circuits.break_at is not None and circuits.found >= 0.95 and circuits.slopes[0] > circuits.slopes[-1]
        holds.setdefault("steep, then flat", []).append(bent)
        holds.setdefault("broken elsewhere than an untrained model", []).append(bent and apart)
        holds.setdefault("small circuits nearer to the frequencies", []).append(nearer[1] > NEARER)
    return Finding(_verdict(holds), _table([*rows[1:], rows[0]]), figures, {})


def _pieces(sweeps: Sweeps, model: str) -> str:
    """Where the mean curve breaks if it may break twice, and how steep its pieces are."""
    prompts = sweeps.prompts(model)
    x = np.log10(RELATIVE_SIZES)
    able = 10**x * float(prompts["n_edges"].median()) >= shortest_path(prompts)
    curves = [on_grid(*row)[able] for row in zip(prompts["sizes"], prompts["faithfulness"], strict=True)]
    found = segments(x[able], np.mean(curves, axis=0))
    if found.n_segments < 3:
        return "no better"
    edges = [x[able][0], *found.breaks, x[-1]]
    slopes = np.diff(np.interp(edges, x[able], found.fitted)) / np.diff(edges)
    slopes_ = ", ".join(f"{each:.2f}" for each in slopes)
    return f"at {10 ** found.breaks[0]:.2%} and {10 ** found.breaks[1]:.2%}; {slopes_}"


def _nearer(sweeps: Sweeps, model: str) -> tuple[float, Estimate]:
    """At which size circuits predict what is nearest to the frequencies, and how much nearer than the model.

    Among sizes that can lead from an embedding to the prediction; the best of these is taken in each resampling anew.
    """
    points, prompts = sweeps.prompts(model, table="points"), sweeps.prompts(model)
    far = points.pivot(index="index", columns="share", values="unigram_tv")
    distance = far.to_numpy(float)
    able = np.array(far.columns) * float(prompts["n_edges"].median()) >= shortest_path(prompts)
    nearer = distance[:, -1:] - distance[:, able]
    best = int(nearer.mean(0).argmax())
    document = prompts.set_index("index").loc[far.index, "document"]
    interval_ = _bootstrap(nearer, document, lambda some: some.mean(0).max())
    return float(np.array(far.columns)[able][best]), (float(nearer.mean(0)[best]), *interval_)


def _break(each: Any) -> str:
    if each.break_at is None:
        return "none"
    where = f"{each.break_at:.2%} ({each.low:.2%} to {each.high:.2%}) in {each.found:.0%}"
    return f"{where}; {each.slopes[0]:.2f}, then {each.slopes[-1]:.2f}"


# -- (g) ---------------------------------------------------------------------------------------------


def training(sweeps: Sweeps) -> Finding:
    """How density goes over training."""
    found = td.study.trend(sweeps.folder / "steps", n_bootstrap=_DRAWS)
    rows: list[Row] = []
    changes = []
    for row in found.table.to_dict("records"):
        mean, change, rho = (
            (row[middle], row[f"{kind}low"], row[f"{kind}high"])
            for middle, kind in (("mean", ""), ("change", "change_"), ("rho", "rho_"))
        )
        first = np.isnan(row["p"])
        rows.append({
            "checkpoint": row["name"], "area": _estimate(mean),
            "change": "" if first else _estimate(change) + _star(row["p_holm"]),
            "correlation with the last": _estimate(rho), "entropy": f"{row['entropy']:.2f}", "contexts": row["n"],
        })  # fmt: skip
        if not first:
            changes.append("up" if row["change"] > 0 else "down")
            changes[-1] = changes[-1] if row["p_holm"] < SIGNIFICANT else "no change"
    return Finding(
        f"The area, from checkpoint to checkpoint: {', '.join(changes)}", _table(rows), {"": found.plot()}, {}
    )


FINDINGS: Mapping[str, Callable[[Sweeps], Finding]] = {
    "a": dense, "b": dynamic, "c": shared, "d": rare, "e": long, "f": phases, "g": training,
}  # fmt: skip
"""By their letters."""

# -- what all of them use ----------------------------------------------------------------------------


def _correct(found: Iterable[Any], names: Sequence[str]) -> None:
    """Correct p values for the number of all tests in several tables."""
    tables = [each.table for each in found]
    p = [table[name].to_numpy(float) for table in tables for name in names]
    corrected = iter(np.split(holm(np.concatenate(p)), np.cumsum([len(each) for each in p])[:-1]))
    for table in tables:
        for name in names:
            table[f"{name}_holm"] = next(corrected)


def _bootstrap(values: Any, document: Any, of: Callable[[Any], Any]) -> tuple[float, float]:
    """The interval of a statistic, over documents."""
    values = np.asarray(values, float)
    return interval([float(of(values[draw])) for draw in resampled(codes(np.asarray(document)), _DRAWS, 0)])


def _correlation(both: Float[np.ndarray, "row 2"], document: Any) -> Estimate:
    again = [float(rank_correlations(both[draw])[0, 1]) for draw in resampled(codes(np.asarray(document)), _DRAWS, 0)]
    return float(rank_correlations(both)[0, 1]), *interval(again)


def _verdict(holds: Mapping[str, Sequence[bool]]) -> str:
    """From what was asked of every sweep, and whether it holds there."""
    if all(map(all, holds.values())):
        return "Reproduced"
    if not any(map(any, holds.values())):
        return "Not reproduced"
    kinds: dict[str, list[str]] = {}
    for name, each in holds.items():
        word = "yes" if all(each) else f"in {sum(each)} of {len(each)}" if any(each) else "no"
        kinds.setdefault(word, []).append(name)
    return "It depends (" + "; ".join(f"{word}: {', '.join(names)}" for word, names in kinds.items()) + ")"


def _table(rows: Sequence[Row]) -> str:
    head = [" | ".join(rows[0]), "|".join(["---"] * len(rows[0]))]
    return "\n".join(f"| {line} |" for line in [*head, *(" | ".join(map(str, row.values())) for row in rows)])


def _each(models: Iterable[str], said: Callable[[str], str]) -> str:
    return "; ".join(f"{model} {said(model)}" for model in models)


def _percent(each: Estimate) -> str:
    return f"{each[0]:.2%} ({each[1]:.2%} to {each[2]:.2%})"


def _estimate(each: Estimate) -> str:
    return f"{each[0]:.2f} ({each[1]:.2f} to {each[2]:.2f})"


def _star(p: float) -> str:
    return "*" if p < SIGNIFICANT else ""


def _shares() -> dict[str, Any]:
    """A logarithmic axis of shares."""
    ticks = [10.0**-power for power in range(5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [percent(each) for each in ticks]}
