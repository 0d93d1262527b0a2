"""Knees: where on a density curve a threshold may be put without choosing a number by hand."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from pandas import DataFrame

from tracedensity.evaluation import RELATIVE_SIZES
from tracedensity.extras import extra
from tracedensity.study.covariates import require_prompts
from tracedensity.study.grid import on_grid
from tracedensity.study.statistics import codes, interval, require_draws, resampled

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracedensity.plot import Theme

_PLATEAU = 0.02
"""What belongs to a leading plateau is so close to the largest distance."""

_FEWEST = 6
"""Points that a knee is looked for in."""

_PER_SEGMENT = 3
"""Points that a segment has at least."""

_INNER = slice(_PER_SEGMENT - 1, 1 - _PER_SEGMENT)


@dataclass(frozen=True, eq=False)
class Segments:
    """A curve as straight pieces that meet.

    Attributes:
        breaks: Where they meet.
        bic: What the criterion is for one piece, two, and so on, lowest best.
        fitted: The pieces at the points of the curve.
    """

    breaks: tuple[float, ...]
    bic: tuple[float, ...]
    fitted: Float[np.ndarray, " point"]

    @property
    def n_segments(self) -> int:
        return len(self.breaks) + 1

    def slopes(self, x: Float[np.ndarray, " point"]) -> tuple[float, ...]:
        """How steep each piece is, of a curve at these points."""
        edges = np.array([x[0], *self.breaks, x[-1]])
        return tuple((np.diff(np.interp(edges, x, self.fitted)) / np.diff(edges)).tolist())


@dataclass(frozen=True, eq=False)
class Threshold:
    """A threshold that was chosen, and what it is worth.

    Attributes:
        how: ``"knee"`` or ``"segments"``.
        share: Size at which the mean curve bends, as a share of all edges; None where it does not.
        faithfulness: The mean curve there.
        low: Lower end of the interval of the share.
        high: Its upper end.
        found: Share of resampled curves that bend at all.
        note: What was noticed: a fallback, or why there is none.
    """

    how: str
    share: float | None
    faithfulness: float | None
    low: float
    high: float
    found: float
    note: str = ""


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Thresholds chosen on the mean curve of some prompts, and density at them on others.

    Attributes:
        choices: By how they were chosen.
        shares: Sizes of the mean curve, as shares of all edges.
        faithfulness: The mean curve of the prompts that they were chosen on.
        segments: The pieces of that curve.
        table: One row per choice: `faithfulness` and `share` chosen, and `median`, `low`, `high`, quartiles of the
            fraction that the held-out prompts need for that faithfulness; `n` of these.
        held_out: Whether they are others than those that were chosen on.
    """

    choices: dict[str, Threshold]
    shares: Float[np.ndarray, " point"]
    faithfulness: Float[np.ndarray, " point"]
    segments: Segments
    table: DataFrame
    held_out: bool
    again: dict[str, Float[np.ndarray, " draw"]] = field(default_factory=dict, repr=False)

    def plot(self, *, theme: "Theme | str" = "light") -> "go.Figure":
        """The mean curve, where it bends, and how far that moves between resampled prompts; see `plot_thresholds`."""
        from tracedensity.plot.knees import plot_thresholds

        return plot_thresholds(self, theme=theme)

    def __str__(self) -> str:
        table: Any = self.table
        notes = [f"{name}: {choice.note}" for name, choice in self.choices.items() if choice.note]
        where = "held-out prompts" if self.held_out else "the same prompts, which flatters them"
        return "\n".join([table.to_string(index=False, float_format="{:.3g}".format), f"Density on {where}.", *notes])


def thresholds(table: DataFrame, *, split: float = 0.5, n_bootstrap: int = 500, seed: int = 0) -> Thresholds:
    """Choose a threshold where the mean curve bends.

    Kneedle, and a fit of one or two straight pieces by BIC, both on distance (1 - faithfulness) over log10 of size. A
    leading plateau, which Kneedle takes for the knee, is cut; where it has no inner knee, the break of two pieces is
    taken, and said so. A curve that is steeper behind such a place than before has no threshold there. Chosen on some
    documents, tried on the others.

    Args:
        table: Prompts of a sweep, from `td.read_sweep`.
        split: Share of documents to choose on; 1 to choose and try on all of them.
        n_bootstrap: How often documents are resampled, for how stable the choice is.
        seed: For that, and for the split.

    Raises:
        ValueError: If an argument is not as described.
    """
    require_prompts(table)
    require_draws(n_bootstrap=n_bootstrap)
    if not 0 < split <= 1:
        raise ValueError(f"`split` must be above 0 and at most 1, got {split}.")
    known: Any = table[table["error"].isna()].reset_index(drop=True)
    curves = np.stack([on_grid(*row) for row in zip(known["sizes"], known["faithfulness"], strict=True)])
    document = codes(known["document"].astype(str).to_numpy())
    labels = np.random.default_rng(seed).permutation(document.max() + 1)
    chosen = np.isin(document, labels[: max(1, round(split * len(labels)))])
    held_out = bool(chosen.any() and (~chosen).any())
    if not held_out:
        chosen = np.ones(len(document), dtype=bool)
    tried = ~chosen if held_out else chosen
    one_edge = np.array(RELATIVE_SIZES) * float(known["n_edges"].median()) >= 1  # what has none is flat
    shares, curves = np.array(RELATIVE_SIZES)[one_edge], curves[:, one_edge]
    mean = curves[chosen].mean(0)
    distance, x = 1 - mean, np.log10(shares)
    draws = list(resampled(document[chosen], n_bootstrap, seed))
    again = [1 - curves[chosen][draw].mean(0) for draw in draws]
    choices, moved, rows = {}, {}, []
    for how in ("knee", "segments"):
        place, note = _CHOICES[how](x, distance)
        found = [_CHOICES[how](x, each)[0] for each in again]
        moved[how] = 10 ** np.array([each for each in found if each is not None], dtype=float)
        low, high = interval(moved[how])
        share = None if place is None else float(10**place)
        height = None if place is None else float(np.interp(place, x, mean))
        bent = len(moved[how]) / len(again) if again else np.nan
        choices[how] = Threshold(how, share, height, low, high, bent, note)
        needed = np.array([np.nan if height is None else _fraction_at(shares, each, height) for each in curves[tried]])
        quartiles = np.quantile(needed, [0.25, 0.5, 0.75]) if height is not None else [np.nan] * 3
        rows.append({
            "how": how, "share": share, "share_low": low, "share_high": high, "faithfulness": height,
            "median": quartiles[1], "low": quartiles[0], "high": quartiles[2], "n": int(tried.sum()),
        })  # fmt: skip
    return Thresholds(choices, shares, mean, segments(x, distance, 2), DataFrame(rows), held_out, moved)


def knee(x: Float[np.ndarray, " point"], distance: Float[np.ndarray, " point"]) -> tuple[float | None, str]:
    """Where a falling curve bends most, by Kneedle, behind its leading plateau; and what was noticed.

    Args:
        x: log10 of size, growing.
        distance: 1 - faithfulness.

    References:
        Satopää, Albrecht, Irwin, Raghavan: Finding a "Kneedle" in a haystack (2011).
    """
    locator: Callable[..., Any] = extra("kneed", "study", "knees").KneeLocator
    on_plateau = np.flatnonzero(distance > distance.max() - _PLATEAU)
    start = int(on_plateau[-1]) if len(on_plateau) else 0
    some, heights = x[start:], distance[start:]
    if len(some) >= _FEWEST:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where it finds none
            found = locator(some, heights, S=1.0, curve="convex", direction="decreasing").knee
        if found is not None and some[0] < found < some[-1] and _flattens(some, heights, found):
            return float(found), ""
    place, note = _by_segments(x, distance)
    taken = "" if place is None else ": the break of straight pieces was taken"
    return place, f"Kneedle found no inner knee behind which the curve is flatter{taken}. {note}".rstrip()


def segments(x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"], most: int = 3) -> Segments:
    """The curve as one or more straight pieces that meet, as many as the Bayesian information criterion asks for.

    ``n ln(RSS / n) + k ln n`` with k = 2K + 1 for K pieces. Points of one curve are no independent ones, so that it
    favours too many: take the interval of a break from resampled prompts.

    Args:
        x: Growing.
        y: The curve.
        most: Pieces at most.

    Raises:
        ValueError: If there are fewer than three points.
    """
    n = len(x)
    if n < _PER_SEGMENT:
        raise ValueError(f"`x` must be at least {_PER_SEGMENT} points, got {n}.")
    best: list[tuple[float, tuple[float, ...], np.ndarray]] = []
    floor = n * np.finfo(float).eps * max(float(np.square(y).sum()), 1e-300)  # of rounding: an exact fit is no -inf
    for pieces in range(1, most + 1):
        fits = []
        for places in combinations(range(n)[_INNER], pieces - 1):
            ends = (0, *places, n - 1)
            if any(after - before < _PER_SEGMENT - 1 for before, after in pairwise(ends)):
                continue
            basis = np.stack([np.ones(n), x, *(np.maximum(x - x[place], 0) for place in places)], axis=1)
            fitted = basis @ np.linalg.lstsq(basis, y, rcond=None)[0]
            rss = max(float(np.square(y - fitted).sum()), floor)
            fits.append((rss, tuple(float(x[place]) for place in places), fitted))
        if not fits:
            break
        rss, breaks, fitted = min(fits, key=lambda fit: fit[0])
        best.append((n * np.log(rss / n) + (2 * pieces + 1) * np.log(n), breaks, fitted))
    _, breaks, fitted = min(best, key=lambda fit: fit[0])
    return Segments(breaks, tuple(float(bic) for bic, _, _ in best), fitted)


def places_of(x: Float[np.ndarray, " point"]) -> Float[np.ndarray, " place"]:
    """Where two pieces may meet."""
    return x[_INNER]


def _by_segments(x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"]) -> tuple[float | None, str]:
    """The break of two pieces; None if one is as good by the criterion, or the curve is steeper behind."""
    found = segments(x, y, 2)
    if found.n_segments == 1:
        return None, "One straight piece describes the curve as well as two: there is no threshold to choose."
    if not _flattens(x, found.fitted, found.breaks[0]):
        return None, "The curve is steeper behind its break than before: there is no threshold to choose."
    return found.breaks[0], ""


def _flattens(x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"], place: float) -> bool:
    """Whether a falling curve falls less behind a place than before it, from end to end."""
    middle = np.interp(place, x, y)
    before, behind = (y[0] - middle) / (place - x[0]), (middle - y[-1]) / (x[-1] - place)
    return bool(before > behind)


_CHOICES: dict[str, Callable[[Any, Any], tuple[float | None, str]]] = {"knee": knee, "segments": _by_segments}


def _fraction_at(shares: Float[np.ndarray, " point"], heights: Float[np.ndarray, " point"], wanted: float) -> float:
    """Smallest share on the grid that reaches a faithfulness."""
    return float(shares[np.flatnonzero(heights >= wanted)[0]]) if (heights >= wanted).any() else 1.0
