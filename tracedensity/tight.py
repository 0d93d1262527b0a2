"""Tight curves: the most faithful circuits known at each size, however they were found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from tracedensity.curve import DensityCurve, percent, plain
from tracedensity.graph.circuit import Circuit

_ROUNDING = 1e-6
"""What one circuit is found to be more or less faithful by, run among others."""


@dataclass(frozen=True, eq=False, repr=False)
class TightCurve(DensityCurve):
    """The upper envelope of all that was run for a prediction: no circuit on it is beaten by a smaller one.

    Each point is a circuit that was run; faithfulness grows with size by construction, so that the first circuit that
    reaches a threshold is also where the curve stays above it. Edges that the conditions keep anyhow are counted in no
    size, neither here nor in `published`: in the order of a ranking they come last.

    What `DensityCurve` says of a ranking and of baselines is said here of the published estimator's.

    Attributes:
        published: The plain curve of one ranking, as `td.density` makes it without further options.
        families: Curves of other rankings.
        refined: Circuits that are no ranking's: found by search, or the best of all that there are.
    """

    published: DensityCurve = field(kw_only=True)
    families: tuple[DensityCurve, ...] = ()
    refined: tuple[Circuit, ...] = ()

    @classmethod
    def of(cls, published: DensityCurve, families: Sequence[DensityCurve], refined: Sequence[Circuit]) -> "TightCurve":
        """The envelope of curves and circuits."""
        sizes = torch.cat([curve.sizes for curve in (published, *families)])
        heights = torch.cat([curve.faithfulness.double() for curve in (published, *families)])
        if refined:
            sizes = torch.cat([sizes, torch.tensor([circuit.n_edges for circuit in refined])])
            heights = torch.cat(
                [heights, torch.tensor([_reached(circuit) for circuit in refined], dtype=heights.dtype)]
            )
        order = torch.from_numpy(np.lexsort((-heights.numpy(), sizes.numpy())))
        sizes, heights = sizes[order], heights[order]
        best = torch.ones_like(sizes, dtype=torch.bool)
        best[1:] = heights[1:] > heights.cummax(0).values[:-1]
        if not (best & (sizes == published.n_edges)).any():  # the whole graph is on the curve, rounding or not
            best[int((sizes == published.n_edges).nonzero()[0])] = True
        sizes, heights = sizes[best], heights[best].cummax(0).values
        shared = {each.name: getattr(published, each.name) for each in fields(DensityCurve)}
        shared |= {"sizes": sizes, "faithfulness": heights, "values": None, "pruned_sizes": None, "also": {}}
        return cls(**shared, published=published, families=tuple(families), refined=tuple(refined))

    _is_envelope = True

    @property
    def passes(self) -> int:
        """What searching has cost, in plain forward passes; 0 if there was no search."""
        known = [circuit for circuit in self.refined if circuit.certificate is not None]
        together = [circuit for circuit in known if circuit.provenance.method == "exhaustive"][:1]  # one run of all
        alone = [circuit for circuit in known if circuit.provenance.method != "exhaustive"]
        return sum(circuit.certificate.passes for circuit in (*alone, *together) if circuit.certificate)

    def circuit(
        self, *, faithfulness: float | int | None = None, size: SupportsIndex | None = None, stable: bool = False
    ) -> Circuit:
        """The smallest circuit that is faithful enough, or the most faithful one of at most so many edges.

        Args:
            faithfulness: What it has to reach, as for `minimal_size`.
            size: Or the most edges that it may have.
            stable: Of no account here, where no larger circuit is less faithful.

        Raises:
            ValueError: If not exactly one of `faithfulness` and `size` is given, or it is out of range.
        """
        if (faithfulness is None) == (size is None):
            raise ValueError("give one of `faithfulness` and `size`, for example `curve.circuit(faithfulness=0.9)`.")
        if size is None:
            assert faithfulness is not None
            size = self.minimal_size(faithfulness)
        size = index(size)
        if not self.sizes[0] <= size <= self.n_edges:
            raise ValueError(
                f"`size` must be a number of edges from {int(self.sizes[0])} to {self.n_edges}, got {size}."
            )
        point = int(torch.searchsorted(self.sizes, size, right=True)) - 1
        size, height = int(self.sizes[point]), float(self.faithfulness[point])
        for circuit in self.refined:
            if circuit.n_edges == size and _reached(circuit) >= height - _ROUNDING:
                return circuit
        holders = [curve for curve in (self.published, *self.families) if size in curve.sizes.tolist()]
        best = max(holders, key=lambda curve: float(curve.faithfulness[curve.sizes.tolist().index(size)]))
        return best.circuit(size=size)

    def _area(self, sizes: Tensor, relative: Tensor) -> float:
        point = (torch.searchsorted(self.sizes, sizes, right=True) - 1).clamp(min=0)
        lost = 1 - self.faithfulness[point]
        return float(torch.trapezoid(lost.double(), relative.double().log10()))

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for row in super().rows():
            circuit = self.circuit(faithfulness=row["threshold"])
            known = circuit.certificate
            rows.append({
                **row,
                "published_size": self.published.minimal_size(row["threshold"]),
                "method": circuit.provenance.method if known is None else "refined",
                "one_minimal": known is not None and known.one_minimal,
                "minimum": known is not None and known.minimum,
            })  # fmt: skip
        return rows

    def __repr__(self) -> str:
        lines = [f"TightCurve: {self.provenance}", self._about, self.summary(), self._spark_text(), ""]
        robust = "" if self.robust is None else f"{'robust':>10}"
        lines.append(
            f"{'faithfulness':>12}{'minimal circuit':>18}{'share':>9}{'published':>12}{'times':>8}{robust}  known"
        )
        for row in self.rows():
            size, published = row["size"], row["published_size"]
            robust = f"{row['robust_size']:>10,}" if "robust_size" in row else ""
            lines.append(
                f"{plain(row['threshold']):>12}{size:>12,} edges{percent(row['fraction']):>9}{published:>12,}"
                f"{max(published, 1) / max(size, 1):>8.1f}{robust}  {_known(row)}"
            )
        return "\n".join([*lines, *([""] * (self.robust is not None)), *self._robust_lines()])

    def _columns(self) -> dict[str, Callable[[dict[str, Any]], str]]:
        columns = super()._columns()
        del columns["stable from (edges)"]
        robust = {name: columns.pop(name) for name in [*columns] if name.startswith("robust")}
        own = {"published (edges)": lambda row: f"{row['published_size']:,}", "known": _known}
        return {**columns, **own, **robust}

    def _certificates(self) -> dict[str, Any]:
        known = {plain(each): self.circuit(faithfulness=each).certificate for each in self.thresholds}
        return {"certificate": {each: None if about is None else about.to_dict() for each, about in known.items()}}

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the curve, without circuits, as what JSON can hold."""
        return {
            **super().to_dict(),
            "passes": self.passes,
            "baseline_minimal_size": {plain(each): self.published.minimal_size(each) for each in self.thresholds},
            **self._certificates(),
            "published": self.published.to_dict(),
        }


def _reached(circuit: Circuit) -> float:
    """Faithfulness, the least one where there were several situations."""
    known = circuit.certificate
    reached = circuit.faithfulness if known is None or known.worst is None else known.worst
    assert reached is not None
    return reached


def _known(row: Mapping[str, Any]) -> str:
    """How a circuit was found, and what is known of it."""
    if row["minimum"]:
        return "nothing is smaller"
    if row["one_minimal"]:
        return "no edge can go by itself"
    return row["method"] if row["method"] == "refined" else f"by {row['method']}"
