"""Composition: parts and layers of circuits of every size, counted by hand and edge by edge."""

import html
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tracedensity.composition import Composition, composition
from tracedensity.curve import DensityCurve
from tracedensity.extract import Ranking
from tracedensity.graph import edge_at, unflatten
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import TokenGraph
from tracedensity.plot.composition import plot_composition
from tracedensity.plot.theme import COLOURS, DARK, SEQUENTIAL
from tracedensity.provenance import Provenance
from tracedensity.run import Conditions
from tracedensity.tight import TightCurve

TOKENS = TokenGraph(n_layers=2, n_heads=3, n_pos=4)  # 30 + 12 heads, 4 + 1 MLPs, 8 + 2 skips: 57 edges
COMPONENTS = ComponentGraph(n_layers=2, n_heads=4, n_kv_heads=2)
HOSTILE = ("<s>", " </script><script>alert(1)</script>", " \"quoted' & $x$", "\n\u202e")
GRAPHS = [
    pytest.param(TOKENS, id="tokens"),
    pytest.param(TokenGraph(3, 2, 3, has_mlp=False), id="no MLP"),
    pytest.param(TokenGraph(5, 1, 2, d_mlp=3), id="neurons"),
    pytest.param(COMPONENTS, id="components"),
    pytest.param(ComponentGraph(1, 2, 2, has_mlp=False), id="components, no MLP"),
    pytest.param(ComponentGraph(6, 2, 1, parallel=True, n_pos=2), id="positions"),
    pytest.param(ComponentGraph(3, 2, 2, d_mlp=2), id="components, neurons"),
]


def provenance(texts=("<s>", " there", " was", " was")):
    return Provenance("tiny", "abc", tuple(range(len(texts))), tuple(texts), "norm")


def ranked(graph, order, **about):
    """A ranking in which edges enter in this order, as numbers of the canonical one."""
    rank = torch.empty(graph.n_edges, dtype=torch.int32)
    rank[torch.as_tensor(order)] = torch.arange(graph.n_edges, dtype=torch.int32)
    return Ranking(graph, unflatten(graph, rank, -1), "greedy", provenance(**about))


def at_random(graph, seed=0, **about):
    return ranked(graph, torch.randperm(graph.n_edges, generator=torch.Generator().manual_seed(seed)), **about)


def named_first(graph, *names):
    """A ranking in which some edges come first."""
    places = {name: place for place, name in enumerate(names)}
    order = [places.get(edge_at(graph, number)[1], len(names)) for number in range(graph.n_edges)]
    assert sorted(order)[: len(names)] == list(range(len(names)))
    return ranked(graph, np.argsort(order, kind="stable"))


def curve_of(ranking, sizes, faithfulness):
    return DensityCurve(
        torch.tensor([*sizes, ranking.n_edges]), torch.tensor([*faithfulness, 1.0], dtype=torch.float64), ranking,
        (0.5,), "tv", Conditions(), entropy=1.0, top_token=0, top_text=" a", top_probability=0.5,
    )  # fmt: skip


def named_part_and_layer(graph, name):
    """The same from the name of an edge."""
    if isinstance(graph, TokenGraph):
        return {"a": "heads", "m": "MLPs", "r": "skip connections"}[name[0]], int(re.match(r".(\d+)", name)[1])
    writer, reader = name.split("->")
    layer = graph.n_layers - 1 if reader.startswith("logits") else int(re.match(r".(\d+)", reader)[1])
    return {"i": "embedding", "a": "heads", "m": "MLPs"}[writer[0]], layer


def counted(circuit):
    """Edges of a circuit by part and layer, one after another."""
    counts = {}
    for name in circuit.edge_names():
        key = named_part_and_layer(circuit.graph, name)
        counts[key] = counts.get(key, 0) + 1
    return counts


def told(made, point):
    layers = [[int(n) for n in row] for row in made.counts[point]]
    return {(part, layer): n for layer, row in enumerate(layers) for part, n in zip(made.parts, row, strict=True) if n}


class TestCounts:
    def test_parts_and_layers_by_hand(self):
        ranking = named_first(TOKENS, "r1.mlp@3", "m1@3", "a1.h2@0->3", "a0.h1@1->2")
        made = composition(ranking, [1, 2, 4])
        assert made.sizes.tolist() == [1, 2, 4, 57]
        assert {part: counts.tolist() for part, counts in made.by_part.items()} == {
            "heads": [0, 0, 2, 42],
            "MLPs": [0, 1, 1, 5],
            "skip connections": [1, 1, 1, 10],
        }
        assert made.by_quarter.tolist() == [[0, 1], [0, 2], [1, 3], [42, 15]]

    def test_components_count_by_writer_and_by_the_layer_that_reads(self):
        ranking = named_first(COMPONENTS, "input->logits", "a0.h1->a1.kv0<k>", "m0->m1", "a0.h1->m0")
        made = composition(ranking, [1, 2, 3, 4])
        # the embedding is read by all 19 readers; heads of layer 0 by 11, those of layer 1 by 2; the MLPs by 10 and 1
        assert {part: counts.tolist() for part, counts in made.by_part.items()} == {
            "embedding": [1, 1, 1, 1, 19],
            "heads": [0, 1, 1, 2, 4 * 11 + 4 * 2],
            "MLPs": [0, 0, 1, 1, 10 + 1],
        }
        # into layer 0: 8 from the embedding and 5 into the MLP; logits are the last layer's
        assert made.by_quarter.tolist() == [[0, 1], [0, 2], [0, 3], [1, 3], [13, 82 - 13]]

    @pytest.mark.parametrize("graph", GRAPHS)
    def test_as_counted_edge_by_edge(self, graph):
        ranking = at_random(graph)
        sizes = sorted({1, 2, 5, graph.n_edges // 2})
        made = composition(ranking, sizes)
        for point, size in enumerate([*sizes, graph.n_edges]):
            assert told(made, point) == counted(ranking.circuit(size))

    @pytest.mark.parametrize("graph", GRAPHS)
    def test_parts_and_quarters_add_up_to_the_size(self, graph):
        made = composition(at_random(graph, seed=1))
        assert (made.sizes.diff() > 0).all()
        assert int(made.sizes[-1]) == graph.n_edges
        assert torch.equal(sum(made.by_part.values()), made.sizes)
        assert torch.equal(made.by_quarter.sum(1), made.sizes)

    @pytest.mark.parametrize(
        ("n_layers", "expected"),
        [
            (1, [(0, 1)]),
            (3, [(0, 1), (1, 2), (2, 3)]),
            (4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
            (6, [(0, 1), (1, 3), (3, 4), (4, 6)]),
            (12, [(0, 3), (3, 6), (6, 9), (9, 12)]),
        ],
    )
    def test_quarters_are_as_equal_as_may_be(self, n_layers, expected):
        counts = torch.ones(1, n_layers, 2, dtype=torch.long)
        made = Composition(torch.tensor([2 * n_layers]), counts, ("heads", "MLPs"), "greedy", provenance())
        assert [(quarter.start, quarter.stop) for quarter in made.quarters] == expected

    def test_a_curve_gives_its_own_sizes_but_0(self):
        ranking = at_random(TOKENS)
        made = composition(curve_of(ranking, [0, 1, 7, 20], [0.0, 0.2, 0.5, 0.9]))
        assert made.sizes.tolist() == [1, 7, 20, 57]
        assert torch.equal(made.counts, composition(ranking, [1, 7, 20]).counts)

    def test_sizes_in_any_order_count_once(self):
        assert composition(at_random(TOKENS), [7, 2, 7]).sizes.tolist() == [2, 7, 57]

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [([0, 3], "at least 1, got 0"), ([3, 58], r"from 0 to 57, .* got \[58\]"), ([0.5], "whole numbers of edges")],
    )
    def test_sizes_that_no_circuit_has_are_refused(self, sizes, message):
        with pytest.raises(ValueError, match=message):
            composition(at_random(TOKENS), sizes)


class TestTight:
    first, other = at_random(TOKENS), at_random(TOKENS, seed=1)
    found = replace(at_random(TOKENS, seed=2).circuit(3), faithfulness=0.4)
    curve = TightCurve.of(
        curve_of(first, [1, 10, 30], [0.1, 0.5, 0.6]), [curve_of(other, [2, 10, 30], [0.2, 0.3, 0.9])], [found]
    )

    def test_each_point_is_a_circuit_of_its_own(self):
        made = composition(self.curve)
        assert made.sizes.tolist() == [1, 2, 3, 10, 30, 57]
        circuits = [self.first.circuit(1), self.other.circuit(2), self.found, self.first.circuit(10)]
        circuits += [self.other.circuit(30), self.first.circuit(57)]
        assert [told(made, point) for point in range(6)] == [counted(circuit) for circuit in circuits]

    def test_between_points_it_is_the_smaller_circuit_and_its_size(self):
        made = composition(self.curve, [5, 9, 12])
        assert made.sizes.tolist() == [3, 10, 57]
        assert told(made, 0) == counted(self.found)


def colours(figure):
    return set(re.findall("#[0-9A-Fa-f]{6}", figure.to_json()))


class TestFigure:
    made = composition(named_first(TOKENS, "r1.mlp@3", "m1@3", "a1.h2@0->3", "a0.h1@1->2"), [1, 2, 4])

    def test_areas_are_shares_that_add_up_to_100_percent(self):
        figure = plot_composition(self.made)
        for axis in ("y", "y2"):
            areas = [trace for trace in figure.data if trace.yaxis == axis]
            assert {trace.stackgroup for trace in areas} == {axis}
            assert all(list(trace.x) == [1, 2, 4, 57] for trace in areas)
            assert np.sum([trace.y for trace in areas], axis=0) == pytest.approx(100)
        heads = figure.data[0]
        assert heads.name == "heads"
        assert list(heads.y) == pytest.approx([0, 0, 50, 100 * 42 / 57])
        assert heads.text[2] == "heads 2 of 4 (50%, whole graph 73.7%)"

    def test_names_and_colours_say_part_and_layers(self):
        drawn = {trace.name: trace.fillcolor for trace in plot_composition(self.made).data}
        assert drawn == {
            "heads": COLOURS["head"],
            "MLPs": COLOURS["mlp"],
            "skip connections": COLOURS["residual"],
            "layer 0": SEQUENTIAL[1],
            "layer 1": SEQUENTIAL[4],
        }
        names = [trace.name for trace in plot_composition(composition(at_random(TokenGraph(12, 1, 2)))).data]
        assert names[3:] == ["layers 0-2", "layers 3-5", "layers 6-8", "layers 9-11"]

    def test_the_whole_graph_is_the_right_end_and_a_dotted_line_between_areas(self):
        layout = plot_composition(self.made).layout
        assert layout.xaxis.range == pytest.approx((0, np.log10(57)))
        assert layout.xaxis2.matches == "x"
        assert (layout.xaxis2.ticktext[-1], layout.xaxis2.tickvals[-1]) == ("100%", 57)
        dotted = [(line.yref, line.y0) for line in layout.shapes if line.visible]
        # heads, heads and MLPs; layer 0
        assert dotted == [
            ("y", pytest.approx(4200 / 57)),
            ("y", pytest.approx(4700 / 57)),
            ("y2", pytest.approx(4200 / 57)),
        ]
        assert "the whole graph" in layout.title.subtitle.text

    def test_title_names_the_prompt_and_how_edges_are_ordered(self):
        title = plot_composition(self.made).layout.title
        assert html.unescape(title.text).replace("<br>", " ") == "What circuits for '<s> there was was' are made of"
        assert title.subtitle.text.startswith("tiny · edges by norm, greedy · 57 edges")

    def test_a_tight_curve_is_drawn_in_steps(self):
        figure = plot_composition(TestTight.curve)
        assert {trace.line.shape for trace in figure.data} == {"hv"}
        assert "the best circuits known" in figure.layout.title.subtitle.text

    def test_a_curve_or_a_ranking_will_do(self):
        ranking = at_random(TOKENS)
        assert plot_composition(ranking) == plot_composition(composition(ranking))
        curve = curve_of(ranking, [1, 7], [0.2, 0.5])
        assert plot_composition(curve) == plot_composition(composition(curve))

    def test_in_the_dark_every_colour_is_another(self):
        light, dark = plot_composition(self.made), plot_composition(self.made, theme="dark")
        assert colours(light) <= set(DARK)
        assert colours(dark) == {DARK[colour] for colour in colours(light)}

    def test_hostile_text_is_shown_as_it_is(self):
        layout = plot_composition(at_random(TOKENS, texts=HOSTILE)).layout
        written = layout.title.text + layout.title.subtitle.text
        assert set(re.findall(r"<[^>]*>", written)) == {"<br>"}
        assert "$" not in written
        assert "\u202e" not in written
