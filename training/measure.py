"""What a trained model can do: bits per byte of unseen text, and induction."""

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from training.corpus import BOS_ID


@torch.no_grad()
def losses(model: nn.Module, tokens: Int[Tensor, "window pos"], batch: int = 32) -> Float[Tensor, "window pos_less_1"]:
    """Negative log-probability (nats) of every token but the first, in float32."""
    rows = []
    for part in tokens.split(batch):
        log_probs = model(part).logits[:, :-1].float().log_softmax(-1)
        rows.append(-log_probs.gather(-1, part[:, 1:, None])[..., 0])
    return torch.cat(rows)


def bits_per_byte(model: nn.Module, tokenizer: Tokenizer, text: str, n_ctx: int) -> float:
    """Mean code length of a text, cut in windows of BOS and `n_ctx - 1` tokens (no overlap).

    The text at the start of each window is predicted from BOS alone, so this is an upper bound on
    what the model does with a sliding window. All bytes count but those of the last, unfilled window.
    """
    ids = torch.tensor(tokenizer.encode(text).ids)
    n_windows = len(ids) // (n_ctx - 1)
    windows = ids[: n_windows * (n_ctx - 1)].view(n_windows, n_ctx - 1)
    n_bytes = len(tokenizer.decode(windows.flatten().tolist()).encode("utf-8"))
    tokens = torch.cat([torch.full((n_windows, 1), BOS_ID), windows], dim=1)
    return losses(model, tokens).double().sum().item() / torch.tensor(2.0).log().item() / n_bytes


def induction(
    model: nn.Module, n_entries: int, *, period: int = 64, n_sequences: int = 128, seed: int = 0
) -> tuple[float, float]:
    """Mean loss (nats per token) on the first and on the second copy of random tokens.

    The first token of the second copy is left out: nothing announces the repetition.
    """
    generator = torch.Generator().manual_seed(seed)
    segment = torch.randint(1, n_entries, (n_sequences, period), generator=generator)
    tokens = torch.cat([torch.full((n_sequences, 1), BOS_ID), segment, segment], dim=1)
    loss = losses(model, tokens)
    return loss[:, :period].mean().item(), loss[:, period + 1 :].mean().item()
