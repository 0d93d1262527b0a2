"""Statistics: rank correlations of rows that come in documents and in strata, with intervals and p values."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from tracedensity.extras import extra

Column = Float[np.ndarray, " row"]
"""One number per row; NaN where it is not known."""

LEVEL = 0.95
"""Of all intervals."""

_AT_ONCE = 2**23
"""Numbers that are drawn and sorted together."""


@dataclass(frozen=True)
class Estimate:
    """A rank correlation.

    Attributes:
        rho: The correlation; NaN where one of the two is the same in all rows.
        low: Lower end of the percentile interval of `LEVEL`.
        high: Its upper end.
        p: Of a correlation at least so large, of either sign, where there is none.
        n: Rows that it was made of.
    """

    rho: float
    low: float
    high: float
    p: float
    n: int


@dataclass(frozen=True)
class Pair:
    """Two columns whose correlation is asked for.

    Attributes:
        x: Name of one.
        y: Name of the other.
        controls: Names of what is held fixed.
        within: Name of the strata in which rows are exchanged. What strata are made of needs others, in which it does
            not stay what it is.
    """

    x: str
    y: str
    controls: tuple[str, ...] = ()
    within: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.x, self.y, *self.controls)


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows of a table, and how they hang together.

    Attributes:
        document: What each row was taken from. Intervals resample these, not rows: those of one are alike.
        strata: By name. Rows are exchanged only within these where there should be no correlation, so that what strata
            differ in cannot make one up. Those named by nothing are for pairs that name none.
        n_bootstrap: How often documents are resampled.
        n_permutations: How often rows are exchanged.
        seed: For both.
    """

    document: Int[np.ndarray, " row"]
    strata: Mapping[str, Int[np.ndarray, " row"]]
    n_bootstrap: int = 2000
    n_permutations: int = 10_000
    seed: int = 0

    def correlations(self, columns: Mapping[str, Column], pairs: Sequence[Pair]) -> list[Estimate]:
        """Spearman's correlations; given controls, those of the ranks with what the controls' ranks explain taken out.

        Args:
            columns: The numbers, by name.
            pairs: What is asked for, each from the rows in which all its columns are known. Controls that are the same
                in all rows are left out.

        Returns:
            The estimates. p is by exchange of y, or of its residual, within strata, controls being taken out of it anew
            (Freedman and Lane): ``(1 + #{|rho'| >= |rho|}) / (1 + n_permutations)``.
        """
        found: dict[int, Estimate] = {}
        alike: dict[tuple[bytes, str], list[int]] = {}  # pairs known in the same rows share all that is drawn
        for number, pair in enumerate(pairs):
            known = np.isfinite(np.stack([columns[name] for name in pair.names])).all(0)
            alike.setdefault((known.tobytes(), pair.within), []).append(number)
        for (mask, _), numbers in alike.items():
            known = np.frombuffer(mask, dtype=bool)
            some = [pairs[number] for number in numbers]
            found |= dict(zip(numbers, self._estimated(columns, some, known), strict=True))
        return [found[number] for number in range(len(pairs))]

    def _estimated(
        self, columns: Mapping[str, Column], pairs: Sequence[Pair], known: Bool[np.ndarray, " row"]
    ) -> list[Estimate]:
        place = {
            name: number for number, name in enumerate(dict.fromkeys(name for pair in pairs for name in pair.names))
        }
        values = np.stack([columns[name][known] for name in place], axis=1)
        n = len(values)
        if n < 3:
            return [Estimate(np.nan, np.nan, np.nan, np.nan, n)] * len(pairs)
        wanted = [[place[name] for name in pair.names] for pair in pairs]
        matrix = rank_correlations(values)
        rho = np.array([partial(matrix[None], *each)[0] for each in wanted])
        draws = [*resampled(self.document[known], self.n_bootstrap, self.seed)]
        again = np.array([rank_correlations(values[rows]) for rows in draws]).reshape(-1, *matrix.shape)
        p = self._p(ranks(values), wanted, rho, self.strata[pairs[0].within][known])
        return [
            Estimate(float(rho[number]), *interval(partial(again, *each)), float(p[number]), n)
            for number, each in enumerate(wanted)
        ]

    def _p(
        self,
        ranked: Float[np.ndarray, "row column"],
        wanted: Sequence[Sequence[int]],
        rho: Float[np.ndarray, " pair"],
        stratum: Int[np.ndarray, " row"],
    ) -> Float[np.ndarray, " pair"]:
        if not self.n_permutations:
            return np.full(len(rho), np.nan)
        left = [residuals(ranked[:, each[:2]], ranked[:, each[2:]]) for each in wanted]
        left = [each / np.maximum(np.linalg.norm(each, axis=0), 1e-300) for each in left]
        explained = [directions(ranked[:, each[2:]]) for each in wanted]
        n_as_large = np.zeros(len(rho))
        for order in exchanged(stratum, self.n_permutations, self.seed):
            for number, (each, controls) in enumerate(zip(left, explained, strict=True)):
                again = each[:, 1][order]
                # what controls explain of an exchanged y has no part in x's residual, but in the length of y's
                length = np.sqrt(np.maximum(1 - np.square(again @ controls).sum(1), 0.0))
                n_as_large[number] += (np.abs(again @ each[:, 0]) >= (abs(rho[number]) - 1e-12) * length).sum()
        return np.where(np.isfinite(rho), (1 + n_as_large) / (1 + self.n_permutations), np.nan)


def require_draws(**numbers: int) -> None:
    """Raise a ValueError if something is to be drawn less than never."""
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"`{name}` must be at least 0, got {number}.")


def p_of_signs(by_document: Column, n: int, generator: np.random.Generator) -> float:
    """P of a sum over documents so far from zero, by turning the signs of documents, `n` times; NaN of no number."""
    total = by_document.sum()
    if not (np.isfinite(total) and n):
        return np.nan
    as_large, at_once = 0, max(1, _AT_ONCE // len(by_document))
    for start in range(0, n, at_once):
        signs = generator.choice([-1.0, 1.0], size=(min(at_once, n - start), len(by_document)))
        as_large += int((np.abs(signs @ by_document) >= abs(total) - 1e-12).sum())
    return (1 + as_large) / (1 + n)


def interval(values: Sequence[float] | Float[np.ndarray, " draw"]) -> tuple[float, float]:
    """Percentile interval of what a bootstrap gives; unknown where it gives nothing."""
    known, tail = np.asarray(values, float), (1 - LEVEL) / 2
    known = known[np.isfinite(known)]
    low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def resampled(document: Int[np.ndarray, " row"], n: int, seed: int) -> Iterator[Int[np.ndarray, " some"]]:
    """Rows of as many documents as there are, drawn with replacement, `n` times; never where there is one document.

    One says nothing of others.
    """
    generator = np.random.default_rng(seed)
    order = np.argsort(document, kind="stable")
    starts = np.flatnonzero(np.diff(document[order], prepend=document[order][:1] - 1))
    rows = np.split(order, starts[1:])
    for _ in range(n if len(rows) > 1 else 0):
        yield np.concatenate([rows[number] for number in generator.integers(len(rows), size=len(rows))])


def exchanged(stratum: Int[np.ndarray, " row"], n: int, seed: int) -> Iterator[Int[np.ndarray, "draw row"]]:
    """Orders of rows in which each stays in its stratum, some of the `n` at a time."""
    generator = np.random.default_rng(seed)
    place = np.argsort(stratum, kind="stable")
    sorted_stratum = np.unique(stratum[place], return_inverse=True)[1]
    at_once = max(1, _AT_ONCE // max(1, len(stratum)))
    for start in range(0, n, at_once):
        draws = generator.random((min(at_once, n - start), len(stratum)))
        within = np.argsort(draws + sorted_stratum, axis=1)  # strata stay apart: draws are below 1
        order = np.empty_like(within)
        order[:, place] = place[within]
        yield order


def ranks(columns: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row column"]:
    """Ranks of each column, those of equals their mean, centred."""
    stats = extra("scipy.stats", "study", "statistics")
    found = stats.rankdata(columns, axis=0)
    return found - found.mean(0)


def rank_correlations(columns: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "column column"]:
    """Spearman's correlations of all pairs; NaN for columns that are the same in all rows."""
    ranked = ranks(columns)
    length = np.linalg.norm(ranked, axis=0)
    ranked = ranked / np.where(length > 0, length, np.nan)
    return ranked.T @ ranked


def partial(
    matrix: Float[np.ndarray, "draw column column"], x: int, y: int, *controls: int
) -> Float[np.ndarray, " draw"]:
    """Correlations of two columns given others, from those of all pairs; NaN where controls leave nothing of one."""
    both, given = [x, y], list(controls)
    covariance = matrix[..., both, :][..., both]
    if given:
        among = matrix[..., given, :][..., given]
        constant = ~np.isfinite(among.diagonal(axis1=-2, axis2=-1))  # such a control explains nothing
        among = np.where(constant[..., :, None] | constant[..., None, :], 0.0, among)
        across = np.where(constant[..., None, :], 0.0, matrix[..., both, :][..., given])
        inverse = np.linalg.pinv(np.nan_to_num(among), rcond=1e-10, hermitian=True)
        covariance = covariance - across @ inverse @ np.swapaxes(across, -1, -2)
    variance = covariance.diagonal(axis1=-2, axis2=-1)
    # what a control explains whole leaves rounding behind, which correlates with anything
    scale = np.where((variance > 1e-9).all(-1), np.sqrt(np.abs(variance.prod(-1))), np.nan)
    return covariance[..., 0, 1] / scale


def residuals(
    of: Float[np.ndarray, "row column"], controls: Float[np.ndarray, "row control"]
) -> Float[np.ndarray, "row column"]:
    """What a regression on centred controls leaves of centred columns."""
    if not controls.shape[1]:
        return of
    return of - controls @ np.linalg.lstsq(controls, of, rcond=None)[0]


def directions(columns: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row direction"]:
    """An orthonormal basis of what columns span."""
    found, length, _ = np.linalg.svd(columns, full_matrices=False)
    return found[:, length > 1e-10 * max(length.max(initial=0.0), 1e-300)]


def strata_of(
    length: Float[np.ndarray, " row"], least: int = 20, domain: Int[np.ndarray, " row"] | None = None
) -> Int[np.ndarray, " row"]:
    """Strata of rows of equal length, or, where there are few of one, of neighbouring lengths.

    Args:
        length: Of each row.
        least: Rows of a stratum, if there are so many.
        domain: What kind of text each row is; rows of different kinds are in different strata.
    """
    if domain is not None:
        found = np.zeros(len(length), dtype=np.int64)
        for each in np.unique(domain):
            found[domain == each] = strata_of(length[domain == each], least) + found.max() + 1
        return codes(found)
    lengths, which, counts = np.unique(length, return_inverse=True, return_counts=True)
    stratum = np.empty(len(lengths), dtype=np.int64)
    current, held = 0, 0
    for number, count in enumerate(counts):
        stratum[number] = current
        held += count
        if held >= least:
            current, held = current + 1, 0
    if held and current:  # too few are left for one of their own
        stratum[stratum == current] = current - 1
    return stratum[which]


def holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Correct p values for the number of tests, by Holm's method; NaN are no tests."""
    order = np.argsort(p)[: int(np.isfinite(p).sum())]  # NaN come last
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return corrected


def codes(values: Sequence[object] | np.ndarray) -> Int[np.ndarray, " row"]:
    """A number for each distinct value."""
    return np.unique(np.asarray(values, dtype=str), return_inverse=True)[1].astype(np.int64)
