"""A second implementation of the token graph and its circuits, in plain loops and float64, to test the package against.

It shares nothing with the package: no hooks, no batches, no tensors of masks. It reads weights out of a
`HookedTransformer` and does by itself what the density papers describe. A node is ``("pre", layer, pos)``,
the stream that enters a block, or ``("mid", layer, pos)``, the stream between attention and MLP. An edge is
the kind and index under which the package stores it: ``("head", (layer, head, dest, src))`` and so on.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.lens import parameters_of

Vector: TypeAlias = NDArray[np.float64]
Node: TypeAlias = tuple[str, int, int]
Edge: TypeAlias = tuple[str, tuple[int, ...]]
Edges: TypeAlias = frozenset[Edge]

RESIDUAL = ("resid_attn", "resid_mlp")
AROUND_MLP = ("mlp", "neuron", "resid_mlp")
NUCLEI = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)  # percent
GELU = np.sqrt(2 / np.pi)
ACTIVATIONS: dict[str, Callable[[Vector], Vector]] = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_new": lambda x: x / 2 * (1 + np.tanh(GELU * (x + 0.044715 * x**3))),
}


# -- the graph ---------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What the graph of a prompt depends on."""

    n_layers: int
    n_heads: int
    n_pos: int
    has_mlp: bool
    d_mlp: int | None = None  # neurons per MLP if each is an edge


def output(shape: Shape) -> Node:
    return ("pre", shape.n_layers, shape.n_pos - 1)


def after_attention(shape: Shape, layer: int, pos: int) -> Node:
    return ("mid", layer, pos) if shape.has_mlp else ("pre", layer + 1, pos)


def source(shape: Shape, edge: Edge) -> Node:
    kind, (layer, *rest) = edge
    if kind in AROUND_MLP:
        return ("mid", layer, rest[0])
    return ("pre", layer, rest[-1])


def target(shape: Shape, edge: Edge) -> Node:
    kind, (layer, *rest) = edge
    if kind in AROUND_MLP:
        return ("pre", layer + 1, rest[0])
    return after_attention(shape, layer, rest[1] if kind == "head" else rest[0])


def in_edges(shape: Shape, node: Node) -> list[Edge]:
    """In the order in which they are pushed: by source, skip connection first, then heads; skip, MLP or neurons."""
    where, layer, pos = node
    if where == "pre" and layer == 0:
        return []
    if where == "pre" and shape.has_mlp:
        skip = ("resid_mlp", (layer - 1, pos))
        if shape.d_mlp is None:
            return [skip, ("mlp", (layer - 1, pos))]
        return [skip, *(("neuron", (layer - 1, pos, neuron)) for neuron in range(shape.d_mlp))]
    if where == "pre":
        layer -= 1
    edges: list[Edge] = []
    for src in range(pos + 1):
        if src == pos:
            edges.append(("resid_attn", (layer, pos)))
        for head in range(shape.n_heads):
            edges.append(("head", (layer, head, pos, src)))
    return edges


def nodes(shape: Shape) -> set[Node]:
    """The output and all its ancestors."""
    found: set[Node] = set()
    waiting = [output(shape)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [source(shape, edge) for edge in in_edges(shape, node)]
    return found


def all_edges(shape: Shape) -> list[Edge]:
    """Every edge on a way to the output, in canonical order: layers up, attention first, targets ascending."""
    alive = nodes(shape)
    order: list[Node] = []
    for layer in range(shape.n_layers):
        order += [after_attention(shape, layer, pos) for pos in range(shape.n_pos)]
        if shape.has_mlp:
            order += [("pre", layer + 1, pos) for pos in range(shape.n_pos)]
    return [edge for node in order if node in alive for edge in in_edges(shape, node)]


def connected(shape: Shape, edges: Iterable[Edge]) -> Edges:
    """Those of the edges whose target has a path of the edges to the output."""
    kept = set(edges)
    alive: set[Node] = set()
    waiting = [output(shape)]
    while waiting:
        node = waiting.pop()
        if node not in alive:
            alive.add(node)
            waiting += [source(shape, edge) for edge in in_edges(shape, node) if edge in kept]
    return frozenset(edge for edge in kept if target(shape, edge) in alive)


# -- the model ---------------------------------------------------------------------------------------


@dataclass
class Ablated:
    """What absent edges carry; those of which nothing is said here carry nothing.

    Attributes:
        values: The value of each head, by layer and source.
        patterns: How much a head attends to each source, by layer, head and target; where nothing is said, as in the
            circuit itself.
        vectors: What MLPs and skip connections carry.
        hidden: The activation of each neuron, by layer and token.
    """

    values: dict[tuple[int, int], list[Vector]] = field(default_factory=dict)
    patterns: dict[tuple[int, int, int], Vector] = field(default_factory=dict)
    vectors: dict[Edge, Vector] = field(default_factory=dict)
    hidden: dict[tuple[int, int], Vector] = field(default_factory=dict)


@dataclass
class Run(Ablated):
    """What one forward pass made: the same of every edge, the stream at every node, and the prediction."""

    stream: dict[Node, Vector] = field(default_factory=dict)
    logits: Vector = field(default_factory=lambda: np.zeros(0))


NOTHING = Ablated()


class Oracle:
    """A model and a prompt.

    With `neurons`, each neuron of an MLP is an edge, and not the MLP.
    """

    def __init__(self, model: Any, tokens: Iterable[int], *, neurons: bool = False) -> None:
        self.cfg = model.cfg
        self.tokens = [int(token) for token in tokens]
        d_mlp = self.cfg.d_mlp if neurons else None
        self.shape = Shape(self.cfg.n_layers, self.cfg.n_heads, len(self.tokens), not self.cfg.attn_only, d_mlp)
        self.weights: dict[str, Vector] = {
            name: parameter.detach().double().cpu().numpy() for name, parameter in parameters_of(model).items()
        }
        # OLMo 2 has its norms after the sublayers only, Gemma 2 before and after, all others before.
        self.only_after = getattr(self.cfg, "original_architecture", None) == "Olmo2ForCausalLM"
        self.norm_after = "ln{}" if self.only_after else ""
        if getattr(self.cfg, "use_normalization_before_and_after", False):
            self.norm_after = "ln{}_post"

    def weight(self, layer: int, name: str) -> Vector:
        return self.weights[f"blocks.{layer}.{name}"]

    def mlp_bias(self, layer: int, name: str) -> Vector:
        """Which the gated MLPs of a native bridge have not."""
        return self.weights.get(f"blocks.{layer}.mlp.{name}", np.zeros(1))

    # A norm is (x - mean, or x) / scale * w + b; what is frozen to make it linear is the scale.

    def is_centred(self, norm: str) -> bool:
        kind = self.cfg.normalization_type
        return kind in ("LN", "LNPre") and not (norm == "ln_final" and self.cfg.final_rms)

    def scale(self, norm: str, x: Vector) -> float:
        if self.cfg.normalization_type is None:
            return 1.0
        if self.is_centred(norm):
            x = x - x.mean()
        return float(np.sqrt((x * x).mean() + self.cfg.eps))

    def linearised(self, norm: str, x: Vector, scale: float) -> Vector:
        """The norm at a frozen scale, without its bias."""
        if self.cfg.normalization_type is None:
            return x
        if self.is_centred(norm):
            x = x - x.mean()
        return x / scale * self.weights.get(f"{norm}.w", np.ones(1))

    def normed(self, norm: str, x: Vector) -> Vector:
        return self.linearised(norm, x, self.scale(norm, x)) + self.weights.get(f"{norm}.b", np.zeros(1))

    def embedded(self, pos: int) -> Vector:
        x = self.weights["embed.W_E"][self.tokens[pos]]
        return x + self.weights["pos_embed.W_pos"][pos] if self.cfg.positional_embedding_type == "standard" else x

    def rotated(self, x: Vector, pos: int) -> Vector:
        """Pairs of dimensions, (i, i + half) or neighbours, turned by an angle that grows with the position."""
        if self.cfg.positional_embedding_type != "rotary":
            return x
        half = self.cfg.rotary_dim // 2
        turned = x.copy()
        for i in range(half):
            angle = pos / self.cfg.rotary_base ** (i / half)
            first, second = (2 * i, 2 * i + 1) if self.cfg.rotary_adjacent_pairs else (i, i + half)
            a, b = x[first], x[second]
            turned[first] = a * np.cos(angle) - b * np.sin(angle)
            turned[second] = b * np.cos(angle) + a * np.sin(angle)
        return turned

    def projected(self, layer: int, which: str, x: Vector) -> list[Vector]:
        """The query, key or value of each query head at one position."""
        n_heads = self.cfg.n_heads
        n_stored = n_heads if which == "Q" else self.cfg.n_key_value_heads or n_heads
        grouped = "_" if which != "Q" and self.cfg.n_key_value_heads else ""
        W = self.weight(layer, f"attn.{grouped}W_{which}")
        b = self.weight(layer, f"attn.{grouped}b_{which}")
        stored = [x @ W[i] + b[i] for i in range(n_stored)]
        if self.only_after and which != "V":  # OLMo 2 normalises all queries of a position together, and all keys
            flat = np.concatenate(stored)
            flat = flat / np.sqrt((flat * flat).mean() + self.cfg.eps)
            flat = flat * self.weight(layer, f"attn.{which.lower()}_norm.w")
            stored = list(flat.reshape(n_stored, -1))
        return [stored[head * n_stored // n_heads] for head in range(n_heads)]

    def pattern(self, queries: list[Vector], keys: list[list[Vector]], head: int, dest: int) -> Vector:
        """How much a head at `dest` attends to each token up to it."""
        q = self.rotated(queries[head], dest)
        scale = self.cfg.attn_scale if self.cfg.use_attn_scale else 1.0
        if scale < 0:  # a bridge's word for the usual one
            scale = self.cfg.d_head**0.5
        scores = np.array([q @ self.rotated(keys[src][head], src) / scale for src in range(dest + 1)])
        if (cap := self.cfg.attn_scores_soft_cap) > 0:
            scores = cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    def hidden(self, layer: int, x: Vector) -> Vector:
        """The activations of the neurons that read a stream."""
        if not self.only_after:
            x = self.normed(f"blocks.{layer}.ln2", x)
        act = ACTIVATIONS[self.cfg.act_fn]
        W_in, b_in = self.weight(layer, "mlp.W_in"), self.mlp_bias(layer, "b_in")
        if self.cfg.gated_mlp:
            return act(x @ self.weight(layer, "mlp.W_gate")) * (x @ W_in) + b_in
        return act(x @ W_in + b_in)

    def mlp(self, layer: int, hidden: Vector) -> Vector:
        """What the MLP adds to the stream, given the activations of its neurons."""
        out = hidden @ self.weight(layer, "mlp.W_out") + self.mlp_bias(layer, "b_out")
        return self.normed(f"blocks.{layer}." + self.norm_after.format(2), out) if self.norm_after else out

    def run(
        self,
        kept: Edges | Mapping[Edge, float] | None = None,
        ablated: Ablated = NOTHING,
        *,
        everywhere: bool = False,
    ) -> Run:
        """The model with only some edges, or with shares of them; all if None.

        An absent edge brings what it carries when ablated, by default nothing, and one that is kept in part so much of
        both; patterns, values and norms are those of the stream that results. Contributions are recorded before.

        Args:
            kept: The edges, or the share of each that is kept.
            ablated: What the others carry.
            everywhere: Whether to run the last layer at all tokens, also at those that cannot reach the output.
        """
        shares = kept if isinstance(kept, Mapping) else None if kept is None else dict.fromkeys(kept, 1.0)

        def share(kind: str, *index: int) -> float:
            return 1.0 if shares is None else shares.get((kind, index), 0.0)

        def mixed(own: Vector, instead: Vector | float, share: float) -> Vector:
            return share * own + (1 - share) * instead

        n_layers, n_heads, n_pos, has_mlp, d_mlp = self.shape
        stream: dict[Node, Vector] = {("pre", 0, pos): self.embedded(pos) for pos in range(n_pos)}
        made = Run(stream=stream)
        for layer in range(n_layers):
            before = [stream["pre", layer, pos] for pos in range(n_pos)]
            ln1 = f"blocks.{layer}.ln1"
            read = before if self.only_after else [self.normed(ln1, x) for x in before]
            keys = [self.projected(layer, "K", x) for x in read]
            W_O, b_O = self.weight(layer, "attn.W_O"), self.weight(layer, "attn.b_O")
            written, instead = [], []  # by a head from a source, if it attends to nothing else
            for src in range(n_pos):
                values = made.values[layer, src] = self.projected(layer, "V", read[src])
                written.append([values[head] @ W_O[head] for head in range(n_heads)])
                values = ablated.values.get((layer, src), [np.zeros(len(W_O[0]))] * n_heads)
                instead.append([values[head] @ W_O[head] for head in range(n_heads)])
            # In the last layer nothing but the last token reaches the output.
            for dest in range(n_pos) if everywhere or layer < n_layers - 1 else [n_pos - 1]:
                queries = self.projected(layer, "Q", read[dest])
                brought = {}
                total = b_O.copy()
                for head in range(n_heads):
                    pattern = made.patterns[layer, head, dest] = self.pattern(queries, keys, head, dest)
                    other = ablated.patterns.get((layer, head, dest), pattern)
                    for src in range(dest + 1):
                        vector = brought[head, src] = pattern[src] * written[src][head]
                        of_it = share("head", layer, head, dest, src)
                        total += mixed(vector, other[src] * instead[src][head], of_it)
                attn_out = total
                if self.norm_after:
                    norm = f"blocks.{layer}." + self.norm_after.format(1)
                    frozen = self.scale(norm, total)
                    brought = {at: self.linearised(norm, vector, frozen) for at, vector in brought.items()}
                    attn_out = self.normed(norm, total)
                for (head, src), vector in brought.items():
                    made.vectors["head", (layer, head, dest, src)] = vector

                def left_of(kind: str, own: Vector, at: tuple[int, int] = (layer, dest)) -> Vector:
                    made.vectors[kind, at] = own
                    return mixed(own, ablated.vectors.get((kind, at), 0.0), share(kind, *at))

                mid = attn_out + left_of("resid_attn", before[dest])
                stream[after_attention(self.shape, layer, dest)] = mid
                if has_mlp:
                    hidden = made.hidden[layer, dest] = self.hidden(layer, mid)
                    if d_mlp is None:
                        mlp_out = left_of("mlp", self.mlp(layer, hidden))
                    else:
                        of_each = np.array([share("neuron", layer, dest, neuron) for neuron in range(d_mlp)])
                        absent = ablated.hidden.get((layer, dest), np.zeros(d_mlp))
                        mlp_out = self.mlp(layer, of_each * hidden + (1 - of_each) * absent)
                    stream["pre", layer + 1, dest] = mlp_out + left_of("resid_mlp", mid)
        last = self.normed("ln_final", stream[output(self.shape)])
        logits = last @ self.weights["unembed.W_U"] + self.weights["unembed.b_U"]
        if (cap := self.cfg.output_logits_soft_cap) > 0:
            logits = cap * np.tanh(logits / cap)
        made.logits = logits
        return made

    def means(self) -> Ablated:
        """What edges bring of an average token of the prompt; heads attend to it as they do in the circuit."""
        run, everyone = self.run(everywhere=True), range(self.shape.n_pos)
        mean = Ablated()
        for layer, pos in product(range(self.shape.n_layers), everyone):
            mean.values[layer, pos] = [
                average([run.values[layer, src][head] for src in everyone]) for head in range(self.shape.n_heads)
            ]
            for kind in ("mlp", *RESIDUAL):
                if (kind, (layer, pos)) in run.vectors:
                    mean.vectors[kind, (layer, pos)] = average([run.vectors[kind, (layer, each)] for each in everyone])
            if self.shape.has_mlp:
                mean.hidden[layer, pos] = average([run.hidden[layer, each] for each in everyone])
        return mean

    def circuit(
        self,
        edges: Iterable[Edge],
        *,
        inverse: bool = False,
        keep_residual: bool = False,
        attention: str = "masked",
        ablated: Ablated = NOTHING,
    ) -> Vector:
        """Logits of a circuit, or of its complement, which keeps all skip connections."""
        kept = set(edges)
        everything = all_edges(self.shape)
        if inverse:
            kept = set(everything) - kept
        if inverse or keep_residual:
            kept |= {edge for edge in everything if edge[0] in RESIDUAL}
        if attention == "open":
            kept |= {edge for edge in everything if edge[0] == "head"}
        return self.run(frozenset(kept), ablated).logits

    def effects(
        self,
        metric: Callable[[Vector], float],
        edges: Iterable[Edge],
        kept: Mapping[Edge, float],
        ablated: Sequence[Ablated] = (NOTHING,),
        *,
        step: float = 1e-4,
    ) -> dict[Edge, float]:
        """What a metric of the logits changes by, to first order, as edges are ablated: central differences.

        Args:
            metric: What is measured.
            edges: Of which edges.
            kept: Where the slope is taken: the share of each edge that is kept.
            ablated: What edges carry when ablated, in several runs, over which the mean is taken.
            step: Change of the share of an edge, up and down.
        """

        def measured(edge: Edge, change: float) -> float:
            shares = {**kept, edge: kept[edge] + change}
            return sum(metric(self.run(shares, each).logits) for each in ablated) / len(ablated)

        return {edge: (measured(edge, -step) - measured(edge, step)) / (2 * step) for edge in edges}

    def scores(self, method: str) -> dict[Edge, float]:
        """The importance of every edge, by a method that compares contributions."""
        run = self.run()
        scores: dict[Edge, float] = {}
        for node in nodes(self.shape):
            edges = in_edges(self.shape, node)
            summands = [run.vectors[edge] for edge in edges]
            state = run.stream[node]
            if node == output(self.shape):  # read through the final norm, at the scale that it has on this prompt
                scale = self.scale("ln_final", state)
                summands = [self.linearised("ln_final", vector, scale) for vector in summands]
                state = self.linearised("ln_final", state, scale)
            scores.update(zip(edges, importances(method, summands, state), strict=True))
        return scores


def average(vectors: list[Vector]) -> Vector:
    return np.stack(vectors).mean(0)


def l1(x: Vector) -> float:
    return float(np.abs(x).sum())


def direction(x: Vector) -> Vector:
    """Of length 1, also where the square of the length is too small a number to be held; zero for zero."""
    if x.any():
        x = x / np.abs(x).max()
        return x / np.sqrt(x @ x)
    return x


def importances(method: str, summands: list[Vector], state: Vector) -> list[float]:
    """Importance of each in-edge of one node."""
    if not summands:
        return []
    if method == "norm-ratio":
        return [l1(vector) / l1(state) for vector in summands]
    if method == "cosine":  # a vector of length zero has no direction: neither near nor far
        return [(1 + float(direction(vector) @ direction(state))) / 2 for vector in summands]
    if method == "norm":
        raw = [l1(vector) for vector in summands]
    elif method == "norm-l2":
        raw = [float(np.sqrt(vector @ vector)) for vector in summands]
    elif method in ("flow", "flow-shifted"):
        raw = [l1(state) - l1(state - vector) for vector in summands]
        lowest = abs(min(raw))
        raw = [max(0.0, p) if method == "flow" else p + lowest for p in raw]
    else:
        raise ValueError(method)
    total = sum(raw)
    return [value / total if total > 0 else 0.0 for value in raw]  # no share of nothing


# -- extraction --------------------------------------------------------------------------------------


def greedy(shape: Shape, scores: Mapping[Edge, float]) -> list[Edge]:
    """Best-first growth from the output, by a heap; among equals the one pushed first."""
    heap: list[tuple[float, int, Edge]] = []
    pushed = 0
    seen = {output(shape)}

    def push(node: Node) -> None:
        nonlocal pushed
        for edge in in_edges(shape, node):
            heapq.heappush(heap, (-scores[edge], pushed, edge))
            pushed += 1

    push(output(shape))
    trace: list[Edge] = []
    while heap:
        _, _, edge = heapq.heappop(heap)
        trace.append(edge)
        if (node := source(shape, edge)) not in seen:
            seen.add(node)
            push(node)
    return trace


def thresholds(shape: Shape, scores: Mapping[Edge, float]) -> list[Edges]:
    """The circuits of all thresholds, smallest first: edges above it, of those the ones that reach the output."""
    cuts = [float("-inf"), *sorted(set(scores.values()))]
    return [connected(shape, [edge for edge, score in scores.items() if score > cut]) for cut in reversed(cuts)]


def nucleus(shape: Shape, scores: Mapping[Edge, float], share: float) -> Edges:
    """Per node the fewest best in-edges that make up a share of the total, of those the ones that reach the output.

    Where no in-edge has a score, none is better than another: all are kept.
    """
    kept: list[Edge] = []
    for node in nodes(shape):
        edges = sorted(in_edges(shape, node), key=lambda edge: -scores[edge])
        total = sum(scores[edge] for edge in edges)
        mass = 0.0
        for edge in edges:
            if total > 0 and mass >= share * total:
                break
            kept.append(edge)
            mass += scores[edge]
    return connected(shape, kept)


def nucleus_cuts(shape: Shape, scores: Mapping[Edge, float]) -> list[float]:
    """Shares between any two at which the nucleus circuit changes; too close ones, where rounding decides, left out."""
    changes = {0.0, 1.0}
    for node in nodes(shape):
        best = sorted((scores[edge] for edge in in_edges(shape, node)), reverse=True)
        if sum(best) > 0:
            changes |= {sum(best[:i]) / sum(best) for i in range(1, len(best))}
    ordered = sorted(changes)
    return [(low + high) / 2 for low, high in pairwise(ordered) if high - low > 1e-6 and high <= 1]


# -- metrics -----------------------------------------------------------------------------------------


def probabilities(logits: Vector) -> Vector:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def total_variation(full: Vector, circuit: Vector) -> float:
    return float(np.abs(probabilities(full) - probabilities(circuit)).sum() / 2)


def kl_divergence(full: Vector, circuit: Vector) -> float:
    p, q = probabilities(full), probabilities(circuit)
    return float(sum(p[i] * np.log(p[i] / q[i]) for i in range(len(p)) if p[i] > 0))


def top_nucleus(logits: Vector, percent: int) -> list[int]:
    """The shortest list of tokens, most probable first, that holds a share of the mass."""
    p = probabilities(logits)
    tokens: list[int] = []
    mass = 0.0
    for token in np.argsort(-p, kind="stable"):
        tokens.append(int(token))
        mass += p[token]
        if mass >= percent / 100:
            break
    return tokens


def nucleus_recovery(full: Vector, circuit: Vector) -> float:
    """The largest share whose nucleus is the same list for both; 0 if there is none."""
    same = [percent for percent in NUCLEI if top_nucleus(full, percent) == top_nucleus(circuit, percent)]
    return max(same, default=0) / 100
