"""What `capture` keeps, against TransformerLens' own cache and against sums that must come out."""

import copy
import gc
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import families
import pytest
import torch
from conftest import hooked_only, n_hooks, random_model

import tracedensity as td
from benchmarks.lens import HookedTransformer, parameters_of
from tracedensity.activations import (
    Quantity,
    head_index,
    head_name,
    mlp_index,
    mlp_name,
    neuron_index,
    neuron_name,
)

PROMPT = [3, 1, 4, 1, 5, 9, 2]
CACHED = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "pattern": "blocks.{}.attn.hook_pattern",
    "z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "pre": "blocks.{}.mlp.hook_pre",
    "post": "blocks.{}.mlp.hook_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
}

GPT2 = {"act_fn": "gelu_new", "normalization_type": "LN"}
LLAMA = {
    "act_fn": "silu",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "final_rms": True,
    "positional_embedding_type": "rotary",
    "rotary_dim": 4,
    "n_key_value_heads": 2,
}


@pytest.fixture
def own_model(tiny_model: HookedTransformer) -> HookedTransformer:
    """One of the tiny models in turn, to do with as a test likes."""
    return copy.deepcopy(tiny_model)


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def weight(model: HookedTransformer, name: str) -> torch.Tensor:
    """A weight of layer 1; keys and values that heads share have an underscore before their name."""
    weights = parameters_of(model)
    return weights[
        f"blocks.1.{name}" if f"blocks.1.{name}" in weights else f"blocks.1.{name}".replace("attn.", "attn._")
    ]


def some_rows(frame: Any) -> list[Any]:
    return list(frame.sample(10, random_state=0).itertuples())


# -- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", CACHED)
def test_every_layer_equals_the_cache_of_transformerlens(tiny_model, quantity):
    _, cache = tiny_model.run_with_cache(torch.tensor([PROMPT]))
    captured = getattr(td.capture(tiny_model, PROMPT, keep=quantity), quantity)
    assert len(captured) == 2
    for layer in range(2):
        close(captured[layer], cache[CACHED[quantity].format(layer)][0])


def test_values_are_repeated_for_the_heads_that_share_them(tiny_model):
    _, cache = tiny_model.run_with_cache(torch.tensor([PROMPT]))
    activations = td.capture(tiny_model, PROMPT, keep="value")
    for layer in range(2):
        stored = cache[f"blocks.{layer}.attn.hook_v"][0]  # [pos, kv_head, d_head]
        for head in range(4):
            expected = stored[:, head // (4 // stored.shape[1])]
            close(activations.value[layer, :, head], expected)
            close(activations.head(f"a{layer}.h{head}").value, expected)
    heads = activations.get("value", head=[3, 0], layer=1)
    close(heads, activations.value[1][:, [3, 0]])


def test_the_pattern_moves_values_to_z(tiny_model):
    head = td.capture(tiny_model, PROMPT).head("a1.h2")
    close(head.pattern @ head.value, head.z)


def test_logits_are_those_of_the_last_position(tiny_model):
    activations = td.capture(tiny_model, PROMPT, keep="z")
    close(activations.logits, tiny_model(torch.tensor([PROMPT]))[0, -1])


def test_heads_and_their_bias_sum_to_what_attention_adds(tiny_model):
    activations = td.capture(tiny_model, PROMPT)
    for layer in range(2):
        heads = activations.get("output", layer=layer)
        b_O = tiny_model.blocks[layer].attn.b_O
        close(activations.resid_pre[layer] + heads.sum(1) + b_O, activations.resid_mid[layer])


def test_neurons_and_their_bias_sum_to_what_the_mlp_adds(tiny_model):
    activations = td.capture(tiny_model, PROMPT)
    for layer in range(2):
        mlp = tiny_model.blocks[layer].mlp
        each = activations.post[layer][..., None] * mlp.W_out  # [pos, d_mlp, d_model]
        close(each.sum(1) + (0 if mlp.b_out is None else mlp.b_out), activations.mlp_out[layer])
        close(activations.get("neuron_norm", layer=layer), each.norm(dim=-1))
        close(activations.resid_mid[layer] + activations.mlp_out[layer], activations.resid_post[layer])


def test_the_stream_goes_on_from_layer_to_layer(tiny_model):
    activations = td.capture(tiny_model, PROMPT)
    close(activations.resid_pre[1], activations.resid_post[0], rtol=0, atol=0)


def test_a_head_with_zeroed_output_weights_is_what_the_stream_loses(own_model):
    head = td.capture(own_model, PROMPT).head("a1.h3")
    output, norm = head.output, head.norm
    before = td.capture(own_model, PROMPT, keep="resid_mid").resid_mid[1]
    with torch.no_grad():
        own_model.blocks[1].attn.W_O[3] = 0
    after = td.capture(own_model, PROMPT, keep="resid_mid").resid_mid[1]
    close(output, before - after)
    close(norm, (before - after).norm(dim=-1))


@hooked_only
@pytest.mark.parametrize("original", ["Gemma2ForCausalLM", "Olmo2ForCausalLM"])
def test_a_norm_after_attention_is_linearised(original):
    gemma = original == "Gemma2ForCausalLM"
    model = random_model(**LLAMA, original_architecture=original, use_normalization_before_and_after=gemma)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.b_O.zero_()  # a bias would pass through the norm too
    activations = td.capture(model, PROMPT, keep=("z", "attn_out"))
    for layer in range(2):
        heads = activations.get("output", layer=layer)
        close(heads.sum(1), activations.attn_out[layer])
        close(activations.get("head_norm", layer=layer), heads.norm(dim=-1))
    one = activations.get("output", layer=1, position=2, head=3)
    close(one, activations.get("output", layer=1)[2, 3])
    last = td.capture(model, PROMPT, keep="z", layers=1)
    close(last.get("output", layer=1), activations.get("output", layer=1))
    assert last.nbytes == 4 * (7 * 16 + 20 + 7) + 8 * 7  # z, logits, one scale for each position; tokens


def test_a_real_llama_reads_text(stories):
    activations = td.capture(stories, "Once upon a time there was a little")
    assert activations.texts[1:3] == [" Once", " upon"]
    _, cache = stories.run_with_cache(activations.tokens[None])
    for layer in range(5):
        close(activations.z[layer], cache[f"blocks.{layer}.attn.hook_z"][0])
        close(activations.get("output", layer=layer).sum(1), activations.attn_out[layer], rtol=1e-4, atol=1e-5)
        assert activations.mlp(f"m{layer}").norm.shape == (9, 172)


# -- parts -------------------------------------------------------------------------------------------


@dataclass
class Part:
    quantity: str
    select: dict[str, Any]
    index: tuple[Any, ...]


@pytest.mark.parametrize(
    "part",
    [
        Part("z", {}, (slice(None),)),
        Part("z", {"layer": 1}, (1,)),
        Part("z", {"layer": -1, "head": 2}, (1, slice(None), 2)),
        Part("z", {"head": [3, 1], "position": -1}, (slice(None), -1, [3, 1])),
        Part("z", {"layer": [1], "position": range(1, 3)}, (slice(1, 2), slice(1, 3))),
        Part("pattern", {"layer": 0, "head": 1, "position": 4}, (0, 1, 4)),
        Part("post", {"layer": 1, "neuron": [5, 7]}, (1, slice(None), [5, 7])),
        Part("pre", {"position": 0, "neuron": -1}, (slice(None), 0, -1)),
        Part("resid_mid", {"position": [0, -1]}, (slice(None), [0, -1])),
    ],
    ids=str,
)
def test_a_part_is_that_slice_of_the_whole(tiny_gpt2, part):
    activations = td.capture(tiny_gpt2, PROMPT)
    whole = getattr(activations, part.quantity)
    close(activations.get(part.quantity, **part.select), whole[part.index], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("quantity", "select", "index"),
    [
        ("head_norm", {"layer": 1, "head": [2, 0]}, (1, slice(None), [2, 0])),
        ("head_norm", {"position": -2}, (slice(None), -2)),
        ("neuron_norm", {"layer": 0, "neuron": [9, 3]}, (0, slice(None), [9, 3])),
        ("neuron_norm", {"neuron": 23, "position": [1, 4]}, (slice(None), [1, 4], 23)),
    ],
)
def test_a_part_of_what_is_computed_is_that_slice_of_the_whole(tiny_model, quantity, select, index):
    activations = td.capture(tiny_model, PROMPT)
    close(activations.get(quantity, **select), activations.get(quantity)[index])


def test_layers_keep_the_models_numbers_when_few_are_captured():
    model = random_model(**GPT2, n_layers=4)
    few = td.capture(model, PROMPT, layers=[-1, 1])
    every = td.capture(model, PROMPT)
    assert few.layers == (1, 3)
    close(few.z, every.z[[1, 3]])
    close(few.get("z", layer=3), every.z[3])
    close(few.head("a3.h1").output, every.head("a3.h1").output)
    close(few.mlp("m1").norm, every.mlp("m1").norm)
    assert set(few.top_heads(8).layer.tolist()) == {1, 3}
    assert set(few.to_dataframe("neuron").layer) == {1, 3}


def test_an_mlp_is_a_view_of_its_layer(tiny_model):
    activations = td.capture(tiny_model, PROMPT)
    mlp = activations.mlp("m1")
    close(mlp.pre, activations.pre[1])
    close(mlp.post, activations.post[1])
    close(mlp.output, activations.mlp_out[1])
    assert mlp.post.data_ptr() == activations.post[1].data_ptr()
    assert mlp.name == "m1" and activations.head("a0.h3").name == "a0.h3"


def test_position_cuts_the_prompt(tiny_model):
    cut = td.capture(tiny_model, PROMPT, position=3)
    close(cut.z, td.capture(tiny_model, PROMPT[:4]).z)
    assert cut.tokens.tolist() == PROMPT[:4]


def test_numbers_from_tables_and_tensors_are_indices_too(tiny_gpt2):
    activations = td.capture(tiny_gpt2, PROMPT)
    row = activations.to_dataframe("head").iloc[0]
    assert activations.get("output", layer=row["layer"], head=row["head"], position=row["position"]).shape == (16,)
    top = activations.top_heads(3)
    assert activations.get("z", layer=top.layer[0], head=top.index).shape == (7, 3, 4)


# -- top and table -----------------------------------------------------------------------------------


def test_top_heads_rank_by_what_they_write_at_the_position(tiny_model):
    activations = td.capture(tiny_model, PROMPT)
    outputs = torch.stack([activations.get("output", layer=layer)[2].norm(dim=-1) for layer in range(2)])
    top = activations.top_heads(3, position=2)
    expected = sorted((float(outputs[layer, head]), f"a{layer}.h{head}") for layer in range(2) for head in range(4))
    assert top.names == [name for _, name in expected[::-1][:3]]
    close(top.norm, torch.tensor([norm for norm, _ in expected[::-1][:3]]))
    assert (top.position, top.token) == (2, "4")


def test_top_neurons_rank_by_what_they_write_at_the_last_position(tiny_model):
    activations = td.capture(tiny_model, PROMPT)
    top = activations.top_neurons(48)
    assert sorted(top.names) == sorted(f"m{layer}.n{neuron}" for layer in range(2) for neuron in range(24))
    W_out = [block.mlp.W_out for block in tiny_model.blocks]
    for name, norm in zip(top.names, top.norm, strict=True):
        layer, neuron = neuron_index(name)
        close(norm, (activations.post[layer, -1, neuron] * W_out[layer][neuron]).norm())
    assert (top.norm.diff() <= 0).all()


def test_top_says_in_print_what_it_ranks(tiny_gpt2):
    lines = repr(td.capture(tiny_gpt2, PROMPT).top_neurons(2)).splitlines()
    assert lines[0] == "neurons that write most at position 6 '2' (L2 norm):"
    assert len(lines) == 3 and lines[1].split()[0].startswith("m")


def test_the_table_of_heads_has_a_row_for_each(tiny_model):
    activations = td.capture(tiny_model, PROMPT)
    frame = activations.to_dataframe("head")
    assert list(frame) == ["layer", "head", "name", "position", "token", "norm"]
    assert len(frame) == 2 * 4 * 7
    for row in some_rows(frame):
        assert row.name == f"a{row.layer}.h{row.head}"
        assert row.token == str(PROMPT[row.position])
        assert row.norm == pytest.approx(float(activations.head(row.name).norm[row.position]), rel=1e-5)


def test_the_table_of_neurons_has_a_row_for_each(tiny_model):
    activations = td.capture(tiny_model, PROMPT)
    frame = activations.to_dataframe("neuron", layer=1, position=[2, -1])
    assert list(frame) == ["layer", "neuron", "position", "token", "pre", "post", "norm"]
    assert len(frame) == 24 * 2 and set(frame.layer) == {1} and set(frame.position) == {2, 6}
    for row in some_rows(frame):
        assert row.token == str(PROMPT[row.position])
        assert row.pre == float(activations.pre[1, row.position, row.neuron])
        assert row.post == float(activations.post[1, row.position, row.neuron])
        expected = float(activations.get("neuron_norm", layer=1, position=row.position, neuron=row.neuron))
        assert row.norm == pytest.approx(expected, rel=1e-5)
    assert "pre" not in td.capture(tiny_model, PROMPT, keep="post").to_dataframe("neuron")


def test_the_table_of_attention_has_no_future(tiny_model):
    activations = td.capture(tiny_model, PROMPT, keep="pattern")
    frame = activations.to_dataframe("attention")
    assert list(frame) == ["layer", "head", "name", "dest", "dest_token", "src", "src_token", "weight"]
    assert len(frame) == 2 * 4 * (7 * 8 // 2)
    assert (frame.groupby(["layer", "head", "dest"]).weight.sum() - 1).abs().max() < 1e-5
    for row in some_rows(frame):
        assert (row.dest_token, row.src_token) == (str(PROMPT[row.dest]), str(PROMPT[row.src]))
        assert row.weight == float(activations.pattern[row.layer, row.head, row.dest, row.src])


def test_a_table_of_a_half_precision_model_can_be_made():
    activations = td.capture(random_model(**GPT2, dtype=torch.bfloat16), PROMPT)
    for kind in ("head", "neuron", "attention"):
        assert len(activations.to_dataframe(kind))


# -- memory and types --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "layers", "floats"),
    [
        pytest.param("z", None, 4 * 7 * 16, id="z of four layers"),
        pytest.param("pattern", [2], 4 * 7 * 7, id="patterns of one layer"),
        pytest.param(("post", "resid_pre"), [0, 3], 2 * 7 * (24 + 16), id="two quantities of two layers"),
    ],
)
def test_only_what_was_asked_for_stays_in_memory(keep, layers, floats):
    model = random_model(**GPT2, n_layers=4)
    gc.collect()
    before = {id(each) for each in gc.get_objects() if issubclass(type(each), torch.Tensor)}
    activations = td.capture(model, PROMPT, keep=keep, layers=layers)
    gc.collect()
    born = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and id(each) not in before]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in born}
    expected = 4 * floats + 4 * 20 + 8 * 7  # and the logits (float32) and the tokens (int64)
    assert sum(storages.values()) == expected
    assert activations.nbytes == expected


def test_slicing_one_head_copies_nothing(tiny_gpt2):
    activations = td.capture(tiny_gpt2, PROMPT)
    assert activations.head("a1.h2").z.untyped_storage().data_ptr() == activations.z.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_raw_values_keep_the_models_dtype_and_norms_are_float32_or_better(dtype):
    model = random_model(**LLAMA, dtype=dtype)
    activations = td.capture(model, PROMPT)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    assert {values.dtype for values in activations.values.values()} == {dtype}
    assert activations.logits.dtype == full
    for quantity in ("head_norm", "neuron_norm"):
        assert activations.get(quantity).dtype == full
    assert activations.head("a0.h0").output.dtype == full
    expected = (activations.z[1, :, 2].to(full) @ model.blocks[1].attn.W_O[2].to(full)).norm(dim=-1)
    close(activations.head("a1.h2").norm, expected)


def test_nothing_captured_carries_a_gradient(tiny_model):
    activations = td.capture(tiny_model, PROMPT)
    derived = [activations.get("head_norm"), activations.get("neuron_norm"), activations.get("output", layer=0)]
    assert not any(values.requires_grad for values in [*activations.values.values(), activations.logits, *derived])


def test_the_users_prompt_is_not_shared(tiny_gpt2):
    prompt = torch.tensor(PROMPT)
    activations = td.capture(tiny_gpt2, prompt)
    prompt[0] = 0
    assert activations.tokens.tolist() == PROMPT


@pytest.mark.parametrize(
    ("layers", "text"), [([2], "layer 2"), ([0, 1], "layers 0-1"), ([0, 1, 3], "layers 0, 1, 3"), (None, "layers 0-3")]
)
def test_print_says_what_is_held(layers, text):
    model = random_model(**GPT2, n_layers=4, model_name="tiny")
    activations = td.capture(model, PROMPT, keep=("post", "z"), layers=layers)
    size = 4 * (len(activations.layers) * 7 * (16 + 24) + 20) + 8 * 7
    assert repr(activations) == f"Activations(tiny: 7 tokens, {text}; z, post; {size / 1000:.3g} kB)"


# -- the model comes back as it was -------------------------------------------------------------------


def test_the_users_hooks_survive_and_ours_are_gone(own_model):
    seen = []
    own_model.train()
    own_model.add_hook("blocks.0.attn.hook_z", lambda value, hook: seen.append(1))
    before = n_hooks(own_model)
    gradients = [parameter.requires_grad for parameter in own_model.parameters()]
    td.capture(own_model, PROMPT)
    assert n_hooks(own_model) == before == 1 and seen == [1]
    assert [parameter.requires_grad for parameter in own_model.parameters()] == gradients
    assert own_model.training


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_survives_an_error(own_model, error):
    def fail(value: torch.Tensor, hook: object) -> None:
        raise error("in the middle")

    own_model.add_hook("blocks.1.hook_resid_pre", fail)
    with pytest.raises(error, match="in the middle"):
        td.capture(own_model, PROMPT)
    assert n_hooks(own_model) == 1
    own_model.reset_hooks()
    with torch.no_grad():
        weight(own_model, "attn.W_V").fill_(float("nan"))
    with pytest.raises(ValueError, match="layer 1"):
        td.capture(own_model, PROMPT)
    assert n_hooks(own_model) == 0


# -- attention-only models, experts ---------------------------------------------------------------------


def test_an_attention_only_model_has_all_but_its_mlps():
    model = random_model(n_layers=2, attn_only=True, normalization_type="LN")
    activations = td.capture(model, PROMPT)
    assert list(activations.values) == ["resid_pre", "pattern", "value", "z", "attn_out", "resid_mid", "resid_post"]
    _, cache = model.run_with_cache(torch.tensor([PROMPT]))
    for layer in range(2):
        close(activations.resid_mid[layer], cache[f"blocks.{layer}.hook_resid_post"][0])
        close(activations.get("output", layer=layer).sum(1) + model.blocks[layer].attn.b_O, activations.attn_out[layer])
    assert len(activations.top_heads(8).names) == 8
    with pytest.raises(ValueError, match="pre, mlp_out: it has attention only"):
        td.capture(model, PROMPT, keep=["pre", "mlp_out"])
    with pytest.raises(ValueError, match="which has attention only"):
        activations.mlp("m0")


@pytest.mark.parametrize("build", [pytest.param(families.hooked, marks=hooked_only), families.bridged])
def test_experts_have_no_neurons_to_tell_apart(build):
    model = build("mixtral")
    activations = td.capture(model, PROMPT)
    assert "post" not in activations.values and "mlp_out" in activations.values
    with pytest.raises(ValueError, match="cannot be told apart"):
        td.capture(model, PROMPT, keep="post")


# -- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "index"), [(0, 0), (3, 1), (12, 4095)])
def test_names_and_indices_are_each_others_inverse(layer, index):
    assert head_index(head_name(layer, index)) == (layer, index)
    assert neuron_index(neuron_name(layer, index)) == (layer, index)
    assert mlp_index(mlp_name(layer)) == layer
    assert (head_name(3, 1), mlp_name(3), neuron_name(3, 17)) == ("a3.h1", "m3", "m3.n17")


# -- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "zz"}, "`keep` must be among resid_pre, .*, got zz"),
        ({"keep": ["z", "output"]}, "got output. 'output' is computed from 'z'"),
        ({"keep": []}, "`keep` must name at least one of .*, got none"),
        ({"layers": [0, 2]}, "`layers` must be from -2 to 1, got 2"),
        ({"layers": []}, "`layers` must name at least one layer"),
        ({"position": 7}, "`position` must be a token of the prompt"),
    ],
)
def test_capture_refuses_in_one_sentence(tiny_gpt2, unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        td.capture(tiny_gpt2, PROMPT, **options)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda a: a.post, r"`post` must be captured .* held are z. Capture again with keep=\['z', 'post'\]"),
        (lambda a: a.get("neuron_norm"), r"`post` must be captured"),
        (lambda a: a.top_neurons(1), r"`post` must be captured"),
        (lambda a: a.to_dataframe("attention"), r"`pattern` must be captured"),
        (lambda a: a.get("z", layer=0), r"got \[0\]; held are \[1\]. Capture again with layers=\[0, 1\]"),
        (lambda a: a.head("a0.h0"), r"got \[0\]; held are \[1\]"),
        (lambda a: a.mlp("m0"), r"got \[0\]; held are \[1\]"),
        (lambda a: a.get("zz"), r"`quantity` must be one of resid_pre, .*, got 'zz'"),
        (lambda a: a.get("z", layer=2), r"`layer` must be from -2 to 1, got 2"),
        (lambda a: a.get("z", head=4), r"`head` must be from -4 to 3, got 4"),
        (lambda a: a.get("z", position=[0, 7]), r"`position` must be from -7 to 6, got 7"),
        (lambda a: a.get("z", neuron=0), r"`neuron` must be left out for 'z', whose axes are layer, pos, head, d_head"),
        (lambda a: a.get("output", head=0), r"`layer` or `position` must be one number"),
        (lambda a: a.head("h1.a3"), r"`name` must be that of a head, such as 'a3.h1', got 'h1.a3'"),
        (lambda a: a.head("a1.h4"), r"`name` must be a head of tiny-gpt2, from a0.h0 to a1.h3, got 'a1.h4'"),
        (lambda a: a.head("a2.h0"), r"from a0.h0 to a1.h3, got 'a2.h0'"),
        (lambda a: a.mlp("a1"), r"`name` must be that of an MLP, such as 'm3', got 'a1'"),
        (lambda a: a.mlp("m2"), r"`name` must be an MLP of tiny-gpt2, from m0 to m1, got 'm2'"),
        (lambda a: a.top_heads(5), r"`k` must be from 1 to 4, the number of heads captured, got 5"),
        (lambda a: a.top_heads(0), r"`k` must be from 1 to 4"),
        (lambda a: a.to_dataframe("mlp"), r"`kind` must be 'head', 'neuron' or 'attention', got 'mlp'"),
    ],
)
def test_activations_refuse_in_one_sentence(tiny_gpt2, unchecked, ask, message):
    activations = td.capture(tiny_gpt2, PROMPT, keep="z", layers=1)
    with pytest.raises(ValueError, match=message):
        ask(activations)


def test_a_bad_number_after_the_last_layer_is_reported(own_model):
    with torch.no_grad():
        own_model.unembed.W_U[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite in the logits of the model"):
        td.capture(own_model, PROMPT, keep="z")


@pytest.mark.parametrize("name", ["attn.W_Q", "attn.W_V", "attn.W_O", "mlp.W_out"])
def test_a_bad_number_is_reported_with_its_layer_whatever_is_kept(own_model, name):
    with torch.no_grad():
        weight(own_model, name)[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"NaN or infinite in .* of layer 1"):
        td.capture(own_model, PROMPT, keep="resid_pre", layers=0)


# -- the page ----------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run(monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "activations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = "\n".join(blocks).replace('"Once upon a time there was a little"', str(PROMPT))  # no tokenizer here
    monkeypatch.setattr(td, "load_model", lambda: random_model(**GPT2, n_layers=4), raising=False)
    names: dict[str, Any] = {}
    exec(code, names)
    assert list(names["acts"].values) == ["z", "post"]
    choices = page[page.index("`keep` takes") + len("`keep`") : page.index("Raw values")]
    assert re.findall(r"`(\w+)`", choices) == list(get_args(Quantity))
