"""Rankings: the order in which edges enter, which is a nested family of circuits."""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import index
from typing import TYPE_CHECKING, SupportsIndex, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracedensity.choices import Family
from tracedensity.graph import EdgeList, Graph, flatten, pruned, unflatten
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.provenance import Provenance

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracedensity.plot import Theme


@dataclass(frozen=True, eq=False)
class Ranking:
    """The order in which the edges of a graph enter; the circuit of size k is ``rank < k``.

    Attributes:
        graph: What the edges are.
        rank: For each kind of edge its place, 0 first; -1 where there is no edge.
        family: How the order was made from scores.
        provenance: What was ranked: model, prompt, scores.
        natural_sizes: Where a family is defined by a cut-off ("threshold", "nucleus"), the sizes that some
            cut-off gives. Circuits of other sizes exist too: between two cut-offs edges enter greedily.
    """

    graph: Graph
    rank: Mapping[str, Int[Tensor, "..."]]
    family: str
    provenance: Provenance
    natural_sizes: Int[Tensor, " size"] | None = field(default=None, repr=False)

    @property
    def n_edges(self) -> int:
        return self.graph.n_edges

    def kept(self, size: int) -> dict[str, Bool[Tensor, "..."]]:
        """The first `size` edges, as one boolean tensor per kind."""
        return {kind: (rank >= 0) & (rank < size) for kind, rank in self.rank.items()}

    def postponed(self, late: Bool[Tensor, " edge"]) -> "Ranking":
        """The same order, but that some edges enter after all others."""
        place = flatten(self.graph, self.rank).long()
        order = (place + len(place) * late).argsort()
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return replace(self, rank=unflatten(self.graph, place.int(), -1), natural_sizes=None)

    def sizes_after_pruning(self, sizes: Int[Tensor, " circuit"]) -> Int[Tensor, " circuit"]:
        """How many of the first `size` edges are on a path of them from an input to the output."""
        rank = flatten(self.graph, self.rank)
        return torch.tensor([int(pruned(self.graph, rank < size).sum()) for size in sizes.tolist()], dtype=torch.long)

    def circuit(self, size: SupportsIndex) -> Circuit:
        """The circuit of the first `size` edges.

        Raises:
            ValueError: If the graph has fewer edges.
        """
        size = index(size)
        if not 0 <= size <= self.n_edges:
            raise ValueError(f"`size` must be a number of edges from 0 to {self.n_edges}, got {size}.")
        about = self.provenance
        return Circuit(self.graph, self.kept(size), about, ablation=about.ablation, metric=about.usual_metric)

    def plot(
        self, *, over: str = "head", minus: "Ranking | None" = None, theme: "Theme | str" = "light"
    ) -> "go.Figure":
        """How large a circuit has to be for a head, or a token's state, to be in it: see `plot_heatmap`."""
        from tracedensity.plot import plot_heatmap

        return plot_heatmap(self, over=over, minus=minus, theme=theme)

    def __repr__(self) -> str:
        return f"Ranking({self.family}, {self.n_edges} edges, {self.provenance})"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(kind)}</th>" for kind in self.rank)
        cells = "".join(f"<td>{int(exists.sum()):,}</td>" for exists in self.graph.exists.values())
        table = f"<table><thead><tr>{head}</tr></thead><tbody><tr>{cells}</tr></tbody></table>"
        return f"<p>{html.escape(repr(self))}</p>{table}"


def rank_edges(
    graph: Graph, scores: Mapping[str, Float[Tensor, "..."]], family: Family | str, provenance: Provenance
) -> Ranking:
    """Order all edges by their scores, higher first.

    Args:
        graph: What the edges are.
        scores: One number per edge, comparable between all in-edges of all nodes.
        family: ``greedy``: best-first growth from the output; of all edges into nodes already reached, the
            best one enters next (the s-Trace). ``top``: by score alone, connected or not. ``threshold``: by
            the highest threshold at which the edge has a path to the output of edges that all reach it;
            the greedy order again, with the sizes that a threshold gives. ``nucleus``: the same with, in
            place of the score, the share of its node's total that the better edges into the node leave
            over: at share p every node keeps its smallest set of in-edges that make up p of the total.
        provenance: Recorded in the result.

    Ties go to the edge whose target was reached first, then to the canonical order of the graph.

    Raises:
        ValueError: If the family is unknown, or a score is not finite or, for ``nucleus``, negative.

    References:
        Greedy extraction: arXiv 2605.27033; threshold and nucleus: the earlier arXiv 2601.22795.
    """
    if family not in get_args(Family):
        raise ValueError(f"`family` must be one of {list(get_args(Family))}, got {family!r}.")
    flat = flatten(graph, scores)
    if not flat.isfinite().all():
        raise ValueError(
            f"`scores` must be finite, got {int((~flat.isfinite()).sum())} NaN or infinite of {len(flat)}."
        )
    if family == "nucleus" and (flat < 0).any():
        raise ValueError(
            f"`scores` cannot be negative for the family 'nucleus', which sums them up to shares; "
            f"rank those of method {provenance.method!r} by 'greedy' or 'top'."
        )
    order, sizes = _ORDERS[family](graph.edges, flat.double().numpy())
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    natural = None if sizes is None else torch.from_numpy(sizes)
    return Ranking(graph, unflatten(graph, torch.from_numpy(rank), -1), family, provenance, natural)


def rank_nodes(graph: Graph, scores: Mapping[str, Float[Tensor, "..."]], by: str, provenance: Provenance) -> Ranking:
    """Let writers enter one after another, each with all edges between it and those before it.

    An edge enters with the later of its two ends; the edges into the logits with their writer, those out of the
    embedding with their reader. At the `natural_sizes` circuits are those of the best so many nodes, the embedding
    among them from the start.

    Args:
        graph: A component graph.
        scores: One number per edge.
        by: A writer's importance is the ``"sum"`` or the ``"max"`` of that of the edges that leave it.
        provenance: Recorded in the result.

    Raises:
        ValueError: If the graph has no writers, or `by` is neither.
    """
    if not isinstance(graph, ComponentGraph) or graph.n_pos is not None:
        raise ValueError(
            f"`nodes` must be left out but for component graphs without positions, got {by!r} for "
            f"{type(graph).__name__}."
        )
    importance = node_importance(graph, scores, by)
    importance[0] = torch.inf
    place = torch.empty(graph.n_writers, dtype=torch.long)
    place[importance.argsort(descending=True, stable=True)] = torch.arange(graph.n_writers)
    later = torch.maximum(place[:, None], graph.first_entry(place)[None])
    flat = flatten(graph, {"edge": later})
    order = torch.argsort(flat, stable=True)
    rank = torch.empty(len(order), dtype=torch.int32)
    rank[order] = torch.arange(len(order), dtype=torch.int32)
    natural = torch.bincount(flat, minlength=graph.n_writers).cumsum(0)
    return Ranking(graph, unflatten(graph, rank, -1), f"nodes-{by}", provenance, natural.unique())


def node_importance(
    graph: ComponentGraph, scores: Mapping[str, Float[Tensor, "..."]], by: str
) -> Float[Tensor, " writer"]:
    """Sum or maximum over the edges that leave each writer."""
    if by not in ("sum", "max"):
        raise ValueError(f"`nodes` must be 'sum' or 'max', got {by!r}.")
    exists, values = graph.exists["edge"].flatten(1), scores["edge"].cpu().flatten(1).double()
    if by == "sum":
        return values.masked_fill(~exists, 0.0).sum(1)
    return values.masked_fill(~exists, -torch.inf).amax(1)


def _greedy_order(edges: EdgeList, weight: np.ndarray) -> tuple[np.ndarray, None]:
    """Order of a best-first search from the output.

    Links are taken as soon as they are offered, and are left out of the order.
    """
    number = edges.is_edge.cumsum(0).numpy() - 1
    arcs = _arcs_best_first(edges, edges.on_arcs(torch.from_numpy(weight), torch.inf).numpy())
    return number[arcs[edges.is_edge.numpy()[arcs]]], None


def _arcs_best_first(edges: EdgeList, weight: np.ndarray) -> np.ndarray:
    """Order in which a best-first search from the output takes the arcs, without a heap of them.

    The search reaches one new node at a time; between two such events it only sorts. So the sequence of
    reached nodes is found first, with an array over nodes (Prim's algorithm for the widest path), and then
    each arc looks up the event before which it was popped. O(nodes^2 + arcs log nodes), in array code.
    """
    source, target = edges.source.numpy(), edges.target.numpy()
    # for each pair of nodes the best arc, the first one of equals; arcs of a pair are consecutive
    pair_start = np.flatnonzero(np.diff(source, prepend=-1) | np.diff(target, prepend=-1))
    pair_weight = np.maximum.reduceat(weight, pair_start)
    pair_length = np.diff(pair_start, append=len(weight))
    is_best = weight == np.repeat(pair_weight, pair_length)
    pair_edge = np.minimum.reduceat(np.where(is_best, np.arange(len(weight)), len(weight)), pair_start)
    pair_source, pair_target = source[pair_start], target[pair_start]
    node_start = np.searchsorted(pair_target, np.arange(edges.n_nodes + 1))

    reached_at = np.full(edges.n_nodes, -1)  # step at which a node was reached
    best_weight = np.full(edges.n_nodes, -np.inf)  # of the edges on offer from each node not yet reached
    bound = best_weight.copy()  # what an edge from it must be above to be the best: infinite once it is reached
    best_edge = np.zeros(edges.n_nodes, dtype=np.int64)
    reaching_edge = []  # the edge that reached the node of step 1, 2, ...
    node, step = edges.output, 0
    while True:
        reached_at[node] = step
        best_weight[node], bound[node] = -np.inf, np.inf
        pairs = slice(node_start[node], node_start[node + 1])
        sources, weights = pair_source[pairs], pair_weight[pairs]
        better = weights > bound[sources]  # an equal one was offered first
        sources = sources[better]
        best_weight[sources] = bound[sources] = weights[better]
        best_edge[sources] = pair_edge[pairs][better]
        node = int(best_weight.argmax())
        if best_weight[node] == -np.inf:
            break
        equal = best_weight == best_weight[node]
        if np.count_nonzero(equal) > 1:  # the edge that was offered first
            equals = np.flatnonzero(equal)
            offered = best_edge[equals]
            node = int(equals[np.lexsort((offered, reached_at[target[offered]]))[0]])
        reaching_edge.append(best_edge[node])
        step += 1

    step_type = np.min_scalar_type(edges.n_nodes)  # stable sorts of small numbers take a fraction of the time
    offered_at = reached_at[target]
    popped = np.argsort(offered_at.astype(step_type), kind="stable")  # which are popped first if all are on offer
    popped = popped[np.argsort(-weight[popped], kind="stable")]
    priority = np.empty(len(weight), dtype=np.int64)
    priority[popped] = np.arange(len(weight))
    # an edge is popped between the events j and j + 1 for the first j since its offer
    # at which the edge that reaches node j + 1 does not go before it
    limit = np.append(priority[np.array(reaching_edge, dtype=np.int64)], len(weight))
    event = _first_at_least(limit, offered_at, priority)
    return popped[np.argsort(event[popped].astype(step_type), kind="stable")]


def _first_at_least(values: np.ndarray, start: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """For each query the first index from `start` on whose value is at least `bound`; one must exist."""
    maxima = [values]  # maxima[i][j] = max(values[j : j + 2**i])
    while len(maxima[-1]) > 2 ** (len(maxima) - 1):
        last, half = maxima[-1], 2 ** (len(maxima) - 1)
        maxima.append(np.maximum(last[:-half], last[half:]))
    found = start.copy()
    for i in reversed(range(len(maxima))):
        table = maxima[i]
        at = np.minimum(found, len(table) - 1)
        skip = (found < len(table)) & (table[at] < bound)
        found += skip * 2**i
    return found


def _top_order(edges: EdgeList, weight: np.ndarray) -> tuple[np.ndarray, None]:
    return np.argsort(-weight, kind="stable"), None


def _threshold_order(edges: EdgeList, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The greedy order, and the sizes at which it is the circuit of a threshold.

    Just before a best-first search takes its first edge below a threshold, it has taken all edges with a path to the
    output of edges that reach it, and no others.
    """
    entry = edges.on_arcs(torch.from_numpy(weight), torch.inf)
    widest = entry.new_full((edges.n_nodes,), -torch.inf)  # best path to the output, by its worst edge
    widest[edges.output] = torch.inf
    for block in reversed(edges.blocks):
        entry[block] = entry[block].minimum(widest[edges.target[block]])
        widest.scatter_reduce_(0, edges.source[block], entry[block], "amax")
    order, _ = _greedy_order(edges, weight)
    last_of_its_cut = np.append(np.diff(entry[edges.is_edge].numpy()[order]) != 0, True)
    return order, np.flatnonzero(last_of_its_cut) + 1


def _nucleus_order(edges: EdgeList, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    target = edges.target[edges.is_edge].numpy()
    order = np.lexsort((-weight, target))
    total = np.cumsum(weight[order])
    first_of_node = np.flatnonzero(np.diff(target[order], prepend=-1))
    before = np.append(0.0, total)[first_of_node]
    length = np.diff(first_of_node, append=len(order))
    mass = np.append(total[first_of_node[1:] - 1], total[-1]) - before  # of the whole node
    better = total - weight[order] - np.repeat(before, length)
    left_over = np.empty(len(order))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = better / np.repeat(mass, length)
    left_over[order] = 1 - np.where(np.repeat(mass, length) > 0, share, 0.0)
    left_over[order[first_of_node]] = 1.0  # exactly: rounding must not order nodes
    return _threshold_order(edges, left_over)


_ORDERS: dict[str, Callable[[EdgeList, np.ndarray], tuple[np.ndarray, np.ndarray | None]]] = {
    "greedy": _greedy_order,
    "top": _top_order,
    "threshold": _threshold_order,
    "nucleus": _nucleus_order,
}
