"""What the library needs from a model."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, SupportsIndex, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tracedensity.interrupts import uninterrupted
from tracedensity.model.adapter import Adapter, NormName, Shape, Site, Visiting, guests_at_end, remade
from tracedensity.model.norm import Norm, NormLayer
from tracedensity.model.offload import offloaded
from tracedensity.model.place import BehindNorm, Place, Visit
from tracedensity.model.precision import CHECKED, full_precision, require_finite, require_sound
from tracedensity.model.spread import home

Prompt: TypeAlias = str | Sequence[SupportsIndex] | Tensor | np.ndarray
"""One prompt: text, a list of token ids, or a tensor of them."""

Edit: TypeAlias = Callable[[Tensor], Tensor]
"""What to put in place of a value, given the value."""

_WITHIN = {"mlp_idle": ("pre", "post"), "attn_idle": ("q", "k", "v", "z")}
"""Of which values there are fewer tokens or rows where work is left out."""


@dataclass(frozen=True, eq=False)
class Transformer(Shape):
    """A TransformerLens model seen through the few operations that the library needs.

    Attributes:
        adapter: What knows the class of the model. The model itself is never changed: hooks live in `with` blocks.
    """

    adapter: Adapter

    @property
    def model(self) -> Any:
        """The user's own object."""
        return self.adapter.model

    @cached_property
    def device(self) -> torch.device:
        """Where everything is computed that the model does not compute itself, wherever its layers are."""
        return home(self.model)

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.adapter.W_O(0).dtype

    def require_sequential(self, reason: str) -> None:
        """Raise a ValueError if attention and MLP of a block read the same stream."""
        if self.parallel:
            raise ValueError(
                f"`model` must have its MLP after attention, got {self.name}, where both read the same stream: {reason}"
            )

    def require_no_hooks_on_reading(self) -> None:
        """Raise a ValueError if a hook of the user's stands between the stream and the queries, keys and values."""
        if (name := next(self.adapter.guests_of_reading(), None)) is not None:
            raise ValueError(
                f"`model` must have no hook of yours at {name}: heads read inputs of their own in a circuit, which do "
                "not pass there. Hook the stream, the queries, keys or values instead."
            )

    @property
    def full_dtype(self) -> torch.dtype:
        """What results are in: float64 for a float64 model, else float32."""
        return torch.promote_types(self.dtype, torch.float32)

    # -- prompts ---------------------------------------------------------------------------------

    def tokens(self, prompt: Prompt | object, position: int = -1) -> Int[Tensor, " pos"]:
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
            ids = self.model.to_tokens(prompt, truncate=False, move_to_device=False)[0]
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

    def pieces(self, text: str) -> list[int]:
        """Token ids of text in the middle of a sequence: none is put before it, and it may be of any length.

        Raises:
            ValueError: If the model has no tokenizer.
        """
        if self.model.tokenizer is None:
            raise ValueError("`prompt` must be token ids: this model has no tokenizer to read text with.")
        return list(self.model.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    @cached_property
    def beginning(self) -> tuple[int, ...]:
        """What `tokens` puts before a text: the token that begins a sequence, or nothing."""
        if self.model.tokenizer is None:
            return ()
        whole, own = self.tokens("a").tolist(), self.pieces("a")
        return tuple(whole[: len(whole) - len(own)])

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

    @cached_property
    def tokenization(self) -> str:
        """A short hash of how text becomes tokens: the vocabulary, merges and settings; "" without a tokenizer."""
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            return ""
        digest = hashlib.sha256(json.dumps([self.vocabulary, self.beginning]).encode())
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            # how the last texts were padded and cut is written there too
            about = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
            digest.update(json.dumps(about, sort_keys=True).encode())
        else:
            digest.update(type(tokenizer).__name__.encode())
            with TemporaryDirectory() as folder, suppress(NotImplementedError, AttributeError):
                tokenizer.save_vocabulary(folder)
                for path in sorted(Path(folder).iterdir()):
                    digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

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

        Raises:
            ValueError: If a value that is edited is NaN or infinite, naming the layer.
        """
        self._require_no_hooks_at_end()
        edits = dict(edits or {})
        at_end = self._at_home(edits.pop(("final_in", 0), lambda value: value))

        def end(value: Tensor) -> Tensor:
            rows = torch.arange(len(value), device=value.device)
            ended = at_end(value[:, -1:] if last is None else value[rows, last.to(value.device)][:, None])
            assert ended is not None
            return ended

        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(differentiable))
            stack.enter_context(self.settled())
            if ungrouped:
                self._require_no_hooks_on_groups()
                stack.enter_context(self.adapter.ungrouped())
                for site in ((name, layer) for layer in range(self.n_layers) for name in "kv"):
                    edits.setdefault(site, lambda value: value)
            for (name, layer), edit in edits.items():
                if name in ("k", "v"):
                    edits[name, layer] = partial(self._edit_kv, edit=edit, ungrouped=ungrouped)
            self._attach(stack, self._visits(edits))
            if differentiable:
                stack.enter_context(offloaded(self.model))
            stream = self.adapter.run(tokens, end)
            return self._here(self.adapter.unembedded(stream)[:, -1])

    def _require_no_hooks_at_end(self) -> None:
        """Raise a ValueError if a hook of the user's would see one position, and sees all in the model's own run."""
        if (name := next(guests_at_end(self.model), None)) is not None:
            raise ValueError(
                f"`model` must have no hook of yours at {name}, behind the last block, where only the position that is "
                f"explained is run. Hook blocks.{self.n_layers - 1}.hook_resid_post instead."
            )

    def _visits(self, edits: Mapping[Site, Edit]) -> list[Visiting]:
        visits: list[Visiting] = []
        for (name, layer), edit in edits.items():
            if name == "skip_attn":
                visits += self.adapter.skip_attn(layer, edit)
            elif name in _WITHIN:  # a shortcut, which is not taken where somebody looks at what it leaves out
                seen = any((each, layer) in edits for each in _WITHIN[name])
                place = None if seen else self.adapter.place(name, layer)
                visits += [] if place is None else [Visiting(place, edit)]
            elif name == "skip_mlp":
                before, branch, after = (self._place(each, layer) for each in ("resid_mid", "mlp_out", "resid_post"))
                visits += remade(before, branch, after, edit)
            else:
                place = self._place(name, layer)
                if isinstance(place, BehindNorm) and ("attn_in_scale", layer) in edits:  # a norm that is shared
                    place = replace(place, relevant=True)
                # What a head makes of its input comes before what hooks of the user's make of that; all others see
                # a value as the user's hooks leave it.
                visits.append(
                    Visiting(place, partial(_edited, edit=edit, name=name, layer=layer), first=name in ("q", "k", "v"))
                )
        # Visits of one place run in this order, whatever the order of the edits: a sum is made again, then
        # edited, then kept as a term of the next sum.
        return sorted(visits, key=lambda visiting: visiting.turn)

    def _attach(self, stack: ExitStack, visits: Iterable[Visiting]) -> None:
        for each in visits:
            stack.callback(each.place.attach(self._at_home(each.visit), first=each.first))

    def _at_home(self, visit: Visit) -> Visit:
        """The same visit with values brought to `device`, and back, from layers that are elsewhere."""

        def brought(value: Tensor) -> Tensor | None:
            here = value.to(self.device)
            if not torch.is_grad_enabled():
                here = here.detach()  # with gradient checkpointing, embeddings want a gradient in every run
            found = visit(here)
            return value if found is here else None if found is None else found.to(value.device)

        return brought

    def _here(self, value: Tensor) -> Tensor:
        return full_precision(value.to(self.device))

    def _place(self, name: str, layer: int) -> Place:
        place = self.adapter.place(name, layer)
        if place is None:
            raise ValueError(
                f"`model` must show {name!r} in every layer, got {self.name} ({self.adapter.kind}), which has no such "
                f"value in layer {layer}."
            )
        return place

    @contextmanager
    def settled(self) -> Iterator[None]:
        """While open, nothing in the model is random, saved for later or compiled: dropout, checkpoints, graphs."""
        modules = list(dict.fromkeys(self.adapter.modules()))
        training = [module for module in modules if module.training]
        compiled = [
            (module, module._compiled_call_impl) for module in modules if module._compiled_call_impl is not None
        ]
        try:
            for module in training:
                module.training = False
            for module, _ in compiled:
                module._compiled_call_impl = None
            with self.adapter.forgetting():
                yield
        finally:
            for module in training:
                module.training = True
            for module, implementation in compiled:
                module._compiled_call_impl = implementation

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
        if self.n_kv_heads < self.n_heads and (name := next(self.adapter.guests_of_groups(), None)) is not None:
            raise ValueError(
                f"`model` must have no hook of yours at {name} where query heads get keys and values of their own: it "
                "would see more of them than the model has. Leave out `ungroup`."
            )

    def relevance_edits(self) -> dict[Site, Edit]:
        """Edits that leave all values as they are and make gradients those of relevance propagation.

        Scales of norms count as constants; an activation ``f(x)`` as x times the constant ``f(x) / x``; each factor of
        a gated MLP gets half of the gradient of the product.

        Raises:
            ValueError: If an MLP is no plain one.

        References:
            RelP: Rezaei Jafari, Eberle, Khakzar, Nanda (arXiv 2508.21258).
        """
        edits: dict[Site, Edit] = dict.fromkeys(self.adapter.scales(), Tensor.detach)
        for layer in range(self.n_layers if self.has_mlp else 0):
            edits |= self._relevance_of_mlp(layer)
        return edits

    def _relevance_of_mlp(self, layer: int) -> dict[Site, Edit]:
        function = self.adapter.activation(layer)
        if self.adapter.W_out(layer) is None or function is None:
            raise ValueError(f"`method` must not be 'relp' for {self.name}: layer {layer} is no plain MLP (experts?).")
        gated = self.adapter.gated(layer)
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor, name: str) -> Tensor:
            seen[name] = value
            return value

        def replaced(value: Tensor) -> Tensor:
            x = seen["pre"]
            active = function(x).detach()
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
        learning = [
            (module, name)  # not the parameter: one that is kept on disk is another after each run
            for module in self.model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        ]
        if any(parameter.is_inference() for parameter in self.model.parameters()):
            raise ValueError(
                f"`model` must have been loaded outside of `torch.inference_mode()`, got {self.name}, whose weights "
                "can have no part in a gradient. Load it again, or take a method without gradients."
            )
        try:
            for module, name in learning:
                module._parameters[name].requires_grad_(False)
            yield
        finally:
            with uninterrupted():
                for module, name in learning:
                    module._parameters[name].requires_grad_(True)

    def attend(
        self,
        layer: int,
        query_input: Float[Tensor, "row pos d_model"],
        key_input: Float[Tensor, "row pos d_model"],
        value_input: Float[Tensor, "row pos d_model"],
    ) -> Float[Tensor, "row pos head d_head"]:
        """What the heads of a layer make of inputs of their own, after the norm; in float32 or better."""
        held: list[Tensor] = []
        visits = [Visiting(self._place("z", layer), held.append)]
        for name, read in (("q", query_input), ("k", key_input), ("v", value_input)):
            weight, bias = self.reading_weights(name, layer)
            made = torch.einsum("rtd,hdk->rthk", read, weight) + bias
            edit: Edit = partial(_instead, made=made)
            if name != "q":
                edit = partial(self._edit_kv, edit=edit, ungrouped=False)
            visits.append(Visiting(self._place(name, layer), edit, first=True))
        with torch.no_grad(), self.settled(), uninterrupted(), ExitStack() as stack:
            args, kwargs = self._attention_calls(*query_input.shape[:2])[layer]
            self._attach(stack, visits)
            self.adapter.attention(layer)(*args, **kwargs)
        return full_precision(held[0])

    def _attention_calls(self, n_rows: int, n_pos: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What attention is called with in each layer, beside its input: masks, angles of rotation and the like.

        Kept for batches of the same size, of which there are a few.
        """
        known = self._calls
        if (n_rows, n_pos) in known:
            return known[n_rows, n_pos]
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        nothing = torch.zeros(n_rows, n_pos, self.d_model, dtype=self.dtype, device=self.device)

        def note(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            def lean(value: Any) -> Any:  # inputs are as many copies of the stream as there are layers
                alike = isinstance(value, Tensor) and value.shape == nothing.shape and value.dtype == nothing.dtype
                return nothing.to(value.device) if alike else value

            found.append((tuple(map(lean, args)), {name: lean(value) for name, value in kwargs.items()}))

        with ExitStack() as stack:
            for layer in range(self.n_layers):
                handle = self.adapter.attention(layer).register_forward_pre_hook(note, with_kwargs=True)
                stack.callback(handle.remove)
            self.adapter.run(torch.zeros(n_rows, n_pos, dtype=torch.long, device=self.device), lambda value: value)
        if len(known) > 2:
            known.clear()
        known[n_rows, n_pos] = found
        return found

    @cached_property
    def _calls(self) -> dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        return {}

    @contextmanager
    def reading(self, sites: Mapping[Site, Callable[[Tensor], None]]) -> Iterator[None]:
        """While open, which is for a run, hand the value at each site to its function."""
        visits = [Visiting(self._place(*site), function) for site, function in sites.items()]
        with uninterrupted(), ExitStack() as stack:
            self._attach(stack, visits)
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
            require_sound(value, *site)
            if site in readers:
                readers[site](value)

        checked = [name for name in CHECKED if self.has_mlp or name != "mlp_out"]
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
        ahead = self._unchanged[0].runs.pop(tuple(tokens.tolist()), None) if self._unchanged else None
        if ahead is not None:
            logits, held = ahead
            if held.keys() >= set(sites):
                return logits, held
        held: dict[Site, Tensor] = {}

        def hold(value: Tensor, site: Site) -> None:
            held[site] = full_precision(value[0])

        return self.observe(tokens[None], {site: partial(hold, site=site) for site in sites})[0], held

    def run_ahead(self, prompts: Sequence[Int[Tensor, " _"]], sites: Sequence[Site]) -> Float[Tensor, "prompt d_vocab"]:
        """Run several prompts together, and keep for `run` what it will be asked for of each, once.

        Only while the model is `unchanged`; what an earlier call has kept and nobody asked for is dropped.

        Returns:
            Logits at the last position of each.
        """
        (known,) = self._unchanged
        held: dict[Site, Tensor] = {}

        def hold(value: Tensor, site: Site) -> None:
            held[site] = full_precision(value)

        last = torch.tensor([len(each) - 1 for each in prompts], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence([*prompts], batch_first=True)
        logits = self.observe(padded, {site: partial(hold, site=site) for site in sites}, last)
        known.runs.clear()
        for row, tokens in enumerate(prompts if sites else ()):
            n_pos = len(tokens)
            own = {
                site: value[row, :, :n_pos, :n_pos] if site[0] == "pattern" else value[row, :n_pos]
                for site, value in held.items()
            }
            known.runs[tuple(tokens.tolist())] = logits[row], own
        return logits

    # -- weights ---------------------------------------------------------------------------------

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output projection of each head, in float32 or better (a view where it already is)."""
        return self._here(self.adapter.W_O(layer))

    def reading_weights(
        self, name: str, layer: int
    ) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"]]:
        """Weights and biases that make queries, keys or values (``"q"``, ``"k"``, ``"v"``), in float32 or better.

        One per key/value head for keys and values.
        """
        weight, bias = self.adapter.projection(name, layer)
        if bias is None:
            bias = weight.new_zeros(len(weight), weight.shape[-1])
        return self._here(weight), self._here(bias)

    def head_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """What each head writes to the stream is ``z`` times these, `z` being divided by `attn_scale` where that is.

        They are the output projections, or what a norm after attention makes of them but for its scale.
        """
        return self._normed("attn_out", layer, self.W_O(layer))

    def neuron_weights(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """What each neuron writes to the stream is its activation times these, as `head_weights` are for heads.

        Activations are divided by `mlp_scale` where that is.

        Raises:
            ValueError: If neurons cannot be told apart.
        """
        return self._normed("mlp_out", layer, self.W_out(layer))

    def _normed(
        self, name: NormName, layer: int, weight: Float[Tensor, "*writer d_model"]
    ) -> Float[Tensor, "*writer d_model"]:
        """What a norm, if there is one, makes of rows of weights, but for its scale."""
        norm = self.norm(name, layer)
        return weight if norm is None else norm.frozen(weight.new_ones(1, 1)).without_scale(weight)

    @property
    def has_norm(self) -> bool:
        """Whether the model normalises what is read."""
        return self.adapter.norm("attn_in", 0) is not None or self.adapter.norm("final", 0) is not None

    @property
    def has_attn_scale(self) -> bool:
        """Whether there is a norm between the heads and the stream (site ``attn_scale``)."""
        return self.adapter.norm("attn_out", 0) is not None

    @property
    def has_mlp_scale(self) -> bool:
        """Whether there is a norm between the MLP and the stream (site ``mlp_scale``)."""
        return self.adapter.norm("mlp_out", 0) is not None

    def attn_reader(self, layer: int) -> NormLayer | None:
        """The norm through which queries, keys and values read the stream; None where they read it as it is."""
        return self.norm("attn_in", layer)

    def norm(self, name: NormName, layer: int) -> NormLayer | None:
        """A norm: before attention, after it, before the MLP, after it, or before the unembedding; None if absent."""
        norm = self.adapter.norm(name, layer)
        return None if norm is None else norm.to(self.device)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, in float32 or better (a view where it already is)."""
        return self._here(self.adapter.W_U())

    def W_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """What each MLP neuron writes to the residual stream, in float32 or better.

        Raises:
            ValueError: If neurons cannot be told apart.
        """
        weight = self.adapter.W_out(layer)
        if weight is None:
            raise ValueError(f"Neurons of {self.name} cannot be told apart: layer {layer} is no plain MLP (experts?).")
        return self._here(weight)

    def per_head(self, values: Shaped[Tensor, "*pos kv_head d_head"]) -> Shaped[Tensor, "*pos head d_head"]:
        """Keys or values, repeated for the query heads that share them unless they are already."""
        return values.repeat_interleave(self.n_heads // values.shape[-2], dim=-2)

    @property
    def scale_sites(self) -> list[Site]:
        """The frozen scales that linearising the norms after a sublayer needs."""
        sites: list[Site] = [] if self.adapter.norm("final", 0) is None else [("final_scale", 0)]
        if self.has_attn_scale:
            sites += [("attn_scale", layer) for layer in range(self.n_layers)]
        return sites

    def final_norm(self, scale: Float[Tensor, "pos 1"] | None) -> Norm | None:
        """The norm before the unembedding, at its scale on one prompt; None where the model has none."""
        norm = None if scale is None else self.norm("final", 0)
        return None if norm is None or scale is None else norm.frozen(scale)

    def attn_norm(self, layer: int, scale: Float[Tensor, "pos 1"] | None) -> Norm | None:
        """The norm between the heads' outputs and the stream (Gemma 2, OLMo 2); None in most models."""
        norm = None if scale is None else self.norm("attn_out", layer)
        return None if norm is None or scale is None else norm.frozen(scale)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """While open, nothing changes the model: its weights are looked through once, and runs can be made ahead."""
        if self._unchanged:
            yield
            return
        self._unchanged.append(_Unchanged(self.fingerprint()))
        try:
            yield
        finally:
            self._unchanged.clear()

    @cached_property
    def _unchanged(self) -> list["_Unchanged"]:
        """What is known of the model while `unchanged` is open; else nothing."""
        return []

    def fingerprint(self) -> str:
        """A short hash of the architecture and of all weights: the same model, or another.

        It is made of the float32 values, so that a model is the same after it was converted to a wider type.
        Folded weights are another model: their contributions to the stream are other vectors. Looking through
        all weights takes about as long as a forward pass on a short prompt; nothing cheaper notices every edit.

        Raises:
            ValueError: If a weight is NaN or infinite, naming the first.
        """
        if self._unchanged:
            return self._unchanged[0].fingerprint
        digest = hashlib.sha256()
        shape = (self.n_layers, self.n_heads, self.n_kv_heads, self.d_model, self.d_mlp, self.d_vocab)
        digest.update(json.dumps([*shape, self.adapter.behaviour()], sort_keys=True).encode())
        norms = {name: self.adapter.norm(name, 0) for name in get_args(NormName)}
        kinds = {name: None if norm is None else (norm.centred, norm.eps) for name, norm in norms.items()}
        digest.update(json.dumps(kinds, sort_keys=True).encode())
        for name, weight in self.adapter.weights():
            if weight is None or ((weight.dim() == 1 or ".b_" in name) and not weight.any()):
                continue  # a bias that is zero may not be there at all
            total = 0
            for part in weight.detach().split(max(1, 2**17 * len(weight) // weight.numel())):
                part = part.float()  # a sum makes a copy in a wider type
                if not part.sum().isfinite() and not part.isfinite().all():
                    raise ValueError(f"`model` must have finite weights, got NaN or infinite in {_weight_name(name)}.")
                # sums of integers do not depend on the order in which a machine adds them up
                total += int(part.contiguous().view(torch.int32).sum())
            digest.update(f"{name} {total}".encode() + _sample(weight).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class _Unchanged:
    """What is known of a model while nothing changes it.

    Attributes:
        fingerprint: Its fingerprint.
        runs: Logits and values of prompts that were run ahead.
    """

    fingerprint: str
    runs: dict[tuple[int, ...], tuple[Tensor, dict[Site, Tensor]]] = field(default_factory=dict)


def _sample(weight: Tensor) -> Float[Tensor, " some"]:
    """Some of the numbers in a tensor, by their places, whatever the order in memory."""
    n = weight.numel()
    places = torch.arange(0, n, max(1, n // 16), device=weight.device)[:17]
    return weight.detach()[torch.unravel_index(places, weight.shape)].float()


def _weight_name(name: str) -> str:
    """Where a weight is, in words."""
    parts = name.split(".", 2)
    return f"{parts[2]} of layer {parts[1]}" if parts[0] == "blocks" else name


def _edited(value: Tensor, edit: Edit, name: str, layer: int) -> Tensor:
    require_sound(value, name, layer)
    return edit(value)


def _instead(value: Tensor, made: Tensor) -> Tensor:
    return made.to(value)


def _as_ids(prompt: object) -> Tensor:
    if isinstance(prompt, Sequence) and any(isinstance(each, str | Sequence) for each in prompt):
        raise ValueError(
            f"`prompt` must be one prompt here, got a list of {len(prompt)}. `td.density` takes several, and a "
            "`td.Task` holds several for the component graph."
        )
    try:
        return torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "`prompt` must be text, a list of token ids or a [pos] integer tensor, "
            f"got a {type(prompt).__name__} that is none of them."
        ) from error


def _text(tokenizer: Any, token: int) -> str:
    """The text of one token, its leading space kept.

    Tokenizers that drop it (SentencePiece's kind) show it in the token's own name, as U+2581.
    """
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    name = tokenizer.convert_ids_to_tokens(token)
    if isinstance(name, str) and name.startswith("▁") and not text.startswith(" "):
        text = " " + text
    return text
