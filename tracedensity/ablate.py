"""Ablation: what the parts of a model write to the stream, and what they write instead when they are ablated."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.model import Site, Transformer, full_precision
from tracedensity.task import Examples

N_RESAMPLED = 8
"""How many prompts with drawn tokens stand in for the counterfactual at least."""


@dataclass(frozen=True, eq=False)
class Written:
    """What writers write to the stream, in factors: a head writes ``z`` times its `Transformer.head_weights`.

    A neuron writes ``post`` times its `Transformer.neuron_weights`.

    Axes are 1 where nothing depends on them.

    Attributes:
        embed: The token embedding, without positions.
        z: Per layer, attention-weighted values of each head; divided by the scale of the norm after attention, if any.
        mlp_out: Per layer, the output of the MLP; empty without MLPs.
        post: Per layer, activations of its neurons, divided by the scale of the norm after the MLP, if any; empty if
            they were not asked for.
    """

    embed: Float[Tensor, "#example #pos d_model"]
    z: tuple[Float[Tensor, "#example #pos head d_head"], ...]
    mlp_out: tuple[Float[Tensor, "#example #pos d_model"], ...]
    post: tuple[Float[Tensor, "#example #pos d_mlp"], ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> "Written":
        """The same with every tensor changed."""
        return Written(
            function(self.embed),
            tuple(function(each) for each in self.z),
            tuple(function(each) for each in self.mlp_out),
            tuple(function(each) for each in self.post),
        )

    def minus(self, other: "Written") -> "Written":
        """The difference, factor by factor: what a head writes is linear in its factor."""
        return self._with(other, lambda here, there: here - there)

    def plus(self, other: "Written") -> "Written":
        """The sum, factor by factor."""
        return self._with(other, lambda here, there: here + there)

    def _with(self, other: "Written", function: Callable[[Tensor, Tensor], Tensor]) -> "Written":
        others = iter([other.embed, *other.z, *other.mlp_out, *other.post])
        return self.map(lambda value: function(value, next(others)))

    def at(self, row: Int[Tensor, " token"], pos: Int[Tensor, " token"]) -> "Written":
        """What is written at some tokens, as so many examples of one token each."""

        def chosen(value: Tensor) -> Tensor:
            rows = row if len(value) > 1 else torch.zeros_like(row)
            places = pos if value.shape[1] > 1 else torch.zeros_like(pos)
            return value[rows, places][:, None]

        return self.map(chosen)

    def vectors(self, model: Transformer) -> Float[Tensor, "writer token d_model"]:
        """What each writer, head by head, writes at the tokens of `at`."""
        per_layer = model.n_heads + bool(self.mlp_out)
        vectors = self.embed.new_empty(1 + model.n_layers * per_layer, len(self.embed), model.d_model)
        vectors[0] = self.embed[:, 0]
        for layer, z in enumerate(self.z):
            start = 1 + layer * per_layer
            heads = vectors[start : start + model.n_heads]
            torch.bmm(z[:, 0].transpose(0, 1), model.head_weights(layer).to(z.dtype), out=heads)
            if self.mlp_out:
                vectors[start + model.n_heads] = self.mlp_out[layer][:, 0]
        return vectors


Ablated = Callable[[slice], Written]
"""What ablated writers write, for some of the examples."""

Carried = Mapping[Site, Tensor]
"""What ablated edges of the token graph carry, by the site where they are added up; axes are 1 where nothing depends on
them.

Heads carry values ``v`` ``[#example, #pos, head, d_head]`` times a weight: that of the run itself, or ``pattern``
``[#example, head, dest, src]`` where there is one. Then ``mlp_out``, or ``post`` of neurons, ``skip_attn`` and
``skip_mlp``. What is missing is zero.
"""


def written(
    model: Transformer, examples: Examples, *, corrupted: bool = False, neurons: bool = False
) -> tuple[Written, Float[Tensor, "example d_vocab"]]:
    """What every writer writes in a plain run, in float32 or better, and the logits.

    Args:
        model: The model.
        examples: The prompts.
        corrupted: Whether the corrupted prompts are run, or the clean ones.
        neurons: Whether activations of neurons are wanted as well.

    Raises:
        ValueError: If a value in the model is not finite, or neurons cannot be told apart.
    """
    tokens = examples.corrupted if corrupted else examples.tokens
    assert tokens is not None
    held: dict[Site, Tensor] = {}

    def hold(value: Tensor, site: Site) -> None:
        held[site] = full_precision(value)

    if neurons:
        model.W_out(0)  # raises where neurons cannot be told apart
    readers = {site: partial(hold, site=site) for site in writing_sites(model, neurons)}
    logits = model.observe(tokens, readers, examples.last)
    return as_written(model, held), logits


def writing_sites(model: Transformer, neurons: bool) -> list[Site]:
    """Where to look for what writers write."""
    names = ["z", *(["attn_scale"] if model.has_attn_scale else [])]
    if model.has_mlp:
        names += ["mlp_out", *(["post"] if neurons else [])]
        names += ["mlp_scale"] if neurons and model.has_mlp_scale else []
    return [("embed", 0), *((name, layer) for layer in range(model.n_layers) for name in names)]


def as_written(model: Transformer, held: Mapping[Site, Tensor]) -> Written:
    """What was seen at these sites."""

    def layers(name: str) -> tuple[Tensor, ...]:
        return tuple(held[name, layer] for layer in range(model.n_layers) if (name, layer) in held)

    z = layers("z")
    if model.has_attn_scale:
        z = tuple(each / scale[..., None] for each, scale in zip(z, layers("attn_scale"), strict=True))
    post = layers("post")
    if post and model.has_mlp_scale:
        post = tuple(each / scale for each, scale in zip(post, layers("mlp_scale"), strict=True))
    return Written(held["embed", 0], z, layers("mlp_out"), post)


def ablated_values(
    model: Transformer, examples: Examples, ablation: str, *, n_at_once: int, neurons: bool = False
) -> Ablated:
    """What ablated writers write.

    Args:
        model: The model.
        examples: All examples of the task.
        ablation: ``"counterfactual"``: what they write on the corrupted prompt; ``"zero"``; ``"mean"``: their mean
            over all tokens of all clean prompts; ``"mean-positional"``: over the clean prompts, token by token.
        n_at_once: Examples per forward pass.
        neurons: Whether activations of neurons are wanted as well.

    Returns:
        A function of a slice of the examples.

    Raises:
        ValueError: If there is no such ablation, or it needs corrupted prompts and there are none.
    """
    if ablation == "counterfactual":
        if examples.corrupted is None:
            raise ValueError(
                "`ablation` must be 'resample', 'zero', 'mean' or 'mean-positional' for prompts without a corrupted "
                "counterpart, got 'counterfactual'. Give the task `corrupted` prompts."
            )
        return lambda part: written(model, examples[part], corrupted=True, neurons=neurons)[0]
    if ablation == "zero":
        one, _ = written(model, examples[:1], neurons=neurons)
        zero = one.map(lambda value: value.new_zeros(1, 1, *value.shape[2:]))
        return lambda part: zero
    if ablation == "mean-positional" and len(examples) == 1:
        raise ValueError(
            "`ablation` must not be 'mean-positional' for a single prompt, which is its own mean at every token: "
            "nothing would be ablated. Give several prompts, or use 'mean' or 'resample'."
        )
    if ablation in ("mean", "mean-positional"):
        mean = _mean(model, examples, n_at_once, neurons, by_position=ablation == "mean-positional")
        return lambda part: mean
    raise ValueError(
        "`ablation` must be one of 'counterfactual', 'resample', 'zero', 'mean' and 'mean-positional', "
        f"got {ablation!r}."
    )


def _mean(model: Transformer, examples: Examples, n_at_once: int, neurons: bool, by_position: bool) -> Written:
    axes = (0,) if by_position else (0, 1)
    total: Written | None = None
    for part in examples.parts(n_at_once):
        real = examples[part].real

        def summed(value: Tensor, real: Tensor = real) -> Tensor:
            weights = real.view(*real.shape, *[1] * (value.dim() - 2))
            return (value * weights).double().sum(axes, keepdim=True)

        some = written(model, examples[part], neurons=neurons)[0].map(summed)
        total = some if total is None else total.plus(some)
    assert total is not None
    count = examples.real.sum(axes, keepdim=True).clamp(min=1)
    return total.map(lambda value: (value / count.view(*count.shape, *[1] * (value.dim() - 2))).to(model.full_dtype))


def carried(model: Transformer, examples: Examples, ablation: str, *, neurons: bool = False) -> Carried:
    """What ablated edges of the token graph carry, on one prompt.

    Args:
        model: The model.
        examples: The prompt; for ``"resample"`` several times, with tokens drawn at random for corrupted ones.
        ablation: ``"zero"``; ``"mean"``: what an average token of the prompt would bring, the attention of the run
            being kept; ``"resample"``: what the edge carries on the prompts with drawn tokens.
        neurons: Whether MLPs are ablated neuron by neuron.
    """
    if ablation == "zero":
        return {}
    names = ["resid_pre", "v", *(["pattern"] if ablation == "resample" else [])]
    if model.has_mlp:
        names += ["resid_mid", "post" if neurons else "mlp_out"]
    held: dict[Site, Tensor] = {}

    def hold(value: Tensor, site: Site) -> None:
        name, layer = site
        value = full_precision(value)
        if name == "v":
            value = model.per_head(value)
        if ablation == "mean":
            value = value.double().mean(1, keepdim=True).to(value.dtype)
        held[{"resid_pre": "skip_attn", "resid_mid": "skip_mlp"}.get(name, name), layer] = value

    sites: Iterator[Site] = ((name, layer) for layer in range(model.n_layers) for name in names)
    tokens = examples.tokens if ablation == "mean" else examples.corrupted
    assert tokens is not None
    model.observe(tokens, {site: partial(hold, site=site) for site in sites}, examples.last)
    return held


def resampled(model: Transformer, examples: Examples, seed: int) -> Examples:
    """The examples with corrupted prompts of tokens drawn at random, each prompt often enough for `N_RESAMPLED` rows.

    Tokens are drawn uniformly from the vocabulary; special tokens are neither drawn nor replaced.
    """
    times = -(-N_RESAMPLED // len(examples))
    rows = torch.arange(len(examples), device=model.device).repeat_interleave(times)
    many = examples[rows]
    special = _special_tokens(model)
    pool = ordinary_tokens(model)
    generator = torch.Generator().manual_seed(seed)
    drawn = pool[torch.randint(len(pool), tuple(many.tokens.shape), generator=generator)].to(model.device)
    keep = torch.isin(many.tokens, torch.tensor(special, device=model.device, dtype=torch.long)) | ~many.real
    return replace(many, corrupted=torch.where(keep, many.tokens, drawn))


def ordinary_tokens(model: Transformer) -> Int[Tensor, " token"]:
    """All tokens but the special ones."""
    ordinary = torch.ones(model.d_vocab, dtype=torch.bool)
    ordinary[[token for token in _special_tokens(model) if token < model.d_vocab]] = False
    return ordinary.nonzero()[:, 0]


def _special_tokens(model: Transformer) -> list[int]:
    return sorted(set(getattr(model.model.tokenizer, "all_special_ids", [])))
