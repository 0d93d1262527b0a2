"""A second implementation of the component graph and its scores, in plain loops and float64, to test against.

It shares nothing with the package: no hooks, no closed forms, no batches, one prompt at a time. It reads weights
out of a `HookedTransformer` and does the forward pass by itself, with a separately assembled input for every reader.

A writer adds to the residual stream: ``input`` (the token embedding), ``a{l}.h{h}`` (a head), ``m{l}`` (an MLP). A
reader takes its own copy of the stream before a norm: ``a{l}.h{h}<q>``, ``<k>``, ``<v>``, ``m{l}``, ``logits``; where
query heads share keys and values, ``a{l}.kv{g}<k>`` and ``<v>``. An edge is its name, ``writer->reader``. What no
writer adds (learned positions, b_O) is part of every run and is never ablated. A tensor is ``[pos, d_model]`` and
float64 unless it says otherwise.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.lens import HAS_HOOKED, HookedTransformer, compute_in_float64, parameters_of

Metric: TypeAlias = Callable[[Tensor], Tensor]  # logits [d_vocab] -> scalar
Values: TypeAlias = Mapping[str, Tensor]  # one tensor [pos, d_model] for each writer
Gradients: TypeAlias = dict[str, Tensor]  # one tensor [pos, d_model] for each reader
Scores: TypeAlias = dict[str, float]  # one number for each edge
PositionScores: TypeAlias = dict[str, Tensor]  # one tensor [pos] for each edge

# settings of `HookedTransformer` that change what it computes, and that the oracle does not know
FOREIGN = (
    "use_normalization_before_and_after",
    "post_embedding_ln",
    "num_experts",
    "clip_qkv",
    "use_attention_sinks",
    "use_local_attn",
    "use_logn_attn",
    "use_NTK_by_parts_rope",
    "use_yarn_rope",
    "use_dynamic_ntk_rope",
    "rotary_base_local",
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.clamp(x, min=0),
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


# -- the graph ---------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What the graph depends on; ``n_groups`` key/value heads, as many as heads where each has its own."""

    n_layers: int
    n_heads: int
    n_groups: int
    has_mlp: bool = True
    parallel: bool = False  # attention and MLP of a block read the same stream


def edge_name(writer: str, reader: str) -> str:
    return f"{writer}->{reader}"


def ends(edge: str) -> tuple[str, str]:
    """Writer and reader."""
    writer, reader = edge.split("->")
    return writer, reader


def heads_of(shape: Shape, layer: int) -> list[str]:
    return [f"a{layer}.h{head}" for head in range(shape.n_heads)]


def key_value_names(shape: Shape, layer: int) -> list[str]:
    """Whose keys (or values) a layer has: the heads', or the groups'."""
    if shape.n_groups == shape.n_heads:
        return heads_of(shape, layer)
    return [f"a{layer}.kv{group}" for group in range(shape.n_groups)]


def list_writers(shape: Shape) -> list[str]:
    names = ["input"]
    for layer in range(shape.n_layers):
        names += heads_of(shape, layer)
        if shape.has_mlp:
            names.append(f"m{layer}")
    return names


def list_readers(shape: Shape) -> list[str]:
    names = []
    for layer in range(shape.n_layers):
        names += [f"{name}<q>" for name in heads_of(shape, layer)]
        names += [f"{name}<k>" for name in key_value_names(shape, layer)]
        names += [f"{name}<v>" for name in key_value_names(shape, layer)]
        if shape.has_mlp:
            names.append(f"m{layer}")
    return [*names, "logits"]


def layer_of(name: str) -> int:
    """Of a writer or reader inside the blocks."""
    return int(name[1:].split(".")[0])


def writers_into(shape: Shape, reader: str) -> list[str]:
    """What the stream holds when a reader reads it, in the order of the writers."""
    if reader == "logits":
        return list_writers(shape)
    layer = layer_of(reader)
    names = ["input"]
    for earlier in range(layer):
        names += heads_of(shape, earlier)
        if shape.has_mlp:
            names.append(f"m{earlier}")
    if reader == f"m{layer}" and not shape.parallel:
        names += heads_of(shape, layer)
    return names


def list_edges(shape: Shape) -> list[str]:
    """Reader by reader."""
    return [edge_name(writer, reader) for reader in list_readers(shape) for writer in writers_into(shape, reader)]


def nodes_of(shape: Shape, reader: str) -> list[str]:
    """The heads that use a reader's input (several where they share keys and values), or the MLP, or the logits."""
    if ".kv" in reader:
        group = int(reader.split(".kv")[1].split("<")[0])
        size = shape.n_heads // shape.n_groups
        return heads_of(shape, layer_of(reader))[group * size : (group + 1) * size]
    return [reader.split("<")[0]]


def prune(shape: Shape, edges: Iterable[str]) -> set[str]:
    """What is left when nodes without in-edge or without out-edge go, with their edges, again and again."""
    left = set(edges)
    alive = {*list_writers(shape), "logits"}
    while True:
        fed = {"input"}
        used = {"logits"}
        for edge in left:
            writer, reader = ends(edge)
            fed.update(nodes_of(shape, reader))
            used.add(writer)
        dead = {node for node in alive if node not in fed or node not in used}
        if not dead:
            return left
        alive -= dead
        left = {
            edge
            for edge in left
            if ends(edge)[0] in alive and any(node in alive for node in nodes_of(shape, ends(edge)[1]))
        }


def greedy(shape: Shape, scores: Mapping[str, float], n: int) -> list[str]:
    """The first n edges, best first, of a circuit that grows from the logits; fewer if it cannot grow further.

    Of two equal scores the edge goes first that `list_edges` has first. The scores are taken as they are: pass
    absolute values for a circuit by size.
    """
    reached = {"logits"}
    chosen: list[str] = []
    while len(chosen) < n:
        best = None
        for edge in list_edges(shape):
            offered = any(node in reached for node in nodes_of(shape, ends(edge)[1]))
            if offered and edge not in chosen and (best is None or scores[edge] > scores[best]):
                best = edge
        if best is None:
            break
        chosen.append(best)
        reached.add(ends(best)[0])
    return chosen


# -- the forward pass --------------------------------------------------------------------------------


@dataclass
class Trace:
    """Everything a run computed."""

    logits: Tensor = field(default_factory=lambda: torch.empty(0))  # [d_vocab], of the last position
    writers: dict[str, Tensor] = field(default_factory=dict)
    readers: dict[str, Tensor] = field(default_factory=dict)  # the inputs, before the norm
    neurons: dict[int, Tensor] = field(default_factory=dict)  # by layer [pos, d_mlp]: what W_out multiplies


class ComponentOracle:
    """The component graph of one model."""

    def __init__(self, model: HookedTransformer, ungroup: bool = False) -> None:
        cfg = model.cfg
        attention = model.blocks[0].attn
        assert cfg.positional_embedding_type in ("standard", "rotary") and cfg.attention_dir == "causal"
        assert cfg.normalization_type in ("LN", "LNPre", "RMS", "RMSPre", None)
        assert cfg.attn_only or cfg.act_fn in ACTIVATIONS
        assert not any(getattr(cfg, name, None) for name in FOREIGN)
        assert getattr(attention, "q_norm", None) is None
        assert cfg.attn_scores_soft_cap <= 0 and cfg.output_logits_soft_cap <= 0
        assert getattr(cfg, "rotary_scaling_factor", 1) == 1
        self.cfg = copy.deepcopy(cfg)
        self.weights = {name: value.detach().to("cpu", torch.float64) for name, value in parameters_of(model).items()}
        self.weights = {name: value.clone() for name, value in self.weights.items()}
        attentions = [block.attn for block in model.blocks]
        self.scales = [float(each.attn_scale if HAS_HOOKED else each.original_component.scale) for each in attentions]
        self.n_stored = cfg.n_key_value_heads or cfg.n_heads  # key/value heads that have weights
        self.shape = Shape(
            cfg.n_layers,
            cfg.n_heads,
            cfg.n_heads if ungroup else self.n_stored,
            not cfg.attn_only,
            bool(getattr(cfg, "parallel_attn_mlp", False)),
        )
        self.writers = list_writers(self.shape)
        self.readers = list_readers(self.shape)
        self.edges = list_edges(self.shape)

    # .. parts of the model

    def mlp_bias(self, layer: int, name: str) -> Tensor:
        """Which the gated MLPs of a native bridge have not."""
        return self.weights.get(f"blocks.{layer}.mlp.{name}", torch.zeros(1, dtype=torch.float64))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Of the module that the weights call by that name: ``blocks.0.ln1`` to ``ln_final``."""
        kind = self.cfg.normalization_type
        if kind is None:
            return x
        if kind.startswith("LN") and not (name == "ln_final" and self.cfg.final_rms):
            x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.cfg.eps)
        if f"{name}.w" in self.weights:
            x = x * self.weights[f"{name}.w"]
        if f"{name}.b" in self.weights:
            x = x + self.weights[f"{name}.b"]
        return x

    def rotate(self, x: Tensor) -> Tensor:
        """Turns pairs of the first ``rotary_dim`` entries of ``[pos, d_head]``, further at later positions."""
        if self.cfg.positional_embedding_type != "rotary":
            return x
        half = self.cfg.rotary_dim // 2
        columns = list(x.unbind(-1))
        positions = torch.arange(len(x), dtype=torch.float64)
        for pair in range(half):
            first, second = (2 * pair, 2 * pair + 1) if self.cfg.rotary_adjacent_pairs else (pair, pair + half)
            angle = positions / self.cfg.rotary_base ** (pair / half)
            cos, sin = torch.cos(angle), torch.sin(angle)
            columns[first] = x[:, first] * cos - x[:, second] * sin
            columns[second] = x[:, second] * cos + x[:, first] * sin
        return torch.stack(columns, dim=-1)

    def project(self, x: Tensor, layer: int, kind: str, head: int) -> Tensor:
        """Queries, keys or values ``[pos, d_head]`` of a query head from its stream; kind is Q, K or V."""
        prefix = f"blocks.{layer}.attn."
        grouped = kind != "Q" and self.cfg.n_key_value_heads is not None
        index = head // (self.cfg.n_heads // self.n_stored) if grouped else head
        mark = "_" if grouped else ""
        weight, bias = self.weights[f"{prefix}{mark}W_{kind}"], self.weights[f"{prefix}{mark}b_{kind}"]
        return self.norm(x, f"blocks.{layer}.ln1") @ weight[index] + bias[index]

    def head(self, layer: int, head: int, x_q: Tensor, x_k: Tensor, x_v: Tensor) -> Tensor:
        """What a head writes, without b_O."""
        q = self.rotate(self.project(x_q, layer, "Q", head))
        k = self.rotate(self.project(x_k, layer, "K", head))
        v = self.project(x_v, layer, "V", head)
        future = torch.ones(len(q), len(q)).triu(1).bool()
        scores = (q @ k.T / self.scales[layer]).masked_fill(future, -math.inf)
        return torch.softmax(scores, -1) @ v @ self.weights[f"blocks.{layer}.attn.W_O"][head]

    def neurons(self, layer: int, x: Tensor) -> Tensor:
        """What W_out multiplies, ``[pos, d_mlp]``."""
        x = self.norm(x, f"blocks.{layer}.ln2")
        prefix = f"blocks.{layer}.mlp."
        W_in, b_in = self.weights[prefix + "W_in"], self.mlp_bias(layer, "b_in")
        activation = ACTIVATIONS[self.cfg.act_fn]
        if self.cfg.gated_mlp:
            return activation(x @ self.weights[prefix + "W_gate"]) * (x @ W_in) + b_in
        return activation(x @ W_in + b_in)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.weights["embed.W_E"][tokens]

    def constants(self, reader: str, n_pos: int) -> Tensor:
        """What a reader's stream holds that no writer adds: learned positions and the b_O of the blocks before."""
        total = torch.zeros(n_pos, self.cfg.d_model, dtype=torch.float64)
        if self.cfg.positional_embedding_type == "standard":
            total = total + self.weights["pos_embed.W_pos"][:n_pos]
        n_attentions = self.cfg.n_layers if reader == "logits" else layer_of(reader)
        if reader.startswith("m") and not self.shape.parallel:
            n_attentions += 1
        for layer in range(n_attentions):
            total = total + self.weights[f"blocks.{layer}.attn.b_O"]
        return total

    def forward(
        self,
        tokens: Tensor,
        term: Callable[[str, str, Tensor], Tensor] | None = None,
        nudges: Mapping[str, Tensor] | None = None,
        replaced: Values | None = None,
    ) -> Trace:
        """One run of a prompt ``[pos]``.

        Args:
            term: what a writer adds to a reader's input in place of its output of this run, from (writer, reader,
                that output).
            nudges: added to the inputs of readers.
            replaced: taken as the outputs of some writers, whatever those compute.
        """
        tokens = torch.as_tensor(tokens).cpu()
        assert tokens.ndim == 1
        trace = Trace()

        def read(reader: str) -> Tensor:
            total = self.constants(reader, len(tokens))
            for writer in writers_into(self.shape, reader):
                z = trace.writers[writer]
                total = total + (z if term is None else term(writer, reader, z))
            if nudges is not None and reader in nudges:
                total = total + nudges[reader]
            trace.readers[reader] = total
            return total

        def write(writer: str, z: Tensor) -> None:
            trace.writers[writer] = replaced[writer] if replaced is not None and writer in replaced else z

        write("input", self.embed(tokens))
        for layer in range(self.shape.n_layers):
            names = heads_of(self.shape, layer)
            owners = key_value_names(self.shape, layer)
            queries = [read(f"{name}<q>") for name in names]
            keys = [read(f"{owner}<k>") for owner in owners]
            values = [read(f"{owner}<v>") for owner in owners]
            stream = read(f"m{layer}") if self.shape.has_mlp and self.shape.parallel else None
            for head, name in enumerate(names):
                group = head * len(owners) // len(names)
                write(name, self.head(layer, head, queries[head], keys[group], values[group]))
            if self.shape.has_mlp:
                stream = read(f"m{layer}") if stream is None else stream
                trace.neurons[layer] = self.neurons(layer, stream)
                W_out = self.weights[f"blocks.{layer}.mlp.W_out"]
                write(f"m{layer}", trace.neurons[layer] @ W_out + self.mlp_bias(layer, "b_out"))
        last = self.norm(read("logits"), "ln_final")[-1]
        trace.logits = last @ self.weights["unembed.W_U"] + self.weights["unembed.b_U"]
        return trace

    # .. circuits

    def run(
        self, tokens: Tensor, kept: Iterable[str] | None = None, ablated: Values | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits ``[d_vocab]`` and writer outputs when edges that are not kept carry the ablated values; None: all."""
        if kept is None:
            trace = self.forward(tokens)
        else:
            assert ablated is not None
            chosen = set(kept)
            assert chosen <= set(self.edges)
            trace = self.forward(
                tokens, lambda writer, reader, z: z if edge_name(writer, reader) in chosen else ablated[writer]
            )
        return trace.logits, trace.writers

    def run_positions(
        self, tokens: Tensor, kept: Iterable[tuple[str, str, int]], ablated: Values
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `run`, with edges that are kept or not at each position: (writer, reader, position)."""
        chosen = set(kept)
        assert {edge_name(writer, reader) for writer, reader, _ in chosen} <= set(self.edges)

        def term(writer: str, reader: str, z: Tensor) -> Tensor:
            rows = [z[pos] if (writer, reader, pos) in chosen else ablated[writer][pos] for pos in range(len(tokens))]
            return torch.stack(rows)

        trace = self.forward(tokens, term)
        return trace.logits, trace.writers

    # .. values to ablate with

    def corrupted_values(self, corrupted_tokens: Tensor) -> dict[str, Tensor]:
        return self.forward(corrupted_tokens).writers

    def zero_values(self, n_pos: int) -> dict[str, Tensor]:
        return {writer: torch.zeros(n_pos, self.cfg.d_model, dtype=torch.float64) for writer in self.writers}

    def mean_values(self, prompts: Sequence[Tensor], n_pos: int) -> dict[str, Tensor]:
        """Over all positions of all prompts, whatever their lengths: the same row at each of n_pos positions."""
        runs = [self.forward(tokens).writers for tokens in prompts]
        means = {writer: torch.cat([values[writer] for values in runs]).mean(0) for writer in self.writers}
        return {writer: torch.stack([mean] * n_pos) for writer, mean in means.items()}

    def mean_positional_values(self, prompts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Over equally long prompts, position by position."""
        runs = [self.forward(tokens).writers for tokens in prompts]
        return {writer: torch.stack([values[writer] for values in runs]).mean(0) for writer in self.writers}

    # .. gradients with respect to the readers' inputs

    def gradients(self, tokens: Tensor, metric: Metric, replaced: Values | None = None) -> Gradients:
        """Of the metric at the plain run, or at a run in which some writers are replaced by constants."""
        nudges = {
            reader: torch.zeros(len(tokens), self.cfg.d_model, dtype=torch.float64, requires_grad=True)
            for reader in self.readers
        }
        with torch.enable_grad():
            value = metric(self.forward(tokens, nudges=nudges, replaced=replaced).logits)
            found = torch.autograd.grad(value, list(nudges.values()), allow_unused=True)
        return {
            reader: torch.zeros_like(nudges[reader]) if gradient is None else gradient
            for reader, gradient in zip(self.readers, found, strict=True)
        }

    def mean_of(self, runs: Sequence[Gradients]) -> Gradients:
        return {reader: torch.stack([run[reader] for run in runs]).mean(0) for reader in self.readers}

    def between(self, tokens: Tensor, ablated: Values, share: float) -> dict[str, Tensor]:
        """The embedding on the way from the ablated one (share 0) to that of the tokens (share 1)."""
        clean = self.embed(torch.as_tensor(tokens))
        return {"input": ablated["input"] + share * (clean - ablated["input"])}

    def ig_input_gradients(self, tokens: Tensor, ablated: Values, metric: Metric, steps: int) -> Gradients:
        shares = [k / steps for k in range(steps)]
        return self.mean_of([self.gradients(tokens, metric, self.between(tokens, ablated, share)) for share in shares])

    def clean_corrupted_gradients(self, tokens: Tensor, ablated: Values, metric: Metric) -> Gradients:
        other = self.gradients(tokens, metric, self.between(tokens, ablated, 0.0))
        return self.mean_of([self.gradients(tokens, metric), other])

    def groups(self) -> list[list[str]]:
        """Writers that are interpolated together: the input, all heads of a layer, each MLP."""
        found = [["input"]]
        for layer in range(self.shape.n_layers):
            found.append(heads_of(self.shape, layer))
            if self.shape.has_mlp:
                found.append([f"m{layer}"])
        return found

    def ig_activation_gradients(self, tokens: Tensor, ablated: Values, metric: Metric, steps: int) -> Gradients:
        clean = self.forward(tokens).writers
        runs = []
        for group in self.groups():
            for k in range(1, steps + 1):
                alpha = k / steps
                replaced = {writer: alpha * clean[writer] + (1 - alpha) * ablated[writer] for writer in group}
                runs.append(self.gradients(tokens, metric, replaced))
        return self.mean_of(runs)

    # .. scores of edges

    def products(self, tokens: Tensor, ablated: Values, gradients: Gradients) -> PositionScores:
        """Ablated minus clean output of the writer, times the reader's gradient, at each position."""
        clean = self.forward(tokens).writers
        scores = {}
        for edge in self.edges:
            writer, reader = ends(edge)
            scores[edge] = ((ablated[writer] - clean[writer]) * gradients[reader]).sum(-1)
        return scores

    def eap_positions(self, tokens: Tensor, ablated: Values, metric: Metric) -> PositionScores:
        return self.products(tokens, ablated, self.gradients(tokens, metric))

    def eap(self, tokens: Tensor, ablated: Values, metric: Metric) -> Scores:
        return over_positions(self.eap_positions(tokens, ablated, metric))

    def eap_ig_inputs(self, tokens: Tensor, ablated: Values, metric: Metric, steps: int) -> Scores:
        gradients = self.ig_input_gradients(tokens, ablated, metric, steps)
        return over_positions(self.products(tokens, ablated, gradients))

    def clean_corrupted(self, tokens: Tensor, ablated: Values, metric: Metric) -> Scores:
        gradients = self.clean_corrupted_gradients(tokens, ablated, metric)
        return over_positions(self.products(tokens, ablated, gradients))

    def eap_ig_activations(self, tokens: Tensor, ablated: Values, metric: Metric, steps: int) -> Scores:
        gradients = self.ig_activation_gradients(tokens, ablated, metric, steps)
        return over_positions(self.products(tokens, ablated, gradients))

    def exact(self, tokens: Tensor, ablated: Values, metric: Metric) -> Scores:
        """How much the metric changes when one edge alone carries the ablated value."""
        clean = float(metric(self.run(tokens)[0]))
        everything = set(self.edges)
        return {edge: float(metric(self.run(tokens, everything - {edge}, ablated)[0])) - clean for edge in self.edges}

    def flow(self, tokens: Tensor) -> Scores:
        """How near a writer's output is to a reader's input, as a share of all writers', mean over positions."""
        trace = self.forward(tokens)
        scores = {}
        for reader in self.readers:
            names = writers_into(self.shape, reader)
            positions = [len(tokens) - 1] if reader == "logits" else list(range(len(tokens)))
            shares: dict[str, list[float]] = {writer: [] for writer in names}
            for pos in positions:
                y = trace.readers[reader][pos]
                near = [max(0.0, float(y.abs().sum() - (y - trace.writers[w][pos]).abs().sum())) for w in names]
                total = sum(near)
                for writer, value in zip(names, near, strict=True):
                    shares[writer].append(value / total if total > 0 else 0.0)
            for writer in names:
                scores[edge_name(writer, reader)] = sum(shares[writer]) / len(positions)
        return scores

    def magnitude(self, tokens: Tensor, ablated: Values) -> Scores:
        """How much ablation changes a writer's output, summed over positions; into the logits, only at the last."""
        clean = self.forward(tokens).writers
        scores = {}
        for edge in self.edges:
            writer, reader = ends(edge)
            positions = [len(tokens) - 1] if reader == "logits" else list(range(len(tokens)))
            change = ablated[writer] - clean[writer]
            scores[edge] = sum(math.sqrt(float((change[pos] ** 2).sum())) for pos in positions)
        return scores

    def neuron_scores(
        self, tokens: Tensor, corrupted_tokens: Tensor, metric: Metric
    ) -> dict[tuple[int, int, str], float]:
        """As `eap` with corrupted values, for each (layer, neuron, reader that the layer's MLP writes to)."""
        clean, corrupted = self.forward(tokens), self.forward(corrupted_tokens)
        gradients = self.gradients(tokens, metric)
        scores = {}
        for layer in clean.neurons:
            change = corrupted.neurons[layer] - clean.neurons[layer]
            W_out = self.weights[f"blocks.{layer}.mlp.W_out"]
            for reader in self.readers:
                if f"m{layer}" in writers_into(self.shape, reader):
                    for neuron in range(len(W_out)):
                        score = (change[:, neuron] * (gradients[reader] @ W_out[neuron])).sum()
                        scores[layer, neuron, reader] = float(score)
        return scores


def over_positions(scores: PositionScores) -> Scores:
    return {edge: float(score.sum()) for edge, score in scores.items()}


# -- for comparisons with TransformerLens -------------------------------------------------------------


def float64_copy(model: HookedTransformer) -> HookedTransformer:
    """A private copy in float64 on the CPU, with rotary angles that were never rounded to float32."""
    model = copy.deepcopy(model).to("cpu", print_details=False).to(torch.float64, print_details=False)
    assert model.cfg.dtype == torch.float64  # to which TransformerLens casts after each norm
    if not HAS_HOOKED:
        compute_in_float64(model)
        return model.eval()
    for block in model.blocks:
        if model.cfg.positional_embedding_type == "rotary":
            sin, cos = block.attn.calculate_sin_cos_rotary(
                model.cfg.rotary_dim, len(block.attn.rotary_sin), base=model.cfg.rotary_base, dtype=torch.float64
            )
            block.attn.rotary_sin, block.attn.rotary_cos = sin, cos
    return model.eval()


def logit_difference(right: int, wrong: int) -> Metric:
    """A metric with signs: how far one logit is above another."""
    return lambda logits: logits[right] - logits[wrong]


def log_probability(token: int) -> Metric:
    """A metric that is not linear in the logits."""
    return lambda logits: functional.log_softmax(logits, dim=-1)[token]
