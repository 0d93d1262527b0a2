"""The figure of a circuit: tokens across, layers up, the kept edges between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.plot.theme import (
    BAND,
    COLOURS,
    FAINT,
    INK,
    MUTED,
    PAPER,
    Theme,
    finished,
    label,
    percent,
    plain,
    quoted,
    shortened,
    token,
    visible,
)  # fmt: skip

MAX_LINKS = 20_000
"""Head links that are drawn; of a larger circuit only those into the last token are."""

MAX_STATES = 5_000
"""States that are dots and have a text under the mouse, as have skips and MLPs; a larger circuit has lines only."""

_WIDTHS = (
    (1, "1 head", 1.0),
    (2, "2 heads", 2.0),
    (4, "3-4 heads", 3.2),
    (8, "5-8 heads", 4.8),
    (2**31, "9 or more", 7.0),
)
"""Up to how many heads share a line: what the legend says, and how wide it is (px) where lines are few."""

_NAMED_TOKENS = 72  # more do not fit below one another


def plot_circuit(circuit: Circuit, *, prediction: str | None = None) -> go.Figure:
    """A circuit on the token graph: its states as dots, its edges as lines up the layers.

    Tokens stand side by side, the embedding at the bottom; each layer has two rows, the stream after
    attention and after the MLP (one row without MLPs). Skip connections are vertical, MLPs bars beside
    them (neurons of one MLP are one bar), and all heads of a layer between the same two tokens are one line,
    the wider the more they are. Where more than `MAX_LINKS` lines would be needed, only those into the last token
    are drawn, beside all skips and MLPs, and the title says so.

    Args:
        circuit: What to draw; a loaded one will do, no model is run.
        prediction: Text of the token that is predicted, written at the top right.

    Raises:
        ValueError: If the circuit is of another graph.
    """
    if not isinstance(circuit.graph, TokenGraph):
        raise ValueError(f"`circuit` must be one of a TokenGraph to be drawn, got {type(circuit.graph).__name__}.")
    texts = [label(shortened(visible(text), 24)) for text in circuit.provenance.texts]
    sheet = _Sheet(circuit.graph, tuple(f"'{text}' ({pos})" for pos, text in enumerate(texts)))
    kept = {kind: mask.cpu() for kind, mask in circuit.kept.items()}
    if "neuron" in kept:  # neurons of an MLP are one bar
        kept["mlp"] = kept["neuron"].any(-1)
    linked = kept["head"].any(1)  # [layer, dest, src]
    touched = _touched(sheet, kept, linked)
    detailed = int(touched.sum()) <= MAX_STATES
    n_links = int(linked.sum())
    remark = ""
    if n_links > MAX_LINKS:
        linked[:, :-1] = False
        remark = f"only heads into the last token are drawn: all {n_links:,} lines would be too many"
    figure = go.Figure()
    _add_skips(figure, sheet, kept, detailed)
    _add_heads(figure, sheet, _head_links(kept["head"], linked))
    _add_mlps(figure, sheet, kept, detailed)
    _add_states(figure, sheet, touched, detailed)
    _add_prediction(figure, sheet, prediction)
    _add_frame(figure, sheet, circuit, touched[0], remark)
    return figure


@dataclass(frozen=True)
class _Sheet:
    """Where things stand: token t at x = t, the embedding at y = 0, each sublayer one row up.

    Attributes:
        graph: What is drawn.
        names: What tokens are called under the mouse: their text and position.
    """

    graph: TokenGraph
    names: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Rows of states per layer."""
        return 2 if self.graph.has_mlp else 1

    @property
    def top(self) -> int:
        """Row of the prediction."""
        return self.rows * self.graph.n_layers

    @property
    def aside(self) -> float:
        """How far from its token's column an MLP, or a head that stays on its token, is drawn."""
        return min(0.2, 0.02 * self.graph.n_pos)

    @property
    def crowding(self) -> float:
        """How wide lines beside a column may be: 1 is as wide as they like, less where tokens are many."""
        return max(min(1.0, 40 / self.graph.n_pos), 0.3)


@dataclass(frozen=True)
class _Links:
    """Head edges with those of one layer between the same two tokens merged.

    Attributes:
        layer: Layer of each link.
        dest: Token that it enters.
        src: Token that it leaves.
        count: Number of heads.
        heads: Which heads these are.
    """

    layer: Int[ndarray, " link"]
    dest: Int[ndarray, " link"]
    src: Int[ndarray, " link"]
    count: Int[ndarray, " link"]
    heads: tuple[tuple[int, ...], ...]

    def where(self, chosen: Bool[ndarray, " link"]) -> "_Links":
        heads = tuple(heads for heads, keep in zip(self.heads, chosen.tolist(), strict=True) if keep)
        return _Links(self.layer[chosen], self.dest[chosen], self.src[chosen], self.count[chosen], heads)


def _head_links(kept: Bool[Tensor, "layer head dest src"], linked: Bool[Tensor, "layer dest src"]) -> _Links:
    layer, dest, src = linked.nonzero(as_tuple=True)
    heads = kept.permute(0, 2, 3, 1)[layer, dest, src].numpy()  # [link, head]
    count = heads.sum(1)
    which = np.split(heads.nonzero()[1], count.cumsum()[:-1])
    return _Links(
        layer.numpy(), dest.numpy(), src.numpy(), count, tuple(tuple(part.tolist()) for part in which[: len(count)])
    )


def _add_heads(figure: go.Figure, sheet: _Sheet, links: _Links) -> None:
    """One trace of lines for each width, and one without ink that answers the mouse."""
    ink = _ink(len(links.count))
    fewest = 1
    for most, name, width in _WIDTHS:
        part = links.where((links.count >= fewest) & (links.count <= most))
        fewest = most + 1
        if len(part.count):
            across, staying = part.where(part.src != part.dest), part.where(part.src == part.dest)
            bottom = sheet.rows * across.layer
            straight = _corners([across.src, across.dest], [bottom, bottom + 1])
            round_about = _detour(staying.src, sheet.rows * staying.layer, -sheet.aside)
            line = {"color": COLOURS["head"], "width": width * ink**0.5}
            corners = np.concatenate([straight, round_about], axis=1)
            figure.add_trace(_lines(corners, name, line, opacity=0.8 * ink, showlegend=False))
            figure.add_trace(_lines(np.full((2, 1), np.nan), name, {**line, "width": width}))  # legible in the legend
    # Links of one layer cross: each is touched at a height of its own distance, where no two are at one place.
    share = 0.2 + 0.6 * (links.dest - links.src) / max(sheet.graph.n_pos, 1)
    x = links.src + share * (links.dest - links.src) - np.where(links.src == links.dest, sheet.aside, 0.0)
    texts = [
        f"{_listed(layer, heads)}<br>{sheet.names[src]} → {sheet.names[dest]}"
        for layer, heads, src, dest in zip(
            links.layer.tolist(), links.heads, links.src.tolist(), links.dest.tolist(), strict=True
        )
    ]
    figure.add_trace(_touch(x, sheet.rows * links.layer + share, texts, "heads", COLOURS["head"]))


def _listed(layer: int, heads: tuple[int, ...], most: int = 12) -> str:
    names = ", ".join(f"a{layer}.h{head}" for head in heads[:most])
    return names if len(heads) <= most else f"{names} and {len(heads) - most} more"


def _ink(n_links: int) -> float:
    """How strong and wide lines are: less where there are many, so that the common paths stand out."""
    return float(np.clip((100 / max(n_links, 1)) ** 0.35, 0.15, 1.0))


def _add_skips(figure: go.Figure, sheet: _Sheet, kept: Mapping[str, Tensor], detailed: bool) -> None:
    x, bottom, texts = [], [], []
    for kind, row, around in (("resid_attn", 0, "attention"), ("resid_mlp", 1, "MLP")):
        if kind in kept:
            layer, pos = kept[kind].nonzero().numpy().T
            x.append(pos)
            bottom.append(sheet.rows * layer + row)
            texts += [f"skip around {around} {i}<br>{sheet.names[p]}" for i, p in kept[kind].nonzero().tolist()]
    x, bottom = np.concatenate(x), np.concatenate(bottom)
    line = {"color": COLOURS["residual"], "width": 1.5 * sheet.crowding}
    figure.add_trace(_lines(_corners([x, x], [bottom, bottom + 1]), "skip connection", line))
    if detailed:
        figure.add_trace(_touch(x, bottom + 0.5, texts, "skip", COLOURS["residual"]))


def _mlp_name(kept: Mapping[str, Tensor], layer: int, pos: int) -> str:
    if "neuron" not in kept:
        return f"m{layer}"
    here = kept["neuron"][layer, pos]
    return f"m{layer}: {int(here.sum())} of {len(here)} neurons"


def _add_mlps(figure: go.Figure, sheet: _Sheet, kept: Mapping[str, Tensor], detailed: bool) -> None:
    if "mlp" not in kept:
        return
    layer, pos = kept["mlp"].nonzero().numpy().T
    bottom = sheet.rows * layer + 1
    aside = pos + sheet.aside
    # Bars of one thick line, not markers: as many as may be, they are one element of the page.
    line = {"color": COLOURS["mlp"], "width": 6 * sheet.crowding}
    figure.add_trace(_lines(_corners([aside, aside], [bottom + 0.34, bottom + 0.66]), "MLP", line))
    if detailed:
        thin = {**line, "width": sheet.crowding}
        figure.add_trace(_lines(_detour(pos, bottom, sheet.aside), "MLP", thin, showlegend=False))
        texts = [_mlp_name(kept, i, p) + f"<br>{sheet.names[p]}" for i, p in kept["mlp"].nonzero().tolist()]
        figure.add_trace(_touch(aside, bottom + 0.5, texts, "MLP", COLOURS["mlp"]))


def _add_states(figure: go.Figure, sheet: _Sheet, touched: Bool[ndarray, "row pos"], detailed: bool) -> None:
    """A dot at each state that an edge of the circuit leaves or enters."""
    if not detailed:
        return
    row, pos = touched[:-1].nonzero()  # the last row is the prediction's
    texts = [f"{sheet.names[p]}<br>{_state(sheet, r)}" for r, p in zip(row.tolist(), pos.tolist(), strict=True)]
    figure.add_scatter(
        x=pos, y=row, mode="markers", marker={"color": INK, "size": 2 + 2 * sheet.crowding}, text=texts,
        hovertemplate="%{text}<extra></extra>", name="state", showlegend=False,
    )  # fmt: skip


def _add_prediction(figure: go.Figure, sheet: _Sheet, prediction: str | None) -> None:
    text = "prediction" if prediction is None else label(quoted(prediction, 20))
    figure.add_scatter(
        x=[sheet.graph.n_pos - 1], y=[sheet.top], mode="markers+text", text=[f"<b>{text}</b>"],
        textposition="top left", cliponaxis=False,
        marker={"color": PAPER, "size": 10, "line": {"color": INK, "width": 2}},
        name="prediction", showlegend=False, hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip


def _touched(
    sheet: _Sheet, kept: Mapping[str, Tensor], linked: Bool[Tensor, "layer dest src"]
) -> Bool[ndarray, "row pos"]:
    """Which states the circuit's edges leave or enter."""
    touched = torch.zeros(sheet.top + 1, sheet.graph.n_pos, dtype=torch.bool)
    before, after = touched[: -1 : sheet.rows], touched[1 :: sheet.rows]  # views: around attention
    before |= linked.any(1) | kept["resid_attn"]
    after |= linked.any(2) | kept["resid_attn"]
    if sheet.graph.has_mlp:
        around = kept["mlp"] | kept["resid_mlp"]
        touched[1::2] |= around
        touched[2::2] |= around
    return touched.numpy()


def _state(sheet: _Sheet, row: int) -> str:
    if row == 0:
        return "embedding"
    layer, sublayer = divmod(row - 1, sheet.rows)
    return f"stream after {('attention', 'MLP')[sublayer]} {layer}"


def _add_frame(figure: go.Figure, sheet: _Sheet, circuit: Circuit, read: Bool[ndarray, " pos"], remark: str) -> None:
    n_pos, n_layers, rows = sheet.graph.n_pos, sheet.graph.n_layers, sheet.rows
    step = -(-n_pos // _NAMED_TOKENS)
    named = range((n_pos - 1) % step, n_pos, step)  # the last token always
    names = [token(circuit.provenance.texts[pos]) for pos in named]
    names = [
        name if read[pos] else f'<span style="color:{MUTED}">{name}</span>'
        for pos, name in zip(named, names, strict=True)
    ]
    for layer in range(0, n_layers, 2):
        figure.add_hrect(rows * layer, rows * (layer + 1), fillcolor=BAND, line_width=0, layer="below")
    measured = "not run" if circuit.faithfulness is None else f"faithfulness {circuit.faithfulness:.3f}"
    conditions = ["all skips kept when run"] * circuit.keep_residual
    conditions += ["absent attention edges not ablated"] * (circuit.attention == "open")
    about = [
        quoted(circuit.provenance.prompt),
        f"{plain(circuit.provenance.method)} on {plain(circuit.provenance.model)}",
        *conditions,
    ]
    size = f"{circuit.n_edges:,} of {circuit.graph.n_edges:,} edges ({percent(circuit.fraction)})"
    figure.update_layout(
        legend={"itemsizing": "trace"},
        xaxis={
            "range": [-0.6, n_pos - 0.4],
            "tickvals": list(named),
            "ticktext": names,
            "tickangle": -90 if n_pos > 16 else 0,
            "tickfont": {"size": 11},
            "ticks": "",
            "showgrid": True,
            "gridcolor": FAINT,
            "title": {"text": "token" if step == 1 else f"token (one in {step} is named)"},
        },
        yaxis={
            "range": [-0.3, sheet.top + 0.9],
            "tickvals": [rows * (layer + 0.5) for layer in range(n_layers)],
            "ticktext": [str(layer) for layer in range(n_layers)],
            "ticks": "",
            "showline": False,
            "title": {"text": "layer (attention, then MLP)" if rows == 2 else "layer"},
        },
    )
    finished(figure, f"Circuit of {size}, {measured}", about, remark=remark, below=80,
        plot_height=max(240, min(36 * sheet.top, 600), 11 * sheet.top))


def _corners(xs: list[ndarray], ys: list[ndarray]) -> Float[ndarray, "axis corner"]:
    """Many lines, each through the given corners, end to end with a gap after each."""
    gap = np.full(len(xs[0]), np.nan)
    return np.stack([np.stack([*corners, gap], axis=1).astype(np.float32).ravel() for corners in (xs, ys)])


def _detour(x: ndarray, bottom: ndarray, aside: float) -> Float[ndarray, "axis corner"]:
    """Lines one row up that swerve to one side, where the straight way is another edge's."""
    shape = ((0.0, 0.0), (0.08, 0.55), (0.2, 0.9), (0.34, 1.0), (0.66, 1.0), (0.8, 0.9), (0.92, 0.55), (1.0, 0.0))
    return _corners([x + aside * part for _, part in shape], [bottom + height for height, _ in shape])


def _lines(
    corners: Float[ndarray, "axis corner"],
    name: str,
    line: dict[str, Any],
    opacity: float = 1.0,
    showlegend: bool = True,
) -> go.Scatter:
    x, y = corners
    return go.Scatter(
        x=x, y=y, mode="lines", line=line, opacity=opacity, name=name, legendgroup=name, showlegend=showlegend,
        hoverinfo="skip",
    )  # fmt: skip


def _touch(x: ndarray, y: ndarray, texts: list[str], name: str, colour: str) -> go.Scatter:
    """Points without ink, and without an element of the page each, that show a text under the mouse."""
    return go.Scatter(
        x=x.astype(np.float32), y=y.astype(np.float32), mode="none", text=texts, hovertemplate="%{text}<extra></extra>",
        hoverlabel={"bordercolor": colour}, name=name, showlegend=False,
    )  # fmt: skip
