"""What the library needs from a model, and the only place that knows hook names, weight names and architectures."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, SupportsIndex, TypeAlias, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tracedensity.interrupts import uninterrupted

Prompt: TypeAlias = str | Sequence[SupportsIndex] | Tensor | np.ndarray
"""One prompt: text, a list of token ids, or a tensor of them."""

Edit: TypeAlias = Callable[[Tensor], Tensor]
"""What to put in place of a value, given the value."""

Site: TypeAlias = tuple[str, int]
"""A value inside the model: its name (a key of `_SITES`, or one of those below) and its layer.

``skip_attn`` and ``skip_mlp`` are skip connections, ``mlp_in`` what the MLP reads of the stream, before its norm,
``final_in`` what the unembedding reads, before its norm; ``*_scale`` what a norm divides by.
"""

_SITES = {
    "embed": "hook_embed",  # [batch, pos, d_model], without positions
    "resid_pre": "blocks.{}.hook_resid_pre",  # [batch, pos, d_model]
    "q": "blocks.{}.attn.hook_q",  # [batch, pos, head, d_head]
    "k": "blocks.{}.attn.hook_k",  # [batch, pos, kv_head, d_head]
    "v": "blocks.{}.attn.hook_v",  # [batch, pos, kv_head, d_head]
    "pattern": "blocks.{}.attn.hook_pattern",  # [batch, head, dest, src]
    "z": "blocks.{}.attn.hook_z",  # [batch, pos, head, d_head]
    "attn_out": "blocks.{}.hook_attn_out",  # [batch, pos, d_model]
    "resid_mid": "blocks.{}.hook_resid_mid",  # [batch, pos, d_model]
    "pre": "blocks.{}.mlp.hook_pre",  # [batch, pos, d_mlp]
    "pre_linear": "blocks.{}.mlp.hook_pre_linear",  # [batch, pos, d_mlp], of gated MLPs
    "post": "blocks.{}.mlp.hook_post",  # [batch, pos, d_mlp]
    "mlp_out": "blocks.{}.hook_mlp_out",  # [batch, pos, d_model]
    "resid_post": "blocks.{}.hook_resid_post",  # [batch, pos, d_model]
    "attn_in_scale": "blocks.{}.ln1.hook_scale",  # [batch, pos, 1]
    "mlp_in_scale": "blocks.{}.ln2.hook_scale",  # [batch, pos, 1]
    "final_scale": "ln_final.hook_scale",  # [batch, 1, 1]
}

# Where a value that is not finite is looked for, and what to call it.
_CHECKED = {
    "resid_pre": "the stream entering the block",
    "q": "the queries",
    "k": "the keys",
    "v": "the values",
    "pattern": "the attention pattern",
    "attn_out": "the attention output",
    "mlp_out": "the MLP output",
}

# What changes the outputs of a model beside its weights and its shape.
_BEHAVIOUR = (
    "normalization_type", "act_fn", "eps", "use_attn_scale", "attn_scale", "attn_scores_soft_cap",
    "output_logits_soft_cap", "positional_embedding_type", "rotary_base", "rotary_dim", "window_size", "attn_types",
)  # fmt: skip


@runtime_checkable  # so that test runs can check annotations
class HookedModel(Protocol):
    """The part of TransformerLens' `HookedTransformer` that is used here."""

    cfg: Any
    blocks: Any
    tokenizer: Any
    context_level: int
    hook_dict: Mapping[str, Any]

    def hooks(self, fwd_hooks: list[tuple[str, Callable[..., Any]]]) -> AbstractContextManager[Any]: ...
    def to_tokens(self, input: str, *, truncate: bool = True) -> Tensor: ...
    def __call__(self, input: Tensor, **kwargs: Any) -> Any: ...
    def modules(self) -> Iterator[torch.nn.Module]: ...
    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...


@dataclass(frozen=True, eq=False)
class NormLayer:
    """A normalisation layer as it is.

    Attributes:
        weight: Learned factor of each dimension; ones where it is folded into the next weights.
        bias: Learned summand; None where there is none.
        centred: Whether the mean over dimensions is subtracted first (LayerNorm), or not (RMSNorm).
        eps: Added to the mean square.
    """

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    centred: bool
    eps: float

    def statistics(
        self, x: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch d_model"], Float[Tensor, "*batch 1"]]:
        """The vectors before weight and bias, and what they were divided by."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return x / scale, scale

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        shape = self.weight.shape
        if self.centred:
            return torch.nn.functional.layer_norm(x, shape, self.weight, self.bias, self.eps)
        return torch.nn.functional.rms_norm(x, shape, self.weight, self.eps)


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation layer with its scale frozen, which makes it a linear map.

    Attributes:
        scale: What the vectors at each position are divided by.
        weight: Learned factor of each dimension; ones where it is folded into the next weights.
        centred: Whether the mean over dimensions is subtracted first (LayerNorm), or not (RMSNorm).

    A learned bias is not part of the map: it belongs to no contribution.
    """

    scale: Float[Tensor, "pos 1"]
    weight: Float[Tensor, " d_model"]
    centred: bool

    def without_scale(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map up to the scale of the position that reads the vector."""
        if self.centred:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        return vectors * self.weight

    def __call__(self, vectors: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """What the layer makes of one summand of its input, given the whole input's scale."""
        return self.without_scale(vectors) / self.scale


@dataclass(frozen=True, eq=False)
class Transformer:
    """A TransformerLens model seen through the few operations that the library needs.

    Attributes:
        model: The user's own object. It is never changed: hooks live in `with` blocks.
        name: What to call the model in results and messages.
        n_kv_heads: Number of key/value heads; fewer than `n_heads` with grouped-query attention.
        has_mlp: False for attention-only models.
        parallel: Whether attention and MLP of a block read the same stream.
        positions: How tokens get their positions, in TransformerLens' words.
    """

    model: HookedModel
    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    has_mlp: bool
    parallel: bool = False
    positions: str = "standard"

    @property
    def device(self) -> torch.device:
        return next(p for _, p in self.model.named_parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.cfg.dtype

    def require_sequential(self, reason: str) -> None:
        """Raise a ValueError if attention and MLP of a block read the same stream."""
        if self.parallel:
            raise ValueError(
                f"`model` must have its MLP after attention, got {self.name}, where both read the same stream: {reason}"
            )

    def require_no_hooks_on_reading(self) -> None:
        """Raise a ValueError if a hook of the user's stands between the stream and the queries, keys and values."""
        inputs = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
        names = (*(() if _norm_after_sublayer(self.model.cfg) else ("ln1.hook_scale", "ln1.hook_normalized")), *inputs)
        for layer in range(self.n_layers):
            for name in names:
                point = self.model.hook_dict.get(f"blocks.{layer}.{name}")
                if point is not None and point.fwd_hooks:
                    raise ValueError(
                        f"`model` must have no hook of yours at blocks.{layer}.{name}: heads read inputs of their own "
                        "in a circuit, which do not pass there. Hook the stream, the queries, keys or values instead."
                    )

    @property
    def full_dtype(self) -> torch.dtype:
        """What results are in: float64 for a float64 model, else float32."""
        return torch.promote_types(self.dtype, torch.float32)

    # -- prompts ---------------------------------------------------------------------------------

    def tokens(self, prompt: Prompt, position: int = -1) -> Int[Tensor, " pos"]:
        """Token ids of a prompt, up to the position whose prediction is explained.

        Text gets the beginning-of-sequence token that the model's tokenizer is set to prepend; ids are
        taken as they are. Attention is causal, so what comes after `position` cannot matter.

        Raises:
            ValueError: If the prompt is empty, longer than the context, holds ids outside the
                vocabulary, or has no such position.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("`prompt` must hold at least one token, got an empty string.")
            if self.model.tokenizer is None:
                raise ValueError("`prompt` must be token ids: this model has no tokenizer to read text with.")
            try:
                prompt.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"`prompt` must be text that UTF-8 can write, got {prompt!r}.") from error
            # Truncated, which is TransformerLens' default, it would be another prompt, explained without a word.
            ids = self.model.to_tokens(prompt, truncate=False)[0]
        else:
            ids = _as_ids(prompt)
            if ids.numel() and (ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool):
                raise ValueError(
                    "`prompt` must be text, a list of token ids or a [pos] integer tensor, "
                    f"got {ids.dtype} of shape {list(ids.shape)}."
                )
            ids = ids.long()
        if not len(ids):
            raise ValueError("`prompt` must hold at least one token, got none.")
        if len(ids) > self.n_ctx:
            raise ValueError(
                f"`prompt` must fit the context of {self.name}, {self.n_ctx} tokens, got {len(ids)}. Shorten it."
            )
        if int(ids.min()) < 0 or int(ids.max()) >= self.d_vocab:
            bad = ids[(ids < 0) | (ids >= self.d_vocab)][:5].tolist()
            raise ValueError(f"`prompt` must hold token ids from 0 to {self.d_vocab - 1}, got {bad}.")
        if not -len(ids) <= position < len(ids):
            raise ValueError(
                f"`position` must be a token of the prompt, from {-len(ids)} to {len(ids) - 1}, got {position}."
            )
        return ids[: position % len(ids) + 1].to(self.device)

    def texts(self, ids: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
        """The text of each token; its id where the model has no tokenizer."""
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            return [str(int(i)) for i in ids]
        return [_text(tokenizer, int(i)) for i in ids]

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens together; their ids, apart, where the model has no tokenizer."""
        texts = self.texts(ids)
        if self.model.tokenizer is None:
            return " ".join(texts)
        whole = "".join(texts)
        # characters that several tokens make up; decoding all at once may add or drop spaces, and is left for these
        return self.model.tokenizer.decode(list(ids)) if "\N{REPLACEMENT CHARACTER}" in whole else whole

    def single_token(self, word: str | int, name: str = "word") -> int:
        """Id of a word that is one token.

        Raises:
            ValueError: If it is several tokens, or an id outside the vocabulary.
        """
        if not isinstance(word, str):
            if not 0 <= word < self.d_vocab:
                raise ValueError(f"`{name}` must hold token ids from 0 to {self.d_vocab - 1}, got {word}.")
            return int(word)
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise ValueError(f"`{name}` must be token ids: this model has no tokenizer to read {word!r} with.")
        # tokenizers of SentencePiece's kind put the space before a word themselves
        for text in (word, word.removeprefix(" ")):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) == 1 and (text == word or self.texts(ids) == [word]):
                return int(ids[0])
        raise ValueError(
            f"`{name}` must be single tokens, got {word!r}, which {self.name} reads as "
            f"{self.texts(tokenizer.encode(word, add_special_tokens=False))}."
        )

    @cached_property
    def vocabulary(self) -> str:
        """A short hash of the tokenizer: the same tokens with the same ids, or others; "" without one."""
        if self.model.tokenizer is None:
            return ""
        entries = sorted(self.model.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]

    # -- running ---------------------------------------------------------------------------------

    @uninterrupted()
    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        edits: Mapping[Site, Edit] | None = None,
        *,
        last: Int[Tensor, " batch"] | None = None,
        ungrouped: bool = False,
        differentiable: bool = False,
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits at one position of each row, in float32 or better, with values edited on the way.

        Only that position goes through the unembedding, whose output for a whole batch of prompts
        would often be the largest tensor of all.

        Args:
            tokens: Prompts, padded on the right.
            edits: What to put in place of values, by site. Keys and values have one entry per key/value head.
            last: Where each prompt ends; by default at the last position.
            ungrouped: Give each query head keys and values of its own, so that they can be edited one by one.
            differentiable: Whether to record what `torch.autograd.grad` needs.
        """
        edits = dict(edits or {})
        at_end = edits.pop(("final_in", 0), lambda value: value)

        def end(value: Tensor, hook: object) -> Tensor:
            rows = torch.arange(len(value), device=value.device)
            return at_end(value[:, -1:] if last is None else value[rows, last.to(value.device)][:, None])

        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(differentiable))
            if ungrouped:
                self._require_no_hooks_on_groups()
                stack.enter_context(self._each_head_its_own())
                for site in ((name, layer) for layer in range(self.n_layers) for name in "kv"):
                    edits.setdefault(site, lambda value: value)
            for (name, layer), edit in [*edits.items()]:
                if name == "mlp_in":
                    del edits[name, layer]
                    stack.enter_context(self._mlp_input(layer, edit))
                elif name in ("k", "v"):
                    edits[name, layer] = partial(self._edit_kv, edit=edit, ungrouped=ungrouped)
            made = {site: edits.pop(site) for site in [*edits] if site[0] in ("q", "k", "v")}
            hooks = [*self._edit_hooks(edits), (self._hook("resid_post", self.n_layers - 1), end)]
            stack.enter_context(self.model.hooks(fwd_hooks=hooks))
            for name, hook in self._edit_hooks(made):
                # What a head makes of its input comes before what hooks of the user's make of that; all others see a
                # value as the user's hooks leave it. This hook goes as those above go, when their context is left.
                level = self.model.context_level
                self.model.hook_dict[name].add_hook(hook, level=level, prepend=True)
            stream = self.model(tokens, stop_at_layer=self.n_layers, padding_side="right")
            return full_precision(self._unembedded(stream)[:, -1])

    def _unembedded(self, stream: Float[Tensor, "batch 1 d_model"]) -> Float[Tensor, "batch 1 d_vocab"]:
        """What TransformerLens does after the last block, but for the copy of the unembedding that it makes."""
        model = cast(Any, self.model)
        if model.cfg.normalization_type is not None:
            stream = model.ln_final(stream)
        if self.dtype not in (torch.float32, torch.float64):
            logits = model.unembed(stream)  # the same roundings
        else:
            logits = model.unembed.hook_in(stream) @ model.unembed.W_U + model.unembed.b_U
            logits = model.unembed.hook_out(logits)
        cap = model.cfg.output_logits_soft_cap
        return cap * (logits / cap).tanh() if cap > 0 else logits

    def _edit_kv(self, value: Tensor, edit: Edit, ungrouped: bool) -> Tensor:
        """Edit keys or values in the number of heads that the caller counts, and return what the model counts."""
        n_given, n_wanted = value.shape[2], self.n_heads if ungrouped else self.n_kv_heads
        if n_wanted > n_given:
            value = self.per_head(value)
        elif n_wanted < n_given:  # a flag of the user's has ungrouped them: the copies are equal
            value = value[:, :, :: n_given // n_wanted]
        edited = edit(value)
        return edited.repeat_interleave(n_given // n_wanted, dim=2) if n_wanted < n_given else edited

    def _require_no_hooks_on_groups(self) -> None:
        """Raise a ValueError if a hook of the user's is made for one key or value per group, where there is none."""
        if self.n_kv_heads == self.n_heads or self.model.cfg.ungroup_grouped_query_attention:
            return
        for layer in range(self.n_layers):
            for name in ("hook_k", "hook_v", "hook_rot_k"):
                point = self.model.hook_dict.get(f"blocks.{layer}.attn.{name}")
                if point is not None and point.fwd_hooks:
                    raise ValueError(
                        f"`model` must have no hook of yours at blocks.{layer}.attn.{name} where query heads get keys "
                        "and values of their own: it would see more of them than the model has. Leave out `ungroup`."
                    )

    @contextmanager
    def _each_head_its_own(self) -> Iterator[None]:
        """While open, attention takes keys and values that come one per query head."""
        if getattr(self.model.cfg, "ungroup_grouped_query_attention", False):  # so they do already
            yield
            return
        modules = [block.attn for block in self.model.blocks if getattr(block.attn, "repeat_kv_heads", 1) > 1]
        before = [module.repeat_kv_heads for module in modules]
        try:
            for module in modules:
                module.repeat_kv_heads = 1
            yield
        finally:
            for module, repeats in zip(modules, before, strict=True):
                module.repeat_kv_heads = repeats

    @contextmanager
    def _mlp_input(self, layer: int, edit: Edit) -> Iterator[None]:
        """While open, what the MLP reads is edited, and what the skip connection carries is not.

        There is a hook for it only where a flag of TransformerLens is set; the module that reads it has a hook of
        PyTorch's.
        """
        block = self.model.blocks[layer]
        reader = block.mlp if _norm_after_sublayer(self.model.cfg) else block.ln2
        handle = reader.register_forward_pre_hook(lambda module, inputs: (edit(inputs[0]), *inputs[1:]))
        try:
            yield
        finally:
            handle.remove()

    def relevance_edits(self) -> dict[Site, Edit]:
        """Edits that leave all values as they are and make gradients those of relevance propagation.

        Scales of norms count as constants; an activation ``f(x)`` as x times the constant ``f(x) / x``; each factor of
        a gated MLP gets half of the gradient of the product.

        References:
            RelP: Rezaei Jafari, Eberle, Khakzar, Nanda (arXiv 2508.21258).
        """
        edits: dict[Site, Edit] = {}
        if self.model.cfg.normalization_type is not None:
            names = ["attn_in_scale", *(["mlp_in_scale"] if self.has_mlp else [])]
            sites: list[Site] = [(name, layer) for layer in range(self.n_layers) for name in names]
            edits |= dict.fromkeys([*sites, ("final_scale", 0)], Tensor.detach)
        for layer in range(self.n_layers if self.has_mlp else 0):
            edits |= self._relevance_of_mlp(layer)
        return edits

    def _relevance_of_mlp(self, layer: int) -> dict[Site, Edit]:
        mlp = self.model.blocks[layer].mlp
        if not hasattr(mlp, "W_out"):
            raise ValueError(f"`method` must not be 'relp' for {self.name}: layer {layer} is no plain MLP (experts?).")
        gated = hasattr(mlp, "W_gate")
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor, name: str) -> Tensor:
            seen[name] = value
            return value

        def replaced(value: Tensor) -> Tensor:
            x = seen["pre"]
            active = mlp.act_fn(x).detach()
            # in half precision, where a summand so small would be lost or zero, as well
            near = full_precision(x)
            ratio = (full_precision(active) / (near + torch.where(near < 0, -1e-6, 1e-6))).to(x.dtype).detach()
            relevant = x * ratio
            if gated:
                linear = seen["pre_linear"]
                relevant = (relevant * linear.detach() + active * linear) / 2
            return relevant + (value - relevant).detach()

        names = ["pre", *(["pre_linear"] if gated else [])]
        return {**{(name, layer): partial(keep, name=name) for name in names}, ("post", layer): replaced}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """While open, no parameter takes a gradient, so that none is computed for it and nothing is kept for one."""
        learning = [parameter for _, parameter in self.model.named_parameters() if parameter.requires_grad]
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            with uninterrupted():
                for parameter in learning:
                    parameter.requires_grad_(True)

    def attend(
        self,
        layer: int,
        query_input: Float[Tensor, "row pos d_model"],
        key_input: Float[Tensor, "row pos d_model"],
        value_input: Float[Tensor, "row pos d_model"],
    ) -> Float[Tensor, "row pos head d_head"]:
        """What the heads of a layer make of inputs of their own, after the norm; in float32 or better."""
        held: list[Tensor] = []
        cfg, attention = self.model.cfg, self.model.blocks[layer].attn
        inputs = [each.to(self.dtype) for each in (query_input, key_input, value_input)]
        if cfg.use_split_qkv_input or cfg.use_attn_in:  # flags with which attention takes an input per head
            n_kv = self.n_heads if cfg.ungroup_grouped_query_attention else self.n_kv_heads
            counts = (self.n_heads, n_kv, n_kv)
            inputs = [each[:, :, None].expand(-1, -1, n, -1) for each, n in zip(inputs, counts, strict=True)]
        with torch.no_grad(), self.reading({("z", layer): held.append}):
            attention(*inputs)
        return full_precision(held[0])

    @contextmanager
    def reading(self, sites: Mapping[Site, Callable[[Tensor], None]]) -> Iterator[None]:
        """While open, which is for a run, hand the value at each site to its function."""

        def read(value: Tensor, hook: object, function: Callable[[Tensor], None]) -> None:
            function(value)

        hooks = [(self._hook(*site), partial(read, function=function)) for site, function in sites.items()]
        with uninterrupted(), self.model.hooks(fwd_hooks=hooks):
            yield

    def observe(
        self,
        tokens: Int[Tensor, "batch pos"],
        readers: Mapping[Site, Callable[[Tensor], None]],
        last: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch d_vocab"]:
        """One plain run, in which functions see the values at sites, their dtype as it is.

        Returns:
            Logits at the last position of each row, in float32 or better.

        Raises:
            ValueError: If a value in any layer is NaN or infinite, naming the first one.
        """

        def look(value: Tensor, site: Site) -> None:
            _require_sound(value, *site)
            if site in readers:
                readers[site](value)

        checked = [name for name in _CHECKED if self.has_mlp or name != "mlp_out"]
        sites = [*((name, layer) for layer in range(self.n_layers) for name in checked), *readers]
        with self.reading({site: partial(look, site=site) for site in sites}):
            logits = self.logits(tokens, last=last)
        require_finite(logits, "the logits")
        return logits

    def run(
        self, tokens: Int[Tensor, " pos"], sites: Sequence[Site] = ()
    ) -> tuple[Float[Tensor, " d_vocab"], dict[Site, Tensor]]:
        """One plain run on one prompt, with the same checks.

        Returns:
            Logits at the last position, and the values at the sites asked for, without batch axis, both in
            float32 or better.
        """
        held: dict[Site, Tensor] = {}

        def hold(value: Tensor, site: Site) -> None:
            held[site] = full_precision(value[0])

        return self.observe(tokens[None], {site: partial(hold, site=site) for site in sites})[0], held

    def _hook(self, name: str, layer: int) -> str:
        if name == "attn_scale":
            return f"blocks.{layer}.{self._attn_norm_name}.hook_scale"
        if name == "resid_mid" and not self.has_mlp:
            name = "resid_post"
        return _SITES[name].format(layer)

    def _edit_hooks(self, edits: Mapping[Site, Edit]) -> list[tuple[str, Callable[..., Any]]]:
        sums: list[tuple[str, Callable[..., Any]]] = []
        values: list[tuple[str, Callable[..., Any]]] = []
        terms: list[tuple[str, Callable[..., Any]]] = []
        for (name, layer), edit in edits.items():
            if name == "skip_attn":
                *keep, replace = self._skip_hooks(layer, "resid_pre", "attn_out", "resid_mid", edit)
            elif name == "skip_mlp":
                *keep, replace = self._skip_hooks(layer, "resid_mid", "mlp_out", "resid_post", edit)
            else:
                values.append((self._hook(name, layer), partial(_edited, edit=edit, name=name, layer=layer)))
                continue
            terms += keep
            sums.append(replace)
        # Hooks at one point run in this order, whatever the order of the edits: a sum is made again, then
        # edited, then kept as a term of the next sum.
        return [*sums, *values, *terms]

    def _skip_hooks(
        self, layer: int, before: str, branch: str, after: str, edit: Edit
    ) -> list[tuple[str, Callable[..., Any]]]:
        """The skip connection around a sublayer has no hook: the sum is made again from its two terms.

        Adding and subtracting the skip term from the sum would lose digits to rounding.
        """
        terms: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: object, name: str) -> None:
            terms[name] = value

        def replace(value: Tensor, hook: object) -> Tensor:
            skip, branch = terms.pop("skip"), terms.pop("branch")
            if (edited := edit(skip)) is skip:
                return value
            by_user = value - (skip + branch)  # zero, unless a hook of the user's has changed the sum before us
            return edited + branch + by_user

        return [
            (self._hook(before, layer), partial(keep, name="skip")),
            (self._hook(branch, layer), partial(keep, name="branch")),
            (self._hook(after, layer), replace),
        ]

    # -- weights ---------------------------------------------------------------------------------

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output projection of each head, in float32 or better (a view where it already is)."""
        return full_precision(self.model.blocks[layer].attn.W_O.detach())

    def reading_weights(self, name: str, layer: int) -> tuple[Float[Tensor, "head d_model d_head"], Tensor]:
        """Weights and bias ``[head, d_head]`` that make queries, keys or values (``"q"``, ``"k"``, ``"v"``).

        One per key/value head for keys and values, in float32 or better.
        """
        attention = self.model.blocks[layer].attn
        grouped = "_" if name != "q" and hasattr(attention, f"_W_{name.upper()}") else ""
        weight, bias = (getattr(attention, f"{grouped}{kind}_{name.upper()}") for kind in "Wb")
        return full_precision(weight.detach()), full_precision(bias.detach())

    def head_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """What each head writes to the stream is ``z`` times these, `z` being divided by `attn_scale` where that is.

        They are the output projections, or what a norm after attention makes of them but for its scale.
        """
        weight = self.W_O(layer)
        norm = self.attn_norm(layer, weight.new_ones(1, 1))
        return weight if norm is None else norm.without_scale(weight)

    @property
    def has_norm(self) -> bool:
        """Whether the model normalises anything."""
        return self.model.cfg.normalization_type is not None

    @property
    def has_attn_scale(self) -> bool:
        """Whether there is a norm between the heads and the stream (site ``attn_scale``)."""
        return bool(self._attn_norm_name)

    def attn_reader(self, layer: int) -> NormLayer | None:
        """The norm through which queries, keys and values read the stream; None where they read it as it is."""
        if _norm_after_sublayer(self.model.cfg) or self.model.cfg.normalization_type is None:
            return None
        module = self.model.blocks[layer].ln1
        weight, bias = getattr(module, "w", None), getattr(module, "b", None)
        ones = torch.ones(self.d_model, dtype=self.dtype, device=self.device)
        return NormLayer(
            full_precision(ones if weight is None else weight.detach()),
            None if bias is None else full_precision(bias.detach()),
            type(module).__name__.startswith("LayerNorm"),
            float(module.eps),
        )

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, in float32 or better (a view where it already is)."""
        return full_precision(cast(Any, self.model).unembed.W_U.detach())

    def W_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """What each MLP neuron writes to the residual stream, in float32 or better."""
        weight = getattr(self.model.blocks[layer].mlp, "W_out", None)
        if weight is None:
            raise ValueError(f"Neurons of {self.name} cannot be told apart: layer {layer} is no plain MLP (experts?).")
        return full_precision(weight.detach())

    def per_head(self, values: Shaped[Tensor, "*pos kv_head d_head"]) -> Shaped[Tensor, "*pos head d_head"]:
        """Keys or values, repeated for the query heads that share them unless they are already."""
        return values.repeat_interleave(self.n_heads // values.shape[-2], dim=-2)

    @property
    def scale_sites(self) -> list[Site]:
        """The frozen scales that linearising the norms after a sublayer needs."""
        sites = [("final_scale", 0)] if self.model.cfg.normalization_type is not None else []
        if self._attn_norm_name:
            sites += [("attn_scale", layer) for layer in range(self.n_layers)]
        return sites

    def final_norm(self, scale: Float[Tensor, "pos 1"] | None) -> Norm | None:
        """The norm before the unembedding, at its scale on one prompt; None where the model has none."""
        return None if scale is None else self._norm(cast(Any, self.model).ln_final, scale)

    def attn_norm(self, layer: int, scale: Float[Tensor, "pos 1"] | None) -> Norm | None:
        """The norm between the heads' outputs and the stream (Gemma 2, OLMo 2); None in most models."""
        name = self._attn_norm_name
        return None if scale is None or not name else self._norm(getattr(self.model.blocks[layer], name), scale)

    def _norm(self, module: Any, scale: Float[Tensor, "pos 1"]) -> Norm:
        weight = getattr(module, "w", None)
        weight = torch.ones(self.d_model, device=scale.device) if weight is None else weight.detach()
        centred = type(module).__name__.startswith("LayerNorm")
        return Norm(full_precision(scale), full_precision(weight), centred)

    @property
    def _attn_norm_name(self) -> str:
        if self.model.cfg.use_normalization_before_and_after:
            return "ln1_post"
        if _norm_after_sublayer(self.model.cfg):
            return "ln1"
        return ""

    def fingerprint(self) -> str:
        """A short hash of the architecture and of all weights: the same model, or another.

        It is made of the float32 values, so that a model is the same after it was converted to a wider type.
        Folded weights are another model: their contributions to the stream are other vectors. Looking through
        all weights takes about as long as a forward pass on a short prompt; nothing cheaper notices every edit.

        Raises:
            ValueError: If a weight is NaN or infinite, naming the first.
        """
        digest = hashlib.sha256()
        shape = (self.n_layers, self.n_heads, self.n_kv_heads, self.d_model, self.d_mlp, self.d_vocab)
        behaviour = [str(getattr(self.model.cfg, name, None)) for name in _BEHAVIOUR]
        digest.update(json.dumps([*shape, *behaviour]).encode())
        for name, parameter in self.model.named_parameters():
            flat = parameter.detach().flatten()
            total = 0
            for part in flat.split(2**20):  # a sum makes a copy in a wider type
                part = part.float()
                if not part.sum().isfinite() and not part.isfinite().all():
                    raise ValueError(f"`model` must have finite weights, got NaN or infinite in {_weight_name(name)}.")
                # sums of integers do not depend on the order in which a machine adds them up
                total += int(part.view(torch.int32).sum())
            sample = flat[:: max(1, len(flat) // 16)][:17].float()
            digest.update(f"{name} {total}".encode() + sample.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def as_transformer(model: object) -> Transformer:
    """The model seen through what the library needs.

    Args:
        model: A TransformerLens `HookedTransformer`, or what `load_model` accepts, or a `Transformer`.

    Raises:
        ValueError: If the object is no such model, or has an architecture that the graphs here do not describe.
    """
    if isinstance(model, Transformer):
        return model
    if isinstance(model, str | os.PathLike):
        from tracedensity.loading import load_model

        model = load_model(model)
    # By name: a TransformerBridge looks alike, but edits of its `hook_resid_mid` do not reach the skip connection.
    if not any(cls.__name__ == "HookedTransformer" for cls in type(model).__mro__):
        raise ValueError(
            "`model` must be a HookedTransformer of TransformerLens or a name for `td.load_model`, "
            f"got {type(model).__name__}."
        )
    cfg = cast(Any, model).cfg
    if getattr(cfg, "attention_dir", "causal") != "causal":
        raise ValueError(
            f"`model` must be a causal language model, got attention in both directions ({cfg.model_name})."
        )
    return Transformer(
        model=cast(HookedModel, model),
        name=str(cfg.model_name),
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp or 0,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        has_mlp=not cfg.attn_only,
        parallel=bool(getattr(cfg, "parallel_attn_mlp", False)),
        positions=str(cfg.positional_embedding_type),
    )


def require_finite(values: Tensor, quantity: str, layer: int | None = None) -> None:
    """Raise a ValueError that names the layer if a value is NaN or infinite.

    The sum is tested first: it is finite only if all summands are, and is one cheap pass.
    """
    if values.sum().isfinite() or values.isfinite().all():
        return
    where = "the model" if layer is None else f"layer {layer}"
    bad = int((~values.isfinite()).sum())
    raise ValueError(
        f"`model` must give finite values, got {bad} NaN or infinite in {quantity} of {where}. "
        "Look at its weights, or load it in float32."
    )


def _edited(value: Tensor, hook: object, edit: Edit, name: str, layer: int) -> Tensor:
    _require_sound(value, name, layer)
    return edit(value)


def _require_sound(value: Tensor, name: str, layer: int) -> None:
    """Raise a ValueError that names the layer if the value at a site shows that something is NaN or infinite."""
    if name == "pattern":
        # TransformerLens makes zeros of a softmax that is NaN: a token that attends to nothing gives it away
        if not (value.sum(-1) > 0).all():
            raise ValueError(
                f"`model` must give finite values, got NaN or infinite in the attention scores of layer {layer} "
                "(queries times keys). Look at its weights, or load it in float32."
            )
    elif name in _CHECKED:
        require_finite(value, _CHECKED[name], layer)


def _as_ids(prompt: Sequence[SupportsIndex] | Tensor | np.ndarray) -> Tensor:
    try:
        return torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "`prompt` must be text, a list of token ids or a [pos] integer tensor, "
            f"got a {type(prompt).__name__} that is none of them."
        ) from error


def _weight_name(parameter: str) -> str:
    """Where a parameter is, in words."""
    parts = parameter.split(".", 2)
    return f"{parts[2]} of layer {parts[1]}" if parts[0] == "blocks" else parameter


def _norm_after_sublayer(cfg: Any) -> bool:
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    return cfg.original_architecture in POST_NORM_ARCHITECTURES


def full_precision(tensor: Tensor) -> Tensor:
    """In float64 if it already is, else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _text(tokenizer: Any, token: int) -> str:
    """The text of one token, its leading space kept.

    Tokenizers that drop it (SentencePiece's kind) show it in the token's own name, as U+2581.
    """
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    name = tokenizer.convert_ids_to_tokens(token)
    if isinstance(name, str) and name.startswith("▁") and not text.startswith(" "):
        text = " " + text
    return text
