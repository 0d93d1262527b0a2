"""Factors: which covariates density goes with, by rank correlations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pandas import DataFrame

from tracedensity.study.counts import Counts
from tracedensity.study.covariates import (
    NUMERIC,
    READ,
    asked_outcomes,
    held_for,
    numbers,
    outcome_of,
    require_prompts,
    strata_held,
    with_covariates,
)
from tracedensity.study.statistics import Pair, Sample, codes, holm, require_draws

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracedensity.plot import Theme

CONTROLS = ("entropy", "rarity_target", "n_tokens")
"""What partial correlations hold fixed, but for the covariate itself."""

_FEWEST = 3
"""Prompts that a correlation is made of."""


@dataclass(frozen=True, eq=False)
class Factors:
    """How density goes with covariates.

    Attributes:
        table: One row per outcome and covariate: `rho`, Spearman's correlation, with its interval `low` to `high`, `p`,
            and `p_holm` corrected for all rows; `partial_rho` and so on, with `controls` held fixed; `n` prompts.
        threshold: Faithfulness at which sizes are taken.
        n_documents: What the prompts come from, and intervals resample.
        controls: What was held fixed, as far as it is known.
    """

    table: DataFrame
    threshold: float
    n_documents: int
    controls: tuple[str, ...]

    def plot(self, outcome: str | None = None, *, theme: "Theme | str" = "light") -> "go.Figure":
        """Correlations with their intervals, plain and partial, see `plot_factors`."""
        from tracedensity.plot.factors import plot_factors

        return plot_factors(self, outcome, theme=theme)

    def __str__(self) -> str:
        table: Any = self.table
        names = ["outcome", "covariate", "rho", "low", "high", "p_holm", "partial_rho", "partial_p_holm"]
        about = f"{table['n'].max()} prompts of {self.n_documents} documents, sizes at {self.threshold:g}"
        return f"{about}\n{table[names].to_string(index=False, float_format='{:.3g}'.format)}"


def factors(
    table: DataFrame,
    *,
    counts: Counts | None = None,
    model: object = None,
    outcomes: Sequence[str] | None = None,
    threshold: float | int = 0.9,
    controls: Sequence[str] = CONTROLS,
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> Factors:
    """Which covariates density goes with.

    Spearman's correlations, and partial ones of ranks; percentile intervals of a bootstrap over documents; p by
    exchange within strata of prompts of one domain and of equal or neighbouring lengths, so that what depends on these
    alone is no finding; corrected by Holm's method for all covariates and outcomes together. Intervals know that
    prompts of one document are alike, p does not: where documents are few, look at both.

    The number of edges grows with the square of the length, so that sizes are given in several ways: see `OUTCOMES`. A
    fraction that falls while the number of edges rises does not mean that less is needed.

    Args:
        table: Prompts of a sweep, from `td.read_sweep`.
        counts: As for `with_covariates`.
        model: As for `with_covariates`.
        outcomes: What may depend on the covariates, of `OUTCOMES`; by default all that the sweep tells.
        threshold: Faithfulness at which sizes are taken.
        controls: What partial correlations hold fixed: covariates. One is not held fixed for itself.
        n_bootstrap: How often documents are resampled.
        n_permutations: How often prompts are exchanged.
        seed: For both.

    Raises:
        ValueError: If an argument is not as described, or fewer than three prompts differ in any covariate.
    """
    require_draws(n_bootstrap=n_bootstrap, n_permutations=n_permutations)
    require_prompts(table, ("document", "domain", "n_tokens", *READ))
    known: Any = with_covariates(table, counts=counts, model=model)
    outcomes = asked_outcomes(known, outcomes)
    columns = numbers(known)
    if len(known) < _FEWEST or not columns:
        raise ValueError(
            f"`table` must have at least {_FEWEST} prompts that differ in some covariate, got {len(known)} of which "
            f"{len(columns)} covariates differ: sweep more prompts."
        )
    if wrong := [name for name in controls if name not in NUMERIC]:
        raise ValueError(f"`controls` must be some of {list(NUMERIC)}, got {wrong}.")
    held = tuple(name for name in controls if name in columns)
    covariates = [*columns]
    y = {f"outcome {name}": outcome_of(known, name, threshold) for name in outcomes}
    document = codes(known["document"].astype(str).to_numpy())
    sample = Sample(document, strata_held(known), n_bootstrap, n_permutations, seed)
    rows, pairs = [], []
    for name in outcomes:
        for covariate in covariates:
            given = tuple(each for each in held if each != covariate)
            rows.append({"outcome": name, "covariate": covariate, "controls": ", ".join(given)})
            pairs += [Pair(covariate, f"outcome {name}", each, held_for(covariate)) for each in ((), given)]
    found = sample.correlations({**columns, **y}, pairs)
    for row, plain, partial in zip(rows, found[::2], found[1::2], strict=True):
        row |= {"rho": plain.rho, "low": plain.low, "high": plain.high, "p": plain.p, "n": plain.n}
        row |= {"partial_rho": partial.rho, "partial_low": partial.low, "partial_high": partial.high}
        row |= {"partial_p": partial.p}
    made: Any = DataFrame(rows)
    corrected = holm(made[["p", "partial_p"]].to_numpy(float).ravel()).reshape(-1, 2)
    made["p_holm"], made["partial_p_holm"] = corrected.T
    order = [
        "outcome", "covariate", "rho", "low", "high", "p", "p_holm", "partial_rho", "partial_low", "partial_high",
        "partial_p", "partial_p_holm", "controls", "n",
    ]  # fmt: skip
    return Factors(made[order], float(threshold), len(np.unique(document)), held)
