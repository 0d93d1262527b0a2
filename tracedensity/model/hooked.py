"""What `HookedTransformer` of TransformerLens 3.9 calls its values and weights."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.model.adapter import (
    SCALES,
    NormName,
    Shape,
    Site,
    Visiting,
    coupled,
    guests,
    named_weights,
    norm_of,
    remade,
)
from tracedensity.model.idle import IdleAttention
from tracedensity.model.norm import NormLayer
from tracedensity.model.place import Input, Place, Point, Spared
from tracedensity.model.precision import full_precision

_POINTS = {
    "embed": "hook_embed",
    "resid_pre": "blocks.{}.hook_resid_pre",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "pattern": "blocks.{}.attn.hook_pattern",
    "z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "pre": "blocks.{}.mlp.hook_pre",
    "pre_linear": "blocks.{}.mlp.hook_pre_linear",
    "post": "blocks.{}.mlp.hook_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
    "final_scale": "ln_final.hook_scale",
}


class HookedAdapter:
    """`HookedTransformer`, processed or not."""

    kind = "HookedTransformer"

    def __init__(self, model: Any) -> None:
        if getattr(model.cfg, "attention_dir", "causal") != "causal":
            raise ValueError(
                f"`model` must be a causal language model, got attention in both directions ({model.cfg.model_name})."
            )
        self.model = model
        self._norms = self._norm_names()

    def shape(self) -> Shape:
        cfg = self.model.cfg
        return Shape(
            name=str(cfg.model_name),
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            d_mlp=cfg.d_mlp or 0,
            d_vocab=cfg.d_vocab,
            n_ctx=cfg.n_ctx,
            has_mlp=not cfg.attn_only,
            parallel=bool(cfg.parallel_attn_mlp),
            positions=str(cfg.positional_embedding_type),
        )

    def state(self) -> object:
        cfg = self.model.cfg
        flags = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")
        return (cfg.normalization_type, self.counts_ungrouped, *(getattr(cfg, flag) for flag in flags))

    def processed(self) -> str:
        folded = str(self.model.cfg.normalization_type).endswith("Pre")
        return "norms folded into the next weights" if folded else "norms not folded"

    def _norm_names(self) -> dict[str, str]:
        """Which of a block's modules are which norms."""
        cfg = self.model.cfg
        if cfg.normalization_type is None:
            return {}
        if self._norms_follow:
            return {"attn_out": "ln1", "mlp_out": "ln2"}
        names = {"attn_in": "ln1", "mlp_in": "ln2"}
        if cfg.use_normalization_before_and_after:
            names |= {"attn_out": "ln1_post", "mlp_out": "ln2_post"}
        return {name: module for name, module in names.items() if not cfg.attn_only or name.startswith("attn")}

    @property
    def _norms_follow(self) -> bool:
        """Whether `ln1` and `ln2` are called with what sublayers make."""
        from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

        return self.model.cfg.original_architecture in POST_NORM_ARCHITECTURES

    @property
    def _reads_one_stream(self) -> bool:
        """Whether queries, keys and values are made of one stream, by `ln1` and nothing else."""
        cfg = self.model.cfg
        apart = cfg.use_split_qkv_input or cfg.positional_embedding_type == "shortformer"  # positions join the former
        return not apart and not self._norms_follow

    # -- places ----------------------------------------------------------------------------------

    def place(self, name: str, layer: int) -> Place | None:
        block = self.model.blocks[layer]
        if name == "mlp_idle":
            return None if self.W_out(layer) is None else Spared.of(block.mlp)
        if name == "attn_idle":
            return IdleAttention.of(block.ln1, block.attn) if self._reads_one_stream else None
        if name == "mlp_in":
            # there is a hook for it only where a flag is set; the module that reads it has a hook of PyTorch's
            return Input(getattr(block, self._norms.get("mlp_in", "mlp")))
        if name.endswith("_scale") and name != "final_scale":
            norm = norm_of(name)
            return Point(getattr(block, self._norms[norm]).hook_scale) if norm in self._norms else None
        if name == "resid_mid" and self.model.cfg.attn_only:
            name = "resid_post"
        point = self.model.hook_dict.get(_POINTS[name].format(layer))
        return None if point is None else Point(point)

    def skip_attn(self, layer: int, edit: Callable[[Tensor], Tensor]) -> list[Visiting]:
        before, branch, after = (self.place(name, layer) for name in ("resid_pre", "attn_out", "resid_mid"))
        assert before is not None and branch is not None and after is not None
        return remade(before, branch, after, edit)

    def scales(self) -> Iterator[Site]:
        for layer in range(self.model.cfg.n_layers):
            yield from ((SCALES[norm], layer) for norm in self._norms)
        if self.model.cfg.normalization_type is not None:
            yield "final_scale", 0

    # -- running ---------------------------------------------------------------------------------

    def run(
        self, tokens: Int[Tensor, "batch pos"], end: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch some_pos d_model"]:
        n_layers = self.model.cfg.n_layers
        place = self.place("resid_post", n_layers - 1)
        assert place is not None
        detach = place.attach(end)
        try:
            return self.model(tokens, stop_at_layer=n_layers, padding_side="right")
        finally:
            detach()

    def predicted(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.model(tokens, padding_side="right")

    def unembedded(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """What TransformerLens does after the last block, but for the copy of the unembedding that it makes."""
        model = self.model
        if model.cfg.normalization_type is not None:
            stream = model.ln_final(stream)
        if stream.dtype not in (torch.float32, torch.float64):
            logits = model.unembed(stream)  # the same roundings
        else:
            logits = model.unembed.hook_in(stream) @ model.unembed.W_U + model.unembed.b_U
            logits = model.unembed.hook_out(logits)
        cap = model.cfg.output_logits_soft_cap
        return cap * (logits / cap).tanh() if cap > 0 else logits

    @contextmanager
    def ungrouped(self) -> Iterator[None]:
        if self.counts_ungrouped:
            yield
            return
        for layer, block in enumerate(self.model.blocks):
            norm = getattr(block.attn, "k_norm", None)
            if norm is not None and self.model.cfg.n_key_value_heads and norm.w.numel() > self.model.cfg.d_head:
                raise coupled(str(self.model.cfg.model_name), layer)
        modules = [block.attn for block in self.model.blocks if getattr(block.attn, "repeat_kv_heads", 1) > 1]
        before = [module.repeat_kv_heads for module in modules]
        try:
            for module in modules:
                module.repeat_kv_heads = 1
            yield
        finally:
            for module, repeats in zip(modules, before, strict=True):
                module.repeat_kv_heads = repeats

    def modules(self) -> Iterator[torch.nn.Module]:
        yield from self.model.modules()

    def forgetting(self) -> AbstractContextManager[None]:
        return nullcontext()

    @property
    def counts_ungrouped(self) -> bool:
        return bool(self.model.cfg.ungroup_grouped_query_attention)

    def attention(self, layer: int) -> torch.nn.Module:
        return self.model.blocks[layer].attn

    def guests_of_reading(self) -> Iterator[str]:
        names = ["hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"]
        if "attn_in" in self._norms:
            names += ["ln1.hook_scale", "ln1.hook_normalized"]
        yield from guests(self.model, names)

    def guests_of_groups(self) -> Iterator[str]:
        if not self.counts_ungrouped:
            yield from guests(self.model, ["attn.hook_k", "attn.hook_v", "attn.hook_rot_k"])

    # -- weights ---------------------------------------------------------------------------------

    def norm(self, name: NormName, layer: int) -> NormLayer | None:
        if name == "final":
            return None if self.model.cfg.normalization_type is None else self._norm(self.model.ln_final)
        module = self._norms.get(name)
        return None if module is None else self._norm(getattr(self.model.blocks[layer], module))

    def _norm(self, module: Any) -> NormLayer:
        weight, bias = getattr(module, "w", None), getattr(module, "b", None)
        if weight is None:
            beside = next(self.model.parameters())
            weight = torch.ones(self.model.cfg.d_model, dtype=beside.dtype, device=beside.device)
        return NormLayer(
            full_precision(weight.detach()),
            None if bias is None else full_precision(bias.detach()),
            type(module).__name__.startswith("LayerNorm"),
            float(module.eps),
        )

    def projection(self, name: str, layer: int) -> tuple[Float[Tensor, "head d_model d_head"], Tensor | None]:
        attention = self.model.blocks[layer].attn
        # W_K of shared keys and values is repeated for the query heads
        grouped = "_" if name != "q" and hasattr(attention, f"_W_{name.upper()}") else ""
        weight, bias = (getattr(attention, f"{grouped}{kind}_{name.upper()}").detach() for kind in "Wb")
        return weight, bias

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        return self.model.blocks[layer].attn.W_O.detach()

    def W_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"] | None:
        weight = getattr(self.model.blocks[layer].mlp, "W_out", None)
        return None if weight is None else weight.detach()

    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.model.unembed.W_U.detach()

    def activation(self, layer: int) -> Callable[[Tensor], Tensor] | None:
        if self.model.cfg.is_layer_norm_activation():  # a norm makes neurons depend on one another
            return None
        return getattr(self.model.blocks[layer].mlp, "act_fn", None)

    def gated(self, layer: int) -> bool:
        return hasattr(self.model.blocks[layer].mlp, "W_gate")

    def weights(self) -> Iterator[tuple[str, Tensor | None]]:
        # there is a table of positions also where none is read
        unread = () if self.model.cfg.positional_embedding_type in ("standard", "shortformer") else ("pos_embed.W_pos",)
        modules = [self.model.embed, *(module for block in self.model.blocks for module in _norms_in(block))]
        named = named_weights(self, self._others(), [*modules, getattr(self.model, "ln_final", None)])
        return (each for each in named if each[0] not in unread)

    def _others(self) -> Iterator[tuple[str, Tensor | None]]:
        yield "embed.W_E", self.model.embed.W_E
        yield "pos_embed.W_pos", getattr(getattr(self.model, "pos_embed", None), "W_pos", None)
        norm = getattr(self.model.embed, "ln", None)
        yield "embed.norm.weight", getattr(norm, "w", None)
        yield "embed.norm.bias", getattr(norm, "b", None)
        yield "unembed.b_U", self.model.unembed.b_U
        for layer, block in enumerate(self.model.blocks):
            yield f"blocks.{layer}.attn.b_O", block.attn.b_O
            plain = not self.model.cfg.attn_only and self.W_out(layer) is not None
            for name in ("W_in", "b_in", "W_gate", "W_out", "b_out") if plain else ():
                yield f"blocks.{layer}.mlp.{name}", getattr(block.mlp, name, None)
            for name in ("q_norm", "k_norm"):
                norm = getattr(block.attn, name, None)
                yield f"blocks.{layer}.attn.{name}", getattr(norm, "w", None)

    def behaviour(self) -> dict[str, object]:
        cfg = self.model.cfg
        rotary = cfg.positional_embedding_type == "rotary"
        scaling: dict[str, object] = {}
        if rotary and cfg.use_NTK_by_parts_rope:
            names = ("factor", "low_freq_factor", "high_freq_factor")
            numbers = [float(getattr(cfg, f"NTK_by_parts_{name}")) for name in names]
            scaling = {"rotary scaling": ["llama3", *numbers, float(cfg.NTK_original_ctx_len)]}
        elif rotary and cfg.rotary_scaling_factor != 1:
            scaling = {"rotary scaling": ["linear", float(cfg.rotary_scaling_factor)]}
        return scaling | {
            "positions": cfg.positional_embedding_type,
            "rotary base": float(cfg.rotary_base) if rotary else None,
            "cap of scores": max(0.0, float(cfg.attn_scores_soft_cap)),
            "cap of logits": max(0.0, float(cfg.output_logits_soft_cap)),
        }


def _norms_in(block: Any) -> Iterator[torch.nn.Module | None]:
    yield from (getattr(block, name, None) for name in ("ln1", "ln1_post", "ln2", "ln2_post"))
    yield from (getattr(block.attn, name, None) for name in ("q_norm", "k_norm"))
