"""Evaluation: what the circuits of a ranking predict, at many sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, SupportsIndex, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.choices import Attention, Metric
from tracedensity.extract import Ranking
from tracedensity.faithfulness import METRICS, require_metrics
from tracedensity.graph import Graph
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.model import Prompt, Transformer, as_transformer
from tracedensity.run import Conditions, run_circuits, run_family

if TYPE_CHECKING:
    import pandas as pd

Sizes: TypeAlias = Sequence[SupportsIndex] | Sequence[float] | Tensor | np.ndarray
"""Numbers of edges."""

RELATIVE_SIZES = (
    1e-5, 2e-5, 4e-5, 8e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1e-3, 1.2e-3, 1.4e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3,
    1e-2, 2e-2, 4e-2, 6e-2, 8e-2, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0,
)  # fmt: skip
"""Sizes of the density papers, as shares of all edges (arXiv 2605.27033)."""


def paper_sizes(n_edges: int) -> Int[Tensor, " circuit"]:
    """`RELATIVE_SIZES` as numbers of edges, rounded down as in the papers; small graphs repeat sizes."""
    return torch.tensor([int(share * n_edges) for share in RELATIVE_SIZES])


def as_sizes(sizes: Sizes, n_edges: int) -> Int[Tensor, " circuit"]:
    """Numbers of edges, checked.

    Raises:
        ValueError: If they are no whole numbers from 0 to the edges of the graph.
    """
    numbers = torch.as_tensor(list(sizes) if isinstance(sizes, range) else sizes)
    if not numbers.numel():
        return torch.empty(0, dtype=torch.long)
    if numbers.dim() != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise ValueError(
            "`sizes` must be a list of whole numbers of edges; for shares of the graph, give "
            f"[int(share * {n_edges}) for share in ...]."
        )
    if int(numbers.min()) < 0 or int(numbers.max()) > n_edges:
        bad = numbers[(numbers < 0) | (numbers > n_edges)][:5].tolist()
        raise ValueError(f"`sizes` must be from 0 to {n_edges}, the edges of the graph, got {bad}.")
    return numbers.long()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What circuits predict, one entry per circuit.

    Attributes:
        sizes: Numbers of edges.
        metrics: Values of each metric.
        n_edges: Edges of the whole graph.
    """

    sizes: Int[Tensor, " circuit"]
    metrics: Mapping[str, Float[Tensor, " circuit"]]
    n_edges: int

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per circuit: `size`, `fraction`, and the metrics."""
        import pandas as pd

        columns = {name: value.tolist() for name, value in self.metrics.items()}
        fraction = (self.sizes / self.n_edges).tolist()
        return pd.DataFrame({"size": self.sizes.tolist(), "fraction": fraction, **columns})

    def __repr__(self) -> str:
        return f"Evaluation({len(self.sizes)} circuits, {', '.join(self.metrics)})"


def evaluate(
    model: object,
    prompt: Prompt,
    ranking_or_circuit: Ranking | Circuit | Sequence[Circuit],
    sizes: Sizes | None = None,
    *,
    ablation: Literal["zero"] | str = "zero",
    metrics: Metric | str | Sequence[Metric | str] = ("tv", "kl", "top1"),
    inverse: bool = False,
    keep_residual: bool | None = None,
    attention: Attention | str | None = None,
    position: int = -1,
    target: int | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Run circuits in place of the model and compare their predictions with its own.

    All circuits go through the model together, as many per forward pass as memory allows. An absent edge
    adds nothing (zero ablation); everything else is computed anew from the masked stream.

    Nothing asks that it be the model or the prompt that was scored, as long as the graph is the same: so a circuit
    can be tried on another checkpoint or prompt. `Circuit.verify` does ask.

    Args:
        model: A HookedTransformer, or a name for `load_model`.
        prompt: Text, token ids, or a ``[pos]`` tensor; as long as the one that was scored.
        ranking_or_circuit: A ranking, or one or more circuits.
        sizes: Numbers of edges, for a ranking; by default those of the density papers.
        ablation: What replaces an absent edge.
        metrics: ``"tv"``, ``"kl"``, ``"js"`` (nats), ``"top1"``, ``"nucleus"``, ``"nucleus_size"``, ``"entropy"``
            (of the circuit's prediction, nats), ``"logprob"`` of `target` (nats).
        inverse: Run everything but the circuit, with all skip connections.
        keep_residual: Keep all skip connections, in the circuit or not; by default as the circuit says, else no.
        attention: ``"masked"``, or ``"open"``: absent attention edges are counted but not ablated, as in the
            density papers' public pipeline; by default as the circuit says, else masked.
        position: Which prediction to compare.
        target: Token for ``"logprob"``; by default the model's own most probable one.
        batch_size: Circuits per forward pass.

    Returns:
        The metrics, in the order of `sizes` or of the circuits.

    Raises:
        ValueError: If an argument is not as described, or a value inside the model is not finite.
    """
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    require_metrics(names)
    require_options(ablation, attention, batch_size)
    transformer = as_transformer(model)
    tokens = transformer.tokens(prompt, position)
    if isinstance(ranking_or_circuit, Ranking):
        ranking, circuits = ranking_or_circuit, []
        graph = ranking.graph
    else:
        ranking = None
        circuits = [ranking_or_circuit] if isinstance(ranking_or_circuit, Circuit) else list(ranking_or_circuit)
        _require_circuits(circuits)
        graph = circuits[0].graph
    _require_fit(graph, transformer, len(tokens))
    if target is not None and not 0 <= target < transformer.d_vocab:
        raise ValueError(f"`target` must be a token id from 0 to {transformer.d_vocab - 1}, got {target}.")
    if ranking is None and sizes is not None:
        raise ValueError("`sizes` must be left out for circuits, which have their own.")
    full, _ = transformer.run(tokens)
    if ranking is not None:
        numbers = paper_sizes(graph.n_edges) if sizes is None else as_sizes(sizes, graph.n_edges)
        conditions = Conditions(inverse, bool(keep_residual), attention or "masked")
        logits = run_family(transformer, graph, tokens, ranking.rank, numbers, conditions, batch_size)
    else:
        numbers = torch.tensor([circuit.n_edges for circuit in circuits])
        keeps = circuits[0].keep_residual if keep_residual is None else keep_residual
        conditions = Conditions(inverse, keeps, attention or circuits[0].attention)
        logits = run_circuits(transformer, tokens, circuits, conditions, batch_size)
    token = int(full.argmax()) if target is None else target
    values = {name: METRICS[name](full, logits, token).cpu() for name in names}
    return Evaluation(numbers, values, graph.n_edges)


def require_options(ablation: str, attention: str | None, batch_size: int | None) -> None:
    """Raise a ValueError if an option of running circuits is not one that there is."""
    if ablation != "zero":
        raise ValueError(f"`ablation` must be 'zero' on the token graph, got {ablation!r}.")
    if attention not in (None, *get_args(Attention)):
        raise ValueError(f"`attention` must be one of {list(get_args(Attention))}, got {attention!r}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")


def _require_circuits(circuits: list[Circuit]) -> None:
    if not circuits or not all(isinstance(circuit, Circuit) for circuit in circuits):
        got = type(circuits[0]).__name__ if circuits else "an empty list"
        raise ValueError(f"`ranking_or_circuit` must be a ranking, a circuit or a list of circuits, got {got}.")
    if len({(circuit.keep_residual, circuit.attention) for circuit in circuits}) > 1:
        raise ValueError("`ranking_or_circuit` must be circuits that are all run the same way, got different ones.")


def _require_fit(graph: Graph, transformer: Transformer, n_pos: int) -> None:
    expected = TokenGraph.of(transformer, n_pos)
    if graph != expected:
        raise ValueError(
            f"`ranking_or_circuit` must belong to this model and prompt, whose graph is {expected}, got {graph}."
        )
