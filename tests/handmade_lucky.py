"""A model set by hand that knows one right way to a prediction and two that are right by luck, shorter than the first.

It reads names: ``Mary Anna Mary`` goes on with Anna, who came after Mary before. That is what one head makes out, with
the help of another. Two more heads say Anna as well, for no good reason: one repeats the name that stands first but
one, wherever that name came from, the other says Anna whatever it reads. The circuit of each of these is smaller than
the right one, and on this prompt as faithful. Other names tell the right one from the habit, and a token put before the
prompt tells it from the repetition of a place.
"""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from benchmarks.lens import HookedTransformer, HookedTransformerConfig
from tracedensity.tasks import WORDS

NAMES = sorted(next(kind for kind in WORDS if "Mary" in kind))
VOCABULARY = ["<s>", "<unk>", *NAMES]
N_TOKENS, N_POS = len(VOCABULARY), 6
TOKEN, BEFORE, OUT = (slice(start * N_TOKENS, (start + 1) * N_TOKENS) for start in range(3))
POS = slice(3 * N_TOKENS, 3 * N_TOKENS + N_POS)
HARD = 30.0
RIGHT, LUCKY = 12.0, 8.0
"""Logits of the name that each way leads to: the right way wins where they differ."""

PROMPT = "Mary Anna Mary"
"""Behind the token that begins a sequence: Mary stands at 1 and 3, Anna at 2."""

INDUCTION = frozenset({"a1.h0@2->3", "r0.attn@2", "r0.attn@3", "a0.h0@1->2"})
"""The name at 2 is brought, its value (``r0.attn@2``) because the head of the first layer says there that Mary came
before (``a0.h0@1->2``), which is what the Mary at 3 asks for (``r0.attn@3``)."""

PLACE = frozenset({"a1.h1@2->3", "r0.attn@2"})
"""The name at 2 is brought because it stands at 2."""

HABIT = frozenset({"a1.h2@0->3", "r0.attn@0"})
"""The token that begins a sequence is taken for a sign of Anna."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, a name or unknown."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    words.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])  # type: ignore[assignment]
    special: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<s>")
    special |= {"add_bos_token": True, "name_or_path": "names"}  # so that TransformerLens takes it as it is
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)


@torch.no_grad()
def lucky_model() -> HookedTransformer:
    """Two layers of attention without norms: `INDUCTION`, `PLACE` and `HABIT` lead to the same name on `PROMPT`."""
    config = HookedTransformerConfig(
        n_layers=2, d_model=POS.stop, d_head=N_TOKENS, n_heads=3, n_ctx=N_POS, d_vocab=N_TOKENS, attn_only=True,
        normalization_type=None, use_attn_scale=False, init_weights=False, device="cpu", seed=0,
    )  # fmt: skip
    model = HookedTransformer(config, tokenizer())
    for parameter in model.parameters():
        parameter.zero_()
    eye = torch.eye(N_TOKENS)
    model.embed.W_E[:, TOKEN] = eye
    model.pos_embed.W_pos[:, POS] = torch.eye(N_POS)
    model.unembed.W_U[OUT] = eye
    first: Any = model.blocks[0].attn
    second: Any = model.blocks[1].attn

    first.W_Q[0, POS, : N_POS - 1][1:] = HARD * torch.eye(N_POS - 1)  # who stands at p looks for p - 1 ...
    first.W_K[0, POS, :N_POS][:-1, : N_POS - 1] = torch.eye(N_POS - 1)
    first.W_V[0, TOKEN] = eye
    first.W_O[0, :, BEFORE] = eye  # ... and remembers who that is

    second.W_Q[0, TOKEN] = HARD * eye
    second.W_K[0, BEFORE] = eye
    second.b_Q[1:, 0] = HARD
    second.W_K[1, POS.start + 2, 0] = second.W_K[2, TOKEN.start, 0] = 1.0  # what stands at 2; what begins a sequence
    second.W_V[:2, TOKEN] = eye
    second.W_V[2, TOKEN.start, VOCABULARY.index("Anna")] = 1.0
    for head, logit in enumerate((RIGHT, LUCKY, LUCKY)):
        second.W_O[head, :, OUT] = logit * eye
    return model
