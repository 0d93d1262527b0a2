"""What users do to a model, in any combination: the right numbers, or one clear sentence, and the model as it was."""

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_families import model_of

import tracedensity as td
from benchmarks.lens import HAS_HOOKED
from tracedensity.model import as_transformer

PROMPT = [3, 1, 4, 1, 5, 9]
TASK = td.Task(clean=[PROMPT], corrupted=[[3, 7, 4, 1, 5, 8]], answer=[12], distractor=[35])
KINDS = ["TransformerBridge", *(["HookedTransformer"] if HAS_HOOKED else [])]
FAMILIES = ("gpt2", "llama3", "gpt-j", "gemma2")
WORK = {
    "scores of tokens": lambda model: td.attribute(model, PROMPT, method="flow").values["head"],
    "integrated gradients of tokens": lambda model: td.attribute(model, PROMPT, method="eap-ig").values["head"],
    "scores of components": lambda model: td.attribute(model, TASK, graph="component", method="eap").values["edge"],
    "a curve": lambda model: td.density(model, TASK, graph="component", method="eap", baselines=False).faithfulness,
}
# The same draws in every run; without `derandomize` there are others. Which mistakes were made together is short enough
# to read as it comes: to look for less would run it all many times again.
USUAL = settings(
    max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
HOOKED_SITES = ("blocks.1.hook_attn_out", "blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z")


def a_new(name: str, kind: str) -> Any:
    """The model made once more: in copies of a bridge, hooks of the first one's first run would be at work."""
    return model_of.__wrapped__(name, kind)


def work_on(name: str) -> list[str]:
    return [each for each in WORK if name != "gpt-j" or "tokens" not in each]


def dropping_out(model: Any) -> Any:
    """In train mode, with dropout that would change every number."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        for rate in ("attention_dropout", "hidden_dropout", "dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.5)
    return model.train()


def checkpointing(model: Any) -> Any:
    inner = getattr(model, "original_model", None)
    if inner is not None and hasattr(inner, "gradient_checkpointing_enable"):
        inner.train()
        with warnings.catch_warnings():  # newer versions of Hugging Face would have it called otherwise
            warnings.simplefilter("ignore", FutureWarning)
            inner.gradient_checkpointing_enable()
    return model


def learning(model: Any) -> Any:
    """With gradients of its own waiting for a step."""
    with warnings.catch_warnings():  # compiled, it looks for gradients where there are none
        warnings.simplefilter("ignore", UserWarning)
        model(torch.tensor([PROMPT])).sum().backward()
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


STATES = {
    "train mode with dropout": dropping_out,
    "gradient checkpointing": checkpointing,
    "gradients": learning,
    "compiled": compiled,
    "compiled in place": compiled_in_place,
}


def picture(model: Any) -> dict[str, Any]:
    """Whatever a call could leave changed."""
    inner = getattr(model, "original_model", model)
    return {
        "modes": [module.training for module in (*model.modules(), *inner.modules())],
        "parameters": [(p.requires_grad, p.dtype, copy.deepcopy(p.grad)) for p in model.parameters()],
        "values": [p.detach().clone() for p in model.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "compiled": [module._compiled_call_impl is None for module in model.modules()],
    }  # fmt: skip


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for one, other in zip(before.pop("parameters"), after.pop("parameters"), strict=True):
        assert one[:2] == other[:2]
        assert (one[2] is None) == (other[2] is None)
        assert one[2] is None or torch.equal(one[2], other[2])
    for one, other in zip(before.pop("values"), after.pop("values"), strict=True):
        assert torch.equal(one, other)
    assert before == after


@USUAL
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_any_state_gives_the_same_numbers(kind, data):
    name = data.draw(st.sampled_from(FAMILIES))
    work = WORK[data.draw(st.sampled_from(work_on(name)))]
    states = data.draw(st.lists(st.sampled_from(list(STATES)), unique=True, max_size=3))
    inference = data.draw(st.booleans())
    plain = model_of(name, kind)
    expected = work(plain)
    model = a_new(name, kind)
    model(torch.tensor([PROMPT]))  # in whose first run a bridge sets hooks of its own
    for state in sorted(states, key=lambda each: each == "compiled"):  # which wraps the model
        model = STATES[state](model)
    before = picture(model)
    with torch.inference_mode() if inference else nullcontext():
        found = work(model)
    torch.testing.assert_close(found.clone(), expected, rtol=1e-4, atol=1e-4)
    assert_unchanged(before, picture(model))


@settings(USUAL, max_examples=8)
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_the_user_count_and_survive(kind, data):
    """The prediction is that of the hooked model, the scores are others, and the hooks fire afterwards."""
    name = data.draw(st.sampled_from(("gpt2", "llama3")))
    work = WORK[data.draw(st.sampled_from(work_on(name)))]
    states = data.draw(st.lists(st.sampled_from(list(STATES)), unique=True, max_size=2))
    inference = data.draw(st.booleans())
    sites = data.draw(st.lists(st.sampled_from(HOOKED_SITES), unique=True, min_size=1, max_size=2))
    model, calls = a_new(name, kind), []
    plain = work(model)

    def steer(value: torch.Tensor, hook: object) -> torch.Tensor:
        calls.append(value.shape)
        return value + 0.5 * torch.linspace(-1, 1, value.shape[-1])

    for site in sites:
        model.add_hook(site, steer)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        hooked = model(tokens)[:, -1]
    expected = work(model)
    for state in sorted(states, key=lambda each: each == "compiled"):
        model = STATES[state](model)
    with torch.inference_mode() if inference else nullcontext():
        found = work(model)
        seen = as_transformer(model)
        with seen.settled():
            torch.testing.assert_close(seen.logits(tokens).clone(), hooked, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.clone(), expected, rtol=1e-4, atol=1e-4)
    assert found.shape != plain.shape or not torch.allclose(found, plain, rtol=1e-3, atol=1e-4)
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens)[:, -1], hooked)
    assert len(calls) == len(sites)


def test_a_model_is_loaded_inside_of_inference_mode_as_outside():
    with torch.inference_mode():
        found = td.attribute("books-llama", PROMPT, method="eap").values["head"]
        loaded = td.load_model("books-llama")
    assert torch.equal(td.attribute(loaded, PROMPT, method="eap").values["head"], found)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_were_made_in_inference_mode_are_one_sentence(kind):
    with torch.inference_mode():
        model = copy.deepcopy(model_of("llama3", kind))
    with pytest.raises(ValueError, match=r"must have been loaded outside of `torch.inference_mode\(\)`, got llama3"):
        td.attribute(model, PROMPT, method="eap")


@pytest.mark.parametrize("part", ["blocks.1.mlp", "embed", "unembed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_mixed_precision_are_one_sentence(kind, dtype, part):
    """One part was converted and the others were not, before the model is first seen or later."""
    model = a_new("llama3", kind)
    if part == "embed":
        td.check_model(model)
    model.get_submodule(part).to(dtype)
    words = rf"must have weights of one precision, got llama3 with torch.* \(.*{dtype} \(.*`model.to\(...\)`"
    with pytest.raises(ValueError, match=words if part != "embed" else rf"llama3 with {dtype} \(.*embed.*float32 \("):
        td.attribute(model, PROMPT, method="norm")


@pytest.mark.parametrize("site", ["ln_final.hook_scale", "ln_final.hook_normalized", "unembed.hook_out"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_behind_the_last_block_are_one_sentence(kind, site):
    """They would see one position where they see all in a run of the model's own."""
    model = a_new("llama3", kind)

    def forget_the_first(value: torch.Tensor, hook: object) -> torch.Tensor:
        value = value.clone()
        value[:, 0] = 0
        return value

    with model.hooks(fwd_hooks=[(site, forget_the_first)]):
        for work in WORK.values():
            with pytest.raises(ValueError, match=rf"no hook of yours at {site}, .*Hook blocks\.\d\.hook_resid_post"):
                work(model)
        assert td.check_model(model).ok
    assert torch.equal(WORK["scores of tokens"](model), WORK["scores of tokens"](model_of("llama3", kind)))


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_one_sentence(kind, work):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match=r"`torch.autocast` must be off where a model is explained, got .* cpu"):
            WORK[work](model_of("llama3", kind))
        with pytest.raises(ValueError, match="must be off"):
            td.check_model(model_of("llama3", kind))


@pytest.mark.parametrize("part", ["blocks.1", "blocks.1.mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_parts_are_one_sentence(kind, part):
    model = a_new("llama3", kind)
    parent, _, name = part.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.compile(model.get_submodule(part), backend="eager"))
    with pytest.raises(ValueError, match=f"must not have parts that `torch.compile` has wrapped.*such '{part}'"):
        td.attribute(model, PROMPT, method="norm")


@pytest.mark.parametrize("part", ["blocks.1", "blocks.1.attn", "blocks.1.mlp", "blocks.1.ln1"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_pytorch_are_named_where_sums_do_not_hold(kind, part):
    model = a_new("llama3", kind)

    def halve(module: object, inputs: object, output: Any) -> Any:
        return output / 2 if isinstance(output, torch.Tensor) else (output[0] / 2, *output[1:])

    handle = model.get_submodule(part).register_forward_hook(halve)
    words = rf"got llama3.*The hook of PyTorch's on '{part}' may be why"
    with pytest.raises(ValueError, match=words):
        td.attribute(model, PROMPT, method="norm")
    handle.remove()
    seen = []
    model.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    expected = td.attribute(model_of("llama3", kind), PROMPT, method="norm").values["head"]
    assert torch.equal(td.attribute(model, PROMPT, method="norm").values["head"], expected)
    assert seen


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_a_hook_leaves_everything_as_it_was(kind, work):
    model = a_new("llama3", kind)
    WORK[work](model)
    armed = [False]

    def fail(value: torch.Tensor, hook: object) -> None:
        if armed[0]:
            raise KeyboardInterrupt

    model.add_hook("blocks.2.hook_mlp_out", fail)
    before = picture(model.train())
    armed[0] = True
    with pytest.raises(KeyboardInterrupt):
        WORK[work](model)
    assert_unchanged(before, picture(model))
