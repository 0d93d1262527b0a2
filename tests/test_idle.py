"""Heads are run on the rows and queries to which they bring something, and predictions are what they were."""

import copy

import pytest
import torch
from conftest import hooked_only, random_model

import tracedensity as td
from tracedensity import pooling
from tracedensity.graph.token import TokenGraph
from tracedensity.model import Attended, as_transformer, idle
from tracedensity.run import Conditions, run_masks, run_shares
from tracedensity.setting import token_setting

PROMPT = [3, 1, 4, 1, 5, 9, 2]


@pytest.fixture
def packed(monkeypatch) -> list[tuple[int, int, int]]:
    """Rows that are read and attended, and the first query, of each layer that is run from here on."""
    monkeypatch.setattr(idle, "_WORTHWHILE", 0)
    seen = []
    of = idle._Packed.of

    def noted(stream, attended):
        found = of(stream, attended)
        seen.append((len(found.few), len(found.widen), attended.start))
        return found

    monkeypatch.setattr(idle._Packed, "of", noted)
    return seen


def predictions(model, kept, conditions=Conditions()):  # noqa: B008
    """Logits of circuits of the prompt, with what is left out and without."""
    setting = token_setting(as_transformer(model), PROMPT, "zero", -1, 0)
    graph = TokenGraph.of(setting.model, len(PROMPT))

    def run():
        return run_masks(setting, graph, kept(graph), conditions, lambda logits, _: {"": logits[:, 0]})[""]

    found = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idle, "_WORTHWHILE", torch.inf)
        return found, run()


def circuits(graph, empty=(1, 2, 4), share=0.6):
    """Six circuits with edges at random, of which some have no head in the second layer."""
    generator = torch.Generator().manual_seed(0)
    kept = {
        kind: (torch.rand(6, *shape, generator=generator) < share) & graph.exists[kind]
        for kind, shape in graph.shapes.items()
    }
    kept["head"][list(empty), 1] = False
    return kept


@hooked_only
def test_rows_and_queries_without_an_edge_are_left_out(tiny_model, packed):
    found, expected = predictions(tiny_model, circuits)
    # the first layer is read once for all; in the last one three circuits have heads, one stands for the others, and
    # the query before the last token for those before it
    assert packed == [(1, 6, 0), (4, 4, len(PROMPT) - 2)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found[:, None] - found[None]).abs().amax(-1).fill_diagonal_(1).min() > 1e-3  # circuits differ


@hooked_only
@pytest.mark.parametrize("empty", [(), range(6)], ids=["heads everywhere", "no heads"])
def test_all_rows_or_none(tiny_model, packed, empty):
    found, expected = predictions(tiny_model, lambda graph: circuits(graph, list(empty)))
    assert packed[1] == ((1, 1, len(PROMPT) - 1) if empty else (6, 6, len(PROMPT) - 2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def complements(graph):
    """What complements are without: in the second layer all heads of three circuits."""
    kept = circuits(graph, ())
    kept["head"][[1, 2, 4], 1] = True
    return kept


@hooked_only
@pytest.mark.parametrize(
    ("conditions", "kept", "second"),
    [
        (Conditions(inverse=True), complements, (4, 4, 0)),
        (Conditions(keep_residual=True), circuits, (4, 4, len(PROMPT) - 2)),
        (Conditions(attention="open"), circuits, (6, 6, 0)),  # nothing is left out
    ],
    ids=["inverse", "all skip connections", "all attention"],
)
def test_in_other_conditions(tiny_model, packed, conditions, kept, second):
    found, expected = predictions(tiny_model, kept, conditions)
    assert packed == [(1, 6, 0), second]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@hooked_only
def test_each_row_has_a_gradient_of_its_own(tiny_model, packed):
    setting = token_setting(as_transformer(tiny_model), PROMPT, "zero", -1, 0)
    graph = TokenGraph.of(setting.model, len(PROMPT))
    kept = {kind: torch.ones(4, *shape) for kind, shape in graph.shapes.items()}
    kept["mlp"][:, -1, -1] = torch.tensor([1, 0.9, 0.8, 0.7])  # the only difference: all layers read the same

    def slopes(part):
        some = {kind: shares[part] for kind, shares in kept.items()}
        return run_shares(setting, graph, some, Conditions(), lambda logits, _: {"loss": logits[..., 3]})[1]

    found = slopes(slice(None))
    for number in range(4):
        for kind, alone in slopes(slice(number, number + 1)).items():
            torch.testing.assert_close(found[kind][number], alone[0], rtol=1e-4, atol=1e-6)
    assert not packed


@hooked_only
@pytest.mark.parametrize("name", ["attn.hook_attn_scores", "attn.hook_v", "ln1.hook_scale"])
def test_hooks_within_attention_see_all_rows(tiny_model, packed, name):
    shapes = []
    tiny_model.blocks[1].get_submodule(name).add_hook(lambda value, hook: shapes.append(value.shape[0]))
    try:
        found, expected = predictions(tiny_model, circuits)
    finally:
        tiny_model.reset_hooks()
    assert set(shapes) == {6} and packed == [(1, 6, 0)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@hooked_only
def test_rows_that_a_hook_has_made_different_are_read_each(tiny_model, packed):
    def shift(value, hook):
        return value + torch.arange(len(value))[:, None, None] / 10

    tiny_model.blocks[0].hook_resid_pre.add_hook(shift)
    try:
        found, expected = predictions(tiny_model, circuits)
    finally:
        tiny_model.reset_hooks()
    assert packed[0] == (6, 6, 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@hooked_only
@pytest.mark.parametrize("name", ["hook_q_input", "hook_k_input", "hook_v_input"])
def test_keys_or_values_that_read_something_else_are_read_each(tiny_model, packed, name):
    model = copy.deepcopy(tiny_model)
    model.set_use_split_qkv_input(True)

    def shift(value, hook):
        return value + torch.arange(value.numel()).view(value.shape).sin()

    model.blocks[0].get_submodule(name).add_hook(shift)
    found, expected = predictions(model, circuits)
    assert not packed
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@hooked_only
@pytest.mark.parametrize(
    "config",
    [
        {"positional_embedding_type": "shortformer"},
        {"original_architecture": "Olmo2ForCausalLM"},
        {"original_architecture": "Olmo2ForCausalLM", "normalization_type": None},
    ],
    ids=["positions beside the stream", "norms behind attention", "nothing behind attention"],
)
def test_where_norms_are_given_something_else_nothing_is_left_out(config, packed):
    model = random_model(**{"model_name": "tiny", "act_fn": "silu", "normalization_type": "RMS", **config})
    found, expected = predictions(model, circuits)
    assert not packed
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@hooked_only
@pytest.mark.parametrize("name", ["q", "k", "v", "z"])
def test_edits_of_heads_see_all_rows(tiny_gpt2, packed, name):
    model, shapes = as_transformer(tiny_gpt2), []
    edits = {
        ("attn_idle", 0): lambda value: torch.ones(value.shape[:2], dtype=torch.bool),
        (name, 0): lambda value: (shapes.append(len(value)), value)[1],
    }
    model.logits(torch.tensor([PROMPT, PROMPT[::-1], PROMPT]), edits)
    assert shapes == [3] and not packed


@hooked_only
def test_curves_of_prompts_of_several_lengths(tiny_model, packed, monkeypatch):
    prompts = [PROMPT, PROMPT[:4], PROMPT[2:]]
    found = td.density(tiny_model, prompts)
    assert any(start for _, _, start in packed)
    monkeypatch.setattr(idle, "_WORTHWHILE", torch.inf)
    for one, other in zip(found, td.density(tiny_model, prompts), strict=True):
        assert one.sizes.tolist() == other.sizes.tolist()
        torch.testing.assert_close(one.faithfulness, other.faithfulness, rtol=0, atol=1e-5)


def test_circuits_and_baselines_of_prompts_share_batches(tiny_gpt2, monkeypatch):
    batches, run = [], pooling._run

    def counted(asked, owner, size):
        some = [asked[number] for number in owner.unique().tolist()]
        batches.append(({each.conditions.inverse for each in some}, len({id(each.ground) for each in some})))
        return run(asked, owner, size)

    monkeypatch.setattr(pooling, "_run", counted)
    td.density(tiny_gpt2, [PROMPT, PROMPT[:5]])
    assert ({False, True}, 2) in batches


def test_what_stands_for_rows_and_queries():
    idle = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    found = Attended.of(idle)
    assert (found.rows.tolist(), found.spread.tolist(), found.start) == ([0, 1, 2], [0, 1, 2, 1], 1)
    found = Attended.of(~idle)
    assert (found.rows.tolist(), found.spread.tolist(), found.start) == ([0, 1, 2, 3], [0, 1, 2, 3], 0)
    found = Attended.of(torch.ones(3, 4, dtype=torch.bool))
    assert (found.rows.tolist(), found.spread.tolist(), found.start) == ([0], [0, 0, 0], 3)
