"""Activations: what each head, neuron and sublayer of a model holds while it reads one prompt."""

import html
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias, cast, get_args

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.model import Prompt, Site, Transformer, as_transformer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pandas import DataFrame
    from plotly.graph_objects import Figure

    from tracedensity.plot import Theme

Quantity: TypeAlias = Literal[
    "resid_pre", "pattern", "value", "z", "attn_out", "resid_mid", "pre", "post", "mlp_out", "resid_post"
]
"""What `capture` can keep."""

Derived: TypeAlias = Literal["output", "head_norm", "neuron_norm"]
"""What is computed from a captured quantity when it is asked for."""

Index: TypeAlias = SupportsIndex | Sequence[int] | None
"""One entry of an axis (the axis is dropped), several (it stays), or None for all of them."""

_AXES = {
    "resid_pre": "layer pos d_model",
    "pattern": "layer head dest src",
    "value": "layer pos head d_head",
    "z": "layer pos head d_head",
    "attn_out": "layer pos d_model",
    "resid_mid": "layer pos d_model",
    "pre": "layer pos d_mlp",
    "post": "layer pos d_mlp",
    "mlp_out": "layer pos d_model",
    "resid_post": "layer pos d_model",
    "output": "layer pos head d_model",
    "head_norm": "layer pos head",
    "neuron_norm": "layer pos d_mlp",
}
_SOURCE: dict[str, Quantity] = {"output": "z", "head_norm": "z", "neuron_norm": "post"}
_SITE_NAMES = {"value": "v"}
_OF_NEURONS = ("pre", "post")
_OF_MLPS = (*_OF_NEURONS, "mlp_out")


@dataclass(frozen=True, eq=False, repr=False)
class Activations:
    """What one forward pass over one prompt left inside the model; made by `capture`.

    Raw values keep the model's dtype and device, and are detached. Everything computed from them
    (`output`, norms) is float32 or better, made when asked for and not kept, from the weights that
    the model has then.

    Attributes:
        transformer: The model that was run.
        tokens: Token ids of the prompt, up to the position that is explained.
        logits: What the model predicts at the last of them.
        layers: The layers that were captured, ascending; the `layer` axis of every tensor follows it.
        values: The captured tensors. The attributes `z`, `pattern`, ... read them; `get` slices them.
    """

    transformer: Transformer
    tokens: Int[Tensor, " pos"]
    logits: Float[Tensor, " d_vocab"]
    layers: tuple[int, ...]
    values: Mapping[Quantity, Float[Tensor, "layer ..."]]
    # Scale of a norm between the heads and the stream, which their outputs need in models that have one.
    _attn_scales: Mapping[int, Float[Tensor, "pos 1"]] = field(default_factory=dict)

    def __repr__(self) -> str:
        kept = ", ".join(self.values)
        return (
            f"Activations({self.transformer.name}: {len(self.tokens)} tokens, {_layers_text(self.layers)}; "
            f"{kept}; {_bytes_text(float(self.nbytes))})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors here (the model's weights are the model's)."""
        tensors = [self.tokens, self.logits, *self.values.values(), *self._attn_scales.values()]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def texts(self) -> list[str]:
        """The text of each token; its id where the model has no tokenizer."""
        return self.transformer.texts(self.tokens)

    @property
    def prompt(self) -> str:
        """The text of the prompt, with its beginning-of-sequence token."""
        return self.transformer.text(self.tokens.tolist())

    # -- whole tensors ---------------------------------------------------------------------------

    @property
    def resid_pre(self) -> Float[Tensor, "layer pos d_model"]:
        """The residual stream before attention."""
        return self._held("resid_pre")

    @property
    def resid_mid(self) -> Float[Tensor, "layer pos d_model"]:
        """The residual stream between attention and MLP; `resid_post` in an attention-only model."""
        return self._held("resid_mid")

    @property
    def resid_post(self) -> Float[Tensor, "layer pos d_model"]:
        """The residual stream after the MLP."""
        return self._held("resid_post")

    @property
    def attn_out(self) -> Float[Tensor, "layer pos d_model"]:
        """What attention writes to the stream: all heads and the bias, after a norm where there is one."""
        return self._held("attn_out")

    @property
    def mlp_out(self) -> Float[Tensor, "layer pos d_model"]:
        """What the MLP writes to the stream: all neurons and the bias, after a norm where there is one."""
        return self._held("mlp_out")

    @property
    def pattern(self) -> Float[Tensor, "layer head dest src"]:
        """Attention weights, after the softmax: how much of `src` each head moves to `dest`."""
        return self._held("pattern")

    @property
    def value(self) -> Float[Tensor, "layer pos head d_head"]:
        """Value vectors; heads that share one (grouped-query attention) repeat it, in a copy."""
        return self.get("value")

    @property
    def z(self) -> Float[Tensor, "layer pos head d_head"]:
        """Values mixed by the pattern: what each head multiplies with its output weights."""
        return self._held("z")

    @property
    def pre(self) -> Float[Tensor, "layer pos d_mlp"]:
        """Neurons before the nonlinearity; in a gated MLP, the gate's half."""
        return self._held("pre")

    @property
    def post(self) -> Float[Tensor, "layer pos d_mlp"]:
        """Neurons as the output weights read them: after nonlinearity and gate."""
        return self._held("post")

    # -- parts -----------------------------------------------------------------------------------

    def get(
        self,
        quantity: Quantity | Derived,
        *,
        layer: Index = None,
        head: Index = None,
        position: Index = None,
        neuron: Index = None,
    ) -> Float[Tensor, "..."]:
        """Part of a quantity, captured or computed from a captured one.

        Each selector takes one index, which drops its axis, several, which keep it, or None for all.
        What is computed is computed for the selected part only:

        * ``"output"`` ``[layer pos head d_model]`` (from `z`): what each head writes to the residual stream,
          without the bias that belongs to no head. A norm between the heads and the stream (Gemma 2,
          OLMo 2) is linearised with its frozen scale, so that the outputs still sum to `attn_out`.
        * ``"head_norm"`` ``[layer pos head]`` (from `z`): L2 norm of that output.
        * ``"neuron_norm"`` ``[layer pos d_mlp]`` (from `post`): ``|post|`` times the L2 norm of the neuron's row of
          output weights. It is measured before a norm between the MLP and the stream: in models that have one,
          neurons compare within a layer and position only.

        Args:
            quantity: What to read; its axes are those of the attribute of that name.
            layer: In the model's own numbering, also when few layers were captured. -1 is the model's last.
            head: Query heads, also for `value`.
            position: Tokens of the prompt; of a pattern, the `dest` that attends. -1 is the last.
            neuron: For `pre`, `post` and `neuron_norm`.

        Raises:
            ValueError: If the quantity or layer was not captured, an index is out of range, a selector is
                for another kind of quantity, or ``"output"`` is asked for all layers and positions at once.
        """
        if quantity not in _AXES:
            raise ValueError(f"`quantity` must be one of {', '.join(_AXES)}, got {quantity!r}.")
        axes = _AXES[quantity].split()
        asked = {"layer": layer, "head": head, "pos": position, "d_mlp": neuron}
        if "dest" in axes:
            asked["dest"] = asked.pop("pos")
        for axis, index in asked.items():
            if index is not None and axis not in axes:
                raise ValueError(
                    f"`{_ARGUMENTS[axis]}` must be left out for {quantity!r}, whose axes are {', '.join(axes)}."
                )
        if quantity == "output" and not (_is_one(layer) or _is_one(position)):
            raise ValueError(
                "`layer` or `position` must be one number for 'output', a vector for each head at each position: "
                "all of them at once would fill the memory."
            )
        self._held(_SOURCE.get(quantity, cast(Quantity, quantity)))
        rows = {axis: self._rows(axis, asked[axis]) for axis in axes if axis in asked}
        if quantity == "output":
            values = self._outputs(rows["layer"], rows["pos"], rows["head"])
        elif quantity == "head_norm":
            values = self._head_norms(rows["layer"], rows["pos"], rows["head"])
        elif quantity == "neuron_norm":
            values = self._neuron_norms(rows["layer"], rows["pos"], rows["d_mlp"])
        else:
            values = self._select(quantity, rows)
        for dim in reversed(range(len(axes))):  # from the right, so that the dims still to come keep their number
            if _is_one(asked.get(axes[dim])):
                values = values.select(dim, 0)
        return values

    def head(self, name: str) -> "Head":
        """One attention head, by the name that the library gives it, such as ``"a3.h1"``."""
        layer, head = head_index(name)
        model = self.transformer
        if layer >= model.n_layers or head >= model.n_heads:
            last = head_name(model.n_layers - 1, model.n_heads - 1)
            raise ValueError(f"`name` must be a head of {model.name}, from a0.h0 to {last}, got {name!r}.")
        self._rows("layer", layer)
        return Head(self, layer, head)

    def mlp(self, name: str) -> "Mlp":
        """One MLP, by the name that the library gives it, such as ``"m3"``."""
        layer = mlp_index(name)
        model = self.transformer
        if layer >= model.n_layers or not model.has_mlp:
            has = f"from m0 to {mlp_name(model.n_layers - 1)}" if model.has_mlp else "which has attention only"
            raise ValueError(f"`name` must be an MLP of {model.name}, {has}, got {name!r}.")
        self._rows("layer", layer)
        return Mlp(self, layer)

    def top_heads(self, k: int = 10, *, position: int = -1) -> "Top":
        """The heads that write most: largest ``"head_norm"`` at one position, over the captured layers.

        A large vector need not matter for the prediction: it may be normalised away, or point where nothing
        reads. For what matters, see `attribute`.
        """
        norms = self.get("head_norm", position=position)
        return self._top(norms, k, position, "heads")

    def top_neurons(self, k: int = 10, *, position: int = -1) -> "Top":
        """The neurons that write most: largest ``"neuron_norm"`` at one position, over the captured layers.

        As with `top_heads`, a large vector need not matter for the prediction. Where the MLP's output is
        normalised before it joins the stream (Gemma 2, OLMo 2), layers do not compare: see `get`.
        """
        norms = self.get("neuron_norm", position=position)
        return self._top(norms, k, position, "neurons")

    def to_dataframe(
        self,
        kind: Literal["head", "neuron", "attention"] = "head",
        *,
        layer: Index = None,
        position: Index = None,
    ) -> "DataFrame":
        """A long table, one row per observation, in the order of its first columns.

        Args:
            kind: ``"head"``: one row per layer, head and position, with the norm of what is written (needs `z`).
                ``"neuron"``: one row per layer, neuron and position, with `post`, its norm, and `pre` if captured.
                ``"attention"``: one row per layer, head, `dest` and `src` not after it, with the weight (needs
                `pattern`).
            layer: Layers to take, as in `get`.
            position: Positions to take, as in `get`; the `dest` of an attention weight. Neurons are many:
                at all positions of a long prompt they make millions of rows.
        """
        if kind not in ("head", "neuron", "attention"):
            raise ValueError(f"`kind` must be 'head', 'neuron' or 'attention', got {kind!r}.")
        layers = [self.layers[row] for row in self._rows("layer", layer)]
        positions = self._rows("pos", position)
        heads, neurons = range(self.transformer.n_heads), range(self.transformer.d_mlp)
        texts = self.texts
        if kind == "neuron":
            norm = self.get("neuron_norm", layer=layers, position=positions)
            frame = _long_frame(layer=layers, neuron=neurons, position=positions)
            frame["token"] = [texts[i] for i in frame["position"]]
            for quantity in _OF_NEURONS:
                if quantity in self.values:
                    values = self.get(quantity, layer=layers, position=positions)
                    frame[quantity] = _column(values.transpose(1, 2))
            frame["norm"] = _column(norm.transpose(1, 2))
            return frame
        if kind == "head":
            norm = self.get("head_norm", layer=layers, position=positions)
            frame = _long_frame(layer=layers, head=heads, position=positions)
            frame["token"] = [texts[i] for i in frame["position"]]
            frame["norm"] = _column(norm.transpose(1, 2))
        else:
            pattern = self.get("pattern", layer=layers, position=positions)
            frame = _long_frame(layer=layers, head=heads, dest=positions, src=range(len(self.tokens)))
            frame["weight"] = _column(pattern)
            frame = frame.query("src <= dest").reset_index(drop=True)
            frame.insert(3, "dest_token", [texts[i] for i in frame["dest"]])
            frame.insert(5, "src_token", [texts[i] for i in frame["src"]])
        frame.insert(2, "name", [head_name(*pair) for pair in zip(frame["layer"], frame["head"], strict=True)])
        return frame

    def plot(self, heads: str | Sequence[str] | None = None, *, n: int = 6, theme: "Theme | str" = "light") -> "Figure":
        """Attention patterns of some heads, by default of those that write most: see `plot_attention`."""
        from tracedensity.plot import plot_attention

        return plot_attention(self, heads, n=n, theme=theme)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{_AXES[name]}</td><td>{', '.join(map(str, values.shape))}</td>"
            f"<td>{str(values.dtype).removeprefix('torch.')}</td></tr>"
            for name, values in self.values.items()
        )
        head = "".join(f"<th>{name}</th>" for name in ("quantity", "axes", "shape", "dtype"))
        return f"<p>{html.escape(repr(self))}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    # -- how -------------------------------------------------------------------------------------

    def _held(self, quantity: Quantity) -> Float[Tensor, "layer ..."]:
        if quantity not in self.values:
            kept = [*self.values, quantity]
            raise ValueError(
                f"`{quantity}` must be captured before it is read; held are {', '.join(self.values)}. "
                f"Capture again with keep={kept}."
            )
        return self.values[quantity]

    def _rows(self, axis: str, index: Index) -> list[int]:
        """Rows of an axis, none negative."""
        argument, size = _ARGUMENTS[axis], self._size(axis)
        if axis == "layer":
            if index is None:
                return list(range(len(self.layers)))
            layers = _in_range(argument, index, size)
            if missing := [layer for layer in layers if layer not in self.layers]:
                both = sorted({*self.layers, *missing})
                raise ValueError(
                    f"`layer` must be captured before it is read, got {missing}; held are {list(self.layers)}. "
                    f"Capture again with layers={both}."
                )
            return [self.layers.index(layer) for layer in layers]
        return list(range(size)) if index is None else _in_range(argument, index, size)

    def _size(self, axis: str) -> int:
        model = self.transformer
        n_tokens = len(self.tokens)
        sizes = {
            "layer": model.n_layers,
            "head": model.n_heads,
            "pos": n_tokens,
            "dest": n_tokens,
            "d_mlp": model.d_mlp,
        }
        return sizes[axis]

    def _select(self, quantity: str, rows: Mapping[str, list[int]]) -> Float[Tensor, "layer ..."]:
        values = self._held(cast(Quantity, quantity))
        for dim, axis in enumerate(_AXES[quantity].split()):
            index = rows.get(axis)
            if quantity == "value" and axis == "head" and values.shape[dim] != self.transformer.n_heads:
                shared = torch.arange(float(values.shape[dim]))[:, None]  # [kv_head, 1]: which one does each head use?
                kv_heads = self.transformer.per_head(shared)[:, 0].long().tolist()
                index = [kv_heads[head] for head in (range(len(kv_heads)) if index is None else index)]
            if index is None or index == list(range(values.shape[dim])):
                continue
            if len(index) == 1:  # a view, not a copy
                values = values.narrow(dim, index[0], 1)
            else:
                values = values.index_select(dim, torch.tensor(index, device=values.device))
        return values

    def _outputs(
        self, layers: list[int], positions: list[int], heads: list[int]
    ) -> Float[Tensor, "layer pos head d_model"]:
        return torch.stack([self._layer_outputs(row, positions, heads, self._W_O(row)[heads]) for row in layers])

    def _head_norms(self, layers: list[int], positions: list[int], heads: list[int]) -> Float[Tensor, "layer pos head"]:
        # One head at a time: the outputs of a layer, [pos head d_model], may be a gigabyte of a large model.
        norms = []
        for row in layers:
            W_O = self._W_O(row)
            outputs = (self._layer_outputs(row, positions, [head], W_O[head : head + 1]) for head in heads)
            norms.append(torch.cat([output.norm(dim=-1) for output in outputs], dim=-1))
        return torch.stack(norms)

    def _layer_outputs(
        self, row: int, positions: list[int], heads: list[int], W_O: Float[Tensor, "head d_head d_model"]
    ) -> Float[Tensor, "pos head d_model"]:
        layer = self.layers[row]
        z = self._select("z", {"layer": [row], "pos": positions, "head": heads})[0]
        outputs = einsum(z.to(W_O), W_O, "pos head d_head, head d_head d_model -> pos head d_model")
        norm = self.transformer.attn_norm(layer, self._attn_scales.get(layer))
        if norm is not None:
            outputs = norm.without_scale(outputs) / norm.scale[positions][:, None]
        return outputs

    def _neuron_norms(
        self, layers: list[int], positions: list[int], neurons: list[int]
    ) -> Float[Tensor, "layer pos d_mlp"]:
        norms = []
        for row in layers:
            post = self._select("post", {"layer": [row], "pos": positions, "d_mlp": neurons})[0]
            rows = self.transformer.W_out(self.layers[row]).norm(dim=-1).to(post.device)
            norms.append(post.abs() * rows[neurons])
        return torch.stack(norms)

    def _W_O(self, row: int) -> Float[Tensor, "head d_head d_model"]:
        return self.transformer.W_O(self.layers[row]).to(self.tokens.device)

    def _top(
        self, norms: Float[Tensor, "layer index"], k: int, position: int, kind: Literal["heads", "neurons"]
    ) -> "Top":
        if not 1 <= k <= norms.numel():
            raise ValueError(f"`k` must be from 1 to {norms.numel()}, the number of {kind} captured, got {k}.")
        order = norms.flatten().argsort(descending=True, stable=True)[:k]
        layer = torch.tensor(self.layers, device=order.device)[order // norms.shape[1]]
        index = order % norms.shape[1]
        at = position % len(self.tokens)
        return Top(kind, layer, index, norms.flatten()[order], at, self.texts[at])


@dataclass(frozen=True, eq=False)
class Head:
    """One attention head on one prompt: a view of `Activations` that copies nothing.

    Attributes:
        activations: What was captured.
        layer: The head's layer, from 0.
        head: The head's number in its layer, from 0.
    """

    activations: Activations = field(repr=False)
    layer: int
    head: int

    @property
    def name(self) -> str:
        return head_name(self.layer, self.head)

    @property
    def pattern(self) -> Float[Tensor, "dest src"]:
        """Attention weights, after the softmax."""
        return self.activations.get("pattern", layer=self.layer, head=self.head)

    @property
    def value(self) -> Float[Tensor, "pos d_head"]:
        """Value vectors, which other heads share in grouped-query attention."""
        return self.activations.get("value", layer=self.layer, head=self.head)

    @property
    def z(self) -> Float[Tensor, "pos d_head"]:
        """Values mixed by the pattern."""
        return self.activations.get("z", layer=self.layer, head=self.head)

    @property
    def output(self) -> Float[Tensor, "pos d_model"]:
        """What the head writes to the residual stream, computed at each use."""
        return self.activations.get("output", layer=self.layer, head=self.head)

    @property
    def norm(self) -> Float[Tensor, " pos"]:
        """L2 norm of what the head writes."""
        return self.activations.get("head_norm", layer=self.layer, head=self.head)


@dataclass(frozen=True, eq=False)
class Mlp:
    """One MLP on one prompt: a view of `Activations` that copies nothing.

    Attributes:
        activations: What was captured.
        layer: The MLP's layer, from 0.
    """

    activations: Activations = field(repr=False)
    layer: int

    @property
    def name(self) -> str:
        return mlp_name(self.layer)

    @property
    def pre(self) -> Float[Tensor, "pos d_mlp"]:
        """Neurons before the nonlinearity; in a gated MLP, the gate's half."""
        return self.activations.get("pre", layer=self.layer)

    @property
    def post(self) -> Float[Tensor, "pos d_mlp"]:
        """Neurons as the output weights read them."""
        return self.activations.get("post", layer=self.layer)

    @property
    def output(self) -> Float[Tensor, "pos d_model"]:
        """What the MLP writes to the residual stream: all neurons and the bias."""
        return self.activations.get("mlp_out", layer=self.layer)

    @property
    def norm(self) -> Float[Tensor, "pos d_mlp"]:
        """Norm of what each neuron writes: ``"neuron_norm"`` of `Activations.get`."""
        return self.activations.get("neuron_norm", layer=self.layer)


@dataclass(frozen=True, eq=False, repr=False)
class Top:
    """The heads or neurons that write most at one position, largest first.

    Attributes:
        kind: Which of the two.
        layer: Layer of each.
        index: Number of each in its layer.
        norm: L2 norm of what each writes to the residual stream.
        position: Where it was measured.
        token: The text of the token there.
    """

    kind: Literal["heads", "neurons"]
    layer: Int[Tensor, " top"]
    index: Int[Tensor, " top"]
    norm: Float[Tensor, " top"]
    position: int
    token: str

    @property
    def names(self) -> list[str]:
        name = head_name if self.kind == "heads" else neuron_name
        return [name(*pair) for pair in zip(self.layer.tolist(), self.index.tolist(), strict=True)]

    def __repr__(self) -> str:
        width = max(map(len, self.names))
        lines = [f"  {name:{width}}  {norm:.4g}" for name, norm in zip(self.names, self.norm.tolist(), strict=True)]
        return "\n".join([self._about, *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{norm:.4g}</td></tr>"
            for name, norm in zip(self.names, self.norm.tolist(), strict=True)
        )
        head = f"<tr><th>{self.kind}</th><th>L2 norm</th></tr>"
        return f"<p>{html.escape(self._about)}</p><table><thead>{head}</thead><tbody>{rows}</tbody></table>"

    @property
    def _about(self) -> str:
        return f"{self.kind} that write most at position {self.position} {self.token!r} (L2 norm):"

    def plot(self, *, theme: "Theme | str" = "light") -> "Figure":
        """Bars, the largest on top."""
        from tracedensity.plot import plot_top

        return plot_top(self, theme=theme)


def capture(
    model: object,
    prompt: Prompt,
    *,
    keep: Quantity | Collection[Quantity] | None = None,
    layers: Index = None,
    position: int = -1,
) -> Activations:
    """Run a model on one prompt and keep what happens inside.

    Args:
        model: A TransformerLens model or a name for `load_model`. It is left as it was.
        prompt: Text, a list of token ids, or a ``[pos]`` tensor of them.
        keep: The quantities to hold in memory: one name or several; None for all that the model has. Patterns grow
            with the square of the prompt. The logits of the last position are always held.
        layers: The layers to hold; None for all.
        position: The token whose prediction is of interest: what comes after it is not read.

    Raises:
        ValueError: If a quantity or layer does not exist, the prompt does not suit the model, or the model makes a
            value that is NaN or infinite, in any layer.
    """
    transformer = as_transformer(model)
    transformer.require_sequential("there is no stream between them to capture.")
    quantities = _quantities(keep, transformer)
    n_layers = transformer.n_layers
    rows = range(n_layers) if layers is None else sorted(set(_in_range("layers", layers, n_layers)))
    if not rows:
        raise ValueError("`layers` must name at least one layer, got none.")
    tokens = transformer.tokens(prompt, position).clone()  # may be a view of the user's own tensor
    values: dict[Quantity, Tensor] = {}
    scales: dict[int, Tensor] = {}

    def store(value: Tensor, quantity: Quantity, layer: int) -> None:
        if quantity not in values:  # made once and filled: a list of layers and their stack would be twice the memory
            shape = (len(rows), *value.shape[1:])
            values[quantity] = torch.empty(shape, dtype=value.dtype, device=tokens.device)
        values[quantity][rows.index(layer)] = value[0]

    def store_scale(value: Tensor, layer: int) -> None:
        scales[layer] = value[0].to(tokens.device, copy=True)

    readers: dict[Site, Callable[[Tensor], None]] = {}
    for layer in rows:
        for quantity in quantities:
            site = (_SITE_NAMES.get(quantity, quantity), layer)
            readers[site] = partial(store, quantity=quantity, layer=layer)
    if "z" in quantities:
        for name, layer in transformer.scale_sites:
            if name == "attn_scale" and layer in rows:
                readers[name, layer] = partial(store_scale, layer=layer)

    with torch.no_grad():
        logits = transformer.observe(tokens[None], readers)[0]
    return Activations(transformer, tokens, logits, tuple(rows), {name: values[name] for name in quantities}, scales)


def head_name(layer: int, head: int) -> str:
    """What the library calls an attention head; `head_index` reads it back."""
    return f"a{layer}.h{head}"


def head_index(name: str) -> tuple[int, int]:
    """Layer and number of the head of that name."""
    return cast(tuple[int, int], _parse(name, r"a(\d+)\.h(\d+)", "a head, such as 'a3.h1'"))


def mlp_name(layer: int) -> str:
    """What the library calls an MLP; `mlp_index` reads it back."""
    return f"m{layer}"


def mlp_index(name: str) -> int:
    """Layer of the MLP of that name."""
    return _parse(name, r"m(\d+)", "an MLP, such as 'm3'")[0]


def neuron_name(layer: int, neuron: int) -> str:
    """What the library calls an MLP neuron; `neuron_index` reads it back."""
    return f"m{layer}.n{neuron}"


def neuron_index(name: str) -> tuple[int, int]:
    """Layer and number of the neuron of that name."""
    return cast(tuple[int, int], _parse(name, r"m(\d+)\.n(\d+)", "a neuron, such as 'm3.n17'"))


_ARGUMENTS = {"layer": "layer", "head": "head", "pos": "position", "dest": "position", "d_mlp": "neuron"}


def _parse(name: str, pattern: str, meaning: str) -> tuple[int, ...]:
    match = re.fullmatch(pattern, name)
    if match is None:
        raise ValueError(f"`name` must be that of {meaning}, got {name!r}.")
    return tuple(int(number) for number in match.groups())


def _quantities(keep: Quantity | Collection[Quantity] | None, transformer: Transformer) -> list[Quantity]:
    """The quantities to keep, in the order in which a layer makes them."""
    known = get_args(Quantity)
    if keep is None:
        lacks = _OF_MLPS if not transformer.has_mlp else () if _has_neurons(transformer) else _OF_NEURONS
        return [name for name in known if name not in lacks]
    names = {keep} if isinstance(keep, str) else set(keep)
    if unknown := sorted(names.difference(known)):
        hints = [f" {name!r} is computed from {_SOURCE[name]!r}." for name in unknown if name in _SOURCE]
        raise ValueError(f"`keep` must be among {', '.join(known)}, got {', '.join(unknown)}.{''.join(hints)}")
    if not names:
        raise ValueError(f"`keep` must name at least one of {', '.join(known)}, got none.")
    if not transformer.has_mlp and (missing := [name for name in known if name in names and name in _OF_MLPS]):
        raise ValueError(
            f"`keep` must be what {transformer.name} has, got {', '.join(missing)}: it has attention only."
        )
    if names.intersection(_OF_NEURONS):
        transformer.W_out(0)  # says so if neurons cannot be told apart
    return [name for name in known if name in names]


def _has_neurons(transformer: Transformer) -> bool:
    try:
        transformer.W_out(0)
    except ValueError:  # experts
        return False
    return True


def _is_one(index: Index) -> bool:
    return isinstance(index, SupportsIndex) and not getattr(index, "ndim", 0)  # arrays have `__index__` as well


def _in_range(argument: str, index: SupportsIndex | Sequence[int], size: int) -> list[int]:
    numbers = [int(number) for number in cast(Sequence[int], [index] if _is_one(index) else index)]
    if bad := [number for number in numbers if not -size <= number < size]:
        raise ValueError(f"`{argument}` must be from {-size} to {size - 1}, got {', '.join(map(str, bad))}.")
    return [number % size for number in numbers]


def _long_frame(**axes: Sequence[int]) -> "DataFrame":
    """A table with one row for each combination of the axes' entries, the last axis fastest."""
    from pandas import MultiIndex

    return MultiIndex.from_product(list(axes.values()), names=list(axes)).to_frame(index=False)


def _column(values: Float[Tensor, "..."]) -> "NDArray[Any]":
    values = values if values.dtype == torch.float64 else values.float()  # NumPy knows no bfloat16
    return values.flatten().cpu().numpy()


def _layers_text(layers: tuple[int, ...]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


def _bytes_text(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
