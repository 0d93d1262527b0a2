"""Figures of circuits on the token graph: one line per edge, where and how wide; the slider; two circuits compared."""

import base64
import html
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import (
    CURVE,
    GRAPH,
    HOSTILE,
    PROVENANCE,
    curve_of,
    make_circuit,
    make_curve,
    provenance,
    segments,
    traces,
    whole,
)

from tracedensity.extract import Ranking
from tracedensity.graph import flatten, unflatten
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import TokenGraph
from tracedensity.plot import plot_circuit, plot_difference, plot_growth, theme
from tracedensity.plot.edges import strongest
from tracedensity.plot.slider import compact
from tracedensity.score import Scores
from tracedensity.tight import TightCurve
from tracedensity.unembedding import TopTokens

NAMES = ("a0.h1@0->2", "m0@2", "r0.attn@1", "r1.mlp@3")
KINDS = ("head", "MLP", "skip connection")


def scores_of(values, graph=GRAPH, helpful=0):
    """Scores of the named edges, and zero for all others."""
    filled = {kind: torch.zeros(shape) for kind, shape in graph.shapes.items()}
    for name, value in values.items():
        kind, index = graph.edge_index(name)
        filled[kind][index] = value
    return Scores(graph, filled, PROVENANCE, helpful)


def lines(figure, name):
    """All lines of a kind or group, whatever their width."""
    return [line for trace in traces(figure, name) if trace.mode == "lines" for line in segments(trace) if line]


def told(figure, kind):
    """What the mouse is told of each edge of a kind, where it is touched."""
    (trace,) = traces(figure, f"{kind}, under the mouse")
    return [list(row) for row, x in zip(trace.customdata, trace.x, strict=False) if not np.isnan(x)]


def n_drawn(figure):
    return sum(len(lines(figure, kind)) for kind in KINDS)


class TestEdges:
    def test_each_is_one_line_from_its_source_to_its_target(self):
        figure = plot_circuit(make_circuit(*NAMES))
        assert lines(figure, "head") == [[(0, 0), (2, 1)]]  # from the embedding of token 0 to token 2 after attention
        assert lines(figure, "skip connection") == [[(1, 0), (1, 1)], [(3, 3), (3, 4)]]
        ((bottom, top),) = lines(figure, "MLP")
        assert bottom[0] == top[0] > 2
        assert 1 < bottom[1] < top[1] < 2
        ((first, *_, last),) = lines(figure, "MLP, its way")
        assert (first, last) == ((2, 1), (2, 2))

    @pytest.mark.parametrize("has_mlp", [True, False])
    def test_as_many_lines_as_edges_of_each_kind(self, has_mlp):
        graph = TokenGraph(3, 2, 5, has_mlp)
        circuit = whole(graph)
        figure = plot_circuit(circuit)
        composition = circuit.composition()
        assert len(lines(figure, "head")) == composition["head"]
        assert len(lines(figure, "skip connection")) == composition["resid_attn"] + composition.get("resid_mlp", 0)
        assert len(lines(figure, "MLP")) == composition.get("mlp", 0)
        assert sum(len(told(figure, kind)) for kind in KINDS if traces(figure, f"{kind}, under the mouse")) == (
            graph.n_edges
        )
        (states,) = traces(figure, "state")
        assert len(states.x) == graph.n_nodes - 1  # all but the prediction, which has its own mark
        (prediction,) = traces(figure, "prediction")
        assert (prediction.x[0], prediction.y[0]) == (4, 6 if has_mlp else 3)
        assert figure.layout.yaxis.ticktext == ("0", "1", "2")

    def test_each_kind_has_its_colour(self):
        figure = plot_circuit(make_circuit(*NAMES))
        for kind, colour in zip(KINDS, ("head", "mlp", "residual"), strict=True):
            assert {trace.line.color for trace in traces(figure, kind)} == {theme.COLOURS[colour]}

    def test_heads_between_the_same_tokens_lie_side_by_side(self):
        figure = plot_circuit(make_circuit("a1.h0@1->3", "a1.h1@1->3", "a1.h2@1->3", "a1.h2@0->3"))
        ways = lines(figure, "head")
        assert {(way[0], way[-1]) for way in ways} == {((1, 2), (3, 3)), ((0, 2), (3, 3))}
        middles = sorted(way[2] for way in ways if len(way) == 5)
        assert [x for x, _ in middles] == [2, 2, 2]
        # 0.14 rows apart, the middle one straight
        assert [y for _, y in middles] == pytest.approx([2.36, 2.5, 2.64])

    def test_a_head_that_stays_on_its_token_keeps_off_the_skip_connection(self):
        (line,) = lines(plot_circuit(make_circuit("a0.h0@2->2")), "head")
        assert (line[0], line[-1]) == ((2, 0), (2, 1))
        assert min(x for x, _ in line) < 2

    def test_no_two_edges_are_touched_at_the_same_place(self):
        figure = plot_circuit(whole(TokenGraph(2, 3, 12)))
        places = [
            place
            for kind in KINDS
            for place in zip(
                *(traces(figure, f"{kind}, under the mouse")[0][axis].round(4).tolist() for axis in "xy"), strict=True
            )
        ]
        assert len(set(places)) == len(places) == TokenGraph(2, 3, 12).n_edges

    def test_only_states_of_the_circuit_have_dots(self):
        (states,) = traces(plot_circuit(make_circuit("a0.h1@0->2", "m0@2")), "state")
        assert set(zip(states.x.tolist(), states.y.tolist(), strict=True)) == {(0, 0), (2, 1), (2, 2)}

    def test_neurons_of_one_mlp_are_one_bar(self):
        graph = TokenGraph(2, 2, 3, True, 5)
        circuit = make_circuit("m0.n1@2", "m0.n3@2", "m1.n0@2", graph=graph)
        figure = plot_circuit(circuit, scores=scores_of({"m0.n1@2": 0.5, "m0.n3@2": 2.0}, graph))
        assert len(lines(figure, "MLP")) == 2
        assert told(figure, "MLP") == [
            ["m0: 2 of 5 neurons", "' t2' (2)", "2"], ["m1: 1 of 5 neurons", "' t2' (2)", "0"],
        ]  # fmt: skip


class TestWhatIsKnown:
    def test_the_mouse_is_told_name_way_score_entry_and_what_the_edge_says(self):
        ranking = make_curve([1], [0.5]).ranking
        tokens = TopTokens(
            GRAPH,
            {"head": torch.full((2, 3, 4, 2), -1), "mlp": torch.full((2, 4, 2), -1)},
            {7: " head", 8: "<b>"},
        )
        tokens.tokens["head"][0, 1, 0] = torch.tensor([7, 8])  # layer 0, head 1, reading token 0
        circuit = make_circuit(*NAMES)
        figure = plot_circuit(circuit, scores=scores_of({NAMES[0]: -0.25}), ranking=ranking, tokens=tokens)
        entry = int(ranking.rank["head"][0, 1, 2, 0]) + 1
        assert told(figure, "head") == [["a0.h1", "' t0' (0) → ' t2' (2)", "-0.25", entry, "says ' head', '&lt;b&gt;'"]]
        assert told(figure, "MLP")[0][:2] == ["m0", "' t2' (2)"]
        assert [row[0] for row in told(figure, "skip connection")] == ["skip around attention 0", "skip around MLP 1"]
        (trace,) = traces(figure, "head, under the mouse")
        assert trace.hovertemplate == (
            "<b>%{customdata[0]}</b><br>%{customdata[1]}<br>score %{customdata[2]}<br>"
            "in circuits from %{customdata[3]:,} edges on<br>%{customdata[4]}<extra></extra>"
        )

    def test_more_important_edges_are_wider_and_the_legend_says_how_wide(self):
        # shares of the strongest: 1, 0.3, 0.1, 0.01
        values = {"a0.h0@0->1": -2.0, "a0.h0@0->2": 0.6, "a0.h0@0->3": 0.2, "m0@1": 0.02}
        figure = plot_circuit(make_circuit(*values), scores=scores_of(values, helpful=-1))
        by_end = {
            line[-1][0]: trace.line.width
            for trace in traces(figure, "head") if not trace.showlegend for line in segments(trace)
        }  # fmt: skip
        assert by_end == {1: 5.0, 2: 3.2, 3: 1.8}
        entries = [trace.name for trace in figure.data if trace.showlegend]
        assert entries == ["head", "MLP", "|score| < 0.1", "≥ 0.1", "≥ 0.4", "≥ 1"]

    def test_without_scores_the_legend_names_kinds_only(self):
        figure = plot_circuit(make_circuit(*NAMES))
        assert [trace.name for trace in figure.data if trace.showlegend] == list(KINDS)

    @pytest.mark.parametrize("what", ["scores", "ranking", "tokens"])
    def test_what_is_of_another_graph_is_refused(self, what):
        graph = TokenGraph(2, 3, 5)
        other = {
            "scores": scores_of({}, graph),
            "ranking": scores_of({}, graph).rank("top"),
            "tokens": TopTokens(graph, {}, {}),
        }[what]
        with pytest.raises(ValueError, match=f"`{what}` must be of the circuit's graph"):
            plot_circuit(make_circuit(*NAMES), **{what: other})

    def test_nan_is_refused(self):
        with pytest.raises(ValueError, match="`scores` must be finite to be drawn, got 1 NaN"):
            plot_circuit(make_circuit(*NAMES), scores=scores_of({"m0@2": float("nan")}))

    def test_another_graph_is_refused(self):
        graph = ComponentGraph(1, 1, 1)
        with pytest.raises(ValueError, match="must be one of a TokenGraph to be drawn, got ComponentGraph"):
            plot_circuit(Circuit(graph, graph.exists, PROVENANCE))


class TestLargeCircuits:
    def test_the_strongest_edges_are_drawn(self):
        values = dict(zip(("m0@0", "m0@1", "m0@2", "m0@3", "m1@3"), range(1, 6), strict=True))
        drawn, which = strongest(whole(GRAPH), scores_of(values), None, 3)
        assert set(drawn.edge_names()) == {"m0@2", "m0@3", "m1@3"}
        assert which == "the 3 strongest"

    def test_without_scores_those_that_enter_first_or_are_nearest_to_the_prediction(self):
        ranking = CURVE.ranking
        drawn, which = strongest(whole(GRAPH), None, ranking, 4)
        assert drawn.edge_names() == ranking.circuit(4).edge_names()
        assert which == "the 4 that enter first"
        drawn, which = strongest(whole(GRAPH), None, None, 2)
        assert set(drawn.edge_names()) == {"m1@3", "r1.mlp@3"}  # into the prediction
        assert which == "the 2 nearest to the prediction"

    def test_ten_thousand_edges_are_few_traces(self):
        generator = torch.Generator().manual_seed(0)
        graph = TokenGraph(12, 12, 64)
        scores = {kind: torch.rand(shape, generator=generator) for kind, shape in graph.shapes.items()}
        many = Circuit(graph, graph.exists, provenance([f" t{i}" for i in range(64)]))
        figure = plot_circuit(many, scores=Scores(graph, scores, PROVENANCE))
        assert graph.n_edges > 250_000
        assert n_drawn(figure) == 10_000
        assert f"of {graph.n_edges:,} edges only the 10,000 strongest are drawn" in figure.layout.title.subtitle.text
        assert len(figure.data) <= 30
        assert len(figure.to_json()) < 3_000_000


class TestFrame:
    def test_tokens_are_the_ticks_and_those_that_are_not_read_are_grey(self):
        circuit = Circuit(GRAPH, make_circuit("a0.h1@1->2").kept, PROVENANCE)
        axis = plot_circuit(circuit).layout.xaxis
        assert list(axis.tickvals) == [0, 1, 2, 3]
        plain = [html.unescape(re.sub("<[^>]*>", "", text)) for text in axis.ticktext]
        assert plain == ["<s>", "·there", "·was", "·was"]
        assert ["color" in text for text in axis.ticktext] == [True, False, True, True]

    @pytest.mark.parametrize(
        ("n_pos", "width", "angle"), [(4, None, 0), (10, None, 0), (12, None, -90), (40, 690, -90), (200, 1095, -90)]
    )
    def test_many_tokens_have_the_room_that_their_names_need(self, n_pos, width, angle):
        layout = plot_circuit(whole(TokenGraph(2, 1, n_pos))).layout
        assert layout.width == width  # 90 px and 15 for each name; 67 of 200 are named
        assert layout.xaxis.tickangle == angle
        assert layout.xaxis.tickvals[-1] == n_pos - 1

    def test_title_gives_size_share_faithfulness_and_prompt(self):
        circuit = Circuit(GRAPH, make_circuit("m0@1", "m0@2").kept, PROVENANCE, faithfulness=0.91234)
        title = plot_circuit(circuit).layout.title
        assert title.text == "Circuit of 2 of 57 edges (3.51%),<br>faithfulness 0.912"
        assert html.unescape(title.subtitle.text) == "'<s> there was was' · norm on tiny"
        assert plot_circuit(make_circuit("m0@1")).layout.title.text.endswith("not run")

    def test_the_predicted_token_is_written_where_it_is_known(self):
        (mark,) = traces(plot_circuit(make_circuit("m0@1"), prediction=" <b>"), "prediction")
        assert mark.text[0] == "<b>' &lt;b&gt;'</b>"

    def test_an_empty_circuit_is_drawn_too(self):
        figure = plot_circuit(make_circuit(), scores=scores_of({}))
        assert n_drawn(figure) == 0
        assert len(traces(figure, "prediction")) == 1

    def test_in_the_dark_every_colour_is_its_counterpart(self):
        light, dark = (plot_circuit(make_circuit(*NAMES), theme=each).to_json() for each in ("light", "dark"))
        found = set(re.findall("#[0-9A-F]{6}", light))
        assert found <= set(theme.DARK)
        assert set(re.findall("#[0-9A-F]{6}", dark)) == {theme.DARK[colour] for colour in found}


def arrays(figure, step):
    """The data that a step of the slider puts in place: for each trace its x, decoded."""
    args = figure.layout.sliders[0].steps[step].args
    return [
        np.frombuffer(base64.b64decode(x["bdata"]), "<f4") if "bdata" in x else np.array(x) for x in args[0]["x"]
    ], args


def n_lines(figure, step):
    """How many edges a step draws."""
    xs, args = arrays(figure, step)
    names = [figure.data[place].name for place in args[2]]
    return sum(int(np.isnan(x).sum()) for x, name in zip(xs, names, strict=True) if name in KINDS)


class TestGrowth:
    def test_each_step_draws_as_many_lines_as_its_circuit_has_edges(self):
        figure = plot_growth(CURVE)
        (slider,) = figure.layout.sliders
        # 1.5 times the one before, or minimal at a threshold: 4 at 0.5 and 20 at 0.9
        assert [step.label for step in slider.steps] == ["1", "4", "8", "16", "20", "57"]
        assert [n_lines(figure, step) for step in range(6)] == [1, 4, 8, 16, 20, 57]

    def test_it_begins_with_the_circuit_that_is_asked_for(self):
        figure = plot_growth(CURVE, faithfulness=0.5)
        assert figure.layout.sliders[0].active == 1
        assert n_drawn(figure) == 4
        assert figure.layout.title.text.startswith("Circuit of 4 of 57 edges")
        for shown, x in zip(figure.data, arrays(figure, 1)[0], strict=False):
            assert np.array_equal(np.asarray(shown.x, dtype=np.float64), x.astype(float), equal_nan=True)

    def test_every_step_says_how_faithful_its_circuit_is_on_as_many_lines(self):
        steps = plot_growth(CURVE).layout.sliders[0].steps
        titles = [step.args[1]["title.text"] for step in steps]
        assert titles[2] == "Circuit of 8 of 57 edges (14%),<br>faithfulness 0.375"
        assert {title.count("<br>") for title in titles} == {1}

    def test_edges_are_touched_where_they_are_drawn_and_keep_what_is_said_of_them(self):
        figure = plot_growth(CURVE)
        xs, args = arrays(figure, 3)
        circuit = CURVE.circuit(size=16)
        for place, x in zip(args[2], xs, strict=True):
            trace = figure.data[place]
            if trace.name == "head, under the mouse":
                said = [row for row, at in zip(trace.customdata, x, strict=False) if not np.isnan(at)]
                names = {
                    f"{row[0]}@{re.findall(r'[(](.)[)]', row[1])[0]}->{re.findall(r'[(](.)[)]', row[1])[1]}"
                    for row in said
                }
                assert names == {name for name in circuit.edge_names() if name.startswith("a")}

    def test_circuits_of_a_tight_curve_need_not_be_nested(self):
        found = make_circuit("m0@0", "m1@3", faithfulness=0.5)
        figure = plot_growth(TightCurve.of(CURVE, (), (replace(found, provenance=PROVENANCE),)))
        labels = [step.label for step in figure.layout.sliders[0].steps]
        assert labels[:2] == ["1", "2"]
        assert n_lines(figure, 1) == 2

    def test_of_large_circuits_the_strongest_edges_are_drawn(self):
        figure = plot_growth(CURVE, max_edges=10)
        # of the larger ones only the minimal circuits and the whole graph
        assert [step.label for step in figure.layout.sliders[0].steps] == ["1", "4", "8", "20", "57"]
        assert [n_lines(figure, step) for step in range(5)] == [1, 4, 8, 10, 10]
        title = figure.layout.sliders[0].steps[-1].args[1]["title.text"]
        assert title == "Circuit of 57 of 57 edges (100%),<br>faithfulness 1.000, first 10 drawn"

    @pytest.mark.parametrize("wrong", [0, 10_001])
    def test_no_other_number_of_edges(self, wrong):
        with pytest.raises(ValueError, match="`max_edges` must be from 1 to 10,000, got"):
            plot_growth(CURVE, max_edges=wrong)


class TestCompact:
    """What a page makes of the slider: the points of a nested family once, and how many of them each step shows."""

    def test_each_step_is_the_first_so_many_points_of_what_is_there(self):
        figure = plot_growth(CURVE, scores=scores_of({"m0@1": 1.0}))
        made = compact(figure)
        whole = [np.frombuffer(base64.b64decode(trace["x"]["bdata"]), "<f4") for trace in made.layout.meta["whole"]]
        for step, short in enumerate(made.layout.sliders[0].steps):
            xs, args = arrays(figure, step)
            assert short.method == "skip"
            style = short.args[0]
            assert set(style) == {"counts", "opacity", "line.width"}
            assert tuple(short.args[1:]) == tuple(args[1:])
            for x, points, count in zip(xs, whole, style["counts"], strict=True):
                assert np.array_equal(points[:count], x, equal_nan=True)

    def test_it_is_smaller(self):
        graph = TokenGraph(4, 4, 20)
        rank = unflatten(graph, torch.arange(graph.n_edges, dtype=torch.int32).flip(0), -1)
        about = provenance([f" t{place}" for place in range(20)])
        figure = plot_growth(curve_of(Ranking(graph, rank, "top", about)))
        assert len(compact(figure).to_json()) < 0.9 * len(figure.to_json())

    def test_circuits_that_are_not_nested_stay_as_they_are(self):
        found = make_circuit("m0@0", "m1@3", faithfulness=0.5)
        figure = plot_growth(TightCurve.of(CURVE, (), (replace(found, provenance=PROVENANCE),)))
        assert compact(figure) is figure

    def test_so_does_a_figure_without_a_slider(self):
        figure = plot_circuit(make_circuit(*NAMES))
        assert compact(figure) is figure


class TestDifference:
    FIRST = make_circuit("m0@1", "a0.h1@0->2", "r1.mlp@3")
    SECOND = make_circuit("m0@1", "a0.h2@0->2", "a1.h0@3->3")

    def test_edges_are_coloured_by_who_has_them(self):
        figure = plot_difference(self.FIRST, self.SECOND, names=("norm", "flow"))
        assert len(lines(figure, "both")) == 1
        assert len(lines(figure, "only norm")) == 2
        assert len(lines(figure, "only flow")) == 2
        colours = [trace.line.color for trace in figure.data if trace.showlegend]
        assert colours == [theme.MUTED, theme.COLOURS["head"], theme.COLOURS["mlp"]]

    def test_title_counts_them(self):
        title = plot_difference(self.FIRST, self.SECOND).layout.title
        assert title.text.replace("<br>", " ") == "1 edges of both, 2 only of first, 2 only of second"
        assert "Jaccard overlap 0.20" in title.subtitle.text

    def test_where_there_are_too_many_those_of_one_circuit_come_first(self):
        figure = plot_difference(whole(GRAPH), self.FIRST, max_edges=54)
        assert len(lines(figure, "only first")) == 54  # all but three
        figure = plot_difference(self.FIRST, self.SECOND, max_edges=4)
        assert [len(lines(figure, name)) for name in ("both", "only first", "only second")] == [0, 2, 2]
        assert "4 of 5 edges are drawn, those of one circuit only first" in figure.layout.title.subtitle.text

    def test_tokens_that_differ_are_both_named(self):
        other = replace(self.SECOND, provenance=provenance([" t0", " else", " t2", " t3"]))
        axis = plot_difference(self.FIRST, other).layout.xaxis
        assert [re.sub("<[^>]*>", "", text) for text in axis.ticktext] == ["·t0", "·t1·/··else", "·t2", "·t3"]

    def test_on_the_component_graph_too(self):
        graph = ComponentGraph(n_layers=2, n_heads=4, n_kv_heads=4)
        flat = torch.zeros(3, graph.n_edges, dtype=torch.bool)
        flat[0, [0, 3, 7, 9]] = True
        flat[1, [0, 9, 12]] = True
        first, second = (Circuit(graph, unflatten(graph, kept, False), PROVENANCE) for kept in flat[:2])
        figure = plot_difference(first, second)
        counts = {name: len(lines(figure, name)) for name in ("both", "only first", "only second")}
        assert counts == {"both": 2, "only first": 2, "only second": 1}

    def test_circuits_of_different_graphs_are_compared_by_head_elsewhere(self):
        other = whole(TokenGraph(2, 3, 5))
        with pytest.raises(
            ValueError, match=r"same graph as the first, .* compared by `plot_heatmap\(first, minus=second\)`"
        ):
            plot_difference(self.FIRST, other)


@pytest.mark.parametrize(
    "draw", [plot_growth, lambda curve: plot_difference(curve.circuit(size=4), curve.circuit(size=8))]
)
def test_hostile_text_is_shown_as_it_is(draw):
    curve = make_curve([0, 4, 8], [0.0, 0.9, 0.95], texts=HOSTILE, top_text="<img src=x onerror=alert(2)>")
    figure = draw(curve)
    written = " ".join([
        figure.layout.title.text, figure.layout.title.subtitle.text, *figure.layout.xaxis.ticktext,
        *(str(cell) for trace in figure.data if trace.customdata is not None for cell in np.ravel(trace.customdata)),
        *(text for trace in figure.data for text in trace.text or ()),
    ])  # fmt: skip
    assert set(re.findall(r"<[^>]*>", written)) <= {
        "<br>",
        "<b>",
        "</b>",
        f'<span style="color:{theme.MUTED}">',
        "</span>",
    }
    assert "$" not in written
    assert "\n" not in written
    assert "\u202e" not in written


def test_the_strongest_of_a_random_circuit_are_those_of_a_slow_sort():
    generator = torch.Generator().manual_seed(1)
    values = {kind: torch.randn(shape, generator=generator) for kind, shape in GRAPH.shapes.items()}
    scores = Scores(GRAPH, values, PROVENANCE, helpful=-1)
    circuit = CURVE.circuit(size=20)
    drawn, _ = strongest(circuit, scores, None, 6)
    slow = sorted(
        circuit.edge_names(), key=lambda name: -abs(values[GRAPH.edge_index(name)[0]][GRAPH.edge_index(name)[1]])
    )
    assert set(drawn.edge_names()) == set(slow[:6])
    assert int(flatten(GRAPH, drawn.kept).sum()) == 6
