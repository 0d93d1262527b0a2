"""Comparisons: whether the same inputs are dense for different models."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from pandas import DataFrame

from tracedensity.study.covariates import AREAS, outcome_of, unique_prompts
from tracedensity.study.grid import half_areas
from tracedensity.study.statistics import (
    Pair,
    Sample,
    codes,
    holm,
    interval,
    rank_correlations,
    require_draws,
    resampled,
    strata_of,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracedensity.plot import Theme


@dataclass(frozen=True, eq=False)
class Comparison:
    """Correlations of the density of the same inputs between models.

    Attributes:
        table: One row per pair of models: `rho`, Spearman's correlation, with its interval `low` to `high`, `p`, and
            `p_holm` corrected for all pairs; `length_rho` and so on, given both models' lengths of the prompt;
            `partial_rho` and so on, given entropies and rarities as well, of `partial_n` inputs: `controls` says what
            was given, as far as it is known of more than half of the inputs; `ceiling_low` and `ceiling_high`, the
            correlations that the measures' own unreliability would leave of a perfect one; `true_low` and `true_high`,
            `rho` over these; `n` inputs.
        reliability: One row per model: `halves`, the correlation of two areas, from every other size of one ranking
            (too high for reliability: one ranking, and on small graphs one empty circuit, is in both; unknown of sizes
            at a threshold), and `method`, that with another way of scoring edges (too low), if that was given.
        matrix: Spearman's correlations of all models.
        mean: Mean over pairs.
        low: Lower end of its interval.
        high: Its upper end.
        outcome: What was compared.
        families: The same mean over the pairs within families of models, and between them: `pairs` and `n_pairs`,
            `mean`, `low`, `high`; empty if no families were given.
    """

    table: DataFrame
    reliability: DataFrame
    matrix: DataFrame
    mean: float
    low: float
    high: float
    outcome: str
    families: DataFrame

    def plot(self, *, theme: "Theme | str" = "light") -> "go.Figure":
        """The matrix, and what is left of it given other things, see `tracedensity.plot.models.plot_models`."""
        from tracedensity.plot.models import plot_models

        return plot_models(self, theme=theme)

    def __str__(self) -> str:
        table: Any = self.table
        reliability: Any = self.reliability
        families = (
            f"\n{each['pairs']} families {each['mean']:.3f} ({each['low']:.3f} to {each['high']:.3f})"
            for each in self.families.to_dict("records")
        )
        return (
            f"mean correlation of {self.outcome} {self.mean:.3f} ({self.low:.3f} to {self.high:.3f})\n"
            f"{table.to_string(index=False, float_format='{:.3g}'.format)}\n"
            f"{reliability.to_string(index=False, float_format='{:.3g}'.format)}" + "".join(families)
        )


def compare(
    tables: Mapping[str, DataFrame],
    *,
    outcome: str = "area",
    threshold: float | int = 0.9,
    others: Mapping[str, DataFrame] | None = None,
    families: Mapping[str, str] | None = None,
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Whether the inputs that one model needs much for are those that others do.

    Inputs are matched by their text, so that models may read it as different tokens. If nothing is left given each
    model's own entropy and rarity, "the same inputs are dense" says no more than "the same inputs are uncertain".
    Models of one family, or trained on one corpus, are no independent samples.

    Args:
        tables: Prompts of a sweep of each model, from `td.read_sweep`, by what to call it.
        outcome: What to compare, of `tracedensity.study.covariates.OUTCOMES`.
        threshold: Faithfulness at which sizes are taken.
        others: Sweeps of the same models over the same prompts in which edges were scored in another way, for how
            reliable the measure is.
        families: What each model belongs to, for means within and between families.
        n_bootstrap: How often documents are resampled, for all models at once.
        n_permutations: How often the inputs of one model are exchanged within strata of similar length, both models'
            together. Lengths still differ within a stratum: what density owes to them is left in `p`, and taken out of
            `length_p`.
        seed: For both.

    Raises:
        ValueError: If there are fewer than two models, or they have fewer than three inputs in common.
    """
    if not isinstance(tables, Mapping) or len(tables) < 2:
        raise ValueError("`tables` must be the prompts of two or more sweeps, by what to call them.")
    require_draws(n_bootstrap=n_bootstrap, n_permutations=n_permutations)
    names = [*tables]
    needed = ("document", "n_tokens", "entropy", "rarity_target", "rarity_top")
    known = {name: unique_prompts(table, needed) for name, table in tables.items()}
    if unknown := [name for name in others or {} if name not in known]:
        raise ValueError(f"`others` must be of models in `tables`, {names}, got {unknown}.")
    if families is not None and {*families} != {*names}:
        raise ValueError(f"`families` must say what each model belongs to, {names}, got {[*families]}.")
    common = sorted(set.intersection(*(set(table.index) for table in known.values())))
    if len(common) < 3:
        raise ValueError(f"`tables` must have inputs in common, the same texts, got {len(common)} for {names}.")
    same: dict[str, Any] = {name: table.loc[common] for name, table in known.items()}
    y = {name: outcome_of(table, outcome, threshold) for name, table in same.items()}
    document = codes(same[names[0]]["document"].astype(str).to_numpy())
    lengths = {name: table["n_tokens"].to_numpy(float) for name, table in same.items()}
    strata = {f"{a}, {b}": strata_of(lengths[a] + lengths[b]) for a, b in combinations(names, 2)}
    sample = Sample(document, strata, n_bootstrap, n_permutations, seed)
    columns: dict[str, np.ndarray] = dict(y)
    for name, table in same.items():
        for covariate in ("n_tokens", "entropy", "rarity_target", "rarity_top"):
            columns[f"{covariate} of {name}"] = table[covariate].to_numpy(float, na_value=np.nan)
    columns = {name: each for name, each in columns.items() if name in y or np.isfinite(each).mean() > 0.5}
    pairs = []
    for a, b in combinations(names, 2):
        length = tuple(f"n_tokens of {each}" for each in (a, b))
        causes = [f"{cause} of {each}" for cause in ("entropy", "rarity_target", "rarity_top") for each in (a, b)]
        given = (*length, *(cause for cause in causes if cause in columns))
        pairs += [Pair(a, b, each, f"{a}, {b}") for each in ((), length, given)]
    found = sample.correlations(columns, pairs)
    reliability = _reliability(same, y, dict(others or {}), outcome, threshold)
    rows = []
    for number, (a, b) in enumerate(combinations(names, 2)):
        plain, length, partial = found[3 * number : 3 * number + 3]
        # a measure whose repetition goes the other way is not reliable at all
        own = [[max(reliability[each][kind], 0.0) for each in (a, b)] for kind in ("method", "halves")]
        ceilings = sorted(np.sqrt(one * other) for one, other in own if np.isfinite(one * other)) or [np.nan]
        row: dict[str, Any] = {"a": a, "b": b}
        for prefix, each in (("", plain), ("length_", length), ("partial_", partial)):
            row |= {f"{prefix}{name}": getattr(each, name) for name in ("rho", "low", "high", "p")}
        controls = dict.fromkeys(each.split(" of ")[0] for each in pairs[3 * number + 2].controls)
        rows.append({
            **row, "controls": ", ".join(controls),
            "ceiling_low": ceilings[0], "ceiling_high": ceilings[-1],
            "true_low": plain.rho / (ceilings[-1] or np.nan), "true_high": plain.rho / (ceilings[0] or np.nan),
            "n": plain.n, "partial_n": partial.n,
        })  # fmt: skip
    made: Any = DataFrame(rows)
    for prefix in ("", "length_", "partial_"):
        made.insert(made.columns.get_loc(f"{prefix}p") + 1, f"{prefix}p_holm", holm(made[f"{prefix}p"].to_numpy(float)))
    together = np.stack([y[name] for name in names], axis=1)
    matrix = rank_correlations(together)
    apart = np.triu_indices(len(names), 1)
    again = [rank_correlations(together[rows])[apart] for rows in resampled(document, n_bootstrap, seed)]

    def mean_of(some: Bool[np.ndarray, " pair"]) -> tuple[float, float, float]:
        return float(matrix[apart][some].mean()), *interval([float(each[some].mean()) for each in again])

    means = []
    if families is not None:
        same_family = np.array([families[a] == families[b] for a, b in combinations(names, 2)])
        for called, some in (("within", same_family), ("between", ~same_family)):
            if some.any():
                mean, low, high = mean_of(some)
                means.append({"pairs": called, "n_pairs": int(some.sum()), "mean": mean, "low": low, "high": high})
    return Comparison(
        made,
        DataFrame([{"model": name, **values} for name, values in reliability.items()]),
        DataFrame(matrix, index=names, columns=names),
        *mean_of(np.ones(len(pairs) // 3, dtype=bool)), outcome,
        DataFrame(means, columns=["pairs", "n_pairs", "mean", "low", "high"]),
    )  # fmt: skip


def _reliability(
    tables: Mapping[str, Any],
    y: Mapping[str, Float[np.ndarray, " row"]],
    others: Mapping[str, DataFrame],
    outcome: str,
    threshold: float | int,
) -> dict[str, dict[str, float]]:
    found = {}
    for name, table in tables.items():
        found[name] = {"halves": np.nan, "method": np.nan}
        if outcome in AREAS:
            halves = np.array([half_areas(*row) for row in zip(table["sizes"], table["faithfulness"], strict=True)])
            found[name]["halves"] = float(rank_correlations(halves)[0, 1])
        if name in others:
            other = unique_prompts(others[name])
            both = [each for each in table.index if each in other.index]
            if len(both) > 2:
                place = {each: number for number, each in enumerate(table.index)}
                mine = y[name][[place[each] for each in both]]
                theirs = outcome_of(other.loc[both], outcome, threshold)
                found[name]["method"] = float(rank_correlations(np.stack([mine, theirs], axis=1))[0, 1])
    return found
