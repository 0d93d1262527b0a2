"""Contents: what circuits of a corpus are made of, which parts come again, and what small ones predict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from pandas import DataFrame

from tracedensity.evaluation import RELATIVE_SIZES
from tracedensity.extras import extra
from tracedensity.study.folder import read_sweep
from tracedensity.study.grid import on_grid
from tracedensity.study.knees import places_of, segments
from tracedensity.study.statistics import codes, holm, interval, require_draws, resampled

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracedensity.plot import Theme


_MEASURED = ("faithfulness", "random", "inverse", "top1", "nucleus", "entropy", "unigram_tv")
"""Columns of points whose means are of interest."""

_NAMED = 5
"""So many components are named that come most often."""


@dataclass(frozen=True, eq=False)
class Phases:
    """Whether the mean curve of faithfulness over log10 of size has a break.

    Attributes:
        break_at: Share of all edges at which two straight pieces meet; None where one is as good.
        low: Lower end of the interval of the break, over resampled documents; breaks are looked for at sizes on a grid,
            and known to half a step of it.
        high: Its upper end.
        at_edge: Whether the break is at the first or the last size at which one is looked for.
        found: Share of resampled curves that have one.
        slopes: Faithfulness gained per tenfold size, before and behind.
        gain: How much lower the Bayesian information criterion is with two pieces than with one.
        breaks: Where up to three pieces meet, as many as the criterion asks for.
        all_slopes: Those of these pieces.
    """

    break_at: float | None
    low: float
    high: float
    at_edge: bool
    found: float
    slopes: tuple[float, ...]
    gain: float
    breaks: tuple[float, ...]
    all_slopes: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Contents:
    """What the circuits of a corpus hold.

    Attributes:
        by_size: One row per size of the density papers: `share` of all edges; the mean over prompts of `faithfulness`,
            of `random` circuits of that size, `top1`, `nucleus` recovered, `entropy`, `unigram_tv`, each with its
            interval; the share of edges that are of each part (``part=heads``) and in each quarter of the layers
            (``quarter=1``, the lowest).
        recurrence: One row per component: `often`, the share of prompts in whose circuit it has an edge; `expected`
            where each prompt drew its heads, MLPs and skip connections at random, as many of each kind as it has: what
            leads anywhere must have some of a kind. `p` and `p_holm` of being so far from that, prompts taken as
            independent, which those of one document are not quite.
        share: Size of the circuits whose components are counted, as a share of all edges.
        spread: Variance of `often` over components; `null_spread` is its 95th percentile under the same null.
        null_spread: See there.
        phases: Whether there are two phases, by the name of what was looked at: ``circuits``, and ``random`` ones.
        n: Prompts.
    """

    by_size: DataFrame
    recurrence: DataFrame
    share: float
    spread: float
    null_spread: float
    phases: Mapping[str, Phases]
    n: int

    def plot(self, what: str = "composition", *, theme: "Theme | str" = "light") -> "go.Figure":
        """``"composition"``, ``"layers"``, ``"recurrence"``, ``"prediction"`` or ``"phases"``, see `plot_contents`."""
        from tracedensity.plot.contents import plot_contents

        return plot_contents(self, what, theme=theme)

    def __str__(self) -> str:
        table: Any = self.by_size
        shown = [name for name in table.columns if name in ("share", *_MEASURED) or name.startswith("part=")]
        narrow = table[shown].rename(columns=lambda name: name.removeprefix("part="))
        lines = [f"{self.n} prompts", narrow.to_string(index=False, float_format="{:.3g}".format), self._recurrence()]
        for name, phases in self.phases.items():
            if phases.break_at is None:
                lines.append(f"{name}: no break")
            else:
                lines.append(
                    f"{name}: a break at {phases.break_at:.2g} of all edges ({phases.low:.2g} to {phases.high:.2g}, in "
                    f"{phases.found:.0%} of resampled curves), {phases.slopes[0]:.2f} per tenfold size before, "
                    f"{phases.slopes[-1]:.2f} behind"
                )
        return "\n".join(lines)

    def _recurrence(self) -> str:
        rows: Any = self.recurrence
        sure = rows["p_holm"] < 0.05
        more, less = ((sure & (sign * (rows["often"] - rows["expected"]) > 0)).sum() for sign in (1, -1))
        first = rows.sort_values("often", ascending=False, kind="stable").head(_NAMED)
        named = ", ".join(f"{name} {often:.0%}" for name, often in zip(first["component"], first["often"], strict=True))
        return (
            f"components in circuits of {self.share:g} of all edges: how often each comes has a variance of "
            f"{self.spread:.3g} ({self.null_spread:.3g} by chance)\n"
            f"{more} of {len(rows)} come more often than if each prompt drew as many of their kind at random, {less} "
            f"less often (p < 0.05, Holm); most often {named}"
        )


def contents(
    path: str | PathLike[str] | object,  # a table, the usual mistake, gets a sentence
    *,
    share: float | int = 0.01,
    n_bootstrap: int = 500,
    n_null: int = 1000,
    seed: int = 0,
) -> Contents:
    """What the circuits of a sweep hold, size by size.

    Args:
        path: Folder of the sweep.
        share: Size of the circuits whose components are counted, as a share of all edges.
        n_bootstrap: How often documents are resampled, for intervals.
        n_null: How often components are drawn at random.
        seed: For both.

    Raises:
        ValueError: If it is no sweep, or `share` is not above 0 and at most 1.
    """
    if not isinstance(path, str | PathLike):
        raise ValueError(
            f"`path` must be the folder of a sweep, got a {type(path).__name__}: what circuits hold is in more tables "
            "than that of its prompts."
        )
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be above 0 and at most 1, got {share}.")
    require_draws(n_bootstrap=n_bootstrap, n_null=n_null)
    every: Any = read_sweep(path)
    prompts = every[every["error"].isna()].reset_index(drop=True)
    if not len(prompts):
        first = every["error"].iloc[0]
        raise ValueError(f"`path` must be a sweep with numbers, got one in which every prompt has an error: {first}")
    points: Any = read_sweep(path, "points")
    document = codes(prompts["document"].astype(str).to_numpy())
    draws = list(resampled(document, n_bootstrap, seed))
    rows = _by_size(prompts, points, draws)
    present = np.stack([*prompts["entered"]]) <= (share * prompts["n_edges"].to_numpy(float))[:, None]
    recurrence, null_spread = recurrence_of(present, prompts.attrs["sweep"]["components"], n_null, seed)
    spread = float(recurrence["often"].to_numpy(float).var())
    return Contents(rows, recurrence, share, spread, null_spread, _phases(prompts, points, draws), len(prompts))


def _by_size(prompts: Any, points: Any, draws: list[np.ndarray]) -> DataFrame:
    n = len(prompts)
    rows: list[dict[str, float]] = [{"share": share} for share in RELATIVE_SIZES]
    for name in _MEASURED:
        values = _filled(points[name].to_numpy(float).reshape(n, -1), points["size"].to_numpy(float).reshape(n, -1))
        for number, column in enumerate(values.T):
            if np.isfinite(column).all():
                low, high = interval([column[draw].mean() for draw in draws])
                rows[number] |= {name: float(column.mean()), f"{name}_low": low, f"{name}_high": high}
    parts = np.stack([*points["by_part"]]).reshape(n, len(rows), -1)
    quarters = np.stack([*points["by_quarter"]]).reshape(n, len(rows), -1)
    labels = [f"part={name}" for name in prompts.attrs["sweep"]["parts"]]
    for counts, of in ((parts, labels), (quarters, [f"quarter={each + 1}" for each in range(quarters.shape[2])])):
        total = counts.sum(2, keepdims=True)
        shares = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
        for number in range(len(rows)):
            some = shares[:, number][np.isfinite(shares[:, number]).all(1)]
            if len(some):
                rows[number] |= dict(zip(of, some.mean(0).tolist(), strict=True))
    return DataFrame(rows)


def _filled(
    values: Float[np.ndarray, "prompt point"], sizes: Float[np.ndarray, "prompt point"]
) -> Float[np.ndarray, "prompt point"]:
    """Values at all sizes where some were left out, by interpolation over log10 of size, prompt by prompt."""
    filled = values.copy()
    for row, own in zip(filled, np.log10(np.maximum(sizes, 0.5)), strict=True):
        known = np.isfinite(row)
        if known.any() and not known.all():
            row[:] = np.interp(own, own[known], row[known])
    return filled


def recurrence_of(
    present: Bool[np.ndarray, "prompt component"], names: Sequence[str], n_null: int, seed: int
) -> tuple[DataFrame, float]:
    """How often each component comes, beside what would be if each prompt drew as many of each kind at random.

    Args:
        present: Which components each prompt has.
        names: What components are called; those of one kind begin with the same letter.
        n_null: How often components are drawn at random.
        seed: For that.

    Returns:
        One row per component, and the 95th percentile of the variance of `often` where they are drawn.
    """
    stats = extra("scipy.stats", "study", "statistics")
    n, kind = len(present), codes([name[:1] for name in names])
    n_often, p, expected = present.sum(0), np.empty(len(names)), np.empty(len(names))
    generator = np.random.default_rng(seed)
    often = np.empty((n_null, len(names)))
    for each in np.unique(kind):
        own = kind == each
        chance = present[:, own].mean(1)  # of any one of a prompt, if they were drawn
        expected[own] = chance.mean()
        # prompts are independent draws with chances of their own; rounding must not make a p of 1.0000001
        drawn = stats.poisson_binom(chance)
        tail = np.minimum(drawn.cdf(n_often[own]), drawn.sf(n_often[own] - 1)).clip(np.finfo(float).tiny)  # no p is 0
        p[own] = np.minimum(1, 2 * tail)
        for draw in range(n_null):
            order = generator.random((n, own.sum())).argsort(1)
            often[draw, own] = (order < present[:, own].sum(1)[:, None]).mean(0)
    null = often.var(1)
    made = DataFrame({
        "component": [*names], "often": n_often / n, "expected": expected, "p": p, "p_holm": holm(p),
    })  # fmt: skip
    return made, float(np.quantile(null, 0.95)) if n_null else np.nan


def _phases(prompts: Any, points: Any, draws: list[np.ndarray]) -> dict[str, Phases]:
    curves = np.stack([on_grid(*row) for row in zip(prompts["sizes"], prompts["faithfulness"], strict=True)])
    n_edges = float(prompts["n_edges"].median())
    usable = np.array(RELATIVE_SIZES) * n_edges >= shortest_path(prompts)  # what leads nowhere has no phase
    x = np.log10(np.array(RELATIVE_SIZES))[usable]
    found = {"circuits": phases_of(x, curves[:, usable], draws)}
    shape = (len(prompts), -1)
    random = _filled(points["random"].to_numpy(float).reshape(shape), points["size"].to_numpy(float).reshape(shape))
    known = np.isfinite(random).all(0) & usable
    if known.sum() > 5:
        found["random"] = phases_of(np.log10(np.array(RELATIVE_SIZES))[known], random[:, known], draws)
    return found


def shortest_path(prompts: Any) -> int:
    """Edges without which nothing leads from an embedding to the prediction: on the token graph one per sublayer."""
    return max(1, sum(name.startswith("r") for name in prompts.attrs["sweep"]["components"]))


def phases_of(
    x: Float[np.ndarray, " point"], curves: Float[np.ndarray, "prompt point"], draws: list[np.ndarray]
) -> Phases:
    """Whether the mean of curves breaks."""
    whole = segments(x, curves.mean(0), 2)
    breaks = [segments(x, curves[draw].mean(0), 2).breaks for draw in draws]
    low, high = interval([each[0] for each in breaks if each])
    between = np.concatenate([x[:1], (x[1:] + x[:-1]) / 2, x[-1:]])  # where one size of the grid gives way to the next
    pieces = segments(x, curves.mean(0), 3)
    return Phases(
        float(10 ** whole.breaks[0]) if whole.breaks else None,
        float(10 ** between[between <= low].max(initial=-np.inf)) if np.isfinite(low) else np.nan,
        float(10 ** between[between >= high].min(initial=np.inf)) if np.isfinite(high) else np.nan,
        bool(whole.breaks) and whole.breaks[0] in places_of(x)[[0, -1]],
        sum(map(bool, breaks)) / len(draws) if draws else np.nan,
        whole.slopes(x),
        whole.bic[0] - min(whole.bic),
        tuple(10**each for each in pieces.breaks),
        pieces.slopes(x),
    )
