"""Prompts of different lengths, padded on either side, with or without a first token, are the prompts alone."""

from dataclasses import dataclass

import pytest
import torch

import tracedensity as td
from tracedensity.faithfulness import METRICS

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 2]]
WITH_BOS = [[1, *prompt] for prompt in PROMPTS]
PAD = 0


def padded(prompts, side):
    """Ids and mask ``[batch, pos]``."""
    longest = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        rest = longest - len(prompt)
        ids.append([PAD] * rest + prompt if side == "left" else prompt + [PAD] * rest)
        mask.append([0] * rest + [1] * len(prompt) if side == "left" else [1] * len(prompt) + [0] * rest)
    return torch.tensor(ids), torch.tensor(mask)


def assert_same(one, other):
    torch.testing.assert_close(one.faithfulness, other.faithfulness, rtol=0, atol=1e-5)
    assert one.sizes.tolist() == other.sizes.tolist()
    for threshold in (0.5, 0.9, 0.99):
        assert one.minimal_size(threshold) == other.minimal_size(threshold)
    for kind, rank in one.ranking.rank.items():
        assert torch.equal(rank, other.ranking.rank[kind])


@pytest.mark.parametrize("prompts", [PROMPTS, WITH_BOS], ids=["bare", "with bos"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("method", ["norm", "eap-ig"])
def test_curves_of_the_token_graph_are_those_of_the_prompts_alone(tiny_model, method, side, prompts):
    options = {"method": method, "baselines": False}
    if side == "none":
        found = td.density(tiny_model, prompts, **options)
    else:
        ids, mask = padded(prompts, side)
        found = td.density(tiny_model, ids, attention_mask=mask, **options)
    assert len(found) == len(prompts)
    for curve, prompt in zip(found, prompts, strict=True):
        assert_same(curve, td.density(tiny_model, prompt, **options))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["eap", "flow"])
def test_scores_and_curves_of_the_component_graph_are_means_over_the_prompts_alone(tiny_model, method, side):
    ids, mask = padded(PROMPTS, side)
    together = td.Task(clean=ids, attention_mask=mask, name="")
    options = {"graph": "component", "method": method, "ablation": "zero"}
    alone = [td.attribute(tiny_model, prompt, **options).values["edge"] for prompt in PROMPTS]
    found = td.attribute(tiny_model, together, **options).values["edge"]
    torch.testing.assert_close(found, torch.stack(alone).mean(0), rtol=1e-5, atol=1e-5)
    curves = [
        td.density(tiny_model, subject, baselines=False, **options, **more)
        for subject, more in ((together, {}), (ids, {"attention_mask": mask}), (PROMPTS, {}))
    ]
    assert_same(curves[0], curves[1])
    assert_same(curves[0], curves[2])


def test_whatever_is_measured_is_that_of_the_prompts_alone(tiny_gpt2, monkeypatch):
    def first_logit(logits, examples):
        return logits[:, 0].double() - examples.clean_logits[:, 1]

    @dataclass
    class Chosen:  # has no hash
        token: int

        def __call__(self, logits, examples):
            return logits[:, self.token]

    monkeypatch.setattr("tracedensity.gauge._AT_ONCE", 7 * tiny_gpt2.cfg.d_vocab)
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    also = (*METRICS, first_logit, Chosen(2))
    for curve, prompt in zip(td.density(tiny_gpt2, prompts, also=also), prompts, strict=True):
        alone = td.density(tiny_gpt2, prompt, also=also)
        assert_same(curve, alone)
        assert curve.also.keys() == alone.also.keys() == {*METRICS, "first_logit", "Chosen"}
        for name, values in alone.also.items():
            torch.testing.assert_close(curve.also[name], values, rtol=1e-4, atol=1e-4)
        found = td.evaluate(tiny_gpt2, prompt, curve.ranking, metrics=also, sizes=curve.sizes)
        for name, values in found.metrics.items():
            torch.testing.assert_close(curve.also[name], values, rtol=1e-4, atol=1e-4)


def test_one_padded_prompt_is_one_curve(tiny_gpt2):
    found = td.density(tiny_gpt2, torch.tensor([PAD, 3, 1, 4]), attention_mask=[0, 1, 1, 1], baselines=False)
    assert_same(found, td.density(tiny_gpt2, [3, 1, 4], baselines=False))


def test_the_same_position_of_every_prompt_is_explained(tiny_gpt2):
    found = td.density(tiny_gpt2, PROMPTS, position=1, baselines=False)
    for curve, prompt in zip(found, PROMPTS, strict=True):
        assert_same(curve, td.density(tiny_gpt2, prompt[:2], baselines=False))


@pytest.mark.parametrize(
    ("prompt", "mask", "words"),
    [
        ([[1, 2], [3, 4, 5]], [[1, 1, 0], [1, 1, 1]], "`attention_mask` must come with `prompt` as a tensor"),
        (torch.tensor([[1, 2, 3]]), [[1, 0, 1]], "1 for tokens and 0 for padding at one end of a row"),
        (torch.tensor([[1, 2, 3]]), [[1, 1]], "`attention_mask` must have the shape of `prompt`"),
        (td.Task(clean=[[1, 2]]), [[1, 1]], "must be left to the task, which has one of its own"),
    ],
)
def test_a_mask_that_does_not_fit_gets_one_sentence(tiny_gpt2, prompt, mask, words):
    with pytest.raises(ValueError, match=words):
        td.density(tiny_gpt2, prompt, attention_mask=mask)
