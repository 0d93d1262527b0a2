"""A check of a model: that it computes what the graphs say, and that edits reach what they name."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tracedensity.interrupts import uninterrupted
from tracedensity.model.adapter import Site
from tracedensity.model.precision import full_precision
from tracedensity.model.transformer import Transformer
from tracedensity.model.wide import widened

if TYPE_CHECKING:
    import pandas as pd

_ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Differences that are rounding, relative to the largest number of what is compared, by what it was computed in."""

_N_POS = 8


@dataclass(frozen=True)
class Finding:
    """How far two things that should be the same are apart.

    Attributes:
        quantity: What was compared.
        layer: Where they differ most; -1 for what is in no layer.
        error: The largest difference there, relative to the largest number.
        allowed: What counts as rounding.
    """

    quantity: str
    layer: int
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """False also where the error is NaN."""
        return self.error <= self.allowed


@dataclass(frozen=True, eq=False)
class ModelReport:
    """What was found out about a model.

    Attributes:
        name: The model.
        kind: Its class in TransformerLens.
        transformer_lens: The version that is installed.
        dtype: Precision of its weights.
        heads: Query and key/value heads of a layer, in words.
        processed: Whether its weights were folded, in words.
        findings: What was compared, each with the layer where it is worst.
        first: Where in the computation something does not hold first; None if everything does.
        granularities: What the model can be taken apart into; "" or, where it cannot, why.
        torch_hooks: Modules on which there are hooks of PyTorch's that are not TransformerLens' own.
    """

    name: str
    kind: str
    transformer_lens: str
    dtype: torch.dtype
    heads: str
    processed: str
    findings: tuple[Finding, ...]
    first: Finding | None
    granularities: dict[str, str]
    torch_hooks: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything holds; of a model that gives NaN nothing is known to."""
        return bool(self.findings) and self.first is None

    def require(self) -> None:
        """Raise a ValueError that names the first thing that does not hold, and its layer."""
        bad = self.first
        if bad is not None:
            where = f"layer {bad.layer}" if bad.layer >= 0 else "the model"
            why = (
                f" The hook of PyTorch's on {self.torch_hooks[0]!r} may be why: one of TransformerLens' "
                "(`model.add_hook`) is understood."
                if self.torch_hooks
                else ""
            )
            raise ValueError(
                f"`model` must compute what its graph says, got {self.name} ({self.kind}, TransformerLens "
                f"{self.transformer_lens}): in {where} {bad.quantity} is off by {bad.error:.1%} of the largest number. "
                f"Scores and circuits would be wrong. `td.check_model` says more.{why}"
            )

    def table(self) -> "pd.DataFrame":
        """One row per quantity: the worst layer, the error there, what is allowed, and whether it holds."""
        import pandas as pd

        rows = [(each.quantity, each.layer, each.error, each.allowed, each.holds) for each in self.findings]
        return pd.DataFrame(rows, columns=["quantity", "layer", "error", "allowed", "holds"])

    def __repr__(self) -> str:
        lines = [
            f"ModelReport({self.name}: {self.kind} of TransformerLens {self.transformer_lens}, {self.dtype}, "
            f"{self.heads}, {self.processed})",
        ]
        if not self.findings:
            lines.append("  NO  nothing could be compared: values are NaN or infinite")
        for each in self.findings:
            where = f" (layer {each.layer})" if each.layer >= 0 else ""
            lines.append(f"  {'ok' if each.holds else 'NO'}  {each.error:8.1e}  {each.quantity}{where}")
        lines += [
            f"  {'NO' if why else 'ok'}  {name}{': ' + why if why else ''}" for name, why in self.granularities.items()
        ]
        return "\n".join(lines)


def examined(model: Transformer) -> ModelReport:
    """The report on a model, made once as long as its class, precision, flags and PyTorch's hooks stay the same.

    A model that gives NaN is not judged here: what is run on it says where that comes from.
    """
    precisions = frozenset(parameter.dtype for parameter in model.model.parameters())
    state = (model.adapter.state(), precisions, str(model.device), _torch_hooks(model))
    known = _EXAMINED.get(model.model)
    if known is not None and known[0] == state:
        return known[1]
    report = _examine(model)
    if report.findings:
        _EXAMINED[model.model] = (state, report)
    return report


_EXAMINED: WeakKeyDictionary[Any, tuple[object, ModelReport]] = WeakKeyDictionary()


def _examine(model: Transformer) -> ModelReport:
    _require_one_precision(model)
    grouped = model.n_kv_heads < model.n_heads
    heads = f"{model.n_heads} heads" + (f" that share {model.n_kv_heads} keys and values" if grouped else "")
    with torch.no_grad(), model.settled(), _alone(model):
        findings, first = _findings(model)
    return ModelReport(
        model.name,
        model.adapter.kind,
        version("transformer-lens"),
        model.dtype,
        heads,
        model.adapter.processed(),
        findings,
        first,
        _granularities(model),
        tuple(dict.fromkeys(name for name, _ in _torch_hooks(model))),
    )


def _require_one_precision(model: Transformer) -> None:
    """Raise a ValueError where one weight was converted and another was not; norms are often kept wide."""
    seen: dict[torch.dtype, str] = {}
    for name, parameter in model.model.named_parameters():
        if parameter.is_floating_point() and parameter.dim() > 1:
            seen.setdefault(parameter.dtype, known_as(name))
    if len(seen) > 1:
        (one, first), (other, second), *_ = seen.items()
        raise ValueError(
            f"`model` must have weights of one precision, got {model.name} with {one} ({first}) and {other} "
            f"({second}). Convert it with `model.to(...)`."
        )


def _torch_hooks(model: Transformer) -> tuple[tuple[str, int], ...]:
    """Hooks of PyTorch's that are not those of a hook point: the module, and a number that no other hook has."""
    found = [
        (module, number)
        for module in model.model.modules()
        for number, hook in (*module._forward_pre_hooks.items(), *module._forward_hooks.items())
        if not str(getattr(hook, "__module__", "")).startswith("transformer_lens")
        and not any(cls.__name__ == "HookPoint" for cls in type(module).__mro__)
    ]
    if not found:
        return ()
    # of a bridge's modules each has several names, of which TransformerLens' are the shorter ones
    names = sorted(model.model.named_modules(remove_duplicate=False), key=lambda each: -len(known_as(each[0])))
    name_of = {id(module): known_as(name) for name, module in names}
    return tuple((name_of[id(module)], number) for module, number in found)


def known_as(name: str) -> str:
    """The name of a module, or of a weight, as users know it: without what a bridge wraps it in."""
    return name.replace("._original_component", "")


@contextmanager
def _alone(model: Transformer) -> Iterator[None]:
    """While open, hooks of the user's do nothing: what they add to the stream is no part of the architecture."""
    points = list({id(point): point for point in model.model.hook_dict.values()}.values())
    hooks = [(point, point._forward_hooks) for point in points if point._forward_hooks]
    with uninterrupted():
        try:
            for point, _ in hooks:
                point._forward_hooks = OrderedDict()
            yield
        finally:
            for point, own in hooks:
                point._forward_hooks = own


# -- what is compared --------------------------------------------------------------------------------


def _findings(model: Transformer) -> tuple[tuple[Finding, ...], Finding | None]:
    generator = torch.Generator().manual_seed(0)
    n_pos = min(_N_POS, model.n_ctx)
    tokens = torch.randint(model.d_vocab, (2, n_pos), generator=generator).to(model.device)
    try:
        whole = full_precision(model.adapter.predicted(tokens)[:, -1])
    except Exception as error:  # whatever a class of models, or a hook of PyTorch's, makes of it
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if model.dtype != model.full_dtype:
            line = line.rstrip(".") + ". Load it in float32"
        raise ValueError(
            f"`model` must run by itself, got {model.name} ({model.adapter.kind}, TransformerLens "
            f"{version('transformer-lens')}, {model.dtype}), whose own forward pass fails: {line}."
        ) from error
    plain = _Held(_sites(model))
    with widened(model.dtype), model.reading({site: partial(plain.hold, site=site) for site in plain.sites}):
        logits = model.logits(tokens)
    if not all(value.isfinite().all() for value in (logits, *plain.values.values())):
        return (), None
    worst: dict[str, Finding] = {}
    wrong: list[Finding] = []

    def compare(
        quantity: str, found: Tensor, expected: Tensor, layer: int = -1, dtype: torch.dtype = model.full_dtype
    ) -> None:
        finding = Finding(quantity, layer, _apart(found, expected), _ALLOWED[dtype])
        known = worst.get(quantity)
        if known is None or not finding.error <= known.error:  # NaN is worse than anything
            worst[quantity] = finding
        if not finding.holds:
            wrong.append(finding)

    # circuits are run in the model's own precision, in which what overflows is an error where it does
    same = logits if model.dtype == model.full_dtype else model.logits(tokens)
    if whole.isfinite().all() and same.isfinite().all():
        compare("the prediction of a run up to the last block, unembedded", same, whole, dtype=model.dtype)
    positions = plain["resid_pre", 0] - plain["embed", 0]
    if model.positions in ("standard", "shortformer"):
        positions = positions - positions[:1]
    compare(
        "the stream before the first block (embedding and positions)", positions + plain["embed", 0], plain["embed", 0]
    )
    for layer in range(model.n_layers):
        for quantity, found, expected in _identities(model, plain, layer):
            compare(quantity, found, expected, layer)
    if (final := model.norm("final", 0)) is not None:
        end = plain["resid_post", model.n_layers - 1][:, -1:]
        compare("what the last norm divides by", final.statistics(end)[1], plain["final_scale", 0])

    with widened(model.dtype):
        edits = dict.fromkeys((site for site in plain.sites if not site[0].endswith("_scale")), torch.clone)
        compare("the prediction with every value edited into itself", model.logits(tokens, edits), logits)
        for edited in (_scaled, *(() if model.parallel else (_skipping,)), _reading):
            for quantity, layer, found, expected in edited(model, tokens, plain):
                compare(quantity, found, expected, layer)
    return tuple(worst.values()), next(iter(wrong), None)


_READ = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_post")


def _sites(model: Transformer) -> tuple[Site, ...]:
    """All that methods look at."""
    layers, names = range(model.n_layers), [*_READ, *(["mlp_in", "mlp_out"] if model.has_mlp else [])]
    of_neurons = ((name, layer) for layer in layers for name in _of_neurons(model, layer))
    return ("embed", 0), *((name, layer) for layer in layers for name in names), *of_neurons, *model.adapter.scales()


def _of_neurons(model: Transformer, layer: int) -> list[str]:
    """Sites of an MLP whose neurons can be told apart."""
    if not model.has_mlp or model.adapter.W_out(layer) is None:
        return []
    if model.adapter.activation(layer) is None:
        return ["post"]
    return ["pre", *(["pre_linear"] if model.adapter.gated(layer) else []), "post"]


class _Held:
    """Values at sites, in full precision."""

    def __init__(self, sites: tuple[Site, ...]) -> None:
        self.sites, self.values = sites, dict[Site, Tensor]()

    def hold(self, value: Tensor, site: Site) -> None:
        self.values[site] = full_precision(value)

    def scale(self, value: Tensor, site: Site, factor: float) -> Tensor:
        value = value * factor
        self.hold(value, site)
        return value

    def __getitem__(self, site: Site) -> Tensor:
        if site not in self.values:
            raise ValueError(
                f"`model` must show {site[0]!r} in every layer, got none in layer {site[1]}: the hook never fired."
            )
        return self.values[site]


def _identities(model: Transformer, held: _Held, layer: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What adds up to what, in a plain run."""
    stream, end = held["resid_pre", layer], held["resid_post", layer]
    middle = stream + held["attn_out", layer]
    yield "what attention and the MLP add to the stream", middle + (held["mlp_out", layer] if model.has_mlp else 0), end
    if model.has_mlp:
        yield "what the MLP reads", held["mlp_in", layer], stream if model.parallel else middle
    norm = model.attn_reader(layer)
    read = stream if norm is None else norm(stream)
    for name in "v" if model.positions == "shortformer" else "qkv":
        weight, bias = model.reading_weights(name, layer)
        made = torch.einsum("btd,hdk->bthk", read, weight) + bias
        yield f"what heads read ({name})", made, _stored(held[name, layer], made)
    yield from _of_heads(model, held, layer)
    yield from _of_mlp(model, held, layer)
    for name in ("attn_in", "mlp_in"):
        before, site = model.norm(name, layer), (f"{name}_scale", layer)
        if before is not None and site in held.sites:
            read, scale = stream if name == "attn_in" else held["mlp_in", layer], held[site]
            scale = scale[:, :, 0] if scale.dim() == 4 else scale  # a flag of the user's norms for every head
            made = before.statistics(read)[1]
            yield f"what the norm before {_BEFORE[name]} divides by", made, scale.view_as(made)


_BEFORE = {"attn_in": "attention", "mlp_in": "the MLP"}


def _of_mlp(model: Transformer, held: _Held, layer: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    if ("pre", layer) in held.sites:
        function = model.adapter.activation(layer)
        assert function is not None
        made = function(held["pre", layer])
        if ("pre_linear", layer) in held.sites:
            made = made * held["pre_linear", layer]
        # but for a bias that is the same for every token
        yield "activations of neurons", made + (held["post", layer] - made)[:1, :1], held["post", layer]
    if ("post", layer) in held.sites:
        written, out = _written_by_neurons(model, held, layer)
        yield "what neurons write", written, out


def _written_by_neurons(model: Transformer, held: _Held, layer: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """As `_written` for heads."""
    scale = held["mlp_scale", layer] if model.has_mlp_scale else 1
    written = held["post", layer] @ model.neuron_weights(layer) * factor
    out = held["mlp_out", layer] * scale
    return written + (out - written)[:1, :1], out


def _of_heads(model: Transformer, held: _Held, layer: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    z, values = held["z", layer], model.per_head(held["v", layer])
    yield "what heads make of values", torch.einsum("bhts,bshk->bthk", held["pattern", layer], values), z
    written, out = _written(model, held, layer, z)
    yield "what heads write", written, out


def _written(model: Transformer, held: _Held, layer: int, z: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """What heads write, with a bias that is the same for every token, and the output of attention.

    Both before what a norm between them and the stream divides by, through which the bias goes as well.
    """
    scale = held["attn_scale", layer] if model.has_attn_scale else z.new_ones(())
    written = torch.einsum("bthk,hkd->btd", z, model.head_weights(layer)) * factor
    out = held["attn_out", layer] * scale
    return written + (out - written)[:1, :1], out


_Compared: TypeAlias = Iterator[tuple[str, int, Tensor, Tensor]]


def _scaled(model: Transformer, tokens: Tensor, plain: _Held) -> _Compared:
    """The same sums in a run in which every value is multiplied: an edit that reached nothing, or too much, shows."""
    held = _Held(plain.sites)
    names = ["resid_pre", "v", "pattern", "z", "attn_out", "post", "mlp_out", "resid_post"]
    factor = {name: 0.95 - 0.05 * number for number, name in enumerate(names)}
    edits = {site: partial(held.scale, site=site, factor=factor[site[0]]) for site in held.sites if site[0] in names}
    others = ("mlp_in", "attn_scale", "mlp_scale")
    watched = {site: partial(held.hold, site=site) for site in held.sites if site[0] in others}
    with model.reading(watched):
        model.logits(tokens, edits)
    for layer in range(model.n_layers):
        z, values = held["z", layer], model.per_head(held["v", layer])
        made = torch.einsum("bhts,bshk->bthk", held["pattern", layer], values)
        yield "edited patterns and values", layer, made * factor["z"], z
        written, out = _written(model, held, layer, z, factor["attn_out"])
        yield "edited outputs of heads", layer, written, out
        if ("post", layer) in held.sites:
            yield "edited activations of neurons", layer, *_written_by_neurons(model, held, layer, factor["mlp_out"])
        middle = held["resid_pre", layer] + held["attn_out", layer]
        if model.has_mlp and not model.parallel:
            yield "edited outputs of attention", layer, held["mlp_in", layer], middle
        whole = middle + (held["mlp_out", layer] if model.has_mlp else 0)
        yield "edited outputs of the MLP", layer, whole * factor["resid_post"], held["resid_post", layer]


def _skipping(model: Transformer, tokens: Tensor, plain: _Held) -> _Compared:
    """What the connections around sublayers carry is halved, and what sublayers read is not."""
    held = _Held(plain.sites)
    names = ["skip_attn", *(["skip_mlp"] if model.has_mlp else [])]
    edits = {(name, layer): _halved for name in names for layer in range(model.n_layers)}
    values = ("v", "attn_out", "mlp_in", "mlp_out")
    edits |= {site: partial(held.scale, site=site, factor=1.0) for site in held.sites if site[0] in values}
    stream = plain["resid_pre", 0]
    ends: dict[int, Tensor] = {}

    def end(value: Tensor, layer: int) -> None:
        ends[layer] = full_precision(value)

    model.logits(
        tokens,
        edits
        | {("resid_post", layer): partial(_seen, see=partial(end, layer=layer)) for layer in range(model.n_layers)},
    )
    for layer in range(model.n_layers):
        norm = model.attn_reader(layer)
        weight, bias = model.reading_weights("v", layer)
        made = torch.einsum("btd,hdk->bthk", stream if norm is None else norm(stream), weight) + bias
        yield "what attention reads beside an edited connection", layer, made, _stored(held["v", layer], made)
        stream = stream / 2 + held["attn_out", layer]
        if model.has_mlp:
            yield "what the MLP reads beside an edited connection", layer, held["mlp_in", layer], stream
            stream = stream / 2 + held["mlp_out", layer]
        yield "edited connections around sublayers", layer, stream, ends[layer]


def _reading(model: Transformer, tokens: Tensor, plain: _Held) -> _Compared:
    """In each row one layer reads what it reads of the other prompt, and makes what it makes of that."""
    made_of: dict[tuple[str, ...], tuple[str, str]] = {("q", "k"): ("pattern", "edited queries and keys")}
    if model.has_mlp:
        made_of["mlp_in",] = ("mlp_out", "edited inputs of the MLP")
    cases = [(names, layer) for names in made_of for layer in range(model.n_layers)]
    held = _Held(plain.sites)

    def exchange(value: Tensor, row: int, site: Site) -> Tensor:
        value = value.clone()
        value[row] = _stored(plain[site][1:], value)[0].to(value)
        return value

    after = {(made_of[names][0], layer) for names, layer in cases}
    edits = {
        (name, layer): partial(exchange, row=row, site=(name, layer))
        for row, (names, layer) in enumerate(cases)
        for name in names
    }
    with model.reading({site: partial(held.hold, site=site) for site in after}):
        model.logits(tokens[:1].expand(len(cases), -1), edits)
    for row, (names, layer) in enumerate(cases):
        name, quantity = made_of[names]
        yield quantity, layer, held[name, layer][row], plain[name, layer][1]


def _halved(value: Tensor) -> Tensor:
    return value / 2


def _seen(value: Tensor, see: Callable[[Tensor], None]) -> Tensor:
    see(value)
    return value


def _stored(value: Tensor, made: Tensor) -> Tensor:
    """Keys or values, one per group also where a flag of the user's has ungrouped them; others as they are."""
    return value[:, :, :: value.shape[2] // made.shape[2]] if value.dim() == 4 else value


def _granularities(model: Transformer) -> dict[str, str]:
    """What the model can be taken apart into, and why not."""
    parallel = "attention and MLP of a block read the same stream" if model.parallel else ""
    neurons = "no MLPs" if not model.has_mlp else "no plain MLPs (experts?)" if model.adapter.W_out(0) is None else ""
    ungrouped = ""
    if model.n_kv_heads < model.n_heads:
        try:
            with model.adapter.ungrouped():
                pass
        except ValueError as error:
            ungrouped = str(error).split(": ", 1)[-1].rstrip(".")
    beside = "queries and keys read positions beside the stream" if model.positions == "shortformer" else ""
    return {
        "tokens": parallel,
        "components": beside,
        "neurons": neurons,
        "keys and values of every head": ungrouped,
    }


def _apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number, or as it is where that is zero."""
    largest = float(expected.abs().max())
    return float((found.to(expected.device) - expected).abs().max()) / (largest or 1.0)
