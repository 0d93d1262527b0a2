"""Plans: what a method will need, known before it is run."""

import html
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsIndex, get_args

import numpy as np
import torch
from torch import Tensor

from tracedensity.ablate import N_RESAMPLED
from tracedensity.choices import Ablation, GraphName, Method, TokenAblation
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import TokenGraph
from tracedensity.model import Transformer, adapter_of, as_transformer, is_offloading, offload_activations
from tracedensity.model.spread import bytes_of, memory_of, storages
from tracedensity.score import GRADIENTS, chosen_method, scored
from tracedensity.score.eap import HELD, WORKSPACE, runs_of
from tracedensity.setting import gradients_at_once, rows_at_once

if TYPE_CHECKING:
    import pandas as pd

_REHEARSED = 12
"""Length of the longest of three prompts that a rehearsal runs: what is kept is quadratic in the length."""

_PATTERNS = {
    ("HookedTransformer", False): 4.25,
    ("HookedTransformer", True): 4.25,
    ("TransformerBridge", False): 2.3,
    ("TransformerBridge", True): 3.5,
}
"""Copies of the attention pattern that a layer has at a time, scores and masked scores among them, by class and whether
the pattern is edited; with these, plans agree with what `benchmarks.memory` measures."""

_BACKWARD = 3
"""A forward and a backward pass, in forward passes."""


@dataclass(frozen=True)
class Plan:
    """What scoring every edge will need, and running circuits if any are planned.

    Attributes:
        model: Name of the model.
        graph: ``"token"`` or ``"component"``.
        method: How edges are scored.
        n_tokens: Tokens of each prompt.
        n_examples: Prompts.
        n_circuits: Circuits to be run on each of them.
        n_edges: Edges of the graph.
        weights: Bytes of the model.
        activations: Bytes of what is kept of forward passes: for backward passes, or for the sums that are taken apart.
        offloaded: Bytes of that which `offload_activations` keeps in main memory; they do not count as activations.
        ranks: Bytes of the scores, of the mask of which edges there are, and, if circuits are run, of their order.
        workspace: Bytes of what is needed beside, for a while.
        forward_passes: Work in forward passes of one prompt each; a backward pass counts as two.
    """

    model: str
    graph: GraphName
    method: str
    n_tokens: int
    n_examples: int
    n_circuits: int
    n_edges: int
    weights: int
    activations: int
    offloaded: int
    ranks: int
    workspace: int
    forward_passes: float

    @property
    def memory(self) -> int:
        """Bytes on the model's device altogether, at most."""
        return self.weights + self.activations + self.ranks + self.workspace

    def table(self) -> "pd.DataFrame":
        """What there is, how much of it, and in which unit."""
        import pandas as pd

        rows = [
            ("edges", f"{self.n_edges:,}"),
            *((name, _in_bytes(getattr(self, name))) for name in ("weights", "activations", "ranks", "workspace")),
            ("memory", _in_bytes(self.memory)),
            *([("in main memory", _in_bytes(self.offloaded))] if self.offloaded else []),
            ("forward passes", f"{self.forward_passes:,.0f}"),
        ]
        return pd.DataFrame(rows, columns=["what", "how much"])

    @property
    def _title(self) -> str:
        examples = f" x {self.n_examples}" if self.n_examples > 1 else ""
        circuits = f", {self.n_circuits} circuits" if self.n_circuits else ""
        return f"{self.model}, {self.graph} graph, {self.method}, {self.n_tokens} tokens{examples}{circuits}"

    def __repr__(self) -> str:
        lines = [f"  {what:<15}{much:>12}" for what, much in self.table().itertuples(index=False)]
        return "\n".join([f"Plan({self._title})", *lines])

    def _repr_html_(self) -> str:
        return f"<p><b>Plan</b> {html.escape(self._title)}</p>{self.table().to_html(index=False, border=0)}"


def plan(
    model_or_config: object,
    n_tokens: SupportsIndex,
    *,
    graph: GraphName | str = "token",
    method: Method | str | None = None,
    ablation: str | None = None,
    steps: int = 5,
    ungroup: bool = False,
    positions: bool = False,
    neurons: bool = False,
    n_examples: SupportsIndex = 1,
    n_circuits: SupportsIndex = 0,
    dtype: torch.dtype | None = None,
) -> Plan:
    """What scoring the edges of a model will need: edges, memory, and work, before it is tried.

    A model is rehearsed: what it keeps for a backward pass is counted at a few tokens, and is a quadratic function of
    their number. Of a configuration, a copy with two and with three narrow layers is made and rehearsed, which takes
    seconds for a model of any size; its weights are never loaded.

    On an accelerator as many rows are run at once as half of the free memory has room for, so that more of it may be
    used than is said of a configuration, which counts as being on a CPU. Prompts count as having no answers of their
    own: a task that has some needs a pass less per example, unless its metric compares with the model's own prediction.

    Within `offload_activations`, the plan is that of a model on an accelerator that keeps them in main memory.

    Args:
        model_or_config: A model of TransformerLens; a name for `load_model`; the folder of a model in Hugging Face
            layout, of which only ``config.json`` is read; or a configuration of Hugging Face.
        n_tokens: Tokens of each prompt.
        graph: As for `attribute`, like `method`, `ablation`, `steps`, `ungroup`, `positions` and `neurons`.
        n_examples: Prompts of a task; the token graph has one.
        n_circuits: Circuits that are to be run as well on each prompt; those that lack MLPs' edges take less.
        dtype: Precision of the weights of a configuration, by default float32.

    Returns:
        The plan; ``python -m benchmarks.memory`` prints how far its memory is from what is measured.

    Raises:
        ValueError: If an argument is not as described.
    """
    numbers = {"n_tokens": n_tokens, "n_examples": n_examples, "n_circuits": n_circuits, "steps": steps}
    for name, value in numbers.items():
        if not hasattr(value, "__index__") or value.__index__() < (name != "n_circuits"):
            raise ValueError(f"`{name}` must be a whole number of at least {int(name != 'n_circuits')}, got {value!r}.")
    n_tokens, n_examples, n_circuits = (value.__index__() for value in (n_tokens, n_examples, n_circuits))
    method, on_tokens = chosen_method(graph, method, ablation), graph == "token"
    ablations = get_args(TokenAblation if on_tokens else Ablation)
    if ablation not in (None, *ablations):
        raise ValueError(f"`ablation` must be one of {list(ablations)} on the {graph} graph, got {ablation!r}.")
    if on_tokens and (n_examples > 1 or ungroup or positions):
        name = "n_examples" if n_examples > 1 else "ungroup" if ungroup else "positions"
        raise ValueError(f"`{name}` must be left out on the token graph, where it means nothing.")
    sketch = _sketch(model_or_config, dtype)
    model = sketch.model
    if n_tokens > model.n_ctx:
        raise ValueError(f"`n_tokens` must fit the context of {model.name}, {model.n_ctx} tokens, got {n_tokens}.")
    if ablation is None:
        ablation = "zero" if on_tokens else "resample"
    whole: TokenGraph | ComponentGraph
    if on_tokens:
        whole = TokenGraph.of(model, n_tokens, neurons=neurons)
    else:
        n_pos = n_tokens if positions else None
        whole = ComponentGraph.of(model, n_pos=n_pos, ungroup=ungroup, neurons=neurons)
    job = _Job(sketch, whole, method, ablation, steps, n_tokens, n_examples)
    needs = job.of_scores()
    if n_circuits:
        most = max(needs, job.of_circuits(n_circuits), key=lambda each: each.activations + each.workspace)
        needs = replace(most, offloaded=needs.offloaded)
    passes = float(job.passes + n_circuits * job.n_rows)
    return Plan(
        model.name, "token" if on_tokens else "component", method, n_tokens, n_examples, n_circuits, whole.n_edges,
        sketch.weights, needs.activations, needs.offloaded, job.ranks(n_circuits), needs.workspace, passes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Needs:
    activations: int
    workspace: int
    offloaded: int = 0


# -- the model ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sketch:
    """What is known of a model.

    Attributes:
        model: Its shape; of a configuration, the rest of it is that of a narrow copy.
        weights: Bytes.
        kept: Bytes that a differentiable run keeps, by options of `attribute`, number of tokens and of rows.
    """

    model: Transformer
    weights: int
    kept: Callable[[Mapping[str, Any], int, int], int]


def _sketch(model_or_config: object, dtype: torch.dtype | None) -> _Sketch:
    from tracedensity.loading.configuration import configuration

    config = configuration(model_or_config)
    if config is not None:
        return _sketch_of_config(config, dtype or torch.float32)
    if dtype is not None:
        raise ValueError(f"`dtype` must be left out for a model, which has one, got {dtype}.")
    if not isinstance(model_or_config, Transformer) and adapter_of(model_or_config) is None:
        raise ValueError(
            "`model_or_config` must be a model of TransformerLens, a configuration of Hugging Face, a name or a "
            f"folder, got {type(model_or_config).__name__}."
        )
    model = as_transformer(model_or_config)

    def kept(options: Mapping[str, Any], n_tokens: int, n_rows: int) -> int:
        return round(float(_rehearsed(model, options) @ _powers(n_tokens, n_rows)))

    return _Sketch(model, bytes_of(model.model), kept)


def _sketch_of_config(config: Any, dtype: torch.dtype) -> _Sketch:
    from tracedensity.loading.configuration import miniature, weight_bytes

    two, three = (as_transformer(miniature(config, n_layers, dtype)) for n_layers in (2, 3))
    n_layers = config.num_hidden_layers
    scale = config.hidden_size // two.d_model
    model = replace(
        two, name=str(getattr(config, "name_or_path", "") or config.model_type), n_layers=n_layers,
        d_model=config.hidden_size, d_head=two.d_head * scale, d_mlp=two.d_mlp * scale, d_vocab=config.vocab_size,
        n_ctx=getattr(config, "max_position_embeddings", None) or two.n_ctx,
    )  # fmt: skip
    size = torch.promote_types(dtype, torch.float32).itemsize

    def kept(options: Mapping[str, Any], n_tokens: int, n_rows: int) -> int:
        few, more = _rehearsed(two, options), _rehearsed(three, options)
        # copies of weights grow with the square of the width, what tokens have with the width, patterns not
        wide = (few + (n_layers - 2) * (more - few)) * np.array([scale**2, scale, 1])
        return round(float(wide @ _powers(n_tokens, n_rows))) + 3 * n_rows * size * (config.vocab_size - two.d_vocab)

    weights = weight_bytes(config, dtype)
    if two.adapter.kind == "TransformerBridge":  # which splits projections that are fused, and keeps both
        more = [bytes_of(each.model) - weight_bytes(each.model.original_model.config, dtype) for each in (two, three)]
        weights += n_layers * scale**2 * (more[1] - more[0])
    return _Sketch(model, weights, kept)


# -- a rehearsal --------------------------------------------------------------------------------------


def _powers(n_tokens: int, n_rows: int = 1) -> np.ndarray:
    """Of the number of tokens; what does not depend on it, copies of weights, is there once for all rows."""
    return np.array([1.0, n_rows * n_tokens, n_rows * n_tokens**2])


def _rehearsed(model: Transformer, options: Mapping[str, Any]) -> np.ndarray:
    """What one row keeps for its backward pass: bytes by powers of the number of tokens."""
    longest, kept = min(_REHEARSED, model.n_ctx), []
    lengths = sorted({max(1, longest * third // 3) for third in (1, 2, 3)})
    for n_tokens in lengths:
        prompt = [token % model.d_vocab for token in range(n_tokens)]
        with offload_activations(False), _counted(model) as most:
            scored(model, prompt, metric="logprob", position=-1, seed=0, **options)
        kept.append(most())
    # of fewer than three lengths any that fits: a longer prompt does not fit the model
    return np.linalg.lstsq(np.stack([_powers(n_tokens) for n_tokens in lengths]), np.array(kept, dtype=float))[0]


@contextmanager
def _counted(model: Transformer) -> Iterator[Callable[[], int]]:
    """While open, bytes are counted that are kept for backward passes and are no weights; gives the most at a time."""
    own = storages(model.model)
    held: dict[int, list[int]] = {}  # storage: how often it is kept, its size
    count = {"now": 0, "most": 0}

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.key = tensor.detach(), memory_of(tensor)  # an output would keep its own graph
            if self.key in own:
                return
            times = held.setdefault(self.key, [0, tensor.untyped_storage().nbytes()])
            times[0] += 1
            if times[0] == 1:
                count["now"] += times[1]
                count["most"] = max(count.values())

        def __del__(self) -> None:
            if self.key in held:
                held[self.key][0] -= 1
                if not held[self.key][0]:
                    count["now"] -= held.pop(self.key)[1]

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield lambda: count["most"]


# -- what is needed -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Job:
    sketch: _Sketch
    graph: TokenGraph | ComponentGraph
    method: str
    ablation: str
    steps: int
    n_tokens: int
    n_examples: int

    @property
    def model(self) -> Transformer:
        return self.sketch.model

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return self.model.full_dtype.itemsize

    @property
    def n_rows(self) -> int:
        """Prompts that are run, some of them several times."""
        times = -(-N_RESAMPLED // self.n_examples) if self.ablation == "resample" else 1
        return self.n_examples * times

    @property
    def n_entries(self) -> int:
        """Numbers in the tensors of the graph, edges or not."""
        return sum(int(np.prod(shape)) for shape in self.graph.shapes.values())

    def ranks(self, n_circuits: int) -> int:
        # score, whether there is such an edge, place as an int32
        return self.n_entries * (self.size + 1 + (4 if n_circuits else 0))

    # -- work

    @property
    def passes(self) -> float | int:
        rows, token = self.n_rows, isinstance(self.graph, TokenGraph)
        if token:
            ablated = {"zero": 0, "mean": 1}.get(self.ablation, rows)
            if self.method not in GRADIENTS:
                return ablated + (not self.method.startswith("random"))
            points = 1 if self.method == "eap" else self.steps
            return ablated + rows * (1 + _BACKWARD * points * (self.model.n_layers if "layers" in self.method else 1))
        ablated = {"zero": 1, "mean": self.n_examples, "mean-positional": self.n_examples}.get(self.ablation, 0)
        elsewhere = rows if not ablated else 0  # corrupted prompts are run when they are needed
        if self.method.startswith("random"):
            return rows + ablated
        if self.method in ("flow", "magnitude"):
            return 2 * rows + ablated + (elsewhere if self.method == "magnitude" else 0)
        if self.method == "exact":
            return rows + ablated + elsewhere + rows * self.graph.n_edges
        runs = runs_of(self.method, self.model, self.steps)
        clean = rows if runs[0].group is not None else 0
        return rows + ablated + elsewhere + clean + rows * (_BACKWARD * len(runs) + self._attention_anew)

    @property
    def _attention_anew(self) -> float:
        """Attention that method "eap-qk" computes for every writer and later layer, twice, in forward passes."""
        if self.method != "eap-qk":
            return 0.0
        model, graph = self.model, self.graph
        assert isinstance(graph, ComponentGraph)
        heads = 2 * model.d_model * model.d_head * (model.n_heads + model.n_kv_heads)
        mlp = (3 if model.has_mlp and model.adapter.gated(0) else 2) * model.d_model * model.d_mlp
        layers = model.n_layers
        pairs = layers + sum((model.n_heads + graph.per_mlp) * (layers - 1 - layer) for layer in range(layers - 1))
        return (2 * pairs + layers) * heads / (heads + mlp) / layers

    # -- memory

    def of_scores(self) -> _Needs:
        needs = self._of_scores()
        return replace(needs, workspace=max(needs.workspace, self._widest))

    def _of_scores(self) -> _Needs:
        model, size, n_tokens = self.model, self.size, self.n_tokens
        if self.method.startswith("random"):
            return _Needs(0, self.n_entries * size)
        if isinstance(self.graph, TokenGraph) and self.method not in GRADIENTS:
            pairs = model.n_heads * n_tokens**2
            stream = (3 if model.has_mlp else 2) * n_tokens * model.d_model
            values = n_tokens * model.n_kv_heads * model.d_head
            held = model.n_layers * (stream + values + pairs) * size
            vectors = model.n_heads * n_tokens * model.d_model * size
            if self.method.startswith("flow"):
                return _Needs(held, 2 * pairs * size + int(1.3 * min(2**22, 2 * vectors * n_tokens)))
            # scores as they are, by target token, whether they exist, and normalised
            return _Needs(held, int(4.3 * pairs * size) + min(2**22, vectors))
        if self.method in ("flow", "magnitude"):
            return self._by_writer()
        if self.method == "exact":
            return self.of_circuits(self.graph.n_edges, wide=True)
        return self._gradients()

    def _gradients(self) -> _Needs:
        model, size, n_tokens = self.model, self.size, self.n_tokens
        token = isinstance(self.graph, TokenGraph)
        neurons = bool(self.graph.d_mlp)
        at_once = gradients_at_once(model, n_tokens)
        some = _share(self.n_rows, at_once)
        if token:
            n_runs = 1 if self.method == "eap" else self.steps
            probed = {"graph": "token", "method": "eap", "ablation": self.ablation, "neurons": neurons}
        else:
            n_runs = len(runs_of(self.method, model, self.steps))
            probed = {
                "graph": "component", "ablation": "mean", "neurons": neurons,
                "method": self.method if self.method in ("relp", "eap-qk") else "eap",
            }  # fmt: skip
        ungroup = not token and self.graph.ungrouped and model.n_kv_heads < model.n_heads
        probed |= {"steps": 1, "ungroup": ungroup, "positions": False}
        rows = some * min(n_runs, max(1, at_once // some))
        kept = self.sketch.kept(probed, n_tokens, rows)
        # the shares of edges, whose gradients are wanted, are no activations, but stay where these are
        shares = rows * self.n_entries * size if token else 0
        activations, offloaded = (shares, kept) if is_offloading() else (kept, 0)
        # a layer's gradients on the way back
        neurons_held = 10 if self.method == "relp" and not offloaded and not self._widest else 5
        layer = 2 * model.n_heads * n_tokens**2 + n_tokens * (neurons_held * model.d_mlp + 4 * model.d_model)
        workspace = rows * layer * size
        if token:
            workspace += int(2.5 * rows * self.n_entries * size) + self._widest
            return _Needs(activations, workspace, offloaded)
        assert isinstance(self.graph, ComponentGraph)
        if offloaded:  # but for what is looked at itself, and gradients at inputs of all layers but the first
            readers = (model.n_heads + 2 * self.graph.n_kv_heads) * model.d_head + bool(model.has_mlp) * model.d_model
            outputs = model.n_heads * model.d_head + 2 * model.d_model
            activations = rows * n_tokens * (model.n_layers * (2 * readers + outputs) - readers) * size
        written = some * n_tokens * (model.n_layers * (model.n_heads * model.d_head + model.d_model) + model.d_model)
        clean = runs_of(self.method, model, self.steps)[0].group is not None
        activations += written * size * ((self.ablation in ("counterfactual", "resample")) + clean)
        activations += self._waiting(n_runs, rows // some, some, (activations + workspace) // rows)
        # sums are in float64, and there is a copy of them before they are scores
        sums = 4 * self.n_entries
        workspace += self._widest  # when all of the rest is kept
        workspace = max(workspace + sums, self._products(some) + sums - activations, 4 * sums - activations)
        return _Needs(activations, workspace, offloaded)

    def _waiting(self, n_runs: int, at_once: int, rows: int, per_row: int) -> int:
        """What gradients of earlier passes take, which wait to be multiplied: most in the last pass or the one before.

        The last pass itself needs less if there are fewer runs in it.
        """

        def held(n_earlier: int) -> int:
            vectors = 3 * self.model.n_heads * self.model.d_head + self.model.d_model * (1 + n_earlier)
            return min(HELD, rows * self.n_tokens * self.model.n_layers * vectors * self.size) if n_earlier else 0

        before = (n_runs - 1) // at_once * at_once  # runs of all passes but the last
        missing = before + at_once - n_runs
        return max(0, held(max(0, before - at_once)), held(before) - missing * rows * per_row)

    def _products(self, rows: int) -> int:
        """What multiplying changes with gradients takes, a few tokens at a time."""
        model, graph = self.model, self.graph
        assert isinstance(graph, ComponentGraph)
        writers = 1 + model.n_layers * (model.n_heads + bool(graph.per_mlp))
        tokens = rows * self.n_tokens
        heads = (model.n_heads + 2 * graph.n_kv_heads) * model.d_head
        gradients = model.n_layers * (heads + 2 * model.d_model)
        scratch = min(WORKSPACE, int(1.15 * tokens * model.d_model * self.size * (writers + graph.per_layer)))
        if self.method == "eap-qk":
            one = tokens * 8 * (8 * model.d_model + 3 * model.n_heads * self.n_tokens)
            scratch = max(scratch, int(0.8 * one * min(model.n_heads, max(1, WORKSPACE // one))))
        return tokens * gradients * self.size + scratch

    def _by_writer(self) -> _Needs:
        """Methods that look at what each writer writes, a few tokens at a time."""
        model, graph, size = self.model, self.graph, self.size
        assert isinstance(graph, ComponentGraph)
        rows = _share(self.n_rows, rows_at_once(model, self.n_tokens))
        per_layer = model.n_heads * model.d_head + model.d_model + (2 * model.d_model if self.method == "flow" else 0)
        held = rows * self.n_tokens * model.n_layers * per_layer * size
        step = max(1, WORKSPACE // (graph.n_writers * model.d_model * (12 if self.method == "flow" else 8)))
        vectors = min(step, rows * self.n_tokens) * graph.n_writers * model.d_model * size
        instead = held if self.method == "magnitude" and self.ablation in ("counterfactual", "resample") else 0
        looking = int(vectors * (4 if self.method == "flow" else 1.3))
        return _Needs(held + instead, max(looking, rows * self._layer(size, edited=False)))

    @property
    def _widest(self) -> int:
        """Weights in half precision are widened one at a time, of which the unembedding is usually the largest."""
        if self.size == self.model.dtype.itemsize:
            return 0
        return self.model.d_model * max(self.model.d_vocab, self.model.d_mlp) * self.size

    def _layer(self, size: int, *, edited: bool) -> int:
        """What a layer needs for one row while it is run."""
        model, n_tokens = self.model, self.n_tokens
        pattern, stream = model.n_heads * n_tokens**2, n_tokens * model.d_model
        bridge = model.adapter.kind == "TransformerBridge"
        patterns = _PATTERNS[model.adapter.kind, edited]
        if bridge and size < self.size:
            patterns += 1  # some models of Hugging Face take the softmax in float32
        attention = patterns * pattern + 5 * stream
        mlp = 4 * n_tokens * model.d_mlp + 6 * stream + (pattern if bridge else 0)  # which its block still has
        by_heads = edited and isinstance(self.graph, ComponentGraph)
        reading = 10 * model.n_heads * stream if by_heads else 0  # queries, keys and values of each head's own input
        return int(max(attention, mlp, reading) * size)

    def of_circuits(self, n_circuits: int, *, wide: bool = False) -> _Needs:
        """Circuits are run in the model's own precision; those of components keep float32 all the same."""
        model = self.model
        size = model.dtype.itemsize if isinstance(self.graph, TokenGraph) and not wide else self.size
        at_once = rows_at_once(model, self.n_tokens, self.graph.n_held)
        some = _share(self.n_rows, at_once)
        rows = some * _share(n_circuits, max(1, at_once // some))
        stream = rows * self.n_tokens * model.d_model * size
        return _Needs(self.graph.n_held * stream, rows * self._layer(size, edited=True))


def _share(count: int, at_once: int) -> int:
    """The largest of the nearly equal parts in which so many are taken, no more than so many at once."""
    return -(-count // -(-count // at_once))


def _in_bytes(number: int) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    power = min(len(units) - 1, max(0, len(str(number)) - 1) // 3)
    return f"{number / 1000**power:,.{1 if power else 0}f} {units[power]}"
