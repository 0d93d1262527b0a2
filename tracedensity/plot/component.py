"""The figure of a circuit on the component graph: layers up, heads across, the kept edges between them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray

from tracedensity.graph import flatten, pruned, unflatten
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.plot.caption import about, size_of
from tracedensity.plot.lines import in_legend, joined, width_classes, width_entries
from tracedensity.plot.theme import (
    BAND,
    COLOURS,
    DEAD,
    FAINT,
    INK,
    MUTED,
    NARROW,
    PAPER,
    WIDTHS,
    Theme,
    finished,
    label,
    require_result,
)  # fmt: skip
from tracedensity.score import Scores

MAX_LINES = 4_000
"""Edges that are drawn; of a larger circuit only the strongest or, without scores, those nearest to the logits."""

_READ_AS = {  # what the legend says, colour, and at which side of its node an edge enters
    "q": ("read as query", COLOURS["head"], -1),
    "k": ("read as key", COLOURS["inverse"], 0),
    "v": ("read as value", COLOURS["published"], 1),
    "mlp": ("read by MLP", COLOURS["mlp"], 0),
    "logits": ("read by logits", COLOURS["circuit"], 0),
}

_MANY = 1_000  # lines that need not be drawn smoothly
_COLUMNS = 12  # across; more only where a row has more heads, so that nodes look alike in all figures
_NAME = 1.8  # columns that a full name such as a11.h10 needs
_ASIDE = 0.11  # columns by which queries and values enter beside keys
_BESIDE = 5.0  # px between lines of the same two nodes where they run flat


def plot_component(circuit: Circuit, *, scores: Scores | None = None, theme: Theme | str = "light") -> go.Figure:
    """A circuit on the component graph: its heads and MLPs as nodes, its edges as lines up the layers.

    The embedding is at the bottom, the logits at the top. Each layer has a row of the heads that are in the circuit,
    near the column of their number, and its MLP at the right: above the heads, or level with them in parallel blocks.
    An edge has the colour of what it is read as, and enters a head at the left as query, in the middle as key, at the
    right as value. What is on no path from the embedding to the logits is grey.

    Keys and values that a group of heads shares are a small node beneath these heads, such as ``kv0``, where edges into
    them end. Dotted lines, which are no edges, lead on to those heads of the group that are in the circuit. Edges that
    differ only in their position, or in the neuron of an MLP that they leave, are one line.

    Where there would be more than `MAX_LINES`, only the strongest are drawn, or without scores those nearest to the
    logits, and the title says so. Numbers under the mouse are those of the whole circuit.

    Args:
        circuit: What to draw; a loaded one will do, no model is run.
        scores: Scores of the same edges: the more important an edge, the wider its line. Edges that are one line
            have the score of the most important one.
        theme: "light" or "dark".

    Raises:
        ValueError: If the circuit is not one of a component graph, or scores are of another graph or not finite.
    """
    return drawn_component(circuit, scores, size_of(circuit), about(circuit), theme)


def drawn_component(
    circuit: Circuit,
    scores: Scores | None,
    title: str,
    said: Sequence[str],
    theme: Theme | str,
    compared: Sequence[Circuit] = (),
    groups: Sequence[tuple[str, str]] = (),
) -> go.Figure:
    """A circuit under a title of one's own; or two `compared` ones that it is made of, in the colours of `groups`."""
    require_result("circuit", circuit, Circuit, "such as `scores.rank().circuit(60)`")
    if not isinstance(circuit.graph, ComponentGraph):
        raise ValueError(f"`circuit` must be one of a ComponentGraph to be drawn, got {type(circuit.graph).__name__}.")
    if scores is not None and scores.graph != circuit.graph:
        raise ValueError(f"`scores` must be of the circuit's graph, {circuit.graph}, got some of {scores.graph}.")
    if scores is not None and (n_bad := int((~scores.values["edge"].isfinite()).sum())):
        raise ValueError(f"`scores` must be finite to be drawn, got {n_bad} NaN or infinite.")
    nodes = _Nodes.of(circuit.graph)
    lines = _Lines.of(circuit.graph, nodes, circuit, scores)
    if compared:
        lines = lines.compared(nodes, compared, groups)
    some, remark = lines, ""
    if len(lines.source) > MAX_LINES:
        some = lines.at(lines.order[:MAX_LINES])
        which = "edges nearest to the logits" if scores is None else "strongest edges"
        remark = f"only the {MAX_LINES:,} {which} are drawn, of {len(lines.source):,}"
    sheet = _Sheet.of(circuit.graph, nodes, lines)
    figure = go.Figure()
    _add_lines(figure, sheet, some)
    _add_links(figure, sheet)
    if some.score is not None:
        figure.add_traces(width_entries(some.widths, some.strongest, some.signed))
    _add_touch(figure, sheet, some)
    _add_nodes(figure, sheet, lines)
    return _framed(figure, sheet, title, said, remark, theme)


# -- what there is to draw -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Nodes:
    """What a component graph is drawn with, numbered upwards: `input`; groups, heads, MLP of each layer; `logits`.

    Attributes:
        names: What nodes are called.
        row: "ends", "kv", "head" or "mlp".
        layer: Layer of each node; -1 and the number of layers for the ends.
        number: Which group or head of its layer it is.
        links: Groups and the heads that share them.
        of_writer: Node of each writer; that of a neuron is its MLP.
        neuron: Which neuron of its MLP each writer is; -1 if none.
        of_reader: Node of each reader.
        read_as: What an edge into each reader is read as, by its place in `_READ_AS`.
    """

    names: list[str]
    row: Shaped[ndarray, " node"]
    layer: Int[ndarray, " node"]
    number: Int[ndarray, " node"]
    links: Int[ndarray, "2 link"]
    of_writer: Int[ndarray, " writer"]
    neuron: Int[ndarray, " writer"]
    of_reader: Int[ndarray, " reader"]
    read_as: Int[ndarray, " reader"]

    @classmethod
    def of(cls, graph: ComponentGraph) -> "_Nodes":
        nodes: list[tuple[str, str, int, int]] = [("input", "ends", -1, 0)]

        def new(name: str, row: str, layer: int, count: int) -> Int[ndarray, " unit"]:
            nodes.extend((name.format(layer, number), row, layer, number) for number in range(count))
            return np.arange(len(nodes) - count, len(nodes))

        of_writer = np.zeros(graph.n_writers, dtype=np.int64)
        neuron = np.full(graph.n_writers, -1)
        of_reader, read_as = np.zeros((2, graph.n_readers), dtype=np.int64)
        links = [np.zeros((2, 0), dtype=np.int64)]
        for layer in range(graph.n_layers):
            kv = new("a{}.kv{}", "kv", layer, graph.n_kv_heads) if graph.grouped else None
            heads = new("a{}.h{}", "head", layer, graph.n_heads)
            mlp = new("m{}", "mlp", layer, int(graph.has_mlp))
            if kv is not None:
                links.append(np.stack([kv.repeat(graph.n_heads // graph.n_kv_heads), heads]))
            of_writer[graph.heads_of(layer)] = heads
            of_writer[graph.mlp_of(layer)] = mlp.repeat(graph.per_mlp)
            if graph.d_mlp:
                neuron[graph.mlp_of(layer)] = np.arange(graph.d_mlp)
            entered = {"q": heads, "k": heads if kv is None else kv, "v": heads if kv is None else kv, "mlp": mlp}
            for place, (name, units) in enumerate(entered.items()):
                of_reader[graph.readers_of(name, layer)] = units
                read_as[graph.readers_of(name, layer)] = place
        of_reader[-1], read_as[-1] = new("logits", "ends", graph.n_layers, 1)[0], len(_READ_AS) - 1
        names, row, layer_of, number = zip(*nodes, strict=True)
        return cls(
            list(names), np.array(row), np.array(layer_of), np.array(number), np.concatenate(links, axis=1),
            of_writer, neuron, of_reader, read_as,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Lines:
    """The edges of a circuit, with those that differ by position or neuron merged.

    Attributes:
        source: Node that each line leaves.
        target: Node that it enters.
        read_as: What it is read as, by its place in `_READ_AS`.
        names: What it is called.
        notes: Which edges it stands for, if it may be several.
        count: How many these are.
        alive: Whether one of them is on a path from the embedding to the logits.
        score: Score of the most important of them; None without scores.
        importance: How important that one is; without scores how near to the logits.
        strongest: The largest importance in the circuit.
        signed: Whether scores are effects.
        place: A number for each pair of a node and what reads it.
        group: What it is coloured by, a place in `groups`.
        groups: Names and colours, what is to be on top last.
    """

    source: Int[ndarray, " line"]
    target: Int[ndarray, " line"]
    read_as: Int[ndarray, " line"]
    names: list[str]
    notes: list[str]
    count: Int[ndarray, " line"]
    alive: Bool[ndarray, " line"]
    score: Float[ndarray, " line"] | None
    importance: Float[ndarray, " line"]
    strongest: float
    signed: bool
    place: Int[ndarray, " line"]
    group: Int[ndarray, " line"]
    groups: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, graph: ComponentGraph, nodes: _Nodes, circuit: Circuit, scores: Scores | None) -> "_Lines":
        by_place = (graph.n_writers, graph.n_readers, -1)
        kept = circuit.kept["edge"].cpu()
        on_path = unflatten(graph, pruned(graph, flatten(graph, {"edge": kept})), False)["edge"].view(by_place).numpy()
        edge = kept.reshape(by_place).numpy().nonzero()  # writer, reader, position
        on_path = on_path[edge]
        source, target = nodes.of_writer[edge[0]], nodes.of_reader[edge[1]]
        if scores is None:
            score, importance = None, target * len(nodes.names) + source.astype(np.float64)
        else:
            score = scores.values["edge"].cpu().double().reshape(by_place).numpy()[edge]
            importance = scores.importance()["edge"].cpu().double().reshape(by_place).numpy()[edge]
        place = source * graph.n_readers + edge[1]
        by = np.lexsort((-importance, place))  # of each line the most important edge is first
        first = np.flatnonzero(np.diff(place[by], prepend=-1))
        best = by[first]
        parts = np.split(by, first[1:]) if len(by) else []
        names = [f"{nodes.names[source[i]]}->{graph.readers[edge[1][i]]}" for i in best.tolist()]
        alive = np.array([on_path[part].any() for part in parts], dtype=bool)
        read_as = nodes.read_as[edge[1][best]]
        return cls(
            source[best],
            target[best],
            read_as,
            names,
            [_merged(graph, edge[2][part], nodes.neuron[edge[0][part]]) for part in parts],
            np.diff(first, append=len(by)),
            alive,
            None if score is None else score[best],
            importance[best],
            strongest=float(importance.max(initial=0.0)),
            signed=scores is not None and scores.helpful != 0,
            place=place[best],
            group=np.where(alive, 1 + read_as, 0),
            groups=(("on no path", DEAD), *((name, colour) for name, colour, _ in _READ_AS.values())),
        )

    def compared(self, nodes: _Nodes, circuits: Sequence[Circuit], groups: Sequence[tuple[str, str]]) -> "_Lines":
        """Coloured by which of two circuits, whose edges these are, has an edge of the line: both, one, the other."""
        first, second = (
            np.isin(self.place, nodes.of_writer[edges[:, 0]] * len(nodes.of_reader) + edges[:, 1])
            for edges in (circuit.kept["edge"].nonzero().cpu().numpy() for circuit in circuits)
        )
        return replace(self, group=np.where(first & second, 0, np.where(first, 1, 2)), groups=tuple(groups))

    @property
    def order(self) -> Int[ndarray, " line"]:
        """The most important first."""
        return np.argsort(-self.importance, kind="stable")

    @property
    def side(self) -> Int[ndarray, " line"]:
        """At which side of its target each line enters."""
        return np.array([side for _, _, side in _READ_AS.values()])[self.read_as]

    @property
    def widths(self) -> Int[ndarray, " line"]:
        """Which of `WIDTHS` each line has."""
        return width_classes(self.importance, self.strongest if self.score is not None else 0.0)

    def at(self, chosen: Int[ndarray, " chosen"]) -> "_Lines":
        return _Lines(
            self.source[chosen], self.target[chosen], self.read_as[chosen], [self.names[i] for i in chosen.tolist()],
            [self.notes[i] for i in chosen.tolist()], self.count[chosen], self.alive[chosen],
            None if self.score is None else self.score[chosen], self.importance[chosen], self.strongest, self.signed,
            self.place[chosen], self.group[chosen], self.groups,
        )  # fmt: skip

    def text(self, line: int) -> str:
        """A line's name, and its score if there is one."""
        return label(self.names[line]) + ("" if self.score is None else f"  {self.score[line]:.3g}")


def _merged(graph: ComponentGraph, positions: Int[ndarray, " edge"], neurons: Int[ndarray, " edge"]) -> str:
    """At which positions and from which neurons the edges of a line are."""
    notes = [] if graph.n_pos is None else [_listed("position", "", positions)]
    if (neurons >= 0).all():
        notes.append(_listed("neuron", "n", neurons))
    return "".join(f"<br>{note}" for note in notes)


def _listed(unit: str, prefix: str, numbers: Int[ndarray, " edge"], most: int = 8) -> str:
    found = np.unique(numbers).tolist()
    listed = ", ".join(f"{prefix}{number}" for number in found[:most]) + ", …" * (len(found) > most)
    return f"{unit} {listed}" if len(found) == 1 else f"{len(found)} {unit}s: {listed}"


# -- where it stands -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sheet:
    """Where nodes stand: across in columns, upwards in layers.

    Attributes:
        graph: What is drawn.
        nodes: Its nodes.
        shown: Which of them are in the circuit; `input` and `logits` always are.
        alive: Which of them are on a path from the embedding to the logits.
        x: Column of each node.
        y: Height of each node; layer l is from l to l + 1.
        columns: Width of the part where heads are.
        gap: Columns from one head to the next, at least.
    """

    graph: ComponentGraph
    nodes: _Nodes
    shown: Bool[ndarray, " node"]
    alive: Bool[ndarray, " node"]
    x: Float[ndarray, " node"]
    y: Float[ndarray, " node"]
    columns: int
    gap: float

    @classmethod
    def of(cls, graph: ComponentGraph, nodes: _Nodes, lines: _Lines) -> "_Sheet":
        shown, alive = np.zeros((2, len(nodes.names)), dtype=bool)
        for ends in (lines.source, lines.target):
            shown[ends] = True
            alive[ends[lines.alive]] = True
        shown[[0, -1]] = True
        rows = [
            (np.flatnonzero(shown & (nodes.row == name) & (nodes.layer == layer)), count)
            for name, count in (("kv", graph.n_kv_heads), ("head", graph.n_heads))
            for layer in range(graph.n_layers)
        ]
        widest = max(len(row) for row, _ in rows)
        columns = max(_COLUMNS, widest)
        gap = min(_NAME, columns / max(widest, 1))
        x = np.full(len(nodes.names), columns / 2)
        x[nodes.row == "mlp"] = columns + 0.7
        heights = _heights(graph)
        y = nodes.layer + np.array([heights[row] for row in nodes.row.tolist()])
        for row, count in rows:
            x[row] = _spread((nodes.number[row] + 0.5) * columns / count, gap, columns)
        return cls(graph, nodes, shown, alive, x, y, columns, gap)

    @property
    def column(self) -> float:
        """Width of a column (px) in a narrow window."""
        return 470 / (self.columns + 2)

    @property
    def size(self) -> float:
        """Diameter of a head (px)."""
        return 36.0 if self.named else float(np.clip(0.8 * self.column, 12, 25))

    @property
    def named(self) -> bool:
        """Whether there is room for full names: a3.h5 in place of h5."""
        return self.gap >= _NAME

    @property
    def layer_height(self) -> float:
        """Height of a layer (px)."""
        least = 58 + 24 * self.graph.grouped + 14 * self.named
        return float(np.clip(450 / self.graph.n_layers, least, 130))

    def curves(
        self, source: Int[ndarray, " line"], target: Int[ndarray, " line"], side: Int[ndarray, " line"]
    ) -> tuple[Float[ndarray, "line step"], Float[ndarray, "line step"]]:
        """Curves that leave a node upwards and enter another one from below."""
        t = (1 - np.cos(np.linspace(0, np.pi, 33 if len(source) < _MANY else 15))) / 2  # closer where they bend
        start, bottom = self.x[source, None], self.y[source, None]
        across, up = self.x[target, None] - start, self.y[target, None] - bottom
        side = side[:, None]
        flat = np.clip(np.abs(across) / up, 0, 25) / 25
        rise = 0.45 + 0.5 * flat  # flat ones rise above the row of heads first
        aside = np.where(self.nodes.row[source, None] == "ends", t, 1.0) * _ASIDE * side  # the dot of `input` is small
        x = start + aside + across * t**2 * (3 - 2 * t)
        y = bottom + up * (3 * (1 - t) * t * (rise + t * (1 - 2 * rise)) + t**3)
        y += -side * np.sign(across) * flat * _BESIDE / self.layer_height * 4 * t * (1 - t)
        # Straight up would be through the nodes above the source, so these go round.
        hidden = (np.abs(across) < 0.5) & (up > 1.05)
        to_the_right = 0.8 + 0.8 * up / self.graph.n_layers  # where nothing else is
        around = np.where(self.nodes.row[source, None] == "mlp", to_the_right, np.where(side > 0, 0.5, -0.5))
        return x + hidden * around * (4 * t * (1 - t)) ** 0.6, y


def _heights(graph: ComponentGraph) -> dict[str, float]:
    """How far up in its layer each row is."""
    if not graph.has_mlp or graph.parallel:
        heights = {"kv": 0.3, "head": 0.65, "mlp": 0.65} if graph.grouped else {"head": 0.5, "mlp": 0.5}
    else:
        heights = {"kv": 0.2, "head": 0.5, "mlp": 0.82} if graph.grouped else {"head": 0.3, "mlp": 0.75}
    return {**heights, "ends": 0.5}


def _spread(wanted: Float[ndarray, " node"], gap: float, width: int) -> Float[ndarray, " node"]:
    """Places in the same order, at least a gap apart, as near to the wanted ones as that allows."""
    steps = gap * np.arange(len(wanted))
    pools: list[tuple[float, int]] = []  # mean and number of neighbours that push each other
    for each in (wanted - steps).tolist():
        pool = (each, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, count = pools.pop()
            pool = ((mean * count + pool[0] * pool[1]) / (count + pool[1]), count + pool[1])
        pools.append(pool)
    placed = np.array([mean for mean, count in pools for _ in range(count)])
    return np.clip(placed, gap / 2, width - gap / 2 - steps[-1:].sum()) + steps


# -- drawing ---------------------------------------------------------------------------------------


def _add_lines(figure: go.Figure, sheet: _Sheet, lines: _Lines) -> None:
    """One trace for each group and width, thin ones first."""
    n_lines = len(lines.source)
    ink = float(np.clip((100 / max(n_lines, 1)) ** 0.35, 0.2, 1.0))
    x, y = sheet.curves(lines.source, lines.target, lines.side)

    wide = lines.widths
    # Many thin lines are thinner still, so that the strong ones stand out.
    widths = [2.2 * ink**0.8] if lines.score is None else [w * (ink**0.6 if w < 2 else 1.0) for _, w in WIDTHS]
    for place, width in enumerate(widths):
        for group, (name, colour) in enumerate(lines.groups):
            chosen = (wide == place) & (lines.group == group)
            if chosen.any():
                line = {"color": colour, "width": width, "simplify": n_lines >= _MANY}
                opacity = ink if place == 0 else max(ink, 0.85)
                figure.add_trace(joined(x[chosen], y[chosen], name, line, opacity=opacity))
    for group in np.unique(lines.group).tolist():
        figure.add_trace(in_legend(*lines.groups[group], width=3.0))


def _add_links(figure: go.Figure, sheet: _Sheet) -> None:
    """From what heads share to those of them that are in the circuit."""
    group, head = sheet.nodes.links[:, sheet.shown[sheet.nodes.links].all(0)]
    if len(group):
        x, y = sheet.curves(group, head, np.zeros_like(group))
        dotted = joined(x, y, "shared keys, values", {"color": MUTED, "width": 1.0, "dash": "2px,2px"})
        figure.add_trace(dotted.update(showlegend=True))


def _add_touch(figure: go.Figure, sheet: _Sheet, lines: _Lines) -> None:
    """A point without ink on each line that shows its name under the mouse."""
    x, y = sheet.curves(lines.source, lines.target, lines.side)
    middle = x.shape[1] // 2 + lines.side  # at another height for queries, keys and values of the same head
    line = np.arange(len(lines.source))
    colours = [colour for _, colour in lines.groups]
    figure.add_scatter(
        x=x[line, middle], y=y[line, middle], mode="none", name="edges", showlegend=False,
        text=[lines.text(i) + lines.notes[i] for i in line.tolist()], hovertemplate="%{text}<extra></extra>",
        hoverlabel={"bordercolor": [colours[group] for group in lines.group.tolist()] or MUTED},
    )  # fmt: skip


def _add_nodes(figure: go.Figure, sheet: _Sheet, lines: _Lines) -> None:
    nodes, shown = sheet.nodes, np.flatnonzero(sheet.shown)
    row, alive = nodes.row[shown], sheet.alive[shown] | (nodes.row[shown] == "ends")
    sizes = {"ends": 9.0, "head": sheet.size, "mlp": max(sheet.size - 4, 22.0), "kv": max(0.62 * sheet.size, 12.0)}
    fonts = {"ends": 13, "head": 10 if sheet.column > 26 else 8, "mlp": 10, "kv": 8}
    ends = np.where(shown == 0, "bottom center", "top center")
    figure.add_scatter(
        x=sheet.x[shown],
        y=sheet.y[shown],
        mode="markers+text",
        text=[_short(sheet, node) for node in shown.tolist()],
        textposition=np.where(row == "ends", ends, "middle center"),
        textfont={"size": [fonts[name] for name in row.tolist()], "color": np.where(alive, INK, MUTED)},
        marker={
            "symbol": np.where(row == "mlp", "square", "circle"),
            "size": [sizes[name] for name in row.tolist()],
            "color": np.where(row == "ends", INK, np.where(row == "kv", FAINT, PAPER)),
            "opacity": 1.0,
            "line": {"color": np.where(alive, np.where(row == "kv", MUTED, INK), DEAD), "width": 1.2},
        },
        cliponaxis=False,
        customdata=_about_nodes(sheet, lines, shown),
        hovertemplate="%{customdata}<extra></extra>",
        hoverlabel={"bordercolor": INK},
        name="nodes",
        showlegend=False,
    )


def _short(sheet: _Sheet, node: int) -> str:
    row, name = sheet.nodes.row[node], sheet.nodes.names[node]
    if row == "ends":
        return f"<b>{name}</b>"
    if row == "mlp" or (sheet.named and row == "head"):
        return name
    return name.partition(".")[2] if sheet.column > 22 else str(sheet.nodes.number[node])


def _about_nodes(sheet: _Sheet, lines: _Lines, shown: Int[ndarray, " shown"], most: int = 5) -> list[str]:
    """Of each node its name, its number of edges, and those that it reads, the strongest first."""
    n_nodes = len(sheet.nodes.names)
    n_in = np.bincount(lines.target, lines.count, n_nodes).astype(int).tolist()
    n_out = np.bincount(lines.source, lines.count, n_nodes).astype(int).tolist()
    read: dict[int, list[int]] = {}
    for line, target in zip(lines.order.tolist(), lines.target[lines.order].tolist(), strict=True):
        read.setdefault(target, []).append(line)
    shared: dict[int, list[str]] = {}
    for group, head in sheet.nodes.links.T.tolist():
        shared.setdefault(group, []).append(sheet.nodes.names[head])
    texts = []
    for node in shown.tolist():
        into = read.get(node, [])
        count = f"{n_in[node]:,} edge{'s' * (n_in[node] != 1)} in"
        what = [f"<b>{sheet.nodes.names[node]}</b>"]
        what += [f"shared by {', '.join(shared[node])}", count] if node in shared else [f"{count}, {n_out[node]:,} out"]
        what += [lines.text(line) for line in into[:most]]
        what += [f"and {len(into) - most:,} more"] * (len(into) > most)
        texts.append("<br>".join(what))
    return texts


def _framed(
    figure: go.Figure, sheet: _Sheet, title: str, said: Sequence[str], remark: str, theme: Theme | str
) -> go.Figure:
    n_layers = sheet.graph.n_layers
    beyond = 0.5 + 26 / sheet.layer_height  # names of the ends are beyond them
    for layer in range(0, n_layers, 2):
        figure.add_hrect(layer, layer + 1, fillcolor=BAND, line_width=0, layer="below")
    figure.update_layout(
        legend={"itemsizing": "trace"},
        xaxis={"range": [-0.3, sheet.columns + (2.4 if sheet.graph.has_mlp else 0.3)], "visible": False},
        yaxis={
            "range": [-beyond, n_layers + beyond],
            "tickvals": [layer + 0.5 for layer in range(n_layers)],
            "ticktext": [str(layer) for layer in range(n_layers)],
            "ticks": "",
            "showline": False,
            "title": {"text": "layer"},
        },
    )
    return finished(
        figure, title, said, remark=remark, theme=theme, below=8,
        plot_height=sheet.layer_height * (n_layers + 2 * beyond),
        min_width=NARROW if sheet.named else 88 + 32 * (sheet.columns + 2.7),
    )  # fmt: skip
