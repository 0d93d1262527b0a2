"""The door of this room: a user's model, looked at and checked once, as what the library needs."""

import os
from typing import Any

import torch

from tracedensity.model.adapter import Adapter
from tracedensity.model.bridge import BridgeAdapter
from tracedensity.model.check import ModelReport, examined, known_as
from tracedensity.model.hooked import HookedAdapter
from tracedensity.model.transformer import Transformer


def as_transformer(model: object) -> Transformer:
    """The model seen through what the library needs.

    Args:
        model: A TransformerLens model (`HookedTransformer` or `TransformerBridge`), or what `load_model` accepts, or a
            `Transformer`.

    It is checked when it is first seen (`check_model`), on a short prompt.

    Raises:
        ValueError: If the object is no such model, or computes something that the graphs here do not describe.
    """
    transformer = model if isinstance(model, Transformer) else _opened(model)
    _require_no_autocast(transformer)
    if transformer is not model:
        examined(transformer).require()
    return transformer


def check_model(model: object) -> ModelReport:
    """Whether a model computes what the graphs say, and edits reach what they name: what the library relies on.

    A short prompt of random tokens is run as it is, and with values edited, and every sum is made again from its terms:
    the embedding and what heads and MLPs write add up to the stream; queries, keys, values and the MLP read it through
    their norms; heads mix values by their patterns; an edit changes what it should and nothing else; with every value
    edited into itself the prediction stays. Hooks of yours are left out meanwhile.

    Every function of the library does this when it first sees a model, and raises where something does not hold.

    Args:
        model: As for `td.density`.

    Raises:
        ValueError: If it is no model of TransformerLens, or one whose values cannot be seen.
    """
    transformer = model if isinstance(model, Transformer) else _opened(model)
    _require_no_autocast(transformer)
    return examined(transformer)


def _opened(model: object) -> Transformer:
    if isinstance(model, str | os.PathLike):
        from tracedensity.loading import load_model

        model = load_model(model)
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps it, and would compile our hooks away
    _require_uncompiled_parts(model)
    adapter = adapter_of(model)
    if adapter is None:
        raise ValueError(
            "`model` must be a HookedTransformer or TransformerBridge of TransformerLens or a name for "
            f"`td.load_model`, got {type(model).__name__}."
        )
    return Transformer(**vars(adapter.shape()), adapter=adapter)


def _require_no_autocast(model: Transformer) -> None:
    if torch.is_autocast_enabled(model.device.type):
        raise ValueError(
            f"`torch.autocast` must be off where a model is explained, got one for {model.device.type}: it would have "
            "scores and circuits computed in half precision. Leave its block, or load the model in half precision."
        )


def _require_uncompiled_parts(model: Any) -> None:
    for name, part in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if "_orig_mod" in part._modules:
            raise ValueError(
                "`model` must not have parts that `torch.compile` has wrapped, whose hooks are compiled away, got "
                f"one with such {known_as(name)!r}. Compile the whole model, or the part in place: `part.compile()`."
            )


def adapter_of(model: Any) -> Adapter | None:
    """What knows the class of a model; None where it is no class of TransformerLens.

    By name, so that nothing of TransformerLens is imported which the installed version does not have.

    Raises:
        ValueError: If the class is known, and the architecture is none that the graphs here describe.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if "HookedTransformer" in names:
        return HookedAdapter(model)
    return BridgeAdapter(model) if "TransformerBridge" in names else None
