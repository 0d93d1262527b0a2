"""Groups of edges: which layer and part of a model, which head or which token each edge belongs to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tracedensity.graph import Graph
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import SMALL, TokenGraph


@dataclass(frozen=True, eq=False)
class Groups:
    """The edges of a graph, sorted into the cells of a table.

    Attributes:
        graph: What the edges are.
        rows: What rows are called, the lowest layer first.
        columns: What columns are called.
        cell: For each kind of edge its cell, counted along the rows, in the shape of the graph's tensors; -1 for
            edges that belong to no cell. What it says of entries that are no edges is of no account.
    """

    graph: Graph
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cell: Mapping[str, Int[Tensor, "..."]]

    @cached_property
    def of_edges(self) -> Int[Tensor, " edge"]:
        """The cell of each edge, kind after kind."""
        return self.laid_out(self.cell)

    @cached_property
    def _empty(self) -> Bool[Tensor, " cell"]:
        """Which cells have no edges."""
        return ~torch.isin(torch.arange(len(self.rows) * len(self.columns)), self.of_edges)

    def laid_out(self, values: Mapping[str, Tensor]) -> Shaped[Tensor, " edge"]:
        """Values of edges, kind after kind, without the entries of tensors that are no edges."""
        return torch.cat([values[kind].cpu()[exists] for kind, exists in self.graph.exists.items()])

    @property
    def n_edges(self) -> Int[Tensor, "row column"]:
        """How many edges each cell has."""
        return self.total(self.graph.exists).nan_to_num().long()

    def total(self, values: Mapping[str, Tensor]) -> Float[Tensor, "row column"]:
        """Sum over the edges of each cell, NaN where there are none; of booleans how many are true."""
        return self._reduced(values, "sum", 0.0)

    def least(self, values: Mapping[str, Tensor]) -> Float[Tensor, "row column"]:
        """Smallest value among the edges of each cell, NaN where there are none."""
        return self._reduced(values, "amin", torch.inf)

    def _reduced(
        self, values: Mapping[str, Tensor], how: Literal["sum", "amin"], start: float
    ) -> Float[Tensor, "row column"]:
        n_cells = len(self.rows) * len(self.columns)
        cell, value = self.of_edges, self.laid_out(values).double()
        # what belongs to no cell has one behind all others
        table = torch.full((n_cells + 1,), start, dtype=torch.float64)
        table.scatter_reduce_(0, torch.where(cell < 0, n_cells, cell), value, how)
        return table[:-1].masked_fill(self._empty, torch.nan).view(len(self.rows), len(self.columns))


def _made_once(make: Callable[[Any], Groups]) -> Callable[[Graph], Groups]:
    """Groups of small graphs are made once for prompts of a length."""
    kept = lru_cache(maxsize=2)(make)

    @wraps(make)
    def grouped(graph: Graph) -> Groups:
        known = _known(graph)
        return kept(known) if known.n_edges < SMALL else make(known)

    return grouped


@_made_once
def by_part(graph: TokenGraph | ComponentGraph) -> Groups:
    """Edges by layer and by part of the model.

    On the token graph the layer is that of the sublayer to which an edge belongs, and the part what the edge is: of a
    head, of an MLP (or a neuron of it), or a skip connection. On the component graph the layer is that of the reader,
    the last one for the logits, and the part is the writer's.
    """
    layers = _layers(graph)
    if isinstance(graph, ComponentGraph):
        parts = ("embedding", "heads", "MLPs")[: 2 + graph.has_mlp]
        part = _of_writers(graph, 1, 2)
        part[0] = 0
        layer = torch.arange(graph.n_readers) // graph.per_layer
        cells = {"edge": part[:, None] + len(parts) * layer.clamp(max=graph.n_layers - 1)}
    else:
        parts = ("heads", "MLPs", "skip connections") if graph.has_mlp else ("heads", "skip connections")
        of_kind = {"head": 0, "mlp": 1, "neuron": 1, "resid_attn": len(parts) - 1, "resid_mlp": len(parts) - 1}
        cells = {kind: torch.arange(graph.n_layers) * len(parts) + of_kind[kind] for kind in graph.shapes}
    return Groups(graph, layers, parts, _spread(graph, cells))


@_made_once
def by_head(graph: TokenGraph | ComponentGraph) -> Groups:
    """Edges by layer and by head of the layer, with a last column for its MLP, if there is one.

    On the component graph an edge belongs to the head or MLP that writes it; those that the embedding writes belong to
    no cell. So do skip connections.
    """
    columns = (*(f"h{head}" for head in range(graph.n_heads)), *["MLP"] * graph.has_mlp)
    heads = torch.arange(graph.n_layers * len(columns)).view(graph.n_layers, -1)
    if isinstance(graph, ComponentGraph):
        cells = {"edge": _of_writers(graph, heads[:, : graph.n_heads], heads[:, -1:])}
    else:
        cells = {"head": heads[:, : graph.n_heads], "mlp": heads[:, -1], "neuron": heads[:, -1]}
    return Groups(graph, _layers(graph), columns, _spread(graph, cells))


@_made_once
def by_component(graph: TokenGraph | ComponentGraph) -> Groups:
    """Edges by what brings them, whatever the token: one row, and a column for each.

    On the token graph these are heads (``a0.h1``), MLPs (``m0``) and the skip connections around them (``r0.attn``,
    ``r0.mlp``); on the component graph they are writers.
    """
    if isinstance(graph, ComponentGraph):
        cells = {"edge": torch.arange(graph.n_writers)}
        return Groups(graph, ("all",), tuple(graph.writers), _spread(graph, cells))
    layers = torch.arange(graph.n_layers)
    names = [f"a{layer}.h{head}" for layer in range(graph.n_layers) for head in range(graph.n_heads)]
    cells = {"head": torch.arange(len(names)).view(graph.n_layers, -1)}
    for kind, name in (("mlp", "m{}"), ("neuron", "m{}"), ("resid_attn", "r{}.attn"), ("resid_mlp", "r{}.mlp")):
        if kind in graph.shapes:
            cells[kind] = len(names) + layers
            names += [name.format(layer) for layer in range(graph.n_layers)]
    return Groups(graph, ("all",), tuple(names), _spread(graph, cells))


@_made_once
def by_token(graph: TokenGraph | ComponentGraph) -> Groups:
    """Edges by sublayer and by token.

    Rows are the attention and the MLP of each layer, such as ``a3`` and ``m3``. On the token graph an edge of a head
    belongs to the token that it brings something to, and skip connections belong to no cell: with them every state's
    shares would add up to 1. On the component graph an edge belongs to the sublayer that reads it, at the token where
    it does, and the logits are a row of their own.

    Raises:
        ValueError: If the graph does not tell tokens apart.
    """
    if graph.n_pos is None:
        raise ValueError(
            "`over` must be 'head' for a component graph whose positions are summed, got 'token'. For tokens, make it "
            "with `positions=True`."
        )
    per_layer = 2 if graph.has_mlp else 1
    rows = [f"{sublayer}{layer}" for layer in range(graph.n_layers) for sublayer in "am"[:per_layer]]
    pos = torch.arange(graph.n_pos)
    if isinstance(graph, ComponentGraph):
        rows.append("logits")
        row = torch.full((graph.n_readers,), len(rows) - 1)
        for layer in range(graph.n_layers):
            for place, names in enumerate(("qkv", ["mlp"])):
                for name in names:
                    row[graph.readers_of(name, layer)] = per_layer * layer + place
        cells = {"edge": (row[:, None] * graph.n_pos + pos).expand(graph.n_writers, -1, -1)}
    else:
        state = torch.arange(len(rows) * graph.n_pos).view(graph.n_layers, per_layer, -1)
        cells = {"head": state[:, None, 0], "mlp": state[:, -1], "neuron": state[:, -1]}
    return Groups(graph, tuple(rows), tuple(map(str, pos.tolist())), _spread(graph, cells))


@_made_once
def by_source(graph: TokenGraph) -> Groups:
    """Edges by the token whose state they leave: one row, and a column for each token."""
    pos = torch.arange(graph.n_pos)
    cells = {kind: pos.expand(shape) for kind, shape in graph.shapes.items() if kind != "neuron"}
    if "neuron" in graph.shapes:
        cells["neuron"] = pos[:, None].expand(graph.shapes["neuron"])
    return Groups(graph, ("all",), tuple(map(str, pos.tolist())), cells)


def _known(graph: Graph) -> TokenGraph | ComponentGraph:
    if not isinstance(graph, TokenGraph | ComponentGraph):
        raise ValueError(f"`graph` must be a TokenGraph or a ComponentGraph, got {type(graph).__name__}.")
    return graph


def _layers(graph: TokenGraph | ComponentGraph) -> tuple[str, ...]:
    return tuple(map(str, range(graph.n_layers)))


def _of_writers(
    graph: ComponentGraph, heads: Int[Tensor, "layer head"] | int, mlps: Int[Tensor, "layer 1"] | int
) -> Int[Tensor, " writer"]:
    """A number for each writer: given those of heads and MLPs, whose neurons share one, and -1 for the embedding."""
    of_layer = torch.cat([
        torch.as_tensor(heads).expand(graph.n_layers, graph.n_heads),
        torch.as_tensor(mlps).expand(graph.n_layers, graph.per_mlp),
    ], dim=1)  # fmt: skip
    return torch.cat([torch.tensor([-1]), of_layer.flatten()])


def _spread(graph: Graph, cells: Mapping[str, Int[Tensor, "..."]]) -> dict[str, Int[Tensor, "..."]]:
    """Cells of all edges, given those for the first axes of each kind's tensor, -1 for other kinds.

    These are views, which take no memory.
    """
    spread = {}
    for kind, shape in graph.shapes.items():
        cell = cells.get(kind, torch.tensor(-1))
        spread[kind] = cell[(..., *[None] * (len(shape) - cell.dim()))].expand(shape)
    return spread
