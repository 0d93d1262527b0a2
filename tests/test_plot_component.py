"""Figures of circuits on the component graph: what is drawn where, checked against the circuit."""

import html
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tracedensity.graph.circuit import Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import TokenGraph
from tracedensity.plot import component as component_module
from tracedensity.plot import theme
from tracedensity.plot.component import plot_component
from tracedensity.provenance import Provenance
from tracedensity.score import Scores
from tracedensity.task import Task

GRAPH = ComponentGraph(n_layers=2, n_heads=4, n_kv_heads=4)
GROUPED = ComponentGraph(n_layers=2, n_heads=4, n_kv_heads=2)
POSITIONS = ComponentGraph(n_layers=2, n_heads=2, n_kv_heads=2, n_pos=3)
NEURONS = ComponentGraph(n_layers=2, n_heads=2, n_kv_heads=2, d_mlp=5)
GPT2 = ComponentGraph(n_layers=12, n_heads=12, n_kv_heads=12)

PROVENANCE = Provenance("tiny", "abc", (1, 2), ("<s>", " there"), "eap", metric="logit_diff")
KINDS = ("read as query", "read as key", "read as value", "read by MLP", "read by logits")
PATH = ("input->a0.h1<q>", "a0.h1->a1.h2<k>", "a0.h1->m1", "a1.h2->logits", "m1->logits")


def circuit_of(*names, graph=GRAPH, **fields):
    kept = torch.zeros_like(graph.exists["edge"])
    for name in names:
        kept[graph.edge_index(name)[1]] = True
    return Circuit(graph, {"edge": kept}, PROVENANCE, **fields)


def random_circuit(graph, share, seed=0):
    drawn = torch.rand(graph.shapes["edge"], generator=torch.Generator().manual_seed(seed)) < share
    return Circuit(graph, {"edge": graph.exists["edge"] & drawn}, PROVENANCE)


def scores_of(values, graph=GRAPH, helpful=-1):
    """Scores of the named edges; zero for all others."""
    filled = torch.zeros(graph.shapes["edge"])
    for name, value in values.items():
        filled[graph.edge_index(name)[1]] = value
    return Scores(graph, {"edge": filled}, PROVENANCE, helpful)


def segments(trace):
    """The lines of a trace, each a list of its corners."""
    lines, line = [], []
    for x, y in zip(np.asarray(trace.x).tolist(), np.asarray(trace.y).tolist(), strict=True):
        if np.isnan(x):
            if line:
                lines.append(line)
            line = []
        else:
            line.append((x, y))
    return lines


def drawn(figure, *names):
    """All lines of the traces with these names; of all that stand for edges by default."""
    names = names or (*KINDS, "on no path")
    return [line for trace in figure.data if trace.name in names for line in segments(trace)]


def one(figure, name):
    (trace,) = [trace for trace in figure.data if trace.name == name]
    return trace


def node_places(figure):
    """Where each node is, by the name under the mouse."""
    nodes = one(figure, "nodes")
    names = [re.match("<b>(.*?)</b>", text)[1] for text in nodes.customdata]
    return dict(zip(names, zip(nodes.x.tolist(), nodes.y.tolist(), strict=True), strict=True))


def about(figure, name):
    """What is under the mouse at a node."""
    (text,) = [text for text in one(figure, "nodes").customdata if text.startswith(f"<b>{name}</b>")]
    return html.unescape(text).split("<br>")[1:]


def entries(figure):
    return [trace.name for trace in figure.data if trace.showlegend]


class TestNodes:
    def test_those_with_an_edge_stand_in_their_layer_and_the_ends_always(self):
        places = node_places(plot_component(circuit_of(*PATH)))
        assert set(places) == {"input", "a0.h1", "a1.h2", "m1", "logits"}
        assert {name: y // 1 for name, (_, y) in places.items()} == {
            "input": -1, "a0.h1": 0, "a1.h2": 1, "m1": 1, "logits": 2,
        }  # fmt: skip
        assert set(node_places(plot_component(circuit_of()))) == {"input", "logits"}

    def test_an_mlp_is_above_its_heads_or_level_with_them_in_parallel_blocks(self):
        names = ("input->a0.h1<q>", "input->m0")
        places = node_places(plot_component(circuit_of(*names)))
        assert places["m0"][1] > places["a0.h1"][1]
        places = node_places(plot_component(circuit_of(*names, graph=replace(GRAPH, parallel=True))))
        assert places["m0"][1] == places["a0.h1"][1]
        assert places["m0"][0] > places["a0.h1"][0]

    def test_heads_keep_their_order_their_columns_and_their_distance(self):
        names = [f"input->a0.h{head}<q>" for head in (0, 1, 2, 11)] + ["input->a1.h2<q>"]
        places = node_places(plot_component(circuit_of(*names, graph=GPT2)))
        row = [places[f"a0.h{head}"][0] for head in (0, 1, 2, 11)]
        assert min(np.diff(row)) >= 1.8 - 1e-9
        assert 0 < row[0] < row[-1] < 12
        assert places["a1.h2"][0] == 2.5  # nothing pushes it

    @pytest.mark.parametrize("n_heads", [1, 4, 12, 32])
    def test_no_two_nodes_of_a_full_row_overlap(self, n_heads):
        graph = ComponentGraph(2, n_heads, n_heads)
        figure = plot_component(random_circuit(graph, 1.1))
        places = node_places(figure)
        row = [places[f"a0.h{head}"][0] for head in range(n_heads)]
        if n_heads > 1:
            assert min(np.diff(row)) * 470 / (max(12, n_heads) + 2) >= max(one(figure, "nodes").marker.size[1:2])

    def test_full_names_where_there_is_room_short_ones_where_not(self):
        assert set(one(plot_component(circuit_of(*PATH)), "nodes").text) >= {"a0.h1", "m1", "<b>logits</b>"}
        assert set(one(plot_component(random_circuit(GPT2, 1.1)), "nodes").text) >= {"h11", "m11"}
        assert "31" in one(plot_component(random_circuit(ComponentGraph(1, 32, 32), 1.1)), "nodes").text

    def test_under_the_mouse_are_the_numbers_of_edges_and_the_strongest(self):
        names = [f"a0.h{head}->a1.h2<{kind}>" for head in range(4) for kind in "qk"]
        scores = scores_of({name: (-1) ** i * i / 8 for i, name in enumerate(names)})
        circuit = circuit_of(*names, "a1.h2->logits")
        counts, *strongest, more = about(plot_component(circuit, scores=scores), "a1.h2")
        assert counts == "8 edges in, 1 out"
        assert strongest[:2] == ["a0.h3->a1.h2<k>  -0.875", "a0.h3->a1.h2<q>  0.75"]
        assert (len(strongest), more) == (5, "and 3 more")
        assert about(plot_component(circuit_of(*PATH)), "logits") == [
            "2 edges in, 0 out",
            "m1->logits",
            "a1.h2->logits",
        ]

    def test_what_is_on_no_path_is_grey(self):
        figure = plot_component(circuit_of(*PATH, "input->a0.h3<v>", "a0.h0->logits"))
        nodes = one(figure, "nodes")
        grey = {
            name
            for name, colour in zip(node_places(figure), nodes.marker.line.color, strict=True)
            if colour == theme.DEAD
        }
        assert grey == {"a0.h3", "a0.h0"}
        assert len(drawn(figure, "on no path")) == 2
        assert "on no path" in entries(figure)
        assert "on no path" not in entries(plot_component(circuit_of(*PATH)))


class TestEdges:
    def test_each_goes_from_its_writer_to_its_reader_at_its_side(self):
        figure = plot_component(circuit_of("input->a0.h1<q>", "input->a0.h1<k>", "input->a0.h1<v>", "a0.h1->logits"))
        places = node_places(figure)
        ends = {}
        for kind in KINDS[:3]:
            (line,) = drawn(figure, kind)
            assert line[0] == pytest.approx(places["input"])
            assert line[-1][1] == pytest.approx(places["a0.h1"][1])
            ends[kind] = line[-1][0]
        assert ends["read as key"] == pytest.approx(places["a0.h1"][0])
        assert ends["read as query"] < ends["read as key"] < ends["read as value"]
        (line,) = drawn(figure, "read by logits")
        assert (line[0], line[-1]) == (pytest.approx(places["a0.h1"]), pytest.approx(places["logits"]))

    @pytest.mark.parametrize("scored", [False, True])
    @pytest.mark.parametrize(
        "graph",
        [
            pytest.param(GRAPH, id="plain"),
            pytest.param(GROUPED, id="grouped"),
            pytest.param(replace(GRAPH, parallel=True), id="parallel"),
            pytest.param(replace(GRAPH, has_mlp=False), id="no MLPs"),
            pytest.param(GPT2, id="twelve layers"),
        ],
    )
    def test_every_kept_edge_is_one_line_that_climbs(self, graph, scored):
        circuit = random_circuit(graph, 0.1 if graph is GPT2 else 0.5)
        values = torch.randn(graph.shapes["edge"], generator=torch.Generator().manual_seed(1)) * graph.exists["edge"]
        scores = Scores(graph, {"edge": values}, PROVENANCE, -1) if scored else None
        figure = plot_component(circuit, scores=scores)
        lines = drawn(figure)
        assert len(lines) == circuit.n_edges > 10
        assert all(line[0][1] < line[-1][1] for line in lines)
        assert sorted(map(name_of, one(figure, "edges").text)) == sorted(circuit.edge_names())

    def test_each_kind_has_its_colour_and_a_place_in_the_legend_if_it_is_there(self):
        figure = plot_component(circuit_of(*PATH))
        assert entries(figure) == ["read as query", "read as key", "read by MLP", "read by logits"]
        colours = {trace.name: trace.line.color for trace in figure.data if trace.name in KINDS}
        assert len(set(colours.values())) == 4

    def test_lines_up_one_column_go_round_the_nodes_between(self):
        graph = ComponentGraph(4, 2, 2)
        names = ("input->a0.h0<q>", "a0.h0->a3.h0<k>", "a0.h0->m0", "m0->m3", "a3.h0->logits", "m3->logits")
        figure = plot_component(circuit_of(*names, graph=graph))
        x = node_places(figure)["a0.h0"][0]
        (line,) = drawn(figure, "read as key")
        assert min(corner[0] for corner in line) < x - 0.4
        (line,) = [line for line in drawn(figure, "read by MLP") if line[0][0] == line[-1][0]]
        assert max(corner[0] for corner in line) > line[0][0] + 0.4

    def test_no_two_lines_between_the_same_nodes_are_touched_at_one_place(self):
        touch = one(plot_component(circuit_of("m0->a1.h1<q>", "m0->a1.h1<k>", "m0->a1.h1<v>")), "edges")
        assert len(set(zip(touch.x.round(3).tolist(), touch.y.round(3).tolist(), strict=True))) == 3

    def test_lines_are_the_wider_the_larger_the_score(self):
        values = dict(zip(PATH, (0.01, -0.1, 0.3, -1.0, 0.6), strict=True))
        figure = plot_component(circuit_of(*PATH), scores=scores_of(values))
        width = {trace.name: trace.line.width for trace in figure.data if trace.name in KINDS and segments(trace)}
        assert width == {"read as query": 1.0, "read as key": 1.8, "read by MLP": 3.2, "read by logits": 5.0}
        assert len(drawn(figure, "read by logits")) == 2
        assert entries(figure)[-4:] == ["|score| < 0.05", "≥ 0.05", "≥ 0.2", "≥ 0.5"]
        assert "a0.h1->a1.h2<k>  -0.1" in map(html.unescape, one(figure, "edges").text)

    def test_scores_that_are_no_effects_are_read_as_they_are(self):
        figure = plot_component(circuit_of(*PATH), scores=scores_of({PATH[0]: -9.0, PATH[3]: 1.0}, helpful=0))
        assert "score < 0.05" in entries(figure)
        (wide,) = [trace for trace in figure.data if trace.name in KINDS and segments(trace) and trace.line.width == 5]
        assert wide.name == "read by logits"

    def test_scores_of_zero_have_no_scale(self):
        figure = plot_component(circuit_of(*PATH), scores=scores_of({}))
        assert len(drawn(figure)) == 5
        assert not any("score" in name for name in entries(figure))


def name_of(text):
    return html.unescape(text).split("<br>")[0].split("  ")[0]


class TestMerging:
    def test_positions_of_an_edge_are_one_line_that_lists_them(self):
        names = ("input->a0.h1<k>@0", "input->a0.h1<k>@2", "a0.h1->logits@2")
        figure = plot_component(circuit_of(*names, graph=POSITIONS))
        assert len(drawn(figure)) == 2
        assert set(map(html.unescape, one(figure, "edges").text)) == {
            "input->a0.h1<k><br>2 positions: 0, 2",
            "a0.h1->logits<br>position 2",
        }
        assert about(figure, "a0.h1")[0] == "2 edges in, 1 out"

    def test_merged_edges_have_the_score_that_matters_most(self):
        names = ("input->a0.h1<k>@0", "input->a0.h1<k>@2", "a0.h1->logits@2")
        scores = scores_of(dict(zip(names, (0.5, -2.0, 1.0), strict=True)), graph=POSITIONS)
        text = one(plot_component(circuit_of(*names, graph=POSITIONS), scores=scores), "edges").text
        assert "input->a0.h1<k>  -2<br>2 positions: 0, 2" in map(html.unescape, text)

    def test_neurons_of_an_mlp_are_one_node(self):
        names = ("input->m0", "input->a0.h0<q>", "m0.n1->m1", "m0.n4->m1", "m1.n0->logits", "a0.h0->logits")
        figure = plot_component(circuit_of(*names, graph=NEURONS))
        assert set(node_places(figure)) == {"input", "a0.h0", "m0", "m1", "logits"}
        assert len(drawn(figure)) == 5
        texts = set(map(html.unescape, one(figure, "edges").text))
        assert {"m0->m1<br>2 neurons: n1, n4", "m1->logits<br>neuron n0", "a0.h0->logits", "input->m0"} <= texts

    def test_shared_keys_and_values_lead_to_the_heads_of_the_group_in_the_circuit(self):
        names = ("input->a0.kv1<k>", "input->a0.kv1<v>", "a0.h3->logits", "input->a0.h0<q>", "a0.h0->logits")
        figure = plot_component(circuit_of(*names, graph=GROUPED))
        places = node_places(figure)
        assert set(places) == {"input", "a0.kv1", "a0.h0", "a0.h3", "logits"}
        assert places["input"][1] < places["a0.kv1"][1] < places["a0.h3"][1]
        (link,) = drawn(figure, "shared keys, values")  # to a0.h3, not to a0.h2, which is not there
        assert (link[0], link[-1]) == (pytest.approx(places["a0.kv1"]), pytest.approx(places["a0.h3"]))
        assert not drawn(figure, "on no path")
        assert len(drawn(figure)) == 5
        assert about(figure, "a0.kv1")[:2] == ["shared by a0.h2, a0.h3", "2 edges in"]
        assert "a0.kv1" not in node_places(plot_component(circuit_of(*names[2:], graph=GROUPED)))


class TestLargeCircuits:
    @pytest.mark.parametrize("scored", [False, True])
    def test_few_traces_however_many_edges(self, scored):
        scores = None
        if scored:
            values = torch.randn(GPT2.shapes["edge"], generator=torch.Generator().manual_seed(1)) ** 5
            scores = Scores(GPT2, {"edge": values * GPT2.exists["edge"]}, PROVENANCE, -1)
        circuit = random_circuit(GPT2, 0.1)
        assert 3_000 < circuit.n_edges < 3_500
        start = time.perf_counter()
        figure = plot_component(circuit, scores=scores)
        assert time.perf_counter() - start < 2
        assert len(figure.data) <= (40 if scored else 20)
        assert len(figure.to_json()) < 2_000_000

    def test_without_scores_the_edges_nearest_to_the_logits_are_drawn_and_it_says_so(self, monkeypatch):
        monkeypatch.setattr(component_module, "MAX_LINES", 3)
        figure = plot_component(circuit_of(*PATH))
        assert len(drawn(figure)) == 3
        assert set(map(name_of, one(figure, "edges").text)) == {"a1.h2->logits", "m1->logits", "a0.h1->m1"}
        assert len(node_places(figure)) == 5  # nodes are those of the whole circuit
        assert about(figure, "a1.h2")[0] == "1 edge in, 1 out"
        assert figure.layout.title.subtitle.text.endswith("<br>only the 3 edges nearest to the logits are drawn, of 5")

    def test_with_scores_the_strongest_are_drawn(self, monkeypatch):
        monkeypatch.setattr(component_module, "MAX_LINES", 2)
        values = dict(zip(PATH, (-3.0, 0.1, 2.0, 0.2, 0.0), strict=True))
        figure = plot_component(circuit_of(*PATH), scores=scores_of(values))
        assert set(map(name_of, one(figure, "edges").text)) == {PATH[0], PATH[2]}
        assert "only the 2 strongest edges are drawn" in figure.layout.title.subtitle.text


class TestTitle:
    def test_gives_size_share_and_faithfulness_and_what_the_circuit_is_for(self):
        circuit = circuit_of(*PATH, faithfulness=0.91234, ablation="counterfactual", metric="kl")
        title = plot_component(circuit).layout.title
        assert GRAPH.n_edges == 17 + 82 + 11
        assert title.text == "Circuit of 5 of 110 edges (4.55%),<br>faithfulness 0.912"
        said = html.unescape(title.subtitle.text).replace("<br>", " · ")
        assert said == "'<s> there' · eap on tiny · metric kl · counterfactual ablation"

    def test_names_the_task_and_the_metric_of_the_scores_where_it_was_not_run(self):
        task = Task(clean=["a", "b"], corrupted=["c", "d"], name="ioi")
        circuit = replace(circuit_of(*PATH), provenance=replace(PROVENANCE, task=task))
        title = plot_component(circuit).layout.title
        assert title.text.endswith("not run")
        said = title.subtitle.text.replace("<br>", " · ")
        assert said == "ioi (2 pairs) · eap on tiny · metric logit_diff · zero ablation"

    def test_long_names_are_shortened_and_take_several_lines(self):
        provenance = replace(PROVENANCE, model="m" * 100, texts=("word " * 100,))
        lines = plot_component(replace(circuit_of(), provenance=provenance)).layout.title.subtitle.text.split("<br>")
        assert len(lines) == 3
        assert max(map(len, map(html.unescape, lines))) <= 60

    def test_hostile_names_are_shown_as_they_are(self):
        task = Task(clean=["a"], name="$x$ <img src=x>\n")
        provenance = replace(PROVENANCE, model="<script>alert(1)</script>", method="<b>", task=task)
        circuit = replace(circuit_of(*PATH), provenance=provenance, ablation="<i>", metric="<u>", faithfulness=0.5)
        figure = plot_component(circuit)
        subtitle = figure.layout.title.subtitle.text
        assert "<script>alert(1)</script>" in html.unescape(subtitle)
        written = " ".join([subtitle, *one(figure, "edges").text, *one(figure, "nodes").customdata])
        assert set(re.findall(r"<[^>]*>", written)) <= {"<br>", "<b>", "</b>"}
        assert "$" not in written
        assert "\n" not in written


def test_layers_are_the_ticks():
    axis = plot_component(circuit_of(*PATH)).layout.yaxis
    assert axis.ticktext == ("0", "1")
    assert axis.range[0] < -0.5 < 2.5 < axis.range[1]


def test_an_empty_circuit_has_no_lines_and_no_legend():
    figure = plot_component(circuit_of(), scores=scores_of({PATH[0]: 1.0}))
    assert drawn(figure) == []
    assert entries(figure) == []
    assert figure.layout.title.text == "Circuit of 0 of 110 edges (0%),<br>not run"


def test_another_graph_is_refused():
    graph = TokenGraph(n_layers=1, n_heads=1, n_pos=2)
    with pytest.raises(ValueError, match="must be one of a ComponentGraph to be drawn, got TokenGraph"):
        plot_component(Circuit(graph, graph.exists, PROVENANCE))


def test_scores_of_another_graph_or_not_finite_are_refused():
    with pytest.raises(ValueError, match="`scores` must be of the circuit's graph, ComponentGraph"):
        plot_component(circuit_of(*PATH), scores=scores_of({}, graph=GROUPED))
    with pytest.raises(ValueError, match="`scores` must be finite to be drawn, got 1 NaN or infinite"):
        plot_component(circuit_of(*PATH), scores=scores_of({PATH[0]: float("nan")}))
