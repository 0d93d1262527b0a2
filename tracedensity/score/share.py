"""Scores of shares: what a metric changes by as edges of the token graph are ablated, at one point or along a path."""

import torch
from jaxtyping import Float
from torch import Tensor

from tracedensity.graph.token import TokenGraph
from tracedensity.metric import Metric, measure_circuits
from tracedensity.run import Conditions, run_shares
from tracedensity.setting import Setting, gradients_at_once


def share_scores(
    setting: Setting, graph: TokenGraph, metric: Metric, steps: int | None, *, by_layer: bool = False
) -> dict[str, Tensor]:
    """Minus the derivative of the metric by the share of each edge that is kept, mean over examples.

    Without steps it is taken where all edges are kept: to first order, the effect of removing each. With steps it is
    the mean over the middles of so many equal steps of a path on which heads and MLPs are scaled from nothing to all
    of what they bring, and skip connections are kept. The scores of heads and MLPs then add up to the effect of
    ablating them all, up to the error of the midpoint rule; those of skip connections are first-order effects, mean
    over the path.

    By layer there is such a path for each of them, on which the other layers are kept whole; the scores of its heads
    and MLPs add up to the effect of ablating these. That takes as many times more runs as there are layers, and mostly
    gives smaller circuits for the same number of runs (`python -m benchmarks.gradients`).

    If skip connections were scaled too, the path would be degenerate under normalisation, which undoes the scaling of a
    stream as a whole: all that happens would happen next to zero. Where a norm stands after the sublayer (Gemma 2, OLMo
    2) and its output has no bias, this happens to heads and neurons under zero ablation anyhow: take another ablation,
    or many more steps.

    References:
        Edge attribution patching: arXiv 2310.10348; integrated gradients of edges: arXiv 2403.17806.
    """
    model = setting.model
    points = torch.ones(1) if steps is None else (torch.arange(steps) + 0.5) / steps
    total = {
        kind: torch.zeros(shape, dtype=model.full_dtype, device=model.device) for kind, shape in graph.shapes.items()
    }
    n_at_once = max(1, gradients_at_once(model, graph.n_pos) // len(setting.prompts))

    def effect(logits: Float[Tensor, "circuit example d_vocab"], part: slice) -> dict[str, Tensor]:
        return {"loss": measure_circuits(metric, logits, setting.examples[part])}

    layers = [slice(layer, layer + 1) for layer in range(graph.n_layers)] if by_layer else [slice(None)]
    for scaled in layers:
        for some in points.to(model.device, model.full_dtype).split(n_at_once):
            kept = {}
            for kind, shape in graph.shapes.items():
                kept[kind] = some.new_ones(len(some), *shape)
                if not kind.startswith("resid"):
                    kept[kind][:, scaled] = some.view(-1, *[1] * len(shape))
            _, slopes = run_shares(setting, graph, kept, Conditions(ablation=setting.ablation), effect)
            for kind, slope in slopes.items():
                total[kind][scaled] -= slope[:, scaled].sum(0) / len(points)
    return {kind: value.masked_fill(~graph.exists[kind].to(value.device), 0.0) for kind, value in total.items()}
