"""Graphs of a model's computation: what an edge is, and how a circuit of edges is run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from tracedensity.ablate import Carried, Written
from tracedensity.model import Edit, Site, Transformer

Dropped = Callable[[str, Any], Tensor | None]
"""Which edges of a kind are ablated, among those that an index into the kind's tensor selects.

A boolean tensor ``[circuit, ...]``, or None for no edge. Numbers from 0 to 1 in place of booleans are shares: an edge
then carries so much of its ablated value, and the rest of its own.
"""


@dataclass(frozen=True, eq=False)
class Rows:
    """What the rows of a batch are: every example in a first circuit, then in a second one, and so on.

    Attributes:
        model: What is run.
        n_circuits: How many circuits.
        last: Where each example ends.
        ablated: What writers write where they are ablated, or what edges carry.
    """

    model: Transformer
    n_circuits: int
    last: Int[Tensor, " example"]
    ablated: Written | Carried


@dataclass(frozen=True, eq=False)
class EdgeList:
    """All edges of a graph in its canonical order, which is the one place where edges have an order.

    They are among the arcs, which are the edges and the links: a link leads from a node to another one that
    it is part of, is in every circuit and counts for nothing. Arcs are sorted by target, and those into the same
    node from the same node are consecutive.

    Attributes:
        index: Where each edge stands in the graph's tensors, flattened and laid end to end.
        source: Node that each arc leaves.
        target: Node that each arc enters.
        blocks: Consecutive slices of arcs; what leaves a node that a block's arcs enter is in later blocks.
        n_nodes: Number of node names in use; not all need to have edges.
        output: The node whose value is the prediction.
        is_edge: Which arcs are edges.
    """

    index: Int[Tensor, " edge"]
    source: Int[Tensor, " arc"]
    target: Int[Tensor, " arc"]
    blocks: tuple[slice, ...]
    n_nodes: int
    output: int
    is_edge: Bool[Tensor, " arc"]

    def on_arcs(self, flat: Shaped[Tensor, "*batch edge"], of_links: float | bool) -> Shaped[Tensor, "*batch arc"]:
        """Values of edges as values of arcs."""
        arcs = flat.new_full((*flat.shape[:-1], len(self.is_edge)), of_links)
        arcs[..., self.is_edge] = flat
        return arcs


@runtime_checkable  # so that test runs can check annotations
class Graph(Protocol):
    """What every graph has to offer; the rest of the library needs no more."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Kinds of edges, and the shape of the tensor that holds one number for each edge of the kind."""
        ...

    @cached_property
    def exists(self) -> Mapping[str, Tensor]:
        """Which entries of these tensors are edges."""
        ...

    @property
    def n_edges(self) -> int: ...

    @cached_property
    def edges(self) -> EdgeList: ...

    def edge_name(self, kind: str, index: tuple[int, ...]) -> str:
        """What to call an edge in tables and messages; `edge_index` is the inverse."""
        ...

    def edge_index(self, name: str) -> tuple[str, tuple[int, ...]]: ...

    def ends(self, kind: str, index: tuple[int, ...]) -> tuple[str, str, str]:
        """Names of the nodes that an edge leaves and enters, and what it is read as."""
        ...

    @property
    def ungrouped(self) -> bool:
        """Whether query heads that share keys and values are to have their own when circuits are run."""
        ...

    @property
    def n_held(self) -> int:
        """How many vectors per token are held through a run of a circuit."""
        ...

    def edits(self, dropped: Dropped, rows: Rows) -> Mapping[Site, Edit]:
        """How a running model is changed so that a batch of circuits is what it computes."""
        ...

    def fed(self, kept: Bool[Tensor, "*circuit edge"]) -> Bool[Tensor, "*circuit edge"]:
        """Circuits with the edges without which others of theirs would bring nothing, where these are known."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What is needed to make the same graph again; `graph_from_dict` is the inverse."""
        ...


def flatten(graph: Graph, values: Mapping[str, Tensor]) -> Shaped[Tensor, "*batch edge"]:
    """The values of all edges in canonical order, for one circuit or several, on the CPU."""
    n_axes = {kind: len(shape) for kind, shape in graph.shapes.items()}
    laid_out = torch.cat([values[kind].flatten(-n_axes[kind]).cpu() for kind in graph.shapes], dim=-1)
    return laid_out[..., graph.edges.index]


def pruned(graph: Graph, kept: Bool[Tensor, "*batch edge"]) -> Bool[Tensor, "*batch edge"]:
    """Edges on a path from an input to the output, of those that are kept.

    What repeatedly deleting nodes without an in-edge (inputs exempt) or without an out-edge (the output exempt), and
    their edges, leaves over; found in one sweep forward and one back.

    Args:
        graph: What the edges are.
        kept: The edges of one or more circuits, in canonical order.
    """
    edges = graph.edges
    arcs = edges.on_arcs(kept, True)
    fed = arcs.new_zeros(*arcs.shape[:-1], edges.n_nodes)
    fed[..., edges.source] = True
    fed[..., edges.target] = False  # the inputs: what arcs leave and none enters
    needed = torch.zeros_like(fed)
    needed[..., edges.output] = True
    for block in edges.blocks:
        _spread(fed, edges.source[block], edges.target[block], arcs[..., block])
    for block in reversed(edges.blocks):
        _spread(needed, edges.target[block], edges.source[block], arcs[..., block])
    alive = fed[..., edges.source] & needed[..., edges.target]
    return kept & alive[..., edges.is_edge]


def _spread(marked: Tensor, source: Tensor, target: Tensor, along: Tensor) -> None:
    """Mark the targets of arcs whose sources are marked."""
    reached = (marked[..., source] & along).to(torch.uint8)
    found = torch.zeros_like(marked, dtype=torch.uint8)
    found.scatter_reduce_(-1, target.expand_as(reached), reached, "amax")
    marked |= found.bool()


def unflatten(graph: Graph, flat: Shaped[Tensor, "*batch edge"], missing: int | float | bool) -> dict[str, Tensor]:
    """Inverse of `flatten`, for one circuit or several; entries that are no edge get the value `missing`."""
    counts = [torch.Size(shape).numel() for shape in graph.shapes.values()]
    laid_out = flat.new_full((*flat.shape[:-1], sum(counts)), missing)
    laid_out[..., graph.edges.index] = flat
    parts = laid_out.split(counts, dim=-1)
    return {kind: part.unflatten(-1, shape) for (kind, shape), part in zip(graph.shapes.items(), parts, strict=True)}


def edge_at(graph: Graph, number: int) -> tuple[str, str]:
    """Kind and name of an edge, by its place in the canonical order."""
    place = int(graph.edges.index[number])
    for kind, shape in graph.shapes.items():
        if place < (count := torch.Size(shape).numel()):
            index = torch.unravel_index(torch.tensor(place), shape)
            return kind, graph.edge_name(kind, tuple(int(i) for i in index))
        place -= count
    raise AssertionError("an index beyond the graph's tensors")


def graph_from_dict(description: Mapping[str, Any]) -> Graph:
    """The graph that described itself with `to_dict`.

    The graph named "x" is the class `XGraph` of the module `tracedensity.graph.x`.

    Raises:
        ValueError: If there is no such graph.
    """
    fields = dict(description)
    name = fields.pop("graph", None)
    try:
        module = import_module(f"tracedensity.graph.{name}")
        return getattr(module, f"{str(name).title()}Graph")(**fields)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"`graph` must be the name of a graph, like 'token', got {name!r}.") from error
