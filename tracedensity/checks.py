"""Checks of a circuit: is every edge needed, and is anything missing?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.activations import head_name, mlp_name
from tracedensity.graph import edge_at, flatten, unflatten
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.groups import by_head
from tracedensity.metric import Metric

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Completeness:
    """How alike circuit and model are when the same edges are knocked out of both.

    Attributes:
        size: Number of edges knocked out, per knockout.
        model: Faithfulness of the model without these edges.
        circuit: That of the circuit without them.
        complement: Faithfulness of the model without the whole circuit: near 0 if nothing else does its work.
    """

    size: Float[Tensor, " knockout"]
    model: Float[Tensor, " knockout"]
    circuit: Float[Tensor, " knockout"]
    complement: float

    @property
    def incompleteness(self) -> Float[Tensor, " knockout"]:
        """``|model - circuit|`` of each knockout: large where the model has another way that the circuit lacks."""
        return (self.model - self.circuit).abs()

    def __repr__(self) -> str:
        worst = float(self.incompleteness.max()) if len(self.size) else 0.0
        return (
            f"Completeness({len(self.size)} knockouts, largest difference {worst:.3f}, "
            f"faithfulness of the complement {self.complement:.3f})"
        )


def minimality(
    model: object,
    circuit: Circuit,
    *,
    by: Literal["edge", "node", "token"] | str = "edge",
    metric: Metric | None = None,
) -> "pd.DataFrame":
    """What each edge of a circuit, each head and MLP, or each token is worth: how much less faithful it is without it.

    One run each, in batches.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit; it is run on its own prompt or task.
        by: ``"edge"``. ``"node"``: all edges of a head or MLP at once; on the component graph those that it writes.
            ``"token"``, on the token graph: all edges that read the embedding of a token.
        metric: The function that measures it, where it was measured by one of the user's own.

    Returns:
        One row per edge, least needed first: `edge` (or `node`, or `token`, its position, with its `size` in edges),
        `loss` (faithfulness of the circuit minus that without it; the circuit is minimal to this extent if all are
        positive), `faithfulness` without it.

    Raises:
        ValueError: If `model` is not the one that the circuit was found in, or `by` or the metric is not known.

    References:
        Wang et al.: Interpretability in the Wild (arXiv 2211.00593), section on minimality.
    """
    import pandas as pd

    flat = flatten(circuit.graph, circuit.kept)
    edges = flat.nonzero()[:, 0]
    if by == "edge":
        units = {edge_at(circuit.graph, int(edge))[1]: edge[None] for edge in edges}
    elif by == "node":
        units = _of_nodes(circuit, edges)
    elif by == "token":
        units = _of_embeddings(circuit, edges)
    else:
        raise ValueError(f"`by` must be 'edge', 'node' or 'token', got {by!r}.")
    reached = _faithfulness(model, [circuit, *(_without(circuit, flat, unit) for unit in units.values())], metric)
    table = pd.DataFrame({
        by: pd.Series(list(units), dtype=object),  # of an empty table as well
        **({"size": [len(unit) for unit in units.values()]} if by != "edge" else {}),
        "loss": (reached[0] - reached[1:]).tolist(),
        "faithfulness": reached[1:].tolist(),
    })  # fmt: skip
    return table.sort_values("loss", kind="stable", ignore_index=True)


def _of_embeddings(circuit: Circuit, edges: Int[Tensor, " edge"]) -> dict[int, Int[Tensor, " some"]]:
    """The edges that leave the embedding of each token that is read."""
    graph = circuit.graph
    if not isinstance(graph, TokenGraph):
        raise ValueError(
            f"`by` must be 'edge' or 'node' but on the token graph, got 'token' on {type(graph).__name__}."
        )
    source = graph.edges.source[edges]  # nodes are numbered upwards from the embeddings
    return {token: edges[source == token] for token in range(graph.n_pos) if (source == token).any()}


def _of_nodes(circuit: Circuit, edges: Int[Tensor, " edge"]) -> dict[str, Int[Tensor, " some"]]:
    """The edges of each head and MLP that has any."""
    groups = by_head(circuit.graph)
    cells = flatten(circuit.graph, groups.cell)[edges]
    names = [
        mlp_name(layer) if column == "MLP" else head_name(layer, int(column[1:]))
        for layer in range(len(groups.rows))
        for column in groups.columns
    ]
    return {names[cell]: edges[cells == cell] for cell in cells.unique().tolist() if cell >= 0}


def completeness(
    model: object, circuit: Circuit, *, n_knockouts: int = 20, seed: int = 0, metric: Metric | None = None
) -> Completeness:
    """Whether the circuit does what the model does when edges of the circuit are knocked out of both.

    Half of the knockouts take 10% of the circuit's edges, half take 50%, drawn at random.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit; it is run on its own prompt or task.
        n_knockouts: How many sets of edges to knock out.
        seed: For the drawn sets.
        metric: The function that measures the circuit, where it was measured by one of the user's own.

    Raises:
        ValueError: If `model` is not the one that the circuit was found in, or the metric is not known.

    References:
        Wang et al.: Interpretability in the Wild (arXiv 2211.00593), section on completeness.
    """
    if n_knockouts < 0:
        raise ValueError(f"`n_knockouts` must be at least 0, got {n_knockouts}.")
    generator = torch.Generator().manual_seed(seed)
    flat = flatten(circuit.graph, circuit.kept)
    edges = flat.nonzero()[:, 0]
    sets = [
        edges[torch.randperm(len(edges), generator=generator)[: -(-len(edges) // (10, 2)[number % 2])]]
        for number in range(n_knockouts)
    ]
    everything = torch.ones_like(flat)
    candidates = [_without(circuit, everything, chosen) for chosen in sets]
    candidates += [_without(circuit, flat, chosen) for chosen in sets]
    candidates.append(_without(circuit, everything, edges))
    reached = _faithfulness(model, candidates, metric)
    sizes = torch.tensor([float(len(chosen)) for chosen in sets])
    return Completeness(sizes, reached[:n_knockouts], reached[n_knockouts:-1], float(reached[-1]))


def _faithfulness(model: object, circuits: list[Circuit], metric: Metric | None) -> Float[Tensor, " circuit"]:
    return circuits[0].rerun(model, metric, circuits).faithfulness().double()


def _without(circuit: Circuit, flat: Tensor, edges: Tensor) -> Circuit:
    kept = flat.clone()
    kept[edges] = False
    masks: Mapping[str, Tensor] = unflatten(circuit.graph, kept, False)
    return circuit.of_edges(masks)
