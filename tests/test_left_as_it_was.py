"""The user's model comes back exactly as it was, whatever happens."""

import copy

import families
import pytest
import torch
from conftest import hooked_only

import tracedensity as td
from benchmarks.lens import HAS_HOOKED, parameters_of

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


FLAGS = ["use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"]
each_flag = pytest.mark.parametrize(
    ("build", "flag"),
    [
        *((families.bridged, flag) for flag in FLAGS),
        *(
            pytest.param(families.hooked, flag, marks=hooked_only)
            for flag in (*FLAGS, "ungroup_grouped_query_attention")
        ),
    ],
)


def fail_after(monkeypatch, model, n_passes, error):
    """Let the model fail in its second layer once it has gone through it so often."""
    block, left = model.blocks[1].mlp, iter(range(n_passes))
    forward = type(block).forward

    def failing(self, *arguments, **options):
        if self is block and next(left, None) is None:
            raise error("in the middle")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(block), "forward", failing)


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
    "eap": lambda model: td.attribute(model, PROMPT, method="eap"),
    "eap-ig": lambda model: td.attribute(model, PROMPT, method="eap-ig", neurons=True, ablation="resample"),
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


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("work", WORK)
def test_no_hook_survives_an_error(work, error, checked, tiny_gpt2, monkeypatch):
    """The error comes from the middle of a forward pass, at each of the passes in turn: of the check, of the work."""
    tiny_gpt2 = copy.deepcopy(tiny_gpt2)
    if checked:
        td.check_model(tiny_gpt2)
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
        except ValueError:
            assert not checked  # the check has words of its own
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
    parameter = parameters_of(tiny_gpt2)[weight]
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter[:] = bad
    try:
        where = f"{weight[9:]} of layer {weight[7]}" if weight.startswith("blocks") else weight
        for call in (td.attribute, td.density):
            with pytest.raises(ValueError, match=f"must have finite weights, got NaN or infinite in {where}"):
                call(tiny_gpt2, PROMPT)
        with pytest.raises(ValueError, match=f"must give finite values, got .* NaN or infinite in {sentence}"):
            td.capture(tiny_gpt2, PROMPT)
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


def test_attention_that_overflows_is_no_silent_zero(tiny_model):
    """Queries and keys are finite and their product is not: TransformerLens makes zeros of such a pattern."""
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for name, weight in parameters_of(model).items():
            if name.startswith("blocks.1.attn.") and name.endswith(("W_Q", "W_K")):
                weight.mul_(1e20)
    for call in (td.attribute, td.density, td.capture):
        with pytest.raises(ValueError, match="NaN or infinite in the attention scores of layer 1"):
            call(model, PROMPT)


@pytest.mark.parametrize(
    "hook_point",
    ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"],
)
def test_what_hooks_of_the_user_add_stays_in_every_circuit(tiny_gpt2, hook_point):
    """A steering vector: the model with it is the model that is explained."""
    vector = torch.linspace(-1, 1, 16)
    ranking = td.attribute(tiny_gpt2, PROMPT).rank()
    plain = td.evaluate(tiny_gpt2, PROMPT, ranking, [40])
    tiny_gpt2.add_hook(hook_point, lambda value, hook: value + vector)
    try:
        steered = td.evaluate(tiny_gpt2, PROMPT, ranking, [40, ranking.n_edges])
        assert steered.metrics["tv"][1] == pytest.approx(0.0, abs=1e-6)
        assert steered.metrics["tv"][0] != pytest.approx(float(plain.metrics["tv"][0]), abs=1e-4)
    finally:
        tiny_gpt2.reset_hooks()


@each_flag
def test_flags_of_the_user_change_no_number(build, flag):
    model = build("llama3")
    plain = td.density(model, PROMPT, baselines=False).to_dict()
    getattr(model, f"set_{flag}")(True)
    flagged = td.density(model, PROMPT, baselines=False).to_dict()
    assert flagged["minimal_size"].keys() == plain["minimal_size"].keys()
    assert flagged["auc"] == pytest.approx(plain["auc"], abs=1e-4)


def test_any_edit_makes_another_model(tiny_gpt2):
    circuit = td.density(tiny_gpt2, PROMPT, baselines=False).circuit(faithfulness=0.8)
    circuit.verify(copy.deepcopy(tiny_gpt2))
    circuit.verify(copy.deepcopy(tiny_gpt2).to(torch.float64))
    edited = copy.deepcopy(tiny_gpt2)
    edited.blocks[0].mlp.W_out.data[3] = 0
    rounded = copy.deepcopy(tiny_gpt2).to(torch.bfloat16)
    capped = copy.deepcopy(tiny_gpt2)
    capped.cfg.output_logits_soft_cap = 5.0
    if not HAS_HOOKED:  # a native bridge reads it once
        capped.original_model.output_logits_soft_cap = 5.0
    for model in (edited, rounded, capped):
        with pytest.raises(ValueError, match="makes another model"):
            circuit.verify(model)


@pytest.mark.parametrize("method", ["flow", "eap"])
def test_a_bridge_keeps_nothing_of_our_runs(method):
    """Where queries, keys and values are one projection, it keeps its last pattern, and with it all that led there."""
    model = families.bridged("gpt2")
    attention = model.blocks[0].attn
    model(torch.tensor([PROMPT]))
    before = attention._pattern
    assert before is not None
    td.attribute(model, PROMPT, method=method)
    assert attention._pattern is before
