"""Scores without a metric: shares of what a reader reads, and sizes of what ablation changes."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tracedensity.ablate import written
from tracedensity.graph.component import ComponentGraph
from tracedensity.model import Site, full_precision
from tracedensity.score.eap import WORKSPACE
from tracedensity.score.flow import proximity
from tracedensity.setting import Setting


def flow_scores(setting: Setting, graph: ComponentGraph, n_at_once: int) -> dict[str, Float[Tensor, "..."]]:
    """Share of each writer in what a reader reads: ``max(0, |y| - |y - z|)`` in L1 norm, over the sum of all writers.

    Mean over tokens (the last one for the logits) and examples; with positions, mean over examples. All readers
    of a layer that read the same stream get the same scores.

    References:
        Information Flow Routes (arXiv 2403.00824), eq. 3-4.
    """
    model, examples = setting.model, setting.prompts
    scores = torch.zeros(graph.n_writers, graph.n_readers, graph.n_pos or 1, dtype=torch.float64, device=model.device)
    names = ["resid_pre", *(["resid_mid"] if graph.has_mlp and not graph.parallel else [])]
    sites: list[Site] = [(name, layer) for layer in range(model.n_layers) for name in names]
    end: Site = ("resid_post", model.n_layers - 1)
    for part in examples.parts(n_at_once):
        some = examples[part]
        streams: dict[Site, Tensor] = {}

        def hold(value: Tensor, site: Site, streams: dict[Site, Tensor] = streams) -> None:
            streams[site] = full_precision(value)

        with model.reading({site: partial(hold, site=site) for site in [*sites, end]}):
            clean, _ = written(model, some)
        row, pos = some.real.nonzero(as_tuple=True)
        per_token = torch.ones_like(row) if graph.n_pos else some.last[row] + 1
        weight = 1 / (len(examples) * per_token.double())
        step = max(1, WORKSPACE // (graph.n_writers * model.d_model * 12))
        for start in range(0, len(row), step):
            token = slice(start, start + step)
            vectors = clean.at(row[token], pos[token]).vectors(model)
            for layer in range(model.n_layers):
                for kinds in (("q", "k", "v"), ("mlp",)):
                    if kinds == ("mlp",) and not graph.has_mlp:
                        continue
                    site = "resid_mid" if kinds == ("mlp",) and not graph.parallel else "resid_pre"
                    read = vectors[: graph.n_read(kinds[0], layer)]
                    share = _shares(read, streams[site, layer][row[token], pos[token]]) * weight[token]
                    for kind in kinds:
                        _add(scores[: len(read), graph.readers_of(kind, layer)], share, pos[token], graph)
        rows = torch.arange(len(some), device=model.device)
        final = streams[end][rows, some.last]
        share = _shares(clean.at(rows, some.last).vectors(model), final) / len(examples)
        _add(scores[:, graph.readers_of("logits", 0)], share, some.last, graph)
    return _finished(scores, setting, graph)


def magnitude_scores(setting: Setting, graph: ComponentGraph, n_at_once: int) -> dict[str, Float[Tensor, "..."]]:
    """L2 norm of what ablation changes in what a writer writes, sum over tokens, mean over examples.

    The same for all its readers, but that logits are read at the last token only.
    """
    model, examples = setting.model, setting.prompts
    scores = torch.zeros(graph.n_writers, graph.n_readers, graph.n_pos or 1, dtype=torch.float64, device=model.device)
    for part in examples.parts(n_at_once):
        some = examples[part]
        clean, _ = written(model, some)
        instead = setting.ablated(part)
        row, pos = some.real.nonzero(as_tuple=True)
        step = max(1, WORKSPACE // (graph.n_writers * model.d_model * 8))
        for start in range(0, len(row), step):
            token = slice(start, start + step)
            changed = instead.at(row[token], pos[token]).minus(clean.at(row[token], pos[token]))
            size = changed.vectors(model).norm(dim=-1) / len(examples)
            _add(scores[:, :-1], size, pos[token], graph)
            _add(scores[:, -1:], size * (pos[token] == some.last[row[token]]), pos[token], graph)
    return _finished(scores, setting, graph)


def _shares(vectors: Float[Tensor, "writer token d_model"], state: Float[Tensor, "token d_model"]) -> Tensor:
    """Proximity of each vector to the state as a share of all; zero where all are."""
    raw = proximity(vectors, state).clamp(min=0.0)
    total = raw.sum(0)
    return raw / total.where(total > 0, 1.0)


def _add(scores: Tensor, values: Float[Tensor, "writer token"], pos: Tensor, graph: ComponentGraph) -> None:
    """Add to the scores of all readers in view, at each token's position if positions are told apart."""
    if graph.n_pos is None:
        scores += values.double().sum(1)[:, None, None]
    else:
        by_pos = values.new_zeros(len(values), graph.n_pos, dtype=torch.float64)
        scores += by_pos.index_add_(1, pos, values.double())[:, None]


def _finished(scores: Tensor, setting: Setting, graph: ComponentGraph) -> dict[str, Tensor]:
    edge = scores.view(graph.shapes["edge"]).to(setting.model.full_dtype)
    return {"edge": edge.masked_fill(~graph.exists["edge"].to(edge.device), 0.0)}
