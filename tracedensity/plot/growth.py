"""The figure of all circuits of a curve, one at a time, under a slider."""

from functools import reduce
from operator import or_

import numpy as np
import plotly.graph_objects as go

from tracedensity.curve import DensityCurve
from tracedensity.plot.caption import about, size_of
from tracedensity.plot.circuit import KINDS, Picture
from tracedensity.plot.edges import MAX_EDGES, among, edges_of, require_same_graph, strongest, token_graph
from tracedensity.plot.slider import Step, add_slider
from tracedensity.plot.theme import Theme, require_result
from tracedensity.score import Scores
from tracedensity.tight import TightCurve
from tracedensity.unembedding import TopTokens

_APART = 1.5  # how much larger the next circuit is, at least


def plot_growth(
    curve: DensityCurve,
    *,
    scores: Scores | None = None,
    tokens: TopTokens | None = None,
    faithfulness: float | int = 0.9,
    max_edges: int = 2_000,
    theme: Theme | str = "light",
) -> go.Figure:
    """The circuit of each size, drawn as `plot_circuit` draws it, with a slider over sizes.

    The steps are sizes that were run, each at least 1.5 times the one before up to `max_edges`, the minimal circuits at
    the curve's thresholds, and the whole graph. Edges stay where they are while the circuit grows.

    Args:
        curve: Whose circuits to draw, on the token graph; no model is run.
        scores: Scores of the edges: the more important an edge, the wider its line.
        tokens: What edges say, to be read under the mouse; see `top_tokens`.
        faithfulness: Which circuit to begin with: the smallest that is this faithful.
        max_edges: How many edges are drawn, at most `MAX_EDGES`; of larger circuits those that enter first, and the
            title says so.
        theme: "light" or "dark".

    Raises:
        ValueError: If the curve is of another graph, or `max_edges` is not from 1 to `MAX_EDGES`.
    """
    if not 1 <= max_edges <= MAX_EDGES:
        raise ValueError(f"`max_edges` must be from 1 to {MAX_EDGES:,}, got {max_edges:,}.")
    require_result("curve", curve, DensityCurve, "as `td.density` makes it")
    circuits = [curve.circuit(size=size) for size in _sizes(curve, faithfulness, max_edges)]
    require_same_graph(circuits[0], scores, curve.ranking, tokens)
    drawn, which = zip(*(strongest(circuit, scores, curve.ranking, max_edges) for circuit in circuits), strict=True)
    entered = None if isinstance(curve, TightCurve) else curve.ranking  # what a search finds enters nowhere
    edges = edges_of(reduce(or_, drawn), scores=scores, ranking=entered, tokens=tokens)
    there = np.array([among(edges, circuit) for circuit in drawn])  # [step, edge]
    order = np.argsort(there.argmax(0), kind="stable")  # what a step lacks is last
    edges, there = edges.iloc[order].reset_index(drop=True), there[:, order]
    picture = Picture(token_graph(circuits[0]), curve.provenance.texts, edges, KINDS, curve.top_text)
    steps = [
        Step(
            f"{whole.n_edges:,}",
            size_of(whole) + (some and f", first {max_edges:,} drawn"),
            picture.traces(chosen),
        )
        for whole, chosen, some in zip(circuits, there, which, strict=True)
    ]
    active = [circuit.n_edges for circuit in circuits].index(max(curve.minimal_size(faithfulness), circuits[0].n_edges))
    figure = go.Figure([go.Scatter(trace) for trace in steps[active].traces])
    figure.add_traces(picture.legend(scores))
    add_slider(figure, steps, active, prefix="edges: ")
    return picture.framed(figure, steps[active].title, about(circuits[active]), remark="", theme=theme)


def _sizes(curve: DensityCurve, faithfulness: float | int, max_edges: int) -> list[int]:
    """The sizes of the steps."""
    minimal = {curve.minimal_size(threshold) for threshold in (*curve.thresholds, faithfulness)} | {curve.n_edges}
    chosen: list[int] = []
    for size in curve.sizes.tolist():
        if size > max_edges and size not in minimal:  # would look like the one before
            continue
        if size > 0 and (size in minimal or not chosen or size >= _APART * chosen[-1]):
            chosen.append(size)
    return chosen
