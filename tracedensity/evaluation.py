"""Evaluation: what the circuits of a ranking predict, at many sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.choices import Attention
from tracedensity.choices import Metric as MetricName
from tracedensity.extract import Ranking
from tracedensity.faithfulness import CONVERSIONS, METRICS
from tracedensity.gauge import Measuring, empty_values, recovered
from tracedensity.graph import Graph
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import TokenGraph
from tracedensity.metric import QUESTIONS, Metric, named_metric
from tracedensity.model import Transformer, as_transformer
from tracedensity.run import Conditions, run_circuits, run_family
from tracedensity.setting import Setting, component_setting, token_setting

if TYPE_CHECKING:
    import pandas as pd

Sizes: TypeAlias = Sequence[SupportsIndex] | Sequence[float] | Tensor | np.ndarray
"""Numbers of edges."""

RELATIVE_SIZES = (
    1e-5, 2e-5, 4e-5, 8e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1e-3, 1.2e-3, 1.4e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3,
    1e-2, 2e-2, 4e-2, 6e-2, 8e-2, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0,
)  # fmt: skip
"""Sizes of the density papers, as shares of all edges (arXiv 2605.27033)."""


BENCHMARK_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Sizes of the circuits of the MIB benchmark, as shares of all edges (arXiv 2504.13151)."""


def benchmark_sizes(n_edges: int) -> Int[Tensor, " circuit"]:
    """`BENCHMARK_SIZES` as numbers of edges, rounded down as in the benchmark."""
    return torch.tensor([int(share * n_edges) for share in BENCHMARK_SIZES])


def paper_sizes(n_edges: int) -> Int[Tensor, " circuit"]:
    """`RELATIVE_SIZES` as numbers of edges, rounded down as in the papers; small graphs repeat sizes."""
    return torch.tensor([int(share * n_edges) for share in RELATIVE_SIZES])


def as_sizes(sizes: Sizes, n_edges: int) -> Int[Tensor, " circuit"]:
    """Numbers of edges, checked.

    Raises:
        ValueError: If they are no whole numbers from 0 to the edges of the graph.
    """
    try:
        numbers = torch.as_tensor(list(sizes) if isinstance(sizes, range) else sizes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`sizes` must be a list of whole numbers of edges, got {sizes!r}.") from error
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
        metrics: Values of each metric, mean over examples.
        n_edges: Edges of the whole graph.
        per_example: Values of each metric on each example.
        full: Values of the whole model, on each example.
        empty: Values of the circuit without edges, in which everything is ablated; on the component graph only.
        pruned_sizes: Numbers of edges on a path from the input to the logits; on the component graph only.
        shares: What sizes are as shares of all edges, before they were rounded down, where shares were asked for.
    """

    sizes: Int[Tensor, " circuit"]
    metrics: Mapping[str, Float[Tensor, " circuit"]]
    n_edges: int
    per_example: Mapping[str, Float[Tensor, "circuit example"]] = field(repr=False)
    full: Mapping[str, Float[Tensor, " example"]] = field(repr=False)
    empty: Mapping[str, Float[Tensor, " example"]] | None = field(default=None, repr=False)
    pruned_sizes: Int[Tensor, " circuit"] | None = None
    shares: Float[Tensor, " circuit"] | None = field(default=None, repr=False)

    def faithfulness(self, metric: str | None = None) -> Float[Tensor, " circuit"]:
        """How much of the model each circuit keeps.

        For metrics that compare with the model's prediction (tv, kl, js, top1, nucleus) the mean over examples of
        `tracedensity.faithfulness.faithfulness`; for those that say how well a question is answered
        ``(m(circuit) - m(empty)) / (m(model) - m(empty))`` with means over examples, which may exceed 1.

        Args:
            metric: One of the metrics that were measured; by default the first.

        Raises:
            ValueError: If it was not measured, is no measure of faithfulness, or does not tell the model from the empty
                circuit.
        """
        metric = next(iter(self.metrics)) if metric is None else metric
        if metric not in self.metrics:
            raise ValueError(f"`metric` must be one that was measured, {list(self.metrics)}, got {metric!r}.")
        if metric in CONVERSIONS:
            return CONVERSIONS[metric](self.per_example[metric]).mean(1)
        if self.empty is None or metric in METRICS:
            raise ValueError(
                f"`metric` must be a measure of faithfulness, such as {list(CONVERSIONS)}, got {metric!r}."
            )
        return recovered(self.metrics[metric].double(), self.full[metric], self.empty[metric])

    def cpr(self, metric: str | None = None, *, log: bool = False) -> float:
        """Circuit performance ratio of the MIB benchmark: area under faithfulness over the share of edges.

        Trapezoids between the shares that were run, which the benchmark takes from 0.1% to all (`BENCHMARK_SIZES`, the
        default of `evaluate`, its numbers of edges being rounded down); a ranking whose circuits all have a
        faithfulness of 1 has 0.999. For rankings by signed effects.

        Args:
            metric: As for `faithfulness`.
            log: Take the area over log10 of the share instead, in which small circuits weigh as much as large ones.
        """
        return self._area(self.faithfulness(metric), log)

    def cmd(self, metric: str | None = None, *, log: bool = False) -> float:
        """Circuit-model distance of the MIB benchmark: area of ``|1 - faithfulness|``; rank by size of effect."""
        return self._area((1 - self.faithfulness(metric)).abs(), log)

    def _area(self, height: Tensor, log: bool) -> float:
        share, order = (self.sizes.double() / self.n_edges if self.shares is None else self.shares).sort()
        if len(share) < 2 or (log and share[0] == 0):
            raise ValueError(f"`sizes` must be two or more{' above 0' * log} for an area, got {self.sizes.tolist()}.")
        return float(torch.trapezoid(height.double()[order], share.log10() if log else share))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per circuit: `size`, `fraction`, `pruned_size` on the component graph, and the metrics."""
        import pandas as pd

        columns = {name: value.tolist() for name, value in self.metrics.items()}
        if self.empty is not None and self.pruned_sizes is not None:
            columns = {"pruned_size": self.pruned_sizes.tolist(), **columns}
        fraction = (self.sizes / self.n_edges).tolist()
        return pd.DataFrame({"size": self.sizes.tolist(), "fraction": fraction, **columns})

    def __repr__(self) -> str:
        return f"Evaluation({len(self.sizes)} circuits, {', '.join(self.metrics)})"

    def _repr_html_(self) -> str:
        return self.to_dataframe().to_html(index=False, border=0)


def evaluate(
    model: object,
    prompt: object,
    ranking_or_circuit: Ranking | Circuit | Sequence[Circuit],
    sizes: Sizes | None = None,
    *,
    ablation: str | None = None,
    metrics: MetricName | str | Metric | Sequence[MetricName | str | Metric] | None = None,
    inverse: bool = False,
    keep_residual: bool | None = None,
    attention: Attention | str | None = None,
    position: int = -1,
    target: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Run circuits in place of the model and compare their predictions with its own.

    All circuits go through the model together, as many per forward pass as memory allows. On the token graph an absent
    edge adds nothing (zero ablation); everything else is computed anew from the masked stream. On the component graph
    each reader gets, for an absent edge, what the ablated writer would have written; all that is present is computed
    anew from patched inputs.

    Nothing asks that it be the model or the prompt that was scored, as long as the graph is the same: so a circuit
    can be tried on another checkpoint, prompt or task. `Circuit.verify` does ask.

    Args:
        model: A model of TransformerLens, or a name for `load_model`.
        prompt: Text, token ids, or a ``[pos]`` tensor; on the token graph as long as the one that was scored. On the
            component graph a `Task` as well.
        ranking_or_circuit: A ranking, or one or more circuits.
        sizes: Numbers of edges, for a ranking; by default those of the density papers on the token graph, those of the
            MIB benchmark on the component graph.
        ablation: What replaces an absent edge, see `attribute`; by default as the circuit or the ranking's scores had
            it.
        metrics: ``"tv"``, ``"kl"``, ``"js"`` (nats), ``"top1"``, ``"nucleus"``, ``"nucleus_size"``, ``"entropy"``
            (of the circuit's prediction, nats), ``"logit_diff"``, ``"prob_diff"``, ``"logprob"`` of the answer or of
            `target` (nats), or functions as for `attribute`. By default tv, kl and top1, after the metric of a task.
        inverse: Run everything but the circuit; on the token graph with all skip connections.
        keep_residual: Keep all skip connections, in the circuit or not; by default as the circuit says, else no.
        attention: ``"masked"``, or ``"open"``: absent attention edges are counted but not ablated, as in the
            density papers' public pipeline; by default as the circuit says, else masked.
        position: Which prediction to compare. Tasks have their own.
        target: Token for ``"logprob"``; by default the answer, or the model's own most probable token.
        seed: For tokens drawn at random; by default that of the scores.
        batch_size: Circuits per forward pass.

    Returns:
        The metrics, in the order of `sizes` or of the circuits.

    Raises:
        ValueError: If an argument is not as described, or a value inside the model is not finite.
    """
    transformer = as_transformer(model)
    if isinstance(ranking_or_circuit, Ranking):
        ranking, circuits = ranking_or_circuit, []
        graph, usual = ranking.graph, ranking.provenance.ablation
    else:
        ranking = None
        circuits = _as_circuits(ranking_or_circuit)
        graph, usual = circuits[0].graph, circuits[0].ablation
    require_options(graph, attention, keep_residual, batch_size)
    provenance = (circuits[0] if ranking is None else ranking).provenance
    seed = provenance.seed if seed is None else seed
    if target is not None and not 0 <= target < transformer.d_vocab:
        raise ValueError(f"`target` must be a token id from 0 to {transformer.d_vocab - 1}, got {target}.")
    if ranking is None and sizes is not None:
        raise ValueError("`sizes` must be left out for circuits, which have their own.")
    setting = setting_for(transformer, graph, prompt, usual if ablation is None else ablation, position, seed)
    if target is not None:
        setting = setting.answered(target)
    named = named_metrics(metrics, setting)
    measure = Measuring(setting, named)
    shares = None
    if ranking is not None:
        default = paper_sizes if isinstance(graph, TokenGraph) else benchmark_sizes
        numbers = default(graph.n_edges) if sizes is None else as_sizes(sizes, graph.n_edges)
        if sizes is None:
            usual_shares = RELATIVE_SIZES if isinstance(graph, TokenGraph) else BENCHMARK_SIZES
            shares = torch.tensor(usual_shares, dtype=torch.float64)
        conditions = Conditions(inverse, bool(keep_residual), attention or "masked", setting.ablation)
        values = run_family(setting, graph, ranking.rank, numbers, conditions, measure, batch_size)
    else:
        numbers = torch.tensor([circuit.n_edges for circuit in circuits])
        keeps = circuits[0].keep_residual if keep_residual is None else keep_residual
        conditions = Conditions(inverse, keeps, attention or circuits[0].attention, setting.ablation)
        values = run_circuits(setting, circuits, conditions, measure, batch_size)
    values = {name: values[name].cpu() if len(numbers) else torch.empty(0, len(setting.prompts)) for name in named}
    means = {name: value.mean(1) for name, value in values.items()}
    full = {name: value[0].cpu() for name, value in measure(setting.clean_logits[None], slice(None)).items()}
    if isinstance(graph, TokenGraph):
        return Evaluation(numbers, means, graph.n_edges, values, full, shares=shares)
    if ranking is not None:
        after = ranking.sizes_after_pruning(numbers)
    else:
        after = torch.tensor([circuit.pruned_size for circuit in circuits])
    empty = empty_values(setting, graph, measure)
    return Evaluation(numbers, means, graph.n_edges, values, full, empty, after, shares)


def setting_for(
    model: Transformer, graph: Graph, prompt: object, ablation: str | None, position: int, seed: int
) -> Setting:
    """The setting in which circuits of a graph are run.

    Raises:
        ValueError: If the graph is not that of the model and the prompt.
    """
    if isinstance(graph, ComponentGraph):
        setting = component_setting(model, prompt, ablation, position, seed)
        n_pos = setting.common_length() if graph.n_pos is not None else None
        neurons = bool(graph.d_mlp)
        fitting = [ComponentGraph.of(model, n_pos=n_pos, ungroup=each, neurons=neurons) for each in (False, True)]
    else:
        assert isinstance(graph, TokenGraph)
        neurons = graph.d_mlp is not None
        setting = token_setting(model, prompt, ablation, position, seed, neurons=neurons)
        fitting = [TokenGraph.of(model, setting.prompts.tokens.shape[1], neurons=neurons)]
    if graph not in fitting:
        raise ValueError(
            f"`ranking_or_circuit` must belong to this model and prompt, whose graph is {fitting[0]}, got {graph}."
        )
    return setting


def named_metrics(metrics: str | Metric | Sequence[str | Metric] | None, setting: Setting) -> dict[str, str | Metric]:
    """What is to be measured, by name.

    Raises:
        ValueError: If there is no such metric, or the task has no answers for it.
    """
    if metrics is None:
        own = [named_metric(None, setting.examples)[0]] if setting.asked else []
        metrics = (*own, "tv", "kl", "top1")
    given = [metrics] if isinstance(metrics, str) or callable(metrics) else list(metrics)
    known = list(dict.fromkeys([*METRICS, *QUESTIONS]))
    unknown = [each for each in given if isinstance(each, str) and each not in known]
    if unknown or not given:
        raise ValueError(f"`metrics` must be some of {known} or functions, got {unknown or 'none'}.")
    named: dict[str, str | Metric] = {}
    for each in given:
        if isinstance(each, str) and each in METRICS:
            name, metric = each, each
        else:
            name, metric = named_metric(each, setting.examples)
        if named.setdefault(name, metric) is not metric:
            raise ValueError(f"`metrics` must be functions of different names, got two called {name!r}.")
    return named


def require_options(graph: Graph, attention: str | None, keep_residual: bool | None, batch_size: int | None) -> None:
    """Raise a ValueError if an option of running circuits is not one that there is."""
    if attention not in (None, *get_args(Attention)):
        raise ValueError(f"`attention` must be one of {list(get_args(Attention))}, got {attention!r}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if not isinstance(graph, TokenGraph) and (attention == "open" or keep_residual):
        raise ValueError("`keep_residual` and `attention` must be left out but on the token graph: they mean nothing.")


def _as_circuits(given: object) -> list[Circuit]:
    circuits: list[Any] = list(given) if isinstance(given, Sequence) else [given]
    if not circuits or not all(isinstance(circuit, Circuit) for circuit in circuits):
        got = type(circuits[0]).__name__ if circuits else "an empty list"
        hint = " Rank scores first: `scores.rank()`." if got == "Scores" else ""
        raise ValueError(f"`ranking_or_circuit` must be a ranking, a circuit or a list of circuits, got {got}.{hint}")
    if len({(circuit.keep_residual, circuit.attention, circuit.ablation) for circuit in circuits}) > 1:
        raise ValueError("`ranking_or_circuit` must be circuits that are all run the same way, got different ones.")
    return circuits
