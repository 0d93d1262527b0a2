"""Flow back from the prediction: arithmetic by hand, and against the sum over all paths, walked one by one."""

import math
import re
from dataclasses import replace

import pytest
import torch
from drawn import make_circuit, provenance, whole

import tracedensity as td
from tracedensity.graph import flatten, unflatten
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import TokenGraph
from tracedensity.routing import Flow, trace_flow
from tracedensity.score import Scores

ONE = TokenGraph(n_layers=1, n_heads=1, n_pos=2)  # 5 edges
TWO = TokenGraph(n_layers=2, n_heads=1, n_pos=2, has_mlp=False)  # 8 edges
GRAPHS = [
    pytest.param(TokenGraph(2, 2, 3), id="MLPs"),
    pytest.param(TokenGraph(3, 2, 3, has_mlp=False), id="no MLPs"),
    pytest.param(TokenGraph(2, 1, 2, d_mlp=3), id="neurons"),
    pytest.param(TokenGraph(1, 3, 1), id="one token"),
]
PROMPT = [3, 1, 4, 1, 5]


def named_scores(graph, values, helpful=0):
    """Scores of edges by name, 0 for all others."""
    tensors = {kind: torch.zeros(shape) for kind, shape in graph.shapes.items()}
    for name, value in values.items():
        kind, index = graph.edge_index(name)
        tensors[kind][index] = value
    return Scores(graph, tensors, provenance(["a"] * graph.n_pos), helpful)


def drawn_scores(graph, seed=0, helpful=0, low=0.0):
    flat = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(seed)) * (1 - low) + low
    return Scores(graph, unflatten(graph, flat, 0.0), provenance(["a"] * graph.n_pos), helpful)


def drawn_circuit(graph, share, seed=0):
    flat = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(seed)) < share
    return Circuit(graph, unflatten(graph, flat, False), provenance(["a"] * graph.n_pos))


def by_name(flow):
    """How much goes along each edge, by name."""
    return {
        flow.graph.edge_name(kind, tuple(index)): float(flow.edges[kind][tuple(index)])
        for kind, exists in flow.graph.exists.items()
        for index in exists.nonzero().tolist()
    }


def walked(circuit, scores):
    """Every path from the prediction down, and what comes along it: flow of edges by name, and where it ends."""
    graph, importance, into = circuit.graph, scores.importance(), {}
    for name in circuit.edge_names():
        kind, index = graph.edge_index(name)
        source, target, _ = graph.ends(kind, index)
        weight = max(float(importance[kind][index]), 0.0)
        if weight > 0:
            into.setdefault(target, []).append((name, source, weight))
    along, ends = {}, {}

    def walk(state, share, path):
        if state not in into:
            ends[state] = ends.get(state, 0.0) + share
            for name in path:
                along[name] = along.get(name, 0.0) + share
            return
        total = sum(weight for _, _, weight in into[state])
        for name, source, weight in into[state]:
            walk(source, share * weight / total, [*path, name])

    n_states = graph.n_layers * (2 if graph.has_mlp else 1)
    walk(f"s{n_states}@{graph.n_pos - 1}", 1.0, [])
    return along, ends


def assert_as_walked(flow, circuit, scores):
    along, ends = walked(circuit, scores)
    assert by_name(flow) == pytest.approx({name: along.get(name, 0.0) for name in by_name(flow)}, abs=1e-12)
    origins = [ends.get(f"s0@{pos}", 0.0) for pos in range(flow.graph.n_pos)]
    assert flow.origins.tolist() == pytest.approx(origins, abs=1e-12)
    assert math.fsum(ends.values()) == pytest.approx(1.0)


# -- by hand ---------------------------------------------------------------------------------------

WEIGHTS = {"a0.h0@0->1": 1.0, "a0.h0@1->1": 2.0, "r0.attn@1": 1.0, "m0@1": 3.0, "r0.mlp@1": 1.0}


def test_one_layer_by_hand():
    flow = trace_flow(whole(ONE), named_scores(ONE, WEIGHTS))
    assert by_name(flow) == {
        "m0@1": 0.75, "r0.mlp@1": 0.25,  # 3 to 1, and both come from the state after attention
        "a0.h0@0->1": 0.25, "a0.h0@1->1": 0.5, "r0.attn@1": 0.25,
    }  # fmt: skip
    assert flow.origins.tolist() == [0.25, 0.75]
    assert flow.heads.tolist() == [[0.75]]
    assert flow.mlps.tolist() == [0.75]


def test_edges_that_are_not_in_the_circuit_take_nothing():
    circuit = make_circuit("a0.h0@0->1", "a0.h0@1->1", "r0.mlp@1", graph=ONE)
    flow = trace_flow(circuit, named_scores(ONE, WEIGHTS))
    assert by_name(flow) == {
        "m0@1": 0.0, "r0.mlp@1": 1.0, "a0.h0@0->1": 1 / 3, "a0.h0@1->1": 2 / 3, "r0.attn@1": 0.0,
    }  # fmt: skip
    assert flow.mlps.tolist() == [0.0]


def test_a_head_on_a_head_by_hand():
    weights = {
        "a1.h0@0->1": 3.0, "r1.attn@1": 1.0,
        "a0.h0@0->0": 1.0, "r0.attn@0": 4.0,
        "a0.h0@0->1": 1.0, "r0.attn@1": 1.0,
    }  # fmt: skip
    flow = trace_flow(whole(TWO), named_scores(TWO, weights))
    # 3/4 goes to token 0 in the second layer, of which 1/5 passes the head of the first; 1/4 stays at token 1
    assert by_name(flow) == pytest.approx({
        "a1.h0@0->1": 0.75, "a1.h0@1->1": 0.0, "r1.attn@1": 0.25,
        "a0.h0@0->0": 0.15, "r0.attn@0": 0.6, "a0.h0@0->1": 0.125, "a0.h0@1->1": 0.0, "r0.attn@1": 0.125,
    })  # fmt: skip
    assert flow.origins.tolist() == pytest.approx([0.875, 0.125])
    assert flow.heads.flatten().tolist() == pytest.approx([0.275, 0.75])
    assert flow.mlps.tolist() == []


def test_neurons_of_an_mlp_are_added_up():
    graph = TokenGraph(1, 1, 1, d_mlp=3)
    weights = {"m0.n0@0": 1.0, "m0.n2@0": 2.0, "r0.mlp@0": 1.0, "r0.attn@0": 1.0}
    flow = trace_flow(whole(graph), named_scores(graph, weights))
    assert flow.edges["neuron"].tolist() == [[[0.25, 0.0, 0.5]]]
    assert flow.mlps.tolist() == [0.75]
    assert flow.origins.tolist() == [1.0]


def test_what_arrives_at_a_state_that_no_edge_enters_comes_from_no_token():
    flow = trace_flow(make_circuit("m0@1", "a0.h0@0->0", graph=TokenGraph(2, 1, 2)), drawn_scores(TokenGraph(2, 1, 2)))
    assert not any(by_name(flow).values())  # the prediction has no in-edge
    assert flow.origins.tolist() == [0.0, 0.0]
    flow = trace_flow(make_circuit("m0@1", "r0.mlp@1", graph=ONE), named_scores(ONE, WEIGHTS))
    assert flow.mlps.tolist() == [0.75]
    assert flow.origins.tolist() == [0.0, 0.0]
    half = make_circuit("a1.h0@0->1", "r1.attn@1", "r0.attn@1", graph=TWO)
    flow = trace_flow(half, named_scores(TWO, {"a1.h0@0->1": 3.0, "r1.attn@1": 1.0, "r0.attn@1": 1.0}))
    assert flow.origins.tolist() == [0.0, 0.25]


@pytest.mark.parametrize("graph", GRAPHS)
def test_nothing_flows_in_the_empty_circuit(graph):
    flow = trace_flow(make_circuit(graph=graph), drawn_scores(graph))
    assert not any(by_name(flow).values())
    assert flow.origins.tolist() == [0.0] * graph.n_pos
    assert (flow.heads.shape, flow.mlps.shape) == ((graph.n_layers, graph.n_heads), (graph.n_layers * graph.has_mlp,))


# -- against all paths -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.8, 0.5, 0.2])
@pytest.mark.parametrize("graph", GRAPHS)
def test_flow_is_the_sum_over_all_paths(graph, share):
    for seed in range(3):
        circuit, scores = drawn_circuit(graph, share, seed), drawn_scores(graph, seed, low=-0.5)
        assert_as_walked(trace_flow(circuit, scores), circuit, scores)


@pytest.mark.parametrize("method", ["norm", "flow", "eap"])
def test_flow_of_a_model_is_the_sum_over_all_paths(method, tiny_model):
    scores = td.attribute(tiny_model, PROMPT[:3], method=method)
    for size in (40, 15):
        circuit = scores.rank().circuit(size)
        flow = td.trace_flow(circuit, scores)
        assert isinstance(flow, Flow)
        assert_as_walked(flow, circuit, scores)


@pytest.mark.parametrize("graph", GRAPHS)
def test_what_enters_a_state_leaves_it(graph):
    circuit, scores = drawn_circuit(graph, 0.6), drawn_scores(graph, low=-0.3)
    flow = trace_flow(circuit, scores)
    arrived, gone = {f"s{graph.n_layers * (2 if graph.has_mlp else 1)}@{graph.n_pos - 1}": 1.0}, {}
    for name, share in by_name(flow).items():
        source, target, _ = graph.ends(*graph.edge_index(name))
        arrived[source], gone[target] = arrived.get(source, 0.0) + share, gone.get(target, 0.0) + share
    stuck = {state: amount - gone.get(state, 0.0) for state, amount in arrived.items()}
    for state, amount in stuck.items():  # all or nothing
        assert amount == pytest.approx(0.0, abs=1e-12) or gone.get(state, 0.0) == 0.0
    embedded = sum(amount for state, amount in stuck.items() if state.startswith("s0@"))
    assert float(flow.origins.sum()) == pytest.approx(embedded)
    assert sum(stuck.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("graph", GRAPHS)
def test_all_of_it_comes_from_tokens_where_every_state_has_a_skip_connection(graph):
    flow = trace_flow(whole(graph), drawn_scores(graph, low=0.01))
    assert float(flow.origins.sum()) == pytest.approx(1.0)
    assert all(0 <= share <= 1 for share in by_name(flow).values())
    assert not any(flow.edges[kind][~exists].any() for kind, exists in graph.exists.items())


# -- which importance ------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-30, 7.0, 1e30])
def test_the_unit_of_scores_does_not_matter(factor):
    graph, scores = TokenGraph(2, 2, 3), drawn_scores(TokenGraph(2, 2, 3))
    scaled = replace(scores, values={kind: factor * value for kind, value in scores.values.items()})
    expected = by_name(trace_flow(whole(graph), scores))
    assert by_name(trace_flow(whole(graph), scaled)) == pytest.approx(expected, rel=1e-6)


def test_skip_connections_that_are_kept_anyhow_carry_their_share():
    graph = TokenGraph(2, 2, 3)
    scores, circuit = drawn_scores(graph), drawn_circuit(graph, 0.3)
    skips = {kind: graph.exists[kind] if kind.startswith("resid") else mask for kind, mask in circuit.kept.items()}
    kept = trace_flow(replace(circuit, keep_residual=True), scores)
    assert_as_walked(kept, circuit.of_edges(skips), scores)
    assert kept.origins.sum() == pytest.approx(1.0)


def test_negative_importance_takes_nothing():
    flow = trace_flow(whole(ONE), named_scores(ONE, {**WEIGHTS, "m0@1": -3.0, "r0.attn@1": -1.0}))
    assert by_name(flow) == {
        "m0@1": 0.0, "r0.mlp@1": 1.0, "a0.h0@0->1": 1 / 3, "a0.h0@1->1": 2 / 3, "r0.attn@1": 0.0,
    }  # fmt: skip
    flow = trace_flow(whole(ONE), named_scores(ONE, {name: -value for name, value in WEIGHTS.items()}))
    assert not any(by_name(flow).values())
    assert flow.origins.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("helpful", [-1, 1])
def test_effects_count_by_their_size_whichever_sign_helps(helpful):
    mixed = {**WEIGHTS, "m0@1": -3.0, "a0.h0@1->1": -2.0}
    flow = trace_flow(whole(ONE), named_scores(ONE, mixed, helpful))
    assert by_name(flow) == by_name(trace_flow(whole(ONE), named_scores(ONE, WEIGHTS)))


# -- what is refused -------------------------------------------------------------------------------


def test_a_circuit_of_heads_and_mlps_is_refused():
    graph = ComponentGraph(1, 1, 1)
    circuit = Circuit(graph, graph.exists, provenance(["a"]))
    scores = Scores(graph, {"edge": torch.ones(graph.shapes["edge"])}, provenance(["a"]))
    with pytest.raises(ValueError, match="`circuit` must be one of a TokenGraph for this, got one of ComponentGraph"):
        trace_flow(circuit, scores)


def test_scores_of_another_graph_are_refused():
    with pytest.raises(ValueError, match=re.escape(f"`scores` must be of the circuit's graph, {ONE}, got some of")):
        trace_flow(whole(ONE), drawn_scores(TWO))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="`scores` must be finite, got 1 NaN or infinite of 5"):
        trace_flow(make_circuit("m0@1", graph=ONE), named_scores(ONE, {**WEIGHTS, "r0.attn@1": bad}))


def test_nothing_that_is_given_is_changed():
    circuit, scores = drawn_circuit(TokenGraph(2, 2, 3), 0.5), drawn_scores(TokenGraph(2, 2, 3), low=-1.0)
    kept, values = flatten(circuit.graph, circuit.kept).clone(), flatten(scores.graph, scores.values).clone()
    trace_flow(circuit, scores)
    assert torch.equal(flatten(circuit.graph, circuit.kept), kept)
    assert torch.equal(flatten(scores.graph, scores.values), values)
