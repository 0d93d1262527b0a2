"""What heads, MLPs and tokens of a circuit are worth: against running it without the edges of each, one by one."""

import pytest
import torch
from component_cases import EQUAL, model_of
from conftest import random_model
from drawn import make_circuit

import tracedensity as td
from tracedensity.graph.token import TokenGraph
from tracedensity.model import as_transformer

PROMPT = [3, 1, 4, 1, 5]


def some_circuit(model, prompt=PROMPT, share=0.6, **options):
    """Edges drawn at random: neither all nor none of the prediction is left."""
    ranking = td.attribute(model, prompt, method="random", seed=1, **options).rank("top")
    return ranking.circuit(int(share * ranking.n_edges))


def owner(graph, kind, index):
    """The head or MLP that an edge belongs to, by what it is called."""
    if isinstance(graph, TokenGraph):
        name = graph.edge_name(kind, index)
        return {"head": name.split("@")[0], "mlp": name.split("@")[0], "neuron": name.split(".")[0]}.get(kind)
    writer = graph.ends(kind, index)[0].split("@")[0]
    return None if writer == "input" else writer


def read(graph, kind, index):
    """The token whose embedding an edge reads."""
    source = graph.ends(kind, index)[0]
    return int(source.removeprefix("s0@")) if source.startswith("s0@") else None


def owned(circuit, owner=owner):
    """Edges of each head and MLP, or of each token, that has any."""
    edges = {}
    for name in circuit.edge_names():
        kind, index = circuit.graph.edge_index(name)
        if (unit := owner(circuit.graph, kind, index)) is not None:
            edges.setdefault(unit, []).append((kind, index))
    return edges


def without(circuit, edges):
    kept = {kind: mask.clone() for kind, mask in circuit.kept.items()}
    for kind, index in edges:
        kept[kind][index] = False
    return circuit.of_edges(kept)


def reached(model, prompt, circuit, metric=None):
    measured = td.evaluate(model, prompt, circuit, metrics=(circuit.metric if metric is None else metric,))
    return float(measured.faithfulness()[0])


def assert_as_run_one_by_one(table, model, prompt, circuit, metric=None, by="node"):
    edges, own = owned(circuit, {"node": owner, "token": read}[by]), reached(model, prompt, circuit, metric)
    assert sorted(table[by]) == sorted(edges)
    assert list(table.columns) == [by, "size", "loss", "faithfulness"]
    for row in table.itertuples():
        unit = edges[getattr(row, by)]
        left = reached(model, prompt, without(circuit, unit), metric)
        assert row.size == len(unit)
        assert (row.faithfulness, row.loss) == pytest.approx((left, own - left), abs=2e-5)
    assert table["loss"].is_monotonic_increasing  # the least needed first
    assert list(table.index) == [*range(len(table))]


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_on_the_token_graph_it_is_what_running_without_each_says(share, tiny_model):
    circuit = some_circuit(tiny_model, share=share)
    table = td.minimality(tiny_model, circuit, by="node")
    assert_as_run_one_by_one(table, tiny_model, PROMPT, circuit)
    if share == 1.0:  # in the last layer, only at the last token
        assert dict(zip(table["node"], table["size"], strict=True)) == {
            **{f"a0.h{head}": 15 for head in range(4)}, **{f"a1.h{head}": 5 for head in range(4)}, "m0": 5, "m1": 1,
        }  # fmt: skip
        assert table["loss"].abs().max() > 0.05


@pytest.mark.parametrize("task", [pytest.param(EQUAL, id="a task"), pytest.param(PROMPT, id="a prompt")])
def test_on_the_component_graph_it_is_what_running_without_what_each_writes_says(task, kind):
    model = model_of(kind)
    circuit = some_circuit(model, task, graph="component")
    assert_as_run_one_by_one(td.minimality(model, circuit, by="node"), model, task, circuit)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"positions": True}, id="positions"),
        pytest.param({"ungroup": True}, id="keys and values of every head"),
    ],
)
def test_edges_of_other_component_graphs_belong_to_their_writers(options):
    model = model_of("llama")
    circuit = some_circuit(model, EQUAL, graph="component", **options)
    assert_as_run_one_by_one(td.minimality(model, circuit, by="node"), model, EQUAL, circuit)


def test_neurons_of_the_token_graph_go_together(tiny_gpt2):
    circuit = some_circuit(tiny_gpt2, neurons=True)
    assert_as_run_one_by_one(td.minimality(tiny_gpt2, circuit, by="node"), tiny_gpt2, PROMPT, circuit)


@pytest.mark.parametrize("graph", ["token", "component"])
def test_a_model_without_mlps_has_heads_only(graph):
    model = random_model(attn_only=True, normalization_type="LN", model_name="heads")
    circuit = some_circuit(model, graph=graph)
    table = td.minimality(model, circuit, by="node")
    assert table["node"].str.fullmatch(r"a\d\.h\d").all()
    assert_as_run_one_by_one(table, model, PROMPT, circuit)


@pytest.mark.parametrize("kept", [{"keep_residual": True}, {"attention": "open"}])
def test_circuits_are_run_as_they_were_measured(kept, tiny_gpt2):
    curve = td.density(tiny_gpt2, PROMPT, baselines=False, **kept)
    circuit = curve.circuit(faithfulness=0.8)
    assert_as_run_one_by_one(td.minimality(tiny_gpt2, circuit, by="node"), tiny_gpt2, PROMPT, circuit)


def first_logit(logits, examples):
    return logits.float()[:, 0]


def test_a_function_of_the_user_s_measures_it():
    model = model_of("gpt2")
    circuit = td.density(model, EQUAL, graph="component", metric=first_logit, baselines=False).circuit(size=30)
    table = td.minimality(model, circuit, by="node", metric=first_logit)
    assert_as_run_one_by_one(table, model, EQUAL, circuit, first_logit)
    with pytest.raises(ValueError, match="`metric` must be given, the function 'first_logit'"):
        td.minimality(model, circuit, by="node")


def test_a_head_with_one_edge_is_worth_that_edge(tiny_gpt2):
    graph = TokenGraph.of(as_transformer(tiny_gpt2), len(PROMPT))
    names = ["a0.h1@2->4", "a1.h0@1->4", "m0@1", "m1@4"]
    skips = [f"r{layer}.{around}@4" for layer in range(2) for around in ("attn", "mlp")] + ["r0.attn@1", "r0.mlp@1"]
    circuit = some_circuit(tiny_gpt2).of_edges(make_circuit(*names, *skips, graph=graph).kept)
    by_node = td.minimality(tiny_gpt2, circuit, by="node").set_index("node")
    by_edge = td.minimality(tiny_gpt2, circuit).set_index("edge")
    assert by_node["size"].tolist() == [1] * 4
    for name in names:
        assert by_node["loss"][name.split("@")[0]] == pytest.approx(by_edge["loss"][name], abs=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_tokens_are_worth_what_running_without_their_embeddings_says(share, tiny_model):
    circuit = some_circuit(tiny_model, share=share)
    table = td.minimality(tiny_model, circuit, by="token")
    assert_as_run_one_by_one(table, tiny_model, PROMPT, circuit, by="token")
    assert table["loss"].abs().max() > 0.01


def test_tokens_of_a_model_of_one_layer_and_no_mlp_are_all_that_there_is():
    model = random_model(attn_only=True, n_layers=1, normalization_type="LN", model_name="one layer")
    circuit = some_circuit(model, share=1.0)
    table = td.minimality(model, circuit, by="token").set_index("token")
    assert table["size"].to_dict() == {0: 4, 1: 4, 2: 4, 3: 4, 4: 5}  # each of four heads, and the skip connection


# -- what there is none of, and what is refused ----------------------------------------------------


@pytest.mark.parametrize("by", ["edge", "node"])
@pytest.mark.parametrize("graph", ["token", "component"])
def test_an_empty_circuit_has_an_empty_table_of_names(graph, by, tiny_gpt2):
    table = td.minimality(tiny_gpt2, some_circuit(tiny_gpt2, graph=graph, share=0.0), by=by)
    assert len(table) == 0
    assert list(table[by].str.startswith("m")) == []  # names, although there is none


def test_skip_connections_and_the_embedding_are_no_nodes(tiny_gpt2):
    graph = TokenGraph.of(as_transformer(tiny_gpt2), len(PROMPT))
    circuit = some_circuit(tiny_gpt2).of_edges(make_circuit("r0.attn@4", "r0.mlp@4", graph=graph).kept)
    assert len(td.minimality(tiny_gpt2, circuit, by="node")) == 0
    like = some_circuit(tiny_gpt2, graph="component")
    kept = torch.zeros_like(like.kept["edge"])
    kept[like.graph.edge_index("input->logits")[1]] = True
    assert len(td.minimality(tiny_gpt2, like.of_edges({"edge": kept}), by="node")) == 0


def test_what_is_neither_edge_nor_node_is_refused(tiny_gpt2):
    with pytest.raises(ValueError, match="`by` must be 'edge'"):
        td.minimality(tiny_gpt2, some_circuit(tiny_gpt2), by="head")


def test_tokens_of_the_component_graph_are_refused(tiny_gpt2):
    with pytest.raises(ValueError, match="`by` must be 'edge' or 'node' but on the token graph, got 'token'"):
        td.minimality(tiny_gpt2, some_circuit(tiny_gpt2, graph="component"), by="token")


def test_another_model_is_refused(tiny_gpt2, tiny_llama):
    with pytest.raises(ValueError, match="`model` must be the one that this was computed on, tiny-gpt2"):
        td.minimality(tiny_llama, some_circuit(tiny_gpt2), by="node")
