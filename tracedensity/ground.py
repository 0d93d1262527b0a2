"""Grounds: where circuits are tried, as masks of edges, and what comes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracedensity.gauge import Gauge
from tracedensity.graph import Graph, flatten, unflatten
from tracedensity.run import Conditions, run_masks, run_shares
from tracedensity.setting import Setting

Mask = Bool[Tensor, " edge"]
"""Edges in canonical order."""


@dataclass(frozen=True, eq=False)
class Ground:
    """Where circuits are tried: a prompt or task with what replaces absent edges, and a gauge.

    Attributes:
        graph: What the edges are.
        conditions: How circuits are run.
        gauge: How they are measured.
        batch_size: Circuits per forward pass.
        places: Where the edges of the graph that circuits are of stand among those of this one; None if they are the
            same. What has no such place is kept in all circuits.
        name: What to call it.
    """

    graph: Graph
    conditions: Conditions
    gauge: Gauge
    batch_size: int | None = None
    places: Int[Tensor, " edge"] | None = None
    name: str = ""

    @property
    def setting(self) -> Setting:
        return self.gauge.setting

    @property
    def price(self) -> int:
        """Passes that a run of one circuit takes: one, unless its prompts are run several times with drawn tokens."""
        task = self.setting.task
        return len(self.setting.prompts) // (1 if task is None else len(task))

    @cached_property
    def free(self) -> Mask:
        """Edges that can be taken away: the conditions do not keep them anyhow."""
        return ~self._of_kinds(self.conditions.keeps_all)

    @cached_property
    def skips(self) -> Mask:
        """Those of them that are skip connections."""
        return self._of_kinds(lambda kind: kind.startswith("resid")) & self.free

    def _of_kinds(self, chosen: Callable[[str], bool]) -> Mask:
        shapes = self.graph.shapes
        return flatten(self.graph, {kind: torch.tensor(chosen(kind)).expand(shape) for kind, shape in shapes.items()})

    def tried(self, kept: Bool[Tensor, "circuit edge"]) -> "Trial":
        """Circuits, run."""
        kept = self._moved(kept)
        values = run_masks(
            self.setting, self.graph, unflatten(self.graph, kept, False), self.conditions, self.gauge.with_loss,
            self.batch_size,
        )  # fmt: skip
        return Trial(self.gauge.faithfulness(values[""].cpu()), values["loss"].double().mean(1).cpu())

    def slopes(self, kept: Mask) -> Float[Tensor, " edge"]:
        """How the loss changes with the share of each edge that is kept, at a circuit."""
        shares = self._moved(kept[None]).to(self.setting.model.full_dtype)
        _, slopes = run_shares(
            self.setting, self.graph, unflatten(self.graph, shares, 0.0), self.conditions, self.gauge.with_loss
        )
        flat = flatten(self.graph, {kind: value[0] for kind, value in slopes.items()}).double()
        return flat if self.places is None else flat[self.places]

    def _moved(self, kept: Bool[Tensor, "circuit edge"]) -> Bool[Tensor, "circuit other_edge"]:
        if self.places is None:
            return kept
        moved = torch.ones(len(kept), self.graph.n_edges, dtype=torch.bool)
        moved[:, self.places] = kept
        return moved


@dataclass(frozen=True, eq=False)
class Trial:
    """What circuits did on the ground where they did worst.

    Attributes:
        faithfulness: The least one.
        loss: What falls as faithfulness rises; summed over grounds.
    """

    faithfulness: Float[Tensor, " circuit"]
    loss: Float[Tensor, " circuit"]

    def and_also(self, other: "Trial") -> "Trial":
        """The same circuits on another ground as well."""
        return Trial(torch.minimum(self.faithfulness, other.faithfulness), self.loss + other.loss)
