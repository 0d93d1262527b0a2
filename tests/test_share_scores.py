"""Gradient scores of the token graph against differences of the oracle's runs, and what must hold by definition."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import hooked_only, random_model
from oracle import Edge, Oracle, Vector
from test_left_as_it_was import each_flag, flushes, state
from test_oracle import assert_close, by_edge, each_kind, order
from test_token_ablation import ABLATIONS, PROMPT, ablated, case_of, every_ablation, setting_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tracedensity as td
from benchmarks.lens import HookedTransformer
from tracedensity.graph import flatten, unflatten
from tracedensity.run import Conditions, run_shares
from tracedensity.task import Examples

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")

SHORT = [3, 1, 4]
STEPS = {"eap": None, "eap-ig": 2}  # in how many steps the path of a method is taken
every_method = pytest.mark.parametrize("method", STEPS)


# -- metrics, ours of tensors and the oracle's of vectors --------------------------------------------


def log_probability_of(token: int) -> Callable[[Vector], float]:
    return lambda logits: float(np.log(oracle.probabilities(logits)[token]))


def curved(logits: Tensor, examples: Examples) -> Tensor:
    return logits[:, 2].tanh() - logits[:, 5:8].square().sum(-1)


def one_number(logits: Tensor, examples: Examples) -> Tensor:
    return logits[0, 2] * logits[0, 3]


def distance(logits: Tensor, examples: Examples) -> Tensor:
    assert examples.clean_logits is not None
    return (logits - examples.clean_logits).square().mean(-1)


METRICS: dict[str, tuple[dict[str, Any], Callable[[Vector], Callable[[Vector], float]]]] = {
    "most probable": ({"metric": "logprob"}, lambda full: log_probability_of(int(full.argmax()))),
    "target": ({"metric": "logprob", "target": 3}, lambda full: log_probability_of(3)),
    "curved": (
        {"metric": curved},
        lambda full: lambda logits: float(np.tanh(logits[2]) - np.square(logits[5:8]).sum()),
    ),
    "one number": ({"metric": one_number}, lambda full: lambda logits: float(logits[2] * logits[3])),
    "kl": ({"metric": "kl"}, lambda full: lambda logits: oracle.kl_divergence(full, logits)),
    "distance": ({"metric": distance}, lambda full: lambda logits: float(np.square(logits - full).mean())),
}
DEFAULT = {"eap": "most probable", "eap-ig": "kl"}


def expected_scores(
    truth: Oracle, model: object, metric: str, ablation: str, steps: int | None, edges: Iterable[Edge] | None = None
) -> dict[Edge, float]:
    """Effects by differences of runs, where all is kept or in the middles of steps, mean over these."""
    edges = oracle.all_edges(truth.shape) if edges is None else list(edges)
    instead = ablated(model, truth.tokens, ablation)
    measure = METRICS[metric][1](truth.run().logits)
    points = [1.0] if steps is None else [(step + 0.5) / steps for step in range(steps)]
    found = []
    for point in points:
        kept = {edge: 1.0 if edge[0] in oracle.RESIDUAL else point for edge in oracle.all_edges(truth.shape)}
        found.append(truth.effects(measure, edges, kept, instead))
    return {edge: sum(each[edge] for each in found) / len(found) for edge in edges}


def assert_scores(scores: td.Scores, expected: Mapping[Edge, float], tolerance: float = 1e-6) -> None:
    """Equal up to a share of the largest; and of every kind of edge some are not near zero."""
    found = by_edge(scores.graph, scores.values)
    largest = max(map(abs, expected.values()))
    for edge, value in expected.items():
        assert abs(found[edge] - value) <= tolerance * largest, edge
    assert {kind for (kind, _), value in expected.items() if abs(value) > 1e-3 * largest} == set(scores.graph.shapes)
    for kind, exists in scores.exists.items():
        assert (scores.values[kind][~exists] == 0).all()


def flat(scores: td.Scores) -> Tensor:
    return flatten(scores.graph, scores.values)


# -- against the oracle ------------------------------------------------------------------------------


@every_method
@each_kind
def test_scores_are_differences_of_runs(kind, method):
    case = case_of(kind, SHORT)
    model = case.model()
    scores = td.attribute(model, case.tokens, method=method, steps=2)
    assert flat(scores).dtype == torch.float64
    truth = Oracle(model, case.tokens)
    assert_scores(scores, expected_scores(truth, model, DEFAULT[method], "zero", STEPS[method]))


@pytest.mark.parametrize("kind", ["gpt2", "grouped"])
@pytest.mark.parametrize(
    ("method", "metric"),
    [
        *(("eap", metric) for metric in ("most probable", "target", "curved", "one number")),
        *(("eap-ig", metric) for metric in ("target", "one number", "distance")),
    ],
)
def test_scores_are_effects_on_the_metric_that_is_asked_for(kind, method, metric):
    case = case_of(kind, SHORT)
    model = case.model()
    scores = td.attribute(model, case.tokens, method=method, steps=2, **METRICS[metric][0])
    assert_scores(scores, expected_scores(Oracle(model, case.tokens), model, metric, "zero", STEPS[method]))


@every_method
@pytest.mark.parametrize("ablation", ["mean", "resample"])
@pytest.mark.parametrize("kind", ["gpt2", "grouped", "attention only", pytest.param("gemma2", marks=hooked_only)])
def test_scores_are_slopes_towards_what_edges_carry_when_ablated(kind, ablation, method):
    case = case_of(kind, SHORT, 2)
    model = case.model()
    scores = td.attribute(model, case.tokens, method=method, ablation=ablation, steps=2)
    truth = Oracle(model, case.tokens)
    assert_scores(scores, expected_scores(truth, model, DEFAULT[method], ablation, STEPS[method]))


@every_ablation
@pytest.mark.parametrize(
    ("kind", "method"),
    [("gpt2", "eap"), ("grouped", "eap-ig"), pytest.param("gemma2", "eap", marks=hooked_only)],
)
def test_scores_of_neurons_are_differences_of_runs(kind, method, ablation):
    case = case_of(kind, SHORT, 2)
    model = case.model()
    scores = td.attribute(model, case.tokens, method=method, ablation=ablation, steps=2, neurons=True)
    truth = Oracle(model, case.tokens, neurons=True)
    edges = oracle.all_edges(truth.shape)
    if ablation == "resample":  # of the many, each takes eight pairs of runs
        edges = [edge for edge in edges if edge[0] != "neuron" or edge[1][2] % 3 == 0]
    assert_scores(scores, expected_scores(truth, model, DEFAULT[method], ablation, STEPS[method], edges))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_points_of_the_path_are_the_middles_of_its_steps(steps):
    case = case_of("gpt2", SHORT)
    model = case.model()
    scores = td.attribute(model, case.tokens, method="eap-ig", steps=steps)
    truth = Oracle(model, case.tokens)
    edges = oracle.all_edges(truth.shape)[::3]
    found = by_edge(scores.graph, scores.values)
    for edge, value in expected_scores(truth, model, "kl", "zero", steps, edges).items():
        assert found[edge] == pytest.approx(value, rel=1e-5, abs=1e-8)


@every_ablation
@pytest.mark.parametrize(
    "conditions",
    [
        pytest.param(Conditions(), id="as it is"),
        pytest.param(Conditions(keep_residual=True), id="all skip connections"),
        pytest.param(Conditions(attention="open"), id="all attention"),
    ],
)
def test_gradients_at_any_shares_are_differences_of_runs(conditions, ablation, monkeypatch):
    case = case_of("gpt2", SHORT, 2)
    model = case.model()
    truth, instead = Oracle(model, case.tokens), ablated(model, case.tokens, ablation)
    edges = oracle.all_edges(truth.shape)
    # next to nothing, where a norm makes much of little, differences of runs are no slopes
    shares = 0.3 + 0.7 * torch.rand(2, len(edges), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measure = METRICS["curved"][1](truth.run().logits)

    def loss(logits: Tensor, part: slice) -> dict[str, Tensor]:
        value = curved(logits.flatten(0, 1), setting.examples).unflatten(0, logits.shape[:2])
        return {"loss": value, "twice": 2 * value}

    setting = setting_of(model, case.tokens, ablation)
    monkeypatch.setattr("tracedensity.setting._as_many", lambda model, size: 3)  # not all draws at once
    values, slopes = run_shares(setting, case.graph, unflatten(case.graph, shares, 0.0), conditions, loss)
    of_edges = flatten(case.graph, slopes)
    assert (values["twice"] == 2 * values["loss"]).all()
    for number, row in enumerate(shares.tolist()):
        kept = {edge: 1.0 if conditions.keeps_all(edge[0]) else share for edge, share in zip(edges, row, strict=True)}
        losses = [measure(truth.run(kept, each).logits) for each in instead]
        assert float(values["loss"][number]) == pytest.approx(sum(losses) / len(losses), rel=1e-9)
        effects = truth.effects(measure, edges, kept, instead)
        expected = [0.0 if conditions.keeps_all(edge[0]) else -effects[edge] for edge in edges]
        assert_close(of_edges[number], expected, 1e-6)


# -- by definition -----------------------------------------------------------------------------------


@every_ablation
def test_a_score_is_the_effect_of_ablating_the_edge_where_that_is_linear(ablation):
    """Without norms and MLPs, what edges bring to the last state adds up to the logits."""
    model = random_model(attn_only=True, normalization_type=None, dtype=torch.float64)

    def logit(logits: Tensor, examples: Examples) -> Tensor:
        return logits[:, 5]

    scores = td.attribute(model, PROMPT, method="eap", metric=logit, ablation=ablation)
    heads = [("head", (1, head, 4, src)) for head in range(4) for src in range(5)]
    edges = [("resid_attn", (1, 4)), *heads]
    without = []
    for kind, index in edges:
        kept = {each: exists.clone() for each, exists in scores.exists.items()}
        kept[kind][index] = False
        without.append(td.Circuit(scores.graph, kept, scores.provenance, ablation=ablation))
    measured = td.evaluate(model, PROMPT, without, metrics=logit)
    assert_close(
        torch.stack([scores.values[kind][index] for kind, index in edges]),
        measured.metrics["logit"] - measured.full["logit"].mean(),
    )


def whole_effect(truth: Oracle, model: object, metric: str, ablation: str) -> float:
    """What ablating all heads and MLPs, or neurons, does to the metric."""
    full = truth.run().logits
    measure = METRICS[metric][1](full)
    instead = ablated(model, truth.tokens, ablation)
    without = [measure(truth.circuit([], keep_residual=True, ablated=each)) for each in instead]
    return sum(without) / len(without) - measure(full)


SMOOTH: dict[str, dict[str, Any]] = {
    "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN"},
    "llama": {"normalization_type": "RMS", "act_fn": "silu", "gated_mlp": True, "n_key_value_heads": 2},
    # with output biases, as here: without, a norm makes the same of heads at any share of all of them
    "norm after": {"normalization_type": "RMS", "act_fn": "silu", "use_normalization_before_and_after": True},
}


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_scores_of_a_layers_path_add_up_to_the_effect_of_ablating_the_layer(tiny_model, ablation):
    scores = td.attribute(tiny_model, PROMPT, method="eap-ig-layers", ablation=ablation, steps=64)
    for layer in range(2):
        kept = {kind: mask.clone() for kind, mask in scores.exists.items()}
        for kind in ("head", "mlp"):
            kept[kind][layer] = False
        ablated = td.Circuit(scores.graph, kept, scores.provenance, ablation=ablation)
        effect = float(td.evaluate(tiny_model, PROMPT, ablated, metrics="kl").metrics["kl"])
        total = sum(float(scores.values[kind][layer].sum()) for kind in ("head", "mlp"))
        assert total == pytest.approx(effect, rel=1e-3)


def test_the_path_of_an_only_layer_is_the_whole_path():
    model = random_model(n_layers=1, act_fn="gelu_new", normalization_type="LN", dtype=torch.float64)
    whole, layers = (td.attribute(model, PROMPT, method=each, steps=3) for each in ("eap-ig", "eap-ig-layers"))
    for kind, value in whole.values.items():
        torch.testing.assert_close(layers.values[kind], value)


@every_ablation
@pytest.mark.parametrize("neurons", [False, True])
@pytest.mark.parametrize(
    ("kind", "metric"), [("gpt2", "kl"), ("llama", "target"), pytest.param("norm after", "kl", marks=hooked_only)]
)
def test_scores_of_a_path_add_up_to_the_effect_of_ablating_all(kind, metric, neurons, ablation):
    """All heads and MLPs, that is; and the error of the midpoint rule is a quarter for twice as many steps."""
    model = random_model(**SMOOTH[kind], dtype=torch.float64)
    effect = whole_effect(Oracle(model, PROMPT, neurons=neurons), model, metric, ablation)

    def error(steps: int) -> float:
        options = {"steps": steps, "neurons": neurons, "ablation": ablation, **METRICS[metric][0]}
        scores = td.attribute(model, PROMPT, method="eap-ig", **options)
        total = sum(value.sum() for kind, value in scores.values.items() if not kind.startswith("resid"))
        return float(total) - effect

    some, twice = error(32), error(64)
    assert abs(twice) < 0.001 * abs(effect)
    assert some / twice == pytest.approx(4, rel=0.05)


@every_ablation
def test_how_many_rows_run_at_once_does_not_matter(ablation, monkeypatch):
    model = case_of("grouped").model()
    options = {"method": "eap-ig", "neurons": True, "ablation": ablation, "steps": 4}
    usual = flat(td.attribute(model, SHORT, **options))
    n_seen: list[int] = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: n_seen.append(len(value)))]):
        for n_rows in (1, 3, 1000):
            monkeypatch.setattr("tracedensity.setting._as_many", lambda model, size, n_rows=n_rows: n_rows)
            assert_close(flat(td.attribute(model, SHORT, **options)), usual, 1e-12)
            draws = 8 if ablation == "resample" else 1
            # where absent edges have their values from is run at once
            assert n_rows == 1000 or max(n_seen) == max(n_rows, draws)
    assert max(n_seen) == 4 * draws


@every_ablation
@every_method
@pytest.mark.parametrize("kind", ["gpt2", "grouped"])
def test_single_precision_is_near_double(kind, method, ablation):
    case = case_of(kind)
    options: dict[str, Any] = {"method": method, "neurons": kind == "gpt2", "ablation": ablation}
    single, double = (
        flat(td.attribute(case.model(dtype), case.tokens, **options)) for dtype in (torch.float32, torch.float64)
    )
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert (single - double).abs().max() < 1e-4 * double.abs().max()


def test_scores_of_a_model_in_half_precision_are_in_single():
    case = case_of("grouped")
    half, double = (
        flat(td.attribute(case.model(dtype), case.tokens, method="eap")) for dtype in (torch.bfloat16, torch.float64)
    )
    assert half.dtype == torch.float32
    assert torch.corrcoef(torch.stack([half.double(), double]))[0, 1] > 0.99


@every_ablation
def test_scores_come_from_the_seed_alone(tiny_llama, ablation):
    def scored(seed: int) -> Tensor:
        torch.rand(1)  # the generator of torch is elsewhere at every call
        return flat(td.attribute(tiny_llama, PROMPT, method="eap", ablation=ablation, seed=seed))

    first = scored(3)
    assert (scored(3) == first).all()
    assert bool((scored(4) == first).all()) == (ablation != "resample")


def test_scores_say_what_they_are_effects_on(tiny_gpt2):
    for options, metric, helpful in [
        ({"method": "eap"}, "logprob", -1),
        ({"method": "eap-ig"}, "kl", 1),
        ({"method": "eap-ig", "metric": "logprob", "target": 3}, "logprob", -1),
        ({"method": "eap", "metric": curved}, "curved", -1),
    ]:
        scores = td.attribute(tiny_gpt2, PROMPT, **options, ablation="mean")
        assert (scores.provenance.metric, scores.helpful) == (metric, helpful)
        assert (scores.provenance.method, scores.provenance.ablation) == (options["method"], "mean")
        signed = scores.importance(signed=True)["head"]
        assert (signed == helpful * scores.values["head"]).all()
        assert by_edge(scores.graph, scores.importance())[order(scores.rank("top"))[0]] == flat(scores).abs().max()


def test_the_answer_that_nobody_gave_is_what_the_model_predicts(tiny_gpt2):
    top = int(tiny_gpt2(torch.tensor([PROMPT]))[0, -1].argmax())
    usual, asked, other = (
        flat(td.attribute(tiny_gpt2, PROMPT, method="eap", target=target)) for target in (None, top, (top + 1) % 20)
    )
    assert (usual == asked).all() and (usual != other).any()


@each_flag
def test_flags_of_the_user_change_no_score(build, flag):
    model = build("llama3")

    def scored() -> list[Tensor]:
        return [flat(td.attribute(model, PROMPT, method="eap-ig", ablation=each)) for each in ABLATIONS]

    plain = scored()
    getattr(model, f"set_{flag}")(True)
    for with_flag, without in zip(scored(), plain, strict=True):
        assert_close(with_flag, without, 1e-5)


# -- what is refused ---------------------------------------------------------------------------------


def without_gradient(logits: Tensor, examples: Examples) -> Tensor:
    return (logits.argmax(-1) == 3).float()


def of_broken_slope(logits: Tensor, examples: Examples) -> Tensor:
    """Zero, and the gradient of a square root at zero times zero."""
    return (logits[:, 0] - logits[:, 0]).sqrt()


def infinite(logits: Tensor, examples: Examples) -> Tensor:
    return logits[:, 0] / 0


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("flat", {"method": "eap", "metric": "kl"}, "`metric` must not be 'kl' for method 'eap': a divergence"),
    ("distractor", {"method": "eap", "metric": "logit_diff"}, "must not be 'logit_diff' for a task without"),
    ("metric", {"method": "eap", "metric": "tv"}, "`metric` must be one of"),
    ("steps", {"method": "eap-ig", "steps": 0}, "`steps` must be at least 1"),
    ("target", {"method": "eap", "target": 20}, "`target` must hold token ids from 0 to 19, got 20"),
    ("target of none", {"method": "norm", "target": 3}, "`target` must be left out for method 'norm'"),
    ("metric of none", {"method": "random", "metric": curved}, "`metric` must be left out for method 'random'"),
    ("neurons", {"method": "flow", "neurons": True}, "`method` must be one of .* or random for neurons"),
    ("ablation", {"method": "eap", "ablation": "mean-positional"}, "`ablation` must be one of .* on the token graph"),
    ("slope", {"method": "eap", "metric": of_broken_slope}, "NaN or infinite in the gradients at edges of kind"),
    ("slope on the way", {"method": "eap-ig", "metric": of_broken_slope}, "in the gradients at edges of kind"),
    ("infinite", {"method": "eap", "metric": infinite}, "`metric` must give finite numbers"),
]


@pytest.mark.parametrize(("options", "sentence"), [pytest.param(*rest, id=name) for name, *rest in REFUSED])
def test_what_cannot_be_scored_gets_one_sentence(tiny_gpt2, unchecked, options, sentence):
    before = state(tiny_gpt2)
    with pytest.raises(ValueError, match=sentence):
        td.attribute(tiny_gpt2, PROMPT, **options)
    assert state(tiny_gpt2) == before


@every_method
def test_a_metric_without_a_gradient_gets_one_sentence(tiny_gpt2, method):
    with pytest.raises(ValueError, match="`metric` must be differentiable"):
        td.attribute(tiny_gpt2, PROMPT, method=method, metric=without_gradient)


# -- the model, and memory ---------------------------------------------------------------------------


@pytest.fixture
def half_trained(tiny_llama) -> HookedTransformer:
    """In training: one parameter is frozen, and another has gathered a gradient."""
    model = copy.deepcopy(tiny_llama).train()
    frozen, *_, learning = model.parameters()
    frozen.requires_grad_(False)
    learning.grad = torch.ones_like(learning)
    return model


@every_ablation
@every_method
def test_the_model_comes_back_as_it_was(half_trained, method, ablation):
    *_, learning = half_trained.parameters()
    before, flushed, gathered = state(half_trained), flushes(), learning.grad
    for neurons in (False, True):
        td.attribute(half_trained, PROMPT, method=method, ablation=ablation, neurons=neurons)
    assert state(half_trained) == before and flushes() == flushed
    assert learning.grad is gathered and (gathered == 1).all()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@every_method
def test_the_model_comes_back_as_it_was_from_a_metric_that_raises(half_trained, method, error):
    def raising(logits: Tensor, examples: Examples) -> Tensor:
        assert not any(parameter.requires_grad for parameter in half_trained.parameters())
        assert logits.requires_grad
        raise error("in the metric")

    before, flushed = state(half_trained), flushes()
    with pytest.raises(error, match="in the metric"):
        td.attribute(half_trained, PROMPT, method=method, ablation="resample", metric=raising)
    assert state(half_trained) == before and flushes() == flushed


@every_ablation
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_gradients_are_taken_where_the_user_wants_none(tiny_gpt2, mode, ablation):
    options = {"method": "eap-ig", "ablation": ablation, "neurons": True}
    expected = flat(td.attribute(tiny_gpt2, PROMPT, **options))
    with mode():
        scores = td.attribute(tiny_gpt2, torch.tensor(PROMPT), **options)
        measured = td.evaluate(tiny_gpt2, PROMPT, scores.rank(), [30])
    assert (flat(scores) == expected).all()
    assert not scores.values["head"].requires_grad
    assert measured.metrics["tv"][0] == td.evaluate(tiny_gpt2, PROMPT, scores.rank(), [30]).metrics["tv"][0]


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes while this is on."""

    n_numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            # views of one number as many take no memory
            if isinstance(each, Tensor) and each.untyped_storage().nbytes() >= each.nbytes > 0:
                self.n_numbers = max(self.n_numbers, each.numel())
        return made


@every_ablation
@every_method
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_no_tensor_has_two_axes_of_tokens_and_one_of_a_vector(n_kv_heads, method, ablation):
    n_pos, n_heads, d_head, d_model, steps = 32, 4, 16, 64, 2
    model = random_model(
        d_model=d_model, d_head=d_head, act_fn="silu", normalization_type="RMS", n_key_value_heads=n_kv_heads
    )
    prompt = [(7 * i) % 20 for i in range(n_pos)]
    with Largest() as largest:
        scores = td.attribute(model, prompt, method=method, ablation=ablation, steps=steps)
        td.evaluate(model, prompt, scores.rank("top"), [500, 1000])
    n_rows = (steps if method == "eap-ig" else 1) * (8 if ablation == "resample" else 1)
    patterns = n_rows * n_heads * n_pos**2
    assert patterns <= largest.n_numbers < patterns * d_head / 2
