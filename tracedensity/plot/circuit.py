"""The figure of a circuit: tokens across, layers up, the kept edges between them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.plot.theme import (
    COLOURS,
    FAINT,
    INK,
    MUTED,
    TEMPLATE,
    heading,
    label,
    percent,
    quoted,
    shortened,
    token,
    visible,
)  # fmt: skip

MAX_LINKS = 20_000
"""Head links that are drawn; of a larger circuit only those into the last token are."""

MAX_STATES = 5_000
"""Dots that are drawn; in a larger circuit states are only where lines meet."""

_WIDTHS = (
    (1, "1 head", 1.0),
    (2, "2 heads", 2.0),
    (4, "3-4 heads", 3.2),
    (8, "5-8 heads", 4.8),
    (2**31, "9 or more", 7.0),
)
"""Up to how many heads share a line: what the legend says, and how wide it is (px) where lines are few."""

_ASIDE = 0.2  # how far from its token's column an MLP, or a head that stays on its token, is drawn
_NAMED_TOKENS = 72  # more do not fit below one another


def plot_circuit(circuit: Circuit, *, prediction: str | None = None) -> go.Figure:
    """A circuit on the token graph: its states as dots, its edges as lines up the layers.

    Tokens stand side by side, the embedding at the bottom; each layer has two rows, the stream after
    attention and after the MLP (one row without MLPs). Skip connections are vertical, MLPs bars beside
    them, and all heads of a layer between the same two tokens are one line, the wider the more they are.
    Where more than `MAX_LINKS` lines would be needed, only those into the last token are drawn, beside
    all skips and MLPs, and the title says so.

    Args:
        circuit: What to draw; a loaded one will do, no model is run.
        prediction: Text of the token that is predicted, written at the top right.

    Raises:
        ValueError: If the circuit is of another graph.
    """
    if not isinstance(circuit.graph, TokenGraph):
        raise ValueError(f"`circuit` must be one of a TokenGraph to be drawn, got {type(circuit.graph).__name__}.")
    sheet = _Sheet(circuit.graph, tuple(label(shortened(visible(text), 24)) for text in circuit.provenance.texts))
    links = _head_links(circuit)
    partial = len(links.count) > MAX_LINKS
    shown = links.where(links.dest == circuit.graph.n_pos - 1) if partial else links
    figure = go.Figure(layout={"template": TEMPLATE})
    _add_skips(figure, sheet, circuit)
    _add_heads(figure, sheet, shown)
    _add_mlps(figure, sheet, circuit)
    _add_states(figure, sheet, circuit, prediction)
    left_out = f"only heads into the last token are drawn, {len(links.count):,} lines being too many" if partial else ""
    _add_frame(figure, sheet, circuit, left_out)
    return figure


@dataclass(frozen=True)
class _Sheet:
    """Where things stand: token t at x = t, the embedding at y = 0, each sublayer one row up.

    Attributes:
        graph: What is drawn.
        names: Texts of the tokens, ready to be shown.
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

    def at(self, pos: int) -> str:
        """A token, for hover texts."""
        return f"'{self.names[pos]}' ({pos})"


@dataclass(frozen=True)
class _Links:
    """Head edges with those of one layer between the same two tokens merged.

    Attributes:
        layer: Layer of each link.
        dest: Token that it enters.
        src: Token that it leaves.
        count: Number of heads.
        heads: The heads of all links, end to end.
    """

    layer: Int[ndarray, " link"]
    dest: Int[ndarray, " link"]
    src: Int[ndarray, " link"]
    count: Int[ndarray, " link"]
    heads: tuple[tuple[int, ...], ...]

    def where(self, chosen: Bool[ndarray, " link"]) -> "_Links":
        heads = tuple(heads for heads, keep in zip(self.heads, chosen.tolist(), strict=True) if keep)
        return _Links(self.layer[chosen], self.dest[chosen], self.src[chosen], self.count[chosen], heads)


def _head_links(circuit: Circuit) -> _Links:
    index = circuit.kept["head"].permute(0, 2, 3, 1).nonzero().cpu().numpy()  # [edge, (layer, dest, src, head)], sorted
    starts = np.flatnonzero((np.diff(index[:, :3], axis=0, prepend=-1) != 0).any(1))
    count = np.diff(starts, append=len(index))
    heads = tuple(tuple(part.tolist()) for part in np.split(index[:, 3], starts[1:])) if len(index) else ()
    layer, dest, src = index[starts, :3].T
    return _Links(layer, dest, src, count, heads)


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
            round_about = _detour(staying.src, sheet.rows * staying.layer, -_ASIDE)
            line = {"color": COLOURS["head"], "width": width * ink}
            figure.add_trace(_lines(np.concatenate([straight, round_about], axis=1), name, line, opacity=0.8 * ink))
    # Links of one layer cross: each is touched at a height of its own distance, where no two are at one place.
    share = 0.2 + 0.6 * (links.dest - links.src) / max(sheet.graph.n_pos, 1)
    x = links.src + share * (links.dest - links.src) - np.where(links.src == links.dest, _ASIDE, 0.0)
    texts = [
        f"{_listed(layer, heads)}<br>{sheet.at(src)} → {sheet.at(dest)}"
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


def _add_skips(figure: go.Figure, sheet: _Sheet, circuit: Circuit) -> None:
    x, bottom, texts = [], [], []
    for kind, row, around in (("resid_attn", 0, "attention"), ("resid_mlp", 1, "MLP")):
        if kind in circuit.kept:
            layer, pos = circuit.kept[kind].nonzero().cpu().numpy().T
            x.append(pos)
            bottom.append(sheet.rows * layer + row)
            texts += [f"skip around {around} {i}<br>{sheet.at(p)}" for i, p in zip(layer, pos, strict=True)]
    x, bottom = np.concatenate(x), np.concatenate(bottom)
    line = {"color": COLOURS["residual"], "width": 1.5}
    figure.add_trace(_lines(_corners([x, x], [bottom, bottom + 1]), "skip connection", line))
    figure.add_trace(_touch(x, bottom + 0.5, texts, "skips", COLOURS["residual"]))


def _add_mlps(figure: go.Figure, sheet: _Sheet, circuit: Circuit) -> None:
    if "mlp" not in circuit.kept or not circuit.kept["mlp"].any():
        return
    layer, pos = circuit.kept["mlp"].nonzero().cpu().numpy().T
    bottom = sheet.rows * layer + 1
    aside = pos + _ASIDE
    line = {"color": COLOURS["mlp"], "width": 1}
    figure.add_trace(_lines(_detour(pos, bottom, _ASIDE), "MLP", line, showlegend=False))
    # Bars of one thick line, not markers: as many as may be, they stay one element of the page.
    bars = _corners([aside, aside], [bottom + 0.34, bottom + 0.66])
    figure.add_trace(_lines(bars, "MLP", {**line, "width": 6}))
    texts = [f"m{i}<br>{sheet.at(p)}" for i, p in zip(layer, pos, strict=True)]
    figure.add_trace(_touch(aside, bottom + 0.5, texts, "MLPs", COLOURS["mlp"]))


def _add_states(figure: go.Figure, sheet: _Sheet, circuit: Circuit, prediction: str | None) -> None:
    """A dot at each state that an edge of the circuit leaves or enters, and the prediction."""
    touched = _touched(sheet, circuit)
    row, pos = touched.nonzero()
    if len(row) > MAX_STATES:
        row, pos = row[:0], pos[:0]
    texts = [f"{sheet.at(p)}<br>{_state(sheet, r)}" for r, p in zip(row.tolist(), pos.tolist(), strict=True)]
    figure.add_scatter(
        x=pos, y=row, mode="markers", marker={"color": INK, "size": 4}, text=texts, hovertemplate="%{text}",
        name="states", showlegend=False,
    )  # fmt: skip
    text = "prediction" if prediction is None else quoted(prediction, 20)
    figure.add_scatter(
        x=[sheet.graph.n_pos - 1], y=[sheet.top], mode="markers+text", text=[f"<b>{text}</b>"],
        textposition="top left", cliponaxis=False,
        marker={"color": "white", "size": 10, "line": {"color": INK, "width": 2}},
        name="prediction", showlegend=False, hovertemplate="%{text}",
    )  # fmt: skip


def _touched(sheet: _Sheet, circuit: Circuit) -> Bool[ndarray, "row pos"]:
    """Which states ``[row, pos]`` the circuit's edges leave or enter."""
    touched = torch.zeros(sheet.top + 1, sheet.graph.n_pos, dtype=torch.bool)
    kept = {kind: mask.cpu() for kind, mask in circuit.kept.items()}
    before, after = touched[: -1 : sheet.rows], touched[1 :: sheet.rows]  # views: around attention
    heads = kept["head"].any(1)  # [layer, dest, src]
    before |= heads.any(1) | kept["resid_attn"]
    after |= heads.any(2) | kept["resid_attn"]
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


def _add_frame(figure: go.Figure, sheet: _Sheet, circuit: Circuit, left_out: str) -> None:
    n_pos, n_layers, rows = sheet.graph.n_pos, sheet.graph.n_layers, sheet.rows
    read = _touched(sheet, circuit)[0]
    step = -(-n_pos // _NAMED_TOKENS)
    named = range((n_pos - 1) % step, n_pos, step)  # the last token always
    names = [token(circuit.provenance.texts[pos]) for pos in named]
    names = [
        name if read[pos] else f'<span style="color:{MUTED}">{name}</span>'
        for pos, name in zip(named, names, strict=True)
    ]
    for layer in range(0, n_layers, 2):
        figure.add_hrect(rows * layer, rows * (layer + 1), fillcolor="#F6F6F6", line_width=0, layer="below")
    measured = "not run" if circuit.faithfulness is None else f"faithfulness {circuit.faithfulness:.3f}"
    conditions = ["all skips kept when run"] * circuit.keep_residual
    conditions += ["absent attention edges not ablated"] * (circuit.attention == "open")
    about = [
        quoted(circuit.provenance.prompt),
        f"{label(circuit.provenance.method)} on {label(circuit.provenance.model)}",
        *conditions,
    ]
    size = f"{circuit.n_edges:,} of {circuit.graph.n_edges:,} edges ({percent(circuit.fraction)})"
    figure.update_layout(
        title=heading(f"Circuit of {size}, {measured}", " · ".join(about) + f"<br>{left_out}" * bool(left_out)),
        height=220 + max(240, min(36 * sheet.top, 600), 11 * sheet.top),
        margin={"t": 112 if left_out else 96},
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
            "title": {"text": "token" if step == 1 else f"token (every {step}. is named)"},
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
        x=x, y=y, mode="lines", line=line, opacity=opacity, name=name, showlegend=showlegend, hoverinfo="skip"
    )


def _touch(x: ndarray, y: ndarray, texts: list[str], name: str, colour: str) -> go.Scatter:
    """Points without ink, and without an element of the page each, that show a text under the mouse."""
    return go.Scatter(
        x=x.astype(np.float32), y=y.astype(np.float32), mode="none", text=texts, hovertemplate="%{text}<extra></extra>",
        hoverlabel={"bordercolor": colour}, name=name, showlegend=False,
    )  # fmt: skip
