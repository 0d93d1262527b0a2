"""What edges say: the tokens that each contribution to the stream speaks for, read off through the unembedding."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.model import Site, as_transformer

_BLOCK = 2**25  # logits that are held at a time


@dataclass(frozen=True, eq=False, repr=False)
class TopTokens:
    """The tokens whose logits each edge of a circuit would raise most, if nothing came between it and the unembedding.

    Only the direct path is looked at, through the final norm and the unembedding: what later heads and MLPs make of
    a contribution, above all of one in an early layer, may be quite different. How much a head attends changes the
    size of what it brings and not its direction: so these are tokens of a head and of the token that it reads,
    wherever it brings them.

    Attributes:
        graph: What the edges are.
        tokens: For ``"head"`` ``[layer, head, src, k]``, for ``"mlp"``, ``"resid_attn"`` and ``"resid_mlp"`` (the
            stream itself, before attention and before the MLP) ``[layer, pos, k]``: token ids, the most promoted one
            first; -1 where the circuit has no edge.
        texts: The text of each of these tokens.
    """

    graph: TokenGraph
    tokens: Mapping[str, Int[Tensor, "..."]]
    texts: Mapping[int, str]

    def of(self, kind: str, index: tuple[int, ...]) -> list[str]:
        """Texts of the tokens of one edge; none where the circuit did not have it.

        Args:
            kind: A kind of edge of the graph.
            index: Where the edge is, as in the graph's tensors.
        """
        if kind not in self.tokens:
            return []
        if kind == "head":
            layer, head, _, src = index
            index = (layer, head, src)
        return [self.texts[token] for token in self.tokens[kind][index].tolist() if token >= 0]

    def __repr__(self) -> str:
        n_edges = sum(int((tokens[..., 0] >= 0).sum()) for tokens in self.tokens.values())
        return f"TopTokens({n_edges} contributions, {len(self.texts)} different tokens)"


def top_tokens(model: object, circuit: Circuit, *, k: int = 3) -> TopTokens:
    """What the edges of a circuit say: the tokens whose logits they raise most by themselves.

    Args:
        model: The model that the circuit was found in.
        circuit: A circuit of a token graph; edges of single neurons are left out.
        k: How many tokens an edge.

    Raises:
        ValueError: If the circuit is of another graph or model, or `k` is not from 1 to the size of the vocabulary.

    References:
        The logit lens (nostalgebraist, 2020), and direct logit attribution.
    """
    if not isinstance(circuit, Circuit):
        raise ValueError(f"`circuit` must be a Circuit, got a {type(circuit).__name__}.")
    transformer, graph = as_transformer(model), circuit.graph
    if not isinstance(graph, TokenGraph):
        raise ValueError(f"`circuit` must be one of a TokenGraph to be read, got one of {type(graph).__name__}.")
    if not 1 <= k <= transformer.d_vocab:
        raise ValueError(f"`k` must be from 1 to {transformer.d_vocab}, the size of the vocabulary, got {k}.")
    circuit.provenance.require_same_model(transformer)
    names = {"resid_attn": "resid_pre", "head": "v", "resid_mlp": "resid_mid", "mlp": "mlp_out"}
    read = {kind: name for kind, name in names.items() if kind in graph.shapes}
    sites: list[Site] = [(name, layer) for layer in range(graph.n_layers) for name in read.values()]
    _, held = transformer.run(circuit.provenance.tokens.to(transformer.device), [*sites, *transformer.scale_sites])
    norm, unembedding = transformer.final_norm(held.get(("final_scale", 0))), transformer.W_U
    tokens = {}
    for kind, name in read.items():
        wanted = circuit.kept[kind].to(transformer.device)
        wanted = wanted.any(2) if kind == "head" else wanted  # [layer, head, src], whatever the dest
        best = torch.full((*wanted.shape, k), -1, dtype=torch.long)
        for layer in range(graph.n_layers):
            values = held.pop((name, layer))
            if kind == "head":
                values = transformer.per_head(values).transpose(0, 1)  # [head, src, d_head]
                vectors = (values.to(unembedding) @ transformer.head_weights(layer))[wanted[layer]]
            else:
                vectors = values[wanted[layer]].to(unembedding)
            vectors = vectors if norm is None else norm.without_scale(vectors)  # a positive scale changes no order
            best[layer][wanted[layer].cpu()] = _best(vectors, unembedding, k)
        tokens[kind] = best
    ids = sorted({token for each in tokens.values() for token in each.unique().tolist()} - {-1})
    return TopTokens(graph, tokens, dict(zip(ids, transformer.texts(ids), strict=True)))


def _best(
    vectors: Float[Tensor, "contribution d_model"], unembedding: Float[Tensor, "d_model d_vocab"], k: int
) -> Int[Tensor, "contribution k"]:
    """The tokens with the largest logits, some contributions at a time: vocabularies are large."""
    n_at_once = max(1, _BLOCK // unembedding.shape[1])
    parts = [(part @ unembedding).topk(k).indices.cpu() for part in vectors.split(n_at_once)]
    return torch.cat([torch.empty(0, k, dtype=torch.long), *parts])
