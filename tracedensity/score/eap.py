"""Scores of patches: to first order, what a metric changes by when an edge carries its ablated value."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.ablate import Ablated, Written, as_written, writing_sites, written
from tracedensity.alert import alert
from tracedensity.graph.component import ComponentGraph
from tracedensity.metric import Metric, measure
from tracedensity.model import Edit, Site, Transformer, full_precision, require_finite
from tracedensity.task import Examples

WORKSPACE = 2**25
"""Bytes that the outputs of all writers may take at a time."""

HELD = 2**26
"""Bytes of gradients that are held before they are multiplied."""


@dataclass(frozen=True)
class Run:
    """One run at which gradients are taken.

    Attributes:
        weight: Its weight in their mean.
        group: What is interpolated: ``"embed"``, or a site of writers and its layer; None on the clean run.
        clean: Share of the clean value, the rest being ablated.
    """

    weight: float
    group: Site | None = None
    clean: float = 1.0


def runs_of(method: str, model: Transformer, steps: int) -> list[Run]:
    """The runs of a method."""
    if method in ("eap", "eap-qk", "relp"):
        return [Run(1.0)]
    if method == "clean-corrupted":
        return [Run(0.5), Run(0.5, ("embed", 0), 0.0)]
    if method in ("eap-ig", "eap-ig-midpoint"):
        first = 0.5 if method == "eap-ig-midpoint" else 0.0
        return [Run(1 / steps, ("embed", 0), (step + first) / steps) for step in range(steps)]
    assert method == "eap-ig-activations"
    if model.has_attn_scale:
        raise ValueError(
            f"`method` must not be 'eap-ig-activations' for {model.name}: a norm after attention makes what heads "
            "write depend on one another. Use 'eap-ig'."
        )
    names = ["z", *(["mlp_out"] if model.has_mlp else [])]
    groups: list[Site] = [("embed", 0), *((name, layer) for layer in range(model.n_layers) for name in names)]
    weight = 1 / (steps * len(groups))
    return [Run(weight, group, (step + 1) / steps) for group in groups for step in range(steps)]


def patching_scores(
    model: Transformer,
    graph: ComponentGraph,
    examples: Examples,
    ablated: Ablated,
    metric: Metric,
    *,
    method: str,
    steps: int,
    rows_at_once: int,
    workspace: int = WORKSPACE,
) -> dict[str, Tensor]:
    """``<ablated - clean output of the writer, gradient at the reader's input>``, mean over examples, sum over tokens.

    Gradients come from ordinary backward passes to the queries, keys and values: the gradient at each head's
    own input follows from them through the norm (`_Gradients`), layer by layer, and is never held for all heads.

    Args:
        model: The model.
        graph: Its component graph.
        examples: The task.
        ablated: What ablated writers write.
        metric: What is differentiated.
        method: Where gradients are taken, see `runs_of`.
        steps: Points of integrated gradients.
        rows_at_once: Rows per forward and backward pass.
        workspace: Bytes of scratch memory; results do not depend on it.
    """
    total = _Total(model, graph, workspace)
    runs = runs_of(method, model, steps)
    with model.frozen():
        for part in examples.parts(rows_at_once):
            some, instead = examples[part], ablated(part)
            clean = None  # what writers write comes with the gradients if these are taken at the clean run
            if runs[0].group is not None:
                clean, _ = written(model, some, neurons=bool(graph.d_mlp))
            n_runs = max(1, rows_at_once // len(some))
            held = None  # gradients of several passes are multiplied with what ablation changes at once
            for first in range(0, len(runs), n_runs):
                now = runs[first : first + n_runs]
                found, seen = _gradients(model, graph, some, instead, metric, now, method)
                clean = clean or seen
                held = found if held is None else held.plus(found)
                del found, seen  # or they would be there during the next pass as well
                if held.n_bytes > HELD or first + n_runs >= len(runs):
                    total.add(clean, instead, held, some)
                    held = None
    return {"edge": total.scores(len(examples))}


# -- gradients --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Gradients of the metric, summed over runs, each times the weight of its run.

    The gradient at a head's own input x, from the gradient g at its queries (likewise keys and values), is the
    transposed Jacobian of the norm applied to ``v = W g``, W with the norm's weight in it. With ``n`` and ``s`` the
    normalised input and its scale, that is ``(v - mean(v) - n mean(v n)) / s``, exact with the norm's epsilon (no mean
    for RMS). It is kept in parts: the sum over runs of ``g / s``, which W has yet to be applied to, and for each run n
    and ``mean(v n) / s``, a number per head.

    Attributes:
        heads: For queries, keys and values, per layer, the sum of ``g / s``.
        along: For each of them, per layer, ``mean(v n) / s`` of every run; empty if scales of norms are constants.
        normal: Per layer, n of every run; empty likewise.
        mlp: Per layer, the gradient at what the MLP reads.
        final: At what the unembedding reads.
        z: Per layer, at what heads make of values, where attention is to be computed anew; else empty.
        stream: Per layer, what enters the block, likewise.
    """

    heads: Mapping[str, tuple[Float[Tensor, "example pos head d_head"], ...]]
    along: Mapping[str, tuple[Float[Tensor, "run example pos head"], ...]]
    normal: tuple[Float[Tensor, "run example pos d_model"], ...]
    mlp: tuple[Float[Tensor, "example pos d_model"], ...]
    final: Float[Tensor, "example d_model"]
    z: tuple[Float[Tensor, "example pos head d_head"], ...] = ()
    stream: tuple[Float[Tensor, "example pos d_model"], ...] = ()

    @property
    def n_bytes(self) -> int:
        """Roughly; what a further run adds, and what it does not."""
        tensors = [*self.normal, *self.mlp, *(each for name in self.heads for each in self.heads[name])]
        return sum(tensor.nbytes for tensor in tensors)

    def plus(self, other: "_Gradients") -> "_Gradients":
        """Those of other runs on the same examples as well."""

        def added(here: tuple[Tensor, ...], there: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(one + another for one, another in zip(here, there, strict=True))

        def joined(here: tuple[Tensor, ...], there: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(torch.cat(pair) for pair in zip(here, there, strict=True))

        return _Gradients(
            {name: added(self.heads[name], other.heads[name]) for name in self.heads},
            {name: joined(self.along[name], other.along[name]) for name in self.along},
            joined(self.normal, other.normal),
            added(self.mlp, other.mlp),
            self.final + other.final,
        )


def _gradients(
    model: Transformer,
    graph: ComponentGraph,
    examples: Examples,
    ablated: Written,
    metric: Metric,
    runs: list[Run],
    method: str,
) -> tuple[_Gradients, Written]:
    """Gradients, and what writers write in the first of the runs."""
    relevance, anew = method == "relp", method == "eap-qk"
    n_runs, n_examples = len(runs), len(examples)
    rows = torch.arange(n_examples, device=model.device).repeat(n_runs)
    many = examples[rows]
    probed: dict[Site, Tensor] = {}
    read: dict[int, Tensor] = {}

    def probe(value: Tensor, site: Site) -> Tensor:
        # a view, so that the gradient of this reader alone is taken; the stream is read by others as well
        probed[site] = value.view_as(value)
        return probed[site]

    def keep(value: Tensor, layer: int) -> Tensor:
        read[layer] = full_precision(value.detach())
        return value

    names = ["q", "k", "v", *(["z"] if anew else []), *(["mlp_in"] if model.has_mlp else [])]
    sites: list[Site] = [*((name, layer) for layer in range(model.n_layers) for name in names), ("final_in", 0)]
    edits: dict[Site, Edit] = {site: partial(probe, site=site) for site in sites}
    edits |= {("resid_pre", layer): partial(keep, layer=layer) for layer in range(model.n_layers)}
    edits |= _interpolated(ablated, runs)
    embed = edits.get(("embed", 0), lambda value: value)
    edits["embed", 0] = lambda value: embed(value).detach().requires_grad_()  # where the graph begins
    if relevance:
        edits |= model.relevance_edits()
    edits, first_run = _overheard(model, edits, n_examples, neurons=bool(graph.d_mlp))
    logits = model.logits(many.tokens, edits, last=many.last, ungrouped=graph.ungrouped, differentiable=True)
    with torch.enable_grad():
        values = measure(metric, logits, many)
        total = values.sum()
    if not values.requires_grad:
        raise ValueError("`metric` must be differentiable, got one whose result has no gradient.")
    found = torch.autograd.grad(total, [logits, *(probed[site] for site in sites)], allow_unused=True)
    asked, *found = found
    if asked is not None and not asked.isfinite().all():
        raise ValueError("`metric` must have a finite gradient, got NaN or infinity where its value is finite.")
    weights = torch.tensor([run.weight for run in runs], dtype=torch.float64)
    gradient: dict[Site, Tensor] = {}
    for site in sites:
        value, each = probed.pop(site), found.pop(0)  # there are as many as readers: each is given up when it was used
        value = full_precision(torch.zeros_like(value) if each is None else each).unflatten(0, (n_runs, -1))
        gradient[site] = value * weights.to(value).view(-1, *[1] * (value.dim() - 1))
        require_finite(gradient[site], f"the gradient of the metric at {_READ[site[0]]}", site[1])
    heads: dict[str, list[Tensor]] = {name: [] for name in "qkv"}
    along: dict[str, list[Tensor]] = {name: [] for name in "qkv"}
    normals = []
    if model.has_norm:
        _warn_of_zeros(read[0].unflatten(0, (n_runs, -1)), examples, runs, method)
    for layer in range(model.n_layers):
        norm = model.attn_reader(layer)
        entering = read[layer] if anew else read.pop(layer)
        normal, scale = (None, None) if norm is None else norm.statistics(entering.unflatten(0, (n_runs, -1)))
        if normal is not None and not relevance:
            normals.append(normal)
        for name in "qkv":
            g = gradient.pop((name, layer))  # [run, example, pos, head, d_head]
            if scale is not None:
                g = g / scale[..., None]
            if norm is not None and normal is not None and not relevance:
                # n is centred where the norm is, so that centring the weights would change nothing
                weight = _per_reader(model, name, layer, g.shape[3])
                v = einsum(
                    normal * norm.weight,
                    weight,
                    "run example pos d_model, head d_model d_head -> run example pos head d_head",
                )
                along[name].append((v * g).sum(-1) / model.d_model)
            heads[name].append(g.sum(0))
    gradients = _Gradients(
        {name: tuple(each) for name, each in heads.items()},
        {name: tuple(each) for name, each in along.items()},
        tuple(normals),
        tuple(gradient["mlp_in", layer].sum(0) for layer in range(model.n_layers)) if model.has_mlp else (),
        gradient["final_in", 0].sum(0)[:, 0],
        tuple(gradient["z", layer].sum(0) for layer in range(model.n_layers)) if anew else (),
        tuple(read[layer] for layer in range(model.n_layers)) if anew else (),
    )
    return gradients, first_run()


def _warn_of_zeros(
    stream: Float[Tensor, "run example pos d_model"], examples: Examples, runs: list[Run], method: str
) -> None:
    """Warn if a run begins with the ablated embedding and that leaves nothing in the stream."""
    first = [number for number, run in enumerate(runs) if run.group == ("embed", 0) and run.clean == 0]
    if first and not stream[first][:, examples.real].any():
        alert(
            f"gradients are taken where the stream is zero, and norms multiply them by a huge number: under this "
            f"ablation take 'eap-ig-midpoint' in place of {method!r}."
        )


def _per_reader(model: Transformer, name: str, layer: int, n_readers: int) -> Float[Tensor, "head d_model d_head"]:
    """Weights of queries, keys or values, those that heads share once for each reader."""
    weight, _ = model.reading_weights(name, layer)
    return weight if len(weight) == n_readers else weight.repeat_interleave(n_readers // len(weight), 0)


_READ = {
    "q": "the queries", "k": "the keys", "v": "the values", "z": "the heads", "mlp_in": "the MLP input",
    "final_in": "the last norm",
}  # fmt: skip


def _interpolated(ablated: Written, runs: list[Run]) -> dict[Site, Edit]:
    """Edits that put, in the rows of a run, its group's outputs between ablated and clean.

    What comes before the group is as in the clean run, so its clean outputs are those of the run itself.
    """

    def between(value: Tensor, group: Site) -> Tensor:
        name, layer = group
        there = ablated.embed if name == "embed" else (ablated.z if name == "z" else ablated.mlp_out)[layer]
        by_run = list(value.unflatten(0, (len(runs), -1)))
        for number, run in enumerate(runs):
            if run.group == group:
                here = by_run[number].detach()
                by_run[number] = (there + run.clean * (here - there)).to(value.dtype).expand_as(here)
        return torch.cat(by_run)

    groups = {run.group for run in runs if run.group is not None}
    return {group: partial(between, group=group) for group in groups}


def _overheard(
    model: Transformer, edits: Mapping[Site, Edit], n_examples: int, *, neurons: bool
) -> tuple[dict[Site, Edit], Callable[[], Written]]:
    """The same edits, and what writers will have written in the first rows when they have been made."""
    held: dict[Site, Tensor] = {}

    def hear(value: Tensor, site: Site) -> Tensor:
        value = edits[site](value) if site in edits else value
        held[site] = full_precision(value.detach()[:n_examples])
        return value

    heard = {**edits, **{site: partial(hear, site=site) for site in writing_sites(model, neurons)}}
    return heard, lambda: as_written(model, held)


# -- products of the two ---------------------------------------------------------------------------


class _Total:
    """Scores so far: sums over runs, examples and tokens, of products of changes and gradients.

    A few tokens at a time: the changes of all writers ``[writer, token, d_model]`` and the gradients of one layer's
    readers ``[reader, token, d_model]`` are then small, and one matrix product of the two scores all edges.

    What a gradient ``(v - n mean(v n)) / s`` does to a change c is taken apart: ``c v / s``, less ``(c n) mean(v n) /
    s``, which are numbers per token. So the gradients of several runs are one by then.
    """

    def __init__(self, model: Transformer, graph: ComponentGraph, workspace: int) -> None:
        self.model, self.graph, self.workspace = model, graph, workspace
        # neurons are scored apart from the writers that are few; here an MLP has no row if its neurons have
        self.whole = replace(graph, d_mlp=None, has_mlp=graph.has_mlp and not graph.d_mlp)
        shape = (self.graph.n_readers, *([] if graph.n_pos is None else [graph.n_pos]))
        self.sums = torch.zeros(self.whole.n_writers, *shape, dtype=torch.float64, device=model.device)
        self.neurons = [
            torch.zeros(graph.per_mlp, *shape, dtype=torch.float64, device=model.device)
            for _ in range(graph.n_layers if graph.d_mlp else 0)
        ]

    def scores(self, n_examples: int) -> Float[Tensor, "..."]:
        """The mean over examples, zero where there is no edge; to be called once, since it gives up the sums."""
        dtype = self.model.full_dtype
        if self.graph.d_mlp:
            # filled layer by layer, so that there is never more than one copy of the neurons' scores
            scores = self.sums.new_empty(self.graph.n_writers, *self.sums.shape[1:], dtype=dtype)
            scores[0] = self.sums[0] / n_examples
            for layer in range(self.graph.n_layers):
                scores[self.graph.heads_of(layer)] = (self.sums[self.whole.heads_of(layer)] / n_examples).to(dtype)
                scores[self.graph.mlp_of(layer)] = self.neurons.pop(0).div_(n_examples).to(dtype)
        else:
            scores = (self.sums / n_examples).to(dtype)
        require_finite(scores, "the scores")
        return scores.masked_fill_(~self.graph.exists["edge"].to(scores.device), 0.0)

    def add(self, clean: Written, ablated: Written, gradients: _Gradients, examples: Examples) -> None:
        n_examples, n_pos = examples.tokens.shape
        per_token = self.model.d_model * 8 * (self.whole.n_writers + self.graph.per_layer)
        if self.graph.d_mlp:
            per_token += 8 * self.graph.per_layer * self.graph.d_mlp
        step = max(1, self.workspace // per_token)
        if self.graph.n_pos is not None:  # whole positions
            step = max(1, step // n_examples) * n_examples
        for start in range(0, n_examples * n_pos, step):
            token = torch.arange(start, min(start + step, n_examples * n_pos), device=self.model.device)
            pos = token.div(n_examples, rounding_mode="floor")
            self._add_tokens(clean, ablated, gradients, token % n_examples, pos)
        if gradients.z:
            self._add_attention(ablated.minus(clean), gradients)
        rows = torch.arange(n_examples, device=self.model.device)
        self._add_final(clean, ablated, gradients, rows, examples.last)

    def _add_tokens(self, clean: Written, ablated: Written, gradients: _Gradients, row: Tensor, pos: Tensor) -> None:
        changes, posts = self._changes(clean, ablated, row, pos)
        for layer in range(self.graph.n_layers):
            normal = gradients.normal[layer][:, row, pos] if gradients.normal else None
            for name in "v" if gradients.z else "qkv":
                gradient = gradients.heads[name][layer][row, pos]  # [token, head, d_head]
                weight = _per_reader(self.model, name, layer, gradient.shape[1])
                vectors = torch.bmm(gradient.transpose(0, 1), weight.transpose(1, 2).to(gradient.dtype))
                if (norm := self.model.attn_reader(layer)) is not None:
                    vectors *= norm.weight
                    if norm.centred:
                        vectors -= vectors.mean(-1, keepdim=True)
                along = None if normal is None else gradients.along[name][layer][:, row, pos]
                self._add_products(layer, name, changes, posts, vectors, pos, normal, along)
            if self.graph.has_mlp:
                self._add_products(layer, "mlp", changes, posts, gradients.mlp[layer][row, pos][None], pos)

    def _add_attention(self, changed: Written, gradients: _Gradients) -> None:
        """Edges into queries and keys, with norm and attention computed anew: ``<z(patched) - z, gradient at z>``.

        With the gradient at the pattern in place of that at z it is the same number, since values do not change.
        """
        n_examples, n_pos, n_heads, _ = gradients.z[0].shape
        per_writer = n_examples * n_pos * 8 * (8 * self.model.d_model + 3 * n_heads * n_pos)
        at_once = max(1, self.workspace // per_writer)
        norms = [self.model.attn_reader(layer) for layer in range(self.graph.n_layers)]
        plains = [x if norm is None else norm(x) for x, norm in zip(gradients.stream, norms, strict=True)]
        usual = [self.model.attend(layer, plain, plain, plain) for layer, plain in enumerate(plains)]
        for first_layer, writers, change in self._in_groups(changed, at_once):
            for layer in range(first_layer, self.graph.n_layers):
                norm, plain, stream = norms[layer], plains[layer], gradients.stream[layer]
                patched = stream + change.expand(-1, *stream.shape)
                patched = (patched if norm is None else norm(patched)).flatten(0, 1)
                whole = plain.expand(len(change), *plain.shape).flatten(0, 1)
                for name, inputs in (("q", (patched, whole, whole)), ("k", (whole, patched, whole))):
                    made = self.model.attend(layer, *inputs).unflatten(0, (len(change), -1)) - usual[layer]
                    effect = einsum(
                        made, gradients.z[layer], "writer e pos head d_head, e pos head d_head -> writer head"
                    )
                    readers = self.graph.readers_of(name, layer)
                    self.sums[writers, readers] += effect.unflatten(1, (readers.stop - readers.start, -1)).sum(2)

    def _in_groups(
        self, changed: Written, at_once: int
    ) -> Iterator[tuple[int, slice, Float[Tensor, " writer #example #pos d_model"]]]:
        """What ablation changes in the outputs of writers, a few at a time, and the first layer that reads them."""
        yield 0, slice(0, 1), changed.embed[None]
        for layer in range(self.graph.n_layers - 1):  # attention reads none of the last layer's
            first, weight = self.graph.heads_of(layer).start, self.model.head_weights(layer)
            for heads in torch.arange(self.model.n_heads).split(at_once):
                some = changed.z[layer][:, :, heads]
                vectors = einsum(
                    some, weight[heads].to(some.dtype), "e pos head d_head, head d_head d_model -> head e pos d_model"
                )
                yield layer + 1, slice(first + int(heads[0]), first + int(heads[-1]) + 1), vectors
            if self.graph.has_mlp:
                yield layer + 1, self.graph.mlp_of(layer), changed.mlp_out[layer][None]

    def _add_final(self, clean: Written, ablated: Written, gradients: _Gradients, row: Tensor, last: Tensor) -> None:
        changes, posts = self._changes(clean, ablated, row, last)
        self._add_products(self.graph.n_layers, "logits", changes, posts, gradients.final[None], last)

    def _add_products(
        self,
        layer: int,
        name: str,
        changes: Float[Tensor, "writer token d_model"],
        posts: tuple[Float[Tensor, "token d_mlp"], ...],
        vectors: Float[Tensor, "reader token d_model"],
        pos: Int[Tensor, " token"],
        normal: Float[Tensor, "run token d_model"] | None = None,
        along: Float[Tensor, "run token reader"] | None = None,
    ) -> None:
        """Add ``changes * vectors - (changes * normal) * along``, for readers of one name and all that they read."""
        readers = self.graph.readers_of(name, layer)
        changes = changes[: self.whole.n_read(name, layer)]
        less = None
        if along is not None and normal is not None:
            less = einsum(changes, normal, "writer token d_model, run token d_model -> writer token run")
        self._sum(self.sums[: len(changes), readers], changes, vectors, less, along, pos)
        for earlier, post in enumerate(posts[:layer]):
            weights = self.model.neuron_weights(earlier)
            through = torch.einsum("rtd,nd,tn->nrt", vectors, weights, post)
            if along is not None and normal is not None:
                passed = einsum(normal, weights, "run token d_model, d_mlp d_model -> run token d_mlp") * post
                through -= einsum(passed, along, "run token d_mlp, run token reader -> d_mlp reader token")
            self._at_positions(self.neurons[earlier][:, readers], through.double(), pos)

    def _sum(
        self, sums: Tensor, changes: Tensor, vectors: Tensor, less: Tensor | None, along: Tensor | None, pos: Tensor
    ) -> None:
        if self.graph.n_pos is None:
            products = changes.flatten(1) @ vectors.flatten(1).T
            if less is not None and along is not None:
                products -= less.flatten(1) @ rearrange(along, "run token reader -> (token run) reader")
            sums += products
            return
        products = einsum(changes, vectors, "writer token d_model, reader token d_model -> writer reader token")
        if less is not None and along is not None:
            products -= einsum(less, along, "writer token run, run token reader -> writer reader token")
        self._at_positions(sums, products.double(), pos)

    def _at_positions(self, sums: Tensor, products: Float[Tensor, "writer reader token"], pos: Tensor) -> None:
        if self.graph.n_pos is None:
            sums += products.sum(-1)
        else:
            sums.index_add_(-1, pos, products)

    def _changes(
        self, clean: Written, ablated: Written, row: Tensor, pos: Tensor
    ) -> tuple[Float[Tensor, "writer token d_model"], tuple[Float[Tensor, "token d_mlp"], ...]]:
        """What ablation changes at some tokens: in the outputs of all writers but neurons, and in their activations."""
        changed = ablated.at(row, pos).minus(clean.at(row, pos))
        if self.graph.d_mlp:
            return replace(changed, mlp_out=()).vectors(self.model), tuple(post[:, 0] for post in changed.post)
        return changed.vectors(self.model), ()
