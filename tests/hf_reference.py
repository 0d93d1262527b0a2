"""A slow reference for both graphs from the plain Hugging Face model alone: no TransformerLens, no tracedensity.

It reads no weights and knows no formulas of attention, of norms or of MLPs. It calls the model's own modules, in
float64, one prompt at a time, on inputs of its own: a head's queries, keys and values are what the model's own
projections make of a stream that is put together here, and the attention module is run with these in place of its own.
What a head brings from one token is what attention makes of values that are zero at all others. Gradients are
autograd's, to a summand of zeros at what each reader reads. All that has to be known of a family is a `Layout`: what
its modules are called and in which order queries, keys and values lie.

What is defined elsewhere: the token graph in `oracle`, the component graph in `component_oracle`, from which the names
of writers (``input``, ``a1.h2``, ``m1``), readers (``a1.h2<q>``, ``a1.kv0<k>``, ``m1``, ``logits``) and edges
(``writer->reader``) are. A stream is ``[pos, d_model]``.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Term: TypeAlias = Callable[[str, str, Tensor], Tensor]

KINDS = "qkv"


# -- families ----------------------------------------------------------------------------------------


def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _opt_mlp(block: nn.Module, x: Tensor) -> Tensor:
    """OPT has the parts of its MLP in the block."""
    parts: Any = block
    return parts.fc2(parts.activation_fn(parts.fc1(x)))


def _bloom_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """Bloom's MLP adds the stream itself."""
    return mlp(x, torch.zeros_like(x))


@dataclass(frozen=True)
class Layout:
    """What the modules of a family are called; names inside a block, but for the last three.

    Attributes:
        attn_norm: Before queries, keys and values; None where they read the stream as it is.
        attention: What is called with its output.
        projections: Of queries, keys and values, or one of all three, inside `attention`.
        by_head: Whether one projection of all three has those of a head beside each other, and not all queries first.
        out: The output projection, inside `attention`.
        attn_post: Between it and the stream, if anything is.
        mlp_norm: Before the MLP.
        mlp: The MLP; the block itself if empty.
        mlp_post: Between it and the stream.
        parallel: Whether the MLP reads what attention reads.
        run_mlp: How the MLP is called.
        blocks: The list of blocks, inside the model.
        final_norm: Before the unembedding, inside the model.
        positions: The embedding of positions, inside the model; None where the stream has none.
    """

    attn_norm: str | None = "input_layernorm"
    attention: str = "self_attn"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    by_head: bool = False
    out: str = "o_proj"
    attn_post: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_post: str | None = None
    parallel: bool = False
    run_mlp: Callable[[nn.Module, Tensor], Tensor] = _call
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    positions: str | None = None


_FUSED = ("query_key_value",)
_LLAMA = Layout()
_GEMMA2 = Layout(
    attn_post="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm", mlp_post="post_feedforward_layernorm"
)


def _layout(config: Any) -> Layout:
    kind = config.model_type
    gpt: dict[str, Any] = {"attn_norm": "ln_1", "blocks": "transformer.h", "final_norm": "transformer.ln_f"}
    if kind == "gpt2":
        return Layout(
            **gpt, attention="attn", projections=("c_attn",), out="c_proj", mlp_norm="ln_2", positions="transformer.wpe"
        )
    if kind == "gpt_neo":
        return Layout(**gpt, attention="attn.attention", out="out_proj", mlp_norm="ln_2", positions="transformer.wpe")
    if kind == "gptj":
        return Layout(**gpt, attention="attn", out="out_proj", mlp_norm="ln_1", parallel=True)
    if kind == "opt":
        return Layout(
            attn_norm="self_attn_layer_norm",
            out="out_proj",
            mlp_norm="final_layer_norm",
            mlp="",
            run_mlp=_opt_mlp,
            blocks="model.decoder.layers",
            final_norm="model.decoder.final_layer_norm",
            positions="model.decoder.embed_positions",
        )
    if kind == "gpt_neox":
        return Layout(
            attention="attention",
            projections=_FUSED,
            by_head=True,
            out="dense",
            parallel=config.use_parallel_residual,
            blocks="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
        )
    if kind in ("falcon", "bloom"):
        parallel = kind == "falcon" and config.parallel_attn
        return Layout(
            attention="self_attention",
            projections=_FUSED,
            by_head=kind == "bloom" or not config.multi_query,
            out="dense",
            mlp_norm="input_layernorm" if parallel else "post_attention_layernorm",
            parallel=parallel,
            run_mlp=_bloom_mlp if kind == "bloom" else _call,
            blocks="transformer.h",
            final_norm="transformer.ln_f",
        )
    if kind == "phi":
        return Layout(out="dense", mlp_norm="input_layernorm", parallel=True, final_norm="model.final_layernorm")
    if kind == "phi3":
        return Layout(projections=("qkv_proj",))
    if kind in ("gemma2", "gemma3_text"):
        return _GEMMA2
    if kind == "olmo2":
        return Layout(
            attn_norm=None, attn_post="post_attention_layernorm", mlp_norm=None, mlp_post="post_feedforward_layernorm"
        )
    if kind in ("llama", "mistral", "qwen2", "qwen3", "gemma", "stablelm", "mixtral", "qwen2_moe", "qwen3_moe"):
        return _LLAMA
    raise NotImplementedError(f"Nobody has said what the modules of a {kind!r} are called.")


# -- double precision --------------------------------------------------------------------------------


class _Double(TorchFunctionMode):
    """While open, whoever asks for float32 gets float64, as norms, rotations and softmax of Hugging Face do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        kwargs = {name: torch.float64 if each is torch.float32 else each for name, each in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _in_double(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with _Double():
            return method(*args, **kwargs)

    return inner


def _double_copy(model: PreTrainedModel) -> PreTrainedModel:
    """In float64, with angles and the like that were never rounded to float32."""
    config = copy.deepcopy(model.config)
    config._experts_implementation = "eager"  # the others are for float32 only
    with _Double():
        made = type(model)._from_config(config, dtype=torch.float64, attn_implementation="eager")
    made.load_state_dict(model.state_dict())
    return made.eval().requires_grad_(False)


# -- the reference -----------------------------------------------------------------------------------


@dataclass
class Trace:
    """What a run on the component graph computed; writers and readers by name, ``[pos, d_model]``."""

    writers: dict[str, Tensor] = field(default_factory=dict)
    readers: dict[str, Tensor] = field(default_factory=dict)  # before the norm
    constant: dict[str, Tensor] = field(default_factory=dict)  # by reader: what no writer adds
    logits: Tensor = field(default_factory=lambda: torch.empty(0))  # [d_vocab], of the last position


@dataclass
class Plain:
    """What a plain run of the model itself on a prompt shows from outside its blocks.

    Attributes:
        entering: The stream that enters the first block.
        positions: What positions have added to it.
        attention: Per layer, what attention is called with beside the stream.
        logits: Of the last position.
    """

    entering: Tensor
    positions: Tensor
    attention: list[tuple[tuple[Any, ...], dict[str, Any]]]
    logits: Tensor


class Reference:
    """A Hugging Face decoder, in float64.

    Attributes:
        model: The copy of it.
        n_kv_heads: Heads that have keys and values of their own; fewer than `n_heads` where others share them.
        parallel: Whether attention and MLP of a block read the same stream.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = _double_copy(model)
        self.layout = _layout(self.model.config)
        self.blocks = list(self.model.get_submodule(self.layout.blocks))
        self.n_layers = len(self.blocks)
        self.n_heads: int = self.model.config.num_attention_heads
        self.parallel = self.layout.parallel
        self.final_norm = self.model.get_submodule(self.layout.final_norm)
        self.d_model: int = self.model.get_input_embeddings().weight.shape[1]
        attention = self._attention(0)
        # the output projection reads what all heads make, one beside the other
        self.d_head = attention.get_submodule(self.layout.out).weight.numel() // self.d_model // self.n_heads
        made = [attention.get_submodule(name)(self._zeros(1, self.d_model)) for name in self.layout.projections]
        n_made = sum(each.shape[-1] for each in made) // self.d_head  # queries, keys and values of one head each
        self.n_kv_heads = (n_made - self.n_heads) // 2

    # .. modules

    def _attention(self, layer: int) -> nn.Module:
        return self.blocks[layer].get_submodule(self.layout.attention)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    def _through(self, layer: int, name: str | None, x: Tensor) -> Tensor:
        """Through a module of a block, if there is one."""
        return x if name is None else self.blocks[layer].get_submodule(name)(x[None])[0]

    def _slot(self, kind: str, head: int) -> tuple[str, int]:
        """Which projection makes the queries, keys or values of a head, and its place in the output, in heads."""
        if len(self.layout.projections) == 3:
            return self.layout.projections[KINDS.index(kind)], head
        if self.layout.by_head:
            return self.layout.projections[0], 3 * head + KINDS.index(kind)
        start = {"q": 0, "k": self.n_heads, "v": self.n_heads + self.n_kv_heads}[kind]
        return self.layout.projections[0], start + head

    def _n_stored(self, kind: str) -> int:
        return self.n_heads if kind == "q" else self.n_kv_heads

    def _project(self, layer: int, kind: str, head: int, x: Tensor) -> Tensor:
        """Queries, keys or values ``[pos, d_head]`` of a stored head from its stream."""
        name, place = self._slot(kind, head)
        made = self._attention(layer).get_submodule(name)(self._through(layer, self.layout.attn_norm, x)[None])[0]
        return made[:, place * self.d_head : (place + 1) * self.d_head]

    def _attend(self, layer: int, plain: Plain, made: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """What the heads of a layer make of queries, keys and values, ``[pos, head, d_head]``.

        The attention module is run with its projections' outputs replaced; what arrives at the output projection is
        the result.

        Args:
            layer: Which attention.
            plain: Of the prompt.
            made: Queries, keys and values of the stored heads, each ``[pos, d_head]``.
        """
        slots: dict[str, dict[int, Tensor]] = {}
        for kind in KINDS:
            for head in range(self._n_stored(kind)):
                name, place = self._slot(kind, head)
                slots.setdefault(name, {})[place] = made[kind][head]
        outputs = {name: torch.cat([by[place] for place in sorted(by)], -1) for name, by in slots.items()}
        arrived: list[Tensor] = []
        attention, (args, kwargs) = self._attention(layer), plain.attention[layer]
        with ExitStack() as stack:
            for name, output in outputs.items():
                stack.enter_context(_hooked(attention.get_submodule(name), lambda *_, output=output: output[None]))
            out = attention.get_submodule(self.layout.out)
            handle = out.register_forward_pre_hook(lambda module, inputs: arrived.append(inputs[0]))
            stack.callback(handle.remove)
            attention(*args, **kwargs)
        return arrived[0].view(len(plain.entering), self.n_heads, self.d_head)

    def _written(self, layer: int, brought: Tensor) -> tuple[Tensor, Tensor]:
        """What attention adds to the stream, in parts ``[src, head, pos, d_model]``, and what is of no head.

        A norm between attention and stream is taken for a factor of each entry, that which it has for all parts
        together: they add up to what the norm makes of their sum.

        Args:
            layer: Which attention.
            brought: What arrives at its output projection, in summands ``[src, pos, head, d_head]``.
        """
        out = self._attention(layer).get_submodule(self.layout.out)

        def projected(z: Tensor) -> Tensor:
            return out(z.flatten(1)[None])[0]

        bias = projected(torch.zeros_like(brought[0]))
        alone = torch.eye(self.n_heads, dtype=torch.float64)[..., None]
        parts = torch.stack([torch.stack([projected(z * one) - bias for one in alone]) for z in brought])
        if self.layout.attn_post is None:
            return parts, bias
        whole = parts.sum((0, 1)) + bias
        factor = self._through(layer, self.layout.attn_post, whole) / whole
        return parts * factor, bias * factor

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        """What the MLP adds to the stream that it reads."""
        read = self._through(layer, self.layout.mlp_norm, x)
        name = self.layout.mlp
        module = self.blocks[layer].get_submodule(name) if name else self.blocks[layer]
        return self._through(layer, self.layout.mlp_post, self.layout.run_mlp(module, read[None])[0])

    def _unembed(self, state: Tensor) -> Tensor:
        """Logits of one stream ``[d_model]``: of the model on any token, with this before its last norm."""
        handle = self.final_norm.register_forward_pre_hook(lambda module, inputs: (state[None, None],))
        try:
            return self.model(torch.ones(1, 1, dtype=torch.long), use_cache=False).logits[0, 0]
        finally:
            handle.remove()

    def _final_linear(self, state: Tensor) -> Callable[[Tensor], Tensor]:
        """The last norm without its bias, its scale being that of a state: linear in what is put in.

        A norm that subtracts the mean is known by its not noticing what is added to all entries.
        """
        bias = self.final_norm(torch.zeros_like(state))
        shifted = self.final_norm(state + 1)
        centred = bool(torch.allclose(shifted, self.final_norm(state), rtol=1e-6, atol=1e-9))

        def centre(x: Tensor) -> Tensor:
            return x - x.mean(-1, keepdim=True) if centred else x

        factor = (self.final_norm(state) - bias) / centre(state)
        return lambda x: centre(x) * factor

    def _plain(self, tokens: Sequence[int]) -> Plain:
        """The model as it is, on a prompt, overheard."""
        heard: dict[str, Any] = {}
        called: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.append((args, kwargs))

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            heard["entering"] = (args[0] if args else kwargs["hidden_states"])[0]

        with ExitStack() as stack, torch.no_grad():
            for layer in range(self.n_layers):
                attention = self._attention(layer)
                stack.callback(attention.register_forward_pre_hook(hear, with_kwargs=True).remove)
            stack.callback(self.blocks[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
            if self.layout.positions is not None:
                module = self.model.get_submodule(self.layout.positions)
                keep = module.register_forward_hook(lambda module, inputs, output: heard.update(positions=output))
                stack.callback(keep.remove)
            logits = self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]
        entering = heard["entering"]
        positions = heard.get("positions", torch.zeros_like(entering)).view(entering.shape)
        return Plain(entering, positions, called, logits)

    @_in_double
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """At the last position ``[d_vocab]``, put together of blocks, as everything here is."""
        plain = self._plain(tokens)
        stream = plain.entering
        for layer in range(self.n_layers):
            made = {k: [self._project(layer, k, h, stream) for h in range(self._n_stored(k))] for k in KINDS}
            parts, rest = self._written(layer, self._attend(layer, plain, made)[None])
            after = stream + parts.sum((0, 1)) + rest
            stream = after + self._mlp(layer, stream if self.parallel else after)
        return self._unembed(stream[-1])

    @_in_double
    def plain_logits(self, tokens: Sequence[int]) -> Tensor:
        """The model's own, from one call."""
        return self._plain(tokens).logits

    # .. the token graph

    def _brought(self, layer: int, plain: Plain, stream: Tensor) -> Tensor:
        """What heads bring from each token, ``[src, pos, head, d_head]``, before the output projection."""
        made = {k: [self._project(layer, k, h, stream) for h in range(self._n_stored(k))] for k in KINDS}
        brought = []
        for src in range(len(stream)):
            only = self._zeros(len(stream), 1)
            only[src] = 1
            brought.append(self._attend(layer, plain, {**made, "v": [only * value for value in made["v"]]}))
        return torch.stack(brought)

    def _require_sequential(self) -> None:
        if self.parallel:
            raise NotImplementedError("The token graph has its MLP after attention.")

    @_in_double
    def token_scores(self, tokens: Sequence[int], method: str) -> dict[str, Tensor]:
        """Scores of all edges of the token graph, zero where there is none; by ``"norm"`` or ``"flow"``."""
        self._require_sequential()
        plain, n_pos = self._plain(tokens), len(tokens)
        states = (self.n_layers, n_pos)
        scores = {kind: self._zeros(*states) for kind in ("mlp", "resid_attn", "resid_mlp")}
        scores["head"] = self._zeros(self.n_layers, self.n_heads, n_pos, n_pos)
        stream = plain.entering
        for layer in range(self.n_layers):
            is_last = layer == self.n_layers - 1
            brought = self._brought(layer, plain, stream)  # [src, pos, head, d_head]
            parts, rest = self._written(layer, brought)
            mid = stream + parts.sum((0, 1)) + rest
            mlp = self._mlp(layer, mid)
            after = mid + mlp
            for dest in [n_pos - 1] if is_last else range(n_pos):
                edges = [(src, head) for src in range(dest + 1) for head in range(self.n_heads)]
                vectors = [parts[src, head, dest] for src, head in edges]
                first, *others = _importances(method, [stream[dest], *vectors], mid[dest])
                scores["resid_attn"][layer, dest] = first
                for (src, head), score in zip(edges, others, strict=True):
                    scores["head"][layer, head, dest, src] = score
                summands, state = [mid[dest], mlp[dest]], after[dest]
                if is_last:
                    linear = self._final_linear(state)
                    summands, state = [linear(each) for each in summands], linear(state)
                skip, own = _importances(method, summands, state)
                scores["resid_mlp"][layer, dest], scores["mlp"][layer, dest] = skip, own
            stream = after
        return scores

    @_in_double
    def token_logits(self, tokens: Sequence[int], kept: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[d_vocab]`` of a circuit of the token graph, absent edges carrying zero; 1 is kept, 0 is not."""
        self._require_sequential()
        plain = self._plain(tokens)
        share = {kind: value.to(torch.float64) for kind, value in kept.items()}
        stream = plain.entering
        for layer in range(self.n_layers):
            brought = self._brought(layer, plain, stream)
            z = (brought * share["head"][layer].permute(2, 1, 0)[..., None]).sum(0)  # [src, dest, head, 1]
            out = self._attention(layer).get_submodule(self.layout.out)(z.flatten(1)[None])[0]
            out = self._through(layer, self.layout.attn_post, out)
            mid = out + share["resid_attn"][layer][:, None] * stream
            stream = share["mlp"][layer][:, None] * self._mlp(layer, mid) + share["resid_mlp"][layer][:, None] * mid
        return self._unembed(stream[-1])

    # .. the component graph

    def writers(self) -> list[str]:
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)] + [f"m{layer}"]
        return names

    def _owners(self, layer: int, ungroup: bool) -> list[str]:
        """Whose keys, and values, a layer reads: one for each head."""
        size = self.n_heads // self.n_kv_heads
        if ungroup or size == 1:
            return [f"a{layer}.h{head}" for head in range(self.n_heads)]
        return [f"a{layer}.kv{head // size}" for head in range(self.n_heads)]

    def readers(self, ungroup: bool = False) -> list[str]:
        names = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}<q>" for head in range(self.n_heads)]
            owners = list(dict.fromkeys(self._owners(layer, ungroup)))
            names += [f"{owner}<{kind}>" for kind in "kv" for owner in owners] + [f"m{layer}"]
        return [*names, "logits"]

    def writers_into(self, reader: str) -> list[str]:
        """What is in the stream that it reads."""
        names = self.writers()
        if reader == "logits":
            return names
        layer = int(reader[1:].split(".")[0])
        n_read = 1 + layer * (self.n_heads + 1)
        return names[: n_read + self.n_heads * (reader[0] == "m" and not self.parallel)]

    def edges(self, ungroup: bool = False) -> list[str]:
        return [f"{writer}->{reader}" for reader in self.readers(ungroup) for writer in self.writers_into(reader)]

    @_in_double
    def trace(
        self,
        tokens: Sequence[int],
        *,
        term: Term | None = None,
        nudges: Mapping[str, Tensor] | None = None,
        embedded: Tensor | None = None,
        ungroup: bool = False,
    ) -> Trace:
        """One run in which every reader reads a sum of its own.

        Args:
            tokens: The prompt.
            term: What a writer adds to a reader's sum in place of what it writes in this run, from (writer, reader,
                that).
            nudges: What else is added, by reader.
            embedded: In place of the embedding.
            ungroup: Give each head keys and values of its own.
        """
        plain, trace = self._plain(tokens), Trace()
        constant = plain.positions

        def read(reader: str) -> Tensor:
            total = trace.constant[reader] = constant
            for writer in self.writers_into(reader):
                own = trace.writers[writer]
                total = total + (own if term is None else term(writer, reader, own))
            if nudges is not None:
                total = total + nudges[reader]
            trace.readers[reader] = total
            return total

        trace.writers["input"] = plain.entering - plain.positions if embedded is None else embedded
        for layer in range(self.n_layers):
            owners = self._owners(layer, ungroup)
            streams = {"q": [read(f"a{layer}.h{head}<q>") for head in range(self.n_heads)]}
            for kind in "kv":
                of_each = {owner: read(f"{owner}<{kind}>") for owner in dict.fromkeys(owners)}
                streams[kind] = [of_each[owner] for owner in owners]
            beside = read(f"m{layer}") if self.parallel else None
            parts, rest = self._written(layer, self._attend_by_head(layer, plain, streams)[None])
            trace.writers |= {f"a{layer}.h{head}": parts[0, head] for head in range(self.n_heads)}
            constant = constant + rest
            trace.writers[f"m{layer}"] = self._mlp(layer, read(f"m{layer}") if beside is None else beside)
        trace.logits = self._unembed(read("logits")[-1])
        return trace

    def _attend_by_head(self, layer: int, plain: Plain, streams: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """What heads make of streams of their own, one for each head's queries, keys and values.

        Where heads share keys and values, the first heads of all groups are run together, with their keys and values
        as those of the groups, then the second ones, and so on. A norm over all keys together (OLMo 2) then is one over
        those of the heads that are run together, if they are ungrouped.
        """
        size = self.n_heads // self.n_kv_heads
        queries = [self._project(layer, "q", head, streams["q"][head]) for head in range(self.n_heads)]
        z = []
        for member in range(size):
            made = {"q": queries}
            for kind in "kv":
                made[kind] = [
                    self._project(layer, kind, group, streams[kind][group * size + member])
                    for group in range(self.n_kv_heads)
                ]
            z.append(self._attend(layer, plain, made)[:, member::size])
        return torch.stack(z, dim=2).flatten(1, 2)  # [pos, group * member, d_head]

    def _gradients(
        self, tokens: Sequence[int], answer: int, distractor: int, embedded: Tensor | None, ungroup: bool
    ) -> dict[str, Tensor]:
        """Of one logit minus another, at what each reader reads."""
        nudges = {reader: self._zeros(len(tokens), self.d_model).requires_grad_() for reader in self.readers(ungroup)}
        logits = self.trace(tokens, nudges=nudges, embedded=embedded, ungroup=ungroup).logits
        found = torch.autograd.grad(logits[answer] - logits[distractor], list(nudges.values()))
        return dict(zip(nudges, found, strict=True))

    def component_scores(
        self,
        clean: Sequence[int],
        corrupted: Sequence[int],
        answer: int,
        distractor: int,
        method: str,
        steps: int = 5,
        ungroup: bool = False,
    ) -> dict[str, float]:
        """Scores by edge; ``"eap"``, ``"eap-ig"`` (gradients where the embedding is between the two), ``"flow"``."""
        with torch.no_grad():
            here, there = self.trace(clean, ungroup=ungroup), self.trace(corrupted, ungroup=ungroup)
        if method == "flow":
            return self._component_flow(here, ungroup)
        one, other = here.writers["input"], there.writers["input"]
        starts = [other + k / steps * (one - other) for k in range(steps)] if method == "eap-ig" else [None]
        runs = [self._gradients(clean, answer, distractor, start, ungroup) for start in starts]
        scores = {}
        for edge in self.edges(ungroup):
            writer, reader = edge.split("->")
            gradient = torch.stack([run[reader] for run in runs]).mean(0)
            scores[edge] = float(((there.writers[writer] - here.writers[writer]) * gradient).sum())
        return scores

    def _neurons(self, layer: int, x: Tensor) -> Tensor:
        """What each neuron of an MLP writes, ``[neuron, pos, d_model]``: the last projection of what it reads alone."""
        projections = [module for module in self.blocks[layer].modules() if isinstance(module, nn.Linear | Conv1D)]
        calls: list[tuple[nn.Module, Tensor]] = []
        with ExitStack() as stack:
            for module in projections:
                stack.enter_context(_hooked(module, lambda module, inputs, _: calls.append((module, inputs[0]))))
            self._mlp(layer, x)
        out, activations = calls[-1]
        activations = activations.flatten(0, -2)
        bias = out(torch.zeros_like(activations))
        alone = torch.eye(activations.shape[-1], dtype=torch.float64)
        parts = torch.stack([out(activations * one) - bias for one in alone])
        if self.layout.mlp_post is None:
            return parts
        whole = parts.sum(0) + bias
        return parts * (self._through(layer, self.layout.mlp_post, whole) / whole)

    @_in_double
    def neuron_scores(
        self, clean: Sequence[int], corrupted: Sequence[int], answer: int, distractor: int
    ) -> dict[str, Tensor]:
        """Scores ``[neuron]`` of method ``"eap"``, by the edge of the whole MLP that they are parts of."""
        with torch.no_grad():
            runs = [self.trace(tokens) for tokens in (clean, corrupted)]
            here, there = (
                [self._neurons(layer, run.readers[f"m{layer}"]) for layer in range(self.n_layers)] for run in runs
            )
        gradients = self._gradients(clean, answer, distractor, None, False)
        scores = {}
        for reader in self.readers():
            for layer in range(self.n_layers):
                if f"m{layer}" in self.writers_into(reader):
                    change = (there[layer] - here[layer]) * gradients[reader]
                    scores[f"m{layer}->{reader}"] = change.sum((1, 2))
        return scores

    def _component_flow(self, trace: Trace, ungroup: bool) -> dict[str, float]:
        scores: dict[str, float] = {}
        for reader in self.readers(ungroup):
            names, read = self.writers_into(reader), trace.readers[reader]
            positions = [len(read) - 1] if reader == "logits" else range(len(read))
            shares = [
                _importances("flow", [trace.writers[name][pos] for name in names], read[pos]) for pos in positions
            ]
            for name, of_writer in zip(names, zip(*shares, strict=True), strict=True):
                scores[f"{name}->{reader}"] = math.fsum(of_writer) / len(shares)
        return scores

    def component_logits(
        self, clean: Sequence[int], corrupted: Sequence[int], kept: Iterable[str], ungroup: bool = False
    ) -> Tensor:
        """Logits ``[d_vocab]`` of a circuit, absent edges carrying what they do on the corrupted prompt."""
        chosen = set(kept)
        assert chosen <= set(self.edges(ungroup))
        with torch.no_grad():
            there = self.trace(corrupted, ungroup=ungroup).writers
            return self.trace(
                clean,
                term=lambda writer, reader, own: own if f"{writer}->{reader}" in chosen else there[writer],
                ungroup=ungroup,
            ).logits


def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Any:
    """A context in which a module's output is the hook's."""
    return module.register_forward_hook(hook)


def _importances(method: str, summands: Sequence[Tensor], state: Tensor) -> list[float]:
    """Shares of the summands of a state; zero where the sum is."""
    sizes = [float(each.abs().sum()) for each in summands]
    if method == "flow":
        whole = float(state.abs().sum())
        sizes = [max(0.0, whole - float((state - each).abs().sum())) for each in summands]
    total = math.fsum(sizes)
    return [size / total if total > 0 else 0.0 for size in sizes]
