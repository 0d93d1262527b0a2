"""Trust: what a small circuit does where it was not looked for."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracedensity.choices import Change
from tracedensity.evaluation import setting_for
from tracedensity.extract import Ranking, rank_edges
from tracedensity.gauge import Gauge
from tracedensity.graph import Graph, flatten
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.ground import Ground
from tracedensity.metric import Metric
from tracedensity.model import as_transformer
from tracedensity.refinement import refined, was_interrupted, whole
from tracedensity.run import Conditions
from tracedensity.score import attribute
from tracedensity.score.baseline import arrival_scores
from tracedensity.situation import Home

if TYPE_CHECKING:
    import pandas as pd

_N_NULL = 200
"""Random circuits that an overlap is compared with."""

_LEFT_OUT = 0.1
"""Share of edges, drawn at random, from which another search may not grow its first circuit: without that it would find
the same one, since most of the way there is no matter of chance."""

_METHODS = {"token": ("norm", "flow", "eap", "eap-ig"), "component": ("eap-ig-midpoint", "eap", "flow")}


@dataclass(frozen=True, eq=False)
class Overlap:
    """How much of a circuit another one shares.

    Attributes:
        other: How the other was found.
        n_edges: Its size.
        faithfulness: Its faithfulness in the circuit's own situation.
        shared: Edges of both.
        jaccard: Edges of both over edges of either.
        null: The same with random circuits, which have as many edges of each kind in each layer as the other.
    """

    other: str
    n_edges: int
    faithfulness: float
    shared: int
    jaccard: float
    null: Float[Tensor, " draw"]

    @property
    def null_high(self) -> float:
        """What one random circuit in twenty exceeds."""
        return float(self.null.quantile(0.95))


@dataclass(frozen=True, eq=False)
class Check:
    """How far a circuit's faithfulness goes beyond what it was found by.

    Attributes:
        circuit: The circuit.
        situations: Name and faithfulness in each situation: its own first, then under other ablations and on
            other prompts, each compared with what the model itself does there.
        complement: Faithfulness of everything but the circuit (on the token graph with all skip connections): near 0
            if nothing else does its work.
        random: Faithfulness of connected random circuits of its size.
        overlaps: What circuits found from other seeds, and circuits of its size by other methods, have in common with
            it.
    """

    circuit: Circuit
    situations: tuple[tuple[str, float], ...]
    complement: float
    random: Float[Tensor, " draw"]
    overlaps: tuple[Overlap, ...]

    @property
    def own(self) -> float:
        """Faithfulness in its own situation."""
        return self.situations[0][1]

    @property
    def worst(self) -> float:
        """The least faithfulness in any situation."""
        return min(reached for _, reached in self.situations)

    def table(self) -> "pd.DataFrame":
        """One row per situation and its faithfulness; then the complement, and random circuits."""
        import pandas as pd

        return pd.DataFrame(self._rows(), columns=["situation", "faithfulness"])

    def _rows(self) -> list[tuple[str, float]]:
        rows = [*self.situations, ("complement: all but the circuit", self.complement)]
        if len(self.random):
            rows.append((f"random: mean of {len(self.random)} of its size", float(self.random.mean())))
            rows.append(("random: the best of them", float(self.random.max())))
        return rows

    def overlap_table(self) -> "pd.DataFrame":
        """One row per other circuit: how it was found, size, faithfulness, shared edges, Jaccard, and the null's."""
        import pandas as pd

        rows = [
            (
                each.other,
                each.n_edges,
                each.faithfulness,
                each.shared,
                each.jaccard,
                float(each.null.mean()),
                each.null_high,
            )
            for each in self.overlaps
        ]
        columns = ["other", "n_edges", "faithfulness", "shared", "jaccard", "null_mean", "null_high"]
        return pd.DataFrame(rows, columns=columns)

    def to_dict(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return {
            "n_edges": self.circuit.n_edges,
            "metric": self.circuit.metric,
            "worst": self.worst,
            "situations": [{"situation": name, "faithfulness": reached} for name, reached in self.situations],
            "complement": self.complement,
            "random": self.random.tolist(),
            "overlaps": self.overlap_table().to_dict(orient="records"),
        }

    def __repr__(self) -> str:
        lines = [f"Check of {self.circuit}", "", f"{'faithfulness':>12}  situation"]
        lines += [f"{reached:>12.3f}  {name}" for name, reached in self._rows()]
        if self.overlaps:
            lines += ["", f"{'Jaccard':>12}{'null 95%':>10}{'edges':>8}{'faithful':>10}  other circuit"]
            for each in self.overlaps:
                numbers = f"{each.jaccard:>12.3f}{each.null_high:>10.3f}{each.n_edges:>8,}{each.faithfulness:>10.3f}"
                lines.append(f"{numbers}  {each.other}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        tables = [self.table(), *([self.overlap_table()] if self.overlaps else [])]
        shown = "".join(table.to_html(index=False, border=0, float_format="{:.3f}".format) for table in tables)
        return f"<p><b>Check</b> {html.escape(repr(self.circuit))}</p>{shown}"


@torch.inference_mode(False)  # where the user is in it: there are no gradients there
def check(
    model: object,
    circuit: Circuit,
    *,
    prompts: Sequence[object] = (),
    swaps: Mapping[str, str] | None = None,
    n_random: int = 20,
    n_seeds: int = 2,
    budget: int | None = None,
    metric: Metric | None = None,
    seed: int = 0,
) -> Check:
    """Run a circuit where it was not looked for, and compare it with others.

    Args:
        model: The model that it was found in.
        circuit: The circuit.
        prompts: Other prompts (or tasks) to run it on, such as a paraphrase; on the token graph just as long.
        swaps: Words of the prompt to swap for others; by default names and nouns are drawn.
        n_random: How many random circuits of its size to run.
        n_seeds: How many times to search again, from other seeds; circuits that were not searched for are compared with
            those of other methods only.
        budget: What each search may spend; by default what the circuit's own was allowed.
        metric: The function that measures the circuit, where it was measured by one of the user's own.
        seed: For whatever is drawn at random.

    Raises:
        ValueError: If `model` is not the one that the circuit was found in, or a prompt does not fit.
    """
    for name, value in (("n_random", n_random), ("n_seeds", n_seeds)):
        if whole(value, name) < 0:
            raise ValueError(f"`{name}` must be at least 0, got {value}.")
    transformer, subject = as_transformer(model), circuit.provenance.subject
    circuit.provenance.require_same_model(transformer)
    wanted = circuit.metric if metric is None else metric
    setting = setting_for(transformer, circuit.graph, subject, circuit.ablation, -1, circuit.provenance.seed)
    conditions = Conditions(False, circuit.keep_residual, circuit.attention, circuit.ablation)
    ground = Ground(circuit.graph, conditions, Gauge.of(setting, circuit.graph, wanted))
    home = Home(transformer, subject, ground, wanted, seed)
    kept = flatten(circuit.graph, circuit.kept)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    situations = [
        (each.name, float(each.tried(kept[None]).faithfulness))
        for each in home.situations(get_args(Change), prompts=prompts, swaps=swaps)
    ]
    generator = torch.Generator().manual_seed(seed)
    drawn = [_random_circuit(ground, circuit, generator) for _ in range(n_random)]
    random = ground.tried(torch.stack(drawn)).faithfulness if drawn else torch.empty(0, dtype=torch.float64)
    rest = Ground(circuit.graph, replace(conditions, inverse=True), ground.gauge)
    others = [*_searched_again(home, circuit, n_seeds, budget), *_by_other_methods(model, ground, circuit)]
    overlaps = tuple(_overlap(ground, circuit, name, other, generator) for name, other in others)
    return Check(circuit, tuple(situations), float(rest.tried(kept[None]).faithfulness), random, overlaps)


def _random_circuit(ground: Ground, circuit: Circuit, generator: torch.Generator) -> Bool[Tensor, " edge"]:
    """A connected circuit of the same size, grown from the output at random."""
    arrival = arrival_scores(circuit.graph, generator)
    return _first(ground, rank_edges(circuit.graph, arrival, "top", circuit.provenance), circuit)


def _first(ground: Ground, ranking: Ranking, circuit: Circuit) -> Bool[Tensor, " edge"]:
    """As many edges as a circuit has, those aside that are kept anyhow."""
    kept = flatten(circuit.graph, circuit.kept)
    place = flatten(ranking.graph, ranking.postponed(~ground.free).rank)
    return (place < int((kept & ground.free).sum())) | (kept & ~ground.free)


def _searched_again(
    home: Home, circuit: Circuit, n_seeds: int, budget: int | None
) -> list[tuple[str, Bool[Tensor, " edge"]]]:
    """Circuits of searches in the same situations, from other seeds and from the whole graph; none after Ctrl-C."""
    known = circuit.certificate
    if known is None:
        return []
    grounds, note = [home.ground], ""
    if known.situations:
        drawn = replace(home, seed=circuit.provenance.seed).situations(get_args(Change))
        found_again = [each for each in drawn if each.name in known.situations]
        grounds, note = (found_again, "") if len(found_again) == len(known.situations) else (grounds, ", at home only")
    everything = circuit.of_edges(dict(circuit.graph.exists))
    found = []
    for seed in range(known.seed + 1, known.seed + 1 + n_seeds):
        other = refined(
            grounds, everything, min(known.target, 1.0), budget=known.budget if budget is None else budget, seed=seed,
            left_out=_LEFT_OUT,
        )  # fmt: skip
        if was_interrupted(other):
            break
        found.append((f"search with seed {seed}{note}", flatten(circuit.graph, other.kept)))
    return found


def _by_other_methods(model: object, ground: Ground, circuit: Circuit) -> list[tuple[str, Bool[Tensor, " edge"]]]:
    """Circuits of the same size that other methods of attribution give."""
    name, options = "component" if isinstance(circuit.graph, ComponentGraph) else "token", _options(circuit.graph)
    found = []
    for method in _METHODS[name]:
        if options.get("neurons") and not method.startswith("eap"):
            continue
        scores = attribute(
            model, circuit.provenance.subject, graph=name, method=method, ablation=circuit.ablation,
            seed=circuit.provenance.seed, **options,
        )  # fmt: skip
        other = _first(ground, scores.rank(), circuit)
        if method != circuit.provenance.method or not torch.equal(other, flatten(circuit.graph, circuit.kept)):
            found.append((f"{method}, the first {int((other & ground.free).sum()):,} edges", other))
    return found


def _options(graph: Graph) -> dict[str, Any]:
    """What `attribute` has to be told to score the edges of this very graph."""
    if isinstance(graph, ComponentGraph):
        return {"ungroup": graph.ungrouped, "positions": graph.n_pos is not None}
    return {"neurons": "neuron" in graph.shapes}


def _overlap(
    ground: Ground, circuit: Circuit, name: str, other: Bool[Tensor, " edge"], generator: torch.Generator
) -> Overlap:
    kept = flatten(circuit.graph, circuit.kept)
    null = torch.stack([_jaccard(kept, _alike(circuit.graph, other, generator)) for _ in range(_N_NULL)])
    reached = float(ground.tried(other[None]).faithfulness)
    return Overlap(name, int(other.sum()), reached, int((kept & other).sum()), float(_jaccard(kept, other)), null)


def _jaccard(one: Bool[Tensor, " edge"], other: Bool[Tensor, " edge"]) -> Float[Tensor, ""]:
    return (one & other).sum().double() / (one | other).sum().clamp(min=1)


def _alike(graph: Graph, kept: Bool[Tensor, " edge"], generator: torch.Generator) -> Bool[Tensor, " edge"]:
    """Random edges, as many of each kind into each layer as a circuit has (on the component graph into each reader)."""
    groups = _groups(graph)
    order = torch.argsort(groups + torch.rand(len(kept), generator=generator, dtype=torch.float64))
    counts = torch.bincount(groups, weights=kept.double()).long()
    first = torch.cat([counts.new_zeros(1), torch.bincount(groups).cumsum(0)])[:-1]
    place = torch.arange(len(kept)) - first[groups[order]]
    drawn = torch.zeros_like(kept)
    drawn[order[place < counts[groups[order]]]] = True
    return drawn


def _groups(graph: Graph) -> Int[Tensor, " edge"]:
    """A number for each kind of edge and layer, or for each reader."""
    numbers: dict[str, Tensor] = {}
    start = 0
    for kind, shape in graph.shapes.items():
        axis = 1 if kind == "edge" else 0
        view = [1] * len(shape)
        view[axis] = shape[axis]
        numbers[kind] = (start + torch.arange(shape[axis])).view(view).expand(shape)
        start += shape[axis]
    return flatten(graph, numbers)
