"""The user's model comes back exactly as it was, whatever happens."""

import pytest
import torch

import tracedensity as td

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def state(model):
    """All that a user could notice: hooks, flags, gradients, mode, weights."""
    return {
        "hooks": {
            name: (len(point.fwd_hooks), len(point.bwd_hooks), len(point._forward_hooks))
            for name, point in model.hook_dict.items()
        },
        "config": dict(model.cfg.to_dict()),
        "parameters": {
            name: (p.requires_grad, p.grad is None, p.dtype, p.device, float(p.detach().double().sum()))
            for name, p in model.named_parameters()
        },
        "mode": [module.training for module in model.modules()],
        "level": model.context_level,
        "grad": torch.is_grad_enabled(),
    }


def flushes():
    return bool((torch.tensor([1e-30]) * torch.tensor([1e-10]) == 0).item())


WORK = {
    "capture": lambda model: td.capture(model, PROMPT),
    "norm": lambda model: td.attribute(model, PROMPT),
    "flow": lambda model: td.attribute(model, PROMPT, method="flow"),
    "evaluate": lambda model: td.evaluate(model, PROMPT, td.attribute(model, PROMPT).rank(), [5, 50]),
    "density": lambda model: td.density(model, PROMPT),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("work", WORK)
def test_nothing_changes(work, training, tiny_llama):
    tiny_llama.train(training)
    before, flushed = state(tiny_llama), flushes()
    WORK[work](tiny_llama)
    assert state(tiny_llama) == before
    assert flushes() == flushed
    tiny_llama.eval()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("work", WORK)
def test_no_hook_survives_an_error(work, error, tiny_gpt2, monkeypatch):
    """The error comes from the middle of a forward pass, at each of the passes in turn."""
    block = tiny_gpt2.blocks[1].mlp
    forward, calls = type(block).forward, {"left": 0}

    def failing(self, *arguments, **options):
        if self is block:
            if calls["left"] == 0:
                raise error("in the middle")
            calls["left"] -= 1
        return forward(self, *arguments, **options)

    before, flushed = state(tiny_gpt2), flushes()
    monkeypatch.setattr(type(block), "forward", failing)
    for n_passes in range(4):
        calls["left"] = n_passes
        try:
            WORK[work](tiny_gpt2)
        except error:
            pass
        else:
            assert n_passes > 0
        assert state(tiny_gpt2) == before
        assert flushes() == flushed


def test_hooks_of_the_user_survive_and_act(tiny_gpt2):
    seen = []
    tiny_gpt2.add_hook("blocks.0.hook_mlp_out", lambda value, hook: seen.append(value.shape))
    try:
        td.density(tiny_gpt2, PROMPT)
        assert seen
        assert len(tiny_gpt2.hook_dict["blocks.0.hook_mlp_out"].fwd_hooks) == 1
    finally:
        tiny_gpt2.reset_hooks()


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        ("blocks.1.attn.W_Q", "the queries of layer 1"),
        ("blocks.0.attn.W_K", "the keys of layer 0"),
        ("blocks.1.attn.W_V", "the values of layer 1"),
        ("blocks.0.attn.W_O", "the attention output of layer 0"),
        ("blocks.1.mlp.W_out", "the MLP output of layer 1"),
        ("embed.W_E", "the stream entering the block of layer 0"),
        ("unembed.W_U", "the logits of the model"),
    ],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(weight, sentence, bad, tiny_gpt2):
    parameter = dict(tiny_gpt2.named_parameters())[weight]
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter[:] = bad
    try:
        for call in (td.attribute, td.density, td.capture):
            with pytest.raises(ValueError, match=f"must give finite values, got .* NaN or infinite in {sentence}"):
                call(tiny_gpt2, PROMPT)
    finally:
        with torch.no_grad():
            parameter.copy_(kept)
