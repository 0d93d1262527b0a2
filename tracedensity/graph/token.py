"""The token graph of the density papers: what flows from which token to which, sublayer by sublayer."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool
from torch import Tensor

from tracedensity.graph import Dropped, EdgeList, Rows, flatten, unflatten
from tracedensity.model import Attended, Edit, Site, Transformer

_NAME = re.compile(r"(?:a(\d+)\.h(\d+)@(\d+)->|m(\d+)(?:\.n(\d+))?@|r(\d+)\.(attn|mlp)@)(\d+)")

SMALL = 2**20
"""Edges of a graph that is kept for other prompts of its length."""

# Where the edges of a kind are added up.
_SITES = {"mlp": "mlp_out", "neuron": "post", "resid_attn": "skip_attn", "resid_mlp": "skip_mlp"}


@dataclass(frozen=True)
class TokenGraph:
    """Contributions to the residual stream of one prompt, as edges between its states.

    A node is the stream at one token before the first block, after an attention sublayer, or after an MLP.
    Each edge carries one summand of the state that it enters:

    - ``head`` ``[layer, head, dest, src]``: what a head brings from token `src` to token `dest`;
    - ``resid_attn`` ``[layer, pos]``: the skip connection around attention;
    - ``mlp`` ``[layer, pos]``: what the MLP adds; or, in its place, ``neuron`` ``[layer, pos, d_mlp]``: what each of
      its neurons adds;
    - ``resid_mlp`` ``[layer, pos]``: the skip connection around the MLP.

    Only what can reach the prediction, the stream at the last token after the last block, is an edge: in the
    last layer nothing but the last token. The biases of output projections belong to no edge. Embedding and
    unembedding are no edges either. Queries and keys are none: patterns are computed anew in every circuit.

    Attributes:
        n_layers: Number of blocks.
        n_heads: Query heads per block.
        n_pos: Tokens of the prompt.
        has_mlp: Whether blocks have an MLP; without one there is one state per block and token.
        d_mlp: Neurons per MLP if each is an edge of its own; None if whole MLPs are.

    References:
        Tracing Computation Density in LLMs (arXiv 2605.27033), section on the computation graph.
    """

    n_layers: int
    n_heads: int
    n_pos: int
    has_mlp: bool = True
    d_mlp: int | None = None

    def __post_init__(self) -> None:
        if self.d_mlp is not None and not self.has_mlp:
            raise ValueError(f"`d_mlp` must be None for a graph without MLPs, got {self.d_mlp}.")

    @classmethod
    def of(cls, model: Transformer, n_pos: int, *, neurons: bool = False) -> "TokenGraph":
        """The graph of a model for prompts of `n_pos` tokens.

        Raises:
            ValueError: If attention and MLP of a block read the same stream, or neurons cannot be told apart.
        """
        model.require_sequential('the token graph does not describe parallel blocks. Use `graph="component"`.')
        if neurons and not model.has_mlp:
            raise ValueError(f"`neurons` must be left out for {model.name}, which has no MLPs.")
        if neurons:
            model.W_out(0)  # raises where they cannot be told apart
        graph = cls(model.n_layers, model.n_heads, n_pos, model.has_mlp, model.d_mlp if neurons else None)
        return _kept(graph) if graph.n_edges < SMALL else graph

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        states = (self.n_layers, self.n_pos)
        heads = (self.n_layers, self.n_heads, self.n_pos, self.n_pos)
        if not self.has_mlp:
            return {"head": heads, "resid_attn": states}
        mlp = {"mlp": states} if self.d_mlp is None else {"neuron": (*states, self.d_mlp)}
        return {"head": heads, **mlp, "resid_attn": states, "resid_mlp": states}

    @property
    def n_edges(self) -> int:
        """Closed form, ``(L-1) (H T(T+1)/2 + 3T) + H T + 3`` with MLPs."""
        links = 2 + (self.d_mlp or 1) if self.has_mlp else 1  # per state: two skips and the MLP, or one skip
        pairs = self.n_pos * (self.n_pos + 1) // 2
        full_layer = self.n_heads * pairs + links * self.n_pos
        return (self.n_layers - 1) * full_layer + self.n_heads * self.n_pos + links

    @property
    def n_nodes(self) -> int:
        """States that reach the prediction, inputs included."""
        per_layer = 2 if self.has_mlp else 1
        return self.n_pos * (self.n_layers * per_layer + 1) - per_layer * (self.n_pos - 1)

    @cached_property
    def exists(self) -> dict[str, Bool[Tensor, "..."]]:
        states = torch.ones(self.n_layers, self.n_pos, dtype=torch.bool)
        states[-1, :-1] = False
        causal = torch.ones(self.n_pos, self.n_pos, dtype=torch.bool).tril()
        heads = (states[:, :, None] & causal)[:, None].expand(self.shapes["head"]).contiguous()
        exists = {kind: heads if kind == "head" else states.clone() for kind in self.shapes}
        if self.d_mlp is not None:
            exists["neuron"] = states[..., None].expand(self.shapes["neuron"]).contiguous()
        return exists

    @cached_property
    def edges(self) -> EdgeList:
        """Per layer: attention in-edges by target, source, skip before heads; then per target skip and MLP.

        This is the order in which the authors' pipeline pushes in-edges, so that ties break as theirs do.
        """
        numbers, start = {}, 0  # position of each edge in the tensors laid end to end
        for kind, shape in self.shapes.items():
            count = torch.Size(shape).numel()
            numbers[kind] = torch.arange(start, start + count).view(shape)
            start += count
        pos = torch.arange(self.n_pos)
        states_per_layer = 2 if self.has_mlp else 1
        index, source, target, blocks, end = [], [], [], [], 0
        for layer in range(self.n_layers):
            before, after = (torch.arange(2)[:, None] + states_per_layer * layer) * self.n_pos + pos
            # [dest, src, 1 + head]: the skip connection stands before the heads
            skip = torch.where(torch.eye(self.n_pos, dtype=torch.bool), numbers["resid_attn"][layer], -1)
            heads = numbers["head"][layer].permute(1, 2, 0)
            heads = torch.where(self.exists["head"][layer].permute(1, 2, 0), heads, -1)
            skip = torch.where(self.exists["resid_attn"][layer][:, None], skip, -1)
            slots = torch.cat([skip[..., None], heads], dim=-1)
            is_edge = slots >= 0
            index.append(slots[is_edge])
            source.append(before[None, :, None].expand_as(slots)[is_edge])
            target.append(after[:, None, None].expand_as(slots)[is_edge])
            blocks.append(slice(end, end := end + len(index[-1])))
            if self.has_mlp:
                mlp = numbers["mlp"][layer][:, None] if self.d_mlp is None else numbers["neuron"][layer]
                slots = torch.cat([numbers["resid_mlp"][layer][:, None], mlp], dim=-1)
                is_edge = self.exists["resid_mlp"][layer][:, None].expand_as(slots)
                index.append(slots[is_edge])
                source.append(after[:, None].expand_as(slots)[is_edge])
                target.append((after + self.n_pos)[:, None].expand_as(slots)[is_edge])
                blocks.append(slice(end, end := end + len(index[-1])))
        n_nodes = self.n_pos * (states_per_layer * self.n_layers + 1)
        n_edges = blocks[-1].stop
        return EdgeList(
            torch.cat(index), torch.cat(source), torch.cat(target), tuple(blocks), n_nodes, output=n_nodes - 1,
            is_edge=torch.ones(n_edges, dtype=torch.bool),
        )  # fmt: skip

    def edge_name(self, kind: str, index: tuple[int, ...]) -> str:
        """``a2.h3@5->7``: head 3 of layer 2 from token 5 to 7; ``m2@7``, ``m2.n5@7``; ``r2.attn@7``, ``r2.mlp@7``."""
        if kind == "head":
            layer, head, dest, src = index
            return f"a{layer}.h{head}@{src}->{dest}"
        if kind == "neuron":
            layer, pos, neuron = index
            return f"m{layer}.n{neuron}@{pos}"
        layer, pos = index
        return f"m{layer}@{pos}" if kind == "mlp" else f"r{layer}.{kind.removeprefix('resid_')}@{pos}"

    def edge_index(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Kind and index of the edge with a name.

        Raises:
            ValueError: If the graph has no such edge.
        """
        if found := _NAME.fullmatch(name):
            attn_layer, head, src, mlp_layer, neuron, skip_layer, around, dest = found.groups()
            if attn_layer is not None:
                kind, index = "head", (int(attn_layer), int(head), int(dest), int(src))
            elif neuron is not None:
                kind, index = "neuron", (int(mlp_layer), int(dest), int(neuron))
            elif mlp_layer is not None:
                kind, index = "mlp", (int(mlp_layer), int(dest))
            else:
                kind, index = f"resid_{around}", (int(skip_layer), int(dest))
            shape = self.shapes.get(kind)
            if shape and all(i < n for i, n in zip(index, shape, strict=True)) and self.exists[kind][index]:
                return kind, index
        example = self.edge_name("head", (self.n_layers - 1, 0, self.n_pos - 1, 0))
        raise ValueError(f"`name` must be an edge of this graph, like {example!r}, got {name!r}.")

    def ends(self, kind: str, index: tuple[int, ...]) -> tuple[str, str, str]:
        """``s0@3`` is the embedding of token 3, ``s1@3`` what the stream is there after one sublayer, and so on."""
        if kind == "head":
            layer, head, dest, src = index
            row = layer * (2 if self.has_mlp else 1)
            return f"s{row}@{src}", f"s{row + 1}@{dest}", f"h{head}"
        layer, pos = index[:2]
        row = layer * (2 if self.has_mlp else 1) + (kind in ("mlp", "neuron", "resid_mlp"))
        return f"s{row}@{pos}", f"s{row + 1}@{pos}", f"n{index[2]}" if kind == "neuron" else kind

    @property
    def n_held(self) -> int:
        return 0

    @property
    def ungrouped(self) -> bool:
        """Keys and values are no edges here."""
        return False

    def edits(self, dropped: Dropped, rows: Rows) -> Mapping[Site, Edit]:
        """What an absent edge would have added is left out, or replaced by what it carries when ablated.

        Nothing else is patched or frozen. A pattern entry is set to zero after the softmax, with no renormalisation; an
        MLP's output, a neuron's activation or a skip connection's term is set to zero (the density papers' ablation).
        Other ablations put their own in that place.
        """
        instead: Mapping[Site, Tensor] = rows.ablated if isinstance(rows.ablated, Mapping) else {}

        def share(kind: str, layer: int) -> Tensor | None:
            found = dropped(kind, layer)
            return found if found is None or len(rows.last) == 1 else found.repeat_interleave(len(rows.last), 0)

        def tiled(site: Site) -> Tensor | None:
            value = instead.get(site)
            return (
                value if value is None or len(value) == 1 else value.repeat(rows.n_circuits, *[1] * (value.dim() - 1))
            )

        def edit(kind: str, layer: int) -> Edit:
            def patched(value: Tensor) -> Tensor:
                absent = share(kind, layer)
                if absent is None:
                    return value
                if kind != "neuron":
                    absent = absent[..., None]  # all of d_model
                return _patched(value, absent, tiled((_SITES[kind], layer)))

            return patched

        def idle_mlp(layer: int) -> Edit:
            def absent(value: Tensor) -> Tensor:
                found = share("mlp", layer)
                if found is None or found.dtype != torch.bool:
                    return torch.zeros(value.shape[:-1], dtype=torch.bool, device=value.device)
                return found

            return absent

        def edit_heads(layer: int) -> dict[Site, Edit]:
            known: list[Tensor] = []  # which edges are absent, where heads are run
            brought: list[Tensor] = []  # what absent edges add to the outputs of heads

            def idle(value: Tensor) -> Tensor:
                absent = share("head", layer)
                if absent is None:
                    return torch.zeros(value.shape[:2], dtype=torch.bool, device=value.device)
                nothing = absent.view(torch.uint8).amin(1).amin(2).bool()  # ten times as fast as `all`
                attended = Attended.of(nothing)
                known[:] = [attended.picked(absent)[:, :, attended.start :]]
                return nothing

            def weighed(pattern: Tensor) -> Tensor:
                absent = known.pop() if known else share("head", layer)
                return pattern if absent is None else _patched(pattern, absent, None)

            def replaced(pattern: Tensor) -> Tensor:
                if (absent := share("head", layer)) is None:
                    return pattern
                values, own = tiled(("v", layer)), tiled(("pattern", layer))
                assert values is not None
                weight = (pattern if own is None else own.to(pattern.dtype)) * absent.to(pattern.dtype)
                values = values.to(weight.dtype).expand(len(weight), self.n_pos, -1, -1)
                brought.append(einsum(weight, values, "row head dest src, row src head d_head -> row dest head d_head"))
                return _patched(pattern, absent, None)

            def mixed(z: Tensor) -> Tensor:
                return z + brought.pop() if brought else z

            if ("v", layer) in instead:
                return {("pattern", layer): replaced, ("z", layer): mixed}
            return {("attn_idle", layer): idle, ("pattern", layer): weighed}

        edits: dict[Site, Edit] = {}
        for layer in range(self.n_layers):
            edits |= edit_heads(layer)
            edits |= {(_SITES[kind], layer): edit(kind, layer) for kind in self.shapes if kind != "head"}
            if "mlp" in self.shapes:
                edits["mlp_idle", layer] = idle_mlp(layer)
        return edits

    def fed(self, kept: Bool[Tensor, "*circuit edge"]) -> Bool[Tensor, "*circuit edge"]:
        """Circuits, and the skip connections without which their heads would have nothing to read.

        These lead from the embedding of a token up to where a head last reads the token, or up to the prediction. (An
        MLP at a token that no head reads afterwards brings nothing to anybody.)
        """
        by_kind = unflatten(self, kept, False)
        read = by_kind["head"].any(-3).any(-2)  # [*circuit, layer, src]
        skips = [kind for kind in self.shapes if kind.startswith("resid")]
        wanted = torch.zeros_like(read[..., 0, :])
        wanted[..., -1] = True
        for layer in reversed(range(self.n_layers)):
            for kind in skips:
                by_kind[kind][..., layer, :] |= wanted & self.exists[kind][layer]
            wanted = wanted | read[..., layer, :]
        return flatten(self, by_kind)

    def to_dict(self) -> dict[str, Any]:
        return {"graph": "token", **asdict(self)}


@lru_cache(maxsize=2)
def _kept(graph: TokenGraph) -> TokenGraph:
    """The same graph as for the last prompt of this length, whose list of edges has been made."""
    return graph


def _patched(value: Tensor, absent: Tensor, instead: Tensor | None) -> Tensor:
    """A value where edges are absent, all of it (booleans) or in shares."""
    if absent.dtype == torch.bool:
        # a product takes a third of the time of masked_fill; what is not finite stays so, and is found in the logits
        return value * ~absent if instead is None else torch.where(absent, instead.to(value.dtype), value)
    # taken from one while it is precise: in half precision what is left of an edge that is nearly absent would be noise
    kept = (1 - absent).to(value.dtype)
    if instead is None:
        return value * kept
    return value * kept + instead.to(value.dtype) * absent.to(value.dtype)
