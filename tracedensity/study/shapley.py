"""Shapley values: which covariates a regression of density draws on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from math import factorial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int
from pandas import DataFrame

from tracedensity.extras import extra
from tracedensity.study.counts import Counts
from tracedensity.study.covariates import (
    NUMERIC,
    READ,
    held_for,
    numbers,
    outcome_of,
    require_prompts,
    strata_held,
    with_covariates,
)
from tracedensity.study.progress import bar_of
from tracedensity.study.statistics import (
    codes,
    exchanged,
    interval,
    rank_correlations,
    require_draws,
    resampled,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracedensity.plot import Theme

GROUPS: Mapping[str, tuple[str, ...]] = {
    "uncertainty": ("entropy", "margin", "top_probability", "kl_unigram"),
    "surprisal": ("surprisal",),
    "rarity": ("rarity_target", "rarity_top", "rarity_expected"),
    "length": ("n_tokens",),
    "repetition": ("repetition", "seen_bigram"),
    "complexity": ("word_length", "type_token_ratio", "gzip_ratio"),
}
"""Covariates that belong together; domains are a group of their own."""

_TWINS = 0.95
"""Covariates of a larger rank correlation, of either sign, are one: the first is kept."""


@dataclass(frozen=True, eq=False)
class ShapValues:
    """What a regression of density draws on. It explains the regression, not the language model.

    Attributes:
        table: One row per covariate: `mean_abs`, mean of its absolute Shapley values over prompts, with its interval
            `low` to `high`; `null`, what the largest such mean among covariates exceeds in 5 of 100 tables if density
            is exchanged between prompts of similar length and of one domain (for length itself, of one domain; for
            domains, of similar length), and `counts`, whether it is exceeded; `permutation` and `drop`, what R2 out of
            fold loses if the covariate is exchanged, or left out.
        groups: One row per group of covariates, exact Shapley values of R2 out of fold, which add up to `r2`.
        values: Shapley values, one row per prompt and one column per covariate; those of domains are one.
        covariates: The covariates of these prompts.
        r2: R2 out of fold of the regression.
        null_r2: What it exceeds in 5 of 100 tables if density is exchanged in the way in which least is left of it.
        ridge_r2: R2 out of fold of a linear regression.
        additivity: Largest difference of the sum of a prompt's values and base from what the regression predicts.
        outcome: What was regressed.
        dropped: Covariates that were left out, each for the one that says the same.
        n_documents: What folds keep together.
    """

    table: DataFrame
    groups: DataFrame
    values: DataFrame
    covariates: DataFrame
    r2: float
    null_r2: float
    ridge_r2: float
    additivity: float
    outcome: str
    dropped: dict[str, str]
    n_documents: int

    def plot(self, covariate: str | None = None, *, theme: "Theme | str" = "light") -> "go.Figure":
        """All values of all covariates (beeswarm), or those of one over what it is (dependence)."""
        from tracedensity.plot.shap import plot_shap, plot_shap_dependence

        return plot_shap(self, theme=theme) if covariate is None else plot_shap_dependence(self, covariate, theme=theme)

    def __str__(self) -> str:
        table: Any = self.table
        groups: Any = self.groups
        return (
            f"R2 of {self.outcome} out of fold {self.r2:.3f} (by chance up to {self.null_r2:.3f}, ridge "
            f"{self.ridge_r2:.3f}); {len(self.values)} prompts of {self.n_documents} documents\n"
            f"{table.to_string(index=False, float_format='{:.3g}'.format)}\n"
            f"{groups.to_string(index=False, float_format='{:.3g}'.format)}"
        )


def shap_values(
    table: DataFrame,
    *,
    counts: Counts | None = None,
    model: object = None,
    outcome: str = "area",
    threshold: float | int = 0.9,
    regressor: Literal["boosting", "ridge"] = "boosting",
    n_folds: int = 5,
    n_null: int = 100,
    n_bootstrap: int = 500,
    seed: int = 0,
    progress: bool | None = None,
) -> ShapValues:
    """Shapley values of covariates in a regression of density.

    Gradient boosting (100 trees of depth 3 on histograms, learning rate 0.1) or ridge, in cross-validation that keeps
    documents together; each prompt is explained by the regression that has not seen its document. Correlated
    covariates share their credit in any proportion, so that values of whole groups are given beside: exact ones, of R2.

    Args:
        table: Prompts of a sweep, from `td.read_sweep`.
        counts: As for `tracedensity.study.with_covariates`.
        model: As for `tracedensity.study.with_covariates`.
        outcome: What to regress, of `tracedensity.study.covariates.OUTCOMES`.
        threshold: Faithfulness at which sizes are taken.
        regressor: Which regression.
        n_folds: Folds, at least two; as many as documents where these are fewer.
        n_null: How often density is exchanged, for what chance would give: between prompts of similar length and of one
            domain, since what depends on these goes with other covariates too; and as often again for length, and for
            domains, where they differ.
        n_bootstrap: How often documents are resampled, for intervals.
        seed: For all of this.
        progress: Whether to show a bar; by default in terminals and notebooks. Most of the time goes into `n_null`, and
            into one regression for every set of `GROUPS`.

    Raises:
        ValueError: If the regression explains nothing out of fold, or no more than chance, so that there is nothing to
            explain; or if an argument is not as described.
    """
    if regressor not in _REGRESSORS:
        raise ValueError(f"`regressor` must be one of {list(_REGRESSORS)}, got {regressor!r}.")
    if n_folds < 2:
        raise ValueError(f"`n_folds` must be at least 2, to fit on some documents and try on others, got {n_folds}.")
    require_draws(n_null=n_null, n_bootstrap=n_bootstrap)
    require_prompts(table, ("document", "domain", "n_tokens", *READ))
    known: Any = with_covariates(table, counts=counts, model=model)
    columns = {name: values for name, values in numbers(known).items() if np.isfinite(values).mean() > 0.5}
    finite = np.isfinite([*columns.values()]).all(0) if columns else np.zeros(len(known), dtype=bool)
    if finite.sum() < 2:
        raise ValueError(
            f"`table` must have prompts of which covariates are known and differ, got {len(known)} of which "
            f"{finite.sum()} can be used: sweep more prompts."
        )
    known = known[finite].reset_index(drop=True)
    columns = {name: values[finite] for name, values in columns.items()}
    columns, dropped = _without_twins(columns)
    y = outcome_of(known, outcome, threshold)
    if np.ptp(y) == 0:
        raise ValueError(f"`outcome` must differ between prompts, got {y[0]:g} of {outcome!r} for all of them.")
    document = codes(known["document"].astype(str).to_numpy())
    n_documents = len(np.unique(document))
    if n_documents < 2:
        raise ValueError("`table` must be of at least two documents, of which one can be predicted from the others.")
    x = np.stack([*columns.values()], axis=1)
    fitting = _Fitting(x, y, document, min(n_folds, n_documents), _REGRESSORS[regressor], seed)
    names = [*columns]
    joined, of_column = _joined(names)

    def by_covariate(phi: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row joined"]:
        return np.stack([phi[:, of_column == number].sum(1) for number in range(len(joined))], axis=1)

    strata = strata_held(known)
    within = [held_for("n_tokens" if name == dropped.get("n_tokens") else name) for name in joined]
    # exchanged within strata, density still depends on what these are made of, which is not to be compared with
    others = {held: [each in (held, "") for each in within] for held in dict.fromkeys(within)}
    level = 1 - 0.05 / len(others)

    with bar_of(1 + n_null * len(others) + len(joined) + 2 ** len(_members(names)), "fit", progress) as bar:
        own = fitting.explained(y)
        bar.update()
        r2, values = own.r2, by_covariate(own.phi)
        null_r2, null = [], dict.fromkeys(others, np.nan)
        for held, compared in others.items():
            by_chance = []
            for order in chain.from_iterable(exchanged(strata[held], n_null, seed)):
                found = fitting.explained(y[order])
                by_chance.append((found.r2, np.abs(by_covariate(found.phi)).mean(0)[compared].max()))
                bar.update()
            if by_chance:
                at_most = np.quantile(by_chance, level, axis=0)
                null_r2.append(float(at_most[0]))
                null[held] = float(at_most[1])
        limit = min(null_r2, default=0.0)
        if not r2 > max(limit, 0.0):
            raise ValueError(
                f"`table` must let density be predicted: R2 out of fold is {r2:.3f}, and {limit:.3f} would be chance. "
                "There is nothing to explain."
            )
        again = np.array([np.abs(values[rows]).mean(0) for rows in resampled(document, n_bootstrap, seed)])
        bounds = [interval(column) for column in again.T] if len(again) else [(np.nan, np.nan)] * len(joined)
        rows = []
        for number, name in enumerate(joined):
            members = np.flatnonzero(of_column == number)
            mean = float(np.abs(values[:, number]).mean())
            rows.append({
                "covariate": name, "mean_abs": mean, "low": bounds[number][0], "high": bounds[number][1],
                "null": null[within[number]], "counts": bool(mean > null[within[number]]),
                "permutation": fitting.permuted(members),
                "drop": r2 - fitting.without(members).r2(y),
            })  # fmt: skip
            bar.update()
        groups = _grouped(fitting, y, names, bar)
    made: Any = DataFrame(rows)
    shown = np.stack([x[:, of_column == number][:, 0] for number in range(len(joined))], axis=1)
    return ShapValues(
        made.sort_values("mean_abs", ascending=False, ignore_index=True), groups, DataFrame(values, columns=joined),
        DataFrame(shown, columns=joined), r2, limit,
        _Fitting(x, y, document, min(n_folds, n_documents), _ridge, seed).r2(y),
        own.gap, outcome, dropped, n_documents,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Fitting:
    """A regression in cross-validation that keeps documents together."""

    x: Float[np.ndarray, "row column"]
    y: Float[np.ndarray, " row"]
    document: Int[np.ndarray, " row"]
    n_folds: int
    make: Callable[[int], Any]
    seed: int

    def folds(self) -> list[tuple[Any, Any]]:
        selection = extra("sklearn.model_selection", "study", "Shapley values")
        return [*selection.GroupKFold(self.n_folds).split(self.x, self.y, self.document)]

    def without(self, columns: Sequence[int] | Int[np.ndarray, " some"]) -> "_Fitting":
        """The same with some columns left out."""
        x = np.delete(self.x, columns, axis=1)
        return _Fitting(x, self.y, self.document, self.n_folds, self.make, self.seed)

    def fits(self, y: Float[np.ndarray, " row"]) -> Iterator[tuple[Any, Any, Any]]:
        """For each fold, which rows it was fitted on, which not, and the regression."""
        for train, test in self.folds():
            yield train, test, self.make(self.seed).fit(self.x[train], y[train])

    @cached_property
    def own_fits(self) -> list[tuple[Any, Any, Any]]:
        """The same for its own outcome, made once."""
        return [*self.fits(self.y)]

    def r2(self, y: Float[np.ndarray, " row"]) -> float:
        """R2 of all predictions out of fold; 0 of the mean, which is what is left without columns."""
        if not self.x.shape[1]:
            return 0.0
        predicted = np.empty_like(y)
        for _, test, fitted in self.fits(y):
            predicted[test] = fitted.predict(self.x[test])
        return r2_of(y, predicted)

    def permuted(self, columns: Int[np.ndarray, " some"], n: int = 5) -> float:
        """What R2 out of fold loses, on average, if some columns are exchanged together."""
        generator = np.random.default_rng(self.seed)
        y = self.y
        predicted, spoilt = np.empty_like(y), np.empty((n, len(y)))
        for _, test, fitted in self.own_fits:
            predicted[test] = fitted.predict(self.x[test])
            for draw in range(n):
                mixed = self.x[test].copy()
                mixed[:, columns] = mixed[generator.permutation(len(mixed))][:, columns]
                spoilt[draw, test] = fitted.predict(mixed)
        return r2_of(y, predicted) - float(np.mean([r2_of(y, each) for each in spoilt]))

    def explained(self, y: Float[np.ndarray, " row"]) -> "_Explained":
        """Shapley values out of fold."""
        shap = extra("shap", "study", "Shapley values")
        phi, worst, predicted = np.empty(self.x.shape), 0.0, np.empty_like(y)
        for train, test, fitted in self.fits(y):
            predicted[test] = fitted.predict(self.x[test])
            if not hasattr(fitted, "steps"):  # trees
                explainer = shap.TreeExplainer(fitted, feature_perturbation="tree_path_dependent")
                found, base = explainer.shap_values(self.x[test]), explainer.expected_value
            else:
                scale = fitted[:-1]
                background = shap.maskers.Independent(scale.transform(self.x[train]), max_samples=len(train))
                explainer = shap.LinearExplainer(fitted[-1], background)
                found, base = explainer.shap_values(scale.transform(self.x[test])), explainer.expected_value
            phi[test] = found
            worst = max(worst, float(np.abs(found.sum(1) + float(np.ravel(base)[0]) - predicted[test]).max()))
        if worst > 1e-5 * max(1.0, float(np.abs(y).max())):
            raise ValueError(f"Shapley values must add up to predictions, got a difference of {worst:.2g}: a bug.")
        return _Explained(phi, worst, r2_of(y, predicted))


@dataclass(frozen=True, eq=False)
class _Explained:
    """Shapley values out of fold, how far their sums are from predictions at most, and R2 of these."""

    phi: Float[np.ndarray, "row column"]
    gap: float
    r2: float


def _boosting(seed: int) -> Any:
    ensemble = extra("sklearn.ensemble", "study", "Shapley values")
    # on histograms: eight times as fast as exact splits, and no worse on 1,000 prompts
    return ensemble.HistGradientBoostingRegressor(
        max_iter=100, max_depth=3, learning_rate=0.1, min_samples_leaf=5, early_stopping=False, random_state=seed
    )


def _ridge(seed: int) -> Any:
    pipeline = extra("sklearn.pipeline", "study", "Shapley values")
    linear = extra("sklearn.linear_model", "study", "Shapley values")
    scaling = extra("sklearn.preprocessing", "study", "Shapley values")
    # a penalty that is the same whatever is predicted: one that was chosen would hide what chance gives
    return pipeline.make_pipeline(scaling.StandardScaler(), linear.Ridge(alpha=10.0))


_REGRESSORS: Mapping[str, Callable[[int], Any]] = {"boosting": _boosting, "ridge": _ridge}


def r2_of(y: Float[np.ndarray, " row"], predicted: Float[np.ndarray, " row"]) -> float:
    """Share of the variance that predictions explain; below zero if the mean does better."""
    return float(1 - np.square(y - predicted).sum() / np.square(y - y.mean()).sum())


def _without_twins(columns: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Columns without those that say nearly the same as an earlier one, and which."""
    kept: dict[str, np.ndarray] = {}
    dropped: dict[str, str] = {}
    for name, values in columns.items():
        twins = (each for each in kept if abs(rank_correlations(np.stack([kept[each], values], axis=1))[0, 1]) > _TWINS)
        twin = next(twins, None)
        if twin is None:
            kept[name] = values
        else:
            dropped[name] = twin
    return kept, dropped


def _joined(names: Sequence[str]) -> tuple[list[str], Int[np.ndarray, " column"]]:
    """Names of covariates, domains as one, and which of them each column belongs to."""
    owner = [name if name in NUMERIC else "domain" for name in names]
    joined = list(dict.fromkeys(owner))
    return joined, np.array([joined.index(each) for each in owner])


def _members(names: Sequence[str]) -> dict[str, list[int]]:
    """Which columns each group of covariates has, of those that are there."""
    of = {name: group for group, members in GROUPS.items() for name in members}
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        found.setdefault(of.get(name, "domain"), []).append(number)
    return found


def _grouped(fitting: _Fitting, y: Float[np.ndarray, " row"], names: Sequence[str], bar: Any) -> DataFrame:
    """Exact Shapley values of R2 out of fold, with groups of covariates for players."""
    members = _members(names)
    groups = [*members]
    worth: dict[frozenset[str], float] = {}
    subsets = chain.from_iterable(combinations(groups, count) for count in range(len(groups) + 1))
    for subset in map(frozenset, subsets):
        left_out = [i for group in groups if group not in subset for i in members[group]]
        worth[subset] = fitting.without(left_out).r2(y)
        bar.update()
    n, rows = len(groups), []
    for group in groups:
        total = 0.0
        for subset in worth:
            if group not in subset:
                weight = factorial(len(subset)) * factorial(n - len(subset) - 1) / factorial(n)
                total += weight * (worth[subset | {group}] - worth[subset])
        rows.append({"group": group, "r2": total, "alone": worth[frozenset({group})]})
    made: Any = DataFrame(rows)
    return made.sort_values("r2", ascending=False, ignore_index=True)
