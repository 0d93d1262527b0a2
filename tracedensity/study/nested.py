"""Lengths: whether a prediction needs more or less of the model when the context reaches further back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from pandas import DataFrame

from tracedensity.study.covariates import asked_outcomes, outcome_of, require_prompts
from tracedensity.study.statistics import codes, holm, interval, p_of_signs, require_draws, resampled

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracedensity.plot import Theme


@dataclass(frozen=True, eq=False)
class Lengths:
    """Density of the same predictions from contexts of several lengths.

    Attributes:
        table: One row per outcome: `slope` per doubling of the context, of log10 of a size or of the area, mean over
            targets, with its interval `low` to `high`, `p` and, corrected for all rows, `p_holm`; `n` targets; `falls`,
            the share of targets whose slope is below zero.
        by_length: One row per outcome and length: `mean`, `low`, `high`.
        threshold: Faithfulness at which sizes are taken.
        n_documents: What the targets come from, and intervals resample.
    """

    table: DataFrame
    by_length: DataFrame
    threshold: float
    n_documents: int

    def plot(self, *, theme: "Theme | str" = "light") -> "go.Figure":
        """Each outcome over the length, see `plot_lengths`."""
        from tracedensity.plot.factors import plot_lengths

        return plot_lengths(self, theme=theme)

    def __str__(self) -> str:
        table: Any = self.table
        about = f"{table['n'].max()} targets of {self.n_documents} documents, sizes at {self.threshold:g}"
        return f"{about}\n{table.to_string(index=False, float_format='{:.3g}'.format)}"


def lengths(
    table: DataFrame,
    *,
    outcomes: Sequence[str] | None = None,
    threshold: float | int = 0.9,
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> Lengths:
    """What longer contexts do to the density of the same predictions.

    For prompts that a sweep has cut with several `context_tokens`: contexts of one target, of different lengths. Each
    target has a slope of its own; their mean has an interval by a bootstrap over documents, and a p by turning the
    signs of the slopes of whole documents, which is as likely where length does nothing.

    Args:
        table: Prompts of such a sweep, from `td.read_sweep`.
        outcomes: What may depend on the length, of `tracedensity.study.covariates.OUTCOMES`; by default all that the
            sweep tells.
        threshold: Faithfulness at which sizes are taken.
        n_bootstrap: How often documents are resampled.
        n_permutations: How often signs are turned.
        seed: For both.

    Raises:
        ValueError: If no target has contexts of several lengths.
    """
    require_draws(n_bootstrap=n_bootstrap, n_permutations=n_permutations)
    require_prompts(table, ("id", "document", "group", "n_tokens"))
    known: Any = table[table["error"].isna() & table["group"].notna()].reset_index(drop=True)
    outcomes = asked_outcomes(known, outcomes)
    group = codes(known["group"].astype(str).to_numpy()) if len(known) else np.empty(0, dtype=np.int64)
    length = np.array(
        [_length(*row) for row in zip(known["id"], known["group"], known["n_tokens"], strict=True)], float
    )
    lengths_of = [tuple(sorted(length[group == each])) for each in range(group.max(initial=-1) + 1)]
    whole = max(lengths_of, key=lambda each: (len({*each}), lengths_of.count(each)), default=())
    if len({*whole}) < 2:
        raise ValueError(
            "`table` must have contexts of several lengths for each target: sweep with several `context_tokens`, such "
            "as 8, 16 and 32."
        )
    # a target that lacks a length, or has others, would shift the means
    kept = np.array([lengths_of[each] == whole for each in group])
    known, length, group = (
        known[kept].reset_index(drop=True),
        length[kept],
        np.unique(group[kept], return_inverse=True)[1],
    )
    first = np.unique(group, return_index=True)[1]
    document = codes(known["document"].astype(str).to_numpy())[first]
    draws = list(resampled(document, n_bootstrap, seed))
    generator = np.random.default_rng(seed)
    rows, by_length = [], []
    for name in outcomes:
        y = outcome_of(known, name, threshold)
        slopes = _slopes(np.log2(length), y, group)
        low, high = interval([slopes[draw].mean() for draw in draws])
        by_document = np.bincount(document, slopes)
        rows.append({
            "outcome": name, "slope": slopes.mean(), "low": low, "high": high,
            "p": p_of_signs(by_document, n_permutations, generator), "falls": (slopes < 0).mean(), "n": len(slopes),
        })  # fmt: skip
        for each in np.unique(length):
            values = y[length == each][np.argsort(group[length == each])]
            low, high = interval([values[draw].mean() for draw in draws])
            by_length.append({"outcome": name, "length": int(each), "mean": values.mean(), "low": low, "high": high})
    made: Any = DataFrame(rows)
    made.insert(5, "p_holm", holm(made["p"].to_numpy(float)))
    return Lengths(made, DataFrame(by_length), float(threshold), len(np.unique(document)))


def _length(own: str, group: str, n_tokens: int) -> int:
    """Length of a nested context without a token that begins a sequence."""
    said = own.removeprefix(f"{group}:")
    return int(said) if said.isdigit() else int(n_tokens)


def _slopes(
    x: Float[np.ndarray, " row"], y: Float[np.ndarray, " row"], group: Int[np.ndarray, " row"]
) -> Float[np.ndarray, " group"]:
    """Slope of each group's least-squares line."""
    count = np.bincount(group)
    x = x - (np.bincount(group, x) / count)[group]
    return np.bincount(group, x * y) / np.bincount(group, x * x)
