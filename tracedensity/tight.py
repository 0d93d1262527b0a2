"""Tight curves: the most faithful circuits known at each size, however they were found."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import index
from os import PathLike
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from tracedensity.curve import DensityCurve, plain
from tracedensity.graph.circuit import Circuit


@dataclass(frozen=True, eq=False, repr=False)
class TightCurve(DensityCurve):
    """The upper envelope of all that was run for a prediction: no circuit on it is beaten by a smaller one.

    Each point is a circuit that was run; faithfulness grows with size by construction, so that the first circuit that
    reaches a threshold is also where the curve stays above it.

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
            found = [circuit.faithfulness for circuit in refined if circuit.faithfulness is not None]
            heights = torch.cat([heights, torch.tensor(found, dtype=heights.dtype)])
        order = torch.from_numpy(np.lexsort((-heights.numpy(), sizes.numpy())))
        sizes, heights = sizes[order], heights[order]
        best = torch.ones_like(sizes, dtype=torch.bool)
        best[1:] = heights[1:] > heights.cummax(0).values[:-1]
        if not (best & (sizes == published.n_edges)).any():  # the whole graph is on the curve, rounding or not
            best[int((sizes == published.n_edges).nonzero()[0])] = True
        sizes, heights = sizes[best], heights[best].cummax(0).values
        shared = {each.name: getattr(published, each.name) for each in fields(DensityCurve)}
        shared |= {"sizes": sizes, "faithfulness": heights, "values": None, "pruned_sizes": None}
        return cls(**shared, published=published, families=tuple(families), refined=tuple(refined))

    @property
    def passes(self) -> int:
        """What searching has cost, in plain forward passes; 0 if there was no search."""
        return sum(circuit.certificate.passes for circuit in self.refined if circuit.certificate is not None)

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
            if circuit.n_edges == size and circuit.faithfulness == height:
                return circuit
        curves = (self.published, *self.families)
        holders = [curve for curve in curves if size in curve.sizes.tolist()]
        return max((curve.circuit(size=size) for curve in holders), key=lambda circuit: circuit.faithfulness or 0.0)

    def _area(self, sizes: Tensor, relative: Tensor) -> float:
        point = (torch.searchsorted(self.sizes, sizes, right=True) - 1).clamp(min=0)
        lost = 1 - self.faithfulness[point]
        return float(torch.trapezoid(lost.double(), relative.double().log10()))

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for row in super()._rows():
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
        lines = [f"TightCurve: {self.provenance}", self._about, self.summary(), ""]
        lines.append(f"{'faithfulness':>12}{'minimal circuit':>18}{'share':>9}{'published':>12}{'times':>8}  known")
        for row in self._rows():
            size, published = row["size"], row["published_size"]
            lines.append(
                f"{plain(row['threshold']):>12}{size:>12,} edges{row['fraction']:>9.2%}{published:>12,}"
                f"{published / max(size, 1):>8.1f}  {_known(row)}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        columns = ("faithfulness", "minimal circuit (edges)", "share of all edges", "published (edges)", "known")
        rows = "".join(
            f"<tr><td>{plain(row['threshold'])}</td><td>{row['size']:,}</td><td>{row['fraction']:.2%}</td>"
            f"<td>{row['published_size']:,}</td><td>{_known(row)}</td></tr>"
            for row in self._rows()
        )
        return (
            f"<p><b>TightCurve</b> {html.escape(str(self.provenance))}<br>"
            f"<code>{html.escape(self._about)}</code><br>{html.escape(self.summary())}</p>"
            f"<table><thead><tr>{''.join(f'<th>{column}</th>' for column in columns)}</tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write to one safetensors file, all curves and circuits included; `td.load` reads it."""
        from tracedensity.files import save_tight_curve

        save_tight_curve(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the curve, without circuits, as what JSON can hold."""
        at = {plain(each): self.circuit(faithfulness=each) for each in self.thresholds}
        return {
            **super().to_dict(),
            "passes": self.passes,
            "baseline_minimal_size": {plain(each): self.published.minimal_size(each) for each in self.thresholds},
            "certificate": {
                threshold: None if circuit.certificate is None else circuit.certificate.to_dict()
                for threshold, circuit in at.items()
            },
            "published": self.published.to_dict(),
        }


def _known(row: Mapping[str, Any]) -> str:
    """How a circuit was found, and what is known of it."""
    if row["minimum"]:
        return "nothing is smaller"
    if row["one_minimal"]:
        return "no edge can go by itself"
    return row["method"] if row["method"] == "refined" else f"by {row['method']}"
