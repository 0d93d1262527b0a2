"""Seeded models so small that every circuit of them can be run."""

from typing import NamedTuple

import torch

from benchmarks.truth import tiny_model as tiny_model  # the benchmark's own, on other shapes and seeds


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


def tiny_prompt(shape: Shape, seed: int) -> list[int]:
    """Tokens drawn at random."""
    return torch.randint(12, (shape.n_pos,), generator=torch.Generator().manual_seed(seed)).tolist()
