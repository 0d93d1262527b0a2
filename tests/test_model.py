"""The one view of a model: prompts, edits, and that nothing stays behind."""

import copy

import families
import pytest
import torch
from conftest import embedded, hooked_only, n_hooks

import tracedensity as td
from benchmarks.lens import HAS_HOOKED
from tracedensity.model import as_transformer, require_finite

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(name="transformer")
def view(tiny_model):
    return as_transformer(tiny_model)


# -- prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        pytest.param("", "at least one token, got an empty string", id="empty text"),
        pytest.param("Once", "must be token ids: this model has no tokenizer", id="text without tokenizer"),
        pytest.param([], "at least one token, got none", id="empty list"),
        pytest.param([1] * 33, "must fit the context of tiny-gpt2, 32 tokens, got 33", id="too long"),
        pytest.param([1, 20, -1], r"token ids from 0 to 19, got \[20, -1\]", id="outside the vocabulary"),
        pytest.param([2**70], "a list of token ids .* got a list that is none", id="no machine integer"),
        pytest.param(torch.tensor([1.5]), r"\[pos\] integer tensor, got torch.float32", id="floats"),
        pytest.param(torch.tensor([True]), r"\[pos\] integer tensor, got torch.bool", id="booleans"),
        pytest.param(torch.tensor([[1, 2]]), r"of shape \[1, 2\]", id="a batch"),
    ],
)
def test_a_bad_prompt_gets_one_sentence(tiny_gpt2, prompt, words):
    with pytest.raises(ValueError, match=words) as error:
        as_transformer(tiny_gpt2).tokens(prompt)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("position", [5, -6])
def test_a_position_outside_the_prompt_is_refused(transformer, position):
    with pytest.raises(ValueError, match=rf"from -5 to 4, got {position}"):
        transformer.tokens(PROMPT, position)


def test_tokens_end_at_the_position_that_is_explained(transformer):
    assert transformer.tokens(PROMPT).tolist() == PROMPT
    assert transformer.tokens(torch.tensor(PROMPT, dtype=torch.int32), 2).tolist() == PROMPT[:3]
    assert transformer.tokens(tuple(PROMPT), -4).tolist() == PROMPT[:2]
    assert transformer.texts(PROMPT) == ["3", "1", "4", "1", "5"]


def test_text_that_is_too_long_is_refused_and_not_cut(stories):
    with pytest.raises(ValueError, match="must fit the context of stories260K, 512 tokens, got"):
        as_transformer(stories).tokens("Once upon a time " * 200)


def test_token_texts_join_to_the_prompt(stories):
    transformer = as_transformer(stories)
    ids = transformer.tokens("Once upon a time")
    assert "".join(transformer.texts(ids)) == "<s> Once upon a time"


# -- running -----------------------------------------------------------------------------------------


def test_logits_without_edits_are_the_models_own(tiny_model, transformer):
    tokens = torch.tensor([PROMPT, PROMPT[::-1]])
    with torch.no_grad():
        expected = tiny_model(tokens)[:, -1]
    torch.testing.assert_close(transformer.logits(tokens), expected, rtol=0, atol=1e-6)


def by_hand(model, tokens, skip):
    """The residual stream summed outside the model's blocks, `skip` edits the skip connections."""
    with torch.no_grad():
        stream = embedded(model, tokens)
        for layer, block in enumerate(model.blocks):
            normed = block.ln1(stream)
            attended = block.attn(normed, normed, normed) if HAS_HOOKED else block.attn(normed)[0]
            stream = skip("skip_attn", layer)(stream) + attended
            stream = skip("skip_mlp", layer)(stream) + block.mlp(block.ln2(stream))
        return model.unembed(model.ln_final(stream))[:, -1]


@pytest.mark.parametrize("reverse", [False, True])
def test_edits_of_skip_connections_equal_a_forward_pass_by_hand(tiny_model, transformer, reverse):
    """In any order of the edits: the sum after one sublayer is a term of the next."""
    factors = {(name, layer): 0.3 + 0.2 * layer for name in ("skip_attn", "skip_mlp") for layer in range(2)}
    edits = {site: lambda value, factor=factor: value * factor for site, factor in factors.items()}
    ordered = dict(reversed(edits.items())) if reverse else edits
    tokens = torch.tensor([PROMPT])
    expected = by_hand(tiny_model, tokens, lambda name, layer: edits[name, layer])
    torch.testing.assert_close(transformer.logits(tokens, ordered), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, transformer.logits(tokens))


def test_an_edit_reaches_what_it_names(tiny_model, transformer):
    """Without attention and MLP outputs, the embedding goes straight to the last norm."""
    tokens = torch.tensor([PROMPT])
    edits = {(name, layer): torch.zeros_like for name in ("attn_out", "mlp_out") for layer in range(2)}
    with torch.no_grad():
        expected = tiny_model.unembed(tiny_model.ln_final(embedded(tiny_model, tokens)))[:, -1]
    torch.testing.assert_close(transformer.logits(tokens, edits), expected, rtol=1e-5, atol=1e-6)


def test_an_edited_value_is_a_term_of_the_edited_sum(tiny_model, transformer):
    """Both the branch and the skip connection around it gone: nothing is left to predict from."""
    edits = {("skip_mlp", 1): torch.zeros_like, ("mlp_out", 1): torch.zeros_like}
    with torch.no_grad():
        expected = tiny_model.unembed(tiny_model.ln_final(torch.zeros(1, 1, 16)))[:, -1]
    torch.testing.assert_close(transformer.logits(torch.tensor([PROMPT]), edits), expected)


def test_reading_hands_over_what_the_cache_holds(tiny_model, transformer):
    seen = {}
    sites = {
        (name, layer): lambda v, key=(name, layer): seen.update({key: v}) for name in ("z", "v") for layer in (0, 1)
    }
    _, cache = tiny_model.run_with_cache(torch.tensor([PROMPT]))
    with transformer.reading(sites):
        transformer.logits(torch.tensor([PROMPT]))
    for name, layer in sites:
        torch.testing.assert_close(seen[name, layer], cache[f"blocks.{layer}.attn.hook_{name}"])


def test_an_error_in_an_edit_leaves_no_hook_and_keeps_the_users(tiny_model, transformer):
    def fail(value):
        raise KeyboardInterrupt

    calls = []
    tiny_model.add_hook("blocks.0.hook_attn_out", lambda value, hook: calls.append("user"))
    try:
        before = n_hooks(tiny_model)
        with pytest.raises(KeyboardInterrupt):
            transformer.logits(torch.tensor([PROMPT]), {("z", 1): fail, ("skip_attn", 1): fail})
        assert n_hooks(tiny_model) == before
        transformer.logits(torch.tensor([PROMPT]))
        assert calls == ["user", "user"]
    finally:
        tiny_model.reset_hooks()
    assert n_hooks(tiny_model) == before - 1


def test_gradients_stay_untouched(tiny_model, transformer):
    logits = transformer.logits(torch.tensor([PROMPT]))
    assert not logits.requires_grad
    assert all(p.requires_grad and p.grad is None for p in tiny_model.parameters())
    assert torch.is_grad_enabled()


# -- weights -----------------------------------------------------------------------------------------


def test_heads_and_neurons_write_what_the_model_adds(tiny_model, transformer):
    """z times W_O over heads, plus the bias, is the attention output; likewise for neurons."""
    _, cache = tiny_model.run_with_cache(torch.tensor([PROMPT]))
    for layer, block in enumerate(tiny_model.blocks):
        z = cache[f"blocks.{layer}.attn.hook_z"]
        out = torch.einsum("bphd,hdm->bpm", z, transformer.W_O(layer)) + block.attn.b_O
        torch.testing.assert_close(out, cache[f"blocks.{layer}.hook_attn_out"])
        out = cache[f"blocks.{layer}.mlp.hook_post"] @ transformer.W_out(layer)
        out = out if block.mlp.b_out is None else out + block.mlp.b_out
        torch.testing.assert_close(out, cache[f"blocks.{layer}.hook_mlp_out"])


def test_the_frozen_final_norm_is_the_norm_without_its_bias(tiny_model, transformer):
    _, cache = tiny_model.run_with_cache(torch.tensor([PROMPT]))
    norm = transformer.final_norm(cache["ln_final.hook_scale"][0])
    with torch.no_grad():
        expected = tiny_model.ln_final(cache["blocks.1.hook_resid_post"])[0] - getattr(tiny_model.ln_final, "b", 0)
    torch.testing.assert_close(norm(cache["blocks.1.hook_resid_post"][0]), expected)


def test_the_fingerprint_tells_weights_apart(tiny_model, transformer):
    twin = copy.deepcopy(tiny_model)
    assert as_transformer(twin).fingerprint() == transformer.fingerprint()
    with torch.no_grad():
        twin.blocks[1].mlp.W_in.mul_(1.001)
    assert as_transformer(twin).fingerprint() != transformer.fingerprint()


# -- what is accepted --------------------------------------------------------------------------------


class Lookalike:
    """Looks like a HookedTransformer from afar."""

    cfg = blocks = hooks = tokenizer = None


@pytest.mark.parametrize("model", [3, None, torch.nn.Linear(1, 1), Lookalike()])
def test_what_is_no_hooked_transformer_is_refused(model):
    with pytest.raises(ValueError, match=f"must be a HookedTransformer .* got {type(model).__name__}"):
        as_transformer(model)


def test_a_view_of_a_view_is_the_same(transformer):
    assert as_transformer(transformer) is transformer


def test_other_architectures_are_refused(tiny_gpt2):
    other = copy.deepcopy(tiny_gpt2)
    other.cfg.attention_dir = "bidirectional"
    with pytest.raises(ValueError, match="causal language model"):
        as_transformer(other)


@pytest.mark.parametrize("build", [pytest.param(families.hooked, marks=hooked_only), families.bridged])
def test_parallel_blocks_are_refused_but_by_the_component_graph(build):
    other = build("pythia")
    for work in (td.attribute, td.density, td.capture):
        with pytest.raises(ValueError, match="`model` must have its MLP after attention"):
            work(other, [1, 2])


def test_positions_beside_the_stream_are_refused_by_the_component_graph(tiny_gpt2):
    other = copy.deepcopy(tiny_gpt2)
    other.cfg.positional_embedding_type = "shortformer"
    with pytest.raises(ValueError, match="`model` must add positions to the stream or rotate by them"):
        td.attribute(other, [1, 2], graph="component")


def test_shapes_follow_the_config(tiny_gpt2, tiny_llama):
    gpt2, llama = as_transformer(tiny_gpt2), as_transformer(tiny_llama)
    assert (gpt2.n_heads, gpt2.n_kv_heads, llama.n_kv_heads) == (4, 4, 2)
    values = torch.arange(2.0).view(1, 2, 1)  # two key/value heads
    assert llama.per_head(values).flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_the_layer(bad):
    with pytest.raises(ValueError, match="got 1 NaN or infinite in the keys of layer 3"):
        require_finite(torch.tensor([1.0, bad]), "the keys", 3)
    with pytest.raises(ValueError, match="in the logits of the model"):
        require_finite(torch.tensor([1.0, bad]), "the logits")


def test_finite_values_whose_sum_is_not_are_accepted():
    require_finite(torch.full((4,), 3e38), "the stream", 0)
