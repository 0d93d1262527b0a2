"""Curves and circuits made by hand, and what is read back from their figures."""

import numpy as np
import torch

from tracedensity.curve import DensityCurve
from tracedensity.extract import Ranking
from tracedensity.graph import unflatten
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.provenance import Provenance
from tracedensity.run import Conditions

GRAPH = TokenGraph(n_layers=2, n_heads=3, n_pos=4)
HOSTILE = ("<s>", " </script><script>alert(1)</script>", " \"quoted' & $x$", "\n\u202e")


def provenance(texts):
    return Provenance("tiny", "abc", tuple(range(len(texts))), tuple(texts), "norm")


PROVENANCE = provenance(("<s>", " there", " was", " was"))


def make_circuit(*names, graph=GRAPH, **fields):
    kept = {kind: torch.zeros_like(mask) for kind, mask in graph.exists.items()}
    for name in names:
        kind, index = graph.edge_index(name)
        kept[kind][index] = True
    return Circuit(graph, kept, provenance([f" t{i}" for i in range(graph.n_pos)]), **fields)


def whole(graph):
    return Circuit(graph, graph.exists, provenance([f" t{i}" for i in range(graph.n_pos)]))


def make_curve(sizes, faithfulness, thresholds=(0.5, 0.9), texts=PROVENANCE.texts, top_text=" a", **fields):
    n_edges = GRAPH.n_edges
    rank = unflatten(GRAPH, torch.arange(n_edges, dtype=torch.int32).flip(0), -1)
    return DensityCurve(
        torch.tensor([*sizes, n_edges]),
        torch.tensor([*faithfulness, 1.0], dtype=torch.float64),
        Ranking(GRAPH, rank, "greedy", provenance(texts)),
        thresholds,
        "tv",
        Conditions(),
        entropy=1.25,
        top_token=3,
        top_text=top_text,
        top_probability=0.5,
        **fields,
    )


# passes 0.5 at 4 edges and for good at 16, passes 0.9 at 20
CURVE = make_curve([0, 1, 4, 8, 16, 20], [0.0, 0.25, 0.625, 0.375, 0.75, 0.9375])


def curve_of(ranking):
    """A curve of some circuits of a ranking, half as faithful as large."""
    sizes = torch.tensor(sorted({0, *(10**power for power in range(len(str(ranking.n_edges)))), ranking.n_edges}))
    faithfulness = (sizes / ranking.n_edges).double() ** 0.5
    return DensityCurve(
        sizes, faithfulness, ranking, (0.5, 0.9), "tv", Conditions(),
        entropy=1.0, top_token=0, top_text=" a", top_probability=0.5,
    )  # fmt: skip


def traces(figure, name):
    return [trace for trace in figure.data if trace.name == name]


def segments(trace):
    """The lines of a trace, each a list of its corners."""
    lines, line = [], []
    for x, y in zip(np.asarray(trace.x).tolist(), np.asarray(trace.y).tolist(), strict=True):
        if np.isnan(x):
            lines.append(line)
            line = []
        else:
            line.append((x, y))
    return lines
