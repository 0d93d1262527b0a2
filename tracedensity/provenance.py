"""What a number is about: the model, the prompt, and how it was made."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tracedensity.model import Transformer


@dataclass(frozen=True)
class Provenance:
    """Enough to make a result again, and to refuse to mix it with another model.

    Attributes:
        model: Name of the model.
        fingerprint: Hash of its architecture and weights (`Transformer.fingerprint`).
        token_ids: The prompt, up to the position that is explained.
        texts: The text of each of these tokens.
        method: How edges were scored.
        seed: Seed of whatever was drawn at random.
    """

    model: str
    fingerprint: str
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    method: str
    seed: int = 0

    @classmethod
    def of(cls, model: Transformer, tokens: Int[Tensor, " pos"], method: str, seed: int = 0) -> "Provenance":
        """Provenance of something computed on a prompt."""
        ids = tuple(tokens.tolist())
        return cls(model.name, model.fingerprint(), ids, tuple(model.texts(ids)), method, seed)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Provenance":
        """Inverse of `to_dict`."""
        return cls(**{**fields, "token_ids": tuple(fields["token_ids"]), "texts": tuple(fields["texts"])})

    def to_dict(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return asdict(self)

    @property
    def prompt(self) -> str:
        """The text of the prompt, with its beginning-of-sequence token."""
        return "".join(self.texts)

    @property
    def tokens(self) -> Int[Tensor, " pos"]:
        return torch.tensor(self.token_ids)

    def require_same_model(self, model: Transformer) -> None:
        """Raise a ValueError if `model` is not the one that the result was computed on."""
        if (fingerprint := model.fingerprint()) != self.fingerprint:
            raise ValueError(
                f"`model` must be the one that this was computed on, {self.model} ({self.fingerprint}), "
                f"got {model.name} ({fingerprint}, {str(model.dtype).removeprefix('torch.')}). "
                "Folding, editing or rounding weights makes another model."
            )

    def __str__(self) -> str:
        return f"{self.method} on {self.model}, {len(self.token_ids)} tokens"
