"""Circuits: a choice of edges, and what it was chosen for."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tracedensity.choices import Attention, FaithfulnessMetric
from tracedensity.graph import Graph, flatten, pruned, unflatten
from tracedensity.graph.component import ComponentGraph
from tracedensity.provenance import Provenance

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd
    import plotly.graph_objects as go

    from tracedensity.evaluation import Evaluation
    from tracedensity.metric import Metric
    from tracedensity.plot import Theme
    from tracedensity.score import Scores
    from tracedensity.trust import Check


@dataclass(frozen=True, eq=False)
class Certificate:
    """What a search for a small circuit did, and what is known of the circuit that it found.

    The faithfulness itself is the circuit's own, measured once more when the search was over; anybody can measure it
    again with `Circuit.verify`.

    Attributes:
        target: Faithfulness that was asked for.
        budget: What the search was allowed to spend, in plain forward passes over the prompt or task.
        passes: What it spent: a run of a circuit counts 1, one with gradients 3.
        seed: Seed of what was drawn at random.
        start_size: Size of the circuit from which the search started; of the whole graph if that one was not faithful.
        n_candidates: Edges of the circuit that a search may take away: those that its conditions do not keep anyhow.
        needed: For each kind of edge, those without which the circuit was run and fell short of the target.
        minimum: Whether all circuits with fewer edges were run as well, and fell short.
        interrupted: Whether the search was interrupted before it had spent its budget.
        situations: Where the circuit has to be faithful, if that is not only where it is at home.
        worst: The least faithfulness in these situations.
    """

    target: float
    budget: int
    passes: int
    seed: int
    start_size: int
    n_candidates: int
    needed: Mapping[str, Bool[Tensor, "..."]] = field(repr=False)
    minimum: bool = False
    interrupted: bool = False
    situations: tuple[str, ...] = ()
    worst: float | None = None

    @property
    def n_needed(self) -> int:
        """Number of edges none of which can go by itself."""
        return sum(int(mask.sum()) for mask in self.needed.values())

    @property
    def one_minimal(self) -> bool:
        """Whether no edge at all can go by itself. Several together may still be able to."""
        return self.n_needed == self.n_candidates

    def to_dict(self) -> dict[str, Any]:
        """As what JSON can hold; of the edges that are needed their number."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "needed"}
        known = {"n_needed": self.n_needed, "one_minimal": self.one_minimal}
        return {**values, "situations": list(self.situations), **known}

    def __str__(self) -> str:
        if self.minimum:
            known = "no smaller circuit is that faithful"
        elif self.one_minimal:
            known = "no edge can go by itself"
        else:
            known = f"{self.n_needed:,} of {self.n_candidates:,} edges are known to be needed"
        stopped = ", interrupted" if self.interrupted else ""
        where = f" in {len(self.situations)} situations" if self.situations else ""
        return f"asked for {self.target:g}{where}, {known}; {self.passes:,} of {self.budget:,} passes spent{stopped}"


@dataclass(frozen=True, eq=False)
class Circuit:
    """Some edges of a graph, which can be run in place of the whole model.

    Attributes:
        graph: What the edges are.
        kept: For each kind of edge, which of them are in the circuit.
        provenance: The model and prompt that the edges were chosen for.
        ablation: What replaces an absent edge.
        keep_residual: Whether skip connections are all kept when the circuit is run, in it or not.
        attention: "masked", or "open" if absent attention edges are counted but not ablated.
        metric: What faithfulness means here, a name of `tracedensity.faithfulness`.
        faithfulness: Measured faithfulness on the prompt; None if the circuit has not been run.
        certificate: What is known of it, if it was made as small as a search could make it (`td.refine`).
    """

    graph: Graph
    kept: Mapping[str, Bool[Tensor, "..."]]
    provenance: Provenance
    ablation: str = "zero"
    keep_residual: bool = False
    attention: Attention | str = "masked"
    metric: FaithfulnessMetric | str = "tv"
    faithfulness: float | None = None
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        shapes = {kind: tuple(mask.shape) for kind, mask in self.kept.items()}
        if shapes != dict(self.graph.shapes):
            raise ValueError(f"`kept` must have the shapes of the graph, {dict(self.graph.shapes)}, got {shapes}.")
        for kind, mask in self.kept.items():
            if (mask & ~self.graph.exists[kind]).any():
                raise ValueError(f"`kept` must hold edges of the graph only, got others of kind {kind!r}.")

    @cached_property
    def n_edges(self) -> int:
        """Number of edges in the circuit."""
        return sum(self.composition().values())

    @property
    def fraction(self) -> float:
        """Share of the graph's edges that are in the circuit."""
        return self.n_edges / self.graph.n_edges

    def composition(self) -> dict[str, int]:
        """Number of edges of each kind."""
        return {kind: int(mask.sum()) for kind, mask in self.kept.items()}

    def edge_names(self) -> list[str]:
        """Names of the edges, kind by kind."""
        return [
            self.graph.edge_name(kind, tuple(index))
            for kind, mask in self.kept.items()
            for index in mask.nonzero().tolist()
        ]

    def pruned(self) -> "Circuit":
        """The circuit without dead ends: only edges on a path from an input to the output.

        On the component graph with a counterfactual it predicts the same: what a dead end would have written is the
        ablated value. Under other ablations a writer without in-edges writes what it makes of ablated input.
        """
        flat = pruned(self.graph, flatten(self.graph, self.kept))
        return self.of_edges(unflatten(self.graph, flat, False))

    def of_edges(self, kept: Mapping[str, Bool[Tensor, "..."]]) -> "Circuit":
        """Other edges for the same prompt, run the same way; what was known of these is not known of those."""
        return replace(self, kept=kept, faithfulness=None, certificate=None)

    def at_home(self) -> "Circuit":
        """The circuit as one that was only asked to be faithful where it is at home.

        Which of its edges are needed there is another question than which are needed in all situations.
        """
        if self.certificate is None or not self.certificate.situations:
            return self
        unknown = {kind: torch.zeros_like(mask) for kind, mask in self.kept.items()}
        return replace(
            self, certificate=replace(self.certificate, needed=unknown, minimum=False, situations=(), worst=None)
        )

    @cached_property
    def pruned_size(self) -> int:
        """Number of edges on a path from an input to the output."""
        return self.pruned().n_edges

    def nodes(self) -> list[str]:
        """Names of the nodes that edges of the circuit leave or enter, in order of the edges."""
        names: dict[str, None] = {}
        for kind, mask in self.kept.items():
            for index in mask.nonzero().tolist():
                names |= dict.fromkeys(self.graph.ends(kind, tuple(index))[:2])
        return list(names)

    # What is made of two circuits has all but its edges from the first.

    def __or__(self, other: "Circuit") -> "Circuit":
        """Edges of either."""
        return self._with(other, torch.logical_or)

    def __and__(self, other: "Circuit") -> "Circuit":
        """Edges of both."""
        return self._with(other, torch.logical_and)

    def __sub__(self, other: "Circuit") -> "Circuit":
        """Edges of this one that are not of the other."""
        return self._with(other, lambda here, there: here & ~there)

    def jaccard(self, other: "Circuit") -> float:
        """Edges of both over edges of either; 1 for two empty circuits."""
        either = (self | other).n_edges
        return (self & other).n_edges / either if either else 1.0

    def _with(self, other: "Circuit", operation: Callable[[Tensor, Tensor], Tensor]) -> "Circuit":
        if not isinstance(other, Circuit):
            raise TypeError(f"`other` must be a circuit, got a {type(other).__name__}.")
        if self.graph != other.graph:
            raise ValueError(f"`other` must be a circuit of the same graph, {self.graph}, got {other.graph}.")
        return self.of_edges({kind: operation(mask, other.kept[kind]) for kind, mask in self.kept.items()})

    def subgraph(self, *, layers: Sequence[int] | None = None, heads: Sequence[str] | None = None) -> "Circuit":
        """The edges with both ends in some layers, or with an end at some heads; see `ComponentGraph.select`.

        Raises:
            ValueError: If the circuit is not of a component graph, or there is no such layer or head.
        """
        if not isinstance(self.graph, ComponentGraph):
            raise ValueError(
                f"`circuit` must be of a component graph for this, got one of {type(self.graph).__name__}."
            )
        chosen = self.graph.select(layers=layers, heads=heads)
        return self.of_edges({kind: mask & chosen[kind] for kind, mask in self.kept.items()})

    def to_networkx(self, scores: "Scores | None" = None) -> "nx.MultiDiGraph":
        """As a networkx graph; see `tracedensity.exchange`, which also writes GraphML and the MIB benchmark's JSON."""
        from tracedensity.exchange import to_networkx

        return to_networkx(self, scores)

    def to_dot(self, scores: "Scores | None" = None) -> str:
        """As text in the DOT language of Graphviz."""
        from tracedensity.exchange import to_dot

        return to_dot(self, scores)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per edge: its name and kind.

        On the token graph its layer, and for heads `head`, `src`, `dest` (else `pos`, and `neuron`); on the component
        graph `source`, `target` and `read_as`.
        """
        import pandas as pd

        if isinstance(self.graph, ComponentGraph):
            places = self.kept["edge"].nonzero().tolist()
            rows = [
                (self.graph.edge_name("edge", tuple(place)), "edge", *self.graph.ends("edge", tuple(place)))
                for place in places
            ]
            return pd.DataFrame(rows, columns=["edge", "kind", "source", "target", "read_as"])
        columns = {4: ("layer", "head", "dest", "src"), 3: ("layer", "pos", "neuron"), 2: ("layer", "pos")}
        frames = []
        for kind, mask in self.kept.items():
            frame = pd.DataFrame(mask.nonzero().numpy(), columns=list(columns[mask.dim()]))
            frame.insert(0, "kind", kind)
            frames.append(frame)
        table = pd.concat(frames, ignore_index=True)
        table.insert(0, "edge", self.edge_names())
        return table.astype({name: "Int64" for name in table.columns if name not in ("edge", "kind")})

    def verify(self, model: object, metric: "Metric | None" = None) -> "Circuit":
        """Run the circuit again and return it with the faithfulness just measured.

        Args:
            model: The model that it was found in.
            metric: The function that measures it, where it was measured by one of the user's own.

        Raises:
            ValueError: If `model` is not the one that the circuit was found in.
        """
        return replace(self, faithfulness=float(self.rerun(model, metric).faithfulness()[0]))

    def rerun(
        self, model: object, metric: "Metric | None" = None, others: "Sequence[Circuit] | None" = None
    ) -> "Evaluation":
        """Run the circuit, or others made of it, on its own prompt or task, measured by its own metric.

        Args:
            model: The model that it was found in.
            metric: The function that measures it, where it was measured by one of the user's own.
            others: What to run in its place.

        Raises:
            ValueError: If `model` is not the one that the circuit was found in, or prompt or metric are not known.
        """
        from tracedensity.evaluation import evaluate
        from tracedensity.faithfulness import CONVERSIONS
        from tracedensity.metric import QUESTIONS
        from tracedensity.model import as_transformer

        subject, transformer = self.provenance.subject, as_transformer(model)
        self.provenance.require_same_model(transformer)
        if metric is None and self.metric not in (*CONVERSIONS, *QUESTIONS):
            raise ValueError(f"`metric` must be given, the function {self.metric!r} that the circuit was measured by.")
        name = self.metric if metric is None else metric
        return evaluate(transformer, subject, self if others is None else others, metrics=(name,))

    def check(
        self,
        model: object,
        *,
        prompts: "Sequence[object]" = (),
        swaps: Mapping[str, str] | None = None,
        n_random: int = 20,
        n_seeds: int = 2,
        budget: int | None = None,
        metric: "Metric | None" = None,
        seed: int = 0,
    ) -> "Check":
        """Run the circuit under other ablations and on other prompts, and compare it with others.

        A circuit can be small and right, or small and lucky: found among very many to fit one prompt under one
        ablation. A right one does more than it was found by.

        Args:
            model: The model that it was found in.
            prompts: Other prompts (or tasks), such as a paraphrase; on the token graph just as long in tokens.
            swaps: Words of the prompt to swap for others; by default names and nouns are drawn.
            n_random: How many random circuits of its size to run beside it.
            n_seeds: How many times to search for a circuit again, if this one was searched for.
            budget: What each search may spend; by default what the circuit's own was allowed.
            metric: The function that measures it, where it was measured by one of the user's own.
            seed: For whatever is drawn at random.

        Raises:
            ValueError: If `model` is not the one that the circuit was found in, or a prompt does not fit.
        """
        from tracedensity.trust import check

        return check(
            model, self, prompts=prompts, swaps=swaps, n_random=n_random, n_seeds=n_seeds, budget=budget, metric=metric,
            seed=seed,
        )  # fmt: skip

    def save(self, path: str | PathLike[str]) -> None:
        """Write to one safetensors file, metadata included; `td.load` reads it."""
        from tracedensity.files import circuit_file, replace_file

        replace_file(path, circuit_file(self))

    def plot(self, scores: "Scores | None" = None, *, theme: "Theme | str" = "light", **options: Any) -> "go.Figure":
        """The circuit: tokens across and layers up, or on the component graph heads and MLPs, layers up.

        Args:
            scores: Scores of its graph, by which edges are wider or narrower.
            theme: "light" or "dark".
            options: On the token graph, those of `tracedensity.plot.plot_circuit`.
        """
        from tracedensity.plot import plot_circuit, plot_component

        draw = plot_component if isinstance(self.graph, ComponentGraph) else plot_circuit
        return draw(self, scores=scores, theme=theme, **options)

    def __repr__(self) -> str:
        measured = "not run" if self.faithfulness is None else f"faithfulness {self.faithfulness:.3f}"
        known = "" if self.certificate is None else f"; {self.certificate}"
        return f"Circuit({self.n_edges} of {self.graph.n_edges} edges, {measured}, {self.provenance}{known})"

    def _repr_html_(self) -> str:
        kinds = "".join(f"<th>{html.escape(kind)}</th>" for kind in self.kept)
        counts = [(n, int(self.graph.exists[kind].sum())) for kind, n in self.composition().items()]
        cells = "".join(f"<td>{n:,} of {n_all:,}</td>" for n, n_all in counts)
        table = f"<table><thead><tr>{kinds}</tr></thead><tbody><tr>{cells}</tr></tbody></table>"
        return f"<p>{html.escape(repr(self))}</p>{table}"
