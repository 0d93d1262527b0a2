"""Two models whose weights are set by hand, so that the circuit of a prediction is known before it is looked for.

The stream has a place for each thing that is known at a token, each a one-hot vector: which token it is (`TOKEN`),
where it stands (`POS`), which token came before (`BEFORE`), and what is to be predicted (`OUT`). There is no
normalisation and there are no biases. Attention is as good as hard: the best source gets all but e-13 of it.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.lens import HookedTransformer, HookedTransformerConfig

A, B, C, D = range(4)  # the vocabulary
N_POS = 3
TOKEN, POS, BEFORE, OUT = slice(0, 4), slice(4, 7), slice(7, 11), slice(11, 15)
SCRATCH = 15  # written by an MLP, read by nobody
HARD = 30.0  # difference between the attention scores of the best source and the others
LOGIT = 6.0  # of what is predicted; of all else 0

INDUCTION_PROMPT = (A, B, A)
"""After the first A came B, so the second A predicts it."""

INDUCTION_CIRCUIT = frozenset({"a1.h0@1->2", "r1.attn@2", "r0.attn@2", "r0.attn@1", "a0.h0@0->1"})
"""The prediction after A B A is B or C, with equal probability. What it takes, from the output down:

- ``a1.h0@1->2``, because the induction head brings B: it is the token at 1, which came after an A;
- ``r1.attn@2``, because the token at 2 is an A, which the unembedding takes for a sign of C;
- ``r0.attn@2``, because this A must be in the stream when the unembedding reads it, and also to be the query: without
  it the induction head attends to all three tokens alike, and a third of the logit of B is not enough;
- ``r0.attn@1``, because the B at 1 is the value that the induction head moves;
- ``a0.h0@0->1``, because the head of the first layer says that A came before 1, which is the key. Without it, again,
  attention goes to all tokens alike.

Nothing else is needed: the stream at 0 is all zero in this circuit, its key as good as that of any token that does
not fit; what came before 2 and where tokens stand is read by nobody. And each of the five is: without the first, B is
gone, without the second or third, C is, without any of the last three, B has a logit of 2 or 0 in place of 6.
Patterns are computed anew from the masked stream, which is why queries and keys need edges into their stream, but have
none themselves.
"""

COPY_PROMPT = (C, A, B)
COPY_CIRCUIT = frozenset({"r0.mlp@2", "a0.h0@0->2", "a0.h1@1->2"})
"""The prediction after C A B is C, from the first head, or A, from the second, with equal probability.

Both write to the state after attention, which must get past the MLP: three edges. The pattern needs none, since
embeddings are always there. The MLP and the skip connection around attention bring nothing that the unembedding reads,
so that a set of edges is faithful exactly if it holds these three.
"""


def blank(**options: Any) -> HookedTransformer:
    """A model of zeros whose embedding says which token stands where."""
    config = {"d_model": 16, "d_head": 4, "n_ctx": N_POS, "d_vocab": 4, "n_heads": 2, "use_attn_scale": False}
    config |= {"normalization_type": None, "init_weights": False, "device": "cpu"}
    model = HookedTransformer(HookedTransformerConfig(**{**config, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:, TOKEN] = torch.eye(4)
        model.pos_embed.W_pos[:, POS] = torch.eye(N_POS)
        model.unembed.W_U[OUT] = torch.eye(4)
    return model


def attend_by_position(model: HookedTransformer, layer: int, head: int, source: dict[int, int]) -> None:
    """Make a head look from some positions to others."""
    attention: Any = model.blocks[layer].attn
    attention.W_K[head, POS, :N_POS] = torch.eye(N_POS)
    for dest, src in source.items():
        attention.W_Q[head, POS, :N_POS][dest, src] = HARD


def move(model: HookedTransformer, layer: int, head: int, to: slice, factor: Tensor) -> None:
    """Make a head copy the token that it looks at to another place in the stream, times a factor for each token."""
    attention: Any = model.blocks[layer].attn
    attention.W_V[head, TOKEN] = torch.eye(4)
    attention.W_O[head, :, to] = torch.diag(factor)


@torch.no_grad()
def induction_model() -> HookedTransformer:
    """Two layers of attention: the first says what came before, the second looks for what came after the like.

    Head 1 of both layers is zero. The unembedding takes a token A for a sign of C, by itself.
    """
    model = blank(n_layers=2, attn_only=True)
    attend_by_position(model, 0, 0, {1: 0, 2: 1})
    # A is written with more force than B, so that a0.h0@0->1, which is needed, is larger than a0.h0@1->2, which is not.
    move(model, 0, 0, BEFORE, torch.tensor([2.0, 0.5, 1.0, 1.0]))
    attention: Any = model.blocks[1].attn
    attention.W_Q[0, TOKEN] = HARD * torch.eye(4)
    attention.W_K[0, BEFORE] = torch.eye(4)
    attention.W_K[0, POS.start] = -4.0  # token 0 has nothing before it but finds itself there
    move(model, 1, 0, OUT, torch.full((4,), LOGIT))
    model.unembed.W_U[TOKEN.start + A, C] = LOGIT
    return model


@torch.no_grad()
def copy_model(noise: float) -> HookedTransformer:
    """One layer: head 0 copies token 0, head 1 copies token 1, and the MLP writes noise to where nobody reads."""
    model = blank(n_layers=1, d_mlp=2, act_fn="relu")
    attend_by_position(model, 0, 0, {2: 0})
    attend_by_position(model, 0, 1, {2: 1})
    for head in range(2):
        move(model, 0, head, OUT, torch.full((4,), LOGIT))
    mlp: Any = model.blocks[0].mlp
    mlp.W_in[TOKEN] = 1.0
    mlp.W_out[:, SCRATCH] = noise
    return model
