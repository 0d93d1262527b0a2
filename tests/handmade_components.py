"""Four models whose weights are set by hand, so that the edges of the component graph that a task needs are known.

They are built of the same parts as those of `handmade`: places in the stream for what is known at a token, no norms,
heads that look where they are told. A circuit is known together with its task, since what is needed depends on what
edges carry when they are ablated: here their values on the corrupted prompt. The empty circuit is then the model on the
corrupted prompt. Learned positions are no writer and are never ablated: heads that look by position alone need no edges
into queries and keys, and what the unembedding reads of positions is in every circuit.
"""

from typing import Any

import torch
from handmade import BEFORE, LOGIT, OUT, POS, SCRATCH, TOKEN, A, B, C, D, attend_by_position, blank, move

import tracedensity as td
from benchmarks.lens import HookedTransformer

MATCH = 12.0
"""Attention score of a token that fits. Enough for all but 6e-6 of the attention, so that at the clean prompt there is
hardly a gradient through the softmax; little enough for gradients half way between two prompts, where it decides."""

FAINT = 0.02
"""What parts write that help a little: less than 1% of LOGIT, all together, so that 0.99 is reached without them."""

LOUD = 1000.0

ON = BEFORE.start + A
"""Where heads write that the token they look at is an A: a bit that is on. Two heads add up."""


# -- induction -------------------------------------------------------------------------------------

INDUCTION_TASK = td.Task(
    clean=[(A, B, A), (B, C, B), (C, D, C), (D, A, D)],
    corrupted=[(C, D, D), (D, A, A), (A, B, B), (B, C, C)],
    answer=[B, C, D, A],
    distractor=[D, A, B, C],
    name="induction",
)
"""X Y X, where Y is to be predicted, against Z W W, where it is W: four different tokens."""

INDUCTION_CIRCUIT = frozenset(
    {"input->a0.h0<v>", "a0.h0->a1.h0<k>", "input->a1.h0<q>", "input->a1.h0<v>", "a1.h0->logits"}
)
"""From the output down:

- ``a1.h0->logits``, because nothing else writes the prediction; without it the logits are those of Z W W;
- ``input->a1.h0<v>``, because Y itself is what the induction head moves; with values of Z W W it can only move W;
- ``input->a1.h0<q>``, because it looks for what came after an X; asked for what came after a W, it finds nothing
  among the clean keys, looks at Y and X alike, and half of the logit is gone;
- ``a0.h0->a1.h0<k>``, because the key at 1 must say that an X came before; the keys of Z W W do not fit X either;
- ``input->a0.h0<v>``, because the previous-token head must have seen this X.

Queries and keys are needed both. That is a matter of the pairs: were the like tokens in the same places on both
prompts (Y X Y against X Y X), corrupted queries would fit corrupted keys at the very place where the clean ones do,
and a circuit without all three edges would be as good. On Z W W corrupted queries fit corrupted keys at 2, where the
clean value is X. What else there is does nothing, or, in ``input->a1.h1<v>`` and ``a1.h1->logits``, hardly anything.
"""


@torch.no_grad()
def induction_model() -> HookedTransformer:
    """A previous-token head, an induction head that composes with it through keys, and a faint helper.

    The helper, head 1 of the second layer, looks at all tokens alike and says a little of what it sees. Y is there on
    the clean prompt and W on the corrupted, so it helps.
    """
    model = blank(n_layers=2, attn_only=True)
    attend_by_position(model, 0, 0, {1: 0, 2: 1})
    move(model, 0, 0, BEFORE, torch.ones(4))
    attention: Any = model.blocks[1].attn
    attention.W_Q[0, TOKEN] = MATCH * torch.eye(4)
    attention.W_K[0, BEFORE] = torch.eye(4)
    attention.W_K[0, POS.start] = -4.0  # token 0 has nothing before it but finds itself there
    move(model, 1, 0, OUT, torch.full((4,), LOGIT))
    move(model, 1, 1, OUT, torch.full((4,), FAINT))
    return model


# -- two bits --------------------------------------------------------------------------------------

TWO_BITS_CIRCUIT = frozenset({"input->a0.h0<v>", "input->a0.h1<v>", "a0.h0->m0", "a0.h1->m0", "m0->logits"})
"""Token 0 is brought by head 0, token 1 by head 1, the MLP joins them, and nothing else says C."""

AND_TASK = td.Task(clean=[(A, A, D)], corrupted=[(B, B, D)], answer=[C], distractor=[D], name="and")
"""Both bits are on, against none. All five edges of `TWO_BITS_CIRCUIT` are needed: without any one of them the MLP gets
at most one bit and is silent, or it is not heard."""

OR_TASK = td.Task(
    clean=[(A, B, D), (B, A, D), (A, A, D)],
    corrupted=[(B, B, D)] * 3,
    answer=[C] * 3,
    distractor=[D] * 3,
    name="or",
)
"""One bit is on, or the other, or both, against none. All five edges of `TWO_BITS_CIRCUIT` are needed: without an edge
of one head the pair fails in which only its bit is on, a third of the task; without ``m0->logits`` all do."""

BOTH_ON_TASK = OR_TASK[2:]
"""The last of these pairs alone. Now either head is enough, and no edge of a head is needed by itself."""

BOTH_ON_CIRCUITS = (
    frozenset({"input->a0.h0<v>", "a0.h0->m0", "m0->logits"}),
    frozenset({"input->a0.h1<v>", "a0.h1->m0", "m0->logits"}),
)
"""So the smallest faithful sets are two, of three edges each: the MLP, with one head or with the other."""


@torch.no_grad()
def two_bits_model() -> HookedTransformer:
    """Two heads that say at the last token whether tokens 0 and 1 are on; the MLP is still to be set.

    The last position always says D with half of LOGIT, so that this is predicted unless the MLP says C.
    """
    model = blank(n_layers=1, d_mlp=2, act_fn="relu")
    for head in range(2):
        attend_by_position(model, 0, head, {2: head})
        move(model, 0, head, BEFORE, torch.tensor([1.0, 0.0, 0.0, 0.0]))
    model.unembed.W_U[POS.start + 2, D] = LOGIT / 2
    return model


@torch.no_grad()
def and_model() -> HookedTransformer:
    """The MLP says C by ``relu(x - 1)``, x being the number of bits that are on; each bit by itself does so faintly."""
    model = two_bits_model()
    mlp: Any = model.blocks[0].mlp
    mlp.W_in[ON, 0] = 1.0
    mlp.b_in[0] = -1.0
    mlp.W_out[0, OUT.start + C] = LOGIT
    model.unembed.W_U[ON, C] = FAINT
    return model


@torch.no_grad()
def or_model() -> HookedTransformer:
    """The MLP says C by ``relu(2 x) - relu(2 x - 1)``, which is 1 from half a bit on.

    So it is flat where the bits are whole: the gradient at the clean prompt is zero, whether one is on or both are.
    """
    model = two_bits_model()
    mlp: Any = model.blocks[0].mlp
    mlp.W_in[ON] = 2.0
    mlp.b_in[1] = -1.0
    mlp.W_out[:, OUT.start + C] = torch.tensor([LOGIT, -LOGIT])
    return model


# -- a dead branch ---------------------------------------------------------------------------------

RELAY_TASK = td.Task(
    clean=[(A, B, C), (B, C, D), (C, D, A), (D, A, B)],
    corrupted=[(B, D, A), (C, A, B), (D, B, C), (A, C, D)],
    answer=[A, B, C, D],
    distractor=[B, C, D, A],
    name="relay",
)
"""The first token is to be predicted; on the corrupted prompt all tokens are others."""

RELAY_CIRCUIT = frozenset({"input->a0.h0<v>", "a0.h0->a1.h0<v>", "a1.h0->logits"})
"""One path and no other: token 0 is brought to 1, from there to 2, and is there predicted."""

DEAD_BRANCH = ("a0.h1", "m0", "a1.h1", "m1")
"""Writers that hear the tokens and one another, and that nobody else hears."""


@torch.no_grad()
def relay_model() -> HookedTransformer:
    """Token 0 in two steps, and a loud branch beside it.

    Heads 1 and the MLPs write to SCRATCH a number that depends on the tokens, LOUD times what they read there and more
    from one to the next: all of them more than the heads that do the work, the last by many orders of magnitude.
    """
    model = blank(n_layers=2, d_mlp=1, act_fn="relu")
    attend_by_position(model, 0, 0, {1: 0})
    move(model, 0, 0, BEFORE, torch.ones(4))
    attend_by_position(model, 1, 0, {2: 1})
    relay: Any = model.blocks[1].attn
    relay.W_V[0, BEFORE] = torch.eye(4)
    relay.W_O[0, :, OUT] = LOGIT * torch.eye(4)
    blocks: Any = model.blocks
    for block in blocks:
        block.attn.W_V[1, TOKEN, 0] = block.mlp.W_in[TOKEN, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        block.attn.W_V[1, SCRATCH, 0] = block.mlp.W_in[SCRATCH, 0] = 1.0
        block.attn.W_O[1, 0, SCRATCH] = block.mlp.W_out[0, SCRATCH] = LOUD
    return model
