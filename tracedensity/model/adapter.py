"""What the library needs to be told about a class of models."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.model.norm import NormLayer
from tracedensity.model.place import Place, Point, Visit, has_guests
from tracedensity.model.spread import at_hand, memory_of

Site: TypeAlias = tuple[str, int]
"""A value inside the model: its name and its layer.

Of the stream: ``embed``, without positions; ``resid_pre``, ``resid_mid``, ``resid_post``; ``attn_out`` and ``mlp_out``,
what sublayers add to it, ``skip_attn`` and ``skip_mlp``, what the connections around them do; ``mlp_in``, what the MLP
reads of it, before its norm; ``final_in``, what the unembedding reads, before its norm.

Of heads: ``q``, ``z`` ``[batch, pos, head, d_head]``; ``k``, ``v`` ``[batch, pos, kv_head, d_head]``; ``pattern``
``[batch, head, dest, src]``. Of neurons ``[batch, pos, d_mlp]``: ``pre``, ``post``, and of gated MLPs ``pre_linear``.

Of no value but of work: ``mlp_idle``, whose edit is given what the MLP reads, and gives booleans ``[batch, pos]``, true
where what it makes is not wanted; it is zero there, or not, as is quicker. ``attn_idle``, whose edit is given what
attention reads, and gives booleans ``[batch, pos]``, true where heads bring nothing; if it is asked, the edit of
``pattern`` is given what is `Attended`.

What norms divide by ``[batch, pos, 1]``: ``attn_in_scale``, ``attn_scale`` (between heads and stream),
``mlp_in_scale``, ``mlp_scale`` (between MLP and stream), ``final_scale``.
"""

NormName: TypeAlias = Literal["attn_in", "attn_out", "mlp_in", "mlp_out", "final"]

SCALES = {"attn_in": "attn_in_scale", "attn_out": "attn_scale", "mlp_in": "mlp_in_scale", "mlp_out": "mlp_scale"}
"""What the norms of a block divide by, as sites."""


@dataclass(frozen=True)
class Shape:
    """What a model is like.

    Attributes:
        n_kv_heads: Number of key/value heads; fewer than `n_heads` with grouped-query attention.
        has_mlp: False for attention-only models.
        parallel: Whether attention and MLP of a block read the same stream.
        positions: How tokens get their positions, in TransformerLens' words.
        d_mlp: Neurons per MLP; 0 where there is none.
    """

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
    parallel: bool
    positions: str


@runtime_checkable  # so that test runs can check annotations
class Adapter(Protocol):
    """A class of models: where its values are, and what its weights are called.

    Weights are as they are stored, in whatever dtype; names of layers count from zero.
    """

    model: Any

    @property
    def kind(self) -> str:
        """The name of the class."""
        ...

    def shape(self) -> Shape: ...

    def state(self) -> object:
        """Whatever may change in a model, beside its weights, how it computes."""
        ...

    def processed(self) -> str:
        """What was done to the weights, in words."""
        ...

    def place(self, name: str, layer: int) -> Place | None:
        """Where the value at a site is; None where the model has no such value."""
        ...

    def skip_attn(self, layer: int, edit: Callable[[Tensor], Tensor]) -> "list[Visiting]":
        """How what the connection around attention carries is edited."""
        ...

    def scales(self) -> Iterator[Site]:
        """What norms divide by, of all norms that the stream or a sublayer's output goes through."""
        ...

    def run(
        self, tokens: Int[Tensor, "batch pos"], end: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run the model up to the unembedding; what the last block makes goes through `end`."""
        ...

    def predicted(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits as the model itself gives them."""
        ...

    def unembedded(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of what `run` returns: the last norm, the unembedding, and what the model does to logits."""
        ...

    def ungrouped(self) -> AbstractContextManager[None]:
        """While open, attention takes keys and values that come one per query head.

        Raises:
            ValueError: If it cannot.
        """
        ...

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules that take part in a run."""
        ...

    def forgetting(self) -> AbstractContextManager[None]:
        """While open, the model keeps nothing of a run beyond it; what it had kept is there afterwards."""
        ...

    @property
    def counts_ungrouped(self) -> bool:
        """Whether it does so already, by a flag of the user's."""
        ...

    def attention(self, layer: int) -> torch.nn.Module: ...

    def norm(self, name: NormName, layer: int) -> NormLayer | None:
        """A norm: before attention, after it, before the MLP, after it, or before the unembedding; None if absent."""
        ...

    def projection(self, name: str, layer: int) -> tuple[Float[Tensor, "head d_model d_head"], Tensor | None]:
        """Weights and biases ``[head, d_head]`` of queries, keys or values: one head per key/value head."""
        ...

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]: ...

    def W_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"] | None:
        """What neurons write; None where the MLP is no plain one."""
        ...

    def W_U(self) -> Float[Tensor, "d_model d_vocab"]: ...

    def activation(self, layer: int) -> Callable[[Tensor], Tensor] | None:
        """The function that makes ``post`` of ``pre``, but for a gated MLP's other factor."""
        ...

    def gated(self, layer: int) -> bool: ...

    def guests_of_reading(self) -> Iterator[str]:
        """Names of hooks of the user's between the stream and the queries, keys and values."""
        ...

    def guests_of_groups(self) -> Iterator[str]:
        """Names of hooks of the user's that see one key or value per group."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """All weights; those that every class has under names, and in shapes, that are the same for every class."""
        ...

    def behaviour(self) -> dict[str, object]:
        """What changes the outputs beside weights and shape, in terms that are the same for every class."""
        ...


@dataclass(frozen=True, eq=False)
class Visiting:
    """A visit to be made in a run.

    Attributes:
        place: Where.
        visit: What is done there.
        turn: When, among visits at one place: 0 to make a sum anew, 1 to edit a value, 2 to keep it as a term.
        first: Whether it comes before what hooks of the user's do there.
    """

    place: Place
    visit: Visit
    turn: int = 1
    first: bool = False


def norm_of(scale: str) -> str:
    """The norm of a block whose scale a site is."""
    return next(norm for norm, name in SCALES.items() if name == scale)


def guests(model: Any, names: Sequence[str]) -> Iterator[str]:
    """Hook points in blocks at which hooks of the user's are, by their full names."""
    for layer in range(len(model.blocks)):
        for name in (f"blocks.{layer}.{each}" for each in names):
            point = model.hook_dict.get(name)
            if point is not None and has_guests(point):
                yield name


def guests_at_end(model: Any) -> Iterator[str]:
    """Hook points behind the last block at which hooks of the user's are."""
    for part in ("ln_final", "unembed"):
        for point in model._modules[part].modules() if part in model._modules else ():
            if hasattr(point, "fwd_hooks") and has_guests(point):
                yield str(point.name)


def coupled(name: str, layer: int) -> ValueError:
    """Why keys cannot be ungrouped where they go through a norm together."""
    return ValueError(
        f"`ungroup` must be left out for {name}: in layer {layer} one norm makes the keys of all heads depend on one "
        "another."
    )


def named_weights(
    adapter: Adapter, others: Iterable[tuple[str, Tensor | None]], behind: Iterable[torch.nn.Module | None]
) -> Iterator[tuple[str, Tensor | None]]:
    """All weights of a model: those that are asked for by the names of this protocol, then others, then the rest.

    Args:
        adapter: The model.
        others: Weights that have no name in the protocol.
        behind: Modules whose weights are among these in another form: norms and scaled embeddings.
    """
    covered = {memory_of(each) for module in behind if module is not None for each in module.parameters()}
    # looked up first: weights that are kept on disk are others each time they have been read
    rest = [
        (module, path, name, None if weight.is_meta else memory_of(weight))
        for path, module in adapter.model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if memory_of(weight) not in covered
    ]

    def known() -> Iterator[tuple[str, Tensor | None]]:
        n_layers = len(adapter.model.blocks)
        for layer in range(n_layers):
            for name in "qkv":
                weight, bias = adapter.projection(name, layer)
                yield f"blocks.{layer}.attn.W_{name.upper()}", weight
                yield f"blocks.{layer}.attn.b_{name.upper()}", bias
            yield f"blocks.{layer}.attn.W_O", adapter.W_O(layer)
        for layer, which in [*product(range(n_layers), get_args(NormName)[:-1]), (0, "final")]:
            norm = adapter.norm(which, layer)
            name = "final.norm" if which == "final" else f"blocks.{layer}.{which}.norm"
            yield f"{name}.weight", None if norm is None else norm.weight
            yield f"{name}.bias", None if norm is None else norm.bias
        yield "unembed.W_U", adapter.W_U()
        yield from others

    for name, weight in known():
        if weight is not None:
            covered.add(memory_of(weight))
        yield name, weight
    for module, path, name, storage in rest:
        if storage not in covered:
            with at_hand(module):
                weight = getattr(module, name)
            yield f"{path}.{name}", weight


def remade(before: Place, branch: Place, after: Place, edit: Callable[[Tensor], Tensor]) -> list[Visiting]:
    """Edits what the connection around a sublayer carries, by making the sum of both anew from its two terms.

    Adding and subtracting the first term from the sum would lose digits to rounding.
    """
    terms: dict[str, Tensor] = {}
    alone = isinstance(after, Point) and not has_guests(after.point)

    def keep(name: str) -> Visit:
        return lambda value: terms.__setitem__(name, value)

    def replace(value: Tensor) -> Tensor:
        skip, branch = terms.pop("skip"), terms.pop("branch")
        if (edited := edit(skip)) is skip:
            return value
        if alone:
            return edited + branch
        by_user = value - (skip + branch)  # what a hook of the user's has changed of the sum before us
        return edited + branch + by_user

    return [
        Visiting(after, replace, turn=0),
        Visiting(before, keep("skip"), turn=2),
        Visiting(branch, keep("branch"), turn=2),
    ]
