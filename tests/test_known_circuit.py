"""Circuits that are known by hand: whether they are what we think they are, and whether they are found."""

from collections.abc import Iterable
from itertools import combinations

import handmade
import oracle
import pytest
import torch
from handmade import COPY_CIRCUIT, COPY_PROMPT, INDUCTION_CIRCUIT, INDUCTION_PROMPT, A, B, C
from oracle import Edge, Oracle

import tracedensity as td
from benchmarks.lens import HookedTransformer
from tracedensity.graph.token import TokenGraph

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")

KNOWN = {
    "induction": (handmade.induction_model, INDUCTION_PROMPT, INDUCTION_CIRCUIT),
    "copy": (lambda: handmade.copy_model(0.0), COPY_PROMPT, COPY_CIRCUIT),
    "copy, noisy MLP": (lambda: handmade.copy_model(0.2), COPY_PROMPT, COPY_CIRCUIT),
}


@pytest.fixture(params=KNOWN)
def known(request) -> tuple[HookedTransformer, tuple[int, ...], frozenset[str]]:
    make, prompt, circuit = KNOWN[request.param]
    return make(), prompt, circuit


def names(truth: Oracle, edges: Iterable[Edge]) -> frozenset[str]:
    graph = TokenGraph(*truth.shape)
    return frozenset(graph.edge_name(*edge) for edge in edges)


def faithful(truth: Oracle, edges: Iterable[Edge], full: oracle.Vector) -> bool:
    return 1 - oracle.total_variation(full, truth.circuit(edges)) >= 0.9


@pytest.mark.parametrize(
    ("make", "prompt", "expected"),
    [
        pytest.param(handmade.induction_model, INDUCTION_PROMPT, {B: 0.5, C: 0.5}, id="induction and bigram"),
        pytest.param(handmade.induction_model, (B, C, B), {C: 1.0}, id="induction alone, after B"),
        pytest.param(handmade.induction_model, (B, C, A), {C: 1.0}, id="nothing to repeat"),
        pytest.param(lambda: handmade.copy_model(0.2), COPY_PROMPT, {C: 0.5, A: 0.5}, id="copies"),
    ],
)
def test_the_models_do_what_they_are_made_for(make, prompt, expected):
    probabilities = make()(torch.tensor([prompt]))[0, -1].softmax(-1)
    for token in range(4):
        assert probabilities[token].item() == pytest.approx(expected.get(token, 0.0), abs=0.02)


def test_no_smaller_or_other_set_of_edges_does_the_induction():
    truth = Oracle(handmade.induction_model(), INDUCTION_PROMPT)
    full = truth.run().logits
    # Head 1 adds exactly nothing, so sets that hold edges of it are larger than without, and no better.
    live = [edge for edge, vector in truth.run().vectors.items() if vector.any()]
    assert len(oracle.all_edges(truth.shape)) == 22 and len(live) == 13
    assert {edge for edge in oracle.all_edges(truth.shape) if edge not in live} == {
        edge for edge in oracle.all_edges(truth.shape) if edge[0] == "head" and edge[1][1] == 1
    }
    found = [
        names(truth, edges)
        for size in range(len(INDUCTION_CIRCUIT) + 1)
        for edges in combinations(live, size)
        if faithful(truth, edges, full)
    ]
    assert found == [INDUCTION_CIRCUIT]


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_set_of_edges_copies_exactly_if_it_holds_the_circuit(noise):
    truth = Oracle(handmade.copy_model(noise), COPY_PROMPT)
    full = truth.run().logits
    edges = oracle.all_edges(truth.shape)
    for size in range(len(edges) + 1):
        for chosen in combinations(edges, size):
            assert faithful(truth, chosen, full) == (names(truth, chosen) >= COPY_CIRCUIT)


def test_density_finds_the_known_circuit(known):
    model, prompt, expected = known
    curve = td.density(model, prompt, method="norm", thresholds=(0.9,))
    assert curve.minimal_size(0.9) == curve.minimal_size(0.9, stable=True) == len(expected)
    circuit = curve.circuit(faithfulness=0.9)
    assert set(circuit.edge_names()) == expected
    assert circuit.verify(model).faithfulness == pytest.approx(1.0, abs=1e-5)


def test_the_known_circuit_is_the_beginning_of_the_greedy_ranking(known):
    model, prompt, expected = known
    ranking = td.attribute(model, prompt, method="norm").rank("greedy")
    assert set(ranking.circuit(len(expected)).edge_names()) == expected
    measured = td.evaluate(model, prompt, ranking, range(ranking.n_edges + 1), metrics=("tv",))
    assert ((1 - measured.metrics["tv"] >= 0.9) == (measured.sizes >= len(expected))).all()


def test_heads_of_zeros_get_no_score_and_enter_last():
    scores = td.attribute(handmade.induction_model(), INDUCTION_PROMPT, method="norm")
    assert (scores.values["head"][:, 1] == 0).all()
    rank = scores.rank("greedy").rank["head"][:, 1]
    assert rank[rank >= 0].min() == 13


def test_the_circuit_without_any_of_its_edges_fails(known):
    model, prompt, expected = known
    graph = td.attribute(model, prompt).graph
    assert isinstance(graph, TokenGraph)
    truth = Oracle(model, prompt)
    circuit = [graph.edge_index(name) for name in expected]
    full = truth.run().logits
    assert faithful(truth, circuit, full)
    for edge in circuit:
        assert not faithful(truth, [other for other in circuit if other != edge], full)
