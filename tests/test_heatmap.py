"""Heat maps: edges gathered by head and by token, by hand and edge by edge, and what is drawn of them."""

import html
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tracedensity.curve import DensityCurve
from tracedensity.extract import Ranking
from tracedensity.graph import edge_at, unflatten
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import TokenGraph
from tracedensity.groups import by_head, by_part, by_source, by_token
from tracedensity.plot.heatmap import plot_heatmap
from tracedensity.plot.theme import DARK, DIVERGING, SEQUENTIAL, colour_scale
from tracedensity.provenance import Provenance
from tracedensity.run import Conditions
from tracedensity.score import Scores
from tracedensity.summary import difference, summary

NAN = float("nan")
TOKENS = TokenGraph(n_layers=2, n_heads=3, n_pos=4)
LONGER = TokenGraph(n_layers=2, n_heads=3, n_pos=5)
COMPONENTS = ComponentGraph(n_layers=2, n_heads=4, n_kv_heads=2)
POSITIONS = ComponentGraph(n_layers=1, n_heads=2, n_kv_heads=2, n_pos=2)
HOSTILE = ("<s>", " </script><script>alert(1)</script>", " \"quoted' & $x$", "\n\u202e")
GRAPHS = {
    "tokens": TOKENS,
    "no MLP": TokenGraph(3, 2, 3, has_mlp=False),
    "neurons": TokenGraph(2, 1, 2, d_mlp=3),
    "components": COMPONENTS,
    "components, no MLP": ComponentGraph(2, 2, 2, has_mlp=False),
    "positions": ComponentGraph(3, 4, 2, n_pos=3),
    "positions, neurons": ComponentGraph(2, 2, 1, parallel=True, n_pos=2, d_mlp=2),
}


def provenance(texts=("<s>", " there", " was", " was"), method="norm", **about):
    return Provenance("tiny", "abc", tuple(range(len(texts))), tuple(texts), method, **about)


def about_tokens(graph):
    return provenance([f" t{pos}" for pos in range(getattr(graph, "n_pos", None) or 4)])


def numbers(graph, seed=0):
    """A number for each edge, and 99 where there is none."""
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: torch.rand(mask.shape, generator=generator).masked_fill(~mask, 99.0)
        for kind, mask in graph.exists.items()
    }


def ranked(graph, *first, about=None):
    """A ranking in which some edges come first, and the others in canonical order."""
    names = [edge_at(graph, number)[1] for number in range(graph.n_edges)]
    rank = torch.empty(graph.n_edges, dtype=torch.int32)
    order = [*map(names.index, first), *(number for number, name in enumerate(names) if name not in first)]
    rank[order] = torch.arange(graph.n_edges, dtype=torch.int32)
    return Ranking(graph, unflatten(graph, rank, -1), "greedy", about or about_tokens(graph))


def circuit_of(graph, *names, **fields):
    return replace(ranked(graph, *names).circuit(len(names)), **fields)


def scores_of(graph, values=0.0, **fields):
    filled = {kind: torch.full(mask.shape, values).masked_fill(~mask, 0.0) for kind, mask in graph.exists.items()}
    return Scores(graph, filled, about_tokens(graph), **fields)


def head_of(graph, name):
    """Row and column of an edge by its name."""
    found = re.match(r"a(\d+)\.h(\d+)|m(\d+)", name)
    if found is None:
        return None
    layer, head, mlp = found.groups()
    return (f"{layer}", f"h{head}") if mlp is None else (mlp, "MLP")


def token_of(graph, name):
    if isinstance(graph, TokenGraph):
        found = re.match(r"([am]\d+)\..*->(\d+)|([am]\d+)(?:\.n\d+)?@(\d+)", name)
        return found and tuple(part for part in found.groups() if part is not None)
    reader, pos = name.split("->")[1].split("@")
    return reader.split(".")[0], pos


def source_of(graph, name):
    return "all", graph.ends(*graph.edge_index(name))[0].split("@")[1]


class TestGroups:
    def test_edges_of_heads_by_hand(self):
        # in the last layer only what goes into the last token is an edge
        assert by_head(TOKENS).n_edges.tolist() == [[10, 10, 10, 4], [4, 4, 4, 1]]
        # a head of layer 0 is read by the MLP above, in layer 1 by 8 queries, keys, values and the MLP, by the logits
        assert by_head(COMPONENTS).n_edges.tolist() == [[11, 11, 11, 11, 10], [2, 2, 2, 2, 1]]
        assert by_head(COMPONENTS).columns == ("h0", "h1", "h2", "h3", "MLP")

    def test_edges_of_tokens_by_hand(self):
        assert by_token(TOKENS).rows == ("a0", "m0", "a1", "m1")
        assert by_token(TOKENS).n_edges.tolist() == [[3, 6, 9, 12], [1, 1, 1, 1], [0, 0, 0, 12], [0, 0, 0, 1]]
        # keys and values of both heads read the embedding at both tokens; the rest is read at the last one
        assert by_token(POSITIONS).rows == ("a0", "m0", "logits")
        assert by_token(POSITIONS).n_edges.tolist() == [[4, 6], [0, 3], [0, 4]]

    @pytest.mark.parametrize(
        ("grouped", "cell_of", "graph"),
        [
            pytest.param(grouped, cell_of, graph, id=f"{grouped.__name__}, {name}")
            for grouped, cell_of in ((by_head, head_of), (by_token, token_of), (by_source, source_of))
            for name, graph in GRAPHS.items()
            if grouped is by_head or isinstance(graph, TokenGraph) or (grouped is by_token and graph.n_pos is not None)
        ],
    )
    def test_sums_and_smallest_as_edge_by_edge(self, grouped, cell_of, graph):
        values, groups = numbers(graph), grouped(graph)
        found = {}
        for kind, mask in graph.exists.items():
            for index in map(tuple, mask.nonzero().tolist()):
                found.setdefault(cell_of(graph, graph.edge_name(kind, index)), []).append(float(values[kind][index]))
        found.pop(None, None)  # skip connections, and what the embedding writes
        cells = [[found.get((row, column), []) for column in groups.columns] for row in groups.rows]
        assert sum(len(cell) for row in cells for cell in row) == sum(map(len, found.values()))
        assert groups.n_edges.tolist() == [[len(cell) for cell in row] for row in cells]
        for reduced, one_by_one in ((groups.total(values), sum), (groups.least(values), min)):
            expected = [[one_by_one(cell) if cell else NAN for cell in row] for row in cells]
            np.testing.assert_allclose(reduced, expected, rtol=1e-6)

    def test_another_graph_is_refused(self, unchecked):
        for grouped in (by_part, by_head, by_token):
            with pytest.raises(ValueError, match="must be a TokenGraph or a ComponentGraph, got object"):
                grouped(object())


class TestSummary:
    def test_presence_counts_the_edges_of_a_circuit(self):
        circuit = circuit_of(TOKENS, "a0.h1@0->2", "a0.h1@1->2", "m0@2", "r0.attn@1", "a1.h2@0->3")
        assert summary(circuit).values.tolist() == [[0, 2, 0, 1], [0, 0, 1, 0]]
        by_tokens = summary(circuit, "token").values
        assert by_tokens[:2].tolist() == [[0, 0, 2, 0], [0, 0, 1, 0]]
        assert by_tokens[2:].isnan().tolist() == [[True, True, True, False]] * 2
        assert by_tokens[2:, 3].tolist() == [1, 0]

    def test_importance_is_the_sum_of_scores_and_of_effects_their_size(self):
        # a head of layer 0 has 10 edges; half of them have the other sign
        scores = scores_of(TOKENS, -0.5, helpful=-1)
        scores.values["head"][..., 0] *= -1
        made = summary(scores)
        assert made.values.tolist() == [[5, 5, 5, 2], [2, 2, 2, 0.5]]
        assert made.unit == "|effect on |"
        assert summary(replace(scores, helpful=0)).values[0].tolist() == [-1, -1, -1, -2]  # 4 * 0.5 - 6 * 0.5

    def test_entry_is_the_size_of_the_first_circuit_with_an_edge(self):
        ranking = ranked(COMPONENTS, "input->logits", "m1->logits", "a0.h3->m0", "a0.h3->m1", "a1.h0->logits")
        values = summary(ranking).values
        assert values[1, 4] == 2
        assert values[0, 3] == 3
        assert values[1, 0] == 5
        for row, column in ((0, 3), (1, 0), (1, 4), (0, 0)):
            size = int(values[row, column])
            presence = [summary(ranking.circuit(each)).values[row, column] for each in (size - 1, size)]
            assert presence == [0, 1]

    def test_a_curve_is_summed_up_as_its_ranking(self):
        curve = DensityCurve(
            torch.tensor([1, 57]), torch.tensor([0.5, 1.0]), ranked(TOKENS), (0.5,), "tv", Conditions(),
            entropy=1.0, top_token=0, top_text=" a", top_probability=0.5,
        )  # fmt: skip
        assert torch.equal(summary(curve).values, summary(curve.ranking).values)

    def test_scores_that_are_not_finite_are_refused(self):
        scores = scores_of(TOKENS, 1.0)
        scores.values["mlp"][0, 1] = torch.nan
        with pytest.raises(ValueError, match="must have finite scores to be summed up"):
            summary(scores)

    def test_differences_of_each_kind(self):
        # 2 of 10 edges against 1 of 15
        first, second = circuit_of(TOKENS, "a0.h0@0->2", "a0.h0@1->2"), circuit_of(LONGER, "a0.h0@0->4")
        assert difference(summary(first), summary(second))[0, 0] == pytest.approx(100 * (2 / 10 - 1 / 15))
        more = difference(summary(scores_of(TOKENS, 2.0)), summary(scores_of(TOKENS, 0.5)))
        assert more.tolist() == [[15, 15, 15, 6], [6, 6, 6, 1.5]]
        early, late = ranked(TOKENS, "a0.h2@0->0"), ranked(TOKENS, *["m0@0", "m0@1", "m0@2", "m0@3", "a0.h2@0->0"])
        assert difference(summary(early), summary(late))[0, 2] == pytest.approx(-np.log10(5))

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            pytest.param(ranked(TOKENS), "quantity of `result`, importance, got entry", id="type"),
            pytest.param(scores_of(TOKENS, helpful=1), r"unit of `result`, norm score, got \|effect", id="unit"),
            pytest.param(scores_of(COMPONENTS), "kind of graph .* TokenGraph, got ComponentGraph", id="graph"),
            pytest.param(scores_of(TokenGraph(3, 3, 4)), r"2 \(0 to 1\) x .*, got 3 \(0 to 2\) x", id="layers"),
            pytest.param(scores_of(TokenGraph(2, 4, 4, False)), r"\(h0 to MLP\), .* \(h0 to h3\)", id="heads"),
        ],
    )
    def test_what_cannot_be_compared_is_refused(self, second, message):
        with pytest.raises(ValueError, match=f"`minus` must .*{message}"):
            plot_heatmap(scores_of(TOKENS), minus=second)

    def test_prompts_of_different_lengths_cannot_be_compared_by_token(self):
        with pytest.raises(ValueError, match=r"must have .* 4 \(0 to 3\), got .* 5 \(0 to 4\). .* by head"):
            plot_heatmap(ranked(TOKENS), minus=ranked(LONGER), over="token")

    @pytest.mark.parametrize(
        ("result", "over", "message"),
        [
            (ranked(TOKENS), "layer", "`over` must be 'head' or 'token', got 'layer'"),
            (ranked(COMPONENTS), "token", "`over` must be 'head' for a component graph whose positions are summed"),
            ("circuit", "head", "`result` must be a Circuit, Scores, a Ranking or a DensityCurve, got str"),
        ],
    )
    def test_what_cannot_be_summed_up_is_refused(self, unchecked, result, over, message):
        with pytest.raises(ValueError, match=message):
            summary(result, over)


def map_of(figure):
    (drawn,) = [trace for trace in figure.data if trace.type == "heatmap"]
    return drawn


def colours(figure):
    return set(re.findall("#[0-9A-Fa-f]{6}", figure.to_json()))


class TestFigure:
    circuit = circuit_of(TOKENS, "a0.h1@0->2", "a0.h1@1->2", "m0@2", "a1.h2@0->3", "r0.attn@1")

    def test_heads_stand_across_and_mlps_apart(self):
        figure = plot_heatmap(self.circuit)
        drawn = map_of(figure)
        np.testing.assert_array_equal(drawn.z, [[0, 2, 0, NAN, 1], [0, 0, 1, NAN, 0]])
        assert list(drawn.x) == [-0.5, 0.5, 1.5, 2.5, 3.0, 4.0]  # the sides of the columns
        assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2", "MLP"]
        assert list(figure.layout.xaxis.tickvals) == [0, 1, 2, 3.5]
        assert list(figure.layout.yaxis.ticktext) == ["0", "1"]
        assert drawn.text[0][1] == "a0.h1<br>2 of 10 edges (20%)"
        assert drawn.text[0][4] == "m0<br>1 of 4 edges (25%)"
        assert (drawn.zmin, drawn.zmax) == (0, 2)

    def test_without_mlps_there_is_no_column_for_them(self):
        figure = plot_heatmap(ranked(TokenGraph(3, 2, 3, has_mlp=False)))
        assert map_of(figure).z.shape == (3, 2)
        assert list(figure.layout.xaxis.ticktext) == ["0", "1"]

    def test_tokens_stand_across_and_cells_without_edges_are_crossed(self):
        figure = plot_heatmap(self.circuit, over="token")
        drawn = map_of(figure)
        np.testing.assert_array_equal(drawn.z[:3], [[0, 0, 2, 0], [0, 0, 1, 0], [NAN, NAN, NAN, 1]])
        (crosses,) = [trace for trace in figure.data if trace.type == "scatter"]
        places = set(zip(crosses.x.tolist(), crosses.y.tolist(), strict=True))
        assert places == {(pos, row) for pos in range(3) for row in (2, 3)}
        assert list(figure.layout.yaxis.ticktext) == ["a0", "m0", "a1", "m1"]
        assert list(figure.layout.xaxis.ticktext) == ["·t0", "·t1", "·t2", "·t3"]
        assert drawn.text[0][2] == "a0 at ' t2' (2)<br>2 of 9 edges (22.2%)"
        assert drawn.text[3][0] == "m1 at ' t0' (0)<br>no edges"
        assert figure.layout.title.subtitle.text.endswith("crosses: nothing there reaches the prediction")

    def test_what_enters_early_is_strong_and_the_bar_counts_edges(self):
        drawn = map_of(plot_heatmap(ranked(TOKENS, "m1@3", "a0.h0@0->0")))
        assert drawn.z[1][4] == 0  # log10 of 1
        assert drawn.z[0][0] == pytest.approx(np.log10(2))
        assert [list(each) for each in drawn.colorscale] == colour_scale(SEQUENTIAL[::-1])
        assert list(drawn.colorbar.ticktext) == ["1", "10"]
        assert list(drawn.colorbar.tickvals) == [0, 1]
        assert drawn.text[0][0] == "a0.h0<br>in circuits of 2 edges or more (3.51%)"

    def test_title_names_the_prompt_and_how_edges_are_ordered(self):
        title = plot_heatmap(ranked(COMPONENTS, about=provenance())).layout.title
        assert title.text == "Circuit size at which each head enters"
        assert html.unescape(title.subtitle.text).split("<br>") == [
            "'<s> there was was' · norm on tiny, greedy · 82 edges",
            "edges are those that a head or MLP writes",
        ]

    def test_importance_is_written_with_its_unit(self):
        drawn = map_of(plot_heatmap(scores_of(TOKENS, 0.25)))
        assert drawn.text[0][0] == "a0.h0<br>2.5, sum of norm score of 10 edges"
        assert drawn.colorbar.title.text == "sum of norm score"

    def test_the_first_of_two_is_blue_where_it_has_more_or_is_earlier(self):
        assert DIVERGING[0] < DIVERGING[-1]  # "#0...": blue
        more = map_of(plot_heatmap(scores_of(TOKENS, 2.0), minus=scores_of(TOKENS, 0.5)))
        assert (more.z[0][0], more.zmin, more.zmax) == (15, -15, 15)
        assert more.colorscale[-1][1] == DIVERGING[0]
        early = map_of(plot_heatmap(ranked(TOKENS, "m1@3"), minus=ranked(TOKENS)))
        assert early.z[1][4] < 0
        assert early.colorscale[0][1] == DIVERGING[0]

    def test_ratios_of_sizes_are_ticks(self):
        first, second = ranked(TOKENS, "m1@3"), ranked(TOKENS)
        bar = map_of(plot_heatmap(first, minus=second)).colorbar
        assert list(bar.ticktext) == ["10x earlier", "same", "10x later"]
        assert list(bar.tickvals) == pytest.approx([-1, 0, 1])
        near = ranked(TOKENS, "r0.attn@0", "r0.attn@1", "m1@3")  # three times as large
        bar = map_of(plot_heatmap(first, minus=near)).colorbar
        assert list(bar.ticktext) == ["2x earlier", "same", "2x later"]

    def test_circuits_of_prompts_of_different_lengths_are_compared_by_head(self):
        figure = plot_heatmap(self.circuit, minus=circuit_of(LONGER, "a0.h1@0->4"))
        drawn = map_of(figure)
        assert drawn.z[0][1] == pytest.approx(100 * (2 / 10 - 1 / 15))
        assert drawn.text[0][1] == "a0.h1<br>first: 2 of 10 edges (20%)<br>second: 1 of 15 edges (6.67%)"
        lines = html.unescape(figure.layout.title.subtitle.text).split("<br>")
        assert lines == [
            "first: ' t0 t1 t2 t3' · norm on tiny · 5 of 57 edges",
            "second: ' t0 t1 t2 t3 t4' · norm on tiny · 1 of 78 edges",  # 3 * 15 and 3 * 5 heads, 3 * 5 and 3 others
        ]

    def test_two_prompts_of_one_length_are_both_named(self):
        other = ranked(TOKENS, about=provenance((" t0", " x", " t2", " t3")))
        text = map_of(plot_heatmap(ranked(TOKENS), minus=other, over="token")).text
        assert text[0][1].startswith("a0 at ' t1' / ' x' (1)<br>first: ")

    def test_many_tokens_have_room_and_not_all_are_named(self):
        figure = plot_heatmap(ranked(TokenGraph(1, 1, 100)), over="token")
        assert figure.layout.xaxis.tickangle == -90
        assert list(figure.layout.xaxis.tickvals) == list(range(1, 100, 2))  # the last one always
        assert figure.layout.xaxis.title.text == "token (one in 2 is named)"
        assert figure.layout.meta["min_width"] == figure.layout.width >= 90 + 15 * 100
        assert plot_heatmap(self.circuit, over="token").layout.width is None

    def test_many_heads_are_not_all_named(self):
        axis = plot_heatmap(ranked(ComponentGraph(1, 32, 32))).layout.xaxis
        assert list(axis.ticktext) == [*map(str, range(0, 32, 3)), "MLP"]

    def test_a_result_without_texts_counts_its_tokens(self):
        figure = plot_heatmap(ranked(TOKENS, about=provenance(())), over="token")
        assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2", "3"]

    @pytest.mark.parametrize("over", ["head", "token"])
    @pytest.mark.parametrize("minus", [None, ranked(TOKENS, "m0@0")])
    def test_in_the_dark_every_colour_is_another(self, over, minus):
        light, dark = (plot_heatmap(ranked(TOKENS), over=over, minus=minus, theme=theme) for theme in ("light", "dark"))
        assert colours(light) <= set(DARK)
        assert colours(dark) == {DARK[colour] for colour in colours(light)}

    def test_hostile_text_is_shown_as_it_is(self):
        about = provenance(HOSTILE, method="<b>m</b>$", metric="<i>$")
        scores = replace(scores_of(TOKENS, 1.0, helpful=1), provenance=about)
        for over in ("head", "token"):
            figure = plot_heatmap(scores, over=over, minus=scores)
            drawn = map_of(figure)
            written = " ".join([
                figure.layout.title.text, figure.layout.title.subtitle.text, *figure.layout.xaxis.ticktext,
                drawn.colorbar.title.text, *np.ravel(drawn.text),
            ])  # fmt: skip
            assert set(re.findall(r"<[^>]*>", written)) == {"<br>"}
            assert "$" not in written
            assert "\n" not in written
            assert "\u202e" not in written

    def test_a_circuit_of_nothing_is_drawn_too(self):
        drawn = map_of(plot_heatmap(Circuit(TOKENS, circuit_of(TOKENS).kept, provenance())))
        assert (drawn.zmin, drawn.zmax) == (0, 1)
