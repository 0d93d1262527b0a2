"""Refined circuits: faithful, small, certified, the same again from the same seed, and never over the budget."""

import json
import signal
import subprocess
import sys
from collections import Counter

import handmade
import handmade_components
import pytest
import torch
from conftest import STORIES
from handmade import COPY_CIRCUIT, COPY_PROMPT, INDUCTION_CIRCUIT, INDUCTION_PROMPT
from handmade_components import INDUCTION_TASK
from test_left_as_it_was import state
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

import tracedensity as td
from tracedensity import ground
from tracedensity.gauge import Gauge
from tracedensity.graph import flatten
from tracedensity.ground import Ground
from tracedensity.model import as_transformer
from tracedensity.run import Conditions
from tracedensity.search import GRADIENT_PASSES, Search, SpentError
from tracedensity.setting import token_setting

pytestmark = [
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated"),
    pytest.mark.usefixtures("unexamined"),
]

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SLACK = 1e-6

WAYS = [
    pytest.param({}, id="strict"),
    pytest.param({"keep_residual": True}, id="skips kept"),
    pytest.param({"attention": "open"}, id="attention open"),
    pytest.param({"metric": "kl"}, id="kl"),
    pytest.param({"metric": "top1"}, id="top1"),
    pytest.param({"ablation": "mean"}, id="mean"),
    pytest.param({"ablation": "resample"}, id="resample"),
]


def whole(model, prompt, **options):
    """The circuit of all edges."""
    ranking = td.attribute(model, prompt, method="random", **options).rank()
    return ranking.circuit(ranking.n_edges)


def counted(monkeypatch) -> Counter:
    """What is run from now on by searches, in circuits."""
    count: Counter = Counter()
    run_masks, run_shares = ground.run_masks, ground.run_shares

    def masks(setting, graph, kept, *rest):
        count["runs"] += len(next(iter(kept.values()))) * len(setting.prompts)
        return run_masks(setting, graph, kept, *rest)

    def shares(setting, graph, kept, *rest):
        count["gradients"] += len(next(iter(kept.values()))) * len(setting.prompts)
        return run_shares(setting, graph, kept, *rest)

    monkeypatch.setattr(ground, "run_masks", masks)
    monkeypatch.setattr(ground, "run_shares", shares)
    return count


# -- what is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "prompt", "expected"),
    [
        pytest.param(handmade.induction_model, INDUCTION_PROMPT, INDUCTION_CIRCUIT, id="induction"),
        pytest.param(lambda: handmade.copy_model(0.0), COPY_PROMPT, COPY_CIRCUIT, id="copy"),
        pytest.param(lambda: handmade.copy_model(0.2), COPY_PROMPT, COPY_CIRCUIT, id="copy, noisy MLP"),
    ],
)
@pytest.mark.parametrize("start", ["ranking", "circuit"])
def test_the_known_circuit_is_found_edge_by_edge(make, prompt, expected, start):
    model = make()
    ranking = td.attribute(model, prompt, method="random").rank()
    circuit = td.refine(model, prompt, ranking if start == "ranking" else ranking.circuit(ranking.n_edges))
    assert frozenset(circuit.edge_names()) == expected
    assert circuit.certificate is not None and circuit.certificate.one_minimal


def test_the_known_circuit_of_a_task_is_found_on_the_component_graph():
    model = handmade_components.induction_model()
    ranking = td.attribute(model, INDUCTION_TASK, graph="component", method="random").rank()
    circuit = td.refine(model, INDUCTION_TASK, ranking, 0.99)
    assert frozenset(circuit.edge_names()) == handmade_components.INDUCTION_CIRCUIT
    assert circuit.metric == "logit_diff"


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("target", [0.5, 0.9])
def test_a_refined_circuit_is_as_faithful_as_it_says_and_as_asked(tiny_model, options, target):
    ranking = td.attribute(tiny_model, PROMPT).rank()
    circuit = td.refine(tiny_model, PROMPT, ranking, target, budget=150, **options)
    metric = options.get("metric", "tv")
    again = td.evaluate(tiny_model, PROMPT, circuit, metrics=metric)
    assert circuit.faithfulness == pytest.approx(float(again.faithfulness()), abs=1e-6)
    assert circuit.faithfulness >= target - SLACK
    assert circuit.metric == metric and circuit.ablation == options.get("ablation", "zero")
    counting = circuit.composition()
    if options.get("keep_residual"):
        assert counting["resid_attn"] == counting["resid_mlp"] == 0
    if options.get("attention") == "open":
        assert counting["head"] == 0


@pytest.mark.parametrize("budget", [20, 60])
def test_no_circuit_is_larger_than_where_the_search_began(tiny_model, budget):
    curve = td.density(tiny_model, PROMPT, baselines=False)
    for target in curve.thresholds:
        start = curve.circuit(faithfulness=target)
        circuit = td.refine(tiny_model, PROMPT, start, target, budget=budget)
        assert circuit.n_edges <= start.n_edges
        assert circuit.certificate is not None and circuit.certificate.start_size == start.n_edges


def test_a_circuit_that_falls_short_is_grown(tiny_model):
    ranking = td.attribute(tiny_model, PROMPT).rank()
    small = ranking.circuit(3)
    circuit = td.refine(tiny_model, PROMPT, small, 0.9, budget=400)
    assert circuit.faithfulness is not None and circuit.faithfulness >= 0.9 - SLACK
    assert circuit.n_edges < ranking.n_edges


def test_everything_is_asked_for_and_everything_is_returned(tiny_gpt2):
    circuit = td.refine(tiny_gpt2, PROMPT, td.attribute(tiny_gpt2, PROMPT).rank(), 1.0, budget=60)
    assert circuit.faithfulness == pytest.approx(1, abs=1e-5)


def test_a_task_is_refined_by_its_own_metric(tiny_llama):
    task = td.Task(clean=[[1, 2, 3], [4, 5, 6]], corrupted=[[1, 7, 3], [4, 8, 6]], answer=[9, 10], distractor=[11, 12])
    ranking = td.attribute(tiny_llama, task, graph="component").rank()
    for options in ({}, {"metric": "kl"}, {"ablation": "mean"}):
        circuit = td.refine(tiny_llama, task, ranking, 0.8, budget=150, **options)
        again = td.evaluate(tiny_llama, task, circuit, metrics=circuit.metric)
        assert float(again.faithfulness()) == pytest.approx(circuit.faithfulness, abs=1e-5)
        assert circuit.faithfulness >= 0.8 - SLACK
        assert circuit.n_edges < ranking.n_edges


def test_neurons_are_taken_away_one_by_one(tiny_gpt2):
    ranking = td.attribute(tiny_gpt2, PROMPT, method="eap", neurons=True).rank()
    circuit = td.refine(tiny_gpt2, PROMPT, ranking, 0.9, budget=300)
    assert 0 < circuit.composition()["neuron"] < ranking.n_edges
    assert circuit.verify(tiny_gpt2).faithfulness == pytest.approx(circuit.faithfulness, abs=1e-6)


# -- the certificate -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("budget", [16, 37, 150])
def test_no_more_is_spent_than_allowed_and_what_is_spent_is_said(tiny_llama, options, budget, monkeypatch):
    ranking = td.attribute(tiny_llama, PROMPT).rank()
    count = counted(monkeypatch)
    known = td.refine(tiny_llama, PROMPT, ranking, 0.9, budget=budget, **options).certificate
    assert known is not None
    assert count["runs"] + GRADIENT_PASSES * count["gradients"] == known.passes <= budget


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("budget", [60, 250])
def test_edges_that_are_said_to_be_needed_are(tiny_gpt2, options, budget):
    ranking = td.attribute(tiny_gpt2, PROMPT).rank()
    circuit = td.refine(tiny_gpt2, PROMPT, ranking, 0.9, budget=budget, **options)
    known = circuit.certificate
    assert known is not None and known.n_candidates == circuit.n_edges
    kept, needed = flatten(circuit.graph, circuit.kept), flatten(circuit.graph, known.needed)
    assert not (needed & ~kept).any()
    table = td.minimality(tiny_gpt2, circuit)
    fall_short = set(table["edge"][table["faithfulness"] < min(0.9, 1 - SLACK) + SLACK])
    names = {td.Circuit(circuit.graph, known.needed, circuit.provenance).edge_names()[i] for i in range(known.n_needed)}
    assert names <= fall_short
    if budget == 250:
        assert known.one_minimal == (len(fall_short) == circuit.n_edges)


def test_certificates_are_saved(tiny_gpt2, tmp_path):
    circuit = td.refine(tiny_gpt2, PROMPT, td.attribute(tiny_gpt2, PROMPT).rank(), 0.9, budget=100, seed=4)
    circuit.save(tmp_path / "circuit.safetensors")
    loaded = td.load(tmp_path / "circuit.safetensors")
    assert loaded.certificate.to_dict() == circuit.certificate.to_dict()
    assert loaded.certificate.to_dict()["seed"] == 4
    for kind, mask in circuit.certificate.needed.items():
        assert torch.equal(loaded.certificate.needed[kind], mask)
    assert repr(loaded) == repr(circuit)
    assert json.loads(json.dumps(circuit.certificate.to_dict())) == circuit.certificate.to_dict()


def test_other_edges_have_no_certificate(tiny_gpt2):
    circuit = td.refine(tiny_gpt2, PROMPT, td.attribute(tiny_gpt2, PROMPT).rank(), 0.9, budget=60)
    assert (circuit | circuit).certificate is None
    assert circuit.pruned().certificate is None
    assert circuit.verify(tiny_gpt2).certificate is circuit.certificate


def test_a_circuit_is_verified_by_another_process(stories, tmp_path):
    prompt = "Once upon a time, there was"
    circuit = td.refine(stories, prompt, td.attribute(stories, prompt).rank(), 0.9, budget=200)
    circuit.save(tmp_path / "circuit.safetensors")
    program = (
        "import sys, torch, tracedensity as td; torch.set_num_threads(1);"
        "circuit = td.load(sys.argv[1]);"
        "print(circuit.verify(td.load_model(sys.argv[2], device='cpu')).faithfulness)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "circuit.safetensors"), str(STORIES)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) == pytest.approx(circuit.faithfulness, abs=1e-5)


@pytest.mark.parametrize("options", WAYS)
def test_the_same_seed_gives_the_same_circuit(tiny_llama, options):
    ranking = td.attribute(tiny_llama, PROMPT).rank()
    one, other = (td.refine(tiny_llama, PROMPT, ranking, 0.9, budget=120, seed=7, **options) for _ in range(2))
    assert one.edge_names() == other.edge_names()
    assert one.faithfulness == other.faithfulness
    assert one.certificate.to_dict() == other.certificate.to_dict()


def test_nothing_is_drawn_from_the_generator_of_the_process(tiny_gpt2):
    ranking = td.attribute(tiny_gpt2, PROMPT).rank()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    td.refine(tiny_gpt2, PROMPT, ranking, 0.9, budget=200)
    assert torch.equal(torch.get_rng_state(), before)


# -- when it goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 5, 12])
def test_an_interrupted_search_returns_the_best_so_far_with_a_warning(tiny_model, after, monkeypatch):
    tried = ground.Ground.tried
    calls = 0

    def interrupted(self, kept):
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt
        return tried(self, kept)

    ranking = td.attribute(tiny_model, PROMPT).rank()
    monkeypatch.setattr(ground.Ground, "tried", interrupted)
    with pytest.warns(UserWarning, match="interrupted after .* passes: this is the best circuit so far"):
        circuit = td.refine(tiny_model, PROMPT, ranking, 0.9)
    assert circuit.certificate is not None and circuit.certificate.interrupted
    assert circuit.faithfulness is not None and circuit.faithfulness >= 0.9 - SLACK
    assert "interrupted" in repr(circuit)
    assert not any(point.fwd_hooks for point in tiny_model.hook_dict.values())
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())


def test_an_error_in_a_search_leaves_the_model_as_it_was(tiny_model, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of memory")

    ranking = td.attribute(tiny_model, PROMPT).rank()
    monkeypatch.setattr(ground.Ground, "slopes", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        td.refine(tiny_model, PROMPT, ranking, 0.9)
    assert not any(point.fwd_hooks for point in tiny_model.hook_dict.values())


def test_searches_work_in_inference_mode(tiny_gpt2):
    ranking = td.attribute(tiny_gpt2, PROMPT).rank()
    outside = td.refine(tiny_gpt2, PROMPT, ranking, 0.9, budget=100)
    with torch.inference_mode():
        inside = td.refine(tiny_gpt2, PROMPT, ranking, 0.9, budget=100)
    assert inside.edge_names() == outside.edge_names()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        pytest.param({"faithfulness": 0}, "`faithfulness` must be above 0 and at most 1, got 0", id="target"),
        pytest.param(
            {"faithfulness": 1.5}, "`faithfulness` must be above 0 and at most 1, got 1.5", id="more than all"
        ),
        pytest.param({"budget": 1}, "`budget` must be at least 2 passes, to measure two circuits, got 1", id="budget"),
        pytest.param({"seed": -1}, r"`seed` must be from 0 to 2\*\*63 - 1, got -1", id="seed"),
        pytest.param({"metric": "taste"}, "`metric` must be one of", id="metric"),
        pytest.param({"ablation": "counterfactual"}, "`ablation` must be one of .* on the token graph", id="ablation"),
        pytest.param({"attention": "shut"}, "`attention` must be one of", id="attention"),
    ],
)
def test_bad_arguments_get_one_sentence(tiny_gpt2, unchecked, options, sentence):
    ranking = td.attribute(tiny_gpt2, PROMPT).rank()
    with pytest.raises(ValueError, match=sentence):
        td.refine(tiny_gpt2, PROMPT, ranking, **options)


def test_scores_and_other_prompts_are_refused(tiny_gpt2, unchecked):
    scores = td.attribute(tiny_gpt2, PROMPT)
    with pytest.raises(ValueError, match="`circuit_or_ranking` must be a circuit or a ranking, got Scores"):
        td.refine(tiny_gpt2, PROMPT, scores)
    with pytest.raises(ValueError, match="must belong to this model and prompt"):
        td.refine(tiny_gpt2, PROMPT[:-1], scores.rank())


# -- what is said of what was found ----------------------------------------------------------------


def test_a_circuit_refined_on_another_prompt_is_one_of_that_prompt(tiny_gpt2):
    start = td.attribute(tiny_gpt2, [3, 1, 4, 1, 5]).rank()
    found = td.refine(tiny_gpt2, [9, 2, 6, 5, 3], start, 0.7, budget=60)
    assert found.provenance.token_ids == (9, 2, 6, 5, 3)
    again = found.verify(tiny_gpt2)
    assert again.faithfulness == pytest.approx(found.faithfulness, abs=1e-5)


def test_a_circuit_refined_on_another_model_is_one_of_that_model(tiny_gpt2, tiny_llama):
    start = td.attribute(tiny_gpt2, [3, 1, 4, 1, 5]).rank()
    assert td.TokenGraph.of(as_transformer(tiny_llama), 5) == start.graph
    found = td.refine(tiny_llama, [3, 1, 4, 1, 5], start, 0.7, budget=60)
    assert found.verify(tiny_llama).faithfulness == pytest.approx(found.faithfulness, abs=1e-5)


def test_edges_that_are_kept_anyhow_are_counted_nowhere(tiny_gpt2):
    options = {"keep_residual": True, "thresholds": (0.5, 0.9), "baselines": False}
    plain = td.density(tiny_gpt2, [3, 1, 4, 1, 5], **options)
    tight = td.density(tiny_gpt2, [3, 1, 4, 1, 5], method="best", refine=True, budget=30, **options)
    for threshold in (0.5, 0.9):
        of_plain = plain.circuit(faithfulness=threshold).composition()
        n_free = sum(number for kind, number in of_plain.items() if not kind.startswith("resid"))
        found = tight.circuit(faithfulness=threshold)
        assert not any(number for kind, number in found.composition().items() if kind.startswith("resid"))
        assert tight.minimal_size(threshold) == found.n_edges <= tight.published.minimal_size(threshold) <= n_free


def test_what_was_run_once_is_not_paid_for_again(tiny_gpt2):
    setting = token_setting(as_transformer(tiny_gpt2), [3, 1, 4, 1, 5], None, -1, 0)
    graph = td.TokenGraph.of(as_transformer(tiny_gpt2), 5)
    search = Search([Ground(graph, Conditions(), Gauge.of(setting, graph, "tv"))], 0.9, 10, 0)
    some = torch.rand(4, graph.n_edges, generator=torch.Generator().manual_seed(0)) < 0.9
    first = search.tried(some[[0, 1, 0]])
    assert search.passes == 2 and first.faithfulness[0] == first.faithfulness[2]
    again = search.tried(some)
    assert search.passes == 4 and torch.equal(again.faithfulness[:2], first.faithfulness[:2])
    with pytest.raises(SpentError):
        search.tried(torch.rand(9, graph.n_edges) < 0.5)
    assert search.passes == 10
    assert torch.equal(search.tried(some).loss, again.loss) and search.passes == 10


def test_a_budget_that_nothing_spends_is_refused(tiny_gpt2):
    with pytest.raises(ValueError, match="`budget` must be left out without `refine=True`"):
        td.density(tiny_gpt2, [3, 1, 4], budget=100)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("owner", "moment"), [(HookPoint, "add_hook"), (RemovableHandle, "remove")])
def test_ctrl_c_waits_until_hooks_are_off_again(owner, moment, tiny_gpt2, monkeypatch):
    start = td.attribute(tiny_gpt2, [3, 1, 4, 1, 5]).rank().circuit(40)
    before, function, calls = state(tiny_gpt2), getattr(owner, moment), Counter()

    def struck(*arguments, **options):
        calls[moment] += 1
        if calls[moment] == 100:
            signal.raise_signal(signal.SIGINT)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, moment, struck)
    with pytest.warns(UserWarning, match="interrupted after"):
        found = td.refine(tiny_gpt2, [3, 1, 4, 1, 5], start, 0.9, budget=2000)
    assert found.certificate is not None and found.certificate.interrupted
    assert calls[moment] > 100 and state(tiny_gpt2) == before
