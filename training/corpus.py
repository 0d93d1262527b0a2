"""Text on disk as the windows of tokens that a language model is trained on."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

BOS = "<|endoftext|>"
BOS_ID = 0


def text_files(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder that match a pattern, in order of their names.

    Raises:
        ValueError: If there is none.
    """
    files = sorted(folder.glob(pattern))
    if not files:
        raise ValueError(f"`folder` must hold text files named {pattern!r}, got {folder}.")
    return files


def train_tokenizer(files: list[Path], n_entries: int = 4096) -> Tokenizer:
    """A byte-level BPE tokenizer (GPT-2's kind): every text can be written, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # ty: ignore
    tokenizer.decoder = decoders.ByteLevel()  # ty: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=n_entries,
        special_tokens=[BOS],  # its id is BOS_ID
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(file) for file in files], trainer)
    return tokenizer


def token_ids(tokenizer: Tokenizer, files: list[Path], cache: Path) -> np.ndarray:
    """All files as one array of token ids, kept in `cache` so that a resumed run starts at once."""
    key = hashlib.sha256(tokenizer.to_str().encode())
    for file in files:
        key.update(f"{file.name} {file.stat().st_size}".encode())
    path = cache / f"tokens-{key.hexdigest()[:12]}.npy"
    if not path.exists():
        # by chunks of lines: one string of tens of megabytes makes the tokenizer slow
        ids = []
        for file in files:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            chunks = ["".join(lines[i : i + 256]) for i in range(0, len(lines), 256)]
            ids += [np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(chunks)]
        beside = path.with_suffix(".tmp.npy")
        np.save(beside, np.concatenate(ids))
        beside.rename(path)
    return np.load(path)


def text_windows(ids: np.ndarray, n_ctx: int, epoch: int, seed: int) -> Int[Tensor, "window pos"]:
    """The whole text cut in windows of BOS and `n_ctx - 1` tokens, shuffled, cut elsewhere in each epoch."""
    rng = np.random.default_rng([seed, epoch])
    start = int(rng.integers(n_ctx - 1))
    n_windows = (len(ids) - start) // (n_ctx - 1)
    windows = ids[start : start + n_windows * (n_ctx - 1)].reshape(n_windows, n_ctx - 1)
    windows = windows[rng.permutation(n_windows)].astype(np.int64)
    bos = np.full((n_windows, 1), BOS_ID)
    return torch.from_numpy(np.concatenate([bos, windows], axis=1))


def repeated_window(
    ids: np.ndarray, n_ctx: int, n_entries: int, rng: np.random.Generator
) -> tuple[Int[Tensor, " pos"], Bool[Tensor, " pos"]]:
    """BOS and a segment repeated to fill the window: random tokens, or a piece of the text.

    Returns:
        The token ids, and which of them are to be predicted: all but BOS and the first copy,
        which cannot be.
    """
    period = int(rng.integers(8, n_ctx // 2))
    if rng.random() < 0.5:
        segment = rng.integers(1, n_entries, period)
    else:
        start = int(rng.integers(len(ids) - period))
        segment = ids[start : start + period].astype(np.int64)
    copies = np.resize(segment, n_ctx - 1)
    predictable = torch.arange(n_ctx) > period
    return torch.from_numpy(np.concatenate([[BOS_ID], copies])), predictable


def batches(
    ids: np.ndarray,
    *,
    n_ctx: int,
    n_entries: int,
    batch: int,
    repeated: float,
    seed: int,
    first_step: int = 0,
) -> Iterator[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """Endless training batches; batch number i is the same whether or not the run was interrupted.

    Args:
        ids: The text.
        n_ctx: Tokens per window, BOS included.
        n_entries: Size of the vocabulary.
        batch: Windows per batch.
        repeated: Share of windows that are a repeated segment instead of running text.
        seed: Fixes the order of the text and all random segments.
        first_step: Number of batches to skip.

    Returns:
        Token ids, and which of them count in the loss.
    """
    per_epoch = (len(ids) - n_ctx) // (n_ctx - 1) // batch
    epoch, windows = -1, None
    step = first_step
    while True:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            windows = text_windows(ids, n_ctx, epoch, seed)
        assert windows is not None
        at = step % per_epoch * batch
        tokens = windows[at : at + batch].clone()
        counted = torch.ones_like(tokens, dtype=torch.bool)
        rng = np.random.default_rng([seed, 1, step])
        for row in np.flatnonzero(rng.random(batch) < repeated):
            tokens[row], counted[row] = repeated_window(ids, n_ctx, n_entries, rng)
        yield tokens, counted
        step += 1
