"""Many circuits in one batched forward pass."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.choices import Attention
from tracedensity.graph import Dropped, Graph
from tracedensity.graph.circuit import Circuit
from tracedensity.model import Transformer, require_finite

CPU_WORKSPACE = 2**28
"""Bytes that the activations of one batch of circuits may take on a CPU."""

_CPU_CACHED = 2**26  # beyond this, fresh pages for every result cost more than larger batches save
_CPU_BATCH = 4  # but so many circuits share the reading of large weights


@dataclass(frozen=True)
class Conditions:
    """How circuits are run.

    Attributes:
        inverse: Run the complement: everything but the circuit, and all skip connections.
        keep_residual: Keep all skip connections, whether they are in the circuit or not.
        attention: With "open", absent attention edges are counted but not ablated, as in the public pipeline
            of the density papers.
    """

    inverse: bool = False
    keep_residual: bool = False
    attention: Attention | str = "masked"

    def keeps_all(self, kind: str) -> bool:
        """Whether no edge of a kind is ever ablated."""
        if kind == "head":
            return self.attention == "open"
        return kind.startswith("resid") and (self.keep_residual or self.inverse)


def run_family(
    model: Transformer,
    graph: Graph,
    tokens: Int[Tensor, " pos"],
    rank: Mapping[str, Int[Tensor, "..."]],
    sizes: Int[Tensor, " circuit"],
    conditions: Conditions,
    batch_size: int | None = None,
) -> Float[Tensor, "circuit d_vocab"]:
    """Logits at the last position of the circuits ``rank < size``, or of their complements.

    The masks of a layer are made inside its hooks, from the ranks: a family of circuits takes no memory.

    Args:
        model: The model.
        graph: What the edges are.
        tokens: The prompt.
        rank: Place of each edge, per kind; -1 where there is none.
        sizes: Numbers of edges.
        conditions: How circuits are run.
        batch_size: Circuits per forward pass; by default as many as fit in memory.
    """
    rank = {kind: value.to(model.device) for kind, value in rank.items()}
    sizes = sizes.to(model.device)

    def dropped(part: slice) -> Dropped:
        def of_layer(kind: str, layer: int) -> Tensor | None:
            if conditions.keeps_all(kind):
                return None
            place = rank[kind][layer][None]
            size = sizes[part].to(place.dtype).view(-1, *[1] * (place.dim() - 1))
            return place < size if conditions.inverse else place >= size

        return of_layer

    return _run(model, graph, tokens, dropped, len(sizes), batch_size)


def run_circuits(
    model: Transformer,
    tokens: Int[Tensor, " pos"],
    circuits: list[Circuit],
    conditions: Conditions,
    batch_size: int | None = None,
) -> Float[Tensor, "circuit d_vocab"]:
    """Logits at the last position of circuits of one graph, or of their complements."""
    graph = circuits[0].graph
    if any(circuit.graph != graph for circuit in circuits):
        raise ValueError("`circuits` must all be circuits of one graph.")

    def dropped(part: slice) -> Dropped:
        def of_layer(kind: str, layer: int) -> Tensor | None:
            if conditions.keeps_all(kind):
                return None
            kept = torch.stack([circuit.kept[kind][layer] for circuit in circuits[part]]).to(model.device)
            return kept if conditions.inverse else ~kept

        return of_layer

    return _run(model, graph, tokens, dropped, len(circuits), batch_size)


def _run(
    model: Transformer,
    graph: Graph,
    tokens: Int[Tensor, " pos"],
    dropped: Callable[[slice], Dropped],
    n_circuits: int,
    batch_size: int | None,
) -> Float[Tensor, "circuit d_vocab"]:
    if n_circuits == 0:
        return torch.empty(0, model.d_vocab, device=model.device)
    batch_size = batch_size or circuits_per_batch(model, len(tokens))
    logits = []
    with _flushed_denormals():
        for part in _parts(n_circuits, batch_size):
            batch = tokens.expand(part.stop - part.start, -1)
            logits.append(model.logits(batch, graph.edits(dropped(part))))
    result = torch.cat(logits)
    require_finite(result, "the logits of circuits")
    return result


def _parts(n_circuits: int, batch_size: int) -> Iterator[slice]:
    """Consecutive slices of nearly equal length, none longer than the batch size."""
    n_parts = -(-n_circuits // batch_size)
    ends = [n_circuits * i // n_parts for i in range(n_parts + 1)]
    yield from map(slice, ends[:-1], ends[1:])


def bytes_per_circuit(model: Transformer, n_pos: int) -> int:
    """Estimate of the memory that one circuit of a batch takes while a layer is run."""
    attention = 5 * model.n_heads * n_pos * n_pos  # scores, their masked copy, pattern, its copies
    mlp = n_pos * (4 * model.d_mlp + 8 * model.d_model + 4 * model.n_heads * model.d_head)
    return (attention + mlp + 2 * model.d_vocab) * torch.empty((), dtype=model.dtype).element_size()


def circuits_per_batch(model: Transformer, n_pos: int) -> int:
    """How many circuits to run at once: what fits in the free memory of an accelerator, or suits a CPU."""
    size = bytes_per_circuit(model, n_pos)
    if model.device.type == "cuda":
        return max(1, torch.cuda.mem_get_info(model.device)[0] // 2 // size)
    return max(1, _CPU_CACHED // size, min(_CPU_BATCH, CPU_WORKSPACE // size))


class _flushed_denormals:  # noqa: N801
    """Within the block, numbers below 1e-38 count as zero.

    Saturated softmaxes in circuits make many of them, and a CPU multiplies them a hundred times slower. The
    setting is the process's, so it is put back. (PyTorch does not say what it was; a product that would be
    such a number does.)
    """

    def __enter__(self) -> None:
        self.was_on = bool((torch.tensor([1e-30]) * torch.tensor([1e-10]) == 0).item())
        torch.set_flush_denormal(True)

    def __exit__(self, *error: object) -> None:
        torch.set_flush_denormal(self.was_on)
