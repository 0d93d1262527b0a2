"""The findings: for each a question, numbers with intervals and null controls, figures, and a verdict by a rule.

The rules were written before the sweeps were run, and are on the page beside what they say.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from pandas import DataFrame

import tracedensity as td
from studies.corpora import RANDOM, THRESHOLDS, TRAINED, WORDS
from tracedensity.plot.theme import COLOURS, finished, share_ticks
from tracedensity.study.comparison import half_areas, unique_prompts
from tracedensity.study.statistics import codes, interval, rank_correlations, resampled

DENSE, SPARSE = 0.5, 0.1
"""Shares of all edges above which a prediction is called dense, and below which sparse."""

RANGE = 3
"""Sizes of the 90th over that of the 10th percentile from which density is called dynamic."""

SIGNIFICANT = 0.05
_DRAWS = 1000
_HUES = (COLOURS["head"], COLOURS["mlp"], COLOURS["circuit"], COLOURS["residual"])


@dataclass(frozen=True)
class Finding:
    """An answer.

    Attributes:
        key: Its letter.
        question: What is asked.
        rule: How numbers become a verdict.
        verdict: What it says.
        text: Numbers, as Markdown.
        figures: By the words that stand in for them.
    """

    key: str
    question: str
    rule: str
    verdict: str
    text: str
    figures: Mapping[str, go.Figure]


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
        return [name for name in TRAINED if (self.folder / f"{name}-wikitext-norm").is_dir()]

    def path(self, model: str, corpus: str = "wikitext", kind: str = "norm") -> Path:
        return self.folder / f"{model}-{corpus}-{kind}"

    def prompts(self, model: str, corpus: str = "wikitext", kind: str = "norm", table: str = "prompts") -> Any:
        return td.read_sweep(self.path(model, corpus, kind), table)


def findings(sweeps: Sweeps) -> list[Finding]:
    """All of them."""
    every = [dense(sweeps), dynamic(sweeps), shared(sweeps), rare(sweeps), long(sweeps), phases(sweeps)]
    return [*every, *([training(sweeps)] if (sweeps.folder / "steps").is_dir() else [])]


# -- (a) ---------------------------------------------------------------------------------------------


def dense(sweeps: Sweeps) -> Finding:
    """Is processing dense?"""
    rows, said, figure = [], {"published": [], "tight": []}, go.Figure()
    for number, model in enumerate(sweeps.trained):
        for corpus in ("wikitext", "books"):
            known = sweeps.prompts(model, corpus, table="thresholds")
            row: dict[str, Any] = {"model": model, "text": corpus, "estimator": "published"}
            medians = [median(each, known) for each in _by_threshold(known)]
            rows.append({**row, **dict(zip(_AT, map(_percent, medians), strict=True)), "n": known["index"].nunique()})
            said["published"].append(medians[-1][0])
            if corpus == "wikitext":
                _quartiles(figure, known, f"{model}, published", _HUES[number], "solid")
        known = sweeps.prompts(model, kind="tight", table="thresholds")
        row = {"model": model, "text": "wikitext", "estimator": "tight"}
        medians = [median(each, known) for each in _by_threshold(known)]
        rows.append({**row, **dict(zip(_AT, map(_percent, medians), strict=True)), "n": known["index"].nunique()})
        said["tight"].append(medians[-1][0])
        _quartiles(figure, known, f"{model}, tight", _HUES[number], "dot")
    ratios = []
    for model in sweeps.trained:
        tight = sweeps.prompts(model, kind="tight", table="thresholds")
        published = sweeps.prompts(model, table="thresholds")
        both = tight.merge(published, on=["id", "threshold"], suffixes=("", "_published"))
        both = both[both["threshold"] == THRESHOLDS[-1]]
        ratio = np.log(both["size_published"].to_numpy(float) / both["size"].to_numpy(float))
        low, high = _bootstrap(ratio, both["document"], np.mean)
        ratios.append(f"{model} {np.exp(ratio.mean()):.1f} ({np.exp(low):.1f} to {np.exp(high):.1f})")
    null = []
    for model in (*sweeps.trained, RANDOM):
        known = sweeps.prompts(model)
        gain = (known["auc_random"] - known["auc_coarse"]).to_numpy(float)
        low, high = _bootstrap(gain, known["document"], np.mean)
        better = float((gain > 0).mean())
        null.append(f"{model} {gain.mean():.2f} ({low:.2f} to {high:.2f}; better for {better:.0%})")
    words = {name: [_word(each) for each in values] for name, values in said.items()}
    verdict = _agreed(
        {name: all(each == "dense" for each in found) for name, found in words.items()},
        {name: not any(each == "dense" for each in found) for name, found in words.items()},
    )
    verdict += "; " + "; ".join(f"{name}: {', '.join(dict.fromkeys(found))}" for name, found in words.items())
    finished(
        figure, "How much of the network a prediction needs", ["share of all edges, median and quartiles", "WikiText"],
        plot_height=300, left=84,
    )  # fmt: skip
    figure.update_xaxes(title="faithfulness", tickvals=[*THRESHOLDS], range=[0.42, 0.98])
    figure.update_yaxes(title="share of all edges", **_log_axis())
    text = "\n\n".join([
        _table(DataFrame(rows)),
        "Median share of all edges that the smallest circuit has, with the interval of a bootstrap over documents. The "
        "published estimator takes edges by their share of a state and follows them from the output; the tight one "
        "searches, for 400 forward passes, and both are upper bounds.",
        f"Published over tight at {THRESHOLDS[-1]:g}, geometric mean over the same contexts: {', '.join(ratios)}.",
        "**Null control**: areas under the curves of random connected circuits minus those of the published ones, at the same sizes "
        f"(larger: the order of edges matters): {', '.join(null)}.",
    ])  # fmt: skip
    return Finding(
        "a", "Is processing dense?",
        f"Dense, if the median context needs more than {DENSE:.0%} of all edges for {THRESHOLDS[-1]:.0%} faithfulness; sparse "
        f"below {SPARSE:.0%}. Reproduced if dense for all models and texts under both estimators.",
        verdict, text, {"Shares of all edges at three faithfulnesses, by model and estimator": figure},
    )  # fmt: skip


_AT = tuple(f"at {threshold:g}" for threshold in THRESHOLDS)


def _by_threshold(known: Any) -> Iterable[Any]:
    return (known[known["threshold"] == threshold] for threshold in THRESHOLDS)


def median(rows: Any, known: Any) -> tuple[float, float, float]:
    """The median fraction, with its interval."""
    values = rows["fraction"].to_numpy(float)
    return float(np.median(values)), *_bootstrap(values, rows["document"], np.median)


def _word(fraction: float) -> str:
    return "dense" if fraction > DENSE else "sparse" if fraction < SPARSE else "in between"


def _quartiles(figure: go.Figure, known: Any, name: str, colour: str, dash: str) -> None:
    values = [rows["fraction"].to_numpy(float) for rows in _by_threshold(known)]
    low, middle, high = (np.array([np.quantile(each, q) for each in values]) for q in (0.25, 0.5, 0.75))
    figure.add_scatter(
        x=THRESHOLDS, y=middle, name=name, mode="lines+markers", line={"color": colour, "dash": dash},
        error_y={"type": "data", "array": high - middle, "arrayminus": middle - low, "thickness": 1, "width": 0},
    )  # fmt: skip


# -- (b) ---------------------------------------------------------------------------------------------


def dynamic(sweeps: Sweeps) -> Finding:
    """Does density differ between inputs by more than its measurement's noise?"""
    rows, wide, real, figure = [], [], [], go.Figure()
    for number, model in enumerate((*sweeps.trained, RANDOM)):
        known = unique_prompts(sweeps.prompts(model))
        sizes = 10 ** td.study.with_covariates(known.reset_index()).pipe(_sizes)
        ratio = float(np.quantile(sizes, 0.9) / np.quantile(sizes, 0.1))
        low, high = _bootstrap(sizes, known["document"], lambda each: np.quantile(each, 0.9) / np.quantile(each, 0.1))
        halves = np.array([half_areas(*row) for row in zip(known["sizes"], known["faithfulness"], strict=True)])
        other = unique_prompts(sweeps.prompts(model, kind="flow"))
        both = np.stack([known.loc[other.index, "auc"], other["auc"]], axis=1)
        upper = _correlation(halves, known["document"])
        lower = _correlation(both, other["document"])
        rows.append({
            "model": model, "SD of the area": f"{known['auc'].std():.3f}",
            f"size at {THRESHOLDS[-1]:g}, 90th / 10th percentile": f"{ratio:.1f} ({low:.1f} to {high:.1f})",
            "two halves of the sizes": _estimate(upper), "another scoring of edges": _estimate(lower),
            "noise": f"{1 - upper[0]:.0%} to {1 - max(lower[0], 0):.0%}",
            "between documents": f"{intraclass(known['auc'].to_numpy(float), codes(known['document'].to_numpy())):.0%}",
        })  # fmt: skip
        values = np.sort(10 ** (np.log10(sizes) - np.log10(known["n_edges"].to_numpy(float))))
        figure.add_scatter(
            x=values, y=(np.arange(len(values)) + 0.5) / len(values), name="random weights" if model == RANDOM else model,
            mode="lines", line={"color": _HUES[number], "dash": "dot" if model == RANDOM else "solid"},
        )  # fmt: skip
        if model != RANDOM:
            wide.append(ratio >= RANGE)
            real.append((upper[1] > 0.5, lower[1] > 0.5))
    finished(
        figure, f"What contexts need for {THRESHOLDS[-1]:.0%} faithfulness", ["WikiText", "published estimator"],
        plot_height=300,
    )  # fmt: skip
    figure.update_xaxes(title="share of all edges", **_log_axis())
    figure.update_yaxes(title="share of contexts", tickformat=".0%")
    parts = {"sizes differ": all(wide), "beyond noise by halves": all(a for a, _ in real),
             "beyond noise by another scoring": all(b for _, b in real)}  # fmt: skip
    verdict = _agreed(parts, {name: not each for name, each in parts.items()})
    text = "\n\n".join([
        _table(DataFrame(rows)),
        "The two correlations bound the reliability of the area: halves of one curve share the order of edges, so that it "
        "is too high; another scoring (information flow) measures something else as well, so that it is too low. Noise is what they "
        "leave. The last column is the share of variance between articles (ANOVA).",
        "**Null control**: the model with random weights, in the last row: what differs there is not what training made.",
    ])  # fmt: skip
    return Finding(
        "b", "Is density dynamic: does it differ between inputs?",
        f"Reproduced if for all trained models sizes of the 90th and the 10th percentile differ {RANGE}-fold or more, and both "
        "reliabilities are above one half, with the lower end of their intervals.",
        verdict, text, {"Distribution of sizes over contexts, by model": figure},
    )  # fmt: skip


def _sizes(known: Any) -> Float[np.ndarray, " row"]:
    from tracedensity.study.covariates import outcome_of

    return outcome_of(known, "size", THRESHOLDS[-1])


def intraclass(values: Float[np.ndarray, " row"], group: Int[np.ndarray, " row"]) -> float:
    """Share of variance that lies between groups: ICC(1) of a one-way analysis of variance."""
    count = np.bincount(group)
    means = np.bincount(group, values) / count
    n, k = len(values), len(count)
    between = (count * (means - values.mean()) ** 2).sum() / (k - 1)
    within = ((values - means[group]) ** 2).sum() / (n - k)
    size = (n - (count**2).sum() / n) / (k - 1)
    return float((between - within) / (between + (size - 1) * within))


# -- (c) ---------------------------------------------------------------------------------------------


def shared(sweeps: Sweeps) -> Finding:
    """Are the same inputs dense for different models?"""
    tables = {model: sweeps.prompts(model) for model in (*sweeps.trained, RANDOM)}
    others = {model: sweeps.prompts(model, kind="flow") for model in tables}
    found = td.study.compare(tables, others=others, n_bootstrap=_DRAWS, n_permutations=2000)
    rows = [
        {
            "": f"{row['a']}, {row['b']}", "correlation": _estimate((row["rho"], row["low"], row["high"])),
            "p (Holm)": _p(row["p_holm"]),
            "given lengths": _estimate((row["length_rho"], row["length_low"], row["length_high"])),
            "given entropies and rarities too": _estimate(
                (row["partial_rho"], row["partial_low"], row["partial_high"])
            ),
            "ceiling": f"{row['ceiling_low']:.2f} to {row['ceiling_high']:.2f}",
        }
        for row in found.table.to_dict("records")
    ]  # fmt: skip
    trained = [row for row in found.table.to_dict("records") if RANDOM not in (row["a"], row["b"])]
    parts = {"correlated": all(row["low"] > 0 and row["p_holm"] < SIGNIFICANT for row in trained),
             "beyond entropy and rarity": all(row["partial_low"] > 0 for row in trained)}  # fmt: skip
    nothing = {"correlated": not any(row["low"] > 0 for row in trained),
               "beyond entropy and rarity": not any(row["partial_low"] > 0 for row in trained)}  # fmt: skip
    text = "\n\n".join([
        _table(DataFrame(rows)),
        f"Spearman's correlation of areas over {trained[0]['n']} contexts of WikiText. The papers' ten models have 0.52 on average (0.26 to 0.71, "
        "40 words). `p` is by exchange of inputs within strata of length. The ceiling is what the measure's unreliability would leave of 1.",
        f"**Null control**: pairs with `{RANDOM}`, which has learnt nothing; what they share is the text, its length and what any such "
        "network does to it.",
    ])  # fmt: skip
    return Finding(
        "c", "Does density correlate across models, and what is left given entropy?",
        "Reproduced if the interval of every pair of trained models is above zero (and p, corrected, below 0.05), plain and given each model's "
        "own entropy and rarities.",
        _agreed(parts, nothing), text, {"Correlations of density between models": found.plot()},
    )  # fmt: skip


# -- (d) ---------------------------------------------------------------------------------------------

_RARITIES = {"rarity_target": "target", "rarity_top": "prediction", "rarity_expected": "expected", "entropy": "entropy"}


def rare(sweeps: Sweeps) -> Finding:
    """Do rarer tokens need more?"""
    rows, yes, no = [], {}, {}
    figures = {}
    for model in (*sweeps.trained, RANDOM):
        for corpus in ("wikitext", "books") if model != RANDOM else ("wikitext",):
            found = td.study.factors(
                sweeps.prompts(model, corpus), outcomes=("auc",), n_bootstrap=_DRAWS, n_permutations=2000
            )
            known: Any = found.table.set_index("covariate")
            row: dict[str, Any] = {"model": model, "text": corpus}
            for covariate, name in _RARITIES.items():
                each = known.loc[covariate]
                plain = (each["rho"], each["low"], each["high"])
                partial = (each["partial_rho"], each["partial_low"], each["partial_high"])
                stars = [_star(each[p]) for p in ("p_holm", "partial_p_holm")]
                row[name] = f"{plain[0]:.2f}{stars[0]}, {partial[0]:.2f}{stars[1]}"
                if model != RANDOM and covariate != "entropy":
                    more = plain[0] > 0 and partial[0] > 0 and all(stars)
                    yes.setdefault(
                        f"rarity of the {name} token" if name != "expected" else "expected rarity", []
                    ).append(more)
            rows.append(row)
            if model == sweeps.trained[0] and corpus == "wikitext":
                figures["Correlations of density with covariates, books-gpt2 on WikiText"] = found.plot()
    no = {name: not any(each) for name, each in yes.items()}
    yes = {name: all(each) for name, each in yes.items()}
    text = "\n\n".join([
        _table(DataFrame(rows)),
        "Spearman's correlation with the area (positive: needs more), and the partial one given entropy, the target's rarity and length, as far as "
        "they are not what is asked about; a star is p < 0.05 after Holm's correction for all covariates of a sweep. Frequencies are those of other "
        "text of the same kind. Intervals are in the figure, for one of the sweeps.",
        f"**Null control**: `{RANDOM}` weights; and p itself is by exchange within strata of length.",
    ])  # fmt: skip
    return Finding(
        "d", "Do rarer tokens need more?",
        "Reproduced, for one of three rarities, if the correlation is positive and significant in every sweep of a trained model, plain and partial.",
        _agreed(yes, no), text, figures,
    )  # fmt: skip


# -- (e) ---------------------------------------------------------------------------------------------


def long(sweeps: Sweeps) -> Finding:
    """Does longer context lower density?"""
    rows, falls, rises, figures = [], {}, {}, {}
    for model in (*sweeps.trained, RANDOM):
        found = td.study.lengths(
            sweeps.prompts(model, kind="nested"), threshold=THRESHOLDS[-1], n_bootstrap=_DRAWS, n_permutations=5000
        )
        row: dict[str, Any] = {"model": model}
        for each in found.table.to_dict("records"):
            name = str(each["outcome"]).replace("_", " ")
            star = _star(each["p_holm"])
            row[name] = f"{each['slope']:+.3f}{star} ({each['low']:+.3f} to {each['high']:+.3f})"
            if model != RANDOM:
                falls.setdefault(name, []).append(each["slope"] < 0 and bool(star))
                rises.setdefault(name, []).append(each["slope"] > 0 and bool(star))
        rows.append({**row, "targets": int(found.table["n"].max())})
        if model == sweeps.trained[0]:
            figures["Density over the length of the context, books-gpt2"] = found.plot()
    parts = {name: all(each) for name, each in falls.items()}
    nothing = {name: not any(each) for name, each in falls.items()}
    up = [name for name, each in rises.items() if all(each)]
    text = "\n\n".join([
        _table(DataFrame(rows)),
        "Change with each doubling of the context, from 8 to 64 tokens before the same target: of the area, and of log10 of a size at "
        f"{THRESHOLDS[-1]:g} counted in four ways; interval over documents, star for p < 0.05 (signs of slopes turned, Holm)."
        + (f" It rises for all trained models by: {', '.join(up)}." if up else ""),
        f"**Null control**: `{RANDOM}` weights, for which context is worth nothing. The number of all edges grows with the square of the length, so "
        "that a fraction may fall while more edges are needed.",
    ])  # fmt: skip
    return Finding(
        "e", "Does longer context lower density?",
        "Reproduced, under a normalisation, if the mean slope is negative and significant for every trained model.",
        _agreed(parts, nothing), text, figures,
    )  # fmt: skip


# -- (f) ---------------------------------------------------------------------------------------------


def phases(sweeps: Sweeps) -> Finding:
    """Are there two phases, construction and refinement?"""
    rows, broken, figures, shallow = [], [], {}, []
    for model in (*sweeps.trained, RANDOM):
        found = td.study.contents(sweeps.path(model), n_bootstrap=300, n_null=200)
        row: dict[str, Any] = {"model": model}
        for name, each in found.phases.items():
            if each.break_at is None:
                row[f"break, {name}"] = "none"
            else:
                row[f"break, {name}"] = (
                    f"{each.break_at:.2%} ({each.low:.2%} to {each.high:.2%}), in {each.found:.0%}; "
                    f"{each.slopes[0]:.2f}, then {each.slopes[-1]:.2f}"
                )
        table: Any = found.by_size
        first = table[table["top1"] >= 0.5]["share"]
        row["top token in half"] = "never" if first.empty else f"{first.iloc[0]:.2%}"
        small, whole = table[table["share"] == 0.001].iloc[0], table.iloc[-1]
        row["distance to frequencies, 0.1% and all"] = f"{small['unigram_tv']:.2f}, {whole['unigram_tv']:.2f}"
        rows.append(row)
        if model != RANDOM:
            circuits, random = found.phases["circuits"], found.phases.get("random")
            apart = (
                random is None or random.break_at is None or circuits.high < random.low or circuits.low > random.high
            )
            broken.append((circuits.break_at is not None and circuits.found >= 0.95, bool(apart)))
            shallow.append(small["unigram_tv"] < whole["unigram_tv"] - 0.05)
        if model == sweeps.trained[0]:
            figures["The mean curve and its straight pieces, books-gpt2"] = found.plot("phases")
            figures["What circuits of each size predict, books-gpt2"] = found.plot("prediction")
    parts = {"the mean curve breaks": all(each for each, _ in broken), "elsewhere than random circuits'": all(each for _, each in broken),
             "small circuits predict frequencies": all(shallow)}  # fmt: skip
    nothing = {"the mean curve breaks": not any(each for each, _ in broken),
               "elsewhere than random circuits'": not any(each for _, each in broken),
               "small circuits predict frequencies": not any(shallow)}  # fmt: skip
    text = "\n\n".join([
        _table(DataFrame(rows)),
        "The break of two straight pieces of mean faithfulness over log10 of size, if the Bayesian information criterion prefers them to one, its interval, in how many of "
        "the resampled curves there is one, and faithfulness gained per tenfold size before and behind. Then the share of edges at which half of the circuits have the "
        "model's top token, and the total variation distance of what circuits of 0.1% predict, and of what the model predicts, to the frequencies of tokens.",
        f"**Null control**: the same of random connected circuits, and of `{RANDOM}` weights.",
    ])  # fmt: skip
    return Finding(
        "f", "Are there two phases?",
        "Reproduced if for every trained model the mean curve has a break in 95% of resampled curves, with an interval apart from that of random circuits, and circuits of "
        "0.1% predict something nearer to the frequencies of tokens than the model does (by 0.05 or more).",
        _agreed(parts, nothing), text, figures,
    )  # fmt: skip


# -- training ----------------------------------------------------------------------------------------


def training(sweeps: Sweeps) -> Finding:
    """How density goes over training; no finding of the papers."""
    found = td.study.trend(sweeps.folder / "steps", n_bootstrap=_DRAWS, n_permutations=5000)
    rows = [
        {
            "checkpoint": row["name"], "area": _estimate((row["mean"], row["low"], row["high"])),
            "change": "" if np.isnan(row["change"]) else _estimate((row["change"], row["change_low"], row["change_high"])),
            "p (Holm)": "" if np.isnan(row["p_holm"]) else _p(row["p_holm"]),
            "correlation with the last": _estimate((row["rho"], row["rho_low"], row["rho_high"])),
            "entropy": f"{row['entropy']:.2f}",
        }
        for row in found.table.to_dict("records")
    ]  # fmt: skip
    table: Any = found.table
    sure = [row["p_holm"] < SIGNIFICANT for row in table.iloc[1:].to_dict("records")]
    ups = [row["change"] > 0 for row in table.iloc[1:].to_dict("records")]
    verdict = f"it changes significantly in {sum(sure)} of {len(sure)} steps, up in {sum(ups)}"
    text = (
        _table(DataFrame(rows))
        + "\n\nbooks-gpt2 trained anew for a short time, its checkpoints swept over the same contexts of WikiText."
    )
    return Finding(
        "g", "How does density go over training?", "No claim of the papers; changes are called significant at 0.05, corrected.",
        verdict, text, {"Density over training": found.plot()},
    )  # fmt: skip


# -- what all of them use ----------------------------------------------------------------------------


def _bootstrap(values: Any, document: Any, of: Callable[[Any], Any]) -> tuple[float, float]:
    """The interval of a statistic, over documents."""
    values = np.asarray(values, float)
    return interval([float(of(values[draw])) for draw in resampled(codes(np.asarray(document)), _DRAWS, 0)])


def _correlation(both: Float[np.ndarray, "row 2"], document: Any) -> tuple[float, float, float]:
    again = [float(rank_correlations(both[draw])[0, 1]) for draw in resampled(codes(np.asarray(document)), _DRAWS, 0)]
    return float(rank_correlations(both)[0, 1]), *interval(again)


def _agreed(yes: Mapping[str, bool], no: Mapping[str, bool]) -> str:
    """A verdict from what holds everywhere, and what holds nowhere."""
    if all(yes.values()):
        return "reproduced"
    if all(no.values()):
        return "not reproduced"
    kinds = {
        "yes": [name for name in yes if yes[name]],
        "no": [name for name in yes if no[name] and not yes[name]],
        "in some sweeps only": [name for name in yes if not yes[name] and not no[name]],
    }
    return "depends (" + "; ".join(f"{word}: {', '.join(names)}" for word, names in kinds.items() if names) + ")"


def _table(rows: DataFrame) -> str:
    head = "| " + " | ".join(map(str, rows.columns)) + " |\n|" + "---|" * len(rows.columns)
    return "\n".join([head, *("| " + " | ".join(map(str, row)) + " |" for row in rows.itertuples(index=False))])


def _percent(each: Sequence[float]) -> str:
    return f"{each[0]:.2%} ({each[1]:.2%} to {each[2]:.2%})"


def _estimate(each: Sequence[float]) -> str:
    return f"{each[0]:.2f} ({each[1]:.2f} to {each[2]:.2f})"


def _star(p: float) -> str:
    return "*" if p < SIGNIFICANT else ""


def _p(value: float) -> str:
    return f"{value:.2g}"


def _log_axis() -> dict[str, Any]:
    return share_ticks(100_000)


__all__ = ["Finding", "Sweeps", "WORDS", "findings"]
