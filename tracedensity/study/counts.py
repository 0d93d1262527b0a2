"""Counts: how often each token comes in a corpus, and so how rare it is."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.faithfulness import total_variation
from tracedensity.model import Transformer, as_transformer
from tracedensity.task import Examples

_LINES = 1000
"""Lines that are read as tokens together."""


@dataclass(frozen=True, eq=False)
class Counts:
    """Unigram counts of tokens in a corpus.

    Attributes:
        of_token: How often each token of the vocabulary comes.
        name: What was counted.
    """

    of_token: Int[np.ndarray, " d_vocab"]
    name: str

    @cached_property
    def log10(self) -> Float[np.ndarray, " d_vocab"]:
        """Frequencies ``log10((c + 1) / (N + V))``, N being all tokens of the corpus and V all of the vocabulary."""
        return np.log10((self.of_token + 1) / (self.of_token.sum() + len(self.of_token)))

    @cached_property
    def logits(self) -> Float[Tensor, " d_vocab"]:
        """The unigram distribution as logits."""
        return torch.from_numpy(self.log10 * np.log(10)).float()

    @property
    def digest(self) -> str:
        """A hash of the counts."""
        return hashlib.sha256(self.of_token.astype("<i8").tobytes()).hexdigest()[:16]

    def rarity(self, token: Int[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
        """``-log10`` of the frequency of tokens."""
        return -self.log10[token]

    def distance(self) -> Callable[[Tensor, Examples], Tensor]:
        """A metric for `td.density` and `td.evaluate`: total variation distance of a prediction to the unigram one."""

        def unigram_tv(logits: Tensor, examples: Examples) -> Tensor:
            return total_variation(self.logits.to(logits), logits)

        return unigram_tv


def count_tokens(model: object, *files: str | PathLike[str]) -> Counts:
    """Count the tokens of text files, line by line.

    Args:
        model: A model, or a name for `load_model`; its tokenizer is used.
        files: UTF-8 text. For rarity that says nothing of the sweep's own texts, take others than those.

    Raises:
        ValueError: If there is no file, one cannot be read, or the model has no tokenizer.
    """
    transformer = as_transformer(model)
    if not files:
        raise ValueError("`files` must be at least one text file, got none.")
    counts = np.zeros(transformer.d_vocab, dtype=np.int64)
    paths = [Path(each) for each in files]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"`files` must be text files, got {str(path)!r}, which is none.")
        with path.open(encoding="utf-8", errors="replace") as lines:
            some: list[str] = []
            for line in lines:
                some.append(line)
                if len(some) == _LINES:
                    _add(counts, some, transformer)
                    some = []
            _add(counts, some, transformer)
    return Counts(counts, ", ".join(path.name for path in paths))


def _add(counts: Int[np.ndarray, " d_vocab"], lines: list[str], model: Transformer) -> None:
    ids = [token for line in lines for token in model.pieces(line)]
    found = np.bincount(np.asarray(ids, dtype=np.int64), minlength=len(counts))
    counts += found[: len(counts)]
