"""Circuits of the token graph whose absent edges carry something, neurons as edges, and what feeds a circuit."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import oracle
import pytest
import torch
from conftest import hooked_only
from hypothesis import given
from hypothesis import strategies as st
from oracle import NOTHING, Ablated, Edge, Oracle, Shape, Vector
from test_left_as_it_was import each_flag
from test_oracle import (
    CONDITIONS,
    KINDS,
    Case,
    assert_close,
    by_edge,
    by_kind,
    cases,
    each_kind,
    each_of,
    few,
    fewer,
    fewest,
    made_up,
    order,
    shapes,
    tied_scores,
)
from torch import Tensor

import tracedensity as td
from benchmarks.lens import HookedTransformer, parameters_of
from tracedensity.choices import TokenAblation
from tracedensity.graph import flatten, unflatten
from tracedensity.graph.token import TokenGraph
from tracedensity.model import as_transformer
from tracedensity.provenance import Provenance
from tracedensity.run import Conditions, run_circuits, run_family
from tracedensity.setting import Setting, token_setting

pytestmark = [
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated"),
    pytest.mark.usefixtures("unexamined"),
]

ABLATIONS = get_args(TokenAblation)
every_ablation = pytest.mark.parametrize("ablation", ABLATIONS)
other_ablations = pytest.mark.parametrize("ablation", [each for each in ABLATIONS if each != "zero"])
WITH_MLP = [kind for kind, options in KINDS.items() if not options.get("attn_only")]
each_kind_with_mlp = each_of(WITH_MLP)
MADE_UP = Provenance("none", "", (), (), "made up")
PROMPT = [3, 1, 4, 1, 5]


def case_of(kind: str, tokens: Sequence[int] = (3, 1, 4, 1), n_heads: int = 4) -> Case:
    """Two layers, and where heads share keys and values, two heads to each."""
    return Case(kind, 2, n_heads, n_heads // 2, tuple(tokens), 0)


def setting_of(model: object, tokens: Sequence[int], ablation: str, seed: int = 0, *, neurons: bool = False) -> Setting:
    return token_setting(as_transformer(model), torch.tensor(tokens), ablation, -1, seed, neurons=neurons)


def drawn_prompts(model: object, tokens: Sequence[int], seed: int = 0) -> list[list[int]]:
    """The prompts on which absent edges get their values under the ablation "resample"."""
    drawn = setting_of(model, tokens, "resample", seed).prompts.corrupted
    assert drawn is not None
    return drawn.tolist()


def ablated(model: object, tokens: Sequence[int], ablation: str, seed: int = 0) -> list[Ablated]:
    """What the oracle has absent edges carry: one thing, or one thing on each prompt of drawn tokens."""
    if ablation == "zero":
        return [NOTHING]
    if ablation == "mean":
        return [Oracle(model, tokens).means()]
    return [Oracle(model, drawn).run(everywhere=True) for drawn in drawn_prompts(model, tokens, seed)]


def token_by_token(logits: Tensor, part: slice) -> dict[str, Tensor]:
    """What is wanted of circuits: their logits on every example."""
    return {str(token): logits[..., token] for token in range(logits.shape[-1])}


def in_one(logits: dict[str, Tensor]) -> Tensor:
    return torch.stack([logits[str(token)] for token in range(len(logits))], -1)


def random_circuits(graph: TokenGraph, shares: Sequence[float] = (0.3, 0.8), **options: Any) -> list[td.Circuit]:
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(graph.n_edges, generator=generator) < share for share in shares]
    return [td.Circuit(graph, unflatten(graph, mask, False), MADE_UP, **options) for mask in masks]


def edges_of(circuit: td.Circuit) -> list[Edge]:
    return [edge for edge, is_kept in by_edge(circuit.graph, circuit.kept).items() if is_kept]


def logits_of(model: object, tokens: Sequence[int], circuits: list[td.Circuit], ablation: str) -> Tensor:
    """Logits ``[circuit, example, d_vocab]``."""
    graph = circuits[0].graph
    assert isinstance(graph, TokenGraph)
    setting = setting_of(model, tokens, ablation, neurons=graph.d_mlp is not None)
    return in_one(run_circuits(setting, circuits, Conditions(), token_by_token))


# -- circuits ----------------------------------------------------------------------------------------


def assert_run_as_described(case: Case, ablation: str, neurons: bool, conditions: Sequence[Conditions]) -> None:
    """Edges in random order, and random sets of edges."""
    model = case.model()
    truth = Oracle(model, case.tokens, neurons=neurons)
    setting = setting_of(model, case.tokens, ablation, neurons=neurons)
    instead = ablated(model, case.tokens, ablation)
    graph = TokenGraph(*truth.shape)
    shuffled = torch.randperm(graph.n_edges, generator=torch.Generator().manual_seed(case.seed)).int()
    rank = unflatten(graph, shuffled, -1)
    place = by_edge(graph, rank)
    sizes = [0, graph.n_edges // 2, graph.n_edges - 1]
    family = [[edge for edge in place if place[edge] < size] for size in sizes]
    circuits = random_circuits(graph)
    sets = [*family, *map(edges_of, circuits)]
    for each in conditions:
        options = {name: value for name, value in vars(each).items() if name != "ablation"}
        each = replace(each, ablation=ablation)
        found = [
            run_family(setting, graph, rank, torch.tensor(sizes), each, token_by_token),
            run_circuits(setting, circuits, each, token_by_token),
        ]
        expected = [[truth.circuit(edges, ablated=draw, **options) for draw in instead] for edges in sets]
        assert_close(torch.cat([in_one(logits) for logits in found]), expected)


@other_ablations
@each_kind
def test_circuits_predict_what_the_oracle_says(kind, ablation):
    conditions = CONDITIONS if ablation == "mean" else [CONDITIONS[0], CONDITIONS[-1]]
    assert_run_as_described(case_of(kind, [3, 1, 4]), ablation, False, conditions)


@every_ablation
@each_kind_with_mlp
def test_circuits_of_neurons_predict_what_the_oracle_says(kind, ablation):
    assert_run_as_described(case_of(kind, [3, 1, 4], 2), ablation, True, [Conditions()])


@fewer
@given(case=cases(max_pos=4), ablation=st.sampled_from(ABLATIONS), neurons=st.booleans())
def test_circuits_of_any_shape_predict_what_the_oracle_says(case, ablation, neurons):
    assert_run_as_described(case, ablation, neurons and case.shape.has_mlp, [Conditions()])


@other_ablations
@pytest.mark.parametrize("neurons", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "grouped"])
def test_circuits_in_single_precision_predict_nearly_what_those_in_double_do(kind, neurons, ablation):
    case = case_of(kind)
    graph = TokenGraph(*Oracle(case.model(), case.tokens, neurons=neurons).shape)
    circuits = random_circuits(graph)
    single = logits_of(case.model(torch.float32), case.tokens, circuits, ablation)
    assert single.dtype == torch.float32
    assert_close(single, logits_of(case.model(), case.tokens, circuits, ablation), 1e-5)


@every_ablation
@pytest.mark.parametrize("neurons", [False, True])
@each_kind_with_mlp
def test_all_edges_together_are_the_model(kind, neurons, ablation):
    case = case_of(kind)
    model = case.model()
    graph = TokenGraph.of(as_transformer(model), len(case.tokens), neurons=neurons)
    (whole,) = logits_of(model, case.tokens, [td.Circuit(graph, graph.exists, MADE_UP)], ablation)
    expected = model(torch.tensor([case.tokens]))[0, -1].detach()
    assert_close(whole, expected.expand(len(whole), -1))


@pytest.mark.parametrize("neurons", [False, True])
def test_with_means_for_edges_the_prediction_is_that_of_the_mean_state(tiny_model, neurons):
    """The two edges into the output carry the means of what they carry, which the model's own hooks show."""
    graph = TokenGraph.of(as_transformer(tiny_model), len(PROMPT), neurons=neurons)
    (empty,) = logits_of(tiny_model, PROMPT, random_circuits(graph, [0.0]), "mean")[0]
    _, cache = tiny_model.run_with_cache(torch.tensor([PROMPT]))
    state = cache["blocks.1.hook_resid_mid"].mean(1) + cache["blocks.1.hook_mlp_out"].mean(1)
    expected = tiny_model.unembed(tiny_model.ln_final(state[:, None]))[0, 0].detach()
    assert_close(empty, expected, 1e-5)


@pytest.mark.parametrize("neurons", [False, True])
def test_with_other_tokens_for_edges_the_prediction_is_the_models_on_these_tokens(tiny_model, neurons):
    graph = TokenGraph.of(as_transformer(tiny_model), len(PROMPT), neurons=neurons)
    (empty,) = logits_of(tiny_model, PROMPT, random_circuits(graph, [0.0]), "resample")
    expected = tiny_model(torch.tensor(drawn_prompts(tiny_model, PROMPT)))[:, -1].detach()
    assert_close(empty, expected, 1e-5)


def test_an_absent_head_attends_to_the_mean_token_as_it_does_in_the_circuit(tiny_gpt2):
    """Where all heads of a layer are absent, each brings its mean value: what it attends to makes no difference."""
    graph = TokenGraph(2, 4, len(PROMPT))
    kept = {kind: exists.clone() for kind, exists in graph.exists.items()}
    kept["head"][1] = False
    (logits,) = logits_of(tiny_gpt2, PROMPT, [td.Circuit(graph, kept, MADE_UP)], "mean")[0]
    mean_value = [("blocks.1.attn.hook_v", lambda value, hook: value.mean(1, keepdim=True).expand_as(value))]
    expected = tiny_gpt2.run_with_hooks(torch.tensor([PROMPT]), fwd_hooks=mean_value)[0, -1].detach()
    assert_close(logits, expected, 1e-5)


@other_ablations
def test_how_many_rows_run_at_once_does_not_matter(tiny_llama, ablation, monkeypatch):
    graph = TokenGraph(2, 4, len(PROMPT))
    circuits = random_circuits(graph, [0.0, 0.5, 1.0])
    usual = logits_of(tiny_llama, PROMPT, circuits, ablation)
    for n_rows in (1, 3, 20):
        monkeypatch.setattr("tracedensity.setting._as_many", lambda model, size, n_rows=n_rows: n_rows)
        assert_close(logits_of(tiny_llama, PROMPT, circuits, ablation), usual, 1e-6)


@other_ablations
@each_flag
def test_flags_of_the_user_change_no_circuit(build, flag, ablation):
    model = build("llama3")
    circuits = random_circuits(TokenGraph(3, 4, len(PROMPT)))
    plain = logits_of(model, PROMPT, circuits, ablation)
    getattr(model, f"set_{flag}")(True)
    assert_close(logits_of(model, PROMPT, circuits, ablation), plain, 1e-5)


# -- what users call ---------------------------------------------------------------------------------


def mean_metrics(full: Vector, draws: list[Vector]) -> tuple[float, float]:
    measures = (oracle.total_variation, oracle.kl_divergence)
    tv, kl = ([measure(full, logits) for logits in draws] for measure in measures)
    return float(np.mean(tv)), float(np.mean(kl))


@every_ablation
@fewest
@given(case=cases(max_pos=4), neurons=st.booleans())
def test_metrics_are_means_over_draws_of_the_oracles(case, ablation, neurons):
    model, neurons = case.model(), neurons and case.shape.has_mlp
    truth, instead = Oracle(model, case.tokens, neurons=neurons), ablated(model, case.tokens, ablation)
    full, ranking = truth.run().logits, td.attribute(model, case.tokens, method="random", neurons=neurons).rank()
    sizes = [0, ranking.n_edges // 2, ranking.n_edges]
    measured = td.evaluate(model, case.tokens, ranking, sizes, ablation=ablation, metrics=("tv", "kl"))
    entered = order(ranking)
    expected = [mean_metrics(full, [truth.circuit(entered[:size], ablated=draw) for draw in instead]) for size in sizes]
    assert_close(measured.metrics["tv"], [tv for tv, _ in expected])
    assert_close(measured.metrics["kl"], [kl for _, kl in expected])
    assert measured.per_example["tv"].shape == (3, len(instead))


@pytest.mark.parametrize(("ablation", "keep_residual"), [("mean", False), ("resample", True)])
def test_a_density_curve_holds_what_the_oracle_measures(ablation, keep_residual):
    case = case_of("grouped")
    model = case.model()
    truth, instead = Oracle(model, case.tokens), ablated(model, case.tokens, ablation)
    full = truth.run().logits
    curve = td.density(model, case.tokens, ablation=ablation, keep_residual=keep_residual, thresholds=(0.8,))
    entered = order(curve.ranking)

    def faithfulness(size: int, **conditions: Any) -> float:
        return (
            1 - mean_metrics(full, [truth.circuit(entered[:size], ablated=draw, **conditions) for draw in instead])[0]
        )

    expected = [faithfulness(size, keep_residual=keep_residual) for size in curve.sizes.tolist()]
    assert_close(curve.faithfulness, expected)
    assert curve.inverse is not None and curve.random is not None
    assert_close(
        curve.inverse.faithfulness, [faithfulness(size, inverse=True) for size in curve.inverse.sizes.tolist()]
    )
    assert curve.random.faithfulness[-1] == pytest.approx(1)
    assert curve.conditions.ablation == curve.provenance.ablation == curve.to_dict()["ablation"] == ablation


@other_ablations
@pytest.mark.parametrize("method", ["norm", "eap-ig"])
def test_a_saved_circuit_is_run_again_as_it_was_found(tiny_llama, method, ablation, tmp_path):
    curve = td.density(tiny_llama, PROMPT, method=method, ablation=ablation, seed=7, baselines=False)
    circuit = curve.circuit(faithfulness=0.8)
    circuit.save(tmp_path / "circuit.safetensors")
    curve.save(tmp_path / "curve.safetensors")
    alone, loaded_curve = td.load(tmp_path / "circuit.safetensors"), td.load(tmp_path / "curve.safetensors")
    assert isinstance(alone, td.Circuit) and isinstance(loaded_curve, td.DensityCurve)
    for loaded in (alone, loaded_curve.circuit(faithfulness=0.8)):
        assert loaded.ablation == ablation and loaded.provenance == circuit.provenance
        assert all((loaded.kept[kind] == mask).all() for kind, mask in circuit.kept.items())
        assert loaded.verify(tiny_llama).faithfulness == pytest.approx(circuit.faithfulness, abs=1e-6)
    zero = td.evaluate(tiny_llama, PROMPT, circuit, ablation="zero").metrics["tv"]
    assert 1 - float(zero) != pytest.approx(circuit.faithfulness, abs=1e-3)


def test_the_ablation_of_the_scores_is_that_of_their_circuits(tiny_gpt2):
    ranking = td.attribute(tiny_gpt2, PROMPT, method="eap", ablation="mean").rank()
    assert ranking.circuit(20).ablation == "mean"
    usual, asked, other = (
        td.evaluate(tiny_gpt2, PROMPT, ranking, [20], ablation=ablation).metrics["kl"]
        for ablation in (None, "mean", "zero")
    )
    assert usual == asked and usual != other


def test_numbers_come_from_the_seed_alone(tiny_llama):
    ranking = td.attribute(tiny_llama, PROMPT, seed=3).rank()

    def measured(**options: Any) -> Tensor:
        torch.rand(1)  # the generator of torch is elsewhere at every call
        return td.evaluate(tiny_llama, PROMPT, ranking, [0, 30, 60], ablation="resample", **options).metrics["kl"]

    assert (measured(seed=3) == measured()).all()  # by default the seed of the scores
    assert (measured(seed=4) != measured()).all()
    assert drawn_prompts(tiny_llama, PROMPT, 3) == drawn_prompts(tiny_llama, PROMPT, 3)
    assert drawn_prompts(tiny_llama, PROMPT, 4) != drawn_prompts(tiny_llama, PROMPT, 3)


def test_prompts_are_drawn_eight_times_from_the_whole_vocabulary(tiny_gpt2):
    drawn = [row for seed in range(20) for row in drawn_prompts(tiny_gpt2, PROMPT, seed)]
    assert len(drawn) == 20 * 8
    assert {len(row) for row in drawn} == {len(PROMPT)}
    assert {token for row in drawn for token in row} == set(range(20))
    assert all(len({row[pos] for row in drawn}) > 15 for pos in range(len(PROMPT)))


@every_ablation
@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_what_comes_after_the_position_is_not_read(tiny_llama, method, ablation):
    options = {"method": method, "ablation": ablation}
    scores = td.attribute(tiny_llama, [*PROMPT, 9, 2], position=-3, **options)
    alone = td.attribute(tiny_llama, PROMPT, **options)
    assert (flatten(scores.graph, scores.values) == flatten(alone.graph, alone.values)).all()
    measured = td.evaluate(tiny_llama, [*PROMPT, 9, 2], scores.rank(), [20, 40], position=len(PROMPT) - 1)
    assert (measured.metrics["kl"] == td.evaluate(tiny_llama, PROMPT, alone.rank(), [20, 40]).metrics["kl"]).all()


# -- neurons -----------------------------------------------------------------------------------------


neuron_shapes = st.builds(
    Shape, st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.just(True), st.integers(1, 4)
)


@given(shape=neuron_shapes)
@few
def test_edges_are_those_with_a_path_to_the_output(shape):
    graph, expected = TokenGraph(*shape), oracle.all_edges(shape)
    assert set(by_edge(graph, graph.exists)) == set(expected)
    assert graph.n_edges == len(expected)
    assert graph.n_nodes == len(oracle.nodes(shape))
    n_layers, n_heads, n_pos, _, d_mlp = shape
    full = n_heads * n_pos * (n_pos + 1) // 2 + (2 + d_mlp) * n_pos
    assert graph.n_edges == (n_layers - 1) * full + n_heads * n_pos + 2 + d_mlp


@given(shape=neuron_shapes)
@few
def test_canonical_order_is_the_order_of_pushing(shape):
    graph = TokenGraph(*shape)
    numbers = {edge: i for i, edge in enumerate(oracle.all_edges(shape))}
    flat = flatten(graph, by_kind(graph, numbers, torch.long))
    assert flat.tolist() == list(range(graph.n_edges))
    assert (flatten(graph, unflatten(graph, flat, -7)) == flat).all()


@given(shape=neuron_shapes)
@few
def test_names_and_indices_are_inverses(shape):
    graph, edges = TokenGraph(*shape), oracle.all_edges(shape)
    names = [graph.edge_name(*edge) for edge in edges]
    assert len(set(names)) == len(edges)
    assert [graph.edge_index(name) for name in names] == edges


def test_a_neuron_has_the_name_of_its_mlp_number_and_token():
    graph = TokenGraph(2, 3, 4, True, 5)
    assert graph.edge_name("neuron", (0, 3, 4)) == "m0.n4@3"
    assert graph.ends("neuron", (1, 3, 4)) == ("s3@3", "s4@3", "n4")
    assert graph.ends("resid_mlp", (1, 3))[:2] == ("s3@3", "s4@3")


@pytest.mark.parametrize(
    ("d_mlp", "name"),
    [
        pytest.param(5, "m0@1", id="an MLP among neurons"),
        pytest.param(None, "m0.n1@1", id="a neuron among MLPs"),
        pytest.param(5, "m0.n5@1", id="a neuron too many"),
        pytest.param(5, "m1.n0@1", id="no path to the output"),
        pytest.param(5, "m0.h1@1", id="no neuron"),
    ],
)
def test_what_is_no_edge_has_no_index(d_mlp, name):
    with pytest.raises(ValueError, match="`name` must be an edge of this graph"):
        TokenGraph(2, 3, 4, True, d_mlp).edge_index(name)


@given(shape=neuron_shapes, seed=st.integers(0, 2**16))
@few
def test_greedy_growth_takes_neurons_as_the_oracle_does(shape, seed):
    values = tied_scores(shape, seed, lowest=-2)
    assert order(made_up(TokenGraph(*shape), values).rank("greedy")) == oracle.greedy(shape, values)


@fewest
@given(case=cases(kinds=WITH_MLP), family=st.sampled_from(["greedy", "threshold", "nucleus"]))
def test_circuits_of_neurons_hold_together(case, family):
    scores = td.attribute(case.model(), case.tokens, method="eap-ig", steps=2, neurons=True)
    shape = Oracle(case.model(), case.tokens, neurons=True).shape
    assert scores.graph == TokenGraph(*shape)
    reached = {oracle.output(shape)}
    for edge in order(scores.rank(family)):
        assert oracle.target(shape, edge) in reached
        reached.add(oracle.source(shape, edge))


@given(shape=neuron_shapes, seed=st.integers(0, 2**16))
@fewer
def test_edges_of_a_pruned_circuit_are_on_a_path(shape, seed):
    graph = TokenGraph(*shape)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(graph.n_edges, generator=generator) < 0.6
    kept = set(edges_of(td.Circuit(graph, unflatten(graph, mask, False), MADE_UP).pruned()))
    reached = {("pre", 0, pos) for pos in range(shape.n_pos)}
    fed = set()
    for edge in (edge for edge, is_kept in zip(oracle.all_edges(shape), mask.tolist(), strict=True) if is_kept):
        if oracle.source(shape, edge) in reached:
            reached.add(oracle.target(shape, edge))
            fed.add(edge)
    assert kept == oracle.connected(shape, fed)


@pytest.mark.parametrize("method", ["random", "random-connected"])
def test_random_scores_know_neurons(tiny_gpt2, method):
    scores = td.attribute(tiny_gpt2, PROMPT, method=method, neurons=True)
    assert scores.values["neuron"].shape == (2, len(PROMPT), 24)
    shape = Shape(2, 4, len(PROMPT), True, 24)
    drawn = by_edge(scores.graph, scores.values)
    assert len(set(drawn.values())) == scores.graph.n_edges
    if method == "random-connected":
        reached = {oracle.output(shape)}
        for edge in order(scores.rank("top")):
            assert oracle.target(shape, edge) in reached
            reached.add(oracle.source(shape, edge))


def as_neurons(circuit: td.Circuit, d_mlp: int) -> td.Circuit:
    """The same circuit, its MLPs chosen neuron by neuron."""
    assert isinstance(circuit.graph, TokenGraph)
    graph = replace(circuit.graph, d_mlp=d_mlp)
    kept = {kind: mask for kind, mask in circuit.kept.items() if kind != "mlp"}
    kept["neuron"] = circuit.kept["mlp"][..., None].expand(graph.shapes["neuron"]).clone()
    return td.Circuit(graph, kept, circuit.provenance)


def without_output_bias(model: HookedTransformer) -> HookedTransformer:
    with torch.no_grad():
        for name, parameter in parameters_of(model).items():
            if name.endswith("mlp.b_out"):
                parameter.zero_()
    return model


@pytest.mark.parametrize(
    ("kind", "ablation", "bias"),
    [
        *((kind, ablation, False) for kind in ("gpt2", "grouped", "no norm") for ablation in ABLATIONS),
        pytest.param("gemma2", "zero", False, marks=hooked_only),
        pytest.param("gemma2", "resample", False, marks=hooked_only),  # no norm is the mean of norms
        # a mean, or a value on other tokens, has the bias in it
        *((kind, ablation, True) for kind in ("gpt2", "grouped") for ablation in ("mean", "resample")),
        pytest.param("gemma2", "resample", True, marks=hooked_only),
    ],
)
def test_an_mlp_is_all_of_its_neurons(kind, ablation, bias):
    case = case_of(kind)
    model = case.model() if bias else without_output_bias(case.model())
    circuits = random_circuits(case.graph, (0.2, 0.5, 0.8))
    of_mlps = logits_of(model, case.tokens, circuits, ablation)
    of_neurons = logits_of(model, case.tokens, [as_neurons(circuit, 10) for circuit in circuits], ablation)
    assert_close(of_neurons, of_mlps)


def test_the_bias_of_an_mlp_belongs_to_no_neuron(tiny_gpt2):
    """Without any edge, nothing is in the last state if MLPs are edges; if neurons are, the bias of the last MLP."""
    graph = TokenGraph(2, 4, len(PROMPT))
    (nothing,) = random_circuits(graph, [0.0])
    bias = parameters_of(tiny_gpt2)["blocks.1.mlp.b_out"]
    for circuit, state in ((nothing, torch.zeros_like(bias)), (as_neurons(nothing, 24), bias)):
        expected = tiny_gpt2.unembed(tiny_gpt2.ln_final(state[None, None]))[0, 0].detach()
        assert_close(logits_of(tiny_gpt2, PROMPT, [circuit], "zero")[0, 0], expected, 1e-6)


@every_ablation
def test_a_circuit_of_neurons_is_saved_and_run_again(tiny_model, ablation, tmp_path):
    ranking = td.attribute(tiny_model, PROMPT, method="eap-ig", neurons=True, ablation=ablation, seed=2).rank()
    measured = td.evaluate(tiny_model, PROMPT, ranking, [0, 40, ranking.n_edges])
    assert measured.metrics["tv"][-1] < 1e-5 < measured.metrics["tv"][0]
    circuit = ranking.circuit(40)
    circuit.save(tmp_path / "circuit.safetensors")
    loaded = td.load(tmp_path / "circuit.safetensors")
    assert isinstance(loaded, td.Circuit)
    assert loaded.graph == TokenGraph(2, 4, len(PROMPT), True, 24)
    assert loaded.edge_names() == circuit.edge_names() and len(circuit.edge_names()) == 40
    assert loaded.verify(tiny_model).faithfulness == pytest.approx(1 - float(measured.metrics["tv"][1]), abs=1e-6)


def test_circuits_of_mlps_and_of_neurons_are_not_mixed(tiny_gpt2):
    circuit = td.attribute(tiny_gpt2, PROMPT).rank().circuit(30)
    with pytest.raises(ValueError, match="must be a circuit of the same graph"):
        _ = circuit | as_neurons(circuit, 24)
    with pytest.raises(ValueError, match="must belong to this model and prompt"):
        td.evaluate(tiny_gpt2, PROMPT, as_neurons(circuit, 23))


@pytest.fixture
def circuit_of_neurons(tiny_gpt2):
    return td.attribute(tiny_gpt2, PROMPT, method="eap", neurons=True).rank().circuit(60)


def test_circuits_of_neurons_have_the_nodes_of_their_mlps(tiny_gpt2):
    circuit = td.attribute(tiny_gpt2, PROMPT).rank().circuit(30)
    assert set(as_neurons(circuit, 24).nodes()) == set(circuit.nodes())
    assert as_neurons(circuit, 24).to_networkx().number_of_nodes() == circuit.to_networkx().number_of_nodes()


def test_a_circuit_of_neurons_has_a_table(circuit_of_neurons):
    table = circuit_of_neurons.to_dataframe()
    assert list(table["edge"]) == circuit_of_neurons.edge_names()
    assert set(table["kind"]) == set(circuit_of_neurons.kept)


def test_a_circuit_of_neurons_has_a_picture(circuit_of_neurons):
    assert circuit_of_neurons.plot().data


def test_a_model_without_mlps_has_no_neurons():
    case = case_of("attention only")
    with pytest.raises(ValueError, match="which has no MLPs"):
        td.attribute(case.model(), case.tokens, method="eap", neurons=True)


# -- what feeds a circuit ----------------------------------------------------------------------------


def fed_edge_by_edge(shape: Shape, kept: set[Edge]) -> set[Edge]:
    """With the skip connections of the last token, and those of others below a head that reads them."""
    more = set(kept)
    for edge in oracle.all_edges(shape):
        kind, (layer, pos, *_) = edge
        readers = [at for kind, at in kept if kind == "head" and at[0] > layer and at[3] == pos]
        if kind in oracle.RESIDUAL and (readers or pos == shape.n_pos - 1):
            more.add(edge)
    return more


@few
@given(shape=st.one_of(shapes, neuron_shapes), seed=st.integers(0, 2**16), share=st.floats(0, 1))
def test_what_feeds_a_circuit_is_found_edge_by_edge(shape, seed, share):
    graph, edges = TokenGraph(*shape), oracle.all_edges(shape)
    kept = torch.rand(2, 3, graph.n_edges, generator=torch.Generator().manual_seed(seed)) < share
    before = kept.clone()
    fed = graph.fed(kept)
    assert (kept == before).all() and fed.shape == kept.shape
    for mask, more in zip(kept.flatten(0, 1), fed.flatten(0, 1), strict=True):
        assert (graph.fed(mask) == more).all()  # one by one as all together
        chosen = {edge for edge, is_kept in zip(edges, mask.tolist(), strict=True) if is_kept}
        expected = fed_edge_by_edge(shape, chosen)
        assert {edge for edge, is_kept in zip(edges, more.tolist(), strict=True) if is_kept} == expected
        assert (graph.fed(more) == more).all()


@few
@given(shape=st.one_of(shapes, neuron_shapes), seed=st.integers(0, 2**16))
def test_in_a_fed_circuit_every_head_reads_an_embedding(shape, seed):
    graph, edges = TokenGraph(*shape), oracle.all_edges(shape)
    kept = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(seed)) < 0.2
    fed = {edge for edge, is_kept in zip(edges, graph.fed(kept).tolist(), strict=True) if is_kept}
    reached = {("pre", 0, pos) for pos in range(shape.n_pos)}
    for edge in edges:
        if edge in fed and edge[0] in oracle.RESIDUAL and oracle.source(shape, edge) in reached:
            reached.add(oracle.target(shape, edge))
    assert {oracle.source(shape, edge) for edge in fed if edge[0] == "head"} <= reached
    assert oracle.output(shape) in reached
