"""Where all circuits can be run: what they are, and how near the estimators come to the smallest."""

from itertools import product

import handmade
import pytest
import torch
from handmade import COPY_CIRCUIT, COPY_PROMPT
from tiny import NORMS, SHAPES, Shape, tiny_model, tiny_prompt

import tracedensity as td
from tracedensity.graph import flatten, unflatten

pytestmark = [
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated"),
    pytest.mark.usefixtures("unexamined"),
]

THRESHOLDS = (0.8, 0.95)


def test_every_circuit_is_run():
    """By a loop over all subsets, one by one."""
    shape = Shape(1, 1, 2, True)  # 5 edges
    model, prompt = tiny_model(shape, "LN", 0), tiny_prompt(shape, 0)
    curve = td.density(model, prompt, method="exhaustive", baselines=False)
    graph = td.TokenGraph(*shape)
    best: dict[int, float] = {}
    for bits in product([False, True], repeat=graph.n_edges):
        kept = unflatten(graph, torch.tensor(bits), False)
        circuit = td.Circuit(graph, kept, curve.provenance)
        reached = float(td.evaluate(model, prompt, circuit, metrics="tv").faithfulness())
        best[sum(bits)] = max(best.get(sum(bits), 0.0), reached)
    for target in torch.linspace(0.01, 0.999, 60).tolist():
        expected = min(size for size, reached in best.items() if reached >= target - 1e-6)
        assert curve.minimal_size(target) == expected


def test_the_known_circuit_is_the_smallest():
    model = handmade.copy_model(0.2)
    curve = td.density(model, COPY_PROMPT, method="exhaustive", baselines=False)
    circuit = curve.circuit(faithfulness=0.9)
    assert frozenset(circuit.edge_names()) == COPY_CIRCUIT
    known = circuit.certificate
    assert known is not None and known.minimum and known.passes == 2**9
    assert "no smaller circuit is that faithful" in repr(circuit)
    assert "nothing is smaller" in repr(curve)


def test_the_smallest_circuit_with_all_skips_kept_has_none_of_them():
    shape = SHAPES[0]
    model, prompt = tiny_model(shape, "RMS", 1), tiny_prompt(shape, 1)
    curve = td.density(model, prompt, method="exhaustive", keep_residual=True, baselines=False)
    for threshold in curve.thresholds:
        circuit = curve.circuit(faithfulness=threshold)
        if circuit.certificate is not None:
            counts = circuit.composition()
            assert counts["resid_attn"] == counts["resid_mlp"] == 0
            assert circuit.verify(model).faithfulness == pytest.approx(circuit.faithfulness, abs=1e-6)


def test_a_component_graph_is_run_out_too():
    model = tiny_model(Shape(1, 1, 3, True), "LN", 3)
    task = td.Task(clean=[[1, 2, 3]], corrupted=[[4, 5, 3]], answer=[6], distractor=[7])
    curve = td.density(model, task, graph="component", method="exhaustive", baselines=False, thresholds=(0.5, 0.9))
    smaller = td.refine(model, task, curve.ranking, 0.9, budget=4000)
    assert smaller.certificate is not None and smaller.certificate.minimum
    assert smaller.n_edges == curve.minimal_size(0.9)


def test_large_graphs_are_refused():
    shape = Shape(2, 2, 3, True)
    with pytest.raises(ValueError, match=r"`method` must not be 'exhaustive' for a graph of .* the most is 22"):
        td.density(tiny_model(shape, "LN", 0), tiny_prompt(shape, 0), method="exhaustive")
    with pytest.raises(ValueError, match="`refine` must be left out for method 'exhaustive'"):
        td.density(tiny_model(SHAPES[0], "LN", 0), tiny_prompt(SHAPES[0], 0), method="exhaustive", refine=True)


@pytest.mark.parametrize("norm", NORMS)
def test_no_estimate_is_below_the_truth_and_refined_ones_are_hardly_ever_above(norm):
    """`python -m benchmarks.truth` does this for more of them, and for all methods."""
    exact, worst, n_cases = 0, 1.0, 0
    for shape in SHAPES[3:5]:
        model, prompt = tiny_model(shape, norm, 1), tiny_prompt(shape, 1)
        truth = td.density(model, prompt, method="exhaustive", thresholds=THRESHOLDS, baselines=False)
        best = td.density(model, prompt, method="best", thresholds=THRESHOLDS, baselines=False)
        for threshold in THRESHOLDS:
            true = truth.minimal_size(threshold)
            assert true <= best.minimal_size(threshold) <= best.published.minimal_size(threshold)
            refined = td.refine(model, prompt, best.circuit(faithfulness=threshold), threshold, budget=2000)
            assert true <= refined.n_edges <= best.minimal_size(threshold)
            assert refined.certificate is not None
            assert not refined.certificate.minimum or refined.n_edges == true
            n_cases += 1
            exact += refined.n_edges == true
            worst = max(worst, refined.n_edges / max(true, 1))
    assert exact >= 0.95 * n_cases
    assert worst <= 1.5


def test_what_is_said_to_be_the_minimum_is_the_smallest():
    shape = SHAPES[3]
    model, prompt = tiny_model(shape, "LN", 5), tiny_prompt(shape, 5)
    ranking = td.attribute(model, prompt).rank()
    truth = td.density(model, prompt, method="exhaustive", baselines=False)
    refined = td.refine(model, prompt, ranking, 0.8, budget=20_000)
    assert refined.certificate is not None and refined.certificate.minimum and refined.certificate.one_minimal
    assert refined.n_edges == truth.minimal_size(0.8)
    assert torch.equal(flatten(refined.graph, refined.certificate.needed), flatten(refined.graph, refined.kept))
