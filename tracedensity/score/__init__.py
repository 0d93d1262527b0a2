"""Scores: one number per edge, saying how much it matters."""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tracedensity.choices import ComponentMethod, Family, GraphName, Method, Question, TokenMethod
from tracedensity.extract import Ranking, node_importance, rank_edges, rank_nodes
from tracedensity.graph import Graph, edge_at, flatten
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import TokenGraph
from tracedensity.metric import Metric, compares, helpful_sign, named_metric
from tracedensity.model import Prompt, Transformer, as_transformer, widened
from tracedensity.provenance import Provenance
from tracedensity.run import flushed_denormals
from tracedensity.score.baseline import arrival_scores, uniform_scores
from tracedensity.score.eap import WORKSPACE, patching_scores
from tracedensity.score.exact import exact_scores
from tracedensity.score.flow import MEASURES, contribution_scores
from tracedensity.score.reading import flow_scores, magnitude_scores
from tracedensity.score.share import share_scores
from tracedensity.setting import Setting, component_setting, gradients_at_once, rows_at_once, token_setting
from tracedensity.task import Task

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracedensity.plot import Theme


GRADIENTS = ("eap", "eap-ig", "eap-ig-layers")
"""Methods of the token graph that know a metric."""


@dataclass(frozen=True, eq=False)
class Scores:
    """One number per edge of a graph: how important it is, or the effect of ablating it.

    Attributes:
        graph: What the edges are.
        values: The scores of each kind of edge; zero where there is no edge.
        provenance: Model, prompt or task, and method.
        helpful: The sign of the effects of edges that help: -1 for effects on a metric that is to be high, 1 for those
            on one that is to be low; 0 if scores are no effects but importances, higher being more important.
    """

    graph: Graph
    values: Mapping[str, Float[Tensor, "..."]]
    provenance: Provenance
    helpful: Literal[-1, 0, 1] = 0

    @property
    def exists(self) -> Mapping[str, Bool[Tensor, "..."]]:
        """Which entries of `values` are edges."""
        return self.graph.exists

    def importance(self, signed: bool = False) -> Mapping[str, Float[Tensor, "..."]]:
        """Numbers that are higher for edges that matter more.

        Args:
            signed: Of effects, whether edges that help come first and those that hurt last; else both come before those
                that do neither. Scores that are no effects are what they are.
        """
        if not self.helpful:
            return self.values
        return {kind: self.helpful * value if signed else value.abs() for kind, value in self.values.items()}

    def rank(
        self,
        family: Family | str | None = None,
        *,
        signed: bool = False,
        nodes: Literal["sum", "max"] | str | None = None,
    ) -> Ranking:
        """The order in which the edges enter a circuit; see `tracedensity.extract.rank_edges`.

        Args:
            family: How scores become an order; ``"greedy"`` by default.
            signed: Of effects, whether to put those that help first and those that hurt last; else by size alone.
            nodes: Let whole nodes enter, each with its edges to the nodes before it, by the sum or maximum of the
                importance of the edges that leave it. Circuits are then those of the `natural_sizes`.

        Raises:
            ValueError: If an option is unknown, or a score not finite.
        """
        importance = self.importance(signed)
        if nodes is None:
            return rank_edges(self.graph, importance, "greedy" if family is None else family, self.provenance)
        if family is not None:
            raise ValueError(f"`family` must be left out where whole nodes enter, got {family!r}.")
        return rank_nodes(self.graph, importance, nodes, self.provenance)

    def of_nodes(self, by: Literal["sum", "max"] | str = "sum") -> "pd.Series":
        """Importance of each writer: sum or maximum of that of the edges that leave it, by name, highest first.

        Raises:
            ValueError: If scores are of a graph without writers, or `by` is neither.
        """
        import pandas as pd

        if not isinstance(self.graph, ComponentGraph):
            raise ValueError(f"`graph` must be a component graph for scores of nodes, got {type(self.graph).__name__}.")
        values = node_importance(self.graph, self.importance(), by)
        return pd.Series(values.tolist(), index=self.graph.writers, name=by).sort_values(ascending=False, kind="stable")

    def top(self, k: int = 20) -> "pd.DataFrame":
        """The `k` edges that matter most, by the size of their effects or by their scores: name, kind, score."""
        import pandas as pd

        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")

        flat = flatten(self.graph, self.values)
        best = flatten(self.graph, self.importance()).topk(min(k, len(flat))).indices
        kinds, edges = zip(*(edge_at(self.graph, number) for number in best.tolist()), strict=True)
        return pd.DataFrame({"edge": edges, "kind": kinds, "score": flat[best].tolist()})

    def plot(self, *, over: str = "head", minus: "Scores | None" = None, theme: "Theme | str" = "light") -> "go.Figure":
        """How important the edges of each head, or of each token's states, are together: see `plot_heatmap`."""
        from tracedensity.plot import plot_heatmap

        return plot_heatmap(self, over=over, minus=minus, theme=theme)

    def __repr__(self) -> str:
        return f"Scores({self.graph.n_edges} edges, {self.provenance})"

    def _repr_html_(self) -> str:
        return f"<p><b>Scores</b> {html.escape(repr(self))}</p>{self.top(10).to_html(index=False, border=0)}"


def attribute(
    model: object,
    prompt: Prompt | Task | object,
    *,
    graph: GraphName | str = "token",
    method: Method | str | None = None,
    metric: Question | str | Metric | None = None,
    ablation: str | None = None,
    steps: int = 5,
    ungroup: bool = False,
    positions: bool = False,
    neurons: bool = False,
    target: str | int | None = None,
    position: int = -1,
    seed: int = 0,
    workspace: int | None = None,
) -> Scores:
    """Score every edge of the computation of one prediction, or of a task.

    **Token graph.** The contribution methods compare the vectors that add up to a state of the residual stream; a
    score is local to the state that the edge enters, and is not multiplied along paths. Contributions are those of
    the weights as they are: centring or folding weights gives other vectors, and other scores.

    **Component graph,** and gradient methods on the token graph. A score is the effect on a metric, to first order
    or measured, of ablating the edge: the change of the metric when the edge carries its ablated value, mean over
    examples. Edges that help a metric that is to be high have negative scores; `Scores.rank` knows.

    Args:
        model: A model of TransformerLens, or a name for `load_model`.
        prompt: Text, token ids, or a ``[pos]`` tensor; on the component graph a `Task` as well.
        graph: ``"token"``, see `TokenGraph`; ``"component"``, see `ComponentGraph`.
        method: On the token graph ``"norm"`` (default): share of the L1 norms of all contributions to the state (arXiv
            2605.27033); ``"norm-l2"``: of the L2 norms; ``"norm-ratio"``: L1 norm over that of the state;
            ``"flow"``: share of the proximities ``max(0, |y| - |y - z|)`` in L1 norm (Information Flow
            Routes, arXiv 2403.00824, eq. 3-4); ``"flow-shifted"``: of the proximities less the smallest one
            of the state (the density papers' code); ``"cosine"``: ``(1 + cos(z, y)) / 2``. ``"eap"``: minus the
            derivative of the metric by the share of the edge that is kept, where all is kept; ``"eap-ig"``: its mean
            over the middles of `steps` equal steps from heads and MLPs ablated to nothing ablated, skip connections
            kept; ``"eap-ig-layers"``: the same for the heads and MLPs of one layer after the other.
            On the component graph ``"eap-ig"`` (default): edge attribution patching with gradients averaged over
            `steps` embeddings between ablated and clean, the clean one not among them (arXiv 2403.17806);
            ``"eap-ig-midpoint"`` (default under zero ablation): at the middles between them and the next; ``"eap"``: at
            the clean run only (2310.10348); ``"eap-qk"``: the same, but norm and attention computed anew for edges into
            queries and keys (one of the corrections of AtP*, 2403.00745); ``"clean-corrupted"``: at both ends;
            ``"eap-ig-activations"``: between ablated and clean outputs of one group of writers after another;
            ``"relp"``: relevance rules in place of gradients (2508.21258); ``"exact"``: one run per edge; ``"flow"``:
            as above, of writers in what a reader reads; ``"magnitude"``: size of what ablation changes in the writer's
            output.
            On both ``"random"``: uniform on [0, 1); ``"random-connected"``: minus the time at which a random growth
            from the output reaches the edge, residual and MLP edges of a state before its heads (the density papers'
            random baseline).
        metric: What the effect is on: ``"logit_diff"`` (default), ``"prob_diff"``, ``"logprob"`` of the answer (default
            without distractors), ``"kl"`` from the clean prediction, or a function of logits ``[row, d_vocab]`` and
            `Examples` that gives ``[row]``, higher being better. Without answers, the answer is what the model finds
            most probable. On the token graph ``"eap"`` asks for ``"logprob"``, the others for ``"kl"``, by default.
        ablation: What an edge carries instead. On the token graph nothing, ``"zero"`` (default); ``"mean"``, what an
            average token of the prompt brings; ``"resample"``, its value on the prompt with tokens drawn at random,
            mean over 8 draws (the contribution methods know no ablation, but circuits are run with it). On the
            component graph ``"counterfactual"``, its value on the corrupted prompt (default);
            ``"resample"``, its value on the prompt with tokens drawn at random (default without corrupted prompts);
            ``"zero"``; ``"mean"`` over the tokens of the clean prompts; ``"mean-positional"``, over clean prompts.
        steps: Points of the methods with `ig` in their names.
        ungroup: On the component graph, give query heads that share keys and values readers of their own.
        positions: Tell edges apart by token; the prompts must then be equally long.
        neurons: Take every neuron of an MLP for a writer, on the token graph for an edge (gradient methods and random
            ones; on the component graph for scores and rankings only).
        target: The token, text or id, whose probability is asked for, where a prompt has no answers.
        position: Which prediction to explain; tokens after it cannot matter and are left out. Tasks have their own.
        seed: For whatever is drawn at random.
        workspace: Bytes of scratch memory; results do not depend on it.

    Returns:
        Scores in float32, or float64 for a float64 model.

    Raises:
        ValueError: If an argument is not as described, or the model gives values that are not finite.
    """
    return scored(
        as_transformer(model), prompt, graph=graph, method=method, metric=metric, ablation=ablation, steps=steps,
        ungroup=ungroup, positions=positions, neurons=neurons, target=target, position=position, seed=seed,
        workspace=workspace,
    )[1]  # fmt: skip


def scored(
    model: Transformer,
    prompt: object,
    *,
    graph: str,
    method: str | None,
    metric: str | Metric | None,
    ablation: str | None,
    steps: int,
    ungroup: bool,
    positions: bool,
    neurons: bool = False,
    target: str | int | None = None,
    position: int,
    seed: int,
    workspace: int | None = None,
) -> tuple[Setting, Scores]:
    """Scores, and the setting in which they hold; see `attribute`."""
    method = chosen_method(graph, method, ablation)
    for option, value in (("seed", seed), ("steps", steps)):
        if not hasattr(value, "__index__"):
            raise ValueError(f"`{option}` must be a whole number, got {value!r}.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be from 0 to 2**63 - 1, got {seed}.")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    if graph == "token":
        if wrong := [name for name, value in (("ungroup", ungroup), ("positions", positions)) if value]:
            raise ValueError(f"`{wrong[0]}` must be left out on the token graph, where it means nothing.")
        gradients = method in GRADIENTS
        given = {"metric": metric is not None, "target": target is not None}
        if not gradients and (wrong := [name for name, value in given.items() if value]):
            raise ValueError(f"`{wrong[0]}` must be left out for method {method!r}, which knows none. Use 'eap-ig'.")
        if neurons and not gradients and not method.startswith("random"):
            raise ValueError(f"`method` must be one of {list(GRADIENTS)} or random for neurons, got {method!r}.")
        with torch.inference_mode(False):
            setting = token_setting(model, prompt, ablation, position, seed, neurons=neurons)
            setting = _answered(setting, target)
            token_graph = TokenGraph.of(model, setting.prompts.tokens.shape[1], neurons=neurons)
            with widened(model.dtype):
                wide = _wide(setting)
                return setting, _token_scores(wide, token_graph, method, metric, steps, seed, workspace or 2**22)
    with torch.inference_mode(False):  # where the user is in it: there are no gradients there
        setting = component_setting(model, prompt, ablation, position, seed, neurons=neurons)
        setting = _answered(setting, target)
        n_pos = setting.common_length() if positions else None
        component_graph = ComponentGraph.of(model, n_pos=n_pos, ungroup=ungroup, neurons=neurons)
        with widened(model.dtype):
            return setting, _component_scores(_wide(setting), component_graph, method, metric, steps, seed, workspace)


def chosen_method(graph: str, method: str | None, ablation: str | None) -> str:
    """The method, or the usual one of a graph.

    Raises:
        ValueError: If there is no such graph, or no such method on it.
    """
    choices = {"token": get_args(TokenMethod), "component": get_args(ComponentMethod)}
    if graph not in choices:
        raise ValueError(f"`graph` must be one of {list(choices)}, got {graph!r}.")
    if method is None:
        integrated = "eap-ig-midpoint" if ablation == "zero" else "eap-ig"
        method = {"token": "norm", "component": integrated}[graph]
    if method not in choices[graph]:
        raise ValueError(f"`method` must be one of {list(choices[graph])} on the {graph} graph, got {method!r}.")
    return method


def _wide(setting: Setting) -> Setting:
    """The same, its predictions yet to be made; those of half precision are not what scores refer to."""
    return replace(setting) if setting.model.dtype != setting.model.full_dtype else setting


def _component_scores(
    setting: Setting,
    graph: ComponentGraph,
    method: str,
    metric: str | Metric | None,
    steps: int,
    seed: int,
    workspace: int | None,
) -> Scores:
    name, function = named_metric(metric, setting.prompts if setting.asked else setting.examples)
    # a run on the clean prompts that is not needed is not made
    examples = setting.examples if compares(function) or not setting.asked else setting.prompts
    generator = torch.Generator().manual_seed(seed)
    sign, transformer = helpful_sign(function), setting.model
    n_pos = examples.tokens.shape[1]
    plain: dict[str, Callable[[], dict[str, Tensor]]] = {
        "random": lambda: uniform_scores(graph, generator),
        "random-connected": lambda: arrival_scores(graph, generator),
        "flow": lambda: flow_scores(setting, graph, rows_at_once(transformer, n_pos)),
        "magnitude": lambda: magnitude_scores(setting, graph, rows_at_once(transformer, n_pos)),
    }
    _require_slope(method, name, function)
    if method == "eap-qk" and (graph.n_pos is not None or graph.d_mlp):
        raise ValueError("`positions` and `neurons` must be left out for method 'eap-qk'. Use 'eap'.")
    if graph.d_mlp and method in ("exact", "flow", "magnitude"):
        raise ValueError(f"`method` must be a gradient method for neurons, such as 'eap', got {method!r}.")
    with flushed_denormals():
        if method in plain:
            values, sign, name = plain[method](), 0, ""
        elif method == "exact":
            values = exact_scores(setting, graph, function)
        else:
            values = patching_scores(
                transformer, graph, examples, setting.ablated, function, method=method, steps=steps,
                rows_at_once=gradients_at_once(transformer, n_pos), workspace=workspace or WORKSPACE,
            )  # fmt: skip
    return Scores(graph, values, Provenance.of(setting, method, seed, name), sign)


def _answered(setting: Setting, target: int | str | None) -> Setting:
    if target is None:
        return setting
    if setting.asked:
        raise ValueError(f"`target` must be left to the task, which has answers of its own, got {target!r}.")
    return setting.answered(setting.model.single_token(target, "target"))


def _token_scores(
    setting: Setting,
    graph: TokenGraph,
    method: str,
    metric: str | Metric | None,
    steps: int,
    seed: int,
    workspace: int,
) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    name, sign = "", 0
    if method == "random":
        values = uniform_scores(graph, generator)
    elif method == "random-connected":
        values = arrival_scores(graph, generator)
    elif method in GRADIENTS:
        name, function = named_metric(metric or ("logprob" if method == "eap" else "kl"), setting.examples)
        _require_slope(method, name, function)
        sign = helpful_sign(function)
        integrated = None if method == "eap" else steps
        values = share_scores(setting, graph, function, integrated, by_layer=method == "eap-ig-layers")
    else:
        values = contribution_scores(setting.model, setting.prompts.tokens[0], graph, MEASURES[method], workspace)
    return Scores(graph, values, Provenance.of(setting, method, seed, name), sign)


def _require_slope(method: str, name: str, metric: Metric) -> None:
    """Raise a ValueError if the metric has no gradient where the method takes it."""
    if method in ("eap", "eap-qk", "relp") and helpful_sign(metric) == 1:
        raise ValueError(
            f"`metric` must not be {name!r} for method {method!r}: a divergence from the clean prediction is flat "
            "there, and its gradient is rounding alone. Use 'eap-ig'."
        )
