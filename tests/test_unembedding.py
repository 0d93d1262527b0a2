"""What edges say: against TransformerLens' own cache in float64, edge by edge, and a head whose word is known."""

import copy

import pytest
import torch
from conftest import hooked_only, random_model
from drawn import make_circuit
from handmade import INDUCTION_PROMPT, A, B, C, induction_model
from test_left_as_it_was import fail_after, flushes, state
from torch import Tensor

import tracedensity as td
from tracedensity import unembedding
from tracedensity.graph.token import TokenGraph
from tracedensity.model import as_transformer
from tracedensity.unembedding import TopTokens

PROMPT = [3, 1, 4, 1, 5, 9]
STORY = "said the old man, and"
VARIANTS = {
    "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN"},
    "folded": {"act_fn": "gelu_new", "normalization_type": "LNPre"},
    "RMS folded": {"act_fn": "silu", "gated_mlp": True, "normalization_type": "RMSPre", "n_key_value_heads": 2},
    "no norm": {"act_fn": "relu", "normalization_type": None},
    "attention only": {"attn_only": True, "normalization_type": "LN"},
}


@pytest.fixture(scope="module")
def books():
    return td.load_model("books-llama")


def whole(model, prompt=PROMPT, **options):
    ranking = td.attribute(model, prompt, method="random", **options).rank("top")
    return ranking.circuit(ranking.n_edges)


def some(model, prompt=PROMPT, share=0.5, **options):
    ranking = td.attribute(model, prompt, method="random", seed=1, **options).rank("top")
    return ranking.circuit(int(share * ranking.n_edges))


def said_slowly(model, circuit, hooks=()):
    """Logits of what each edge writes, in float64, as anybody would read them off TransformerLens' cache."""
    slow = copy.deepcopy(model).to(torch.float64)
    for point, hook in hooks:
        slow.add_hook(point, hook)
    with torch.no_grad():
        _, cache = slow.run_with_cache(circuit.provenance.tokens[None])
    norm, W_U = slow.cfg.normalization_type, slow.unembed.W_U.detach()

    def logits(vector: Tensor) -> Tensor:
        if norm is not None and norm.startswith("LN"):
            vector = vector - vector.mean()
        if norm in ("LN", "RMS"):
            vector = vector * slow.ln_final.w.detach()
        return vector @ W_U

    said = {}
    middle = "hook_resid_mid" if circuit.graph.has_mlp else "hook_resid_post"
    for name in circuit.edge_names():
        kind, (layer, *place) = circuit.graph.edge_index(name)
        if kind == "head":
            head, _, src = place
            values = cache[f"blocks.{layer}.attn.hook_v"][0, src]  # [kv_head, d_head]
            kv_head = head // (slow.cfg.n_heads // len(values))
            said[name] = logits(values[kv_head] @ slow.blocks[layer].attn.W_O[head].detach())
        elif kind in ("mlp", "resid_attn", "resid_mlp"):
            at = {"mlp": "hook_mlp_out", "resid_attn": "hook_resid_pre", "resid_mlp": middle}[kind]
            said[name] = logits(cache[f"blocks.{layer}.{at}"][0, place[0]])
    return said


def stored(graph, kind, index):
    """Where the tokens of an edge are: what a head brings is the same wherever it brings it."""
    return (index[0], index[1], index[3]) if kind == "head" else index


def assert_said(found, circuit, expected, k):
    """Each token found promotes as much as that of its place in the reference, whatever rounding does to near ties."""
    assert len(expected) == sum(n for kind, n in circuit.composition().items() if kind != "neuron")
    filled = {kind: torch.zeros(tokens.shape[:-1], dtype=torch.bool) for kind, tokens in found.tokens.items()}
    for name, logits in expected.items():
        kind, index = circuit.graph.edge_index(name)
        place = stored(circuit.graph, kind, index)
        tokens = found.tokens[kind][place]
        assert len(set(tokens.tolist())) == k
        torch.testing.assert_close(logits[tokens], logits.topk(k).values, rtol=1e-4, atol=1e-4 * float(logits.std()))
        assert found.of(kind, index) == [found.texts[token] for token in tokens.tolist()]
        filled[kind][place] = True
    for kind, mask in filled.items():
        assert torch.equal((found.tokens[kind] >= 0).all(-1), mask)
        assert (found.tokens[kind][~mask] == -1).all()


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 20])
def test_every_edge_says_what_the_cache_says(k, tiny_model):
    circuit = whole(tiny_model)
    found = td.top_tokens(tiny_model, circuit, k=k)
    assert isinstance(found, TopTokens)
    assert_said(found, circuit, said_slowly(tiny_model, circuit), k)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_norm_is_read_through(variant):
    model = random_model(**VARIANTS[variant])
    circuit = whole(model)
    assert_said(td.top_tokens(model, circuit), circuit, said_slowly(model, circuit), 3)


def test_a_real_model_says_what_its_cache_says_in_words(books):
    circuit = td.density(books, STORY, baselines=False).circuit(faithfulness=0.8)
    found = td.top_tokens(books, circuit, k=5)
    expected = said_slowly(books, circuit)
    assert_said(found, circuit, expected, 5)
    name, logits = next(iter(expected.items()))
    vocabulary = as_transformer(books)
    assert found.of(*circuit.graph.edge_index(name)) == vocabulary.texts(logits.topk(5).indices.tolist())


@pytest.mark.parametrize("share", [0.5, 0.1, 0.0])
def test_edges_that_the_circuit_does_not_have_say_nothing(share, tiny_llama):
    circuit = some(tiny_llama, share=share)
    found = td.top_tokens(tiny_llama, circuit, k=2)
    assert_said(found, circuit, said_slowly(tiny_llama, circuit), 2)
    absent = {kind: exists & ~circuit.kept[kind] for kind, exists in circuit.graph.exists.items()}
    assert found.of("mlp", tuple(absent["mlp"].nonzero()[0].tolist())) == []


def test_an_empty_circuit_says_nothing(tiny_gpt2):
    found = td.top_tokens(tiny_gpt2, some(tiny_gpt2, share=0.0))
    assert all((tokens == -1).all() for tokens in found.tokens.values())
    assert found.texts == {}
    assert repr(found) == "TopTokens(0 contributions, 0 different tokens)"


def test_the_induction_head_says_the_token_that_it_moves():
    model = induction_model()
    graph = TokenGraph.of(as_transformer(model), 3)
    ranking = td.attribute(model, list(INDUCTION_PROMPT), method="random").rank()
    like = ranking.circuit(0)
    circuit = like.of_edges(make_circuit("a1.h0@0->2", "a1.h0@1->2", "r1.attn@2", graph=graph).kept)
    found = td.top_tokens(model, circuit, k=1)
    assert found.tokens["head"][1, 0, :2].tolist() == [[A], [B]]  # what stands there, wherever it is brought
    assert found.tokens["resid_attn"][1, 2].tolist() == [C]  # the unembedding takes A for a sign of C
    assert found.of("head", (1, 0, 2, 1)) == [str(B)]
    assert repr(found) == "TopTokens(3 contributions, 3 different tokens)"


def test_a_head_is_read_where_it_brings_a_token_anywhere(tiny_gpt2):
    graph = TokenGraph.of(as_transformer(tiny_gpt2), len(PROMPT))
    like = some(tiny_gpt2)
    for dest in (2, 5):
        circuit = like.of_edges(make_circuit(f"a0.h1@2->{dest}", graph=graph).kept)
        found = td.top_tokens(tiny_gpt2, circuit)
        assert (found.tokens["head"][..., 0] >= 0).nonzero().tolist() == [[0, 1, 2]]
        assert found.of("head", (0, 1, 5, 2)) == found.of("head", (0, 1, 2, 2)) != []


def test_single_neurons_are_left_out(tiny_gpt2):
    ranking = td.attribute(tiny_gpt2, PROMPT, method="random", neurons=True).rank("top")
    circuit = ranking.circuit(ranking.n_edges)
    found = td.top_tokens(tiny_gpt2, circuit)
    assert found.tokens.keys() == {"head", "resid_attn", "resid_mlp"}
    assert found.of("neuron", (0, 1, 2)) == []
    assert_said(found, circuit, said_slowly(tiny_gpt2, circuit), 3)


def test_all_tokens_of_the_vocabulary_are_in_order(tiny_gpt2):
    circuit = some(tiny_gpt2)
    tokens = td.top_tokens(tiny_gpt2, circuit, k=20).tokens["mlp"][circuit.kept["mlp"]]
    assert torch.equal(tokens.sort().values, torch.arange(20).expand(len(tokens), 20))


def test_a_few_vectors_at_a_time_say_the_same(tiny_gpt2, monkeypatch):
    circuit = whole(tiny_gpt2)
    together = td.top_tokens(tiny_gpt2, circuit)
    monkeypatch.setattr(unembedding, "_BLOCK", 50)  # two vectors of 20 logits
    apart = td.top_tokens(tiny_gpt2, circuit)
    assert all(torch.equal(apart.tokens[kind], tokens) for kind, tokens in together.tokens.items())


@pytest.mark.parametrize(  # a bridge does not let an edit of its hook_resid_mid reach the stream
    "point", ["blocks.0.hook_attn_out", pytest.param("blocks.0.hook_resid_mid", marks=hooked_only)]
)
def test_what_a_hook_of_the_user_adds_is_said_too(tiny_gpt2, point):
    """A steering vector: the model with it is the model that is explained."""
    circuit = whole(tiny_gpt2)
    plain = td.top_tokens(tiny_gpt2, circuit)

    def steer(value, hook):
        return value + torch.linspace(-3, 3, 16, dtype=value.dtype)

    tiny_gpt2.add_hook(point, steer)
    try:
        steered = td.top_tokens(tiny_gpt2, circuit)
    finally:
        tiny_gpt2.reset_hooks()
    assert_said(steered, circuit, said_slowly(tiny_gpt2, circuit, [(point, steer)]), 3)
    assert torch.equal(steered.tokens["resid_attn"][0], plain.tokens["resid_attn"][0])
    assert not torch.equal(steered.tokens["resid_mlp"], plain.tokens["resid_mlp"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_types_are_read(dtype, tiny_llama):
    model = copy.deepcopy(tiny_llama).to(dtype)
    circuit = whole(model)
    found = td.top_tokens(model, circuit)
    if dtype == torch.float64:
        assert_said(found, circuit, said_slowly(tiny_llama, circuit), 3)
    assert all((found.tokens[kind][..., 0] >= 0).any() for kind in ("head", "mlp"))


# -- the unembedding -------------------------------------------------------------------------------


def test_the_unembedding_is_the_model_s_own(tiny_model):
    found = as_transformer(tiny_model).W_U
    assert torch.equal(found, tiny_model.unembed.W_U)
    assert found.data_ptr() == tiny_model.unembed.W_U.data_ptr()  # no copy: vocabularies are large
    assert not found.requires_grad


@pytest.mark.parametrize(("given", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_the_unembedding_is_in_float32_or_better(given, expected, tiny_gpt2):
    assert as_transformer(copy.deepcopy(tiny_gpt2).to(given)).W_U.dtype == expected


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 21])
def test_k_must_be_of_the_vocabulary(k, tiny_gpt2):
    with pytest.raises(ValueError, match=f"`k` must be from 1 to 20, the size of the vocabulary, got {k}"):
        td.top_tokens(tiny_gpt2, some(tiny_gpt2), k=k)


def test_a_circuit_of_another_model_is_refused(tiny_gpt2, tiny_llama):
    with pytest.raises(ValueError, match="`model` must be the one that this was computed on, tiny-gpt2"):
        td.top_tokens(tiny_llama, some(tiny_gpt2))


def test_a_circuit_of_heads_and_mlps_is_refused(tiny_gpt2):
    circuit = some(tiny_gpt2, graph="component")
    with pytest.raises(ValueError, match="`circuit` must be one of a TokenGraph to be read, got one of ComponentGraph"):
        td.top_tokens(tiny_gpt2, circuit)


# -- the model is left as it was -------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training, tiny_llama):
    circuit = some(tiny_llama)
    tiny_llama.train(training)
    before, flushed = state(tiny_llama), flushes()
    td.top_tokens(tiny_llama, circuit)
    assert state(tiny_llama) == before
    assert flushes() == flushed
    tiny_llama.eval()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_after_an_error_in_the_middle(error, tiny_gpt2, monkeypatch):
    circuit = some(tiny_gpt2)
    before = state(tiny_gpt2)
    fail_after(monkeypatch, tiny_gpt2, 0, error)
    with pytest.raises(error):
        td.top_tokens(tiny_gpt2, circuit)
    assert state(tiny_gpt2) == before
