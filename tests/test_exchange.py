"""Circuits as sets, and in the formats of others."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
import torch

import tracedensity as td
from tracedensity.graph import flatten, unflatten
from tracedensity.graph.circuit import Circuit

PAIR = {"clean": [3, 1, 4, 1, 5], "corrupted": [3, 1, 9, 1, 5], "answer": 7, "distractor": 2}


@pytest.fixture(scope="module")
def scores(tiny_llama):
    return td.attribute(tiny_llama, td.Task(**PAIR), graph="component", method="eap", ungroup=True)


@pytest.fixture(scope="module")
def circuit(scores):
    return scores.rank("top").circuit(30)


def at_random(circuit, seed):
    kept = torch.rand(circuit.graph.n_edges, generator=torch.Generator().manual_seed(seed)) < 0.4
    return Circuit(circuit.graph, unflatten(circuit.graph, kept, False), circuit.provenance)


# -- sets --------------------------------------------------------------------------------------------


def test_algebra_is_that_of_sets_of_names(circuit):
    one, other = at_random(circuit, 0), at_random(circuit, 1)
    here, there = set(one.edge_names()), set(other.edge_names())
    assert set((one | other).edge_names()) == here | there
    assert set((one & other).edge_names()) == here & there
    assert set((one - other).edge_names()) == here - there
    assert one.jaccard(other) == pytest.approx(len(here & there) / len(here | there))
    assert (one - one).jaccard(other - other) == 1
    assert (one | other).faithfulness is None


def test_circuits_of_other_graphs_do_not_mix(circuit, tiny_llama):
    other = td.attribute(tiny_llama, td.Task(**PAIR), graph="component", method="random").rank("top").circuit(3)
    with pytest.raises(ValueError, match="`other` must be a circuit of the same graph"):
        circuit | other


def test_subgraphs_by_layer_and_head(circuit):
    whole = Circuit(circuit.graph, dict(circuit.graph.exists), circuit.provenance)
    first = set(whole.subgraph(layers=[0]).edge_names())
    assert "input->a0.h1<q>" in first and "a0.h1->m0" in first and "m0->logits" in first
    assert not [name for name in first if "1." in name.split(".")[0] or "m1" in name]
    of_head = set(whole.subgraph(heads=["a1.h2"]).edge_names())
    assert of_head == {
        name for name in whole.edge_names() if name.startswith("a1.h2->") or "->a1.h2<" in name
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"`layers` must be from 0 to 1, got \[5\]"):
        circuit.subgraph(layers=[5])
    with pytest.raises(ValueError, match=r"`heads` must be heads of this graph, like .a0\.h0., got \[.m0.\]"):
        circuit.subgraph(heads=["m0"])


def test_heads_that_share_keys_take_their_groups_along(tiny_llama):
    ranking = td.attribute(tiny_llama, td.Task(**PAIR), graph="component", method="random").rank("top")
    names = ranking.circuit(ranking.n_edges).subgraph(heads=["a1.h3"]).edge_names()
    assert {name.partition("->")[2] for name in names if name.startswith("input")} == {
        "a1.h3<q>", "a1.kv1<k>", "a1.kv1<v>"
    }  # fmt: skip


def test_a_pruned_circuit_predicts_the_same_under_a_counterfactual(circuit, tiny_llama):
    task = td.Task(**PAIR)
    assert circuit.pruned_size < circuit.n_edges
    values = td.evaluate(tiny_llama, task, [circuit, circuit.pruned()], metrics="logit_diff").metrics["logit_diff"]
    assert values[0] == pytest.approx(float(values[1]), abs=1e-5)


# -- checks ------------------------------------------------------------------------------------------


def test_minimality_is_what_running_without_each_edge_says(circuit, tiny_llama):
    small = circuit.pruned()
    table = td.minimality(tiny_llama, small)
    assert sorted(table["edge"]) == sorted(small.edge_names())
    assert table["loss"].is_monotonic_increasing
    name = table["edge"][3]
    without = dict(small.kept)
    without["edge"] = without["edge"].clone()
    without["edge"][small.graph.edge_index(name)[1]] = False
    alone = Circuit(small.graph, without, small.provenance, ablation="counterfactual", metric="logit_diff")
    assert alone.verify(tiny_llama).faithfulness == pytest.approx(table["faithfulness"][3], abs=1e-4)
    whole = small.verify(tiny_llama).faithfulness
    assert table["loss"][3] == pytest.approx(whole - table["faithfulness"][3], abs=1e-5)


def test_the_whole_graph_is_complete_and_its_complement_is_nothing(scores, tiny_llama):
    whole = scores.rank("top").circuit(scores.graph.n_edges)
    found = td.completeness(tiny_llama, whole, n_knockouts=4, seed=1)
    assert found.incompleteness.max() == pytest.approx(0, abs=1e-6)
    assert found.complement == pytest.approx(0, abs=1e-5)
    assert found.size.tolist() == [-(-whole.n_edges // 10), -(-whole.n_edges // 2)] * 2
    assert torch.equal(found.model, td.completeness(tiny_llama, whole, n_knockouts=4, seed=1).model)


# -- formats -----------------------------------------------------------------------------------------


def test_networkx_has_every_edge_with_its_score(circuit, scores):
    graph = circuit.to_networkx(scores)
    assert {about["name"] for *_, about in graph.edges(data=True)} == set(circuit.edge_names())
    for source, target, read_as, about in graph.edges(keys=True, data=True):
        _, index = circuit.graph.edge_index(about["name"])
        assert about["score"] == pytest.approx(float(scores.values["edge"][index]))
        suffix = f"<{read_as}>" if read_as in "qkv" else ""
        assert about["name"] == f"{source}->{target}{suffix}"
    assert nx.is_directed_acyclic_graph(graph)


def test_graphs_of_tokens_go_to_networkx_as_well(tiny_llama):
    circuit = td.attribute(tiny_llama, PAIR["clean"]).rank().circuit(25)
    graph = circuit.to_networkx()
    assert graph.number_of_edges() == 25
    assert nx.is_directed_acyclic_graph(graph)


def test_paths_of_a_circuit_are_paths_of_the_networkx_graph(tiny_llama):
    """Where heads share keys and values, and where these are read at later tokens."""
    task = td.Task(**PAIR)
    for options in ({}, {"ungroup": True}, {"positions": True}, {"positions": True, "ungroup": True}):
        graph = td.attribute(tiny_llama, task, graph="component", method="random", **options).graph
        whole = Circuit(graph, dict(graph.exists), td.attribute(tiny_llama, [1]).provenance)
        for seed in range(20):
            kept = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(seed)) < 0.05
            circuit = replace(whole, kept=unflatten(graph, kept, False))
            drawn = circuit.to_networkx()
            sources = [node for node in drawn if node.startswith("input")]
            ends = [node for node in drawn if node.startswith("logits")]
            joined = any(nx.has_path(drawn, source, end) for source in sources for end in ends)
            assert joined == (circuit.pruned_size > 0)
            alive = {
                name
                for source, target, name in drawn.edges(data="name")
                if name is not None
                and any(nx.has_path(drawn, node, source) for node in sources)
                and any(nx.has_path(drawn, target, node) for node in ends)
            }
            assert alive == set(circuit.pruned().edge_names())
            assert "style=dotted" in circuit.to_dot() or not circuit.graph.links(circuit.nodes())


def test_neurons_are_part_of_their_mlp(tiny_llama):
    scores = td.attribute(tiny_llama, td.Task(**PAIR), graph="component", method="eap", neurons=True)
    drawn = scores.rank("top").circuit(scores.graph.n_edges).to_networkx()
    assert ("m0", "m0.n3", "link") in drawn.edges(keys=True)


def test_graphml_is_read_back(circuit, scores, tmp_path):
    td.write_graphml(circuit, tmp_path / "circuit.graphml", scores)
    ElementTree.parse(tmp_path / "circuit.graphml")
    back = nx.read_graphml(tmp_path / "circuit.graphml", force_multigraph=True)
    assert sorted(name for *_, name in back.edges(data="name") if name) == sorted(circuit.edge_names())
    assert [path.name for path in tmp_path.iterdir()] == ["circuit.graphml"]


def test_dot_names_every_edge_once(circuit):
    text = circuit.to_dot()
    assert text.startswith("digraph circuit {") and text.rstrip().endswith("}")
    for name in circuit.edge_names():
        assert text.count(f'tooltip="{name}"') == 1


def test_the_benchmark_file_has_the_names_of_the_public_code(circuit, scores, tmp_path):
    td.write_benchmark(circuit, tmp_path / "circuit.json", scores)
    content = json.loads((tmp_path / "circuit.json").read_text())
    assert content["cfg"] == {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 16}
    assert list(content["nodes"]) == [*circuit.graph.writers, "logits"]
    assert len(content["edges"]) == circuit.graph.n_edges
    in_graph = {name for name, about in content["edges"].items() if about["in_graph"]}
    assert in_graph == set(circuit.edge_names())
    # what helps has a positive score there: ablating it lowers the logit difference
    name = scores.top(1)["edge"][0]
    assert content["edges"][name]["score"] == pytest.approx(-float(scores.top(1)["score"][0]))


def test_the_benchmark_file_goes_both_ways(circuit, scores, tmp_path, tiny_llama):
    path = tmp_path / "circuit.json"
    td.write_benchmark(circuit, path, scores)
    back = td.read_benchmark(path)
    assert back.circuit.edge_names() == circuit.edge_names()
    ours = flatten(scores.graph, scores.importance(signed=True))
    torch.testing.assert_close(flatten(back.scores.graph, back.scores.values), ours)
    for options in ({"family": "top"}, {"family": "greedy"}, {"family": "top", "signed": True}):
        there, here = back.scores.rank(**options).rank["edge"], scores.rank(**options).rank["edge"]
        assert (there == here).all()
    task = td.Task(**PAIR)
    values = td.evaluate(tiny_llama, task, [circuit, back.circuit], metrics="logit_diff").metrics["logit_diff"]
    assert values[0] == values[1]
    again = tmp_path / "again.json"
    td.write_benchmark(back.circuit, again, back.scores)
    assert json.loads(again.read_text()) == json.loads(path.read_text())


def test_a_file_without_scores_says_what_is_in(circuit, tmp_path):
    td.write_benchmark(circuit, tmp_path / "circuit.json")
    back = td.read_benchmark(tmp_path / "circuit.json")
    assert back.scores.rank("top").circuit(circuit.n_edges).edge_names() == circuit.edge_names()


def test_bad_files_and_graphs_get_one_sentence(circuit, tmp_path, tiny_llama):
    with pytest.raises(FileNotFoundError, match=r"must be a JSON file of the MIB benchmark, got .* does not exist"):
        td.read_benchmark(tmp_path / "none.json")
    td.write_benchmark(circuit, tmp_path / "circuit.json")
    good = json.loads((tmp_path / "circuit.json").read_text())
    broken = [
        "no json", "{}", json.dumps({**good, "edges": {"a9.h9->m0": {"score": 1, "in_graph": True}}}),
        json.dumps({**good, "edges": {"input->m0": {"score": float("nan"), "in_graph": True}}}),
        json.dumps({**good, "cfg": {}}),
        *(json.dumps({**good, "cfg": {**good["cfg"], "n_layers": number}}) for number in (0, -1, 3, 1.5, "2", True)),
        json.dumps({**good, "cfg": {**good["cfg"], "d_model": "a"}}),
        json.dumps({**good, "edges": {name: good["edges"][name] for name in [*good["edges"]][1:]}}),
        json.dumps({**good, "edges": {name: {"score": 1, "in_graph": "false"} for name in good["edges"]}}),
        json.dumps({**good, "nodes": {**good["nodes"], "m0": {"in_graph": True, "neurons": [True, False]}}}),
    ]  # fmt: skip
    for text in broken:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="`path` must be a JSON file of the MIB benchmark, got"):
            td.read_benchmark(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="must be a file in a folder that exists"):
        td.write_benchmark(circuit, tmp_path / "no" / "folder.json")
    grouped = td.attribute(tiny_llama, td.Task(**PAIR), graph="component", method="random").rank("top").circuit(3)
    with pytest.raises(ValueError, match=r"readers of keys and values for every query head.*ungroup=True"):
        td.write_benchmark(grouped, tmp_path / "grouped.json")
    with pytest.raises(ValueError, match="must be of a component graph"):
        td.write_benchmark(td.attribute(tiny_llama, [1, 2]).rank().circuit(3), tmp_path / "token.json")
    with pytest.raises(ValueError, match="must know its prompt or task"):
        td.minimality(tiny_llama, td.read_benchmark(tmp_path / "circuit.json").circuit)
    assert not Path(tmp_path / "grouped.json").exists()
