"""Seeded models so small that every circuit of them can be run."""

from typing import NamedTuple

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig


class Shape(NamedTuple):
    """A model and a prompt, by what the number of edges depends on."""

    n_layers: int
    n_heads: int
    n_pos: int
    has_mlp: bool


SHAPES = (
    Shape(1, 2, 3, True),  # 9 edges
    Shape(2, 1, 2, True),  # 14
    Shape(1, 3, 4, True),  # 15
    Shape(2, 2, 2, False),  # 13
    Shape(2, 1, 3, False),  # 13
    Shape(3, 1, 2, False),  # 13
)
NORMS = ("LN", "RMS", None)


def tiny_model(shape: Shape, norm: str | None, seed: int) -> HookedTransformer:
    """Random weights, large enough for predictions to depend on the prompt."""
    config = HookedTransformerConfig(
        n_layers=shape.n_layers, n_heads=shape.n_heads, d_model=8, d_head=4, n_ctx=8, d_vocab=12, act_fn="gelu_new",
        d_mlp=12 if shape.has_mlp else None, attn_only=not shape.has_mlp, normalization_type=norm,
        final_rms=norm == "RMS", init_weights=False, device="cpu", model_name=f"tiny-{seed}",
    )  # fmt: skip
    model = HookedTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[-2] if parameter.dim() > 1 else 9
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            if name.split(".")[-2].startswith("ln") and name.endswith("w"):
                parameter.add_(1)
    return model.eval()


def tiny_prompt(shape: Shape, seed: int) -> list[int]:
    """Tokens drawn at random."""
    return torch.randint(12, (shape.n_pos,), generator=torch.Generator().manual_seed(seed)).tolist()
