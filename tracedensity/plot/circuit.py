"""The figure of a circuit on the token graph: tokens across, layers up, the kept edges between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Shaped
from numpy import ndarray

from tracedensity.activations import head_name, mlp_name
from tracedensity.extract import Ranking
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.plot.caption import about, size_of
from tracedensity.plot.edges import edges_of, require_same_graph, rows_of, strongest, token_graph
from tracedensity.plot.lines import in_legend, joined, touched, width_classes, width_entries
from tracedensity.plot.theme import (
    BAND,
    COLOURS,
    FAINT,
    INK,
    MUTED,
    NARROW,
    PAPER,
    TOKEN,
    WIDTHS,
    Theme,
    finished,
    label,
    named_tokens,
    quoted,
    rounded,
    shortened,
    token,
    visible,
)  # fmt: skip
from tracedensity.score import Scores
from tracedensity.unembedding import TopTokens

KINDS = {"head": COLOURS["head"], "MLP": COLOURS["mlp"], "skip connection": COLOURS["residual"]}
"""What edges are called in the legend, and their colours."""

_ROUND = ((0.0, 0.0), (0.08, 0.55), (0.2, 0.9), (0.34, 1.0), (0.66, 1.0), (0.8, 0.9), (0.92, 0.55), (1.0, 0.0))
"""A way one row up that swerves to one side, where the straight one is another edge's: how far up, how far aside."""


def plot_circuit(
    circuit: Circuit,
    *,
    scores: Scores | None = None,
    ranking: Ranking | None = None,
    tokens: TopTokens | None = None,
    prediction: str | None = None,
    theme: Theme | str = "light",
) -> go.Figure:
    """A circuit on the token graph: its states as dots, its edges as lines up the layers.

    Tokens stand side by side, the embedding at the bottom; each layer has two rows, the stream after
    attention and after the MLP (one row without MLPs). Skip connections are vertical, MLPs bars beside
    them (neurons of one MLP are one bar), and each head is a line from the token that it reads to the one
    that it writes to; heads of a layer between the same two tokens lie side by side.

    Where there would be more than `MAX_EDGES`, only the strongest are drawn: by rank, else by scores, and without
    either those nearest to the prediction. The title says so.

    Args:
        circuit: What to draw; a loaded one will do, no model is run.
        scores: Scores of the same edges: the more important an edge, the wider its line; neurons of one MLP have the
            score of the most important one.
        ranking: The order in which edges enter, to say under the mouse how large circuits with an edge are.
        tokens: What edges say, to be read under the mouse; see `top_tokens`.
        prediction: Text of the token that is predicted, written at the top right.
        theme: "light" or "dark".

    Raises:
        ValueError: If the circuit is of another graph, or scores, ranking or tokens are not of its graph.
    """
    require_same_graph(circuit, scores, ranking, tokens)
    drawn, which = strongest(circuit, scores, ranking)
    edges = edges_of(drawn, scores=scores, ranking=ranking, tokens=tokens)
    picture = Picture(token_graph(circuit), circuit.provenance.texts, edges, KINDS, prediction)
    remark = which and f"of {circuit.n_edges:,} edges only {which} are drawn"
    return picture.framed(picture.figure(scores), size_of(circuit), about(circuit), remark=remark, theme=theme)


# -- where it stands -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Picture:
    """Where edges are drawn: token t at x = t, the embedding at y = 0, each sublayer one row up.

    A picture of many edges can be drawn of some of them, which then stand where they stand among all.

    Attributes:
        graph: What is drawn.
        texts: The tokens.
        edges: All edges that may be drawn, see `edges_of`.
        groups: What edges are coloured by, and the colours.
        prediction: Text of the token that is predicted, if known.
    """

    graph: TokenGraph
    texts: Sequence[str]
    edges: pd.DataFrame
    groups: Mapping[str, str]
    prediction: str | None = None

    @property
    def top(self) -> int:
        """Row of the prediction."""
        return rows_of(self.graph) * self.graph.n_layers

    @property
    def aside(self) -> float:
        """How far from its token's column an MLP, or a head that stays on its token, is drawn."""
        return min(0.2, 0.02 * self.graph.n_pos)

    @property
    def crowding(self) -> float:
        """How wide lines beside a column may be: 1 is as wide as they like, less where tokens are many."""
        return max(min(1.0, 40 / self.graph.n_pos), 0.3)

    @property
    def strongest(self) -> float:
        """The largest importance; 0 without scores."""
        return float(self.edges["importance"].to_numpy().max(initial=0.0)) if "importance" in self.edges else 0.0

    @cached_property
    def _ways(self) -> tuple[Float[ndarray, "edge corner"], Float[ndarray, "edge corner"], Float[ndarray, "2 edge"]]:
        """Corners of each edge's line, NaN after the last, and where it answers the mouse."""
        edges = self.edges
        bottom, src, dest = (edges[name].to_numpy(float) for name in ("row", "src", "dest"))
        together = edges.groupby(["kind", "layer", "dest", "src"])
        count, number = together["count"].transform("size").to_numpy(), together.cumcount().to_numpy()
        is_head, is_mlp = (edges["part"].to_numpy() == part for part in ("head", "MLP"))
        across, staying = is_head & (src != dest), is_head & (src == dest)
        up, out = np.array(_ROUND).T

        # straight up, as skip connections go
        x, y = np.full((2, len(edges), len(_ROUND)), np.nan)
        x[:, :2], y[:, :2] = src[:, None], bottom[:, None] + [0.0, 1.0]
        # bars are lines, as tall as their row however tall that is
        x[is_mlp, :2] += self.aside
        y[is_mlp, :2] += [0.34, -0.34]
        # heads between the same two tokens are bent apart
        fan = (number - (count - 1) / 2) * np.minimum(0.14, 0.6 / np.maximum(count - 1, 1))
        t = np.linspace(0, 1, 5)
        bent = across & (count > 1)
        x[across, 1] = dest[across]
        x[bent, :5] = src[bent, None] + (dest - src)[bent, None] * t
        y[bent, :5] = bottom[bent, None] + t + fan[bent, None] * 4 * t * (1 - t)
        # heads that stay on their token keep off its skip connection
        aside = -self.aside * (1 + number / np.maximum(count - 1, 1) * np.minimum(1, 0.25 * (count - 1)))
        x[staying], y[staying] = src[staying, None] + aside[staying, None] * out, bottom[staying, None] + up

        # Lines of one layer cross: each is touched at a height of its own distance, where no two are at one place.
        share = np.where(across, 0.22 + 0.59 * (dest - src) / max(self.graph.n_pos, 1), 0.5)
        beside = np.select([is_mlp, staying], [self.aside, aside], 0.0)
        mouse = np.stack([src + share * (dest - src) + beside, bottom + share + across * fan * 4 * share * (1 - share)])
        return x, y, mouse

    @cached_property
    def _widths(self) -> ndarray:
        """Which of `WIDTHS` each edge has."""
        importance = self.edges["importance"] if "importance" in self.edges else np.zeros(len(self.edges))
        return width_classes(np.asarray(importance, dtype=np.float64), self.strongest)

    @cached_property
    def _names(self) -> list[str]:
        """What tokens are called under the mouse."""
        return [label(f"{quoted(text, 24)} ({pos})") for pos, text in enumerate(self.texts)]

    @cached_property
    def _said(self) -> tuple[Shaped[ndarray, "edge column"], str]:
        """What the mouse is told of each edge, and how that is written."""
        edges = self.edges
        names = self._names
        columns: dict[str, list[object]] = {
            "<b>%{customdata[0]}</b>": [
                self._name(*edge)
                for edge in zip(edges["kind"], edges["layer"], edges["head"], edges["count"], strict=True)
            ],
            "%{customdata[1]}": [
                names[dest] if head < 0 else f"{names[src]} → {names[dest]}"
                for head, dest, src in zip(edges["head"], edges["dest"], edges["src"], strict=True)
            ],
        }
        if "score" in edges:
            columns[f"score %{{customdata[{len(columns)}]}}"] = [rounded(score, 3) for score in edges["score"]]
        if "entry" in edges:
            columns[f"in circuits from %{{customdata[{len(columns)}]:,}} edges on"] = edges["entry"].tolist()
        if "says" in edges:
            columns[f"%{{customdata[{len(columns)}]}}"] = edges["says"].tolist()
        said = np.empty((len(edges), len(columns)), dtype=object)  # an array: plotly looks at lists item by item
        for place, column in enumerate(columns.values()):
            said[:, place] = column
        return said, "<br>".join(columns) + "<extra></extra>"

    def _name(self, kind: str, layer: int, head: int, count: int) -> str:
        if kind == "neuron":
            return f"m{layer}: {count:,} of {self.graph.d_mlp:,} neurons"
        if kind in ("head", "mlp"):
            return head_name(layer, head) if kind == "head" else mlp_name(layer)
        return f"skip around {'attention' if kind == 'resid_attn' else 'MLP'} {layer}"

    # -- drawing -----------------------------------------------------------------------------------

    def figure(self, scores: Scores | None) -> go.Figure:
        """All edges, and the legend."""
        traces: list[Any] = self.traces()
        return go.Figure([*(trace for trace in traces if len(trace.x)), *self.legend(scores)])

    def traces(self, chosen: Bool[ndarray, " edge"] | None = None) -> list[go.Scatter]:
        """What is drawn of some of the edges; the same traces in the same order whatever these are, some of them empty.

        Lines of edges of one group, kind and width are one trace.
        """
        edges = self.edges
        chosen = np.ones(len(edges), dtype=bool) if chosen is None else chosen
        kind, group = edges["part"].to_numpy(), edges["group"].to_numpy()
        x, y, mouse = self._ways
        bare, inked, hovered = [], [], []
        for name, colour in self.groups.items():
            for of_kind in KINDS:
                here = (kind == of_kind) & (group == name)
                if of_kind == "MLP" and here.any():
                    up, out = np.array(_ROUND).T
                    pos, bottom = (edges[column].to_numpy(float)[here & chosen, None] for column in ("dest", "row"))
                    line = {"color": colour, "width": self.crowding}
                    bare.append(joined(pos + self.aside * out, bottom + up, f"{name}, its way", line))
                for place in np.unique(self._widths[here]).tolist():
                    which = here & chosen & (self._widths == place)
                    width, opacity = self._line(of_kind, place, int(which.sum()))
                    line = {"color": colour, "width": width}
                    trace = joined(x[which], y[which], name, line, opacity=opacity)
                    (bare if of_kind == "skip connection" else inked).append(trace)
        said, template = self._said
        for of_kind, colour in KINDS.items():
            of_this = np.flatnonzero(kind == of_kind)
            x, y = _cut(mouse[:, of_this], chosen[of_this])
            hovered.append(touched(x, y, said[of_this], template, f"{of_kind}, under the mouse", colour))
        return [*bare, *inked, *hovered, self._states(chosen), self._predicted()]

    def _line(self, kind: str, place: int, count: int) -> tuple[float, float]:
        """Width (px) and opacity of so many lines; those of heads are faint where many, so that the few stand out."""
        width = WIDTHS[place][1] if self.strongest > 0 else 1.4
        if kind == "MLP":
            return (3.5 + width) * self.crowding, 1.0
        if kind == "skip connection":
            return width * self.crowding, 1.0
        ink = min(1.0, (100 / max(count, 1)) ** 0.4)
        return max(width * ink**0.7, 0.5), 0.85 * max(ink, 0.15)

    def _states(self, chosen: Bool[ndarray, " edge"]) -> go.Scatter:
        """A dot at each state that an edge leaves or enters."""
        n_pos, edges = self.graph.n_pos, self.edges
        ends = np.stack([edges["row"] * n_pos + edges["src"], (edges["row"] + 1) * n_pos + edges["dest"]], axis=1)
        states, where = np.unique(ends, return_index=True)
        states = states[np.argsort(where)]  # those of the first edges first
        states = states[states < self.top * n_pos]  # the last row is the prediction's
        row, pos = np.divmod(states, n_pos)
        x, y = _cut(np.stack([pos, row]).astype(float), np.isin(states, ends[chosen]))
        said = np.empty((len(states), 2), dtype=object)
        said[:, 0] = [self._names[p] for p in pos.tolist()]
        said[:, 1] = [self._state(r) for r in row.tolist()]
        return go.Scatter(
            x=x, y=y, mode="markers", marker={"color": INK, "size": 2 + 2 * self.crowding}, customdata=said,
            hovertemplate="%{customdata[0]}<br>%{customdata[1]}<extra></extra>", name="state", showlegend=False,
        )  # fmt: skip

    def _state(self, row: int) -> str:
        if row == 0:
            return "embedding"
        layer, sublayer = divmod(row - 1, rows_of(self.graph))
        return f"stream after {('attention', 'MLP')[sublayer]} {layer}"

    def _predicted(self) -> go.Scatter:
        text = "prediction" if self.prediction is None else label(quoted(self.prediction, 20))
        return go.Scatter(
            x=[self.graph.n_pos - 1], y=[self.top], mode="markers+text", text=[f"<b>{text}</b>"],
            textposition="top left", cliponaxis=False,
            marker={"color": PAPER, "size": 10, "line": {"color": INK, "width": 2}},
            name="prediction", showlegend=False, hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip

    def legend(self, scores: Scores | None) -> list[go.Scatter]:
        """Its entries: groups that there are, and with scores how wide they are drawn."""
        used = set(self.edges["group"])
        groups = [in_legend(name, colour, 3.0) for name, colour in self.groups.items() if name in used]
        signed = scores is not None and scores.helpful != 0
        return [*groups, *width_entries(self._widths, self.strongest, signed)]

    def framed(
        self, figure: go.Figure, title: str, said: Sequence[str], *, remark: str, theme: Theme | str
    ) -> go.Figure:
        """The figure with tokens along the bottom and layers up the side."""
        n_pos, n_layers, rows = self.graph.n_pos, self.graph.n_layers, rows_of(self.graph)
        named, axis_title = named_tokens(n_pos)
        read = set(self.edges["src"][self.edges["row"] == 0])
        names = [token(self.texts[pos]) for pos in named]
        names = [
            name if pos in read else f'<span style="color:{MUTED}">{name}</span>'
            for pos, name in zip(named, names, strict=True)
        ]
        longest = max(len(shortened(visible(self.texts[pos]), 14)) for pos in named)
        upright = len(named) * (7 * longest + 4) > NARROW - 90
        for layer in range(0, n_layers, 2):
            figure.add_hrect(rows * layer, rows * (layer + 1), fillcolor=BAND, line_width=0, layer="below")
        figure.update_layout(
            legend={"itemsizing": "trace"},
            xaxis={
                "range": [-0.6, n_pos - 0.4],
                "tickvals": named,
                "ticktext": names,
                "tickangle": -90 if upright else 0,
                "tickfont": {"size": 11},
                "ticks": "",
                "showgrid": True,
                "gridcolor": FAINT,
                "title": {"text": axis_title},
            },
            yaxis={
                "range": [-0.3, self.top + 0.9],
                "tickvals": [rows * (layer + 0.5) for layer in range(n_layers)],
                "ticktext": [str(layer) for layer in range(n_layers)],
                "ticks": "",
                "showline": False,
                "title": {"text": "layer (attention, then MLP)" if rows == 2 else "layer"},
            },
        )
        return finished(
            figure, title, said, remark=remark, theme=theme,
            plot_height=max(240, min(36 * self.top, 600), 11 * self.top),
            below=44 + 6 * longest if upright else 52,
            min_width=90 + TOKEN * len(named),
        )  # fmt: skip


def _cut(places: Float[ndarray, "2 place"], chosen: Bool[ndarray, " place"]) -> Float[ndarray, "2 some"]:
    """Places up to the last chosen one, NaN where they are not chosen."""
    end = int(chosen.nonzero()[0].max(initial=-1)) + 1
    return np.where(chosen[:end], places[:, :end], np.nan).astype(np.float32)
