"""Routes: how the information of a prediction flows through a circuit, from which tokens and through which heads."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tracedensity.graph import flatten, unflatten
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.score import Scores


@dataclass(frozen=True, eq=False)
class Flow:
    """How one unit of flow, sent back from the prediction, divides among the edges of a circuit.

    Attributes:
        graph: What the edges are.
        edges: For each kind of edge how much of the flow goes along it.
        origins: How much arrives at the embedding of each token. Less than 1 in all where the circuit has states that
            no edge of it enters: what arrives there comes from no token.
    """

    graph: TokenGraph
    edges: Mapping[str, Float[Tensor, "..."]]
    origins: Float[Tensor, " pos"]

    @property
    def heads(self) -> Float[Tensor, "layer head"]:
        """How much goes through each head."""
        return self.edges["head"].sum((-2, -1))

    @property
    def mlps(self) -> Float[Tensor, " layer"]:
        """How much goes through each layer's MLPs; empty where there are none."""
        for kind in ("mlp", "neuron"):
            if kind in self.edges:
                return self.edges[kind].flatten(1).sum(1)
        return self.origins.new_empty(0)


def trace_flow(circuit: Circuit, scores: Scores) -> Flow:
    """Divide the prediction among the edges that lead to it, state by state, back to the tokens.

    Each state of the stream hands what arrives at it down along its in-edges in the circuit, in proportion to their
    importance, negative ones nothing; skip connections that are kept whenever the circuit is run are among them. So
    importance that is local to a state, as contribution scores are, becomes a share of the whole. It says what the
    scores say: a route along which much is written need not matter, which only running the circuit without it can tell.

    Args:
        circuit: A circuit of a token graph.
        scores: Scores of its edges.

    Raises:
        ValueError: If the circuit is of another graph, or scores are not of its graph or not finite.

    References:
        Information Flow Routes (arXiv 2403.00824) traces the same edges back, without dividing; attention rollout
        (arXiv 2005.00928) divides, by attention weights.
    """
    if not isinstance(circuit, Circuit) or not isinstance(scores, Scores):
        given = f"a {type(circuit).__name__} and a {type(scores).__name__}"
        raise ValueError(f"`circuit` and `scores` must be a Circuit and Scores, got {given}.")
    graph = circuit.graph
    if not isinstance(graph, TokenGraph):
        raise ValueError(f"`circuit` must be one of a TokenGraph for this, got one of {type(graph).__name__}.")
    if scores.graph != graph:
        raise ValueError(f"`scores` must be of the circuit's graph, {graph}, got some of {scores.graph}.")
    importance = flatten(graph, scores.importance()).double()
    if not (finite := importance.isfinite()).all():
        raise ValueError(f"`scores` must be finite, got {int((~finite).sum())} NaN or infinite of {len(finite)}.")
    edges = graph.edges
    run = {  # what is there when the circuit is run
        kind: graph.exists[kind] if circuit.keep_residual and kind.startswith("resid") else mask
        for kind, mask in circuit.kept.items()
    }
    weight = importance.clamp(min=0) * flatten(graph, run)
    through = weight.new_zeros(edges.n_nodes)
    through[edges.output] = 1.0
    flow = torch.zeros_like(weight)
    for block in reversed(edges.blocks):
        source, target = edges.source[block], edges.target[block]
        total = through.new_zeros(edges.n_nodes).index_add_(0, target, weight[block])
        flow[block] = through[target] * (weight[block] / total[target]).nan_to_num(nan=0.0)  # 0 / 0: nothing enters
        through.index_add_(0, source, flow[block])
    return Flow(graph, unflatten(graph, flow, 0.0), through[: graph.n_pos])
