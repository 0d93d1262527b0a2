"""Models by configuration, with the class that TransformerLens has for that: `HookedTransformer`, since 4.0 a bridge.

On both sides of 4.0 the two names below make a model, and `parameters_of` calls its weights by the same names.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HAS_HOOKED = find_spec("transformer_lens.HookedTransformer") is not None

_NOT_NATIVE = (
    "parallel_attn_mlp",
    "original_architecture",
    "use_normalization_before_and_after",
    "num_experts",
    "scale_attn_by_inverse_layer_idx",
)

if HAS_HOOKED:
    from transformer_lens import HookedTransformer as HookedTransformer
    from transformer_lens import HookedTransformerConfig as HookedTransformerConfig
else:

    class HookedTransformerConfig(dict):
        """Arguments of the class that 4.0 has removed."""

        def __init__(self, **options: Any) -> None:
            super().__init__(options)

    class HookedTransformer:
        """Stands for the class that 4.0 has removed: what it makes is a native `TransformerBridge`."""

        def __new__(cls, config: HookedTransformerConfig, tokenizer: Any = None, **_: Any) -> Any:
            from transformer_lens.config import TransformerBridgeConfig
            from transformer_lens.model_bridge import TransformerBridge

            options = {name: value for name, value in config.items() if name not in ("init_weights", "model_name")}
            if impossible := [name for name in _NOT_NATIVE if options.pop(name, None)]:
                raise NotImplementedError(f"A native bridge has no {', '.join(impossible)}.")
            if options.get("attn_only"):
                options["d_mlp"] = options.get("d_mlp") or 4
            name = config.get("model_name", "custom")
            model = TransformerBridge.boot_native(
                TransformerBridgeConfig(**options),
                tokenizer=tokenizer,
                device="cpu",
                dtype=options.get("dtype"),  # that of the configuration is not looked at
                model_name=name,
            )
            model.cfg.model_name = name
            if model.cfg.positional_embedding_type == "rotary":
                model.cfg.rotary_adjacent_pairs = True  # as it turns them, though it does not say so
                model.cfg.rotary_dim = model.cfg.rotary_dim or model.cfg.d_head
            for block in model.blocks:  # for flags that it has not, copies of it would hand it tensors
                block.attn.supports_split_qkv_fork = False
                if not options.get("use_attn_scale", True):  # which is not looked at
                    block.attn.original_component.scale = 1.0
            if options.get("dtype") == torch.float64:
                compute_in_float64(model)
            return model


def compute_in_float64(model: Any) -> None:
    """Angles of rotation and root mean squares, which a native bridge takes in float32 whatever the weights are in."""
    for module in model.modules():
        if type(module).__name__ == "RMSNormalizationBridge":
            module.use_native_layernorm_autograd = False
        if type(module).__name__ == "NativeRotary":
            pairs = torch.arange(0, module.rotary_dim, 2, dtype=torch.float64) / module.rotary_dim
            positions = torch.arange(model.cfg.n_ctx, dtype=torch.float64)
            angles = torch.outer(positions, model.cfg.rotary_base**-pairs).repeat_interleave(2, dim=-1)
            module.cos_cached, module.sin_cached = angles.cos(), angles.sin()


def parameters_of(model: Any) -> dict[str, Tensor]:
    """Weights by the names of `HookedTransformer`, in its order; those of a bridge are views, to be written to as well.

    A bias that a bridge has not is left out.
    """
    if not hasattr(model, "tl_named_parameters"):
        return dict(model.named_parameters())
    named = dict(model.tl_named_parameters())
    if model.cfg.n_key_value_heads is not None:  # shared keys and values come as copies, one per query head
        for layer, block in enumerate(model.blocks):
            for name in ("W_K", "W_V", "b_K", "b_V"):
                del named[f"blocks.{layer}.attn.{name}"]
                if (weight := getattr(block.attn, name)) is not None:
                    named[f"blocks.{layer}.attn._{name}"] = weight
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    found = {name: weight for name, weight in named.items() if weight.untyped_storage().data_ptr() in own}
    return {name: found[name] for name in sorted(found, key=_place)}


_PLACES = [
    *("embed", "pos_embed", "blocks", "ln_final", "unembed", "ln1", "ln2", "attn", "mlp", "w", "b", "W_E", "W_pos"),
    *("W_Q", "W_O", "b_Q", "b_O", "W_K", "W_V", "b_K", "b_V", "W_in", "b_in", "W_out", "W_gate", "b_out", "W_U", "b_U"),
]


def _place(name: str) -> list[int]:
    """Where a weight comes among those of `HookedTransformer`, so that random ones are the same."""
    return [int(part) if part.isdigit() else _PLACES.index(part.lstrip("_")) for part in name.split(".")]
