"""What `TransformerBridge` of TransformerLens 3.9 and 4 calls its values and weights: those of a Hugging Face model."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
)
from tracedensity.model.norm import NormLayer
from tracedensity.model.place import BehindNorm, Input, Place, Point, Softmax, Spared, Sum
from tracedensity.model.precision import full_precision
from tracedensity.model.spread import at_hand, home

_POINTS = {
    "resid_pre": "hook_resid_pre",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "pre": "mlp.hook_pre",
    "pre_linear": "mlp.hook_pre_linear",
    "post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}


class BridgeAdapter:
    """`TransformerBridge`, in compatibility mode or not.

    The bridge's `hook_resid_mid` is what the MLP reads: an edit there does not reach the skip connection. The stream in
    the middle of a block is therefore made of its two terms, and what is to be edited there is edited elsewhere.
    """

    kind = "TransformerBridge"

    def __init__(self, model: Any) -> None:
        self.model = model
        self._require_decoder()
        self._norms = self._norm_names()

    def _require_decoder(self) -> None:
        """Raise a ValueError that says why the graphs do not describe a model."""
        model, cfg = self.model, self.model.cfg
        name = str(cfg.model_name)
        # TransformerLens 3.9 does not say so of BERT, which has this
        if getattr(cfg, "attention_dir", "causal") != "causal" or "mlm_head" in model._modules:
            raise ValueError(f"`model` must be a causal language model, got attention in both directions ({name}).")
        if "blocks" not in model._modules:
            raise ValueError(
                f"`model` must be one stack of decoder blocks, got {name} ({cfg.architecture}), which has none."
            )
        if "project_out" in model._modules:
            raise ValueError(
                f"`model` must have a stream of one width, got {name}, which projects its embedding and its output."
            )
        for layer, block in enumerate(model.blocks):
            lacks = [each for each in ("q", "k", "v", "o") if each not in getattr(block, "attn", block)._modules]
            if "attn" not in block._modules or lacks:
                raise ValueError(
                    f"`model` must have attention with queries, keys and values of its own in every layer, got {name} "
                    f"({cfg.architecture}), whose layer {layer} lacks " + (", ".join(lacks) or "attention") + "."
                )

    def shape(self) -> Shape:
        cfg, block = self.model.cfg, self.model.blocks[0]
        weight = self.W_out(0) if "mlp" in block._modules else None
        return Shape(
            name=str(cfg.model_name),
            n_layers=len(self.model.blocks),
            n_heads=cfg.n_heads,
            n_kv_heads=self._n_kv_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            d_mlp=(cfg.d_mlp or 0) if weight is None else len(weight),
            d_vocab=cfg.d_vocab,
            n_ctx=cfg.n_ctx,
            has_mlp="mlp" in block._modules,
            parallel=self._parallel,
            positions=str(cfg.positional_embedding_type),
        )

    @property
    def _parallel(self) -> bool:
        return any(cls.__name__ == "ParallelBlockBridge" for cls in type(self.model.blocks[0]).__mro__)

    @property
    def _n_kv_heads(self) -> int:
        return getattr(self.model.cfg, "n_key_value_heads", None) or self.model.cfg.n_heads

    def state(self) -> object:
        cfg = self.model.cfg
        flags = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")
        return (*self._modes(), *(getattr(cfg, flag, False) for flag in flags))

    def _modes(self) -> tuple[bool, bool]:
        return bool(self.model.compatibility_mode), bool(getattr(self.model, "_weights_processed", False))

    def processed(self) -> str:
        compatible, folded = self._modes()
        weights = "weights processed" if folded else "weights as they are in Hugging Face"
        return f"compatibility mode, {weights}" if compatible else weights

    def _norm_names(self) -> dict[str, str]:
        """Which of a block's modules are which norms."""
        modules = self.model.blocks[0]._modules
        names = {"attn_in": "ln1", "attn_out": "ln1_post", "mlp_in": "ln2", "mlp_out": "ln2_post"}
        # TransformerLens 3.9 calls norms after a sublayer as it calls those before one
        if str(getattr(modules.get("ln1"), "name", "")).startswith("post_attention"):
            names = {"attn_out": "ln1", "mlp_out": "ln2"}
        return {norm: name for norm, name in names.items() if self._is_norm(modules.get(name))}

    def _is_norm(self, module: Any) -> bool:
        return any(cls.__name__ == "NormalizationBridge" for cls in type(module).__mro__)

    # -- places ----------------------------------------------------------------------------------

    def place(self, name: str, layer: int) -> Place | None:
        block = self.model.blocks[layer]
        if name == "attn_idle":  # attention is Hugging Face's own there, of many kinds
            return None
        if name == "mlp_idle":
            mlp = self._plain_mlp(layer)
            return None if mlp is None or mlp.name is None else Spared.of(mlp.original_component)
        if name == "embed":
            return Point(self._embedding.hook_out)
        if name == "final_scale":
            return Point(self.model.ln_final.hook_scale)
        if name.endswith("_scale"):
            norm = norm_of(name)
            return Point(getattr(block, self._norms[norm]).hook_scale) if norm in self._norms else None
        if name == "resid_mid":
            if "mlp" not in block._modules:
                return self.place("resid_post", layer)
            return Sum(Point(block.hook_in), self._point("attn_out", layer))
        if name == "mlp_in":
            if "mlp_in" in self._norms:
                return Point(getattr(block, self._norms["mlp_in"]).hook_in)
            read = Point(block.mlp.hook_in)
            if not self._parallel:
                return read
            return BehindNorm(Point(block.hook_in), read, self.norm("attn_in", layer))
        if name == "pattern" and self._is_delegated(block.attn):
            return Softmax(block.attn)
        return self._point(name, layer)

    def _point(self, name: str, layer: int) -> Point:
        return Point(self.model.hook_dict[f"blocks.{layer}.{_POINTS[name]}"])

    @property
    def _embedding(self) -> Any:
        """What makes the token embedding, with a norm that may come right after it."""
        return self.model._modules.get("embed_ln") or self.model.embed

    def _is_delegated(self, attention: Any) -> bool:
        """Whether the attention of Hugging Face runs as a whole, and its pattern is shown after it has been used."""
        base = next(cls for cls in type(attention).__mro__ if cls.__name__ == "AttentionBridge")
        reconstructed = type(attention).forward is not base.forward
        return not reconstructed and not getattr(attention.original_component, "accepts_pattern_fn", False)

    def skip_attn(self, layer: int, edit: Callable[[Tensor], Tensor]) -> list[Visiting]:
        """The stream is edited, and what attention reads of it put back."""
        block = self.model.blocks[layer]
        read: list[Tensor] = []

        def replace(value: Tensor) -> Tensor:
            read.append(value)
            return edit(value)

        reader = getattr(block, self._norms["attn_in"]) if "attn_in" in self._norms else block.attn
        put_back = Visiting(Input(reader), lambda value: read.pop(), first=True)
        return [Visiting(Point(block.hook_in), replace), put_back]

    def scales(self) -> Iterator[Site]:
        for layer in range(len(self.model.blocks)):
            yield from ((scale, layer) for norm, scale in SCALES.items() if norm in self._norms)
        if self.norm("final", 0) is not None:
            yield "final_scale", 0

    # -- running ---------------------------------------------------------------------------------

    def run(
        self, tokens: Int[Tensor, "batch pos"], end: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch some_pos d_model"]:
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        def stop(value: Tensor) -> Tensor:
            raise StopAtLayerException(end(value))

        detach = self._point("resid_post", len(self.model.blocks) - 1).attach(stop)
        try:
            with _edited_norms():
                return self.model(tokens, use_cache=False)
        finally:
            detach()

    def predicted(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        with self.forgetting():
            return self.model(tokens, use_cache=False)

    def unembedded(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        model = self.model
        if "ln_final" in model._modules:
            with _edited_norms():
                stream = model.ln_final(stream)
        logits = model.unembed(stream)
        cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0
        return cap * (logits / cap).tanh() if cap > 0 else logits

    @contextmanager
    def ungrouped(self) -> Iterator[None]:
        changes: list[tuple[Any, str, int]] = []
        n_heads = self.model.cfg.n_heads
        for layer, block in enumerate(self.model.blocks):
            original = block.attn.original_component
            norm = block.attn._modules.get("k_norm")
            together = norm is not None and norm.weight.numel() > self.model.cfg.d_head
            if together and self._n_kv_heads < n_heads:
                raise coupled(str(self.model.cfg.model_name), layer)
            names = {"num_key_value_groups": 1, "kv_repeats": 1, "n_kv_heads": n_heads}
            changes += [(original, name, value) for name, value in names.items() if hasattr(original, name)]
            if getattr(block.attn.config, "n_key_value_heads", None):
                changes.append((block.attn.config, "n_key_value_heads", n_heads))
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
        try:
            for owner, name, value in changes:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)

    def modules(self) -> Iterator[torch.nn.Module]:
        yield from self.model.modules()
        # not among them are the model itself of Hugging Face and, in many families, the dropout of its embedding
        yield from self.model.original_model.modules()

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        # attention whose queries, keys and values are one projection keeps its last pattern, and its graph with it
        keeping = [block.attn for block in self.model.blocks if hasattr(block.attn, "_pattern")]
        before = [attention._pattern for attention in keeping]

        def forget(attention: Any, args: object, output: object) -> None:
            attention._pattern = None

        with ExitStack() as stack:
            for attention, pattern in zip(keeping, before, strict=True):
                stack.callback(setattr, attention, "_pattern", pattern)
                stack.callback(attention.register_forward_hook(forget).remove)
            yield

    @property
    def counts_ungrouped(self) -> bool:
        return False

    def attention(self, layer: int) -> torch.nn.Module:
        return self.model.blocks[layer].attn

    def guests_of_reading(self) -> Iterator[str]:
        names = ["attn.hook_in", "attn.q.hook_in", "attn.k.hook_in", "attn.v.hook_in"]
        names += [f"attn.{name}" for name in ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")]
        if "attn_in" in self._norms:
            names += [f"{self._norms['attn_in']}.{name}" for name in ("hook_in", "hook_scale", "hook_normalized")]
            names.append(f"{self._norms['attn_in']}.hook_out")
        yield from guests(self.model, names)

    def guests_of_groups(self) -> Iterator[str]:
        yield from guests(self.model, ["attn.hook_k", "attn.hook_v", "attn.hook_rot_k"])

    # -- weights ---------------------------------------------------------------------------------

    def norm(self, name: NormName, layer: int) -> NormLayer | None:
        if name == "final":
            module = self.model._modules.get("ln_final")
            return self._norm(module) if self._is_norm(module) else None
        shared = name == "mlp_in" and name not in self._norms and self._parallel
        module = self._norms.get("attn_in" if shared else name)
        return None if module is None else self._norm(getattr(self.model.blocks[layer], module))

    def _norm(self, module: Any) -> NormLayer:
        original, cfg = module.original_component, self.model.cfg
        with at_hand(original):
            weight, bias = getattr(original, "weight", None), getattr(original, "bias", None)
        if weight is None:
            weight = torch.ones(cfg.d_model, dtype=cfg.dtype, device=home(self.model))
        rms = bool(getattr(module, "uses_rms_norm", getattr(cfg, "uses_rms_norm", False)))
        offset = getattr(module, "uses_weight_offset", rms and getattr(cfg, "rmsnorm_uses_offset", False))
        eps = next(
            (getattr(original, each) for each in ("eps", "variance_epsilon") if hasattr(original, each)), cfg.eps
        )
        weight = full_precision(weight.detach())
        return NormLayer(
            1.0 + weight if offset else weight,
            None if bias is None else full_precision(bias.detach()),
            not rms,
            float(eps),
        )

    def projection(self, name: str, layer: int) -> tuple[Float[Tensor, "head d_model d_head"], Tensor | None]:
        # not by the bridge's own `W_K`, which counts heads by a number that `ungrouped` changes
        linear, d_head = getattr(self.model.blocks[layer].attn, name), self.model.cfg.d_head
        with at_hand(linear):
            weight, bias = linear.weight.detach(), linear.bias
        if weight.dim() == 2:
            weight = weight if type(linear.original_component).__name__ == "Conv1D" else weight.T
            weight = weight.unflatten(1, (-1, d_head)).transpose(0, 1)
        return weight, None if bias is None else bias.detach().view(-1, d_head)

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        attention = self.model.blocks[layer].attn
        with at_hand(attention.o):
            return attention.W_O.detach()

    def W_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"] | None:
        mlp = self._plain_mlp(layer)
        if mlp is None:
            return None
        with at_hand(mlp._modules["out"]):
            return mlp.W_out.detach()

    def _plain_mlp(self, layer: int) -> Any:
        """An MLP whose neurons can be told apart; attention-only models have none."""
        mlp = self.model.blocks[layer]._modules.get("mlp")
        return mlp if mlp is not None and {"in", "out"} <= mlp._modules.keys() else None

    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        with at_hand(self.model.unembed):
            return self.model.unembed.W_U.detach()

    def activation(self, layer: int) -> Callable[[Tensor], Tensor] | None:
        owner = self.model.blocks[layer].mlp
        names = ("act_fn", "activation_fn", "act", "activation", "gelu_impl", "_activation_fn")
        found: list[Any] = [
            getattr(module, name, None) for module in (owner.original_component, owner) for name in names
        ]
        return next((each for each in found if each is not None), None)

    def gated(self, layer: int) -> bool:
        return "gate" in self.model.blocks[layer].mlp._modules

    def weights(self) -> Iterator[tuple[str, Tensor | None]]:
        # projections that were fused are run in parts, which have been named by then
        fused = (".qkv.", ".gate_up_proj.")
        modules = [self.model._modules.get(name) for name in ("embed", "pos_embed", "embed_ln", "ln_final", "unembed")]
        for layer, block in enumerate(self.model.blocks):
            modules += [block._modules.get(name) for name in ("ln1", "ln1_post", "ln2", "ln2_post")]
            modules += [block.attn._modules.get(name) for name in ("q", "k", "v", "o", "q_norm", "k_norm")]
            if (mlp := self._plain_mlp(layer)) is not None:
                modules += [mlp._modules.get(name) for name in ("gate", "in", "out")]
        named = named_weights(self, self._others(), modules)
        return (each for each in named if not any(name in each[0] for name in fused))

    def _others(self) -> Iterator[tuple[str, Tensor | None]]:
        embed = self.model.embed
        with at_hand(embed):
            weight, factor = embed.weight, getattr(embed.original_component, "embed_scale", 1.0)
        yield "embed.W_E", weight if float(factor) == 1.0 else weight * torch.as_tensor(factor).to(weight)
        positions = self.model._modules.get("pos_embed")
        if positions is not None:  # OPT's table begins with rows that are never read
            with at_hand(positions):
                weight = positions.weight
            yield "pos_embed.W_pos", weight[getattr(positions.original_component, "offset", 0) :]
        if self._embedding is not embed:
            norm = self._norm(self._embedding)
            yield from (("embed.norm.weight", norm.weight), ("embed.norm.bias", norm.bias))
        with at_hand(self.model.unembed):
            bias = self.model.unembed.b_U
        yield "unembed.b_U", bias
        for layer, block in enumerate(self.model.blocks):
            with at_hand(block.attn.o):
                bias = block.attn.o.bias
            yield f"blocks.{layer}.attn.b_O", bias
            if (mlp := self._plain_mlp(layer)) is not None:
                with at_hand(mlp):
                    weights = {name: getattr(mlp, name, None) for name in ("W_in", "W_gate", "W_out")}
                    # not by the bridge's own `b_in`, which stays what it was when the weights were not there
                    biases = {f"b_{name}": getattr(mlp._modules[name], "bias", None) for name in ("in", "out")}
                for name in ("W_in", "b_in", "W_gate", "W_out", "b_out"):
                    yield f"blocks.{layer}.mlp.{name}", {**weights, **biases}[name]
            for name in ("q_norm", "k_norm"):
                norm = block.attn._modules.get(name)
                yield f"blocks.{layer}.attn.{name}", None if norm is None else self._norm(norm).weight

    def behaviour(self) -> dict[str, object]:
        cfg = self.model.cfg
        rotary = cfg.positional_embedding_type == "rotary"
        rope = getattr(getattr(self.model.original_model, "config", None), "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)
        base = rope.get("rope_theta", cfg.rotary_base)
        scaling: dict[str, object] = {}
        if rotary and (kind := rope.get("rope_type", "default")) != "default":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            scaling = {"rotary scaling": [kind, *(float(rope[name]) for name in names if name in rope)]}
        return scaling | {
            "positions": cfg.positional_embedding_type,
            "rotary base": float(base) if rotary else None,
            "cap of scores": max(0.0, float(getattr(cfg, "attn_scores_soft_cap", None) or 0)),
            "cap of logits": max(0.0, float(getattr(cfg, "output_logits_soft_cap", None) or 0)),
        }


@contextmanager
def _edited_norms() -> Iterator[None]:
    """While open, nothing is said about norms that are computed in another way where their scale is edited."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the native-autograd path")
        yield
