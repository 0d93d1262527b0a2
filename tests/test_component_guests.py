"""The user's model, hooks and mistakes on the component graph: what is left as it was, and what is refused."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from component_cases import (
    EQUAL,
    GRADIENTS,
    METHODS,
    PROMPT,
    UNEQUAL,
    assert_close,
    attributed,
    by_name,
    model_of,
    options_of,
    same,
    truth,
)
from test_left_as_it_was import state
from torch import Tensor

import tracedensity as td
from benchmarks.lens import HAS_HOOKED, HookedTransformer, parameters_of
from tracedensity.model import as_transformer

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


# -- left as it was ----------------------------------------------------------------------------------


def everything(model: HookedTransformer) -> dict[str, Any]:
    """All that a user could notice."""
    modules = dict(model.named_modules())
    return {
        **state(model),
        "repeats": [getattr(block.attn, "repeat_kv_heads", None) for block in model.blocks],
        "hooks of modules": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in modules.items()
        },
    }


WORK: dict[str, Callable[..., object]] = {
    "eap": partial(td.attribute, graph="component", method="eap"),
    "eap-ig ungrouped": partial(td.attribute, graph="component", ungroup=True),
    "activations": partial(td.attribute, graph="component", method="eap-ig-activations", steps=1),
    "relp": partial(td.attribute, graph="component", method="relp"),
    "density": partial(td.density, graph="component", ungroup=True, ablation="mean"),
}


@pytest.fixture(scope="module")
def fresh_llama() -> HookedTransformer:
    model = copy.deepcopy(model_of("llama"))
    next(iter(model.parameters())).requires_grad_(False)
    model(torch.tensor([PROMPT]))  # in whose first run a bridge sets hooks of its own
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("work", WORK)
def test_nothing_changes(work: str, training: bool, fresh_llama: HookedTransformer):
    fresh_llama.train(training)
    before = everything(fresh_llama)
    WORK[work](fresh_llama, UNEQUAL[:2])
    assert everything(fresh_llama) == before
    fresh_llama.eval()


def test_gradients_of_the_user_are_left_alone(fresh_llama: HookedTransformer):
    model = copy.deepcopy(fresh_llama)
    model(torch.tensor([PROMPT])).sum().backward()
    before = {name: None if each.grad is None else each.grad.clone() for name, each in model.named_parameters()}
    for work in WORK.values():
        work(model, UNEQUAL[:1])
    for name, each in model.named_parameters():
        assert (each.grad is None) == (before[name] is None)
        assert each.grad is None or (each.grad == before[name]).all()


def test_gradients_are_turned_on_where_the_user_has_turned_them_off():
    for method in ("eap", "eap-ig", "relp"):
        with torch.no_grad():
            scores = attributed("gpt2", method, UNEQUAL)
            assert not torch.is_grad_enabled()
        same(scores, attributed("gpt2", method, UNEQUAL))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("work", WORK)
def test_no_change_survives_an_error_in_a_metric(work: str, error: type[BaseException], fresh_llama: HookedTransformer):
    calls = {"left": 0}

    def failing(logits: Tensor, examples: Any) -> Tensor:
        if calls["left"] == 0:
            raise error("in the metric")
        calls["left"] -= 1
        return logits[:, 0]

    before = everything(fresh_llama)
    for n_calls in (0, 1, 3):
        calls["left"] = n_calls
        try:
            WORK[work](fresh_llama, UNEQUAL[:2], metric=failing)
        except error:
            pass
        else:
            assert n_calls > 0
        assert everything(fresh_llama) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("work", WORK)
def test_no_change_survives_an_error_in_the_model(work: str, error: type[BaseException], fresh_llama, monkeypatch):
    block = fresh_llama.blocks[1].mlp
    forward, calls = type(block).forward, {"left": 0}

    def failing(self, *arguments, **options):
        if self is block:
            if calls["left"] == 0:
                raise error("in the middle")
            calls["left"] -= 1
        return forward(self, *arguments, **options)

    before = everything(fresh_llama)
    monkeypatch.setattr(type(block), "forward", failing)
    for n_passes in (0, 1, 2, 4):
        calls["left"] = n_passes
        with suppress(error):
            WORK[work](fresh_llama, UNEQUAL[:2])
        assert everything(fresh_llama) == before


@pytest.fixture
def steered() -> Iterator[Callable[[str, Callable[[Tensor], Tensor]], HookedTransformer]]:
    """A model with a hook of the user's."""

    def make(hook_point: str, function: Callable[[Tensor], Tensor]) -> HookedTransformer:
        model = copy.deepcopy(model_of("gpt2", torch.float64))
        model.add_hook(hook_point, lambda value, hook: function(value))
        return model

    return make


@pytest.mark.parametrize(
    "hook_point",
    [
        "hook_embed",
        "hook_pos_embed",
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_attn_out",
        "blocks.0.hook_resid_mid",
        "blocks.0.hook_mlp_out",
        "blocks.0.mlp.hook_pre",
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_resid_post",
        "blocks.1.attn.hook_z",
        "blocks.1.attn.hook_q",
        "blocks.1.attn.hook_v",
    ],
)
def test_what_hooks_of_the_user_add_stays_in_every_circuit(hook_point: str, steered):
    """The model with its hooks is the model that is explained."""
    model = steered(hook_point, lambda value: value + torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype))
    plain = attributed("gpt2", "eap", UNEQUAL)
    scores = td.attribute(model, UNEQUAL, graph="component", method="eap")
    with pytest.raises(AssertionError):
        same(scores, plain, 1e-3)
    with torch.no_grad():
        logits = [
            [model(torch.tensor([ids]))[0, -1] for ids in prompts] for prompts in (UNEQUAL.clean, UNEQUAL.corrupted)
        ]
    found = td.evaluate(model, UNEQUAL, scores.rank(), [scores.graph.n_edges, 0], metrics="logit_diff")
    for row, per_example in enumerate(logits):
        expected = [
            float(each[right] - each[wrong])
            for each, (right,), (wrong,) in zip(per_example, UNEQUAL.answer, UNEQUAL.distractor, strict=True)
        ]
        assert found.per_example["logit_diff"][row].tolist() == pytest.approx(expected, abs=1e-9)
    assert len(model.hook_dict[hook_point].fwd_hooks) == 1


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("layer", [0, 1])
def test_hooks_of_the_user_act_on_what_heads_make_of_their_inputs_in_a_circuit(layer: int, name: str, steered):
    """A hook that multiplies is the model whose weights are multiplied."""
    factors = torch.tensor([0.5, 2.0, -1.5, 0.0], dtype=torch.float64)
    hooked = steered(f"blocks.{layer}.attn.hook_{name}", lambda value: value * factors)
    weighted = copy.deepcopy(model_of("gpt2", torch.float64))
    for kind in "Wb":
        getattr(weighted.blocks[layer].attn, f"{kind}_{name.upper()}").data *= factors
    for method in ("exact", "eap", "eap-ig", "relp", "flow"):
        hook, weight = (
            by_name(td.attribute(model, UNEQUAL, graph="component", method=method)) for model in (hooked, weighted)
        )
        assert_close(hook, weight)


@pytest.mark.parametrize(
    "hook_point", ["ln1.hook_scale", "ln1.hook_normalized", "hook_attn_in", "hook_q_input", "hook_k_input"]
)
def test_hooks_where_circuits_do_not_pass_are_refused(hook_point: str):
    model = copy.deepcopy(model_of("gpt2"))
    model.hook_dict[f"blocks.1.{hook_point}"].add_hook(lambda value, hook: value)
    with pytest.raises(ValueError, match=rf"`model` must have no hook of yours at blocks\.1\.(attn\.)?{hook_point}"):
        td.attribute(model, UNEQUAL, graph="component")
    td.attribute(model, UNEQUAL.clean[0])


@pytest.mark.parametrize("name", ["hook_k", "hook_v", "hook_rot_k"])
def test_hooks_on_what_heads_share_are_refused_where_they_share_nothing(name: str):
    model = copy.deepcopy(model_of("llama"))

    def first_group_only(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, 1:] = 0
        return value

    model.add_hook(f"blocks.1.attn.{name}", first_group_only)
    found = td.density(model, UNEQUAL, graph="component", method="eap", baselines=False)
    assert found.faithfulness[-1] == pytest.approx(1, abs=1e-4)
    with pytest.raises(
        ValueError, match=f"`model` must have no hook of yours at blocks.1.attn.{name} where query heads"
    ):
        td.attribute(model, UNEQUAL, graph="component", ungroup=True)
    if HAS_HOOKED:
        model.set_ungroup_grouped_query_attention(True)
        td.attribute(model, UNEQUAL, graph="component", ungroup=True)


def test_a_token_that_is_zero_by_itself_is_no_cause_for_a_warning():
    model = copy.deepcopy(model_of("llama"))
    model.embed.W_E.data[4] = 0
    for method in ("eap", "eap-qk", "eap-ig", "eap-ig-midpoint", "clean-corrupted"):
        td.attribute(model, UNEQUAL, graph="component", method=method)


def test_hooks_of_the_user_see_every_run(steered):
    seen = []
    model = steered("blocks.0.hook_mlp_out", lambda value: seen.append(len(value)) or value)
    td.density(model, UNEQUAL, graph="component")
    assert len(seen) > 3


def test_a_rounded_model_has_nearly_the_scores_of_the_model():
    for kind in ("gpt2", "llama", *(("parallel",) if HAS_HOOKED else ())):
        rounded = copy.deepcopy(model_of(kind)).to(torch.bfloat16)
        for method in ("eap", "eap-ig", "clean-corrupted", "eap-ig-activations", "relp", "magnitude"):
            options = {**options_of(kind), **METHODS.get(method, {}), "method": method}
            scores = td.attribute(rounded, UNEQUAL, **options)
            assert scores.values["edge"].dtype == torch.float32
            found = by_name(scores)
            expected = (
                by_name(attributed(kind, method, UNEQUAL))
                if method == "relp"
                else truth(kind, method, "counterfactual")
            )
            names = list(expected)
            ranks = [pd.Series([each[name] for name in names]).rank() for each in (found, expected)]
            assert ranks[0].corr(ranks[1]) > 0.93
        found = td.evaluate(rounded, UNEQUAL, scores.rank(), [scores.graph.n_edges], metrics="tv")
        assert found.metrics["tv"].dtype == torch.float32
        assert found.metrics["tv"][0] < 0.02


# -- bad input ---------------------------------------------------------------------------------------


BAD_METRICS: dict[str, tuple[Callable[[Tensor, Any], Any], str]] = {
    "two per row": (
        lambda logits, examples: logits[:, :2],
        r"`metric` must give one number per row, .* got shape \[\d+, 2\]",
    ),
    "one too many": (
        lambda logits, examples: torch.cat([logits[:, 0], logits[:1, 0]]),
        r"`metric` must give one number per row, a tensor \[\d+\], or a scalar, got shape \[\d+\]",
    ),
    "a float": (
        lambda logits, examples: float(logits.detach().sum()),
        r"`metric` must give one number per row, .* got a float",
    ),
    "a list": (
        lambda logits, examples: logits[:, 0].detach().tolist(),
        r"`metric` must give one number per row, .* got a list",
    ),
    "nothing": (lambda logits, examples: None, r"`metric` must give one number per row, .* got a NoneType"),
    "NaN": (
        lambda logits, examples: logits[:, 0] * torch.nan,
        r"`metric` must give finite numbers, got \d+ NaN or infinite for \d+ rows",
    ),
    "infinite": (
        lambda logits, examples: torch.where(torch.arange(len(logits)) == 1, torch.inf, logits[:, 0]),
        r"`metric` must give finite numbers, got \d+ NaN or infinite for \d+ rows",
    ),
}


@pytest.mark.parametrize("bad", BAD_METRICS)
@pytest.mark.usefixtures("unchecked")
def test_a_metric_that_gives_no_number_per_row_is_refused(bad: str):
    metric, sentence = BAD_METRICS[bad]
    ranking = attributed("gpt2", "eap", UNEQUAL).rank()
    model = model_of("gpt2")
    for work in (
        lambda: attributed("gpt2", "eap", UNEQUAL, metric=metric),
        lambda: attributed("gpt2", "exact", UNEQUAL, metric=metric),
        lambda: td.density(model, UNEQUAL, graph="component", metric=metric),
        lambda: td.evaluate(model, UNEQUAL, ranking, [3], metrics=metric),
    ):
        with pytest.raises(ValueError, match=sentence):
            work()


@pytest.mark.parametrize("method", GRADIENTS)
def test_a_metric_without_gradient_is_refused_where_one_is_needed(method: str):
    with pytest.raises(ValueError, match="`metric` must be differentiable"):
        attributed("gpt2", method, UNEQUAL, metric=lambda logits, examples: logits[:, 0].detach())


def test_exact_scores_need_no_gradient():
    expected = attributed("gpt2", "exact", UNEQUAL[:1], metric=lambda logits, examples: logits[:, 0])
    same(attributed("gpt2", "exact", UNEQUAL[:1], metric=lambda logits, examples: logits[:, 0].detach()), expected)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("convert", [torch.Tensor.bool, torch.Tensor.long])
def test_a_metric_of_whole_numbers_or_truth_values_is_taken_where_no_gradient_is_needed(
    convert: Callable[[Tensor], Tensor],
):
    def metric(logits: Tensor, examples: Any) -> Tensor:
        return convert(logits.argmax(-1) == examples.clean_logits.argmax(-1))

    ranking = attributed("gpt2", "eap", UNEQUAL).rank()
    found = td.evaluate(model_of("gpt2"), UNEQUAL, ranking, [3, 46], metrics=[metric, "top1"])
    assert found.metrics["metric"].tolist() == found.metrics["top1"].tolist()
    with pytest.raises(ValueError, match="`metric` must be differentiable"):
        attributed("gpt2", "eap", UNEQUAL, metric=metric)


def test_a_metric_whose_gradient_is_not_finite_is_blamed_for_it():
    with pytest.raises(ValueError, match="`metric` must have a finite gradient"):
        attributed("gpt2", "eap", UNEQUAL, metric=lambda logits, examples: (logits - logits.detach())[:, 0].sqrt())


@pytest.mark.parametrize("method", ["eap", "relp"])
def test_a_divergence_is_flat_where_it_is_none(method: str):
    with pytest.raises(ValueError, match="`metric` must not be 'kl' for method"):
        attributed("gpt2", method, UNEQUAL, metric="kl")


def test_scores_are_there_under_inference_mode_too():
    with torch.inference_mode():
        scores = attributed("gpt2", "eap-ig", UNEQUAL)
        found = td.evaluate(model_of("gpt2", torch.float64), UNEQUAL, scores.rank(), [3])
    same(scores, attributed("gpt2", "eap-ig", UNEQUAL))
    assert found.metrics["tv"].isfinite().all()


def test_a_single_prompt_is_its_own_mean_at_every_token():
    with pytest.raises(ValueError, match="`ablation` must not be 'mean-positional' for a single prompt"):
        attributed("gpt2", "eap", [3, 1, 4], ablation="mean-positional")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("option", "value"), [("steps", 2.5), ("steps", "5"), ("seed", None), ("seed", 0.5)])
def test_numbers_that_are_none_are_refused(option: str, value: object):
    with pytest.raises(ValueError, match=f"`{option}` must be a whole number, got"):
        attributed("gpt2", "eap-ig", UNEQUAL, **{option: value})


@pytest.mark.usefixtures("unchecked")
def test_scores_are_ranked_before_they_are_run():
    with pytest.raises(ValueError, match=r"got Scores. Rank scores first: `scores.rank\(\)`"):
        td.evaluate(model_of("gpt2"), UNEQUAL, attributed("gpt2", "eap", UNEQUAL))  # pyright: ignore


def test_no_size_is_no_circuit():
    found = td.evaluate(model_of("gpt2"), UNEQUAL, attributed("gpt2", "eap", UNEQUAL).rank(), [])
    assert len(found.sizes) == 0 and found.pruned_sizes is not None and len(found.pruned_sizes) == 0


def test_areas_are_those_of_the_benchmarks_shares_whatever_the_graph_rounds_them_to():
    scores = attributed("gpt2", "eap", UNEQUAL)
    found = td.evaluate(model_of("gpt2"), UNEQUAL, scores.rank("top", signed=True))
    shares, height = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0), found.faithfulness().tolist()
    area = sum((shares[i + 1] - shares[i]) * (height[i] + height[i + 1]) / 2 for i in range(9))
    assert found.cpr() == pytest.approx(area, abs=1e-9)
    assert found.cpr(log=True) == pytest.approx(
        sum(math.log10(shares[i + 1] / shares[i]) * (height[i] + height[i + 1]) / 2 for i in range(9)), abs=1e-9
    )
    all_the_same = dataclasses.replace(found, per_example={**found.per_example, "tv": torch.zeros(10, 3)})
    assert all_the_same.cpr("tv") == pytest.approx(0.999)


def test_the_smallest_circuits_of_each_example_are_found_if_they_are_asked_for():
    model = model_of("gpt2", torch.float64)
    curve = td.density(model, UNEQUAL, graph="component", baselines=False, per_example=True)
    every = td.density(model, UNEQUAL, graph="component", baselines=False, sizes=range(46))
    assert len(every.sizes) == 47
    for number in range(3):
        for threshold in curve.thresholds:
            found = curve.minimal_size_per_example(threshold)[number]
            reached = curve.faithfulness_per_example()[:, number] >= threshold - 1e-6
            reached[-1] = True
            first = int(reached.nonzero()[0])
            assert found == curve.sizes[first]
            assert (
                first == 0 or curve.sizes[first] - curve.sizes[first - 1] == 1 or found <= curve.sizes[first - 1] * 1.02
            )
    with pytest.raises(ValueError, match="`per_example` must be left out on the token graph"):
        td.density(model, [1, 2], per_example=True)


def test_circuits_are_measured_by_the_metric_that_their_scores_are_about():
    for metric in ("prob_diff", "logprob", "logit_diff", "kl"):
        assert attributed("gpt2", "eap-ig", UNEQUAL, metric=metric).rank().circuit(3).metric == metric
    assert attributed("gpt2", "flow", UNEQUAL).rank().circuit(3).metric == "logit_diff"


def test_checks_take_the_metric_that_a_circuit_was_measured_by_and_its_own_model_only():
    def metric(logits: Tensor, examples: Any) -> Tensor:
        return logits.gather(1, examples.answer)[:, 0]

    model = model_of("gpt2")
    curve = td.density(model, UNEQUAL, graph="component", metric=metric, baselines=False)
    circuit = curve.circuit(size=6)
    for check in (td.minimality, td.completeness):
        check(model, circuit, metric=metric)
        with pytest.raises(ValueError, match="`metric` must be given, the function 'metric'"):
            check(model, circuit)
        with pytest.raises(ValueError, match="makes another model"):
            check(model_of("llama"), circuit, metric=metric)
    table = td.minimality(model, circuit, metric=metric)
    for edge, faithfulness in zip(table["edge"], table["faithfulness"], strict=True):
        without = dataclasses.replace(circuit, kept={"edge": circuit.kept["edge"].clone()})
        without.kept["edge"][circuit.graph.edge_index(edge)[1]] = False
        assert without.verify(model, metric).faithfulness == pytest.approx(faithfulness, abs=1e-5)


def test_notebooks_show_tables():
    scores = attributed("gpt2", "eap", UNEQUAL)
    assert str(scores.top(1)["edge"][0]).replace("<", "&lt;").replace(">", "&gt;") in scores._repr_html_()
    found = td.evaluate(model_of("gpt2"), UNEQUAL, scores.rank(), [3])
    assert "pruned_size" in found._repr_html_() and "logit_diff" in found._repr_html_()


def test_whole_nodes_have_no_family():
    scores = attributed("gpt2", "eap", UNEQUAL)
    with pytest.raises(ValueError, match="`family` must be left out where whole nodes enter, got 'top'"):
        scores.rank("top", nodes="sum")


def changed(**options: Any) -> td.Task:
    return dataclasses.replace(UNEQUAL, **options)


ATTRIBUTE: list[tuple[str, Callable[[], Any], dict[str, Any], str]] = [
    ("answer", lambda: changed(answer=[4, 11, 7]), {}, "`answer` must hold token ids from 0 to 10, got 11"),
    ("negative answer", lambda: changed(answer=[4, -2, 7]), {}, "`answer` must hold token ids from 0 to 10, got -2"),
    ("distractor", lambda: changed(distractor=[4, 12, 7]), {}, "`distractor` must hold token ids from 0 to 10, got 12"),
    ("words", lambda: changed(answer=["a", "b", "c"]), {}, "`answer` must be token ids: this model has no tokenizer"),
    ("text", lambda: "some text", {}, "`prompt` must be token ids: this model has no tokenizer"),
    ("tokens", lambda: td.Task([[3, 11]]), {}, r"`prompt` must hold token ids from 0 to 10, got \[11\]"),
    ("long", lambda: td.Task([[3] * 9]), {}, "`prompt` must fit the context of custom, 8 tokens, got 9"),
    (
        "metric",
        lambda: UNEQUAL,
        {"metric": "accuracy"},
        r"`metric` must be one of \[.*\] or a function, got 'accuracy'",
    ),
    (
        "method",
        lambda: UNEQUAL,
        {"method": "norm"},
        r"`method` must be one of \['eap', .* on the component graph, got 'norm'",
    ),
    (
        "ablation",
        lambda: UNEQUAL,
        {"ablation": "noise"},
        r"`ablation` must be one of \['counterfactual', .* got 'noise'",
    ),
    ("graph", lambda: UNEQUAL, {"graph": "feature"}, r"`graph` must be one of \['token', 'component'\], got 'feature'"),
    ("position", lambda: UNEQUAL, {"position": 2}, "`position` must be left to the task, which has its own, got 2"),
    ("task position", lambda: changed(position=4), {}, "`position` must be a token of the prompt, from -3 to 2, got 4"),
    (
        "no pair",
        lambda: changed(corrupted=None),
        {"ablation": "counterfactual"},
        "`ablation` must be 'resample', 'zero'",
    ),
    ("token graph", lambda: UNEQUAL, {"graph": "token"}, "`prompt` must be one prompt on the token graph, got a task"),
    (
        "ablation of tokens",
        lambda: PROMPT,
        {"graph": "token", "ablation": "counterfactual"},
        "`ablation` must be one of .* on the token graph",
    ),
    (
        "metric of tokens",
        lambda: PROMPT,
        {"graph": "token", "metric": "kl"},
        "`metric` must be left out for method 'norm'",
    ),
    (
        "neurons of tokens",
        lambda: PROMPT,
        {"graph": "token", "neurons": True},
        "`method` must be one of .* or random for neurons",
    ),
    (
        "exact neurons",
        lambda: UNEQUAL,
        {"method": "exact", "neurons": True},
        "`method` must be a gradient method for neur",
    ),
    (
        "flow neurons",
        lambda: UNEQUAL,
        {"method": "flow", "neurons": True},
        "`method` must be a gradient method for neur",
    ),
    (
        "positions",
        lambda: UNEQUAL,
        {"positions": True},
        "`positions` must be left out for prompts of different lengths, got 3",
    ),
    ("steps", lambda: UNEQUAL, {"steps": 0}, "`steps` must be at least 1, got 0"),
    ("seed", lambda: UNEQUAL, {"seed": -1}, r"`seed` must be from 0 to 2\*\*63 - 1, got -1"),
    (
        "question",
        lambda: changed(distractor=None),
        {"metric": "logit_diff"},
        "`metric` must not be 'logit_diff' for a task w",
    ),
    (
        "no answer",
        lambda: td.Task([[3, 1]]),
        {"metric": "prob_diff"},
        "`metric` must not be 'prob_diff' for a task without",
    ),
    ("vocabulary", lambda: changed(vocabulary="nonsense"), {}, "`task` must be made for the tokenizer of custom"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("task", "options", "sentence"), [case[1:] for case in ATTRIBUTE], ids=[case[0] for case in ATTRIBUTE]
)
def test_bad_input_is_refused_with_a_sentence(task: Callable[[], Any], options: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        td.attribute(model_of("gpt2"), task(), **{"graph": "component", **options})


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(
        ValueError, match="`corrupted` must be as long as `clean`, pair by pair, got 2 tokens for 3 in pair 1"
    ):
        td.Task([[1, 2], [1, 2, 3]], [[3, 4], [1, 2]])
    with pytest.raises(ValueError, match="`corrupted` must hold one prompt for each clean one, got 1 for 2"):
        td.Task([[1, 2], [1, 2, 3]], [[3, 4]])


def test_a_task_of_another_tokenizer_is_refused():
    model = td.load_model("books-gpt2", device="cpu")
    own = as_transformer(model).vocabulary
    td.attribute(model, dataclasses.replace(EQUAL, vocabulary=own), graph="component", method="eap")
    with pytest.raises(
        ValueError, match="`task` must be made for the tokenizer of books-gpt2, got one made for another"
    ):
        td.attribute(model, dataclasses.replace(EQUAL, vocabulary="nonsense"), graph="component")
    with pytest.raises(ValueError, match=r"`corrupted` must be as long as `clean`, .* in pair 0 \('A dog'\)"):
        td.attribute(model, td.Task("A dog", "A dog and a cat"), graph="component")


EVALUATE: list[tuple[str, dict[str, Any], str]] = [
    ("sizes", {"sizes": [3, 47]}, r"`sizes` must be from 0 to 46, the edges of the graph, got \[47\]"),
    ("negative", {"sizes": [-1]}, r"`sizes` must be from 0 to 46, the edges of the graph, got \[-1\]"),
    ("shares", {"sizes": [0.5]}, "`sizes` must be a list of whole numbers of edges"),
    ("metrics", {"metrics": ["tv", "accuracy"]}, r"`metrics` must be some of .* or functions, got \['accuracy'\]"),
    ("no metrics", {"metrics": []}, "`metrics` must be some of .* got none"),
    ("residual", {"keep_residual": True}, "`keep_residual` and `attention` must be left out but on the token graph"),
    ("attention", {"attention": "open"}, "`keep_residual` and `attention` must be left out but on the token graph"),
    ("position", {"position": 1}, "`position` must be left to the task, which has its own, got 1"),
    ("ablation", {"ablation": "noise"}, "`ablation` must be one of .* got 'noise'"),
    ("batch size", {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ("target", {"target": 11}, "`target` must be a token id from 0 to 10, got 11"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "sentence"), [case[1:] for case in EVALUATE], ids=[case[0] for case in EVALUATE])
def test_bad_ways_to_run_are_refused_with_a_sentence(options: dict[str, Any], sentence: str):
    ranking = attributed("gpt2", "eap", UNEQUAL).rank()
    with pytest.raises(ValueError, match=sentence):
        td.evaluate(model_of("gpt2"), UNEQUAL, ranking, **{"sizes": [3], **options})


def test_circuits_that_cannot_be_run_are_refused():
    model = model_of("gpt2")
    neurons = attributed("gpt2", "eap", UNEQUAL, neurons=True)
    for circuit in (neurons.rank(), neurons.rank().circuit(5)):
        with pytest.raises(ValueError, match="`graph` must have whole MLPs as writers to be run, got one of neurons"):
            td.evaluate(model, UNEQUAL, circuit)
    with pytest.raises(ValueError, match="`ranking_or_circuit` must belong to this model and prompt"):
        td.evaluate(model, UNEQUAL, attributed("llama", "eap", UNEQUAL).rank())
    positions = attributed("gpt2", "eap", EQUAL, positions=True, ablation="zero").rank()
    with pytest.raises(ValueError, match="`ranking_or_circuit` must belong to this model and prompt"):
        td.evaluate(model, [1, 2, 3], positions)
    with pytest.raises(ValueError, match="`positions` must be left out for prompts of different lengths"):
        td.evaluate(model, UNEQUAL, positions)
    ranking = attributed("gpt2", "eap", UNEQUAL).rank()
    other = dataclasses.replace(ranking.circuit(5), ablation="zero")
    with pytest.raises(ValueError, match="`ranking_or_circuit` must be circuits that are all run the same way"):
        td.evaluate(model, UNEQUAL, [ranking.circuit(5), other])
    with pytest.raises(ValueError, match="`sizes` must be left out for circuits, which have their own"):
        td.evaluate(model, UNEQUAL, ranking.circuit(5), [3])
    with pytest.raises(
        ValueError, match="`ablation` must be 'resample', 'zero', 'mean' or 'mean-positional' for prompts"
    ):
        td.evaluate(model, PROMPT, ranking.circuit(5))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"metric": "accuracy"}, "`metric` must be one of .* got 'accuracy'"),
        ({"thresholds": [1.5]}, "`thresholds` must be faithfulnesses above 0 and at most 1"),
        ({"sizes": [47]}, r"`sizes` must be from 0 to 46, the edges of the graph, got \[47\]"),
        ({"family": "best"}, "`family` must be one of .* got 'best'"),
        ({"family": "nucleus", "signed": True}, "`scores` cannot be negative for the family 'nucleus'"),
        ({"keep_residual": True}, "`keep_residual` and `attention` must be left out but on the token graph"),
        ({"graph": "feature"}, "`graph` must be one of .* got 'feature'"),
    ],
)
def test_bad_densities_are_refused_with_a_sentence(options: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        td.density(model_of("gpt2"), UNEQUAL, **{"graph": "component", **options})


@pytest.mark.parametrize("weight", ["blocks.1.attn.W_Q", "blocks.0.mlp.W_out", "unembed.W_U"])
def test_weights_that_are_not_finite_are_named(weight: str):
    model = copy.deepcopy(model_of("gpt2"))
    with torch.no_grad():
        parameters_of(model)[weight][..., 3] = torch.nan
    where = f"{weight[9:]} of layer {weight[7]}" if weight.startswith("blocks") else weight
    for call in (td.attribute, td.density):
        with pytest.raises(ValueError, match=f"must have finite weights, got NaN or infinite in {where}"):
            call(model, UNEQUAL, graph="component")
