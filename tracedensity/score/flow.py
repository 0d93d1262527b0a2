"""Scores of contributions: how the vectors that add up to a state of the stream compare with it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracedensity.graph.token import TokenGraph
from tracedensity.model import Norm, Site, Transformer, require_finite


@dataclass(frozen=True, eq=False)
class HeadContributions:
    """All vectors that the heads of a layer bring from `src` to `dest`, in factors.

    Head h brings ``coefficient[h, dest, src] * written(h)[src]``. The product for all pairs of tokens would
    be a tensor ``[head, dest, src, d_model]``, which is never made whole.

    Attributes:
        coefficient: Attention pattern, over the frozen scales of the norms that the sum of heads goes through.
        values: Values of each query head, which its output projection writes to the stream.
        weight_out: Output projections.
        norms: These norms, without their scales, are applied to what is written; none in most models.
        first_dest: Token of row 0 of `coefficient`: all tokens are in it, or the last one only.
        workspace: Bytes of scratch memory.
    """

    coefficient: Float[Tensor, "head dest src"]
    values: Float[Tensor, "src head d_head"]
    weight_out: Float[Tensor, "head d_head d_model"]
    norms: tuple[Norm, ...]
    first_dest: int
    workspace: int

    def written(self) -> Iterator[tuple[slice, Float[Tensor, "some_heads src d_model"]]]:
        """What heads write to the stream if they attend to one token only, some heads at a time."""
        n_heads, _, n_src = self.coefficient.shape
        d_model = self.weight_out.shape[-1]
        step = max(1, self.workspace // (n_src * d_model * self.values.element_size()))
        for first in range(0, n_heads, step):
            heads = slice(first, first + step)
            vectors = self.values[:, heads].transpose(0, 1) @ self.weight_out[heads]
            for norm in self.norms:
                vectors = norm.without_scale(vectors)
            yield heads, vectors


@dataclass(frozen=True)
class Measure:
    """How a contribution to a state is scored, given the state.

    Attributes:
        of_vectors: Raw scores of one contribution per state: ``([dest, d_model], [dest, d_model]) -> [dest]``.
        of_heads: Raw scores of all that the heads of a layer contribute: ``-> [head, dest, src]``.
        normalise: From raw scores of the in-edges of each state, and which of them exist, both
            ``[dest, edge]``, to the final ones.
    """

    of_vectors: Callable[[Tensor, Tensor], Tensor]
    of_heads: Callable[[HeadContributions, Tensor], Tensor]
    normalise: Callable[[Tensor, Tensor], Tensor]


def contribution_sites(model: Transformer) -> list[Site]:
    """The values of a run on which `contribution_scores` depends."""
    names = ["resid_pre", "v", "pattern", "resid_mid", *(["mlp_out"] if model.has_mlp else [])]
    return [*((name, layer) for layer in range(model.n_layers) for name in names), *model.scale_sites]


def contribution_scores(
    model: Transformer, tokens: Int[Tensor, " pos"], graph: TokenGraph, measure: Measure, workspace: int
) -> dict[str, Tensor]:
    """Score every edge by its contribution to the state that it enters, from one forward pass.

    Norms after a sublayer are linear maps here, with the scale that they have on this prompt. The state that
    the prediction is read from is taken as the final norm makes it. The attention state below it is taken as
    it is (the density papers' newer code compares a normed state with contributions that are not).

    Args:
        model: The model.
        tokens: The prompt.
        graph: Its token graph.
        measure: How a contribution is scored.
        workspace: Bytes of scratch memory.

    Returns:
        Scores of each kind of edge, zero where there is none.
    """
    _, held = model.run(tokens, contribution_sites(model))
    final_norm = model.final_norm(held.pop(("final_scale", 0), None))
    scores = {kind: held["resid_pre", 0].new_zeros(shape) for kind, shape in graph.shapes.items()}
    for layer in range(graph.n_layers):
        is_last = layer == graph.n_layers - 1
        dest = slice(graph.n_pos - 1, None) if is_last else slice(None)
        exists = graph.exists["head"][layer][:, dest].to(scores["head"].device)

        skip, state = held.pop(("resid_pre", layer))[dest], held.pop(("resid_mid", layer))[dest]
        norms = []  # between the heads and the state, in the order in which they are applied
        if (attn_norm := model.attn_norm(layer, held.pop(("attn_scale", layer), None))) is not None:
            norms.append(replace(attn_norm, scale=attn_norm.scale[dest]))
        if is_last and not model.has_mlp and final_norm is not None:
            norms.append(final_norm)
            skip, state = final_norm(skip), final_norm(state)
        coefficient = held.pop(("pattern", layer))[:, dest]
        for norm in norms:
            coefficient = coefficient / norm.scale
        values = model.per_head(held.pop(("v", layer)))
        heads = HeadContributions(coefficient, values, model.W_O(layer), tuple(norms), dest.start or 0, workspace)
        raw = measure.of_heads(heads, state)
        into_state = torch.cat([measure.of_vectors(skip, state)[:, None], _by_dest(raw)], dim=1)
        is_edge = torch.cat([exists.new_ones(len(state), 1), _by_dest(exists)], dim=1)
        normal = measure.normalise(into_state, is_edge)
        scores["resid_attn"][layer, dest] = normal[:, 0]
        scores["head"][layer][:, dest] = normal[:, 1:].unflatten(1, raw.shape[::2]).transpose(0, 1)

        if model.has_mlp:
            skip, mlp = state, held.pop(("mlp_out", layer))[dest]
            state = skip + mlp
            if is_last and final_norm is not None:
                skip, mlp, state = final_norm(skip), final_norm(mlp), final_norm(state)
            into_state = torch.stack([measure.of_vectors(skip, state), measure.of_vectors(mlp, state)], dim=1)
            normal = measure.normalise(into_state, torch.ones_like(into_state, dtype=torch.bool))
            scores["resid_mlp"][layer, dest], scores["mlp"][layer, dest] = normal.unbind(1)
        for kind in scores:
            require_finite(scores[kind][layer], f"the scores of {kind!r} edges", layer)
    return scores


def _by_dest(per_head: Tensor) -> Tensor:
    """``[head, dest, src]`` as ``[dest, head * src]``."""
    return per_head.transpose(0, 1).flatten(1)


def _or_one(divisor: Tensor) -> Tensor:
    """One in place of zero: what is divided by it is zero as well, or a score of a state that is zero."""
    return divisor.where(divisor > 0, 1.0)


# -- norms ---------------------------------------------------------------------------------------


def _l1(vectors: Tensor) -> Tensor:
    return vectors.abs().sum(-1)


def _l2(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=-1)


def _norm_of_heads(heads: HeadContributions, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """The norm of a product with a number factors, so no vector per pair of tokens is needed."""
    raw = torch.empty_like(heads.coefficient)
    for some, written in heads.written():
        torch.mul(heads.coefficient[some], norm(written)[:, None], out=raw[some])
    return raw


def _share(raw: Float[Tensor, "dest edge"], exists: Bool[Tensor, "dest edge"]) -> Float[Tensor, "dest edge"]:
    """Each in-edge's share of the state's total; all zero where the total is."""
    raw = raw.masked_fill(~exists, 0.0)
    return raw / _or_one(raw.sum(1, keepdim=True))


def _as_it_is(raw: Float[Tensor, "dest edge"], exists: Bool[Tensor, "dest edge"]) -> Float[Tensor, "dest edge"]:
    return raw.masked_fill(~exists, 0.0)


# -- proximity (Information Flow Routes) ------------------------------------------------------------


def proximity(vectors: Tensor, state: Tensor) -> Tensor:
    """``|y|_1 - |y - z|_1`` for contributions z of states y; at most ``|z|_1``, negative if z leads away.

    Summed as ``min(s z, 2|y| - s z)`` over dimensions, with s the sign of y: the same number without
    the difference of two large norms, whose rounding would decide the order of small contributions.
    """
    along = vectors * state.sign()
    return torch.minimum(along, 2 * state.abs() - along).sum(-1)


def _proximity_of_heads(heads: HeadContributions, state: Tensor) -> Tensor:
    """Proximities of all pairs of tokens, in blocks of heads, targets and sources that fit the workspace."""
    coefficient = heads.coefficient
    raw = torch.zeros_like(coefficient)
    sign, double = state.sign(), 2 * state.abs()
    vector = state.shape[-1] * state.element_size()
    for some, written in heads.written():
        n_some, n_src, _ = written.shape
        n_at_once = max(1, heads.workspace // (2 * n_some * vector))  # pairs of tokens; two buffers
        rows, columns = max(1, n_at_once // n_src), min(n_src, n_at_once)
        for first in range(0, len(state), rows):
            dest = slice(first, first + rows)
            n_past = min(n_src, heads.first_dest + first + rows)  # later tokens cannot be attended to
            for start in range(0, n_past, columns):
                src = slice(start, min(start + columns, n_past))
                along = written[:, None, src] * sign[None, dest, None]
                along.mul_(coefficient[some, dest, src, None])
                other = double[None, dest, None] - along
                raw[some, dest, src] = torch.minimum(along, other, out=other).sum(-1)
    return raw


def _clamped_share(raw: Float[Tensor, "dest edge"], exists: Bool[Tensor, "dest edge"]) -> Float[Tensor, "dest edge"]:
    return _share(raw.clamp(min=0.0), exists)


def _shifted_share(raw: Float[Tensor, "dest edge"], exists: Bool[Tensor, "dest edge"]) -> Float[Tensor, "dest edge"]:
    """Shares after the smallest proximity of the state, by its absolute value, is added to all (the code's variant)."""
    smallest = raw.masked_fill(~exists, torch.inf).amin(1, keepdim=True)
    return _share(raw + smallest.abs(), exists)


# -- cosine --------------------------------------------------------------------------------------


def _cosine(dot: Tensor, lengths: Tensor) -> Tensor:
    """``(1 + cos) / 2`` from dot product and product of lengths; a vector of length zero is taken as orthogonal."""
    return (1 + dot / _or_one(lengths)) / 2


def _cosine_of_heads(heads: HeadContributions, state: Tensor) -> Tensor:
    """The weight of the attention does not matter, being positive.

    Where it underflows to zero the direction is still that of the exact weight; outside a local window, where the
    weight is exactly zero, an edge gets the score of what it would carry.
    """
    raw = torch.empty_like(heads.coefficient)
    for some, written in heads.written():
        lengths = _l2(state)[None, :, None] * _l2(written)[:, None]
        raw[some] = _cosine(state @ written.transpose(1, 2), lengths)
    return raw


MEASURES: dict[str, Measure] = {
    "norm": Measure(lambda z, y: _l1(z), lambda heads, y: _norm_of_heads(heads, _l1), _share),
    "norm-l2": Measure(lambda z, y: _l2(z), lambda heads, y: _norm_of_heads(heads, _l2), _share),
    "norm-ratio": Measure(
        lambda z, y: _l1(z) / _or_one(_l1(y)),
        lambda heads, y: _norm_of_heads(heads, _l1) / _or_one(_l1(y))[None, :, None],
        _as_it_is,
    ),
    "flow": Measure(proximity, _proximity_of_heads, _clamped_share),
    "flow-shifted": Measure(proximity, _proximity_of_heads, _shifted_share),
    "cosine": Measure(
        lambda z, y: _cosine((z * y).sum(-1), _l2(z) * _l2(y)), _cosine_of_heads, _as_it_is
    ),
}  # fmt: skip
