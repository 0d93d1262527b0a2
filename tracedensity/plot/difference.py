"""The figure of two circuits on one graph: which edges both have, and which only one of them."""

import plotly.graph_objects as go

from tracedensity.graph.circuit import Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.plot.caption import asked, found
from tracedensity.plot.circuit import Picture
from tracedensity.plot.component import drawn_component
from tracedensity.plot.edges import MAX_EDGES, among, edges_of, require_same_graph, strongest, token_graph
from tracedensity.plot.theme import COLOURS, MUTED, Theme, label, plain
from tracedensity.score import Scores


def plot_difference(
    first: Circuit,
    second: Circuit,
    *,
    names: tuple[str, str] = ("first", "second"),
    scores: Scores | None = None,
    max_edges: int = MAX_EDGES,
    theme: Theme | str = "light",
) -> go.Figure:
    """Two circuits in one picture: grey what both have, blue and orange what only the first or the second has.

    Where a line or bar stands for several edges (positions, neurons), it is one of both circuits if each has one of
    them. For circuits on prompts of different lengths, whose graphs are different ones, compare heads: `plot_heatmap`.

    Args:
        first: A circuit, of either graph.
        second: Another one of the same graph.
        names: What to call them.
        scores: Scores of the same edges: the more important an edge, the wider its line.
        max_edges: How many edges are drawn on the token graph; of more, those that only one of the circuits has come
            first, and the title says so.
        theme: "light" or "dark".

    Raises:
        ValueError: If the circuits are not of the same graph.
    """
    if first.graph != second.graph:
        raise ValueError(
            f"`second` must be a circuit of the same graph as the first, {first.graph}, got {second.graph}. "
            "Heads of circuits on different prompts are compared by `plot_heatmap(first, minus=second)`."
        )
    both, only_first, only_second = first & second, first - second, second - first
    one, other = (plain(name, 24) for name in names)
    title = f"{both.n_edges:,} edges of both, {only_first.n_edges:,} only of {one},"
    title += f"\n{only_second.n_edges:,} only of {other}"
    prompts = list(dict.fromkeys(asked(circuit.provenance) for circuit in (first, second)))
    about = [*prompts, *dict.fromkeys(found(circuit) for circuit in (first, second))]
    about.append(f"Jaccard overlap {first.jaccard(second):.2f}")
    groups = {"both": MUTED, f"only {label(one)}": COLOURS["head"], f"only {label(other)}": COLOURS["mlp"]}
    union = first | second
    if isinstance(first.graph, ComponentGraph):
        return drawn_component(union, scores, title, about, theme, (first, second), list(groups.items()))
    require_same_graph(union, scores)
    differing, _ = strongest(only_first | only_second, scores, None, max_edges)
    drawn = differing | strongest(both, scores, None, max_edges - differing.n_edges)[0]
    remark = f"{drawn.n_edges:,} of {union.n_edges:,} edges are drawn, those of one circuit only first"
    edges = edges_of(drawn, scores=scores)
    in_first, in_second = (among(edges, circuit) for circuit in (first, second))
    edges["group"] = [list(groups)[0 if a and b else 1 if a else 2] for a, b in zip(in_first, in_second, strict=True)]
    texts = [
        here if here == there else f"{here} / {there}"
        for here, there in zip(first.provenance.texts, second.provenance.texts, strict=True)
    ]
    picture = Picture(token_graph(union), texts, edges, groups)
    return picture.framed(
        picture.figure(scores), title, about, remark=remark * (drawn.n_edges < union.n_edges), theme=theme
    )
