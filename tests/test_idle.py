"""Heads are run on the rows and queries to which they bring something, and predictions are what they were."""

import pytest
import torch
from conftest import hooked_only

import tracedensity as td
from tracedensity.graph.token import TokenGraph
from tracedensity.model import as_transformer, attended, place
from tracedensity.run import Conditions, run_masks
from tracedensity.setting import token_setting

PROMPT = [3, 1, 4, 1, 5, 9, 2]


@pytest.fixture
def packed(monkeypatch) -> list[tuple[int, int, int]]:
    """Rows that are read and attended, and the first query, of each layer that is run from here on."""
    monkeypatch.setattr(place, "_WORTHWHILE", 0)
    seen = []
    of = place._Packed.of

    def noted(stream, idle):
        found = of(stream, idle)
        seen.append((len(found.read), len(found.widen), found.start))
        return found

    monkeypatch.setattr(place._Packed, "of", noted)
    return seen


def predictions(model, kept, conditions=Conditions()):  # noqa: B008
    """Logits of circuits of the prompt, with what is left out and without."""
    setting = token_setting(as_transformer(model), PROMPT, "zero", -1, 0)
    graph = TokenGraph.of(setting.model, len(PROMPT))

    def run():
        return run_masks(setting, graph, kept(graph), conditions, lambda logits, _: {"": logits[:, 0]})[""]

    found = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "_WORTHWHILE", torch.inf)
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


@pytest.mark.parametrize(
    "conditions", [Conditions(inverse=True), Conditions(keep_residual=True), Conditions(attention="open")], ids=repr
)
def test_in_other_conditions(tiny_model, packed, conditions):
    found, expected = predictions(tiny_model, circuits, conditions)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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
def test_curves_of_prompts_of_several_lengths(tiny_model, packed, monkeypatch):
    prompts = [PROMPT, PROMPT[:4], PROMPT[2:]]
    found = td.density(tiny_model, prompts)
    assert any(start for _, _, start in packed)
    monkeypatch.setattr(place, "_WORTHWHILE", torch.inf)
    for one, other in zip(found, td.density(tiny_model, prompts), strict=True):
        assert one.sizes.tolist() == other.sizes.tolist()
        torch.testing.assert_close(one.faithfulness, other.faithfulness, rtol=0, atol=1e-5)


def test_what_stands_for_rows_and_queries():
    idle = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    rows, start = attended(idle)
    assert (rows.tolist(), start) == ([0, 1, 2], 1)
    rows, start = attended(~idle)
    assert (rows.tolist(), start) == ([0, 1, 2, 3], 0)
    rows, start = attended(torch.ones(3, 4, dtype=torch.bool))
    assert (rows.tolist(), start) == ([0], 3)
