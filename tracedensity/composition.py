"""Composition: what circuits of each size are made of, part by part and layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log10

import torch
from jaxtyping import Int
from torch import Tensor

from tracedensity.curve import DensityCurve
from tracedensity.evaluation import Sizes, as_sizes
from tracedensity.extract import Ranking
from tracedensity.groups import Groups, by_part
from tracedensity.provenance import Provenance
from tracedensity.tight import TightCurve

N_SIZES = 200
"""At most how many circuits of a ranking are looked at if no sizes are given."""


@dataclass(frozen=True, eq=False)
class Composition:
    """How many edges of each layer and part are in the circuits of one family.

    On the token graph the parts are heads, MLPs and skip connections, and the layer of an edge is that of its sublayer.
    On the component graph the part is that of the writer (embedding, heads, MLPs), and the layer that of the reader;
    edges into the logits count for the last layer. See `tracedensity.groups.by_part`.

    Attributes:
        sizes: Numbers of edges of the circuits, strictly increasing, at least 1; the last one is the whole graph.
        counts: Numbers of edges of each circuit in each layer and part.
        parts: Names of the parts.
        family: In what order edges enter; "tight" for the best circuits known, which are not nested.
        provenance: What the circuits were chosen for.
    """

    sizes: Int[Tensor, " point"]
    counts: Int[Tensor, "point layer part"]
    parts: tuple[str, ...]
    family: str
    provenance: Provenance

    @property
    def by_part(self) -> dict[str, Int[Tensor, " point"]]:
        """Numbers of edges of each part."""
        return dict(zip(self.parts, self.counts.sum(1).unbind(1), strict=True))

    @property
    def by_quarter(self) -> Int[Tensor, "point quarter"]:
        """Numbers of edges of each quarter of the layers, see `quarters`."""
        per_layer = self.counts.sum(2)
        return torch.stack([per_layer[:, quarter.start : quarter.stop].sum(1) for quarter in self.quarters], dim=1)

    @property
    def quarters(self) -> tuple[range, ...]:
        """The layers, lowest first, in four groups as equal as may be; in as many as there are layers if these are
        fewer.
        """
        n_layers = self.counts.shape[1]
        n_quarters = min(4, n_layers)
        bounds = [place * n_layers // n_quarters for place in range(n_quarters + 1)]
        return tuple(map(range, bounds[:-1], bounds[1:]))


def composition(circuits: DensityCurve | Ranking, sizes: Sizes | None = None) -> Composition:
    """What circuits of each size are made of.

    Args:
        circuits: A family of circuits. Of a tight curve those that are on it are looked at, of other curves those of
            its ranking. Edges that the conditions keep anyhow come last on a tight curve, as they do in its sizes.
        sizes: Numbers of edges; by default those of the curve, or of a ranking some from 1 up to all at equal ratios.
            The whole graph is always added. On a tight curve the size of the circuit that is known for each of these.

    Raises:
        ValueError: If a size is not from 1 to all edges.
    """
    ranking = circuits.ranking if isinstance(circuits, DensityCurve) else circuits
    if sizes is None:
        equal_ratios = torch.logspace(0, log10(ranking.n_edges), N_SIZES, dtype=torch.float64).long()
        known = circuits.sizes.cpu() if isinstance(circuits, DensityCurve) else equal_ratios
        sizes = known[known > 0]
    asked = as_sizes(sizes, ranking.n_edges)
    if (asked == 0).any():
        raise ValueError("`sizes` must be at least 1, got 0: a circuit without edges is made of nothing.")
    asked = torch.cat([asked, torch.tensor([ranking.n_edges])]).unique()
    groups = by_part(ranking.graph)
    if isinstance(circuits, TightCurve):
        counts, family = _counts_on(circuits, asked, groups), "tight"
    else:
        counts, family = counts_in(ranking.rank, asked, groups), ranking.family
    return Composition(counts.sum((1, 2)), counts, groups.columns, family, ranking.provenance)


def _counts_on(curve: TightCurve, sizes: Int[Tensor, " point"], groups: Groups) -> Int[Tensor, "circuit layer part"]:
    """Counts of the circuits that are best at some sizes, each circuit once."""
    counts = torch.stack([groups.total(curve.circuit(size=size).kept) for size in sizes.tolist()])
    counts = counts.nan_to_num().long()  # there may be layers without edges of a part
    return counts[counts.sum((1, 2)).diff(prepend=torch.zeros(1)) > 0]


def counts_in(
    rank: Mapping[str, Int[Tensor, "..."]], sizes: Int[Tensor, " point"], groups: Groups
) -> Int[Tensor, "point layer part"]:
    """Counts of nested circuits, of all sizes at once."""
    shape = (len(sizes), len(groups.rows), len(groups.columns))
    n_cells = shape[1] * shape[2]
    place = groups.laid_out(rank).long()
    point = torch.searchsorted(sizes, torch.arange(len(place)), right=True)[place]  # the first whose size is above it
    entering = (point * n_cells + groups.of_edges).bincount(minlength=len(sizes) * n_cells)
    return entering.view(shape).cumsum(0)
