"""The edges of a circuit on the token graph, as a table of what is drawn and what the mouse is told."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from numpy import ndarray

from tracedensity.extract import Ranking
from tracedensity.graph import flatten, unflatten
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.plot.theme import label, quoted, require_result
from tracedensity.score import Scores
from tracedensity.unembedding import TopTokens

MAX_EDGES = 10_000
"""Edges that are drawn; of a larger circuit only the strongest are."""

_PARTS = {
    "head": "head",
    "mlp": "MLP",
    "neuron": "MLP",
    "resid_attn": "skip connection",
    "resid_mlp": "skip connection",
}
_AXES = {"head": ["layer", "head", "dest", "src"], "neuron": ["layer", "dest", "neuron"]}


def token_graph(circuit: Circuit) -> TokenGraph:
    """The graph of a circuit that can be drawn here."""
    require_result("circuit", circuit, Circuit, "such as `curve.circuit(faithfulness=0.9)`")
    if not isinstance(circuit.graph, TokenGraph):
        raise ValueError(f"`circuit` must be one of a TokenGraph to be drawn, got {type(circuit.graph).__name__}.")
    return circuit.graph


def require_same_graph(
    circuit: Circuit, scores: Scores | None = None, ranking: Ranking | None = None, tokens: TopTokens | None = None
) -> None:
    """Raise a ValueError if what is known of edges is not of the circuit's graph, or cannot be drawn."""
    graph = token_graph(circuit)
    for name, other in (("scores", scores), ("ranking", ranking), ("tokens", tokens)):
        if other is not None and other.graph != graph:
            raise ValueError(f"`{name}` must be of the circuit's graph, {graph}, got some of {other.graph}.")
    if scores is not None and (n_bad := sum(int((~each.isfinite()).sum()) for each in scores.values.values())):
        raise ValueError(f"`scores` must be finite to be drawn, got {n_bad} NaN or infinite.")


def edges_of(
    circuit: Circuit,
    *,
    scores: Scores | None = None,
    ranking: Ranking | None = None,
    tokens: TopTokens | None = None,
) -> pd.DataFrame:
    """One row per edge, neurons of one MLP merged.

    Columns `kind` (of the graph), `layer`, `head` (-1 for others), `dest`, `src`, `count` (of merged edges), `row` (of
    the state that the edge leaves), `part` (a key of `KINDS`) and `group` (what it is coloured by: its part); where
    known, `score`, `importance`, `entry` (size of the smallest circuit with the edge) and `says`.
    """
    graph = token_graph(circuit)
    importance = {} if scores is None else scores.importance()
    frames = []
    for kind, mask in circuit.kept.items():
        mask = mask.cpu()
        frame = pd.DataFrame(mask.nonzero().numpy(), columns=_AXES.get(kind, ["layer", "dest"])).assign(kind=kind)
        if scores is not None:
            frame["score"] = scores.values[kind].cpu()[mask].double().numpy()
            frame["importance"] = importance[kind].cpu()[mask].double().numpy()
        if ranking is not None:
            frame["entry"] = 1 + ranking.rank[kind].cpu()[mask].numpy()
        frames.append(_merged(frame) if kind == "neuron" else frame.assign(count=1))
    edges = pd.concat(frames, ignore_index=True)
    edges["head"] = edges["head"].fillna(-1).astype(int)
    edges["src"] = edges["src"].fillna(edges["dest"]).astype(int)
    edges["row"] = edges["layer"] * rows_of(graph) + edges["kind"].isin(["mlp", "neuron", "resid_mlp"])
    edges["part"] = edges["group"] = edges["kind"].map(_PARTS.get)
    if tokens is not None:
        edges["says"] = [_says(tokens, *place) for place in edges[["kind", "layer", "head", "dest", "src"]].to_numpy()]
    return edges


def _says(tokens: TopTokens, kind: str, layer: int, head: int, dest: int, src: int) -> str:
    texts = tokens.of(kind, (layer, head, dest, src) if kind == "head" else (layer, dest))
    return label("says " * bool(texts) + ", ".join(quoted(text, 16) for text in texts))


def _merged(neurons: pd.DataFrame) -> pd.DataFrame:
    """The neurons of each MLP as one row, with the score of the most important one and the entry of the first."""
    if "importance" in neurons:
        neurons = neurons.sort_values("importance", ascending=False, kind="stable")
    how = {name: "min" if name == "entry" else "first" for name in neurons if name not in ("layer", "dest", "neuron")}
    of_mlps = neurons.groupby(["layer", "dest"])
    return of_mlps.agg(how).assign(count=of_mlps.size()).reset_index()


def strongest(
    circuit: Circuit, scores: Scores | None, ranking: Ranking | None, most: int = MAX_EDGES
) -> tuple[Circuit, str]:
    """The part of a circuit that is drawn, and which edges these are if they are not all."""
    graph = token_graph(circuit)
    if circuit.n_edges <= most:
        return circuit, ""
    if ranking is not None:  # before scores: those that compare within a state only would leave no path
        order, which = -flatten(graph, ranking.rank).double(), f"the {most:,} that enter first"
    elif scores is not None:
        order, which = flatten(graph, scores.importance()).double(), f"the {most:,} strongest"
    else:  # in canonical order edges go up the layers, and from token to token
        order, which = torch.arange(graph.n_edges).double(), f"the {most:,} nearest to the prediction"
    kept = flatten(graph, circuit.kept)
    best = order.masked_fill(~kept, -torch.inf).argsort(descending=True, stable=True)[:most]
    drawn = torch.zeros_like(kept)
    drawn[best] = True
    return circuit.of_edges(unflatten(graph, drawn, False)), which


def among(edges: pd.DataFrame, circuit: Circuit) -> Bool[ndarray, " edge"]:
    """Which of the edges are in a circuit."""
    chosen = np.zeros(len(edges), dtype=bool)
    for kind, mask in circuit.kept.items():
        rows = (edges["kind"] == kind).to_numpy()
        axes = ["layer", "head", "dest", "src"] if kind == "head" else ["layer", "dest"]
        kept = (mask.any(-1) if kind == "neuron" else mask).cpu().numpy()
        chosen[rows] = kept[tuple(edges.loc[rows, axes].to_numpy().T)]
    return chosen


def rows_of(graph: TokenGraph) -> int:
    """Rows of states per layer."""
    return 2 if graph.has_mlp else 1
