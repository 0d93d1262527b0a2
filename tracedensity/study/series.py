"""Series: the density of one sweep after another: checkpoints of a model, languages, anything in an order."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from pandas import DataFrame

from tracedensity.study.covariates import AREAS, outcome_of, unique_prompts
from tracedensity.study.folder import MANIFEST, read_sweep
from tracedensity.study.statistics import codes, holm, interval, p_of_signs, rank_correlations, require_draws, resampled

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracedensity.plot import Theme

Against = Literal["previous", "first"]
"""What each table of a series is compared with."""

_FEWEST = 3
"""Inputs that two tables have in common, if they are compared input by input."""


@dataclass(frozen=True, eq=False)
class Trend:
    """A measure of density over a series of sweeps.

    Attributes:
        table: One row per sweep: `name`; `mean` of the outcome (of log10 of a size) with its interval `low` to `high`;
            `change` against the sweep before, or the first, with its interval, `p` and `p_holm`; `paired`, how many
            inputs that is of, 0 where the two have none in common: then it is a difference of means, without p; `rho`,
            Spearman's correlation with the last sweep over common inputs, with its interval; means of `entropy` and
            `n_tokens`; `n` inputs.
        outcome: What was measured.
        threshold: Faithfulness at which sizes are taken.
        against: What changes are against.
    """

    table: DataFrame
    outcome: str
    threshold: float
    against: str

    def plot(self, *, theme: "Theme | str" = "light") -> "go.Figure":
        """The measure, and which inputs have much of it, from sweep to sweep; see `plot_trend`."""
        from tracedensity.plot.series import plot_trend

        return plot_trend(self, theme=theme)

    def __str__(self) -> str:
        table: Any = self.table
        about = f"{'log10 ' * (self.outcome not in AREAS)}{self.outcome}, changes against the {self.against}"
        return f"{about}\n{table.to_string(index=False, float_format='{:.3g}'.format)}"


def trend(
    tables: Mapping[str, DataFrame] | str | PathLike[str],
    *,
    outcome: str = "area",
    threshold: float | int = 0.9,
    against: Against | str = "previous",
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> Trend:
    """How density goes from one sweep to the next: over training, over languages.

    Sweeps over the same prompts are compared input by input: intervals resample documents, p turns the signs of the
    changes of whole documents, which is as likely where nothing changes. Sweeps over different prompts are compared by
    their means; that they differ may be the fault of anything in which the texts do.

    Args:
        tables: Prompts of sweeps, from `td.read_sweep`, in their order, by what to call them; or a folder of sweeps,
            in the order of the numbers in their names.
        outcome: What to follow, of `tracedensity.study.covariates.OUTCOMES`.
        threshold: Faithfulness at which sizes are taken.
        against: What each is compared with, the ``"previous"`` or the ``"first"``.
        n_bootstrap: How often documents are resampled.
        n_permutations: How often signs are turned.
        seed: For both.

    Raises:
        ValueError: If there are fewer than two tables, or one has no numbers.
    """
    if isinstance(tables, str | PathLike):
        tables = {path.name: read_sweep(path) for path in _in_order(tables, MANIFEST)}
    if not isinstance(tables, Mapping) or len(tables) < 2:
        raise ValueError("`tables` must be the prompts of two or more sweeps, in their order, by what to call them.")
    if against not in get_args(Against):
        raise ValueError(f"`against` must be one of {list(get_args(Against))}, got {against!r}.")
    require_draws(n_bootstrap=n_bootstrap, n_permutations=n_permutations)
    known = {name: unique_prompts(table, ("document", "entropy", "n_tokens")) for name, table in tables.items()}
    sides = {name: _Side.of(table, outcome, threshold) for name, table in known.items()}
    names, rows = [*sides], []
    for number, (name, side) in enumerate(sides.items()):
        means: Any = known[name][["entropy", "n_tokens"]].mean()
        low, high = interval([side.y[draw].mean() for draw in resampled(side.document, n_bootstrap, seed)])
        row = {"name": name, "mean": side.y.mean(), "low": low, "high": high}
        if number:
            before = sides[names[0 if against == "first" else number - 1]]
            row |= _change(before, side, n_bootstrap, n_permutations, seed)
        row |= _likeness(side, sides[names[-1]], n_bootstrap, seed)
        rows.append({**row, **means, "n": len(side.y)})
    made: Any = DataFrame(rows)
    made["p_holm"] = holm(made["p"].to_numpy(float))
    order = [
        "name", "mean", "low", "high", "change", "change_low", "change_high", "p", "p_holm", "paired", "rho", "rho_low",
        "rho_high", "entropy", "n_tokens", "n",
    ]  # fmt: skip
    made["paired"] = made["paired"].fillna(0).astype(int)
    return Trend(made[order], outcome, float(threshold), against)


def checkpoints(folder: str | PathLike[str]) -> list[Path]:
    """The models in a folder, one folder each, in the order of the numbers in their names.

    Args:
        folder: Where training has written them, such as ``steps/step-000064``.

    Raises:
        ValueError: If there is none.
    """
    return _in_order(folder, "config.json")


def _in_order(folder: str | PathLike[str], file: str) -> list[Path]:
    """The folders in a folder that have a file of a name, in the order of the numbers in their names.

    Raises:
        ValueError: If there is none.
    """
    found = [each.parent for each in Path(folder).glob(f"*/{file}")]
    if not found:
        raise ValueError(f"There must be folders with a {file} in {os.fspath(folder)!r}, got none.")
    return sorted(found, key=lambda each: _numbered(each.name))


def _numbered(name: str) -> list[str | int]:
    """What stands between numbers, and the numbers, in turn, so that names compare piece by piece."""
    pieces = re.split(r"(\d+)", name)
    return [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)]


@dataclass(frozen=True, eq=False)
class _Side:
    """One table: the outcome of each input, what the input is, and what it was taken from."""

    y: Float[np.ndarray, " row"]
    text: list[str]
    document: Int[np.ndarray, " row"]

    @classmethod
    def of(cls, table: Any, outcome: str, threshold: float | int) -> "_Side":
        document = codes(table["document"].astype(str).to_numpy())
        return cls(outcome_of(table, outcome, threshold), [*table.index], document)

    def shared(self, other: "_Side") -> tuple["_Side", "_Side"]:
        """Both, of the inputs that both have, in one order."""
        place = {text: number for number, text in enumerate(other.text)}
        mine = [number for number, text in enumerate(self.text) if text in place]
        theirs = [place[self.text[number]] for number in mine]
        return self._some(mine), other._some(theirs)

    def _some(self, rows: list[int]) -> "_Side":
        return _Side(self.y[rows], [self.text[row] for row in rows], self.document[rows])


def _change(before: _Side, after: _Side, n_bootstrap: int, n_permutations: int, seed: int) -> dict[str, float]:
    now, then = after.shared(before)
    n = len(now.y)
    if n < _FEWEST:  # other inputs: documents of both are resampled, each for itself
        draws = zip(
            resampled(after.document, n_bootstrap, seed), resampled(before.document, n_bootstrap, seed + 1),
            strict=False,
        )  # fmt: skip
        low, high = interval([after.y[mine].mean() - before.y[theirs].mean() for mine, theirs in draws])
        change = after.y.mean() - before.y.mean()
        return {"change": change, "change_low": low, "change_high": high, "p": np.nan, "paired": 0}
    apart = now.y - then.y
    low, high = interval([apart[draw].mean() for draw in resampled(now.document, n_bootstrap, seed)])
    by_document = np.bincount(codes(now.document), apart)
    p = p_of_signs(by_document, n_permutations, np.random.default_rng(seed))
    return {"change": apart.mean(), "change_low": low, "change_high": high, "p": p, "paired": n}


def _likeness(side: _Side, last: _Side, n_bootstrap: int, seed: int) -> dict[str, float]:
    """The correlation with the last sweep."""
    mine, theirs = side.shared(last)
    if len(mine.y) < _FEWEST:
        return {"rho": np.nan, "rho_low": np.nan, "rho_high": np.nan}
    both = np.stack([mine.y, theirs.y], axis=1)
    again = [float(rank_correlations(both[draw])[0, 1]) for draw in resampled(mine.document, n_bootstrap, seed)]
    low, high = interval(again)
    return {"rho": float(rank_correlations(both)[0, 1]), "rho_low": low, "rho_high": high}
