"""Half precision: scores are those of float32 but for its rounding, and nothing is NaN without a word."""

from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, bridged, hugging_face
from torch import Tensor

import tracedensity as td
from benchmarks.lens import HAS_HOOKED
from tracedensity.model import as_transformer

ALLOWED = {torch.bfloat16: 0.02, torch.float16: 0.005}
PROMPTS = (
    "Once upon a time there was a little boy who",
    "She was very happy when she saw the",
)
MODELS = [
    (name, backend)
    for name in ("books-gpt2", "books-llama")
    for backend in (("hooked", "bridge") if HAS_HOOKED else ("bridge",))
]


@cache
def model_of(name: str, backend: str, dtype: torch.dtype) -> Any:
    return td.load_model(name, device="cpu", dtype=dtype, backend=backend)


@cache
def scores_of(name: str, backend: str, dtype: torch.dtype, graph: str, method: str) -> list[Tensor]:
    model = model_of(name, backend, dtype)
    found = []
    for prompt in PROMPTS:
        ids = as_transformer(model).tokens(prompt)
        if graph == "token":
            scores = td.attribute(model, ids, method=method)
        else:
            logits = as_transformer(model_of(name, backend, torch.float32)).logits(ids[None])[0]
            first, *_, fifth = logits.topk(5).indices.tolist()
            other = torch.where(torch.arange(len(ids)) % 3 == 1, (ids + 7) % 400, ids)
            task = td.Task(clean=ids[None], corrupted=other[None], answer=[first], distractor=[fifth])
            scores = td.attribute(model, task, graph="component", method=method)
        assert all(values.dtype == torch.float32 for values in scores.values.values())
        found.append(torch.cat([values.flatten() for values in scores.values.values()]).double())
    return found


def rank_weighted_error(found: Tensor, expected: Tensor) -> float:
    """Differences, the k-th largest number's counting 1/k, over the numbers themselves, counted alike."""
    order = expected.abs().argsort(descending=True)
    weight = 1 / torch.arange(1, len(order) + 1).double()
    return float((weight * (found - expected)[order].abs()).sum() / (weight * expected[order].abs()).sum())


METHODS = [
    *(("token", method) for method in ("norm", "flow", "eap-ig")),
    *(("component", method) for method in ("flow", "eap", "eap-ig", "relp")),
]


@pytest.mark.parametrize(("graph", "method"), METHODS)
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize(("name", "backend"), MODELS)
def test_scores_are_those_of_float32(name, backend, dtype, graph, method):
    found = scores_of(name, backend, dtype, graph, method)
    expected = scores_of(name, backend, torch.float32, graph, method)
    errors = [rank_weighted_error(one, other) for one, other in zip(found, expected, strict=True)]
    assert sum(errors) / len(errors) < ALLOWED[dtype]
    assert dtype != torch.bfloat16 or max(errors) > 1e-6  # it was another precision (the files hold float16)


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize(("name", "backend"), MODELS)
def test_curves_are_those_of_float32(name, backend, dtype):
    found = td.density(model_of(name, backend, dtype), PROMPTS[0], method="norm")
    expected = td.density(model_of(name, backend, torch.float32), PROMPTS[0], method="norm")
    assert (found.faithfulness - expected.faithfulness).abs().mean() < 2 * ALLOWED[dtype]
    assert abs(found.auc - expected.auc) < ALLOWED[dtype]


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_of_every_family_are_computed_in_float32(name, dtype):
    """But for the weights, which are rounded: so are those of the float32 model here."""
    narrow, wide = bridged(name, dtype), bridged(name)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.copy_(parameter.to(dtype))
    if name.startswith("olmo2"):  # the bridge multiplies float32 queries with narrow values
        with pytest.raises(ValueError, match=r"must run by itself, got olmo2.* whose own forward pass fails: expected"):
            td.check_model(narrow)
        return
    assert td.check_model(narrow).ok
    before = {name: parameter.clone() for name, parameter in narrow.named_parameters()}
    for options in ({"graph": "component", "method": "eap"}, {"graph": "component", "method": "flow"}):
        found, expected = (td.attribute(model, [3, 1, 4, 1, 5], **options).values["edge"] for model in (narrow, wide))
        assert found.dtype == torch.float32
        assert rank_weighted_error(found.flatten().double(), expected.flatten().double()) < ALLOWED[dtype]
    assert all(parameter.dtype == dtype for parameter in narrow.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in narrow.named_parameters())


@pytest.mark.parametrize("dtype", ALLOWED)
def test_experts_in_half_precision_become_a_bridge(dtype, tmp_path):
    """`HookedTransformer` has them in float32 whatever is asked for, and cannot run then."""
    hugging_face("mixtral").save_pretrained(tmp_path / "mixtral")
    model = td.load_model(tmp_path / "mixtral", dtype=dtype)
    assert type(model).__name__ == "TransformerBridge"
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
