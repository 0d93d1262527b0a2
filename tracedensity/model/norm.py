"""Normalisation layers, as they are and as linear maps."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tracedensity.model.precision import full_precision


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation layer with its scale frozen, which makes it a linear map.

    Attributes:
        scale: What the vectors at each position are divided by.
        weight: Learned factor of each dimension; ones where it is folded into the next weights.
        centred: Whether the mean over dimensions is subtracted first (LayerNorm), or not (RMSNorm).

    A learned bias is not part of the map: it belongs to no contribution.
    """

    scale: Float[Tensor, "pos 1"]
    weight: Float[Tensor, " d_model"]
    centred: bool

    def without_scale(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map up to the scale of the position that reads the vector."""
        if self.centred:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        return vectors * self.weight

    def __call__(self, vectors: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """What the layer makes of one summand of its input, given the whole input's scale."""
        return self.without_scale(vectors) / self.scale


@dataclass(frozen=True, eq=False)
class NormLayer:
    """A normalisation layer as it is.

    Attributes:
        weight: Learned factor of each dimension; ones where it is folded into the next weights.
        bias: Learned summand; None where there is none.
        centred: Whether the mean over dimensions is subtracted first (LayerNorm), or not (RMSNorm).
        eps: Added to the mean square.
    """

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    centred: bool
    eps: float

    def to(self, device: torch.device) -> "NormLayer":
        """The same on a device."""
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def statistics(
        self, x: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch d_model"], Float[Tensor, "*batch 1"]]:
        """The vectors before weight and bias, and what they were divided by."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return x / scale, scale

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        shape = self.weight.shape
        if self.centred:
            return torch.nn.functional.layer_norm(x, shape, self.weight, self.bias, self.eps)
        return torch.nn.functional.rms_norm(x, shape, self.weight, self.eps)

    def relevant(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The same, with a scale that takes no gradient."""
        normal, scale = self.statistics(x)
        normal = normal * scale / scale.detach()
        return normal * self.weight + (0.0 if self.bias is None else self.bias)

    def frozen(self, scale: Float[Tensor, "pos 1"]) -> Norm:
        """The linear map that it is at a scale."""
        return Norm(full_precision(scale), self.weight.to(scale.device), self.centred)
