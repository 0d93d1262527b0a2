"""Many circuits in one batched forward pass."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tracedensity.choices import Attention
from tracedensity.graph import Dropped, Graph, Rows
from tracedensity.graph.circuit import Circuit
from tracedensity.model import require_finite
from tracedensity.setting import Setting, gradients_at_once, rows_at_once

Measure = Callable[[Float[Tensor, "circuit example d_vocab"], slice], Mapping[str, Tensor]]
"""What is wanted of the logits of circuits on some of the examples: numbers ``[circuit, example]``, by name."""


@dataclass(frozen=True)
class Conditions:
    """How circuits are run.

    Attributes:
        inverse: Run the complement: everything but the circuit, and all skip connections.
        keep_residual: Keep all skip connections, whether they are in the circuit or not.
        attention: With "open", absent attention edges are counted but not ablated, as in the public pipeline
            of the density papers.
        ablation: What replaces an absent edge.
    """

    inverse: bool = False
    keep_residual: bool = False
    attention: Attention | str = "masked"
    ablation: str = "zero"

    def keeps_all(self, kind: str) -> bool:
        """Whether no edge of a kind is ever ablated."""
        if kind == "head":
            return self.attention == "open"
        return kind.startswith("resid") and (self.keep_residual or self.inverse)


def run_family(
    setting: Setting,
    graph: Graph,
    rank: Mapping[str, Int[Tensor, "..."]],
    sizes: Int[Tensor, " circuit"],
    conditions: Conditions,
    measure: Measure,
    batch_size: int | None = None,
) -> dict[str, Float[Tensor, "circuit example"]]:
    """Measure the circuits ``rank < size``, or their complements.

    The masks of a layer are made inside its hooks, from the ranks: a family of circuits takes no memory.

    Args:
        setting: Where they are run.
        graph: What the edges are.
        rank: Place of each edge, per kind; -1 where there is none.
        sizes: Numbers of edges.
        conditions: How circuits are run.
        measure: What is wanted of their logits.
        batch_size: Circuits per forward pass; by default as many as fit in memory.
    """
    rank = {kind: in_order(value, conditions).to(setting.model.device) for kind, value in rank.items()}
    sizes = sizes.to(setting.model.device)

    def dropped(part: slice) -> Dropped:
        def among(kind: str, where: Any) -> Tensor | None:
            if conditions.keeps_all(kind):
                return None
            return without(rank[kind][where][None], sizes[part], conditions.inverse)

        return among

    return run(setting, graph, dropped, len(sizes), measure, batch_size)


def in_order(rank: Int[Tensor, "*shape"], conditions: Conditions) -> Int[Tensor, "*shape"]:
    """A ranking in which what is no edge comes last, and is never computed; in a complement it stays first."""
    return rank if conditions.inverse else rank.masked_fill(rank < 0, torch.iinfo(rank.dtype).max)


def without(
    place: Int[Tensor, "#circuit ..."], size: Int[Tensor, " circuit"], inverse: bool | Bool[Tensor, " circuit"]
) -> Bool[Tensor, "circuit ..."]:
    """Which edges are ablated in the circuit of each size, or in its complement, by their places in a ranking."""
    size = beside(size.to(place.dtype), place)
    if isinstance(inverse, bool):
        return place < size if inverse else place >= size
    return (place >= size) ^ beside(inverse, place)


def beside(value: Shaped[Tensor, " circuit"], of: Tensor) -> Shaped[Tensor, "circuit ..."]:
    """Something of each circuit, to be combined with tensors of each."""
    return value.view(-1, *[1] * (of.dim() - 1))


def run_circuits(
    setting: Setting,
    circuits: list[Circuit],
    conditions: Conditions,
    measure: Measure,
    batch_size: int | None = None,
) -> dict[str, Float[Tensor, "circuit example"]]:
    """Measure circuits of one graph, or their complements."""
    graph = circuits[0].graph
    if any(circuit.graph != graph for circuit in circuits):
        raise ValueError("`circuits` must all be circuits of one graph.")
    kept = {kind: torch.stack([circuit.kept[kind] for circuit in circuits]) for kind in graph.shapes}
    return run_masks(setting, graph, kept, conditions, measure, batch_size)


def run_masks(
    setting: Setting,
    graph: Graph,
    kept: Mapping[str, Bool[Tensor, "circuit ..."]],
    conditions: Conditions,
    measure: Measure,
    batch_size: int | None = None,
) -> dict[str, Float[Tensor, "circuit example"]]:
    """Measure circuits given as masks of each kind of edge, or their complements."""
    kept = {kind: masks.to(setting.model.device) for kind, masks in kept.items()}
    n_circuits = len(next(iter(kept.values())))

    def dropped(part: slice) -> Dropped:
        def among(kind: str, where: Any) -> Tensor | None:
            if conditions.keeps_all(kind):
                return None
            some = _at(kept[kind][part], where)
            return some if conditions.inverse else ~some

        return among

    return run(setting, graph, dropped, n_circuits, measure, batch_size)


def run_shares(
    setting: Setting,
    graph: Graph,
    kept: Mapping[str, Float[Tensor, "circuit ..."]],
    conditions: Conditions,
    loss: Measure,
) -> tuple[dict[str, Float[Tensor, " circuit"]], dict[str, Float[Tensor, "circuit ..."]]]:
    """What a loss is where edges are kept in shares, and how it changes with each of these shares.

    One forward and one backward pass per circuit and example. The gradient at the share of a head's edge comes from the
    gradient at its pattern, which is a matrix product of that at its output with its values: nothing with two axes of
    tokens and ``d_model`` is made.

    Args:
        setting: Where circuits are run.
        graph: What the edges are.
        kept: Shares from 0, ablated, to 1, kept.
        conditions: How circuits are run.
        loss: Numbers of which the one named "loss" is differentiated.

    Returns:
        All these numbers and the gradients, means over examples.

    Raises:
        ValueError: If a gradient is not finite, naming the kind of edge, or the loss has none.
    """
    model, examples = setting.model, setting.prompts
    n_circuits = len(next(iter(kept.values())))
    n_rows = gradients_at_once(model, examples.tokens.shape[1])
    values: dict[str, Tensor] = {}
    slopes = {kind: torch.zeros_like(share, device=model.device) for kind, share in kept.items()}
    with torch.inference_mode(False), model.frozen(), flushed_denormals():
        for some in examples.parts(n_rows):
            n_some = some.stop - some.start
            ablated = setting.ablated(some)
            for part in slices(n_circuits, max(1, n_rows // n_some)):
                n_part = part.stop - part.start
                absent = {kind: (1 - share[part].to(model.device)).requires_grad_() for kind, share in kept.items()}
                with torch.enable_grad():  # whose gradients are joined once; each index would make one of the whole
                    by_first = {kind: share.unbind(1) for kind, share in absent.items()}

                def dropped(
                    kind: str,
                    where: Any,
                    absent: Mapping[str, Tensor] = absent,
                    by_first: Mapping[str, tuple[Tensor, ...]] = by_first,
                ) -> Tensor | None:
                    if conditions.keeps_all(kind):
                        return None
                    return by_first[kind][where] if isinstance(where, int) else _at(absent[kind], where)

                with torch.enable_grad():
                    logits = model.logits(
                        examples.tokens[some].repeat(n_part, 1),
                        graph.edits(dropped, Rows(model, n_part, examples.last[some], ablated)),
                        last=examples.last[some].repeat(n_part),
                        ungrouped=graph.ungrouped,
                        differentiable=True,
                    )
                    require_finite(logits, "the logits of circuits")
                    measured = loss(logits.unflatten(0, (n_part, n_some)), some)
                    if not measured["loss"].requires_grad:
                        raise ValueError("`metric` must be differentiable, got one whose result has no gradient.")
                    found = torch.autograd.grad(measured["loss"].sum(), [*absent.values()], allow_unused=True)
                for kind, slope in zip(absent, found, strict=True):
                    if slope is not None:
                        require_finite(slope, f"the gradients at edges of kind {kind!r}")
                        slopes[kind][part] -= slope / len(examples)
                for name, each in measured.items():
                    total = values.setdefault(name, each.new_zeros(n_circuits))
                    total[part] += each.detach().sum(1) / len(examples)
    return values, slopes


def _at(values: Shaped[Tensor, "circuit ..."], where: Any) -> Tensor:
    """What an index into the tensor of one circuit selects, for each of several."""
    return values[(slice(None), *where) if isinstance(where, tuple) else (slice(None), where)]


def run(
    setting: Setting,
    graph: Graph,
    dropped: Callable[[slice], Dropped],
    n_circuits: int,
    measure: Measure,
    batch_size: int | None = None,
) -> dict[str, Float[Tensor, "circuit example"]]:
    """Measure circuits given by what they drop, as many rows per forward pass as memory allows."""
    model, examples = setting.model, setting.prompts
    n_rows = rows_at_once(model, examples.tokens.shape[1], graph.n_held)
    found: dict[str, list[Tensor]] = {}
    with flushed_denormals():
        for some in examples.parts(n_rows):
            n_some = some.stop - some.start
            ablated = setting.ablated(some) if n_circuits else {}
            columns: dict[str, list[Tensor]] = {}
            for part in slices(n_circuits, batch_size or max(1, n_rows // n_some)):
                n_part = part.stop - part.start
                rows = Rows(model, n_part, examples.last[some], ablated)
                logits = model.logits(
                    examples.tokens[some].repeat(n_part, 1),
                    graph.edits(dropped(part), rows),
                    last=examples.last[some].repeat(n_part),
                    ungrouped=graph.ungrouped,
                )
                require_finite(logits, "the logits of circuits")
                for name, values in measure(logits.unflatten(0, (n_part, n_some)), some).items():
                    columns.setdefault(name, []).append(values)
            for name, parts in columns.items():
                found.setdefault(name, []).append(torch.cat(parts))
    return {name: torch.cat(parts, dim=1) for name, parts in found.items()}


def slices(n_circuits: int, batch_size: int) -> Iterator[slice]:
    """Consecutive slices of nearly equal length, none longer than the batch size."""
    n_parts = -(-n_circuits // batch_size)
    ends = [n_circuits * i // max(n_parts, 1) for i in range(n_parts + 1)]
    yield from map(slice, ends[:-1], ends[1:])


class flushed_denormals:  # noqa: N801
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
