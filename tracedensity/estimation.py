"""Estimation: from a model and a prompt to a density curve."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, SupportsIndex, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.alert import alert
from tracedensity.choices import (
    Attention,
    Change,
    DensityMethod,
    FaithfulnessMetric,
    Family,
    GraphName,
    Question,
)
from tracedensity.choices import Metric as MetricName
from tracedensity.curve import THRESHOLDS, DensityCurve, Points, crossings, each_of, require_thresholds
from tracedensity.evaluation import Sizes, as_sizes, named_metrics, paper_sizes, require_options
from tracedensity.exhaustive import best_of_each_size, require_few
from tracedensity.extract import Ranking, rank_edges
from tracedensity.faithfulness import CONVERSIONS, entropy
from tracedensity.gauge import Gauge
from tracedensity.graph import flatten, unflatten
from tracedensity.graph.circuit import Certificate, Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.ground import Ground
from tracedensity.metric import QUESTIONS, Metric
from tracedensity.model import Prompt, Transformer, as_transformer
from tracedensity.pooling import Asked, Asking, alone, together
from tracedensity.refinement import refined, was_interrupted, whole
from tracedensity.run import Conditions
from tracedensity.score import Scores, scored
from tracedensity.score.baseline import arrival_scores
from tracedensity.setting import Setting, rows_at_once
from tracedensity.situation import USUAL, Home
from tracedensity.task import Task, several_prompts
from tracedensity.tight import TightCurve

T = TypeVar("T")

PRECISION = 0.02
"""A crossing of a threshold is known to this share of its size, or to one edge."""

_USUAL_LENGTH = 64
"""Tokens that prompts are taken to have where it is decided how many of them are worked on at a time."""

_BUDGET = 400
"""Passes that a search may spend on a threshold, if nothing else is said."""

BEST = {"token": ("norm", "norm-l2", "flow", "eap", "eap-ig-layers"), "component": (None, "eap", "flow")}
"""Methods whose rankings the method "best" tries, the usual one of the graph first."""


@torch.inference_mode(False)  # where the user is in it: there are no gradients there
def density(
    model: object,
    prompt: object,
    *,
    graph: GraphName | str = "token",
    method: DensityMethod | str | None = None,
    family: Family | str = "greedy",
    signed: bool = False,
    thresholds: Sequence[float | int] = THRESHOLDS,
    metric: FaithfulnessMetric | Question | str | Metric | None = None,
    also: Sequence[MetricName | str | Metric] = (),
    ablation: str | None = None,
    steps: int = 5,
    ungroup: bool = False,
    positions: bool = False,
    keep_residual: bool = False,
    attention: Attention | str = "masked",
    sizes: Sizes = (),
    per_example: bool = False,
    refine: bool = False,
    budget: SupportsIndex = _BUDGET,
    robust: bool | Sequence[Change | str] = False,
    baselines: bool = True,
    position: int = -1,
    seed: int = 0,
    batch_size: int | None = None,
    attention_mask: object = None,
) -> Any:
    """How small a circuit can be and still reproduce a prediction, at each faithfulness.

    Scores every edge, orders them, runs the circuits of the density papers' 27 sizes, and then circuits
    between them until every crossing of a threshold that these sizes show is known to 2% or one edge.

    Such a minimal size is an upper bound, and the published one is a loose one. Tighter ones: ``method="best"`` takes
    the best of several rankings, ``refine=True`` searches for something smaller at every threshold, and
    ``method="exhaustive"`` runs all circuits of a small graph. They give a `TightCurve`, which holds the plain one as
    `TightCurve.published`.

    Args:
        model: A model of TransformerLens, or a name for `load_model`.
        prompt: Text, token ids, or a ``[pos]`` tensor; or several: a list of texts or of lists of ids, of any lengths,
            or a ``[batch, pos]`` tensor. The component graph takes several as one task, and a `Task`.
        graph: ``"token"``, see `TokenGraph`; ``"component"``, see `ComponentGraph`.
        method: How edges are scored, see `attribute`. Or ``"best"``: by several methods, of whose circuits the best
            ones count; ``"exhaustive"``: not at all, every circuit of a graph of up to 22 edges is run.
        family: How scores become an order, see `tracedensity.extract.rank_edges`.
        signed: Of effects, put edges that help first and those that hurt last; else by the size of the effect.
        thresholds: Faithfulnesses in (0, 1] whose minimal sizes are wanted.
        metric: Faithfulness is ``1 - TV`` for ``"tv"`` (default for prompts), ``exp(-KL)`` for ``"kl"``, ``1 - JS / ln
            2`` for ``"js"``, agreement on the first token for ``"top1"``, recovered mass for ``"nucleus"``, each the
            mean over examples. For ``"logit_diff"`` (default for tasks), ``"prob_diff"``, ``"logprob"`` and functions
            it is the share of the way from the circuit without edges to the model, ``(m(circuit) - m(empty)) /
            (m(model) - m(empty))``, of means over examples.
        also: Metrics to measure on the same circuits beside that, see `evaluate`; they are in `DensityCurve.also`.
        ablation: What replaces an absent edge, see `attribute`.
        steps: As for `attribute`.
        ungroup: As for `attribute`.
        positions: As for `attribute`.
        keep_residual: Keep all skip connections, in the circuit or not (token graph).
        attention: ``"open"`` counts absent attention edges but does not ablate them (the density papers' public code).
        sizes: Numbers of edges to run as well, for instance a ``range`` that covers a small graph.
        per_example: Refine the curve of every example of a task as well, for `DensityCurve.minimal_size_per_example`;
            takes several times as many circuits.
        refine: Search for a smaller circuit at every threshold, see `td.refine`.
        budget: What may be spent on each threshold by that, in plain forward passes.
        robust: Find circuits as well that reach a threshold in several situations at once, by their least faithfulness:
            under ``"mean"`` ablation, with names and nouns of the prompt swapped (``"swap"``) and with a token put
            before it (``"prepend"``), or in those of a list, of which names of all ablations may be. They are in
            `DensityCurve.robust`. A search for them may spend the budget once for every situation.
        baselines: Whether to run the random and the inverse baseline as well.
        position: Which prediction to explain; tokens after it cannot matter and are left out. Tasks have their own.
        seed: For whatever is drawn at random.
        batch_size: Circuits per forward pass; by default as many as memory allows.
        attention_mask: 1 for tokens and 0 for padding, on either side, where ids come padded.

    Returns:
        The `DensityCurve`, from which circuits, tables and figures are made; of several prompts on the token graph a
        list of them, each the one that the prompt has by itself.

    Raises:
        ValueError: If an argument is not as described, or a value inside the model is not finite.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "prompt", "attention_mask")}
    estimation = Estimation(as_transformer(model), **options)
    prompts = several_prompts(prompt, attention_mask)
    several = prompts if graph == "token" else None  # on the component graph they are one task
    if several is not None:
        curves = list(estimation.curves(several))
    elif attention_mask is not None:
        task = Task(clean=prompts, position=position, name="")
        curves = [alone(replace(estimation, position=-1).curve(task))]
    else:
        curves = [alone(estimation.curve(prompt))]
    for curve in filter(was_cut_short, curves):
        alert(
            "interrupted: thresholds that were not searched for have circuits of rankings"
            + (", and nothing is said of robust ones." if robust and curve.robust is None else ".")
        )
    return curves if several is not None and getattr(prompt, "ndim", 0) != 1 else curves[0]


def was_cut_short(curve: DensityCurve) -> bool:
    """Whether a search for one of its circuits, or of its robust ones, was ended by Ctrl-C."""
    searched = (each for each in (curve, curve.robust) if isinstance(each, TightCurve))
    return any(was_interrupted(circuit) for each in searched for circuit in each.refined)


@dataclass(frozen=True, eq=False, kw_only=True)
class Estimation:
    """How curves are made: a model, and the options of `density`.

    Raises:
        ValueError: If an option is not as described there.
    """

    model: Transformer = field(kw_only=False)
    graph: str
    method: str | None
    family: str
    signed: bool
    thresholds: Sequence[float | int]
    metric: str | Metric | None
    also: Sequence[str | Metric]
    ablation: str | None
    steps: int
    ungroup: bool
    positions: bool
    keep_residual: bool
    attention: str
    sizes: Sizes
    per_example: bool
    refine: bool
    budget: SupportsIndex
    robust: bool | Sequence[str]
    baselines: bool
    position: int
    seed: int
    batch_size: int | None

    def __post_init__(self) -> None:
        require_thresholds(tuple(self.thresholds))
        metric, usual = self.metric, [*CONVERSIONS, *([] if self.graph == "token" else QUESTIONS)]
        if self.per_example and self.graph == "token":
            raise ValueError("`per_example` must be left out on the token graph, where there is one.")
        if self.signed and self.graph == "token" and not str(self.method).startswith("eap"):
            raise ValueError(
                f"`signed` must be left out for method {self.method or 'norm'!r}, whose scores have no sign."
            )
        if not self.refine and whole(self.budget, "budget") != _BUDGET:
            raise ValueError("`budget` must be left out without `refine=True`: nothing else spends one.")
        if not (metric is None or callable(metric) or metric in usual) or (self.graph == "token" and callable(metric)):
            raise ValueError(f"`metric` must be one of {list(dict.fromkeys(usual))}, got {metric!r}.")
        if self.method == "exhaustive" and self.refine:
            raise ValueError("`refine` must be left out for method 'exhaustive', which runs all circuits there are.")

    def curves(self, prompts: Iterable[Prompt]) -> Iterator[DensityCurve]:
        """Curves of prompts by themselves, in their order; circuits of several prompts are run in the same batches."""
        with self.model.unchanged():
            yield from self.together(map(self.curve, prompts))

    def together(self, asking: Iterable[Asking[T]]) -> Iterator[T]:
        """What comes of several that ask for circuits, which are run in the same batches."""
        yield from together(asking, rows_at_once(self.model, min(self.model.n_ctx, _USUAL_LENGTH)))

    def curve(self, prompt: object, logits: Float[Tensor, " d_vocab"] | None = None) -> Asking[DensityCurve]:
        """The curve of a prompt or task.

        Args:
            prompt: The prompt or task.
            logits: What the model predicts after the prompt, if that is known.

        Raises:
            ValueError: If an option is not one that there is for it, or a value inside the model is not finite.
        """
        # a metric of the prediction as a whole has no gradient that would say much: edges are scored by the question's
        asked = self.metric if callable(self.metric) or self.metric not in CONVERSIONS else None
        setting, scores = self._scored(prompt, None if self.method in ("best", "exhaustive") else self.method, asked)
        if logits is not None:
            setting = setting.predicting(logits.expand(len(setting.prompts), -1))
        require_options(scores.graph, self.attention, self.keep_residual, self.batch_size)
        conditions = Conditions(False, self.keep_residual, self.attention, setting.ablation)
        gauge = Gauge.of(setting, scores.graph, self.metric, named_metrics(self.also, setting) if self.also else {})
        ground = Ground(scores.graph, conditions, gauge, self.batch_size)
        if self.method == "exhaustive":
            require_few(ground)
        rankings = [scores.rank(self.family, signed=self.signed)]
        if self.method == "best":
            others = BEST[self.graph][1:]
            ranked = [self._scored(prompt, other, None if other == "flow" else asked)[1] for other in others]
            rankings += [each.rank(self.family, signed=self.signed) for each in ranked]
        if (self.method in ("best", "exhaustive") or self.refine) and not ground.free.all():
            # searches know no edges that are kept anyhow, so that no circuit may count them
            rankings = [ranking.postponed(~ground.free) for ranking in rankings]

        curve = yield from self._curve_on([ground], rankings, self.baselines)
        if self.robust and not was_cut_short(curve):
            metric = gauge.metric if self.metric is None else self.metric
            home = Home(self.model, curve.provenance.subject, ground, metric, self.seed)
            grounds = home.required(USUAL if self.robust is True else self.robust)
            stout = yield from self._curve_on(grounds, rankings, False)
            if isinstance(curve, TightCurve) and isinstance(stout, TightCurve):  # what stands a lot stands at home
                at_home = [circuit.at_home() for circuit in stout.refined]
                curve = TightCurve.of(curve.published, curve.families, (*curve.refined, *at_home))
            curve = replace(curve, robust=stout)
        return curve

    def _scored(self, prompt: object, method: str | None, metric: str | Metric | None) -> tuple[Setting, Scores]:
        return scored(
            self.model, prompt, graph=self.graph, method=method, metric=metric, ablation=self.ablation,
            steps=self.steps, ungroup=self.ungroup, positions=self.positions, position=self.position, seed=self.seed,
        )  # fmt: skip

    def _curve_on(
        self, grounds: Sequence[Ground], rankings: Sequence[Ranking], baselines: bool
    ) -> Asking[DensityCurve]:
        sizes = as_sizes(self.sizes, rankings[0].n_edges)
        thresholds = tuple(sorted({float(threshold) for threshold in self.thresholds}))
        making = _Making(self.model, tuple(grounds), thresholds, sizes, self.per_example)
        families: list[DensityCurve] = []
        for ranking in rankings:
            families.append((yield from making.curve(ranking)))
        published = families.pop(0)
        if baselines:
            published = yield from making.with_baselines(published, self.seed)
        if self.method == "exhaustive":
            return TightCurve.of(published, (), _all_circuits(grounds, published))
        if self.method != "best" and not self.refine:
            return published
        curve = TightCurve.of(published, families, ())
        if self.refine:
            found = _refined(grounds, curve, whole(self.budget, "budget") * len(grounds), self.seed)
            curve = TightCurve.of(published, families, found)
        return curve


def _refined(grounds: Sequence[Ground], curve: TightCurve, budget: int, seed: int) -> tuple[Circuit, ...]:
    """A circuit for every threshold, each grown from that of the threshold below."""
    found: list[Circuit] = []
    for threshold in curve.thresholds:
        start, below = curve.circuit(faithfulness=threshold), found[-1] if found else None
        found.append(refined(grounds, start, threshold, budget=budget, seed=seed, below=below))
        if was_interrupted(found[-1]):
            break  # the thresholds above are left to the rankings
    return tuple(found)


def _all_circuits(grounds: Sequence[Ground], curve: DensityCurve) -> tuple[Circuit, ...]:
    """The best circuit of every size that is better than all smaller ones."""
    faithfulness, kept = best_of_each_size(grounds)
    graph, names = grounds[0].graph, tuple(ground.name for ground in grounds if len(grounds) > 1)
    n_passes = 2 ** (len(faithfulness) - 1) * sum(ground.price for ground in grounds)
    provenance = replace(curve.provenance, method="exhaustive")
    circuits, most = [], -math.inf
    for size, reached in enumerate(faithfulness.tolist()):
        if reached <= most:
            continue
        most = reached
        masks = unflatten(graph, kept[size], False)
        certificate = Certificate(
            reached, n_passes, n_passes, 0, graph.n_edges, size, masks, minimum=True, situations=names,
            worst=reached if names else None,
        )  # fmt: skip
        measured = float(grounds[0].tried(kept[size][None]).faithfulness) if names else reached
        circuit = replace(curve.circuit(size=0), kept=masks, provenance=provenance, faithfulness=measured)
        circuits.append(replace(circuit, certificate=certificate))
    return tuple(circuits)


@dataclass(frozen=True, eq=False)
class _Making:
    """What all curves of one prompt or task have in common.

    Attributes:
        model: The model.
        grounds: Where circuits are run, where they are at home first.
        thresholds: Faithfulnesses whose minimal sizes are wanted.
        sizes: Numbers of edges to run in any case, beside those of the density papers.
        per_example: Whether the curves of single examples are looked at as well.
    """

    model: Transformer
    grounds: tuple[Ground, ...]
    thresholds: tuple[float, ...]
    sizes: Int[Tensor, " size"]
    per_example: bool

    @property
    def ground(self) -> Ground:
        return self.grounds[0]

    def curve(self, ranking: Ranking) -> Asking[DensityCurve]:
        """The curve of a ranking.

        Raises:
            ValueError: If the circuit of all edges is not the model.
        """
        ground, gauge, setting = self.ground, self.ground.gauge, self.ground.setting
        grid = paper_sizes(ranking.n_edges).unique()
        values: dict[int, Mapping[str, Tensor]] = {}
        place = flatten(ranking.graph, ranking.rank)

        def measure(sizes: Tensor) -> Asking[Tensor]:
            answer = yield Asked(ground, ranking, sizes, ground.conditions)
            values.update(
                {
                    size: {name: value[point] for name, value in answer.items()}
                    for point, size in enumerate(sizes.tolist())
                }
            )
            found = answer[""]
            together = gauge.faithfulness(found).double()
            for other in self.grounds[1:]:
                together = torch.minimum(together, other.tried(place < sizes[:, None]).faithfulness)
            together = together[:, None]
            if not self.per_example:
                return together
            return torch.cat([together, each_of(found, gauge.metric, gauge.full, gauge.empty).double()], 1)

        known = yield from _bracketed(measure, torch.cat([grid, self.sizes]).unique(), self.thresholds)
        allowed = 1e-4 if self.model.dtype in (torch.float32, torch.float64) else 1e-2
        if abs(known.faithfulness[-1] - 1) > allowed * (1 if gauge.full is None else 10):
            raise ValueError(
                f"`model` must be reproduced by the circuit of all edges, got a faithfulness of "
                f"{known.faithfulness[-1]:.4f}: {self.model.name} computes something that its graph does not describe."
            )
        top = setting.clean_logits[0].argmax()
        alone = len(self.grounds) == 1
        several = (gauge.full is not None or len(setting.examples) > 1) and alone
        by_component = isinstance(ranking.graph, ComponentGraph)

        def measured(name: str) -> Float[Tensor, "point example"]:
            return torch.stack([values[size][name] for size in known.sizes.tolist()])

        return DensityCurve(
            known.sizes, known.faithfulness, ranking, self.thresholds, gauge.metric, ground.conditions,
            entropy=float(entropy(setting.clean_logits).mean()),
            top_token=int(top),
            top_text=self.model.texts([int(top)])[0],
            top_probability=float(setting.clean_logits[0].softmax(-1)[top]),
            values=measured("") if several else None,
            also={name: measured(name).mean(1) for name in gauge.also},
            full=gauge.full,
            empty=gauge.empty,
            pruned_sizes=ranking.sizes_after_pruning(known.sizes) if by_component else None,
            situations=() if alone else tuple(ground.name for ground in self.grounds),
        )  # fmt: skip

    def with_baselines(self, curve: DensityCurve, seed: int) -> Asking[DensityCurve]:
        """The same with random circuits, and with all but the circuits, beside it."""
        ranking, conditions = curve.ranking, self.ground.conditions
        grid = paper_sizes(ranking.n_edges).unique()
        coarse = torch.cat([grid[:-1:2], grid[-1:]])
        arrival = arrival_scores(ranking.graph, torch.Generator().manual_seed(seed))
        grown = rank_edges(ranking.graph, arrival, "top", ranking.provenance)
        on_tokens = not isinstance(ranking.graph, ComponentGraph)
        at_random = replace(conditions, keep_residual=on_tokens)
        complement = replace(conditions, inverse=True, keep_residual=False)

        def points(ranking: Ranking, conditions: Conditions) -> Asking[Points]:
            answer = yield Asked(self.ground, ranking, coarse, conditions)
            return Points(coarse, self.ground.gauge.faithfulness(answer[""]))

        random = yield from points(grown, at_random)
        return replace(curve, random=random, inverse=(yield from points(ranking, complement)))


def _bracketed(
    measure: Callable[[Tensor], Asking[Tensor]],
    grid: Int[Tensor, " point"],
    thresholds: tuple[float, ...],
) -> Asking[Points]:
    """Measure a grid of sizes, then halve (on the log scale) every bracket that holds a minimal size of some curve.

    All brackets of a round are measured together. The points are those of the first curve.
    """
    sizes, heights = grid, (yield from measure(grid)).double()
    while True:
        wanted = set()
        for threshold in thresholds:
            for upper in {crossing for column in heights.T for crossing in crossings(column, threshold)} - {0}:
                low, high = sizes[upper - 1 : upper + 1].tolist()
                if high - low > 1 and high > low * (1 + PRECISION):
                    middle = round(math.sqrt(max(low, 1) * high))
                    wanted.add(min(max(middle, low + 1), high - 1))
        if not wanted:
            return Points(sizes, heights[:, 0])
        more = torch.tensor(sorted(wanted))
        sizes, order = torch.cat([sizes, more]).sort()
        heights = torch.cat([heights, (yield from measure(more)).double()])[order]
